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


@pytest.mark.parametrize("make", [categorical_batch, gaussian_batch])
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
    assert results.attempted >= 12
    assert results.failed == 0
