"""Answers that are right or wrong, and their steps: pass@k, the best of n, process rewards.

Shapes use B for completions, L for their length in tokens, N for all completions of a prompt.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np


def pass_at_k(num_right: jax.Array, num_samples: int, k: int) -> jax.Array:
    """Unbiased estimate of the probability that one or more of k completions are right.

        1 − C(n − c, k) / C(n, k) = 1 − Π_{i<k} (n − c − i) / (n − i)

    of n samples of a prompt, c of them right: the share of all sets of k samples that have a right
    one. The obvious 1 − (1 − c/n)^k is too low on average.

    Args:
        num_right: [...] c, from 0 to n.
        num_samples: n, static.
        k: static, from 1 to n.

    Returns:
        [...] probability; for k = 1 it is c/n. Average it over prompts.

    Raises:
        ValueError: k is more than n.

    References:
        Chen et al. 2021, arXiv:2107.03374, section 2.1.

    >>> pass_at_k(jnp.array([0, 1, 3, 4]), num_samples=4, k=2).tolist()
    [0.0, 0.5, 1.0, 1.0]
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}; it must be from 1 to the number of samples, {num_samples}")
    wrong = num_samples - jnp.asarray(num_right)
    all_wrong = jnp.ones(wrong.shape)
    for i in range(k):  # a factor is 0 as soon as no wrong sample is left
        all_wrong *= (wrong - i) / (num_samples - i)
    return 1.0 - all_wrong


def best_of_n_log_prob(ref_log_prob: jax.Array, reward: jax.Array, n: int) -> jax.Array:
    """Log-probability of each completion to be the best of n samples of the reference.

        π_n(y) = (F(y)^n − F⁻(y)^n) π_ref(y) / (F(y) − F⁻(y))

    where F(y) is the probability that a sample's reward is at most r(y), and F⁻(y) that it is less.
    Ties are broken at random, so completions of equal reward keep their proportions. Its divergence
    from the reference is at most log n − (n − 1)/n, and less wherever single completions have
    much probability. The bound is often taken for the divergence itself.

    Args:
        ref_log_prob: [..., N] log π_ref(y) of every completion, in nats, normalised; may be −inf.
        reward: [..., N] r(y), any unit.
        n: number of samples, static, 1 or more.

    Returns:
        [..., N] log π_n(y), in nats, normalised.

    References:
        Beirami et al. 2024, arXiv:2401.01879, sections 2 and 3.

    >>> log_prob = jnp.log(jnp.array([0.25, 0.5, 0.25]))
    >>> print(jnp.exp(best_of_n_log_prob(log_prob, jnp.array([1.0, 0.0, 1.0]), 2)))
    [0.375 0.25  0.375]
    """
    chex.assert_equal_shape([ref_log_prob, reward])

    def of_prompt(ref_log_prob: jax.Array, reward: jax.Array) -> jax.Array:
        order = jnp.argsort(reward)
        rising = reward[order]
        level = jnp.cumsum(jnp.append(False, rising[1:] != rising[:-1]))
        prob = jnp.exp(ref_log_prob)
        mass = jnp.zeros_like(prob).at[level].add(prob[order])  # of each reward
        below = jnp.cumsum(mass) - mass
        up_to = below + mass
        # F^n − F⁻^n = F^n (1 − (1 − m/F)^n), which neither underflows nor cancels.
        share = mass / jnp.where(up_to > 0, up_to, 1.0)
        gain = n * jnp.log(up_to) + jnp.log(-jnp.expm1(n * jnp.log1p(-share))) - jnp.log(mass)
        own = jnp.zeros_like(level).at[order].set(level)
        possible = ~jnp.isneginf(ref_log_prob)
        return jnp.where(possible, ref_log_prob + gain[own], -jnp.inf)

    return jnp.vectorize(of_prompt, signature="(n),(n)->(n)")(ref_log_prob, reward)


