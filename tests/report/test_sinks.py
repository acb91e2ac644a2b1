"""Logs: read back with tensorboardX's own protocol, and what wandb is asked to do."""

import errno
import os
import pathlib
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import stand_in

from purejaxpg import signals
from purejaxpg.report import curves, sinks
from purejaxpg.sweep import store as stores

pytest.importorskip("tensorboardX")
RUNS = 12  # of the stand-in; 6 of them go on, and then 4


def events(directory: pathlib.Path) -> list[Any]:
    """Every event of the one event file of a log, but for the times of writing."""
    from tensorboardX.proto import event_pb2

    (path,) = directory.glob("*tfevents*")
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        event.wall_time = 0
        found.append(event)
        at += length + 16
    assert at == len(data) and found[0].file_version == "brain.Event:2"
    return found


def scalars(directory: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(directory):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def hyperparameters(directory: pathlib.Path) -> dict[str, Any]:
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    values = [value for event in events(directory) for value in event.summary.value]
    (start,) = (v for v in values if v.tag == "_hparams_/session_start_info")
    info = HParamsPluginData.FromString(start.metadata.plugin_data.content).session_start_info
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in info.hparams.items()}


def logged(out: pathlib.Path) -> dict[str, list[Any]]:
    return {path.name: events(path) for path in (out / "tensorboard").iterdir()}


def log_of(out: pathlib.Path, run: dict[str, Any]) -> pathlib.Path:
    rate = run["swept"]["learning_rate"]
    return out / "tensorboard" / f"learning_rate={rate},seed={run['seed']},{run['run_id']}"


