import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from purejaxpg import InputError, stats

pytestmark = pytest.mark.fast


def test_iqm_by_hand():
    # Eight values: the two lowest and the two highest go, (3 + 4 + 5 + 6) / 4 stays.
    assert stats.iqm([100.0, 3, 4, 5, 6, -50, 2, 7]) == 4.5
    # Seven values: floor(7 / 4) = 1 goes at each end.
    assert stats.iqm([0.0, 1, 2, 3, 4, 5, 60]) == 3.0
    # Fewer than four: nothing goes.
    assert stats.iqm([1.0, 2, 6]) == 3.0
    assert stats.iqm([5.0]) == 5.0


@pytest.mark.parametrize("n", range(1, 25))
def test_iqm_is_scipys_trimmed_mean(n):
    values = np.random.default_rng(n).standard_normal((3, n, 2))
    expected = scipy_stats.trim_mean(values, 0.25, axis=1)
    np.testing.assert_allclose(stats.iqm(values, axis=1), expected, rtol=1e-13)


def test_iqm_does_not_trim_nan_away():
    assert np.isnan(stats.iqm([1.0, 2, 3, np.nan]))
    assert stats.iqm([[1.0, np.nan], [1.0, 2.0]])[1] == 1.5


def test_iqm_of_nothing_is_refused():
    with pytest.raises(InputError, match="at least 1 value, but there are 0"):
        stats.iqm([])


def exact_resample_means(values):
    return np.array([np.mean(draw) for draw in itertools.product(values, repeat=len(values))])


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_the_bootstrap_agrees_with_all_27_resamples(confidence):
    values = [1.0, 2.0, 6.0]
    exact = np.sort(exact_resample_means(values))
    assert exact.size == 27
    tail = (1 - confidence) / 2
    low, high = stats.bootstrap_ci(values, np.mean, confidence, resamples=100_000)
    # None of these tails is a multiple of 1/27, so the quantile of the discrete distribution is
    # unambiguous and a large bootstrap has to hit it exactly.
    quantile = np.quantile(exact, [tail, 1 - tail], method="inverted_cdf")
    np.testing.assert_allclose([low, high], quantile, rtol=1e-12)


def test_strata_are_resampled_within_themselves():
    # Constant strata leave no freedom; pooled resampling would mix 0 and 10.
    low, high = stats.bootstrap_ci([np.zeros(3), np.full(5, 10.0)], np.mean)
    assert low == high == pytest.approx(50 / 8)
    pooled = stats.bootstrap_ci(np.r_[np.zeros(3), np.full(5, 10.0)], np.mean)
    assert pooled[0] < low < pooled[1]


def test_strata_agree_with_enumeration():
    a, b = [0.0, 1.0], [10.0, 13.0, 20.0]
    draws = itertools.product(itertools.product(a, repeat=2), itertools.product(b, repeat=3))
    exact = np.array([np.mean(x + y) for x, y in draws])
    assert exact.size == 4 * 27
    low, high = stats.bootstrap_ci([a, b], np.mean, 0.9, resamples=100_000)
    expected = np.quantile(exact, [0.05, 0.95], method="inverted_cdf")
    np.testing.assert_allclose([low, high], expected, rtol=1e-12)


def test_strata_are_put_side_by_side_along_the_runs():
    # Two curves of two points: every run of a stratum is the same, so that nothing varies.
    first, second = np.array([[1.0], [2.0]]), np.array([[4.0, 4.0], [8.0, 8.0]])
    low, high = stats.bootstrap_ci([first, second], np.mean, resamples=20)
    np.testing.assert_allclose([low, high], [[3.0, 6.0]] * 2)


def test_every_resample_counts():
    seen = []

    def statistic(values, axis):
        seen.append(values.shape)
        return values.mean(axis=axis)

    stats.bootstrap_ci([1.0, 2.0], statistic, resamples=7)
    assert seen == [(7, 2)]
    low, high = stats.bootstrap_ci([1.0, 2.0, 4.0], resamples=1)
    assert low == high


def test_the_seed_decides_and_nothing_else_does():
    values = np.random.default_rng(0).standard_normal(9)
    first = stats.bootstrap_ci(values, resamples=50, seed=1)
    np.random.seed(5)  # noqa: NPY002 (the global state must not matter)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert stats.bootstrap_ci(values, resamples=50, seed=1) == first
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert stats.bootstrap_ci(values, resamples=50, seed=2) != first


def test_small_blocks_change_nothing(monkeypatch):
    values = np.random.default_rng(0).standard_normal((4, 9))
    whole = stats.bootstrap_ci(values, resamples=101)
    monkeypatch.setattr(stats, "_BLOCK", 100)
    np.testing.assert_array_equal(stats.bootstrap_ci(values, resamples=101), whole)


def test_leading_axes_share_the_resampled_runs():
    values = np.random.default_rng(0).standard_normal((3, 8))
    low, high = stats.bootstrap_ci(values)
    assert low.shape == high.shape == (3,)
    for row, ends in zip(values, zip(low, high, strict=True), strict=True):
        assert stats.bootstrap_ci(row) == ends
    # A curve and the curve plus 5 therefore get bands that differ by exactly 5.
    np.testing.assert_allclose(stats.bootstrap_ci(values + 5)[0], low + 5)


