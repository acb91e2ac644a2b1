"""The table of returns: keep what sweeps found, and write the table and the figures from that.

    python experiments/returns.py                          # RESULTS.md and figures, in seconds
    python experiments/returns.py run ppo_cartpole         # one cell again: sweep, keep, write
    python experiments/returns.py run tuning/ppo_cartpole  # the choice of its setting again
    python experiments/returns.py keep results/ppo_cartpole results/tuning/ppo_cartpole
    python experiments/returns.py random                   # what random actions return

A study is a sweep file beside this one. `ppo_cartpole.toml` is one setting on fresh seeds,
`tuning/ppo_cartpole.toml` the search that chose it. README.md says how to challenge a cell.
"""

import argparse
import csv
import math
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import stats

HERE = Path(__file__).resolve().parent
AGENTS = {
    "reinforce": "REINFORCE", "a2c": "A2C", "npg": "NPG", "trpo": "TRPO", "ppo": "PPO",
    "ddpg": "DDPG", "sac": "SAC", "ppo_rnn": "PPO with a GRU",
}  # fmt: skip
ENVS = {
    "CartPole-v1": "cartpole", "Acrobot-v1": "acrobot", "MountainCar-v0": "mountaincar",
    "MountainCarContinuous-v0": "mountaincarcontinuous", "Pendulum-v1": "pendulum",
}  # fmt: skip
RUN = ("env", "seed", "status", "score", "greedy_score", "env_steps", "device_seconds")
POINT = ("env_steps", "iqm", "ci95_low", "ci95_high")
RANDOM = ("env", "random", "standard_error", "episodes")
SETTING = ("final_iqm", "ci95_low", "ci95_high", "final_greedy_iqm", "diverged", "runs_done")
SCORE = (
    "Environment", "Score [95% interval]", "Greedy", "Steps of a run", "Seeds", "Diverged", "Sweep",
)  # fmt: skip
SEARCHES = ("tuning", "sensitivity")  # folders of sweeps that try many settings
POINTS = 200  # of a kept curve, at most
Row = Mapping[str, Any]


# ------------------------------------------------------------------------------------------ files


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a table with these columns; others are left out."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def spec_of(study: str) -> dict[str, Any]:
    """Return a study's sweep file."""
    return tomllib.loads((HERE / f"{study}.toml").read_text(encoding="utf-8"))


@cache
def anchors() -> dict[str, Any]:
    """Return the best published returns."""
    return tomllib.loads((HERE / "runs" / "anchors.toml").read_text(encoding="utf-8"))


@cache
def others() -> dict[str, Any]:
    """Return what is known about gymnax's other environments."""
    return tomllib.loads((HERE / "runs" / "others.toml").read_text(encoding="utf-8"))


@cache
def random_returns() -> dict[str, float]:
    """Return what uniformly random actions return, by environment."""
    return {row["env"]: float(row["random"]) for row in read(HERE / "random.csv")}


def short(value: float) -> str:
    """Return a number with three digits, and all of those before the point."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def rounded(row: Row, names: Iterable[str]) -> dict[str, Any]:
    """Return some cells of a row; numbers with a point have five significant digits."""

    def cell(text: str) -> str:
        try:
            return f"{float(text):.5g}" if "." in text else text
        except ValueError:
            return text

    return {name: cell(row[name]) for name in names}


def keep(results: Path) -> str:
    """Copy what the table needs from the report of a sweep, and return the study's name."""
    study = study_of(results)
    (keep_search if "/" in study else keep_runs)(study, results / "report")
    print(f"Kept {study}.")
    return study


def study_of(results: Path) -> str:
    """Return the name of the study of a result directory, such as tuning/ppo_cartpole."""
    *_, folder, name = results.resolve().parts
    return f"{folder}/{name}" if folder in SEARCHES else name


def keep_search(study: str, report: Path) -> None:
    """Keep the settings that a search tried, and those that it ran again on further seeds."""
    tried = read(report / "table.csv")
    confirmed = report / "confirmed.csv"
    again = read(confirmed) if confirmed.exists() else []
    names = ("env", "rank", *swept_fields(tried), *SETTING)
    rows = [{"stage": "tune", **rounded(row, names)} for row in tried]
    rows += [{"stage": "confirm", **rounded(row, names)} for row in again]
    write(HERE / f"{study}.csv", ("stage", *names), rows)


def swept_fields(rows: Sequence[Row]) -> list[str]:
    """Return the columns of a table of settings that were swept."""
    names = list(rows[0])
    return [n for n in names[: names.index("final_iqm")] if n not in ("stage", "rank", "env")]


def keep_runs(study: str, report: Path) -> None:
    """Keep the runs of a setting and their learning curve."""
    write(HERE / "runs" / f"{study}.csv", RUN, (rounded(r, RUN) for r in read(report / "runs.csv")))
    points = [p for p in read(report / "curves.csv") if p["returns"] == "training"]
    if len({p["env"] for p in points}) > 1:
        return  # the table has no curves of sweeps over environments
    at = np.unique(np.linspace(0, len(points) - 1, POINTS).round().astype(int))
    write(HERE / "curves" / f"{study}.csv", POINT, (rounded(points[i], POINT) for i in at))


# ------------------------------------------------------------------------------------------ cells


