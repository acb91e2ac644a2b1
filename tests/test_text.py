"""How numbers are written."""

import math

import numpy as np
import pytest

from purejaxpg import text as texts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0003000001, "3e-4"), (float(np.float32(3e-4)), "3e-4"), (2.5e-4, "2.5e-4"),
        (0.001, "1e-3"), (0.2, "0.2"), (0.95, "0.95"), (1.0, "1"), (0.0, "0"), (1e5, "1e5"),
        (1234.5678, "1235"), (-3e-4, "-3e-4"), (float("inf"), "inf"), (8, "8"), (100000, "100000"),
        (True, "true"), (None, "none"), ("tanh", "tanh"),
        ([64, 1e-4], "[64, 1e-4]"),
    ],
)  # fmt: skip
def test_values_are_short(value, text):
    assert texts.short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (12.3456, "12.3"), (-486.4, "−486"), (0.0012345, "0.00123"), (1e-5, "1e-5"),
        (123456.0, "1.23e5"), (math.nan, "–"), (math.inf, "–"), (-0.0, "0"), (100.0, "100"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert texts.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (119, "119 s"), (900, "15 min"), (9000, "2.5 h")]
)
def test_times_in_words(seconds: float, text: str) -> None:
    assert texts.duration(seconds) == text
