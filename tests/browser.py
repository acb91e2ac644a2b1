"""Pages in a real browser: what it makes of a document, and a session that presses keys.

Tests that need one are skipped where there is no Chromium.
"""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--enable-logging=stderr",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
needed = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")


def opened(path: pathlib.Path, tmp_path: pathlib.Path) -> tuple[str, list[str]]:
    """Return the document that a browser makes of a page, and what it logs."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, "--virtual-time-budget=9000", "--dump-dom", path.as_uri()]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return found.stdout, [line for line in found.stderr.splitlines() if "CONSOLE" in line]


# Codes of keys on a keyboard, which decide what a control does with them.
KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "Tab": 9}
PATIENCE = 120  # seconds for one answer


class Session:
    """A page of a running browser, driven through Chromium's own protocol over two pipes."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands = os.fdopen(commands, "wb", buffering=0)
        self.answers = os.fdopen(answers, "rb", buffering=0)
        self.number, self.unread, self.target = 0, b"", {}
        self.log: list[str] = []
        page = self.call("Target.createTarget", url="about:blank")
        arguments = {"targetId": page["targetId"], "flatten": True}
        self.target = {"sessionId": self.call("Target.attachToTarget", **arguments)["sessionId"]}
        for part in ("Page", "Runtime"):
            self.call(f"{part}.enable")

    def message(self) -> dict[str, Any]:
        """Return the next message; they end with a zero byte."""
        while b"\0" not in self.unread:
            assert select.select([self.answers], [], [], PATIENCE)[0], "the browser is silent"
            more = os.read(self.answers.fileno(), 1 << 20)
            assert more, "the browser is gone"
            self.unread += more
        one, self.unread = self.unread.split(b"\0", 1)
        return json.loads(one)

    def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Return the result of a command."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": arguments, **self.target}
        self.commands.write(json.dumps(command).encode() + b"\0")
        while "id" not in (found := self.message()):
            if found["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.log.append(json.dumps(found["params"]))
        assert "error" not in found, found
        return found["result"]

    def open(self, path: pathlib.Path) -> None:
        """Open a page, and wait until it has run its scripts."""
        self.call("Page.navigate", url=path.as_uri())
        self.value("new Promise((done) => (document.readyState === 'complete' ? done()"
                   " : addEventListener('load', () => done())))")  # fmt: skip

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript; it may be a promise."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key of `KEYS`, as a keyboard does."""
        arguments = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **arguments)
        self.call("Input.dispatchKeyEvent", type="keyUp", **arguments)

    def screen(self, width: int, height: int, dark: bool = False) -> None:
        """Set the size of the window and its style."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        style = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[style])

    def picture(self) -> bytes:
        """Return the page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])


@contextlib.contextmanager
def session(folder: pathlib.Path) -> Iterator[Session]:
    """Start a browser whose profile is in a folder, and end it."""
    (theirs, commands), (answers, written) = os.pipe(), os.pipe()
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
    # The browser reads from 3 and writes to 4.
    moved = f'exec "$@" 3<&{theirs} 4>&{written}'
    command = ["bash", "-c", moved, "-", str(CHROMIUM), *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=(theirs, written), **quiet)
    os.close(theirs)
    os.close(written)
    try:
        yield Session(commands, answers)
    finally:
        process.terminate()
        process.wait(20)
