"""Equations of the course get the number of their chapter: (2.3) instead of (3) on every page."""

import re
from typing import Any, cast

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.math import MathDomain


def number_equations(app: Sphinx, doctree: nodes.document) -> None:
    """Put the chapter in front of the number, where it is shown and where it is referred to."""
    chapter = re.match(r"course/(\d+)-", app.env.docname)
    if not chapter:
        return
    equations = cast(MathDomain, app.env.get_domain("math")).equations
    for block in doctree.findall(nodes.math_block):
        if block.get("label") and block.get("number"):
            block["number"] = f"{int(chapter[1])}.{block['number']}"
            equations[block["label"]] = app.env.docname, block["number"]


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.connect("doctree-read", number_equations)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
