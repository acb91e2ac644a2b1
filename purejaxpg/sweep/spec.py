"""Sweep specifications: a TOML file in, a checked list of runs out.

    agent = "ppo"                     # a name from `purejaxpg list`, or the path of a file
    seeds = 8                         # 0..7, or a list
    [config]                          # fields that every run shares
    env = "CartPole-v1"
    [sweep]                           # axes; their product times the seeds are the runs
    learning_rate = [3e-4, 1e-3]
    env_params.gravity = [9.8, 20.0]  # a condition: configurations are ranked within each

For a search, `space.py` lists the distributions of an axis, and `search.py` implements::

    [search]  # grid (the default), random, sobol, lhs or optuna
    method = "sobol"
    samples = 64
    [halving]  # stop the worse configurations early
    [pbt]  # or let a population adapt its hyperparameters
    [robust]  # rank over conditions instead of within each
    by = "worst"

A trainer that is given frozen arrays finds them through a table, which `sources.py` reads::

    [given]
    reference = "results/sft"  # a result directory, or a data file

Sweep files are TOML because YAML reads `5e-4` as a string.
"""

import dataclasses
import itertools
import json
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import InputError, contract, disk, modules, trainers
from purejaxpg import config as configs
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import space
from purejaxpg.text import count

METHODS = ("grid", "random", "sobol", "lhs", "optuna")
TABLES = ("config", "sweep", "given", "search", "halving", "pbt", "robust")
KEYS = ("agent", "seeds", "eval_episodes", "eval_every", "rows_per_device", "mesh", *TABLES)

# (trainer, its first configuration, seeds, [given]) -> an instance of the trainer's `Given`, and
# the seeds in the order of its axes: those of the sweep, and then others that have an item.
Resolve = Callable[
    [types.ModuleType, Any, tuple[int, ...], Mapping[str, Any]], tuple[Any, tuple[int, ...]]
]


@dataclasses.dataclass(frozen=True)
class Method:
    """The table [search] of a sweep file."""

    method: str = "grid"
    samples: int = 0  # configurations to draw
    seed: int = 0
    # Configurations per batch of optuna, the first of which is drawn at random. By default it is a
    # quarter of the samples, and at most this.
    batch: int = 16


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving: each rung continues the best configurations of the one before.

    Jamieson and Talwalkar 2016, arXiv:1502.07943; a rung is a prefix of the same run.
    """

    rungs: int = 3
    eta: float = 3.0  # one in eta configurations continues, with eta times the updates


@dataclasses.dataclass(frozen=True)
class Pbt:
    """Population-based training: the worst members copy the best and perturb the copies.

    Jaderberg et al. 2017, arXiv:1711.09846: truncation selection, perturbation by a factor.
    """

    population: int = 16
    generations: int = 10
    replace: float = 0.25  # share of the population replaced by copies of the best
    factors: tuple[float, float] = (0.8, 1.25)  # one is drawn for each hyperparameter
    resample: float = 0.25  # probability of a fresh draw instead


@dataclasses.dataclass(frozen=True)
class Robust:
    """The table [robust]: a configuration is ranked by its scores under several conditions."""

    over: tuple[str, ...] = ()  # conditions in [sweep]; empty: all of them
    by: str = "mean"  # or "worst"


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The table `mesh`: the devices of a group, over which one run is spread, as a rectangle."""

    data: int = 1  # each batch of a run is split into so many parts
    model: int = 1  # and each large matrix

    @property
    def size(self) -> int:
        """Devices of a group."""
        return self.data * self.model

    def __str__(self) -> str:
        return f"{{ data = {self.data}, model = {self.model} }}"


