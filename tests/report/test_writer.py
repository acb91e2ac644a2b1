import csv
import io
import itertools
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import synthetic_sweep
from rich.console import Console

from purejaxpg import FaultError, InputError, stats
from purejaxpg.report import analysis, curves, playback, ranking, writer
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store

UPDATES = 30


def make_store(path, configurations, scores, commit=None, arrays=True, chunk=4, identity=None):
    """Write a sweep of `scores[configuration][seed]`, where (value,) marks a diverged run."""
    runs, results = [], []
    for swept, row in zip(configurations, scores, strict=True):
        for seed, score in enumerate(row):
            config = {"env": "CartPole-v1", "gamma": 0.99, **swept}
            parts = [(name.split(".")[1], value) for name, value in swept.items() if "." in name]
            config["env_params"] = dict(parts)
            runs.append(Run(f"run{len(runs)}", config, seed, swept))
            diverged = isinstance(score, tuple)
            results.append(("diverged", score[0]) if diverged else ("done", score))
    starts = range(0, len(runs), chunk)
    units = {f"c{start:05d}": runs[start : start + chunk] for start in starts}
    with Store.open(path, {"n": len(runs), **(identity or {})}) as store:
        store.ledger.plan(units)
        for index, (name, members) in enumerate(units.items()):
            if commit is not None and index >= commit:
                break
            results_here = results[index * chunk : index * chunk + len(members)]
            outcomes = [
                Outcome(run.run_id, status, score, score + 1.0, 3 if status == "diverged" else None)
                for run, (status, score) in zip(members, results_here, strict=True)
            ]
            recorded = make_arrays([score for _, score in results_here]) if arrays else {}
            store.commit(name, recorded, None, outcomes, {"steps_per_update": 512})
    return path


def make_arrays(scores):
    level = np.nan_to_num(np.array(scores, np.float64), nan=1.0)[:, None]
    count = np.tile(np.arange(UPDATES) % 3, (len(scores), 1))  # none ends in every third update
    ramp = np.linspace(0, 1, UPDATES)
    return {
        "episode/return_sum": (level * ramp * count).astype(np.float32),
        "episode/count": count.astype(np.float32),
        "evaluation/return": np.tile(np.where(level < 0, np.nan, level), (1, 16)),
        "evaluation/finished": np.tile(level >= 0.0, (1, 16)),  # a negative score: all cut short
    }


def run_report(path, width=140):
    text = io.StringIO()
    target = writer.write(path, Console(file=text, width=width))
    return target, text.getvalue()


