"""A decoder-only transformer; GPT-2, Llama and Qwen are settings of it.

    x = embed(tokens) + position                              GPT-2 adds a learned position,
    x = x + attention(norm(x));  x = x + mlp(norm(x))         the others rotate queries and keys
    output = head(norm(x))

One forward pass serves training and sampling: with a cache it takes the next tokens only and gives
the outputs that the whole sequence would have given. Radford et al. 2019, "Language models are
unsupervised multitask learners" (GPT-2); Touvron et al. 2023, arXiv:2302.13971 (Llama); rotary
positions by Su et al. 2021, arXiv:2104.09864; grouped queries by Ainslie et al. 2023,
arXiv:2305.13245; RMSNorm by Zhang and Sennrich 2019, arXiv:1910.07467.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax

from purejaxpg import config as configs
from purejaxpg import layout
from purejaxpg.rlhf import tokens

# Not -inf: a probability of exactly zero makes entropies and exact divergences NaN.
IMPOSSIBLE = -1e9

# How the probabilities of a completion's steps make a reward: `kernels.verification.step_reward`.
AGGREGATIONS = ("product", "minimum", "last")
CHOICES = {
    "positions": ("learned", "rotary"), "norm": ("layer", "rms"), "bias": ("none", "qkv", "all"),
    "mlp": ("relu", "gelu", "silu_gated"), "output": ("tokens", "scalar", *AGGREGATIONS),
}  # fmt: skip

Index = jax.Array | int
Cache = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values of each layer, [B, S, K, H]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch rotary positions to a longer context; factor 1: not at all.

    A pair that turns `low_freq_factor` times or less within the original context turns `factor`
    times slower; one that turns `high_freq_factor` times or more keeps its speed.
    """

    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The static part of a model.

    GPT-2: learned positions, layer norm, gelu, biases everywhere, tied. Llama: rotary, rms,
    silu_gated, no biases. Qwen2 is Llama with biases of queries, keys and values; Qwen3 is Llama
    with `qk_norm` and its own `head_dim`.
    """

    vocab_size: int  # V
    context: int  # longest sequence without padding
    width: int = 32  # D
    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int = 2  # K, shared by groups of num_heads / K heads
    head_dim: int = 16  # H
    mlp_width: int = 128
    positions: str = "learned"  # or "rotary"
    rope_theta: float = 10_000.0  # longest wavelength of rotary positions, over 2π
    rope_scaling: RopeScaling = RopeScaling()
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    mlp: str = "relu"  # or "gelu" (by tanh), or "silu_gated"
    bias: str = "none"  # of linear layers: "none", "qkv" or "all"
    qk_norm: bool = False  # RMSNorm of each query and key
    tied: bool = True  # the head is the transposed embedding
    output: str = "tokens"  # "scalar" for reward models and critics; AGGREGATIONS for process
    # reward models, whose scalars are the log-odds that steps are right
    suppressed: tuple[int, ...] = ()  # ids that are never predicted, such as padding
    remat: bool = False  # for gradients, compute activations of a layer again; do not keep them


@struct.dataclass
class Model:
    """Parameters with the architecture that they belong to."""

    params: Any
    architecture: Architecture = struct.field(pytree_node=False)
    adapter: Any = None  # of `lora.attach`: what is added to the outputs of linear layers

    @property
    def dtype(self) -> Any:
        """The type that all parameters promote to, which a cache has as well."""
        return jnp.result_type(*jax.tree.leaves(self.params))

    def __call__(self, token_ids: jax.Array, segments: jax.Array) -> jax.Array:
        """Return logits [B, S, V], or scalars [B, S], for whole sequences [B, S]."""
        return self.apply(token_ids, segments)[0]

    def apply(self, *arguments: Any) -> tuple[jax.Array, Cache]:
        """Apply `Transformer` to its arguments."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter}
        variables = {"params": self.params, **adapter}
        return Transformer(self.architecture).apply(variables, *arguments)


