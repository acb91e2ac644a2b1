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
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    sweep = ("-m", "purejaxpg.cli", "sweep", f"{name}.toml", "--out", "out", "--quiet")
    for words in (sweep, (str(STUDIES / f"{name}.py"), "out", "--out", "drawn")):
        done = forked.run(*words, folder=folder, environment=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    assert (folder / "drawn" / f"{name}.png").stat().st_size > 5000
    with (folder / "drawn" / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_right_answers(tmp_path: pathlib.Path) -> None:
    rows = {row["run"]: row for row in rows_of("addition", tmp_path)}
    assert len(rows) == 8
    for row in rows.values():
        rates = [float(row[f"pass@{k}"]) for k in (1, 4, 16)]
        assert 0 <= rates[0] <= rates[1] <= rates[2] <= 1
    assert 1 <= float(rows["RLOO"]["length of wrong"]) <= 8


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


def test_in_a_table_a_mean_over_own_tokens_makes_wrong_answers_longer(addition: Any) -> None:
    constant, sequence = addition.ascent("constant"), addition.ascent("sequence")
    for name in ("right_length", "wrong_length"):
        np.testing.assert_allclose(constant[name], 6.0, rtol=1e-4)
    assert sequence["wrong_length"][-1] > 6.2 and sequence["right_length"][-1] < 5.7
    assert constant["right"][0] == sequence["right"][0] == pytest.approx(0.25, rel=1e-6)
    assert constant["right"][-1] > 0.98 and sequence["right"][-1] > 0.98
