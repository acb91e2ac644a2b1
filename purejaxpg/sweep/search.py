"""Searches: how the results of one round decide on the runs of the next.

`rounds` is a generator: it yields a `plan.Round` and is sent the results of that round. The rounds
depend only on the spec and those results, so a killed sweep resumes by sending the stored results
again, and a forecast sends made-up ones.

A search ranks like the report: within each condition (an environment and its parameters), by the
interquartile mean, over seeds, of the evaluation after the last update so far. A diverged run
counts as worse than all others of its condition. No search chooses among conditions.
"""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from purejaxpg import InputError, contract, extras, stats
from purejaxpg import config as configs
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import space
from purejaxpg.sweep import spec as specs

RUNNERS_UP = 2  # confirmed beside the winner and the default


class Result(NamedTuple):
    """The result of a leg."""

    score: float
    diverged: bool


class Standing(NamedTuple):
    """The configurations that are compared with each other.

    Attributes:
        conditions: those under which each of them was trained; several only for [robust].
        best: their hyperparameters, best first.
    """

    conditions: list[dict[str, Any]]
    best: list[dict[str, Any]]

    def first(self, count: int) -> set[str]:
        """Return the keys of the best `count` configurations under all conditions."""
        return {key_of({**best, **more}) for best in self.best[:count] for more in self.conditions}


Results = Mapping[str, Result]  # by run id
Rounds = Generator[plans.Round, Results, None]


def rounds(spec: specs.Spec, confirm: int = 0) -> Rounds:
    """Yield the rounds of a sweep; send each round's results back.

    With `confirm`, the last round runs winner, runners-up and default on that many fresh seeds.
    """
    if spec.search.pbt is not None:
        if confirm:
            raise InputError(
                f"--confirm must be 0 for [pbt], but is {confirm}: a population has schedules and "
                "no configuration to run again; use more seeds, which are more populations."
            )
        yield from pbt_rounds(spec, spec.search.pbt)
        return
    if spec.search.method == "optuna":
        tried = yield from optuna_rounds(spec)
    elif spec.search.halving is not None:
        tried = yield from halving_rounds(spec, spec.search.halving)
    else:
        tried = yield from grown_rounds(spec)
    if confirm:
        yield confirmation(spec, tried, confirm)


def grown_rounds(spec: specs.Spec) -> Generator[plans.Round, Results, list[Standing]]:
    """Yield the runs of a sweep, those that it had before it grew first, and return the ranking.

    A round has what is missing after the one before: new runs, and the end of those that became
    longer.
    """
    known: dict[str, Result] = {}
    finished: dict[str, plans.Run] = {}
    for each in (*spec.before, spec):
        legs = [rest(run, finished.get(growth_key(run)) if finished else None) for run in each.runs]
        missing = tuple(leg for leg in legs if leg.stop > leg.start)
        known |= yield plans.Round(missing, grown=bool(finished))
        if each is not spec:
            finished |= {growth_key(run): run for run in each.runs}
    return ranked(spec, spec.runs, known)


def growth_key(run: plans.Run) -> str:
    """Return a text that a run has in common with a longer one."""
    values = configs.to_dict(run.config)
    values.pop(contract.length(run.config)[0], None)
    return json.dumps([values, run.seed], sort_keys=True)


def rest(run: plans.Run, before: plans.Run | None) -> plans.Leg:
    """Return what is missing of a run if a run `before`, perhaps shorter, is finished."""
    if before is None:
        return whole(run)
    return plans.Leg(run, before.config.num_updates, run.config.num_updates, before.run_id)


def played(rounds: Rounds, results: Callable[[int, plans.Round], Results]) -> Iterator[plans.Round]:
    """Yield the rounds of a search, and send it `results` of the index and the round after each."""
    with contextlib.suppress(StopIteration):
        round_ = next(rounds)
        for index in itertools.count():
            yield round_
            round_ = rounds.send(results(index, round_))


