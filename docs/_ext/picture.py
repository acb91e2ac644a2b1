"""The directive `picture`: an interactive figure of docs/pictures in a page."""

import functools
import hashlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import plotly
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

DOCS = pathlib.Path(__file__).resolve().parent.parent
PICTURES = DOCS / "pictures"
PLOTLY = pathlib.Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
# What a figure is made from: it is computed anew when one of these files changes.
SOURCES = (
    *("docs/pictures/**/*", "docs/course/17-timeline.md", "purejaxpg/**/*.py"),
    *("experiments/**/*.csv", "experiments/*.toml"),
)
# pictures.js needs plotly, so the order counts; both wait until the page is read.
SCRIPTS = ("plotly.min.js", "pictures.js")


@functools.cache
def digest(root: pathlib.Path, patterns: tuple[str, ...] = SOURCES) -> str:
    """Return a hash of all files that something is made from."""
    found = hashlib.sha256()
    paths = sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file())
    for path in paths:
        if path.suffix != ".pyc":
            found.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def fragment(name: str, arguments: Sequence[str], cache: pathlib.Path) -> str:
    """Return the HTML of a picture, from the cache if nothing changed that it is made from."""
    path = cache / f"{'-'.join((name, *arguments))}-{digest(DOCS.parent)}.html"
    if not path.is_file():
        if str(PICTURES) not in sys.path:
            sys.path.insert(0, str(PICTURES))
        import _controls

        text = _controls.fragment(name, *arguments)
        cache.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")


class Picture(SphinxDirective):
    """Embed the figure of docs/pictures/NAME.py, with its sentence below: `NAME [ARGUMENT]`."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the figure; the build fails if there is none of this name and argument."""
        name, *arguments = self.arguments
        try:
            html = fragment(name, arguments, pathlib.Path(self.env.app.outdir).parent / "pictures")
        except ValueError as fault:
            raise self.error(f"{fault}.") from None
        return [nodes.raw("", html, format="html", classes=["picture"])]


def outdated(app: Sphinx, env: BuildEnvironment, *_: Any) -> list[str]:
    """Return the pages with a picture if anything changed that pictures are made from."""
    now, before = digest(DOCS.parent), getattr(env, "pictures_made_from", None)
    env.pictures_made_from = now
    if now == before:
        return []
    return [
        page
        for page in env.found_docs
        if "{picture}" in pathlib.Path(env.doc2path(page)).read_text(encoding="utf-8")
    ]


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
    app.connect("env-get-outdated", outdated)
    app.connect("html-page-context", add_scripts)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
