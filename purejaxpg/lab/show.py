"""The tables, the files and the figure of the laboratory, from its rows alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purejaxpg import disk
from purejaxpg.report import figures
from purejaxpg.report.tables import Table, csv_text, markdown_lines
from purejaxpg.text import number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
NOTHING = 1e-9  # relative numbers below are rounding errors, and are shown as 0
FLOOR = 1e-4  # of a logarithmic axis on which 0 has to have a place
COLLAPSED = 0.01  # nats of entropy below which a policy gives one completion of each prompt

LEGEND = (
    "All numbers are relative to the norm of the true gradient: *bias* is the distance of the "
    "expected gradient from the true one, *variance* the trace of the covariance of the gradient "
    "of one completion. 0 means less than 1e-9.",
    "Exact expectations run over all completions; a number after ~ is sampled. *enough* is the "
    "number of completions in a batch beyond which the bias is the larger part of the error.",
)


def tables(rows: Sequence[Row], best: float) -> list[Table]:
    """Return all tables.

    Args:
        rows: as `study.run` returns them.
        best: objective of the best policy.
    """
    return [divergences(rows), ascents(rows, best), advantages(rows), *groups(rows)]


def of(rows: Iterable[Row], study: str) -> list[Row]:
    """Return the rows of one study."""
    return [row for row in rows if row["study"] == study]


def values_of(rows: Iterable[Row], name: str) -> list[Any]:
    """Return the different values of a label, in the order of the rows."""
    return list(dict.fromkeys(row[name] for row in rows))


def cell(row: Row, name: str, digits: int = 2) -> str:
    """Return a number of a row as text, after ~ if it is sampled."""
    text = brief(row[name], digits)
    return f"~{text}" if row["how"] == "sampled" and text != "-" else text


def brief(value: float, digits: int = 2) -> str:
    """Return a number with few digits, 0 for a rounding error, or a dash if it is not finite."""
    if not math.isfinite(value):
        return "-"
    if abs(value) < NOTHING:
        return "0"
    if abs(value) < 1000.0:
        return number(value, digits)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def enough(row: Row, bias: str = "bias") -> float:
    """Return the batch size at which the squared bias equals the variance of the mean."""
    return row["variance"] / row[bias] ** 2 if row[bias] > NOTHING else math.inf


def divergences(rows: Sequence[Row]) -> Table:
    """Return the table of estimators of the divergence."""
    found = of(rows, "kl")
    distances = [short(distance) for distance in values_of(found, "distance")]
    lines = []
    for over in values_of(found, "over"):
        for estimator in values_of(found, "estimator"):
            own = [r for r in found if (r["over"], r["estimator"]) == (over, estimator)]
            bias, variance = ([cell(row, name) for row in own] for name in ("bias", "variance"))
            limit = enough(own[-1])
            last = brief(limit) if math.isfinite(limit) else "any"
            cosine = cell(own[-1], "cosine", 3)
            lines.append([estimator, over, *bias, cosine, *variance, last])
    headers = [
        *(f"bias {distance}" for distance in distances),
        f"cosine {distances[-1]}",
        *(f"variance {distance}" for distance in distances),
        "enough",
    ]
    title = "Gradient of KL(π ‖ π_ref), by the policy's distance from the reference"
    return Table(title, ["estimator", "tokens", *headers], lines)


def ascents(rows: Sequence[Row], best: float) -> Table:
    """Return the table of where exact ascent ends."""
    names = ("objective", "to_optimum", "reward", "divergence", "entropy")
    lines = []
    for row in of(rows, "ascent"):
        finite = all(math.isfinite(row[name]) for name in names)
        collapsed = finite and row["entropy"] < COLLAPSED
        remark = "" if finite and not collapsed else "one completion" if collapsed else "diverges"
        cells = [brief(row[name], 3) for name in names]
        lines.append([row["estimator"], row["over"], *cells, remark])
    headers = ["estimator", "tokens", "J", "KL to π*", "E[r]", "KL to π_ref", "entropy", ""]
    beta = of(rows, "ascent")[0]["beta"]
    title = f"Where exact ascent on E[r] − β KL ends (β = {short(beta)}; at π*, J = {best:.3g})"
    return Table(title, headers, lines)


def advantages(rows: Sequence[Row]) -> Table:
    """Return the table of generalised advantage estimates."""
    found = of(rows, "gae")
    lines = []
    for values in values_of(found, "values"):
        own = [row for row in found if row["values"] == values]
        for name in ("bias", "variance"):
            lines.append([values, name, *(cell(row, name) for row in own)])
    headers = [f"λ = {short(gae_lambda)}" for gae_lambda in values_of(found, "gae_lambda")]
    return Table("Policy gradient of PPO, by λ and by what V is", ["V", "", *headers], lines)


def groups(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of group sizes and normalisers."""
    alone, *found = of(rows, "group")
    sizes = values_of(found, "group_size")
    names = ("bias_scaled", "variance_scaled")
    by_name = {
        name: [scaled(row) for row in found if row["normaliser"] == name]
        for name in values_of(found, "normaliser")
    }
    headers = [f"{name.split('_')[0]} {size}" for name in names for size in sizes]
    lines = [
        [normaliser, *(cell(row, name) for name in names for row in own)]
        for normaliser, own in by_name.items()
    ]
    share = ", ".join(brief(row["of_prompts"]) for row in by_name["leave one out"])
    note = (
        "Bias and variance after division by the scale, which a learning rate makes up for. "
        f"Without a baseline (REINFORCE), the variance is {cell(alone, 'variance')}. Of that with "
        f"leave one out, {share} is due to the choice of prompts: larger groups are fewer prompts."
    )
    title = "Policy gradient of RLOO and GRPO, by group size and normaliser, per sampled completion"
    scales = [[name, *(cell(row, "scale", 3) for row in own)] for name, own in by_name.items()]
    headings = [f"G = {size}" for size in sizes]
    return [
        Table(title, ["normaliser", *headers], lines, note),
        Table("Scale of the same gradients", ["normaliser", *headings], scales),
    ]


