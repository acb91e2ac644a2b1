"""Run a sweep: round by round, unit by unit, segment by segment.

The backend (`compute.py`) computes. This module decides on the order, stores the results and
handles failures. It does not import jax.

A process may be killed at any moment and the same command ends with the same arrays: units are
committed whole, units in progress leave snapshots, and the rounds of a search follow from the
committed results.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from purejaxpg import FaultError, contract, signals, text
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import memory, snapshots
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import store as stores

if TYPE_CHECKING:
    from purejaxpg.sweep import compute


@dataclasses.dataclass
class Work:
    """The objects that the functions below share."""

    store: stores.Store
    backend: "compute.Backend"
    progress: progresses.Progress
    snapshots: snapshots.Snapshots
    executor: "Executor"
    after_commit: Callable[[], None]


# Computes some units of a group, on any machine, and yields them as they finish.
Executor = Callable[[Work, plans.Group, Sequence[plans.Unit]], Iterator[plans.Batch]]


def run(
    rounds: searches.Rounds,
    store: stores.Store,
    backend: "compute.Backend",
    progress: progresses.Progress,
    snapshot_every_s: float = 30.0,
    executor: Executor | None = None,
    after_commit: Callable[[], None] = lambda: None,
) -> None:
    """Compute everything that is not committed yet, round by round.

    Args:
        rounds: the rounds to compute; `search.rounds` of a spec.
        store: receives the results; its committed units are not computed again.
        backend: computes.
        progress: reports to the user.
        snapshot_every_s: minimum time between two snapshots of the units in progress.
        executor: computes units; None: this process does.
        after_commit: called after each commit. A signal may be pending until it returns.
    """
    shots = snapshots.Snapshots(
        store.path / "progress", backend.save, backend.load, snapshot_every_s
    )
    work = Work(store, backend, progress, shots, executor or on_this_machine, after_commit)
    damaged = store.damaged()
    store.ledger.reset(damaged)  # computed again
    for unit, reason in damaged.items():
        progress.say(f"Note: {reason.rstrip('.')}; the unit {unit} is computed again.")
    warn_of_other_versions(work)
    known: list[plans.Round] = []
    for round_ in searches.played(rounds, lambda index, _: results(store, index)):
        known.append(round_)
        run_round(work, known)


def unfinished(rounds: searches.Rounds, store: stores.Store) -> bool:
    """Return whether any unit of `rounds` is uncommitted or damaged, or a state can be released."""
    if store.ledger.pending() or store.damaged():
        return True
    known = {(leg["round"], leg["run_id"]) for leg in store.ledger.legs(planned=True)}
    all_rounds = searches.played(rounds, lambda index, _: results(store, index))
    # A ledger that was rebuilt may lack units of any round.
    legs = ((index, leg) for index, round_ in enumerate(all_rounds) for leg in round_.legs)
    more = any((index, leg.run.run_id) not in known for index, leg in legs)
    return more or any(store.superseded(index) for index in {index for index, _ in known})


def results(store: stores.Store, index: int) -> searches.Results:
    """Return the results of the legs of a round."""
    return {
        leg["run_id"]: searches.Result(leg["score"], leg["status"] == "diverged")
        for leg in store.ledger.legs()
        if leg["round"] == index
    }


def warn_of_other_versions(work: Work) -> None:
    """Warn if committed units were computed with other versions than those in use now."""
    now = work.backend.versions()
    for unit in work.store.ledger.units():
        facts = unit["facts"] or {}
        changed = [name for name in now if name in facts and facts[name] != now[name]]
        if changed and work.store.ledger.pending():
            was = ", ".join(f"{name} {facts[name]}" for name in changed)
            note = f"Note: {unit['name']} was computed with {was}; the bits may differ now."
            work.progress.say(note)
            return


def run_round(work: Work, known: Sequence[plans.Round]) -> None:
    """Plan the last of the `known` rounds and compute its pending units.

    If memory runs out, the group is planned again with fewer rows.
    """
    index, round_ = len(known) - 1, known[-1]
    sizes = dict[str, int]()
    while True:
        groups = cut(work.backend, known, work.store.ledger, sizes)
        every_unit = [unit for group in groups for unit in group.units]
        plan = {unit.name: planned(work.backend, unit, round_.stage) for unit in every_unit}
        padded = {unit.name: group.rows for group in groups for unit in group.units}
        work.store.ledger.plan(plan, index, padded)
        bring_back(work, known)
        pending = set(work.store.ledger.pending(index))
        # A process may have been killed after a commit and before it removed the snapshots.
        work.snapshots.discard(unit for unit in every_unit if unit.name not in pending)
        work.progress.round_begins(index, round_, groups, pending)
        for group in groups:
            units = [unit for unit in group.units if unit.name in pending]
            try:
                if units:
                    run_group(work, group, units)
            except memory.OutOfMemory as error:
                sizes |= shrink(work, index, group, error)
                break
        else:
            # Nothing needs the states of the previous round any more, unless a run ended there.
            work.store.release(work.store.superseded(index - 1))
            return


def cut(
    backend: "compute.Backend",
    known: Sequence[plans.Round],
    ledger: ledgers.Ledger,
    sizes: Mapping[str, int],
) -> list[plans.Group]:
    """Cut the last of the `known` rounds into groups and units, as large as those in the ledger.

    If the sweep grew, units of new runs are as large as those of the old ones, and several devices
    compute them if several computed those, since both decide on the bits of a run. `sizes` are rows
    of units that are to be smaller.
    """
    index, round_ = len(known) - 1, known[-1]
    stored = {unit["name"]: unit["size"] for unit in ledger.units()} | dict(sizes)
    groups = backend.groups(index, round_, stored)
    if not round_.grown:
        return groups
    before = units_before(backend, known, ledger)
    found = {group.index: before.get(backend.family(group.config)) for group in groups}
    like = {number: unit for number, unit in found.items() if unit}
    rows = {plans.unit_name(index, number, 0): unit["size"] for number, unit in like.items()}
    several = [n for n, unit in like.items() if side_by_side(unit["facts"] or {}) > 1]
    return [
        dataclasses.replace(group, devices=2 if group.index in several else 1)
        for group in backend.groups(index, round_, rows | stored)
    ]


def side_by_side(facts: Mapping[str, Any]) -> int:
    """Return the number of units that were computed at a time, by the facts of one of them."""
    return facts.get("devices", 1) // math.prod(facts.get("mesh", {}).values())


def units_before(
    backend: "compute.Backend", known: Sequence[plans.Round], ledger: ledgers.Ledger
) -> dict[str, dict[str, Any]]:
    """Return a unit of the rounds before the last of the `known` ones, by `Backend.family`."""
    configs = {leg.run.run_id: leg.run.config for each in known[:-1] for leg in each.legs}
    units = {unit["name"]: unit for unit in ledger.units()}
    return {
        backend.family(configs[leg["run_id"]]): units[leg["unit"]]
        for leg in ledger.legs(planned=True)
        if leg["row"] == 0 and leg["run_id"] in configs
    }


def bring_back(work: Work, known: Sequence[plans.Round]) -> None:
    """Compute again the released states that pending units of the last round start from.

    They are needed only after damage, or if memory runs out in a group that was damaged.
    """
    index = len(known) - 1
    needed = work.store.ledger.released_parents(index)
    if not needed:
        return
    work.store.ledger.reset(needed)
    work.progress.say(
        f"Note: pending units of round {index + 1} start from states that were released; "
        f"computing {text.count(len(needed), 'unit')} of earlier rounds again."
    )
    for earlier in range(1, index + 1):
        if work.store.ledger.pending(earlier - 1):
            run_round(work, known[:earlier])


def planned(backend: "compute.Backend", unit: plans.Unit, stage: str) -> list[ledgers.Run]:
    """Return a unit's legs as plain values for the ledger."""
    return [
        ledgers.Run(
            run_id=leg.run.run_id,
            config=backend.to_dict(leg.run.config),
            seed=leg.run.seed,
            swept=dict(leg.run.swept),
            stage=stage,
            start=leg.start,
            stop=leg.stop,
            total=leg.run.config.num_updates,
            parent=leg.parent,
        )
        for leg in unit.legs
    ]


