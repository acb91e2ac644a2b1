"""The pages about the agents name every setting, metric and departure that the files have."""

import importlib
import math
import pkgutil
import re

import agents_under_test as under_test
import jax
import pytest
from algorithm_pages import (
    NUMBERED,
    PAGES,
    is_default,
    outside,
    require_refusals,
    require_settings,
    rows,
    sections,
)

import purejaxpg.agents

NAMES = [module.name for module in pkgutil.iter_modules(purejaxpg.agents.__path__)]
SECTIONS = [
    "The objective", "When to use it", "The update", "Departures from the paper", "Settings",
    "Metrics", "Results", "Known to fail when", "Beside other implementations", "Sources",
]  # fmt: skip


@pytest.mark.fast
@pytest.mark.parametrize("name", NAMES)
class TestPages:
    def test_it_has_every_section(self, name: str) -> None:
        assert list(sections(name)) == SECTIONS

    def test_it_has_every_setting_with_its_default(self, name: str) -> None:
        config = importlib.import_module(f"purejaxpg.agents.{name}").Config()
        require_settings(name, "common", config)

    def test_what_is_outside_a_range_is_refused(self, name: str) -> None:
        agent = importlib.import_module(f"purejaxpg.agents.{name}")
        require_refusals(name, "common", agent, agent.Config(), least=12)

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
    assert outside("[0, 1]") == [-0.5, 1.5] and outside("[0, 0.5)") == [-0.5, 0.5]
    assert outside("(0, 1]") == [0, 1.5]
    assert outside("a name") == [] and is_default("inf", math.inf) and is_default("{}", ())
    assert not is_default("1", 1.0) and not is_default("[32]", (64,))


@pytest.mark.fast
def test_the_index_leads_to_every_page() -> None:
    text = (PAGES / "index.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in text and f"\n{name}\n" in text for name in NAMES)