def check(architecture: Architecture) -> None:
    """Raise an InputError unless an architecture makes sense."""
    a = architecture
    for name, choices in CHOICES.items():
        configs.one_of(a, name, choices)
    sizes = ("vocab_size", "context", "width", "num_layers", "num_heads", "num_kv_heads")
    configs.at_least(a, 1, *sizes, "head_dim", "mlp_width")
    configs.divides(a, "num_kv_heads", a.num_heads, "num_heads")
    low, high = a.rope_scaling.low_freq_factor, a.rope_scaling.high_freq_factor
    configs.require(
        low < high, f"high_freq_factor must be above low_freq_factor, {low}, but is {high}."
    )
    configs.require(
        a.positions == "learned" or a.head_dim % 2 == 0,
        f"head_dim must be even for rotary positions, but is {a.head_dim}.",
    )


def init(key: jax.Array, architecture: Architecture) -> Model:
    """Return a model with random parameters."""
    ids = jnp.zeros((1, 2), jnp.int32)
    variables = Transformer(architecture).init(key, ids, jnp.ones_like(ids))
    return Model(variables["params"], architecture)


def scalar_model(key: jax.Array, model: Model, scale: float) -> Model:
    """Return a model with the body of another and a new head for one number per token.

    The weights of the head are N(0, scale² / (D + 1)). A reward model has scale 1, as in Ziegler et
    al. 2019, arXiv:1909.08593, section 2.2; a critic that starts at 0 has scale 0.
    """
    architecture = dataclasses.replace(model.architecture, output="scalar")
    head = jax.tree.map(lambda x: scale * x, init(key, architecture).params["head"])
    return Model({**model.params, "head": head}, architecture)


def empty_cache(model: Model, batch: int, length: int) -> Cache:
    """Return a cache for `batch` sequences of at most `length` tokens, padding included."""
    a = model.architecture
    zeros = jnp.zeros((batch, length, a.num_kv_heads, a.head_dim), model.dtype)
    return ((zeros, zeros),) * a.num_layers


class Transformer(nn.Module):
    """Token ids [B, T], segments [B, S] -> outputs [B, T, V] or [B, T], cache.

    Without a cache T is S. With one, the T tokens are those from index `start` on; the keys and
    values of earlier ones are in the cache.
    """

    architecture: Architecture

    @nn.compact
    def __call__(
        self, token_ids: jax.Array, segments: jax.Array, cache: Any = None, start: Index = 0
    ) -> tuple[jax.Array, Cache]:
        a = self.architecture
        small = nn.initializers.normal(0.05)
        embed = nn.Embed(a.vocab_size, a.width, embedding_init=small, name="embed")
        length = token_ids.shape[1]
        index = lax.dynamic_slice_in_dim(tokens.positions(segments), start, length, axis=1)
        mask = tokens.attention_mask(segments, start, length)
        x = embed(token_ids)
        if a.positions == "learned":
            x = x + self.param("positions", small, (a.context, a.width))[index]
        x = layout.over_batch(x)
        new = []
        for layer in range(a.num_layers):
            block = (nn.remat(Block) if a.remat else Block)(a, name=f"layer_{layer}")
            own = None if cache is None else cache[layer]
            x, keys_and_values = block(x, index, mask, own, start)
            new.append(keys_and_values)
        return self.head(norm(a, "final_norm")(x), embed), tuple(new)

    def head(self, x: jax.Array, embed: nn.Embed) -> jax.Array:
        a = self.architecture
        if a.output != "tokens":
            std = (a.width + 1) ** -0.5
            scalar = nn.Dense(1, kernel_init=nn.initializers.normal(std), name="head")
            return at_least_float32(scalar(x)[..., 0])
        output = embed.attend if a.tied else dense(a, a.vocab_size, "head", bias=False)
        suppressed = jnp.zeros(a.vocab_size, bool).at[jnp.array(a.suppressed, int)].set(True)
        return jnp.where(suppressed, IMPOSSIBLE, at_least_float32(output(x)))


