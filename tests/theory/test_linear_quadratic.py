"""The policy gradient of a Gaussian policy in a linear system with quadratic costs, exactly.

Everything that an estimator averages is a polynomial in Gaussian variables, and Gauss-Hermite nodes
average polynomials exactly: three nodes per variable up to degree five. So these tests sample
nothing, but they run the loss, the distribution and the returns that the agents use.

C, the cost of the `regulator`, is a cost and the reward is −cost: the gradient of the loss is ∇C.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regulator
from regulator import Array

from purejaxpg.kernels import distributions, losses, returns

pytestmark = pytest.mark.fast

TASK = regulator.Regulator(
    A=np.array([[1.0, 0.3], [-0.2, 1.1]]),
    B=np.array([[0.8, 0.1], [0.2, 0.6]]),
    Q=np.array([[1.0, 0.2], [0.2, 0.5]]),
    R=np.array([[0.4, 0.1], [0.1, 0.3]]),
    start=np.array([[1.0, 0.3], [0.3, 0.6]]),
)
GAMMA = TASK.gamma
GAIN = np.array([[0.3, 0.1], [-0.1, 0.4]])
LOG_STD = np.log([0.5, 0.8])
EXACT = 1e-9


class Policy(NamedTuple):
    gain: Array  # K [U, X]
    log_std: Array  # [U]

    def __call__(self, state: Array) -> Any:
        return distributions.diag_gaussian(-state @ self.gain.T, self.log_std)


POLICY = Policy(GAIN, LOG_STD)


def nodes(dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Points [3^d, d] and weights of sum one that average a polynomial of N(0, 1) variables."""
    node, weight = np.polynomial.hermite_e.hermegauss(3)
    point = np.array(list(itertools.product(node, repeat=dimensions)))
    mass = np.array(list(itertools.product(weight / weight.sum(), repeat=dimensions)))
    return point, mass.prod(-1)


# --- the known answer: matrices only -------------------------------------------------------------


def second_moment(policy: Policy) -> np.ndarray:
    return TASK.second_moment(policy.gain, np.exp(policy.log_std))


def total_cost(policy: Policy) -> float:
    return TASK.total_cost(policy.gain, np.exp(policy.log_std))


def known_gradient(policy: Policy) -> Policy:
    """∇C for the gain (Fazel et al.), and for log σ: noise costs its curvature at every step."""
    std = np.exp(policy.log_std)
    noise = 2.0 * np.square(std) * np.diag(TASK.curvature(policy.gain)) / (1.0 - GAMMA)
    return Policy(TASK.gradient(policy.gain, std), noise)


def test_the_known_gradient_is_that_of_differences() -> None:
    size = 1e-5
    gradient = known_gradient(POLICY)
    for field, place in [(0, (0, 0)), (0, (0, 1)), (0, (1, 0)), (0, (1, 1)), (1, (0,)), (1, (1,))]:
        costs = []
        for sign in (1.0, -1.0):
            moved = [np.array(x) for x in POLICY]
            moved[field][place] += sign * size
            costs.append(total_cost(Policy(*moved)))
        slope = (costs[0] - costs[1]) / (2.0 * size)
        assert float(gradient[field][place]) == pytest.approx(slope, rel=1e-7)


# --- one decision, the rest of time in Q ---------------------------------------------------------


class Decisions(NamedTuple):
    state: np.ndarray  # [N, X]
    noise: np.ndarray  # [N, U]
    weight: np.ndarray  # [N] discounted number of visits


def decisions(policy: Policy) -> Decisions:
    """States with the discounted second moment of the policy, and actions around its mean."""
    point, mass = nodes(4)
    # Visits add up to Σ γ^t = 1 / (1 − γ).
    scale = np.linalg.cholesky((1.0 - GAMMA) * second_moment(policy))
    return Decisions(point[:, :2] @ scale.T, point[:, 2:], mass / (1.0 - GAMMA))


@jax.jit
def loss_gradient(policy: Policy, p: np.ndarray, batch: Decisions, baseline: float) -> Policy:
    action = policy(batch.state).mean() + jnp.exp(policy.log_std)[None] * batch.noise
    # The baseline is b x'Px, a multiple of the value; at b = 1 the value itself.
    value = -baseline * regulator.quadratic(p, batch.state)
    advantage = TASK.action_value(p, batch.state, action) - value

    def loss(x: Policy) -> jax.Array:
        log_prob = x(batch.state).log_prob(action)
        return jnp.sum(batch.weight * losses.score_function(log_prob, advantage))

    return jax.grad(loss)(policy)


