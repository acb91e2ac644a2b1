"""Studies of language models run from their sweep file to their figure, at a reduced size."""

import csv
import os
import pathlib
import re

import forked
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
