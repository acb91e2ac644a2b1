import doctest
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rlax

from purejaxpg.kernels import returns

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "sb3_gae.json"
# Sums of up to 33 terms of size one in float32, against float64.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SHAPES = [(1, 2), (2,), (7,), (12, 3), (33, 2, 3)]
DISCOUNTS = [(0.0, 0.5), (0.9, 0.0), (0.9, 0.8), (1.0, 0.95), (0.97, 1.0), (1.0, 1.0)]


@pytest.fixture(autouse=True)
def strict_shapes():
    with jax.numpy_rank_promotion("raise"):
        yield


def rollout(seed, shape, truncations=True):
    """Random rows in which next_value is the next row's value, except where an episode ends."""
    rng = np.random.default_rng(seed)
    reward, value, final_value = rng.normal(size=(3, *shape))
    terminated = rng.random(shape) < 0.15
    truncated = rng.random(shape) < (0.15 if truncations else 0.0)
    done = terminated | truncated
    following = np.concatenate([value[1:], rng.normal(size=(1, *shape[1:]))])
    return reward, value, np.where(done, final_value, following), terminated, done


def on_device(*arrays):
    return [jnp.asarray(a, bool if a.dtype == bool else jnp.float32) for a in arrays]


def columns(function, shape, *arrays):
    """Apply a loop over one column of T rows to every column."""
    flat = [a.reshape(shape[0], -1) for a in arrays]
    out = [function(*(a[:, i] for a in flat)) for i in range(flat[0].shape[1])]
    return np.stack(out, axis=1).reshape(shape)


def loop_n_step(reward, next_value, terminated, done, gamma, n):
    out = np.zeros(len(reward))
    for t in range(len(reward)):
        discount = 1.0
        for k in range(t, min(t + n, len(reward))):
            out[t] += discount * reward[k]
            discount *= gamma
            if done[k]:
                break
        out[t] += discount * next_value[k] * (not terminated[k])
    return out


def loop_lambda_return(reward, next_value, terminated, done, gamma, gae_lambda):
    """The forward view: every n-step return with its own weight, the longest with the remainder."""
    out = np.zeros(len(reward))
    for t in range(len(reward)):
        horizon = 1
        while t + horizon < len(reward) and not done[t + horizon - 1]:
            horizon += 1
        for n in range(1, horizon + 1):
            weight = gae_lambda ** (n - 1) * (1.0 if n == horizon else 1.0 - gae_lambda)
            n_step = loop_n_step(reward[t:], next_value[t:], terminated[t:], done[t:], gamma, n)
            out[t] += weight * n_step[0]
    return out


def loop_gae(reward, value, next_value, terminated, done, gamma, gae_lambda):
    """The sum of errors written out, quadratic in T."""
    out = np.zeros(len(reward))
    for t in range(len(reward)):
        weight = 1.0
        for k in range(t, len(reward)):
            bootstrap = 0.0 if terminated[k] else next_value[k]
            out[t] += weight * (reward[k] + gamma * bootstrap - value[k])
            if done[k]:
                break
            weight *= gamma * gae_lambda
    return out


