"""The check of an accelerator, on the CPU and in small, so that it works where there is one."""

import importlib.util
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from types import ModuleType

import forked
import numpy as np
import pytest
import tiny_sweep

from purejaxpg.sweep import memory, xla
from purejaxpg.sweep import store as stores

PATH = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "accelerator.py"
SHORT = {"num_envs": 8, "num_steps": 16, "num_minibatches": 1, "total_timesteps": 256}
needs_peaks = pytest.mark.skipif(
    memory.resident()[0] == 0, reason="the system does not tell a process's peak of memory"
)


@pytest.fixture(scope="module")
def accelerator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerator", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_peaks
def test_memory_is_compared_and_a_wrong_plan_is_seen(
    accelerator: ModuleType,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(accelerator.SMALL, "memory", [("ppo", 2)])
    monkeypatch.setitem(accelerator.FIELDS, "ppo", SHORT)
    out = tmp_path / "found.json"
    assert accelerator.main(["memory", "--small", "--out", str(out)]) == 0
    assert "ppo, 2 rows" in capsys.readouterr().out
    found = json.loads(out.read_text())
    (finding,) = found["found"]
    assert found["device"]["platform"] == "cpu" and finding["planned"] > 0

    finding |= {"peak": 2 * finding["planned"] + accelerator.SLACK}
    monkeypatch.setattr(accelerator, "child", lambda *_: {**found["device"], **finding})
    assert accelerator.main(["memory", "--small", "--out", str(out)]) == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_a_check_that_cannot_run_fails_and_stops_no_other(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(agent: str, size: int, device: object) -> Iterator[dict[str, object]]:
        if size == 1:
            raise RuntimeError("it ended with 1:\nOut of space.")
        yield {"case": agent, "seen": "fine", "holds": True}

    monkeypatch.setitem(accelerator.CHECKS, "oom", check)
    first, second = accelerator.findings(["oom"], {"oom": [("ppo", 1), ("ppo", 2)]}, {})
    assert first["seen"] == "Out of space." and first["holds"] is False
    assert second["holds"]


def test_a_sweep_that_is_planned_too_large_ends_with_fewer_rows(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(accelerator.FIELDS, "ppo", SHORT)
    monkeypatch.setattr(accelerator, "surroundings", lambda: dict(os.environ))
    monkeypatch.setattr(accelerator.subprocess, "run", forked.python)
    finding = next(accelerator.check_oom("ppo", 6, {"platform": "cpu"}))
    assert finding["holds"], finding
    assert finding["seen"].startswith("6 of 6 runs done")


def test_a_check_ends_with_its_own_time(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(agent: str, size: int, device: object) -> Iterator[dict[str, object]]:
        if agent == "slow":
            accelerator.child("device")
        yield {"case": agent, "seen": "fine", "holds": True}

    monkeypatch.setattr(accelerator, "command", lambda *_: ["sleep", "60"])
    for name in ("oom", "resume"):
        monkeypatch.setitem(accelerator.CHECKS, name, check)
    sizes = {"oom": [("slow", 1), ("next", 1)], "resume": [("other", 1)]}
    found = list(accelerator.findings(["oom", "resume"], sizes, {}, 0.07))  # 1.3 s and 2.9 s
    assert [each["holds"] for each in found] == [None, None, True]
    assert found[0]["seen"] == found[1]["seen"] == "the minutes of this check are over"
    assert found[0]["seconds"] < 60


def test_ways_of_tuning_are_timed_in_one_process(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = ["first", "anew"]
    monkeypatch.setattr(xla, "TUNING", xla.TUNING)
    found = accelerator.timed("ppo", 1, ways, quick=True)
    assert list(found) == ways
    assert all(0 < each["ms"] < math.inf and each["kernels"] > 0 for each in found.values())

    monkeypatch.setattr(accelerator, "child", lambda *_: found)
    first, second = accelerator.check_tuning("ppo", 1, {"platform": "gpu"})
    assert (first["case"], second["case"]) == ("ppo x 1, first", "ppo x 1, anew")
    assert "0% more than the fastest" in first["seen"] + second["seen"]


def test_a_bit_that_differs_is_seen(accelerator: ModuleType, tmp_path: pathlib.Path) -> None:
    spec = tiny_sweep.swept()
    tiny_sweep.run(spec, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "other")
    compared, differ = accelerator.differences(tmp_path / "whole", tmp_path / "other")
    assert compared > 10 and differ == []

    with stores.Store.read(tmp_path / "other") as store:
        unit = store.ledger.units()[0]["name"]
        arrays = dict(store.arrays(unit))
        name = sorted(arrays)[0]
    arrays[name] = np.nextafter(arrays[name], np.float32(np.inf))
    original = stores.Store.arrays

    def altered(self: stores.Store, of: str) -> dict[str, np.ndarray]:
        right = self.path.name == "other" and of == unit
        return arrays if right else original(self, of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores.Store, "arrays", altered)
        _, differ = accelerator.differences(tmp_path / "whole", tmp_path / "other")
    assert differ == [f"{unit} {name}"]


@pytest.mark.slow
@needs_peaks
def test_all_of_it_holds_on_the_cpu(accelerator: ModuleType, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "found.json"
    assert accelerator.main(["--small", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["found"]
    assert [each["holds"] for each in found] == [True] * 7 + [None]  # nothing is tuned there
