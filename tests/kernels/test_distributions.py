import dataclasses
import doctest
import json
import pathlib

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from purejaxpg.kernels import distributions

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


@pytest.mark.parametrize("shape", [(3,), (6, 1), (6, 4), (2, 3, 5)])
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
    p, q = (distributions.Categorical(x) for x in single(p_logits, q_logits))
    np.testing.assert_allclose(p.log_prob(jnp.asarray(action)), log_prob, **TOLERANCE)
    np.testing.assert_allclose(p.entropy(), entropy, **TOLERANCE)
    np.testing.assert_allclose(p.kl(q), kl, **TOLERANCE)


def test_categorical_by_hand():
    policy = distributions.Categorical(jnp.log(jnp.array([0.5, 0.25, 0.25])))
    uniform = distributions.Categorical(jnp.zeros(3))
    # H = 1/2 log 2 + 2 * 1/4 log 4 = 3/2 log 2
    assert float(policy.entropy()) == pytest.approx(1.5 * np.log(2.0), rel=1e-6)
    assert float(policy.log_prob(jnp.array(2))) == pytest.approx(-2.0 * np.log(2.0), rel=1e-6)
    # KL(p || uniform) = log 3 - H(p)
    # KL(uniform || p) = -log 3 + (log 2 + 2 log 4) / 3 = 5/3 log 2 - log 3
    assert float(policy.kl(uniform)) == pytest.approx(np.log(3) - 1.5 * np.log(2), rel=1e-5)
    assert float(uniform.kl(policy)) == pytest.approx(5 / 3 * np.log(2) - np.log(3), rel=1e-5)
    assert int(policy.mode()) == 0


def test_categorical_is_that_of_distrax():
    p_logits, q_logits = single(random_logits(3, 50, 6), random_logits(4, 50, 6))
    action = jnp.asarray(np.random.default_rng(5).integers(0, 6, 50))
    with jax.numpy_rank_promotion("allow"):
        peer, peer_q = distrax.Categorical(p_logits), distrax.Categorical(q_logits)
        expected = peer.log_prob(action), peer.entropy(), peer.kl_divergence(peer_q), peer.mode()
    policy, other = distributions.Categorical(p_logits), distributions.Categorical(q_logits)
    actual = policy.log_prob(action), policy.entropy(), policy.kl(other), policy.mode()
    for own, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(own, theirs, **TOLERANCE)


def test_categorical_entropy_is_that_of_rlax():
    (logits,) = single(random_logits(6, 50, 6))
    peer = rlax.entropy_loss(logits, jnp.ones(50))
    actual = -distributions.Categorical(logits).entropy().mean()
    np.testing.assert_allclose(actual, peer, rtol=1e-5)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cases"][:1])
def test_categorical_is_that_of_stable_baselines(case):
    policy = distributions.Categorical(jnp.array(case["logits"], jnp.float32))
    log_prob = policy.log_prob(jnp.array(case["action"]))
    np.testing.assert_allclose(log_prob, np.array(case["log_prob"]), **TOLERANCE)
    np.testing.assert_allclose(policy.entropy(), np.array(case["entropy"]), **TOLERANCE)
    logged = case["logged"]["entropy_loss"]
    assert float(-policy.entropy().mean()) == pytest.approx(logged, rel=1e-5)


def test_categorical_does_not_depend_on_a_constant_in_the_logits():
    p_logits, q_logits = single(random_logits(7, 20, 4), random_logits(8, 20, 4))
    p, q = distributions.Categorical(p_logits), distributions.Categorical(q_logits)
    shifted = distributions.Categorical(p_logits + 5.0)
    action = jnp.zeros(20, jnp.int32)
    np.testing.assert_allclose(shifted.log_prob(action), p.log_prob(action), **TOLERANCE)
    np.testing.assert_allclose(shifted.entropy(), p.entropy(), **TOLERANCE)
    np.testing.assert_allclose(shifted.kl(q), p.kl(q), **TOLERANCE)
    np.testing.assert_allclose(p.kl(shifted), jnp.zeros(20), atol=1e-5)


