"""Training curves: the returns of the episodes that ended during training, in bins of updates.

They show how a run went. They never rank: the policy changes while they are collected, and the
best point of a noisy curve is too good.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from purejaxpg import contract, stats
from purejaxpg.sweep.store import Store

BINS = 60
_FINE = 4 * BINS  # of a leg, before legs are put together
_RESAMPLES = 500
METRICS = contract.CURVE


@dataclass(frozen=True)
class Curve:
    """The training return of one run: ``steps [bins]`` at bin centres and ``returns [bins]``."""

    steps: np.ndarray
    returns: np.ndarray

    @property
    def best(self) -> float:
        """The highest bin; NaN if no episode ended."""
        return float(np.nanmax(self.returns)) if np.isfinite(self.returns).any() else float("nan")

    @property
    def area(self) -> float:
        """The area under the curve over its length: the mean over the known bins."""
        return float(np.nanmean(self.returns)) if np.isfinite(self.returns).any() else float("nan")


@dataclass(frozen=True)
class Piece:
    """The part of a curve from one leg: sums and counts of episodes between ``edges`` (updates)."""

    edges: np.ndarray
    return_sum: np.ndarray
    count: np.ndarray


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
    edges, sums, counts = _sums(return_sum, count, bins)
    centres = (edges[:-1] + edges[1:]) / 2 * steps_per_update
    return centres, _means(sums, counts)


def of_runs(
    store: Store, legs: Sequence[dict[str, Any]], arrays: dict[str, dict[str, np.ndarray]]
) -> dict[str, Curve]:
    """Return the curve of every run that recorded episodes, all its legs put together.

    Args:
        store: an open result directory.
        legs: as ``Store.legs`` gives them.
        arrays: the arrays ``METRICS`` of committed units, by unit.

    Returns:
        Curves by run. A run that started from another run's state includes the curve up to it.
    """
    facts = {unit["name"]: unit["facts"] or {} for unit in store.ledger.units()}
    known = {(leg["run_id"], leg["round"]): leg for leg in legs if leg["unit"] in arrays}
    latest = {run_id: leg for (run_id, _), leg in known.items()}
    pieces = {unit: _pieces(own) for unit, own in arrays.items() if len(own) == len(METRICS)}
    curves = {}
    for run_id, leg in latest.items():
        chain = lineage(leg, known)
        per_update = facts[chain[0]["unit"]].get("steps_per_update")
        if per_update is None or any(part["unit"] not in pieces for part in chain):
            continue
        parts = [(part["start"], pieces[part["unit"]][part["row"]]) for part in chain]
        steps, returns = _joined(parts, per_update)
        curves[run_id] = Curve(facts[chain[0]["unit"]].get("steps_before", 0) + steps, returns)
    return curves


def lineage(
    leg: dict[str, Any], known: dict[tuple[str, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the legs that led to a leg, which comes last, following parents through the rounds."""
    chain = [leg]
    while chain[0]["start"] and chain[0]["parent"]:
        before = known.get((chain[0]["parent"], chain[0]["round"] - 1))
        if before is None:
            break
        chain.insert(0, before)
    return chain


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


def stack(run_ids: Iterable[str], curves: dict[str, Curve]) -> Curve | None:
    """Return the curves of a configuration's runs, ``returns [runs, bins]``, if any.

    Runs that ended earlier than the longest are left out: they have no values at its steps.
    """
    own = [curves[run_id] for run_id in run_ids if run_id in curves]
    if not own:
        return None
    longest = max(own, key=lambda curve: (curve.steps[-1], curve.steps.size))
    same = [c.returns for c in own if np.array_equal(c.steps, longest.steps)]
    return Curve(longest.steps, np.stack(same))


def _sums(
    return_sum: np.ndarray, count: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bin edges ``[bins + 1]`` in updates and the sums within them ``[rows, bins]``."""
    updates = return_sum.shape[1]
    edges = np.linspace(0, updates, min(bins, updates) + 1).round().astype(int)
    sums = np.add.reduceat(return_sum.astype(np.float64), edges[:-1], axis=1)
    return edges, sums, np.add.reduceat(count.astype(np.float64), edges[:-1], axis=1)


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return mean returns ``[rows, bins]``; an empty bin repeats the one before."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(counts > 0, sums / counts, np.nan)
    known = np.where(np.isfinite(means), np.arange(means.shape[1]), 0)
    return np.take_along_axis(means, np.maximum.accumulate(known, axis=1), axis=1)


def _pieces(arrays: dict[str, np.ndarray]) -> list[Piece]:
    """Return one piece per row of a unit, at most a few hundred values each."""
    return_sum, count = (arrays[name] for name in METRICS)
    edges, sums, counts = _sums(return_sum, count, _FINE)
    return [Piece(edges, *row) for row in zip(sums, counts, strict=True)]


def _joined(parts: Sequence[tuple[int, Piece]], per_update: float) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and returns ``[bins]`` of consecutive pieces, each with its first update."""
    edges = np.concatenate([[0], *(start + piece.edges[1:] for start, piece in parts)])
    edges[0] = parts[0][0]
    sums = np.concatenate([piece.return_sum for _, piece in parts])
    counts = np.concatenate([piece.count for _, piece in parts])
    wanted = np.linspace(edges[0], edges[-1], min(BINS, sums.size) + 1)
    # Each bin ends at the finer edge that is nearest.
    middles = (edges[:-1] + edges[1:]) / 2
    cuts = np.unique(np.searchsorted(middles, wanted))
    total, number = (np.add.reduceat(values, cuts[:-1])[None] for values in (sums, counts))
    centres = (edges[cuts[:-1]] + edges[cuts[1:]]) / 2 * per_update
    return centres, _means(total, number)[0]
