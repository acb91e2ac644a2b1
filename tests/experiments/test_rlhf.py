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


def rows_of(name: str, folder: pathlib.Path) -> list[dict[str, str]]:
    """Sweep a study for two updates and one seed, and draw it -> the rows of its table."""
    text = (STUDIES / f"{name}.toml").read_text(encoding="utf-8")
    for field, least in (("seeds", 1), ("num_updates", 2)):
        text = re.sub(rf"\b{field} = \d+", f"{field} = {least}", text)
    (folder / f"{name}.toml").write_text(f"eval_episodes = 8\n{text}", encoding="utf-8")
    sweep = ("-m", "purejaxpg.cli", "sweep", f"{name}.toml", "--out", "out", "--quiet")
    for words in (sweep, (str(STUDIES / f"{name}.py"), "out", "--out", "drawn")):
        done = forked.run(*words, folder=folder, environment=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    assert (folder / "drawn" / f"{name}.png").stat().st_size > 5000
    with (folder / "drawn" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
