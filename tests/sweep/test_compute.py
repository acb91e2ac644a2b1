"""The compiled programs of a sweep, line by line, on an agent whose every number is known.

Its parameter counts updates, its losses turn bad when they are told to, and its policy shows what
it was given, so that nothing here is learnt and little is compiled.
"""

import dataclasses
import hashlib
import importlib.metadata
import pathlib
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from flax import struct
from jax import random
from tiny_sweep import TINY

from purejaxpg import FaultError, InputError, contract, evaluate, prng
from purejaxpg import config as configs
from purejaxpg.sweep import compute, memory
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs


@configs.dataclass
class Config:
    env: str = "CartPole-v1"
    env_kwargs: tuple[tuple[str, Any], ...] = ()
    total_timesteps: int = 244  # 61 updates, which 60 segments of one do not hold
    num_envs: int = 2
    hidden: tuple[int, ...] = (3, 5)
    learning_rate: float = 0.5  # is added to the parameter in every update
    bad_param: float = jnp.inf  # update after which the parameter is NaN
    bad_loss: float = jnp.inf  # likewise the loss, once
    env_params: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * 2

    @property
    def num_updates(self) -> int:
        return self.total_timesteps // self.steps_per_update


@struct.dataclass
class State:
    params: Any
    drawn: jax.Array
    key: jax.Array
    updates: jax.Array


def init(key: jax.Array, config: Config) -> State:
    drawn = random.uniform(key)
    return State({"w": jnp.zeros((2, 2))}, drawn, random.split(key)[0], jnp.int32(0))


def update(key: jax.Array, state: State, config: Config) -> tuple[State, dict[str, jax.Array]]:
    now = state.updates + 1
    step = jnp.where(now == config.bad_param, jnp.nan, config.learning_rate)
    w = state.params["w"].at[1, 0].add(step)
    drawn = random.uniform(key)
    metrics = {
        "episode/return_sum": jnp.nan,  # what episodes return says nothing of divergence
        "episode/length_sum": 1.0,
        "episode/count": 0.0,
        "loss/policy": jnp.where(now == config.bad_loss, jnp.inf, 1.0),
        "policy/drawn": drawn,
    }
    return State({"w": w}, drawn, state.key, now), metrics


def train(key: jax.Array, config: Config) -> Any:
    raise NotImplementedError


def check(config: Config) -> None:
    pass


def policy(
    key: jax.Array, state: State, obs: jax.Array, config: Config, greedy: bool = False
) -> jax.Array:
    if greedy:
        return jnp.ones(len(obs), jnp.int32)
    return random.bernoulli(key, 0.5, (len(obs),)).astype(jnp.int32)


TOY = sys.modules[__name__]
SPEC: Any = types.SimpleNamespace(
    agent=TOY,
    eval_episodes=3,
    eval_every=0,
    rows_per_device=None,
    mesh=specs.Mesh(),
    given=contract.Given(),
    search=specs.Search(),
)


def run(number: int, **fields: Any) -> plans.Run:
    return plans.Run(str(number), Config(**fields), 10 + number, {})


def unit(*runs: plans.Run, name: str = "u", stop: int = 7) -> plans.Unit:
    return plans.Unit(name, tuple(plans.Leg(each, 0, stop) for each in runs))


def group(*units: plans.Unit, rows: int = 3) -> plans.Group:
    return plans.Group(0, compute.signature(units[0].legs[0].run.config), rows, units)


def key_of(seed: int, data: int) -> jax.Array:
    return random.fold_in(random.key(seed), np.uint32(data))


# --- rows ---------------------------------------------------------------------------------------


def test_rows_are_stacked_in_their_types_and_padded_with_the_last() -> None:
    params = {"max_steps_in_episode": 16777217, "gravity": 3}
    runs = [run(0, learning_rate=1.0), run(1, learning_rate=2, env_params={})]
    seeds, batch = compute.stack(runs, 5)
    assert seeds.dtype == np.uint32 and seeds.tolist() == [10, 11, 11, 11, 11]
    assert batch.learning_rate.dtype == np.float32
    assert batch.learning_rate.tolist() == [1.0, 2.0, 2.0, 2.0, 2.0]
    assert (batch.env, batch.hidden) == ("CartPole-v1", (3, 5))  # static fields stay as they are
    _, batch = compute.stack([run(0, env_params=params)], 2)
    types_of = {name: value.dtype for name, value in batch.env_params.items()}
    assert types_of == {"max_steps_in_episode": np.int32, "gravity": np.float32}
    assert batch.env_params["max_steps_in_episode"].tolist() == [16777217] * 2
    seeds, _ = compute.stack([dataclasses.replace(run(0), seed=2**32 - 1)], 1)
    assert seeds.tolist() == [2**32 - 1]


