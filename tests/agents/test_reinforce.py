"""What is special to REINFORCE: whole episodes, and which return weighs which action."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from jax import random

from purejaxpg import InputError, envs
from purejaxpg.agents import reinforce

TINY = reinforce.Config(
    total_timesteps=256,
    num_envs=8,
    max_steps=20,
    hidden=(8, 8),
    num_critic_steps=2,
    env_params={"max_steps_in_episode": 20.0},
)


class Lottery(probes.Probe):
    """Reward 1 a step; an episode lasts 1 step or 7, drawn at its start and seen."""

    def first_obs(self, key: jax.Array) -> jax.Array:
        return jnp.where(random.bernoulli(key, 0.5, (1,)), 1.0, 7.0)

    def outcome(self, state: probes.State, action: jax.Array) -> Any:
        return jnp.ones(()), state.time + 1 >= state.obs[0], state.obs


INIT, ROLLOUT, UPDATE, ADVANTAGES, POLICY_LOSS, VALUE_LOSS = map(
    jax.jit,
    (
        reinforce.init, reinforce.rollout, reinforce.update, reinforce.advantages,
        reinforce.policy_loss, reinforce.value_loss,
    ),
)  # fmt: skip


def collected(config: reinforce.Config) -> tuple[Any, Any, Any]:
    state = INIT(random.key(0), config)
    transition, metrics = ROLLOUT(random.key(1), state, config)
    return state, transition, metrics


def test_each_environment_gives_one_whole_episode() -> None:
    _, transition, metrics = collected(TINY)
    valid, done = np.asarray(transition.valid), np.asarray(transition.done)
    for n in range(TINY.num_envs):
        (ends,) = np.nonzero(done[:, n])
        assert valid[:, n].tolist() == [t <= ends[0] for t in range(20)]
    assert float(metrics["episode/count"]) == TINY.num_envs
    assert float(metrics["episode/length_sum"]) == valid.sum() == metrics["episode/return_sum"]


def test_short_episodes_do_not_count_more() -> None:
    """Half of the episodes last 7 steps. Among those completed in 10 steps, far fewer do."""
    envs.register("Lottery", Lottery)
    config = dataclasses.replace(
        TINY, env="Lottery", num_envs=4000, max_steps=10, env_params={}, total_timesteps=40_000
    )
    reinforce.check(config)
    _, transition, metrics = collected(config)
    mean = float(metrics["episode/return_sum"] / metrics["episode/count"])
    assert mean == pytest.approx(4.0, abs=5 * 3.0 / np.sqrt(4000))  # five standard errors
    lengths = np.asarray(transition.obs[..., 0])[np.asarray(transition.done)]
    assert lengths.mean() < 3.4  # what counting every completed episode would say


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "reward to go"),
        ({"weight_by_discount": True}, "weighted"),
        ({"reward_to_go": False}, "total return"),
        ({"baseline": False}, "no baseline"),
        ({"baseline": False, "normalize_advantage": True}, "whitened"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_against_a_loop(fields: dict[str, Any], name: str) -> None:
    config = dataclasses.replace(TINY, gamma=0.8, **fields)
    state, transition, _ = collected(TINY)
    _, batch = ADVANTAGES(state, transition, config)
    value, next_value = (
        np.asarray(reinforce.Critic(config).apply(state.params["critic"], obs), np.float64)
        for obs in (transition.obs, transition.next_obs)
    )
    done, valid = np.asarray(transition.done), np.asarray(transition.valid)
    expected = np.zeros(done.shape)
    for n in range(config.num_envs):
        end = int(np.nonzero(done[:, n])[0][0])
        cut = not transition.terminated[end, n] and config.baseline
        to_go = next_value[end, n] if cut else 0.0
        for t in range(end, -1, -1):
            to_go = float(transition.reward[t, n]) + 0.8 * to_go
            weight = 0.8**t if config.weight_by_discount else 1.0
            expected[t, n] = weight * (to_go - config.baseline * value[t, n])
        if not config.reward_to_go:
            expected[: end + 1, n] = to_go - value[: end + 1, n]
    if config.normalize_advantage:
        expected = (expected - expected[valid].mean()) / (expected[valid].std() + 1e-8)
    np.testing.assert_allclose(
        np.asarray(batch.advantage)[valid], expected[valid], rtol=1e-4, atol=1e-5
    )


def test_loss_is_the_mean_over_episodes_of_sums_over_their_steps() -> None:
    state, transition, _ = collected(TINY)
    _, batch = ADVANTAGES(state, transition, TINY)
    policy = reinforce.Actor(TINY).apply(state.params["actor"], transition.obs)
    log_prob = np.asarray(policy.log_prob(transition.action))
    terms = -log_prob * np.asarray(batch.advantage)
    expected = np.mean([terms[batch.valid[:, n], n].sum() for n in range(TINY.num_envs)])
    loss, _ = POLICY_LOSS(state.params["actor"], batch, TINY)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    # Nothing that follows an episode's end has any part in it, nor in the baseline.
    outside = ~np.asarray(batch.valid)
    assert outside.any()
    broken = batch.replace(
        advantage=jnp.where(outside, 1e6, batch.advantage),
        target=jnp.where(outside, 1e6, batch.target),
    )
    again, _ = POLICY_LOSS(state.params["actor"], broken, TINY)
    assert float(again) == float(loss)
    values = [VALUE_LOSS(state.params["critic"], b, TINY) for b in (batch, broken)]
    assert float(values[0]) == float(values[1])


def test_normalisers_see_the_episodes_and_nothing_else() -> None:
    """Two updates against all data at once: no step after an end, and no sum that runs on.

    Each update starts fresh episodes, so the discounted sums start from zero each time.
    """
    envs.register("Lottery", Lottery)
    config = dataclasses.replace(
        TINY, env="Lottery", num_envs=50, max_steps=10, env_params={}, gamma=0.9,
        normalize_obs=True, normalize_reward=True,
    )  # fmt: skip
    state = INIT(random.key(0), config)
    raw = dataclasses.replace(config, normalize_obs=False)
    first, _ = ROLLOUT(random.split(random.key(0), 3)[2], INIT(random.key(0), raw), raw)
    seen, sums = [np.asarray(first.obs)[np.asarray(first.valid)]], []
    for u in (1, 2):
        transition, _ = ROLLOUT(random.key(u), state, config)
        state, _ = ADVANTAGES(state, transition, config)
        valid = np.asarray(transition.valid)
        seen.append(np.asarray(transition.obs)[valid])
        steps = np.cumsum(valid, axis=0)[valid]  # 1, 2, ... within each episode
        sums.append((1 - 0.9**steps) / (1 - 0.9))
    obs, sums = np.concatenate(seen), np.concatenate(sums)
    got = state.normalizers
    np.testing.assert_allclose(got.obs.mean, obs.mean(0), rtol=1e-4)
    np.testing.assert_allclose(got.obs.var, obs.var(0), rtol=1e-3)
    assert float(got.reward.moments.count) == len(sums)
    np.testing.assert_allclose(got.reward.moments.var, sums.var(), rtol=1e-3)


def test_baseline_is_fitted_after_it_was_used() -> None:
    """The policy's step is the same whatever the baseline then learns from the same returns."""
    state = INIT(random.key(0), TINY)
    slow, _ = UPDATE(random.key(1), state, TINY)
    fast, _ = UPDATE(random.key(1), state, dataclasses.replace(TINY, critic_learning_rate=1.0))
    for a, b in zip(*(jax.tree.leaves(s.params["actor"]) for s in (slow, fast)), strict=True):
        np.testing.assert_array_equal(a, b)
    kernels = [s.params["critic"]["params"]["Dense_0"]["kernel"] for s in (slow, fast)]
    assert not np.array_equal(*kernels)


def test_without_a_baseline_no_critic_is_trained() -> None:
    config = dataclasses.replace(TINY, baseline=False)
    state = INIT(random.key(0), TINY)
    after, metrics = UPDATE(random.key(1), state, config)
    pairs = zip(*(jax.tree.leaves(s.params["critic"]) for s in (state, after)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert "loss/value" not in metrics


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
