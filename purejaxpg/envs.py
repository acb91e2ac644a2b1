"""The environment boundary: the only module that knows gymnax.

Whatever gymnax offers, the agents see one thing: N environments side by side, flat float32
observations [N, D], and for every step `terminated` and `truncated` apart, with `next_obs` the
observation before any reset.
"""

import dataclasses
import functools
import inspect
import math
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


@dataclasses.dataclass(frozen=True)
class Derived:
    """A parameter that an environment stores although others fix it."""

    sources: tuple[str, ...]
    rule: Callable[..., Any]  # of the values of `sources`


# CartPole's, by name of the field. Left as they are, a changed mass would change nothing, or one
# term of the equations alone. They hold for whatever has these fields, a subclass or a wrapper too.
DERIVED = {
    "total_mass": Derived(("masscart", "masspole"), lambda cart, pole: cart + pole),
    "polemass_length": Derived(("masspole", "length"), lambda pole, length: pole * length),
}

# What gymnax 1.0 expects of a step, in the words of its documentation.
STEP = "(obs, state, reward, terminated, truncated, info)"
STEP_ENV = "(obs, state, reward, terminated, info)"


@dataclasses.dataclass(frozen=True)
class Registered:
    """What was registered under a name."""

    factory: Callable[..., Any]
    max_steps: int | None = None  # a time limit besides the environment's own


_registered: dict[str, Registered] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Env:
    """One environment: what the agents need to know of it, all of it static."""

    name: str
    inner: Any  # the gymnax environment
    default_params: Any
    obs_shape: tuple[int, ...]  # before flattening
    num_actions: int  # 0 where actions are continuous
    action_shape: tuple[int, ...]  # as the environment takes it; () for an index
    action_size: int  # A: the number of actions, or of action dimensions
    added_limit: int | None = None  # on the steps of an episode, set by `register`
    truncates: bool = False  # whether the environment ever truncates an episode by itself
    limited: bool = False  # whether it does so after `max_steps_in_episode` steps, or earlier

    @property
    def obs_size(self) -> int:
        """Length D of a flat observation."""
        return int(np.prod(self.obs_shape))

    @property
    def discrete(self) -> bool:
        """Whether actions are indices (int32 []) rather than vectors (float32 [A])."""
        return self.num_actions > 0

    @property
    def max_steps(self) -> int | None:
        """Steps within which every episode ends by default; None where nobody can say."""
        return horizon(self, {})

    @property
    def ends(self) -> bool:
        """Whether an episode may be truncated, so that it ends whatever the agent does."""
        return self.truncates or self.added_limit is not None


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


def register(name: str, factory: Callable[..., Any], max_steps: int | None = None) -> None:
    """Make `factory(**kwargs)` known as `name`.

    Call it at the top of a forked agent file to sweep over an environment of your own. A name
    stands for one environment: programs compiled for an earlier one of that name stay as they are.

    Args:
        name: what `config.env` says.
        factory: returns a gymnax `Environment`, or one and its parameters, as `gymnax.make` does.
        max_steps: truncate episodes after so many steps, for an environment without a time limit.
    """
    configs.require(
        max_steps is None or max_steps > 0,
        f"max_steps of env {name!r} must be 1 or more, but is {max_steps}.",
    )
    _registered[name] = Registered(factory, max_steps)
    make.cache_clear()


def names() -> list[str]:
    """Return the names of all registered environments."""
    return [*gymnax.registered_envs, *(n for n in _registered if n not in gymnax.registered_envs)]


