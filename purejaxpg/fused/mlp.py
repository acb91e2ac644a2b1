"""A multilayer perceptron as two kernels, forward and backward, that know no loss.

    y = apply(((W, b), ...), x, activations, fast)

Plain JAX writes every hidden layer to memory and reads it again, once on the way forward and once
on the way back. Here a block of threads takes a block of rows through all layers, so that hidden
layers never leave the chip. On the way back it computes them again, which costs less than to keep
them. Under `vmap`, each agent adds its blocks.

The gradient of the weights is a sum over all rows. Blocks of threads cannot add to one another in a
fixed order. So each of them writes the sum over its own rows, and XLA adds these up. With a
minibatch of 128 rows, a single block has all rows of an agent, and nothing is left to add. With
8192 rows of a single agent, 64 blocks share the work, and to add 64 gradients of a few thousand
numbers is one more small kernel. A single block that goes through all rows would need no such
kernel, but leave all but one of the GPU's multiprocessors idle.

Operands of products are float16 if `fast`, summed in float32, and tanh is the hardware's. Inputs
are clipped to the range of float16. So that nothing under- or overflows, a block of gradients of
outputs is divided by its largest magnitude first, and what comes of it is multiplied by it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jax.experimental.pallas import triton as plgpu

from purejaxpg.fused import paths, triton

Layers = Sequence[tuple[jax.Array, jax.Array]]  # W [D, H] and b [H] of each

WIDE = 64  # units of a layer, and more need fewer rows or more threads
ROWS, WIDE_FORWARD_ROWS, WIDE_BACKWARD_ROWS = 128, 64, 32  # of a block, at most
ROWS_OF_PROGRAM = 128  # that the way back sums by itself
MAX_PROGRAMS = 64  # of an agent; beyond that, each sums more rows
# Of 32 threads; with these and those rows, hardly a register spills.
WARPS_FORWARD, WIDE_WARPS_FORWARD, WARPS_BACKWARD = 4, 8, 8
MAX_LAYERS = 6  # more take long to compile
MAX_WIDTH = 256
# Bytes for weights. A multiprocessor of an H100 has 227 KiB, the rest is for activations.
SHARED_MEMORY = 184 * 1024
LARGEST = 65504.0  # float16
SMALLEST_TOP = 1e-30  # by which gradients are divided, if all of them are zero


def check(sizes: Sequence[int], fast: bool) -> None:
    """Raise Unfusable if a block of threads cannot hold a network of layers of these sizes."""
    count = len(sizes) - 1
    if count > MAX_LAYERS:
        raise paths.Unfusable(f"a network has {count} layers, and kernels take {MAX_LAYERS}")
    # The way back has a second copy of each weight but the first, turned around.
    padded = [triton.padded(size) for size in sizes]
    first, *others = [d * h for d, h in itertools.pairwise(padded)]
    if (first + 2 * sum(others)) * (2 if fast else 4) > SHARED_MEMORY or max(sizes) > MAX_WIDTH:
        layers = f"layers of {', '.join(map(str, sizes[:-1]))} and {sizes[-1]} units"
        raise paths.Unfusable(f"{layers} exceed a multiprocessor's shared memory")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def apply(layers: Layers, x: jax.Array, activations: tuple[str, ...], fast: bool) -> jax.Array:
    """Return the outputs of a multilayer perceptron.

        h_0 = x,    h_k = activation_k(h_{k-1} W_k + b_k),    y = h_{n-1} W_n + b_n

    Args:
        layers: W [D, H] and b [H] of each layer, float32.
        x: [R, D] float32.
        activations: after each layer but the last, "tanh" or "relu".
        fast: see `purejaxpg.fused.paths`.

    Returns:
        [R, A]. It can be differentiated once, by the layers and by x.
    """
    return _forward(Plan.of(layers, x, activations, fast), layers, x)


def _apply_forward(
    layers: Any, x: Any, activations: tuple[str, ...], fast: bool
) -> tuple[jax.Array, Any]:
    weights = tuple((weight.value, bias.value) for weight, bias in layers)
    # Whether x is differentiated has to stay known while tracing, so a structure says it.
    wanted = () if x.perturbed else None
    y = _forward(Plan.of(weights, x.value, activations, fast), weights, x.value)
    return y, (weights, x.value, wanted)


def _apply_backward(
    activations: tuple[str, ...], fast: bool, saved: Any, change: Any
) -> tuple[Any, jax.Array | None]:
    layers, x, wanted = saved
    if isinstance(change, jax.custom_derivatives.SymbolicZero):
        return jax.tree.map(jnp.zeros_like, layers), jnp.zeros_like(x)
    plan = Plan.of(layers, x, activations, fast)
    return _backward(plan, layers, x, change, wanted is not None)


apply.defvjp(_apply_forward, _apply_backward, symbolic_zeros=True)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known while tracing."""

    sizes: tuple[int, ...]  # D, units of the hidden layers, A
    activations: tuple[str, ...]
    rows: int  # R
    fast: bool

    @classmethod
    def of(cls, layers: Layers, x: jax.Array, activations: tuple[str, ...], fast: bool) -> "Plan":
        """Return the plan for these arrays."""
        sizes = (x.shape[1], *(bias.shape[0] for _, bias in layers))
        return cls(sizes, activations, x.shape[0], fast)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Return the shape of each weight."""
        return list(itertools.pairwise(self.sizes))

    @property
    def is_wide(self) -> bool:
        """Return whether a layer has many units."""
        return max(self.sizes) > WIDE

    @property
    def block(self) -> int:
        """Return how many rows a block of the way back has."""
        return min(triton.padded(self.rows), WIDE_BACKWARD_ROWS if self.is_wide else ROWS)

    def operand(self, x: jax.Array) -> jax.Array:
        """Return an array as it enters products."""
        return x.astype(jnp.float16) if self.fast else x

    def inputs(self, x: jax.Array) -> jax.Array:
        """Return x as it lies in memory; what exceeds a float16 becomes the largest one."""
        return jnp.clip(x, -LARGEST, LARGEST).astype(jnp.float16) if self.fast else x

    def dot(self, a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
        """Return a matrix product, summed in float32."""
        return triton.dot(a, b, self.fast, **transposed)

    # --- inside of a kernel ----------------------------------------------------------------------

    def load_layers(self, refs: Sequence[Any]) -> list[tuple[jax.Array, jax.Array]]:
        """Return weights and biases, padded with zeros."""
        layers = []
        for weight, bias, shape in zip(refs[::2], refs[1::2], self.shapes, strict=True):
            matrix = self.operand(triton.load_matrix(weight, shape))
            layers.append((matrix, triton.load_vector(bias, shape[1])))
        return layers

    def index(self, start: Any, rows: int, size: int) -> tuple[Any, jax.Array]:
        """Return where a block of rows is in an array [R, size], and which of it exists."""
        shape = (rows, triton.padded(size))
        i, j = start + triton.iota(shape, 0), triton.iota(shape, 1)
        return (i, j), (i < self.rows) & (j < size)

    def states(self, x: jax.Array, layers: Layers) -> list[jax.Array]:
        """Return the input of each layer."""
        states = [x]
        for k, (weight, bias) in enumerate(layers[:-1]):
            states.append(self.after(k, self.dot(states[-1], weight) + bias[None, :]))
        return states

    def outputs(self, x: jax.Array, layers: Layers) -> jax.Array:
        """Return the outputs of a block of rows."""
        weight, bias = layers[-1]
        return self.dot(self.states(x, layers)[-1], weight) + bias[None, :]

    def after(self, k: int, z: jax.Array) -> jax.Array:
        """Return the output of activation k, given its input."""
        is_tanh = self.activations[k] == "tanh"
        return self.operand(triton.tanh(z, self.fast) if is_tanh else jnp.maximum(z, 0.0))

    def before(self, k: int, state: jax.Array, change: jax.Array) -> jax.Array:
        """Return the gradient of the input of activation k, given its output and that one's."""
        state = state.astype(jnp.float32)
        if self.activations[k] == "relu":
            return jnp.where(state > 0.0, change, 0.0)
        return change * (1.0 - state * state)


