"""The charts of the page, as plain data for plotly.js.

Each function returns a figure. Its colours are names such as ``@c1``, which the script of the page
replaces with the colours of its light or dark style; two hexadecimal digits after the name are an
opacity. Plotly reads tags in text, so every name from the results goes through `clean`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from purejaxpg.report import analysis, completions
from purejaxpg.report import curves as training
from purejaxpg.report.analysis import Axis, Curves, Pair, Profile, Schedule, Section
from purejaxpg.report.ranking import Configuration
from purejaxpg.text import estimate, number, percent, short

Figure = dict[str, Any]

_POINTS = 250  # configurations drawn in a marginal, at most
_LINES = 600  # configurations drawn in parallel coordinates, at most
_PARALLEL = 8  # hyperparameters in parallel coordinates, at most
_COLOURED = 8  # configurations with a colour of their own in the frontier, at most
_FRONTIER = 200  # points of each line of the frontier, at most
_PALETTE = 8  # colours that the style of the page has
_LABELLED = 8  # values of a hyperparameter that all get a tick


def clean(text: str) -> str:
    """Return a text in which plotly finds no tag."""
    return escape(text, quote=False)


def rounded(values: Iterable[float]) -> list[float | None]:
    """Return numbers with four significant digits; those that are not finite become None."""
    return [float(f"{float(v):.4g}") if math.isfinite(v) else None for v in values]


def colour(place: int) -> str:
    """Return the name of the colour of the line at a place from 0; after the last, the first."""
    return f"c{place % _PALETTE + 1}"


def _figure(traces: list[Figure], height: int, **layout: Any) -> Figure:
    return {"data": traces, "layout": {"height": height, **layout}}


def _trace(
    x: Iterable[float], y: Iterable[float], colour: str, mode: str = "lines", **more: Any
) -> Figure:
    """Return a trace of lines or markers; without a hover text it ignores the pointer."""
    style: Figure = {"line": {"color": f"@{colour}", "width": more.pop("width", 2.2)}}
    if mode != "lines":
        style["marker"] = {"color": f"@{colour}", "size": more.pop("size", 8)}
    hover: Figure = {} if "hovertemplate" in more else {"hoverinfo": "skip"}
    return {"x": rounded(x), "y": rounded(y), "mode": mode, **style, **hover, **more}


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, **more: Any) -> Figure:
    """Return the area between two lines, at the places where both are known."""
    known = np.isfinite(low) & np.isfinite(high)
    x, low, high = x[known], low[known], high[known]
    outline = (np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]]))
    return _trace(*outline, colour, width=0, fill="toself", fillcolor=f"@{colour} 2b", **more)


def _error(values: Any, low: Any, high: Any, colour: str, thickness: float) -> Figure:
    """Return error bars from `low` to `high`."""
    values, low, high = np.array([values, low, high])
    ends = {"array": rounded(high - values), "arrayminus": rounded(values - low)}
    look = {"color": f"@{colour}", "thickness": thickness, "width": 0}
    return {"type": "data", "symmetric": False, **ends, **look}


# ----------------------------------------------------------------------------------------- curves


def curves(data: Curves, unit: str, rows: Sequence[int] = ()) -> Figure:
    """Draw training curves: the best in colour with bands, the others as lines or quantiles.

    The evaluations of the best within training are dashed.

    Args:
        data: the curves.
        unit: of their steps.
        rows: the table row of each of the best; the script finds their traces by it.

    Returns:
        The figure.
    """
    traces = []
    if data.quantiles is not None and data.grid is not None:
        q5, q25, q50, q75, q95 = data.quantiles
        traces = [_band(data.grid, q5, q95, "grey"), _band(data.grid, q25, q75, "grey")]
        traces.append(_trace(data.grid, q50, "grey", width=1.4))
        traces[-1]["line"]["dash"] = "dot"
    else:
        traces = [_trace(x, y, "grey 80", width=1) for _, x, y in data.others]
    for place, line in reversed(list(enumerate(data.best))):
        tag: Figure = {"meta": rows[place]} if rows else {}
        traces.append(_band(line.steps, line.low, line.high, colour(place), **tag))
        hover: Figure = {"name": clean(line.name), "hovertemplate": "%{y:.4g}"}
        traces.append(_trace(line.steps, line.centre, colour(place), **hover, **tag))
        own = data.evaluated[place] if data.evaluated else None
        if own is not None:
            hover |= {"name": clean(own.name), "mode": "lines+markers", "size": 6, "width": 1.4}
            traces.append(_trace(own.steps, own.centre, colour(place), **hover, **tag))
            traces[-1]["line"]["dash"] = "dash"
    return _figure(
        traces,
        440,
        hovermode="x unified",
        xaxis=_steps_axis(unit),
    )


def metric(
    name: str,
    unit: str,
    rows: Mapping[int, training.Curve],
    intern: Callable[[tuple[float | None, ...]], int],
) -> Figure:
    """Return a training metric of configurations, of which the script draws those that are picked.

    Args:
        name: of the metric.
        unit: of the steps.
        rows: the metric of a configuration's runs, ``returns [runs, bins]``, by its row in the
            table; of a page without a table, the numbers of its lines.
        intern: returns the number of a grid of steps, which rows share.

    Returns:
        ``rows`` with a grid, the IQM over runs and, of several, each run; and the layout.
    """
    found = {}
    for row, curve in rows.items():
        centre = training.over_seeds(curve.returns)
        singles = curve.returns if len(curve.returns) > 1 else curve.returns[:0]
        grid = intern(tuple(rounded(curve.steps)))
        found[row] = [grid, rounded(centre), [rounded(values) for values in singles]]
    layout = _figure([], 230, hovermode="x unified", xaxis=_steps_axis(unit))["layout"]
    return {"name": name, "rows": found, "layout": layout}


def _steps_axis(unit: str) -> Figure:
    return {"title": {"text": clean(unit)}, "tickformat": "~s", "rangemode": "tozero"}


# ------------------------------------------------------------------------------- values, intervals


@dataclass(frozen=True)
class Row:
    """A value with its interval and its name; ``before`` is another value, drawn hollow."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    colour: str = "c1"
    before: float = math.nan


