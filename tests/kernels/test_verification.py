import doctest
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.kernels import verification

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def strict_shapes():
    with jax.numpy_rank_promotion("raise"):
        yield


def test_docstrings():
    assert doctest.testmod(verification).failed == 0


# --- pass@k --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(5, 1), (5, 3), (5, 5), (16, 4)])
def test_pass_at_k_is_the_share_of_sets_with_a_right_sample(n, k):
    right = np.arange(n + 1)
    expected = [1 - math.comb(n - c, k) / math.comb(n, k) for c in right]
    actual = verification.pass_at_k(jnp.asarray(right), n, k)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    if n == 5:
        sets = list(itertools.combinations(range(n), k))
        counted = [sum(min(s) < c for s in sets) / len(sets) for c in right]
        np.testing.assert_allclose(expected, counted)
    assert k > 1 or np.asarray(actual) == pytest.approx(right / n)


def test_pass_at_k_is_unbiased_and_the_obvious_estimate_is_not():
    n, k, p = 8, 3, 0.2
    right = np.arange(n + 1)
    weight = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in right])
    actual = np.asarray(verification.pass_at_k(jnp.asarray(right), n, k))
    assert (weight * actual).sum() == pytest.approx(1 - (1 - p) ** k, abs=1e-6)
    assert (weight * (1 - (1 - right / n) ** k)).sum() < 1 - (1 - p) ** k - 0.02


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_as_many_samples(k):
    with pytest.raises(ValueError, match=f"k is {k}; it must be from 1 to .* 4"):
        verification.pass_at_k(jnp.array([1]), 4, k)


# --- the best of n -------------------------------------------------------------------------------


def chances(prob, reward, n):
    """Probability of each completion to be the best of n, by listing all draws; ties at random."""
    total = np.zeros(len(prob))
    for draw in itertools.product(range(len(prob)), repeat=n):
        best = [i for i in draw if reward[i] == max(reward[j] for j in draw)]
        for i in best:
            total[i] += np.prod(prob[list(draw)]) / len(best)
    return total


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_what_listing_all_draws_gives(n, ties):
    draw = np.random.default_rng(n)
    prob = draw.dirichlet(np.ones(5), size=2)
    reward = draw.integers(0, 3, (2, 5)) if ties else draw.normal(size=(2, 5))
    with jax.enable_x64(True):
        actual = verification.best_of_n_log_prob(jnp.log(prob), jnp.asarray(reward, float), n)
        expected = [chances(p, r, n) for p, r in zip(prob, reward, strict=True)]
        np.testing.assert_allclose(np.exp(actual), expected, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_best_of_a_part_of_all_samples_is_the_mean_over_all_parts(n):
    draw = np.random.default_rng(n)
    value, reward = draw.normal(size=(2, 4, 6))
    expected = [
        np.mean([v[max(part, key=r.__getitem__)] for part in itertools.combinations(range(6), n)])
        for v, r in zip(value, reward, strict=True)
    ]
    actual = verification.best_of_n(jnp.asarray(value), jnp.asarray(reward), n)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("n", [0, 5])
def test_the_best_of_n_needs_as_many_samples(n):
    with pytest.raises(ValueError, match=f"n is {n}; it must be from 1 to .* 4"):
        verification.best_of_n(jnp.ones(4), jnp.ones(4), n)


def test_best_of_many_is_finite_in_single_precision():
    log_prob = jnp.log(jnp.array([0.6, 0.2, 0.2]))
    many = verification.best_of_n_log_prob(log_prob, jnp.array([0.0, 1.0, 2.0]), 1000)
    # log 0.6^1000, log(0.8^1000 − 0.6^1000) and log(1 − 0.8^1000)
    expected = [1000 * math.log(0.6), 1000 * math.log(0.8), 0.0]
    np.testing.assert_allclose(many, expected, rtol=1e-5, atol=1e-6)


def test_what_the_reference_never_says_is_never_the_best():
    log_prob = jnp.log(jnp.array([0.0, 0.5, 0.0, 0.5]))
    best = verification.best_of_n_log_prob(log_prob, jnp.array([9.0, 1.0, -9.0, 2.0]), 3)
    np.testing.assert_allclose(jnp.exp(best), [0, 0.125, 0, 0.875], atol=1e-6)


# --- steps ---------------------------------------------------------------------------------------


def some_steps():
    draw = np.random.default_rng(0)
    ends = draw.random((200, 6)) < 0.5
    ends[:, -1] |= ~ends.any(1)
    right = ends & (draw.random((200, 6)) < 0.7)
    return ends, right, draw.normal(size=(200, 6))


def test_labels_count_up_to_the_first_mistake():
    ends, right, _ = some_steps()
    actual = np.asarray(verification.until_mistake(ends, right))
    for row in range(len(ends)):
        steps = np.flatnonzero(ends[row])
        mistakes = [i for i, t in enumerate(steps) if not right[row, t]]
        kept = steps[: mistakes[0] + 1] if mistakes else steps
        assert np.flatnonzero(actual[row]).tolist() == kept.tolist()


@pytest.mark.parametrize(
    ("aggregation", "of"),
    [("product", np.prod), ("minimum", np.min), ("last", lambda p: p[-1])],
)
def test_reward_of_steps_is_the_loop(aggregation, of):
    ends, _, logit = some_steps()
    outside = jnp.where(ends, logit, jnp.nan)
    actual = verification.step_reward(outside, ends, aggregation)
    expected = [of(1 / (1 + np.exp(-x[e]))) for x, e in zip(logit, ends, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    slope = jax.grad(lambda x: verification.step_reward(x, ends, aggregation).sum())(outside)
    assert np.isfinite(slope).all() and (np.asarray(slope)[~ends] == 0).all()


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match='aggregation is "mean"; it must be "product"'):
        verification.step_reward(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), "mean")
