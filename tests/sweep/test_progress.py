"""What is printed while a sweep runs: the bar on a terminal, and the time that is left."""

import io
import types
from typing import Any

import numpy as np
import pytest
import stand_in
from rich.console import Console

from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import progress as progresses

pytestmark = pytest.mark.fast
TRAINER: Any = types.SimpleNamespace(Config=stand_in.Config)
SPEC: Any = types.SimpleNamespace(
    name="study", agent_name="none", agent=TRAINER, num_configs=2, seeds=(0, 1), conditions=[{}]
)


def two_groups() -> tuple[plans.Round, list[plans.Group]]:
    """A round of two groups, each of one unit of two runs, 10 updates of 10 steps."""
    config = stand_in.Config(0.0, num_updates=10, total_timesteps=100)
    groups = []
    for index, rate in enumerate((0.25, 0.5)):
        legs = tuple(
            plans.Leg(plans.Run(f"{rate}-{seed}", config, seed, {"learning_rate": rate}), 0, 10)
            for seed in range(2)
        )
        groups.append(plans.Group(index, f"program {index}", 2, (plans.Unit(f"u{index}", legs),)))
    return plans.Round(tuple(leg for group in groups for leg in group.units[0].legs)), groups


def begun(
    console: Console, monkeypatch: pytest.MonkeyPatch, title: str = ""
) -> tuple[Any, Any, list[plans.Group]]:
    """Return the progress of a sweep that has begun, a clock to set, and its groups."""
    clock = [0.0]
    monkeypatch.setattr(progresses.time, "monotonic", lambda: clock[0])
    round_, groups = two_groups()
    progress = progresses.Progress(console, title=title)
    progress.begin(SPEC, [round_], [groups])
    progress.round_begins(0, round_, groups, {"u0", "u1"})
    return progress, clock, groups


def advanced(progress: Any, group: plans.Group, updates: int) -> None:
    rows = {"episode/return_sum": np.full((2, 5), 3.0), "episode/count": np.ones((2, 5))}
    batch = plans.Batch(group, group.units, updates, None, np.zeros(2, int), [rows])
    progress.advance(batch, 5)


def test_the_time_left_counts_compilations_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, clock, groups = begun(Console(file=io.StringIO()), monkeypatch)
    progress.compiling(groups[0])
    clock[0] = 40.0
    progress.compiled(groups[0], 40.0)
    assert np.isnan(progress.left_s)  # no step was timed
    clock[0] = 44.0
    advanced(progress, groups[0], 5)
    # A quarter of the steps took 4 s, and the other program is not compiled.
    assert progress.left_s == pytest.approx(3 * 4.0 + 40.0)
    clock[0] = 48.0
    advanced(progress, groups[0], 10)
    clock[0] = 50.0
    progress.committed()
    assert progress.left_s == pytest.approx(8.0 + 2.0 + 40.0)  # and half of the evaluations
    progress.compiled(groups[1], 20.0)
    assert progress.left_s == pytest.approx(8.0 + 2.0)


def test_stored_units_need_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, clock, groups = begun(Console(file=io.StringIO()), monkeypatch)
    round_, _ = two_groups()
    progress.round_begins(0, round_, groups, {"u1"})
    progress.compiled(groups[1], 20.0)
    clock[0] = 6.0
    advanced(progress, groups[1], 5)
    assert progress.left_s == pytest.approx(6.0)


@pytest.mark.parametrize("title", ["", "Stage 2 of 3: reward"])
def test_the_best_configuration_is_readable_at_80_columns(
    title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    progress, clock, groups = begun(console, monkeypatch, title)
    many = {"learning_rate": 3e-4, "gae_lambda": 0.95, "num_epochs": 4, "hidden": [64, 64]}
    label = progresses.label({**many, "activation": "tanh", "max_grad_norm": 0.5})
    progress.labels = dict.fromkeys(progress.labels, ("", label))
    clock[0] = 4.0
    advanced(progress, groups[0], 5)
    screen.seek(screen.truncate(0))
    console.print(progress.bar.get_renderable())
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in screen.getvalue()
    assert f"best 3.0 ({label})" in " ".join(line.strip() for line in lines)


def test_there_is_a_best_configuration_of_each_condition() -> None:
    progress = progresses.Progress(Console(file=io.StringIO()))
    for gravity, level in ((9.8, 100.0), (20.0, 200.0)):
        for rate in (1e-3, 1e-2):
            swept = {"learning_rate": rate, "env_params.gravity": gravity}
            config: Any = {"env": "CartPole-v1", "env_params": {"gravity": gravity}}
            name = f"{gravity}-{rate}"
            progress.labels[name] = progresses.labels_of(plans.Run(name, config, 0, swept))
            progress.latest[name] = level + rate
    assert progress.best_line() == [
        "best in CartPole-v1, gravity 9.8: 100.0 (learning_rate=0.01)",
        "best in CartPole-v1, gravity 20: 200.0 (learning_rate=0.01)",
    ]


def test_a_slow_run_is_timed_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, clock, groups = begun(Console(file=io.StringIO()), monkeypatch)
    clock[0] = 2000.0
    advanced(progress, groups[0], 5)
    assert progress.status() == ["update 5 of 10, 3 steps/min", "1.8 agents/h"]


def test_the_page_is_told_which_stage_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO())
    progress, clock, groups = begun(console, monkeypatch, "Stage 2 of 3: reward")
    assert progress.now() == (0.0, ("of stage 2 of 3: reward", "compiling"))
    clock[0] = 4.0
    advanced(progress, groups[0], 5)
    share, words = progress.now()
    assert share == 0.25 and words[1:3] == ("about 12 s left", "update 5 of 10, 25 steps/s")
