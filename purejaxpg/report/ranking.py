"""The configurations of a sweep, ranked over their seeds.

The environment of a run and its parameters are its condition; its other swept fields are its
hyperparameters. Runs with equal hyperparameters are one configuration. Configurations are ranked
within each condition, because an easier task is no better configuration. The score of a run is its
mean return over the evaluation after its last update; the score of a configuration is the
interquartile mean over its seeds. A diverged run counts as worse than every other of its condition.
A configuration that a search stopped early ranks below all that went to a later rung. Equal scores
are ordered by their means, and equal means by the area under the training curve; those that were
confirmed stay first, in the order in which the search chose them. Runs on fresh seeds, which
confirm a winner, are ranked separately and never mixed with those that chose it.
"""

import functools
import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from purejaxpg import contract, stats
from purejaxpg.report import curves as training
from purejaxpg.sweep.store import Store
from purejaxpg.text import short

TUNE, CONFIRM = "tune", "confirm"
Item = TypeVar("Item")
Key = TypeVar("Key")
Areas = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Configuration:
    """What one configuration achieved over its seeds, in one condition.

    Attributes:
        rank: from 1, within the condition; None until a run of it is committed.
        environment: the condition of its runs, ``env`` and its parameters; empty if they have none.
        condition: ``env``, and those of the swept fields that are part of the condition.
        swept: the other swept fields, its hyperparameters.
        scores: final score of each committed run ``[n]``, diverged ones filled in as the worst.
        iqm: interquartile mean of ``scores``.
        low: lower end of its 95% bootstrap interval; equal to ``iqm`` with one run.
        high: upper end.
        mean: mean of ``scores``.
        greedy_iqm: interquartile mean of the final scores of the greedy policy.
        diverged: how many of the committed runs diverged.
        planned: how many runs the sweep plans for it.
        run_ids: the committed runs, in the order of ``scores``.
        reached: share of the updates of a whole run that it was trained for; below 1 if a
            search stopped it.
        rung: compared before the score: equal for all that a search stopped in the same rung, inf
            for a configuration that was trained to the end.
    """

    rank: int | None
    environment: str
    condition: dict[str, Any]
    swept: dict[str, Any]
    scores: tuple[float, ...]
    iqm: float
    low: float
    high: float
    mean: float
    greedy_iqm: float
    diverged: int
    planned: int
    run_ids: tuple[str, ...]
    reached: float = 1.0
    rung: float = math.inf

    @property
    def finished(self) -> int:
        """The number of committed runs."""
        return len(self.scores)

    @property
    def label(self) -> str:
        """The swept fields in short, such as ``learning_rate 3e-4, clip_eps 0.2``."""
        return (
            ", ".join(f"{name} {short(value)}" for name, value in self.swept.items()) or "all runs"
        )

    @property
    def key(self) -> str:
        """Its identity, equal in every condition and stage."""
        return json.dumps(self.swept, sort_keys=True)


@dataclass(frozen=True)
class Robust:
    """Configurations ranked over several conditions, as the table [robust] of a sweep asks.

    Attributes:
        by: ``"mean"`` or ``"worst"`` of the interquartile means of the conditions.
        place: what the conditions have in common, such as the environment; may be empty.
        conditions: their names, without what they have in common.
        ranked: best first; ``iqm``, ``low`` and ``high`` belong to the score over all conditions,
            ``scores`` to all runs. A configuration without a run in each condition has no rank.
        parts: by key, each configuration within the conditions.
    """

    by: str
    place: str
    conditions: tuple[str, ...]
    ranked: list[Configuration]
    parts: dict[str, list[Configuration]]

    @property
    def title(self) -> str:
        """What is ranked, such as "CartPole-v1: worst over gravity 9.8, gravity 20"."""
        return f"{self.place}{': ' * bool(self.place)}{self.by} over {', '.join(self.conditions)}"


