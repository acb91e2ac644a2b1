"""Which architecture the published families of language models have, and how files name its parts.

    config.json         -> Architecture       `architecture_of`
    model.safetensors   -> params             `sources` names the tensors of each parameter

GPT-2, Llama, Qwen2 and Qwen3 are settings of `transformer.Transformer`. Its one matrix of queries,
keys and values is three in the files (but for GPT-2), and matrices of PyTorch's `Linear` are
transposed there.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util
from jax import random

from purejaxpg import InputError
from purejaxpg import config as configs
from purejaxpg.rlhf import transformer

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")

# Parameter -> tensor of a file, or module of a layer -> modules, which stand in the files after
# "transformer.h.3." or "model.layers.3.".
GPT2 = {
    "embed/embedding": "transformer.wte.weight", "positions": "transformer.wpe.weight",
    "final_norm/scale": "transformer.ln_f.weight", "final_norm/bias": "transformer.ln_f.bias",
    "head/kernel": "lm_head.weight",
}  # fmt: skip
GPT2_LAYER: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("ln_1",), "mlp_norm": ("ln_2",), "qkv": ("attn.c_attn",),
    "out": ("attn.c_proj",), "up": ("mlp.c_fc",), "down": ("mlp.c_proj",),
}  # fmt: skip
LLAMA = {
    "embed/embedding": "model.embed_tokens.weight", "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}  # fmt: skip
LLAMA_LAYER: Mapping[str, tuple[str, ...]] = {
    "attention_norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "query_norm": ("self_attn.q_norm",), "key_norm": ("self_attn.k_norm",),
    "out": ("self_attn.o_proj",), "gate": ("mlp.gate_proj",), "up": ("mlp.up_proj",),
    "down": ("mlp.down_proj",),
}  # fmt: skip
# Tensors of older files that hold no parameters: masks, and frequencies that follow from config.
NO_PARAMETERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors that make one parameter."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transposed: bool


def sources(architecture: transformer.Architecture) -> dict[str, Source]:
    """Return the tensors that make each parameter of a model, by the parameter's path."""
    one = dataclasses.replace(architecture, num_layers=1)  # tracing 30 would take seconds
    shapes = jax.eval_shape(lambda key: transformer.init(key, one), random.key(0)).params
    found = {}
    for name, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        for layer in range(architecture.num_layers if name.startswith("layer_0/") else 1):
            own = name.replace("layer_0/", f"layer_{layer}/")
            found[own] = _source(own, leaf.shape, architecture)
    return found


def _source(name: str, shape: tuple[int, ...], a: transformer.Architecture) -> Source:
    is_gpt2 = a.positions == "learned"
    if not name.startswith("layer_"):
        transposed = name == "head/kernel"
        tensor = (GPT2 if is_gpt2 else LLAMA)[name]
        return Source((tensor,), (shape[::-1] if transposed else shape,), transposed)
    layer, module, kind = name.split("/")
    prefix = f"{'transformer.h' if is_gpt2 else 'model.layers'}.{layer.removeprefix('layer_')}"
    ending = "bias" if kind == "bias" else "weight"
    modules = (GPT2_LAYER if is_gpt2 else LLAMA_LAYER)[module]
    counts = (a.num_heads, a.num_kv_heads, a.num_kv_heads)
    widths = [count * a.head_dim for count in counts] if len(modules) == 3 else [shape[-1]]
    shapes = [(*shape[:-1], width) for width in widths]
    transposed = kind == "kernel" and not is_gpt2
    return Source(
        tuple(f"{prefix}.{module}.{ending}" for module in modules),
        tuple(s[::-1] if transposed else s for s in shapes),
        transposed,
    )


def architecture_of(config: Mapping[str, Any], where: str) -> transformer.Architecture:
    """Return the architecture that a config.json describes.

    Args:
        config: its content.
        where: its file or folder, for messages.

    Raises:
        InputError: the model is of another family, or has a part that is not known here.
    """
    family = config.get("model_type")
    known = ", ".join(FAMILIES)
    configs.require(
        family in FAMILIES, f"{where}: model_type must be one of {known}, but is {family!r}."
    )
    fields = Fields(config, where)
    architecture = _gpt2(fields) if family == "gpt2" else _llama(fields, str(family))
    try:
        transformer.check(architecture)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return architecture