def loop_discounted(reward, done, gamma):
    out = np.zeros(len(reward))
    for t in range(len(reward)):
        for k in range(t, len(reward)):
            out[t] += gamma ** (k - t) * reward[k]
            if done[k]:
                break
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_return_is_the_loop(shape, gamma):
    reward, _, _, _, done = rollout(0, shape)
    expected = columns(lambda r, d: loop_discounted(r, d, gamma), shape, reward, done)
    actual = jax.jit(returns.discounted_return)(*on_device(reward, done), gamma)
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 5, 100])
def test_n_step_return_is_the_loop(shape, n):
    reward, _, next_value, terminated, done = rollout(1, shape)
    rows = reward, next_value, terminated, done
    expected = columns(lambda *row: loop_n_step(*row, 0.9, n), shape, *rows)
    actual = jax.jit(returns.n_step_return, static_argnums=5)(*on_device(*rows), 0.9, n)
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gamma", "gae_lambda"), DISCOUNTS)
def test_lambda_return_is_the_forward_view(shape, gamma, gae_lambda):
    reward, _, next_value, terminated, done = rollout(2, shape)
    rows = reward, next_value, terminated, done
    expected = columns(lambda *row: loop_lambda_return(*row, gamma, gae_lambda), shape, *rows)
    actual = jax.jit(returns.lambda_return)(*on_device(*rows), gamma, gae_lambda)
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("gamma", "gae_lambda"), DISCOUNTS)
def test_gae_is_the_written_out_sum(shape, gamma, gae_lambda):
    rows = rollout(3, shape)
    expected = columns(lambda *row: loop_gae(*row, gamma, gae_lambda), shape, *rows)
    actual = jax.jit(returns.gae)(*on_device(*rows), gamma, gae_lambda)
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


def by_hand():
    """Five steps of one environment: truncated at step 1, terminated at step 3, then cut short."""
    reward = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    value = jnp.array([10.0, 20.0, 30.0, 40.0, 50.0])
    next_value = jnp.array([20.0, 8.0, 40.0, 99.0, 60.0])
    truncated = jnp.array([False, True, False, False, False])
    terminated = jnp.array([False, False, False, True, False])
    return reward, value, next_value, terminated, terminated | truncated


@pytest.mark.usefixtures("on_gpu")
def test_discounted_return_by_hand():
    reward, _, _, _, done = by_hand()
    # gamma = 1/2
    # G_4 = 5                 the array ends
    # G_3 = 4                 terminated
    # G_2 = 3 + 4/2   = 5
    # G_1 = 2                 truncated: nothing bootstrapped
    # G_0 = 1 + 2/2   = 2
    assert returns.discounted_return(reward, done, 0.5).tolist() == [2.0, 2.0, 5.0, 4.0, 5.0]


def test_n_step_return_by_hand():
    reward, _, next_value, terminated, done = by_hand()
    # gamma = 1/2, n = 2
    # G_4 = 5 + 60/2         = 35    one step left, then the bootstrap at the end of the array
    # G_3 = 4                        terminated: V(s') = 99 is not used
    # G_2 = 3 + 4/2          = 5     terminated after two steps
    # G_1 = 2 + 8/2          = 6     truncated: one step, and V(s') = 8 of the cut observation
    # G_0 = 1 + 2/2 + 8/4    = 4     the second step is the truncated one
    actual = returns.n_step_return(reward, next_value, terminated, done, 0.5, 2)
    assert actual.tolist() == [4.0, 6.0, 5.0, 4.0, 35.0]


@pytest.mark.usefixtures("on_gpu")
def test_lambda_return_by_hand():
    reward, _, next_value, terminated, done = by_hand()
    # gamma = lambda = 1/2
    # G_4 = 5 + 60/2                     = 35
    # G_3 = 4
    # G_2 = 3 + (40/2 + 4/2)/2           = 14
    # G_1 = 2 + 8/2                      = 6
    # G_0 = 1 + (20/2 + 6/2)/2           = 7.5
    actual = returns.lambda_return(reward, next_value, terminated, done, 0.5, 0.5)
    assert actual.tolist() == [7.5, 6.0, 14.0, 4.0, 35.0]


@pytest.mark.usefixtures("on_gpu")
def test_gae_by_hand():
    # gamma = lambda = 1/2, so an error carries over with a factor 1/4
    # delta = 1 + 20/2 - 10 = 1,  2 + 8/2 - 20 = -14,  3 + 40/2 - 30 = -7,  4 - 40 = -36,
    #         5 + 60/2 - 50 = -15
    # A_4 = -15
    # A_3 = -36                 terminated: A_4 does not count
    # A_2 = -7 - 36/4 = -16
    # A_1 = -14                 truncated: A_2 does not count
    # A_0 = 1 - 14/4  = -2.5
    assert returns.gae(*by_hand(), 0.5, 0.5).tolist() == [-2.5, -14.0, -16.0, -36.0, -15.0]


