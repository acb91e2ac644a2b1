"""What every agent promises, checked for every agent file in the package.

An agent is compiled as the engine compiles it, once, and as seldom as possible beside that.
"""

import dataclasses
import functools
import inspect
import pathlib
import runpy
import shutil
import sys
import types
from typing import Any

import agents_under_test as under_test
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from jax import random
from jax.extend import random as jax_random

from purejaxpg import checkpoint, contract, envs
from purejaxpg import config as configs
from purejaxpg.sweep import compute, session
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs

pytestmark = pytest.mark.parametrize("agent", under_test.AGENTS, ids=under_test.name)

SIGNATURES = {
    "check": ["config"],
    "init": ["key", "config"],
    "update": ["key", "state", "config"],
    "train": ["key", "config"],
    "policy": ["key", "state", "obs", "config", "greedy"],
}
WITH_MEMORY = {
    "initial_memory": ["state", "config", "n"],
    "policy": ["key", "state", "obs", "memory", "config", "greedy"],
}
ROWS = 4  # of `under_test.spec`


@functools.cache
def compiled(agent: types.ModuleType) -> tuple[compute.Backend, compute.Programs]:
    """Compile an agent's programs as the engine does."""
    backend = under_test.backend(agent)
    (group,) = backend.groups(0, next(searches.rounds(backend.spec)), {})
    return backend, backend.compile(group)


def config_of(agent: types.ModuleType, **fields: float) -> Any:
    """Return the configuration of `compiled`, with traced fields changed."""
    known = {name: value for name, value in fields.items() if under_test.has(agent, name)}
    return dataclasses.replace(under_test.spec(agent).runs[0].config, **known)


def start(agent: types.ModuleType, *rows: tuple[Any, int]) -> Any:
    """Return initial states of up to ROWS pairs of configuration and seed."""
    backend, programs = compiled(agent)
    return backend.start(programs, stacked(*rows))


def stacked(*rows: tuple[Any, int]) -> Any:
    runs = [plans.Run(str(i), config, seed, {}) for i, (config, seed) in enumerate(rows)]
    return compute.Inputs(*compute.stack(runs, ROWS), None, None)


def trained(
    agent: types.ModuleType, *rows: tuple[Any, int], pieces: tuple[int, ...] = (2, 2)
) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
    """Train rows, in segments of `pieces` updates -> states, diverged_at, metrics."""
    backend, programs = compiled(agent)
    inputs = stacked(*rows)
    states, at = backend.start(programs, inputs), np.zeros(ROWS, np.int32)
    done, parts = 0, []
    for count in pieces:
        states, at, now = backend.segment(programs, inputs, states, at, done + 1, count)
        parts.append(now)
        done += count
    assert done == under_test.UPDATES
    return states, at, {name: np.concatenate([part[name] for part in parts], 1) for name in now}


def row(tree: Any, index: int) -> Any:
    """Return a row as NumPy arrays, of which it is taken without a program for each shape."""
    return jax.tree.map(lambda x: x[index], jax.device_get(tree))


def leaves_differ(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)


@pytest.mark.fast
def test_signatures(agent: types.ModuleType) -> None:
    wanted = {**SIGNATURES, **(WITH_MEMORY if contract.has_memory(agent) else {})}
    for name, expected in wanted.items():
        assert list(inspect.signature(getattr(agent, name)).parameters) == expected


@pytest.mark.fast
def test_floats_are_traced_and_nothing_else(agent: types.ModuleType) -> None:
    hints = configs.field_types(agent.Config)
    floats = {name for name, hint in hints.items() if hint is float}
    marked = agent.Config(env_params={"gravity": 1.0})
    paths = jax.tree_util.tree_leaves_with_path(marked)
    leaves = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths}
    assert leaves == floats | {"env_params.gravity"}


@pytest.mark.fast
def test_every_field_has_a_help_text(agent: types.ModuleType) -> None:
    texts = configs.field_help(agent.Config)
    assert [name for name in configs.field_types(agent.Config) if not texts.get(name)] == []


@pytest.mark.fast
def test_defaults_pass_check(agent: types.ModuleType) -> None:
    agent.check(agent.Config())


def halved(config: Any) -> Any:
    """Halve every traced value, each in its own type."""
    return jax.tree.map(lambda x: type(x)(0.5 * x), config)


def test_one_trace_serves_all_traced_values_and_uses_each_key_once(
    agent: types.ModuleType,
) -> None:
    traces = []

    def train(key: jax.Array, config: Any) -> Any:
        traces.append(config)
        return agent.train(key, config)

    key, config = random.key(0), config_of(agent)
    with jax.debug_key_reuse(True):  # tracing raises KeyReuseError
        program = jax.jit(train)
        _, metrics = program.trace(key, config).out_info
        program.trace(key, halved(config))
    assert len(traces) == 1
    assert {"episode/return_sum", "episode/length_sum", "episode/count"} <= set(metrics)
    for name, value in metrics.items():
        assert value.shape == (config.num_updates,), name


