"""A loss split into what comes before its networks and what comes after them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.fused import heads, paths

pytestmark = pytest.mark.fast

ROWS = 8
PARAMS = {"w": jnp.full((3, 2), 0.5), "b": jnp.zeros(2), "scale": jnp.full(2, 2.0)}
SHAPES = {
    "x": jax.ShapeDtypeStruct((ROWS, 3), jnp.float32),
    "weight": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
}


def loss(params: Any, data: Any, factor: Any = 3.0) -> Any:
    y = (data["x"] @ params["w"] + params["b"]) * jnp.exp(params["scale"])
    weight = data["weight"] / data["weight"].sum()
    metrics = {"y": y.mean(), "weight": data["weight"].mean(), "factor": factor}
    return factor * (jnp.square(y).sum(-1) * weight).sum(), jax.tree.map(jnp.asarray, metrics)


def test_what_depends_on_the_minibatch_alone_is_computed_before() -> None:
    head = heads.make(loss, None, PARAMS, SHAPES)
    assert {equation.primitive.name for equation in head.before.equations} >= {"div", "reduce_sum"}
    assert [v.aval.shape for v in head.before.columns] == [(ROWS,)]
    assert head.inside == ["y"]
    data = {"x": jnp.ones((ROWS, 3)), "weight": jnp.arange(1.0, 1.0 + ROWS)}
    (weight,), (x,), metrics = head.before.run(data)
    np.testing.assert_allclose(weight, data["weight"] / 36.0, rtol=1e-6)
    np.testing.assert_array_equal(x, data["x"])
    assert {name: float(value) for name, value in metrics.items()} == {"weight": 4.5, "factor": 3.0}


def test_the_kernel_reads_the_fewest_numbers_that_it_can_begin_with() -> None:
    def chosen(params: Any, data: Any) -> Any:
        y = data["x"] @ params["w"] + params["b"]
        one_hot = jax.nn.one_hot(data["action"], 2)
        twice = 2.0 * data["weight"]
        return (jnp.square(y) * one_hot).sum(-1) @ (twice / twice.sum()), {}

    data = {**SHAPES, "action": jax.ShapeDtypeStruct((ROWS,), jnp.int32)}
    head = heads.make(chosen, None, PARAMS, data)
    integer, weight = head.before.columns
    assert integer in head.before.rows  # the action itself
    assert (integer.aval.shape, integer.aval.dtype) == ((ROWS,), jnp.int32)
    assert weight.aval.shape == (ROWS,)
    assert weight not in head.before.rows  # divided by its sum before


def test_parameters_outside_of_layers_are_free_if_they_are_small() -> None:
    head = heads.make(loss, None, PARAMS, SHAPES)
    names = sorted(PARAMS)
    assert [names[i] for i in head.free] == ["scale"]
    assert [v.aval.shape for v in head.free_values] == [(2,)]


def test_what_a_loss_closes_over_is_a_constant() -> None:
    def constants(factor: jax.Array) -> jax.Array:
        head = heads.make(lambda p, data: loss(p, data, factor), None, PARAMS, SHAPES)
        (value,) = head.constants.values()
        return value

    assert jax.vmap(constants)(jnp.array([1.0, 2.0])).tolist() == [1.0, 2.0]


def test_a_layer_that_is_also_used_by_itself_is_refused() -> None:
    def decayed(params: Any, data: Any) -> Any:
        value, metrics = loss(params, data)
        return value + jnp.square(params["w"]).sum(), metrics

    with pytest.raises(paths.Unfusable, match="outside of a multilayer perceptron") as caught:
        heads.make(decayed, None, PARAMS, SHAPES)
    assert isinstance(caught.value, heads.OutsideError)
    assert sorted(PARAMS)[caught.value.leaf] == "w"


def test_networks_that_share_a_parameter_are_refused() -> None:
    def twice(params: Any, data: Any) -> Any:
        value, metrics = loss(params, data)
        again, _ = loss(params, {**data, "x": data["x"] + 1.0})
        return value + again, metrics

    with pytest.raises(paths.Unfusable, match="two networks of the loss share a parameter"):
        heads.make(twice, None, PARAMS, SHAPES)
