import csv
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from purejaxpg import FaultError, InputError
from purejaxpg.report import analysis, charts, export, writer
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_the_stores(halved_in_part, tmp_path):
    path = export.write(halved_in_part, tmp_path / "runs.csv", curves=False)
    rows = read(path)
    with Store.read(halved_in_part) as store:
        runs = store.ledger.runs()
    assert [row["run_id"] for row in rows] == [run["run_id"] for run in runs]
    assert {row["status"] for row in rows} == {"stopped", "done", "pending"}
    for row, run in zip(rows, runs, strict=True):
        assert list(row) == [
            "run_id", "stage", "env", "status", "seed", "num_steps", "learning_rate", "score",
            "greedy_score", "diverged_at", "updates", "total_updates", "unit",
        ]  # fmt: skip
        assert row["env"] == "CartPole-v1" and row["diverged_at"] == ""
        for name in ("stage", "status", "unit"):
            assert row[name] == run[name]
        for name in ("score", "greedy_score"):
            assert float(row[name]) == run[name]  # to the last bit, and of pending runs as before
        assert float(row["learning_rate"]) == run["swept"]["learning_rate"]
        assert int(row["seed"]) == run["seed"]
        assert int(row["total_updates"]) == run["total"] == 32 // run["swept"]["num_steps"]
        assert int(row["updates"]) == (run["total"] if row["status"] == "done" else run["stop"])


def test_curves_are_the_stores_leg_after_leg(halved_in_part, tmp_path):
    rows = read(export.write(halved_in_part, tmp_path / "curves.csv", curves=True))
    by_run = {}
    for row in rows:
        by_run.setdefault(row["run_id"], []).append(row)
    with Store.read(halved_in_part) as store:
        done = [unit["name"] for unit in store.ledger.units() if unit["done"]]
        arrays = {name: store.arrays(name) for name in done}
        legs = [leg for leg in store.ledger.legs() if leg["unit"] in done]
        lengths = {run["run_id"]: export.updates(run) for run in store.ledger.runs()}
    assert len(legs) > len(lengths)  # some runs have two legs
    assert {run_id: len(own) for run_id, own in by_run.items()} == lengths
    metrics = [name for name in arrays[done[0]] if not name.startswith("evaluation/")]
    assert list(rows[0]) == ["run_id", "update", "env_steps", *metrics]
    for run_id, own in by_run.items():
        assert [int(row["update"]) for row in own] == list(range(1, lengths[run_id] + 1))
    for leg in legs:
        own = by_run[leg["run_id"]][leg["start"] : leg["stop"]]
        per_update = 2 * leg["swept"]["num_steps"]
        assert [float(row["env_steps"]) / per_update for row in own] == list(
            range(leg["start"] + 1, leg["stop"] + 1)
        )
        for name in metrics:
            found = np.array([row[name] for row in own], np.float32)
            np.testing.assert_array_equal(found, arrays[leg["unit"]][name][leg["row"]])


def evaluated(path):
    """A run of four updates in two legs, evaluated after the second and the last."""
    rows = {
        "one": ({"episode/return_sum": [[2.0, 4.0]], "episode/count": [[1, 1]]}, [[np.nan, 7.0]]),
        "two": ({"episode/return_sum": [[6.0, 8.0]], "episode/count": [[1, 1]]}, [[np.nan, 9.0]]),
    }
    facts = {"steps_per_update": 10, "steps_before": 5, "env_steps": 20}
    with Store.open(path, {"agent": "ppo"}) as store:
        for index, (unit, (arrays, returns)) in enumerate(rows.items()):
            start = 2 * index
            leg = Run(
                "r", {}, 0, {}, start=start, stop=start + 2, total=4, parent="r" if index else None
            )
            store.ledger.plan({unit: [leg]}, index)
            arrays = {name: np.array(values, np.float32) for name, values in arrays.items()}
            arrays |= {"evaluated/return": np.array(returns, np.float32)}
            arrays |= {"evaluation/return": np.full((1, 4), 9.0, np.float32)}
            store.commit(unit, arrays, None, [Outcome("r", "done", 9.0, 9.0)], facts)
    return path


