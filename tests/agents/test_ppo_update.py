"""Three updates of PPO against an independent 64-bit version."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rederive
from jax import random

from purejaxpg import prng
from purejaxpg.agents import ppo

rederive.register()
INF = float("inf")
# Eight gradient steps an update. The last of these updates has a learning rate above zero.
STANDARD = ppo.Config(
    env=rederive.NAMES[True], env_params={"push": 1.0, "max_steps_in_episode": 4.0},
    total_timesteps=112, num_envs=4, num_steps=7, num_epochs=2, hidden=(5, 3),
)  # fmt: skip
CLIPPED = dataclasses.replace(
    STANDARD, env_params={"push": 1.2, "max_steps_in_episode": 3.0}, learning_rate=0.02, gamma=0.8,
    gae_lambda=0.6, clip_eps=0.05, vf_clip_eps=0.05, vf_coef=0.9, ent_coef=0.1, max_grad_norm=0.3,
    reward_scale=1.5, clip_reward=1.1,
)  # fmt: skip
STOPPED = dataclasses.replace(CLIPPED, max_kl=0.002, max_grad_norm=INF)
# Continuous actions carry rounding errors into all later steps, and Adam enlarges them if a
# gradient is near zero. Small steps keep them at a tenth of the tolerance.
CONTINUOUS = dataclasses.replace(
    CLIPPED, env=rederive.NAMES[False], activation="silu", orthogonal_init=False,
    learning_rate=0.002, learning_rate_schedule="robbins_monro", learning_rate_half_life=2.0,
    normalize_advantage=False, normalize_obs=True, normalize_reward=True, clip_obs=1.2,
    clip_eps=0.01, vf_clip_eps=0.01, initial_log_std=-0.5,
)  # fmt: skip
PENALTY = dataclasses.replace(
    CONTINUOUS, env_params={}, surrogate="kl_penalty", learning_rate_schedule="constant",
    normalize_advantage=True, normalize_reward=False, kl_coef=0.7, target_kl=0.001,
    max_grad_norm=INF,
)  # fmt: skip
# Each with the options that must have an effect in it, or it would test nothing.
SETTINGS: dict[str, tuple[ppo.Config, set[str]]] = {
    "standard": (STANDARD, {"max_grad_norm"}),
    "clipped": (CLIPPED, {"clip_eps", "vf_clip_eps", "max_grad_norm"}),
    "stopped": (STOPPED, {"max_kl", "later KL below max_kl"}),
    "continuous": (CONTINUOUS, {"clip_eps", "vf_clip_eps", "max_grad_norm", "clip_obs"}),
    "penalty": (PENALTY, {"β doubled", "β kept", "β halved", "clip_obs"}),
}


def loss(params: Any, old: Any, beta: Any, batch: rederive.Batch, config: ppo.Config) -> Any:
    """Minus the L(θ) of the module's docstring, and the metrics of an update."""
    before, policy = (
        rederive.policy(p["actor"], batch.obs, config.activation) for p in (old, params)
    )
    log_ratio = rederive.log_prob(policy, batch.action) - rederive.log_prob(before, batch.action)
    ratio, advantage = jnp.exp(log_ratio), batch.advantage
    if config.normalize_advantage:
        centred = advantage - advantage.mean()
        advantage = centred / (jnp.sqrt((centred**2).mean()) + 1e-8)
    if config.surrogate == "clip":
        near = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
        gain = jnp.minimum(ratio * advantage, near * advantage).mean()
    else:
        gain = (ratio * advantage - beta * rederive.kl(before, policy)).mean()
    old_value, value = (
        rederive.value(p["critic"], batch.obs, config.activation) for p in (old, params)
    )
    step = jnp.clip(value - old_value, -config.vf_clip_eps, config.vf_clip_eps)
    errors = value - batch.target, old_value + step - batch.target
    error = (0.5 * jnp.maximum(errors[0] ** 2, errors[1] ** 2)).mean()
    entropy = rederive.entropy(policy).mean()
    metrics = {
        "loss/policy": -gain,
        "loss/value": error,
        "policy/entropy": entropy,
        "policy/kl": (ratio - 1 - log_ratio).mean(),
        "policy/kl_coef": beta,
        "policy/clip_fraction": (jnp.abs(ratio - 1) > config.clip_eps).mean(),
        "values clipped": (jnp.abs(value - old_value) > config.vf_clip_eps).mean(),
    }
    return -(gain - config.vf_coef * error + config.ent_coef * entropy), metrics


