"""The report of a sweep: configurations ranked over their seeds, as a table and as curves.

Runs with equal swept fields are one configuration. The score of a run is its mean return over the
evaluation after the last update; the score of a configuration is the interquartile mean over its
seeds. A diverged run counts as the worst of its environment. Training returns are drawn, but never
used for the ranking.
"""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purejaxpg import checkpoint
from purejaxpg.sweep import stats
from purejaxpg.sweep.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

SHOWN = 20  # rows of a section on the terminal and in table.md; table.csv has all
_HIGHLIGHTED = 5  # curves in colour
_BINS = 60
_CURVE_RESAMPLES = 500
# Okabe and Ito's colours, told apart under the common forms of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_GREY = "#c9c9c9"
_METRICS = ("episode/return_sum", "episode/count")


@dataclass(frozen=True)
class Configuration:
    """What one configuration achieved over its seeds, in one environment.

    Attributes:
        rank: from 1, within the environment; None until a run of it is committed.
        environment: the ``env`` of its runs; empty where they have none.
        swept: the swept fields without the environment.
        scores: final score of each committed run ``[n]``, diverged ones filled in as the worst.
        iqm: interquartile mean of ``scores``.
        low: lower end of its 95% bootstrap interval; equal to ``iqm`` with one run.
        high: upper end.
        mean: mean of ``scores``.
        greedy_iqm: interquartile mean of the final scores of the greedy policy.
        diverged: how many of the committed runs diverged.
        planned: how many runs the sweep plans for it.
        run_ids: the committed runs, in the order of ``scores``.
    """

    rank: int | None
    environment: str
    swept: dict[str, Any]
    scores: tuple[float, ...]
    iqm: float
    low: float
    high: float
    mean: float
    greedy_iqm: float
    diverged: int
    planned: int
    run_ids: tuple[str, ...]

    @property
    def finished(self) -> int:
        """The number of committed runs."""
        return len(self.scores)

    @property
    def label(self) -> str:
        """The swept fields in short, such as ``learning_rate 3e-4, clip_eps 0.2``."""
        return (
            ", ".join(f"{name} {short(value)}" for name, value in self.swept.items()) or "all runs"
        )


def rank(store: Store) -> list[Configuration]:
    """Rank the configurations of a sweep, best first.

    Args:
        store: an open result directory.

    Returns:
        All configurations, environment by environment in planned order, best first within each;
        those without a committed run come last and have no rank.

    Raises:
        FaultError: the ledger cannot be read.
    """
    environments: dict[str, list[dict[str, Any]]] = {}
    for run in store.runs():
        environments.setdefault(_environment(run), []).append(run)
    return [c for name, runs in environments.items() for c in _rank_environment(name, runs)]


def best_row(store: Store, environment: str | None = None) -> Configuration | None:
    """Return the best configuration, of one environment or of the first one.

    Args:
        store: an open result directory.
        environment: its name; None takes the first in planned order.

    Returns:
        The configuration of rank 1, or None while no run is committed.

    Raises:
        FaultError: the ledger cannot be read.
    """
    first = (c for c in rank(store) if c.rank == 1 and environment in (None, c.environment))
    return next(first, None)


def write(directory: str | os.PathLike[str], console: "Console") -> Path:
    """Print the ranking and write it, with the learning curves, to ``DIR/report``.

    Args:
        directory: a result directory; units may still be pending.
        console: where to print; the width of the table adapts to it.

    Returns:
        The path of the report: ``table.csv`` with every configuration and full precision,
        ``table.md`` with the best, and ``curves.png`` where the runs recorded episodes.

    Raises:
        InputError: there is no result directory at this path.
        FaultError: a result is damaged, or the report cannot be written.
    """
    with Store.read(directory) as store:
        target = store.path / "report"
        with checkpoint.faults("write the report", target):
            target.mkdir(exist_ok=True)
            ranked = rank(store)
            notes = _notes(store, ranked)
            _print(ranked, notes, console)
            _write_csv(target / "table.csv", ranked)
            (target / "table.md").write_text(_markdown(ranked, notes), encoding="utf-8")
            drawn = _draw(store, ranked, target / "curves.png")
    files = "table.csv, table.md and curves.png" if drawn else "table.csv and table.md"
    console.print(f"Wrote {files} to {target}", markup=False, highlight=False, soft_wrap=True)
    return target


