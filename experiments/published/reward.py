"""A reward of text: the capital has to be in the answer, and short answers are better."""

from collections.abc import Sequence
from typing import Any


def reward(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict[str, Any]]
) -> list[float]:
    """Return 1 for a right answer, less 0.01 for each of its characters."""
    return [
        float(row["answer"] in text) - 0.01 * len(text)
        for text, row in zip(completions, rows, strict=True)
    ]