def test_lambda_zero_is_the_one_step_error():
    reward, value, next_value, terminated, done = on_device(*rollout(4, (12, 3)))
    target = reward + 0.9 * jnp.where(terminated, 0.0, next_value)
    rows = reward, next_value, terminated, done
    np.testing.assert_allclose(returns.lambda_return(*rows, 0.9, 0.0), target, rtol=1e-6)
    np.testing.assert_allclose(
        returns.gae(reward, value, next_value, terminated, done, 0.9, 0.0),
        target - value,
        rtol=1e-5,
        atol=1e-6,
    )


def test_lambda_one_is_monte_carlo_where_nothing_is_bootstrapped():
    reward, value, next_value, terminated, done = on_device(*rollout(5, (12, 3), truncations=False))
    terminated = done = done.at[-1].set(True)
    monte_carlo = returns.discounted_return(reward, done, 0.9)
    rows = next_value, terminated, done
    np.testing.assert_allclose(
        returns.lambda_return(reward, *rows, 0.9, 1.0), monte_carlo, **TOLERANCE
    )
    np.testing.assert_allclose(
        returns.gae(reward, value, *rows, 0.9, 1.0), monte_carlo - value, **TOLERANCE
    )


@pytest.mark.parametrize(("gamma", "gae_lambda"), DISCOUNTS)
def test_advantage_plus_value_is_the_lambda_return(gamma, gae_lambda):
    reward, value, next_value, terminated, done = on_device(*rollout(6, (33, 4)))
    rows = next_value, terminated, done, gamma, gae_lambda
    advantage = jax.jit(returns.gae)(reward, value, *rows)
    target = jax.jit(returns.lambda_return)(reward, *rows)
    np.testing.assert_allclose(advantage + value, target, **TOLERANCE)


def test_one_step_is_lambda_zero_and_many_steps_are_lambda_one():
    reward, _, next_value, terminated, done = on_device(*rollout(7, (12, 3)))
    rows = reward, next_value, terminated, done
    for n, gae_lambda in [(1, 0.0), (12, 1.0), (1000, 1.0)]:
        np.testing.assert_allclose(
            returns.n_step_return(*rows, 0.9, n),
            returns.lambda_return(*rows, 0.9, gae_lambda),
            **TOLERANCE,
        )


def test_n_steps_of_zero_value_are_the_discounted_return():
    reward, _, _, terminated, done = on_device(*rollout(8, (12, 3)))
    actual = returns.n_step_return(reward, 0 * reward, terminated, done, 0.9, 12)
    np.testing.assert_allclose(actual, returns.discounted_return(reward, done, 0.9), **TOLERANCE)


@pytest.mark.parametrize("n", [0, -1])
def test_n_below_one_is_refused(n):
    reward, _, next_value, terminated, done = by_hand()
    with pytest.raises(ValueError, match=f"n is {n};"):
        returns.n_step_return(reward, next_value, terminated, done, 0.9, n)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(0.99, 0.95), (0.9, 1.0), (1.0, 0.5)])
def test_truncation_agrees_with_folding_the_bootstrap_into_the_reward(seed, gamma, gae_lambda):
    reward, value, next_value, terminated, done = rollout(seed, (24, 4))
    truncated = done & ~terminated
    assert truncated[:-1].any()
    assert terminated[:-1].any()
    gae = jax.jit(returns.gae)
    direct = gae(*on_device(reward, value, next_value, terminated, done), gamma, gae_lambda)
    folded = reward + gamma * truncated * next_value
    # If one flag serves both jobs, next_value past an end is not used: any value will do.
    shifted = np.concatenate([value[1:], next_value[-1:]])
    own = gae(*on_device(folded, value, shifted, done, done), gamma, gae_lambda)
    peer = rlax_gae(
        *on_device(folded, gamma * (1.0 - done)),
        gae_lambda,
        jnp.asarray(np.concatenate([value, shifted[-1:]]), jnp.float32),
    )
    np.testing.assert_allclose(direct, own, **TOLERANCE)
    np.testing.assert_allclose(direct, peer, **TOLERANCE)


