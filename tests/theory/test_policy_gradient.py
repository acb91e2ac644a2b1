"""The policy gradient, exactly: every trajectory of a tiny process, each with its probability.

An estimator ĝ(τ) is unbiased if Σ_τ p(τ) ĝ(τ) = ∇J. That is a sum of 1296 terms, so nothing here
is sampled. The estimators are built from the kernels that the agents use: weights from `returns`,
log probabilities from `distributions`, the loss from `losses`. ∇J is computed without them.

The tests cover, in order: the gradient of J itself; which weights give it and which do not; the
variance of each; identities of the score; and the result of following the gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_mdp

from purejaxpg.kernels import distributions, losses, returns

pytestmark = pytest.mark.fast

EXACT = 1e-9

EXAMPLE = tiny_mdp.example()
MDP = EXAMPLE.mdp
LOGITS = EXAMPLE.logits
BATCH = tiny_mdp.trajectories(MDP)
TIME = np.arange(MDP.horizon)[:, None]
# γ^t: seen from the start, step t counts for less, so an action there moves J by less.
DISCOUNT = MDP.gamma**TIME


@jax.jit
def objective(logits: Any = LOGITS, reward: Any = MDP.reward) -> jax.Array:
    """J by backward induction."""
    return tiny_mdp.objective(dataclasses.replace(MDP, reward=reward), logits)


@jax.jit
def exact_gradient(reward: Any = MDP.reward) -> jax.Array:
    """∇J by differentiating the backward induction: no trajectories, no scores."""
    return jax.grad(objective)(jnp.asarray(LOGITS), reward)


@jax.jit
def probability() -> jax.Array:
    """p(τ): [N]."""
    return tiny_mdp.probability(MDP, LOGITS, BATCH)


def trajectory_loss(logits: Any, advantage: jax.Array) -> jax.Array:
    """One loss for each trajectory, summed over its steps: [N]."""
    log_prob = tiny_mdp.log_prob(MDP, logits, BATCH)
    return losses.score_function(log_prob, advantage).sum(0)


@jax.jit
def expected_gradient(advantage: jax.Array, logits: Any = LOGITS) -> jax.Array:
    """Σ_τ p(τ) ĝ(τ), in the direction that raises J; p is data, as for a sampler."""
    weight = tiny_mdp.probability(MDP, jnp.asarray(logits), BATCH)
    return -jax.grad(lambda x: jnp.sum(weight * trajectory_loss(x, advantage)))(jnp.asarray(logits))


@jax.jit
def trajectory_gradient(advantage: jax.Array) -> jax.Array:
    """ĝ(τ) of each trajectory: [N, S, A]."""
    return -jax.jacfwd(trajectory_loss)(jnp.asarray(LOGITS), advantage)


def trace_variance(advantage: jax.Array) -> float:
    """E‖ĝ − E ĝ‖², the variances of all components added up."""
    weight = probability()[:, None, None]
    gradient = trajectory_gradient(advantage)
    mean = jnp.sum(weight * gradient, 0, keepdims=True)
    return float(jnp.sum(weight * jnp.square(gradient - mean)))


# --- the weights that an estimator gives to the scores, [T, N] -----------------------------------


def reward_to_go() -> jax.Array:
    return returns.discounted_return(BATCH.reward, BATCH.terminated, MDP.gamma)


def total_return() -> jax.Array:
    """The whole discounted return for every step, including rewards before the step."""
    return jnp.broadcast_to(reward_to_go()[:1], BATCH.reward.shape)


def exact_value() -> jax.Array:
    return tiny_mdp.values(MDP, LOGITS)[0][:-1]


def arbitrary_value() -> jax.Array:
    """A table of one number per state, unrelated to the task."""
    return jnp.broadcast_to(EXAMPLE.baseline, (MDP.horizon, len(MDP.start)))


def along(table: jax.Array) -> jax.Array:
    """Look up a table [T, S] along the trajectories: [T, N]."""
    return table[TIME, BATCH.state]


def gae(table: jax.Array, gae_lambda: float) -> jax.Array:
    value = along(table)
    # The last row terminates, so its next value is not used.
    next_value = jnp.concatenate([value[1:], jnp.full_like(value[:1], jnp.nan)])
    flags = BATCH.terminated, BATCH.terminated
    return returns.gae(BATCH.reward, value, next_value, *flags, MDP.gamma, gae_lambda)


def lambda_return(table: jax.Array, gae_lambda: float) -> jax.Array:
    value = along(table)
    next_value = jnp.concatenate([value[1:], jnp.zeros_like(value[:1])])
    flags = BATCH.terminated, BATCH.terminated
    return returns.lambda_return(BATCH.reward, next_value, *flags, MDP.gamma, gae_lambda)


Weights = Callable[[], jax.Array]

UNBIASED: dict[str, Weights] = {
    "total return": total_return,
    "reward-to-go": lambda: DISCOUNT * reward_to_go(),
    "reward-to-go less V": lambda: DISCOUNT * (reward_to_go() - along(exact_value())),
    "reward-to-go less an arbitrary b(s)": lambda: (
        DISCOUNT * (reward_to_go() - along(arbitrary_value()))
    ),
    "GAE of the exact V, lambda 0": lambda: DISCOUNT * gae(exact_value(), 0.0),
    "GAE of the exact V, lambda 1/2": lambda: DISCOUNT * gae(exact_value(), 0.5),
    "GAE of the exact V, lambda 1": lambda: DISCOUNT * gae(exact_value(), 1.0),
    # With λ = 1 nothing is bootstrapped, and a wrong V is only a baseline.
    "GAE of a wrong V, lambda 1": lambda: DISCOUNT * gae(arbitrary_value(), 1.0),
    "lambda-return of the exact V, lambda 1/2": lambda: (
        DISCOUNT * lambda_return(exact_value(), 0.5)
    ),
}


def test_every_trajectory_is_listed_once_and_the_probabilities_sum_to_one() -> None:
    assert BATCH.state.shape == (4, 1296)
    assert len({tuple(column) for column in np.vstack([BATCH.state, BATCH.action]).T}) == 1296
    weight = probability()
    assert float(weight.sum()) == pytest.approx(1.0, abs=1e-14)


def test_listing_and_backward_induction_agree_on_the_objective() -> None:
    weight = probability()
    listed = jnp.sum(weight * total_return()[0])
    assert float(listed) == pytest.approx(float(objective()), abs=1e-14)


def test_the_exact_gradient_is_that_of_central_differences() -> None:
    size = 1e-5
    gradient = exact_gradient()
    for place in np.ndindex(LOGITS.shape):
        shift = np.zeros_like(LOGITS)
        shift[place] = size
        above, below = (float(objective(LOGITS + x)) for x in (shift, -shift))
        assert float(gradient[place]) == pytest.approx((above - below) / (2 * size), abs=EXACT)


def test_the_policy_gradient_theorem() -> None:
    # ∇J = Σ_t Σ_s γ^t P(s_t = s) Σ_a ∇π(a|s) Q_t(s, a)
    _, action_value = tiny_mdp.values(MDP, LOGITS)
    reached = tiny_mdp.occupancy(MDP, LOGITS)

    def weighted(logits: jax.Array) -> jax.Array:
        return jnp.einsum("ts,sa,tsa->", reached, jax.nn.softmax(logits), action_value)

    actual = jax.jit(jax.grad(weighted))(LOGITS)
    np.testing.assert_allclose(actual, exact_gradient(), atol=EXACT)


def test_a_table_moves_by_visits_times_probability_times_advantage() -> None:
    value, action_value = tiny_mdp.values(MDP, LOGITS)
    advantage = action_value - value[:-1, :, None]
    reached, policy = tiny_mdp.occupancy(MDP, LOGITS), jax.nn.softmax(jnp.asarray(LOGITS))
    rows = jnp.einsum("ts,sa,tsa->sa", reached, policy, advantage)
    np.testing.assert_allclose(rows, exact_gradient(), atol=EXACT)
    with_q = jnp.einsum("ts,sa,tsa->sa", reached, policy, action_value)
    assert float(jnp.abs(with_q - exact_gradient()).max()) > 0.1


def test_an_action_has_no_part_in_earlier_rewards() -> None:
    score = jax.jacfwd(lambda x: tiny_mdp.log_prob(MDP, x, BATCH))(jnp.asarray(LOGITS))
    weighted = probability()[None] * BATCH.reward  # [T, N]
    product = jnp.einsum("kn,tnsa->ktsa", weighted, score)
    for k, t in np.ndindex(MDP.horizon, MDP.horizon):
        largest = float(jnp.abs(product[k, t]).max())
        assert (largest < 1e-14) if k < t else (largest > 1e-4)


# --- bias ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", UNBIASED.values(), ids=UNBIASED)
def test_unbiased(weights: Weights) -> None:
    np.testing.assert_allclose(expected_gradient(weights()), exact_gradient(), atol=EXACT)


def test_on_fresh_data_the_clipped_surrogate_has_the_same_gradient() -> None:
    advantage = UNBIASED["reward-to-go less V"]()
    weight = probability()
    old_log_prob = tiny_mdp.log_prob(MDP, LOGITS, BATCH)

    def loss(logits: jax.Array) -> jax.Array:
        log_prob = tiny_mdp.log_prob(MDP, logits, BATCH)
        return jnp.sum(weight * losses.ppo_clip(log_prob, old_log_prob, advantage, 0.2).sum(0))

    gradient = -jax.jit(jax.grad(loss))(LOGITS)
    np.testing.assert_allclose(gradient, exact_gradient(), atol=EXACT)


def largest_error(advantage: jax.Array) -> float:
    return float(jnp.max(jnp.abs(expected_gradient(advantage) - exact_gradient())))


def cosine(advantage: jax.Array) -> float:
    a, b = expected_gradient(advantage), exact_gradient()
    return float(jnp.sum(a * b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


def test_without_gamma_to_the_t_reward_to_go_is_biased() -> None:
    assert largest_error(reward_to_go()) == pytest.approx(0.174, abs=5e-4)


def test_a_baseline_that_knows_the_action_can_remove_the_gradient() -> None:
    # Minus Q(s, a), only noise remains: the extreme case of an action-dependent baseline.
    _, action_value = tiny_mdp.values(MDP, LOGITS)
    advantage = DISCOUNT * (reward_to_go() - action_value[TIME, BATCH.state, BATCH.action])
    np.testing.assert_allclose(expected_gradient(advantage), 0.0 * LOGITS, atol=EXACT)
    assert trace_variance(advantage) > 0.4
    assert largest_error(advantage) > 0.4


@pytest.mark.parametrize(("gae_lambda", "error"), [(0.0, 0.098), (0.5, 0.051)])
def test_bootstrapping_from_a_wrong_value_is_biased(gae_lambda: float, error: float) -> None:
    advantage = DISCOUNT * gae(arbitrary_value(), gae_lambda)
    assert largest_error(advantage) == pytest.approx(error, abs=5e-4)
    # Not only the length is wrong, which a learning rate could correct.
    assert cosine(advantage) < 0.995


def test_whitening_a_large_batch_rescales_the_gradient() -> None:
    # The mean and the deviation of an infinite batch are constants: a baseline and a factor.
    advantage = UNBIASED["reward-to-go less V"]()
    weight = probability()[None] / MDP.horizon
    mean = jnp.sum(weight * advantage)
    scale = jnp.sqrt(jnp.sum(weight * jnp.square(advantage - mean)))
    expected = exact_gradient() / scale
    np.testing.assert_allclose(expected_gradient((advantage - mean) / scale), expected, atol=EXACT)
    assert abs(float(scale) - 1.0) > 0.1


def test_whitening_a_small_batch_turns_the_gradient() -> None:
    # Here the batch is one trajectory: its mean and deviation depend on the actions taken.
    advantage = UNBIASED["reward-to-go less V"]()
    white = (advantage - advantage.mean(0, keepdims=True)) / advantage.std(0, keepdims=True)
    assert largest_error(white) > 0.03
    assert cosine(white) < 0.996


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_with_the_exact_value_gae_has_the_mean_of_the_advantage(gae_lambda: float) -> None:
    # E[A_t | s_t, a_t] = Q_t(s_t, a_t) − V_t(s_t) for every λ: later errors have mean zero.
    value, action_value = tiny_mdp.values(MDP, LOGITS)
    estimate = gae(exact_value(), gae_lambda)
    weight = probability()
    for t, state, action in np.ndindex(4, 3, 2):
        chosen = weight * ((BATCH.state[t] == state) & (BATCH.action[t] == action))
        mean = jnp.sum(chosen * estimate[t]) / jnp.sum(chosen)
        advantage = action_value[t, state, action] - value[t, state]
        assert float(mean) == pytest.approx(float(advantage), abs=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.9, 1.0])
def test_the_bias_of_a_wrong_value_is_that_of_its_bootstraps(gae_lambda: float) -> None:
    # E[Â_t | s_t, a_t] − A_t = −e(s_t) + (1 − λ) Σ_{k≥1} λ^{k−1} γ^k E[e(s_{t+k}) | s_t, a_t],
    # e = V_wrong − V. The first term is a baseline; only the rest reaches the gradient.
    error = along(arbitrary_value() - exact_value())
    difference = gae(arbitrary_value(), gae_lambda) - gae(exact_value(), gae_lambda)
    weight = probability()
    for t, state, action in np.ndindex(4, 3, 2):
        chosen = weight * ((BATCH.state[t] == state) & (BATCH.action[t] == action))
        later = [
            (1.0 - gae_lambda) * gae_lambda ** (k - 1) * MDP.gamma**k * error[t + k]
            for k in range(1, MDP.horizon - t)
        ]
        expected = jnp.sum(chosen * (sum(later, jnp.zeros_like(error[t])) - error[t]))
        assert float(jnp.sum(chosen * difference[t])) == pytest.approx(float(expected), abs=1e-12)


# --- variance: for this process and this policy, because no such order is a theorem --------------

PINNED = {
    "total return": 4.480,
    "reward-to-go": 1.808,
    "reward-to-go less V": 0.616,
    "reward-to-go less an arbitrary b(s)": 2.183,
}


@pytest.mark.parametrize("name", PINNED)
def test_variance(name: str) -> None:
    assert trace_variance(UNBIASED[name]()) == pytest.approx(PINNED[name], abs=5e-4)


def test_causality_and_a_good_baseline_reduce_the_variance_and_a_bad_one_does_not() -> None:
    total, causal, good, bad = (trace_variance(UNBIASED[name]()) for name in PINNED)
    assert total > causal > good
    assert bad > causal


def test_a_shorter_trace_of_the_exact_value_reduces_the_variance() -> None:
    shorter, middle, longest = (
        trace_variance(UNBIASED[f"GAE of the exact V, lambda {size}"]())
        for size in ("0", "1/2", "1")
    )
    assert shorter < middle < longest
    assert longest == pytest.approx(PINNED["reward-to-go less V"], abs=5e-4)


def test_the_errors_of_the_exact_value_are_uncorrelated() -> None:
    def product(table: jax.Array, earlier: int, later: int) -> float:
        delta = gae(table, 0.0)
        return float(jnp.sum(probability() * delta[earlier] * delta[later]))

    pairs = [(e, k) for k in range(MDP.horizon) for e in range(k)]
    assert max(abs(product(exact_value(), *pair)) for pair in pairs) < 1e-14
    assert max(abs(product(arbitrary_value(), *pair)) for pair in pairs) > 0.05
    # So the variances of an advantage add up, with the squares of its weights.
    size = 0.7
    parts = [(MDP.gamma * size) ** (2 * k) * product(exact_value(), k, k) for k in range(4)]
    whole = jnp.sum(probability() * jnp.square(gae(exact_value(), size)[0]))
    assert float(whole) == pytest.approx(sum(parts), rel=1e-12)


# --- identities of the score ---------------------------------------------------------------------


def score_moments(
    log_prob: Callable[[jax.Array], jax.Array], weight: jax.Array, parameters: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """E[∇log π], E[∇log π ∇log πᵀ] and −E[∇∇ log π] over actions of the given weights."""
    score = jax.jacobian(log_prob)(parameters)
    curvature = jax.hessian(log_prob)(parameters)
    covariance = jnp.einsum("a,ai,aj->ij", weight, score, score)
    return weight @ score, covariance, -jnp.einsum("a,aij->ij", weight, curvature)


@pytest.mark.parametrize("state", range(3))
def test_moments_of_the_score_of_a_choice(state: int) -> None:
    def log_prob(logits: jax.Array) -> jax.Array:
        return distributions.categorical(jnp.stack([logits, logits])).log_prob(jnp.arange(2))

    p = jax.nn.softmax(LOGITS[state])
    moments = jax.jit(functools.partial(score_moments, log_prob))
    mean, covariance, curvature = moments(p, jnp.asarray(LOGITS[state]))
    fisher = jnp.diag(p) - jnp.outer(p, p)
    np.testing.assert_allclose(mean, jnp.zeros(2), atol=1e-15)
    np.testing.assert_allclose(covariance, fisher, atol=1e-15)
    np.testing.assert_allclose(curvature, fisher, atol=1e-15)


def test_moments_of_the_score_of_a_gaussian() -> None:
    # Five nodes of Gauss and Hermite are exact up to degree nine; a product of scores has four.
    node, weight = np.polynomial.hermite_e.hermegauss(5)
    mu, log_std = 0.7, -0.4
    action = (mu + np.exp(log_std) * node)[:, None]

    def log_prob(x: jax.Array) -> jax.Array:
        return distributions.diag_gaussian(jnp.full((5, 1), x[0]), x[1:]).log_prob(action)

    moments = jax.jit(functools.partial(score_moments, log_prob))
    mean, covariance, curvature = moments(weight / weight.sum(), jnp.array([mu, log_std]))
    fisher = np.diag([np.exp(-2.0 * log_std), 2.0])
    np.testing.assert_allclose(mean, jnp.zeros(2), atol=1e-14)
    np.testing.assert_allclose(covariance, fisher, atol=1e-13)
    np.testing.assert_allclose(curvature, fisher, atol=1e-13)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_entropy_bonus_is_subtracted_from_a_loss(sign: float) -> None:
    def entropy(logits: jax.Array) -> jax.Array:
        return distributions.categorical(logits).entropy().mean()

    def loss(logits: jax.Array, ent_coef: float) -> jax.Array:
        advantage = DISCOUNT * gae(exact_value(), 0.5)
        weight = probability()
        return jnp.sum(weight * trajectory_loss(logits, advantage)) - ent_coef * entropy(logits)

    start, slope = jnp.asarray(LOGITS), jax.jit(jax.grad(loss))
    without, with_bonus = (start - 1e-3 * slope(start, c) for c in (0.0, sign * 0.1))
    change = float(entropy(with_bonus) - entropy(without))
    assert sign * change > 1e-7
    alone = start + sign * 1e-3 * jax.grad(entropy)(start)
    assert sign * float(entropy(alone) - entropy(start)) > 1e-6


# --- invariances ---------------------------------------------------------------------------------


def gradients(mdp: tiny_mdp.Mdp, baseline: bool) -> jax.Array:
    """ĝ(τ) in a process with other rewards, with the exact V of that process as baseline."""
    reward = jnp.asarray(mdp.reward)[BATCH.state, BATCH.action]
    value = along(tiny_mdp.values(mdp, LOGITS)[0][:-1])
    target = returns.discounted_return(reward, BATCH.terminated, mdp.gamma)
    return trajectory_gradient(DISCOUNT * (target - value if baseline else target))


def test_a_constant_in_every_reward_is_removed_by_the_value() -> None:
    # Every episode has the same length; with a choice of when to end, a constant would matter.
    raised = dataclasses.replace(MDP, reward=MDP.reward + 3.0)
    np.testing.assert_allclose(exact_gradient(raised.reward), exact_gradient(), atol=EXACT)
    before, after = (gradients(mdp, baseline=True) for mdp in (MDP, raised))
    np.testing.assert_allclose(after, before, atol=EXACT)
    before, after = (gradients(mdp, baseline=False) for mdp in (MDP, raised))
    assert float(jnp.max(jnp.abs(after - before))) > 1.0


def test_rewards_in_another_unit_scale_the_gradient() -> None:
    scaled = dataclasses.replace(MDP, reward=7.0 * MDP.reward)
    np.testing.assert_allclose(exact_gradient(scaled.reward), 7.0 * exact_gradient(), atol=EXACT)
    before, after = (gradients(mdp, baseline=True) for mdp in (MDP, scaled))
    np.testing.assert_allclose(after, 7.0 * before, atol=EXACT)


# --- following the gradient ----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="num_steps")
def ascend(logits: jax.Array, step_size: float, num_steps: int) -> jax.Array:
    """J before each step along the expected gradient of the kernels."""

    def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        gradient = expected_gradient(DISCOUNT * reward_to_go(), x)
        return x + step_size * gradient, objective(x)

    return jax.lax.scan(step, logits, length=num_steps)[1]


def test_small_exact_steps_never_lower_the_objective() -> None:
    history = ascend(tiny_mdp.per_step(MDP, LOGITS), 0.5, 200)
    assert float(jnp.min(jnp.diff(history))) > 0.0


def test_exact_steps_lead_to_the_optimum_of_value_iteration() -> None:
    # One table per step, because the best action may depend on the remaining time.
    history = ascend(tiny_mdp.per_step(MDP, LOGITS), 100.0, 500)
    best = tiny_mdp.optimum(MDP)
    assert float(history[0]) < best - 1.0
    assert best - 1e-3 < float(history[-1]) < best


def jacobian(discount: np.ndarray) -> jax.Array:
    """Derivative of the expected update with respect to its policy: [6, 6]."""

    def update(flat: jax.Array) -> jax.Array:
        return expected_gradient(discount * reward_to_go(), flat.reshape(LOGITS.shape)).ravel()

    return jax.jit(jax.jacfwd(update))(jnp.asarray(LOGITS).ravel())


def test_without_gamma_to_the_t_the_update_is_the_gradient_of_nothing() -> None:
    # A gradient's Jacobian is a Hessian, and symmetric. Nota and Thomas 2020, arXiv:1906.07073,
    # prove for the update without γ^t that it is the gradient of no function.
    right, wrong = jacobian(DISCOUNT), jacobian(np.ones_like(DISCOUNT))
    hessian = jax.jit(jax.hessian(objective))(LOGITS)
    np.testing.assert_allclose(right, hessian.reshape(6, 6), atol=EXACT)
    np.testing.assert_allclose(right, right.T, atol=EXACT)
    assert float(jnp.max(jnp.abs(wrong - wrong.T))) > 0.01
