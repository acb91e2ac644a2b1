"""Step sizes: which of them converge, what a constant one leaves, and how Adam differs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from purejaxpg import optimizers, schedules

pytestmark = pytest.mark.fast


def mean_squares(rates, curvature=1.0, variance=1.0, start=4.0):
    """Exact E[(x_k − x*)²] of x ← x − rate (curvature (x − x*) + noise), after each step."""
    error, errors = start, []
    for rate in np.asarray(rates, np.float64):
        error = (1.0 - rate * curvature) ** 2 * error + rate**2 * variance
        errors.append(error)
    return np.array(errors)


def test_a_harmonic_step_size_converges_like_one_over_k():
    errors = mean_squares(schedules.robbins_monro(jnp.arange(100_000), 1.0))
    # For curvature 1 this is the mean of k samples: the start is forgotten at the first step.
    np.testing.assert_allclose(errors * np.arange(1, 100_001), 1.0, rtol=1e-9)


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0])
def test_a_constant_step_size_ends_at_its_noise_floor(rate):
    count = jnp.arange(5_000)
    errors = mean_squares(rate * schedules.factor("constant", count, 1, 1.0), curvature=0.5)
    assert errors[-1] == pytest.approx(rate / (0.5 * (2.0 - 0.5 * rate)), rel=1e-6)


def test_a_sum_that_is_finite_stops_on_the_way():
    rates = 0.5 ** np.arange(1, 200)  # their sum is 1, and that of their squares is finite
    moved = np.prod(1.0 - 0.1 * rates)  # of the distance, without noise
    assert 0.9 < moved < 1.0
    harmonic = np.asarray(schedules.robbins_monro(jnp.arange(1, 100_000), 1.0))
    assert np.prod(1.0 - 0.1 * harmonic) < 0.5 * moved


@pytest.mark.parametrize(("ratio", "converges"), [(4.0, True), (1.2, True), (0.8, False)])
def test_a_critic_must_be_faster_than_the_actor_that_leans_on_it(ratio, converges):
    """x' = x − 2y and y' = ratio (x − y): with y = x, x falls; with y behind, it runs away."""
    step = np.eye(2) + 0.01 * np.array([[1.0, -2.0], [ratio, -ratio]])
    distance = np.linalg.norm(np.linalg.matrix_power(step, 20_000) @ np.array([1.0, 1.0]))
    assert (distance < 1e-3) if converges else (distance > 1e3)


PERIOD = 20_000


def rare_gradients():
    """One large gradient in each period, and −1 otherwise; their mean is positive."""
    gradient = -np.ones(3 * PERIOD)
    gradient[::PERIOD] = 1.2 * PERIOD
    assert gradient.mean() > 0.1
    return jnp.asarray(gradient)


def moved(optimizer):
    """How far an optimiser moves one parameter that is given these gradients."""

    def step(carry, gradient):
        change, state = optimizer.update(gradient[None], carry[1])
        return (optax.apply_updates(carry[0], change), state), None

    start = jnp.zeros(1)
    run = jax.jit(lambda x, g: jax.lax.scan(step, (x, optimizer.init(x)), g)[0][0])
    return float(run(start, rare_gradients())[0])


def test_adam_can_climb_where_the_mean_gradient_descends():
    assert moved(optax.sgd(1e-3)) < -1.0
    assert moved(optimizers.clipped_adam(1e-3, float("inf"))) > 1.0


def test_clipping_each_gradient_changes_the_sign_of_the_mean():
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3))
    loose = optax.chain(optax.clip_by_global_norm(2.0 * PERIOD), optax.sgd(1e-3))
    assert moved(clipped) > 1.0
    assert moved(loose) == pytest.approx(moved(optax.sgd(1e-3)), rel=1e-9)