def rehearse(rounds: Rounds) -> list[plans.Round]:
    """Return all rounds of a search with made-up results.

    The surviving configurations are made up too, so only counts and sizes are meaningful.
    """
    generator = np.random.default_rng(0)

    def made_up(_: int, round_: plans.Round) -> Results:
        ids = [leg.run.run_id for leg in round_.legs]
        return {name: Result(float(generator.random()), False) for name in ids}

    return list(played(rounds, made_up))


def whole(run: plans.Run) -> plans.Leg:
    """Return a run as one leg."""
    return plans.Leg(run, 0, run.config.num_updates)


def key_of(swept: Mapping[str, Any]) -> str:
    """Return a text of swept fields, which identifies them."""
    return json.dumps(dict(swept), sort_keys=True)


def ranked(spec: specs.Spec, runs: Iterable[plans.Run], results: Results) -> list[Standing]:
    """Rank configurations: within each condition, or over those that [robust] names."""
    over = spec.robust.over if spec.robust is not None else ()
    groups: dict[str, list[plans.Run]] = {}
    for run in runs:
        groups.setdefault(contract.section(run.config, over), []).append(run)
    return [_ranked(spec.robust, members, results) for members in groups.values()]


def _ranked(robust: specs.Robust | None, runs: Sequence[plans.Run], results: Results) -> Standing:
    """Rank the configurations that are compared with each other; ties keep their order."""
    found, worth = [contract.apart(run.swept) for run in runs], worths(robust, runs, results)
    best = {key_of(hyperparameters): hyperparameters for hyperparameters, _ in found}
    conditions = {key_of(condition): condition for _, condition in found}
    order = sorted(best, key=lambda key: worth[key], reverse=True)
    return Standing(list(conditions.values()), [best[key] for key in order])


def worths(
    robust: specs.Robust | None, runs: Iterable[plans.Run], results: Results
) -> dict[str, tuple[float, float]]:
    """Return score and mean of each configuration, by the key of its hyperparameters.

    Environments have scales of their own, so scores are scaled before they are compared over them.
    """
    sections: dict[str, list[plans.Run]] = {}
    for run in runs:
        sections.setdefault(contract.section(run.config), []).append(run)
    parts: dict[str, list[Any]] = {}
    for members in sections.values():
        own: dict[str, Any] = {}
        for run, score in zip(members, filled_scores(members, results).tolist(), strict=True):
            own.setdefault(key_of(contract.apart(run.swept)[0]), []).append(score)
        if robust is not None and contract.ENV in robust.over:
            own = dict(zip(own, stats.unit_scaled(list(own.values())), strict=True))
        for key, scores in own.items():
            parts.setdefault(key, []).append(scores)
    by = robust.by if robust is not None else "mean"
    return {
        key: (stats.robust(x, by), float(np.mean(np.concatenate(x)))) for key, x in parts.items()
    }


def filled_scores(runs: Iterable[plans.Run], results: Results) -> np.ndarray:
    """Return the scores of runs of one condition; a diverged run gets the worst."""
    outcomes = [results[run.run_id] for run in runs]
    return stats.worst_filled([o.score for o in outcomes], [o.diverged for o in outcomes])


# ---------------------------------------------------------------------------------------- halving


def halving_rounds(
    spec: specs.Spec, halving: specs.Halving
) -> Generator[plans.Round, Results, list[Standing]]:
    """Yield a round per rung and return the ranking of the last one."""
    runs, tried = list(spec.runs), list[Standing]()
    for rung in range(halving.rungs):
        left = halving.rungs - 1 - rung
        legs = [
            plans.Leg(
                run,
                updates_at(run, halving, left + 1) if rung else 0,
                updates_at(run, halving, left),
                run.run_id if rung else None,
            )
            for run in runs
        ]
        refuse_empty(legs)
        results = yield plans.Round(tuple(legs))
        tried = ranked(spec, runs, results)
        best = [standing.first(math.ceil(len(standing.best) / halving.eta)) for standing in tried]
        survivors = set().union(*best)
        runs = [run for run in runs if key_of(run.swept) in survivors]
    return tried


