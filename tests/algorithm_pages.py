"""What the tests of the pages under docs/algorithms share: their sections, tables and ranges."""

import dataclasses
import functools
import pathlib
import re
import tomllib
from typing import Any

import pytest

from purejaxpg import InputError

PAGES = pathlib.Path(__file__).resolve().parents[1] / "docs" / "algorithms"
NUMBERED = re.compile(r"^\d+\. ", re.MULTILINE)


@functools.cache
def sections(page: str) -> dict[str, str]:
    """Return the text of each section of a page, by its heading."""
    _, *parts = re.split(r"^## ", (PAGES / f"{page}.md").read_text(encoding="utf-8"), flags=re.M)
    return dict(part.split("\n", 1) for part in parts)


def rows(page: str, section: str) -> dict[str, list[str]]:
    """Return the cells of a table, without code marks, by the name in the first one."""
    found = re.findall(r"^\| `([\w/]+)` \| (.+) \|$", sections(page)[section], re.MULTILINE)
    assert len(found) == len(dict(found)), f"{page} has a row twice"
    return {name: [cell.strip().strip("`") for cell in rest.split(" | ")] for name, rest in found}


def plain(value: Any) -> Any:
    """Return a default as a sweep file writes it."""
    if isinstance(value, tuple):
        return list(value) if value else {}
    return value


def is_default(text: str, value: Any) -> bool:
    """Return whether a cell, read as in a sweep file, is the default of a field."""
    found = tomllib.loads(f"x = {text}")["x"]
    if value == ():
        return found in ({}, [])
    return type(found) is type(plain(value)) and found == plain(value)


def outside(text: str) -> list[float]:
    """Return numbers just outside a range as the pages write it; none if it is in words."""
    if bound := re.fullmatch(r"([≥>]) (-?\d+)", text):
        least = int(bound[2])
        return [least - 1 if bound[1] == "≥" else least]
    if ends := re.fullmatch(r"([\[(])(-?[.\d]+), (-?[.\d]+)([\])])", text):
        low, high = float(ends[2]), float(ends[3])
        return [low - 0.5 if ends[1] == "[" else low, high + 0.5 if ends[4] == "]" else high]
    return []


def require_settings(page: str, common: str, config: Any) -> None:
    """Require that a page, or the one with what is common, has each field and its default."""
    defaults = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    own, shared = rows(page, "Settings"), rows(common, "Settings")
    assert not own.keys() - defaults.keys() and not own.keys() & shared.keys()
    assert not defaults.keys() - own.keys() - shared.keys()
    for field, value in defaults.items():
        text = (own.get(field) or shared[field])[0]
        assert is_default(text, value), f"{page}.{field} is {value!r}, not {text}"


def require_refusals(page: str, common: str, module: Any, config: Any, least: int) -> None:
    """Require that `check` refuses what is outside the ranges of a page, of which some are numbers.

    Args:
        page: of the module; its ranges and those of `common` are read.
        common: the page with what is common.
        module: it has `check`.
        config: that passes it.
        least: this many ranges must be in numbers.
    """
    found = ranges(page, common, config)
    assert sum(bool(outside(text)) for text in found.values()) >= least
    for field, text in found.items():
        for number in outside(text):
            with pytest.raises(InputError, match=field):
                module.check(dataclasses.replace(config, **{field: number}))


def ranges(page: str, common: str, config: Any) -> dict[str, str]:
    """Return the range of each field of a configuration, as the pages write it."""
    found = {**rows(common, "Settings"), **rows(page, "Settings")}
    return {field: cells[1] for field, cells in found.items() if hasattr(config, field)}
