"""The replay buffer: a ring, uniform sampling, whole rows, and no cost that grows with capacity."""

import collections
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax import lax, random
from scipy import stats

from purejaxpg import InputError, replay
from purejaxpg.agents import ddpg, sac

pytestmark = pytest.mark.fast

# A correct sampler fails a test of uniformity with this probability, once and for all: keys are
# fixed.
MIN_P = 1e-4


@struct.dataclass
class Transition:
    """Fields of every kind an agent stores, the dtypes mixed in their order."""

    obs: jax.Array  # [3] float32
    action: jax.Array  # [] int32
    reward: jax.Array  # [] float32
    terminated: jax.Array  # [] bool
    next_obs: jax.Array  # [3] float32
    image: jax.Array  # [2, 2] uint8


EXAMPLE = Transition(
    obs=jax.ShapeDtypeStruct((3,), jnp.float32),
    action=jax.ShapeDtypeStruct((), jnp.int32),
    reward=jax.ShapeDtypeStruct((), jnp.float32),
    terminated=jax.ShapeDtypeStruct((), jnp.bool_),
    next_obs=jax.ShapeDtypeStruct((3,), jnp.float32),
    image=jax.ShapeDtypeStruct((2, 2), jnp.uint8),
)


add = jax.jit(replay.add)
sample = jax.jit(replay.sample, static_argnums=2)


@pytest.fixture(autouse=True)
def strict_shapes() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


def transitions(number: Any) -> Transition:
    """Make the rows whose numbers are `number` [K]; every field of a row follows from its number.

    All arithmetic is exact. Nothing here looks like an unused row, which is all zeros.
    """
    xp = jnp if isinstance(number, jax.Array) else np
    number = xp.asarray(number, np.int32)
    real = number.astype(np.float32)
    parts = [number, number // 256, 3 * number, 255 - number]
    return Transition(
        obs=xp.stack([real, -real, real / 2], 1),
        action=number + 2**24,  # float32 cannot tell these from their neighbours
        reward=real * real,
        terminated=number % 3 == 1,
        next_obs=xp.stack([real + 1, 4 * real, 1 - real], 1),
        image=(xp.stack(parts, 1) % 256).reshape(-1, 2, 2).astype(np.uint8),
    )


def numbers(batch: Transition) -> np.ndarray:
    """Return which rows these are, after a check that each is one row in all its fields."""
    rows = np.asarray(batch.action) - 2**24
    expected = transitions(rows.reshape(-1))
    flat = jax.tree.map(lambda got, want: np.asarray(got).reshape(want.shape), batch, expected)
    chex.assert_trees_all_equal(flat, expected, strict=True)
    return rows


def stored(buffer: replay.Buffer) -> list[int]:
    """Return the numbers of all rows in the buffer, the oldest first."""
    size, capacity = int(buffer.size), len(buffer.storage.reward)
    slots = (int(buffer.position) - size + np.arange(size)) % capacity
    return numbers(jax.tree.map(lambda x: np.asarray(x)[slots], buffer.storage)).tolist()


def filled(capacity: int, *stops: int) -> replay.Buffer:
    """Return a buffer that was given rows 1 to stops[0], then those to stops[1], and so on."""
    buffer = replay.init(capacity, EXAMPLE)
    for start, stop in itertools.pairwise((0, *stops)):
        buffer = add(buffer, transitions(np.arange(start + 1, stop + 1)))
    return buffer


# --- the ring -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capacity", "amounts"), [(1, (1,)), (2, (1, 2)), (7, (2, 3)), (13, (1, 5, 13)), (64, (3, 10))]
)
def test_the_ring_is_a_bounded_deque(capacity: int, amounts: tuple[int, ...]) -> None:
    generator = np.random.default_rng(capacity)
    buffer, queue = replay.init(capacity, EXAMPLE), collections.deque[int](maxlen=capacity)
    given = 0
    while given < 4 * capacity:
        new = np.arange(given, given + generator.choice(amounts)) + 1
        buffer, given = add(buffer, transitions(new)), given + len(new)
        queue.extend(new.tolist())
        assert stored(buffer) == list(queue)
        assert int(buffer.size) == len(queue)
        assert int(buffer.position) == given % capacity