@dataclasses.dataclass(frozen=True)
class Search(Method):
    """The tables [search], [halving] and [pbt] of a sweep file; None for an absent table."""

    halving: Halving | None = None
    pbt: Pbt | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """A checked sweep."""

    name: str
    agent_name: str
    agent: types.ModuleType
    # Runs known beforehand: none of optuna's, and one seed of a population.
    runs: tuple[plans.Run, ...] = ()
    eval_episodes: int = 128
    eval_every: int = 0  # updates between two evaluations within training; 0: none
    rows_per_device: int | None = None  # None: chosen when the sweep is planned
    mesh: Mesh = Mesh()  # of each group of devices, which computes a unit
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # JSON-able
    text: str = ""
    axes: Mapping[str, space.Axis] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    search: Search = Search()
    robust: Robust | None = None
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the table [config]
    source: str = ""  # hash of the agent's file and of the modules beside it
    # The agent's file and all local files that it and its environments need, by name on the import
    # path.
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    given: contract.Given = contract.NOTHING  # frozen arrays for all runs
    before: "tuple[Spec, ...]" = ()  # what a sweep that grew was at first, and after each growth

    @property
    def num_configs(self) -> int:
        """Number of configurations, conditions and seeds not counted."""
        if self.search.pbt is not None:
            return self.search.pbt.population
        each = len(self.seeds) * len(self.conditions)
        return len(self.runs) // each or self.search.samples

    @property
    def conditions(self) -> list[dict[str, Any]]:
        """The swept environments and parameters: every combination, or {} alone."""
        lists = {n: axis.values for n, axis in self.axes.items() if contract.is_condition(n)}
        product = itertools.product(*lists.values())
        return [dict(zip(lists, values, strict=True)) for values in product]

    def under_each(self, hyperparameters: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the swept fields of a configuration under each condition."""
        both = ({**hyperparameters, **condition} for condition in self.conditions)
        return [{name: values[name] for name in self.axes} for values in both]

    def environments(self) -> set[Any]:
        """Return the environments of the runs, or the fixed one if no run is known beforehand."""
        known = [run.config for run in self.runs]
        examples = known or [configs.build(self.agent.Config, _nested(self.fixed, {}))]
        return {env for config in examples if (env := contract.environment(config))}

    def make_run(self, swept: Mapping[str, Any], seed: int) -> plans.Run:
        """Return the run of a configuration and a seed, after checking the configuration."""
        config = configs.build(self.agent.Config, _nested(self.fixed, swept))
        self.agent.check(config)
        contract.check_given(self.agent, config, self.given)
        parts = [self.source, configs.to_dict(config), seed]
        digest = self.given.digest
        content = json.dumps([*parts, digest] if digest else parts, sort_keys=True)
        return plans.Run(disk.sha256(content)[:16], config, seed, swept)

    def default_values(self, swept: Mapping[str, Any]) -> dict[str, Any]:
        """Return the swept fields with the defaults of the hyperparameters, under one condition."""
        plain = configs.to_dict(self.agent.Config())
        return {n: swept[n] if contract.is_condition(n) else plain[n] for n in self.axes}


def parse(path: Path) -> tuple[dict[str, Any], str]:
    """Return the content of a TOML file, and its text, or raise an InputError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        return tomllib.loads(text), text
    except FileNotFoundError:
        raise InputError(f"There is no sweep file {str(path)!r}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def load(
    path: Path,
    given: Any = None,
    resolve: Resolve | None = None,
    more: Mapping[str, Any] = types.MappingProxyType({}),
) -> Spec:
    """Read and check the TOML file at `path`; the rest is as for `from_dict`.

    The keys in `more` replace those of the file.
    """
    raw, text = parse(path)
    raw |= more
    return from_dict(raw, path.stem, path.parent, text, given, resolve)


def from_dict(
    raw: Mapping[str, Any],
    name: str,
    base: Path = Path(),
    text: str = "",
    given: Any = None,
    resolve: Resolve | None = None,
) -> Spec:
    """Check a sweep given as plain values.

    Args:
        raw: the content of a sweep file, as in the module's example.
        name: of the sweep.
        base: the directory that a path in `agent` is relative to.
        text: of the sweep file, to be kept with the results.
        given: an instance of the trainer's `Given`, for a trainer that has one.
        resolve: makes one from the table [given].

    Raises:
        InputError: a key is unknown, or a value is invalid.
    """
    for key in raw:
        configs.require_known(key, KEYS, "key in a sweep file named")
    agent_name = raw.get("agent")
    if not isinstance(agent_name, str):
        raise InputError(f"agent must be a name or a path, but is {agent_name!r}.")
    modules.search(base)
    agent, source = trainers.load(agent_name, base), trainers.files(agent_name, base)
    fixed, swept = table(raw, "config"), flat(table(raw, "sweep"))
    both = ", ".join(sorted(set(flat(fixed)) & set(swept)))
    configs.require(not both, f"{both} must be in [config] or in [sweep], not in both.")
    axes = _axes(agent, swept)
    robust = _robust(raw, axes)
    spec = Spec(
        name=name,
        agent_name=agent_name,
        agent=agent,
        eval_episodes=_positive("eval_episodes", raw.get("eval_episodes", 128)),
        eval_every=_optional("eval_every", raw) or 0,
        rows_per_device=_optional("rows_per_device", raw),
        mesh=mesh(raw),
        text=text,
        axes=axes,
        seeds=tuple(_seeds(raw.get("seeds", 1))),
        search=_search(agent, raw, axes, robust),
        robust=robust,
        fixed=fixed,
        source=trainers.digest(source),
    )
    spec = dataclasses.replace(spec, given=_given(spec, table(raw, "given"), given, resolve))
    spec = dataclasses.replace(spec, runs=tuple(_runs(spec)))
    _refuse(spec)
    return _identified(spec, raw, swept, base)


def _identified(spec: Spec, raw: Mapping[str, Any], swept: Mapping[str, Any], base: Path) -> Spec:
    """Return a sweep with its identity and its files."""
    own = trainers.of_environments(spec.environments())
    spec = dataclasses.replace(spec, identity=_identity(spec, raw, swept, own))
    files = trainers.sources(trainers.path_of(spec.agent_name, base), own)
    return dataclasses.replace(spec, files=files)


def as_begun(spec: Spec, source: str, env_source: str) -> Spec:
    """Return a sweep with the hashes of its code when it was begun, and with the run ids of then.

    Args:
        spec: a sweep whose code differs in nothing that a program depends on.
        source: the `source` of then.
        env_source: the hash of the environments' files of then; "" if there were none.
    """
    begun = {"agent_source": source[:16], **({"env_source": env_source} if env_source else {})}
    spec = dataclasses.replace(spec, source=source, identity={**spec.identity, **begun})
    return dataclasses.replace(spec, runs=tuple(_runs(spec)))


def earlier(spec: Spec, state: Mapping[str, Any]) -> Spec:
    """Return what a sweep was before it grew; `state` holds what its identity had instead."""
    samples = state.get("search", {}).get("samples", 0)
    before = dataclasses.replace(
        spec,
        axes=_axes(spec.agent, state["sweep"]),
        seeds=tuple(state["seeds"]),
        fixed=state["config"],
        search=dataclasses.replace(spec.search, samples=samples),
    )
    return dataclasses.replace(before, runs=tuple(_runs(before)))


def _given(
    spec: Spec, table: Mapping[str, Any], given: Any, resolve: Resolve | None
) -> contract.Given:
    """Return the given arrays of a sweep, with the item of each seed."""
    seeds = spec.seeds
    if table:
        configs.require(given is None, "given must be in [given] or an argument, not both.")
        configs.require(resolve is not None, "[given] is read by purejaxpg.sweep.session.load.")
        first = {name: axis.at(0.0) for name, axis in spec.axes.items()}
        config = configs.build(spec.agent.Config, _nested(spec.fixed, first))
        spec.agent.check(config)
        given, seeds = resolve(spec.agent, config, seeds, table)  # type: ignore[misc]
    items = {seed: i for i, seed in enumerate(seeds)}
    if spec.search.pbt is not None:  # all members of a population get the item of its seed
        members = member_seeds(spec.seeds, spec.search.pbt.population)
        items = {member: i for i, several in enumerate(members) for member in several}
    return contract.give(spec.agent, spec.agent_name, given, items, len(seeds))


def member_seeds(seeds: Sequence[int], population: int) -> list[list[int]]:
    """Return a seed for each member of each population, all of them distinct and below 2^32.

    Member i of the population with seed s has s * population + i, modulo 2^32, or the next free
    seed.
    """
    used: dict[int, None] = {}
    for seed in seeds:
        for number in range(population):
            candidate = (seed * population + number) % 2**32
            while candidate in used:
                candidate = (candidate + 1) % 2**32
            used[candidate] = None
    distinct = list(used)
    return [distinct[i : i + population] for i in range(0, len(distinct), population)]


def _identity(
    spec: Spec, raw: Mapping[str, Any], swept: Mapping[str, Any], env_files: Sequence[Path]
) -> dict[str, Any]:
    """Return the values that distinguish this sweep from others."""
    plain = {
        "agent": spec.agent_name,
        "agent_source": spec.source[:16],
        "seeds": list(spec.seeds),
        "config": spec.fixed,
        "sweep": swept,
        "eval_episodes": spec.eval_episodes,
        "rows_per_device": spec.rows_per_device,
        **{n: raw[n] for n in ("eval_every", "search", "halving", "pbt") if n in raw},
    }
    if spec.mesh.size > 1:  # it decides on the bits of a run, like the rows of a unit
        plain["mesh"] = dataclasses.asdict(spec.mesh)
    if spec.robust is not None:
        plain["robust"] = dataclasses.asdict(spec.robust)
    if spec.search.batch != Method.batch:  # a quarter of the samples
        plain["search"] = {**plain["search"], "batch": spec.search.batch}
    if within := _searched_within(spec):
        plain["within"] = within
    if spec.given.digest:
        plain["given"] = spec.given.digest[:16]
    if env_files:
        plain["env_source"] = trainers.digest(env_files)[:16]
    if packages := contract.packages(spec.environments()):
        plain["env_packages"] = packages
    return json.loads(json.dumps(plain))


def _runs(spec: Spec) -> Iterable[plans.Run]:
    """Yield the runs that are known beforehand."""
    search, names = spec.search, list(spec.axes)
    if search.method == "optuna":
        for end in (0.0, 0.999):  # report mistakes now, not after hours
            spec.make_run({name: axis.at(end) for name, axis in spec.axes.items()}, spec.seeds[0])
        return
    if search.method == "grid":
        product = itertools.product(*(axis.values for axis in spec.axes.values()))
        chosen = [dict(zip(names, values, strict=True)) for values in product]
    else:
        drawn = {n: axis for n, axis in spec.axes.items() if not contract.is_condition(n)}
        chosen = space.sample(drawn, search.method, search.samples, search.seed)
        if search.pbt is None:  # lists of values may give a configuration twice
            chosen = list({repr(values): values for values in chosen}.values())
        chosen = [both for values in chosen for both in spec.under_each(values)]
    for swept in chosen:
        for seed in spec.seeds if search.pbt is None else spec.seeds[:1]:
            yield spec.make_run(swept, seed)


def _searched_within(spec: Spec) -> list[str]:
    """Return the conditions within which a search decides.

    They belong to the identity because earlier versions chose among them: such results cannot be
    resumed. Halving has always kept the best of every environment.
    """
    names = [name for name in spec.axes if contract.is_condition(name)]
    if spec.search.method != "grid":
        return names
    return [n for n in names if n != contract.ENV] if spec.search.halving is not None else []


def _axes(agent: types.ModuleType, swept: Mapping[str, Any]) -> dict[str, space.Axis]:
    """Check the axes: known fields, each with distinct values of the right type."""
    hints = configs.field_types(agent.Config)
    axes = {}
    for name, value in swept.items():
        configs.require_known(name.partition(".")[0], hints, "field")
        configs.require(
            name not in contract.TABLES,
            f"[sweep] {name} must name one value, as {name}.NAME = [...], but is {value!r}.",
        )
        axes[name] = space.axis(name, value)
        for example in axes[name].examples():  # check types first
            configs.build(agent.Config, _nested({}, {name: example}))
        values = tuple(configs.canonical(agent.Config, name, v) for v in axes[name].values)
        axes[name] = dataclasses.replace(axes[name], values=values)
    return axes


def _robust(raw: Mapping[str, Any], axes: Mapping[str, space.Axis]) -> Robust | None:
    """Check the table [robust]."""
    if "robust" not in raw:
        return None
    robust = configs.build(Robust, table(raw, "robust"), "key in [robust] named", "[robust] ")
    configs.require(
        robust.by in ("mean", "worst"),
        f"[robust] by must be 'mean' or 'worst', but is {robust.by!r}.",
    )
    several = [n for n, axis in axes.items() if contract.is_condition(n) and len(axis.values) > 1]
    for name in robust.over or ("",):
        configs.require(
            name in several or (not name and bool(several)),
            "[robust] over must name parameters of the environment that have several values in "
            f"[sweep] ({', '.join(several) or 'there are none'}), but is {list(robust.over)}.",
        )
    return dataclasses.replace(robust, over=robust.over or tuple(several))


def _search(
    agent: types.ModuleType,
    raw: Mapping[str, Any],
    axes: Mapping[str, space.Axis],
    robust: Robust | None,
) -> Search:
    """Check the tables [search], [halving] and [pbt]."""
    tables: dict[str, Any] = {
        name: configs.build(cls, table(raw, name), f"key in [{name}] named", f"[{name}] ")
        for name, cls in (("search", Method), ("halving", Halving), ("pbt", Pbt))
        if name in raw
    }
    search = Search(**vars(tables.pop("search", Method())), **tables)
    configs.require(
        search.method in METHODS,
        f"[search] method must be one of {', '.join(map(repr, METHODS))}, "
        f"but is {search.method!r}.",
    )
    _check_conditions(search, axes, robust)
    if search.pbt is not None:
        search = _check_pbt(agent, search, search.pbt, axes)
    if search.method == "optuna" and "batch" not in raw["search"]:
        search = dataclasses.replace(search, batch=max(min(search.batch, search.samples // 4), 1))
    _check_search(search, axes)
    return search


def _check_search(search: Search, axes: Mapping[str, space.Axis]) -> None:
    """Refuse invalid options, and options that contradict each other."""
    drawn = search.method != "grid"
    require = configs.require
    for axis in axes.values():
        require(
            drawn or axis.kind == "list",
            f"[sweep] {axis.name} must be a list for a grid; a distribution needs [search] with "
            "method = 'random', 'sobol', 'lhs' or 'optuna'.",
        )
    drawn_axes = [name for name in axes if not contract.is_condition(name)]
    require(
        not drawn or (search.samples > 0 and len(drawn_axes) > 0),
        f"[search] method {search.method!r} needs samples, 1 or more, and at least one axis in "
        f"[sweep] to search, but samples is {search.samples} and there are {len(drawn_axes)} axes.",
    )
    require(search.batch > 0, f"[search] batch must be 1 or more, but is {search.batch}.")
    require(search.seed >= 0, f"[search] seed must be 0 or more, but is {search.seed}.")
    staged = search.halving is not None or search.pbt is not None
    require(
        not (staged and search.method == "optuna"),
        "[search] method 'optuna' cannot be combined with [halving] or [pbt].",
    )
    if search.halving is not None:
        require(search.pbt is None, "[halving] and [pbt] cannot be combined in one sweep.")
        require(
            search.halving.rungs > 1,
            f"[halving] rungs must be 2 or more, but is {search.halving.rungs}.",
        )
        require(
            1 < search.halving.eta <= 1000,
            f"[halving] eta must be more than 1 (and at most 1000), but is {search.halving.eta}.",
        )


def _check_conditions(
    search: Search, axes: Mapping[str, space.Axis], robust: Robust | None
) -> None:
    """Refuse a search that would choose among environments or their parameters."""
    chooser = "[pbt]" if search.pbt is not None else "[search] method 'optuna'"
    over = robust.over if robust is not None and search.pbt is None else ()
    for axis in (axis for axis in axes.values() if contract.is_condition(axis.name)):
        configs.require(
            axis.kind == "list",
            f"[sweep] {axis.name} must be a list of values: it is a condition, within which "
            "configurations are compared, so it cannot be drawn from a distribution.",
        )
        configs.require(
            axis.name in over or (search.pbt is None and search.method != "optuna"),
            f"[sweep] {axis.name} must be one value, in [config], for {chooser}, which would "
            "otherwise choose among conditions.",
        )


def _check_pbt(
    agent: types.ModuleType, search: Search, pbt: Pbt, axes: Mapping[str, space.Axis]
) -> Search:
    """Check [pbt] and return the search; members are drawn at random by default."""
    require, hints = configs.require, configs.field_types(agent.Config)
    for name in axes:
        outer = name.partition(".")[0]
        require(
            hints[outer] is float,
            f"[pbt] needs traced fields, numbers annotated float, in [sweep], but {name} is not.",
        )
    require(len(axes) > 0, "[pbt] needs at least one axis in [sweep], but there is none.")
    require(pbt.population > 1, f"[pbt] population must be 2 or more, but is {pbt.population}.")
    require(pbt.generations > 1, f"[pbt] generations must be 2 or more, but is {pbt.generations}.")
    require(0 < pbt.replace <= 0.5, f"[pbt] replace must be in (0, 0.5], but is {pbt.replace}.")
    require(0 <= pbt.resample <= 1, f"[pbt] resample must be in [0, 1], but is {pbt.resample}.")
    low, high = (*pbt.factors, 0.0, 0.0)[:2]
    require(
        len(pbt.factors) == 2 and 0 < low <= 1 <= high,
        f"[pbt] factors must be [low, high] with 0 < low <= 1 <= high, but is {list(pbt.factors)}.",
    )
    require(
        search.samples in (0, pbt.population),
        f"[search] samples must be the population, {pbt.population}, but is {search.samples}.",
    )
    method = "random" if search.method == "grid" else search.method
    return dataclasses.replace(search, method=method, samples=pbt.population)


def _refuse(spec: Spec) -> None:
    """Refuse what is wrong with the runs of a sweep, each of which is valid by itself."""
    for refuse in (_refuse_repeated, _refuse_equal, _refuse_stored, _refuse_mesh):
        refuse(spec)


def _refuse_repeated(spec: Spec) -> None:
    """Refuse two runs of one configuration and seed, which mean that an axis repeats a value."""
    seen = set[str]()
    for run in spec.runs if spec.search.pbt is None else ():
        if run.run_id in seen:
            raise InputError(f"[sweep] lists a value twice: {dict(run.swept)!r} occurs again.")
        seen.add(run.run_id)


def _refuse_stored(spec: Spec) -> None:
    """Refuse a search that stores states, with an environment that cannot be stored."""
    for env in spec.environments() if spec.search.halving or spec.search.pbt else ():
        configs.require(
            not env.on_host,
            f"[{'pbt' if spec.search.pbt else 'halving'}] continues runs from stored states, but "
            f"those of env {env.name!r} cannot be stored; use another search.",
        )


def _refuse_mesh(spec: Spec) -> None:
    """Refuse a mesh for a trainer that has no batch to split, or that does not divide it."""
    mesh = spec.mesh
    configs.require(
        mesh.size == 1 or not contract.has_environment(spec.agent.Config),
        f"mesh must be absent for agent {spec.agent_name!r}, which plays an environment, but is "
        f"{mesh}; it splits language models, and runs go over devices without it.",
    )
    for config in [run.config for run in spec.runs] if mesh.data > 1 else ():
        batch = getattr(config, "batch_size", mesh.data)
        minibatch = batch // getattr(config, "num_minibatches", 1)
        configs.require(
            minibatch % mesh.data == 0,
            f"mesh data must divide the {minibatch} sequences of a gradient step, but is "
            f"{mesh.data}.",
        )


def check_devices(mesh: Mesh, number: int) -> None:
    """Raise an InputError unless a number of devices makes groups of a mesh, with none left."""
    configs.require(
        number % mesh.size == 0,
        f"mesh must divide the {count(number, 'device')} in use, but {mesh} has {mesh.size}; "
        "--devices N uses N devices, and makes N of a CPU.",
    )


def _refuse_equal(spec: Spec) -> None:
    """Refuse two values of an axis that are equal in the precision of the programs."""
    hints = configs.field_types(spec.agent.Config)
    for axis in spec.axes.values():
        outer, _, inner = axis.name.partition(".")
        dtype = np.dtype(np.float32)
        if outer == contract.ENV_PARAMS and spec.runs:
            dtype = contract.param_dtype(spec.runs[0].config, inner)
        elif hints[outer] is not float:
            continue
        seen: dict[Any, Any] = {}
        for value in axis.values:
            first = seen.setdefault(np.asarray(value, dtype).item(), value)
            configs.require(
                first is value,
                f"[sweep] {axis.name} lists {first!r} and {value!r}, equal as {dtype.name}.",
            )


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


def mesh(raw: Mapping[str, Any]) -> Mesh:
    """Check the table `mesh` of a sweep file and return it."""
    axes = table(raw, "mesh")
    for name in axes:
        configs.require_known(name, ("data", "model"), "axis of mesh named")
    return Mesh(**{name: _positive(f"mesh {name}", size) for name, size in axes.items()})


def _positive(name: str, value: Any) -> int:
    valid = type(value) is int and value > 0
    configs.require(valid, f"{name} must be a whole number, 1 or more, but is {value!r}.")
    return value


def _optional(name: str, raw: Mapping[str, Any]) -> int | None:
    return None if raw.get(name) is None else _positive(name, raw[name])


def table(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a table of a sweep file, empty if it is absent."""
    value = raw.get(name, {})
    configs.require(isinstance(value, dict), f"{name} must be a table, but is {value!r}.")
    return value


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{"env_params": {"gravity": x}} -> {"env_params.gravity": x}, other fields as they are."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in contract.TABLES and isinstance(value, dict):
            found |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            found[name] = value
    return found


def _nested(fixed: Mapping[str, Any], swept: Mapping[str, Any]) -> dict[str, Any]:
    """Merge fixed and swept values back into the fields of a configuration."""
    merged: dict[str, Any] = {}
    for name, value in {**flat(fixed), **swept}.items():
        outer, dot, inner = name.partition(".")
        if dot and outer in contract.TABLES:
            merged.setdefault(outer, {})[inner] = value
        else:
            merged[name] = value
    return merged