def test_more_confidence_is_wider_and_one_run_has_no_width():
    values = np.random.default_rng(0).standard_normal(12)
    narrow, wide = stats.bootstrap_ci(values, confidence=0.5), stats.bootstrap_ci(values)
    assert wide[0] < narrow[0] < stats.iqm(values) < narrow[1] < wide[1]
    assert stats.bootstrap_ci([3.0]) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"confidence": 95}, "confidence is 95"),
        ({"resamples": 0}, "resamples is 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        stats.bootstrap_ci([1.0, 2.0], **arguments)


@pytest.mark.parametrize("scores", [[], 3.0, [[1.0], []], np.zeros((3, 0))])
def test_an_empty_stratum_is_refused(scores):
    with pytest.raises(InputError, match="at least 1 run"):
        stats.bootstrap_ci(scores)


@pytest.mark.parametrize(("n", "at_least"), [(8, 0.84), (32, 0.90)])
def test_the_interval_covers_about_as_often_as_it_says(n, at_least):
    # Normal runs around 0, so the true IQM is 0. The percentile interval is known to be too narrow
    # for few runs; the bounds say how narrow it is allowed to be here.
    generator = np.random.default_rng(0)
    trials = generator.standard_normal((1000, n))
    inside = 0
    for start in range(0, 1000, 50):
        # One seed per block: trials within a block share resamples, and are independent samples.
        low, high = stats.bootstrap_ci(trials[start : start + 50], resamples=400, seed=start)
        inside += int(((low <= 0) & (high >= 0)).sum())
    assert at_least <= inside / 1000 <= 0.97


def test_a_diverged_run_counts_as_the_worst():
    filled = stats.worst_filled([10.0, np.nan, 500.0, 300.0], [False, True, True, False])
    np.testing.assert_allclose(filled, [10, 10, 10, 300], rtol=1e-8)


def test_a_low_score_measured_on_a_diverged_run_is_the_worst_one():
    # All healthy runs are perfect: "the worst healthy score" would reward diverging.
    filled = stats.worst_filled([500.0, 500.0, 9.3, np.inf], [False, False, True, True])
    np.testing.assert_allclose(filled, [500, 500, 9.3, 9.3], rtol=1e-8)


def test_an_unmarked_score_that_is_not_finite_counts_as_diverged():
    filled = stats.worst_filled([1.0, np.nan, -np.inf], [False] * 3)
    np.testing.assert_allclose(filled, [1] * 3, rtol=1e-8)


@pytest.mark.parametrize("tie", [-200.0, 0.0, 1e-12, 1e20, -3e38])
@pytest.mark.parametrize("healthy", [1, 7, 1000])
def test_a_diverged_run_ties_with_no_other(tie, healthy):
    """In a task with sparse rewards all scores are equal at first: diverging must not win that."""
    filled = stats.worst_filled([tie] * (healthy + 1), [True] + [False] * healthy)
    assert (filled[1:] == tie).all()
    assert filled[0] < tie and filled[0] == pytest.approx(tie, rel=2e-9, abs=2e-9)
    # It stays below in the mean of as many runs, which is what configurations are ranked by.
    assert filled.mean() < tie and stats.iqm([filled[0]] * 4) < stats.iqm([tie] * 4)


def test_no_finite_score_at_all():
    assert (stats.worst_filled([np.nan, np.nan], [True, True]) == -np.inf).all()
    assert stats.worst_filled([], []).shape == (0,)


# ------------------------------------------------------------------------------------- conditions


def test_the_score_over_conditions_by_hand():
    # Eight runs: the IQM is that of the middle four. Two runs: their mean.
    scores = [[100.0, 3, 4, 5, 6, -50, 2, 7], [1.0, 2.0]]
    assert stats.robust(scores, "mean") == (4.5 + 1.5) / 2
    assert stats.robust(scores, "worst") == 1.5
    assert stats.robust([[1.0], [-np.inf]], "mean") == stats.robust([[1.0], [-np.inf]], "worst")


@pytest.mark.parametrize(("by", "over"), [("mean", np.mean), ("worst", np.min)])
def test_the_interval_over_conditions_agrees_with_all_resamples(by, over):
    """Conditions are strata: each keeps its number of runs."""
    scores = [[1.0, 2.0, 6.0], [0.0, 4.0]]
    drawn = [[np.mean(d) for d in itertools.product(x, repeat=len(x))] for x in scores]
    exact = [over(pair) for pair in itertools.product(*drawn)]  # 27 x 4, equally likely
    found = stats.robust_ci(scores, by, resamples=40_000)
    expected = np.quantile(exact, [0.025, 0.975])
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_scores_of_a_condition_are_scaled_by_its_configurations():
    scores = [[10.0, 20.0], [30.0, 30.0], [50.0]]  # IQMs 15, 30, 50
    low, high = np.quantile([15.0, 30, 50], [0.05, 0.95])
    for own, found in zip(scores, stats.unit_scaled(scores), strict=True):
        np.testing.assert_allclose(found, (np.array(own) - low) / (high - low))
    np.testing.assert_array_equal(stats.unit_scaled([[3.0], [3.0]]), [[0.0], [0.0]])
    np.testing.assert_array_equal(stats.unit_scaled([[3.0], [-np.inf]]), [[3.0], [-np.inf]])


# ------------------------------------------------------------------------------------- comparisons


def test_the_probability_of_improvement_by_hand():
    # 2 > 1, 2 = 2, 2 < 3 and 5 > 1, 2, 3: (1 + 1/2 + 0 + 3) / 6.
    assert stats.probability_of_improvement([[2.0, 5.0]], [[1.0, 2.0, 3.0]]) == 4.5 / 6
    assert stats.probability_of_improvement([[1.0]], [[1.0]]) == 0.5
    # Environments count equally, for any number of runs.
    assert stats.probability_of_improvement([[2.0], [0.0, 0, 0]], [[1.0], [1.0, 1]]) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_probability_of_improvement_compares_every_pair(seed):
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, 6, 7).astype(float), generator.integers(0, 6, 9).astype(float)
    x[0] = y[0] = -np.inf  # no run of these environments has a finite score: a tie
    expected = np.mean([[(a > b) + 0.5 * (a == b) for b in y] for a in x])
    assert stats.probability_of_improvement([x], [y]) == pytest.approx(expected)


