"""NPG: three updates against an independent 64-bit version with the full Fisher matrix.

The last part tests NPG and TRPO together.
"""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import rederive
from jax import flatten_util, random

from purejaxpg import InputError
from purejaxpg.agents import npg, trpo

rederive.register()
DISCRETE = npg.Config(
    env=rederive.NAMES[True], total_timesteps=84, num_envs=4, num_steps=7, num_epochs=3,
    num_minibatches=2, cg_iters=6, hidden=(5, 3), critic_learning_rate=0.005, gamma=0.9,
)  # fmt: skip
CONTINUOUS = dataclasses.replace(
    DISCRETE, env=rederive.NAMES[False], cg_iters=3, activation="silu", orthogonal_init=False,
    learning_rate_schedule="robbins_monro", learning_rate_half_life=2.0,
    normalize_advantage=False, normalize_obs=True, normalize_reward=True, gae_lambda=0.6,
    max_kl=0.03, cg_damping=0.02, max_grad_norm=float("inf"), clip_obs=1.2, reward_scale=1.5,
    clip_reward=1.1, initial_log_std=-0.5, env_params={"push": 0.8, "max_steps_in_episode": 3},
)  # fmt: skip


class Rederived(rederive.NaturalGradient):
    """θ' = θ + √(2δ / xᵀM x) x with M x = g."""

    def step(self, batch: rederive.Batch) -> tuple[np.ndarray, dict[str, float]]:
        config, actor, activation = self.config, self.params["actor"], self.config.activation
        gain, gradient = rederive.score(actor, batch, activation)
        fisher = rederive.fisher(actor, batch.obs, activation)
        metric = fisher + config.cg_damping * np.eye(len(fisher))
        x = rederive.conjugate_gradient(metric, rederive.flat(gradient), config.cg_iters)
        new = rederive.flat(actor) + np.sqrt(2.0 * config.max_kl / (x @ metric @ x)) * x
        after = rederive.measures(rederive.like(new, actor), actor, batch, activation)
        entropy = rederive.entropy(rederive.policy_in_64_bits(actor, batch.obs, activation)).mean()
        return new, {"loss/policy": -gain, "policy/entropy": entropy, "policy/kl": after["kl"]}


@pytest.mark.parametrize(
    "config",
    [DISCRETE, dataclasses.replace(DISCRETE, max_grad_norm=0.05, gae_lambda=0.3), CONTINUOUS],
    ids=["discrete", "clipped", "continuous"],
)
def test_three_updates_against_a_loop(config: npg.Config) -> None:
    rederive.assert_three_updates(npg, Rederived, config)


def test_train_folds_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rederive.assert_trains(npg, DISCRETE, monkeypatch)


# --- with TRPO ------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {"total_timesteps": 256, "num_envs": 4, "num_steps": 16, "hidden": (6,)}
BOTH = pytest.mark.parametrize("agent", [npg, trpo], ids=["npg", "trpo"])
STEPS = {
    agent: jax.jit(step, compiler_options=quick.OPTIONS)
    for agent, step in ((npg, npg.natural_step), (trpo, trpo.constrained_step))
}


def some(agent: types.ModuleType, config: Any) -> tuple[Any, Any]:
    """An actor for CartPole, and a batch in which no action is better than another."""
    key_actor, key_obs = random.split(random.key(0))
    obs = random.normal(key_obs, (64, 4))
    actor = agent.Actor(config).init(key_actor, obs)
    fields = {"obs": obs, "action": jnp.arange(64) % 2, "advantage": jnp.zeros(64)}
    if agent is trpo:
        fields["log_prob"] = trpo.Actor(config).apply(actor, obs).log_prob(fields["action"])
    return actor, agent.Batch(**fields, target=jnp.zeros(64))


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_certain_policy_is_not_overthrown(wrong: int) -> None:
    """One sample of the other action, at a policy whose Fisher information almost vanishes."""
    config = npg.Config(**FIELDS)
    actor, batch = some(npg, config)
    head = {"kernel": jnp.zeros((6, 2)), "bias": jnp.array([0.0, 14.0])}
    actor = {"params": {**actor["params"], "Dense_0": head}}
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
def test_no_advantage_is_no_step(agent: types.ModuleType) -> None:
    """A gradient of zero has no direction; the step is zero, not NaN."""
    config = agent.Config(**FIELDS)
    actor, batch = some(agent, config)
    moved, metrics = STEPS[agent](actor, batch, config)
    pairs = zip(jax.tree.leaves(actor), jax.tree.leaves(moved), strict=True)
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
