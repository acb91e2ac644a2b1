"""A whole sweep as a Python user starts it, on a trainer that plays no environment."""

import csv
import pathlib
import shutil
from typing import Any

import bandit
import numpy as np
import pytest

from purejaxpg import InputError, cli, contract
from purejaxpg.sweep import engine, session
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
        contract.score(None, trainer, None, None, 1)


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
