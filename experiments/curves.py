"""Keep the learning curves and the scores of sweeps: the pages about the algorithms show them.

    purejaxpg sweep experiments/ppo_cartpole.toml
    python experiments/curves.py results/ppo_cartpole

For a sweep of one configuration, named after its file here. Its curve goes to `curves/STUDY.csv`,
its score into the line of its study in `curves/AGENT_scores.csv`.
"""

import csv
import pathlib
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence

HERE = pathlib.Path(__file__).resolve().parent
CURVES = HERE / "curves"
POINT = ("env_steps", "iqm", "ci95_low", "ci95_high")
SCORE = (
    "Sweep", "Environment", "Steps of a run", "Seeds", "Score [95% interval]", "Greedy", "Diverged",
)  # fmt: skip


def read(path: pathlib.Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: pathlib.Path, names: Sequence[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Write a table with these columns; others are left out."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def short(number: str) -> str:
    """Return a number with three digits, and all of those before the point."""
    value = float(number)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def score(study: str, row: Mapping[str, str]) -> dict[str, str]:
    """Return the line about a study, from that of its only configuration in the report."""
    steps = float(row["env_steps"]) / int(row["runs_done"])
    interval = f"[{short(row['ci95_low'])}, {short(row['ci95_high'])}]"
    values = (
        study, row["env"], f"{steps:,.0f}", row["runs_done"],
        f"{short(row['final_iqm'])} {interval}", short(row["final_greedy_iqm"]), row["diverged"],
    )  # fmt: skip
    return dict(zip(SCORE, values, strict=True))


def keep(results: pathlib.Path) -> None:
    """Copy what the pages show from the report of a sweep."""
    study = results.resolve().name
    spec = tomllib.loads((HERE / f"{study}.toml").read_text(encoding="utf-8"))
    (row,) = read(results / "report" / "table.csv")
    points = [p for p in read(results / "report" / "curves.csv") if p["returns"] == "training"]
    rounded = [{name: f"{float(p[name]):.5g}" for name in POINT} for p in points]
    write(CURVES / f"{study}.csv", POINT, rounded)
    target = CURVES / f"{spec['agent']}_scores.csv"
    kept = {line["Sweep"]: line for line in read(target)} if target.exists() else {}
    kept[study] = score(study, row)
    write(target, SCORE, [kept[name] for name in sorted(kept)])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        keep(pathlib.Path(argument))
