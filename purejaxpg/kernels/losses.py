"""Losses and diagnostics of the PPO and actor-critic family, one number per element.

Every function here works element by element and leaves the mean to the caller, so that a batch of
environment steps and a batch of masked tokens can share it. A *loss* is to be minimised; the signs
already say so. Shapes must be equal: a [B] against a [B, 1] would silently broadcast to [B, B], and
is refused.
"""

import chex
import jax
import jax.numpy as jnp


def ppo_clip(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    clip_eps: jax.Array | float,
) -> jax.Array:
    """Clipped surrogate loss of proximal policy optimisation.

        r    = π(a|s) / π_old(a|s)
        loss = −min(r A, clip(r, 1 − ε, 1 + ε) A)

    The gradient does *not* vanish everywhere outside the clip range. It is zero only for A > 0 with
    r > 1 + ε and for A < 0 with r < 1 − ε, where the ratio has already moved far enough in the
    direction that helps. In the two other corners it is the unclipped −A r ∇log π, which brings a
    ratio back that went the wrong way.

    Args:
        log_prob: [...] log π(a|s) under the policy being trained, in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.
        advantage: [...] A, often normalised over the minibatch beforehand.
        clip_eps: scalar ε, at least 0; 0.1 to 0.3 is usual, inf turns the clipping off.

    Returns:
        [...] loss, whose gradient at r = 1 is the plain policy gradient −A ∇log π (for ε > 0).

    Differentiated with respect to `log_prob`. Nothing is stopped: `old_log_prob` and `advantage`
    are to be data.

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7, with the sign turned.

    >>> ratio, advantage = jnp.array([0.5, 1.0, 1.5, 1.5]), jnp.array([2.0, 2.0, 2.0, -2.0])
    >>> ppo_clip(jnp.log(ratio), jnp.zeros(4), advantage, 0.25).tolist()
    [-1.0, -2.0, -2.5, 3.0]
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage])
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def ppo_kl_penalty(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    kl: jax.Array,
    beta: jax.Array | float,
) -> jax.Array:
    """Surrogate loss with a penalty on the divergence from the old policy, in place of clipping.

        r    = π(a|s) / π_old(a|s)
        loss = −(r A − β KL(π_old(·|s) ‖ π(·|s)))

    The divergence is that of the *old* policy from the new one, `old.kl(new)`, and its gradient has
    to reach the parameters: computed from stored numbers alone it is a constant and holds nothing
    back.

    Args:
        log_prob: [...] log π(a|s) under the policy being trained, in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.
        advantage: [...] A.
        kl: [...] divergence at each state, in nats, at least 0.
        beta: scalar strength of the penalty, at least 0, in units of advantage per nat. Adapting it
            between updates is the caller's business.

    Returns:
        [...] loss.

    Differentiated with respect to `log_prob` and `kl`; nothing is stopped.

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 8, with the sign turned.

    >>> half = jnp.array([0.5])
    >>> ppo_kl_penalty(jnp.zeros(1), jnp.zeros(1), jnp.ones(1), half, 3.0).tolist()
    [0.5]
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage, kl])
    ratio = jnp.exp(log_prob - old_log_prob)
    return -(ratio * advantage - beta * kl)


def value_loss(value: jax.Array, target: jax.Array) -> jax.Array:
    """Half the squared error of the critic.

        loss = ½ (V − G)²

    The ½ is inside, so that the gradient is V − G. Code that leaves it out needs half the `vf_coef`
    for the same update: compare coefficients only together with this convention.

    Args:
        value: [...] V(s), the output of the critic being trained.
        target: [...] G, the return it should predict, in the same unit.

    Returns:
        [...] loss, in squared units of the return.

    Differentiated with respect to `value`. Nothing is stopped: `target` is to be data, or the loss
    also pulls the target towards the value.

    >>> value_loss(jnp.array([3.0]), jnp.array([1.0])).tolist()
    [2.0]
    """
    chex.assert_equal_shape([value, target])
    return 0.5 * jnp.square(value - target)


