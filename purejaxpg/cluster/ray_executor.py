"""Compute units as Ray tasks on the machines of a Ray cluster.

The sweep's own process plans, keeps the ledger and commits. A task computes one unit on one device
and returns its results. If a node is lost, Ray restarts its tasks on other nodes; a unit is still
committed only once, by one process.

A task consists of plain values and arrays, including the source of a forked agent, so a worker only
needs this package with the same versions.
"""

import collections
import dataclasses
import functools
import math
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import (
    FaultError,
    InputError,
    checkpoint,
    contract,
    extras,
    signals,
    text,
    trainers,
    trees,
)
from purejaxpg.cluster import remote
from purejaxpg.sweep import engine
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import spec as specs

RETRIES = 10  # of a task whose worker or node is lost
QUEUED = 2  # tasks submitted per slot: enough to keep all busy, with few states in flight


@dataclasses.dataclass(frozen=True)
class Task:
    """A unit, and everything a worker needs to compute it."""

    agent: str  # name of a built-in agent, or of a file in `source`
    source: tuple[tuple[str, str], ...]  # names and texts of files
    eval_episodes: int
    group: int
    signature: str
    rows: int
    unit: str
    legs: tuple[ledgers.Run, ...]
    states: list[np.ndarray] | None  # leaves, of the legs' parents; None: start from `init`
    diverged_at: np.ndarray
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The given arrays of a sweep, sent to each node once; told apart by their digest."""

    digest: str
    structure: Any = dataclasses.field(default=None, compare=False)
    leaves: Sequence[np.ndarray] = dataclasses.field(default=(), compare=False)
    items: Mapping[int, int] = dataclasses.field(default_factory=dict, compare=False)


class Ray:
    """An executor that computes the units of a group on a Ray cluster."""

    def __init__(self, spec: specs.Spec, address: str | None, resources: Mapping[str, float]):
        """Join the cluster at `address`, or start one on this machine.

        Args:
            spec: the sweep.
            address: "auto", HOST:PORT or ray://HOST:PORT; None: RAY_ADDRESS, else this machine.
            resources: of each task, such as {"GPU": 1}; empty: one GPU, else one TPU chip, else one
                CPU, whichever the cluster has.

        Raises:
            InputError: the extra is not installed, or the cluster lacks the resources.
            FaultError: there is no cluster at `address`.
        """
        self.ray = extras.load("ray", "ray", "--executor ray")
        self.spec = spec
        built_in = spec.agent_name in trainers.names()
        path = Path(str(spec.agent.__file__)).resolve()
        self.source = () if built_in else trainers.texts(path)
        self.join(address)
        total = self.ray.cluster_resources()
        best = next((kind for kind in ("GPU", "TPU") if total.get(kind, 0) >= 1), "CPU")
        self.resources = dict(resources) or {best: 1.0}
        self.slots = min(math.floor(total.get(k, 0) / n) for k, n in self.resources.items())
        if self.slots < 1:
            needed = ",".join(f"{kind}={amount:g}" for kind, amount in self.resources.items())
            has = ", ".join(f"{total.get(kind, 0):g} {kind}" for kind in self.resources)
            raise InputError(f"--ray-task must fit the cluster, which has {has}, but is {needed}.")
        self.on_cpu = not {"GPU", "TPU"} & set(self.resources)
        structure, leaves = trees.encode(spec.given.arrays)
        arrays = list(map(np.asarray, leaves))
        self.given = self.ray.put(Frozen(spec.given.digest, structure, arrays, spec.given.items))

    def join(self, address: str | None) -> None:
        """Connect to the cluster without printing."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            with signals.handlers_restored():  # Ray's own would end the process without a message
                self.ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level="ERROR",
                    ignore_reinit_error=True,  # every stage of a sweep joins
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = text.first_line(error)
            raise FaultError(f"There is no Ray cluster at {address}: {reason}.") from error

    def __call__(
        self, work: engine.Work, group: plans.Group, units: Sequence[plans.Unit]
    ) -> Iterator[engine.Computed]:
        """Yield units as they finish, in any order."""
        tasks = f"{len(units)} tasks of {group.rows} rows, {self.slots} at a time"
        work.progress.say(f"Group {group.index}: {tasks}, on the Ray cluster.")
        remote = self.ray.remote(compute_unit).options(**self.options())
        queue = collections.deque(units)
        running: dict[Any, plans.Unit] = {}
        try:
            while queue or running:
                while queue and len(running) < QUEUED * self.slots:
                    unit = queue.popleft()
                    running[remote.remote(self.task(work, group, unit), self.given)] = unit
                done, _ = self.ray.wait(list(running), timeout=1.0)
                for reference in done:
                    yield self.received(work, group, running.pop(reference), reference)
        finally:
            for reference in running:
                self.ray.cancel(reference, force=True)

    def options(self) -> dict[str, Any]:
        """Return the options of every task for Ray."""
        names = {"CPU": "num_cpus", "GPU": "num_gpus"}
        known = {names[k]: n for k, n in self.resources.items() if k in names}
        others = {k: n for k, n in self.resources.items() if k not in names}
        # The sweep's own process uses only its CPU; a worker must not inherit that.
        platform = "cpu" if self.on_cpu else ""
        devices = "--xla_force_host_platform_device_count"
        # The other flags affect results.
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(devices)]
        environment = {"JAX_PLATFORMS": platform, "XLA_FLAGS": " ".join([*flags, f"{devices}=1"])}
        return {
            "num_cpus": 1 if self.on_cpu else 0,
            **known,
            "resources": others,
            "max_retries": RETRIES,
            "runtime_env": {"env_vars": environment},
        }

    def task(self, work: engine.Work, group: plans.Group, unit: plans.Unit) -> Task:
        """Return a unit as a task for a worker."""
        states, diverged_at = None, np.zeros(len(unit.legs), np.int32)
        if group.start:
            (tree,), (diverged_at,) = engine.inherited(work, [unit])
            states = leaves_of(tree)
        return Task(
            agent=Path(self.spec.agent_name).name if self.source else self.spec.agent_name,
            source=self.source,
            eval_episodes=self.spec.eval_episodes,
            group=group.index,
            signature=group.signature,
            rows=group.rows,
            unit=unit.name,
            legs=tuple(engine.planned(work.backend, unit, "tune")),
            states=states,
            diverged_at=diverged_at,
            versions=work.backend.versions(),
        )

    def received(
        self, work: engine.Work, group: plans.Group, unit: plans.Unit, reference: Any
    ) -> engine.Computed:
        """Return the results of a task, or raise its failure."""
        try:
            results = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1].rstrip(".")
            raise FaultError(
                f"Ray could not compute {unit.name}: {reason}; finished units are kept."
            ) from error
        if isinstance(results, remote.Failure):
            raise remote.as_exception(results)
        leaves, *others = results
        states = checkpoint.like(work.backend.template(unit), leaves)
        computed = engine.Computed([unit], group.rows, states, *others)
        updates = group.stop - group.start
        work.progress.advance(group, [unit], updates, computed.metrics, computed.diverged_at)
        return computed


