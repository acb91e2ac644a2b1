"""The loop over cases: each in a process of its own, its result on disk before the next begins."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from purejaxpg import FaultError, InputError, disk, modules, trainers
from purejaxpg.bench import cases as all_cases
from purejaxpg.bench import show
from purejaxpg.sweep import compute
from purejaxpg.text import count

FORMAT = 1
LIMIT_S = 900.0  # of one process; a case that takes longer is reported as failed
BAD_INPUT = 2  # exit status
BUSY = 0.3  # load per core above which numbers mean little
Say = Callable[[str], None]


class Bench:
    """The file of results."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        """Open the results in directory `out`, or begin them.

        Args:
            out: a directory, made if need be.
            identity: what must not differ between comparable results.

        Raises:
            InputError: the directory holds results of something else, or no results.
        """
        self.path = out / "bench.json"
        self.data: dict[str, Any] = {"format": FORMAT, "identity": dict(identity), "results": {}}
        with disk.faults("write", out):
            out.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        stored = self._read()
        differing = [
            name for name, value in identity.items() if stored["identity"].get(name) != value
        ]
        if differing:
            raise InputError(
                f"{self.path} was measured with another {' and another '.join(differing)}; choose "
                "another --out, or move it away."
            )
        self.data = stored

    def _read(self) -> dict[str, Any]:
        with disk.faults("read", self.path):
            text = self.path.read_text(encoding="utf-8")
        try:
            stored = json.loads(text)
            if stored["format"] == FORMAT and isinstance(stored["results"], dict):
                return stored
        except (ValueError, TypeError, KeyError):
            pass
        raise InputError(f"{self.path} is not a file of this benchmark; choose another --out.")

    def write(self) -> None:
        """Write the file, whole or not at all."""
        disk.write_text(self.path, json.dumps(self.data, indent=1, allow_nan=False))

    def done(self, case: all_cases.Case) -> bool:
        """Tell whether a case has been measured; one that failed has not."""
        return "error" not in self.data["results"].get(case.name, {"error": ""})

    def keep(self, case: all_cases.Case, result: Mapping[str, Any]) -> None:
        """Add a result and write."""
        known = self.data["roof"]["device_kind"]
        kind = result.get("device_kind", known)
        if kind != known:
            raise InputError(
                f"{self.path} was measured on {known}, and this is {kind}; choose another --out."
            )
        self.data["results"][case.name] = {"case": case.as_dict(), **result}
        self.write()


class Processes:
    """Starts processes that measure, one after the other."""

    def __init__(
        self, environment: Mapping[str, str], devices: int | None, imports: Sequence[str]
    ) -> None:
        """Give each these variables, this number of devices (None: all) and these modules."""
        self.environment = environment
        self.devices = devices
        self.imports = imports

    def ask(
        self, task: Mapping[str, Any], cache: str, flag: str = "", limit_s: float = LIMIT_S
    ) -> dict[str, Any]:
        """Return a process's answer, or {"error": the reason why there is none}.

        With an error, "refused" tells whether the input was bad, such as an agent's own code.

        Args:
            task: as `child.run` reads it.
            cache: directory of compiled programs.
            flag: one more of XLA's.
            limit_s: seconds after which the process is killed.
        """
        command = [sys.executable, "-m", "purejaxpg.cli", "bench", "--task", json.dumps(task)]
        if self.devices is not None:
            command += ["--devices", str(self.devices)]
        for name in self.imports:
            command += ["--import", name]
        environment = {
            **self.environment,
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if flag:
            environment["XLA_FLAGS"] = f"{self.environment.get('XLA_FLAGS', '')} --{flag}".strip()
        pipes: Any = {"capture_output": True, "text": True, "check": False}
        try:
            answer = subprocess.run(command, env=environment, timeout=limit_s, **pipes)
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {limit_s:.0f} s."}
        if answer.returncode != 0:
            error = why(answer.returncode, answer.stderr)
            return {"error": error, "refused": answer.returncode == BAD_INPUT}
        return json.loads(answer.stdout.splitlines()[-1])


def why(status: int, complaint: str) -> str:
    """Say why a process failed: in one line, unless it shows lines of a user's code."""
    if status == BAD_INPUT:
        return complaint.strip()
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it said nothing"
    if status < 0:
        return f"killed by signal {-status} (9: mostly for want of memory): {last}"
    return last


