"""Charts of the report as inline SVG: small, without scripts, coloured by the style of the page.

Every function returns markup. Text is escaped here and nowhere else has to be. Colours are classes
(``s1`` to ``s5`` for strokes, ``f1`` to ``f5`` for fills), so that one drawing serves a light and a
dark page; whatever colour says is also said by a number or a word.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from purejaxpg.report.analysis import Axis, Curves, Line, Pair, Profile, Schedule
from purejaxpg.text import engineering, number, percent

_CHARACTER = 6.7  # width of an average character at 12 px, in a wide font
# Every eighth of cividis (Nuñez, Anderton, Renslow 2018): even to all eyes, and in grey.
_CIVIDIS = (
    (0, 34, 78), (18, 53, 112), (59, 73, 108), (87, 93, 109), (112, 113, 115), (138, 134, 120),
    (165, 156, 116), (195, 179, 105), (225, 204, 85), (254, 232, 56),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """A map from values between ``low`` and ``high`` to places between ``start`` and ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Return round values within the scale."""
        return _log_ticks(self.low, self.high, most) if self.log else _ticks(self, most)


def _ticks(scale: Scale, most: int) -> list[float]:
    span = scale.high - scale.low
    if not span > 0:
        return [scale.low]
    rough = span / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= rough * 0.999)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**p for p in powers for d in digits]
        found = [v for v in found if low * 0.999 <= v <= high * 1.001]
        if len(found) <= most:
            return found
    every = math.ceil(len(found) / most)
    return found[::every]


def _svg(width: float, height: float, label: str, parts: Sequence[str], extra: str = "") -> str:
    """Return a drawing that fills the width it gets, at most its own."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="{escape(label)}"{extra}>{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, kind: str = "t", anchor: str = "start") -> str:
    where = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{where}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _path(xs: Sequence[float], ys: Sequence[float], kind: str, title: str = "") -> str:
    """Return a line through the points that are finite, interrupted at the others."""
    steps, pen = [], "M"
    for x, y in zip(xs, ys, strict=True):
        known = math.isfinite(x) and math.isfinite(y)
        steps.append(f"{pen}{x:.1f} {y:.1f}" if known else "")
        pen = "L" if known else "M"
    named = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="{kind}" d="{"".join(steps)}">{named}</path>'


def _band(xs: Sequence[float], low: Sequence[float], high: Sequence[float], kind: str) -> str:
    """Return the area between two lines."""
    known = [i for i in range(len(xs)) if math.isfinite(low[i]) and math.isfinite(high[i])]
    if len(known) < 2:
        return ""
    there = "L".join(f"{xs[i]:.1f} {high[i]:.1f}" for i in known)
    back = "L".join(f"{xs[i]:.1f} {low[i]:.1f}" for i in reversed(known))
    return f'<path class="{kind}" d="M{there}L{back}Z"/>'


def cut(text: str, width: float) -> str:
    """Return a text that fits a width in pixels, its middle left out where it is too long."""
    most = max(4, int(width / _CHARACTER))
    if len(text) <= most:
        return text
    return f"{text[: most - most // 3 - 1]}…{text[len(text) - most // 3 :]}"


def _frame(
    x: Scale, y: Scale, x_name: str, y_format: Callable[[float], str], few: bool = False
) -> list[str]:
    """Return grid, ticks and labels of a chart."""
    parts = []
    for value in y.ticks(3 if few else 5):
        parts.append(_line(x.start, y(value), x.end, y(value), "grid"))
        parts.append(_text(x.start - 6, y(value) + 4, y_format(value), "t", "end"))
    room = max(2, int(abs(x.end - x.start) / 62))
    for value in x.ticks(room):
        text = engineering(value) if not x.log else _power(value)
        parts.append(_text(x(value), y.start + 16, text, "t", "middle"))
    parts.append(_line(x.start, y.start, x.end, y.start, "axis"))
    if x_name:
        parts.append(_text((x.start + x.end) / 2, y.start + 33, x_name, "t", "middle"))
    return parts