def scaled(row: Row) -> Row:
    """Add the variance after division by the scale."""
    return {**row, "variance_scaled": row["variance"] / row["scale"] ** 2}


# ------------------------------------------------------------------------------------------- files


def agreement(count: int, largest: float, bound: float) -> str:
    """Say in one sentence whether samples and exact expectations agree."""
    if not count:
        return "Nothing was sampled."
    verdict = "agree" if largest <= bound else "do NOT agree"
    return (
        f"Samples and exact expectations {verdict}: of {count} comparisons, the largest |z| is "
        f"{largest:.2f}; chance alone exceeds {bound:.2f} in one study of a hundred."
    )


def markdown(command: str, found: Sequence[Table], sentence: str) -> str:
    """Return the tables as a Markdown page."""
    lines = ["# Estimators", "", f"`{command}`", ""]
    for text in LEGEND:
        lines += [text, ""]
    return "\n".join([*lines, *markdown_lines(found, 2), sentence, ""])


def write(directory: Path, rows: Sequence[Row], text: str) -> list[Path]:
    """Write the page, the numbers and the figure.

    Args:
        directory: made if need be.
        rows: as `study.run` returns them.
        text: of the page.

    Returns:
        The files.
    """
    with disk.faults("write", directory):
        directory.mkdir(parents=True, exist_ok=True)
    disk.write_text(directory / "estimators.md", text)
    disk.write_text(directory / "estimators.csv", csv_text(rows))
    drawn = figures.save_both(draw(rows), directory, "estimators")
    return [directory / "estimators.md", directory / "estimators.csv", *drawn]


# ------------------------------------------------------------------------------------------ figure


def draw(rows: Sequence[Row]) -> Any:
    """Draw the six panels."""
    figure, grid = figures.make_panels(6, 2, (6.4, 4.9))
    bias, variance, ends, gae, group_bias, group_variance = grid
    kl = [row for row in of(rows, "kl") if row["over"] == "sum"]
    _by_estimator(bias, kl, lambda row: row["bias"], "bias")
    figures.dress(bias, "KL estimator and place: bias", "of the expected gradient, token sums")
    _by_estimator(variance, kl, lambda row: row["variance"], "variance")
    figures.dress(variance, "KL estimator and place: variance", "of one completion's gradient")
    _ends(ends, of(rows, "ascent"))
    figures.dress(ends, "Where exact ascent ends", "divergence from the best policy")
    _gae(gae, of(rows, "gae"))
    figures.dress(gae, "λ trades bias for variance", "along a line, λ = 0, 0.5, 0.9, 0.95, 1")
    _, *found = map(scaled, of(rows, "group"))
    _over_group_size(group_bias, found, "bias_scaled", "bias, after division by the scale")
    figures.dress(group_bias, "Group size and normaliser: bias", "hollow: sampled")
    _over_group_size(group_variance, found, "variance_scaled", "variance per completion")
    _prompts(group_variance, found)
    figures.dress(group_variance, "Group size and normaliser: variance", "hollow: sampled")
    for axes in (bias, variance, ends):
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color="#ececec", linewidth=0.8)
    return figure


