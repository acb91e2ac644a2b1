import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.kernels import recurrence

SHAPES = [(1,), (1, 2), (2,), (3, 2), (4,), (33, 2, 3)]  # one row, odd and even numbers of rows


def rows(shape):
    draw = np.random.default_rng(len(shape) + shape[0])
    term, start = draw.normal(size=shape), draw.normal(size=shape[1:])
    decay = np.where(draw.random(shape) < 0.2, 0.0, draw.uniform(0.5, 1.0, shape))
    return term, decay, start


def loop(term, decay, start, reverse):
    out, before = np.zeros_like(term), start
    for t in reversed(range(len(term))) if reverse else range(len(term)):
        out[t] = before = term[t] + decay[t] * before
    return out


def solve(reverse, *inputs):
    """A function of its own for each call, so that jax does not remember another form."""
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs]
    return jax.jit(lambda *given: recurrence.linear(*given, reverse=reverse))(*inputs)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_loop(shape, reverse):
    term, decay, start = rows(shape)
    expected = loop(term, decay, start, reverse)
    np.testing.assert_allclose(solve(reverse, term, decay, start), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_only_the_form_of_a_cpu_has_a_loop(on_gpu, reverse):
    inputs = [jnp.asarray(x, jnp.float32) for x in rows((8, 2))]
    program = jax.make_jaxpr(lambda *given: recurrence.linear(*given, reverse=reverse))(*inputs)
    assert ("scan" in str(program)) is not on_gpu


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("reverse", [False, True])
def test_a_batch_is_each_of_its_members(reverse):
    members = [rows((5, 2)), rows((5, 2)[::1])]
    batch = [jnp.asarray(np.stack(x), jnp.float32) for x in zip(*members, strict=True)]
    batched = jax.vmap(lambda *given: recurrence.linear(*given, reverse=reverse))(*batch)
    for total, member in zip(batched, members, strict=True):
        np.testing.assert_allclose(total, loop(*member, reverse), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_gpu")
def test_gradients_are_those_of_the_sum_written_out():
    """With y_2 = t_2 + d_2 (t_1 + d_1 (t_0 + d_0 s)), in both directions."""
    term, decay, start = (jnp.asarray(x, jnp.float32) for x in rows((3,)))

    def last(term, decay, start):
        return recurrence.linear(term, decay, start)[-1]

    def written_out(t, d, s):
        return t[2] + d[2] * (t[1] + d[1] * (t[0] + d[0] * s))

    gradients = (jax.grad(f, argnums=(0, 1, 2))(term, decay, start) for f in (last, written_out))
    for ours, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("on_gpu")
def test_half_precision_terms_are_summed_in_the_precision_of_the_decay():
    ones = jnp.ones(2049, jnp.float16)  # 2,048 + 1 is 2,048 in half precision
    total = recurrence.linear(ones, jnp.ones(2049, jnp.float32), jnp.zeros((), jnp.float16))
    assert total.dtype == jnp.float32
    assert float(total[-1]) == 2049.0


def test_examples():
    results = doctest.testmod(recurrence)
    assert results.attempted > 0
    assert results.failed == 0
