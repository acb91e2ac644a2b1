"""The kernel of `fused.scan`: all steps of a loop over time, with the environments as lanes.

A block of the grid has up to 32 environments and runs through all steps by itself; under `vmap`,
each agent adds its blocks. Weights are loaded once, before the loop, and stay in registers.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas
from jax.experimental.pallas import triton as plgpu

from purejaxpg.fused import jaxprs, lanes, paths, tiles, triton
from purejaxpg.fused.paths import Unfusable

BLOCK = 32  # environments of a block, at most
WARPS = 1
# Of one array. With 64 (DeepSea) a block spills 4 kB of registers, with 50 (Catch) 440 bytes.
MOST_VECTORS = 56
SIMPLE = {*lanes.ELEMENTWISE, *lanes.MOVES, "iota"}


@dataclasses.dataclass(frozen=True)
class Array:
    """How an array of the program lies in memory.

    What crosses at each step has its lanes last, [T, entries, E], so that a vector is read and
    written as a whole. The carry stays as it is, [E, entries]: it is read and written only once.
    """

    shape: tuple[int, ...]
    dtype: Any
    axis: int  # of the lanes

    @property
    def entries(self) -> int:
        """Vectors that the array has."""
        return math.prod(self.shape) // self.shape[self.axis]

    @property
    def stored(self) -> Any:
        """The type in memory, where a bool takes a word."""
        return jnp.int32 if self.dtype == jnp.bool_ else self.dtype

    @property
    def others(self) -> tuple[int, ...]:
        """The shape without the axis of the lanes."""
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    def pack(self, x: jax.Array) -> jax.Array:
        """[*shape] -> [E, entries]."""
        x = jnp.moveaxis(x, self.axis, 0)
        return x.reshape(x.shape[0], self.entries).astype(self.stored)

    def unpack(self, x: jax.Array) -> jax.Array:
        """[E, entries] -> [*shape]."""
        x = x.reshape(x.shape[0], *self.others)
        return jnp.moveaxis(x, 0, self.axis).astype(self.dtype)

    def pack_steps(self, x: jax.Array) -> jax.Array:
        """[T, *shape] -> [T, entries, E]."""
        x = jnp.moveaxis(x, 1 + self.axis, -1)
        return x.reshape(x.shape[0], self.entries, -1).astype(self.stored)

    def unpack_steps(self, x: jax.Array) -> jax.Array:
        """[T, entries, E] -> [T, *shape]."""
        x = x.reshape(x.shape[0], *self.others, x.shape[-1])
        return jnp.moveaxis(x, -1, 1 + self.axis).astype(self.dtype)

    def arranged(self, vectors: Sequence[jax.Array]) -> lanes.Lanes:
        """Return loaded vectors as the array that they are."""
        vectors = [x != 0 for x in vectors] if self.dtype == jnp.bool_ else vectors
        return lanes.Lanes(lanes.boxed(vectors).reshape(self.others), self.axis)

    def vectors(self, evaluator: lanes.Evaluator, x: Any) -> list[jax.Array]:
        """Return a value as the vectors to store."""
        x = x.uniform(self.shape) if isinstance(x, tiles.Memory) else x
        if isinstance(x, np.ndarray) and x.shape == self.shape:
            x = lanes.Lanes(evaluator.without(x, self.axis), self.axis)
        if not isinstance(x, lanes.Lanes) or x.axis != self.axis:
            raise Unfusable("a hidden layer leaves the loop, or passes from step to step")
        return [evaluator.vector(v, self.dtype).astype(self.stored) for v in x.data.flat]


def run(
    split: Any,
    base: jaxprs.Values,
    carry: Sequence[Any],
    xs: Sequence[Any],
    length: int,
    fast: bool,
) -> tuple[list[Any], list[Any]]:
    """Run the core of a loop in one kernel.

    Args:
        split: the loop's body, a `loop.Split`.
        base: values that do not depend on the step.
        carry: the first carry, leaves [E, ...].
        xs: what the core reads at each step, leaves [T, ...].
        length: T.
        fast: see `purejaxpg.fused.paths`.

    Returns:
        The last carry, and what leaves the core [T, ...].

    Raises:
        Unfusable: the core is more than lanes and tiles can express.
    """
    count = next((x.shape[0] for x in carry if x.ndim), 0)
    if not count:
        raise Unfusable("there are no environments")
    kernel = Kernel(split, base, count, length, fast)
    constants = [packed_constant(base[v]) for v in kernel.constants]
    inputs = [
        *constants,
        *(a.pack(x) for a, x in zip(kernel.carry, carry, strict=True)),
        *(a.pack_steps(x) for a, x in zip(kernel.xs, xs, strict=True)),
    ]
    shapes = [
        *(jax.ShapeDtypeStruct((count, a.entries), a.stored) for a in kernel.carry),
        *(jax.ShapeDtypeStruct((length, a.entries, count), a.stored) for a in kernel.emitted),
        jax.ShapeDtypeStruct((tiles.scratch(kernel.core), count), jnp.float32),
    ]
    outputs = pallas.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(pallas.cdiv(count, kernel.block),),
        # The last carry takes the place of the first, which nobody else wants to read.
        input_output_aliases={len(constants) + k: k for k in range(len(carry))},
        interpret=paths.interpreted(),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        name="environment_steps",
    )(*inputs)
    last, emitted = outputs[: len(carry)], outputs[len(carry) : -1]
    return (
        [a.unpack(x) for a, x in zip(kernel.carry, last, strict=True)],
        [a.unpack_steps(x) for a, x in zip(kernel.emitted, emitted, strict=True)],
    )


class Kernel:
    """The function that a block runs."""

    __name__ = "steps"

    def __init__(
        self, split: Any, base: jaxprs.Values, count: int, length: int, fast: bool
    ) -> None:
        self.split, self.count, self.length, self.fast = split, count, length, fast
        self.block = min(triton.padded(count), BLOCK)
        self.carry = [self.array(v) for v in split.carry_in]
        self.xs = [self.array(v) for v in split.to_core]
        self.emitted = [self.array(v) for v in split.out_of_core]
        outputs = [*split.carry_out, *split.out_of_core]
        equations = jaxprs.needed_for([*split.always, *split.core], outputs)
        always = {id(e) for e in split.always}
        self.first = remade([e for e in equations if id(e) in always], count)
        self.core = [e for e in equations if id(e) not in always]
        inside = [*self.first, *self.core]
        read = jaxprs.used(inside, outputs) - {v for e in inside for v in e.outvars}
        self.constants = [v for v in base if v in read]

    def array(self, variable: Any) -> Array:
        """Return how a variable with an axis of environments lies in memory."""
        shape, dtype, count = variable.aval.shape, variable.aval.dtype, self.count
        if jnp.issubdtype(dtype, jax.dtypes.extended):
            raise Unfusable("the environments carry a random key")
        if count not in shape or not math.prod(shape):
            raise Unfusable(f"an array {list(shape)} has no numbers of {count} environments")
        if math.prod(shape) // count > MOST_VECTORS:
            raise Unfusable(
                f"an environment has an array of {math.prod(shape) // count} numbers, and kernels "
                f"hold {MOST_VECTORS} at most"
            )
        return Array(shape, dtype, shape.index(count))

    def __call__(self, *refs: Any) -> None:
        """Run all steps of the environments of one block."""
        lane = pallas.program_id(0) * self.block + triton.iota((self.block,), 0)
        inside = lane < self.count
        evaluator = tiles.Evaluator(self.count, self.block, self.fast, lane, scratch=refs[-1])
        sizes = [len(self.constants), len(self.carry), len(self.xs), len(self.carry)]
        constants, carry, xs, last, emitted = parts(refs[:-1], sizes)
        fixed: jaxprs.Values = {
            v: tiles.Memory(ref, stripped(v.aval.shape), v.aval.dtype)
            for v, ref in zip(self.constants, constants, strict=True)
        }
        evaluator.run(self.first, fixed)
        sizes = [array.entries for array in self.carry[:-1]]

        def step(t: jax.Array, vectors: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            values = dict(fixed)
            arrays = zip(self.split.carry_in, self.carry, parts(vectors, sizes), strict=True)
            values.update((v, array.arranged(x)) for v, array, x in arrays)
            for v, array, ref in zip(self.split.to_core, self.xs, xs, strict=True):
                entries = range(array.entries)
                values[v] = array.arranged(
                    [triton.load(ref, (t, k, lane), inside) for k in entries]
                )
            evaluator.run(self.core, values)
            for v, array, ref in zip(self.split.out_of_core, self.emitted, emitted, strict=True):
                for k, vector in enumerate(array.vectors(evaluator, values[v])):
                    triton.store(ref, (t, k, lane), vector, inside)
            following = zip(self.carry, self.split.carry_out, strict=True)
            results = ((array, lanes.value(values, v)) for array, v in following)
            return tuple(x for array, value in results for x in array.vectors(evaluator, value))

        places = [(r, k) for r, a in zip(carry, self.carry, strict=True) for k in range(a.entries)]
        start = tuple(triton.load(ref, (lane, k), inside) for ref, k in places)
        end = lax.fori_loop(0, self.length, step, start)
        places = [(r, k) for r, a in zip(last, self.carry, strict=True) for k in range(a.entries)]
        for (ref, k), vector in zip(places, end, strict=True):
            triton.store(ref, (lane, k), vector, inside)


def remade(equations: Sequence[Any], count: int) -> list[Any]:
    """Return the equations that the kernel computes again, because they are made of few numbers.

    A row or a matrix, such as the scale of a layer's norm, stays in memory.
    """
    made: set[Any] = set()
    first = []
    for equation in equations:
        operands, shape = jaxprs.used([equation]), equation.outvars[0].aval.shape
        small = all(v in made or math.prod(v.aval.shape) <= tiles.MOST_NUMBERS for v in operands)
        few = operands <= made or math.prod(shape) < tiles.FEW or count in shape
        simple = equation.primitive.name in SIMPLE and small and few
        if simple or tiles.adds_axes(equation):
            first.append(equation)
            made.update(equation.outvars)
    return first


def packed_constant(x: Any) -> jax.Array:
    """Return a constant as it lies in memory: words, at least one axis, no leading ones."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise Unfusable("the environments draw random numbers from a key outside of the loop")
    return x.astype(jnp.int32 if x.dtype == jnp.bool_ else x.dtype).reshape(stripped(x.shape))


def stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without leading ones, but with one axis at least."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape or (1,)


def parts(sequence: Sequence[Any], sizes: Iterable[int]) -> list[Sequence[Any]]:
    """Cut a sequence into parts of the given sizes, and one with the rest."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [sequence[a:b] for a, b in zip(ends, [*ends[1:], len(sequence)], strict=True)]
