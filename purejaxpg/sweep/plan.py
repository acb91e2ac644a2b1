"""What a sweep computes, in which pieces.

A **leg** is a stretch of a run: some of its updates, from its own beginning or from a stored state.
A **round** is the legs that can be computed without knowing each other's results; a plain sweep is
one round, a search several. Legs of a round whose static fields agree share one compiled program: a
**group**. A group is cut into **units** of a fixed number of rows, one leg a row, the last unit
padded. A device computes one unit at a time.

The size of a unit is part of the numerics, because XLA's results depend on the size of a batch,
but at a fixed size a row does not depend on its neighbours. So a unit's results are the same
whatever the order of the units and the number of devices.

Nothing here imports jax.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any


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
    parent: str | None = None  # id of the run whose state it starts from; None: it starts anew


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """Legs that do not wait for each other."""

    legs: tuple[Leg, ...]
    stage: str = "tune"  # or "confirm"
    notes: tuple[str, ...] = ()  # what the user is told when it begins


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
        """Updates that its legs have behind them."""
        return self.units[0].legs[0].start

    @property
    def stop(self) -> int:
        """Updates that its legs have behind them afterwards."""
        return self.units[0].legs[0].stop

    @property
    def steps(self) -> int:
        """Steps of all its legs, in the trainer's unit."""
        updates = self.stop - self.start
        return self.num_legs * updates * int(self.config.steps_per_update)


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
        round_: what is to be cut up.
        signature: a configuration's compile signature.
        rows: a configuration of the group and its number of legs -> rows of a unit.
        stored_rows: legs in each unit of an earlier plan of this sweep, which keeps its sizes
            even where the number of devices has changed.

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


def unit_name(round_index: int, group: int, unit: int) -> str:
    """Return the name under which the store knows a unit."""
    return f"round{round_index}-group{group}-unit{unit}"


def even_rows(num_legs: int, devices: int, most: int) -> int:
    """Return the rows of a unit: an even share of the legs, at most `most`.

    The share is made even, so that no device idles while another works off a last unit.
    """
    share = math.ceil(num_legs / devices)
    return math.ceil(share / math.ceil(share / most))