def test_the_interval_of_the_improvement():
    x, y = [np.arange(10.0)], [np.arange(10.0) + 1.0]
    low, high = stats.improvement_ci(x, y)
    assert 0.0 < low < stats.probability_of_improvement(x, y) < high < 1.0
    assert stats.improvement_ci([[3.0, 4.0]], [[1.0, 2.0]]) == (1.0, 1.0)
    assert stats.improvement_ci(x, y) == (low, high)  # the seed decides


def exact_improvements(x, y):
    """P(X > Y) of every pair of equally likely resamples of one environment."""
    signs = np.sign(np.subtract.outer(x, y))
    ours = itertools.product(range(len(x)), repeat=len(x))
    theirs = list(itertools.product(range(len(y)), repeat=len(y)))
    return [(signs[np.ix_(i, j)].mean() + 1) / 2 for i in ours for j in theirs]


def test_the_interval_of_the_improvement_agrees_with_enumeration():
    # 4 * 27 resamples of the first environment with 27 * 4 of the second.
    x, y = [[0.0, 2.0], [1.0, 4.0, 2.0]], [[1.0, 3.0, 2.0], [2.0, 3.0]]
    a, b = (exact_improvements(*pair) for pair in zip(x, y, strict=True))
    assert len(a) == len(b) == 108
    exact = np.add.outer(a, b).ravel() / 2
    for confidence in (0.5, 0.85, 0.93):
        tails = np.array([1 - confidence, 1 + confidence]) / 2
        # The quantile is the same a bit to both sides, so that a large bootstrap has to hit it.
        near = np.quantile(exact, [tails - 4e-3, tails + 4e-3], method="inverted_cdf")
        np.testing.assert_allclose(near[0], near[1], rtol=1e-12)
        found = stats.improvement_ci(x, y, confidence, resamples=100_000)
        np.testing.assert_allclose(found, near[0], rtol=1e-12)


def test_the_defaults_are_95_percent_and_seed_0():
    x, y = np.random.default_rng(0).standard_normal((2, 1, 9))
    np.testing.assert_array_equal(
        stats.bootstrap_ci(x), stats.bootstrap_ci(x, stats.iqm, 0.95, 2000, 0)
    )
    assert stats.improvement_ci(x, y) == stats.improvement_ci(x, y, 0.95, 2000, 0)
    assert stats.improvement_ci(x, y) != stats.improvement_ci(x, y, 0.95, 2000, 1)
    many, taus = [np.linspace(-1, 1, n) for n in (9, 11, 13)], np.linspace(-1, 1, 40)
    ours, given, more, other = (
        stats.performance_profile(many, taus, *some) for some in ((), (500, 0), (1000, 0), (500, 1))
    )
    np.testing.assert_array_equal(ours, given)
    assert (ours[1] != more[1]).any() and (ours[1] != other[1]).any()
    both = [x[0], y[0]]
    np.testing.assert_array_equal(stats.first_place(both), stats.first_place(both, 2000, 0))
    assert (stats.first_place(both) != stats.first_place(both, 2000, 1)).all()


def test_the_interval_of_a_profile_agrees_with_enumeration():
    # Above 0.5: all of one run, and k of three, by chance 1/3 each. P(k = 0) = 8/27 and
    # P(k = 3) = 1/27 are both above 2.5%, so that k goes from 0 to 3.
    scores = [[1.0], [0.0, 0.0, 3.0]]
    share, low, high = stats.performance_profile(scores, [0.5, 2.0], resamples=20_000)
    np.testing.assert_allclose([share, low, high], [[2 / 3, 1 / 6], [1 / 2, 0.0], [1.0, 1 / 2]])
    # The other way round, P(k = 0) = 1/27. Of four, P(k = 4) = 1/256 and P(k >= 3) = 13/256.
    _, low, high = stats.performance_profile([[0.0, 3.0, 3.0]], [2.0], resamples=20_000)
    assert (low, high) == (0.0, 1.0)
    _, low, high = stats.performance_profile([[0.0, 0.0, 0.0, 3.0]], [2.0], resamples=20_000)
    assert (low, high) == (0.0, 3 / 4)


