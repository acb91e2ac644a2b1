"""Running mean and variance, the two normalisers built on them, and how agents use those.

The functions whose first argument is `config` read the agent's switches: `normalize_obs`,
`clip_obs`, `normalize_reward`, `gamma`, `reward_scale` and `clip_reward`.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct

from purejaxpg.kernels import recurrence


@struct.dataclass
class Moments:
    """Mean and variance of all data so far; `count` 0 means there were none."""

    mean: jax.Array  # [...]
    var: jax.Array  # [...]
    count: jax.Array  # []


def init(shape: tuple[int, ...]) -> Moments:
    """Return moments that leave data unchanged until the first update: mean 0, variance 1."""
    return Moments(jnp.zeros(shape), jnp.ones(shape), jnp.zeros(()))


def update(moments: Moments, batch: jax.Array, where: jax.Array | None = None) -> Moments:
    """Fold a batch into the moments; the result is that of all data at once.

        m = m_a + d n_b / n,    n v = n_a v_a + n_b v_b + d^2 n_a n_b / n,    d = m_b - m_a

    Args:
        moments: moments of shape [...].
        batch: [..., *moments shape]; all leading axes count as samples.
        where: [...] bool, the samples that count, at least one. By default, all.

    Returns:
        The merged moments (population variance, divided by n).

    Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", The American
    Statistician 37(3).
    """
    chex.assert_shape(batch, (..., *moments.mean.shape))
    axes = tuple(range(batch.ndim - moments.mean.ndim))
    if where is None:
        batch_mean, batch_var = batch.mean(axes), batch.var(axes)
        batch_count: jax.Array | float = batch.size / max(moments.mean.size, 1)
    else:
        chex.assert_shape(where, batch.shape[: len(axes)])
        counted = where.reshape(where.shape + (1,) * moments.mean.ndim)
        batch_mean, batch_var = batch.mean(axes, where=counted), batch.var(axes, where=counted)
        batch_count = where.sum().astype(jnp.float32)
    count = moments.count + batch_count
    delta = batch_mean - moments.mean
    spread = moments.var * moments.count + batch_var * batch_count
    spread = spread + delta**2 * moments.count * batch_count / count
    return Moments(moments.mean + delta * batch_count / count, spread / count, count)


def inverse_std(var: jax.Array) -> jax.Array:
    """Return 1 / sqrt(var + 1e-8) [...], and NaN where the variance [...] has overflowed.

    The quotient would be zero there, and an agent that multiplies by it would learn from nothing.
    A run whose loss is NaN is marked as diverged.
    """
    return jnp.where(jnp.isfinite(var), jax.lax.rsqrt(var + 1e-8), jnp.nan)


def normalize(moments: Moments, x: jax.Array, clip: jax.Array | float) -> jax.Array:
    """Return (x - mean) / std, clipped to [-clip, clip].

    Args:
        moments: moments of shape [...].
        x: [..., *moments shape].
        clip: bound on the result, in standard deviations; inf switches it off.

    Returns:
        An array of x's shape; NaN where the variance is beyond float32, for values beyond 1e19.
    """
    chex.assert_shape(x, (..., *moments.mean.shape))
    ahead = range(x.ndim - moments.mean.ndim)  # explicit, for jax_numpy_rank_promotion = "raise"
    mean, scale = (jnp.expand_dims(m, ahead) for m in (moments.mean, inverse_std(moments.var)))
    return jnp.clip((x - mean) * scale, -clip, clip)


def discounted_sum(
    start: jax.Array, reward: jax.Array, done: jax.Array, gamma: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Accumulate discounted reward forward in time, from zero in every episode.

        R_t = r_t + gamma (1 - done_{t-1}) R_{t-1}

    The episode's last reward belongs to the episode: the sum is cleared after the step that
    ends it, not at it. Its standard deviation is the scale for reward normalisation.

    Args:
        start: [N] the sum before the first step, 0 where an episode begins.
        reward: [T, N].
        done: [T, N] bool.
        gamma: discount per environment step, in [0, 1].

    Returns:
        The sum to start the next rollout with [N], and R [T, N].
    """
    chex.assert_equal_shape([reward, done])
    chex.assert_shape(reward, (None, *start.shape))
    begins = jnp.roll(done, 1, 0).at[0].set(False)  # `start` is zero where an episode begins
    total = recurrence.linear(reward, jnp.where(begins, 0.0, gamma), start)
    return jnp.where(done[-1], 0.0, total[-1]), total


