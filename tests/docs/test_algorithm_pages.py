"""The pages about the agents name every setting, metric and departure that the files have."""

import dataclasses
import functools
import importlib
import math
import pathlib
import pkgutil
import re
import tomllib
from typing import Any

import agents_under_test as under_test
import jax
import pytest

import purejaxpg.agents
from purejaxpg import InputError

PAGES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "algorithms"
NAMES = [module.name for module in pkgutil.iter_modules(purejaxpg.agents.__path__)]
SECTIONS = [
    "The objective", "When to use it", "The update", "Departures from the paper", "Settings",
    "Metrics", "Results", "Known to fail when", "Beside other implementations", "Sources",
]  # fmt: skip
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
    found = tomllib.loads(f"x = {text}")["x"]
    if value == ():
        return found in ({}, [])
    return type(found) is type(plain(value)) and found == plain(value)


def outside(text: str) -> list[float]:
    """Return numbers just outside a range as the pages write it; none if it is in words."""
    if bound := re.fullmatch(r"([≥>]) (-?\d+)", text):
        least = int(bound[2])
        return [least - 1 if bound[1] == "≥" else least]
    if ends := re.fullmatch(r"([\[(])(-?\d+), (-?\d+)([\])])", text):
        low, high = int(ends[2]), int(ends[3])
        return [low - 0.5 if ends[1] == "[" else low, high + 0.5 if ends[4] == "]" else high]
    return []


@pytest.mark.fast
@pytest.mark.parametrize("name", NAMES)
class TestPages:
    def test_it_has_every_section(self, name: str) -> None:
        assert list(sections(name)) == SECTIONS

    def test_it_has_every_setting_with_its_default(self, name: str) -> None:
        config = importlib.import_module(f"purejaxpg.agents.{name}").Config()
        defaults = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
        own, common = rows(name, "Settings"), rows("common", "Settings")
        assert not own.keys() - defaults.keys() and not own.keys() & common.keys()
        assert not defaults.keys() - own.keys() - common.keys()
        for field, value in defaults.items():
            text = (own.get(field) or common[field])[0]
            assert is_default(text, value), f"{name}.{field} is {value!r}, not {text}"

    def test_what_is_outside_a_range_is_refused(self, name: str) -> None:
        agent = importlib.import_module(f"purejaxpg.agents.{name}")
        config = agent.Config()
        found = {**rows("common", "Settings"), **rows(name, "Settings")}
        ranges = {field: cells[1] for field, cells in found.items() if hasattr(config, field)}
        assert sum(bool(outside(text)) for text in ranges.values()) >= 12
        for field, text in ranges.items():
            for number in outside(text):
                changed = dataclasses.replace(config, **{field: number})
                with pytest.raises(InputError, match=field):
                    agent.check(changed)

    def test_it_has_every_metric(self, name: str) -> None:
        agent = importlib.import_module(f"purejaxpg.agents.{name}")
        config = under_test.tiny(agent)
        key = jax.random.key(0)
        state = jax.eval_shape(lambda key: agent.init(key, config), key)
        _, metrics = jax.eval_shape(lambda key, state: agent.update(key, state, config), key, state)
        assert rows(name, "Metrics").keys() | rows("common", "Metrics").keys() == metrics.keys()

    def test_it_has_every_departure_of_the_file(self, name: str) -> None:
        source = importlib.import_module(f"purejaxpg.agents.{name}").__doc__ or ""
        _, found = re.split(r"^Differs .*:$", source, flags=re.MULTILINE)
        page = sections(name)["Departures from the paper"]
        assert NUMBERED.findall(page) == NUMBERED.findall(found) != []

    def test_it_shows_code_of_the_agents_own_file(self, name: str) -> None:
        shown = re.findall(r"\{literalinclude\} (\S+)", sections(name)["The update"])
        assert len(shown) >= 5 and set(shown) == {f"../../purejaxpg/agents/{name}.py"}


@pytest.mark.fast
def test_numbers_outside_a_range() -> None:
    assert outside("≥ 1") == [0] and outside("> 0") == [0]
    assert outside("[0, 1]") == [-0.5, 1.5] and outside("(0, 1]") == [0, 1.5]
    assert outside("a name") == [] and is_default("inf", math.inf) and is_default("{}", ())
    assert not is_default("1", 1.0) and not is_default("[32]", (64,))


@pytest.mark.fast
def test_the_index_leads_to_every_page() -> None:
    text = (PAGES / "index.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in text and f"\n{name}\n" in text for name in NAMES)