def test_the_last_row_is_repeated() -> None:
    assert compute.pad(jnp.array([[1], [2]]), 4).tolist() == [[1], [2], [2], [2]]
    assert compute.pad(np.array([5.0]), 1).tolist() == [5.0]
    keys = random.split(random.key(0), 2)
    assert (random.key_data(compute.pad(keys, 3)[2]) == random.key_data(keys[1])).all()


def test_a_runs_key_is_its_seeds_with_the_update_folded_in() -> None:
    keys = compute.run_keys(np.array([3, 2**32 - 1], np.uint32), np.uint32(2**31 + 5))
    for key, seed in zip(keys, (3, 2**32 - 1), strict=True):
        expected = random.key_data(random.fold_in(random.key(np.uint32(seed)), 2**31 + 5))
        assert (random.key_data(key) == expected).all()


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, 16),  # never more
        ({"hidden": (2040,), "num_envs": 8}, 4),  # 2^17 / (16 * (4 + 2040))
        ({"hidden": (2044, 2048), "num_envs": 8}, 2),  # 2^17 / (16 * (4 + 2044 + 2048))
        ({"hidden": (10**6,), "num_envs": 8}, 1),  # never less
        ({"hidden": (1020,), "num_envs": 8, "env": "Breakout-MinAtar"}, 6),  # 10 * 10 * 4 + 1020
    ],
)
def test_activations_limit_the_rows_of_a_unit_on_a_cpu(fields: Any, rows: int) -> None:
    assert compute.cpu_rows(Config(**fields)) == rows


@dataclasses.dataclass
class Sized:
    """Fields that only some agents have."""

    env: str = "CartPole-v1"
    env_kwargs: tuple[()] = ()
    steps_per_update: int = 4096
    hidden: tuple[int, ...] = (60,)


def test_a_minibatch_or_a_batch_is_what_activations_are_counted_for() -> None:
    one = Sized()
    assert compute.cpu_rows(one) == 1  # 2^17 / (4096 * 64) = 0.5, and rounding to even
    one.num_minibatches = 8  # type: ignore[attr-defined]
    assert compute.cpu_rows(one) == 4
    one.batch_size = 256  # type: ignore[attr-defined]
    assert compute.cpu_rows(one) == 8
    assert contract.steps_before(one) == 0
    one.learning_starts = 70  # type: ignore[attr-defined]
    assert contract.steps_before(one) == 70


def test_the_backend_cuts_rounds_and_refuses_what_could_not_be_scored() -> None:
    backend = compute.Backend(SPEC, jax.devices()[:1] * 2)
    assert (backend.slots, backend.on_cpu) == (2, True)
    round_ = plans.Round(tuple(plans.Leg(run(i), 0, 7) for i in range(40)))
    (found,) = backend.groups(2, round_, {})
    assert (found.rows, [len(unit.legs) for unit in found.units]) == (10, [10] * 4)
    assert found.units[1].name == plans.unit_name(2, 0, 1)
    (found,) = backend.groups(2, round_, {plans.unit_name(2, 0, 0): 25})
    assert [len(unit.legs) for unit in found.units] == [25, 15]
    backend.on_cpu = False
    assert backend.rows(Config(), 40) == 20
    backend.spec = types.SimpleNamespace(rows_per_device=7, agent=TOY, mesh=specs.Mesh())
    assert backend.rows(Config(), 40) == 7
    long = run(0, env_params={"max_steps_in_episode": 10**6})
    with pytest.raises(InputError, match="max_steps_in_episode"):
        backend.groups(0, plans.Round((plans.Leg(long, 0, 7),)), {})