@functools.cache
@jax.ensure_compile_time_eval()  # what is kept here outlives the trace that first asks for it
def make(name: str, /, **kwargs: Any) -> Env:
    """Return the environment registered as `name`.

    Args:
        name: one of `names()`.
        kwargs: passed to the environment's constructor, e.g. `size=10` for DeepSea-bsuite.

    Raises:
        InputError: the name or an argument is unknown, the spaces are of a kind that a
            feed-forward agent cannot use, or a member of the environment does not do what gymnax
            asks of it.
        FaultError: the environment needs something that the surroundings lack (a download).
    """
    inner, params = _construct(name, kwargs)
    action_space = _member(name, inner, "action_space", params)
    num_actions, action_shape = _actions(name, inner, action_space)
    obs_space = _member(name, inner, "observation_space", params)
    obs_shape = _observations(name, inner, obs_space)
    env = Env(
        name=name,
        inner=inner,
        default_params=params,
        obs_shape=obs_shape,
        num_actions=num_actions,
        action_shape=action_shape,
        action_size=num_actions or math.prod(action_shape),
        added_limit=_registered[name].max_steps if name in _registered else None,
    )
    if _of_gymnax(inner):  # which the tests try out, and which takes seconds to trace
        return dataclasses.replace(env, truncates=True, limited=True)
    _try_out(env)
    truncates, limited = truncation(env)
    return dataclasses.replace(env, truncates=truncates, limited=limited)


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
    if not overrides:
        return env.default_params
    cast = {name: _as(param_dtype(env, name), value) for name, value in overrides.items()}
    changed = dataclasses.replace(env.default_params, **cast)
    found = {
        name: derived.rule(*(getattr(changed, source) for source in derived.sources))
        for name, derived in _derived(env).items()
    }
    return dataclasses.replace(changed, **found)


def param_dtype(env: Env, name: str) -> np.dtype:
    """Return the type in which the environment's parameter `name` is computed with."""
    stored = np.asarray(getattr(env.default_params, name))
    return np.dtype(jax.dtypes.canonicalize_dtype(stored.dtype))


def traced_types(config: Any) -> Any:
    """Return the type in which each traced value of a configuration is computed with.

    Args:
        config: an agent's configuration.

    Returns:
        NumPy's dtypes, as a pytree of `config`'s structure: float32, but for `env_params`.
    """
    env = from_config(config)
    single = jax.tree.map(lambda _: np.dtype(np.float32), config)
    own = {name: param_dtype(env, name) for name in config.env_params}
    return dataclasses.replace(single, env_params=own)


def horizon(env: Env, overrides: Mapping[str, Any]) -> int | None:
    """Return the number of steps within which every episode ends, where that is known.

    It is known where episodes are truncated as gymnax does it, after `max_steps_in_episode`, or by
    the limit given to `register`. An environment may have rules of its own, or never truncate.

    Args:
        env: the environment.
        overrides: parameter name to scalar.

    Returns:
        The number of steps; None where it is unknown, because the environment has another rule or
        because its parameter is traced.
    """
    limits = [env.added_limit] if env.added_limit else []
    if env.limited:
        own = overrides.get("max_steps_in_episode", env.default_params.max_steps_in_episode)
        if not isinstance(own, jax.core.Tracer):
            limits.append(int(own))
    return min(limits, default=None)


def reset(key: jax.Array, env: Env, params: Any, num_envs: int) -> tuple[jax.Array, EnvState]:
    """Start `num_envs` episodes.

    Returns:
        Observations [N, D] and the state.
    """
    start = jax.vmap(_reset_of(env.inner), in_axes=(0, None))
    obs, inner = start(random.split(key, num_envs), params)
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
        action = action.reshape(-1, *env.action_shape)
    advance = _step_as_wrapped if _has_own_step(env.inner) else _step
    obs, next_obs, inner, reward, terminated, truncated = advance(key, env, state, action, params)
    reward = reward.astype(jnp.float32).reshape(-1)
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


def _step(
    key: jax.Array, env: Env, state: EnvState, action: jax.Array, params: Any
) -> tuple[Any, ...]:
    """Step N environments, resetting only in a step in which an episode ends.

    gymnax's own step resets at every step and then selects. The condition costs nothing where it
    cannot help: under vmap it becomes that select again.
    """
    key_step, key_reset = random.split(key)
    next_obs, stepped, reward, terminated, _ = jax.vmap(
        env.inner.step_env, in_axes=(0, 0, 0, None)
    )(random.split(key_step, action.shape[0]), state.inner, action, params)
    truncated = jax.vmap(env.inner.is_truncated, in_axes=(0, None))(stepped, params)
    terminated, truncated = _flag(terminated), _flag(truncated) | _over(env, state)
    obs, inner = _renewed(key_reset, env, terminated | truncated, next_obs, stepped, params)
    return _flatten(env, obs), _flatten(env, next_obs), inner, reward, terminated, truncated


