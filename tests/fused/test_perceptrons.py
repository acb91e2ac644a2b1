"""Networks found in the equations of a loss."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from purejaxpg.fused import jaxprs, perceptrons

pytestmark = pytest.mark.fast

ROWS = 8


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def layers(*sizes: int) -> list[tuple[Any, Any]]:
    return [(shape(a, b), shape(b)) for a, b in itertools.pairwise(sizes)]


def forward(params: Any, x: Any, activation: Callable[[Any], Any] = jnp.tanh) -> Any:
    for weight, bias in params[:-1]:
        x = activation(x @ weight + bias)
    return x @ params[-1][0] + params[-1][1]


def found(loss: Any, params: Any, x: Any = None) -> Any:
    """Return the networks of a loss, and the names of the primitives of its head."""
    program = jaxprs.trace(loss, params, shape(ROWS, 3) if x is None else x, rules=True)
    parameters = program.invars[: len(jax.tree.leaves(params))]
    networks, equations = perceptrons.find(program, parameters)
    return networks, [equation.primitive.name for equation in equations]


def sizes(network: perceptrons.Perceptron) -> list[int]:
    return [network.layers[0].inputs, *(layer.outputs for layer in network.layers)]


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_a_network_is_found_and_the_head_is_the_rest(name: str) -> None:
    activation = {"tanh": jnp.tanh, "relu": jax.nn.relu}[name]
    (network,), head = found(lambda p, x: forward(p, x, activation).mean(), layers(3, 16, 16, 2))
    assert sizes(network) == [3, 16, 16, 2]
    assert network.activations == (name, name)
    assert network.parameters == [0, 1, 2, 3, 4, 5]
    assert "dot_general" not in head
    assert "reduce_sum" in head


def test_networks_may_differ_in_depth_and_input() -> None:
    def loss(params: Any, x: Any) -> Any:
        first, second = params
        return forward(first, x).mean() * forward(second, jnp.concatenate([x, x**2], 1)).mean()

    networks, head = found(loss, [layers(3, 16, 2), layers(6, 4)])
    assert sorted(map(sizes, networks)) == [[3, 16, 2], [6, 4]]
    assert "concatenate" in head


def test_a_hidden_layer_that_the_loss_reads_is_an_output() -> None:
    def loss(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params[0][0] + params[0][1])
        return forward(params[1:], hidden).mean() + hidden.mean()

    (network,), head = found(loss, layers(3, 16, 2))
    assert sizes(network) == [3, 16]
    assert "dot_general" in head  # and then its weight is used outside of a network


def test_a_product_without_a_bias_is_no_layer() -> None:
    networks, head = found(lambda p, x: jnp.tanh(x @ p).mean(), shape(3, 16))
    assert networks == []
    assert "dot_general" in head


def test_what_derives_like_something_else_is_no_relu() -> None:
    @jax.custom_jvp
    def straight_through(x: jax.Array) -> jax.Array:
        return jnp.maximum(x, 0.0)

    straight_through.defjvp(lambda x, changes: (jnp.maximum(x[0], 0.0), changes[0]))
    (network,), _ = found(lambda p, x: forward(p, x, straight_through).mean(), layers(3, 16, 2))
    assert sizes(network) == [3, 16]


def test_networks_may_share_parameters() -> None:
    networks, _ = found(lambda p, x: (forward(p, x) * forward(p, x + 1.0)).mean(), layers(3, 16, 2))
    assert [sizes(network) for network in networks] == [[3, 16, 2]] * 2
    assert networks[0].parameters == networks[1].parameters
