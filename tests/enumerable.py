"""Everything about the policies of a task whose completions can be listed.

A tabular policy has a row of logits for each prompt and prefix, so that its expectations and
gradients are exact.
"""

import jax
import jax.numpy as jnp
import numpy as np

from purejaxpg.kernels import preference
from purejaxpg.lab import tabular
from purejaxpg.rlhf import tasks, tokens

TASK = tasks.make("enumerable-3-4")
EVERY = np.asarray(TASK.completion_ids)  # [N, L]
MASK = np.asarray(tokens.completion_mask(jnp.asarray(EVERY), TASK.eos_id))
X, N, L = len(TASK.prompt_ids), *EVERY.shape
ALL_PROMPTS, ALL = np.repeat(TASK.prompt_ids, N, 0), np.tile(EVERY, (X, 1))
ALL_MASK = np.tile(MASK, (X, 1))
REWARD = np.random.default_rng(1).normal(size=(X, N))
BETA = 0.5


TREE = tabular.tree(TASK)
PREFIX = TREE.prefix
COUNT = TREE.shape[1]


def table(seed, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(X, COUNT, 3))


REFERENCE = table(2)


def token_log_probs(logits):
    """Logits of a tabular policy [X, COUNT, 3] -> log-probabilities of all tokens [X*N, L]."""
    return tabular.token_log_probs(logits, tabular.every(TREE))


def sequences(log_probs):
    return preference.masked_sum(log_probs, ALL_MASK, 1).reshape(X, N)


def value_of_objective(log_probs, reference):
    log_p, log_q = sequences(log_probs), sequences(reference)
    return (jnp.exp(log_p) * (REWARD - BETA * (log_p - log_q))).sum(1).mean()


def true_gradient(logits):
    reference = token_log_probs(REFERENCE)
    objective = lambda logits: value_of_objective(token_log_probs(logits), reference)  # noqa: E731
    return np.asarray(jax.grad(objective)(jnp.asarray(logits)))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def cosine(a, b):
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


LOGITS = REFERENCE + table(3)

# All ordered pairs of different completions of a prompt, as rows of `token_log_probs`.
FIRST, SECOND = (
    np.arange(X)[:, None] * N + i[~np.eye(N, dtype=bool).ravel()]
    for i in (np.repeat(np.arange(N), N), np.tile(np.arange(N), N))
)
ROWS = np.concatenate([FIRST.ravel(), SECOND.ravel()])


def of_pairs(matrix):
    """The entries [X, N, N] of the ordered pairs, [B]."""
    return jnp.reshape(matrix[:, ~np.eye(N, dtype=bool)], -1)


def logits_of(log_p):
    """Log-probabilities of completions [X, N] -> the logits of the tabular policy that has them."""
    mass = np.zeros((X, COUNT, 3))
    action = np.where(MASK, EVERY - TASK.eos_id, 0)
    for x in range(X):
        share = np.exp(np.asarray(log_p)[x])[:, None] * MASK
        np.add.at(mass[x], (PREFIX, action), share)
    return np.log(np.where(mass > 0, mass, 1.0))
