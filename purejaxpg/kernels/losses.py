"""Losses, targets and diagnostics of policy-gradient and actor-critic methods.

Unless its docstring says otherwise, a function here works element by element and leaves the mean to
the caller, so that a batch of environment steps and a batch of masked tokens can share it. A *loss*
is minimised; its sign is already right for that. Shapes must be equal: [B] against [B, 1] would
silently broadcast to [B, B], so it is an error.
"""

import chex
import jax
import jax.numpy as jnp


def score_function(log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
    """Loss whose gradient is the score-function estimate of the policy gradient.

        loss = −A log π(a|s)

    Only its gradient, −A ∇log π, has a meaning. The value does not measure how good the policy is:
    it rises and falls with the entropy and with the scale of the advantage.

    Args:
        log_prob: [...] log π(a|s) under the policy being trained, in nats; the action was drawn
            from that same policy.
        advantage: [...] A: a return, or a return less a baseline that does not depend on the
            action.

    Returns:
        [...] loss.

    Differentiated with respect to `log_prob`. Nothing is stopped: `advantage` must be data, or the
    loss also moves the critic that it came from.

    References:
        Williams 1992, Simple statistical gradient-following algorithms for connectionist
        reinforcement learning, Machine Learning 8.

    >>> score_function(jnp.array([-1.0, -2.0]), jnp.array([2.0, -1.0])).tolist()
    [2.0, -2.0]
    """
    chex.assert_equal_shape([log_prob, advantage])
    return -advantage * log_prob


def optimal_baseline(score_norm_squared: jax.Array, value: jax.Array) -> jax.Array:
    """Constant that minimises the variance of the score-function gradient when subtracted from Q.

        w = ‖∇log π(a|s)‖²
        b = Σ w Q / Σ w

    It is not the mean of Q: each action is weighted by the squared length of its score. It is the
    minimiser only if one score belongs to each value, as in a problem of a single step. Over a
    trajectory, the scores of different times are correlated, and this formula applied to each time
    is a heuristic.

    Args:
        score_norm_squared: [B] w ≥ 0, squared Euclidean norm of the gradient of log π(a|s) with
            respect to all parameters. For an exact expectation over actions instead of a sample,
            multiply it by the probability.
        value: [B] Q, the return that followed the action.

    Returns:
        [] baseline in the unit of the value; *one* number for the batch. If every weight is zero,
        no baseline makes a difference, and it is 0.

    Not for differentiation: treat it as data. If it is estimated from the samples that it is
    subtracted from, it biases their gradient by a term of order 1/B.

    References:
        Greensmith, Bartlett and Baxter 2004, Variance reduction techniques for gradient estimates
        in reinforcement learning, Journal of Machine Learning Research 5.

    >>> optimal_baseline(jnp.array([1.0, 3.0]), jnp.array([8.0, 4.0])).item()
    5.0
    """
    chex.assert_equal_shape([score_norm_squared, value])
    total = jnp.sum(score_norm_squared)
    weighted = jnp.sum(score_norm_squared * value)
    return jnp.where(total > 0.0, weighted / jnp.where(total > 0.0, total, 1.0), 0.0)


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
    direction that helps. In the two other corners it is the unclipped −A r ∇log π, which brings
    back a ratio that went the wrong way.

    Args:
        log_prob: [...] log π(a|s) under the policy being trained, in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.
        advantage: [...] A, often normalised over the minibatch beforehand.
        clip_eps: scalar ε, at least 0; 0.1 to 0.3 is usual, inf turns the clipping off.

    Returns:
        [...] loss, whose gradient at r = 1 is the plain policy gradient −A ∇log π (for ε > 0).

    Differentiated with respect to `log_prob`. Nothing is stopped: `old_log_prob` and `advantage`
    must be data.

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 7, negated.

    >>> ratio, advantage = jnp.array([0.5, 1.0, 1.5, 1.5]), jnp.array([2.0, 2.0, 2.0, -2.0])
    >>> ppo_clip(jnp.log(ratio), jnp.zeros(4), advantage, 0.25).tolist()
    [-1.0, -2.0, -2.5, 3.0]
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage])
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def clip_higher(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    clip_eps: jax.Array | float,
    clip_eps_high: jax.Array | float,
) -> jax.Array:
    """Clipped surrogate loss with a bound of its own above one.

        r    = π(a|s) / π_old(a|s)
        loss = −min(r A, clip(r, 1 − ε, 1 + ε_high) A)

    A bound on the ratio binds rare actions most: at ε = 0.2, an action of probability 0.01 cannot
    be made more likely than 0.012 in one update, one of 0.8 can reach 0.96. A larger ε_high lets
    rare actions grow and so keeps entropy. The lower bound is another matter: a larger ε lets an
    action disappear.

    Args:
        log_prob: [...] log π(a|s) under the policy being trained, in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.
        advantage: [...] A.
        clip_eps: scalar ε, at least 0; inf turns the lower bound off.
        clip_eps_high: scalar ε_high, at least 0; inf turns the upper bound off.

    Returns:
        [...] loss. With ε_high = ε, it is `ppo_clip` exactly.

    Differentiated with respect to `log_prob`. Nothing is stopped: `old_log_prob` and `advantage`
    must be data.

    References:
        Yu et al. 2025, arXiv:2503.14476 (DAPO), eq. 10, "Clip-Higher"; ε = 0.2 and ε_high = 0.28 in
        section 4.1.

    >>> ratio, advantage = jnp.array([0.5, 1.25, 1.5, 1.5]), jnp.array([2.0, 2.0, 2.0, -2.0])
    >>> clip_higher(jnp.log(ratio), jnp.zeros(4), advantage, 0.125, 0.375).tolist()
    [-1.0, -2.5, -2.75, 3.0]
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage])
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps_high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def cispo(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    clip_eps: jax.Array | float,
    clip_eps_high: jax.Array | float,
) -> jax.Array:
    """Score-function loss, weighted with a clipped and constant importance ratio (CISPO).

        r    = π(a|s) / π_old(a|s)
        loss = −stop(clip(r, 1 − ε, 1 + ε_high)) A log π(a|s)

    The bounds limit the *weight* of an action, not its gradient. Every action keeps one, also where
    `clip_higher` has none. Only the gradient has a meaning: the value depends on the entropy.

    Args:
        log_prob: [...] log π(a|s) under the policy being trained, in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.
        advantage: [...] A.
        clip_eps: scalar ε, at least 0; from 1 on, there is no lower bound, as in the experiments of
            the paper.
        clip_eps_high: scalar ε_high, at least 0; inf gives the importance-weighted gradient.

    Returns:
        [...] loss, whose gradient at r = 1 is the plain policy gradient −A ∇log π.

    Differentiated with respect to `log_prob`. The ratio *is* stopped here; `advantage` must be
    data.

    References:
        MiniMax 2025, arXiv:2506.13585 (MiniMax-M1), eqs. 4 and 5 (CISPO), negated.

    >>> log_ratio, advantage = jnp.log(jnp.array([0.5, 1.5, 4.0])), jnp.array([2.0, 2.0, -2.0])
    >>> loss = lambda x: cispo(x, jnp.zeros(3), advantage, jnp.inf, 1.0).sum()
    >>> print(jax.grad(loss)(log_ratio).round(4))
    [-1. -3.  4.]
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage])
    ratio = jnp.exp(log_prob - old_log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps_high)
    return -jax.lax.stop_gradient(clipped) * advantage * log_prob


