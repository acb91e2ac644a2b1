"""Configurations: frozen dataclasses whose floats are traced and whose other fields are static.

One rule decides which fields a sweep may batch inside one compiled program. A program reads a field
annotated `float` at run time. A field of any other type is part of the program, so a new value
means a new compilation. `env_params` is the only exception: its values are traced, its set of names
is static. A setting that is off is a number (0.0 or inf), never None.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from purejaxpg import InputError

T = TypeVar("T")

TRACED = (float, dict[str, float])


@typing.dataclass_transform(frozen_default=True)
def dataclass(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a pytree whose leaves are its traced fields.

    Args:
        cls: a class with annotated fields and defaults.

    Returns:
        The dataclass, registered with jax.
    """
    import jax  # here, so that sweep files can be read without it

    cls = dataclasses.dataclass(frozen=True)(cls)
    hints = field_types(cls)
    traced = [name for name, hint in hints.items() if hint in TRACED]
    static = [name for name in hints if name not in traced]
    return jax.tree_util.register_dataclass(cls, data_fields=traced, meta_fields=static)


def field_types(cls: Any) -> dict[str, Any]:
    """Return the type of each field, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def build(cls: type[T], values: Mapping[str, Any], what: str = "field", prefix: str = "") -> T:
    """Make a configuration from the plain values of a TOML file or the command line.

    Args:
        cls: the agent's `Config`.
        values: field name to value; missing fields keep their default.
        what: the kind of thing that the names are, for messages.
        prefix: stands before a name in messages.

    Returns:
        The configuration. Its values have the right types; the agent's `check` checks the rest.

    Raises:
        InputError: an unknown field or a value of the wrong type.
    """
    hints = field_types(cls)
    for name in values:
        require_known(name, hints, what)
    coerced = {name: coerce(f"{prefix}{name}", hints[name], values[name]) for name in values}
    return cls(**coerced)


def coerce(name: str, hint: Any, value: Any) -> Any:
    """Return a value as the type of a field.

    Args:
        name: the field, for the message.
        hint: its type.
        value: as TOML or the command line has it.

    Raises:
        InputError: the value is not of that type.
    """
    if hint is float and is_number(value):
        return float(value)
    if hint is int and is_number(value) and math.isfinite(value) and value == int(value):
        return int(value)
    if hint in (bool, str) and type(value) is hint:
        return value
    if name == "env_kwargs" and isinstance(value, Mapping):
        return tuple((key, coerce_env_kwarg(key, item)) for key, item in sorted(value.items()))
    if name == "env_params" and isinstance(value, Mapping):
        return {key: coerce_env_param(key, item) for key, item in sorted(value.items())}
    is_list = typing.get_origin(hint) is tuple and name != "env_kwargs"
    if is_list and isinstance(value, list | tuple):
        element = typing.get_args(hint)[0]
        return tuple(coerce(f"{name}[{i}]", element, item) for i, item in enumerate(value))
    wanted = describe(hint)
    if wanted is None:
        kind = hint.__name__ if isinstance(hint, type) else str(hint)
        raise InputError(
            f"{name} cannot be set or swept, because it is annotated {kind}: only float, int, "
            "bool, str and tuples of these can; what is off is a number, such as 0.0 or inf."
        )
    raise InputError(f"{name} must be {wanted}, but is {value!r}.")


def coerce_env_kwarg(name: str, value: Any) -> Any:
    """Return one argument of the environment's constructor as a hashable value."""
    if isinstance(value, list | tuple):
        return tuple(coerce_env_kwarg(name, item) for item in value)
    if isinstance(value, bool | str) or is_number(value):
        return value
    raise InputError(
        f"env_kwargs.{name} must be a number, true, false, a string or a list, but is {value!r}."
    )


def coerce_env_param(name: str, value: Any) -> float | int | bool:
    """Return one environment parameter as a number, as an int if it is whole: 20.0 equals 20."""
    if isinstance(value, bool):
        return value
    if is_number(value) and math.isfinite(value):
        return int(value) if abs(value) < 2**53 and value == int(value) else value
    raise InputError(f"env_params.{name} must be a finite number, but is {value!r}.")


