"""Several result directories compared: methods across environments.

A method is one result directory. In each environment its winner stands for it: the runs on fresh
seeds if the winner was confirmed, else those of the tuning stage. The statistics are those of
Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice":
interquartile mean over all runs, probability of improvement and performance profiles, each with a
bootstrap that resamples the runs of each environment.
"""

import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import InputError, stats
from purejaxpg.report import analysis
from purejaxpg.report.analysis import Analysis, Curves, Improvement, Line, Profile, Section
from purejaxpg.report.ranking import Configuration
from purejaxpg.sweep.store import Store
from purejaxpg.text import count, engineering

_POINTS = 81  # thresholds of a performance profile


@dataclass(frozen=True)
class Entry:
    """What stands for a method in one environment.

    Attributes:
        configuration: the winner, with its runs on fresh seeds if there are any.
        fresh: whether its runs are on fresh seeds.
        tried: how many configurations it was chosen from.
        scores: of its runs ``[n]``; a diverged one counts below every run of every method.
        scaled: the same on the scale that the environments share.
        config: the fields of one of its runs.
        area: under its training curve, on that scale; -inf without a curve.
    """

    configuration: Configuration
    fresh: bool
    tried: int
    scores: np.ndarray
    scaled: np.ndarray
    config: Mapping[str, Any]
    area: float

    @property
    def iqm(self) -> float:
        """Interquartile mean of the scores."""
        return float(stats.iqm(self.scores))

    @property
    def ends(self) -> tuple[float, float]:
        """The 95% interval of the interquartile mean."""
        low, high = stats.bootstrap_ci([self.scores])
        return float(low), float(high)


@dataclass(frozen=True)
class Method:
    """A method over all environments.

    Attributes:
        name: of the agent; of the directory if several have the same agent.
        directory: its results.
        entries: by environment.
        identity: of its sweep.
        iqm: interquartile mean of the scaled scores of all runs.
        low: lower end of its 95% interval.
        high: upper end.
        mean: mean of the scaled scores, over environments.
        first: share of the resamples in which it has the highest interquartile mean.
    """

    name: str
    directory: Path
    entries: Mapping[str, Entry]
    identity: Mapping[str, Any]
    iqm: float
    low: float
    high: float
    mean: float
    first: float = math.nan

    @property
    def strata(self) -> list[np.ndarray]:
        """The scaled scores of each environment."""
        return [entry.scaled for entry in self.entries.values()]

    @property
    def area(self) -> float:
        """The mean of the areas under its training curves."""
        return float(np.mean([entry.area for entry in self.entries.values()]))


@dataclass(frozen=True)
class Together:
    """Methods, best first, and everything that a page about them shows.

    Attributes:
        methods: best first.
        environments: with their parameters, those that all of them have.
        curves: training curves by environment, one line per method in the order of ``methods``.
        improvements: of each method over each that ranks below it.
        profile: performance profiles.
        unit: of progress, in the plural.
        normalized: whether scores were scaled, because there are several environments.
        scales: lowest and highest score of each environment.
        warnings: sentences about what differs between the sweeps.
        notes: sentences that define the numbers.
    """

    methods: list[Method]
    environments: tuple[str, ...]
    curves: dict[str, Curves]
    improvements: list[Improvement]
    profile: Profile
    unit: str
    normalized: bool
    scales: dict[str, tuple[float, float]]
    warnings: list[str]
    notes: list[str]


def of_directories(directories: Sequence[str | os.PathLike[str]]) -> Together:
    """Read result directories and compare them.

    Args:
        directories: at least one; units may still be pending.

    Returns:
        The comparison.

    Raises:
        InputError: a directory is named twice, holds no results or none of an environment, or the
            directories have no environment or no unit of progress in common.
        FaultError: a result is damaged or cannot be read.
    """
    paths = [Path(os.path.abspath(directory)) for directory in directories]
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise InputError(f"{path} is named {times} times; name each result directory once.")
    read = [_read(path) for path in paths]
    names = dict(zip(paths, _names(paths, read), strict=True))
    _refuse_other_units(names, read)
    sections = [{s.environment: s for s in data.sections if s.winner} for data in read]
    shared = _shared(names, sections)
    pools = {name: _pooled(name, paths, sections, read) for name in shared}
    scales = {name: (min(pool.values()), max(pool.values())) for name, pool in pools.items()}
    if len(shared) == 1:
        scales = dict.fromkeys(shared, (0.0, 1.0))
    methods = []
    for path, data, own in zip(paths, read, sections, strict=True):
        entries = {n: _entry(own[n], data, pools[n], scales[n], path) for n in shared}
        methods.append(_method(names[path], path, entries, data.identity))
    firsts = stats.first_place([method.strata for method in methods]).tolist()
    methods = [replace(m, first=first) for m, first in zip(methods, firsts, strict=True)]
    methods.sort(key=lambda m: (-m.iqm, -m.mean, -m.area))
    missing = sorted({name for own in sections for name in own} - set(shared))
    places = {path: place for place, path in enumerate(paths)}
    ordered = [sections[places[m.directory]] for m in methods]
    return Together(
        methods=methods,
        environments=shared,
        curves={name: _curves(name, methods, ordered) for name in shared},
        improvements=_improvements(methods),
        profile=_profile(methods, len(shared) > 1),
        unit=read[0].unit,
        normalized=len(shared) > 1,
        scales=scales,
        warnings=_warnings(methods, shared, read[0].unit),
        notes=_notes(methods, shared, missing, scales),
    )


