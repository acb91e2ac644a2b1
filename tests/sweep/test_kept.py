"""The code of a sweep: kept with the results, compared when the sweep continues, and run again."""

import json
import pathlib
import shutil
import sys

import pytest
from test_trainers import ENV, fork, write

from purejaxpg import InputError, cli, disk, trainers
from purejaxpg.sweep import fsck, kept, store

SPEC = """
agent = "./mine.py"
eval_episodes = 2
rows_per_device = 1
[config]
env = "Const"
total_timesteps = 64
num_envs = 2
num_steps = 16
hidden = [4]
"""
HEAD = (
    'import env_of_kept\nfrom purejaxpg import envs as _e\n_e.register("Const", env_of_kept.Const)'
)
MODULES = ("env_of_kept", "reward_of_kept")


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A fork with an environment and a reward, each in a file of its own, and a sweep file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    fork(tmp_path / "lab", HEAD)
    text = ENV.format(head="import reward_of_kept", reward="reward_of_kept.REWARD")
    write(tmp_path / "lab" / "env_of_kept.py", text)
    write(tmp_path / "lab" / "reward_of_kept.py", "REWARD = 1.0  # a step\n")
    write(tmp_path / "lab" / "s.toml", SPEC)
    return tmp_path


def run(*words: str) -> int:
    """Run a command as in a process of its own, in which no module of a fork is loaded."""
    for name in MODULES:
        sys.modules.pop(name, None)
    trainers._executed.clear()
    return cli.main(list(words))


def sweep(*words: str) -> int:
    return run("sweep", "lab/s.toml", "--devices", "1", "--quiet", *words)