def finish(out: pathlib.Path, name: str = "tensorboard") -> str:
    """Write what is missing of a log -> what was said."""
    said: list[str] = []
    with stores.Store.read(out) as store:
        sinks.Logs([name], "study", said.append).finish(store)
    assert not (out / f".{name}.tmp").exists()
    return "\n".join(said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A search in three rounds, logged on the way."""
    out = tmp_path_factory.mktemp("whole") / "out"
    said: list[str] = []
    stand_in.run(out, after_commit=sinks.Logs(["tensorboard"], "study", said.append).write)
    assert said == []
    return out


def test_a_log_shows_the_run_over_all_its_rounds(whole: pathlib.Path) -> None:
    with stores.Store.read(whole) as store:
        legs, runs = store.ledger.legs(), store.ledger.runs()
        arrays = {unit["name"]: store.arrays(unit["name"]) for unit in store.ledger.units()}
    assert {run["status"] for run in runs} == {"stopped", "done"}
    assert len(logged(whole)) == len(runs) == RUNS
    chains = curves.chains(legs)
    for run in runs:
        found = scalars(log_of(whole, run))
        chain = chains[run["run_id"]]
        returns = [arrays[leg["unit"]]["episode/return_sum"][leg["row"]] for leg in chain]
        steps = [10 * update for update in range(1, run["stop"] + 1)]
        expected = list(zip(steps, np.concatenate(returns).tolist(), strict=True))
        assert found["episode/return"] == expected
        assert found["episode/count"] == [(step, 1.0) for step in steps]
        assert found["score"] == [(steps[-1], pytest.approx(run["score"]))]
        assert set(found) == {"episode/return", "episode/count", "score", "greedy_score"}
        fields = hyperparameters(log_of(whole, run))
        assert fields["learning_rate"] == run["swept"]["learning_rate"]
        assert (fields["seed"], fields["stage"]) == (run["seed"], "tune")
        assert (fields["env"], fields["status"]) == ("stand-in", run["status"])


def test_asked_for_later_it_is_the_same(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stand_in.run(tmp_path / "out")
    assert "tensorboard --logdir" in finish(tmp_path / "out")
    assert logged(tmp_path / "out") == logged(whole)


@pytest.mark.parametrize(
    ("swept", "population", "name"),
    [
        (
            {"learning_rate": 3e-4, "hidden": [8, 8]},
            False,
            "learning_rate=3e-4,hidden=[8,8],seed=1,x",
        ),
        ({"env": "a/b"}, False, "env=a,b,seed=1,x"),
        ({"gamma": 0.5}, True, "seed=1,x"),
        ({}, False, "seed=1,x"),
    ],
)
def test_a_log_is_named_by_values_and_seed(swept: Any, population: bool, name: str) -> None:
    leg = {"swept": swept, "seed": 1, "run_id": "x"}
    assert sinks.TensorBoard().folder(leg, population) == name


def test_a_missing_viewer_is_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = sinks.TensorBoard()
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda _: None)
    assert sink.advice() == " (install the viewer with: pip install tensorboard)"
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda _: "spec")
    assert sink.advice() == ""


def test_only_what_is_missing_is_written(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    stand_in.run(out)
    finish(out)
    first, second, *others = sorted((out / "tensorboard").iterdir())
    (first / sinks.STAMP).unlink()
    (second / sinks.STAMP).write_text("of an earlier round")
    before = {path: path.stat().st_ino for path in others}
    finish(out)
    assert logged(out) == logged(whole)
    assert {path: path.stat().st_ino for path in others} == before


@pytest.mark.parametrize("broken", ["fill", "first rename", "second rename"])
def test_a_process_that_dies_leaves_no_half_log(
    broken: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(text: str, dies: bool = False) -> Callable[[pathlib.Path], None]:
        def write(directory: pathlib.Path) -> None:
            (directory / "events").write_text(text)
            if dies:
                raise KeyboardInterrupt

        return write

    target, calls = tmp_path / "logs" / "run", []
    sinks.put(target, "1", fill("old"))
    original = os.replace

    def replace(*paths: Any) -> None:
        calls.append(paths)
        if broken == ("first rename", "second rename")[len(calls) - 1]:
            raise KeyboardInterrupt
        original(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        # As after kill -9: nothing is tidied up.
        patch.setattr(sinks.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            sinks.put(target, "2", fill("new", dies=broken == "fill"))
    seen = [path.read_text() for path in (tmp_path / "logs").rglob("events")]
    assert seen == ([] if broken == "second rename" else ["old"])
    sinks.put(target, "2", fill("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {
        "events": "new",
        sinks.STAMP: "2",
    }


def test_a_sink_that_fails_stops_nothing(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorboardX

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    logs = sinks.Logs(["tensorboard"], "study", said.append)
    with monkeypatch.context() as patch:
        patch.setattr(tensorboardX.RecordWriter, "write", full)
        stand_in.run(tmp_path / "out", after_commit=logs.write)
        assert stand_in.contents(tmp_path / "out") == stand_in.contents(whole)
        (note,) = said
        assert note.startswith("Note: --log tensorboard has to wait") and "disk is full" in note
        with stores.Store.read(tmp_path / "out") as store:
            logs.finish(store)
    assert said[1].startswith(f"{tmp_path}/out/tensorboard is not complete: Cannot write")
    assert said[1].endswith("the disk is full; the same command completes it.")
    assert "tensorboard --logdir" in finish(tmp_path / "out")
    assert logged(tmp_path / "out") == logged(whole)


def test_a_run_whose_beginning_is_damaged_waits(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    stand_in.run(out)
    with stores.Store.open(out, {"kind": "halving"}) as store:
        store.ledger.reset([unit["name"] for unit in store.ledger.units() if unit["round"] == 0])
    assert "tensorboard --logdir" in finish(out)
    assert not (out / "tensorboard").exists()
    stand_in.run(out)
    finish(out)
    assert logged(out) == logged(whole)


def test_a_waiting_signal_is_not_kept_waiting(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.run(tmp_path / "out", "plain")
    asked: list[None] = []
    monkeypatch.setattr(signals, "pending", lambda: asked.append(None) or len(asked) > 3)
    finish(tmp_path / "out")
    assert len(logged(tmp_path / "out")) == 3


def test_points_are_means_over_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two legs of 3 and 4 updates in 3 bins; no episode ends in the second one."""
    monkeypatch.setattr(sinks, "POINTS", 3)
    inf = np.inf
    arrays = {
        "a": {
            "episode/return_sum": np.array([[9, 9, 9], [0, 5, 0]], np.float32),
            "episode/length_sum": np.array([[9, 9, 9], [0, 2, 0]], np.int32),
            "episode/count": np.array([[1, 1, 1], [0, 1, 0]], np.int32),
            "loss/x": np.array([[9, 9, 9], [1, 2, 3]], np.float32),
            "evaluated/return": np.array([[9, 9, 9], [6, 8, np.nan]], np.float32),
            "evaluation/return": np.zeros((2, 128)),
        },
        "b": {
            "episode/return_sum": np.array([[0, 0, 30, 6]], np.float32),
            "episode/length_sum": np.array([[0, 0, 3, 3]], np.int32),
            "episode/count": np.array([[0, 0, 2, 2]], np.int32),
            "loss/x": np.array([[4, 6, inf, -inf]], np.float32),
            "evaluated/return": np.array([[np.nan, np.nan, np.nan, 7]], np.float32),
            "evaluation/return": np.zeros((1, 128)),
        },
    }
    chain = [
        {"unit": "a", "row": 1, "start": 0, "stop": 3},
        {"unit": "b", "row": 0, "start": 3, "stop": 7},
    ]
    facts = {"steps_per_update": 10, "steps_before": 7}
    first, second, third = sinks.points_of(chain, arrays.__getitem__, facts)
    assert first == (
        27,
        {"episode/return": 5, "episode/length": 2, "episode/count": 0.5, "loss/x": 1.5}
        | {"evaluated/return": 8},  # the last one: an evaluation is not averaged
    )
    assert second == (57, {"episode/count": 0, "loss/x": pytest.approx(13 / 3)})
    assert third[0] == 77 and np.isnan(third[1].pop("loss/x"))
    episodes = {"episode/return": 9, "episode/length": 1.5, "episode/count": 2}
    assert third[1] == episodes | {"evaluated/return": 7}


def test_hyperparameters_are_numbers_and_texts() -> None:
    config = {"hidden": [8, 8], "clip": np.inf, "on": True, "env_params": {"g": {"x": 1.5}}}
    expected = {"hidden": "[8, 8]", "clip": "inf", "on": True, "env_params.g.x": 1.5}
    assert sinks.flat(config) == expected


class FakeWandB(types.ModuleType):
    """Writes down what it is asked to do, and a file as wandb would."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[Any] = []
        self.Settings = dict

    def init(self, **asked: Any) -> Any:
        folder = pathlib.Path(asked["dir"]) / "wandb" / f"offline-run-0-{asked['id']}"
        folder.mkdir(parents=True)
        (folder / f"run-{asked['id']}.wandb").write_text(asked["name"])
        (folder.parent / "latest-run").symlink_to(folder)
        self.runs.append(FakeRun(asked))
        return self.runs[-1]


class FakeRun:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked, self.rows, self.summary, self.ended = asked, [], {}, False

    def __enter__(self) -> "FakeRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))


def test_what_wandb_is_asked_to_do(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, out = FakeWandB(), tmp_path / "out"
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sinks.logging, "raiseExceptions", True)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    stand_in.run(out, "plain")
    assert finish(out, "wandb") == f"Logs: wandb sync {out}/wandb"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    with stores.Store.read(out) as store:
        runs = store.ledger.runs()
    assert len(fake.runs) == len(runs) == RUNS
    for ours, theirs in zip(runs, fake.runs, strict=True):
        asked, rate = theirs.asked, ours["swept"]["learning_rate"]
        assert (asked["mode"], asked["reinit"]) == ("offline", "create_new")
        assert (asked["project"], asked["group"]) == ("study", f"learning_rate={rate}")
        assert asked["name"] == f"learning_rate={rate} seed={ours['seed']}"
        assert asked["config"]["total_timesteps"] == 240
        assert asked["id"].startswith(ours["run_id"])
        assert [step for step, _ in theirs.rows] == list(range(10, 250, 10))
        assert set(theirs.rows[0][1]) == {"episode/return", "episode/count"}
        assert theirs.summary["score"] == ours["score"] and theirs.summary["status"] == "done"
        assert theirs.ended
        kept = out / "wandb" / f"offline-run-{ours['run_id']}"
        assert {path.name for path in kept.iterdir()} == {f"run-{asked['id']}.wandb", sinks.STAMP}
    finish(out, "wandb")
    assert len(fake.runs) == RUNS


def test_sweeps_have_runs_of_their_own_in_wandb(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(sinks.logging, "raiseExceptions", True)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")
    for kind in ("plain", "halving"):
        stand_in.run(tmp_path / kind, kind)
        finish(tmp_path / kind, "wandb")
    assert len({run.asked["id"] for run in fake.runs}) == 2 * RUNS
