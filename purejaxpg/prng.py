"""Random keys and permutations: the numbers of jax's default generator, computed faster on the CPU.

On the CPU, jax 0.10 and 0.11 compile the Threefry hash as a loop of five small steps. That suits
arrays of a million numbers. An agent draws only a few at a time, and the loops took a fifth of
PPO's training time. Here the twenty rounds are written out; every bit is the same.
"""

import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.extend import random as extension

THREEFRY = "threefry2x32"  # jax's default, named so that nobody's settings change results
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA


@jax.jit  # a function of its own in every program, traced and lowered once
def hash2x32(
    k0: jax.Array, k1: jax.Array, x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Encrypt the counter (x0, x1) under the key (k0, k1): Threefry-2x32 of 20 rounds.

        round:       x0 += x1;  x1 = rotate(x1, r) ^ x0
        after every fourth, the i-th time:  x0 += k_i;  x1 += k_{i+1} + i,    k_2 = k0 ^ k1 ^ parity

    Args:
        k0: [...] uint32, as the others; shapes broadcast.
        k1: the key's second word.
        x0: the counter's first word.
        x1: the counter's second word.

    Returns:
        Two words [...] uint32.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(PARITY))
    x0, x1 = x0 + k0, x1 + k1
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = ((x1 << r) | (x1 >> (32 - r))) ^ x0
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    # Without this, jax 0.11 fuses consecutive hashes and compiles for more than ten minutes.
    return lax.optimization_barrier((x0, x1))


def _counted(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Hash 0, 1, 2, ... in an array of `shape`."""
    counter = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return hash2x32(key[0], key[1], jnp.zeros_like(counter), counter)


def _split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.stack(_counted(key, shape), axis=-1)


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    high, low = _counted(key, shape)
    if width == 64:
        return (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
    return (high ^ low).astype(jnp.dtype(f"uint{width}"))


def _fold_in(key: jax.Array, data: Any) -> jax.Array:
    word = jnp.asarray(data).astype(jnp.uint32)
    return jnp.stack(hash2x32(key[0], key[1], jnp.zeros_like(word), word))


def _seed(seed: jax.Array) -> jax.Array:
    return random.key_data(random.key(seed, impl=THREEFRY))


_UNROLLED: Hashable = extension.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="threefry2x32_unrolled",
    tag="fru",
)


def key(seed: Any) -> jax.Array:
    """Return the key of a run: `jax.random.key(seed)`, bit for bit, in the faster form.

    Args:
        seed: [] integer.

    Returns:
        A typed key, for all functions of `jax.random`.
    """
    return random.key(seed, impl=_UNROLLED if jax.default_backend() == "cpu" else THREEFRY)


def permutation(key: jax.Array, n: int) -> jax.Array:
    """Shuffle 0, 1, ..., n - 1.

    It sorts one array of words, random high bits above the index, because the CPU sorts pairs five
    times more slowly. Indices with equal random numbers keep their order: for n = 512 those have 23
    bits, so a given pair is in order with a probability of 1/2 + 2⁻²⁴.

    Args:
        key: used up by this call.
        n: at least 1; beyond 2¹⁶ too few random bits would be left, and jax's own function is
            used.

    Returns:
        [n] int32.
    """
    index_bits = (n - 1).bit_length()
    if index_bits > 16:
        return random.permutation(key, n)
    index = jnp.arange(n, dtype=jnp.uint32)
    words = (random.bits(key, (n,)) << index_bits) | index
    return (jnp.sort(words) & ((1 << index_bits) - 1)).astype(jnp.int32)
