"""Compute units as Ray tasks on the machines of a Ray cluster.

The sweep's own process plans, keeps the ledger and commits. A task computes one unit on one device,
or on those of a mesh, and returns its results. If a node is lost, Ray restarts its tasks on other
nodes; a unit is still committed only once, by one process.

A task consists of plain values and arrays, including the source of a forked agent, so a worker only
needs this package with the same versions.
"""

import atexit
import collections
import dataclasses
import functools
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import (
    FaultError,
    InputError,
    checkpoint,
    contract,
    extras,
    modules,
    signals,
    text,
    trainers,
    trees,
)
from purejaxpg import config as configs
from purejaxpg.cluster import remote
from purejaxpg.sweep import engine
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import spec as specs

RETRIES = 10  # of a task whose worker or node is lost
QUEUED = 2  # tasks submitted per slot: enough to keep all busy, with few states in flight


@dataclasses.dataclass(frozen=True)
class Task:
    """A unit, and everything a worker needs to compute it."""

    agent: str  # name of a built-in agent, or of a file in `source`
    source: tuple[tuple[str, str], ...]  # names and texts of files
    modules: tuple[modules.Sent, ...]  # those of environments
    evaluation: tuple[int, int]  # episodes, and updates between evaluations within training
    mesh: specs.Mesh
    group: plans.Group  # of one unit; configurations are plain values
    start: dict[str, Any] | None  # leaves of states, and diverged_at; None: start from `init`
    versions: Mapping[str, str]


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
            InputError: the cluster lacks the resources.
            FaultError: the extra is not installed, there is no cluster at `address`, or none
                starts here.
        """
        self.ray = extras.load("ray", "ray", "--executor ray")
        self.spec = spec
        built_in = spec.agent_name in trainers.names()
        path = Path(str(spec.agent.__file__)).resolve()
        self.source = () if built_in else trainers.texts(path)
        self.modules = trainers.sent_modules(spec.environments())
        self.join(address)
        total = self.ray.cluster_resources()
        best = next((kind for kind in ("GPU", "TPU") if total.get(kind, 0) >= 1), "CPU")
        size = spec.mesh.size
        self.resources = dict(resources) or {best: float(size)}
        kind = next((kind for kind in ("GPU", "TPU") if kind in self.resources), "CPU")
        given = self.resources.get(kind, 0)
        configs.require(
            size == 1 or given >= size,
            f"--ray-task must give a task the {size} devices of mesh {spec.mesh}, as "
            f"{kind}={size}, but gives it {kind}={given:g}.",
        )
        self.slots = min(math.floor(total.get(k, 0) / n) for k, n in self.resources.items())
        if self.slots < 1:
            needed = ",".join(f"{kind}={amount:g}" for kind, amount in self.resources.items())
            has = ", ".join(f"{total.get(kind, 0):g} {kind}" for kind in self.resources)
            raise InputError(f"--ray-task must fit the cluster, which has {has}, but is {needed}.")
        self.on_cpu = not {"GPU", "TPU"} & set(self.resources)
        structure, leaves = trees.encode(spec.given.arrays)
        arrays = structure, list(map(np.asarray, leaves))
        self.given = self.ray.put(dataclasses.replace(spec.given, arrays=arrays))

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
        except Exception as error:  # Ray raises a plain one if a node does not start in time
            named = address or os.environ.get("RAY_ADDRESS")
            fault = f"There is no Ray cluster at {named}" if named else "Ray did not start here"
            raise FaultError(f"{fault}: {text.first_line(error)}.") from error

    def __call__(
        self, work: engine.Work, group: plans.Group, units: Sequence[plans.Unit]
    ) -> Iterator[plans.Batch]:
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
        count = f"{devices}={self.spec.mesh.size}"
        # The other flags affect results.
        flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(devices)]
        environment = {"JAX_PLATFORMS": platform, "XLA_FLAGS": " ".join([*flags, count])}
        return {
            "num_cpus": 1 if self.on_cpu else 0,
            **known,
            "resources": others,
            "max_retries": RETRIES,
            "runtime_env": {"env_vars": environment},
        }

    def task(self, work: engine.Work, group: plans.Group, unit: plans.Unit) -> Task:
        """Return a unit as a task for a worker."""
        start = None
        if group.start:
            (start,) = engine.inherited(work, [unit])
            start["states"] = leaves_of(start["states"])
        return Task(
            agent=Path(self.spec.agent_name).name if self.source else self.spec.agent_name,
            source=self.source,
            modules=self.modules,
            evaluation=(self.spec.eval_episodes, self.spec.eval_every),
            mesh=self.spec.mesh,
            group=of_one_unit(group, unit, work.backend.to_dict),
            start=start,
            versions=work.backend.versions(),
        )

    def received(
        self, work: engine.Work, group: plans.Group, unit: plans.Unit, reference: Any
    ) -> plans.Batch:
        """Return the results of a task, or raise its failure."""
        try:
            results = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1].rstrip(".")
            raise FaultError(
                f"Ray could not compute {unit.name}: {reason}; finished units are kept."
            ) from error
        if isinstance(results, remote.EXPECTED):
            raise results
        leaves, diverged_at, metrics, scores, facts = results
        states = checkpoint.like(work.backend.template(unit), leaves)
        done = group.stop, states, diverged_at, [metrics]
        batch = plans.Batch(group, [unit], *done, scores=scores, facts=facts)
        work.progress.advance(batch, group.stop - group.start)
        return batch


def of_one_unit(group: plans.Group, unit: plans.Unit, convert: Callable[[Any], Any]) -> plans.Group:
    """Return a group of `unit` alone, with converted configurations."""
    runs = [dataclasses.replace(leg.run, config=convert(leg.run.config)) for leg in unit.legs]
    pairs = zip(unit.legs, runs, strict=True)
    legs = tuple(dataclasses.replace(leg, run=run) for leg, run in pairs)
    return dataclasses.replace(group, units=(plans.Unit(unit.name, legs),))


# ------------------------------------------------------------------------------------ in a worker


def compute_unit(task: Task, given: contract.Given) -> tuple[Any, ...] | Exception:
    """Compute a unit -> leaves of states, diverged_at, metrics, scores, facts, in NumPy."""
    try:
        return computed_here(task, given)
    except remote.EXPECTED as error:
        return error


def computed_here(task: Task, given: contract.Given) -> tuple[Any, ...]:
    """Compute a unit on this process's first device, or on the first ones if there is a mesh."""
    if task.modules:
        modules.receive(task.modules, folder_of_modules())
    backend = backend_of(task.agent, task.source, task.evaluation, task.mesh, given)
    remote.refuse_other_versions(task.versions, backend.versions())
    build = functools.partial(configs.build, backend.spec.agent.Config)
    group = of_one_unit(task.group, task.group.units[0], build)
    (unit,) = group.units
    programs = backend.compile(group)
    began = time.monotonic()
    inputs = backend.inputs(programs, [unit])
    if task.start is None:
        batch = engine.fresh(backend, programs, group, [unit], inputs)
    else:
        states = checkpoint.like(backend.template(unit), task.start["states"])
        trees = [{**task.start, "states": states}]
        batch = engine.restored(backend, programs, group, [unit], group.start, trees)
    for _ in engine.segments(backend, programs, inputs, batch):
        pass
    engine.score(backend, programs, inputs, batch)
    facts = {
        **backend.facts(programs, group),
        "wall_s": time.monotonic() - began,
        "node": socket.gethostname(),
    }
    return leaves_of(batch.states), batch.diverged_at, batch.metrics, batch.scores, facts


def leaves_of(tree: Any) -> list[np.ndarray]:
    """Copy the leaves of a pytree to the host: a worker may not know the classes of a fork."""
    import jax

    return [checkpoint.to_numpy(leaf) for leaf in jax.tree.leaves(tree)]


@functools.cache
def folder_of_modules() -> Path:
    """Return a folder for modules that were sent, which ends with this process."""
    folder = tempfile.TemporaryDirectory(prefix="purejaxpg-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.lru_cache(maxsize=1)  # programs take memory, and memory maps
def backend_of(
    agent: str,
    source: tuple[tuple[str, str], ...],
    evaluation: tuple[int, int],
    mesh: specs.Mesh,
    sent: contract.Given,
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
        structure, leaves = sent.arrays
        given = dataclasses.replace(sent, arrays=trees.decode(structure, leaves, trainer))
    episodes, every = evaluation
    spec = specs.Spec("task", agent, trainer, (), episodes, every, mesh=mesh, given=given)
    devices = jax.devices()
    configs.require(
        len(devices) >= mesh.size,
        f"mesh {mesh} needs {mesh.size} devices in a task of Ray, but a worker has {len(devices)}.",
    )
    return compute.Backend(spec, devices[: mesh.size])
