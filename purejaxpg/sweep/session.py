"""Run one whole sweep: devices, search, engine, logs and report.

    from purejaxpg.sweep import session
    session.sweep("study.toml", session.Options(confirm=8))

The command line calls these functions. Nothing imports jax before `find_devices`, which has to set
the number of CPU devices first.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from purejaxpg import FaultError, InputError, modules, signals, streams
from purejaxpg.cluster import processes

# The first makes PPO a tenth faster on a processor with 512-bit registers and does nothing on
# others. The second keeps each device, which is a core, from using the others.
CPU_FLAGS = {"--xla_cpu_prefer_vector_width": 512, "--xla_cpu_multi_thread_eigen": "false"}
PROGRAMS = "programs"  # folder of a result directory, on a GPU
PROGRAMS_BYTES = 2**30  # size of the cache of programs; the least recently used are deleted
EXIT_FAULT, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
EXECUTORS = ("local", "ray")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run a sweep. Only `confirm`, `eval_every` and `mesh` change its results."""

    out: Path | None = None  # result directory; None: results/NAME
    devices: int | None = None  # of each process; None: all
    confirm: int = 0  # fresh seeds for the winner, the runners-up and the default
    executor: str = "local"  # or "ray"
    ray_address: str | None = None
    ray_task: Mapping[str, float] = dataclasses.field(default_factory=dict)
    logs: Sequence[str] = ()  # "tensorboard", "wandb"
    snapshot_every_s: float = 30.0  # minimum time between snapshots; 0: after every segment
    accept_source: bool = False  # continue although comments or formatting of the code changed
    eval_every: int | None = None  # updates; in place of the sweep file's
    mesh: Mapping[str, Any] | None = None  # axes and sizes; in place of the sweep file's
    quiet: bool = False
    imports: Sequence[str] = ()  # modules, which may register environments

    def check(self) -> None:
        """Raise an InputError if two options contradict each other."""
        if self.confirm < 0:
            raise InputError(f"--confirm must be 0 or more, but is {self.confirm}.")
        if self.eval_every is not None and self.eval_every < 1:
            raise InputError(f"--eval-every must be 1 or more updates, but is {self.eval_every}.")
        if self.executor not in EXECUTORS:
            raise InputError(f"--executor must be local or ray, but is {self.executor!r}.")
        if self.executor == "ray" and self.devices is not None:
            raise InputError("--devices is for one machine; with --executor ray, use --ray-task.")
        if self.executor != "ray" and (self.ray_address or self.ray_task):
            raise InputError("--ray-address and --ray-task need --executor ray.")

    @property
    def keys(self) -> dict[str, Any]:
        """The options that replace a key of the sweep file."""
        own = {"eval_every": self.eval_every, "mesh": self.mesh}
        return {name: value for name, value in own.items() if value is not None}


DEFAULTS = Options()


def sweep(path: str | os.PathLike[str], options: Options = DEFAULTS, given: Any = None) -> int:
    """Run the sweep of a TOML file, or resume it, and write its report.

    Args:
        path: the TOML file; it may have stages, or several agents.
        options: how to run it.
        given: an instance of the trainer's `Given`, for a trainer that has one.

    Returns:
        The exit status: 0, or in a process that follows another, that process's exit status.

    Raises:
        InputError: the file or the options are invalid.
        FaultError: a device, a disk or another process failed; committed units are kept.
    """
    options.check()
    ray = options.executor == "ray"
    if ray:  # this process only plans and commits, and leaves accelerators to the tasks
        os.environ["JAX_PLATFORMS"] = "cpu"
    devices = find_devices(1 if ray else options.devices, several=not ray)
    from purejaxpg.sweep import stages

    modules.import_all(options.imports, Path(path).parent)
    together, pipeline = len({d.process_index for d in devices}) > 1, stages.read(Path(path))
    if pipeline is not None:
        if together or given is not None:
            what = f"{path} has several {pipeline.kind}"
            raise InputError(f"{what}, so it needs one process, and no given arrays.")
        run_stages(pipeline.having(options.keys), options, devices)
    elif together:
        return _together(functools.partial(load, path, given, options), options, devices)
    else:
        run(load(path, given, options), options, devices)
    return 0


def load(path: str | os.PathLike[str], given: Any = None, options: Options = DEFAULTS) -> Any:
    """Read and check a TOML file without stages, and the arrays that it is given."""
    from purejaxpg.sweep import sources
    from purejaxpg.sweep import spec as specs

    resolve = functools.partial(sources.resolve, Path(path).parent, sources.no_stage)
    return specs.load(Path(path), given, resolve, options.keys)


