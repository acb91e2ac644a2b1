"""Environments: N side by side, with flat float32 observations [N, D].

Every step reports `terminated` and `truncated` separately, and `next_obs`, the observation before
any reset. `interface` has the types and `gymnax` adapts that library. `masked` is an environment of
our own. `parameters` checks the parameters that a sweep changes, `tracing` tries out a user's
environment, `pictures` draws.

An environment is one of gymnax's, one that `register` has made known, or "MODULE:CLASS" for a class
in a module of the user's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from purejaxpg import config as configs
from purejaxpg import modules
from purejaxpg.envs import gymnax, libraries, masked, parameters, tracing
from purejaxpg.envs.gymnax import action_bounds, reset, step
from purejaxpg.envs.interface import Env, EnvState, Step, episode_metrics, horizon, restarted
from purejaxpg.envs.parameters import param_dtype, params
from purejaxpg.envs.tracing import changes_transitions

__all__ = [
    "Env", "EnvState", "Step", "action_bounds", "changes_transitions", "check", "episode_metrics",
    "from_config", "horizon", "is_foreign", "is_own",
    "make", "names", "param_dtype", "params", "register",
    "require_bounded", "reset", "restarted", "setup", "step", "to_bounds", "traced_types",
]  # fmt: skip

# Factory and time limit of each environment that is not gymnax's.
_registered: dict[str, tuple[Callable[..., Any], int | None]] = {
    masked.NAME: (masked.MaskedCartPole, None)
}


def register(name: str, factory: Callable[..., Any], max_steps: int | None = None) -> None:
    """Make `factory(**kwargs)` known as `name`.

    Call it in a module that `--import` names, or at the top of a forked agent file. Programs that
    were compiled for an earlier environment of the same name do not change.

    Args:
        name: the value of `config.env`.
        factory: returns a gymnax `Environment`, or one and its parameters, as `gymnax.make` does.
        max_steps: truncate episodes after this many steps, for an environment without a limit.
    """
    configs.require(
        max_steps is None or max_steps > 0,
        f"max_steps of env {name!r} must be 1 or more, but is {max_steps}.",
    )
    _registered[name] = factory, max_steps
    make.cache_clear()


def names() -> list[str]:
    """Return the names of all registered environments."""
    return list(dict.fromkeys([*gymnax.names(), *_registered]))


@functools.cache
@jax.ensure_compile_time_eval()  # the cached environment outlives the trace that first makes it
def make(name: str, /, **kwargs: Any) -> Env:
    """Return the environment called `name`.

    Args:
        name: one of `names()`, or "MODULE:CLASS", where the module may be the path of a file and
            the class anything that returns a gymnax environment, or one and its parameters.
        kwargs: passed to the environment's constructor, e.g. `size=10` for DeepSea-bsuite.

    Raises:
        InputError: the name or an argument is unknown, a feed-forward agent cannot use the spaces,
            or a member of the environment breaks gymnax's contract.
        FaultError: the environment needs a download that failed.
    """
    factory, limit = _find(name)
    env = gymnax.make(name, factory, kwargs, limit)
    adapted = hasattr(env.inner, "packages")
    # The tests try out those of gymnax and of this package; tracing them takes seconds.
    if gymnax.is_from_gymnax(env.inner) and not adapted:
        return dataclasses.replace(env, truncates=True, limited=True)
    tracing.try_out(env)
    if adapted and not env.on_host:
        return dataclasses.replace(env, truncates=True, limited=True)
    truncates, limited = tracing.truncation(env)
    return dataclasses.replace(env, truncates=truncates, limited=limited)


def _find(name: str) -> tuple[Callable[..., Any] | None, int | None]:
    """Return what constructs an environment, None for gymnax's own, and its added time limit."""
    if name in _registered:
        return _registered[name]
    if libraries.is_library(name):
        return libraries.factory(name), None
    if is_own(name):
        factory = modules.attribute(name)
        configs.require(callable(factory), f"env {name!r} must be a class, but is {factory!r}.")
        return factory, None
    configs.require_known(name, names(), "environment")
    return None, None


def is_foreign(name: str) -> bool:
    """Return whether an environment is neither gymnax's nor of this package."""
    return name in _registered or ":" in name


def is_own(name: str) -> bool:
    """Return whether an environment is called "MODULE:CLASS", by a module of the user's."""
    known = name in _registered or libraries.is_library(name)
    return not known and modules.is_attribute(name)


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
        parameters.check(env, name, value)
        configs.require(
            changes_transitions(env, name),
            f"env_params.{name} changes no transition of {env.name}; leave it out.",
        )
    noise = getattr(config, "initial_log_std", 0.0)
    configs.require(
        not env.discrete or noise == 0.0,
        f"initial_log_std {noise} is for the Gaussian policy of continuous actions; "
        f"those of {env.name} are discrete.",
    )
    return env


def require_bounded(config: Any, agent: str) -> None:
    """Require continuous actions between finite bounds, for an agent that squashes its actions."""
    env, env_params = setup(config)
    configs.require(
        not env.discrete,
        f"env {env.name!r} has discrete actions, but {agent} needs continuous ones, such as those "
        "of Pendulum-v1.",
    )
    low, high = (np.asarray(bound) for bound in action_bounds(env, env_params))
    configs.require(
        bool(np.isfinite([low, high]).all() and (low < high).all()),
        f"env {env.name!r} has actions between {low.tolist()} and {high.tolist()}, but {agent} "
        "needs finite bounds, the lower below the upper.",
    )


def traced_types(config: Any) -> Any:
    """Return the type in which programs hold each traced value of a configuration.

    Args:
        config: an agent's configuration.

    Returns:
        NumPy's dtypes, as a pytree of `config`'s structure: float32, but for `env_params`.
    """
    env = from_config(config)
    single = jax.tree.map(lambda _: np.dtype(np.float32), config)
    own = {name: param_dtype(env, name) for name in config.env_params}
    return dataclasses.replace(single, env_params=own)


def to_bounds(env: Env, params: Any, action: jax.Array) -> jax.Array:
    """Map actions [..., A] from [-1, 1] to the bounds of the action space, linearly."""
    low, high = action_bounds(env, params, action.ndim)
    return low + 0.5 * (action + 1.0) * (high - low)