def rank(store: Store, stage: str = TUNE) -> list[Configuration]:
    """Rank the configurations of a sweep, best first.

    Args:
        store: an open result directory.
        stage: ``"tune"``, or ``"confirm"`` for the runs on fresh seeds.

    Returns:
        All configurations, condition by condition in planned order, best first within each; those
        without a committed run come last and have no rank.

    Raises:
        FaultError: the ledger cannot be read.
    """
    identity = store.ledger.identity
    runs = with_conditions(store.ledger.runs(), identity)
    areas = functools.cache(functools.partial(training.areas, store))  # read only if there are ties
    return rank_runs(runs, stage, is_population(identity), areas)


def rank_runs(
    runs: Iterable[dict[str, Any]],
    stage: str = TUNE,
    members: bool = False,
    areas: Areas = dict,
) -> list[Configuration]:
    """Rank configurations as ``rank`` does.

    Args:
        runs: as ``with_conditions`` gives them.
        stage: the stage whose runs count.
        members: every run is its own configuration, as in a population.
        areas: returns the area under the training curve of each run that has one; asked for ties.

    Returns:
        As ``rank``.
    """
    runs = list(runs)
    again = {
        (section_of(run), swept_key(run))
        for run in runs
        if run["stage"] == CONFIRM and stage == TUNE
    }
    conditions = grouped((run for run in runs if run["stage"] == stage), section_of)
    ranked = (_rank_condition(name, own, members) for name, own in conditions.items())
    return [c for own in ranked for c in _numbered(_untied(own, areas, again))]


