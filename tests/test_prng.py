"""Keys that hash without a loop give the bits of jax's own; a permutation is one, and uniform."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import prng

pytestmark = pytest.mark.fast
SEEDS = (0, 1, 12345, 2**31, 2**32 - 1)
DRAWS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "uniform": lambda key: random.uniform(key, (3, 5)),
    "normal": lambda key: random.normal(key, (7,)),
    "categorical": lambda key: random.categorical(key, jnp.zeros((4, 3))),
    "randint": lambda key: random.randint(key, (9,), 0, 77),
    "bernoulli": lambda key: random.bernoulli(key, 0.3, (5,)),
    "permutation": lambda key: random.permutation(key, 13),
    "bytes": lambda key: random.bits(key, (3,), jnp.uint8),
    "halves": lambda key: random.bits(key, (3,), jnp.uint16),
    "scalar": lambda key: random.bits(key),
    "none": lambda key: random.bits(key, (0,)),
    "split": lambda key: random.key_data(random.split(key, (2, 3))),
    "fold": lambda key: random.key_data(random.fold_in(key, np.uint32(2**31 + 7))),
    "rows": lambda key: jax.vmap(lambda k: random.uniform(k, (3,)))(random.split(key, 4)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_key_draws_what_that_of_jax_draws(name: str) -> None:
    draw = jax.jit(DRAWS[name])
    for seed in SEEDS:
        mine, default = prng.key(seed), random.key(seed, impl=prng.THREEFRY)
        assert mine.dtype != default.dtype
        np.testing.assert_array_equal(random.key_data(mine), random.key_data(default))
        np.testing.assert_array_equal(draw(mine), draw(default))


def test_64_bits_are_those_of_jax() -> None:
    with jax.enable_x64(True):
        for width in (jnp.uint64, jnp.uint32):
            mine, default = prng.key(3), random.key(3, impl=prng.THREEFRY)
            drawn = [random.bits(key, (5,), width) for key in (mine, default)]
            np.testing.assert_array_equal(*drawn)


def test_the_hash_gives_the_published_numbers() -> None:
    """The known-answer tests of Random123, the library of Salmon et al.: 20 rounds."""
    ones = 0xFFFFFFFF
    cases = [
        ((0, 0, 0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ones, ones, ones, ones), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344, 0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for (k0, k1, x0, x1), expected in cases:
        found = prng.hash2x32(*map(jnp.uint32, (k0, k1, x0, x1)))
        assert tuple(map(int, found)) == expected


@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000, 2**16, 2**16 + 1])
def test_a_permutation_holds_every_index_once(n: int) -> None:
    for seed in range(3):
        order = prng.permutation(prng.key(seed), n)
        assert order.dtype == jnp.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_jax_shuffles_what_leaves_too_few_random_bits() -> None:
    key = prng.key(0)
    for n, same in ((2**16, False), (2**16 + 1, True)):
        assert np.array_equal(prng.permutation(key, n), random.permutation(key, n)) == same


def test_permutations_are_uniform() -> None:
    """All 24 orders of 4, of 24,000 draws: chi squared with 23 degrees of freedom."""
    keys = random.split(prng.key(0), 24_000)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: prng.permutation(key, 4)))(keys))
    codes = orders @ np.array([64, 16, 4, 1])
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 49.7  # exceeded with a probability of 0.001


def test_where_an_index_lands_is_uniform() -> None:
    keys = random.split(prng.key(1), 4096)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: prng.permutation(key, 128)))(keys))
    for place in (0, 63, 127):
        counts = np.bincount(orders[:, place], minlength=128)
        assert ((counts - 32.0) ** 2 / 32.0).sum() < 181.0  # 127 degrees of freedom, 0.001
