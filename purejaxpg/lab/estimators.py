"""What the laboratory compares, made of the trainers' own objectives and of the kernels.

Each estimator is the gradient of a trainer's loss with respect to the log-probabilities of the
tokens, at the policy that sampled them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from purejaxpg.kernels import preference
from purejaxpg.lab import tabular
from purejaxpg.rlhf import ppo, rloo

SUM, MEAN = "sum", "mean"  # over the tokens of each completion
REWARD, LOSS, WEIGHTED_LOSS = "reward", "loss", "ratio in loss"


@dataclasses.dataclass(frozen=True)
class Penalty:
    """An estimator of KL(π ‖ π_ref), and where it stands."""

    estimator: str  # "k1", "k2" or "k3", of `preference.token_kl`
    place: str  # in the reward, in the loss, or in the loss times the ratio π / π_old
    over: str  # the sum over a completion's tokens or their mean, of the penalty and of PPO's loss

    @property
    def name(self) -> str:
        """As in "k3 in reward"."""
        return f"{self.estimator} {'× ' if self.place == WEIGHTED_LOSS else 'in '}{self.place}"


PENALTIES = [
    Penalty(estimator, place, over)
    for over in (SUM, MEAN)
    for place, estimators in (
        (REWARD, ("k1", "k2", "k3")),
        (LOSS, ("k1", "k2", "k3")),
        (WEIGHTED_LOSS, ("k3",)),
    )
    for estimator in estimators
]


def policy_loss(
    log_prob: jax.Array,
    completions: tabular.Completions,
    reward: jax.Array,
    value: jax.Array,
    weight: jax.Array,
    gae_lambda: Any,
    divisor: jax.Array | None = None,
) -> jax.Array:
    """PPO's loss at the policy that sampled, without its value loss.

    Args:
        log_prob: [B, L] of the policy, to be differentiated.
        completions: B of them.
        reward: [B, L] of each token.
        value: [B, L] of the state before each token.
        weight: [B] probabilities, or equal.
        gae_lambda: scalar λ.
        divisor: [B] of the advantages. PPO sums over tokens, so with the lengths of the completions
            the loss is a mean over each one's own tokens.

    Returns:
        Scalar, whose negative gradient estimates that of the expected sum of the rewards.
    """
    config = ppo.Config(gae_lambda=gae_lambda, vf_coef=0.0, whiten_advantage=False)
    zeros, old = jnp.zeros_like(log_prob), lax.stop_gradient(log_prob)
    prompt_ids, ids, mask = completions.prompt_ids, completions.ids, completions.mask
    batch = ppo.Batch(prompt_ids, ids, mask, old, value, zeros, zeros, weight)
    batch = ppo.advantages(batch, reward, config)
    if divisor is not None:
        batch = dataclasses.replace(batch, advantage=batch.advantage / divisor[:, None])
    return ppo.objective(log_prob, value, batch, config)[0]


def penalised_rewards(
    log_prob: jax.Array,
    of_reference: jax.Array,
    completions: tabular.Completions,
    score_scale: float,
    beta: float,
) -> jax.Array:
    """Return the rewards of tokens for each of PENALTIES; those in the loss are not in them.

    Args:
        log_prob: [E, B, L] of the policy, one for each penalty.
        of_reference: [B, L] log-probabilities of the reference.
        completions: B of them.
        score_scale: 1, or 0 for the penalty alone.
        beta: β.

    Returns:
        [E, B, L] rewards.
    """
    score, mask = score_scale * completions.score, completions.mask

    def reward(penalty: Penalty, log_prob: jax.Array) -> jax.Array:
        k1_in_reward = penalty.place == REWARD and penalty.estimator == "k1"
        own_beta = beta if k1_in_reward else 0.0
        reward = preference.token_rewards(score, log_prob, of_reference, mask, own_beta)
        if penalty.place != REWARD or k1_in_reward:
            return reward
        kl = preference.token_kl(log_prob, of_reference, penalty.estimator)
        return reward - beta * jnp.where(mask, kl, 0.0)

    return jnp.stack(list(map(reward, PENALTIES, log_prob)))


def penalised_losses(
    log_prob: jax.Array,
    of_reference: jax.Array,
    completions: tabular.Completions,
    value: jax.Array,
    weight: jax.Array,
    score_scale: float,
    beta: float,
) -> jax.Array:
    """Return the loss for the reward less β times each of PENALTIES, with λ = 1.

    Args:
        log_prob: [E, B, L] of the policy, one for each penalty; to be differentiated.
        of_reference: [B, L] log-probabilities of the reference.
        completions: B of them.
        value: [E, B, L] of the state before each token.
        weight: [E, B] probabilities, or equal.
        score_scale: 1, or 0 for the penalty alone.
        beta: β.

    Returns:
        [E] losses, whose gradients are estimates of that of β KL − E[r].
    """
    mask, old = completions.mask, lax.stop_gradient(log_prob)
    reward = penalised_rewards(old, of_reference, completions, score_scale, beta)
    lengths = mask.sum(1)
    divisors = {SUM: jnp.ones_like(lengths), MEAN: lengths}
    divisor = jnp.stack([divisors[penalty.over] for penalty in PENALTIES])
    of_policy = jax.vmap(policy_loss, in_axes=(0, None, 0, 0, 0, None, 0))
    losses = of_policy(log_prob, completions, reward, value, weight, 1.0, divisor)

    def in_loss(penalty: Penalty, log_prob: jax.Array, weight: jax.Array) -> jax.Array:
        if penalty.place == REWARD:
            return jnp.zeros(())
        kl = preference.token_kl(log_prob, of_reference, penalty.estimator)
        if penalty.place == WEIGHTED_LOSS:
            kl = jnp.exp(log_prob - lax.stop_gradient(log_prob)) * kl
        over = preference.masked_mean if penalty.over == MEAN else preference.masked_sum
        return (weight * over(kl, mask, 1)).sum() / weight.sum()

    return losses + beta * jnp.stack(list(map(in_loss, PENALTIES, log_prob, weight)))


# -------------------------------------------------------------------------- groups and normalisers

# How a batch of groups becomes the advantages that RLOO's objective takes:
# (returns [B], mask [B, L], the group size G) -> advantages [B]. A further one, such as that of
# another trainer, needs a line in NORMALISERS and, if it is linear in the returns, one in LINEAR.
Normaliser = Callable[[jax.Array, jax.Array, int], jax.Array]


def none(total: jax.Array, mask: jax.Array, group_size: int) -> jax.Array:
    """REINFORCE: the returns themselves."""
    return rloo.advantages(total, rloo.Config(baseline="none", group_size=group_size))


def leave_one_out(total: jax.Array, mask: jax.Array, group_size: int) -> jax.Array:
    """RLOO: less the mean of the others."""
    return rloo.advantages(total, rloo.Config(group_size=group_size))


def own_mean(total: jax.Array, mask: jax.Array, group_size: int) -> jax.Array:
    """Less the mean of the whole group."""
    groups = total.reshape(-1, group_size)
    return (groups - groups.mean(1, keepdims=True)).ravel()


def group_std(total: jax.Array, mask: jax.Array, group_size: int) -> jax.Array:
    """Also divided by the group's standard deviation, with G - 1 in its denominator."""
    groups = total.reshape(-1, group_size)
    return _scaled(own_mean(total, mask, group_size), groups.std(1, keepdims=True, ddof=1))


