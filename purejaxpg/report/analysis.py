"""The results of a sweep as numbers: everything that the report shows, before it is drawn.

`of_store` reads a result directory once and returns an `Analysis`. Figures, tables and the page
only lay it out.
"""

import itertools
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import contract, stats
from purejaxpg.report import curves as training
from purejaxpg.report import ranking
from purejaxpg.report.ranking import Configuration
from purejaxpg.sweep import frozen, search, stages
from purejaxpg.sweep import store as stores
from purejaxpg.sweep.store import Store
from purejaxpg.text import count, short

HIGHLIGHTED = 5  # curves in colour
FEW = 60  # other curves drawn one by one; more are summed up by quantiles
_ROLES = ("winner", "runner-up", "default")
CONTENDERS = 50  # configurations that may come first when seeds are resampled
_AXES = 12  # hyperparameters analysed at most
_PAIRS = 3
_PAIR_SHARE = 0.005  # of the variance, below which a pair is not shown
_MOST_LEVELS = 12  # distinct values before they are put into bins
_TOP = 0.75  # quantile above which a configuration is among the best
_TOP_NEEDS = 20  # configurations, before there is a best quarter to speak of
_GRID_POINTS = 60
SEEDS_TO_CONFIRM = 32
# What the page holds of the training metrics.
_NUMBERS = 200_000
_METRICS = 40  # of an environment
_METRIC_ROWS = 100  # configurations
_SINGLE = 16  # runs of a configuration
FEW_SEEDS = 8  # below them a bootstrap interval is too narrow; see docs/results.md
_SPENT = ("wall_s", "compile_s", "env_steps")
# Metrics [rows, updates] and facts of units in progress.
Unfinished = Mapping[str, tuple[dict[str, np.ndarray], dict[str, Any]]]


@dataclass(frozen=True)
class Levels:
    """The values of one hyperparameter in classes: its distinct values, or bins of them.

    Attributes:
        codes: the class of each configuration ``[n]``.
        labels: of the classes.
        centres: their places on a numeric axis ``[levels]``; None if the values are names.
        log: whether that axis is logarithmic.
        values: the value of each configuration on that axis ``[n]``; the class if they are names.
    """

    codes: np.ndarray
    labels: tuple[str, ...]
    centres: np.ndarray | None
    log: bool
    values: np.ndarray

    @property
    def binned(self) -> bool:
        """Whether a class holds several values."""
        return self.centres is not None and len(np.unique(self.values)) > len(self.labels)

    @property
    def ticks(self) -> tuple[str, ...]:
        """Labels short enough for an axis: the middle of a bin."""
        if self.centres is None or not self.binned:
            return self.labels
        return tuple(_rough(float(centre)) for centre in self.centres)


@dataclass(frozen=True)
class Axis:
    """The effect of one hyperparameter in one environment.

    Attributes:
        name: of the field.
        levels: its classes.
        share: of the variance of scores that it explains alone.
        low: lower end of the 95% interval of the share; NaN if unknown.
        high: upper end.
        top_share: the same for being among the best quarter; NaN with few configurations.
        effects: mean score at each level, the others averaged out ``[levels]``.
        errors: half width of the 95% interval of each ``[levels]``; NaN if a level has one run
            and so no interval.
        best: best score at each level ``[levels]``.
        failures: diverged runs and all runs of each level.
    """

    name: str
    levels: Levels
    share: float
    low: float
    high: float
    top_share: float
    effects: np.ndarray
    errors: np.ndarray
    best: np.ndarray
    failures: tuple[tuple[int, int], ...]

    @property
    def clear(self) -> bool:
        """Whether the effect can be told from none: the interval of its share is above zero."""
        return self.low > 0.0


@dataclass(frozen=True)
class Pair:
    """Mean scores over two hyperparameters: ``means [a, b]``, NaN for a pair that was not tried."""

    first: str
    second: str
    rows: Levels  # of the first
    columns: Levels  # of the second
    means: np.ndarray
    counts: np.ndarray
    share: float  # of the variance, beyond the shares of both alone


@dataclass(frozen=True)
class Line:
    """A curve with a band: ``steps``, ``centre``, ``low`` and ``high``, all ``[bins]``."""

    configuration: Configuration
    name: str  # a few letters: its rank or role
    label: str
    steps: np.ndarray
    centre: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Curves:
    """The training curves of one environment.

    Attributes:
        best: the highlighted ones, best first.
        others: the rest, each with its steps and centre.
        quantiles: of the rest if they are many: ``[5, points]`` at 5, 25, 50, 75 and 95%.
        grid: steps of the quantiles ``[points]``.
        evaluated: of each of the best, the curve of its evaluations within training, if any.
    """

    best: tuple[Line, ...]
    others: tuple[tuple[Configuration, np.ndarray, np.ndarray], ...] = ()
    quantiles: np.ndarray | None = None
    grid: np.ndarray | None = None
    evaluated: tuple[Line | None, ...] = ()


@dataclass(frozen=True)
class Metrics:
    """The training metrics of the first configurations of an environment.

    Attributes:
        names: of the metrics.
        curves: by metric and run.
        shown: the configurations that have them, best first.
        left_out: metrics beyond those.
    """

    names: tuple[str, ...] = ()
    curves: Mapping[str, Mapping[str, training.Curve]] = field(default_factory=dict)
    shown: tuple[Configuration, ...] = ()
    left_out: int = 0

    def stack(self, name: str, c: Configuration) -> training.Curve | None:
        """Return a metric of a configuration's runs, ``returns [runs, bins]``, if any."""
        # A run in progress is the only one.
        return training.stack(c.run_ids[:_SINGLE] or self.curves[name], self.curves[name])


