"""The kernel of `purejaxpg.fused.fit`: all gradient steps of an agent in one block of threads.

How it works. Parameters, Adam's moments and the gradient are flat vectors [P] in memory, in which
each parameter begins at a multiple of 64 bytes. They are copied there at the start, and back at the
end. A gradient step has four parts, with a barrier after each of them:

1. Forward: each network maps the minibatch to its outputs, a chunk of rows at a time, so that the
   activations of a chunk fit the registers. The outputs go to memory.
2. Loss: the head's equations are evaluated on lanes, a vector of R rows for each number that a
   network puts out. The gradients of the outputs take the place of the outputs in memory.
3. Backward: a chunk's activations are computed again, which costs less than to keep them, and the
   gradients of the weights are summed over the chunks in registers.
4. Clipping and Adam: two loops over the flat vectors.

Operands of matrix products are float16 if `fast`. So that nothing under- or overflows, gradients of
outputs are divided by their largest magnitude first, and gradients of weights multiplied by it.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas
from jax.experimental.pallas import triton as plgpu

from purejaxpg.fused import heads, jaxprs, lanes, paths, perceptrons, triton

MULTIPROCESSORS = 132  # of an H100 or H200: with fewer agents, each has one of its own
BLOCK = 1024  # numbers of the flat vectors that clipping and Adam see at once
ALIGNMENT = 16  # numbers: 64 bytes

MIN_ROWS, MAX_ROWS = 16, 1024  # of a minibatch: products want sixteen, and a loss needs registers
MAX_LAYERS = 5
MAX_INPUTS = 256  # of a network; `wide` has faster kernels for more
MAX_OUTPUTS = 32
# Registers of a thread, of 255, for the gradients of a network's weights.
MAX_FAST_REGISTERS, MAX_EXACT_REGISTERS = 160, 100

Indexed = tuple[jax.Array, jax.Array | None]  # places in memory, and which of them exist


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer's parameters are in the flat vector, and their padded shape.

    If the bias fits the padding of the weight's rows, it is one more row, for an input of one.
    """

    weight: int  # offset
    bias: int  # offset
    inputs: int  # D
    outputs: int  # H
    folded: bool  # whether the bias is a row of the matrix
    flipped: bool  # whether the gradient's matrix is [H, D], since products want many rows

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the padded matrix."""
        return triton.padded(self.inputs + self.folded), triton.padded(self.outputs)

    def matrix(self, zero: Any, flipped: bool = False) -> Indexed:
        """Return where the numbers of the matrix are."""
        shape = self.shape[::-1] if flipped else self.shape
        i, j = triton.iota(shape, int(flipped)), triton.iota(shape, int(not flipped))
        index = zero + self.weight + i * self.outputs + j
        if self.folded:
            index = jnp.where(i == self.inputs, zero + self.bias + j, index)
        if (self.inputs + self.folded, self.outputs) == self.shape:
            return index, None
        return index, (i < self.inputs + self.folded) & (j < self.outputs)

    def vector(self, zero: Any) -> Indexed:
        """Return where the numbers of the bias are."""
        j = triton.iota((self.shape[1],), 0)
        return zero + self.bias + j, (None if self.outputs == self.shape[1] else j < self.outputs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of the gradient steps while tracing."""

    head: heads.Head
    sizes: tuple[int, ...]  # of each parameter
    steps: int  # S
    rows: int  # R, a power of two
    fast: bool

    @property
    def offsets(self) -> list[int]:
        """Return where each parameter begins in the flat vector."""
        ends = itertools.accumulate(_up(size, ALIGNMENT) for size in self.sizes)
        return [0, *ends][:-1]

    @property
    def size(self) -> int:
        """Return P, a multiple of `BLOCK`."""
        return _up(self.offsets[-1] + self.sizes[-1], BLOCK)

    def origins(self) -> np.ndarray:
        """Return [P] int32 which number of the parameters, one after the other, each one is.

        It is -1 in the gaps.
        """
        origins = np.full((self.size,), -1, np.int32)
        starts = [0, *itertools.accumulate(self.sizes)]
        for offset, start, size in zip(self.offsets, starts, self.sizes, strict=False):
            origins[offset : offset + size] = np.arange(start, start + size)
        return origins

    def places(self, network: perceptrons.Perceptron) -> list[Place]:
        """Return where a network's layers are."""
        return [self._place(layer, k == 0) for k, layer in enumerate(network.layers)]

    def _place(self, layer: perceptrons.Layer, is_first: bool) -> Place:
        padded = triton.padded(layer.inputs)
        folded = is_first and triton.padded(layer.inputs + 1) == padded
        flipped = is_first and padded < triton.padded(layer.outputs)
        weight, bias = self.offsets[layer.weight], self.offsets[layer.bias]
        return Place(weight, bias, layer.inputs, layer.outputs, folded, flipped)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays that the kernel reads, all of them flat."""

    networks: list[jax.Array]  # of each network [S R D], float16 if `fast`
    columns: list[jax.Array]  # of each column [S k R], or [S k] if it has no rows
    floats: jax.Array  # learning rate, bound of the norm, 1 - b1, 1 - b2, ε, constants, corrections
    integers: jax.Array  # zero, constants
    origins: jax.Array  # [P], as of `Plan`
    moments: list[jax.Array]  # two, without gaps
    parameters: list[jax.Array]


def check(plan: Plan) -> None:
    """Raise Unfusable if the kernel cannot take these steps."""
    rows = plan.rows
    if rows & (rows - 1) or not MIN_ROWS <= rows <= MAX_ROWS:
        allowed = f"no power of two from {MIN_ROWS} to {MAX_ROWS}"
        raise paths.Unfusable(f"the rows of a minibatch are {rows}, {allowed}")
    for network in plan.head.networks:
        _check_network(network, plan)
    for variable in [*plan.head.before.columns, *plan.head.constants]:
        _check_numbers(variable.aval, rows)


def _check_network(network: perceptrons.Perceptron, plan: Plan) -> None:
    if network.inputs.aval.shape[0] != plan.rows:
        inputs = f"{network.inputs.aval.shape[0]} inputs"
        raise paths.Unfusable(f"a network sees {inputs} in a minibatch of {plan.rows} rows")
    if len(network.layers) > MAX_LAYERS:
        count = len(network.layers)
        raise paths.Unfusable(f"a network has {count} layers, and kernels take {MAX_LAYERS}")
    size, outputs = network.layers[0].inputs, network.layers[-1].outputs
    if size > MAX_INPUTS:
        raise paths.Unfusable(f"a network has {size} inputs, and one kernel takes {MAX_INPUTS}")
    if outputs > MAX_OUTPUTS:
        raise paths.Unfusable(f"a network has {outputs} outputs, and kernels take {MAX_OUTPUTS}")
    gradients = sum(math.prod(place.shape) for place in plan.places(network))
    threads = 32 * launch(plan, MULTIPROCESSORS + 1).warps
    limit = MAX_FAST_REGISTERS if plan.fast else MAX_EXACT_REGISTERS
    if gradients > limit * threads:
        units = [network.layers[0].inputs, *(layer.outputs for layer in network.layers)]
        layers = f"layers of {', '.join(map(str, units[:-1]))} and {units[-1]} units"
        raise paths.Unfusable(f"{layers} exceed the registers of a block of threads")


def _check_numbers(aval: Any, rows: int) -> None:
    array = f"the loss reads an array {list(aval.shape)}"
    if aval.shape.count(rows) > 1:
        raise paths.Unfusable(f"{array}, and the rows of a minibatch are {rows}")
    numbers = aval.size // (rows if rows in aval.shape else 1)
    if numbers > heads.MAX_NUMBERS:
        raise paths.Unfusable(f"{array}, and kernels take {heads.MAX_NUMBERS} numbers of a row")
    if not any(jnp.issubdtype(aval.dtype, kind) for kind in (jnp.number, jnp.bool_)):
        raise paths.Unfusable(f"{array} of type {aval.dtype}")


FLOATS = 5  # before the constants
INTEGERS = 1


def arrays(
    plan: Plan,
    columns: Sequence[jax.Array],
    inputs: Sequence[jax.Array],
    rules: Sequence[Any],
    adam: Any,
    parameters: Sequence[jax.Array],
) -> Inputs:
    """Lay out what the kernel reads.

    Args:
        plan: of the gradient steps.
        columns: of each column [S, ...].
        inputs: of each network [S, R, D].
        rules: learning rate, bound of the gradient's norm, b1, b2 and ε of Adam.
        adam: `optax.ScaleByAdamState`, with moments that are vectors.
        parameters: arrays.
    """
    rate, bound, b1, b2, eps = rules
    numbers: dict[str, list[Any]] = {"f": [rate, bound, 1 - b1, 1 - b2, eps], "i": [0]}
    for variable, value in plan.head.constants.items():
        numbers[carrier(variable.aval)] += list(jnp.ravel(jnp.asarray(value)))
    times = adam.count + 1 + jnp.arange(plan.steps)
    corrections = [1.0 / (1.0 - decay**times) for decay in (b1, b2)]
    floats = jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers["f"]])
    return Inputs(
        networks=[_clipped(x.reshape(-1), plan.fast) for x in inputs],
        columns=[
            _flat_column(x, v.aval, plan.rows)
            for x, v in zip(columns, plan.head.before.columns, strict=True)
        ],
        floats=jnp.concatenate([floats, *corrections]).astype(jnp.float32),
        integers=jnp.stack([jnp.asarray(x, jnp.int32) for x in numbers["i"]]),
        origins=jnp.asarray(plan.origins()),
        moments=[adam.mu, adam.nu],
        parameters=[x.reshape(-1) for x in parameters],
    )


def _flat_column(x: jax.Array, aval: Any, rows: int) -> jax.Array:
    """Return a column [S, ...] as a vector whose fastest axis is the rows."""
    axis = rows_axis(aval, rows)
    x = x if axis is None else jnp.moveaxis(x, 1 + axis, -1)
    return x.reshape(-1).astype(jnp.float32 if carrier(aval) == "f" else jnp.int32)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How many threads a block has, in warps of 32, and how many rows its networks see at once."""

    warps: int
    chunk: int


