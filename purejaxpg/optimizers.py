"""The optimiser that the agents share."""

import jax
import optax

from purejaxpg import backend


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
