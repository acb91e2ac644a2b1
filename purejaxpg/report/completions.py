"""What language models wrote, and the frontier that their returns are compared with.

Both need the trainer's code, so a sweep makes them once, when it is finished, and keeps them in
DIR/completions.json. The report only reads them.
"""

import math
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purejaxpg import FaultError, contract, disk
from purejaxpg.report import figures, ranking
from purejaxpg.sweep.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "completions.json"
SHOWN = 20  # configurations with samples
SAMPLES = 8  # of each of them
# Scores that every trainer may have; the others are columns of their own.
RANKED = (contract.RETURN, contract.GREEDY_RETURN)


def keep(store: Store, trainer: types.ModuleType, file: Path | None) -> None:
    """Write samples and the frontier of a finished sweep, unless they are there.

    Args:
        store: an open result directory.
        trainer: its module; nothing is written if it has neither `samples` nor `frontier`.
        file: the trainer's file, if it is not one of the package.

    Raises:
        FaultError: a checkpoint is damaged, or the file cannot be written.
    """
    if not contract.writes_text(trainer) or read(store.path) is not None:
        return
    from purejaxpg import prng
    from purejaxpg.report import playback

    runs = {run["run_id"]: run for run in store.ledger.runs()}
    best = [c.run_ids for c in ranking.rank(store) if c.rank is not None][:SHOWN]
    firsts = [runs[own[0]] for own in best]
    of_seeds = {runs[run_id]["seed"]: runs[run_id] for own in best for run_id in own}
    key, quiet = prng.key(0), lambda _: None
    samples = [
        {"label": label(run), "columns": contract.samples(t.agent, key, t, SAMPLES)}
        for run, t in zip(firsts, playback.load_all(store, firsts, file, quiet), strict=True)
    ]
    trained = playback.load_all(store, list(of_seeds.values()), file, quiet)
    frontiers = [contract.frontier(t.agent, key, t) for t in trained]
    content = {"samples": samples, "frontiers": [f for f in frontiers if f is not None]}
    disk.write_hashed(store.path / FILE, content)


def read(root: Path) -> dict[str, Any] | None:
    """Return what `keep` wrote to a result directory; None if there is nothing intact."""
    try:
        return disk.read_hashed(root / FILE)
    except FaultError:
        return None


def label(run: Mapping[str, Any]) -> str:
    """Return the swept fields and the seed of a run."""
    swept = [f"{name} {value}" for name, value in run["swept"].items()]
    return ", ".join([*swept, f"seed {run['seed']}"])


def scores(store: Store) -> dict[str, dict[str, float]]:
    """Return the mean of every further score of each committed run, by run and name.

    Only trainers that score themselves have any.
    """
    means: dict[str, dict[str, float]] = {}
    runs = [run for run in store.ledger.runs() if run["score"] is not None]
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for run in runs:
        if ranking.environment_of(run):
            continue
        if run["unit"] not in arrays:
            arrays[run["unit"]] = store.arrays(run["unit"])
        means[run["run_id"]] = {
            name: float(np.mean(values[run["row"]]))
            for name, values in arrays[run["unit"]].items()
            if name.startswith(contract.EVALUATION) and name not in RANKED
        }
    return means


def draw(store: Store, means: Mapping[str, Mapping[str, float]]) -> "Figure | None":
    """Draw the return of each run over its divergence, and the frontier.

    Args:
        store: an open result directory.
        means: as `scores` returns them.

    Returns:
        The figure; None without divergences.
    """
    runs = {run["run_id"]: run for run in store.ledger.runs()}
    measured = {run_id for run_id, own in means.items() if contract.KL in own}
    ranked = [c for c in ranking.rank(store) if c.run_ids and measured.issuperset(c.run_ids)]
    if not ranked:
        return None
    figure, (axes,) = figures.make_panels(1, 1, (6.4, 4.4))
    for i, frontier in enumerate((read(store.path) or {}).get("frontiers", ())):
        name = "frontier" if i == 0 else None  # it may be an estimate
        axes.plot(frontier["kl"], frontier["return"], color="#555555", lw=1, label=name)
    points = []
    for configuration in ranked:
        x = [means[run_id][contract.KL] for run_id in configuration.run_ids]
        y = [runs[run_id]["score"] for run_id in configuration.run_ids]
        axes.plot(x, y, ".", color=figures.COLOURS[0], ms=5)
        points.append((float(np.mean(x)), float(np.mean(y)), configuration.label))
    points.sort()
    axes.plot(*zip(*[point[:2] for point in points], strict=True), color=figures.COLOURS[0], lw=1)
    for x_mean, y_mean, text in points:
        if math.isfinite(x_mean) and math.isfinite(y_mean):
            place: dict[str, Any] = {
                "textcoords": "offset points",
                "xytext": (5, -9),
                "fontsize": 7,
            }
            axes.annotate(text, (x_mean, y_mean), **place)
    axes.set_xlabel("KL to the reference (nats per completion)")
    axes.set_ylabel("return")
    axes.legend(frameon=False)
    return figure
