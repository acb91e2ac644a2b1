"""The programs of a sweep: vmapped updates in compiled segments on all devices.

A segment never talks to the host. A run of a sweep is `train(key, config)` cut into segments: it
folds the same keys, so it draws the same random numbers. `engine.py` is the loop around this.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import purejaxpg
from purejaxpg import FaultError, checkpoint, contract, prng
from purejaxpg import config as configs
from purejaxpg.sweep import memory
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import spec as specs

SEGMENTS = 60  # per run: the steps of the progress bar
# Number of groups whose programs stay in memory. On the CPU one group takes more than a thousand of
# the 65,530 memory maps that Linux grants a process, and XLA crashes when they run out.
MAX_GROUPS = 8
ROWS = "rows"  # name of the mesh axis
# Up to this many activations in one gradient step of all rows, more rows make a CPU core faster.
# Beyond, they no longer fit into its cache, and batched products become slower.
CPU_ACTIVATIONS = 2**17
CPU_ROWS = 16  # more rows never helped

# Of a batch, each [rows of this process]: seeds, configurations, and each row's given arrays.
Inputs = tuple[Any, Any, Any]


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one group; every array leads with [devices * rows]."""

    start: jax.stages.Compiled  # inputs, shared -> states
    segment: jax.stages.Compiled  # inputs, shared, states, diverged_at, first, count -> ...
    score: jax.stages.Compiled  # inputs, shared, states, updates -> evaluation
    segment_length: int  # updates of a segment, at most
    sharding: NamedSharding
    rows: int  # of a unit
    compile_s: float  # the total
    trace_s: float  # the part spent in Python
    lower_s: float  # the part spent writing StableHLO; the rest is XLA's
    bytes_per_device: int  # at the peak, as planned by XLA

    @property
    def units(self) -> int:
        """Number of units computed side by side."""
        return self.sharding.mesh.size


