"""The gradient of DPO, what it leaves free, and when the chosen completion becomes less likely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.kernels import preference

pytestmark = pytest.mark.fast

BETA = 0.7
FEATURES = np.array([[1.0, 0.2], [0.4, -0.3], [3.0, 0.1], [2.0, 1.0]])  # of four completions
REFERENCE = np.log([0.4, 0.3, 0.2, 0.1])
CHOSEN, REJECTED = 0, 1


def log_policy(theta):
    """Log-probabilities [4] of completions whose logits are linear in their features."""
    return jax.nn.log_softmax(REFERENCE + FEATURES @ theta)


def loss(theta, chosen=CHOSEN, rejected=REJECTED):
    ratio = log_policy(theta) - REFERENCE
    return preference.dpo(ratio[chosen, None], ratio[rejected, None], BETA)[0]


@pytest.mark.parametrize("theta", [(0.0, 0.0), (0.3, -0.8), (-1.0, 2.0)])
def test_the_gradient_weights_the_difference_of_scores_by_the_surprise(theta):
    theta = jnp.array(theta)
    reward = BETA * (log_policy(theta) - REFERENCE)
    surprise = jax.nn.sigmoid(reward[REJECTED] - reward[CHOSEN])
    score = jax.jacobian(log_policy)(theta)
    expected = -BETA * surprise * (score[CHOSEN] - score[REJECTED])
    np.testing.assert_allclose(jax.grad(loss)(theta), expected, rtol=1e-12)


def change_of_the_chosen(features):
    """How log π(chosen) begins to move along the descent of the loss."""

    def log_prob(theta):
        return jax.nn.log_softmax(REFERENCE + features @ theta)

    def own_loss(theta):
        ratio = log_prob(theta) - REFERENCE
        return preference.dpo(ratio[CHOSEN, None], ratio[REJECTED, None], BETA)[0]

    start = jnp.zeros(features.shape[1])
    return float(-jax.jacobian(log_prob)(start)[CHOSEN] @ jax.grad(own_loss)(start))


def test_shared_features_can_make_the_chosen_completion_less_likely():
    assert change_of_the_chosen(FEATURES) < -1e-3  # probability goes to the third, like the first
    assert change_of_the_chosen(jnp.eye(4)) > 1e-3  # a logit for each completion: it rises


def test_what_no_pair_connects_is_left_free():
    """Pairs compare completions 0 and 1, and 2 and 3; nothing compares the two couples."""

    def total(log_p, pairs):
        ratio = log_p - REFERENCE
        chosen, rejected = (ratio[jnp.array(i)] for i in zip(*pairs, strict=True))
        return float(preference.dpo(chosen, rejected, BETA).sum())

    log_p = log_policy(jnp.array([0.3, -0.8]))
    moved = jax.nn.log_softmax(log_p + jnp.array([2.0, 2.0, 0.0, 0.0]))
    apart, connected = [(0, 1), (2, 3)], [(0, 1), (2, 3), (1, 2)]
    assert total(moved, apart) == pytest.approx(total(log_p, apart), rel=1e-12)
    assert abs(total(moved, connected) - total(log_p, connected)) > 0.1
    assert float(jnp.abs(jnp.exp(moved) - jnp.exp(log_p)).max()) > 0.1


def test_squared_margins_of_drawn_labels_end_where_probabilities_do():
    """IPO: a label's square has the minimum of the square of the difference of probabilities."""
    draw = np.random.default_rng(0)
    reward = draw.normal(size=4)
    wins = np.asarray(
        preference.preference_probability(*np.meshgrid(reward, reward, indexing="ij"))
    )
    mu = np.exp(REFERENCE)
    beats = wins @ mu

    def population(f):
        each = preference.ipo(
            jnp.broadcast_to(f[:, None], (4, 4)), jnp.broadcast_to(f, (4, 4)), BETA
        )
        return (mu[:, None] * mu * wins * each).sum()

    slope = jax.grad(population)
    np.testing.assert_allclose(slope(jnp.asarray(beats / BETA)), 0.0, atol=1e-12)
    assert float(jnp.abs(slope(jnp.asarray(reward / BETA))).max()) > 0.01