def shrink(work: Work, index: int, group: plans.Group, error: memory.OutOfMemory) -> dict[str, int]:
    """Choose fewer rows for a group that does not fit, and discard its results with more rows.

    Results depend on the size of a unit, so a group never mixes two sizes.
    """
    rows = min(error.fits, group.rows - 1)
    if rows < 1:
        raise FaultError(
            f"Out of memory: {error}, and a unit cannot be smaller; use "
            f"{contract.smaller(group.config)}."
        ) from error
    done = [unit.name for unit in group.units if unit.name not in work.store.ledger.pending(index)]
    work.store.ledger.reset(done)
    work.snapshots.discard(group.units)
    note = (
        f"Out of memory in round {index}, group {group.index}: {error}; "
        f"it is computed with {rows} rows a device instead."
    )
    work.store.ledger.note(note)
    work.progress.say(note)
    return {plans.unit_name(index, group.index, 0): rows}


def run_group(work: Work, group: plans.Group, units: Sequence[plans.Unit]) -> None:
    """Compute `units` and commit each as it finishes."""
    for batch in work.executor(work, group, units):
        before = 0 if group.start else batch.facts["steps_before"]
        per_update = group.config.steps_per_update
        batch.facts |= {
            "steps_per_update": per_update,
            "env_steps": before + per_update * (group.stop - group.start),
        }
        every_row = {**batch.metrics, **batch.scores}
        for unit, rows in batch.rows():
            arrays = {name: value[rows] for name, value in every_row.items()}
            state = work.backend.cut(batch.states, rows)
            ended = outcomes(unit, arrays, batch.diverged_at[rows])
            note_unfinished(work, unit, arrays.get(contract.FINISHED))
            work.store.commit(unit.name, arrays, state, ended, batch.facts, work.backend.save)
            work.snapshots.discard([unit])
        work.after_commit()
        work.progress.committed()


