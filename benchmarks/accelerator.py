"""Do the promises tested on the CPU hold on this device? Memory, running out of it, resuming.

    memory   Units of more and more rows: the bytes that `purejaxpg.sweep.memory` plans with, and
             the peak while they run. The peak must not exceed the plan by more than the planner
             leaves free, and the plan must not be twice the peak.
    oom      A sweep whose `rows_per_device` is too large ends with all runs done, with fewer rows
             and a note in its ledger: once because the planner notices, and once with a planner
             that lets everything pass, so that memory runs out while a unit is computed.
    resume   A sweep that is killed with -9 twice and resumed, and one that is not: are all arrays
             equal to the bit? No process finds the programs of another in the common cache. On a
             GPU, XLA may choose its kernels again in each process; all ways of `sweep.xla` to deal
             with that are tried, but only the default has to hold.
    tuning   What these ways cost on a GPU: the time of an update with each, in one process, the
             ways by turns.

Each measurement is a process of its own: peaks cannot be reset, and a device's memory is held until
its process ends. On a GPU the process of `oom` gets a small share of the memory, on a CPU a limit
to its address space. Each check has a share of the minutes to itself: what has no time left is not
checked. Prints a table and, after each line of it, writes all of them as JSON.
Exit status: 0 if every check holds, else 1.

Run: python benchmarks/accelerator.py [CHECK ...] [--small | --full] [--minutes M] [--out FILE.json]
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import gc
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import session, xla
from purejaxpg.sweep import store as stores

MIB = 2**20
# Some allocations do not depend on rows: libraries, autotuning, thread pools.
SLACK = 64 * MIB
PPO = {"num_envs": 64, "num_steps": 128, "total_timesteps": 4 * 64 * 128}
SAC = {"env": "Pendulum-v1", "total_timesteps": 1000 + 4 * 16, "replay_capacity": 100_000}
FIELDS = {"ppo": PPO, "sac": SAC}

BREAKOUT = "breakout"  # of `tuning`: PPO on MinAtar, as the benchmark has it

Finding = dict[str, Any]  # check, case, "seen" in words, and whether it holds (None: not checked)

# The cases of each check: agent, and rows; for `resume`, updates of units of 4 runs.
SMALL: dict[str, list[tuple[str, int]]] = {
    "memory": [("ppo", 16), ("ppo", 32), ("sac", 8)],
    "oom": [("ppo", 32)],
    "resume": [("ppo", 24), ("sac", 12)],
    "tuning": [("ppo", 2)],
}
FULL: dict[str, list[tuple[str, int]]] = {
    "memory": [("ppo", 16), ("ppo", 64), ("ppo", 256), ("ppo", 1024), ("sac", 16), ("sac", 128)],
    "oom": [("ppo", 16)],
    "resume": [("ppo", 240), ("sac", 240)],
    "tuning": [("ppo", 2048), ("ppo", 64), (BREAKOUT, 256), ("sac", 64)],
}
MINUTES = {"memory": 2.5, "oom": 1.5, "resume": 3.5, "tuning": 2.0}
ROUNDS, ROUND_S = 2, 1.0  # of timing each way of tuning
SIDE_BY_SIDE = 4  # sweeps of `resume` on an accelerator, which then has room for all
SHARE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.05"}  # of the memory of a GPU


class TimeIsUp(Exception):
    """A check has used its minutes."""


class Clock:
    """Tells how much time the running check has left."""

    until = math.inf

    @classmethod
    def left(cls) -> float:
        """Return the seconds that are left, at least one.

        Raises:
            TimeIsUp: none are.
        """
        seconds = cls.until - time.monotonic()
        if seconds < 1:
            raise TimeIsUp
        return seconds


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(FULL)} (all)")
    parser.add_argument("--small", action="store_true", help="small sizes, as on a CPU")
    parser.add_argument("--full", action="store_true", help="large sizes, as on an accelerator")
    parser.add_argument("--minutes", type=float, metavar="M", help="for all checks together (9.5)")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"), metavar="FILE.json")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.checks) - set(FULL):
        parser.error(f"there is no check {min(unknown)!r}")
    if arguments.minutes is not None and arguments.minutes <= 0:
        parser.error(f"--minutes must be more than 0, but is {arguments.minutes}")
    device = child("device")
    sizes = SMALL if arguments.small or device["platform"] == "cpu" else FULL
    sizes = FULL if arguments.full else sizes
    found: list[Finding] = []
    try:
        for finding in findings(arguments.checks or list(sizes), sizes, device, arguments.minutes):
            found.append(finding)
            show(finding)
            text = json.dumps({"device": device, "found": found}, indent=1)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(f"{text}\n", encoding="utf-8")
    except KeyboardInterrupt:
        print(f"Interrupted; see {arguments.out} for the finished checks.", file=sys.stderr)
        return 130
    failed = sum(finding["holds"] is False for finding in found)
    print(f"{device['kind']}: {len(found)} lines, {failed} do not hold; see {arguments.out}")
    return int(failed > 0)


def findings(
    checks: list[str],
    sizes: dict[str, list[tuple[str, int]]],
    device: dict[str, Any],
    minutes: float | None = None,
) -> Iterator[Finding]:
    """Check one thing after the other; a check that fails to run does not stop the rest.

    Args:
        checks: names in CHECKS.
        sizes: the cases of each.
        device: as `device` describes it.
        minutes: for all checks together, shared as in MINUTES; None: those of MINUTES, and without
            end on a CPU.
    """
    unasked = math.inf if device.get("platform") == "cpu" else 1.0
    share = unasked if minutes is None else minutes / sum(MINUTES[check] for check in checks)
    for check in checks:
        Clock.until = time.monotonic() + 60 * share * MINUTES[check]
        for agent, size in sizes[check]:
            began = time.monotonic()
            for finding in outcomes(check, agent, size, device):
                took = round(time.monotonic() - began, 1)
                yield {"check": check, **finding, "seconds": took}
    Clock.until = math.inf


def outcomes(check: str, agent: str, size: int, device: dict[str, Any]) -> Iterator[Finding]:
    """Check one case, and say so if it cannot be checked."""
    case = f"{agent}, {size}"
    try:
        Clock.left()
        yield from CHECKS[check](agent, size, device)
    except TimeIsUp:
        yield {"case": case, "seen": "the minutes of this check are over", "holds": None}
    except RuntimeError as error:
        yield {"case": case, "seen": str(error).strip().splitlines()[-1], "holds": False}


def show(finding: Finding) -> None:
    holds = {True: "holds", False: "DOES NOT HOLD", None: "-"}[finding["holds"]]
    print(f"{finding['check']:7s} {finding['case']:28s} {holds:14s} {finding['seen']}", flush=True)


def child(name: str, options: Any = (), environment: dict[str, str] | None = None) -> Any:
    """Call a function below in a process of its own.

    Args:
        name: in CHILDREN.
        options: its keyword arguments.
        environment: variables added to those of this process.

    Returns:
        Its result.

    Raises:
        TimeIsUp: it did not end in time.
        RuntimeError: it failed.
    """
    limit = None if Clock.until == math.inf else Clock.left()
    try:
        found = subprocess.run(
            command(name, options),
            env={**surroundings(), **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeIsUp from error
    if found.returncode != 0:
        raise RuntimeError(f"{name} {options} ended with {found.returncode}:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def command(name: str, options: Any) -> list[str]:
    """Return the command that calls a function below."""
    return [sys.executable, __file__, "--child", name, json.dumps(options)]


def surroundings() -> dict[str, str]:
    """Return the environment of children, in which every process compiles for itself.

    On a CPU nothing is tuned, so sharing programs between tests does no harm there.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "true" if on_cpu else "false"}


