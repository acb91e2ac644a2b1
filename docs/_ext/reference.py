"""The reference: a page for each module of the package, and the command line's own help."""

import argparse
import ast
import os
import pathlib
from typing import Any
from unittest import mock

from docstrings import escaped
from docutils import nodes
from docutils.parsers.rst import Parser
from docutils.utils import new_document
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from purejaxpg import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "purejaxpg"
PAGES = "reference/api"  # in docs/, made anew at each build
PAGE = """{title}
{line}

.. automodule:: {name}
   :members:
   :undoc-members:
   :ignore-module-all:
"""
COLUMNS = 80


def modules(package: pathlib.Path = PACKAGE) -> dict[str, pathlib.Path]:
    """Return the file of each public module, by its full name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if not any(part.startswith("_") for part in parts):
            found[".".join(parts)] = path
    return found


def children(name: str, names: list[str]) -> list[str]:
    """Return the modules directly inside a package."""
    return [each for each in names if each.rpartition(".")[0] == name]


def summary(path: pathlib.Path) -> str:
    """Return the first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def write_pages(app: Sphinx) -> None:
    """Write a page for each module, and remove those of modules that are gone."""
    folder = pathlib.Path(app.srcdir, PAGES)
    folder.mkdir(parents=True, exist_ok=True)
    found = modules()
    for name in found:
        text = PAGE.format(title=name, line="=" * len(name), name=name)
        if name != PACKAGE.name and children(name, list(found)):
            text += f"\n.. modules:: {name}\n"
        path = folder / f"{name}.rst"
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in folder.glob("*.rst"):
        if path.stem not in found:
            path.unlink()


class Modules(SphinxDirective):
    """List the modules of a package with what each is for."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the list, with a toctree behind it."""
        found = modules()
        names = children(self.arguments[0], list(found))
        lines = [".. toctree::", "   :hidden:", ""]
        lines += [f"   {name.rpartition('.')[2]} </{PAGES}/{name}>" for name in names]
        lines += [""]
        for name in names:
            lines += [f":doc:`{name} </{PAGES}/{name}>`", f"   {escaped(summary(found[name]))}"]
            inner = [each.removeprefix(f"{name}.") for each in found if each.startswith(f"{name}.")]
            links = [f":doc:`{each} </{PAGES}/{name}.{each}>`" for each in inner]
            lines += ["", f"   {', '.join(links)}", ""] if links else []
        source = self.env.doc2path(self.env.docname)
        for path in found.values():
            self.env.note_dependency(str(path))
        return self.parse(lines, str(source))

    def parse(self, lines: list[str], source: str) -> list[nodes.Node]:
        """Return the nodes of some reStructuredText."""
        document = new_document(source, self.state.document.settings)
        Parser().parse("\n".join(lines), document)
        return document.children


class CommandLine(SphinxDirective):
    """Show what each command says about itself."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each command."""
        self.env.note_dependency(cli.__file__)
        with mock.patch.dict(os.environ, {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"}):
            parser = cli.make_parser()
            found: list[nodes.Node] = [self.shown("purejaxpg --help", parser)]
            for name, command in parser.commands.items():
                section = nodes.section(ids=[name])
                section += nodes.title("", f"purejaxpg {name}")
                section += self.shown(f"purejaxpg {name} --help", command)
                self.state.document.note_explicit_target(section)
                found.append(section)
        return found

    def shown(self, call: str, parser: argparse.ArgumentParser) -> nodes.Node:
        """Return a call and its output."""
        text = f"$ {call}\n{parser.format_help()}"
        return nodes.literal_block(text, text, language="console")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.add_directive("modules", Modules)
    app.add_directive("command-line", CommandLine)
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
