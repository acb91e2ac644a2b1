"""The command line: list, train, plan, sweep, report, export, eval, fsck, fork, bench, estimators.

jax is imported only when a command needs it, so that help is fast and the number of CPU devices can
still be chosen.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from purejaxpg import (
    CodeError,
    FaultError,
    InputError,
    __version__,
    contract,
    disk,
    modules,
    signals,
    streams,
    tracebacks,
    trainers,
)
from purejaxpg import config as configs
from purejaxpg.sweep import session
from purejaxpg.text import duration

say = functools.partial(print, flush=True)
NONE: Mapping[str, bool] = {}
OWN_ENVS = """
LIBRARY:NAME         of another library, as {libraries}
MODULE:CLASS         a class in a module of yours, as mazes:Maze
./FILE.py:CLASS      likewise, as ./mazes.py:Maze
--import MODULE      import a module first, which registers environments"""
ENV_OPTIONS = (
    "The environment's own parameters: --env-params.NAME VALUE; the arguments of its "
    "constructor: --env-kwargs.NAME VALUE."
)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    commands: Mapping[str, Any] = NONE  # by name

    def error(self, message: str) -> NoReturn:
        """Raise an InputError instead of printing the usage and exiting."""
        raise InputError(f"{message[:1].upper()}{message[1:]} (see {self.prog} --help).")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    0 done, 1 fault, 2 bad input, 130 interrupted, 143 terminated (SIGTERM).
    """
    streams.make_usable()
    try:
        with signals.as_exceptions():
            status = dispatch(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()  # while a failure can still be reported
            return status
    except BrokenPipeError:
        streams.discard_output()
        return session.EXIT_FAULT
    except OSError as error:
        if error.filename is not None or error.errno not in streams.UNWRITABLE:
            return explain(error)
        streams.discard_output()
        return complain(f"Standard output cannot be written: {error.strerror}.", session.EXIT_FAULT)
    except CodeError as error:
        return explain(error)
    except (InputError, FaultError) as error:
        return complain(error, session.exit_status(error))
    except KeyboardInterrupt as error:
        cause = "Terminated" if isinstance(error, signals.Terminated) else "Interrupted"
        message = f"{cause}; finished units are kept, and the same command resumes."
        status = complain(message, session.exit_status(error))
        signals.end_at_once(status)
        return status
    except Exception as error:
        return explain(error)


def dispatch(words: list[str]) -> int:
    """Run the command that `words` name and return its exit status."""
    parser = make_parser()
    if words and not words[0].startswith("-"):
        configs.require_known(words[0], parser.commands, "command")
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.command is not train:
        raise InputError(f"There is no option {rest[0]!r} (see purejaxpg --help).")
    if arguments.command is train:
        train(arguments, rest)
        return 0
    return arguments.command(arguments) or 0


def complain(message: object, status: int) -> int:
    """Print one sentence on stderr and return `status`."""
    print(" ".join(str(message).split()), file=sys.stderr)
    return status


def explain(error: Exception) -> int:
    """Show an error of a user's code and return its exit status; raise any other again."""
    lines = str(error) if isinstance(error, CodeError) else tracebacks.explain(error)
    if lines is None:
        raise error
    if tracebacks.wanted_whole():
        lines = "".join(traceback.format_exception(error)).rstrip()
    print(lines, file=sys.stderr)
    return session.EXIT_INPUT


def make_parser() -> Parser:
    """Return the parser of everything except the fields of an agent."""
    parser = Parser(
        prog="purejaxpg",
        description="Policy-gradient methods in JAX: train one run, or sweep thousands.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"purejaxpg {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def add(function: Any, text: str, **more: Any) -> Parser:
        name = function.__name__.removesuffix("_")
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **more)
        command.set_defaults(command=function)
        return command

    lister = add(list_, "show the agents and the environments")
    lister.add_argument("what", nargs="?", choices=["agents", "envs"], help="only these")
    add_import_option(lister)

    trainer = add(train, "train one run of an agent, or of a sweep file", add_help=False)
    trainer.add_argument("agent", nargs="?", help="a name, or the path of an agent or a sweep file")
    trainer.add_argument("-h", "--help", action="store_true", help="also show the agent's fields")
    add_given_option(trainer)
    add_published_options(trainer)
    add_train_options(trainer)

    add_sweep_commands(add)
    add_result_commands(add)
    forker = add(fork, "copy an agent's file, to change and sweep it")
    forker.add_argument("agent", help="a name from `purejaxpg list agents`")
    forker.add_argument("file", type=Path, metavar="FILE.py", help="the new file")
    add_bench_command(add)
    add_estimators_command(add)
    parser.commands = commands.choices
    return parser


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that imports modules of the user's."""
    text = (
        "import a module, or a file ./NAME.py, that registers environments; may be given several "
        "times"
    )
    option = parser.add_argument
    option("--import", action="append", dest="imports", default=[], metavar="NAME", help=text)


def add_given_option(parser: argparse.ArgumentParser, fields: Mapping[str, bool] = NONE) -> None:
    """Add the option that names the source of a given array.

    Args:
        parser: of a command.
        fields: that the trainer is given, and whether each is required.
    """
    text = "give the trainer a result directory's model (DIR, or DIR:best) or a .jsonl file"
    text += ", or a published one's reward a .py file" if "reward" in fields or not fields else ""
    named = [
        f"{field} is {'required' if needed else 'optional'}" for field, needed in fields.items()
    ]
    text += f"; {', '.join(named)}" if named else ""
    parser.add_argument("--given", action="append", default=[], metavar="NAME=SOURCE", help=text)


def add_published_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that give a published model and its data."""
    option = parser.add_argument
    text = "start from a published language model: a folder, a .gguf file, or smollm2"
    option("--model", metavar="SOURCE", help=text)
    text = "train that model on the lines of this file: demonstrations, pairs, judged completions "
    text += "or prompts; or on questions of a dataset, reasoning_gym:NAME"
    option("--data", metavar="FILE.jsonl", help=text)


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of train, without the agent's fields."""
    option = parser.add_argument
    seeds = "decides all randomness (0); several seeds are a small sweep"
    option("--seed", type=int, nargs="+", metavar="N", help=seeds)
    text = "start from the project's tuned fields, where there are some, or from the defaults"
    option("--preset", choices=["tuned", "none"], help=text)
    option("--run", metavar="ID", help="of a sweep file, train the run with this id")
    add_run_options(parser, "results/NAME-ENV-seedN-HASH", "1, or all for several seeds")


def add_sweep_commands(add: Any) -> None:
    """Add the commands on sweeps."""
    planner = add(plan, "forecast the compilations, memory, disk and time of a sweep")
    add_import_option(planner)
    option = planner.add_argument
    option("spec", type=Path, metavar="SPEC.toml", help="a sweep file")
    option("--devices", type=int, metavar="N", help="use N devices (all)")
    option("--confirm", type=int, default=0, metavar="N", help="as for sweep")
    option("--out", type=Path, metavar="DIR", help="result directory (results/SPEC)")
    option("--eval-every", type=int, metavar="N", help="as for sweep")
    add_mesh_option(planner)
    option("--quick", action="store_true", help="do not compile or time anything")
    option("--tune", action="store_true", help="write the best size of a unit into SPEC.toml")

    sweeper = add(sweep, "run a sweep, or resume it")
    option = sweeper.add_argument
    option("spec", type=Path, metavar="SPEC.toml", help="a sweep file")
    add_run_options(sweeper, "results/SPEC", "of each process: all; on a CPU each core is a device")
    confirm = "then run winner, runners-up and default on N fresh seeds (0; must be 0 for [pbt])"
    option("--confirm", type=int, default=0, metavar="N", help=confirm)
    executor = "compute on this machine, or as tasks of a Ray cluster (local)"
    option("--executor", choices=session.EXECUTORS, default="local", help=executor)
    address = "auto, HOST:PORT or ray://HOST:PORT (RAY_ADDRESS, else this machine)"
    option("--ray-address", metavar="ADDRESS", help=address)
    task = "resources of each task (GPU=1, else TPU=1, else CPU=1, whichever the cluster has)"
    option("--ray-task", type=resources, default={}, metavar="KIND=N,...", help=task)


def resources(text: str) -> dict[str, float]:
    """Read "GPU=1,highmem=0.5"."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    with contextlib.suppress(ValueError):
        amounts = {kind.strip(): float(amount) for kind, _, amount in pairs}
        if all(amounts) and all(0 < amount < math.inf for amount in amounts.values()):
            return amounts
    raise argparse.ArgumentTypeError(f"must look like GPU=1 or CPU=2, but is {text!r}")


def add_mesh_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that spreads each run over several devices."""
    text = (
        "split the batches and the matrices of a language model over groups of N times M devices "
        "(data=1,model=1, or mesh in the sweep file)"
    )
    parser.add_argument("--mesh", type=axes, metavar="data=N,model=M", help=text)


def axes(text: str) -> dict[str, Any]:
    """Read "data=1,model=2"; what the axes and the sizes may be is checked with a sweep's."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.strip() and size for name, _, size in pairs):
        raise argparse.ArgumentTypeError(f"must look like data=1,model=2, but is {text!r}")
    return {name.strip(): configs.parse_number(size) for name, _, size in pairs}


def add_result_commands(add: Any) -> None:
    """Add the commands on the results of a sweep."""

    def add_for_directory(command: Any, text: str) -> Any:
        parser = add(command, text)
        if command is eval_:
            add_import_option(parser)
        option = parser.add_argument
        option("directory", type=Path, metavar="DIR", help="a result directory")
        return option

    text = "write the report of a sweep again, or compare several sweeps on one page"
    option = add(report, text).add_argument
    option("directories", type=Path, nargs="+", metavar="DIR", help="a result directory")
    option("--out", type=Path, metavar="DIR", help="of the comparison (results/A-vs-B)")

    option = add_for_directory(export, "write the results as one tidy table with a row per run")
    option("--out", type=Path, metavar="FILE", help=".csv or .parquet (DIR/export.csv)")
    option("--curves", action="store_true", help="export training metrics, with a row per update")

    option = add_for_directory(eval_, "play fresh episodes with a trained policy")
    option("--run", default="best", metavar="ID", help="best, or the id of a run")
    option("--episodes", type=int, default=128, metavar="N", help="number of episodes (128)")
    option("--greedy", action="store_true", help="take the most probable actions")
    text = "print N texts of a language model instead, beside those of its reference"
    option("--samples", type=int, default=0, metavar="N", help=text)
    option("--seed", type=int, default=0, help="of the episodes (0)")
    text = "write the trained model, if a published one was given, in the layout that it has"
    option("--save", type=Path, metavar="FOLDER", help=text)
    option("--gif", type=Path, metavar="FILE.gif", help="animate one more episode (or FILE.mp4)")
    text = "the agent's file, for a fork; stored: the copy in DIR/source"
    option("--agent", type=Path, metavar="FILE.py", help=text)

    option = add_for_directory(fsck, "check every hash of a result directory")
    option("--repair", action="store_true", help="make the next run compute damaged units again")


def add_bench_command(add: Any) -> None:
    """Add the command that measures how fast training is here."""
    benchmark = add(bench, "measure how fast training is on this machine")
    add_import_option(benchmark)
    option = benchmark.add_argument
    option("--agents", nargs="+", metavar="NAME", help="kinds of agents (ppo)")
    option("--num-agents", nargs="+", type=int, metavar="N", help="agents at a time (1 16 64)")
    option("--num-envs", nargs="+", type=int, metavar="N", help="of each agent (its default)")
    option("--env", metavar="NAME", help="environment (the default of each kind)")
    option("--rows", type=int, metavar="N", help="agents in a unit (as in a sweep)")
    text = "give all agents a result directory's best model (without: a random reference)"
    option("--given", action="append", default=[], metavar="NAME=DIR", help=text)
    option("--full", action="store_true", help="all kinds, 1 to 4096 agents, 1 to 8192 num_envs")
    option("--accelerator", action="store_true", help="cases for an accelerator (10 minutes)")
    option("--flags", nargs="+", default=[], metavar="xla_X=V", help="also measure with each")
    option("--quick", action="store_true", help="small cases, as a test")
    option("--minutes", type=float, metavar="M", help="stop after M minutes")
    option("--devices", type=int, metavar="N", help="use N devices (all)")
    option("--out", type=Path, metavar="DIR", default=Path("results/bench"), help="(results/bench)")
    option("--quiet", action="store_true", help="print results only")
    option("--task", help=argparse.SUPPRESS)  # for a process that measures one case


def add_estimators_command(add: Any) -> None:
    """Add the command that compares estimators of gradients."""
    text = "tabulate bias and variance of KL estimators, of lambda and of groups, exactly"
    option = add(estimators, text).add_argument
    task = "a task whose completions can be listed (enumerable-3-4)"
    option("--task", metavar="NAME", default="enumerable-3-4", help=task)
    option("--seed", type=int, default=0, help="of the policies and of the samples (0)")
    keys = "also sample N gradients with each estimator; 0: exact expectations only (10000)"
    option("--keys", type=int, default=10_000, metavar="N", help=keys)
    distance = "of the policy's logits from the reference's (0.001 0.01 1)"
    default = [0.001, 0.01, 1.0]
    option("--distance", type=float, nargs="+", metavar="D", default=default, help=distance)
    option("--beta", type=float, default=0.5, help="price of a nat of divergence (0.5)")
    option("--out", type=Path, metavar="DIR", default=Path("results/estimators"),
           help="(results/estimators)")  # fmt: skip
    option("--quiet", action="store_true", help="print results only")


def add_run_options(parser: argparse.ArgumentParser, out: str, devices: str) -> None:
    """Add the options that train and sweep share.

    Args:
        parser: of a command.
        out: default of --out, as text.
        devices: default of --devices, as text.
    """
    add_import_option(parser)
    option = parser.add_argument
    option("--out", type=Path, metavar="DIR", help=f"result directory ({out})")
    option("--devices", type=int, metavar="N", help=f"use N devices ({devices})")
    every = "also score the runs after every N updates of training (only after the last one)"
    option("--eval-every", type=int, metavar="N", help=every)
    add_mesh_option(parser)
    option("--quiet", action="store_true", help="print results only")
    logs = (
        "also log every run for TensorBoard, in DIR/tensorboard, or offline for Weights & Biases, "
        "in DIR/wandb; may be given twice, and for a finished sweep"
    )
    accept = "continue although comments, docstrings or formatting of the agent's files changed"
    option("--accept-source", action="store_true", help=accept)
    log_choices = ["tensorboard", "wandb"]
    option("--log", action="append", dest="logs", choices=log_choices, default=[], help=logs)
    text = (
        "minimum seconds between snapshots, from which a killed sweep resumes (30); they take at "
        "most a twentieth of the time; 0: after every segment"
    )
    option(
        "--snapshot-every",
        dest="snapshot_every_s",
        type=float,
        default=30.0,
        metavar="S",
        help=text,
    )


def list_(arguments: argparse.Namespace) -> None:
    """Show the agents and the environments."""
    if arguments.what != "envs":
        width = max(map(len, trainers.names())) + 2
        for name in trainers.names():
            doc = trainers.load(name).__doc__ or ""
            print(f"{name:{width}s}{doc.strip().splitlines()[0]}" if not arguments.what else name)
    if arguments.what != "agents":
        modules.import_all(arguments.imports)
        from purejaxpg import envs
        from purejaxpg.envs import libraries

        print(*envs.names(), sep="\n")
        print(OWN_ENVS.format(libraries=", ".join(map(":".join, libraries.EXAMPLES.items()))))


def train(arguments: argparse.Namespace, words: list[str]) -> None:
    """Train one configuration, usually with one seed: a sweep of one run."""
    if arguments.agent is None:
        if arguments.help:
            make_train_parser(None).print_help()
            return
        raise InputError(
            "train needs an agent, by name or path (see purejaxpg list agents), or a sweep file."
        )
    options = options_of(arguments)
    options.check()
    one = arguments.devices is None and len(arguments.seed or ()) < 2
    needed = session.needed_by_one(arguments.agent, options) if one else arguments.devices
    devices = session.find_devices(needed)
    modules.import_all(arguments.imports)
    from purejaxpg.sweep import single

    if arguments.help:
        agent = single.agent_of(arguments.agent)
        started = agent.__name__ == "__main__"  # as `python mine.py`
        command = f"python {sys.argv[0]}" if started else f"purejaxpg train {arguments.agent}"
        make_train_parser(agent, command).print_help()
        return
    given, words = find_given(arguments, single.agent_of(arguments.agent), words)
    asked = single.Asked(arguments.seed, given, arguments.preset, arguments.run, options.keys)
    spec, note = single.read(arguments.agent, functools.partial(parse_fields, words=words), asked)
    if note and not arguments.quiet:
        say(note)
    out = options.out or single.directory(spec)
    session.run(spec, dataclasses.replace(options, out=out), devices)


def find_given(
    arguments: argparse.Namespace, agent: Any, words: list[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the sources by name, and the words with --model and --data if they are fields."""
    given = dict(map(parse_given, arguments.given))
    for name in (contract.MODEL, contract.DATA):
        value = getattr(arguments, name)
        if value is not None and name in configs.field_types(agent.Config):
            words = [*words, f"--{name}={value}"]
        elif value is not None:
            given[name] = value
    return given, words


def parse_given(word: str) -> tuple[str, str]:
    """Read "reference=results/sft"."""
    name, _, source = word.partition("=")
    if not (name and source):
        raise InputError(f"--given must be NAME=SOURCE, as reference=results/sft, but is {word!r}.")
    return name, source


def plan(arguments: argparse.Namespace) -> None:
    """Forecast a sweep, or tune the size of its units."""
    options = options_of(arguments)
    options.check()
    devices = session.find_devices(arguments.devices)
    from purejaxpg.sweep import forecast, stages

    modules.import_all(arguments.imports, arguments.spec.parent)
    pipeline = stages.read(arguments.spec)
    if pipeline is not None:
        configs.require(
            not arguments.tune,
            f"--tune needs a sweep file of one agent, but {arguments.spec} has several "
            f"{pipeline.kind}; without --tune, the costs of a row are printed for each.",
        )
        pipeline = pipeline.having(options.keys)
        specs, seconds = stages.plan(pipeline, arguments.confirm), 0.0
        out = arguments.out or Path("results") / arguments.spec.stem
        for stage, spec in zip(pipeline.stages, specs, strict=True):
            say(f"{stage.title}.")
            confirm = arguments.confirm if pipeline.confirms(stage) else 0
            known = spec.given.digest or "given" not in stage.raw
            spec, own = stored(spec, out / stage.name) if known else (spec, None)
            seconds += forecast.plan(spec, devices, confirm, say, arguments.quick, own)
        if seconds:
            say(f"All {pipeline.kind}: about {duration(seconds)}.")
        return
    spec = session.load(arguments.spec, options=options)
    if arguments.tune:
        forecast.tune(spec, arguments.spec, devices, say)
    else:
        spec, out = stored(spec, arguments.out or Path("results") / spec.name)
        forecast.plan(spec, devices, arguments.confirm, say, arguments.quick, out)


def stored(spec: Any, out: Path) -> tuple[Any, Path | None]:
    """Return a sweep as it has grown, with its result directory; None without results of it."""
    from purejaxpg.sweep import growth

    try:
        return growth.continued(spec, out), out
    except InputError as error:
        say(f"Note: {error}")
        return spec, None


def sweep(arguments: argparse.Namespace) -> int:
    """Run a sweep, or resume one."""
    return session.sweep(arguments.spec, options_of(arguments))


def options_of(arguments: argparse.Namespace) -> session.Options:
    """Return the options of train or sweep."""
    names = {field.name for field in dataclasses.fields(session.Options)}
    return session.Options(**{k: v for k, v in vars(arguments).items() if k in names})


def report(arguments: argparse.Namespace) -> None:
    """Write the tables and figures of a sweep, or of all its stages, again, or compare several."""
    from purejaxpg.sweep import stages

    console, roots, out = session.make_console(), arguments.directories, arguments.out
    if len(roots) > 1:
        session.report_together(roots, out or Path("results") / versus(roots), console)
        return
    if out is not None:
        raise InputError(
            "--out is the directory of a comparison, so it needs several result directories; the "
            f"report of one is written to {roots[0] / 'report'}."
        )
    directories = stages.directories(roots[0])
    for directory in directories:
        session.report(directory, console)
    if directories != roots:
        session.report_stages(roots[0], console)


def versus(directories: Sequence[Path]) -> str:
    """Return the name of the directory of a comparison."""
    names = [directory.absolute().name for directory in directories]
    return "-vs-".join(names if len(names) < 5 else [*names[:3], f"{len(names) - 3}-more"])


def export(arguments: argparse.Namespace) -> None:
    """Write the results as one tidy table."""
    from purejaxpg.report import export as exports
    from purejaxpg.sweep import stages

    directory = stages.last(arguments.directory)
    print(exports.write(directory, arguments.out, arguments.curves))


def eval_(arguments: argparse.Namespace) -> None:
    """Play fresh episodes with a trained policy."""
    session.find_devices(1)
    modules.import_all(arguments.imports)
    from purejaxpg.report import playback
    from purejaxpg.sweep import stages

    a = arguments
    directory = stages.last(a.directory)
    if a.save is not None:
        playback.save(directory, a.run, a.agent, a.save, say)
        return
    playback.run(directory, a.run, a.episodes, a.greedy, a.seed, a.gif, a.agent, say, a.samples)


def fsck(arguments: argparse.Namespace) -> int:
    """Check every hash of a result directory, or of all stages in it."""
    from purejaxpg.sweep import fsck as checks
    from purejaxpg.sweep import stages

    status = 0
    for directory in stages.directories(arguments.directory):
        if directory != arguments.directory:
            say(f"{directory}:")
        status = max(status, checks.run(directory, arguments.repair, say))
    return status


def fork(arguments: argparse.Namespace) -> None:
    """Copy an agent's file."""
    source, target = trainers.path_of(arguments.agent), arguments.file
    if not os.path.isfile(source):
        raise InputError(f"agent {arguments.agent!r} is not a file.")
    if target.suffix != ".py":
        raise InputError(f"The new file must end in .py, but is {str(target)!r}.")
    if os.path.lexists(target):
        raise InputError(f"{target} already exists; choose another name.")
    with disk.faults("write", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    print(f"Copied {arguments.agent} to {target}. Change it, then:")
    given = " --given NAME=DIR" if "\nclass Given" in target.read_text("utf-8") else ""
    for words, what in (
        (f"python {target}{given}", "one run"),
        (f'agent = "./{target.name}"', "in a sweep file beside it"),
    ):
        print(f"  {words:<33s} {what}")


def bench(arguments: argparse.Namespace) -> None:
    """Measure how fast training is on this machine."""
    if arguments.task is not None:
        began = time.perf_counter()
        devices = session.find_devices(arguments.devices)
        modules.import_all(arguments.imports)
        from purejaxpg.bench import child

        print(json.dumps(child.run(json.loads(arguments.task), devices, began)))
        return
    from purejaxpg.bench import cases, run

    modules.import_all(arguments.imports)
    arguments.given = list(map(parse_given, arguments.given))
    for name in ("devices", "minutes"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} must be more than 0, but is {value}.")
    minutes = cases.ACCELERATOR_MINUTES if arguments.accelerator else None
    run.run(
        functools.partial(cases.choose, arguments),
        arguments.out,
        arguments.devices,
        arguments.quick,
        minutes if arguments.minutes is None else arguments.minutes,
        session.make_console(),
        (lambda _: None) if arguments.quiet else say,
        arguments.imports,
    )


def estimators(arguments: argparse.Namespace) -> None:
    """Compare estimators of gradients where everything is known."""
    session.find_devices(1)
    from purejaxpg.lab import laboratory, run

    a = arguments
    setting = laboratory.Setting(a.task, a.seed, a.keys, tuple(a.distance), a.beta)
    progress = functools.partial(print, file=sys.stderr, flush=True)
    run.run(setting, a.out, session.make_console(), (lambda _: None) if a.quiet else progress)


def make_train_parser(agent: Any, command: str = "purejaxpg train AGENT") -> Parser:
    """Return a parser with the fields of an agent, for the help text of `command`."""
    fields = contract.given_fields(agent) if agent else {}
    needed = "".join(f"--given {field}=DIR " for field, required in fields.items() if required)
    options = f"{needed}[--seed N ...] [--preset none] [--out DIR] [--quiet] [--FIELD VALUE ...]"
    played = agent is None or contract.has_environment(agent.Config)
    parser = Parser(
        prog=command,
        usage=f"{command} {options}",
        description=(agent.__doc__ or "").strip().splitlines()[0] if agent else None,
        epilog=ENV_OPTIONS if played else None,
        allow_abbrev=False,
    )
    if fields or agent is None:
        add_given_option(parser, fields)
    if agent is None or hasattr(agent, "published"):
        add_published_options(parser)
    add_train_options(parser)
    if agent is not None:
        group = parser.add_argument_group("fields of the agent")
        texts, default = configs.field_help(agent.Config), agent.Config()
        for name in configs.field_types(agent.Config):
            if not name.startswith("env_"):
                shown = configs.to_dict(default)[name]
                text = f"{texts.get(name, '')} ({shown})".replace("%", "%%")
                group.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=text)
    return parser


def parse_fields(cls: type, words: list[str]) -> dict[str, Any]:
    """Read `--learning-rate 1e-3 --hidden 64 64 --env-params.gravity 5` as fields of `cls`."""
    hints = configs.field_types(cls)
    fields: dict[str, Any] = {}
    for flag, values in split_flags(words):
        name, _, inner = flag.replace("-", "_").partition(".")
        if inner and name not in contract.TABLES:
            name = f"{name}.{inner}"
        configs.require_known(name, hints, "field")
        if not values and hints[name] is bool:
            values = ["true"]
        configs.require(bool(values), f"--{flag} needs a value.")
        if name in contract.TABLES:
            configs.require(bool(inner), f"--{flag} must name one value, as --{flag}.NAME VALUE.")
            scalars = [parse_scalar(value) for value in values]
            fields.setdefault(name, {})[inner] = scalars[0] if len(scalars) == 1 else scalars
        else:
            fields[name] = configs.parse(name, hints[name], values)
    return fields


def parse_scalar(word: str) -> Any:
    """Return a word as a bool, a number or itself."""
    return {"true": True, "false": False}.get(word, configs.parse_number(word))


def split_flags(words: list[str]) -> list[tuple[str, list[str]]]:
    """["--a", "1", "--b=2"] -> [("a", ["1"]), ("b", ["2"])]."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            flags.append((flag, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise InputError(f"{word!r} must follow the --name of a field.")
    return flags


if __name__ == "__main__":
    sys.exit(main())
