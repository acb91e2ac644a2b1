"""The sweeps of `purejaxpg train`: one configuration, of an agent or of a sweep file.

    purejaxpg train ppo --env Pendulum-v1          # the tuned fields of presets.toml
    purejaxpg train study.toml --clip-eps 0.2      # the run of study.toml that has this value

A sweep file says all that it sets, so presets are for agents by name only.
"""

import dataclasses
import functools
import json
import os
import re
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import purejaxpg
from purejaxpg import InputError, contract, disk, trainers
from purejaxpg import config as configs
from purejaxpg.sweep import sources, stages
from purejaxpg.sweep import spec as specs
from purejaxpg.text import short

PRESETS = Path(purejaxpg.__file__).parent / "presets.toml"
TUNED, NONE = "tuned", "none"
# What is kept of a sweep file, beside the fields.
KEPT = ("eval_episodes", "eval_every", "rows_per_device", "mesh")
LISTED = 8  # values of an axis in a message, at most
Parse = Callable[[type], dict[str, Any]]  # the agent's `Config` -> the fields on the command line


@dataclasses.dataclass(frozen=True)
class Asked:
    """The options of `purejaxpg train`, the agent's fields apart."""

    seeds: Sequence[int] | None = None  # None: seed 0, or the seed of `run`
    given: Mapping[str, str] = dataclasses.field(default_factory=dict)
    preset: str | None = None  # TUNED, NONE, or None: tuned if there is such a preset
    run: str | None = None  # id of a run of a sweep file
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more of a sweep file's


def is_file(name: str) -> bool:
    """Return whether what is to be trained is a sweep file, and not an agent."""
    return name.endswith(".toml")


def agent_of(name: str) -> types.ModuleType:
    """Return the agent of that name or path, or the agent of a sweep file."""
    if not is_file(name):
        return trainers.load(name)
    pipeline = stages.read(Path(name))
    if pipeline is not None:
        raise InputError(f"{name} has {pipeline.kind}, but train needs a sweep of one agent.")
    agent = specs.parse(Path(name))[0].get("agent")
    if not isinstance(agent, str):
        raise InputError(f"agent must be a name or a path, but is {agent!r}.")
    return trainers.load(agent, Path(name).parent)


def read(name: str, parse: Parse, asked: Asked) -> tuple[specs.Spec, str]:
    """Return the sweep of one configuration, and a sentence about its preset, which may be empty.

    Args:
        name: of an agent, or the path of an agent's or of a sweep file.
        parse: reads the fields on the command line.
        asked: the other options.

    Raises:
        InputError: a field or an option is invalid, or a sweep file has several configurations.
    """
    fields = parse(agent_of(name).Config)
    if is_file(name):
        configs.require(
            asked.preset is None, f"--preset is for agents; {name} sets its own fields."
        )
        return _of_file(Path(name), fields, asked), ""
    configs.require(asked.run is None, f"--run is for sweep files, but {name!r} is an agent.")
    preset = {} if asked.preset == NONE else tuned(name, fields, asked.preset == TUNED)
    stem = Path(name).stem if trainers.is_path(name) else name
    raw = {"agent": name, "config": {**preset, **fields}, "given": dict(asked.given), **asked.keys}
    try:
        spec = _spec(raw, stem, Path(), asked.seeds or [0])
    except InputError as error:
        named = [field for field in preset if re.search(rf"\b{field}\b", str(error))]
        if not named:
            raise
        sets = " and ".join(f"{field} {short(preset[field])}" for field in named)
        reason = str(error).rstrip(".")
        raise InputError(f"{reason}; the preset sets {sets}, --preset none does not.") from error
    sets = ", ".join(f"{field} {short(value)}" for field, value in preset.items())
    env = contract.environment_name(spec.runs[0].config)
    return spec, f"Preset for {name} on {env}: {sets} (--preset none: none of it)." if sets else ""


def tuned(agent: str, fields: Mapping[str, Any], required: bool = False) -> dict[str, Any]:
    """Return the tuned fields of an agent on an environment, except those that are set already.

    Args:
        agent: a name; there is no preset for the path of a file.
        fields: those that are set; `env` is the agent's default unless it is among them.
        required: whether it is an error that there is no preset.

    Raises:
        InputError: it is required and there is none.
    """
    presets = tomllib.loads(PRESETS.read_text(encoding="utf-8")).get(agent, {})
    default = configs.to_dict(trainers.load(agent).Config())
    env = fields.get(contract.ENV, default.get(contract.ENV))
    if env not in presets and required:
        known = f" on {env}; there are presets for {', '.join(presets)}" if presets else ""
        raise InputError(f"There is no preset for {agent}{known}.")
    return {name: value for name, value in presets.get(env, {}).items() if name not in fields}


