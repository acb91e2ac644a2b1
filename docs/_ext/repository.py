"""Links from the pages to the repository's other files, which become pages of the site.

A link such as `../purejaxpg/agents/ppo.py` works where the repository's files are shown. On the
site it leads to a page with the text of that file. The role `theory-test` links to a test, and
`Source` beside a function or class of the reference to its first line.
"""

import ast
import functools
import html
import os
import pathlib
import string
from typing import Any
from urllib.parse import quote

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxRole

DOCS = pathlib.Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
# Pages that show a file from outside docs/.
SHOWN = {
    "index": "README.md",
    "project/contributing": "CONTRIBUTING.md",
    "project/changelog": "CHANGELOG.md",
    "project/log": "benchmarks/LOG.md",
    "project/returns": "experiments/RESULTS.md",
    "project/experiments": "experiments/README.md",
}
TEMPLATE = string.Template((DOCS / "_ext" / "source.html").read_text(encoding="utf-8"))
PAGE_OF = {path: page for page, path in SHOWN.items()} | {"docs": "index"}
TEXT = {".py", ".toml", ".sh", ".yaml", ".csv", ".js", ".css", ".j2", ".json", ".cff", ""}


def source_page(path: pathlib.Path) -> str:
    """Return the name of the page that shows a file or folder."""
    return f"source/{path.relative_to(ROOT).as_posix()}"


def link(env: BuildEnvironment, path: pathlib.Path, anchor: str = "") -> str:
    """Return the address of a file's page, relative to the page being read, and have it made."""
    linked(env).setdefault(env.docname, set()).add(path)
    here = pathlib.PurePosixPath(env.docname).parent
    address = quote(os.path.relpath(source_page(path), here))
    return f"{address}.html" + (f"#{anchor}" if anchor else "")


def linked(env: BuildEnvironment) -> dict[str, set[pathlib.Path]]:
    """Return the files to which each page links."""
    if not hasattr(env, "repository_files"):
        env.repository_files = {}
    return env.repository_files


class RepositoryLinks(SphinxTransform):
    """Send links that leave docs/ to pages of the site."""

    default_priority = 5  # before the files to download are collected

    def apply(self, **_: Any) -> None:
        """Replace each of them."""
        shown = SHOWN.get(self.env.docname) if self.env.docname != "index" else None
        folder = (ROOT / shown if shown else DOCS / f"{self.env.docname}.md").parent
        for kind in (addnodes.pending_xref, addnodes.download_reference):
            for node in list(self.document.findall(kind)):
                if node.get("reftype") == "myst":
                    self.replace(node, folder)

    def replace(self, node: nodes.Element, folder: pathlib.Path) -> None:
        """Let one link lead to the page of its file, if it is a file of the repository."""
        target, _, anchor = node["reftarget"].partition("#")
        path = pathlib.Path(os.path.normpath(folder / target))
        if node.get("refdomain") == "doc":  # myst has made it the name of a page, if it is in docs/
            path = pathlib.Path(f"{target}.md")
        if not target or not path.is_absolute() or not path.exists():
            return
        if not path.is_relative_to(ROOT):
            return
        name = path.relative_to(ROOT).as_posix()
        page = PAGE_OF.get(name)
        if page is None and path.is_relative_to(DOCS) and path.suffix == ".md":
            page = path.relative_to(DOCS).with_suffix("").as_posix()
        if page is not None:
            anchor = node.get("reftargetid") or anchor or None
            node["refdomain"], node["reftarget"], node["reftargetid"] = "doc", page, anchor
        elif path.is_dir() or path.suffix in TEXT:
            reference = nodes.reference("", "", internal=True, refuri=link(self.env, path, anchor))
            reference += node.children
            node.replace_self(reference)


class IncludedCode(SphinxTransform):
    """Show included lines in the colours of Python: only Python files are included."""

    default_priority = 399  # before blocks without a language get that of the site

    def apply(self, **_: Any) -> None:
        """Name the language of each of them."""
        for block in self.document.findall(nodes.literal_block):
            if str(block.get("source", "")).endswith(".py"):
                block.setdefault("language", "python")


