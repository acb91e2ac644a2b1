"""The kind of device that a program is traced for.

A few functions have two forms, because what is cheap on a CPU is not on a GPU: there, each step of
a loop starts kernels, and a condition waits for the host. They ask here, while they are traced, and
both forms compute the same thing up to rounding.

`foreign` is for code of other packages, which jax's strict modes would refuse.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax


def on_gpu() -> bool:
    """Return whether programs run on a GPU unless they are told otherwise.

    The device is that of `jax.default_device` if it is set, and else the first of jax's devices. A
    program that is traced for one kind of device and run on another is slower, but right.
    """
    settings: Any = jax.config  # which types its settings in some versions only
    device = settings.jax_default_device
    if device is None:
        platform = jax.default_backend()
    else:
        platform = device if isinstance(device, str) else device.platform
    return platform in ("gpu", "cuda", "rocm")


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Allow implicit promotion of types and ranks, for a call of code that relies on it.

    A user who sets `jax_numpy_dtype_promotion` to strict, or `jax_numpy_rank_promotion` to raise,
    looks for mistakes in code of their own.
    """
    settings: Any = jax.config
    types, ranks = settings.jax_numpy_dtype_promotion, settings.jax_numpy_rank_promotion
    if (types, ranks) == ("standard", "allow"):  # a setting of its own would trace programs again
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
