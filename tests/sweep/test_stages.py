"""Pipelines of stages, end to end, on bandits that record what they were given."""

import csv
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
import relay

import purejaxpg
from purejaxpg import InputError, cli, contract, trainers
from purejaxpg.report import playback
from purejaxpg.sweep import compute, engine, forecast, frozen, fsck, session, sources, stages
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

NAMES = ("first", "judge", "learner")
SLOW = pytest.mark.slow


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
    assert printed.count("The best of many looks better than it is; do not quote its number.") == 1
    assert printed.count("The best of many looks better than it is: train what it is given on") == 1
    spare = {"first": 2**32, "judge": 0, "learner": 0}  # seeds that could confirm a winner
    for name, count in spare.items():
        assert "again on fresh seeds" not in (swept / name / "report" / "index.html").read_text()
        with stores.Store.read(swept / name) as store:
            assert frozen.spare_seeds(store.path, store.ledger.identity) == count
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


# ------------------------------------------------------------------------------------- bad input

BAD = [
    ('name = "judge"', 'name = "first"', "name must differ between stages: 'first'"),
    ('name = "judge"', 'name = "../judge"', "name of a stage must be letters, digits"),
    ('name = "judge"\n', "", "name of a stage must be letters, digits, - and _, .* but is None"),
    ('"first" }', '"learner" }', r"of stage 'judge' must be an earlier stage \(first\)"),
    ('"first" }', '"judge" }', r"of stage 'judge' must be an earlier stage \(first\)"),
    ('"first" }', '"fist:best" }', "but is 'fist:best'"),
    ('"first" }', "3 }", "Stage 'judge': given reference must be a text"),
    ('"first" }', '"x.jsonl" }', "must not be a file, because agent 'judge' reads none"),
    ('"first" }', '"./nowhere" }', "nowhere is not a result directory"),
    (', judge = "judge"', "", "Stage 'learner': given must have judge for agent 'learner'"),
    (', judge = "judge"', ', juge = "judge"', "Stage 'learner': .*'juge'; did you mean 'judge'"),
    (', judge = "judge"', ', judge = "judge", data = "x.jsonl"', "x.jsonl', which does not exist"),
    ('sweep = { learning_rate = [0.1, 1.0] }', "sweep = { rate = [1.0] }", "'learner': .*'rate'"),
    ("rows_per_device = 2\n[stage.sweep]", "config = { arms = 2 }\n[stage.sweep]", "has 2"),
    ("[0.1, 0.5]", "[0.1, 0.5]\narms = [3, 2]", "Stage 'learner': reference must have 3 arms"),
    ("seeds = 2", "agent = 'ppo'", "key outside of the stages named 'agent'"),
    ('agent = "./judge.py"', 'agent = "./judge.py"\nseeds = 3', "no model for seed 2: stage 'fir"),
    ('agent = "./reference.py"', 'agent = "./learner.py"', "must be given reference, judge"),
    ('agent = "./reference.py"', 'agent = "./plain.py"', "no model.state, config, .given., so no"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), BAD)
def test_a_mistake_in_any_stage_is_reported_before_the_first_runs(
    tmp_path: pathlib.Path, old: str, new: str, words: str
) -> None:
    assert old in relay.PIPELINE
    path = relay.write(tmp_path, relay.PIPELINE.replace(old, new))
    (tmp_path / "plain.py").write_text("from bandit import *", "utf-8")
    with pytest.raises(InputError, match=words):
        session.sweep(path, options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["stage = []", "[stage]", "[[stages]]", "stage = [1]"])
def test_stages_that_are_no_tables_are_refused(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "relay.toml").write_text(text)
    with pytest.raises(InputError, match=r"must be tables,? .*\[\[stage\]\]"):
        stages.read(tmp_path / "relay.toml")


