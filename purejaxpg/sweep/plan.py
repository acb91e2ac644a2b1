"""What a sweep compiles and in which pieces it runs.

Runs whose static fields agree share one compiled program: a group. A group is cut into units of a
fixed number of rows, one run a row, the last one padded. A device computes one unit at a time.
The size of a unit is part of the numerics, because XLA's results depend on the size of a batch,
but at a fixed size a row does not depend on its neighbours. So a unit's results are the same
whatever the order of the units and the number of devices.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from purejaxpg import config as configs
from purejaxpg.sweep import spec as specs

# Rows beyond this make a CPU slower, since a row's parameters and optimiser leave its cache.
CPU_ROWS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
    """The rows that one device computes together."""

    name: str
    runs: tuple[specs.Run, ...]  # at most `Group.rows`


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that share one compiled program."""

    index: int
    rows: int  # of a unit, padding included
    units: tuple[Unit, ...]

    @property
    def config(self) -> Any:
        """A configuration with the group's static fields."""
        return self.units[0].runs[0].config

    @property
    def num_runs(self) -> int:
        """Number of runs, padding not counted."""
        return sum(len(unit.runs) for unit in self.units)


def groups(
    spec: specs.Spec, devices: int, platform: str, stored_rows: Mapping[str, int] | None = None
) -> list[Group]:
    """Group the runs by compile signature and cut the groups into units.

    Args:
        spec: the sweep.
        devices: how many devices share the work.
        platform: "cpu", "gpu" or "tpu".
        stored_rows: runs in each unit of an earlier plan of this sweep, which keeps its sizes
            even where the number of devices has changed.

    Returns:
        The groups, in the order of their first run.
    """
    members: dict[str, list[specs.Run]] = {}
    for run in spec.runs:
        members.setdefault(signature(run.config), []).append(run)
    planned = []
    for index, runs in enumerate(members.values()):
        stored = (stored_rows or {}).get(unit_name(index, 0))
        rows = spec.rows_per_device or stored or default_rows(len(runs), devices, platform)
        cuts = range(0, len(runs), rows)
        units = tuple(
            Unit(unit_name(index, i), tuple(runs[cut : cut + rows])) for i, cut in enumerate(cuts)
        )
        planned.append(Group(index, rows, units))
    return planned


def unit_name(group: int, unit: int) -> str:
    """Return the name under which the store knows a unit."""
    return f"group{group}-unit{unit}"


def signature(config: Any) -> str:
    """Return what decides the compiled program: the static fields and the names in env_params."""
    hints = configs.field_types(type(config))
    values = configs.to_dict(config)
    static = {name: values[name] for name, hint in hints.items() if hint not in configs.TRACED}
    return json.dumps([static, sorted(getattr(config, "env_params", {}))], sort_keys=True)


def default_rows(num_runs: int, devices: int, platform: str) -> int:
    """Return the rows of a unit: an even share of the runs, at most CPU_ROWS on a CPU.

    The share is made even, so that no device idles while another works off a last unit.
    """
    share = math.ceil(num_runs / devices)
    if platform != "cpu":
        return share
    return math.ceil(share / math.ceil(share / CPU_ROWS))


def stack(runs: Sequence[specs.Run], rows: int) -> tuple[np.ndarray, Any]:
    """Batch runs for vmap, padded to `rows` with copies of the last one.

    Returns:
        Seeds [rows], and a Config whose leaves are float32 [rows].
    """
    padded = [*runs, *([runs[-1]] * (rows - len(runs)))]
    seeds = np.array([run.seed for run in padded], np.uint32)
    leaves = [run.config for run in padded]
    return seeds, jax.tree.map(lambda *values: np.array(values, np.float32), *leaves)
