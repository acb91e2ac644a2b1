"""Perceptrons whose first layer is too wide to stay on the chip, and that see the same rows.

    y_n = apply((layers_1, layers_2, ...), x, rows, activations, fast)[n]

A first layer of 400 inputs has too many weights for a block of threads to keep. So blocks of
threads go through its inputs piece by piece, and read each piece of the weights when they need it.
All networks that see the same rows, such as an actor and a critic, do so in one kernel, so that the
rows are read once. The way back has three parts:

1. Hidden layers after the first one are computed and differentiated by the kernel of `mlp`, from
   the first hidden layer, which the way forward has kept. It writes the gradient of that layer
   before its activation, in float16, each block of rows divided by its largest magnitude.
2. A block of threads for each piece of the inputs goes through all rows, and sums the gradient of
   that piece of the first weight. So nothing is left to add.
3. Only if someone asks for the gradient of x, plain JAX computes it.

With `rows`, both ways read the rows of a minibatch where they are in the batch. To write them to
memory first would be three passes over the rows instead of two.

Bytes of 1024 rows of 400 inputs, with two networks of 64 hidden units, per agent: the rows are 0.82
MB in float16, a first hidden layer or its gradient 0.13 MB, a first weight or its gradient 0.10 MB.
The way forward reads the rows once and writes two hidden layers (1.3 MB in all), part 1 reads these
and writes as much (0.5 MB), part 2 reads that and the rows, and writes two gradients (1.3 MB). The
alternatives cost more. To compute the first hidden layer again is another 0.8 MB. To sum the
gradient of all inputs per block of rows is to write and read 0.10 MB for each network and block,
3.3 MB with 8 blocks.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jax.experimental.pallas import triton as plgpu

from purejaxpg.fused import mlp, paths, triton

PIECE = 64  # inputs
ROWS = 128  # of a block of the first layer, at most
SUMS = 128 * 128  # numbers of the first hidden layers that a block has, at most
ROWS_OF_REST = 128  # of a block of the way back through the other layers, at most
WARPS_FORWARD, WARPS_REST, WARPS_FIRST = 8, 8, 8  # of 32 threads
NARROW = 128  # units of first layers up to which shared memory holds loads that run ahead
MAX_INPUTS = 1024
MAX_UNITS = 512  # of the first layers of networks that share kernels

Networks = Sequence[mlp.Layers]


def is_wide(sizes: Sequence[int]) -> bool:
    """Return whether a network of layers of these sizes has a wide first layer."""
    return sizes[0] > mlp.MAX_WIDTH


def can_share(sizes: Sequence[Sequence[int]]) -> bool:
    """Return whether one block of threads can sum the first layers of networks of these sizes."""
    return sum(triton.padded(units) for _, units, *_ in sizes) <= MAX_UNITS


def check(sizes: Sequence[Sequence[int]], fast: bool) -> None:
    """Raise Unfusable if a block of threads cannot hold the networks of these sizes."""
    if max(first for first, *_ in sizes) > MAX_INPUTS:
        raise paths.Unfusable(f"a network has {sizes[0][0]} inputs, and kernels take {MAX_INPUTS}")
    if min(map(len, sizes)) < 3:
        raise paths.Unfusable(f"a network of {sizes[0][0]} inputs has no hidden layer")
    for _, *rest in sizes:
        mlp.check(rest, fast)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def apply(
    networks: Networks,
    x: jax.Array,
    rows: jax.Array | None,
    activations: tuple[tuple[str, ...], ...],
    fast: bool,
) -> tuple[jax.Array, ...]:
    """Return the outputs of multilayer perceptrons, each with a hidden layer.

    Args:
        networks: W [D, H] and b [H] of each layer of each network, float32.
        x: [R, D] float32, or with `rows` what `inputs` makes of [B, D].
        rows: [R] int32, which rows of x the networks see; or None for all. A minibatch that is
            chosen here need not be written to memory.
        activations: of each network, after each layer but the last, "tanh" or "relu".
        fast: see `purejaxpg.fused.paths`.

    Returns:
        [R, A] of each network. They can be differentiated once, by the layers, and by x without
        `rows`.
    """
    plans = _plans(networks, x, rows, activations, fast)
    x = x if rows is not None else inputs(x, fast)
    return tuple(_forward(plans, networks, x, rows, keep=False))


def inputs(x: jax.Array, fast: bool) -> jax.Array:
    """Return x as kernels read it: as float16 within its range if `fast`."""
    return mlp.Plan((), (), 0, fast).inputs(x)


def _apply_forward(
    networks: Any, x: Any, rows: Any, activations: tuple[tuple[str, ...], ...], fast: bool
) -> tuple[Any, Any]:
    values = tuple(tuple((w.value, b.value) for w, b in layers) for layers in networks)
    rows = None if rows is None else rows.value
    plans = _plans(values, x.value, rows, activations, fast)
    # Whether x is differentiated has to stay known while tracing, so a structure says it.
    wanted = () if x.perturbed else None
    seen = x.value if rows is not None else inputs(x.value, fast)
    outputs = _forward(plans, values, seen, rows, keep=True)
    count = len(plans)
    return tuple(outputs[:count]), (values, seen, rows, outputs[count:], wanted)


def _apply_backward(
    activations: tuple[tuple[str, ...], ...], fast: bool, saved: Any, changes: Any
) -> tuple[Any, jax.Array | None, None]:
    networks, x, rows, hidden, wanted = saved
    plans = _plans(networks, x, rows, activations, fast)
    blocks = [min(_rest(plan).block, ROWS_OF_REST) for plan in plans]
    rest, below = [], []
    parts = zip(plans, blocks, networks, hidden, changes, strict=True)
    for plan, block, layers, h, change in parts:
        if isinstance(change, jax.custom_derivatives.SymbolicZero):
            change = jnp.zeros(change.shape, change.dtype)
        gradients, *before = _Rest(plan, block).differentiate(h, change, layers)
        rest.append(gradients)
        below.append(before)
    first = _first_gradients(plans, x, rows, below, blocks)
    gradients = tuple((pair, *others) for pair, others in zip(first, rest, strict=True))
    if wanted is None:
        return gradients, None, None
    total = jnp.zeros(x.shape, jnp.float32)
    for plan, block, layers, (change, tops) in zip(plans, blocks, networks, below, strict=True):
        total += _input_gradient(plan, layers[0][0], change, tops, block)
    return gradients, total, None


apply.defvjp(_apply_forward, _apply_backward, symbolic_zeros=True)


def _plans(
    networks: Networks, x: Any, rows: Any, activations: tuple[tuple[str, ...], ...], fast: bool
) -> list[mlp.Plan]:
    plans = []
    for layers, names in zip(networks, activations, strict=True):
        plan = mlp.Plan.of(layers, x, names, fast)
        plans.append(plan if rows is None else dataclasses.replace(plan, rows=rows.shape[0]))
    return plans


def _rest(plan: mlp.Plan) -> mlp.Plan:
    """Return the plan of the layers after the first one."""
    return dataclasses.replace(plan, sizes=plan.sizes[1:], activations=plan.activations[1:])


def _stages(plans: Sequence[mlp.Plan]) -> int:
    """Return in how many stages a loop loads and computes: two overlap one piece with the next."""
    return 2 if sum(_widths(plans)) <= NARROW else 1


def _widths(plans: Sequence[mlp.Plan]) -> list[int]:
    """Return the padded units of each first layer."""
    return [triton.padded(plan.sizes[1]) for plan in plans]


def _block(plans: Sequence[mlp.Plan]) -> int:
    """Return how many rows of the first layers a block has."""
    fitting = 1 << (SUMS // sum(_widths(plans))).bit_length() - 1
    return min(triton.padded(plans[0].rows), ROWS, fitting)


def _at(refs: Sequence[Any], plans: Sequence[mlp.Plan]) -> list[Sequence[Any]]:
    """Return each network's part of the references to all weights and biases."""
    parts, start = [], 0
    for plan in plans:
        end = start + 2 * len(plan.shapes)
        parts.append(refs[start:end])
        start = end
    return parts


