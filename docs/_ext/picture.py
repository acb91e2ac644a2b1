"""The directive `picture`: an interactive figure of docs/pictures in a page."""

import functools
import hashlib
import pathlib
import sys
from typing import Any

import plotly
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective

DOCS = pathlib.Path(__file__).resolve().parent.parent
PICTURES = DOCS / "pictures"
PLOTLY = pathlib.Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
# What a figure is made from: it is computed anew when one of these files changes.
SOURCES = ("docs/pictures/**/*", "purejaxpg/**/*.py", "experiments/**/*.csv", "experiments/*.toml")
# pictures.js needs plotly, so the order counts; both wait until the page is read.
SCRIPTS = ("plotly.min.js", "pictures.js")


@functools.cache
def digest(root: pathlib.Path) -> str:
    """Return a hash of all files that a figure may depend on."""
    found = hashlib.sha256()
    paths = sorted(path for pattern in SOURCES for path in root.glob(pattern) if path.is_file())
    for path in paths:
        if path.suffix != ".pyc":
            found.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def fragment(name: str, cache: pathlib.Path) -> str:
    """Return the HTML of a picture, from the cache if nothing changed that it is made from."""
    path = cache / f"{name}-{digest(DOCS.parent)}.html"
    if not path.is_file():
        if str(PICTURES) not in sys.path:
            sys.path.insert(0, str(PICTURES))
        import _controls

        cache.mkdir(parents=True, exist_ok=True)
        path.write_text(_controls.fragment(name), encoding="utf-8")
    return path.read_text(encoding="utf-8")


class Picture(SphinxDirective):
    """Embed the figure of docs/pictures/NAME.py, with its sentence below."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the figure; the build fails if there is none of this name."""
        (name,) = self.arguments
        script = PICTURES / f"{name}.py"
        if name.startswith("_") or not script.is_file():
            known = ", ".join(sorted(path.stem for path in PICTURES.glob("[!_]*.py")))
            raise self.error(f"There is no picture {name!r}; there are: {known}.")
        self.env.note_dependency(str(script))
        html = fragment(name, pathlib.Path(self.env.app.outdir).parent / "pictures")
        return [nodes.raw("", html, format="html", classes=["picture"])]


def add_scripts(app: Sphinx, page: str, template: str, context: Any, doctree: Any) -> None:
    """Load plotly and the controls, once, on the pages that have a picture."""
    found = doctree.findall(nodes.raw) if doctree is not None else ()
    if any("picture" in node["classes"] for node in found):
        app.add_css_file("pictures.css")
        for script in SCRIPTS:
            app.add_js_file(script, defer="defer")


def configure(_: Sphinx, config: Config) -> None:
    """Take plotly.js from the installed package."""
    config.html_static_path.append(str(PLOTLY))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.add_directive("picture", Picture)
    app.connect("config-inited", configure)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
