"""What is special to TRPO: the constrained step, and what happens where none is found."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.agents import trpo

TINY = trpo.Config(
    total_timesteps=256, num_envs=4, num_steps=16, num_epochs=1, num_minibatches=1, hidden=(8,),
    max_backtracks=4, env_params={"max_steps_in_episode": 20.0},
)  # fmt: skip


def collected(key: jax.Array, config: trpo.Config, gain: float) -> tuple[Any, Any]:
    """A batch, of a policy whose preferences are multiplied by `gain`."""
    key_init, key_rollout = random.split(key)
    state = trpo.init(key_init, config)
    layers = state.params["actor"]["params"]
    head = jax.tree.map(lambda x: gain * x, layers["Dense_0"])
    actor = {"params": {**layers, "Dense_0": head}}
    state = state.replace(params={**state.params, "actor": actor})
    state, transition, _ = trpo.rollout(key_rollout, state, config)
    return trpo.advantages(state, transition, config)


def step(key: jax.Array, config: trpo.Config, gain: float = 1.0) -> tuple[Any, Any, Any, Any]:
    state, batch = collected(key, config, gain)
    moved, metrics = trpo.constrained_step(state.params["actor"], batch, config)
    return state.params["actor"], moved, metrics, batch


STEP = jax.jit(step)


def equal(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


# A decided policy and hardly any damping: the quadratic model is far off, in every lane otherwise.
DECIDED = dataclasses.replace(TINY, cg_damping=1e-3)


@pytest.mark.parametrize("max_kl", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("gain", [1.0, 100.0])
def test_a_step_keeps_the_constraint_and_improves_the_surrogate(max_kl: float, gain: float) -> None:
    for seed in range(6):
        config = dataclasses.replace(DECIDED, max_kl=max_kl)
        old, new, metrics, batch = STEP(random.key(seed), config, gain)
        before, after = (trpo.Actor(config).apply(p, batch.obs) for p in (old, new))
        ratio = np.exp(after.log_prob(batch.action) - batch.log_prob)
        surrogate = float((ratio * batch.advantage).mean())
        fraction = float(metrics["policy/step_fraction"])
        if fraction == 0.0:
            assert equal(old, new)
            continue
        # The paper's direction: the old policy's divergence from the new.
        assert 0.0 < float(before.kl(after).mean()) <= max_kl * (1 + 1e-4)
        assert surrogate > float(batch.advantage.mean())
        gained = surrogate - float(batch.advantage.mean())
        assert float(metrics["policy/improvement"]) == pytest.approx(gained, abs=1e-5)


def test_a_small_region_takes_the_whole_step() -> None:
    """There the quadratic model is exact, up to the constraint's own rounding."""
    _, _, metrics, _ = STEP(random.key(0), dataclasses.replace(TINY, max_kl=1e-3))
    assert float(metrics["policy/step_fraction"]) >= 0.8
    assert float(metrics["policy/kl"]) == pytest.approx(1e-3, rel=0.4)


def test_lanes_of_a_batch_backtrack_each_for_itself() -> None:
    """Whole step, shortened step and none in one vmap: a lane that is done keeps what it has."""
    keys = random.split(random.key(0), 12)
    bounds = jnp.repeat(jnp.array([1e-3, 1e-2, 0.1]), 4)

    def lane(key: jax.Array, max_kl: jax.Array) -> Any:
        return step(key, dataclasses.replace(DECIDED, max_kl=max_kl), 100.0)[:3]

    old, new, metrics = jax.jit(jax.vmap(lane))(keys, bounds)
    fractions = np.asarray(metrics["policy/step_fraction"], np.float64).round(3).tolist()
    assert {0.0, 0.8, 1.0} <= set(fractions)
    for i, fraction in enumerate(fractions):
        before, after = (jax.tree.map(lambda x, i=i: x[i], p) for p in (old, new))
        # Where no step passes, the policy stays to the last bit; anywhere else it moves.
        assert equal(before, after) == (fraction == 0.0)
        assert float(metrics["policy/kl"][i]) <= bounds[i] * (1 + 1e-4)
        _, _, solo, _ = STEP(keys[i], dataclasses.replace(DECIDED, max_kl=float(bounds[i])), 100.0)
        assert float(solo["policy/step_fraction"]) == pytest.approx(fraction, abs=1e-3)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_backtracks": -1}, ["max_backtracks", "-1"]),
        ({"shrink": 1.0}, ["shrink", "less than 1", "1.0"]),
        ({"shrink": 0.0}, ["shrink", "0.0"]),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        trpo.check(dataclasses.replace(TINY, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)
