"""Modules of users: environments called "MODULE:CLASS", and `--import`."""

import json
import pathlib
import textwrap
from typing import Any

import forked
import pytest

from purejaxpg import InputError, cli, envs, modules, trainers
from purejaxpg.report import playback
from purejaxpg.sweep import spec as specs

MAZES = """
import jax, jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces
from purejaxpg import envs
import pay_of_mazes
@struct.dataclass
class S:
    time: jax.Array
@struct.dataclass
class P(environment.EnvParams):
    max_steps_in_episode: int = 10
class Const(environment.Environment):
    def __init__(self, pay: float = pay_of_mazes.PAY):
        self.pay = pay
    @property
    def default_params(self):
        return P()
    def step_env(self, key, state, action, params):
        return jnp.zeros(2), S(state.time + 1), jnp.float32(self.pay), jnp.bool_(False), {}
    def reset_env(self, key, params):
        return jnp.zeros(2), S(jnp.int32(0))
    def action_space(self, params=None):
        return spaces.Discrete(2)
    def observation_space(self, params):
        return spaces.Box(-1, 1, (2,))
NUMBER = 3
envs.register("Seven", lambda: Const(7.0))
"""
TINY = {"total_timesteps": 64, "num_envs": 2, "num_steps": 16, "hidden": [4]}
FLAGS = ["--total-timesteps", "64", "--num-envs", "2", "--num-steps", "16", "--hidden", "4"]


