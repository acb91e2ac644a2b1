"""Draw how many principles answers violate after revisions, and after feedback.

    python experiments/rlhf/constitution.py results/constitution

writes constitution.png and constitution.csv.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import results

from purejaxpg.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED, *_ = figures.COLOURS
GREY = "#888888"
COUNTS = (0, 1, 2, 4)  # revisions of what the policies imitate
MODEL, EXACT = "the model", "exact rules"
CRITICS = {MODEL: BLUE, EXACT: RED}
SCORES = ("violations", "return", "finished", "length", "kl")
Runs = Sequence[dict[str, Any]]


# ---------------------------------------------------------------------------------- reading


def imitators(directory: Path, critic: str) -> dict[int, Runs]:
    """Return the runs that imitate revisions of a critic, by the number of revisions."""
    model, exact = (results.runs(directory, stage) for stage in ("model", "exact"))
    four = [{**run, "num_revisions": 4} for run in results.runs(directory, "revised")]
    none = [run for run in model if run["num_revisions"] == 0]
    found = none + exact if critic == EXACT else model + four
    return {r: [run for run in found if run["num_revisions"] == r] for r in COUNTS}


def answers(directory: Path, critic: str) -> dict[int, np.ndarray]:
    """Return violations of the assistant's own answers after r revisions -> by r, [seeds]."""
    four = imitators(directory, critic)[4]
    return {r: results.column(four, f"violations_after_{r}") for r in range(5)}


def rows_of(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield means over seeds, and the least and the largest value, of each configuration."""
    for critic in CRITICS:
        revised = answers(directory, critic)
        for r, found in imitators(directory, critic).items():
            row = {"phase": "revision", "critic": critic, "revisions": r, "beta": ""}
            yield row | results.ends("answers", revised[r]) | _scores(found)
    found = results.runs(directory, "feedback")
    for beta in sorted({run["beta"] for run in found}):
        own = [run for run in found if run["beta"] == beta]
        row = {"phase": "feedback", "critic": MODEL, "revisions": 4, "beta": beta}
        yield row | results.ends("answers", np.full(1, np.nan)) | _scores(own)


def _scores(found: Runs) -> dict[str, float]:
    row: dict[str, float] = {}
    for name in SCORES:
        row |= results.ends(name, results.column(found, name))
    return row


# ---------------------------------------------------------------------------------- the figure


def draw_line(
    axes: "Axes", x: Sequence[float], rows: Sequence[Mapping[str, Any]], name: str, **style: Any
) -> None:
    """Draw means over seeds, with the range of the seeds."""
    axes.errorbar(x, *results.errors(rows, name), ms=5, capsize=2, **style)


def draw_revisions(axes: "Axes", rows: Sequence[Mapping[str, Any]], directory: Path) -> None:
    for critic, colour in CRITICS.items():
        own = [row for row in rows if row["phase"] == "revision" and row["critic"] == critic]
        draw_line(axes, COUNTS, own, "violations", fmt="o-", color=colour, label=critic)
        after = [results.ends("answers", values) for values in answers(directory, critic).values()]
        draw_line(axes, range(len(after)), after, "answers", fmt="s:", color=colour, alpha=0.6)
    axes.set_xticks(range(5))
    axes.set_xlabel("revisions")
    axes.set_ylabel("principles violated per answer")
    axes.set_ylim(bottom=0)
    handles, labels = axes.get_legend_handles_labels()
    (imitated,) = axes.plot([], [], "s:", color=GREY)
    axes.legend(
        [*handles, imitated], [*labels, "the answers themselves"], frameon=False, fontsize=9,
        title="policies that imitate revisions by", alignment="left",
    )  # fmt: skip


def draw_feedback(axes: "Axes", rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draw a score of the policies after feedback, and before it."""
    (before,) = (
        row
        for row in rows
        if (row["phase"], row["critic"], row["revisions"]) == ("revision", MODEL, 4)
    )
    axes.axhspan(before[f"{name} low"], before[f"{name} high"], color=GREY, alpha=0.2, lw=0)
    axes.axhline(before[name], color=GREY, lw=1.4, label="before: 4 revisions by the model")
    own = [row for row in rows if row["phase"] == "feedback"]
    betas = [row["beta"] for row in own]
    draw_line(axes, betas, own, name, fmt="o-", color=BLUE, label="after feedback")
    axes.set_xscale("log")
    axes.set_xticks(betas, [str(beta) for beta in betas], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("beta, the price of a nat of divergence")
    axes.legend(frameon=False, fontsize=9)


def draw(directory: Path, rows: list[dict[str, Any]], path: Path) -> None:
    figure, (revisions, violations, length) = figures.make_panels(3, 3, (4.6, 4.0))
    seeds = len(results.runs(directory, "revised"))
    draw_revisions(revisions, rows, directory)
    figures.dress(revisions, "Revisions", f"held-out prompts; mean and range of {seeds} seeds")
    draw_feedback(violations, rows, "violations")
    violations.set_ylabel("principles violated per answer")
    violations.set_ylim(bottom=0)
    figures.dress(violations, "Feedback", "reward: the model's own judgement")
    draw_feedback(length, rows, "length")
    length.set_ylabel("tokens per answer")
    length.set_ylim(bottom=0)
    figures.dress(length, "Length", "the same policies")
    figures.save(figure, path)


def main() -> None:
    arguments = results.arguments(__doc__)
    rows = list(rows_of(arguments.directory))
    results.write(arguments.out / "constitution.csv", rows)
    draw(arguments.directory, rows, arguments.out / "constitution.png")


if __name__ == "__main__":
    main()
