"""Factors on the learning rate."""

import doctest
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg import InputError, schedules

pytestmark = pytest.mark.fast


def test_linear_by_hand() -> None:
    assert schedules.linear(jnp.arange(5), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("total", [1, 3, 1000, 2**24])
def test_linear_is_zero_after_the_last_update_and_not_before(total: int) -> None:
    at_start, in_last, after = schedules.linear(jnp.array([0, total - 1, total]), total)
    assert float(at_start) == 1.0
    assert float(in_last) == pytest.approx(1.0 / total, rel=1e-3)
    assert float(after) == 0.0


def test_linear_is_never_negative() -> None:
    assert schedules.linear(jnp.array([4, 5, 1000]), 4).tolist() == [0.0, 0.0, 0.0]


def test_robbins_monro_by_hand() -> None:
    actual = schedules.robbins_monro(jnp.array([0, 2, 4, 12, 36]), 4.0)
    np.testing.assert_allclose(actual, [1.0, 2 / 3, 1 / 2, 1 / 4, 1 / 10], rtol=1e-6)


@pytest.mark.parametrize("half_life", [0.1, 1.0, 7.0, 1e4])
def test_robbins_monro_is_its_formula(half_life: float) -> None:
    expected = [half_life / (half_life + k) for k in range(200)]
    actual = schedules.robbins_monro(jnp.arange(200), half_life)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_an_infinite_half_life_is_constant() -> None:
    assert schedules.robbins_monro(jnp.arange(3), float("inf")).tolist() == [1.0, 1.0, 1.0]


def running(samples: np.ndarray, rates: jax.Array) -> np.ndarray:
    """Estimates of the mean after each sample: m <- m + rate (x - m), from a wild first guess."""
    estimate, estimates = 1000.0, []
    for x, rate in zip(samples, np.asarray(rates, np.float64), strict=True):
        estimate += rate * (x - estimate)
        estimates.append(estimate)
    return np.array(estimates)


def test_robbins_monro_with_half_life_one_is_the_running_mean() -> None:
    samples = np.random.default_rng(0).normal(size=300)
    with jax.enable_x64(True):
        rates = schedules.robbins_monro(jnp.arange(300), 1.0)
        assert rates.dtype == jnp.float64
    expected = [np.mean(samples[: k + 1]) for k in range(300)]
    np.testing.assert_allclose(running(samples, rates), expected, rtol=0.0, atol=1e-12)


def test_a_constant_rate_weights_samples_geometrically() -> None:
    samples = np.random.default_rng(1).normal(size=50)
    rates = 0.25 * schedules.factor("constant", jnp.arange(50), 50, 1.0)
    estimate = running(samples, rates)[-1]
    weights = [0.25 * 0.75 ** (49 - i) for i in range(50)]
    assert estimate == pytest.approx(0.75**50 * 1000.0 + weights @ samples, rel=1e-12)


@pytest.mark.parametrize("half_life", [1.0, 3.0, 20.0])
def test_the_factors_sum_to_infinity_and_their_squares_do_not(half_life: float) -> None:
    with jax.enable_x64(True):
        factors = np.asarray(schedules.robbins_monro(jnp.arange(10**6), half_life))
    # Between two integrals: h log((h + n) / h) <= sum <= 1 + that.
    for n in (10**2, 10**4, 10**6):
        grown = half_life * np.log1p(n / half_life)
        assert grown <= factors[:n].sum() <= 1.0 + grown
    # Since h + k - 1/2 < h + k, the squares stay below h^2 / (h - 1/2), and for h = 1 they are
    # those of 1/k, with the sum pi^2 / 6.
    squares = np.cumsum(factors**2)
    assert squares[-1] < half_life**2 / (half_life - 0.5)
    assert squares[-1] - squares[10**4] < half_life**2 / 10**4
    if half_life == 1.0:
        assert squares[-1] == pytest.approx(np.pi**2 / 6.0, rel=1e-5)


def test_a_decaying_rate_settles_where_a_constant_one_keeps_moving() -> None:
    samples = np.random.default_rng(2).normal(size=20_000)
    count = jnp.arange(20_000)
    settled = running(samples, schedules.factor("robbins_monro", count, 1, 1.0))[-5000:]
    moving = running(samples, 0.5 * schedules.factor("constant", count, 1, 1.0))[-5000:]
    # The variance of a constant rate a is a / (2 - a) = 1/3 for ever; that of a mean is 1 / n.
    assert moving.var() == pytest.approx(1 / 3, rel=0.2)
    assert np.abs(settled).max() < 4.0 / np.sqrt(15_000)


def test_factor_is_the_schedule_of_that_name() -> None:
    count = jnp.arange(7)
    constant = schedules.factor("constant", count, 10, 4.0)
    assert constant.tolist() == [1.0] * 7
    linear = schedules.factor("linear", count, 10, 4.0)
    assert linear.tolist() == schedules.linear(count, 10).tolist()
    decaying = schedules.factor("robbins_monro", count, 10, 4.0)
    assert decaying.tolist() == schedules.robbins_monro(count, 4.0).tolist()


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_the_first_update_has_the_whole_rate(kind: str) -> None:
    for start in (0, jnp.int32(0)):
        factor = schedules.factor(kind, start, 5, 3.0)
        assert factor.shape == ()
        assert factor.dtype == jnp.float32
        assert float(factor) == 1.0


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_count_total_and_half_life_may_be_traced(kind: str) -> None:
    count, total, half_life = jnp.array([0, 3, 9]), jnp.array([5, 6, 10]), jnp.array([1.0, 3.0, 2])

    def one(count: jax.Array, total: jax.Array, half_life: jax.Array) -> jax.Array:
        return schedules.factor(kind, count, total, half_life)

    together = jax.jit(jax.vmap(one))(count, total, half_life)
    for i in range(3):
        alone = schedules.factor(kind, int(count[i]), int(total[i]), float(half_life[i]))
        assert float(together[i]) == pytest.approx(float(alone), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("constant", 0.3), ("linear", 0.3 * (1 - 2 / 8)), ("robbins_monro", 0.3 * 4 / (4 + 2))],
)
def test_the_rate_that_a_configuration_asks_for(kind: str, expected: float) -> None:
    config = types.SimpleNamespace(
        learning_rate_schedule=kind, learning_rate_half_life=4.0, num_updates=8
    )
    schedules.check(config)
    assert float(schedules.scheduled(config, 0.3, 2)) == pytest.approx(expected, rel=1e-6)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        schedules.check(types.SimpleNamespace(learning_rate_schedule="cosine"))
    assert str(caught.value) == (
        "learning_rate_schedule must be one of 'constant', 'linear', 'robbins_monro', "
        "but is 'cosine'."
    )
    with pytest.raises(ValueError, match=r"no schedule 'cosine'.* constant, linear, robbins"):
        schedules.factor("cosine", 0, 10, 1.0)


def test_examples() -> None:
    results = doctest.testmod(schedules)
    assert results.attempted >= 3
    assert results.failed == 0
