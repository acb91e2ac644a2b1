"""Copies of an agent file: with a distribution of distrax's, and from before distrax."""

import importlib.util
import pathlib
import sys
import types

import jax
import pytest
from jax import random

from purejaxpg import cli
from purejaxpg.agents import a2c

GAUSSIAN = "return distributions.diag_gaussian(output, log_std)"
SIGNATURE = "def __call__(self, obs: jax.Array) -> Any:\n        config, env"


def copy(path: pathlib.Path, old: str, new: str) -> pathlib.Path:
    source = pathlib.Path(a2c.__file__).read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))
    return path


def imported(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_a_policy_may_be_any_distribution_of_distrax(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logistic = "return distrax.Independent(distrax.Logistic(output, jnp.exp(log_std)), 1)"
    path = copy(tmp_path / "logistic_a2c.py", GAUSSIAN, f"import distrax\n\n        {logistic}")
    agent = imported(path, monkeypatch)
    config = agent.Config(env="Pendulum-v1", num_envs=2, num_steps=3, hidden=(4,))
    state = jax.eval_shape(agent.init, random.key(0), config)
    after, metrics = jax.eval_shape(agent.update, random.key(1), state, config)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert metrics["policy/entropy"].shape == ()
    action = jax.eval_shape(lambda s: agent.policy(random.key(2), s, s.obs, config), state)
    assert action.shape == (2, 1)


def test_a_copy_from_before_distrax_is_told_what_to_write(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = SIGNATURE.replace("Any", "distributions.Categorical | distributions.DiagGaussian")
    path = copy(tmp_path / "old_a2c.py", SIGNATURE, old)
    assert cli.main(["train", str(path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for words in ("distributions.categorical(logits)", "sample(seed=key)", "kl_divergence(other)"):
        assert words in message
