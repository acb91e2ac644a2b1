"""The programs of a sweep: vmapped updates in compiled segments on all devices.

A unit is computed by one device, or by a group of devices if the sweep has a mesh (`layout.py`).

A segment never talks to the host. A run of a sweep is `train(key, config)` cut into segments: it
folds the same keys, so it draws the same random numbers. `engine.py` is the loop around this.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import purejaxpg
from purejaxpg import (
    FaultError,
    InputError,
    checkpoint,
    contract,
    evaluate,
    host,
    layout,
    prng,
    signals,
)
from purejaxpg import config as configs
from purejaxpg.fused import paths
from purejaxpg.sweep import memory, xla
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
# What an update of a unit costs beside that of its rows, in rows: from PPO on CartPole with 4 to 16
# rows on a core, and with 64 and 2,048 on an H200.
OVERHEAD_OF_CPU, OVERHEAD = 1.0, 180.0


class Inputs(NamedTuple):
    """What rows are trained with."""

    seeds: Any  # [rows] uint32
    configs: Any  # leaves [rows]
    own: Any  # given arrays, an item for each row; None in place of the shared ones
    shared: Any  # the other given arrays, without an axis for rows

    def given(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the given arrays as the last argument of a vmapped function, and its in_axes."""
        return contract.arguments(self.own, self.shared)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one group; every array leads with [units * rows]."""

    start: jax.stages.Compiled  # inputs -> states
    segment: jax.stages.Compiled  # inputs, states, diverged_at, first, count -> ...
    score: jax.stages.Compiled  # inputs, states, updates -> evaluation
    segment_length: int  # updates of a segment, at most
    sharding: NamedSharding  # of arrays that go over rows alone
    inputs: Inputs  # their shardings
    states: Any  # likewise
    rows: int  # of a unit
    compile_s: float  # the total
    trace_s: float  # the part spent in Python
    lower_s: float  # the part spent writing StableHLO; the rest is XLA's
    bytes_per_device: int  # at the peak, as planned by XLA
    paths: tuple[paths.Path, ...]  # of the trainer's loops: kernels, or plain JAX and why

    @property
    def units(self) -> int:
        """Number of units computed side by side."""
        return int(self.sharding.mesh.shape[ROWS])


class Backend:
    """Computes units of a sweep on jax devices, one unit per device or group of devices.

    The engine knows nothing else about the computation, so tests can replace this class.
    """

    def __init__(self, spec: specs.Spec, devices: Sequence[jax.Device]) -> None:
        """Compute the runs of `spec` on `devices`."""
        self.spec = spec
        self.devices = list(devices)
        self.slots = max(len(self.devices) // spec.mesh.size, 1)  # units computed at a time
        self.eval_every = spec.eval_every
        self.on_cpu = self.devices[0].platform == "cpu"
        self.compiled: dict[tuple[Any, ...], Programs] = {}  # of the last MAX_GROUPS groups
        self.kept: dict[str, int] = {}  # rows of the last units, by compile signature
        self.given: tuple[Any, Any] = None, None  # a mesh, and the shared given arrays on it
        self.save = checkpoint.save
        self.load = checkpoint.load
        self.to_dict = configs.to_dict

    # ---------------------------------------------------------------------------------- planning

    def groups(
        self, index: int, round_: plans.Round, stored_rows: Mapping[str, int]
    ) -> list[plans.Group]:
        """Cut a round into groups and units, as `plan.groups` does.

        Raises:
            InputError: a run could not be scored.
        """
        for leg in round_.legs:
            evaluate.check_run(self.spec.agent, leg.run.config)
        planned = plans.groups(index, round_, signature, self.rows, stored_rows)
        self.kept |= {group.signature: group.rows for group in planned}
        return planned

    def family(self, config: Any) -> str:
        """Return what the programs of a run and of a longer one have in common."""
        return signature(config, length=False)

    def rows(self, config: Any, num_legs: int) -> int:
        """Return the rows of a unit for a group of `num_legs` legs with the sizes of `config`."""
        if self.spec.rows_per_device:
            return self.spec.rows_per_device
        most = cpu_rows(config, self.spec) if self.on_cpu else 2**31
        halving = self.spec.search.halving
        if halving is None:
            return plans.even_rows(num_legs, self.slots, most)
        overhead = OVERHEAD_OF_CPU if self.on_cpu else OVERHEAD
        return self.kept.get(signature(config)) or plans.halved_rows(
            num_legs, self.slots, most, halving.rungs, halving.eta, overhead
        )

    def used(self, group: plans.Group) -> list[jax.Device]:
        """Return the devices that compute a group.

        Their number follows from that of all units, so resuming does not change it. A rung of
        halving may have fewer units than the one before, and runs the same programs on all devices.
        """
        fewest = max(len(group.units), group.devices)
        most = self.slots if self.spec.search.halving else min(fewest, self.slots)
        return self.devices[: most * self.spec.mesh.size]

    def compile(self, group: plans.Group) -> Programs:
        """Compile the programs of a group, or reuse those of an earlier round.

        Raises:
            OutOfMemory: its units do not fit.
            InputError: the agent breaks the contract.
        """
        used = self.used(group)
        key = (group.program, len(used))
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
        """Return the inputs of a batch of units, padded, on its devices."""
        return self.placed(programs, inputs_of(self.spec.given, batch, programs.rows))

    def placed(self, programs: Programs, inputs: Inputs) -> Inputs:
        """Put the inputs of this process's rows on its devices; shared arrays only once."""
        mesh = programs.sharding.mesh
        with out_of_memory(programs.rows):
            if self.given[0] is not mesh:
                self.given = mesh, jax.device_put(inputs.shared, programs.inputs.shared)
            where = programs.inputs._replace(shared=None)
            return placed(where, inputs._replace(shared=None))._replace(shared=self.given[1])

    def start(self, programs: Programs, inputs: Inputs) -> Any:
        """Initialise every row -> states."""
        with out_of_memory(programs.rows):
            return programs.start(inputs)

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
            states: leaves [units * rows, ...]; their memory is reused.
            diverged_at: [units * rows], the first update with a non-finite number, or 0.
            first: 1 in a run's first segment.
            count: at most `programs.segment_length`.

        Returns:
            States, diverged_at, and metrics [units * rows, count] by name.
        """
        with out_of_memory(programs.rows):
            at = placed(programs.sharding, diverged_at)
            states, at, metrics = programs.segment(
                inputs, states, at, np.int32(first), np.int32(count)
            )
            filled = {name: own_rows(value)[:, :count] for name, value in metrics.items()}
        return states, own_rows(at), filled

    def score(
        self, programs: Programs, inputs: Inputs, states: Any, updates: int
    ) -> dict[str, np.ndarray]:
        """Evaluate every row after `updates` updates -> arrays [rows, episodes] by name."""
        with out_of_memory(programs.rows):
            scores = programs.score(inputs, states, np.int32(updates))
            return {name: own_rows(value) for name, value in scores.items()}

    # ------------------------------------------------------------------------------------ states

    def cut(self, states: Any, rows: slice) -> Any:
        """Return the states of some rows."""
        return jax.tree.map(lambda x: x[rows], states)

    def join(self, programs: Programs, trees: Sequence[Any]) -> Any:
        """Concatenate the states of a batch of units, padded, on their devices."""
        padded = [jax.tree.map(lambda x: pad(x, programs.rows), tree) for tree in trees]
        states = jax.tree.map(lambda *x: jnp.concatenate(x), *padded)
        return jax.device_put(states, programs.states)

    def pick(self, parts: Sequence[tuple[Any, int]]) -> Any:
        """Assemble the states of one unit from a pair (states, row) for each leg."""
        rows = [jax.tree.map(lambda x, row=row: x[row : row + 1], tree) for tree, row in parts]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)

    def template(self, unit: plans.Unit) -> Any:
        """Return the shapes of a unit's states."""
        inputs = inputs_of(self.spec.given, [unit], len(unit.legs))
        return jax.eval_shape(functools.partial(start_rows, self.spec.agent), inputs)

    def metric_names(self, unit: plans.Unit, evaluated: bool) -> list[str]:
        """Return the names of the agent's metrics, and of the means of scores if `evaluated`."""
        scores = self.scores(unit) if evaluated else ()
        return sorted([*self.shapes(unit, update_rows)[1], *map(contract.evaluated, scores)])

    def scores(self, unit: plans.Unit) -> dict[str, Any]:
        """Return the shapes of the evaluation of a unit."""
        score = functools.partial(score_rows, episodes=self.spec.eval_episodes)
        return dict(self.shapes(unit, score))

    def score_bytes(self, unit: plans.Unit) -> int:
        """Return the bytes of the evaluation of a run."""
        if not contract.scores_itself(self.spec.agent):
            # Two returns, a length and a flag for each episode.
            return 13 * self.spec.eval_episodes
        scores = self.scores(unit)
        leaves = jax.tree.leaves(scores)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // len(unit.legs)

    def shapes(self, unit: plans.Unit, function: Callable[..., Any]) -> Any:
        """Return the shapes of what `function` computes from the first states of a unit."""
        inputs = inputs_of(self.spec.given, [unit], len(unit.legs))
        call = functools.partial(function, self.spec.agent)
        return jax.eval_shape(call, inputs, self.template(unit), np.int32(1))

    def facts(self, programs: Programs, group: plans.Group) -> dict[str, Any]:
        """Return the facts to record about the computation of a unit."""
        device, mesh = programs.sharding.mesh.devices.flat[0], self.spec.mesh
        return {
            **({"mesh": dataclasses.asdict(mesh)} if mesh.size > 1 else {}),
            "compile_s": programs.compile_s,
            "rows_per_device": programs.rows,
            "devices": programs.sharding.mesh.size,
            "device_kind": device.device_kind,
            "platform": device.platform,
            "bytes_per_device": programs.bytes_per_device,
            "steps_before": contract.steps_before(group.config),
            "unit": contract.unit(self.spec.agent),
            **self.versions(),
        }

    def can_save(self, config: Any) -> bool:
        """Return whether states of runs of this configuration can be stored."""
        return not contract.on_host(config)

    def versions(self) -> dict[str, str]:
        """Return the versions of everything the numbers depend on."""
        return versions()