def test_a_broken_program_of_a_later_stage_is_reported_before_the_first_runs(
    tmp_path: pathlib.Path,
) -> None:
    path = relay.write(tmp_path)
    text = relay.LEARNER.replace("{**scores,", '{"return": scores["evaluation/return"],')
    (tmp_path / "learner.py").write_text(text, "utf-8")
    with pytest.raises(InputError, match="score of agent 'learner' must return 'evaluation/return"):
        session.sweep(path, options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_another_directory_is_left_alone(swept: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = swept.parent / "relay.toml"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is no directory of stages"):
        session.sweep(path, options(tmp_path))
    with pytest.raises(InputError, match="is no directory of stages"):
        session.sweep(path, options(swept / "first"))


def test_a_second_process_is_refused_between_two_stages_as_well(
    swept: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(swept.parent / "relay.toml"), "--out", str(swept), "--devices", "1"]
    with stores.held(swept):
        assert cli.main(words) == 1
    message = f"Another process is running this sweep in {swept}; wait for it or stop it.\n"
    assert capsys.readouterr().err == message
    assert cli.main(words) == 0


def test_a_changed_stage_is_refused_with_what_to_delete(
    swept: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    text = relay.PIPELINE.replace("steps_per_update = 4 }\n\n", "steps_per_update = 5 }\n\n")
    path = relay.write(tmp_path, text)
    words = f"another config.steps_per_update .it was 4, and is 5.: delete {out}/judge and {out}/le"
    with pytest.raises(InputError, match=words):
        session.sweep(path, options(out))
    shutil.rmtree(out / "judge")
    with pytest.raises(InputError, match=r"'learner' was computed with other given arrays .*judge"):
        session.sweep(path, options(out))
    shutil.rmtree(out / "learner")
    session.sweep(path, options(out))
    assert len(runs(out / "learner")) == 4


# ---------------------------------------------------------------------------- what stands alone


def test_the_results_of_a_stage_stand_alone(
    swept: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(swept / "learner", tmp_path / "learner")
    agent = ["--agent", str(swept.parent / "learner.py")]
    assert cli.main(["eval", str(tmp_path / "learner"), *agent, "--episodes", "8"]) == 0
    alone = capsys.readouterr().out
    assert "8 episodes: judge " in alone and ", return " in alone
    assert cli.main(["eval", str(swept), *agent, "--episodes", "8"]) == 0
    assert capsys.readouterr().out == alone
    assert cli.main(["export", str(swept)]) == 0
    with (swept / "learner" / "export.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    (swept / "learner" / "export.csv").unlink()


def test_damaged_given_arrays_are_found_and_written_again(
    swept: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    assert cli.main(["fsck", str(out)]) == 0
    structure = out / "judge" / frozen.FOLDER / frozen.STRUCTURE
    structure.write_text(structure.read_text().replace("reference", "referenze"))
    assert [problem.kind for problem in fsck.check(out / "judge")] == ["given"]
    capsys.readouterr()
    assert cli.main(["fsck", str(out)]) == 1
    assert "the same sweep command writes the given arrays again" in capsys.readouterr().out
    session.sweep(swept.parent / "relay.toml", options(out))
    assert fsck.check(out / "judge") == []


def test_a_directory_is_given_to_a_sweep_and_to_one_run(
    swept: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fork's file is never executed because a directory names it."""
    monkeypatch.chdir(swept.parent)
    words = ["train", "./judge.py", "--given", "reference=out/first", "--quiet"]
    assert cli.main(words) == 2
    assert "executed only if you name it" in capsys.readouterr().err
    for given, words_ in (("reference", "NAME=SOURCE"), ("reference=first", "with a '/'")):
        assert cli.main(["train", "./judge.py", "--given", given]) == 2
        assert words_ in capsys.readouterr().err


def test_the_directory_of_a_pipeline_is_none_of_results(
    swept: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        InputError, match=f"name one: {swept}/first, {swept}/judge, {swept}/learner"
    ):
        sources.trained(swept, best=True)
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    shutil.rmtree(out / "learner")
    for words in (["eval", str(out)], ["export", str(out)]):
        assert cli.main(words) == 2
        message = f"The last stage, {out}/learner, has not begun; name one that has: {out}/first"
        assert message in capsys.readouterr().err


def test_unfinished_results_are_not_given(tmp_path: pathlib.Path) -> None:
    stores.Store.open(tmp_path / "new", {"agent": "ppo"}).close()
    with pytest.raises(InputError, match="its sweep is unfinished: 0 units of it are done"):
        sources.trained(tmp_path / "new", best=True)


# ------------------------------------------------------------------------------ plan and confirm


def test_all_stages_are_planned_without_a_trained_model(
    swept: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = relay.write(tmp_path)
    assert cli.main(["plan", str(path), "--quick", "--devices", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("compilation(s)") == printed.count("Disk: ") == 3
    assert "Stage 2 of 3: judge." in printed and "64 verdicts" in printed
    assert "All stages" not in printed
    assert cli.main(["plan", str(path), "--tune"]) == 2
    assert "relay.toml has several stages" in capsys.readouterr().err


def test_given_arrays_are_counted_once_on_disk(tmp_path: pathlib.Path) -> None:
    pipeline = stages.read(relay.write(tmp_path))
    assert pipeline is not None
    spec = stages.plan(pipeline)[-1]
    assert spec.given.nbytes == (3 + 2 * 3) * 4 and not spec.given.digest
    backend = compute.Backend(spec, jax.devices()[:1])
    assert forecast.bytes_on_disk(backend, []) == spec.given.nbytes


def test_the_scores_of_a_trainer_are_counted_as_they_are_written(swept: pathlib.Path) -> None:
    pipeline = stages.read(swept.parent / "relay.toml")
    assert pipeline is not None
    for name, spec in zip(NAMES, stages.plan(pipeline), strict=True):
        unit = plans.Unit("", (searches.whole(spec.runs[0]),))
        (written, *_) = [run["arrays"] for run in runs(swept / name)]
        scores = {k: v for k, v in written.items() if k.startswith(contract.EVALUATION)}
        found = compute.Backend(spec, jax.devices()[:1]).score_bytes(unit)
        assert found == sum(array.nbytes for array in scores.values()) > 0


LARGE = """
import pathlib
import jax
import numpy as np
from flax import struct
import bandit
from bandit import *


@struct.dataclass
class Given:
    numbers: jax.Array  # [numbers]


def init(key, config, given):
    return bandit.init(key, config)


def update(key, state, config, given):
    state, metrics = bandit.update(key, state, config)
    return state, {**metrics, "given/largest": given.numbers.max()}


def score(key, state, config, num_episodes, given):
    return bandit.score(key, state, config, num_episodes)
"""


@pytest.mark.parametrize("items", [1, 4])
def test_arrays_that_all_rows_share_are_in_memory_once_a_device(
    tmp_path: pathlib.Path, items: int
) -> None:
    """Arrays of one seed are in memory for each row."""
    (tmp_path / "large.py").write_text(LARGE, "utf-8")
    raw = {"agent": "./large.py", "seeds": 4, "eval_episodes": 2, "config": {"num_updates": 2}}
    module = trainers.load("./large.py", tmp_path)
    given = module.Given(np.zeros((items, 2**18), np.float32))
    spec = specs.from_dict(raw, "large", tmp_path, given=given)
    (round_,) = searches.rehearse(searches.rounds(spec))
    backend = compute.Backend(spec, jax.devices()[:1])
    (group,) = backend.groups(0, round_, {})
    few = [forecast.measure(spec, group, rows, jax.devices()[:1]) for rows in (1, 4)]
    line = forecast.fit(*few)
    shared, own = (2**20, 0) if items == 1 else (0, 2**20)
    assert shared <= line.fixed < shared + 2**16
    assert own <= line.per_row < own + 2**16
    lines: list[str] = []
    forecast.plan(spec, jax.devices()[:1], 0, lines.append)
    assert any(f"({line.per_row / 2**20:.2f} for each row)" in text for text in lines)


@pytest.mark.parametrize(("seeds", "most"), [(2, 0), (4, 2)])
def test_only_seeds_with_their_own_given_are_confirmed(
    tmp_path: pathlib.Path, seeds: int, most: int
) -> None:
    text = relay.PIPELINE.replace("seeds = 2", f"seeds = {seeds}")
    text = text.replace('agent = "./learner.py"', 'agent = "./learner.py"\nseeds = 2')
    pipeline = stages.read(relay.write(tmp_path, text))
    assert pipeline is not None
    with pytest.raises(InputError, match=f"--confirm must be at most {most}, the number of fresh"):
        stages.plan(pipeline, most + 1)
    assert len(stages.plan(pipeline, most)) == 3


def test_members_of_a_population_share_what_its_seed_is_given(tmp_path: pathlib.Path) -> None:
    own = "sweep = { learning_rate = [0.1, 1.0] }"
    members = "pbt = { population = 2, generations = 2 }"
    text = relay.PIPELINE.replace(own, f"sweep = {{ learning_rate = [0.1, 1.0] }}\n{members}")
    session.sweep(relay.write(tmp_path, text), options(tmp_path / "out"))
    judge_of = {r["seed"]: r["arrays"] for r in runs(tmp_path / "out" / "judge")}
    learned = runs(tmp_path / "out" / "learner")
    given: dict[int, set[float]] = {}
    for run in learned:
        given.setdefault(run["seed"] // 2, set()).add(float(run["arrays"]["given/judge"][0]))
    assert len(judge_of) == 2 and [len(values) for values in given.values()] == [1, 1]
    assert given[0] != given[1]
    bad = text.replace(
        'reference = "first:best", judge = "judge" }', 'reference = "first", judge = "judge" }'
    )
    bad = bad.replace("[stage.sweep]\nlearning_rate = [0.1, 0.5]", f"{own}\n{members}")
    with pytest.raises(InputError, match="given must be 'first:best', because the populations"):
        session.sweep(relay.write(tmp_path / "bad", bad), options(tmp_path / "bad" / "out"))


@pytest.mark.parametrize("stage", [NAMES[1], *(pytest.param(n, marks=SLOW) for n in NAMES[::2])])
def test_a_pipeline_killed_in_a_stage_ends_with_the_same_bits(
    swept: pathlib.Path, tmp_path: pathlib.Path, stage: str
) -> None:
    path, out = swept.parent / "relay.toml", tmp_path / "out"
    words = ["sweep", str(path), "--out", str(out), "--devices", "1", "--snapshot-every", "0"]
    folders = [str(pathlib.Path(module.__file__).parent) for module in (relay, purejaxpg)]
    found = os.pathsep.join([folders[0], str(pathlib.Path(folders[1]).parent)])
    command = [sys.executable, "-m", "purejaxpg.cli", *words]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": found})
    while process.poll() is None and not (out / stage / "ledger.sqlite").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    session.sweep(path, options(out))
    same(swept, out)


# --------------------------------------------------------------------------------- several agents

AGENTS = """
agent = ["./one.py", "./two.py"]
seeds = 2
eval_episodes = 8
rows_per_device = 2

[config]
num_updates = 8
steps_per_update = 4

[sweep]
learning_rate = [0.1, 1.0]

[agents.one.sweep]
scale = [1.0, 2.0]

[agents.two]
config = { learning_rate = 0.5 }
"""
ONE = """
import bandit
from bandit import *


@configs.dataclass
class Config(bandit.Config):
    scale: float = 1.0
"""


def write_agents(folder: pathlib.Path, text: str = AGENTS) -> pathlib.Path:
    """Write two bandits and a sweep file for both into a folder -> the file."""
    (folder / "one.py").write_text(ONE, "utf-8")
    (folder / "two.py").write_text("from bandit import *\n", "utf-8")
    (folder / "both.toml").write_text(text, "utf-8")
    return folder / "both.toml"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a sweep of two agents, with confirmed winners, beside its sweep file."""
    path = write_agents(tmp_path_factory.mktemp("agents"))
    assert session.sweep(path, options(path.parent / "out", confirm=2)) == 0
    return path.parent / "out"


def test_each_of_several_agents_has_the_shared_tables_and_its_own(both: pathlib.Path) -> None:
    found = {}
    for name in ("one", "two"):
        legs = runs(both / name)
        assert {leg["seed"] for leg in legs if leg["stage"] == "tune"} == {0, 1}
        assert {leg["seed"] for leg in legs if leg["stage"] == "confirm"} == {2, 3}
        found[name] = [leg["config"] for leg in legs if leg["stage"] == "tune"]
    pairs = [(each["learning_rate"], each["scale"]) for each in found["one"][::2]]
    assert pairs == [(0.1, 1.0), (0.1, 2.0), (1.0, 1.0), (1.0, 2.0)]
    assert [each["learning_rate"] for each in found["two"]] == [0.5, 0.5]
    assert all(each["num_updates"] == 8 for each in found["one"] + found["two"])


def test_an_agent_of_several_has_the_bits_of_a_sweep_of_its_own(
    both: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    write_agents(tmp_path)
    alone = tmp_path / "alone.toml"
    alone.write_text(
        'agent = "./two.py"\nseeds = 2\neval_episodes = 8\nrows_per_device = 2\n'
        "config = { num_updates = 8, steps_per_update = 4, learning_rate = 0.5 }\n"
    )
    session.sweep(alone, options(tmp_path / "alone", confirm=2))
    one, two = runs(both / "two"), runs(tmp_path / "alone")
    for left, right in zip(one, two, strict=True):
        assert left["run_id"] == right["run_id"] and left["score"] == right["score"]
        assert all((left["arrays"][k] == right["arrays"][k]).all() for k in left["arrays"])


def test_the_commands_take_the_directory_of_several_agents(
    both: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fsck", str(both)]) == cli.main(["report", str(both)]) == 0
    page = (both / "index.html").read_text()
    assert "2 agents" in page and "one/report/index.html" in page and "two/report" in page
    assert f"All agents: {both / 'index.html'}" in capsys.readouterr().out
    assert cli.main(["export", str(both)]) == 2
    assert f"holds several agents; name one: {both / 'one'}" in capsys.readouterr().err
    assert cli.main(["export", str(both / "two")]) == 0


def test_agents_that_play_an_environment_are_compared(
    both: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[list[pathlib.Path]] = []
    monkeypatch.setattr(session, "report_together", lambda found, out, _: compared.append(found))
    assert cli.main(["report", str(both)]) == 0
    assert compared == [[both / "one", both / "two"]]


def test_an_agent_added_later_is_computed_beside_the_finished_ones(
    both: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(both, tmp_path / "out")
    path = write_agents(tmp_path, AGENTS.replace('"./two.py"', '"./three.py", "./two.py"'))
    shutil.copyfile(tmp_path / "two.py", tmp_path / "three.py")
    session.sweep(path, options(tmp_path / "out", confirm=2))
    printed = capsys.readouterr().out
    assert "Agent 1 of 3: one: already finished." in printed
    assert "Agent 3 of 3: two: already finished." in printed
    assert len(runs(tmp_path / "out" / "three")) == 4 + 2 * 2
    assert "3 agents" in (tmp_path / "out" / "index.html").read_text()


BAD_AGENTS = [
    ("rate = [0.1, 1.0]", "rate = [1.0]\nscale = [1.0]", "^Agent 'two': There is no field 'scale'"),
    ("rate = [0.1, 1.0]", "rate = [1.0]\nscale = [1.0]", r"belongs in their own tables, \[agents."),
    ("[agents.two]", "[agents.too]", "agent of this sweep for .agents. named 'too'; did you mean"),
    ("config = { l", "seeds = 3\nconfig = { l", "no key in .agents.two. named 'seeds'; did you"),
    ('"./two.py"', '"./one.py"', "must list each name once, but lists .'one'. again"),
    ('["./one.py", "./two.py"]', "[]", r"agent must be a list of names and paths, but is \[\]"),
    ('["./one.py", "./two.py"]', '"./one.py"', r"\[agents\] needs a list, as agent = "),
    ("[sweep]\n", "[sweep]\nagent = ['ppo']\n", "agent must be outside of .sweep.; for several"),
    ("[config]", "[[stage]]\nname = 'x'\n[config]", r"agent must be one agent in each \[\[stage"),
    ("learning_rate = 0.5", "learning_rate = -1.0", "^Agent 'two': learning_rate must be"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), BAD_AGENTS)
def test_a_mistake_in_any_agent_is_reported_before_the_first_runs(
    tmp_path: pathlib.Path, old: str, new: str, words: str
) -> None:
    assert old in AGENTS
    path = write_agents(tmp_path, AGENTS.replace(old, new))
    with pytest.raises(InputError, match=words):
        session.sweep(path, options(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_several_agents_are_planned_together(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(write_agents(tmp_path)), "--quick", "--devices", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Agent 1 of 2: one." in printed and "Agent 2 of 2: two." in printed
    assert "both-one: ./one.py, 8 runs" in printed and "both-two: ./two.py, 2 runs" in printed