# ----------------------------------------------------------------------------------------- memory


def check_memory(agent: str, rows: int, device: dict[str, Any]) -> Iterator[Finding]:
    """Compare planned bytes with the peak."""
    found = child("measured", {"raw": described(agent, rows, rows, FIELDS[agent])})
    finding = {"case": f"{agent}, {rows} rows", **found, "holds": None}
    if "refused" in found:
        yield {**finding, "seen": found["refused"]}
        return
    planned, peak = found["planned"], found["peak"]
    # The planner leaves a tenth of the memory free; on a CPU other programs use it as well.
    most = (1.25 if device["platform"] == "cpu" else 1 / 0.9) * planned + SLACK
    seen = f"planned {planned / MIB:.0f} MiB, peak {peak / MIB:.0f}, {peak / planned:.2f} of it"
    if found["compiling"] >= peak:  # the peak was earlier, so that of running is unknown
        yield {**finding, "seen": f"{seen}, while compiling", "holds": peak <= most or None}
        return
    yield {**finding, "seen": seen, "holds": planned / 2 - SLACK <= peak <= most}


def measured(raw: dict[str, Any]) -> dict[str, Any]:
    """In a child: the bytes planned for a unit, and the peak of running it."""

    device = session.find_devices(1)[0]
    from purejaxpg.sweep import compute, memory, search
    from purejaxpg.sweep import spec as specs

    study, rows = specs.from_dict(raw, "study"), raw["rows_per_device"]
    backend = compute.Backend(study, [device])
    (round_,) = search.rehearse(search.rounds(study))
    (group,) = backend.groups(0, round_, {})
    try:
        programs = backend.compile(group)
    except memory.OutOfMemory as error:
        return {"refused": str(error)}

    def work() -> None:
        inputs = backend.inputs(programs, group.units)
        states, at = backend.start(programs, inputs), np.zeros(rows, np.int32)
        for u in (1, 2):
            states, at, _ = backend.segment(programs, inputs, states, at, u, 1)
        backend.score(programs, inputs, states, 2)

    planned = programs.bytes_per_device
    stats = device.memory_stats()
    if stats is not None:
        work()
        peak = (device.memory_stats() or {})["peak_bytes_in_use"]
        return {"planned": planned, "peak": peak, "compiling": stats["peak_bytes_in_use"]}
    work()  # a warm process: thread pools and code are there
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, _ = memory.resident()
    memory.forget_peak()
    work()
    return {"planned": planned, "peak": memory.resident()[1] - before, "compiling": 0}