def test_a_performance_profile_by_hand():
    share, low, high = stats.performance_profile([[1.0, 2, 3, 4]], [0.0, 1.0, 2.5, 4.0])
    np.testing.assert_array_equal(share, [1.0, 0.75, 0.5, 0.0])  # above, not at
    assert (low <= share).all() and (share <= high).all()
    assert low[0] == high[0] == 1.0 and low[2] < 0.5 < high[2]
    # The mean over environments, not over runs.
    share, *_ = stats.performance_profile([[1.0], [0.0, 0.0, 0.0]], [0.5])
    assert share == [0.5]


def test_first_place_by_hand():
    # With one run each, nothing changes; a tie is shared.
    np.testing.assert_array_equal(stats.first_place([[3.0], [5.0], [5.0]]), [0.0, 0.5, 0.5])
    # Resampled means of (0, 4): 0, 2, 2 or 4; the other is always 3.
    found = stats.first_place([[0.0, 4.0], [3.0, 3.0]], resamples=100_000)
    np.testing.assert_allclose(found, [0.25, 0.75], atol=0.005)


@pytest.mark.parametrize(("failures", "runs"), [(0, 10), (3, 10), (10, 10), (1, 96)])
def test_the_wilson_interval_ends_where_the_score_test_rejects(failures, runs):
    """(p - q)^2 = z^2 q (1 - q) / n at either end q that is not 0 or 1."""
    z, share = 1.959963984540054, failures / runs
    for end in stats.wilson_interval(failures, runs):
        if 0.0 < end < 1.0:
            assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / runs)


def test_the_wilson_interval_ends_at_0_and_1_without_rounding():
    assert all(stats.wilson_interval(0, n)[0] == 0.0 for n in range(1, 200))
    assert all(stats.wilson_interval(n, n)[1] == 1.0 for n in range(1, 200))


# -------------------------------------------------------------------------------------- importance


def grid(*levels):
    return np.array(list(itertools.product(*map(range, levels))))


def test_the_anova_of_a_grid_by_hand():
    # y = 10 a + 2 b with a in 0, 1 and b in 0, 1, 2: variances 25 and 4 * 2/3, nothing else.
    codes = grid(2, 3)
    scores = [[y, y] for y in 10.0 * codes[:, 0] + 2.0 * codes[:, 1]]
    found = stats.importance(codes, scores)
    total = 25 + 8 / 3
    np.testing.assert_allclose(found.main, [25 / total, 8 / 3 / total])
    np.testing.assert_allclose(found.pairs, 0.0, atol=1e-12)
    np.testing.assert_allclose(found.effects[0], [2.0, 12.0])
    np.testing.assert_allclose(found.effects[1], [5.0, 7.0, 9.0])
    np.testing.assert_allclose([found.low, found.high], [found.main] * 2)  # the seeds agree
    assert found.noise == 0.0


def test_a_pure_interaction_by_hand():
    # 1 where a = b, else 0: no main effect, all of the variance is in the pair.
    codes = grid(2, 2)
    scores = [[float(a == b)] * 2 for a, b in codes]
    found = stats.importance(codes, scores)
    np.testing.assert_allclose(found.main, 0.0, atol=1e-12)
    np.testing.assert_allclose(found.pairs, [[0.0, 1.0], [1.0, 0.0]], atol=1e-12)


def planted(codes, generator, noise):
    """The first matters most, then the second, then the third with the fourth; the fifth not."""
    a, b, c, d, _ = codes.T
    y = 4.0 * np.abs(a - 2) + 1.5 * b + 3.0 * (c > 1) * (d > 1)
    return y[:, None] + noise * generator.standard_normal((len(y), 4))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("design", ["grid", "random"])
def test_planted_importances_are_found(design, seed):
    generator = np.random.default_rng(seed)
    codes = grid(4, 4, 4, 4, 3) if design == "grid" else generator.integers(0, 4, (300, 5))
    found = stats.importance(codes, list(planted(codes, generator, 1.0)))
    order = np.argsort(-found.main)
    assert order[0] == 0 and order[1] == 1 and order[-1] == 4
    assert found.main[4] < 0.01 and found.low[4] < 0.005
    assert np.unravel_index(found.pairs.argmax(), (5, 5)) == (2, 3)
    inside = (found.low <= found.main) & (found.main <= found.high)
    assert inside.all() and found.low[1] > 0


def test_shares_of_a_large_grid_are_the_exact_variances():
    codes = grid(4, 4, 4, 4, 3)
    y = planted(codes, np.random.default_rng(0), 0.0)[:, 0]
    expected = [
        np.var([y[codes[:, j] == k].mean() for k in range(codes[:, j].max() + 1)]) / y.var()
        for j in range(5)
    ]
    found = stats.importance(codes, [[v, v] for v in y])
    np.testing.assert_allclose(found.main, expected, atol=1e-12)


def test_noise_alone_explains_nothing():
    generator = np.random.default_rng(0)
    mains, intervals = [], []
    for _ in range(60):
        codes = generator.integers(0, 5, (60, 4))
        found = stats.importance(codes, list(generator.standard_normal((60, 1))), halves=40)
        mains.append(found.main)
        intervals.append(found.low)
    # Without the correction each of them would get 4 / 59, about 7%.
    assert np.mean(mains) < 0.03
    assert np.mean(np.array(intervals) <= 0.0) > 0.9


