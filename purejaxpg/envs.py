"""The environment boundary: the only module that knows gymnax.

Whatever gymnax offers, the agents see one thing: N environments side by side, flat float32
observations [N, D], and for every step `terminated` and `truncated` apart, with `next_obs` the
observation before any reset.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import spaces
from jax import random
from jax.interpreters import partial_eval

from purejaxpg import FaultError, InputError
from purejaxpg import config as configs

# An environment whose own time limit is missing or longer is evaluated for so many steps.
LONGEST_EVALUATION = 10_000

# Fields that gymnax stores although other fields fix them: environment class -> field -> rule.
# Left as they are, a changed mass would change nothing.
DERIVED: dict[str, dict[str, Callable[[Any], Any]]] = {
    "CartPole": {
        "total_mass": lambda p: p.masscart + p.masspole,
        "polemass_length": lambda p: p.masspole * p.length,
    },
}

_factories: dict[str, Callable[..., Any]] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Env:
    """One environment: what the agents need to know of it, all of it static."""

    name: str
    inner: Any  # the gymnax environment
    default_params: Any
    obs_shape: tuple[int, ...]  # before flattening
    num_actions: int  # 0 where actions are continuous
    action_size: int  # A: the number of actions, or of action dimensions
    max_steps: int  # the default time limit

    @property
    def obs_size(self) -> int:
        """Length D of a flat observation."""
        return int(np.prod(self.obs_shape))

    @property
    def discrete(self) -> bool:
        """Whether actions are indices (int32 []) rather than vectors (float32 [A])."""
        return self.num_actions > 0


@struct.dataclass
class EnvState:
    """State of N environments, with the episodes in progress."""

    inner: Any  # the environment's own state, leaves [N, ...]
    episode_return: jax.Array  # [N] raw reward since the last reset
    episode_length: jax.Array  # [N] int32


@struct.dataclass
class Step:
    """What one step of N environments returned."""

    next_obs: jax.Array  # [N, D] before any reset
    reward: jax.Array  # [N] raw
    terminated: jax.Array  # [N] bool: the task itself ended
    truncated: jax.Array  # [N] bool: the time limit was reached
    episode_return: jax.Array  # [N] of the episode that ended here, 0 elsewhere
    episode_length: jax.Array  # [N] int32, likewise

    @property
    def done(self) -> jax.Array:
        """[...] bool: the episode ended, for whichever reason."""
        return self.terminated | self.truncated


def register(name: str, factory: Callable[..., Any]) -> None:
    """Make `factory(**kwargs)`, which returns a gymnax `Environment`, known as `name`.

    Call it at the top of a forked agent file to sweep over an environment of your own.
    """
    _factories[name] = factory
    make.cache_clear()


def names() -> list[str]:
    """Return the names of all registered environments."""
    return [*gymnax.registered_envs, *(n for n in _factories if n not in gymnax.registered_envs)]


@functools.cache
def make(name: str, **kwargs: Any) -> Env:
    """Return the environment registered as `name`.

    Args:
        name: one of `names()`.
        kwargs: passed to the environment's constructor, e.g. `size=10` for DeepSea-bsuite.

    Raises:
        InputError: the name or an argument is unknown, or the spaces are of a kind that a
            feed-forward agent cannot use.
        FaultError: the environment needs something that the surroundings lack (a download).
    """
    configs.require_known(name, names(), "environment")
    try:
        inner = _factories[name](**kwargs) if name in _factories else gymnax.make(name, **kwargs)[0]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"env {name!r} cannot be made with env_kwargs {kwargs}: {error}."
        ) from error
    except OSError as error:
        raise FaultError(f"Environment {name!r} cannot be made here: {error}.") from error
    params = inner.default_params
    action_space = inner.action_space(params)
    discrete = isinstance(action_space, spaces.Discrete)
    if not discrete and not (isinstance(action_space, spaces.Box) and len(action_space.shape) == 1):
        raise InputError(
            f"env {name!r} has the action space {action_space}, which no agent can use."
        )
    return Env(
        name=name,
        inner=inner,
        default_params=params,
        obs_shape=_obs_shape(name, inner.observation_space(params)),
        num_actions=int(action_space.n) if discrete else 0,
        action_size=int(action_space.n if discrete else action_space.shape[0]),
        max_steps=int(params.max_steps_in_episode),
    )


def from_config(config: Any) -> Env:
    """Return the environment that an agent's configuration names."""
    return make(config.env, **dict(config.env_kwargs))


def check(config: Any) -> Env:
    """Check the fields `env`, `env_kwargs` and `env_params`; return the environment."""
    env = from_config(config)
    for name, value in config.env_params.items():
        _check_param(env, name, value)
    return env


def params(env: Env, overrides: Mapping[str, Any]) -> Any:
    """Return the environment's parameters with `overrides`, derived ones recomputed.

    Args:
        env: the environment.
        overrides: parameter name to scalar; traced values are fine.

    Returns:
        The environment's own `EnvParams`.
    """
    defaults = env.default_params
    kinds = {name: jnp.asarray(getattr(defaults, name)).dtype for name in overrides}
    cast = {name: jnp.asarray(value).astype(kinds[name]) for name, value in overrides.items()}
    changed = defaults.replace(**cast)
    if not overrides:
        return changed
    rules = _derived(env)
    return changed.replace(**{name: rule(changed) for name, rule in rules.items()})


