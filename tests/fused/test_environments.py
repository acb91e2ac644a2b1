"""Which environments run in one kernel: tried by tracing, and compared with the table in docs/."""

import pathlib

import jax
import pytest
from jax import random

from purejaxpg import backend, envs
from purejaxpg.agents import ppo
from purejaxpg.fused import paths

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "accelerators.md"
# It downloads its images when it is made.
UNTRIED = "MNISTBandit-bsuite"
GYMNAX = [name for name in envs.gymnax.names() if name != UNTRIED]


def row(name: str) -> str:
    """Return a row of the table; a kernel's reason does not depend on the sizes that are tried."""
    config = ppo.Config(env=name, num_envs=4, num_steps=8, hidden=(16,))
    state = jax.eval_shape(lambda key: ppo.init(key, config), random.key(0))
    with paths.recorded() as recorded:
        jax.eval_shape(lambda key, state: ppo.rollout(key, state, config), random.key(1), state)
    (path,) = recorded
    return f"| {name} | {'yes' if path.kernel else 'no'} | {path.reason} |".replace("  ", " ")


@pytest.mark.parametrize("name", GYMNAX)
def test_the_table_says_what_happens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    assert row(name) in DOCS.read_text().splitlines()


def test_the_table_has_all_environments_and_no_others() -> None:
    table = DOCS.read_text().partition("| environment |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == GYMNAX
