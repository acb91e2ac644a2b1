"""The linear recurrence along the leading, time axis, which returns and discounted sums are."""

import jax
import jax.numpy as jnp

from purejaxpg import backend

# XLA repeats the chain of unrolled rows for each of its outputs, so long chains cost more. On two
# CPU cores, [128, 4] under vmap took 74, 64, 68, 227 us (16 rows) and 0.78, 0.66, 0.99, 2.1 ms (256
# rows) for an unroll of 1, 4, 8, 16. Four costs nothing there and saves steps elsewhere.
_UNROLL = 4


def linear(term: jax.Array, decay: jax.Array, start: jax.Array, reverse: bool = False) -> jax.Array:
    """Solve a linear recurrence along the first axis.

        y_t = term_t + decay_t y_{t−1},      y_{−1} = start

    If reversed, y_t = term_t + decay_t y_{t+1} with y_T = start. The decay of row t belongs to the
    row that is computed, not to the one before it.

    On a CPU this is a loop over rows. On a GPU each step of a loop starts kernels, so there it is
    an associative scan: about 2 log₂ T steps over all rows, each of which combines neighbours,

        (d, y) then (d', y')  ->  (d' d, y' + d' y)

    Args:
        term: [T, ...] with T of at least 1.
        decay: [T, ...]. A zero begins anew, unless what came before is not finite.
        start: [...] the value before the first row, or after the last one.
        reverse: go from the last row to the first.

    Returns:
        [T, ...]

    Linear in `term` and `start`; no gradient is stopped.

    References:
        Blelloch 1990, Prefix sums and their applications, CMU-CS-90-190.

    >>> linear(jnp.ones(3), jnp.array([0.5, 0.5, 0.0]), jnp.array(4.0)).tolist()
    [3.0, 2.5, 1.0]
    """
    start = start.astype(jnp.result_type(term, decay, start))
    if backend.on_gpu():
        term, decay = term.astype(start.dtype), decay.astype(start.dtype)
        first = -1 if reverse else 0
        term = term.at[first].add(decay[first] * start)  # from here on, `start` is zero
        _, total = jax.lax.associative_scan(_one_after_the_other, (decay, term), reverse=reverse)
        return total

    def step(before: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total = row[0] + row[1] * before
        return total, total

    _, total = jax.lax.scan(step, start, (term, decay), reverse=reverse, unroll=_UNROLL)
    return total


def _one_after_the_other(
    before: tuple[jax.Array, jax.Array], after: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Combine two stretches of rows, each y -> total + decay y."""
    return after[0] * before[0], after[1] + after[0] * before[1]