@pytest.mark.parametrize("nothing", [-1e9, -np.inf])
def test_an_impossible_action_changes_neither_value_nor_gradient(nothing):
    possible, other = single(random_logits(9, 4), random_logits(10, 4))
    mask = jnp.array([nothing], jnp.float32)

    def three(logits, q_logits, action):
        p, q = distributions.Categorical(logits), distributions.Categorical(q_logits)
        return jnp.stack([p.log_prob(action), p.entropy(), p.kl(q), q.kl(p)])

    def masked(x, y, action):
        return three(jnp.concatenate([x, mask]), jnp.concatenate([y, mask]), action)

    action = jnp.array(2)
    expected = three(possible, other, action)
    np.testing.assert_allclose(masked(possible, other, action), expected, rtol=1e-6)
    for argnum in (0, 1):
        np.testing.assert_allclose(
            jax.jacobian(masked, argnum)(possible, other, action),
            jax.jacobian(three, argnum)(possible, other, action),
            rtol=1e-5,
            atol=1e-7,
        )
    whole = jnp.concatenate([possible, mask])
    gradient = jax.grad(lambda x: distributions.Categorical(x).entropy())(whole)
    assert np.all(np.isfinite(gradient))
    assert float(gradient[-1]) == 0.0
    assert float(distributions.Categorical(whole).log_prob(jnp.array(4))) < -1e8


def test_a_certain_choice_has_no_entropy_and_no_slope():
    logits = jnp.array([0.0, -1e9, -1e9])
    entropy, gradient = jax.value_and_grad(lambda x: distributions.Categorical(x).entropy())(logits)
    assert float(entropy) == 0.0
    assert gradient.tolist() == [0.0, 0.0, 0.0]


def test_an_excluded_action_is_infinitely_far_away():
    p = distributions.Categorical(jnp.zeros(2))
    q = distributions.Categorical(jnp.array([0.0, -jnp.inf]))
    assert float(p.kl(q)) == np.inf
    assert float(q.kl(p)) == pytest.approx(np.log(2.0), rel=1e-6)


def test_categorical_score_is_the_choice_less_the_probability():
    (logits,) = single(random_logits(11, 8, 5))
    action = jnp.asarray(np.random.default_rng(12).integers(0, 5, 8))
    score = jax.grad(lambda x: distributions.Categorical(x).log_prob(action).sum())(logits)
    expected = jax.nn.one_hot(action, 5) - jax.nn.softmax(logits)
    np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-6)


def test_categorical_log_prob_neither_gathers_nor_scatters():
    def loss(logits, action):
        return distributions.Categorical(logits).log_prob(action).sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.zeros((8, 5)), jnp.zeros(8, jnp.int32)))
    assert "exp" in program
    assert "gather" not in program
    assert "scatter" not in program


def test_curvature_of_the_divergence_is_the_fisher_matrix():
    (logits,) = single(random_logits(13, 4))
    old = distributions.Categorical(logits)
    curvature = jax.hessian(lambda x: old.kl(distributions.Categorical(x)))(logits)
    p = jax.nn.softmax(logits)
    fisher = jnp.diag(p) - jnp.outer(p, p)
    np.testing.assert_allclose(curvature, fisher, rtol=1e-4, atol=1e-6)


def test_categorical_samples_have_their_probabilities():
    probability = np.array([0.1, 0.2, 0.3, 0.4, 0.0])
    num_samples = 40_000
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probability)), (num_samples, 5))
    action = distributions.Categorical(logits).sample(jax.random.key(0))
    assert action.shape == (num_samples,)
    assert action.dtype == jnp.int32
    frequency = np.bincount(np.asarray(action), minlength=5) / num_samples
    deviation = np.sqrt(probability * (1.0 - probability) / num_samples)
    assert np.all(np.abs(frequency - probability) <= 4.0 * deviation)


