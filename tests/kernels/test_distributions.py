import doctest
import functools
import json
import pathlib
import subprocess
import sys

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
from scipy import stats

from purejaxpg.kernels import distributions, losses, squashed

pytestmark = pytest.mark.fast

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "sb3_ppo.json"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def strict_shapes():
    with jax.numpy_rank_promotion("raise"):
        yield


def single(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def random_logits(seed, *shape):
    return np.random.default_rng(seed).normal(scale=2.0, size=shape)


def random_gaussians(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(scale=0.5, size=shape)


@jax.jit
def facts(p, q, action):
    """Log probability, entropy and divergence, in one program per kind and shape."""
    return p.log_prob(action), p.entropy(), p.kl_divergence(q)


@jax.jit
def log_density(policy, action):
    return policy.log_prob(action)


@jax.jit
def drawn(policy, key):
    """Sample and log density, for which distrax promotes ranks."""
    with jax.numpy_rank_promotion("allow"):
        return policy.sample_and_log_prob(seed=key)


# --- categorical ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (6, 1), (2, 3, 5)])
def test_categorical_is_the_loop(shape):
    p_logits, q_logits = random_logits(0, *shape), random_logits(1, *shape)
    action = np.random.default_rng(2).integers(0, shape[-1], shape[:-1])
    log_prob, entropy, kl = (np.zeros(shape[:-1]) for _ in range(3))
    for i in np.ndindex(*shape[:-1]):
        p, q = (np.exp(x[i]) / sum(np.exp(x[i])) for x in (p_logits, q_logits))
        log_prob[i] = np.log(p[action[i]])
        for a in range(shape[-1]):
            entropy[i] -= p[a] * np.log(p[a])
            kl[i] += p[a] * (np.log(p[a]) - np.log(q[a]))
    p, q = (distributions.categorical(x) for x in single(p_logits, q_logits))
    actual = facts(p, q, jnp.asarray(action))
    for own, expected in zip(actual, (log_prob, entropy, kl), strict=True):
        assert own.shape == shape[:-1]
        np.testing.assert_allclose(own, expected, **TOLERANCE)


def test_categorical_by_hand():
    policy = distributions.categorical(jnp.log(jnp.array([0.5, 0.25, 0.25])))
    uniform = distributions.categorical(jnp.zeros(3))
    # H = 1/2 log 2 + 2 * 1/4 log 4 = 3/2 log 2
    # KL(p || uniform) = log 3 - H(p)
    # KL(uniform || p) = -log 3 + (log 2 + 2 log 4) / 3 = 5/3 log 2 - log 3
    log_prob, entropy, kl = facts(policy, uniform, jnp.array(2))
    assert float(log_prob) == pytest.approx(-2.0 * np.log(2.0), rel=1e-6)
    assert float(entropy) == pytest.approx(1.5 * np.log(2.0), rel=1e-6)
    assert float(kl) == pytest.approx(np.log(3) - 1.5 * np.log(2), rel=1e-5)
    back = facts(uniform, policy, jnp.array(2))[2]
    assert float(back) == pytest.approx(5 / 3 * np.log(2) - np.log(3), rel=1e-5)
    assert int(policy.mode()) == 0


def test_categorical_entropy_is_that_of_rlax():
    (logits,) = single(random_logits(6, 50, 6))
    peer = rlax.entropy_loss(logits, jnp.ones(50))
    actual = -distributions.categorical(logits).entropy().mean()
    np.testing.assert_allclose(actual, peer, rtol=1e-5)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cases"][:1])
def test_categorical_is_that_of_stable_baselines(case):
    policy = distributions.categorical(jnp.array(case["logits"], jnp.float32))
    log_prob, entropy, _ = facts(policy, policy, jnp.array(case["action"]))
    np.testing.assert_allclose(log_prob, np.array(case["log_prob"]), **TOLERANCE)
    np.testing.assert_allclose(entropy, np.array(case["entropy"]), **TOLERANCE)
    logged = case["logged"]["entropy_loss"]
    assert float(-entropy.mean()) == pytest.approx(logged, rel=1e-5)


def test_categorical_does_not_depend_on_a_constant_in_the_logits():
    p_logits, q_logits = single(random_logits(7, 20, 4), random_logits(8, 20, 4))
    p, q = distributions.categorical(p_logits), distributions.categorical(q_logits)
    shifted = distributions.categorical(p_logits + 5.0)
    action = jnp.zeros(20, jnp.int32)
    for own, expected in zip(facts(shifted, q, action), facts(p, q, action), strict=True):
        np.testing.assert_allclose(own, expected, **TOLERANCE)
    np.testing.assert_allclose(facts(p, shifted, action)[2], jnp.zeros(20), atol=1e-5)


@pytest.mark.parametrize("nothing", [-1e9, -np.inf])
def test_an_impossible_action_changes_neither_value_nor_gradient(nothing):
    possible, other = single(random_logits(9, 4), random_logits(10, 4))
    mask = jnp.array([nothing], jnp.float32)

    def four(logits, q_logits):
        p, q = distributions.categorical(logits), distributions.categorical(q_logits)
        log_prob = p.log_prob(jnp.array(2))
        return jnp.stack([log_prob, p.entropy(), p.kl_divergence(q), q.kl_divergence(p)])

    def masked(x, y):
        return four(jnp.concatenate([x, mask]), jnp.concatenate([y, mask]))

    def values_and_slopes(function):
        return jax.jit(lambda x, y: (function(x, y), jax.jacobian(function, (0, 1))(x, y)))

    actual, slopes = values_and_slopes(masked)(possible, other)
    expected, expected_slopes = values_and_slopes(four)(possible, other)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    for own, theirs in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-7)
    whole = jnp.concatenate([possible, mask])
    gradient = jax.grad(lambda x: distributions.categorical(x).entropy())(whole)
    assert np.all(np.isfinite(gradient))
    assert float(gradient[-1]) == 0.0
    assert float(distributions.categorical(whole).log_prob(jnp.array(4))) < -1e8


def test_a_certain_choice_has_no_entropy_and_no_slope():
    logits = jnp.array([0.0, -1e9, -1e9])
    entropy, gradient = jax.value_and_grad(lambda x: distributions.categorical(x).entropy())(logits)
    assert float(entropy) == 0.0
    assert gradient.tolist() == [0.0, 0.0, 0.0]


def test_an_excluded_action_is_infinitely_far_away():
    p = distributions.categorical(jnp.zeros(2))
    q = distributions.categorical(jnp.array([0.0, -jnp.inf]))
    assert float(p.kl_divergence(q)) == np.inf
    assert float(q.kl_divergence(p)) == pytest.approx(np.log(2.0), rel=1e-6)


def test_categorical_score_is_the_choice_less_the_probability():
    (logits,) = single(random_logits(11, 8, 5))
    action = jnp.asarray(np.random.default_rng(12).integers(0, 5, 8))
    score = jax.grad(lambda x: distributions.categorical(x).log_prob(action).sum())(logits)
    expected = jax.nn.one_hot(action, 5) - jax.nn.softmax(logits)
    np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-6)