def divergence(old: Any, new: Any, obs: Any, config: ppo.Config) -> jax.Array:
    before, after = (rederive.policy(p["actor"], obs, config.activation) for p in (old, new))
    return rederive.kl(before, after).mean()


SLOPE = rederive.in_64_bits(jax.grad(loss, has_aux=True))
DIVERGENCE = rederive.in_64_bits(divergence)


class Rederived(rederive.OnPolicy):
    """The paper's update, with Adam on the two networks together."""

    def __init__(self, key: jax.Array, start: ppo.TrainState, config: ppo.Config) -> None:
        # `loss` normalises advantages within each minibatch, not over all data.
        super().__init__(key, start, dataclasses.replace(config, normalize_advantage=False))
        self.in_loss = config
        self.optimizer, self.beta = rederive.Adam(eps=1e-5), config.kl_coef
        self.effects: set[str] = set()  # of options, so far

    def update(self, key: jax.Array) -> dict[str, float]:
        key_rollout, key_shuffle = random.split(key)
        old = self.params
        batch, episodes = self.collect(key_rollout)
        self.note("clip_obs", np.abs(batch.obs).max() == self.config.clip_obs)
        reports, stopped = [], False
        for now in random.split(key_shuffle, self.config.num_epochs):
            order = np.asarray(prng.permutation(now, len(batch.target)))
            for chosen in np.split(order, self.config.num_minibatches):
                picked = rederive.Batch(*(x[chosen] for x in batch))
                gradient, report = SLOPE(self.params, old, self.beta, picked, self.in_loss)
                exceeded = report["policy/kl"] > self.config.max_kl
                self.note("later KL below max_kl", stopped and not exceeded)
                stopped = stopped or exceeded
                if not stopped:
                    self.step(rederive.flat(gradient))
                reports.append({**report, "policy/stopped": float(stopped)})
        self.adapt(DIVERGENCE(old, self.params, batch.obs, self.config) / self.config.target_kl)
        self.finished += 1
        return {**episodes, **self.averaged(reports)}

    def step(self, gradient: np.ndarray) -> None:
        short = rederive.clipped(gradient, self.config.max_grad_norm)
        self.note("max_grad_norm", not np.array_equal(short, gradient))
        rate = rederive.rate(self.config, self.config.learning_rate, self.finished)
        moved = rederive.flat(self.params) + self.optimizer.step(short, rate)
        self.params = rederive.like(moved, self.params)

    def adapt(self, kl: float) -> None:
        """Adapt β to the divergence of the whole update, in units of the target."""
        if self.config.surrogate == "clip":
            return
        factor = 2.0 if kl > 1.5 else 0.5 if kl < 1 / 1.5 else 1.0
        self.note({2.0: "β doubled", 1.0: "β kept", 0.5: "β halved"}[factor], True)
        self.beta *= factor

    def averaged(self, reports: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics of the gradient steps -> those of the update."""
        means = {name: np.mean([report[name] for report in reports]) for name in reports[0]}
        self.note("clip_eps", 0 < means["policy/clip_fraction"] < 1)
        self.note("vf_clip_eps", 0 < means.pop("values clipped") < 1)
        self.note("max_kl", 0 < means["policy/stopped"] < 1)
        return means

    def note(self, effect: str, seen: Any) -> None:
        self.effects |= {effect} if seen else set()

    def assert_close(self, state: ppo.TrainState, what: str) -> None:
        super().assert_close(state, what)
        self.optimizer.assert_close(state.opt_state, what)
        assert float(state.kl_coef) == pytest.approx(self.beta, rel=1e-6), what


KEY = random.key(10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_updates_against_a_loop(setting: str) -> None:
    config, effects = SETTINGS[setting]
    states, metrics = rederive.trained(ppo, KEY, config)
    rederive.assert_initial(ppo, KEY, states[0].params, config, keys=4)
    expected = Rederived(KEY, states[0], config)
    expected.assert_close(states[0], "start")
    for u in (1, 2, 3):
        wanted = expected.update(random.fold_in(KEY, u))
        rederive.assert_metrics(metrics[u - 1], wanted, f"update {u}")
        expected.assert_close(states[u], f"update {u}")
    rederive.assert_acts(ppo, states[-1], expected)
    assert effects <= expected.effects


def test_train_folds_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rederive.assert_trains(ppo, STANDARD, monkeypatch)
