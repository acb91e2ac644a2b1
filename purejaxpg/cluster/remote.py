"""What every other process that computes for a sweep has in common, whoever started it."""

import dataclasses
import socket
from collections.abc import Mapping

from purejaxpg import FaultError, InputError
from purejaxpg.sweep import memory

EXPECTED = (memory.OutOfMemory, InputError, FaultError)  # what is told as a Failure


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why something could not be computed; a value, to be sent to the sweep's own process."""

    kind: str  # "memory", "input" or "fault"
    text: str
    fits: int = 0  # rows, where memory ran out


def as_failure(error: BaseException) -> Failure:
    """Return what one of EXPECTED is as a value."""
    if isinstance(error, memory.OutOfMemory):
        return Failure("memory", str(error), error.fits)
    return Failure("input" if isinstance(error, InputError) else "fault", str(error))


def as_exception(failure: Failure) -> Exception:
    """Return what a failure elsewhere is in the sweep's own process."""
    if failure.kind == "memory":
        return memory.OutOfMemory(failure.text, failure.fits)
    return InputError(failure.text) if failure.kind == "input" else FaultError(failure.text)


def refuse_other_versions(wanted: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raise unless this process computes the same numbers as the sweep's own process would."""
    for name, version in wanted.items():
        if here[name] != version:
            raise InputError(
                f"{name} must be {version} on every node, as where the sweep runs, "
                f"but is {here[name]} on {socket.gethostname()}."
            )
