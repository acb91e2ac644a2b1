"""Runs the units of a sweep: the host loops over compiled segments of vmapped updates.

Nothing inside a segment talks to the host. Progress, stopping and storing happen between
segments, and a run of a sweep is `train(key, config)` cut into pieces: the same folded keys, so
the same random numbers.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.sharding import Mesh, PartitionSpec

import purejaxpg
from purejaxpg import FaultError, InputError, envs, evaluate
from purejaxpg import config as configs
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

SEGMENTS = 60  # per run: the steps of the progress bar
ROWS = "rows"  # name of the mesh axis


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one group; every array leads with [devices * rows]."""

    start: Callable[..., Any]  # seeds, configs -> states
    segment: Callable[..., Any]  # seeds, configs, states, diverged_at, first, count -> ...
    score: Callable[..., Any]  # seeds, configs, states -> evaluation
    segment_length: int  # room for so many updates
    compile_s: float


def run(
    spec: specs.Spec,
    store: stores.Store,
    devices: Sequence[jax.Device],
    progress: progresses.Progress,
) -> None:
    """Run what is pending, and commit each unit as it ends.

    Args:
        spec: the sweep.
        store: where results go; units it already holds are not run again.
        devices: each computes one unit at a time.
        progress: told what happens.
    """
    groups = plans.groups(spec, len(devices), devices[0].platform, stored_rows(store))
    store.plan({unit.name: planned(unit) for group in groups for unit in group.units})
    pending = set(store.pending())
    work = sum(
        sum(len(unit.runs) for unit in group.units if unit.name in pending)
        * group.config.num_updates
        * group.config.steps_per_update
        for group in groups
    )
    progress.begin(spec, groups, work)
    warn_of_other_versions(store, progress)
    for group in groups:
        units = [unit for unit in group.units if unit.name in pending]
        try:
            if units:
                run_group(spec, store, group, units, devices, progress)
        except jax.errors.JaxRuntimeError as error:
            text = str(error).splitlines()[0].rstrip(".")
            full = "RESOURCE_EXHAUSTED" in text
            hint = "a lower rows_per_device needs less memory" if full else "what is done is kept"
            raise FaultError(f"jax failed: {text}; {hint}.") from error


def warn_of_other_versions(store: stores.Store, progress: progresses.Progress) -> None:
    """Say so where units were computed by other versions than those that go on now."""
    now = versions()
    for unit in store.units():
        facts = unit["facts"] or {}
        changed = [name for name in now if name in facts and facts[name] != now[name]]
        if changed:
            was = ", ".join(f"{name} {facts[name]}" for name in changed)
            progress.say(f"Note: {unit['name']} was computed with {was}; the bits may differ now.")
            return


def planned(unit: plans.Unit) -> list[stores.Run]:
    """Describe a unit's runs in plain values."""
    return [
        stores.Run(run.run_id, configs.to_dict(run.config), run.seed, dict(run.swept))
        for run in unit.runs
    ]


def stored_rows(store: stores.Store) -> dict[str, int]:
    """Return the number of runs in each unit that an earlier process planned."""
    return {unit["name"]: unit["rows"] for unit in store.units()}


def run_group(
    spec: specs.Spec,
    store: stores.Store,
    group: plans.Group,
    units: Sequence[plans.Unit],
    devices: Sequence[jax.Device],
    progress: progresses.Progress,
) -> None:
    """Compile the group's programs and run `units`, as many at a time as there are devices."""
    progress.compiling(group)
    used = devices[: len(group.units)]  # not of the pending ones: resuming must not change it
    programs = build(spec, group, used)
    progress.compiled(group, programs.compile_s)
    for batch in batched(units, len(used)):
        began = time.monotonic()
        states, diverged_at, metrics, scores = run_units(group, batch, programs, progress)
        facts = {
            "wall_s": time.monotonic() - began,
            "compile_s": programs.compile_s,
            "steps_per_update": group.config.steps_per_update,
            "steps_before": steps_before(group.config),
            "env_steps": steps_before(group.config)
            + group.config.steps_per_update * group.config.num_updates,
            "rows_per_device": group.rows,
            "devices": len(used),
            "device_kind": used[0].device_kind,
            "platform": used[0].platform,
            **versions(),
        }
        for i, unit in enumerate(dict.fromkeys(batch)):
            rows = slice(i * group.rows, i * group.rows + len(unit.runs))
            cut = functools.partial(jax.tree.map, lambda x, rows=rows: x[rows])
            commit(store, unit, cut(states), cut(metrics), cut(scores), diverged_at[rows], facts)
        progress.committed(len(set(batch)))