def test_categorical_log_prob_neither_gathers_nor_scatters():
    def loss(logits, action):
        return distributions.categorical(logits).log_prob(action).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((8, 5)), jnp.zeros(8, jnp.int32)))
    assert "exp" in program
    assert "gather" not in program
    assert "scatter" not in program


def test_curvature_of_the_divergence_is_the_fisher_matrix():
    (logits,) = single(random_logits(13, 4))
    old = distributions.categorical(logits)
    curvature = jax.jit(jax.hessian(lambda x: old.kl_divergence(distributions.categorical(x))))(
        logits
    )
    p = jax.nn.softmax(logits)
    fisher = jnp.diag(p) - jnp.outer(p, p)
    np.testing.assert_allclose(curvature, fisher, rtol=1e-4, atol=1e-6)


def test_categorical_samples_are_the_draws_of_jax_and_have_their_probabilities():
    probability = np.array([0.1, 0.2, 0.3, 0.4, 0.0])
    num_samples = 40_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probability)), (num_samples, 5))
    action = distributions.categorical(logits).sample(seed=jax.random.key(0))
    np.testing.assert_array_equal(action, jax.random.categorical(jax.random.key(0), logits))
    assert action.dtype == jnp.int32
    frequency = np.bincount(np.asarray(action), minlength=5) / num_samples
    deviation = np.sqrt(probability * (1.0 - probability) / num_samples)
    assert np.all(np.abs(frequency - probability) <= 4.0 * deviation)