# ---------------------------------------------------------------------------------------- reading


def _read(path: Path) -> Analysis:
    """Return the analysis of a result directory whose runs played an environment."""
    with Store.read(path) as store:
        data = analysis.of_store(store)
    if any(not section.environment for section in data.sections):
        raise InputError(
            f"{path} has no environment: its returns are those of a trainer that scores itself, "
            "such as one of language models, and cannot be compared with those of other sweeps."
        )
    if not any(section.winner for section in data.sections):
        raise InputError(f"{path} has no finished run yet, so there is nothing to compare.")
    return data


def _names(paths: Sequence[Path], read: Sequence[Analysis]) -> list[str]:
    """Return a name for each directory: its agent, its own name, or its path if those are equal."""
    agents = [Path(str(data.identity.get("agent") or path.name)).name.removesuffix(".py")
              for path, data in zip(paths, read, strict=True)]  # fmt: skip
    for names in (agents, [path.name for path in paths]):
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _refuse_other_units(names: Mapping[Path, str], read: Sequence[Analysis]) -> None:
    """Refuse directories whose curves have different units."""
    (first, unit), *others = zip(names, (data.unit for data in read), strict=True)
    for path, other in others:
        if other != unit:
            raise InputError(
                f"{first} and {path} measure progress differently, in {unit} and in {other}, so "
                "they cannot be compared."
            )


def _shared(
    names: Mapping[Path, str], sections: Sequence[Mapping[str, Section]]
) -> tuple[str, ...]:
    """Return the environments that all directories have."""
    shared = tuple(name for name in sections[0] if all(name in own for own in sections))
    if not shared:
        have = [
            f"{path} has {', '.join(map(repr, own))}"
            for path, own in zip(names, sections, strict=True)
        ]
        raise InputError(f"There is no environment that all directories have: {'; '.join(have)}.")
    return shared


# --------------------------------------------------------------------------------------- comparing


def _chosen(section: Section) -> tuple[Configuration, bool]:
    """Return the winner of a sweep, and whether its runs are on fresh seeds."""
    confirmed = section.role("winner")
    if confirmed is not None:
        return confirmed.configuration, True
    return section.ranked[0], False


def _pooled(
    environment: str,
    paths: Sequence[Path],
    sections: Sequence[Mapping[str, Section]],
    read: Sequence[Analysis],
) -> dict[tuple[Path, str], float]:
    """Return the scores of all methods' runs in an environment, diverged ones below the worst."""
    runs: dict[tuple[Path, str], dict[str, Any]] = {}
    for path, own, data in zip(paths, sections, read, strict=True):
        ids = set(_chosen(own[environment])[0].run_ids)
        runs |= {(path, run["run_id"]): run for run in data.runs if run["run_id"] in ids}
    diverged = [run["status"] == "diverged" for run in runs.values()]
    values = stats.worst_filled([run["score"] for run in runs.values()], diverged)
    if not np.isfinite(values).all():
        raise InputError(f"No run in {environment} has a score, so there is nothing to compare.")
    return dict(zip(runs, values.tolist(), strict=True))


def _entry(
    section: Section,
    data: Analysis,
    pool: Mapping[tuple[Path, str], float],
    scale: tuple[float, float],
    path: Path,
) -> Entry:
    """Return what stands for a method in one environment."""
    chosen, fresh = _chosen(section)
    low, span = scale[0], (scale[1] - scale[0]) or 1.0
    scores = np.array([pool[path, run_id] for run_id in chosen.run_ids])
    area = (data.during_training(chosen)[1] - low) / span
    config = next(run["config"] for run in data.runs if run["run_id"] == chosen.run_ids[0])
    tried = sum(c.finished > 0 for c in section.ranked)
    area = area if math.isfinite(area) else -math.inf
    return Entry(chosen, fresh, tried, scores, (scores - low) / span, config, area)


