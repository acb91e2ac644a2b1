"""Sampling of completions from a language model, of a fixed length inside one program.

A loop of fixed length with a mask is what vmap needs: a loop that ends with the last completion
would run as long as the slowest row of a batch anyway.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax, nn, random

from purejaxpg.rlhf import tasks, tokens, transformer


@struct.dataclass
class Completion:
    """Sampled completions of B prompts."""

    ids: jax.Array  # [B, L] int32, padding after the end token
    mask: jax.Array  # [B, L] bool, True up to the end token, inclusive
    log_prob: jax.Array  # [B, L] of the distribution that was sampled; 0 outside the mask


def generate(
    key: jax.Array,
    model: transformer.Model,
    prompt_ids: jax.Array,
    length: int,
    *,
    eos_id: int,
    pad_id: int,
    temperature: jax.Array | float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    bonus: jax.Array | None = None,
) -> Completion:
    """Sample completions of at most `length` tokens.

    The log-probabilities belong to the distribution that was sampled: after temperature and after
    truncation, renormalised. A trainer that samples truncated must truncate in its loss as well,
    or its data are off-policy; the trainers of this package do not truncate.

    Args:
        key: for all tokens.
        model: whose outputs are tokens.
        prompt_ids: [B, P] int32, padded on the left.
        length: L.
        eos_id: the token that ends a completion.
        pad_id: the token that fills the rest.
        temperature: scalar τ, positive; logits are divided by it.
        top_k: sample among the k most probable tokens; 0: among all. Static.
        top_p: sample among the most probable tokens whose probabilities reach p together; 1: among
            all. Static.
        greedy: take the most probable token.
        bonus: [L, V, V] added to the logits of each step, for the token before and the next one.

    Returns:
        Completions [B, L].
    """
    start = prompt_ids.shape[1]
    segments = tokens.segments(prompt_ids, length, pad_id)

    def forward(ids: jax.Array, cache: Any, at: Any) -> tuple[jax.Array, Any]:
        logits, cache = model.apply(ids, segments, cache, at)
        added = 0.0 if bonus is None else bonus[at + ids.shape[1] - start, ids[:, -1]]
        return truncated(logits[:, -1] / temperature + added, top_k, top_p), cache

    def choose(key: jax.Array, logits: jax.Array, alive: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = logits.argmax(-1) if greedy else random.categorical(key, logits)
        log_prob = jnp.where(alive, tokens.log_probs(logits, chosen), 0.0)
        return jnp.where(alive, chosen, pad_id).astype(jnp.int32), log_prob

    def step(carry: Any, now: Any) -> Any:
        (logits, cache, alive), (at, key) = carry, now
        ids, log_prob = choose(key, logits, alive)
        logits, cache = forward(ids[:, None], cache, at)
        return (logits, cache, alive & (ids != eos_id)), (ids, alive, log_prob)

    keys = random.split(key, length)
    cache = transformer.empty_cache(model, *segments.shape)
    carry = (*forward(prompt_ids, cache, 0), jnp.ones(len(prompt_ids), bool))
    (logits, _, alive), outputs = lax.scan(step, carry, (start + jnp.arange(length - 1), keys[:-1]))
    ids, log_prob = choose(keys[-1], logits, alive)  # needs no forward pass of its own
    columns = jax.tree.map(lambda x, last: jnp.vstack([x, last]).T, outputs, (ids, alive, log_prob))
    return Completion(*columns)


def complete(
    key: jax.Array,
    model: transformer.Model,
    prompt_ids: jax.Array,
    task: tasks.Task,
    temperature: jax.Array | float,
    bonus: jax.Array | None = None,
) -> Completion:
    """Sample one completion of each prompt of a task [B, P] -> Completion [B, L]."""
    return generate(
        key,
        model,
        prompt_ids,
        task.completion_length,
        eos_id=task.eos_id,
        pad_id=task.pad_id,
        temperature=temperature,
        bonus=bonus,
    )


def truncated(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Make all but the most probable tokens impossible.

    Args:
        logits: [..., V].
        top_k: keep this many tokens; 0: all. Static.
        top_p: keep the fewest tokens whose probabilities, added up, reach this; 1: all. Static.

    Returns:
        [..., V] logits; at equal probability all are kept. The most probable token always is.

    References:
        Holtzman et al. 2019, arXiv:1904.09751, section 3.1, for top-p.
    """
    if top_k > 0:
        least = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= least, logits, transformer.IMPOSSIBLE)
    if top_p < 1.0:
        descending = jnp.sort(logits, axis=-1)[..., ::-1]
        before = jnp.cumsum(nn.softmax(descending), axis=-1) - nn.softmax(descending)
        count = jnp.maximum((before < top_p).sum(-1, keepdims=True), 1)
        least = jnp.take_along_axis(descending, count - 1, axis=-1)
        logits = jnp.where(logits >= least, logits, transformer.IMPOSSIBLE)
    return logits
