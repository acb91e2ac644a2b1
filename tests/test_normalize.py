"""Running moments and discounted sums against NumPy over all data at once."""

import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import normalize

pytestmark = pytest.mark.fast


def batches(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Batches whose means and scales differ, so that merging has something to do."""
    generator = np.random.default_rng(seed)
    return [
        generator.normal(3.0 * i, 1.0 + i, shape).astype(np.float32)
        for i, shape in enumerate(shapes)
    ]


# --- moments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "leading"),
    [((), [(7,), (2, 3), (1,), (40,)]), ((3,), [(5, 4), (1, 1), (2, 9)]), ((2, 3), [(4,), (5, 2)])],
    ids=["scalar", "vector", "matrix"],
)
def test_batches_merge_as_if_seen_at_once(
    shape: tuple[int, ...], leading: list[tuple[int, ...]]
) -> None:
    data = batches(0, *((*axes, *shape) for axes in leading))
    moments = normalize.init(shape)
    for batch in data:
        moments = normalize.update(moments, jnp.asarray(batch))
    together = np.concatenate([batch.reshape(-1, *shape) for batch in data]).astype(np.float64)
    assert moments.mean.shape == moments.var.shape == shape
    assert float(moments.count) == len(together)
    np.testing.assert_allclose(moments.mean, together.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.var, together.var(0), rtol=1e-5, atol=1e-5)


def test_order_and_cut_of_the_batches_do_not_matter() -> None:
    (data,) = batches(1, (64, 3))
    moments = []
    for cuts in ([64], [1, 63], [63, 1], [16, 16, 16, 16]):
        merged = normalize.init((3,))
        for part in np.split(data, np.cumsum(cuts)[:-1]):
            merged = normalize.update(merged, jnp.asarray(part))
        moments.append(merged)
    for other in moments[1:]:
        np.testing.assert_allclose(other.mean, moments[0].mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(other.var, moments[0].var, rtol=1e-5, atol=1e-6)


def test_before_the_first_update_nothing_changes() -> None:
    x = random.normal(random.key(0), (5, 3))
    moments = normalize.init((3,))
    assert float(moments.count) == 0.0
    np.testing.assert_allclose(normalize.normalize(moments, x, jnp.inf), x, rtol=1e-6)


def test_first_update_forgets_the_start() -> None:
    """Mean 0 and variance 1 stand for nothing seen; they must have no weight."""
    (data,) = batches(2, (10, 2))
    moments = normalize.update(normalize.init((2,)), 100.0 + 5.0 * jnp.asarray(data))
    expected = 100.0 + 5.0 * data.astype(np.float64)
    np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.var, expected.var(0), rtol=1e-4)


def test_first_update_from_a_single_sample() -> None:
    moments = normalize.update(normalize.init((2,)), jnp.array([[3.0, -4.0]]))
    assert moments.mean.tolist() == [3.0, -4.0]
    assert moments.var.tolist() == [0.0, 0.0]
    # A feature that never varied must not blow up to inf or NaN.
    assert normalize.normalize(moments, moments.mean, 10.0).tolist() == [0.0, 0.0]
    assert normalize.normalize(moments, moments.mean + 1.0, 10.0).tolist() == [10.0, 10.0]


@pytest.mark.parametrize("shape", [(), (3,)], ids=["scalar", "vector"])
def test_only_chosen_samples_count(shape: tuple[int, ...]) -> None:
    data = batches(9, (6, 4, *shape), (5, 4, *shape))
    moments, seen = normalize.init(shape), []
    for batch, share in zip(data, (0.5, 0.2), strict=True):
        where = np.random.default_rng(10).random(batch.shape[:2]) < share
        moments = normalize.update(moments, jnp.asarray(batch), jnp.asarray(where))
        seen.append(batch[where])
    together = np.concatenate(seen).astype(np.float64)
    assert 2 < len(together) < 20
    assert float(moments.count) == len(together)
    np.testing.assert_allclose(moments.mean, together.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.var, together.var(0), rtol=1e-5, atol=1e-5)


def test_chosen_samples_by_hand() -> None:
    # Of 1, 100, 3 the middle one does not count, and 8 comes in a second batch:
    # mean = (1 + 3 + 8) / 3 = 4, variance = (9 + 1 + 16) / 3 = 26/3
    where = jnp.array([True, False, True])
    moments = normalize.update(normalize.init(()), jnp.array([1.0, 100.0, 3.0]), where)
    moments = normalize.update(moments, jnp.array([8.0]), jnp.array([True]))
    assert float(moments.mean) == pytest.approx(4.0)
    assert float(moments.var) == pytest.approx(26 / 3)
    assert float(moments.count) == 3.0


def test_large_counts() -> None:
    """After 10^7 samples a batch of 2048 still has its small weight, and no more.

    The mean is far from 0: the sum of squares minus the square of the sum would keep no digit of
    a variance of 1 beside 10^6 in float32.
    """
    count, size = 1e7, 2048
    before = normalize.Moments(jnp.array(1000.0), jnp.array(1.0), jnp.array(count))
    batch = np.random.default_rng(3).normal(1001.0, 2.0, size).astype(np.float32)
    after = normalize.update(before, jnp.asarray(batch))
    mean, var, total = batch.mean(dtype=np.float64), batch.var(dtype=np.float64), count + size
    expected_var = (count + var * size + (mean - 1000.0) ** 2 * count * size / total) / total
    assert float(after.count) == total
    # float32 holds 1000 to 6e-5; the true change of the mean is 2e-4, that of the variance 8e-4.
    assert float(after.mean) == pytest.approx(1000.0 + (mean - 1000.0) * size / total, abs=7e-5)
    assert float(after.var) == pytest.approx(expected_var, rel=1e-5)
    assert float(after.var) - 1.0 > 5e-4


def test_many_updates_do_not_drift() -> None:
    """10^4 batches of 512 from one distribution, through 5 million samples."""

    def step(moments: normalize.Moments, key: jax.Array) -> tuple[normalize.Moments, None]:
        return normalize.update(moments, 50.0 + 3.0 * random.normal(key, (512,))), None

    keys = random.split(random.key(0), 10_000)
    moments, _ = jax.jit(lambda keys: jax.lax.scan(step, normalize.init(()), keys))(keys)
    assert float(moments.count) == 5_120_000
    # The statistical error of the mean is 3 / sqrt(5e6) = 1.3e-3, of the variance 5.7e-3.
    assert float(moments.mean) == pytest.approx(50.0, abs=0.01)
    assert float(moments.var) == pytest.approx(9.0, abs=0.03)


def test_moments_update_alike_under_vmap() -> None:
    data = jnp.stack([jnp.asarray(batch) for batch in batches(4, (6, 3), (6, 3))])
    start = jax.tree.map(lambda x: jnp.stack([x, x]), normalize.init((3,)))
    together = jax.vmap(normalize.update)(start, data)
    for i in range(2):
        alone = normalize.update(normalize.init((3,)), data[i])
        np.testing.assert_allclose(together.mean[i], alone.mean, rtol=1e-6)
        np.testing.assert_allclose(together.var[i], alone.var, rtol=1e-6)


# --- normalize ----------------------------------------------------------------------------------


def test_normalized_data_has_mean_0_and_deviation_1() -> None:
    (data,) = batches(5, (200, 3))
    moments = normalize.update(normalize.init((3,)), 7.0 + 4.0 * jnp.asarray(data))
    scaled = normalize.normalize(moments, 7.0 + 4.0 * jnp.asarray(data), jnp.inf)
    np.testing.assert_allclose(scaled.mean(0), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(scaled.std(0), np.ones(3), rtol=1e-5)


@pytest.mark.parametrize(
    ("clip", "expected"), [(2.0, [-2.0, -1.0, 0.0, 2.0]), (np.inf, [-3.0, -1.0, 0.0, 50.0])]
)
def test_clip(clip: float, expected: list[float]) -> None:
    moments = normalize.Moments(jnp.array(10.0), jnp.array(4.0), jnp.array(5.0))
    x = jnp.array([4.0, 8.0, 10.0, 110.0])
    for bound in (clip, jnp.float32(clip)):  # as a number and as a traced setting
        scaled = jax.jit(normalize.normalize)(moments, x, bound)
        np.testing.assert_allclose(scaled, expected, rtol=1e-6)


# --- discounted sums ----------------------------------------------------------------------------


def discounted_loop(
    start: np.ndarray, reward: np.ndarray, done: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    total, carry = np.zeros(reward.shape), start.astype(np.float64)
    for n in range(reward.shape[1]):
        for t in range(reward.shape[0]):
            carry[n] = reward[t, n] + gamma * carry[n]
            total[t, n] = carry[n]
            if done[t, n]:
                carry[n] = 0.0
    return carry, total


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_sum_is_the_loop(gamma: float) -> None:
    generator = np.random.default_rng(6)
    reward = generator.normal(size=(30, 4)).astype(np.float32)
    done = generator.random((30, 4)) < 0.2
    start = generator.normal(size=4).astype(np.float32)
    assert done[1:-1].any()
    carry, total = normalize.discounted_sum(*map(jnp.asarray, (start, reward, done)), gamma)
    expected_carry, expected = discounted_loop(start, reward, done, gamma)
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(carry, expected_carry, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_gpu")
def test_discounted_sum_goes_on_across_calls() -> None:
    generator = np.random.default_rng(7)
    reward = jnp.asarray(generator.normal(size=(20, 3)), jnp.float32)
    done = jnp.asarray(generator.random((20, 3)) < 0.2).at[11, 0].set(True)  # at the very cut
    end, whole = normalize.discounted_sum(jnp.zeros(3), reward, done, 0.9)
    carry, first = normalize.discounted_sum(jnp.zeros(3), reward[:12], done[:12], 0.9)
    assert float(carry[0]) == 0.0
    last_end, second = normalize.discounted_sum(carry, reward[12:], done[12:], 0.9)
    np.testing.assert_allclose(jnp.concatenate([first, second]), whole, rtol=1e-6)
    np.testing.assert_allclose(last_end, end, rtol=1e-6)


@pytest.mark.usefixtures("on_gpu")
def test_discounted_sum_by_hand() -> None:
    # gamma = 1/2; the first episode ends with the third step, the second continues:
    # R_0 = 1                    nothing before
    # R_1 = 2 + 1/2 * 1 = 2.5
    # R_2 = 4 + 1/2 * 2.5 = 5.25   the last reward of an episode belongs to it
    # R_3 = 8                    nothing of the first episode remains
    # R_4 = 6 + 1/2 * 8 = 10     and this is carried on
    reward = jnp.array([[1.0], [2.0], [4.0], [8.0], [6.0]])
    done = jnp.array([[False], [False], [True], [False], [False]])
    carry, total = normalize.discounted_sum(jnp.zeros(1), reward, done, 0.5)
    assert total[:, 0].tolist() == [1.0, 2.5, 5.25, 8.0, 10.0]
    assert carry.tolist() == [10.0]


# --- scaled rewards -----------------------------------------------------------------------------


def test_rewards_are_divided_by_the_deviation_of_their_sums() -> None:
    """Over two calls; the statistics see a call's rewards before they scale them."""
    generator = np.random.default_rng(8)
    reward = generator.normal(5.0, 2.0, (24, 3)).astype(np.float32)
    done = generator.random((24, 3)) < 0.2
    scale = normalize.init_reward_scale(3)
    _, sums = discounted_loop(np.zeros(3), reward, done, 0.9)
    for start, stop in ((0, 10), (10, 24)):
        part = jnp.asarray(reward[start:stop]), jnp.asarray(done[start:stop])
        scale, scaled = normalize.scale_reward(scale, *part, 0.9)
        # No mean is subtracted: all of these rewards stay positive.
        expected = reward[start:stop] / sums[:stop].std()
        np.testing.assert_allclose(scaled, expected, rtol=1e-4)
        assert float(scale.moments.count) == 3 * stop
    assert scale.running.shape == (3,)


def settings(**fields: Any) -> Any:
    standard = {
        "normalize_obs": False, "clip_obs": 10.0, "normalize_reward": False, "gamma": 0.9,
        "reward_scale": 1.0, "clip_reward": jnp.inf,
    }  # fmt: skip
    return types.SimpleNamespace(**{**standard, **fields})


REWARD = jnp.array([[1.0], [-1.0], [100.0], [-100.0]])
DONE = jnp.ones((4, 1), bool)  # so each discounted sum is its reward alone
DEVIATION = np.std([1.0, -1.0, 100.0, -100.0])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, REWARD),
        ({"reward_scale": 0.1}, 0.1 * REWARD),
        ({"clip_reward": 5.0}, jnp.clip(REWARD, -5.0, 5.0)),
        ({"reward_scale": 0.1, "clip_reward": 5.0}, jnp.clip(0.1 * REWARD, -5.0, 5.0)),
        ({"normalize_reward": True}, REWARD / DEVIATION),
        (
            {"normalize_reward": True, "reward_scale": 2.0, "clip_reward": 0.5},
            jnp.clip(2.0 * REWARD / DEVIATION, -0.5, 0.5),
        ),
    ],
)
def test_rewards_are_normalised_then_scaled_then_clipped(fields: Any, expected: Any) -> None:
    before = normalize.init_both(jnp.zeros((1, 3)))
    after, got = normalize.rewards(settings(**fields), before, REWARD, DONE)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert float(after.reward.moments.count) == (4 if "normalize_reward" in fields else 0)