class Block(nn.Module):
    """Attention and a multilayer perceptron, each added to its input: [B, T, D] -> [B, T, D]."""

    architecture: Architecture

    @nn.compact
    def __call__(
        self, x: jax.Array, index: jax.Array, mask: jax.Array, cache: Any, start: Index
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        a = self.architecture
        h = norm(a, "attention_norm")(x)
        attended, keys_and_values = self.attention(h, index, mask, cache, start)
        x = x + attended
        h = norm(a, "mlp_norm")(x)
        up = dense(a, a.mlp_width, "up")(h)
        if a.mlp == "silu_gated":
            up = nn.silu(dense(a, a.mlp_width, "gate")(h)) * up
        else:
            up = nn.relu(up) if a.mlp == "relu" else nn.gelu(up, approximate=True)
        return x + dense(a, a.width, "down", residual=True)(up), keys_and_values

    def attention(
        self, x: jax.Array, index: jax.Array, mask: jax.Array, cache: Any, start: Index
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Attend to the tokens in `mask` [B, T, S] -> [B, T, D], keys and values [B, S, K, H]."""
        a = self.architecture
        counts = [a.num_heads, a.num_kv_heads, a.num_kv_heads]
        qkv = dense(a, sum(counts) * a.head_dim, "qkv", bias=a.bias != "none")(x)
        heads = qkv.reshape(*x.shape[:2], sum(counts), a.head_dim)
        parts = jnp.split(heads, [counts[0], counts[0] + counts[1]], axis=2)
        query, key, value = (layout.over_heads(part, a.num_kv_heads) for part in parts)
        if a.qk_norm:
            query = nn.RMSNorm(a.norm_eps, name="query_norm")(query)
            key = nn.RMSNorm(a.norm_eps, name="key_norm")(key)
        if a.positions == "rotary":
            query, key = (rotate(h, index, frequencies(a)) for h in (query, key))
        if cache is not None:
            put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
            key, value = put(cache[0], key), put(cache[1], value)
        grouped = query.reshape(*x.shape[:2], a.num_kv_heads, -1, a.head_dim)
        scores = jnp.einsum("btkgh,bskh->bkgts", grouped, key) * a.head_dim**-0.5
        scores = jnp.where(mask[:, None, None], at_least_float32(scores), IMPOSSIBLE)
        weights = nn.softmax(scores).astype(value.dtype)
        mixed = jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(*x.shape[:2], -1)
        return dense(a, a.width, "out", residual=True)(mixed), (key, value)


class Linear(nn.Dense):
    """A linear layer, with a low-rank one beside it if the model has an adapter."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        if not self.has_variable("adapter", "a"):
            return y
        a, b = (self.get_variable("adapter", name).astype(x.dtype) for name in "ab")
        return y + x @ a @ b


def norm(architecture: Architecture, name: str) -> nn.Module:
    """Return a normalisation of the last axis."""
    kind = nn.LayerNorm if architecture.norm == "layer" else nn.RMSNorm
    return kind(epsilon=architecture.norm_eps, name=name)


def dense(
    a: Architecture, features: int, name: str, bias: bool | None = None, residual: bool = False
) -> Linear:
    """Return a linear layer; bias None means: if the architecture has biases everywhere.

    If its output is added to the residual stream, its initial variance is divided by the number of
    such additions, so that the stream keeps its scale at any depth (GPT-2).
    """
    variance = 1 / (2 * a.num_layers) if residual else 1.0
    bias = a.bias == "all" if bias is None else bias
    kernel_init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
    return Linear(features, use_bias=bias, kernel_init=kernel_init, name=name)


def at_least_float32(x: jax.Array) -> jax.Array:
    """Return scores or outputs in a type that is precise enough for a softmax."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def frequencies(architecture: Architecture) -> jax.Array:
    """Return the angle by which each pair of components turns from one position to the next.

    Pair i turns by f = θ^(−2i/H), which makes n = f L / 2π turns within the original context L.
    With scaling (`rope_type` "llama3" of transformers) it turns by

        f ((1 − s) / factor + s),    s = (n − low) / (high − low), clipped to [0, 1]

    Returns:
        [H/2].
    """
    a, scaling = architecture, architecture.rope_scaling
    half = a.head_dim // 2
    frequency = a.rope_theta ** (-jnp.arange(half) / half)
    if scaling.factor == 1.0:
        return frequency
    turns = frequency * scaling.original_context / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * ((1.0 - kept) / scaling.factor + kept)


def rotate(heads: jax.Array, index: jax.Array, frequency: jax.Array) -> jax.Array:
    """Rotate pairs of components by angles that grow with the position.

    Component i is paired with i + H/2, the layout of Llama's and Qwen's published weights, and
    not with i + 1, the layout of the paper.

    Args:
        heads: [B, T, N, H] queries or keys of N heads.
        index: [B, T] positions.
        frequency: [H/2] radians per position.

    Returns:
        [B, T, N, H].
    """
    angle = (index[..., None] * frequency)[:, :, None]
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    cos, sin = jnp.cos(angle).astype(heads.dtype), jnp.sin(angle).astype(heads.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