def test_categorical_samples_are_independent_over_the_batch():
    policy = distributions.Categorical(jnp.zeros((2, 10_000, 2)))
    first, second = policy.sample(jax.random.key(1))
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
    policy = distributions.Categorical(*single(logits))
    actual = policy.expectation(*single(x))
    assert actual.shape == shape[:-1]
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


def test_log_probs_and_expectation_agree_with_the_other_methods():
    logits, other_logits = single(random_logits(32, 7, 5), random_logits(33, 7, 5))
    policy, other = distributions.Categorical(logits), distributions.Categorical(other_logits)
    for a in range(5):
        one = policy.log_prob(jnp.full(7, a))
        np.testing.assert_allclose(policy.log_probs[:, a], one, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(policy.log_probs).sum(-1), jnp.ones(7), rtol=1e-6)
    minus_entropy = policy.expectation(policy.log_probs)
    np.testing.assert_allclose(minus_entropy, -policy.entropy(), **TOLERANCE)
    divergence = policy.expectation(policy.log_probs - other.log_probs)
    np.testing.assert_allclose(divergence, policy.kl(other), **TOLERANCE)
    np.testing.assert_allclose(policy.expectation(jnp.ones((7, 5))), jnp.ones(7), rtol=1e-6)


def test_expectation_by_hand():
    # 1/2 * 4 + 1/4 * 2 - 1/4 * 2 = 2
    policy = distributions.Categorical(jnp.log(jnp.array([0.5, 0.25, 0.25])))
    assert float(policy.expectation(jnp.array([4.0, 2.0, -2.0]))) == pytest.approx(2.0, rel=1e-6)


def test_expectation_knows_how_the_probabilities_depend_on_the_logits():
    logits, x = single(random_logits(34, 6, 4), random_logits(35, 6, 4))
    policy = distributions.Categorical(logits)
    p = jnp.exp(policy.log_probs)
    slopes = jax.grad(lambda y: distributions.Categorical(y).expectation(x).sum())(logits)
    # The covariance of the choice and x, as in the policy gradient theorem.
    np.testing.assert_allclose(slopes, p * (x - policy.expectation(x)[:, None]), **TOLERANCE)
    to_x = jax.grad(lambda y: policy.expectation(y).sum())(x)
    np.testing.assert_allclose(to_x, p, rtol=1e-6)


@pytest.mark.parametrize("nothing", [-1e9, -np.inf])
@pytest.mark.parametrize("x", [np.inf, -np.inf, np.nan, 1e30])
def test_expectation_leaves_out_what_cannot_happen(nothing, x):
    logits, values = jnp.array([0.3, nothing, -0.2]), jnp.array([1.0, x, 2.0])
    whole = distributions.Categorical(logits[::2]).expectation(values[::2])

    def mean(logits, values):
        return distributions.Categorical(logits).expectation(values)

    actual, slopes = jax.value_and_grad(mean, (0, 1))(logits, values)
    assert float(actual) == pytest.approx(float(whole), rel=1e-6)
    expected = jax.grad(mean, (0, 1))(logits[::2], values[::2])
    for own, theirs in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(own[::2], theirs, rtol=1e-6)
        assert float(own[1]) == 0.0


def test_expectation_of_log_probs_is_finite_for_impossible_actions():
    def minus_entropy(logits):
        policy = distributions.Categorical(logits)
        return policy.expectation(policy.log_probs)

    value, slopes = jax.value_and_grad(minus_entropy)(jnp.array([0.0, 0.0, -jnp.inf]))
    assert float(value) == pytest.approx(-np.log(2.0), rel=1e-6)
    np.testing.assert_allclose(slopes, jnp.zeros(3), atol=1e-7)


def test_log_probs_are_finite_where_the_probability_is_not_representable():
    logits = jnp.array([0.0, -200.0])
    assert distributions.Categorical(logits).log_probs.tolist() == [0.0, -200.0]
    assert float(jnp.log(jax.nn.softmax(logits))[1]) == -np.inf


