"""What is special to A2C."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.agents import a2c, ppo

SAME: dict[str, Any] = {
    "total_timesteps": 256, "num_envs": 4, "num_steps": 16, "hidden": (8, 8), "gae_lambda": 0.9,
    "vf_coef": 0.7, "ent_coef": 0.02, "normalize_advantage": False,
    "env_params": {"max_steps_in_episode": 20.0},
}  # fmt: skip
TINY = a2c.Config(**SAME)


def a2c_gradient(config: a2c.Config) -> Any:
    state = a2c.init(random.key(0), config)
    state, transition, _ = a2c.rollout(random.key(1), state, config)
    state, batch = a2c.advantages(state, transition, config)
    return jax.grad(lambda params: a2c.loss(params, batch, config)[0])(state.params)


def ppo_gradient(config: ppo.Config) -> Any:
    state = ppo.init(random.key(0), config)
    state, transition, _ = ppo.rollout(random.key(1), state, config)
    state, batch = ppo.advantages(state, transition, config)
    return jax.grad(lambda params: ppo.loss(params, batch, state, config)[0])(state.params)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_first_gradient_is_that_of_ppo_with_one_epoch_and_one_minibatch(env: str) -> None:
    """At a ratio of 1 nothing is clipped, and r A has the gradient of A log pi."""
    fields = {**SAME, "env": env, "reward_scale": 0.1}  # keeps Pendulum's gradients of order one
    ours = jax.jit(a2c_gradient)(a2c.Config(**fields))
    theirs = jax.jit(ppo_gradient)(ppo.Config(**fields, num_epochs=1, num_minibatches=1))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(ours)) > 1e-2
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.fast
def test_optimiser_is_rmsprop_with_epsilon_under_the_root() -> None:
    config = dataclasses.replace(
        TINY, learning_rate_schedule="constant", max_grad_norm=jnp.inf, learning_rate=0.1
    )
    optimizer = a2c.make_optimizer(config)
    gradient, mean_square = np.array([1e-4, 0.5, -3.0], np.float32), np.ones(3)
    state = optimizer.init(jnp.zeros(3))
    for _ in range(3):
        step, state = optimizer.update(jnp.asarray(gradient), state)
        mean_square = 0.99 * mean_square + 0.01 * gradient**2
        expected = -0.1 * gradient / np.sqrt(mean_square + 1e-5)
        np.testing.assert_allclose(step, expected, rtol=1e-5)


def test_normalising_advantages_takes_the_scale_of_the_reward_away() -> None:
    """The critic is left out: its target has the scale of the reward all the same."""
    fields = {**SAME, "vf_coef": 0.0, "normalize_advantage": True, "gae_lambda": 1.0}
    # A critic of zero, so that the advantage is the return and has the reward's scale.
    small, large = (a2c.Config(**fields, reward_scale=k) for k in (1.0, 1000.0))

    def gradient(config: a2c.Config) -> Any:
        state = a2c.init(random.key(0), config)
        zero = jax.tree.map(jnp.zeros_like, state.params["critic"])
        state = state.replace(params={**state.params, "critic": zero})
        _, transition, _ = a2c.rollout(random.key(1), state, config)
        _, batch = a2c.advantages(state, transition, config)
        return jax.grad(lambda params: a2c.loss(params, batch, config)[0])(state.params)["actor"]

    a, b = jax.jit(gradient)(small), jax.jit(gradient)(large)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)
    plain = [dataclasses.replace(config, normalize_advantage=False) for config in (small, large)]
    c, d = (jax.jit(gradient)(config) for config in plain)
    ratio = float(jnp.abs(d["params"]["Dense_0"]["bias"]).max())
    assert ratio > 100 * float(jnp.abs(c["params"]["Dense_0"]["bias"]).max())


def test_an_update_is_one_gradient_step_on_all_data() -> None:
    config = dataclasses.replace(TINY, learning_rate_schedule="constant", max_grad_norm=jnp.inf)
    state = jax.jit(a2c.init)(random.key(0), config)
    moved, metrics = jax.jit(a2c.update)(random.key(1), state, config)
    gradient = jax.jit(a2c_gradient)(config)
    optimizer = a2c.make_optimizer(config)
    step, _ = optimizer.update(gradient, state.opt_state)
    pairs = zip(*(jax.tree.leaves(x) for x in (state.params, step, moved.params)), strict=True)
    for before, change, after in pairs:
        np.testing.assert_allclose(after, before + change, rtol=1e-4, atol=1e-6)
    assert int(moved.num_updates) == 1
    assert np.isfinite(float(metrics["loss/policy"]))


@pytest.mark.fast
def test_one_sample_leaves_no_advantage_to_normalise() -> None:
    alone = dataclasses.replace(TINY, num_envs=1, num_steps=1, normalize_advantage=True)
    with pytest.raises(InputError, match="normalize_advantage needs two samples"):
        a2c.check(alone)
