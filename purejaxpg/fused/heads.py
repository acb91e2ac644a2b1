"""The head of a loss: from the outputs of its networks to their gradients, as equations.

    loss, metrics = head(outputs, free parameters, minibatch)

is differentiated with `jax.vjp` and traced. Of the equations found, those that depend on the
minibatch alone are computed before the gradient steps, for all minibatches at once. The others are
the kernel's.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from purejaxpg.fused import jaxprs, paths, perceptrons

MAX_NUMBERS = 64  # of a row, a minibatch or a parameter, that the loss may read


@dataclasses.dataclass(frozen=True)
class Before:
    """What is computed of a minibatch before the gradient steps."""

    equations: list[Any]
    rows: list[Any]  # variables of the minibatch's leaves
    constants: jaxprs.Values
    columns: list[Any]  # variables that the kernel reads
    inputs: list[Any]  # variables or literals that the networks read
    metrics: dict[str, Any]  # variables or literals that no parameter reaches

    def run(self, minibatch: Any) -> tuple[list[Any], list[Any], dict[str, Any]]:
        """Return columns, inputs of the networks and metrics of a minibatch."""
        leaves = jax.tree.leaves(minibatch)
        values = {**self.constants, **dict(zip(self.rows, leaves, strict=True))}
        jaxprs.run(self.equations, values)
        columns = [jaxprs.read(values, v) for v in self.columns]
        inputs = [jaxprs.read(values, v) for v in self.inputs]
        return columns, inputs, {name: jaxprs.read(values, v) for name, v in self.metrics.items()}


@dataclasses.dataclass(frozen=True)
class Head:
    """Equations from outputs and free parameters to gradients, metrics and the sign to stop."""

    networks: list[perceptrons.Perceptron]
    before: Before
    outputs: list[Any]  # variables of the networks' outputs
    free: list[int]  # parameters that are in no layer, such as log_std
    free_values: list[Any]  # their variables
    equations: list[Any]  # the kernel's
    constants: jaxprs.Values  # what these close over
    output_gradients: list[Any]  # variables or literals, as all below
    free_gradients: list[Any]
    stop: list[Any]  # empty if there is no early stop
    metrics: dict[str, Any]
    inside: list[str]  # the metrics that the kernel computes


def make(
    loss: Callable[..., Any],
    stop: Callable[..., Any] | None,
    params: Any,
    minibatch: Any,
) -> Head:
    """Trace a loss and split it into networks, what comes before them, and the kernel's equations.

    Args:
        loss: (params, minibatch) -> scalar, {name: scalar}.
        stop: metrics -> bool scalar, or None.
        params: pytree of arrays or shapes.
        minibatch: pytree of shapes [R, ...].

    Returns:
        The head.

    Raises:
        Unfusable: kernels cannot compute this loss.
    """
    program = jaxprs.trace(loss, params, minibatch, rules=True)
    count = len(jax.tree.leaves(params))
    parameters, rows = program.invars[:count], program.invars[count:]
    found, equations = perceptrons.find(program, parameters)
    networks, again = _merged(found)
    layers = [i for network in networks for i in network.parameters]
    if len(set(layers)) < len(layers):
        raise paths.Unfusable("two networks of the loss share a parameter")
    free = outside(parameters, equations, program.outvars)
    for i in free:
        if i in layers or parameters[i].aval.size > MAX_NUMBERS:
            raise OutsideError(i)
    if not networks:
        raise paths.Unfusable("the loss has no multilayer perceptron that kernels know")
    free_values = [parameters[i] for i in free]
    whole = _Whole(program, equations, networks, again, free_values, rows, stop)
    outputs = [network.outputs for network in networks]
    shapes = [_shapes(variables) for variables in (outputs, free_values, rows)]
    return _split(jaxprs.trace(whole.gradients, *shapes), networks, free)


def _merged(
    found: Sequence[perceptrons.Perceptron],
) -> tuple[list[perceptrons.Perceptron], jaxprs.Values]:
    """Merge networks that a loss applies twice to the same inputs.

    Returns:
        The networks, and for each variable of the outputs of a repetition that of the original.
    """
    first: dict[Any, perceptrons.Perceptron] = {}
    again = {}
    for network in found:
        key = network.inputs, network.layers, network.activations
        original = first.setdefault(key, network)
        if original is not network:
            again[network.outputs] = original.outputs
    return list(first.values()), again


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A head before it is split."""

    program: jaxprs.Program  # of the loss
    equations: list[Any]
    networks: list[perceptrons.Perceptron]
    again: jaxprs.Values  # variables of repeated networks' outputs -> of the original's
    free: list[Any]
    rows: list[Any]
    stop: Callable[..., Any] | None

    def gradients(self, outputs: list[Any], free: list[Any], leaves: list[Any]) -> Any:
        """Return the gradients, the sign to stop, the metrics and the networks' inputs."""
        known = {**self.program.constants, **dict(zip(self.rows, leaves, strict=True))}
        head = functools.partial(self.evaluated, known)
        value, pull, (metrics, inputs) = jax.vjp(head, outputs, free, has_aux=True)
        of_outputs, of_free = pull(jnp.ones_like(value))
        stop = [] if self.stop is None else [self.stop(metrics)]
        return of_outputs, of_free, stop, metrics, inputs

    def evaluated(self, known: jaxprs.Values, outputs: list[Any], free: list[Any]) -> Any:
        """Return the loss, and beside it the metrics and the networks' inputs."""
        variables = [*(network.outputs for network in self.networks), *self.free]
        values = {**known, **dict(zip(variables, [*outputs, *free], strict=True))}
        values.update({v: values[original] for v, original in self.again.items()})
        jaxprs.run(self.equations, values)
        value, metrics = self.program.outputs(values)
        return value, (metrics, [values[network.inputs] for network in self.networks])


