"""The pages about trainers of language models name every setting, metric and departure."""

import dataclasses
import importlib
import pkgutil
import re
from typing import Any

import jax
import pytest
from algorithm_pages import NUMBERED, PAGES, require_refusals, require_settings, rows, sections

import purejaxpg.rlhf
from purejaxpg.rlhf import comparison, sft, tasks, transformer

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
        assert list(sections(f"rlhf-{name}")) == SECTIONS

    def test_it_has_every_setting_with_its_default(self, name: str) -> None:
        require_settings(f"rlhf-{name}", "rlhf-common", TRAINERS[name].Config())

    def test_what_is_outside_a_range_is_refused(self, name: str) -> None:
        module = TRAINERS[name]
        config = module.Config(**MORE[name] if name == "constitution" else {})
        require_refusals(f"rlhf-{name}", "rlhf-common", module, config, least=5)

    def test_it_has_every_metric(self, name: str) -> None:
        own, common = rows(f"rlhf-{name}", "Metrics").keys(), rows("rlhf-common", "Metrics").keys()
        found = metrics(name, {})
        if name in MORE:
            found |= metrics(name, MORE[name])
        assert own == found - common and not own & common

    def test_it_has_every_departure_of_the_file(self, name: str) -> None:
        _, *found = re.split(r"Differs .*:\n", TRAINERS[name].__doc__ or "")
        page = NUMBERED.findall(sections(f"rlhf-{name}")["Departures from the paper"])
        in_file = NUMBERED.findall(found[0]) if found else []
        assert page and page[: len(in_file)] == in_file

    def test_it_shows_code_of_its_own_file(self, name: str) -> None:
        shown = re.findall(r"\{literalinclude\} (\S+)", sections(f"rlhf-{name}")["The update"])
        assert len(shown) >= 4 and set(shown) == {f"../../purejaxpg/rlhf/{name}.py"}


@pytest.mark.fast
def test_what_is_common_is_somewhere() -> None:
    fields = {field.name for x in TRAINERS.values() for field in dataclasses.fields(x.Config)}
    assert not rows("rlhf-common", "Settings").keys() - fields
    assert not rows("rlhf-common", "Metrics").keys() - metrics("rloo", MORE["rloo"])


@pytest.mark.fast
def test_the_list_leads_to_every_page() -> None:
    text = (PAGES / "rlhf-common.md").read_text(encoding="utf-8")
    assert all(f"(rlhf-{name}.md)" in text for name in TRAINERS)
