"""Pipelines: a sweep file of stages, each an ordinary sweep in a directory of its own.

    seeds = 4                        # keys outside of stages are defaults of all stages
    [[stage]]
    name = "sft"                     # its results are in DIR/sft
    agent = "rlhf.sft"
    [[stage]]
    name = "ppo"
    agent = "rlhf.ppo"
    given = { reference = "sft" }    # an earlier stage, or whatever `sources.py` reads
    sweep = { beta = [0.05, 0.1] }

Before the first stage runs, all of them are checked: the shapes of a model follow from its trainer
without training it.

Several agents are stages that are given nothing. What is outside of [agents] holds for all::

    agent = ["ppo", "./mine.py"]  # the results are in DIR/ppo and DIR/mine
    [sweep]
    learning_rate = [3e-4, 1e-3]
    [agents.ppo.sweep]  # config, sweep or given of this agent alone
    clip_eps = [0.1, 0.2]
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from purejaxpg import InputError, contract, disk, trainers
from purejaxpg import config as configs
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

STAGES = stores.STAGES
AGENTS = "agents"  # the tables of several agents
OWN = ("config", "sweep", "given")  # what such a table holds
DEFAULTS = ("seeds", "eval_episodes", "eval_every", "mesh")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One [[stage]] table, or one of several agents."""

    name: str
    title: str  # "Stage 2 of 3: reward"
    raw: Mapping[str, Any]  # as in a sweep file of its own
    parents: tuple[str, ...] = ()  # earlier stages that it is given
    shared: tuple[str, ...] = ()  # its fields that all agents share

    @property
    def label(self) -> str:
        """Its kind and name, for messages."""
        return f"{self.title.partition(' ')[0]} {self.name!r}"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The stages of a sweep file, in order, or its agents."""

    path: Path
    text: str
    stages: tuple[Stage, ...]
    kind: str = "stages"  # or "agents"

    def confirms(self, stage: Stage) -> bool:
        """Return whether --confirm is for a stage: it is for the last one, or for every agent."""
        return self.kind == AGENTS or stage is self.stages[-1]

    def having(self, more: Mapping[str, Any]) -> "Pipeline":
        """Return the same stages, with keys that replace those of the file."""
        stages = (dataclasses.replace(s, raw={**s.raw, **more}) for s in self.stages)
        return dataclasses.replace(self, stages=tuple(stages))

    def needing(self, name: str) -> list[str]:
        """Return a stage and the later stages that depend on it."""
        needing = [name]
        for stage in self.stages:
            if stage.name != name and set(stage.parents) & set(needing):
                needing.append(stage.name)
        return needing


def read(path: Path) -> Pipeline | None:
    """Return the stages or the agents of a sweep file; None if it is a sweep of one agent.

    Raises:
        InputError: the file cannot be read, a name is invalid, or a stage is given what is no
            earlier stage.
    """
    raw, text = specs.parse(path)
    configs.require("stages" not in raw, f"The stages of {path} must be tables [[stage]].")
    for key in ("config", "sweep"):
        configs.require(
            "agent" not in specs.table(raw, key),
            f"agent must be outside of [{key}]; for several agents write agent = ['ppo', 'a2c'] at "
            "the top of the file, and what differs into [agents.NAME.config] and "
            "[agents.NAME.sweep].",
        )
    agent = raw.get("agent")
    if isinstance(agent, list):
        return Pipeline(path, text, tuple(_agents(raw, agent)), AGENTS)
    configs.require(
        AGENTS not in raw, f"[{AGENTS}] needs a list, as agent = ['ppo', 'a2c'], not {agent!r}."
    )
    if "stage" not in raw:
        return None
    tables, defaults = raw.pop("stage"), raw
    for key in defaults:
        configs.require_known(key, DEFAULTS, "key outside of the stages named")
    valid = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    configs.require(valid and tables, f"stage must be tables, each [[stage]], but is {tables!r}.")
    names = [_name(table) for table in tables]
    stages = []
    for i, (name, table) in enumerate(zip(names, tables, strict=True)):
        configs.require(name not in names[:i], f"name must differ between stages: {name!r}.")
        own = {key: value for key, value in table.items() if key != "name"}
        title = f"Stage {i + 1} of {len(names)}: {name}"
        parents = tuple(_parents(name, own.get("given"), names[:i]))
        stages.append(Stage(name, title, {**defaults, **own}, parents))
    return Pipeline(path, text, tuple(stages))


def _name(table: Mapping[str, Any]) -> str:
    name = table.get("name")
    configs.require(
        isinstance(name, str) and NAME.fullmatch(name) is not None,
        f"name of a stage must be letters, digits, - and _, as a directory, but is {name!r}.",
    )
    return str(name)


def _agents(raw: Mapping[str, Any], agents: Sequence[Any]) -> Iterator[Stage]:
    """Yield a stage for each of several agents, with its own tables merged into the shared ones."""
    valid = len(agents) > 0 and all(isinstance(agent, str) and agent for agent in agents)
    configs.require(valid, f"agent must be a list of names and paths, but is {agents!r}.")
    configs.require("stage" not in raw, "agent must be one agent in each [[stage]], and no list.")
    names = [Path(agent).stem if trainers.is_path(agent) else agent for agent in agents]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    configs.require(not twice, f"agent must list each name once, but lists {twice[:1]} again.")
    own = specs.table(raw, AGENTS)
    for name in own:
        configs.require_known(name, names, f"agent of this sweep for [{AGENTS}] named")
    shared = {key: value for key, value in raw.items() if key not in ("agent", AGENTS)}
    others = {key: value for key, value in shared.items() if key not in OWN}
    fields = [name for key in OWN[:2] for name in specs.flat(specs.table(shared, key))]
    for i, (name, agent) in enumerate(zip(names, agents, strict=True)):
        table = specs.table(own, name)
        for key in table:
            configs.require_known(key, OWN, f"key in [{AGENTS}.{name}] named")
        merged = {**others, **_merged(shared, table), "agent": agent}
        yield Stage(name, f"Agent {i + 1} of {len(agents)}: {name}", merged, (), tuple(fields))


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of one agent, whose own fields replace the shared ones in all tables."""
    ours = {key: specs.flat(specs.table(own, key)) for key in OWN}
    theirs = {key: specs.flat(specs.table(shared, key)) for key in OWN}
    set_here = {name for fields in ours.values() for name in fields}
    kept = {key: {n: v for n, v in theirs[key].items() if n not in set_here} for key in OWN}
    return {key: merged for key in OWN if (merged := {**kept[key], **ours[key]})}