class Backend:
    """Computes units of a sweep on jax devices, one unit per device.

    The engine knows nothing else about the computation, so tests can replace this class.
    """

    def __init__(self, spec: specs.Spec, devices: Sequence[jax.Device]) -> None:
        """Compute the runs of `spec` on `devices`."""
        self.spec = spec
        self.devices = list(devices)
        self.slots = len(self.devices)  # units computed at a time
        self.on_cpu = self.devices[0].platform == "cpu"
        self.compiled: dict[tuple[Any, ...], Programs] = {}  # of the last MAX_GROUPS groups
        self.last: tuple[Any, Any] = (
            None,
            None,
        )  # the inputs of a batch, and the same on its devices
        self.given: tuple[Any, Any] = None, None  # a mesh, and the shared given arrays on it
        self.save = checkpoint.save
        self.load = checkpoint.load
        self.to_dict = configs.to_dict

    # ---------------------------------------------------------------------------------- planning

    def groups(
        self, index: int, round_: plans.Round, stored_rows: Mapping[str, int]
    ) -> list[plans.Group]:
        """Cut a round into groups and units.

        Args:
            index: of the round, from 0.
            round_: the round.
            stored_rows: rows of each unit of an earlier plan, by its name.

        Raises:
            InputError: a run could not be scored.
        """
        for leg in round_.legs:
            contract.check_score(self.spec.agent, leg.run.config)
        return plans.groups(index, round_, signature, self.rows, stored_rows)

    def rows(self, config: Any, num_legs: int) -> int:
        """Return the rows of a unit for a group of `num_legs` legs with the sizes of `config`."""
        if self.spec.rows_per_device:
            return self.spec.rows_per_device
        return plans.even_rows(num_legs, self.slots, cpu_rows(config) if self.on_cpu else 2**31)

    def compile(self, group: plans.Group) -> Programs:
        """Compile the programs of a group, or reuse those of an earlier round.

        Raises:
            OutOfMemory: its units do not fit.
            InputError: the agent breaks the contract.
        """
        used = self.devices[: len(group.units)]  # of all units, so that resuming does not change it
        key = (group.signature, group.rows, len(used))
        programs = self.compiled.pop(key, None)
        if programs is None:
            while len(self.compiled) >= MAX_GROUPS:
                del self.compiled[next(iter(self.compiled))]
            with out_of_memory(group.rows):
                programs = build(self.spec, group, used)
            own = [device for device in used if device.process_index == jax.process_index()]
            refuse_too_large(programs, memory.limit(own))
        self.compiled[key] = programs  # the most recently used comes last
        return programs

    # --------------------------------------------------------------------------------- computing

    def inputs(self, programs: Programs, batch: Sequence[plans.Unit]) -> Inputs:
        """Return the seeds and configurations of a batch of units, padded."""
        stacked = [inputs_of(self.spec, unit, programs.rows) for unit in batch]
        return jax.tree.map(lambda *x: np.concatenate(x), *stacked)

    def start(self, programs: Programs, inputs: Inputs) -> Any:
        """Initialise every row -> states."""
        with out_of_memory(programs.rows):
            return programs.start(self.once(programs, inputs), self.shared(programs))

    def shared(self, programs: Programs) -> Any:
        """Return the given arrays shared by all rows, on every device; transferred only once."""
        mesh = programs.sharding.mesh
        if self.given[0] is not mesh:
            everywhere = NamedSharding(mesh, PartitionSpec())
            self.given = mesh, jax.device_put(self.spec.given.shared(), everywhere)
        return self.given[1]

    def once(self, programs: Programs, inputs: Inputs) -> Any:
        """Return the inputs of a batch on its devices; they are transferred only once."""
        if self.last[0] is not inputs:
            self.last = inputs, placed(programs, inputs)
        return self.last[1]

    def segment(
        self,
        programs: Programs,
        inputs: Inputs,
        states: Any,
        diverged_at: np.ndarray,
        first: int,
        count: int,
    ) -> tuple[Any, np.ndarray, dict[str, np.ndarray]]:
        """Do updates first, ..., first + count - 1 of every row.

        Args:
            programs: of the group.
            inputs: as `inputs` returns them.
            states: leaves [devices * rows, ...]; their memory is reused.
            diverged_at: [devices * rows], the first update with a non-finite number, or 0.
            first: 1 in a run's first segment.
            count: at most `programs.segment_length`.

        Returns:
            States, diverged_at, and metrics [devices * rows, count] by name.
        """
        with out_of_memory(programs.rows):
            at, shared = placed(programs, diverged_at), self.shared(programs)
            states, at, metrics = programs.segment(
                self.once(programs, inputs), shared, states, at, np.int32(first), np.int32(count)
            )
            filled = {name: own_rows(value)[:, :count] for name, value in metrics.items()}
        return states, own_rows(at), filled

    def score(
        self, programs: Programs, inputs: Inputs, states: Any, updates: int
    ) -> dict[str, np.ndarray]:
        """Evaluate every row after `updates` updates -> arrays [rows, episodes] by name."""
        with out_of_memory(programs.rows):
            scores = programs.score(
                self.once(programs, inputs), self.shared(programs), states, np.int32(updates)
            )
            return {name: own_rows(value) for name, value in scores.items()}

    # ------------------------------------------------------------------------------------ states

    def cut(self, states: Any, rows: slice) -> Any:
        """Return the states of some rows."""
        return jax.tree.map(lambda x: x[rows], states)

    def join(self, programs: Programs, trees: Sequence[Any]) -> Any:
        """Concatenate the states of a batch of units, padded, on their devices."""
        padded = [jax.tree.map(lambda x: pad(x, programs.rows), tree) for tree in trees]
        states = jax.tree.map(lambda *x: jnp.concatenate(x), *padded)
        return jax.device_put(states, programs.sharding)

    def pick(self, parts: Sequence[tuple[Any, int]]) -> Any:
        """Assemble the states of one unit from a pair (states, row) for each leg."""
        rows = [jax.tree.map(lambda x, row=row: x[row : row + 1], tree) for tree, row in parts]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)

    def template(self, unit: plans.Unit) -> Any:
        """Return the shapes of a unit's states."""
        inputs = inputs_of(self.spec, unit, len(unit.legs))
        start = functools.partial(start_rows, self.spec.agent)
        return jax.eval_shape(start, inputs, self.spec.given.shared())

    def metric_names(self, unit: plans.Unit) -> list[str]:
        """Return the names of the agent's metrics."""
        inputs, shared = inputs_of(self.spec, unit, 1), self.spec.given.shared()
        states = jax.eval_shape(functools.partial(start_rows, self.spec.agent), inputs, shared)
        update = functools.partial(update_rows, self.spec.agent)
        return sorted(jax.eval_shape(update, inputs, shared, states, np.int32(1))[1])

    def score_bytes(self, unit: plans.Unit) -> int:
        """Return the bytes of the evaluation of a run."""
        episodes = self.spec.eval_episodes
        if not contract.scores_itself(self.spec.agent):
            return 13 * episodes  # two returns, a length and a flag for each episode
        inputs, shared = inputs_of(self.spec, unit, 1), self.spec.given.shared()
        states = jax.eval_shape(functools.partial(start_rows, self.spec.agent), inputs, shared)
        score = functools.partial(score_rows, self.spec.agent, episodes)
        scores = jax.eval_shape(score, inputs, shared, states, np.int32(1))
        return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(scores))

    def facts(self, programs: Programs, group: plans.Group) -> dict[str, Any]:
        """Return the facts to record about the computation of a unit."""
        device = programs.sharding.mesh.devices.flat[0]
        return {
            "compile_s": programs.compile_s,
            "rows_per_device": programs.rows,
            "devices": programs.units,
            "device_kind": device.device_kind,
            "platform": device.platform,
            "bytes_per_device": programs.bytes_per_device,
            "steps_before": contract.steps_before(group.config),
            "unit": contract.unit(self.spec.agent),
            **self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """Return the versions of everything the numbers depend on."""
        return versions()


def placed(programs: Programs, rows: Any) -> Any:
    """Put the rows of this process on its devices, one unit on each."""
    put = functools.partial(jax.make_array_from_process_local_data, programs.sharding)
    return jax.tree.map(put, rows)


def own_rows(array: jax.Array) -> np.ndarray:
    """Copy the rows on the devices of this process to the host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


@contextlib.contextmanager
def out_of_memory(rows: int) -> Iterator[None]:
    """Turn errors of jax inside the block into OutOfMemory, for units of `rows`, or a fault."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error).splitlines()[0].rstrip(".")
        if "RESOURCE_EXHAUSTED" in text:
            raise memory.OutOfMemory(f"{rows} rows ran out of memory", rows // 2) from error
        raise FaultError(f"jax failed: {text}; finished units are kept.") from error


def refuse_too_large(programs: Programs, limit: int) -> None:
    """Raise OutOfMemory if XLA plans to use more bytes than a device has."""
    needed = programs.bytes_per_device
    if needed > limit:
        fits = int(0.9 * programs.rows * limit / needed)
        numbers = f"{needed / 2**20:.0f} MiB and {limit / 2**20:.0f} are free"
        raise memory.OutOfMemory(f"{programs.rows} rows need {numbers}", fits)


def signature(config: Any) -> str:
    """Return the static fields and the names in env_params, which determine the program."""
    hints = configs.field_types(type(config))
    values = configs.to_dict(config)
    static = {name: values[name] for name, hint in hints.items() if hint not in configs.TRACED}
    return json.dumps([static, sorted(values.get(contract.ENV_PARAMS, ()))], sort_keys=True)


def stack(runs: Sequence[plans.Run], rows: int) -> tuple[np.ndarray, Any]:
    """Batch runs for vmap, padded to `rows` with copies of the last one.

    Returns:
        Seeds [rows], and a Config whose leaves are [rows] in the dtypes of the programs.
    """
    padded = [*runs, *([runs[-1]] * (rows - len(runs)))]
    seeds = np.array([run.seed for run in padded], np.uint32)
    leaves = [run.config for run in padded]
    types = contract.traced_types(leaves[0])
    return seeds, jax.tree.map(lambda dtype, *values: np.array(values, dtype), types, *leaves)


def pad(array: jax.Array, rows: int) -> jax.Array:
    """Repeat the last row until there are `rows`."""
    array = jnp.asarray(array)
    return jnp.concatenate([array, *([array[-1:]] * (rows - array.shape[0]))])


def cpu_rows(config: Any) -> int:
    """Return the number of rows beyond which a CPU core needs more time per row."""
    return min(max(round(CPU_ACTIVATIONS / contract.activations(config)), 1), CPU_ROWS)


def build(spec: specs.Spec, group: plans.Group, devices: Sequence[jax.Device]) -> Programs:
    """Trace, lower and compile a group's three programs.

    Args:
        spec: the sweep.
        group: decides the static fields and the rows of a unit.
        devices: one for each unit that is computed at a time.
    """
    began = time.monotonic()
    length = math.ceil(group.config.num_updates / SEGMENTS)
    mesh = Mesh(np.array(devices), (ROWS,))
    traced = trace(spec, group, mesh, length)
    traced_at = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:  # XLA releases Python's lock
        # One program is compiled, or read from the cache, while the next is lowered.
        compiling = [pool.submit(program.lower().compile) for program in traced]
        lowered_at = time.monotonic()
        start, segment, score = (program.result() for program in compiling)
    return Programs(
        start=start,
        segment=segment,
        score=score,
        segment_length=length,
        sharding=NamedSharding(mesh, PartitionSpec(ROWS)),
        rows=group.rows,
        compile_s=time.monotonic() - began,
        trace_s=traced_at - began,
        lower_s=lowered_at - traced_at,
        bytes_per_device=max(map(memory.needed, (start, segment, score))),
    )


def trace(
    spec: specs.Spec, group: plans.Group, mesh: Mesh, length: int
) -> tuple[jax.stages.Traced, ...]:
    """Trace a group's start, segments of at most `length` updates, and score."""
    agent, over_rows, same = spec.agent, PartitionSpec(ROWS), PartitionSpec()
    shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=over_rows, check_vma=False)
    start = shard(functools.partial(start_rows, agent), in_specs=(over_rows, same))
    segment = shard(
        functools.partial(segment_rows, agent, length),
        in_specs=(over_rows, same, over_rows, over_rows, same, same),
    )
    score = shard(
        functools.partial(score_rows, agent, spec.eval_episodes),
        in_specs=(over_rows, same, over_rows, same),
    )
    unit, shared = inputs_of(spec, group.units[0], group.rows), spec.given.shared()
    inputs = jax.tree.map(lambda x: np.concatenate([x] * mesh.size), unit)
    states = jax.eval_shape(start, inputs, shared)
    contract.check_state(agent, states)
    diverged_at, one = np.zeros(len(inputs[0]), np.int32), np.int32(1)
    # Shardings are explicit because XLA would otherwise replicate unused arguments.
    over, everywhere = NamedSharding(mesh, over_rows), NamedSharding(mesh, same)
    starting = jax.jit(start, in_shardings=(over, everywhere))
    training = jax.jit(
        segment, donate_argnums=2, in_shardings=(over, everywhere, over, over, None, None)
    )
    scoring = jax.jit(score, in_shardings=(over, everywhere, over, None))
    # Values would have to be on the devices of all processes; shapes need not.
    inputs, shared, diverged_at = jax.eval_shape(lambda *x: x, inputs, shared, diverged_at)
    return (
        starting.trace(inputs, shared),
        training.trace(inputs, shared, states, diverged_at, one, one),
        scoring.trace(inputs, shared, states, one),
    )


def inputs_of(spec: specs.Spec, unit: plans.Unit, rows: int) -> Inputs:
    """Return the seeds, the configurations and the given arrays of a unit, padded to `rows`."""
    seeds, configurations = stack([leg.run for leg in unit.legs], rows)
    return seeds, configurations, spec.given.of_rows(seeds)


def run_keys(seeds: jax.Array, data: Any) -> jax.Array:
    """Fold `data` into the key of each run. A run's key comes from its seed; it is never split."""
    return jax.vmap(lambda seed: random.fold_in(prng.key(seed), data))(seeds)


def start_rows(agent: types.ModuleType, inputs: Inputs, shared: Any) -> Any:
    """Initialise each row -> states [rows, ...]."""
    seeds, configurations, own = inputs
    given, axes = contract.arguments(own, shared)
    return jax.vmap(agent.init, (0, 0, *axes))(run_keys(seeds, 0), configurations, *given)


def update_rows(
    agent: types.ModuleType, inputs: Inputs, shared: Any, states: Any, u: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Do update u of each row -> states [rows, ...], metrics [rows].

    Args:
        agent: the module.
        inputs: seeds [rows] uint32, configurations with leaves [rows], given arrays [rows, ...].
        shared: the arrays given to all rows, without an axis for rows.
        states: leaves [rows, ...].
        u: [] int32, from 1.
    """
    seeds, configurations, own = inputs
    given, axes = contract.arguments(own, shared)
    update = jax.vmap(agent.update, (0, 0, 0, *axes))
    return update(run_keys(seeds, u), states, configurations, *given)


def segment_rows(
    agent: types.ModuleType,
    length: int,
    inputs: Inputs,
    shared: Any,
    states: Any,
    diverged_at: jax.Array,
    first: jax.Array,
    count: jax.Array,
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """Do updates first, ..., first + count - 1 of each row.

    Args:
        agent: a trainer.
        length: size of the metrics' last axis; at least `count`.
        inputs: seeds [rows] uint32, configurations with leaves [rows], given arrays [rows, ...].
        shared: given arrays for all rows, without an axis for rows.
        states: leaves [rows, ...].
        diverged_at: [rows] int32, the first update with a non-finite number, or 0.
        first: [] int32, 1 in a run's first segment.
        count: [] int32.

    Returns:
        States, diverged_at, and metrics [rows, length] of which the first `count` are filled.
    """
    # Inlined, so that it is traced once for both the shapes and the loop.
    update = jax.jit(functools.partial(update_rows, agent), inline=True)
    shapes = jax.eval_shape(update, inputs, shared, states, first)[1]
    contract.check_metrics(agent, shapes)
    metrics = {name: jnp.zeros((len(inputs[0]), length)) for name in shapes}

    def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, diverged_at, metrics = carry
        u = first + i
        states, now = update(inputs, shared, states, u)
        newly = (diverged_at == 0) & ~finite(states.params, now)
        diverged_at = jnp.where(newly, u, diverged_at)
        return states, diverged_at, {name: metrics[name].at[:, i].set(now[name]) for name in now}

    return lax.fori_loop(0, count, step, (states, diverged_at, metrics))


def finite(params: Any, metrics: dict[str, jax.Array]) -> jax.Array:
    """Return whether the parameters and losses of each row are finite -> [rows] bool.

    Returns of episodes prove nothing: a policy with NaN parameters still collects reward.
    """
    watched = [value for name, value in metrics.items() if name.startswith(contract.WATCHED)]
    leaves = [*jax.tree.leaves(params), *watched]
    rows = [jnp.isfinite(x).reshape(x.shape[0], -1).all(axis=1) for x in leaves]
    return jnp.stack(rows).all(axis=0)


def score_rows(
    agent: types.ModuleType,
    episodes: int,
    inputs: Inputs,
    shared: Any,
    states: Any,
    updates: jax.Array,
) -> dict[str, jax.Array]:
    """Score each row after `updates` updates -> arrays [rows, episodes] by name.

    Args:
        agent: the module.
        episodes: E.
        inputs: as for `update_rows`.
        shared: as for `update_rows`.
        states: leaves [rows, ...].
        updates: [] int32, which the key depends on.
    """
    seeds, configurations, own = inputs
    given, axes = contract.arguments(own, shared)

    def score(key: jax.Array, state: Any, config: Any, *given: Any) -> dict[str, jax.Array]:
        return contract.score(key, agent, state, config, episodes, *given)

    keys = run_keys(seeds, np.uint32(2**31) + updates.astype(np.uint32))
    return jax.vmap(score, (0, 0, 0, *axes))(keys, states, configurations, *given)


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of everything the numbers depend on, including our own source."""
    packages = ("jax", "jaxlib", "gymnax", "optax", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    source = hashlib.sha256()
    for path in sorted(Path(purejaxpg.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return {**versions, "purejaxpg": purejaxpg.__version__, "source": source.hexdigest()[:16]}