def test_expectation_refuses_a_value_per_state():
    with pytest.raises(AssertionError, match="shape"):
        distributions.Categorical(jnp.zeros((3, 4))).expectation(jnp.zeros((3, 1)))


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 1), (6, 2)])
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
    p = distributions.DiagGaussian(*single(p_mean, p_log_std))
    q = distributions.DiagGaussian(*single(q_mean, q_log_std))
    for actual, expected in [
        (p.log_prob(*single(action)), log_prob),
        (p.entropy(), entropy),
        (p.kl(q), kl),
    ]:
        assert actual.shape == shape[:-1]
        np.testing.assert_allclose(actual, expected, **TOLERANCE)


def test_gaussian_by_hand():
    p = distributions.DiagGaussian(jnp.array([1.0, 0.0]), jnp.log(jnp.array([2.0, 1.0])))
    q = distributions.DiagGaussian(jnp.zeros(2), jnp.zeros(2))
    # log density of (3, 0): -(2/2)^2 / 2 - log 2 - log 2 pi
    expected = -0.5 - np.log(2.0) - np.log(2.0 * np.pi)
    assert float(p.log_prob(jnp.array([3.0, 0.0]))) == pytest.approx(expected, rel=1e-6)
    # H = log 2 + 1 + log 2 pi
    assert float(p.entropy()) == pytest.approx(np.log(2.0) + 1.0 + np.log(2.0 * np.pi), rel=1e-6)
    # KL(p || q) = -log 2 + (4 + 1)/2 - 1/2 = 2 - log 2
    # KL(q || p) =  log 2 + (1 + 1)/8 - 1/2 = log 2 - 1/4
    assert float(p.kl(q)) == pytest.approx(2.0 - np.log(2.0), rel=1e-6)
    assert float(q.kl(p)) == pytest.approx(np.log(2.0) - 0.25, rel=1e-5)
    assert p.mode().tolist() == [1.0, 0.0]


def test_gaussian_is_that_of_distrax():
    arrays = single(*random_gaussians(17, 30, 4), *random_gaussians(18, 30, 4))
    (action,) = single(random_gaussians(19, 30, 4)[0])
    with jax.numpy_rank_promotion("allow"):
        peer = distrax.MultivariateNormalDiag(arrays[0], jnp.exp(arrays[1]))
        peer_q = distrax.MultivariateNormalDiag(arrays[2], jnp.exp(arrays[3]))
        expected = peer.log_prob(action), peer.entropy(), peer.kl_divergence(peer_q)
    p, q = distributions.DiagGaussian(*arrays[:2]), distributions.DiagGaussian(*arrays[2:])
    for own, theirs in zip((p.log_prob(action), p.entropy(), p.kl(q)), expected, strict=True):
        np.testing.assert_allclose(own, theirs, **TOLERANCE)


def test_gaussian_entropy_counts_every_state_and_every_component():
    mean, log_std = jnp.zeros((7, 3)), jnp.array([0.0, 1.0, 2.0])
    shared = distributions.DiagGaussian(mean, log_std).entropy()
    assert shared.shape == (7,)
    expected = 3.0 + 1.5 * (1.0 + np.log(2.0 * np.pi))
    np.testing.assert_allclose(shared, np.full(7, expected), rtol=1e-6)
    scalar = distributions.DiagGaussian(mean, jnp.float32(1.0)).entropy()
    np.testing.assert_allclose(scalar, np.full(7, expected), rtol=1e-6)


def test_gaussian_density_integrates_to_one():
    grid = jnp.linspace(-12.0, 12.0, 20_001)[:, None]
    policy = distributions.DiagGaussian(jnp.full_like(grid, 0.7), jnp.array([0.4]))
    density = jnp.exp(policy.log_prob(grid))
    assert float(jnp.sum(density)) * 24.0 / 20_000 == pytest.approx(1.0, abs=1e-5)


def test_gaussian_divergence_from_itself_is_exactly_zero_and_flat():
    mean, log_std = single(*random_gaussians(20, 10, 3))
    old = distributions.DiagGaussian(mean, log_std)
    assert old.kl(old).tolist() == [0.0] * 10
    slopes = jax.grad(lambda new: old.kl(new).sum())(old)
    np.testing.assert_allclose(slopes.mean, jnp.zeros((10, 3)), atol=1e-7)
    np.testing.assert_allclose(slopes.log_std, jnp.zeros((10, 3)), atol=1e-7)


