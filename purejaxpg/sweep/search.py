"""How a search goes from one round of runs to the next.

`rounds` is a generator: it yields a `plan.Round` and is sent the results of that round. What it
yields depends on the spec and on those results alone, so a sweep that was killed finds its way back
by being told the stored results again, and a plan is the same generator fed with made-up ones.

A search ranks by what the report ranks by: the interquartile mean, over seeds, of the evaluation
after the last update so far; a diverged run counts as worse than every other of its environment.
"""

import dataclasses
import json
import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from purejaxpg import InputError, contract, extras, stats
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import space
from purejaxpg.sweep import spec as specs

RUNNERS_UP = 2  # confirmed beside the winner and the default


class Result(NamedTuple):
    """How a leg ended."""

    score: float
    diverged: bool


Results = Mapping[str, Result]  # by run id
Rounds = Generator[plans.Round, Results, None]


def rounds(spec: specs.Spec, confirm: int = 0) -> Rounds:
    """Yield the rounds of a sweep; each is to be answered with its results.

    Args:
        spec: the sweep.
        confirm: fresh seeds on which the winner, the runners-up and the default are run again;
            0: none.
    """
    if spec.search.pbt is not None:
        if confirm:
            raise InputError(
                f"--confirm must be 0 for [pbt], but is {confirm}: a population has schedules and "
                "no configuration to run again; more seeds are more populations."
            )
        yield from pbt_rounds(spec, spec.search.pbt)
        return
    if spec.search.method == "optuna":
        tried = yield from optuna_rounds(spec)
    elif spec.search.halving is not None:
        tried = yield from halving_rounds(spec, spec.search.halving)
    else:
        results = yield plans.Round(tuple(whole(run) for run in spec.runs))
        tried = ranked(spec.runs, results)
    if confirm:
        yield confirmation(spec, tried, confirm)


def rehearse(rounds: Rounds) -> list[plans.Round]:
    """Return all rounds of a search without computing any: results are made up.

    Which configurations go on is made up too, so only numbers and sizes mean something.
    """
    found, generator = [], np.random.default_rng(0)
    try:
        found.append(next(rounds))
        while True:
            ids = [leg.run.run_id for leg in found[-1].legs]
            made_up = {name: Result(float(generator.random()), False) for name in ids}
            found.append(rounds.send(made_up))
    except StopIteration:
        return found


def whole(run: plans.Run) -> plans.Leg:
    """Return a run as one leg."""
    return plans.Leg(run, 0, run.config.num_updates)


def config_key(run: plans.Run) -> str:
    """Return what tells configurations apart: all swept fields."""
    return json.dumps(dict(run.swept), sort_keys=True)


def ranked(runs: Iterable[plans.Run], results: Results) -> list[list[plans.Run]]:
    """Rank configurations -> one run of each, best first, in one list per environment."""
    sections: dict[str, list[plans.Run]] = {}
    for run in runs:
        sections.setdefault(contract.section(run.config), []).append(run)
    return [_ranked(members, results) for members in sections.values()]


def _ranked(runs: Sequence[plans.Run], results: Results) -> list[plans.Run]:
    """Rank the configurations of one environment; ties keep their order."""
    outcomes = [results[run.run_id] for run in runs]
    filled = stats.worst_filled([o.score for o in outcomes], [o.diverged for o in outcomes])
    scores: dict[str, list[float]] = {}
    first: dict[str, plans.Run] = {}
    for run, score in zip(runs, filled.tolist(), strict=True):
        scores.setdefault(config_key(run), []).append(score)
        first.setdefault(config_key(run), run)
    worth = {key: (stats.iqm(values), np.mean(values)) for key, values in scores.items()}
    return [first[key] for key in sorted(first, key=lambda key: worth[key], reverse=True)]


# ---------------------------------------------------------------------------------------- halving


def halving_rounds(
    spec: specs.Spec, halving: specs.Halving
) -> Generator[plans.Round, Results, list[list[plans.Run]]]:
    """Yield a round per rung -> the ranking of the last one."""
    runs, started = list(spec.runs), False
    tried: list[list[plans.Run]] = []
    for rung in range(halving.rungs):
        left = halving.rungs - 1 - rung
        legs = [
            plans.Leg(
                run,
                updates_at(run, halving, left + 1) if started else 0,
                updates_at(run, halving, left),
                run.run_id if started else None,
            )
            for run in runs
        ]
        refuse_empty(legs)
        results = yield plans.Round(tuple(legs))
        tried, started = ranked(runs, results), True
        keep = {
            config_key(run)
            for section in tried
            for run in section[: math.ceil(len(section) / halving.eta)]
        }
        runs = [run for run in runs if config_key(run) in keep]
    return tried


