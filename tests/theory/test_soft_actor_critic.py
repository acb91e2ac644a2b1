"""Soft value iteration, soft policy iteration and the temperature, built from the kernels alone.

Everything is exact and in float64: the task is the small random one of `tiny_mdp`, never ending,
and means over actions and next states are sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_mdp

from purejaxpg.kernels import distributions, losses

pytestmark = pytest.mark.fast

MDP = tiny_mdp.example().mdp
ALPHA = 0.3


def soft_state_value(policy, action_value, alpha):
    """Value of each state, entropy included: [S]."""
    return distributions.expectation(policy, losses.soft_value(policy.logits, action_value, alpha))


def backup(policy, action_value, alpha):
    """The target of a soft critic, averaged over the next state: [S, A]."""
    next_value = soft_state_value(policy, action_value, alpha)
    never = jnp.zeros(MDP.transition.shape, bool)
    reward, next_value = (
        jnp.broadcast_to(x, never.shape) for x in (MDP.reward[:, :, None], next_value)
    )
    target = losses.td_target(reward, next_value, never, MDP.gamma)
    return jnp.sum(MDP.transition * target, -1)


def iterate(step, start, count):
    return jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: step(y), x))(start)


def soft_optimum(alpha):
    """Q of the best policy, from the kernels."""
    return iterate(
        lambda q: backup(distributions.categorical(q / alpha), q, alpha), jnp.zeros((3, 2)), 200
    )


def hard_optimum():
    """Q of the best policy without entropy, by plain value iteration."""
    q = np.zeros(MDP.reward.shape)
    for _ in range(300):
        q = MDP.reward + MDP.gamma * MDP.transition @ q.max(-1)
    return q


def evaluate(policy, alpha):
    """Q of a policy by solving its linear equations, without the kernels."""
    p = np.asarray(jax.nn.softmax(policy.logits))
    earned = MDP.reward + MDP.gamma * MDP.transition @ (-alpha * np.sum(p * np.log(p), -1))
    moves = np.einsum("sax,xb->saxb", MDP.transition, p).reshape(6, 6)
    return np.linalg.solve(np.eye(6) - MDP.gamma * moves, earned.ravel()).reshape(3, 2)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 2.0])
def test_soft_value_iteration_finds_the_fixed_point_of_the_log_sum(alpha):
    plain = np.zeros(MDP.reward.shape)
    for _ in range(200):
        top = plain.max(-1)
        log_sum = top + alpha * np.log(np.sum(np.exp((plain - top[:, None]) / alpha), -1))
        plain = MDP.reward + MDP.gamma * MDP.transition @ log_sum
    q = soft_optimum(alpha)
    np.testing.assert_allclose(q, plain, rtol=1e-12)
    policy = distributions.categorical(q / alpha)
    value = soft_state_value(policy, q, alpha)
    np.testing.assert_allclose(value, alpha * jax.nn.logsumexp(q / alpha, -1), rtol=1e-12)
    np.testing.assert_allclose(backup(policy, q, alpha), q, rtol=1e-12)


def test_soft_value_iteration_contracts_by_the_discount():
    best = soft_optimum(ALPHA)
    q = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))
    for _ in range(5):
        after = backup(distributions.categorical(q / ALPHA), q, ALPHA)
        before, now = (float(jnp.abs(x - best).max()) for x in (q, after))
        assert now <= MDP.gamma * before + 1e-12
        q = after


def test_the_best_soft_policy_is_the_softmax_and_no_other_is_as_good():
    q = soft_optimum(ALPHA)
    best = distributions.categorical(q / ALPHA)
    np.testing.assert_allclose(evaluate(best, ALPHA), q, rtol=1e-12)
    for seed in range(5):
        other = distributions.categorical(
            best.logits + np.random.default_rng(seed).normal(size=(3, 2))
        )
        assert np.all(evaluate(other, ALPHA) < q)


def test_the_soft_optimum_is_above_the_hard_one_by_no_more_than_the_entropy_can_earn():
    hard = hard_optimum()
    # The backup at temperature zero is that of the greedy policy, and so of plain value iteration.
    greedy = distributions.categorical(jnp.where(hard == hard.max(-1, keepdims=True), 0.0, -1e9))
    np.testing.assert_allclose(backup(greedy, jnp.asarray(hard), 0.0), hard, rtol=1e-12)
    gaps = []
    for alpha in (0.3, 0.1, 0.01):
        gap = np.asarray(soft_optimum(alpha)) - hard
        assert np.all(gap >= 0.0)
        assert np.all(gap <= alpha * np.log(2.0) * MDP.gamma / (1.0 - MDP.gamma) + 1e-12)
        gaps.append(gap.max())
    assert gaps[0] > 0.1
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.01


def test_repeated_backups_evaluate_a_fixed_policy():
    policy = distributions.categorical(jnp.asarray(tiny_mdp.example().logits))
    q = iterate(lambda q: backup(policy, q, ALPHA), jnp.zeros((3, 2)), 200)
    np.testing.assert_allclose(q, evaluate(policy, ALPHA), rtol=1e-12)


def actor_loss(logits, action_value):
    policy = distributions.categorical(logits)
    loss = losses.soft_policy(policy.logits, action_value, ALPHA)
    return distributions.expectation(policy, loss).sum()


def test_one_gradient_step_on_the_actor_improves_the_policy_in_every_state():
    logits = jnp.asarray(tiny_mdp.example().logits)
    q = jnp.asarray(evaluate(distributions.categorical(logits), ALPHA))
    after = distributions.categorical(logits - 0.1 * jax.grad(actor_loss)(logits, q))
    assert np.all(evaluate(after, ALPHA) > q)


def test_actor_and_critic_in_turns_reach_the_soft_optimum():
    def turn(state):
        logits, q = state
        logits = logits - 2.0 * jax.grad(actor_loss)(logits, q)
        return logits, backup(distributions.categorical(logits), q, ALPHA)

    logits, q = iterate(turn, (jnp.zeros((3, 2)), jnp.zeros((3, 2))), 4000)
    best = soft_optimum(ALPHA)
    np.testing.assert_allclose(q, best, atol=1e-9)
    np.testing.assert_allclose(jax.nn.softmax(logits), jax.nn.softmax(best / ALPHA), atol=1e-7)


def test_the_actors_loss_has_a_slope_in_the_critic_that_must_not_be_followed():
    q = soft_optimum(ALPHA)
    policy = distributions.categorical(q / ALPHA)
    to_critic = jax.grad(actor_loss, 1)(policy.logits, q)
    # Following it downhill raises every value without any experience.
    np.testing.assert_allclose(to_critic, -jnp.exp(policy.logits), rtol=1e-12)


@pytest.mark.parametrize("stopped", [True, False])
def test_the_critics_loss_moves_the_actor_unless_its_target_is_data(stopped):
    q = jnp.asarray(np.random.default_rng(2).normal(size=(3, 2)))

    def critic_loss(logits):
        target = backup(distributions.categorical(logits), q, ALPHA)
        target = jax.lax.stop_gradient(target) if stopped else target
        return losses.value_loss(q, target).sum()

    to_actor = jax.grad(critic_loss)(jnp.zeros((3, 2)))
    assert bool(jnp.any(to_actor != 0.0)) is not stopped


def test_the_smaller_of_two_critics_takes_back_the_overestimation():
    draw = np.random.default_rng(3)
    truth = jnp.zeros((10_000, 4))
    first, second = (truth + draw.normal(size=truth.shape) for _ in range(2))
    log_probs = distributions.categorical(first / ALPHA).logits
    policy = distributions.categorical(first / ALPHA)
    exact, single, twin = (
        float(distributions.expectation(policy, losses.soft_value(log_probs, q, ALPHA)).mean())
        for q in (truth, first, jnp.minimum(first, second))
    )
    # The actor exploits the errors of the first critic; those of the second are independent.
    assert single > exact + 0.5
    assert twin < exact + 0.1
    never = jnp.zeros(truth.shape, bool)
    targets = [
        losses.td_target(truth, losses.soft_value(log_probs, q, ALPHA), never, 0.9)
        for q in (jnp.minimum(first, second), first, second)
    ]
    np.testing.assert_array_equal(targets[0], jnp.minimum(targets[1], targets[2]))


@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
@pytest.mark.parametrize("start", [-4.0, 2.0])
def test_the_temperature_settles_where_the_entropy_is_the_target(share, start):
    value, target = jnp.array([1.0, 0.4, -0.3, 0.1]), share * np.log(4.0)

    def entropy(log_alpha):
        return distributions.categorical(value / jnp.exp(log_alpha)).entropy()

    def step(log_alpha):
        loss = jax.grad(lambda x: losses.temperature(x, entropy(log_alpha)[None], target).mean())
        return log_alpha - 0.5 * loss(log_alpha)

    log_alpha = iterate(step, jnp.array(start), 2000)
    assert float(entropy(log_alpha)) == pytest.approx(target, abs=1e-6)
    assert float(step(log_alpha)) == pytest.approx(float(log_alpha), abs=1e-6)


def squashed_loss(action, log_prob):
    value = -2.0 * jnp.square(action[..., 0] - 0.5)
    return losses.soft_policy(log_prob, value, ALPHA)


def test_the_reparametrised_gradient_is_that_of_the_expected_loss():
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    parameters = jnp.array([0.3]), jnp.array([-0.5])
    num_samples = 40_000

    def expected(mean, log_std):
        x = mean[None] + jnp.exp(log_std)[None] * node[:, None]
        policy = distributions.tanh_gaussian(jnp.broadcast_to(mean, x.shape), log_std)
        loss = squashed_loss(jnp.tanh(x), policy.log_prob(jnp.tanh(x)))
        return jnp.sum(weight / weight.sum() * loss)

    def sampled(mean, log_std):
        wide = jnp.broadcast_to(mean, (num_samples, 1)), jnp.broadcast_to(log_std, (num_samples, 1))

        def total(mean, log_std):
            policy = distributions.tanh_gaussian(mean, log_std)
            return squashed_loss(*policy.sample_and_log_prob(seed=jax.random.key(0))).sum()

        return jax.grad(total, (0, 1))(*wide)

    exact = jax.jit(jax.grad(expected, (0, 1)))(*parameters)
    with jax.numpy_rank_promotion("allow"):  # distrax needs it to sample with a log density
        gradients = jax.jit(sampled)(*parameters)
    for of_each, mean in zip(gradients, exact, strict=True):
        deviation = float(of_each.std()) / np.sqrt(num_samples)
        assert float(of_each.mean()) == pytest.approx(float(mean[0]), abs=4 * deviation)
        assert abs(float(mean[0])) > 10 * deviation