def test_observations_are_left_alone_unless_asked() -> None:
    obs = 3.0 + random.normal(random.key(0), (50, 2))
    for switched_on in (False, True):
        config = settings(normalize_obs=switched_on, clip_obs=1.5)
        after = normalize.observed(config, normalize.init_both(obs), obs)
        seen = normalize.observations(config, after, obs)
        assert float(after.obs.count) == (50 if switched_on else 0)
        assert (float(seen.mean()) < 0.2) == switched_on
        assert (float(jnp.abs(seen).max()) == 1.5) == switched_on


def test_normalisers_let_only_chosen_steps_count() -> None:
    generator = np.random.default_rng(11)
    obs, reward = generator.normal(size=(8, 3, 2)), generator.normal(2.0, 1.0, (8, 3))
    done, where = generator.random((2, 8, 3)) < 0.4
    config, before = (
        settings(normalize_obs=True, normalize_reward=True),
        normalize.init_both(obs[0]),
    )
    _, sums = discounted_loop(np.zeros(3), reward, done, config.gamma)
    after = normalize.observed(config, before, jnp.asarray(obs), jnp.asarray(where))
    after, scaled = normalize.rewards(config, after, *map(jnp.asarray, (reward, done, where)))
    np.testing.assert_allclose(after.obs.mean, obs[where].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.reward.moments.mean, sums[where].mean(), rtol=1e-5)
    np.testing.assert_allclose(scaled, reward / sums[where].std(), rtol=1e-4)
    assert float(after.obs.count) == float(after.reward.moments.count) == where.sum()