def _parents(name: str, given: Any, earlier: Sequence[str]) -> Iterator[str]:
    """Yield the earlier stages that a stage is given, and refuse what is none."""
    for field, source in given.items() if isinstance(given, dict) else ():
        if not isinstance(source, str) or "/" in source or source.endswith((".jsonl", ".py")):
            continue
        parent = source.removesuffix(":best")
        if field in contract.NAMED and parent not in earlier:
            continue  # a published model or a dataset; `sources` refuses a name that is none
        configs.require(
            parent in earlier,
            f"given {field} of stage {name!r} must be an earlier stage "
            f"({', '.join(earlier) or 'there is none'}), the path of a result directory or a "
            f".jsonl file, but is {source!r}.",
        )
        yield parent


# ------------------------------------------------------------------------------------------ specs


def load(pipeline: Pipeline, stage: Stage, out: Path) -> specs.Spec:
    """Return the spec of a stage whose earlier stages are finished in `out`.

    Raises:
        InputError: an earlier stage does not have the models that are needed.
        FaultError: a file is damaged.
    """
    from purejaxpg.sweep import sources

    agents = {each.name: str(each.raw["agent"]) for each in pipeline.stages}

    def models(name: str, best: bool) -> sources.Models:
        own = trainers.is_path(agents[name])
        file = trainers.path_of(agents[name], pipeline.path.parent) if own else None
        found = sources.trained(out / name, best, file)
        return dataclasses.replace(found, what=f"stage {name!r}")

    return _spec(pipeline, stage, models)