def test_worked_by_hand() -> None:
    """Five places and three rows at a time: the second batch wraps and overwrites the oldest."""
    buffer = replay.init(5, {"x": jax.ShapeDtypeStruct((), jnp.float32)})
    buffer = replay.add(buffer, {"x": jnp.array([1.0, 2.0, 3.0])})
    assert buffer.storage["x"].tolist() == [1.0, 2.0, 3.0, 0.0, 0.0]
    assert (int(buffer.position), int(buffer.size)) == (3, 3)
    buffer = replay.add(buffer, {"x": jnp.array([4.0, 5.0, 6.0])})
    assert buffer.storage["x"].tolist() == [6.0, 2.0, 3.0, 4.0, 5.0]
    assert (int(buffer.position), int(buffer.size)) == (1, 5)


@pytest.mark.parametrize("stops", [(), (3,), (5,), (5, 8)])
def test_as_many_rows_as_there_are_places_replace_everything(stops: tuple[int, ...]) -> None:
    buffer = add(filled(5, *stops), transitions(np.arange(100, 105)))
    assert stored(buffer) == [100, 101, 102, 103, 104]
    assert int(buffer.position) == max(stops, default=0) % 5


def test_the_argument_is_left_as_it_was() -> None:
    buffer = filled(5, 4)
    add(buffer, transitions(np.arange(50, 53)))
    assert stored(buffer) == [1, 2, 3, 4]


def test_a_loop_that_adds_and_samples_is_the_same_steps_one_by_one() -> None:
    """In place inside a compiled loop, writes and reads must not overtake each other."""
    capacity, k, steps = 11, 4, 9
    keys = random.split(random.key(0), steps)

    def step(buffer: replay.Buffer, given: tuple[Any, jax.Array]) -> tuple[replay.Buffer, Any]:
        index, key = given
        buffer = replay.add(buffer, transitions(k * index + 1 + jnp.arange(k)))
        return buffer, replay.sample(key, buffer, 6)

    buffer, seen = replay.init(capacity, EXAMPLE), []
    for index in range(steps):
        buffer = add(buffer, transitions(k * index + 1 + np.arange(k)))
        seen.append(numbers(sample(keys[index], buffer, 6)))
    loop = jax.jit(lambda b: lax.scan(step, b, (jnp.arange(steps), keys)), donate_argnums=0)
    looped, batches = loop(replay.init(capacity, EXAMPLE))
    np.testing.assert_array_equal(np.asarray(batches.action) - 2**24, seen)
    assert stored(looped) == stored(buffer)


# --- samples ------------------------------------------------------------------------------------


# Part of the ring, all of it for the first time, and after it has wrapped around.
@pytest.mark.parametrize("stops", [(1,), (19,), (20,), (19, 33)])
def test_samples_are_whole_rows_of_what_is_stored(stops: tuple[int, ...]) -> None:
    """`numbers` compares all fields of each row, so a row of mixed fields would be noticed."""
    buffer = filled(20, *stops)
    drawn = numbers(sample(random.key(1), buffer, 400))
    assert set(drawn.tolist()) == set(stored(buffer))


@pytest.mark.parametrize(("capacity", "stops"), [(1000, (37,)), (37, (37,)), (37, (30, 52))])
def test_samples_are_uniform(capacity: int, stops: tuple[int, ...]) -> None:
    buffer = filled(capacity, *stops)
    drawn = numbers(sample(random.key(2), buffer, 20_000))
    places = min(capacity, stops[-1])
    counts = np.bincount(drawn - (stops[-1] - places + 1), minlength=places)
    assert counts.shape == (places,)
    assert stats.chisquare(counts).pvalue > MIN_P


def test_draws_are_independent() -> None:
    """All pairs are equally frequent, within a batch and between two keys: with replacement."""
    buffer = filled(6, 6)
    drawn, again = (numbers(sample(key, buffer, 20_000)) - 1 for key in random.split(random.key(3)))
    for pairs in (6 * drawn[::2] + drawn[1::2], 6 * drawn + again):
        assert stats.chisquare(np.bincount(pairs, minlength=36)).pvalue > MIN_P


