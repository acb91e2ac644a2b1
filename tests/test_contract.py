"""What every agent promises, run over every agent file in the package."""

import dataclasses
import functools
import inspect
import os
import pathlib
import shutil
import subprocess
import sys
import types
from typing import Any

import agents_under_test as under_test
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.extend import random as jax_random

from purejaxpg import config as configs
from purejaxpg.sweep import compute
from purejaxpg.sweep import plan as plans

pytestmark = pytest.mark.parametrize("agent", under_test.AGENTS, ids=under_test.name)

SIGNATURES = {
    "check": ["config"],
    "init": ["key", "config"],
    "update": ["key", "state", "config"],
    "train": ["key", "config"],
    "policy": ["key", "state", "obs", "config", "greedy"],
}


ROWS = 8  # of every unit here, so that an agent's two programs are compiled once
SEGMENT = jax.jit(compute.segment_rows, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=0)
def start(agent: types.ModuleType, seeds: Any, batch: Any) -> Any:
    """The engine's own; gymnax's weakly typed time would have `SEGMENT` compiled twice."""
    states = compute.start_rows(agent, seeds, batch)
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype), states)


def leaves_differ(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)


@pytest.mark.fast
def test_signatures(agent: types.ModuleType) -> None:
    for name, expected in SIGNATURES.items():
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


def test_traced_values_share_one_trace(agent: types.ModuleType) -> None:
    config = under_test.tiny(agent)
    changed = jax.tree.map(lambda x: 0.5 * x, config)
    chex.clear_trace_counter()  # it counts by source text, and `train` reads alike in every agent
    train = jax.jit(chex.assert_max_traces(agent.train, n=1))
    state, _ = train(random.key(0), config)
    other, _ = train(random.key(0), changed)
    assert leaves_differ(state.params, other.params)


def test_metrics_are_finite_scalars_by_update(agent: types.ModuleType) -> None:
    config = under_test.tiny(agent)
    _, metrics = jax.jit(agent.train)(random.key(0), config)
    assert {"episode/return_sum", "episode/length_sum", "episode/count"} <= set(metrics)
    for name, value in metrics.items():
        assert value.shape == (config.num_updates,), name
        assert np.isfinite(value).all(), name


def test_two_seeds_differ_in_parameters_and_in_actions(agent: types.ModuleType) -> None:
    config = under_test.tiny(agent)
    states = [jax.jit(agent.init)(random.key(seed), config) for seed in (0, 1)]
    assert leaves_differ(states[0].params, states[1].params)
    obs = under_test.some_obs(agent, 64)
    actions = [agent.policy(random.key(seed), states[0], obs, config) for seed in (0, 1)]
    assert leaves_differ(*actions) == (under_test.name(agent) not in under_test.DETERMINISTIC)


def test_greedy_policy_ignores_its_key(agent: types.ModuleType) -> None:
    config = under_test.tiny(agent)
    state = jax.jit(agent.init)(random.key(0), config)
    obs = under_test.some_obs(agent, 64)
    actions = [agent.policy(random.key(k), state, obs, config, greedy=True) for k in (0, 1)]
    assert not leaves_differ(*actions)


def test_train_is_init_then_updates_with_folded_keys(agent: types.ModuleType) -> None:
    """What lets the engine cut a run into segments, and resume it without a saved key."""
    config, key = under_test.tiny(agent), random.key(7)
    _, metrics = jax.jit(agent.train)(key, config)
    state = jax.jit(agent.init)(random.fold_in(key, 0), config)
    update = jax.jit(agent.update)
    for u in range(1, config.num_updates + 1):
        state, now = update(random.fold_in(key, u), state, config)
        for name, value in now.items():
            np.testing.assert_allclose(value, metrics[name][u - 1], rtol=1e-4, atol=1e-5)


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


def rows_of(agent: types.ModuleType, runs: list[plans.Run]) -> Any:
    """Train `runs` as one unit, with the engine's own programs -> states, metrics."""
    seeds, batch = compute.stack(runs, ROWS)
    states, count = start(agent, seeds, batch), runs[0].config.num_updates
    zeros = np.zeros(ROWS, np.int32)
    return SEGMENT(agent, count, seeds, batch, states, zeros, np.int32(1), np.int32(count))


def rates(value: float) -> dict[str, float]:
    return {"learning_rate": value, "critic_learning_rate": value}


def test_a_row_does_not_depend_on_its_neighbours(agent: types.ModuleType) -> None:
    """Row i of 8 different runs equals the same run padded with copies of itself, bitwise."""
    runs = [
        plans.Run(str(i), under_test.tiny(agent, **rates(1e-3 * (i + 1))), i, {})
        for i in range(ROWS)
    ]
    states, _, metrics = rows_of(agent, runs)
    for i in (0, 3, 7):
        alone_states, _, alone_metrics = rows_of(agent, [runs[i]])
        row = jax.tree.map(lambda x, i=i: x[i], (states, metrics))
        alone = jax.tree.map(lambda x: x[0], (alone_states, alone_metrics))
        assert not leaves_differ(row, alone)