def _corner(start: Any, shape: tuple[int, int], limits: tuple[int, int]) -> tuple[Any, jax.Array]:
    """Return where a piece of a matrix of this shape is, and which of it exists."""
    i, j = start[0] + triton.iota(shape, 0), start[1] + triton.iota(shape, 1)
    return (i, j), (i < limits[0]) & (j < limits[1])


class _Rows:
    """A block of the rows that the networks see, of which pieces are loaded."""

    def __init__(self, refs: Sequence[Any], plan: mlp.Plan, start: Any, block: int) -> None:
        """Take the references to x and, if they are chosen, to the indices of the rows."""
        self.ref, self.block, self.size = refs[0], block, plan.sizes[0]
        row = start + triton.iota((block,), 0)
        self.inside = row < plan.rows
        self.row = triton.load(refs[1], (row,), self.inside) if len(refs) > 1 else row

    def piece(self, p: Any) -> jax.Array:
        """Return piece p of the inputs."""
        j = p * PIECE + triton.iota((self.block, PIECE), 1)
        mask = self.inside[:, None] & (j < self.size)
        return triton.load(self.ref, (self.row[:, None], j), mask)


# --- forward -------------------------------------------------------------------------------------


def _forward(
    plans: Sequence[mlp.Plan], networks: Networks, x: jax.Array, rows: Any, keep: bool
) -> list[jax.Array]:
    """Run the forward kernel -> y [R, A] of each network, and if `keep` also h [R, H] of each."""
    count, seen = plans[0].rows, jax.tree.leaves((x, rows))
    kernel = _Forward(plans, len(seen), keep)
    ys = [jax.ShapeDtypeStruct((count, plan.sizes[-1]), jnp.float32) for plan in plans]
    hs = [jax.ShapeDtypeStruct((count, plan.sizes[1]), x.dtype) for plan in plans if keep]
    return list(
        pallas.pallas_call(
            kernel,
            out_shape=[*ys, *hs],
            grid=(pallas.cdiv(count, kernel.block),),
            interpret=paths.interpreted(),
            compiler_params=plgpu.CompilerParams(
                num_warps=WARPS_FORWARD, num_stages=_stages(plans)
            ),
        )(*seen, *jax.tree.leaves(networks))
    )


