import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from purejaxpg.fused import jaxprs, lanes
from purejaxpg.fused.paths import Unfusable

COUNTS = (1, 3, 4, 16)
WIDTH = 16
TABLE = np.arange(12, dtype=np.float32).reshape(4, 3) ** 2
DIFFERENT = "an operation mixes the environments"


def junk(dtype):
    """A number for the lanes that mean nothing, which must reach no other lane."""
    return np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max


def on_lanes(x):
    """Make an array [E, ...] vectors."""
    data = np.empty(x.shape[1:], object)
    for i in np.ndindex(*data.shape):
        column = x[(slice(None), *i)]
        filler = np.full(WIDTH - len(x), True if x.dtype == bool else junk(x.dtype), x.dtype)
        data[i] = jnp.asarray(np.concatenate([column, filler]))
    return lanes.Lanes(data, 0)


def as_array(x, count, dtype):
    """Turn a result back into an array."""
    evaluator = lanes.Evaluator(count, WIDTH)
    if isinstance(x, np.ndarray):
        return np.array([np.asarray(y) for y in x.flat], dtype).reshape(x.shape)
    vectors = np.array([np.asarray(evaluator.vector(y, dtype))[:count] for y in x.data.flat], dtype)
    return np.moveaxis(vectors.reshape(*x.data.shape, count), -1, x.axis)


def evaluate(function, *args, shared=(), count=None, reduces=False):
    """Compute a function on lanes: arguments in `shared` are the same for all of them."""
    count = len(args[0]) if count is None else count
    program = jaxprs.trace(function, *map(jnp.asarray, args), *map(jnp.asarray, shared))
    values = {v: lanes.uniform(np.asarray(x)) for v, x in program.constants.items()}
    inputs = [on_lanes(np.asarray(x)) for x in args]
    for x in shared:  # numbers that are not known while tracing
        scalars = [jnp.asarray(y) for y in np.asarray(x).flat]
        inputs.append(lanes.boxed(scalars).reshape(np.shape(x)))
    values.update(zip(program.invars, inputs, strict=True))
    lanes.Evaluator(count, WIDTH, reduces).run(program.equations, values)
    return [as_array(lanes.value(values, v), count, v.aval.dtype) for v in program.outvars]