@dataclasses.dataclass(frozen=True)
class Fields:
    """Settings of a config.json, which are checked as they are read."""

    config: Mapping[str, Any]
    where: str  # for messages

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a setting that is a whole number of at least 1."""
        value = self.config.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise InputError(f"{self.where}: {name} must be a whole number above 0, not {value!r}.")
        return value

    def number(self, name: str, default: float, config: Mapping[str, Any] | None = None) -> float:
        """Return a setting that is a number above 0, from this config or a table in it."""
        value = (self.config if config is None else config).get(name, default)
        configs.require(
            configs.is_number(value) and value > 0,
            f"{self.where}: {name} must be a number above 0, but is {value!r}.",
        )
        return float(value)

    def require(self, name: str, default: Any, *allowed: Any) -> Any:
        """Return a setting that must have one of a few values."""
        value = self.config.get(name, default)
        choices = " or ".join(json.dumps(choice) for choice in allowed)
        configs.require(
            value in allowed,
            f"{self.where}: {name} must be {choices}, which is all that is known here, but is "
            f"{json.dumps(value)}.",
        )
        return value


def _gpt2(fields: Fields) -> transformer.Architecture:
    fields.require("activation_function", "gelu_new", "gelu_new", "gelu_pytorch_tanh")
    fields.require("scale_attn_weights", True, True)
    fields.require("scale_attn_by_inverse_layer_idx", False, False)
    fields.require("add_cross_attention", False, False)
    width, heads = fields.whole("n_embd"), fields.whole("n_head")
    return transformer.Architecture(
        vocab_size=fields.whole("vocab_size"),
        context=fields.whole("n_positions"),
        width=width,
        num_layers=fields.whole("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        mlp_width=fields.whole("n_inner", 4 * width),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        mlp="gelu",
        bias="all",
        tied=fields.require("tie_word_embeddings", True, True, False),
    )


def _llama(fields: Fields, family: str) -> transformer.Architecture:
    fields.require("hidden_act", "silu", "silu")
    fields.require("attention_bias", family == "qwen2", family == "qwen2")
    fields.require("mlp_bias", False, False)
    fields.require("use_sliding_window", False, False)
    fields.require("pretraining_tp", 1, 1)
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    theta, scaling = _rope(fields)
    return transformer.Architecture(
        vocab_size=fields.whole("vocab_size"),
        context=fields.whole("max_position_embeddings"),
        width=width,
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=fields.whole("head_dim", 128 if family == "qwen3" else width // heads),
        mlp_width=fields.whole("intermediate_size"),
        positions="rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        norm="rms",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        mlp="silu_gated",
        bias="qkv" if family == "qwen2" else "none",
        qk_norm=family == "qwen3",
        tied=fields.require("tie_word_embeddings", False, True, False),
    )


def _rope(fields: Fields) -> tuple[float, transformer.RopeScaling]:
    """Return the base and the scaling of rotary positions, from old or from new settings."""
    new, old = (fields.config.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    table = new or old
    theta = fields.number("rope_theta", fields.number("rope_theta", 10_000.0), new)
    share = fields.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0), new)
    configs.require(
        share == 1.0, f"{fields.where}: partial_rotary_factor must be 1, but is {share}."
    )
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return theta, transformer.RopeScaling()
    configs.require(
        kind == "llama3",
        f"{fields.where}: rope_type must be 'default' or 'llama3', but is {kind!r}.",
    )
    names = ("factor", "low_freq_factor", "high_freq_factor")
    for name in (*names, "original_max_position_embeddings"):
        configs.require(name in table, f"{fields.where}: rope_type 'llama3' needs {name}.")
    factor, low, high = (fields.number(name, 1.0, table) for name in names)
    original = fields.number("original_max_position_embeddings", 1.0, table)
    return theta, transformer.RopeScaling(factor, low, high, int(original))
