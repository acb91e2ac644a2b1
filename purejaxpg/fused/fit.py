"""All minibatch gradient steps of an update, in one kernel where there is one.

    params, opt_state, metrics = fit.fit(loss, optimizer, params, opt_state, batch, order, config)

is a loop of `jax.grad`, `optimizer.update` and `optax.apply_updates`. On a GPU, the same loop of a
single agent is hundreds of small programs that wait for each other and for memory. If the loss is
built on multilayer perceptrons and the optimiser is Adam, all of it is one kernel instead. Nobody
writes that kernel: `perceptrons` finds the networks in the loss's equations, `heads` derives the
gradient of what follows them, and `steps` evaluates it between the networks' two passes. So a loss
may change freely.

What that kernel cannot do, such as another optimiser, runs step by step, with the networks in the
kernels of `mlp` if possible, and in plain JAX otherwise. `purejaxpg.fused.paths` says why.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from purejaxpg.fused import heads, paths
from purejaxpg.fused.apply import refusal, with_kernels

Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Any], tuple[jax.Array, Metrics]]
Stop = Callable[[Metrics], jax.Array]
Result = tuple[Any, Any, Metrics]

LOOP = "gradient steps"
STOPPED = "policy/stopped"


def fit(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    batch: Any,
    order: jax.Array,
    config: Any,
    stop: Stop | None = None,
) -> Result:
    """Take one gradient step on each minibatch, in order.

    Args:
        loss: (params, minibatch) -> scalar, {name: scalar}. It may close over anything.
        optimizer: its attributes `learning_rate`, `max_grad_norm`, `b1`, `b2` and `eps` say that it
            is Adam on gradients clipped by their global norm; without them there is no kernel.
        params: pytree of float32 arrays.
        opt_state: of the optimiser.
        batch: pytree of arrays [B, ...].
        order: [S, R] int32, indices into the batch: S steps on R rows each.
        config: an agent's configuration; its fields `fused` and `precision` are read.
        stop: metrics of a step -> bool scalar. From the first step at which it is true on, nothing
            changes any more, and "policy/stopped" is 1 among the metrics.

    Returns:
        Parameters, state of the optimiser, and {name: scalar}, the means over all steps of the
        metrics before each of them.

    Raises:
        InputError: the configuration requires a kernel, and there is none.
    """
    reason, networks = refusal(config), False
    chosen: Callable[[Any, jax.Array], Any] = _chosen
    if not reason:
        try:
            result = _in_kernel(loss, optimizer, params, opt_state, batch, order, config, stop)
            paths.record(config, paths.Path(LOOP, True))
            return result
        except paths.Unfusable as error:
            reason = str(error)
            loss, chosen, networks = _with_kernels(loss, params, batch, order, config)
    paths.record(config, paths.Path(LOOP, False, reason, networks))
    with paths.products(config):
        return step_by_step(loss, optimizer, params, opt_state, batch, order, stop, chosen)


def step_by_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    batch: Any,
    order: jax.Array,
    stop: Stop | None = None,
    chosen: Callable[[Any, jax.Array], Any] | None = None,
) -> Result:
    """Do what `fit` does in plain JAX; `chosen` gives the loss its rows of the batch."""
    chosen = chosen or _chosen

    def gradient_step(carry: Any, indices: jax.Array) -> Any:
        params, opt_state, stopped = carry
        gradient, metrics = jax.grad(loss, has_aux=True)(params, chosen(batch, indices))
        change, new_opt_state = optimizer.update(gradient, opt_state, params)
        new = (optax.apply_updates(params, change), new_opt_state)
        if stop is None:
            return (*new, stopped), metrics
        stopped |= stop(metrics)
        new = jax.tree.map(partial(jnp.where, stopped), (params, opt_state), new)
        return (*new, stopped), {**metrics, STOPPED: stopped.astype(jnp.float32)}

    carry = (params, opt_state, jnp.zeros((), bool))
    (params, opt_state, _), metrics = lax.scan(gradient_step, carry, order)
    return params, opt_state, {name: value.mean() for name, value in metrics.items()}


def _in_kernel(
    loss: Loss,
    optimizer: Any,
    params: Any,
    opt_state: Any,
    batch: Any,
    order: jax.Array,
    config: Any,
    stop: Stop | None,
) -> Result:
    """Do what `fit` does in one kernel.

    Raises:
        Unfusable: there is no kernel for this.
    """
    adam = _adam_state(optimizer, params, opt_state)
    head = _head(loss, stop, params, batch, order, config)
    from purejaxpg.fused import steps  # here, since importing Pallas takes a second

    leaves, tree = jax.tree.flatten(params)
    length, rows = order.shape
    sizes = tuple(leaf.size for leaf in leaves)
    plan = steps.Plan(head, sizes, length, rows, paths.is_fast(config))
    steps.check(plan)
    columns, inputs, metrics = jax.vmap(
        lambda indices: head.before.run(jax.tree.map(lambda x: x[indices], batch))
    )(order)
    rules = [optimizer.learning_rate, optimizer.max_grad_norm, optimizer.b1, optimizer.b2]
    arrays = steps.arrays(plan, columns, inputs, [*rules, optimizer.eps], adam, leaves)
    (mu, nu), new, computed = steps.run(plan, arrays)
    metrics = {name: value.mean() for name, value in metrics.items()}
    metrics.update((name, x[0]) for name, x in zip(head.inside, computed, strict=False))
    metrics = {name: metrics[name] for name in head.metrics}
    taken = jnp.asarray(length, adam.count.dtype)
    if stop is not None:
        metrics[STOPPED] = computed[-1][0]
        taken -= jnp.round(length * metrics[STOPPED]).astype(taken.dtype)
    new = [x.reshape(leaf.shape) for x, leaf in zip(new, leaves, strict=True)]
    adam = optax.ScaleByAdamState(adam.count + taken, mu, nu)
    return jax.tree.unflatten(tree, new), _replaced(opt_state, adam), metrics


def _with_kernels(
    loss: Loss, params: Any, batch: Any, order: jax.Array, config: Any
) -> tuple[Loss, Callable[[Any, jax.Array], Any], bool]:
    """Return a loss with its networks in kernels if that is possible, its data, and whether."""
    try:
        kernels = with_kernels(loss, params, _minibatch(batch, order), config)
    except paths.Unfusable:
        return loss, _chosen, False
    wholes = kernels.wholes(params, batch)
    return (
        lambda params, data: kernels(params, data[0], wholes, data[1]),
        lambda batch, indices: (_chosen(batch, indices), indices),
        True,
    )


def _chosen(batch: Any, indices: jax.Array) -> Any:
    """Return rows of a batch."""
    return jax.tree.map(lambda x: x[indices], batch)


def _minibatch(batch: Any, order: jax.Array) -> Any:
    """Return the shapes of a minibatch."""
    rows = order.shape[1]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)


# --- optimiser -----------------------------------------------------------------------------------


def _adam_state(optimizer: Any, params: Any, opt_state: Any) -> optax.ScaleByAdamState:
    """Return the state of Adam, with moments that are vectors.

    Raises:
        Unfusable: the optimiser is another one.
    """
    names = ("learning_rate", "max_grad_norm", "b1", "b2", "eps")
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=_is_adam) if _is_adam(x)]
    known = all(hasattr(optimizer, name) for name in names) and len(found) == 1
    size = sum(x.size for x in jax.tree.leaves(params))
    if not known or len(jax.tree.leaves(opt_state)) != 3 or jnp.shape(found[0].mu) != (size,):
        raise paths.Unfusable("the optimiser is not `optimizers.clipped_adam`")
    return found[0]


def _is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def _replaced(opt_state: Any, adam: optax.ScaleByAdamState) -> Any:
    return jax.tree.map(lambda x: adam if _is_adam(x) else x, opt_state, is_leaf=_is_adam)


# --- loss ----------------------------------------------------------------------------------------


def _head(
    loss: Loss, stop: Stop | None, params: Any, batch: Any, order: jax.Array, config: Any
) -> heads.Head:
    """Return the loss as networks and a head."""
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves(params)):
        raise paths.Unfusable("a parameter is not of type float32")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    try:
        head = heads.make(loss, stop, shapes, _minibatch(batch, order))
    except heads.OutsideError as error:
        raise paths.Unfusable(heads.outside_reason(params, error.leaf, config)) from None
    if any(v.aval.shape for v in head.metrics.values()):
        raise paths.Unfusable("a metric of the loss is not a scalar")
    return head
