import doctest
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from purejaxpg.kernels import distributions, losses

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "sb3_ppo.json"
GOLDEN_CASES = json.loads(GOLDEN.read_text())["cases"]
GOLDEN_NAMES = [f"value clip {case['clip_eps_value']}" for case in GOLDEN_CASES]


@pytest.fixture(autouse=True)
def strict_shapes():
    with jax.numpy_rank_promotion("raise"):
        yield


def batch(seed=0, size=200):
    rng = np.random.default_rng(seed)
    old_log_prob = np.log(rng.uniform(0.05, 0.9, size))
    log_prob = old_log_prob + rng.normal(scale=0.4, size=size)
    return log_prob, old_log_prob, rng.normal(size=size)


def single(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def golden(case, *names):
    return [jnp.array(case[name], jnp.float32) for name in names]


def slope(loss, argument, *others):
    """Gradient of each element's loss with respect to its own first argument."""
    return jax.grad(lambda x: loss(x, *others).sum())(argument)


@pytest.mark.parametrize("clip_eps", [0.0, 0.1, 0.3, 2.0])
def test_ppo_clip_is_the_loop(clip_eps):
    log_prob, old_log_prob, advantage = batch()
    expected = []
    for new, old, adv in zip(log_prob, old_log_prob, advantage, strict=True):
        ratio = np.exp(new - old)
        clipped = min(max(ratio, 1.0 - clip_eps), 1.0 + clip_eps)
        expected.append(-min(ratio * adv, clipped * adv))
    actual = losses.ppo_clip(*single(log_prob, old_log_prob, advantage), clip_eps)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_ppo_clip_by_hand():
    # eps = 1/4. ratio 1/2, 1, 3/2 with advantage 2 and then with -2:
    # A > 0: -min(1, 1.5) = -1    -min(2, 2) = -2    -min(3, 2.5) = -2.5   (clipped)
    # A < 0: -min(-1, -1.5) = 1.5 (clipped)    -min(-2, -2) = 2    -min(-3, -2.5) = 3
    log_prob = jnp.log(jnp.array([0.5, 1.0, 1.5, 0.5, 1.0, 1.5]))
    advantage = jnp.array([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    actual = losses.ppo_clip(log_prob, jnp.zeros(6), advantage, 0.25)
    np.testing.assert_allclose(actual, [-1.0, -2.0, -2.5, 1.5, 2.0, 3.0], rtol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
def test_ppo_clip_stops_only_where_the_ratio_already_helps_enough(advantage, ratio):
    stopped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    expected = 0.0 if stopped else -advantage * ratio
    log_prob, old_log_prob, adv = single([np.log(ratio)], [0.0], [advantage])
    actual = slope(losses.ppo_clip, log_prob, old_log_prob, adv, 0.2)
    assert float(actual[0]) == pytest.approx(expected, rel=1e-6)


def test_ppo_clip_without_a_range_is_the_plain_ratio():
    log_prob, old_log_prob, advantage = single(*batch())
    ratio = jnp.exp(log_prob - old_log_prob)
    actual = losses.ppo_clip(log_prob, old_log_prob, advantage, jnp.inf)
    assert actual.tolist() == (-ratio * advantage).tolist()
    gradient = slope(losses.ppo_clip, log_prob, old_log_prob, advantage, jnp.inf)
    np.testing.assert_allclose(gradient, -ratio * advantage, rtol=1e-6)


def test_at_ratio_one_every_surrogate_has_the_plain_policy_gradient():
    rng = np.random.default_rng(1)
    logits, advantage = single(rng.normal(size=(32, 4)), rng.normal(size=32))
    action = jnp.asarray(rng.integers(0, 4, 32))
    old_log_prob = distributions.Categorical(logits).log_prob(action)

    def surrogate(loss, *extra):
        def total(x):
            log_prob = distributions.Categorical(x).log_prob(action)
            return loss(log_prob, old_log_prob, advantage, *extra).mean()

        return jax.grad(total)(logits)

    plain = jax.grad(lambda x: rlax.policy_gradient_loss(x, action, advantage, jnp.ones(32)))
    expected = plain(logits)
    for actual in (
        surrogate(losses.ppo_clip, 0.2),
        surrogate(losses.ppo_kl_penalty, jnp.zeros(32), 3.0),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip_eps", [0.1, 0.2, 0.5])
def test_ppo_clip_is_that_of_rlax(clip_eps):
    log_prob, old_log_prob, advantage = single(*batch(2))

    def peer(x):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(x - old_log_prob), advantage, clip_eps)

    def own(x):
        return losses.ppo_clip(x, old_log_prob, advantage, clip_eps).mean()

    (expected, expected_slope), (actual, actual_slope) = (
        jax.value_and_grad(f)(log_prob) for f in (peer, own)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(actual_slope, expected_slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=GOLDEN_NAMES)
def test_ppo_clip_is_that_of_stable_baselines(case):
    log_prob, old_log_prob, advantage = golden(case, "log_prob", "old_log_prob", "advantage")
    loss = losses.ppo_clip(log_prob, old_log_prob, advantage, case["clip_eps"])
    logged = case["logged"]["policy_gradient_loss"]
    np.testing.assert_allclose(loss.mean(), logged, rtol=1e-5, atol=1e-6)
    gradient = slope(losses.ppo_clip, log_prob, old_log_prob, advantage, case["clip_eps"])
    np.testing.assert_allclose(gradient, np.array(case["policy_gradient"]), rtol=1e-5, atol=1e-6)
    assert 0 < np.sum(np.array(case["policy_gradient"]) == 0.0) < len(log_prob)


def test_ppo_kl_penalty_is_the_loop():
    log_prob, old_log_prob, advantage = batch(3)
    kl = np.abs(advantage) / 7.0
    expected = [
        -(np.exp(new - old) * adv - 3.0 * penalty)
        for new, old, adv, penalty in zip(log_prob, old_log_prob, advantage, kl, strict=True)
    ]
    actual = losses.ppo_kl_penalty(*single(log_prob, old_log_prob, advantage, kl), 3.0)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_ppo_kl_penalty_by_hand():
    # ratio 3/2, A = 2, KL = 1/2, beta = 4: -(3 - 2) = -1
    args = single([np.log(1.5)], [0.0], [2.0], [0.5])
    assert losses.ppo_kl_penalty(*args, 4.0).tolist() == pytest.approx([-1.0], rel=1e-6)


def test_ppo_kl_penalty_pulls_back_towards_the_old_policy():
    old = distributions.Categorical(jnp.array([[0.3, -0.2, 0.1]]))
    action, advantage = jnp.array([1]), jnp.zeros(1)

    def loss(logits):
        new = distributions.Categorical(logits)
        return losses.ppo_kl_penalty(
            new.log_prob(action), old.log_prob(action), advantage, old.kl(new), 2.0
        ).sum()

    logits = old.logits + jnp.array([[0.5, 0.0, -0.5]])
    # The gradient of KL(old || new) with respect to the new logits is pi_new - pi_old.
    expected = 2.0 * (jax.nn.softmax(logits) - jax.nn.softmax(old.logits))
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.grad(loss)(old.logits), jnp.zeros((1, 3)), atol=1e-7)


def test_ppo_kl_penalty_of_zero_is_the_unclipped_surrogate():
    log_prob, old_log_prob, advantage = single(*batch(4))
    actual = losses.ppo_kl_penalty(log_prob, old_log_prob, advantage, jnp.abs(advantage), 0.0)
    expected = losses.ppo_clip(log_prob, old_log_prob, advantage, jnp.inf)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_value_loss_by_hand_and_its_gradient():
    # (3 - 1)^2 / 2 = 2 with slope 2; (-1 - 2)^2 / 2 = 4.5 with slope -3
    value, target = jnp.array([3.0, -1.0]), jnp.array([1.0, 2.0])
    assert losses.value_loss(value, target).tolist() == [2.0, 4.5]
    assert slope(losses.value_loss, value, target).tolist() == [2.0, -3.0]


def test_value_loss_has_no_hidden_stop():
    value, target = jnp.array([3.0]), jnp.array([1.0])
    to_target = jax.grad(lambda x: losses.value_loss(value, x).sum())(target)
    assert to_target.tolist() == [-2.0]


@pytest.mark.parametrize("clip_eps", [0.05, 0.5, 3.0])
def test_value_loss_clipped_is_the_loop(clip_eps):
    rng = np.random.default_rng(5)
    value, old_value, target = rng.normal(size=(3, 200))
    expected = []
    for new, old, goal in zip(value, old_value, target, strict=True):
        clipped = old + min(max(new - old, -clip_eps), clip_eps)
        expected.append(0.5 * max((new - goal) ** 2, (clipped - goal) ** 2))
    actual = losses.value_loss_clipped(*single(value, old_value, target), clip_eps)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (0.5, 4.0, 6.125, -3.5),  # inside: (0.5 - 4)^2 / 2
        (3.0, 4.0, 4.5, 0.0),  # clipped to 1, which is farther: (1 - 4)^2 / 2, and no slope
        (3.0, 1.5, 1.125, 1.5),  # clipped to 1, which is nearer: (3 - 1.5)^2 / 2
        (-3.0, 4.0, 24.5, -7.0),  # clipped to -1, which is nearer: (-3 - 4)^2 / 2
        (-3.0, -4.0, 4.5, 0.0),  # clipped to -1, which is farther: (-1 + 4)^2 / 2, and no slope
    ],
)
def test_value_loss_clipped_by_hand(value, target, loss, gradient):
    # V_old = 0 and eps = 1 throughout.
    args = single([value], [0.0], [target])
    assert losses.value_loss_clipped(*args, 1.0).tolist() == [loss]
    assert slope(losses.value_loss_clipped, *args, 1.0).tolist() == [gradient]


def test_value_loss_clipped_without_a_range_is_the_value_loss():
    rng = np.random.default_rng(6)
    value, old_value, target = single(*(rng.normal(size=(3, 1000)) * [[1.0], [1e6], [1.0]]))
    actual = losses.value_loss_clipped(value, old_value, target, jnp.inf)
    assert actual.tolist() == losses.value_loss(value, target).tolist()
    gradient = slope(losses.value_loss_clipped, value, old_value, target, jnp.inf)
    assert gradient.tolist() == slope(losses.value_loss, value, target).tolist()
    to_old = jax.grad(lambda x: losses.value_loss_clipped(value, x, target, jnp.inf).sum())
    assert to_old(old_value).tolist() == [0.0] * 1000


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=GOLDEN_NAMES)
def test_value_loss_against_stable_baselines(case):
    value, old_value, target = golden(case, "value", "old_value", "target")
    logged, clip_eps = case["logged"]["value_loss"], case["clip_eps_value"]
    if clip_eps is None:
        # Its squared error has no 1/2.
        actual = 2.0 * losses.value_loss_clipped(value, old_value, target, jnp.inf).mean()
        np.testing.assert_allclose(actual, logged, rtol=1e-5)
        return
    # It takes the clipped error alone, and not the larger of the two.
    clipped = old_value + jnp.clip(value - old_value, -clip_eps, clip_eps)
    np.testing.assert_allclose(jnp.square(clipped - target).mean(), logged, rtol=1e-5)
    larger = jnp.maximum(jnp.square(clipped - target), jnp.square(value - target))
    actual = 2.0 * losses.value_loss_clipped(value, old_value, target, clip_eps)
    np.testing.assert_allclose(actual, larger, rtol=1e-5, atol=1e-6)
    assert float(actual.mean()) > logged * 1.01


def test_approximate_kl_is_the_formula():
    log_prob, old_log_prob, _ = batch(7)
    ratio = np.exp(log_prob - old_log_prob)
    actual = losses.approximate_kl(*single(log_prob, old_log_prob))
    np.testing.assert_allclose(actual, ratio - 1.0 - np.log(ratio), rtol=1e-4, atol=1e-7)


def test_approximate_kl_by_hand():
    # r = 1: 0.    r = 2: 1 - log 2.    r = 1/2: -1/2 + log 2
    actual = losses.approximate_kl(jnp.log(jnp.array([1.0, 2.0, 0.5])), jnp.zeros(3))
    np.testing.assert_allclose(actual, [0.0, 0.30685282, 0.19314718], rtol=1e-6)


def test_approximate_kl_is_never_negative_and_keeps_its_digits_near_zero():
    sizes = np.logspace(-8, 1, 20_001)
    log_ratio = np.concatenate([-sizes, sizes]).astype(np.float32)
    actual = np.asarray(losses.approximate_kl(jnp.asarray(log_ratio), jnp.zeros(len(log_ratio))))
    assert np.all(actual >= 0.0)
    small = (np.abs(log_ratio) > 1e-3) & (np.abs(log_ratio) < 1e-2)
    exact = np.expm1(np.float64(log_ratio)) - np.float64(log_ratio)
    np.testing.assert_allclose(actual[small], exact[small], rtol=2e-3)


def test_approximate_kl_has_the_mean_of_the_old_policy_from_the_new():
    logits, old_logits = single([0.1, -1.0, 0.7, 0.3], [-0.4, 0.2, 0.9, 0.0])
    new, old = distributions.Categorical(logits), distributions.Categorical(old_logits)
    p = jnp.exp(jax.nn.log_softmax(old_logits))

    def mean(x):
        log_prob = jax.nn.log_softmax(x)
        return jnp.sum(p * losses.approximate_kl(log_prob, jax.nn.log_softmax(old_logits)))

    forward, backward = float(old.kl(new)), float(new.kl(old))
    assert float(mean(logits)) == pytest.approx(forward, rel=1e-5)
    assert abs(forward - backward) > 0.01
    np.testing.assert_allclose(
        jax.grad(mean)(logits),
        jax.grad(lambda x: old.kl(distributions.Categorical(x)))(logits),
        rtol=1e-5,
        atol=1e-6,
    )


def test_is_clipped_by_hand():
    ratio = jnp.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0])
    actual = losses.is_clipped(jnp.log(ratio), jnp.zeros(7), 0.2)
    assert actual.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert actual.dtype == jnp.float32
    never = losses.is_clipped(jnp.log(ratio), jnp.zeros(7), jnp.inf)
    assert never.tolist() == [0.0] * 7


