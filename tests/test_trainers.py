"""Which files a result belongs to, and how often an agent's file runs."""

import json
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import forked
import gymnax
import pytest
import tiny_sweep
from gymnax.wrappers import purerl

import purejaxpg.agents
from purejaxpg import InputError, cli, envs, trainers
from purejaxpg.sweep import spec as specs

PPO = pathlib.Path(purejaxpg.agents.__path__[0]) / "ppo.py"
ENV = """
import jax, jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces
{head}
@struct.dataclass
class S:
    time: jax.Array
@struct.dataclass
class P(environment.EnvParams):
    max_steps_in_episode: int = 10
class Const(environment.Environment):
    @property
    def default_params(self):
        return P()
    def step_env(self, key, state, action, params):
        return jnp.zeros(2), S(state.time + 1), jnp.float32({reward}), jnp.bool_(False), {{}}
    def reset_env(self, key, params):
        return jnp.zeros(2), S(jnp.int32(0))
    def action_space(self, params=None):
        return spaces.Discrete(2)
    def observation_space(self, params):
        return spaces.Box(-1, 1, (2,))
"""
FLAGS = [
    *("--total-timesteps", "64", "--num-envs", "2", "--num-steps", "16"),
    *("--hidden", "4", "--quiet"),
]


def write(path: pathlib.Path, text: str = "") -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), "utf-8")
    return path


def fork(folder: pathlib.Path, head: str, name: str = "mine.py") -> pathlib.Path:
    """A copy of PPO that runs some lines first."""
    source = PPO.read_text("utf-8")
    return write(
        folder / name, source.replace("import dataclasses\n", f"{head}\nimport dataclasses\n", 1)
    )


