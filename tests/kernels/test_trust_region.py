"""Fisher products, conjugate gradient, the step to the boundary and the line search."""

import doctest
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purejaxpg.kernels import distributions, trust_region

pytestmark = pytest.mark.fast

KINDS = ["categorical", "gaussian"]
PRECISIONS = [(True, 1e-9), (False, 1e-5)]
BATCH, OBS, HIDDEN, ACTIONS = 7, 3, 5, 3


@pytest.fixture(autouse=True)
def strict_shapes() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Problem(NamedTuple):
    params: jax.Array  # [P]
    obs: jax.Array  # [B, D]


LAYERS = {"w1": (OBS, HIDDEN), "b1": (1, HIDDEN), "w2": (HIDDEN, ACTIONS), "b2": (1, ACTIONS)}
NUM_PARAMS = {"categorical": 38, "gaussian": 41}


def policy(kind: str, params: jax.Array, obs: jax.Array) -> Any:
    """A small network; the Gaussian has one log_std for all states, the last three parameters."""
    layer, start = {}, 0
    for name, shape in LAYERS.items():
        layer[name] = params[start : start + math.prod(shape)].reshape(shape)
        start += math.prod(shape)
    output = jnp.tanh(obs @ layer["w1"] + layer["b1"]) @ layer["w2"] + layer["b2"]
    if kind == "categorical":
        return distributions.categorical(output)
    return distributions.diag_gaussian(output, 0.5 * params[start:])


def make_problem(kind: str, seed: int = 0) -> Problem:
    """Random parameters and states in the current precision."""
    generator = np.random.default_rng(seed)
    params, obs = generator.normal(size=NUM_PARAMS[kind]), generator.normal(size=(BATCH, OBS))
    return Problem(*(jnp.asarray(x, jnp.result_type(float)) for x in (params, obs)))


def product_at(kind: str, problem: Problem) -> trust_region.Matvec:
    return trust_region.fisher_vector_product(
        lambda p: policy(kind, p, problem.obs), problem.params
    )


@functools.partial(jax.jit, static_argnums=0)
def fisher_matrix(kind: str, problem: Problem) -> jax.Array:
    return jax.vmap(product_at(kind, problem), out_axes=1)(jnp.eye(problem.params.size))


@jax.jit
def softmax_fisher(logits: jax.Array) -> jax.Array:
    product = trust_region.fisher_vector_product(distributions.categorical, logits)
    return jax.vmap(product, out_axes=1)(jnp.eye(logits.size))


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_slopes(kind: str, problem: Problem) -> Any:
    def outputs(params: jax.Array) -> Any:
        distribution = policy(kind, params, problem.obs)
        if kind == "categorical":
            return distribution.logits
        return distribution.mean(), jnp.log(distribution.stddev())

    return outputs(problem.params), jax.jacrev(outputs)(problem.params)


