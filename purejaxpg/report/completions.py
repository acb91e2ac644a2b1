"""What language models wrote, how it was scored, and the frontier that returns are compared with.

Samples and frontier need the trainer's code, so a sweep makes them once, when it is finished, and
keeps them in DIR/completions.json. The report only reads them.
"""

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purejaxpg import FaultError, InputError, contract, disk, stats, trainers
from purejaxpg.report import figures, ranking
from purejaxpg.report.analysis import Confirmed
from purejaxpg.report.ranking import Configuration
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep.store import Store
from purejaxpg.text import estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "completions.json"
SHOWN = 20  # configurations with samples
SAMPLES = 8  # of each of them
LABELLED = 24  # configurations with a label in the figure
ROWS = 200  # configurations with further scores
# Scores that every trainer may have; the others are columns of their own.
RANKED = (contract.RETURN, contract.GREEDY_RETURN)
# The order of columns; other scores follow in alphabetical order.
FIRST = tuple(
    contract.EVALUATION + name
    for name in ("return", "gold_return", "proxy_return", "kl", "win", "length", "finished")
)
KL_LABEL = "KL to the reference (nats per completion)"
COLOUR, GREY = figures.COLOURS[0], "#7a7a7a"
MARKERS = "os^DvP"  # of stages in one figure


