"""Logs of the runs for TensorBoard and, offline, for Weights & Biases.

A log is a view of the committed results and is never read back. It is written in a scratch
directory and moved into place with a stamp of its run's last leg; a log with another stamp or none
counts as missing. So a process may die at any time, and logs may be requested late. A run that
continues in another round gets a new log of all its updates, including those of its ancestors.
"""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import contract, disk, extras, signals
from purejaxpg.report import curves, export, ranking
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep.store import Store

POINTS = 250  # of a curve, at most
STAMP = "stamp.txt"
_CACHED_UNITS = 8

Points = list[tuple[int, dict[str, float]]]  # environment steps, and the values after them


class TensorBoard:
    """One event file a run, in ``DIR/tensorboard/VALUES,seed=N,RUN_ID``."""

    name, command = "tensorboard", "tensorboard --logdir"

    def __init__(self) -> None:
        """Raise a FaultError if tensorboardX is not installed."""
        self.package = extras.load("tensorboardX", self.name, f"--log {self.name}")
        self.summary = importlib.import_module("tensorboardX.summary")
        self.protos = importlib.import_module("tensorboardX.proto.event_pb2")

    def folder(self, leg: dict[str, Any], population: bool) -> str:
        """Return the name of a run's log; TensorBoard shows it as the name of the run.

        The hyperparameters of a population's member change, so its name has none.
        """
        values = "" if population else _plainly(progresses.label(leg["swept"]))
        return ",".join(filter(None, [values, f"seed={leg['seed']}", leg["run_id"]]))

    def advice(self) -> str:
        """Return how to get the viewer, which is a package of its own, if it is missing."""
        missing = importlib.util.find_spec("tensorboard") is None
        return " (install the viewer with: pip install tensorboard)" if missing else ""

    def write(self, directory: Path, leg: dict[str, Any], points: Points) -> None:
        """Write the log of a run into an empty directory."""
        results = {name: leg[name] for name in ("score", "greedy_score")}
        fields = flat({**leg["config"], "seed": leg["seed"], "stage": leg["stage"]})
        # A hyperparameter, because the table of results takes only numbers.
        hyper = self.summary.hparams({**fields, "status": leg["status"]}, results)
        # TensorBoard reads the files of a directory in order of their names. Its own writer hides
        # a full disk because it writes in a thread; this one raises.
        path = directory / f"events.out.tfevents.{leg['stop']:010d}.purejaxpg"
        now, event = time.time(), self.protos.Event
        with contextlib.closing(self.package.RecordWriter(str(path))) as file:
            file.write(event(wall_time=now, file_version="brain.Event:2").SerializeToString())
            for summary in hyper:
                file.write(event(wall_time=now, summary=summary).SerializeToString())
            for step, values in [*points, (points[-1][0], results)]:
                shown = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
                content = event(wall_time=now, step=step, summary={"value": shown})
                file.write(content.SerializeToString())