def _step_as_wrapped(
    key: jax.Array, env: Env, state: EnvState, action: jax.Array, params: Any
) -> tuple[Any, ...]:
    """Step N environments by a `step` of their own, that of a wrapper."""
    key, key_reset = random.split(key) if env.added_limit else (key, key)
    keys = random.split(key, action.shape[0])
    obs, inner, reward, terminated, truncated, info = jax.vmap(
        env.inner.step, in_axes=(0, 0, 0, None)
    )(keys, state.inner, action, params)
    next_obs = _flatten(env, info["final_observation"])
    terminated, truncated = _flag(terminated), _flag(truncated)
    if env.added_limit:  # of which the wrapper, which resets by itself, knows nothing
        cut = _over(env, state) & ~(terminated | truncated)
        obs, inner = _renewed(key_reset, env, cut, obs, inner, params)
        truncated |= cut
    return _flatten(env, obs), next_obs, inner, reward, terminated, truncated


def _flag(value: jax.Array) -> jax.Array:
    """[N] or [N, 1] of any type -> bool [N]."""
    return jnp.reshape(value, -1).astype(bool)


def _over(env: Env, state: EnvState) -> jax.Array | bool:
    """Tell where the step after `state` is the last that `register` allows -> [N]."""
    return state.episode_length + 1 >= env.added_limit if env.added_limit else False


def _renewed(
    key: jax.Array, env: Env, done: jax.Array, obs: Any, state: Any, params: Any
) -> tuple[Any, Any]:
    """Return observations and states [N, ...] that are those of a reset where `done` [N]."""

    def renewed() -> tuple[Any, Any]:
        keys = random.split(key, done.size)
        fresh = jax.vmap(_reset_of(env.inner), in_axes=(0, None))(keys, params)
        return jax.tree.map(functools.partial(_where, done), fresh, (obs, state))

    return jax.lax.cond(done.any(), renewed, lambda: (obs, state))


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
    low, high = (
        jnp.broadcast_to(jnp.asarray(bound, jnp.float32), env.action_shape).reshape(-1)
        for bound in (space.low, space.high)
    )
    return low, high


def to_bounds(env: Env, params: Any, action: jax.Array) -> jax.Array:
    """Map actions [..., A] from [-1, 1] to the bounds of the action space, linearly."""
    low, high = action_bounds(env, params)
    return low + 0.5 * (action + 1.0) * (high - low)


# --- what gymnax asks of an environment ----------------------------------------------------------


