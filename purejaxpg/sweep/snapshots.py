"""Snapshots of units in progress, so that a killed process loses little.

A snapshot is a checkpoint in ``DIR/progress`` whose name ends in the hash of its manifest, so it
can be verified without the ledger, and a damaged one is skipped in favour of an older one. Writing
snapshots takes at most a twentieth of the time, and each unit keeps two.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from purejaxpg import FaultError, disk
from purejaxpg.sweep import plan as plans

PER_UNIT = 2
SHARE = 20.0  # snapshots take at most 1 / SHARE of the time
NAME = re.compile(r"(?P<unit>.+)\.(?P<updates>[0-9]+)-(?P<sha256>[0-9a-f]{64})")


class Snapshots:
    """The snapshots of one result directory."""

    def __init__(
        self,
        directory: Path,
        save: Callable[[Path, Any], str],
        load: Callable[..., Any],
        every_s: float,
    ) -> None:
        """Keep snapshots in `directory`.

        Args:
            directory: made when needed.
            save: writes a pytree into a directory and returns the hash of its manifest.
            load: reads what `save` wrote.
            every_s: minimum seconds between two; 0: no minimum.
        """
        self.directory = directory
        self.save = save
        self.load = load
        self.every_s = every_s
        self.cost_s = 0.0
        self.last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the next snapshot is due."""
        if self.every_s == 0:
            return True
        return time.monotonic() - self.last >= max(self.every_s, SHARE * self.cost_s)

    def write(
        self, units: Sequence[plans.Unit], updates: int, trees: Sequence[Any], began: float
    ) -> None:
        """Write a snapshot of each unit after `updates` updates of its runs.

        Args:
            units: computed side by side.
            updates: updates done by their runs.
            trees: the pytree to write for each unit.
            began: monotonic time at which fetching the trees began, perhaps from other machines.

        Raises:
            FaultError: it cannot be written.
        """
        for unit, tree in zip(units, trees, strict=True):
            temporary = self.directory / f".{name_of(unit)}.writing"
            digest = self.save(temporary, tree)
            target = self.directory / f"{name_of(unit)}.{updates}-{digest}"
            with disk.faults("write the snapshot", target):
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
                disk.sync(self.directory)
            for _, _, old in sorted(self.of(unit), reverse=True)[PER_UNIT:]:
                shutil.rmtree(old, ignore_errors=True)
        self.last = time.monotonic()
        self.cost_s = self.last - began

    def newest(
        self, units: Sequence[plans.Unit], template: Callable[[plans.Unit, int], Any]
    ) -> tuple[int, list[Any]] | None:
        """Read the newest intact snapshots of all `units` after the same number of updates.

        Args:
            units: computed side by side, hence at the same update.
            template: (unit, updates) -> template of the pytree given to `write`.

        Returns:
            The number of updates and a tree per unit; None if there are none.
        """
        stored = [
            {updates: (digest, path) for updates, digest, path in self.of(unit)} for unit in units
        ]
        common = set.intersection(*map(set, stored)) if stored else set()
        for updates in sorted(common, reverse=True):
            try:
                return updates, [
                    self.load(of[updates][1], template(unit, updates), sha256=of[updates][0])
                    for unit, of in zip(units, stored, strict=True)
                ]
            except FaultError:  # damaged, or of another version: try an older one
                continue
        return None

    def of(self, unit: plans.Unit) -> Iterator[tuple[int, str, Path]]:
        """Yield updates, hash and path of each snapshot of a unit."""
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            match = NAME.fullmatch(path.name)
            if match and match["unit"] == name_of(unit):
                yield int(match["updates"]), match["sha256"], path

    def discard(self, units: Iterable[plans.Unit]) -> None:
        """Remove all snapshots of `units`, including those of earlier plans."""
        names = {unit.name for unit in units}
        for path in self.directory.iterdir() if names and self.directory.is_dir() else ():
            if path.name.lstrip(".").partition(".")[0] in names:
                shutil.rmtree(path, ignore_errors=True)


def name_of(unit: plans.Unit) -> str:
    """Return a unit's name with a hash of its legs, so that a new plan finds no old snapshot."""
    legs = [(leg.run.run_id, leg.start, leg.stop, leg.parent) for leg in unit.legs]
    return f"{unit.name}.{disk.sha256(repr(legs))[:8]}"