def rlax_gae(reward, discount, gae_lambda, values):
    peer = jax.vmap(
        rlax.truncated_generalized_advantage_estimation, in_axes=(1, 1, None, 1), out_axes=1
    )
    return jax.jit(peer)(reward, discount, gae_lambda, values)


@pytest.mark.parametrize("shift", [1, -1])
def test_flags_shifted_by_a_row_are_noticed(shift):
    reward, value, next_value, terminated, done = by_hand()
    right = returns.gae(reward, value, next_value, terminated, done, 0.9, 0.8)
    wrong = returns.gae(
        reward, value, next_value, jnp.roll(terminated, shift), jnp.roll(done, shift), 0.9, 0.8
    )
    expected = loop_gae(*map(np.asarray, by_hand()), 0.9, 0.8)
    np.testing.assert_allclose(right, expected, rtol=1e-5)
    assert np.max(np.abs(np.asarray(wrong) - expected)) > 1.0


def test_swapped_flags_are_noticed():
    reward, value, next_value, terminated, done = by_hand()
    right = returns.gae(reward, value, next_value, terminated, done, 0.9, 0.8)
    never_truncated = returns.gae(reward, value, next_value, done, done, 0.9, 0.8)
    leaking = returns.gae(reward, value, next_value, terminated, terminated, 0.9, 0.8)
    # Row 1 is the truncated one: it loses gamma V(s') = 0.9 * 8, or gains gamma lambda A_2.
    assert float(right[1] - never_truncated[1]) == pytest.approx(7.2, rel=1e-5)
    assert float(leaking[1] - right[1]) == pytest.approx(0.72 * float(right[2]), rel=1e-5)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.9, 1.0])
def test_a_time_limit_does_not_change_what_the_critic_learns(gae_lambda):
    # One state, reward 1 for ever, cut every 5 steps: V = 1 / (1 - 0.9) = 10. Treated as
    # terminations, the cuts leave at most 1 + 0.9 + ... + 0.9^4 = 4.0951.
    reward = jnp.ones(25)
    truncated = (jnp.arange(25) % 5) == 4

    def learned(terminated):
        def sweep(value, _):
            values = jnp.full(25, value)
            advantage = returns.gae(reward, values, values, terminated, truncated, 0.9, gae_lambda)
            return value + advantage.mean(), None

        return jax.lax.scan(sweep, jnp.float32(0.0), length=400)[0]

    assert float(learned(jnp.zeros(25, bool))) == pytest.approx(10.0, abs=1e-4)
    assert float(learned(truncated)) < 4.0951 + 1e-4


def test_nothing_is_read_from_beyond_a_termination():
    reward, value, next_value, terminated, done = by_hand()
    terminated, done = terminated.at[-1].set(True), done.at[-1].set(True)
    spoiled = jnp.where(terminated, jnp.nan, next_value)
    for clean, dirty in [
        (
            returns.gae(reward, value, next_value, terminated, done, 0.9, 0.8),
            returns.gae(reward, value, spoiled, terminated, done, 0.9, 0.8),
        ),
        (
            returns.lambda_return(reward, next_value, terminated, done, 0.9, 0.8),
            returns.lambda_return(reward, spoiled, terminated, done, 0.9, 0.8),
        ),
        (
            returns.n_step_return(reward, next_value, terminated, done, 0.9, 3),
            returns.n_step_return(reward, spoiled, terminated, done, 0.9, 3),
        ),
    ]:
        assert clean.tolist() == dirty.tolist()


