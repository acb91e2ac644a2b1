"""Mathematics without a network: MathJax comes from an installed wheel, as one file."""

import importlib.metadata
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

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


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.setup_extension("sphinx.ext.mathjax")
    app.connect("config-inited", configure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
