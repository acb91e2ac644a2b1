"""Samples of the best policies, π*_β proportional to π_ref exp(r / β), by importance sampling.

Samples of the reference show π*_β only near the reference: farther away, a handful of them has all
the weight. Where a reward is a sum over neighbouring tokens, a proposal q close to π*_β is known:

    q(w | y_<t) ∝ π_ref(w | y_<t) exp(r(v, w) / β + V_{t+1}(w)),        v the token before w
    V_t(v) = log Σ_w p(w | v) exp(r(v, w) / β + V_{t+1}(w))

p is the bigram model of the reference, so V is not exact, but the weights π_ref exp(r / β) / q are:
the estimates stay right, and the more the reference looks at the last token only, the better they
are. This is a twisted proposal: Zhao et al. 2024, arXiv:2404.17546, section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax, nn, random

from purejaxpg.kernels import preference
from purejaxpg.rlhf import generate, tasks, tokens, transformer

SAMPLES = 256  # of the proposal, for each prompt and β
BIGRAM_SAMPLES = 64  # of the reference, for each prompt


@functools.partial(jax.jit, static_argnums=3)
def frontier(
    key: jax.Array,
    reference: transformer.Model,
    prompt_ids: jax.Array,
    task: tasks.Task,
    temperature: jax.Array | float,
    betas: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Estimate expected reward and divergence of the best policies.

    Args:
        key: for the samples; all β share it, so that neighbours differ little.
        reference: the language model.
        prompt_ids: [X, P] int32.
        task: with `additive`. Static.
        temperature: of the reference, positive.
        betas: [K] positive.

    Returns:
        [X, K] expected reward, [X, K] divergence in nats, and [X, K] the number of samples that
        count, 1 / Σ w² of the normalised weights.
    """
    key_bigram, key_sample = random.split(key)
    follow = bigram(key_bigram, reference, prompt_ids, task, temperature)
    ids = jnp.repeat(prompt_ids, SAMPLES, axis=0)

    def point(beta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        bonus = bonuses(follow, task, beta)
        completion = generate.complete(key_sample, reference, ids, task, temperature, bonus)
        logits = tokens.before(reference, ids, completion.ids, task.pad_id)
        log_ratio = tokens.log_probs(logits, completion.ids, temperature) - completion.log_prob
        reward = task.reward(ids, completion.ids, completion.mask)
        log_weight = preference.masked_sum(log_ratio, completion.mask, 1) + reward / beta
        log_weight, reward = (x.reshape(-1, SAMPLES) for x in (log_weight, reward))
        weight = nn.softmax(log_weight)
        expected = (weight * reward).sum(1)
        log_partition = nn.logsumexp(log_weight, 1) - jnp.log(SAMPLES)
        return expected, expected / beta - log_partition, 1 / jnp.square(weight).sum(1)

    expected, kl, effective = lax.map(point, betas)
    return expected.T, kl.T, effective.T


def bigram(
    key: jax.Array,
    reference: transformer.Model,
    prompt_ids: jax.Array,
    task: tasks.Task,
    temperature: jax.Array | float,
) -> jax.Array:
    """Return the mean distribution of the reference after each token -> log-probs [V, V]."""
    ids = jnp.repeat(prompt_ids, BIGRAM_SAMPLES, axis=0)
    completion = generate.complete(key, reference, ids, task, temperature)
    logits = tokens.before(reference, ids, completion.ids, task.pad_id)
    before = jnp.concatenate([ids[:, -1:], completion.ids[:, :-1]], axis=1)
    is_last = nn.one_hot(before, len(task.words)) * completion.mask[..., None]
    total = jnp.einsum("blv,blw->vw", is_last, nn.softmax(logits / temperature))
    # A token that was never seen is followed by any.
    return jnp.log(total + 1e-6) - jnp.log((total + 1e-6).sum(1, keepdims=True))


def bonuses(follow: jax.Array, task: tasks.Task, beta: jax.Array) -> jax.Array:
    """Return r(v, w) / β + V(w) for every step, token v and next token w -> [L, V, V]."""
    assert task.additive is not None
    token_reward, unfinished = task.additive
    is_end = jnp.arange(len(task.words)) == task.eos_id

    def step(value: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        bonus = jnp.asarray(token_reward) / beta + jnp.where(is_end, 0.0, value)
        return nn.logsumexp(follow + bonus, axis=1), bonus

    # What the words before were worth is lost without an end, so this value is approximate, too.
    last = jnp.full(len(task.words), unfinished / beta)
    return lax.scan(step, last, length=task.completion_length, reverse=True)[1]
