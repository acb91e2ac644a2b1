"""What trainers see of a task for language models."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from purejaxpg import config as configs

PAD, BOS, EOS = 0, 1, 2  # the ids of every task of this package


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a language model is to do. All arrays are constants of the compiled program.

    Attributes:
        words: V strings; their index is the id of a token. The first three are padding, the
            beginning and the end.
        suppressed: ids that a model must never produce.
        prompt_ids: [X, P] int32, all prompts that are drawn, padded on the left.
        prompt_probability: [X] how often each is drawn; sums to 1.
        held_out: [X] bool, prompts for evaluation only; where none is, all serve both purposes.
        completion_length: L, the most tokens of a completion, with its end.
        demonstrate: (key, prompt ids [B, P]) -> completion ids [B, L] to imitate.
        reward: (prompt ids [B, P], completion ids [B, L], mask [B, L]) -> [B] float32.
        completion_ids: [N, L], every completion, if they can be listed; else None.
        passing: the reward of a right answer; inf if no answer is simply right.
        steps: (prompt ids [B, P], completion ids [B, L], mask [B, L]) -> [B, L] bool, the last
            token of each step, and [B, L] bool, whether that step is right. The last token of a
            completion ends a step. None if completions have no steps.
        additive: the reward of each token after each, [V, V], of which the reward of a completion
            is the sum, and the reward of a completion without an end. None: it is no such sum.
        pad_id: the token that fills prompts and completions.
        eos_id: the token that ends a completion; never the same.
    """

    words: tuple[str, ...]
    suppressed: tuple[int, ...]
    prompt_ids: np.ndarray
    prompt_probability: np.ndarray
    held_out: np.ndarray
    completion_length: int
    demonstrate: Callable[[jax.Array, jax.Array], jax.Array]
    reward: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    completion_ids: np.ndarray | None = None
    passing: float = math.inf
    steps: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    additive: tuple[np.ndarray, float] | None = None
    pad_id: int = PAD
    eos_id: int = EOS

    @property
    def prompt_length(self) -> int:
        """P, padding included."""
        return self.prompt_ids.shape[1]

    def prompts(self, key: jax.Array, count: int, held_out: bool = False) -> jax.Array:
        """Draw prompts -> ids [count, P]; padding is PAD."""
        allowed = self.held_out if held_out else ~self.held_out
        index = np.flatnonzero(allowed if allowed.any() else ~allowed)
        up_to = np.cumsum(self.prompt_probability[index])
        # One random number for each draw, however many prompts there are.
        drawn = random.uniform(key, (count,), maxval=up_to[-1])
        place = jnp.searchsorted(jnp.asarray(up_to), drawn, side="right")
        return jnp.asarray(self.prompt_ids[index])[jnp.minimum(place, len(index) - 1)]

    def text(self, ids: np.ndarray) -> str:
        """Return tokens as words, without padding and beginning."""
        return " ".join(self.words[i] for i in np.asarray(ids) if i not in (PAD, BOS))


def check(task: Task, name: str) -> None:
    """Raise an InputError unless a task makes sense.

    Args:
        task: made by `tasks.register`'s function.
        name: of the task, for messages.
    """
    probability = np.asarray(task.prompt_probability)
    shape, held_out = np.shape(task.prompt_ids), np.shape(task.held_out)
    configs.require(
        task.pad_id != task.eos_id,
        f"pad_id of task {name!r} must not be its eos_id, or no completion could learn to end, "
        f"but both are {task.eos_id}.",
    )
    configs.require(
        task.pad_id in task.suppressed,
        f"suppressed of task {name!r} must hold its pad_id {task.pad_id}, because padding is "
        f"never sampled, but is {task.suppressed}.",
    )
    configs.require(
        task.completion_length >= 1,
        f"completion_length of task {name!r} must be 1 or more, but is {task.completion_length}.",
    )
    configs.require(
        len(shape) == 2 and probability.shape == held_out == shape[:1],
        f"prompt_ids of task {name!r} must have the shape [X, P] with X probabilities and X flags "
        f"in held_out, but the shapes are {shape}, {probability.shape} and {held_out}.",
    )
    configs.require(
        bool((probability >= 0).all()) and abs(float(probability.sum()) - 1) < 1e-6,
        f"prompt_probability of task {name!r} must sum to 1, but sums to {probability.sum():.6g}.",
    )
    largest = int(np.max(task.prompt_ids))
    configs.require(
        largest < len(task.words),
        f"prompt_ids of task {name!r} must be below {len(task.words)}, the number of words, but "
        f"the largest is {largest}.",
    )