def _forward(plan: Plan, layers: Layers, x: jax.Array) -> jax.Array:
    """Run the forward kernel -> y [R, A]."""
    block = min(triton.padded(plan.rows), WIDE_FORWARD_ROWS if plan.is_wide else ROWS)
    warps = WIDE_WARPS_FORWARD if plan.is_wide else WARPS_FORWARD

    def forward(x_ref: Any, *refs: Any) -> None:
        loaded = plan.load_layers(refs[:-1])
        start = pallas.program_id(0) * block
        x = triton.load(x_ref, *plan.index(start, block, plan.sizes[0]))
        index, mask = plan.index(start, block, plan.sizes[-1])
        triton.store(refs[-1], index, plan.outputs(x, loaded), mask)

    (y,) = pallas.pallas_call(
        forward,
        out_shape=[jax.ShapeDtypeStruct((plan.rows, plan.sizes[-1]), jnp.float32)],
        grid=(pallas.cdiv(plan.rows, block),),
        interpret=paths.interpreted(),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    )(plan.inputs(x), *(array for layer in layers for array in layer))
    return y


def _backward(
    plan: Plan, layers: Layers, x: jax.Array, change: jax.Array, wants_x: bool
) -> tuple[Any, jax.Array]:
    """Run the backward kernel -> gradients of the layers, and of x if wanted, else zeros."""
    kernel = Backward(plan, plan.block, wants_x)
    others = [jax.ShapeDtypeStruct(x.shape, jnp.float32)] if wants_x else []
    gradients, *changes = kernel.run(plan.inputs(x), change, layers, others)
    return gradients, changes[0] if wants_x else jnp.zeros_like(x)