def test_gaussian_score_is_the_standardised_distance():
    mean, log_std = single(*random_gaussians(21, 6, 2))
    (action,) = single(random_gaussians(22, 6, 2)[0])
    policy = distributions.DiagGaussian(mean, log_std)
    score = jax.grad(lambda p: p.log_prob(action).sum())(policy)
    distance = (action - mean) * jnp.exp(-log_std)
    np.testing.assert_allclose(score.mean, distance * jnp.exp(-log_std), **TOLERANCE)
    np.testing.assert_allclose(score.log_std, distance**2 - 1.0, **TOLERANCE)


def test_gaussian_samples_have_their_moments():
    num_samples = 40_000
    mean = jnp.broadcast_to(jnp.array([1.0, -2.0]), (num_samples, 2))
    policy = distributions.DiagGaussian(mean, jnp.log(jnp.array([0.5, 3.0])))
    action = np.asarray(policy.sample(jax.random.key(2)))
    assert action.shape == (num_samples, 2)
    # Four deviations of a mean (sigma / 200) and of a standard deviation (sigma / 283).
    np.testing.assert_allclose(action.mean(0), [1.0, -2.0], atol=4 * 3.0 / 200)
    np.testing.assert_allclose(action.std(0), [0.5, 3.0], rtol=4 / 283)
    assert abs(np.corrcoef(action.T)[0, 1]) < 4 / 200


def test_gaussian_samples_are_reparametrised():
    mean, log_std = single(*random_gaussians(23, 6, 2))
    key = jax.random.key(3)

    def sample(mean, log_std):
        return distributions.DiagGaussian(mean, log_std).sample(key)

    to_mean = jax.grad(lambda x: sample(x, log_std).sum())(mean)
    to_log_std = jax.grad(lambda x: sample(mean, x).sum())(log_std)
    assert to_mean.tolist() == jnp.ones((6, 2)).tolist()
    np.testing.assert_allclose(to_log_std, sample(mean, log_std) - mean, **TOLERANCE)


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 1)])
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
    policy = distributions.TanhGaussian(*single(mean, log_std))
    actual = policy.log_prob_of_tanh(*single(x))
    assert actual.shape == shape[:-1]
    np.testing.assert_allclose(actual, expected, **TOLERANCE)
    action, log_prob = policy.sample_and_log_prob(jax.random.key(0))
    assert (action.shape, log_prob.shape) == (shape, shape[:-1])


def test_tanh_gaussian_by_hand():
    policy = distributions.TanhGaussian(jnp.array([0.0, 1.0]), jnp.log(jnp.array([1.0, 2.0])))
    # At x = mean: -log 2 pi - log 2, and a slope 1 - tanh^2 of 1 and of 1 / cosh^2 1.
    expected = -np.log(4.0 * np.pi) + 2.0 * np.log(np.cosh(1.0))
    assert float(policy.log_prob_of_tanh(policy.mean)) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(policy.median(), np.tanh([0.0, 1.0]), rtol=1e-6)


def log_slope(x):
    """Logarithm of 1 - tanh^2 x in float64, by a form that does not cancel."""
    size = np.abs(np.float64(x))
    return -2.0 * (size + np.log1p(np.exp(-2.0 * size)) - np.log(2.0))


EXTREME = np.concatenate([np.linspace(-30.0, 30.0, 241), [-20.0, 9.1, 20.0]]).astype(np.float32)


def correction(x):
    """What the distribution subtracts for the tanh, had by standing at the mean."""
    policy = distributions.TanhGaussian(jax.lax.stop_gradient(x)[:, None], jnp.zeros(1))
    return -0.5 * np.log(2.0 * np.pi) - policy.log_prob_of_tanh(x[:, None])