# ---------------------------------------------------------------------------------------- ranking


def _environment(run: dict[str, Any]) -> str:
    return str(run["config"].get("env", ""))


def _key(run: dict[str, Any]) -> str:
    """Return what tells configurations apart: all swept fields, in their order."""
    return json.dumps([_environment(run), run["swept"]], sort_keys=True)


def _rank_environment(name: str, runs: list[dict[str, Any]]) -> list[Configuration]:
    """Return the ranked configurations of one environment."""
    done = [run for run in runs if run["status"] != "pending"]
    diverged = [run["status"] == "diverged" for run in done]
    filled = {}
    for field in ("score", "greedy_score"):
        values = stats.worst_filled([run[field] for run in done], diverged)
        filled[field] = dict(zip((run["run_id"] for run in done), values.tolist(), strict=True))
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    found = [_configuration(name, group, filled) for group in groups.values()]
    # A stable sort: ties keep the planned order.
    found.sort(key=lambda c: (c.finished == 0, -c.iqm, -c.mean) if c.finished else (True, 0.0, 0.0))
    return [replace(c, rank=index + 1 if c.finished else None) for index, c in enumerate(found)]


def _configuration(
    name: str, runs: list[dict[str, Any]], filled: dict[str, dict[str, float]]
) -> Configuration:
    """Return the statistics of one configuration from its runs and the filled scores."""
    done = [run for run in runs if run["status"] != "pending"]
    run_ids = tuple(run["run_id"] for run in done)
    scores = tuple(filled["score"][run_id] for run_id in run_ids)
    centre = low = high = mean = greedy = float("nan")
    if scores:
        centre, mean = float(stats.iqm(scores)), float(np.mean(scores))
        greedy = float(stats.iqm([filled["greedy_score"][run_id] for run_id in run_ids]))
        low = high = centre
    if len(scores) > 1 and np.isfinite(scores).all():
        low, high = (float(end) for end in stats.bootstrap_ci(scores))
    return Configuration(
        rank=None,
        environment=name,
        swept={key: value for key, value in runs[0]["swept"].items() if key != "env"},
        scores=scores,
        iqm=centre,
        low=low,
        high=high,
        mean=mean,
        greedy_iqm=greedy,
        diverged=sum(run["status"] == "diverged" for run in done),
        planned=len(runs),
        run_ids=run_ids,
    )


def _sections(ranked: Iterable[Configuration]) -> dict[str, list[Configuration]]:
    """Return the configurations by environment, in order."""
    sections: dict[str, list[Configuration]] = {}
    for configuration in ranked:
        sections.setdefault(configuration.environment, []).append(configuration)
    return sections


def _notes(store: Store, ranked: list[Configuration]) -> list[str]:
    """Return the sentences that say what the numbers are, and what is missing."""
    committed = [unit["name"] for unit in store.units() if unit["done"]]
    episodes = _episodes(store, committed[0]) if committed else None
    number = f"{episodes} " if episodes else ""
    notes = [
        f"Final return: IQM over seeds of the mean of {number}stochastic evaluation episodes "
        "after the last update, with a 95% bootstrap interval over seeds; greedy: the same with "
        "greedy actions."
    ]
    if not committed:
        return ["No run is finished yet."]
    cut = sum(_cut_episodes(store, unit) for unit in committed)
    if cut:
        notes.append(f"{cut} evaluation episodes were cut short and count as they stood.")
    if any(c.diverged for c in ranked):
        notes.append("Diverged runs count as the worst score of their environment.")
    missing = sum(c.planned - c.finished for c in ranked)
    if missing:
        total = sum(c.planned for c in ranked)
        notes.append(f"Unfinished: {missing} of {total} runs are missing from this report.")
    if max((len(section) for section in _sections(ranked).values()), default=0) > 1:
        notes.append(
            "The best of many looks better than it is: run the winner again on fresh seeds before "
            "quoting its number."
        )
    return notes


def _cut_episodes(store: Store, unit: str) -> int:
    """Return how many stochastic evaluation episodes were still running at the last step."""
    found = store.arrays(unit, ["evaluation/finished"])
    return sum(int((~array.astype(bool)).sum()) for array in found.values())