class _Forward:
    """The function that a program of the forward kernel runs."""

    __name__ = "forward"

    def __init__(self, plans: Sequence[mlp.Plan], seen: int, keep: bool) -> None:
        self.plans, self.seen, self.keep = plans, seen, keep
        self.widths, self.block = _widths(plans), _block(plans)

    def __call__(self, *refs: Any) -> None:
        """Compute the outputs of a block of rows."""
        start, count = pallas.program_id(0) * self.block, len(self.plans)
        rows = _Rows(refs[: self.seen], self.plans[0], start, self.block)
        weights = _at(refs[self.seen :], self.plans)
        outputs = refs[self.seen + sum(map(len, weights)) :]
        sums = self.products(rows, [of[0] for of in weights])
        for n, (plan, of, total) in enumerate(zip(self.plans, weights, sums, strict=True)):
            h = plan.after(0, total + triton.load_vector(of[1], plan.sizes[1])[None, :])
            if self.keep:
                index, mask = plan.index(start, self.block, plan.sizes[1])
                triton.store(outputs[count + n], index, h, mask)
            rest = _rest(plan)
            index, mask = plan.index(start, self.block, plan.sizes[-1])
            y = rest.outputs(h, rest.load_layers(of[2:]))
            triton.store(outputs[n], index, y, mask)

    def products(self, rows: _Rows, weights: Sequence[Any]) -> Any:
        """Return x W of the first layer of each network, summed piece by piece."""
        plan = self.plans[0]

        def add(p: Any, sums: Any) -> Any:
            x, new = rows.piece(p), []
            for total, ref, width in zip(sums, weights, self.widths, strict=True):
                weight = triton.load(ref, *_corner((p * PIECE, 0), (PIECE, width), ref.shape))
                new.append(total + plan.dot(x, plan.operand(weight)))
            return new

        zeros = [jnp.zeros((self.block, width), jnp.float32) for width in self.widths]
        return lax.fori_loop(0, pallas.cdiv(rows.size, PIECE), add, zeros)


# --- backward ------------------------------------------------------------------------------------


class _Rest(mlp.Backward):
    """The way back through the layers after the first one, and through its activation."""

    def __init__(self, plan: mlp.Plan, block: int) -> None:
        super().__init__(_rest(plan), block, wants_x=True)
        self.warps, self.whole, self.count = WARPS_REST, plan, pallas.cdiv(plan.rows, block)

    def differentiate(self, h: jax.Array, change: jax.Array, layers: mlp.Layers) -> list[Any]:
        """Return gradients of the layers, and of what the first activation gets: c [R, H], t [N].

        Rows of block n have the gradient c t_n.
        """
        shapes = jax.ShapeDtypeStruct(h.shape, h.dtype), jax.ShapeDtypeStruct((self.count,), "f4")
        return self.run(h, change, layers[1:], shapes)

    def store_change(self, refs: Any, start: Any, x: Any, change: Any, top: Any) -> None:
        """Store the gradient of what the activation before x gets, and what to multiply it by."""
        index, mask = self.plan.index(start, self.block, self.plan.sizes[0])
        triton.store(refs[0], index, self.plan.operand(self.whole.before(0, x, change)), mask)
        n = start // self.block + triton.iota((1,), 0)
        triton.store(refs[1], (n,), jnp.full((1,), top, jnp.float32), n < self.count)