def read_csv(target):
    with (target / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


RATES = [{"learning_rate": 1e-3}, {"learning_rate": 0.00030000000001}, {"learning_rate": 1e-4}]
SCORES = [[10.0, 20, 30, 40], [100.0, 300, 200, 5000], [50.0, 50, 50, (np.nan,)]]


@pytest.fixture
def sweep(tmp_path):
    return make_store(tmp_path / "out", RATES, SCORES)


# ---------------------------------------------------------------------------------------- ranking


def test_configurations_are_ranked_by_iqm(sweep):
    with Store.read(sweep) as store:
        ranked = ranking.rank(store)
    assert [c.swept["learning_rate"] for c in ranked] == [0.00030000000001, 1e-4, 1e-3]
    assert [c.rank for c in ranked] == [1, 2, 3]
    best, second, third = ranked
    # The outlier is trimmed: (200 + 300) / 2.
    assert (best.iqm, best.mean, best.greedy_iqm) == (250.0, 1400.0, 251.0)
    assert (best.low, best.high) == stats.bootstrap_ci([100.0, 300, 200, 5000])
    # The diverged run counts as the worst of the environment, 10, in the mean too.
    assert second.scores == pytest.approx((50.0, 50.0, 50.0, 10.0))
    assert (second.iqm, second.diverged) == (50.0, 1)
    assert second.mean == pytest.approx(40.0) and second.mean < 40.0
    assert (third.finished, third.planned, third.diverged) == (4, 4, 0)
    assert third.run_ids == ("run0", "run1", "run2", "run3")


def test_ties_are_broken_by_mean_then_planned_order(tmp_path):
    scores = [[1.0, 5, 5, 8], [1.0, 5, 5, 9], [1.0, 5, 5, 8]]
    with Store.read(make_store(tmp_path / "out", RATES, scores)) as store:
        ranked = ranking.rank(store)
    assert [c.swept["learning_rate"] for c in ranked] == [0.00030000000001, 1e-3, 1e-4]


def tied(path, levels, confirmed=()):
    """Write configurations of equal scores whose training returns were at these levels."""
    runs = [
        Run(f"{i}-{s}", {"env": "A"}, s, {"learning_rate": i}) for i in range(3) for s in range(2)
    ]
    again = [Run(f"c{i}", {"env": "A"}, 9, {"learning_rate": i}, "confirm") for i in confirmed]
    with Store.open(path, {"agent": "ppo"}) as store:
        store.ledger.plan({"unit": runs})
        sums = np.repeat(np.repeat(np.array(levels, np.float32), 2)[:, None], 5, axis=1)
        arrays = {"episode/count": np.ones_like(sums), "episode/return_sum": sums}
        commit(store, "unit", 0, [(run.run_id, "done", 7.0) for run in runs], **arrays)
        if again:
            store.ledger.plan({"again": again}, 1)
            commit(store, "again", 1, [(run.run_id, "done", 7.0) for run in again])
    return path


def test_equal_scores_and_means_are_ordered_by_the_area_under_the_curve(tmp_path):
    path = tied(tmp_path / "out", [1.0, 3.0, 2.0])
    with Store.read(path) as store:
        assert [c.swept["learning_rate"] for c in ranking.rank(store)] == [1, 2, 0]
        assert [c.rank for c in analysis.of_store(store).ranked] == [1, 2, 3]
    target, text = run_report(path)
    assert "Ties are broken by the area under the training curve (AUC)." in " ".join(text.split())
    page = " ".join((target / "index.html").read_text().split())
    assert "3 configurations share its score and its mean. The area under" in page
    assert [float(row["learning_rate"]) for row in read_csv(target)] == [1, 2, 0]


def test_of_tied_configurations_those_that_were_confirmed_stay_first(tmp_path):
    """The search does not know the curves, so it confirmed the first that it had planned."""
    with Store.read(tied(tmp_path / "out", [1.0, 2.0, 3.0], confirmed=[0])) as store:
        data = analysis.of_store(store)
    assert [c.swept["learning_rate"] for c in data.ranked] == [0, 2, 1]
    assert data.sections[0].role("winner").tuned is data.ranked[0]


def test_without_ties_nobody_asks_for_areas(sweep):
    with Store.read(sweep) as store:
        ranking.rank_runs(
            ranking.with_conditions(store.ledger.runs(), {}), areas=lambda: pytest.fail("asked")
        )


@pytest.mark.parametrize("seeds", [1, 3, 7, 8])
def test_intervals_over_few_seeds_come_with_a_caveat(seeds, tmp_path):
    scores = [[float(10 * i + s) for s in range(seeds)] for i in range(3)]
    target, text = run_report(make_store(tmp_path / "out", RATES, scores))
    caveat = f"{seeds} seeds are few: their intervals are too narrow."
    assert (caveat in " ".join(text.split())) == (1 < seeds < 8)
    page = " ".join((target / "index.html").read_text().split())
    assert page.count(caveat) == (2 if 1 < seeds < 8 else 0)  # in the card and in the notes


def test_everything_diverged_still_gives_a_report(tmp_path):
    scores = [[(np.nan,)] * 4] * 3
    target, text = run_report(make_store(tmp_path / "out", RATES, scores))
    assert "4/4" in text and "nan" not in text and "inf" not in text
    assert len(read_csv(target)) == 3


def test_each_environment_is_ranked_by_itself(tmp_path):
    configurations = [
        {"env": env, "learning_rate": rate} for env in ("A-v0", "B-v0") for rate in (1e-3, 1e-4)
    ]
    scores = [[500.0] * 4, [400.0] * 4, [-90.0] * 4, [-80.0, -80, -80, (np.nan,)]]
    path = make_store(tmp_path / "out", configurations, scores)
    with Store.read(path) as store:
        ranked = ranking.rank(store)
    assert [(c.environment, c.rank) for c in ranked] == [
        ("A-v0", 1), ("A-v0", 2), ("B-v0", 1), ("B-v0", 2),
    ]  # fmt: skip
    # Worst of its own environment, not of the sweep.
    assert ranked[2].scores == pytest.approx((-80.0, -80.0, -80.0, -90.0))
    target, text = run_report(path)
    assert text.index("A-v0") < text.index("B-v0")
    assert (target / "table.md").read_text().count("###") == 2
    assert [row["env"] for row in read_csv(target)] == ["A-v0", "A-v0", "B-v0", "B-v0"]


def test_each_parameter_of_an_environment_is_ranked_by_itself(tmp_path):
    """No configuration wins because its task is easier."""
    configurations = [
        {"learning_rate": rate, "env_params.gravity": gravity}
        for rate in (1e-3, 1e-4, 1e-5) for gravity in (9.8, 20.0)
    ]  # fmt: skip
    easy = [[400.0] * 4, [500.0] * 4, [480.0] * 4]  # gravity 20
    hard = [[80.0] * 4, [70.0] * 4, [60.0, 60, 60, (np.nan,)]]
    scores = [each for pair in zip(hard, easy, strict=True) for each in pair]
    target, text = run_report(make_store(tmp_path / "out", configurations, scores))
    first, second = "CartPole-v1, gravity 9.8", "CartPole-v1, gravity 20"
    assert text.index(first) < text.index(second)
    rows = read_csv(target)
    assert [(row["env_params.gravity"], row["learning_rate"], row["rank"]) for row in rows] == [
        ("9.8", "0.001", "1"), ("9.8", "0.0001", "2"), ("9.8", "1e-05", "3"),
        ("20.0", "0.0001", "1"), ("20.0", "1e-05", "2"), ("20.0", "0.001", "3"),
    ]  # fmt: skip
    assert {row["env"] for row in rows} == {"CartPole-v1"}
    with Store.read(tmp_path / "out") as store:
        data = analysis.of_store(store)
    # A diverged run is the worst of its own condition.
    assert data.sections[0].ranked[2].scores == pytest.approx((60.0, 60.0, 60.0, 60.0))
    assert [section.environment for section in data.sections] == [first, second]
    for section in data.sections:
        assert [axis.name for axis in section.effects.axes] == ["learning_rate"]
        assert {line.label.split()[1] for line in section.curves.best} == {"learning_rate"}
    assert data.cross is not None and data.cross.settings == 3
    page = (target / "index.html").read_text(encoding="utf-8")
    assert "2 conditions" in " ".join(page.split("<nav")[0].split())


@pytest.mark.parametrize(("by", "best"), [("worst", 1e-3), ("mean", 1e-4)])
def test_configurations_are_ranked_over_conditions(by, best, tmp_path):
    configurations = [
        {"learning_rate": rate, "env_params.gravity": gravity}
        for rate in (1e-3, 1e-4, 1e-5) for gravity in (9.8, 20.0)
    ]  # fmt: skip
    scores = [[80.0, 90.0], [100.0] * 2, [70.0] * 2, [500.0] * 2, [60.0, (np.nan,)], [480.0] * 2]
    identity = {"robust": {"over": ["env_params.gravity"], "by": by}}
    target, text = run_report(make_store(tmp_path / "out", configurations, scores, None, True, 4,
                                         identity))  # fmt: skip
    title = f"CartPole-v1: {by} over gravity 9.8, gravity 20"
    assert text.index(title) < text.index("CartPole-v1, gravity 9.8: 3 configurations")
    page = (target / "index.html").read_text(encoding="utf-8")
    assert f"<h3>{title}</h3>" in page and f"### {title}" in (target / "table.md").read_text()
    with (target / "robust.csv").open(newline="") as file:
        rows = {float(row["learning_rate"]): row for row in csv.DictReader(file)}
    cards = [" ".join(card.split("</article>")[0].split()) for card in page.split("<article")[1:]]
    assert ["best in this condition" in card for card in cards] == [True, True]
    assert "winner of" not in page and "clear winner" not in page
    # At gravity 9.8 the best is that of the worst case, at gravity 20 that of the mean.
    also = [True, False] if by == "worst" else [False, True]
    assert ["also the winner" in card for card in cards] == also
    assert ["not the winner" in card for card in cards] == [not won for won in also]
    assert "Run the winner again on fresh seeds" in page
    assert next(iter(rows)) == best and rows[best]["rank"] == "1"
    expected = {1e-3: (85.0, 92.5), 1e-4: (70.0, 285.0), 1e-5: (60.0, 270.0)}
    for rate, (worst, mean) in expected.items():
        assert float(rows[rate]["score"]) == pytest.approx(worst if by == "worst" else mean)
    low, high = stats.robust_ci([[80.0, 90.0], [100.0, 100.0]], by)
    assert (float(rows[1e-3]["ci95_low"]), float(rows[1e-3]["ci95_high"])) == (low, high)
    assert rows[1e-5]["diverged"] == "1" and rows[1e-3]["runs_done"] == "4"
    assert float(rows[1e-3]["final_iqm CartPole-v1, gravity 20"]) == 100.0
    with Store.read(tmp_path / "out") as store:
        (chosen, *_) = playback.best_configuration(store)
    assert chosen["swept"] == {"learning_rate": best, "env_params.gravity": 9.8}


def test_a_configuration_that_lacks_a_condition_has_no_rank_over_them(tmp_path):
    configurations = [
        {"learning_rate": rate, "env": env} for env in ("A-v0", "B-v0") for rate in (1e-3, 1e-4)
    ]
    identity = {"robust": {"over": ["env"], "by": "mean"}}
    path = make_store(tmp_path / "out", configurations, [[1.0], [2.0], [30.0], [40.0]], 3, True, 1,
                      identity)  # fmt: skip
    _, text = run_report(path)
    with Store.read(path) as store:
        (over,) = ranking.robust(ranking.rank(store), identity)
    assert over.title == "mean over A-v0, B-v0" and over.title in text
    assert [(c.swept["learning_rate"], c.rank) for c in over.ranked] == [(1e-3, 1), (1e-4, None)]


@pytest.mark.parametrize(
    "identity",
    [
        {"sweep": {"env_params.gravity": {"uniform": [5.0, 20.0]}}},
        {"sweep": {"env_params.gravity": [9.8, 20.0]}, "pbt": {"population": 2}},
    ],
)
def test_older_searches_that_drew_a_parameter_still_open(identity, tmp_path):
    """Each of their runs may have a condition of its own, so they are ranked together, and it
    says so."""
    configurations = [{"env_params.gravity": gravity} for gravity in (9.8, 20.0)]
    path = make_store(tmp_path / "out", configurations, [[400.0], [500.0]], identity=identity)
    _, text = run_report(path)
    assert "This search also chose env_params.gravity" in " ".join(text.split())
    with Store.read(path) as store:
        assert [c.swept for c in ranking.rank(store)] == configurations[::-1]


# ----------------------------------------------------------------------------------------- tables


def test_the_report_says_what_its_numbers_are(sweep):
    target, text = run_report(sweep)
    flat = " ".join(text.split())
    assert (
        "Final return: IQM over seeds of the mean of 16 stochastic evaluation episodes after the "
        "last update"
    ) in flat
    assert "3e-4" in text and "0.0003" not in text
    assert "1/4" in text and "Diverged runs count as the worst" in flat
    assert "fresh seeds" in flat
    assert "Unfinished" not in flat
    rows = (target / "table.md").read_text().splitlines()
    assert rows[2].startswith("| rank | learning_rate | IQM | 95% CI |")
    assert rows[4].startswith("| 1 | 3e-4 | 250.0 | [")


def test_the_csv_has_full_precision(sweep):
    rows = read_csv(run_report(sweep)[0])
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert float(rows[0]["learning_rate"]) == 0.00030000000001
    assert float(rows[0]["ci95_low"]) == stats.bootstrap_ci([100.0, 300, 200, 5000])[0]
    assert (rows[1]["diverged"], rows[1]["runs_done"], rows[1]["runs_planned"]) == ("1", "4", "4")


def test_hundreds_of_configurations_stay_readable(tmp_path):
    rates = [{"learning_rate": 10.0 ** -(1 + index / 100), "clip_eps": 0.2} for index in range(300)]
    scores = np.random.default_rng(0).uniform(0, 500, (300, 2)).tolist()
    target, text = run_report(make_store(tmp_path / "out", rates, scores, chunk=100))
    assert "280 more in table.csv" in text
    assert len(text.splitlines()) < 40
    assert len(read_csv(target)) == 300
    assert "280 more in table.csv" in (target / "table.md").read_text()
    assert png_size(target / "curves.png") == (1400, 798)


def test_pending_units_are_counted(tmp_path):
    path = make_store(tmp_path / "out", RATES, SCORES, commit=1, chunk=6)
    target, text = run_report(path)
    assert "Unfinished: 6 of 12 runs are missing" in text
    assert "2 of 4" in text and "0 of 4" in text
    assert [row["rank"] for row in read_csv(target)] == ["1", "2", ""]
    with Store.read(path) as store:
        assert [c.finished for c in ranking.rank(store)] == [2, 4, 0]


def test_episodes_that_were_cut_short_are_counted(tmp_path):
    _, text = run_report(make_store(tmp_path / "cut", RATES[:2], [[1.0, -2.0], [3.0, 4.0]]))
    assert "16 evaluation episodes were cut short" in text
    _, text = run_report(make_store(tmp_path / "whole", RATES[:2], [[1.0, 2.0], [3.0, 4.0]]))
    assert "cut short" not in text


def test_nothing_committed_yet(tmp_path):
    target, text = run_report(make_store(tmp_path / "out", RATES, SCORES, commit=0))
    assert "No run is finished yet." in text
    assert not list(target.glob("*.png"))
    assert "No run is finished yet." in (target / "index.html").read_text()
    with Store.read(tmp_path / "out") as store:
        assert [c.rank for c in ranking.rank(store)] == [None] * len(RATES)


def test_one_single_run(tmp_path):
    target, text = run_report(make_store(tmp_path / "out", [{}], [[123.4]]))
    assert "1 configuration, 1 run" in text and "123.4" in text
    assert "fresh seeds" not in text  # nothing was selected
    assert png_size(target / "curves.png") == (1400, 798)


def test_a_second_report_replaces_the_first(sweep):
    first, _ = run_report(sweep)
    table = (first / "table.csv").read_bytes()
    (first / "table.csv").write_text("old")
    run_report(sweep)
    assert (first / "table.csv").read_bytes() == table


def test_values_are_never_read_as_markup(tmp_path):
    configurations = [{"hidden": [64, 64], "note": "[red]a|b[/red]"}, {"hidden": [8], "note": "x"}]
    target, text = run_report(make_store(tmp_path / "out", configurations, [[1.0, 2], [3.0, 4]]))
    assert "[64, 64]" in text and "[red]a|b[/red]" in text
    assert "[red]a\\|b[/red]" in (target / "table.md").read_text()


# ----------------------------------------------------------------------------------------- curves


def test_bins_average_episodes_and_not_updates():
    # Two updates per bin; 1 episode of 10 and 3 of 2 each: 16 / 4, not (10 + 2) / 2.
    sums, count = np.array([[10.0, 6, 0, 0, 5, 0]]), np.array([[1.0, 3, 0, 0, 1, 0]])
    steps, returns = curves.bin_returns(sums, count, 100, bins=3)
    np.testing.assert_array_equal(steps, [100, 300, 500])
    # No episode ended in the second bin: it repeats the first.
    np.testing.assert_array_equal(returns, [[4, 4, 5]])


def test_bins_before_the_first_episode_are_unknown_and_never_zero():
    sums, count = np.array([[0.0, 0, 7], [3.0, 0, 0]]), np.array([[0.0, 0, 1], [1.0, 0, 0]])
    _, returns = curves.bin_returns(sums, count, 1)
    # Carried forward inside a run, not from one run into the next.
    np.testing.assert_array_equal(returns, [[np.nan, np.nan, 7], [3, 3, 3]])


@pytest.mark.parametrize("updates", [1, 7, 59, 60, 61, 1000])
def test_every_update_lies_in_exactly_one_bin(updates):
    generator = np.random.default_rng(updates)
    count = generator.integers(1, 4, (2, updates)).astype(float)
    sums = generator.standard_normal((2, updates))
    steps, returns = curves.bin_returns(sums, count, 512)
    assert steps.size == min(60, updates) and (np.diff(steps) > 0).all()
    edges = np.linspace(0, updates, steps.size + 1).round().astype(int)
    expected = [
        sums[:, a:b].sum(axis=1) / count[:, a:b].sum(axis=1) for a, b in itertools.pairwise(edges)
    ]
    np.testing.assert_allclose(returns, np.stack(expected, axis=1))


def test_the_curve_of_a_configuration_needs_half_of_its_runs():
    returns = np.array([[np.nan, 2.0], [np.nan, 4.0], [9.0, 6.0]])
    np.testing.assert_array_equal(curves.over_seeds(returns), [np.nan, 4.0])
    low, high = curves.interval(returns)
    assert np.isnan(low[0]) and low[1] < 4.0 < high[1]


def test_results_without_episodes_get_a_table_and_no_picture(tmp_path):
    path = make_store(tmp_path / "out", RATES, SCORES, arrays=False)
    target, text = run_report(path)
    names = {p.name for p in target.iterdir()}
    assert {"index.html", "table.csv", "table.md", "runs.csv"} <= names
    assert not {"curves.png", "curves.svg", "curves.csv"} & names
    assert "mean of stochastic evaluation episodes" in " ".join(text.split())


def test_the_picture_draws_the_best_in_colour_and_names_them(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    rates = [{"learning_rate": 10.0**-index} for index in range(8)]
    scores = [[100.0 * index + seed for seed in range(4)] for index in range(8)]
    run_report(make_store(tmp_path / "out", rates, scores))
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "environment steps"
    assert axes.get_ylabel() == "episode return (training, stochastic policy)"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0] == "1.  learning_rate 1e-7"
    assert labels[-1] == "3 others" and len(labels) == 6
    coloured = [line for line in axes.lines if line.get_label().startswith("1. ")]
    # The last bin is the last update: ramp 1, so the curve ends at the IQM 701.5 over seeds.
    assert coloured[0].get_ydata()[-1] == pytest.approx(701.5, rel=1e-3)
    assert coloured[0].get_xdata()[-1] == (UPDATES - 0.5) * 512
    colours = {line.get_color() for line in axes.lines}
    assert len(colours) == 6


# ----------------------------------------------------------------------------------------- stages


def commit(store, name, index, outcomes, **arrays):
    """Commit made-up results of a planned unit: `(run_id, status, score)` each."""
    rows = [Outcome(run_id, status, score, score, None) for run_id, status, score in outcomes]
    store.commit(name, arrays, None, rows, {"steps_per_update": 10, "env_steps": 10, "wall_s": 1.5})


def staged(path, tuned, confirmed, identity=None):
    """Write scores by learning rate, `tuned` in one stage and `confirmed` in the other."""
    with Store.open(path, {"agent": "ppo", **(identity or {})}) as store:
        for index, (stage, scores) in enumerate([("tune", tuned), ("confirm", confirmed)]):
            runs, outcomes = [], []
            for rate, row in scores.items():
                for seed, score in enumerate(row):
                    name, swept = f"{stage}-{rate}-{seed}", {"learning_rate": rate}
                    config = {"env": "CartPole-v1", **swept}
                    runs.append(Run(name, config, seed, swept, stage, 0, 9, 9))
                    outcomes.append((name, "done", score))
            store.ledger.plan({stage: runs}, index)
            commit(store, stage, index, outcomes)
    return path


def test_fresh_seeds_never_choose_the_winner(tmp_path):
    tuned = {1e-2: [400.0, 500], 1e-3: [300.0, 310], 1e-4: [100.0, 90], 1e-5: [20.0, 10]}
    # In any order: runs of one compilation are planned together.
    confirmed = {1e-4: [95.0, 99], 3e-4: [150.0, 250], 1e-2: [200.0, 210], 1e-3: [300.0, 320]}
    path = staged(tmp_path / "out", tuned, confirmed)
    with Store.read(path) as store:
        assert ranking.rank(store)[0].swept == {"learning_rate": 1e-2}
        assert [c.iqm for c in ranking.rank(store)] == [450, 305, 95, 15]
        assert [c.finished for c in ranking.rank(store, "confirm")] == [2, 2, 2, 2]
    target, text = run_report(path)
    assert "on fresh seeds" in text and "The best of many" not in text
    assert re.search(r"winner +0.01 +205.0", text) and re.search(r"default +3e-4 +200.0", text)
    with (target / "confirmed.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["role"] for row in rows] == ["winner", "runner-up", "runner-up", "default"]
    assert [float(row["final_iqm"]) for row in rows] == [205, 310, 97, 200]
    page = (target / "index.html").read_text()
    assert "overtaken" in page and "On fresh seeds the runner-up (rank 2) scores higher" in page
    assert len(read_csv(target)) == 4
    with (target / "runs.csv").open(newline="") as file:
        assert [row["stage"] for row in csv.DictReader(file)] == ["tune"] * 8 + ["confirm"] * 8


@pytest.fixture
def halved(tmp_path):
    """Three configurations; the best at first does not get worse, and the last one is stopped."""
    path, scores = tmp_path / "out", {1e-2: [50.0, 60.0], 1e-3: [90.0, 80.0], 1e-4: [70.0, None]}
    with Store.open(path, {"agent": "ppo", "halving": {"eta": 3}}) as store:
        for index, (start, stop) in enumerate([(0, 3), (3, 9)]):
            kept = {rate: row[index] for rate, row in scores.items() if row[index] is not None}
            runs = [
                Run(str(rate), {"env": "A"}, 0, {"learning_rate": rate}, "tune", start, stop, 9,
                    str(rate) if start else None)
                for rate in kept
            ]  # fmt: skip
            name = f"round{index}"
            store.ledger.plan({name: runs}, index)
            count = np.ones((len(runs), stop - start), np.float32)
            sums = np.stack([np.full(stop - start, score) for score in kept.values()])
            outcomes = [(str(rate), "done", score) for rate, score in kept.items()]
            arrays = {"episode/count": count, "episode/return_sum": sums.astype(np.float32)}
            commit(store, name, index, outcomes, **arrays)
    return path


def test_what_was_stopped_early_ranks_last(halved):
    with Store.read(halved) as store:
        ranked = ranking.rank(store)
    # 70 is more than 60, but it was reached after a third of the updates.
    assert [c.swept["learning_rate"] for c in ranked] == [1e-3, 1e-2, 1e-4]
    assert [c.iqm for c in ranked] == [80.0, 60.0, 70.0]
    assert [c.reached for c in ranked] == [1.0, 1.0, 1 / 3]


def test_the_legs_of_a_run_make_one_curve(halved):
    with Store.read(halved) as store:
        arrays = {u["name"]: store.arrays(u["name"], curves.METRICS) for u in store.ledger.units()}
        found = curves.of_runs(store, store.ledger.legs(), arrays)
    np.testing.assert_array_equal(found["0.01"].steps, np.arange(9) * 10 + 5)
    np.testing.assert_array_equal(found["0.01"].returns, [50.0] * 3 + [60.0] * 6)
    np.testing.assert_array_equal(found["0.0001"].steps, [5, 15, 25])
    assert found["0.01"].best == 60.0 and found["0.01"].area == pytest.approx(510 / 9)


def test_metrics_of_a_run_are_those_of_its_legs_without_what_is_not_finite(tmp_path):
    with Store.open(tmp_path / "out", {"agent": "ppo"}) as store:
        for index, (start, stop) in enumerate([(0, 2), (2, 4)]):
            run = Run("a", {"env": "A"}, 0, {}, "tune", start, stop, 4, "a" if start else None)
            store.ledger.plan({f"u{index}": [run]}, index)
            arrays = {
                "loss/own": np.array([[1.0 + start, np.nan]]),
                "episode/count": np.ones((1, 2)),
                "episode/length_sum": np.array([[7.0, 9.0 + start]]),
            }
            commit(store, f"u{index}", index, [("a", "done", 1.0)], **arrays)
        found = curves.metrics_of_runs(store, ["a", "of another sweep"])
    assert list(found) == ["episode/count", "episode/length", "loss/own"]
    np.testing.assert_array_equal(found["loss/own"]["a"].returns, [1.0, np.nan, 3.0, np.nan])
    np.testing.assert_array_equal(found["episode/length"]["a"].returns, [7.0, 9.0, 7.0, 11.0])
    np.testing.assert_array_equal(found["loss/own"]["a"].steps, [5, 15, 25, 35])
    _, (means,) = curves.bin_means(np.array([[1.0, np.nan, 4.0, 8.0]]), 10, bins=2)
    np.testing.assert_array_equal(means, [1.0, 6.0])


def test_the_cost_of_a_run_is_that_of_its_legs(halved):
    target, _ = run_report(halved)
    rows = {float(row["learning_rate"]): row for row in read_csv(target)}
    # 1.5 s for three rows, then 1.5 s for two.
    assert float(rows[1e-3]["device_seconds"]) == pytest.approx(0.5 + 0.75)
    assert float(rows[1e-4]["device_seconds"]) == pytest.approx(0.5)
    assert rows[1e-3]["env_steps"] == "20" and rows[1e-4]["env_steps"] == "10"


def test_a_diverged_run_is_the_worst_of_those_trained_as_far():
    runs = [
        {"run_id": name, "status": status, "score": score, "stop": stop, "total": 9, "round": part}
        for name, status, score, stop, part in [
            ("a", "done", 50.0, 9, 1), ("b", "diverged", np.nan, 9, 1), ("c", "done", 5.0, 3, 0),
        ]
    ]  # fmt: skip
    filled = ranking.filled_scores(runs)
    assert filled == pytest.approx({"a": 50.0, "b": 50.0, "c": 5.0})
    assert filled["b"] < filled["a"]


def stopped(name: str, swept: dict[str, float], total: int, left: int, score: float) -> Any:
    """A run as the store gives it, of which a halving of eta 3 left so many rungs."""
    stop = max(1, round(total / 3**left))
    status = "stopped" if left else "done"
    return {
        "run_id": name, "stage": "tune", "config": {"env": "A"}, "swept": swept, "status": status,
        "score": score, "greedy_score": score, "start": 0, "stop": stop, "total": total,
        "round": 2 - left,
    }  # fmt: skip


@pytest.mark.parametrize("totals", [(97, 390), (390, 97), (5, 1000), (31, 62)])
def test_a_rung_is_ranked_by_score_whatever_the_rounding_of_its_updates(totals):
    """97 and 390 updates stop at 32 and 130: 0.3299 and 0.3333 of them, one rung all the same."""
    few, many = totals
    runs = [
        stopped("a", {"num_steps": 128, "x": 0}, few, 1, 480.0),
        stopped("b", {"num_steps": 32, "x": 1}, many, 1, 20.0),
        stopped("c", {"num_steps": 32, "x": 2}, many, 0, 10.0),
        stopped("d", {"num_steps": 128, "x": 3}, few, 2, 490.0),
        stopped("e", {"num_steps": 32, "x": 4}, many, 2, 500.0),
        {**stopped("f", {"num_steps": 128, "x": 5}, few, 1, np.nan), "status": "diverged"},
    ]
    ranked = ranking.rank_runs(ranking.with_conditions(runs, {}))
    assert [c.run_ids[0] for c in ranked] == ["c", "a", "b", "f", "e", "d"]
    # Filled from its own rung, not from those of its own number of updates.
    assert ranked[3].iqm < 20.0 and ranked[3].iqm == pytest.approx(20.0)


def test_where_all_scores_tie_a_diverged_configuration_is_last():
    runs = []
    for rate, broken in enumerate([True, False, True, False]):
        for seed in range(3):
            run = stopped(f"{rate}-{seed}", {"x": rate}, 9, 0, -200.0)
            gone = broken and (rate == 0 or seed == 0)  # all seeds of one, one seed of another
            runs.append({**run, "status": "diverged" if gone else "done"})
    ranked = ranking.rank_runs(ranking.with_conditions(runs, {}))
    assert [c.swept["x"] for c in ranked] == [1, 3, 2, 0]
    assert [c.diverged for c in ranked] == [0, 0, 1, 3]


def test_a_population_shows_how_its_best_member_came_to_be(tmp_path):
    with Store.read(synthetic_sweep.population(tmp_path / "out", 6, 4)) as store:
        data = analysis.of_store(store)
        legs = {(leg["run_id"], leg["round"]): leg for leg in store.ledger.legs()}
    ((_, schedule),) = data.schedules
    assert schedule.steps == [(0, 50), (50, 100), (100, 150), (150, 200)]
    # Followed back by hand.
    member, values = schedule.member, []
    for index in reversed(range(4)):
        values.insert(0, legs[member, index]["swept"]["learning_rate"])
        member = legs[member, index]["parent"]
    assert schedule.values["learning_rate"] == values
    assert [len(c.scores) for c in data.ranked] == [1] * 6
    assert not data.sections[0].effects.axes
    # `--confirm` refuses populations, so nothing may advise it.
    assert data.command == "" and not any("again" in note for note in data.notes)
    assert "quote the best member of each" in data.notes[-1]


# ----------------------------------------------------------------------------------------- faults


def test_no_result_directory(tmp_path):
    with pytest.raises(InputError, match="is not a result directory"):
        run_report(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_result_is_named_and_not_drawn(sweep):
    path = sweep / "arrays" / "c00004.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(FaultError, match=re.escape("c00004.npz is damaged")):
        run_report(sweep)


def test_a_report_that_cannot_be_written(sweep):
    (sweep / "report").write_text("in the way")
    with pytest.raises(FaultError, match="Cannot write the report"):
        run_report(sweep)


def test_a_report_needs_no_jax_and_no_display(sweep):
    code = (
        "import sys; from rich.console import Console; from purejaxpg.report import writer\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"writer.write({str(sweep)!r}, Console(quiet=True))\n"
        "sys.exit('jax' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