def policy_gradient(policy: Policy, baseline: float = 0.0) -> Policy:
    """The score-function gradient of the loss, averaged exactly."""
    policy = Policy(jnp.asarray(policy.gain), jnp.asarray(policy.log_std))
    return loss_gradient(policy, TASK.cost_to_go(policy.gain), decisions(policy), baseline)


def test_nodes_have_the_moments_of_independent_gaussians() -> None:
    batch = decisions(POLICY)
    moment = np.einsum("n,ni,nj->ij", batch.weight, batch.state, batch.state)
    np.testing.assert_allclose(moment, second_moment(POLICY), rtol=1e-12)
    assert batch.weight.sum() == pytest.approx(10.0, rel=1e-12)
    point, mass = nodes(1)
    moments = [float(mass @ point[:, 0] ** k) for k in range(6)]
    assert moments == pytest.approx([1.0, 0.0, 1.0, 0.0, 3.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("baseline", [0.0, 1.0, -3.0])
def test_the_expected_score_function_gradient_is_the_known_one(baseline: float) -> None:
    actual, expected = policy_gradient(POLICY, baseline), known_gradient(POLICY)
    np.testing.assert_allclose(actual.gain, expected.gain, atol=EXACT)
    np.testing.assert_allclose(actual.log_std, expected.log_std, atol=EXACT)


def test_noise_costs_something_everywhere() -> None:
    # The policy narrows: the objective does not contain exploration.
    for gain in (GAIN, TASK.best_gain()):
        assert np.min(policy_gradient(Policy(gain, LOG_STD)).log_std) > 0.1


# --- whole trajectories of three steps -----------------------------------------------------------

STEPS = 3


class Trajectories(NamedTuple):
    state: jax.Array  # [T, N, X]
    action: jax.Array  # [T, N, U]
    reward: jax.Array  # [T, N]
    done: jax.Array  # [T, N]
    weight: np.ndarray  # [N]


def trajectories() -> Trajectories:
    """Every combination of nodes for the first state and the noise of each step: 3^8 of them."""
    point, weight = nodes(2 + 2 * STEPS)
    state = jnp.asarray(point[:, :2] @ np.linalg.cholesky(TASK.start).T)
    rows = []
    for t in range(STEPS):
        noise = point[:, 2 + 2 * t : 4 + 2 * t]
        action = POLICY(state).mean() + np.exp(LOG_STD)[None] * noise
        reward = -regulator.quadratic(TASK.Q, state) - regulator.quadratic(TASK.R, action)
        rows.append((state, action, reward, jnp.full(len(weight), t == STEPS - 1)))
        state = state @ TASK.A.T + action @ TASK.B.T
    states, actions, rewards, done = (jnp.stack(x) for x in zip(*rows, strict=True))
    return Trajectories(states, actions, rewards, done, weight)


def exact_cost(policy: Policy) -> jax.Array:
    """C over three steps from the second moments alone, by their linear recursion."""
    noise = jnp.diag(jnp.exp(2.0 * policy.log_std))
    closed = TASK.A - TASK.B @ policy.gain
    stage = TASK.Q + policy.gain.T @ TASK.R @ policy.gain
    moment, total = jnp.asarray(TASK.start), jnp.zeros(())
    for t in range(STEPS):
        total += GAMMA**t * (jnp.trace(stage @ moment) + jnp.trace(TASK.R @ noise))
        moment = closed @ moment @ closed.T + TASK.B @ noise @ TASK.B.T
    return total


def remaining_value(batch: Trajectories) -> jax.Array:
    """V_t(x_t) of the remaining steps: [T, N]."""
    variance = np.diag(np.exp(2.0 * LOG_STD))
    p, constant, rows = np.zeros((2, 2)), 0.0, []
    closed, stage = TASK.A - TASK.B @ GAIN, TASK.Q + GAIN.T @ TASK.R @ GAIN
    for t in reversed(range(STEPS)):
        constant = GAMMA * constant + np.trace((TASK.R + GAMMA * TASK.B.T @ p @ TASK.B) @ variance)
        p = stage + GAMMA * closed.T @ p @ closed
        rows.append(-regulator.quadratic(p, batch.state[t]) - constant)
    return jnp.stack(rows[::-1])


def advantages(batch: Trajectories) -> dict[str, Array]:
    discount = GAMMA ** np.arange(STEPS)[:, None]
    value = remaining_value(batch)
    next_value = jnp.concatenate([value[1:], jnp.zeros_like(value[:1])])
    rows = batch.reward, value, next_value, batch.done, batch.done, GAMMA
    target = returns.discounted_return(batch.reward, batch.done, GAMMA)
    return {
        "total return": jnp.broadcast_to(target[:1], target.shape),
        "reward-to-go": discount * target,
        "reward-to-go less V": discount * (target - value),
        "GAE": discount * returns.gae(*rows, 0.5),
        "no gamma to the t": target,
    }


@jax.jit
def trajectory_gradient(batch: Trajectories, advantage: Array) -> Policy:
    def loss(policy: Policy) -> jax.Array:
        log_prob = policy(batch.state).log_prob(batch.action)
        return jnp.sum(batch.weight * losses.score_function(log_prob, advantage).sum(0))

    return jax.grad(loss)(Policy(jnp.asarray(GAIN), jnp.asarray(LOG_STD)))


def test_reinforce_over_whole_trajectories_is_the_gradient_of_the_cost() -> None:
    batch = trajectories()
    expected = jax.jit(jax.grad(exact_cost))(POLICY)
    listed = advantages(batch)
    cost = -jnp.sum(batch.weight * listed["total return"][0])
    assert float(cost) == pytest.approx(float(exact_cost(POLICY)), rel=1e-12)
    biased = trajectory_gradient(batch, listed.pop("no gamma to the t"))
    assert float(jnp.max(jnp.abs(biased.gain - expected.gain))) > 0.01
    for name, advantage in listed.items():
        actual = trajectory_gradient(batch, advantage)
        np.testing.assert_allclose(actual.gain, expected.gain, atol=EXACT, err_msg=name)
        np.testing.assert_allclose(actual.log_std, expected.log_std, atol=EXACT, err_msg=name)


# --- following the gradient ----------------------------------------------------------------------


def fisher(policy: Policy) -> np.ndarray:
    """E[∇log π ∇log πᵀ] over the visited states, for the entries of the gain: [4, 4]."""
    batch = decisions(policy)
    action = policy(batch.state).mean() + np.exp(policy.log_std)[None] * batch.noise

    def log_prob(gain: jax.Array) -> jax.Array:
        return policy._replace(gain=gain)(batch.state).log_prob(action)

    score = jax.jit(jax.jacfwd(log_prob))(jnp.asarray(policy.gain)).reshape(-1, 4)
    return np.einsum("n,ni,nj->ij", batch.weight, score, score)


def test_the_fisher_matrix_is_the_second_moment_over_the_width() -> None:
    expected = np.kron(np.diag(np.exp(-2.0 * LOG_STD)), second_moment(POLICY))
    np.testing.assert_allclose(fisher(POLICY), expected, rtol=1e-10, atol=1e-10)


def test_the_natural_gradient_undoes_the_second_moment() -> None:
    # F⁻¹ ∇C = σ² ∇C Σ⁻¹ = 2 σ² ((R + γB'PB) K − γB'PA), whatever states were visited.
    gradient = np.asarray(policy_gradient(POLICY).gain)
    natural = np.linalg.solve(fisher(POLICY), gradient.ravel()).reshape(2, 2)
    variance = np.diag(np.exp(2.0 * LOG_STD))
    np.testing.assert_allclose(natural, variance @ TASK.natural_gradient(GAIN), atol=EXACT)


@pytest.mark.parametrize(
    ("natural", "step_size", "num_steps"), [(False, 0.015, 500), (True, 0.25, 60)]
)
def test_descent_reaches_the_gain_of_the_riccati_equation(
    natural: bool, step_size: float, num_steps: int
) -> None:
    # That gain is the best for the task without noise. The width of the policy, held fixed here,
    # costs something, but it does not move the optimum.
    gain, costs = GAIN, []
    for _ in range(num_steps):
        policy = Policy(gain, LOG_STD)
        costs.append(total_cost(policy))
        direction = np.asarray(policy_gradient(policy).gain)
        if natural:
            direction = direction @ np.linalg.inv(second_moment(policy))
        gain = gain - step_size * direction
    np.testing.assert_allclose(gain, TASK.best_gain(), atol=1e-6)
    assert costs[0] > costs[-1] + 1.0
    assert np.all(np.diff(costs) < 1e-9)
    assert costs[-1] > total_cost(Policy(TASK.best_gain(), LOG_STD - 5.0)) + 0.1


def test_half_a_gauss_newton_step_is_policy_iteration() -> None:
    # K − ½ (R + γB'PB)⁻¹ ∇C Σ⁻¹ is the gain that is greedy for the cost-to-go of K.
    gradient = np.asarray(policy_gradient(POLICY).gain)
    step = np.linalg.solve(TASK.curvature(GAIN), gradient) @ np.linalg.inv(second_moment(POLICY))
    greedy = TASK.greedy_gain(TASK.cost_to_go(GAIN))
    np.testing.assert_allclose(GAIN - 0.5 * step, greedy, atol=EXACT)
