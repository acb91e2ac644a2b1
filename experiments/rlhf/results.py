"""Read what the stages of a study found, for its figure and its table."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purejaxpg import contract
from purejaxpg.report import completions
from purejaxpg.sweep.store import Store


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
