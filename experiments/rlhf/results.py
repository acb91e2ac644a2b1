"""Read what the stages of a study found, for its figure and its table."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import contract
from purejaxpg.report import completions
from purejaxpg.sweep.store import Store


def arguments(description: str | None) -> argparse.Namespace:
    """Read a script's arguments: the result `directory`, and the folder `out`, made if need be."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("directory", type=Path, help="the result directory of the study")
    parser.add_argument("--out", type=Path, default=Path(), help="where to write (default: here)")
    found = parser.parse_args()
    found.out.mkdir(parents=True, exist_ok=True)
    return found


def runs(directory: Path, stage: str) -> list[dict[str, Any]]:
    """Return the runs of a stage, one dictionary each.

    Args:
        directory: the result directory of the study.
        stage: the name of one of its stages.

    Returns:
        Of each committed run, in planned order: its swept fields, `seed`, `status`, `return` (the
        mean over evaluation episodes), and its further scores by their short names, such as `kl`.
    """
    with Store.read(directory / stage) as store:
        further = completions.scores(store)
        return [
            {
                **run["swept"],
                "seed": run["seed"],
                "status": run["status"],
                "return": run["score"],
                **{
                    name.removeprefix(contract.EVALUATION): value
                    for name, value in further.get(run["run_id"], {}).items()
                },
            }
            for run in store.ledger.runs()
            if run["score"] is not None
        ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def column(found: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Return one score of some runs, an entry each."""
    return np.array([run[name] for run in found], float)


def frontiers(directory: Path, stage: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return the best gold reward at each divergence from the reference of a stage.

    Args:
        directory: the result directory of the study.
        stage: the name of one of its stages, which is given references seed by seed.

    Returns:
        By seed, divergences in ascending order, and the best reward at each of them.
    """
    kept = completions.read(directory / stage) or {"frontiers": []}
    seeds = sorted({run["seed"] for run in runs(directory, stage)})
    return {
        seed: (np.array(found["kl"]), np.array(found["return"]))
        for seed, found in zip(seeds, kept["frontiers"], strict=True)
    }


def gaps(
    found: Sequence[dict[str, Any]], best: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Return the gold reward of runs less the best possible one at their divergence."""
    return np.array([run["return"] - np.interp(run["kl"], *best[run["seed"]]) for run in found])


def ends(name: str, values: np.ndarray) -> dict[str, float]:
    """Return the mean, the least and the largest of some values, as cells of a table."""
    found = {"": values.mean(), " low": values.min(), " high": values.max()}
    return {f"{name}{end}": round(float(value), 3) for end, value in found.items()}


def errors(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of such cells, [rows], and the distances to their ends, [2, rows]."""
    middle, low, high = (
        np.array([row[name + end] for row in rows], float) for end in ("", " low", " high")
    )
    return middle, np.stack([middle - low, high - middle])
