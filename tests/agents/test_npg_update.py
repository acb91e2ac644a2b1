"""Three updates of NPG, written a second time in 64 bits, with the Fisher information in full."""

import dataclasses

import numpy as np
import pytest
import rederive

from purejaxpg.agents import npg

rederive.register()
DISCRETE = npg.Config(
    env=rederive.NAMES[True], total_timesteps=84, num_envs=4, num_steps=7, num_epochs=2,
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
