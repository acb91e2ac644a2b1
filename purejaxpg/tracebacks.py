"""Errors in a user's code, shown by the lines that the user wrote.

The traceback of an error inside `jax.jit` or `jax.vmap` has a hundred frames, of which the user
knows three.
"""

import functools
import os
import sysconfig
import traceback
from pathlib import Path

FRAMES = 4  # at most, so that an explanation takes ten lines: two each, the error and how to go on
WIDTH = 300  # characters of a line
WHOLE = "PUREJAXPG_TRACEBACK"  # environment variable


@functools.cache
def _others() -> tuple[Path, ...]:
    """Return the folders of Python, of installed packages and of this package."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return (Path(__file__).resolve().parent, *(Path(folder).resolve() for folder in folders))


def is_local(file: Path) -> bool:
    """Return whether a file or folder is the user's: neither installed, nor Python's, nor ours."""
    path = file.resolve()
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not any(path.is_relative_to(folder) for folder in _others())


def explain(error: BaseException, prefix: str = "") -> str | None:
    """Return an error as at most ten lines, of which the user's own come first.

    Args:
        error: caught where all outer frames are of this package.
        prefix: stands before the error, in its line.

    Returns:
        Text; None if no line of the user's led to the error.
    """
    frames = _own_frames(error)
    if not frames:
        return None
    lines = []
    for frame in frames[-FRAMES:]:
        place = f", in {frame.name}" if frame.name else ""
        lines += [f"{shown(frame.filename)}, line {frame.lineno}{place}", f"    {frame.line}"]
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    first = next(iter(message.strip().splitlines()), "")
    lines.append(f"{prefix}{type(error).__name__}{': ' * bool(first)}{first}")
    hint = f"({WHOLE}=1 shows the whole traceback.)"
    return "\n".join([*(line[:WIDTH] for line in lines), hint])


def shown(filename: str) -> str:
    """Return a path relative to the current directory, if it is inside."""
    path = Path(filename).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def wanted_whole() -> bool:
    """Return whether the user asked for whole tracebacks."""
    return os.environ.get(WHOLE, "") not in ("", "0")


def _own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Return the frames of an error, or of its cause, in files of the user's; the last is inner."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        broken = traceback.FrameSummary(error.filename, error.lineno, "", line=error.text or "")
        frames.append(broken)
    own = [frame for frame in frames if _is_own(frame.filename)]
    before = error.__cause__ or error.__context__
    return own if own or before is None else _own_frames(before)


def _is_own(filename: str) -> bool:
    return os.path.isfile(filename) and is_local(Path(filename))
