"""Forecast the compilations, memory, disk and time of a sweep.

The numbers come from the programs themselves. Memory is what XLA plans for two sizes of a unit,
which gives a fixed part and a part per row; time is that of one warm segment. Nothing is stored.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from purejaxpg import InputError, contract, disk, hidden, layout
from purejaxpg.fused import paths as loop_paths
from purejaxpg.sweep import compute, engine, memory, snapshots
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores
from purejaxpg.text import count, duration, engineering, percent

MEASURED = 4  # programs that are compiled and timed; others are estimated from these
ENOUGH_S, SEGMENTS_TIMED = 1.0, 20  # either ends the timing of a segment
NOISE_BYTES = 2**25  # by which a process may grow for other reasons than a program
WORSE = 1.1  # warn if a row costs this much more than in a unit of half the rows
Say = Callable[[str], None]
ON_HOST = (
    "Note: an environment of gymnasium runs on the host, in Python, one step after the other, and "
    "is slow. Its states cannot be stored, so a unit that is interrupted starts again."
)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The measured cost of one program."""

    rows: int
    devices: int  # or groups of them, each of which computes a unit
    compile_s: float
    start_s: float
    update_s: float  # of all rows on all devices, one update
    score_s: float
    bytes_per_device: int  # as planned by XLA
    seen_bytes: int  # growth of the process's memory, on a CPU; 0: not known
    paths: tuple[loop_paths.Path, ...] = ()  # of the trainer's loops
    group: int = 1  # devices that compute a unit

    @property
    def needed_bytes(self) -> int:
        """Return what a device needs: what XLA plans, or what was seen if that is clearly more.

        XLA does not count what convolutions and some matrix products on a CPU allocate.
        """
        seen = self.seen_bytes // (self.devices * self.group)
        return seen if seen > self.bytes_per_device + NOISE_BYTES else self.bytes_per_device

    def seconds(self, batches: int, updates: int, fresh: bool = True, scores: int = 1) -> float:
        """Return the time of `batches` batches of units, without compilation."""
        return batches * (fresh * self.start_s + updates * self.update_s + scores * self.score_s)


class Fit(NamedTuple):
    """Bytes on a device as a straight line: fixed + per_row * rows."""

    fixed: float
    per_row: float


def fit(small: Measurement, large: Measurement, shared: int = 0) -> Fit:
    """Return the line through two measurements of memory, or through one and `shared` bytes."""
    if small.rows == large.rows:
        return Fit(float(shared), (large.needed_bytes - shared) / large.rows)
    slope = (large.needed_bytes - small.needed_bytes) / (large.rows - small.rows)
    return Fit(large.needed_bytes - slope * large.rows, slope)


def measure(
    spec: specs.Spec, group: plans.Group, rows: int, devices: Sequence[jax.Device]
) -> Measurement:
    """Compile a group with units of `rows` rows, and time warm segments of it.

    Raises:
        OutOfMemory: it does not fit.
    """
    backend = compute.Backend(spec, devices)
    legs = [leg for unit in group.units for leg in unit.legs]
    few = tuple(
        plans.Unit(str(i), tuple(legs[i * rows : (i + 1) * rows]) or tuple(legs[:rows]))
        for i in range(min(backend.slots, math.ceil(len(legs) / rows)))
    )
    resized = dataclasses.replace(group, rows=rows, units=few)
    programs = backend.compile(resized)
    inputs = backend.inputs(programs, plans.padded(few, programs.units))
    before, _ = memory.resident()
    known = memory.forget_peak() and devices[0].platform == "cpu"
    states, start_s = timed(lambda: backend.start(programs, inputs))
    at = np.zeros(rows * programs.units, np.int32)
    states, at, _ = backend.segment(programs, inputs, states, at, 1, 1)  # the first is slower
    count = programs.segment_length
    times: list[float] = []
    while sum(times) < ENOUGH_S and len(times) < SEGMENTS_TIMED:
        began = time.perf_counter()
        states, at, _ = backend.segment(programs, inputs, states, at, 2, count)
        times.append(time.perf_counter() - began)
    _, score_s = timed(lambda: backend.score(programs, inputs, states, 1))
    return Measurement(
        rows=rows,
        devices=programs.units,
        compile_s=programs.compile_s,
        start_s=start_s,
        update_s=float(np.median(times)) / count,
        score_s=score_s,
        bytes_per_device=programs.bytes_per_device,
        seen_bytes=memory.resident()[1] - before if known else 0,
        paths=programs.paths,
        group=spec.mesh.size,
    )


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the computed result of `call`, and the seconds it took."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - began


# ------------------------------------------------------------------------------------------- plan


