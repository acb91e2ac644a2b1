"""DDPG: three updates against an independent version of the paper's, and rejected settings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import rederive
import rederive_replay
from jax import random

from purejaxpg import InputError
from purejaxpg.agents import ddpg

rederive.register()

PLAIN = ddpg.Config(
    env=rederive.NAMES[False], hidden=(6, 4), learning_rate=3e-3, critic_learning_rate=8e-3,
    gamma=0.9, tau=0.3, noise_std=0.3, **rederive_replay.SIZES,
)  # fmt: skip
# The bounds are active some of the time.
SETTINGS = {
    "plain": PLAIN,
    "bounded": dataclasses.replace(
        PLAIN, noise_std=0.9, max_grad_norm=0.3, reward_scale=0.7, clip_reward=0.4, tau=0.8,
        gamma=0.6,
    ),
    "normalised, with Ornstein-Uhlenbeck noise": dataclasses.replace(
        PLAIN, exploration="ou", ou_theta=0.35, normalize_obs=True, clip_obs=0.8,
        learning_rate_schedule="linear", activation="tanh",
        env_params={"max_steps_in_episode": 3.0, "push": 1.2},
    ),
}  # fmt: skip
SMALL = ddpg.Config(
    total_timesteps=400, num_envs=4, num_steps=8, batch_size=16, replay_capacity=200,
    learning_starts=80,
)  # fmt: skip
POLICY = jax.jit(ddpg.policy, static_argnames="greedy", compiler_options=quick.OPTIONS)


def given() -> dict[str, Any]:
    """Networks, and targets that differ from them."""
    generator = np.random.default_rng(2)

    def networks() -> dict[str, Any]:
        return {
            "actor": rederive_replay.network(generator, 3, 6, 4, 2),
            "critic": rederive_replay.network(generator, 3 + 2, 6, 4, 1),
        }

    return {"params": networks(), "target_params": networks()}


def mu(actor: Any, obs: Any, activation: str) -> jax.Array:
    """μ(s) [..., 2]."""
    return jnp.tanh(rederive.mlp(actor, obs, activation))


def q(critic: Any, obs: Any, action: Any, activation: str) -> jax.Array:
    """Q(s, a) [...]."""
    return rederive.mlp(critic, jnp.concatenate([obs, action], -1), activation)[..., 0]


def critic_slope(critic: Any, target: Any, batch: Any, gamma: Any, activation: str) -> Any:
    """Loss of the critic, and its gradient."""
    obs, following = batch["obs"], batch["next_obs"]
    next_action = mu(target["actor"], following, activation)
    next_value = q(target["critic"], following, next_action, activation)
    y = batch["reward"] + gamma * jnp.where(batch["terminated"], 0.0, next_value)

    def loss(critic: Any) -> jax.Array:
        return jnp.mean((y - q(critic, obs, batch["action"], activation)) ** 2) / 2

    return jax.value_and_grad(loss)(critic)


def actor_slope(actor: Any, critic: Any, obs: Any, activation: str) -> Any:
    """Loss of the actor, and its gradient by the chain rule: the paper's equation 6."""
    action, through_actor = jax.vjp(lambda actor: mu(actor, obs, activation), actor)
    value, through_critic = jax.vjp(lambda action: q(critic, obs, action, activation), action)
    (slope,) = through_critic(-jnp.ones(len(obs)) / len(obs))
    return -value.mean(), through_actor(slope)[0]


MU = rederive.in_64_bits(mu, static=(2,))
CRITIC_SLOPE = rederive.in_64_bits(critic_slope, static=(4,))
ACTOR_SLOPE = rederive.in_64_bits(actor_slope, static=(3,))