@pytest.mark.fast
def test_all_rungs_of_halving_have_one_program_on_all_devices() -> None:
    axis = {"learning_rate": [1e-3 * 1.5**i for i in range(9)]}
    config = {**TINY["config"], "total_timesteps": 9 * 16}
    changed = {"sweep": axis, "seeds": 2, "rows_per_device": None, "config": config}
    spec = specs.from_dict({**TINY, **changed, "halving": {"rungs": 3, "eta": 3}}, "tiny")
    two = jax.devices()[:1] * 2
    backend, rounds = compute.Backend(spec, two), searches.rehearse(searches.rounds(spec, 4))
    groups = [group for i, each in enumerate(rounds) for group in backend.groups(i, each, {})]
    assert [group.num_legs for group in groups] == [18, 6, 2, 8]
    assert len({group.program for group in groups}) == 1
    assert all(backend.used(group) == two for group in groups)
    # Sizes that are stored are kept, as those of a group that did not fit.
    again = compute.Backend(spec, two)
    sizes = {plans.unit_name(0, 0, 0): 2}
    groups = [group for i, each in enumerate(rounds) for group in again.groups(i, each, sizes)]
    assert {group.rows for group in groups} == {2}
    plain = compute.Backend(specs.from_dict({**TINY, **changed}, "tiny"), two)
    (only,) = plain.groups(0, searches.rehearse(searches.rounds(plain.spec))[0], {})
    assert only.rows == 9 and plain.used(only) == two


def test_a_signature_holds_static_fields_and_names_of_parameters() -> None:
    one = compute.signature(Config(env_params={"gravity": 1.0, "length": 2.0}))
    same = Config(learning_rate=9.0, env_params={"length": 1.0, "gravity": 5.0})
    assert compute.signature(same) == one
    for other in (
        Config(env_params={"gravity": 1.0}),
        Config(env_params={"gravity": 1.0, "length": 2.0}, hidden=(3, 6)),
        Config(env_params={"gravity": 1.0, "length": 2.0}, env="Acrobot-v1"),
    ):
        assert compute.signature(other) != one


# --- segments -----------------------------------------------------------------------------------

ROWS = 4
SEGMENT = jax.jit(compute.segment_rows, static_argnums=(0, 1), compiler_options=quick.OPTIONS)


def segment(runs: list[plans.Run], first: int, count: int, states: Any = None, at: Any = None):
    inputs = compute.inputs_of(contract.NOTHING, [unit(*runs)], ROWS)
    states = compute.start_rows(TOY, inputs) if states is None else states
    at = np.zeros(ROWS, np.int32) if at is None else at
    return SEGMENT(TOY, 6, inputs, states, at, np.int32(first), np.int32(count))


def test_a_state_starts_from_fold_0() -> None:
    inputs = compute.inputs_of(contract.NOTHING, [unit(run(0), run(1))], 2)
    states = compute.start_rows(TOY, inputs)
    expected = [float(random.uniform(key_of(seed, 0))) for seed in (10, 11)]
    assert states.drawn.tolist() == pytest.approx(expected)


def test_a_segment_does_the_updates_it_is_asked_for_with_their_own_keys() -> None:
    runs = [run(i, learning_rate=float(i + 1)) for i in range(ROWS)]
    states, at, metrics = segment(runs, 1, 4)
    assert at.tolist() == [0] * ROWS
    np.testing.assert_allclose(states.params["w"][:, 1, 0], [4.0, 8.0, 12.0, 16.0])
    assert states.updates.tolist() == [4] * ROWS
    expected = [[float(random.uniform(key_of(10 + i, u))) for u in range(1, 5)] for i in range(4)]
    assert metrics["policy/drawn"].shape == (ROWS, 6)
    np.testing.assert_allclose(metrics["policy/drawn"][:, :4], expected, rtol=1e-6)
    assert (metrics["policy/drawn"][:, 4:] == 0).all()  # room that was not used
    states, _, metrics = segment(runs, 5, 2, states)
    expected = [[float(random.uniform(key_of(10 + i, u))) for u in (5, 6)] for i in range(4)]
    np.testing.assert_allclose(metrics["policy/drawn"][:, :2], expected, rtol=1e-6)
    np.testing.assert_allclose(states.params["w"][:, 1, 0], [6.0, 12.0, 18.0, 24.0])


def test_the_first_update_with_a_bad_number_is_recorded_for_good() -> None:
    runs = [run(0), run(1, bad_param=3.0), run(2, bad_loss=2.0), run(3, bad_param=5.0)]
    states, at, _ = segment(runs, 1, 4)
    assert at.tolist() == [0, 3, 2, 0]  # the loss of row 2 is fine again, and its mark is not
    _, at, _ = segment(runs, 5, 2, states, at)
    assert at.tolist() == [0, 3, 2, 5]


