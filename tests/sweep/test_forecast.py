"""The report of `plan` before anything is computed, and the file that `plan --tune` writes."""

import pathlib
import tomllib
import types
from typing import Any

import jax
import pytest
from tiny_sweep import TINY, run

from purejaxpg import InputError
from purejaxpg.fused import paths
from purejaxpg.sweep import compute, forecast
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores


def said(spec: specs.Spec, confirm: int = 0, quick: bool = True) -> str:
    lines: list[str] = []
    forecast.plan(spec, jax.devices()[:1], confirm, lines.append, quick)
    return "\n".join(lines)


def make(**changed: Any) -> specs.Spec:
    return specs.from_dict({**TINY, **changed}, "tiny")


def test_a_plan_lists_static_fields_and_units() -> None:
    axes = {"learning_rate": [1e-3, 1e-2], "num_epochs": [1, 2], "activation": ["tanh", "relu"]}
    fields = {k: v for k, v in TINY["config"].items() if k != "num_epochs"}
    text = said(make(sweep=axes, config=fields))
    assert "16 runs in 1 round" in text
    assert "4 compilation(s), because these are static" in text
    assert "num_epochs (1, 2)" in text and "activation ('relu', 'tanh')" in text
    assert "learning_rate" not in text
    assert text.count("4 runs, updates 1 to 4, in 2 unit(s) of 2 rows (rows_per_device in") == 4


def test_a_plan_of_a_search_has_its_rounds() -> None:
    text = said(make(search={}, halving={"rungs": 2, "eta": 2}), confirm=3)
    assert "in 3 round(s)" in text
    assert "Round 1, group 0: 8 runs, updates 1 to 2" in text
    assert "Round 2, group 0: 4 runs, updates 3 to 4" in text
    assert "Round 3, group 0: " in text


def test_a_plan_measures_memory_and_time() -> None:
    text = said(make(eval_every=3), quick=False)
    assert "Memory: " in text and " rows a device would fit" in text
    assert "A row's update costs " in text
    assert "Time: about " in text and "s of it compiling" in text
    assert "Evaluations after every 3 updates take " in text


def test_evaluations_within_training_are_counted() -> None:
    """20 updates of 1 s in two batches, each evaluated after the 6th, the 12th and the 18th."""
    group: Any = types.SimpleNamespace(start=0, stop=20, steps=20, program="one", units=(1, 2))
    seen = forecast.Measurement(2, 1, 4.0, 0.0, 1.0, 5.0, 0, 0)
    lines: list[str] = []
    seconds = forecast.report_time([group], {"one": seen}, 1, 6, lines.append)  # type: ignore[dict-item]
    assert seconds == 4.0 + 2 * (20 * 1.0 + 5.0 + 3 * 5.0)
    assert lines[1] == "Evaluations after every 6 updates take 30 s of that (36%)."
    assert forecast.report_time([group], {"one": seen}, 1, 0, lines.append) == 54.0  # type: ignore[dict-item]
    assert len(lines) == 3


def test_a_plan_of_a_run_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast.memory, "limit", lambda _: 1000)
    message = r"tiny cannot run here: 2 rows need .* free, and a unit cannot be smaller; use fewer"
    with pytest.raises(InputError, match=message):
        said(make(), quick=False)


def test_the_planned_disk_space_is_used(tmp_path: pathlib.Path) -> None:
    """Arrays and states to the byte; manifests and orbax's own files come on top."""
    spec = make(eval_every=3)
    backend = compute.Backend(spec, jax.devices()[:1])
    (round_,) = forecast.searches.rehearse(forecast.searches.rounds(spec))
    planned = [(0, group) for group in backend.groups(0, round_, {})]
    predicted = forecast.bytes_on_disk(backend, planned)
    run(spec, tmp_path / "out")
    with stores.Store.read(tmp_path / "out") as store:
        arrays = [store.arrays(unit["name"]) for unit in store.ledger.units()]
    written = sum(array.nbytes for found in arrays for array in found.values())
    unit = planned[0][1].units[0]
    shapes = backend.template(unit)
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / len(unit.legs)
    kept_snapshots = 2 * 2 * state  # two of a unit of two rows
    assert predicted == pytest.approx(written + 8 * state + kept_snapshots)


