"""A time limit is not part of the task: the consequences for targets, traces and fixed points.

`terminated` means that nothing follows, `done` that row t + 1 belongs to another episode. The first
half computes advantages in ways that share no code with the kernel. The second half is a task of
one state that pays 1 for ever and is cut every five steps, so each mistake has a known result: the
right V is 10, and treating cuts as terminations gives 4.0951 or less.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from purejaxpg.kernels import returns

pytestmark = pytest.mark.fast

EXACT = 1e-12


class Rollout(NamedTuple):
    reward: np.ndarray  # [T, N]
    value: np.ndarray  # [T, N]
    next_value: np.ndarray  # [T, N]
    terminated: np.ndarray  # [T, N]
    truncated: np.ndarray  # [T, N]

    def advantage(self, gamma: float, gae_lambda: float) -> np.ndarray:
        done = self.terminated | self.truncated
        rows = self.reward, self.value, self.next_value, self.terminated, done
        return np.asarray(returns.gae(*rows, gamma, gae_lambda))


def rollout(seed: int) -> Rollout:
    """Random rows, one in fifteen of which terminates and is truncated in the same step."""
    source = np.random.default_rng(seed)
    reward, value, next_value = source.normal(size=(3, 40, 6))
    kind = source.integers(15, size=reward.shape)
    terminated, truncated = (kind == 0) | (kind == 1), (kind == 1) | (kind == 2)
    # Inside an episode the next row's value is the value of the next observation.
    inside = ~(terminated | truncated)[:-1]
    next_value[:-1] = np.where(inside, value[1:], next_value[:-1])
    return Rollout(reward, value, next_value, terminated, truncated)


def folded_into_the_reward(rows: Rollout, gamma: float, gae_lambda: float) -> jax.Array:
    """Add the value lost at a cut to its reward, as Stable-Baselines3 does, and terminate there."""
    done = rows.terminated | rows.truncated
    cut = rows.truncated & ~rows.terminated
    reward = rows.reward + gamma * cut * rows.next_value
    values = np.concatenate([rows.value, rows.next_value[-1:]])
    peer = jax.vmap(
        rlax.truncated_generalized_advantage_estimation, in_axes=(1, 1, None, 1), out_axes=1
    )
    return peer(jnp.asarray(reward), jnp.asarray(gamma * ~done), gae_lambda, jnp.asarray(values))


def episode_by_episode(rows: Rollout, gamma: float, gae_lambda: float) -> np.ndarray:
    """Mix the k-step advantages within each episode: no recursion, and no flag inside a sum.

    A_t = (1 − λ) Σ_{k<m} λ^{k−1} A_t^{(k)} + λ^{m−1} A_t^{(m)} with m steps left in the episode,
    A_t^{(k)} = −V(s_t) + Σ_{i<k} γ^i r_{t+i} + γ^k V(s'_{t+k−1}).
    """
    out = np.zeros_like(rows.reward)
    for column in range(out.shape[1]):
        reward, value, next_value, terminated, truncated = (x[:, column] for x in rows)
        bootstrap = np.where(terminated, 0.0, next_value)
        ends = np.flatnonzero(terminated | truncated) + 1
        for episode in np.split(np.arange(len(reward)), ends):
            for t in episode:
                left = episode[episode >= t]
                steps = np.arange(len(left))
                k_step = np.cumsum(gamma**steps * reward[left]) - value[t]
                k_step = k_step + gamma ** (steps + 1) * bootstrap[left]
                weight = (1.0 - gae_lambda) * gae_lambda**steps
                weight[-1] = gae_lambda ** steps[-1]
                out[t, column] = weight @ k_step
    return out


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 0.0), (0.8, 1.0), (1.0, 0.5)]
)
def test_three_ways_to_the_same_advantage(seed: int, gamma: float, gae_lambda: float) -> None:
    rows = rollout(seed)
    actual = rows.advantage(gamma, gae_lambda)
    folded = folded_into_the_reward(rows, gamma, gae_lambda)
    np.testing.assert_allclose(actual, folded, atol=EXACT)
    by_episode = episode_by_episode(rows, gamma, gae_lambda)
    np.testing.assert_allclose(actual, by_episode, atol=EXACT)


def test_the_rollouts_contain_every_kind_of_end() -> None:
    for rows in map(rollout, range(3)):
        both = rows.terminated & rows.truncated
        assert both.any()
        assert (rows.terminated & ~both).any()
        assert (rows.truncated & ~both).any()
        # Some columns are cut short by the end of the array, and some end with it.
        assert not (rows.terminated | rows.truncated)[-1].all()


def test_when_both_happen_at_once_termination_wins() -> None:
    rows = rollout(0)
    both = rows.terminated & rows.truncated
    actual = rows.advantage(0.9, 0.8)
    only_terminated = rows._replace(truncated=rows.truncated & ~both).advantage(0.9, 0.8)
    np.testing.assert_array_equal(actual, only_terminated)
    only_truncated = rows._replace(terminated=rows.terminated & ~both).advantage(0.9, 0.8)
    assert np.min(np.abs(actual - only_truncated)[both]) > 1e-3


@pytest.mark.parametrize("shift", [1, -1])
def test_ends_shifted_by_a_row_are_noticed(shift: int) -> None:
    rows = rollout(0)
    moved = [np.roll(x, shift, 0) for x in (rows.terminated, rows.truncated)]
    wrong = rows._replace(terminated=moved[0], truncated=moved[1]).advantage(0.9, 0.8)
    assert np.mean(np.abs(wrong - rows.advantage(0.9, 0.8)) > 0.01) > 0.2


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_an_associative_scan_gives_the_same(gae_lambda: float) -> None:
    # y = a + b y' composed with y' = c + d y'' is (a + b c) + (b d) y''.
    rows = rollout(1)
    done = rows.terminated | rows.truncated
    bootstrap = np.where(rows.terminated, 0.0, rows.next_value)
    delta = jnp.asarray(rows.reward + 0.9 * bootstrap - rows.value)
    decay = jnp.asarray(0.9 * gae_lambda * ~done)

    def compose(later: tuple, earlier: tuple) -> tuple:
        return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

    scan = jax.jit(functools.partial(jax.lax.associative_scan, compose, reverse=True))
    total, _ = scan((delta, decay))
    np.testing.assert_allclose(total, rows.advantage(0.9, gae_lambda), atol=EXACT)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_a_potential_in_reward_and_value_leaves_the_advantage(gae_lambda: float) -> None:
    # r + γ Φ(s') − Φ(s) with V − Φ. At a termination Φ(s') is zero, at a cut it is not.
    rows = rollout(2)
    source = np.random.default_rng(3)
    potential, final = source.normal(size=(2, *rows.reward.shape))
    inside = ~(rows.terminated | rows.truncated)[:-1]
    next_potential = final.copy()
    next_potential[:-1] = np.where(inside, potential[1:], final[:-1])
    gain = 0.9 * np.where(rows.terminated, 0.0, next_potential) - potential
    shaped = rows._replace(
        reward=rows.reward + gain,
        value=rows.value - potential,
        next_value=rows.next_value - next_potential,
    )
    actual = shaped.advantage(0.9, gae_lambda)
    np.testing.assert_allclose(actual, rows.advantage(0.9, gae_lambda), atol=EXACT)
    forgotten = shaped._replace(reward=shaped.reward + potential).advantage(0.9, gae_lambda)
    assert np.max(np.abs(forgotten - actual)) > 1.0


# --- one state, reward 1 for ever, cut every five steps ------------------------------------------

GAMMA = 0.9
LIMIT = 5
ALWAYS = 1.0 / (1.0 - GAMMA)
# Σ_{k<5} γ^k, the return of an episode from its first step to the cut.
EPISODE = (1.0 - GAMMA**LIMIT) / (1.0 - GAMMA)
LAMBDAS = [0.0, 0.5, 0.95, 1.0]


def target(value: jax.Array, next_value: jax.Array, cut_is_end: bool, size: float) -> jax.Array:
    """TD(λ) targets of the five steps of an episode."""
    truncated = jnp.arange(LIMIT) == LIMIT - 1
    terminated = truncated if cut_is_end else jnp.zeros(LIMIT, bool)
    flags = terminated, truncated, GAMMA, size
    advantage = returns.gae(jnp.ones(LIMIT), value, next_value, *flags)
    # One critic: the two kernels must agree on its targets.
    lambda_return = returns.lambda_return(jnp.ones(LIMIT), next_value, *flags)
    np.testing.assert_allclose(advantage + value, lambda_return, atol=EXACT)
    return lambda_return


def blind_fixed_point(cut_is_end: bool, size: float) -> float:
    """Value of a critic that sees only the state, so it predicts the mean of the targets.

    The mean target is a + b V, so that two evaluations give its fixed point a / (1 − b) exactly.
    """
    a, a_plus_b = (
        float(target(jnp.full(5, v), jnp.full(5, v), cut_is_end, size).mean()) for v in (0.0, 1.0)
    )
    return a / (1.0 - (a_plus_b - a))


def timed_fixed_point(cut_is_end: bool, size: float) -> np.ndarray:
    """Values of a critic that also sees the time, 0 to 5; its value at time 5 is 10."""

    def residual(value: jax.Array) -> jax.Array:
        later = jnp.concatenate([value[1:], jnp.array([ALWAYS])])
        flags = jnp.arange(LIMIT) == LIMIT - 1
        terminated = flags if cut_is_end else jnp.zeros(LIMIT, bool)
        return returns.gae(jnp.ones(LIMIT), value, later, terminated, flags, GAMMA, size)

    zero = jnp.zeros(LIMIT)
    return np.linalg.solve(jax.jacobian(residual)(zero), -residual(zero))


@pytest.mark.parametrize("size", LAMBDAS)
def test_a_cut_leaves_the_value_of_the_endless_task(size: float) -> None:
    assert blind_fixed_point(cut_is_end=False, size=size) == pytest.approx(10.0, abs=1e-9)
    np.testing.assert_allclose(timed_fixed_point(cut_is_end=False, size=size), 10.0, atol=1e-9)
    exact = jnp.full(LIMIT, ALWAYS)
    np.testing.assert_allclose(target(exact, exact, cut_is_end=False, size=size), 10.0, atol=1e-9)


@pytest.mark.parametrize("size", LAMBDAS)
def test_a_cut_taken_for_a_termination_teaches_the_value_of_a_short_task(size: float) -> None:
    learned = timed_fixed_point(cut_is_end=True, size=size)
    np.testing.assert_allclose(learned, [4.0951, 3.439, 2.71, 1.9, 1.0], atol=1e-12)
    assert learned[0] == pytest.approx(EPISODE, abs=1e-12)


def test_a_critic_that_does_not_see_the_time_learns_a_mean_of_them() -> None:
    # λ = 1: the mean of the five. λ = 0: V = 1 + γ (4/5) V, one step in five having no successor.
    assert blind_fixed_point(cut_is_end=True, size=1.0) == pytest.approx(2.62882, abs=1e-12)
    assert blind_fixed_point(cut_is_end=True, size=0.0) == pytest.approx(1.0 / 0.28, abs=1e-12)
    between = [blind_fixed_point(cut_is_end=True, size=size) for size in LAMBDAS]
    assert between == sorted(between, reverse=True)
    assert max(between) < EPISODE


@pytest.mark.parametrize("size", LAMBDAS)
def test_ends_read_a_row_late_teach_the_right_values_a_step_late(size: float) -> None:
    # Flags for the start of an episode instead of its end: the first step has no successor, and the
    # last one bootstraps from the next episode.
    time = jnp.array([1, 2, 3, 4, 0])
    ended = time == 0

    def residual(value: jax.Array) -> jax.Array:
        later = value[(time + 1) % LIMIT]
        return returns.gae(jnp.ones(LIMIT), value[time], later, ended, ended, GAMMA, size)

    zero = jnp.zeros(LIMIT)
    learned = np.linalg.solve(jax.jacobian(residual)(zero), -residual(zero))
    np.testing.assert_allclose(learned, [1.0, 4.0951, 3.439, 2.71, 1.9], atol=1e-12)
