"""What is special to PPO."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError, envs, normalize
from purejaxpg.agents import ppo
from purejaxpg.kernels import returns

TINY = ppo.Config(
    total_timesteps=256, num_envs=4, num_steps=16, num_epochs=2, num_minibatches=2, hidden=(8, 8)
)


INIT, UPDATE, LOSS = jax.jit(ppo.init), jax.jit(ppo.update), jax.jit(ppo.loss)
GRADIENT = jax.jit(jax.grad(lambda *args: ppo.loss(*args)[0]))


@jax.jit
def gathered(
    key: jax.Array, state: ppo.TrainState, config: ppo.Config
) -> tuple[ppo.TrainState, ppo.Transition, ppo.Batch]:
    """One rollout, and what an update would then learn from."""
    state, transition, _ = ppo.rollout(key, state, config)
    state, batch = ppo.advantages(state, transition, config)
    return state, transition, batch


def collected(config: ppo.Config) -> tuple[ppo.TrainState, ppo.Batch]:
    state, _, batch = gathered(random.key(1), INIT(random.key(0), config), config)
    return state, batch


def largest_change(before: Any, after: Any) -> float:
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def test_ratio_is_one_on_the_first_minibatch() -> None:
    """Log-probabilities recomputed for the update are those of the rollout, to the last bits."""
    state, batch = collected(TINY)
    _, metrics = LOSS(state.params, batch, state, TINY)
    assert float(metrics["policy/clip_fraction"]) == 0.0
    assert abs(float(metrics["policy/kl"])) < 1e-12
    log_prob = ppo.Actor(TINY).apply(state.params["actor"], batch.obs).log_prob(batch.action)
    np.testing.assert_allclose(np.exp(log_prob - batch.log_prob), 1.0, rtol=0, atol=2**-22)


def test_ratio_is_one_with_normalised_observations_and_continuous_actions() -> None:
    config = dataclasses.replace(TINY, env="Pendulum-v1", normalize_obs=True, initial_log_std=0.5)
    before, _ = collected(config)  # so that the moments are not the initial ones
    _, transition, batch = gathered(random.key(2), before, config)
    assert not np.allclose(batch.obs.reshape(-1), transition.obs.reshape(-1))
    log_prob = ppo.Actor(config).apply(before.params["actor"], batch.obs).log_prob(batch.action)
    np.testing.assert_allclose(np.exp(log_prob - batch.log_prob), 1.0, rtol=0, atol=1e-5)


def test_first_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 the clipped surrogate has the gradient of -A log pi."""
    config = dataclasses.replace(TINY, vf_coef=0.0, ent_coef=0.0, normalize_advantage=False)
    state, batch = collected(TINY)

    def score_function(params: Any) -> jax.Array:
        log_prob = ppo.Actor(config).apply(params["actor"], batch.obs).log_prob(batch.action)
        return -(batch.advantage * log_prob).mean()

    ours = GRADIENT(state.params, batch, state, config)
    plain = jax.jit(jax.grad(score_function))(state.params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_each_epoch_covers_all_data_in_its_own_order() -> None:
    order = ppo.shuffled(random.key(0), TINY).reshape(TINY.num_epochs, -1)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(TINY.steps_per_update), (2, 1)))
    assert not np.array_equal(order[0], order[1])


@pytest.mark.fast
def test_annealing_reaches_zero_after_the_last_update_and_not_before() -> None:
    gradient = {"w": jnp.ones(3)}

    def size(num_updates: int, **fields: Any) -> float:
        config = dataclasses.replace(TINY, max_grad_norm=jnp.inf, learning_rate=1.0, **fields)
        optimizer = ppo.make_optimizer(config, num_updates)
        return -float(optimizer.update(gradient, optimizer.init(gradient))[0]["w"][0])

    total = TINY.num_updates
    assert size(0) == pytest.approx(1.0, rel=1e-4)
    assert size(total - 1) == pytest.approx(1 / total, rel=1e-4)
    assert size(total) == 0.0
    assert size(total, learning_rate_schedule="constant") == pytest.approx(1.0, rel=1e-4)