def placed(shardings: Any, rows: Any) -> Any:
    """Put the rows of this process on its devices, each array where `shardings` has it."""
    return jax.tree.map(jax.make_array_from_process_local_data, shardings, rows)


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
        with host.errors():
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


def signature(config: Any, length: bool = True) -> str:
    """Return the static fields and the names in env_params, which determine the program.

    Without `length`, leave out the field that decides how long a run is.
    """
    hints = configs.field_types(type(config))
    values = configs.to_dict(config)
    static = {name: values[name] for name, hint in hints.items() if hint not in configs.TRACED}
    if not length:
        static.pop(contract.length(config)[0], None)
    return json.dumps([static, sorted(values.get(contract.ENV_PARAMS, ()))], sort_keys=True)


def stack(runs: Sequence[plans.Run], rows: int) -> tuple[np.ndarray, Any]:
    """Batch runs for vmap, padded to `rows` with copies of the last one.

    The leaves of the returned Config are [rows] in the dtypes of the programs, like the seeds.
    """
    padded = plans.padded(runs, rows)
    seeds = np.array([run.seed for run in padded], np.uint32)
    leaves = [run.config for run in padded]
    types = contract.traced_types(leaves[0])
    return seeds, jax.tree.map(lambda dtype, *values: np.array(values, dtype), types, *leaves)


