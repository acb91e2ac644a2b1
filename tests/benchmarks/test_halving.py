"""The benchmark of successive halving: its arithmetic by hand, and a tiny pair of real sweeps."""

import importlib.util
import json
import math
import pathlib
from typing import Any

import forked
import pytest
import quick

FILE = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "halving.py"


@pytest.fixture(scope="module")
def halving() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_of_halving", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_interval_of_a_ratio(halving: Any) -> None:
    """Of 2 and 8: logarithms at 1 and 3 times log 2, and a quantile of Student's t of 12.706."""
    mean, low, high = halving.interval([2.0, 8.0])
    assert mean == pytest.approx(4.0)
    half = 12.7062 * math.log(2.0)
    assert [low, high] == pytest.approx([4 * math.exp(-half), 4 * math.exp(half)], rel=1e-4)
    assert halving.interval([3.0])[0] == pytest.approx(3.0)
    assert math.isnan(halving.interval([3.0])[1])


def made_up(seconds: float, *labels: str) -> dict[str, Any]:
    ranked = [
        {"rank": i + 1, "label": label, "iqm": 9.0 - i, "low": 1.0, "high": 9.0}
        for i, label in enumerate(labels)
    ]
    return {"seconds": seconds, "compile_s": 1.0, "env_steps": 10, "ranked": ranked}


def test_the_ways_alternate_and_are_compared(
    halving: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answers = [
        made_up(6.0, "a", "b"), made_up(3.0, "b", "a"), made_up(16.0, "a", "b"), made_up(2.0, "b"),
    ]  # fmt: skip
    asked: list[str] = []

    def sweep(study: str, directory: pathlib.Path) -> dict[str, Any]:
        asked.append(study)
        return answers[len(asked) - 1]

    monkeypatch.setattr(halving, "sweep", sweep)
    halving.main(["--pairs", "2", "--seeds", "3", "--json", str(tmp_path / "found.json")])
    assert ["[halving]" in study for study in asked] == [False, True] * 2
    assert all("seeds = 3" in study for study in asked)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["speedup"] == pytest.approx(4.0)
    assert found["plain"]["winner"]["label"] == "a"
    assert found["halving"]["winner"]["label"] == "b"
    assert found["halving"]["plain_score_of_it"]["rank"] == 2
    printed = capsys.readouterr().out
    assert "plain / halving: 4.00 (95% CI [" in printed
    assert "in the plain sweep: rank 2, 8.0 [1.0, 9.0] (b)" in printed


def test_a_tiny_sweep_runs(
    halving: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 configurations 9, 3 and 1 are trained, here by one program."""
    one_device = f"--xla_force_host_platform_device_count=1 {quick.FLAGS}"
    monkeypatch.setattr(halving, "COLD", {"XLA_FLAGS": one_device})  # and the tests' cache
    monkeypatch.setattr(halving.subprocess, "run", forked.python)
    study = halving.STUDY.format(configurations=9, seeds=1, steps=2304) + halving.WAYS["halving"]
    found = halving.sweep(f"rows_per_device = 1\n{study}", tmp_path / "tiny")
    assert found["env_steps"] == 256 * (9 * 1 + 3 * 2 + 1 * 6)
    assert found["seconds"] > found["compile_s"] > 0
    assert [each["rank"] for each in found["ranked"]] == list(range(1, 10))
    same = halving.summary([{"plain": found, "halving": found}])
    assert same["speedup"] == 1.0 and same["speedup_ci95"] is None
    assert "plain / halving: 1.00, 1 pair(s)" in halving.table(same)
