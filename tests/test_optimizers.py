"""The optimiser that the agents share, beside the chain of optax that it is, and half precision."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random

from purejaxpg import optimizers

pytestmark = pytest.mark.fast

PARAMS = {"a": jnp.ones((3, 2)), "b": jnp.full(4, -2.0)}


def gradients(step: int) -> Any:
    """Norm about 3, 0.3, 3, ...: every other one is clipped."""
    size = 1.0 if step % 2 == 0 else 0.1
    return jax.tree.map(
        lambda x: size * random.normal(random.fold_in(random.key(x.size), step), x.shape), PARAMS
    )


@pytest.mark.parametrize("eps", [1e-5, 1e-8])
def test_it_is_the_chain_of_optax(eps: float) -> None:
    """State and changes to the bit, over steps of which some are clipped."""
    ours = optimizers.clipped_adam(0.01, 0.5, eps)
    chain = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01, eps=eps))
    theirs = optax.flatten(chain)
    state, expected_state = ours.init(PARAMS), theirs.init(PARAMS)
    for step in range(4):
        change, state = ours.update(gradients(step), state, PARAMS)
        expected, expected_state = theirs.update(gradients(step), expected_state, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, (change, state), (expected, expected_state))
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    assert state[1][0].mu.shape == (10,)  # one vector


def test_it_is_adam_written_out() -> None:
    """In double precision, by the formula of the docstring."""
    rate, bound, eps = 0.01, 0.5, 1e-5
    optimizer = optimizers.clipped_adam(rate, bound, eps)
    state, m, v = optimizer.init(PARAMS), np.zeros(10), np.zeros(10)
    for k in range(1, 4):
        change, state = optimizer.update(gradients(k), state)
        flat = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(gradients(k))]
        g = np.concatenate(flat)
        g *= min(1.0, bound / np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = -rate * m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + eps)
        ours = np.concatenate([np.ravel(x) for x in jax.tree.leaves(change)])
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-8)


def test_it_knows_its_settings() -> None:
    """A traced learning rate included; and optax takes it for one of its own."""

    @jax.jit
    def half(rate: jax.Array) -> jax.Array:
        return optimizers.clipped_adam(rate, 0.5).learning_rate / 2.0

    assert float(half(3.0)) == 1.5
    optimizer = optimizers.clipped_adam(0.01, 0.5, 1e-8)
    assert (optimizer.learning_rate, optimizer.max_grad_norm) == (0.01, 0.5)
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert isinstance(optimizer, optax.GradientTransformation)
    _, update = optimizer
    assert update is optimizer.update


# Epsilon of each agent; A2C has RMSProp.
EPSILONS = {"ppo": 1e-5, "npg": 1e-5, "trpo": 1e-5, "reinforce": 1e-5, "ddpg": 1e-8, "sac": 1e-8}


@pytest.mark.parametrize("name", EPSILONS)
def test_agents_have_it(name: str) -> None:
    agent = importlib.import_module(f"purejaxpg.agents.{name}")
    config = agent.Config(max_grad_norm=0.7, learning_rate_schedule="constant")
    made = getattr(agent, "make_optimizer", None) or agent.make_optimizers
    of_agent = made(config)
    for optimizer in of_agent.values() if isinstance(of_agent, dict) else [of_agent]:
        assert isinstance(optimizer, optimizers.ClippedAdam)
        assert (optimizer.max_grad_norm, optimizer.eps) == (0.7, EPSILONS[name])


def test_half_precision_keeps_changes_smaller_than_its_own_steps() -> None:
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.full(2, -2.0, jnp.bfloat16)}
    gradient = jax.tree.map(jnp.ones_like, params)
    ends = {}
    for name, optimizer in (
        ("plain", optax.sgd(1e-3)),
        ("in 32 bits", optimizers.in_float32(optax.sgd(1e-3))),
    ):
        moved, state = params, optimizer.init(params)
        for _ in range(100):
            change, state = optimizer.update(gradient, state, moved)
            moved = optax.apply_updates(moved, change)
        ends[name] = moved
        assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(ends["plain"]["b"], params["b"])  # nothing has moved
    np.testing.assert_array_equal(ends["in 32 bits"]["a"], jnp.bfloat16(0.9))
    np.testing.assert_array_equal(ends["in 32 bits"]["b"], jnp.bfloat16(-2.1))


def test_half_precision_has_the_state_of_single() -> None:
    """Adam sees the gradients in 32 bits, and the parameters are its own, rounded."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    inner = optax.adamw(0.01)
    ours, alone = optimizers.in_float32(inner), PARAMS
    state, expected_state = ours.init(params), inner.init(PARAMS)
    for step in range(4):
        gradient = jax.tree.map(lambda x: x.astype(jnp.bfloat16), gradients(step))
        change, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), gradient)
        expected, expected_state = inner.update(wide, expected_state, alone)
        alone = optax.apply_updates(alone, expected)
    jax.tree.map(np.testing.assert_array_equal, state, optimizers.InFloat32(alone, expected_state))
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), alone)
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