def explicit_fisher(kind: str, problem: Problem) -> np.ndarray:
    """The matrix written out: a sum of outer products of scores, and the mean over the states."""
    value, slope = jax.tree.map(np.asarray, outputs_and_slopes(kind, problem))
    fisher = np.zeros((problem.params.size,) * 2)
    for s in range(BATCH):
        for a in range(ACTIONS):
            if kind == "categorical":
                fisher += np.exp(value[s, a]) * np.outer(slope[s, a], slope[s, a])
                continue
            # For one component, E[score²] is 1 / σ² for the mean and 2 for log σ.
            fisher += np.outer(slope[0][s, a], slope[0][s, a]) * np.exp(-2.0 * value[1][s, a])
            fisher += 2.0 * np.outer(slope[1][s, a], slope[1][s, a])
    return fisher / BATCH


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("x64", "tolerance"), PRECISIONS)
def test_the_product_is_that_of_the_explicit_matrix(kind: str, x64: bool, tolerance: float) -> None:
    with jax.enable_x64(x64):
        problem = make_problem(kind)
        fisher = explicit_fisher(kind, problem)
        actual = np.asarray(fisher_matrix(kind, problem))
        assert actual.dtype == (np.float64 if x64 else np.float32)
    np.testing.assert_allclose(actual, fisher, rtol=0.0, atol=tolerance * np.abs(fisher).max())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_curvature_of_the_divergence_in_both_directions(kind: str, double: None) -> None:
    problem = make_problem(kind)
    old = policy(kind, problem.params, problem.obs)

    def forward(params: jax.Array) -> jax.Array:
        return old.kl_divergence(policy(kind, params, problem.obs)).mean()

    def backward(params: jax.Array) -> jax.Array:
        return policy(kind, params, problem.obs).kl_divergence(old).mean()

    actual = np.asarray(fisher_matrix(kind, problem))
    for divergence in (forward, backward):
        curvature = jax.jit(jax.hessian(divergence))(problem.params)
        np.testing.assert_allclose(actual, curvature, rtol=0.0, atol=1e-9)
    # The functions are not the same: away from the old policy the directions differ.
    away = problem.params + 0.3
    assert abs(float(forward(away) / backward(away)) - 1.0) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_symmetric_and_positive_semidefinite(kind: str, double: None) -> None:
    problem = make_problem(kind, seed=1)
    actual = np.asarray(fisher_matrix(kind, problem))
    np.testing.assert_allclose(actual, actual.T, rtol=0.0, atol=1e-12)
    assert np.linalg.eigvalsh(actual).min() > -1e-12
    assert np.linalg.eigvalsh(actual).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_with_both_sides_moving_there_is_nothing_left(kind: str, double: None) -> None:
    problem = make_problem(kind)

    def divergence(params: jax.Array) -> jax.Array:
        both = policy(kind, params, problem.obs)
        return both.kl_divergence(both).mean()

    naive = jax.jit(jax.hessian(divergence))(problem.params)
    np.testing.assert_allclose(naive, np.zeros(naive.shape), atol=1e-12)
    assert float(jnp.max(jnp.abs(fisher_matrix(kind, problem)))) > 0.1


def test_fisher_of_a_softmax_by_hand() -> None:
    logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    # F = diag(p) - p p^T
    expected = [[4 / 16, -2 / 16, -2 / 16], [-2 / 16, 3 / 16, -1 / 16], [-2 / 16, -1 / 16, 3 / 16]]
    np.testing.assert_allclose(softmax_fisher(logits), expected, atol=1e-7)


def test_fisher_of_a_gaussian_by_hand() -> None:
    def six_states(params: jax.Array) -> Any:
        return distributions.diag_gaussian(jnp.tile(params[:1], (6, 1)), params[1:])

    # One component in six states: 1 / sigma^2 = 1/4 for the mean, 2 for log sigma, once and not
    # six times or a sixth, although six states share it.
    params = jnp.array([3.0, np.log(2.0)])
    matrix = jax.jit(
        lambda p: jax.vmap(trust_region.fisher_vector_product(six_states, p))(jnp.eye(2))
    )
    np.testing.assert_allclose(matrix(params), [[0.25, 0.0], [0.0, 2.0]], atol=1e-6)


