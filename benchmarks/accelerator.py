"""Do the promises tested on the CPU hold on this device? Memory, running out of it, resuming.

    memory   Units of more and more rows: the bytes that `purejaxpg.sweep.memory` plans with, and
             the peak while they run. The peak must not exceed the plan by more than the planner
             leaves free, and the plan must not be twice the peak.
    oom      A sweep whose `rows_per_device` is too large ends with all runs done, with fewer rows
             and a note in its ledger: once because the planner notices, and once with a planner
             that lets everything pass, so that memory runs out while a unit is computed.
    resume   A sweep that is killed with -9 twice and resumed, and one that is not: are all arrays
             equal to the bit? Autotuning has its defaults, and no process finds the programs of
             another in a cache, so on a GPU each chooses its kernels again.

Each measurement is a process of its own: peaks cannot be reset, and a device's memory is held until
its process ends. On a GPU the process of `oom` gets a small share of the memory, on a CPU a limit
to its address space. Prints a table and, after each line of it, writes all of them as JSON.
Exit status: 0 if every check holds, else 1.

Run: python benchmarks/accelerator.py [memory] [oom] [resume] [--small | --full] [--out FILE.json]
"""

import argparse
import ctypes
import gc
import json
import math
import os
import resource
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
from purejaxpg.sweep import session
from purejaxpg.sweep import store as stores

MIB = 2**20
# Some allocations do not depend on rows: libraries, autotuning, thread pools.
SLACK = 64 * MIB
PPO = {"num_envs": 64, "num_steps": 128, "total_timesteps": 4 * 64 * 128}
SAC = {"env": "Pendulum-v1", "total_timesteps": 1000 + 4 * 16, "replay_capacity": 100_000}
FIELDS = {"ppo": PPO, "sac": SAC}

Finding = dict[str, Any]  # check, case, "seen" in words, and whether it holds (None: not checked)

# The cases of each check: agent, and rows; for `resume`, updates of units of 4 runs.
SMALL: dict[str, list[tuple[str, int]]] = {
    "memory": [("ppo", 16), ("ppo", 32), ("sac", 8)],
    "oom": [("ppo", 32)],
    "resume": [("ppo", 24), ("sac", 12)],
}
FULL: dict[str, list[tuple[str, int]]] = {
    "memory": [("ppo", 16), ("ppo", 64), ("ppo", 256), ("ppo", 1024), ("sac", 16), ("sac", 128)],
    "oom": [("ppo", 16)],
    "resume": [("ppo", 240), ("sac", 240)],
}


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="memory, oom, resume (all)")
    parser.add_argument("--small", action="store_true", help="small sizes, as on a CPU")
    parser.add_argument("--full", action="store_true", help="large sizes, as on an accelerator")
    parser.add_argument("--out", type=Path, default=Path("accelerator.json"), metavar="FILE.json")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.checks) - set(FULL):
        parser.error(f"there is no check {min(unknown)!r}")
    device = child("device")
    sizes = SMALL if arguments.small or device["platform"] == "cpu" else FULL
    sizes = FULL if arguments.full else sizes
    found: list[Finding] = []
    try:
        for finding in findings(arguments.checks or list(sizes), sizes, device):
            found.append(finding)
            show(finding)
            text = json.dumps({"device": device, "found": found}, indent=1)
            arguments.out.write_text(f"{text}\n", encoding="utf-8")
    except KeyboardInterrupt:
        print(f"Interrupted; see {arguments.out} for the finished checks.", file=sys.stderr)
        return 130
    failed = sum(finding["holds"] is False for finding in found)
    print(f"{device['kind']}: {len(found)} lines, {failed} do not hold; see {arguments.out}")
    return int(failed > 0)


def findings(
    checks: list[str], sizes: dict[str, list[tuple[str, int]]], device: dict[str, Any]
) -> Iterator[Finding]:
    """Check one thing after the other; a check that fails to run does not stop the rest."""
    todo = [(check, *case) for check in checks for case in sizes[check]]
    for check, agent, size in todo:
        try:
            for finding in CHECKS[check](agent, size, device):
                yield {"check": check, **finding}
        except RuntimeError as error:
            seen = str(error).strip().splitlines()[-1]
            yield {"check": check, "case": f"{agent}, {size}", "seen": seen, "holds": False}


def show(finding: Finding) -> None:
    holds = {True: "holds", False: "DOES NOT HOLD", None: "not checked"}[finding["holds"]]
    print(f"{finding['check']:7s} {finding['case']:28s} {holds:14s} {finding['seen']}", flush=True)


def child(name: str, options: Any = (), environment: dict[str, str] | None = None) -> Any:
    """Call a function below in a process of its own.

    Args:
        name: in CHILDREN.
        options: its keyword arguments.
        environment: variables added to those of this process.

    Returns:
        Its result.
    """
    found = subprocess.run(
        [sys.executable, __file__, "--child", name, json.dumps(options)],
        env={**surroundings(), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != 0:
        raise RuntimeError(f"{name} {options} ended with {found.returncode}:\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


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
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.05"} if device["platform"] == "gpu" else {}
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
    """Compare a sweep that was killed with one that was not."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        spec = spec_file(directory, resumable(agent, updates))
        finish(spec, directory / "whole")
        kills = sum(kill_after_a_commit(spec, directory / "killed") for _ in range(2))
        finish(spec, directory / "killed")
        compared, differ = differences(directory / "whole", directory / "killed")
    equal = "equal to the bit" if not differ else f"{len(differ)} differ, as {differ[0]}"
    yield {
        "case": f"{agent}, {updates} updates",
        "seen": f"killed {kills} times; of {compared} arrays {equal}",
        "differ": differ,
        "holds": not differ and kills == 2,
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


def start(spec: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start or resume a sweep that writes a snapshot after every segment."""
    words = ["sweep", str(spec), "--out", str(out), "--devices", "1", "--snapshot-every", "0"]
    return subprocess.Popen(
        [sys.executable, "-m", "purejaxpg.cli", *words, "--quiet"],
        env=surroundings(),
        stdout=subprocess.DEVNULL,
    )


def finish(spec: Path, out: Path) -> None:
    """Run a sweep to its end."""
    if (status := start(spec, out).wait()) != 0:
        raise RuntimeError(f"the sweep in {out} ended with {status}")


def kill_after_a_commit(spec: Path, out: Path) -> bool:
    """Resume a sweep until one more unit is done, then kill it; False if it ended before that."""
    before, process = committed(out), start(spec, out)
    try:
        while process.poll() is None and committed(out) <= before:
            time.sleep(0.02)
    finally:
        process.kill()
    return process.wait() == -signal.SIGKILL


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


CHECKS = {"memory": check_memory, "oom": check_oom, "resume": check_resume}
CHILDREN = {"device": device, "measured": measured, "swept": swept}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](**dict(json.loads(sys.argv[3])))))
        sys.exit()
    sys.exit(main(sys.argv[1:]))