def test_policy_uses_its_key_once(agent: types.ModuleType) -> None:
    config, obs = config_of(agent), under_test.some_obs(agent, 2)
    state = jax.eval_shape(agent.init, random.key(0), config)

    def twice(key: jax.Array, state: Any) -> Any:
        return random.bits(key), act(key, state, obs, config), random.bits(key)

    act = functools.partial(under_test.act, agent)
    with jax.debug_key_reuse(True):
        jax.jit(act).trace(random.key(1), state, obs, config)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(twice).trace(random.key(1), state)


def test_metrics_are_finite(agent: types.ModuleType) -> None:
    _, _, metrics = trained(agent, *[(config_of(agent), seed) for seed in range(ROWS)])
    for name, value in metrics.items():
        assert value.shape == (ROWS, under_test.UPDATES), name
        assert np.isfinite(value).all(), name


def test_traced_values_change_the_result(agent: types.ModuleType) -> None:
    config = config_of(agent)
    states, _, _ = trained(agent, (config, 0), (halved(config), 0))
    assert leaves_differ(row(states.params, 0), row(states.params, 1))


@functools.cache
def acting(agent: types.ModuleType) -> Any:
    act = functools.partial(under_test.act, agent)
    return jax.jit(act, static_argnames="greedy", compiler_options=quick.OPTIONS)


def test_two_seeds_differ_in_parameters_and_in_actions(agent: types.ModuleType) -> None:
    config = config_of(agent)
    states = start(agent, (config, 0), (config, 1))
    assert leaves_differ(row(states.params, 0), row(states.params, 1))
    state, obs = row(states, 0), under_test.some_obs(agent, 64)
    actions = [acting(agent)(random.key(seed), state, obs, config) for seed in (0, 1)]
    assert leaves_differ(*actions) == (under_test.name(agent) not in under_test.DETERMINISTIC)


def test_greedy_policy_ignores_its_key(agent: types.ModuleType) -> None:
    config = config_of(agent)
    state, obs = row(start(agent, (config, 0)), 0), under_test.some_obs(agent, 64)
    actions = [acting(agent)(random.key(k), state, obs, config, greedy=True) for k in (0, 1)]
    assert not leaves_differ(*actions)