def test_the_next_episode_does_not_reach_back():
    reward, value, next_value, terminated, done = by_hand()
    # Rows 2 to 4 belong to other episodes than rows 0 and 1.
    other = [jnp.where(jnp.arange(5) < 2, x, 7.0 * x + 3.0) for x in (reward, value, next_value)]
    flags = terminated, done
    for before, after in [
        (
            returns.gae(reward, value, next_value, *flags, 0.9, 0.8),
            returns.gae(*other, *flags, 0.9, 0.8),
        ),
        (
            returns.lambda_return(reward, next_value, *flags, 0.9, 0.8),
            returns.lambda_return(other[0], other[2], *flags, 0.9, 0.8),
        ),
        (
            returns.n_step_return(reward, next_value, *flags, 0.9, 4),
            returns.n_step_return(other[0], other[2], *flags, 0.9, 4),
        ),
        (
            returns.discounted_return(reward, done, 0.9),
            returns.discounted_return(other[0], done, 0.9),
        ),
    ]:
        assert before[:2].tolist() == after[:2].tolist()
        assert before[2:].tolist() != after[2:].tolist()


def test_discounted_return_is_that_of_rlax():
    reward, _, _, _, done = on_device(*rollout(9, (12,)))
    peer = rlax.discounted_returns(reward, 0.9 * (1.0 - done), jnp.zeros(12))
    np.testing.assert_allclose(returns.discounted_return(reward, done, 0.9), peer, **TOLERANCE)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("truncations", [False, True])
def test_lambda_return_is_that_of_rlax(gae_lambda, truncations):
    reward, _, next_value, terminated, done = on_device(*rollout(10, (12,), truncations))
    # rlax has one flag but a mixture per step; a mixture of zero at an end is a bootstrap.
    peer = rlax.lambda_returns(
        reward, 0.9 * (1.0 - terminated), next_value, gae_lambda * (1.0 - done)
    )
    actual = returns.lambda_return(reward, next_value, terminated, done, 0.9, gae_lambda)
    np.testing.assert_allclose(actual, peer, **TOLERANCE)


@pytest.mark.parametrize("n", [1, 3, 12])
@pytest.mark.parametrize("truncations", [False, True])
def test_n_step_return_is_that_of_rlax(n, truncations):
    reward, _, next_value, terminated, done = on_device(*rollout(11, (12,), truncations))
    peer = rlax.n_step_bootstrapped_returns(
        reward, 0.9 * (1.0 - terminated), next_value, n, lambda_t=1.0 - done
    )
    actual = returns.n_step_return(reward, next_value, terminated, done, 0.9, n)
    np.testing.assert_allclose(actual, peer, **TOLERANCE)


def test_gae_is_that_of_rlax():
    reward, value, next_value, terminated, done = on_device(*rollout(12, (12, 3), False))
    values = jnp.concatenate([value, next_value[-1:]])
    peer = rlax_gae(reward, 0.9 * (1.0 - done), 0.8, values)
    actual = returns.gae(reward, value, next_value, terminated, done, 0.9, 0.8)
    np.testing.assert_allclose(actual, peer, **TOLERANCE)


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["cases"], ids=lambda c: c["name"])
def test_gae_is_that_of_stable_baselines(case):
    reward, value, next_value = (
        jnp.array(case[name], jnp.float32) for name in ("reward", "value", "next_value")
    )
    terminated, truncated = jnp.array(case["terminated"]), jnp.array(case["truncated"])
    done = terminated | truncated
    discounts = case["gamma"], case["gae_lambda"]
    advantage = returns.gae(reward, value, next_value, terminated, done, *discounts)
    target = returns.lambda_return(reward, next_value, terminated, done, *discounts)
    np.testing.assert_allclose(advantage, np.array(case["advantage"]), **TOLERANCE)
    np.testing.assert_allclose(target, np.array(case["target"]), **TOLERANCE)