def test_a_diverged_row_is_marked_and_harms_no_neighbour(agent: types.ModuleType) -> None:
    healthy = [plans.Run(str(i), under_test.tiny(agent), i, {}) for i in range(ROWS)]
    broken = [*healthy]
    broken[2] = plans.Run("2", under_test.tiny(agent, **rates(float("nan"))), 2, {})
    states, diverged_at, _ = rows_of(agent, healthy)
    other_states, other_diverged_at, _ = rows_of(agent, broken)
    assert diverged_at.tolist() == [0] * ROWS
    assert other_diverged_at.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    for i in (0, 1, 3, 4, 5, 6, 7):
        row, other = (jax.tree.map(lambda x, i=i: x[i], s) for s in (states, other_states))
        assert not leaves_differ(row, other)


def test_segments_of_any_length_give_the_same_bits(agent: types.ModuleType) -> None:
    run = [plans.Run("0", under_test.tiny(agent), 3, {})]
    whole, _, _ = rows_of(agent, run)
    seeds, batch = compute.stack(run, ROWS)
    count = run[0].config.num_updates
    states = start(agent, seeds, batch)
    at = np.zeros(ROWS, np.int32)
    for u in range(1, count + 1):
        states, at, _ = SEGMENT(agent, count, seeds, batch, states, at, np.int32(u), np.int32(1))
    assert not leaves_differ(whole, states)


def test_keys_are_used_once(agent: types.ModuleType) -> None:
    config = under_test.tiny(agent)
    with jax.debug_key_reuse(True):
        state, metrics = jax.jit(agent.train)(random.key(0), config)
        agent.policy(random.key(1), state, under_test.some_obs(agent, 2), config)
    assert metrics["episode/count"].shape == (config.num_updates,)


DRAWN: list[tuple[int, ...]] = []


def recording_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    """Random bits as ever, the words of their key being written down."""
    jax.debug.callback(lambda words: DRAWN.append(tuple(words.tolist())), key)
    return jax_random.threefry_prng_impl.random_bits(key, bit_width, shape)


# Keys of a kind of their own: no program compiled for the usual ones has, or is left with, the
# recorder in it.
RECORDED = jax_random.define_prng_impl(
    key_shape=(2,),
    seed=jax_random.threefry_prng_impl.seed,
    split=jax_random.threefry_prng_impl.split,
    random_bits=recording_bits,
    fold_in=jax_random.threefry_prng_impl.fold_in,
    name="recorded",
    tag="recorded",
)


def test_all_keys_drawn_in_a_run_are_distinct(agent: types.ModuleType) -> None:
    """Record the key of every draw of random bits; the reuse checker misses split after fold_in."""
    config = under_test.tiny(agent)
    DRAWN.clear()
    jax.block_until_ready(jax.jit(agent.train)(random.key(0, impl=RECORDED), config))
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


@pytest.mark.parametrize("trick", TRICKS)
def test_each_trick_changes_what_is_learnt(agent: types.ModuleType, trick: str) -> None:
    """An option that does nothing would make a sweep compare a run with itself."""
    if not under_test.has(agent, trick):
        pytest.skip(f"{under_test.name(agent)} has no {trick}")
    # Normalised advantages would hide the scale of the reward.
    plain = under_test.tiny(agent, normalize_advantage=False)
    changed = dataclasses.replace(plain, **{trick: TRICKS[trick]})
    agent.check(changed)
    states = [jax.jit(agent.train)(random.key(0), config)[0] for config in (plain, changed)]
    assert leaves_differ(states[0].params, states[1].params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[1].params))


def test_initialisation_is_orthogonal_unless_switched_off(agent: types.ModuleType) -> None:
    config = under_test.tiny(agent)
    for orthogonal in (True, False):
        chosen = dataclasses.replace(config, orthogonal_init=orthogonal)
        params = jax.jit(agent.init)(random.key(0), chosen).params
        kernel = np.asarray(params["actor"]["params"]["torso"]["Dense_1"]["kernel"])
        assert np.allclose(kernel.T @ kernel, 2.0 * np.eye(8), atol=1e-4) == orthogonal


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


def test_file_copied_elsewhere_runs(agent: types.ModuleType, tmp_path: pathlib.Path) -> None:
    shutil.copyfile(str(agent.__file__), tmp_path / "mine.py")
    words = ["--quiet", "--env-params.max-steps-in-episode", "8"]
    for field in ("total_timesteps", "num_envs", "num_steps", "max_steps", "learning_starts"):
        if under_test.has(agent, field):
            words += [f"--{field.replace('_', '-')}", str(under_test.TINY[field])]
    package_root = str(pathlib.Path(configs.__file__).resolve().parent.parent)
    result = subprocess.run(
        [sys.executable, "mine.py", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": package_root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    env = agent.Config().env
    assert f"results/mine-{env}-seed0" in result.stdout.replace("\n", "")
    assert list(tmp_path.glob("results/*/ledger.sqlite"))