def run_stages(pipeline: Any, options: Options, devices: Sequence[Any]) -> Path:
    """Run or resume the stages, or the agents, of `stages.read` in order; write their reports.

    `options.confirm` is for the last stage, or for every agent. The directory of the last report is
    returned.

    Raises:
        InputError: a stage is invalid, or has results of another sweep.
        FaultError: as for `run`.
    """
    from purejaxpg.sweep import kept, stages
    from purejaxpg.sweep import store as stores

    out = options.out or Path("results") / pipeline.path.stem
    for stage, spec in zip(pipeline.stages, stages.plan(pipeline, options.confirm), strict=True):
        spec = kept.settle(out / stage.name, spec, options.accept_source)
        stages.refuse_changed(pipeline, stage, spec, out)
        _check_devices(spec, options, devices)
        if not (out / stage.name).exists():
            stages.trace(spec, devices)
    stages.prepare(pipeline, out)
    console = make_console()
    with stores.held(out):
        for stage in pipeline.stages:
            spec, last = stages.load(pipeline, stage, out), stage is pipeline.stages[-1]
            spec = kept.settle(out / stage.name, spec, options.accept_source)
            stages.refuse_changed(pipeline, stage, spec, out)
            confirm = options.confirm if pipeline.confirms(stage) else 0
            own = dataclasses.replace(options, out=out / stage.name, confirm=confirm)
            directory = _results(spec, own, devices, None, console, stage.title)
            if last or not stages.reported(directory):
                written = report(directory, console)
        report_stages(out, console)
    return written


def _together(load: Callable[[], Any], options: Options, devices: list[Any]) -> int:
    """Run a sweep as one of several processes: the first leads, the others follow."""
    import jax

    from purejaxpg.cluster import distributed

    if jax.process_index() > 0:
        return distributed.follow(load, devices)
    if not options.quiet:
        note = "Note: running as several processes is experimental and was never tried on a pod."
        print(note, flush=True)
    if options.accept_source:
        raise InputError("--accept-source is for one process; the other processes do not know it.")
    with distributed.leading(exit_status) as mail:
        spec = load()
        if spec.given.digest:
            raise InputError("A sweep that is given arrays must run in one process.")
        if spec.mesh.size > 1:
            raise InputError(f"mesh must be absent in several processes, but is {spec.mesh}.")
        run(spec, options, devices, functools.partial(distributed.Leader, mail=mail))
    return 0


def run(
    spec: Any,
    options: Options,
    devices: Sequence[Any],
    make_backend: Callable[..., Any] | None = None,
) -> Path:
    """Run or resume a checked sweep, then write its report and return the report's directory.

    Args:
        spec: as `spec.load` or `spec.from_dict` returns it.
        options: how to run it.
        devices: jax devices, as `find_devices` returns them.
        make_backend: (spec, devices) -> a backend; None: `compute.Backend`.

    Raises:
        InputError: the result directory belongs to a different sweep.
        FaultError: a device, a disk or another process failed; committed units are kept.
    """
    console = make_console()
    return report(_results(spec, options, devices, make_backend, console), console)


def _results(
    spec: Any,
    options: Options,
    devices: Sequence[Any],
    make_backend: Callable[..., Any] | None,
    console: Any,
    title: str = "",
) -> Path:
    """Compute the missing results of a sweep, called `title`, and return its directory."""
    from purejaxpg.report import completions, sinks
    from purejaxpg.sweep import compute, engine, frozen, growth, kept, xla
    from purejaxpg.sweep import progress as progresses
    from purejaxpg.sweep import search as searches
    from purejaxpg.sweep import store as stores

    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    out = options.out or Path("results") / spec.name
    _check_devices(spec, options, devices)
    asked = kept.settle(out, spec, options.accept_source)
    spec = growth.continued(asked, out)
    logs = sinks.Logs(options.logs, spec.name, say)
    with stores.Store.open(out, dict(spec.identity), spec.text) as store:
        frozen.keep(store.path, spec.given)
        kept.keep(store.path, spec)
        if engine.unfinished(searches.rounds(spec, options.confirm), store):
            log, then = store.path / "progress.jsonl", functools.partial(logs.write, store)
            progress = progresses.Progress(console, options.quiet, log, title)
            if xla.stores_choices(devices[0]):
                use_cache(store.path / PROGRAMS)
            # Other processes know the sweep file alone.
            backend = (make_backend or compute.Backend)(asked, devices)
            _compute(spec, options, store, backend, progress, then)
        else:
            say(f"{title}: already finished." if title else f"Already finished: {out}")
        logs.finish(store)
        completions.keep(store, spec, say, options.quiet)
    return out


def _check_devices(spec: Any, options: Options, devices: Sequence[Any]) -> None:
    """Raise an InputError unless the devices make groups of a sweep's mesh."""
    from purejaxpg.sweep import spec as specs

    if options.executor == "local":  # a task of Ray has its own
        specs.check_devices(spec.mesh, len(devices))


def report(out: Path, console: Any) -> Path:
    """Write the report of a result directory and return where it is."""
    from purejaxpg.report import writer

    written = writer.write(out, console)
    console.print(f"Results: {written}", highlight=False, soft_wrap=True, markup=False)
    return Path(written)


def report_together(directories: Sequence[Path], out: Path, console: Any) -> None:
    """Write the page that compares several result directories, and say where it is."""
    from purejaxpg.report import writer

    written = writer.write_together(directories, out, console)
    console.print(f"Comparison: {written}", highlight=False, soft_wrap=True, markup=False)


