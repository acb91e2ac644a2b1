"""The benchmark of sixteen runs of a language model: its arithmetic by hand."""

import importlib.util
import json
import pathlib
import sys
from typing import Any

import pytest

FILE = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "language_models.py"


@pytest.fixture
def language_models(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FILE.parent))
    monkeypatch.delitem(sys.modules, "halving", raising=False)
    spec = importlib.util.spec_from_file_location("benchmark_of_language_models", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("halving", None)


def test_the_ways_alternate_and_runs_are_compared(
    language_models: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[str] = []

    def sweep(study: str, scratch: pathlib.Path, name: str) -> dict[str, Any]:
        asked.append(study)
        runs, seconds = (16, 160.0) if "0.05" in study else (1, 20.0)
        parts = {"whole": seconds, "compiling": 8.0, "training": 0.9 * seconds}
        return {**parts, "runs": runs, "compilations": 1, "rows": 1}

    monkeypatch.setattr(language_models, "sweep", sweep)
    language_models.main(["--pairs", "2", "--updates", "7", "--json", str(tmp_path / "found.json")])
    assert ["rlhf.sft" in study for study in asked] == [True] + [False] * 4
    assert ["beta = [0.1]" in study for study in asked[1:]] == [True, False] * 2
    assert all("num_updates = 7" in study for study in asked[1:])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["whole_ratio"] == {"mean": pytest.approx(0.5), "ci95": pytest.approx([0.5, 0.5])}
    assert found["compiling_ratio"]["mean"] == pytest.approx(1 / 16)
    printed = capsys.readouterr().out
    assert "training, sixteen / one: 0.500 (95% CI [0.500, 0.500]), 2 pair(s)" in printed
    assert "1 compilation(s), 1 rows in a unit" in printed