def test_evaluations_within_training_are_exported_and_drawn(tmp_path):
    path = evaluated(tmp_path / "out")
    rows = read(export.write(path, tmp_path / "curves.csv", curves=True))
    assert [row["evaluated/return"] for row in rows] == ["nan", "7.0", "nan", "9.0"]
    with Store.read(path) as store:
        data = analysis.of_store(store)
    (drawn,) = data.sections[0].curves.evaluated
    assert drawn.steps.tolist() == [25, 45] and drawn.centre.tolist() == [7, 9]
    figure = charts.curves(data.sections[0].curves, data.unit)
    (dashed,) = [t for t in figure["data"] if t.get("line", {}).get("dash") == "dash"]
    solid = next(t for t in figure["data"] if t["y"] == [2, 4, 6, 8])
    assert (dashed["x"], dashed["y"]) == ([25, 45], [7, 9])
    assert dashed["line"]["color"] == solid["line"]["color"] and solid["x"] == [10, 20, 30, 40]
    writer.write(path, Console(quiet=True))
    rows = read(path / "report" / "curves.csv")
    points = {(row["returns"], row["env_steps"]): float(row["iqm"]) for row in rows}
    assert points["evaluation", "25.0"] == 7 and points["training", "10.0"] == 2
    assert len(points) == 6
    assert "of evaluations within training (dashed)" in (path / "report" / "index.html").read_text(
        "utf-8"
    )


def test_default_files_stand_beside_the_ledger(halved_in_part):
    assert export.write(halved_in_part, None, curves=False) == halved_in_part / "export.csv"
    assert export.write(halved_in_part, None, curves=True) == halved_in_part / "export-curves.csv"
    assert not list(halved_in_part.glob(".*.tmp"))


@pytest.mark.parametrize("curves", [False, True])
def test_parquet_holds_the_same(halved_in_part, tmp_path, curves):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table = pandas.read_parquet(export.write(halved_in_part, tmp_path / "t.parquet", curves))
    text = pandas.read_csv(export.write(halved_in_part, tmp_path / "t.csv", curves))
    assert list(table) == list(text) and len(table) == len(text) > 0
    for name in table:
        expected = text[name].to_numpy()
        if table[name].dtype.kind == "f":
            expected = expected.astype(table[name].dtype)
        np.testing.assert_array_equal(table[name].to_numpy(), expected)


def synthetic(path, swept):
    """Two runs in two units, of which the first is committed and diverged."""
    runs = [Run(f"run{i}", {"env": "E"}, i, swept, stop=3, total=3) for i in range(2)]
    with Store.open(path, {}) as store:
        store.ledger.plan({"a": runs[:1], "b": runs[1:]})
        arrays = {"loss/x": np.array([[0.1, np.nan, np.inf]], np.float32)}
        outcome = Outcome("run0", "diverged", np.nan, 2.0, 2)
        facts = {"steps_per_update": 10, "steps_before": 7}
        store.commit("a", arrays, None, [outcome], facts)
    return path


def test_diverged_and_pending_runs_and_odd_values(tmp_path):
    out = synthetic(tmp_path / "s", {"env": "E", "hidden": [64, 64], "seed": 3})
    first, second = read(export.write(out, None, curves=False))
    assert first["hidden"] == "[64, 64]"
    assert (first["seed"], first["swept.seed"]) == ("0", "3")
    assert (first["score"], first["greedy_score"], first["diverged_at"]) == ("nan", "2.0", "2")
    assert (second["status"], second["score"], second["updates"]) == ("pending", "", "0")
    rows = read(export.write(out, None, curves=True))
    assert [row["env_steps"] for row in rows] == ["17", "27", "37"]
    assert [row["loss/x"] for row in rows] == ["0.1", "nan", "inf"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    out = synthetic(tmp_path / "s", {})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    pytest.importorskip("pandas")
    with pytest.raises(FaultError, match=r"A Parquet file needs .* 'pyarrow<27"):
        export.write(out, tmp_path / "x.parquet", curves=False)
    assert not list(tmp_path.glob("*x.parquet*"))


def test_errors_are_sentences(tmp_path):
    with pytest.raises(InputError, match="not a result directory"):
        export.write(tmp_path, None, curves=False)
    out = synthetic(tmp_path / "s", {})
    with pytest.raises(InputError, match=r"must end in \.csv or \.parquet, but is '.*x\.xlsx'"):
        export.write(out, tmp_path / "x.xlsx", curves=False)
    (tmp_path / "file").touch()
    with pytest.raises(FaultError, match=r"Cannot write .*x\.csv"):
        export.write(out, tmp_path / "file" / "x.csv", curves=False)


def test_missing_folders_are_made(tmp_path):
    out = synthetic(tmp_path / "s", {})
    path = tmp_path / "new" / "folder" / "x.csv"
    assert export.write(out, path, curves=False) == path
    assert path.is_file()


def test_needs_neither_jax_nor_xarray():
    code = (
        "import sys, purejaxpg.sweep, purejaxpg.report.export\n"
        "assert not {'jax', 'xarray', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
