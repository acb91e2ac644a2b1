"""Torsos and initialisers shared by the agents. Heads stay in the agent files."""

import functools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from purejaxpg import backend, fused
from purejaxpg import config as configs

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "elu": jax.nn.elu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}
TORSOS = ("mlp", "cnn")
FEW_NUMBERS = 2**18  # of observations that a critic on a GPU looks at at once: a megabyte
BLOCK = 128  # columns of a matrix that `gram_schmidt` takes at once, or more
MAX_BLOCKS = 8  # each of them is compiled

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array


def gram_schmidt(matrix: jax.Array) -> jax.Array:
    """Return Q [M, N] of a matrix [M, N] = Q R, where R has a positive diagonal.

        q_j = v_j / |v_j|,    v_j = (1 - Q Q^T) (1 - Q Q^T) a_j,    Q = [q_0 ... q_{j-1}]

    After one projection, a column that is nearly in the span of those before it still has a part in
    that span, from rounding. So every column is projected twice. Columns are taken in blocks: the
    two projections on earlier blocks are products of matrices.

    There are only products and sums here, because jax calls LAPACK for `jnp.linalg.qr` on a CPU. In
    jax 0.10, batched calls of it occupy every thread of the pool and then wait for tasks of that
    same pool: initialising a handful of agents under vmap would hang forever.

    Args:
        matrix: [M, N] of rank N, so M >= N.

    Returns:
        [M, N] with orthonormal columns.

    Giraud, Langou, Rozložník and van den Eshof 2005, "Rounding error analysis of the classical
    Gram-Schmidt orthogonalization process", Numerische Mathematik 101: two projections are enough.
    """
    columns = matrix.shape[1]
    width = max(BLOCK, math.ceil(columns / MAX_BLOCKS))
    q = _one_by_one(matrix[:, :width])
    for start in range(width, columns, width):
        block = _projected(matrix[:, start : start + width], q)
        block = _projected(_one_by_one(block), q)
        # That may leave them slightly oblique to each other.
        block -= _product(block, jnp.triu(_product(block.T, block), 1))
        q = jnp.concatenate([q, block / jnp.linalg.norm(block, axis=0, keepdims=True)], 1)
    return q


def _one_by_one(matrix: jax.Array) -> jax.Array:
    """`gram_schmidt` without blocks."""

    def column(j: jax.Array, q: jax.Array) -> jax.Array:
        v = _projected(_projected(matrix[:, j], q), q)  # columns of q from j on are zero
        return q.at[:, j].set(v / jnp.linalg.norm(v))

    return jax.lax.fori_loop(0, matrix.shape[1], column, jnp.zeros_like(matrix))


def _projected(x: jax.Array, q: jax.Array) -> jax.Array:
    """Take from x [M] or [M, K] its part in the span of the orthonormal columns of q [M, N]."""
    return x - _product(q, _product(x.T, q).T)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply matrices without the rounding of factors that accelerators do by default."""
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


def orthogonal(scale: float) -> Initializer:
    """Return an initialiser of orthogonal matrices times `scale`, safe under vmap.

    Args:
        scale: factor on the orthonormal rows or columns; sqrt(2) keeps the variance through
            ReLU, 0.01 makes a first policy nearly uniform.

    Returns:
        A function (key, shape, dtype) -> array; axes before the last count as inputs.

    Saxe, McClelland and Ganguli 2014, arXiv:1312.6120.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        rows, columns = math.prod(shape[:-1]), shape[-1]
        tall = jax.random.normal(key, (max(rows, columns), min(rows, columns)), dtype)
        q = gram_schmidt(tall)
        return scale * (q if rows >= columns else q.T).reshape(shape)

    return init


def initializer(config: Any, scale: float) -> Initializer:
    """Return the initialiser of weights that `config.orthogonal_init` chooses.

    Args:
        config: an agent's configuration.
        scale: gain of the orthogonal matrix. LeCun's normal initialisation has no gain.

    Returns:
        A function (key, shape, dtype) -> array.
    """
    return orthogonal(scale) if config.orthogonal_init else nn.initializers.lecun_normal()


class MLP(nn.Module):
    """Fully connected layers, each followed by the activation.

    [..., D] -> [..., hidden[-1]]
    """

    hidden: tuple[int, ...]
    activation: str
    kernel_init: Initializer = orthogonal(math.sqrt(2))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = nn.Dense(width, kernel_init=self.kernel_init)(x)
            x = ACTIVATIONS[self.activation](x)
        return x