class Backward:
    """The function that a program of the backward kernel runs."""

    __name__ = "backward"

    def __init__(self, plan: Plan, block: int, wants_x: bool) -> None:
        self.plan, self.block, self.wants_x = plan, block, wants_x
        self.warps = WARPS_BACKWARD
        blocks = max(ROWS_OF_PROGRAM // block, -(-plan.rows // (block * MAX_PROGRAMS)))
        self.blocks = min(blocks, -(-plan.rows // block))
        self.offsets, self.size = [], 0  # of weights and biases in the flat gradient
        for inputs, outputs in plan.shapes:
            bias = self.size + inputs * outputs
            self.offsets.append((self.size, bias))
            self.size = bias + outputs

    def run(self, x: jax.Array, change: jax.Array, layers: Layers, others: Any) -> list[Any]:
        """Run the kernel -> the gradients of the layers, and its other outputs."""
        programs = -(-self.plan.rows // (self.block * self.blocks))
        flat = jax.ShapeDtypeStruct((programs, self.size), jnp.float32)
        sums, *rest = pallas.pallas_call(
            self,
            out_shape=[flat, *others],
            grid=(programs,),
            interpret=paths.interpreted(),
            compiler_params=plgpu.CompilerParams(num_warps=self.warps, num_stages=1),
        )(x, change, *(array for layer in layers for array in layer))
        gradient = sums.sum(0)
        parts = [
            (gradient[weight:bias].reshape(shape), gradient[bias : bias + shape[1]])
            for (weight, bias), shape in zip(self.offsets, self.plan.shapes, strict=True)
        ]
        return [tuple(parts), *rest]

    def __call__(self, x_ref: Any, change_ref: Any, *refs: Any) -> None:
        """Sum the gradients of a program's rows."""
        plan, count = self.plan, 2 * len(self.plan.shapes)
        layers = plan.load_layers(refs[:count])
        program = pallas.program_id(0)

        def add(c: Any, sums: Any) -> Any:
            start = (program * self.blocks + c) * self.block
            x = triton.load(x_ref, *plan.index(start, self.block, plan.sizes[0]))
            change = triton.load(change_ref, *plan.index(start, self.block, plan.sizes[-1]))
            top = jnp.maximum(jnp.max(jnp.abs(change)), SMALLEST_TOP) if plan.fast else 1.0
            gradients, change = self.gradients(layers, x, change / top)
            if self.wants_x:
                self.store_change(refs[count + 1 :], start, x, change, top)
            return jax.tree.map(lambda total, g: total + g * top, sums, gradients)

        shapes = [(triton.padded(d), triton.padded(h)) for d, h in plan.shapes]
        zeros = [
            (jnp.zeros(shape, jnp.float32), jnp.zeros(shape[1:], jnp.float32)) for shape in shapes
        ]
        sums = add(0, zeros) if self.blocks == 1 else lax.fori_loop(0, self.blocks, add, zeros)
        for pair, offsets, shape in zip(sums, self.offsets, plan.shapes, strict=True):
            self.store(refs[count], program, pair, offsets, shape)

    def gradients(
        self, layers: Layers, x: jax.Array, change: jax.Array
    ) -> tuple[list[tuple[jax.Array, jax.Array]], Any]:
        """Return the gradients of the layers and of x, given that of the outputs."""
        plan, found = self.plan, []
        states = plan.states(x, layers)
        for k in reversed(range(len(layers))):
            found.append((plan.dot(states[k], change, trans_a=True), jnp.sum(change, axis=0)))
            if k > 0 or self.wants_x:
                change = plan.dot(change, layers[k][0], trans_b=True)
            if k > 0:
                change = plan.before(k - 1, states[k], change)
        return found[::-1], change

    def store_change(self, refs: Any, start: Any, x: Any, change: Any, top: Any) -> None:
        """Store the gradient of a block of x, which is `change * top`."""
        index, mask = self.plan.index(start, self.block, self.plan.sizes[0])
        triton.store(refs[0], index, change * top, mask)

    def store(self, ref: Any, program: Any, pair: Any, offsets: Any, shape: Any) -> None:
        """Store a layer's gradient at its place in the flat one."""
        matrix, vector = pair
        i, j = triton.iota(matrix.shape, 0), triton.iota(matrix.shape, 1)
        inside = (i < shape[0]) & (j < shape[1])
        triton.store(ref, (program, offsets[0] + i * shape[1] + j), matrix, inside)
        j = triton.iota(vector.shape, 0)
        triton.store(ref, (program, offsets[1] + j), vector, j < shape[1])
