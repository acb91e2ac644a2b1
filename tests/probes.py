"""Environments with known answers: a broken agent fails one of them, and its name says why.

The ladder follows Andy Jones, "Debugging RL, without the agonizing pain", extended by a time
limit, a continuous action and a task for an entropy bonus.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces
from jax import random

from purejaxpg import envs


@struct.dataclass
class State:
    """The observation is the whole state."""

    obs: jax.Array  # [1]
    time: jax.Array  # []


@struct.dataclass
class Params:
    """A time limit that only `Endless` reaches."""

    max_steps_in_episode: int = 10


class Probe(environment.Environment):
    """One-step episodes, observation 0, one action, reward 1. Subclasses override parts of it."""

    num_choices = 1

    @property
    def default_params(self) -> Params:
        return Params()

    def first_obs(self, key: jax.Array) -> jax.Array:
        return jnp.zeros(1)

    def outcome(self, state: State, action: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """State and action -> reward, terminated, next observation."""
        return jnp.ones(()), jnp.ones((), bool), state.obs

    def reset_env(self, key: jax.Array, params: Params) -> tuple[jax.Array, State]:
        obs = self.first_obs(key)
        return obs, State(obs, jnp.zeros((), jnp.int32))

    def step_env(self, key: jax.Array, state: State, action: Any, params: Params) -> Any:
        reward, terminated, obs = self.outcome(state, action)
        return obs, State(obs, state.time + 1), reward, terminated, {}

    def action_space(self, params: Any = None) -> Any:
        return spaces.Discrete(self.num_choices)

    def observation_space(self, params: Any) -> Any:
        return spaces.Box(-1.0, 1.0, (1,))


class Constant(Probe):
    """The value is always 1: tests the value loss."""


class Observed(Probe):
    """Reward is the observation, 1 or -1: tests that the critic sees the observation."""

    def first_obs(self, key: jax.Array) -> jax.Array:
        return random.rademacher(key, (1,), jnp.float32)

    def outcome(self, state: State, action: jax.Array) -> Any:
        return state.obs[0], jnp.ones((), bool), state.obs


class Discounted(Probe):
    """Two steps, reward 1 at the end: V(first) = gamma, V(second) = 1."""

    def outcome(self, state: State, action: jax.Array) -> Any:
        second = state.obs[0] > 0.5
        return second.astype(jnp.float32), second, jnp.ones(1)


class Chosen(Probe):
    """Action 1 earns 1 and action 0 earns -1: tests the sign of the policy loss."""

    num_choices = 2

    def outcome(self, state: State, action: jax.Array) -> Any:
        return 2.0 * action - 1.0, jnp.ones((), bool), state.obs


class Matched(Observed):
    """The action must match the observation: tests that the policy sees it."""

    num_choices = 2

    def outcome(self, state: State, action: jax.Array) -> Any:
        return (2.0 * action - 1.0) * state.obs[0], jnp.ones((), bool), state.obs


class Endless(Probe):
    """Reward 1 for ever, cut every 5 steps by the time limit: with gamma 0.9, V = 10.

    An agent that treats the limit as an end finds 4.1 for the first step and less for later ones,
    which all look alike: a mean between 2.6 (Monte Carlo) and 3.6 (one-step TD).
    """

    @property
    def default_params(self) -> Params:
        return Params(max_steps_in_episode=5)

    def outcome(self, state: State, action: jax.Array) -> Any:
        return jnp.ones(()), jnp.zeros((), bool), state.obs


class Quadratic(Probe):
    """Reward -(a - 1/2)^2 for a continuous action."""

    def outcome(self, state: State, action: jax.Array) -> Any:
        return -((action[0] - 0.5) ** 2), jnp.ones((), bool), state.obs

    def action_space(self, params: Any = None) -> Any:
        return spaces.Box(-2.0, 2.0, (1,))


class Followed(Observed):
    """Reward -(a - s/2)^2 for a continuous action and an observation s of 1 or -1."""

    def outcome(self, state: State, action: jax.Array) -> Any:
        return -((action[0] - 0.5 * state.obs[0]) ** 2), jnp.ones((), bool), state.obs

    def action_space(self, params: Any = None) -> Any:
        return spaces.Box(-2.0, 2.0, (1,))


class Tempered(Chosen):
    """`Chosen` again, for an entropy bonus of weight c: the best policy has odds of exp(2 / c)."""


class Tasks(Probe):
    """Several probes in one; the traced parameter `task` selects one, so all share a compilation.

    If a probe has a single action, all actions do the same.
    """

    probes: tuple[Probe, ...] = ()

    @property
    def default_params(self) -> Any:
        return TaskParams()

    def reset_env(self, key: jax.Array, params: Any) -> tuple[jax.Array, State]:
        first = jnp.stack([probe.first_obs(key) for probe in self.probes])
        return first[params.task], State(first[params.task], jnp.zeros((), jnp.int32))

    def step_env(self, key: jax.Array, state: State, action: Any, params: Any) -> Any:
        outcomes = [probe.outcome(state, action) for probe in self.probes]
        stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(e) for e in x]), *outcomes)
        reward, terminated, obs = jax.tree.map(lambda x: x[params.task], stacked)
        return obs, State(obs, state.time + 1), reward, terminated, {}


@struct.dataclass
class TaskParams:
    """The selected probe, and the time limit that only `Endless` reaches."""

    task: int = 0
    max_steps_in_episode: int = 5


class Discrete(Tasks):
    probes = (
        Constant(), Observed(), Discounted(), Chosen(), Matched(), Endless(), Tempered(),
    )  # fmt: skip
    num_choices = 2


class Continuous(Tasks):
    probes = (Constant(), Observed(), Discounted(), Quadratic(), Followed(), Endless())

    def action_space(self, params: Any = None) -> Any:
        return spaces.Box(-2.0, 2.0, (1,))


PROBES = (
    Constant, Observed, Discounted, Chosen, Matched, Endless, Quadratic, Followed, Tempered,
    Discrete, Continuous,
)  # fmt: skip


def register() -> None:
    """Register every probe under its class name, as `probe/NAME`."""
    for probe in PROBES:
        envs.register(f"probe/{probe.__name__}", probe)


def tasks(kind: str) -> list[str]:
    """Names of the probes in `Discrete` or `Continuous`, in the order of `task`."""
    return [
        type(probe).__name__
        for probe in {"Discrete": Discrete, "Continuous": Continuous}[kind].probes
    ]