def launch(plan: Plan, agents: int) -> Launch:
    """Return the launch that was fastest on an H200, or that spills few registers.

    Args:
        plan: of the gradient steps.
        agents: under the innermost `jax.vmap`.
    """
    layers = [layer for network in plan.head.networks for layer in network.layers]
    widest = max(max(triton.padded(x.inputs), triton.padded(x.outputs)) for x in layers)
    if not plan.fast:
        warps, chunk = 8, 16  # a product of float32 is many instructions for each row
    elif widest > 64:
        warps, chunk = 8, 32
    elif max(len(network.layers) for network in plan.head.networks) > 3:
        warps, chunk = 4, 32
    elif agents <= MULTIPROCESSORS:
        warps, chunk = 8, 128
    else:
        warps, chunk = 4, 64  # with 255 registers a thread, two blocks share a multiprocessor
    return Launch(warps, min(chunk, plan.rows))


def run(plan: Plan, inputs: Inputs) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Take all gradient steps of one agent, or under `jax.vmap` of each agent.

    Returns:
        Moments without gaps, parameters as vectors, and the means of metrics [1]: of those of
        `plan.head.inside` in their order, and then of whether the steps have stopped.
    """
    leaves = [
        *inputs.networks, *inputs.columns, inputs.floats, inputs.integers,
        inputs.origins, *inputs.moments, *inputs.parameters,
    ]  # fmt: skip

    @jax.custom_batching.custom_vmap
    def call(*leaves: jax.Array) -> list[jax.Array]:
        return _call(plan, launch(plan, 1), *leaves)

    @call.def_vmap
    def call_all(agents: int, batched: list[bool], *leaves: jax.Array) -> Any:
        each = functools.partial(_call, plan, launch(plan, agents))
        axes = [0 if is_batched else None for is_batched in batched]
        results = jax.vmap(each, in_axes=axes, axis_size=agents)(*leaves)
        return results, [True] * len(results)

    results, count = call(*leaves), len(plan.sizes)
    return results[:2], results[2 : 2 + count], results[2 + count :]


def _call(plan: Plan, how: Launch, *leaves: jax.Array) -> list[jax.Array]:
    """Call the kernel -> moments, parameters and metrics."""
    state = [sum(plan.sizes)] * 2 + list(plan.sizes)
    metrics = [1] * (len(plan.head.inside) + 1)
    memory = [plan.size] * 4  # to work in
    memory += [plan.rows * network.layers[-1].outputs for network in plan.head.networks]
    first = len(leaves) - len(state)

    def kernel(*refs: Any) -> None:
        _Block(plan, how, refs[: len(leaves)], refs[len(leaves) :]).run()

    results = pallas.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((size,), jnp.float32) for size in [*state, *metrics, *memory]
        ],
        input_output_aliases={first + k: k for k in range(len(state))},
        interpret=paths.interpreted(),
        name="gradient_steps",
        compiler_params=plgpu.CompilerParams(num_warps=how.warps, num_stages=1),
    )(*leaves)
    return list(results[: len(state) + len(metrics)])


class _Block:
    """The program of one block of threads, as it is written down."""

    def __init__(self, plan: Plan, how: Launch, inputs: Any, outputs: Any) -> None:
        self.plan, self.head, self.chunk = plan, plan.head, how.chunk
        networks, columns = len(plan.head.networks), len(plan.head.before.columns)
        self.inputs, inputs = inputs[:networks], inputs[networks:]
        self.columns, inputs = inputs[:columns], inputs[columns:]
        self.floats, self.integers, self.origins = inputs[:3]
        state, metrics = 2 + len(plan.sizes), len(plan.head.inside) + 1
        self.given, self.results = inputs[3:], outputs[:state]
        self.metrics, outputs = outputs[state : state + metrics], outputs[state + metrics :]
        self.state, self.gradient, self.outputs = outputs[:3], outputs[3], outputs[4:]
        self.parameters = self.state[0]
        self.rows = triton.iota((plan.rows,), 0)
        self.zeros: Iterator[Any] = itertools.repeat(0)

    def run(self) -> None:
        """Take all gradient steps."""
        block = triton.iota((BLOCK,), 0)

        def begin(t: Any, none: int) -> int:
            at = (t * BLOCK + block,)
            triton.store(self.gradient, at, jnp.zeros((BLOCK,), jnp.float32))
            origin = triton.load(self.origins, at)
            for given, moment in zip(self.given, self.state[1:], strict=False):
                triton.store(moment, at, triton.load(given, (origin,), origin >= 0))
            return none

        def end(t: Any, none: int) -> int:
            at = (t * BLOCK + block,)
            origin = triton.load(self.origins, at)
            for result, moment in zip(self.results, self.state[1:], strict=False):
                triton.store(result, (origin,), triton.load(moment, at), origin >= 0)
            return none

        for ref in self.metrics:
            ref[0] = jnp.float32(0.0)
        lax.fori_loop(0, self.plan.size // BLOCK, begin, 0)
        for offset, given in zip(self.plan.offsets, self.given[2:], strict=True):
            _copy(given, 0, self.parameters, offset, given.shape[0])
        barrier()
        lax.fori_loop(0, self.plan.steps, self.step, jnp.float32(0.0))
        lax.fori_loop(0, self.plan.size // BLOCK, end, 0)
        for offset, result in zip(self.plan.offsets, self.results[2:], strict=True):
            _copy(self.parameters, offset, result, 0, result.shape[0])

    def step(self, s: Any, stopped: Any) -> Any:
        """Take one gradient step -> whether to stop."""
        self.zeros = self.unknown_zeros(s)
        for k in range(len(self.head.networks)):
            self.forward(k, s)
        barrier()
        values = self.evaluated(s)
        tops = [self.put_gradients(k, values) for k in range(len(self.head.networks))]
        self.put_free_gradients(values)
        barrier()
        for k in reversed(range(len(self.head.networks))):
            self.backward(k, s, tops[k])
        barrier()
        if self.head.stop:
            stops = _number(values, self.head.stop[0])
            stopped = jnp.maximum(stopped, jnp.asarray(stops).astype(jnp.float32))
        self.descend(s, stopped)
        self.put_metrics(s, values, stopped)
        barrier()
        return stopped

    def unknown_zeros(self, s: Any) -> Iterator[Any]:
        """Yield zeros that the compiler cannot know.

        With them in their addresses, loads stay where they are. Otherwise the compiler computes the
        addresses of all steps in advance, and runs out of registers.
        """
        zero = self.integers[0]
        return (pallas.multiple_of(zero * (s + 1 + k), 1024) for k in itertools.count())

    # --- networks --------------------------------------------------------------------------------

    def forward(self, k: int, s: Any) -> None:
        """Store a network's outputs for all rows."""
        zero = next(self.zeros)
        weights, biases = self.load_layers(k, zero)

        def chunk(c: Any, none: int) -> int:
            states = self.states(k, self.load_input(k, s, c, zero), weights, biases)
            outputs = self.affine(states[-1], weights[-1], biases[-1])
            index, mask = self.output_index(k, c, zero)
            triton.store(self.outputs[k], (index,), outputs, mask)
            return none

        lax.fori_loop(0, self.plan.rows // self.chunk, chunk, 0)

    def backward(self, k: int, s: Any, top: Any) -> None:
        """Store the gradients of a network's parameters."""
        zero = next(self.zeros)
        places = self.plan.places(self.head.networks[k])
        weights, biases = self.load_layers(k, zero)
        inverse = 1.0 / top

        def chunk(c: Any, sums: Any) -> Any:
            states = self.states(k, self.load_input(k, s, c, zero), weights, biases)
            change = triton.load(self.outputs[k], *_at(self.output_index(k, c, zero))) * inverse
            return self.added(k, sums, states, weights, change)

        sums = lax.fori_loop(0, self.plan.rows // self.chunk, chunk, _no_gradients(places))
        for place, (matrix, vector) in zip(places, sums, strict=True):
            index, mask = place.matrix(zero, place.flipped)
            triton.store(self.gradient, (index,), matrix * top, mask)
            if vector is not None:
                index, mask = place.vector(zero)
                triton.store(self.gradient, (index,), vector * top, mask)

    def added(self, k: int, sums: Any, states: Any, weights: Any, change: Any) -> Any:
        """Add a chunk's gradients of all layers, from the last to the first, to their sums."""
        network = self.head.networks[k]
        places = self.plan.places(network)
        new = list(sums)
        for at in reversed(range(len(places))):
            matrix, vector = sums[at]
            pair = (change, states[at]) if places[at].flipped else (states[at], change)
            matrix = matrix + self.dot(*pair, trans_a=True)
            if vector is not None:
                vector = vector + jnp.sum(change, axis=0)
            new[at] = (matrix, vector)
            if at > 0:
                change = self.dot(change, weights[at], trans_b=True)
                change = self.before(network.activations[at - 1], states[at], change)
        return tuple(new)

    def states(self, k: int, x: jax.Array, weights: Any, biases: Any) -> list[jax.Array]:
        """Return the input of each layer."""
        states = [x]
        activations = self.head.networks[k].activations
        for activation, weight, bias in zip(activations, weights[:-1], biases[:-1], strict=True):
            z = self.affine(states[-1], weight, bias)
            z = triton.tanh(z, self.plan.fast) if activation == "tanh" else jnp.maximum(z, 0.0)
            states.append(self.operand(z))
        return states

    def before(self, activation: str, state: jax.Array, change: jax.Array) -> jax.Array:
        """Return the gradient of an activation's input from its output and that one's gradient."""
        state = state.astype(jnp.float32)
        if activation == "relu":
            return jnp.where(state > 0.0, change, 0.0)
        return self.inline(SLOPE, [state, change]) if self.inlines else change * (1.0 - state**2)

    def affine(self, x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Return x W + b."""
        product = self.dot(x, weight)
        return product if bias is None else product + bias[None, :]

    def dot(self, a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
        """Return a matrix product, summed in float32."""
        return triton.dot(a, b, self.plan.fast, **transposed)

    def operand(self, x: jax.Array) -> jax.Array:
        """Return an array as it enters products."""
        return x.astype(jnp.float16) if self.plan.fast else x

    def load_layers(self, k: int, zero: Any) -> tuple[list[jax.Array], list[jax.Array | None]]:
        """Return a network's weights and its biases, None where a weight has it as a row."""
        places = self.plan.places(self.head.networks[k])
        weights = [triton.load(self.parameters, *_at(place.matrix(zero))) for place in places]
        biases = [
            None if place.folded else triton.load(self.parameters, *_at(place.vector(zero)))
            for place in places
        ]
        return [self.operand(w) for w in weights], biases

    def load_input(self, k: int, s: Any, c: Any, zero: Any) -> jax.Array:
        """Return a chunk of a network's input, with a column of ones for a bias in the matrix."""
        place = self.plan.places(self.head.networks[k])[0]
        shape = (self.chunk, place.shape[0])
        i, j = triton.iota(shape, 0), triton.iota(shape, 1)
        row = s * self.plan.rows + c * self.chunk + zero + i
        mask = None if place.inputs == shape[1] else j < place.inputs
        x = triton.load(self.inputs[k], (row * place.inputs + j,), mask)
        return jnp.where(j == place.inputs, jnp.ones((), x.dtype), x) if place.folded else x

    def output_index(self, k: int, c: Any, zero: Any) -> Indexed:
        """Return where a chunk's outputs are."""
        place = self.plan.places(self.head.networks[k])[-1]
        shape = (self.chunk, place.shape[1])
        i, j = triton.iota(shape, 0), triton.iota(shape, 1)
        index = (c * self.chunk + zero + i) * place.outputs + j
        return index, (None if place.outputs == shape[1] else j < place.outputs)

    # --- loss ------------------------------------------------------------------------------------

    def evaluated(self, s: Any) -> jaxprs.Values:
        """Evaluate the head's equations on lanes."""
        zero = next(self.zeros)
        head, values = self.head, dict[Any, Any]()
        for k, variable in enumerate(head.outputs):
            values[variable] = self.load_outputs(k, zero)
        for variable, leaf in zip(head.free_values, head.free, strict=True):
            at = self.plan.offsets[leaf] + zero
            values[variable] = self.load_numbers(self.parameters, at, variable.aval)
        for variable, ref in zip(head.before.columns, self.columns, strict=True):
            values[variable] = self.load_column(ref, s, zero, variable.aval)
        offsets = {"f": FLOATS, "i": INTEGERS}
        for variable in head.constants:
            kind = carrier(variable.aval)
            ref = self.floats if kind == "f" else self.integers
            values[variable] = self.load_numbers(ref, offsets[kind], variable.aval)
            offsets[kind] += variable.aval.size
        lanes.Evaluator(self.plan.rows, self.plan.rows, reduces=True).run(head.equations, values)
        return values

    def load_outputs(self, k: int, zero: Any) -> lanes.Lanes:
        """Return a network's outputs, a vector for each of them."""
        outputs = self.head.networks[k].layers[-1].outputs
        data = np.empty((outputs,), object)
        for a in range(outputs):
            data[a] = triton.load(self.outputs[k], (self.rows * outputs + (a + zero),))
        return lanes.Lanes(data, 0)

    def load_column(self, ref: Any, s: Any, zero: Any, aval: Any) -> lanes.Lanes | lanes.Uniform:
        """Return a column of the minibatch."""
        axis = rows_axis(aval, self.plan.rows)
        if axis is None:
            return self.load_numbers(ref, s * aval.size + zero, aval)
        shape = aval.shape[:axis] + aval.shape[axis + 1 :]
        data = np.empty(shape, object)
        for k, i in enumerate(np.ndindex(*shape)):
            row = s * aval.size + (k * self.plan.rows + zero) + self.rows
            data[i] = _restored(triton.load(ref, (row,)), aval.dtype)
        return lanes.Lanes(data, axis)

    def load_numbers(self, ref: Any, start: Any, aval: Any) -> lanes.Uniform:
        """Return a small array, number by number."""
        data = np.empty(aval.shape, object)
        for k, i in enumerate(np.ndindex(*aval.shape)):
            data[i] = _restored(ref[start + k], aval.dtype)
        return data

    def put_gradients(self, k: int, values: jaxprs.Values) -> Any:
        """Store the gradients of a network's outputs -> their largest magnitude."""
        zero = next(self.zeros)
        outputs = self.head.networks[k].layers[-1].outputs
        evaluator = lanes.Evaluator(self.plan.rows, self.plan.rows)
        columns = _columns(values, self.head.output_gradients[k], evaluator)
        top = jnp.full((self.plan.rows,), 1e-30, jnp.float32)
        for a in range(outputs):
            column = evaluator.vector(columns[a], jnp.float32)
            triton.store(self.outputs[k], (self.rows * outputs + (a + zero),), column)
            top = jnp.maximum(top, jnp.abs(column))
        return jnp.max(top) if self.plan.fast else 1.0

    def put_free_gradients(self, values: jaxprs.Values) -> None:
        """Store the gradients of the parameters that are no layers."""
        zero = next(self.zeros)
        for leaf, variable in zip(self.head.free, self.head.free_gradients, strict=True):
            for k, value in enumerate(_numbers(values, variable).flat):
                at = self.plan.offsets[leaf] + k + zero
                self.gradient[at] = jnp.asarray(value, jnp.float32)

    def put_metrics(self, s: Any, values: jaxprs.Values, stopped: Any) -> None:
        """Add a step's metrics to their sums; after the last step, divide these by their number."""
        numbers = [_number(values, self.head.metrics[name]) for name in self.head.inside]
        for ref, value in zip(self.metrics, [*numbers, stopped], strict=True):
            total = ref[0] + jnp.asarray(value).astype(jnp.float32)
            ref[0] = jnp.where(s == self.plan.steps - 1, total / self.plan.steps, total)

    # --- clipping and Adam -----------------------------------------------------------------------

    def descend(self, s: Any, stopped: Any) -> None:
        """Clip the gradient by its norm and take a step of Adam, unless the steps have stopped."""
        block, blocks = triton.iota((BLOCK,), 0), self.plan.size // BLOCK

        def squares(t: Any, total: jax.Array) -> jax.Array:
            return total + triton.load(self.gradient, (t * BLOCK + block,)) ** 2

        total = lax.fori_loop(0, blocks, squares, jnp.zeros((BLOCK,), jnp.float32))
        norm, bound = jnp.sqrt(jnp.sum(total)), self.floats[1]
        scale = jnp.where(norm < bound, 1.0, bound / norm)
        corrections = self.floats.shape[0] - 2 * self.plan.steps
        rate = self.floats[0] * self.floats[corrections + s]
        correction = self.floats[corrections + self.plan.steps + s]
        # A gradient of NaN must not reach the moments: nothing is written, rather than a step of 0.
        going = jnp.broadcast_to(stopped == 0.0, block.shape) if self.head.stop else None

        def adam(t: Any, none: int) -> int:
            at = (t * BLOCK + block,)
            gradient = triton.load(self.gradient, at) * scale
            old = [triton.load(ref, at) for ref in self.state]
            new = self.adam(old, gradient, rate, correction)
            for ref, value in zip(self.state, new, strict=True):
                triton.store(ref, at, value, going)
            return none

        lax.fori_loop(0, blocks, adam, 0)

    def adam(
        self, old: list[jax.Array], g: jax.Array, rate: Any, correction: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return parameters and moments after a step of Adam (`correction` is of v)."""
        p, m, v = old
        a1, a2, eps = (self.floats[k] for k in (2, 3, 4))
        if self.inlines:
            m, v = self.inline(MEAN, [m, g, a1]), self.inline(SQUARE, [v, g, a2])
            return self.inline(STEP, [p, m, v, correction, -rate, eps]), m, v
        m, v = m + a1 * (g - m), v + a2 * (g * g - v)
        return p - rate * m / (jnp.sqrt(v * correction) + eps), m, v

    @property
    def inlines(self) -> bool:
        """Return whether instructions are written by hand, for Triton does not fuse a x + b."""
        return self.plan.fast and not paths.interpreted()

    def inline(self, instructions: str, operands: list[Any]) -> jax.Array:
        """Apply instructions in PTX to vectors and numbers, element by element."""
        shape = operands[0].shape
        arrays = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), shape) for x in operands]
        (result,) = plgpu.elementwise_inline_asm(
            instructions,
            args=arrays,
            constraints=",".join(["=f"] + ["f"] * len(arrays)),
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
        )
        return result


# $0 = $1 + $3 ($2 - $1)
MEAN = "{ .reg .f32 t; sub.f32 t, $2, $1; fma.rn.f32 $0, t, $3, $1; }"
# $0 = $1 + $3 ($2² - $1)
SQUARE = "{ .reg .f32 t; mul.f32 t, $2, $2; sub.f32 t, t, $1; fma.rn.f32 $0, t, $3, $1; }"
# $0 = $1 + $5 $2 / (√($3 $4) + $6)
STEP = """{ .reg .f32 t; mul.f32 t, $3, $4; sqrt.approx.ftz.f32 t, t; add.f32 t, t, $6;
rcp.approx.ftz.f32 t, t; mul.f32 t, t, $2; fma.rn.f32 $0, t, $5, $1; }"""
# $0 = (1 - $1²) $2
SLOPE = "{ .reg .f32 t; neg.f32 t, $1; fma.rn.f32 t, t, $1, 0f3F800000; mul.f32 $0, t, $2; }"


def _copy(source: Any, start: int, target: Any, to: int, size: int) -> None:
    """Copy numbers from one vector to another."""
    block = min(triton.padded(size), BLOCK)

    def copy(t: Any, none: int) -> int:
        at = t * block + triton.iota((block,), 0)
        value = triton.load(source, (start + at,), at < size)
        triton.store(target, (to + at,), value, at < size)
        return none

    lax.fori_loop(0, pallas.cdiv(size, block), copy, 0)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def barrier() -> None:
    """Wait for all threads of the block, so that they see what the others wrote."""
    if not paths.interpreted():
        plgpu.debug_barrier()


def carrier(aval: Any) -> str:
    """Return "f" for numbers that reach the kernel as float32, "i" for those as int32."""
    if aval.dtype.itemsize > 4:
        raise paths.Unfusable(f"the loss reads numbers of type {aval.dtype}")
    return "f" if jnp.issubdtype(aval.dtype, jnp.floating) else "i"


def _clipped(x: jax.Array, fast: bool) -> jax.Array:
    """Return an input as it enters products; what exceeds a float16 becomes the largest one."""
    return jnp.clip(x, -65504.0, 65504.0).astype(jnp.float16) if fast else x


def rows_axis(aval: Any, rows: int) -> int | None:
    """Return which axis of an array has the rows of a minibatch, or None."""
    return aval.shape.index(rows) if rows in aval.shape else None


def _restored(x: jax.Array, dtype: Any) -> jax.Array:
    return x != 0 if dtype == jnp.bool_ else x.astype(dtype)


def _at(indexed: Indexed) -> tuple[tuple[jax.Array], jax.Array | None]:
    return (indexed[0],), indexed[1]


def _no_gradients(places: list[Place]) -> Any:
    shapes = [place.shape[::-1] if place.flipped else place.shape for place in places]
    return tuple(
        (
            jnp.zeros(shape, jnp.float32),
            None if place.folded else jnp.zeros((place.shape[1],), jnp.float32),
        )
        for place, shape in zip(places, shapes, strict=True)
    )


def _numbers(values: jaxprs.Values, variable: Any) -> lanes.Uniform:
    """Return an array that is the same for all rows."""
    if jaxprs.is_literal(variable):
        return lanes.uniform(np.asarray(variable.val))
    if isinstance(values[variable], lanes.Lanes):
        raise paths.Unfusable("a gradient of the loss has an axis as long as a minibatch")
    return values[variable]


def _number(values: jaxprs.Values, variable: Any) -> Any:
    return _numbers(values, variable)[()]


def _columns(values: jaxprs.Values, variable: Any, evaluator: lanes.Evaluator) -> np.ndarray:
    """Return an array [R, A] as A vectors or numbers."""
    value = None if jaxprs.is_literal(variable) else values[variable]
    if isinstance(value, lanes.Lanes) and value.axis == 0:
        return value.data
    return evaluator.without(_numbers(values, variable), 0)
