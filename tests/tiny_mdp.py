"""A decision process so small that every trajectory can be listed: expectations are exact sums.

S = 3 states, A = 2 actions, T = 4 steps, discount 0.8: S^T A^T = 1296 trajectories. An episode
always lasts T steps. A policy is a table of logits, one row per state, optionally one table per
step. `J(θ) = E[Σ_t γ^t r_t]` is the objective throughout. Its gradient is also known without
trajectories: by differentiating the backward induction, and by differences.

Values depend on the step t: V_t(s) is the expected return of the remaining T − t steps, V_T = 0.
Arrays are float64 NumPy; call the functions under `jax.enable_x64(True)`.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purejaxpg.kernels import distributions


@dataclasses.dataclass(frozen=True)
class Mdp:
    """Transition probabilities, rewards and start of an episodic task of fixed length."""

    transition: np.ndarray  # [S, A, S]
    reward: np.ndarray  # [S, A]
    start: np.ndarray  # [S]
    horizon: int = 4
    gamma: float = 0.8


class Example(NamedTuple):
    """The draws of one generator, in the order in which they were made."""

    mdp: Mdp
    logits: np.ndarray  # [S, A] the policy
    baseline: np.ndarray  # [S] a baseline unrelated to the task
    bandit_logits: np.ndarray  # [4]
    bandit_value: np.ndarray  # [4]


class Batch(NamedTuple):
    """All trajectories, time-major."""

    state: np.ndarray  # [T, N]
    action: np.ndarray  # [T, N]
    reward: np.ndarray  # [T, N]
    terminated: np.ndarray  # [T, N] true in the last row: nothing follows step T


def example() -> Example:
    """The order of the draws is part of the definition: pinned numbers depend on it."""
    source = np.random.default_rng(0)
    transition = source.dirichlet(np.ones(3), size=(3, 2))
    reward = source.normal(size=(3, 2))
    start = source.dirichlet(np.ones(3))
    logits = source.normal(size=(3, 2))
    baseline = source.normal(size=3)
    return Example(
        Mdp(transition, reward, start),
        logits,
        baseline,
        source.normal(size=4),
        source.normal(size=4),
    )


def trajectories(mdp: Mdp) -> Batch:
    """List all S^T A^T sequences of states and actions, even those of probability zero."""
    states, actions = mdp.reward.shape
    listed = itertools.product(range(states), repeat=mdp.horizon)
    state = np.array(list(listed)).T
    action = np.array(list(itertools.product(range(actions), repeat=mdp.horizon))).T
    pairs = state.shape[1], action.shape[1]
    state = np.repeat(state, pairs[1], axis=1)
    action = np.tile(action, pairs[0])
    terminated = np.zeros(state.shape, bool)
    terminated[-1] = True
    return Batch(state, action, mdp.reward[state, action], terminated)


def per_step(mdp: Mdp, logits: Any) -> jax.Array:
    """One table of logits for each step: [S, A] or [T, S, A] -> [T, S, A]."""
    return jnp.broadcast_to(logits, (mdp.horizon, *mdp.reward.shape))


def log_prob(mdp: Mdp, logits: Any, batch: Batch) -> jax.Array:
    """Log probability of each action taken, by the project's own distribution: [T, N]."""
    time = np.arange(mdp.horizon)[:, None]
    return distributions.categorical(per_step(mdp, logits)[time, batch.state]).log_prob(
        jnp.asarray(batch.action)
    )


def probability(mdp: Mdp, logits: Any, batch: Batch) -> jax.Array:
    """Probability of each trajectory under the policy: [N], of sum 1."""
    time = np.arange(mdp.horizon)[:, None]
    policy = jax.nn.softmax(per_step(mdp, logits))[time, batch.state, batch.action]
    moves = mdp.transition[batch.state[:-1], batch.action[:-1], batch.state[1:]]
    return mdp.start[batch.state[0]] * jnp.prod(policy, 0) * np.prod(moves, 0)


def values(mdp: Mdp, logits: Any) -> tuple[jax.Array, jax.Array]:
    """Backward induction: V [T + 1, S], of which the last row is zero, and Q [T, S, A]."""
    policy = jax.nn.softmax(per_step(mdp, logits))
    value = [jnp.zeros(len(mdp.start))]
    action_value = []
    for t in reversed(range(mdp.horizon)):
        action_value.append(mdp.reward + mdp.gamma * mdp.transition @ value[-1])
        value.append(jnp.sum(policy[t] * action_value[-1], -1))
    return jnp.stack(value[::-1]), jnp.stack(action_value[::-1])


def objective(mdp: Mdp, logits: Any) -> jax.Array:
    """J, the expected discounted return of the policy from the start."""
    return jnp.sum(mdp.start * values(mdp, logits)[0][0])


def occupancy(mdp: Mdp, logits: Any) -> jax.Array:
    """Discounted probability of each state at each step, γ^t P(s_t = s): [T, S]."""
    policy = jax.nn.softmax(per_step(mdp, logits))
    rows = [jnp.asarray(mdp.start)]
    for t in range(mdp.horizon - 1):
        rows.append(mdp.gamma * jnp.einsum("s,sa,sax->x", rows[-1], policy[t], mdp.transition))
    return jnp.stack(rows)


def optimum(mdp: Mdp) -> float:
    """Value iteration over the horizon: the best J that any policy can have."""
    value = np.zeros(len(mdp.start))
    for _ in range(mdp.horizon):
        value = np.max(mdp.reward + mdp.gamma * mdp.transition @ value, -1)
    return float(mdp.start @ value)
