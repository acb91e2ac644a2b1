"""Measure what uniformly random actions return, for the table of returns."""

import types
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import random
from rich.progress import track

from purejaxpg import envs, evaluate
from purejaxpg.agents import sac

EPISODES = 1024


def policy(key: jax.Array, state: None, obs: jax.Array, config: Any, greedy: bool) -> jax.Array:
    """The random actions of SAC [N] or [N, A], whatever the observations [N, D] are."""
    env, params = envs.setup(config)
    action = sac.at_random(key, config)
    return action if env.discrete else envs.to_bounds(env, params, action)


UNIFORM = types.SimpleNamespace(__name__="uniform", policy=policy)


def measure(env: str, episodes: int = EPISODES) -> dict[str, Any]:
    """Return the mean return of random actions in an environment, and its standard error."""
    config = sac.Config(env=env, num_envs=episodes)

    @jax.jit
    def play(key: jax.Array) -> jax.Array:
        return evaluate.evaluate(key, UNIFORM, None, config, episodes)["return"]

    found = np.asarray(play(random.key(0)), np.float64)
    error = found.std(ddof=1) / np.sqrt(episodes)
    shown = {"random": f"{found.mean():.5g}", "standard_error": f"{error:.2g}"}
    return {"env": env, **shown, "episodes": episodes}


def measured(names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure several environments, with a bar that shows progress."""
    return [measure(env) for env in track(names, "Random actions")]