def horizon(env: Env, overrides: Mapping[str, Any]) -> int:
    """Return the number of steps within which every episode ends (at most LONGEST_EVALUATION)."""
    limit = int(overrides.get("max_steps_in_episode", env.max_steps))
    return min(limit, LONGEST_EVALUATION)


def reset(key: jax.Array, env: Env, params: Any, num_envs: int) -> tuple[jax.Array, EnvState]:
    """Start `num_envs` episodes.

    Returns:
        Observations [N, D] and the state.
    """
    obs, inner = jax.vmap(env.inner.reset, in_axes=(0, None))(random.split(key, num_envs), params)
    state = EnvState(inner, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))
    return _flatten(env, obs), state


def step(
    key: jax.Array, env: Env, state: EnvState, action: jax.Array, params: Any
) -> tuple[jax.Array, EnvState, Step]:
    """Step N environments; where an episode ends, start the next one.

    Args:
        key: one key, split over the environments.
        env: the environment.
        state: leaves [N, ...].
        action: [N] int32, or [N, A] float32, clipped here to the bounds of the action space; a
            caller that needs the action it sampled keeps its own.
        params: as returned by `params`, shared by the N environments.

    Returns:
        The observation to act on next [N, D] (after the reset, where there was one), the state,
        and what the step returned.
    """
    if not env.discrete:
        bounds = env.inner.action_space(params)
        action = jnp.clip(action, bounds.low, bounds.high)
    keys = random.split(key, action.shape[0])
    obs, inner, reward, terminated, truncated, info = jax.vmap(
        env.inner.step, in_axes=(0, 0, 0, None)
    )(keys, state.inner, action, params)
    reward = reward.astype(jnp.float32).reshape(-1)
    terminated, truncated = terminated.reshape(-1), truncated.reshape(-1)
    done = terminated | truncated
    episode_return, episode_length = state.episode_return + reward, state.episode_length + 1
    returned = Step(
        next_obs=_flatten(env, info["final_observation"]),
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        episode_return=jnp.where(done, episode_return, 0.0),
        episode_length=jnp.where(done, episode_length, 0),
    )
    running = EnvState(
        inner, jnp.where(done, 0.0, episode_return), jnp.where(done, 0, episode_length)
    )
    return _flatten(env, obs), running, returned


def episode_metrics(steps: Step) -> dict[str, jax.Array]:
    """Reduce any number of steps to the sums of the episodes that ended in them.

    Sums and a count, not a mean: where no episode ended there is no return to report, and a
    zero would read as one.
    """
    return {
        "episode/return_sum": steps.episode_return.sum(),
        "episode/length_sum": steps.episode_length.sum().astype(jnp.float32),
        "episode/count": steps.done.sum().astype(jnp.float32),
    }


def _obs_shape(name: str, space: Any) -> tuple[int, ...]:
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.Box):
        return tuple(int(size) for size in space.shape) or (1,)
    raise InputError(f"env {name!r} has the observation space {space}, which no agent can use.")


def _flatten(env: Env, obs: jax.Array) -> jax.Array:
    """[N, ...] -> [N, D] float32; an observation that is an index becomes one-hot."""
    if isinstance(env.inner.observation_space(env.default_params), spaces.Discrete):
        return jax.nn.one_hot(obs.reshape(-1), env.obs_size)
    return obs.reshape(obs.shape[0], -1).astype(jnp.float32)


def _derived(env: Env) -> dict[str, Callable[[Any], Any]]:
    return DERIVED.get(type(env.inner).__name__, {})


def _check_param(env: Env, name: str, value: Any) -> None:
    known = [field.name for field in dataclasses.fields(env.default_params)]
    configs.require_known(name, known, f"env_params field of {env.name}")
    default = getattr(env.default_params, name)
    if name in _derived(env):
        raise InputError(
            f"env_params.{name} of {env.name} follows from its other parameters; set those."
        )
    if np.ndim(default) > 0:
        raise InputError(f"env_params.{name} of {env.name} is an array and cannot be set.")
    if np.asarray(default).dtype.kind in "iu" and value != int(value):
        raise InputError(f"env_params.{name} must be a whole number, but is {value!r}.")
    if name == "max_steps_in_episode" and value < 1:
        raise InputError(f"env_params.{name} must be 1 or more, but is {value!r}.")
    if not changes_transitions(env, name):
        raise InputError(f"env_params.{name} changes no transition of {env.name}; leave it out.")


@functools.cache
def changes_transitions(env: Env, name: str) -> bool:
    """Tell whether any reset or step of `env` depends on its parameter `name`.

    This is read off the traced program, so a parameter that matters only in rare states counts.

    Raises:
        InputError: the parameter decides the shape of the program and cannot be a traced value.
    """

    def transition(value: jax.Array) -> tuple[Any, ...]:
        overridden = params(env, {name: value})
        obs, state = reset(random.key(0), env, overridden, 1)
        shape = (1,) if env.discrete else (1, env.action_size)
        action = jnp.zeros(shape, jnp.int32 if env.discrete else jnp.float32)
        return obs, state, step(random.key(1), env, state, action, overridden)

    try:
        program = jax.make_jaxpr(transition)(jnp.asarray(getattr(env.default_params, name)))
    except jax.errors.ConcretizationTypeError as error:
        raise InputError(
            f"env_params.{name} of {env.name} decides the shape of the program, so it cannot be "
            "a traced value."
        ) from error
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return used[0]
