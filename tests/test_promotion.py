"""Every agent runs in jax's strict modes, in which a user may look for mistakes of their own."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from purejaxpg import backend, evaluate, trainers

AGENTS = [name for name in trainers.names() if not name.startswith("rlhf.")]
OPTIONS = {
    "normalize_obs": True, "normalize_reward": True, "normalize_advantage": True,
    "clip_reward": 10.0, "max_grad_norm": 0.5,
}  # fmt: skip
CONTINUOUS_ONLY = ("ddpg",)


def configurations(name: str) -> list[Any]:
    """Small settings that reach most branches: actions of both kinds, options, a CNN."""
    base = trainers.load(name).Config()
    names = [field.name for field in dataclasses.fields(base)]
    small = {"num_envs": 4, "hidden": (4,)}
    options = {field: value for field, value in OPTIONS.items() if field in names}
    continuous = dataclasses.replace(base, env="Pendulum-v1", **small, **options)
    if name in CONTINUOUS_ONLY:
        return [continuous]
    discrete = dataclasses.replace(base, env="Breakout-MinAtar", torso="cnn", **small)
    return [continuous, discrete]


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_is_traced_in_strict_modes(name: str) -> None:
    agent = trainers.load(name)
    for config in configurations(name):
        agent.check(config)

        def short(key: jax.Array, config: Any) -> Any:
            state, metrics = agent.update(key, agent.init(key, config), config)
            return metrics, evaluate.score(key, agent, state, config, 2)

        key = jax.random.key(0)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            metrics, score = jax.eval_shape(short, key, config)
        assert metrics and score["evaluation/greedy_return"].shape == (2,)


@pytest.mark.fast
def test_only_calls_of_other_packages_are_exempt() -> None:
    integer, matrix = jnp.arange(3), jnp.ones((2, 3))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        with backend.foreign():
            assert (integer * jnp.float32(0.5) + matrix).shape == (2, 3)
        with pytest.raises(jax.dtypes.TypePromotionError):
            integer * jnp.float32(0.5)
        with pytest.raises(ValueError, match="rank_promotion"):
            matrix + jnp.ones(3)
    with backend.foreign():
        assert (integer * jnp.float32(0.5)).shape == (3,)