def test_draws_do_not_depend_on_the_width_of_integers() -> None:
    key = random.key(4)
    batch = sample(key, filled(20, 19, 33), 50)
    with jax.enable_x64(True):
        wide = filled(20, 19, 33)
        assert (wide.position.dtype, wide.size.dtype) == (jnp.int32, jnp.int32)
        np.testing.assert_array_equal(numbers(sample(key, wide, 50)), numbers(batch))


# --- what a row may hold ------------------------------------------------------------------------


def test_bits_shapes_and_dtypes_come_back() -> None:
    """Nothing is converted on its way."""
    rows: dict[str, Any] = {
        "float32": np.array([[np.nan, -0.0, 1e-42], [np.inf, 1.0, 2.0]], np.float32),
        "float16": np.array([[[65504.0]], [[6e-8]]], np.float16),
        "bfloat16": jnp.array([[3e38], [-0.0]], jnp.bfloat16),
        "int32": np.array([2**31 - 1, 2**24 + 1], np.int32),
        "int8": np.array([-128, 127], np.int8),
        "uint32": np.array([[2**32 - 1], [5]], np.uint32),
        "bool": np.array([[True, False], [False, True]]),
        "nothing": np.zeros((2, 0), np.float32),
    }
    rows["float32"].view(np.uint32)[0, 0] = 0x7FC12345  # a NaN with a message
    batch = jax.tree.map(jnp.asarray, rows)
    buffer = replay.init(2, jax.tree.map(lambda x: x[0], batch))
    buffer = add(buffer, batch)
    drawn = sample(random.key(0), buffer, 5)
    for name, leaf in batch.items():
        assert buffer.storage[name].dtype == leaf.dtype
        assert np.asarray(buffer.storage[name]).tobytes() == np.asarray(leaf).tobytes()
        assert (drawn[name].dtype, drawn[name].shape) == (leaf.dtype, (5, *leaf.shape[1:]))


def test_the_structure_comes_back() -> None:
    row = {"a": (np.ones(2, np.float32), {"b": np.array(3, np.int32)}), "c": np.array([True])}
    buffer = add(replay.init(4, row), jax.tree.map(lambda x: x[None], row))
    batch = sample(random.key(0), buffer, 3)
    chex.assert_trees_all_equal(batch, jax.tree.map(lambda x: np.stack([x] * 3), row))


# --- many agents at once ------------------------------------------------------------------------


def test_each_lane_of_a_batch_is_that_lane_alone() -> None:
    """Lanes of different positions and sizes: empty, half full, just full, wrapped around."""
    alone = [filled(10, *stops) for stops in [(), (5,), (10,), (10, 15, 25)]]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    keys = random.split(random.key(5), len(alone))
    firsts = 100 * jnp.arange(1, len(alone) + 1)

    def step(key: jax.Array, buffer: replay.Buffer, first: jax.Array) -> Any:
        buffer = replay.add(buffer, transitions(first + jnp.arange(4)))
        return buffer, replay.sample(key, buffer, 16)

    batched, one_by_one = jax.jit(jax.vmap(step))(keys, together, firsts), jax.jit(step)
    for lane, buffer in enumerate(alone):
        solo = one_by_one(keys[lane], buffer, firsts[lane])
        chex.assert_trees_all_equal(solo, jax.tree.map(lambda x, lane=lane: x[lane], batched))
        expected = [*stored(buffer), *range(int(firsts[lane]), int(firsts[lane]) + 4)][-10:]
        assert stored(solo[0]) == expected


# --- costs --------------------------------------------------------------------------------------


