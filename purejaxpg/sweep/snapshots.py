"""Snapshots of units in progress, so that a killed process loses little.

A snapshot is a checkpoint in ``DIR/progress`` whose name ends in the hash of its manifest, so it
can be verified without the ledger, and a damaged one is skipped in favour of an older one. Writing
snapshots takes at most a twentieth of the time, and each unit keeps two.
"""

import dataclasses
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


@dataclasses.dataclass
class Snapshots:
    """The snapshots of one result directory."""

    directory: Path  # made when needed
    save: Callable[[Path, Any], str]  # writes a pytree, and returns the hash of its manifest
    load: Callable[..., Any]  # reads what `save` wrote
    every_s: float  # minimum between two; 0: none
    cost_s: float = 0.0  # of the last one
    last: float = dataclasses.field(default_factory=time.monotonic)

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

        `trees` has the pytree of each unit. `began` is the monotonic time at which fetching them
        began, perhaps from other machines.

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

        It returns the number of updates and a tree per unit, or None if there are none. `template`
        makes the template of a tree, given a unit and its updates.
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