def _episodes(store: Store, unit: str) -> int | None:
    """Return how many stochastic evaluation episodes each run had, as far as recorded."""
    name = "evaluation/return"
    found = store.arrays(unit, [name])
    return int(found[name].shape[1]) if name in found and found[name].ndim == 2 else None


# ----------------------------------------------------------------------------------------- tables


def short(value: Any) -> str:
    """Return a value the way one would write it by hand: ``3e-4`` for ``0.00030000001``.

    Args:
        value: a swept value.

    Returns:
        At most four significant digits for a float, otherwise its plain text.
    """
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(short(item) for item in value) + "]"
    if not isinstance(value, float):
        return str(value)
    if value == 0.0 or not np.isfinite(value) or 1e-2 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _decimals(section: Sequence[Configuration]) -> int:
    """Return one number of decimals for all scores of a section, so that a column lines up."""
    values = [abs(v) for c in section for v in (c.iqm, c.low, c.high, c.mean) if np.isfinite(v)]
    largest = max(values, default=1.0)
    return 1 if largest >= 100 else 2 if largest >= 1 else 4


def _cells(configuration: Configuration, fields: Sequence[str], decimals: int) -> list[str]:
    """Return one row of the table as text."""
    c = configuration

    def score(value: float) -> str:
        return f"{value:.{decimals}f}" if np.isfinite(value) else "-"

    interval = f"[{score(c.low)}, {score(c.high)}]" if c.finished > 1 else "-"
    missing = "" if c.finished == c.planned else f" of {c.planned}"
    return [
        "-" if c.rank is None else str(c.rank),
        *(short(c.swept.get(name, "-")) for name in fields),
        score(c.iqm),
        interval,
        score(c.mean),
        score(c.greedy_iqm),
        f"{c.diverged}/{c.finished}{missing}",
    ]


_HEADERS = ("IQM", "95% CI", "mean", "greedy", "diverged")


def _fields(ranked: Iterable[Configuration]) -> list[str]:
    """Return the names of all swept fields, in order of appearance."""
    return list(dict.fromkeys(name for c in ranked for name in c.swept))


def _title(environment: str, section: Sequence[Configuration]) -> str:
    runs = sum(c.planned for c in section)
    noun = "configuration" if len(section) == 1 else "configurations"
    text = f"{len(section)} {noun}, {runs} {'run' if runs == 1 else 'runs'}"
    return f"{environment}: {text}" if environment else text


def _more(section: Sequence[Configuration]) -> str | None:
    hidden = len(section) - SHOWN
    return f"{hidden} more in table.csv" if hidden > 0 else None