def plan(
    spec: specs.Spec,
    devices: Sequence[jax.Device],
    confirm: int,
    say: Say,
    quick: bool = False,
    out: Path | None = None,
) -> float:
    """Print the forecast of a sweep and return its seconds; 0 if nothing was timed.

    Args:
        spec: the sweep.
        devices: the devices it would run on.
        confirm: seeds of a confirmation; 0: none.
        say: prints a line.
        quick: do not compile or time anything.
        out: a result directory; what it has of the sweep is left out.
    """
    specs.check_devices(spec.mesh, len(devices))
    rounds = searches.rehearse(searches.rounds(spec, confirm))
    backend = compute.Backend(spec, devices)
    warning = hidden.note(spec.agent, spec.agent_name, rounds[0].legs[0].run.config)
    notes = [note for round_ in rounds for note in round_.notes] + [warning] * bool(warning)
    steps = sum(leg.steps for round_ in rounds for leg in round_.legs)
    kind, unit = devices[0].device_kind, contract.unit(spec.agent)
    say(f"{spec.name}: {spec.agent_name}, {plans.count_runs(rounds)} runs in {len(rounds)} "
        f"round(s), {engineering(steps)} {unit}, on {len(devices)} x {kind}.")  # fmt: skip
    planned = missing(spec, backend, rounds, out, say)
    if not planned:
        return 0.0
    groups = [group for _, group in planned]
    if any(contract.on_host(group.config) for group in groups):
        notes.append(ON_HOST)
    for line in [compilations(groups), *notes]:
        say(line)
    if spec.mesh.size > 1:
        say(split_of(backend, groups[0]))
    for index, group in planned:
        say(f"Round {index + 1}, group {group.index}: {size_of(backend, group)}")
    say(f"Disk: about {bytes_on_disk(backend, planned) / 2**20:.1f} MiB.")
    if quick:
        return 0.0
    measured = measurements(backend, groups, say)
    return report_time(groups, measured, backend.slots, spec.eval_every, say)


def missing(
    spec: specs.Spec,
    backend: compute.Backend,
    rounds: Sequence[plans.Round],
    out: Path | None,
    say: Say,
) -> list[tuple[int, plans.Group]]:
    """Return the groups of all rounds, without the units that are finished in `out`.

    Each group comes with the index of its round. What is finished is printed, if there is anything.
    """
    if out is None or not (out / ledgers.LEDGER).is_file():
        every = [
            (i, group) for i, each in enumerate(rounds) for group in backend.groups(i, each, {})
        ]
        return every
    with stores.Store.read(out) as store:
        stored, ledger = store.ledger.identity, store.ledger
        done = {unit["name"] for unit in ledger.units() if unit["done"]}
        every = [
            (index, group)
            for index in range(len(rounds))
            for group in engine.cut(backend, rounds[: index + 1], ledger, {})
        ]
    if stored != spec.identity:
        say(f"The sweep in {out} grows: {stores.changes(stored, spec.identity)}.")
    left, legs = list[tuple[int, plans.Group]](), list[tuple[plans.Leg, ...]]()
    for index, group in every:
        units = tuple(unit for unit in group.units if unit.name not in done)
        if units:
            left.append((index, dataclasses.replace(group, units=units)))
            legs += [()] * (index + 1 - len(legs))
            legs[index] += tuple(leg for unit in units for leg in unit.legs)
    lacking = plans.count_runs([plans.Round(each) for each in legs])
    finished = plans.count_runs(rounds) - lacking
    then = f"; {lacking} are missing, and what follows is for these" if left else " and lacks none"
    say(f"{out} has {count(finished, 'finished run')}{then}.")
    return left


def size_of(backend: compute.Backend, group: plans.Group) -> str:
    """Describe how a group is cut into units, and why."""
    if backend.spec.rows_per_device:
        why = "rows_per_device in the sweep file"
    elif backend.spec.search.halving:
        why = "one size for all rungs"
    elif backend.on_cpu and group.num_legs > group.rows * backend.slots:
        why = f"the cache of a CPU: at most {compute.cpu_rows(group.config, backend.spec)}"
    else:
        why = "an even share for each device"
    span = f"updates {group.start + 1} to {group.stop}"
    return (
        f"{group.num_legs} runs, {span}, in {len(group.units)} unit(s) of {group.rows} rows "
        f"({why})."
    )


def one_group(backend: compute.Backend) -> Mesh:
    """Return the mesh of the first group of devices."""
    return compute.mesh_of(backend.spec.mesh, backend.devices[: backend.spec.mesh.size])


