"""The figures of the report as files: PNG to look at, SVG to edit and to print.

They are drawn without pyplot, which would need a display and keep global figures.
"""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purejaxpg import disk
from purejaxpg.report.analysis import (
    Analysis,
    Axis,
    Curves,
    Pair,
    Profile,
    Schedule,
    Section,
    readable,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from purejaxpg.report.together import Together

# Okabe and Ito's colours, told apart under the common forms of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MORE_COLOURS = (*COLOURS, "#56B4E9", "#222222")
_GREY = "#c9c9c9"
_SOFT = "#555555"
_AXES = 8


def write(data: Analysis, directory: Path) -> list[str]:
    """Write every figure that the results allow as PNG and as SVG.

    Args:
        data: the results.
        directory: an existing directory.

    Returns:
        The names of the PNG files.
    """
    drawn = {
        "curves": _curves(data),
        "importance": _importance(data),
        "marginals": _marginals(data),
        "heat_maps": _heat_maps(data),
        "profiles": _profiles(data.profile),
        "sensitivity": _sensitivity(data),
        "schedule": _schedule(data.schedules),
    }
    made = {name: figure for name, figure in drawn.items() if figure is not None}
    return [save_both(figure, directory, name)[0].name for name, figure in made.items()]


def write_together(data: "Together", directory: Path) -> list[str]:
    """Write the figures of several result directories as PNG and as SVG.

    Args:
        data: the comparison.
        directory: an existing directory.

    Returns:
        The names of the PNG files.
    """
    kind = "normalised final return" if data.normalized else "final return"
    drawn = {
        "curves": _curves_together(data),
        "ranking": _forest(
            [(m.name, m.iqm, m.low, m.high) for m in data.methods],
            "Ranking", f"IQM of the {kind}, with 95% interval",
        ),
        "improvement": _forest(
            [(each.over, each.value, each.low, each.high) for each in data.improvements],
            "Probability of improvement", "with 95% interval", 0.5,
        ),
        "profiles": _profiles(data.profile),
    }  # fmt: skip
    made = {name: figure for name, figure in drawn.items() if figure is not None}
    return [save_both(figure, directory, name)[0].name for name, figure in made.items()]


def save(figure: "Figure", path: Path) -> None:
    """Write a figure; equal results give equal files.

    Raises:
        FaultError: it cannot be written.
    """
    import matplotlib

    settings: Any = {"svg.hashsalt": "purejaxpg", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings(), disk.faults("write", path):
        # A letter that the font lacks becomes a box, and long names may overlap.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def save_both(figure: "Figure", directory: Path, name: str) -> list[Path]:
    """Write a figure as PNG and as SVG -> both files."""
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    for path in paths:
        save(figure, path)
    return paths


def make_panels(count: int, most: int, size: tuple[float, float]) -> tuple["Figure", list["Axes"]]:
    """Return a figure with `count` panels.

    Args:
        count: how many panels.
        most: panels in a row, at most.
        size: width and height of a panel in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(most, count)
    down = -(-count // across)
    figure = Figure(figsize=(size[0] * across, size[1] * down), dpi=140)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    grid = list(figure.subplots(down, across, squeeze=False).flatten())
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, grid[:count]


def legend_below(axes: "Axes", columns: int, **more: Any) -> Any:
    """Return a legend that is placed under a panel."""
    place: Any = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.15), "borderaxespad": 0.0}
    return axes.legend(ncols=columns, frameon=False, fontsize=10, **place, **more)


def plain(text: str, most: int = 110) -> str:
    """Return a text of bounded length in which matplotlib finds no formula."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    whole = printable if len(printable) <= most else f"{printable[: most - 1]}…"
    return whole.replace("$", r"\$")


def _tick(text: str) -> str:
    return plain(text, 24)


def dress(axes: "Axes", title: str, under: str = "") -> None:
    """Give a panel its title and a quiet frame."""
    pad = 24 if under else 8
    axes.set_title(plain(title, 50), loc="left", fontsize=14, fontweight="bold", pad=pad)
    axes.text(0, 1.03, plain(under, 60), transform=axes.transAxes, fontsize=10, color=_SOFT)
    axes.grid(axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# ----------------------------------------------------------------------------------------- curves


def _curves(data: Analysis) -> "Figure | None":
    """Draw one panel of curves per environment; None if no run recorded any."""
    sections = [(section, section.curves) for section in data.sections if section.curves]
    if not sections:
        return None
    width = (10.0, 5.75, 5.0)[min(3, len(sections)) - 1]
    figure, grid = make_panels(len(sections), 3, (width, 5.7))
    for axes, (section, curves) in zip(grid, sections, strict=True):
        _draw_curves(axes, curves)
        seeds = max(c.finished for c in section.ranked)
        over = f"IQM of {seeds} seeds, shaded: 95% interval" if seeds > 1 else "one seed"
        dress(axes, section.environment or "Training", over)
        axes.set_xlabel(plain(data.unit, 40), fontsize=11)
        _count_steps(axes)
        _legend(axes, len(curves.best), roomy=len(sections) == 1)
    for axes in grid[:: min(3, len(sections))]:
        axes.set_ylabel("episode return (training, stochastic policy)", fontsize=11)
    return figure


def _count_steps(axes: "Axes") -> None:
    """Count steps on the axis from 0, as in 50k."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.01)
    axes.set_xlim(left=0)


def _draw_curves(axes: "Axes", curves: Curves) -> None:
    """Draw one environment: the best in colour with intervals, the others in grey."""
    if curves.quantiles is None:
        for _, steps, centre in curves.others:
            axes.plot(steps, centre, color=_GREY, linewidth=0.8, zorder=1)
    if curves.quantiles is not None and curves.grid is not None:
        q5, q25, q50, q75, q95 = curves.quantiles
        for low, high in ((q5, q95), (q25, q75)):
            axes.fill_between(curves.grid, low, high, color=_GREY, alpha=0.45, linewidth=0)
        axes.plot(curves.grid, q50, color="#8a8a8a", linewidth=1.2, linestyle=":")
    # The best last, so that it lies on top.
    for line, colour in reversed(list(zip(curves.best, itertools.cycle(MORE_COLOURS)))):
        axes.fill_between(
            line.steps, line.low, line.high, color=colour, alpha=0.14, linewidth=0, zorder=2
        )
        label = plain(line.label)
        axes.plot(line.steps, line.centre, color=colour, linewidth=2.0, zorder=3, label=label)
    for own, colour in zip(curves.evaluated, itertools.cycle(MORE_COLOURS)):
        if own is not None:
            axes.plot(own.steps, own.centre, "o--", color=colour, linewidth=1.2, markersize=4)
    if curves.others:
        noun = "other" if len(curves.others) == 1 else "others"
        what = ": median, middle half, 5% to 95%" if curves.quantiles is not None else ""
        axes.plot([], [], color=_GREY, linewidth=1.2, label=f"{len(curves.others)} {noun}{what}")


def _legend(axes: "Axes", coloured: int, roomy: bool) -> None:
    """List the coloured curves under the panel, from the best to the worst."""
    handles, labels = axes.get_legend_handles_labels()
    # They were drawn from the worst to the best.
    order = [*range(coloured - 1, -1, -1), *range(coloured, len(handles))]
    legend = legend_below(
        axes,
        2 if roomy and max(map(len, labels)) < 60 else 1,
        handles=[handles[i] for i in order],
        labels=[labels[i] for i in order],
        title="rank by final return",
        title_fontsize=10,
        alignment="left",
    )
    legend.get_title().set_color(_SOFT)


def _curves_together(data: "Together") -> "Figure":
    """Draw one panel of curves per environment, one line per method."""
    figure, grid = make_panels(len(data.environments), 3, (4.8, 3.8))
    for axes, name in zip(grid, data.environments, strict=True):
        lines = data.curves[name].best
        _draw_curves(axes, Curves(tuple(replace(line, label=line.name) for line in lines)))
        dress(axes, name)
        axes.set_xlabel(plain(data.unit, 40))
        _count_steps(axes)
    for axes in grid[::3]:
        axes.set_ylabel("episode return (training)")
    handles, labels = grid[0].get_legend_handles_labels()
    place: Any = {"loc": "outside lower center", "ncols": 4, "frameon": False}
    figure.legend(handles[::-1], labels[::-1], **place)
    return figure


# ------------------------------------------------------------------------------------- importance


def _with_axes(data: Analysis) -> list[Section]:
    return [section for section in data.sections if section.effects.axes]


def _importance(data: Analysis) -> "Figure | None":
    """Draw the share of variance of each hyperparameter, one panel per environment."""
    sections = _with_axes(data)
    if not sections:
        return None
    most = max(len(section.effects.axes) for section in sections)
    figure, grid = make_panels(len(sections), 3, (6.0, 1.4 + 0.5 * most))
    for panel, section in zip(grid, sections, strict=True):
        axes = section.effects.axes
        places = np.arange(len(axes))
        shares = np.array([axis.share for axis in axes])
        ends = np.array([[axis.low, axis.high] for axis in axes]).T
        panel.barh(places, 100 * shares, height=0.45, color=COLOURS[0], label="for the score")
        panel.hlines(places, *(100 * ends), color="#222222", linewidth=1.4)
        top = 100 * np.nan_to_num(np.array([axis.top_share for axis in axes]))
        panel.barh(
            places + 0.34, top, height=0.2, color=COLOURS[4], label="for being in the best quarter"
        )
        panel.set_yticks(places, [_tick(axis.name) for axis in axes])
        panel.invert_yaxis()
        dress(panel, section.environment or "Importance", "main effects, with 95% interval")
        panel.grid(axis="x", color="#ececec")
        panel.grid(visible=False, axis="y")
        panel.set_xlim(left=0)
        panel.set_xlabel("share of the variance of scores, %")
        panel.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def _marginals(data: Analysis) -> "Figure | None":
    """Draw the score over each hyperparameter."""
    panels = [(s, axis) for s in _with_axes(data) for axis in s.effects.axes[:_AXES]][:24]
    if not panels:
        return None
    widest = max(len(section.effects.axes) for section, _ in panels)
    figure, grid = make_panels(len(panels), min(4, max(widest, 2)), (3.6, 3.1))
    for panel, (section, axis) in zip(grid, panels, strict=True):
        _draw_marginal(panel, axis, section.effects.scores)
        name = f"{section.environment} · " if len(data.sections) > 1 else ""
        dress(panel, "", f"{name}{axis.name}")
        panel.set_ylabel("final return")
    return figure


def _draw_marginal(panel: "Axes", axis: Axis, scores: np.ndarray) -> None:
    """Draw configurations, mean with interval and the best at each level."""
    levels = axis.levels
    centres = np.arange(len(levels.labels)) if levels.centres is None else levels.centres
    chosen = np.linspace(0, scores.size - 1, min(scores.size, 400)).round().astype(int)
    panel.plot(levels.values[chosen], scores[chosen], ".", color=_GREY, markersize=3, zorder=1)
    line = "-" if levels.centres is not None else ""
    panel.errorbar(
        centres,
        axis.effects,
        axis.errors,
        color=COLOURS[0],
        marker="o",
        markersize=4,
        linestyle=line,
    )
    shown = np.concatenate([scores[chosen], axis.effects, axis.best])
    panel.set_ylim(*readable(float(shown.min()), float(shown.max())))
    panel.plot(centres, axis.best, "D:", color=COLOURS[1], markersize=4, linewidth=1)
    if levels.log:
        panel.set_xscale("log")
    if levels.centres is None:
        panel.set_xticks(centres, [_tick(label) for label in levels.labels])


def _heat_maps(data: Analysis) -> "Figure | None":
    """Draw mean scores over the most important pairs."""
    panels = [(s, pair) for s in _with_axes(data) for pair in s.effects.pairs][:12]
    if not panels:
        return None
    figure, grid = make_panels(len(panels), 3, (4.8, 4.0))
    for panel, (section, pair) in zip(grid, panels, strict=True):
        image = _draw_pair(panel, pair)
        figure.colorbar(image, ax=panel, label="mean final return")
        name = section.environment if len(data.sections) > 1 else ""
        panel.set_title(plain(name, 40), loc="left", fontsize=11, fontweight="bold")
    return figure


def _draw_pair(panel: "Axes", pair: Pair) -> Any:
    image = panel.imshow(pair.means, origin="lower", aspect="auto", cmap="cividis")
    panel.set_yticks(range(len(pair.rows.labels)), [_tick(t) for t in pair.rows.labels])
    ticks = [_tick(text) for text in pair.columns.ticks]
    panel.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right")
    panel.set_ylabel(plain(pair.first, 40))
    panel.set_xlabel(plain(pair.second, 40))
    return image


# ------------------------------------------------------------------------------------ whole sweeps


def _profiles(profile: Profile | None) -> "Figure | None":
    """Draw the performance profiles."""
    if profile is None:
        return None
    figure, (axes,) = make_panels(1, 1, (7.0, 4.6))
    for (label, share, low, high), colour in zip(profile.lines, itertools.cycle(MORE_COLOURS)):
        axes.fill_between(profile.thresholds, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(profile.thresholds, share, color=colour, linewidth=2, label=plain(label))
    dress(axes, "Performance profiles", "with pointwise 95% band")
    axes.set_ylabel("share of runs above τ")
    axes.set_xlabel("normalised final return τ" if profile.normalized else "final return τ")
    axes.legend(frameon=False)
    return figure


def _forest(
    rows: Sequence[tuple[str, float, float, float]],
    title: str,
    under: str,
    middle: float | None = None,
) -> "Figure | None":
    """Draw values with their intervals below each other; None without any.

    Args:
        rows: name, value, lower and upper end, from top to bottom.
        title: of the figure.
        under: what the values are.
        middle: a value to compare with; it gets a line, and the axis runs from 0 to 1.
    """
    if not rows:
        return None
    figure, (axes,) = make_panels(1, 1, (7.0, 1.6 + 0.42 * len(rows)))
    colours = MORE_COLOURS if middle is None else COLOURS[:1]
    for place, ((_, value, low, high), colour) in enumerate(zip(rows, itertools.cycle(colours))):
        axes.hlines(place, low, high, color=colour, linewidth=2.4)
        axes.plot([value], [place], "o", color=colour, markersize=8)
    axes.set_xlim(*readable(min(low for *_, low, _ in rows), max(row[-1] for row in rows)))
    axes.set_yticks(range(len(rows)), [plain(name, 48) for name, *_ in rows])
    axes.invert_yaxis()
    axes.margins(y=0.5 / len(rows))
    dress(axes, title, under)
    axes.grid(visible=True, axis="x", color="#ececec")
    if middle is not None:
        axes.axvline(middle, color=_GREY, zorder=0)
        axes.set_xlim(-0.02, 1.02)
    return figure


def _sensitivity(data: Analysis) -> "Figure | None":
    """Draw normalised scores of the settings tuned per environment and of the common one."""
    cross = data.cross
    if cross is None:
        return None
    figure, (axes,) = make_panels(1, 1, (7.0, 1.8 + 0.45 * len(cross.environments)))
    places = np.arange(len(cross.environments))
    best, common = cross.normalized_best
    axes.hlines(places, common, best, color=_GREY, linewidth=2)
    axes.plot(best, places, "o", color=COLOURS[0], markersize=10, label="tuned for it")
    axes.plot(common, places, "o", color=COLOURS[1], markersize=5, label="best common setting")
    axes.set_yticks(places, [_tick(name) for name in cross.environments])
    axes.invert_yaxis()
    dress(axes, f"Hyperparameter sensitivity {cross.sensitivity.value:.2g}")
    axes.set_xlabel("normalised score")
    axes.legend(frameon=False)
    return figure


def _schedule(schedules: Sequence[tuple[str, Schedule]]) -> "Figure | None":
    """Draw the hyperparameters of the best members over their updates."""
    panels = [
        (environment, history, name)
        for environment, history in schedules
        for name in history.values
    ]
    if not panels:
        return None
    figure, grid = make_panels(len(panels), 3, (4.8, 3.4))
    for axes, (environment, history, name) in zip(grid, panels, strict=True):
        everyone = history.everyone[name]
        for start, stop, value in everyone:
            axes.plot([start, stop], [value, value], color=_GREY, linewidth=0.8)
        axes.plot(*history.line(name), color=COLOURS[0], linewidth=2)
        if min(v for *_, v in everyone) > 0:
            axes.set_yscale("log")
        dress(axes, name, environment)
        axes.set_xlabel("updates")
    return figure