def test_restarted_forgets_the_episodes_in_progress_and_nothing_else() -> None:
    """Of two environments, the first is in an episode that has earned 1 + 2 gamma."""
    config = settings(normalize_obs=True, normalize_reward=True, gamma=0.5)
    obs, done = random.normal(random.key(0), (2, 2, 3)), jnp.array([[False, True], [False, True]])
    before, reward = normalize.init_both(obs[0]), jnp.array([[2.0, 5.0], [1.0, 7.0]])
    before, _ = normalize.rewards(config, before, reward, done)
    before = normalize.observed(config, before, obs)
    assert before.reward.running.tolist() == [2.0, 0.0]
    after = normalize.restarted(before)
    assert after.reward.running.tolist() == [0.0, 0.0]
    chex.assert_trees_all_equal(
        (before.obs, before.reward.moments), (after.obs, after.reward.moments)
    )


def test_no_reward_at_all_stays_none() -> None:
    reward, done = jnp.zeros((4, 2)), jnp.zeros((4, 2), bool)
    _, scaled = normalize.scale_reward(normalize.init_reward_scale(2), reward, done, 0.9)
    assert scaled.tolist() == reward.tolist()


@pytest.mark.parametrize("pay", [1.0, -3.0, 1e-2, 1e6])
@pytest.mark.parametrize("gamma", [0.0, 0.99])
def test_sums_that_never_vary_do_not_blow_rewards_up(pay: float, gamma: float) -> None:
    """One-step episodes that all pay the same: ten, where dividing by the deviation gives 1e4."""
    reward, done = jnp.full((8, 2), pay), jnp.ones((8, 2), bool)
    _, scaled = normalize.scale_reward(normalize.init_reward_scale(2), reward, done, gamma)
    expected = pay / np.sqrt(0.01 * pay**2 + 1e-8)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    assert abs(expected) <= 10


