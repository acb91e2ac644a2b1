"""Environments of gymnasium: "gymnasium:CartPole-v1" and all that is registered with it.

They run on the host, in Python, one after the other: each step of a program waits for a callback
that steps a `SyncVectorEnv` with all environments of all rows of a unit. That is far slower
than an environment in jax. `env_kwargs` are those of `gymnasium.make_vec`.

Programs must be pure, but the environments live on the host and change. Therefore the state in a
program is a ticket: which environment, and how many steps it has taken. The host accepts a ticket
if it is the newest one, or if it has been used for the last call, or if it is that of the reset:
episodes are seeded from the keys of the program, so the environments can start again. Any other
ticket is of a state that is gone; then observation and reward are NaN. What an environment does
depends only on its own keys and actions, not on its neighbours.
"""

import collections
import dataclasses
import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import random

from purejaxpg import FaultError
from purejaxpg import config as configs
from purejaxpg.envs import gymnax

KEPT = 32  # vector environments, the last used; more than a unit and its evaluations need
GONE = -1  # the number of steps on the ticket of a state that is gone


@struct.dataclass
class Params:
    """No parameter can be set: use `env_kwargs`."""


@struct.dataclass
class Ticket:
    """The state of one environment, as a program has it."""

    vector: jax.Array  # [] int32, which vector environment
    index: jax.Array  # [] int32, which environment in it
    time: jax.Array  # [] int32, steps since it was made; GONE
    seed: jax.Array  # uint32 [2], the key of the reset of this episode
    action: jax.Array  # the last one


@dataclasses.dataclass
class Vector:
    """A vector environment on the host."""

    env: Any
    seeds: list[int]  # of the first episodes
    time: np.ndarray  # [n] steps taken
    asked: tuple[np.ndarray, ...] = ()  # arguments of the last call
    answer: tuple[np.ndarray, ...] = ()  # and its results


class Host:
    """The vector environments of one name, which callbacks make and step."""

    def __init__(self, make: Any) -> None:
        """Take a function of a number of environments that makes them."""
        self.make = make
        self.vectors: collections.OrderedDict[int, Vector] = collections.OrderedDict()
        self.count = 0
        self.lock = threading.Lock()  # each device calls from a thread of its own

    def reset(self, keys: Any) -> tuple[np.ndarray, ...]:
        """Make an environment for each key [..., 2] -> observations, vector, index."""
        keys = np.asarray(keys)
        lead, seeds = keys.shape[:-1], seeds_of(keys)
        env = self.make(len(seeds))
        obs, _ = env.reset(seed=seeds)
        with self.lock:
            self.count += 1
            self.vectors[self.count] = Vector(env, seeds, np.zeros(len(seeds), np.int32))
            while len(self.vectors) > KEPT:
                self.vectors.popitem(last=False)[1].env.close()
            number = np.full(lead, self.count, np.int32)
        return shaped(obs, lead), number, np.arange(len(seeds), dtype=np.int32).reshape(lead)

    def step(self, keys: Any, vector: Any, index: Any, time: Any, action: Any) -> Any:
        """Step all environments of a vector, and reset those whose episode ends.

        Args:
            keys: uint32 [..., 2], which seed the episodes that start.
            vector: int32 [...], all equal.
            index: int32 [...], from 0 on.
            time: int32 [...], as on the tickets.
            action: [..., A] or [...].

        Returns:
            Observations after and before a reset, rewards, terminated, truncated, new times.
        """
        keys, vector, index, time, action = map(np.asarray, (keys, vector, index, time, action))
        lead = time.shape
        held = self.held(vector.ravel(), index.ravel())
        asked = time.ravel(), action.reshape(time.size, *action.shape[len(lead) :]), keys
        if not (held.asked and all(map(np.array_equal, held.asked, asked))):
            if not time.any() and held.time.any():
                held.env.reset(seed=held.seeds)
                held.time[:] = 0
            held.answer = advance(held, *asked)
            held.asked = asked
        return tuple(value.reshape(*lead, *value.shape[1:]) for value in held.answer)

    def held(self, vector: np.ndarray, index: np.ndarray) -> Vector:
        """Return the vector environment of some tickets."""
        with self.lock:
            known = self.vectors.get(int(vector[0]))
            whole = (vector == vector[0]).all() and np.array_equal(index, np.arange(len(index)))
            if known is None or not whole or len(index) != len(known.time):
                raise FaultError(
                    "The state of a gymnasium environment is of another process or of other rows, "
                    "and cannot be continued."
                )
            self.vectors.move_to_end(int(vector[0]))
        return known