def test_categorical_samples_are_independent_over_the_batch():
    policy = distributions.categorical(jnp.zeros((2, 10_000, 2)))
    first, second = policy.sample(seed=jax.random.key(1))
    # The number of agreements of two independent coins: mean 1/2, deviation 1/200.
    assert float(jnp.mean(first == second)) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("shape", [(3,), (6, 1), (2, 3, 5)])
def test_expectation_is_the_loop(shape):
    logits, x = random_logits(30, *shape), random_logits(31, *shape)
    expected = np.zeros(shape[:-1])
    for i in np.ndindex(*shape[:-1]):
        p = np.exp(logits[i]) / sum(np.exp(logits[i]))
        for a in range(shape[-1]):
            expected[i] += p[a] * x[i][a]
    policy = distributions.categorical(*single(logits))
    actual = distributions.expectation(policy, *single(x))
    assert actual.shape == shape[:-1]
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


def test_logits_and_expectation_agree_with_the_other_methods():
    logits, other_logits = single(random_logits(32, 7, 5), random_logits(33, 7, 5))
    policy, other = distributions.categorical(logits), distributions.categorical(other_logits)
    one, entropy, kl = facts(policy, other, jnp.full(7, 3))
    np.testing.assert_allclose(policy.logits[:, 3], one, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(policy.logits).sum(-1), jnp.ones(7), rtol=1e-6)
    for x, expected in [
        (policy.logits, -entropy),
        (policy.logits - other.logits, kl),
        (jnp.ones((7, 5)), jnp.ones(7)),
    ]:
        np.testing.assert_allclose(distributions.expectation(policy, x), expected, **TOLERANCE)


def test_expectation_by_hand():
    # 1/2 * 4 + 1/4 * 2 - 1/4 * 2 = 2
    policy = distributions.categorical(jnp.log(jnp.array([0.5, 0.25, 0.25])))
    mean = distributions.expectation(policy, jnp.array([4.0, 2.0, -2.0]))
    assert float(mean) == pytest.approx(2.0, rel=1e-6)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def total_expectation(logits, x):
    return distributions.expectation(distributions.categorical(logits), x).sum()


def test_expectation_knows_how_the_probabilities_depend_on_the_logits():
    logits, x = single(random_logits(34, 6, 4), random_logits(35, 6, 4))
    p = jax.nn.softmax(logits)
    mean = jnp.sum(p * x, axis=-1, keepdims=True)
    to_logits, to_x = total_expectation(logits, x)[1]
    # The covariance of the choice and x, as in the policy gradient theorem.
    np.testing.assert_allclose(to_logits, p * (x - mean), **TOLERANCE)
    np.testing.assert_allclose(to_x, p, rtol=1e-6)


@pytest.mark.parametrize("nothing", [-1e9, -np.inf])
@pytest.mark.parametrize("x", [np.inf, -np.inf, np.nan, 1e30])
def test_expectation_leaves_out_what_cannot_happen(nothing, x):
    logits, values = jnp.array([0.3, nothing, -0.2]), jnp.array([1.0, x, 2.0])
    expected, expected_slopes = total_expectation(logits[::2], values[::2])
    actual, slopes = total_expectation(logits, values)
    assert float(actual) == pytest.approx(float(expected), rel=1e-6)
    for own, theirs in zip(slopes, expected_slopes, strict=True):
        np.testing.assert_allclose(own[::2], theirs, rtol=1e-6)
        assert float(own[1]) == 0.0


def test_expectation_of_log_probabilities_is_finite_for_impossible_actions():
    def minus_entropy(logits):
        policy = distributions.categorical(logits)
        return distributions.expectation(policy, policy.logits)

    value, slopes = jax.value_and_grad(minus_entropy)(jnp.array([0.0, 0.0, -jnp.inf]))
    assert float(value) == pytest.approx(-np.log(2.0), rel=1e-6)
    np.testing.assert_allclose(slopes, jnp.zeros(3), atol=1e-7)


def test_logits_are_finite_if_the_probability_is_not_representable():
    logits = jnp.array([0.0, -200.0])
    assert distributions.categorical(logits).logits.tolist() == [0.0, -200.0]
    assert float(jnp.log(jax.nn.softmax(logits))[1]) == -np.inf


def test_expectation_refuses_a_value_per_state():
    with pytest.raises(AssertionError, match="shape"):
        distributions.expectation(distributions.categorical(jnp.zeros((3, 4))), jnp.zeros((3, 1)))


