"""Facts about an environment that are read off its traced programs, without running them.

An environment that is not gymnax's own is tried out in this way before an agent sees it, so that
a mistake in it is one sentence and not an error inside a scan.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jax.interpreters import partial_eval

from purejaxpg import InputError, backend
from purejaxpg.envs import gymnax, parameters
from purejaxpg.envs.interface import Env, EnvState

# The values that gymnax 1.0 expects of a step, in the words of its documentation.
STEP = "(obs, state, reward, terminated, truncated, info)"
STEP_ENV = "(obs, state, reward, terminated, info)"


def try_out(env: Env) -> None:
    """Trace a reset and a step, and refuse an environment that no agent could be trained on.

    Raises:
        InputError: a member of the environment's class breaks gymnax's contract.
    """
    inner, key, defaults = env.inner, random.key(0), env.default_params
    reset, own = gymnax.reset_of(inner), gymnax.has_own_step(inner)
    first = _traced(env, reset.__name__, lambda key: reset(key, defaults), key)
    pair = isinstance(first, tuple) and len(first) == 2
    _require(pair, env, reset.__name__, "must return (obs, state)")
    obs, state = first
    _check_obs(env, reset.__name__, obs)
    member, wanted = ("step", STEP) if own else ("step_env", STEP_ENV)
    call, action = getattr(inner, member), jax.ShapeDtypeStruct(env.action_shape, env.action_dtype)
    step = _traced(env, member, lambda *x: tuple(call(*x, defaults)), key, state, action)
    problem = f"returns {len(step)} values, but gymnax 1.0 expects {wanted}"
    _require(len(step) == len(wanted.split(",")), env, member, problem)
    problem = "must put 'final_observation' into info, as every wrapper of gymnax does"
    _require(not own or "final_observation" in step[-1], env, member, problem)
    _check_obs(env, member, step[-1]["final_observation"] if own else step[0])
    for value, name in zip(step[2:-1], wanted.strip("()").split(", ")[2:-1], strict=True):
        _require(getattr(value, "size", 0) == 1, env, member, f"must return one number as {name}")
    _check_state(env, member, state, step[1])
    if not own:
        rule = _traced(env, "is_truncated", lambda s: inner.is_truncated(s, defaults), state)
        single = getattr(rule, "size", 0) == 1
        _require(single, env, "is_truncated", "must return one true or false")


def _require(condition: bool, env: Env, member: str, problem: str) -> None:
    if not condition:
        raise gymnax.refusal(env.name, env.inner, member, problem)


@backend.foreign()
def _traced(env: Env, member: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the shapes of the values that a member of an environment returns."""
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:
        problem = f"fails with {gymnax.reason(error)}"
        raise gymnax.refusal(env.name, env.inner, member, problem) from error


def _check_obs(env: Env, member: str, obs: Any) -> None:
    """Raise unless an observation is one array of the size that the observation space says."""
    wanted = f"must return observations of shape {list(env.obs_shape)} as observation_space says"
    is_array, size = hasattr(obs, "shape"), 1 if env.index_observed else env.obs_size
    returned = list(obs.shape) if is_array else f"a {type(obs).__name__}"
    fits = is_array and obs.size == size
    _require(fits, env, member, f"{wanted}, but returns {returned}")


def _check_state(env: Env, member: str, before: Any, after: Any) -> None:
    """Raise unless a step keeps the structure and the types of a state."""
    starts, ends = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (before, after))
    problem = "must return a state of the structure that a reset returns"
    _require(starts.keys() == ends.keys(), env, member, problem)
    for path, old in starts.items():
        was, new = f"{old.dtype}{list(old.shape)}", f"{ends[path].dtype}{list(ends[path].shape)}"
        leaf = f"must leave state{jax.tree_util.keystr(path)} {was} as a reset returns it"
        _require(was == new, env, member, f"{leaf}, but makes it {new}")


@backend.foreign()
def truncation(env: Env) -> tuple[bool, bool]:
    """Return whether an environment ever truncates, and whether it does so by gymnax's own rule.

    An environment that never truncates does not read its state to decide. gymnax's rule is in
    force if it is not overridden and its limit reaches the outcome.

    Args:
        env: its fields `truncates` and `limited` are ignored.

    Returns:
        `truncates` and `limited`.
    """
    inner, key, name = env.inner, random.key(0), "max_steps_in_episode"
    _, state = jax.eval_shape(lambda key: gymnax.reset_of(inner)(key, env.default_params), key)
    has_limit = name in env.param_names

    def truncated(state: Any, limit: Any, key: jax.Array, action: jax.Array) -> Any:
        own = env.default_params
        params = dataclasses.replace(own, **{name: limit}) if has_limit else own
        if gymnax.has_own_step(inner):
            return inner.step(key, state, action, params)[4]
        return inner.is_truncated(state, params)

    limit = _default(env, name) if has_limit else 0
    action = jax.ShapeDtypeStruct(env.action_shape, env.action_dtype)
    used = _used(jax.make_jaxpr(truncated)(state, limit, key, action))
    leaves = len(jax.tree.leaves(state))
    standard = has_limit and not gymnax.has_own_truncation(inner) and used[leaves]
    return any(used[:leaves]), standard


@functools.cache
def changes_transitions(env: Env, name: str) -> bool:
    """Return whether any observation, reward or end of an episode depends on the parameter `name`.

    A parameter that matters only in rare states counts, because nothing is run.

    Raises:
        InputError: the parameter decides the shape of the program and cannot be a traced value.
    """
    try:
        program = jax.make_jaxpr(functools.partial(_play, env, name))(_default(env, name))
    except Exception as error:  # jax has a dozen kinds of error for a tracer used as a constant
        raise InputError(
            f"env_params.{name} of {env.name} decides the shape of the program, so it cannot be "
            f"a traced value ({type(error).__name__})."
        ) from error
    return _used(program)[0]


def _play(env: Env, name: str, value: jax.Array) -> tuple[Any, ...]:
    """Play two steps with parameter `name` at `value` -> everything that an agent sees of them.

    The steps are scanned, so that a field of the state counts only if it reaches an output.
    """
    params = parameters.params(env, {name: value})
    obs, state = gymnax.reset(random.key(0), env, params, 1)
    action = jnp.zeros((1,) if env.discrete else (1, env.action_size), env.action_dtype)

    def advance(state: EnvState, key: jax.Array) -> tuple[EnvState, tuple[Any, ...]]:
        obs, state, outcome = gymnax.step(key, env, state, action, params)
        return state, (obs, outcome)

    return obs, jax.lax.scan(advance, state, random.split(random.key(1), 2))[1]


def _default(env: Env, name: str) -> jax.Array:
    """Return the default of a parameter in the type in which programs hold it."""
    default = getattr(env.default_params, name)
    return parameters.as_scalar(parameters.param_dtype(env, name), default)


def _used(program: Any) -> list[bool]:
    """Return for each input of a traced program whether an output depends on it."""
    _, used = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars))
    return used