@pytest.mark.parametrize("seeds", [3, 8, 0], ids=["3 seeds", "8 seeds", "random search"])
def test_the_intervals_of_importance_cover_about_as_often_as_they_say(seeds):
    first, second = np.array([0.0, 3.0, 5.0, 4.0]), np.array([0.0, 1.0, 0.5])
    noise, inside = (1.0 / seeds if seeds else 1.0), []
    truth = np.array([first.var(), second.var()]) / (first.var() + second.var() + noise)
    for trial in range(60):
        generator = np.random.default_rng(trial)
        codes = grid(4, 3) if seeds else generator.integers(0, [4, 3], (120, 2))
        y = (first[codes[:, 0]] + second[codes[:, 1]])[:, None]
        scores = y + generator.standard_normal((len(y), seeds or 1))
        found = stats.importance(codes, list(scores), halves=60, seed=trial)
        inside.append((found.low <= truth) & (truth <= found.high))
    assert (np.mean(inside, axis=0) >= 0.85).all()


def dense_anova(codes, y, noise=None):
    """Main shares by dense least squares, with the first level of each column left out."""
    columns, places = [np.ones(len(y))], []
    for column in codes.T:
        levels = np.unique(column)
        places.append(range(len(columns), len(columns) + len(levels) - 1))
        columns += [(column == level).astype(float) for level in levels[1:]]
    matrix = np.stack(columns, axis=1)
    beta = np.linalg.lstsq(matrix, y)[0]
    residual = y - matrix @ beta
    if noise is None:
        noise = residual @ residual / (len(y) - matrix.shape[1])
    covariance = noise * np.linalg.inv(matrix.T @ matrix)
    main = []
    for place in places:
        # The variance of f_j over the configurations, and how much of it the noise put there.
        spread = np.atleast_2d(np.cov(matrix[:, place], rowvar=False, ddof=0))
        excess = np.trace(spread @ covariance[np.ix_(place, place)])
        main.append(beta[place] @ spread @ beta[place] - excess)
    return np.clip(np.array(main) / y.var(), 0.0, 1.0)


DESIGNS = {
    "grid": grid(3, 2),
    "grid with one missing": grid(3, 3)[1:],
    "grid with one twice": np.concatenate([grid(3, 2), [[0, 0]]]),
    "random": np.random.default_rng(3).integers(0, [4, 3, 2], (25, 3)),
    "almost confounded": np.array([[0, 0], [1, 1]] * 9 + [[0, 1], [1, 0]]),
}


def uneven_runs(means):
    """1, 2 or 3 runs in turn around each mean."""
    offsets = itertools.cycle([[0.0], [-1.0, 1.0], [-2.0, -1.0, 3.0]])
    return [mean + np.array(some) for mean, some in zip(means, offsets, strict=False)]


@pytest.mark.parametrize("name", DESIGNS)
def test_main_effects_are_those_of_dense_least_squares(name):
    codes = DESIGNS[name]
    y = codes @ [3.0, -2.0, 1.0][: codes.shape[1]]
    y = y + np.random.default_rng(0).standard_normal(len(codes))
    found = stats.importance(codes, list(y[:, None]), halves=0)
    np.testing.assert_allclose(found.main, dense_anova(codes, y), atol=1e-9)
    assert found.main.max() > 0.2 and np.isnan(found.noise)
    # Several runs define the noise in a full grid; in other designs they change nothing.
    runs = uneven_runs(y)
    noise = np.mean([np.var(part, ddof=1) / len(part) for part in runs if len(part) > 1])
    found = stats.importance(codes, runs, halves=0)
    expected = dense_anova(codes, y, noise if name == "grid" else None)
    np.testing.assert_allclose(found.main, expected, atol=1e-9)
    assert found.noise == pytest.approx(min(1.0, noise / y.var()))


def test_an_effect_that_another_cancels_is_capped_at_the_whole_variance():
    codes = DESIGNS["almost confounded"]
    scores = [[5.0 * (a - b)] * 2 for a, b in codes]  # variance 25 / 4 each, 2.5 together
    found = stats.importance(codes, scores, halves=5)
    np.testing.assert_array_equal([found.main, found.high], 1.0)


def test_two_columns_that_never_differ_share_the_credit():
    # Least squares of smallest norm: half of the effect each, so a quarter of the variance.
    y = np.array([0.0, 2.0, 10.0, 13.0, 1.0, 11.0])
    one = np.array([0, 0, 1, 1, 0, 1])
    within = (2.0 + 14 / 3) / 4  # squares around the means 1 and 34/3, on 6 - 2 degrees
    alone = (31 / 6) ** 2 - within / 6
    found = stats.importance(np.stack([one, one], axis=1), list(y[:, None]), halves=0)
    np.testing.assert_allclose(found.main, [alone / 4 / y.var()] * 2)


