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
    np.testing.assert_array_equal(filled, [10, 10, 10, 300])


def test_a_low_score_measured_on_a_diverged_run_is_the_worst_one():
    # All healthy runs are perfect: "the worst healthy score" would reward diverging.
    filled = stats.worst_filled([500.0, 500.0, 9.3, np.inf], [False, False, True, True])
    np.testing.assert_array_equal(filled, [500, 500, 9.3, 9.3])


def test_an_unmarked_score_that_is_not_finite_counts_as_diverged():
    np.testing.assert_array_equal(stats.worst_filled([1.0, np.nan, -np.inf], [False] * 3), [1] * 3)


def test_no_finite_score_at_all():
    assert (stats.worst_filled([np.nan, np.nan], [True, True]) == -np.inf).all()
    assert stats.worst_filled([], []).shape == (0,)
