"""Failures and version checks of processes that compute for a sweep's own process."""

import dataclasses
import socket
from collections.abc import Mapping

from purejaxpg import FaultError, InputError
from purejaxpg.sweep import memory

EXPECTED = (memory.OutOfMemory, InputError, FaultError)  # sent as a Failure


@dataclasses.dataclass(frozen=True)
class Failure:
    """An exception as plain values, to be sent to the sweep's own process."""

    kind: str  # "memory", "input" or "fault"
    text: str
    fits: int = 0  # rows to try if memory ran out


def as_failure(error: BaseException) -> Failure:
    """Return one of EXPECTED as plain values."""
    if isinstance(error, memory.OutOfMemory):
        return Failure("memory", str(error), error.fits)
    return Failure("input" if isinstance(error, InputError) else "fault", str(error))


def as_exception(failure: Failure) -> Exception:
    """Return a failure as the exception it was made from."""
    if failure.kind == "memory":
        return memory.OutOfMemory(failure.text, failure.fits)
    return InputError(failure.text) if failure.kind == "input" else FaultError(failure.text)


def refuse_other_versions(wanted: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raise an InputError unless the versions here equal those of the sweep's own process."""
    for name, version in wanted.items():
        if here[name] != version:
            raise InputError(
                f"{name} must be {version} on every node, as in the sweep's own process, "
                f"but is {here[name]} on {socket.gethostname()}."
            )
