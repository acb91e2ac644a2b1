"""A replay buffer: a ring of transitions as a pytree, for hundreds of agents under vmap.

A row is one transition, and all of it has the index t: `next_obs` is stored beside `obs`, and is
the final observation if an episode ended. After `init`, no work grows with the capacity.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax import random

from purejaxpg import config as configs

Tree = Any  # a pytree of arrays


@struct.dataclass
class Buffer:
    """A ring of transitions, of which the first `size` rows are in use."""

    storage: Tree  # leaves [capacity, ...]
    position: jax.Array  # [] int32, the row that is written next
    size: jax.Array  # [] int32, how many rows hold a transition


def check(config: Any) -> None:
    """Check the fields that size the replay buffer and its use in an agent's configuration.

    Args:
        config: has `replay_capacity`, `batch_size` (rows per gradient step), `learning_starts`
            (environment steps before the first gradient step), `num_envs`, `num_steps` and
            `total_timesteps`.

    Raises:
        InputError: the numbers do not fit together.
    """
    configs.at_least(config, 1, "batch_size")
    capacity, starts = config.replay_capacity, config.learning_starts
    added = config.num_envs * config.num_steps
    configs.require(
        capacity >= config.batch_size,
        f"replay_capacity must be batch_size ({config.batch_size}) or more, but is {capacity}.",
    )
    configs.require(
        capacity >= added,
        "replay_capacity must hold the transitions of one update, num_envs * num_steps "
        f"({added}), but is {capacity}.",
    )
    configs.require(
        capacity >= starts,
        f"replay_capacity must be learning_starts ({starts}) or more, so that the whole warm-up "
        f"fits, but is {capacity}.",
    )
    configs.require(
        starts >= config.num_envs,
        f"learning_starts must be num_envs ({config.num_envs}) or more, or there is nothing to "
        f"sample, but is {starts}.",
    )
    configs.divides(config, "num_envs", starts, "learning_starts")
    configs.at_most(config, 2**31 - 1, "total_timesteps")
    configs.require(
        starts < config.total_timesteps,
        f"learning_starts must be less than total_timesteps ({config.total_timesteps}), or the "
        f"warm-up is longer than the training, but is {starts}.",
    )
    configs.require(
        config.total_timesteps >= starts + added,
        f"total_timesteps must leave room for an update of num_envs * num_steps ({added}) after "
        f"learning_starts ({starts}), but is {config.total_timesteps}.",
    )


def init(capacity: int, example: Tree) -> Buffer:
    """Return an empty buffer.

    Args:
        capacity: number of transitions that it holds, at least 1.
        example: one transition without a leading axis, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The buffer, with storage of zeros.
    """
    if capacity < 1:
        raise ValueError(f"A replay buffer must hold 1 transition or more, but not {capacity}.")
    storage = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), example)
    return Buffer(storage=storage, position=jnp.int32(0), size=jnp.int32(0))


def add(buffer: Buffer, batch: Tree) -> Buffer:
    """Return the buffer with K more transitions; once it is full, they replace the oldest.

    Args:
        buffer: the buffer. If it is donated, or carried by a loop, it changes in place.
        batch: the transitions, leaves [K, ...], the oldest first, K at most the capacity.

    Returns:
        The buffer.
    """
    chex.assert_equal_shape_prefix(jax.tree.leaves(batch), 1)
    given, stored = row_types(batch), row_types(buffer.storage)
    if given != stored:
        raise ValueError(f"The replay buffer keeps rows {stored}, but the batch has rows {given}.")
    num_rows, capacity = length(batch), length(buffer.storage)
    if num_rows > capacity:
        raise ValueError(
            f"A replay buffer that holds {capacity} transitions cannot take {num_rows} at once."
        )
    slots = (buffer.position + jnp.arange(num_rows, dtype=jnp.int32)) % capacity
    if num_rows == 1:
        # XLA turns the write of a single row into an update of a slice, may repeat that inside the
        # gather that samples, and then copies the whole buffer to keep the old rows. A second row
        # that is dropped prevents it.
        slots = jnp.append(slots, capacity)
        batch = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)
    storage = jax.tree.map(
        lambda old, new: old.at[slots].set(new, mode="drop"), buffer.storage, batch
    )
    return Buffer(
        storage=storage,
        position=(buffer.position + num_rows) % capacity,
        size=jnp.minimum(buffer.size + num_rows, capacity),
    )


def sample(key: jax.Array, buffer: Buffer, batch_size: int) -> Tree:
    """Return transitions drawn uniformly, with replacement, from all that are stored.

    The buffer must hold at least one: a traced `size` cannot raise, so an empty buffer gives zeros.

    Args:
        key: a jax key.
        buffer: the buffer, its `size` 1 or more.
        batch_size: B, the number of transitions to draw.

    Returns:
        The transitions, leaves [B, ...].
    """
    slots = random.randint(key, (batch_size,), 0, buffer.size, dtype=jnp.int32)
    return jax.tree.map(lambda x: x[slots], buffer.storage)


def length(tree: Tree) -> int:
    """Return the size of the leading axis."""
    return int(jax.tree.leaves(tree)[0].shape[0])


def row_types(tree: Tree) -> Tree:
    """Return the tree with, for each leaf, dtype and shape of one row, such as `float32[3]`."""
    return jax.tree.map(lambda x: f"{x.dtype.name}{list(x.shape[1:])}", tree)
