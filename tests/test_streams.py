"""Standard output that is closed, replaced, full, or cannot show every character."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from purejaxpg import streams
from purejaxpg.sweep import fsck

CLI = [sys.executable, "-m", "purejaxpg.cli"]
NO_UTF8 = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
FLAGS = [
    *("--total-timesteps", "64", "--num-envs", "2", "--num-steps", "16"),
    *("--hidden", "4", "--quiet", "--out", "r"),
]


def run(words: list[str], where: pathlib.Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLI, *words], cwd=where, env={**os.environ, **more}, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with results in `r`, made where nothing but ASCII can be printed."""
    folder = tmp_path_factory.mktemp("streams")
    done = run(["train", "ppo", *FLAGS], folder, **NO_UTF8)
    assert done.returncode == 0, done.stderr
    return folder


# Several commands in one process, because it takes two seconds to start one.
COMMANDS = """
import json, sys
if "tee" in sys.argv:
    class Tee:
        def write(self, text):
            return sys.__stdout__.write(text)
        def flush(self):
            sys.__stdout__.flush()
    sys.stdout = Tee()
from purejaxpg import cli
for words in json.loads(sys.argv[1]):
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = stop.code
    print("status", status or 0)
"""


def run_all(
    commands: list[list[str]], where: pathlib.Path, *flags: str, **more: str
) -> tuple[list[str], str]:
    """The status of each command, and everything that was printed."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands), *flags],
        cwd=where, env={**os.environ, **more}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return re.findall(r"^status (.*)$", done.stdout, re.M), done.stdout + done.stderr


def test_every_command_prints_without_utf8(trained: pathlib.Path) -> None:
    commands = [
        ["--help"], ["train", "ppo", "--help"], ["list"], ["report", "r"], ["export", "r"],
        ["eval", "r", "--episodes", "2"], ["fsck", "r"], ["sweep", "--help"],
        ["train", "sac", "--help"],
    ]  # fmt: skip
    statuses, printed = run_all(commands, trained, **NO_UTF8)
    assert statuses == ["0"] * len(commands)
    assert printed.isascii()
    assert " +/- " in printed  # in the line of eval


def test_an_argument_beyond_ascii_is_named_without_utf8(tmp_path: pathlib.Path) -> None:
    done = run(["train", "±.py"], tmp_path, **NO_UTF8)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.isascii()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "| true"])
def test_closed_streams_stop_nothing(trained: pathlib.Path, closed: str) -> None:
    page = trained / "r" / "report" / "index.html"
    page.unlink(missing_ok=True)
    command = " ".join([*CLI, "report", "r", closed])
    words = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(words, cwd=trained, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    # Nothing that was meant for a closed stream has landed in a file that took its number.
    assert page.read_text("utf-8").rstrip().endswith("</html>")
    assert fsck.check(trained / "r") == []


def test_an_output_that_can_only_write_is_enough(trained: pathlib.Path) -> None:
    commands = [["report", "r"], ["list"], ["train", "ppo", *FLAGS]]
    statuses, printed = run_all(commands, trained, "tee")
    assert statuses == ["0"] * 3 and "ppo" in printed


def test_a_full_output_is_a_fault_in_one_sentence(trained: pathlib.Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    command = " ".join([*CLI, "list", "> /dev/full"])
    done = subprocess.run(["bash", "-c", command], cwd=trained, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.fast
def test_a_stream_that_is_no_terminal_is_none() -> None:
    assert not streams.on_terminal(object())
    assert not streams.on_terminal(None)
