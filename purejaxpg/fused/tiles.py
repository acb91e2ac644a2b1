"""Lanes that go through the layers of a network: a hidden layer is a tile of lanes times units."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxpg.fused import lanes, triton
from purejaxpg.fused.paths import Unfusable

MOST_INPUTS = 32  # numbers of an observation; each costs every thread a register for each unit
MOST_NUMBERS = 64  # of an array that lanes read one by one
FEW = 16  # columns of a product that has no use for tensor cores


@dataclasses.dataclass(frozen=True, eq=False)
class Tile:
    """An array [E, H] as a matrix [width, padded H]."""

    value: jax.Array


class Memory:
    """An array in memory that all lanes share, such as a weight. Leading axes of size one are gone.

    It is loaded before the loop in every form that the loop may need. The compiler drops the rest.
    """

    def __init__(self, ref: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape = shape
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
        if len(shape) == 2:
            self._load_weight(ref)

    def _load_weight(self, ref: Any) -> None:
        inputs, units = self.shape
        i, j = (triton.iota((triton.padded(size),), 0) for size in self.shape)
        if inputs <= MOST_INPUTS:
            self.rows = [triton.load(ref, (k, j), j < units) for k in range(inputs)]
        if units < FEW:
            self.columns = [triton.load(ref, (i, k), i < inputs) for k in range(units)]
        self.matrix = triton.load_matrix(ref, (inputs, units))

    def uniform(self, shape: tuple[int, ...]) -> lanes.Uniform:
        """Return its numbers one by one, as an array of its shape in the program."""
        if not self.numbers:
            raise Unfusable(f"an array of {math.prod(self.shape)} numbers is read one by one")
        return lanes.boxed(self.numbers).reshape(shape)


class Evaluator(lanes.Evaluator):
    """Computes equations on lanes and tiles.

    Args:
        count: E.
        width: lanes of a vector.
        fast: round the operands of products to float16, and approximate tanh.
        lane: [width] the index of each lane.
    """

    def __init__(self, count: int, width: int, fast: bool, lane: jax.Array) -> None:
        super().__init__(count, width)
        self.fast, self.lane = fast, lane

    def apply(self, equation: Any, operands: list[Any]) -> Any:
        """Compute one equation -> its result, or a list of them."""
        name = equation.primitive.name
        if name == "dot_general":
            return self.product(equation, *operands)
        on_tiles = any(isinstance(x, Tile) for x in operands)
        if on_tiles and name in lanes.ELEMENTWISE:
            return self.on_tiles(equation, operands)
        if on_tiles:
            raise Unfusable(f"kernels cannot compute {name!r} of a hidden layer")
        if operands and isinstance(operands[0], Memory) and adds_axes(equation):
            return operands[0]
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

    def on_tiles(self, equation: Any, operands: list[Any]) -> Tile:
        """Apply an operation to hidden layers number by number."""
        shape = next(x.value.shape for x in operands if isinstance(x, Tile))
        dtypes = [v.aval.dtype for v in equation.invars]
        values = [self.spread(x, shape, t) for x, t in zip(operands, dtypes, strict=True)]
        return Tile(self.compute(equation, values))

    def spread(self, x: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Return an operand as a matrix [width, padded H]."""
        if isinstance(x, Tile):
            return x.value
        if isinstance(x, Memory) and len(x.shape) == 1:
            return jnp.broadcast_to(x.rows[0][None, :], shape)
        if isinstance(x, np.ndarray) and x.size and all(lanes.same(y, x.flat[0]) for y in x.flat):
            return jnp.broadcast_to(jnp.asarray(x.flat[0], dtype), shape)
        if isinstance(x, lanes.Lanes) and x.data.size == 1 and x.axis == 0:
            return jnp.broadcast_to(self.vector(x.data.flat[0], dtype)[:, None], shape)
        raise Unfusable("a hidden layer meets an array that a kernel cannot hold beside it")

    def product(self, equation: Any, x: Any, weight: Any) -> Any:
        """Multiply observations or a hidden layer by a weight that all lanes share."""
        (contracted, row), batch = equation.params["dimension_numbers"]
        matrix = isinstance(weight, Memory) and len(weight.shape) == 2 and tuple(row) == (0,)
        if any(batch) or tuple(contracted) != (1,) or not matrix:
            raise Unfusable("kernels know products of a layer with a weight only")
        if isinstance(x, Tile) and weight.columns:
            columns = [jnp.sum(x.value * column[None, :], 1) for column in weight.columns]
            return lanes.Lanes(lanes.boxed(columns), 0)
        if isinstance(x, Tile):
            return Tile(triton.dot(x.value, weight.matrix, self.fast))
        if not (isinstance(x, lanes.Lanes) and x.data.ndim == 1 and weight.rows):
            raise Unfusable(
                f"a product has {weight.shape[0]} inputs, and kernels take {MOST_INPUTS} at most"
            )
        vectors = [self.vector(v, jnp.float32) for v in x.data]
        if not weight.columns:
            pairs = zip(vectors, weight.rows, strict=True)
            return Tile(sum_of(v[:, None] * row[None, :] for v, row in pairs))
        if not weight.numbers:
            raise Unfusable("a product has few outputs and many inputs, and no hidden layer")
        table = lanes.boxed(weight.numbers).reshape(weight.shape)
        sums = [sum_of(v * w for v, w in zip(vectors, column, strict=True)) for column in table.T]
        return lanes.Lanes(lanes.boxed(sums), 0)


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
