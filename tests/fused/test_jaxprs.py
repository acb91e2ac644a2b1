import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg.fused import jaxprs

X = np.linspace(-2.0, 2.0, 5, dtype=np.float32)
CALLS = {*jaxprs.CALLS, *jaxprs.RULES}


@jax.jit
def scaled(x):
    return x * jnp.where(x > 0, 2.0, 0.5)  # `where` is a call of its own


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda x, t: (doubled(*x), 7 * t[0]))


@jax.custom_vjp
def halved(x):
    return x / 2


halved.defvjp(lambda x: (x / 2, None), lambda _, g: (9 * g,))


def names(program):
    return [equation.primitive.name for equation in program.equations]


def computed(program, *args):
    values = {**program.constants, **dict(zip(program.invars, args, strict=True))}
    jaxprs.run(program.equations, values)
    return program.outputs(values)


@pytest.mark.parametrize(
    "function",
    [
        scaled,
        jax.nn.relu,
        jax.nn.gelu,
        doubled,
        halved,
        lambda x: {"a": (x, 3.0), "b": x[1:] + X[1:]},
    ],
    ids=["jit", "relu", "gelu", "jvp", "vjp", "tree"],
)
def test_a_traced_function_has_no_calls_and_the_same_results(function):
    program = jaxprs.trace(function, X)
    assert not CALLS.intersection(names(program))
    jax.tree.map(np.testing.assert_array_equal, computed(program, X), function(X))


def test_calls_of_constants_are_inlined_too():
    assert "jit" not in names(jaxprs.trace(lambda x: x + scaled(X).sum(), X))


def test_calls_stay_where_nothing_marked_reaches_them():
    def function(x, y):
        return scaled(x) + scaled(y)

    both = jaxprs.trace(function, X, X, depends=[True, True])
    first = jaxprs.trace(function, X, X, depends=[True, False])
    assert names(both).count("jit") == 0
    assert names(first).count("jit") == 1
    assert (
        names(jaxprs.trace(lambda x, y: scaled(scaled(x) * y), X, X, depends=[False, True])).count(
            "jit"
        )
        == 1
    )
    np.testing.assert_array_equal(computed(first, X, X), function(X, X))


@pytest.mark.parametrize(("function", "slope"), [(doubled, 7.0), (halved, 9.0)])
def test_own_derivatives_are_kept_if_asked(function, slope):
    kept = jaxprs.trace(lambda x: function(x).sum(), X, rules=True)
    assert float(jax.grad(lambda x: computed(kept, x))(jnp.asarray(X))[0]) == slope
    inlined = jaxprs.trace(lambda x: function(x).sum(), X)
    assert float(jax.grad(lambda x: computed(inlined, x))(jnp.asarray(X))[0]) != slope


def test_random_numbers_are_those_of_the_function():
    function = lambda key: random.normal(random.split(key)[0], (3,))  # noqa: E731
    key = random.key(0)
    np.testing.assert_array_equal(computed(jaxprs.trace(function, key), key), function(key))


def test_equations_are_sorted_by_what_they_need_and_reach():
    def function(x, y):
        return jnp.sin(x) + jnp.cos(x), jnp.exp(y), jnp.tan(x)

    program = jaxprs.trace(function, X, X)
    kept = jaxprs.needed_for(program.equations, program.outvars[:1])
    assert [equation.primitive.name for equation in kept] == ["sin", "cos", "add"]
    assert jaxprs.needed_for(program.equations, program.invars) == []
    reached = jaxprs.depending(program.equations, program.invars[1:])
    assert reached == {program.invars[1], program.outvars[1]}


def test_results_without_a_use_are_computed_and_literals_are_no_variables():
    def function(x):
        largest, _ = jax.lax.top_k(x, 2)  # one of two results
        return largest + 1.0, 3

    program = jaxprs.trace(function, X)
    largest, three = computed(program, X)
    np.testing.assert_array_equal(largest, [3.0, 2.0])
    assert three == 3
    assert jaxprs.used(program.equations, program.outvars) == {
        *program.invars,
        *(v for v in program.outvars if not jaxprs.is_literal(v)),
        program.equations[0].outvars[0],
    }
