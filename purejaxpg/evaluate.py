"""Score a policy by whole episodes, on raw reward.

The score of a run is the mean return of 128 stochastic episodes, with the normalisers frozen as
they are in the agent's state. The return of the greedy policy is reported beside it. A policy that
has a memory starts every episode with a new one.
"""

import types
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax, random

from purejaxpg import InputError, contract, envs

# An episode that is still running after this many steps has no return.
LONGEST = 100_000
# Steps between two checks whether all episodes have ended. A check costs a wait for the device,
# a superfluous step only a step.
STRIDE = 16


def check_run(trainer: types.ModuleType, config: Any) -> None:
    """Raise an InputError if a run of this configuration could not be scored."""
    if not contract.scores_itself(trainer):
        check(config)


def check(config: Any) -> None:
    """Raise an InputError unless every episode of `config`'s environment ends within LONGEST steps.

    An environment with a rule of its own is trusted: an episode that does not end has no return.
    """
    env = envs.from_config(config)
    if not env.ends:
        raise InputError(
            f"env {env.name!r} never truncates an episode, so one may never end and cannot be "
            f"scored; give it a limit, as in envs.register({env.name!r}, ..., max_steps=1000)."
        )
    limit = envs.horizon(env, config.env_params)
    if limit is not None and limit > LONGEST:
        raise InputError(
            f"max_steps_in_episode of env {env.name!r} must be at most {LONGEST}, the longest "
            f"episode that is scored, but is {limit}."
        )


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

    It plays until all of them have ended, so a traced time limit works too.

    Args:
        key: used for nothing else.
        agent: a module with the contract's `policy`, with or without a memory.
        state: the agent's state, which does not change.
        config: the agent's configuration; its environment is the one played.
        num_episodes: E.
        max_steps: stop after this many steps, even if episodes are running. By default, LONGEST.
        greedy: take the most probable action instead of sampling.

    Returns:
        `return` [E] undiscounted raw return, NaN for an episode that was cut short; `length` [E]
        int32 steps that were played; `finished` [E] bool, false for an episode that was cut short.

    Raises:
        InputError: no time limit ends an episode, and there is no `max_steps`.
    """
    if max_steps is None:
        check(config)
    steps = LONGEST if max_steps is None else max_steps
    env, params = envs.setup(config)
    key_reset, key_steps = random.split(key)
    obs, env_state = envs.reset(key_reset, env, params, num_episodes)
    initial = contract.initial_memory(agent, state, config, num_episodes)

    def step(carry: tuple[Any, ...], t: jax.Array) -> tuple[tuple[Any, ...], None]:
        obs, memory, env_state, total, length, running = carry
        key_action, key_env = random.split(random.fold_in(key_steps, t))
        action, memory = contract.act(agent, key_action, state, obs, memory, config, greedy)
        obs, env_state, now = envs.step(key_env, env, env_state, action, params)
        chex.assert_shape([now.reward, now.done], (num_episodes,))
        played = running & (t < steps)
        total = total + jnp.where(played, now.reward, 0.0)
        memory = envs.restarted(memory, initial, now.done)
        running &= ~(played & now.done)
        return (obs, memory, env_state, total, length + jnp.int32(played), running), None

    def stride(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        t, played = carry
        played, _ = lax.scan(step, played, t + jnp.arange(STRIDE))
        return t + STRIDE, played

    none, running = jnp.zeros(num_episodes), jnp.ones(num_episodes, bool)
    start = (obs, initial, env_state, none, none.astype(jnp.int32), running)
    _, (*_, total, length, running) = lax.while_loop(
        lambda carry: (carry[0] < steps) & carry[1][-1].any(), stride, (jnp.int32(0), start)
    )
    return {"return": jnp.where(running, jnp.nan, total), "length": length, "finished": ~running}


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
        max_steps: as for `evaluate`.

    Returns:
        `evaluation/return` [E], `evaluation/length` [E] and `evaluation/finished` [E] of the
        stochastic policy, and `evaluation/greedy_return` [E].
    """
    key_stochastic, key_greedy = random.split(key)
    played = evaluate(key_stochastic, agent, state, config, num_episodes, max_steps)
    greedy = evaluate(key_greedy, agent, state, config, num_episodes, max_steps, greedy=True)
    named = {f"evaluation/{name}": value for name, value in played.items()}
    return {**named, "evaluation/greedy_return": greedy["return"]}


def score_run(
    key: jax.Array,
    trainer: types.ModuleType,
    state: Any,
    config: Any,
    num_episodes: int,
    *given: Any,
) -> dict[str, jax.Array]:
    """Score one run with the trainer's own score, or with whole episodes of its environment.

    Args:
        key: after update u, `fold_in(run_key, 2**31 + u)`.
        trainer: a module.
        state: the run's state.
        config: its configuration.
        num_episodes: E.
        given: the run's given arrays, if there are any.

    Returns:
        Arrays [E] by name, `evaluation/return` among them.

    Raises:
        InputError: the trainer's own score lacks `evaluation/return`.
    """
    if contract.scores_itself(trainer):
        return contract.own_score(key, trainer, state, config, num_episodes, *given)
    return score(key, trainer, state, config, num_episodes)