def steps_before(config: Any) -> int:
    """Return the environment steps that `init` takes to fill a replay buffer."""
    return int(getattr(config, "learning_starts", 0))


def run_units(
    group: plans.Group,
    batch: Sequence[plans.Unit],
    programs: Programs,
    progress: progresses.Progress,
) -> tuple[Any, np.ndarray, dict[str, np.ndarray], Any]:
    """Train and score `batch`, one unit a device -> states, diverged_at, metrics, scores."""
    stacked = [plans.stack(unit.runs, group.rows) for unit in batch]
    seeds, batch_configs = jax.tree.map(lambda *x: np.concatenate(x), *stacked)
    states = programs.start(seeds, batch_configs)
    diverged_at = np.zeros(len(seeds), np.int32)
    pieces = []
    total, length = group.config.num_updates, programs.segment_length
    for first in range(1, total + 1, length):
        count = min(length, total + 1 - first)
        states, diverged_at, metrics = programs.segment(
            seeds, batch_configs, states, diverged_at, np.int32(first), np.int32(count)
        )
        pieces.append({name: np.asarray(value)[:, :count] for name, value in metrics.items()})
        progress.advance(group, batch, count, pieces[-1], np.asarray(diverged_at))
    progress.scoring()
    scores = {k: np.asarray(v) for k, v in programs.score(seeds, batch_configs, states).items()}
    metrics = {name: np.concatenate([p[name] for p in pieces], axis=1) for name in pieces[0]}
    return states, np.asarray(diverged_at), metrics, scores


def commit(
    store: stores.Store,
    unit: plans.Unit,
    states: Any,
    metrics: dict[str, np.ndarray],
    scores: dict[str, np.ndarray],
    diverged_at: np.ndarray,
    facts: dict[str, Any],
) -> None:
    """Store one unit's results, padding already cut off."""
    outcomes = [
        stores.Outcome(
            run_id=run.run_id,
            status="diverged" if diverged_at[row] else "done",
            score=float(scores["evaluation/return"][row].mean()),
            greedy_score=float(scores["evaluation/greedy_return"][row].mean()),
            diverged_at=int(diverged_at[row]) or None,
        )
        for row, run in enumerate(unit.runs)
    ]
    store.commit(unit.name, {**metrics, **scores}, states, outcomes, facts)


def build(spec: specs.Spec, group: plans.Group, devices: Sequence[jax.Device]) -> Programs:
    """Compile a group's three programs for `devices`."""
    began = time.monotonic()
    refuse_incomplete(spec.agent, group.config)
    agent, length = spec.agent, math.ceil(group.config.num_updates / SEGMENTS)
    horizon = max(
        envs.horizon(envs.from_config(run.config), run.config.env_params)
        for unit in group.units
        for run in unit.runs
    )
    over_rows, same = PartitionSpec(ROWS), PartitionSpec()
    shard = functools.partial(
        jax.shard_map, mesh=Mesh(np.array(devices), (ROWS,)), out_specs=over_rows, check_vma=False
    )
    start = shard(functools.partial(start_rows, agent), in_specs=(over_rows, over_rows))
    segment = shard(
        functools.partial(segment_rows, agent, length), in_specs=(over_rows,) * 4 + (same, same)
    )
    score = shard(
        functools.partial(score_rows, agent, spec.eval_episodes, horizon), in_specs=(over_rows,) * 3
    )
    stacked = plans.stack(group.units[0].runs, group.rows)
    seeds, rows = jax.tree.map(lambda x: np.concatenate([x] * len(devices)), stacked)
    states = jax.eval_shape(start, seeds, rows)
    diverged_at, one = np.zeros(len(seeds), np.int32), np.int32(1)
    lowered = (
        jax.jit(start).lower(seeds, rows),
        jax.jit(segment, donate_argnums=2).lower(seeds, rows, states, diverged_at, one, one),
        jax.jit(score).lower(seeds, rows, states),
    )
    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA compiles without Python's lock
        starts, trains, scores = pool.map(lambda program: program.compile(), lowered)
    return Programs(starts, trains, scores, length, time.monotonic() - began)