def forest(
    rows: Sequence[Row],
    middle: float | None = None,
    title: str = "",
    form: Callable[[float], str] = number,
) -> Figure:
    """Draw values with their intervals below each other.

    Args:
        rows: from top to bottom.
        middle: a value to compare with; it gets a line, and the axis runs from 0 to 1.
        title: of the axis.
        form: writes a value.

    Returns:
        The figure.
    """
    traces, notes = [], []
    for place, row in enumerate(rows):
        shown = estimate(row.value, row.low, row.high, form)
        if math.isfinite(row.before):
            ends = _trace([row.before, row.value], [place] * 2, row.colour, "lines+markers")
            ends["line"] |= {"dash": "dot", "width": 1.5}
            ends["marker"] |= {"symbol": ["circle-open", "circle"], "size": [13, 1]}
            traces.append(ends)
        hover = f"{clean(row.label)}<br>{shown}<extra></extra>".replace("%{", "% {")
        dot = _trace([row.value], [place], row.colour, "markers", size=11, hovertemplate=hover)
        if row.high > row.low and form(row.high) != form(row.low):
            dot["error_x"] = _error([row.value], [row.low], [row.high], row.colour, 2.4)
        traces.append(dot)
        notes += _labels(row.label, shown, place)
    axis: Figure = {"title": {"text": title}, "tickformat": ".0%" if form is percent else "~g"}
    values = (v for row in rows for v in (row.value, row.low, row.high, row.before))
    known = [value for value in values if math.isfinite(value)]
    if known:
        axis["range"] = list(analysis.readable(min(known), max(known)))
    lines = [] if middle is None else [_line_at(middle)]
    if middle is not None:
        axis["range"] = [-0.02, 1.02]
    return _rows_figure(traces, notes, len(rows), 46, xaxis=axis, shapes=lines)


def _line_at(x: float) -> Figure:
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "type": "line"}
    return {**ends, "line": {"color": "@grey", "width": 1}, "layer": "below"}


def _labels(label: str, value: str, place: float) -> list[Figure]:
    """Return the texts above a row; the script shortens the first one to the room there is."""
    both = {"xref": "paper", "y": place, "yanchor": "bottom", "yshift": 6, "showarrow": False}
    return [
        {**both, "x": 0, "xanchor": "left", "text": clean(label), "name": "label"},
        {**both, "x": 1, "xanchor": "right", "text": f"<b>{value}</b>", "name": "value"},
    ]