def run(
    wanted: Callable[[bool], Sequence[all_cases.Case]],
    out: Path,
    devices: int | None,
    quick: bool,
    minutes: float | None,
    console: Any,
    say: Say,
    imports: Sequence[str] = (),
) -> None:
    """Measure the wanted cases, show them, and keep them in `out`.

    Args:
        wanted: whether the devices are those of a CPU -> cases.
        out: a directory; cases that were measured there already are not measured again.
        devices: how many to use; None: all.
        quick: the cases are small, and the roof is measured in a moment.
        minutes: a case that has not ended after these is left; None: none is.
        console: for the tables.
        say: prints a line of progress.
        imports: modules that the processes import first, as users name them.

    Raises:
        InputError: the wanted cases cannot be trained, or `out` holds something else. An agent that
            fails only once it is compiled or trained does not keep the others from being measured.
        FaultError: not even the machine's roof can be measured.
    """
    began = time.monotonic()
    wanted(True)  # bad input is refused before anything is measured
    jax.config.update("jax_platforms", "cpu")  # the devices are for the processes that measure
    bench = Bench(out, identity(devices, quick))
    processes = Processes(dict(os.environ), devices, imports)
    load = warn_if_busy(say)
    try:
        if "roof" not in bench.data:
            say("Measuring the machine: a matrix product and a copy ...")
            with tempfile.TemporaryDirectory() as cache:
                roof = processes.ask({"roof": quick}, cache)
            if "error" in roof:
                raise FaultError(f"The machine cannot be measured: {roof['error']}")
            bench.data |= {"roof": roof, "machine": machine(load)}
            bench.write()
        cases = wanted(bench.data["roof"]["platform"] == "cpu")
        refused = measure(bench, processes, cases, minutes and began + 60 * minutes, say)
    finally:
        if bench.data["results"]:
            show.tables(bench.data, console)
            for path in show.figures(bench.data, out):
                say(f"Figure: {path}")
            say(f"Numbers: {bench.path}")
    if refused:
        raise InputError(
            f"{len(refused)} of {count(len(cases), 'case')} could not be measured, because the "
            f"agent or its fields must be mended: {'; '.join(refused)}."
        )


def measure(
    bench: Bench,
    processes: Processes,
    cases: Sequence[all_cases.Case],
    deadline: float | None,
    say: Say,
) -> list[str]:
    """Measure the cases that have not been measured.

    Args:
        bench: where results are kept.
        processes: what measures.
        cases: all that are wanted.
        deadline: by `time.monotonic`; a case that has not ended by then is left. None: none is.
        say: prints a line of progress.

    Returns:
        The labels of those whose input was bad.
    """
    refused: list[str] = []
    pending = [case for case in cases if not bench.done(case)]
    if not pending:
        say(f"All of {len(cases)} cases have been measured.")

    def left() -> float:
        return LIMIT_S if deadline is None else deadline - time.monotonic()

    for number, case in enumerate(pending, 1):
        result = None
        if left() > 0:
            say(f"[{number}/{len(pending)}] {case.label} ...")
            result = one(processes, case, min(left(), LIMIT_S))
        if result is None or ("error" in result and left() <= 0):
            say(f"Time is up: {len(pending) - number + 1} case(s) are left to the same command.")
            break
        bench.keep(case, result)
        if result.get("refused"):
            refused.append(case.label)
        say(f"    {show.one_line(result)}")
    return refused


def one(processes: Processes, case: all_cases.Case, limit_s: float) -> dict[str, Any]:
    """Measure a case and, unless it is quick or about a flag, how soon its programs are back.

    Args:
        processes: what measures.
        case: to be measured.
        limit_s: seconds for all of it.
    """
    load = load_average()
    with tempfile.TemporaryDirectory() as cache:
        task = {"case": case.as_dict(), "only_compile": False}
        began = time.monotonic()
        result = processes.ask(task, cache, case.flag, limit_s)
        left = limit_s - (time.monotonic() - began)
        if "error" not in result and not case.quick and not case.flag and left > 0:
            again = processes.ask({**task, "only_compile": True}, cache, case.flag, left)
            if "error" not in again:
                result["again_s"] = again["trace_s"] + again["lower_s"] + again["compile_s"]
    return {**result, "load_average_before": load}


def identity(devices: int | None, quick: bool) -> dict[str, Any]:
    """Return what must not differ between results that are compared."""
    own = [file for module in modules.named() for file in trainers.of_module(module)]
    sources = {"modules": trainers.digest(sorted(own))[:16]} if own else {}
    return {
        "version of the packages or the source": {**compute.versions(), **sources},
        "processor": processor(),
        "--devices": devices,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "--quick": quick,
    }


def machine(load: float | None) -> dict[str, Any]:
    """Describe the machine, as far as a number depends on it."""
    return {
        "processor": processor(),
        "cores": cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_average_before": load,
    }


def processor() -> str:
    """Return the model of the CPU."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def load_average() -> float | None:
    """Return the load average of the last minute, if the system has one."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def warn_if_busy(say: Say) -> float | None:
    """Return the load average, and warn if other programs are running."""
    load = load_average()
    if load is not None and load > BUSY * cores():
        say(f"Warning: the load average is {load:.1f} on {cores()} core(s); while other programs "
            "run, these numbers mean little.")  # fmt: skip
    return load
