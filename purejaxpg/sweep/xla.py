"""Options of XLA for the programs of a sweep on an NVIDIA GPU; elsewhere XLA's defaults hold.

They are options of these programs alone, so jax is as it was for everything else. A flag of the
same name in XLA_FLAGS wins.

XLA tries kernels out while it compiles and keeps the fastest, so each process may choose others,
and others round differently. A sweep that is resumed would then end in other bits. TUNING says
what is done about it.
"""

import os
from typing import Any

# Loops and conditions become parts of CUDA graphs, which start kernels without the host, and
# kernels that do not depend on each other may overlap.
GRAPHS: dict[str, Any] = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
    ),
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
ORDERED_SCATTER = {"xla_gpu_enable_scatter_determinism_expander": True}
TUNINGS: dict[str, dict[str, Any]] = {
    # Nothing is tuned, and only operations run whose results never differ; XLA then takes NVIDIA's
    # libraries for all matrix products.
    "fixed": {"xla_gpu_autotune_level": 0, "xla_gpu_deterministic_ops": True},
    # Nothing is tuned; of the operations, scatters alone are kept from differing.
    "first": {"xla_gpu_autotune_level": 0, **ORDERED_SCATTER},
    # Tuned; compiled programs are kept in the result directory, and loaded on resume. Processes
    # that do not share the directory, as under Ray, would choose for themselves.
    "stored": ORDERED_SCATTER,
    # Tuned anew in each process: a sweep that is resumed may end in other bits.
    "anew": {},
}
TUNING = "first"


def options(device: Any) -> dict[str, Any]:
    """Return the compiler's options for a program on a device.

    Args:
        device: a jax device.

    Returns:
        Values by name; empty unless the device is an NVIDIA GPU.
    """
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return {}
    own = {word.lstrip("-").partition("=")[0] for word in os.environ.get("XLA_FLAGS", "").split()}
    wanted = {**GRAPHS, **TUNINGS[way()]}
    return {name: value for name, value in wanted.items() if name not in own}


def way() -> str:
    """Return the way that is taken: without a cache of programs, none can be stored."""
    import jax

    cached = bool(jax.config.jax_enable_compilation_cache)  # type: ignore[attr-defined]
    return TUNING if cached or TUNING != "stored" else "first"


def stores_choices(device: Any) -> bool:
    """Return whether the result directory keeps programs that are compiled for a device."""
    return way() == "stored" and bool(options(device))
