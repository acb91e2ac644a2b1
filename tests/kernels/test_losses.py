import doctest
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax
import tiny_mdp

from purejaxpg.kernels import distributions, losses, returns

pytestmark = pytest.mark.fast

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


def test_score_function_is_the_loop_and_has_no_hidden_stop():
    log_prob, _, advantage = batch(11)
    expected = [-a * b for a, b in zip(advantage, log_prob, strict=True)]
    args = single(log_prob, advantage)
    np.testing.assert_allclose(losses.score_function(*args), expected, rtol=1e-6)
    assert slope(losses.score_function, *args).tolist() == (-args[1]).tolist()
    to_advantage = jax.grad(lambda x: losses.score_function(args[0], x).sum())(args[1])
    assert to_advantage.tolist() == (-args[0]).tolist()


def test_score_function_by_hand():
    # -2 log 1/2 = 2 log 2; an action worse than expected: 3 log 1/4 = -6 log 2
    actual = losses.score_function(jnp.log(jnp.array([0.5, 0.25])), jnp.array([2.0, -3.0]))
    np.testing.assert_allclose(actual, [2 * np.log(2.0), -6 * np.log(2.0)], rtol=1e-6)


def test_score_function_is_that_of_rlax():
    draw = np.random.default_rng(12)
    logits, advantage = single(draw.normal(size=(32, 4)), draw.normal(size=32))
    action = jnp.asarray(draw.integers(0, 4, 32))

    def own(x):
        return losses.score_function(
            distributions.categorical(x).log_prob(action), advantage
        ).mean()

    def peer(x):
        return rlax.policy_gradient_loss(x, action, advantage, jnp.ones(32))

    (expected, expected_slope), (actual, actual_slope) = (
        jax.value_and_grad(f)(logits) for f in (peer, own)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_allclose(actual_slope, expected_slope, rtol=1e-5, atol=1e-7)


def test_optimal_baseline_is_the_loop():
    draw = np.random.default_rng(13)
    weight, value = draw.exponential(size=50), draw.normal(size=50)
    top = bottom = 0.0
    for w, q in zip(weight, value, strict=True):
        top, bottom = top + w * q, bottom + w
    actual = losses.optimal_baseline(*single(weight, value))
    assert actual.shape == ()
    assert float(actual) == pytest.approx(top / bottom, rel=1e-5)


def test_optimal_baseline_by_hand_and_its_reductions():
    # (1 * 8 + 3 * 4) / 4 = 5
    weight, value = jnp.array([1.0, 3.0]), jnp.array([8.0, 4.0])
    assert float(losses.optimal_baseline(weight, value)) == 5.0
    assert float(losses.optimal_baseline(16.0 * weight, value)) == 5.0
    assert float(losses.optimal_baseline(jnp.ones(2), value)) == 6.0
    assert float(losses.optimal_baseline(weight, value + 2.0)) == 7.0
    assert float(losses.optimal_baseline(jnp.zeros(2), value)) == 0.0


def bandit():
    """Probabilities, scores and values of a choice among four, always the same draw."""
    example = tiny_mdp.example()
    policy = distributions.categorical(jnp.asarray(example.bandit_logits))
    p = jnp.exp(policy.logits)
    return p, jnp.eye(4) - p[None], jnp.asarray(example.bandit_value)


def test_optimal_baseline_minimises_the_variance_of_the_gradient_of_a_bandit():
    with jax.enable_x64(True):
        p, score, value = bandit()
        norm = jnp.sum(jnp.square(score), -1)
        best = float(losses.optimal_baseline(p * norm, value))

        def variance(baseline):
            # An exact sum over actions; the mean does not depend on the baseline.
            gradient = score * (value - baseline)[:, None]
            mean = jnp.sum(p[:, None] * gradient, 0)
            return float(jnp.sum(p[:, None] * jnp.square(gradient - mean[None])))

        grid = np.linspace(-2.0, 2.0, 401)
        assert grid[np.argmin([variance(b) for b in grid])] == pytest.approx(best, abs=0.0051)
        assert best == pytest.approx(0.5487, abs=1e-4)
        variances = [variance(b) for b in (best, float(jnp.sum(p * value)), 0.0)]
        np.testing.assert_allclose(variances, [0.1573, 0.1647, 0.3546], atol=1e-4)


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
    old_log_prob = distributions.categorical(logits).log_prob(action)

    def surrogate(loss, *extra):
        def total(x):
            log_prob = distributions.categorical(x).log_prob(action)
            return loss(log_prob, old_log_prob, advantage, *extra).mean()

        return jax.grad(total)(logits)

    plain = jax.grad(lambda x: rlax.policy_gradient_loss(x, action, advantage, jnp.ones(32)))
    expected = plain(logits)
    for actual in (
        surrogate(losses.ppo_clip, 0.2),
        surrogate(losses.clip_higher, 0.2, 0.3),
        surrogate(losses.cispo, 0.2, 0.3),
        surrogate(losses.ppo_kl_penalty, jnp.zeros(32), 3.0),
        surrogate(lambda new, old, adv: losses.score_function(new, adv)),
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


CLIPPED = (losses.clip_higher, losses.cispo)


def test_clip_higher_and_cispo_are_the_loop():
    log_prob, old_log_prob, advantage = batch(13)
    high, weighted = [], []
    for new, old, adv in zip(log_prob, old_log_prob, advantage, strict=True):
        ratio = np.exp(new - old)
        clipped = min(max(ratio, 1.0 - 0.1), 1.0 + 0.4)
        high.append(-min(ratio * adv, clipped * adv))
        weighted.append(-clipped * adv * new)
    args = single(log_prob, old_log_prob, advantage)
    for loss, expected in zip(CLIPPED, (high, weighted), strict=True):
        np.testing.assert_allclose(loss(*args, 0.1, 0.4), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ratio", [0.5, 0.85, 0.95, 1.0, 1.3, 1.5, 3.0])
def test_clip_higher_stops_beyond_its_own_bounds_and_cispo_only_bounds_the_weight(advantage, ratio):
    args = single([np.log(ratio)], [0.0], [advantage])
    stopped = (advantage > 0 and ratio > 1.4) or (advantage < 0 and ratio < 0.9)
    expected = 0.0 if stopped else -advantage * ratio
    assert slope(losses.clip_higher, *args, 0.1, 0.4).item() == pytest.approx(expected, rel=1e-6)
    expected = -advantage * min(max(ratio, 0.9), 1.4)
    assert slope(losses.cispo, *args, 0.1, 0.4).item() == pytest.approx(expected, rel=1e-6)


def test_bounds_at_equal_distance_give_ppo_clip_and_none_the_plain_ratio():
    args = single(*batch(14))
    assert losses.clip_higher(*args, 0.2, 0.2).tolist() == losses.ppo_clip(*args, 0.2).tolist()
    plain = slope(losses.ppo_clip, *args, jnp.inf)
    for loss in CLIPPED:
        np.testing.assert_allclose(slope(loss, *args, jnp.inf, jnp.inf), plain, rtol=1e-6)


def test_truncated_importance_by_hand_and_without_gradient():
    # 1/2 over 1/4, 1/8 over 1/4, and 1/2 over 1/16 = 8, at most 3
    log_prob, behaviour = np.log([0.5, 0.125, 0.5]), np.log([0.25, 0.25, 0.0625])
    args = single(log_prob, behaviour)
    np.testing.assert_allclose(losses.truncated_importance(*args, 3.0), [2.0, 0.5, 3.0], rtol=1e-6)
    np.testing.assert_allclose(losses.truncated_importance(*args, jnp.inf)[2], 8.0, rtol=1e-6)
    assert slope(losses.truncated_importance, *args, jnp.inf).tolist() == [0.0] * 3
    same = losses.truncated_importance(args[0], args[0], 1.0)
    assert same.tolist() == [1.0] * 3


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
    old = distributions.categorical(jnp.array([[0.3, -0.2, 0.1]]))
    action, advantage = jnp.array([1]), jnp.zeros(1)

    def loss(logits):
        new = distributions.categorical(logits)
        return losses.ppo_kl_penalty(
            new.log_prob(action), old.log_prob(action), advantage, old.kl_divergence(new), 2.0
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
    # It uses the clipped error alone, not the larger of the two.
    clipped = old_value + jnp.clip(value - old_value, -clip_eps, clip_eps)
    np.testing.assert_allclose(jnp.square(clipped - target).mean(), logged, rtol=1e-5)
    larger = jnp.maximum(jnp.square(clipped - target), jnp.square(value - target))
    actual = 2.0 * losses.value_loss_clipped(value, old_value, target, clip_eps)
    np.testing.assert_allclose(actual, larger, rtol=1e-5, atol=1e-6)
    assert float(actual.mean()) > logged * 1.01


def test_td_target_by_hand():
    # Neither flag, truncated, terminated, both: 1 + 8 / 2 unless the task itself ended.
    reward, next_value = jnp.ones(4), jnp.full(4, 8.0)
    truncated = jnp.array([False, True, False, True])
    terminated = jnp.array([False, False, True, True])
    target = losses.td_target(reward, next_value, terminated, 0.5)
    assert target.tolist() == [5.0, 5.0, 1.0, 1.0]
    as_if_done = losses.td_target(reward, next_value, terminated | truncated, 0.5)
    assert as_if_done.tolist() == [5.0, 1.0, 1.0, 1.0]
    slopes = jax.grad(lambda x: losses.td_target(reward, x, terminated, 0.5).sum())(next_value)
    assert slopes.tolist() == [0.5, 0.5, 0.0, 0.0]


def transitions(seed, size=60):
    draw = np.random.default_rng(seed)
    reward, value, next_value = single(*draw.normal(size=(3, size)))
    terminated = jnp.asarray(draw.random(size) < 0.3)
    return reward, value, next_value, terminated


def test_td_target_is_that_of_rlax_and_of_the_returns():
    reward, value, next_value, terminated = transitions(14)
    target = losses.td_target(reward, next_value, terminated, 0.9)
    discount = 0.9 * (1.0 - terminated)
    peer = jax.vmap(rlax.td_learning)(value, reward, discount, next_value)
    np.testing.assert_allclose(target - value, peer, rtol=1e-5, atol=1e-6)
    done = jnp.ones_like(terminated)
    one_step = returns.n_step_return(reward, next_value, terminated, done, 0.9, 1)
    np.testing.assert_allclose(target, one_step, rtol=1e-6)
    advantage = returns.gae(reward, value, next_value, terminated, terminated, 0.9, 0.0)
    np.testing.assert_allclose(target, advantage + value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nothing", [np.nan, np.inf])
def test_td_target_of_a_terminated_step_does_not_look_at_the_next_value(nothing):
    def total(next_value):
        return losses.td_target(jnp.ones(1), next_value, jnp.ones(1, bool), 0.9).sum()

    target, slopes = jax.value_and_grad(total)(jnp.array([nothing]))
    assert float(target) == 1.0
    assert slopes.tolist() == [0.0]


def test_td_target_without_discount_is_the_reward():
    reward, _, next_value, terminated = transitions(15)
    assert losses.td_target(reward, next_value, terminated, 0.0).tolist() == reward.tolist()


def test_deterministic_policy_by_hand():
    # Q = -(a - 3)^2 with a = 2 s: the loss 4 (s - 3/2)^2 has the slope 8 (s - 3/2).
    def loss(s):
        return losses.deterministic_policy(-jnp.square(2.0 * s - 3.0))

    value, slopes = jax.vmap(jax.value_and_grad(loss))(jnp.array([1.0, 2.0, 1.5]))
    assert value.tolist() == [1.0, 1.0, 0.0]
    assert slopes.tolist() == [-4.0, 4.0, 0.0]


@pytest.mark.parametrize("alpha", [0.0, 0.2, 3.0])
def test_soft_losses_are_the_loop(alpha):
    log_prob, _, value = batch(16)
    expected = [alpha * a - q for a, q in zip(log_prob, value, strict=True)]
    args = single(log_prob, value)
    np.testing.assert_allclose(losses.soft_policy(*args, alpha), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        losses.soft_value(*args, alpha), np.negative(expected), rtol=1e-5, atol=1e-6
    )


def test_soft_losses_by_hand():
    # log 1/2 at temperature 2: the loss is -2 log 2 - 3, and the action is worth 3 + 2 log 2.
    args = jnp.log(jnp.array([0.5])), jnp.array([3.0])
    assert float(losses.soft_policy(*args, 2.0)[0]) == pytest.approx(-3.0 - 2 * np.log(2.0))
    assert float(losses.soft_value(*args, 2.0)[0]) == pytest.approx(3.0 + 2 * np.log(2.0))
    assert slope(losses.soft_policy, *args, 2.0).tolist() == [2.0]
    to_value = jax.grad(lambda x: losses.soft_policy(args[0], x, 2.0).sum())(args[1])
    assert to_value.tolist() == [-1.0]


def test_at_temperature_zero_the_soft_losses_are_the_hard_ones():
    log_prob, _, value = single(*batch(17))
    hard = losses.deterministic_policy(value)
    assert losses.soft_policy(log_prob, value, 0.0).tolist() == hard.tolist()
    assert losses.soft_value(log_prob, value, 0.0).tolist() == value.tolist()


def test_soft_policy_is_least_where_the_policy_is_the_softmax_of_the_values():
    with jax.enable_x64(True):
        value = jnp.asarray(np.random.default_rng(18).normal(size=(5, 4)))
        alpha = 0.3

        def loss(logits):
            policy = distributions.categorical(logits)
            loss = losses.soft_policy(policy.logits, value, alpha)
            return distributions.expectation(policy, loss).sum()

        best, slopes = jax.value_and_grad(loss)(value / alpha)
        np.testing.assert_allclose(slopes, jnp.zeros((5, 4)), atol=1e-14)
        log_sum = alpha * jax.nn.logsumexp(value / alpha, axis=-1)
        assert float(best) == pytest.approx(-float(log_sum.sum()), rel=1e-12)
        for other in (jnp.zeros((5, 4)), value, 2.0 * value / alpha):
            assert float(loss(other)) > float(best) + 1e-3
            assert float(jnp.abs(jax.grad(loss)(other)).max()) > 1e-3


def test_soft_policy_over_all_actions_is_the_mean_over_samples():
    (logits,) = single([0.4, -1.0, 0.3, 1.1])
    value = jnp.array([1.0, 3.0, -2.0, 0.5])
    policy = distributions.categorical(logits)
    exact = distributions.expectation(policy, losses.soft_policy(policy.logits, value, 0.7))
    num_samples = 40_000
    many = distributions.categorical(jnp.broadcast_to(logits, (num_samples, 4)))
    action = many.sample(seed=jax.random.key(6))
    sampled = losses.soft_policy(many.log_prob(action), value[action], 0.7)
    assert sampled.shape == (num_samples,)
    deviation = float(sampled.std()) / np.sqrt(num_samples)
    assert float(sampled.mean()) == pytest.approx(float(exact), abs=4 * deviation)


def test_soft_policy_of_samples_as_data_teaches_nothing_on_average():
    logits, value = single([0.4, -1.0, 0.3], [1.0, 3.0, -2.0])

    def loss(x, weights_move):
        policy = distributions.categorical(x)
        p = jnp.exp(policy.logits)
        p = p if weights_move else jax.lax.stop_gradient(p)
        return jnp.sum(p * losses.soft_policy(policy.logits, value, 0.7))

    np.testing.assert_allclose(jax.grad(loss)(logits, False), jnp.zeros(3), atol=1e-6)
    assert float(jnp.abs(jax.grad(loss)(logits, True)).max()) > 0.1


def test_temperature_by_hand():
    # log alpha = -2, entropies 3 and 1/2, target 1: -2 * 2 = -4 and -2 * -1/2 = 1
    actual = losses.temperature(jnp.array(-2.0), jnp.array([3.0, 0.5]), 1.0)
    assert actual.tolist() == [-4.0, 1.0]


@pytest.mark.parametrize(
    ("entropy", "direction"), [(0.2, 1.0), (-3.0, 1.0), (2.0, -1.0), (1.0, 0.0)]
)
@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 2.0])
def test_temperature_rises_where_there_is_too_little_entropy(entropy, direction, log_alpha):
    gradient = jax.grad(lambda x: losses.temperature(x, jnp.array([entropy]), 1.0).mean())
    before = jnp.array(log_alpha)
    step = before - 0.1 * gradient(before) - before
    assert float(jnp.sign(step)) == direction


def test_temperature_moves_nothing_but_the_temperature():
    log_alpha, entropy = jnp.array(0.7), jnp.array([3.0, -1.0])
    to_entropy = jax.grad(lambda x: losses.temperature(log_alpha, x, 0.5).sum())(entropy)
    to_target = jax.grad(lambda x: losses.temperature(log_alpha, entropy, x).sum())(0.5)
    assert to_entropy.tolist() == [0.0, 0.0]
    assert float(to_target) == 0.0


def test_temperature_has_the_sign_of_the_papers_loss_and_not_its_speed():
    entropy = jnp.array([2.0, 1.6])

    def paper(log_alpha):
        log_prob = -entropy
        return jnp.mean(-jnp.exp(log_alpha) * (log_prob + 0.5))

    for log_alpha in jnp.array([-4.0, 0.0, 1.0]):
        own = jax.grad(lambda x: losses.temperature(x, entropy, 0.5).mean())(log_alpha)
        theirs = jax.grad(paper)(log_alpha)
        assert float(theirs) == pytest.approx(float(own * jnp.exp(log_alpha)), rel=1e-5)


def test_temperature_is_one_number_per_run():
    with pytest.raises(AssertionError, match="shape"):
        losses.temperature(jnp.zeros(1), jnp.zeros(5), 0.0)
    per_run = jax.vmap(losses.temperature)
    actual = per_run(jnp.array([1.0, 2.0]), jnp.ones((2, 5)), jnp.array([0.0, 3.0]))
    assert actual.tolist() == [[1.0] * 5, [-4.0] * 5]


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
    new, old = distributions.categorical(logits), distributions.categorical(old_logits)
    p = jnp.exp(jax.nn.log_softmax(old_logits))

    def mean(x):
        log_prob = jax.nn.log_softmax(x)
        return jnp.sum(p * losses.approximate_kl(log_prob, jax.nn.log_softmax(old_logits)))

    forward, backward = float(old.kl_divergence(new)), float(new.kl_divergence(old))
    assert float(mean(logits)) == pytest.approx(forward, rel=1e-5)
    assert abs(forward - backward) > 0.01
    np.testing.assert_allclose(
        jax.grad(mean)(logits),
        jax.grad(lambda x: old.kl_divergence(distributions.categorical(x)))(logits),
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
    "clip_higher": lambda a, b, c, eps: losses.clip_higher(a, b, c, eps, 2.0 * eps),
    "cispo": lambda a, b, c, eps: losses.cispo(a, b, c, eps, 2.0 * eps),
    "truncated_importance": lambda a, b, c, eps: losses.truncated_importance(a, b, eps) + 0.0 * c,
    "ppo_kl_penalty": lambda a, b, c, eps: losses.ppo_kl_penalty(a, b, c, c, eps),
    "value_loss": lambda a, b, c, eps: losses.value_loss(a, b) + 0.0 * c,
    "value_loss_clipped": lambda a, b, c, eps: losses.value_loss_clipped(a, b, c, eps),
    "approximate_kl": lambda a, b, c, eps: losses.approximate_kl(a, b) + 0.0 * c,
    "is_clipped": lambda a, b, c, eps: losses.is_clipped(a, b, eps) + 0.0 * c,
    "score_function": lambda a, b, c, eps: losses.score_function(a, b) + 0.0 * c,
    "td_target": lambda a, b, c, eps: losses.td_target(a, b, c > 0.0, eps),
    "soft_value": lambda a, b, c, eps: losses.soft_value(a, b, eps) + 0.0 * c,
    "soft_policy": lambda a, b, c, eps: losses.soft_policy(a, b, eps) + 0.0 * c,
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


def test_optimal_baseline_of_each_run_of_a_batch():
    weight, value = single(*np.random.default_rng(19).exponential(size=(2, 3, 20)))
    actual = jax.jit(jax.vmap(losses.optimal_baseline))(weight, value)
    expected = jnp.stack(
        [losses.optimal_baseline(w, q) for w, q in zip(weight, value, strict=True)]
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    with pytest.raises(AssertionError, match="shape"):
        losses.optimal_baseline(weight, value[0])


def test_examples():
    results = doctest.testmod(losses)
    assert results.attempted >= 13
    assert results.failed == 0
