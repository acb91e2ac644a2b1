"""How should a replay buffer store, write and read its transitions?

Compares, in alternating rounds on one core, loops in which every step adds K transitions of
Pendulum's shapes (9 numbers) and samples 256 from full buffers:

    replay         `purejaxpg/replay.py`: one array per field, rows written by scatter
    promised       the same, with the promise that indices are distinct and in bounds
    slice          the same, K rows written as one slice: right only if it never wraps
    per dtype      fields of one dtype side by side, rows written by scatter
    packed         one float32 array for everything, rows written by scatter
    packed, slice  one float32 array for everything, K rows written as a slice
    nothing        draws the indices and stores nothing: the cost that the others cannot avoid

Prints the median time per step and the program's scratch memory.

Run: taskset -c 0 python benchmarks/replay.py [rounds]
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from purejaxpg import replay

BATCH, STEPS = 256, 64
CAPACITIES = [10_000, 100_000, 1_000_000]
CASES = [(rows, k) for rows in (1, 8) for k in (1, 8, 64)]  # rows, transitions added per step
SHAPES = {
    "obs": jax.ShapeDtypeStruct((3,), jnp.float32),
    "action": jax.ShapeDtypeStruct((1,), jnp.float32),
    "reward": jax.ShapeDtypeStruct((), jnp.float32),
    "next_obs": jax.ShapeDtypeStruct((3,), jnp.float32),
    "terminated": jax.ShapeDtypeStruct((), jnp.bool_),
}


class Way(NamedTuple):
    init: Callable[[int], Any]  # capacity -> storage
    add: Callable[[Any, jax.Array, Any], Any]  # storage, position, batch -> storage
    get: Callable[[Any, jax.Array], Any]  # storage, slots -> batch


def module(capacity: int) -> replay.Buffer:
    return replay.init(capacity, SHAPES).replace(size=jnp.int32(capacity))


def module_add(buffer: replay.Buffer, position: jax.Array, batch: Any) -> replay.Buffer:
    return replay.add(buffer.replace(position=position), batch)


def module_get(buffer: replay.Buffer, slots: jax.Array) -> Any:
    return jax.tree.map(lambda x: x[slots], buffer.storage)


def promised_add(buffer: replay.Buffer, position: jax.Array, batch: Any) -> replay.Buffer:
    slots = wrapped(position, batch, replay.length(buffer.storage))
    put = lambda old, new: old.at[slots].set(  # noqa: E731
        new, mode="promise_in_bounds", unique_indices=True
    )
    return buffer.replace(storage=jax.tree.map(put, buffer.storage, batch))


def promised_get(buffer: replay.Buffer, slots: jax.Array) -> Any:
    return jax.tree.map(lambda x: x.at[slots].get(mode="promise_in_bounds"), buffer.storage)


def slice_add(buffer: replay.Buffer, position: jax.Array, batch: Any) -> replay.Buffer:
    put = lambda old, new: lax.dynamic_update_slice_in_dim(old, new, position, 0)  # noqa: E731
    return buffer.replace(storage=jax.tree.map(put, buffer.storage, batch))


def by_dtype(capacity: int) -> Any:
    return {"floats": jnp.zeros((capacity, 8)), "terminated": jnp.zeros(capacity, bool)}


def by_dtype_add(storage: Any, position: jax.Array, batch: Any) -> Any:
    slots = wrapped(position, batch, storage["floats"].shape[0])
    floats = storage["floats"].at[slots].set(packed_rows(batch)[:, :8])
    return {
        "floats": floats,
        "terminated": storage["terminated"].at[slots].set(batch["terminated"]),
    }


def by_dtype_get(storage: Any, slots: jax.Array) -> Any:
    return {**divided(storage["floats"][slots]), "terminated": storage["terminated"][slots]}


def packed(capacity: int) -> jax.Array:
    return jnp.zeros((capacity, sum(math.prod(s.shape) for s in SHAPES.values())))


def packed_rows(batch: Any) -> jax.Array:
    columns = [batch[name].reshape(batch[name].shape[0], -1) for name in SHAPES]
    return jnp.concatenate([column.astype(jnp.float32) for column in columns], axis=1)


def packed_add(storage: jax.Array, position: jax.Array, batch: Any) -> jax.Array:
    return storage.at[wrapped(position, batch, storage.shape[0])].set(packed_rows(batch))


def packed_slice(storage: jax.Array, position: jax.Array, batch: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(storage, packed_rows(batch), position, 0)


def packed_get(storage: jax.Array, slots: jax.Array) -> Any:
    return divided(storage[slots])


def divided(matrix: jax.Array) -> Any:
    """Return the fields that `packed_rows` put side by side, as far as the columns reach."""
    batch, start = {}, 0
    for name, shape in SHAPES.items():
        stop = start + math.prod(shape.shape)
        if stop <= matrix.shape[1]:
            batch[name] = matrix[:, start:stop].reshape(-1, *shape.shape).astype(shape.dtype)
        start = stop
    return batch


def wrapped(position: jax.Array, batch: Any, capacity: int) -> jax.Array:
    return (position + jnp.arange(batch["reward"].shape[0], dtype=jnp.int32)) % capacity


WAYS = {
    "replay": Way(module, module_add, module_get),
    "promised": Way(module, promised_add, promised_get),
    "slice": Way(module, slice_add, module_get),
    "per dtype": Way(by_dtype, by_dtype_add, by_dtype_get),
    "packed": Way(packed, packed_add, packed_get),
    "packed, slice": Way(packed, packed_slice, packed_get),
    "nothing": Way(lambda _: (), lambda *_: (), lambda _, slots: slots),
}


def loop(way: Way, k: int, capacity: int) -> Callable[..., Any]:
    """Return STEPS times `add K, sample BATCH` on one buffer."""

    def body(step: Any, carry: Any) -> Any:
        storage, position, key, total = carry
        key, key_slots = random.split(key)
        new = {n: jnp.full((k, *s.shape), step, s.dtype) for n, s in SHAPES.items()}
        storage = way.add(storage, position, new)
        batch = way.get(storage, random.randint(key_slots, (BATCH,), 0, capacity, jnp.int32))
        total += sum(field.astype(jnp.float32).sum() for field in jax.tree.leaves(batch))
        return storage, (position + k) % capacity, key, total

    return lambda carry: lax.fori_loop(0, STEPS, body, carry)


def prepare(way: Way, rows: int, k: int, capacity: int) -> tuple[Callable[[], None], int]:
    """Return a call that runs the loop on `rows` buffers in place, and its scratch memory."""
    keys = random.split(random.key(0), rows)

    def start(key: jax.Array) -> Any:  # a different position for each, at which a slice never wraps
        position = k * random.randint(key, (), 0, capacity // k - STEPS, jnp.int32)
        return way.init(capacity), position, key, jnp.float32(0.0)

    carry = jax.jit(jax.vmap(start))(keys)
    run = jax.jit(jax.vmap(loop(way, k, capacity)), donate_argnums=0).lower(carry).compile()
    held = [run(carry)]

    def call() -> None:
        held[0] = jax.block_until_ready(run(held[0]))

    call()
    return call, run.memory_analysis().temp_size_in_bytes


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    print(f"{'capacity':>9s} {'rows x K':>8s}" + "".join(f"{name:>15s}" for name in WAYS))
    for rows, k in CASES:
        for capacity in CAPACITIES:
            made = [prepare(way, rows, k, capacity) for way in WAYS.values()]
            times: list[list[float]] = [[] for _ in WAYS]
            for _ in range(rounds):
                for (call, _), kept in zip(made, times, strict=True):
                    began = time.perf_counter()
                    call()
                    kept.append(time.perf_counter() - began)
            us = [statistics.median(kept) / STEPS * 1e6 for kept in times]
            scratch = [bytes_ // 1024 for _, bytes_ in made]
            cells = [f"{f'{t:.0f}us {s}K':>15s}" for t, s in zip(us, scratch, strict=True)]
            print(f"{capacity:9d} {f'{rows} x {k}':>8s}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
