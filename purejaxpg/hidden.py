"""Memory that an agent's `update` carries from step to step, and that its `policy` cannot see.

Such an agent learns with its memory and is scored without it: returns in training are high, scores
are at chance, and nothing else shows it. The traced programs do, and nothing has to be run.
"""

import dataclasses
import types
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.extend import core

from purejaxpg import contract, envs, trainers


def note(trainer: types.ModuleType, name: str, config: Any) -> str:
    """Return a warning about memory that the policy of an agent cannot see, or "".

    Args:
        trainer: a module.
        name: the name the user gave; agents of the package have no such memory.
        config: one of its configurations.
    """
    if not trainers.is_path(name):
        return ""
    found = [f"state{path}" for path in unseen(trainer, config)]
    if not found:
        return ""
    return (
        f"Warning: agent {name!r} carries a memory, {' and '.join(found)}, from step to step while "
        "it trains. Its policy does not see it, so the agent is scored without a memory. Define "
        "initial_memory(state, config, n), and let policy take and return the memory."
    )


def unseen(trainer: types.ModuleType, config: Any) -> list[str]:
    """Return the paths of those leaves of the state that are memory and that no policy sees.

    A leaf is memory if it has an item for each environment, if the next steps of the environments
    depend on it, and if its next value depends on what they showed. A dependence on whether an
    episode ended does not count, so noise that starts anew with an episode is no memory. Neither is
    the state of the environments, nor one leaf of the shape of the observations.

    Args:
        trainer: a module.
        config: one of its configurations.

    Returns:
        Paths such as ".memory". There are none for a trainer without an environment, for one whose
        policy has a memory, for one that starts all episodes anew in each update, and for one that
        cannot be traced.
    """
    aware = contract.scores_itself(trainer) or contract.has_memory(trainer)
    if aware or not hasattr(config, contract.NUM_ENVS):
        return []
    try:
        state, per_env, update, policy = _traced(trainer, config)
    except Exception:  # whoever compiles the agent says what is wrong with it
        return []
    leaves, inside = jax.tree_util.tree_leaves_with_path(state), _in_environment(state)
    obs = (getattr(config, contract.NUM_ENVS), contract.environment(config).obs_size)
    acting = _reads(update, np.flatnonzero(inside), conditions=True)
    seen = _reads(policy, range(len(policy.outvars)), conditions=True)
    shown = {i for i, (_, x) in enumerate(leaves) if inside[i] or (per_env[i] and x.shape == obs)}
    found: list[str] = []
    observed: list[str] = []
    for i, (path, leaf) in enumerate(leaves):
        if inside[i] or not per_env[i] or not acting[1 + i] or seen[1 + i]:
            continue
        after = _reads(update, [i], conditions=False)
        if any(after[1 + other] for other in shown - {i}):
            (observed if leaf.shape == obs else found).append(jax.tree_util.keystr(path))
    observed.sort(key=lambda path: "obs" not in path)  # the first is what to act on next
    return [*found, *observed[1:]]


def _traced(trainer: types.ModuleType, config: Any) -> tuple[Any, list[bool], Any, Any]:
    """Return a state's shapes, which leaves have an item for each environment, and two jaxprs.

    The inputs of `update` and `policy` begin with a key and the leaves of the state.
    """

    def step(key: jax.Array, state: Any, config: Any) -> Any:
        after, _ = trainer.update(key, state, config)
        return jax.tree.map(lambda _, new: new, state, after)  # raises if it is another structure

    key, count = random.key(0), getattr(config, contract.NUM_ENVS)
    twice = dataclasses.replace(config, **{contract.NUM_ENVS: 2 * count})
    state, larger = (jax.eval_shape(trainer.init, key, each) for each in (config, twice))
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(larger), strict=True)
    per_env = [a.shape[:1] == (count,) and b.shape == (2 * count, *a.shape[1:]) for a, b in pairs]
    obs = jax.ShapeDtypeStruct((count, contract.environment(config).obs_size), jnp.float32)
    update = jax.make_jaxpr(step)(key, state, config)
    policy = jax.make_jaxpr(trainer.policy)(key, state, obs, config)
    return state, per_env, _inner(update), _inner(policy)


def _in_environment(state: Any) -> list[bool]:
    """Return for each leaf of a state whether it belongs to the environments."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, envs.EnvState))
    return [isinstance(node, envs.EnvState) for node in nodes for _ in jax.tree.leaves(node)]


# --------------------------------------------------------------------------- what depends on what


def _reads(jaxpr: Any, outputs: Iterable[int], conditions: bool) -> list[bool]:
    """Return for each input of a program whether one of some outputs depends on it.

    Args:
        jaxpr: the program.
        outputs: their places.
        conditions: whether values that are true or false pass a dependence on.
    """
    chosen = [jaxpr.outvars[i] for i in outputs]
    needed = {v for v in chosen if _counts(v, conditions)}
    for equation in reversed(jaxpr.eqns):
        wanted = [i for i, v in enumerate(equation.outvars) if v in needed]
        if wanted:
            read = _operands(equation, wanted, conditions)
            pairs = zip(equation.invars, read, strict=True)
            needed.update(v for v, flag in pairs if flag and _counts(v, conditions))
    return [v in needed for v in jaxpr.invars]


def _counts(variable: Any, conditions: bool) -> bool:
    literal = isinstance(variable, core.Literal)
    return not literal and (conditions or variable.aval.dtype != np.bool_)


def _operands(equation: Any, outputs: Sequence[int], conditions: bool) -> list[bool]:
    """Return for each operand of an equation whether some of its results depend on it."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        body = _inner(params["jaxpr"])
        carry = _same_rank(body.outvars, equation.outvars)  # what a step returns is stacked
        consts = _same_rank(body.invars, equation.invars) - carry
        return _of_loop(body, consts, carry, outputs, conditions)
    if name == "while":
        body, consts = _inner(params["body_jaxpr"]), params["body_nconsts"]
        read = _of_loop(body, consts, len(equation.outvars), outputs, conditions)
        return [conditions] * params["cond_nconsts"] + read
    if name == "cond":
        branches = [_reads(_inner(each), outputs, conditions) for each in params["branches"]]
        return [True, *map(any, zip(*branches, strict=True))]
    bodies = [_inner(x) for x in params.values() if hasattr(x, "eqns")]
    if len(bodies) == 1 and len(bodies[0].invars) == len(equation.invars):
        return _reads(bodies[0], outputs, conditions)
    return [True] * len(equation.invars)


def _inner(jaxpr: Any) -> Any:
    """Return a program without its constants, which jax 0.11 does not keep apart."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _same_rank(inside: Sequence[Any], outside: Sequence[Any]) -> int:
    """Return how many variables are the same inside and outside a scan, and not its steps."""
    pairs = zip(inside, outside, strict=True)
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)


def _of_loop(
    body: Any, consts: int, carry: int, outputs: Sequence[int], conditions: bool
) -> list[bool]:
    """Return for each input of a loop's body whether outputs depend on it, after any step."""
    wanted = set(outputs)
    while True:
        read = _reads(body, wanted, conditions)
        carried = {i for i in range(carry) if read[consts + i]}
        if carried <= wanted:
            return read
        wanted |= carried