class Conv(nn.Module):
    """A 3x3 convolution without padding, as one product of matrices.

    [B, H, W, C] -> [B, H-2, W-2, features]

    Parameters are those of `flax.linen.Conv`. Inside a loop, as every training is, XLA's own
    convolution takes ten times as long on a CPU (benchmarks/LOG.md).
    """

    features: int
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width, channels = x.shape[-3] - 2, x.shape[-2] - 2, x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (3, 3, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        patches = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        output = jnp.concatenate(patches, -1) @ kernel.reshape(-1, self.features)
        return output + jnp.broadcast_to(bias, output.shape)


class CNN(nn.Module):
    """One 3x3 convolution of 16 channels, then an MLP: the network of the MinAtar paper.

    Observations come flat and are folded back to `image_shape`: [..., H*W*C] -> [..., hidden[-1]]

    Young and Tian 2019, arXiv:1903.03176.
    """

    image_shape: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: str
    kernel_init: Initializer = orthogonal(math.sqrt(2))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch = x.shape[:-1]
        x = x.reshape(-1, *self.image_shape)
        x = Conv(16, self.kernel_init, name="Conv_0")(x)
        x = ACTIVATIONS[self.activation](x).reshape(*batch, -1)
        return MLP(self.hidden, self.activation, self.kernel_init)(x)


class GRU(nn.Module):
    """A gated recurrent unit, whose output is its memory of all inputs since the last start.

        r = σ(W_r x + U_r h),   z = σ(W_z x + U_z h),   n = tanh(W_n x + r (U_n h + b))
        h' = (1 - z) n + z h

    W has a bias, too. A step maps inputs [..., D] and memories [..., H] -> memories [..., H]. A
    sequence maps [T, N, D], the memory before it [N, H] and `starts` [T, N] -> the memory after
    each step [T, N, H]. Where `starts`, the memory before a step is zero.

    Cho et al. 2014, arXiv:1406.1078, with the bias b inside the reset gate, as cuDNN has it.
    """

    size: int
    kernel_init: Initializer = orthogonal(1.0)

    @nn.compact
    def __call__(
        self, x: jax.Array, memory: jax.Array, starts: jax.Array | None = None
    ) -> jax.Array:
        size = self.size
        x = nn.Dense(3 * size, kernel_init=self.kernel_init, name="input")(x)  # of all steps
        weights = self.param("memory", self.kernel_init, (size, 3 * size))
        bias = self.param("bias", nn.initializers.zeros, (size,))

        def step(memory: jax.Array, x: jax.Array) -> jax.Array:
            h = memory @ weights
            r, z = jnp.split(nn.sigmoid((x + h)[..., : 2 * size]), 2, -1)
            inside = h[..., 2 * size :] + jnp.broadcast_to(bias, memory.shape)
            new = jnp.tanh(x[..., 2 * size :] + r * inside)
            return (1.0 - z) * new + z * memory

        def restarted(memory: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
            x, start = now
            memory = step(jnp.where(start[:, None], 0.0, memory), x)
            return memory, memory

        if starts is None:
            return step(memory, x)
        chex.assert_shape(starts, x.shape[:2])
        return jax.lax.scan(restarted, memory, (x, starts))[1]


def in_pieces(network: Callable[[Any], Any], inputs: Any, pieces: int) -> Any:
    """Apply a network to arrays a piece at a time, so that its activations take less memory.

    PPO's critic on a whole rollout at once would take half of the memory of a run.

    Args:
        network: maps each array [T, ...] of `inputs` along its first axis.
        inputs: pytree of arrays [T, ...].
        pieces: number of pieces if T is a multiple of it; otherwise there are more, none larger.

    Returns:
        A pytree of the network's output for each array.
    """
    length = len(jax.tree.leaves(inputs)[0])
    each = functools.partial(jax.tree.map, network)
    return jax.lax.map(each, inputs, batch_size=max(1, length // pieces))


def values(
    critic: nn.Module,
    params: Any,
    obs: jax.Array,
    next_obs: jax.Array,
    terminated: jax.Array,
    done: jax.Array,
    config: Any,
    pieces: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Return the values of a rollout's observations and of the next ones.

    Inside an episode the next observation is the next step's, and so is its value. The critic looks
    at `next_obs` only at steps in which a time limit or the rollout's end cut an episode off, one
    such step of each environment at a time. On a GPU the host would have to ask after each of them
    whether there is another. So there, the critic looks at all of `next_obs`, in one kernel if it
    is a multilayer perceptron.

    Args:
        critic: maps observations [..., D] to values [...].
        params: its variables.
        obs: [T, N, D] observation at step t.
        next_obs: [T, N, D] observation after step t, before any reset.
        terminated: [T, N] bool, the task itself ended with step t.
        done: [T, N] bool, the episode ended with step t for any reason.
        config: an agent's configuration, as for `fused.apply`.
        pieces: as for `in_pieces`. A kernel takes all at once, since it keeps no activations.

    Returns:
        V(s_t) [T, N] and V(s'_t) [T, N], which cannot be differentiated. The latter means nothing
        where `terminated`.
    """
    chex.assert_equal_shape([obs, next_obs])
    chex.assert_shape([terminated, done], obs.shape[:2])
    look_at = functools.partial(critic.apply, params)
    if backend.on_gpu():
        pieces = min(pieces, 1 + obs.size // FEW_NUMBERS)  # each starts the critic's kernels again

        def plain(_: Any, rows: jax.Array) -> Any:
            return in_pieces(look_at, rows, pieces)

        value, next_value = (
            fused.apply(critic.apply, params, rows, config, plain) for rows in (obs, next_obs)
        )
        chex.assert_equal_shape([value, next_value, done])
        return value, next_value
    value = in_pieces(look_at, obs, pieces)
    chex.assert_equal_shape([value, done])  # a critic that returns [T, N, 1] would broadcast
    cut = done.at[-1].set(True) & ~terminated
    return value, _next_values(look_at, value, next_obs, cut)


def _next_values(
    look_at: Callable[[jax.Array], jax.Array], value: jax.Array, next_obs: jax.Array, cut: jax.Array
) -> jax.Array:
    """Look at `next_obs` [T, N, D] where `cut` [T, N]; elsewhere take the next step's value."""
    steps = jnp.arange(len(cut))[:, None]

    def one_more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        cut, next_value = carry
        first = cut.argmax(0)  # [N]; 0 if no step is left, and then `here` is false everywhere
        at_first = look_at(jnp.take_along_axis(next_obs, first[None, :, None], 0)[0])
        here = cut & (steps == first[None])
        return cut & ~here, jnp.where(here, at_first, next_value)

    _, next_value = jax.lax.while_loop(
        lambda carry: carry[0].any(), one_more, (cut, jnp.roll(value, -1, 0))
    )
    return next_value


def torso(config: Any, obs_shape: tuple[int, ...]) -> nn.Module:
    """Return the torso that an agent's configuration asks for.

    Args:
        config: its fields `torso`, `hidden`, `activation` and `orthogonal_init` are read.
        obs_shape: shape of an observation before it was flattened.

    Returns:
        A module [..., D] -> [..., hidden[-1]], named `torso` among the parameters.
    """
    kernel_init = initializer(config, math.sqrt(2))
    if config.torso == "cnn":
        return CNN(obs_shape, config.hidden, config.activation, kernel_init, name="torso")
    return MLP(config.hidden, config.activation, kernel_init, name="torso")


def gru(config: Any) -> GRU:
    """Return the GRU that an agent's configuration asks for, named `gru` among the parameters.

    Args:
        config: its fields `memory_size` and `orthogonal_init` are read.
    """
    return GRU(config.memory_size, initializer(config, 1.0), name="gru")


def check(config: Any, obs_shape: tuple[int, ...]) -> None:
    """Check the fields `torso`, `hidden` and `activation` of an agent's configuration."""
    configs.one_of(config, "torso", TORSOS)
    configs.one_of(config, "activation", ACTIVATIONS)
    hidden, kind = config.hidden, config.torso
    configs.require(
        len(hidden) > 0 and min(hidden) > 0,
        f"hidden must be a list of positive layer widths, but is {list(hidden)}.",
    )
    configs.require(
        kind != "cnn" or (len(obs_shape) == 3 and min(obs_shape[:2]) >= 3),
        f"torso 'cnn' needs observations of shape [H, W, C], but they are {list(obs_shape)}; "
        "use torso 'mlp'.",
    )