@dataclass(frozen=True)
class Mean:
    """A mean over runs with the ends of its 95% bootstrap interval; equal to it with one run."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """The mean with its interval, if it has one."""
        return estimate(self.value, self.low, self.high)


UNKNOWN = Mean(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Row:
    """The scores of one configuration.

    Attributes:
        name: its swept fields; its role comes first if it was run again on fresh seeds.
        configuration: what the ranking knows of it.
        runs: seed and scores, by name, of each committed run; those of a diverged run are NaN.
        means: over the runs, by name; not known if a run diverged.
    """

    name: str
    configuration: Configuration
    runs: tuple[tuple[int, Mapping[str, float]], ...]
    means: Mapping[str, Mean]

    @property
    def points(self) -> list[tuple[int, float, float]]:
        """Seed, divergence and return of each run in which both are finite."""
        points = [
            (seed, scores.get(contract.KL, math.nan), scores[contract.RETURN])
            for seed, scores in self.runs
        ]
        return [point for point in points if math.isfinite(point[1] + point[2])]

    @property
    def centre(self) -> tuple[Mean, Mean] | None:
        """The mean divergence and the mean return, if both are known."""
        means = self.means.get(contract.KL, UNKNOWN), self.means[contract.RETURN]
        return means if math.isfinite(means[0].value + means[1].value) else None


@dataclass(frozen=True)
class Texts:
    """What the report shows of trainers that score themselves, as those of language models do.

    Attributes:
        names: of all scores in the order of columns, the return first.
        rows: the configurations, best return first, then those on fresh seeds.
        frontiers: for each reference the lists `kl`, ascending, and `return`, and `exact`.
        samples: of each configuration a `label`, and `columns` of texts and rewards.
    """

    names: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    frontiers: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def titles(self) -> list[str]:
        """The names of the columns in plain words."""
        words = [name.removeprefix(contract.EVALUATION).replace("_", " ") for name in self.names]
        words = [re.sub(r"\bkl\b", "KL", word) for word in words]
        # Beside a divergence, it is the reward of the task, whatever the run was trained on.
        return ["gold return", *words[1:]] if contract.KL in self.names else words

    @functools.cached_property
    def drawn(self) -> list[Row]:
        """The rows of the frontier, by divergence."""
        return sorted((row for row in self.rows if row.points), key=_divergence)

    @property
    def frontier_lines(self) -> list[np.ndarray]:
        """The frontiers ``[2, K]``, divergence and return, a little farther than runs go."""
        reach = 1.3 * max((kl for row in self.rows for _, kl, _ in row.points), default=math.inf)
        lines = [np.array([each["kl"], each["return"]], float) for each in self.frontiers]
        return [line[:, : np.searchsorted(line[0], reach, "right") + 1] for line in lines]

    @property
    def best_possible(self) -> str:
        """The name of the frontier, which says whether it is exact."""
        exact = all(frontier.get("exact", False) for frontier in self.frontiers)
        return "best possible" if exact else "best possible (estimate)"

    @property
    def line(self) -> list[tuple[float, float]]:
        """The means by divergence, to be joined by a line; empty if several fields were swept."""
        fields = {tuple(row.configuration.swept) for row in self.drawn}
        if any(len(names) > 1 for names in fields):
            return []
        centres = [row.centre for row in self.drawn]
        return [(kl.value, score.value) for kl, score in filter(None, centres)]


NOTHING = Texts()


def _divergence(row: Row) -> float:
    return float(np.mean([kl for _, kl, _ in row.points]))


def keep(store: Store, spec: specs.Spec, say: Callable[[str], object], quiet: bool = False) -> None:
    """Write samples and frontiers of a finished sweep, unless they are there; again if it grew.

    A mistake in a trainer's `samples` or `frontier` costs these, and not the report.

    Args:
        store: an open result directory.
        spec: the sweep; nothing is written if its trainer has neither `samples` nor `frontier`.
        say: prints a line.
        quiet: do not announce it.

    Raises:
        FaultError: a checkpoint is damaged, or the file cannot be written.
    """
    kept = read(store.path)
    if not contract.writes_text(spec.agent) or (kept and kept.get("grown", 0) == len(spec.before)):
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
    if not quiet:
        say("Sampling completions and the best possible returns ...")
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
    found = [frontier for frontier in frontiers if frontier is not None]
    return {"samples": samples, "frontiers": found, "grown": len(spec.before)}


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


def of_store(
    store: Store, ranked: Sequence[Configuration], confirmed: Iterable[Confirmed] = ()
) -> Texts:
    """Return what the report shows of a sweep whose trainer scores itself.

    Args:
        store: an open result directory.
        ranked: its configurations.
        confirmed: those that were run again on fresh seeds.

    Returns:
        The scores, samples and frontiers; all of them empty if an environment scores the runs.
    """
    further = scores(store)
    known = {name for own in further.values() for name in own}
    if not known:
        return NOTHING
    order = {name: place for place, name in enumerate(FIRST)}
    names = sorted({contract.RETURN, *known}, key=lambda name: (order.get(name, len(order)), name))
    runs = {run["run_id"]: run for run in store.ledger.runs()}
    fresh = [
        (f"{each.name}, fresh seeds: {each.configuration.label}", each.configuration)
        for each in confirmed
    ]
    shown = [(c.label, c) for c in ranked[:ROWS] if c.finished] + fresh
    rows = [_row(name, c, names, runs, further) for name, c in shown]
    kept = read(store.path) or {}
    return Texts(tuple(names), tuple(rows), kept.get("frontiers", ()), kept.get("samples", ()))


def _row(
    name: str,
    configuration: Configuration,
    names: Sequence[str],
    runs: Mapping[str, Mapping[str, Any]],
    further: Mapping[str, Mapping[str, float]],
) -> Row:
    """Return the scores of one configuration."""
    own: list[tuple[int, dict[str, float]]] = []
    for run in (runs[run_id] for run_id in configuration.run_ids):
        scores = {contract.RETURN: run["score"], **further.get(run["run_id"], {})}
        lost = run["status"] == "diverged"
        own.append((run["seed"], {n: math.nan if lost else scores.get(n, math.nan) for n in names}))
    means = {n: _mean([scores[n] for _, scores in own]) for n in names}
    return Row(name, configuration, tuple(own), means)


def _mean(values: Sequence[float]) -> Mean:
    if not np.isfinite(values).all():
        return UNKNOWN
    mean = float(np.mean(values))
    low, high = stats.bootstrap_ci(np.asarray(values), np.mean)
    return Mean(mean, min(mean, float(low)), max(mean, float(high)))  # up to rounding


def comparable(stages: Mapping[str, Texts]) -> dict[str, Texts]:
    """Return the stages whose returns can be compared at equal divergence.

    They have divergences from a common reference, which they share if they share a frontier.

    Args:
        stages: what the reports of the stages show, by name.

    Returns:
        The most that share a reference; empty if no two of them do.
    """
    known = {name: t for name, t in stages.items() if any(row.centre for row in t.rows)}
    found = {name: set(map(_identity, texts.frontiers)) for name, texts in known.items()}
    counts = Counter(itertools.chain(*found.values())).most_common(1)
    if not counts or counts[0][1] < 2:
        return {}
    return {name: texts for name, texts in known.items() if counts[0][0] in found[name]}


def _identity(frontier: Mapping[str, Any]) -> str:
    """Return a frontier as text, equal for two that differ by rounding errors only."""
    return json.dumps([[f"{x:.4g}" for x in frontier[name]] for name in ("kl", "return")])


# ------------------------------------------------------------------------------------- the figures


def draw(texts: Texts) -> "Figure | None":
    """Draw the return of runs and configurations over their divergence, and the frontier.

    Args:
        texts: as `of_store` returns them.

    Returns:
        The figure; None without divergences.
    """
    if not texts.drawn:
        return None
    figure, axes = _panel(texts, 5.0)
    points = np.array([point[1:] for row in texts.drawn for point in row.points])
    axes.plot(*points.T, ".", color=COLOUR, ms=5, alpha=0.5, mew=0, zorder=3, label="a run")
    taken = _draw_means(axes, texts, COLOUR, "o", "mean of a configuration, 95% interval")
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    centres = [(row.name, *row.centre) for row in texts.drawn if row.centre]
    names = [(kl.value, score.value, name) for name, kl, score in centres[:LABELLED]]
    _label(axes, names, [*(line.T for line in texts.frontier_lines), *taken], points)
    return figure


def draw_together(stages: Mapping[str, Texts]) -> "Figure | None":
    """Draw the means of several stages over their divergence from a common reference.

    Args:
        stages: as `comparable` returns them.

    Returns:
        The figure; None without stages.
    """
    if not stages:
        return None
    (first, *_) = stages.values()
    frontiers = {_identity(each): each for texts in stages.values() for each in texts.frontiers}
    rows = tuple(row for texts in stages.values() for row in texts.rows)
    together = Texts(first.names, rows, tuple(frontiers.values()))
    figure, axes = _panel(together, 5.4)
    looks = zip(itertools.cycle(figures.MORE_COLOURS), itertools.cycle(MARKERS), strict=True)
    for (name, texts), (colour, marker) in zip(stages.items(), looks, strict=False):
        _draw_means(axes, texts, colour, marker, name)
    figures.legend_below(axes, 4)
    return figure


def _panel(texts: Texts, height: float) -> tuple["Figure", "Axes"]:
    """Return a figure of returns over divergences with nothing but the frontier."""
    figure, (axes,) = figures.make_panels(1, 1, (7.4, height))
    name = texts.best_possible
    for line in texts.frontier_lines:
        axes.plot(*line, color=GREY, lw=1.4, zorder=1, label=name)
        name = ""  # one entry of the legend for all
    figures.dress(axes, f"{texts.titles[0].capitalize()} over divergence")
    axes.set_xlabel(KL_LABEL)
    axes.set_ylabel(texts.titles[0])
    return figure, axes


def _draw_means(
    axes: "Axes", texts: Texts, colour: str, marker: str, label: str
) -> list[np.ndarray]:
    """Draw the means of configurations, joined by a line; return it and intervals, ``[n, 2]``."""
    line = np.array(texts.line).reshape(-1, 2)
    axes.plot(*line.T, color=colour, lw=1.2, alpha=0.5, zorder=2)
    centres = [row.centre for row in texts.drawn if row.centre]
    if not centres:
        return [line]
    ends = np.array([[(mean.value, mean.low, mean.high) for mean in pair] for pair in centres])
    (x, x_low, x_high), (y, y_low, y_high) = ends.transpose(1, 2, 0)
    axes.errorbar(
        x, y, xerr=np.stack([x - x_low, x_high - x]), yerr=np.stack([y - y_low, y_high - y]),
        fmt=marker, ms=5.5, color=colour, elinewidth=1.3, zorder=4, label=label,
    )  # fmt: skip
    across = np.stack([np.stack([x_low, y], 1), np.stack([x_high, y], 1)], 1)
    upright = np.stack([np.stack([x, y_low], 1), np.stack([x, y_high], 1)], 1)
    return [line, *across, *upright]


# Places of a label around its point: distances in points, each in eight directions.
_DISTANCES, _DIRECTIONS = (7, 16, 28, 42, 60), (-45, 0, 45, -90, 135, 180, 225, 90)


def _label(
    axes: "Axes",
    names: Sequence[tuple[float, float, str]],
    lines: Iterable[np.ndarray],
    points: np.ndarray,
) -> None:
    """Write names beside their points, where they cover no line, no point and no other name.

    Args:
        axes: with a legend; its limits are final.
        names: each with its place.
        lines: each ``[n, 2]``, to be kept free.
        points: ``[n, 2]``, to be kept free.
    """
    from matplotlib.text import Text

    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # decides where the axes are
    figure.set_layout_engine("none")
    dense = [_dense(axes.transData.transform(line)) for line in lines if len(line) > 1]
    covered = np.concatenate([*dense, axes.transData.transform(points)])
    legend: Any = axes.get_legend()
    taken = [legend.get_window_extent()]
    for x, y, text in names:
        for note in _candidates(axes, (x, y), figures.plain(text, 40)):
            note.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(note).padded(2)  # that of an annotation has its arrow
            inside = axes.bbox.fully_contains(*box.min) and axes.bbox.fully_contains(*box.max)
            if inside and not box.count_contains(covered) and not box.count_overlaps(taken):
                taken.append(box)
                break
            note.remove()


def _dense(line: np.ndarray) -> np.ndarray:
    """Return a line ``[n, 2]`` with a point at least every two pixels."""
    steps = np.abs(np.diff(line, axis=0)).max(1)
    counts = np.maximum(1, np.ceil(steps / 2)).astype(int)
    parts = [np.linspace(a, b, n) for a, b, n in zip(line, line[1:], counts, strict=False)]
    return np.concatenate(parts)


def _candidates(axes: "Axes", point: tuple[float, float], text: str) -> Iterator[Any]:
    """Yield a label at one place after the other, the best first."""
    for distance, angle in itertools.product(_DISTANCES, _DIRECTIONS):
        dx, dy = (distance * round(f(math.radians(angle)), 3) for f in (math.cos, math.sin))
        yield axes.annotate(
            text, point, (dx, dy), textcoords="offset points", fontsize=8,
            ha="left" if dx > 1 else "right" if dx < -1 else "center",
            va="bottom" if dy > 1 else "top" if dy < -1 else "center",
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6} if distance > 20 else None,
        )  # fmt: skip
