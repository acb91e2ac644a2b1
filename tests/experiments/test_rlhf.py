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
def test_over_optimisation(tmp_path: pathlib.Path) -> None:
    rows = rows_of("overoptimisation", tmp_path)
    single = [row for row in rows if row["chooser"] == "single"]
    assert [row["method"] for row in single].count("RL") == 7 and len(rows) == 14 + 6 * 3
    assert all(float(row["kl_end"]) < 0.1 for row in rows if row["method"] == "RL")
    best = max(float(row["gold_end"]) for row in rows if row["labels"] == "")
    assert all(float(row["gold_end"]) <= best for row in rows if row["method"] == "best-of-n")
