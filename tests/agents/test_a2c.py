"""A2C: three updates against an independent 64-bit version, and rejected settings."""

import dataclasses
from typing import Any

import jax
import pytest
import rederive

from purejaxpg import InputError
from purejaxpg.agents import a2c

rederive.register()
DISCRETE = a2c.Config(
    env=rederive.NAMES[True], total_timesteps=84, num_envs=4, num_steps=7, hidden=(5, 3),
    learning_rate=0.02, gamma=0.9,
)  # fmt: skip
CONTINUOUS = dataclasses.replace(
    DISCRETE, env=rederive.NAMES[False], activation="silu", orthogonal_init=False,
    learning_rate_schedule="robbins_monro", learning_rate_half_life=2.0,
    normalize_advantage=True, normalize_obs=True, normalize_reward=True, gae_lambda=0.6,
    vf_coef=0.9, ent_coef=0.1, max_grad_norm=float("inf"), clip_obs=1.2, reward_scale=1.5,
    clip_reward=1.1, initial_log_std=-0.5, env_params={"push": 0.8, "max_steps_in_episode": 3},
)  # fmt: skip


def loss(params: Any, batch: Any, vf_coef: Any, ent_coef: Any, activation: str) -> Any:
    """Minus the L(θ) of the module's docstring."""
    obs, action, advantage, target = batch
    policy = rederive.policy(params["actor"], obs, activation)
    gain = (advantage * rederive.log_prob(policy, action)).mean()
    error = (0.5 * (rederive.value(params["critic"], obs, activation) - target) ** 2).mean()
    entropy = rederive.entropy(policy).mean()
    metrics = {"loss/policy": -gain, "loss/value": error, "policy/entropy": entropy}
    return -(gain - vf_coef * error + ent_coef * entropy), metrics


SLOPE = rederive.in_64_bits(jax.grad(loss, has_aux=True), static=(4,))


class Rederived(rederive.OnPolicy):
    """The paper's update, with RMSprop on the two networks together."""

    def __init__(self, key: jax.Array, start: a2c.TrainState, config: a2c.Config) -> None:
        super().__init__(key, start, config)
        self.optimizer = rederive.RmsProp(decay=0.99, eps=1e-5, start=1.0)

    def update(self, key: jax.Array) -> dict[str, float]:
        config = self.config
        batch, episodes = self.collect(key)
        weights = config.vf_coef, config.ent_coef
        gradient, metrics = SLOPE(self.params, batch, *weights, config.activation)
        gradient = rederive.clipped(rederive.flat(gradient), config.max_grad_norm)
        rate = rederive.rate(config, config.learning_rate, self.finished)
        moved = rederive.flat(self.params) + self.optimizer.step(gradient, rate)
        self.params = rederive.like(moved, self.params)
        self.finished += 1
        return {**episodes, **metrics}

    def assert_close(self, state: a2c.TrainState, what: str) -> None:
        super().assert_close(state, what)
        self.optimizer.assert_close(state.opt_state, what)


@pytest.mark.parametrize(
    "config",
    [
        DISCRETE,
        dataclasses.replace(DISCRETE, max_grad_norm=0.05, ent_coef=0.3, gae_lambda=0.3),
        CONTINUOUS,
    ],
    ids=["discrete", "clipped", "continuous"],
)
def test_three_updates_against_a_loop(config: a2c.Config) -> None:
    rederive.assert_three_updates(a2c, Rederived, config)


def test_train_folds_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rederive.assert_trains(a2c, DISCRETE, monkeypatch)


@pytest.mark.fast
def test_one_sample_leaves_no_advantage_to_normalise() -> None:
    alone = dataclasses.replace(DISCRETE, num_envs=1, num_steps=1, normalize_advantage=True)
    with pytest.raises(InputError, match="normalize_advantage needs two samples"):
        a2c.check(alone)
