"""Write the table of the study that compares methods at equal divergence.

    python experiments/rlhf/frontier.py results/frontier

writes frontier.csv, and copies frontier.png, which the sweep has drawn.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import results

# By stage: the field that was swept.
STAGES = {
    "ppo-gold": "beta",
    "ppo-learned": "beta",
    "rloo": "beta",
    "grpo": "beta",
    "dpo": "beta",
    "chosen": "num_updates",
}


def table(directory: Path) -> list[dict[str, Any]]:
    """Return a row for each stage and value: reward, divergence and the best possible reward."""
    rows = []
    for stage, field in STAGES.items():
        best = results.frontiers(directory, stage)
        runs = results.runs(directory, stage)
        for value in dict.fromkeys(run[field] for run in runs):
            own = [run for run in runs if run[field] == value]
            row = {"stage": stage, "field": field, "value": value}
            for name in ("return", "kl"):
                row |= results.ends(name, results.column(own, name))
            possible = [np.interp(run["kl"], *best[run["seed"]]) for run in own]
            rows.append({**row, "best possible": round(float(np.mean(possible)), 3)})
    return rows


def main() -> None:
    arguments = results.arguments(__doc__)
    results.write(arguments.out / "frontier.csv", table(arguments.directory))
    shutil.copyfile(arguments.directory / "frontier.png", arguments.out / "frontier.png")


if __name__ == "__main__":
    main()
