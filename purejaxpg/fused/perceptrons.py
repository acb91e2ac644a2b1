"""Find the multilayer perceptrons in a loss's program.

A perceptron is a chain of equations, x -> product with a parameter -> plus a bias -> activation ->
product -> ... -> plus a bias, whose x no parameter reaches. The rest of the program, from the
networks' outputs to the loss, is its *head*. Only names of primitives and shapes are looked at, so
a network may be written with flax or by hand.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from purejaxpg.fused import jaxprs

KNOWN = ("tanh", "relu")
MATRIX_PRODUCT = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Layer:
    """x W + b."""

    weight: int  # which parameter W [D, H] is
    bias: int  # which parameter b [H] is
    inputs: int  # D
    outputs: int  # H


@dataclasses.dataclass(frozen=True)
class Perceptron:
    """Layers with an activation between them; the last one is linear."""

    inputs: Any  # variable of x [R, D]
    layers: tuple[Layer, ...]
    activations: tuple[str, ...]  # after each layer but the last, "tanh" or "relu"
    outputs: Any  # variable of y [R, A]

    @property
    def parameters(self) -> list[int]:
        """Return which parameters the layers are."""
        return [i for layer in self.layers for i in (layer.weight, layer.bias)]


def find(program: jaxprs.Program, parameters: Sequence[Any]) -> tuple[list[Perceptron], list[Any]]:
    """Split the program of a loss into networks and a head.

    Args:
        program: what the loss computes, with custom derivatives kept.
        parameters: its variables that are trained.

    Returns:
        The networks, and the other equations that the program's results and the networks' inputs
        depend on.
    """
    search = _Search(program, parameters)
    for equation in search.equations:
        search.visit(equation)
    networks = [n for n in search.networks.values() if not search.is_hidden(n.outputs)]
    made = {n.outputs for n in networks}
    rest = [e for e in search.equations if not made & set(e.outvars)]
    wanted = [*program.outvars, *(n.inputs for n in networks)]
    return networks, jaxprs.needed_for(rest, wanted)


class _Search:
    """The state of `find`: the networks as far as the equations have been read."""

    def __init__(self, program: jaxprs.Program, parameters: Sequence[Any]) -> None:
        self.equations = jaxprs.needed_for(program.equations, program.outvars)
        self.parameters = {v: i for i, v in enumerate(parameters)}
        self.reached = jaxprs.depending(self.equations, parameters)
        self.makers = {v: e for e in self.equations for v in e.outvars}
        self.readers = _readers(self.equations)
        self.results = {v for v in program.outvars if not jaxprs.is_literal(v)}
        self.networks: dict[Any, Perceptron] = {}  # by the variable of its outputs so far

    def visit(self, equation: Any) -> None:
        """Begin a network, or add a layer to one, if the equation is a product with a weight."""
        if not self._is_product(equation):
            return
        x, weight = equation.invars
        layer, outputs = self._biased(weight, equation.outvars[0])
        before = self._before(x)
        if layer is None or (before is None and x in self.reached):
            return
        if before is None:
            self.networks[outputs] = Perceptron(x, (layer,), (), outputs)
            return
        activations = (*before.activations, activation(self.makers[x]))
        layers = (*before.layers, layer)
        self.networks[outputs] = Perceptron(before.inputs, layers, activations, outputs)

    def is_hidden(self, variable: Any) -> bool:
        """Return whether a layer's output only feeds activations that only feed other layers."""
        readers = self.readers.get(variable, [])
        if variable in self.results or not readers:
            return False
        return all(activation(e) in KNOWN and self._feeds_layers(e.outvars[0]) for e in readers)

    def _feeds_layers(self, variable: Any) -> bool:
        readers = self.readers.get(variable, [])
        products = [e for e in readers if self._is_product(e) and e.invars[0] is variable]
        return variable not in self.results and len(products) == len(readers) > 0

    def _before(self, x: Any) -> Perceptron | None:
        """Return the network whose hidden layer x is."""
        maker = self.makers.get(x)
        if maker is None or activation(maker) not in KNOWN:
            return None
        source = maker.invars[0]
        return self.networks.get(source) if self.is_hidden(source) else None

    def _is_product(self, equation: Any) -> bool:
        if equation.primitive.name != "dot_general":
            return False
        (left, right), batch = equation.params["dimension_numbers"]
        numbers = ((tuple(left), tuple(right)), tuple(map(tuple, batch)))
        x, weight = equation.invars
        return (
            numbers == MATRIX_PRODUCT
            and not jaxprs.is_literal(weight)
            and weight in self.parameters
            and len(x.aval.shape) == len(weight.aval.shape) == 2
            and x is not weight
        )

    def _biased(self, weight: Any, product: Any) -> tuple[Layer | None, Any]:
        """Return the layer of a product to which nothing happens but that a bias is added."""
        readers = self.readers.get(product, [])
        if product in self.results or len(readers) != 1 or readers[0].primitive.name != "add":
            return None, product
        added = [v for v in readers[0].invars if v is not product]
        bias = self._broadcast_parameter(added[0]) if added else None
        if bias is None:
            return None, product
        layer = Layer(self.parameters[weight], self.parameters[bias], *weight.aval.shape)
        return layer, readers[0].outvars[0]

    def _broadcast_parameter(self, variable: Any) -> Any:
        """Return the parameter [H] that a variable [1, H] or [R, H] repeats, or None."""
        while not jaxprs.is_literal(variable) and variable in self.makers:
            maker = self.makers[variable]
            if maker.primitive.name not in ("reshape", "broadcast_in_dim"):
                return None
            if variable.aval.shape[-1:] != maker.invars[0].aval.shape[-1:]:
                return None
            variable = maker.invars[0]
        is_vector = not jaxprs.is_literal(variable) and variable.aval.ndim == 1
        return variable if is_vector and variable in self.parameters else None


def activation(equation: Any) -> str:
    """Return "tanh" or "relu" if that is what an equation computes, else ""."""
    name = equation.primitive.name
    if name != "custom_jvp_call":
        return name if name == "tanh" else ""
    shape = jax.ShapeDtypeStruct(equation.outvars[0].aval.shape, jnp.float32)
    relu = jaxprs.trace(jax.nn.relu, shape, rules=True).equations[0]
    return "relu" if _with_derivative(equation) == _with_derivative(relu) else ""


def _with_derivative(equation: Any) -> str:
    """Return the text of an equation's value and derivative, which decide whether two are equal."""
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]

    def value_and_change(*x: Any) -> Any:
        return jax.jvp(lambda *x: jaxprs.bind(equation, x), x, x)

    return str(jax.make_jaxpr(value_and_change)(*shapes))


def _readers(equations: Iterable[Any]) -> Mapping[Any, list[Any]]:
    readers: dict[Any, list[Any]] = {}
    for equation in equations:
        for variable in jaxprs.used([equation]):
            readers.setdefault(variable, []).append(equation)
    return readers
