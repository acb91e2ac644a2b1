"""What is special to DDPG: the buffer's contents, targets, exploration, and what moves what."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError, envs
from purejaxpg.agents import ddpg

TINY = ddpg.Config(
    total_timesteps=400, num_envs=4, num_steps=8, num_gradient_steps=3, batch_size=16,
    replay_capacity=200, learning_starts=80, hidden=(8, 8),
    env_params={"max_steps_in_episode": 5.0},
)  # fmt: skip
INIT, UPDATE = jax.jit(ddpg.init), jax.jit(ddpg.update)
SAMPLE, EXPLORE = jax.jit(ddpg.sample), jax.jit(ddpg.explore)


def stored(state: ddpg.TrainState) -> ddpg.Transition:
    """Every transition in the buffer, in the order of its rows."""
    return jax.tree.map(lambda x: x[: int(state.buffer.size)], state.buffer.storage)


def equal(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_warm_up_fills_the_buffer_with_uniform_actions() -> None:
    config = dataclasses.replace(
        TINY, learning_starts=4_000, total_timesteps=5_000, replay_capacity=4_000
    )
    state = INIT(random.key(0), config)
    assert int(state.buffer.size) == 4_000
    action = np.sort(np.asarray(stored(state).action)[:, 0])
    uniform = np.linspace(-1, 1, 4_000)
    assert np.abs(action - uniform).max() < 2 * 1.95 / np.sqrt(4_000)  # Kolmogorov, p < 0.001
    assert int(state.num_updates) == 0


def test_buffer_holds_what_happened() -> None:
    """Transitions of consecutive steps fit together, and a time limit is no end."""
    state = INIT(random.key(0), TINY)
    rows = stored(state)
    obs, next_obs = (np.asarray(x).reshape(-1, TINY.num_envs, 3) for x in (rows.obs, rows.next_obs))
    # Every fifth step ends an episode by the time limit: only there does the next row differ.
    for t in range(len(obs) - 1):
        follows = np.allclose(next_obs[t], obs[t + 1])
        assert follows == (t % 5 != 4)
    assert not np.asarray(rows.terminated).any()
    # The action is stored in [-1, 1], and the environment has got it in its own unit: the reward of
    # Pendulum is -(angle^2 + 0.1 speed^2 + 0.001 torque^2), with a torque of at most 2.
    angle = np.arctan2(rows.obs[:, 1], rows.obs[:, 0])
    cost = angle**2 + 0.1 * rows.obs[:, 2] ** 2 + 0.001 * (2.0 * rows.action[:, 0]) ** 2
    np.testing.assert_allclose(rows.reward, -cost, rtol=1e-3, atol=1e-3)


def test_target_is_the_reward_and_the_discounted_value_unless_terminated() -> None:
    state = INIT(random.key(0), TINY)
    batch = SAMPLE(random.key(1), state, TINY)
    batch = batch.replace(terminated=jnp.arange(TINY.batch_size) % 2 == 0)
    params, target_params = state.params, jax.tree.map(lambda x: 0.5 * x, state.params)
    loss = ddpg.critic_loss(params["critic"], target_params, batch, TINY)
    action = ddpg.Actor(TINY).apply(target_params["actor"], batch.next_obs)
    after = ddpg.Critic(TINY).apply(target_params["critic"], batch.next_obs, action)
    target = batch.reward + TINY.gamma * np.where(batch.terminated, 0.0, after)
    value = ddpg.Critic(TINY).apply(params["critic"], batch.obs, batch.action)
    assert float(loss) == pytest.approx(float(np.mean(0.5 * (value - target) ** 2)), rel=1e-4)


def test_no_gradient_reaches_the_target_networks() -> None:
    state = INIT(random.key(0), TINY)
    batch = SAMPLE(random.key(1), state, TINY)
    gradient = jax.jit(jax.grad(ddpg.critic_loss, argnums=1))(
        state.params["critic"], state.target_params, batch, TINY
    )
    assert all(float(jnp.abs(x).max()) == 0.0 for x in jax.tree.leaves(gradient))


def test_actor_climbs_the_value() -> None:
    """Gradient of the loss against the chain rule, and a small step raises Q."""
    state = INIT(random.key(0), TINY)
    batch = SAMPLE(random.key(1), state, TINY)
    actor, critic = state.params["actor"], state.params["critic"]
    gradient = jax.grad(ddpg.actor_loss)(actor, critic, batch, TINY)
    action, pull = jax.vjp(lambda a: ddpg.Actor(TINY).apply(a, batch.obs), actor)
    slope = jax.grad(lambda a: ddpg.Critic(TINY).apply(critic, batch.obs, a).sum())(action)
    (chain,) = pull(-slope / TINY.batch_size)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(chain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    moved = jax.tree.map(lambda p, g: p - 1e-2 * g, actor, gradient)
    before, after = (ddpg.actor_loss(a, critic, batch, TINY) for a in (actor, moved))
    assert float(after) < float(before)


@pytest.mark.parametrize("tau", [0.0, 0.2, 1.0])
def test_targets_approach_the_online_networks_after_every_gradient_step(tau: float) -> None:
    """With the online networks held still: 1 - (1 - tau)^k of the way after k steps."""
    config = dataclasses.replace(TINY, tau=tau, learning_rate=0.0, critic_learning_rate=0.0)
    state = INIT(random.key(0), config)
    start = jax.tree.map(lambda x: x + 1.0, state.params)
    state = state.replace(target_params=start)
    after, _ = UPDATE(random.key(1), state, config)
    assert equal(after.params, state.params)
    left = (1.0 - tau) ** config.num_gradient_steps
    for online, target in zip(
        *map(jax.tree.leaves, (after.params, after.target_params)), strict=True
    ):
        np.testing.assert_allclose(target, online + left, rtol=1e-5, atol=1e-5)


def test_gaussian_noise_is_independent_and_added_before_the_bound() -> None:
    config = dataclasses.replace(TINY, num_envs=5000, noise_std=0.3)
    state = INIT(random.key(0), TINY)
    obs, old = jnp.zeros((5000, 3)), jnp.full((5000, 1), 9.0)
    action, noise = EXPLORE(random.key(1), state, obs, old, config)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)
    assert abs(float(noise.mean())) < 0.02  # nothing of the old noise
    mean = ddpg.Actor(config).apply(state.params["actor"], obs)
    np.testing.assert_allclose(action, jnp.clip(mean + noise, -1, 1), atol=1e-6)
    loud, _ = EXPLORE(random.key(1), state, obs, old, dataclasses.replace(config, noise_std=3.0))
    assert float(jnp.abs(loud).max()) == 1.0


def test_ornstein_uhlenbeck_noise_remembers_and_starts_from_zero_in_every_episode() -> None:
    config = dataclasses.replace(TINY, exploration="ou", ou_theta=0.15, noise_std=0.2)
    state = INIT(random.key(0), config)
    obs, noise = jnp.zeros((4, 3)), jnp.zeros((4, 1))

    def step(noise: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, noise = EXPLORE(key, state, obs, noise, config)
        return noise, noise[:, 0]

    _, series = jax.lax.scan(step, noise, random.split(random.key(1), 2000))
    series = np.asarray(series)[100:]
    # An autoregression of order one: variance and correlation in closed form.
    assert series.std() == pytest.approx(0.2 / np.sqrt(1 - 0.85**2), rel=0.1)
    correlation = np.mean(series[1:] * series[:-1]) / series.var()
    assert correlation == pytest.approx(0.85, abs=0.03)
    state, _ = ddpg.interact(random.key(2), state, config, 5)  # to the time limit
    assert float(jnp.abs(state.noise).max()) == 0.0
    state, _ = ddpg.interact(random.key(3), state, config, 2)
    assert float(jnp.abs(state.noise).min()) > 0.0


def test_rewards_are_scaled_and_clipped_as_they_are_learnt_from() -> None:
    """The buffer keeps them raw, so the options may be swept over one kind of data."""
    config = dataclasses.replace(TINY, reward_scale=0.5, clip_reward=1.0)
    plain = SAMPLE(random.key(1), INIT(random.key(0), TINY), TINY)
    scaled = SAMPLE(random.key(1), INIT(random.key(0), config), config)
    np.testing.assert_allclose(scaled.reward, jnp.clip(0.5 * plain.reward, -1.0, 1.0), rtol=1e-6)
    assert float(scaled.reward.min()) == -1.0


def test_policy_is_deterministic_and_within_the_bounds() -> None:
    state = INIT(random.key(0), TINY)
    obs = 10.0 * random.normal(random.key(1), (100, 3))
    actions = [ddpg.policy(random.key(k), state, obs, TINY, greedy=bool(k)) for k in (0, 1)]
    assert equal(*actions)
    wide = jax.tree.map(lambda x: 100.0 * x, state.params)
    extreme = ddpg.policy(random.key(0), state.replace(params=wide), obs, TINY)
    assert float(jnp.abs(extreme).max()) == pytest.approx(2.0)  # Pendulum's bound
    assert envs.action_bounds(*envs.setup(TINY))[1].tolist() == [2.0]


@pytest.mark.fast
def test_random_steps_count_as_training() -> None:
    assert TINY.num_updates == (400 - 80) // 32


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
        ddpg.check(dataclasses.replace(TINY, env_params={}, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.fast
@pytest.mark.parametrize("torque", [0.0, -2.0])
def test_bounds_are_those_of_the_environment_as_it_is_set(torque: float) -> None:
    config = dataclasses.replace(TINY, env_params={"max_torque": torque})
    with pytest.raises(InputError, match="needs finite bounds, the lower below the upper"):
        ddpg.check(config)
