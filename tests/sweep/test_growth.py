"""Sweeps that grow end with the bits of the whole sweep, or are refused with the reason."""

import copy
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import bandit
import jax
import numpy as np
import pytest
import tiny_sweep

import purejaxpg
from purejaxpg import InputError, cli
from purejaxpg.report import curves, dataset, export, playback
from purejaxpg.sweep import fsck, growth, session
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

# 60 updates are segments of one update, 130 are segments of three.
FILE = """
agent = "./mine.py"
seeds = 2
eval_episodes = 8
rows_per_device = 2

[config]
num_updates = 60
steps_per_update = 4

[sweep]
learning_rate = [0.1, 1.0]
"""
GROWN = FILE.replace("seeds = 2", "seeds = 3").replace("[0.1, 1.0]", "[0.1, 0.5, 1.0]")
LONGER = GROWN.replace("= 60", "= 130").replace("seeds = 3", "seeds = [0, 1, 2, 9]")


def write(folder: pathlib.Path, text: str = FILE) -> pathlib.Path:
    """Write a bandit and a sweep file into a folder -> the file."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text("from bandit import *\n", "utf-8")
    (folder / "study.toml").write_text(text, "utf-8")
    return folder / "study.toml"


def sweep(folder: pathlib.Path, text: str, devices: int = 1) -> pathlib.Path:
    """Run a sweep file, or go on with it, without a report -> the result directory."""
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "report", lambda out, _: out)
        session.sweep(write(folder, text), session.Options(out=out, devices=devices, quiet=True))
    return out


def runs(out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Return id, score and arrays of each run, the arrays of all its legs put together."""
    found: dict[str, dict[str, Any]] = {}
    with stores.Store.read(out) as store:
        assert store.ledger.finished and store.damaged() == {}
        for chain in curves.chains(store.ledger.legs()).values():
            parts = [
                {k: v[leg["row"]] for k, v in store.arrays(leg["unit"]).items()} for leg in chain
            ]
            arrays = {
                name: parts[-1][name]
                if name.startswith("evaluation/")
                else np.concatenate([part[name] for part in parts])
                for name in parts[0]
            }
            found[chain[-1]["run_id"]] = {"score": chain[-1]["score"], **arrays}
    return found


def same(one: pathlib.Path, two: pathlib.Path) -> None:
    """Assert that two directories have the same runs, to the last bit."""
    left, right = runs(one), runs(two)
    assert left.keys() == right.keys()
    for run_id, values in left.items():
        assert values.keys() == right[run_id].keys()
        assert all(np.array_equal(values[name], right[run_id][name]) for name in values)


