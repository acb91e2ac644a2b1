"""Lanes that go through the layers of a network: a hidden layer is a tile of lanes times units."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from purejaxpg.fused import lanes, triton, windows
from purejaxpg.fused.paths import Unfusable

MOST_INPUTS = 32  # numbers of an observation; each costs every thread a register for each unit
MOST_NUMBERS = 64  # of an array that lanes read one by one
FEW = 16  # columns of a product that has no use for tensor cores


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """An array [E, H] as a matrix [width, padded H]."""

    value: jax.Array

    def units(self, size: int) -> jax.Array:
        """Return the matrix with zeros where it is padded, of which operations make anything."""
        if size == self.value.shape[1]:
            return self.value
        return jnp.where(triton.iota(self.value.shape, 1) < size, self.value, 0.0)


class Memory:
    """An array in memory that all lanes share, such as a weight. Leading axes of size one are gone.

    It is loaded before the loop in every form that the loop may need. The compiler drops the rest.
    """

    def __init__(self, ref: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self.ref, self.shape, self.dtype = ref, shape, dtype
        self.numbers: list[jax.Array] = []
        self.rows: list[jax.Array] = []
        self.columns: list[jax.Array] = []
        size = math.prod(shape)
        if size <= MOST_NUMBERS:
            self.numbers = [triton.load(ref, i) for i in np.ndindex(*shape)]
        if dtype == jnp.bool_:
            self.numbers = [x != 0 for x in self.numbers]
        if len(shape) == 1:
            j = triton.iota((triton.padded(size),), 0)
            self.rows = [triton.load(ref, (j,), j < size)]
        if len(shape) == 2 and dtype == jnp.float32:
            self._load_weight(ref)

    def _load_weight(self, ref: Any) -> None:
        inputs, units = self.shape
        i, j = (triton.iota((triton.padded(size),), 0) for size in self.shape)
        if inputs <= MOST_INPUTS:
            self.rows = [triton.load(ref, (k, j), j < units) for k in range(inputs)]
        if units < FEW:
            self.columns = [triton.load(ref, (i, k), i < inputs) for k in range(units)]
        self.matrix = triton.load_matrix(ref, (inputs, units))

    def at(self, place: jax.Array) -> jax.Array:
        """Return the numbers at places of the flat array, which must be inside."""
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        sizes = zip(strides, self.shape, strict=True)
        x = triton.load(self.ref, tuple(place // stride % size for stride, size in sizes))
        return x != 0 if self.dtype == jnp.bool_ else x

    def uniform(self, shape: tuple[int, ...]) -> lanes.Uniform:
        """Return its numbers one by one, as an array of its shape in the program."""
        if not self.numbers:
            raise Unfusable(
                f"an array of {math.prod(self.shape)} numbers is read one by one, and kernels hold "
                f"{MOST_NUMBERS} such numbers at most"
            )
        return lanes.boxed(self.numbers).reshape(shape)


class Evaluator(lanes.Evaluator):
    """Computes equations on lanes and tiles.

    Args:
        count: E.
        width: lanes of a vector.
        fast: round the operands of products to float16, and approximate tanh.
        lane: [width] the index of each lane.
        scratch: memory [numbers, E], through which vectors become the columns of a matrix.
    """

    def __init__(self, count: int, width: int, fast: bool, lane: jax.Array, scratch: Any) -> None:
        super().__init__(count, width)
        self.fast, self.scratch = fast, scratch
        self.lane: jax.Array = lane
        self.inside: jax.Array = lane < count

    def apply(self, equation: Any, operands: list[Any]) -> Any:
        """Compute one equation -> its result, or a list of them."""
        name = equation.primitive.name
        if name == "dot_general":
            return self.product(equation, *operands)
        if name in lanes.ELEMENTWISE and self.makes_tile(equation, operands):
            return self.on_tiles(equation, operands)
        if any(isinstance(x, Tile) for x in operands):
            return self.of_tile(equation, operands[0])
        if operands and isinstance(operands[0], Memory) and adds_axes(equation):
            return operands[0]
        if name in windows.READS:
            return self.gather(equation, *lanes.windowed(name, operands))
        shapes = [v.aval.shape for v in equation.invars]
        operands = [
            x.uniform(shape) if isinstance(x, Memory) else x
            for x, shape in zip(operands, shapes, strict=True)
        ]
        return super().apply(equation, operands)

    def compute(self, equation: Any, operands: list[jax.Array]) -> jax.Array:
        """Apply an operation to vectors or tiles of one shape, or to scalars."""
        if equation.primitive.name == "tanh":
            return triton.tanh(operands[0], self.fast)
        return super().compute(equation, operands)

    def looked_up(self, equation: Any, opened: lanes.Opened) -> np.ndarray:
        """Return the numbers in windows of an array, from memory if it is no small one."""
        table, cases = opened.array, len(opened.cases)
        if not isinstance(table, Memory):
            return super().looked_up(equation, opened)
        if opened.axis is not None or (table.numbers and cases <= FEW):
            numbers = table.uniform(equation.invars[0].aval.shape)
            return super().looked_up(equation, dataclasses.replace(opened, array=numbers))
        default, result = windows.filling(equation), np.empty(opened.places.shape, object)
        for i in np.ndindex(*result.shape):
            start = self.alike([opened.starts[i]], [jnp.int32])[0]
            result[i] = table.at(jnp.maximum(start, 0) + int(opened.places[i]))
            if default is not None:
                result[i] = jnp.where(start < 0, jnp.asarray(default), result[i])
        return result

    # --- hidden layers ---------------------------------------------------------------------------

    def makes_tile(self, equation: Any, operands: list[Any]) -> bool:
        """Return whether an operation on each number results in a hidden layer.

        One vector beside one number for each unit is one, too: the scale of a layer's norm.
        """
        if any(isinstance(x, Tile) for x in operands):
            return True
        shape = equation.outvars[0].aval.shape
        units = any(isinstance(x, Memory) and x.shape == shape[1:] for x in operands)
        columns = all(is_column(x) for x in operands if isinstance(x, lanes.Lanes))
        return units and columns and len(shape) == 2 and shape[1] >= FEW

    def on_tiles(self, equation: Any, operands: list[Any]) -> Tile:
        """Apply an operation to hidden layers number by number."""
        units = equation.outvars[0].aval.shape[1]
        dtypes = [v.aval.dtype for v in equation.invars]
        values = [self.spread(x, units, t) for x, t in zip(operands, dtypes, strict=True)]
        return Tile(self.compute(equation, values))

    def spread(self, x: Any, units: int, dtype: Any) -> jax.Array:
        """Return an operand as a matrix [width, padded units]."""
        shape = (self.width, triton.padded(units))
        if isinstance(x, Tile):
            return x.value
        if isinstance(x, Memory) and x.shape == (units,):
            return jnp.broadcast_to(x.rows[0][None, :], shape)
        if isinstance(x, Memory) and x.shape == (1,):
            return jnp.broadcast_to(x.numbers[0], shape)
        if isinstance(x, np.ndarray) and x.size and all(lanes.same(y, x.flat[0]) for y in x.flat):
            return jnp.broadcast_to(jnp.asarray(x.flat[0], dtype), shape)
        if is_column(x):
            return jnp.broadcast_to(self.vector(x.data.flat[0], dtype)[:, None], shape)
        raise Unfusable("a hidden layer meets an array that a kernel cannot hold beside it")

    def of_tile(self, equation: Any, x: Any) -> lanes.Lanes:
        """Add up the units of a hidden layer, as the mean of a layer's norm does."""
        name = equation.primitive.name
        if not (isinstance(x, Tile) and name == "reduce_sum" and equation.params["axes"] == (1,)):
            raise Unfusable(f"kernels cannot compute {name!r} of a hidden layer")
        total = jnp.sum(x.units(equation.invars[0].aval.shape[1]), 1)
        return lanes.Lanes(lanes.boxed([total]).reshape(()), 0)

    def product(self, equation: Any, x: Any, weight: Any) -> Any:
        """Multiply observations or a hidden layer by a weight that all lanes share."""
        (contracted, row), batch = equation.params["dimension_numbers"]
        shape = equation.invars[1].aval.shape
        matrix = isinstance(weight, Memory) and len(shape) == 2
        if any(batch) or tuple(contracted) != (1,) or tuple(row) != (0,) or not matrix:
            raise Unfusable("kernels know products of a layer with a weight only")
        if any(v.aval.dtype != jnp.float32 for v in (*equation.invars, *equation.outvars)):
            raise Unfusable("kernels multiply numbers of float32 only")
        if isinstance(x, Tile):
            return self.of_layer(equation, x.units(shape[0]), weight)
        if not (isinstance(x, lanes.Lanes) and x.data.ndim == 1 and x.axis == 0):
            raise Unfusable("a product has an input that is no observation and no hidden layer")
        vectors = [self.vector(v, jnp.float32) for v in x.data]
        if shape[1] < FEW and weight.numbers:
            table = lanes.boxed(weight.numbers).reshape(shape)
            sums = [sum_of(map(operator.mul, vectors, column)) for column in table.T]
            return lanes.Lanes(lanes.boxed(sums), 0)
        if shape[1] < FEW or not weight.rows:
            return self.of_layer(equation, self.layer(vectors), weight)
        pairs = zip(vectors, weight.rows, strict=True)
        return Tile(sum_of(v[:, None] * row[None, :] for v, row in pairs))

    def of_layer(self, equation: Any, x: jax.Array, weight: Memory) -> Any:
        """Multiply a matrix [width, padded inputs] by a weight, exactly if the program says so."""
        if equation.outvars[0].aval.shape[1] >= FEW:
            fast = self.fast and not is_precise(equation.params["precision"])
            return Tile(triton.dot(x, weight.matrix, fast))
        columns = [jnp.sum(x * column[None, :], 1) for column in weight.columns]
        return lanes.Lanes(lanes.boxed(columns), 0)

    def layer(self, vectors: Sequence[jax.Array]) -> jax.Array:
        """Return vectors as the columns of a matrix [width, padded len].

        Threads hold lanes of a vector, but a matrix in another order, so they swap by memory.
        """
        size, inside, lane = len(vectors), self.inside, self.lane
        triton.barrier()
        for k, vector in enumerate(vectors):
            triton.store(self.scratch, (k, lane), vector, inside)
        triton.barrier()
        row = triton.iota((triton.padded(size),), 0)
        index, mask = (row[None, :], lane[:, None]), (row < size)[None, :] & inside[:, None]
        return triton.load(self.scratch, index, mask)


