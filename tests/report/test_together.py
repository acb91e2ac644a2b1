"""Several result directories on one page."""

import csv
import io

import numpy as np
import pytest
from rich.console import Console

from purejaxpg import FaultError, InputError, cli, stats
from purejaxpg.report import together, writer
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store

ENVS = ("A-v0", "B-v0")
GOOD = {("A-v0", 0.1): [10.0, 20, 30, 40], ("A-v0", 0.2): [1.0, 2, 3, 4],
        ("B-v0", 0.1): [-9.0, -8, -7, -6], ("B-v0", 0.2): [-1.0, -1, -2, -2]}  # fmt: skip
BAD = {("A-v0", 0.1): [0.0, 15, 25, np.nan], ("B-v0", 0.1): [-11.0, -3, -2.5, -1.5]}


def make(path, scores, agent="ppo", fresh=None, unit="environment steps", episodes=8, **config):
    """Write a sweep of `scores[environment, rate]` by seed, and a confirmation of some of them."""
    identity = {"agent": agent, "eval_episodes": episodes}
    with Store.open(path, identity) as store:
        for index, (stage, own) in enumerate([("tune", scores), ("confirm", fresh or {})]):
            runs, outcomes = [], []
            for (env, rate), row in own.items():
                for seed, score in enumerate(row):
                    swept = {"env": env, "learning_rate": rate} if env else {"learning_rate": rate}
                    name = f"{stage}-{env}-{rate}-{seed}"
                    runs.append(Run(name, {**swept, **config}, seed, swept, stage))
                    status = "diverged" if np.isnan(score) else "done"
                    outcomes.append(Outcome(name, status, score, score))
            if runs:
                store.ledger.plan({stage: runs}, index)
                levels = np.nan_to_num([[o.score] * 6 for o in outcomes])
                arrays = {"episode/count": np.ones_like(levels), "episode/return_sum": levels}
                facts = {"steps_per_update": 8, "unit": unit}
                store.commit(stage, arrays, None, outcomes, facts)
    return path


def written(*paths, out):
    text = io.StringIO()
    page = writer.write_together(paths, out, Console(file=text, width=200))
    return page, " ".join(text.getvalue().split())


@pytest.fixture
def both(tmp_path):
    return make(tmp_path / "good", GOOD, "./good.py"), make(tmp_path / "bad", BAD, "a2c")


def test_methods_are_compared_by_the_statistics_of_rliable(both):
    data = together.of_directories(both[::-1])
    assert [m.name for m in data.methods] == ["good", "a2c"] and data.environments == ENVS
    good, bad = data.methods
    # The winners of each environment, and a diverged run below the worst of all agents.
    assert good.entries["A-v0"].configuration.swept == {"learning_rate": 0.1}
    assert good.entries["B-v0"].configuration.swept == {"learning_rate": 0.2}
    np.testing.assert_allclose(bad.entries["A-v0"].scores, [0, 15, 25, 0], atol=1e-6)
    assert bad.entries["A-v0"].scores[3] < 0.0
    # 0 and 1 are the extremes of each environment: 0 to 40, -11 to -1.
    np.testing.assert_allclose(np.concatenate(good.strata), [0.25, 0.5, 0.75, 1, 1, 1, 0.9, 0.9])
    np.testing.assert_allclose(
        np.concatenate(bad.strata), [0, 0.375, 0.625, 0, 0, 0.8, 0.85, 0.95], atol=1e-6
    )
    # The middle four of eight.
    assert good.iqm == pytest.approx(np.mean([0.75, 0.9, 0.9, 1.0]))
    assert bad.iqm == pytest.approx(np.mean([0.0, 0.375, 0.625, 0.8]), abs=1e-6)
    assert good.low < good.iqm < good.high and bad.low < bad.iqm < bad.high
    assert (good.low, good.high) == stats.bootstrap_ci(good.strata)
    # By hand: 13 of 16 pairs in A-v0 and 14 of 16 in B-v0.
    wins = [[x > y for x in a for y in b] for a, b in zip(good.strata, bad.strata, strict=True)]
    (found,) = data.improvements
    assert [sum(own) for own in wins] == [13, 14]
    assert found.over == "good over a2c" and found.value == pytest.approx(27 / 32)
    assert found.low < found.value < found.high <= 1.0
    taus, ((_, share, low, high), _) = data.profile.thresholds, data.profile.lines
    at = np.searchsorted(taus, 0.8) - 1
    above = [(part > taus[at]).mean() for part in good.strata]
    assert share[at] == pytest.approx(np.mean(above)) and low[at] <= share[at] <= high[at]


def test_one_environment_keeps_its_own_scale(tmp_path):
    one = make(tmp_path / "one", {("A-v0", 0.1): [3.0, 4, 5, 6]})
    two = make(tmp_path / "two", {("A-v0", 0.1): [1.0, 2, 3, 4]})
    data = together.of_directories([one, two])
    assert [m.name for m in data.methods] == ["one", "two"]  # both are ppo
    assert [m.iqm for m in data.methods] == [4.5, 2.5] and not data.normalized
    assert "normalised" not in " ".join(data.notes)


