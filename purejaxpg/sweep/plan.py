"""The pieces in which a sweep is computed.

A **leg** is a part of a run: some of its updates, from its beginning or from a stored state.
A **round** is the legs that can be computed without knowing each other's results; a plain sweep is
one round, a search several. Legs of a round whose static fields agree share one compiled program: a
**group**. A group is cut into **units** of a fixed number of rows, one leg a row, the last unit
padded. A device computes one unit at a time; units on several devices are a **batch**.

Results depend on the size of a unit, because XLA's results depend on the size of a batch. At a
fixed size a row does not depend on its neighbours, so neither the order of the units nor the number
of devices changes a unit's results.

Nothing here imports jax.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from purejaxpg import contract

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    run_id: str
    config: Any  # the agent's Config
    seed: int
    swept: Mapping[str, Any]  # the swept fields only


@dataclasses.dataclass(frozen=True, eq=False)
class Leg:
    """Updates `start` + 1, ..., `stop` of a run."""

    run: Run
    start: int
    stop: int
    parent: str | None = None  # id of the run whose state it starts from; None: `init`

    @property
    def steps(self) -> int:
        """Steps of its updates, in the trainer's unit."""
        return (self.stop - self.start) * int(self.run.config.steps_per_update)


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """Legs that do not depend on each other's results."""

    legs: tuple[Leg, ...]
    stage: str = "tune"  # or "confirm"
    notes: tuple[str, ...] = ()  # printed when it begins
    grown: bool = False  # its units are as large as those of the same programs before


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """The rows that one device computes together."""

    name: str
    legs: tuple[Leg, ...]  # at most `Group.rows`


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Legs that share one compiled program and the same updates."""

    index: int
    signature: str  # of the compiled program
    rows: int  # of a unit, padding included
    units: tuple[Unit, ...]
    devices: int = 1  # at least so many compute it, even if it has fewer units

    @property
    def program(self) -> tuple[str, int]:
        """What its compiled program depends on."""
        return self.signature, self.rows

    @property
    def config(self) -> Any:
        """A configuration with the group's static fields."""
        return self.units[0].legs[0].run.config

    @property
    def num_legs(self) -> int:
        """Number of legs, padding not counted."""
        return sum(len(unit.legs) for unit in self.units)

    @property
    def start(self) -> int:
        """Updates before its legs."""
        return self.units[0].legs[0].start

    @property
    def stop(self) -> int:
        """Updates after its legs."""
        return self.units[0].legs[0].stop

    @property
    def steps(self) -> int:
        """Steps of all its legs, in the trainer's unit."""
        return sum(leg.steps for unit in self.units for leg in unit.legs)


@dataclasses.dataclass
class Batch:
    """Units that are computed side by side, one on each device, and their results so far."""

    group: Group
    units: Sequence[Unit]
    updates: int  # done
    states: Any
    diverged_at: np.ndarray  # [units * group.rows], like the arrays below
    pieces: list[dict[str, np.ndarray]]  # metrics of consecutive segments
    evaluating_s: float = 0.0  # spent after the last segment, within training
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """All metrics so far, [rows, updates] by name; NaN where a segment has none."""
        pieces = list(self.pieces)  # a copy: another thread may ask
        names = dict.fromkeys(name for piece in pieces for name in piece)
        return {
            name: np.concatenate([p[name] if name in p else blank(p) for p in pieces], axis=1)
            for name in names
        }

    def evaluated(self, scores: Mapping[str, np.ndarray]) -> None:
        """Add the means of an evaluation [rows, episodes] to the metrics of the last update."""
        piece = self.pieces[-1]
        for score, values in scores.items() if piece else ():
            name = contract.evaluated(score)
            piece[name] = np.array(piece.get(name, blank(piece)))
            piece[name][:, -1] = values.mean(axis=1)

    def rows(self) -> Iterator[tuple[Unit, slice]]:
        """Yield each unit with its rows, without padding."""
        for i, unit in enumerate(self.units):
            yield unit, slice(i * self.group.rows, i * self.group.rows + len(unit.legs))


def blank(piece: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a metric without a value, in the shape of the others [rows, updates]."""
    return np.full_like(next(iter(piece.values())), np.nan, np.float32)


def groups(
    index: int,
    round_: Round,
    signature: Callable[[Any], str],
    rows: Callable[[Any, int], int],
    stored_rows: Mapping[str, int] | None = None,
) -> list[Group]:
    """Group the legs of a round by compiled program and cut the groups into units.

    Args:
        index: of the round, from 0.
        round_: is cut up.
        signature: a configuration's compile signature.
        rows: a configuration of the group and its number of legs -> rows of a unit.
        stored_rows: rows in each unit of an earlier plan of this sweep; sizes are kept even if the
            number of devices has changed.

    Returns:
        The groups, in the order of their first leg.
    """
    members: dict[tuple[str, int, int], list[Leg]] = {}
    for leg in round_.legs:
        key = (signature(leg.run.config), leg.start, leg.stop)
        members.setdefault(key, []).append(leg)
    planned = []
    for number, ((program, _, _), legs) in enumerate(members.items()):
        stored = (stored_rows or {}).get(unit_name(index, number, 0))
        size = stored or rows(legs[0].run.config, len(legs))
        units = tuple(
            Unit(unit_name(index, number, i), tuple(legs[cut : cut + size]))
            for i, cut in enumerate(range(0, len(legs), size))
        )
        planned.append(Group(number, program, size, units))
    return planned


def count_runs(rounds: Sequence[Round]) -> int:
    """Return the number of runs; one that continues another counts for both."""
    ids, continued = set[str](), set[str]()
    for round_ in rounds:
        own = {leg.run.run_id for leg in round_.legs}
        ids |= own
        continued |= {leg.parent for leg in round_.legs if leg.parent} - own
    return len(ids - continued)


def padded(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items, the last of which is repeated."""
    return [*items, *([items[-1]] * (count - len(items)))]


def unit_name(round_index: int, group: int, unit: int) -> str:
    """Return the name of a unit in the store."""
    return f"round{round_index}-group{group}-unit{unit}"


def even_rows(num_legs: int, devices: int, most: int) -> int:
    """Return the rows of a unit, at most `most`.

    Shares are even so that no device is idle while another computes a last unit.
    """
    share = math.ceil(num_legs / devices)
    return math.ceil(share / math.ceil(share / most))


def halved_rows(
    num_legs: int, devices: int, most: int, rungs: int, eta: float, overhead: float
) -> int:
    """Return the rows of a unit, at most `most`, for all rungs of a search by successive halving.

    One size for all means one compilation. Large units pad the last rungs, small ones repeat the
    overhead in the first; the size with the least predicted time is chosen.

    Args:
        num_legs: of the first rung; each later one has an eta-th of the one before.
        devices: that compute side by side.
        most: rows of a unit.
        rungs: of the search.
        eta: each rung ends after eta times the updates of the one before.
        overhead: what an update of a unit costs whatever its size, as a number of rows.
    """

    def cost(rows: int) -> float:
        total = 0.0
        for rung in range(rungs):
            batches = math.ceil(math.ceil(num_legs / eta**rung) / rows / devices)
            updates = eta**rung - (eta ** (rung - 1) if rung else 0)
            total += batches * (rows + overhead) * updates
        return total

    largest = even_rows(num_legs, devices, most)
    return min(range(largest, 0, -1), key=cost)
