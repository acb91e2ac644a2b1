"""Groups of completions with right and wrong answers: what their normalisers optimise, listed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.kernels import preference, verification

pytestmark = pytest.mark.fast


def expected_gradient(probability, group_size, advantages):
    """Mean of 1/G Σ A_i ∇ log π(y_i), in the logit of "right", over all groups of right and wrong.

    For one logit, the score of a right answer is 1 − p, and that of a wrong one −p.
    """
    right = np.array(list(itertools.product((0.0, 1.0), repeat=group_size)))  # [groups, G]
    chance = np.prod(np.where(right > 0, probability, 1.0 - probability), 1)
    advantage = np.asarray(advantages(jnp.asarray(right)))
    return float(chance @ np.mean(advantage * (right - probability), 1))


def slope(probability, objective):
    """d objective(p) / d logit."""
    of_logit = lambda x: objective(jax.nn.sigmoid(x))  # noqa: E731
    return float(jax.grad(of_logit)(jnp.log(probability / (1.0 - probability))))


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_leave_one_out_has_the_gradient_of_the_share_of_right_answers(probability, group_size):
    true = slope(probability, lambda p: p)
    assert expected_gradient(probability, group_size, preference.leave_one_out) == pytest.approx(
        true, rel=1e-12
    )
    own = lambda reward: preference.group_advantages(reward, "none")  # noqa: E731
    included = expected_gradient(probability, group_size, own)
    assert included == pytest.approx((group_size - 1) / group_size * true, rel=1e-12)


def test_a_large_group_with_its_standard_deviation_climbs_the_arcsine():
    for probability in (0.05, 0.3, 0.8):
        std = np.sqrt(probability * (1.0 - probability))
        known = slope(probability, lambda p: p) / std  # the expectation of infinitely many
        arcsine = slope(probability, lambda p: 2.0 * jnp.arcsin(jnp.sqrt(p)))
        assert known == pytest.approx(arcsine, rel=1e-12)
        errors = [
            abs(expected_gradient(probability, g, preference.group_advantages) - arcsine)
            for g in (4, 8, 14)
        ]
        assert errors[0] > errors[1] > errors[2]
    weights = [1.0 / np.sqrt(p * (1.0 - p)) for p in (0.5, 0.01)]
    assert weights[1] > 5.0 * weights[0]


def test_a_pair_with_its_standard_deviation_sees_only_the_sign():
    for probability in (0.05, 0.3, 0.8):
        found = expected_gradient(
            probability, 2, lambda r: preference.group_advantages(r, "group", 0.0)
        )
        # A_i = ±1/√2 whenever the answers differ, which happens with probability 2 p (1 − p).
        assert found == pytest.approx(np.sqrt(0.5) * probability * (1.0 - probability), rel=1e-12)


def test_a_mean_over_own_tokens_prefers_short_right_and_long_wrong_answers():
    """Push on the probability of each completion: right or wrong, of 1 or of 4 tokens."""
    length = np.array([1.0, 4.0, 1.0, 4.0])
    right = np.array([1.0, 1.0, 0.0, 0.0])
    advantage = right - 0.5  # four equally likely completions
    own, constant = advantage / length, advantage / 4.0
    # The gradient of a logit of a completion is π(y) (a(y) − Σ π a).
    push = lambda a: 0.25 * (a - a.mean())  # noqa: E731
    assert push(own)[0] > push(own)[1] > 0 > push(own)[3] > push(own)[2]
    assert push(constant)[0] == push(constant)[1] and push(constant)[2] == push(constant)[3]


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_the_divergence_of_the_best_of_n_is_at_most_its_bound(n):
    bound = np.log(n) - (n - 1) / n
    for count in (2, 1000):
        log_ref = jnp.full(count, -jnp.log(count))
        log_p = verification.best_of_n_log_prob(log_ref, jnp.arange(1.0 * count), n)
        kl = float((jnp.exp(log_p) * (log_p - log_ref)).sum())
        assert kl <= bound + 1e-9
    assert kl == pytest.approx(bound, abs=0.02)
