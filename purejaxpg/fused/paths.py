"""Which form of a loop runs, kernel or plain JAX, and why.

An agent's configuration may have two static fields:

    fused      "auto": a kernel where there is one, else plain JAX.  "off": always plain JAX.
               "require": a sentence that says why, where a loop is no kernel, even if the networks
               in it are: for then each of its steps starts kernels anew.
    precision  "fast": on a GPU, products of float16 or TF32 operands, summed in float32, and, in
               kernels, the hardware's tanh.  "float32": operands of 24 bits and an exact tanh.
"""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax

from purejaxpg import InputError, backend
from purejaxpg import config as configs

FUSED = ("auto", "require", "off")
PRECISIONS = ("fast", "float32")
LEAST_CAPABILITY = 8.0  # Ampere: products of tensor cores as Triton compiles them


class Unfusable(Exception):
    """A kernel cannot do this; the text says why, as the end of a sentence."""


@dataclasses.dataclass(frozen=True)
class Path:
    """How one loop of a program runs, or one pass over its data."""

    loop: str  # "steps of the environments", "gradient steps" or "values"
    kernel: bool
    reason: str = ""  # why there is no kernel
    networks: bool = False  # whether the networks are kernels at least

    def __str__(self) -> str:
        if self.kernel:
            return f"The {self.loop} run in one kernel."
        but = " with the networks in kernels" if self.networks else ""
        return f"The {self.loop} run in plain JAX{but}, because {self.reason}."


_recorded: contextvars.ContextVar[list[Path] | None] = contextvars.ContextVar("paths", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Path]]:
    """Collect the paths of all loops that are traced inside the context."""
    paths: list[Path] = []
    token = _recorded.set(paths)
    try:
        yield paths
    finally:
        _recorded.reset(token)


def record(config: Any, path: Path) -> None:
    """Record how a loop runs.

    Raises:
        InputError: the configuration requires a kernel, and there is none.
    """
    paths = _recorded.get()
    if paths is not None:
        paths.append(path)
    if not path.kernel and getattr(config, "fused", "auto") == "require":
        raise InputError(f"fused is 'require', but {str(path)[0].lower()}{str(path)[1:]}")


def refusal(config: Any) -> str:
    """Return why no loop of this configuration may be a kernel; "" if one may."""
    if getattr(config, "fused", "auto") == "off":
        return "fused is 'off'"
    if not backend.on_gpu():
        return "kernels need an NVIDIA GPU"
    return "" if interpreted() else too_old(jax.devices()[0])


def too_old(device: Any) -> str:
    """Return why a GPU cannot run the kernels; "" if it can."""
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not re.fullmatch(r"\d+\.\d+", capability):  # AMD's are names
        return "kernels need an NVIDIA GPU"
    if float(capability) < LEAST_CAPABILITY:
        has = f"and this one has {capability}"
        return f"kernels need an NVIDIA GPU of compute capability {LEAST_CAPABILITY}, {has}"
    return ""


def is_fast(config: Any) -> bool:
    """Return whether kernels may round the operands of products, and use the hardware's tanh."""
    return getattr(config, "precision", "fast") == "fast"


def products(config: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which plain JAX is traced, for the sake of `precision`.

    By default, XLA rounds the operands of float32 products to TF32 on a GPU, and nowhere else.
    """
    if is_fast(config) or not backend.on_gpu():
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def interpreted() -> bool:
    """Return whether kernels run in Pallas' interpreter, for lack of a GPU."""
    return jax.default_backend() == "cpu"


def check(config: Any) -> None:
    """Check the fields `fused` and `precision` of an agent's configuration."""
    configs.one_of(config, "fused", FUSED)
    configs.one_of(config, "precision", PRECISIONS)
