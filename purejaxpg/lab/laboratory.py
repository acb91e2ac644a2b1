"""A task, a reference and policies at some distance from it, and what is known of an estimator.

The policies are tabular and drawn from a seed: the logits of one are the reference's plus a
distance times normal noise.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from purejaxpg import config as configs
from purejaxpg.lab import moments, tabular
from purejaxpg.lab.moments import Moments
from purejaxpg.rlhf import tasks

MOST_COMPLETIONS = 400  # of a prompt: all pairs of them are listed

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is studied."""

    task: str = "enumerable-3-4"
    seed: int = 0
    keys: int = 10_000  # of the Monte Carlo estimates; 0: only exact expectations
    distances: tuple[float, ...] = (1e-3, 1e-2, 1.0)  # of the policy's logits from the reference's
    beta: float = 0.5  # price of a nat of divergence


def check(setting: Setting) -> tabular.Tree:
    """Return the completions of the task.

    Raises:
        InputError: the setting makes no sense, or the task has too many completions.
    """
    task = tasks.make(setting.task)
    require = configs.require
    require(
        task.completion_ids is not None,
        f"--task must be one whose completions can be listed, such as enumerable-3-4, but is "
        f"{setting.task!r}.",
    )
    count = len(task.completion_ids if task.completion_ids is not None else ())
    require(
        count <= MOST_COMPLETIONS,
        f"--task must have at most {MOST_COMPLETIONS} completions, because all pairs of them are "
        f"listed, but {setting.task!r} has {count}.",
    )
    require(
        setting.keys == 0 or setting.keys >= 2,
        f"--keys must be 2 or more, or 0 for exact expectations alone, but is {setting.keys}.",
    )
    require(setting.seed >= 0, f"--seed must be 0 or more, but is {setting.seed}.")
    for distance in setting.distances:
        fits = 0.0 < distance <= 10.0
        require(fits, f"--distance must be more than 0 and at most 10, but is {distance}.")
    fits = 0.0 < setting.beta < math.inf
    require(fits, f"--beta must be a number more than 0, but is {setting.beta}.")
    return tabular.tree(task)


@dataclasses.dataclass(frozen=True)
class Compared:
    """Moments of E estimators: exact, if they are known, and over sampled keys."""

    exact: Moments | None
    sampled: Moments | None
    keys: int

    def one(self, e: int) -> "Compared":
        """Return those of one estimator, as of E = 1."""
        exact, sampled = (x and x.one(e) for x in (self.exact, self.sampled))
        return Compared(exact, sampled, self.keys)


class Lab:
    """A task with a reference, and policies at some distance from it."""

    def __init__(self, setting: Setting, say: Say) -> None:
        """Draw the policies; `say` takes a line of progress."""
        self.setting, self.say = setting, say
        self.tree = check(setting)
        self.key, self.num_keys = random.key(setting.seed), 0
        draws = np.random.default_rng(setting.seed)
        self.reference = jnp.asarray(draws.normal(size=self.tree.shape))
        self.noise = jnp.asarray(draws.normal(size=self.tree.shape))
        self.value_noise = draws.normal(size=(2, *self.tree.shape[:2]))
        self.listed = tabular.every(self.tree)

    def next_key(self) -> jax.Array:
        """Return a key of its own for each comparison."""
        self.num_keys += 1
        return random.fold_in(self.key, self.num_keys)

    def policy(self, distance: float) -> jax.Array:
        """Return the logits [X, S, V] at a distance from the reference."""
        return self.reference + distance * self.noise

    @property
    def far(self) -> float:
        """The largest distance, at which values and groups are studied."""
        return max(self.setting.distances)

    @property
    def weight(self) -> np.ndarray:
        """Probability of each prompt, [X]."""
        return np.asarray(self.tree.task.prompt_probability)

    def compare(self, gradients: "Gradients", truth: np.ndarray, logits: jax.Array) -> Compared:
        """Return exact and sampled moments of gradients of single completions."""
        directions = moments.unit_vectors(truth, self.setting.seed)
        exact = gradients.exact(logits, directions)
        if not self.setting.keys:
            return Compared(exact, None, 0)
        seen = gradients.sampled(self.next_key(), logits, directions)
        return Compared(exact, seen, self.setting.keys)


class Gradients:
    """E gradients of a single completion: over all completions, and over sampled ones."""

    def __init__(self, lab: Lab, of_log_prob: Callable[..., jax.Array]) -> None:
        """Compile lazily, once for all policies.

        Args:
            lab: the task and the keys.
            of_log_prob: (log-probabilities [1, L], completions [1], logits of the policy) ->
                gradients in the log-probabilities [E, 1, L].
        """
        tree, listed, keys = lab.tree, lab.listed, lab.setting.keys

        def one(logits: jax.Array, completion: tabular.Completions) -> jax.Array:
            return chained(of_log_prob, logits, jax.tree.map(lambda x: x[None], completion))

        def exact(logits: jax.Array, directions: jax.Array) -> Moments:
            gradients = jax.vmap(lambda completion: one(logits, completion))(listed)
            return moments.weighted(gradients, tabular.probability(tree, logits), directions)

        def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
            (completion,) = sample(key, lab, logits, 1, (1,))
            return chained(of_log_prob, logits, completion)

        def sampled(key: jax.Array, logits: jax.Array, directions: jax.Array) -> Moments:
            return moments.sampled(lambda key: draw(key, logits), key, keys, directions)

        self.exact = jax.jit(exact)
        self.sampled = jax.jit(sampled)