def updates(carry: Any) -> Any:
    """Run what an agent does: in each update one add, then gradient steps that sample."""

    def gradient_step(total: jax.Array, key: jax.Array, buffer: replay.Buffer) -> Any:
        batch = replay.sample(key, buffer, 32)
        return total / 2 + batch.next_obs.sum() + batch.action.sum() + batch.terminated.sum(), None

    def update(index: Any, carry: Any) -> Any:
        buffer, key, total = carry
        key, key_steps = random.split(key)
        buffer = replay.add(buffer, transitions(8 * index + 1 + jnp.arange(8)))
        total, _ = lax.scan(
            lambda t, k: gradient_step(t, k, buffer), total, random.split(key_steps, 3)
        )
        return buffer, key, total

    return lax.fori_loop(0, 5, update, carry)


def compiled(function: Callable[..., Any], lanes: int, *args: Any) -> Any:
    """Compile a function of donated and possibly batched arguments; 0 lanes: not batched."""
    if lanes:
        function = jax.vmap(function)
        args = jax.tree.map(lambda x: jnp.stack([x] * lanes), args)
    return jax.jit(function, donate_argnums=tuple(range(len(args)))).lower(*args).compile()


@pytest.mark.parametrize("lanes", [0, 3])
def test_a_loop_keeps_no_copy_of_the_buffer(lanes: int) -> None:
    scratch = []
    for capacity in (2000, 20_000):
        carry = (filled(capacity, 1), random.key(0), jnp.float32(0.0))
        memory = compiled(updates, lanes, carry).memory_analysis()
        buffer_bytes = sum(x.nbytes for x in jax.tree.leaves(carry[0])) * max(lanes, 1)
        assert memory.alias_size_in_bytes >= buffer_bytes  # the result takes the argument's place
        assert memory.temp_size_in_bytes < buffer_bytes
        scratch.append(memory.temp_size_in_bytes)
    assert scratch[0] == scratch[1]


@pytest.mark.parametrize("agent", [ddpg, sac], ids=["ddpg", "sac"])
def test_a_single_run_keeps_no_copy_of_the_buffer(agent: Any) -> None:
    """One run, one transition and one gradient step: XLA is tempted to write it twice."""
    config = agent.Config(
        num_envs=1, num_steps=1, num_gradient_steps=1, batch_size=8, hidden=(8,),
        learning_starts=8, replay_capacity=20_000, orthogonal_init=False,
    )  # fmt: skip

    def train(state: Any, keys: jax.Array) -> Any:
        return lax.scan(lambda state, key: agent.update(key, state, config), state, keys)

    keys = random.split(random.key(0), (1, 5))
    with jax.numpy_rank_promotion("allow"):  # agents do
        state = jax.eval_shape(jax.vmap(agent.init, (0, None)), keys[:, 0], config)
        program = jax.jit(jax.vmap(train), donate_argnums=0).lower(state, keys).compile()
    one_field = state.buffer.storage.next_obs
    assert program.memory_analysis().temp_size_in_bytes < one_field.size * one_field.dtype.itemsize


def ways(lanes: int, capacity: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return add and sample with arguments, ready to be traced, batched or not."""
    batched = jax.vmap if lanes else lambda f: f
    args: tuple[Any, ...] = (random.key(0), filled(capacity, 1), transitions(np.arange(1, 9)))
    if lanes:
        args = jax.tree.map(lambda x: jnp.stack([x] * lanes), args)
    key, buffer, batch = args
    draw = batched(lambda key, buffer: replay.sample(key, buffer, 32))
    return {"add": (batched(replay.add), (buffer, batch)), "sample": (draw, (key, buffer))}


@pytest.mark.parametrize("lanes", [0, 3])
@pytest.mark.parametrize("name", ["add", "sample"])
def test_the_work_does_not_grow_with_the_capacity(name: str, lanes: int) -> None:
    """By XLA's count before it fuses: after that it counts all of a gather's operand as read."""
    costs = []
    for capacity in (2000, 20_000):
        function, args = ways(lanes, capacity)[name]
        cost = jax.jit(function).lower(*args).cost_analysis()
        costs.append((cost["flops"], cost["bytes accessed"]))
    assert costs[0] == costs[1]


def results(jaxpr: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Primitive and shape of every array that a program computes, calls looked into."""
    for equation in jaxpr.eqns:
        inner = [x.jaxpr for x in equation.params.values() if hasattr(x, "jaxpr")]
        for program in inner:
            yield from results(program)
        if not inner:
            yield from ((equation.primitive.name, out.aval.shape) for out in equation.outvars)


@pytest.mark.parametrize("lanes", [0, 3])
@pytest.mark.parametrize(("name", "allowed"), [("add", {"scatter"}), ("sample", set())])
def test_only_the_write_touches_the_whole_storage(name: str, allowed: set[str], lanes: int) -> None:
    """The compiled program has one scatter per field, and nothing else of that size."""
    capacity = 4999
    function, args = ways(lanes, capacity)[name]
    computed = list(results(jax.make_jaxpr(function)(*args).jaxpr))
    assert len(computed) > 5
    large = [primitive for primitive, shape in computed if capacity in shape]
    assert set(large) == allowed
    assert len(large) == (6 if name == "add" else 0)


# --- what is refused ----------------------------------------------------------------------------


def test_more_rows_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="holds 4 transitions cannot take 5 at once"):
        replay.add(replay.init(4, EXAMPLE), transitions(np.arange(1, 6)))


