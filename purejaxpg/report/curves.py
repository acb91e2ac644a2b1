"""Training curves: the returns of the episodes that ended during training, in bins of updates.

They show how a run went. They never rank: the policy changes while they are collected, and the
best point of a noisy curve is too good.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from purejaxpg import contract, stats
from purejaxpg.sweep.store import Store

BINS = 60
_RESAMPLES = 500
METRICS = contract.CURVE
_SUM = "_sum"  # ends the name of a sum over episodes
READ = (*METRICS, contract.EVALUATED_RETURN)  # what curves are made of
NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Curve:
    """The training return of one run: ``steps [bins]`` at bin centres and ``returns [bins]``.

    ``evaluated`` is the curve of the evaluations within training, if there were any.
    """

    steps: np.ndarray
    returns: np.ndarray
    evaluated: "Curve | None" = None

    @property
    def best(self) -> float:
        """The highest bin; NaN if no episode ended."""
        return float(np.nanmax(self.returns)) if np.isfinite(self.returns).any() else float("nan")

    @property
    def area(self) -> float:
        """The area under the curve over its length: the mean over the known bins."""
        return float(np.nanmean(self.returns)) if np.isfinite(self.returns).any() else float("nan")


def bin_returns(
    return_sum: np.ndarray, count: np.ndarray, steps_per_update: float, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Average the returns of the episodes that ended in each bin of updates.

    Every episode weighs the same, however many end in one update. A bin in which no episode ended
    repeats the one before it in the same run, and is NaN if there is none.

    Args:
        return_sum: sum of the returns of the episodes that ended in an update ``[rows, updates]``.
        count: how many ended ``[rows, updates]``.
        steps_per_update: environment steps of one update.
        bins: the largest number of bins; fewer updates give one bin each.

    Returns:
        Environment steps at the centre of each bin ``[bins]``, and mean returns ``[rows, bins]``.
    """
    edges, centres = _edges(return_sum.shape[1], bins, steps_per_update)
    with np.errstate(invalid="ignore", divide="ignore"):
        sums = np.add.reduceat(return_sum.astype(np.float64), edges[:-1], axis=1)
        counts = np.add.reduceat(count.astype(np.float64), edges[:-1], axis=1)
        means = np.where(counts > 0, sums / counts, np.nan)
    known = np.where(np.isfinite(means), np.arange(means.shape[1]), 0)
    return centres, np.take_along_axis(means, np.maximum.accumulate(known, axis=1), axis=1)


