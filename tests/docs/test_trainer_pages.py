"""The pages about trainers of language models name every setting, metric and departure."""

import dataclasses
import functools
import importlib
import pathlib
import pkgutil
import re
import tomllib
from typing import Any

import jax
import pytest

import purejaxpg.rlhf
from purejaxpg import InputError
from purejaxpg.rlhf import comparison, sft, tasks, transformer

PAGES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "algorithms"
MODULES = {
    name: importlib.import_module(f"purejaxpg.rlhf.{name}")
    for _, name, is_package in pkgutil.iter_modules(purejaxpg.rlhf.__path__)
    if not is_package
}
TRAINERS = {name: module for name, module in MODULES.items() if hasattr(module, "update")}
SECTIONS = [
    "The objective", "When to use it", "What it is given", "The update",
    "Departures from the paper", "Settings", "Metrics", "Results", "Known to fail when",
    "Beside other implementations", "Sources",
]  # fmt: skip
# Settings that add metrics to those of the defaults.
MORE: dict[str, dict[str, Any]] = {
    "constitution": {"phase": "feedback"},
    "grpo": {"kl_placement": "loss", "kl_estimator": "k3"},
    "rloo": {"task": "addition-1"},
}
NUMBERED = re.compile(r"^\d+\. ", re.MULTILINE)
ROW = re.compile(r"^\| `([\w/]+)` \| (.+) \|$", re.MULTILINE)


@functools.cache
def sections(page: str) -> dict[str, str]:
    """Return the text of each section of a page, by its heading."""
    text = (PAGES / f"rlhf-{page}.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    return dict(part.split("\n", 1) for part in parts)


def rows(page: str, section: str) -> dict[str, list[str]]:
    """Return the cells of a table, without code marks, by the name in the first one."""
    found = ROW.findall(sections(page)[section])
    assert len(found) == len(dict(found)), f"{page} has a row twice"
    return {name: [cell.strip().strip("`") for cell in rest.split(" | ")] for name, rest in found}


def is_default(text: str, value: Any) -> bool:
    found = tomllib.loads(f"x = {text}")["x"]
    return type(found) is type(value) and found == value


def outside(text: str) -> list[float]:
    """Return numbers just outside a range as the pages write it; none if it is in words."""
    if bound := re.fullmatch(r"([≥>]) (-?\d+)", text):
        return [int(bound[2]) - (bound[1] == "≥")]
    if ends := re.fullmatch(r"([\[(])([-.\d]+), ([-.\d]+)([\])])", text):
        low, high = float(ends[2]), float(ends[3])
        return [low - 0.5 * (ends[1] == "["), high + 0.5 * (ends[4] == "]")]
    return []


def given(key: jax.Array, module: Any, config: Any) -> Any:
    """Return a small untrained model for each one that the trainer cannot do without."""
    task = tasks.make(config.task)
    small = sft.Config(task=config.task, width=8, num_heads=2, mlp_width=8, positions="rotary")
    reference = transformer.init(key, sft.architecture(small))
    models = {"reference": reference, "teacher": reference}
    models["judge"] = comparison.start(key, reference, task)
    needed = [
        field.name
        for field in dataclasses.fields(module.Given)
        if field.default is dataclasses.MISSING
    ]
    return module.Given(**{name: models[name] for name in needed})


def metrics(name: str, changes: dict[str, Any]) -> set[str]:
    """Return the names of what `update` returns, without running it."""
    module = TRAINERS[name]
    config = dataclasses.replace(module.Config(), **changes)

    def run(key: jax.Array) -> Any:
        models = given(key, module, config)
        return module.update(key, module.init(key, config, models), config, models)[1]

    return set(jax.eval_shape(run, jax.random.key(0)))


@pytest.mark.fast
@pytest.mark.parametrize("name", TRAINERS)
class TestPages:
    def test_it_has_every_section(self, name: str) -> None:
        assert list(sections(name)) == SECTIONS

    def test_it_has_every_setting_with_its_default(self, name: str) -> None:
        config = TRAINERS[name].Config()
        defaults = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
        own, common = rows(name, "Settings"), rows("common", "Settings")
        assert not own.keys() - defaults.keys() and not own.keys() & common.keys()
        assert not defaults.keys() - own.keys() - common.keys()
        for field, value in defaults.items():
            text = (own.get(field) or common[field])[0]
            assert is_default(text, value), f"{name}.{field} is {value!r}, not {text}"

    def test_what_is_outside_a_range_is_refused(self, name: str) -> None:
        module, own = TRAINERS[name], rows(name, "Settings")
        config = module.Config(**MORE[name] if name == "constitution" else {})
        found = {**rows("common", "Settings"), **own}
        ranges = {field: cells[1] for field, cells in found.items() if hasattr(config, field)}
        assert sum(bool(outside(text)) for text in ranges.values()) >= 5
        for field, text in ranges.items():
            for number in outside(text):
                changed = dataclasses.replace(config, **{field: number})
                with pytest.raises(InputError, match=field):
                    module.check(changed)

    def test_it_has_every_metric(self, name: str) -> None:
        own, common = rows(name, "Metrics").keys(), rows("common", "Metrics").keys()
        found = metrics(name, {})
        if name in MORE:
            found |= metrics(name, MORE[name])
        assert own == found - common and not own & common

    def test_it_has_every_departure_of_the_file(self, name: str) -> None:
        _, *found = re.split(r"Differs .*:\n", TRAINERS[name].__doc__ or "")
        page = NUMBERED.findall(sections(name)["Departures from the paper"])
        in_file = NUMBERED.findall(found[0]) if found else []
        assert page and page[: len(in_file)] == in_file

    def test_it_shows_code_of_its_own_file(self, name: str) -> None:
        shown = re.findall(r"\{literalinclude\} (\S+)", sections(name)["The update"])
        assert len(shown) >= 4 and set(shown) == {f"../../purejaxpg/rlhf/{name}.py"}


@pytest.mark.fast
def test_what_is_common_is_somewhere() -> None:
    fields = {field.name for x in TRAINERS.values() for field in dataclasses.fields(x.Config)}
    assert not rows("common", "Settings").keys() - fields
    assert not rows("common", "Metrics").keys() - metrics("rloo", MORE["rloo"])


@pytest.mark.fast
def test_numbers_outside_a_range() -> None:
    assert outside("≥ 1") == [0] and outside("> 0") == [0] and outside("[0, 0.5)") == [-0.5, 0.5]
    assert outside("(0, 1]") == [0, 1.5] and outside("a name") == []
    assert is_default("inf", float("inf")) and not is_default("1", 1.0)


@pytest.mark.fast
def test_the_list_leads_to_every_page() -> None:
    text = (PAGES / "rlhf-common.md").read_text(encoding="utf-8")
    assert all(f"(rlhf-{name}.md)" in text for name in TRAINERS)