def plan(pipeline: Pipeline, confirm: int = 0) -> list[specs.Spec]:
    """Check all stages and return their specs, in which shapes stand for models to be trained.

    `confirm` is the number of fresh seeds of the last stage, or of every agent.

    Raises:
        InputError: a value of a stage is invalid, or it cannot be given what it names.
    """
    needed = {parent for stage in pipeline.stages for parent in stage.parents}
    planned: dict[str, specs.Spec] = {}
    shapes: dict[str, list[Any]] = {}
    for stage in pipeline.stages:
        # A stage that sweeps sizes may give models of several shapes; each has to fit.
        parents = list(dict.fromkeys(stage.parents))
        versions = [
            _spec(pipeline, stage, _unknown(planned, dict(zip(parents, choice, strict=True))))
            for choice in itertools.product(*(shapes[parent] for parent in parents))
        ]
        planned[stage.name] = versions[0]
        with _named(stage):
            legs = _legs(versions[0], confirm if pipeline.confirms(stage) else 0)
            if stage.name in needed:
                found = [shape for spec in versions for shape in _model_shapes(spec, legs)]
                shapes[stage.name] = list({str(shape): shape for shape in found}.values())
    return list(planned.values())


def _spec(pipeline: Pipeline, stage: Stage, models: Any) -> specs.Spec:
    """Return the spec of a stage; `models` is a `sources.Stage`."""
    from purejaxpg.sweep import sources

    base, name = pipeline.path.parent, f"{pipeline.path.stem}-{stage.name}"
    resolve = functools.partial(sources.resolve, base, models)
    with _named(stage):
        _refuse_foreign(stage, base)
        return specs.from_dict(stage.raw, name, base, pipeline.text, resolve=resolve)


def _refuse_foreign(stage: Stage, base: Path) -> None:
    """Raise an InputError if an agent lacks a field that all agents share."""
    known = (
        configs.field_types(trainers.load(stage.raw["agent"], base).Config) if stage.shared else ()
    )
    try:
        for field in stage.shared:
            configs.require_known(field.partition(".")[0], known, "field")
    except InputError as error:
        raise InputError(
            f"{error} A field that only some agents have belongs in their own tables, "
            f"[{AGENTS}.NAME.config] or [{AGENTS}.NAME.sweep]."
        ) from error


def _unknown(planned: Mapping[str, specs.Spec], shapes: Mapping[str, Any]) -> Any:
    """Return a `sources.Stage` that gives shapes."""
    from purejaxpg.sweep import sources

    def models(name: str, best: bool) -> sources.Models:
        configs.require(
            best or planned[name].search.pbt is None,
            f"given must be {name + sources.BEST!r}, because the populations of stage {name!r} "
            "have no best configuration with a run for each seed.",
        )
        if best:
            return sources.Models(f"stage {name!r}", shapes[name])
        own = dict.fromkeys(planned[name].seeds, shapes[name])
        return sources.Models(f"stage {name!r}", of_seed=own)

    return models


def _model_shapes(spec: specs.Spec, legs: Sequence[plans.Leg]) -> Iterator[Any]:
    """Yield the shapes of the models of a stage, for each group of its legs."""
    import jax

    from purejaxpg.sweep import compute

    def models(inputs: compute.Inputs) -> Any:
        states = compute.start_rows(spec.agent, inputs)
        model = functools.partial(contract.model, spec.agent, spec.agent_name)
        given, axes = inputs.given()
        return jax.vmap(model, (0, 0, *axes))(states, inputs.configs, *given)

    for leg in {compute.signature(leg.run.config): leg for leg in legs}.values():
        inputs = compute.inputs_of(spec.given, [plans.Unit("", (leg,))], 1)
        rows = jax.eval_shape(models, inputs)
        yield jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)


def trace(spec: specs.Spec, devices: Sequence[Any]) -> None:
    """Trace the programs of a stage, so that a mistake in its trainer shows before any stage runs.

    Raises:
        InputError: the trainer breaks the contract.
    """
    import jax
    import numpy as np

    from purejaxpg import evaluate
    from purejaxpg.sweep import compute

    mesh = jax.sharding.Mesh(np.array(devices[:1]), (compute.ROWS,))
    for leg in {compute.signature(leg.run.config): leg for leg in _legs(spec)}.values():
        evaluate.check_run(spec.agent, leg.run.config)
        unit = plans.Unit("", (leg,))
        compute.trace(spec, plans.Group(0, "", 1, (unit,)), mesh, 1)


def _legs(spec: specs.Spec, confirm: int = 0) -> list[plans.Leg]:
    rounds = searches.rehearse(searches.rounds(spec, confirm))
    return [leg for round_ in rounds for leg in round_.legs]


