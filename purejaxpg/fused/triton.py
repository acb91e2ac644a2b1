"""The few operations on memory and tiles that kernels use, compiled by Triton or interpreted.

Only modules that build kernels import this one, since importing Pallas takes a second.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton

from purejaxpg.fused import paths

Index = tuple[Any, ...]  # one number or array of integers for each axis; arrays of one shape


def load(ref: Any, index: Index, mask: jax.Array | None = None) -> jax.Array:
    """Return the numbers of an array in memory at an index, and zero where not `mask`."""
    if not paths.interpreted():
        other = None if mask is None else 0
        return triton.load(ref.at[_spread(index)], mask=mask, other=other)
    inside = tuple(jnp.clip(i, 0, size - 1) for i, size in zip(index, ref.shape, strict=True))
    value = ref[...][inside]
    return value if mask is None else jnp.where(mask, value, jnp.zeros((), value.dtype))


def store(ref: Any, index: Index, value: jax.Array, mask: jax.Array | None = None) -> None:
    """Write numbers into an array in memory at an index, where `mask`."""
    value = value.astype(jnp.int32) if value.dtype == jnp.bool_ else value
    if not paths.interpreted():
        triton.store(ref.at[_spread(index)], value, mask=mask)
        return
    index = _spread(index)
    if mask is not None:  # an index past the end is dropped
        index = (jnp.where(mask, index[0], ref.shape[0]), *index[1:])
    ref[...] = ref[...].at[index].set(value, mode="drop")


def barrier() -> None:
    """Wait for all threads of the block, so that they see what the others wrote."""
    if not paths.interpreted():
        triton.debug_barrier()


def _spread(index: Index) -> Index:
    """Broadcast the parts of an index to one shape."""
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in index))
    return tuple(jnp.broadcast_to(jnp.asarray(i, jnp.int32), shape) for i in index)


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Return the index along an axis."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def padded(size: int, least: int = 16) -> int:
    """Return the least power of two that holds `size` numbers; a product needs sixteen."""
    return max(least, 1 << (size - 1).bit_length())


def load_matrix(ref: Any, shape: tuple[int, int]) -> jax.Array:
    """Return a matrix in memory, padded with zeros to powers of two."""
    full = (padded(shape[0]), padded(shape[1]))
    i, j = iota(full, 0), iota(full, 1)
    return load(ref, (i, j), (i < shape[0]) & (j < shape[1]))


def load_vector(ref: Any, size: int) -> jax.Array:
    """Return a vector in memory, padded with zeros to a power of two."""
    j = iota((padded(size),), 0)
    return load(ref, (j,), j < size)


def dot(a: jax.Array, b: jax.Array, fast: bool, **transposed: bool) -> jax.Array:
    """Return a matrix product, summed in float32.

    Args:
        a: [M, K].
        b: [K, N].
        fast: round the operands to float16, which has as many bits of mantissa as TF32.
        transposed: `trans_a` or `trans_b`, as for Pallas.
    """
    if fast:
        return triton.dot(a.astype(jnp.float16), b.astype(jnp.float16), **transposed)
    return triton.dot(a, b, precision=lax.Precision.HIGHEST, **transposed)


def tanh(x: jax.Array, fast: bool) -> jax.Array:
    """Return tanh, by the hardware's approximation (to about 5e-4) if `fast`."""
    return triton.approx_tanh(x) if fast and not paths.interpreted() else jnp.tanh(x)
