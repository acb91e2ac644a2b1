"""Write the table of the study that compares methods at equal divergence.

    python experiments/rlhf/frontier.py results/frontier

writes frontier.csv and frontier_best.csv, and copies frontier.png, which the sweep has drawn.
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


def best(directory: Path, points: int = 60) -> list[dict[str, float]]:
    """Return the best possible reward at each divergence, as the mean of the seeds.

    All stages share their references, seed by seed, so any of them has the lines.
    """
    lines = results.frontiers(directory, "dpo").values()
    ends = max(kl[0] for kl, _ in lines), min(kl[-1] for kl, _ in lines)
    over = np.geomspace(*ends, points)
    mean = np.mean([np.interp(over, *line) for line in lines], 0)
    return [
        {"kl": float(f"{kl:.4g}"), "best possible": round(float(reward), 3)}
        for kl, reward in zip(over, mean, strict=True)
    ]


def main() -> None:
    arguments = results.arguments(__doc__)
    results.write(arguments.out / "frontier.csv", table(arguments.directory))
    results.write(arguments.out / "frontier_best.csv", best(arguments.directory))
    shutil.copyfile(arguments.directory / "frontier.png", arguments.out / "frontier.png")


if __name__ == "__main__":
    main()
