"""The rounds of a search, with made-up results and no training."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_sweep import TINY

from purejaxpg import FaultError, InputError
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs

pytestmark = pytest.mark.fast

RATES = {"learning_rate": {"log_uniform": [1e-4, 1e-1]}, "gamma": [0.9, 0.95, 0.99]}
Score = Callable[[plans.Run], float]


def make(**changed: Any) -> specs.Spec:
    config = {**TINY["config"], "total_timesteps": 1600}  # 100 updates
    return specs.from_dict({**TINY, "config": config, "sweep": RATES, **changed}, "study")


def play(spec: specs.Spec, score: Score, confirm: int = 0, bad: Score | None = None):
    """Answer every round of a search with the scores of its runs -> the rounds."""
    rounds, found = searches.rounds(spec, confirm), []
    try:
        found.append(next(rounds))
        while True:
            found.append(rounds.send(results(found[-1], score, bad)))
    except StopIteration:
        return found


def results(round_: plans.Round, score: Score, bad: Score | None = None) -> searches.Results:
    return {
        leg.run.run_id: searches.Result(score(leg.run), bool(bad and bad(leg.run)))
        for leg in round_.legs
    }


def rate(run: plans.Run) -> float:
    return run.config.learning_rate


def described(rounds: list[plans.Round]) -> list[Any]:
    return [
        (leg.run.run_id, leg.run.swept, leg.run.seed, leg.start, leg.stop, leg.parent, round_.stage)
        for round_ in rounds
        for leg in round_.legs
    ]


# ---------------------------------------------------------------------------------------- halving

HALVING = {
    "search": {"method": "sobol", "samples": 18},
    "halving": {"rungs": 3, "eta": 3},
}


def test_halving_trains_the_best_third_three_times_as_long() -> None:
    rounds = play(make(**HALVING), rate)
    assert [len(round_.legs) for round_ in rounds] == [36, 12, 4]  # 18, 6 and 2 x 2 seeds
    spans = [{(leg.start, leg.stop) for leg in round_.legs} for round_ in rounds]
    assert spans == [{(0, 11)}, {(11, 33)}, {(33, 100)}]
    best = sorted({rate(leg.run) for leg in rounds[0].legs})
    for round_, keep in ((rounds[1], 6), (rounds[2], 2)):
        assert sorted({rate(leg.run) for leg in round_.legs}) == best[-keep:]
        assert all(leg.parent == leg.run.run_id for leg in round_.legs)


def test_a_diverged_run_counts_as_the_worst() -> None:
    rounds = play(make(**HALVING), rate, bad=lambda run: run.seed == 0)
    again = play(make(**HALVING), rate, bad=lambda run: rate(run) > 1e-2)
    assert {leg.run.seed for leg in rounds[1].legs} == {
        0,
        1,
    }  # all seeds of one continue
    assert all(rate(leg.run) <= 1e-2 for leg in again[1].legs)


def broken(run: plans.Run) -> bool:
    return run.swept["learning_rate"] in (1e-4, 1e-3)


def test_no_diverged_run_is_promoted_when_scores_tie() -> None:
    """As early in a task with sparse rewards, where everything scores the same."""
    axes = {"learning_rate": [1e-4, 1e-3, 1e-2, 1e-1]}
    spec = make(sweep=axes, search={}, halving={"rungs": 2, "eta": 4})
    first, second = play(spec, lambda run: -200.0, bad=broken)
    assert {rate(leg.run) for leg in first.legs} == set(axes["learning_rate"])
    assert {rate(leg.run) for leg in second.legs} == {1e-2}
    spec = make(sweep=axes, search={})
    _, confirmed = play(spec, lambda run: -200.0, confirm=2, bad=broken)
    in_order = list(dict.fromkeys(rate(leg.run) for leg in confirmed.legs))
    assert in_order[:3] == [1e-2, 1e-1, 1e-4]


def test_optuna_learns_that_a_diverged_run_is_the_worst() -> None:
    optuna = pytest.importorskip("optuna")
    axes = {"learning_rate": [1e-4, 1e-2, 1e-1]}
    spec = make(sweep=axes, search={"method": "optuna", "samples": 3})
    tried = {str(x): [spec.make_run({"learning_rate": x}, 0)] for x in (1e-4, 1e-2)}
    outcomes = {
        run.run_id: searches.Result(-200.0, broken(run)) for runs in tried.values() for run in runs
    }
    told: list[float] = []
    original = optuna.study.Study.add_trial
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            optuna.study.Study,
            "add_trial",
            lambda self, trial: (told.append(trial.value), original(self, trial))[1],
        )
        searches.suggestions(spec, tried, outcomes, 1)
    assert told[0] < told[1] == -200.0


CONDITIONS = {
    "env": ["Acrobot-v1", "CartPole-v1"],
    "env_params.gravity": [9.8, 20],
    "env_kwargs.size": [5, 10],
}


def conditional(name: str, **changed: Any) -> specs.Spec:
    """A sweep over learning rates under two conditions."""
    env = {} if name == "env" else {"env": "DeepSea-bsuite" if "size" in name else "CartPole-v1"}
    config = {**TINY["config"], "total_timesteps": 1600, "env_params": {}, **env}
    axes = {"learning_rate": [1e-4, 1e-3, 1e-2], name: CONDITIONS[name]}
    return make(**{"sweep": axes, "search": {}, "config": config, **changed})


def easier(name: str) -> Score:
    """Scores of the second condition are far above those of the first."""
    return lambda run: rate(run) + 500.0 * (run.swept[name] == CONDITIONS[name][1])


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_condition_keeps_its_own_best(name: str) -> None:
    spec = conditional(name, halving={"rungs": 2, "eta": 3})
    _, last = play(spec, easier(name))
    kept = {(leg.run.swept[name], rate(leg.run)) for leg in last.legs}
    assert kept == {(value, 1e-2) for value in CONDITIONS[name]}


@pytest.mark.parametrize("name", CONDITIONS)
def test_winner_and_default_are_confirmed_in_every_condition(name: str) -> None:
    """The default of a condition is the condition, so that a winner is compared with its like."""
    *_, confirmed = play(conditional(name), easier(name), confirm=2)
    default = specs.trainers.load(TINY["agent"]).Config().learning_rate
    expected = [(value, x) for value in CONDITIONS[name] for x in (1e-2, 1e-3, 1e-4, default)]
    found = [(leg.run.swept[name], rate(leg.run)) for leg in confirmed.legs]
    assert found == [each for each in expected for _ in range(2)]


def fragile(name: str) -> Score:
    """The largest rate is best in the second condition and worst in the first."""
    levels = {1e-4: (10.0, 20.0), 1e-3: (30.0, 40.0), 1e-2: (0.0, 100.0)}
    other = (0.0, 0.0)
    return lambda run: levels.get(rate(run), other)[run.swept[name] == CONDITIONS[name][1]]


@pytest.mark.parametrize(("by", "best"), [("worst", 1e-3), ("mean", 1e-2)])
def test_robust_halving_keeps_the_best_over_conditions(by: str, best: float) -> None:
    name = "env_params.gravity"
    spec = conditional(name, halving={"rungs": 2, "eta": 3}, robust={"over": [name], "by": by})
    first, last = play(spec, fragile(name))
    assert (len(first.legs), len(last.legs)) == (3 * 2 * 2, 2 * 2)
    kept = {(leg.run.swept[name], rate(leg.run)) for leg in last.legs}
    assert kept == {(value, best) for value in CONDITIONS[name]}


def test_a_diverged_run_is_the_worst_of_its_condition_when_ranked_over_several() -> None:
    name = "env_params.gravity"
    spec = conditional(name, halving={"rungs": 2, "eta": 3}, robust={"by": "worst"})
    broken = [rate(run) == 1e-3 and run.swept[name] == 20 for run in spec.runs]
    ids = {run.run_id for run, bad in zip(spec.runs, broken, strict=True) if bad}
    _, last = play(spec, fragile(name), bad=lambda run: run.run_id in ids)
    # Its worst condition is now the second, filled with 20: still the best worst score, by 1e-9.
    assert {rate(leg.run) for leg in last.legs} == {1e-3}
    worth = searches.worths(spec.robust, spec.runs, results(
        plans.Round(tuple(map(searches.whole, spec.runs))), fragile(name),
        lambda run: run.run_id in ids))  # fmt: skip
    assert sorted(round(score, 6) for score, _ in worth.values()) == [0.0, 10.0, 20.0]


def test_the_robust_winner_is_confirmed_in_every_condition() -> None:
    name = "env_params.gravity"
    *_, confirmed = play(conditional(name, robust={"by": "worst"}), fragile(name), confirm=1)
    default = specs.trainers.load(TINY["agent"]).Config().learning_rate
    expected = [(value, x) for value in CONDITIONS[name] for x in (1e-3, 1e-4, 1e-2, default)]
    assert [(leg.run.swept[name], rate(leg.run)) for leg in confirmed.legs] == expected


def test_environments_are_ranked_over_on_a_common_scale() -> None:
    """Else the environment with the largest returns would decide alone."""
    levels = {1e-4: (0.0, 300.0), 1e-3: (0.8, 295.0), 1e-2: (1.0, 200.0)}
    spec = conditional("env", robust={"over": ["env"]})

    def score(run: plans.Run) -> float:
        return levels[rate(run)][run.config.env == "CartPole-v1"]

    found = results(plans.Round(tuple(map(searches.whole, spec.runs))), score)
    ((_, best),) = searches.ranked(spec, spec.runs, found)
    assert [each["learning_rate"] for each in best] == [1e-3, 1e-4, 1e-2]
    raw = sorted(levels, key=lambda x: -sum(levels[x]))
    assert raw == [1e-4, 1e-3, 1e-2]


def test_optuna_is_told_one_score_over_the_conditions() -> None:
    pytest.importorskip("optuna")
    gravity = {"env_params.gravity": [9.8, 20]}
    search = {"method": "optuna", "samples": 8, "batch": 4}
    spec = make(sweep={**RATES, **gravity}, search=search, robust={"by": "worst"}, seeds=1)
    first, second = play(spec, rate)
    assert (len(first.legs), len(second.legs)) == (8, 8)
    for round_ in (first, second):
        own = {}
        for leg in round_.legs:
            own.setdefault(rate(leg.run), []).append(leg.run.swept["env_params.gravity"])
        assert list(own.values()) == [[9.8, 20]] * 4


@pytest.mark.parametrize("method", ["random", "sobol", "lhs"])
def test_a_sampler_draws_the_same_configurations_for_every_condition(method: str) -> None:
    search = {"method": method, "samples": 4}
    alone, both = (make(sweep={**RATES, **more}, search=search)
                   for more in ({}, {"env_params.gravity": [9.8, 20]}))  # fmt: skip
    drawn = [run.swept for run in alone.runs]
    assert (both.num_configs, len(both.runs)) == (4, 2 * len(drawn))
    for gravity in (9.8, 20):
        own = [run.swept for run in both.runs if run.swept["env_params.gravity"] == gravity]
        assert own == [{**values, "env_params.gravity": gravity} for values in drawn]


def test_results_of_a_search_that_chose_among_conditions_are_not_resumed() -> None:
    gravity = {"env_params.gravity": [9.8, 20]}
    halved = make(sweep={**gravity, "gamma": [0.9, 0.99]}, search={}, halving={"rungs": 2})
    assert halved.identity["within"] == ["env_params.gravity"]
    environments = conditional("env", halving={"rungs": 2})  # never chosen among
    assert all("within" not in each.identity for each in (environments, make(sweep=gravity)))


def test_a_rung_without_an_update_is_refused() -> None:
    config = {**TINY["config"], "total_timesteps": 32}
    spec = make(config=config, **HALVING)
    with pytest.raises(InputError, match=r"total_timesteps .* is 32, which gives 2 updates\."):
        play(spec, rate)
    few = {"agent": "rlhf.sft", "config": {"num_updates": 2}, "rows_per_device": 1, **HALVING}
    spec = specs.from_dict({**few, "sweep": {"learning_rate": [1e-3, 1e-2]}}, "few")
    with pytest.raises(InputError, match=r"num_updates must be enough .*, but is 2\.$"):
        play(spec, rate)


# ----------------------------------------------------------------------------------------- optuna


def test_optuna_goes_where_the_scores_are_better() -> None:
    pytest.importorskip("optuna")
    spec = make(search={"method": "optuna", "samples": 40, "batch": 8}, seeds=1)
    rounds = play(spec, lambda run: -abs(rate(run) - 1e-2) - (run.config.gamma != 0.99))
    assert [len(round_.legs) for round_ in rounds] == [8] * 5
    assert len({leg.run.run_id for round_ in rounds for leg in round_.legs}) == 40

    def miss(round_: plans.Round) -> float:
        return sorted(abs(rate(leg.run) - 1e-2) for leg in round_.legs)[4]

    assert miss(rounds[-1]) < miss(rounds[0])
    assert sum(leg.run.config.gamma == 0.99 for leg in rounds[-1].legs) > 4


def test_the_batch_of_optuna_is_at_most_a_quarter_of_the_samples() -> None:
    pytest.importorskip("optuna")
    for samples, sizes in ((12, [3] * 4), (3, [1] * 3), (100, [16] * 6 + [4])):
        spec = make(search={"method": "optuna", "samples": samples}, seeds=1)
        first, *others = play(spec, rate)
        assert [len(round_.legs) for round_ in (first, *others)] == sizes
        (note,) = first.notes
        assert note.startswith(f"Note: optuna draws the first {sizes[0]} of {samples} config")
        assert not any(round_.notes for round_ in others)
        # Results of other batches belong to another sweep; those of the default do not.
        assert spec.identity["search"].get("batch", 16) == sizes[0]
    spec = make(search={"method": "optuna", "samples": 8, "batch": 8}, seeds=1)
    (only,) = play(spec, rate)
    assert only.notes == (
        "Note: optuna draws all 8 configurations at random, because it learns from whole batches, "
        "and [search] batch is 8.",
    )


def test_optuna_asks_the_same_after_the_same_results() -> None:
    pytest.importorskip("optuna")
    spec = make(search={"method": "optuna", "samples": 12, "batch": 4}, seeds=2)
    assert described(play(spec, rate)) == described(play(spec, rate))
    other = make(search={"method": "optuna", "samples": 12, "batch": 4, "seed": 9}, seeds=2)
    assert described(play(spec, rate)) != described(play(other, rate))


def test_a_space_smaller_than_the_samples_is_refused() -> None:
    pytest.importorskip("optuna")
    spec = make(sweep={"gamma": [0.9, 0.99]}, search={"method": "optuna", "samples": 3})
    with pytest.raises(InputError, match="samples must be at most 2"):
        play(spec, rate)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    spec = make(search={"method": "optuna", "samples": 3})
    with pytest.raises(FaultError, match=r"pip install 'optuna<6"):
        play(spec, rate)


# ------------------------------------------------------------------------------------- population

PBT = {"pbt": {"population": 8, "generations": 4, "replace": 0.25}}


def test_the_worst_quarter_continues_from_the_best_quarter() -> None:
    spec = make(**PBT, seeds=[5])
    rounds = play(spec, rate)
    assert [{(leg.start, leg.stop) for leg in round_.legs} for round_ in rounds] == [
        {(0, 25)}, {(25, 50)}, {(50, 75)}, {(75, 100)}
    ]  # fmt: skip
    ids = [leg.run.run_id for leg in rounds[0].legs]
    for before, after in itertools.pairwise(rounds):
        assert [leg.run.run_id for leg in after.legs] == ids
        assert [leg.run.seed for leg in after.legs] == [5 * 8 + i for i in range(8)]
        order = sorted(before.legs, key=lambda leg: rate(leg.run))
        worst, best = order[:2], order[-2:]
        for old, new in zip(before.legs, after.legs, strict=True):
            if old in worst:
                assert new.parent in {leg.run.run_id for leg in best}
            else:
                assert new.parent == new.run.run_id
                assert new.run.swept == old.run.swept


def test_copies_are_perturbed_by_a_factor_or_drawn_afresh() -> None:
    never = {**PBT["pbt"], "resample": 0.0}
    first, second, *_ = play(make(pbt=never, seeds=[5]), rate)
    source = {leg.run.run_id: rate(leg.run) for leg in first.legs}
    changed = [leg for leg in second.legs if leg.parent != leg.run.run_id]
    assert changed
    for leg in changed:
        factor = rate(leg.run) / source[leg.parent]
        at_bound = rate(leg.run) == pytest.approx(1e-1)
        assert at_bound or factor == pytest.approx(0.8, 1e-4) or factor == pytest.approx(1.25, 1e-4)


def test_every_seed_has_a_population_of_its_own() -> None:
    rounds = play(make(**PBT, seeds=[0, 1]), rate)
    first, second = [leg.run.run_id for leg in rounds[0].legs[:8]], rounds[1].legs[:8]
    assert len({leg.run.seed for leg in rounds[0].legs}) == 16
    assert {leg.parent for leg in second} <= set(first)
    alone = play(make(**PBT, seeds=[1]), rate)
    together = [plans.Round(round_.legs[8:], round_.stage) for round_ in rounds]
    assert described(alone) == described(together)


@pytest.mark.parametrize("num_broken", [1, 2, 5, 7, 8])
def test_nothing_of_a_diverged_member_is_copied(num_broken: int) -> None:
    """All members score the same, so that their order alone would choose the first ones."""
    spec = make(**PBT, seeds=[5])
    members = [leg.run for leg in next(searches.rounds(spec)).legs]
    gone = {run.run_id for run in members[:num_broken]}
    outcomes = {run.run_id: searches.Result(-200.0, run.run_id in gone) for run in members}
    generator = np.random.default_rng(0)
    new, parents = searches.next_generation(spec, spec.search.pbt, members, outcomes, generator)
    copied = {
        run.run_id: parent for run, parent in zip(new, parents, strict=True) if run.run_id != parent
    }
    assert not gone & set(copied.values())
    # Diverged members are the first to be replaced; two of eight are.
    assert len(copied) == (2 if num_broken < 8 else 0)
    assert len(gone & set(copied)) == min(num_broken, 2) * (num_broken < 8)


@pytest.mark.parametrize(
    ("seeds", "population"),
    [([20261126], 256), ([0, 2**32 - 1], 16), ([0, 2**24, 2**25], 256), ([3, 7], 1000), ([0], 2)],
)
def test_members_have_seeds_of_their_own_within_32_bits(seeds: list[int], population: int) -> None:
    found = specs.member_seeds(seeds, population)
    flat = [seed for each in found for seed in each]
    assert [len(each) for each in found] == [population] * len(seeds)
    assert len(set(flat)) == len(flat) and min(flat) >= 0 and max(flat) < 2**32
    if max(seeds) * population < 2**31:  # nothing wraps: a seed's members do not depend on others
        assert found == [[s * population + i for i in range(population)] for s in seeds]


def test_a_population_of_any_seed_is_planned() -> None:
    rounds = play(make(**PBT, seeds=[2**32 - 1]), rate)
    for round_ in rounds:
        np.array([leg.run.seed for leg in round_.legs], np.uint32)  # refuses what does not fit


def test_a_population_is_not_confirmed() -> None:
    with pytest.raises(InputError, match="--confirm must be 0 for"):
        play(make(**PBT), rate, confirm=4)


# ----------------------------------------------------------------------------------- confirmation


def test_winner_runners_up_and_default_are_confirmed_on_fresh_seeds() -> None:
    spec = make(sweep={"learning_rate": [1e-4, 1e-3, 1e-2, 1e-1]}, seeds=[0, 7])
    *_, tuning, confirmation = play(spec, rate, confirm=3)
    assert confirmation.stage == "confirm"
    default = spec.agent.Config().learning_rate
    assert [rate(leg.run) for leg in confirmation.legs] == [
        value for value in (1e-1, 1e-2, 1e-3, default) for _ in range(3)
    ]
    assert {leg.run.seed for leg in confirmation.legs} == {8, 9, 10}
    assert {leg.start for leg in confirmation.legs} == {0}
    assert tuning.stage == "tune"


def test_fresh_seeds_at_the_end_of_the_range_begin_at_its_start() -> None:
    spec = make(sweep={"learning_rate": [1e-3]}, seeds=[2**32 - 2, 0])
    *_, confirmation = play(spec, rate, confirm=3)
    assert sorted({leg.run.seed for leg in confirmation.legs}) == [1, 2, 2**32 - 1]


@pytest.mark.parametrize(
    ("axis", "default"),
    [
        ({"gae_lambda": [0.9, 0.95]}, 0.95),
        ({"max_grad_norm": [1, 0.5]}, 0.5),
        ({"gamma": [1, 0.99]}, 0.99),
        ({"vf_coef": [1, 2]}, 0.5),
        ({"num_envs": [2, 4.0]}, 4),
        ({"env_params.max_steps_in_episode": [200, 500]}, 200),  # a condition: no default
        ({"env_params.max_steps_in_episode": [200.0, 500.0]}, 200),
        ({"env_params.length": [1, 0.5]}, 1),
    ],
)
def test_a_whole_number_and_its_float_are_one_configuration(axis: Any, default: Any) -> None:
    """TOML writes 1 and 1.0; a default among the swept values is confirmed once."""
    config = {"env": "CartPole-v1", "total_timesteps": 1600, "num_steps": 4, "num_minibatches": 1}
    spec = make(agent="ppo", sweep=axis, search={}, config=config, seeds=2)
    ((name, values),) = axis.items()
    *_, confirmed = play(spec, lambda run: run.swept[name], confirm=3)
    ids = [leg.run.run_id for leg in confirmed.legs]
    assert len(set(ids)) == len(ids)
    asked = {float(value) for value in values} | {float(default)}
    assert len(ids) == 3 * len(asked)
    assert {float(leg.run.swept[name]) for leg in confirmed.legs} == asked
    other = make(agent="ppo", sweep={name: [float(value) for value in values]}, search={},
                 config=config, seeds=2)  # fmt: skip
    assert [run.run_id for run in other.runs] == [run.run_id for run in spec.runs]
    assert [run.swept for run in other.runs] == [run.swept for run in spec.runs]
    assert str([run.swept for run in other.runs]) == str([run.swept for run in spec.runs])


def test_a_default_that_is_invalid_here_is_left_out_and_said() -> None:
    """num_minibatches is 4 by default, which does not divide 2 * 3: nobody asked for it."""
    config = {"env": "CartPole-v1", "total_timesteps": 600, "num_envs": 2, "num_steps": 3}
    spec = make(agent="ppo", sweep={"num_minibatches": [2, 3]}, search={}, config=config)
    *_, confirmed = play(spec, lambda run: run.config.num_minibatches, confirm=2)
    assert [leg.run.config.num_minibatches for leg in confirmed.legs] == [3, 3, 2, 2]
    (note,) = confirmed.notes
    assert "default" in note and "4 does not divide 6" in note


def test_a_rehearsal_has_the_rounds_of_the_search() -> None:
    spec = make(**HALVING)
    sizes = [len(round_.legs) for round_ in searches.rehearse(searches.rounds(spec, 5))]
    assert sizes == [len(round_.legs) for round_ in play(spec, rate, confirm=5)]


# -------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"search": {"method": "bayes"}}, "'optuna', but is 'bayes'"),
        ({"search": {"methods": "random"}}, "did you mean 'method'"),
        ({"search": {}}, "a distribution needs"),
        ({"search": {"method": "random"}}, "samples is 0"),
        ({"search": {"method": "random", "samples": 2.5}}, "whole number, but is 2.5"),
        ({"search": {"method": "random", "samples": 4}, "sweep": {}}, "at least one axis"),
        ({"search": {"method": "random", "samples": 4, "seed": -1}}, "seed must be 0 or more"),
        ({"search": {"method": "optuna", "samples": 4, "batch": 0}}, "batch must be 1 or more"),
        ({**HALVING, "halving": {"rungs": 1}}, "rungs must be 2 or more"),
        ({**HALVING, "halving": {"eta": 1.0}}, "eta must be more than 1"),
        ({**HALVING, "search": {"method": "optuna", "samples": 4}}, "cannot be combined"),
        ({**HALVING, **PBT}, "cannot be combined in one sweep|samples must be the population"),
        ({"pbt": {"population": 1}}, "population must be 2 or more"),
        ({"pbt": {"generations": 1}}, "generations must be 2 or more"),
        ({"pbt": {"replace": 0.6}}, "replace must be in"),
        ({"pbt": {"factors": [1.1, 1.2]}}, "factors must be"),
        ({"pbt": {"resample": 1.5}}, "resample must be in"),
        ({**PBT, "sweep": {"cg_iters": [1, 2]}, "agent": "npg"}, "traced fields"),
        ({**PBT, "sweep": {}}, "at least one axis"),
        (
            {
                "search": {"method": "optuna", "samples": 4},
                "sweep": {"env": ["CartPole-v1", "Acrobot-v1"]},
            },
            r"env must be one value, in \[config\], for .* 'optuna'",
        ),
        (
            {"search": {"method": "random", "samples": 4}, "sweep": {"env_params.gravity": [1, 2]}},
            "at least one axis .* there are 0 axes",
        ),
        (
            {**PBT, "sweep": {**RATES, "env_params.gravity": [9.8, 20]}},
            r"gravity must be one value, in \[config\], for \[pbt\]",
        ),
        ({"robust": {"by": "median"}}, "by must be 'mean' or 'worst', but is 'median'"),
        ({"robust": {"buy": "mean"}}, "did you mean 'by'"),
        ({"robust": {"over": ["gamma"]}}, r"several values in \[sweep\] .there are none., but is"),
        ({"robust": {}}, r"over must name parameters .*there are none"),
        (
            {**PBT, "robust": {}, "sweep": {"env_params.gravity": [9.8, 20]}},
            r"gravity must be one value, in \[config\], for \[pbt\]",
        ),
        (
            {"sweep": {**RATES, "env_params.gravity": {"uniform": [5.0, 20.0]}}},
            "gravity must be a list of values: it is a condition",
        ),
    ],
)
def test_searches_that_make_no_sense_are_one_sentence(changed: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        make(**changed)
