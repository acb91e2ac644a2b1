"""Positions, masks and log-probabilities of sequences of tokens.

A sequence is a prompt, padded on the left, followed by a completion, padded on the right. Its
*segments* say what belongs together: 0 is padding, and tokens attend only to earlier tokens of the
same positive segment. A packed row holds several documents as segments 1, 2, ...

Masks come from positions, never from the ids inside: a completion ends with its first end token,
and a prompt begins with its first token that is not padding.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import lax, nn

Function = Callable[[jax.Array, jax.Array], jax.Array]  # such as `transformer.Model`


def segments(prompt_ids: jax.Array, completion_length: int, pad_id: int) -> jax.Array:
    """Return the segments of prompts with their completions.

    Args:
        prompt_ids: [B, P] int32, padded on the left.
        completion_length: L.
        pad_id: the token that pads the prompts.

    Returns:
        [B, P+L] int32: 0 at the padding of the prompt and 1 elsewhere. What follows the end of a
        completion counts as part of it; causal attention keeps it from everything that matters.
    """
    prompt = (jnp.cumsum(prompt_ids != pad_id, axis=1) > 0).astype(jnp.int32)
    return jnp.pad(prompt, ((0, 0), (0, completion_length)), constant_values=1)


def positions(segments: jax.Array) -> jax.Array:
    """Return the position of each token in its own segment, from 0.

    Args:
        segments: [B, S] int32; each segment is contiguous.

    Returns:
        [B, S] int32. Extra padding on the left changes no position of a prompt.
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return index - lax.cummax(jnp.where(segments != before, index, 0), axis=1)


def attention_mask(segments: jax.Array, start: jax.Array | int, length: int) -> jax.Array:
    """Return which tokens each of `length` tokens, from index `start` on, attends to.

    Args:
        segments: [B, S] int32.
        start: index of the first of the attending tokens.
        length: T, their number.

    Returns:
        [B, T, S] bool: earlier or the same token, same segment, no padding.
    """
    index = jnp.arange(segments.shape[1])
    own = lax.dynamic_slice_in_dim(segments, start, length, axis=1)[:, :, None]
    causal = index <= start + jnp.arange(length)[:, None]
    return causal & (own == segments[:, None, :]) & (own > 0)


def completion_mask(completion_ids: jax.Array, eos_id: int) -> jax.Array:
    """Return which tokens belong to a completion: all up to its first end token, inclusive.

    Args:
        completion_ids: [..., L].
        eos_id: id of the end token.

    Returns:
        [..., L] bool, True everywhere if there is no end token.
    """
    ends = completion_ids == eos_id
    return jnp.cumsum(ends, axis=-1) - ends == 0


def finished(completion_ids: jax.Array, eos_id: int) -> jax.Array:
    """Return whether a completion has an end token: [..., L] -> [...] bool."""
    return (completion_ids == eos_id).any(axis=-1)


def at_last(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the value at the last True of a mask.

    Args:
        values: [..., L].
        mask: [..., L] bool, with at least one True.

    Returns:
        [...] values.
    """
    chex.assert_equal_shape([values, mask])
    last = mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
    return jnp.take_along_axis(values, last[..., None], axis=-1)[..., 0]


def log_probs(
    logits: jax.Array, token_ids: jax.Array, temperature: jax.Array | float = 1.0
) -> jax.Array:
    """Return the log-probability of each token.

        log p = logits_y / τ − log Σ_v exp(logits_v / τ)

    The temperature must be the sampler's everywhere: in the policy, the old policy and the
    reference. Otherwise the ratio does not start at 1, and the divergence is not a divergence.

    Args:
        logits: [..., V], which predict `token_ids`: the output one index earlier.
        token_ids: [...] int32.
        temperature: scalar τ, positive.

    Returns:
        [...] log-probability in nats.
    """
    log_p = nn.log_softmax(logits / temperature)
    return jnp.take_along_axis(log_p, token_ids[..., None], axis=-1)[..., 0]


def before(
    model: Function, prompt_ids: jax.Array, completion_ids: jax.Array, pad_id: int
) -> jax.Array:
    """Return the outputs of a model before each token of a completion.

    The output at an index has seen the token there. What predicts a token, or values the state in
    which it was chosen, is the output one index earlier.

    Args:
        model: (ids [B, S], segments [B, S]) -> [B, S, ...].
        prompt_ids: [B, P] int32, padded on the left.
        completion_ids: [B, L] int32.
        pad_id: the token that pads the prompts.

    Returns:
        [B, L, ...]: logits of the completion's tokens, or values of the states before them.
    """
    return _outputs(model, prompt_ids, completion_ids, pad_id)[:, prompt_ids.shape[1] - 1 : -1]


def after(
    model: Function, prompt_ids: jax.Array, completion_ids: jax.Array, pad_id: int
) -> jax.Array:
    """Return the outputs of a model after each token of a completion.

    Args:
        model: (ids [B, S], segments [B, S]) -> [B, S, ...], such as a reward model.
        prompt_ids: [B, P] int32, padded on the left.
        completion_ids: [B, L] int32.
        pad_id: the token that pads the prompts.

    Returns:
        [B, L, ...]: what the model says of the completion up to each token, inclusive.
    """
    return _outputs(model, prompt_ids, completion_ids, pad_id)[:, prompt_ids.shape[1] :]


def at_end(
    model: Function,
    prompt_ids: jax.Array,
    completion_ids: jax.Array,
    mask: jax.Array,
    pad_id: int,
) -> jax.Array:
    """Return the output of a model at the last token of each completion.

    Args:
        model: (ids [B, S], segments [B, S]) -> [B, S], such as a reward model.
        prompt_ids: [B, P] int32, padded on the left.
        completion_ids: [B, L] int32.
        mask: [B, L] bool, as `completion_mask` returns it.
        pad_id: the token that pads the prompts.

    Returns:
        [B] scores.
    """
    return at_last(after(model, prompt_ids, completion_ids, pad_id), mask)


def _outputs(
    model: Function, prompt_ids: jax.Array, completion_ids: jax.Array, pad_id: int
) -> jax.Array:
    ids = jnp.concatenate([prompt_ids, completion_ids], axis=1)
    return model(ids, segments(prompt_ids, completion_ids.shape[1], pad_id))