def test_more_leading_axes_are_more_states(double: None) -> None:
    problem = make_problem("categorical")

    def boxed(params: jax.Array) -> Any:
        flat = policy("categorical", params, problem.obs)
        return jax.tree.map(lambda x: x.reshape(1, BATCH, 1, ACTIONS), flat)

    @jax.jit
    def product(params: jax.Array) -> jax.Array:
        return trust_region.fisher_vector_product(boxed, params)(jnp.ones_like(params))

    expected = explicit_fisher("categorical", problem).sum(axis=1)
    np.testing.assert_allclose(product(problem.params), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nothing", [-1e9, -np.inf])
def test_an_impossible_action_adds_nothing(nothing: float) -> None:
    possible = jnp.array([0.3, -0.7, 1.1])

    def masked(params: jax.Array) -> Any:
        return distributions.categorical(jnp.concatenate([params, jnp.array([nothing])]))

    @jax.jit
    def matrix(params: jax.Array) -> jax.Array:
        return jax.vmap(trust_region.fisher_vector_product(masked, params))(jnp.eye(3))

    np.testing.assert_allclose(matrix(possible), softmax_fisher(possible), atol=1e-7)


def test_the_network_is_evaluated_once_for_all_products() -> None:
    problem = make_problem("categorical")

    def solve(params: jax.Array) -> jax.Array:
        product = product_at("categorical", problem._replace(params=params))
        return trust_region.conjugate_gradient(product, jnp.ones_like(params), 10)

    assert str(jax.make_jaxpr(solve)(problem.params)).count("tanh") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_products_under_jit_vmap_and_scan(kind: str, double: None) -> None:
    problems = [make_problem(kind, seed) for seed in range(3)]

    def thrice(problem: Problem) -> jax.Array:
        product, start = product_at(kind, problem), jnp.ones_like(problem.params)
        return jax.lax.scan(lambda v, _: (product(v), None), start, length=3)[0]

    together = jax.jit(jax.vmap(thrice))(jax.tree.map(lambda *x: jnp.stack(x), *problems))
    for row, problem in zip(together, problems, strict=True):
        fisher = explicit_fisher(kind, problem)
        expected = np.linalg.matrix_power(fisher, 3) @ np.ones(len(fisher))
        np.testing.assert_allclose(row, expected, rtol=1e-9, atol=1e-9)


def test_a_distribution_that_hides_its_parameters_is_an_error(double: None) -> None:
    problem = make_problem("gaussian")

    def multivariate(params: jax.Array) -> Any:
        gaussian = policy("gaussian", params, problem.obs)
        return distrax.MultivariateNormalDiag(gaussian.mean(), gaussian.stddev())

    @jax.jit
    def product(params: jax.Array) -> jax.Array:
        return trust_region.fisher_vector_product(multivariate, params)(jnp.ones_like(params))

    with pytest.raises(jax.errors.UnexpectedTracerError):
        product(problem.params)


def test_parameters_must_be_a_vector() -> None:
    with pytest.raises(AssertionError, match="rank"):
        trust_region.fisher_vector_product(distributions.categorical, jnp.zeros((2, 3)))


# --- conjugate gradient --------------------------------------------------------------------------


def definite(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    root, b = generator.normal(size=(size, size)), generator.normal(size=size)
    return root @ root.T + 0.5 * np.eye(size), b


@functools.partial(jax.jit, static_argnums=2)
def compiled_solve(matrix: jax.Array, b: jax.Array, iterations: int) -> jax.Array:
    return trust_region.conjugate_gradient(lambda v: matrix @ v, b, iterations)


def solve(matrix: Any, b: Any, iterations: int) -> np.ndarray:
    return np.asarray(compiled_solve(jnp.asarray(matrix), jnp.asarray(b), iterations))


def loop_conjugate_gradient(matrix: np.ndarray, b: np.ndarray, iterations: int) -> np.ndarray:
    """Minimise over the span of b, A b, ... directly, without a recursion."""
    basis = np.linalg.qr(
        np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(iterations)], axis=1)
    )[0]
    return basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_iterates_are_the_minimisers_over_the_krylov_spaces(iterations: int, double: None) -> None:
    matrix, b = definite(6)
    expected = loop_conjugate_gradient(matrix, b, iterations)
    np.testing.assert_allclose(solve(matrix, b, iterations), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("iterations", [1, 3, 6])
def test_iterates_are_those_of_jax_scipy(iterations: int, double: None) -> None:
    matrix, b = definite(8, seed=1)
    peer, _ = jax.scipy.sparse.linalg.cg(
        lambda v: jnp.asarray(matrix) @ v, jnp.asarray(b), tol=0.0, maxiter=iterations
    )
    np.testing.assert_allclose(solve(matrix, b, iterations), peer, rtol=1e-10, atol=1e-12)


def test_conjugate_gradient_by_hand() -> None:
    # A = diag(1, 3), b = (1, 1): the first length is b.b / b.A b = 2/4, so x_1 = (1/2, 1/2); the
    # residual (1/2, -1/2) is as orthogonal to b as it can be, and x_2 = (1, 1/3).
    matrix = [[1.0, 0.0], [0.0, 3.0]]
    assert solve(matrix, [1.0, 1.0], 1).tolist() == [0.5, 0.5]
    np.testing.assert_allclose(solve(matrix, [1.0, 1.0], 2), [1.0, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_as_many_iterations_as_unknowns_solve_it(size: int, double: None) -> None:
    matrix, b = definite(size, seed=size)
    np.testing.assert_allclose(solve(matrix, b, size), np.linalg.solve(matrix, b), rtol=1e-6)


def test_as_many_iterations_as_distinct_eigenvalues_solve_it(double: None) -> None:
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(9, 9)))[0]
    matrix = rotation @ np.diag([1.0] * 4 + [5.0] * 5) @ rotation.T
    b = np.arange(9.0)
    expected = np.linalg.solve(matrix, b)
    np.testing.assert_allclose(solve(matrix, b, 2), expected, rtol=1e-9, atol=1e-9)
    assert np.abs(solve(matrix, b, 1) - expected).max() > 0.1


def test_the_error_never_rises(double: None) -> None:
    matrix, b = definite(8, seed=3)
    exact = np.linalg.solve(matrix, b)
    errors = [solve(matrix, b, k) - exact for k in range(1, 8)]
    energy = np.array([exact @ matrix @ exact] + [e @ matrix @ e for e in errors])
    assert np.all(np.diff(energy) < 0.0)


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_zero_gives_zero(x64: bool, damping: float) -> None:
    with jax.enable_x64(x64):
        singular = jnp.zeros((3, 3)).at[0, 0].set(1.0) + damping * jnp.eye(3)
        with jax.debug_nans(True):
            actual = solve(singular, np.zeros(3), 10)
    assert actual.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_iterations_after_the_end_change_nothing(x64: bool, scale: float) -> None:
    matrix, b = definite(4, seed=4)
    with jax.enable_x64(x64), jax.debug_nans(True):
        b = np.asarray(jnp.asarray(scale * b))
        enough, many = solve(matrix, b, 20), solve(matrix, b, 500)
    np.testing.assert_array_equal(enough, many)
    exact = np.linalg.solve(matrix, b.astype(np.float64))
    tolerance = 1e-9 if x64 else 1e-3
    np.testing.assert_allclose(many, exact, rtol=0.0, atol=tolerance * np.abs(exact).max())


@pytest.mark.parametrize(
    ("diagonal", "b", "expected"),
    [
        ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]),
        # One step of length 2, after which the direction is (0, 2), without curvature.
        ([1.0, 0.0], [1.0, 1.0], [2.0, 2.0]),
        ([-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]),
    ],
)
def test_a_direction_without_curvature_ends_it(
    diagonal: list[float], b: list[float], expected: list[float]
) -> None:
    assert solve(np.diag(diagonal), b, 10).tolist() == expected


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(broken: float) -> None:
    assert not np.all(np.isfinite(solve(np.eye(2), [1.0, broken], 3)))
    assert not np.all(np.isfinite(solve(np.diag([1.0, broken]), [1.0, 1.0], 3)))