@struct.dataclass
class RewardScale:
    """The state of reward normalisation between two rollouts."""

    running: jax.Array  # [N] discounted sum of the rewards of the episode in progress
    moments: Moments  # [] of all such sums so far


def init_reward_scale(num_envs: int) -> RewardScale:
    """Return the scale before the first reward."""
    return RewardScale(jnp.zeros(num_envs), init(()))


def scale_reward(
    scale: RewardScale,
    reward: jax.Array,
    done: jax.Array,
    gamma: jax.Array | float,
    where: jax.Array | None = None,
) -> tuple[RewardScale, jax.Array]:
    """Divide rewards by the standard deviation of the discounted sum of rewards.

    No mean is subtracted: a shift would pay for long or for short episodes. If the sums hardly
    vary, as in one-step episodes that all pay the same, the standard deviation counts as a tenth of
    their root mean square, so that such rewards become 10 and do not explode.

    Args:
        scale: updated with these rewards first.
        reward: [T, N] raw.
        done: [T, N] bool.
        gamma: discount per environment step, in [0, 1].
        where: [T, N] bool, the steps whose sums count. By default, all.

    Returns:
        The updated scale, and rewards [T, N]; NaN where sums are beyond 1e19.
    """
    running, sums = discounted_sum(scale.running, reward, done, gamma)
    moments = update(scale.moments, sums, where)
    mean_square = moments.var + moments.mean**2
    var = jnp.maximum(moments.var, 0.01 * mean_square)
    return RewardScale(running, moments), reward * inverse_std(var)


@struct.dataclass
class Normalizers:
    """The statistics of an agent's inputs; a normaliser that is off never changes."""

    obs: Moments  # [D]
    reward: RewardScale  # [N]


def init_both(obs: jax.Array) -> Normalizers:
    """Return the initial normalisers for observations [N, D]."""
    return Normalizers(init(obs.shape[1:]), init_reward_scale(obs.shape[0]))


def observations(config: Any, normalizers: Normalizers, obs: jax.Array) -> jax.Array:
    """Return observations as the networks see them.

    Args:
        config: has `normalize_obs` and `clip_obs`, a bound in standard deviations.
        normalizers: the statistics so far.
        obs: [..., D] raw.

    Returns:
        [..., D], raw if the agent does not normalise.
    """
    return normalize(normalizers.obs, obs, config.clip_obs) if config.normalize_obs else obs


def observed(
    config: Any, normalizers: Normalizers, obs: jax.Array, where: jax.Array | None = None
) -> Normalizers:
    """Fold raw observations into the statistics, if the agent normalises by them.

    Args:
        config: has `normalize_obs`.
        normalizers: the statistics so far.
        obs: [..., D] raw.
        where: [...] bool, the observations that count, at least one. By default, all.
    """
    if not config.normalize_obs:
        return normalizers
    return dataclasses.replace(normalizers, obs=update(normalizers.obs, obs, where))


def restarted(normalizers: Normalizers) -> Normalizers:
    """Forget the episodes in progress, for data in which every environment starts a new one."""
    running = jnp.zeros_like(normalizers.reward.running)
    return dataclasses.replace(
        normalizers, reward=dataclasses.replace(normalizers.reward, running=running)
    )


def rewards(
    config: Any,
    normalizers: Normalizers,
    reward: jax.Array,
    done: jax.Array,
    where: jax.Array | None = None,
) -> tuple[Normalizers, jax.Array]:
    """Return rewards as the agent learns from them: normalised, scaled, then clipped.

    Args:
        config: the agent's configuration.
        normalizers: updated with these rewards first.
        reward: [T, N] raw.
        done: [T, N] bool.
        where: [T, N] bool, the steps that count for the statistics. By default, all.

    Returns:
        The normalisers, and rewards [T, N] in [-clip_reward, clip_reward].
    """
    if config.normalize_reward:
        scale, reward = scale_reward(normalizers.reward, reward, done, config.gamma, where)
        normalizers = dataclasses.replace(normalizers, reward=scale)
    bound = config.clip_reward
    return normalizers, jnp.clip(config.reward_scale * reward, -bound, bound)
