"""Equations of the course carry the number of their chapter, also where another page names them."""

import pathlib
import sys

import pytest

pytestmark = pytest.mark.site

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
CONF = """
extensions = ["myst_parser", "sphinx.ext.mathjax", "chapters"]
myst_enable_extensions = ["dollarmath"]
"""
EQUATION = "# A page\n\n$$\na = b\n$$ (eq-{0})\n\n$$\nc\n$$\n\n$$\nd = e\n$$ (eq-{0}-second)\n"


def test_numbers_begin_with_the_chapter(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sphinx.application import Sphinx

    monkeypatch.setattr(sys, "path", [str(DOCS / "_ext"), *sys.path])
    source = tmp_path / "docs"
    (source / "course").mkdir(parents=True)
    (source / "conf.py").write_text(CONF)
    (source / "course" / "02-two.md").write_text(EQUATION.format("two"))
    (source / "course" / "11-eleven.md").write_text(
        EQUATION.format("eleven") + "\nSee {eq}`eq-two-second`.\n"
    )
    pages = "```{toctree}\ncourse/02-two\ncourse/11-eleven\nplain\n```\n"
    (source / "index.md").write_text(f"# Pages\n\n{pages}")
    (source / "plain.md").write_text(EQUATION.format("plain"))
    build = tmp_path / "html"
    app = Sphinx(source, source, build, tmp_path / "trees", "html", warningiserror=True)
    app.build()
    two, eleven, plain = (
        (build / f"{name}.html").read_text()
        for name in ("course/02-two", "course/11-eleven", "plain")
    )
    for number in ("(2.1)", "(2.2)"):
        assert number in two
    for number in ("(11.1)", "(11.2)"):
        assert number in eleven
    assert ">(2.2)</a>" in eleven
    assert "(1)" in plain