class WandB:
    """One offline run of Weights & Biases a run, in ``DIR/wandb/offline-run-RUN_ID``."""

    name, command = "wandb", "wandb sync"

    def __init__(self) -> None:
        """Raise a FaultError if wandb is not installed."""
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # it would report errors even when offline
        logging.raiseExceptions = False  # on a full disk, it would print tracebacks of its own log
        self.package = extras.load("wandb", self.name, f"--log {self.name}")

    def folder(self, leg: dict[str, Any], population: bool) -> str:
        """Return the name of the directory of a run's log; `wandb sync` expects the prefix."""
        return f"offline-run-{leg['run_id']}"

    def advice(self) -> str:
        """Return nothing: the package that writes the logs also sends them."""
        return ""

    def write(self, directory: Path, leg: dict[str, Any], points: Points) -> None:
        """Write the log of a run into an empty directory."""
        label = progresses.label(leg["swept"])
        work = directory.parent / "work"
        work.mkdir()
        with self.package.init(
            project=re.sub(r"[/\\#?%:]", "-", leg["sweep"])[:128],
            id=leg["log_id"],
            group=label[:128] or None,
            name=f"{label} seed={leg['seed']}".strip()[:128],
            job_type=leg["stage"],
            config={**leg["config"], "seed": leg["seed"], "run_id": leg["run_id"]},
            dir=str(work),
            mode="offline",
            reinit="create_new",
            settings=self.package.Settings(
                silent=True, console="off", disable_git=True, disable_code=True,
                x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        ) as run:  # fmt: skip
            for step, values in points:
                run.log(values, step=step)
            known = ("score", "greedy_score", "status", "diverged_at")
            run.summary.update({name: leg[name] for name in known})
        (log,) = work.glob("wandb/offline-run-*/*.wandb")
        # wandb hides a full disk, but then there is no room for a copy either.
        shutil.copyfile(log, directory / log.name)


SINKS: dict[str, Callable[[], Any]] = {sink.name: sink for sink in (TensorBoard, WandB)}


class Logs:
    """The logs of a sweep."""

    def __init__(self, names: Sequence[str], sweep: str, say: Callable[[str], None]) -> None:
        """Prepare the sinks of these names; `sweep` is the sweep's name.

        Raises:
            FaultError: a package is not installed.
        """
        self.sinks = [SINKS[name]() for name in dict.fromkeys(names)]
        self.sweep, self.say = sweep, say
        self.failed: set[str] = set()
        self.stamps: dict[Path, str] = {}  # of the logs read or written so far

    def write(self, store: Store) -> None:
        """Write the logs that are missing; a sink that fails is skipped until `finish`."""
        for sink in self.sinks:
            reason = "" if sink.name in self.failed else self._attempt(store, sink)
            if reason:
                self.failed.add(sink.name)
                self.say(f"Note: --log {sink.name} has to wait for the end of the sweep: {reason}.")

    def finish(self, store: Store) -> None:
        """Write the missing logs, and print how to open them or why they are incomplete."""
        for sink in self.sinks:
            reason, path = self._attempt(store, sink), store.path / sink.name
            if reason:
                self.say(f"{path} is not complete: {reason}; the same command completes it.")
            else:
                self.say(f"Logs: {sink.command} {path}{sink.advice()}")

    def _attempt(self, store: Store, sink: Any) -> str:
        """Write the missing logs; return the reason of a failure."""
        try:
            self._write_missing(store, sink)
        except Exception as error:  # any failure: the results are safe, and the sweep continues
            return " ".join(str(error).split()).rstrip(".") or type(error).__name__
        return ""

    def _write_missing(self, store: Store, sink: Any) -> None:
        legs = [leg for leg in store.ledger.legs() if leg["status"] != "pending"]
        facts = {unit["name"]: unit["facts"] for unit in store.ledger.units()}
        read = functools.lru_cache(_CACHED_UNITS)(store.arrays)
        identity = store.ledger.identity
        sweep_id = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        population = ranking.is_population(identity)
        for run_id, chain in curves.chains(legs).items():
            leg = chain[-1]
            target = store.path / sink.name / sink.folder(leg, population)
            stamp = stamp_of(leg)
            # While a damaged unit waits to be recomputed, a run may lack its beginning.
            if chain[0]["start"] or self._stamp(target) == stamp:
                continue
            if signals.pending():
                return
            stopped = leg["status"] == "done" and leg["stop"] < leg["total"]
            shown = {**leg, "sweep": self.sweep, "log_id": f"{run_id}-{sweep_id[:8]}"}
            shown["status"] = "stopped" if stopped else leg["status"]
            points = points_of(chain, read, facts[chain[0]["unit"]])
            with disk.faults("write", target):
                put(target, stamp, functools.partial(sink.write, leg=shown, points=points))
            self.stamps[target] = stamp

    def _stamp(self, target: Path) -> str:
        """Return the stamp of a log; empty if there is none."""
        if target not in self.stamps:
            with contextlib.suppress(OSError):
                self.stamps[target] = (target / STAMP).read_text("utf-8")
        return self.stamps.get(target, "")


def _plainly(label: str) -> str:
    """Return a label as a part of a file name."""
    return re.sub(r"[^\w.=+\[\]-]+", ",", label)[:180]


def stamp_of(leg: dict[str, Any]) -> str:
    """Return the stamp of the log that ends with this leg."""
    names = ("unit", "stop", "status", "diverged_at", "score", "greedy_score")
    return "".join(f"{name} {leg[name]}\n" for name in names)


def put(target: Path, stamp: str, fill: Callable[[Path], None]) -> None:
    """Replace a directory atomically by one that `fill` fills.

    Args:
        target: the directory.
        stamp: written into it as its last file.
        fill: writes into an empty directory.
    """
    # Outside the directory of logs, whose readers would find the scratch directory, too.
    scratch = target.parent.with_name(f".{target.parent.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    new = scratch / "new"
    try:
        new.mkdir(parents=True)
        fill(new)
        (new / STAMP).write_text(stamp, "utf-8")
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            os.replace(target, scratch / "old")
        os.replace(new, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def points_of(
    chain: Sequence[dict[str, Any]],
    read: Callable[[str], Mapping[str, np.ndarray]],
    facts: dict[str, Any],
) -> Points:
    """Return the training metrics of consecutive legs in at most POINTS bins of updates.

    Args:
        chain: legs, each continuing the one before.
        read: gives the arrays of a unit.
        facts: of the first leg's unit.

    Returns:
        The means of each bin, at its end. Those of episodes are over the episodes that ended in
        the bin, and are left out if none did. Of evaluations within training, the last in the bin.
    """
    parts = [{name: rows[leg["row"]] for name, rows in read(leg["unit"]).items()} for leg in chain]
    apart = (export.EVALUATION, contract.EVALUATED)
    names = [name for name in parts[0] if not name.startswith(apart)]
    evaluated = [name for name in parts[0] if name.startswith(contract.EVALUATED)]
    within = {name: np.concatenate([p[name] for p in parts]) for name in evaluated}
    updates = sum(leg["stop"] - leg["start"] for leg in chain)
    edges = np.linspace(0, updates, min(POINTS, updates) + 1).round().astype(int)
    steps = export.env_steps(facts, edges[1:])
    with np.errstate(invalid="ignore"):  # a diverged run may add inf to -inf
        sums = {
            name: np.add.reduceat(np.concatenate([p[name] for p in parts], dtype=float), edges[:-1])
            for name in names
        }
    return [
        (int(step), means(row, end - start) | last_known(within, start, end))
        for step, start, end, *values in zip(
            steps, edges[:-1], edges[1:], *sums.values(), strict=True
        )
        for row in [dict(zip(names, map(float, values), strict=True))]
    ]


def last_known(metrics: Mapping[str, np.ndarray], start: int, end: int) -> dict[str, float]:
    """Return the last value of each metric in updates start + 1, ..., end that is not NaN."""
    own = {name: values[start:end] for name, values in metrics.items()}
    known = {name: values[np.isfinite(values)] for name, values in own.items()}
    return {name: float(values[-1]) for name, values in known.items() if values.size}


def means(sums: Mapping[str, float], updates: float) -> dict[str, float]:
    """Return the means over `updates`; sums over episodes become means over episodes."""
    averages, episodes = {}, sums.get(contract.EPISODE_COUNT)
    for name, value in sums.items():
        of_episodes = name.startswith(contract.EPISODE) and name.endswith("_sum")
        if not of_episodes:
            averages[name] = value / float(updates)
        elif episodes:
            averages[name.removesuffix("_sum")] = value / episodes
    return averages


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"hidden": [8], "env_params": {"gravity": 9.8}} -> hidden "[8]", env_params.gravity 9.8."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, dict)
        fields |= flat(value, f"{before}{name}.") if inner else {f"{before}{name}": value}
    # TensorBoard omits numbers that are not finite.
    endless = {name: str(value) for name, value in fields.items() if value in (np.inf, -np.inf)}
    return {name: export.plain(value) for name, value in fields.items()} | endless
