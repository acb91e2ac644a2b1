"""Sweep specifications: a TOML file in, a checked list of runs out.

    agent = "ppo"                     # a name from `purejaxpg list`, or the path of a file
    seeds = 8                         # 0..7, or a list
    [config]                          # fields that every run shares
    env = "CartPole-v1"
    [sweep]                           # axes; their product times the seeds are the runs
    learning_rate = [3e-4, 1e-3]

TOML, because YAML reads `5e-4` as a string.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import pkgutil
import sys
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import purejaxpg.agents
from purejaxpg import InputError
from purejaxpg import config as configs

KEYS = ("agent", "seeds", "config", "sweep", "eval_episodes", "rows_per_device")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run."""

    run_id: str
    config: Any  # the agent's Config
    seed: int
    swept: Mapping[str, Any]  # the swept fields only


@dataclasses.dataclass(frozen=True)
class Spec:
    """A checked sweep."""

    name: str
    agent_name: str
    agent: types.ModuleType
    runs: tuple[Run, ...]
    eval_episodes: int
    rows_per_device: int | None  # None: decided when the sweep is planned
    identity: Mapping[str, Any]  # JSON-able; equal for equal sweeps only
    text: str = ""

    @property
    def num_configs(self) -> int:
        """Number of configurations, seeds not counted."""
        return len(self.runs) // len({run.seed for run in self.runs})