def report_stages(out: Path, console: Any) -> None:
    """Write the page of a pipeline, or the comparison of several agents, and say where it is."""
    from purejaxpg.report import writer
    from purejaxpg.sweep import stages

    if stages.of_agents(out):
        try:
            report_together(stages.directories(out), out, console)
            return
        except InputError as error:  # of language models, for example
            console.print(f"Note: {error}", highlight=False, soft_wrap=True, markup=False)
    written = writer.write_stages(out)
    kind = "agents" if stages.of_agents(out) else "stages"
    console.print(f"All {kind}: {written}", highlight=False, soft_wrap=True, markup=False)


def _compute(
    spec: Any, options: Options, store: Any, backend: Any, progress: Any, then: Callable[[], None]
) -> None:
    """Compute the missing results of a result directory; call `then` after each commit."""
    from purejaxpg import hidden
    from purejaxpg.report import live
    from purejaxpg.sweep import engine
    from purejaxpg.sweep import search as searches

    rounds = functools.partial(searches.rounds, spec, options.confirm)
    with progress, live.Page(store.path, progress):
        executor = None
        if options.executor == "ray":
            from purejaxpg.cluster import ray_executor

            executor = ray_executor.Ray(spec, options.ray_address, dict(options.ray_task))
            backend.slots, backend.on_cpu = executor.slots, executor.on_cpu
        planned = searches.rehearse(rounds())
        progress.begin(spec, planned, [backend.groups(i, r, {}) for i, r in enumerate(planned)])
        warning = hidden.note(spec.agent, spec.agent_name, planned[0].legs[0].run.config)
        if warning:
            store.ledger.note(warning)
            progress.say(warning)
        engine.run(rounds(), store, backend, progress, options.snapshot_every_s, executor, then)


def exit_status(error: BaseException) -> int:
    """Return the exit status for an error: 1 fault, 2 bad input, 130 interrupted, 143 SIGTERM."""
    if isinstance(error, KeyboardInterrupt):
        terminated = isinstance(error, signals.Terminated)
        return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
    return EXIT_INPUT if isinstance(error, InputError) else EXIT_FAULT


def make_console() -> Any:
    """Return the console to print on; for a file or a pipe it is wide enough for tables.

    If the reader of a pipe leaves, as `head` does, the sweep goes on without output.
    """
    from rich.console import Console

    class Lasting(Console):
        def on_broken_pipe(self) -> None:
            streams.discard_output()

    return Lasting(width=None if streams.on_terminal(sys.stdout) else 120)


# ----------------------------------------------------------------------------------------- devices


def find_devices(wanted: int | None = None, several: bool = False) -> list[Any]:
    """Return the devices to use. Call this before anything else imports jax.

    XLA uses only one core for a batch of small matrix products, so each core of a CPU becomes a
    device.

    Args:
        wanted: devices of each process; None: all.
        several: if this process is one of several of a job, return the devices of all of them.

    Raises:
        InputError: `wanted` is less than 1, or more than there are.
        FaultError: jax finds no device for JAX_PLATFORMS, or the other processes do not start.
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
        processes.connect(count)
    import jax

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms, reason = os.environ.get("JAX_PLATFORMS", ""), str(error) or "no such device"
        raise FaultError(
            f"jax finds no device for JAX_PLATFORMS={platforms!r}: {reason}."
        ) from error
    own = len(jax.local_devices())
    if wanted is not None and wanted > own:
        limit = f"{own} here (XLA_FLAGS may limit them)"
        raise InputError(f"--devices must be at most {limit}, but is {wanted}.")
    of_process = [[d for d in devices if d.process_index == p] for p in range(count)]
    return [device for own_devices in of_process for device in own_devices[:wanted]]


def needed_by_one(agent: str, options: Options) -> int:
    """Return how many devices one run of an agent or of a sweep file needs: those of its mesh."""
    from purejaxpg.sweep import spec as specs

    raw = specs.parse(Path(agent))[0] if agent.endswith(".toml") else {}
    return specs.mesh({**raw, **options.keys}).size


def cache_programs() -> None:
    """Turn on jax's persistent cache of compiled programs, unless the user has configured it.

    It is in the user's cache directory. Its keys cover the traced program, jax's version and the
    processor. JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    programs = Path(base) / "purejaxpg" / "programs"
    try:
        programs.mkdir(parents=True, exist_ok=True)
        sizes = {path: path.stat() for path in programs.iterdir() if path.is_file()}
        excess = sum(stat.st_size for stat in sizes.values()) - PROGRAMS_BYTES
        for path in sorted(sizes, key=lambda path: max(sizes[path].st_atime, sizes[path].st_mtime)):
            if excess <= 0:
                break
            excess -= sizes[path].st_size
            path.unlink()
    except (OSError, RuntimeError):  # no home, read-only, or another process deletes files too
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(programs)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def use_cache(programs: Path) -> None:
    """Keep compiled programs, and what XLA chose while it tuned them, in a directory of their own.

    Call this after `find_devices`; it holds for all that is compiled later.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # jax has opened the other one
    jax.config.update("jax_compilation_cache_dir", str(programs))