def _first_gradients(
    plans: Sequence[mlp.Plan], x: jax.Array, rows: Any, below: Any, blocks: Sequence[int]
) -> list[tuple[jax.Array, jax.Array]]:
    """Return the gradients of weight and bias of each first layer."""
    seen = jax.tree.leaves((x, rows))
    shapes = [s for plan in plans for s in (plan.shapes[0], plan.shapes[0][1:])]
    found = pallas.pallas_call(
        _First(plans, len(seen), blocks),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(pallas.cdiv(plans[0].sizes[0], PIECE),),
        interpret=paths.interpreted(),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS_FIRST, num_stages=_stages(plans)),
    )(*seen, *(array for pair in below for array in pair))
    return list(zip(found[::2], found[1::2], strict=True))


class _First:
    """The function that sums the gradients of a piece of each first weight over all rows."""

    __name__ = "first"

    def __init__(self, plans: Sequence[mlp.Plan], seen: int, blocks: Sequence[int]) -> None:
        self.plans, self.seen, self.blocks = plans, seen, blocks
        self.widths, self.block = _widths(plans), _block(plans)

    def __call__(self, *refs: Any) -> None:
        """Compute a piece of the gradient of each network."""
        piece, end = pallas.program_id(0), self.seen + 2 * len(self.plans)
        below, outputs = refs[self.seen : end], refs[end:]

        def add(n: Any, sums: Any) -> Any:
            rows = _Rows(refs[: self.seen], self.plans[0], n * self.block, self.block)
            x = rows.piece(piece)
            pairs = zip(sums, below[::2], below[1::2], self.plans, self.blocks, strict=True)
            return [self.add(total, x, n, *pair) for total, *pair in pairs]

        zeros = [
            (jnp.zeros((PIECE, width), jnp.float32), jnp.zeros((width,), jnp.float32))
            for width in self.widths
        ]
        blocks = pallas.cdiv(self.plans[0].rows, self.block)
        sums = lax.fori_loop(0, blocks, add, zeros)
        for total, weight, bias in zip(sums, outputs[::2], outputs[1::2], strict=True):
            self.store(piece, total, weight, bias)

    def add(self, total: Any, x: jax.Array, n: Any, *below: Any) -> Any:
        """Add what block n contributes to the sums of a network."""
        ref, top_ref, plan, block = below
        start = n * self.block
        change = triton.load(ref, *plan.index(start, self.block, plan.sizes[1]))
        row = start + triton.iota((self.block,), 0)
        tops = triton.load(top_ref, (row // block,), row < plan.rows)
        top = jnp.maximum(jnp.max(tops), mlp.SMALLEST_TOP)
        if block < self.block:
            change *= plan.operand(tops / top)[:, None]
        weight, bias = total
        weight += plan.dot(x, change, trans_a=True) * top
        return weight, bias + jnp.sum(change.astype(jnp.float32), axis=0) * top

    def store(self, piece: Any, total: Any, weight: Any, bias: Any) -> None:
        """Store a piece of the weight's gradient; the first program stores that of the bias."""
        matrix, vector = total
        index, mask = _corner((piece * PIECE, 0), matrix.shape, weight.shape)
        triton.store(weight, index, matrix, mask)
        j = triton.iota(vector.shape, 0)
        triton.store(bias, (j,), vector, (j < bias.shape[0]) & (piece == 0))


def _input_gradient(
    plan: mlp.Plan, weight: jax.Array, change: jax.Array, tops: jax.Array, block: int
) -> jax.Array:
    """Return what a network contributes to the gradient of x."""
    top = jnp.repeat(tops, block)[: plan.rows, None]
    weight = plan.operand(weight)
    return jnp.matmul(change, weight.T, preferred_element_type=jnp.float32) * top
