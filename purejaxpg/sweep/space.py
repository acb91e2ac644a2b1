"""The axes of a search: lists of values, distributions, and samplers.

In a sweep file an axis is a list, or one of::

    learning_rate = { log_uniform = [1e-5, 1e-2] }
    clip_eps = { uniform = [0.1, 0.4] }
    num_epochs = { int_uniform = [1, 10] }          # both ends included

Every value is a quantile at a number in [0, 1), so all samplers share one implementation.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from purejaxpg import InputError

KINDS = ("uniform", "log_uniform", "int_uniform", "log_int_uniform")


@dataclasses.dataclass(frozen=True)
class Axis:
    """The possible values of one swept field."""

    name: str
    kind: str  # "list", or one of KINDS
    values: tuple[Any, ...] = ()  # of a list
    low: float = 0.0
    high: float = 0.0

    @property
    def integer(self) -> bool:
        """Whether its values are whole numbers."""
        return "int" in self.kind

    @property
    def log(self) -> bool:
        """Whether its values are uniform in their logarithm."""
        return self.kind.startswith("log")

    def at(self, quantile: float) -> Any:
        """Return the value at a quantile in [0, 1)."""
        if self.kind == "list":
            return self.values[min(int(quantile * len(self.values)), len(self.values) - 1)]
        low, high = self.low, self.high + self.integer
        if self.log:
            value = math.exp(math.log(low) + quantile * (math.log(high) - math.log(low)))
        else:
            value = low + quantile * (high - low)
        return self.inside(math.floor(value) if self.integer else value)

    def inside(self, value: float) -> Any:
        """Return a number clipped to the axis's range, floats with six significant digits."""
        short = value if self.integer else float(f"{value:.6g}")
        bounded = min(max(short, self.low), self.high)
        return int(bounded) if self.integer else bounded

    def perturbed(self, value: Any, factor: float, step: int) -> Any:
        """Return a value near `value`: times `factor`, or `step` places further in a list.

        A list keeps its order in the sweep file, and a step does not leave it.
        """
        if self.kind != "list":
            return self.inside(value * factor)
        place = self.values.index(value) + step
        return self.values[min(max(place, 0), len(self.values) - 1)]

    def examples(self) -> list[Any]:
        """Return values to check types with: the whole list, or both ends."""
        if self.kind == "list":
            return list(self.values)
        return [int(x) if self.integer else float(x) for x in (self.low, self.high)]


def axis(name: str, value: Any) -> Axis:
    """Read one axis of a sweep file.

    Raises:
        InputError: it is neither a list nor a distribution.
    """
    if isinstance(value, list) and value:
        return Axis(name, "list", tuple(value))
    if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise InputError(
            f"[sweep] {name} must be a list of values, or {{ KIND = [low, high] }} with KIND one "
            f"of {', '.join(KINDS)}, but is {value!r}."
        )
    ((kind, bounds),) = value.items()
    numbers = isinstance(bounds, list) and all(type(x) in (int, float) for x in bounds)
    finite = numbers and len(bounds) == 2 and all(map(math.isfinite, bounds))
    if not finite or bounds[0] >= bounds[1]:
        raise InputError(f"[sweep] {name} must have bounds [low, high], but has {bounds!r}.")
    if kind.startswith("log") and bounds[0] <= 0:
        raise InputError(f"[sweep] {name} must have a low end above 0, but it is {bounds[0]!r}.")
    if "int" in kind and any(type(x) is not int for x in bounds):
        raise InputError(f"[sweep] {name} must have whole numbers as bounds, but has {bounds!r}.")
    return Axis(name, kind, (), float(bounds[0]), float(bounds[1]))


def sample(axes: Mapping[str, Axis], method: str, samples: int, seed: int) -> list[dict[str, Any]]:
    """Draw configurations.

    Args:
        axes: by field name; at least one.
        method: "random", "sobol" (scrambled) or "lhs" (Latin hypercube).
        samples: number of configurations; lists of values may give one twice.
        seed: the only source of randomness.

    Returns:
        Swept values by field name.
    """
    quantiles = _quantiles(method, samples, len(axes), seed)
    return [
        {name: axes[name].at(float(u)) for name, u in zip(axes, row, strict=True)}
        for row in quantiles
    ]


def _quantiles(method: str, samples: int, dimensions: int, seed: int) -> np.ndarray:
    """Return points in the unit cube, ``[samples, dimensions]``."""
    if method == "random":
        return np.random.default_rng(seed).random((samples, dimensions))
    from scipy.stats import qmc

    if method == "lhs":
        return qmc.LatinHypercube(dimensions, rng=seed).random(samples)
    # Points are balanced at powers of two, so draw up to the next one and cut.
    points = qmc.Sobol(dimensions, rng=seed).random_base2(max(0, math.ceil(math.log2(samples))))
    return points[:samples]
