"""Draw how the agreement of a judge with gold labels shows in the policies that it trains.

    python experiments/rlhf/rlaif.py results/rlaif

writes rlaif.png and rlaif.csv.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import results

from purejaxpg.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED, *_ = figures.COLOURS
GREY, DARK = "#888888", "#222222"
JUDGES = ("50", "200", "noisy", "1000", "10000")
NAMES = {"noisy": "10,000, 40% wrong", "1000": "1,000", "10000": "10,000"}
# By label: the first part of the names of stages, and a colour.
METHODS = {"the judge itself": ("direct", BLUE), "reward model of its labels": ("rlaif", RED)}
GOLD = "gold-rlhf"
SCORES = ("win", "return", "kl", "gap")
Runs = Sequence[dict[str, Any]]


# ---------------------------------------------------------------------------------- reading


def policies(directory: Path, stage: str, best: Mapping[int, Any]) -> Runs:
    """Return the runs of a stage, each with its distance from the frontier, `gap`."""
    found = results.runs(directory, stage)
    return [{**run, "gap": gap} for run, gap in zip(found, results.gaps(found, best), strict=True)]


def row_of(label: str, labels: str, found: Runs, agreements: Mapping[str, Runs]) -> dict[str, Any]:
    """Return means over seeds, and the least and the largest value of what is drawn."""
    row: dict[str, Any] = {"reward": label, "labels": labels}
    for name in ("judge", "reward model"):
        own = agreements.get(name, ())
        row |= results.ends(
            f"{name} agrees", results.column(own, "return") if own else np.full(1, np.nan)
        )
    for name in SCORES:
        row |= results.ends(name, results.column(found, name))
    return row


def table(directory: Path, best: Mapping[int, Any]) -> list[dict[str, Any]]:
    gold = {"reward model": results.runs(directory, "gold-reward")}
    rows = [
        row_of("reward model of gold labels", "", policies(directory, GOLD, best), gold),
    ]
    for label, (prefix, _) in METHODS.items():
        for judge in JUDGES:
            agreements = {"judge": results.runs(directory, f"judge-{judge}")}
            if prefix == "rlaif":
                agreements["reward model"] = results.runs(directory, f"reward-{judge}")
            found = policies(directory, f"{prefix}-{judge}", best)
            rows.append(row_of(label, NAMES.get(judge, judge), found, agreements))
    return rows


# ---------------------------------------------------------------------------------- the figure


def draw_agreement(axes: "Axes", rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draw a score of policies over the agreement of their judge, with ranges over seeds."""
    gold = rows[0]
    axes.axhspan(gold[f"{name} low"], gold[f"{name} high"], color=GREY, alpha=0.2, lw=0)
    axes.axhline(gold[name], color=GREY, lw=1.4, label="reward model of gold labels")
    for label, (_, colour) in METHODS.items():
        own = [row for row in rows if row["reward"] == label]
        (x, x_errors), (y, y_errors) = (
            results.errors(own, "judge agrees"),
            results.errors(own, name),
        )
        clean = [i for i, row in enumerate(own) if "wrong" not in row["labels"]]
        axes.plot(x[clean], y[clean], color=colour, lw=1, alpha=0.5)
        for marker, part in (("o", clean), ("s", sorted({*range(len(own))} - {*clean}))):
            axes.errorbar(
                x[part], y[part], xerr=x_errors[:, part], yerr=y_errors[:, part], fmt=marker,
                color=colour, ms=5.5, elinewidth=1.2,
                label=label if marker == "o" else None,
            )  # fmt: skip
    axes.set_xlabel("share of gold labels with which the judge agrees")
    axes.margins(x=0.08, y=0.12)
    for row in own:  # the last method: all have the same judges
        place = (row["judge agrees"], 0.99)
        words = row["labels"].replace(", ", ",\n") if "wrong" in row["labels"] else row["labels"]
        axes.text(
            *place, words, transform=axes.get_xaxis_transform(), ha="center", va="top",
            fontsize=8, color=GREY,
        )  # fmt: skip


def draw_divergence(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], best: Mapping[int, Any]
) -> None:
    """Draw gold reward over divergence, and the best that is possible for each reference."""
    reach = 1.15 * max(row["kl high"] for row in rows)
    for kl, reward in best.values():
        near = kl <= reach
        axes.plot(kl[near], reward[near], color=GREY, lw=1, alpha=0.7, zorder=1)
    axes.plot([], [], color=GREY, lw=1, label="best possible, by seed")
    colours = {label: colour for label, (_, colour) in METHODS.items()}
    for row in rows:
        (x, x_errors), (y, y_errors) = results.errors([row], "kl"), results.errors([row], "return")
        axes.errorbar(
            x, y, xerr=x_errors, yerr=y_errors, fmt="s" if "wrong" in row["labels"] else "o",
            color=colours.get(row["reward"], DARK), ms=5.5, elinewidth=1.2,
            label="gold labels" if row["reward"] not in colours else None,
        )  # fmt: skip
    axes.set_xlabel("KL to the reference (nats per completion)")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def draw(directory: Path, rows: list[dict[str, Any]], best: Mapping[int, Any], path: Path) -> None:
    figure, (win, gold, divergence) = figures.make_panels(3, 3, (4.6, 4.0))
    seeds = len(results.runs(directory, GOLD))
    draw_agreement(win, rows, "win")
    win.set_ylabel("share of wins against the reference")
    win.legend(frameon=False, fontsize=9, loc="lower right")
    figures.dress(win, "Wins", f"equal beta; mean and range of {seeds} seeds; grey: labels")
    draw_agreement(gold, rows, "return")
    gold.set_ylabel("gold reward")
    figures.dress(gold, "Gold reward", "equal beta; square: 40% of the labels are wrong")
    draw_divergence(divergence, rows, best)
    divergence.set_ylabel("gold reward")
    figures.dress(divergence, "What the divergence buys", "the same policies")
    figures.save(figure, path)


def main() -> None:
    arguments = results.arguments(__doc__)
    best = results.frontiers(arguments.directory, GOLD)
    rows = table(arguments.directory, best)
    results.write(arguments.out / "rlaif.csv", rows)
    draw(arguments.directory, rows, best, arguments.out / "rlaif.png")


if __name__ == "__main__":
    main()