# --- diagonal Gaussian ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 3, 1), (6, 2)])
@pytest.mark.parametrize("shared_std", [False, True])
def test_gaussian_is_the_loop(shape, shared_std):
    (p_mean, p_log_std), (q_mean, q_log_std) = (random_gaussians(s, *shape) for s in (14, 15))
    if shared_std:
        p_log_std, q_log_std = (
            p_log_std.reshape(-1, shape[-1])[0],
            q_log_std.reshape(-1, shape[-1])[0],
        )
    action = random_gaussians(16, *shape)[0]
    log_prob, entropy, kl = (np.zeros(shape[:-1]) for _ in range(3))
    wide_p, wide_q = (np.exp(np.broadcast_to(x, shape)) for x in (p_log_std, q_log_std))
    for i in np.ndindex(*shape):
        j, s, r = i[:-1], wide_p[i], wide_q[i]
        density = np.exp(-0.5 * ((action[i] - p_mean[i]) / s) ** 2) / (s * np.sqrt(2.0 * np.pi))
        log_prob[j] += np.log(density)
        entropy[j] += 0.5 * np.log(2.0 * np.pi * np.e * s**2)
        kl[j] += np.log(r / s) + (s**2 + (p_mean[i] - q_mean[i]) ** 2) / (2.0 * r**2) - 0.5
    p = distributions.diag_gaussian(*single(p_mean, p_log_std))
    q = distributions.diag_gaussian(*single(q_mean, q_log_std))
    actual = facts(p, q, *single(action))
    for own, expected in zip(actual, (log_prob, entropy, kl), strict=True):
        assert own.shape == shape[:-1]
        np.testing.assert_allclose(own, expected, **TOLERANCE)


def test_gaussian_by_hand():
    p = distributions.diag_gaussian(jnp.array([1.0, 0.0]), jnp.log(jnp.array([2.0, 1.0])))
    q = distributions.diag_gaussian(jnp.zeros(2), jnp.zeros(2))
    log_prob, entropy, kl = facts(p, q, jnp.array([3.0, 0.0]))
    # log density of (3, 0): -(2/2)^2 / 2 - log 2 - log 2 pi
    assert float(log_prob) == pytest.approx(-0.5 - np.log(2.0) - np.log(2.0 * np.pi), rel=1e-6)
    # H = log 2 + 1 + log 2 pi
    assert float(entropy) == pytest.approx(np.log(2.0) + 1.0 + np.log(2.0 * np.pi), rel=1e-6)
    # KL(p || q) = -log 2 + (4 + 1)/2 - 1/2 = 2 - log 2
    # KL(q || p) =  log 2 + (1 + 1)/8 - 1/2 = log 2 - 1/4
    assert float(kl) == pytest.approx(2.0 - np.log(2.0), rel=1e-6)
    assert float(facts(q, p, jnp.zeros(2))[2]) == pytest.approx(np.log(2.0) - 0.25, rel=1e-5)
    assert p.mode().tolist() == [1.0, 0.0]


def test_gaussian_is_that_of_scipy():
    mean, log_std = single(*random_gaussians(17, 30, 4))
    (action,) = single(random_gaussians(19, 30, 4)[0])
    policy = distributions.diag_gaussian(mean, log_std)
    peer = stats.norm(np.float64(mean), np.exp(np.float64(log_std)))
    log_prob, entropy, _ = facts(policy, policy, action)
    np.testing.assert_allclose(log_prob, peer.logpdf(np.float64(action)).sum(-1), **TOLERANCE)
    np.testing.assert_allclose(entropy, peer.entropy().sum(-1), **TOLERANCE)


def test_gaussian_entropy_counts_every_state_and_every_component():
    mean, log_std = jnp.zeros((7, 3)), jnp.array([0.0, 1.0, 2.0])
    expected = 3.0 + 1.5 * (1.0 + np.log(2.0 * np.pi))
    for width in (log_std, jnp.float32(1.0)):
        entropy = distributions.diag_gaussian(mean, width).entropy()
        np.testing.assert_allclose(entropy, np.full(7, expected), rtol=1e-6)


def test_gaussian_density_integrates_to_one():
    grid = jnp.linspace(-12.0, 12.0, 20_001)[:, None]
    policy = distributions.diag_gaussian(jnp.full_like(grid, 0.7), jnp.array([0.4]))
    density = jnp.exp(policy.log_prob(grid))
    assert float(jnp.sum(density)) * 24.0 / 20_000 == pytest.approx(1.0, abs=1e-5)


