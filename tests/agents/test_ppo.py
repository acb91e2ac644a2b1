"""Parts that only PPO has; `test_ppo_update.py` checks whole updates."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax import random

from purejaxpg import InputError, envs
from purejaxpg.agents import ppo

TINY = ppo.Config(
    total_timesteps=256, num_envs=4, num_steps=16, num_epochs=2, num_minibatches=2, hidden=(8, 8)
)


# Compiled quickly, because these tests do not depend on optimisations.
QUICK = functools.partial(jax.jit, compiler_options=quick.OPTIONS)
INIT, UPDATE = QUICK(ppo.init), QUICK(ppo.update)
LOSS = jax.jit(ppo.loss)
GRADIENT = QUICK(jax.grad(lambda *args: ppo.loss(*args)[0]))


@jax.jit
def gathered(
    key: jax.Array, state: ppo.TrainState, config: ppo.Config
) -> tuple[ppo.TrainState, ppo.Transition, ppo.Batch]:
    """One rollout, and the batch that an update would learn from."""
    state, transition, _ = ppo.rollout(key, state, config)
    state, batch = ppo.advantages(state, transition, config)
    return state, transition, batch


def collected(config: ppo.Config) -> tuple[ppo.TrainState, ppo.Batch]:
    state, _, batch = gathered(random.key(1), INIT(random.key(0), config), config)
    return state, batch


def test_ratio_is_one_on_the_first_minibatch() -> None:
    """Log-probabilities recomputed for the update are those of the rollout, to the last bits."""
    state, batch = collected(TINY)
    _, metrics = LOSS(state.params, batch, state, TINY)
    assert float(metrics["policy/clip_fraction"]) == 0.0
    assert abs(float(metrics["policy/kl"])) < 1e-12
    log_prob = ppo.Actor(TINY).apply(state.params["actor"], batch.obs).log_prob(batch.action)
    np.testing.assert_allclose(np.exp(log_prob - batch.log_prob), 1.0, rtol=0, atol=2**-22)


def test_first_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 the clipped surrogate has the gradient of -A log pi."""
    config = dataclasses.replace(TINY, vf_coef=0.0, ent_coef=0.0, normalize_advantage=False)
    state, batch = collected(TINY)

    def score_function(params: Any) -> jax.Array:
        log_prob = ppo.Actor(config).apply(params["actor"], batch.obs).log_prob(batch.action)
        return -(batch.advantage * log_prob).mean()

    ours = GRADIENT(state.params, batch, state, config)
    plain = QUICK(jax.grad(score_function))(state.params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_each_epoch_covers_all_data_in_its_own_order() -> None:
    order = ppo.shuffled(random.key(0), TINY).reshape(TINY.num_epochs, -1)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(TINY.steps_per_update), (2, 1)))
    assert not np.array_equal(order[0], order[1])


@pytest.mark.fast
def test_annealing_reaches_zero_after_the_last_update_and_not_before() -> None:
    gradient = {"w": jnp.ones(3)}

    def size(num_updates: int, **fields: Any) -> float:
        config = dataclasses.replace(TINY, max_grad_norm=jnp.inf, learning_rate=1.0, **fields)
        optimizer = ppo.make_optimizer(config, num_updates)
        return -float(optimizer.update(gradient, optimizer.init(gradient))[0]["w"][0])

    total = TINY.num_updates
    assert size(0) == pytest.approx(1.0, rel=1e-4)
    assert size(total - 1) == pytest.approx(1 / total, rel=1e-4)
    assert size(total) == 0.0
    assert size(total, learning_rate_schedule="constant") == pytest.approx(1.0, rel=1e-4)


PENALISED = dataclasses.replace(TINY, surrogate="kl_penalty", normalize_advantage=False)


@pytest.mark.parametrize(
    ("target_over_kl", "factor"),
    [(10.0, 0.5), (1.6, 0.5), (1.4, 1.0), (1.0, 1.0), (0.7, 1.0), (0.6, 2.0), (0.1, 2.0)],
)
def test_penalty_adapts_to_the_divergence(target_over_kl: float, factor: float) -> None:
    """Halved below target / 1.5, doubled above 1.5 target, and unchanged between."""
    state, batch = collected(TINY)
    moved = jax.tree.map(lambda x: 100.0 * x, state.params)
    old, new = (ppo.Actor(TINY).apply(p["actor"], batch.obs) for p in (state.params, moved))
    kl = float(old.kl_divergence(new).mean())
    config = dataclasses.replace(PENALISED, target_kl=kl * target_over_kl)
    state = state.replace(kl_coef=jnp.asarray(3.0))
    assert float(ppo.adapted_kl_coef(state, moved, batch, config)) == pytest.approx(3.0 * factor)
    for beta, least, most in ((1e-6, 1e-6, 2e-6), (1e6, 5e5, 1e6)):  # it stays in [1e-6, 1e6]
        start = state.replace(kl_coef=jnp.asarray(beta))
        adapted = ppo.adapted_kl_coef(start, moved, batch, config)
        assert float(adapted) == pytest.approx(min(max(factor * beta, least), most))
    clipped = dataclasses.replace(config, surrogate="clip")
    assert float(ppo.adapted_kl_coef(state, moved, batch, clipped)) == 3.0