def compare(function, *args, shared=(), **options):
    """Compare a function on lanes with jax."""
    expected = jax.tree.leaves(function(*map(jnp.asarray, args), *map(jnp.asarray, shared)))
    for got, wanted in zip(
        evaluate(function, *args, shared=shared, **options), expected, strict=True
    ):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def floats(count, *shape, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def integers(count, *shape, low=-3, high=8, seed=1, dtype=np.int32):
    return np.random.default_rng(seed).integers(low, high, (count, *shape)).astype(dtype)


FUNCTIONS = {
    "arithmetic": lambda x: x * 2 + x / 3 - x**2,
    "mathematics": lambda x: jnp.sin(x) + jnp.exp(x) * jnp.tanh(x) + jnp.log1p(jnp.abs(x)),
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "log-sum-exp": lambda x: jnp.logaddexp(x[:, 0], x[:, 1]),
    "log-softmax": jax.nn.log_softmax,
    "clip": lambda x: jnp.clip(x, -0.3, 0.5),
    "where": lambda x: jnp.where(x > 0, x, -1.0),
    "comparison": lambda x: (x > 0) & ~(x[:, :1] < 0.2) | (x == 0),
    "types": lambda x: (x * 3).astype(jnp.int32).astype(jnp.uint8),
    "argmax": lambda x: (x.argmax(1), x.argmin(-1), lax.argmax(x, 1, jnp.uint8)),
    "hyperbolic": lambda x: jnp.sinh(x) + jnp.arctan(x) + jnp.cbrt(x),
    "sums": lambda x: (x.sum(1), x.mean(1, keepdims=True), x.prod(1), x.max(1), x.min(1)),
    "any and all": lambda x: ((x > 0).any(1), (x > -9).all(1)),
    "running": lambda x: (jnp.cumsum(x, 1), jnp.cumprod(x, 1), lax.cummax(x, 1), lax.cummin(x, 1)),
    "running backwards": lambda x: lax.cumsum(x, 1, reverse=True),
    "stack": lambda x: jnp.stack([x[:, 0], x[:, 2] * 2, jnp.ones(len(x))], 1),
    "concatenate": lambda x: jnp.concatenate([x, jnp.zeros((len(x), 2)), x[:, ::-1]], 1),
    "transpose": lambda x: x.T[1:, :],
    "pad": lambda x: lax.pad(x[:, 1:], 7.0, ((0, 0, 0), (1, -1, 1))),
    "reshape": lambda x: (x * jnp.arange(4.0)).reshape(len(x), 2, 2).transpose(1, 0, 2),
    "one-hot": lambda x: jax.nn.one_hot(x.argmax(1), 4),
    "roll": lambda x: jnp.roll(x, 1, axis=1),
    "tile": lambda x: jnp.tile(x[:, None, :2], (1, 2, 1)),
    "different constants": lambda x: x + jnp.arange(len(x), dtype=jnp.float32)[:, None],
    "set": lambda x: x.at[:, 1].set(x[:, 0] * 2),
    "add": lambda x: x.at[:, 1:3].add(1.0),
    "nothing": lambda x: (x[:, :0], jnp.zeros((len(x), 0))),
    "itself": lambda x: (x, x),
}  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_on_lanes_are_those_of_jax(name, count):
    compare(FUNCTIONS[name], floats(count, 4))


TABLES = {
    "minus zero": lambda i, x: 1.0 / jnp.asarray([0.0, -0.0, 0.0, -0.0])[i],
    "row": lambda i, x: jnp.asarray(TABLE)[i],
    "number": lambda i, x: jnp.asarray(TABLE)[i, jnp.abs(i) % 3],
    "clipped": lambda i, x: jnp.asarray(TABLE).at[i].get(mode="clip"),
    "filled": lambda i, x: jnp.asarray(TABLE).at[i].get(mode="fill"),
    "filled with minus one": lambda i, x: jnp.asarray(TABLE).at[i].get(mode="fill", fill_value=-1),
    "integers filled": lambda i, x: jnp.arange(4).at[i].get(mode="fill"),
    "own number": lambda i, x: jax.vmap(lambda i, x: x[i])(i, x),
    "own number, filled": lambda i, x: jax.vmap(lambda i, x: x.at[i].get(mode="fill"))(i, x),
    "own matrix": lambda i, x: jax.vmap(lambda i, x: x.reshape(2, 2)[i, i // 2])(i, x),
    "along an axis": lambda i, x: jnp.take_along_axis(x, jnp.abs(i)[:, None] % 4, 1),
    "several": lambda i, x: jax.vmap(lambda i, x: x[jnp.stack([i, i + 1, 0 * i])])(i, x),
    "slice": lambda i, x: jax.vmap(lambda i, x: lax.dynamic_slice(x, (i,), (2,)))(i, x),
    "slice of a table": lambda i, x: jax.vmap(
        lambda i: lax.dynamic_slice(jnp.asarray(TABLE), (i, 1), (2, 2))
    )(i),
    "set": lambda i, x: jax.vmap(lambda i, x: x.at[i].set(9.0))(i, x),
    "set, clipped": lambda i, x: jax.vmap(lambda i, x: x.at[i].set(9.0, mode="clip"))(i, x),
    "set to own": lambda i, x: jax.vmap(lambda i, x: x.at[i].set(x[0] + i))(i, x),
    "set in zeros": lambda i, x: jax.vmap(lambda i: jnp.zeros((3, 5)).at[i, 2].set(1.0))(i),
    "set a row": lambda i, x: jax.vmap(lambda i, x: jnp.zeros((3, 4)).at[i].set(x))(i, x),
    "add": lambda i, x: jax.vmap(lambda i, x: x.at[i].add(x[1]))(i, x),
    "multiply": lambda i, x: jax.vmap(lambda i, x: x.at[i].multiply(2.0))(i, x),
    "least": lambda i, x: jax.vmap(lambda i, x: x.at[i].min(0.0))(i, x),
    "largest": lambda i, x: jax.vmap(lambda i, x: x.at[i].max(0.0))(i, x),
    "add twice": lambda i, x: jax.vmap(lambda i, x: x.at[jnp.stack([i, i])].add(x[:2]))(i, x),
    "update a slice": lambda i, x: jax.vmap(
        lambda i, x: lax.dynamic_update_slice(x, x[:2] * 2, (i,))
    )(i, x),
    "flags": lambda i, x: jax.vmap(lambda i, x: (x > 0).at[i].set(True))(i, x),
    "small type": lambda i, x: jax.vmap(lambda i, x: x[i])(i.astype(jnp.int8), x),
    "unsigned": lambda i, x: jax.vmap(lambda i, x: x[i])(i.astype(jnp.uint32), x),
}  # fmt: skip


@pytest.mark.parametrize("count", (1, 3, 4))
@pytest.mark.parametrize("name", TABLES)
def test_indices_that_differ_by_lane(name, count):
    compare(TABLES[name], integers(count, low=-6), floats(count, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, i: x[:, i],
        lambda x, i: x.at[:, i].set(0.0),
        lambda x, i: lax.dynamic_slice(x, (0, i), (len(x), 2)),
        lambda x, i: lax.dynamic_update_slice(x, x[:, :2] * 2, (0, i)),
        lambda x, i: x + jnp.asarray(TABLE)[i, 1],
        lambda x, i: x + jnp.asarray(TABLE).at[i, 1].set(5.0)[1, 1],
    ],
)
@pytest.mark.parametrize("index", [-9, 2, 3, 9])
def test_an_index_that_all_lanes_share(function, index):
    compare(function, floats(3, 4), shared=[np.int32(index)])


def test_numbers_that_all_lanes_share():
    compare(lambda x, w: (x * w[0] + w.sum(), w * 2), floats(3, 4), shared=[floats(2)])


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.int8, np.uint32])
def test_integers_wrap_around_as_those_of_jax(dtype):
    info = np.iinfo(dtype)
    x = np.array([[info.max, info.min, 3], [info.min, 1, info.max]], dtype)
    compare(lambda x: (x + 1, x * 3, x - 2, x // 2, x.sum(1), x << 1, ~x, x.max(1)), x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.argmax(1),
        lambda x: x.argmin(1),
        lambda x: x.max(1),
        lambda x: x.min(1),
        jax.nn.relu,
        lambda x: jnp.maximum(0.5, x),
        lambda x: jnp.minimum(x, x[:, ::-1]),
        lambda x: jnp.clip(x, -1.0, 1.0),
    ],
)
def test_what_is_not_a_number_stays_so(function):
    x = np.array([[1, np.nan, 2], [np.nan, 3, np.nan], [-np.inf, np.inf, 0], [1, 2, np.nan]])
    compare(function, x.astype(np.float32))


def test_a_square_of_environments_keeps_its_axes_apart():
    """Axes of the size of the number of environments must not be taken for one another."""
    compare(lambda x: (x.sum(1), x.T, x * x[:, :1], x.T.max(0)), floats(3, 3))
    compare(lambda x: (jax.vmap(jnp.diag)(x).sum(1), x[:, None] * x[:, :, None]), floats(3, 3))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.sum(0), x.max(0), x.min(0)),
        lambda x: (x - x.mean(0)).sum(1),
    ],
)
def test_sums_over_lanes_leave_out_those_that_mean_nothing(function):
    compare(function, floats(3, 2), reduces=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.sum(0), "an operation combines the environments"),
        (lambda x: jnp.cumsum(x, 0), "an operation combines the environments"),
        (lambda x: x[::-1], DIFFERENT),
        (lambda x: x + x[:1], DIFFERENT),
        (lambda x: x[:, :3] + x[:, :3].T, DIFFERENT),
        (lambda x: x.at[0].set(0.0), DIFFERENT),
        (lambda x: x[jnp.argmax(x, 1)], DIFFERENT),
        (lambda x: x.at[jnp.argmax(x, 1)].set(0.0), DIFFERENT),
        (lambda x: x.reshape(-1), DIFFERENT),
        (lambda x: x[:, :0].sum(1), "'reduce_sum' has no numbers to work on"),
        (
            lambda x: x.at[:, 1].apply(jnp.sin),
            "kernels know no 'scatter' with a function or a mode of its own",
        ),
        (lambda x: jnp.sort(x, 1), "kernels cannot compute 'sort' here"),
        (lambda x: jnp.zeros((4, 9)).at[jnp.argmax(x, 1)].set(1.0), DIFFERENT),
        (
            lambda x: jnp.zeros(1000).at[jnp.argmax(x, 1)].get(mode="clip") + x[:, 0],
            "'gather' chooses by an index 1000 times, and kernels do so 512 times at most",
        ),
    ],
)
def test_what_lanes_cannot_do_is_refused_with_a_reason(function, reason):
    with pytest.raises(Unfusable) as error:
        evaluate(function, floats(3, 4))
    assert str(error.value) == reason
