"""All studies of the laboratory together."""

import math
from collections.abc import Sequence

import jax

from purejaxpg.lab import divergences, groups, laboratory, values
from purejaxpg.lab.laboratory import Row, Say, Setting


def agreement(rows: Sequence[Row]) -> tuple[int, float, float]:
    """Return the number of comparisons, the largest |z|, and what it exceeds once in a hundred."""
    from scipy import special

    count = sum(each.get("comparisons", 0) for each in rows)
    compared = [each for each in rows if each.get("comparisons")]
    z = [abs(each[name]) for each in compared for name in ("z_mean", "z_square")]
    largest = max(z, default=math.nan)
    bound = float(-special.ndtri(0.005 / count)) if count else math.nan
    return count, largest, bound


def run(setting: Setting, say: Say) -> tuple[list[Row], float]:
    """Run all studies -> rows, and J of the best policy.

    Args:
        setting: what is studied.
        say: takes a line of progress.

    Raises:
        InputError: the setting makes no sense.
    """
    with jax.enable_x64(True):
        lab = laboratory.Lab(setting, say)
        rows = divergences.gradient_rows(lab) + divergences.ascent_rows(lab)
        rows += values.rows(lab) + groups.rows(lab)
        return rows, divergences.best_objective(lab)
