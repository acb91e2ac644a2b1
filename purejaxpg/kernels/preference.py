"""Masked tokens, pairwise preferences, and the KL-regularised objective of language models.

A language model π is trained to maximise E[r(x, y)] − β KL(π(·|x) ‖ π_ref(·|x)) over completions y
of prompts x, from a reference π_ref. Shapes use B for completions, L for their length in tokens, G
for completions of one prompt, X for prompts, and N for all completions of a prompt.

`mask` is bool and True at the actions: the tokens that the model chose, up to and including its
first end-of-sequence token. Make it from the *position* of that token, not from the token's number.
Whatever stands outside the mask has no effect on a value or on a gradient, even if it is NaN. Only
the derivative of what was computed *before* can still do harm there, since 0 times NaN is NaN: use
`where` before an `exp` or a division that may fail.

Shapes must be equal: [B] against [B, 1] would silently broadcast to [B, B], so it is an error.
"""

import chex
import jax
import jax.numpy as jnp

from purejaxpg.kernels import losses

SCALES = ("group", "batch", "none")
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


def masked_sum(
    x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Sum over the unmasked entries.

        Σ x_i over all i with mask_i

    Over the last axis of token log-probabilities, this is log π(y|x) of the completion. The entries
    outside are replaced, not multiplied by 0, because 0 times infinity is NaN.

    Args:
        x: [...] any unit.
        mask: [...] bool, True where x counts.
        axis: the axes to sum over, static; None sums over all of them.

    Returns:
        x's shape without the summed axes; 0 where the mask is empty.

    Differentiated with respect to `x`: the gradient is 1 inside the mask and 0 outside.

    >>> x, mask = jnp.array([[1.0, 2.0], [4.0, jnp.nan]]), jnp.array([[True, True], [True, False]])
    >>> masked_sum(x, mask, axis=1).tolist()
    [3.0, 4.0]
    """
    chex.assert_equal_shape([x, mask])
    chex.assert_type(mask, bool)
    return jnp.sum(jnp.where(mask, x, 0), axis)


def masked_mean(
    x: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """Mean over the unmasked entries.

        Σ x_i / n over all i with mask_i, where n is their number

    The mean over all tokens of a batch is not the mean over completions of their means: the first
    weights tokens equally, the second gives each token of a short completion more weight. Nor is it
    the mean over minibatches of their masked means, unless they have equally many tokens.

    Args:
        x: [...] any unit.
        mask: [...] bool, True where x counts.
        axis: the axes to average over, static; None averages over all of them.

    Returns:
        x's shape without the averaged axes, floating; 0 where the mask is empty.

    Differentiated with respect to `x`: the gradient is 1/n inside the mask and 0 outside.

    >>> x, mask = jnp.array([[1.0, 2.0], [6.0, jnp.nan]]), jnp.array([[True, True], [True, False]])
    >>> masked_mean(x, mask).item(), masked_mean(x, mask, axis=1).tolist()
    (3.0, [1.5, 6.0])
    """
    count = jnp.sum(mask, axis)
    return masked_sum(x, mask, axis) / jnp.maximum(count, 1)


def masked_whiten(
    x: jax.Array, mask: jax.Array, shift_mean: bool = True, eps: float = 1e-8
) -> jax.Array:
    """Scale the unmasked entries to variance 1, and shift them to mean 0.

        m = mean(x),  v = mean((x − m)²)
        y = (x − m) / √(v + ε)          shift_mean
        y = (x − m) / √(v + ε) + m      otherwise

    Mean and variance are those of all unmasked entries together, so they couple the completions of
    a batch. Rewards are whitened without the shift, but that still adds m (1 − 1/√(v + ε)) to each
    *token*. At a fixed length this is harmless; where a completion may end early, it is a bonus or
    a penalty on its length.

    Args:
        x: [...] any unit.
        mask: [...] bool, True where x counts.
        shift_mean: static; False keeps the mean where it was.
        eps: ε > 0 in squared units of x, *inside* the root. It matters only where the standard
            deviation is not far above √ε, which is 1e-4 by default.

    Returns:
        [...] whitened values without a unit, 0 outside the mask. The variance is that of the
        population, Σ/n. Code that divides by n − 1 returns values smaller by √((n − 1) / n).

    Differentiable in `x`, but meant for data: apply it to advantages or rewards, not to a loss.

    References:
        Ziegler et al. 2019, arXiv:1909.08593, in the code published with it
        (openai/lm-human-preferences), not in the text.

    >>> mask = jnp.array([True, True, False])
    >>> print(masked_whiten(jnp.array([1.0, 5.0, jnp.inf]), mask))
    [-1.  1.  0.]
    >>> print(masked_whiten(jnp.array([1.0, 5.0, jnp.inf]), mask, shift_mean=False))
    [2. 4. 0.]
    """
    mean = masked_mean(x, mask)
    centred = jnp.where(mask, x, mean) - mean
    variance = masked_mean(jnp.square(centred), mask)
    whitened = centred * jax.lax.rsqrt(variance + eps)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)


def token_kl(log_prob: jax.Array, ref_log_prob: jax.Array, estimator: str) -> jax.Array:
    """One-sample estimate of the divergence of the policy from the reference, for each token.

        d  = log π(a|s) − log π_ref(a|s),      a ~ π
        k1 = d                                 unbiased
        k2 = d² / 2                            biased
        k3 = exp(−d) − 1 + d                   unbiased, never negative

    An estimate with the right *value* may have the wrong *gradient*. What is optimised depends on
    where the estimate stands. In the reward, it is data that the later tokens add up (γ = 1, summed
    from each token to the end); in the loss, it is differentiated. Over samples of π, the expected
    gradient is then

        k1 in the reward    that of KL(π ‖ π_ref) over whole completions: the only one
        k3 in the reward    wrong, and nearly zero close to the reference: it does not hold π there
        k1 in the loss      zero, if summed over tokens: no penalty at all
        k2 in the loss      that of KL(π ‖ π_ref) at each visited state, by itself
        k3 in the loss      that of KL(π_ref ‖ π) at each visited state, by itself

    "By itself" means that it does not see how a token changes the states that come later, so the
    optimum is another one as soon as completions have more than one token.

    Args:
        log_prob: [...] log π(a|s), in nats, of a token drawn from π.
        ref_log_prob: [...] log π_ref(a|s) of the same token, in nats. Any temperature that the
            sampler used must divide the logits of both.
        estimator: "k1", "k2" or "k3", static.

    Returns:
        [...] estimate in nats. Its sum over the tokens of a completion estimates the divergence of
        the completion; its mean over tokens does not.

    Differentiable in both; nothing is stopped. In the reward, treat it as data.

    Raises:
        ValueError: there is no estimator of that name.

    References:
        Schulman 2020, Approximating KL divergence (a note on joschu.net), where r = exp(−d). Tang
        and Munos 2025, arXiv:2506.09477, on gradients of such estimates.

    >>> log_prob, ref_log_prob = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
    >>> for name in ("k1", "k2", "k3"):
    ...     print(name, f"{token_kl(log_prob, ref_log_prob, name).item():.4f}")
    k1 0.6931
    k2 0.2402
    k3 0.1931
    """
    chex.assert_equal_shape([log_prob, ref_log_prob])
    if estimator == "k1":
        return log_prob - ref_log_prob
    if estimator == "k2":
        return 0.5 * jnp.square(log_prob - ref_log_prob)
    if estimator == "k3":
        return losses.approximate_kl(ref_log_prob, log_prob)
    raise ValueError(f'estimator is "{estimator}"; it must be "k1", "k2" or "k3"')


def preference_probability(reward_a: jax.Array, reward_b: jax.Array) -> jax.Array:
    """Probability that completion a is preferred to b, in the model of Bradley and Terry.

        p(a ≻ b) = σ(r_a − r_b) = exp(r_a) / (exp(r_a) + exp(r_b))

    Only the difference matters, so both rewards must belong to the *same prompt*: preferences say
    nothing about a constant added to every reward of a prompt. The scale does matter: rewards twice
    as large mean labels with less noise.

    Args:
        reward_a: [...] r(x, a), in nats: a difference of 1 is odds of e to 1.
        reward_b: [...] r(x, b), in the same unit.

    Returns:
        [...] probability, in [0, 1]; ½ for a tie.

    Differentiable in both; nothing is stopped.

    References:
        Bradley and Terry 1952, Rank analysis of incomplete block designs, Biometrika 39; Rafailov
        et al. 2023, arXiv:2305.18290, eq. 1.

    >>> three_to_one = jnp.log(jnp.array([3.0]))
    >>> print(preference_probability(three_to_one, jnp.zeros(1)).round(4))
    [0.75]
    """
    chex.assert_equal_shape([reward_a, reward_b])
    return jax.nn.sigmoid(reward_a - reward_b)


def bradley_terry(
    chosen_reward: jax.Array,
    rejected_reward: jax.Array,
    label_smoothing: jax.Array | float = 0.0,
) -> jax.Array:
    """Negative log-likelihood of a preference, in the model of Bradley and Terry.

        d    = r(x, chosen) − r(x, rejected)
        loss = −(1 − s) log σ(d) − s log σ(−d)

    With s = 0 and labels that never contradict each other, it has no minimum: the differences grow
    without bound. A fixed s > 0 assumes that a share s of the labels is wrong, and the loss is then
    least at d = log((1 − s) / s). Smoothing also moves that minimum if the labels are honest draws
    from `preference_probability`, which need none.

    Args:
        chosen_reward: [...] r(x, y) of the preferred completion, in nats, finite.
        rejected_reward: [...] r(x, y) of the other completion of the same prompt.
        label_smoothing: scalar s in [0, ½), the probability that a label is the wrong way round.

    Returns:
        [...] loss in nats; log 2 for a tie.

    Differentiated with respect to both rewards, with opposite gradients ∓(σ(−d) − s); nothing is
    stopped. An implicit reward, β times a log-ratio of policies, makes this the loss of direct
    preference optimisation.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 2, before the mean and with s = 0.

    >>> print(bradley_terry(jnp.log(jnp.array([3.0, 1.0])), jnp.zeros(2)).round(4))
    [0.2877 0.6931]
    """
    chex.assert_equal_shape([chosen_reward, rejected_reward])
    difference = chosen_reward - rejected_reward
    # log σ(−d) = log σ(d) − d, so this is the sum of both terms without a difference of large ones.
    return jax.nn.softplus(-difference) + label_smoothing * difference


def dpo(
    chosen_log_ratio: jax.Array,
    rejected_log_ratio: jax.Array,
    beta: jax.Array | float,
    label_smoothing: jax.Array | float = 0.0,
) -> jax.Array:
    """Loss of direct preference optimisation (DPO): a policy as its own reward model.

        r(x, y) = β log(π(y|x) / π_ref(y|x)),    loss = bradley_terry(r(x, chosen), r(x, rejected))

    Over labels drawn from `preference_probability`, it is least at the optimum of E[r] − β KL, for
    the same β and all completions that the pairs compare. Only the difference counts: the chosen
    completion may become less likely, as long as the rejected one falls further.

    Args:
        chosen_log_ratio: [...] log π(y|x) − log π_ref(y|x) of the preferred completion, in nats:
            *summed* over its tokens, with its end and without the prompt.
        rejected_log_ratio: [...] the same of the other completion of the same prompt.
        beta: scalar β > 0, in units of the reward per nat.
        label_smoothing: scalar s in [0, ½), as in `bradley_terry`; above 0, this is conservative
            DPO.

    Returns:
        [...] loss in nats; log 2 where the policy is the reference.

    Differentiated with respect to both ratios; nothing is stopped.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Mitchell 2023, A note on DPO with noisy
        preferences and relationship to IPO, eq. 3, for s > 0.

    >>> print(dpo(jnp.array([2.0]), jnp.array([-1.0]), 0.5).round(4))
    [0.2014]
    """
    return bradley_terry(beta * chosen_log_ratio, beta * rejected_log_ratio, label_smoothing)


def ipo(
    chosen_log_ratio: jax.Array, rejected_log_ratio: jax.Array, tau: jax.Array | float
) -> jax.Array:
    """Loss of identity preference optimisation (IPO): a difference of log-ratios of finite size.

        loss = (f(x, chosen) − f(x, rejected) − 1 / (2τ))²,    f = log(π / π_ref)

    Its minimum is finite even if labels never contradict each other. Where both completions of the
    pairs are drawn from a policy μ, it is at f(x, y) = p(y ≻ μ) / τ + c(x), with the probability
    that y is preferred to a completion by μ. Pass the ratios *summed* over tokens, as the paper and
    the code published with DPO have it; TRL's DPOTrainer divides each by its own length.

    Args:
        chosen_log_ratio: [...] f of the preferred completion, as for `dpo`.
        rejected_log_ratio: [...] f of the other completion of the same prompt.
        tau: scalar τ > 0, per nat; the greater, the closer to the reference.

    Returns:
        [...] loss in nats²; 1 / (4τ²) where the policy is the reference.

    Differentiated with respect to both ratios; nothing is stopped.

    References:
        Azar et al. 2023, arXiv:2310.12036, eq. 17.

    >>> ipo(jnp.array([2.0]), jnp.array([-1.0]), 0.5).tolist()
    [4.0]
    """
    chex.assert_equal_shape([chosen_log_ratio, rejected_log_ratio])
    return jnp.square(chosen_log_ratio - rejected_log_ratio - 0.5 / tau)


def simpo(
    chosen_log_prob: jax.Array,
    rejected_log_prob: jax.Array,
    beta: jax.Array | float,
    margin: jax.Array | float = 0.0,
) -> jax.Array:
    """Loss of simple preference optimisation (SimPO): the mean log-probability as the reward.

        loss = −log σ(β (m(x, chosen) − m(x, rejected)) − γ),    m = log π(y|x) / |y|

    There is no reference, so nothing but early stopping keeps the policy close to one.

    Args:
        chosen_log_prob: [...] m of the preferred completion: the *mean* log-probability of its
            tokens, in nats.
        rejected_log_prob: [...] m of the other completion of the same prompt.
        beta: scalar β > 0, reward per nat; 2 to 2.5 in most of the paper's runs, far above that of
            DPO, because means are smaller than sums.
        margin: scalar γ ≥ 0, the difference of rewards that counts as even. TRL has the same γ; the
            authors' code takes γ / β.

    Returns:
        [...] loss in nats.

    Differentiated with respect to both log-probabilities; nothing is stopped.

    References:
        Meng, Xia and Chen 2024, arXiv:2405.14734, eq. 6; appendix B for β.

    >>> print(simpo(jnp.array([-0.5]), jnp.array([-1.0]), 2.0, 1.0).round(4))
    [0.6931]
    """
    return bradley_terry(beta * chosen_log_prob - margin, beta * rejected_log_prob)


def orpo(
    chosen_log_prob: jax.Array, rejected_log_prob: jax.Array, weight: jax.Array | float
) -> jax.Array:
    """Loss of odds-ratio preference optimisation (ORPO): imitation with a comparison of odds.

        loss = −m(x, chosen) − λ log σ(log odds(x, chosen) − log odds(x, rejected))
        odds = p / (1 − p),    p = exp m,    m = log π(y|x) / |y|

    The first term is the loss of supervised fine-tuning, so there is no reference and no separate
    stage before. 1 − p is computed without cancellation, and p is kept below 1 by the precision of
    the numbers: an infinite ratio of odds has no gradient.

    Args:
        chosen_log_prob: [...] m of the preferred completion: the *mean* log-probability of its
            tokens, in nats, at most 0.
        rejected_log_prob: [...] m of the other completion of the same prompt.
        weight: scalar λ ≥ 0.

    Returns:
        [...] loss in nats.

    Differentiated with respect to both log-probabilities; nothing is stopped.

    References:
        Hong, Lee and Thorne 2024, arXiv:2403.07691, eqs. 3, 4, 6 and 7.

    >>> print(orpo(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), 1.0).round(4))
    [0.9808]
    """
    comparison = bradley_terry(_log_odds(chosen_log_prob), _log_odds(rejected_log_prob))
    return weight * comparison - chosen_log_prob


def kto(
    log_ratio: jax.Array,
    is_desirable: jax.Array,
    kl: jax.Array | float,
    beta: jax.Array | float,
    desirable_weight: jax.Array | float = 1.0,
    undesirable_weight: jax.Array | float = 1.0,
) -> jax.Array:
    """Loss of Kahneman-Tversky optimisation (KTO): single completions, each good or bad.

        loss = λ_D (1 − σ(β (f − z₀)))  if desirable,    λ_U (1 − σ(β (z₀ − f)))  otherwise
        f = log(π(y|x) / π_ref(y|x)),    z₀ = max(0, KL)

    A share q of the labels of y is good. At the reference, the gradient with respect to f is
    β/4 ((1 − q) λ_U − q λ_D), so f rises if the labels are good often enough. All others fall
    without bound, so there is no finite optimum. The policy has a limit all the same: for small β,
    it is about π_ref (q λ_D − (1 − q) λ_U)₊, whatever β is. That is not the optimum of E[r] − β KL.

    Args:
        log_ratio: [...] f, summed over tokens as for `dpo`.
        is_desirable: [...] bool, the labels.
        kl: scalar, the mean of log π(y'|x) − log π_ref(y'|x) in nats, over the prompts x of a batch
            with completions y' of *other* prompts. With its own completion, f would be compared
            with itself.
        beta: scalar β > 0, per nat.
        desirable_weight: scalar λ_D ≥ 0.
        undesirable_weight: scalar λ_U ≥ 0. For n_D and n_U examples of the two kinds, TRL advises
            λ_D n_D / (λ_U n_U) from 1 to 4/3, and version 5 of the paper from 1 to 3/2.

    Returns:
        [...] loss without a unit, in [0, λ]; λ/2 where the policy is the reference.

    Differentiated with respect to `log_ratio`; z₀ is stopped.

    References:
        Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8 of version 5; earlier ones count it as 7.

    >>> print(kto(jnp.zeros(2), jnp.array([True, False]), -3.0, 0.1, 1.0, 1.5))
    [0.5  0.75]
    """
    chex.assert_equal_shape([log_ratio, is_desirable])
    chex.assert_type(is_desirable, bool)
    margin = beta * (log_ratio - jax.lax.stop_gradient(jnp.maximum(kl, 0.0)))
    weight = jnp.where(is_desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(jnp.where(is_desirable, -margin, margin))


def token_rewards(
    score: jax.Array,
    log_prob: jax.Array,
    ref_log_prob: jax.Array,
    mask: jax.Array,
    beta: jax.Array | float,
) -> jax.Array:
    """Rewards of tokens whose sum is the score of the completion less its KL penalty.

        r_t = −β (log π(y_t|s_t) − log π_ref(y_t|s_t)) + [t is the last action] score

    The score belongs to the *last action*, the one that ended the completion. An index later, it is
    the reward of padding: with the traces of an advantage estimate cut at the end, it never reaches
    the tokens that earned it. At γ = 1, the return is then an unbiased estimate of the objective,
    and its policy gradient is that of E[r] − β KL (see `token_kl`).

    Args:
        score: [B] r(x, y) of the completion, any unit; integers are not truncated, nor do they
            truncate the penalty.
        log_prob: [B, L] log π(y_t|s_t) of the policy that sampled the tokens, in nats.
        ref_log_prob: [B, L] log π_ref(y_t|s_t), in nats.
        mask: [B, L] bool, True at the actions.
        beta: scalar β ≥ 0, in units of the score per nat.

    Returns:
        [B, L] reward, in the unit of the score, floating; 0 outside the mask. A completion without
        an action gets no reward at all.

    Linear in `score` and the log-probabilities; nothing is stopped. Treat the result as data: this
    is the penalty in the reward, not in the loss.

    References:
        Ziegler et al. 2019, arXiv:1909.08593, section 2: the penalty is a part of the reward.

    >>> log_prob, mask = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[True, True, False]])
    >>> token_rewards(jnp.array([5]), log_prob, jnp.full((1, 3), -1.5), mask, 0.5).tolist()
    [[-0.25, 5.25, 0.0]]
    """
    chex.assert_equal_shape([log_prob, ref_log_prob, mask])
    chex.assert_shape(score, log_prob.shape[:-1])
    chex.assert_type(mask, bool)
    actions_left = jax.lax.cumsum(mask.astype(jnp.int32), axis=mask.ndim - 1, reverse=True)
    is_last = mask & (actions_left == 1)
    penalty = -beta * token_kl(log_prob, ref_log_prob, "k1")
    return jnp.where(mask, penalty, 0.0) + jnp.where(is_last, score[..., None], 0.0)


def leave_one_out(reward: jax.Array) -> jax.Array:
    """Advantage of each completion of a group over the mean of the others.

        A_i = r_i − (1 / (G − 1)) Σ_{j≠i} r_j

    The baseline of a completion must not contain its own reward. The mean of the *whole* group does
    and shrinks the expected gradient by (G − 1) / G, which this undoes. Dividing by the standard
    deviation of the group is another matter: it changes the objective.

    Args:
        reward: [B, G] reward of G independent completions of each of B prompts, any unit and type.
            For E[r] − β KL, it is the score less β Σ_t k1 of the completion.

    Returns:
        [B, G] advantage in the unit of the reward, floating. It sums to 0 over a group, and is
        exactly 0 where all rewards of a group are equal.

    Linear in `reward`; nothing is stopped, so treat the result as data.

    Raises:
        ValueError: G is 1, so there are no others.

    References:
        Ahmadian et al. 2024, arXiv:2402.14740 (RLOO); Kool, van Hoof and Welling 2019, Buy 4
        REINFORCE samples, get a baseline for free!

    >>> leave_one_out(jnp.array([[1.0, 2.0, 6.0]])).tolist()
    [[-3.0, -1.5, 4.5]]
    """
    chex.assert_rank(reward, 2)
    group_size = reward.shape[-1]
    if group_size < 2:
        raise ValueError(f"the group size is {group_size}; leave-one-out needs at least 2")
    reward = reward.astype(jnp.result_type(reward, float))
    # Differences from one of them are exact for equal rewards, and a mean may not be.
    difference = reward - reward[:, :1]
    others = jnp.sum(difference, -1, keepdims=True) - difference
    return difference - others / (group_size - 1)


def group_advantages(
    reward: jax.Array, scale: str = "group", eps: jax.Array | float = 1e-4
) -> jax.Array:
    """Advantage of each completion of a group over the mean of the group.

        A_i = (r_i − mean(r)) / (std + ε)

    The division weights prompts by how much their rewards *vary*, and not by how much they matter:
    a prompt that nearly always, or nearly never, succeeds counts most. It changes the objective,
    and with it the optimum. Over all completions of a batch, the standard deviation only changes
    the length of the step, and a penalty that is added afterwards then has another price in every
    update.

    Args:
        reward: [B, G] reward of G completions of each of B prompts, any unit and type.
        scale: std is that of the group for "group", that of all rewards for "batch"; "none" does
            not divide. Each is the root of Σ(r − mean)² / (n − 1). Static.
        eps: ε ≥ 0 in the unit of the reward. It bounds the advantages of a group of nearly equal
            rewards; 1e-4 is common.

    Returns:
        [B, G] advantage, floating, without a unit unless the scale is "none". It sums to 0 over a
        group, and is exactly 0 where all rewards of a group are equal. Two completions have
        ±1/√2 (for ε = 0): only the sign of their difference counts.

    The mean includes the completion itself, so "none" is (G − 1)/G times `leave_one_out`. Not for
    differentiation: treat the result as data.

    Raises:
        ValueError: G is 1, or there is no scale of that name.

    References:
        Shao et al. 2024, arXiv:2402.03300 (GRPO), for "group"; Liu et al. 2025, arXiv:2503.20783
        (Dr. GRPO), for "none"; arXiv:2508.08221 for "batch". They do not say whether std divides by
        n or by n − 1; TRL takes n − 1.

    >>> print(group_advantages(jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])).round(3))
    [[-1.  1.  0.]
     [ 0.  0.  0.]]
    """
    chex.assert_rank(reward, 2)
    group_size = reward.shape[-1]
    if group_size < 2:
        raise ValueError(f"the group size is {group_size}; a group needs at least 2")
    if scale not in SCALES:
        raise ValueError(f'scale is "{scale}"; it must be "group", "batch" or "none"')
    reward = reward.astype(jnp.result_type(reward, float))
    # Differences from one of them are exact for equal rewards, and a mean may not be.
    difference = reward - reward[:, :1]
    centred = difference - jnp.mean(difference, -1, keepdims=True)
    if scale == "none":
        return centred
    axis = -1 if scale == "group" else None
    spread = jnp.std(difference if scale == "group" else reward, axis, ddof=1, keepdims=True) + eps
    return centred / jnp.where(spread > 0.0, spread, 1.0)


def sequence_log_ratio(log_prob: jax.Array, old_log_prob: jax.Array, mask: jax.Array) -> jax.Array:
    """Log of one probability ratio for all tokens of a completion, in a form for each token (GSPO).

        log s   = mean over its tokens of log π(y_t|s_t) − log π_old(y_t|s_t)
        log s_t = stop(log s) + log π(y_t|s_t) − stop(log π(y_t|s_t))

    The *value* is log s at every token, the geometric mean of their ratios, so a completion is
    clipped as a whole. The *gradient* is that of the token's own log-probability. Averaged over the
    tokens of a completion, with one advantage for all of them, both are those of s itself. It is
    not the ratio π(y|x) / π_old(y|x) but its |y|-th root: bounds on it must be much narrower (the
    paper has 3e-4 below and 4e-4 above), and it does not make old data unbiased.

    Args:
        log_prob: [B, L] log π(y_t|s_t) under the policy being trained, in nats.
        old_log_prob: [B, L] log π_old(y_t|s_t), in nats.
        mask: [B, L] bool, True at the actions.

    Returns:
        [B, L] log s_t in nats; 0 outside the mask.

    Differentiated with respect to `log_prob`: each entry has the slope 1 in its own token.

    References:
        Zheng et al. 2025, arXiv:2507.18071, section 4: eq. 7 (GSPO) and eq. 14 (GSPO-token).

    >>> log_prob, mask = jnp.array([[-1.0, -2.0, -9.0]]), jnp.array([[True, True, False]])
    >>> sequence_log_ratio(log_prob, jnp.array([[-2.0, -2.0, -1.0]]), mask).tolist()
    [[0.5, 0.5, 0.0]]
    """
    chex.assert_equal_shape([log_prob, old_log_prob, mask])
    mean = masked_mean(log_prob - old_log_prob, mask, -1)[..., None]
    own = log_prob - jax.lax.stop_gradient(log_prob)
    return jnp.where(mask, jax.lax.stop_gradient(mean) + own, 0.0)


def vocabulary_divergence(
    log_prob: jax.Array,
    teacher_log_prob: jax.Array,
    divergence: str,
    weight: jax.Array | float = 0.5,
) -> jax.Array:
    """Exact divergence between two distributions of the next token.

        forward_kl    KL(p ‖ q) = Σ_v p (log p − log q)           p: the teacher's, q: the student's
        reverse_kl    KL(q ‖ p)
        jensen_shannon    w KL(p ‖ m) + (1 − w) KL(q ‖ m),    m = w p + (1 − w) q

    All are 0 where the two agree, and only there. They differ for a student that cannot agree:
    forward KL makes it cover whatever the teacher may say, reverse KL makes it avoid whatever the
    teacher would not say. Jensen-Shannon is bounded, by the entropy of (w, 1 − w). Divided by w, it
    tends to forward KL as w → 0; divided by 1 − w, to reverse KL as w → 1. At the ends themselves
    it is 0 and teaches nothing.

    Args:
        log_prob: [..., V] log q of the student, in nats, normalised.
        teacher_log_prob: [..., V] log p of the teacher, likewise, over the same vocabulary.
        divergence: "forward_kl", "reverse_kl" or "jensen_shannon", static.
        weight: scalar w in (0, 1), for "jensen_shannon".

    Returns:
        [...] divergence in nats, at least 0 up to rounding. Log-probabilities must be finite: an
        impossible token has a very negative one, such as −1e9, in both or in neither.

    Differentiable in both; nothing is stopped.

    Raises:
        ValueError: there is no divergence of that name.

    References:
        Agarwal et al. 2023, arXiv:2306.13649 (GKD), eq. 1 for Jensen-Shannon.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.75, 0.25]))
    >>> for name in ("forward_kl", "reverse_kl", "jensen_shannon"):
    ...     print(name, f"{vocabulary_divergence(student, teacher, name).item():.4f}")
    forward_kl 0.1308
    reverse_kl 0.1438
    jensen_shannon 0.0338
    """
    chex.assert_equal_shape([log_prob, teacher_log_prob])

    def kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)

    if divergence == "forward_kl":
        return kl(teacher_log_prob, log_prob)
    if divergence == "reverse_kl":
        return kl(log_prob, teacher_log_prob)
    if divergence == "jensen_shannon":
        own, teacher = jnp.log1p(-weight) + log_prob, jnp.log(weight) + teacher_log_prob
        mixture = jnp.logaddexp(own, teacher)
        return weight * kl(teacher_log_prob, mixture) + (1.0 - weight) * kl(log_prob, mixture)
    raise ValueError(
        f'divergence is "{divergence}"; it must be "forward_kl", "reverse_kl" or "jensen_shannon"'
    )


def log_partition(ref_log_prob: jax.Array, reward: jax.Array, beta: jax.Array | float) -> jax.Array:
    """Log of the partition function; times β, the best value that the objective can have.

        log Z_β = log Σ_y π_ref(y|x) exp(r(x, y) / β)
        β log Z_β = max over π of E[r] − β KL(π ‖ π_ref)

    The sum runs over *all* completions. A value of E[r] − β KL above β log Z_β is not a good policy
    but a mistake in its bookkeeping: a mask, a temperature, a mean instead of a sum over tokens.

    Args:
        ref_log_prob: [..., N] log π_ref(y|x) of every completion, in nats, normalised; −inf for a
            completion that the reference never gives, whose reward then does not matter.
        reward: [..., N] r(x, y), any unit.
        beta: scalar β > 0, in units of the reward per nat.

    Returns:
        [...] log Z_β, in nats.

    Differentiable in all; its gradient with respect to `reward` is π*/β.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 4 and the definition of Z below it.

    >>> half = jnp.log(jnp.array([0.5, 0.5]))
    >>> print(log_partition(half, jnp.array([0.0, 2.0 * jnp.log(3.0)]), 2.0).round(4))
    0.6931
    """
    return jax.nn.logsumexp(_tilted(ref_log_prob, reward, beta), -1)


def optimal_log_prob(
    ref_log_prob: jax.Array, reward: jax.Array, beta: jax.Array | float
) -> jax.Array:
    """Log-probabilities of the policy that maximises the KL-regularised objective.

        log π*(y|x) = log π_ref(y|x) + r(x, y) / β − log Z_β

    It never gives a completion that the reference does not give, however large its reward. As
    β → 0, it becomes the reference restricted to the best completions, not one of them alone.

    Args:
        ref_log_prob: [..., N] log π_ref(y|x) of every completion, in nats; may be −inf.
        reward: [..., N] r(x, y), any unit.
        beta: scalar β > 0, in units of the reward per nat.

    Returns:
        [..., N] log π*(y|x), in nats, normalised over the last axis.

    Differentiable in all; nothing is stopped.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 4.

    >>> half = jnp.log(jnp.array([0.5, 0.5]))
    >>> print(jnp.exp(optimal_log_prob(half, jnp.log(jnp.array([1.0, 9.0])), 2.0)).round(4))
    [0.25 0.75]
    """
    return jax.nn.log_softmax(_tilted(ref_log_prob, reward, beta), -1)


def frontier(
    ref_log_prob: jax.Array, reward: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Expected reward and divergence of the optimal policies: the best trade-off there is.

        R(β)  = mean over x of Σ_y π*_β(y|x) r(x, y)
        KL(β) = mean over x of Σ_y π*_β(y|x) log(π*_β(y|x) / π_ref(y|x))

    No policy has a larger expected reward at the same mean divergence. Where the completions cannot
    be listed, N samples of the reference stand for it, each with log-probability −log N. That curve
    holds only for KL well below log N, which is the most it can show: beyond, it follows the luck
    of the best few samples.

    Args:
        ref_log_prob: [X, N] log π_ref(y|x) of every completion of X prompts, in nats; may be −inf.
            For samples of the reference, −log N everywhere.
        reward: [X, N] r(x, y), any unit.
        beta: [K] β > 0, in units of the reward per nat.

    Returns:
        [K] expected reward, in its own unit, and [K] KL(π*_β ‖ π_ref) in nats. Both fall as β
        grows, towards the expected reward of the reference and 0.

    Differentiable in all; nothing is stopped.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 4, for π*. Ziegler et al. 2019,
        arXiv:1909.08593, figure 3, for the estimate from samples.

    >>> half = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> expected, kl = frontier(half, jnp.log(jnp.array([[1.0, 9.0]])), jnp.array([2.0, 1e6]))
    >>> print(expected.round(4), jnp.abs(kl).round(4))
    [1.6479 1.0986] [0.1308 0.    ]
    """
    chex.assert_rank([ref_log_prob, reward, beta], [2, 2, 1])

    def point(beta: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_prob = optimal_log_prob(ref_log_prob, reward, beta)
        possible = ~jnp.isneginf(ref_log_prob)
        prob = jnp.exp(log_prob)
        log_ratio = jnp.where(possible, log_prob, 0.0) - jnp.where(possible, ref_log_prob, 0.0)
        expected = jnp.sum(prob * jnp.where(possible, reward, 0.0), -1)
        return jnp.mean(expected), jnp.mean(jnp.sum(prob * log_ratio, -1))

    return jax.vmap(point)(beta)


def kl_coefficient(
    beta: jax.Array | float,
    kl: jax.Array | float,
    target: jax.Array | float,
    horizon_share: jax.Array | float,
) -> jax.Array:
    """Coefficient of the KL penalty for the next update, moved so that KL approaches a target.

        β' = β (1 + clip(KL / target − 1, −0.2, 0.2) n / horizon)

    KL is that of whole completions: summed over the tokens and averaged over the completions. Given
    a mean over tokens, the controller lets each completion drift to its length times the target.

    Args:
        beta: scalar β ≥ 0; 0 stays 0.
        kl: scalar, the mean KL(π ‖ π_ref) of the last update's completions, in nats. An estimate
            may be negative.
        target: scalar > 0, in nats; inf leaves β as it is.
        horizon_share: scalar n / horizon in [0, 1]: the completions of this update as a share of
            those over which β may change by about a fifth. The paper has 0.1.

    Returns:
        [] new coefficient, between 0.8 and 1.2 times the old.

    Not for differentiation: it is a rule of control, and β is data.

    References:
        Ziegler et al. 2019, arXiv:1909.08593, section 2.2, and their code for n / horizon
        (openai/lm-human-preferences), where n counts completions.

    >>> print(kl_coefficient(1.0, 12.0, 6.0, 0.5).round(4), kl_coefficient(1.0, 12.0, jnp.inf, 0.5))
    1.1 1.0
    """
    error = jnp.clip(kl / jnp.asarray(target) - 1.0, -0.2, 0.2)
    return beta * (1.0 + jnp.where(jnp.isinf(target), 0.0, error) * horizon_share)


def _tilted(ref_log_prob: jax.Array, reward: jax.Array, beta: jax.Array | float) -> jax.Array:
    """Unnormalised log-probabilities of the optimal policy, −inf wherever the reference has it."""
    chex.assert_equal_shape([ref_log_prob, reward])
    possible = ~jnp.isneginf(ref_log_prob)
    bonus = jnp.where(possible, reward, 0.0) / beta
    return jnp.where(possible, ref_log_prob + bonus, -jnp.inf)


def _log_odds(log_prob: jax.Array) -> jax.Array:
    """Return log p − log(1 − p), where log(1 − p) has the form that does not cancel."""
    log_prob = jnp.minimum(log_prob, -jnp.finfo(log_prob.dtype).eps)
    near_one = log_prob > -jnp.log(2.0)
    rest = jnp.where(near_one, jnp.log(-jnp.expm1(log_prob)), jnp.log1p(-jnp.exp(log_prob)))
    return log_prob - rest
