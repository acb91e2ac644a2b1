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


def test_with_std_it_ends_at_its_own_fixed_point(ends):
    probability = jnp.exp(ends["std"])
    centred = REWARD - (probability * REWARD).sum(1, keepdims=True)
    std = jnp.sqrt((probability * centred**2).sum(1, keepdims=True)) + 1e-4
    reference = sequences(token_log_probs(REFERENCE))
    fixed = preference.optimal_log_prob(reference, REWARD / std, 2.0)
    assert kl_between(ends["std"], fixed) < 1e-8
    assert kl_between(ends["std"], optimum(2.0)) > 1e-3


def test_with_std_and_a_small_beta_it_becomes_deterministic(ends):
    best = preference.optimal_log_prob(sequences(token_log_probs(REFERENCE)), BINARY, BETA)
    assert (jnp.exp(ends["binary"]) * BINARY).sum(1).min() > 0.999
    assert (jnp.exp(best) * BINARY).sum(1).min() < 0.7


def test_a_mean_over_own_tokens_is_another_way_to_the_same_end(ends):
    assert kl_between(ends["sequence"], optimum(BETA)) < 1e-4


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_divergence_in_the_loss_misses_the_optimum(ends, estimator):
    assert kl_between(ends[estimator], optimum(BETA)) > 0.01


# --- the loss, completion by completion -----------------------------------------------------------


def slopes(config, log_prob=None, seed=4):
    """The gradient of the loss of some completions in their log-probabilities [X*N, L]."""
    old = token_log_probs(jnp.asarray(LOGITS))
    draw = np.random.default_rng(seed)
    batch = batch_of(old, ALL_MASK, jnp.asarray(draw.normal(size=X * N)), jnp.ones(X * N))
    return jax.grad(lambda x: grpo.objective(x, batch, config)[0])(
        old if log_prob is None else log_prob
    )


IN_LOSS = {"kl_placement": "loss", "kl_estimator": "k3"}


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ({"ratio": "sequence"}, {}),
        ({"surrogate": "cispo"}, {}),
        ({"kl_placement": "loss", "kl_estimator": "k2"}, {**IN_LOSS, "kl_times_ratio": True}),
    ],
    ids=str,
)
def test_equal_gradients_at_the_beginning_of_an_update(change, other):
    both = [slopes(config_of(**x)) for x in (change, other)]
    np.testing.assert_allclose(*both, rtol=0, atol=1e-14)
    moved = token_log_probs(jnp.asarray(LOGITS)) + 0.5 * np.sin(np.arange(X * N * L)).reshape(-1, L)
    apart = [slopes(config_of(**x), moved) for x in (change, other)]
    assert relative(*apart) > 1e-3


def test_what_is_left_out_is_not_counted():
    for normaliser in ("constant", "token", "sequence"):
        config = config_of(normaliser=normaliser)
        old = token_log_probs(jnp.asarray(LOGITS))
        advantage, weight = jnp.asarray(REWARD.ravel()), jnp.ones(X * N)
        rows = np.arange(X * N) % 3 > 0
        mask = ALL_MASK & rows[:, None]
        part = batch_of(old[rows], ALL_MASK[rows], advantage[rows], weight[rows])
        whole = batch_of(old, mask, advantage, weight)
        values = [grpo.objective(b.log_prob + 0.1, b, config)[0] for b in (part, whole)]
        np.testing.assert_allclose(*values, rtol=1e-12)
        nothing = dataclasses.replace(whole, mask=np.zeros_like(mask))
        assert grpo.objective(old, nothing, config)[0] == 0.0


def test_the_penalty_keeps_its_price_whatever_the_scale_of_the_scores():
    score, kl = np.random.default_rng(6).normal(size=(2, 3, 4))
    centred = score - score.mean(1, keepdims=True)
    penalty = BETA * (kl - kl.mean(1, keepdims=True))
    divisors = {
        "none": 1.0,
        "group": score.std(1, ddof=1, keepdims=True) + 1e-4,
        "batch": score.std(ddof=1) + 1e-4,
    }
    for scale, divisor in divisors.items():
        for placement, of_penalty in (("reward", penalty), ("loss", 0.0)):
            config = config_of(group_size=4, scale=scale, kl_placement=placement)
            actual = grpo.advantages(score.ravel(), kl.ravel(), config)
            expected = (centred / divisor - of_penalty).ravel()
            np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_unequal_groups_come_first():
    config = config_of(group_size=2, batch_size=4, oversample=2)
    score = jnp.array([1.0, 1.0, 0.0, 1.0, 2.0, 2.0, 1.0, 0.0])
    assert grpo.chosen(score, config).tolist() == [2, 3, 6, 7]
    assert grpo.chosen(score.at[7].set(1.0), config).tolist() == [2, 3, 0, 1]
    once = dataclasses.replace(config, oversample=1)
    assert grpo.chosen(score[:4], once).tolist() == [0, 1, 2, 3]


# --- TRL ------------------------------------------------------------------------------------------

NORMALISERS = {
    "grpo": "sequence",
    "bnpo": "token",
    "dapo": "token",
    "cispo": "token",
    "dr_grpo": "constant",
}


def config_of_trl(case):
    cispo = case["loss_type"] == "cispo"
    high = case["epsilon_high"]
    return config_of(
        normaliser=NORMALISERS[case["loss_type"]],
        ratio=case["importance_sampling_level"],
        surrogate="cispo" if cispo else "clip",
        clip_eps=float("inf") if cispo else case["epsilon_low"],
        clip_eps_high=high - 1.0 if cispo else high,  # TRL's bound of CISPO is that of the ratio
        kl_times_ratio=case["kl_times_ratio"],
        beta=case["beta"],
        **IN_LOSS,
    )


def name_of_trl(case):
    keys = ("loss_type", "importance_sampling_level", "beta", "kl_times_ratio")
    return " ".join(str(case[key]) for key in keys)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["losses"], ids=name_of_trl)
def test_the_losses_are_those_of_trl(case):
    names = ("log_prob", "old_log_prob", "ref_log_prob", "mask", "slope")
    # TRL divides dr_grpo's loss by the length that completions may have, ours by that of the array.
    padding = ((0, 0), (0, case["max_completion_length"] - len(case["mask"][0])))
    log_prob, old, reference, mask, slope = (jnp.pad(np.array(case[n]), padding) for n in names)
    advantage = jnp.array(case["advantage"])
    weight = jnp.ones_like(advantage)
    batch = grpo.Batch(None, None, mask, old, reference, advantage, weight)
    value_and_slope = jax.value_and_grad(lambda x: grpo.objective(x, batch, config_of_trl(case))[0])
    value, own = value_and_slope(log_prob)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-7)
    np.testing.assert_allclose(own, slope, rtol=1e-6, atol=1e-9)
