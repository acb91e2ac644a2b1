"""Draw how close preference methods come to the best policies, by noise and balance of the labels.

    python experiments/rlhf/preferences.py results/preferences

writes preferences.png and preferences.csv.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import results

from purejaxpg.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED, GREEN, PINK, ORANGE = figures.COLOURS
GREY, DARK = "#888888", "#222222"
NOISE = (0.0, 0.2, 0.4)
# By label: a stage whose runs have some or all of the noise, and a colour.
METHODS = {
    "DPO": ("dpo", BLUE),
    "conservative DPO": ("conservative", PINK),
    "IPO": ("ipo", GREEN),
    "KTO": ("kto", RED),
}
RLOO = "RLOO on a reward model"
# By label: a stage of KTO without noise, the swept weight and its value, and a format.
BALANCE = {
    "all labels": ("kto", "", 0.0, "o-"),
    "half of the completions": ("kto-half", "", 0.0, "o:"),
    "10% of the good": ("kto-few-good", "desirable_weight", 1.0, "v--"),
    "10% of the good, times 10": ("kto-few-good", "desirable_weight", 10.0, "v-"),
    "10% of the bad": ("kto-few-bad", "undesirable_weight", 1.0, "^--"),
    "10% of the bad, times 10": ("kto-few-bad", "undesirable_weight", 10.0, "^-"),
}
COLOURS = (RED, DARK, BLUE, BLUE, GREEN, GREEN)
STRENGTHS = ("beta", "threshold")  # what each method sweeps to move farther
SCORES = ("kl", "return", "gap", "win")
LOWEST = -4.4  # gap that is drawn; policies that hardly ever end a sentence are at -8 or less
Runs = Sequence[dict[str, Any]]


# ---------------------------------------------------------------------------------- reading


def rows_of(found: Runs, best: Mapping[int, Any], **columns: Any) -> list[dict[str, Any]]:
    """Return means, least and largest values over seeds, a row for each strength."""
    known = results.gaps(found, best)
    runs = [{**run, "gap": gap} for run, gap in zip(found, known, strict=True)]
    (strength,) = (name for name in STRENGTHS if name in runs[0])
    rows = []
    for value in sorted({run[strength] for run in runs}):
        own = [run for run in runs if run[strength] == value]
        row = {**columns, strength: value}
        for name in SCORES:
            row |= results.ends(name, results.column(own, name))
        rows.append({"method": "", "noise": 0.0, "labels": "all labels", "beta": "",
                     "threshold": "", **row})  # fmt: skip
    return rows


def noisy(directory: Path, best: Mapping[int, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all methods with each share of wrong labels."""
    for noise in NOISE:
        for method, (stage, _) in METHODS.items():
            own = [run for run in results.runs(directory, stage) if run["label_noise"] == noise]
            if own:
                yield from rows_of(own, best, method=method, noise=noise)
        own = results.runs(directory, f"rloo-{100 * noise:.0f}")
        yield from rows_of(own, best, method=RLOO, noise=noise)


def unbalanced(directory: Path, best: Mapping[int, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of KTO with a part of the labels, without noise."""
    for labels, (stage, weight, value, _) in list(BALANCE.items())[1:]:
        own = [run for run in results.runs(directory, stage) if not weight or run[weight] == value]
        yield from rows_of(own, best, method="KTO", labels=labels)


# ---------------------------------------------------------------------------------- the figure


def chosen(rows: Runs, method: str, noise: float = 0.0, labels: str = "all labels") -> Runs:
    columns = {"method": method, "noise": noise, "labels": labels}
    return [row for row in rows if columns.items() <= row.items()]


def draw_line(axes: "Axes", rows: Runs, label: str, colour: str, form: str = "o-") -> list[str]:
    """Draw the distance from the frontier over the divergence, with ranges over seeds.

    Returns a line for each row that lies too low to be drawn.
    """
    lost = [f"{label}, threshold {row['threshold']:g}" for row in rows if row["gap"] < LOWEST]
    rows = sorted((row for row in rows if row["gap"] >= LOWEST), key=lambda row: row["kl"])
    if not rows:
        return lost
    (x, x_errors), (y, y_errors) = results.errors(rows, "kl"), results.errors(rows, "gap")
    axes.errorbar(
        x, y, xerr=x_errors, yerr=y_errors, fmt=form, color=colour, ms=5, lw=1.2,
        elinewidth=0.8, label=label,
    )  # fmt: skip
    return lost


def finish(axes: "Axes", title: str, under: str, lost: Sequence[str]) -> None:
    axes.axhline(0.0, color=GREY, lw=1)
    axes.set_xscale("log")
    axes.set_xlim(0.006, 20)
    axes.set_ylim(LOWEST, 0.3)
    axes.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    axes.set_xlabel("KL to the reference (nats per completion)")
    axes.set_ylabel("gold reward less the best possible")
    figures.dress(axes, title, under)
    if lost:
        words = "\n".join(["Below the figure:", *lost])
        axes.text(0.02, 0.79, words, transform=axes.transAxes, va="top", fontsize=7, color=DARK)


def draw(rows: Runs, seeds: int, path: Path) -> None:
    figure, panels = figures.make_panels(4, 2, (4.1, 3.3))
    colours = {method: colour for method, (_, colour) in METHODS.items()} | {RLOO: DARK}
    for axes, noise in zip(panels, NOISE, strict=False):
        lost = []
        for method, colour in colours.items():
            lost += draw_line(axes, chosen(rows, method, noise), method, colour)
        title = f"{100 * noise:.0f}% of the labels are wrong" if noise else "All labels are honest"
        finish(axes, title, f"mean and range of {seeds} seeds", lost)
    lost = []
    for colour, (labels, (*_, form)) in zip(COLOURS, BALANCE.items(), strict=True):
        lost += draw_line(panels[-1], chosen(rows, "KTO", labels=labels), labels, colour, form)
    finish(panels[-1], "KTO with a part of the labels", "times 10: with ten times the weight", lost)
    for axes in panels[1::2]:  # the second has all methods
        axes.legend(frameon=False, fontsize=8, loc="lower left", labelspacing=0.3)
    figures.save(figure, path)


def main() -> None:
    arguments = results.arguments(__doc__)
    best = results.frontiers(arguments.directory, "dpo")
    rows = [*noisy(arguments.directory, best), *unbalanced(arguments.directory, best)]
    results.write(arguments.out / "preferences.csv", rows)
    draw(rows, len(best), arguments.out / "preferences.png")


if __name__ == "__main__":
    main()
