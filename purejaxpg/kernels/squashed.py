"""A tanh-Gaussian whose density is right at saturation. This module imports distrax at its top."""

import math
from typing import Any

import distrax
import jax
import jax.numpy as jnp

from purejaxpg import backend

_NEWTON_STEPS = 32


class TanhGaussian(distrax.Transformed):
    """The distribution that `distributions.tanh_gaussian` describes.

    `sample_and_log_prob` is distrax's and knows the x of each sample, so its value and gradients
    are exact however far out x lies. There is no `entropy`, since it has no closed form: −log_prob
    of a sample is an unbiased estimate.

    >>> still = TanhGaussian(jnp.array([20.0]), jnp.array([-5.0]))
    >>> action, log_prob = still.sample_and_log_prob(seed=jax.random.key(0))
    >>> action.item(), bool(log_prob > 40.0)
    (1.0, True)
    """

    def __init__(self, mean: jax.Array, log_std: jax.Array):
        normal = distrax.Normal(mean, jnp.broadcast_to(jnp.exp(log_std), mean.shape))
        gaussian = distrax.Independent(normal, reinterpreted_batch_ndims=1)
        super().__init__(gaussian, distrax.Block(distrax.Tanh(), 1))

    def log_prob(self, value: jax.Array) -> jax.Array:
        """Log density of an action, finite at the bounds too.

            log π(a) = log N(x; μ, σ²) − Σ_i log(1 − tanh² x_i),      x = artanh(a)

        In float32, tanh(x) is exactly 1 from an x of 8 or 9 on, and x cannot be recovered. For such
        a component this is the log of the mean density over all a that round to 1: their
        probability P(x > artanh(1 − h)), divided by their width h. Prefer `sample_and_log_prob`,
        which the rounding of the action does not limit.

        Args:
            value: [..., A] action in [−1, 1].

        Returns:
            [...] log density in nats.

        Differentiated with respect to the parameters and, inside the bounds, `value`.

        >>> policy = TanhGaussian(jnp.zeros(1), jnp.zeros(1))
        >>> print(f"{policy.log_prob(jnp.zeros(1)):.4f} {policy.log_prob(jnp.ones(1)):.4f}")
        -0.9189 -26.3989
        """
        normal, bound = self.distribution.distribution, jnp.sign(value)
        half_step = float(jnp.finfo(normal.loc.dtype).epsneg) / 2.0  # h
        x = jnp.arctanh(jnp.clip(value, -1.0 + 2.0 * half_step, 1.0 - 2.0 * half_step))
        inside = normal.log_prob(x) - distrax.Tanh().forward_log_det_jacobian(x)
        edge = 0.5 * (math.log(2.0 - half_step) - math.log(half_step))  # artanh(1 − h)
        beyond = jax.scipy.special.log_ndtr((bound * normal.loc - edge) / normal.scale)
        rounded = jnp.abs(value) >= 1.0
        return jnp.sum(jnp.where(rounded, beyond - math.log(half_step), inside), axis=-1)

    @backend.foreign()  # distrax's normal.py adds samples [1, ...] to means [...]
    def sample_and_log_prob(self, **keywords: Any) -> tuple[jax.Array, jax.Array]:
        """Sample actions [..., A] with their log densities [...]; the arguments are distrax's."""
        return super().sample_and_log_prob(**keywords)

    def median(self) -> jax.Array:
        """Median of each component, tanh(μ): the usual greedy action [..., A].

        It is neither the mean nor the mode: a wide distribution is densest near its bounds.

        >>> TanhGaussian(jnp.array([0.0, 50.0]), jnp.zeros(2)).median().tolist()
        [0.0, 1.0]
        """
        return jnp.tanh(self.distribution.mean())

    def mode(self) -> jax.Array:
        """Action of the greatest density [..., A]; of two equally dense ones, the positive one.

            a = tanh(x),      x = μ + 2 σ² tanh(x)

        It lies further from 0 than the median, and for σ² > ½ a mean of 0 has two modes.

        >>> mean, log_std = jnp.array([0.0, 0.1, -0.1]), jnp.array([-2.0, 1.0, 1.0])
        >>> TanhGaussian(mean, log_std).mode().round(4).tolist()
        [0.0, 1.0, -1.0]
        """
        mean, variance = self.distribution.mean(), self.distribution.variance()

        # On x ≥ |μ| the left side minus the right is convex and rises to the right of its largest
        # root, so Newton's method from beyond that root descends to it.
        def newton(_: int, x: jax.Array) -> jax.Array:
            error = x - jnp.abs(mean) - 2.0 * variance * jnp.tanh(x)
            slope = 1.0 - 2.0 * variance * (1.0 - jnp.square(jnp.tanh(x)))
            return x - error / jnp.maximum(slope, jnp.finfo(x.dtype).eps)

        start = jnp.abs(mean) + 2.0 * variance
        x = jax.lax.fori_loop(0, _NEWTON_STEPS, newton, start)
        return jnp.where(mean < 0.0, -1.0, 1.0) * jnp.tanh(x)
