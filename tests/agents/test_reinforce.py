"""REINFORCE: three updates against an independent 64-bit version, one episode at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
import quick
import rederive
from jax import random

from purejaxpg import InputError, envs
from purejaxpg.agents import reinforce

rederive.register()
DISCRETE = reinforce.Config(
    env=rederive.NAMES[True], total_timesteps=48, num_envs=4, hidden=(5, 3), num_critic_steps=3,
    learning_rate=0.02, critic_learning_rate=0.01, gamma=0.9,
)  # fmt: skip
# Room for more than an episode: steps after its end must not count.
CONTINUOUS = dataclasses.replace(
    DISCRETE, env=rederive.NAMES[False], total_timesteps=60, max_steps=5, weight_by_discount=True,
    activation="silu", orthogonal_init=False, learning_rate_schedule="robbins_monro",
    learning_rate_half_life=2.0, normalize_advantage=True, normalize_obs=True,
    normalize_reward=True, ent_coef=0.1, clip_obs=1.2, reward_scale=1.5, clip_reward=1.1,
    initial_log_std=-0.5, env_params={"push": 0.8, "max_steps_in_episode": 3},
)  # fmt: skip
TOTAL = dataclasses.replace(DISCRETE, reward_to_go=False)
ALONE = dataclasses.replace(TOTAL, baseline=False, learning_rate_schedule="constant")


def objective(actor: Any, batch: Any, valid: Any, ent_coef: Any, activation: str) -> Any:
    """The objective, whose gradient is the g of the module's docstring, and metrics."""
    policy = rederive.policy(actor, batch.obs, activation)
    log_prob = rederive.log_prob(policy, batch.action) * valid
    entropy = rederive.entropy(policy) * valid
    gain = (batch.advantage * log_prob).sum(0).mean()
    metrics = {"loss/policy": -gain, "policy/entropy": entropy.sum() / valid.sum()}
    return gain + ent_coef * entropy.sum(0).mean(), metrics


def error(critic: Any, batch: Any, valid: Any, activation: str) -> jax.Array:
    """Mean of ½ (V - G)² over the valid steps."""
    off = rederive.value(critic, batch.obs, activation) - batch.target
    return (0.5 * off**2 * valid).sum() / valid.sum()


ASCENT = rederive.in_64_bits(jax.grad(objective, has_aux=True), static=(4,))
DESCENT = rederive.in_64_bits(jax.value_and_grad(error), static=(3,))


class Rederived:
    """REINFORCE from the state of `init` on."""

    def __init__(self, key: jax.Array, start: reinforce.TrainState, config: Any) -> None:
        self.config, self.params, self.finished = config, start.params, 0
        self.normalizers = rederive.Normalizers(config)
        self.optimizers = {name: rederive.Adam(eps=1e-5) for name in ("actor", "critic")}
        if config.normalize_obs:
            _, _, key_moments = random.split(random.fold_in(key, 0), 3)
            rows, valid = self.episodes(key_moments)
            self.normalizers.observe(rows.obs[valid])

    def episodes(self, key: jax.Array) -> tuple[rederive.Row, np.ndarray]:
        """Play from the start -> rows [T, N], and a mask of the first episodes [T, N]."""
        config = self.config

        def act(obs: np.ndarray) -> rederive.Policy:
            seen = self.normalizers.seen(obs)
            return rederive.policy_in_64_bits(self.params["actor"], seen, config.activation)

        discrete = config.env == rederive.NAMES[True]
        world = rederive.World(config.num_envs, discrete, config.env_params)
        _, key_steps = random.split(key)
        rows = rederive.play(key_steps, act, world, config.max_steps or rederive.LIMIT)
        ends = rows.done.argmax(0)
        return rows, np.arange(len(rows.done))[:, None] <= ends

    def returns(self, reward: np.ndarray, rows: rederive.Row, after: np.ndarray) -> np.ndarray:
        """G [T, N], from values `after` each step; zero beyond the end of an episode."""
        to_go = np.zeros(reward.shape)
        for n, end in enumerate(rows.done.argmax(0)):
            later = 0.0 if rows.terminated[end, n] else after[end, n]
            for t in reversed(range(end + 1)):
                later = reward[t, n] + self.config.gamma * later
                to_go[t, n] = later
        return to_go

    def batch(self, rows: rederive.Row, valid: np.ndarray) -> rederive.Batch:
        config, normalizers = self.config, self.normalizers
        obs, next_obs = normalizers.seen(rows.obs), normalizers.seen(rows.next_obs)
        normalizers.running = np.zeros(config.num_envs)
        reward = normalizers.rewards(rows.reward, rows.done, valid)
        normalizers.observe(rows.obs[valid])
        value, after = (
            config.baseline * rederive.value_in_64_bits(self.params["critic"], x, config.activation)
            for x in (obs, next_obs)
        )
        target = self.returns(reward, rows, after)
        weight = (target if config.reward_to_go else target[0]) - value
        if config.normalize_advantage:
            weight = rederive.standardised(weight, valid)
        if config.weight_by_discount:
            weight = weight * config.gamma ** np.arange(len(weight))[:, None]
        return rederive.Batch(obs, rows.action, weight, target)

    def moved(self, name: str, gradient: Any, learning_rate: float) -> Any:
        """Parameters after a step of Adam."""
        gradient = rederive.clipped(rederive.flat(gradient), self.config.max_grad_norm)
        rate = rederive.rate(self.config, learning_rate, self.finished)
        change = self.optimizers[name].step(gradient, rate)
        return rederive.like(rederive.flat(self.params[name]) + change, self.params[name])

    def update(self, key: jax.Array) -> dict[str, float]:
        config = self.config
        rows, valid = self.episodes(key)
        batch = self.batch(rows, valid)
        rest = batch, valid.astype(float), config.ent_coef, config.activation
        gradient, metrics = ASCENT(self.params["actor"], *rest)
        descent = -rederive.flat(gradient)
        self.params = {**self.params, "actor": self.moved("actor", descent, config.learning_rate)}
        losses = []
        for _ in range(config.num_critic_steps if config.baseline else 0):
            loss, gradient = DESCENT(self.params["critic"], *rest[:2], config.activation)
            critic = self.moved("critic", gradient, config.critic_learning_rate)
            self.params = {**self.params, "critic": critic}
            losses.append(loss)
        self.finished += 1
        fitted = {"loss/value": np.mean(losses)} if losses else {}
        return {**rederive.episode_metrics(rows, valid), **metrics, **fitted}

    def assert_close(self, state: reinforce.TrainState, what: str) -> None:
        for name, optimizer in self.optimizers.items():
            got, wanted = (rederive.flat(x[name]) for x in (state.params, self.params))
            rederive.assert_close(got, wanted, f"{what}: {name}")
            optimizer.assert_close(state.opt_state[name], f"{what}: {name}")
        self.normalizers.assert_close(state.normalizers, what)
        assert int(state.num_updates) == self.finished, what


