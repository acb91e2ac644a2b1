"""Which kind of device a program is traced for, where two forms of one computation differ in speed.

The forms agree up to rounding. Everything else in the package is the same program everywhere.
"""

import jax


def on_gpu() -> bool:
    """Return whether programs traced now run on a GPU by default."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend() == "gpu"
    return (device if isinstance(device, str) else device.platform) in ("gpu", "cuda", "rocm")
