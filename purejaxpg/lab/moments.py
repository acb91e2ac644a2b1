"""Mean and variance of gradient estimators: exact, sampled, and how well the two agree."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax, random

DIRECTIONS = 4  # along which means are compared: the true gradient, and random ones
ROUNDING, TINY = 1e-9, 1e-300
CHUNK = 200  # keys whose gradients are in memory at a time


@struct.dataclass
class Moments:
    """Expectations over draws of the gradients g of E estimators, each a vector of D numbers."""

    mean: jax.Array  # [E, D] of g
    square: jax.Array  # [E] of ‖g‖²
    fourth: jax.Array  # [E] of ‖g‖⁴; NaN: not known
    along: jax.Array  # [E, K] of g·u, for each direction u
    along_square: jax.Array  # [E, K] of (g·u)²; NaN: not known

    @property
    def variance(self) -> jax.Array:
        """Trace of the covariance [E]."""
        return self.square - jnp.square(self.mean).sum(-1)

    def one(self, e: int) -> "Moments":
        """Return the moments of one estimator, as of E = 1."""
        return jax.tree.map(lambda x: x[e : e + 1], self)


def weighted(gradients: jax.Array, weight: jax.Array, directions: jax.Array) -> Moments:
    """Return the moments of gradients with given probabilities.

    Args:
        gradients: [B, E, D].
        weight: [B] probability of each; sums to 1 for an expectation.
        directions: [K, D] unit vectors.

    Returns:
        Moments of E estimators.
    """
    square = jnp.square(gradients).sum(-1)
    along = gradients @ directions.T
    return Moments(
        mean=jnp.einsum("b,bed->ed", weight, gradients),
        square=weight @ square,
        fourth=weight @ jnp.square(square),
        along=jnp.einsum("b,bek->ek", weight, along),
        along_square=jnp.einsum("b,bek->ek", weight, jnp.square(along)),
    )


def sampled(
    gradients: Callable[[jax.Array], jax.Array], key: jax.Array, count: int, directions: jax.Array
) -> Moments:
    """Return the moments over `count` keys.

    Args:
        gradients: key -> [E, D].
        key: from which the others are split.
        count: number of keys, static.
        directions: [K, D] unit vectors.

    Returns:
        Moments of E estimators; a pure function, to be jitted.
    """
    chunks = -(-count // CHUNK)
    keys = random.split(key, (chunks, CHUNK))
    weight = (jnp.arange(chunks * CHUNK) < count).reshape(chunks, CHUNK) / count

    def add(total: Moments, now: tuple[jax.Array, jax.Array]) -> tuple[Moments, None]:
        keys, weight = now
        some = weighted(jax.vmap(gradients)(keys), weight, directions)
        return jax.tree.map(jnp.add, total, some), None

    example = jax.eval_shape(lambda: weighted(jax.vmap(gradients)(keys[0]), weight[0], directions))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example)
    return lax.scan(add, zero, (keys, weight))[0]


def unit_vectors(truth: np.ndarray, seed: int) -> np.ndarray:
    """Return the directions [K, D] in which means are compared; the first is that of `truth`."""
    # A stream of their own: the policies are the first draws of the seed.
    further = np.random.default_rng([seed, 1]).normal(size=(DIRECTIONS - 1, truth.size))
    vectors = np.concatenate([truth.reshape(1, -1), further])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def z_scores(exact: Moments, sampled: Moments, count: int) -> np.ndarray:
    """Return differences of sampled and exact moments, in standard errors.

    The standard errors are exact where the exact moments have them. That matters: a sample that
    happens to miss the rare large gradients underestimates its own error.

    Args:
        exact: of E estimators.
        sampled: of the same, over `count` keys.
        count: number of keys.

    Returns:
        [E, K + 1]: of the mean along each direction, then of ‖g‖².
    """
    known, seen = (jax.tree.map(np.asarray, each) for each in (exact, sampled))
    along_square, fourth = (
        np.where(np.isnan(a), b, a)
        for a, b in ((known.along_square, seen.along_square), (known.fourth, seen.fourth))
    )
    difference = np.column_stack([seen.along - known.along, seen.square - known.square])
    spread = np.column_stack(
        [along_square - np.square(known.along), fourth - np.square(known.square)]
    )
    error = np.sqrt(np.maximum(spread, 0.0) / count)
    # What never varies has no standard error, and must agree up to rounding.
    size = np.sqrt(known.square)[:, None]
    units = np.column_stack([np.repeat(size, known.along.shape[1], 1), np.square(size)])
    return difference / np.maximum(error, ROUNDING * units + TINY)
