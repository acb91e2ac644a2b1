"""A report to open on the site: a small sweep, made while Sphinx reads the pages."""

import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import picture
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxRole

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDY = "experiments/example.toml"
PAGE = "example-report.html"
# Results that other code has made are not shown.
SOURCES = ("purejaxpg/**/*.py", STUDY)


def workplace(app: Sphinx) -> pathlib.Path:
    """Return the folder of the sweep's results and of what it printed."""
    build = pathlib.Path(app.outdir).parent
    return build / "example" / picture.digest(ROOT, SOURCES)


def start(app: Sphinx) -> None:
    """Start the sweep. If it was finished before, this only writes its report again."""
    if app.builder.format != "html":
        return
    folder = workplace(app)
    for old in set(folder.parent.glob("*")) - {folder}:
        shutil.rmtree(old)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "purejaxpg.cli", "sweep", STUDY, "--confirm", "8"]
    # It shares the machine with Sphinx, and a build without an accelerator has to look the same.
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with (folder / "log").open("w", encoding="utf-8") as log:
        app.example_sweep = subprocess.Popen(
            [*command, "--out", str(folder / "example")], cwd=ROOT, env=env, stdout=log, stderr=log
        )


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Wait for the sweep, and put its report beside the pages."""
    sweep = getattr(app, "example_sweep", None)
    if sweep is None:
        return
    if exception is not None:
        sweep.terminate()  # the next build resumes it
        return
    folder = workplace(app)
    if sweep.wait():
        log = (folder / "log").read_text(encoding="utf-8")
        raise ExtensionError(f"The sweep of {STUDY} failed.\n{log[-2000:]}")
    shutil.copyfile(folder / "example" / "report" / "index.html", pathlib.Path(app.outdir, PAGE))


class ExampleReport(SphinxRole):
    """A link to the report: {example-report}`its text`."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the link."""
        address = "../" * self.env.docname.count("/") + PAGE
        return [nodes.reference("", self.text, internal=True, refuri=address)], []


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx."""
    app.add_role("example-report", ExampleReport())
    app.connect("builder-inited", start)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