def pad(array: jax.Array, rows: int) -> jax.Array:
    """Repeat the last row until there are `rows`."""
    array = jnp.asarray(array)
    return jnp.concatenate([array, *([array[-1:]] * (rows - array.shape[0]))])


def cpu_rows(config: Any, spec: specs.Spec | None = None) -> int:
    """Return the number of rows beyond which a CPU core needs more time per row.

    Args:
        config: of the runs.
        spec: whose given models may be larger than the configuration can know.
    """
    given = () if spec is None else (spec.agent, spec.given)
    return min(max(round(CPU_ACTIVATIONS / contract.activations(config, *given)), 1), CPU_ROWS)


def build(spec: specs.Spec, group: plans.Group, devices: Sequence[jax.Device]) -> Programs:
    """Trace, lower and compile a group's three programs, for a unit at a time on each device.

    Raises:
        InputError: the agent breaks the contract, or the mesh splits no matrix.
    """
    began = time.monotonic()
    length = math.ceil(group.config.num_updates / SEGMENTS)
    mesh = mesh_of(spec.mesh, devices)
    with paths.recorded() as found:
        *traced, inputs, states = trace(spec, group, mesh, length)
    traced_at = time.monotonic()
    options = xla.options(devices[0])
    # One program is compiled, or read from the cache, while the next is lowered. XLA releases
    # Python's lock.
    compiling = [
        signals.in_background(functools.partial(program.lower().compile, options))
        for program in traced
    ]
    lowered_at = time.monotonic()
    start, segment, score = (program.result() for program in compiling)
    return Programs(
        start=start,
        segment=segment,
        score=score,
        segment_length=length,
        sharding=NamedSharding(mesh, PartitionSpec(ROWS)),
        inputs=inputs,
        states=states,
        rows=group.rows,
        compile_s=time.monotonic() - began,
        trace_s=traced_at - began,
        lower_s=lowered_at - traced_at,
        bytes_per_device=max(map(memory.needed, (start, segment, score))),
        paths=tuple(dict.fromkeys(found)),
    )


