"""Sampling, training and padding agree: one model, whichever way its tokens are computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import random

from purejaxpg import InputError
from purejaxpg.rlhf import generate, tasks, tokens, transformer

TASK = tasks.make("sentiment")
KINDS = {
    "default": {},
    "gpt2": {"norm": "layer", "mlp": "gelu", "bias": "all"},
    "llama": {"positions": "rotary", "mlp": "silu_gated", "num_kv_heads": 1, "tied": False},
    "qwen3": {"positions": "rotary", "mlp": "silu_gated", "bias": "qkv", "qk_norm": True},
}


def perturbed(key, model):
    """Move every parameter: zero biases and unit norms would hide mistakes."""
    leaves, structure = jax.tree.flatten(model)
    keys = random.split(key, len(leaves))
    moved = [x + 0.1 * random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    sizes = {"vocab_size": len(TASK.words), "context": 20, "suppressed": TASK.suppressed}
    architecture = transformer.Architecture(**sizes, **KINDS[request.param])
    transformer.check(architecture)
    return perturbed(random.key(1), transformer.init(random.key(0), architecture))


def sampled(model, temperature=0.7, **options):
    prompt_ids = TASK.prompts(random.key(2), 16)
    make = jax.jit(
        lambda key, model: generate.generate(
            key, model, prompt_ids, 16, eos_id=2, pad_id=0, temperature=temperature, **options
        )
    )
    return prompt_ids, make(random.key(3), model)


def log_probs(model, prompt_ids, ids, temperature=0.7):
    return tokens.log_probs(tokens.before(model, prompt_ids, ids, 0), ids, temperature)


def test_cached_sampling_and_whole_sequences_have_the_same_log_probs(model):
    prompt_ids, completion = sampled(model)
    whole = log_probs(model, prompt_ids, completion.ids)
    np.testing.assert_allclose(
        np.where(completion.mask, whole, 0.0), completion.log_prob, rtol=0, atol=1e-5
    )
    assert completion.mask.any(0)[8]  # some completions are long enough to use the cache


def test_padding_on_the_left_and_tokens_after_the_end_change_nothing(model):
    prompt_ids, completion = sampled(model)
    mask, ids = completion.mask, completion.ids
    expected = jnp.where(mask, log_probs(model, prompt_ids, ids), 0.0)
    padded = jnp.pad(prompt_ids, ((0, 0), (3, 0)))
    noise = jnp.where(mask, ids, random.randint(random.key(4), ids.shape, 3, len(TASK.words)))
    for other in (log_probs(model, padded, ids), log_probs(model, prompt_ids, noise)):
        np.testing.assert_allclose(jnp.where(mask, other, 0.0), expected, rtol=0, atol=1e-5)


def test_completions_end_once_and_are_padded_after_it(model):
    _, completion = sampled(model)
    ids, mask = np.asarray(completion.ids), np.asarray(completion.mask)
    np.testing.assert_array_equal(mask, tokens.completion_mask(completion.ids, 2))
    assert (ids[~mask] == 0).all() and (ids[mask] > 1).all()
    assert (np.asarray(completion.log_prob)[~mask] == 0).all()


def test_packed_documents_have_the_outputs_that_they_have_alone(model):
    first, second = random.randint(random.key(5), (2, 1, 6), 3, len(TASK.words))
    ones = jnp.ones((1, 6), jnp.int32)
    packed = model(jnp.hstack([first, second]), jnp.hstack([ones, 2 * ones]))
    alone = jnp.hstack([model(first, ones), model(second, ones)])
    np.testing.assert_allclose(packed, alone, rtol=0, atol=1e-4)


def test_truncation_renormalises_and_keeps_the_most_probable():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    for kept, options in (
        (2, (2, 1.0)),
        (2, (0, 0.7)),
        (1, (0, 0.1)),
        (4, (0, 1.0)),
        (4, (9, 1.0)),
    ):
        probability = jax.nn.softmax(generate.truncated(logits, *options))
        expected = np.array([0.5, 0.3, 0.15, 0.05]) * (np.arange(4) < kept)
        np.testing.assert_allclose(probability, expected / expected.sum(), atol=1e-6)


def test_samples_follow_the_enumerated_probabilities():
    task = tasks.make("enumerable-3-3")
    sizes = {"vocab_size": len(task.words), "context": 6, "width": 8, "num_layers": 1}
    architecture = transformer.Architecture(**sizes, suppressed=task.suppressed)
    model = transformer.init(random.key(0), architecture)
    every, count = jnp.asarray(task.completion_ids), 20_000
    prompt_ids = jnp.broadcast_to(task.prompt_ids[1], (count, 3))
    mask = tokens.completion_mask(every, 2)
    log_prob = log_probs(model, prompt_ids[: len(every)], every, 1.0)
    probability = np.exp(jnp.where(mask, log_prob, 0.0).sum(1), dtype=np.float64)
    np.testing.assert_allclose(probability.sum(), 1.0, atol=1e-5)
    completion = generate.generate(random.key(1), model, prompt_ids, 3, eos_id=2, pad_id=0)
    code = lambda ids: np.asarray(ids) @ np.array([100, 10, 1])  # noqa: E731
    seen = (code(completion.ids)[:, None] == code(every)).sum(0)
    assert seen.sum() == count
    expected = probability / probability.sum() * count
    assert scipy.stats.chisquare(seen, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": "batch"}, "norm must be one of"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads"),
        ({"positions": "rotary", "head_dim": 5}, "head_dim must be even"),
        ({"width": 0}, "width must be 1 or more"),
    ],
)
def test_an_impossible_architecture_is_refused(change, words):
    architecture = transformer.Architecture(vocab_size=4, context=4)
    with pytest.raises(InputError, match=words):
        transformer.check(dataclasses.replace(architecture, **change))