def test_tanh_correction_and_its_gradient_are_right_far_out_in_float32():
    x = jnp.asarray(EXTREME)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(correction(x), log_slope(EXTREME), rtol=1e-6, atol=1e-6)
    slopes = jax.grad(lambda y: correction(y).sum())(x)
    np.testing.assert_allclose(slopes, -2.0 * np.tanh(np.float64(EXTREME)), rtol=1e-6, atol=1e-6)


def test_the_plain_forms_of_the_tanh_correction_are_wrong_far_out():
    def plain(y):
        return jnp.log(1.0 - jnp.square(jnp.tanh(y)))

    def padded(y):
        return jnp.log(1.0 - jnp.square(jnp.tanh(y)) + 1e-6)

    for x in (10.0, 20.0, -20.0, 30.0):
        assert float(plain(jnp.float32(x))) == -np.inf
        assert not np.isfinite(jax.grad(plain)(jnp.float32(x)))
        assert float(padded(jnp.float32(x))) > log_slope(x) + 4.0
        assert float(jax.grad(padded)(jnp.float32(x))) == 0.0


@pytest.mark.parametrize("mean", [0.3, -8.0, 20.0, -30.0])
@pytest.mark.parametrize("log_std", [-20.0, -14.0, -5.0, 0.0, 2.0])
def test_tanh_gaussian_sample_has_exact_value_and_gradients_in_float32(mean, log_std):
    key = jax.random.key(7)
    means, log_stds = jnp.full((50, 1), mean), jnp.full((50, 1), log_std)
    noise = np.float64(jax.random.normal(key, (50, 1)))

    def total(mean, log_std):
        action, log_prob = distributions.TanhGaussian(mean, log_std).sample_and_log_prob(key)
        return log_prob.sum(), (action, log_prob)

    (to_mean, to_log_std), (action, log_prob) = jax.grad(total, (0, 1), has_aux=True)(
        means, log_stds
    )
    spread = np.exp(np.float64(log_std)) * noise
    x = np.float64(np.float32(mean)) + spread
    expected = -(0.5 * noise**2 + log_std + 0.5 * np.log(2.0 * np.pi) + log_slope(x))[:, 0]
    np.testing.assert_allclose(action, np.tanh(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_mean, 2.0 * np.tanh(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(to_log_std, 2.0 * np.tanh(x) * spread - 1.0, rtol=1e-5, atol=1e-5)


def test_going_by_way_of_x_loses_the_gradient_of_a_narrow_sample():
    key, means, log_std = jax.random.key(8), jnp.full((50, 1), 0.3), jnp.full((50, 1), -14.0)

    def by_x(mean):
        x = distributions.DiagGaussian(mean, log_std).sample(key)
        return distributions.TanhGaussian(mean, log_std).log_prob_of_tanh(x).sum()

    def by_noise(mean):
        return distributions.TanhGaussian(mean, log_std).sample_and_log_prob(key)[1].sum()

    exact = 2.0 * np.tanh(0.3)
    assert float(jnp.abs(jax.grad(by_x)(means) - exact).max()) > 0.01
    assert float(jnp.abs(jax.grad(by_noise)(means) - exact).max()) < 1e-4


def test_gradient_of_a_tanh_gaussian_action_is_that_of_tanh():
    mean, log_std = single(*random_gaussians(38, 6, 2))
    key = jax.random.key(9)

    def action(mean, log_std):
        return distributions.TanhGaussian(mean, log_std).sample(key)

    to_mean = jax.grad(lambda m: action(m, log_std).sum())(mean)
    np.testing.assert_allclose(to_mean, 1.0 - jnp.square(action(mean, log_std)), **TOLERANCE)


def test_tanh_gaussian_draws_the_gaussian_of_the_same_key():
    mean, log_std = single(*random_gaussians(39, 6, 2))
    key = jax.random.key(10)
    for width in (log_std, log_std[0], jnp.float32(-1.0)):
        policy = distributions.TanhGaussian(mean, width)
        x = distributions.DiagGaussian(mean, width).sample(key)
        action, log_prob = policy.sample_and_log_prob(key)
        np.testing.assert_array_equal(action, jnp.tanh(x))
        np.testing.assert_array_equal(action, policy.sample(key))
        np.testing.assert_allclose(log_prob, policy.log_prob_of_tanh(x), **TOLERANCE)
        assert log_prob.shape == (6,)


def test_tanh_gaussian_is_that_of_distrax():
    mean, log_std = single(*random_gaussians(40, 30, 3))
    with jax.numpy_rank_promotion("allow"):
        base = distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))
        peer = distrax.Transformed(base, distrax.Block(distrax.Tanh(), 1))
        action, expected = peer.sample_and_log_prob(seed=jax.random.key(11))
        policy = distributions.TanhGaussian(mean, log_std)
        ours, log_prob = policy.sample_and_log_prob(jax.random.key(12))
        theirs = peer.log_prob(ours)
    moderate = jnp.abs(jnp.arctanh(ours)).max(-1) < 3.0
    assert int(moderate.sum()) > 20
    np.testing.assert_allclose(log_prob[moderate], theirs[moderate], rtol=1e-3, atol=1e-3)
    moderate = jnp.abs(jnp.arctanh(action)).max(-1) < 3.0
    assert int(moderate.sum()) > 20
    again = policy.log_prob_of_tanh(jnp.arctanh(action))
    np.testing.assert_allclose(again[moderate], expected[moderate], rtol=1e-3, atol=1e-3)


def squashed_density(mean, std, num_points=20_000):
    """Midpoints of a grid over (-1, 1) and the density there, in float64."""
    action = (np.arange(num_points) + 0.5) * 2.0 / num_points - 1.0
    x = jnp.arctanh(jnp.asarray(action))[:, None]
    policy = distributions.TanhGaussian(jnp.full_like(x, mean), jnp.log(jnp.array([std])))
    return action, np.asarray(jnp.exp(policy.log_prob_of_tanh(x)))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.7, 0.6), (-1.2, 0.3)])
