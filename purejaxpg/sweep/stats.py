"""Statistics over runs: interquartile means, bootstrap intervals, diverged runs that still count.

Seeds are few and returns are skewed, so the headline is the interquartile mean with an interval
over *runs* (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice"). The episodes of one run are never resampled: they say how well that run was measured,
not how much runs differ.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from purejaxpg import InputError

Floats = NDArray[np.float64]

_BLOCK = 1 << 22  # resampled values held at once: 32 MB


def iqm(x: ArrayLike, axis: int = -1) -> Any:
    """Return the interquartile mean: the mean of what is left without both outer quarters.

    As ``scipy.stats.trim_mean(x, 0.25)`` and rliable do, whole values are dropped: floor(n / 4) at
    each end. With n < 4 it is therefore the mean, and n = 7 keeps the middle five, where a
    definition with fractional weights would count the outer two of these for less. Unlike SciPy's,
    it does not trim a NaN away as if it were a large value.

    Args:
        x: values ``[..., n, ...]``, n of them along ``axis``, n >= 1.
        axis: the axis to average over.

    Returns:
        ``[...]`` without that axis; NaN where any of the n values is NaN.

    Raises:
        InputError: there are no values.
    """
    values = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    n = values.shape[-1]
    if n == 0:
        raise InputError("The interquartile mean of 0 values does not exist; it needs at least 1.")
    cut = n // 4
    middle = np.sort(values, axis=-1)[..., cut : n - cut]
    return np.where(np.isnan(values).any(axis=-1), np.nan, middle.mean(axis=-1))[()]


def bootstrap_ci(
    scores: ArrayLike | Sequence[ArrayLike],
    statistic: Callable[..., Any] = iqm,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Return the percentile bootstrap interval of a statistic of runs.

    Strata keep their sizes: with one array per environment, each resample draws as many runs from
    an environment as it has. With few runs the interval is too narrow: it cannot reach beyond the
    values seen, and with one run it has no width at all.

    Args:
        scores: one array ``[..., n]`` of n runs along its last axis, or a list of such arrays, one
            per stratum, pooled in the statistic. Leading axes share the resampled runs.
        statistic: called as ``statistic(values, axis=-1)`` on ``[..., n]``, strata side by side.
        confidence: between 0 and 1.
        resamples: how many, at least 1.
        seed: the only source of randomness; the global state of NumPy is not touched.

    Returns:
        The lower and the upper end, each of shape ``[...]``.

    Raises:
        InputError: the confidence is not between 0 and 1, or there are no resamples or no runs.
    """
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence is {confidence}; it must lie between 0 and 1.")
    if resamples < 1:
        raise InputError(f"resamples is {resamples}; it must be at least 1.")
    strata = _strata(scores)
    drawn = _draw(strata, resamples, np.random.default_rng(seed))
    values = np.concatenate(strata, axis=-1)
    block = max(1, _BLOCK // max(1, values.size))
    parts = [
        np.asarray(statistic(values[..., drawn[start : start + block]], axis=-1))
        for start in range(0, resamples, block)
    ]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(parts, axis=-1), [tail, 1.0 - tail], axis=-1)
    return low[()], high[()]


def worst_filled(scores: ArrayLike, diverged: ArrayLike) -> Floats:
    """Return the scores of one environment with every diverged run counted as the worst.

    The worst is the lowest finite score of any run, a diverged one's own measurement included. A
    run whose score is not finite counts as diverged. Nothing is dropped: a method that fails on
    half of its seeds must not be judged by the other half.

    Args:
        scores: final score of every run in one environment ``[n]``.
        diverged: which of them diverged ``[n]``, bool.

    Returns:
        Scores ``[n]``; all -inf where no run has a finite score.
    """
    values = np.asarray(scores, np.float64)
    finite = np.isfinite(values)
    worst = values[finite].min() if finite.any() else -np.inf
    return np.where(np.asarray(diverged, bool) | ~finite, worst, values)


def _strata(scores: Any) -> list[Floats]:
    """Return the scores as a list of arrays with runs along the last axis."""
    listed = isinstance(scores, (list, tuple)) and all(np.ndim(part) > 0 for part in scores)
    strata = [np.asarray(part, np.float64) for part in (scores if listed else [scores])]
    if not strata or any(part.ndim == 0 or part.shape[-1] == 0 for part in strata):
        raise InputError("A bootstrap needs at least 1 run in every stratum; one of them has 0.")
    return strata


def _draw(
    strata: list[Floats], resamples: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Return resampled positions in the concatenated strata ``[resamples, n]``."""
    columns, start = [], 0
    for part in strata:
        n = part.shape[-1]
        columns.append(start + generator.integers(0, n, size=(resamples, n)))
        start += n
    return np.concatenate(columns, axis=1)
