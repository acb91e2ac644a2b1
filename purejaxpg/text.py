"""Numbers and errors as text, so that every message, table and figure writes them alike."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def short(value: Any) -> str:
    """Return a value as one would write it by hand: ``3e-4`` for ``0.00030000001``.

    Args:
        value: a swept value.

    Returns:
        At most four significant digits for a float, otherwise its plain text.
    """
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(short(item) for item in value) + "]"
    if not isinstance(value, float):
        return str(value)
    if value == 0.0 or not math.isfinite(value) or 1e-2 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def count(number: int, noun: str) -> str:
    """1 -> "1 noun", 2 -> "2 nouns"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def label(swept: Mapping[str, Any]) -> str:
    """{"learning_rate": 3e-4, "clip_eps": 0.2} -> "learning_rate=3e-4 clip_eps=0.2"."""
    return " ".join(f"{name}={short(value)}" for name, value in swept.items())


def duration(seconds: float) -> str:
    """90 -> "90 s", 900 -> "15 min", 90000 -> "25.0 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def rate(per_second: float, noun: str) -> str:
    """Return a rate in the unit of time that makes it at least 1: "1.2k steps/s", "3 agents/h"."""
    units = (("s", 1.0), ("min", 60.0), ("h", 3600.0))
    unit, seconds = next((u for u in units if per_second * u[1] >= 1), ("day", 86400.0))
    value = per_second * seconds
    shown = engineering(float(f"{value:.2g}") if value < 10 else value)
    return f"{shown} {noun}/{unit}"


def number(value: float, digits: int = 3) -> str:
    """Return a number with about three significant digits, or a dash if it is not finite."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        shown = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
        text = f"{value:.{min(shown, 6)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
    else:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if text in ("-0", "0"):
        return "0"
    return f"−{text[1:]}" if text.startswith("-") else text


def interval(low: float, high: float, form: Callable[[float], str] = number) -> str:
    """Return an interval such as ``[0.1, 0.2]``."""
    return f"[{form(low)}, {form(high)}]"


def estimate(value: float, low: float, high: float, form: Callable[[float], str] = number) -> str:
    """Return a value with its interval, if it has one."""
    return f"{form(value)} {interval(low, high, form)}" if high > low else form(value)


def percent(share: float) -> str:
    """Return a share in whole per cent, or "<1%"."""
    return "<1%" if 0.0 < share < 0.005 else f"{100 * share:.0f}%"


def engineering(value: float | None) -> str:
    """Return a count such as 1.5M, or a dash for None."""
    if value is None:
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{number(value / size)}{letter}"
    return number(value)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def paragraphs(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return columns of equal length as lines, a paragraph for each row."""
    width, lines = max(map(len, columns)), []
    for values in zip(*columns.values(), strict=True):
        lines += [f"{name:>{width}s}  {value}" for name, value in zip(columns, values, strict=True)]
        lines.append("")
    return lines