def test_outside_the_range_is_not_the_same_as_without_gradient():
    log_prob, old_log_prob, advantage = single(*batch(8))
    outside = losses.is_clipped(log_prob, old_log_prob, 0.2)
    stopped = slope(losses.ppo_clip, log_prob, old_log_prob, advantage, 0.2) == 0.0
    assert not bool(jnp.any(stopped & (outside == 0.0)))
    assert bool(jnp.any(~stopped & (outside == 1.0)))


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=GOLDEN_NAMES)
def test_diagnostics_are_those_of_stable_baselines(case):
    log_prob, old_log_prob = golden(case, "log_prob", "old_log_prob")
    fraction = losses.is_clipped(log_prob, old_log_prob, case["clip_eps"]).mean()
    assert float(fraction) == case["logged"]["clip_fraction"]
    kl = losses.approximate_kl(log_prob, old_log_prob).mean()
    assert float(kl) == pytest.approx(case["logged"]["approx_kl"], rel=1e-4)


def test_a_fresh_batch_has_nothing_to_clip():
    log_prob, _, advantage = single(*batch(9))
    assert losses.is_clipped(log_prob, log_prob, 0.2).tolist() == [0.0] * 200
    assert losses.approximate_kl(log_prob, log_prob).tolist() == [0.0] * 200
    np.testing.assert_allclose(
        losses.ppo_clip(log_prob, log_prob, advantage, 0.2), -advantage, rtol=1e-6
    )