def test_gaussian_divergence_from_itself_is_exactly_zero_and_flat():
    mean, log_std = single(*random_gaussians(20, 10, 3))
    old = distributions.diag_gaussian(mean, log_std)

    def divergence(mean, log_std):
        kl = old.kl_divergence(distributions.diag_gaussian(mean, log_std))
        return kl.sum(), kl

    slopes, kl = jax.grad(divergence, (0, 1), has_aux=True)(mean, log_std)
    assert kl.tolist() == [0.0] * 10
    np.testing.assert_allclose(slopes, jnp.zeros((2, 10, 3)), atol=1e-6)


def test_a_small_gaussian_divergence_keeps_its_digits():
    log_std = jnp.full((1, 3), -1.0)
    old = distributions.diag_gaussian(jnp.zeros((1, 3)), log_std)
    new = distributions.diag_gaussian(jnp.zeros((1, 3)), log_std + 1e-3)
    shift = np.float64(jnp.log(jnp.exp(log_std + 1e-3)) - jnp.log(jnp.exp(log_std)))
    expected = np.sum(shift + 0.5 * np.expm1(-2.0 * shift))
    assert float(old.kl_divergence(new)[0]) == pytest.approx(expected, rel=1e-3)


def test_gaussian_score_is_the_standardised_distance():
    mean, log_std = single(*random_gaussians(21, 6, 2))
    (action,) = single(random_gaussians(22, 6, 2)[0])

    def log_prob(mean, log_std):
        return distributions.diag_gaussian(mean, log_std).log_prob(action).sum()

    to_mean, to_log_std = jax.grad(log_prob, (0, 1))(mean, log_std)
    distance = (action - mean) * jnp.exp(-log_std)
    np.testing.assert_allclose(to_mean, distance * jnp.exp(-log_std), **TOLERANCE)
    np.testing.assert_allclose(to_log_std, distance**2 - 1.0, **TOLERANCE)


def test_gaussian_samples_are_the_draws_of_jax_and_have_their_moments():
    num_samples = 40_000
    mean = jnp.broadcast_to(jnp.array([1.0, -2.0]), (num_samples, 2))
    std = jnp.array([[0.5, 3.0]])
    policy = distributions.diag_gaussian(mean, jnp.log(std[0]))
    action = np.asarray(policy.sample(seed=jax.random.key(2)))
    noise = jax.random.normal(jax.random.key(2), (num_samples, 2))
    np.testing.assert_allclose(action, mean + std * noise, rtol=1e-5, atol=1e-6)
    # Four deviations of a mean (sigma / 200) and of a standard deviation (sigma / 283).
    np.testing.assert_allclose(action.mean(0), [1.0, -2.0], atol=4 * 3.0 / 200)
    np.testing.assert_allclose(action.std(0), [0.5, 3.0], rtol=4 / 283)
    assert abs(np.corrcoef(action.T)[0, 1]) < 4 / 200


def test_gaussian_samples_are_reparametrised():
    mean, log_std = single(*random_gaussians(23, 6, 2))

    def sample(mean, log_std):
        action = distributions.diag_gaussian(mean, log_std).sample(seed=jax.random.key(3))
        return action.sum(), action

    (to_mean, to_log_std), action = jax.grad(sample, (0, 1), has_aux=True)(mean, log_std)
    assert to_mean.tolist() == jnp.ones((6, 2)).tolist()
    np.testing.assert_allclose(to_log_std, action - mean, **TOLERANCE)


# --- tanh-Gaussian -------------------------------------------------------------------------------


def log_slope(x):
    """Logarithm of 1 - tanh^2 x in float64, by a form that does not cancel."""
    size = np.abs(np.float64(x))
    return -2.0 * (size + np.log1p(np.exp(-2.0 * size)) - np.log(2.0))


