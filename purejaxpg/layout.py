"""How one run is spread over several devices: matrices over the axis `model`, batches over `data`.

The devices of a group are a mesh with both axes. Only where an array lies is said here: XLA splits
the programs accordingly, and adds the communication. A matrix of a transformer is split by its
role, so that a layer communicates once and not in between (Shoeybi et al. 2019, arXiv:1909.08053,
section 3): what a layer projects into is split by columns, what it projects out of by rows, and the
embedding by words.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, MODEL = "data", "model"
# Layers by name: of these, the outputs are split, so that each device has some heads, some units of
# a hidden layer, or some words.
BY_COLUMNS = ("qkv", "gate", "up", "head")
# Of these, the inputs are: those heads and units; and the words that are looked up.
BY_ROWS = ("out", "down", "embed")
SMALL = 1024  # an array of fewer numbers is whole on every device


def axis(path: tuple[str, ...], shape: tuple[int, ...], parts: int) -> int | None:
    """Return the axis over which an array is split.

    Args:
        path: its name, as ("params", "layer_0", "qkv", "kernel"); the layer stands before the last.
        shape: its shape.
        parts: devices that share it.

    Returns:
        The axis of its role, if `parts` divides that; else the largest that it divides; None if it
        divides none, or if the array is small.
    """
    able = [i for i, size in enumerate(shape) if size % parts == 0]
    if math.prod(shape) < SMALL or not able:
        return None
    layer = path[-2] if len(path) > 1 else ""
    if layer in BY_COLUMNS and path[-1] != "a" and len(shape) - 1 in able:
        return len(shape) - 1
    if layer in BY_ROWS and path[-1] != "b" and len(shape) - 2 in able:
        return len(shape) - 2
    return max(able, key=lambda i: shape[i])


def shardings(arrays: Any, mesh: Mesh, *leading: str) -> Any:
    """Return where each array of a pytree lies.

    Args:
        arrays: or their shapes.
        mesh: of all devices. Without the axis MODEL, no array is split.
        leading: names of mesh axes over which the first axes of all arrays go.

    Returns:
        A NamedSharding for each. Whole numbers, such as tokens, are on every device.
    """
    parts = mesh.shape.get(MODEL, 1)

    def placed(path: Any, array: Any) -> NamedSharding:
        shape = array.shape[len(leading) :]
        if parts == 1 or not jnp.issubdtype(array.dtype, jnp.floating):
            return NamedSharding(mesh, PartitionSpec(*leading))
        names = tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        split = axis(names, shape, parts)
        own = [None] * (split or 0) + [MODEL] if split is not None else []
        return NamedSharding(mesh, PartitionSpec(*leading, *own))

    return jax.tree_util.tree_map_with_path(placed, arrays)


def split(where: Any) -> bool:
    """Return whether any of the `shardings` splits an array over MODEL."""
    return any(MODEL in sharding.spec for sharding in jax.tree.leaves(where))


def bytes_on_device(arrays: Any, where: Any) -> tuple[int, int]:
    """Return the bytes of arrays on one device, and of all of them together.

    Args:
        arrays: or their shapes; without leading axes of other meshes.
        where: the `shardings` of them.
    """
    leaves = jax.tree.leaves(arrays)
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves]
    pairs = zip(sizes, jax.tree.leaves(where), strict=True)
    parts = [size // (s.mesh.shape[MODEL] if MODEL in s.spec else 1) for size, s in pairs]
    return sum(parts), sum(sizes)


def over_batch(x: jax.Array) -> jax.Array:
    """Split a batch [B, ...] over the axis DATA, and keep it whole over MODEL.

    Without a mesh, it is returned as it is. If DATA does not divide B, it is whole.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    return x if DATA not in sizes else _constrained(x, sizes)


def over_heads(x: jax.Array, count: int) -> jax.Array:
    """Split queries, keys or values [B, T, N, H] over DATA, and their heads over MODEL.

    `count` is the number of heads of keys and values. If MODEL does not divide it, heads are whole:
    a device with half a head would need what the others have at every step.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if DATA not in sizes:
        return x
    return _constrained(x, sizes, None, MODEL if count % sizes[MODEL] == 0 else None)


def on_one_device(function: Callable[..., Any], result: Any, *operands: jax.Array) -> Any:
    """Compute what XLA cannot split, such as a call to the host, once for all devices of a mesh.

    Args:
        function: arrays -> an array.
        result: its shape and type, as a jax.ShapeDtypeStruct.
        operands: arrays, which are made whole on every device.

    Returns:
        The array, on every device.
    """
    axes = (DATA, MODEL)
    if DATA not in jax.sharding.get_abstract_mesh().shape:
        return function(*operands)

    def on_each(*arrays: jax.Array) -> jax.Array:
        first = sum(lax.axis_index(name) for name in axes) == 0
        zeros = jnp.zeros(result.shape, result.dtype)
        found = lax.cond(first, function, lambda *_: zeros, *arrays)
        return lax.psum(found, axes)

    whole = PartitionSpec()
    spread = jax.shard_map(
        on_each, in_specs=whole, out_specs=whole, axis_names=set(axes), check_vma=False
    )
    return spread(*operands)


def _constrained(x: jax.Array, sizes: Mapping[str, int], *rest: str | None) -> jax.Array:
    """Split the first axis over DATA if that divides it, and the others as `rest` says."""
    batch = DATA if x.shape[0] % sizes[DATA] == 0 else None
    return lax.with_sharding_constraint(x, PartitionSpec(batch, *rest))
