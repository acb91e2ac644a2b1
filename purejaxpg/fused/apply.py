"""Functions of multilayer perceptrons, with their networks computed by the kernels of `mlp`.

This is the middle way between a loop in one kernel and plain JAX. A network goes through its layers
in one kernel, forward and backward. All else, from the networks' outputs to the loss and to the
optimiser, is plain JAX, and may be anything.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from purejaxpg.fused import heads, jaxprs, paths, perceptrons

Function = Callable[[Any, Any], Any]
Wholes = dict[Any, jax.Array]  # variable of a network's inputs -> [B, D]


def apply(
    function: Function, params: Any, x: jax.Array, config: Any, plain: Function | None = None
) -> Any:
    """Apply a network to rows, in one kernel where there is one.

    Args:
        function: (params, x [..., D]) -> pytree of arrays [..., *]: `apply` of a module of flax,
            which sees each row by itself.
        params: pytree of arrays.
        x: [..., D] float32.
        config: an agent's configuration; its fields `fused` and `precision` are read.
        plain: what runs where there is no kernel, by default `function`.

    Returns:
        What `function` returns. It can be differentiated by `params` and x.

    Raises:
        InputError: the configuration requires a kernel, and there is none.
    """
    reason = refusal(config)
    if not reason:
        try:
            rows = x.reshape(-1, x.shape[-1])
            kernel = with_kernels(function, params, rows, config)
            found = jax.tree.map(
                lambda y: y.reshape(*x.shape[:-1], *y.shape[1:]), kernel(params, rows)
            )
        except paths.Unfusable as error:
            reason = str(error)
    paths.record(config, paths.Path("values", not reason, reason))
    if not reason:
        return found
    with paths.products(config):
        return (plain or function)(params, x)


def refusal(config: Any) -> str:
    """Return why no network of this configuration may be a kernel; "" if one may."""
    exact = not paths.is_fast(config) and not paths.interpreted()
    slow = "precision is 'float32', and its products are faster in plain JAX"
    return paths.refusal(config) or (slow if exact else "")


def with_kernels(function: Function, params: Any, data: Any, config: Any) -> "Rewritten":
    """Return a function with its networks in kernels.

    Args:
        function: (params, data) -> pytree. It may close over anything.
        params: pytree of arrays or shapes.
        data: the same.
        config: an agent's configuration.

    Returns:
        A function that computes the same, and can be differentiated.

    Raises:
        Unfusable: a network is none that kernels know.
    """
    params, data = jax.tree.map(_shape, (params, data))
    program = jaxprs.trace(function, params, data, rules=True)
    parameters = program.invars[: len(jax.tree.leaves(params))]
    networks, rest = perceptrons.find(program, parameters)
    layers = {i for network in networks for i in network.parameters}
    for i in heads.outside(parameters, rest, program.outvars):
        if i not in layers and parameters[i].aval.ndim > 1:
            raise paths.Unfusable(heads.outside_reason(params, i, config))
    if not networks:
        raise paths.Unfusable("there is no multilayer perceptron that kernels know")
    groups = _groups(networks, parameters, paths.is_fast(config))
    before = jaxprs.needed_for(rest, [network.inputs for network in networks])
    early = {id(equation) for equation in before}
    after = [equation for equation in rest if id(equation) not in early]
    return Rewritten(program, groups, before, after, paths.is_fast(config))


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A program in which kernels take the place of networks."""

    program: jaxprs.Program
    groups: Sequence[Sequence[perceptrons.Perceptron]]  # each has its kernels
    before: Sequence[Any]  # equations up to the networks' inputs
    after: Sequence[Any]
    fast: bool

    def wholes(self, params: Any, batch: Any) -> Wholes:
        """Return those arrays of a batch of which wide networks see rows, as kernels read them.

        Args:
            params: as for `with_kernels`.
            batch: what `data` has some rows of.
        """
        from purejaxpg.fused import wide

        leaves = dict(zip(self.program.invars, jax.tree.leaves((params, batch)), strict=True))
        seen = {group[0].inputs for group in self.groups if wide.is_wide(_sizes(group[0]))}
        return {v: wide.inputs(leaves[v], self.fast) for v in seen & set(leaves)}

    def __call__(
        self, params: Any, data: Any, wholes: Wholes | None = None, rows: jax.Array | None = None
    ) -> Any:
        """Compute the function, given `data` or, where it is rows of `wholes`, which rows."""
        leaves, wholes = jax.tree.leaves((params, data)), wholes or {}
        values = {**self.program.constants, **dict(zip(self.program.invars, leaves, strict=True))}
        jaxprs.run(self.before, values)
        for group in self.groups:
            x = group[0].inputs
            chosen = rows if x in wholes else None
            x = wholes[x] if x in wholes else jaxprs.read(values, x)
            ys = _outputs(group, leaves, x, chosen, self.fast)
            values.update(zip((network.outputs for network in group), ys, strict=True))
        jaxprs.run(self.after, values)
        return self.program.outputs(values)


def _outputs(
    group: Sequence[perceptrons.Perceptron],
    leaves: Sequence[Any],
    x: jax.Array,
    rows: jax.Array | None,
    fast: bool,
) -> Sequence[jax.Array]:
    """Return the outputs of networks that see the same rows."""
    from purejaxpg.fused import mlp, wide

    layers = tuple(
        tuple((leaves[layer.weight], leaves[layer.bias]) for layer in network.layers)
        for network in group
    )
    if wide.is_wide(_sizes(group[0])):
        return wide.apply(layers, x, rows, tuple(network.activations for network in group), fast)
    return [mlp.apply(layers[0], x, group[0].activations, fast)]


def _groups(
    networks: Sequence[perceptrons.Perceptron], parameters: Sequence[Any], fast: bool
) -> list[list[perceptrons.Perceptron]]:
    """Return networks in groups that share kernels: those with the same wide inputs.

    Raises:
        Unfusable: a network is none that kernels know.
    """
    from purejaxpg.fused import mlp, wide  # here, since importing Pallas takes a second

    groups: dict[Any, list[perceptrons.Perceptron]] = {}
    for network in networks:
        _check(network, parameters)
        shared = wide.is_wide(_sizes(network))
        groups.setdefault(network.inputs if shared else network.outputs, []).append(network)
    found = []
    for group in groups.values():
        sizes = [_sizes(network) for network in group]
        if wide.is_wide(sizes[0]):
            wide.check(sizes, fast)
        else:
            mlp.check(sizes[0], fast)
        alone = len(group) > 1 and not wide.can_share(sizes)
        found += [[network] for network in group] if alone else [group]
    return found


def _sizes(network: perceptrons.Perceptron) -> tuple[int, ...]:
    """Return the numbers of inputs, of units of each hidden layer, and of outputs."""
    return (network.layers[0].inputs, *(layer.outputs for layer in network.layers))


def _check(network: perceptrons.Perceptron, parameters: Sequence[Any]) -> None:
    """Raise Unfusable if a network computes with other numbers than kernels do."""
    if any(parameters[i].aval.dtype != jnp.float32 for i in network.parameters):
        raise paths.Unfusable("a parameter is not of type float32")
    if network.inputs.aval.dtype != jnp.float32:
        raise paths.Unfusable(f"the inputs of a network are of type {network.inputs.aval.dtype}")


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
