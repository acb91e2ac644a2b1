"""The baseline of least variance: exact for one step, and only a guide over several.

All expectations are sums over every action or trajectory. V, the baseline that agents use, is good
but not optimal: on this bandit its variance is 0.1647, and the minimum is 0.1573.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_mdp

from purejaxpg.kernels import distributions, losses, returns

pytestmark = pytest.mark.fast

EXAMPLE = tiny_mdp.example()


# --- a bandit with four actions ------------------------------------------------------------------


def policy() -> jax.Array:
    return jax.nn.softmax(EXAMPLE.bandit_logits)


def action_loss(logits: jax.Array, advantage: jax.Array) -> jax.Array:
    """Loss of each of the four actions: [4]."""
    every = distributions.categorical(jnp.broadcast_to(logits, (4, 4)))
    return losses.score_function(every.log_prob(jnp.arange(4)), advantage)


@jax.jit
def action_gradient(baseline: jax.Array | float) -> jax.Array:
    """Each action's estimate of the gradient of the mean value: [4, 4]."""
    advantage = EXAMPLE.bandit_value - jnp.broadcast_to(baseline, (4,))
    return -jax.jacobian(action_loss)(jnp.asarray(EXAMPLE.bandit_logits), advantage)


@jax.jit
def score_norm_squared() -> jax.Array:
    """‖∇log π(a)‖² of each action: [4]."""
    score = -jax.jacobian(action_loss)(jnp.asarray(EXAMPLE.bandit_logits), jnp.ones(4))
    return jnp.sum(jnp.square(score), -1)


@jax.jit
def bandit_variance(baseline: jax.Array | float) -> jax.Array:
    """E‖ĝ − E ĝ‖² for one action drawn from the policy."""
    gradient = action_gradient(baseline)
    mean = policy() @ gradient
    return policy() @ jnp.sum(jnp.square(gradient - mean[None]), -1)


def best_baseline() -> jax.Array:
    return losses.optimal_baseline(policy() * score_norm_squared(), EXAMPLE.bandit_value)


def test_no_constant_baseline_is_a_bias() -> None:
    mean_value = jax.jit(jax.grad(lambda logits: jax.nn.softmax(logits) @ EXAMPLE.bandit_value))
    gradient = mean_value(EXAMPLE.bandit_logits)
    for baseline in (0.0, -3.0, best_baseline()):
        mean = policy() @ action_gradient(baseline)
        np.testing.assert_allclose(mean, gradient, atol=1e-14)


def test_it_is_where_the_variance_over_a_grid_is_least() -> None:
    grid = np.linspace(-1.0, 2.0, 30_001)
    least = grid[np.argmin(jax.vmap(bandit_variance)(grid))]
    assert float(best_baseline()) == pytest.approx(0.5487, abs=5e-5)
    assert float(best_baseline()) == pytest.approx(least, abs=1e-4)
    assert abs(float(jax.grad(bandit_variance)(best_baseline()))) < 1e-14


def test_it_is_not_the_value_but_the_value_comes_close() -> None:
    value = policy() @ EXAMPLE.bandit_value
    best, usual, none = (float(bandit_variance(b)) for b in (best_baseline(), value, 0.0))
    assert (best, usual, none) == pytest.approx((0.1573, 0.1647, 0.3546), abs=5e-5)
    assert best < usual < none
    assert abs(float(value - best_baseline())) > 0.05


def test_any_other_baseline_costs_its_squared_distance() -> None:
    # Var(b) = Var(b*) + E‖∇log π‖² (b − b*)²
    weight = policy() @ score_norm_squared()
    for other in (-2.0, 0.0, 1.5):
        excess = bandit_variance(other) - bandit_variance(best_baseline())
        expected = weight * (other - best_baseline()) ** 2
        assert float(excess) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.4, 0.8])
