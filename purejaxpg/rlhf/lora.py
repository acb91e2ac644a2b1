"""Low-rank adapters (LoRA): train two thin matrices beside each linear layer of a fixed model.

    y = x W + s (x A) B        W [in, out] is fixed, A [in, r] and B [r, out] are trained

B starts at 0, so that training starts at the model itself. Under `jax.vmap` over adapters, the
model is no argument of the mapped function: each product x W is one matrix product for all
adapters, and W is in memory once. Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import random

from purejaxpg import config as configs
from purejaxpg.rlhf import transformer

MODULES = ("qkv", "out", "gate", "up", "down")  # the linear layers of a block

Adapter = Any  # {"layer_0": {"qkv": {"a": [in, r], "b": [r, out]}, ...}, ...}


def init(
    key: jax.Array,
    model: transformer.Model,
    rank: int,
    modules: tuple[str, ...] = MODULES,
) -> Adapter:
    """Return a new adapter, which changes nothing yet.

    Args:
        key: for A, whose entries are N(0, 1 / in); B is 0.
        model: to be adapted; its parameters may be jax.ShapeDtypeStruct.
        rank: r.
        modules: which of MODULES have an adapter; those that the architecture lacks are left out.

    Returns:
        The adapter, in 32 bits whatever the type of the model's parameters.

    Raises:
        InputError: a module is unknown or none is named, or the rank is not positive.
    """
    configs.require(rank >= 1, f"rank must be 1 or more, but is {rank}.")
    configs.require(bool(modules), "modules must name at least one linear layer.")
    for module in modules:
        configs.require_known(module, MODULES, "linear layer")
    kernels = _kernels(model)
    adapted = [path for path in kernels if path[1] in modules]
    keys = random.split(key, len(adapted))
    found = {}
    for path, own in zip(adapted, keys, strict=True):
        inputs, outputs = kernels[path].shape
        found[*path, "a"] = random.normal(own, (inputs, rank)) * inputs**-0.5
        found[*path, "b"] = jnp.zeros((rank, outputs))
    return traverse_util.unflatten_dict(found)


def attach(
    model: transformer.Model, adapter: Adapter, scale: jax.Array | float = 1.0
) -> transformer.Model:
    """Return a model with an adapter; its parameters are shared and not copied.

    Args:
        model: without an adapter.
        adapter: as `init` returns it, or trained.
        scale: s. Often written α / r.
    """
    flat = traverse_util.flatten_dict(adapter)
    scaled = {path: x * scale if path[-1] == "b" else x for path, x in flat.items()}
    return dataclasses.replace(model, adapter=traverse_util.unflatten_dict(scaled))


def merge(model: transformer.Model) -> transformer.Model:
    """Return the model without an adapter that computes the same: W + s A B in place of W.

    The sum is computed in 32 bits and then rounded to the type of W. In half precision, small
    changes are lost there; merge into parameters that were loaded as float32 to keep them.
    """
    configs.require(model.adapter is not None, "merge needs a model with an adapter.")
    params = traverse_util.flatten_dict(model.params)
    adapter = traverse_util.flatten_dict(model.adapter)
    for path in {path[:-1] for path in adapter}:
        kernel = params[*path, "kernel"]
        change = adapter[*path, "a"] @ adapter[*path, "b"]
        params[*path, "kernel"] = (kernel + change).astype(kernel.dtype)
    return dataclasses.replace(model, params=traverse_util.unflatten_dict(params), adapter=None)


def _kernels(model: transformer.Model) -> dict[tuple[str, str], Any]:
    """Return the matrices of the blocks by layer and module."""
    flat = traverse_util.flatten_dict(model.params)
    kernels = {path[:2]: x for path, x in flat.items() if len(path) == 3 and path[2] == "kernel"}
    return {path: x for path, x in sorted(kernels.items()) if path[1] in MODULES}
