"""The machine's roof: a matrix product and a copy, measured on all devices at once.

Both run in compiled loops, so that no call from Python is timed. The roof is the best of several
repetitions, since nothing makes a machine faster than it is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from purejaxpg.bench import counts

LEAST_S, QUICK_S, REPETITIONS = 0.1, 0.005, 5
# A minibatch of an agent through a layer, for this many agents; and a large product.
ROWS, SAMPLES, WIDTH = 16, 128, 64
LARGE, LARGE_ON_ACCELERATOR, LARGE_IF_QUICK = 1024, 8192, 128
ROWS_ON_ACCELERATOR = 2048
COPIES = tuple(2**i for i in range(18, 29, 2))  # bytes a device: from the caches to the memory
COPY_ON_ACCELERATOR = 2**30


def measure(devices: Sequence[jax.Device], quick: bool) -> dict[str, Any]:
    """Measure matrix products of two sizes and copies of several.

    Args:
        devices: all of them are used at once, and rates are of all together.
        quick: take a moment only; the numbers mean little then.

    Returns:
        "gflops" by kind of product and "gb_per_s" by bytes of a device, both the best seen, and a
        description of the devices.
    """
    on_cpu = devices[0].platform == "cpu"
    large = LARGE_IF_QUICK if quick else LARGE if on_cpu else LARGE_ON_ACCELERATOR
    rows = ROWS if on_cpu or quick else ROWS_ON_ACCELERATOR
    copies = COPIES[:2] if quick else COPIES if on_cpu else (*COPIES, COPY_ON_ACCELERATOR)
    least_s = QUICK_S if quick else LEAST_S
    products = {
        f"{rows} x [{SAMPLES}, {WIDTH}] [{WIDTH}, {WIDTH}]": (rows, SAMPLES, WIDTH),
        f"[{large}, {large}] [{large}, {large}]": (1, large, large),
    }
    return {
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "gflops": {name: product(devices, *size, least_s) for name, size in products.items()},
        "gb_per_s": {str(size): copy(devices, size, least_s) for size in copies},
    }


def product(
    devices: Sequence[jax.Device], rows: int, samples: int, width: int, least_s: float
) -> float:
    """Return the GFLOP/s of [samples, width] [width, width], `rows` of them on each device.

    Args:
        devices: all work at once.
        rows: products in a batch.
        samples: rows of the left operand.
        width: its columns, and the size of the square right operand.
        least_s: seconds that a timed loop takes at least.
    """
    x = np.ones((len(devices) * rows, samples, width), np.float32)
    signs = np.where(np.random.default_rng(0).random(width) < 0.5, -1, 1).astype(np.float32)
    # A reflection: dense, and no number of products makes its operand grow or vanish.
    mirror = np.eye(width, dtype=np.float32) - np.outer(2 / width * signs, signs)
    w = np.broadcast_to(mirror, (len(devices) * rows, width, width))
    seconds = fastest(devices, lambda x, w: x @ w, (x, w), least_s)
    return 2e-9 * len(devices) * rows * samples * width * width / seconds


def copy(devices: Sequence[jax.Device], size: int, least_s: float) -> float:
    """Return the GB/s of reading and writing arrays, one on each device.

    Args:
        devices: all work at once.
        size: bytes of an array.
        least_s: seconds that a timed loop takes at least.
    """
    x = np.ones((len(devices), size // counts.FLOAT), np.float32)
    return 2e-9 * len(devices) * size / fastest(devices, lambda x: x + 1.0, (x,), least_s)


def fastest(
    devices: Sequence[jax.Device],
    step: Callable[..., jax.Array],
    arrays: tuple[np.ndarray, ...],
    least_s: float,
) -> float:
    """Return the least seconds of one `step`, applied to its own result in a loop.

    Args:
        devices: all work at once.
        step: from the first array and the others -> the first array.
        arrays: leading axis over devices.
        least_s: seconds that a timed loop takes at least.
    """
    mesh = Mesh(np.array(devices), ("devices",))
    over, same = PartitionSpec("devices"), PartitionSpec()

    def loop(count: jax.Array, x: jax.Array, *others: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, x: step(x, *others), x)

    specs = (same, *[over] * len(arrays))
    sharded = jax.shard_map(loop, mesh=mesh, in_specs=specs, out_specs=over, check_vma=False)
    run = jax.jit(sharded, donate_argnums=1)
    x, *others = (jax.device_put(array, NamedSharding(mesh, over)) for array in arrays)
    count = 1
    times: list[float] = []
    x, _ = timed(run, jnp.int32(count), x, *others)  # compiles
    while len(times) < REPETITIONS:
        x, seconds = timed(run, jnp.int32(count), x, *others)
        if seconds >= least_s:
            times.append(seconds / count)
        else:
            count *= max(2, min(1000, int(1.5 * least_s / seconds)))
    return min(times)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the computed result of a call, and the seconds that it took."""
    began = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    return result, time.perf_counter() - began


def gflops(roof: Mapping[str, Any]) -> float:
    """Return the most operations per second, in 10⁹."""
    return max(roof["gflops"].values())


def gb_per_s(roof: Mapping[str, Any], size: float) -> float:
    """Return the speed of copies for a program that works on `size` bytes of a device.

    It is the speed at the smallest measured size that is no smaller: a program that fits into a
    cache is compared with the cache.
    """
    known = {int(name): value for name, value in roof["gb_per_s"].items()}
    return known[min((each for each in known if each >= size), default=max(known))]
