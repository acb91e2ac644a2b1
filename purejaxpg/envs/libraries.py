"""Environments of other libraries, called "LIBRARY:NAME", such as "brax:ant".

Each library has a module of its name beside this one, which alone imports it. Its `make` returns an
`Adapter`: a gymnax environment around the library's own. An episode of an adapter is truncated by
gymnax's rule, after the parameter `max_steps_in_episode`; the library's time limit is its default
and is otherwise out of force, so `terminated` only ever says that the task itself has ended.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import random

from purejaxpg.envs import gymnax

# An environment of each. The extra that installs a library has its name.
EXAMPLES = {
    "brax": "ant",
    "craftax": "Craftax-Classic-Symbolic-v1",
    "gymnasium": "CartPole-v1",
    "jumanji": "Snake-v1",
    "navix": "Navix-Empty-5x5-v0",
    "playground": "CartpoleBalance",
}
UNLIMITED = 2**31 - 1  # in place of a library's own limit on the steps of an episode


def is_library(name: str) -> bool:
    """Return whether an environment is called "LIBRARY:NAME"."""
    return name.partition(":")[0] in EXAMPLES and ":" in name


def factory(name: str) -> Callable[..., Any]:
    """Return the function that makes the environment "LIBRARY:NAME" of its arguments."""
    library, _, own = name.partition(":")
    return functools.partial(importlib.import_module(f"purejaxpg.envs.{library}").make, own)


@struct.dataclass
class Params:
    """The parameter that every adapter has."""

    max_steps_in_episode: int


@struct.dataclass
class State:
    """The state of one environment."""

    inner: Any  # the library's
    time: jax.Array  # [] int32, steps since the reset


class Adapter(gymnax.environment.Environment):
    """A library's environment as one of gymnax's; a subclass defines `start` and `advance`."""

    packages: tuple[str, ...] = ()  # whose versions results depend on

    def __init__(self, params: Any, actions: Any) -> None:
        """Take default parameters, with `max_steps_in_episode`, and one of gymnax's spaces."""
        self._params, self._actions = params, actions
        # Physics takes seconds to trace; a function under jit is traced once for all programs.
        self._start, self._advance = jax.jit(self.start), jax.jit(self.advance)
        first = jax.eval_shape(lambda: self.reset_env(random.key(0), params)[0])
        self._observations = gymnax.spaces.Box(-jnp.inf, jnp.inf, first.shape)

    def start(self, key: jax.Array, params: Any) -> tuple[Any, Any]:
        """Start an episode -> observation and state; `key` is uint32 [2]."""
        raise NotImplementedError

    def advance(self, key: jax.Array, state: Any, action: jax.Array, params: Any) -> Any:
        """Step without a time limit -> observation, state, reward, whether it terminated."""
        raise NotImplementedError

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, State]:
        """Start an episode, as gymnax does."""
        obs, inner = self._start(random.key_data(key), params)
        return one_array(obs), State(inner, jnp.int32(0))

    def step_env(self, key: jax.Array, state: State, action: jax.Array, params: Any) -> Any:
        """Step, as gymnax does."""
        raw = random.key_data(key)
        obs, inner, reward, terminated = self._advance(raw, state.inner, action, params)
        return one_array(obs), State(inner, state.time + 1), reward, terminated, {}

    @property
    def default_params(self) -> Any:
        """The default parameters."""
        return self._params

    def action_space(self, params: Any = None) -> Any:
        """Return the space of an action."""
        return self._actions

    def observation_space(self, params: Any) -> Any:
        """Return the space of an observation, whose bounds nobody asks for."""
        return self._observations


def chosen(states: Any, steps: list[int]) -> list[Any]:
    """Return the library's states at some steps of an episode, whose leaves are [T, ...]."""
    return [jax.tree.map(lambda leaf, t=t: leaf[t], states.inner) for t in steps]


def one_array(obs: Any) -> jax.Array:
    """Return an observation as one array: as it is, or the leaves of a pytree in one vector."""
    leaves = jax.tree.leaves(obs)
    if len(leaves) == 1:
        return leaves[0]
    return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])


def policy_input(obs: Any) -> Any:
    """Return what a policy observes: the entry "state" of a dictionary that has one."""
    return obs["state"] if isinstance(obs, dict) and "state" in obs else obs
