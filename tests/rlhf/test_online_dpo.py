"""Online DPO, by enumeration of all pairs of completions that the policy may write."""

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
    ROWS,
    logits_of,
    of_pairs,
    relative,
    sequences,
    token_log_probs,
)
from jax import lax

from purejaxpg.kernels import preference
from purejaxpg.rlhf import online_dpo

WINS = 1.0 / (1.0 + np.exp(REWARD[:, None] - REWARD[:, :, None]))  # of a row against a column


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def loss(logits, config):
    """Loss of all pairs that the policy may write, as probable as they are."""
    log_ref, log_prob = (token_log_probs(x) for x in (REFERENCE, logits))
    pi = jnp.exp(lax.stop_gradient(sequences(log_prob)))
    pairs, wins = of_pairs(pi[:, :, None] * pi[:, None]), of_pairs(WINS)
    if config.labels == "sampled":
        wins, pairs = jnp.ones_like(wins), pairs * wins
    batch = online_dpo.Batch(None, None, ALL_MASK[ROWS], log_ref[ROWS], wins, pairs)
    return online_dpo.objective(log_prob[ROWS], batch, config)[0]


def slope(logits, **changed):
    config = online_dpo.Config(beta=BETA, **changed)
    return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(logits), config))


def optimal():
    return preference.optimal_log_prob(sequences(token_log_probs(REFERENCE)), REWARD, BETA)


def test_exact_steps_end_at_the_optimal_policy():
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 1000))
    config = online_dpo.Config(beta=BETA)

    def step(carry, _):
        logits, state = carry
        change, state = optimizer.update(jax.grad(loss)(logits, config), state)
        return (optax.apply_updates(logits, change), state), None

    start = jnp.asarray(REFERENCE)
    run = jax.jit(lambda carry: lax.scan(step, carry, length=1000)[0])
    log_p = sequences(token_log_probs(run((start, optimizer.init(start)))[0]))
    assert (jnp.exp(log_p) * (log_p - optimal())).sum(1).mean() < 1e-3


def test_drawn_labels_and_their_probabilities_have_the_same_expected_gradient():
    drawn, expected = (slope(LOGITS, labels=labels) for labels in ("sampled", "expected"))
    assert relative(drawn, expected) < 1e-12 and np.linalg.norm(drawn) > 1e-3
    at_optimum = slope(logits_of(optimal()), labels="expected")
    assert np.abs(at_optimum).max() < 1e-12


def test_ipo_ends_where_the_policy_is_tilted_by_the_probability_of_beating_itself():
    log_ref = np.asarray(sequences(token_log_probs(REFERENCE)))
    log_p = log_ref
    for _ in range(200):
        log_p = log_ref + (np.exp(log_p)[:, None] * WINS).sum(2) / BETA
        log_p = log_p - np.log(np.exp(log_p).sum(1, keepdims=True))
    assert np.abs(slope(logits_of(log_p), loss="ipo")).max() < 1e-12
    assert np.abs(slope(REFERENCE, loss="ipo")).max() > 1e-3


def test_ties_have_no_effect():
    mask, labels = np.ones((4, 2), bool), jnp.ones(2)
    log_prob = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    config = online_dpo.Config(beta=BETA)

    def of(log_prob, weight):
        batch = online_dpo.Batch(None, None, mask, jnp.zeros((4, 2)), labels, weight)
        return online_dpo.objective(log_prob, batch, config)[0]

    gradient = jax.grad(of)(log_prob, jnp.array([1.0, 0.0]))
    assert (gradient[1::2] == 0).all() and (gradient[::2] != 0).all()
    alone = preference.dpo(*jnp.split(log_prob[::2].sum(1), 2), BETA)[0]
    assert float(of(log_prob, jnp.array([1.0, 0.0]))) == pytest.approx(float(alone), rel=1e-12)
    nothing = jax.grad(of)(log_prob, jnp.zeros(2))
    assert of(log_prob, jnp.zeros(2)) == 0 and (nothing == 0).all()