def test_the_noise_of_the_seeds_in_a_grid_by_hand():
    # Means 0, 1, 5, 8, each of runs 2 below and 2 above: the variance of a mean is 8 / 2 = 4.
    scores = [[m - 2.0, m + 2.0] for m in (0.0, 1.0, 5.0, 8.0)]
    found = stats.importance(grid(2, 2), scores, halves=0)
    total = (3.5**2 + 2.5**2 + 1.5**2 + 4.5**2) / 4
    # The first: levels 0.5 and 6.5, variance 9, of which noise puts 4 / 4 there. The second: 2.5
    # and 4.5, variance 1, all of it expected from noise. The pair: -+0.5, less than that.
    np.testing.assert_allclose(found.main, [8 / total, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.pairs, 0.0, atol=1e-12)
    assert found.noise == pytest.approx(4 / total)
    np.testing.assert_allclose(found.effects, [[0.5, 6.5], [2.5, 4.5]])
    # A level is the mean of two configurations, so its variance is 4 / 2.
    np.testing.assert_allclose(found.errors, 1.96 * np.sqrt(2.0))
    louder = stats.importance(grid(2, 2), [[m - 9.0, m + 9.0] for m in range(4)], halves=0)
    assert louder.noise == 1.0


def test_the_errors_of_a_grid_without_seeds_come_from_what_is_left():
    table = np.array([[1.0, 3.0], [6.0, 8.0], [8.0, 16.0]])
    additive = table.mean(axis=1, keepdims=True) + table.mean(axis=0) - table.mean()
    variance = ((table - additive) ** 2).sum() / 2  # on 6 - 4 degrees
    found = stats.importance(grid(3, 2), table.reshape(-1, 1), halves=0)
    width = scipy_stats.t.ppf(0.975, 2)
    np.testing.assert_allclose(found.errors[0], width * np.sqrt(variance / 2))
    np.testing.assert_allclose(found.errors[1], width * np.sqrt(variance / 3))
    np.testing.assert_allclose(found.effects[0], table.mean(axis=1))
    np.testing.assert_allclose(found.effects[1], table.mean(axis=0))


def test_the_errors_of_a_single_hyperparameter_come_from_the_seeds():
    scores = [[m - 2.0, m + 2.0] for m in (0.0, 1.0, 5.0)]
    found = stats.importance(grid(3), scores, halves=0)
    np.testing.assert_allclose(found.errors[0], 1.96 * np.sqrt(4.0))


@pytest.mark.parametrize(
    ("offset", "size", "seen"),
    [
        (0.0, 1e-5, True),
        (0.0, 1e-7, False),
        (1e4, 0.1, True),
        (1e4, 1e-3, False),
        (-1e4, 0.1, True),
        (-1e4, 1e-3, False),
    ],
)
def test_differences_within_rounding_are_none(offset, size, seen):
    # A variance of 1e-12 is the bound, times the largest square where that is above 1.
    scores = [[offset + size * a] for a, _ in grid(2, 2)]
    found = stats.importance(grid(2, 2), scores, halves=0)
    np.testing.assert_allclose(found.main, [float(seen), 0.0], atol=1e-6)


# Half-samples. With halves=1, both ends of the interval are the one sample that was drawn.


def drawn_shares(codes, scores, number):
    found = [stats.importance(codes, scores, halves=1, seed=seed) for seed in range(number)]
    assert all((each.low == each.high).all() for each in found)
    return np.array([each.low for each in found])


def half_of_seeds(runs, sizes, noise):
    """Every outcome for two configurations of one hyperparameter, of whose runs `sizes` remain."""
    # Fewer runs are noisier in proportion. Half of that noise is in the variance of two levels.
    # The whole counts the noise of all runs only, but is never taken for less than a half.
    louder = noise * np.mean([len(part) / size for part, size in zip(runs, sizes, strict=True)])
    for a, b in itertools.product(*map(itertools.combinations, runs, sizes)):
        total = (np.mean(a) - np.mean(b)) ** 2 / 4
        part = max(0.0, total - louder / 2)
        yield [min(1.0, part / max(total - louder + noise, total / 2))]


@pytest.mark.parametrize(
    ("runs", "sizes"),
    [
        ([[0.0, 2.0], [6.0, 9.0]], [(1, 1)]),
        ([[0.0, 2.0, 3.0], [6.0, 9.0, 13.0]], [(1, 1), (2, 2)]),
        ([[0.0, 2.0], [6.0, 9.0, 13.0]], [(1, 1), (1, 2)]),
        ([[0.0, 2.0, 1.0, 4.0], [6.0, 9.0, 13.0]], [(2, 1), (2, 2)]),
        ([[0.0, 6.0], [1.0, 8.0]], [(1, 1)]),  # so noisy that the bounds decide
    ],
)
def test_half_samples_of_seeds_by_enumeration(runs, sizes):
    noise = np.mean([np.var(part, ddof=1) / len(part) for part in runs])
    outcomes = np.array([each for size in sizes for each in half_of_seeds(runs, size, noise)])
    drawn = drawn_shares(grid(2), runs, 150)
    near = np.abs(drawn - outcomes.T) < 1e-9
    assert near.any(axis=1).all(), "a draw that is no half-sample"
    assert near.any(axis=0).all(), "a half-sample that is never drawn"


@pytest.mark.parametrize(("n", "half"), [(8, 4), (9, 5)])
def test_half_samples_of_configurations_by_enumeration(n, half):
    # The noise is what each fit leaves.
    codes = np.array([[0], [0], [0], [0], [1], [1], [1], [1], [1]])[:n]
    y = np.array([0.0, 1.0, 4.0, 2.0, 6.0, 3.0, 9.0, 8.0, 5.0])[:n]
    kept = [list(some) for some in itertools.combinations(range(n), half)]
    # Where all had the same value, there would be nothing to compare.
    outcomes = [dense_anova(codes[some], y[some]) for some in kept if np.ptp(codes[some])]
    drawn = drawn_shares(codes, y[:, None], 60)
    near = np.abs(drawn - np.array(outcomes).T) < 1e-9
    assert (near.any(axis=1) | (drawn[:, 0] == 0.0)).all()
    assert len(np.unique(drawn.round(9))) > 20


def test_the_interval_holds_95_percent_of_the_half_samples():
    codes, generator = grid(2, 2), np.random.default_rng(0)
    runs = [mean + generator.standard_normal(8) for mean in (0.0, 2.5, 1.0, 3.5)]

    def ends(*more):
        found = stats.importance(codes, runs, *more)
        return np.array([found.low[1], found.high[1]])

    # Of two samples, the ends lie 2.5% and 97.5% of the way from one to the other.
    first, both = ends(1)[0], ends(2)
    second = both.sum() - first
    assert abs(second - first) > 0.01
    np.testing.assert_allclose(np.ptp(both), 0.95 * abs(second - first))
    np.testing.assert_array_equal(ends(), ends(100, 0))
    assert (ends() != ends(101, 0)).all() and (ends() != ends(100, 1)).all()


@pytest.mark.parametrize(
    ("codes", "sizes", "known"),
    [
        (grid(4), [2, 2, 2, 2], True),
        (grid(4), [2, 2, 1, 2], False),
        (np.array([[0], [1]] * 4), [1] * 8, True),
        (np.array([[0], [1]] * 4)[1:], [3] * 7, False),
    ],
)
def test_when_there_is_an_interval(codes, sizes, known):
    generator = np.random.default_rng(0)
    scores = [generator.standard_normal(size) for size in sizes]
    found = stats.importance(codes, scores, halves=5)
    assert np.isfinite(found.low).all() == np.isfinite(found.high).all() == known


# Pairs.


def pair_share(codes, y, merged, noise=None):
    """Share of the first two columns together, their levels `merged`, in plain loops."""
    first, second = (
        np.array(table)[column] for table, column in zip(merged, codes.T, strict=False)
    )
    indicators = [(column == k).astype(float) for column in codes.T for k in np.unique(column)]
    matrix = np.stack(indicators, axis=1)
    residual = y - matrix @ np.linalg.lstsq(matrix, y)[0]
    cells = {}
    for a, b, value in zip(first, second, residual, strict=True):
        cells.setdefault((a, b), []).append(value)
    squares = sum(len(cell) * np.mean(cell) ** 2 for cell in cells.values())
    freedom = len(cells) - len(set(first)) - len(set(second)) + 1
    if noise is None:
        left = (residual**2).sum() - squares
        noise = left / (len(y) - np.linalg.matrix_rank(matrix) - freedom)
    return max(0.0, squares - freedom * noise) / len(y) / y.var()


SAME, THIRDS, HALVES = [0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 1, 1]


def random_codes(levels, n):
    return np.random.default_rng(1).integers(0, levels, (n, len(levels)))


@pytest.mark.parametrize(
    ("codes", "merged"),
    [
        # Of 64 configurations, 4 for each of 16 cells, four levels stay; of 40, three; of 24, two.
        (random_codes([4, 4, 4], 64), [SAME, SAME]),
        (random_codes([4, 2, 4], 64), [SAME, SAME]),
        (random_codes([2, 4, 4], 64), [SAME, SAME]),
        (random_codes([4, 4, 4], 40), [THIRDS, THIRDS]),
        (random_codes([4, 3, 2], 36), [THIRDS, SAME]),
        (random_codes([4, 4, 4], 24), [HALVES, HALVES]),
        (random_codes([4, 2], 12), [HALVES, SAME]),
    ],
)
def test_pairs_are_the_means_of_cells_less_their_noise(codes, merged):
    high = codes > codes.max(axis=0) / 2
    y = 2.0 * codes[:, 0] + 9.0 * high[:, 0] * high[:, 1]
    y = y + 0.5 * np.random.default_rng(0).standard_normal(len(y))
    found = stats.importance(codes, y[:, None], halves=0).pairs
    assert found[0, 1] == found[1, 0] == pytest.approx(pair_share(codes, y, merged), abs=1e-9)
    assert found[0, 1] > 0.01 and found[0, 0] == 0.0


def test_pairs_of_a_grid_lose_the_noise_of_the_seeds():
    codes = grid(4, 4, 4)
    y = 3.0 * (codes[:, 0] > 1) * (codes[:, 1] > 0)
    y = y + 0.3 * np.random.default_rng(0).standard_normal(64)
    found = stats.importance(codes, [[mean - 0.5, mean + 0.5] for mean in y], halves=0).pairs
    assert found[0, 1] == pytest.approx(pair_share(codes, y, [SAME, SAME], noise=0.25))
    assert found[0, 1] > 0.1


def test_a_pair_finer_than_the_merged_cells_is_not_seen():
    codes = grid(4, 4)  # 16 configurations, so that two levels each are one
    coarse = stats.importance(codes, [[float((a > 1) == (b > 1))] * 2 for a, b in codes]).pairs
    fine = stats.importance(codes, [[float(a % 2 == b % 2)] * 2 for a, b in codes]).pairs
    np.testing.assert_allclose([coarse[0, 1], fine[0, 1]], [1.0, 0.0], atol=1e-12)


def test_a_pair_without_a_degree_of_freedom_left_is_not_known():
    y = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    found = stats.importance(grid(2, 2), y[:4, None])
    np.testing.assert_array_equal(found.pairs, 0.0)
    # One configuration twice leaves one degree, and it agrees with itself: no noise at all.
    codes = np.concatenate([grid(2, 2), [[0, 0]]])
    found = stats.importance(codes, y[:, None])
    assert found.pairs[0, 1] == pytest.approx(pair_share(codes, y, [SAME, SAME])) != 0.0


def test_a_confounded_design_gives_credit_where_it_is_due():
    # The second hyperparameter follows the first in 80% of the configurations but does nothing.
    generator = np.random.default_rng(0)
    first = generator.integers(0, 4, 400)
    second = np.where(generator.random(400) < 0.8, first, generator.integers(0, 4, 400))
    y = 3.0 * first + 0.5 * generator.standard_normal(400)
    found = stats.importance(np.stack([first, second], axis=1), list(y[:, None]))
    assert found.main[0] > 0.9 and found.main[1] < 0.01


def test_equal_scores_have_no_importance():
    found = stats.importance(grid(2, 2), [[5.0, 5.0]] * 4)
    np.testing.assert_array_equal(found.main, 0.0)
    assert found.noise == 0.0 and np.isfinite(found.pairs).all()


def test_one_seed_in_a_small_grid_gives_no_interval():
    found = stats.importance(grid(2, 2), [[1.0], [2.0], [3.0], [4.0]])
    assert np.isnan(found.low).all() and np.isnan(found.noise)


# ------------------------------------------------------------------------- several environments


def test_percentile_normalisation_by_hand():
    scores = np.arange(101.0)[None] * 3 - 7
    found = stats.percentile_normalized(np.concatenate([scores, np.full((1, 101), 4.0)]))
    assert found[0, 5] == pytest.approx(0.0) and found[0, 95] == pytest.approx(1.0)
    assert found[0, 50] == pytest.approx(0.5)
    np.testing.assert_array_equal(found[1], 0.0)


def test_sensitivity_by_hand():
    # Tuned: (1.0 + 0.9) / 2; the best common setting is the last: (0.7 + 0.8) / 2.
    found = stats.sensitivity([[1.0, 0.2, 0.7], [0.1, 0.9, 0.8]])
    assert found.value == pytest.approx(0.95 - 0.75)
    assert (found.best.tolist(), found.best_cross) == ([0, 1], 2)
    # One setting that is best everywhere: nothing to gain.
    assert stats.sensitivity([[1.0, 0.2], [0.9, 0.1]]).value == 0.0


def test_effective_dimensionality_by_hand():
    # The first has to be tuned per environment, the second must be 1 everywhere.
    codes = grid(2, 2)
    gamma = np.array([[0.5, 1.0, 0.0, 0.2], [0.0, 0.2, 0.4, 0.9]])
    found = stats.effective_dimensionality(gamma, codes)
    # h* is (0, 1), on average 0.6; tuning the first: (1.0 + 0.9) / 2, the second: (1.0 + 0.2) / 2.
    np.testing.assert_allclose(found.scores, [0.6, 0.95, 0.95])
    assert found.effective == 1 and found.subsets[1] == (0,)
    common = stats.effective_dimensionality([[0.0, 1.0], [0.1, 0.9]], [[0], [1]])
    assert common.effective == 0


def test_effective_dimensionality_at_the_bound():
    # In common 3.6 + 1.91 = 5.51, tuned 3.6 + 2.2 = 5.8, of which 5.51 is exactly 95%, but the
    # product in floating point is above it.
    gamma, codes = [[3.6, 0.0], [1.91, 2.2]], [[0], [1]]
    assert (3.6 + 1.91) / 2 < 0.95 * ((3.6 + 2.2) / 2)
    assert stats.effective_dimensionality(gamma, codes).effective == 0
    less = [[3.6, 0.0], [1.9099, 2.2]]
    assert stats.effective_dimensionality(less, codes).effective == 1
    assert stats.effective_dimensionality(less, codes, enough=0.9).effective == 0
    # 95% of a negative score is more than is there: all have to be tuned.
    assert stats.effective_dimensionality([[-1.0, -2.0], [-2.0, -1.0]], codes).effective == 1


def test_effective_dimensionality_of_three():
    # The first environment needs the second value of two hyperparameters at once.
    codes = grid(2, 2, 2)
    gamma = np.zeros((2, 8))
    gamma[0, [0, 3, 5]] = 0.2, 1.0, 0.5  # (0, 0, 0), (0, 1, 1), (1, 0, 1)
    gamma[1, [0, 4]] = 1.0, 0.9
    found = stats.effective_dimensionality(gamma, codes)
    np.testing.assert_allclose(found.scores, [0.6, 0.6, 1.0, 1.0])
    assert found.effective == 2 and found.subsets == ((), (0,), (1, 2), (0, 1, 2))