def best_of_n(value: jax.Array, reward: jax.Array, n: int) -> jax.Array:
    """Unbiased estimate of the mean value of the best of n completions, chosen by their reward.

        Σ_i C(i − 1, n − 1) / C(N, n) v_i,      v_i of the completion with the i-th lowest reward

    of N samples of a prompt: the mean over all sets of n of them. Choosing n with replacement
    instead would choose worse on average, because the same completion may be drawn twice. Where
    rewards are equal, the later completion counts as the better one, which is as good as a draw.

    Args:
        value: [..., N] what is averaged, such as the gold reward; any unit.
        reward: [..., N] what decides, such as that of a reward model; any unit.
        n: static, from 1 to N.

    Returns:
        [...] estimate, in the unit of the values. Average it over prompts.

    Differentiable in `value`; nothing is stopped.

    Raises:
        ValueError: n is more than N.

    References:
        Nakano et al. 2021, arXiv:2112.09332, appendix I.

    >>> gold, proxy = jnp.array([4.0, 1.0, 2.0]), jnp.array([0.1, 0.3, 0.2])
    >>> [round(best_of_n(gold, proxy, n).item(), 4) for n in (1, 2, 3)]
    [2.3333, 1.3333, 1.0]
    """
    chex.assert_equal_shape([value, reward])
    count = reward.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}; it must be from 1 to the number of samples, {count}")
    # Of a set in which the sample with `below` others beneath it is the best.
    below = np.arange(count)
    ratio = np.maximum(below[1:] - n + 1, 0) / below[1:]
    weight = n / count * np.append(np.cumprod(ratio[::-1])[::-1], 1.0)
    rising = jnp.take_along_axis(value, jnp.argsort(reward, axis=-1), axis=-1)
    return rising @ jnp.asarray(weight, rising.dtype)


def until_mistake(ends: jax.Array, right: jax.Array) -> jax.Array:
    """Return the steps whose labels count: those up to the first mistake, inclusive.

    After a mistake, it is unclear what a right step is; labels for it need not exist.

    Args:
        ends: [..., L] bool, the last token of each step.
        right: [..., L] bool, whether the step that ends there is right.

    Returns:
        [..., L] bool, a part of `ends`.

    References:
        Lightman et al. 2023, arXiv:2305.20050, section 2.6.

    >>> ends = jnp.array([True, False, True, True])
    >>> until_mistake(ends, jnp.array([True, False, False, True])).tolist()
    [True, False, True, False]
    """
    chex.assert_equal_shape([ends, right])
    mistake = ends & ~right
    return ends & (jnp.cumsum(mistake, axis=-1) - mistake == 0)


def step_reward(logit: jax.Array, ends: jax.Array, aggregation: str) -> jax.Array:
    """Reward of a completion, from the probabilities that its steps are right.

        product    Π_t p_t, the probability that all steps are right
        minimum    min_t p_t, that of the weakest step
        last       p_T, that of the last step alone

    where p = σ(logit) at the last token of each step. The product falls with every further step,
    so it favours short completions unless stopping early counts as a mistake.

    Args:
        logit: [..., L] log-odds that the step which ends there is right.
        ends: [..., L] bool, the last token of each step; at least one.
        aggregation: "product", "minimum" or "last", static.

    Returns:
        [...] reward in [0, 1].

    Differentiable in `logit`; nothing is stopped. What is not at an end has no effect.

    Raises:
        ValueError: there is no aggregation of that name.

    References:
        Lightman et al. 2023, arXiv:2305.20050, section 2.6 (product) and appendix F.2 (minimum).

    >>> logit, ends = jnp.log(jnp.array([[3.0, 99.0, 1.0]])), jnp.array([[True, False, True]])
    >>> for name in ("product", "minimum", "last"):
    ...     print(name, step_reward(logit, ends, name).round(4))
    product [0.375]
    minimum [0.5]
    last [0.5]
    """
    chex.assert_equal_shape([logit, ends])
    log_prob = jnp.where(ends, jax.nn.log_sigmoid(jnp.where(ends, logit, 0.0)), 0.0)
    if aggregation == "product":
        return jnp.exp(jnp.sum(log_prob, -1))
    if aggregation == "minimum":
        return jnp.exp(jnp.min(log_prob, -1))
    if aggregation == "last":
        steps_left = jax.lax.cumsum(ends.astype(jnp.int32), axis=ends.ndim - 1, reverse=True)
        return jnp.exp(jnp.sum(jnp.where(steps_left == 1, log_prob, 0.0), -1))
    raise ValueError(f'aggregation is "{aggregation}"; it must be "product", "minimum" or "last"')
