"""What is special to NPG, and what TRPO shares with it."""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import flatten_util, random

from purejaxpg import InputError
from purejaxpg.agents import npg, trpo

FIELDS: dict[str, Any] = {
    "total_timesteps": 256, "num_envs": 4, "num_steps": 16, "num_epochs": 2, "num_minibatches": 2,
    "hidden": (6,), "env_params": {"max_steps_in_episode": 20.0},
}  # fmt: skip
BOTH = pytest.mark.parametrize("agent", [npg, trpo], ids=["npg", "trpo"])


STEPS = {npg: jax.jit(npg.natural_step), trpo: jax.jit(trpo.constrained_step)}
SLOPE = jax.jit(jax.grad(npg.policy_loss))


@functools.partial(jax.jit, static_argnums=0)
def batch_of(agent: types.ModuleType, state: Any, config: Any) -> Any:
    state, transition, _ = agent.rollout(random.key(1), state, config)
    return agent.advantages(state, transition, config)[1]


def collected(agent: types.ModuleType, config: Any) -> tuple[Any, Any]:
    state = jax.jit(agent.init)(random.key(0), config)
    return state, batch_of(agent, state, config)


@jax.jit
def curvature(config: Any, actor: Any, batch: Any) -> jax.Array:
    """Fisher information as the second derivative of the divergence, in full."""
    params, unravel = flatten_util.ravel_pytree(actor)
    old = npg.Actor(config).apply(actor, batch.obs)

    def divergence(params: jax.Array) -> jax.Array:
        return old.kl(npg.Actor(config).apply(unravel(params), batch.obs)).mean()

    return jax.hessian(divergence)(params)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_step_solves_the_damped_system_and_ends_at_the_boundary(env: str) -> None:
    config = npg.Config(**FIELDS, env=env, cg_damping=0.01, cg_iters=60, max_kl=1e-4)
    state, batch = collected(npg, config)
    actor = state.params["actor"]
    moved, metrics = STEPS[npg](actor, batch, config)
    params, step = (flatten_util.ravel_pytree(x)[0] for x in (actor, moved))
    step = np.asarray(step - params, np.float64)
    gradient, _ = flatten_util.ravel_pytree(SLOPE(actor, batch, config))
    gradient = -np.asarray(gradient, np.float64)
    fisher = np.asarray(curvature(config, actor, batch), np.float64)
    metric = fisher + 0.01 * np.eye(len(step))
    assert 0.5 * step @ metric @ step == pytest.approx(config.max_kl, rel=2e-2)
    direction = np.linalg.solve(metric, gradient)
    cosine = step @ direction / np.linalg.norm(step) / np.linalg.norm(direction)
    assert cosine == pytest.approx(1.0, abs=1e-3)
    plain = step @ gradient / np.linalg.norm(step) / np.linalg.norm(gradient)
    assert plain < 0.95  # the curvature did turn it
    modelled = 0.5 * step @ fisher @ step
    assert 0.1 * config.max_kl < modelled < config.max_kl
    assert float(metrics["policy/kl"]) == pytest.approx(modelled, rel=0.1)


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_certain_policy_is_not_overthrown(wrong: int) -> None:
    """One sample of the other action, where the Fisher information has all but vanished."""
    config = npg.Config(**FIELDS)
    state, batch = collected(npg, config)
    head = {"kernel": jnp.zeros((6, 2)), "bias": jnp.array([0.0, 14.0])}
    actor = {"params": {**state.params["actor"]["params"], "Dense_0": head}}
    samples = len(batch.action)
    action = jnp.ones(samples, jnp.int32).at[0].set(wrong)
    advantage = jnp.full(samples, -1.0 / (samples - 1)).at[0].set(1.0)
    batch = batch.replace(action=action, advantage=advantage)
    moved, metrics = STEPS[npg](actor, batch, config)
    assert float(metrics["policy/kl"]) < config.max_kl
    step = jax.tree.map(jnp.subtract, moved, actor)
    length = np.linalg.norm(flatten_util.ravel_pytree(step)[0])
    assert 0.0 < length <= 1.001 * np.sqrt(2.0 * config.max_kl / config.cg_damping)


@BOTH
def test_critic_moves_no_parameter_of_the_actor(agent: types.ModuleType) -> None:
    config = agent.Config(**FIELDS)
    state = jax.jit(agent.init)(random.key(0), config)
    update = jax.jit(agent.update)
    one, _ = update(random.key(1), state, config)
    other, _ = update(random.key(1), state, dataclasses.replace(config, critic_learning_rate=0.1))
    for a, b in zip(*(jax.tree.leaves(s.params["actor"]) for s in (one, other)), strict=True):
        np.testing.assert_array_equal(a, b)
    heads = [s.params["critic"]["params"]["Dense_0"]["kernel"] for s in (one, other)]
    assert not np.array_equal(*heads)


@BOTH
def test_no_advantage_is_no_step(agent: types.ModuleType) -> None:
    """A gradient of zero has no direction; the step is zero, not NaN."""
    config = agent.Config(**FIELDS)
    state, batch = collected(agent, config)
    batch = batch.replace(advantage=jnp.zeros_like(batch.advantage))
    moved, metrics = STEPS[agent](state.params["actor"], batch, config)
    pairs = zip(jax.tree.leaves(state.params["actor"]), jax.tree.leaves(moved), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert float(metrics["policy/kl"]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.fast
@BOTH
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_kl": 0.0}, ["max_kl", "more than 0", "0.0"]),
        ({"max_kl": -0.01}, ["max_kl", "-0.01"]),
        ({"max_kl": float("inf")}, ["max_kl", "finite"]),
        ({"cg_iters": 0}, ["cg_iters", "0"]),
        ({"cg_damping": -1.0}, ["cg_damping", "-1.0"]),
        ({"cg_damping": float("inf")}, ["cg_damping", "finite", "inf"]),
        ({"cg_iters": 10**10}, ["cg_iters", "2147483647"]),
        ({"initial_log_std": 1000.0, "env": "Pendulum-v1"}, ["initial_log_std", "20", "1000.0"]),
        ({"num_minibatches": 7}, ["num_minibatches", "7", "64"]),
    ],
)
def test_bad_settings_are_named(
    agent: types.ModuleType, fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        agent.check(agent.Config(**{**FIELDS, **fields}))
    assert all(word in str(caught.value) for word in words), str(caught.value)
