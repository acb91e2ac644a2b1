"""Where the losses of pairs end, by enumeration of all pairs of completions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerable import (
    ALL_MASK,
    BETA,
    LOGITS,
    REFERENCE,
    REWARD,
    ROWS,
    N,
    X,
    logits_of,
    of_pairs,
    sequences,
    token_log_probs,
)
from scipy import optimize

from purejaxpg.kernels import preference
from purejaxpg.rlhf import dpo

WINS = 1.0 / (1.0 + np.exp(REWARD[:, None] - REWARD[:, :, None]))  # of a row against a column


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def reference():
    return token_log_probs(REFERENCE)


def loss(flat, config, wins):
    """Loss of all pairs of completions by the reference, of which the first wins so often."""
    log_ref = reference()
    mu = jnp.exp(sequences(log_ref))
    weight = of_pairs(mu[:, :, None] * mu[:, None] * wins)
    batch = dpo.Batch(None, None, ALL_MASK[ROWS], log_ref[ROWS], weight)
    log_prob = token_log_probs(flat.reshape(REFERENCE.shape))
    return dpo.objective(log_prob[ROWS], batch, config)


@pytest.fixture(scope="module")
def value_and_slope():
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def minimum(value_and_slope, config, wins=WINS, steps=1000):
    """Log-probabilities of the completions [X, N], and metrics, where the loss is least."""

    def of(flat):
        (value, _), slope = value_and_slope(flat, config, wins)
        return float(value), np.asarray(slope)

    found = optimize.minimize(
        of, REFERENCE.ravel(), jac=True, method="L-BFGS-B", tol=1e-18,
        options={"maxiter": steps, "gtol": 1e-13, "maxfun": 10**5, "maxcor": 50},
    )  # fmt: skip
    log_p = sequences(token_log_probs(found.x.reshape(REFERENCE.shape)))
    return np.asarray(log_p), value_and_slope(found.x, config, wins)[0][1]


def divergence(log_p, log_q):
    return float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


def test_dpo_starts_at_log_two_and_ends_at_the_optimal_policy(value_and_slope):
    config = dpo.Config(beta=BETA)
    (start, metrics), _ = value_and_slope(REFERENCE.ravel(), config, WINS)
    assert start == pytest.approx(math.log(2), abs=1e-12)
    assert abs(metrics["reward/margin"]) < 1e-12
    optimal = preference.optimal_log_prob(sequences(reference()), REWARD, BETA)
    log_p, metrics = minimum(value_and_slope, config)
    assert divergence(log_p, optimal) < 1e-10
    assert metrics["reward/margin"] > 0 > metrics["policy/rejected_log_ratio"]


def test_label_smoothing_ends_where_smoothed_labels_are_right(value_and_slope):
    log_p, _ = minimum(value_and_slope, dpo.Config(beta=BETA, label_smoothing=0.2))
    log_ref = np.asarray(sequences(reference()))
    reward = BETA * (log_p - log_ref)
    believed = 1.0 / (1.0 + np.exp(reward[:, None] - reward[:, :, None]))
    mu = np.exp(log_ref)[:, None]
    share = lambda wins: (mu * wins).sum(2)  # noqa: E731
    smoothed = 0.8 * WINS + 0.2 * (1.0 - WINS)
    np.testing.assert_allclose(share(believed), share(smoothed), atol=1e-5)
    assert np.abs(share(smoothed) - share(WINS)).max() > 0.05
    optimal = preference.optimal_log_prob(log_ref, REWARD, BETA)
    assert divergence(log_p, optimal) > 0.01


def test_labels_without_contradiction_have_no_finite_optimum(value_and_slope):
    always = 1.0 * (REWARD[:, :, None] > REWARD[:, None])
    config = dpo.Config(beta=BETA)
    ends = [minimum(value_and_slope, config, always, steps)[1] for steps in (10, 40, 160)]
    losses, margins = ([float(m[k]) for m in ends] for k in ("loss/preference", "reward/margin"))
    assert losses[0] > losses[1] > losses[2] and 2.0 < margins[0] < margins[1] < margins[2]
    # Smoothing gives them one, where the loss is stationary.
    config = dpo.Config(beta=BETA, label_smoothing=0.2)
    few, many = (minimum(value_and_slope, config, always, steps)[0] for steps in (300, 600))
    assert divergence(many, few) < 1e-8


def test_ipo_ends_at_the_probability_of_beating_the_reference(value_and_slope):
    log_ref = sequences(reference())
    beats = (jnp.exp(log_ref)[:, None] * WINS).sum(2)
    target = jax.nn.log_softmax(log_ref + beats / BETA)
    log_p, _ = minimum(value_and_slope, dpo.Config(loss="ipo", beta=BETA))
    assert divergence(log_p, target) < 1e-10


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_the_gradient_is_that_of_the_formula(value_and_slope, name):
    config = dpo.Config(loss=name, beta=2.0, simpo_margin=0.3, orpo_lambda=0.4)
    (value, _), slope = value_and_slope(LOGITS.ravel(), config, WINS)

    def formula(flat):
        log_p = sequences(token_log_probs(flat.reshape(REFERENCE.shape)))
        mean = log_p / ALL_MASK.sum(1).reshape(X, N)
        mu = jnp.exp(sequences(reference()))
        weight = jnp.where(jnp.eye(N, dtype=bool), 0.0, mu[:, :, None] * mu[:, None] * WINS)
        chosen, rejected = mean[:, :, None], mean[:, None]
        odds = jnp.exp(mean) / (1.0 - jnp.exp(mean))
        if name == "simpo":
            each = jnp.log1p(jnp.exp(0.3 - 2.0 * (chosen - rejected)))
        else:
            each = 0.4 * jnp.log1p(odds[:, None] / odds[:, :, None]) - chosen
        return (weight * each).sum() / weight.sum()

    expected = jax.jit(jax.value_and_grad(formula))(LOGITS.ravel())
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    np.testing.assert_allclose(slope, expected[1], atol=1e-12)


def test_a_table_of_logits_has_the_probabilities_that_it_is_made_from():
    log_p = sequences(token_log_probs(LOGITS))
    np.testing.assert_allclose(sequences(token_log_probs(logits_of(log_p))), log_p, atol=1e-12)
