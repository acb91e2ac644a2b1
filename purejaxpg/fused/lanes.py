"""Equations evaluated on lanes: one vector for each number that an environment or a sample has.

A kernel works on vectors. An array [E, k] of a few numbers for each of E environments is kept as k
vectors of E lanes, so that slicing, stacking and reshaping it moves nothing: they only rename the
vectors. A value that is the same for all lanes stays a number.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from purejaxpg.fused import jaxprs, windows
from purejaxpg.fused.paths import Unfusable

Uniform = np.ndarray  # of objects: numbers of Python or NumPy, or traced scalars


@dataclasses.dataclass(frozen=True, eq=False)
class Lanes:
    """An array whose axis `axis` is the lanes."""

    data: np.ndarray  # objects over the other axes: vectors [width], or uniform numbers
    axis: int


# What changes no number; `shard_map` adds the last three.
SAME = ("copy", "copy_p", "stop_gradient", "reshard", "pvary", "sharding_constraint")
# What Triton compiles as it is, number by number.
ELEMENTWISE = {
    *("add", "sub", "mul", "div", "rem", "max", "min", "pow", "integer_pow", "atan2", "add_any"),
    *("lt", "gt", "le", "ge", "eq", "ne", "and", "or", "xor", "not", "select_n", "nextafter"),
    *("sin", "cos", "tan", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sqrt"),
    *(
        "rsqrt",
        "cbrt",
        "abs",
        "sign",
        "floor",
        "ceil",
        "neg",
        "square",
        "is_finite",
        "clamp",
        "erf_inv",
    ),
    *("asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic"),
    *("convert_element_type", *SAME),
}


def _slices(p: Any) -> tuple[slice, ...]:
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return tuple(map(slice, p["start_indices"], p["limit_indices"], strides))


def _broadcast(p: Any, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(p["shape"])
    for axis, size in zip(p["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), p["shape"])


def _pad(p: Any, x: np.ndarray, filler: np.ndarray) -> np.ndarray:
    for axis, (low, high, inner) in enumerate(p["padding_config"]):
        moved = np.moveaxis(x, axis, 0)
        places = low + (inner + 1) * np.arange(len(moved))
        size = low + high + len(moved) + inner * max(len(moved) - 1, 0)
        inside = (places >= 0) & (places < size)
        padded = np.full((size, *moved.shape[1:]), filler)
        padded[places[inside]] = moved[inside]
        x = np.moveaxis(padded, 0, axis)
    return x


def _unstack(p: Any, x: np.ndarray) -> list[np.ndarray]:
    return [x.take(k, p["axis"]) for k in range(x.shape[p["axis"]])]


# Primitives that only move numbers, as functions of their parameters and of NumPy arrays.
MOVES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "squeeze": lambda p, x: x.squeeze(tuple(p["dimensions"])),
    "expand_dims": lambda p, x: np.expand_dims(x, tuple(p["dimensions"])),
    "transpose": lambda p, x: x.transpose(p["permutation"]),
    "pad": _pad,
    "tile": lambda p, x: np.tile(x, p["reps"]),
    "rev": lambda p, x: np.flip(x, p["dimensions"]),
    "slice": lambda p, x: x[_slices(p)],
    "concatenate": lambda p, *x: np.concatenate(x, p["dimension"]),
    "stack": lambda p, *x: np.stack(x, p["axis"]),
    "unstack": _unstack,
    "split": lambda p, x: np.split(x, np.cumsum(p["sizes"])[:-1], p["axis"]),
}


def higher(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the larger number, or one that is not a number; Triton's own maximum ignores it."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x | y if x.dtype == jnp.bool_ else jnp.maximum(x, y)
    return jnp.where((x > y) | (x != x), x, y)


def lower(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the smaller number, or one that is not a number."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x & y if x.dtype == jnp.bool_ else jnp.minimum(x, y)
    return jnp.where((x < y) | (x != x), x, y)


REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": lax.add,
    "reduce_prod": lax.mul,
    "reduce_max": higher,
    "reduce_min": lower,
    "reduce_and": lax.bitwise_and,
    "reduce_or": lax.bitwise_or,
}
RUNNING: dict[str, Callable[[Any, Any], Any]] = {
    "cumsum": lax.add,
    "cumprod": lax.mul,
    "cummax": higher,
    "cummin": lower,
}
# Of all lanes, with the number that changes nothing.
OVER_LANES: dict[str, tuple[Callable[..., Any], float]] = {
    "reduce_sum": (jnp.sum, 0.0),
    "reduce_max": (jnp.max, -math.inf),
    "reduce_min": (jnp.min, math.inf),
}
MIXES = "an operation mixes the environments"


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
        if name in RUNNING:
            return self.running(equation, operands[0])
        if name in windows.READS:
            return self.gather(equation, *windowed(name, operands))
        if name in windows.WRITES:
            return self.scatter(equation, *windowed(name, operands))
        raise Unfusable(f"kernels cannot compute {name!r} here")

    # --- numbers, one by one ---------------------------------------------------------------------

    def elementwise(self, equation: Any, operands: list[Any]) -> Any:
        """Apply an operation to arrays number by number."""
        axis = next((x.axis for x in operands if isinstance(x, Lanes)), None)
        arrays = [self.each(x, axis) for x in operands]
        shape = np.broadcast_shapes(*(x.shape for x in arrays))
        arrays = [np.broadcast_to(x, shape) for x in arrays]
        result = np.empty(shape, object)
        for i in np.ndindex(*shape):
            result[i] = self.number(equation, [x[i] for x in arrays])
        return result if axis is None else Lanes(result, axis)

    def each(self, x: Any, axis: int | None) -> np.ndarray:
        """Return an array as numbers and vectors over its axes other than that of the lanes."""
        if not isinstance(x, Lanes):
            return self.without(x, axis)
        if x.axis == axis:
            return x.data
        if axis is None or self.count > 1:
            raise Unfusable(MIXES)
        return np.expand_dims(x.data, x.axis).squeeze(axis)  # any axis is that of one lane

    def number(self, equation: Any, operands: list[Any]) -> Any:
        """Apply an operation to numbers and vectors."""
        dtypes = [v.aval.dtype for v in equation.invars]
        if all(is_number(x) for x in operands):  # known while tracing
            with jax.ensure_compile_time_eval():
                known = [jnp.asarray(x, t) for x, t in zip(operands, dtypes, strict=True)]
                return np.asarray(jaxprs.bind(equation, known)[0])[()]
        return self.compute(equation, self.alike(operands, dtypes))

    def alike(self, operands: list[Any], dtypes: list[Any], vectors: bool = False) -> list[Any]:
        """Return numbers and vectors as vectors if one of them is, or if asked, else as scalars."""
        if vectors or any(not is_number(x) and x.ndim for x in operands):
            return [self.vector(x, t) for x, t in zip(operands, dtypes, strict=True)]
        return [jnp.asarray(x, t) for x, t in zip(operands, dtypes, strict=True)]

    def compute(self, equation: Any, operands: list[jax.Array]) -> jax.Array:
        """Apply an operation to vectors of one shape, or to scalars."""
        name = equation.primitive.name
        if name in SAME:
            return operands[0]
        if name == "convert_element_type":
            return operands[0].astype(equation.params["new_dtype"])
        if name == "clamp":
            return lower(higher(operands[1], operands[0]), operands[2])
        if name in ("max", "min"):
            return (higher if name == "max" else lower)(*operands)
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
        if len(numbers) > windows.MOST_CASES:
            raise Unfusable(f"a constant differs between {len(numbers)} environments")
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
            raise Unfusable(MIXES)
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
            index = equation.params["index_dtype"]
            fold = functools.partial(self.extreme, name, dtype, index)
        else:
            combine = functools.partial(self.combined, REDUCTIONS[name], dtype)
            fold = functools.partial(functools.reduce, combine)
        if not data.size:
            raise Unfusable(f"{name!r} has no numbers to work on")
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
        return operation(*self.alike([x, y], [dtype, dtype]))

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

    def extreme(self, name: str, dtype: Any, as_type: Any, column: Sequence[Any]) -> jax.Array:
        """Return the index of the first largest or smallest number."""
        better = jnp.greater if name == "argmax" else jnp.less
        best, index = self.vector(column[0], dtype), jnp.zeros((self.width,), jnp.int32)
        for k, x in enumerate(column[1:], 1):
            candidate = self.vector(x, dtype)
            wins = better(candidate, best)
            if jnp.issubdtype(dtype, jnp.floating):  # the first that is not a number wins
                wins = wins | ((candidate != candidate) & (best == best))
            best, index = jnp.where(wins, candidate, best), jnp.where(wins, k, index)
        return index.astype(as_type)

    def running(self, equation: Any, x: Any) -> Any:
        """Accumulate along an axis."""
        p, axis = equation.params, equation.params["axis"]
        if isinstance(x, Lanes) and x.axis == axis:
            raise Unfusable("an operation combines the environments")
        operation, dtype = RUNNING[equation.primitive.name], equation.invars[0].aval.dtype
        combine = functools.partial(self.combined, operation, dtype)
        data = x.data if isinstance(x, Lanes) else x
        axis -= isinstance(x, Lanes) and x.axis < axis
        data = np.flip(data, axis) if p["reverse"] else data
        result = np.empty(data.shape, object)
        columns, results = np.moveaxis(data, axis, -1), np.moveaxis(result, axis, -1)
        for i in np.ndindex(*columns.shape[:-1]):
            results[i] = boxed(list(itertools.accumulate(columns[i], combine)))
        result = np.flip(result, axis) if p["reverse"] else result
        return Lanes(result, x.axis) if isinstance(x, Lanes) else result

    # --- windows ---------------------------------------------------------------------------------

    def gather(self, equation: Any, array: Any, index: Any) -> Any:
        """Read windows: choose among the numbers that each of them may hold, by where it starts."""
        opened = self.opened(equation, array, index)
        axis, result = opened.windows_axis, self.looked_up(equation, opened)
        return result if axis is None else Lanes(result.squeeze(axis), axis)

    def looked_up(self, equation: Any, opened: "Opened") -> np.ndarray:
        """Return the numbers in windows of an array [windows]."""
        dtype, default = equation.invars[0].aval.dtype, windows.filling(equation)
        opened.check(equation.primitive.name)
        numbers = self.of_lane(opened.array, opened.axis).ravel()
        result = np.empty(opened.places.shape, object)
        for i in np.ndindex(*result.shape):
            options = {far: numbers[opened.places[i] + far] for far in opened.cases}
            result[i] = self.chosen(opened.starts[i], options, default, dtype)
        return result

    def scatter(self, equation: Any, array: Any, index: Any, updates: Any) -> Any:
        """Write windows, one number after the other: each place that it may have is a case."""
        opened = self.opened(equation, array, index, updates)
        new, dtype = self.of_lane(updates, opened.windows_axis), equation.invars[0].aval.dtype
        operation = windows.SCATTERS.get(equation.primitive.name)
        opened.check(equation.primitive.name)
        old = self.of_lane(array, opened.axis)
        numbers = old.flatten()
        for i in np.ndindex(*opened.places.shape):
            for far in opened.cases:
                x, y = numbers[opened.places[i] + far], new[i]
                y = y if operation is None else self.combined(operation, dtype, x, y)
                numbers[opened.places[i] + far] = self.chosen(opened.starts[i], {far: y}, x, dtype)
        result, axis = numbers.reshape(old.shape), opened.axis
        return result if axis is None else Lanes(result.squeeze(axis), axis)

    def opened(self, equation: Any, array: Any, index: Any, updates: Any = None) -> "Opened":
        """Find the numbers and the windows of one lane."""
        shape = windows.of(equation)
        across = self.lanes_of_windows(shape, array, index, updates)
        axes = range(len(shape.shape)) if across is not None else ()
        axis = next((k for k in axes if shape.axis(k) == across), None)
        axis = array.axis if isinstance(array, Lanes) else axis
        if across is not None and axis is None and updates is not None:
            raise Unfusable(MIXES)
        batch = shape.outside.index(across) if across in shape.outside else None
        window, index = shape.of_one_lane(axis, batch), self.of_lane(index, batch)
        columns = [index[..., k].ravel() for k in range(index.shape[-1])]
        cases = window.cases([known(column) for column in columns])
        starts, places = np.empty(window.batch, object), window.first()
        for i in np.ndindex(*window.batch):
            starts[i] = self.start(window, index[i], windows.drops(equation))
        starts = np.broadcast_to(np.expand_dims(starts, window.inside), places.shape)
        return Opened(array, axis, across, places, starts, cases)

    def lanes_of_windows(self, shape: windows.Windows, *operands: Any) -> int | None:
        """Return which axis of an array of windows is the lanes, given array, index and updates."""
        array, index, updates = operands
        found: set[int | None] = {updates.axis} if isinstance(updates, Lanes) else set()
        if isinstance(array, Lanes):
            found.add(shape.axis(array.axis))
        if isinstance(index, Lanes):
            found.add(shape.outside[index.axis] if index.axis < len(shape.outside) else None)
        whole = [axis for axis in found if axis is not None]
        if (len(found) > 1 and self.count > 1) or len(whole) < min(len(found), 1):
            raise Unfusable(MIXES)
        return min(whole) if whole else None

    def of_lane(self, x: Any, axis: int | None) -> np.ndarray:
        """Return an array as numbers and vectors, with size one at its axis of lanes."""
        if isinstance(x, Lanes) and self.count == 1:  # its lanes need not be along that axis
            return np.expand_dims(x.data, x.axis)
        data = self.each(x, axis)
        return data if axis is None else np.expand_dims(data, axis)

    def start(self, window: windows.Windows, index: np.ndarray, drops: bool) -> Any:
        """Return how far from the first place a window starts; -1 if it is dropped."""
        starts, inside = [], True
        for at, size in zip(index, window.choices, strict=True):
            at = int(at) if is_number(at) else at
            if not isinstance(at, int) and at.dtype != jnp.uint32:
                at = at.astype(jnp.int32)
            inside = inside & (at >= 0) & (at < size)
            known = isinstance(at, int)
            moved = min(max(at, 0), size - 1) if known else jnp.clip(at, 0, size - 1)
            starts.append(moved if known else moved.astype(jnp.int32))
        distance = window.distance(starts)
        if not drops or inside is True:
            return distance
        if isinstance(distance, int) and isinstance(inside, bool):
            return -1
        return jnp.where(inside, distance, -1)

    def chosen(self, start: Any, options: dict[int, Any], default: Any, dtype: Any) -> Any:
        """Return the option of a start, or the default if there is none.

        Args:
            start: how far from the first place a window starts.
            options: of each start.
            default: None if the start is certainly an option.
            dtype: of options and default.
        """
        default = next(iter(options.values())) if default is None else default
        if is_number(start):
            return options.get(int(start), default)
        result = default
        for far, x in options.items():
            if not same(x, default):
                x, y = self.alike([x, result], [dtype, dtype], start.ndim > 0)
                result = jnp.where(start == far, x, y)
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """Windows into an array, for one lane: axes of lanes have size one."""

    array: Any
    axis: int | None  # of the lanes in the array
    windows_axis: int | None  # of the lanes in the array of windows
    places: np.ndarray  # [windows] of its numbers in the flat array, if each window starts at zero
    starts: np.ndarray  # [windows] how far each window starts from there, or -1: it is dropped
    cases: list[int]  # the values that it may have

    def check(self, name: str) -> None:
        """Raise an `Unfusable` if there are too many cases."""
        unknown = sum(not is_number(x) for x in self.starts.flat)
        windows.check(unknown * len(self.cases), name)


def windowed(name: str, operands: list[Any]) -> list[Any]:
    """Return array, index and updates of an equation; a dynamic slice has one operand an axis."""
    if not name.startswith("dynamic"):
        return operands
    count = 2 if name == "dynamic_update_slice" else 1
    if any(isinstance(x, Lanes) for x in operands[count:]):
        raise Unfusable(MIXES)
    index = boxed([x[()] for x in operands[count:]])
    return [operands[0], index, *operands[1:count]]


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
    if not (is_number(x) and is_number(y)):
        return x is y
    return bool(x == y) and math.copysign(1, x) == math.copysign(1, y)


def known(numbers: Sequence[Any]) -> Any:
    """Return the number that all numbers are, or None if they differ or are not known."""
    first = numbers[0] if len(numbers) else None
    return first if all(is_number(x) and x == first for x in numbers) else None


def along(fold: Callable[[Sequence[Any]], Any], data: np.ndarray, axis: int) -> np.ndarray:
    """Apply a function to each column of an object array along an axis, which goes."""
    moved = np.moveaxis(data, axis, -1)
    result = np.empty(moved.shape[:-1], object)
    for i in np.ndindex(*result.shape):
        result[i] = fold(list(moved[i]))
    return result