@dataclass(frozen=True)
class Confirmed:
    """A configuration that was run again on fresh seeds.

    Attributes:
        role: ``"winner"``, ``"runner-up"`` or ``"default"``.
        configuration: its scores on fresh seeds.
        tuned: its scores in the tuning stage; None if it was not part of it.
    """

    role: str
    configuration: Configuration
    tuned: Configuration | None

    @property
    def name(self) -> str:
        """The role, and for a runner-up which one."""
        if self.tuned is None or self.role != "runner-up":
            return self.role
        return f"{self.role} (rank {self.tuned.rank})"


@dataclass(frozen=True)
class Improvement:
    """How often the first of two configurations beats the second, with a 95% interval."""

    over: str
    environment: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Effects:
    """The effects of the hyperparameters in one environment.

    Attributes:
        axes: most important first.
        pairs: those that explain most together.
        noise: share of the variance that is due to seeds; NaN if unknown.
        scores: mean score of each configuration that is compared ``[n]``.
        reached: share of the updates after which they are compared.
    """

    axes: list[Axis] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    noise: float = float("nan")
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    reached: float = 1.0

    @property
    def rest(self) -> float:
        """Share of the variance that neither single hyperparameters nor the seeds explain."""
        explained = sum(axis.share for axis in self.axes)
        return max(0.0, 1.0 - explained - (self.noise if np.isfinite(self.noise) else 0.0))


@dataclass(frozen=True)
class Section:
    """The results of one condition: an environment with its parameters."""

    environment: str
    ranked: list[Configuration]
    confirmed: list[Confirmed]
    first: tuple[float, ...]  # share of resamples of the seeds in which each of the best is first
    curves: Curves | None
    confirmed_curves: Curves | None
    effects: Effects
    improvements: list[Improvement]
    running: Curves | None = None  # of runs in progress, which have no rank

    @property
    def winner(self) -> Configuration | None:
        """The best configuration of the tuning stage."""
        return self.ranked[0] if self.ranked and self.ranked[0].rank == 1 else None

    def role(self, name: str) -> Confirmed | None:
        """Return the confirmed configuration of a role, the first of several."""
        return next((c for c in self.confirmed if c.role == name), None)


@dataclass(frozen=True)
class Cross:
    """The results of several environments together.

    Attributes:
        environments: their names.
        settings: how many configurations were finished in all of them.
        sensitivity: gain of tuning per environment.
        interval: its 95% interval over seeds; None with one run per configuration.
        dimensionality: None if the settings are not a grid.
        names: of the hyperparameters, in the order of ``dimensionality.subsets``.
        best_cross: the swept fields of the setting that is best on average.
        normalized_best: normalised score of each environment's best and of the common one
            ``[2, environments]``.
    """

    environments: tuple[str, ...]
    settings: int
    sensitivity: stats.Sensitivity
    interval: tuple[float, float] | None
    dimensionality: stats.Dimensionality | None
    names: tuple[str, ...]
    best_cross: dict[str, Any]
    normalized_best: np.ndarray


@dataclass(frozen=True)
class Profile:
    """Performance profiles: one line per method over ``thresholds``."""

    thresholds: np.ndarray
    lines: tuple[tuple[str, np.ndarray, np.ndarray, np.ndarray], ...]
    normalized: bool


@dataclass(frozen=True)
class Schedule:
    """How the hyperparameters of a population's best member changed.

    Attributes:
        member: its run.
        steps: its legs as (first, last) update.
        values: of each hyperparameter that is a number, in each leg.
        everyone: (first update, last update, value) of all members, by hyperparameter.
        copied: how many times it continued from another member.
    """

    member: str
    steps: list[tuple[int, int]]
    values: dict[str, list[float]]
    everyone: dict[str, list[tuple[int, int, float]]]
    copied: int

    def line(self, name: str) -> tuple[list[int], list[float]]:
        """Return updates and values of a hyperparameter, a point at both ends of each leg."""
        updates = [update for span in self.steps for update in span]
        return updates, [value for value in self.values[name] for _ in range(2)]


@dataclass(frozen=True)
class Cost:
    """The cost of a sweep: environment steps, wall-clock seconds of computing and of compiling.

    ``by_run`` has steps and device seconds of each run.
    """

    env_steps: int = 0
    wall_s: float = 0.0
    compile_s: float = 0.0
    by_run: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """Everything that a report shows."""

    identity: dict[str, Any]
    spec_text: str
    command: str  # confirms the winner, or the option that does; empty if none can
    runs: list[dict[str, Any]]
    training: dict[str, training.Curve]
    sections: list[Section]
    robust: list[ranking.Robust]  # of the tuning stage; empty without [robust]
    robust_fresh: list[ranking.Robust]  # of the runs on fresh seeds
    cross: Cross | None
    profile: Profile | None
    overall: list[Improvement]  # averaged over environments
    schedules: list[tuple[str, Schedule]]
    cost: Cost
    unit: str  # of progress, in the plural
    facts: dict[str, str]
    notes: list[str]

    @property
    def single(self) -> bool:
        """Whether there is only one run, which has nothing to be compared with."""
        return len(self.runs) == 1

    @property
    def ranked(self) -> list[Configuration]:
        """All configurations of the tuning stage."""
        return [c for section in self.sections for c in section.ranked]

    @property
    def confirmed(self) -> list[Confirmed]:
        """All configurations that were run again on fresh seeds."""
        return [each for section in self.sections for each in section.confirmed]

    @property
    def noun(self) -> str:
        """What the sections are: environments, or conditions if parameters vary."""
        return ranking.noun(self.ranked)

    @property
    def greedy(self) -> bool:
        """Whether greedy policies were evaluated, too; not every trainer has one."""
        return _greedy(self.ranked)

    @property
    def population(self) -> bool:
        """Whether members of populations were trained."""
        return ranking.is_population(self.identity)

    def during_training(self, c: Configuration) -> tuple[float, float]:
        """Return the best bin of the training curves and the area under them, IQM over runs."""
        own = [self.training[run_id] for run_id in c.run_ids if run_id in self.training]
        known = [curve for curve in own if math.isfinite(curve.best)]
        if not known:
            return math.nan, math.nan
        best, area = stats.iqm([[c.best for c in known], [c.area for c in known]]).tolist()
        return best, area

    def spent(self, c: Configuration) -> tuple[float, float]:
        """Return environment steps and device seconds of all runs of a configuration."""
        own = [self.cost.by_run.get(run_id, (0.0, 0.0)) for run_id in c.run_ids]
        return sum(steps for steps, _ in own), sum(seconds for _, seconds in own)