def outside(
    parameters: Sequence[Any], equations: Sequence[Any], results: Sequence[Any]
) -> list[int]:
    """Return which parameters are used outside of the networks, in the order of the equations."""
    places = {v: i for i, v in enumerate(parameters)}
    read = [v for equation in equations for v in equation.invars if not jaxprs.is_literal(v)]
    return list(dict.fromkeys(places[v] for v in [*read, *jaxprs.used([], results)] if v in places))


class OutsideError(paths.Unfusable):
    """The loss uses a parameter outside of a multilayer perceptron."""

    def __init__(self, leaf: int) -> None:
        super().__init__("the loss uses a parameter outside of a multilayer perceptron")
        self.leaf = leaf  # which, for the caller knows its name


def outside_reason(params: Any, leaf: int, config: Any) -> str:
    """Return why a parameter is used outside of a multilayer perceptron."""
    activation = getattr(config, "activation", "tanh")
    if activation not in perceptrons.KNOWN:
        return f"an activation is {activation}, and kernels know tanh and relu"
    path = jax.tree_util.tree_flatten_with_path(params)[0][leaf][0]
    keys = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    name = "/".join(key for key in keys if key != "params")
    return f"the parameter {name} is used outside of a multilayer perceptron"


def _split(
    program: jaxprs.Program, networks: list[perceptrons.Perceptron], free: list[int]
) -> Head:
    """Split the equations of the gradient by what they depend on."""
    count = len(networks) + len(free)
    moving, rows = program.invars[:count], program.invars[count:]
    results = jax.tree.unflatten(program.out_tree, program.outvars)
    of_outputs, of_free, stop, metrics, inputs = results
    reached = jaxprs.depending(program.equations, moving)
    inside = [name for name, v in metrics.items() if not jaxprs.is_literal(v) and v in reached]
    wanted = [*of_outputs, *of_free, *stop, *(metrics[name] for name in inside)]
    columns = _columns(program, jaxprs.depending(program.equations, rows) - reached, wanted)
    late = [e for e in program.equations if not set(columns).intersection(e.outvars)]
    equations = jaxprs.needed_for(late, wanted)
    read = jaxprs.used(equations, wanted)
    outside = {name: v for name, v in metrics.items() if name not in inside}
    early = [e for e in program.equations if not reached.intersection(e.outvars)]
    early = jaxprs.needed_for(early, [*columns, *inputs, *outside.values()])
    return Head(
        networks=networks,
        before=Before(early, rows, program.constants, columns, inputs, outside),
        outputs=moving[: len(networks)],
        free=free,
        free_values=moving[len(networks) :],
        equations=equations,
        constants={v: x for v, x in program.constants.items() if v in read},
        output_gradients=of_outputs,
        free_gradients=of_free,
        stop=stop,
        metrics=metrics,
        inside=inside,
    )


# What costs the kernel less to compute than to load: arithmetic, comparisons, other shapes.
CHEAP = {
    *("add", "sub", "mul", "neg", "abs", "max", "min", "clamp", "square", "select_n"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "convert_element_type"),
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "iota", "stop_gradient", "copy"),
}


def _columns(program: jaxprs.Program, on_rows: set[Any], wanted: Sequence[Any]) -> list[Any]:
    """Return the variables at which the kernel begins.

    They are what it reads of all that can be computed before, except that a variable gives way to
    what it is made of, if that is not more numbers: to an action rather than its one-hot code.

    Args:
        program: the gradient's.
        on_rows: its variables that depend on the minibatch alone.
        wanted: what the kernel computes.
    """
    makers = {v: e for e in program.equations for v in e.outvars}
    late = [e for e in program.equations if not on_rows.intersection(e.outvars)]
    read = jaxprs.used(jaxprs.needed_for(late, wanted), wanted)
    order = [v for v in [*program.invars, *makers] if v in on_rows]
    kept = {v for v in order if v in read}
    for variable in [v for v in reversed(order) if v in kept]:
        others = kept - {variable}
        sources = _sources(variable, makers, on_rows, others)
        if sum(v.aval.size for v in sources) <= variable.aval.size:
            kept = others | sources
    return [v for v in order if v in kept]


def _sources(variable: Any, makers: Any, on_rows: set[Any], known: set[Any]) -> set[Any]:
    """Return what a variable is made of by cheap equations, without what is known."""
    if variable not in makers or makers[variable].primitive.name not in CHEAP:
        return {variable}
    operands = jaxprs.used([makers[variable]]) & on_rows - known
    return set().union(*(_sources(v, makers, on_rows, known) for v in operands))


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
