"""Group sizes and normalisers, in batches of equal size.

Expectations over groups are exact where they can be: for normalisers that are linear in the
returns by a formula from all pairs, for the others by listing all groups, if these are not too
many. What depends on a whole batch is sampled.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from purejaxpg.lab import estimators, laboratory, moments, tabular

BATCH = 16  # completions
GROUP_SIZES = (2, 4, 8, 16)
MOST_GROUPS = 100_000  # of a prompt: beyond, expectations over groups are sampled

Known = tuple[np.ndarray, float]  # mean [D] and expected squared norm of the gradient of a group


def rows(lab: laboratory.Lab) -> list[laboratory.Row]:
    """Compare the gradients of RLOO and GRPO, for each group size, with that of E[r] − β KL."""
    logits = lab.policy(lab.far)
    truth = laboratory.true_gradient(lab, logits)
    directions = moments.unit_vectors(truth, lab.setting.seed)
    lab.say("All pairs of completions ...")
    of_pairs = pairs(lab, logits)
    exact = {
        group_size: listed(lab, logits, group_size, by_hand(group_size)) | of_pairs(group_size)
        for group_size in (1, *GROUP_SIZES)
    }
    seen = sampled(lab, logits, directions)
    found = []
    for e, (group_size, name) in enumerate(COMPARED):
        known = exact[group_size].get(name)
        of_batch = known and as_moments(known, directions, group_size)
        compared = laboratory.Compared(of_batch, seen and seen.one(e), lab.setting.keys)
        labels = {"normaliser": name, "group_size": group_size, "distance": lab.far}
        row = laboratory.row("group", labels, lab, truth, compared, BATCH, group_size)
        found.append(row)
    return found


def names_of(group_size: int) -> list[str]:
    """Return the normalisers of groups of a size; one completion alone has no baseline."""
    return [name for name in estimators.NORMALISERS if (name == "none") == (group_size == 1)]


def by_hand(group_size: int) -> list[str]:
    """Return the normalisers for which groups have to be listed."""
    without = (*estimators.LINEAR, *estimators.OF_BATCH)
    return [name for name in names_of(group_size) if name not in without]


COMPARED = [(size, name) for size in (1, *GROUP_SIZES) for name in names_of(size)]


def gradients_of(
    lab: laboratory.Lab, names: Sequence[str], group_size: int
) -> Callable[..., jax.Array]:
    """Return a function (log-probabilities [B, L], completions [B], _) -> gradients [E, B, L]."""

    def of_log_prob(log_prob: jax.Array, completions: Any, _: jax.Array) -> jax.Array:
        of_reference = tabular.token_log_probs(lab.reference, completions)
        known = of_reference, completions, group_size, lab.setting.beta
        losses = [jax.grad(estimators.NORMALISERS[name])(log_prob, *known) for name in names]
        return -jnp.stack(losses)

    return of_log_prob


def pairs(lab: laboratory.Lab, logits: jax.Array) -> Callable[[int], dict[str, Known]]:
    """Return the exact moments of linear normalisers for groups of any size, by their name.

    With an advantage that is linear in the returns, the gradient of a group is the mean over its
    pairs of the gradient h(y, y') of a pair, times a factor: a U-statistic. Hence, for a prompt,

        Var = 2 / (G (G − 1)) (2 (G − 2) ζ1 + ζ2),   ζ1 = Var E[h(y, y') | y],   ζ2 = Var h(y, y')

    Hoeffding 1948, "A class of statistics with asymptotically normal distribution".
    """
    names, of_prompt = list(estimators.LINEAR), lab.weight
    weight, given_first, square = map(np.asarray, _all_pairs(lab, logits, names))
    mean = np.einsum("xn,xned->xed", weight, given_first)
    squared = np.square(mean).sum(-1)
    zeta1 = np.einsum("xn,xne->xe", weight, np.square(given_first).sum(-1)) - squared
    zeta2 = np.einsum("xn,xne->xe", weight, square) - squared

    def of_size(group_size: int) -> dict[str, Known]:
        if group_size == 1:
            return {}
        share = 2.0 / (group_size * (group_size - 1))
        variance = share * (2.0 * (group_size - 2) * zeta1 + zeta2)
        whole = of_prompt @ (squared + variance)
        factors = [estimators.LINEAR[name](group_size) for name in names]
        return {
            name: (factor * of_prompt @ mean[:, e], factor**2 * whole[e])
            for e, (name, factor) in enumerate(zip(names, factors, strict=True))
        }

    return of_size


def _all_pairs(
    lab: laboratory.Lab, logits: jax.Array, names: Sequence[str]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return π(y|x) [X, N], E[h(y, y') | y] [X, N, E, D] and E[‖h(y, y')‖² | y] [X, N, E]."""
    shape = num_prompts, count = lab.tree.shape[0], len(lab.tree.prefix)
    of_log_prob = gradients_of(lab, names, 2)
    weight = jnp.exp(tabular.log_probs(logits, lab.listed)).reshape(shape)

    def of_pair(first: jax.Array, second: jax.Array) -> jax.Array:
        both = jnp.stack([first, first // count * count + second])
        pair = jax.tree.map(lambda x: x[both], lab.listed)
        return laboratory.chained(of_log_prob, logits, pair)

    def of_first(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jax.vmap(lambda second: of_pair(first, second))(jnp.arange(count))
        own = weight[first // count]
        return jnp.einsum("n,ned->ed", own, h), own @ jnp.square(h).sum(-1)

    run = jax.jit(lambda firsts: lax.map(of_first, firsts))
    found = run(jnp.arange(num_prompts * count))
    mean, square = (x.reshape(*shape, *x.shape[1:]) for x in found)
    return weight, mean, square


def listed(
    lab: laboratory.Lab, logits: jax.Array, group_size: int, names: Sequence[str]
) -> dict[str, Known]:
    """Return the exact moments of normalisers by listing all groups, unless there are too many.

    The gradient does not depend on the order of a group, so each is listed once, with the number of
    its orders.
    """
    num_prompts, count = lab.tree.shape[0], len(lab.tree.prefix)
    if math.comb(count + group_size - 1, group_size) > MOST_GROUPS:
        return {}
    lab.say(f"All groups of {group_size} ...")
    group, orders = multisets(count, group_size)
    of_log_prob = gradients_of(lab, names, group_size)
    log_prob = tabular.log_probs(logits, lab.listed).reshape(num_prompts, count)
    of_prompt = jnp.asarray(lab.weight)

    def of_group(now: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        prompt, group, orders = now
        members = jax.tree.map(lambda x: x[prompt * count + group], lab.listed)
        weight = of_prompt[prompt] * orders * jnp.exp(log_prob[prompt, group].sum())
        gradients = laboratory.chained(of_log_prob, logits, members)
        return weight * gradients, weight * jnp.square(gradients).sum(-1)

    prompts = np.repeat(np.arange(num_prompts), len(group))
    tiled = np.tile(group, (num_prompts, 1)), np.tile(orders, num_prompts)
    mean, square = jax.jit(lambda x: summed(of_group, x))((prompts, *tiled))
    return {name: (np.asarray(mean[e]), float(square[e])) for e, name in enumerate(names)}


def multisets(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """List the multisets of `size` numbers below `count` -> [M, size], and their orders [M]."""
    found = np.array(list(itertools.combinations_with_replacement(range(count), size)))
    run_length, repeats = np.ones(len(found)), np.ones(len(found))
    for i in range(1, size):
        run_length = np.where(found[:, i] == found[:, i - 1], run_length + 1, 1)
        repeats *= run_length
    return found, math.factorial(size) / repeats


def summed(function: Callable[[Any], Any], inputs: Any) -> Any:
    """Sum a function over the leading axis of its inputs, some at a time."""
    inputs = jax.tree.map(jnp.asarray, inputs)
    chunk = moments.CHUNK
    whole = len(jax.tree.leaves(inputs)[0]) // chunk * chunk

    def of_some(some: Any) -> Any:
        return jax.tree.map(lambda x: x.sum(0), jax.vmap(function)(some))

    def add(total: Any, some: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_some(some)), None

    rest = of_some(jax.tree.map(lambda x: x[whole:], inputs))
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), inputs)
    return lax.scan(add, rest, chunks)[0]


def sampled(
    lab: laboratory.Lab, logits: jax.Array, directions: np.ndarray
) -> moments.Moments | None:
    """Return the moments of a sampled batch's gradient for COMPARED, or None without keys."""
    if not lab.setting.keys:
        return None
    lab.say(f"Batches of {BATCH} completions in groups of 1 to {max(GROUP_SIZES)} ...")
    sizes = (1, *GROUP_SIZES)

    def draw(key: jax.Array) -> jax.Array:
        batches = laboratory.sample(key, lab, logits, BATCH, sizes)
        return jnp.concatenate(
            [
                laboratory.chained(gradients_of(lab, names_of(size), size), logits, batch)
                for size, batch in zip(sizes, batches, strict=True)
            ]
        )

    run = jax.jit(lambda key: moments.sampled(draw, key, lab.setting.keys, jnp.asarray(directions)))
    return run(lab.next_key())


def as_moments(known: Known, directions: np.ndarray, group_size: int) -> moments.Moments:
    """Return the moments of a batch of independent groups, from those of a group."""
    mean, square = known
    squared = np.square(mean).sum()
    whole = squared + (square - squared) * group_size / BATCH
    unknown = np.full((1, len(directions)), np.nan)
    found = mean[None], np.array([whole]), unknown[:, 0], (directions @ mean)[None], unknown
    return moments.Moments(*map(jnp.asarray, found))