@functools.partial(jax.jit, static_argnums=3)
def softmax_direction(
    logits: jax.Array, gradient: jax.Array, damping: float, iterations: int
) -> jax.Array:
    product = trust_region.fisher_vector_product(distributions.categorical, logits)
    return trust_region.conjugate_gradient(lambda v: product(v) + damping * v, gradient, iterations)


@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-9), (False, 1e-4)])
def test_damping_makes_the_singular_fisher_of_a_softmax_solvable(
    x64: bool, tolerance: float
) -> None:
    with jax.enable_x64(x64):
        logits = jnp.asarray([0.3, -1.2, 0.8, 0.1])
        gradient = jnp.asarray([1.0, -0.5, 2.0, 0.25])
        x = softmax_direction(logits, gradient, 0.1, 4)
        fisher = np.asarray(softmax_fisher(logits), np.float64)
    assert np.linalg.eigvalsh(fisher)[0] == pytest.approx(0.0, abs=1e-7)
    expected = np.linalg.solve(fisher + 0.1 * np.eye(4), np.asarray(gradient, np.float64))
    np.testing.assert_allclose(x, expected, rtol=tolerance, atol=tolerance)


def test_without_damping_a_gradient_in_the_range_gives_the_shortest_solution(double: None) -> None:
    logits = jnp.asarray([0.3, -1.2, 0.8, 0.1])
    fisher = np.asarray(softmax_fisher(logits))
    inside = fisher @ np.array([1.0, -0.5, 2.0, 0.25])
    x = softmax_direction(logits, jnp.asarray(inside), 0.0, 4)
    np.testing.assert_allclose(x, np.linalg.pinv(fisher, rcond=1e-9) @ inside, rtol=1e-9)