def test_a_buffer_without_places_is_refused() -> None:
    with pytest.raises(ValueError, match="1 transition or more, but not 0"):
        replay.init(0, EXAMPLE)


def test_rows_of_another_kind_are_refused() -> None:
    """A wrong dtype would otherwise be converted in silence, a wrong shape perhaps broadcast."""
    buffer, rows = replay.init(4, EXAMPLE), transitions(np.arange(1, 3))
    for wrong in (
        rows.replace(reward=rows.reward.astype(jnp.int32)),
        rows.replace(obs=rows.obs[:, :1]),
        rows.replace(reward=rows.reward[:, None]),
        {"obs": rows.obs},
    ):
        with pytest.raises(ValueError, match=r"The replay buffer keeps rows .*float32"):
            replay.add(buffer, wrong)
    with pytest.raises(AssertionError, match="prefix"):
        replay.add(buffer, rows.replace(terminated=rows.terminated[:1]))


CONFIG = {
    "replay_capacity": 1000,
    "batch_size": 256,
    "learning_starts": 500,
    "total_timesteps": 10_000,
    "num_envs": 4,
    "num_steps": 8,
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"replay_capacity": 256, "learning_starts": 256},
        {"replay_capacity": 320, "learning_starts": 4, "num_steps": 80},
        {"learning_starts": 4},
        {"learning_starts": 9968, "replay_capacity": 9968},
        {"batch_size": 1},
        {"total_timesteps": 2147483647},
    ],
)
def test_settings_that_fit_are_accepted(change: dict[str, int]) -> None:
    replay.check(types.SimpleNamespace(**CONFIG | change))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, but is 0."),
        (
            {"replay_capacity": 255},
            "replay_capacity must be batch_size (256) or more, but is 255.",
        ),
        (
            {"replay_capacity": 319, "num_steps": 80},
            "replay_capacity must hold the transitions of one update, num_envs * num_steps (320), "
            "but is 319.",
        ),
        (
            {"replay_capacity": 499},
            "replay_capacity must be learning_starts (500) or more, so that the whole warm-up "
            "fits, but is 499.",
        ),
        (
            {"learning_starts": 3},
            "learning_starts must be num_envs (4) or more, or there is nothing to sample, but is "
            "3.",
        ),
        (
            {"learning_starts": 501},
            "num_envs must divide learning_starts, but 4 does not divide 501.",
        ),
        (
            {"total_timesteps": 2147483648},
            "total_timesteps must be 2147483647 or less, but is 2147483648.",
        ),
        (
            {"learning_starts": 10_000, "replay_capacity": 10_000},
            "learning_starts must be less than total_timesteps (10000), or the warm-up is longer "
            "than the training, but is 10000.",
        ),
        (
            {"learning_starts": 9972, "replay_capacity": 9972},
            "total_timesteps must leave room for an update of num_envs * num_steps (32) after "
            "learning_starts (9972), but is 10000.",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, int], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        replay.check(types.SimpleNamespace(**CONFIG | change))
    assert str(error.value) == sentence
