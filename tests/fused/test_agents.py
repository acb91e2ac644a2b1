"""Kernels under the agents: a whole update of PPO, and what the programs of a sweep are made of."""

import dataclasses
import importlib
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax import random
from jax.sharding import Mesh

from purejaxpg import InputError, backend, cli
from purejaxpg.agents import ppo, ppo_rnn
from purejaxpg.fused import paths
from purejaxpg.sweep import compute
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs

STEPS, VALUES, GRADIENTS = "steps of the environments", "values", "gradient steps"
KERNELS = {
    "reinforce": {STEPS, VALUES},
    "a2c": {STEPS, VALUES},
    "npg": {STEPS, VALUES, GRADIENTS},
    "trpo": {STEPS, VALUES, GRADIENTS},
    "ppo": {STEPS, VALUES, GRADIENTS},
    "ddpg": {STEPS},
    "sac": {STEPS},
}
TINY = {"num_envs": 4, "num_steps": 8, "hidden": (16, 16), "num_epochs": 2, "num_minibatches": 2}


def updated(config: ppo.Config, state: ppo.TrainState) -> Any:
    """Return what an update of two runs with different learning rates returns, and its paths."""
    rates = np.array([1e-3, 1e-2], np.float32)

    def update(rate: jax.Array) -> Any:
        return ppo.update(random.key(1), state, dataclasses.replace(config, learning_rate=rate))

    quickly = {"xla_backend_optimization_level": 0}
    with paths.recorded() as recorded:
        lowered = jax.jit(jax.vmap(update)).lower(rates)
    return lowered.compile(compiler_options=quickly)(rates), recorded


def test_an_update_of_ppo_in_kernels_is_that_of_plain_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = {"env": "Pendulum-v1", "normalize_obs": True, "normalize_reward": True}
    config = ppo.Config(**TINY, **scaled, max_kl=0.02, vf_clip_eps=0.2, precision="float32")
    state = jax.jit(lambda: ppo.init(random.key(0), config))()
    expected, plain = updated(config, state)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    result, kernels = updated(config, state)
    assert not any(path.kernel for path in plain)
    assert [path.loop for path in kernels if path.kernel] == [STEPS, VALUES, VALUES, GRADIENTS]
    both = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    for got, wanted in both:
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("agent", KERNELS)
def test_the_programs_of_a_sweep_have_the_kernels(
    agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    names = importlib.import_module(f"purejaxpg.agents.{agent}").Config.__dataclass_fields__
    fields = {name: value for name, value in TINY.items() if name in names}
    raw = {"agent": agent, "seeds": 2, "config": {**fields, "hidden": [16, 16]}}
    spec = specs.from_dict(raw, "tiny")
    (round_, *_) = searches.rehearse(searches.rounds(spec))
    (group,) = compute.Backend(spec, jax.devices()[:1]).groups(0, round_, {})
    mesh = Mesh(np.array(jax.devices()[:1]), (compute.ROWS,))
    with paths.recorded() as recorded:
        compute.trace(spec, group, mesh, 1)
    assert {path.loop for path in recorded} == KERNELS[agent]
    assert all(path.kernel for path in recorded), [*map(str, recorded)]


def test_a_memory_runs_in_plain_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a user who requires kernels is told so."""
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    config = ppo_rnn.Config(**{**TINY, "hidden": (16,)}, memory_size=16)

    def both(config: ppo_rnn.Config) -> Any:
        state = ppo_rnn.init(random.key(0), config)
        return ppo_rnn.update(random.key(1), state, config)

    with paths.recorded() as recorded:
        jax.eval_shape(lambda: both(config))
    outside = "the parameter actor/gru/input/kernel is used outside of a multilayer perceptron"
    assert {path.loop: path.reason for path in recorded} == {
        STEPS: "kernels cannot compute 'slice' of a hidden layer",
        GRADIENTS: outside,
    }
    with pytest.raises(InputError, match=f"'require', but the {STEPS} run in plain JAX, because"):
        jax.eval_shape(lambda: both(dataclasses.replace(config, fused="require")))


def test_a_precision_or_a_way_that_does_not_exist_is_refused() -> None:
    for fields, message in (
        ({"precision": "double"}, "precision must be one of 'fast', 'float32', but is 'double'."),
        ({"fused": "always"}, "fused must be one of 'auto', 'require', 'off', but is 'always'."),
    ):
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            ppo.check(ppo.Config(**fields))  # type: ignore[arg-type]


def test_the_command_line_says_why_a_required_kernel_does_not_run(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "ppo", "--fused", "require", "--total-timesteps", "512"]
    assert cli.main(words) == 2
    wanted = (
        "fused is 'require', but the steps of the environments run in plain JAX, because kernels "
        "need an NVIDIA GPU."
    )
    assert wanted in capsys.readouterr().err
