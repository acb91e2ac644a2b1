"""What `purejaxpg train` runs: presets, and single runs of a sweep file."""

import pathlib
import tomllib
from typing import Any

import numpy as np
import pytest
from tiny_sweep import TINY, run

from purejaxpg import InputError, cli, trainers
from purejaxpg.sweep import session, single
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
PRESETS = tomllib.loads(single.PRESETS.read_text(encoding="utf-8"))
PAIRS = [(agent, env) for agent, presets in PRESETS.items() for env in presets]
STUDY = """
agent = "ppo"
seeds = 4
eval_episodes = 4
rows_per_device = 2
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
gamma = [0.9, 0.99]
"""


def read(name: str, asked: single.Asked | None = None, **fields: Any) -> tuple[specs.Spec, str]:
    return single.read(str(name), lambda _: fields, asked or single.Asked())


@pytest.fixture
def study(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "study.toml"
    path.write_text(STUDY, encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------- presets


@pytest.mark.fast
def test_the_presets_are_the_configurations_of_the_experiments() -> None:
    """Of those that show what an agent can do; others show what it cannot, without a memory."""
    studies: dict[str, dict[str, Any]] = {}
    for path in sorted(EXPERIMENTS.glob("*.toml")):
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        if raw["agent"] in trainers.names() and "sweep" not in raw:
            env = raw["config"].pop("env")
            studies.setdefault(raw["agent"], {}).setdefault(env, raw["config"])
    of_presets = {a: {env: studies[a][env] for env in PRESETS[a]} for a in PRESETS}
    assert of_presets == PRESETS
    assert len(PAIRS) >= 22


@pytest.mark.fast
@pytest.mark.parametrize(("agent", "env"), PAIRS)
def test_every_preset_is_a_valid_configuration(agent: str, env: str) -> None:
    spec, note = read(agent, env=env)
    (only,) = spec.runs
    assert only.config.env == env
    for name, value in PRESETS[agent][env].items():
        found = getattr(only.config, name)
        assert (list(found) if isinstance(value, list) else found) == value
        assert f" {name} " in note
    assert note.startswith(f"Preset for {agent} on {env}: ") and "--preset none" in note


@pytest.mark.fast
def test_options_win_over_the_preset_and_none_leaves_the_defaults() -> None:
    default = trainers.load("ppo").Config(env="Pendulum-v1")
    preset = PRESETS["ppo"]["Pendulum-v1"]
    spec, note = read("ppo", env="Pendulum-v1", gamma=0.8, num_envs=32)
    config = spec.runs[0].config
    assert (config.gamma, config.num_envs, config.num_steps) == (0.8, 32, preset["num_steps"])
    assert "gamma 0" not in note and "num_envs" not in note
    assert f"num_steps {preset['num_steps']}" in note
    spec, note = read("ppo", single.Asked(preset="none"), env="Pendulum-v1")
    assert spec.runs[0].config == default and note == ""
    spec, note = read("ppo", env="Catch-bsuite")
    assert spec.runs[0].config == trainers.load("ppo").Config(env="Catch-bsuite") and note == ""


@pytest.mark.fast
def test_a_file_of_ones_own_has_no_preset(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "ppo.py"
    path.write_text(trainers.path_of("ppo").read_text(encoding="utf-8"), encoding="utf-8")
    spec, note = read(str(path), env="Pendulum-v1")
    assert spec.runs[0].config.gamma == 0.99 and note == ""


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "asked", "fields", "words"),
    [
        ("ppo", {"preset": "tuned"}, {"env": "Catch-bsuite"}, "there are presets for Acrobot-v1"),
        ("rlhf.sft", {"preset": "tuned"}, {}, r"no preset for rlhf.sft\.$"),
        ("ppo", {"run": "abc"}, {}, "--run is for sweep files, but 'ppo' is an agent"),
        (
            "ppo",
            {},
            {"num_minibatches": 3},
            "3 does not divide 256; the preset sets num_envs 8 and num_steps 32, --preset none",
        ),
        ("ppo", {}, {"num_epochs": 0}, r"num_epochs must be 1 or more, but is 0\.$"),
    ],
)
def test_wrong_options_are_one_sentence(
    name: str, asked: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read(name, single.Asked(**asked), **fields)


@pytest.mark.fast
def test_train_says_which_preset_it_uses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(session, "run", lambda spec, options, devices: ran.append((spec, options)))
    words = ["train", "ppo", "--env", "Pendulum-v1", "--clip-reward", "5"]
    assert cli.main([*words, "--seed", "3", "4"]) == 0
    assert capsys.readouterr().out.startswith("Preset for ppo on Pendulum-v1: total_timesteps 100")
    ((spec, options),) = ran
    assert [run.seed for run in spec.runs] == [3, 4] and spec.rows_per_device is None
    assert spec.runs[0].config.clip_reward == 5.0
    assert str(options.out).startswith("results/ppo-Pendulum-v1-seed3-4-")
    assert cli.main([*words, "--quiet"]) == 0
    assert capsys.readouterr().out == "" and ran[1][0].rows_per_device == 1


# ------------------------------------------------------------------------------------ sweep files


@pytest.mark.fast
def test_a_configuration_of_a_file_is_chosen_by_fields_or_by_id(study: str) -> None:
    whole = specs.load(pathlib.Path(study))
    wanted = [run for run in whole.runs if run.swept == {"learning_rate": 1e-2, "gamma": 0.9}]
    asked = single.Asked(seeds=[3, 1])
    spec, note = read(study, asked, learning_rate=1e-2, gamma=0.9)
    assert [run.run_id for run in spec.runs] == [wanted[3].run_id, wanted[1].run_id]
    assert note == "" and spec.eval_episodes == 4 and spec.rows_per_device == 2
    spec, _ = read(study, single.Asked(run=wanted[2].run_id[:10]))
    assert [run.run_id for run in spec.runs] == [wanted[2].run_id]
    spec, _ = read(study, single.Asked([1], run=wanted[2].run_id))
    assert [run.run_id for run in spec.runs] == [wanted[1].run_id]
    spec, _ = read(study, learning_rate=0.5, gamma=0.9, num_envs=4)  # values of one's own
    assert spec.runs[0].config.learning_rate == 0.5 and spec.runs[0].config.num_envs == 4
    assert spec.runs[0].config.env_params == {"max_steps_in_episode": 20}


@pytest.mark.fast
@pytest.mark.parametrize(
    ("asked", "fields", "words"),
    [
        ({}, {}, r"4 configurations: choose one with --learning-rate 1e-3 or 0.01 and --gamma 0.9"),
        ({}, {"gamma": 0.9}, r"2 configurations: choose one with --learning-rate 1e-3 or 0.01, or"),
        ({"run": "x"}, {}, "--run must be the id of one run of study, but is 'x'"),
        ({"run": ""}, {}, "--run must be the id of one run of study, but is ''"),
        ({"preset": "none"}, {}, "--preset is for agents; .*study.toml sets its own fields"),
        ({"seeds": [1, 1]}, {"gamma": 0.9, "learning_rate": 1e-3}, "list of distinct seeds"),
    ],
)
def test_a_file_with_several_configurations_says_how_to_choose(
    study: str, asked: dict[str, Any], fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        read(study, single.Asked(**asked), **fields)


@pytest.mark.fast
def test_drawn_configurations_are_chosen_too(study: str) -> None:
    search = '[search]\nmethod = "{}"\nsamples = 3\n'
    text = STUDY.replace("[1e-3, 1e-2]", "{ log_uniform = [1e-4, 1e-1] }")
    pathlib.Path(study).write_text(text + search.format("sobol"), encoding="utf-8")
    whole = specs.load(pathlib.Path(study))
    with pytest.raises(InputError, match=r"3 configurations: .* --learning-rate VALUE and --gamma"):
        read(study)
    spec, _ = read(study, single.Asked(run=whole.runs[5].run_id))
    assert [run.run_id for run in spec.runs] == [whole.runs[5].run_id]
    pathlib.Path(study).write_text(text + search.format("optuna"), encoding="utf-8")
    with pytest.raises(InputError, match="configurations that a search chooses: choose one with"):
        read(study)
    assert read(study, learning_rate=0.5, gamma=0.9)[0].runs[0].config.gamma == 0.9
    pathlib.Path(study).write_text('[[stage]]\nname = "a"\nagent = "ppo"\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"study.toml has stages, but train needs a sweep of one"):
        read(study)
    pathlib.Path(study).write_text(text.replace('"ppo"', '["ppo", "a2c"]'), encoding="utf-8")
    with pytest.raises(InputError, match=r"study.toml has agents, but train needs a sweep of one"):
        read(study)


def test_a_run_of_a_file_has_the_bits_that_it_has_in_the_sweep(
    study: str, tmp_path: pathlib.Path
) -> None:
    """On one device, with the rows of a unit in the file."""
    run(specs.load(pathlib.Path(study)), tmp_path / "whole")
    run(read(study, single.Asked([3]), learning_rate=1e-2, gamma=0.9)[0], tmp_path / "one")
    whole, one = (rows(tmp_path / name) for name in ("whole", "one"))
    ((run_id, arrays),) = one.items()
    assert len(whole) == 16 and len(arrays) > 5
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, whole[run_id][name], name)
    assert any((whole[other]["loss/policy"] != arrays["loss/policy"]).any() for other in whole)


def rows(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    with stores.Store.read(path) as store:
        legs = store.ledger.legs()
        units = {leg["unit"]: store.arrays(leg["unit"]) for leg in legs}
    return {
        leg["run_id"]: {name: array[leg["row"]] for name, array in units[leg["unit"]].items()}
        for leg in legs
    }


def test_the_study_is_the_one_whose_programs_other_tests_build(study: str) -> None:
    first = specs.load(pathlib.Path(study)).runs[0]
    assert first.config == specs.from_dict(TINY, "tiny").runs[0].config