def note_unfinished(work: Work, unit: plans.Unit, finished: np.ndarray | None) -> None:
    """Warn about runs without a score: not all episodes of `finished` [rows, episodes] ended.

    A trainer without an environment gives an episode that did not end a return as well.
    """
    played = contract.has_environment(unit.legs[0].run.config)
    if not played or finished is None or finished.all():
        return
    rows = zip(unit.legs, finished, strict=True)
    runs = [leg.run.run_id for leg, ended in rows if not ended.all()]
    note = (
        f"Note: {(~finished).sum()} evaluation episodes of {', '.join(runs)} did not end in time; "
        "these runs have no score and rank last; give the environment a lower time limit."
    )
    work.store.ledger.note(note)
    work.progress.say(note)


def on_this_machine(
    work: Work, group: plans.Group, units: Sequence[plans.Unit]
) -> Iterator[plans.Batch]:
    """Compute units in this process, one on each device."""
    work.progress.compiling(group)
    programs = work.backend.compile(group)
    work.progress.compiled(group, programs.compile_s)
    for first in range(0, len(units), programs.units):
        with signals.deferred() as stopping:
            began = time.monotonic()
            side_by_side = units[first : first + programs.units]
            inputs = work.backend.inputs(programs, plans.padded(side_by_side, programs.units))
            batch = begin(work, group, programs, side_by_side, inputs)
            if train(work, programs, inputs, batch, stopping):
                facts = work.backend.facts(programs, group)
                batch.facts = {**facts, "wall_s": time.monotonic() - began}
                yield batch  # committed before a pending signal is raised


def train(
    work: Work, programs: Any, inputs: Any, batch: plans.Batch, stopping: Callable[[], bool]
) -> bool:
    """Train and score a batch; return False if a signal stopped it after a snapshot."""
    for count in segments(work.backend, programs, inputs, batch):
        work.progress.advance(batch, count)
        stop = stopping()
        if stop or (work.snapshots.due and batch.updates < batch.group.stop):
            snapshot(work, batch)
        if stop:
            return False
    work.progress.scoring()
    score(work.backend, programs, inputs, batch)
    return True


def segments(
    backend: "compute.Backend", programs: Any, inputs: Any, batch: plans.Batch
) -> Iterator[int]:
    """Train a batch to the end of its legs; yield the number of updates after each segment.

    A segment ends where an evaluation within training is due. That of the last update is the score.
    """
    every, stop = backend.eval_every, batch.group.stop
    while batch.updates < stop:
        due = every - batch.updates % every if every else stop
        count = min(programs.segment_length, stop - batch.updates, due)
        batch.states, batch.diverged_at, metrics = backend.segment(
            programs, inputs, batch.states, batch.diverged_at, batch.updates + 1, count
        )
        batch.updates += count
        batch.pieces.append(metrics)
        began = time.monotonic()
        if count == due and batch.updates < stop:
            batch.evaluated(backend.score(programs, inputs, batch.states, batch.updates))
        batch.evaluating_s = time.monotonic() - began
        yield count


def score(backend: "compute.Backend", programs: Any, inputs: Any, batch: plans.Batch) -> None:
    """Score a batch after its last update."""
    batch.scores = backend.score(programs, inputs, batch.states, batch.updates)
    if backend.eval_every:
        batch.evaluated(batch.scores)


def outcomes(
    unit: plans.Unit, arrays: Mapping[str, np.ndarray], diverged_at: np.ndarray
) -> list[ledgers.Outcome]:
    """Return the outcome of each leg of a unit."""
    greedy = arrays.get(contract.GREEDY_RETURN)
    return [
        ledgers.Outcome(
            run_id=leg.run.run_id,
            status="diverged" if diverged_at[row] else "done",
            score=float(arrays[contract.RETURN][row].mean()),
            greedy_score=float(greedy[row].mean()) if greedy is not None else math.nan,
            diverged_at=int(diverged_at[row]) or None,
        )
        for row, leg in enumerate(unit.legs)
    ]