@pytest.mark.parametrize(
    "config",
    [DISCRETE, dataclasses.replace(DISCRETE, max_grad_norm=0.5, ent_coef=0.3), CONTINUOUS, TOTAL,
     ALONE],
    ids=["discrete", "clipped", "continuous", "total", "alone"],
)  # fmt: skip
def test_three_updates_against_a_loop(config: reinforce.Config) -> None:
    rederive.assert_three_updates(reinforce, Rederived, config, keys=3)


def test_train_folds_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rederive.assert_trains(reinforce, DISCRETE, monkeypatch)


# --- whole episodes, and rejected settings --------------------------------------------------------


TINY = reinforce.Config(
    total_timesteps=256, num_envs=8, max_steps=20, hidden=(8, 8), num_critic_steps=2,
    env_params={"max_steps_in_episode": 20.0},
)  # fmt: skip


class Lottery(probes.Probe):
    """Reward 1 a step; an episode lasts 1 step or 7, drawn at its start and seen."""

    def first_obs(self, key: jax.Array) -> jax.Array:
        return jnp.where(random.bernoulli(key, 0.5, (1,)), 1.0, 7.0)

    def outcome(self, state: probes.State, action: jax.Array) -> Any:
        return jnp.ones(()), state.time + 1 >= state.obs[0], state.obs


def test_short_episodes_do_not_count_more() -> None:
    """Half of the episodes last 7 steps. Among those that end within 10 steps, far fewer do."""
    envs.register("Lottery", Lottery)
    config = dataclasses.replace(
        TINY, env="Lottery", num_envs=4000, max_steps=10, env_params={}, total_timesteps=40_000
    )
    reinforce.check(config)
    state = jax.jit(reinforce.init, compiler_options=quick.OPTIONS)(random.key(0), config)
    transition, metrics = jax.jit(reinforce.rollout, compiler_options=quick.OPTIONS)(
        random.key(1), state, config
    )
    mean = float(metrics["episode/return_sum"] / metrics["episode/count"])
    assert mean == pytest.approx(4.0, abs=5 * 3.0 / np.sqrt(4000))  # five standard errors
    lengths = np.asarray(transition.obs[..., 0])[np.asarray(transition.done)]
    assert lengths.mean() < 3.4  # the mean if every completed episode counted


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_steps": 19}, ["max_steps", "20", "CartPole-v1", "19", "max_steps_in_episode"]),
        ({"max_steps": -1}, ["max_steps", "-1"]),
        ({"env_params": {"max_steps_in_episode": 30.0}}, ["max_steps", "30", "20"]),
        (
            {"weight_by_discount": True, "reward_to_go": False},
            ["weight_by_discount", "reward_to_go"],
        ),
        ({"num_critic_steps": 0}, ["num_critic_steps", "1 or more", "0"]),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        reinforce.check(dataclasses.replace(TINY, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.fast
def test_room_for_an_episode_is_the_time_limit_unless_said() -> None:
    assert reinforce.Config(env="Pendulum-v1").horizon == 200
    assert reinforce.Config(env="CartPole-v1", num_envs=3).steps_per_update == 1500