FUNCTIONS = {
    "ppo_clip": lambda a, b, c, eps: losses.ppo_clip(a, b, c, eps),
    "ppo_kl_penalty": lambda a, b, c, eps: losses.ppo_kl_penalty(a, b, c, c, eps),
    "value_loss": lambda a, b, c, eps: losses.value_loss(a, b) + 0.0 * c,
    "value_loss_clipped": lambda a, b, c, eps: losses.value_loss_clipped(a, b, c, eps),
    "approximate_kl": lambda a, b, c, eps: losses.approximate_kl(a, b) + 0.0 * c,
    "is_clipped": lambda a, b, c, eps: losses.is_clipped(a, b, eps) + 0.0 * c,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_jit_and_vmap_agree(function):
    rows = [x.reshape(40, 5) for x in single(*batch(10))]
    plain = function(*rows, 0.2)
    assert plain.shape == (40, 5)
    np.testing.assert_allclose(jax.jit(function)(*rows, 0.2), plain, rtol=1e-5, atol=1e-6)
    per_row = jax.vmap(function, in_axes=(0, 0, 0, None))(*rows, 0.2)
    np.testing.assert_allclose(per_row, plain, rtol=1e-5, atol=1e-6)
    over_runs = jax.vmap(function, in_axes=(None, None, None, 0))
    swept = over_runs(*rows, jnp.array([0.1, 0.2]))
    np.testing.assert_allclose(swept[1], plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_column_against_a_row_is_refused(function):
    flat = jnp.zeros(5)
    with pytest.raises(AssertionError, match="shape"):
        function(flat, flat[:, None], flat, 0.2)


def test_examples():
    results = doctest.testmod(losses)
    assert results.attempted >= 6
    assert results.failed == 0