def test_learning_rate_of_a_run_is_annealed() -> None:
    config = dataclasses.replace(TINY, num_epochs=1, num_minibatches=1, max_grad_norm=jnp.inf)
    state = INIT(random.key(0), TINY)
    late = state.replace(num_updates=jnp.asarray(config.num_updates))
    moved, _ = UPDATE(random.key(1), state, config)
    unmoved, _ = UPDATE(random.key(1), late, config)
    assert largest_change(state.params, moved.params) > 0
    assert largest_change(state.params, unmoved.params) == 0


def test_kl_bound_stops_an_update_early() -> None:
    """The minibatch that exceeds the bound and all later ones change nothing."""
    config = dataclasses.replace(TINY, learning_rate=0.1, learning_rate_schedule="constant")
    state = INIT(random.key(0), TINY)
    free, free_metrics = UPDATE(random.key(1), state, config)
    stopped, metrics = UPDATE(random.key(1), state, dataclasses.replace(config, max_kl=1e-4))
    assert float(free_metrics["policy/stopped"]) == 0.0
    # At ratio 1 the first minibatch has KL 0; the second sees what one large step has done.
    assert float(metrics["policy/stopped"]) == 0.75
    assert float(metrics["policy/kl"]) > 1e-4
    moved, further = (largest_change(state.params, end.params) for end in (stopped, free))
    assert moved == pytest.approx(0.1, rel=0.01)  # one step of Adam, not four
    assert further > 0.15


PENALISED = dataclasses.replace(TINY, surrogate="kl_penalty", normalize_advantage=False)


def test_penalty_is_the_divergence_from_the_old_policy() -> None:
    """Value and gradient of the loss differ from those without a penalty by beta KL(old || new)."""
    state, batch = collected(TINY)  # of which the surrogate changes nothing
    moved = jax.tree.map(lambda x: 100.0 * x, state.params)

    @jax.jit
    def penalty(params: Any) -> jax.Array:
        old, new = (ppo.Actor(TINY).apply(p["actor"], batch.obs) for p in (state.params, params))
        return 7.0 * old.kl(new).mean()

    @jax.jit
    def loss(params: Any, beta: float) -> jax.Array:
        old = state.replace(kl_coef=jnp.asarray(beta))
        return ppo.loss(params, batch, old, PENALISED)[0]

    assert float(penalty(moved)) > 1e-3
    difference = float(loss(moved, 7.0) - loss(moved, 0.0))
    assert difference == pytest.approx(float(penalty(moved)), rel=1e-2)
    slope = jax.jit(jax.grad(loss))
    with_it, without = (slope(moved, beta) for beta in (7.0, 0.0))
    alone = jax.jit(jax.grad(penalty))(moved)
    trees = (with_it, without, alone)
    for a, b, c in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(a - b, c, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("target_over_kl", "factor"),
    [(10.0, 0.5), (1.6, 0.5), (1.4, 1.0), (1.0, 1.0), (0.7, 1.0), (0.6, 2.0), (0.1, 2.0)],
)
def test_penalty_adapts_to_the_divergence(target_over_kl: float, factor: float) -> None:
    """Halved below target / 1.5, doubled above 1.5 target, and left alone between."""
    state, batch = collected(TINY)
    moved = jax.tree.map(lambda x: 100.0 * x, state.params)
    old, new = (ppo.Actor(TINY).apply(p["actor"], batch.obs) for p in (state.params, moved))
    kl = float(old.kl(new).mean())
    config = dataclasses.replace(PENALISED, target_kl=kl * target_over_kl)
    state = state.replace(kl_coef=jnp.asarray(3.0))
    assert float(ppo.adapted_kl_coef(state, moved, batch, config)) == pytest.approx(3.0 * factor)
    low = ppo.adapted_kl_coef(state.replace(kl_coef=jnp.asarray(1e-6)), moved, batch, config)
    assert float(low) >= 1e-6 * (1 - 1e-5)
    clipped = dataclasses.replace(config, surrogate="clip")
    assert float(ppo.adapted_kl_coef(state, moved, batch, clipped)) == 3.0


