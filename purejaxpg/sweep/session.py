"""One whole sweep: devices, search, engine, logs and report, put together.

    from purejaxpg.sweep import session
    session.sweep("study.toml", session.Options(confirm=8))

This is what the command line calls. Nothing here imports jax before `find_devices`, which has to
set the number of CPU devices first.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from purejaxpg import FaultError, InputError, signals, streams
from purejaxpg.cluster import processes

# The first is worth a tenth of PPO's speed on a processor with registers of 512 bits and nothing on
# others. The second keeps devices that are cores from taking each other's time.
CPU_FLAGS = {"--xla_cpu_prefer_vector_width": 512, "--xla_cpu_multi_thread_eigen": "false"}
PROGRAMS_BYTES = 2**30  # of compiled programs on disk; beyond, the least recently used are deleted
EXIT_FAULT, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
EXECUTORS = ("local", "ray")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run a sweep. None of this changes its results, except for `confirm`."""

    out: Path | None = None  # result directory; None: results/NAME
    devices: int | None = None  # of each process; None: all
    confirm: int = 0  # fresh seeds for the winner, the runners-up and the default
    executor: str = "local"  # or "ray"
    ray_address: str | None = None
    ray_task: Mapping[str, float] = dataclasses.field(default_factory=dict)
    logs: Sequence[str] = ()  # "tensorboard", "wandb"
    snapshot_every_s: float = 30.0  # least time between snapshots; 0: after every segment
    quiet: bool = False

    def check(self) -> None:
        """Raise an InputError if two options contradict each other."""
        if self.confirm < 0:
            raise InputError(f"--confirm must be 0 or more, but is {self.confirm}.")
        if self.executor not in EXECUTORS:
            raise InputError(f"--executor must be local or ray, but is {self.executor!r}.")
        if self.executor == "ray" and self.devices is not None:
            raise InputError("--devices is for one machine; with --executor ray, see --ray-task.")
        if self.executor != "ray" and (self.ray_address or self.ray_task):
            raise InputError("--ray-address and --ray-task need --executor ray.")


DEFAULTS = Options()


def sweep(path: str | os.PathLike[str], options: Options = DEFAULTS, given: Any = None) -> int:
    """Run the sweep of a TOML file, or resume it, and write its report.

    Args:
        path: the TOML file.
        options: how to run it.
        given: an instance of the trainer's `Given`, for a trainer that has one.

    Returns:
        The exit status: 0, or in a process that follows another, the exit status of that one.

    Raises:
        InputError: the file or the options ask for something that cannot be done.
        FaultError: the surroundings failed; what was committed is kept.
    """
    options.check()
    ray = options.executor == "ray"
    if ray:  # this process only plans and commits: the accelerator is for the tasks
        os.environ["JAX_PLATFORMS"] = "cpu"
    devices = find_devices(1 if ray else options.devices, several=not ray)
    from purejaxpg.sweep import spec as specs

    load = functools.partial(specs.load, Path(path), given)
    if len({device.process_index for device in devices}) > 1:
        return _together(load, options, devices)
    run(load(), options, devices)
    return 0


def _together(load: Callable[[], Any], options: Options, devices: list[Any]) -> int:
    """Run a sweep as one of several processes: the first leads, the others follow."""
    import jax

    from purejaxpg.cluster import distributed

    if jax.process_index() > 0:
        return distributed.follow(load, devices)
    with distributed.leading(exit_status) as mail:
        run(load(), options, devices, functools.partial(distributed.Leader, mail=mail))
    return 0


def run(
    spec: Any,
    options: Options,
    devices: Sequence[Any],
    make_backend: Callable[..., Any] | None = None,
) -> Path:
    """Run or resume a checked sweep, then write its report.

    Args:
        spec: as `spec.load` or `spec.from_dict` returns it.
        options: how to run it.
        devices: jax devices, as `find_devices` returns them.
        make_backend: (spec, devices) -> what computes; by default this process does.

    Returns:
        The directory of the report.

    Raises:
        InputError: the result directory belongs to a different sweep.
        FaultError: the surroundings failed; what was committed is kept.
    """
    from purejaxpg.report import sinks, writer
    from purejaxpg.sweep import engine
    from purejaxpg.sweep import search as searches
    from purejaxpg.sweep import store as stores

    console = make_console()
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    out = options.out or Path("results") / spec.name
    logs = sinks.Logs(options.logs, spec.name, say)
    with stores.Store.open(out, dict(spec.identity), spec.text) as store:
        if engine.unfinished(searches.rounds(spec, options.confirm), store):
            _compute(spec, options, devices, make_backend, store, logs, console)
        else:
            say(f"Already finished: {out}")
        logs.finish(store)
    written = writer.write(out, console)
    say(f"Results: {written}")
    return Path(written)