def test_sums_that_vary_by_a_tenth_of_their_size_are_scaled_by_their_deviation() -> None:
    """The floor does not move anything else: at 0.11 of the root mean square it is not reached."""
    for spread, factor in ((0.11, 1 / 0.11), (0.05, 10.0)):
        reward = jnp.array([[1.0 - spread], [1.0 + spread]]) / np.sqrt(1 + spread**2)
        done = jnp.ones((2, 1), bool)
        _, scaled = normalize.scale_reward(normalize.init_reward_scale(1), reward, done, 0.9)
        root = 1 / np.sqrt(1 + spread**2) if spread > 0.1 else 1.0
        np.testing.assert_allclose(scaled / reward, factor / root, rtol=2e-3)


@pytest.mark.parametrize(("size", "finite"), [(1e-3, True), (1e18, True), (1e20, False)])
def test_a_value_too_large_for_a_variance_gives_nan(size: float, finite: bool) -> None:
    """Zero, which the quotient would be, looks like learning; NaN marks a run as diverged."""
    noise = size * random.normal(random.key(0), (8, 2))
    done = jnp.zeros((8, 2), bool)
    _, scaled = normalize.scale_reward(normalize.init_reward_scale(2), noise, done, 0.9)
    moments = normalize.update(normalize.init((2,)), noise)
    seen = normalize.normalize(moments, noise, 10.0)
    for values in (scaled, seen):
        assert np.isfinite(values).all() == finite
        assert np.isnan(values).all() == (not finite)
        assert not finite or float(jnp.abs(values).max()) > 0.1


# --- shapes that would broadcast ----------------------------------------------------------------


def moments_of(size: int) -> normalize.Moments:
    return normalize.init((size,))


@pytest.mark.parametrize(
    "call",
    [
        lambda: normalize.update(moments_of(3), jnp.ones((4, 1))),
        lambda: normalize.update(moments_of(3), jnp.ones((4, 3)), jnp.ones((1,), bool)),
        lambda: normalize.normalize(moments_of(3), jnp.ones((4, 1)), 1.0),
        lambda: normalize.normalize(moments_of(1), jnp.ones((4, 3)), 1.0),
        lambda: normalize.discounted_sum(jnp.zeros(2), jnp.ones((4, 2)), jnp.ones((4, 1)), 0.9),
        lambda: normalize.discounted_sum(jnp.zeros(2), jnp.ones((4, 1)), jnp.ones((4, 1)), 0.9),
    ],
    ids=["batch", "where", "one feature", "one moment", "done", "start"],
)
def test_a_shape_that_would_broadcast_is_refused(call: Any) -> None:
    with pytest.raises(AssertionError, match=r"shape"):
        call()