def of_store(store: Store, unfinished: Unfinished = training.NONE) -> Analysis:
    """Read a result directory and compute everything that the report shows.

    Args:
        store: an open result directory; units may still be pending.
        unfinished: metrics so far [rows, updates] and facts of units in progress.

    Returns:
        The analysis.

    Raises:
        FaultError: a result is damaged or cannot be read.
    """
    identity = store.ledger.identity
    runs = ranking.with_conditions(store.ledger.runs(), identity)
    legs = ranking.with_conditions(store.ledger.legs(), identity)
    arrays, episodes, cut = _arrays(store)
    unfinished = {name: own for name, own in unfinished.items() if name not in arrays}
    facts = {name: about for name, (_, about) in unfinished.items()}
    arrays |= {name: {m: own[m] for m in training.READ if m in own}
               for name, (own, _) in unfinished.items()}  # fmt: skip
    curves = training.of_runs(store, legs, arrays, facts)
    population = ranking.is_population(identity)
    ranked, confirmed = _ranked(runs, curves, population)
    tune = [run for run in runs if run["stage"] == ranking.TUNE]
    sections, command = [], _command(store, identity)
    fresh, robust = ranking.sections(confirmed), ranking.robust(ranked, identity)
    for name, own in ranking.sections(ranked).items():
        roles = _roles(_in_order(own, robust), fresh.get(name, []))
        own_legs = [leg for leg in legs if ranking.section_of(leg) == name]
        section = _section(name, own, roles, own_legs, curves, identity, tune)
        mine = [run for run in runs if ranking.section_of(run) == name]
        sections.append(replace(section, running=_running(own, mine, curves)))
    return Analysis(
        identity=identity,
        spec_text=_spec_text(store),
        command=command,
        runs=runs,
        training=curves,
        sections=sections,
        robust=robust,
        robust_fresh=ranking.robust(confirmed, identity),
        cross=None if population else _cross(sections),
        profile=None if population else _profile(sections),
        overall=_overall(sections),
        schedules=_schedules(legs, sections) if population else [],
        cost=_cost(store, legs),
        unit=_unit(store, facts),
        facts=_facts(store),
        notes=_notes(ranked, bool(confirmed), _again(store, command), episodes, cut)
        + (_chosen(identity) + store.ledger.notes()),
    )


