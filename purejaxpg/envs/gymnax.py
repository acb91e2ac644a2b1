"""The adapter to gymnax, and the only module that imports it."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import chex
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments import environment, spaces
from jax import random

from purejaxpg import FaultError, InputError, backend
from purejaxpg import config as configs
from purejaxpg.envs.interface import Env, EnvState, Step, restarted


def names() -> list[str]:
    """Return the names that gymnax has registered."""
    return list(gymnax.registered_envs)


def visualizer() -> Any:
    """Return gymnax's class that animates episodes; it brings matplotlib, seaborn and gymnasium."""
    from gymnax.visualize import Visualizer

    return Visualizer


# --- reset and step ------------------------------------------------------------------------------


@backend.foreign()
def reset(key: jax.Array, env: Env, params: Any, num_envs: int) -> tuple[jax.Array, EnvState]:
    """Start `num_envs` episodes.

    Args:
        key: one key, split over the environments.
        env: the environment.
        params: as returned by `params`, shared by the N environments.
        num_envs: N.

    Returns:
        Observations [N, D] and the state.
    """
    start = jax.vmap(reset_of(env.inner), in_axes=(0, None))
    obs, inner = start(random.split(key, num_envs), params)
    state = EnvState(inner, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))
    return _flatten(env, obs), state


@backend.foreign()
def step(
    key: jax.Array, env: Env, state: EnvState, action: jax.Array, params: Any
) -> tuple[jax.Array, EnvState, Step]:
    """Step N environments; if an episode ends, start the next one.

    Args:
        key: one key, split over the environments.
        env: the environment.
        state: leaves [N, ...].
        action: [N] int32, or [N, A] float32, which is clipped here to the bounds of the action
            space; a caller that needs the action it sampled keeps its own.
        params: as returned by `params`, shared by the N environments.

    Returns:
        The observation to act on next [N, D] (after the reset, if there was one), the state, and
        the outcome of the step.
    """
    num_envs = len(state.episode_length)
    chex.assert_shape(action, (num_envs,) if env.discrete else (num_envs, env.action_size))
    if not env.discrete:
        action = jnp.clip(action, *action_bounds(env, params, action.ndim))
        action = action.reshape(-1, *env.action_shape)
    advance = _step_as_wrapped if has_own_step(env.inner) else _step
    obs, next_obs, inner, reward, terminated, truncated = advance(key, env, state, action, params)
    reward = reward.astype(jnp.float32).reshape(-1)
    done = terminated | truncated
    episode_return, episode_length = state.episode_return + reward, state.episode_length + 1
    outcome = Step(
        next_obs=next_obs,
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        episode_return=jnp.where(done, episode_return, 0.0),
        episode_length=jnp.where(done, episode_length, 0),
    )
    running = EnvState(
        inner, jnp.where(done, 0.0, episode_return), jnp.where(done, 0, episode_length)
    )
    return obs, running, outcome


def _step(
    key: jax.Array, env: Env, state: EnvState, action: jax.Array, params: Any
) -> tuple[Any, ...]:
    """Step N environments, and reset only in a step in which an episode ends, except on a GPU.

    gymnax's own step resets at every step and then selects. If the condition cannot help, it costs
    nothing on a CPU: under vmap it becomes that select again.
    """
    key_step, key_reset = random.split(key)
    next_obs, stepped, reward, terminated, _ = jax.vmap(
        env.inner.step_env, in_axes=(0, 0, 0, None)
    )(random.split(key_step, action.shape[0]), state.inner, action, params)
    truncated = jax.vmap(env.inner.is_truncated, in_axes=(0, None))(stepped, params)
    terminated, truncated = _flag(terminated), _flag(truncated) | _over(env, state)
    obs, inner = _reset_where(key_reset, env, terminated | truncated, next_obs, stepped, params)
    return _flatten(env, obs), _flatten(env, next_obs), inner, reward, terminated, truncated


