"""The command line as a person uses it: what is printed, where, and the exit status."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import forked
import pytest

import purejaxpg
from purejaxpg import cli
from purejaxpg.sweep import session

FLAGS = [
    *("--total-timesteps", "64", "--num-envs", "2", "--num-steps", "8", "--num-epochs", "1"),
    *("--num-minibatches", "1", "--hidden", "8", "--env-params.max_steps_in_episode", "20"),
    "--quiet",
]
SPEC = """
agent = "ppo"
seeds = 2
eval_episodes = 4
[config]
total_timesteps = 64
num_envs = 2
num_steps = 8
num_epochs = 1
num_minibatches = 1
hidden = [8]
env_params.max_steps_in_episode = 20
[sweep]
learning_rate = [1e-3, 1e-2]
"""


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.fast
def test_version_and_help_leave_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["--help"], ["sweep", "--help"]):
        with pytest.raises(SystemExit) as left:
            cli.main(words)
        assert left.value.code == 0
    printed = capsys.readouterr().out
    assert purejaxpg.__version__ in printed
    assert all(word in printed for word in ("list", "train", "sweep", "report", "fork"))


@pytest.mark.fast
def test_list_names_agents_and_environments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "ppo" in printed
    assert "CartPole-v1" in printed
    assert cli.main(["list", "agents"]) == 0
    assert "CartPole-v1" not in capsys.readouterr().out


@pytest.mark.fast
def test_help_of_an_agent_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "ppo", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--learning-rate" in printed
    assert "step size of Adam (0.003)" in printed
    assert "--env-params.NAME" in printed and "--given" not in printed


@pytest.mark.fast
def test_help_of_a_trainer_says_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "rlhf.rloo", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("usage: purejaxpg train rlhf.rloo --given reference=DIR [--seed")
    assert "reference is required, reward is optional" in printed and "env-params" not in printed
    assert cli.main(["train", "rlhf.rloo"]) == 2
    message = "agent 'rlhf.rloo' must be given reference, with [given] or --given reference=DIR, "
    assert capsys.readouterr().err == f"{message}but is given nothing.\n"
    assert cli.main(["fork", "rlhf.rloo", "mine.py"]) == 0
    assert "python mine.py --given NAME=DIR   one run" in capsys.readouterr().out


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["COMMAND"]),
        (["swep"], ["'swep'", "'sweep'"]),
        (["trian"], ["'trian'", "'train'"]),
        (["train", "PPO"], ["'PPO'", "'ppo'"]),
        (["train", "ppo", "--lr", "1e-3"], ["'lr'", "'learning_rate'"]),
        (["sweep"], ["SPEC.toml"]),
        (["sweep", "none.toml"], ["none.toml"]),
        (["train"], ["agent"]),
        (["train", "poo"], ["'poo'", "'ppo'"]),
        (["train", "ppo", "--env", "CartPole-v2"], ["CartPole-v2", "CartPole-v1"]),
        (["train", "ppo", "--lerning-rate", "1"], ["lerning_rate", "learning_rate"]),
        (["train", "ppo", "--learning-rate", "abc"], ["learning_rate", "number", "'abc'"]),
        (["train", "ppo", "--learning-rate", "nan"], ["learning_rate", "number", "nan"]),
        (["train", "ppo", "--learning-rate"], ["learning-rate", "value"]),
        (["train", "ppo", "--num-envs", "2.5"], ["num_envs", "whole number", "2.5"]),
        (["train", "ppo", "--num-minibatches", "3"], ["num_minibatches", "3", "256", "preset"]),
        (["train", "ppo", "--normalize-obs", "maybe"], ["normalize_obs", "true or false"]),
        (["train", "ppo", "--hidden", "8", "x"], ["hidden", "whole number", "'x'"]),
        (["train", "ppo", "--initial-log-std", "1"], ["initial_log_std", "continuous"]),
        (["train", "ppo", "--env-params.gravty", "1"], ["gravty", "gravity"]),
        (["train", "ppo", "--seed", "x"], ["seed", "'x'"]),
        (["train", "ppo", "--devices", "0"], ["devices", "0"]),
        (["sweep", "s.toml", "--ray-task", "GPU=none"], ["--ray-task", "GPU=1", "'GPU=none'"]),
        (["sweep", "s.toml", "--ray-task", "GPU=1"], ["--ray-task", "--executor ray"]),
        (["sweep", "s.toml", "--executor", "ray", "--devices", "1"], ["--devices", "--ray-task"]),
        (["train", "ppo", "--log", "mlflow"], ["--log", "'mlflow'", "tensorboard", "wandb"]),
        (["train", "ppo", "stray"], ["stray"]),
        (["train", "ppo", "--env-params", "3"], ["env-params", "NAME"]),
        (["train", "ppo", "--env-params.gravity", "5", "6"], ["gravity", "[5, 6]"]),
        (["train", "ppo", "--learning-rate.x", "5"], ["learning_rate.x", "learning_rate"]),
        (["train", "~nosuchuser/x.py"], ["~nosuchuser/x.py"]),
        (["train", f"{'x' * 300}.py"], ["not a file"]),
        (["report", "."], ["not a result directory"]),
        (["fork", "poo", "mine.py"], ["'poo'", "'ppo'"]),
        (["fork", "ppo", "mine.txt"], [".py", "mine.txt"]),
        (["fork", "./missing.py", "new.py"], ["./missing.py", "not a file"]),
        (["report", "x" * 300], ["x"]),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err
    assert all(word in printed.err for word in expected), printed.err
    assert list(pathlib.Path().iterdir()) == []  # nothing was begun


def test_sweep_then_again_then_changed(capsys: pytest.CaptureFixture[str]) -> None:
    spec = pathlib.Path("study.toml")
    spec.write_text(SPEC, encoding="utf-8")
    assert cli.main(["sweep", "study.toml", "--devices", "1"]) == 0
    first = capsys.readouterr().out
    assert "2 configurations x 2 seeds = 4 runs, " in first
    results = pathlib.Path("results/study")
    written = {path.name for path in (results / "report").iterdir()}
    assert written >= {"table.csv", "table.md", "curves.png"}

    arrays = snapshot(results / "arrays")
    assert cli.main(["sweep", "study.toml", "--devices", "1", "--log", "tensorboard"]) == 0
    again = capsys.readouterr().out
    assert "Already finished" in again
    assert "Compil" not in again
    assert f"Logs: tensorboard --logdir {results.resolve()}/tensorboard" in again
    assert len(list(results.glob("tensorboard/*/events.out.tfevents.*"))) == 4
    assert snapshot(results / "arrays") == arrays

    before = snapshot(results)
    spec.write_text(SPEC.replace("eval_episodes = 4", "eval_episodes = 5"), encoding="utf-8")
    assert cli.main(["sweep", "study.toml", "--devices", "1"]) == 2
    refused = capsys.readouterr().err
    assert "different sweep" in refused
    assert "eval_episodes" in refused
    assert refused.count("\n") == 1
    assert snapshot(results) == before

    assert cli.main(["report", str(results)]) == 0
    assert "table.csv" in capsys.readouterr().out


def test_a_directory_of_something_else_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("study.toml").write_text(SPEC, encoding="utf-8")
    other = pathlib.Path("photos")
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"cat")
    assert cli.main(["sweep", "study.toml", "--out", "photos", "--devices", "1"]) == 2
    assert "photos" in capsys.readouterr().err
    assert snapshot(other) == {"photos/cat.jpg": b"cat"}


def test_no_write_permission_is_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    pathlib.Path("study.toml").write_text(SPEC, encoding="utf-8")
    # Nobody may make a directory there, not even root, whom file modes do not stop.
    assert cli.main(["sweep", "study.toml", "--out", "/proc/results", "--devices", "1"]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "/proc/results" in printed


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "Interrupted;"), (signal.SIGTERM, 143, "Terminated;")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_ends_in_one_sentence_that_says_how_to_resume(
    number: int,
    status: int,
    word: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "run", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert cli.main(["train", "ppo", *FLAGS]) == status
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(word) and "the same command resumes" in printed.err
    assert signal.getsignal(number) == before


# A compiler that a signal cannot interrupt and that never ends. It waits outside of Python, as XLA
# does, and without Python's lock.
COMPILING = """
import ctypes, jax
from purejaxpg import cli

