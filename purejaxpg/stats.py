"""Statistics over runs: interquartile means, bootstrap intervals, diverged runs that still count.

Seeds are few and returns are skewed, so the headline is the interquartile mean with an interval
over *runs* (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice"). The episodes of one run are never resampled: they show how precisely that run was
measured, not how much runs differ.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from purejaxpg import InputError

Floats = NDArray[np.float64]

_BLOCK = 1 << 22  # resampled values in memory at a time: 32 MB
# How far below the worst score a diverged run counts, as a share of that score: too little to be
# visible, and enough to survive the mean of a million runs in float64.
_BELOW = 1e-9
_OVER: dict[str, Callable[..., Any]] = {"mean": np.mean, "worst": np.min}  # conditions


def iqm(x: ArrayLike, axis: int = -1) -> Any:
    """Return the interquartile mean: the mean without the lowest and the highest quarter.

    Like ``scipy.stats.trim_mean(x, 0.25)`` and rliable, it drops whole values: floor(n / 4) at each
    end. With n < 4 it is therefore the mean, and n = 7 keeps the middle five, although a definition
    with fractional weights would weight the outer two of these less. Unlike SciPy's, it does not
    trim a NaN as if it were a large value.

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
        raise InputError("The interquartile mean needs at least 1 value, but there are 0.")
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
    an environment as it has. With few runs the interval is too narrow: it cannot extend beyond the
    observed values, and with one run it has no width.

    Args:
        scores: one array ``[..., n]`` of n runs along its last axis, or a list of such arrays, one
            per stratum, pooled in the statistic. Leading axes share the resampled runs.
        statistic: called as ``statistic(values, axis=-1)`` on ``[..., n]``, strata side by side.
        confidence: between 0 and 1.
        resamples: number of resamples, at least 1.
        seed: the only source of randomness; NumPy's global state does not change.

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
    low, high = _ends(np.concatenate(parts, axis=-1), confidence)
    return low[()], high[()]


def robust(scores: Sequence[ArrayLike], by: str) -> float:
    """Return the score of a configuration over several conditions.

    mean: R = 1/C sum_c IQM(x_c)        worst: R = min_c IQM(x_c)

    The worst of several noisy scores is too low on average, so compare it at equal numbers of runs.

    Args:
        scores: of its runs in each condition, arrays ``[n_c]``, diverged ones filled in.
        by: ``"mean"`` or ``"worst"``.

    Returns:
        The score; -inf if that of a condition is.

    Source: Agarwal et al. 2021 for the IQM; the worst of a set of environments as in Nilim and El
        Ghaoui 2005, Robust Control of Markov Decision Processes with Uncertain Transition Matrices.
    """
    return float(_OVER[by](np.stack([iqm(part) for part in _strata(list(scores))])))