@pytest.mark.parametrize("shape", [(5,), (2, 3, 1), (4, 3)])
@pytest.mark.parametrize("shared_std", [False, True])
def test_tanh_gaussian_is_the_loop(shape, shared_std):
    mean, log_std = random_gaussians(36, *shape)
    log_std = log_std.reshape(-1, shape[-1])[0] if shared_std else log_std
    x = random_gaussians(37, *shape)[0]
    expected, wide = np.zeros(shape[:-1]), np.exp(np.broadcast_to(log_std, shape))
    for i in np.ndindex(*shape):
        z = (x[i] - mean[i]) / wide[i]
        density = np.exp(-0.5 * z**2) / (wide[i] * np.sqrt(2.0 * np.pi))
        expected[i[:-1]] += np.log(density / (1.0 - np.tanh(x[i]) ** 2))
    policy = distributions.tanh_gaussian(*single(mean, log_std))
    actual = log_density(policy, *single(np.tanh(x)))
    assert actual.shape == shape[:-1]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    action, log_prob = drawn(policy, jax.random.key(0))
    assert (action.shape, log_prob.shape) == (shape, shape[:-1])
    np.testing.assert_allclose(log_density(policy, action), log_prob, rtol=1e-4, atol=1e-4)


def test_tanh_gaussian_by_hand():
    policy = distributions.tanh_gaussian(jnp.array([0.0, 1.0]), jnp.log(jnp.array([1.0, 2.0])))
    # At x = mean: -log 2 pi - log 2, and a slope 1 - tanh^2 of 1 and of 1 / cosh^2 1.
    expected = -np.log(4.0 * np.pi) + 2.0 * np.log(np.cosh(1.0))
    assert float(log_density(policy, policy.median())) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(policy.median(), np.tanh([0.0, 1.0]), rtol=1e-6)


FAR_OUT = np.concatenate([np.linspace(-30.0, 30.0, 241), [-20.0, 9.1, 20.0]]).astype(np.float32)


@jax.jit
def drawn_with_slopes(mean, log_std, key):
    def total(mean, log_std):
        action, log_prob = distributions.tanh_gaussian(mean, log_std).sample_and_log_prob(seed=key)
        return log_prob.sum(), (action, log_prob)

    with jax.numpy_rank_promotion("allow"):
        return jax.grad(total, (0, 1), has_aux=True)(mean, log_std)