def refuse_empty(legs: Iterable[plans.Leg]) -> None:
    """Raise an InputError where a leg has nothing to do."""
    for leg in legs:
        if leg.stop <= leg.start:
            raise InputError(
                f"total_timesteps must be enough for updates in every rung or generation, but "
                f"{leg.run.config.total_timesteps} makes {leg.run.config.num_updates} updates."
            )


def updates_at(run: plans.Run, halving: specs.Halving, left: int) -> int:
    """Return the updates that a run has behind it when `left` rungs remain."""
    return max(1, round(run.config.num_updates / halving.eta**left))


# ----------------------------------------------------------------------------------------- optuna


def optuna_rounds(
    spec: specs.Spec,
) -> Generator[plans.Round, Results, list[list[plans.Run]]]:
    """Yield a round per batch of optuna's suggestions -> the ranking of all of them.

    The study is made anew for every batch out of the results so far: optuna keeps no state.
    """
    search = spec.search
    tried: dict[str, list[plans.Run]] = {}
    known: dict[str, Result] = {}
    while len(tried) < search.samples:
        count = min(search.batch, search.samples - len(tried))
        fresh: list[plans.Run] = []
        for swept in suggestions(spec, tried, known, count):
            fresh += [spec.make_run(swept, seed) for seed in spec.seeds]
        results = yield plans.Round(tuple(whole(run) for run in fresh))
        known |= results
        for run in fresh:
            tried.setdefault(config_key(run), []).append(run)
    return ranked([run for runs in tried.values() for run in runs], known)


def suggestions(
    spec: specs.Spec,
    tried: Mapping[str, Sequence[plans.Run]],
    results: Results,
    count: int,
) -> list[dict[str, Any]]:
    """Ask optuna for `count` configurations that were not tried yet."""
    optuna = extras.load("optuna", "optuna", "[search] method 'optuna'")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spaces = {name: distribution(optuna, axis) for name, axis in spec.axes.items()}
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(
            seed=spec.search.seed + len(tried), n_startup_trials=spec.search.batch
        ),
    )
    outcomes = [results[run.run_id] for runs in tried.values() for run in runs]
    filled = stats.worst_filled([o.score for o in outcomes], [o.diverged for o in outcomes])
    scores = iter(np.where(np.isfinite(filled), filled, -1e30).tolist())
    for runs in tried.values():
        value = float(stats.iqm([next(scores) for _ in runs]))
        params = {name: choice(spec.axes[name], value) for name, value in runs[0].swept.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value))
    found: dict[str, dict[str, Any]] = {}
    for _ in range(20 * count):  # a small space may hold fewer configurations than asked for
        if len(found) == count:
            break
        params = study.ask(spaces).params
        swept = {name: chosen(axis, params[name]) for name, axis in spec.axes.items()}
        key = json.dumps(swept, sort_keys=True)
        if key not in tried:
            found[key] = swept
    if not found:
        raise InputError(
            f"[search] samples must be at most the {len(tried)} configurations that there are, "
            f"but is {spec.search.samples}."
        )
    return list(found.values())


def distribution(optuna: Any, axis: space.Axis) -> Any:
    """Return an axis as optuna describes it; a list by its places, whatever it holds."""
    if axis.kind == "list":
        return optuna.distributions.CategoricalDistribution(list(range(len(axis.values))))
    kinds = optuna.distributions
    if axis.integer:
        return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)


def choice(axis: space.Axis, value: Any) -> Any:
    """Return a value of an axis as optuna knows it."""
    return axis.values.index(value) if axis.kind == "list" else value


def chosen(axis: space.Axis, value: Any) -> Any:
    """Return what optuna suggests as a value of the axis."""
    return axis.values[value] if axis.kind == "list" else axis.inside(value)


# ------------------------------------------------------------------------------------- population