def _step_as_wrapped(
    key: jax.Array, env: Env, state: EnvState, action: jax.Array, params: Any
) -> tuple[Any, ...]:
    """Step N environments with a `step` of their own, such as a wrapper's."""
    key, key_reset = random.split(key) if env.added_limit else (key, key)
    keys = random.split(key, action.shape[0])
    obs, inner, reward, terminated, truncated, info = jax.vmap(
        env.inner.step, in_axes=(0, 0, 0, None)
    )(keys, state.inner, action, params)
    next_obs = _flatten(env, info["final_observation"])
    terminated, truncated = _flag(terminated), _flag(truncated)
    if env.added_limit:  # the wrapper resets on its own and knows nothing of this limit
        cut = _over(env, state) & ~(terminated | truncated)
        obs, inner = _reset_where(key_reset, env, cut, obs, inner, params)
        truncated |= cut
    return _flatten(env, obs), next_obs, inner, reward, terminated, truncated


def _flag(value: jax.Array) -> jax.Array:
    """[N] or [N, 1] of any type -> bool [N]."""
    return jnp.reshape(value, -1).astype(bool)


def _over(env: Env, state: EnvState) -> jax.Array | bool:
    """Return whether the step after `state` is the last that `register` allows -> [N]."""
    return state.episode_length + 1 >= env.added_limit if env.added_limit else False


