"""The results of a sweep as one labelled dataset, for notebooks.

xarray is imported on use, so only callers of `load` need it.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from purejaxpg import extras
from purejaxpg.report import export
from purejaxpg.sweep.store import Store

_COORDS = ("run_id", "stage", "env", "status", "seed", "score", "greedy_score", "updates")


def load(directory: str | os.PathLike[str]) -> Any:
    """Read a sweep into an ``xarray.Dataset``.

    Every training metric is a variable with dimensions ``(run, update)``, every ``evaluation/*``
    one with ``(run, episode)``: the evaluation after the last update that is committed. Runs of
    unequal length are padded with NaN; the legs of a run are concatenated.

    Args:
        directory: a result directory; units may still be pending, and their runs are all NaN.

    Returns:
        The dataset. Along ``run`` it has the coordinates ``run_id, stage, env, status, seed, score,
        greedy_score, updates`` and the swept fields (lists as JSON); along ``update`` the number
        of the update, from 1; and ``env_steps (run, update)``, which runs need not share.

    Raises:
        InputError: there is no result directory at this path.
        FaultError: xarray is not installed.
        FaultError: a result is damaged.
    """
    xarray = extras.load("xarray", "analysis", "purejaxpg.report.load")
    with Store.read(directory) as store:
        runs, legs = store.ledger.runs(), store.ledger.legs()
        units = {unit["name"]: unit["facts"] for unit in store.ledger.units() if unit["done"]}
        rows = {run["run_id"]: row for row, run in enumerate(runs)}
        variables, steps = _variables(store, legs, units, rows)
        attributes = {
            "directory": str(store.path),
            "agent": str(store.ledger.identity.get("agent", "")),
        }
    coords: dict[str, Any] = {
        name: ("run", _column([export.cell(run, name) for run in runs])) for name in _COORDS
    }
    for name, column in export.swept_columns(runs, (*_COORDS, "run", "update", "episode")).items():
        values = [export.plain(run["swept"].get(name)) for run in runs]
        coords[column] = ("run", _column(values))
    coords["update"] = ("update", np.arange(1, steps.shape[1] + 1))
    coords["env_steps"] = (("run", "update"), steps)
    return xarray.Dataset(variables, coords, attributes)


def _variables(
    store: Store,
    legs: Sequence[dict[str, Any]],
    units: dict[str, dict[str, Any]],
    rows: dict[str, int],
) -> tuple[dict[str, tuple[tuple[str, str], np.ndarray]], np.ndarray]:
    """Return all variables with their dimensions, and the environment steps ``[run, update]``."""
    members: dict[str, list[dict[str, Any]]] = {}
    for leg in legs:
        if leg["unit"] in units:
            members.setdefault(leg["unit"], []).append(leg)
    longest = max((leg["stop"] for each in members.values() for leg in each), default=0)
    filled: dict[str, np.ndarray] = {}
    steps = np.full((len(rows), longest), np.nan)
    for unit, own in members.items():
        at = np.array([rows[leg["run_id"]] for leg in own])
        start, stop = own[0]["start"], own[0]["stop"]
        number = np.arange(start + 1, stop + 1)
        steps[at, start:stop] = export.env_steps(units[unit], number)
        for name, array in store.arrays(unit).items():
            evaluated = name.startswith(export.EVALUATION)
            width = array.shape[1] if evaluated else longest
            place = slice(width) if evaluated else slice(start, start + array.shape[1])
            filled[name] = _widened(filled.get(name), array.dtype, (len(rows), width))
            filled[name][at, place] = array
    dims = {name: "episode" if name.startswith(export.EVALUATION) else "update" for name in filled}
    return {name: (("run", dims[name]), filled[name]) for name in sorted(filled)}, steps


def _widened(before: np.ndarray | None, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    """Return an array of NaN that holds `before` and has room for `shape`."""
    if before is not None and before.shape[1] >= shape[1]:
        return before
    # NaN marks missing values, so integers and booleans become floats, too.
    wide = np.full(shape, np.nan, np.result_type(dtype, np.float32))
    if before is not None:
        wide[:, : before.shape[1]] = before
    return wide


def _column(values: Sequence[Any]) -> np.ndarray:
    """Return the values of a coordinate: floats if all are numbers or missing, else objects."""
    if any(value is None for value in values):
        known = [value for value in values if value is not None]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in known)
        return np.array([np.nan if v is None else v for v in values] if numbers else values)
    return np.array(values)