def truncated_importance(
    log_prob: jax.Array, behaviour_log_prob: jax.Array, cap: jax.Array | float
) -> jax.Array:
    """Importance weight of data that another policy sampled, with an upper bound.

        w = min(π(a|s) / μ(a|s), C),      a ~ μ

    Without the bound, a mean weighted with w is unbiased for π, and its variance may be infinite.
    With it, the mean is biased towards μ. This weight corrects for *who sampled*; the ratio that
    `ppo_clip` limits counts from the policy at the beginning of the update.

    Args:
        log_prob: [...] log π, in nats, of a token or summed over a completion. Only the weight of a
            whole completion makes its gradient unbiased (for C = inf); weights of tokens ignore how
            likely the earlier tokens were.
        behaviour_log_prob: [...] log μ, of the policy that sampled, in nats.
        cap: scalar C, positive; inf turns the bound off.

    Returns:
        [...] weight in [0, C]; 1 where the policies agree and C is at least 1.

    Not differentiated: the whole weight *is* stopped here.

    References:
        Ionides 2008, Truncated importance sampling, Journal of Computational and Graphical
        Statistics 17.

    >>> log_prob = jnp.log(jnp.array([0.25, 0.5, 0.75]))
    >>> print(truncated_importance(log_prob, jnp.log(jnp.full(3, 0.25)), 2.5).round(4))
    [1.  2.  2.5]
    """
    chex.assert_equal_shape([log_prob, behaviour_log_prob])
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_prob - behaviour_log_prob), cap))