def units(out: pathlib.Path) -> dict[str, str]:
    with stores.Store.read(out) as store:
        return {unit["name"]: unit["arrays_sha256"] for unit in store.ledger.units()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of the sweep that the others grow into, run at once."""
    return sweep(tmp_path_factory.mktemp("whole"), LONGER)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a sweep that grew twice: seeds and a value; then another seed and length."""
    folder = tmp_path_factory.mktemp("grown")
    before: dict[str, str] = {}
    for text in (FILE, GROWN, LONGER):
        out = sweep(folder, text)
        assert before.items() < units(out).items()  # finished units stay as they are
        before = units(out)
    return out


def test_a_sweep_that_grew_has_the_bits_of_the_whole_sweep(
    grown: pathlib.Path, whole: pathlib.Path
) -> None:
    same(grown, whole)
    assert len(runs(grown)) == 3 * 4
    with stores.Store.read(grown) as store:
        legs = store.ledger.legs(planned=True)
        spans = [
            [(leg["start"], leg["stop"]) for leg in legs if leg["round"] == i] for i in range(3)
        ]
        assert spans == [[(0, 60)] * 4, [(0, 60)] * 5, [(60, 130)] * 9 + [(0, 130)] * 3]
        assert {unit["size"] for unit in store.ledger.units()} == {2}


def test_nothing_is_computed_twice(
    grown: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(session, "_compute", lambda *_: pytest.fail("nothing is missing"))
    session.sweep(grown.parent / "study.toml", session.Options(out=grown, devices=1))
    assert "Already finished" in capsys.readouterr().out


def test_agents_of_the_package_grow_to_the_same_bits(tmp_path: pathlib.Path) -> None:
    raw = copy.deepcopy(tiny_sweep.TINY) | {"sweep": {"learning_rate": [1e-3, 1e-2]}}
    raw["config"]["learning_rate_schedule"] = "constant"
    longer = copy.deepcopy(raw) | {"seeds": 3}
    longer["config"]["total_timesteps"] *= 2
    for each in (raw, {**raw, "seeds": 3}, longer):
        spec = growth.continued(specs.from_dict(each, "tiny"), tmp_path / "out")
        tiny_sweep.run(spec, tmp_path / "out")
    tiny_sweep.run(specs.from_dict(longer, "tiny"), tmp_path / "whole")
    same(tmp_path / "out", tmp_path / "whole")


def on_two_devices(folder: str) -> None:
    """Grow a sweep by a single unit, and then by another length; run the same as a whole."""
    last = FILE.replace("seeds = 2", "seeds = 3").replace("= 60", "= 130")
    for text in (FILE, FILE.replace("seeds = 2", "seeds = 3"), last):
        sweep(pathlib.Path(folder), text, 2)
    sweep(pathlib.Path(folder, "whole"), last, 2)


def test_a_single_new_unit_is_computed_on_several_devices_like_those_before(
    tmp_path: pathlib.Path,
) -> None:
    call = f"import test_growth; test_growth.on_two_devices({str(tmp_path)!r})"
    here = pathlib.Path(__file__).resolve()
    folders = [str(here.parent), *(str(folder) for folder in here.parents[1:3])]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment = {**os.environ, **flags, "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-c", call], env=environment, check=True, timeout=600)
    with stores.Store.read(tmp_path / "out") as store:
        assert [unit["facts"]["devices"] for unit in store.ledger.units()] == [2] * 6
        assert [unit["round"] for unit in store.ledger.units()] == [0, 0, 1, 2, 2, 2]
    same(tmp_path / "out", tmp_path / "whole" / "out")


# ------------------------------------------------------------------------------------ interruption


def test_a_process_killed_in_a_sweep_that_grows_ends_with_the_same_bits(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out, path = sweep(tmp_path, FILE), write(tmp_path, LONGER)
    words = ["sweep", str(path), "--out", str(out), "--devices", "1", "--snapshot-every", "0"]
    folders = [
        str(pathlib.Path(bandit.__file__).parent),
        str(pathlib.Path(*purejaxpg.__path__).parent),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "purejaxpg.cli", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        stdout=subprocess.DEVNULL,
    )
    second = out / "arrays" / "round1-group0-unit0.npz"
    while process.poll() is None and not second.exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(units(out)) == 2 + 6
    same(sweep(tmp_path, LONGER), whole)
    assert fsck.check(out) == []


def test_a_sweep_that_grows_before_it_is_finished_ends_with_the_same_bits(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, left = stores.Store.commit, [1]

    def once(*arguments: Any) -> None:
        if not left.pop() if left else True:
            raise KeyboardInterrupt
        commit(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stores.Store, "commit", once)
        sweep(tmp_path, FILE)
    assert sum(digest is not None for digest in units(tmp_path / "out").values()) == 1
    same(sweep(tmp_path, LONGER), whole)


def test_an_interrupted_change_of_the_identity_is_completed(
    whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = sweep(tmp_path, FILE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stores.Store, "write_texts", interrupt)
        sweep(tmp_path, LONGER)
    assert (out / "spec.toml").read_text() == FILE
    same(sweep(tmp_path, LONGER), whole)
    assert (out / "spec.toml").read_text() == LONGER and fsck.check(out) == []


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_lost_ledger_of_a_sweep_that_grew_is_rebuilt(
    grown: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(grown, out)
    for path in [*out.glob("ledger.sqlite*"), out / "records" / "round0-group0-unit1.json"]:
        path.unlink()
    assert fsck.run(out, True, lambda _: None) == 0
    with stores.Store.read(out) as store:
        assert len(store.ledger.units()) == 2 + 3 + 7 - 1
    same(sweep(tmp_path, LONGER), whole)


# ------------------------------------------------------------------------------------ the results


def test_the_results_of_a_longer_run_are_those_of_one_run(
    grown: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert fsck.check(grown) == []
    with stores.Store.read(grown) as store:
        found = store.ledger.runs()
        assert [run["status"] for run in found] == ["done"] * 12
        assert all((run["stop"], run["total"]) == (130, 130) for run in found)
        history = store.ledger.identity["grown"]
        assert [state["seeds"] for state in history] == [[0, 1], [0, 1, 2]]
        assert store.ledger.identity["seeds"] == [0, 1, 2, 9]
        assert store.ledger.notes() == [
            "The sweep grew: seeds from [0,1] to [0,1,2]; sweep.learning_rate from [0.1,1.0] to "
            "[0.1,0.5,1.0].",
            "The sweep grew: config.num_updates from 60 to 130; seeds from [0,1,2] to [0,1,2,9].",
        ]
    table = export.write(grown, tmp_path / "curves.csv", True).read_text().splitlines()
    assert len(table) == 1 + 12 * 130
    data = dataset.load(grown)
    assert data.sizes["run"] == 12 and data["loss/policy"].notnull().all()
    assert cli.main(["report", str(grown)]) == 0
    page = (grown / "report" / "index.html").read_text()
    assert "The sweep grew: config.num_updates from 60 to 130" in page
    with stores.Store.read(grown) as store:
        file = grown.parent / "mine.py"
        trained = playback.load_all(store, store.ledger.runs(), file, pytest.fail)
    assert len({tuple(np.asarray(each.state.params)) for each in trained}) == 12


def test_plan_says_what_is_finished_and_what_is_missing(
    grown: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write(tmp_path, LONGER.replace("[0, 1, 2, 9]", "[0, 1, 2, 9, 5]").replace("130", "140"))
    for path, words in (
        (grown.parent / "study.toml", ["has 12 finished runs and lacks none."]),
        (more, [
            f"The sweep in {grown} grows: config.num_updates from 130 to 140; seeds from",
            f"{grown} has 0 finished runs; 15 are missing, and what follows is for these.",
            "Round 4, group 0: 12 runs, updates 131 to 140, in 6 unit(s) of 2 rows",
            "Round 4, group 1: 3 runs, updates 1 to 140, in 2 unit(s) of 2 rows",
        ]),
        (write(tmp_path / "other", FILE.replace("= 4", "= 5")), [
            "belongs to a different sweep: its config.steps_per_update is 4", "4 runs in 1 round",
        ]),
    ):  # fmt: skip
        assert cli.main(["plan", str(path), "--out", str(grown), "--quick", "--devices", "1"]) == 0
        printed = capsys.readouterr().out
        for text in words:
            assert text in printed


# ---------------------------------------------------------------------------------- what is refused


def stored(folder: pathlib.Path, raw: dict[str, Any], confirmed: bool = False) -> pathlib.Path:
    """Make the result directory of a sweep that has not begun."""
    spec = specs.from_dict({"agent": "./mine.py", **raw}, "study", write(folder).parent)
    with stores.Store.open(folder / "out", dict(spec.identity)) as store:
        if confirmed:
            run = ledgers.Run("one", {}, 9, {}, stage="confirm", stop=1, total=1)
            store.ledger.plan({"round1-group0-unit0": [run]}, 1)
    return folder / "out"


def become(folder: pathlib.Path, raw: dict[str, Any]) -> specs.Spec:
    spec = specs.from_dict({"agent": "./mine.py", **raw}, "study", folder)
    return growth.continued(spec, folder / "out")


GRID: dict[str, Any] = {
    "seeds": 2, "config": {"num_updates": 60}, "sweep": {"learning_rate": [0.1, 1.0]},
}  # fmt: skip
DRAWN = {
    "seeds": 2, "sweep": {"learning_rate": {"log_uniform": [1e-3, 1.0]}},
    "search": {"method": "random", "samples": 5},
}  # fmt: skip
REFUSED = [
    (GRID, {"seeds": 1}, "it has results for learning_rate=0.1, seed 1, which are not in"),
    (GRID, {"sweep": {"learning_rate": [0.1]}}, "results for learning_rate=1, seed 0, which are"),
    (GRID, {"config": {"num_updates": 40}}, "num_updates was 60 and is 40, which must give more"),
    (GRID, {"sweep": {**GRID["sweep"], "steps_per_update": [4]}}, "steps_per_update was not an"),
    (GRID, {"sweep": {}}, "learning_rate is no longer an axis"),
    (GRID, {"eval_episodes": 4}, "belongs to a different sweep: its eval_episodes is 128 and this"),
    (GRID, {"config": {"num_updates": 60, "steps_per_update": 2}}, "config.steps_per_update is"),
    (GRID, {"halving": {"rungs": 2}}, "belongs to a different sweep: its halving.rungs is absent"),
    (DRAWN, {"search": {"method": "lhs", "samples": 5}}, "its search.method is .* and this one's"),
    (DRAWN, {"search": {"method": "random", "samples": 4}}, "drawn by 'random', which now draws"),
    (DRAWN, {"sweep": {"learning_rate": {"log_uniform": [1e-3, 2.0]}}}, "which now draws others"),
    (
        DRAWN | {"search": {"method": "lhs", "samples": 5}},
        {"search": {"method": "lhs", "samples": 6}},
        "its configurations are drawn by 'lhs', which now draws others than before",
    ),
    (DRAWN | {"halving": {"rungs": 2}}, {"seeds": 3}, "with .halving., what is trained depends on"),
    (
        {"seeds": 2, "sweep": DRAWN["sweep"], "pbt": {"population": 4, "generations": 2}},
        {"seeds": 3},
        r"with \[pbt\], what is trained depends on the results of all runs before",
    ),
    (
        DRAWN | {"search": {"method": "optuna", "samples": 5}},
        {"search": {"method": "optuna", "samples": 6}},
        r"with \[search\] method 'optuna', what is trained depends on",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "changed", "words"), REFUSED)
def test_what_cannot_grow_is_refused_with_the_reason(
    tmp_path: pathlib.Path, raw: dict[str, Any], changed: dict[str, Any], words: str
) -> None:
    out = stored(tmp_path, raw)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=words):
        become(tmp_path, {**raw, **changed})
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path in before}
    assert become(tmp_path, raw).before == ()


def test_a_sweep_with_a_confirmed_winner_does_not_grow(tmp_path: pathlib.Path) -> None:
    stored(tmp_path, GRID, confirmed=True)
    with pytest.raises(
        InputError, match=r"cannot grow .*: its winner was confirmed on fresh seeds"
    ):
        become(tmp_path, {**GRID, "seeds": 3})


def test_a_run_whose_learning_rate_is_annealed_does_not_become_longer(
    tmp_path: pathlib.Path,
) -> None:
    raw = {
        **GRID,
        "agent": "a2c",
        "config": {"total_timesteps": 1600, "num_envs": 2, "hidden": [4]},
    }
    longer = copy.deepcopy(raw)
    longer["config"]["total_timesteps"] = 3200
    for schedule in ("linear", "constant"):
        for each in (raw, longer):
            each["config"]["learning_rate_schedule"] = schedule
        stored(tmp_path / schedule, raw)
        if schedule == "constant":
            assert len(become(tmp_path / schedule, longer).before) == 1
            continue
        words = "the updates of agent 'a2c' depend on total_timesteps, as with a learning rate that"
        with pytest.raises(InputError, match=words):
            become(tmp_path / schedule, longer)


@pytest.mark.parametrize("method", ["random", "sobol"])
def test_samples_that_stay_the_same_may_become_more(tmp_path: pathlib.Path, method: str) -> None:
    raw = {**DRAWN, "search": {"method": method, "samples": 5}}
    stored(tmp_path, raw)
    spec = become(tmp_path, {**raw, "search": {"method": method, "samples": 9}, "seeds": 3})
    first, second = searches.rehearse(searches.rounds(spec))
    assert (len(first.legs), len(second.legs)) == (5 * 2, 9 * 3 - 5 * 2)
    assert plans.count_runs([first, second]) == 9 * 3
    assert {leg.run.run_id for each in (first, second) for leg in each.legs} == {
        run.run_id for run in spec.runs
    }


def test_a_grown_sweep_is_confirmed_like_a_whole_one(tmp_path: pathlib.Path) -> None:
    stored(tmp_path, GRID)
    spec = become(tmp_path, {**GRID, "seeds": 3})
    assert [each.stage for each in searches.rehearse(searches.rounds(spec, 2))] == [
        "tune", "tune", "confirm",
    ]  # fmt: skip
    plain = dataclasses.replace(spec, before=())
    ids = [
        {leg.run.run_id for leg in searches.rehearse(searches.rounds(each, 2))[-1].legs}
        for each in (spec, plain)
    ]
    assert len(ids[0]) == len(ids[1]) and jax.devices()
