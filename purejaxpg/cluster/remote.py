"""Failures and version checks of processes that compute for a sweep's own process."""

import socket
from collections.abc import Mapping
from typing import Any

from purejaxpg import FaultError, InputError
from purejaxpg.sweep import memory

# What may go wrong in another process. Each exception can be made again from its arguments.
EXPECTED = (memory.OutOfMemory, InputError, FaultError)


def as_values(error: BaseException) -> list[Any]:
    """Return one of EXPECTED as plain values."""
    return [type(error).__name__, *error.args]


def as_exception(name: str, *arguments: Any) -> Exception:
    """Return the exception that `as_values` took apart."""
    return {kind.__name__: kind for kind in EXPECTED}[name](*arguments)


def refuse_other_versions(wanted: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raise an InputError unless the versions here equal those of the sweep's own process."""
    for name, version in wanted.items():
        if here[name] != version:
            raise InputError(
                f"{name} must be {version} on every node, as in the sweep's own process, "
                f"but is {here[name]} on {socket.gethostname()}."
            )