def _print(ranked: list[Configuration], notes: list[str], console: "Console") -> None:
    """Print one table per environment, then the notes."""
    for environment, section in _sections(ranked).items():
        console.print(_table(environment, section))
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _table(environment: str, section: list[Configuration]) -> "Table":
    """Return the best rows of one environment as a rich table."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    fields, decimals = _fields(section), _decimals(section)
    more = _more(section)
    # Text objects throughout: swept values such as [64, 64] must not be read as markup.
    table = Table(
        title=Text(_title(environment, section)),
        caption=Text(more) if more else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    rows = [_cells(configuration, fields, decimals) for configuration in section[:SHOWN]]
    for header, *column in zip(("rank", *fields, *_HEADERS), *rows, strict=True):
        # On a narrow terminal headers may wrap; a value is never squeezed away.
        widest = max(len(cell) for cell in column)
        table.add_column(Text(header), justify="right", min_width=min(widest, 24), overflow="fold")
    for i, row in enumerate(rows):
        style = "bold" if i == 0 and len(section) > 1 else None
        table.add_row(*(Text(cell) for cell in row), style=style)
    return table


def _markdown(ranked: list[Configuration], notes: list[str]) -> str:
    """Return the same tables as Markdown."""
    lines: list[str] = []
    for environment, section in _sections(ranked).items():
        fields, decimals = _fields(section), _decimals(section)
        headers = ["rank", *fields, *_HEADERS]
        lines += [f"### {_title(environment, section)}", "", _markdown_row(headers)]
        lines.append("|" + " ---: |" * len(headers))
        lines += [_markdown_row(_cells(c, fields, decimals)) for c in section[:SHOWN]]
        more = _more(section)
        lines += ["", f"{more}.", ""] if more else [""]
    return "\n".join(lines + [line for note in notes for line in (note, "")])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _write_csv(path: Path, ranked: list[Configuration]) -> None:
    """Write every configuration with full precision."""
    fields = _fields(ranked)
    own = ["final_iqm", "ci95_low", "ci95_high", "final_mean", "final_greedy_iqm"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rank", "env", *fields, *own, "diverged", "runs_done", "runs_planned"])
        for c in ranked:
            swept = [c.swept.get(name, "") for name in fields]
            numbers = [c.iqm, c.low, c.high, c.mean, c.greedy_iqm, c.diverged]
            rank_text = "" if c.rank is None else c.rank
            writer.writerow([rank_text, c.environment, *swept, *numbers, c.finished, c.planned])


# ----------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class _Curve:
    """The training return of one run: ``steps [bins]`` at bin centres and ``returns [bins]``."""

    steps: np.ndarray
    returns: np.ndarray


def _curves(store: Store) -> dict[str, _Curve]:
    """Return the binned training curve of every committed run that recorded episodes."""
    by_unit: dict[str, list[str]] = {}
    for run in store.runs():
        by_unit.setdefault(run["unit"], []).append(run["run_id"])
    curves = {}
    for unit in store.units():
        per_update = (unit["facts"] or {}).get("steps_per_update")
        if not unit["done"] or per_update is None:
            continue
        arrays = store.arrays(unit["name"], _METRICS)
        if len(arrays) < len(_METRICS):
            continue
        return_sum, count = (arrays[name] for name in _METRICS)
        steps, returns = bin_returns(return_sum, count, per_update)
        for run_id, row in zip(by_unit[unit["name"]], returns, strict=True):
            curves[run_id] = _Curve(unit["facts"].get("steps_before", 0) + steps, row)
    return curves


def bin_returns(
    return_sum: np.ndarray, count: np.ndarray, steps_per_update: float, bins: int = _BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Average the returns of the episodes that ended in each bin of updates.

    Every episode weighs the same, however many end in one update. A bin in which no episode ended
    repeats the one before it in the same run, and is NaN where there is none.

    Args:
        return_sum: sum of the returns of the episodes that ended in an update ``[rows, updates]``.
        count: how many ended ``[rows, updates]``.
        steps_per_update: environment steps of one update.
        bins: the largest number of bins; fewer updates give one bin each.

    Returns:
        Environment steps at the centre of each bin ``[bins]``, and mean returns ``[rows, bins]``.
    """
    updates = return_sum.shape[1]
    edges = np.linspace(0, updates, min(bins, updates) + 1).round().astype(int)
    sums = np.add.reduceat(return_sum.astype(np.float64), edges[:-1], axis=1)
    counts = np.add.reduceat(count.astype(np.float64), edges[:-1], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(counts > 0, sums / counts, np.nan)
    known = np.where(np.isfinite(means), np.arange(means.shape[1]), 0)
    latest = np.maximum.accumulate(known, axis=1)
    centres = (edges[:-1] + edges[1:]) / 2 * steps_per_update
    return centres, np.take_along_axis(means, latest, axis=1)


def _over_seeds(returns: np.ndarray) -> np.ndarray:
    """Return the IQM over runs ``[runs, bins] -> [bins]``, where at least half of them have one."""
    known = np.isfinite(returns)
    enough = known.sum(axis=0) * 2 >= returns.shape[0]
    centre = np.full(returns.shape[1], np.nan)
    for column in np.flatnonzero(enough):
        centre[column] = stats.iqm(returns[known[:, column], column])
    return centre


def _interval(returns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95% bootstrap interval of ``_over_seeds``, lower and upper end ``[bins]``."""
    known = np.isfinite(returns)
    low, high = np.full((2, returns.shape[1]), np.nan)
    for column in np.flatnonzero(known.sum(axis=0) * 2 >= returns.shape[0]):
        runs = returns[known[:, column], column]
        low[column], high[column] = stats.bootstrap_ci(runs, resamples=_CURVE_RESAMPLES)
    return low, high


def _draw(store: Store, ranked: list[Configuration], path: Path) -> bool:
    """Draw one panel of curves per environment; False where no run recorded any."""
    curves = _curves(store)
    drawable = [c for c in ranked if any(run_id in curves for run_id in c.run_ids)]
    if not drawable:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sections = _sections(drawable)
    across = min(3, len(sections))
    down = -(-len(sections) // across)
    # Built without pyplot, so that no display is asked for and no global figure is kept.
    figure = Figure(figsize=((10.0, 11.5, 15.0)[across - 1], 5.7 * down), dpi=140)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (environment, section) in zip(grid, sections.items(), strict=False):
        _draw_section(axes, section, curves)
        _dress(axes, environment, section)
        _legend(axes, len(section), roomy=across == 1)
    for axes in grid[len(sections) :]:
        axes.set_visible(False)
    for axes in grid[::across]:
        axes.set_ylabel("episode return (training, stochastic policy)", fontsize=11)
    figure.savefig(path)
    return True


def _stack(configuration: Configuration, curves: dict[str, _Curve]) -> _Curve:
    """Return the curves of a configuration's runs, ``returns [runs, bins]``."""
    found = [curves[run_id] for run_id in configuration.run_ids if run_id in curves]
    return _Curve(found[0].steps, np.stack([curve.returns for curve in found]))


def _draw_section(axes: "Axes", section: list[Configuration], curves: dict[str, _Curve]) -> None:
    """Draw one environment: the best in colour with intervals, the others in grey."""
    best, others = section[:_HIGHLIGHTED], section[_HIGHLIGHTED:]
    # Hundreds of lines would otherwise close to a solid area.
    faint: dict[str, Any] = {
        "color": _GREY,
        "linewidth": 0.8,
        "alpha": 1.0 if len(others) <= 50 else 0.4,
    }
    for configuration in others:
        curve = _stack(configuration, curves)
        axes.plot(curve.steps, _over_seeds(curve.returns), zorder=1, **faint)
    # The best last, so that it lies on top.
    for configuration, colour in reversed(list(zip(best, _COLOURS, strict=False))):
        curve = _stack(configuration, curves)
        low, high = _interval(curve.returns)
        axes.fill_between(curve.steps, low, high, color=colour, alpha=0.14, linewidth=0, zorder=2)
        axes.plot(
            curve.steps,
            _over_seeds(curve.returns),
            color=colour,
            linewidth=2.0,
            zorder=3,
            label=_legend_label(configuration),
        )
    if others:
        noun = "other" if len(others) == 1 else "others"
        axes.plot([], [], color=_GREY, linewidth=1.2, label=f"{len(others)} {noun}")


def _legend_label(configuration: Configuration) -> str:
    c = configuration
    failed = f" ({c.diverged} of {c.finished} diverged)" if c.diverged else ""
    return f"{c.rank}.  {c.label}{failed}"


def _dress(axes: "Axes", environment: str, section: list[Configuration]) -> None:
    """Give a panel its title, labels and ticks."""
    from matplotlib.ticker import EngFormatter

    seeds = max(c.finished for c in section)
    over = f"IQM of {seeds} seeds, shaded: 95% interval" if seeds > 1 else "one seed"
    axes.set_title(environment or "Training", loc="left", fontsize=14, fontweight="bold", pad=24)
    axes.text(0, 1.03, over, transform=axes.transAxes, fontsize=10, color="#555555")
    axes.set_xlabel("environment steps", fontsize=11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: "Axes", count: int, roomy: bool) -> None:
    """List the coloured curves under the panel, from the best to the worst."""
    handles, labels = axes.get_legend_handles_labels()
    coloured = min(count, _HIGHLIGHTED)
    # They were drawn from the worst to the best.
    order = [*range(coloured - 1, -1, -1), *range(coloured, len(handles))]
    legend = axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="upper left",
        bbox_to_anchor=(0.0, -0.15),
        borderaxespad=0.0,
        ncols=2 if roomy and max(map(len, labels)) < 60 else 1,
        frameon=False,
        fontsize=10,
        title="rank by final return",
        title_fontsize=10,
        alignment="left",
    )
    legend.get_title().set_color("#555555")