def _method(
    name: str, path: Path, entries: dict[str, Entry], identity: Mapping[str, Any]
) -> Method:
    strata = [entry.scaled for entry in entries.values()]
    low, high = stats.bootstrap_ci(strata)
    mean = float(np.mean([part.mean() for part in strata]))
    whole = float(stats.iqm(np.concatenate(strata)))
    return Method(name, path, entries, identity, whole, float(low), float(high), mean)


def _curves(
    environment: str, methods: Sequence[Method], sections: Sequence[Mapping[str, Section]]
) -> Curves:
    """Return a curve per method; an empty one for a method that recorded no episodes."""
    nothing, lines = np.zeros(0), []
    for method, own in zip(methods, sections, strict=True):
        entry, section = method.entries[environment], own[environment]
        curves = section.confirmed_curves if entry.fresh else section.curves
        found = (line for line in (curves.best if curves else ()))
        line = next((x for x in found if x.configuration is entry.configuration), None)
        line = line or Line(entry.configuration, "", "", nothing, nothing, nothing, nothing)
        text = f"{method.name}: {entry.configuration.label}"
        lines.append(replace(line, name=method.name, label=text))
    return Curves(tuple(lines))


def _improvements(methods: Sequence[Method]) -> list[Improvement]:
    """Return how often a run of each method beats a run of each that ranks below it."""
    found = []
    for a, b in itertools.combinations(methods, 2):
        value = stats.probability_of_improvement(a.strata, b.strata)
        ends = stats.improvement_ci(a.strata, b.strata)
        found.append(Improvement(f"{a.name} over {b.name}", "", value, *ends))
    return found


def _profile(methods: Sequence[Method], normalized: bool) -> Profile:
    values = np.concatenate([part for method in methods for part in method.strata])
    margin = 0.03 * (np.ptp(values) or 1.0)
    taus = np.linspace(values.min() - margin, values.max() + margin, _POINTS)
    lines = tuple((m.name, *stats.performance_profile(m.strata, taus)) for m in methods)
    return Profile(taus, lines, normalized)


# ------------------------------------------------------------------------------------------- words


def _warnings(methods: Sequence[Method], environments: Sequence[str], unit: str) -> list[str]:
    """Return sentences about settings in which the sweeps differ."""
    found = [_differing("Evaluations differ", methods, _episodes)]
    for name in environments:
        place = f" in {name}" if len(environments) > 1 else ""
        text = f"The {unit} of a run differ{place}"
        found.append(_differing(text, methods, lambda m, n=name: _budget(m.entries[n])))
    for method in methods:
        runs = [e.configuration for e in method.entries.values()]
        missing = sum(c.planned - c.finished for c in runs)
        if missing:
            found.append(f"{count(missing, 'run')} of {method.name} are missing: not finished yet.")
    return [text for text in found if text]


def _differing(text: str, methods: Sequence[Method], read: Any) -> str:
    """Return a sentence that lists a value of each method; "" if all are equal."""
    values = {method.name: read(method) for method in methods}
    if len(set(values.values())) < 2:
        return ""
    return f"{text}: {', '.join(f'{name} {value}' for name, value in values.items())}."


def _episodes(method: Method) -> str:
    return count(int(method.identity.get("eval_episodes") or 0), "episode")


def _budget(entry: Entry) -> str:
    steps = entry.config.get("total_timesteps")
    return "unknown" if steps is None else engineering(float(steps))


def _notes(
    methods: Sequence[Method],
    environments: Sequence[str],
    missing: Sequence[str],
    scales: Mapping[str, tuple[float, float]],
) -> list[str]:
    """Return sentences that define the numbers, and say which runs they are from."""
    notes = [
        "Each agent is represented by the configuration that its sweep chose in each environment, "
        "by the final return."
    ]
    fresh = [m.name for m in methods if all(e.fresh for e in m.entries.values())]
    some = [m.name for m in methods if m.name not in fresh]
    if fresh:
        notes.append(f"Runs on fresh seeds (--confirm) stand for {', '.join(fresh)}.")
    if some:
        part = " where none was confirmed" if any(
            e.fresh for m in methods if m.name in some for e in m.entries.values()
        ) else ""  # fmt: skip
        notes.append(
            f"Runs of the tuning stage stand for {', '.join(some)}{part}: the best of many looks "
            "better than it is, most of all where more configurations were tried."
        )
    if len(environments) > 1:
        notes.append(
            "Scores are normalised in each environment: 0 is the lowest and 1 the highest final "
            "return of the runs on this page. Another set of agents gives other numbers."
        )
    if missing:
        notes.append(f"Left out, because not every agent has them: {', '.join(missing)}.")
    seeds = analysis.few(min(e.scores.size for m in methods for e in m.entries.values()))
    notes += [seeds] if seeds else []
    keys = [(m.iqm, m.mean) for m in methods]
    if len(set(keys)) < len(keys):
        notes.append("Ties are broken by the area under the training curve.")
    return notes
