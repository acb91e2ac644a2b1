"""TRPO: three updates against an independent 64-bit version with the full Fisher matrix.

Then the constrained step alone, also if no step passes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import rederive
from jax import random

from purejaxpg import InputError
from purejaxpg.agents import trpo

rederive.register()
DISCRETE = trpo.Config(
    env=rederive.NAMES[True], total_timesteps=84, num_envs=4, num_steps=7, num_epochs=3,
    num_minibatches=2, cg_iters=6, hidden=(5, 3), critic_learning_rate=0.005, gamma=0.9,
)  # fmt: skip
CLIPPED = dataclasses.replace(DISCRETE, max_kl=0.03, max_grad_norm=0.05, gae_lambda=0.3)
CONTINUOUS = dataclasses.replace(
    DISCRETE, env=rederive.NAMES[False], cg_iters=3, max_backtracks=3, shrink=0.7,
    activation="silu", orthogonal_init=False,
    learning_rate_schedule="robbins_monro", learning_rate_half_life=2.0,
    normalize_advantage=False, normalize_obs=True, normalize_reward=True, gae_lambda=0.6,
    max_kl=0.03, cg_damping=0.02, max_grad_norm=float("inf"), clip_obs=1.2, reward_scale=1.5,
    clip_reward=1.1, initial_log_std=-0.5, env_params={"push": 0.8, "max_steps_in_episode": 3},
)  # fmt: skip


# Steps so long that the model of the divergence does not hold. Few iterations of conjugate
# gradient, as above: with so little damping, more of them would show the rounding of 32 bits.
REFUSED = dataclasses.replace(CONTINUOUS, max_kl=12.0, cg_damping=1e-3)


class Rederived(rederive.NaturalGradient):
    """The natural gradient's step, shortened until the constraint holds and L has improved."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.times: list[int] = []  # how often each step was shortened; -1 if none was taken

    def longest_step(self, batch: rederive.Batch) -> np.ndarray:
        """√(2δ / xᵀF x) x with (F + λI) x = ∇L."""
        config, actor, activation = self.config, self.params["actor"], self.config.activation
        _, gradient = rederive.score(actor, batch, activation)
        fisher = rederive.fisher(actor, batch.obs, activation)
        damped = fisher + config.cg_damping * np.eye(len(fisher))
        x = rederive.conjugate_gradient(damped, rederive.flat(gradient), config.cg_iters)
        return np.sqrt(2.0 * config.max_kl / (x @ fisher @ x)) * x

    def step(self, batch: rederive.Batch) -> tuple[np.ndarray, dict[str, float]]:
        config, actor, activation = self.config, self.params["actor"], self.config.activation
        old, full = rederive.flat(actor), self.longest_step(batch)
        before = rederive.measures(actor, actor, batch, activation)
        new, after, taken, times = old, before, 0.0, -1
        for j in range(config.max_backtracks + 1):
            candidate = old + config.shrink**j * full
            tried = rederive.measures(rederive.like(candidate, actor), actor, batch, activation)
            if tried["kl"] <= config.max_kl and tried["surrogate"] > before["surrogate"]:
                new, after, taken, times = candidate, tried, config.shrink**j, j
                break
        self.times.append(times)
        policy = rederive.policy_in_64_bits(actor, batch.obs, activation)
        return new, {
            "loss/policy": -before["surrogate"],
            "policy/improvement": after["surrogate"] - before["surrogate"],
            "policy/entropy": rederive.entropy(policy).mean(),
            "policy/kl": after["kl"],
            "policy/step_fraction": taken,
        }


@pytest.mark.parametrize(
    ("config", "times"),
    [
        (DISCRETE, [0, 0, 0]),
        (CLIPPED, [0, 0, 0]),
        (CONTINUOUS, [1, 0, 1]),
        (REFUSED, [3, 3, -1]),
    ],
    ids=["discrete", "clipped", "continuous", "refused"],
)
def test_three_updates_against_a_loop(config: trpo.Config, times: list[int]) -> None:
    assert rederive.assert_three_updates(trpo, Rederived, config).times == times


def test_train_folds_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rederive.assert_trains(trpo, DISCRETE, monkeypatch)


# --- the step alone -------------------------------------------------------------------------------

TINY = trpo.Config(
    total_timesteps=256, num_envs=4, num_steps=16, num_epochs=1, num_minibatches=1, hidden=(8,),
    max_backtracks=4, env_params={"max_steps_in_episode": 20.0},
)  # fmt: skip


def collected(key: jax.Array, config: trpo.Config, gain: float) -> tuple[Any, Any]:
    """A batch from a policy whose logits are multiplied by `gain`."""
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


STEP = jax.jit(step, compiler_options=quick.OPTIONS)


def equal(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


# A confident policy and little damping: the quadratic model is far off, differently in each lane.
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
        # The paper's direction: KL(old || new).
        assert 0.0 < float(before.kl_divergence(after).mean()) <= max_kl * (1 + 1e-4)
        assert surrogate > float(batch.advantage.mean())
        gained = surrogate - float(batch.advantage.mean())
        assert float(metrics["policy/improvement"]) == pytest.approx(gained, abs=1e-5)


def test_lanes_of_a_batch_backtrack_each_for_itself() -> None:
    """Full, shortened and rejected steps in one vmap: a finished lane keeps its result."""
    keys = random.split(random.key(0), 12)
    bounds = jnp.repeat(jnp.array([1e-3, 1e-2, 0.1]), 4)

    def lane(key: jax.Array, max_kl: jax.Array) -> Any:
        return step(key, dataclasses.replace(DECIDED, max_kl=max_kl), 100.0)[:3]

    old, new, metrics = jax.jit(jax.vmap(lane), compiler_options=quick.OPTIONS)(keys, bounds)
    fractions = np.asarray(metrics["policy/step_fraction"], np.float64).round(3).tolist()
    assert {0.0, 0.8, 1.0} <= set(fractions)
    for i, fraction in enumerate(fractions):
        before, after = (jax.tree.map(lambda x, i=i: x[i], p) for p in (old, new))
        # If no step passes, the policy is unchanged to the last bit; otherwise it moves.
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
