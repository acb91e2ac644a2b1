"""What agents see of environments, whichever library those come from."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True, eq=False)
class Env:
    """One environment: all that agents need to know about it, and all of it static."""

    name: str
    inner: Any  # the library's own environment
    default_params: Any
    obs_shape: tuple[int, ...]  # before flattening
    num_actions: int  # 0 if actions are continuous
    action_shape: tuple[int, ...]  # as the environment takes it; () for an index
    index_observed: bool = False  # whether the environment returns an index, seen one-hot
    added_limit: int | None = None  # on the steps of an episode, set by `register`
    truncates: bool = False  # whether the environment's own rule ever truncates an episode
    limited: bool = False  # whether it does so after `max_steps_in_episode` steps, or earlier

    @property
    def obs_size(self) -> int:
        """Length D of a flat observation."""
        return math.prod(self.obs_shape)

    @property
    def action_size(self) -> int:
        """A: the number of actions, or of action dimensions."""
        return self.num_actions or math.prod(self.action_shape)

    @property
    def discrete(self) -> bool:
        """Whether actions are indices (int32 []) rather than vectors (float32 [A])."""
        return self.num_actions > 0

    @property
    def action_dtype(self) -> np.dtype:
        """The type of an action."""
        return np.dtype(np.int32 if self.discrete else np.float32)

    @property
    def max_steps(self) -> int | None:
        """Steps within which every episode ends by default; None if unknown."""
        return horizon(self, {})

    @property
    def ends(self) -> bool:
        """Whether episodes can be truncated, so that they end whatever the agent does."""
        return self.truncates or self.added_limit is not None

    @property
    def on_host(self) -> bool:
        """Whether the environment lives on the host, so that its state cannot be stored."""
        return bool(getattr(self.inner, "on_host", False))

    @property
    def param_names(self) -> list[str]:
        """The names of the environment's parameters."""
        held = dataclasses.is_dataclass(self.default_params)
        return [field.name for field in dataclasses.fields(self.default_params)] if held else []


@struct.dataclass
class EnvState:
    """State of N environments, with the episodes in progress."""

    inner: Any  # the environment's own state, leaves [N, ...]
    episode_return: jax.Array  # [N] raw reward since the last reset
    episode_length: jax.Array  # [N] int32


@struct.dataclass
class Step:
    """The outcome of one step of N environments."""

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


def restarted(now: Any, start: Any, done: jax.Array) -> Any:
    """Return what N episodes have now, with that of a new episode where one has ended.

    Args:
        now: leaves [N, ...].
        start: the same of new episodes.
        done: [N] bool.
    """

    def select(new: jax.Array, old: jax.Array) -> jax.Array:
        column = done.reshape(-1, *[1] * (jnp.ndim(old) - 1))
        return jnp.where(column, new, old).astype(old.dtype)

    return jax.tree.map(select, start, now)


def horizon(env: Env, overrides: Mapping[str, Any]) -> int | None:
    """Return the number of steps within which every episode ends, if it is known.

    It is known if episodes are truncated after `max_steps_in_episode` steps or by the limit given
    to `register`. An environment may have a rule of its own, or never truncate.

    Args:
        env: the environment.
        overrides: parameter name to scalar.

    Returns:
        The number of steps; None if the environment has a rule of its own or the limit is traced.
    """
    limits = [env.added_limit] if env.added_limit else []
    if env.limited:
        own = overrides.get("max_steps_in_episode", env.default_params.max_steps_in_episode)
        if not isinstance(own, jax.core.Tracer):
            limits.append(int(own))
    return min(limits, default=None)


def episode_metrics(steps: Step, where: jax.Array | bool = True) -> dict[str, jax.Array]:
    """Reduce any number of steps to the sums of the episodes that ended in them.

    These are sums and a count, not a mean: if no episode ended there is no return to report, and
    a zero would read as one.

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