def _rows_figure(
    traces: list[Figure], notes: list[Figure], count: int, step: int, **layout: Any
) -> Figure:
    """Return a figure of rows, `step` pixels each, without a visible y-axis."""
    bottom = 44 if layout["xaxis"].get("title", {}).get("text") else 26
    axis = {"visible": False, "range": [count - 0.55, -0.75], "fixedrange": True}
    size = {"margin": {"l": 8, "r": 8, "t": 4, "b": bottom}, "annotations": notes}
    return _figure(traces, step * count + bottom + 14, yaxis=axis, **size, **layout)


def shares(axes: Sequence[Axis]) -> Figure:
    """Draw how much of the variance each hyperparameter explains, with intervals.

    Args:
        axes: the hyperparameters, most important first.

    Returns:
        The figure; the thinner bar is the share for being among the best quarter.
    """
    places = np.arange(len(axes))
    main, low, high, top = np.array([(a.share, a.low, a.high, a.top_share) for a in axes]).T

    def bar(values: np.ndarray, shift: float, width: float, colour: str, what: str) -> Figure:
        data = {"type": "bar", "orientation": "h", "x": rounded(values), "width": width}
        hover = f"%{{x:.1%}} of the variance {what}<extra></extra>"
        y = (places + shift).tolist()
        return {**data, "y": y, "marker": {"color": f"@{colour}"}, "hovertemplate": hover}

    first = bar(main, 0.05, 0.26, "c1", "of scores")
    first["error_x"] = _error(main, low, high, "ink", 2)
    traces = [first]
    if np.isfinite(top).any():
        traces.append(bar(top, 0.27, 0.14, "c5", "of being in the best quarter"))
    notes = [n for i, a in enumerate(axes) for n in _labels(a.name, percent(a.share), i - 0.06)]
    axis = {"tickformat": ".0%", "rangemode": "tozero"}
    return _rows_figure(traces, notes, len(axes), 52, xaxis=axis, barmode="overlay")


# ---------------------------------------------------------------------------------- hyperparameters


def marginal(axis: Axis, scores: np.ndarray, limits: tuple[float, float]) -> Figure:
    """Draw the score over one hyperparameter: configurations, mean with interval, best.

    Args:
        axis: the hyperparameter.
        scores: of the configurations ``[n]``.
        limits: of the scores, shared by all charts of an environment.

    Returns:
        The figure; a mean without an interval has no error bar.
    """
    levels = axis.levels
    named = levels.centres is None
    x = np.arange(len(levels.labels)) if levels.centres is None else levels.centres
    inside = np.flatnonzero(scores >= limits[0])
    order = inside[np.argsort(-scores[inside], kind="stable")]
    order = order[np.linspace(0, order.size - 1, min(order.size, _POINTS)).round().astype(int)]
    hover = {"hovertemplate": "%{y:.4g}<extra>configuration</extra>", "size": 4}
    traces = [_trace(levels.values[order], scores[order], "grey 99", "markers", **hover)]
    if not named:
        traces.append(_band(x, axis.effects - axis.errors, axis.effects + axis.errors, "c1"))
    mode = "markers" if named else "lines+markers"
    labels = {"customdata": [clean(label) for label in levels.labels]}
    hover = {"hovertemplate": "%{customdata}: best %{y:.4g}<extra></extra>", **labels}
    best = _trace(x, axis.best, "c2", mode, width=1.3, **hover)
    best["line"]["dash"], best["marker"]["symbol"] = "dot", "diamond"
    hover = {"hovertemplate": "%{customdata}: mean %{y:.4g}<extra></extra>", **labels}
    mean = _trace(x, axis.effects, "c1", mode, **hover)
    if np.isfinite(axis.errors).any():
        ends = axis.effects - axis.errors, axis.effects + axis.errors
        mean["error_y"] = _error(axis.effects, *ends, "c1", 2.2)
    place: Figure = {"type": "log", "dtick": _decades(x)} if levels.log else {}
    if named or (not levels.binned and len(levels.labels) <= _LABELLED):
        place = {"tickvals": rounded(x), "ticktext": _ticks(levels.labels)} | {
            key: value for key, value in place.items() if key == "type"
        }
    return _figure([*traces, best, mean], 230, xaxis=place, yaxis={"range": list(limits)})


def _decades(values: np.ndarray) -> int | str:
    """Return the distance of ticks on a logarithmic axis: only powers of ten if it is long."""
    return 1 if values.max() / values.min() > 60 else "D2"


def _ticks(labels: Iterable[str]) -> list[str]:
    """Return labels short enough for an axis."""
    return [clean(text if len(text) <= 18 else f"{text[:17]}…") for text in labels]


