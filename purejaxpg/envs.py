"""The environment boundary: the only module that knows gymnax.

Whatever gymnax offers, the agents see one thing: N environments side by side, flat float32
observations [N, D], and for every step `terminated` and `truncated` apart, with `next_obs` the
observation before any reset.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces
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

    Call it at the top of a forked agent file to sweep over an environment of your own. A name
    stands for one environment: programs compiled for an earlier one of that name stay as they are.
    """
    _factories[name] = factory
    make.cache_clear()


def names() -> list[str]:
    """Return the names of all registered environments."""
    return [*gymnax.registered_envs, *(n for n in _factories if n not in gymnax.registered_envs)]


def is_gymnax(name: str) -> bool:
    """Tell whether `name` stands for an environment of gymnax, and not for one registered here."""
    return name in gymnax.registered_envs and name not in _factories


@functools.cache
@jax.ensure_compile_time_eval()  # what is kept here outlives the trace that first asks for it
def make(name: str, /, **kwargs: Any) -> Env:
    """Return the environment registered as `name`.

    Args:
        name: one of `names()`.
        kwargs: passed to the environment's constructor, e.g. `size=10` for DeepSea-bsuite.

    Raises:
        InputError: the name or an argument is unknown, or the spaces are of a kind that a
            feed-forward agent cannot use.
        FaultError: the environment needs something that the surroundings lack (a download).
    """
    inner = _construct(name, kwargs)
    params = inner.default_params
    action_space = inner.action_space(params)
    discrete = isinstance(action_space, spaces.Discrete)
    if not discrete and not (isinstance(action_space, spaces.Box) and len(action_space.shape) == 1):
        raise InputError(
            f"env {name!r} has the action space {action_space}, which no agent can use."
        )
    obs_shape = _obs_shape(name, inner.observation_space(params))
    configs.require(min(obs_shape) > 0, f"env {name!r} has empty observations, {list(obs_shape)}.")
    return Env(
        name=name,
        inner=inner,
        default_params=params,
        obs_shape=obs_shape,
        num_actions=int(action_space.n) if discrete else 0,
        action_size=int(action_space.n if discrete else action_space.shape[0]),
        max_steps=int(params.max_steps_in_episode),
    )


def from_config(config: Any) -> Env:
    """Return the environment that an agent's configuration names."""
    return make(config.env, **dict(config.env_kwargs))


def setup(config: Any) -> tuple[Env, Any]:
    """Return the environment that an agent's configuration names, and its parameters."""
    env = from_config(config)
    return env, params(env, config.env_params)


def check(config: Any) -> Env:
    """Check what `config` says of the environment and of its actions; return the environment."""
    env = from_config(config)
    for name, value in config.env_params.items():
        _check_param(env, name, value)
    noise = getattr(config, "initial_log_std", 0.0)
    configs.require(
        not env.discrete or noise == 0.0,
        f"initial_log_std {noise} is for the Gaussian policy of continuous actions; "
        f"those of {env.name} are discrete.",
    )
    return env


