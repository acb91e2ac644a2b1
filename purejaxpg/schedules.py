"""Factors on the learning rate, by the number of updates that are finished.

An *update* is one iteration of an agent: data, then all gradient steps on them. Every gradient step
of an update has the same factor. The first update runs with k = 0 finished.
"""

from typing import Any

import jax
import jax.numpy as jnp

from purejaxpg import config as configs

KINDS = ("constant", "linear", "robbins_monro")


def check(config: Any) -> None:
    """Check the field `learning_rate_schedule` of an agent's configuration."""
    configs.one_of(config, "learning_rate_schedule", KINDS)


def scheduled(
    config: Any, learning_rate: jax.Array | float, num_updates: jax.Array | int
) -> jax.Array:
    """Return `learning_rate` as the agent's schedule has it after `num_updates` finished updates.

    Args:
        config: its fields `learning_rate_schedule` and `learning_rate_half_life`, and the property
            `num_updates`, the length of the run, are read.
        learning_rate: that of the first update.
        num_updates: updates finished so far.

    Returns:
        [] learning rate of the next update.
    """
    kind, half_life = config.learning_rate_schedule, config.learning_rate_half_life
    return learning_rate * factor(kind, num_updates, config.num_updates, half_life)


def factor(
    kind: str,
    num_updates: jax.Array | int,
    total: jax.Array | int,
    half_life: jax.Array | float,
) -> jax.Array:
    """Factor on the learning rate under the schedule of that name.

        constant: 1      linear: 1 − k / total      robbins_monro: half_life / (half_life + k)

    It is a factor, to be multiplied by the learning rate of the first update. Count updates and not
    gradient steps: with the latter, a linear schedule ends after the first few per cent of a run.

    Args:
        kind: one of `KINDS`, static.
        num_updates: [...] k, updates finished so far, at least 0.
        total: updates in the whole run, at least 1; used by "linear".
        half_life: scalar, updates after which the factor is ½, positive; used by "robbins_monro".

    Returns:
        [...] factor in [0, 1], 1 for k = 0.

    Not for differentiation with respect to k, which is a count.

    >>> [factor(kind, 5, 20, 5.0).item() for kind in KINDS]
    [1.0, 0.75, 0.5]
    """
    if kind == "constant":
        return jnp.ones(jnp.shape(num_updates))
    if kind == "linear":
        return linear(num_updates, total)
    if kind == "robbins_monro":
        return robbins_monro(num_updates, half_life)
    raise ValueError(f"{kind!r} is no schedule of the learning rate; there are {', '.join(KINDS)}")


def linear(num_updates: jax.Array | int, total: jax.Array | int) -> jax.Array:
    """Factor that falls by the same amount after each update, to zero after the last.

        f_k = max(1 − k / total, 0)

    The last update runs with k = total − 1 finished and so with the factor 1 / total: a schedule
    that is zero already in the last update wastes it. Going on beyond the planned end leaves it at
    zero, where a negative factor would turn the gradient round.

    Args:
        num_updates: [...] k, updates finished so far, at least 0.
        total: updates in the whole run, at least 1. In float32, k = total − 1 is told from total
            up to 2²⁴ updates.

    Returns:
        [...] factor in [0, 1].

    Not for differentiation with respect to k, which is a count.

    >>> linear(jnp.arange(5), 4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return jnp.maximum(1.0 - jnp.asarray(num_updates) / total, 0.0)


def robbins_monro(num_updates: jax.Array | int, half_life: jax.Array | float) -> jax.Array:
    """Factor that falls as the reciprocal of the number of updates.

        f_k = half_life / (half_life + k) = 1 / (1 + k / half_life)

    The factors sum to infinity, so any distance can still be covered, and their squares have a
    finite sum, so the noise dies out. Both are needed for convergence: a geometric decay satisfies
    the second and may stop anywhere. "Half-life" is exact for the first halving only: the next
    takes twice as long, and a tenth is left after nine.

    Args:
        num_updates: [...] k, updates finished so far, at least 0.
        half_life: scalar, updates after which the factor is ½, positive. With 1 and a learning rate
            of 1 the factors are 1, 1/2, 1/3, ..., those of a running mean; inf gives a constant 1.

    Returns:
        [...] factor in (0, 1].

    Not for differentiation with respect to k, which is a count.

    References:
        Robbins and Monro 1951, A stochastic approximation method; Sutton and Barto, Reinforcement
        Learning: An Introduction, 2nd edition, eq. 2.7, for the two conditions.

    >>> robbins_monro(jnp.array([0, 3, 9]), 3.0).tolist()
    [1.0, 0.5, 0.25]
    """
    return 1.0 / (1.0 + jnp.asarray(num_updates) / half_life)
