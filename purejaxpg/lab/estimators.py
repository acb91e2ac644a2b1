"""What the laboratory compares, made of the trainers' own objectives and of the kernels.

Each estimator is the gradient of a trainer's loss with respect to the log-probabilities of the
tokens, at the policy that sampled them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from purejaxpg.kernels import preference
from purejaxpg.lab import tabular
from purejaxpg.rlhf import grpo, ppo, rloo

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
        return penalty_in_loss(penalty, log_prob, of_reference, completions, weight, beta)

    return losses + jnp.stack(list(map(in_loss, PENALTIES, log_prob, weight)))


def penalty_in_loss(
    penalty: Penalty,
    log_prob: jax.Array,
    of_reference: jax.Array,
    completions: tabular.Completions,
    weight: jax.Array,
    beta: float,
) -> jax.Array:
    """GRPO's loss without advantages: β times the divergence in the loss.

    Args:
        penalty: one whose place is the loss.
        log_prob: [B, L] of the policy, to be differentiated.
        of_reference: [B, L] log-probabilities of the reference.
        completions: B of them.
        weight: [B] probabilities, or equal.
        beta: β.

    Returns:
        Scalar. GRPO divides the sum over tokens by the longest length, which is undone here.
    """
    config = grpo.Config(
        beta=beta,
        kl_placement="loss",
        kl_estimator=penalty.estimator,
        kl_times_ratio=penalty.place == WEIGHTED_LOSS,
        normaliser="sequence" if penalty.over == MEAN else "constant",
    )
    nothing, share = jnp.zeros_like(weight), weight * len(weight) / weight.sum()
    old, ids = lax.stop_gradient(log_prob), (completions.prompt_ids, completions.ids)
    batch = grpo.Batch(*ids, completions.mask, old, of_reference, nothing, share)
    loss = grpo.objective(log_prob, batch, config)[0]
    return loss if penalty.over == MEAN else loss * log_prob.shape[1]


# ------------------------------------------------------------------------------------------ groups

# A trainer's loss of a batch of groups at the policy that sampled it. The completions of one prompt
# follow each other, G at a time: (log-probabilities [B, L], of_reference [B, L], completions [B],
# G, β) -> scalar, whose negative gradient is the estimate. Another trainer's needs a line in
# NORMALISERS and, if it is linear in the returns, one in LINEAR.
Loss = Callable[[jax.Array, jax.Array, tabular.Completions, int, float], jax.Array]


def _of_rloo(advantages: Callable[[jax.Array, int], jax.Array]) -> Loss:
    """Return RLOO's loss, with advantages [B] of the returns [B] of groups of a size."""

    def loss(
        log_prob: jax.Array,
        of_reference: jax.Array,
        completions: tabular.Completions,
        group_size: int,
        beta: float,
    ) -> jax.Array:
        mask, ids = completions.mask, (completions.prompt_ids, completions.ids)
        kl = preference.token_kl(lax.stop_gradient(log_prob), of_reference, "k1")
        total = completions.score - beta * preference.masked_sum(kl, mask, 1)
        return rloo.objective(log_prob, rloo.Batch(*ids, mask, advantages(total, group_size)))

    return loss


def _of_grpo(scale: str, normaliser: str) -> Loss:
    """Return GRPO's loss, with k1 in the reward."""

    def loss(
        log_prob: jax.Array,
        of_reference: jax.Array,
        completions: tabular.Completions,
        group_size: int,
        beta: float,
    ) -> jax.Array:
        mask, ids = completions.mask, (completions.prompt_ids, completions.ids)
        old = lax.stop_gradient(log_prob)
        config = grpo.Config(group_size=group_size, scale=scale, normaliser=normaliser, beta=beta)
        kl = preference.masked_sum(preference.token_kl(old, of_reference, "k1"), mask, 1)
        advantage = grpo.advantages(completions.score, kl, config)
        one = jnp.ones_like(advantage)
        batch = grpo.Batch(*ids, mask, old, of_reference, advantage, one)
        return grpo.objective(log_prob, batch, config)[0]

    return loss


def _own_mean(total: jax.Array, group_size: int) -> jax.Array:
    return preference.group_advantages(total.reshape(-1, group_size), "none").ravel()


def _baseline(name: str) -> Callable[[jax.Array, int], jax.Array]:
    return lambda total, size: rloo.advantages(total, rloo.Config(baseline=name, group_size=size))


NORMALISERS: dict[str, Loss] = {
    "none": _of_rloo(_baseline("none")),
    "leave one out": _of_rloo(_baseline("leave_one_out")),
    "mean incl. itself": _of_rloo(_own_mean),
    "constant length": _of_grpo("none", "constant"),
    "sequence mean": _of_grpo("none", "sequence"),
    "token mean": _of_grpo("none", "token"),
    "group std": _of_grpo("group", "constant"),
    "batch std": _of_grpo("batch", "constant"),
    "group std, sequence mean": _of_grpo("group", "sequence"),
}


def _shrunk(group_size: int) -> float:
    """(G - 1) / G, in units of the same for a pair."""
    return 2.0 * (group_size - 1) / group_size


# Linear in the returns of a group and symmetric: means over the pairs in it, but for a factor that
# depends on G. So pairs say everything about groups of any size.
LINEAR: dict[str, Callable[[int], float]] = {
    "leave one out": lambda group_size: 1.0,
    "mean incl. itself": _shrunk,
    "constant length": _shrunk,
    "sequence mean": _shrunk,
}
# Depend on completions of other groups, so that no group alone has a gradient.
OF_BATCH = ("batch std", "token mean")