def pbt_rounds(spec: specs.Spec, pbt: specs.Pbt) -> Rounds:
    """Yield a round per generation; every seed of the sweep has a population of its own."""
    members = [
        spec.make_run(dict(run.swept), seed)
        for seeds in member_seeds(spec.seeds, pbt.population)
        for seed, run in zip(seeds, spec.runs[: pbt.population], strict=True)
    ]
    parents: list[str | None] = [None] * len(members)
    for generation in range(pbt.generations):
        legs = tuple(
            plans.Leg(
                run, boundary(run, pbt, generation), boundary(run, pbt, generation + 1), parent
            )
            for run, parent in zip(members, parents, strict=True)
        )
        refuse_empty(legs)
        results = yield plans.Round(legs)
        parents = [run.run_id for run in members]
        if generation + 1 == pbt.generations:
            return
        for i, seed in enumerate(spec.seeds):
            generator = np.random.default_rng([spec.search.seed, seed, generation])
            cut = slice(i * pbt.population, (i + 1) * pbt.population)
            members[cut], parents[cut] = next_generation(
                spec, pbt, members[cut], results, generator
            )


def member_seeds(seeds: Sequence[int], population: int) -> list[list[int]]:
    """Return a seed for each member of each population, all of them distinct and below 2^32.

    Member i of the population with seed s has s * population + i. Where that passes 2^32 it begins
    again at 0, and takes the next seed that is free.
    """
    found: list[list[int]] = []
    used: set[int] = set()
    for seed in seeds:
        found.append([])
        for number in range(population):
            wanted = (seed * population + number) % 2**32
            while wanted in used:
                wanted = (wanted + 1) % 2**32
            used.add(wanted)
            found[-1].append(wanted)
    return found


def boundary(run: plans.Run, pbt: specs.Pbt, generation: int) -> int:
    """Return the updates behind a member when `generation` begins."""
    return round(run.config.num_updates * generation / pbt.generations)


def next_generation(
    spec: specs.Spec,
    pbt: specs.Pbt,
    members: Sequence[plans.Run],
    results: Results,
    generator: np.random.Generator,
) -> tuple[list[plans.Run], list[str | None]]:
    """Replace the worst by perturbed copies of the best -> members, and whose state each has."""
    outcomes = [results[run.run_id] for run in members]
    filled = stats.worst_filled([o.score for o in outcomes], [o.diverged for o in outcomes])
    order = np.argsort(-filled, kind="stable")
    count = int(len(members) * pbt.replace)
    failed = [o.diverged or not math.isfinite(o.score) for o in outcomes]
    best = [members[place] for place in order[:count] if not failed[place]]
    new, parents = list(members), [run.run_id for run in members]
    for place in order[len(members) - count :] if best else ():
        source = best[generator.integers(len(best))]
        swept = {
            name: perturbed(axis, source.swept[name], pbt, generator)
            for name, axis in spec.axes.items()
        }
        changed = spec.make_run(swept, members[place].seed)
        new[place] = dataclasses.replace(changed, run_id=members[place].run_id)
        parents[place] = source.run_id
    return new, list(parents)


def perturbed(axis: space.Axis, value: Any, pbt: specs.Pbt, generator: np.random.Generator) -> Any:
    """Return a hyperparameter of a copy: drawn afresh, or a little beside the original's."""
    fresh, quantile, up = generator.random(), generator.random(), int(generator.integers(2))
    if fresh < pbt.resample:
        return axis.at(quantile)
    return axis.perturbed(value, pbt.factors[up], 2 * up - 1)


# ----------------------------------------------------------------------------------- confirmation


def confirmation(
    spec: specs.Spec, tried: Sequence[Sequence[plans.Run]], num_seeds: int
) -> plans.Round:
    """Return the round that runs winner, runners-up and default on seeds not used before."""
    first = max(spec.seeds) + 1
    used = set(spec.seeds)
    last = range(first, min(first + num_seeds, 2**32))
    fresh = [*last, *(s for s in range(num_seeds + len(used)) if s not in used)][:num_seeds]
    legs = []
    notes = []
    for section in tried:
        candidates = [run.swept for run in section[: 1 + RUNNERS_UP]]
        default = spec.default_values(contract.section(section[0].config))
        try:
            spec.make_run(default, fresh[0])
            candidates.append(default)
        except InputError as error:  # nobody asked for it
            notes.append(f"Note: the default is not confirmed, since it is invalid here: {error}")
        distinct = {json.dumps(dict(c), sort_keys=True): c for c in candidates}
        legs += [whole(spec.make_run(c, seed)) for c in distinct.values() for seed in fresh]
    return plans.Round(tuple(legs), stage="confirm", notes=tuple(notes))
