"""Docstrings of the package as reStructuredText.

They are written to be read in an editor: equations are indented, names have single backquotes, and
characters such as `|` and `*` mean themselves. Napoleon then makes fields of their sections.
"""

import dataclasses
import functools
import inspect
import re
from typing import Any

from flax import linen
from sphinx.application import Sphinx

from purejaxpg import config as configs

SECTION = re.compile(r"(Args|Returns|Raises|Yields|References|Attributes|Example|Examples):$")
MODULE = re.compile(r"(?:\w+\.)+(?=\w)")  # in front of the name of a type
ITEM = re.compile(r"\s*([-*]|\d+\.) ")
# Code in backquotes, words in stars, and otherwise a character that reStructuredText would read.
MARKUP = re.compile(
    r"(``.+?``)|`([^`]+)`|((?<!\w)(?:\*\w+\*|\*\*\w[^*]*\*\*)(?!\w))|([*|`\\]|(?<=\w)_(?!\w))"
)


def escaped(line: str) -> str:
    """Return a line in which only code and stressed words are markup."""

    def replaced(match: re.Match[str]) -> str:
        code, quoted, stressed, character = match.groups()
        if quoted:  # a letter right behind code would not end it
            code = f"``{quoted}``" + ("\\ " if line[match.end() :][:1].isalpha() else "")
        return code or stressed or f"\\{character}"

    return MARKUP.sub(replaced, line)


def indent(line: str) -> int:
    """Return the number of spaces before a line's text."""
    return len(line) - len(line.lstrip())


def paragraphs(lines: list[str]) -> list[list[str]]:
    """Return the blocks between empty lines. A list that follows text is a block of its own."""
    found: list[list[str]] = [[]]
    for line in lines:
        begins_list = ITEM.match(line) and found[-1] and not ITEM.match(found[-1][0])
        section = SECTION.match(line) is not None
        if not line.strip() or begins_list or section:
            found.append([])
        if line.strip():
            found[-1].append(line)
    return [block for block in found if block]


def converted(lines: list[str]) -> list[str]:
    """Return a docstring as reStructuredText.

    An indented block is shown as it is, unless it belongs to a section, to a list or to a `::`.
    """
    found: list[str] = []
    inside, literal = False, False  # a section such as Args; what follows a `::`
    for block in paragraphs(lines):
        first = block[0]
        starts = SECTION.match(first) is not None
        inside = starts or (inside and indent(first) > 0)
        shown = indent(first) >= 4 and not inside
        doctest = first.lstrip().startswith(">>>")
        if shown and not literal and not doctest:
            found += ["::", ""]
        found += block if shown or doctest else [escaped(line) for line in block]
        literal = shown if shown and literal else block[-1].endswith("::")
        found.append("")
    return found


def process(app: Sphinx, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring, and add a table of the fields if it is a dataclass's."""
    table: list[str] = []
    if what in ("class", "exception") and dataclasses.is_dataclass(item):
        table = table_of(item, fields(item, take_section(lines)))
    lines[:] = converted(lines) + table


def table_of(cls: type, said: dict[str, str]) -> list[str]:
    """Return a table of a dataclass's own fields: name, meaning, default, type."""
    rows = [("Field", "Meaning", "Default", "Type")]
    hidden = ("parent", "name") if issubclass(cls, linen.Module) else ()  # flax adds them
    for field in dataclasses.fields(cls):
        if field.name in vars(cls).get("__annotations__", {}) and field.name not in hidden:
            written = field.type if isinstance(field.type, str) else None
            kind = MODULE.sub("", written or inspect.formatannotation(field.type))
            default = "" if field.default is dataclasses.MISSING else f"``{field.default!r}``"
            meaning = escaped(said.get(field.name, ""))
            rows.append((f"``{field.name}``", meaning, default, f"``{kind}``"))
    if len(rows) == 1:
        return []
    lines = [".. list-table::", "   :header-rows: 1", "   :class: fields", ""]
    for row in rows:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}".rstrip() for i, cell in enumerate(row)]
    return [*lines, ""]


def fields(cls: type, section: list[str]) -> dict[str, str]:
    """Return what a class says of its fields, in comments after them or in its docstring."""
    found = dict(configs.field_help(cls))
    name = ""
    for line in filter(str.strip, section):
        if indent(line) == 4:
            name, _, line = line.strip().partition(": ")
            found[name] = line
        else:
            found[name] = f"{found[name]} {line.strip()}"
    return found


def take_section(lines: list[str]) -> list[str]:
    """Take the section Attributes out of a docstring and return its lines."""
    if "Attributes:" not in lines:
        return []
    first = lines.index("Attributes:")
    rest = lines[first + 1 :]
    stop = next((i for i, line in enumerate(rest) if line.strip() and not indent(line)), len(rest))
    del lines[first : first + 1 + stop]
    return rest[:stop]


def is_left_out(app: Sphinx, what: str, name: str, item: Any, skip: bool, options: Any) -> Any:
    """Leave out the fields of classes, which are in the table."""
    kinds = (property, functools.cached_property, classmethod, staticmethod)
    if what == "class" and not callable(item) and not isinstance(item, kinds):
        return True
    return None


def without_signature(
    app: Sphinx, what: str, name: str, item: Any, options: Any, signature: str, returned: str
) -> tuple[str, None] | None:
    """Leave out the signature of a dataclass, whose fields are in the table."""
    return ("", None) if what == "class" and dataclasses.is_dataclass(item) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx, before napoleon."""
    app.connect("autodoc-process-docstring", process, priority=100)
    app.connect("autodoc-skip-member", is_left_out)
    app.connect("autodoc-process-signature", without_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