def _spec(raw: Mapping[str, Any], stem: str, base: Path, seeds: Sequence[int]) -> specs.Spec:
    """Check a sweep of one configuration; a single run is a unit of its own by default."""
    rows = {"rows_per_device": 1} if len(seeds) == 1 else {}
    resolve = functools.partial(sources.resolve, base, sources.no_stage)
    return specs.from_dict({**rows, **raw, "seeds": list(seeds)}, stem, base, resolve=resolve)


def _of_file(path: Path, fields: Mapping[str, Any], asked: Asked) -> specs.Spec:
    """Return the sweep of one configuration of a sweep file, with the rows of a unit in the file.

    Its runs thus have the ids of the whole sweep, and its bits if that ran on one device, too.
    """
    raw, base = specs.parse(path)[0], path.parent
    resolve = functools.partial(sources.resolve, base, sources.no_stage)
    whole = specs.from_dict(raw, path.stem, base, resolve=resolve)
    own = specs.flat(fields)
    swept, seed = _chosen(whole, own, asked.run)
    given = {name: _absolute(name, source) for name, source in asked.given.items()}
    one: dict[str, Any] = {n: raw[n] for n in ("agent", *KEPT) if n in raw}
    one["config"] = {**specs.flat(whole.fixed), **swept, **own}
    one["given"] = {**raw.get("given", {}), **given}
    return _spec({**one, **asked.keys}, path.stem, base, asked.seeds or [seed])


def _absolute(name: str, source: str) -> str:
    """Return the path of a source; a published model and its data may have names that are none."""
    named = name == contract.MODEL or (name in contract.NAMED and ":" in source)
    is_name = named and not os.path.exists(source) and os.sep not in source
    return source if is_name else os.path.abspath(source)


def _chosen(
    spec: specs.Spec, fields: Mapping[str, Any], run_id: str | None
) -> tuple[Mapping[str, Any], int]:
    """Return the swept values, and the seed, of the run with this id or of these fields."""
    runs = spec.runs if spec.search.pbt is None else ()
    if run_id is not None:
        found = [run for run in runs if run_id and run.run_id.startswith(run_id)]
        if len(found) != 1:
            raise InputError(f"--run must be the id of one run of {spec.name}, but is {run_id!r}.")
        return found[0].swept, found[0].seed
    named = {
        name: configs.canonical(spec.agent.Config, name, value)
        for name, value in fields.items()
        if name in spec.axes
    }
    others = [name for name in spec.axes if name not in named]
    equal = [run for run in runs if all(run.swept[name] == value for name, value in named.items())]
    left = [{name: run.swept[name] for name in others} for run in equal or runs] if others else [{}]
    distinct = {json.dumps(values): values for values in left}
    if len(distinct) == 1:
        return next(iter(distinct.values())), 0
    raise InputError(_how_to_choose(spec, others, len(distinct)))


def _how_to_choose(spec: specs.Spec, others: Sequence[str], number: int) -> str:
    """Describe how to name one of several configurations, by the fields that are still open."""
    axes = [spec.axes[name] for name in others]
    listed = [axis.values if len(axis.values) <= LISTED else () for axis in axes]
    flags = [
        f"--{name.replace('_', '-')} {' or '.join(map(short, values)) or 'VALUE'}"
        for name, values in zip(others, listed, strict=True)
    ]
    by_id = ", or with --run ID as `purejaxpg export` lists them" if number else ""
    several = f"{number} configurations" if number else "configurations that a search chooses"
    return f"{spec.name} has {several}: choose one with {' and '.join(flags)}{by_id}."


def directory(spec: specs.Spec) -> Path:
    """Return the default result directory of a sweep of one configuration."""
    ids, seeds = [run.run_id for run in spec.runs], "-".join(str(run.seed) for run in spec.runs)
    label = ids[0] if len(ids) == 1 else disk.sha256(" ".join(ids))
    seeds = seeds if len(ids) <= 4 else f"s-{len(ids)}"
    parts = [spec.name, contract.environment_name(spec.runs[0].config), f"seed{seeds}", label[:6]]
    # An environment of one's own may be named by a path.
    return Path("results") / "-".join(filter(None, parts)).replace("./", "").replace("/", "-")
