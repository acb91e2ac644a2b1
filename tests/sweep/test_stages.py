"""Pipelines of stages, end to end, on bandits that record what they were given."""

import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import relay

from purejaxpg import cli
from purejaxpg.report import playback
from purejaxpg.sweep import engine, session, stages
from purejaxpg.sweep import store as stores

NAMES = ("first", "judge", "learner")


def options(out: pathlib.Path, **changed: Any) -> session.Options:
    return dataclasses.replace(session.Options(out=out, devices=1, quiet=True), **changed)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of the whole pipeline, beside its sweep file."""
    path = relay.write(tmp_path_factory.mktemp("relay"))
    assert session.sweep(path, options(path.parent / "out")) == 0
    return path.parent / "out"


def runs(out: pathlib.Path) -> list[dict[str, Any]]:
    """Return the legs of a result directory, each with its arrays and with its state's params."""
    with stores.Store.read(out) as store:
        return [
            {**leg, "arrays": {k: v[leg["row"]] for k, v in store.arrays(leg["unit"]).items()}}
            for leg in store.ledger.legs()
        ]


def params(out: pathlib.Path, agent: str) -> dict[str, np.ndarray]:
    """Return the parameters of each run."""
    with stores.Store.read(out) as store:
        found = store.ledger.runs()
        loaded = playback.load_all(store, found, out.parent.parent / agent, pytest.fail)
    return {each.run["run_id"]: np.asarray(each.state.params) for each in loaded}


def same(one: pathlib.Path, two: pathlib.Path) -> None:
    """Assert that two pipelines have the same bits."""
    for name in NAMES:
        with stores.Store.read(one / name) as left, stores.Store.read(two / name) as right:
            assert left.ledger.identity == right.ledger.identity
            units = [unit["name"] for unit in left.ledger.units()]
            assert units == [unit["name"] for unit in right.ledger.units()]
            for unit in units:
                pair = left.arrays(unit), right.arrays(unit)
                assert pair[0].keys() == pair[1].keys()
                assert all(np.array_equal(pair[0][each], pair[1][each]) for each in pair[0])


def test_each_run_is_given_the_models_of_its_seed(swept: pathlib.Path) -> None:
    with stores.Store.read(swept / "first") as store:
        best = {run["seed"]: run["run_id"] for run in playback.best_configuration(store)}
        one = playback.find(store, playback.BEST)["run_id"]
    first, judge = params(swept / "first", "reference.py"), params(swept / "judge", "judge.py")
    judge_of = {run["seed"]: judge[run["run_id"]] for run in runs(swept / "judge")}
    assert first[best[0]][0] != first[best[1]][0] and judge_of[0][0] != judge_of[1][0]
    for run in runs(swept / "judge"):
        assert (run["arrays"]["given/reference"] == first[best[run["seed"]]][0]).all()
    learned = runs(swept / "learner")
    assert len(learned) == 4
    for run in learned:
        assert (run["arrays"]["given/reference"] == first[one][0]).all()
        assert (run["arrays"]["given/judge"] == judge_of[run["seed"]][0]).all()
        assert (run["arrays"]["evaluation/judge"] == judge_of[run["seed"]][0]).all()


def test_every_stage_has_a_report_and_the_last_table_is_printed_last(
    swept: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        assert (swept / name / "report" / "index.html").is_file()
    assert cli.main(["report", str(swept)]) == 0
    printed = capsys.readouterr().out
    assert [printed.index(f"{name}/report") for name in NAMES] == sorted(
        printed.index(f"{name}/report") for name in NAMES
    )


def test_a_finished_pipeline_is_skipped_without_a_program(
    swept: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("nothing is to be computed")

    monkeypatch.setattr(session, "_compute", refuse)
    monkeypatch.setattr(stages, "trace", refuse)
    session.sweep(swept.parent / "relay.toml", options(swept))
    printed = capsys.readouterr().out
    assert "Stage 1 of 3: first: already finished." in printed
    assert "Results: " in printed and "first/report" not in printed


@pytest.mark.parametrize("stage", NAMES)
def test_a_stage_that_was_interrupted_resumes_to_the_same_bits(
    swept: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    out, segments = tmp_path / "out", engine.segments
    if stage != "first":
        shutil.copytree(swept / "first", out / "first")
        shutil.copyfile(swept / stages.STAGES, out / stages.STAGES)
    if stage == "learner":
        shutil.copytree(swept / "judge", out / "judge")

    def stop(backend: Any, *arguments: Any) -> Any:
        for number, step in enumerate(segments(backend, *arguments)):
            if number == 2 and backend.spec.name == f"relay-{stage}":
                raise KeyboardInterrupt
            yield step

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "segments", stop)
        session.sweep(swept.parent / "relay.toml", options(out, snapshot_every_s=0.0))
    assert list((out / stage / "progress").iterdir())
    session.sweep(swept.parent / "relay.toml", options(out))
    same(swept, out)
