"""What GRPO and its variants optimise, by enumeration of all completions, and what TRL computes."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from enumerable import (
    ALL_MASK,
    BETA,
    LOGITS,
    MASK,
    REFERENCE,
    REWARD,
    L,
    N,
    X,
    cosine,
    relative,
    sequences,
    token_log_probs,
    true_gradient,
)
from jax import lax

from purejaxpg.kernels import losses, preference
from purejaxpg.rlhf import grpo

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl_grpo.json"
PAIRS = np.stack(np.meshgrid(np.arange(N), np.arange(N), indexing="ij"), -1).reshape(-1, 2)


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def config_of(**change):
    return grpo.Config(**{"beta": BETA, "group_size": 2, "batch_size": 2, **change})


def batch_of(old, mask, advantage, weight):
    zeros = jnp.zeros_like(old)
    reference = token_log_probs(REFERENCE) if len(old) == X * N else zeros
    return grpo.Batch(None, None, mask, old, reference, advantage, weight)


# --- the expected gradient over all pairs of completions ------------------------------------------


def pair_gradient(config, sampler=LOGITS):
    """The expected gradient at LOGITS of groups of two that another policy may have sampled."""
    old, mu = (token_log_probs(jnp.asarray(x)) for x in (LOGITS, sampler))
    kl = sequences(preference.token_kl(old, token_log_probs(REFERENCE), "k1"))
    stale = losses.truncated_importance(sequences(old), sequences(mu), config.is_cap)

    def loss(logits):
        tokens_of = token_log_probs(logits).reshape(X, N, L)

        def of_pair(log_prob, mask, old, score, kl, stale):
            advantage = grpo.advantages(score, kl, config)
            batch = grpo.Batch(None, None, mask, old, jnp.zeros_like(old), advantage, stale)
            return grpo.objective(log_prob, batch, config)[0]

        def of_prompt(log_prob, old, score, kl, stale, mu):
            rows = (log_prob, MASK, old, score, kl, stale)
            each = jax.vmap(of_pair)(*(jnp.asarray(x)[PAIRS] for x in rows))
            return (jnp.exp(mu)[PAIRS].prod(1) * each).sum()

        prompts = (tokens_of, old.reshape(X, N, L), jnp.asarray(REWARD), kl, stale, sequences(mu))
        return jax.vmap(of_prompt)(*prompts).mean()

    return -np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(LOGITS)))


def test_without_std_it_is_rloo_but_for_a_factor():
    gradient = pair_gradient(config_of())
    assert relative(2 * L * gradient, true_gradient(LOGITS)) < 1e-12


@pytest.mark.parametrize(
    ("change", "most"), [({"scale": "group"}, 0.995), ({"normaliser": "sequence"}, 0.99)]
)
def test_std_and_a_mean_over_own_tokens_change_the_direction(change, most):
    assert cosine(pair_gradient(config_of(**change)), true_gradient(LOGITS)) < most


def test_weights_of_stale_completions_make_their_gradient_that_of_fresh_ones():
    true = true_gradient(LOGITS)
    old_policy = LOGITS + 0.3 * np.random.default_rng(5).normal(size=LOGITS.shape)
    full = pair_gradient(config_of(is_cap=float("inf")), old_policy)
    assert relative(2 * L * full, true) < 1e-12
    for cap in (1.0, 1e-9):  # truncated, and without a weight but for a factor
        assert cosine(pair_gradient(config_of(is_cap=cap), old_policy), true) < 0.999


# --- where exact ascent ends ----------------------------------------------------------------------

BINARY = (REWARD > 0).astype(float)
VARIANTS = {
    "std": (config_of(scale="group", beta=2.0), REWARD),
    "binary": (config_of(scale="group"), BINARY),
    "sequence": (config_of(normaliser="sequence"), REWARD),
    "k2": (config_of(kl_placement="loss", kl_estimator="k2"), REWARD),
    "k3": (config_of(kl_placement="loss", kl_estimator="k3"), REWARD),
}


def standard(reward, probability, scale="group"):
    """Rewards [X, N] less their expectation, and divided by their standard deviation."""
    centred = reward - (probability * reward).sum(1, keepdims=True)
    variance = (probability * centred**2).sum(1, keepdims=True)
    return centred / (jnp.sqrt(variance) + 1e-4) if scale == "group" else centred


def expected_loss(logits, config, reward):
    """The loss of infinitely large groups."""
    log_probs = token_log_probs(logits)
    old = lax.stop_gradient(log_probs)
    probability = jnp.exp(sequences(old))
    advantage = standard(reward, probability, config.scale)
    if config.kl_placement == "reward":
        kl = sequences(old) - sequences(token_log_probs(REFERENCE))
        advantage -= config.beta * standard(kl, probability, "none")
    batch = batch_of(old, ALL_MASK, advantage.ravel(), N * probability.ravel())
    return grpo.objective(log_probs, batch, config)[0]


@pytest.fixture(scope="module")
def ends():
    """Log-probabilities [X, N] where exact ascent ends, by variant."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 2000))

    def loss(logits):
        return sum(expected_loss(logits[name], *VARIANTS[name]) for name in VARIANTS)

    def step(carry, _):
        logits, state = carry
        change, state = optimizer.update(jax.grad(loss)(logits), state)
        return (optax.apply_updates(logits, change), state), None

    with jax.enable_x64(True):
        start = dict.fromkeys(VARIANTS, jnp.asarray(REFERENCE))
        run = jax.jit(lambda carry: lax.scan(step, carry, length=2000)[0])
        logits, _ = run((start, optimizer.init(start)))
        return {name: sequences(token_log_probs(x)) for name, x in logits.items()}


def kl_between(log_p, log_q):
    return float((jnp.exp(log_p) * (log_p - log_q)).sum(1).mean())


def optimum(beta):
    return preference.optimal_log_prob(sequences(token_log_probs(REFERENCE)), REWARD, beta)


def test_show(ends):
    reference = sequences(token_log_probs(REFERENCE))
    p = jnp.exp(ends["std"])
    centred = REWARD - (p * REWARD).sum(1, keepdims=True)
    std = jnp.sqrt((p * centred**2).sum(1, keepdims=True)) + 1e-4
    own = preference.optimal_log_prob(reference, REWARD / std, 2.0)
    print("std own", kl_between(ends["std"], own), "pi*", kl_between(ends["std"], optimum(2.0)))
    print("binary", (jnp.exp(ends["binary"]) * BINARY).sum(1), jnp.exp(preference.optimal_log_prob(reference, BINARY, BETA) ) .__mul__(BINARY).sum(1))
    for name in ("sequence", "k2", "k3"):
        print(name, kl_between(ends[name], optimum(BETA)))
    print([cosine(pair_gradient(config_of(**c)), true_gradient(LOGITS)) for c in ({"scale": "group"}, {"normaliser": "sequence"}, {"scale":"batch"})])
    old_policy = LOGITS + 0.3 * np.random.default_rng(5).normal(size=LOGITS.shape)
    print([cosine(pair_gradient(config_of(is_cap=c),old_policy), true_gradient(LOGITS)) for c in (2., 1.,1e-9)])
