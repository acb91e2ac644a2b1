"""Programs as data: trace a function, inline its calls, and sort the equations of a loop's body.

A jaxpr is jax's list of the equations that a function computes. `purejaxpg.fused` reads it to find
out what a kernel has to do, so that a function that changes needs no kernel of its own.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

Values = dict[Any, Any]  # variable -> value

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
RULES = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


@dataclasses.dataclass(frozen=True)
class Program:
    """What a function computes: equations without calls, and the values that it closes over."""

    invars: list[Any]
    outvars: list[Any]
    equations: list[Any]
    constants: Values
    out_tree: Any

    def outputs(self, values: Values) -> Any:
        """Return the function's result, given the values of all variables."""
        return jax.tree.unflatten(self.out_tree, [read(values, v) for v in self.outvars])


def trace(
    function: Callable[..., Any],
    *args: Any,
    depends: Sequence[bool] | None = None,
    rules: bool = False,
) -> Program:
    """Trace a function and inline its calls.

    Args:
        function: pytrees -> pytree.
        args: its arguments, arrays or `jax.ShapeDtypeStruct`.
        depends: for each leaf of `args`, whether calls that depend on it are inlined (all). Other
            calls stay calls, so that they are compiled once.
        rules: keep functions with a derivative of their own, so that the program can be
            differentiated.
    """
    leaves, in_tree = jax.tree.flatten(args)
    flags = None if depends is None else list(depends)
    out_trees = []

    def flat(*leaves: Any) -> list[Any]:
        outputs, out_tree = jax.tree.flatten(function(*jax.tree.unflatten(in_tree, leaves)))
        out_trees.append(out_tree)
        return outputs

    called = jax.make_jaxpr(flat)(*leaves)
    inlined = jax.make_jaxpr(lambda *leaves: _inline(called, leaves, flags, rules)[0])(*leaves)
    jaxpr = inlined.jaxpr
    constants = dict(zip(jaxpr.constvars, inlined.consts, strict=True))
    return Program(jaxpr.invars, jaxpr.outvars, list(jaxpr.eqns), constants, out_trees[0])


def _inline(
    closed: Any, args: Sequence[Any], flags: Sequence[bool] | None, rules: bool
) -> tuple[list[Any], list[bool]]:
    """Evaluate a jaxpr with its calls inlined -> outputs, and whether each depends on a flag.

    Without flags, all calls are inlined, also those of constants alone.
    """
    jaxpr = closed.jaxpr
    inputs = [*jaxpr.constvars, *jaxpr.invars]
    values: Values = dict(zip(inputs, [*closed.consts, *args], strict=True))
    flagged = zip(jaxpr.invars, flags or (), strict=flags is not None)
    marked = {v for v, flag in flagged if flag}
    calls = CALLS if rules else {**CALLS, **RULES}
    for equation in jaxpr.eqns:
        operands = [read(values, v) for v in equation.invars]
        depends = [not is_literal(v) and v in marked for v in equation.invars]
        body = equation.params.get(calls.get(equation.primitive.name, ""))
        if body is not None and (flags is None or any(depends)):
            results, depend = _inline(body, operands, flags and depends, rules)
        else:
            results = bind(equation, operands)
            depend = [any(depends)] * len(results)
        values.update(zip(equation.outvars, results, strict=True))
        marked.update(v for v, flag in zip(equation.outvars, depend, strict=True) if flag)
    return (
        [read(values, v) for v in jaxpr.outvars],
        [not is_literal(v) and v in marked for v in jaxpr.outvars],
    )


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Compute one equation -> its results."""
    parameters = equation.primitive.get_bind_params(equation.params)
    results = equation.primitive.bind(*operands, **parameters)
    return list(results) if equation.primitive.multiple_results else [results]


def run(equations: Iterable[Any], values: Values) -> None:
    """Compute equations in order, and add their results to `values`."""
    for equation in equations:
        results = bind(equation, [read(values, v) for v in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))


def read(values: Values, variable: Any) -> Any:
    """Return the value of a variable or of a literal."""
    return variable.val if is_literal(variable) else values[variable]


def is_literal(variable: Any) -> bool:
    """Return whether an operand is a number in the program's text."""
    return isinstance(variable, core.Literal)


def used(equations: Iterable[Any], also: Iterable[Any] = ()) -> set[Any]:
    """Return the variables that equations read, and those in `also`; literals are none."""
    operands = [v for equation in equations for v in equation.invars]
    return {v for v in [*operands, *also] if not is_literal(v)}


def needed_for(equations: Sequence[Any], outputs: Iterable[Any]) -> list[Any]:
    """Return the equations, in their order, that `outputs` depend on."""
    wanted, kept = {v for v in outputs if not is_literal(v)}, []
    for equation in reversed(equations):
        if wanted.intersection(equation.outvars):
            kept.append(equation)
            wanted.update(used([equation]))
    return kept[::-1]


def depending(equations: Iterable[Any], variables: Iterable[Any]) -> set[Any]:
    """Return `variables` and all variables computed from them."""
    reached = set(variables)
    for equation in equations:
        if reached & used([equation]):
            reached.update(equation.outvars)
    return reached
