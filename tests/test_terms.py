"""Every name in the table of terms is in the file that the table links to."""

import ast
import pathlib
import re

import pytest

pytestmark = pytest.mark.fast

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs/terms.md"
ROWS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
LINK = re.compile(r"\[`(\w+)`\]\[(\w+)\]")
TARGETS = dict(re.findall(r"^\[(\w+)\]: (\S+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))


def names_in(source):
    """Functions, classes, and fields of classes."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_each_term_is_in_the_code(row):
    links = LINK.findall(row)
    assert links
    for name, file in links:
        source = (PAGE.parent / TARGETS[file]).read_text(encoding="utf-8")
        assert name in names_in(source), f"there is no {name} in {TARGETS[file]}"


def test_the_table_is_complete_and_a_wrong_name_would_be_seen():
    assert len(ROWS) >= 20
    source = "class A:\n    x: int\n    def f(self): pass\ny = 1"
    assert names_in(source) == {"A", "x", "f"}