def test_of_a_population_two_generations_of_states_are_planned() -> None:
    """The one that is computed and the one it starts from; of halving every rung's."""
    few = {"population": 4, "generations": 2}
    axes = {"learning_rate": {"log_uniform": [1e-4, 1e-1]}}

    def predicted(**tables: Any) -> float:
        spec = make(sweep=axes, **tables)
        backend = compute.Backend(spec, jax.devices()[:1])
        rounds = forecast.searches.rehearse(forecast.searches.rounds(spec))
        planned = [(i, g) for i, round_ in enumerate(rounds) for g in backend.groups(i, round_, {})]
        return forecast.bytes_on_disk(backend, planned)

    evaluations = 2 * 8 * 13 * 4  # two generations more of eight members and four episodes
    assert predicted(pbt={**few, "generations": 4}) == predicted(pbt=few) + evaluations
    states, rungs = {0: 30.0, 1: 10.0, 2: 3.0}, {0: {"a", "b", "c"}, 1: {"a", "b"}, 2: {"a"}}
    assert forecast.most_at_once(states, rungs) == 43.0
    same = {rung: {"a", "b", "c"} for rung in rungs}
    assert forecast.most_at_once(states, same) == 40.0


def test_memory_is_a_straight_line() -> None:
    def seen(rows: int, bytes_: int) -> forecast.Measurement:
        return forecast.Measurement(rows, 1, 0.0, 0.0, 0.0, 0.0, bytes_, 0)

    line = forecast.fit(seen(8, 1800), seen(16, 3400))
    assert (line.fixed, line.per_row) == (200.0, 200.0)
    assert forecast.fit(seen(1, 500), seen(1, 500)) == forecast.Fit(0.0, 500.0)
    assert forecast.fit(seen(1, 500), seen(1, 500), shared=100) == forecast.Fit(100.0, 400.0)


def test_memory_that_xla_does_not_count_is_counted() -> None:
    def measured(rows: int, planned: int, seen: int) -> forecast.Measurement:
        mib = 2**20
        return forecast.Measurement(rows, 2, 0.0, 0.0, 0.0, 0.0, planned * mib, 2 * seen * mib)

    half, full = measured(2, 240, 296), measured(4, 480, 592)
    line = forecast.memory_line(half, full, jax.devices()[:1], 0)
    assert "592.0 MiB a device (148.00 for each row), 1184 MiB on 2 device(s)" in line
    assert "XLA planned 480.0 MiB a device" in line
    quiet = forecast.memory_line(measured(2, 240, 0), measured(4, 480, 500), jax.devices()[:1], 0)
    assert "480.0 MiB a device (120.00 for each row)" in quiet and "XLA planned" not in quiet


def test_a_row_that_costs_more_in_a_larger_unit_is_warned_of() -> None:
    def seen(rows: int, update_s: float) -> forecast.Measurement:
        return forecast.Measurement(rows, 1, 0.0, 0.0, update_s, 0.0, 1, 0)

    assert "Warning" not in forecast.row_cost(seen(8, 1.0), seen(16, 2.1))
    assert "rows_per_device = 8" in forecast.row_cost(seen(8, 1.0), seen(16, 2.4))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_plan_says_how_loops_run_on_a_gpu(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    way = paths.Path("gradient steps", False, "a network has 9 layers")
    seen = forecast.Measurement(2, 1, 0.0, 0.0, 1.0, 0.0, 1000, 0, (way,))
    monkeypatch.setattr(forecast, "measure", lambda *_: seen)
    spec, lines = make(), list[str]()
    backend = compute.Backend(spec, jax.devices()[:1])
    (round_, *_) = forecast.searches.rehearse(forecast.searches.rounds(spec))
    groups = backend.groups(0, round_, {})
    backend.on_cpu = on_cpu
    forecast.measurements(backend, groups, lines.append)
    said = "The gradient steps run in plain JAX, because a network has 9 layers."
    assert (said in lines) == (not on_cpu)


TEXT = """# A study.
agent = "ppo"
seeds = 2  # few

[config]
num_envs = 2
num_steps = 8
total_timesteps = 64
hidden = [8]
"""


def test_tuning_writes_the_rows_and_keeps_the_rest(tmp_path: pathlib.Path) -> None:
    path, lines = tmp_path / "study.toml", list[str]()
    path.write_text(TEXT, encoding="utf-8")
    best = forecast.tune(specs.load(path), path, jax.devices()[:1], lines.append)
    text = path.read_text(encoding="utf-8")
    assert best in (1, 2)
    assert tomllib.loads(text) == {**tomllib.loads(TEXT), "rows_per_device": best}
    assert "# A study." in text and "# few" in text
    assert any(line.lstrip().startswith("2 rows: ") for line in lines)
    with pytest.raises(InputError, match="already has rows_per_device"):
        forecast.tune(specs.load(path), path, jax.devices()[:1], lines.append)


def test_sizes_worth_trying() -> None:
    assert forecast.sizes(96, 2) == [1, 2, 4, 8, 16, 32, 48]
    assert forecast.sizes(1, 2) == [1]
    assert forecast.sizes(64, 1) == [1, 2, 4, 8, 16, 32, 64]