def ppo_kl_penalty(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantage: jax.Array,
    kl: jax.Array,
    beta: jax.Array | float,
) -> jax.Array:
    """Surrogate loss with a penalty on the divergence from the old policy, instead of clipping.

        r    = π(a|s) / π_old(a|s)
        loss = −(r A − β KL(π_old(·|s) ‖ π(·|s)))

    The divergence is that of the *old* policy from the new one, `old.kl_divergence(new)`. Its
    gradient must reach the parameters: computed from stored numbers alone, it is a constant and
    penalises nothing.

    Args:
        log_prob: [...] log π(a|s) under the policy being trained, in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.
        advantage: [...] A.
        kl: [...] divergence at each state, in nats, at least 0.
        beta: scalar strength of the penalty, at least 0, in units of advantage per nat. The caller
            may adapt it between updates.

    Returns:
        [...] loss.

    Differentiated with respect to `log_prob` and `kl`; nothing is stopped.

    References:
        Schulman et al. 2017, arXiv:1707.06347, eq. 8, negated.

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

    The ½ makes the gradient V − G. Code without it needs half the `vf_coef` for the same update, so
    check this convention before comparing coefficients.

    Args:
        value: [...] V(s), the output of the critic being trained.
        target: [...] G, the return it should predict, in the same unit.

    Returns:
        [...] loss, in squared units of the return.

    Differentiated with respect to `value`. Nothing is stopped: `target` must be data, or the loss
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
    """Half the larger of two squared errors: of the value, and of the value kept near the old one.

        V_clip = clip(V, V_old − ε, V_old + ε)
        loss   = ½ max((V − G)², (V_clip − G)²)

    ε is in units of the *return*, not of a probability ratio: 0.2 is tiny if returns are in the
    hundreds, and huge if they are below one. The larger error counts: an implementation that uses
    the clipped error alone stops learning on either side of the range.

    Args:
        value: [...] V(s), the output of the critic being trained.
        old_value: [...] V_old(s), the value when the data were collected.
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


def td_target(
    reward: jax.Array,
    next_value: jax.Array,
    terminated: jax.Array,
    gamma: jax.Array | float,
) -> jax.Array:
    """One-step target of a critic: the reward, then the discounted value of the next state.

        y = r + γ (1 − terminated) V(s')

    The flag is `terminated`, not `done`. A state still has a value after a time limit: with `done`
    here, the critic learns that the world ends at each truncation.

    Args:
        reward: [...] r, in the environment's own unit.
        next_value: [...] V(s') of the observation before any reset; or Q(s', a') at the action that
            the policy takes there, or its `soft_value`.
        terminated: [...] bool, the task itself ended with this step.
        gamma: scalar, discount per environment step, in [0, 1].

    Returns:
        [...] target, in the unit of the reward. Where `terminated` holds, `next_value` is ignored,
        even if it is NaN.

    Linear in `reward` and `next_value`; nothing is stopped, so treat the result as data.

    References:
        Sutton and Barto, Reinforcement Learning: An Introduction, 2nd edition, section 6.1.

    >>> td_target(jnp.ones(2), jnp.full(2, 8.0), jnp.array([False, True]), 0.5).tolist()
    [5.0, 1.0]
    """
    chex.assert_equal_shape([reward, next_value, terminated])
    return reward + gamma * jnp.where(terminated, 0.0, next_value)


def deterministic_policy(value: jax.Array) -> jax.Array:
    """Loss of a deterministic actor: the critic's value of its action, negated.

        loss = −Q(s, μ(s))
        ∇loss = −∇μ(s) ∇_a Q(s, a) at a = μ(s)

    The gradient must pass through the critic into the action, and from there into the actor. The
    `value` of a stored action carries none. A gradient that is also taken with respect to the
    critic's parameters teaches the critic to flatter the actor.

    Args:
        value: [...] Q(s, μ(s)), computed from the action of the actor being trained.

    Returns:
        [...] loss, in units of the return.

    Differentiated with respect to `value`; nothing is stopped.

    References:
        Silver et al. 2014, Deterministic policy gradient algorithms, ICML, eq. 9; Lillicrap et al.
        2015, arXiv:1509.02971, eq. 6.

    >>> action = jnp.array([1.0, 4.0])
    >>> jax.grad(lambda a: deterministic_policy(-((a - 3.0) ** 2)).sum())(action).tolist()
    [-4.0, 2.0]
    """
    return -value