def _reset_where(
    key: jax.Array, env: Env, done: jax.Array, obs: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """Return observations and states [N, ...], those of a reset where `done` [N].

    On a GPU a condition costs more than the reset, which can be computed for many steps at once.
    """

    def restart() -> tuple[Any, Any]:
        keys = random.split(key, done.size)
        fresh = jax.vmap(reset_of(env.inner), in_axes=(0, None))(keys, params)
        return restarted((obs, state), fresh, done)

    if backend.on_gpu():
        return restart()
    return jax.lax.cond(done.any(), restart, lambda: (obs, state))


def _flatten(env: Env, obs: jax.Array) -> jax.Array:
    """[N, ...] -> [N, D] float32; an observation that is an index becomes one-hot."""
    if env.index_observed:
        return jax.nn.one_hot(obs.reshape(-1), env.obs_size)
    return obs.reshape(obs.shape[0], -1).astype(jnp.float32)


def action_bounds(env: Env, params: Any, ndim: int = 1) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and the highest action, each [A], of an environment that bounds them.

    With `ndim` they have that many axes, [1, ..., A], as an array of actions has.

    They may be traced: a parameter of the environment can set them.
    """
    space, shape = env.inner.action_space(params), (*[1] * (ndim - 1), -1)
    low, high = (
        jnp.broadcast_to(jnp.asarray(bound, jnp.float32), env.action_shape).reshape(shape)
        for bound in (space.low, space.high)
    )
    return low, high


# --- construction --------------------------------------------------------------------------------


@backend.foreign()
def make(
    name: str, factory: Callable[..., Any] | None, kwargs: Mapping[str, Any], limit: int | None
) -> Env:
    """Construct an environment and read its spaces.

    Args:
        name: gymnax's, or that of `factory`.
        factory: returns a gymnax environment, or one and its parameters; None: gymnax's own.
        kwargs: passed to the constructor.
        limit: truncate episodes after this many steps.

    Returns:
        The environment, before anybody has asked whether it truncates.

    Raises:
        InputError: an argument is unknown, or an agent cannot use the spaces.
        FaultError: a download failed, or a package is missing.
    """
    inner, params = _construct(name, factory, kwargs)
    num_actions, action_shape = _space(name, inner, "action_space", params)
    num_observations, obs_shape = _space(name, inner, "observation_space", params)
    return Env(
        name=name,
        inner=inner,
        default_params=params,
        obs_shape=(num_observations,) if num_observations else obs_shape or (1,),
        num_actions=num_actions,
        action_shape=action_shape,
        index_observed=num_observations > 0,
        added_limit=limit,
    )


def _construct(
    name: str, factory: Callable[..., Any] | None, kwargs: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Return a gymnax environment and its default parameters."""
    try:
        if factory is None and kwargs:
            constructor = inspect.signature(type(gymnax.make(name)[0]))
            for argument in kwargs:
                kind = f"env_kwargs name of {name}"
                configs.require_known(argument, constructor.parameters, kind)
        made = factory(**kwargs) if factory else gymnax.make(name, **kwargs)
        return made if isinstance(made, tuple) else (made, made.default_params)
    except (FaultError, InputError):
        raise
    except OSError as error:
        raise FaultError(f"Environment {name!r} cannot be made here: {error}.") from error
    except Exception as error:
        refused = kwargs and isinstance(error, TypeError | ValueError)
        problem = f"refuses env_kwargs {dict(kwargs)}" if refused else "cannot be made"
        raise InputError(f"env {name!r} {problem}: {reason(error)}.") from error


def _space(name: str, inner: Any, member: str, params: Any) -> tuple[int, tuple[int, ...]]:
    """Return the number of elements of a Discrete space, or 0 and the shape of a Box."""
    refuse = functools.partial(refusal, name, inner, member)
    try:
        space = getattr(inner, member)(params)
    except Exception as error:
        raise refuse(f"fails with {reason(error)}") from error
    if isinstance(space, spaces.Discrete):
        if int(space.n) < 1:
            raise refuse(f"is {space}, but an agent needs at least one element")
        return int(space.n), ()
    if not isinstance(space, spaces.Box):
        raise refuse(f"is {space}, but an agent needs gymnax's spaces.Discrete or spaces.Box")
    try:  # a number is the length of one axis
        shape = tuple(int(size) for size in np.atleast_1d(np.asarray(space.shape, int)))
        low, high = (np.broadcast_to(np.asarray(bound), shape) for bound in (space.low, space.high))
    except (TypeError, ValueError) as error:
        raise refuse(f"is {space!r}, whose bounds and shape do not fit: {reason(error)}") from error
    if 0 in shape or min(shape, default=1) < 0:
        raise refuse(f"is {space}, which is empty")
    if member == "action_space" and not (low <= high).all():  # NaN included
        raise refuse(f"is {space}, but low must not exceed high")
    return 0, shape


def refusal(name: str, inner: Any, member: str, problem: str) -> InputError:
    """Return an error about a member of an environment's class."""
    return InputError(f"env {name!r}: {member} of {type(inner).__name__} {problem}.")


def reason(error: Exception) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else ""
    return text if type(error) is ValueError and text else f"{type(error).__name__}: {text}"


# --- whether a class keeps a method of gymnax -----------------------------------------------------


def has_own_step(inner: Any) -> bool:
    """Return whether an environment replaces gymnax's own `step`."""
    return getattr(type(inner), "step", None) is not environment.Environment.step


def has_own_truncation(inner: Any) -> bool:
    """Return whether an environment, without its wrappers, replaces gymnax's `is_truncated`."""
    rule = getattr(type(_layers(inner)[-1]), "is_truncated", None)
    return rule is not environment.Environment.is_truncated


def reset_of(inner: Any) -> Callable[..., Any]:
    """Return the function that starts an episode.

    gymnax's own `reset` is `reset_env` in a program of its own, in which no parameter is constant.
    """
    own = getattr(type(inner), "reset", None) is not environment.Environment.reset
    return inner.reset if own else inner.reset_env


def is_from_gymnax(inner: Any) -> bool:
    """Return whether an environment and all of its wrappers are gymnax's, or in this package."""
    packages = {type(layer).__module__.split(".")[0] for layer in _layers(inner)}
    return packages <= {"gymnax", "purejaxpg"}


def _layers(inner: Any) -> list[Any]:
    """Return an environment's gymnax wrappers, the outermost first, and then the environment."""
    layers = [inner]
    while "_env" in getattr(layers[-1], "__dict__", ()):
        layers.append(layers[-1]._env)
    return layers