def described(agent: str, seeds: int, rows: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Return a sweep of one configuration."""
    return {
        "agent": agent,
        "seeds": seeds,
        "rows_per_device": rows,
        "eval_episodes": 8,
        "config": fields,
    }


def device() -> dict[str, Any]:
    """In a child: describe the device and how much memory a process gets."""

    found = session.find_devices(1)[0]
    import jax

    limit = (found.memory_stats() or {}).get("bytes_limit")
    kind = {"platform": found.platform, "kind": found.device_kind, "bytes_limit": limit}
    return {**kind, "jax": jax.__version__}


# ---------------------------------------------------------------------------------- out of memory


def check_oom(agent: str, rows: int, device: dict[str, Any]) -> Iterator[Finding]:
    """Sweep with three times the rows that fit; on a CPU, with `rows` and a limit on memory."""
    share = SHARE if device["platform"] == "gpu" else {}
    limit = child("device", (), share)["bytes_limit"]
    raw = described(agent, rows, rows, FIELDS[agent])
    row = child("measured", {"raw": raw}, share)["planned"] / rows
    rows = rows if limit is None else math.ceil(3 * limit / row)
    options = {
        "raw": described(agent, rows, rows, FIELDS[agent]),
        "room": int(row * rows / 3) if limit is None else None,
    }
    for planner in (True, False):
        with tempfile.TemporaryDirectory() as directory:
            child("swept", {**options, "planner": planner, "out": directory}, share)
            finding = seen_in(Path(directory) / "out", rows, planner)
        when = "in the plan" if planner else "while it runs"
        yield {"case": f"{agent}, {when}", **finding}


def swept(raw: dict[str, Any], room: int | None, planner: bool, out: str) -> dict[str, Any]:
    """In a child: run a sweep; `room`: bytes, on a CPU."""
    from purejaxpg import cli
    from purejaxpg.sweep import compute, memory

    if room is not None and planner:
        memory.limit = lambda devices: room
    if not planner:
        compute.refuse_too_large = lambda *_: None
    if room is not None and not planner:
        compute.build = limiting(compute.build, room)
    spec = spec_file(Path(out), raw)
    status = cli.main(["sweep", str(spec), "--out", f"{out}/out", "--devices", "1", "--quiet"])
    if status != 0:
        raise RuntimeError(f"the sweep ended with {status}")
    return {}


def limiting(build: Callable[..., Any], room: int) -> Callable[..., Any]:
    """Limit the address space to `room` more bytes once programs need more than `room`."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]

    def limited(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        programs = build(*arguments)
        if programs.bytes_per_device > room:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            (size,) = (line.split()[1] for line in status.splitlines() if line[:7] == "VmSize:")
            resource.setrlimit(resource.RLIMIT_AS, (int(size) * 1024 + room, hard))
        return programs

    return limited


def seen_in(out: Path, rows: int, planner: bool) -> Finding:
    """Return a finding from what a ledger says about running out of memory."""
    with stores.Store.read(out) as store:
        done = sum(leg["status"] in ("done", "diverged") for leg in store.ledger.legs())
        sizes = {unit["size"] for unit in store.ledger.units()}
        notes = [note for note in store.ledger.notes() if note.startswith("Out of memory")]
    # The planner says how much is needed; XLA says only that there was not enough.
    expected = "rows need" if planner else "ran out of memory"
    holds = done == rows and max(sizes) < rows and any(expected in note for note in notes)
    seen = f"{done} of {rows} runs done, {max(sizes)} rows instead of {rows}, {len(notes)} notes"
    return {"seen": seen, "notes": notes, "holds": holds}


def spec_file(directory: Path, raw: dict[str, Any]) -> Path:
    """Write a sweep as TOML; JSON's values are valid TOML."""
    tables = {name: value for name, value in raw.items() if isinstance(value, dict)}
    lines = [f"{k} = {json.dumps(v)}" for k, v in raw.items() if k not in tables]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path = directory / "study.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------- resume


def check_resume(agent: str, updates: int, device: dict[str, Any]) -> Iterator[Finding]:
    """Compare a sweep that was killed with one that was not, for each way of tuning."""
    on_cpu = device["platform"] == "cpu"
    tunings = [xla.TUNING] if device["platform"] != "gpu" else list(xla.TUNINGS)
    with concurrent.futures.ThreadPoolExecutor(1 if on_cpu else SIDE_BY_SIDE) as pool:
        found = [pool.submit(resumed, agent, updates, tuning) for tuning in tunings]
        for tuning, finding in zip(tunings, found, strict=True):
            yield {"case": f"{agent}, {updates} updates, {tuning}", **finding.result()}


def resumed(agent: str, updates: int, tuning: str) -> Finding:
    """Kill a sweep twice, and compare its end with one that was not killed."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        spec = spec_file(directory, resumable(agent, updates))
        finish(spec, directory / "whole", tuning)
        chosen = directory / "whole" / session.PROGRAMS
        if tuning == "stored" and chosen.is_dir():
            # The question is whether a directory keeps its choices, not whether two choose alike.
            shutil.copytree(chosen, directory / "killed" / session.PROGRAMS)
        kills = sum(kill_after_a_commit(spec, directory / "killed", tuning) for _ in range(2))
        finish(spec, directory / "killed", tuning)
        compared, differ = differences(directory / "whole", directory / "killed")
    equal = "equal to the bit" if not differ else f"{len(differ)} differ, as {differ[0]}"
    holds = not differ and kills == 2
    return {
        "seen": f"killed {kills} times; of {compared} arrays {equal}",
        "differ": differ,
        "holds": holds if tuning == xla.TUNING else None,
    }


def resumable(agent: str, updates: int) -> dict[str, Any]:
    """Return a sweep of three units, so that one is left after two kills."""
    shape = {"ppo": (8, 32), "sac": (4, 4)}[agent]
    before = {"ppo": 0, "sac": 1000}[agent]
    fields = {"num_envs": shape[0], "num_steps": shape[1]}
    fields["total_timesteps"] = before + updates * shape[0] * shape[1]
    if agent == "sac":
        fields |= {"env": "Pendulum-v1", "replay_capacity": 10_000}
    return described(agent, 12, 4, fields)


@contextlib.contextmanager
def started(spec: Path, out: Path, tuning: str) -> Iterator[subprocess.Popen[str]]:
    """Start or resume a sweep that writes a snapshot after every segment.

    Raises:
        TimeIsUp: it did not end in time.
        RuntimeError: it failed.
    """
    options = {"spec": str(spec), "out": str(out), "tuning": tuning}
    # What XLA says while it runs would come between the lines of the table.
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command("tuned", options),
            env={**surroundings(), **SHARE},
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            yield process
        finally:
            process.kill()
            status = process.wait()
        said.seek(0)
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the sweep in {out} ended with {status}:\n{said.read()}")


def tuned(spec: str, out: str, tuning: str) -> dict[str, Any]:
    """In a child: run a sweep whose programs are tuned in one of the ways."""
    from purejaxpg import cli

    xla.TUNING = tuning
    if tuning == "stored":  # it needs a cache, which is the sweep's own
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    words = ["sweep", spec, "--out", out, "--devices", "1", "--snapshot-every", "0", "--quiet"]
    if status := cli.main(words):
        raise RuntimeError(f"the sweep ended with {status}")
    return {}


def finish(spec: Path, out: Path, tuning: str) -> None:
    """Run a sweep to its end."""
    with started(spec, out, tuning) as process:
        wait(process, lambda: False)


def kill_after_a_commit(spec: Path, out: Path, tuning: str) -> bool:
    """Resume a sweep until one more unit is done, then kill it; False if it ended before that."""
    before = committed(out)
    with started(spec, out, tuning) as process:
        wait(process, lambda: committed(out) > before)
        process.kill()
    return process.wait() == -signal.SIGKILL


def wait(process: subprocess.Popen[str], enough: Callable[[], bool]) -> None:
    """Wait until a process ends, or enough was seen of it.

    Raises:
        TimeIsUp: neither happened in time.
    """
    while process.poll() is None and not enough():
        Clock.left()
        time.sleep(0.02)


def committed(out: Path) -> int:
    """Count the units that are done."""
    if not (out / ledgers.LEDGER).is_file():
        return 0
    with stores.Store.read(out) as store:
        return sum(unit["done"] for unit in store.ledger.units())


def differences(left: Path, right: Path) -> tuple[int, list[str]]:
    """Return the number of arrays of two sweeps, and the names of those that differ in a bit."""
    with stores.Store.read(left) as one, stores.Store.read(right) as other:
        names = [unit["name"] for unit in one.ledger.units()]
        arrays = [
            {f"{name} {key}": value for name in names for key, value in each.arrays(name).items()}
            for each in (one, other)
        ]
    differ = [key for key, x in arrays[0].items() if x.tobytes() != arrays[1][key].tobytes()]
    return len(arrays[0]), differ


# ----------------------------------------------------------------------------------------- tuning


def check_tuning(agent: str, agents: int, device: dict[str, Any]) -> Iterator[Finding]:
    """Time an update with each way of tuning."""
    case = f"{agent} x {agents}"
    if device["platform"] != "gpu":
        yield {"case": case, "seen": "nothing is tuned on this device", "holds": None}
        return
    found = child("timed", {"name": agent, "agents": agents, "tunings": list(xla.TUNINGS)})
    fastest = min(each["ms"] for each in found.values())
    for tuning, each in found.items():
        more = 100 * (each["ms"] / fastest - 1)
        seen = f"{each['ms']:.3g} ms an update, {more:.0f}% more than the fastest; compiled in "
        seen += f"{each['compile_s']:.1f} s; {each['kernels']} kernels an update"
        yield {"case": f"{case}, {tuning}", "seen": seen, "holds": None, **each}


def timed(name: str, agents: int, tunings: list[str], quick: bool = False) -> dict[str, Any]:
    """In a child: the milliseconds of an update with each way of tuning.

    Ways without tuning come first: what this process has tuned might be found again.
    """
    devices = session.find_devices(1)
    from purejaxpg.bench import cases
    from purejaxpg.bench import child as measuring
    from purejaxpg.sweep import compute, search

    agent, fields = ("ppo", cases.BREAKOUT) if name == BREAKOUT else (name, {})
    spec = cases.Case(agent, agents, fields, quick=quick).sweep()
    (round_,) = search.rehearse(search.rounds(spec))
    backend = compute.Backend(spec, devices)
    (group,) = backend.groups(0, round_, {})
    found: dict[str, Any] = {}
    programs = {}
    for tuning in tunings:
        xla.TUNING = tuning
        programs[tuning] = made = compute.build(spec, group, devices)
        kernels = measuring.kernels(made, group.config)["per_update"]
        found[tuning] = {"compile_s": made.compile_s, "kernels": kernels, "ms": math.inf}
    for number in range(ROUNDS * len(tunings)):
        tuning = tunings[number % len(tunings)]
        seconds = measuring.train(backend, programs[tuning], group.units[:1], ROUND_S * (not quick))
        ms = 1e3 * seconds["update_s"]["median"]
        found[tuning]["ms"] = min(ms, found[tuning]["ms"])
    return found


CHECKS = {
    "memory": check_memory,
    "oom": check_oom,
    "resume": check_resume,
    "tuning": check_tuning,
}
CHILDREN = {"device": device, "measured": measured, "swept": swept, "tuned": tuned, "timed": timed}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](**dict(json.loads(sys.argv[3])))))
        sys.exit()
    sys.exit(main(sys.argv[1:]))