def agent_names() -> list[str]:
    """Return the names of the agents that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(purejaxpg.agents.__path__))


def agent_path(name: str, base: Path = Path()) -> Path:
    """Return the file of a built-in agent, or of the agent at path `name` seen from `base`."""
    if name.endswith(".py") or "/" in name:
        return (base / name).resolve()
    configs.require_known(name, agent_names(), "agent")
    return Path(purejaxpg.agents.__path__[0]) / f"{name}.py"


def load_agent(name: str, base: Path = Path()) -> types.ModuleType:
    """Import an agent by name, or by path, which runs that file's code.

    Raises:
        InputError: there is no such agent, its file does not import, or it lacks a part of the
            contract.
    """
    path = agent_path(name, base)
    if path.parent == Path(purejaxpg.agents.__path__[0]).resolve():
        return importlib.import_module(f"purejaxpg.agents.{path.stem}")
    if not os.path.isfile(path):  # False, where Path.is_file would raise for a name too long
        raise InputError(f"agent {name!r} is not a file; it was looked for at {path}.")
    module_name = f"purejaxpg_fork_{path.stem}_{_digest(str(path))[:8]}"
    found = importlib.util.spec_from_file_location(module_name, path)
    if found is None or found.loader is None:
        raise InputError(f"agent {name!r} must be a Python file whose name ends in .py.")
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"agent {name!r} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if not configs.is_config_module(module):
        raise InputError(f"agent {name!r} must define {', '.join(configs.CONTRACT)}.")
    known = set(dir(module.Config)) | set(getattr(module.Config, "__dataclass_fields__", ()))
    known = {*dir(module.Config), *getattr(module.Config, "__dataclass_fields__", ())}
    for needed in ("env", "env_kwargs", "env_params", "num_updates", "steps_per_update"):
        if needed not in known:
            raise InputError(f"Config of agent {name!r} must be a dataclass with {needed}.")
    return module


def load(path: Path) -> Spec:
    """Read and check the TOML file at `path`.

    Raises:
        InputError: the file is missing, is not TOML, or asks for something that cannot be done.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text)
    except FileNotFoundError:
        raise InputError(f"There is no sweep file {str(path)!r}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    return from_dict(raw, path.stem, path.parent, text)


def from_dict(raw: Mapping[str, Any], name: str, base: Path = Path(), text: str = "") -> Spec:
    """Check a sweep given as plain values (see the module's example)."""
    for key in raw:
        configs.require_known(key, KEYS, "key in a sweep file named")
    agent_name = raw.get("agent")
    if not isinstance(agent_name, str):
        raise InputError(f"agent must be a name or a path, but is {agent_name!r}.")
    agent = load_agent(agent_name, base)
    fixed, swept = _table(raw, "config"), _flat(_table(raw, "sweep"))
    both = ", ".join(sorted(set(_flat(fixed)) & set(swept)))
    configs.require(not both, f"{both} must stand in [config] or in [sweep], not in both.")
    axes = _axes(agent, swept)
    seeds = _seeds(raw.get("seeds", 1))
    source = hashlib.sha256(agent_path(agent_name, base).read_bytes()).hexdigest()
    runs = tuple(_runs(agent, fixed, axes, seeds, source))
    _refuse_repeated(runs)
    eval_episodes = _positive("eval_episodes", raw.get("eval_episodes", 128))
    rows = raw.get("rows_per_device")
    if rows is not None:
        _positive("rows_per_device", rows)
    identity = {
        "agent": agent_name,
        "agent_source": source[:16],
        "seeds": seeds,
        "config": json.loads(json.dumps(fixed)),
        "sweep": json.loads(json.dumps(axes)),
        "eval_episodes": eval_episodes,
        "rows_per_device": rows,
    }
    return Spec(name, agent_name, agent, runs, eval_episodes, rows, identity, text)


def _runs(
    agent: types.ModuleType,
    fixed: Mapping[str, Any],
    axes: Mapping[str, list[Any]],
    seeds: list[int],
    source: str,
) -> Iterable[Run]:
    for values in itertools.product(*axes.values()):
        swept = dict(zip(axes, values, strict=True))
        config = configs.build(agent.Config, _nested(fixed, swept))
        agent.check(config)
        for seed in seeds:
            content = json.dumps([source, configs.to_dict(config), seed], sort_keys=True)
            yield Run(_digest(content)[:16], config, seed, swept)


def _axes(agent: types.ModuleType, axes: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Check the axes: known fields, each with a list of distinct values of the right type."""
    hints = configs.field_types(agent.Config)
    for name, values in axes.items():
        configs.require_known(name.partition(".")[0], hints, "field")
        configs.require(
            name not in ("env_params", "env_kwargs"),
            f"[sweep] {name} must name one value, as {name}.NAME = [...], but is {values!r}.",
        )
        configs.require(
            isinstance(values, list) and len(values) > 0,
            f"[sweep] {name} must be a list of values, but is {values!r}.",
        )
        for value in values:  # its type, before anything is done with it
            configs.build(agent.Config, _nested({}, {name: value}))
    return dict(axes)


def _refuse_repeated(runs: tuple[Run, ...]) -> None:
    """Refuse two runs of one configuration and seed: an axis lists a value twice."""
    seen: dict[str, Run] = {}
    for run in runs:
        if run.run_id in seen:
            raise InputError(f"[sweep] lists a value twice: {dict(run.swept)!r} occurs again.")
        seen[run.run_id] = run


def _seeds(value: Any) -> list[int]:
    counted = type(value) is int and 0 < value <= 10**7
    seeds = list(range(value)) if counted else value
    valid = (
        isinstance(seeds, list)
        and len(seeds) > 0
        and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        and len(set(seeds)) == len(seeds)
    )
    configs.require(
        valid,
        f"seeds must be a number of seeds or a list of distinct seeds from 0 to 2^32 - 1, "
        f"but is {value!r}.",
    )
    return seeds


def _positive(name: str, value: Any) -> int:
    valid = type(value) is int and value > 0
    configs.require(valid, f"{name} must be a whole number, 1 or more, but is {value!r}.")
    return value


def _table(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name, {})
    configs.require(isinstance(value, dict), f"{name} must be a table, but is {value!r}.")
    return value


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """{"env_params": {"gravity": x}} -> {"env_params.gravity": x}, other fields as they are."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if name in ("env_params", "env_kwargs") and isinstance(value, dict):
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            flat[name] = value
    return flat


def _nested(fixed: Mapping[str, Any], swept: Mapping[str, Any]) -> dict[str, Any]:
    """Merge fixed and swept values back into the fields of a configuration."""
    merged: dict[str, Any] = {}
    for name, value in {**_flat(fixed), **swept}.items():
        outer, dot, inner = name.partition(".")
        if dot and outer in ("env_params", "env_kwargs"):
            merged.setdefault(outer, {})[inner] = value
        else:
            merged[name] = value
    return merged


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