def _power(value: float) -> str:
    return (
        number(value)
        if 0.01 <= value < 1e4
        else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )


def _limits(*arrays: np.ndarray, room: float = 0.05) -> tuple[float, float]:
    """Return a range that holds all finite values, with a little room."""
    values = np.concatenate([np.ravel(np.asarray(a, float)) for a in arrays])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    margin = (high - low) * room or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


# ----------------------------------------------------------------------------------------- curves


def curves(data: Curves, width: int, height: int, name: str) -> str:
    """Draw training curves: the best in colour with bands, the others as lines or quantiles.

    Args:
        data: what to draw.
        width: of the drawing.
        height: of the drawing.
        name: what it shows, in words.

    Returns:
        An SVG element; its ``data-chart`` has the places of the coloured curves, for a cross-hair.
    """
    drawn = [*data.best]
    ends = [line.steps[-1] for line in drawn] + [steps[-1] for steps, _ in data.others]
    quantiles = [] if data.quantiles is None else [data.quantiles]
    low, high = _limits(
        *(a for line in drawn for a in (line.low, line.high, line.centre)),
        *(centre for _, centre in data.others),
        *quantiles,
    )
    x = Scale(0.0, float(max(ends)), 54, width - 30)
    y = Scale(low, high, height - 42, 10)
    parts = _frame(x, y, "environment steps", number)
    parts += _others(data, x, y)
    for index, line in reversed(list(enumerate(drawn, start=1))):
        xs = [x(v) for v in line.steps]
        lower, upper, centre = ([y(v) for v in a] for a in (line.low, line.high, line.centre))
        parts.append(_band(xs, lower, upper, f"band f{index}"))
        parts.append(_path(xs, centre, f"curve s{index}", line.label))
    parts += _badges(drawn, x, y)
    return _svg(width, height, name, parts, f' class="chart" data-chart="{_hover(drawn, x, y)}"')


def _others(data: Curves, x: Scale, y: Scale) -> list[str]:
    """Return the curves that are not highlighted."""
    parts = [
        _path([x(v) for v in steps], [y(v) for v in centre], "other")
        for steps, centre in data.others
    ]
    if data.quantiles is None or data.grid is None:
        return parts
    xs = [x(v) for v in data.grid]
    q5, q25, q50, q75, q95 = ([y(v) for v in row] for row in data.quantiles)
    parts += [_band(xs, q5, q95, "wide"), _band(xs, q25, q75, "wide")]
    return [*parts, _path(xs, q50, "other middle")]


def _badges(drawn: Sequence[Line], x: Scale, y: Scale) -> list[str]:
    """Return the numbers of the coloured curves at their ends, moved apart."""
    last = [line.centre[np.isfinite(line.centre)] for line in drawn]
    places = sorted((y(float(v[-1])), i) for i, v in enumerate(last, start=1) if v.size)
    parts, above = [], -math.inf
    excess = sum(13.0 for _ in places)
    for at, index in places:
        above = min(max(at, above + 13.0, 12.0), max(y.start - excess, above + 13.0))
        excess -= 13.0
        parts.append(_text(x.end + 8, above + 4, str(index), f"badge f{index}"))
    return parts


def _hover(drawn: Sequence[Line], x: Scale, y: Scale) -> str:
    """Return places and values of the coloured curves as JSON for an attribute."""
    lines = [
        {
            "x": [round(x(float(v)), 1) for v in line.steps],
            "y": [round(y(float(v)), 1) if math.isfinite(v) else None for v in line.centre],
            "s": [engineering(float(v)) for v in line.steps],
            "v": [number(float(v)) for v in line.centre],
        }
        for line in drawn
    ]
    return escape(json.dumps(lines, separators=(",", ":")))


# ------------------------------------------------------------------------------- values, intervals


@dataclass(frozen=True)
class Row:
    """A value with its interval and its name; ``kind`` is 1 to 5, or 0 for grey."""

    label: str
    value: float
    low: float
    high: float
    kind: int = 1
    ghost: float = float("nan")  # another value of the same thing, drawn hollow