def _compute(
    spec: Any,
    options: Options,
    devices: Sequence[Any],
    make_backend: Callable[..., Any] | None,
    store: Any,
    logs: Any,
    console: Any,
) -> None:
    """Compute what a result directory lacks."""
    from purejaxpg.sweep import compute, engine
    from purejaxpg.sweep import progress as progresses
    from purejaxpg.sweep import search as searches

    log = store.path / "progress.jsonl"
    with progresses.Progress(console, options.quiet, log) as progress:
        progress.begin(spec, searches.rehearse(searches.rounds(spec, options.confirm)))
        backend = (make_backend or compute.Backend)(spec, devices)
        executor = None
        if options.executor == "ray":
            from purejaxpg.cluster import ray_executor

            executor = ray_executor.Ray(spec, options.ray_address, dict(options.ray_task))
            backend.slots, backend.on_cpu = executor.slots, executor.on_cpu
        engine.run(
            searches.rounds(spec, options.confirm),
            store,
            backend,
            progress,
            options.snapshot_every_s,
            executor,
            functools.partial(logs.write, store),
        )


def exit_status(error: BaseException) -> int:
    """Return the exit status for an error: 1 fault, 2 bad input, 130 interrupted, 143 SIGTERM."""
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, signals.Terminated)
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAULT


def make_console() -> Any:
    """Return the console to print on; in a file or a pipe it is as wide as a table needs."""
    from rich.console import Console

    return Console(width=None if streams.on_terminal(sys.stdout) else 120)


# ----------------------------------------------------------------------------------------- devices


def find_devices(wanted: int | None = None, several: bool = False) -> list[Any]:
    """Return the devices to use. Call this before anything else imports jax.

    XLA computes a batch of small matrix products on one core only, so each core of a CPU becomes a
    device.

    Args:
        wanted: devices of each process; None: all.
        several: if this process is one of several of a job, return the devices of all of them.

    Raises:
        InputError: fewer than one device is asked for, or more than there are.
        FaultError: jax finds no device of the kind that JAX_PLATFORMS asks for, or the other
            processes do not start.
    """
    if wanted is not None and wanted < 1:
        raise InputError(f"--devices must be 1 or more, but is {wanted}.")
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    flags = os.environ.get("XLA_FLAGS", "")
    defaults = {"--xla_force_host_platform_device_count": wanted or cores, **CPU_FLAGS}
    added = [f"{flag}={value}" for flag, value in defaults.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])
    cache_programs()
    count = processes.how_many() if several else 1
    if count > 1:
        processes.put_together(count)
    import jax

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        wish, reason = os.environ.get("JAX_PLATFORMS", ""), str(error) or "no such device"
        raise FaultError(f"jax finds no device for JAX_PLATFORMS={wish!r}: {reason}.") from error
    own = len(jax.local_devices())
    if wanted is not None and wanted > own:
        limit = f"{own} here (XLA_FLAGS may limit them)"
        raise InputError(f"--devices must be at most {limit}, but is {wanted}.")
    of_process = [[d for d in devices if d.process_index == p] for p in range(count)]
    return [device for own_devices in of_process for device in own_devices[:wanted]]


def cache_programs() -> None:
    """Turn on jax's persistent cache of compiled programs, unless the user has configured it.

    It lies in the user's cache directory. Its keys cover all that was traced, jax's version and the
    processor. JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    programs = Path(base) / "purejaxpg" / "programs"
    try:
        programs.mkdir(parents=True, exist_ok=True)
        sizes = {path: path.stat() for path in programs.iterdir()}
        excess = sum(stat.st_size for stat in sizes.values()) - PROGRAMS_BYTES
        for path in sorted(sizes, key=lambda path: max(sizes[path].st_atime, sizes[path].st_mtime)):
            if excess <= 0:
                break
            excess -= sizes[path].st_size
            path.unlink()
    except (OSError, RuntimeError):  # no home, read-only, or another process cleans up as well
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
