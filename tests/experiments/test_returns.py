"""The table of returns is what the stored runs say, and its cells were chosen honestly."""

import importlib
import io
import json
import os
import pathlib
import shutil
from typing import Any

import forked
import pytest
from rich.console import Console
from tiny_sweep import TINY, run

from purejaxpg.report import writer
from purejaxpg.sweep import spec as specs

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
RUNS = sorted((EXPERIMENTS / "runs").glob("*.csv"))
TUNED = [path for path in RUNS if (EXPERIMENTS / "tuning" / f"{path.stem}.toml").is_file()]
SEARCHES = sorted(EXPERIMENTS.glob("tuning/*.toml")) + sorted(
    EXPERIMENTS.glob("sensitivity/*.toml")
)
WRITTEN = ["README.md", "docs/benchmarks.md", "purejaxpg/presets.toml", "experiments/RESULTS.md"]


@pytest.fixture
def returns(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module("returns")


@pytest.fixture
def copied(tmp_path: pathlib.Path) -> pathlib.Path:
    """Return a copy of what the script reads and writes."""
    shutil.copytree(EXPERIMENTS, tmp_path / "experiments", ignore=shutil.ignore_patterns("rlhf"))
    for name in WRITTEN[:3]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def call(folder: pathlib.Path, *words: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return forked.run("experiments/returns.py", *words, folder=folder, environment=environment)


def test_everything_written_is_up_to_date(copied: pathlib.Path) -> None:
    (copied / "experiments" / "RESULTS.md").unlink()
    shutil.rmtree(copied / "experiments" / "figures")
    done = call(copied)
    assert done.returncode == 0, done.stderr
    scores = [f"experiments/curves/{path.name}" for path in EXPERIMENTS.glob("curves/*_scores.csv")]
    for name in [*WRITTEN, *scores]:
        text = (copied / name).read_text(encoding="utf-8")
        assert text == (ROOT / name).read_text(encoding="utf-8"), f"{name}: run the script again"
    figures = {path.name for path in (copied / "experiments" / "figures").iterdir()}
    assert figures == {path.name for path in (EXPERIMENTS / "figures").iterdir()}


@pytest.mark.fast
def test_wrong_input_gets_a_sentence(copied: pathlib.Path) -> None:
    (copied / "results").mkdir()
    for words, text in {
        ("keep", "results"): "results has no report",
        ("keep",): "keep those of result directories",
        ("random", "CartPole-v1"): "random none",
        ("run", "nothing"): "nothing.toml",
    }.items():
        done = call(copied, *words)
        assert done.returncode == 2 and text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.fast
@pytest.mark.parametrize("path", SEARCHES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_search_is_a_valid_sweep(path: pathlib.Path) -> None:
    assert len(specs.load(path).runs) >= 3 * 32


@pytest.mark.fast
@pytest.mark.parametrize("path", TUNED, ids=lambda path: path.stem)
def test_a_setting_was_chosen_on_other_seeds(path: pathlib.Path, returns: Any) -> None:
    """And it is one of the search's settings, for the same steps."""
    (cell,) = [cell for cell in returns.cells() if cell.study == path.stem]
    search, chosen = returns.spec_of(f"tuning/{path.stem}"), returns.spec_of(path.stem)
    seeds = {int(row["seed"]) for row in cell.rows}
    assert sorted(seeds) == chosen["seeds"] and len(seeds) == 32
    assert not seeds & set(range(search["seeds"] + 8))
    assert cell.tuned is not None and search["config"].items() <= chosen["config"].items()
    assert chosen["agent"] == search["agent"] == cell.agent


def test_a_search_and_its_cell_are_kept(
    returns: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returns, "HERE", tmp_path)
    (tmp_path / "tuning").mkdir()
    (tmp_path / "tuning" / "tiny.toml").touch()
    found = {"gamma": 0.9, "learning_rate": 1e-3}
    config = {**TINY["config"], **found, "env": "CartPole-v1"}
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in found.items())
    (tmp_path / "tiny.toml").write_text(f'agent = "ppo"\n[config]\n{lines}\n', encoding="utf-8")
    cell = {**TINY, "config": config, "sweep": {}, "seeds": [7, 8, 9]}
    for name, spec in {"tuning/tiny": TINY, "tiny": cell}.items():
        run(specs.from_dict(spec, name), tmp_path / "results" / name)
        writer.write(tmp_path / "results" / name, Console(file=io.StringIO()))
        assert returns.keep(tmp_path / "results" / name) == name
    assert len(returns.read(tmp_path / "tuning" / "tiny.csv")) == 4
    (kept,) = returns.cells()
    assert (kept.agent, kept.env, kept.steps, kept.diverged) == ("ppo", "CartPole-v1", 64, 0)
    assert [int(row["seed"]) for row in kept.rows] == [7, 8, 9] and (kept.scores > 0).all()
    assert kept.tuned is not None and kept.tuned > 0
    curve = returns.read(tmp_path / "curves" / "tiny.csv")
    assert [float(point["env_steps"]) for point in curve] == [8, 24, 40, 56]


@pytest.mark.fast
def test_verdicts(returns: Any) -> None:
    page = importlib.import_module("returns_page")

    def verdict(score: float, steps: int, greedy: float, spread: float = 0.0) -> str:
        ends = zip((score - spread, score, score + spread), (greedy,) * 3, strict=True)
        rows = [
            {"score": str(s), "greedy_score": str(g), "env_steps": str(steps), "status": "done"}
            for s, g in ends
        ]
        return page.verdict(returns.Cell("study", "trpo", "MountainCar-v0", rows))

    assert verdict(-107.0, 99_328, -120.0) == "met"
    assert verdict(-107.0, 100_001, -120.0) == "met, with more steps"
    assert verdict(-110.278, 99_328, -120.0) == "3.00 short"
    assert verdict(-110.278, 99_328, -107.0) == "3.00 short, greedy met"
    assert "within the interval" in verdict(-110.278, 99_328, -120.0, 50.0)


@pytest.mark.fast
def test_random_actions_have_a_return_in_every_environment_of_the_page(returns: Any) -> None:
    known = {env for env, facts in returns.anchors().items() if "about" in facts}
    assert set(returns.random_returns()) == known | set(returns.others())


@pytest.mark.fast
@pytest.mark.parametrize("env", ["Catch-bsuite", "PointRobot-misc"])
def test_random_actions_return_what_is_stored(returns: Any, env: str) -> None:
    """Both kinds of actions; fewer episodes have a wider interval."""
    found = importlib.import_module("returns_random").measure(env, episodes=256)
    error = 1.96 * float(found["standard_error"])
    assert found["env"] == env and found["episodes"] == 256 and error > 0
    assert abs(float(found["random"]) - returns.random_returns()[env]) < 2 * error
