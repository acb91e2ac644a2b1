"""The natural gradient: its invariances, its closed form, and that it improves the policy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from purejaxpg.kernels import distributions, trust_region

pytestmark = pytest.mark.fast

OBS, ACTIONS, BATCH = 3, 2, 9
NUM_PARAMS = OBS * ACTIONS + ACTIONS
GAMMA = 0.8


# --- invariance ----------------------------------------------------------------------------------


def gaussian(params: jax.Array, obs: jax.Array) -> Any:
    weights = params[: OBS * ACTIONS].reshape(OBS, ACTIONS)
    return distributions.diag_gaussian(jnp.tanh(obs @ weights), params[OBS * ACTIONS :])


def task() -> tuple[jax.Array, ...]:
    """States, actions, advantages, parameters, and an invertible change of parameters."""
    generator = np.random.default_rng(0)
    shapes = (BATCH, OBS), (BATCH, ACTIONS), (BATCH,), (NUM_PARAMS,), (NUM_PARAMS, NUM_PARAMS)
    obs, action, advantage, params, change = (jnp.asarray(generator.normal(size=s)) for s in shapes)
    return obs, action, advantage, 0.5 * params, change + 3.0 * jnp.eye(NUM_PARAMS)


@functools.partial(jax.jit, static_argnames="natural")
def policy_after_a_step(change: jax.Array, damping: float, natural: bool = True) -> Any:
    """Mean and σ of the policy after one step on φ, where θ = M φ, with a bound of 1e-3."""
    obs, action, advantage, params, _ = task()

    def policy(phi: jax.Array) -> Any:
        return gaussian(change @ phi, obs)

    def surrogate(phi: jax.Array) -> jax.Array:
        return jnp.mean(policy(phi).log_prob(action) * advantage)

    phi = jnp.linalg.solve(change, params)
    product = trust_region.fisher_vector_product(policy, phi)
    direction = jax.grad(surrogate)(phi)
    if natural:
        direction = trust_region.conjugate_gradient(
            lambda v: product(v) + damping * v, direction, 20 * NUM_PARAMS
        )
    new = policy(phi + trust_region.step_to_boundary(direction, product(direction), 1e-3))
    return new.mean(), new.stddev()


def moved_apart(**settings: Any) -> float:
    """How much a change of parameters changes the outcome, in units of the step itself."""
    obs, _, _, params, change = task()
    plain = policy_after_a_step(jnp.eye(NUM_PARAMS), **settings)
    changed = policy_after_a_step(change, **settings)
    old = gaussian(params, obs)
    apart = max(float(jnp.abs(a - b).max()) for a, b in zip(plain, changed, strict=True))
    return apart / float(jnp.abs(plain[0] - old.mean()).max())


def test_an_undamped_natural_step_does_not_depend_on_the_parameters() -> None:
    assert moved_apart(damping=0.0) < 1e-6


def test_damping_brings_the_dependence_back() -> None:
    assert moved_apart(damping=0.1) > 0.05


def test_the_plain_gradient_depends_on_the_parameters() -> None:
    assert moved_apart(damping=0.0, natural=False) > 0.05


def test_under_a_curved_change_of_parameters_only_short_steps_agree() -> None:
    # θ = sinh φ: both paths start in the same direction and bend apart. The distance between them
    # falls with the square of their length.
    obs, action, advantage, params, _ = task()

    def mean_after(length: float, curved: bool) -> jax.Array:
        def policy(phi: jax.Array) -> Any:
            return gaussian(jnp.sinh(phi) if curved else phi, obs)

        def surrogate(phi: jax.Array) -> jax.Array:
            return jnp.mean(policy(phi).log_prob(action) * advantage)

        phi = jnp.arcsinh(params) if curved else params
        product = trust_region.fisher_vector_product(policy, phi)
        step = trust_region.conjugate_gradient(product, jax.grad(surrogate)(phi), 20 * NUM_PARAMS)
        return policy(phi + length * step).mean()

    @jax.jit
    def apart(length: float) -> jax.Array:
        return jnp.abs(mean_after(length, True) - mean_after(length, False)).max() / length

    far, near = float(apart(1e-2)), float(apart(1e-4))
    assert far > 1e-4
    assert near < 0.02 * far


def test_no_step_of_the_same_length_gains_more() -> None:
    source = np.random.default_rng(5)
    root, gradient = source.normal(size=(4, 4)), source.normal(size=4)
    metric = root @ root.T

    def scaled(direction: np.ndarray) -> np.ndarray:
        image = jnp.asarray(metric @ direction)
        return np.asarray(trust_region.step_to_boundary(jnp.asarray(direction), image, 0.3))

    natural = scaled(np.linalg.solve(metric, gradient))
    assert natural @ metric @ natural == pytest.approx(2 * 0.3, rel=1e-12)
    best = gradient @ natural
    assert best == pytest.approx(np.sqrt(0.6 * gradient @ np.linalg.solve(metric, gradient)))
    others = [gradient @ scaled(x) for x in source.normal(size=(200, 4))]
    assert max(others) < best
    assert gradient @ scaled(gradient) < 0.9 * best


# --- the closed form of a tabular softmax policy -------------------------------------------------

STATES, CHOICES = 5, 3


@struct.dataclass
class Visited:
    """The policy in every state, its divergence weighted so that the mean is over d^π."""

    policy: Any
    visits: jax.Array  # [S] sums to 1

    def kl_divergence(self, other: "Visited") -> jax.Array:
        return STATES * self.visits * self.policy.kl_divergence(other.policy)


class Evaluation(NamedTuple):
    objective: jax.Array  # [] expected discounted return
    advantage: jax.Array  # [S, A]
    visits: jax.Array  # [S] d^π: how often the policy is in each state, discounted


def tabular(params: jax.Array) -> Any:
    return distributions.categorical(params.reshape(STATES, CHOICES))


def decision_process() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Transitions [S, A, S'], rewards [S, A] and start [S]."""
    generator = np.random.default_rng(1)
    moves = generator.dirichlet(np.ones(STATES), size=(STATES, CHOICES))
    reward = generator.normal(size=(STATES, CHOICES))
    return (
        jnp.asarray(moves),
        jnp.asarray(reward),
        jnp.asarray(generator.dirichlet(np.ones(STATES))),
    )


