"""Durable files: written whole or not at all and checked by hash.

Errors of the operating system and of SQLite become a FaultError with one plain sentence.
"""

import contextlib
import errno
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import FaultError

_PLAIN_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of this path is a file, not a directory",
    errno.ENOENT: "it does not exist",
    errno.EIO: "the device reports an input/output error",
}


@contextlib.contextmanager
def faults(doing: str, path: Path) -> Iterator[None]:
    """Turn errors of the operating system or SQLite inside the block into a FaultError.

    Args:
        doing: a verb for the message, such as ``"write"``.
        path: the file or directory the block works on.

    Raises:
        FaultError: in place of any OSError, sqlite3.Error or UnicodeDecodeError.
    """
    try:
        yield
    except OSError as error:
        reason = _PLAIN_ERRORS.get(error.errno or 0, error.strerror or str(error))
        raise FaultError(f"Cannot {doing} {path}: {reason}.") from error
    except sqlite3.Error as error:
        raise FaultError(f"Cannot {doing} {path}: {error}.") from error
    except UnicodeDecodeError as error:  # from a ledger whose own names are damaged
        raise FaultError(f"Cannot {doing} {path}: its text is damaged.") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and durably make what the block wrote there the file `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    with faults("write", path):
        path.parent.mkdir(exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file durably, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_hashed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON together with its own hash."""
    hashed = {"sha256": sha256(json_text(content)), "content": content}
    write_text(path, json.dumps(hashed, indent=1))


def read_hashed(path: Path) -> dict[str, Any]:
    """Read a file written by `write_hashed`.

    Raises:
        FaultError: it is missing or damaged.
    """
    with faults("read", path):
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            content = stored["content"]
            if stored["sha256"] == sha256(json_text(content)):
                return content
        except (ValueError, KeyError, TypeError) as error:
            raise FaultError(f"{path} is damaged: it is not the JSON that was written.") from error
    raise FaultError(f"{path} is damaged: its SHA-256 does not match its content.")


def read_intact(path: Path) -> dict[str, Any] | None:
    """Read a file written by `write_hashed`; return None if it is missing or damaged."""
    try:
        return read_hashed(path)
    except FaultError:
        return None


def json_text(value: Any, sort: bool = True) -> str:
    """Return a value as canonical JSON; `sort` False keeps the order of its keys."""
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    """Return NumPy scalars and arrays as plain Python values."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON.")


def sha256(text: str) -> str:
    """Return the SHA-256 of a text as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