def test_confirmed_runs_stand_for_a_method_and_the_page_says_so(both, tmp_path):
    fresh = {("A-v0", 0.1): [5.0] * 8, ("B-v0", 0.2): [-3.0] * 8}
    sure = make(tmp_path / "sure", GOOD, "npg", fresh)
    page, text = written(sure, both[1], out=tmp_path / "both")
    data = together.of_directories([sure, both[1]])
    entries = next(m for m in data.methods if m.name == "npg").entries
    assert [e.fresh for e in entries.values()] == [True, True]
    assert [e.iqm for e in entries.values()] == [5.0, -3.0]
    assert "Runs on fresh seeds (--confirm) stand for npg." in text
    assert "Runs of the tuning stage stand for a2c" in text
    with (page.parent / "table.csv").open(newline="") as file:
        rows = {(row["agent"], row["env"]): row for row in csv.DictReader(file)}
    assert rows["npg", "A-v0"]["seeds"] == "fresh" and rows["a2c", "A-v0"]["seeds"] == "tuning"
    assert rows["npg", "A-v0"]["configurations_tried"] == "2"


def test_what_differs_between_sweeps_is_said(both, tmp_path):
    other = make(tmp_path / "other", GOOD, "npg", episodes=128, total_timesteps=1_000_000)
    _, text = written(both[1], other, out=tmp_path / "out")
    assert "Evaluations differ: npg 128 episodes, a2c 8 episodes." in text
    assert "The environment steps of a run differ in B-v0: npg 1M, a2c unknown." in text
    assert "differ" not in written(*both, out=tmp_path / "same")[1]


def test_ties_are_broken_by_the_area_under_the_curve(tmp_path):
    scores = {("A-v0", 0.1): [7.0, 7, 7]}
    paths = [make(tmp_path / name, scores) for name in ("slow", "fast")]
    third = tmp_path / "faster"
    with Store.open(third, {"agent": "ppo", "eval_episodes": 8}) as store:
        runs = [Run(f"r{s}", {"env": "A-v0"}, s, {"env": "A-v0"}) for s in range(3)]
        store.ledger.plan({"u": runs})
        ones = np.ones((3, 6))
        arrays = {"episode/count": ones, "episode/return_sum": 9 * ones}
        outcomes = [Outcome(run.run_id, "done", 7.0, 7.0) for run in runs]
        store.commit("u", arrays, None, outcomes, {"steps_per_update": 8})
    data = together.of_directories([*paths, third])
    assert [m.name for m in data.methods] == ["faster", "slow", "fast"]
    assert "Ties are broken by the area under the training curve." in data.notes


def test_figures_and_tables_lie_beside_the_page(both, tmp_path):
    page, text = written(*both, out=tmp_path / "deep" / "out")
    names = {path.name for path in page.parent.iterdir()}
    figures = {f"{name}.{end}" for name in ("curves", "ranking", "improvement", "profiles")
               for end in ("png", "svg")}  # fmt: skip
    assert (
        figures | {"index.html", "table.csv", "table.md", "curves.csv", "improvement.csv"} == names
    )
    assert "4 seeds are few" in text and "1 good" in text
    assert "good over a2c" in (page.parent / "improvement.svg").read_text()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["good", "good"], "good is named 2 times; name each result directory once."),
        (["good", "nothing"], "nothing is not a result directory"),
        (["good", "texts"], "texts has no environment"),
        (["good", "elsewhere"], "no environment that all directories have: .*elsewhere has 'C-v0'"),
        (["good", "harder"], "harder has 'A-v0, gravity 20', 'B-v0, gravity 20'"),
        (["good", "tokens"], "measure progress differently, in environment steps and in tokens"),
        (["good", "empty"], "empty has no finished run yet"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(names, message, both, tmp_path, capsys):
    make(tmp_path / "texts", {("", 0.1): [1.0, 2.0]})
    make(tmp_path / "elsewhere", {("C-v0", 0.1): [1.0, 2.0]})
    make(tmp_path / "harder", GOOD, env_params={"gravity": 20.0})
    make(tmp_path / "tokens", GOOD, unit="tokens")
    with Store.open(tmp_path / "empty", {"agent": "ppo"}) as store:
        store.ledger.plan({"u": [Run("r", {"env": "A-v0"}, 0, {})]})
    status = cli.main(["report", *(str(tmp_path / name) for name in names), "--out", "x"])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1
    with pytest.raises(InputError, match=message):
        together.of_directories([tmp_path / name for name in names])


def test_where_every_run_diverged_nothing_is_compared(tmp_path):
    paths = [make(tmp_path / name, {("A-v0", 0.1): [np.nan, np.nan]}) for name in "ab"]
    with pytest.raises(InputError, match="No run in A-v0 has a score"):
        together.of_directories(paths)


def test_a_comparison_from_the_command_line(both, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "good", "bad"]) == 0
    assert (tmp_path / "results" / "good-vs-bad" / "index.html").is_file()
    assert "Comparison: results/good-vs-bad/index.html" in capsys.readouterr().out
    assert cli.main(["report", "good", "--out", "x"]) == 2
    assert "--out is the directory of a comparison" in capsys.readouterr().err


def test_a_comparison_that_cannot_be_written(both, tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(FaultError, match="Cannot write the comparison"):
        written(*both, out=tmp_path / "out")