def mesh_of(wanted: specs.Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """Return the mesh of all devices: units go over groups of them, and each group is `wanted`."""
    if wanted.size == 1:
        return Mesh(np.array(devices), (ROWS,))
    groups = np.array(devices).reshape(-1, wanted.data, wanted.model)
    return Mesh(groups, (ROWS, layout.DATA, layout.MODEL))


def shardings(inputs: Inputs, states: Any, mesh: Mesh) -> tuple[Inputs, Any]:
    """Return where the inputs and the states of a group lie.

    Raises:
        InputError: the mesh splits none of them.
    """
    of_rows = layout.shardings(inputs._replace(shared=None), mesh, ROWS)
    where = of_rows._replace(shared=layout.shardings(inputs.shared, mesh))
    of_states = layout.shardings(states, mesh, ROWS)
    parts = mesh.shape.get(layout.MODEL, 1)
    if parts > 1 and not layout.split((where, of_states)):
        raise InputError(
            f"mesh model must divide a side of a matrix of {layout.SMALL} numbers or more, such as "
            f"the outputs of a layer, but is {parts}."
        )
    return where, of_states


class Traced(NamedTuple):
    """A group's programs before they are compiled, and where their arrays lie."""

    start: jax.stages.Traced
    segment: jax.stages.Traced
    score: jax.stages.Traced
    inputs: Inputs  # shardings
    states: Any  # shardings


def trace(spec: specs.Spec, group: plans.Group, mesh: Mesh, length: int) -> Traced:
    """Trace a group's start, segments of at most `length` updates, and score."""
    agent, over_rows, same = spec.agent, PartitionSpec(ROWS), PartitionSpec()
    # The other axes of a mesh are left to XLA, which splits what a row does over them.
    shard = functools.partial(
        jax.shard_map, mesh=mesh, out_specs=over_rows, axis_names={ROWS}, check_vma=False
    )
    rows = Inputs(over_rows, over_rows, over_rows, same)
    start = shard(functools.partial(start_rows, agent), in_specs=(rows,))
    segment = shard(
        functools.partial(segment_rows, agent, length),
        in_specs=(rows, over_rows, over_rows, same, same),
    )
    score = shard(
        functools.partial(score_rows, agent, episodes=spec.eval_episodes),
        in_specs=(rows, over_rows, same),
    )
    inputs = inputs_of(spec.given, group.units[:1] * mesh.shape[ROWS], group.rows)
    states = jax.eval_shape(start, inputs)
    diverged_at, one = np.zeros(len(inputs.seeds), np.int32), np.int32(1)
    # Shardings are explicit because XLA would otherwise replicate unused arguments, and choose
    # where results lie.
    given, kept = shardings(inputs, states, mesh)
    over = NamedSharding(mesh, over_rows)
    starting = jax.jit(start, in_shardings=(given,), out_shardings=kept)
    training = jax.jit(
        segment,
        donate_argnums=1,
        in_shardings=(given, kept, over, None, None),
        out_shardings=(kept, over, over),
    )
    scoring = jax.jit(score, in_shardings=(given, kept, None), out_shardings=over)
    # Values would have to be on the devices of all processes; shapes need not.
    inputs, diverged_at = jax.eval_shape(lambda *x: x, inputs, diverged_at)
    return Traced(
        starting.trace(inputs),
        training.trace(inputs, states, diverged_at, one, one),
        scoring.trace(inputs, states, one),
        given,
        kept,
    )


def text_of(spec: specs.Spec, run: plans.Run) -> str:
    """Return the programs of `init` and `update` for a run, lowered to StableHLO."""
    unit = plans.Unit("", (plans.Leg(run, 0, 1),))
    inputs = jax.eval_shape(lambda x: x, inputs_of(spec.given, [unit], 1))
    start = functools.partial(start_rows, spec.agent)
    states = jax.eval_shape(start, inputs)
    update = jax.jit(functools.partial(update_rows, spec.agent))
    lowered = jax.jit(start).lower(inputs), update.lower(inputs, states, np.int32(1))
    return "\n".join(program.as_text() for program in lowered)


def inputs_of(given: contract.Given, units: Sequence[plans.Unit], rows: int) -> Inputs:
    """Return the inputs of units, each padded to `rows`, on the host."""
    runs = [leg.run for unit in units for leg in plans.padded(unit.legs, rows)]
    seeds, configs = stack(runs, len(runs))
    return Inputs(seeds, configs, given.of_rows(seeds), given.shared())


def run_keys(seeds: jax.Array, data: Any) -> jax.Array:
    """Fold `data` into the key of each run. A run's key comes from its seed; it is never split."""
    return jax.vmap(lambda seed: random.fold_in(prng.key(seed), data))(seeds)


def start_rows(agent: types.ModuleType, inputs: Inputs) -> Any:
    """Initialise each row -> states [rows, ...]."""
    given, axes = inputs.given()
    init = jax.vmap(functools.partial(contract.started, agent), (0, 0, *axes))
    return init(run_keys(inputs.seeds, 0), inputs.configs, *given)


def update_rows(
    agent: types.ModuleType, inputs: Inputs, states: Any, u: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
    """Do update u [] int32, from 1, of each row -> states [rows, ...], metrics [rows]."""
    given, axes = inputs.given()
    update = jax.vmap(functools.partial(contract.updated, agent), (0, 0, 0, *axes))
    return update(run_keys(inputs.seeds, u), states, inputs.configs, *given)


def segment_rows(
    agent: types.ModuleType,
    length: int,
    inputs: Inputs,
    states: Any,
    diverged_at: jax.Array,
    first: jax.Array,
    count: jax.Array,
) -> tuple[Any, jax.Array, dict[str, jax.Array]]:
    """Do updates first, ..., first + count - 1 of each row; the program of `Backend.segment`.

    The metrics are [rows, length], of which the first `count` are filled; `length` is at least
    that. `diverged_at`, `first` and `count` are int32.
    """
    # Inlined, so that it is traced once for both the shapes and the loop.
    update = jax.jit(functools.partial(update_rows, agent), inline=True)
    shapes = jax.eval_shape(update, inputs, states, first)[1]
    metrics = {name: jnp.zeros((len(inputs.seeds), length)) for name in shapes}

    def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, diverged_at, metrics = carry
        u = first + i
        states, now = update(inputs, states, u)
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
    agent: types.ModuleType, inputs: Inputs, states: Any, updates: jax.Array, episodes: int
) -> dict[str, jax.Array]:
    """Score each row over `episodes` after `updates` [] int32 -> arrays [rows, episodes] by name.

    The key depends on `updates`.
    """
    given, axes = inputs.given()

    def score(key: jax.Array, state: Any, config: Any, *given: Any) -> dict[str, jax.Array]:
        return evaluate.score_run(key, agent, state, config, episodes, *given)

    keys = run_keys(inputs.seeds, np.uint32(2**31) + updates.astype(np.uint32))
    return jax.vmap(score, (0, 0, 0, *axes))(keys, states, inputs.configs, *given)


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of everything the numbers depend on, including our own source."""
    packages = ("jax", "jaxlib", "gymnax", "optax", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages}
    source = hashlib.sha256()
    for path in sorted(Path(purejaxpg.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return {**versions, "purejaxpg": purejaxpg.__version__, "source": source.hexdigest()[:16]}