def run_keys(seeds: jax.Array, data: Any) -> jax.Array:
    """Fold `data` into the key of each run; a run's key is its seed's and is never split."""
    return jax.vmap(lambda seed: random.fold_in(random.key(seed, impl="threefry2x32"), data))(seeds)


def start_rows(agent: types.ModuleType, seeds: jax.Array, configs: Any) -> Any:
    """Initialise each row -> states [rows, ...]."""
    return jax.vmap(agent.init)(run_keys(seeds, 0), configs)


def segment_rows(
    agent: types.ModuleType,
    length: int,
    seeds: jax.Array,
    configs: Any,
    states: Any,
    diverged_at: jax.Array,
    first: jax.Array,
    count: jax.Array,
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """Do updates first, ..., first + count - 1 of each row.

    Args:
        agent: the module.
        length: room for so many updates in the metrics; at least `count`.
        seeds: [rows] uint32.
        configs: leaves [rows].
        states: leaves [rows, ...].
        diverged_at: [rows] int32, the first update with a non-finite number, or 0.
        first: [] int32, 1 in a run's first segment.
        count: [] int32.

    Returns:
        States, diverged_at, and metrics [rows, length] of which the first `count` are filled.
    """
    update = jax.vmap(agent.update)
    shapes = jax.eval_shape(update, run_keys(seeds, 1), states, configs)[1]
    metrics = {name: jnp.zeros((len(seeds), length)) for name in shapes}

    def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, diverged_at, metrics = carry
        u = first + i
        states, now = update(run_keys(seeds, u), states, configs)
        newly = (diverged_at == 0) & ~finite(states.params, now)
        diverged_at = jnp.where(newly, u, diverged_at)
        return states, diverged_at, {name: metrics[name].at[:, i].set(now[name]) for name in now}

    return lax.fori_loop(0, count, step, (states, diverged_at, metrics))


def finite(params: Any, metrics: dict[str, jax.Array]) -> jax.Array:
    """Tell of each row whether its parameters and losses are finite -> [rows] bool.

    Returns of episodes do not tell: a policy whose parameters are NaN still collects reward.
    """
    watched = [value for name, value in metrics.items() if name.startswith("loss/")]
    leaves = [*jax.tree.leaves(params), *watched]
    rows = [jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1) for x in leaves]
    return jnp.stack(rows).all(axis=0)


def score_rows(
    agent: types.ModuleType,
    episodes: int,
    horizon: int,
    seeds: jax.Array,
    configs: Any,
    states: Any,
) -> dict[str, jax.Array]:
    """Evaluate each row after its last update -> returns [rows, episodes]."""
    after = configs.num_updates

    score = functools.partial(evaluate.score, agent=agent, num_episodes=episodes, max_steps=horizon)
    keys = run_keys(seeds, np.uint32(2**31 + after))
    return jax.vmap(lambda key, state, config: score(key, state=state, config=config))(
        keys, states, configs
    )


def batched(units: Sequence[plans.Unit], size: int) -> Iterator[list[plans.Unit]]:
    """Yield lists of exactly `size` units, the last one filled up with copies."""
    for cut in range(0, len(units), size):
        batch = list(units[cut : cut + size])
        yield batch + [batch[-1]] * (size - len(batch))


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on, the package's own source included."""
    packages = ("jax", "jaxlib", "gymnax", "optax", "flax", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    source = hashlib.sha256()
    for path in sorted(Path(purejaxpg.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return {**found, "purejaxpg": purejaxpg.__version__, "source": source.hexdigest()[:16]}


def refuse_incomplete(agent: types.ModuleType, config: Any) -> None:
    """Raise an InputError unless the agent's states and metrics are what the engine reads."""
    key = random.key(0)
    state = jax.eval_shape(agent.init, key, config)
    name = agent.__name__.rpartition(".")[2]
    if not hasattr(state, "params"):
        raise InputError(f"The state of agent {name!r} must have the attribute params.")
    _, metrics = jax.eval_shape(agent.update, key, state, config)
    for metric in ("episode/return_sum", "episode/length_sum", "episode/count"):
        if metric not in metrics:
            raise InputError(f"The metrics of agent {name!r} must hold {metric!r}.")
    for metric, value in metrics.items():
        if value.shape != ():
            raise InputError(
                f"The metric {metric!r} of agent {name!r} must be a scalar, "
                f"but has shape {list(value.shape)}."
            )