def test_a_sweep_keeps_its_code_and_goes_on_with_the_same_program_only(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    out, mine, reward = folder / "results" / "s", folder / "lab" / "mine.py", "reward_of_kept.py"
    copies = {path.name: path.read_bytes() for path in (out / "source").glob("*.py")}
    assert copies == {
        name: (folder / "lab" / name).read_bytes() for name in ("mine.py", "env_of_kept.py", reward)
    }
    with store.Store.read(out) as opened:
        identity, runs = opened.ledger.identity, [r["run_id"] for r in opened.ledger.runs()]

    # A comment: it has to be accepted, once, and the runs keep their ids.
    (folder / "lab" / reward).write_text('"""Rewards."""\nREWARD = (1.0)\n')
    mine.write_text("# mine\n" + mine.read_text())
    capsys.readouterr()
    assert sweep() == 2
    told = capsys.readouterr().err
    assert "formatting changed (mine.py, reward_of_kept.py)" in told and "--accept-source" in told
    assert sweep("--accept-source") == 0
    assert "Already finished" in capsys.readouterr().out
    assert sweep() == 0
    assert (out / "source" / "mine.py").read_bytes() == mine.read_bytes()
    with store.Store.read(out) as opened:
        assert opened.ledger.identity == identity
        assert [r["run_id"] for r in opened.ledger.runs()] == runs
    assert fsck.check(out) == []

    # A program: it has to have another directory, whatever is accepted.
    (folder / "lab" / reward).write_text("REWARD = -1.0\n")
    capsys.readouterr()
    assert sweep() == sweep("--accept-source") == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("The program changed (reward_of_kept.py) since ") and "--out" in first
    assert second.startswith("--accept-source is for changed comments, docstrings and formatting")
    write(folder / "lab" / "more_of_kept.py")
    mine.write_text("import more_of_kept\n" + mine.read_text())
    assert sweep() == 2
    assert "(mine.py, more_of_kept.py is new, reward_of_kept.py)" in capsys.readouterr().err

    # What was trained can be played, even if the files are gone.
    assert run("eval", str(out), "--agent", "lab/mine.py") == 2
    assert "more_of_kept.py is new" in (told := capsys.readouterr().err)
    assert "--agent stored" in told
    shutil.rmtree(folder / "lab")
    for words in ((), ("--agent", "lab/mine.py")):
        assert run("eval", str(out), "--episodes", "2", *words) == 2
        assert "--agent stored for the copy in" in capsys.readouterr().err
    assert run("eval", str(out), "--episodes", "2", "--agent", "stored") == 0
    assert "2 sampled episodes: return 10.00" in capsys.readouterr().out
    assert run("report", str(out)) == 0

    # A copy that was changed is not executed.
    (out / "source" / reward).write_text("REWARD = 7.0\n")
    capsys.readouterr()
    assert run("eval", str(out), "--agent", "stored") == 1
    assert "is damaged: its SHA-256" in capsys.readouterr().err
    (problem,) = fsck.check(out)
    assert problem.kind == "source" and reward in problem.text

    # Without copies, as of an earlier version, there is nothing to execute.
    shutil.rmtree(out / "source")
    assert run("eval", str(out), "--agent", "stored") == 2
    assert "holds no copy of its agent" in capsys.readouterr().err
    assert fsck.check(out) == []
    assert run("report", str(out)) == run("export", str(out)) == 0  # which need none


def test_a_directory_of_an_earlier_version_continues(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep() == 0
    source = folder / "results" / "s" / "source"
    shutil.rmtree(source)
    assert sweep() == 0
    assert {path.name for path in source.iterdir()} >= {"mine.py", "files.json"}
    shutil.rmtree(source)
    (folder / "lab" / "mine.py").write_text("x = 1\n" + (folder / "lab" / "mine.py").read_text())
    capsys.readouterr()
    assert sweep() == 2
    assert "its agent_source is" in capsys.readouterr().err


def test_a_sweep_without_results_begins_again_with_corrected_code(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = folder / "lab" / "mine.py"
    right = mine.read_text("utf-8")
    line = "    key_rollout, "
    assert line in right
    mine.write_text(right.replace(line, f"    undefined_name\n{line}", 1), "utf-8")
    write(folder / "lab" / "unused_of_kept.py")
    mine.write_text("import unused_of_kept\n" + mine.read_text("utf-8"), "utf-8")
    assert sweep() == 2
    assert "NameError: name 'undefined_name'" in capsys.readouterr().err
    out = folder / "results" / "s"
    assert (out / "source" / "unused_of_kept.py").exists()
    mine.write_text(right, "utf-8")
    assert sweep() == 0
    assert not (out / "source" / "unused_of_kept.py").exists()
    assert (out / "source" / "mine.py").read_text("utf-8") == right
    assert (
        json.loads((out / "source" / "files.json").read_text())["content"]["agent"] == "./mine.py"
    )
    assert fsck.check(out) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x = 1", "x = 1  # one\n\n", True),
        ("def f():\n    return 1", 'def f():\n    """One."""\n    return (1)', True),
        ('"""A."""\nclass A:\n    """B."""\n    x = 1', "class A:\n    x = 1", True),
        ("x = 1", "x = 2", False),
        ("x = 'a'", "x = 'b'", False),
        ("def f():\n    return 1", "def f():\n    return -1", False),
        ("def f(:", "def f(:  # one", False),
    ],
)
def test_programs_are_compared_without_comments(
    tmp_path: pathlib.Path, one: str, other: str, same: bool
) -> None:
    texts = [write(tmp_path / "one.py", one), write(tmp_path / "other.py", other)]
    assert (kept.program(texts[0]) == kept.program(texts[1])) is same


@pytest.mark.fast
def test_a_name_outside_the_folder_is_never_executed(tmp_path: pathlib.Path) -> None:
    """`stored` is only what the directory's own list names."""
    with pytest.raises(InputError, match="holds no copy"):
        kept.trainer_file(tmp_path)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "mine.py").write_text("x = 1")
    about = {"file": "mine.py", "files": {"mine.py": "0" * 64}, "copied": ["mine.py"]}
    disk.write_hashed(tmp_path / "source" / "files.json", about)
    with pytest.raises(Exception, match="damaged"):
        kept.trainer_file(tmp_path)