# ------------------------------------------------------------------------------------ in a worker


def compute_unit(task: Task, given: Frozen = Frozen("")) -> tuple[Any, ...] | remote.Failure:
    """Compute a unit -> leaves of states, diverged_at, metrics, scores, facts, in NumPy."""
    try:
        return computed_here(task, given)
    except remote.EXPECTED as error:
        return remote.as_failure(error)


def computed_here(task: Task, given: Frozen) -> tuple[Any, ...]:
    """Compute a unit on this process's first device."""
    from purejaxpg import config as configs

    backend = backend_of(task.agent, task.source, task.eval_episodes, given)
    remote.refuse_other_versions(task.versions, backend.versions())
    config_class = backend.spec.agent.Config
    legs = tuple(
        plans.Leg(
            plans.Run(leg.run_id, configs.build(config_class, leg.config), leg.seed, leg.swept),
            leg.start,
            leg.stop,
            leg.parent,
        )
        for leg in task.legs
    )
    unit = plans.Unit(task.unit, legs)
    group = plans.Group(task.group, task.signature, task.rows, (unit,))
    programs = backend.compile(group)
    began = time.monotonic()
    inputs = backend.inputs(programs, [unit])
    at: engine.Position = (group.start, *first_states(backend, programs, inputs, unit, task))
    pieces = []
    for step in engine.segments(backend, programs, inputs, at, group.stop):
        at, metrics = step
        pieces.append(metrics)
    _, states, diverged_at = at
    scores = backend.score(programs, inputs, states, group.stop)
    facts = {
        **backend.facts(programs, group),
        "wall_s": time.monotonic() - began,
        "node": socket.gethostname(),
    }
    return leaves_of(states), diverged_at, engine.joined(pieces), scores, facts


def first_states(
    backend: Any, programs: Any, inputs: Any, unit: plans.Unit, task: Task
) -> tuple[Any, np.ndarray]:
    """Return the states and diverged_at that a unit's legs start from."""
    if task.states is None:
        return backend.start(programs, inputs), np.zeros(task.rows, np.int32)
    states = backend.join(programs, [checkpoint.like(backend.template(unit), task.states)])
    return states, engine.stacked([task.diverged_at], task.rows)


def leaves_of(tree: Any) -> list[np.ndarray]:
    """Copy the leaves of a pytree to the host: a worker may not know the classes of a fork."""
    import jax

    return [checkpoint.to_numpy(leaf) for leaf in jax.tree.leaves(tree)]


@functools.lru_cache(maxsize=1)  # programs take memory, and memory maps
def backend_of(
    agent: str, source: tuple[tuple[str, str], ...], eval_episodes: int, sent: Frozen
) -> Any:
    """Return this process's backend for an agent, with its compiled programs."""
    import jax

    from purejaxpg.sweep import compute

    with tempfile.TemporaryDirectory(prefix="purejaxpg-") as base:
        for name, content in source:
            file = Path(base) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, "utf-8")
        trainer = trainers.load(agent, Path(base))
        arrays = trees.decode(sent.structure, sent.leaves, trainer)
    given = contract.Given(arrays, sent.items, sent.digest)
    spec = specs.Spec("task", agent, trainer, eval_episodes=eval_episodes, given=given)
    return compute.Backend(spec, jax.devices()[:1])