@pytest.mark.parametrize("log_std", [-20.0, -14.0, -5.0, 0.0, 2.0])
def test_tanh_gaussian_sample_has_exact_value_and_gradients_in_float32(log_std):
    key, mean = jax.random.key(7), jnp.asarray(FAR_OUT)[:, None]
    noise = np.float64(jax.random.normal(key, mean.shape))
    slopes, (action, log_prob) = drawn_with_slopes(mean, jnp.full_like(mean, log_std), key)
    spread = np.exp(np.float64(log_std)) * noise
    x = np.float64(mean) + spread
    expected = -(0.5 * noise**2 + log_std + 0.5 * np.log(2.0 * np.pi) + log_slope(x))[:, 0]
    np.testing.assert_allclose(action, np.tanh(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slopes[0], 2.0 * np.tanh(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slopes[1], 2.0 * np.tanh(x) * spread - 1.0, rtol=1e-5, atol=2e-5)


def test_gradient_of_a_tanh_gaussian_action_is_that_of_tanh():
    mean, log_std = single(*random_gaussians(38, 6, 2))

    def action(mean):
        sample = distributions.tanh_gaussian(mean, log_std).sample(seed=jax.random.key(9))
        return sample.sum(), sample

    to_mean, sample = jax.grad(action, has_aux=True)(mean)
    np.testing.assert_allclose(to_mean, 1.0 - jnp.square(sample), **TOLERANCE)


def test_tanh_gaussian_draws_the_gaussian_of_the_same_key():
    mean, log_std = single(*random_gaussians(39, 6, 2))
    key = jax.random.key(10)
    for width in (log_std, log_std[0], jnp.float32(-1.0)):
        policy = distributions.tanh_gaussian(mean, width)
        x = distributions.diag_gaussian(mean, width).sample(seed=key)
        np.testing.assert_array_equal(policy.sample(seed=key), jnp.tanh(x))
        np.testing.assert_allclose(drawn(policy, key)[0], jnp.tanh(x), rtol=1e-6)


H = 2.0**-25  # 1 - H is halfway between 1 and the next smaller number of float32


@jax.jit
def density_with_slopes(mean, log_std, action):
    def log_prob(mean, log_std):
        value = distributions.tanh_gaussian(mean, log_std).log_prob(action)
        return value.sum(), value

    return jax.grad(log_prob, (0, 1), has_aux=True)(mean, log_std)


@pytest.mark.parametrize("bound", [1.0, -1.0])
def test_log_prob_at_a_bound_is_the_mean_density_over_what_rounds_to_it(bound):
    mean, std = (x.ravel()[:, None] for x in np.meshgrid([-9.0, 0.0, 3.0, 8.5, 20.0], [0.3, 1, 5]))
    slopes, actual = density_with_slopes(*single(mean, np.log(std), np.full_like(mean, bound)))
    inside = stats.norm.logsf(np.arctanh(1.0 - H), bound * mean, std)
    np.testing.assert_allclose(actual, (inside - np.log(H))[:, 0], rtol=1e-4)
    assert np.all(np.isfinite(slopes))
    assert np.all(bound * slopes[0] >= 0.0)


def test_the_density_just_inside_a_bound_is_that_of_the_float():
    action = np.array([[1.0 - 2.0**-24], [-1.0 + 2.0**-22], [0.9999]], np.float32)
    x = np.arctanh(np.float64(action))
    expected = (stats.norm.logpdf(x, 8.0, 2.0) - log_slope(x))[:, 0]
    policy = distributions.tanh_gaussian(jnp.full((3, 1), 8.0), jnp.log(jnp.full(1, 2.0)))
    np.testing.assert_allclose(log_density(policy, jnp.asarray(action)), expected, rtol=1e-5)


def test_log_prob_of_saturated_samples_is_finite_and_rises_towards_them():
    mean = jnp.array([[20.0], [-20.0]])
    policy = distributions.tanh_gaussian(mean, jnp.full((2, 1), -3.0))
    action = policy.sample(seed=jax.random.key(16))
    assert action.ravel().tolist() == [1.0, -1.0]
    np.testing.assert_allclose(log_density(policy, action), np.full(2, -np.log(H)), rtol=1e-6)
    plain = distrax.Transformed(policy.distribution, policy.bijector)
    assert not np.any(np.isfinite(log_density(plain, action)))  # the reason for a class of our own


def squashed_density(mean, std, num_points=20_000):
    """Midpoints of a grid over (-1, 1) and the density there, in float64."""
    action = (np.arange(num_points) + 0.5) * 2.0 / num_points - 1.0
    wide = jnp.full((num_points, 1), mean, jnp.float64)
    policy = distributions.tanh_gaussian(wide, jnp.log(jnp.array([std])))
    return action, np.exp(log_density(policy, jnp.asarray(action)[:, None]))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.7, 0.6), (-1.2, 0.3)])
def test_tanh_gaussian_density_integrates_to_one(mean, std):
    with jax.enable_x64(True):
        action, density = squashed_density(mean, std)
    assert density.dtype == np.float64
    assert density.mean() * 2.0 == pytest.approx(1.0, abs=1e-7)
    below = density[action < np.tanh(mean)].mean() * (1.0 + np.tanh(mean))
    assert below == pytest.approx(0.5, abs=1e-3)


def test_the_mode_of_a_tanh_gaussian_is_where_it_is_densest():
    mean = np.array([0.2, 0.0, 0.5, -1.0, 0.01, -0.3, 3.0])
    std = np.array([2.0, 0.5, 0.3, 1.0, 0.9, 0.7, 0.1])
    x = np.linspace(-12.0, 12.0, 200_001)[:, None]
    density = stats.norm.logpdf(x, mean, std) - log_slope(x)
    mode = distributions.tanh_gaussian(*single(mean, np.log(std))).mode()
    np.testing.assert_allclose(mode, np.tanh(x[density.argmax(0), 0]), atol=2e-4)


def test_of_two_modes_the_positive_one_is_given():
    mode = distributions.tanh_gaussian(jnp.zeros(1), jnp.zeros(1)).mode()
    x = float(jnp.arctanh(mode)[0])
    assert x == pytest.approx(2.0 * np.tanh(x), rel=1e-5)
    assert x > 1.5


def test_tanh_gaussian_samples_have_the_entropy_of_the_density():
    with jax.enable_x64(True):
        _, density = squashed_density(0.4, 0.6)
    entropy = -np.mean(density * np.log(density)) * 2.0
    num_samples = 40_000
    mean = jnp.full((num_samples, 1), 0.4)
    policy = distributions.tanh_gaussian(mean, jnp.log(jnp.array([0.6])))
    action, log_prob = drawn(policy, jax.random.key(13))
    deviation = float(log_prob.std()) / np.sqrt(num_samples)
    assert float(-log_prob.mean()) == pytest.approx(entropy, abs=4 * deviation)
    below = float(jnp.mean(action < policy.median()))
    assert below == pytest.approx(0.5, abs=4 * 0.5 / 200)