def require_bounded(config: Any, agent: str) -> None:
    """Require continuous actions between finite bounds, for an agent that squashes its own."""
    env, env_params = setup(config)
    configs.require(
        not env.discrete,
        f"env {env.name!r} has discrete actions, but {agent} needs continuous ones; "
        "on Pendulum-v1, for one, it works.",
    )
    low, high = (np.asarray(bound) for bound in action_bounds(env, env_params))
    configs.require(
        bool(np.isfinite([low, high]).all() and (low < high).all()),
        f"env {env.name!r} has actions between {low.tolist()} and {high.tolist()}, but {agent} "
        "needs finite bounds, the lower below the upper.",
    )


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
    limit = overrides.get("max_steps_in_episode", env.max_steps)
    if isinstance(limit, jax.core.Tracer):
        limit = env.max_steps
    return min(int(limit), LONGEST_EVALUATION)


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
        action = jnp.clip(action, *action_bounds(env, params))
    own_step = type(env.inner).step is not environment.Environment.step
    advance = _step_as_wrapped if own_step else _step
    obs, next_obs, inner, reward, terminated, truncated = advance(
        key, env, state.inner, action, params
    )
    reward = reward.astype(jnp.float32).reshape(-1)
    terminated, truncated = terminated.reshape(-1), truncated.reshape(-1)
    done = terminated | truncated
    episode_return, episode_length = state.episode_return + reward, state.episode_length + 1
    returned = Step(
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
    return obs, running, returned


def _step(key: jax.Array, env: Env, state: Any, action: jax.Array, params: Any) -> tuple[Any, ...]:
    """Step N environments, resetting only in a step in which an episode ends.

    gymnax's own step resets at every step and then selects. The condition costs nothing where it
    cannot help: under vmap it becomes that select again.
    """
    key_step, key_reset = random.split(key)
    num_envs = action.shape[0]
    next_obs, stepped, reward, terminated, _ = jax.vmap(
        env.inner.step_env, in_axes=(0, 0, 0, None)
    )(random.split(key_step, num_envs), state, action, params)
    truncated = jax.vmap(env.inner.is_truncated, in_axes=(0, None))(stepped, params)
    done = (terminated | truncated).reshape(-1)

    def renewed() -> tuple[Any, Any]:
        keys = random.split(key_reset, num_envs)
        fresh = jax.vmap(env.inner.reset_env, in_axes=(0, None))(keys, params)
        return jax.tree.map(functools.partial(_where, done), fresh, (next_obs, stepped))

    obs, inner = jax.lax.cond(done.any(), renewed, lambda: (next_obs, stepped))
    return _flatten(env, obs), _flatten(env, next_obs), inner, reward, terminated, truncated


def _step_as_wrapped(
    key: jax.Array, env: Env, state: Any, action: jax.Array, params: Any
) -> tuple[Any, ...]:
    """Step N environments by a `step` of their own, that of a wrapper."""
    keys = random.split(key, action.shape[0])
    obs, inner, reward, terminated, truncated, info = jax.vmap(
        env.inner.step, in_axes=(0, 0, 0, None)
    )(keys, state, action, params)
    next_obs = _flatten(env, info["final_observation"])
    return _flatten(env, obs), next_obs, inner, reward, terminated, truncated


def _where(done: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """[N] and two arrays [N, ...] -> `new` where done, and of `old`'s type."""
    column = done.reshape(-1, *[1] * (jnp.ndim(old) - 1))
    return jnp.where(column, new, old).astype(old.dtype)


def episode_metrics(steps: Step, where: jax.Array | bool = True) -> dict[str, jax.Array]:
    """Reduce any number of steps to the sums of the episodes that ended in them.

    Sums and a count, not a mean: where no episode ended there is no return to report, and a
    zero would read as one.

    Args:
        steps: leaves [...].
        where: [...] bool, the steps that count.

    Returns:
        Scalars by name.
    """
    ended = steps.done & where
    return {
        "episode/return_sum": jnp.sum(steps.episode_return, where=ended),
        "episode/length_sum": jnp.sum(steps.episode_length, where=ended).astype(jnp.float32),
        "episode/count": ended.sum().astype(jnp.float32),
    }


def action_bounds(env: Env, params: Any) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and the highest action, each [A], of an environment that bounds them.

    They may be traced: a parameter of the environment can set them.
    """
    space = env.inner.action_space(params)
    low, high = (jnp.broadcast_to(bound, space.shape) for bound in (space.low, space.high))
    return low.astype(jnp.float32), high.astype(jnp.float32)


def to_bounds(env: Env, params: Any, action: jax.Array) -> jax.Array:
    """Map actions [..., A] from [-1, 1] to the bounds of the action space, linearly."""
    low, high = action_bounds(env, params)
    return low + 0.5 * (action + 1.0) * (high - low)


def _construct(name: str, kwargs: Mapping[str, Any]) -> Any:
    configs.require_known(name, names(), "environment")
    factory = _factories.get(name) or functools.partial(gymnax.make, name)
    try:
        if name not in _factories and kwargs:
            constructor = inspect.signature(type(gymnax.make(name)[0]))
            for argument in kwargs:
                what = f"env_kwargs name of {name}"
                configs.require_known(argument, constructor.parameters, what)
        made = factory(**kwargs)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        text = str(error).rstrip(".")
        raise InputError(f"env {name!r} refuses env_kwargs {dict(kwargs)}: {text}.") from error
    except OSError as error:
        raise FaultError(f"Environment {name!r} cannot be made here: {error}.") from error
    return made[0] if isinstance(made, tuple) else made


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
    default = np.asarray(getattr(env.default_params, name))
    if name in _derived(env):
        raise InputError(
            f"env_params.{name} of {env.name} follows from its other parameters; set those."
        )
    if default.ndim > 0:
        raise InputError(f"env_params.{name} of {env.name} is an array and cannot be set.")
    if default.dtype.kind == "b" and value not in (0, 1):
        raise InputError(f"env_params.{name} must be true or false, but is {value!r}.")
    if default.dtype.kind in "iu" and value % 1 != 0:
        raise InputError(f"env_params.{name} must be a whole number, but is {value!r}.")
    if not abs(value) <= float(np.finfo(np.float32).max):  # NaN included
        raise InputError(f"env_params.{name} must be finite, but is {value!r}.")
    if name == "max_steps_in_episode" and value < 1:
        raise InputError(f"env_params.{name} must be 1 or more, but is {value!r}.")
    if not changes_transitions(env, name):
        raise InputError(f"env_params.{name} changes no transition of {env.name}; leave it out.")


def _seen(env: Env, name: str, value: jax.Array) -> tuple[Any, ...]:
    """Play two steps with parameter `name` at `value` -> all that an agent sees of them.

    The steps are scanned, so that a field of the state counts only where it reaches an output.
    """
    overridden = params(env, {name: value})
    obs, state = reset(random.key(0), env, overridden, 1)
    shape = (1,) if env.discrete else (1, env.action_size)
    action = jnp.zeros(shape, jnp.int32 if env.discrete else jnp.float32)

    def advance(state: EnvState, key: jax.Array) -> tuple[EnvState, tuple[Any, ...]]:
        obs, state, returned = step(key, env, state, action, overridden)
        return state, (obs, returned)

    return obs, jax.lax.scan(advance, state, random.split(random.key(1), 2))[1]


@functools.cache
def changes_transitions(env: Env, name: str) -> bool:
    """Tell whether any observation, reward or end of an episode depends on the parameter `name`.

    This is read off the traced program, so a parameter that matters only in rare states counts.

    Raises:
        InputError: the parameter decides the shape of the program and cannot be a traced value.
    """
    try:
        program = jax.make_jaxpr(functools.partial(_seen, env, name))(
            jnp.asarray(getattr(env.default_params, name))
        )
    except jax.errors.ConcretizationTypeError as error:
        raise InputError(
            f"env_params.{name} of {env.name} decides the shape of the program, so it cannot be "
            "a traced value."
        ) from error
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return used[0]