def purejaxpg_in(folder: pathlib.Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run the console script, which does not have the current directory on its path."""
    script = pathlib.Path(sys.executable).parent / "purejaxpg"
    return forked.run(str(script), *words, folder=folder)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.fast
def test_local_files_are_all_that_is_imported_from_beside(tmp_path: pathlib.Path) -> None:
    mine = write(
        tmp_path / "mine.py",
        """
        import os, jax, beside as other
        from package import part
        import package.deep.deeper
        def later():
            from lazily import thing
        """,
    )
    write(tmp_path / "beside.py", "import second")
    write(tmp_path / "second.py", "import mine, beside")  # a circle
    write(tmp_path / "lazily.py")
    write(tmp_path / "unused.py")
    write(tmp_path / "package" / "__init__.py", "from . import sibling")
    write(tmp_path / "package" / "part.py", "from .sibling import x\nfrom .. import nothing")
    write(tmp_path / "package" / "sibling.py")
    write(tmp_path / "package" / "unused.py")
    write(tmp_path / "package" / "deep" / "__init__.py")
    write(tmp_path / "package" / "deep" / "deeper.py", "from ..relative import y")
    write(tmp_path / "package" / "relative.py")
    found = {path.relative_to(tmp_path).as_posix() for path in trainers.local_files(mine)}
    assert found == {
        "mine.py", "beside.py", "second.py", "lazily.py", "package/__init__.py", "package/part.py",
        "package/sibling.py", "package/deep/__init__.py", "package/deep/deeper.py",
        "package/relative.py",
    }  # fmt: skip
    assert set(trainers.sources(mine)) == found


@pytest.mark.fast
def test_sources_are_also_those_of_the_user_elsewhere_on_the_import_path(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    mine = write(
        tmp_path / "lab_of_mine" / "agents" / "mine.py",
        """
        import os, jax, optax, pytest, purejaxpg.envs, nowhere
        import near, importlib
        from lab_of_mine import far
        from namespace_of_mine import part
        importlib.import_module("computed_of_mine")
        """,
    )
    write(mine.parent / "near.py", "import far_of_mine")
    write(tmp_path / "far_of_mine.py")
    write(tmp_path / "computed_of_mine.py")
    write(tmp_path / "lab_of_mine" / "__init__.py")
    write(tmp_path / "lab_of_mine" / "far.py", "from . import relative\nimport near")
    write(tmp_path / "lab_of_mine" / "relative.py")
    write(tmp_path / "namespace_of_mine" / "part.py")
    other = write(tmp_path / "envs_of_mine" / "maze.py", "import far_of_mine")
    found = trainers.sources(mine, [other])
    assert set(found) == {
        "mine.py", "near.py", "far_of_mine.py", "lab_of_mine/__init__.py", "lab_of_mine/far.py",
        "lab_of_mine/relative.py", "namespace_of_mine/part.py", "envs_of_mine/maze.py",
    }  # fmt: skip
    assert all(tmp_path / name == path for name, path in found.items() if "/" in name)
    assert set(trainers.sources(PPO)) == {"ppo.py"}
    # A module outside of the folder is no part of the hash that names runs of earlier versions.
    assert trainers.local_files(mine) == [mine, mine.parent / "near.py"]


@pytest.mark.fast
def test_a_digest_depends_on_every_byte_and_name(tmp_path: pathlib.Path) -> None:
    one, two = write(tmp_path / "one.py", "a"), write(tmp_path / "two.py", "b")
    before = trainers.digest([one, two])
    assert trainers.digest([one]) != before
    two.write_text("c")
    assert trainers.digest([one, two]) != before
    two.write_text("b")
    assert trainers.digest([one, two]) == before
    assert trainers.digest([one, write(tmp_path / "three.py", "b")]) != before


@pytest.mark.fast
def test_an_environment_is_defined_by_its_classes_wherever_they_are() -> None:
    own = pathlib.Path(__file__).resolve()

    class Mine(gymnax.make("CartPole-v1")[0].__class__):  # type: ignore[misc]
        pass

    class Wrapped(purerl.LogWrapper):
        pass

    assert trainers.of_environment(gymnax.make("CartPole-v1")[0]) == []
    assert trainers.of_environment(purerl.LogWrapper(gymnax.make("CartPole-v1")[0])) == []
    for inner in (Mine(), purerl.LogWrapper(Mine()), Wrapped(gymnax.make("CartPole-v1")[0])):
        assert own in trainers.of_environment(inner)


# --- identity -----------------------------------------------------------------------------------


def identity(folder: pathlib.Path, **config: Any) -> str:
    """Return identity and run ids of a sweep of mine.py, found in a process of its own."""
    raw = {**tiny_sweep.TINY, "agent": "./mine.py", "sweep": {}, "config": {
        **tiny_sweep.TINY["config"], **config}}  # fmt: skip
    code = (
        "import sys, json; from pathlib import Path\nsys.dont_write_bytecode = True\n"
        "from purejaxpg.sweep import spec\nraw = json.loads(sys.argv[1])\n"
        "made = spec.from_dict(raw, 'x', Path('.'))\n"
        "print(json.dumps([made.identity, [r.run_id for r in made.runs]]))"
    )
    done = forked.run("-c", code, json.dumps(raw), folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_changed_helper_or_environment_is_another_sweep(tmp_path: pathlib.Path) -> None:
    """Results of a reward of 1 differ from those of 7, in whichever file the reward is."""
    head = 'import myenv\nfrom purejaxpg import envs as _e\n_e.register("Const", myenv.Const)'
    fork(tmp_path, head)
    helper = write(tmp_path / "numbers_of_mine.py", "REWARD = 1.0")
    mine = write(
        tmp_path / "myenv.py",
        ENV.format(head="import numbers_of_mine", reward="numbers_of_mine.REWARD"),
    )
    first = identity(tmp_path, env="Const")
    assert "env_source" in first
    assert identity(tmp_path, env="Const") == first
    helper.write_text("REWARD = 7.0")
    second = identity(tmp_path, env="Const")
    mine.write_text(mine.read_text().replace("jnp.zeros(2)", "jnp.ones(2)"))
    third = identity(tmp_path, env="Const")
    assert len({first, second, third}) == 3
    assert "env_source" not in specs.from_dict(tiny_sweep.TINY, "x").identity


def test_an_environment_registered_with_gymnax_is_never_found_by_its_name(
    tmp_path: pathlib.Path,
) -> None:
    """A plugin's reward, edited from 1 to 7, between two runs that share a cache of programs."""
    write(
        tmp_path / "run.py",
        """
        import sys, gymnax, myenv
        gymnax.register("Const-v0", myenv.Const)
        from purejaxpg import cli
        sys.exit(cli.main(sys.argv[1:]))
        """,
    )
    scores = []
    for reward in (1, 7):
        write(tmp_path / "myenv.py", ENV.format(head="", reward=reward))
        command = ["run.py", "train", "ppo", "--env", "Const-v0", *FLAGS, "--out", f"r{reward}"]
        done = forked.run(*command, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = (tmp_path / f"r{reward}" / "report" / "runs.csv").read_text().splitlines()
        scores.append(
            float(dict(zip(rows[0].split(","), rows[1].split(","), strict=True))["score"])
        )
    assert scores == [10.0, 70.0]
    again = [*command[:-1], "r1"]  # the results of the old reward are not those of this one
    done = forked.run(*again, folder=tmp_path)
    assert done.returncode == 2 and "changed (myenv.py) since r1" in done.stderr


# --- execution ----------------------------------------------------------------------------------

REGISTERS = (
    "import gymnax as _g\n"
    "from gymnax.environments.classic_control import cartpole as _c\n"
    '_g.register("MyCart-v0", _c.CartPole)\n'
    "import helper_of_mine\n"
    'open("runs", "a").write("x")'
)


def test_an_agent_file_runs_once_and_imports_its_neighbours(tmp_path: pathlib.Path) -> None:
    fork(tmp_path, REGISTERS)
    write(tmp_path / "helper_of_mine.py", "def later():\n    import mine\n    return mine.Config")
    spec = "agent = './mine.py'\n[config]\nenv = 'MyCart-v0'\ntotal_timesteps = 64\nnum_envs = 2\n"
    write(tmp_path / "s.toml", spec + "num_steps = 16\nhidden = [4]\n")
    runs = tmp_path / "runs"
    python = ("mine.py", "--env", "MyCart-v0", *FLAGS, "--out", "o2")
    for command in (
        lambda: purejaxpg_in(
            tmp_path, "train", "mine.py", "--env", "MyCart-v0", *FLAGS, "--out", "o1"
        ),
        lambda: forked.run(*python, folder=tmp_path),
        lambda: purejaxpg_in(tmp_path, "sweep", "s.toml", "--devices", "1", "--out", "o3"),
        lambda: purejaxpg_in(tmp_path, "eval", "o3", "--agent", "mine.py", "--episodes", "2"),
    ):
        runs.unlink(missing_ok=True)
        done = command()
        assert done.returncode == 0, done.stderr
        assert runs.read_text() == "x"


@pytest.mark.fast
def test_help_names_the_file_and_not_a_module_of_ours(tmp_path: pathlib.Path) -> None:
    fork(tmp_path, "")
    for words, named in (
        (["mine.py"], "usage: python mine.py ["),
        (["-m", "purejaxpg.cli", "train", "mine.py"], "usage: purejaxpg train mine.py ["),
    ):
        done = forked.run(*words, "--help", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(named)


@pytest.mark.fast
def test_a_changed_file_is_executed_again_in_the_same_process(tmp_path: pathlib.Path) -> None:
    path = fork(tmp_path, "MARK = 1")
    first = trainers.load("./mine.py", tmp_path)
    assert trainers.load("./mine.py", tmp_path) is first
    fork(tmp_path, "MARK = 2")
    second = trainers.load("./mine.py", tmp_path)
    assert (first.MARK, second.MARK) == (1, 2)
    path.write_text("MARK = (")
    with pytest.raises(InputError, match="cannot be imported: SyntaxError"):
        trainers.load("./mine.py", tmp_path)


@pytest.mark.fast
def test_a_module_of_another_place_does_not_stand_in_for_one_beside(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("a", "b"):
        fork(tmp_path / name, "import twin_of_mine")
        write(tmp_path / name / "twin_of_mine.py", f"NAME = {name!r}")
    assert trainers.load("./mine.py", tmp_path / "a").twin_of_mine.NAME == "a"
    with pytest.raises(InputError, match=r"'twin_of_mine'.*already loaded"):
        trainers.load("./mine.py", tmp_path / "b")
    del sys.modules["twin_of_mine"]


@pytest.mark.fast
def test_registering_needs_no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "_registered", {})
    envs.register("a", lambda: gymnax.make("CartPole-v1"))
    assert trainers.of_environment(envs.make("a").inner) == []
    envs.make.cache_clear()


def test_a_fork_with_the_distributions_of_an_earlier_version_is_told_the_new_names(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = trainers.path_of("a2c").read_text("utf-8")
    old = text.replace("distributions.categorical(", "distributions.Categorical(")
    assert old != text
    (tmp_path / "old.py").write_text(old, "utf-8")
    assert cli.main(["train", str(tmp_path / "old.py"), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "write distributions.categorical(logits)" in told and told.endswith("(policy, x).\n")


@pytest.mark.parametrize(
    "text",
    [
        "from tensorflow_probability.substrates.jax import distributions\n",
        "from purejaxpg.kernels import distributions\n# distributions.Categorical is no more\n",
    ],
    ids=["of another package", "in a comment"],
)
def test_other_distributions_and_comments_are_no_old_names(
    tmp_path: pathlib.Path, text: str
) -> None:
    use = "\n\ndef other():\n    return distributions.Normal\n" if "tensorflow" in text else ""
    original = trainers.path_of("ppo").read_text("utf-8")
    imported = "from purejaxpg.kernels import distributions, losses, returns\n"
    assert imported in original
    new = text + "from purejaxpg.kernels import losses, returns\n"
    path = tmp_path / "mine.py"
    path.write_text(original.replace(imported, new).replace("if __name__", use + "\nif __name__"))
    assert trainers.load(str(path)).Config is not None