class Rederived(rederive_replay.OffPolicy):
    """Lillicrap et al. 2015, algorithm 1, with the departures that the agent lists."""

    targets = "target_params"

    def __init__(self, key: jax.Array, config: ddpg.Config, given: dict[str, Any]) -> None:
        self.noise = np.zeros((config.num_envs, 2))
        super().__init__(key, config, given)

    def at_random(self, key: jax.Array) -> np.ndarray:
        return np.asarray(random.uniform(key, self.noise.shape, minval=-1.0), np.float64)

    def act(self, key: jax.Array, obs: np.ndarray) -> np.ndarray:
        config = self.config
        drawn = config.noise_std * np.asarray(random.normal(key, self.noise.shape), np.float64)
        before = self.noise_before()
        remembered = before - config.ou_theta * before if config.exploration == "ou" else 0.0
        self.noise = remembered + drawn
        return np.clip(MU(self.params("actor"), obs, config.activation) + self.noise, -1.0, 1.0)

    def noise_before(self) -> np.ndarray:
        """The noise of the last step, 0 if a new episode starts."""
        return np.where(self.world.time[:, None] == 0, 0.0, self.noise)

    def gradient_step(self, key: jax.Array) -> dict[str, float]:
        """Critic, then actor through the new critic, then both targets."""
        config, batch = self.config, self.sample(key)
        value_loss, gradient = CRITIC_SLOPE(
            self.params("critic"), self.target, batch, config.gamma, config.activation
        )
        self.descend("critic", gradient)
        policy_loss, gradient = ACTOR_SLOPE(
            self.params("actor"), self.params("critic"), batch["obs"], config.activation
        )
        self.descend("actor", gradient)
        self.follow({name: self.params(name) for name in self.learners})
        return {"loss/policy": policy_loss, "loss/value": value_loss}

    def assert_data(self, state: ddpg.TrainState, what: str) -> None:
        super().assert_data(state, what)
        rederive.assert_close(state.noise, self.noise_before(), f"{what}: noise")


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_updates_are_those_of_the_paper(setting: str) -> None:
    """The resulting policy has no noise, and stretches its actions to the bounds."""
    config = SETTINGS[setting]
    start, state, expected = rederive_replay.assert_three_updates(ddpg, Rederived, config, given())
    gains = {"actor": 0.01, "critic": 1.0}
    rederive_replay.assert_new(start, given(), gains, ddpg.Actor(config))
    jax.tree.map(np.testing.assert_array_equal, start.params, start.target_params)
    obs = np.random.default_rng(0).normal(size=(20, 3))
    seen = expected.normalizers.seen(obs)
    action = rederive_replay.stretched(MU(expected.params("actor"), seen, config.activation))
    for greedy in (False, True):
        got = POLICY(random.key(4), state, obs, config, greedy=greedy)
        rederive.assert_close(got, action, "policy")


def test_a_run_folds_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rederive_replay.assert_train_folds_its_key(ddpg, PLAIN, monkeypatch)


def test_no_gradient_reaches_the_target_networks() -> None:
    """An update never needs this gradient, but a fork may differentiate more than the critic."""
    networks, steps = given(), np.ones(7, np.float32)
    batch = ddpg.Transition(np.ones((7, 3)), np.ones((7, 2)), steps, steps > 1.0, np.ones((7, 3)))
    gradient = jax.jit(jax.grad(ddpg.critic_loss, argnums=1), compiler_options=quick.OPTIONS)(
        networks["params"]["critic"], networks["target_params"], batch, PLAIN
    )
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


@pytest.mark.fast
def test_random_steps_count_as_training() -> None:
    assert SMALL.num_updates == (400 - 80) // 32


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"env": "CartPole-v1"}, ["CartPole-v1", "discrete", "DDPG", "continuous"]),
        ({"replay_capacity": 15}, ["replay_capacity", "16", "15"]),
        ({"replay_capacity": 60}, ["replay_capacity", "60", "learning_starts", "80"]),
        ({"learning_starts": 200, "total_timesteps": 200}, ["learning_starts", "total_timesteps"]),
        ({"learning_starts": 188, "total_timesteps": 200}, ["total_timesteps", "32", "188", "200"]),
        ({"learning_starts": 3}, ["learning_starts", "num_envs", "3"]),
        ({"noise_std": float("inf")}, ["noise_std", "finite"]),
        ({"exploration": "pink"}, ["exploration", "'gaussian'", "'ou'", "'pink'"]),
        ({"tau": 1.5}, ["tau", "1.5"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"num_gradient_steps": 0}, ["num_gradient_steps", "0"]),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ddpg.check(dataclasses.replace(SMALL, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.fast
@pytest.mark.parametrize("torque", [0.0, -2.0])
def test_bounds_are_those_of_the_environment_as_it_is_set(torque: float) -> None:
    config = dataclasses.replace(SMALL, env_params={"max_torque": torque})
    with pytest.raises(InputError, match="needs finite bounds, the lower below the upper"):
        ddpg.check(config)
