"""The results of a sweep as tidy tables in CSV or Parquet.

Nothing here is ranked or averaged: one row is one run, or one update of one run.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import config as configs
from purejaxpg import contract, disk, extras
from purejaxpg.report import ranking
from purejaxpg.sweep.store import Store

EVALUATION = contract.EVALUATION  # prefix of arrays with one value per episode, not per update


def write(directory: str | os.PathLike[str], out: Path | None = None, curves: bool = False) -> Path:
    """Write the runs of a sweep as a table, or their training metrics.

    Args:
        directory: a result directory; units may still be pending.
        out: the file to write, whose name ends in ``.csv`` or ``.parquet``; by default
            ``DIR/export.csv`` or ``DIR/export-curves.csv``. A missing folder is made.
        curves: write one row per run and update with every metric, instead of one row per run. The
            legs of a run come in order; legs of other runs may come between them.

    Returns:
        The path of the file.

    Raises:
        InputError: there is no result directory at this path, or the file's name ends otherwise.
        FaultError: a result is damaged, the file cannot be written, or Parquet needs a package
            that is not installed.
    """
    writers = {".csv": _write_csv, ".parquet": _write_parquet}
    configs.require(
        out is None or out.suffix in writers,
        f"The table must end in .csv or .parquet, but is {str(out)!r}.",
    )
    with Store.read(directory) as store:
        target = out or store.path / ("export-curves.csv" if curves else "export.csv")
        names, blocks = _curves(store) if curves else _runs(store)
        with disk.faults("write", target):
            temporary = target.with_name(f".{target.name}.tmp")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                writers[target.suffix](temporary, names, blocks)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
    return target


def updates(run: dict[str, Any]) -> int:
    """Return the number of committed updates of a run."""
    return int(run["start"] if run["score"] is None else run["stop"])


def plain(value: Any) -> Any:
    """Return a swept value as one cell: lists as JSON, a missing value as None."""
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value


def swept_columns(runs: Sequence[dict[str, Any]], taken: Sequence[str]) -> dict[str, str]:
    """Return the column of each swept field but ``env``, with a prefix if its name is taken."""
    fields = dict.fromkeys(name for run in runs for name in run["swept"] if name != contract.ENV)
    return {name: f"swept.{name}" if name in taken else name for name in fields}


# -------------------------------------------------------------------------------------- the tables

# A table: the names of its columns, and blocks of rows that hold one array or list per column.
Blocks = Iterator[list[Any]]
_BEFORE = ("run_id", "stage", "env", "status", "seed")
_AFTER = ("score", "greedy_score", "diverged_at", "updates", "total_updates", "unit")


def _runs(store: Store) -> tuple[list[str], Blocks]:
    """Return one row per run, in planned order."""
    runs = store.ledger.runs()
    swept = swept_columns(runs, (*_BEFORE, *_AFTER))
    before, after = ([[cell(run, n) for run in runs] for n in names] for names in (_BEFORE, _AFTER))
    own = [[plain(run["swept"].get(name)) for run in runs] for name in swept]
    return [*_BEFORE, *swept.values(), *_AFTER], iter([[*before, *own, *after]])


def cell(run: dict[str, Any], name: str) -> Any:
    """Return a run's value in a column; a few are named otherwise or missing in the ledger."""
    if name == contract.ENV:
        return ranking.environment_of(run)
    return updates(run) if name == "updates" else run[{"total_updates": "total"}.get(name, name)]


def _curves(store: Store) -> tuple[list[str], Blocks]:
    """Return one row per run and update: one block per leg."""
    facts = {unit["name"]: unit["facts"] for unit in store.ledger.units() if unit["done"]}
    # Agents may log other metrics under other static fields, so ask all units.
    names = sorted({name for unit in facts for name in _metrics(store, unit)})
    return ["run_id", "update", "env_steps", *names], _leg_blocks(store, facts, names)


def _leg_blocks(store: Store, facts: dict[str, dict[str, Any]], names: Sequence[str]) -> Blocks:
    """Yield the rows of each committed leg, reading one unit at a time."""
    unit, arrays = "", dict[str, np.ndarray]()
    for leg in store.ledger.legs():
        if leg["unit"] not in facts:
            continue
        if leg["unit"] != unit:
            unit, arrays = leg["unit"], _metrics(store, leg["unit"])
        length = next((array.shape[1] for array in arrays.values()), 0)
        number = leg["start"] + np.arange(1, length + 1)
        missing = np.full(length, np.nan, np.float32)
        metrics = [arrays[name][leg["row"]] if name in arrays else missing for name in names]
        yield [[leg["run_id"]] * length, number, env_steps(facts[unit], number), *metrics]


def env_steps(facts: dict[str, Any], number: np.ndarray) -> np.ndarray:
    """Return the environment steps after updates with these numbers; NaN if unrecorded."""
    per_update = facts.get("steps_per_update")
    if per_update is None:
        return np.full(number.shape, np.nan)
    return np.asarray(facts.get("steps_before", 0) + number * per_update)


def _metrics(store: Store, unit: str) -> dict[str, np.ndarray]:
    """Return the training metrics ``[rows, updates]`` of a unit."""
    arrays = store.arrays(unit)
    return {name: array for name, array in arrays.items() if not name.startswith(EVALUATION)}


# --------------------------------------------------------------------------------------- the files


def _write_csv(path: Path, names: Sequence[str], blocks: Blocks) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for columns in blocks:
            # A float32 is written with the digits of a float32: 0.3 instead of 0.30000001192.
            text = [
                column.astype(str) if isinstance(column, np.ndarray) else column
                for column in columns
            ]
            writer.writerows(zip(*text, strict=True))


def _write_parquet(path: Path, names: Sequence[str], blocks: Blocks) -> None:
    pandas = extras.load("pandas", "analysis", "A Parquet file")
    extras.load("pyarrow", "analysis", "A Parquet file")
    frames = [pandas.DataFrame(dict(zip(names, columns, strict=True))) for columns in blocks]
    table = pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(columns=names)
    # A column without any value yet, such as `diverged_at`, still holds numbers.
    unknown = [name for name in names if table[name].isna().all()]
    table = table.astype(dict.fromkeys(unknown, "float64"))
    table.to_parquet(path, engine="pyarrow", index=False)