def test_golden_cases_include_what_they_are_for():
    cases = json.loads(GOLDEN.read_text())["cases"]
    assert any(not np.any(case["truncated"]) for case in cases)
    assert any(np.any(np.array(case["truncated"])[:-1]) for case in cases)
    assert any(np.any(case["truncated"][-1]) for case in cases)
    assert all(np.any(np.array(case["terminated"])[:-1]) for case in cases)


def test_gradient_passes_through_every_input():
    rows = by_hand()
    # One column of the Jacobian per reward: the weights (gamma lambda)^k, cut where episodes end.
    weights = np.array(
        [
            [1.0, 0.72, 0.0, 0.0, 0.0],
            [0.0, 1.0, 0.0, 0.0, 0.0],
            [0.0, 0.0, 1.0, 0.72, 0.0],
            [0.0, 0.0, 0.0, 1.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 1.0],
        ]
    )
    to_reward, to_value, to_next_value = jax.jacobian(returns.gae, argnums=(0, 1, 2))(
        *rows, 0.9, 0.8
    )
    np.testing.assert_allclose(to_reward, weights, rtol=1e-6)
    np.testing.assert_allclose(to_value, -weights, rtol=1e-6)
    bootstrapped = 0.9 * weights * np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(to_next_value, bootstrapped, rtol=1e-6)


FUNCTIONS = {
    "discounted_return": lambda r, v, nv, term, done, gamma, lam: returns.discounted_return(
        r, done, gamma
    ),
    "n_step_return": lambda r, v, nv, term, done, gamma, lam: returns.n_step_return(
        r, nv, term, done, gamma, 4
    ),
    "lambda_return": lambda r, v, nv, term, done, gamma, lam: returns.lambda_return(
        r, nv, term, done, gamma, lam
    ),
    "gae": returns.gae,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_jit_and_vmap_agree(function):
    rows = on_device(*rollout(13, (13, 3)))
    plain = function(*rows, 0.9, 0.8)
    np.testing.assert_allclose(jax.jit(function)(*rows, 0.9, 0.8), plain, rtol=1e-6, atol=1e-6)
    over_envs = jax.vmap(function, in_axes=(1, 1, 1, 1, 1, None, None), out_axes=1)
    np.testing.assert_allclose(over_envs(*rows, 0.9, 0.8), plain, rtol=1e-6, atol=1e-6)
    discounts = jnp.array([0.5, 0.9]), jnp.array([0.3, 0.8])
    over_runs = jax.vmap(function, in_axes=(None, None, None, None, None, 0, 0))
    np.testing.assert_allclose(over_runs(*rows, *discounts)[1], plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_half_precision_rewards_meet_a_traced_discount(function):
    reward, value, next_value, terminated, done = by_hand()
    half = reward.astype(jnp.bfloat16)
    actual = function(half, value, next_value, terminated, done, jnp.float32(0.5), jnp.float32(0.5))
    expected = function(reward, value, next_value, terminated, done, 0.5, 0.5)
    assert actual.dtype == jnp.float32
    assert actual.tolist() == expected.tolist()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_unequal_shapes_are_refused(function):
    reward, value, next_value, terminated, done = on_device(*rollout(14, (5, 3)))
    with pytest.raises(AssertionError, match="shape"):
        function(reward, value, next_value, terminated[:, :1], done[:, :1], 0.9, 0.8)


READS = {"gae": (0, 1, 2, 3, 4), "lambda_return": (0, 2, 3, 4), "n_step_return": (0, 2, 3, 4)}


@pytest.mark.parametrize(("name", "place"), [(n, i) for n, places in READS.items() for i in places])
def test_one_input_of_another_shape_is_refused(name, place):
    arrays = list(on_device(*rollout(14, (5, 3))))
    arrays[place] = arrays[place][:, :1]
    with pytest.raises(AssertionError, match="shape"):
        FUNCTIONS[name](*arrays, 0.9, 0.8)


def test_examples():
    results = doctest.testmod(returns)
    assert results.attempted >= 4
    assert results.failed == 0
