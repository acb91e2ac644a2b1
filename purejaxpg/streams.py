"""Standard output and error that are closed, replaced, or unable to show a character."""

import codecs
import contextlib
import errno
import os
import sys
from typing import Any

ERRORS = "purejaxpg.plain"  # handles characters that a stream cannot encode
# Errors of a stream whose file or device accepts no more data.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
PLAIN = {"±": "+/-", "×": "x", "−": "-", "…": "...", "–": "-", "≥": ">=", "≤": "<="}


def make_usable() -> None:
    """Make printing work, and keep files from taking the number of a closed stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened would get this number
            hold(number)
    codecs.register_error(ERRORS, plainly)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif not str(getattr(stream, "encoding", None) or "utf").lower().startswith("utf"):
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors=ERRORS)


def hold(number: int) -> None:
    """Connect the file descriptor `number` to the null device."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def discard_output() -> None:
    """Discard all further output, because its reader has gone."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # of a replaced stream
        hold(sys.stdout.fileno())


def on_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal; a replacement may lack the method."""
    return bool(getattr(stream, "isatty", bool)())


def plainly(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that cannot be encoded by plain ones, such as +/-, or by ?."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in text), error.end