def evaluation(params: jax.Array) -> Evaluation:
    moves, reward, start = decision_process()
    probability = jax.nn.softmax(tabular(params).logits)
    onwards = jnp.eye(STATES) - GAMMA * jnp.einsum("sa,sat->st", probability, moves)
    value = jnp.linalg.solve(onwards, jnp.sum(probability * reward, axis=1))
    visits = (1.0 - GAMMA) * jnp.linalg.solve(onwards.T, start)
    return Evaluation(start @ value, reward + GAMMA * moves @ value - value[:, None], visits)


def fisher_at(params: jax.Array) -> trust_region.Matvec:
    visits = evaluation(params).visits
    return trust_region.fisher_vector_product(lambda p: Visited(tabular(p), visits), params)


@jax.jit
def natural_direction(params: jax.Array) -> jax.Array:
    gradient = jax.grad(lambda p: evaluation(p).objective)(params)
    return trust_region.conjugate_gradient(fisher_at(params), gradient, 4 * params.size)


def random_logits() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=STATES * CHOICES))


def test_the_natural_gradient_of_a_softmax_is_the_advantage() -> None:
    params = random_logits()
    rows = np.asarray(natural_direction(params).reshape(STATES, CHOICES))
    expected = np.asarray(evaluation(params).advantage) / (1.0 - GAMMA)
    # Up to a constant in each state, which does not change the policy; in the shortest solution,
    # each row sums to zero.
    np.testing.assert_allclose(rows.sum(axis=1), np.zeros(STATES), atol=1e-9)
    expected -= expected.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(rows, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_a_natural_step_multiplies_by_the_exponential_advantage(rate: float) -> None:
    # Agarwal et al. 2019, arXiv:1908.00261v5, lemma 5.1; for steps of any length.
    params = random_logits()
    new = tabular(params + rate * natural_direction(params))
    advantage = evaluation(params).advantage
    expected = jax.nn.softmax(tabular(params).logits) * jnp.exp(rate * advantage / (1.0 - GAMMA))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(new.logits), expected, rtol=1e-6, atol=1e-12)


def test_it_does_not_depend_on_how_often_the_states_are_visited() -> None:
    # The weights of the states enter the gradient and the Fisher information alike, and cancel.
    params = random_logits()
    visited = jnp.array([0, 0, 0, 1, 2, 3, 3, 4, 4, 4, 4])
    advantage = evaluation(params).advantage

    def policy(params: jax.Array) -> Any:
        return distributions.categorical(tabular(params).logits[visited])

    def surrogate(params: jax.Array) -> jax.Array:
        return distributions.expectation(policy(params), advantage[visited]).mean()

    @jax.jit
    def direction_at(params: jax.Array) -> jax.Array:
        product = trust_region.fisher_vector_product(policy, params)
        return trust_region.conjugate_gradient(product, jax.grad(surrogate)(params), 60)

    direction = direction_at(params)
    expected = advantage - advantage.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(direction.reshape(STATES, CHOICES), expected, rtol=1e-7, atol=1e-9)


# --- the trust region ----------------------------------------------------------------------------


def trust_region_step(params: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    before, product = evaluation(params), fisher_at(params)

    def evaluate(candidate: jax.Array) -> tuple[jax.Array, jax.Array]:
        new, old = tabular(candidate), tabular(params)
        surrogate = before.visits @ distributions.expectation(new, before.advantage)
        return surrogate, before.visits @ old.kl_divergence(new)

    gradient = jax.grad(lambda p: evaluate(p)[0])(params)
    direction = trust_region.conjugate_gradient(lambda v: product(v) + 1e-3 * v, gradient, 10)
    step = trust_region.step_to_boundary(direction, product(direction), 0.01)
    new_params, fraction = trust_region.line_search(evaluate, params, step, 0.01, 0.8, 10)
    return new_params, (before.objective, evaluate(new_params)[1], fraction)


def test_with_exact_advantages_the_return_rises_to_the_optimum() -> None:
    moves, reward, start = decision_process()
    value = jnp.zeros(STATES)
    for _ in range(200):
        value = jnp.max(reward + GAMMA * moves @ value, axis=1)
    optimum = float(start @ value)
    _, (objective, divergence, fraction) = jax.jit(
        lambda p: jax.lax.scan(trust_region_step, p, length=150)
    )(random_logits())
    assert np.all(np.diff(objective) >= -1e-12)
    assert float(objective[0]) < optimum - 0.5
    assert float(objective[-1]) == pytest.approx(optimum, abs=1e-3)
    assert float(divergence.max()) <= 0.01
    assert float(fraction[:10].min()) > 0.0