def soft_value(log_prob: jax.Array, value: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """Value of an action plus the entropy bonus for choosing it at random.

        V = Q(s, a) − α log π(a|s)

    Only its mean over a ~ π is the value of the state. The target of a soft critic bootstraps from
    this at a *fresh* action of the current policy in the next state, not at the stored action.

    Args:
        log_prob: [...] log π(a|s) in nats, of a sampled action; or [..., A] of every action, to be
            averaged with `distributions.expectation`.
        value: [...] Q(s, a), often the smaller of two critics; shaped like `log_prob`.
        alpha: scalar temperature, at least 0, in units of the return per nat.

    Returns:
        Array of the shape of `value`, in units of the return.

    Linear in each argument; nothing is stopped, so treat the result as data in a target.

    References:
        Haarnoja et al. 2018, arXiv:1812.05905, eq. 3, before the mean over actions.

    >>> soft_value(jnp.log(jnp.array([0.5, 1.0])), jnp.ones(2), 0.0).tolist()
    [1.0, 1.0]
    """
    chex.assert_equal_shape([log_prob, value])
    return value - alpha * log_prob


def soft_policy(log_prob: jax.Array, value: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """Loss of a stochastic actor with an entropy bonus.

        loss = α log π(a|s) − Q(s, a)

    The mean over a ~ π must fall, so the gradient must also see that π chose the action: either
    through a reparametrised sample, in both `log_prob` and `value`, or by an exact expectation over
    all actions. If the sample is data, only α log π has a gradient; its mean is zero, and the actor
    learns nothing.

    Args:
        log_prob: [...] log π(a|s) in nats, of a reparametrised sample; or [..., A] of every action,
            to be averaged with `distributions.expectation`.
        value: [...] Q(s, a) at the same action; shaped like `log_prob`.
        alpha: scalar temperature, at least 0, in units of the return per nat; 0 gives
            `deterministic_policy`.

    Returns:
        Array of the shape of `value`: the negative of `soft_value`.

    Differentiated with respect to `log_prob` and `value`; nothing is stopped. `alpha` and the
    critic's parameters must be data.

    References:
        Haarnoja et al. 2018, arXiv:1812.05905, eq. 7, before the mean over actions.

    >>> soft_policy(jnp.array([-1.0, 2.0]), jnp.array([3.0, 3.0]), 0.5).tolist()
    [-3.5, -2.0]
    """
    chex.assert_equal_shape([log_prob, value])
    return alpha * log_prob - value


def temperature(
    log_alpha: jax.Array, entropy: jax.Array, target_entropy: jax.Array | float
) -> jax.Array:
    """Loss that moves the temperature until the policy has the target entropy.

        loss = log α (H − H_target)

    The sign is the trap: entropy above the target must *lower* the temperature. With the opposite
    sign, the temperature runs away to zero or to infinity. The paper has α instead of log α: the
    same sign and the same fixed point, but its gradient with respect to log α has a factor α, so it
    is slow at small temperatures. Compare learning rates only within one convention.

    Args:
        log_alpha: [] log of the temperature, the parameter being trained.
        entropy: [...] H(π(·|s)) in nats: −log π(a|s) of a sample, or the exact entropy.
        target_entropy: scalar H_target in nats; negative values are usual for densities. It must
            refer to the same density as `entropy`: scaling an action by c adds log c per component.

    Returns:
        [...] loss, zero where the entropy is the target.

    Differentiated with respect to `log_alpha`. The difference of entropies *is* stopped here: this
    loss must never move the policy.

    References:
        Haarnoja et al. 2018, arXiv:1812.05905, eq. 18, with log α instead of α.

    >>> too_random = jnp.array([2.0])
    >>> jax.grad(lambda x: temperature(x, too_random, 0.5).mean())(jnp.array(0.0)).item()
    1.5
    """
    chex.assert_shape(log_alpha, ())
    return log_alpha * jax.lax.stop_gradient(entropy - target_entropy)


def approximate_kl(log_prob: jax.Array, old_log_prob: jax.Array) -> jax.Array:
    """Non-negative one-sample estimate of the divergence of the old policy from the new.

        r  = π(a|s) / π_old(a|s),      a ~ π_old
        k3 = (r − 1) − log r,          E[k3] = KL(π_old ‖ π)

    The distribution that drew the actions decides which divergence this estimates. If they come
    from π_old, both the value and its gradient are unbiased. For KL(π ‖ π_ref) with actions drawn
    from π itself, call `approximate_kl(ref_log_prob, log_prob)`: the value is again unbiased, but
    the gradient is not, because it cannot see that π also chose the actions.

    Args:
        log_prob: [...] log π(a|s), in nats.
        old_log_prob: [...] log π_old(a|s), of the policy that took the action, in nats.

    Returns:
        [...] estimate in nats, zero where the two policies agree. Take its mean over a batch.

    Differentiable in both; nothing is stopped.

    References:
        Schulman 2020, Approximating KL divergence (a note on joschu.net).

    >>> print(approximate_kl(jnp.log(jnp.array([1.0, 2.0])), jnp.zeros(2)).round(4))
    [0.     0.3069]
    """
    chex.assert_equal_shape([log_prob, old_log_prob])
    log_ratio = log_prob - old_log_prob
    # expm1, because for a ratio near 1 the rounding of exp is larger than the result.
    return jnp.expm1(log_ratio) - log_ratio


def is_clipped(
    log_prob: jax.Array, old_log_prob: jax.Array, clip_eps: jax.Array | float
) -> jax.Array:
    """Whether the probability ratio lies outside the clip range; its mean is the clip fraction.

        1 if |π(a|s) / π_old(a|s) − 1| > ε else 0

    A ratio outside the range may still have its whole gradient, depending on the sign of the
    advantage (see `ppo_clip`).

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