def scratch(equations: Iterable[Any]) -> int:
    """Return how many vectors the products of some equations put into memory at a time."""
    products = (e for e in equations if e.primitive.name == "dot_general")
    return max((e.invars[1].aval.shape[0] for e in products if e.invars[1].aval.ndim), default=1)


def is_precise(precision: Any) -> bool:
    """Return whether a product asks for more than its default precision."""
    given = precision if isinstance(precision, tuple) else (precision,)
    return any(x not in (None, lax.Precision.DEFAULT) for x in given)


def is_column(x: Any) -> bool:
    """Return whether a value is one vector, for each unit of a hidden layer."""
    vectors = isinstance(x, lanes.Lanes) and x.axis == 0 and x.data.ndim == 1 and x.data.size > 0
    return vectors and all(lanes.same(y, x.data[0]) for y in x.data)


def adds_axes(equation: Any) -> bool:
    """Return whether an equation only puts axes of size one before the only axis of an array."""
    if equation.primitive.name not in ("reshape", "broadcast_in_dim"):
        return False
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return len(before) == 1 and after[-1:] == before and math.prod(after) == before[0]


def sum_of(terms: Iterable[jax.Array]) -> jax.Array:
    """Add up vectors or tiles."""
    total, *rest = terms
    for term in rest:
        total = total + term
    return total
