"""Gathers, scatters and dynamic slices as windows into an array, each of which starts somewhere."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax import lax

from purejaxpg.fused.paths import Unfusable

MOST_CASES = 512  # places that the windows of one equation may have, one comparison each
SCATTERS = {
    "scatter": None,
    "scatter-add": lax.add,
    "scatter-mul": lax.mul,
    "scatter-min": lax.min,
    "scatter-max": lax.max,
}
READS = ("gather", "dynamic_slice")
WRITES = (*SCATTERS, "dynamic_update_slice")


@dataclasses.dataclass(frozen=True)
class Windows:
    """Where the numbers of an array of windows lie in an array.

    An array of windows has axes of two kinds: those of a window, and those of the batch, since each
    index of an array of indices [*batch, n] says where one window starts.
    """

    shape: tuple[int, ...]  # of the array
    sizes: tuple[int, ...]  # of a window, along each axis of the array
    starts: tuple[int, ...]  # axes of the array; along the others, a window starts at zero
    absent: tuple[int, ...]  # axes of the array that the array of windows lacks
    paired: dict[int, int]  # axes of the array that are an axis of the batch
    batch: tuple[int, ...]
    inside: tuple[int, ...]  # axes of the array of windows that are a window's

    @functools.cached_property
    def choices(self) -> tuple[int, ...]:
        """How many starts an axis of `starts` leaves to a window."""
        return tuple(self.shape[a] - self.sizes[a] + 1 for a in self.starts)

    @functools.cached_property
    def outside(self) -> list[int]:
        """The axes of the array of windows that are the batch's."""
        rank = len(self.inside) + len(self.batch)
        return [axis for axis in range(rank) if axis not in self.inside]

    def axis(self, axis: int) -> int | None:
        """Return which axis of the array of windows is the whole of an axis of the array."""
        whole = axis in self.paired or self.sizes[axis] == self.shape[axis]
        return self.axis_along(axis) if whole else None

    def axis_along(self, axis: int) -> int | None:
        """Return which axis of the array of windows runs along an axis of the array."""
        if axis in self.paired:
            return self.outside[self.paired[axis]]
        kept = [a for a in range(len(self.shape)) if a not in self.absent]
        return self.inside[kept.index(axis)] if axis in kept else None

    def first(self) -> np.ndarray:
        """Return the places of all numbers in the flat array if each window starts at zero."""
        place = np.zeros((1,) * (len(self.inside) + len(self.batch)), int)
        along = [self.axis_along(axis) for axis in range(len(self.shape))]
        for axis, (target, stride) in enumerate(zip(along, self._strides(), strict=True)):
            if target is not None:
                size = self.shape[axis] if axis in self.paired else self.sizes[axis]
                shape = [size if k == target else 1 for k in range(place.ndim)]
                place = place + stride * np.arange(size).reshape(shape)
        full = list(place.shape)
        for axis, size in zip(self.outside, self.batch, strict=True):
            full[axis] = size
        return np.broadcast_to(place, full)

    def cases(self, known: Iterable[int | None]) -> list[int]:
        """Return how far from the first place a window may start in the flat array.

        Args:
            known: for each axis of `starts`, the start if all windows have the same, else None.
        """
        options = [
            range(size) if at is None else [min(max(int(at), 0), size - 1)]
            for at, size in zip(known, self.choices, strict=True)
        ]
        return [self.distance(start) for start in itertools.product(*options)]

    def distance(self, start: Iterable[Any]) -> Any:
        """Return how far from the first place a window starts, given its start along each axis."""
        strides = self._strides()
        return sum(at * strides[axis] for at, axis in zip(start, self.starts, strict=True))

    def of_one_lane(self, axis: int | None, batch: int | None) -> "Windows":
        """Return the windows of one lane, whose axis in the array and in the batch has size one."""
        return dataclasses.replace(
            self,
            shape=with_one(self.shape, axis),
            sizes=with_one(self.sizes, axis),
            batch=with_one(self.batch, batch),
        )

    def _strides(self) -> list[int]:
        return [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]


def with_one(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """Return a shape with size one along an axis."""
    return tuple(1 if k == axis else size for k, size in enumerate(shape))


def of(equation: Any) -> Windows:
    """Return the windows of an equation in `READS` or `WRITES`."""
    name, p = equation.primitive.name, equation.params
    if (name == "scatter" and p["update_jaxpr"]) or p.get("mode") == lax.GatherScatterMode.ONE_HOT:
        raise Unfusable(f"kernels know no {name!r} with a function or a mode of its own")
    shapes = [v.aval.shape for v in equation.invars]
    if name.startswith("dynamic"):
        sizes = shapes[1] if name == "dynamic_update_slice" else p["slice_sizes"]
        every = tuple(range(len(sizes)))
        return Windows(shapes[0], tuple(sizes), every, (), {}, (), every)
    d, batch = p["dimension_numbers"], shapes[1][:-1]
    if name == "gather":
        pairs = zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True)
        absent = (*d.collapsed_slice_dims, *d.operand_batching_dims)
        starts, inside, sizes = d.start_index_map, d.offset_dims, p["slice_sizes"]
        return Windows(shapes[0], sizes, starts, absent, dict(pairs), batch, inside)
    pairs = zip(d.operand_batching_dims, d.scatter_indices_batching_dims, strict=True)
    absent = (*d.inserted_window_dims, *d.operand_batching_dims)
    starts, inside = d.scatter_dims_to_operand_dims, d.update_window_dims
    left = iter(shapes[2][axis] for axis in inside)
    sizes = tuple(1 if axis in absent else next(left) for axis in range(len(shapes[0])))
    return Windows(shapes[0], sizes, starts, absent, dict(pairs), batch, inside)


def drops(equation: Any) -> bool:
    """Return whether a window that is not wholly inside is dropped, or filled; else it is moved."""
    return equation.params.get("mode") == lax.GatherScatterMode.FILL_OR_DROP


def filling(equation: Any) -> Any:
    """Return the number that fills a dropped window of a gather; None if none is dropped."""
    if not drops(equation):
        return None
    dtype, given = equation.invars[0].aval.dtype, equation.params.get("fill_value")
    if given is not None:
        return np.asarray(given, dtype).flat[0]
    if dtype == np.bool_:
        return np.True_
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return dtype.type(limits.min if np.issubdtype(dtype, np.signedinteger) else limits.max)
    return np.asarray(np.nan, dtype).flat[0]


def check(cases: int, name: str) -> None:
    """Raise an `Unfusable` if an equation needs more than `MOST_CASES` comparisons."""
    if cases > MOST_CASES:
        raise Unfusable(
            f"{name!r} chooses by an index {cases} times, and kernels do so {MOST_CASES} times "
            "at most"
        )