def robust_ci(
    scores: Sequence[ArrayLike], by: str, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of ``robust``.

    Conditions are strata: a resample draws as many runs of each condition as there are.

    Args:
        scores: as for ``robust``, finite.
        by: ``"mean"`` or ``"worst"``.
        resamples: number of resamples.
        seed: the only source of randomness.

    Returns:
        The lower and the upper end.

    Source: Agarwal et al. 2021, stratified bootstrap.
    """
    generator = np.random.default_rng(seed)
    drawn = [iqm(_again(part, resamples, generator)) for part in _strata(list(scores))]
    low, high = _ends(_OVER[by](np.stack(drawn), axis=0), 0.95)
    return float(low), float(high)


def unit_scaled(scores: Sequence[ArrayLike]) -> list[Floats]:
    """Return the scores of one condition's configurations on a scale that conditions share.

    0 is the 5th and 1 the 95th percentile of the configurations' interquartile means, as in
    ``percentile_normalized``.

    Args:
        scores: of the runs of each configuration, arrays ``[n_h]``.

    Returns:
        Arrays of the same shapes; unchanged if a score is not finite.
    """
    parts = _strata(list(scores))
    if not np.isfinite(np.concatenate(parts)).all():
        return parts
    low, high = np.quantile([iqm(part) for part in parts], [0.05, 0.95])
    return [(part - low) / (high - low if high > low else np.inf) for part in parts]


def worst_filled(scores: ArrayLike, diverged: ArrayLike) -> Floats:
    """Return the scores of one environment with every diverged run counted as the worst.

    The worst is the lowest finite score of any run, including those measured on diverged runs. A
    diverged run counts a billionth below it: if all runs have the same score, as early in a task
    with sparse rewards, it would otherwise tie with the best. A run whose score is not finite
    counts as diverged. No run is dropped: a method that fails on half of its seeds must not be
    judged by the other half.

    Args:
        scores: final score of every run in one environment ``[n]``.
        diverged: which of them diverged ``[n]``, bool.

    Returns:
        Scores ``[n]``; all -inf if no run has a finite score.
    """
    values = np.asarray(scores, np.float64)
    finite = np.isfinite(values)
    worst = values[finite].min() if finite.any() else -np.inf
    below = worst - _BELOW * max(abs(worst), 1.0)
    return np.where(np.asarray(diverged, bool) | ~finite, below, values)


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


# ------------------------------------------------------------------------------ comparing methods


def probability_of_improvement(x: Sequence[ArrayLike], y: Sequence[ArrayLike]) -> float:
    """Return how often a run of X beats a run of Y, averaged over environments.

    P(X > Y) = 1/M sum_m 1/(N K) sum_ij S(x_mi, y_mj), S = 1 if x > y, 1/2 if equal, else 0.

    It shows how certain a gain is, not how large.

    Args:
        x: scores of X, one array ``[n_m]`` per environment.
        y: scores of Y, one array ``[k_m]`` per environment, in the same order.

    Returns:
        A number from 0 to 1; 0.5 where neither is better.

    Source: Agarwal et al. 2021, probability of improvement (the Mann-Whitney U over N K).
    """
    pairs = zip(_strata(list(x)), _strata(list(y)), strict=True)
    return float(np.mean([_beats(a, b) for a, b in pairs]))


def improvement_ci(
    x: Sequence[ArrayLike],
    y: Sequence[ArrayLike],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of ``probability_of_improvement``.

    Runs of X and of Y are resampled independently, within each environment.

    Args:
        x: scores of X, one array ``[n_m]`` per environment.
        y: scores of Y, one array ``[k_m]`` per environment.
        confidence: between 0 and 1.
        resamples: number of resamples.
        seed: the only source of randomness.

    Returns:
        The lower and the upper end.

    Source: Agarwal et al. 2021, probability of improvement.
    """
    generator = np.random.default_rng(seed)
    pairs = zip(_strata(list(x)), _strata(list(y)), strict=True)
    drawn = [
        _beats(_again(a, resamples, generator), _again(b, resamples, generator)) for a, b in pairs
    ]
    low, high = _ends(np.mean(drawn, axis=0), confidence)
    return float(low), float(high)


def performance_profile(
    scores: Sequence[ArrayLike], thresholds: ArrayLike, resamples: int = 500, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Return the share of runs that score above each threshold, with a pointwise 95% interval.

    F(tau) = 1/M sum_m 1/N_m sum_n 1[x_mn > tau]

    Args:
        scores: one array ``[n_m]`` per environment, on a common scale.
        thresholds: tau ``[t]``.
        resamples: of the stratified bootstrap over runs.
        seed: the only source of randomness.

    Returns:
        Share, lower end and upper end, each ``[t]``.

    Source: Agarwal et al. 2021, performance profiles (run-score distributions).
    """
    strata, taus = _strata(list(scores)), np.asarray(thresholds, np.float64)
    generator = np.random.default_rng(seed)
    share = np.mean([_share_above(part, taus) for part in strata], axis=0)
    drawn = np.mean(
        [_share_above(_again(part, resamples, generator), taus) for part in strata], axis=0
    )
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return share, low, high


def first_place(scores: Sequence[Any], resamples: int = 2000, seed: int = 0) -> Floats:
    """Return how often each configuration has the highest IQM when its runs are resampled.

    A winner that comes first in half of the resamples is tied with another configuration. Ties in a
    resample are shared. With one run each, resamples do not differ, and every share is 0 or 1.

    Args:
        scores: final scores of each configuration's runs, arrays ``[n_c]``, or a list of arrays,
            one per stratum, as in ``bootstrap_ci``.
        resamples: number of resamples.
        seed: the only source of randomness.

    Returns:
        Shares ``[c]`` that add up to 1.

    Source: Goldstein and Spiegelhalter 1996, League Tables and Their Limitations: intervals of
        ranks.
    """
    generator = np.random.default_rng(seed)
    strata = [_strata(each) for each in scores]
    drawn = np.stack([iqm(np.concatenate(own)[_draw(own, resamples, generator)]) for own in strata])
    first = drawn == drawn.max(axis=0)
    return (first / first.sum(axis=0)).mean(axis=1)


def wilson_interval(failures: int, runs: int) -> tuple[float, float]:
    """Return the 95% score interval of a rate, which has a width even at 0 of n.

    Args:
        failures: from 0 to ``runs``.
        runs: at least 1.

    Returns:
        The lower and the upper end, within [0, 1].

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    """
    from scipy.stats import binomtest  # half a second, which a sweep need not wait for

    interval = binomtest(failures, runs).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def _ends(drawn: Floats, confidence: float) -> Floats:
    """Return the ends of the percentile interval ``[2, ...]`` of resamples ``[..., r]``."""
    tail = (1.0 - confidence) / 2.0
    return np.quantile(drawn, [tail, 1.0 - tail], axis=-1)


def _again(values: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Return runs drawn with replacement ``[resamples, n]``."""
    return values[generator.integers(0, values.size, size=(resamples, values.size))]


def _beats(x: Floats, y: Floats) -> Any:
    """Return how often a value of x ``[..., n]`` exceeds one of y ``[..., k]``; ties count half."""
    from scipy.stats import mannwhitneyu

    # The method is that of the p-value, which is not used: this is the quick one.
    wins = mannwhitneyu(x, y, axis=-1, method="asymptotic").statistic
    return wins / (x.shape[-1] * y.shape[-1])


def _share_above(values: Floats, taus: Floats) -> Floats:
    """Return the share of values ``[..., n]`` above each threshold ``[..., t]``."""
    return (values[..., None, :] > taus[:, None]).mean(axis=-1)


# ------------------------------------------------------------------------ hyperparameter importance


class Importance(NamedTuple):
    """The variance of the configurations' scores, split into shares.

    Attributes:
        main: share of each hyperparameter alone ``[j]``.
        low: lower end of its 95% interval ``[j]``; NaN if nothing could be resampled.
        high: upper end.
        pairs: share of the interaction of two hyperparameters, beyond both alone ``[j, j]``,
            symmetric, zero diagonal.
        noise: share of the seeds; NaN with one run per configuration.
        effects: mean score at each level, the others averaged out, one array ``[levels]`` each.
        errors: half width of the 95% interval of each of them.
    """

    main: Floats
    low: Floats
    high: Floats
    pairs: Floats
    noise: float
    effects: tuple[Floats, ...]
    errors: tuple[Floats, ...]


def importance(
    codes: ArrayLike, scores: Sequence[ArrayLike], halves: int = 100, seed: int = 0
) -> Importance:
    """Split the variance of scores over hyperparameters: the main effects of a functional ANOVA.

    y(x) = f_0 + sum_j f_j(x_j) + sum_ij f_ij(x_i, x_j) + ...,   share_j = Var f_j / Var y

    Each f_j is constant on the levels of x_j. All of them are fitted together by least squares, so
    a design that is not a grid does not credit one hyperparameter with another's effect. f_ij are
    the cell means of the residuals. Var f_j is too large by the noise in the fitted f_j, which is
    subtracted (as in epsilon squared), so a hyperparameter without effect gets about 0. In a full
    grid that noise comes from the seeds alone, otherwise from all residuals of f_0 and f_j.

    It shows which hyperparameters matter over the whole space that was searched: a wider range
    makes one more important. With scores that are 1 for the best quarter and 0 for the rest, it is
    a histogram PED-ANOVA: which ones matter for being among the best.

    Args:
        codes: level of each hyperparameter in each configuration ``[n, j]``, integers from 0.
        scores: finite final scores of each configuration's runs, arrays ``[n_c]``.
        halves: half-samples for the intervals: of the seeds in a full grid, of the configurations
            otherwise (delete-half jackknife).
        seed: the only source of randomness.

    Returns:
        An ``Importance``; all shares are 0 if the scores do not differ.

    Source: Hutter, Hoos and Leyton-Brown 2014 (F_U = V_U / V); the top quarter: Watanabe,
        Bansal, Hutter 2023; half-samples: Shao and Wu 1989.
    """
    levels, runs = np.asarray(codes, int), _strata(list(scores))
    means = np.array([part.mean() for part in runs])
    grid, noise = is_grid(levels), _seed_noise(runs)
    design = _Design.of(levels)
    shares = _shares(design, means, noise, grid)
    generator = np.random.default_rng(seed)
    drawn = [
        _half_of_seeds(design, runs, noise, generator)
        if grid
        else _half_of_configs(levels, means, generator)
        for _ in range(halves if _can_halve(grid, runs) else 0)
    ]
    low, high = np.full((2, levels.shape[1]), np.nan)
    if drawn:
        low, high = np.quantile(np.stack(drawn), [0.025, 0.975], axis=0)
    total = float(means.var())
    share = float("nan") if noise is None else min(1.0, noise / total) if total else 0.0
    return shares._replace(low=low, high=high, noise=share)


@dataclass(frozen=True)
class _Design:
    """Least squares on one indicator per level of each hyperparameter."""

    codes: NDArray[np.int64]  # [n, j]
    matrix: Floats  # a column of ones, then the indicators [n, 1 + levels]
    inverse: Floats  # pseudo-inverse of the Gram matrix [1 + levels, 1 + levels]
    slices: tuple[slice, ...]  # places of each hyperparameter's levels
    rank: int

    @classmethod
    def of(cls, codes: NDArray[np.int64]) -> "_Design":
        indicators = [column[:, None] == np.arange(column.max() + 1) for column in codes.T]
        matrix = np.column_stack([np.ones(len(codes)), *indicators])
        starts = itertools.accumulate((each.shape[1] for each in indicators), initial=1)
        slices = tuple(slice(*ends) for ends in itertools.pairwise(starts))
        values, vectors = np.linalg.eigh(matrix.T @ matrix)
        known = values > values[-1] * len(values) * np.finfo(np.float64).eps
        inverse = (vectors[:, known] / values[known]) @ vectors[:, known].T
        return cls(codes, matrix, inverse, slices, int(known.sum()))


def is_grid(codes: NDArray[np.int64]) -> bool:
    """Return whether every combination of levels occurs exactly once."""
    distinct = len(np.unique(codes, axis=0))
    combinations = math.prod(len(np.unique(column)) for column in codes.T)
    return distinct == combinations == len(codes)


def _seed_noise(runs: Sequence[Floats]) -> float | None:
    """Return the variance of a configuration's mean due to its seeds; None with one run each."""
    several = [part.var(ddof=1) / part.size for part in runs if part.size > 1]
    return float(np.mean(several)) if several else None


def _can_halve(grid: bool, runs: Sequence[Floats]) -> bool:
    return min(part.size for part in runs) > 1 if grid else len(runs) >= 8


def _half_of_seeds(
    design: _Design, runs: Sequence[Floats], noise: float | None, generator: np.random.Generator
) -> Floats:
    """Return the main shares when each configuration keeps half of its runs."""
    more = int(generator.integers(2))  # of an odd number, the smaller or the larger half
    sizes = [part.size // 2 + more * (part.size % 2) for part in runs]
    drawn = zip(runs, sizes, strict=True)
    means = np.array([generator.permutation(part)[:count].mean() for part, count in drawn])
    noise = noise or 0.0
    louder = noise * float(np.mean([part.size / n for part, n in zip(runs, sizes, strict=True)]))
    shares = _shares(design, means, louder, grid=True, paired=False).main
    # The noise added by the smaller number of runs must not count in the whole variance.
    total = float(means.var())
    scale = total / max(total - louder + noise, 0.5 * total) if total else 1.0
    return np.minimum(shares * scale, 1.0)


def _half_of_configs(
    codes: NDArray[np.int64], means: Floats, generator: np.random.Generator
) -> Floats:
    """Return the main shares of a random half of the configurations."""
    half = generator.permutation(len(means))[: (len(means) + 1) // 2]
    return _shares(_Design.of(codes[half]), means[half], None, grid=False, paired=False).main


def _shares(
    design: _Design, y: Floats, noise: float | None, grid: bool, paired: bool = True
) -> Importance:
    """Return the shares of main effects and pairs, without intervals."""
    total, n, j = float(y.var()), len(y), design.codes.shape[1]
    fitted = design.inverse @ (design.matrix.T @ y)  # of smallest norm
    residual = y - design.matrix @ fitted
    spare = n - design.rank
    left = float(residual @ residual) / spare if spare > 0 else noise or 0.0
    of_seeds = grid and noise is not None
    variance = noise or 0.0 if of_seeds else left
    main, effects, errors = np.zeros(j), [], []
    width = 1.96 if of_seeds else float(special.stdtrit(max(spare, 1), 0.975))
    for index, columns in enumerate(design.slices):
        levels = columns.stop - columns.start
        weights = np.bincount(design.codes[:, index], minlength=levels) / n
        centring = np.eye(levels) - weights
        effect = centring @ fitted[columns]
        spread = np.diag(centring @ design.inverse[columns, columns] @ centring.T)
        main[index] = max(0.0, float(weights @ (effect**2 - variance * spread)))
        effects.append(y.mean() + effect)
        errors.append(width * np.sqrt(variance * np.maximum(spread, 0.0) + variance / n))
    pairs = np.zeros((j, j))
    for a, b in itertools.combinations(range(j), 2) if paired else ():
        pairs[a, b] = pairs[b, a] = _interaction(design, a, b, residual, noise if grid else None)
    scale = 1.0 / total if total > 1e-12 * max(1.0, float(np.abs(y).max()) ** 2) else 0.0
    nothing = np.full(j, np.nan)
    return Importance(
        np.minimum(main * scale, 1.0), nothing, nothing, np.minimum(pairs * scale, 1.0),
        float("nan"), tuple(effects), tuple(errors),
    )  # fmt: skip


def _interaction(design: _Design, a: int, b: int, residual: Floats, noise: float | None) -> float:
    """Return the variance of the cell means of two hyperparameters, without that of the noise."""
    first, second = (_coarse(design.codes[:, k], len(residual)) for k in (a, b))
    cell = np.unique(first * (second.max() + 1) + second, return_inverse=True)[1]
    counts = np.bincount(cell)
    squares = float((np.bincount(cell, residual) ** 2 / counts).sum())
    freedom = max(0, counts.size - int(np.unique(first).size + np.unique(second).size) + 1)
    spare = len(residual) - design.rank - freedom
    if noise is None and spare <= 0:
        return 0.0
    within = noise if noise is not None else (float(residual @ residual) - squares) / spare
    return max(0.0, (squares - freedom * max(within, 0.0)) / len(residual))


def _coarse(codes: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return fewer levels if two-way cells would otherwise hold fewer than about 4 values."""
    levels, most = int(codes.max()) + 1, max(2, int(math.sqrt(n / 4)))
    return codes if levels <= most else codes * most // levels


# --------------------------------------------------------------------------- several environments


def percentile_normalized(scores: ArrayLike) -> Floats:
    """Return scores on a scale that environments share: 0 at the 5th percentile, 1 at the 95th.

    Args:
        scores: of each environment and configuration ``[e, h]``, finite.

    Returns:
        ``[e, h]``; 0 throughout an environment in which all scores are equal.

    Source: percentiles of all settings' scores as in Adkins, Bowling and White 2024; of this
        sweep's settings here.
    """
    values = np.asarray(scores, np.float64)
    low, high = np.quantile(values, [0.05, 0.95], axis=1, keepdims=True)
    return (values - low) / np.where(high > low, high - low, np.inf)


class Sensitivity(NamedTuple):
    """The gain of tuning for each environment over one setting for all.

    Attributes:
        value: the sensitivity, ``tuned - cross``.
        tuned: mean over environments of the best setting of each.
        cross: mean over environments of the one setting that is best on average.
        best: index of the best setting of each environment ``[e]``.
        best_cross: index of the setting that is best on average.
    """

    value: float
    tuned: float
    cross: float
    best: NDArray[np.int64]
    best_cross: int


def sensitivity(normalized: ArrayLike) -> Sensitivity:
    """Return the hyperparameter sensitivity of an algorithm over environments.

    Phi = 1/|E| sum_e max_h Gamma(e, h) - max_h 1/|E| sum_e Gamma(e, h)

    The best of noisy scores is too high, and it is taken |E| times in the first term but once in
    the second: with few seeds Phi is overestimated.

    Args:
        normalized: Gamma, scores on a common scale ``[e, h]``, every setting in every environment.

    Returns:
        A ``Sensitivity``; its value is 0 where one setting is best everywhere.

    Source: Adkins, Bowling and White 2024, A Method for Evaluating Hyperparameter Sensitivity in
        Reinforcement Learning (arXiv:2412.07165); as ``compute_scores`` in the authors' code.
    """
    gamma = np.asarray(normalized, np.float64)
    average = gamma.mean(axis=0)
    tuned, cross = float(gamma.max(axis=1).mean()), float(average.max())
    return Sensitivity(tuned - cross, tuned, cross, gamma.argmax(axis=1), int(average.argmax()))


class Dimensionality(NamedTuple):
    """The scores reached by tuning only some hyperparameters per environment.

    Attributes:
        effective: how many are enough for 95% of the fully tuned score.
        scores: best mean score with 0, 1, ..., j of them tuned ``[j + 1]``.
        subsets: the hyperparameters tuned for each of these scores.
    """

    effective: int
    scores: Floats
    subsets: tuple[tuple[int, ...], ...]


def effective_dimensionality(
    normalized: ArrayLike, codes: ArrayLike, enough: float = 0.95
) -> Dimensionality:
    """Return how many hyperparameters must be tuned per environment if the rest are shared.

    d = min |S| such that  mean_e max over h with h = h* outside S of Gamma(e, h)
                           >= 0.95 mean_e max_h Gamma(e, h),   h* best on average

    It needs settings that share values, so it is meaningful only for grids.

    Args:
        normalized: Gamma ``[e, h]``.
        codes: level of each hyperparameter in each setting ``[h, j]``; j at most about 12, because
            all subsets are tried.
        enough: the share of the fully tuned score to be reached.

    Returns:
        A ``Dimensionality``.

    Source: Adkins, Bowling and White 2024; as ``generate_dimensionality_plot`` in the authors'
        code.
    """
    gamma, levels = np.asarray(normalized, np.float64), np.asarray(codes)
    common = levels[gamma.mean(axis=0).argmax()]
    differs = levels != common
    scores, subsets = [], []
    for size in range(levels.shape[1] + 1):
        tried = {
            tuned: float(gamma[:, ~np.delete(differs, tuned, axis=1).any(axis=1)].max(1).mean())
            for tuned in itertools.combinations(range(levels.shape[1]), size)
        }
        subsets.append(max(tried, key=lambda tuned: tried[tuned]))
        scores.append(tried[subsets[-1]])
    reached = [size for size, score in enumerate(scores) if score >= enough * scores[-1] - 1e-12]
    return Dimensionality(min(reached, default=len(scores) - 1), np.array(scores), tuple(subsets))