def test_tanh_gaussian_density_integrates_to_one(mean, std):
    with jax.enable_x64(True):
        action, density = squashed_density(mean, std)
    assert density.dtype == np.float64
    assert density.mean() * 2.0 == pytest.approx(1.0, abs=1e-7)
    below = density[action < np.tanh(mean)].mean() * (1.0 + np.tanh(mean))
    assert below == pytest.approx(0.5, abs=1e-3)


def test_the_median_of_a_wide_tanh_gaussian_is_not_where_it_is_densest():
    with jax.enable_x64(True):
        action, density = squashed_density(0.2, 2.0)
    assert abs(action[np.argmax(density)]) > 0.99


def test_tanh_gaussian_samples_have_the_entropy_of_the_density():
    with jax.enable_x64(True):
        _, density = squashed_density(0.4, 0.6)
    entropy = -np.mean(density * np.log(density)) * 2.0
    num_samples = 40_000
    policy = distributions.TanhGaussian(jnp.full((num_samples, 1), 0.4), jnp.log(jnp.array([0.6])))
    action, log_prob = policy.sample_and_log_prob(jax.random.key(13))
    deviation = float(log_prob.std()) / np.sqrt(num_samples)
    assert float(-log_prob.mean()) == pytest.approx(entropy, abs=4 * deviation)
    below = float(jnp.mean(action < policy.median()))
    assert below == pytest.approx(0.5, abs=4 * 0.5 / 200)


def test_tanh_gaussian_jit_and_vmap_agree():
    policy = distributions.TanhGaussian(*single(*random_gaussians(41, 8, 3)))
    x = policy.mean + 0.5
    plain = policy.log_prob_of_tanh(x), policy.median()

    def both(p, x):
        return p.log_prob_of_tanh(x), p.median()

    for other in (jax.jit(both)(policy, x), jax.vmap(both)(policy, x)):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(b, a, **TOLERANCE)
    keys = jax.random.split(jax.random.key(14), 8)
    drawn, log_prob = jax.vmap(lambda p, key: p.sample_and_log_prob(key))(policy, keys)
    alone = jax.tree.map(lambda x: x[3], policy).sample_and_log_prob(keys[3])
    np.testing.assert_allclose(drawn[3], alone[0], **TOLERANCE)
    np.testing.assert_allclose(log_prob[3], alone[1], **TOLERANCE)