def refuse_empty(legs: Iterable[plans.Leg]) -> None:
    """Raise an InputError if a leg has no updates."""
    for leg in legs:
        if leg.stop <= leg.start:
            field, given = contract.length(leg.run.config)
            updates = leg.run.config.num_updates
            raise InputError(
                f"{field} must be enough for an update in every rung or generation, but is {given}"
                f"{'.' if field == 'num_updates' else f', which gives {updates} updates.'}"
            )


def updates_at(run: plans.Run, halving: specs.Halving, left: int) -> int:
    """Return the updates of a run that are done when `left` rungs remain."""
    return max(1, round(run.config.num_updates / halving.eta**left))


# ----------------------------------------------------------------------------------------- optuna


def optuna_rounds(spec: specs.Spec) -> Generator[plans.Round, Results, list[Standing]]:
    """Yield a round per batch of optuna's suggestions and return the ranking of all of them.

    Each batch gets a new study, made from the results so far, so optuna keeps no state.
    """
    search = spec.search
    tried: dict[str, list[plans.Run]] = {}
    known: dict[str, Result] = {}
    while len(tried) < search.samples:
        count = min(search.batch, search.samples - len(tried))
        suggested = suggestions(spec, tried, known, count)
        every = [swept for values in suggested for swept in spec.under_each(values)]
        fresh = [spec.make_run(swept, seed) for swept in every for seed in spec.seeds]
        legs = tuple(whole(run) for run in fresh)
        results = yield plans.Round(legs, notes=() if tried else (drawn_at_random(search),))
        known |= results
        for run in fresh:
            tried.setdefault(key_of(contract.apart(run.swept)[0]), []).append(run)
    return ranked(spec, [run for runs in tried.values() for run in runs], known)


def drawn_at_random(search: specs.Search) -> str:
    """Return a sentence about the configurations for which optuna has no results to learn from."""
    if search.samples > search.batch:
        return (
            f"Note: optuna draws the first {search.batch} of {search.samples} configurations at "
            "random, and learns from batches of that size."
        )
    return (
        f"Note: optuna draws all {search.samples} configurations at random, because it learns from "
        f"whole batches, and [search] batch is {search.batch}."
    )


def suggestions(
    spec: specs.Spec, tried: Mapping[str, Sequence[plans.Run]], results: Results, count: int
) -> list[dict[str, Any]]:
    """Ask optuna for up to `count` new configurations, as hyperparameters by field name.

    It is told the `results` of the runs that were `tried`, by the key of their hyperparameters.

    Raises:
        InputError: all configurations were tried.
    """
    optuna = extras.load("optuna", "optuna", "[search] method 'optuna'")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    axes = contract.apart(spec.axes)[0]
    spaces = {name: distribution(optuna, axis) for name, axis in axes.items()}
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(
            seed=spec.search.seed + len(tried), n_startup_trials=spec.search.batch
        ),
    )
    worth = worths(spec.robust, (run for runs in tried.values() for run in runs), results)
    for runs in tried.values():
        swept = contract.apart(runs[0].swept)[0]
        value = max(worth[key_of(swept)][0], -1e30)  # not -inf, if all runs diverged
        params = {name: choice(axes[name], value) for name, value in swept.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=value))
    suggested: dict[str, dict[str, Any]] = {}
    for _ in range(20 * count):  # a small space may hold fewer configurations
        if len(suggested) == count:
            break
        params = study.ask(spaces).params
        swept = {name: chosen(axis, params[name]) for name, axis in axes.items()}
        if key_of(swept) not in tried:
            suggested[key_of(swept)] = swept
    if not suggested:
        raise InputError(
            f"[search] samples must be at most {len(tried)}, the number of configurations, "
            f"but is {spec.search.samples}."
        )
    return list(suggested.values())