def canonical(cls: type, name: str, value: Any) -> Any:
    """Return a value in the form that a field of `cls` holds, so that equal settings hash alike.

    Args:
        cls: an agent's `Config`.
        name: a field, or `env_params.NAME` or `env_kwargs.NAME`.
        value: as TOML has it, such as 1 for a field that is a float.

    Returns:
        The value, JSON-able: a list if the field is a tuple.

    Raises:
        InputError: the value is not of the field's type.
    """
    outer, dot, inner = name.partition(".")
    if dot and outer in ("env_params", "env_kwargs"):
        return dict(coerce(outer, field_types(cls)[outer], {inner: value}))[inner]
    coerced = coerce(name, field_types(cls)[name], value)
    return list(coerced) if isinstance(coerced, tuple) else coerced


def parse(name: str, hint: Any, words: list[str]) -> Any:
    """Read the words that follow `--name` on a command line as a value for `coerce`.

    A list may be written as 64 64, as 64,64, as "[64, 64]" or as "(64, 64)".
    """
    if typing.get_origin(hint) is tuple:
        items = " ".join(words).strip("[]() ").replace(",", " ").split()
        return [parse(name, typing.get_args(hint)[0], [item]) for item in items]
    word = " ".join(words)
    if hint is str:
        return word
    if hint is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    return parse_number(word)


def parse_number(word: str) -> float | int | str:
    """Return `word` as a number, or unchanged if it is not one."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or float that is not NaN (and not a bool).

    A whole number too large for a float does not count: no program can hold it.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == value and (isinstance(value, float) or abs(value) <= sys.float_info.max)


def describe(hint: Any) -> str | None:
    """Name a field's type in words; return None if no plain value has it."""
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a string"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[0] in words:
        return f"a list, each item {words[typing.get_args(hint)[0]]}"
    if hint in (dict[str, float], tuple[tuple[str, Any], ...]):
        return "a table of names and values"
    return "a list" if typing.get_origin(hint) is tuple else None