def test_convolutional_torso_learns_on_minatar() -> None:
    config = dataclasses.replace(TINY, env="Breakout-MinAtar", torso="cnn", total_timesteps=64)
    ppo.check(config)
    before = INIT(random.key(0), config)
    after, metrics = UPDATE(random.key(1), before, config)
    kernels = [s.params["actor"]["params"]["torso"]["Conv_0"]["kernel"] for s in (before, after)]
    assert kernels[0].shape == (3, 3, 4, 16)
    assert not np.array_equal(*kernels)
    assert np.isfinite(float(metrics["loss/policy"]))


def test_orthogonal_gains() -> None:
    params = INIT(random.key(0), TINY).params
    head, hidden = (params["actor"]["params"][k] for k in ("Dense_0", "torso"))
    np.testing.assert_allclose((head["kernel"] ** 2).sum(0), 0.01**2, rtol=1e-4)
    np.testing.assert_allclose((hidden["Dense_1"]["kernel"] ** 2).sum(0), 2.0, rtol=1e-4)
    value_head = params["critic"]["params"]["Dense_0"]
    np.testing.assert_allclose((value_head["kernel"] ** 2).sum(0), 1.0, rtol=1e-4)
    assert float(jnp.abs(head["bias"]).max()) == 0.0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_minibatches": 3}, ["num_minibatches", "3", "64"]),
        ({"num_envs": 0}, ["num_envs", "0"]),
        ({"gamma": 1.5}, ["gamma", "1.5"]),
        ({"learning_rate": -1.0}, ["learning_rate", "-1.0"]),
        ({"learning_rate_schedule": "cosine"}, ["learning_rate_schedule", "'cosine'"]),
        ({"surrogate": "hinge"}, ["surrogate", "'clip'", "'kl_penalty'", "'hinge'"]),
        ({"kl_coef": 0.0}, ["kl_coef", "0.0"]),
        ({"target_kl": -1.0}, ["target_kl", "-1.0"]),
        ({"kl_coef": float("inf")}, ["kl_coef", "finite", "inf"]),
        ({"max_kl": 0.0}, ["max_kl", "0.0"]),
        ({"total_timesteps": 10}, ["total_timesteps", "64", "10"]),
        (
            {"initial_log_std": 1.0},
            ["initial_log_std", "1.0", "Gaussian", "CartPole-v1", "discrete"],
        ),
        ({"torso": "cnn"}, ["torso", "'cnn'", "[4]"]),
        ({"activation": "sine"}, ["activation", "'sine'"]),
        ({"hidden": ()}, ["hidden", "[]"]),
        ({"env": "CartPole-v2"}, ["CartPole-v2", "CartPole-v1"]),
        ({"env_params": {"gravty": 1.0}}, ["gravty", "gravity"]),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ppo.check(dataclasses.replace(TINY, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("num_envs", [1, 8192])
def test_any_number_of_environments(num_envs: int) -> None:
    config = dataclasses.replace(TINY, num_envs=num_envs, num_steps=2, total_timesteps=2 * num_envs)
    state, metrics = QUICK(ppo.train)(random.key(0), config)
    assert state.obs.shape == (num_envs, 4)
    assert np.isfinite(metrics["loss/value"]).all()


def test_memory_grows_as_predicted_with_the_environments() -> None:
    """Peak scratch memory of an update is linear in N, at the size of the data of an update.

    Per environment step: a transition and its batch row (two observations and six numbers, then
    one observation and five numbers), plus the activations of the critic's pass over all data.
    """

    def scratch(num_envs: int) -> int:
        config = dataclasses.replace(TINY, num_envs=num_envs, total_timesteps=16 * num_envs)
        state = jax.eval_shape(ppo.init, random.key(0), config)
        lowered = UPDATE.lower(random.key(0), state, config)
        compiled = lowered.compile(compiler_options=quick.PLANNED)
        return compiled.memory_analysis().temp_size_in_bytes

    small, middle, large = (scratch(n) for n in (512, 1024, 2048))
    assert (large - middle) / (middle - small) == pytest.approx(2.0, rel=0.1)
    per_step = (large - small) / (2048 - 512) / TINY.num_steps
    held = 4 * (2 * 4 + 6 + 4 + 5)  # bytes of the transition and its batch row
    activations = 4 * 8 * 6  # at most six arrays of the hidden width alive at once
    assert held <= per_step <= held + activations


def test_env_is_the_one_named() -> None:
    config = dataclasses.replace(TINY, env="DeepSea-bsuite", env_kwargs=(("size", 4),))
    assert envs.from_config(config).obs_shape == (4, 4)