def test_the_divergence_of_tanh_gaussians_is_that_of_the_gaussians():
    arrays = single(*random_gaussians(40, 5, 2)), single(*random_gaussians(41, 5, 2))
    squashed_kl, kl = (
        make(*arrays[0]).kl_divergence(make(*arrays[1]))
        for make in (distributions.tanh_gaussian, distributions.diag_gaussian)
    )
    np.testing.assert_allclose(squashed_kl, kl, rtol=1e-6)


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_entropy_is_the_mean_of_minus_the_log_probability(kind):
    if kind == "categorical":
        (logits,) = single(random_logits(24, 5))
        policy = distributions.categorical(logits)
        every = distributions.categorical(jnp.broadcast_to(logits, (5, 5)))
        log_prob = every.log_prob(jnp.arange(5))
        assert float(policy.entropy()) == pytest.approx(
            float(-jnp.sum(jnp.exp(log_prob) * log_prob)), rel=1e-5
        )
        return
    policy = distributions.diag_gaussian(jnp.zeros((100_000, 2)), jnp.array([0.3, -0.7]))
    log_prob = policy.log_prob(policy.sample(seed=jax.random.key(4)))
    # The deviation of one log probability is sqrt(A / 2) = 1, so that of the mean is 1/316.
    assert float(policy.entropy()[0]) == pytest.approx(float(-log_prob.mean()), abs=4 / 316)


def categorical_batch():
    logits, other = single(random_logits(25, 8, 4), random_logits(26, 8, 4))
    action = jnp.arange(8) % 4
    return distributions.categorical(logits), distributions.categorical(other), action


def gaussian_batch():
    p = distributions.diag_gaussian(*single(*random_gaussians(27, 8, 4)))
    q = distributions.diag_gaussian(*single(*random_gaussians(28, 8, 4)))
    return p, q, p.mode() + 0.5


def tanh_gaussian_batch():
    p = distributions.tanh_gaussian(*single(*random_gaussians(42, 8, 4)))
    q = distributions.tanh_gaussian(*single(*random_gaussians(43, 8, 4)))
    return p, q, p.median()


@pytest.mark.parametrize("make", [categorical_batch, gaussian_batch, tanh_gaussian_batch])
def test_jit_and_vmap_agree(make):
    p, q, action = make()

    def everything(p, q, action):
        return p.mode(), p.log_prob(action), p.kl_divergence(q)

    plain, by_rows = (jax.jit(f)(p, q, action) for f in (everything, jax.vmap(everything)))
    for a, b in zip(plain, by_rows, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, **TOLERANCE)
    keys = jax.random.split(jax.random.key(5), 8)
    rows = jax.vmap(lambda p, key: p.sample(seed=key))(p, keys)
    alone = jax.tree.map(lambda x: x[3], p).sample(seed=keys[3])
    np.testing.assert_allclose(rows[3], alone, rtol=1e-6)


@pytest.mark.parametrize("make", [categorical_batch, gaussian_batch])
def test_an_action_of_the_wrong_shape_does_not_get_past_a_loss(make):
    policy, _, action = make()
    with jax.numpy_rank_promotion("allow"), pytest.raises(AssertionError, match="shape"):
        losses.score_function(policy.log_prob(action[:, None]), jnp.zeros(8))


@pytest.mark.parametrize("name", ["Categorical", "DiagGaussian", "TanhGaussian"])
def test_an_old_name_says_what_to_write_instead(name):
    with pytest.raises(AttributeError, match=rf"distributions.{name} was replaced by distrax: wri"):
        getattr(distributions, name)
    with pytest.raises(AttributeError, match="has no attribute 'Beta'"):
        distributions.Beta  # noqa: B018


def test_only_a_traced_program_imports_distrax():
    code = "import sys, purejaxpg.agents.sac; print('distrax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", [distributions, squashed])
def test_examples(module):
    with jax.numpy_rank_promotion("allow"):  # distrax promotes ranks in sample_and_log_prob
        results = doctest.testmod(module)
    assert results.attempted >= 5
    assert results.failed == 0
