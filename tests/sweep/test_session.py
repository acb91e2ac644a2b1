"""A whole sweep as a Python user starts it, on a trainer that plays no environment."""

import csv
import dataclasses
import pathlib
import shutil
from typing import Any

import bandit
import jax
import numpy as np
import pytest

from purejaxpg import InputError, cli, contract, evaluate, trainers
from purejaxpg.sweep import compute, engine, search, session
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

STUDY = """
agent = "./bandit.py"
seeds = 3
eval_episodes = 32
[sweep]
learning_rate = [0.01, 1.0]
[halving]
rungs = 2
eta = 2
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A sweep file beside the trainer's own file."""
    folder = tmp_path_factory.mktemp("bandit")
    shutil.copyfile(str(bandit.__file__), folder / "bandit.py")
    (folder / "study.toml").write_text(STUDY, encoding="utf-8")
    return folder / "study.toml"


@pytest.fixture(scope="module")
def swept(study: pathlib.Path) -> pathlib.Path:
    out = study.parent / "swept"
    assert session.sweep(study, session.Options(out=out, devices=1, quiet=True)) == 0
    return out


def table(out: pathlib.Path) -> list[dict[str, str]]:
    with (out / "report" / "table.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_trainer_without_environment_is_swept_and_reported(swept: pathlib.Path) -> None:
    best, other = table(swept)
    assert (best["learning_rate"], other["learning_rate"]) == ("1.0", "0.01")
    assert float(best["final_iqm"]) > 0.9
    assert (swept / "report" / "index.html").is_file()
    with stores.Store.read(swept) as store:
        assert {unit["facts"]["unit"] for unit in store.ledger.units()} == {"pulls"}


def test_a_trainer_without_environment_is_scored_on_fresh_episodes(
    study: pathlib.Path, swept: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(swept), "--agent", str(study.parent / "bandit.py"), "--episodes", "64"]
    assert cli.main(words) == 0
    about, scores = capsys.readouterr().out.splitlines()
    assert ": seed " in about and scores.startswith("64 episodes: return ")
    assert float(scores.split()[3]) > 0.8
    assert cli.main([*words, "--greedy"]) == 2
    assert "--greedy and --gif need an environment" in capsys.readouterr().err


def test_a_trainer_without_environment_is_planned(
    study: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(study), "--quick", "--devices", "1"]) == 0
    # 3 seeds of two configurations for 30 updates of 16 pulls, one of them for 30 more.
    assert "6 runs in 2 round(s), 4.32k pulls" in capsys.readouterr().out


def test_a_trainer_without_environment_resumes_to_the_same_bits(
    study: pathlib.Path, swept: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, run_round = study.parent / "stopped", engine.run_round
    options = session.Options(out=out, devices=1, quiet=True)

    def stop_in_the_second(work: Any, known: Any) -> None:
        if len(known) == 2:
            raise KeyboardInterrupt
        run_round(work, known)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "run_round", stop_in_the_second)
        session.sweep(study, options)
    session.sweep(study, options)
    with stores.Store.read(swept) as one, stores.Store.read(out) as two:
        assert [run["status"] for run in two.ledger.runs()].count("done") == 3
        names = [unit["name"] for unit in one.ledger.units()]
        assert names == [unit["name"] for unit in two.ledger.units()]
        for name in names:
            arrays, again = one.arrays(name), two.arrays(name)
            assert arrays.keys() == again.keys() >= {"reward/mean", contract.RETURN}
            assert all(np.array_equal(arrays[each], again[each]) for each in arrays)


def test_a_trainer_without_environment_is_trained_and_logged(
    study: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study.parent)
    words = ["train", "bandit.py", "--learning-rate", "0.5", "--log", "tensorboard", "--quiet"]
    assert cli.main(words) == 0
    (out,) = pathlib.Path("results").iterdir()
    assert out.name.startswith("bandit-seed0-") and list((out / "tensorboard").rglob("*events*"))


# ------------------------------------------------------------------------------------------- given