def compile(*_):
    print("XLA compiles.", flush=True)
    ctypes.CDLL(None).sleep(3600)

jax.stages.Lowered.compile = compile
raise SystemExit(cli.main(WORDS))
"""


def test_ctrl_c_ends_a_compilation_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A process of its own; what it leaves behind is resumed by the same command."""
    words = ["train", "ppo", *FLAGS]
    code = COMPILING.replace("WORDS", repr(words))
    root = str(pathlib.Path(purejaxpg.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    # A whole interpreter and no fork, because the test is about how it ends.
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "XLA compiles.\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert said == "Interrupted; finished units are kept, and the same command resumes.\n"
    assert cli.main(words) == 0
    assert list(pathlib.Path().glob("results/*/report/index.html"))


def test_a_terminated_sweep_resumes_from_its_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    """A process of its own, on real training, with no snapshot due for an hour."""
    flags = [word if word != "64" else "60000" for word in FLAGS if word != "--quiet"]
    words = ["train", "ppo", *flags, "--snapshot-every", "3600"]
    process = forked.Process("-m", "purejaxpg.cli", *words, folder=pathlib.Path.cwd())
    while process.poll() is None and not list(pathlib.Path().glob("results/*/progress.jsonl")):
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert said.startswith("Terminated;") and said.count("\n") == 1
    assert cli.main(words) == 0
    assert "Resuming from a snapshot after update" in capsys.readouterr().out


def test_fork_train_and_sweep_the_fork(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fork", "ppo", "mine.py"]) == 0
    assert pathlib.Path("mine.py").read_text().startswith('"""Proximal policy')
    assert cli.main(["fork", "ppo", "mine.py"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main(["fork", "ppo", "new/folder/mine.py"]) == 0
    assert pathlib.Path("new/folder/mine.py").is_file()
    spec = SPEC.replace('"ppo"', '"./mine.py"').replace("seeds = 2", "seeds = 1")
    pathlib.Path("mine.toml").write_text(spec, encoding="utf-8")
    assert cli.main(["sweep", "mine.toml", "--devices", "1", "--quiet"]) == 0
    assert pathlib.Path("results/mine/ledger.sqlite").exists()


def test_a_copy_of_an_agent_is_a_program() -> None:
    assert cli.main(["fork", "ppo", "mine.py"]) == 0
    result = forked.run("mine.py", *FLAGS, folder=pathlib.Path.cwd())
    assert result.returncode == 0, result.stderr
    assert "results/mine-CartPole-v1-seed0" in result.stdout.replace("\n", "")
    assert list(pathlib.Path().glob("results/*/ledger.sqlite"))


def test_train_prints_a_result_and_resumes_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "ppo", "--seed", "3", *FLAGS, "--log", "tensorboard"]) == 0
    (out,) = pathlib.Path("results").iterdir()
    assert out.name.startswith("ppo-CartPole-v1-seed3-")
    assert len(list(out.glob("tensorboard/*/events.out.tfevents.*"))) == 1
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["train", "ppo", "--seed", "3", *FLAGS]) == 0
    assert "Already finished" in capsys.readouterr().out
    assert cli.main(["train", "ppo", "--seed", "4", *FLAGS]) == 0
    assert len(list(pathlib.Path("results").iterdir())) == 2


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_the_package_of_a_log_is_missed_before_anything_is_computed(
    name: str,
    package: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["train", "ppo", *FLAGS, "--log", name]) == 1
    printed = capsys.readouterr()
    assert f"--log {name} needs more packages: pip install '{package.lower()}" in printed.err
    assert printed.out == "" and not list(pathlib.Path().iterdir())


def in_a_process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(pathlib.Path(purejaxpg.__file__).resolve().parent.parent)
    return subprocess.run(
        [sys.executable, "-m", "purejaxpg.cli", *words],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_missing_accelerator_is_status_1() -> None:
    result = in_a_process("train", "ppo", JAX_PLATFORMS="cuda")
    assert result.returncode == 1
    assert "JAX_PLATFORMS='cuda'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not pathlib.Path("results").exists()


def test_too_many_devices_are_refused_before_anything_is_written() -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    words = ("-m", "purejaxpg.cli", "train", "ppo", "--devices", "2")
    result = forked.run(*words, folder=pathlib.Path.cwd(), environment=environment)
    assert result.returncode == 2
    assert "--devices must be at most 1 here" in result.stderr
    assert not pathlib.Path("results").exists()


def test_module_runs_as_a_program() -> None:
    assert in_a_process("--version").stdout == f"purejaxpg {purejaxpg.__version__}\n"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "ddpg --env CartPole-v1",
            "env 'CartPole-v1' has discrete actions, but DDPG needs continuous ones, such as "
            "those of Pendulum-v1.",
        ),
        (
            "sac --preset none --replay-capacity 100",
            "replay_capacity must be batch_size (256) or more, but is 100.",
        ),
        (
            "sac --learning-starts 5000 --total-timesteps 4000",
            "learning_starts must be less than total_timesteps (4000), or the warm-up is longer "
            "than the training, but is 5000.",
        ),
        (
            "ppo --initial-log-std 1",
            "initial_log_std 1.0 is for the Gaussian policy of continuous actions; "
            "those of CartPole-v1 are discrete.",
        ),
        ("trpo --max-kl 0", "max_kl must be more than 0, but is 0.0."),
        ("npg --max-kl=-1", "max_kl must be more than 0, but is -1.0."),
        (
            "reinforce --max-steps 100",
            "max_steps must leave room for an episode, 500 steps in CartPole-v1, but is 100; "
            "a lower env_params.max_steps_in_episode makes episodes shorter.",
        ),
        (
            "a2c --learning-rate-schedule cosine",
            "learning_rate_schedule must be one of 'constant', 'linear', 'robbins_monro', "
            "but is 'cosine'.",
        ),
    ],
)
def test_settings_that_make_no_sense_are_one_sentence(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.replace("\n", " ").strip() == sentence
    assert captured.out == ""
    assert not list(pathlib.Path().iterdir())


# ------------------------------------------------------------------------------ compiled programs


@pytest.fixture
def programs(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where programs are kept for a user who has set nothing."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that the end of the test restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "purejaxpg" / "programs"


@pytest.mark.fast
def test_programs_are_kept_and_the_oldest_go(
    programs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.cache_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(programs)
    for age, name in enumerate(("newest", "middle", "oldest")):
        (programs / name).write_bytes(bytes(100))
        os.utime(programs / name, (1e9 - age, 1e9 - age))
    (programs / "folder").mkdir()  # XLA's own, where it tunes
    monkeypatch.setattr(session, "PROGRAMS_BYTES", 250)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    session.cache_programs()
    assert sorted(path.name for path in programs.iterdir()) == ["folder", "middle", "newest"]
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(programs)


@pytest.mark.fast
def test_a_place_for_programs_of_ones_own_is_respected(
    programs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "my-own")
    session.cache_programs()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "my-own" and not programs.exists()


@pytest.mark.fast
def test_without_a_place_for_programs_all_works(programs: pathlib.Path) -> None:
    programs.parent.parent.write_text("a file where a directory should be")
    session.cache_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_second_start_finds_the_programs_of_the_first(programs: pathlib.Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "PERSISTENT" not in name}
    outcomes = []
    for out in ("one", "two"):
        words = ["train", "ppo", "--out", out, *FLAGS]
        command = [sys.executable, "-m", "purejaxpg.cli", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "AOT" not in done.stderr  # XLA says so where it refuses to load a program
        outcomes.append({path.name for path in programs.iterdir() if "-atime" not in path.name})
    assert len(outcomes[0]) >= 3  # start, segment, score
    assert outcomes[0] == outcomes[1]
