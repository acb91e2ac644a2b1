"""Tabular policies for tasks whose completions can be listed.

A tabular policy has a row of logits for each prompt and prefix, so it can be any policy at all, and
its expectations and gradients are exact sums over the completions.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax, random

from purejaxpg.kernels import preference
from purejaxpg.rlhf import tasks, tokens


@struct.dataclass
class Completions:
    """Completions of B prompts, with the prefixes that each passes."""

    prompt: jax.Array  # [B] index of the prompt
    prefix: jax.Array  # [B, L] number of the prefix before each token
    action: jax.Array  # [B, L] which of the actions each token is
    mask: jax.Array  # [B, L] bool, True up to the end token, inclusive
    prompt_ids: jax.Array  # [B, P]
    ids: jax.Array  # [B, L]
    score: jax.Array  # [B] r(x, y), the task's reward


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """Every completion of a task, and the prefixes that they share.

    Attributes:
        task: whose completions are listed.
        actions: [V] ids of the tokens that a policy may choose.
        prefix: [N, L] number of the prefix before each token. What follows an end has numbers too.
        action: [N, L] index into `actions`; 0 after the end.
        mask: [N, L] bool, True up to the end token, inclusive.
        child: [S, V] number of the prefix after each action, or -1 where the completion is over.
    """

    task: tasks.Task
    actions: np.ndarray
    prefix: np.ndarray
    action: np.ndarray
    mask: np.ndarray
    child: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """X, S, V: the shape of the logits of a policy."""
        return (len(self.task.prompt_ids), *self.child.shape)


def tree(task: tasks.Task) -> Tree:
    """List the completions of a task; it must have `completion_ids`."""
    every = np.asarray(task.completion_ids)
    length = every.shape[1]
    mask = np.cumsum(every == task.eos_id, 1) - (every == task.eos_id) == 0
    known: dict[tuple[int, ...], int] = {}
    prefix = np.array(
        [[known.setdefault((t, *ids[:t]), len(known)) for t in range(length)] for ids in every]
    )
    actions = np.setdiff1d(np.arange(len(task.words)), task.suppressed)
    action = np.where(mask, np.searchsorted(actions, every), 0)
    child = np.full((len(known), len(actions)), -1)
    goes_on = mask[:, 1:]
    child[prefix[:, :-1][goes_on], action[:, :-1][goes_on]] = prefix[:, 1:][goes_on]
    return Tree(task, actions, prefix, action, mask, child)


def completions(
    tree: Tree, prompt: jax.Array, prefix: jax.Array, action: jax.Array, mask: jax.Array
) -> Completions:
    """Return completions with their ids and their rewards, from what policies see of them."""
    ids = jnp.where(mask, jnp.asarray(tree.actions)[action], tree.task.pad_id)
    prompt_ids = jnp.asarray(tree.task.prompt_ids)[prompt]
    score = tree.task.reward(prompt_ids, ids, mask)
    return Completions(prompt, prefix, action, mask, prompt_ids, ids, score)


def every(tree: Tree) -> Completions:
    """Return all N completions of the first prompt, then those of the second, ... -> [X N]."""
    num_prompts, (count, _) = tree.shape[0], tree.prefix.shape
    prompt = jnp.repeat(jnp.arange(num_prompts), count)
    tables = (tree.prefix, tree.action, tree.mask)
    return completions(tree, prompt, *(jnp.tile(table, (num_prompts, 1)) for table in tables))


def prompts(key: jax.Array, tree: Tree, count: int) -> jax.Array:
    """Draw prompts as the task does -> indices [count]."""
    return random.categorical(key, jnp.log(tree.task.prompt_probability), shape=(count,))


def sample(key: jax.Array, tree: Tree, logits: jax.Array, prompt: jax.Array) -> Completions:
    """Sample a completion of each prompt, token by token.

    Args:
        key: for all tokens.
        tree: the prefixes.
        logits: [X, S, V] of the policy.
        prompt: [B] indices.

    Returns:
        Completions [B].
    """
    child = jnp.asarray(tree.child)

    def step(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        prefix, alive = carry
        action = jnp.where(alive, random.categorical(key, logits[prompt, prefix]), 0)
        following = child[prefix, action]
        now = jnp.maximum(following, 0), alive & (following >= 0)
        return now, (prefix, action, alive)

    start = jnp.zeros_like(prompt), jnp.ones(prompt.shape, bool)
    keys = random.split(key, tree.prefix.shape[1])
    _, (prefix, action, alive) = lax.scan(step, start, keys)
    return completions(tree, prompt, prefix.T, action.T, alive.T)


def token_log_probs(logits: jax.Array, completions: Completions) -> jax.Array:
    """Return the log-probability of each token under a policy [X, S, V] -> [B, L]."""
    rows = jnp.asarray(logits)[completions.prompt[:, None], completions.prefix]
    return tokens.log_probs(rows, completions.action)


def log_probs(logits: jax.Array, completions: Completions) -> jax.Array:
    """Return log π(y|x) of each completion -> [B]."""
    return preference.masked_sum(token_log_probs(logits, completions), completions.mask, 1)


def probability(tree: Tree, logits: jax.Array) -> jax.Array:
    """Return how often a prompt and its completion are drawn, in the order of `every` -> [X N]."""
    listed = every(tree)
    of_prompt = jnp.asarray(tree.task.prompt_probability)[listed.prompt]
    return of_prompt * jnp.exp(log_probs(logits, listed))


def divergence(tree: Tree, logits: jax.Array, reference: jax.Array) -> jax.Array:
    """Return KL(π ‖ π_ref) of completions, in nats, averaged over prompts -> scalar."""
    listed = every(tree)
    log_ratio = log_probs(logits, listed) - log_probs(reference, listed)
    return (probability(tree, logits) * log_ratio).sum()


def objective(
    tree: Tree, logits: jax.Array, reference: jax.Array, beta: jax.Array | float
) -> jax.Array:
    """Return E[r] − β KL(π ‖ π_ref), to be differentiated -> scalar."""
    expected = (probability(tree, logits) * every(tree).score).sum()
    return expected - beta * divergence(tree, logits, reference)


def divergence_from_optimum(
    tree: Tree, logits: jax.Array, reference: jax.Array, beta: jax.Array | float
) -> jax.Array:
    """Return KL(π ‖ π*), where π* is the best policy there is, averaged over prompts -> scalar."""
    listed, by_prompt = every(tree), (tree.shape[0], len(tree.prefix))
    of_reference = log_probs(reference, listed).reshape(by_prompt)
    best = preference.optimal_log_prob(of_reference, listed.score.reshape(by_prompt), beta)
    log_ratio = log_probs(logits, listed) - best.ravel()
    return (probability(tree, logits) * log_ratio).sum()


def values(tree: Tree, logits: jax.Array, reward: jax.Array) -> jax.Array:
    """Return the value of each prefix: the expected sum of the rewards that follow.

    Args:
        tree: the prefixes.
        logits: [X, S, V] of the policy.
        reward: [X N, L] of each token, in the order of `every`; 0 outside the mask.

    Returns:
        [X, S] values; 0 where no token is chosen.
    """
    listed = every(tree)
    rest = jnp.flip(jnp.cumsum(jnp.flip(reward, 1), 1), 1)
    weight = probability(tree, logits)[:, None] * listed.mask
    zeros = jnp.zeros(tree.shape[:2], rest.dtype)
    place = listed.prompt[:, None], listed.prefix
    mass = zeros.at[place].add(weight)
    return zeros.at[place].add(weight * rest) / jnp.where(mass > 0.0, mass, 1.0)
