"""Options and small numbers stay whole; a browser may break a line after each of their hyphens."""

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

# `--snapshot-every` up to its second word, `-e`, and 6.9e-4.
WHOLE = re.compile(r"((?<![\w-])--?[a-z]\w*|\d[\d.]*e-\d+)")
PLACES = (nodes.paragraph, nodes.literal, nodes.emphasis, nodes.strong, nodes.reference)


class Whole(SphinxTransform):
    """Wrap what stays on one line; the style sheet does the rest."""

    default_priority = 900  # after what reads or replaces text

    def apply(self, **_: Any) -> None:
        """Look through running text and code within it, and leave blocks of code alone."""
        for text in list(self.document.findall(nodes.Text)):
            parts = WHOLE.split(text)
            if len(parts) > 1 and isinstance(text.parent, PLACES):
                # Every second part is a match.
                new = [kept(part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts)]
                text.parent.replace(text, new)


def kept(text: str) -> nodes.inline:
    """Return a text on one line."""
    return nodes.inline("", text, classes=["kept-together"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.add_transform(Whole)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
