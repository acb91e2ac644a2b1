"""`scan`: a loop over time whose body keeps only what the next step needs, in one kernel on a GPU.

Of the equations of a loop's body, some do not depend on the carry: random numbers, above all. They
are computed for all steps at once, before the loop. Others do not reach the carry: log
probabilities, metrics. They are computed for all steps at once, after it. The rest is the core.
`lax.scan` launches a kernel for each operation of the core at each step, a few microseconds each,
while an agent has microseconds of work. So a GPU runs the core of all steps in one kernel, where
each environment is a lane (see `purejaxpg.fused.lanes`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from purejaxpg import backend
from purejaxpg.fused import jaxprs, paths
from purejaxpg.fused.paths import Path, Unfusable

LOOP = "steps of the environments"
# Steps of `lax.scan` in one trip of its loop: fewer copies of the carry on a GPU.
UNROLL_ON_GPU = 4
CUTTING = {"slice", "squeeze"}
WIDENING = {"convert_element_type", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"}


@dataclasses.dataclass(frozen=True)
class Split:
    """The body of a loop, sorted by when it can be computed."""

    carry_in: list[Any]  # variables
    carry_out: list[Any]  # variables, or literals
    x: list[Any]
    y: list[Any]  # variables, or literals
    constants: jaxprs.Values
    always: list[Any]  # equations that depend on neither carry nor x
    early: list[Any]  # on x
    core: list[Any]  # what leads from one carry to the next
    late: list[Any]  # the rest
    to_core: list[Any]  # variables of early, and x, that the core reads
    to_late: list[Any]
    out_of_core: list[Any]  # variables of the core, and carries, that `late` reads or y holds


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, config: Any
) -> tuple[Any, Any]:
    """Run a loop over time: `lax.scan(step, carry, xs)`, computed faster on a GPU.

    Args:
        step: (carry, x) -> (carry, y). A kernel needs the environments to be the first axis of
            every array in the carry, and independent of one another.
        carry: pytree of arrays.
        xs: pytree of arrays [T, ...].
        config: an agent's configuration; its fields `fused` and `precision` are read, if it has
            them.

    Returns:
        The last carry, and all y [T, ...].

    Raises:
        InputError: `config.fused` is "require", and there is no kernel for this loop.

    On anything but a GPU this is `lax.scan`.
    """
    refusal = paths.refusal(config)
    if not backend.on_gpu():
        paths.record(config, Path(LOOP, False, refusal))
        return lax.scan(step, carry, xs)
    carry = jax.tree.map(jnp.asarray, carry)
    with paths.products(config):
        try:
            split, trees = sorted_body(step, carry, xs)
        except Unfusable as error:
            paths.record(config, Path(LOOP, False, str(error)))
            return lax.scan(step, carry, xs)
    leaves, xs_leaves = jax.tree.leaves(carry), jax.tree.leaves(xs)
    try:
        if refusal:
            raise Unfusable(refusal)
        results = run(split, leaves, xs_leaves, paths.is_fast(config))
        paths.record(config, Path(LOOP, True))
    except Unfusable as error:
        paths.record(config, Path(LOOP, False, str(error)))
        results = run(split, leaves, xs_leaves, None)
    return tuple(map(jax.tree.unflatten, trees, results))


def sorted_body(step: Callable[..., Any], carry: Any, xs: Any) -> tuple[Split, tuple[Any, Any]]:
    """Trace the body of a loop and sort its equations -> Split, pytrees of carry and y.

    Raises:
        Unfusable: `lax.scan` has to run the body as it is, or to say what is wrong with it.
    """
    program = traced(step, carry, xs)
    carry_tree, y_tree = program.out_tree.children()
    size = carry_tree.num_leaves
    carry_in, x = program.invars[:size], program.invars[size:]
    carry_out, y = program.outvars[:size], program.outvars[size:]
    on_carry = jaxprs.depending(program.equations, carry_in)
    on_x = jaxprs.depending(program.equations, x)
    rest = [e for e in program.equations if on_carry.intersection(e.outvars)]
    early = [e for e in program.equations if not on_carry.intersection(e.outvars)]
    always = [e for e in early if not on_x.intersection(e.outvars)]
    early = [e for e in early if on_x.intersection(e.outvars)]
    core = jaxprs.needed_for(rest, carry_out)
    inner = {id(e) for e in core}
    late = [e for e in rest if id(e) not in inner]
    before = {*x, *made(early)}
    core = [*widening(early, jaxprs.used(core, carry_out)), *core]
    core = [*cutting(early, jaxprs.used(core, carry_out) - made(core)), *core]
    late = [*widening(core, jaxprs.used(late, y) - before), *late]
    in_core = jaxprs.used(core, carry_out) - made(core)
    in_late = jaxprs.used(late, y) - made(late)
    inside = {*carry_in, *made(core)} - before
    order = [*program.invars, *(v for e in program.equations for v in e.outvars)]
    return Split(
        carry_in,
        carry_out,
        x,
        y,
        program.constants,
        always,
        early,
        core,
        late,
        to_core=[v for v in order if v in before & in_core],
        to_late=[v for v in order if v in before & in_late],
        out_of_core=[v for v in order if v in inside & in_late],
    ), (carry_tree, y_tree)


def traced(step: Callable[..., Any], carry: Any, xs: Any) -> jaxprs.Program:
    """Trace the body of a loop, and check that its equations say all there is to it."""
    if any(not len(x) for x in jax.tree.leaves(xs)):
        raise Unfusable("there are no steps")
    first = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[0], x), xs)
    size = len(jax.tree.leaves(carry))
    depends = [True] * size + [False] * len(jax.tree.leaves(xs))
    program = jaxprs.trace(step, carry, first, depends=depends)
    same = program.out_tree.children()[0] == jax.tree.structure(carry)
    if not same or types(program.outvars[:size]) != types(program.invars[:size]):
        raise Unfusable("a step changes the type of what it carries")
    if any(e.effects for e in program.equations):
        raise Unfusable("a step has effects beside its results, such as printing")
    return program


def types(variables: Sequence[Any]) -> list[Any]:
    """Return shapes and types of variables or literals."""
    return [(v.aval.shape, v.aval.dtype) for v in variables]


def made(equations: Iterable[Any]) -> set[Any]:
    """Return the variables that equations compute."""
    return {v for e in equations for v in e.outvars}


def widening(equations: Sequence[Any], variables: set[Any]) -> list[Any]:
    """Return the last equations behind variables that only make more bytes of the same numbers.

    Whoever reads the variables computes these again. So an image that is true or false for each
    pixel crosses from one part of the loop to another as such, and not as floats.
    """
    maker = {v: e for e in equations for v in e.outvars}
    repeated: dict[int, Any] = {}
    for variable in variables:
        chain, best, narrowest = [], 0, variable
        at = variable
        while not jaxprs.is_literal(at) and at in maker and is_widening(maker[at]):
            chain.append(maker[at])
            at = maker[at].invars[0]
            if not jaxprs.is_literal(at) and size_of(at) < size_of(narrowest):
                best, narrowest = len(chain), at
        repeated.update((id(e), e) for e in chain[:best])
    return [e for e in equations if id(e) in repeated]


def cutting(equations: Sequence[Any], variables: set[Any]) -> list[Any]:
    """Return the equations that cut an array into parts if all of these are among the variables.

    Whoever reads the parts cuts the array itself. So it crosses as one, and not as many that a GPU
    has to write one by one.
    """
    maker = {v: e for e in equations for v in e.outvars}
    parts: dict[Any, list[Any]] = {}
    behind: dict[Any, list[Any]] = {}
    for variable in variables:
        at = variable
        while at in maker and is_cutting(maker[at]):
            behind.setdefault(variable, []).append(maker[at])
            at = maker[at].invars[0]
        parts.setdefault(at, []).append(variable)
    whole = [
        pieces
        for source, pieces in parts.items()
        if len(pieces) > 1 and sum(v.aval.size for v in pieces) == source.aval.size
    ]
    repeated = {id(e) for pieces in whole for v in pieces for e in behind.get(v, [])}
    return [e for e in equations if id(e) in repeated]


def is_cutting(equation: Any) -> bool:
    """Return whether an equation takes a part of an array and leaves its first axis as it is."""
    if equation.primitive.name not in CUTTING or jaxprs.is_literal(equation.invars[0]):
        return False
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return bool(before[:1] == after[:1])


def is_widening(equation: Any) -> bool:
    """Return whether an equation writes the numbers of its only operand in another form."""
    return equation.primitive.name in WIDENING and len(equation.invars) == 1


def size_of(variable: Any) -> int:
    """Return the bytes of a variable; a random key has as many as two words."""
    aval = variable.aval
    extended = jnp.issubdtype(aval.dtype, jax.dtypes.extended)
    return aval.size * (8 if extended else aval.dtype.itemsize)


def run(split: Split, carry: list[Any], xs: list[Any], fast: bool | None) -> tuple[Any, Any]:
    """Run a sorted loop -> leaves of the last carry, and of y.

    Args:
        split: the loop's body.
        carry: leaves of the first carry.
        xs: leaves [T, ...].
        fast: how the kernel computes; None: no kernel.
    """
    base = dict(split.constants)
    jaxprs.run(split.always, base)
    wanted = [*split.to_core, *(v for v in split.to_late if v not in split.to_core)]

    def before(xs: list[Any]) -> list[Any]:
        values = {**base, **dict(zip(split.x, xs, strict=True))}
        jaxprs.run(split.early, values)
        return [values[v] for v in wanted]

    def after(inside: list[Any], early: list[Any]) -> list[Any]:
        values = {**base, **dict(zip(split.out_of_core, inside, strict=True))}
        values.update(zip(split.to_late, early, strict=True))
        jaxprs.run(split.late, values)
        return [jaxprs.read(values, v) for v in split.y]

    length = len(xs[0])
    early = dict(zip(wanted, jax.vmap(before)(xs), strict=True))
    to_core = [early[v] for v in split.to_core]
    if fast is None:
        last, inside = in_scan(split, base, carry, to_core, length)
    else:
        last, inside = in_kernel(split, base, carry, to_core, length, fast)
    to_late = [early[v] for v in split.to_late]
    return last, jax.vmap(after, axis_size=length)(inside, to_late)


def in_scan(
    split: Split, base: jaxprs.Values, carry: list[Any], xs: list[Any], length: int
) -> tuple[list[Any], list[Any]]:
    """Run the core with `lax.scan` -> the last carry, what leaves the core [T, ...]."""

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        values = {**base, **dict(zip(split.carry_in, carry, strict=True))}
        values.update(zip(split.to_core, xs, strict=True))
        jaxprs.run(split.core, values)
        following = [jaxprs.read(values, v) for v in split.carry_out]
        return following, [values[v] for v in split.out_of_core]

    return lax.scan(step, carry, xs, length=length, unroll=UNROLL_ON_GPU)


def in_kernel(
    split: Split, base: jaxprs.Values, carry: list[Any], xs: list[Any], length: int, fast: bool
) -> tuple[list[Any], list[Any]]:
    """Run the core in one kernel -> the last carry, what leaves the core [T, ...]."""
    from purejaxpg.fused import time_kernel

    return time_kernel.run(split, base, carry, xs, length, fast)