@contextlib.contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """Name the stage in an InputError that is raised inside the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{stage.label}: {error}") from error


# ---------------------------------------------------------------------------------- the directory


def prepare(pipeline: Pipeline, out: Path) -> None:
    """Make the directory of the stages, or check that it is one.

    Raises:
        InputError: it holds something else.
        FaultError: it cannot be written.
    """
    with disk.faults("write", out):
        if out.exists() and not (out / STAGES).exists():
            left = {path.name for path in out.iterdir()} - {f".{STAGES}.tmp", "lock"}
            configs.require(
                not left,
                f"{out} is not empty and is no directory of {pipeline.kind}: it holds no {STAGES}; "
                "choose another with --out.",
            )
        out.mkdir(parents=True, exist_ok=True)
    names = {pipeline.kind: [stage.name for stage in pipeline.stages]}
    if disk.read_intact(out / STAGES) != names:
        disk.write_hashed(out / STAGES, names)


def refuse_changed(pipeline: Pipeline, stage: Stage, spec: specs.Spec, out: Path) -> None:
    """Raise an InputError if a stage has results of another sweep; nothing is ever mixed.

    Given arrays that are not known yet are not compared. The sweep of an agent may have grown.
    """
    from purejaxpg.sweep import growth

    if not (out / stage.name / ledgers.LEDGER).is_file():
        return
    with disk.faults("read", out / stage.name):
        stored = ledgers.identity_at_rest(out / stage.name)
    if stores.begins_again(out / stage.name, stored, spec.identity):
        return
    if pipeline.kind == AGENTS:
        with _named(stage):
            spec = growth.continued(spec, out / stage.name)
    unknown = "given" in stage.raw and not spec.given.digest
    wanted = {**spec.identity, **({"given": stored.get("given")} if unknown else {})}
    changed = stores.difference(stored, wanted)
    if changed is None or stores.grows(stored, wanted):
        return
    key, old, new = changed
    what = f"another {key} (it was {old}, and is {new})"
    if key == "given":
        what = f"other given arrays ({', '.join(map(str, stage.raw['given'].values()))} changed)"
    also = [out / name for name in pipeline.needing(stage.name) if (out / name).exists()]
    raise InputError(
        f"{stage.label} was computed with {what}: delete {' and '.join(map(str, also))}, or "
        "choose another directory with --out."
    )


def reported(directory: Path) -> bool:
    """Return whether the report of a stage was written after its last result."""
    page, records = directory / "report" / "index.html", directory / "records"
    with disk.faults("read", directory):
        written = os.path.isfile(page) and records.is_dir()
        return written and page.stat().st_mtime_ns >= records.stat().st_mtime_ns


def directories(directory: Path) -> list[Path]:
    """Return the result directories of stages that have begun; of a plain sweep, its own.

    Raises:
        InputError: no stage has begun.
    """
    names = stores.parts(directory)
    if names is None:
        return [directory]
    begun = [directory / n for n in names if os.path.isfile(directory / n / ledgers.LEDGER)]
    configs.require(bool(begun), f"No stage or agent of {directory} has begun yet.")
    return begun


def after(directory: Path) -> list[str] | None:
    """Return the names of the stages after that of a result directory; None if it is no stage.

    After an agent there are none, since each of them can be confirmed.
    """
    names = stores.parts(directory.parent) or []
    if directory.name not in names:
        return None
    return [] if of_agents(directory.parent) else names[names.index(directory.name) + 1 :]


def of_agents(directory: Path) -> bool:
    """Return whether a directory holds several agents instead of stages."""
    return AGENTS in (disk.read_intact(directory / STAGES) or {})


def last(directory: Path) -> Path:
    """Return the result directory of the last stage; of a plain sweep, its own.

    Raises:
        InputError: this stage has not begun, or there are several agents.
    """
    names = stores.parts(directory)
    if names is None:
        return directory
    begun, final = directories(directory), directory / names[-1]
    configs.require(
        not of_agents(directory),
        f"{directory} holds several agents; name one: {', '.join(map(str, begun))}.",
    )
    configs.require(
        final in begun,
        f"The last stage, {final}, has not begun; name one that has: {', '.join(map(str, begun))}.",
    )
    return final
