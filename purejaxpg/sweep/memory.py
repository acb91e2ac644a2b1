"""How much memory a program needs, and how much there is."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

SHARE = 0.9  # of what is free; the rest is left to the host's copies and to others


class OutOfMemory(Exception):
    """A unit does not fit on its device; `fits` rows may."""

    def __init__(self, reason: str, fits: int) -> None:
        """Say why, and how many rows to try."""
        super().__init__(reason)
        self.fits = fits


def needed(compiled: Any) -> int:
    """Return the bytes on one device while a compiled program runs.

    Arguments, outputs and temporaries, less what outputs share with arguments. XLA's own "peak" was
    seen to leave the temporaries out on the CPU.
    """
    found = compiled.memory_analysis()
    if found is None:
        return 0
    return int(
        found.temp_size_in_bytes
        + found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


def limit(devices: Sequence["jax.Device"]) -> int:
    """Return the bytes that a program may use on each of `devices`."""
    if devices[0].platform == "cpu":  # they share the memory of the machine
        return int(SHARE * free_on_host() / len(devices))
    stats = [device.memory_stats() or {} for device in devices]
    known = [each["bytes_limit"] for each in stats if "bytes_limit" in each]
    return int(SHARE * min(known, default=2**62))


def free_on_host(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process may still allocate, as far as the system tells."""
    found = [2**62]
    meminfo = read(proc / "meminfo")
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    # Version 2 of control groups, then version 1; "max" means that there is no limit.
    for top, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = read(cgroup / top).strip(), read(cgroup / used).strip()
        if most.isdigit() and now.isdigit():
            found.append(int(most) - int(now))
    return max(min(found), 0)


def resident(proc: Path = Path("/proc/self")) -> tuple[int, int]:
    """Return the bytes of memory that this process holds now, and held at its peak.

    Zeros where the system does not tell.
    """
    found = dict.fromkeys(("VmRSS", "VmHWM"), 0)
    for line in read(proc / "status").splitlines():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) * 1024
    return found["VmRSS"], found["VmHWM"]


def forget_peak() -> bool:
    """Let the peak start anew from what is held now; False where that cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def read(path: Path) -> str:
    """Return a file's text, or nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8") if os.path.isfile(path) else ""
    except OSError:
        return ""
