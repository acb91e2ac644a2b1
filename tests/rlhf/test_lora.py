"""Adapters: beside the model, merged into it, alone and many at once, they compute the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.rlhf import generate, hf, lora, tokens, transformer

SIZES = {
    "vocab_size": 11, "context": 12, "width": 16, "mlp_width": 24, "head_dim": 8, "num_layers": 1,
}  # fmt: skip
KINDS = {
    "gpt2": {"norm": "layer", "mlp": "gelu", "bias": "all"},
    "llama": {"positions": "rotary", "mlp": "silu_gated", "num_kv_heads": 1, "tied": False},
}
IDS = np.random.default_rng(0).integers(1, 11, (3, 8)).astype(np.int32)
SEGMENTS = np.array([[1] * 8, [0] * 3 + [1] * 5, [1] * 4 + [2] * 4], np.int32)


@pytest.fixture(params=KINDS)
def base(request):
    return transformer.init(
        random.key(0), transformer.Architecture(**SIZES, **KINDS[request.param])
    )


def trained(model, seed=1, rank=3, modules=lora.MODULES):
    """An adapter whose B is not 0."""
    adapter = lora.init(random.key(seed), model, rank, modules)
    leaves, structure = jax.tree.flatten(adapter)
    keys = random.split(random.key(seed + 100), len(leaves))
    moved = [x + 0.1 * random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


@jax.jit
def forward(model):
    return model(IDS, SEGMENTS)


def nll(adapter, model, scale=0.7, ids=IDS, segments=SEGMENTS):
    logits = lora.attach(model, adapter, scale)(ids, segments)[:, :-1]
    return -tokens.log_probs(logits, ids[:, 1:])[segments[:, :-1] > 0].mean()


gradient_of = jax.jit(jax.value_and_grad(nll))


def test_a_new_adapter_changes_nothing(base):
    new = lora.attach(base, lora.init(random.key(1), base, 3))
    np.testing.assert_array_equal(forward(new), forward(base))
    _, gradient = gradient_of(lora.init(random.key(1), base, 3), base)
    for layer in gradient.values():
        for module in layer.values():
            assert np.abs(module["a"]).max() == 0 < np.abs(module["b"]).max()


@pytest.mark.parametrize("modules", [lora.MODULES, ("qkv",), ("down", "out")], ids="+".join)
def test_merged_is_the_adapter_beside(base, modules):
    adapter = trained(base, modules=modules)
    used = {name for layer in adapter.values() for name in layer}
    assert used == set(modules) & set(base.params["layer_0"])
    beside = lora.attach(base, adapter, 0.7)
    merged = lora.merge(beside)
    assert merged.adapter is None and jax.tree.all(
        jax.tree.map(lambda a, b: a.shape == b.shape, merged.params, base.params)
    )
    wanted = forward(beside)
    assert np.abs(wanted - forward(base)).max() > 0.01
    np.testing.assert_allclose(forward(merged), wanted, rtol=0, atol=1e-5)


def test_a_merged_matrix_is_what_the_formula_says(base):
    adapter = trained(base)
    merged = lora.merge(lora.attach(base, adapter, 0.7)).params["layer_0"]["qkv"]["kernel"]
    own = {k: np.asarray(v, np.float64) for k, v in adapter["layer_0"]["qkv"].items()}
    weights = np.asarray(base.params["layer_0"]["qkv"]["kernel"], np.float64)
    np.testing.assert_allclose(merged, weights + 0.7 * own["a"] @ own["b"], rtol=0, atol=1e-6)


def test_many_adapters_at_once_are_each_by_itself(base):
    adapters = [trained(base, seed) for seed in range(3)]
    scales = jnp.array([0.5, 1.0, 2.0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
    together = jax.jit(jax.vmap(gradient_of, in_axes=(0, None, 0)))(stacked, base, scales)
    for i, adapter in enumerate(adapters):
        alone = gradient_of(adapter, base, scales[i])
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
            jax.tree.map(lambda x, i=i: x[i], together),
            alone,
        )


def test_the_model_is_in_memory_once():
    """Six adapters more need their own size, and together less than one more model would."""
    sizes = {**SIZES, "width": 256, "mlp_width": 1024}
    model = transformer.init(random.key(0), transformer.Architecture(**sizes, **KINDS["llama"]))
    adapter = lora.init(random.key(0), model, 2)
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    used = {}
    for count in (2, 8):
        many = jax.tree.map(lambda x, n=count: jnp.stack([x] * n), adapter)
        short = functools.partial(nll, ids=IDS[:1, :4], segments=SEGMENTS[:1, :4])
        step = jax.jit(jax.vmap(jax.grad(short), in_axes=(0, None)))
        used[count] = step.lower(many, model).compile().memory_analysis()
        arguments = used[count].argument_size_in_bytes
        assert 0 <= arguments - bytes_of(model) - bytes_of(many) < 4096
    grown = used[8].temp_size_in_bytes - used[2].temp_size_in_bytes
    assert 0 < grown < bytes_of(model)


def test_sampling_with_an_adapter_is_sampling_from_the_merged_model(base):
    beside = lora.attach(base, trained(base), 0.7)
    sample = functools.partial(
        generate.generate, prompt_ids=jnp.asarray(IDS), length=4, eos_id=-1, pad_id=0
    )
    sample = jax.jit(sample)
    ours, merged = (sample(random.key(5), model=m) for m in (beside, lora.merge(beside)))
    np.testing.assert_array_equal(ours.ids, merged.ids)
    np.testing.assert_allclose(ours.log_prob, merged.log_prob, rtol=0, atol=1e-5)


def test_computing_activations_again_changes_no_gradient(base):
    adapter = trained(base)
    again = base.replace(architecture=dataclasses.replace(base.architecture, remat=True))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6),
        gradient_of(adapter, again),
        gradient_of(adapter, base),
    )


def test_computing_activations_again_keeps_fewer_of_them():
    """Of each layer its input, besides parameters."""
    ids = np.ones((16, 12), np.int32)

    def kept(remat):
        sizes = {**SIZES, "num_layers": 4, "remat": remat}
        model = transformer.init(random.key(0), transformer.Architecture(**sizes, **KINDS["llama"]))

        def forward(params):
            return model.replace(params=params)(ids, ids)

        pull = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], model.params)
        shapes = [x.shape for x in jax.tree.leaves(pull) if x.shape[:1] == (16,)]
        return sum(int(np.prod(shape)) for shape in shapes)

    assert 3 * kept(True) < kept(False)


def losses_of(model):
    """Train an adapter -> losses, adapter."""
    adapter = lora.init(random.key(1), model, 3)
    optimizer = optax.adam(0.02)
    state, losses = optimizer.init(adapter), []
    for _ in range(40):
        value, gradient = gradient_of(adapter, model)
        assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
        change, state = optimizer.update(gradient, state)
        adapter = optax.apply_updates(adapter, change)
        losses.append(float(value))
    return np.array(losses), adapter


def test_a_model_in_half_precision_trains_an_adapter_in_single(base):
    half = base.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params))
    losses, adapter = losses_of(half)
    single, _ = losses_of(base)
    assert single[-1] < single[0] - 0.4
    np.testing.assert_allclose(losses, single, rtol=0, atol=0.05)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    assert lora.merge(lora.attach(half, adapter)).dtype == jnp.bfloat16


def test_wrong_arguments_are_refused(base):
    with pytest.raises(InputError, match="rank must be 1 or more, but is 0"):
        lora.init(random.key(0), base, 0)
    with pytest.raises(InputError, match="no linear layer 'q_proj'"):
        lora.init(random.key(0), base, 1, ("q_proj",))
    with pytest.raises(InputError, match="at least one linear layer"):
        lora.init(random.key(0), base, 1, ())
    with pytest.raises(InputError, match="merge needs a model with an adapter"):
        lora.merge(base)
    with pytest.raises(InputError, match="must be merged first"):
        hf.save("nowhere", hf.Checkpoint(lora.attach(base, trained(base)), None, {}))
