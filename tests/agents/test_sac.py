"""What is special to SAC: two critics, the soft target, and the temperature."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.agents import sac

CONTINUOUS = sac.Config(
    total_timesteps=400, num_envs=4, num_steps=8, num_gradient_steps=3, batch_size=16,
    replay_capacity=200, learning_starts=80, hidden=(8, 8), alpha=0.3,
    env_params={"max_steps_in_episode": 5.0},
)  # fmt: skip
DISCRETE = dataclasses.replace(CONTINUOUS, env="CartPole-v1")
BOTH = pytest.mark.parametrize("config", [CONTINUOUS, DISCRETE], ids=["continuous", "discrete"])
INIT, UPDATE = jax.jit(sac.init), jax.jit(sac.update)
SAMPLE = jax.jit(sac.sample)
IMPROVE = jax.jit(jax.value_and_grad(sac.actor_loss, has_aux=True))


def sampled(config: sac.Config) -> tuple[sac.TrainState, sac.Transition]:
    state = INIT(random.key(0), config)
    return state, SAMPLE(random.key(1), state, config)


def equal(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@BOTH
def test_critics_are_two_and_start_apart(config: sac.Config) -> None:
    state, batch = sampled(config)
    first, second = (jax.tree.map(lambda x, i=i: x[i], state.params["critic"]) for i in (0, 1))
    assert not equal(first, second)
    both = sac.values(state.params["critic"], batch.obs, batch.action, config)
    assert both.shape == ((2, 16, 2) if config is DISCRETE else (2, 16))
    assert float(jnp.abs(both[0] - both[1]).min()) > 0.0
    alone = sac.Critic(config).apply(second, batch.obs, batch.action)
    np.testing.assert_allclose(both[1], alone, rtol=1e-5, atol=1e-6)


@BOTH
def test_both_critics_learn_one_target_with_the_lesser_value_and_the_entropy(
    config: sac.Config,
) -> None:
    state, batch = sampled(config)
    batch = batch.replace(terminated=jnp.arange(16) % 3 == 0)
    params, key = state.params, random.key(2)
    target_critic = jax.tree.map(lambda x: 0.7 * x, params["critic"])
    loss = sac.critic_loss(params["critic"], key, params, target_critic, batch, config)
    policy = sac.Actor(config).apply(params["actor"], batch.next_obs)
    if config is DISCRETE:
        chances = np.asarray(jax.nn.softmax(policy.logits), np.float64)
        lesser = np.asarray(sac.values(target_critic, batch.next_obs, batch.action, config)).min(0)
        soft = np.sum(chances * (lesser - 0.3 * np.log(chances)), axis=-1)
        rows = np.arange(16)
        value = sac.values(params["critic"], batch.obs, batch.action, config)[:, rows, batch.action]
    else:
        action, log_prob = policy.sample_and_log_prob(key)
        soft = sac.values(target_critic, batch.next_obs, action, config).min(0) - 0.3 * log_prob
        value = sac.values(params["critic"], batch.obs, batch.action, config)
    target = np.asarray(batch.reward + config.gamma * np.where(batch.terminated, 0.0, soft))
    expected = 0.5 * np.mean((np.asarray(value) - target) ** 2, axis=1).sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@BOTH
def test_what_moves_what(config: sac.Config) -> None:
    """The critic's loss moves no actor, target or temperature; the actor's no critic."""
    state, batch = sampled(config)
    gradient = jax.jit(jax.grad(sac.critic_loss, argnums=(2, 3)))(
        state.params["critic"], random.key(2), state.params, state.target_critic, batch, config
    )
    assert all(float(jnp.abs(x).max()) == 0.0 for x in jax.tree.leaves(gradient))
    frozen = dataclasses.replace(config, critic_learning_rate=0.0)
    after, _ = UPDATE(random.key(3), state, frozen)
    assert equal(after.params["critic"], state.params["critic"])
    assert not equal(after.params["actor"], state.params["actor"])


@BOTH
def test_actor_improves_on_its_objective(config: sac.Config) -> None:
    state, batch = sampled(config)
    rest = (random.key(2), state.params, batch, config)
    (before, entropy), gradient = IMPROVE(state.params["actor"], *rest)
    moved = jax.tree.map(lambda p, g: p - 1e-2 * g, state.params["actor"], gradient)
    (after, _), _ = IMPROVE(moved, *rest)
    assert float(after) < float(before)
    policy = sac.Actor(config).apply(state.params["actor"], batch.obs)
    if config is DISCRETE:
        assert float(entropy) == pytest.approx(float(policy.entropy().mean()), rel=1e-5)
    else:
        _, log_prob = policy.sample_and_log_prob(random.key(2))
        assert float(entropy) == pytest.approx(float(-log_prob.mean()), rel=1e-5)


@BOTH
@pytest.mark.parametrize("too_random", [True, False])
def test_temperature_rises_where_the_entropy_is_too_low(
    config: sac.Config, too_random: bool
) -> None:
    """A fresh policy has almost full entropy; the targets are far below it and far above."""
    share, per_dim = (0.0, -9.0) if too_random else (1.0, 9.0)
    config = dataclasses.replace(
        config, target_entropy_ratio=share, target_entropy_per_dim=per_dim, learning_rate=0.1
    )
    state = INIT(random.key(0), config)
    after, _ = UPDATE(random.key(1), state, config)
    moved = float(after.params["log_alpha"] - state.params["log_alpha"])
    assert (moved < -1e-4) if too_random else (moved > 1e-4)


def test_fixed_temperature_stays_to_the_last_bit() -> None:
    config = dataclasses.replace(CONTINUOUS, tune_alpha=False)
    state = INIT(random.key(0), CONTINUOUS)
    after, metrics = UPDATE(random.key(1), state, config)
    assert equal(after.params["log_alpha"], state.params["log_alpha"])
    assert float(metrics["policy/alpha"]) == pytest.approx(0.3)


@pytest.mark.parametrize("env", ["probe/Chosen", "probe/Quadratic"])
def test_entropy_settles_at_its_target(env: str) -> None:
    """The reward asks for a sure action; how sure the policy is depends on the target alone."""
    probes.register()
    config = sac.Config(
        env=env, total_timesteps=20_000, num_envs=16, num_steps=2, num_gradient_steps=8,
        batch_size=32, learning_starts=192, replay_capacity=2_000, hidden=(16, 16), alpha=0.1,
        learning_rate=3e-3, target_entropy_ratio=0.6, target_entropy_per_dim=-0.5,
    )  # fmt: skip
    sac.check(config)
    _, metrics = jax.jit(sac.train)(random.key(0), config)
    target = 0.6 * math.log(2) if env == "probe/Chosen" else -0.5
    assert float(metrics["policy/entropy"][-50:].mean()) == pytest.approx(target, abs=0.08)


@BOTH
def test_targets_approach_the_online_critics(config: sac.Config) -> None:
    config = dataclasses.replace(config, tau=0.2, critic_learning_rate=0.0)
    state = INIT(random.key(0), config)
    state = state.replace(target_critic=jax.tree.map(lambda x: x + 1.0, state.params["critic"]))
    after, _ = UPDATE(random.key(1), state, config)
    for online, target in zip(
        *map(jax.tree.leaves, (after.params["critic"], after.target_critic)), strict=True
    ):
        np.testing.assert_allclose(target, online + 0.8**3, rtol=1e-5, atol=1e-5)


def test_saturated_actions_keep_everything_finite() -> None:
    """A policy driven into the bounds: where common code is infinite, a whole update is not."""
    state = INIT(random.key(0), CONTINUOUS)
    actor = jax.tree.map(lambda x: x, state.params["actor"])
    actor["params"]["Dense_0"]["bias"] = jnp.array([20.0, -2.0])
    state = state.replace(params={**state.params, "actor": actor})
    _, batch = sampled(CONTINUOUS)
    (loss, entropy), gradient = IMPROVE(actor, random.key(2), state.params, batch, CONTINUOUS)
    assert np.isfinite(float(loss))
    assert float(entropy) < -30.0  # log(1 - tanh^2) at 20 is -38.6
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    after, metrics = UPDATE(random.key(3), state, CONTINUOUS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))
    assert all(np.isfinite(float(x)) for x in metrics.values())


def test_actions_stay_within_the_bounds_and_are_scaled_to_them() -> None:
    state = INIT(random.key(0), CONTINUOUS)
    obs = random.normal(random.key(1), (500, 3))
    action = sac.policy(random.key(2), state, obs, CONTINUOUS)
    assert action.shape == (500, 1)
    assert 1.5 < float(jnp.abs(action).max()) <= 2.0  # Pendulum's bound
    unscaled = sac.Actor(CONTINUOUS).apply(state.params["actor"], obs).sample(random.key(2))
    np.testing.assert_allclose(action, 2.0 * unscaled, rtol=1e-5)


def test_warm_up_acts_at_random_whatever_the_policy_would_do() -> None:
    config = dataclasses.replace(
        DISCRETE, learning_starts=2_000, total_timesteps=3_000, replay_capacity=2_000
    )
    state = INIT(random.key(0), config)
    taken = np.asarray(state.buffer.storage.action)
    assert taken.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(2_000))
    config = dataclasses.replace(config, env="Pendulum-v1")
    taken = np.sort(np.asarray(INIT(random.key(0), config).buffer.storage.action)[:, 0])
    assert np.abs(taken - np.linspace(-1, 1, 2_000)).max() < 2 * 1.95 / np.sqrt(2_000)


def test_rewards_are_scaled_and_clipped_as_they_are_learnt_from() -> None:
    config = dataclasses.replace(CONTINUOUS, reward_scale=0.5, clip_reward=1.0)
    _, plain = sampled(CONTINUOUS)
    _, scaled = sampled(config)
    np.testing.assert_allclose(scaled.reward, jnp.clip(0.5 * plain.reward, -1.0, 1.0), rtol=1e-6)
    assert float(scaled.reward.min()) == -1.0


def test_images_with_discrete_actions() -> None:
    config = dataclasses.replace(DISCRETE, env="Breakout-MinAtar", torso="cnn", env_params={})
    sac.check(config)
    state, _ = UPDATE(random.key(1), INIT(random.key(0), config), config)
    kernel = state.params["critic"]["params"]["torso"]["Conv_0"]["kernel"]
    assert kernel.shape == (2, 3, 3, 4, 16)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"replay_capacity": 15}, ["replay_capacity", "16", "15"]),
        ({"learning_starts": 200, "total_timesteps": 200}, ["learning_starts", "total_timesteps"]),
        ({"alpha": 0.0}, ["alpha", "more than 0", "0.0"]),
        ({"target_entropy_ratio": 1.2}, ["target_entropy_ratio", "1.2"]),
        ({"torso": "cnn"}, ["torso", "'cnn'"]),
        ({"alpha": float("inf")}, ["alpha", "finite", "inf"]),
        ({"alpha": 1e-300}, ["alpha", "finite", "1e-300"]),
        ({"target_entropy_per_dim": float("nan")}, ["target_entropy_per_dim", "nan"]),
        ({"tau": 0.0}, ["tau", "0.0"]),
        ({"learning_starts": 81}, ["num_envs", "learning_starts", "81"]),
        ({"total_timesteps": 10**12}, ["total_timesteps", "2147483647"]),
        ({"replay_capacity": 3 * 10**9}, ["replay_capacity", "2147483647"]),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        sac.check(dataclasses.replace(CONTINUOUS, env_params={}, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)
