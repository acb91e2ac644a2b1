"""Sweep files: what they mean, and the one sentence for each thing that can be wrong with them."""

import pathlib

import pytest

from purejaxpg import InputError, trainers
from purejaxpg.sweep import spec as specs

pytestmark = pytest.mark.fast

GOOD = """
agent = "ppo"
seeds = 3
[config]
env = "CartPole-v1"
num_envs = 2
num_steps = 8
total_timesteps = 1e3
[sweep]
learning_rate = [3e-4, 1e-3]
env_params.gravity = [9.8, 20.0]
"""


def load(tmp_path: pathlib.Path, text: str) -> specs.Spec:
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    return specs.load(path)


def test_runs_are_the_product_of_axes_and_seeds(tmp_path: pathlib.Path) -> None:
    spec = load(tmp_path, GOOD)
    assert spec.name == "study"
    assert (spec.num_configs, len(spec.conditions)) == (2, 2)
    assert len(spec.runs) == 12
    assert len({run.run_id for run in spec.runs}) == 12
    first, last = spec.runs[0], spec.runs[-1]
    assert first.swept == {"learning_rate": 3e-4, "env_params.gravity": 9.8}
    assert (first.seed, last.seed) == (0, 2)
    assert last.config.learning_rate == 1e-3
    assert last.config.env_params == {"gravity": 20.0}
    assert last.config.total_timesteps == 1000


def test_run_ids_depend_on_content_only(tmp_path: pathlib.Path) -> None:
    ids = {run.run_id for run in load(tmp_path, GOOD).runs}
    wider = GOOD.replace("[3e-4, 1e-3]", "[1e-2, 1e-3, 3e-4]").replace("seeds = 3", "seeds = 4")
    assert ids < {run.run_id for run in load(tmp_path, wider).runs}


def test_agent_by_path_is_seen_from_the_sweep_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine.py").write_text(trainers.path_of("ppo").read_text(encoding="utf-8"))
    spec = load(tmp_path, GOOD.replace('"ppo"', '"./mine.py"'))
    assert spec.agent.__file__ == str(tmp_path / "mine.py")
    assert spec.identity["agent_source"] == load(tmp_path, GOOD).identity["agent_source"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"ppo"', '"poo"', ["agent", "'poo'", "'ppo'"]),
        ('"ppo"', "3", ["agent", "3"]),
        ('"ppo"', '"./none.py"', ["./none.py", "not a file"]),
        ("CartPole-v1", "CartPole-v2", ["environment", "CartPole-v2", "CartPole-v1"]),
        ("num_envs = 2", "num_evs = 2", ["num_evs", "num_envs"]),
        ("num_envs = 2", 'num_envs = "2"', ["num_envs", "whole number", "'2'"]),
        ("num_envs = 2", "num_envs = 2.5", ["num_envs", "whole number", "2.5"]),
        ("num_envs = 2", "num_envs = true", ["num_envs", "whole number", "True"]),
        ("num_envs = 2", "num_envs = 3\nnum_minibatches = 5", ["num_minibatches", "5", "24"]),
        ("num_envs = 2", "num_envs = 2\nnum_envs = 3", ["TOML", "overwrite", "line 7"]),
        ("num_envs = 2", "num_envs = 2\ninitial_log_std = 1", ["initial_log_std", "continuous"]),
        ("seeds = 3", "seeds = 0", ["seeds", "0"]),
        ("seeds = 3", "seeds = [1, 1]", ["seeds", "[1, 1]"]),
        ("seeds = 3", "sedes = 3", ["sedes", "seeds"]),
        ("seeds = 3", "seeds = 3\nrows_per_device = 0", ["rows_per_device", "0"]),
        ("[3e-4, 1e-3]", "3e-4", ["learning_rate", "list", "0.0003"]),
        ("[3e-4, 1e-3]", "[]", ["learning_rate", "list", "[]"]),
        ("[3e-4, 1e-3]", "[1e-3, 1e-3]", ["learning_rate", "twice"]),
        ("[3e-4, 1e-3]", "[1, 1.0]", ["learning_rate", "twice"]),
        ("[3e-4, 1e-3]", "[1979-05-27]", ["learning_rate", "number", "1979"]),
        ("env_params.gravity = [9.8, 20.0]", "env_params = [{gravity=5.0}]", ["env_params.NAME"]),
        ("num_envs = 2", "num_envs = 8\nnum_minibatches = 64", ["num_minibatches", "64"]),
        ("num_envs = 2", "num_envs = 2\nmax_grad_norm = 0", ["max_grad_norm", "0.0"]),
        ("[9.8, 20.0]", "[9.8, 1e39]", ["gravity", "1e+39"]),
        ("[9.8, 20.0]", "[20, 20.0]", ["lists", "20"]),
        ("[9.8, 20.0]", "[16777216, 16777217]", ["gravity", "16777217", "float32"]),
        ("[3e-4, 1e-3]", "[1e-3, 1.00000000001e-3]", ["learning_rate", "equal as float32"]),
        ("[3e-4, 1e-3]", "[1, 1.0]", ["learning_rate", "1.0"]),
        ("seeds = 3", "seeds = 1000000000000", ["seeds", "1000000000000"]),
        ("[3e-4, 1e-3]", "[1e-3, nan]", ["learning_rate", "nan"]),
        ("[3e-4, 1e-3]", '["fast"]', ["learning_rate", "number", "'fast'"]),
        ("learning_rate =", "num_envs =", ["num_envs", "[config]", "[sweep]"]),
        ("learning_rate =", "lerning_rate =", ["lerning_rate", "learning_rate"]),
        ("env_params.gravity", "env_params.gravty", ["gravty", "gravity"]),
        ("env_params.gravity", "env_params.total_mass", ["total_mass", "follows"]),
        ("[9.8, 20.0]", "[9.8, inf]", ["gravity", "inf"]),
        ("[config]", "[confg]", ["confg", "config"]),
        ("[sweep]", "[sweep", ["TOML"]),
    ],
)
def test_bad_sweep_files_get_one_sentence(
    tmp_path: pathlib.Path, old: str, new: str, words: list[str]
) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.count("\n") == 0


def test_missing_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.toml"):
        specs.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("raise OSError('no')", "no"),
        ("x = (", "SyntaxError"),
        ("x = 1", "Config"),
        ("Config = check = init = update = train = policy = print", "Config"),
    ],
)
def test_broken_agent_files_are_named(tmp_path: pathlib.Path, text: str, word: str) -> None:
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load(tmp_path, GOOD.replace('"ppo"', '"./mine.py"'))
    assert "./mine.py" in str(caught.value)
    assert word in str(caught.value)