@dataclass(frozen=True)
class Cell:
    """One setting of an agent on one environment, and what its runs reached."""

    study: str
    agent: str
    env: str
    rows: list[dict[str, str]]

    @cached_property
    def scores(self) -> np.ndarray:
        """Final return of each seed [seeds]; a diverged one counts as the worst of the others."""
        return self.filled("score")

    @cached_property
    def greedy(self) -> np.ndarray:
        """The same of the greedy policy."""
        return self.filled("greedy_score")

    def filled(self, column: str) -> np.ndarray:
        """Return a column of the runs, without holes."""
        values = [float(row[column] or "nan") for row in self.rows]
        return stats.worst_filled(values, [row["status"] == "diverged" for row in self.rows])

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the interquartile mean."""
        low, high = stats.bootstrap_ci(self.scores)
        return float(low), float(high)

    @property
    def name(self) -> str:
        """The agent's name; that of a file is its path."""
        return AGENTS.get(self.agent, self.agent)

    @property
    def steps(self) -> int:
        """Environment steps of a run."""
        return int(float(self.rows[0]["env_steps"]))

    @property
    def seconds(self) -> float:
        """Computing time of all runs on one core."""
        return sum(float(row["device_seconds"]) for row in self.rows)

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(row["status"] == "diverged" for row in self.rows)

    @property
    def score(self) -> str:
        """The score as a text, with its interval."""
        low, high = self.interval
        return f"{short(float(stats.iqm(self.scores)))} [{short(low)}, {short(high)}]"

    @cached_property
    def tuned(self) -> float | None:
        """The score that its setting had in the search that chose it."""
        path = HERE / "tuning" / f"{self.study}.csv"
        config = spec_of(self.study)["config"]
        rows = read(path) if path.exists() else []
        swept = swept_fields(rows) if rows else []
        for row in rows:
            if row["stage"] == "tune" and all(same(row[n], config.get(n)) for n in swept):
                return float(row["final_iqm"])
        return None


def same(swept: str, chosen: Any) -> bool:
    """Return whether a chosen value is a swept one, which was rounded to three digits."""
    if chosen is None:
        return False
    # Kept values have five digits, and rounding twice can end one digit off: allow half a digit.
    digit = 10.0 ** (math.floor(math.log10(abs(float(chosen)) or 1.0)) - 2)
    return abs(float(swept) - float(chosen)) <= 0.501 * digit


def cells() -> list[Cell]:
    """Return all cells with kept runs, in the order of the table."""
    found = []
    for path in sorted((HERE / "runs").glob("*.csv")):
        agent = spec_of(path.stem)["agent"]
        by_env: dict[str, list[dict[str, str]]] = {}
        for row in read(path):
            by_env.setdefault(row["env"], []).append(row)
        found += [Cell(path.stem, agent, env, rows) for env, rows in by_env.items()]
    order = {agent: place for place, agent in enumerate(AGENTS)}
    return sorted(found, key=lambda cell: (order.get(cell.agent, len(order)), cell.study))


# --------------------------------------------------------------------------------------- commands


def run(study: str) -> int:
    """Compute a study again, or resume it, and keep what it found -> exit status."""
    from purejaxpg import cli

    path, out = HERE / f"{study}.toml", HERE.parent / "results" / study
    # Eight further seeds choose among the three best settings of a search. On one device, units
    # have as many runs as when the cell was kept, so a machine of the same kind gives equal bits.
    tuning = study.startswith("tuning/")
    more = ["--confirm", "8"] if tuning else ["--devices", "1"]
    status = cli.main(["sweep", str(path), "--out", str(out), *more])
    if status == 0:
        keep(out)
    return status


def measure_random() -> None:
    """Measure random actions in all environments of the page, and store what they return."""
    import returns_random

    names = [env for env, known in anchors().items() if "about" in known]
    write(HERE / "random.csv", RANDOM, returns_random.measured([*names, *others()]))


def main() -> int:
    """Read the arguments, do as they say, and write the table -> exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = ("run", "keep", "random")
    parser.add_argument("command", nargs="?", choices=commands, help="what to do first")
    parser.add_argument("names", nargs="*", help="studies to run, or result directories to keep")
    found = parser.parse_args()
    if (found.command in ("run", "keep")) != bool(found.names):
        parser.error("run needs names of studies, keep those of result directories, random none.")
    if found.command == "random":
        measure_random()
    for name in found.names:
        if found.command == "keep":
            keep_or_explain(parser, Path(name))
        elif status := run(name.removesuffix(".toml")):
            return status
    import returns_page

    for path in returns_page.write():
        print(f"Wrote {path}.")
    return 0


def keep_or_explain(parser: argparse.ArgumentParser, results: Path) -> None:
    """Keep a result directory, or end with a sentence about what is missing."""
    if not (results / "report" / "table.csv").is_file():
        parser.error(f"{results} has no report; name the result directory of a finished sweep.")
    study = study_of(results)
    if not (HERE / f"{study}.toml").is_file():
        parser.error(f"{results} belongs to no sweep file here; there is no {study}.toml.")
    if any(row["status"] == "pending" for row in read(results / "report" / "runs.csv")):
        parser.error(f"{results} is not finished; resume its sweep first.")
    keep(results)


if __name__ == "__main__":
    sys.exit(main())
