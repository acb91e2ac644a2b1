"""Natural-gradient steps and the trust region around a policy, on flat parameter vectors [P].

The metric is the Fisher information F of the policy, averaged over a batch of states. It is never
formed: everything here needs only its products with vectors. A step is built from

    F v                   fisher_vector_product
    x ≈ (F + λI)⁻¹ g      conjugate_gradient
    β x                   step_to_boundary, which makes the step of a natural gradient
    θ + c β x, c ≤ 1      line_search, which makes it a trust-region step

`jax.flatten_util.ravel_pytree` turns a tree of parameters into a vector and back.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

# A residual of conjugate gradient counts as zero below this many roundings of b. A smaller one is
# mostly rounding, and its part in the null space of A is amplified without bound. For 2000 random
# softmax Fisher matrices (4 actions, one state, no damping, float32, 200 iterations), 99 of 100
# final relative residuals were below 5e-3, 2e-4 and 1e-5 with 1, 10 and 100 roundings.
_ROUNDINGS = 100.0

Matvec = Callable[[jax.Array], jax.Array]
Search = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def fisher_vector_product(policy: Callable[[jax.Array], Any], params: jax.Array) -> Matvec:
    """Product of the policy's Fisher information with vectors, without forming the matrix.

        F = E_s[Σ_a π(a|s) ∇log π(a|s) ∇log π(a|s)ᵀ] = ∇² E_s[KL(π_old ‖ π_θ)] at θ = old
        F v = Jᵀ M J v

    J is the derivative of the policy's outputs (log probabilities, or mean and σ) with respect to
    the parameters, and M the curvature of the mean divergence with respect to those outputs. Second
    derivatives of the network would be multiplied by the slope of the divergence, which is zero
    where the two policies agree. So this is the whole Hessian, not an approximation.

    One side of the divergence must be data. If both sides move, KL(π_θ ‖ π_θ) is zero for all θ,
    and so is every product. It does not matter which side is the data at θ = old; away from there,
    as in a line search, the two directions differ.

    Network, distribution and divergence are linearised here, once; each product only applies the
    three linear maps. Call this outside the loop that uses the result. F is singular for a softmax,
    whose logits may all be shifted by a constant: the caller adds damping, + λ v.

    Args:
        policy: maps parameters [P] to the distrax distribution of a batch of states, whose
            `kl_divergence` may have any shape, in nats. Not one that distrax builds from bijectors,
            as `MultivariateNormalDiag`: it hides its parameters from jax.
        params: [P] θ_old, the parameters at which F is evaluated.

    Returns:
        A linear function from v [P] to F v [P]. F is symmetric and positive semi-definite. The
        function works in any loop, and under `jit` and `vmap`.

    Not for differentiation with respect to `params`: treat F v as data.

    References:
        Schulman et al. 2015, arXiv:1502.05477, appendix C.1, eq. 57. F averages over all actions
        exactly, as in section 6, and not over the sampled ones.

    >>> from purejaxpg.kernels import distributions
    >>> product = fisher_vector_product(distributions.categorical, jnp.zeros(2))
    >>> product(jnp.array([1.0, 0.0])).tolist(), product(jnp.ones(2)).tolist()
    ([0.25, -0.25], [0.0, 0.0])
    """
    chex.assert_rank(params, 1)
    old, push = jax.linearize(policy, params)
    # `old` is a value, not a function of the parameters, so that side is data.
    slope = jax.grad(lambda new: jnp.mean(old.kl_divergence(new)))
    _, curve = jax.linearize(slope, old)
    pull = jax.linear_transpose(push, params)

    def product(vector: jax.Array) -> jax.Array:
        (image,) = pull(curve(push(vector)))
        return image

    return product


def conjugate_gradient(matvec: Matvec, b: jax.Array, iterations: int) -> jax.Array:
    """Solve A x = b approximately, given products with a symmetric positive definite A.

        x_k = the minimiser of ½ xᵀA x − bᵀx over span{b, A b, ..., A^{k−1} b}

    The number of iterations is fixed, so that the loop can be compiled and batched. The method
    often converges sooner, and would then divide 0 by 0. So x stays as it is once the residual has
    fallen to 1e-5 of b in float32 (2e-14 in float64), or a direction has no curvature left. The
    second happens if A is singular. If b also lies outside the range of A, there is no solution to
    approach, and more iterations make x worse: add damping.

    Args:
        matvec: v [P] -> A v [P]. Damping is part of it: `lambda v: product(v) + cg_damping * v`.
        b: [P] right-hand side.
        iterations: number of products, static, at least 1; 10 is usual. In exact arithmetic, one
            per distinct eigenvalue of A gives the solution.

    Returns:
        [P] x, exactly zero for b = 0. The error ‖x_k − x‖_A never rises with k. If `b` or a product
        has an entry that is not finite, so has x.

    Raises:
        ValueError: `iterations` is less than 1.

    Linear in b only once it has converged. Not for differentiation: treat x as data.

    References:
        Hestenes and Stiefel 1952, Methods of conjugate gradients for solving linear systems;
        Schulman et al. 2015, arXiv:1502.05477, appendix C, for this use of it.

    >>> matrix = jnp.array([[4.0, 2.0], [2.0, 4.0]])
    >>> conjugate_gradient(lambda v: matrix @ v, jnp.array([6.0, 6.0]), 2).tolist()
    [1.0, 1.0]
    """
    chex.assert_rank(b, 1)
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; conjugate gradient needs at least 1")
    precision = jnp.finfo(b.dtype)
    start = jnp.zeros_like(b), b, b, _inner(b, b)
    # The bound is finite even if b is not, so an infinite residual never counts as small.
    enough = jnp.minimum(start[-1] * (_ROUNDINGS * precision.eps) ** 2, precision.max)

    def iterate(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, residual, direction, square = state
        image = matvec(direction)
        curvature = _inner(direction, image)
        # A comparison with NaN is false, so NaN never ends the iteration and spreads to x.
        ended = (square <= enough) | (curvature <= 0.0)
        length = square / jnp.where(ended, 1.0, curvature)
        shorter = residual - length * image
        new_square = _inner(shorter, shorter)
        new_direction = shorter + new_square / jnp.where(ended, 1.0, square) * direction
        new_state = x + length * direction, shorter, new_direction, new_square
        return tuple(jnp.where(ended, a, z) for a, z in zip(state, new_state, strict=True))

    return jax.lax.fori_loop(0, iterations, iterate, start)[0]


def step_to_boundary(
    direction: jax.Array, fisher_direction: jax.Array, max_kl: jax.Array | float
) -> jax.Array:
    """Scale a direction so that the quadratic model of the divergence reaches its bound.

        step = β x,      β = √(2 δ / xᵀF x),      so that ½ stepᵀF step = δ

    The divergence itself agrees with the model only as δ goes to zero. If F vanishes, as for a
    policy almost certain of its action, the step grows without bound and the divergence exceeds δ
    by far; a line search prevents that. Without one, pass (F + λI) x: the step is shorter, by a
    factor that depends on the scale of the parameters, and at most √(2 δ / λ) long.

    Args:
        direction: [P] x, uphill; its length does not matter.
        fisher_direction: [P] F x, one more product with the undamped F, or with the damped one.
        max_kl: scalar δ, positive, in nats per state; 0.01 is usual.

    Returns:
        [P] step, to be *added* to the parameters. It is zero if xᵀF x is not a positive finite
        number: for a zero direction, one that changes no distribution, or one that is not finite.

    Not for differentiation: treat the step as data.

    References:
        Schulman et al. 2015, arXiv:1502.05477, appendix C.

    >>> step_to_boundary(jnp.array([3.0, 0.0]), jnp.array([6.0, 0.0]), 0.25).tolist()
    [0.5, 0.0]
    """
    chex.assert_equal_shape([direction, fisher_direction])
    curvature = _inner(direction, fisher_direction)
    usable = (curvature > 0.0) & jnp.isfinite(curvature)
    # Two roots, because the quotient under one root overflows for a short direction.
    scale = jnp.sqrt(2.0 * max_kl) / jnp.sqrt(jnp.where(usable, curvature, 1.0))
    return jnp.where(usable, scale * direction, 0.0)


def line_search(
    evaluate: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    params: jax.Array,
    step: jax.Array,
    max_kl: jax.Array | float,
    shrink: jax.Array | float,
    max_backtracks: int,
) -> tuple[jax.Array, jax.Array]:
    """Shorten a step until it improves the surrogate and stays in the trust region.

        θ' = θ + c^j step      for the least j in 0, ..., max_backtracks with
        KL(θ') ≤ δ   and   L(θ') > L(θ);      θ' = θ if there is none

    Both conditions are measured, not predicted by the models that gave the step. The surrogate must
    *rise*: pass L, not the loss −L. KL is the mean of `old.kl_divergence(new)` over the states.
    Equality with L(θ) is no improvement. A candidate fails if its surrogate or its divergence is
    infinite or NaN.

    Args:
        evaluate: parameters [P] -> (surrogate [], divergence from the old policy [] in nats).
        params: [P] θ, the old parameters. They are evaluated too, for L(θ).
        step: [P] the longest step to try, often from `step_to_boundary`.
        max_kl: scalar δ, positive, in nats per state.
        shrink: scalar c in (0, 1), the factor from one candidate to the next; 0.5 to 0.8 is usual.
        max_backtracks: how often a candidate may be shortened, static, at least 0: with 0, only the
            full step is tried.

    Returns:
        [P] the first candidate that passes, or `params` to the last bit; and [] the fraction c^j of
        the step that was taken, 0 if none. Evaluations stop at the first candidate that passes. In
        a batch they stop with the slowest member, and the others keep their result.

    Raises:
        ValueError: `max_backtracks` is negative.

    Not for differentiation.

    References:
        Schulman et al. 2015, arXiv:1502.05477, appendix C, on the problem of eq. 12.

    >>> def evaluate(x):
    ...     return -jnp.sum((x - 1.0) ** 2), jnp.sum(x**2)
    >>> x, fraction = line_search(evaluate, jnp.zeros(1), jnp.full(1, 4.0), 2.0, 0.5, 5)
    >>> x.tolist(), fraction.item()
    ([1.0], 0.25)
    """
    chex.assert_equal_shape([params, step])
    if max_backtracks < 0:
        raise ValueError(f"max_backtracks is {max_backtracks}; a line search needs at least 0")
    old_surrogate, _ = evaluate(params)
    shrink = jnp.asarray(shrink, params.dtype)

    def unfinished(state: Search) -> jax.Array:
        tried, _, _, taken = state
        return (tried <= max_backtracks) & (taken == 0.0)

    def attempt(state: Search) -> Search:
        tried, fraction, _, _ = state
        candidate = params + fraction * step
        surrogate, kl = evaluate(candidate)
        passes = (kl <= max_kl) & (surrogate > old_surrogate) & (surrogate < jnp.inf)
        chosen = jnp.where(passes, candidate, params)
        return tried + 1, shrink * fraction, chosen, jnp.where(passes, fraction, 0.0)

    one = jnp.ones((), params.dtype)
    start = jnp.zeros((), jnp.int32), one, params, 0.0 * one
    _, _, new_params, taken = jax.lax.while_loop(unfinished, attempt, start)
    return new_params, taken


def _inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Inner product as a plain sum: accelerators may compute a dot in reduced precision."""
    return jnp.sum(a * b)
