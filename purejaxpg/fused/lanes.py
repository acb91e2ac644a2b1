"""Equations evaluated on lanes: one vector for each number that an environment or a sample has.

A kernel works on vectors. An array [E, k] of a few numbers for each of E environments is kept as k
vectors of E lanes, so that slicing, stacking and reshaping it moves nothing: they only rename the
vectors. A value that is the same for all lanes stays a number.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from purejaxpg.fused import jaxprs
from purejaxpg.fused.paths import Unfusable

Uniform = np.ndarray  # of objects: numbers of Python or NumPy, or traced scalars


@dataclasses.dataclass(frozen=True, eq=False)
class Lanes:
    """An array whose axis `axis` is the lanes."""

    data: np.ndarray  # objects over the other axes: vectors [width], or uniform numbers
    axis: int


# What Triton compiles as it is, number by number.
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "rem", "max", "min", "pow", "integer_pow", "atan2", "add_any"),
    *("lt", "gt", "le", "ge", "eq", "ne", "and", "or", "xor", "not", "select_n", "nextafter"),
    *("sin", "cos", "tan", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sqrt"),
    *("rsqrt", "abs", "sign", "floor", "ceil", "neg", "square", "is_finite", "clamp", "erf_inv"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic"),
    *("convert_element_type", "copy", "copy_p", "stop_gradient"),
}


def _slices(p: Any) -> tuple[slice, ...]:
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return tuple(map(slice, p["start_indices"], p["limit_indices"], strides))


def _broadcast(p: Any, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(p["shape"])
    for axis, size in zip(p["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), p["shape"])


def _unstack(p: Any, x: np.ndarray) -> list[np.ndarray]:
    return [x.take(k, p["axis"]) for k in range(x.shape[p["axis"]])]


# Primitives that only move numbers, as functions of their parameters and of NumPy arrays.
MOVES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "squeeze": lambda p, x: x.squeeze(tuple(p["dimensions"])),
    "expand_dims": lambda p, x: np.expand_dims(x, tuple(p["dimensions"])),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "slice": lambda p, x: x[_slices(p)],
    "concatenate": lambda p, *x: np.concatenate(x, p["dimension"]),
    "stack": lambda p, *x: np.stack(x, p["axis"]),
    "unstack": _unstack,
    "split": lambda p, x: np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"]),
}

REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": lax.add,
    "reduce_prod": lax.mul,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_and": lax.bitwise_and,
    "reduce_or": lax.bitwise_or,
}
# Of all lanes, with the number that changes nothing.
OVER_LANES: dict[str, tuple[Callable[..., Any], float]] = {
    "reduce_sum": (jnp.sum, 0.0),
    "reduce_max": (jnp.max, -math.inf),
    "reduce_min": (jnp.min, math.inf),
}


class Evaluator:
    """Computes equations on lanes.

    Args:
        count: E, the lanes that mean something.
        width: the length of a vector, a power of two of at least `count`.
        reduces: allow sums and extremes over all lanes.
    """

    def __init__(self, count: int, width: int, reduces: bool = False) -> None:
        self.count, self.width, self.reduces = count, width, reduces
        self.lane: jax.Array | None = None  # [width] the index of each, if not 0, 1, 2, ...

    def run(self, equations: Sequence[Any], values: jaxprs.Values) -> None:
        """Compute equations in order, and add their results to `values`.

        Args:
            equations: equations without calls.
            values: variable -> Lanes or Uniform, and what a subclass knows beside them.

        Raises:
            Unfusable: lanes cannot express an equation.
        """
        for equation in equations:
            results = self.apply(equation, [value(values, v) for v in equation.invars])
            results = results if equation.primitive.multiple_results else [results]
            values.update(zip(equation.outvars, results, strict=True))

    def apply(self, equation: Any, operands: list[Any]) -> Any:
        """Compute one equation -> its result, or a list of them."""
        name = equation.primitive.name
        if name in ELEMENTWISE:
            return self.elementwise(equation, operands)
        if name in MOVES:
            return self.move(equation, operands)
        if name in REDUCTIONS or name in ("argmax", "argmin"):
            return self.reduce(equation, operands[0])
        if name == "iota":
            shape, axis = equation.params["shape"], equation.params["dimension"]
            index = np.arange(shape[axis]).astype(equation.params["dtype"])
            return uniform(_broadcast({"shape": shape, "broadcast_dimensions": [axis]}, index))
        if name == "gather":
            return self.gather(equation, *operands)
        raise Unfusable(f"kernels cannot compute {name!r} here")

    # --- numbers, one by one ---------------------------------------------------------------------

    def elementwise(self, equation: Any, operands: list[Any]) -> Any:
        """Apply an operation to arrays number by number."""
        axis = next((x.axis for x in operands if isinstance(x, Lanes)), None)
        operands = [self.aligned(x, axis) if isinstance(x, Lanes) else x for x in operands]
        arrays = [x.data if isinstance(x, Lanes) else self.without(x, axis) for x in operands]
        shape = np.broadcast_shapes(*(x.shape for x in arrays))
        arrays = [np.broadcast_to(x, shape) for x in arrays]
        result = np.empty(shape, object)
        for i in np.ndindex(*shape):
            result[i] = self.number(equation, [x[i] for x in arrays])
        return result if axis is None else Lanes(result, axis)

    def aligned(self, x: Lanes, axis: Any) -> Lanes:
        """Return an array with its lanes at another axis, which only one lane allows."""
        if x.axis != axis and self.count > 1:
            raise Unfusable("an operation mixes the environments")
        return Lanes(np.expand_dims(x.data, x.axis).squeeze(axis), axis)

    def number(self, equation: Any, operands: list[Any]) -> Any:
        """Apply an operation to numbers and vectors."""
        dtypes = [v.aval.dtype for v in equation.invars]
        if all(is_number(x) for x in operands):  # known while tracing
            with jax.ensure_compile_time_eval():
                known = [jnp.asarray(x, t) for x, t in zip(operands, dtypes, strict=True)]
                return np.asarray(jaxprs.bind(equation, known)[0])[()]
        if any(not is_number(x) and x.ndim for x in operands):
            operands = [self.vector(x, t) for x, t in zip(operands, dtypes, strict=True)]
        else:
            operands = [jnp.asarray(x, t) for x, t in zip(operands, dtypes, strict=True)]
        return self.compute(equation, operands)

    def compute(self, equation: Any, operands: list[jax.Array]) -> jax.Array:
        """Apply an operation to vectors of one shape, or to scalars."""
        name = equation.primitive.name
        if name in ("copy", "copy_p", "stop_gradient"):
            return operands[0]
        if name == "convert_element_type":
            return operands[0].astype(equation.params["new_dtype"])
        if name == "clamp":
            return jnp.minimum(jnp.maximum(operands[1], operands[0]), operands[2])
        return jaxprs.bind(equation, operands)[0]

    def vector(self, x: Any, dtype: Any) -> jax.Array:
        """Return a number or vector as a vector [width]."""
        if is_number(x):
            return jnp.full((self.width,), np.asarray(x).item(), dtype)
        return x if x.ndim else jnp.broadcast_to(x, (self.width,))

    def without(self, x: Uniform, axis: int | None) -> Uniform:
        """Return a uniform array without its axis of lanes, whose numbers may differ along it."""
        if axis is None or x.ndim == 0:
            return x
        moved = np.moveaxis(x, axis, -1)
        result = np.empty(moved.shape[:-1], object)
        for i in np.ndindex(*result.shape):
            result[i] = self.across(moved[i])
        return result

    def across(self, numbers: Iterable[Any]) -> Any:
        """Return one number for each lane as a vector, or as one number if they are the same."""
        numbers = list(numbers)
        first = numbers[0]
        if all(same(x, first) for x in numbers):
            return first
        lane = lax.broadcasted_iota(jnp.int32, (self.width,), 0) if self.lane is None else self.lane
        result = jnp.broadcast_to(jnp.asarray(first), (self.width,))
        for k, x in enumerate(numbers):
            result = jnp.where(lane == k, x, result)
        return result

    # --- what only moves numbers -----------------------------------------------------------------

    def move(self, equation: Any, operands: list[Any]) -> Any:
        """Apply an operation that moves numbers, by moving their labels.

        A label is the place of a number in the list of all numbers of the operands, times E + 1,
        plus its lane counted from one, or zero if it is uniform.
        """
        numbers: list[Any] = []
        labels = [self.labels(x, numbers) for x in operands]
        moved = MOVES[equation.primitive.name](equation.params, *labels)
        if not equation.primitive.multiple_results:
            return self.named(moved, numbers)
        return [self.named(x, numbers) for x in moved]

    def labels(self, x: Any, numbers: list[Any]) -> np.ndarray:
        """Label the numbers of an operand, and add them to `numbers`."""
        data = x.data if isinstance(x, Lanes) else x
        place = len(numbers) + np.arange(data.size).reshape(data.shape)
        numbers.extend(data.flat)
        label = place * (self.count + 1)
        if not isinstance(x, Lanes):
            return label
        return np.moveaxis(label[..., None] + 1 + np.arange(self.count), -1, x.axis)

    def named(self, labels: np.ndarray, numbers: list[Any]) -> Any:
        """Return the array that labels describe."""
        labels = np.asarray(labels)
        place, lane = np.divmod(labels, self.count + 1)
        if not lane.any():
            result = np.empty(labels.shape, object)
            for i in np.ndindex(*labels.shape):
                result[i] = numbers[place[i]]
            return result
        axis = next((k for k in range(labels.ndim) if self.is_lanes(lane, k)), None)
        if axis is None:
            raise Unfusable("an operation mixes the environments")
        place, lane = np.moveaxis(place, axis, -1), np.moveaxis(lane, axis, -1)
        result = np.empty(place.shape[:-1], object)
        for i in np.ndindex(*result.shape):
            here = [numbers[k] for k in place[i]]
            result[i] = here[0] if lane[i].all() else self.across(here)
        return Lanes(result, axis)

    def is_lanes(self, lane: np.ndarray, axis: int) -> bool:
        """Return whether lanes run in order along an axis, wherever there are any."""
        if lane.shape[axis] != self.count:
            return False
        moved = np.moveaxis(lane, axis, -1)
        return bool(((moved == 1 + np.arange(self.count)) | ~moved.any(-1, keepdims=True)).all())

    # --- reductions and look-ups -----------------------------------------------------------------

    def reduce(self, equation: Any, x: Any) -> Any:
        """Reduce over axes; over the lanes only if this evaluator may."""
        name, axes = equation.primitive.name, equation.params["axes"]
        lanes_axis = x.axis if isinstance(x, Lanes) else None
        data = x.data if isinstance(x, Lanes) else x
        others = [a if lanes_axis is None or a < lanes_axis else a - 1 for a in axes]
        others = [a for a, original in zip(others, axes, strict=True) if original != lanes_axis]
        dtype = equation.invars[0].aval.dtype
        if name in ("argmax", "argmin"):
            fold = functools.partial(self.extreme, name, dtype)
        else:
            combine = functools.partial(self.combined, REDUCTIONS[name], dtype)
            fold = functools.partial(functools.reduce, combine)
        for axis in sorted(others, reverse=True):
            data = along(fold, data, axis)
        if lanes_axis is None:
            return data
        if lanes_axis in axes:
            return along(functools.partial(self.whole, name, dtype), data[..., None], data.ndim)
        return Lanes(data, lanes_axis - sum(a < lanes_axis for a in axes))

    def combined(self, operation: Callable[..., Any], dtype: Any, x: Any, y: Any) -> Any:
        """Return an operation on two numbers or vectors."""
        if is_number(x) and is_number(y):
            with jax.ensure_compile_time_eval():
                return np.asarray(operation(jnp.asarray(x, dtype), jnp.asarray(y, dtype)))[()]
        if any(not is_number(z) and z.ndim for z in (x, y)):
            return operation(self.vector(x, dtype), self.vector(y, dtype))
        return operation(jnp.asarray(x, dtype), jnp.asarray(y, dtype))

    def whole(self, name: str, dtype: Any, column: Sequence[Any]) -> jax.Array:
        """Reduce one vector over all lanes."""
        if not self.reduces or name not in OVER_LANES:
            raise Unfusable("an operation combines the environments")
        operation, neutral = OVER_LANES[name]
        vector = self.vector(column[0], dtype)
        if self.count < self.width:
            inside = lax.broadcasted_iota(jnp.int32, (self.width,), 0) < self.count
            vector = jnp.where(inside, vector, jnp.asarray(neutral, dtype))
        return operation(vector)

    def extreme(self, name: str, dtype: Any, column: Sequence[Any]) -> jax.Array:
        """Return the index of the first largest or smallest number."""
        better = jnp.greater if name == "argmax" else jnp.less
        best, index = self.vector(column[0], dtype), jnp.zeros((self.width,), jnp.int32)
        for k, x in enumerate(column[1:], 1):
            candidate = self.vector(x, dtype)
            wins = better(candidate, best)
            best, index = jnp.where(wins, candidate, best), jnp.where(wins, k, index)
        return index

    def gather(self, equation: Any, table: Any, index: Any) -> Lanes:
        """Look up, for each lane, a row of a small table that all lanes share."""
        p = equation.params["dimension_numbers"]
        rows = isinstance(table, np.ndarray) and isinstance(index, Lanes) and index.axis == 0
        simple = p.collapsed_slice_dims == p.start_index_map == (0,) and index.data.shape == (1,)
        whole = equation.params["slice_sizes"][1:] == equation.invars[0].aval.shape[1:]
        if not (rows and simple and whole and len(table) <= 32):
            raise Unfusable("kernels look up rows of small tables only, one for each environment")
        dtype, at = equation.invars[0].aval.dtype, self.vector(index.data[0], jnp.int32)
        result = np.empty(table.shape[1:], object)
        for i in np.ndindex(*result.shape):
            result[i] = self.vector(table[(0, *i)], dtype)
            for k in range(1, len(table)):
                result[i] = jnp.where(at == k, self.vector(table[(k, *i)], dtype), result[i])
        return Lanes(result, 0)


def uniform(array: np.ndarray) -> Uniform:
    """Return a NumPy array as numbers that are the same for all lanes."""
    result = np.empty(array.shape, object)
    for i in np.ndindex(*array.shape):
        result[i] = array[i]
    return result


def boxed(values: Sequence[Any]) -> np.ndarray:
    """Return objects as an array [len]."""
    result = np.empty((len(values),), object)
    for i, value in enumerate(values):
        result[i] = value
    return result


def value(values: jaxprs.Values, variable: Any) -> Any:
    """Return the value of a variable or of a literal on lanes."""
    if jaxprs.is_literal(variable):
        return uniform(np.asarray(variable.val))
    return values[variable]


def is_number(x: Any) -> bool:
    """Return whether a value is known while tracing."""
    return isinstance(x, int | float | bool | np.generic)


def same(x: Any, y: Any) -> bool:
    """Return whether two numbers are certainly equal."""
    return x is y or (is_number(x) and is_number(y) and bool(x == y))


def along(fold: Callable[[Sequence[Any]], Any], data: np.ndarray, axis: int) -> np.ndarray:
    """Apply a function to each column of an object array along an axis, which goes."""
    moved = np.moveaxis(data, axis, -1)
    result = np.empty(moved.shape[:-1], object)
    for i in np.ndindex(*result.shape):
        result[i] = fold(list(moved[i]))
    return result
