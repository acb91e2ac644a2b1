"""Score a policy by whole episodes: fixed length and masked, on raw reward.

The score of a run is the mean return of 128 stochastic episodes, with the policy's normalisers
frozen as they are in its state. The greedy policy stands beside it.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from purejaxpg import envs


def evaluate(
    key: jax.Array,
    agent: types.ModuleType,
    state: Any,
    config: Any,
    num_episodes: int = 128,
    max_steps: int | None = None,
    greedy: bool = False,
) -> dict[str, jax.Array]:
    """Play `num_episodes` whole episodes from fresh resets, one per environment.

    Args:
        key: used for nothing else.
        agent: a module with the contract's `policy`.
        state: the agent's state; nothing in it changes.
        config: the agent's configuration; its environment is the one played.
        num_episodes: E.
        max_steps: length of the scan, by which every episode has to end; the environment's time
            limit by default. Give it where `env_params` holds a traced limit.
        greedy: take the most probable action instead of sampling.

    Returns:
        `return` [E] undiscounted raw return, `length` [E] int32 steps, `finished` [E] bool,
        false for an episode that was still running after `max_steps`.
    """
    env = envs.from_config(config)
    params = envs.params(env, config.env_params)
    key_reset, key_steps = random.split(key)
    obs, env_state = envs.reset(key_reset, env, params, num_episodes)

    def step(carry: tuple[Any, ...], key: jax.Array) -> tuple[tuple[Any, ...], None]:
        obs, env_state, total, length, running = carry
        key_action, key_env = random.split(key)
        action = agent.policy(key_action, state, obs, config, greedy)
        obs, env_state, now = envs.step(key_env, env, env_state, action, params)
        total = total + jnp.where(running, now.reward, 0.0)
        return (obs, env_state, total, length + running, running & ~now.done), None

    start = (
        obs,
        env_state,
        jnp.zeros(num_episodes),
        jnp.zeros(num_episodes, jnp.int32),
        jnp.ones(num_episodes, bool),
    )
    steps = envs.horizon(env, config.env_params) if max_steps is None else max_steps
    end, _ = jax.lax.scan(step, start, random.split(key_steps, steps))
    _, _, total, length, running = end
    return {"return": total, "length": length, "finished": ~running}


def score(
    key: jax.Array,
    agent: types.ModuleType,
    state: Any,
    config: Any,
    num_episodes: int = 128,
    max_steps: int | None = None,
) -> dict[str, jax.Array]:
    """Evaluate the stochastic and the greedy policy, as a sweep scores a run.

    Args:
        key: after update u, `fold_in(run_key, 2**31 + u)`.
        agent: as for `evaluate`, like the remaining arguments.
        state: the agent's state.
        config: the agent's configuration.
        num_episodes: E, for each of the two.
        max_steps: length of the scan.

    Returns:
        `evaluation/return` [E], `evaluation/length` [E] and `evaluation/finished` [E] of the
        stochastic policy, and `evaluation/greedy_return` [E].
    """
    key_stochastic, key_greedy = random.split(key)
    played = evaluate(key_stochastic, agent, state, config, num_episodes, max_steps)
    greedy = evaluate(key_greedy, agent, state, config, num_episodes, max_steps, greedy=True)
    named = {f"evaluation/{name}": value for name, value in played.items()}
    return {**named, "evaluation/greedy_return": greedy["return"]}