# --------------------------------------------------------------------------------- states on disk


def begin(
    work: Work, group: plans.Group, programs: Any, units: Sequence[plans.Unit], inputs: Any
) -> plans.Batch:
    """Return a batch that starts from snapshots, else from the previous round, else from `init`."""
    newest = work.snapshots.newest(units, lambda unit, at: shapes(work, group, unit, at))
    if newest is None and group.start == 0:
        return fresh(work.backend, programs, group, units, inputs)
    updates, trees = newest or (group.start, inherited(work, units))
    batch = restored(work.backend, programs, group, units, updates, trees)
    if newest is not None:
        work.progress.resumed(batch)
    return batch


def fresh(
    backend: "compute.Backend",
    programs: Any,
    group: plans.Group,
    units: Sequence[plans.Unit],
    inputs: Any,
) -> plans.Batch:
    """Return a batch that starts from `init`."""
    diverged_at = np.zeros(programs.rows * programs.units, np.int32)
    return plans.Batch(group, units, 0, backend.start(programs, inputs), diverged_at, [])


def restored(
    backend: "compute.Backend",
    programs: Any,
    group: plans.Group,
    units: Sequence[plans.Unit],
    updates: int,
    trees: Sequence[dict[str, Any]],
) -> plans.Batch:
    """Return a batch that continues after `updates` updates, from the tree of each unit."""
    trees = plans.padded(trees, programs.units)
    states = backend.join(programs, [tree["states"] for tree in trees])
    diverged_at = stacked([tree["diverged_at"] for tree in trees], programs.rows)
    batch = plans.Batch(group, units, updates, states, diverged_at, [])
    if "metrics" in trees[0]:
        done = [tree["metrics"] for tree in trees]
        batch.pieces.append({x: stacked([m[x] for m in done], programs.rows) for x in done[0]})
    return batch


def stacked(parts: Sequence[np.ndarray], rows: int) -> np.ndarray:
    """Concatenate the rows of a batch's units, each padded with its last row."""
    return np.stack([row for part in parts for row in plans.padded(list(part), rows)])


def snapshot(work: Work, batch: plans.Batch) -> None:
    """Write a snapshot of a batch, unless its environment is one that cannot be stored."""
    if not work.backend.can_save(batch.group.config):
        return
    began, metrics = time.monotonic(), batch.metrics
    trees = [
        {
            "states": work.backend.cut(batch.states, rows),
            "diverged_at": np.asarray(batch.diverged_at[rows]),
            "metrics": {name: value[rows] for name, value in metrics.items()},
        }
        for _, rows in batch.rows()
    ]
    work.snapshots.write(batch.units, batch.updates, trees, began)


def shapes(work: Work, group: plans.Group, unit: plans.Unit, updates: int) -> dict[str, Any]:
    """Return the template of the pytree that `snapshot` wrote."""
    every, last = work.backend.eval_every, min(updates, group.stop - 1)
    evaluated = every > 0 and last // every > group.start // every
    rows, names = len(unit.legs), work.backend.metric_names(unit, evaluated)
    done = np.zeros((rows, updates - group.start), np.float32)
    return {
        "states": work.backend.template(unit),
        "diverged_at": np.zeros(rows, np.int32),
        "metrics": dict.fromkeys(names, done),
    }


def inherited(work: Work, units: Sequence[plans.Unit]) -> list[dict[str, Any]]:
    """Return the states and diverged_at that the legs of each unit continue from."""
    planned_legs = work.store.ledger.legs(planned=True)
    legs = {(leg["run_id"], leg["stop"]): leg for leg in planned_legs}
    loaded: dict[str, Any] = {}
    trees = []
    for unit in units:
        parents = [legs[leg.parent or "", leg.start] for leg in unit.legs]
        for name in {parent["unit"] for parent in parents} - loaded.keys():
            rows = sum(leg["unit"] == name for leg in legs.values())
            template = work.backend.template(plans.Unit(name, unit.legs[:1] * rows))
            loaded[name] = work.store.state(name, template, work.backend.load)
        diverged_at = np.array([parent["diverged_at"] or 0 for parent in parents], np.int32)
        states = work.backend.pick([(loaded[parent["unit"]], parent["row"]) for parent in parents])
        trees.append({"states": states, "diverged_at": diverged_at})
    return trees