def distribution(optuna: Any, axis: space.Axis) -> Any:
    """Return an axis as a distribution of optuna; a list as the indices of its values."""
    if axis.kind == "list":
        return optuna.distributions.CategoricalDistribution(list(range(len(axis.values))))
    kinds = optuna.distributions
    if axis.integer:
        return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.log)


def choice(axis: space.Axis, value: Any) -> Any:
    """Return optuna's representation of a value of an axis."""
    return axis.values.index(value) if axis.kind == "list" else value


def chosen(axis: space.Axis, value: Any) -> Any:
    """Return the value of an axis for a suggestion of optuna."""
    return axis.values[value] if axis.kind == "list" else axis.inside(value)


# ------------------------------------------------------------------------------------- population


def pbt_rounds(spec: specs.Spec, pbt: specs.Pbt) -> Rounds:
    """Yield a round per generation; each seed of the sweep has its own population."""
    members = [
        spec.make_run(dict(run.swept), seed)
        for seeds in specs.member_seeds(spec.seeds, pbt.population)
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


def boundary(run: plans.Run, pbt: specs.Pbt, generation: int) -> int:
    """Return the updates of a member that are done when `generation` begins."""
    return round(run.config.num_updates * generation / pbt.generations)


def next_generation(
    spec: specs.Spec,
    pbt: specs.Pbt,
    members: Sequence[plans.Run],
    results: Results,
    generator: np.random.Generator,
) -> tuple[list[plans.Run], list[str | None]]:
    """Replace the worst members of one population by perturbed copies of the best.

    It returns the members of the next generation, and the run whose state each starts from.
    """
    order = np.argsort(-filled_scores(members, results), kind="stable")
    count = int(len(members) * pbt.replace)
    outcomes = [results[members[place].run_id] for place in order[:count]]
    healthy = [not o.diverged and math.isfinite(o.score) for o in outcomes]
    best = [members[place] for place, good in zip(order, healthy, strict=False) if good]
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
    """Return a hyperparameter of a copy: a fresh draw, or the original's perturbed."""
    fresh, quantile, up = generator.random(), generator.random(), int(generator.integers(2))
    if fresh < pbt.resample:
        return axis.at(quantile)
    return axis.perturbed(value, pbt.factors[up], 2 * up - 1)


# ----------------------------------------------------------------------------------- confirmation


def confirmation(spec: specs.Spec, tried: Sequence[Standing], num_seeds: int) -> plans.Round:
    """Return the round that runs winner, runners-up and default on unused seeds."""
    fresh, legs, notes = fresh_seeds(spec, num_seeds), [], list[str]()
    each = ((standing, where) for standing in tried for where in standing.conditions)
    for standing, condition in each:
        candidates = [{**best, **condition} for best in standing.best[: 1 + RUNNERS_UP]]
        default = spec.default_values(condition)
        try:
            spec.make_run(default, fresh[0])
            candidates.append(default)
        except InputError as error:  # the user did not ask for the default
            notes.append(f"Note: the default is not confirmed because it is invalid here: {error}")
        distinct = {key_of(candidate): candidate for candidate in candidates}
        legs += [whole(spec.make_run(c, seed)) for c in distinct.values() for seed in fresh]
    return plans.Round(tuple(legs), stage="confirm", notes=tuple(notes))


def fresh_seeds(spec: specs.Spec, count: int) -> list[int]:
    """Return `count` seeds that the sweep has not used, and for which it has given arrays.

    Raises:
        InputError: there are fewer.
    """
    first, used = max(spec.seeds) + 1, set(spec.seeds)
    if spec.given.by_seed:
        fresh = [seed for seed in spec.given.items if seed not in used]
    else:
        higher = range(first, min(first + count, 2**32))
        fresh = [*higher, *(s for s in range(count + len(used)) if s not in used)]
    if len(fresh) < count:
        raise InputError(
            f"--confirm must be at most {len(fresh)}, the number of fresh seeds that have given "
            f"arrays of their own, but is {count}; train what is given on more seeds, or share "
            "it among the seeds (NAME:best)."
        )
    return fresh[:count]
