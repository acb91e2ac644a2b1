"""Studies of language models run from their sweep file to their figure, at a reduced size."""

import csv
import importlib
import os
import pathlib
import re
from typing import Any

import forked
import numpy as np
import pytest
import quick

STUDIES = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "rlhf"
ENVIRONMENT = {**os.environ, "XLA_FLAGS": quick.FLAGS}
LEAST = {"seeds": 1, "num_updates": 2, "eval_episodes": 8}


def rows_of(name: str, folder: pathlib.Path) -> list[dict[str, str]]:
    """Sweep a study for two updates and one seed, and draw it -> the rows of its table."""
    text = (STUDIES / f"{name}.toml").read_text(encoding="utf-8")
    for field, least in LEAST.items():
        text = re.sub(rf"\b{field} = \d+", f"{field} = {least}", text)
    if "eval_episodes" not in text:
        text = f"eval_episodes = {LEAST['eval_episodes']}\n{text}"
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    sweep = ("-m", "purejaxpg.cli", "sweep", f"{name}.toml", "--out", "out", "--quiet")
    for words in (sweep, (str(STUDIES / f"{name}.py"), "out", "--out", "drawn")):
        done = forked.run(*words, folder=folder, environment=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    assert (folder / "drawn" / f"{name}.png").stat().st_size > 5000
    with (folder / "drawn" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_over_optimisation(tmp_path: pathlib.Path) -> None:
    rows = rows_of("overoptimisation", tmp_path)
    single = [row for row in rows if row["chooser"] == "single"]
    assert [row["method"] for row in single].count("RL") == 7 and len(rows) == 14 + 6 * 3
    assert all(float(row["kl_end"]) < 0.1 for row in rows if row["method"] == "RL")
    best = max(float(row["gold_end"]) for row in rows if row["labels"] == "")
    assert all(float(row["gold_end"]) <= best for row in rows if row["method"] == "best-of-n")


@pytest.mark.slow
def test_right_answers(tmp_path: pathlib.Path) -> None:
    rows = {row["run"]: row for row in rows_of("addition", tmp_path)}
    assert len(rows) == 8
    for row in rows.values():
        rates = [float(row[f"pass@{k}"]) for k in (1, 4, 16)]
        assert 0 <= rates[0] <= rates[1] <= rates[2] <= 1
    # After two updates, there are too few right answers for lengths to be compared.
    assert 0 < float(rows["RLOO"]["entropy first"]) < 8 * np.log(20)


@pytest.fixture
def addition(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module("addition")


def test_lengths_of_right_and_wrong_answers_are_told_apart(addition: Any) -> None:
    updates = np.ones((2, 10))
    found = {
        "completion/right": np.array([[0.25], [0.0]]) * updates,
        "completion/right_length": np.array([[1.0], [0.0]]) * updates,
        "completion/length": np.array([[5.5], [6.0]]) * updates,
    }
    np.testing.assert_allclose(addition.lengths(found, right=True), [[4.0], [np.nan]])
    np.testing.assert_allclose(addition.lengths(found, right=False), [[6.0], [6.0]])
    table = addition.summaries({**found, "policy/entropy": 0.5 * updates})
    np.testing.assert_allclose(table["length of right"], [4.0, np.nan])
    np.testing.assert_allclose(table["length of wrong"], [6.0, np.nan])
    np.testing.assert_allclose(table["entropy last"], 0.5)


def test_in_a_table_a_mean_over_own_tokens_makes_wrong_answers_longer(addition: Any) -> None:
    constant, sequence = addition.ascent("constant"), addition.ascent("sequence")
    for name in ("right_length", "wrong_length"):
        np.testing.assert_allclose(constant[name], 6.0, rtol=1e-4)
    assert sequence["wrong_length"][-1] > 6.2 and sequence["right_length"][-1] < 5.7
    assert constant["right"][0] == sequence["right"][0] == pytest.approx(0.25, rel=1e-6)
    assert constant["right"][-1] > 0.98 and sequence["right"][-1] > 0.98


@pytest.mark.slow
def test_process_and_outcome_rewards(tmp_path: pathlib.Path) -> None:
    rows = rows_of("process", tmp_path)
    best = {(row["name"], int(row["n"])): row for row in rows if row["part"] == "best of N"}
    assert len(best) == 30 and sum(row["part"] == "policy" for row in rows) == 4
    right = {key: float(row["right"]) for key, row in best.items()}
    assert len({right[name, 1] for name, _ in best}) == 1  # one completion is no choice
    assert all(right[name, n] <= right["any", n] + 1e-4 for name, n in best)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module("process")


def test_the_best_of_n_is_chosen_in_each_group_and_ties_are_drawn(process: Any) -> None:
    found = {
        "right": np.array([[1.0, 0.0, 0.0, 1.0]]),
        "sound": np.array([[1.0, 0.0, 0.0, 0.0]]),
        "answer": np.array([[7, 7, 8, 9]]),
        "product": np.array([[0.1, 0.9, 0.2, 0.7]]),
        "outcome": np.array([[0.5, 0.5, 0.3, 0.3]]),
    }
    whole, halves = process.best_of(found, 4), process.best_of(found, 2)
    assert whole["product"]["right"] == 0 and halves["product"]["right"] == 0.5
    assert halves["product"]["trace_error"] == 1  # the one that is right is not sound
    assert whole["outcome"] == {"right": 0.5, "trace_error": 0.0}
    assert halves["outcome"] == {"right": 0.5, "trace_error": 0.5}
    assert whole["vote"] == {"right": 0.5, "trace_error": 0.0}  # two votes for 7
    assert whole["any"]["right"] == halves["any"]["right"] == 1
    for rate in process.best_of(found, 1).values():
        assert rate == {"right": 0.5, "trace_error": 0.5}


@pytest.mark.slow
def test_judges(tmp_path: pathlib.Path) -> None:
    rows = rows_of("rlaif", tmp_path)
    assert len(rows) == 11 and {row["labels"] for row in rows} >= {"", "50", "10,000, 40% wrong"}
    assert all(0 <= float(row["win"]) <= 1 and float(row["kl"]) >= 0 for row in rows)
    # Two updates leave the policies near the reference, where they started.
    assert all(float(row["kl"]) < 1 for row in rows)


@pytest.mark.slow
def test_revisions_and_feedback(tmp_path: pathlib.Path) -> None:
    rows = rows_of("constitution", tmp_path)
    assert [row["phase"] for row in rows] == ["revision"] * 8 + ["feedback"] * 4
    exact = [float(row["answers"]) for row in rows if row["critic"] == "exact rules"]
    assert len(exact) == 4 and exact == sorted(exact, reverse=True)


@pytest.mark.slow
def test_noisy_and_unbalanced_preferences(tmp_path: pathlib.Path) -> None:
    rows = rows_of("preferences", tmp_path)
    noisy = [row for row in rows if row["labels"] == "all labels"]
    assert len(noisy) == 3 * (3 + 2 + 2 + 3) + 4 and len(rows) == len(noisy) + 5 * 2
    assert all(float(row["kl"]) < 1 for row in rows)
