"""Standard output that is closed, replaced, full, or cannot show every character."""

import os
import pathlib
import subprocess
import sys

import pytest

from purejaxpg import streams

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


@pytest.mark.parametrize(
    "words",
    [
        ["--help"], ["train", "ppo", "--help"], ["list"], ["report", "r"], ["export", "r"],
        ["eval", "r", "--episodes", "2"], ["fsck", "r"], ["sweep", "--help"],
        ["train", "sac", "--help"], ["train", "±.py"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_prints_without_utf8(trained: pathlib.Path, words: list[str]) -> None:
    done = run(words, trained, **NO_UTF8)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (2 if words[-1] == "±.py" else 0)
    assert (done.stdout + done.stderr).isascii()


def test_a_character_that_cannot_be_shown_is_written_as_on_a_typewriter(
    trained: pathlib.Path,
) -> None:
    assert " +/- " in run(["eval", "r", "--episodes", "2"], trained, **NO_UTF8).stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_stop_nothing(trained: pathlib.Path, closed: str) -> None:
    page = trained / "r" / "report" / "index.html"
    page.unlink(missing_ok=True)
    command = " ".join([*CLI, "report", "r", closed])
    done = subprocess.run(["bash", "-c", command], cwd=trained, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    # Nothing that was meant for a closed stream has landed in a file that took its number.
    assert page.read_text("utf-8").rstrip().endswith("</html>")
    assert run(["fsck", "r"], trained).returncode == 0


TEE = """
import sys
class Tee:
    def write(self, text):
        return sys.__stdout__.write(text)
    def flush(self):
        sys.__stdout__.flush()
sys.stdout = Tee()
from purejaxpg import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("words", [["report", "r"], ["list"], ["train", "ppo", *FLAGS]])
def test_an_output_that_can_only_write_is_enough(trained: pathlib.Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TEE, *words], cwd=trained, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


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
