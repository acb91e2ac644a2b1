import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from purejaxpg import InputError
from purejaxpg.sweep import stats

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
    with pytest.raises(InputError, match="0 values"):
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


@pytest.mark.parametrize("scores", [[], [[1.0], []], np.zeros((3, 0))])
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


# ------------------------------------------------------------------------------------- comparisons


def test_the_probability_of_improvement_by_hand():
    # 2 > 1, 2 = 2, 2 < 3 and 5 > 1, 2, 3: (1 + 1/2 + 0 + 3) / 6.
    assert stats.probability_of_improvement([[2.0, 5.0]], [[1.0, 2.0, 3.0]]) == 4.5 / 6
    assert stats.probability_of_improvement([[1.0]], [[1.0]]) == 0.5
    # Environments count equally, whatever their runs.
    assert stats.probability_of_improvement([[2.0], [0.0, 0, 0]], [[1.0], [1.0, 1]]) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_probability_of_improvement_is_mann_whitneys(seed):
    generator = np.random.default_rng(seed)
    x, y = generator.integers(0, 6, 7).astype(float), generator.integers(0, 6, 9).astype(float)
    expected = scipy_stats.mannwhitneyu(x, y).statistic / (7 * 9)
    assert stats.probability_of_improvement([x], [y]) == pytest.approx(expected)


def test_the_interval_of_the_improvement():
    x, y = [np.arange(10.0)], [np.arange(10.0) + 1.0]
    low, high = stats.improvement_ci(x, y)
    assert 0.0 < low < stats.probability_of_improvement(x, y) < high < 1.0
    assert stats.improvement_ci([[3.0, 4.0]], [[1.0, 2.0]]) == (1.0, 1.0)
    assert stats.improvement_ci(x, y) == (low, high)  # the seed decides


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
def test_the_wilson_interval_is_scipys(failures, runs):
    expected = scipy_stats.binomtest(failures, runs).proportion_ci(method="wilson")
    found = stats.wilson_interval(failures, runs)
    np.testing.assert_allclose(found, [expected.low, expected.high], atol=1e-12)


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
    for trial in range(100):
        generator = np.random.default_rng(trial)
        codes = grid(4, 3) if seeds else generator.integers(0, [4, 3], (120, 2))
        y = (first[codes[:, 0]] + second[codes[:, 1]])[:, None]
        scores = y + generator.standard_normal((len(y), seeds or 1))
        found = stats.importance(codes, list(scores), halves=60, seed=trial)
        inside.append((found.low <= truth) & (truth <= found.high))
    assert (np.mean(inside, axis=0) >= 0.85).all()


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