def advance(
    held: Vector, time: np.ndarray, action: np.ndarray, keys: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Step a vector environment -> the results of `Host.step` with one leading axis."""
    env, gone = held.env, time != held.time
    valid = valid_action(env.single_action_space, action)
    final, reward, terminated, truncated, _ = env.step(valid)
    done, obs = terminated | truncated, final
    if done.any():
        obs, _ = env.reset(seed=seeds_of(keys), options={"reset_mask": done})
    held.time += 1
    results = (shaped(obs, done.shape), shaped(final, done.shape), reward.astype(np.float32))
    later = np.where(gone, GONE, held.time).astype(np.int32)
    return (*(without(value, gone) for value in results), terminated, truncated, later)


def valid_action(space: Any, action: np.ndarray) -> np.ndarray:
    """Return actions [n, ...] in gymnasium's numbering; of NaN, as of a diverged policy, some."""
    if hasattr(space, "start"):
        return (np.clip(action, 0, space.n - 1) + space.start).astype(space.dtype)
    return np.clip(np.nan_to_num(action), space.low, space.high).astype(space.dtype)


def without(values: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Return values [n, ...] with NaN where `gone`; an observation that is an index stays."""
    if not np.issubdtype(values.dtype, np.floating):
        return values
    return np.where(gone.reshape(-1, *[1] * (values.ndim - 1)), np.nan, values).astype(values.dtype)


def seeds_of(keys: np.ndarray) -> list[int]:
    """Return a seed for each key, uint32 [..., 2]."""
    return [(int(high) << 32) | int(low) for high, low in keys.reshape(-1, 2)]


def shaped(obs: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """Return observations [n, ...] as [*lead, ...] in the type that programs have."""
    kind = np.int32 if np.issubdtype(obs.dtype, np.integer) and obs.ndim == 1 else np.float32
    return obs.reshape(*lead, *obs.shape[1:]).astype(kind)


def make(name: str, **kwargs: Any) -> "Gymnasium":
    """Return the environment that gymnasium calls `name`."""
    import gymnasium as library

    known = [*library.registry]  # a name with a module in it would import that
    configs.require_known(name, known, "environment of gymnasium named")
    manual = {"autoreset_mode": library.vector.AutoresetMode.DISABLED}
    vectors = functools.partial(
        library.make_vec, name, vectorization_mode="sync", vector_kwargs=manual, **kwargs
    )
    return Gymnasium(vectors)


class Gymnasium(gymnax.environment.Environment):
    """An environment of gymnasium as one of gymnax's, with a `reset` and a `step` of its own."""

    packages = ("gymnasium",)
    on_host = True

    def __init__(self, vectors: Any) -> None:
        """Take a function of a number of environments that makes them."""
        self.host, self.vectors = Host(vectors), vectors
        env = vectors(1)
        self.obs_space, self.act_space = env.single_observation_space, env.single_action_space
        env.close()

    @property
    def default_params(self) -> Params:
        """No parameters."""
        return Params()

    def reset(self, key: jax.Array, params: Any = None) -> tuple[jax.Array, Ticket]:
        """Start an episode, as gymnax does."""
        raw, number = random.key_data(key), jax.ShapeDtypeStruct((), np.int32)
        shapes = self._observed(), number, number
        obs, vector, index = jax.pure_callback(
            self.host.reset, shapes, raw, vmap_method="broadcast_all"
        )
        space = self.action_space()
        action = jnp.zeros(space.shape, space.dtype)
        return obs, Ticket(vector, index, jnp.int32(0), raw, action)

    def step(self, key: jax.Array, state: Ticket, action: jax.Array, params: Any = None) -> Any:
        """Step, and reset if the episode ends, as gymnax does."""
        raw, obs = random.key_data(key), self._observed()
        scalars = [jax.ShapeDtypeStruct((), kind) for kind in (np.float32, bool, bool, np.int32)]
        ticket = (raw, state.vector, state.index, state.time)
        after, final, reward, terminated, truncated, time = jax.pure_callback(
            self.host.step, (obs, obs, *scalars), *ticket, action, vmap_method="broadcast_all"
        )
        seed = jnp.where(terminated | truncated, raw, state.seed)
        later = Ticket(state.vector, state.index, time, seed, action)
        return after, later, reward, terminated, truncated, {"final_observation": final}

    def film(self, states: Ticket, params: Params, steps: list[int]) -> list[np.ndarray]:
        """Play an episode again by its seed and actions -> an image of each of some steps."""
        env = self.vectors(1, render_mode="rgb_array")
        env.reset(seed=seeds_of(np.asarray(states.seed[:1])))
        images = []
        for time in range(steps[-1] + 1):
            if time > 0:
                action = np.asarray(states.action[time : time + 1])
                env.step(valid_action(self.act_space, action))
            if time in steps:
                images.append(np.asarray(env.render()[0]))
        env.close()
        return images

    def _observed(self) -> jax.ShapeDtypeStruct:
        kind = np.float32 if hasattr(self.obs_space, "low") else np.int32
        return jax.ShapeDtypeStruct(self.obs_space.shape, kind)

    def action_space(self, params: Any = None) -> Any:
        """Return the space of an action."""
        return as_gymnax(self.act_space)

    def observation_space(self, params: Any = None) -> Any:
        """Return the space of an observation."""
        return as_gymnax(self.obs_space)


def as_gymnax(space: Any) -> Any:
    """Return a Discrete or Box space of gymnasium as gymnax's; others as they are."""
    if hasattr(space, "low") and hasattr(space, "high"):
        return gymnax.spaces.Box(space.low, space.high, space.shape)
    return gymnax.spaces.Discrete(int(space.n)) if hasattr(space, "start") else space