def value_loss_clipped(
    value: jax.Array,
    old_value: jax.Array,
    target: jax.Array,
    clip_eps: jax.Array | float,
) -> jax.Array:
    """Half the larger squared error of two: the critic's, and that of its value kept near the old.

        V_clip = clip(V, V_old − ε, V_old + ε)
        loss   = ½ max((V − G)², (V_clip − G)²)

    ε is measured in units of the *return*, not of a probability ratio: 0.2 is nothing where returns
    are in the hundreds and everything where they are below one. And it is the larger error that
    counts; an implementation that uses the clipped error alone lets the critic stop learning on
    either side of the range.

    Args:
        value: [...] V(s), the output of the critic being trained.
        old_value: [...] V_old(s), as it was when the data were collected.
        target: [...] G, the return it should predict.
        clip_eps: scalar ε, at least 0, in the unit of the return; inf turns the clipping off and
            gives `value_loss` exactly.

    Returns:
        [...] loss, in squared units of the return.

    Differentiated with respect to `value`; the gradient is zero where V lies outside the range and
    nearer to G than V_clip does. Nothing is stopped.

    References:
        Not in the PPO paper; Engstrom et al. 2020, arXiv:2005.12729, study it as a detail of that
        paper's implementation.

    >>> value, old, target = jnp.array([3.0, -3.0]), jnp.zeros(2), jnp.full(2, 4.0)
    >>> value_loss_clipped(value, old, target, 1.0).tolist()
    [4.5, 24.5]
    """
    chex.assert_equal_shape([value, old_value, target])
    # Clipping the value, not its difference from the old one, keeps it exact inside the range.
    clipped = jnp.clip(value, old_value - clip_eps, old_value + clip_eps)
    return 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped - target))


def approximate_kl(log_prob: jax.Array, old_log_prob: jax.Array) -> jax.Array:
    """Non-negative one-sample estimate of the divergence of the old policy from the new.

        r  = π(a|s) / π_old(a|s),      a ~ π_old
        k3 = (r − 1) − log r,          E[k3] = KL(π_old ‖ π)

    Which distribution drew the actions decides which divergence this estimates: the actions have to
    come from π_old. Then the value is unbiased, and so is its gradient. For KL(π ‖ π_ref) with
    actions drawn from π itself, pass `approximate_kl(ref_log_prob, log_prob)`: the value is again
    unbiased, but the gradient no longer is, since it cannot see that π also chose the actions.

    Args:
        log_prob: [...] log π(a|s), in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.

    Returns:
        [...] estimate in nats, zero where the two agree. Take its mean over a batch.

    Differentiable in both; nothing is stopped.

    References:
        Schulman 2020, Approximating KL divergence (a note on joschu.net).

    >>> print(approximate_kl(jnp.log(jnp.array([1.0, 2.0])), jnp.zeros(2)).round(4))
    [0.     0.3069]
    """
    chex.assert_equal_shape([log_prob, old_log_prob])
    log_ratio = log_prob - old_log_prob
    # expm1, since for a ratio near 1 the rounding of exp alone is larger than the result.
    return jnp.expm1(log_ratio) - log_ratio


def is_clipped(
    log_prob: jax.Array, old_log_prob: jax.Array, clip_eps: jax.Array | float
) -> jax.Array:
    """Whether the probability ratio lies outside the clip range; its mean is the clip fraction.

        1 if |π(a|s) / π_old(a|s) − 1| > ε else 0

    Outside the range is not the same as without a gradient: with the sign of the advantage against
    it, a ratio outside still has its whole gradient (see `ppo_clip`).

    Args:
        log_prob: [...] log π(a|s) under the policy being trained, in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.
        clip_eps: scalar ε, at least 0.

    Returns:
        [...] 0.0 or 1.0, in the floating type of `log_prob`.

    A diagnostic: its gradient is zero everywhere.

    >>> is_clipped(jnp.log(jnp.array([0.7, 0.9, 1.3])), jnp.zeros(3), 0.2).tolist()
    [1.0, 0.0, 1.0]
    """
    chex.assert_equal_shape([log_prob, old_log_prob])
    ratio = jnp.exp(log_prob - old_log_prob)
    return (jnp.abs(ratio - 1.0) > clip_eps).astype(log_prob.dtype)