def _construct(name: str, kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a gymnax environment and its default parameters."""
    configs.require_known(name, names(), "environment")
    own = _registered.get(name)
    factory = own.factory if own else functools.partial(gymnax.make, name)
    try:
        if own is None and kwargs:
            constructor = inspect.signature(type(gymnax.make(name)[0]))
            for argument in kwargs:
                what = f"env_kwargs name of {name}"
                configs.require_known(argument, constructor.parameters, what)
        made = factory(**kwargs)
        return made if isinstance(made, tuple) else (made, made.default_params)
    except InputError:
        raise
    except OSError as error:
        raise FaultError(f"Environment {name!r} cannot be made here: {error}.") from error
    except Exception as error:
        refused = kwargs and isinstance(error, TypeError | ValueError)
        what = f"refuses env_kwargs {dict(kwargs)}" if refused else "cannot be made"
        raise InputError(f"env {name!r} {what}: {_reason(error)}.") from error


def _member(name: str, inner: Any, member: str, *arguments: Any) -> Any:
    """Call a member of an environment, or say in a sentence that it fails."""
    try:
        return getattr(inner, member)(*arguments)
    except Exception as error:
        raise _refusal(name, inner, member, f"fails with {_reason(error)}") from error


def _refusal(name: str, inner: Any, member: str, what: str) -> InputError:
    """Return an error about a member of an environment's class."""
    return InputError(f"env {name!r}: {member} of {type(inner).__name__} {what}.")


def _reason(error: Exception) -> str:
    """Return an error in one line."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(".") if lines else ""
    return text if type(error) is ValueError and text else f"{type(error).__name__}: {text}"


def _actions(name: str, inner: Any, space: Any) -> tuple[int, tuple[int, ...]]:
    """Return the number of actions (0: they are continuous) and the shape of one."""
    if isinstance(space, spaces.Discrete):
        what = f"is {space}, but an agent needs one action or more"
        configs.require(int(space.n) > 0, str(_refusal(name, inner, "action_space", what)))
        return int(space.n), ()
    if not isinstance(space, spaces.Box):
        what = f"is {space}, but an agent needs a Discrete or a Box of gymnax.environments.spaces"
        raise _refusal(name, inner, "action_space", what)
    shape = _box_shape(name, inner, "action_space", space)
    low, high = (np.broadcast_to(np.asarray(bound), shape) for bound in (space.low, space.high))
    if not (low <= high).all():  # NaN included
        what = f"is {space}, but low must not exceed high"
        raise _refusal(name, inner, "action_space", what)
    return 0, shape


def _observations(name: str, inner: Any, space: Any) -> tuple[int, ...]:
    """Return the shape of an observation; one that is an index becomes one-hot."""
    if isinstance(space, spaces.Discrete):
        what = f"is {space}, but an agent needs one observation or more"
        configs.require(int(space.n) > 0, str(_refusal(name, inner, "observation_space", what)))
        return (int(space.n),)
    if isinstance(space, spaces.Box):
        return _box_shape(name, inner, "observation_space", space) or (1,)
    what = f"is {space}, but an agent needs a Discrete or a Box of gymnax.environments.spaces"
    raise _refusal(name, inner, "observation_space", what)


def _box_shape(name: str, inner: Any, member: str, space: Any) -> tuple[int, ...]:
    """Return the shape of a Box, where it has one with elements; a number stands for one axis."""
    try:
        shape = tuple(int(size) for size in np.atleast_1d(np.asarray(space.shape, int)))
        for bound in (space.low, space.high):
            np.broadcast_to(np.asarray(bound), shape)
    except (TypeError, ValueError) as error:
        what = f"is {space!r}, whose bounds and shape do not fit: {_reason(error)}"
        raise _refusal(name, inner, member, what) from error
    if not all(size > 0 for size in shape):
        raise _refusal(name, inner, member, f"is {space}, which is empty")
    return shape


def _has_own_step(inner: Any) -> bool:
    """Tell whether an environment steps by something else than gymnax's own `step`."""
    return getattr(type(inner), "step", None) is not environment.Environment.step


def _reset_of(inner: Any) -> Callable[..., Any]:
    """Return what starts an episode.

    gymnax's own `reset` is `reset_env` in a program of its own, in which no parameter is constant.
    """
    own = getattr(type(inner), "reset", None) is not environment.Environment.reset
    return inner.reset if own else inner.reset_env


def _layers(inner: Any) -> list[Any]:
    """Return an environment's wrappers of gymnax, the outermost first, and what is in them."""
    layers = [inner]
    while "_env" in getattr(layers[-1], "__dict__", ()):
        layers.append(layers[-1]._env)
    return layers


def _of_gymnax(inner: Any) -> bool:
    """Tell whether an environment is gymnax's own, in whatever wrappers of gymnax."""
    return all(type(layer).__module__.split(".")[0] == "gymnax" for layer in _layers(inner))


def _traced(env: Env, member: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the shapes of what a member of an environment returns."""
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        what = f"fails with {_reason(error)}"
        raise _refusal(env.name, env.inner, member, what) from error


def _try_out(env: Env) -> None:
    """Trace a reset and a step, and refuse what no agent could be trained on."""
    name, inner, key = env.name, env.inner, random.key(0)
    reset, own = _reset_of(inner), _has_own_step(inner)
    started = _traced(env, reset.__name__, lambda key: reset(key, env.default_params), key)
    if not isinstance(started, tuple) or len(started) != 2:
        raise _refusal(name, inner, reset.__name__, "must return (obs, state)")
    obs, state = started
    _refuse_obs(env, reset.__name__, obs)
    member, wanted = ("step", STEP) if own else ("step_env", STEP_ENV)
    kind = jnp.int32 if env.discrete else jnp.float32
    action = jax.ShapeDtypeStruct(env.action_shape, kind)
    call = getattr(inner, member)
    step = _traced(env, member, lambda *x: tuple(call(*x, env.default_params)), key, state, action)
    if len(step) != len(wanted.split(",")):
        what = f"returns {len(step)} values, but gymnax 1.0 expects {wanted}"
        raise _refusal(name, inner, member, what)
    if own and "final_observation" not in step[-1]:
        what = "must put 'final_observation' into info, as every wrapper of gymnax does"
        raise _refusal(name, inner, member, what)
    _refuse_obs(env, member, step[-1]["final_observation"] if own else step[0])
    for value, what in zip(step[2:-1], wanted.strip("()").split(", ")[2:-1], strict=True):
        if getattr(value, "size", 0) != 1:
            raise _refusal(name, inner, member, f"must return one number as {what}")
    _refuse_state(env, member, state, step[1])
    if not own:
        rule = _traced(
            env, "is_truncated", lambda s: inner.is_truncated(s, env.default_params), state
        )
        if getattr(rule, "size", 0) != 1:
            raise _refusal(name, inner, "is_truncated", "must return one true or false")


def _refuse_obs(env: Env, member: str, obs: Any) -> None:
    """Raise unless an observation is one array, as large as the observation space says."""
    wanted = f"must return observations of shape {list(env.obs_shape)} as observation_space says"
    if not hasattr(obs, "shape"):
        what = f"{wanted}, but returns a {type(obs).__name__}"
        raise _refusal(env.name, env.inner, member, what)
    index = isinstance(env.inner.observation_space(env.default_params), spaces.Discrete)
    if obs.size != (1 if index else env.obs_size):
        what = f"{wanted}, but returns {list(obs.shape)}"
        raise _refusal(env.name, env.inner, member, what)


def _refuse_state(env: Env, member: str, before: Any, after: Any) -> None:
    """Raise unless a step leaves the structure and the types of a state as they are."""
    starts, ends = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (before, after))
    if starts.keys() != ends.keys():
        what = "must return a state of the structure that a reset returns"
        raise _refusal(env.name, env.inner, member, what)
    for path, old in starts.items():
        new = ends[path]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            what = (
                f"must leave state{jax.tree_util.keystr(path)} {old.dtype}{list(old.shape)} as a "
                f"reset returns it, but makes it {new.dtype}{list(new.shape)}"
            )
            raise _refusal(env.name, env.inner, member, what)


def truncation(env: Env) -> tuple[bool, bool]:
    """Tell whether an environment ever truncates, and whether by gymnax's own rule.

    Both are read off the traced step: what never truncates does not look at its state for it, and
    gymnax's rule is in force where it was not overridden and its limit reaches the outcome.

    Args:
        env: whose `truncates` and `limited` do not count.

    Returns:
        `truncates` and `limited`.
    """
    inner, key, name = env.inner, random.key(0), "max_steps_in_episode"
    _, state = jax.eval_shape(lambda key: _reset_of(inner)(key, env.default_params), key)
    action = jax.ShapeDtypeStruct(env.action_shape, jnp.int32 if env.discrete else jnp.float32)
    held = name in {field.name for field in _fields(env)}

    def truncated(state: Any, limit: Any, key: jax.Array, action: jax.Array) -> Any:
        own = env.default_params
        params = dataclasses.replace(own, **{name: limit}) if held else own
        if _has_own_step(inner):
            return inner.step(key, state, action, params)[4]
        return inner.is_truncated(state, params)

    limit = _as(param_dtype(env, name), getattr(env.default_params, name)) if held else 0
    used = _used(jax.make_jaxpr(truncated)(state, limit, key, action))
    leaves = len(jax.tree.leaves(state))
    rule = getattr(type(_layers(inner)[-1]), "is_truncated", None)
    standard = held and rule is environment.Environment.is_truncated and used[leaves]
    return any(used[:leaves]), standard


def _used(program: Any) -> list[bool]:
    """Tell of each input of a traced program whether an output depends on it."""
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return used


def _flatten(env: Env, obs: jax.Array) -> jax.Array:
    """[N, ...] -> [N, D] float32; an observation that is an index becomes one-hot."""
    if isinstance(env.inner.observation_space(env.default_params), spaces.Discrete):
        return jax.nn.one_hot(obs.reshape(-1), env.obs_size)
    return obs.reshape(obs.shape[0], -1).astype(jnp.float32)


# --- parameters ----------------------------------------------------------------------------------


def _as(dtype: np.dtype, value: Any) -> jax.Array:
    """Return a number, traced or not, as a scalar of a type, whole numbers without rounding."""
    return jnp.asarray(value if isinstance(value, jax.Array) else np.asarray(value, dtype), dtype)


def _derived(env: Env) -> dict[str, Derived]:
    """Return the parameters of an environment that follow from others."""
    known = {field.name for field in _fields(env)}
    return {
        name: derived
        for name, derived in DERIVED.items()
        if {name, *derived.sources} <= known and _holds(env, name, derived)
    }


def _holds(env: Env, name: str, derived: Derived) -> bool:
    """Tell whether the default parameters follow the rule."""
    values = [getattr(env.default_params, source) for source in derived.sources]
    stored = getattr(env.default_params, name)
    return bool(np.isclose(np.float32(stored), np.float32(derived.rule(*values)), rtol=1e-5))


def _fields(env: Env) -> tuple[Any, ...]:
    """Return the fields of an environment's parameters."""
    held = dataclasses.is_dataclass(env.default_params)
    return dataclasses.fields(env.default_params) if held else ()


def _check_param(env: Env, name: str, value: Any) -> None:
    configs.require_known(name, [f.name for f in _fields(env)], f"env_params field of {env.name}")
    default = np.asarray(getattr(env.default_params, name))
    if name in _derived(env):
        raise InputError(
            f"env_params.{name} of {env.name} follows from its other parameters; set those."
        )
    for stored, derived in DERIVED.items():
        stale = name in derived.sources and stored in {field.name for field in _fields(env)}
        if stale and stored not in _derived(env):
            raise InputError(
                f"env_params.{name} of {env.name} cannot be set: its {stored} should follow from "
                f"{' and '.join(derived.sources)}, but its default does not."
            )
    if default.ndim > 0:
        raise InputError(f"env_params.{name} of {env.name} is an array and cannot be set.")
    if default.dtype.kind not in "biuf":
        raise InputError(f"env_params.{name} of {env.name} is not a number and cannot be set.")
    if default.dtype.kind == "b" and value not in (0, 1):
        raise InputError(f"env_params.{name} must be true or false, but is {value!r}.")
    if default.dtype.kind in "iu":
        _check_whole(name, value, np.iinfo(param_dtype(env, name)))
    elif not abs(value) <= float(np.finfo(np.float32).max):  # NaN included
        raise InputError(f"env_params.{name} must be finite, but is {value!r}.")
    if name == "max_steps_in_episode" and value < 1:
        raise InputError(f"env_params.{name} must be 1 or more, but is {value!r}.")
    if not changes_transitions(env, name):
        raise InputError(f"env_params.{name} changes no transition of {env.name}; leave it out.")


def _check_whole(name: str, value: Any, limits: np.iinfo) -> None:
    """Raise unless a value is a whole number that the parameter's type can hold."""
    if not abs(value) < np.inf or value % 1 != 0:
        raise InputError(f"env_params.{name} must be a whole number, but is {value!r}.")
    if not limits.min <= value <= limits.max:
        raise InputError(
            f"env_params.{name} must be between {limits.min} and {limits.max}, but is {value!r}."
        )


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
    default = _as(param_dtype(env, name), getattr(env.default_params, name))
    try:
        program = jax.make_jaxpr(functools.partial(_seen, env, name))(default)
    except Exception as error:  # jax has a dozen of kinds for a tracer where a constant must stand
        raise InputError(
            f"env_params.{name} of {env.name} decides the shape of the program, so it cannot be "
            f"a traced value ({type(error).__name__})."
        ) from error
    return _used(program)[0]