def bin_means(
    values: np.ndarray, steps_per_update: float, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Average a metric over the updates of each bin, without values that are not finite.

    Args:
        values: one per update ``[rows, updates]``.
        steps_per_update: environment steps of one update.
        bins: the largest number of bins; fewer updates give one bin each.

    Returns:
        Environment steps at the centre of each bin ``[bins]``, and means ``[rows, bins]``, NaN
        where no value is finite.
    """
    edges, centres = _edges(values.shape[1], bins, steps_per_update)
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0).astype(np.float64), edges[:-1], axis=1)
    counts = np.add.reduceat(known.astype(np.float64), edges[:-1], axis=1)
    return centres, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _edges(updates: int, bins: int, steps_per_update: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first update of each bin and the end ``[bins + 1]``, and the centres in steps."""
    wanted = np.linspace(0, updates, min(bins, updates) + 1)
    edges = np.ceil(wanted - 0.5).astype(int)  # the nearest, of two the first
    return edges, (edges[:-1] + edges[1:]) / 2 * steps_per_update


def metrics_of_runs(store: Store, run_ids: Iterable[str]) -> dict[str, dict[str, Curve]]:
    """Return every training metric of some runs in bins, all legs of a run put together.

    Args:
        store: an open result directory.
        run_ids: the runs; those without a committed leg are left out.

    Returns:
        By metric and run. ``episode/return`` and ``episode/length`` are means over the episodes
        that ended in a bin; every other metric is a mean over its updates.
    """
    facts = {unit["name"]: unit["facts"] or {} for unit in store.ledger.units() if unit["done"]}
    wanted = set(run_ids)
    found = chains(leg for leg in store.ledger.legs() if leg["unit"] in facts)
    own = {run_id: chain for run_id, chain in found.items() if run_id in wanted}
    rows: dict[str, set[int]] = {}
    for leg in (leg for chain in own.values() for leg in chain):
        rows.setdefault(leg["unit"], set()).add(leg["row"])
    read = {unit: _rows_of(store, unit, sorted(places)) for unit, places in rows.items()}
    curves: dict[str, dict[str, Curve]] = {}
    for run_id, chain in own.items():
        about = facts[chain[0]["unit"]]
        per_update = about.get("steps_per_update") or 1
        before = about.get("steps_before", 0) + chain[0]["start"] * per_update
        legs = [read[leg["unit"]][leg["row"]] for leg in chain]
        for name, (steps, values) in _binned(legs, per_update).items():
            curves.setdefault(name, {})[run_id] = Curve(before + steps, values)
    return curves


def _rows_of(store: Store, unit: str, rows: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
    """Return the metrics ``[updates]`` of some rows of a unit; the others are not kept."""
    metrics = {
        name: array
        for name, array in store.arrays(unit).items()
        if not name.startswith(contract.EVALUATION) and array.ndim == 2
    }
    return {row: {name: array[row].copy() for name, array in metrics.items()} for row in rows}


def _binned(
    legs: Sequence[Mapping[str, np.ndarray]], per_update: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return steps and values of each metric in bins; sums over episodes become means."""
    names = [name for name in legs[0] if all(name in leg for leg in legs)]
    metrics = {name: np.concatenate([leg[name] for leg in legs])[None] for name in names}
    found = {}
    for name, values in metrics.items():
        per_episode = name.startswith(contract.EPISODE) and name.endswith(_SUM)
        if per_episode and contract.EPISODE_COUNT in metrics:
            count = metrics[contract.EPISODE_COUNT]
            steps, (binned,) = bin_returns(values, count, per_update)
        else:
            steps, (binned,) = bin_means(values, per_update)
        found[name.removesuffix(_SUM) if per_episode else name] = steps, binned
    return found


def of_runs(
    store: Store,
    legs: Sequence[dict[str, Any]],
    arrays: Mapping[str, dict[str, np.ndarray]],
    unfinished: Mapping[str, dict[str, Any]] = NONE,
) -> dict[str, Curve]:
    """Return the curve of every run that recorded episodes, all its legs put together.

    Args:
        store: an open result directory.
        legs: as ``Store.legs`` gives them.
        arrays: the arrays ``READ`` of committed units, by unit; perhaps of others, too.
        unfinished: the facts of those others.

    Returns:
        Curves by run. A run that started from another run's state includes the curve up to it. If
        no episodes were recorded, the curve is that of the evaluations within training.
    """
    facts = {unit["name"]: unit["facts"] or {} for unit in store.ledger.units()} | dict(unfinished)
    curves = {}
    for run_id, chain in chains(leg for leg in legs if leg["unit"] in arrays).items():
        own = facts[chain[0]["unit"]]
        per_update = own.get("steps_per_update")
        if per_update is None:
            continue
        sums, counts, evaluated = (_joined(chain, arrays, name) for name in READ)
        before = own.get("steps_before", 0) + chain[0]["start"] * per_update
        curve = None if evaluated is None else _of_evaluations(evaluated, before, per_update)
        if sums is not None and counts is not None:
            steps, (returns,) = bin_returns(sums[None], counts[None], per_update)
            curve = Curve(before + steps, returns, curve)
        if curve is not None:
            curves[run_id] = curve
    return curves


def areas(store: Store) -> dict[str, float]:
    """Return the area under the curve of every run of a sweep that has one."""
    done = [unit["name"] for unit in store.ledger.units() if unit["done"]]
    arrays = {name: store.arrays(name, METRICS) for name in done}
    return {name: c.area for name, c in of_runs(store, store.ledger.legs(), arrays).items()}


def mean_area(run_ids: Iterable[str], areas: Mapping[str, float]) -> float:
    """Return the IQM over runs of the known areas; -inf if there are none."""
    known = [areas[run_id] for run_id in run_ids if math.isfinite(areas.get(run_id, math.nan))]
    return float(stats.iqm(known)) if known else -math.inf


def _joined(
    chain: Sequence[dict[str, Any]], arrays: Mapping[str, dict[str, np.ndarray]], name: str
) -> np.ndarray | None:
    """Return a metric of consecutive legs ``[updates]``; None if one of them lacks it."""
    parts = [arrays[leg["unit"]].get(name) for leg in chain]
    rows = [part[leg["row"]] for part, leg in zip(parts, chain, strict=True) if part is not None]
    return np.concatenate(rows) if len(rows) == len(chain) else None


def _of_evaluations(returns: np.ndarray, before: float, per_update: float) -> Curve | None:
    """Return the curve of returns ``[updates]`` that are NaN where nothing was evaluated."""
    known = np.flatnonzero(np.isfinite(returns))
    return Curve(before + (known + 1) * per_update, returns[known]) if known.size else None


def chains(legs: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return by run the legs that led to its last one, following parents through the rounds."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}  # by run and last update
    for leg in legs:
        before = found.get((leg["parent"], leg["start"]), []) if leg["start"] else []
        found[leg["run_id"], leg["stop"]] = [*before, leg]
    return {run_id: chain for (run_id, _), chain in found.items()}


def over_seeds(returns: np.ndarray) -> np.ndarray:
    """Return the IQM over runs ``[runs, bins] -> [bins]``, if at least half have a value."""
    known = np.isfinite(returns)
    if known.all():
        return np.asarray(stats.iqm(returns, axis=0))
    enough = known.sum(axis=0) * 2 >= returns.shape[0]
    centre = np.full(returns.shape[1], np.nan)
    for column in np.flatnonzero(enough):
        centre[column] = stats.iqm(returns[known[:, column], column])
    return centre


def interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95% bootstrap interval of ``over_seeds``, lower and upper end ``[bins]``."""
    known = np.isfinite(returns)
    low, high = np.full((2, returns.shape[1]), np.nan)
    for column in np.flatnonzero(known.sum(axis=0) * 2 >= returns.shape[0]):
        runs = returns[known[:, column], column]
        low[column], high[column] = stats.bootstrap_ci(runs, resamples=_RESAMPLES)
    return low, high


def stack(run_ids: Iterable[str], curves: Mapping[str, Curve]) -> Curve | None:
    """Return the curves of a configuration's runs, ``returns [runs, bins]``, if any.

    Runs that ended earlier than the longest are left out: they have no values at its steps.
    """
    own = [curves[run_id] for run_id in run_ids if run_id in curves]
    if not own:
        return None
    longest = max(own, key=lambda curve: (curve.steps[-1], curve.steps.size))
    same = [c.returns for c in own if np.array_equal(c.steps, longest.steps)]
    return Curve(longest.steps, np.stack(same))