class TheoryTest(SphinxRole):
    """A link to a test: `tests/theory/test_policy_gradient.py::test_name`."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the link; the build fails if there is no such test."""
        name, _, function = "".join(self.text.split()).partition("::")  # may go over two lines
        path = ROOT / name
        if not name.startswith("tests/") or not path.is_file():
            return self.fault(f"there is no file {name!r} of tests")
        if function not in definitions(path):
            return self.fault(f"{name} has no test {function!r}")
        address = link(self.env, path, function)
        text = nodes.literal("", function)
        return [nodes.reference("", "", text, internal=True, refuri=address)], []

    def fault(self, message: str) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Report a link that leads nowhere."""
        report = self.inliner.reporter.error(f"theory-test: {message}.", line=self.lineno)
        return [self.inliner.problematic(self.rawtext, self.rawtext, report)], [report]


@functools.cache
def definitions(path: pathlib.Path) -> dict[str, int]:
    """Return the first line of each function and class in a file, by qualified name."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                first = min([child.lineno, *(each.lineno for each in child.decorator_list)])
                found[prefix + child.name] = first
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def add_source_links(app: Sphinx, doctree: nodes.document) -> None:
    """Link each function and class of the reference to its source."""
    for description in doctree.findall(addnodes.desc):
        if description.get("domain") != "py" or description.get("objtype") == "module":
            continue
        signature = description[0]
        base = ROOT / str(signature.get("module", "")).replace(".", "/")
        paths = [p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()]
        name = signature.get("fullname", "")
        if paths and name in definitions(paths[0]):
            address = link(app.env, paths[0], name)
            text = nodes.inline("", "[source]", classes=["viewcode-link"])
            signature += nodes.reference("", "", text, internal=True, refuri=address)


def write_pages(app: Sphinx, exception: Exception | None) -> None:
    """Write the pages of all files that something links to, and of those in linked folders."""
    if exception is not None or app.builder.format != "html":
        return
    paths = set().union(*linked(app.env).values())
    for folder in [path for path in paths if path.is_dir()]:
        paths |= {path for path in folder.iterdir() if is_listed(path)}
    for path in sorted(paths):
        page = pathlib.Path(app.outdir, f"{source_page(path)}.html")
        if path.is_dir() or not page.is_file() or page.stat().st_mtime < path.stat().st_mtime:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(shown(path), encoding="utf-8")


def shown(path: pathlib.Path) -> str:
    """Return the page of a file or folder."""
    title = path.relative_to(ROOT).as_posix()
    body = listing(path) if path.is_dir() else code(path)
    root = "../" * (title.count("/") + 1)
    return TEMPLATE.substitute(title=title, root=root, body=body)


def is_listed(path: pathlib.Path) -> bool:
    """Tell whether the page of a folder names an entry."""
    return not path.name.startswith((".", "__")) and path.is_file() and path.suffix in TEXT


def listing(folder: pathlib.Path) -> str:
    """Return a list of the files in a folder."""
    rows = ""
    for name in sorted(path.name for path in folder.iterdir() if is_listed(path)):
        address = quote(f"{folder.name}/{name}")
        rows += f'<li><a href="{address}.html">{html.escape(name)}</a></li>'
    return f"<ul>{rows}</ul>"


def code(path: pathlib.Path) -> str:
    """Return the text of a file in colours; its functions and classes can be linked to."""
    text = path.read_text(encoding="utf-8")
    try:
        lexer = get_lexer_for_filename(path.name, stripnl=False)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False)
    lines = highlight(text, lexer, HtmlFormatter(nowrap=True)).splitlines()
    for name, number in (definitions(path) if path.suffix == ".py" else {}).items():
        lines[number - 1] = f'<span id="{name}" class="source-place">{lines[number - 1]}</span>'
    return f'<div class="highlight"><pre>{chr(10).join(lines)}\n</pre></div>'


def purge(_: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Forget the links of a page that is read anew or gone."""
    linked(env).pop(docname, None)


def merge(_: Sphinx, env: BuildEnvironment, docnames: Any, other: BuildEnvironment) -> None:
    """Take the links of pages that another process has read."""
    linked(env).update(linked(other))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.add_transform(RepositoryLinks)
    app.add_transform(IncludedCode)
    app.add_role("theory-test", TheoryTest())
    app.connect("doctree-read", add_source_links)
    app.connect("build-finished", write_pages)
    app.connect("env-purge-doc", purge)
    app.connect("env-merge-info", merge)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