def batch_std(total: jax.Array, mask: jax.Array, group_size: int) -> jax.Array:
    """Less the mean of the group, divided by the standard deviation of the batch."""
    return _scaled(own_mean(total, mask, group_size), total.std(keepdims=True, ddof=1)[None])


def constant_length(total: jax.Array, mask: jax.Array, group_size: int) -> jax.Array:
    """RLOO, divided by the longest length there is."""
    return leave_one_out(total, mask, group_size) / mask.shape[1]


def sequence_mean(total: jax.Array, mask: jax.Array, group_size: int) -> jax.Array:
    """RLOO, with a mean over the completion's own tokens instead of their sum."""
    return leave_one_out(total, mask, group_size) / mask.sum(1)


def token_mean(total: jax.Array, mask: jax.Array, group_size: int) -> jax.Array:
    """RLOO, with a mean over all tokens of the batch."""
    return leave_one_out(total, mask, group_size) / (mask.sum() / len(mask))


def _scaled(advantage: jax.Array, std: jax.Array) -> jax.Array:
    """Divide the advantages of each group by a standard deviation [groups or 1, 1]."""
    by_group = advantage.reshape(len(std), -1)
    return jnp.where(std > 0.0, by_group / jnp.where(std > 0.0, std, 1.0), 0.0).ravel()


NORMALISERS: dict[str, Normaliser] = {
    "none": none,
    "leave one out": leave_one_out,
    "mean incl. itself": own_mean,
    "group std": group_std,
    "batch std": batch_std,
    "constant length": constant_length,
    "sequence mean": sequence_mean,
    "token mean": token_mean,
}
# Linear in the returns of a group and symmetric: means over the pairs in it, but for a factor that
# depends on G. So pairs say everything about groups of any size.
LINEAR: dict[str, Callable[[int], float]] = {
    "leave one out": lambda group_size: 1.0,
    "mean incl. itself": lambda group_size: 2.0 * (group_size - 1) / group_size,
    "constant length": lambda group_size: 1.0,
    "sequence mean": lambda group_size: 1.0,
}
# Depend on completions of other groups, so that no group alone has a gradient.
OF_BATCH = ("batch std", "token mean")


def group_gradients(
    names: Sequence[str],
    log_prob: jax.Array,
    of_reference: jax.Array,
    completions: tabular.Completions,
    group_size: int,
    beta: float,
) -> jax.Array:
    """RLOO's gradient for a batch of groups, with the advantages of each normaliser.

    Args:
        names: E keys of NORMALISERS.
        log_prob: [B, L] of the policy.
        of_reference: [B, L] log-probabilities of the reference.
        completions: B of them; those of one prompt follow each other.
        group_size: G.
        beta: β; the penalty is in the return, as RLOO has it.

    Returns:
        [E, B, L] gradients in the log-probabilities, estimates of that of E[r] − β KL.
    """
    mask = completions.mask
    kl = preference.token_kl(log_prob, of_reference, "k1")
    total = completions.score - beta * preference.masked_sum(kl, mask, 1)

    def gradient(advantage: jax.Array) -> jax.Array:
        batch = rloo.Batch(completions.prompt_ids, completions.ids, mask, advantage)
        return -jax.grad(rloo.objective)(log_prob, batch)

    advantages = [NORMALISERS[name](total, mask, group_size) for name in names]
    return jax.vmap(gradient)(jnp.stack(advantages))
