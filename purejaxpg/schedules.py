"""Factors on the learning rate, by the number of finished updates.

An *update* is one iteration of an agent: data, then all gradient steps on them. Every gradient step
of an update has the same factor. For the first update, k = 0.
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
    """Return the learning rate that the agent's schedule prescribes after `num_updates` updates.

    Args:
        config: its fields `learning_rate_schedule` and `learning_rate_half_life`, and the property
            `num_updates`, the length of the run, are read.
        learning_rate: the learning rate of the first update.
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
    """Return the factor on the learning rate under the schedule `kind`.

        constant: 1      linear: 1 − k / total      robbins_monro: half_life / (half_life + k)

    Multiply it by the learning rate of the first update. Count updates, not gradient steps: with
    the latter, a linear schedule ends after the first few per cent of a run.

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
    raise ValueError(f"There is no schedule {kind!r}; there are {', '.join(KINDS)}.")


def linear(num_updates: jax.Array | int, total: jax.Array | int) -> jax.Array:
    """Return a factor that falls by the same amount after each update, to zero after the last.

        f_k = max(1 − k / total, 0)

    The last update has k = total − 1 and therefore the factor 1 / total: a schedule that is already
    zero in the last update wastes it. After the planned end the factor stays at zero, because a
    negative one would reverse the gradient.

    Args:
        num_updates: [...] k, updates finished so far, at least 0.
        total: updates in the whole run, at least 1. Float32 distinguishes k = total − 1 from total
            up to 2²⁴ updates.

    Returns:
        [...] factor in [0, 1].

    Not for differentiation with respect to k, which is a count.

    >>> linear(jnp.arange(5), 4).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return jnp.maximum(1.0 - jnp.asarray(num_updates) / total, 0.0)


def robbins_monro(num_updates: jax.Array | int, half_life: jax.Array | float) -> jax.Array:
    """Return a factor that falls as the reciprocal of the number of updates.

        f_k = half_life / (half_life + k) = 1 / (1 + k / half_life)

    The factors sum to infinity, so they can cover any distance, and their squares have a finite
    sum, so the noise dies out. Convergence needs both: a geometric decay satisfies the second and
    may stop anywhere. "Half-life" is exact for the first halving only: the next takes twice as
    long, and after nine half-lives a tenth is left.

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