def test_train_is_init_then_updates_with_folded_keys(
    agent: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine relies on it to cut a run into segments and to resume it without a saved key.

    An `init` and an `update` that do nothing but fold their keys into a number take the place of
    the agent's own.
    """

    def init(key: jax.Array, config: Any) -> jax.Array:
        return random.bits(key)

    def update(key: jax.Array, state: jax.Array, config: Any) -> Any:
        return state * 3 + random.bits(key), {"before": state, "key": random.key_data(key)}

    monkeypatch.setattr(agent, "init", init)
    monkeypatch.setattr(agent, "update", update)
    config, key = config_of(agent), random.key(7)
    final, metrics = jax.jit(lambda key, config: agent.train(key, config))(key, config)
    assert metrics["before"].shape == (config.num_updates,)
    state = random.bits(random.fold_in(key, 0))
    for u in range(1, config.num_updates + 1):
        assert state == metrics["before"][u - 1]
        folded = random.fold_in(key, u)
        assert (random.key_data(folded) == metrics["key"][u - 1]).all()
        state = state * 3 + random.bits(folded)
    assert state == final


def test_a_state_keeps_its_types(agent: types.ModuleType) -> None:
    """Or an update would be compiled twice, and a scan refuse its carry; in 64 bits too."""

    def types_of(tree: Any) -> list[Any]:
        return [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(tree)]

    config = under_test.tiny(agent)
    before = jax.eval_shape(agent.init, random.key(0), config)
    after, _ = jax.eval_shape(agent.update, random.key(1), before, config)
    assert types_of(before) == types_of(after)
    with jax.enable_x64(True):
        state, _ = jax.eval_shape(agent.train, random.key(0), config)
    assert jax.tree.structure(state) == jax.tree.structure(before)


RATES = ("learning_rate", "critic_learning_rate")


def with_rate(agent: types.ModuleType, rate: float) -> Any:
    return config_of(agent, **dict.fromkeys(RATES, rate))


def test_a_row_does_not_depend_on_its_neighbours(agent: types.ModuleType) -> None:
    """A row among different runs equals the same run padded with copies of itself, bitwise."""
    rows = [(with_rate(agent, 1e-3 * (i + 1)), i) for i in range(ROWS)]
    states, _, metrics = trained(agent, *rows)
    for i in (0, 1, ROWS - 1):
        alone_states, _, alone_metrics = trained(agent, rows[i])
        assert not leaves_differ(row((states, metrics), i), row((alone_states, alone_metrics), 0))


def test_a_diverged_row_is_marked_and_harms_no_neighbour(agent: types.ModuleType) -> None:
    healthy = [(config_of(agent), i) for i in range(ROWS)]
    broken = [*healthy]
    broken[2] = (with_rate(agent, float("nan")), 2)
    states, diverged_at, _ = trained(agent, *healthy)
    other_states, other_diverged_at, _ = trained(agent, *broken)
    assert diverged_at.tolist() == [0, 0, 0, 0]
    assert other_diverged_at.tolist() == [0, 0, 1, 0]
    for i in (0, 1, 3):
        assert not leaves_differ(row(states, i), row(other_states, i))


def test_segments_of_any_length_give_the_same_bits(agent: types.ModuleType) -> None:
    run = (config_of(agent), 3)
    states, _, metrics = trained(agent, run)
    for pieces in ((1, 1, 1, 1), (1, 2, 1)):
        others, _, other_metrics = trained(agent, run, pieces=pieces)
        assert not leaves_differ((states, metrics), (others, other_metrics))


def test_a_state_is_the_same_after_a_checkpoint(
    agent: types.ModuleType, tmp_path: pathlib.Path
) -> None:
    """With all its bits, shapes and types, so that a resumed run cannot differ."""
    states, _, _ = trained(agent, (config_of(agent), 3))
    checkpoint.save(tmp_path / "state", states)
    again = checkpoint.load(tmp_path / "state", jax.eval_shape(lambda: states))
    assert jax.tree.structure(again) == jax.tree.structure(states)
    for before, after in zip(jax.tree.leaves(states), jax.tree.leaves(again), strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


DRAWN: list[tuple[int, ...]] = []


def recording_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Draw random bits as usual, and note the words of their key."""
    jax.debug.callback(lambda words: DRAWN.append(tuple(words.tolist())), key)
    return jax_random.threefry_prng_impl.random_bits(key, bit_width, shape)


# A separate kind of key, so that the recorder is in no program that is compiled for the usual ones.
RECORDED = jax_random.define_prng_impl(
    key_shape=(2,),
    seed=jax_random.threefry_prng_impl.seed,
    split=jax_random.threefry_prng_impl.split,
    random_bits=recording_bits,
    fold_in=jax_random.threefry_prng_impl.fold_in,
    name="recorded",
    tag="recorded",
)


def plain(agent: types.ModuleType) -> Any:
    """Return a configuration without tricks; normalised advantages hide the scale of the reward."""
    return under_test.tiny(agent, normalize_advantage=False)


@functools.cache
def updating(agent: types.ModuleType) -> Any:
    """Return one compiled update for each set of static fields."""
    return jax.jit(agent.update, compiler_options=quick.OPTIONS)


def updated(agent: types.ModuleType, key: jax.Array, state: Any, config: Any) -> Any:
    """Update once with a key that is recorded; all who do that share one program."""
    state = jax.tree.map(np.asarray, state)  # a weakly typed array would be compiled again
    return updating(agent)(key, state, config)[0]


def test_all_keys_drawn_in_a_run_are_distinct(agent: types.ModuleType) -> None:
    """Record the key of every draw of random bits; the reuse checker misses split after fold_in."""
    config, key = plain(agent), random.key(0, impl=RECORDED)
    DRAWN.clear()
    init = jax.jit(agent.init, compiler_options=quick.OPTIONS)
    state = init(random.fold_in(key, 0), config)
    for u in range(1, config.num_updates + 1):
        state = updated(agent, random.fold_in(key, u), state, config)
    jax.effects_barrier()
    draws = config.num_updates * config.steps_per_update // config.num_envs
    assert len(DRAWN) >= draws  # at least one per rollout step
    assert len(set(DRAWN)) == len(DRAWN)


def test_gradient_clipping_is_global(agent: types.ModuleType) -> None:
    """One huge coordinate shrinks all others alike, so the direction stays.

    The bound is far below the epsilon of the optimiser, where its first step is proportional to the
    clipped gradient; above it, Adam would hide the scale.
    """
    config = under_test.tiny(agent, max_grad_norm=1e-12)
    gradient = {"a": jnp.array([300.0, 0.0, 3.0]), "b": jnp.array([400.0, 4.0])}
    params = jax.tree.map(jnp.zeros_like, gradient)
    several = hasattr(agent, "make_optimizers")
    made = agent.make_optimizers(config) if several else {"": agent.make_optimizer(config)}
    for optimizer in made.values():
        step, _ = optimizer.update(gradient, optimizer.init(params), params)
        assert float(step["a"][2] / step["a"][0]) == pytest.approx(0.01, rel=1e-3)
        assert float(step["b"][0] / step["a"][0]) == pytest.approx(400 / 300, rel=1e-3)
        ten_times = jax.tree.map(lambda x: 10 * x, gradient)
        again, _ = optimizer.update(ten_times, optimizer.init(params), params)
        chex.assert_trees_all_close(step, again, rtol=1e-4)


TRICKS: dict[str, Any] = {
    "normalize_obs": True, "normalize_advantage": True, "normalize_reward": True,
    "reward_scale": 3.0, "clip_reward": 0.5, "max_grad_norm": 1e-6,
}  # fmt: skip


def learnt(agent: types.ModuleType, config: Any) -> Any:
    """Return the parameters after all updates, from the same initial state for every `config`."""
    state = row(start(agent, (config_of(agent), 0)), 0)
    for u in range(1, under_test.UPDATES + 1):
        state = updated(agent, random.key(u, impl=RECORDED), state, config)
    return state.params


@pytest.mark.parametrize("trick", TRICKS)
def test_each_trick_changes_what_is_learnt(agent: types.ModuleType, trick: str) -> None:
    """An option without effect would make a sweep compare a run with itself."""
    if not under_test.has(agent, trick):
        pytest.skip(f"{under_test.name(agent)} has no {trick}")
    changed = dataclasses.replace(plain(agent), **{trick: TRICKS[trick]})
    agent.check(changed)
    params = [learnt(agent, config) for config in (plain(agent), changed)]
    differences = jax.tree.map(lambda a, b: float(abs(a - b).max()), *params)
    assert max(jax.tree.leaves(differences)) > 1e-6  # more than rounding
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params[1]))


