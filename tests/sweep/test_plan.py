"""How rounds are cut into groups and units."""

import types
from typing import Any

import pytest
from rich.console import Console
from tiny_sweep import swept

from purejaxpg.agents import ppo, sac
from purejaxpg.sweep import compute
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs

pytestmark = pytest.mark.fast


def groups(spec: specs.Spec, devices: int, stored: dict[str, int] | None = None):
    (round_,) = searches.rehearse(searches.rounds(spec))

    def rows(_: object, legs: int) -> int:
        return plans.even_rows(legs, devices, 16)

    return plans.groups(0, round_, compute.signature, rows, stored)


def test_static_fields_make_groups_and_traced_ones_do_not() -> None:
    spec = swept(learning_rate=[3e-4, 1e-3], num_epochs=[1, 2], gamma=[0.9, 0.99])
    found = groups(spec, devices=2)
    assert [group.num_legs for group in found] == [8, 8]
    assert [group.config.num_epochs for group in found] == [1, 2]


@pytest.mark.parametrize(
    ("legs", "devices", "rows"),
    [(96, 2, 16), (1, 2, 1), (3, 2, 2), (100, 2, 13), (64, 1, 16), (17, 1, 9)],
)
def test_rows_share_the_work_evenly(legs: int, devices: int, rows: int) -> None:
    assert plans.even_rows(legs, devices, 16) == rows
    assert plans.even_rows(legs, devices, 2**31) == -(-legs // devices)


@pytest.mark.parametrize(
    ("legs", "devices", "most", "overhead", "rows"),
    [
        (252, 2, 16, 1.0, 14),  # 126, 42 and 14 rows a device: no padding in any rung
        (512, 2, 16, 1.0, 15),
        (9, 1, 16, 0.0, 1),  # without an overhead, the size of the last rung
        (9, 1, 16, 1e9, 9),  # with nothing else, as few batches as possible
        (1000, 1, 2**31, 180.0, 167),
        (1, 8, 16, 1.0, 1),
    ],
)
def test_one_size_of_a_unit_serves_all_rungs(
    legs: int, devices: int, most: int, overhead: float, rows: int
) -> None:
    """Of three rungs, each a third of the one before."""
    assert plans.halved_rows(legs, devices, most, 3, 3.0, overhead) == rows


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (ppo.Config(), 8),
        (ppo.Config(num_envs=64), 1),
        (ppo.Config(num_envs=64, num_minibatches=64), 8),
        (ppo.Config(hidden=(256, 256)), 2),
        (ppo.Config(env="Breakout-MinAtar"), 2),
        (ppo.Config(num_steps=8), 16),
        (sac.Config(env="Pendulum-v1", batch_size=256, hidden=(64, 64)), 4),
        (sac.Config(env="Pendulum-v1", batch_size=32, hidden=(64, 64)), 16),
    ],
)
def test_rows_of_a_core_shrink_as_a_row_grows(config: Any, rows: int) -> None:
    assert compute.cpu_rows(config) == rows


def test_an_agent_that_lacks_every_field_has_rows_too() -> None:
    bare = types.SimpleNamespace(env="CartPole-v1", env_kwargs=(), steps_per_update=2_048)
    assert compute.cpu_rows(bare) == 16


def test_stored_rows_outlive_a_change_of_devices() -> None:
    spec = swept()
    two = groups(spec, devices=2)
    stored = {unit.name: group.rows for group in two for unit in group.units}
    one = groups(spec, devices=1, stored=stored)
    assert [u.name for g in one for u in g.units] == list(stored)
    assert [g.rows for g in one for _ in g.units] == list(stored.values())


def test_a_round_that_is_planned_again_counts_once() -> None:
    """As it is after running out of memory: stored units leave the work to be done one time."""
    spec = swept()
    (round_,) = searches.rehearse(searches.rounds(spec))
    found = groups(spec, devices=2)
    pending = {unit.name for group in found for unit in group.units[1:]}
    progress = progresses.Progress(Console(quiet=True))
    progress.begin(spec, [round_])
    everything = progress.total_steps
    for _ in range(2):
        progress.round_begins(0, round_, found, pending)
    assert everything == 8 * 64
    assert progress.total_steps == everything - 64 * len(found[0].units[0].legs)