GIVEN = """
import jax
from flax import struct

import bandit
from bandit import *


@struct.dataclass
class Given:
    shared: jax.Array  # [arms]
    own: jax.Array  # [arms] first logits


def init(key, config, given):
    return State(given.own)


def update(key, state, config, given):
    state, metrics = bandit.update(key, state, config)
    return state, {**metrics, "given/own": given.own[0], "given/shared": given.shared[0]}


def score(key, state, config, num_episodes, given):
    scores = bandit.score(key, state, config, num_episodes)
    return {"evaluation/return": scores["evaluation/return"] + given.own[0]}
"""


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A sweep file of a trainer that is given arrays."""
    path = tmp_path_factory.mktemp("given") / "receiver.toml"
    path.with_suffix(".py").write_text(GIVEN, encoding="utf-8")
    text = STUDY.partition("[halving]")[0].replace("bandit", "receiver")
    path.write_text(text.replace("seeds = 3", "seeds = [5, 2]"), encoding="utf-8")
    return path


def arrays_for(path: pathlib.Path, own: Any, shared: Any = 7.0) -> Any:
    trainer = trainers.load("./receiver.py", path.parent)
    return trainer.Given(np.full((1, 3), shared), np.asarray(own, np.float32)[:, None] * np.ones(3))


def test_a_run_gets_the_shared_arrays_and_those_of_its_seed(receiver: pathlib.Path) -> None:
    out = receiver.parent / "given"
    options = session.Options(out=out, devices=1, quiet=True)
    session.sweep(receiver, options, arrays_for(receiver, [1.0, 10.0]))
    with stores.Store.read(out) as store:
        for leg in store.ledger.legs():
            arrays = {name: x[leg["row"]] for name, x in store.arrays(leg["unit"]).items()}
            own = {5: 1.0, 2: 10.0}[leg["seed"]]
            assert (arrays["given/own"] == own).all() and (arrays["given/shared"] == 7.0).all()
            assert (arrays[contract.RETURN] >= own).all() and leg["score"] < own + 1.5
        made_with = store.ledger.identity["given"]
    assert made_with == specs.load(receiver, arrays_for(receiver, [1.0, 10.0])).given.digest[:16]
    with pytest.raises(InputError, match="belongs to a different sweep: its given is"):
        session.sweep(receiver, options, arrays_for(receiver, [1.0, 11.0]))
    with pytest.raises(InputError, match="--confirm must be at most 0, the number of fresh seeds"):
        confirmed = dataclasses.replace(options, confirm=1)
        session.sweep(receiver, confirmed, arrays_for(receiver, [1.0, 10.0]))


def test_a_shared_array_is_not_batched(receiver: pathlib.Path) -> None:
    spec = specs.load(receiver, arrays_for(receiver, [1.0, 2.0]))
    (group,) = compute.Backend(spec, jax.devices()[:1]).groups(0, next(search.rounds(spec)), {})
    seeds, _, own, shared = compute.inputs_of(spec.given, group.units[:1], group.rows)
    assert own.shared is None and own.own.shape == (group.rows, 3)
    assert own.own[:, 0].tolist() == [{5: 1.0, 2: 2.0}[seed] for seed in seeds.tolist()]
    assert shared.own is None and shared.shared.shape == (3,)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            None,
            "must be given shared, own, with .given. or --given shared=DIR, but is given nothing",
        ),
        ([1.0, 2.0, 3.0], "given own must have a first axis of 1 or of the 2 seeds, but has 3"),
    ],
)
def test_other_arrays_are_refused(receiver: pathlib.Path, own: Any, words: str) -> None:
    given = None if own is None else arrays_for(receiver, own)
    with pytest.raises(InputError, match=words):
        specs.load(receiver, given)


def test_an_agent_that_takes_nothing_is_given_nothing(study: pathlib.Path) -> None:
    with pytest.raises(InputError, match="must be given nothing, but is given a list"):
        specs.load(study, [1.0])


# ------------------------------------------------------------------------------------- the refused


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("score", "must define Config, check, init, update, train, policy"),
        ("init", "must define Config, check, init, update, train"),
        ("num_updates", "must be a dataclass with num_updates"),
    ],
)
def test_an_incomplete_trainer_is_refused(tmp_path: pathlib.Path, missing: str, words: str) -> None:
    text = pathlib.Path(str(bandit.__file__)).read_text("utf-8")
    text = text.replace(f"def {missing}(", f"def no_{missing}(")
    (tmp_path / "bandit.py").write_text(text.replace(f"    {missing}: int", "    n: int"), "utf-8")
    with pytest.raises(InputError, match=words):
        specs.from_dict({"agent": "./bandit.py"}, "study", tmp_path)


def test_a_trainers_own_score_must_hold_a_return() -> None:
    with pytest.raises(InputError, match="score of agent 'bandit' must return 'evaluation/return'"):
        trainer: Any = type("Trainer", (), {"__file__": "bandit.py", "score": lambda *_: {"x": 1}})
        evaluate.score_run(None, trainer, None, None, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"confirm": -1}, "--confirm must be 0 or more, but is -1"),
        ({"executor": "slurm"}, "--executor must be local or ray, but is 'slurm'"),
        ({"executor": "ray", "devices": 1}, "--devices is for one machine"),
        ({"ray_task": {"CPU": 1}}, "need --executor ray"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        session.sweep("there-is-none.toml", session.Options(**options))