def sample(
    key: jax.Array, lab: Lab, logits: jax.Array, count: int, group_sizes: Sequence[int]
) -> list[tabular.Completions]:
    """Sample a batch of `count` completions for each group size; a group shares a prompt."""
    key_prompt, key_tokens = random.split(key)
    numbers = [count // group_size for group_size in group_sizes]
    drawn = jnp.split(tabular.prompts(key_prompt, lab.tree, sum(numbers)), np.cumsum(numbers)[:-1])
    prompt = jnp.concatenate([jnp.repeat(x, count // len(x)) for x in drawn])
    together = tabular.sample(key_tokens, lab.tree, logits, prompt)
    return [
        jax.tree.map(lambda x, i=i: x[i * count : (i + 1) * count], together)
        for i in range(len(numbers))
    ]


def chained(
    of_log_prob: Callable[..., jax.Array], logits: jax.Array, completions: tabular.Completions
) -> jax.Array:
    """Return the gradients [E, D] in the logits, from those in the log-probabilities [E, B, L]."""
    log_prob, pull = jax.vjp(lambda x: tabular.token_log_probs(x, completions), logits)
    (gradients,) = jax.vmap(pull)(of_log_prob(log_prob, completions, logits))
    return gradients.reshape(len(gradients), -1)


def true_gradient(lab: Lab, logits: jax.Array) -> np.ndarray:
    """Return the gradient [D] of E[r] − β KL."""
    gradient = jax.jit(jax.grad(tabular.objective, argnums=1), static_argnums=0)
    return np.asarray(gradient(lab.tree, logits, lab.reference, lab.setting.beta)).ravel()


# -------------------------------------------------------------------------------------------- rows


def row(
    study: str,
    labels: Row,
    lab: Lab,
    truth: np.ndarray,
    compared: Compared,
    batch: int = 1,
    group_size: int = 1,
) -> Row:
    """Return what is known of an estimator: exactly if possible, and from samples.

    Args:
        study: its name.
        labels: what the estimator is.
        lab: the prompts.
        truth: [D] the gradient that it is to estimate.
        compared: its moments.
        batch: completions of a draw.
        group_size: completions of a prompt.
    """
    known = truth, batch, group_size, lab.weight
    found = {}
    if compared.exact is not None:
        found["exact"] = numbers(compared.exact, *known)
    if compared.sampled is not None:
        found["sampled"] = numbers(compared.sampled, *known, compared.keys)
    best = found.get("exact", found.get("sampled", dict.fromkeys(NUMBERS, math.nan)))
    z = np.zeros(0)
    if compared.exact is not None and compared.sampled is not None:
        z = moments.z_scores(compared.exact, compared.sampled, compared.keys)[0]
    return {
        "study": study,
        **labels,
        "how": next(iter(found), "not computed"),
        **best,
        **{f"sampled_{name}": value for name, value in found.get("sampled", {}).items()},
        "z_mean": float(max(z[:-1], key=abs)) if z.size else math.nan,
        "z_square": float(z[-1]) if z.size else math.nan,
        "comparisons": len(z),
    }


NUMBERS = ("scale", "bias", "cosine", "bias_scaled", "variance", "of_prompts", "error")


def numbers(
    of_one: Moments,
    truth: np.ndarray,
    batch: int,
    group_size: int,
    prompt_weight: np.ndarray,
    keys: int = 0,
) -> dict[str, float]:
    """Return bias and variance relative to the truth.

    Args:
        of_one: moments of one estimator.
        truth: [D].
        batch: completions of a draw; the variance is that of a draw times their number.
        group_size: completions of a prompt.
        prompt_weight: [X].
        keys: the number of draws that moments were sampled with, 0 if they are exact. What chance
            adds to a squared norm is then taken off.

    Returns:
        NUMBERS. `scale` is the length of the mean along the truth, `bias_scaled` the bias after
        division by it, `of_prompts` the part of the variance that is due to the choice of prompts,
        `error` the standard error of the mean; all relative to the truth's norm.
    """
    mean, size = np.asarray(of_one.mean[0]), np.square(truth).sum()
    chance = float(of_one.variance[0]) / max(keys - 1, 1) if keys else 0.0
    variance = batch * (float(of_one.variance[0]) + chance)
    squared = max(np.square(mean).sum() - chance, 0.0)
    scale = mean @ truth / size
    bias = max(np.square(mean - truth).sum() - chance, 0.0) / size
    nothing = squared <= 1e-24 * size
    cosine = math.nan if nothing else min(scale * math.sqrt(size / squared), 1.0)
    by_prompt = np.square(mean.reshape(len(prompt_weight), -1)).sum(1)
    of_prompts = group_size * ((by_prompt / prompt_weight).sum() - np.square(mean).sum())
    sideways = max(np.square(mean - scale * truth).sum() - chance, 0.0) / size
    return {
        "scale": float(scale),
        "bias": math.sqrt(bias),
        "cosine": float(cosine),
        "bias_scaled": math.sqrt(sideways) / scale if scale > 0.0 and not nothing else math.nan,
        "variance": float(variance / size),
        "of_prompts": float(of_prompts / size),
        "error": math.sqrt(chance / size),
    }
