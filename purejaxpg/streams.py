"""Standard output and error, whatever they are: closed, replaced, or unable to show a character."""

import codecs
import contextlib
import errno
import os
import sys
from typing import Any

ERRORS = "purejaxpg.plain"  # what is done with a character that a stream cannot encode
# What a stream raises whose file or device takes no more.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
PLAIN = {"±": "+/-", "×": "x", "−": "-", "…": "...", "–": "-", "≥": ">=", "≤": "<="}


def make_usable() -> None:
    """See to it that printing works and that no file takes the place of a closed stream."""
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
    """Let the file descriptor `number` lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def discard_output() -> None:
    """Let what is still to be printed go nowhere, after its reader has gone."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # of a replaced stream
        hold(sys.stdout.fileno())


def on_terminal(stream: Any) -> bool:
    """Tell whether a stream is a terminal; a replacement may not even be able to say so."""
    return bool(getattr(stream, "isatty", bool)())


def plainly(error: UnicodeError) -> tuple[str, int]:
    """Write a character that cannot be encoded as one would on a typewriter, or as ?."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in text), error.end