def heat_map(pair: Pair) -> Figure:
    """Draw mean scores over two hyperparameters; pairs of values not tried stay empty."""
    rows, columns = pair.means.shape
    spread = float(np.nanmax(pair.means) - np.nanmin(pair.means))
    decimals = int(np.clip(2 - math.floor(math.log10(spread)), 0, 4)) if spread > 0 else 1
    digits = f".{0 if spread >= 20 else decimals}f"
    labels = itertools.product(pair.rows.labels, pair.columns.labels)
    cells = [
        f"{clean(a)}, {clean(b)}<br>{n:.0f} configurations"
        for (a, b), n in zip(labels, pair.counts.flat, strict=True)
    ]
    trace = {
        "type": "heatmap",
        "z": [rounded(row) for row in pair.means],
        "customdata": np.reshape(cells, pair.means.shape).tolist(),
        "hovertemplate": "%{customdata}<br>mean %{z:.4g}<extra></extra>",
        "texttemplate": f"%{{z:{digits}}}" if columns <= 6 else "",
        "textfont": {"size": 11},
        "colorscale": "Cividis",
        "showscale": False,
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
    }
    axis = {"showgrid": False, "zeroline": False, "fixedrange": True}
    both = [(pair.first, pair.rows.labels), (pair.second, pair.columns.ticks)]
    y, x = (
        {**axis, "tickvals": list(range(len(t))), "ticktext": _ticks(t)}
        | {"title": {"text": clean(name), "standoff": 8}}
        for name, t in both
    )
    return _figure([trace], int(np.clip(34 * rows, 150, 290)) + 80, xaxis=x, yaxis=y)


def parallel(
    section: Section, ranked: Sequence[tuple[int, Configuration]], specs: dict[str, Any]
) -> Figure | None:
    """Return hyperparameters and scores of the configurations for parallel coordinates.

    Args:
        section: one environment.
        ranked: its configurations with their rows in the table, best first.
        specs: the line of each hyperparameter in the sweep file.

    Returns:
        ``axes`` with names and ticks, places from 0 to 1; ``lines``, each a row of the table,
        whether a run diverged, and a place on each axis. None if there is nothing to compare.
    """
    scored = [(row, c) for row, c in ranked if math.isfinite(c.iqm)]
    important = [axis.name for axis in section.effects.axes]
    fields = list(dict.fromkeys([*important, *(name for _, c in scored for name in c.swept)]))
    values = {name: [c.swept.get(name) for _, c in scored] for name in fields}
    names = [n for n in fields if len({short(v) for v in values[n]}) > 1][:_PARALLEL]
    scores = np.array([c.iqm for _, c in scored])
    if not names or number(scores.min(), 4) == number(scores.max(), 4):
        return None
    drawn = [_coordinate(values[name], specs.get(name)) for name in names]
    named = [{"name": clean(n), "ticks": t} for n, (t, _) in zip(names, drawn, strict=True)]
    marks = np.linspace(0, 1, 5)
    ends = list(zip(marks.tolist(), _distinct(scores.min() + marks * np.ptp(scores)), strict=True))
    score = (scores - scores.min()) / np.ptp(scores)
    picked = np.linspace(0, len(scored) - 1, min(len(scored), _LINES)).round().astype(int)
    places = np.stack([*(at for _, at in drawn), score], axis=1).round(3).tolist()
    lines = [[scored[i][0], int(scored[i][1].diverged > 0), *places[i]] for i in picked.tolist()]
    return {"axes": [*named, {"name": "final return", "ticks": ends}], "lines": lines}


def _distinct(values: np.ndarray) -> list[str]:
    """Return numbers with as many digits as tell them apart, at most seven."""
    texts = ([number(value, digits) for value in values.tolist()] for digits in range(3, 8))
    return next((each for each in texts if len(set(each)) == len(each)), list(map(number, values)))


def _coordinate(values: list[Any], spec: Any) -> tuple[list[tuple[float, str]], np.ndarray]:
    """Return ticks of a hyperparameter and the place of each value, from 0 to 1."""
    levels = analysis.levels_of(values, spec)
    at = np.log(levels.values) if levels.log else levels.values
    low, span = at.min(), np.ptp(at) or 1.0
    places = (at - low) / span
    if levels.centres is None or (not levels.binned and len(levels.labels) <= _LABELLED):
        marks, texts = np.unique(places), _ticks(levels.labels)
    else:
        marks = np.linspace(0, 1, 5)
        values = low + marks * span
        shown = np.exp(values) if levels.log else values
        texts = [short(float(f"{value:.2g}")) for value in shown]
    return list(zip(marks.round(3).tolist(), texts, strict=True)), places