def test_of_two_actions_it_leaves_no_variance(
    p: float,
) -> None:
    prob, value = jnp.array([p, 1.0 - p]), jnp.array([2.0, -1.0])
    score = jnp.eye(2) - jnp.stack([prob, prob])  # ∇log π of each action: [2, 2]
    best = losses.optimal_baseline(prob * jnp.sum(jnp.square(score), -1), value)
    assert float(best) == pytest.approx(float(prob[::-1] @ value), rel=1e-12)
    estimate = score * (value - best)[:, None]
    np.testing.assert_allclose(estimate[0], estimate[1], atol=1e-14)
    of_value = score * (value - prob @ value)[:, None]
    spread = jnp.square(of_value - (prob @ of_value)[None])
    expected = 2.0 * 3.0**2 * p * (1.0 - p) * (1.0 - 2.0 * p) ** 2
    assert float(prob @ spread.sum(-1)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_estimated_from_the_batch_it_serves_it_is_biased(size: int) -> None:
    # All 4^size batches of actions, each with its probability.
    batch = jnp.array(list(itertools.product(range(4), repeat=size)))
    weight = jnp.prod(policy()[batch], -1)
    squares, value = score_norm_squared()[batch], jnp.asarray(EXAMPLE.bandit_value)[batch]
    baseline = jax.vmap(losses.optimal_baseline)(squares, value)
    unit = action_gradient(0.0) / EXAMPLE.bandit_value[:, None]
    estimate = jnp.mean((value - baseline[:, None])[..., None] * unit[batch], 1)
    bias = jnp.einsum("b,bi->i", weight, estimate) - policy() @ action_gradient(0.0)
    length = float(jnp.linalg.norm(policy() @ action_gradient(0.0)))
    assert float(jnp.linalg.norm(bias)) > 0.1 * length / size
    if size == 1:
        # A single value is its own baseline: nothing remains.
        np.testing.assert_allclose(estimate, jnp.zeros((4, 4)), atol=1e-14)


# --- a process of four steps ---------------------------------------------------------------------

MDP = EXAMPLE.mdp
BATCH = tiny_mdp.trajectories(MDP)
TIME = np.arange(MDP.horizon)[:, None]


def trajectory_loss(logits: jax.Array, advantage: jax.Array) -> jax.Array:
    log_prob = tiny_mdp.log_prob(MDP, logits, BATCH)
    return losses.score_function(log_prob, MDP.gamma**TIME * advantage).sum(0)


@jax.jit
def trajectory_gradient(target: jax.Array, baseline: jax.Array) -> jax.Array:
    """ĝ(τ) of targets [T, N] minus a table of baselines [T, S]: [N, S, A], linear in both."""
    advantage = target - baseline[TIME, BATCH.state]
    return -jax.jacfwd(trajectory_loss)(jnp.asarray(EXAMPLE.logits), advantage)


def reward_to_go() -> jax.Array:
    return returns.discounted_return(BATCH.reward, BATCH.terminated, MDP.gamma)


def process_variance(baseline: jax.Array | np.ndarray) -> float:
    """E‖ĝ − E ĝ‖² over whole trajectories."""
    gradient = trajectory_gradient(reward_to_go(), baseline)
    weight = tiny_mdp.probability(MDP, EXAMPLE.logits, BATCH)[:, None, None]
    mean = jnp.sum(weight * gradient, 0, keepdims=True)
    return float(jnp.sum(weight * jnp.square(gradient - mean)))


def fitted() -> np.ndarray:
    """Table [T, S] of least variance, by least squares: the mean does not depend on it."""
    shape = MDP.horizon, len(MDP.start)
    root = jnp.sqrt(tiny_mdp.probability(MDP, EXAMPLE.logits, BATCH))[:, None, None]
    whole = root * trajectory_gradient(reward_to_go(), jnp.zeros(shape))
    units = jnp.eye(np.prod(shape)).reshape(-1, *shape)
    parts = [root * trajectory_gradient(0.0 * reward_to_go(), unit) for unit in units]
    columns = np.stack([np.ravel(-part) for part in parts], 1)
    return np.linalg.lstsq(columns, np.ravel(whole))[0].reshape(shape)


def one_step_formula() -> jax.Array:
    """The formula of the bandit, applied to each state at each step separately."""
    logits = jnp.asarray(EXAMPLE.logits)
    score = jax.jacfwd(lambda x: tiny_mdp.log_prob(MDP, x, BATCH))(logits)
    squares = jnp.sum(jnp.square(score), (2, 3)) * tiny_mdp.probability(MDP, logits, BATCH)[None]
    here = BATCH.state[:, None] == np.arange(len(MDP.start))[None, :, None]
    per_state = jax.vmap(losses.optimal_baseline, in_axes=(0, None))
    return jax.vmap(per_state)(here * squares[:, None], reward_to_go())


def test_over_several_steps_the_value_is_close_to_the_table_of_least_variance() -> None:
    value = tiny_mdp.values(MDP, EXAMPLE.logits)[0][:-1]
    best, usual, none = (process_variance(x) for x in (fitted(), value, 0.0 * value))
    assert (best, usual, none) == pytest.approx((0.605, 0.616, 1.808), abs=5e-4)
    assert best < usual < none


def test_the_fitted_table_cannot_be_improved() -> None:
    source = np.random.default_rng(1)
    table = fitted()
    least = process_variance(table)
    for shift in source.normal(scale=0.01, size=(5, *table.shape)):
        above, below = (process_variance(table + x) - least for x in (shift, -shift))
        assert above > 0.0
        # The slope is zero: the variance rises equally on both sides.
        assert above == pytest.approx(below, rel=1e-6)


def test_over_several_steps_the_formula_of_one_step_is_a_heuristic() -> None:
    # It ignores that the scores of different steps of a trajectory are correlated.
    formula = process_variance(one_step_formula())
    assert formula == pytest.approx(0.612, abs=5e-4)
    assert formula > process_variance(fitted()) + 0.005