def test_tanh_gaussian_has_no_density_of_a_bare_action():
    assert not hasattr(distributions.TanhGaussian, "log_prob")
    policy = distributions.TanhGaussian(jnp.zeros((4, 2)), jnp.zeros(2))
    with pytest.raises(AssertionError, match="shape"):
        policy.log_prob_of_tanh(jnp.zeros((4, 1)))


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_entropy_is_the_mean_of_minus_the_log_probability(kind):
    if kind == "categorical":
        (logits,) = single(random_logits(24, 5))
        policy = distributions.Categorical(logits)
        every = distributions.Categorical(jnp.broadcast_to(logits, (5, 5)))
        log_prob = every.log_prob(jnp.arange(5))
        assert float(policy.entropy()) == pytest.approx(
            float(-jnp.sum(jnp.exp(log_prob) * log_prob)), rel=1e-5
        )
        return
    policy = distributions.DiagGaussian(jnp.zeros((100_000, 2)), jnp.array([0.3, -0.7]))
    log_prob = policy.log_prob(policy.sample(jax.random.key(4)))
    # The deviation of one log probability is sqrt(A / 2) = 1, so that of the mean is 1/316.
    assert float(policy.entropy()[0]) == pytest.approx(float(-log_prob.mean()), abs=4 / 316)


def categorical_batch():
    logits, other = single(random_logits(25, 8, 4), random_logits(26, 8, 4))
    action = jnp.arange(8) % 4
    return distributions.Categorical(logits), distributions.Categorical(other), action


def gaussian_batch():
    p = distributions.DiagGaussian(*single(*random_gaussians(27, 8, 4)))
    q = distributions.DiagGaussian(*single(*random_gaussians(28, 8, 4)))
    return p, q, p.mean + 0.5


@pytest.mark.parametrize("make", [categorical_batch, gaussian_batch])
def test_jit_and_vmap_agree(make):
    p, q, action = make()

    def everything(p, q, action):
        return p.mode(), p.log_prob(action), p.entropy(), p.kl(q)

    plain = everything(p, q, action)
    for other in (jax.jit(everything)(p, q, action), jax.vmap(everything)(p, q, action)):
        for a, b in zip(plain, other, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(b, a, **TOLERANCE)
    keys = jax.random.split(jax.random.key(5), 8)
    drawn = jax.vmap(lambda p, key: p.sample(key))(p, keys)
    alone = jax.tree.map(lambda x: x[3], p).sample(keys[3])
    np.testing.assert_array_equal(drawn[3], alone)
    again = jax.jit(lambda p, key: p.sample(key))(p, keys[0])
    np.testing.assert_allclose(again, p.sample(keys[0]), **TOLERANCE)


def tanh_gaussian_batch():
    return (distributions.TanhGaussian(*single(*random_gaussians(42, 8, 4))),)


@pytest.mark.parametrize("make", [categorical_batch, gaussian_batch, tanh_gaussian_batch])
def test_distributions_are_frozen_trees_of_their_arrays(make):
    policy = make()[0]
    names = [field.name for field in dataclasses.fields(policy)]
    assert len(jax.tree.leaves(policy)) == len(names)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(policy, names[0], jnp.zeros(1))


@pytest.mark.parametrize("make", [categorical_batch, gaussian_batch])
def test_an_action_of_the_wrong_shape_is_refused(make):
    policy, _, action = make()
    with pytest.raises(AssertionError, match="shape"):
        policy.log_prob(action[..., None])
    with pytest.raises(AssertionError, match="shape"):
        policy.kl(jax.tree.map(lambda x: x[:1], policy))


def test_examples():
    results = doctest.testmod(distributions)
    assert results.attempted >= 20
    assert results.failed == 0
