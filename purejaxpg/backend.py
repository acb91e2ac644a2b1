"""The kind of device that a program is traced for.

A few functions have two forms, because what is cheap on a CPU is not on a GPU: there, each step of
a loop starts kernels, and a condition waits for the host. They ask here, while they are traced, and
both forms compute the same thing up to rounding.
"""

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