@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1e-9), (False, 1e-4)])
def test_rounding_in_the_null_space_is_not_followed(x64: bool, tolerance: float) -> None:
    # Rounding leaves a trace of the null direction in the residual. Its curvature is about zero, so
    # the step along it would be arbitrarily long.
    generator = np.random.default_rng(8)
    with jax.enable_x64(x64):
        logits = jnp.asarray(generator.normal(size=(200, 4)))
        fishers = jax.vmap(softmax_fisher)(logits)
        inside = jnp.sum(fishers * jnp.asarray(generator.normal(size=(200, 1, 4))), axis=-1)
        x = jax.vmap(lambda y, g: softmax_direction(y, g, 0.0, 200))(logits, inside)
    for fisher, b, solution in zip(*map(np.asarray, (fishers, inside, x)), strict=True):
        assert np.linalg.norm(fisher @ solution - b) < tolerance * np.linalg.norm(b)


def test_members_of_a_batch_end_on_their_own(double: None) -> None:
    matrices = jnp.stack([jnp.asarray(definite(5, seed)[0]) for seed in range(4)])
    matrices = matrices.at[2].set(jnp.eye(5))
    b = jnp.stack([jnp.asarray(definite(5, seed)[1]) for seed in range(4)]).at[1].set(0.0)

    def one(matrix: jax.Array, b: jax.Array) -> jax.Array:
        return trust_region.conjugate_gradient(lambda v: matrix @ v, b, 12)

    together = np.asarray(jax.jit(jax.vmap(one))(matrices, b))
    assert together[1].tolist() == [0.0] * 5
    assert together[2].tolist() == b[2].tolist()
    for row, matrix, side in zip(together, matrices, b, strict=True):
        np.testing.assert_allclose(row, np.linalg.solve(matrix, side), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("iterations", [0, -1])
def test_no_iterations_are_refused(iterations: int) -> None:
    with pytest.raises(ValueError, match=f"iterations is {iterations};"):
        solve(np.eye(2), np.ones(2), iterations)


# --- the step to the boundary --------------------------------------------------------------------


def test_step_to_boundary_by_hand() -> None:
    # F = diag(2, 1), x = (1, 2): x^T F x = 6, so for delta = 3/4 the factor is 1/2.
    step = trust_region.step_to_boundary(jnp.array([1.0, 2.0]), jnp.array([2.0, 2.0]), 0.75)
    np.testing.assert_allclose(step, [0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("max_kl", [1e-6, 0.01, 3.0])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_the_model_is_at_the_bound_for_any_length_of_the_direction(
    max_kl: float, scale: float
) -> None:
    fisher, direction = (jnp.asarray(a) for a in definite(6, seed=5))
    direction = scale * direction
    step = trust_region.step_to_boundary(direction, fisher @ direction, max_kl)
    assert float(0.5 * step @ fisher @ step) == pytest.approx(max_kl, rel=1e-4)
    assert float(step @ direction) > 0.0


def test_a_direction_near_the_smallest_number_does_not_overflow() -> None:
    direction = jnp.array([1.2e-19])
    step = trust_region.step_to_boundary(direction, direction, 3.0)
    assert float(step[0]) == pytest.approx(np.sqrt(6.0), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_approaches_its_model(kind: str, double: None) -> None:
    problem = make_problem(kind, seed=2)
    direction = jnp.asarray(np.random.default_rng(6).normal(size=problem.params.size))

    @jax.jit
    def excess(max_kl: float) -> jax.Array:
        fisher_direction = product_at(kind, problem)(direction)
        step = trust_region.step_to_boundary(direction, fisher_direction, max_kl)
        old, new = (policy(kind, p, problem.obs) for p in (problem.params, problem.params + step))
        return jnp.abs(old.kl_divergence(new).mean() / max_kl - 1.0)

    excesses = np.array([float(excess(max_kl)) for max_kl in (1e-1, 1e-3, 1e-5, 1e-7)])
    # The cubic term scales with the root of the bound: a hundredth of the bound leaves a tenth.
    assert np.all(excesses[1:] < 0.3 * excesses[:-1])
    assert excesses[-1] < 1e-3


def test_damping_in_the_curvature_makes_the_step_too_short(double: None) -> None:
    fisher, direction = (jnp.asarray(a) for a in definite(6, seed=5))
    damped = fisher @ direction + 0.1 * direction
    step = trust_region.step_to_boundary(direction, damped, 0.01)
    assert float(0.5 * step @ fisher @ step) < 0.0099


@pytest.mark.parametrize(
    ("direction", "fisher_direction"),
    [
        ([0.0, 0.0], [0.0, 0.0]),
        ([1.0, 1.0], [0.0, 0.0]),
        ([1.0, 1.0], [-1.0, 0.0]),
        ([np.nan, 1.0], [1.0, 1.0]),
        ([1.0, 1.0], [np.inf, 1.0]),
        ([np.inf, 0.0], [np.inf, 0.0]),
    ],
)
def test_without_curvature_there_is_no_step(
    direction: list[float], fisher_direction: list[float]
) -> None:
    step = trust_region.step_to_boundary(jnp.array(direction), jnp.array(fisher_direction), 0.01)
    assert step.tolist() == [0.0, 0.0]


def test_a_zero_direction_has_a_zero_step_under_debug_nans() -> None:
    with jax.debug_nans(True):
        step = trust_region.step_to_boundary(jnp.zeros(3), jnp.zeros(3), 0.01)
    assert step.tolist() == [0.0] * 3


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(AssertionError, match="shape"):
        trust_region.step_to_boundary(jnp.ones(3), jnp.ones(1), 0.01)
    with pytest.raises(AssertionError, match="shape"):
        trust_region.line_search(lambda x: (x[0], x[0]), jnp.ones(3), jnp.ones(1), 0.1, 0.5, 3)


# --- the line search -----------------------------------------------------------------------------

OLD = np.array([0.1, -1.7, 3.3], np.float32)
STEP = np.array([1.0, -2.0, 2.0], np.float32)


def distance(params: jax.Array) -> jax.Array:
    """A divergence of 9/2 for the full step, and c² times that for a fraction c."""
    return 0.5 * jnp.sum(jnp.square(params - jnp.asarray(OLD)))


def search(
    evaluate: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    max_kl: Any = 4.6,
    shrink: Any = 0.5,
    max_backtracks: int = 10,
    scale: float = 1.0,
) -> tuple[np.ndarray, float]:
    params, fraction = jax.jit(
        lambda params, step: trust_region.line_search(
            evaluate, params, step, max_kl, shrink, max_backtracks
        )
    )(jnp.asarray(OLD), scale * jnp.asarray(STEP))
    assert params.dtype == fraction.dtype == jnp.float32
    assert fraction.shape == ()
    return np.asarray(params), float(fraction)


def uphill(params: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum((params - jnp.asarray(OLD)) * jnp.asarray(STEP)), distance(params)


def rising_towards(peak: float) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A surrogate with its maximum at a fraction `peak` of the step, and its initial value at 2."""

    def evaluate(params: jax.Array) -> tuple[jax.Array, jax.Array]:
        fraction = jnp.sum((params - jnp.asarray(OLD)) * jnp.asarray(STEP)) / 9.0
        return -jnp.square(fraction - peak), jnp.float32(0.0)

    return evaluate


def test_a_good_step_is_taken_whole() -> None:
    params, fraction = search(uphill)
    assert fraction == 1.0
    np.testing.assert_allclose(params, OLD + STEP, rtol=1e-6)


@pytest.mark.parametrize("shrink", [0.1, 0.5, 0.8])
def test_a_step_a_hundred_times_too_long_is_shortened(shrink: float) -> None:
    backtracks = int(np.ceil(np.log(0.01) / np.log(shrink) - 1e-6))
    params, fraction = search(uphill, shrink=shrink, max_backtracks=30, scale=100.0)
    assert fraction == pytest.approx(shrink**backtracks, rel=1e-5)
    assert float(distance(jnp.asarray(params))) <= 4.6
    np.testing.assert_allclose(params, OLD + fraction * 100.0 * STEP, rtol=1e-5)
    _, one_less = search(uphill, shrink=shrink, max_backtracks=backtracks - 1, scale=100.0)
    assert one_less == 0.0


@pytest.mark.parametrize(("peak", "expected"), [(0.6, 1.0), (0.4, 0.5), (0.1, 0.125)])
def test_a_step_beyond_the_peak_is_shortened(peak: float, expected: float) -> None:
    assert search(rising_towards(peak))[1] == expected


def test_both_conditions_have_to_hold_for_one_candidate() -> None:
    def evaluate(params: jax.Array) -> tuple[jax.Array, jax.Array]:
        fraction = jnp.sum((params - jnp.asarray(OLD)) * jnp.asarray(STEP)) / 9.0
        # 1: improves, too far. 1/2: near enough, no improvement. 1/4: both.
        near = jnp.where(fraction > 0.4, jnp.where(fraction > 0.9, 1.0, -1.0), fraction)
        return near, fraction

    assert search(evaluate, max_kl=0.6)[1] == 0.25


NOTHING = {
    "worse": lambda p: (-distance(p), 0.0 * distance(p)),
    "equal": lambda p: (0.0 * distance(p), 0.0 * distance(p)),
    "nan surrogate": lambda p: (jnp.where(distance(p) > 0.0, jnp.nan, 0.0), 0.0 * distance(p)),
    "infinite surrogate": lambda p: (jnp.where(distance(p) > 0.0, jnp.inf, 0.0), 0.0 * distance(p)),
    "nan old surrogate": lambda p: (jnp.where(distance(p) > 0.0, 1.0, jnp.nan), 0.0 * distance(p)),
    "nan divergence": lambda p: (distance(p), jnp.nan * distance(p)),
    "infinite divergence": lambda p: (distance(p), jnp.inf + distance(p)),
    "too far": lambda p: (distance(p), 5.0 + distance(p)),
}


@pytest.mark.parametrize("evaluate", NOTHING.values(), ids=NOTHING)
def test_without_a_candidate_that_passes_not_a_bit_changes(evaluate: Any) -> None:
    params, fraction = search(evaluate)
    assert fraction == 0.0
    assert params.tobytes() == OLD.tobytes()


def test_a_broken_step_is_not_taken() -> None:
    params, fraction = search(uphill, scale=np.nan)
    assert fraction == 0.0
    assert params.tobytes() == OLD.tobytes()


def test_a_candidate_that_is_not_a_number_is_passed_over() -> None:
    def evaluate(params: jax.Array) -> tuple[jax.Array, jax.Array]:
        surrogate, kl = uphill(params)
        return jnp.where(kl > 4.0, jnp.nan, surrogate), kl

    assert search(evaluate)[1] == 0.5


def test_the_bound_itself_is_inside() -> None:
    def evaluate(params: jax.Array) -> tuple[jax.Array, jax.Array]:
        return uphill(params)[0], jnp.float32(0.25)

    assert search(evaluate, max_kl=0.25)[1] == 1.0
    assert search(evaluate, max_kl=np.nextafter(np.float32(0.25), np.float32(0.0)))[1] == 0.0


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1.0), (100.0, 0.0)])
def test_no_backtracks_try_the_full_step_only(scale: float, expected: float) -> None:
    assert search(uphill, max_backtracks=0, scale=scale)[1] == expected


def test_a_negative_number_of_backtracks_is_refused() -> None:
    with pytest.raises(ValueError, match="max_backtracks is -1;"):
        search(uphill, max_backtracks=-1)


@pytest.mark.parametrize(("scale", "candidates"), [(1.0, 1), (3.0, 3), (1e6, 11)])
def test_evaluations_stop_at_the_first_that_passes(scale: float, candidates: int) -> None:
    calls: list[int] = []

    def counted(params: jax.Array) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda: calls.append(1))
        return uphill(params)

    search(counted, scale=scale)
    jax.effects_barrier()
    assert len(calls) == candidates + 1, "one more for the old parameters"


def loop_line_search(
    evaluate: Callable[[np.ndarray], tuple[float, float]],
    params: np.ndarray,
    step: np.ndarray,
    max_kl: float,
    shrink: float,
    max_backtracks: int,
) -> float:
    old_surrogate, _ = evaluate(params)
    for backtracks in range(max_backtracks + 1):
        surrogate, kl = evaluate(params + shrink**backtracks * step)
        if kl <= max_kl and surrogate > old_surrogate:
            return shrink**backtracks
    return 0.0


def test_random_policies_end_inside_and_better_or_where_they_were(double: None) -> None:
    problem = make_problem("categorical")
    old = policy("categorical", problem.params, problem.obs)
    action = jnp.arange(BATCH) % ACTIONS

    def evaluate(params: jax.Array, advantage: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = policy("categorical", params, problem.obs)
        ratio = jnp.exp(new.log_prob(action) - old.log_prob(action))
        return jnp.mean(ratio * advantage), old.kl_divergence(new).mean()

    def one(advantage: jax.Array, step: jax.Array) -> Any:
        return trust_region.line_search(
            lambda p: evaluate(p, advantage), problem.params, step, 0.02, 0.6, 6
        )

    generator = np.random.default_rng(7)
    advantages = generator.normal(size=(100, BATCH))
    steps = generator.normal(size=(100, problem.params.size)) * generator.lognormal(-2, 2, (100, 1))
    params, fractions = jax.jit(jax.vmap(one))(advantages, steps)
    before = jax.vmap(lambda a: evaluate(problem.params, a)[0])(advantages)
    surrogate, kl = jax.vmap(evaluate)(params, advantages)
    taken = np.asarray(fractions) > 0.0
    assert 10 < taken.sum() < 90
    assert len(np.unique(fractions)) > 4
    assert np.all(np.asarray(kl)[taken] <= 0.02)
    assert np.all(np.asarray(surrogate > before)[taken])
    np.testing.assert_array_equal(params[~taken], np.tile(problem.params, (sum(~taken), 1)))
    compiled = jax.jit(evaluate)
    for i in range(100):
        expected = loop_line_search(
            lambda p, i=i: compiled(p, advantages[i]),
            np.asarray(problem.params),
            steps[i],
            0.02,
            0.6,
            6,
        )
        assert float(fractions[i]) == pytest.approx(expected, rel=1e-12)


def test_members_of_a_batch_stop_shrinking_on_their_own() -> None:
    # Backtracks needed: 0, 1, 3, 7 and more than allowed; and one whose step is not finite.
    scales = jnp.array([1.0, 2.0, 8.0, 100.0, 1e6, jnp.nan])

    def one(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        return trust_region.line_search(
            uphill, jnp.asarray(OLD), scale * jnp.asarray(STEP), 4.6, 0.5, 10
        )

    alone = [jax.jit(one)(scale) for scale in scales]
    params, fractions = jax.jit(jax.vmap(one))(scales)
    assert fractions.tolist() == [1.0, 0.5, 0.125, 2.0**-7, 0.0, 0.0]
    for i, (own_params, own_fraction) in enumerate(alone):
        assert np.asarray(params[i]).tobytes() == np.asarray(own_params).tobytes()
        assert float(fractions[i]) == float(own_fraction)


def test_bound_and_factor_may_be_traced() -> None:
    def one(max_kl: jax.Array, shrink: jax.Array) -> jax.Array:
        return trust_region.line_search(
            uphill, jnp.asarray(OLD), jnp.asarray(STEP), max_kl, shrink, 10
        )[1]

    fractions = jax.jit(jax.vmap(one))(jnp.array([4.6, 4.0, 0.2]), jnp.array([0.5, 0.5, 0.25]))
    assert fractions.tolist() == [1.0, 0.5, 0.0625]


def test_examples() -> None:
    results = doctest.testmod(trust_region)
    assert results.attempted >= 6
    assert results.failed == 0