def test_penalty_carries_from_update_to_update() -> None:
    config = dataclasses.replace(PENALISED, target_kl=1e3)  # always far below
    _, metrics = jax.jit(ppo.train)(random.key(0), config)
    assert metrics["policy/kl_coef"].tolist() == [1.0, 0.5, 0.25, 0.125]


def test_advantages_are_normalised_within_the_minibatch() -> None:
    """A shift and a scale of the advantages are gone from the policy's part of the loss."""
    config = dataclasses.replace(TINY, vf_coef=0.0, ent_coef=0.0)
    state, batch = collected(TINY)
    moved = batch.replace(advantage=5.0 * batch.advantage + 3.0)
    values = [float(LOSS(state.params, b, state, config)[0]) for b in (batch, moved)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    gradients = [GRADIENT(state.params, b, state, config) for b in (batch, moved)]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_time_limit_bootstraps_from_the_observation_before_the_reset() -> None:
    config = dataclasses.replace(TINY, env_params={"max_steps_in_episode": 4})
    state = INIT(random.key(0), config)
    _, transition, batch = gathered(random.key(1), state, config)
    ended = np.asarray(transition.done)
    assert ended.sum() >= 16
    assert not np.asarray(transition.terminated).any()  # 4 steps are too few to fall over
    next_value = ppo.Critic(config).apply(state.params["critic"], transition.next_obs)
    value = ppo.Critic(config).apply(state.params["critic"], transition.obs)
    delta = transition.reward + config.gamma * next_value - value
    got = np.asarray(batch.advantage).reshape(ended.shape)
    np.testing.assert_allclose(got[ended], np.asarray(delta)[ended], atol=1e-5)


def test_rewards_are_scaled_by_the_deviation_of_the_discounted_return() -> None:
    config = dataclasses.replace(TINY, normalize_reward=True, clip_reward=jnp.inf)
    state = INIT(random.key(0), config)
    after, transition, batch = gathered(random.key(1), state, config)
    carried, sums = normalize.discounted_sum(
        jnp.zeros(config.num_envs), transition.reward, transition.done, config.gamma
    )
    scale = np.asarray(sums).std()
    value = ppo.Critic(config).apply(state.params["critic"], transition.obs)
    next_value = ppo.Critic(config).apply(state.params["critic"], transition.next_obs)
    expected = returns.gae(
        transition.reward / scale, value, next_value, transition.terminated, transition.done,
        config.gamma, config.gae_lambda,
    )  # fmt: skip
    np.testing.assert_allclose(batch.advantage, expected.reshape(-1), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(after.normalizers.reward.running, carried)
    clipped = dataclasses.replace(config, clip_reward=0.01)
    _, _, small = gathered(random.key(1), state, clipped)
    assert float(jnp.abs(small.advantage).max()) < float(jnp.abs(batch.advantage).max())


def test_observation_moments_are_those_of_all_data_seen() -> None:
    config = dataclasses.replace(TINY, normalize_obs=True)
    state = INIT(random.key(0), config)
    assert float(state.normalizers.obs.count) == config.steps_per_update  # the first policy's
    *_, key_moments = random.split(random.key(0), 4)
    _, first, _ = gathered(key_moments, INIT(random.key(0), TINY), TINY)
    seen = [np.asarray(first.obs).reshape(-1, 4)]
    for u in (1, 2):
        state, transition, _ = gathered(random.key(u), state, config)
        seen.append(np.asarray(transition.obs).reshape(-1, 4))
    data = np.concatenate(seen)
    np.testing.assert_allclose(state.normalizers.obs.mean, data.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.normalizers.obs.var, data.var(0), rtol=1e-3, atol=1e-6)


def test_actions_are_stored_unclipped() -> None:
    config = dataclasses.replace(TINY, env="Pendulum-v1", initial_log_std=2.0)
    _, batch = collected(config)
    assert float(jnp.abs(batch.action).max()) > 2.0  # Pendulum's bound


def test_convolutional_torso_learns_on_minatar() -> None:
    config = dataclasses.replace(TINY, env="Breakout-MinAtar", torso="cnn", total_timesteps=64)
    ppo.check(config)
    before = INIT(random.key(0), config)
    after, metrics = UPDATE(random.key(1), before, config)
    kernels = [s.params["actor"]["params"]["torso"]["Conv_0"]["kernel"] for s in (before, after)]
    assert kernels[0].shape == (3, 3, 4, 16)
    assert not np.array_equal(*kernels)
    assert np.isfinite(float(metrics["loss/policy"]))


def test_orthogonal_gains() -> None:
    params = INIT(random.key(0), TINY).params
    head, hidden = (params["actor"]["params"][k] for k in ("Dense_0", "torso"))
    np.testing.assert_allclose((head["kernel"] ** 2).sum(0), 0.01**2, rtol=1e-4)
    np.testing.assert_allclose((hidden["Dense_1"]["kernel"] ** 2).sum(0), 2.0, rtol=1e-4)
    value_head = params["critic"]["params"]["Dense_0"]
    np.testing.assert_allclose((value_head["kernel"] ** 2).sum(0), 1.0, rtol=1e-4)
    assert float(jnp.abs(head["bias"]).max()) == 0.0


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_minibatches": 3}, ["num_minibatches", "3", "64"]),
        ({"num_envs": 0}, ["num_envs", "0"]),
        ({"gamma": 1.5}, ["gamma", "1.5"]),
        ({"learning_rate": -1.0}, ["learning_rate", "-1.0"]),
        ({"surrogate": "hinge"}, ["surrogate", "'clip'", "'kl_penalty'", "'hinge'"]),
        ({"kl_coef": 0.0}, ["kl_coef", "0.0"]),
        ({"target_kl": -1.0}, ["target_kl", "-1.0"]),
        ({"kl_coef": float("inf")}, ["kl_coef", "finite", "inf"]),
        ({"max_kl": 0.0}, ["max_kl", "0.0"]),
        ({"total_timesteps": 10}, ["total_timesteps", "64", "10"]),
        (
            {"initial_log_std": 1.0},
            ["initial_log_std", "1.0", "Gaussian", "CartPole-v1", "discrete"],
        ),
        ({"torso": "cnn"}, ["torso", "'cnn'", "[4]"]),
        ({"activation": "sine"}, ["activation", "'sine'"]),
        ({"hidden": ()}, ["hidden", "[]"]),
        ({"env": "CartPole-v2"}, ["CartPole-v2", "CartPole-v1"]),
        ({"env_params": {"gravty": 1.0}}, ["gravty", "gravity"]),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ppo.check(dataclasses.replace(TINY, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("num_envs", [1, 8192])
def test_any_number_of_environments(num_envs: int) -> None:
    config = dataclasses.replace(TINY, num_envs=num_envs, num_steps=2, total_timesteps=2 * num_envs)
    state, metrics = jax.jit(ppo.train)(random.key(0), config)
    assert state.obs.shape == (num_envs, 4)
    assert np.isfinite(metrics["loss/value"]).all()


def test_memory_grows_as_predicted_with_the_environments() -> None:
    """Peak scratch memory of an update is linear in N, at the size of what an update must hold.

    Per environment step: a transition and its batch row (two observations and six numbers, then
    one observation and five numbers), plus the activations of the critic's pass over all data.
    """

    def scratch(num_envs: int) -> int:
        config = dataclasses.replace(TINY, num_envs=num_envs, total_timesteps=16 * num_envs)
        state = jax.eval_shape(ppo.init, random.key(0), config)
        compiled = jax.jit(ppo.update).lower(random.key(0), state, config).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, middle, large = (scratch(n) for n in (512, 1024, 2048))
    assert (large - middle) / (middle - small) == pytest.approx(2.0, rel=0.1)
    per_step = (large - small) / (2048 - 512) / TINY.num_steps
    held = 4 * (2 * 4 + 6 + 4 + 5)  # bytes of the transition and its batch row
    activations = 4 * 8 * 6  # at most six arrays of the hidden width alive at once
    assert held <= per_step <= held + activations


def test_env_is_the_one_named() -> None:
    config = dataclasses.replace(TINY, env="DeepSea-bsuite", env_kwargs=(("size", 4),))
    assert envs.from_config(config).obs_shape == (4, 4)