def test_only_parameters_and_losses_count_as_diverged() -> None:
    good, bad = jnp.zeros((2, 3)), jnp.zeros((2, 3)).at[1, 2].set(jnp.inf)
    fine = {"loss/policy": jnp.zeros(2)}
    assert compute.finite({"a": good, "b": good}, fine).tolist() == [True, True]
    assert compute.finite({"a": good, "b": bad}, fine).tolist() == [True, False]
    assert compute.finite({"a": good}, {"loss/x": jnp.array([jnp.nan, 1.0])}).tolist() == [
        False, True
    ]  # fmt: skip
    assert compute.finite({"a": good}, {**fine, "policy/kl": jnp.full(2, jnp.nan)}).all()


def test_a_score_is_evaluates_after_that_update() -> None:
    runs = [run(0, env_params={"gravity": 5.0}), run(1, env_params={"gravity": 20.0})]
    inputs = compute.inputs_of(contract.NOTHING, [unit(*runs)], 2)
    states = compute.start_rows(TOY, inputs)
    found = jax.jit(compute.score_rows, static_argnums=(0, 4), compiler_options=quick.OPTIONS)(
        TOY, inputs, states, np.int32(9), 5
    )
    for row, each in enumerate(runs):
        state, config = jax.tree.map(lambda x, row=row: x[row], (states, inputs.configs))
        expected = jax.jit(evaluate.score, static_argnums=(1, 4), compiler_options=quick.OPTIONS)(
            key_of(each.seed, 2**31 + 9), TOY, state, config, 5
        )
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name][row], value)
    assert found["evaluation/return"].shape == (2, 5)


# --- programs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend() -> Iterator[compute.Backend]:
    """Compile for two devices where there are two, else for one."""
    yield compute.Backend(SPEC, jax.devices()[:2])


@pytest.fixture(scope="module")
def programs(backend: compute.Backend) -> compute.Programs:
    units = [unit(run(0), run(1)), unit(run(2), name="v")][: backend.slots]
    began = time.monotonic()
    compiled = backend.compile(group(*units))
    assert compiled.compile_s <= time.monotonic() - began
    return compiled


def test_programs_say_what_they_are(backend: compute.Backend, programs: compute.Programs) -> None:
    assert (programs.rows, programs.units) == (3, backend.slots)
    assert programs.segment_length == 2
    assert 0 < programs.trace_s < programs.compile_s
    assert 0 < programs.lower_s < programs.compile_s
    each = [memory.needed(p) for p in (programs.start, programs.segment, programs.score)]
    assert programs.bytes_per_device == max(each) > 0
    facts = backend.facts(programs, group(unit(run(0))))
    assert facts["rows_per_device"] == 3 and facts["devices"] == backend.slots
    assert facts["platform"] == "cpu" and facts["device_kind"] == jax.devices()[0].device_kind
    assert facts["bytes_per_device"] == programs.bytes_per_device
    assert facts["compile_s"] == programs.compile_s and facts["steps_before"] == 0
    assert facts["jax"] == jax.__version__
    assert facts["flax"] == importlib.metadata.version("flax")


def test_units_run_side_by_side_as_they_would_alone(
    backend: compute.Backend, programs: compute.Programs
) -> None:
    units = [unit(run(0), run(1)), unit(run(2), name="v")][: backend.slots]
    inputs = backend.inputs(programs, units)
    assert inputs.seeds.tolist() == [10, 11, 11, 12, 12, 12][: 3 * backend.slots]
    assert inputs.seeds.sharding == programs.sharding  # put on the devices once for all calls
    states = backend.start(programs, inputs)
    at = np.zeros(3 * backend.slots, np.int32)
    states, at, metrics = backend.segment(programs, inputs, states, at, 5, 1)
    assert isinstance(at, np.ndarray) and at.tolist() == [0] * 3 * backend.slots
    assert metrics["policy/drawn"].shape == (3 * backend.slots, 1)  # one column for an update
    expected = [float(random.uniform(key_of(seed, 5))) for seed in inputs.seeds]
    np.testing.assert_allclose(metrics["policy/drawn"][:, 0], expected, rtol=1e-6)
    scores = backend.score(programs, inputs, states, 1)
    assert scores["evaluation/return"].shape == (3 * backend.slots, 3)
    assert all(isinstance(value, np.ndarray) for value in scores.values())