@pytest.fixture(autouse=True)
def alone(own_modules: None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Start in an empty folder, with no module named."""
    monkeypatch.chdir(tmp_path)


def study(folder: pathlib.Path, pay: float = 1.0, **config: Any) -> pathlib.Path:
    """Write a sweep file of one run and, beside it, a module and a module that this one imports."""
    folder.mkdir(exist_ok=True)
    (folder / "mazes.py").write_text(textwrap.dedent(MAZES), "utf-8")
    (folder / "pay_of_mazes.py").write_text(f"PAY = {pay}\n", "utf-8")
    fields = "\n".join(f"{name} = {json.dumps(value)}" for name, value in (TINY | config).items())
    (folder / "s.toml").write_text(f'agent = "ppo"\neval_episodes = 2\n[config]\n{fields}\n')
    return folder / "s.toml"


def spec_of(raw: dict[str, Any], folder: pathlib.Path) -> specs.Spec:
    return specs.from_dict({"agent": "ppo", **raw}, "x", folder)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["mazes:Const", "./mazes.py:Const"])
def test_a_class_beside_the_sweep_file_is_an_environment(name: str, tmp_path: pathlib.Path) -> None:
    folder = study(tmp_path / "study").parent
    spec = spec_of({"config": {**TINY, "env": name, "env_kwargs": {"pay": 2.5}}}, folder)
    (env,) = spec.environments()
    assert env.name == name and env.inner.pay == 2.5 and env.max_steps == 10
    names = [file.name for file in trainers.of_environments([env])]
    assert names == ["mazes.py", "pay_of_mazes.py"]


@pytest.mark.fast
def test_the_folder_of_the_sweep_file_comes_before_the_current_one(tmp_path: pathlib.Path) -> None:
    study(tmp_path, pay=1.0)
    folder = study(tmp_path / "study", pay=4.0).parent
    (env,) = spec_of({"config": {**TINY, "env": "mazes:Const"}}, folder).environments()
    assert env.inner.pay == 4.0
    with pytest.raises(InputError, match=r"'mazes'.*already loaded under that name"):
        spec_of({"config": TINY}, tmp_path)


@pytest.mark.fast
def test_a_module_in_a_package_is_found_with_all_of_its_files(tmp_path: pathlib.Path) -> None:
    inner = tmp_path / "lab_of_mazes" / "grids"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("")
    (inner.parent / "pay.py").write_text("PAY = 1.0\n")
    source = MAZES.replace("import pay_of_mazes\n", "from .. import pay as pay_of_mazes\n")
    (inner / "mazes.py").write_text(source)
    env = envs.make("lab_of_mazes.grids.mazes:Const")
    files = [f.relative_to(tmp_path).as_posix() for f in trainers.of_environments([env])]
    assert {"lab_of_mazes/grids/mazes.py", "lab_of_mazes/pay.py"} <= set(files)
    ((name, module_name, sent),) = trainers.sent_modules([env])
    assert name == module_name == "lab_of_mazes.grids.mazes"
    assert sorted(path for path, _ in sent) == sorted(files)


@pytest.mark.fast
def test_of_an_installed_module_only_its_own_files_count() -> None:
    module = modules.load("gymnax.environments.classic_control.cartpole")
    assert trainers.is_installed(module)
    files = trainers.of_module(module)
    assert files and all("gymnax" in file.parts for file in files)
    env = envs.make("gymnax.environments.classic_control.cartpole:CartPole")
    ((_, _, sent),) = trainers.sent_modules([env])
    assert sent == ()


@pytest.mark.fast
def test_an_imported_module_counts_for_every_sweep(tmp_path: pathlib.Path) -> None:
    folder = study(tmp_path / "study").parent
    before = spec_of({"config": TINY}, folder).identity
    modules.import_all(["mazes"], folder)
    after = spec_of({"config": {**TINY, "env": "Seven"}}, folder).identity
    assert "env_source" not in before and len(after["env_source"]) == 16


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:Const", ["no module 'nowhere'", "beside the sweep file"]),
        ("./nowhere.py:Const", ["'./nowhere.py' is not a Python file"]),
        ("mazes:Conts", ["no member of module 'mazes' named 'Conts'", "did you mean 'Const'"]),
        ("mazes:NUMBER", ["'mazes:NUMBER' must be a class, but is 3"]),
        ("mazes:S", ["'mazes:S' cannot be made", "TypeError"]),
        ("broken:Const", ["'broken' cannot be imported: ZeroDivisionError"]),
        ("lacking:Const", ["'lacking' cannot be imported", "absent_module"]),
        ("Const", ["no environment 'Const'"]),
        ("mazes:", ["no environment 'mazes:'"]),
    ],
)
def test_what_cannot_be_imported_is_one_sentence_or_shows_its_lines(
    name: str, words: list[str], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "lacking.py").write_text("import absent_module\n")
    assert cli.main(["train", "ppo", "--env", name, *FLAGS]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words)
    if told.count("\n") > 1:  # the module's own lines come first
        assert told.startswith(f"{name.partition(':')[0]}.py, line 1, in <module>\n    ")
        assert told.count("\n") == 4


def in_folder(folder: pathlib.Path, *words: str) -> str:
    done = forked.run("-m", "purejaxpg.cli", *words, folder=folder)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_one_module_serves_training_evaluation_and_benchmark(tmp_path: pathlib.Path) -> None:
    """Each command in a process of its own; only those that name the module import it."""
    study(tmp_path / "study", env="Seven")
    spec, module = "study/s.toml", ["--import", "./study/mazes.py"]
    assert "1 runs" in in_folder(tmp_path, "plan", spec, "--quick", "--import", "mazes")
    assert " 70.00 " in in_folder(tmp_path, "sweep", spec, "--import", "mazes", "--quiet")
    assert "70.00" in in_folder(tmp_path, "eval", "results/s", "--episodes", "2", *module)
    assert "70.00" in in_folder(tmp_path, "report", "results/s")  # imports nothing
    stored = ["eval", "results/s", "--episodes", "2", "--agent", "stored"]
    assert "70.00" in in_folder(tmp_path, *stored)  # imports the copy of the module
    quick = ["bench", "--quick", "--num-agents", "1", "--out", "b", "--quiet"]
    assert "ppo Seven x 1" in in_folder(tmp_path, *quick, "--env", "Seven", *module)
    version = "version of the packages or the source"
    measured = json.loads((tmp_path / "b" / "bench.json").read_text())["identity"]
    assert len(measured[version]["modules"]) == 16
    assert "Seven" in in_folder(tmp_path, "list", "envs", *module)
    done = forked.run("-m", "purejaxpg.cli", "sweep", spec, folder=tmp_path)
    assert done.returncode == 2 and "no environment 'Seven'" in done.stderr


def test_a_result_directory_alone_imports_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study(tmp_path, env="./mazes.py:Const")
    assert cli.main(["train", "ppo", "--env", "./mazes.py:Const", *FLAGS, "--quiet"]) == 0
    (out,) = (tmp_path / "results").iterdir()
    assert out.name.startswith("ppo-mazes.py:Const-seed0-")
    del modules._named["./mazes.py"]
    play = ["eval", str(out), "--episodes", "2"]
    assert cli.main(play) == 2
    assert "--import ./mazes.py" in capsys.readouterr().err
    assert cli.main([*play, "--import", "mazes"]) == 0
    assert "Note" not in capsys.readouterr().out
    (tmp_path / "pay_of_mazes.py").write_text("PAY = 2.0\n")
    assert cli.main([*play, "--import", "mazes"]) == 0
    assert "the environment has changed" in capsys.readouterr().out


@pytest.mark.fast
def test_a_name_of_a_loaded_module_is_not_enough() -> None:
    """`os` is loaded in every process, and a result directory could name its functions."""
    assert playback.envs.is_own("os:system")
    with pytest.raises(InputError, match="--import os"):
        modules.require_named("os:system")


@pytest.mark.fast
def test_another_process_imports_what_it_is_sent(tmp_path: pathlib.Path) -> None:
    folder = study(tmp_path / "study", pay=5.0).parent
    spec = spec_of({"config": {**TINY, "env": "./mazes.py:Const"}}, folder)
    sent = trainers.sent_modules(spec.environments())
    assert [path for path, _ in sent[0][2]] == ["mazes.py", "pay_of_mazes.py"]
    code = (
        "import json, pathlib, sys\nfrom purejaxpg import envs, modules\n"
        "modules.receive(json.loads(sys.argv[1]), pathlib.Path('sent').resolve())\n"
        "print(envs.make('./mazes.py:Const').inner.pay)"
    )
    done = forked.run("-c", code, json.dumps(sent), folder=tmp_path)
    assert done.stdout == "5.0\n", done.stderr