def _by_estimator(
    axes: "Axes", rows: Sequence[Row], value: Callable[[Row], float], label: str
) -> None:
    """Draw a number for each estimator and distance as points on a logarithmic axis."""
    names, distances = values_of(rows, "estimator"), values_of(rows, "distance")
    for i, distance in enumerate(distances):
        own = [row for row in rows if row["distance"] == distance]
        places = [
            names.index(row["estimator"]) + 0.16 * (i - (len(distances) - 1) / 2) for row in own
        ]
        shown = [value(row) if value(row) > NOTHING else FLOOR for row in own]
        colour, marker = figures.COLOURS[i % len(figures.COLOURS)], "osD^v"[i % 5]
        axes.plot(
            shown, places, marker, color=colour, markersize=6, label=f"distance {short(distance)}"
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"{label}, relative to the true gradient")
    if min(map(value, rows)) < NOTHING:
        ticks = [10.0**power for power in range(-4, 2)]
        axes.set_xticks(ticks, ["0", *(short(tick) for tick in ticks[1:])])
        axes.axvline(FLOOR, color="#c9c9c9", linewidth=1)
    axes.legend(ncols=3, columnspacing=1.0, handletextpad=0.1, **_below())


def _ends(axes: "Axes", rows: Sequence[Row]) -> None:
    """Draw the divergence from the best policy as bars."""
    names = values_of(rows, "estimator")
    for i, over in enumerate(values_of(rows, "over")):
        own = [row for row in rows if row["over"] == over]
        places = [names.index(row["estimator"]) + 0.36 * (i - 0.5) for row in own]
        lengths = [row["to_optimum"] if math.isfinite(row["to_optimum"]) else 0.0 for row in own]
        label = f"{over} over tokens"
        axes.barh(places, lengths, height=0.32, color=figures.COLOURS[i], label=label)
        for place, length, row in zip(places, lengths, own, strict=True):
            remark = number(length, 2) if math.isfinite(row["to_optimum"]) else "diverges"
            if row["entropy"] < COLLAPSED:
                remark += " (one completion)"
            axes.annotate(
                remark, (length, place), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.set_xlabel("KL(π ‖ π*) in nats")
    axes.legend(frameon=False, fontsize=9)


def _gae(axes: "Axes", rows: Sequence[Row]) -> None:
    """Draw variance over bias along λ, a line for each kind of values."""
    for i, values in enumerate(values_of(rows, "values")):
        own = [row for row in rows if row["values"] == values]
        points = [[row[name] for row in own] for name in ("bias", "variance")]
        colour, marker = figures.COLOURS[i], "osD^v"[i]
        axes.plot(*points, marker=marker, color=colour, markersize=5, label=f"V {values}")
    axes.set_xlabel("bias, relative to the true gradient")
    axes.set_ylabel("variance of one completion's gradient")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def _over_group_size(axes: "Axes", rows: Sequence[Row], name: str, label: str) -> None:
    """Draw a number over the group size, a line for each normaliser that changes it."""
    sizes = values_of(rows, "group_size")
    lines: dict[tuple[str, ...], list[Row]] = {}  # those that differ by a scale are one line
    for normaliser in values_of(rows, "normaliser"):
        own = [row for row in rows if row["normaliser"] == normaliser]
        key = tuple(f"{max(row[n], NOTHING):.6g}" for row in own for n in ("bias_scaled", name))
        lines.setdefault(key, []).extend(own)
    for i, own in enumerate(lines.values()):
        colour = (*figures.COLOURS, "#555555", "#56B4E9")[i]
        label_of = ",\n".join(values_of(own, "normaliser"))
        own = own[: len(sizes)]
        axes.plot(sizes, [row[name] for row in own], color=colour, linewidth=1.5, label=label_of)
        for row in own:
            face = "white" if row["how"] == "sampled" else colour
            axes.plot(row["group_size"], row[name], "o", color=colour, markerfacecolor=face)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("completions of a prompt, G (16 completions a batch)")
    axes.set_ylabel(label)
    axes.legend(ncols=2, **_below())


def _prompts(axes: "Axes", rows: Sequence[Row]) -> None:
    """Draw the part of RLOO's variance that is due to the choice of prompts."""
    own = [row for row in rows if row["normaliser"] == "leave one out"]
    points = [[row[name] for row in own] for name in ("group_size", "of_prompts")]
    axes.plot(*points, ":", color="#222222", linewidth=1.2, label="of it: choice of prompts")
    axes.legend(ncols=2, **_below())


def _below() -> dict[str, Any]:
    """Return the place of a legend under its panel."""
    place = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.13), "borderaxespad": 0.0}
    return {"frameon": False, "fontsize": 9, **place}