def test_rows_of_this_process_come_in_their_order() -> None:
    """Where other processes hold the rest of an array, its shards are all that can be read."""
    shards = [
        types.SimpleNamespace(index=(slice(start, start and start + 1),), data=np.array([value]))
        for start, value in ((4, 40), (None, 10), (2, 20))
    ]
    array: Any = types.SimpleNamespace(is_fully_addressable=False, addressable_shards=shards)
    assert compute.own_rows(array).tolist() == [10, 20, 40]


def test_states_are_cut_picked_and_joined(
    backend: compute.Backend, programs: compute.Programs
) -> None:
    units = [unit(run(0), run(1)), unit(run(2), name="v")][: backend.slots]
    states = backend.start(programs, backend.inputs(programs, units))
    cut = backend.cut(states, slice(1, 2))
    assert cut.drawn.tolist() == states.drawn[1:2].tolist()
    first = backend.cut(states, slice(0, 2))
    picked = backend.pick([(first, 1), (first, 0), (cut, 0)])
    assert picked.drawn.tolist() == [*first.drawn[::-1].tolist(), cut.drawn[0].item()]
    trees = [first, cut][: backend.slots]
    joined = backend.join(programs, trees)
    expected = [first.drawn[0], first.drawn[1], first.drawn[1], *[cut.drawn[0]] * 3]
    assert joined.drawn.tolist() == [float(x) for x in expected][: 3 * backend.slots]
    assert joined.drawn.sharding == programs.sharding
    template = backend.template(unit(run(0), run(1)))
    assert template.params["w"].shape == (2, 2, 2) and template.drawn.shape == (2,)
    assert backend.metric_names(unit(run(0)), False) == [
        "episode/count", "episode/length_sum", "episode/return_sum", "loss/policy", "policy/drawn"
    ]  # fmt: skip


