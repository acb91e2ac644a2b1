"""Parameters of an environment: their types, those that follow from others, valid values."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxpg import InputError
from purejaxpg import config as configs
from purejaxpg.envs.interface import Env


@dataclasses.dataclass(frozen=True)
class Derived:
    """A parameter that an environment stores although others determine it."""

    sources: tuple[str, ...]
    rule: Callable[..., Any]  # of the values of `sources`


# CartPole's, by field. If they kept their defaults, a changed mass would change nothing, or only
# one term of the equations. Subclasses and wrappers with these fields follow the same rules.
DERIVED = {
    "total_mass": Derived(("masscart", "masspole"), lambda cart, pole: cart + pole),
    "polemass_length": Derived(("masspole", "length"), lambda pole, length: pole * length),
}


def params(env: Env, overrides: Mapping[str, Any]) -> Any:
    """Return the environment's parameters with `overrides`, and recompute derived ones.

    Args:
        env: the environment.
        overrides: parameter name to scalar; traced values are fine.

    Returns:
        The environment's own `EnvParams`.
    """
    if not overrides:
        return env.default_params
    cast = {name: as_scalar(param_dtype(env, name), value) for name, value in overrides.items()}
    changed = dataclasses.replace(env.default_params, **cast)
    derived = {
        name: follows.rule(*(getattr(changed, source) for source in follows.sources))
        for name, follows in _derived(env).items()
    }
    return dataclasses.replace(changed, **derived)


def param_dtype(env: Env, name: str) -> np.dtype:
    """Return the type in which programs hold the environment's parameter `name`."""
    stored = np.asarray(getattr(env.default_params, name))
    return np.dtype(jax.dtypes.canonicalize_dtype(stored.dtype))


def as_scalar(dtype: np.dtype, value: Any) -> jax.Array:
    """Return a number, traced or not, as a scalar of a type; whole numbers are not rounded."""
    return jnp.asarray(value if isinstance(value, jax.Array) else np.asarray(value, dtype), dtype)


def _derived(env: Env) -> dict[str, Derived]:
    """Return the parameters of an environment that follow from others, in its defaults too."""
    return {
        name: derived
        for name, derived in DERIVED.items()
        if {name, *derived.sources} <= set(env.param_names) and _holds(env, name, derived)
    }


def _holds(env: Env, name: str, derived: Derived) -> bool:
    values = [getattr(env.default_params, source) for source in derived.sources]
    stored = getattr(env.default_params, name)
    return bool(np.isclose(np.float32(stored), np.float32(derived.rule(*values)), rtol=1e-5))


def check(env: Env, name: str, value: Any) -> None:
    """Raise an InputError unless the parameter `name` exists and can have this value."""
    configs.require_known(name, env.param_names, f"env_params field of {env.name}")
    field, own = f"env_params.{name}", f"env_params.{name} of {env.name}"
    followed = _derived(env)
    if name in followed:
        raise InputError(f"{own} follows from its other parameters; set those.")
    for stored, derived in DERIVED.items():
        if name in derived.sources and stored in env.param_names and stored not in followed:
            raise InputError(
                f"{own} cannot be set: its {stored} should follow from "
                f"{' and '.join(derived.sources)}, but its default does not."
            )
    default = np.asarray(getattr(env.default_params, name))
    kind = default.dtype.kind
    configs.require(default.ndim == 0, f"{own} is an array and cannot be set.")
    configs.require(kind in "biuf", f"{own} is not a number and cannot be set.")
    if kind == "b":
        configs.require(value in (0, 1), f"{field} must be true or false, but is {value!r}.")
    elif kind in "iu":
        _check_whole(field, value, np.iinfo(param_dtype(env, name)))
    else:  # NaN is not at most anything
        finite = abs(value) <= float(np.finfo(np.float32).max)
        configs.require(finite, f"{field} must be finite, but is {value!r}.")
    configs.require(
        name != "max_steps_in_episode" or value >= 1,
        f"{field} must be 1 or more, but is {value!r}.",
    )


def _check_whole(field: str, value: Any, limits: np.iinfo) -> None:
    """Require a whole number that the parameter's type can hold."""
    whole = abs(value) < np.inf and value % 1 == 0
    configs.require(whole, f"{field} must be a whole number, but is {value!r}.")
    configs.require(
        limits.min <= value <= limits.max,
        f"{field} must be between {limits.min} and {limits.max}, but is {value!r}.",
    )
