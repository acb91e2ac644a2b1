"""Three updates of TRPO, written a second time in 64 bits, with the Fisher information in full."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import rederive

from purejaxpg.agents import trpo

rederive.register()
DISCRETE = trpo.Config(
    env=rederive.NAMES[True], total_timesteps=84, num_envs=4, num_steps=7, num_epochs=2,
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


# So far that the model of the divergence does not hold. Few iterations of conjugate gradient, as
# above: with so little damping, more of them would show the rounding of 32 bits.
REFUSED = dataclasses.replace(CONTINUOUS, max_kl=12.0, cg_damping=1e-3)


class Rederived(rederive.NaturalGradient):
    """The natural gradient's step, shortened until the constraint holds and L has improved."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.times: list[int] = []  # that each step was shortened; -1 where none was taken

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
