"""The optimiser that the agents share, and one for parameters in half precision."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purejaxpg import backend

VECTOR = 2**22  # parameters that are made one vector, at most


class ClippedAdam(optax.GradientTransformation):
    """Clipping of the global gradient norm, then Adam; it knows its own settings.

    Whoever is given an optimiser can ask whether it is one of these, and do the same arithmetic in
    another way. To everybody else it is an optimiser of optax like any other.
    """

    learning_rate: jax.Array | float
    max_grad_norm: jax.Array | float
    b1: float
    b2: float
    eps: float


def clipped_adam(
    learning_rate: jax.Array | float, max_grad_norm: jax.Array | float, eps: float = 1e-5
) -> ClippedAdam:
    """Return Adam on gradients of which the global norm is clipped.

        g = min(1, max_grad_norm / |gradient|) gradient
        m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
        change = -learning_rate m / (1 - b1^k) / (sqrt(v / (1 - b2^k)) + eps)

    at step k = 1, 2, ..., with b1 = 0.9 and b2 = 0.999. The state holds m and v of all parameters
    as one vector each, which compiles and runs faster on a CPU.

    Args:
        learning_rate: step size.
        max_grad_norm: bound on the norm of the whole gradient; inf switches it off.
        eps: added to the denominator, static.

    Returns:
        The same transformation as optax's flattened chain of both, with these settings and b1 and
        b2 as attributes.

    Kingma and Ba 2015, arXiv:1412.6980, algorithm 1.
    """
    b1, b2 = 0.9, 0.999
    clip = optax.clip_by_global_norm(max_grad_norm)
    adam = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
    flat = optax.flatten(optax.chain(clip, adam))
    # optax's _tree_math.py takes 0.9 to a power that is an integer array.
    optimizer = ClippedAdam(flat.init, backend.foreign()(flat.update))
    optimizer.learning_rate, optimizer.max_grad_norm = learning_rate, max_grad_norm
    optimizer.b1, optimizer.b2, optimizer.eps = b1, b2, eps
    return optimizer


def flattened(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply an optimiser to all parameters as one vector, unless they are more than VECTOR.

    One vector compiles and runs faster, but it is a copy of all parameters, and it cannot be split
    over devices as they are.

    Args:
        optimizer: one that treats a parameter alike whichever array it is in, as Adam does, and
            clipping of the global norm.
    """
    flat = optax.flatten(optimizer)

    def chosen(params: Any) -> optax.GradientTransformation:
        return flat if sum(x.size for x in jax.tree.leaves(params)) <= VECTOR else optimizer

    def init(params: optax.Params) -> optax.OptState:
        return chosen(params).init(params)

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return chosen(gradient).update(gradient, state, params)

    return optax.GradientTransformation(init, update)


class InFloat32(NamedTuple):
    """State of `in_float32`."""

    params: optax.Params  # in 32 bits
    inner: optax.OptState


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Train parameters in half precision with a copy of them, and all arithmetic, in 32 bits.

    bfloat16 has 8 bits of precision, so a change of less than 1/256 of a parameter would be
    rounded away, step after step. Here it is added to the copy, and the parameters are the copy,
    rounded. Micikevicius et al. 2018, arXiv:1710.03740, section 3.1.

    Args:
        optimizer: what is applied to gradients in 32 bits.

    Returns:
        A transformation whose changes `optax.apply_updates` adds to the parameters.
    """

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: optax.Params) -> InFloat32:
        return InFloat32(wide(params), optimizer.init(wide(params)))

    def update(gradient: Any, state: InFloat32, params: Any = None) -> tuple[Any, InFloat32]:
        change, inner = optimizer.update(wide(gradient), state.inner, state.params)
        copy = optax.apply_updates(state.params, change)
        moved = jax.tree.map(lambda new, old: new - old.astype(jnp.float32), copy, params)
        return moved, InFloat32(copy, inner)

    return optax.GradientTransformation(init, update)