def forest(
    rows: Sequence[Row],
    width: int,
    name: str,
    middle: float | None = None,
    x_name: str = "",
    form: Callable[[float], str] = number,
) -> str:
    """Draw values with their intervals below each other.

    Args:
        rows: from top to bottom.
        width: of the drawing.
        name: what it shows, in words.
        middle: where to draw a line to compare with.
        x_name: what the axis shows.
        form: how to write a value.

    Returns:
        An SVG element.
    """
    step, top = 44, 6
    known = [[row.value, row.low, row.high, row.ghost] for row in rows]
    extra = [np.array([0.0, middle, 1.0])] if middle is not None else []
    low, high = _limits(np.array(known), *extra, room=0.06 if middle is None else 0.02)
    height = top + step * len(rows) + (40 if x_name else 24)
    x = Scale(low, high, 14, width - 14)
    bottom = height - (38 if x_name else 22)
    parts = []
    for value in x.ticks(max(3, width // 90)):
        parts.append(_line(x(value), top, x(value), bottom, "grid"))
        parts.append(_text(x(value), bottom + 16, form(value), "t", "middle"))
    if middle is not None:
        parts.append(_line(x(middle), top, x(middle), bottom, "axis"))
    for index, row in enumerate(rows):
        at = top + step * index + 30
        shown = form(row.value)
        if row.high > row.low:
            shown += f" [{form(row.low)}, {form(row.high)}]"
        room = width - 44 - 1.1 * _CHARACTER * len(shown)
        parts.append(_text(14, at - 15, cut(row.label, room), "name"))
        parts.append(_text(width - 14, at - 15, shown, "value", "end"))
        parts += _mark(row, x, at)
    if x_name:
        parts.append(_text((x.start + x.end) / 2, height - 4, x_name, "t", "middle"))
    return _svg(width, height, name, parts)


def _mark(row: Row, x: Scale, at: float) -> list[str]:
    """Return a dot on its interval, and the hollow one beside it."""
    parts = []
    title = f"{row.label}: {number(row.value)} [{number(row.low)}, {number(row.high)}]"
    if math.isfinite(row.low):
        parts.append(_line(x(row.low), at, x(row.high), at, f"whisker s{row.kind}"))
    if math.isfinite(row.ghost):
        radius = 5 if abs(x(row.ghost) - x(row.value)) > 9 else 9  # a ring around the dot
        parts.append(_line(x(row.ghost), at, x(row.value), at, "dots"))
        parts.append(
            f'<circle class="ghost s{row.kind}" cx="{x(row.ghost):.1f}" cy="{at}" r="{radius}"/>'
        )
    if math.isfinite(row.value):
        parts.append(
            f'<circle class="f{row.kind}" cx="{x(row.value):.1f}" cy="{at}" r="5.5">'
            f"<title>{escape(title)}</title></circle>"
        )
    return parts


def shares(axes: Sequence[Axis], width: int, name: str) -> str:
    """Draw how much of the variance each hyperparameter explains, with intervals.

    Args:
        axes: the hyperparameters, most important first.
        width: of the drawing.
        name: what it shows, in words.

    Returns:
        An SVG element; the lower, paler bar is the share for being among the best quarter.
    """
    with_top = any(math.isfinite(axis.top_share) for axis in axes)
    step, top = (46 if with_top else 38), 2
    most = max(0.1, *(max(a.share, a.high if a.high == a.high else 0, 0.0) for a in axes))
    most = max(most, *(a.top_share if a.top_share == a.top_share else 0.0 for a in axes))
    height = top + step * len(axes) + 24
    x = Scale(0.0, min(1.0, most * 1.08), 8, width - 52)
    parts = []
    for value in x.ticks(max(3, width // 100)):
        parts.append(_line(x(value), top, x(value), height - 22, "grid"))
        parts.append(_text(x(value), height - 6, f"{100 * value:g}%", "t", "middle"))
    for index, axis in enumerate(axes):
        at = top + step * index + 17
        parts.append(_text(8, at - 4, cut(axis.name, width - 60), "name"))
        parts.append(_bar(x, at, 12, axis.share, "bar f1"))
        if math.isfinite(axis.low):
            parts.append(_line(x(axis.low), at + 6, x(axis.high), at + 6, "whisker ink"))
        if with_top:
            parts.append(_bar(x, at + 14, 6, axis.top_share, "bar f5"))
        edge = max(axis.share, axis.high if math.isfinite(axis.high) else 0.0)
        parts.append(_text(x(edge) + 6, at + 11, percent(axis.share), "value"))
    return _svg(width, height, name, parts)


def _bar(x: Scale, at: float, height: float, value: float, kind: str) -> str:
    length = max(1.0, x(value) - x.start) if math.isfinite(value) else 0.0
    return (
        f'<rect class="{kind}" x="{x.start}" y="{at}" width="{length:.1f}" height="{height}"'
        ' rx="2"/>'
    )


# ---------------------------------------------------------------------------------- hyperparameters


def marginal(
    axis: Axis, values: np.ndarray, scores: np.ndarray, limits: tuple[float, float], width: int
) -> str:
    """Draw the score over one hyperparameter: configurations, mean with interval, best.

    Args:
        axis: the hyperparameter.
        values: its place in each configuration ``[n]``.
        scores: of the configurations ``[n]``.
        limits: of the scores, shared by all drawings of an environment.
        width: of the drawing.

    Returns:
        An SVG element.
    """
    height = 210
    levels = axis.levels
    centres = levels.centres if levels.centres is not None else np.arange(len(levels.labels))
    room = abs(width - 70) / (2 * max(2, len(centres)))
    low, high = float(min(centres.min(), values.min())), float(max(centres.max(), values.max()))
    edge = room if len(np.unique(values)) <= len(levels.labels) else 8
    x = Scale(low, high, 46 + edge, width - 14 - edge, levels.log)
    y = Scale(*limits, height - 28, 8)
    parts = _ticks_of(axis, x, y, centres, width)
    for value, score in _thinned(values, scores, 250):
        parts.append(f'<circle class="dot" cx="{x(value):.1f}" cy="{y(score):.1f}" r="2"/>')
    xs = [x(float(v)) for v in centres]
    joined = levels.centres is not None
    ends = [[y(float(v)) for v in axis.effects + sign * axis.errors] for sign in (-1, 1)]
    if joined:
        parts.append(_band(xs, ends[0], ends[1], "band f1"))
        parts.append(_path(xs, [y(float(v)) for v in axis.effects], "curve s1"))
        parts.append(_path(xs, [y(float(v)) for v in axis.best], "best s2"))
    for index, at in enumerate(xs):
        parts += _level(axis, index, at, y, ends)
    return _svg(width, height, f"score over {axis.name}", parts)


def _level(
    axis: Axis, index: int, at: float, y: Scale, ends: Sequence[Sequence[float]]
) -> list[str]:
    """Return the mean of one level with its interval, and the best."""
    title = (
        f"{axis.name} {axis.levels.labels[index]}: mean {number(axis.effects[index])} "
        f"± {number(axis.errors[index])}, best {number(axis.best[index])}"
    )
    return [
        _line(at, ends[0][index], at, ends[1][index], "whisker s1"),
        f'<circle class="f1" cx="{at:.1f}" cy="{y(axis.effects[index]):.1f}" r="4">'
        f"<title>{escape(title)}</title></circle>",
        f'<path class="f2" d="M{at:.1f} {y(axis.best[index]) - 5:.1f}l5 5l-5 5l-5 -5Z">'
        f"<title>{escape(title)}</title></path>",
    ]


def _ticks_of(axis: Axis, x: Scale, y: Scale, centres: np.ndarray, width: int) -> list[str]:
    """Return grid and ticks: the levels themselves where they are few, else round values."""
    parts = []
    for value in y.ticks(4):
        parts.append(_line(46, y(value), width - 8, y(value), "grid"))
        parts.append(_text(40, y(value) + 4, number(value), "t", "end"))
    labels, named = axis.levels.labels, axis.levels.centres is None
    places = [x(float(value)) for value in centres]
    apart = min((b - a for a, b in itertools.pairwise(places)), default=float(width))
    longest = max(len(label) for label in labels) * _CHARACTER
    if named or (not axis.levels.binned and apart >= longest):
        for at, label in zip(places, labels, strict=True):
            parts.append(_text(at, y.start + 17, cut(label, max(apart, 30.0)), "t", "middle"))
        return parts
    for value in x.ticks(5):
        text = _power(value) if x.log else number(value)
        parts.append(_text(x(value), y.start + 17, text, "t", "middle"))
    return parts


def _thinned(values: np.ndarray, scores: np.ndarray, most: int) -> list[tuple[float, float]]:
    """Return at most so many points, spread evenly over the ranking."""
    order = np.argsort(-scores, kind="stable")
    if order.size > most:
        order = order[np.linspace(0, order.size - 1, most).round().astype(int)]
    return [(float(values[i]), float(scores[i])) for i in order]


def heat_map(pair: Pair, width: int) -> str:
    """Draw mean scores over two hyperparameters.

    Args:
        pair: the hyperparameters and their scores.
        width: of the drawing.

    Returns:
        An SVG element; cells without a configuration are hatched.
    """
    rows, columns = pair.means.shape
    left = 14 + min(110.0, _CHARACTER * max(len(t) for t in pair.first_labels) + 4)
    wide = (width - left - 8) / columns
    tall = float(np.clip(200 / rows, 24, 40))
    height = 22 + tall * rows + 42
    low, high = float(np.nanmin(pair.means)), float(np.nanmax(pair.means))
    texts = _equal_digits(pair.means)
    roomy = _CHARACTER * max(len(text) for row in texts for text in row) + 3 <= wide
    parts = [_text(left, 14, f"{cut(pair.first, width - left)} (rows)", "name")]
    for i in range(rows):
        at = 22 + tall * (rows - 1 - i)
        label = cut(pair.first_labels[i], left - 10)
        parts.append(_text(left - 6, at + tall / 2 + 4, label, "t", "end"))
        for j in range(columns):
            box = (left + wide * j, at, wide, tall)
            parts.append(_cell(pair, i, j, box, (low, high), texts[i][j] if roomy else ""))
    bottom = 22 + tall * rows
    every = max(1, math.ceil((6 + _CHARACTER * max(map(len, pair.second_ticks))) / wide))
    every = min(every, 3)
    for j in range(0, columns, every):
        label = cut(pair.second_ticks[j], wide * every)
        parts.append(_text(left + wide * (j + 0.5), bottom + 15, label, "t", "middle"))
    parts.append(_text(left, bottom + 34, f"{cut(pair.second, width - left)} (columns)", "name"))
    return _svg(width, height, f"mean score over {pair.first} and {pair.second}", parts)


def _equal_digits(values: np.ndarray) -> list[list[str]]:
    """Return numbers with equally many decimals, as few as tell them apart."""
    spread = float(np.nanmax(values) - np.nanmin(values))
    decimals = int(np.clip(2 - math.floor(math.log10(spread)), 0, 4)) if spread > 0 else 1
    decimals = 0 if spread >= 20 else decimals
    return [[f"{v:.{decimals}f}".replace("-", "−") for v in row] for row in values]


def _cell(
    pair: Pair,
    i: int,
    j: int,
    box: tuple[float, float, float, float],
    limits: tuple[float, float],
    text: str,
) -> str:
    """Return one cell of a heat map with a text in it."""
    x, y, wide, tall = box
    value, place = float(pair.means[i, j]), f'x="{x:.1f}" y="{y:.1f}"'
    size = f'width="{wide - 1.5:.1f}" height="{tall - 1.5:.1f}"'
    what = f"{pair.first} {pair.first_labels[i]}, {pair.second} {pair.second_labels[j]}"
    if not math.isfinite(value):
        return f'<rect class="empty" {place} {size}><title>{escape(what)}: not tried</title></rect>'
    share = (value - limits[0]) / ((limits[1] - limits[0]) or 1.0)
    colour = cividis(share)
    title = f"{what}: {number(value)}, {int(pair.counts[i, j])} configurations"
    found = (
        f'<rect fill="#{"".join(f"{c:02x}" for c in colour)}" {place} {size} rx="2">'
        f"<title>{escape(title)}</title></rect>"
    )
    ink = "dark" if share > 0.5 else "pale"
    return found + (
        _text(x + wide / 2, y + tall / 2 + 4, text, f"cell {ink}", "middle") * bool(text)
    )


def cividis(share: float) -> tuple[int, int, int]:
    """Return the colour of a share from 0 to 1."""
    at = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    first = min(int(at), len(_CIVIDIS) - 2)
    pairs = zip(_CIVIDIS[first], _CIVIDIS[first + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (at - first)) for a, b in pairs)
    return red, green, blue


# ---------------------------------------------------------------------------------- whole sweeps


def profile(data: Profile, width: int, name: str) -> str:
    """Draw performance profiles.

    Args:
        data: the lines.
        width: of the drawing.
        name: what it shows, in words.

    Returns:
        An SVG element.
    """
    height = 300
    x = Scale(float(data.thresholds[0]), float(data.thresholds[-1]), 54, width - 16)
    y = Scale(0.0, 1.0, height - 42, 10)
    scale = "normalised final return τ" if data.normalized else "final return τ"
    parts = _frame(x, y, scale, lambda value: f"{100 * value:g}%")
    xs = [x(float(v)) for v in data.thresholds]
    for index, (label, share, low, high) in reversed(list(enumerate(data.lines, start=1))):
        lower, upper, centre = ([y(float(v)) for v in a] for a in (low, high, share))
        parts.append(_band(xs, lower, upper, f"band f{index}"))
        parts.append(_path(xs, centre, f"curve s{index}", label))
    return _svg(width, height, name, parts)


def schedule(data: Schedule, name: str, width: int) -> str:
    """Draw one hyperparameter of a population over its updates, the best member in colour.

    Args:
        data: what the population did.
        name: of the hyperparameter.
        width: of the drawing.

    Returns:
        An SVG element, empty where its values are no numbers.
    """
    mine, everyone = data.values[name], data.everyone[name]
    values = [v for _, _, v in everyone]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return ""
    height = 220
    log = min(values) > 0 and max(values) / min(values) > 5
    low, high = (float(v) for v in (min(values), max(values)))
    low, high = (low / 1.15, high * 1.15) if log else _limits(np.array(values, float))
    x = Scale(0.0, float(data.steps[-1][1]), 58, width - 16)
    y = Scale(low, high, height - 42, 10, log)
    parts = _frame(x, y, "updates", _power if log else number)
    for start, stop, value in everyone:
        parts.append(_line(x(start), y(value), x(stop), y(value), "other"))
    places = [(x(a), x(b), y(v)) for (a, b), v in zip(data.steps, mine, strict=True)]
    xs = [at for a, b, _ in places for at in (a, b)]
    ys = [at for _, _, v in places for at in (v, v)]
    parts.append(_path(xs, ys, "curve s1", f"{name} of the best member"))
    return _svg(width, height, f"{name} over time", parts)


def dumbbells(
    names: Sequence[str], best: np.ndarray, common: np.ndarray, width: int, name: str
) -> str:
    """Draw the normalised score of each environment's own best and of the common setting.

    Args:
        names: of the environments.
        best: scores of their own best settings ``[e]``.
        common: scores of the common setting ``[e]``.
        width: of the drawing.
        name: what it shows, in words.

    Returns:
        An SVG element.
    """
    nothing = float("nan")
    rows = [
        Row(each, float(b), nothing, nothing, 1, float(c))
        for each, b, c in zip(names, best, common, strict=True)
    ]
    return forest(
        rows, width, name, x_name="normalised score: ● tuned here   ○ best common setting"
    )