def with_conditions(
    legs: Iterable[dict[str, Any]], identity: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return runs or legs with their conditions apart from their hyperparameters.

    Args:
        legs: as ``Ledger.runs`` or ``Ledger.legs`` gives them.
        identity: of their sweep.

    Returns:
        Copies, in which ``section`` is the name of the condition, ``condition`` the environment and
        the swept fields that belong to it, and ``swept`` the others.
    """
    drawn = searched(identity)
    found = []
    for leg in legs:
        rest = dict(leg["swept"])
        names = [name for name in rest if contract.is_condition(name) and name not in drawn]
        condition = {contract.ENV: environment_of(leg)} | {name: rest.pop(name) for name in names}
        section = contract.section(leg["config"], drawn)
        found.append({**leg, "section": section, "condition": condition, "swept": rest})
    return found


def searched(identity: Mapping[str, Any]) -> list[str]:
    """Return the parameters of the environment that a sweep searched like hyperparameters.

    Such sweeps are refused now, but their results can still be read. Each of their configurations
    has parameters of its own, so ranking within each condition would compare nothing.
    """
    return [
        name
        for name, axis in (identity.get("sweep") or {}).items()
        if contract.is_condition(name) and (isinstance(axis, Mapping) or is_population(identity))
    ]


def is_population(identity: Mapping[str, Any]) -> bool:
    """Return whether a sweep trains populations, whose members change their hyperparameters."""
    return bool(identity.get("pbt"))


def section_of(run: dict[str, Any]) -> str:
    """Return the name of a run's condition, as ``with_conditions`` gives it; may be empty."""
    return str(run["section"])


def environment_of(run: dict[str, Any]) -> str:
    """Return the environment of a run, without its parameters; empty if it has none."""
    return contract.environment_name(run["config"])


def sections(ranked: Iterable[Configuration]) -> dict[str, list[Configuration]]:
    """Return the configurations by condition, in order."""
    return grouped(ranked, lambda c: c.environment)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by their key, both in order."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def noun(ranked: Iterable[Configuration]) -> str:
    """Return what the sections of a report are: environments, or conditions if parameters vary."""
    return "condition" if any(len(c.condition) > 1 for c in ranked) else "environment"


def swept_key(run: dict[str, Any]) -> str:
    """Return the identity of a run's hyperparameters."""
    return json.dumps(run["swept"], sort_keys=True)


def fields(ranked: Iterable[Configuration]) -> list[str]:
    """Return the names of all swept hyperparameters, in order of appearance."""
    return list(dict.fromkeys(name for c in ranked for name in c.swept))


def condition_fields(ranked: Iterable[Configuration]) -> list[str]:
    """Return ``env`` and the names of all its swept parameters, in order of appearance."""
    return list(dict.fromkeys(name for c in ranked for name in c.condition))


def robust(ranked: Iterable[Configuration], identity: Mapping[str, Any]) -> list[Robust]:
    """Rank configurations over conditions, if their sweep has a table [robust].

    Args:
        ranked: as ``rank`` gives them, of one stage.
        identity: of their sweep.

    Returns:
        A ranking for each combination of the conditions that are not ranked over; scores of several
        environments are scaled as in ``stats.unit_scaled``.
    """
    table = identity.get("robust")
    if not table:
        return []

    def rest(c: Configuration) -> str:
        values = [c.condition[name] for name in c.condition if name not in table["over"]]
        return json.dumps(values)

    groups = grouped(ranked, rest)
    return [_over(table["by"], table["over"], own) for own in groups.values()]


def _over(by: str, over: Sequence[str], ranked: Sequence[Configuration]) -> Robust:
    """Rank the configurations of one group over its conditions."""
    by_section = sections(ranked)
    parts = grouped(ranked, lambda c: c.key)
    scores = {id(c): np.array(c.scores) for c in ranked}
    if contract.ENV in over:
        for own in (list(filter(lambda c: c.scores, each)) for each in by_section.values()):
            scaled = stats.unit_scaled([c.scores for c in own]) if own else []
            scores |= {id(c): part for c, part in zip(own, scaled, strict=True)}
    merged = [
        _merged(by, own, [scores[id(c)] for c in own], len(by_section)) for own in parts.values()
    ]
    merged.sort(key=lambda c: (-c.rung, -c.iqm, -c.mean) if c.rank else (math.inf,))
    placed = [replace(c, rank=c.rank and place + 1) for place, c in enumerate(merged)]
    names = [_condition_name(each[0].condition, over) for each in by_section.values()]
    shared = {name: v for name, v in ranked[0].condition.items() if name not in over}
    return Robust(by, _condition_name(shared, list(shared)), tuple(names), placed, parts)


def _condition_name(condition: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return some of the fields of a condition, such as "CartPole-v1, gravity 20"."""
    values = {name: value for name, value in condition.items() if name in names}
    words = [str(values.pop(contract.ENV))] if values.get(contract.ENV) else []
    return ", ".join([*words, *(f"{n.partition('.')[2]} {short(v)}" for n, v in values.items())])


def _merged(
    by: str, own: Sequence[Configuration], scores: Sequence[np.ndarray], conditions: int
) -> Configuration:
    """Return one configuration over its conditions; its rank is 1, or None if one is missing."""
    known = len(own) == conditions and all(c.scores for c in own)
    value = mean = low = high = float("nan")
    if known:
        value, mean = stats.robust(scores, by), float(np.mean(np.concatenate(scores)))
        several = max(map(len, scores)) > 1 and np.isfinite(np.concatenate(scores)).all()
        low, high = stats.robust_ci(scores, by) if several else (value, value)
    return replace(
        own[0],
        rank=1 if known else None,
        scores=tuple(np.concatenate(scores).tolist()),
        iqm=value,
        low=low,
        high=high,
        mean=mean,
        diverged=sum(c.diverged for c in own),
        planned=sum(c.planned for c in own),
        run_ids=tuple(run_id for c in own for run_id in c.run_ids),
        reached=min(c.reached for c in own),
        rung=min(c.rung for c in own),
    )


# ---------------------------------------------------------------------------------------- details


def reached(run: dict[str, Any]) -> float:
    """Return the share of its updates that a run has completed; 1 if that is not recorded."""
    stop, total = run["stop"], run["total"]
    return min(1.0, stop / total) if stop and total else 1.0


def rungs(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return how far each run was trained, as a number that is equal for all runs of one rung.

    Runs of different lengths stop in the same rung after different shares of their updates, since
    updates are whole, so the number is that of the round.

    Args:
        runs: as ``Store.runs`` or ``Store.legs`` gives them.

    Returns:
        By run id; inf for a run that was trained to its end.
    """
    return {r["run_id"]: float(r["round"]) if reached(r) < 1.0 else math.inf for r in runs}


def filled_scores(runs: Sequence[dict[str, Any]], field: str = "score") -> dict[str, float]:
    """Return the score of every run of one condition, diverged ones below the worst.

    The worst is taken among runs of the same rung, as a search does when it decides.
    """
    of_run = rungs(runs)
    filled: dict[str, float] = {}
    for group in grouped(runs, lambda run: of_run[run["run_id"]]).values():
        diverged = [run["status"] == "diverged" for run in group]
        values = stats.worst_filled([run[field] for run in group], diverged)
        filled |= zip((run["run_id"] for run in group), values.tolist(), strict=True)
    return filled


def _rank_condition(name: str, runs: list[dict[str, Any]], members: bool) -> list[Configuration]:
    """Return the configurations of one condition, best first, without ranks."""
    done = [run for run in runs if run["status"] != "pending"]
    filled = {field: filled_scores(done, field) for field in ("score", "greedy_score")}
    groups = grouped(runs, operator.itemgetter("run_id") if members else swept_key)
    of_run = rungs(done)
    ranked = [_configuration(name, own, filled, of_run) for own in groups.values()]
    return sorted(ranked, key=worth)  # ties keep the planned order


def worth(c: Configuration) -> tuple[float, ...]:
    """Return what configurations are sorted by, the best first; equal for a tie."""
    return (float(c.finished == 0), *((-c.rung, -c.iqm, -c.mean) if c.scores else ()))


def _untied(
    ranked: Sequence[Configuration], areas: Areas, again: set[tuple[str, str]]
) -> list[Configuration]:
    """Return the configurations with ties broken by the areas; those run `again` come first."""

    def order(c: Configuration) -> tuple[bool, float]:
        if (c.environment, c.key) in again:
            return False, 0.0
        return True, -training.mean_area(c.run_ids, areas())

    found: list[Configuration] = []
    for _, group in itertools.groupby(ranked, key=worth):
        tied = list(group)
        found += sorted(tied, key=order) if len(tied) > 1 and tied[0].finished else tied
    return found


def _numbered(ranked: Iterable[Configuration]) -> list[Configuration]:
    return [replace(c, rank=i if c.finished else None) for i, c in enumerate(ranked, 1)]


def _configuration(
    name: str,
    runs: list[dict[str, Any]],
    filled: dict[str, dict[str, float]],
    of_run: dict[str, float],
) -> Configuration:
    """Return the statistics of one configuration from its runs."""
    done = [run for run in runs if run["status"] != "pending"]
    run_ids = tuple(run["run_id"] for run in done)
    scores = tuple(filled["score"][run_id] for run_id in run_ids)
    centre = mean = greedy = low = high = float("nan")
    if scores:
        centre, mean = float(stats.iqm(scores)), float(np.mean(scores))
        greedy = float(stats.iqm([filled["greedy_score"][run_id] for run_id in run_ids]))
        several = len(scores) > 1 and np.isfinite(scores).all()
        low, high = map(float, stats.bootstrap_ci([scores]) if several else (centre, centre))
    return Configuration(
        rank=None,
        environment=name,
        condition=runs[0]["condition"],
        swept=runs[0]["swept"],
        scores=scores,
        iqm=centre,
        low=low,
        high=high,
        mean=mean,
        greedy_iqm=greedy,
        diverged=sum(run["status"] == "diverged" for run in done),
        planned=len(runs),
        run_ids=run_ids,
        reached=max((reached(run) for run in done), default=0.0),
        rung=max((of_run[run_id] for run_id in run_ids), default=-math.inf),
    )
