"""The forks in docs/how-to/: each diff applies to the agent as it is now, and the fork trains."""

import dataclasses
import pathlib
import re
import tomllib
from typing import Any

import jax
import numpy as np
import pytest
from jax import random

from purejaxpg import config as configs
from purejaxpg import contract, evaluate, trainers
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import stages

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PAGES = [page for page in TASKS if "```diff" in page.read_text(encoding="utf-8")]
SMALL = {"num_envs": 2, "num_steps": 4, "hidden": [4], "total_timesteps": 24}


def block(page: pathlib.Path, language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    return str(found)


def patched(source: str, diff: str) -> str:
    """Apply a unified diff by its context, which has to occur exactly once."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        old, new = (
            "".join(line[1:] or "\n" for line in lines if line[0] in kept)
            for kept in (" -\n", " +\n")
        )
        assert source.count(old) == 1, f"this part of the diff does not apply:\n{hunk}"
        source = source.replace(old, new)
    return source


def fork(page: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Do what a page says -> the file of the fork."""
    agent, name = re.findall(r"^purejaxpg fork (\w+) (\w+\.py)$", page.read_text("utf-8"), re.M)[0]
    source = trainers.path_of(agent).read_text(encoding="utf-8")
    path = folder / name
    path.write_text(patched(source, block(page, "diff")), encoding="utf-8")
    return path


def test_there_are_pages() -> None:
    assert {page.stem for page in PAGES} >= {
        "advantage-weights", "exploration-bonus", "memory", "shared-torso",
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_diff_of_a_page_applies_and_its_fork_trains(
    page: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = fork(page, tmp_path)
    agent = trainers.load(f"./{path.name}", tmp_path)
    contract.check_trainer(agent, path.name)
    fixed: dict[str, Any] = tomllib.loads(block(page, "toml"))["config"] | SMALL
    config = configs.build(agent.Config, fixed)
    agent.check(config)
    train = jax.jit(agent.train)
    for seed in range(2):
        state, metrics = train(random.key(seed), config)
    assert train._cache_size() == 1
    assert all(x.shape == (3,) for x in jax.tree.leaves(metrics))
    watched = [x for name, x in metrics.items() if name.startswith(contract.WATCHED)]
    assert watched and np.isfinite(watched).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    if page.stem == "exploration-bonus":
        # DeepSea shows no state where an episode ends.
        seen = SMALL["total_timesteps"] - metrics["episode/count"].sum()
        assert metrics["episode/count"].sum() == 2 and state.visits.sum() == seen
    if page.stem == "memory":
        memory = agent.initial_memory(state, config, 3)
        obs = np.ones((3, *state.obs.shape[1:]), np.float32)
        _, after = agent.policy(random.key(0), state, obs, memory, config)
        np.testing.assert_allclose(after, 0.5 * obs)


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_sweep_file_of_a_page_is_valid(page: pathlib.Path, tmp_path: pathlib.Path) -> None:
    name = re.findall(r"^purejaxpg sweep (\w+\.toml)$", page.read_text("utf-8"), re.MULTILINE)[0]
    path = tmp_path / name
    path.write_text(block(page, "toml"), encoding="utf-8")
    assert fork(page, tmp_path).stem == path.stem
    several = stages.read(path)
    planned = stages.plan(several) if several is not None else [specs.load(path)]
    rows = re.findall(r"^\| \S+ \|.*\[", page.read_text("utf-8"), re.MULTILINE)
    assert sum(len(spec.runs) // len(spec.seeds) for spec in planned) == len(rows)


@pytest.mark.parametrize("name", ["choose-a-budget", "trustworthy-statistics"])
def test_the_output_of_a_page_is_what_its_code_prints(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "how-to" / f"{name}.md").read_text("utf-8")
    (shown,) = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL)
    code, output = shown
    exec(compile(code, f"{name}.md", "exec"), {})
    assert capsys.readouterr().out == output


@pytest.mark.usefixtures("own_modules")
def test_the_environment_of_a_page_trains(tmp_path: pathlib.Path) -> None:
    page = ROOT / "docs" / "how-to" / "custom-environment.md"
    (tmp_path / "corridor.py").write_text(block(page, "python"), encoding="utf-8")
    (tmp_path / "corridor.toml").write_text(block(page, "toml"), encoding="utf-8")
    spec = specs.load(tmp_path / "corridor.toml")
    assert len(spec.runs) == 2 * 3 * 8
    agent = trainers.load("ppo")
    key = random.key(0)
    config = dataclasses.replace(spec.runs[0].config, hidden=(4,), total_timesteps=512)
    state, metrics = agent.train(key, config)
    assert metrics["episode/count"].sum() > 0
    scores = evaluate.score(key, agent, state, config, 16)
    assert ((scores["evaluation/return"] <= 0.93) & (scores["evaluation/length"] <= 50)).all()


def test_a_diff_that_no_longer_applies_is_noticed() -> None:
    with pytest.raises(AssertionError, match="does not apply"):
        patched("a\nb\n", "--- x\n+++ y\n@@ -1 +1 @@\n a\n-c\n+d\n")
