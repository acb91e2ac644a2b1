"""What language models wrote, and the frontier that their returns are compared with.

Both need the trainer's code, so a sweep makes them once, when it is finished, and keeps them in
DIR/completions.json. The report only reads them.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purejaxpg import FaultError, InputError, contract, disk, trainers
from purejaxpg.report import figures, ranking
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "completions.json"
SHOWN = 20  # configurations with samples
SAMPLES = 8  # of each of them
# Scores that every trainer may have; the others are columns of their own.
RANKED = (contract.RETURN, contract.GREEDY_RETURN)


def keep(store: Store, spec: specs.Spec, say: Callable[[str], object]) -> None:
    """Write samples and frontiers of a finished sweep, unless they are there.

    A mistake in a trainer's `samples` or `frontier` costs these, and not the report.

    Args:
        store: an open result directory.
        spec: the sweep; nothing is written if its trainer has neither `samples` nor `frontier`.
        say: prints a line.

    Raises:
        FaultError: a checkpoint is damaged, or the file cannot be written.
    """
    if not contract.writes_text(spec.agent) or read(store.path) is not None:
        return
    runs = {run["run_id"]: run for run in store.ledger.runs()}
    best = [c.run_ids for c in ranking.rank(store) if c.rank is not None][:SHOWN]
    firsts = [runs[own[0]] for own in best]
    given = spec.given  # runs that share a reference share a frontier
    of_items = {
        given.items[runs[run_id]["seed"]] if given.by_seed else 0: runs[run_id]
        for own in best
        for run_id in own
    }
    try:
        disk.write_hashed(store.path / FILE, _written(store, spec, firsts, list(of_items.values())))
    except (InputError, FaultError):
        raise
    except Exception as error:  # in the trainer's own code
        kind = type(error).__name__
        say(f"Note: no samples and no frontier: {spec.agent_name} raised {kind}: {error}.")


def _written(
    store: Store, spec: specs.Spec, firsts: list[Any], of_items: list[Any]
) -> dict[str, Any]:
    """Return the samples of some runs and the frontiers of others."""
    from purejaxpg import prng
    from purejaxpg.report import playback

    own = trainers.is_path(spec.agent_name)
    load = functools.partial(
        playback.load_all,
        store,
        agent=Path(str(spec.agent.__file__)) if own else None,
        say=lambda _: None,
    )
    key = prng.key(0)
    samples = [
        {"label": label(t.run), "columns": contract.samples(t.agent, key, t, SAMPLES)}
        for t in (load(firsts) if hasattr(spec.agent, "samples") else ())
    ]
    frontiers = [contract.frontier(t.agent, key, t) for t in load(of_items)]
    return {"samples": samples, "frontiers": [f for f in frontiers if f is not None]}


def read(root: Path) -> dict[str, Any] | None:
    """Return what `keep` wrote to a result directory; None if there is nothing intact."""
    try:
        return disk.read_hashed(root / FILE)
    except FaultError:
        return None


def label(run: Mapping[str, Any]) -> str:
    """Return the swept fields and the seed of a run, and whether it is no finished, healthy one."""
    swept = [f"{name} {value}" for name, value in run["swept"].items()]
    stopped = [f"{run['stop']} of {run['total']} updates"] if run["stop"] < run["total"] else []
    diverged = ["diverged"] if run["status"] == "diverged" else []
    return ", ".join([*swept, f"seed {run['seed']}", *stopped, *diverged])


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
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return figure