def split_of(backend: compute.Backend, group: plans.Group) -> str:
    """Describe how the arrays of a run are spread over the devices of a mesh."""
    mesh, unit = one_group(backend), plans.Unit("", group.units[0].legs[:1])
    inputs, states = compute.inputs_of(backend.spec.given, [unit], 1), backend.template(unit)
    where, of_states = compute.shardings(inputs, states, mesh)
    given = layout.bytes_on_device(inputs[2:], where[2:])
    state = layout.bytes_on_device(states, of_states)
    parts = [f"{own / 2**20:.1f} of {whole / 2**20:.1f} MiB" for own, whole in (given, state)]
    return (
        f"Mesh {backend.spec.mesh}: {count(backend.slots, 'group')} of {mesh.size} devices, each "
        f"of which holds {parts[0]} of given arrays and {parts[1]} of the state of a run."
    )


def compilations(groups: Sequence[plans.Group]) -> str:
    """Describe how many programs are compiled, and which static fields require it."""
    distinct = [json.loads(text)[0] for text in dict.fromkeys(group.signature for group in groups)]
    sizes = {group.program for group in groups}
    values = {name: sorted({repr(fields[name]) for fields in distinct}) for name in distinct[0]}
    reasons = [f"{name} ({', '.join(v[:8])})" for name, v in values.items() if len(v) > 1]
    if len(sizes) > len(distinct):
        reasons.append("the number of rows in a unit")
    because = f", because these are static: {'; '.join(reasons)}" if reasons else ""
    return f"{len(sizes)} compilation(s){because}."


def bytes_on_disk(backend: compute.Backend, planned: Iterable[tuple[int, plans.Group]]) -> float:
    """Return the bytes of arrays, checkpoints, snapshots and given arrays at their peak.

    Each group of `planned` comes with the index of its round.
    """
    arrays, snapshot, states, runs = 0.0, 0.0, dict[int, float](), dict[int, set[str]]()
    for index, group in planned:
        unit = plans.Unit("one", group.units[0].legs[:1])
        leaves = jax.tree.leaves(backend.template(unit))
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        names = backend.metric_names(unit, backend.eval_every > 0)
        metrics = 4 * len(names) * (group.stop - group.start)
        arrays += group.num_legs * (metrics + backend.score_bytes(unit))
        states[index] = states.get(index, 0.0) + group.num_legs * state
        ids = {leg.run.run_id for unit in group.units for leg in unit.legs}
        runs[index] = runs.get(index, set()) | ids
        rows = group.rows * min(backend.slots, len(group.units))
        snapshot = max(snapshot, snapshots.PER_UNIT * rows * state)
    return arrays + snapshot + most_at_once(states, runs) + backend.spec.given.nbytes


def most_at_once(states: Mapping[int, float], runs: Mapping[int, set[str]]) -> float:
    """Return the most bytes of states that exist at a time.

    The states of a round are released once all its runs have passed the next round. Both arguments
    are by round: bytes of states, and ids of runs.
    """
    held, most = 0.0, 0.0
    for index in sorted(states):
        held += states[index]
        most = max(most, held)
        if index - 1 in runs and runs[index - 1] <= runs[index]:
            held -= states[index - 1]
    return most