# ------------------------------------------------------------------------------------ whole sweeps


def profile(data: Profile) -> Figure:
    """Draw performance profiles with their bands."""
    traces = []
    for place, (label, share, low, high) in reversed(list(enumerate(data.lines))):
        hover = {"name": clean(label), "hovertemplate": "%{y:.0%}"}
        traces.append(_band(data.thresholds, low, high, colour(place)))
        traces.append(_trace(data.thresholds, share, colour(place), **hover))
    title = "normalised final return τ" if data.normalized else "final return τ"
    axes: Figure = {"xaxis": {"title": {"text": title}, "tickformat": "~g"}}
    axes["yaxis"] = {"tickformat": ".0%", "range": [-0.01, 1.03]}
    return _figure(traces, 320, hovermode="x unified", **axes)


def schedule(data: Schedule, name: str) -> Figure:
    """Draw one hyperparameter of a population over its updates, the best member in colour."""
    everyone = data.everyone[name]
    values = [v for *_, v in everyone]
    log = min(values) > 0 and max(values) / min(values) > 5
    x = list(itertools.chain(*((start, stop, math.nan) for start, stop, _ in everyone)))
    y = list(itertools.chain(*((value, value, math.nan) for value in values)))
    hover = "%{y:.4g} at update %{x}<extra></extra>"
    traces = [_trace(x, y, "grey", width=1), _trace(*data.line(name), "c1", hovertemplate=hover)]
    scale = {"type": "log", "dtick": _decades(np.array(values))} if log else {}
    return _figure(traces, 240, xaxis={"title": {"text": "updates"}}, yaxis=scale)


# --------------------------------------------------------------------------------- language models


def frontier(texts: completions.Texts) -> Figure:
    """Draw the return of runs and configurations over their divergence, and the best possible.

    Args:
        texts: with at least one row that is drawn.

    Returns:
        The figure; configurations have the colours that `frontier_colours` names.
    """
    traces = []
    for best in texts.frontier_lines:
        hover = f"{texts.best_possible}: %{{y:.3g}} at KL %{{x:.3g}}<extra></extra>"
        x, y = best[:, :: -(-best.shape[1] // _FRONTIER)]
        traces.append(_trace(x, y, "grey", width=1.6, hovertemplate=hover))
    if texts.line:
        x, y = zip(*texts.line, strict=True)
        traces.append(_trace(x, y, "grey 66", width=1))
        traces[-1]["line"]["dash"] = "dot"
    for row, colour in zip(texts.drawn, frontier_colours(texts), strict=True):
        traces += _point_set(row, f"c{colour}", texts.titles[0])
    axes: Figure = {"xaxis": {"title": {"text": completions.KL_LABEL}, "tickformat": "~g"}}
    axes["yaxis"] = {"title": {"text": clean(texts.titles[0])}, "tickformat": "~g"}
    return _figure(traces, 440, **axes)


def frontier_colours(texts: completions.Texts) -> list[int]:
    """Return the number of the colour of each row that is drawn; one for all if they are many."""
    rows = len(texts.drawn)
    return list(range(1, rows + 1)) if rows <= _COLOURED else [1] * rows


def _point_set(row: completions.Row, colour: str, title: str) -> list[Figure]:
    """Return the runs of a configuration, small, and its mean with intervals, large."""

    def hover(name: str, kl: str, score: str) -> str:
        return f"{clean(name)}<br>KL {kl}<br>{clean(title)} {score}<extra></extra>".replace(
            "%{",
            "% {",  # it would start a field of plotly's
        )

    seeds, x, y = zip(*row.points, strict=True)
    texts = [
        hover(f"{row.name}, seed {seed}", number(kl), number(score))
        for seed, kl, score in row.points
    ]
    runs = _trace(x, y, f"{colour} 99", "markers", size=6, hovertemplate=texts)
    if row.centre is None or len(seeds) == 1:
        return [runs]
    kl, score = row.centre
    text = hover(f"{row.name}, mean of {len(seeds)} seeds", kl.text, score.text)
    mean = _trace([kl.value], [score.value], colour, "markers", size=10, hovertemplate=text)
    for axis, of in (("error_x", kl), ("error_y", score)):
        mean[axis] = _error([of.value], [of.low], [of.high], colour, 1.8)
    return [runs, mean]