def metrics_of(
    store: Store, data: Analysis, unfinished: Unfinished = training.NONE
) -> dict[str, Metrics]:
    """Read the training metrics of as many configurations as a page can hold.

    Args:
        store: the result directory of `data`.
        data: the analysis.
        unfinished: as for `of_store`; what a single run shows until it is finished.

    Returns:
        By environment.

    Raises:
        FaultError: a result is damaged or cannot be read.
    """
    if data.single and unfinished:
        (run,), (section,) = data.runs, data.sections
        curves = training.metrics_of_runs(store, [run["run_id"]], unfinished)
        return {section.environment: Metrics(tuple(curves)[:_METRICS], curves, (data.ranked[0],))}
    return {
        section.environment: _metrics(store, section.ranked, _NUMBERS // len(data.sections))
        for section in data.sections
    }


def _metrics(store: Store, ranked: Sequence[Configuration], numbers: int) -> Metrics:
    """Return the metrics of the first configurations, about so many numbers in all."""
    first = [c for c in ranked if c.finished][:1]
    if not first:
        return Metrics()
    names = list(training.metrics_of_runs(store, first[0].run_ids[:1]))
    names.sort(key=lambda name: (not name.startswith(contract.EPISODE), name))
    kept = tuple(names[:_METRICS])
    each = max(1, len(kept)) * training.BINS
    shown: list[Configuration] = []
    left = numbers
    for c in (c for c in ranked if c.finished):
        left -= each * (1 + min(c.finished, _SINGLE))
        if shown and (left < 0 or len(shown) == _METRIC_ROWS):
            break
        shown.append(c)
    ids = [run_id for c in shown for run_id in c.run_ids[:_SINGLE]]
    curves = training.metrics_of_runs(store, ids)
    own = {name: curves[name] for name in kept if name in curves}
    return Metrics(tuple(own), own, tuple(shown), len(names) - len(kept))


# ---------------------------------------------------------------------------------------- reading


def _arrays(store: Store) -> tuple[dict[str, dict[str, np.ndarray]], int | None, int]:
    """Return curves' arrays by committed unit, episodes per run, and how many were cut short."""
    arrays: dict[str, dict[str, np.ndarray]] = {}
    episodes, cut = None, 0
    played = {run["unit"] for run in store.ledger.runs() if ranking.environment_of(run)}
    for unit in store.ledger.units():
        if not unit["done"]:
            continue
        values = store.arrays(unit["name"], [*training.READ, contract.RETURN, contract.FINISHED])
        returns, finished = values.pop(contract.RETURN, None), values.pop(contract.FINISHED, None)
        if episodes is None and returns is not None and returns.ndim == 2:
            episodes = int(returns.shape[1])
        if unit["name"] in played:  # elsewhere, an episode that did not end has a return as well
            cut += 0 if finished is None else int((~finished.astype(bool)).sum())
        arrays[unit["name"]] = values
    return arrays, episodes, cut


def _ranked(
    runs: Sequence[dict[str, Any]], curves: Mapping[str, training.Curve], population: bool
) -> tuple[list[Configuration], list[Configuration]]:
    """Return the configurations of the tuning stage, and those that were confirmed."""
    areas = {run_id: curve.area for run_id, curve in curves.items()}
    ranked = ranking.rank_runs(runs, ranking.TUNE, population, lambda: areas)
    confirmed = ranking.rank_runs(runs, ranking.CONFIRM, areas=lambda: areas)
    return ranked, [c for c in confirmed if c.finished]


def _spec_text(store: Store) -> str:
    path = store.path / "spec.toml"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _command(store: Store, identity: Mapping[str, Any]) -> str:
    """Return the command that runs the winner again on fresh seeds; "" if there can be none.

    Only the last of several stages is confirmed, and only on seeds that have given arrays. A
    population cannot be. If the copy of the sweep file cannot be run where it is, return the option
    to add.
    """
    agent, path = str(identity.get("agent", "")), store.path
    seeds = min(SEEDS_TO_CONFIRM, frozen.spare_seeds(path, identity))
    later = stages.after(path)
    if later or not seeds or ranking.is_population(dict(identity)):
        return ""
    # A relative path of an agent does not resolve there, and of a stage the copy holds all stages.
    if "/" in agent or agent.endswith(".py") or later is not None:
        return f"--confirm {seeds}"
    if path.is_relative_to(Path.cwd()):  # shorter, and valid on another machine
        path = path.relative_to(Path.cwd())
    spec, out = shlex.quote(str(path / "spec.toml")), shlex.quote(str(path))
    return f"purejaxpg sweep {spec} --out {out} --confirm {seeds}"


def _again(store: Store, command: str) -> str:
    """Return the end of a sentence, about the command that confirms the winner."""
    if ranking.is_population(store.ledger.identity):
        return ": train several populations, a seed each, and quote the best member of each."
    if command:
        return ": run the winner again on fresh seeds before quoting its number."
    if stages.after(store.path):
        return "; do not quote its number."
    return ": train what it is given on more seeds, then run the winner again on those."


def _notes(
    ranked: Sequence[Configuration],
    confirmed: bool,
    again: str,
    episodes: int | None,
    cut: int,
) -> list[str]:
    """Return sentences that define the numbers and list missing runs."""
    missing = sum(c.planned - c.finished for c in ranked)
    total = sum(c.planned for c in ranked)
    if missing == total:
        return ["No run is finished yet."]
    number = f"{episodes} " if episodes else ""
    over = "IQM over seeds of the ", ", with a 95% bootstrap interval over seeds"
    over = ("", "") if total == 1 else over
    notes = [
        f"Final return: {over[0]}mean of {number}stochastic evaluation episodes after the last "
        f"update{over[1]}" + ("; greedy: the same with greedy actions." if _greedy(ranked) else ".")
    ]
    if cut:
        notes.append(
            f"{cut} evaluation episodes were cut short, so their runs have no score and rank last."
        )
    if any(c.diverged for c in ranked):
        where = ranking.noun(ranked)
        notes.append(f"Diverged runs count as the worst score of their {where}.")
    if any(0 < c.reached < 1 for c in ranked):
        notes.append(
            "Configurations that the search stopped early rank below those that went further."
        )
    if missing:
        notes.append(f"Unfinished: {missing} of {total} runs are missing from this report.")
    seeds = few(max(c.finished for c in ranked))
    notes += [seeds] if seeds else []
    if any(ranking.worth(a) == ranking.worth(b) for a, b in itertools.pairwise(ranked) if b.rank):
        notes.append("Ties are broken by the area under the training curve (AUC).")
    several = max(len(section) for section in ranking.sections(ranked).values()) > 1
    if several and not confirmed:
        notes.append(f"The best of many looks better than it is{again}")
    return notes


def _chosen(identity: Mapping[str, Any]) -> list[str]:
    """Return a note about parameters of the environment that were searched like hyperparameters."""
    names = ranking.searched(identity)
    if not names:
        return []
    return [
        f"This search also chose {' and '.join(names)}, which decides how hard the task is: its "
        "ranking compares different tasks. List the values in [sweep] to rank within each."
    ]


def _greedy(ranked: Iterable[Configuration]) -> bool:
    return any(math.isfinite(c.greedy_iqm) for c in ranked)


def _unit(store: Store, unfinished: Mapping[str, dict[str, Any]]) -> str:
    """Return the unit of the trainer's progress, such as environment steps."""
    facts = [*(unit["facts"] or {} for unit in store.ledger.units()), *unfinished.values()]
    return next((str(each["unit"]) for each in facts if "unit" in each), contract.ENV_STEPS)


def _facts(store: Store) -> dict[str, str]:
    """Return the hardware and versions that the runs used; several values if they differ."""
    values: dict[str, list[str]] = {}
    skipped = {"wall_s", "compile_s", "env_steps", "steps_before", "steps_per_update", "unit"}
    for unit in store.ledger.units():
        for name, value in (unit["facts"] or {}).items():
            text = value if isinstance(value, str) else json.dumps(value)
            if name not in skipped and text not in values.setdefault(name, []):
                values[name].append(text)
    return {name.replace("_", " "): ", ".join(texts[:6]) for name, texts in values.items()}


def _cost(store: Store, legs: Iterable[dict[str, Any]]) -> Cost:
    """Return the cost of all committed legs; units that were computed together count once."""
    units = {unit["name"]: unit for unit in store.ledger.units() if unit["done"]}
    spent = {
        name: tuple(float((unit["facts"] or {}).get(key) or 0.0) for key in _SPENT)
        for name, unit in units.items()
    }
    rows: Counter[tuple[float, ...]] = Counter()
    for name, unit in units.items():
        rows[unit["round"], *spent[name][:2]] += unit["rows"]
    by_run: dict[str, tuple[float, float]] = {}
    for leg in legs:
        if leg["unit"] in units:
            wall_s, compile_s, steps = spent[leg["unit"]]
            before = by_run.get(leg["run_id"], (0.0, 0.0))
            share = wall_s / rows[units[leg["unit"]]["round"], wall_s, compile_s]
            by_run[leg["run_id"]] = (before[0] + steps, before[1] + share)
    return Cost(
        env_steps=int(sum(done for done, _ in by_run.values())),
        wall_s=sum(wall_s for _, wall_s, _ in rows),
        # A program that is reused was compiled once.
        compile_s=sum({compile_s for _, _, compile_s in rows}),
        by_run=by_run,
    )


# ------------------------------------------------------------------------------------ environments


def _roles(tuned: Sequence[Configuration], confirmed: Sequence[Configuration]) -> list[Confirmed]:
    """Return the roles of the confirmed configurations, the winner first and the default last.

    Winner and runners-up are the best of the tuning stage, so any other confirmed configuration
    is the default. If the default is one of the best, it cannot be identified.
    """
    best = _compared(tuned)[: 1 + search.RUNNERS_UP]
    order = {c.key: place for place, c in enumerate(best)}
    places = {c.key: c for c in tuned}
    roles = []
    for c in sorted(confirmed, key=lambda c: order.get(c.key, len(order))):
        role = "runner-up" if order.get(c.key) else "winner" if c.key in order else "default"
        roles.append(Confirmed(role, c, places.get(c.key)))
    return roles if roles and roles[0].role == "winner" else []  # the winner may be pending


def _in_order(
    own: Sequence[Configuration], robust: Iterable[ranking.Robust]
) -> Sequence[Configuration]:
    """Return the configurations of a condition in the order in which a sweep confirms them."""
    chosen = (each for over in robust for c in over.ranked for each in over.parts[c.key])
    ids = {id(c) for c in own}
    return [c for c in chosen if id(c) in ids] or own


def _compared(ranked: Sequence[Configuration]) -> list[Configuration]:
    """Return the configurations that were trained as far as the first."""
    return [c for c in ranked if c.rank is not None and c.rung >= ranked[0].rung]


def _section(
    name: str,
    ranked: list[Configuration],
    confirmed: list[Confirmed],
    legs: Sequence[dict[str, Any]],
    training_curves: Mapping[str, training.Curve],
    identity: dict[str, Any],
    runs: Sequence[dict[str, Any]],
) -> Section:
    """Return the results of one environment."""
    curves, population = dict(training_curves), ranking.is_population(identity)
    own = [run for run in runs if ranking.section_of(run) == name]
    confirmed_again = [c.configuration for c in confirmed]
    contenders = [c.scores for c in _compared(ranked[:CONTENDERS])]
    finite = contenders and np.isfinite(np.concatenate(contenders)).all()
    return Section(
        environment=name,
        ranked=ranked,
        confirmed=confirmed,
        first=tuple(stats.first_place(contenders).tolist()) if finite else (),
        curves=_curves(ranked, curves),
        confirmed_curves=_curves(confirmed_again, curves, [c.name for c in confirmed]),
        effects=Effects() if population else _effects(legs, own, identity),
        improvements=[] if population else _improvements(name, ranked, confirmed),
    )


def _running(
    ranked: Sequence[Configuration],
    runs: Iterable[dict[str, Any]],
    curves: dict[str, training.Curve],
) -> Curves | None:
    """Return the curves so far of the runs in progress, the highest at their ends first."""
    ids: dict[str, tuple[str, ...]] = {}
    for run in runs:
        if run["status"] == "pending" and run["run_id"] in curves:
            key = ranking.swept_key(run)
            ids[key] = (*ids.get(key, ()), run["run_id"])
    found = [replace(c, run_ids=ids.pop(c.key)) for c in ranked if c.key in ids]
    found.sort(key=lambda c: -_end(c, curves))
    drawn = _curves(found, curves)
    return drawn and replace(drawn, best=tuple(map(_named_by_runs, drawn.best)))


def _end(c: Configuration, curves: dict[str, training.Curve]) -> float:
    """Return the mean of the last returns of a configuration's runs; -inf if no episode ended."""
    last = [curves[run_id].returns[-1] for run_id in c.run_ids]
    return float(np.mean(last)) if np.isfinite(last).all() else -math.inf


def _named_by_runs(line: Line) -> Line:
    c = line.configuration
    return replace(line, name=c.label, label=f"{c.label} ({count(len(c.run_ids), 'run')})")


def _curves(
    ranked: Sequence[Configuration],
    curves: dict[str, training.Curve],
    roles: Sequence[str] | None = None,
) -> Curves | None:
    """Return the best curves with bands, and the others with quantiles if they are many."""
    stacks = [(c, training.stack(c.run_ids, curves)) for c in ranked]
    drawable = [(c, curve) for c, curve in stacks if curve is not None]
    if not drawable:
        return None
    best = []
    for index, (c, curve) in enumerate(drawable[:HIGHLIGHTED]):
        name, label = f"#{c.rank}", legend(c)
        if roles:
            name, label = roles[index], f"{roles[index]}: {c.label}"
        best.append(_line(c, name, label, curve))
    within = {run_id: own for run_id, curve in curves.items() if (own := curve.evaluated)}
    found = [training.stack(line.configuration.run_ids, within) for line in best]
    evaluated = tuple(
        None if own is None else _line(line.configuration, f"{line.name} eval", line.label, own)
        for line, own in zip(best, found, strict=True)
    )
    rest = tuple(
        (c, curve.steps, training.over_seeds(curve.returns)) for c, curve in drawable[HIGHLIGHTED:]
    )
    if len(rest) <= FEW:
        return Curves(tuple(best), rest, evaluated=evaluated)
    grid = np.linspace(0, max(steps[-1] for _, steps, _ in rest), _GRID_POINTS)
    common = np.stack([_on_grid(grid, steps, centre) for _, steps, centre in rest])
    enough = np.isfinite(common).sum(axis=0) >= 10
    quantiles = np.full((5, grid.size), np.nan)
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    quantiles[:, enough] = np.nanquantile(common[:, enough], levels, axis=0)
    return Curves(tuple(best), rest, quantiles, grid, evaluated)


def _line(c: Configuration, name: str, label: str, curve: training.Curve) -> Line:
    """Return the curve of a configuration over its runs."""
    centre, ends = training.over_seeds(curve.returns), training.interval(curve.returns)
    return Line(c, name, label, curve.steps, centre, *ends)


def few(seeds: int) -> str:
    """Return a sentence about intervals over few seeds; "" if they are enough, or is only one."""
    if not 1 < seeds < FEW_SEEDS:
        return ""
    return f"{seeds} seeds are few: their intervals are too narrow."


def readable(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis around values, so wide that its ticks differ when written."""
    largest = max(abs(low), abs(high))
    margin = 0.05 * (high - low) if high - low > 2e-3 * largest else 0.01 * largest
    return low - (margin or 1.0), high + (margin or 1.0)


def legend(c: Configuration) -> str:
    """Return the name of a configuration of the tuning stage in a figure."""
    failed = f" ({c.diverged} of {c.finished} diverged)" if c.diverged else ""
    stopped = f" (stopped at {c.reached:.0%})" if c.reached < 1 else ""
    return f"{c.rank}.  {c.label}{failed}{stopped}"


def _on_grid(grid: np.ndarray, steps: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Return a curve at the steps of a grid, NaN outside its own."""
    known = np.isfinite(centre)
    if not known.any():
        return np.full(grid.size, np.nan)
    gap = (steps[1] - steps[0]) if steps.size > 1 else 0.0
    inside = (grid >= steps[known][0] - gap) & (grid <= steps[-1] + gap)
    return np.where(inside, np.interp(grid, steps[known], centre[known]), np.nan)


# -------------------------------------------------------------------------------------- importance


def _effects(
    legs: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], identity: Mapping[str, Any]
) -> Effects:
    """Return the effects of the hyperparameters, from the first legs, which all runs share."""
    first = [leg for leg in legs if leg["start"] == 0]
    if stores.GROWN in identity:  # if runs became longer, they share their ends
        first = list({leg["run_id"]: leg for leg in legs}.values())
    tuned = [leg for leg in first if leg["stage"] == ranking.TUNE]
    first = [leg for leg in tuned if leg["status"] != "pending"]
    filled = ranking.filled_scores(first)
    groups = ranking.grouped(first, ranking.swept_key)
    scores = [np.array([filled[leg["run_id"]] for leg in group]) for group in groups.values()]
    if len(scores) < 3 or not np.isfinite(np.concatenate(scores)).all():
        return Effects()
    swept = [group[0]["swept"] for group in groups.values()]
    levels = _levels(swept, identity.get("sweep") or {})
    if not levels:
        return Effects()
    codes = np.stack([each.codes for each in levels.values()], axis=1)
    if not _enough(codes):
        return Effects()
    parts, means = stats.importance(codes, scores), np.array([s.mean() for s in scores])
    axes = _axes(levels, parts, codes, means, _failures(runs, levels, groups))
    pairs = _pairs(levels, swept, means, identity.get("sweep") or {}, parts)
    at = min(ranking.reached(leg) for leg in first)
    axes.sort(key=lambda axis: -axis.share)
    # Both are estimates, and together no more than everything.
    noise = float(np.minimum(parts.noise, max(0.0, 1.0 - parts.main.sum())))
    return Effects(axes, pairs, noise, means, at)


def _enough(codes: np.ndarray) -> bool:
    """Return whether main effects can be separated from noise: in a grid or with enough runs."""
    return stats.is_grid(codes) or len(codes) >= 5 + int(codes.max(axis=0).sum())


def _levels(swept: Sequence[Mapping[str, Any]], specs: Mapping[str, Any]) -> dict[str, Levels]:
    """Return the classes of each hyperparameter that has several."""
    names = list(dict.fromkeys(name for each in swept for name in each))[:_AXES]
    levels = {name: levels_of([s.get(name) for s in swept], specs.get(name)) for name in names}
    return {name: each for name, each in levels.items() if len(each.labels) > 1}


def _axes(
    levels: Mapping[str, Levels],
    parts: stats.Importance,
    codes: np.ndarray,
    means: np.ndarray,
    failures: Mapping[str, tuple[tuple[int, int], ...]],
) -> list[Axis]:
    """Return the effect of each hyperparameter."""
    top = np.full(len(levels), np.nan)
    if len(means) >= _TOP_NEEDS:
        good = (means >= np.quantile(means, _TOP)).astype(float)
        top = stats.importance(codes, list(good[:, None]), halves=0).main
    axes = []
    for j, (name, each) in enumerate(levels.items()):
        errors = np.where(parts.errors[j] > 0, parts.errors[j], np.nan)
        best = np.array([means[each.codes == k].max() for k in range(len(each.labels))])
        axes.append(
            Axis(
                name, each, float(parts.main[j]), float(parts.low[j]), float(parts.high[j]),
                float(top[j]), parts.effects[j], errors, best, failures[name],
            )
        )  # fmt: skip
    return axes


def levels_of(values: Sequence[Any], spec: Any = None, most: int | None = None) -> Levels:
    """Put the values of one hyperparameter into classes.

    Args:
        values: one per configuration.
        spec: its line in the sweep file, a list or ``{kind: [low, high]}``, if known.
        most: the largest number of classes; by default it depends on the number of values.

    Returns:
        Its distinct values if they are few or names, else bins of about equal size.
    """
    texts = [json.dumps(v) for v in values]
    if not _numeric(values) or not np.isfinite(np.array(values, float)).all():
        names = list(dict.fromkeys(texts))
        codes = np.array([names.index(text) for text in texts])
        labels = tuple(short(json.loads(text)) for text in names)
        return Levels(codes, labels, None, False, codes.astype(float))
    numbers = np.array(values, float)
    distinct, codes = np.unique(numbers, return_inverse=True)
    kind = next(iter(spec), "") if isinstance(spec, Mapping) else ""
    spread = bool(distinct[0] > 0 and distinct[-1] / distinct[0] >= 20)
    log = kind.startswith("log") or (spread and not kind)
    drawn = isinstance(spec, Mapping)
    limit = most or (min(_MOST_LEVELS, max(2, len(values) // 3)) if drawn else _MOST_LEVELS)
    if len(distinct) <= limit or (isinstance(spec, list) and most is None):
        labels = tuple(short(_whole(v, values)) for v in distinct.tolist())
        return Levels(codes, labels, distinct, log, numbers)
    return _binned(numbers, most or int(np.clip(len(values) // 8, 2, 8)), log)


def _numeric(values: Iterable[Any]) -> bool:
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def _whole(value: float, values: Sequence[Any]) -> Any:
    """Return a number as the sweep has it: an integer if all are integers."""
    return int(value) if all(isinstance(v, int) for v in values) else value


def _binned(numbers: np.ndarray, count: int, log: bool) -> Levels:
    """Return bins of about equal size; equal values share a bin."""
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, count + 1)[1:-1]))
    codes = np.unique(np.searchsorted(edges, numbers, side="right"), return_inverse=True)[1]
    members = [numbers[codes == k] for k in range(codes.max() + 1)]
    centres = [np.exp(np.log(m).mean()) if log else m.mean() for m in members]
    labels = tuple(f"{_rough(m.min())} to {_rough(m.max())}" for m in members)
    return Levels(codes, labels, np.array(centres), log, numbers)


def _rough(value: float) -> str:
    return short(float(f"{value:.2g}"))


def _failures(
    runs: Sequence[dict[str, Any]],
    levels: Mapping[str, Levels],
    groups: Mapping[str, list[dict[str, Any]]],
) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return diverged and all committed runs at each level of each hyperparameter."""
    by_key = ranking.grouped(runs, ranking.swept_key)
    states = [[run["status"] for run in by_key[key]] for key in groups]
    failed = [each.count("diverged") for each in states]
    total = [len(each) - each.count("pending") for each in states]
    counts_of = {}
    for name, each in levels.items():
        sums = [np.bincount(each.codes, counts).astype(int) for counts in (failed, total)]
        counts_of[name] = tuple(zip(*(s.tolist() for s in sums), strict=True))
    return counts_of


def _pairs(
    levels: Mapping[str, Levels],
    swept: Sequence[Mapping[str, Any]],
    means: np.ndarray,
    specs: Mapping[str, Any],
    parts: stats.Importance,
) -> list[Pair]:
    """Return mean scores over the pairs that explain most together."""
    names = list(levels)
    together = parts.main[:, None] + parts.main[None, :] + parts.pairs
    chosen = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    chosen.sort(key=lambda pair: -together[pair])
    most = int(np.clip(np.sqrt(len(means) / 3), 3, 8))
    coarse = {name: _coarser(levels[name], swept, name, specs, most) for name in names}
    pairs = []
    for a, b in [pair for pair in chosen if parts.pairs[pair] >= _PAIR_SHARE][:_PAIRS]:
        rows, columns = coarse[names[a]], coarse[names[b]]
        counts, sums = np.zeros((2, len(rows.labels), len(columns.labels)))
        np.add.at(counts, (rows.codes, columns.codes), 1)
        np.add.at(sums, (rows.codes, columns.codes), means)
        with np.errstate(invalid="ignore"):
            average = sums / counts
        share = float(parts.pairs[a, b])
        pairs.append(Pair(names[a], names[b], rows, columns, average, counts, share))
    return pairs


def _coarser(
    each: Levels, swept: Sequence[Mapping[str, Any]], name: str, specs: Mapping[str, Any], most: int
) -> Levels:
    """Return classes few enough that most cells of a pair are not empty."""
    if each.centres is None or (not each.binned and len(each.labels) <= _MOST_LEVELS):
        return each
    spec = specs.get(name)
    return levels_of([s.get(name) for s in swept], None if isinstance(spec, list) else spec, most)


# -------------------------------------------------------------------------------------- comparisons


def _improvements(
    name: str, ranked: Sequence[Configuration], confirmed: Sequence[Confirmed]
) -> list[Improvement]:
    """Compare the winner with the others confirmed, or with others of the tuning stage."""
    pairs = [(each.name, confirmed[0].configuration, each.configuration) for each in confirmed[1:]]
    full = _compared(ranked)
    if not confirmed and len(full) > 1:
        pairs = [("rank 2", full[0], full[1])]
    if not confirmed and len(full) > 3:
        middle = full[len(full) // 2]
        pairs.append((f"the middle of the ranking (rank {middle.rank})", full[0], middle))
    return [_improvement(over, name, [(a, b)]) for over, a, b in pairs if _finite(a, b)]


def _finite(*configurations: Configuration) -> bool:
    return all(c.scores and np.isfinite(c.scores).all() for c in configurations)


def _improvement(
    over: str, environment: str, pairs: Sequence[tuple[Configuration, Configuration]]
) -> Improvement:
    x, y = [list(a.scores) for a, _ in pairs], [list(b.scores) for _, b in pairs]
    value = stats.probability_of_improvement(x, y)
    low, high = stats.improvement_ci(x, y)
    return Improvement(over, environment, value, low, high)


def _overall(sections: Sequence[Section]) -> list[Improvement]:
    """Return the improvement of winners over defaults, averaged over several environments."""
    pairs = []
    for section in sections:
        winner, default = section.role("winner"), section.role("default")
        if winner and default and _finite(winner.configuration, default.configuration):
            pairs.append((winner.configuration, default.configuration))
    if len(pairs) < 2 or len(pairs) < len(sections):
        return []
    where = ranking.noun(c for section in sections for c in section.ranked)
    return [_improvement("default", f"all {len(pairs)} {where}s", pairs)]


def _profile(sections: Sequence[Section]) -> Profile | None:
    """Return the performance profiles of the best, and of the default if it was confirmed."""
    lines: dict[str, list[Configuration]] = {}
    for section in sections:
        # The first runner-up is the best of them, so the others must not replace it.
        confirmed = {each.role: each.configuration for each in reversed(section.confirmed)}
        own = {f"{role}, fresh seeds": confirmed[role] for role in _ROLES if role in confirmed}
        full = [] if confirmed else _compared(section.ranked)
        if full:
            own["best"] = full[0]
        if len(full) > 2:
            own["middle of the ranking"] = full[len(full) // 2]
        for label, c in own.items():
            lines.setdefault(label, []).append(c)
    lines = {k: v for k, v in lines.items() if len(v) == len(sections) and _finite(*v)}
    if not lines or max(c.finished for v in lines.values() for c in v) < 2:
        return None
    scales = [_scale(section) if len(sections) > 1 else (0.0, 1.0) for section in sections]
    scaled = {
        label: [(np.array(c.scores) - a) / b for c, (a, b) in zip(own, scales, strict=True)]
        for label, own in lines.items()
    }
    values = np.concatenate([part for parts in scaled.values() for part in parts])
    margin = 0.03 * (values.max() - values.min() or 1.0)
    taus = np.linspace(values.min() - margin, values.max() + margin, 81)
    drawn = [(label, *stats.performance_profile(parts, taus)) for label, parts in scaled.items()]
    return Profile(taus, tuple(drawn), len(sections) > 1)


def _scale(section: Section) -> tuple[float, float]:
    """Return the 5th percentile of the configurations' scores and its distance to the 95th."""
    scores = [c.iqm for c in section.ranked if np.isfinite(c.iqm)]
    low, high = np.quantile(scores, [0.05, 0.95])
    return float(low), float(high - low) or 1.0


def _cross(sections: Sequence[Section]) -> Cross | None:
    """Return the sensitivity over environments, from the settings finished in all of them."""
    if len(sections) < 2:
        return None
    by_key = [{c.key: c for c in s.ranked if _finite(c) and c.rung == math.inf} for s in sections]
    shared = [key for key in by_key[0] if all(key in other for other in by_key)]
    if len(shared) < 2:
        return None
    table = [[own[key] for key in shared] for own in by_key]
    normalized = stats.percentile_normalized([[c.iqm for c in row] for row in table])
    sensitivity = stats.sensitivity(normalized)
    swept = [c.swept for c in table[0]]
    names = [n for n in swept[0] if len({json.dumps(s.get(n)) for s in swept}) > 1]
    texts = [[json.dumps(each.get(name)) for each in swept] for name in names]
    codes = np.stack([np.unique(column, return_inverse=True)[1] for column in texts], axis=1)
    grid = stats.is_grid(codes) and len(names) <= _AXES
    both = np.array([normalized.max(axis=1), normalized[:, sensitivity.best_cross]])
    return Cross(
        environments=tuple(s.environment for s in sections),
        settings=len(shared),
        sensitivity=sensitivity,
        interval=_sensitivity_interval(table),
        dimensionality=stats.effective_dimensionality(normalized, codes) if grid else None,
        names=tuple(names),
        best_cross=swept[sensitivity.best_cross],
        normalized_best=both,
    )


def _sensitivity_interval(table: Sequence[Sequence[Configuration]]) -> tuple[float, float] | None:
    """Return the 95% interval of the sensitivity when the seeds are resampled."""
    sizes = {c.finished for row in table for c in row}
    if len(sizes) > 1 or max(sizes) < 2:
        return None
    scores = np.array([[c.scores for c in row] for row in table])  # [e, h, seeds]
    generator, drawn = np.random.default_rng(0), []
    for _ in range(min(200, max(20, 20_000_000 // scores.size))):
        resampled = generator.integers(0, scores.shape[-1], scores.shape)
        iqms = stats.iqm(np.take_along_axis(scores, resampled, axis=-1))
        drawn.append(stats.sensitivity(stats.percentile_normalized(iqms)).value)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


# -------------------------------------------------------------------------------------- populations


def _schedules(
    legs: Sequence[dict[str, Any]], sections: Sequence[Section]
) -> list[tuple[str, Schedule]]:
    """Return the history of the best member of each environment's populations."""
    done = [leg for leg in legs if leg["status"] != "pending"]
    chains, by_environment = training.chains(done), ranking.grouped(done, ranking.section_of)
    return [
        (s.environment, _schedule(chains[s.winner.run_ids[0]], by_environment[s.environment]))
        for s in sections
        if s.winner
    ]


def _schedule(chain: Sequence[dict[str, Any]], legs: Sequence[dict[str, Any]]) -> Schedule:
    fields = {name: [leg["swept"][name] for leg in legs] for name in chain[-1]["swept"]}
    names = [name for name, values in fields.items() if _numeric(values)]
    return Schedule(
        member=chain[-1]["run_id"],
        steps=[(leg["start"], leg["stop"]) for leg in chain],
        values={name: [float(leg["swept"][name]) for leg in chain] for name in names},
        everyone={
            name: [(leg["start"], leg["stop"], float(leg["swept"][name])) for leg in legs]
            for name in names
        },
        copied=sum(leg["run_id"] != leg["parent"] for leg in chain[1:]),
    )