def require_known(name: str, known: Iterable[str], what: str) -> None:
    """Raise an InputError that offers the nearest name, unless `name` is known.

    Args:
        name: the name that the user gave.
        known: all valid names.
        what: the kind of thing that it names, such as "field".
    """
    names = list(known)
    if name in names:
        return
    near = nearest(name, names)
    hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(names)}."
    raise InputError(f"There is no {what} {name!r}; {hint}")


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that a user may have meant: PPO is ppo, trian is train, lr is learning_rate.

    Case does not count. An abbreviation is the first letters of all words of a name.
    """
    lower = {known.lower(): known for known in names}
    initials = {"".join(word[:1] for word in known.split("_")): known for known in lower}
    if name.lower() in lower:
        return lower[name.lower()]
    if len(name) > 1 and name.lower() in initials:
        return lower[initials[name.lower()]]
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return lower[near[0]] if near else None


def require(condition: bool, message: str) -> None:
    """Raise an InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def _each(config: Any, names: Iterable[str], valid: Callable[[Any], bool], wanted: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(valid(value), f"{name} must be {wanted}, but is {value}.")


def at_least(config: Any, minimum: float, *names: str) -> None:
    """Require that each named field is `minimum` or more."""
    _each(config, names, lambda value: value >= minimum, f"{minimum} or more")


def at_most(config: Any, maximum: float, *names: str) -> None:
    """Require that each named field is `maximum` or less."""
    _each(config, names, lambda value: value <= maximum, f"{maximum} or less")


def above(config: Any, bound: float, *names: str) -> None:
    """Require that each named field is more than `bound`."""
    _each(config, names, lambda value: value > bound, f"more than {bound}")


def between(config: Any, low: float, high: float, *names: str) -> None:
    """Require that each named field lies in [low, high]."""
    _each(config, names, lambda value: low <= value <= high, f"between {low} and {high}")


def finite(config: Any, *names: str) -> None:
    """Require that each named field is a finite number, in the float32 that a program computes in.

    Its magnitude is bounded from below too: 1e-300 would become zero, and its logarithm -inf.
    """

    def valid(value: float) -> bool:
        return value == 0.0 or 1.2e-38 <= abs(value) <= 3.4e38

    _each(config, names, valid, "finite in single precision")


# The range of each field whose name means the same in every agent, including forks.
AT_LEAST = {
    0: (
        "learning_rate", "critic_learning_rate", "clip_eps", "vf_clip_eps", "vf_coef", "ent_coef",
        "cg_damping", "noise_std", "beta", "center_coef", "missing_eos_penalty",
    ),
    1: (
        "num_envs", "num_steps", "num_epochs", "num_minibatches", "num_gradient_steps",
        "batch_size", "random_action_repeat", "cg_iters", "num_layers", "num_heads", "num_kv_heads",
        "mlp_width",
    ),
}  # fmt: skip
ABOVE_ZERO = (
    "learning_rate_half_life", "max_grad_norm", "max_kl", "clip_obs", "clip_reward", "reward_scale",
    "tau", "shrink", "alpha", "kl_coef", "target_kl", "temperature", "kl_horizon",
)  # fmt: skip
IN_UNIT_INTERVAL = (
    "gamma", "gae_lambda", "tau", "ou_theta", "shrink", "target_entropy_ratio",
)  # fmt: skip
# Fields in which infinity does not mean that something is off.
FINITE = (
    "learning_rate", "critic_learning_rate", "vf_coef", "ent_coef", "kl_coef", "target_kl", "alpha",
    "cg_damping", "noise_std", "reward_scale", "initial_log_std", "target_entropy_per_dim", "beta",
    "temperature", "center_coef", "missing_eos_penalty",
)  # fmt: skip


def in_range(config: Any) -> None:
    """Require that each field with one of the standard names is in that name's range."""
    present = field_types(type(config))

    def own(names: Iterable[str]) -> list[str]:
        return [name for name in names if name in present]

    for minimum, names in AT_LEAST.items():
        at_least(config, minimum, *own(names))
    above(config, 0, *own(ABOVE_ZERO))
    between(config, 0, 1, *own(IN_UNIT_INTERVAL))
    between(config, -20, 20, *own(["initial_log_std"]))
    finite(config, *own(FINITE))
    whole = (name for name, hint in present.items() if hint is int)
    at_most(config, 2**31 - 1, *(name for name in whole if name != "total_timesteps"))


def check_rollout(config: Any) -> None:
    """Require that the fields which divide an update's data, num_envs*num_steps, fit them."""
    size = config.steps_per_update
    between(config, size, 2**31 * size - 1, "total_timesteps")
    minibatches = getattr(config, "num_minibatches", 1)
    if minibatches != 1:
        divides(config, "num_minibatches", size, "num_envs*num_steps")
    require(
        size > minibatches or not config.normalize_advantage,
        f"normalize_advantage needs two samples, but num_envs*num_steps is {size} and "
        f"num_minibatches {minibatches}.",
    )


def divides(config: Any, name: str, number: int, number_name: str) -> None:
    """Require that a field divides a number, naming both.

    Args:
        config: an agent's configuration.
        name: the field.
        number: the number to be divided.
        number_name: its name in the message.
    """
    value = getattr(config, name)
    require(
        number % value == 0,
        f"{name} must divide {number_name}, but {value} does not divide {number}.",
    )


def one_of(config: Any, name: str, choices: Iterable[str]) -> None:
    """Require that the named field is one of `choices`."""
    value = getattr(config, name)
    allowed = ", ".join(repr(choice) for choice in choices)
    require(value in choices, f"{name} must be one of {allowed}, but is {value!r}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the configuration as plain JSON-able values, `build`'s inverse."""
    plain = dataclasses.asdict(config)
    if "env_kwargs" in plain:
        plain["env_kwargs"] = dict(plain["env_kwargs"])
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def field_help(cls: type) -> dict[str, str]:
    """Return the comment after each field, which is the help text of its command-line flag."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    lines = source.splitlines()
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    return {
        node.target.id: lines[(node.end_lineno or 1) - 1].partition("  # ")[2].strip()
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
