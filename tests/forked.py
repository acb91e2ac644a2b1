"""Processes of their own that need not import jax: each is a fork of one that has.

Importing jax and its relatives takes 3 CPU seconds, most of what a small command takes. A fork has
third-party modules and none of ours, and runs `python WORDS` in a given folder and environment as a
fresh interpreter would. It is not for tests of what happens before jax is imported: the settings
that jax reads then are those of the tests.
"""

import atexit
import functools
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from multiprocessing import context, forkserver
from typing import Any

import jax
from jax._src import api

# What the package imports, and what gymnax imports; gymnax itself starts a backend, whose threads
# would not survive a fork.
IMPORTED = [
    "jax", "flax.linen", "optax", "chex", "orbax.checkpoint", "distrax", "matplotlib.pyplot",
    "rich.console", "gymnasium", "seaborn",
]  # fmt: skip
TESTS = pathlib.Path(__file__).resolve().parent
# Those of the tests, before any of them changes one.
ENVIRONMENT = dict(os.environ)
SETTINGS = jax.config.values  # read from the environment while jax is imported


@functools.cache
def server() -> context.ForkServerContext:
    """Return the maker of forks, after it has started the process that imports."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(IMPORTED)
    now = dict(os.environ)
    try:
        _set(ENVIRONMENT)
        forkserver.ensure_running()
    finally:
        _set(now)
    return made


def _set(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


class Process:
    """A running command, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(
        self, *words: str, folder: pathlib.Path, environment: Mapping[str, str] = os.environ
    ) -> None:
        """Start `python WORDS`.

        Args:
            words: -m MODULE, -c CODE or a file, and its arguments.
            folder: where it runs.
            environment: its variables.
        """
        read = {name: ENVIRONMENT.get(name) for name in environment if name.lower() in SETTINGS}
        assert {name: environment[name] for name in read} == read, "jax has read its settings"
        self.words = words
        self.told = [tempfile.NamedTemporaryFile() for _ in ("stdout", "stderr")]  # noqa: SIM115
        names = [each.name for each in self.told]
        arguments = (words, str(folder), dict(environment), names)
        self.process: Any = server().Process(target=_run, args=arguments)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, -N after signal N, or None while it runs."""
        return self.process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.words, timeout or 0.0)
        return self.returncode

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end -> what it wrote to stdout and to stderr."""
        self.wait(timeout)
        out, err = (pathlib.Path(each.name).read_text("utf-8") for each in self.told)
        return out, err


def run(
    *words: str, folder: pathlib.Path, environment: Mapping[str, str] = os.environ
) -> "subprocess.CompletedProcess[str]":
    """Run `python WORDS` to its end, which has to come within ten minutes."""
    process = Process(*words, folder=folder, environment=environment)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(words, process.wait(), out, err)


def python(
    command: list[str],
    cwd: str | pathlib.Path = ".",
    env: Mapping[str, str] = os.environ,
    check: bool = False,
    **captured: Any,
) -> "subprocess.CompletedProcess[str]":
    """Take the place of `subprocess.run` in a script that starts `sys.executable`."""
    assert command[0] == sys.executable
    done = run(*command[1:], folder=pathlib.Path(cwd), environment=env)
    if check:
        done.check_returncode()
    return done


def _run(words: tuple[str, ...], folder: str, environment: dict[str, str], told: list[str]) -> None:
    """Do in a fork what an interpreter does that is started with these words."""
    for number, path in zip((1, 2), told, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(folder)
    _set(environment)
    given = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    rest = [path for path in sys.path if path and pathlib.Path(path) not in (TESTS, TESTS.parent)]
    first = str(pathlib.Path(words[0]).parent.resolve()) if words[0][0] != "-" else folder
    # The last entry stands for an editable installation.
    sys.path[:] = [first, *given, *(path for path in rest if path not in given), str(TESTS.parent)]
    # Since Python 3.13, multiprocessing forgets what jax registered before the fork.
    atexit.unregister(api.clean_up)
    atexit.register(api.clean_up)
    try:
        _execute(words)
    finally:
        atexit._run_exitfuncs()  # an interpreter does it, a fork of multiprocessing does not


def _execute(words: tuple[str, ...]) -> None:
    if words[0] == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv[:] = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")
