"""Return how much memory a program needs, and how much is free."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

SHARE = 0.9  # of free memory; the rest is for copies on the host and other processes


class OutOfMemory(Exception):
    """A unit does not fit on its device; `fits` rows may."""

    def __init__(self, reason: str, fits: int) -> None:
        """Give the reason, and how many rows to try."""
        super().__init__(reason, fits)
        self.fits = fits

    def __str__(self) -> str:
        return str(self.args[0])


def needed(compiled: Any) -> int:
    """Return the bytes on one device while a compiled program runs.

    These are arguments, outputs and temporaries, minus the memory that outputs share with
    arguments. XLA's own "peak" left the temporaries out on the CPU.
    """
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return int(held + sizes.temp_size_in_bytes)


def limit(devices: Sequence["jax.Device"]) -> int:
    """Return the bytes that a program may use on each of `devices`."""
    if devices[0].platform == "cpu":  # all share the machine's memory
        return int(SHARE * free_on_host() / len(devices))
    stats = [device.memory_stats() or {} for device in devices]
    limits = [known["bytes_limit"] for known in stats if "bytes_limit" in known]
    return int(SHARE * min(limits, default=2**62))


def free_on_host(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process may still allocate, as reported by the system."""
    limits = [2**62]
    for line in read(proc / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    # Version 2 of control groups, then version 1; "max" means no limit.
    for top, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, now = read(cgroup / top).strip(), read(cgroup / used).strip()
        if most.isdigit() and now.isdigit():
            limits.append(int(most) - int(now))
    return max(min(limits), 0)


def resident(proc: Path = Path("/proc/self")) -> tuple[int, int]:
    """Return the bytes of memory that this process holds now, and held at its peak.

    Both are 0 if the system does not report them.
    """
    fields = dict(line.split(":", 1) for line in read(proc / "status").splitlines() if ":" in line)
    now, peak = (int(fields.get(name, "0").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> bool:
    """Reset the peak to the memory held now; return False if the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def read(path: Path) -> str:
    """Return a file's text, or "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8") if os.path.isfile(path) else ""
    except OSError:
        return ""