def test_programs_of_the_last_groups_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the least recent use: a group that comes back stays."""
    made: list[Any] = []

    def build(spec: Any, group: plans.Group, devices: Any) -> Any:
        made.append((group.signature, group.rows, len(devices)))
        return types.SimpleNamespace(bytes_per_device=1, rows=group.rows)

    monkeypatch.setattr(compute, "build", build)
    monkeypatch.setattr(compute, "MAX_GROUPS", 2)
    backend = compute.Backend(SPEC, jax.devices()[:1] * 3)
    a, b, c = (group(unit(run(0, hidden=(i,)))) for i in (1, 2, 3))
    first = backend.compile(a)
    backend.compile(b)
    assert backend.compile(a) is first
    backend.compile(c)  # b goes
    assert backend.compile(a) is first and len(made) == 3
    backend.compile(b)
    assert len(made) == 4 and len(backend.compiled) == 2
    backend.compile(group(unit(run(0, hidden=(2,))), rows=4))  # other rows are other programs
    backend.compile(group(unit(run(0, hidden=(2,))), unit(run(1, hidden=(2,)), name="v")))
    assert [(rows, devices) for _, rows, devices in made[-3:]] == [(3, 1), (4, 1), (3, 2)]


def test_a_unit_that_does_not_fit_is_refused_with_the_rows_that_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs: Any = types.SimpleNamespace(bytes_per_device=1000, rows=10)
    compute.refuse_too_large(needs, 1000)
    with pytest.raises(memory.OutOfMemory) as caught:
        compute.refuse_too_large(needs, 500)
    assert caught.value.fits == 4  # 0.9 * 10 * 500 / 1000 = 4.5
    monkeypatch.setattr(compute, "build", lambda *arguments: needs)
    monkeypatch.setattr(memory, "limit", lambda devices: 300 * len(devices))
    with pytest.raises(memory.OutOfMemory) as caught:
        compute.Backend(SPEC, jax.devices()[:1] * 3).compile(group(unit(run(0)), unit(run(1))))
    assert caught.value.fits == 5  # the devices of two units count
    mebi: Any = types.SimpleNamespace(bytes_per_device=3 * 2**20, rows=10)
    with pytest.raises(memory.OutOfMemory, match="10 rows need 3 MiB and 2 are free"):
        compute.refuse_too_large(mebi, 2 * 2**20)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("RESOURCE_EXHAUSTED: no room\nmore", memory.OutOfMemory, "9 rows ran out of memory"),
        (
            "INTERNAL: lost.\nmore",
            FaultError,
            "jax failed: INTERNAL: lost; finished units are kept",
        ),
    ],
)
def test_errors_of_jax_become_ours(text: str, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words) as caught, compute.out_of_memory(9):
        raise jax.errors.JaxRuntimeError(text)
    assert getattr(caught.value, "fits", 4) == 4


def test_an_agent_whose_metrics_break_the_contract_is_named() -> None:
    _, metrics = jax.eval_shape(lambda k, c: update(k, init(k, c), c), random.key(0), Config())
    contract.check_metrics(TOY, {**metrics, "x": 0.5})
    contract.check_metrics(TOY, {k: v for k, v in metrics.items() if not k.startswith("episode/")})
    for name in contract.CURVE:
        with pytest.raises(InputError, match=f"must hold '{name}'"):
            contract.check_metrics(TOY, {k: v for k, v in metrics.items() if k != name})
    vector = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(InputError, match=r"'x' of agent .* must be a scalar, .* float32\[3\]"):
        contract.check_metrics(TOY, {**metrics, "x": vector})
    with pytest.raises(InputError, match=r"'x' of agent .* must be a scalar, but is str"):
        contract.check_metrics(TOY, {**metrics, "x": "good"})


STATE = "init in .*toy.py must return one value, the state, with the attribute params, but returns"
PAIR = "update in .*toy.py must return two values, the state and a dict of metrics, but returns"
KEPT = "update in .*toy.py must return two values, a state with the arrays of the one before it"
ACTIONS = r"policy in .*toy.py must return one array of actions \[3\], but returns"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("init", lambda state: {"w": jnp.zeros(2)}, rf"{STATE} 1 value \(dict\)"),
        ("init", lambda state: (state, 1), rf"{STATE} 2 values \(State, int\)"),
        ("update", lambda pair: pair[0], rf"{PAIR} 1 value \(State\)"),
        ("update", lambda pair: None, f"{PAIR} nothing"),
        ("update", lambda pair: pair[::-1], rf"{PAIR} 2 values \(dict, State\)"),
        ("update", lambda pair: (*pair, pair[0].drawn), rf"{PAIR} 3 values \(State, dict, \w+\["),
        (
            "update",
            lambda pair: (pair[0].replace(updates=pair[0].updates * 0.5), pair[1]),
            rf"{KEPT} .*, but state.updates is float32\[\] and was int32\[\] before",
        ),
        (
            "update",
            lambda pair: (pair[0].replace(drawn=None), pair[1]),
            rf"{KEPT} .*, but state.drawn is missing and was ",
        ),
        ("update", lambda pair: (vars(pair[0]), pair[1]), KEPT),
        ("policy", lambda action: (action, 0), rf"{ACTIONS} 2 values \(int32\[3\], int\)"),
        ("policy", lambda action: None, f"{ACTIONS} nothing"),
        ("policy", lambda action: action[:, None], rf"{ACTIONS} 1 value \(int32\[3, 1\]\)"),
    ],
)
def test_a_function_that_returns_something_else_is_named_before_anything_is_compiled(
    name: str, change: Any, words: str
) -> None:
    agent: Any = types.ModuleType("toy")
    agent.__file__, agent.init, agent.update, agent.policy = "toy.py", init, update, policy
    right = getattr(agent, name)
    setattr(agent, name, lambda *arguments: change(right(*arguments)))
    spec: Any = types.SimpleNamespace(**{**vars(SPEC), "agent": agent})
    with pytest.raises(InputError, match=words):
        compute.Backend(spec, jax.devices()[:1]).compile(group(unit(run(0))))


def test_a_state_may_keep_a_number_of_python() -> None:
    agent: Any = types.ModuleType("toy")
    agent.__file__, agent.update = "toy.py", lambda key, state, config: ({"steps": 0}, {})
    assert contract.updated(agent, None, {"steps": jnp.int32(1)}, None) == ({"steps": 0}, {})


def test_versions_include_a_hash_of_every_file_of_the_package() -> None:
    root = pathlib.Path(compute.__file__).parent.parent
    content = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    assert compute.versions()["source"] == hashlib.sha256(content).hexdigest()[:16]
    assert {"jax", "jaxlib", "gymnax", "optax", "flax", "numpy", "purejaxpg"} < set(
        compute.versions()
    )


def test_keys_are_those_of_a_seed_alone() -> None:
    assert (random.key_data(prng.key(7)) == random.key_data(random.key(7))).all()
