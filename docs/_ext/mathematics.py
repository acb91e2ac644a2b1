"""Mathematics without a network: MathJax comes from an installed wheel, as one file."""

import importlib.metadata
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.transforms import SphinxTransform

# One file with its glyphs as paths: no fonts to load, and MathML for screen readers beside them.
SCRIPT = "tex-svg-full.js"


def script() -> str:
    """Return the path at which the wheel of MathJax has its script."""
    files = importlib.metadata.files("sphinx-mathjax-offline") or []
    (found,) = (file for file in files if file.name == SCRIPT)
    return str(found.locate())


def configure(_: Sphinx, config: Config) -> None:
    """Name the local script. The menu would load more parts than the one file has."""
    config.html_static_path.append(script())
    config.mathjax_path = SCRIPT
    config.mathjax3_config = {"options": {"enableMenu": False}}


class Punctuation(SphinxTransform):
    """Keep a formula and the mark that follows it on one line; a browser may break there."""

    default_priority = 900  # after what reads or replaces text

    def apply(self, **_: Any) -> None:
        """Wrap both of them."""
        for formula in list(self.document.findall(nodes.math)):
            after = formula.next_node(descend=False, siblings=True)
            mark = re.match(r"[.,:;!?)\]]+", after) if isinstance(after, nodes.Text) else None
            if mark:
                rest = nodes.Text(after[mark.end() :])
                after.parent.replace(after, rest)
                kept = nodes.inline("", "", classes=["kept-together"])
                formula.replace_self(kept)
                kept += [formula, nodes.Text(mark.group())]


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.setup_extension("sphinx.ext.mathjax")
    app.add_transform(Punctuation)
    app.connect("config-inited", configure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