def measurements(
    backend: compute.Backend, groups: Iterable[plans.Group], say: Say
) -> dict[tuple[str, int], Measurement]:
    """Measure the first programs of a plan -> by `Group.program`."""
    spec, devices = backend.spec, backend.devices
    measured: dict[tuple[str, int], Measurement] = {}
    for group in groups:
        if group.program in measured or len(measured) == MEASURED:
            continue
        say(f"Compiling and timing {group.rows} rows ...")
        try:
            full = measure(spec, group, group.rows, devices)
        except memory.OutOfMemory as error:
            if min(error.fits, group.rows - 1) < 1:
                raise InputError(
                    f"{spec.name} cannot run here: {error}, and a unit cannot be smaller; use "
                    f"{contract.smaller(group.config)}."
                ) from error
            say(f"Memory: {error}; the sweep will use {error.fits} rows instead.")
            continue
        measured[group.program] = full
        for path in () if backend.on_cpu else full.paths:
            say(str(path))
        half = measure(spec, group, group.rows // 2, devices) if group.rows > 1 else full
        given = spec.given.shared()
        shared, _ = layout.bytes_on_device(given, layout.shardings(given, one_group(backend)))
        say(memory_line(half, full, devices, shared))
        if half.rows < full.rows:
            say(row_cost(half, full))
    return measured


def memory_line(
    half: Measurement, full: Measurement, devices: Sequence[jax.Device], shared: int
) -> str:
    """Describe the memory of a unit, of which all rows share some bytes, and how many would fit."""
    used = full.devices * full.group
    line, limit = fit(half, full, shared), memory.limit(devices[:used])
    most = int((limit - line.fixed) / line.per_row) if line.per_row > 0 else full.rows
    needed, planned = full.needed_bytes / 2**20, full.bytes_per_device / 2**20
    seen = f"; XLA planned {planned:.1f} MiB a device" if needed > planned else ""
    return (
        f"Memory: {needed:.1f} MiB a device ({line.per_row / 2**20:.2f} for each row), "
        f"{needed * used:.0f} MiB on {used} device(s){seen}; about {most} rows a device would fit."
    )


def row_cost(half: Measurement, full: Measurement) -> str:
    """Describe the cost of a row in units of two sizes, and warn if the larger one is worse."""
    costs = [m.update_s / (m.rows * m.devices) * 1e3 for m in (half, full)]
    line = (
        f"A row's update costs {costs[1]:.2f} ms in units of {full.rows} rows "
        f"and {costs[0]:.2f} ms in units of {half.rows}."
    )
    if costs[1] > WORSE * costs[0]:
        line += f" Warning: vmapping does not pay here; try rows_per_device = {half.rows}."
    return line


def report_time(
    groups: Sequence[plans.Group],
    measured: Mapping[tuple[str, int], Measurement],
    devices: int,
    every: int,
    say: Say,
) -> float:
    """Print and return the predicted time; unmeasured programs cost as much per step as others.

    Every so many updates a run is evaluated within training; 0: never.
    """
    if not measured:
        return 0.0
    work_s, evaluating_s, known_steps = 0.0, 0.0, 0
    mean = sum(m.compile_s for m in measured.values()) / len(measured)
    keys = {group.program for group in groups}
    compile_s = sum(measured[key].compile_s if key in measured else mean for key in keys)
    for group in (group for group in groups if group.program in measured):
        batches = math.ceil(len(group.units) / devices)
        updates, seen = group.stop - group.start, measured[group.program]
        within = ((group.stop - 1) // every - group.start // every) if every else 0
        work_s += seen.seconds(batches, updates, group.start == 0, 1 + within)
        evaluating_s += batches * within * seen.score_s
        known_steps += group.steps
    steps = sum(group.steps for group in groups)
    work_s, evaluating_s = (s * steps / known_steps for s in (work_s, evaluating_s))
    rough = "" if steps == known_steps else " (partly estimated: not every program was timed)"
    say(f"Time: about {duration(compile_s + work_s)}, {compile_s:.0f} s of it compiling{rough}.")
    if every:
        share, often = percent(evaluating_s / (compile_s + work_s)), count(every, "update")
        say(f"Evaluations after every {often} take {duration(evaluating_s)} of that ({share}).")
    return compile_s + work_s


# ------------------------------------------------------------------------------------------- tune


def tune(spec: specs.Spec, path: Path, devices: Sequence[jax.Device], say: Say) -> int:
    """Measure sizes of units, write the best into the sweep file at `path` and return it.

    It is the best number of rows for the first round's largest group.

    Raises:
        InputError: the sweep file already sets rows_per_device.
        FaultError: it cannot be written.
    """
    if spec.rows_per_device is not None:
        raise InputError(
            f"{path} already has rows_per_device = {spec.rows_per_device}; remove it to tune it."
        )
    specs.check_devices(spec.mesh, len(devices))
    (first, *_) = searches.rehearse(searches.rounds(spec))
    backend = compute.Backend(spec, devices)
    group = max(backend.groups(0, first, {}), key=lambda g: g.steps)
    best, least = 0, math.inf
    for rows in sizes(group.num_legs, backend.slots):
        try:
            seen = measure(spec, group, rows, devices)
        except memory.OutOfMemory as error:
            say(f"{rows:5d} rows: {error}.")
            break
        batches = math.ceil(math.ceil(group.num_legs / rows) / seen.devices)
        seconds = seen.seconds(batches, group.stop - group.start)
        cost = seen.update_s / (rows * seen.devices) * 1e3
        say(f"{rows:5d} rows: {cost:.3f} ms a row and update, {duration(seconds)} in all.")
        if seconds < least:
            best, least = rows, seconds
        elif seconds > 2 * least:  # larger units only get worse
            break
    write_rows(path, best)
    say(f"Wrote rows_per_device = {best} to {path}.")
    return best


def sizes(num_legs: int, devices: int) -> list[int]:
    """Return the sizes to try: powers of two, and an even share."""
    share = math.ceil(num_legs / devices)
    powers = [2**i for i in range(share.bit_length()) if 2**i < share]
    return [*powers, share]


def write_rows(path: Path, rows: int) -> None:
    """Add `rows_per_device` to a sweep file, without changing the rest of it."""
    with disk.faults("write", path):
        text = path.read_text(encoding="utf-8")
        # After the last key at the top level, which ends where the first table begins.
        table = re.search(r"^\s*\[", text, re.M)
        at = table.start() if table else len(text)
        head, tail = text[:at].rstrip("\n"), text[at:].lstrip("\n")
        disk.write_text(path, f"{head}\nrows_per_device = {rows}  # measured\n\n{tail}")