def test_initialisation_is_orthogonal_unless_switched_off(agent: types.ModuleType) -> None:
    def kernel(key: jax.Array, config: Any) -> jax.Array:
        return agent.init(key, config).params["actor"]["params"]["torso"]["Dense_1"]["kernel"]

    for orthogonal in (True, False):
        config = under_test.tiny(agent, orthogonal_init=orthogonal)
        matrix = np.asarray(jax.jit(kernel, compiler_options=quick.OPTIONS)(random.key(0), config))
        assert np.allclose(matrix.T @ matrix, 2.0 * np.eye(8), atol=1e-4) == orthogonal


def test_learning_rate_follows_its_schedule(agent: types.ModuleType) -> None:
    """Halved after half of the updates by "linear", after the half-life by "robbins_monro"."""
    params, gradient = jnp.zeros(3), jnp.ones(3)
    config = under_test.tiny(agent, learning_rate_half_life=4.0, max_grad_norm=jnp.inf)
    half = config.num_updates / 2
    for schedule, after in (("constant", None), ("linear", half), ("robbins_monro", 4.0)):
        chosen = dataclasses.replace(config, learning_rate_schedule=schedule)
        steps = []
        for num_updates in (0.0, after or 3.0):
            several = hasattr(agent, "make_optimizers")
            made = (agent.make_optimizers if several else agent.make_optimizer)(chosen, num_updates)
            optimizer = made["critic"] if several else made
            steps.append(float(optimizer.update(gradient, optimizer.init(params))[0][0]))
        assert steps[1] / steps[0] == pytest.approx(0.5 if after else 1.0, rel=1e-5)


def test_a_copy_of_the_file_trains_itself(
    agent: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the sweep that it starts; test_cli.py runs a copy to its end."""
    shutil.copyfile(str(agent.__file__), tmp_path / "mine.py")
    started: list[specs.Spec] = []
    monkeypatch.setattr(session, "run", lambda spec, *_, **__: started.append(spec))
    monkeypatch.setattr(sys, "argv", ["mine.py", "--quiet", "--seed", "3"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        runpy.run_path("mine.py", run_name="__main__")
    assert left.value.code == 0
    (spec,) = started
    (run,) = spec.runs
    assert pathlib.Path(spec.agent.__file__).resolve() == tmp_path / "mine.py" and run.seed == 3
    state, metrics = jax.eval_shape(spec.agent.train, random.key(0), run.config)
    assert metrics["episode/count"].shape == (run.config.num_updates,)
    obs = jax.ShapeDtypeStruct((2, envs.from_config(run.config).obs_size), jnp.float32)
    act = functools.partial(under_test.act, spec.agent)
    acted = jax.eval_shape(act, random.key(0), state, obs, run.config)
    assert acted.shape[0] == 2
