"""What KTO learns from labels of single completions, by enumeration of all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from enumerable import (
    ALL_MASK,
    BETA,
    LOGITS,
    REFERENCE,
    REWARD,
    X,
    sequences,
    token_log_probs,
)
from jax import lax

from purejaxpg.rlhf import kto


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def share():
    """How many labels of each completion [X, N] are good: half of them at the mean reward."""
    with jax.enable_x64(True):
        mu = np.exp(np.asarray(sequences(token_log_probs(REFERENCE))))
    return 1.0 / (1.0 + np.exp((mu * REWARD).sum(1, keepdims=True) - REWARD))


def loss(log_prob, config, share):
    """Loss of all completions by the reference with both labels, and the exact divergence."""
    log_ref = token_log_probs(REFERENCE)
    log_p, log_q = lax.stop_gradient(sequences(log_prob)), sequences(log_ref)
    kl = (jnp.exp(log_p) * (log_p - log_q)).sum(1).mean()
    good, mu = share.ravel(), jnp.exp(log_q).ravel() / X
    twice = lambda x: jnp.concatenate([x, x])  # noqa: E731
    is_desirable = jnp.arange(2 * len(mu)) < len(mu)
    weight = twice(mu) * jnp.concatenate([good, 1.0 - good])
    mask, ref_log_prob = twice(ALL_MASK), twice(log_ref)
    batch = kto.Batch(None, None, mask, is_desirable, ref_log_prob, kl, weight)
    return kto.objective(twice(log_prob), batch, config)


def test_the_loss_starts_at_a_half_and_its_slope_has_the_sign_of_the_weighted_labels(share):
    start = token_log_probs(REFERENCE)
    slope_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for weights in ((1.0, 1.0), (1.0, 2.5), (0.3, 1.0)):
        config = kto.Config(beta=BETA, desirable_weight=weights[0], undesirable_weight=weights[1])
        (value, metrics), slope = slope_of(start, config, share)
        mu = np.exp(np.asarray(sequences(start)))
        half = (mu * (share * weights[0] + (1.0 - share) * weights[1])).sum(1).mean() / 2
        assert value == pytest.approx(half, abs=1e-12)
        direction = (1.0 - share) * weights[1] - share * weights[0]
        # σ'(0) β = β/4, for each token of a completion
        expected = BETA / 4 * mu / X * direction
        np.testing.assert_allclose(slope[:, 0], expected.ravel(), atol=1e-12)
        assert 0 < metrics["reward/desirable"] < 1 and abs(metrics["policy/mismatched_kl"]) < 1e-12


def test_the_loss_compares_with_the_divergence(share):
    config = kto.Config(beta=BETA, desirable_weight=1.5)
    value, _ = jax.jit(loss)(token_log_probs(LOGITS), config, share)
    log_p, log_q = (np.asarray(sequences(token_log_probs(x))) for x in (LOGITS, REFERENCE))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    above = 1.0 / (1.0 + np.exp(-BETA * (log_p - log_q - kl)))
    expected = np.exp(log_q) * (1.5 * share * (1.0 - above) + (1.0 - share) * above)
    assert kl > 0.1 and float(value) == pytest.approx(expected.sum(1).mean(), rel=1e-12)


def test_all_mass_goes_to_completions_that_are_more_often_good(share):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1000))
    config = kto.Config(beta=BETA)

    def step(carry, _):
        logits, state = carry
        of_logits = lambda logits: loss(token_log_probs(logits), config, share)[0]  # noqa: E731
        change, state = optimizer.update(jax.grad(of_logits)(logits), state)
        return (optax.apply_updates(logits, change), state), None

    start = jnp.asarray(REFERENCE)
    run = jax.jit(lambda carry: lax.scan(step, carry, length=1000)[0])
    logits, _ = run((start, optimizer.init(start)))
    before, after = (np.asarray(sequences(token_log_probs(x))) for x in (REFERENCE, logits))
    mass = [(np.exp(log_p) * (share > 0.5)).sum(1).mean() for log_p in (before, after)]
    assert mass[0] < 0.8 and mass[1] > 0.999
    # Among them, the limit for small beta.
    limit = np.exp(before) * np.maximum(2.0 * share - 1.0, 0.0)
    limit /= limit.sum(1, keepdims=True)
    entropy = (limit * np.log(np.where(limit > 0, limit, 1.0))).sum(1)
    divergences = [(entropy - (limit * log_p).sum(1)).mean() for log_p in (before, after)]
    assert divergences[0] > 0.5 and divergences[1] < 0.02
