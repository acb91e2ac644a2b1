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
        suppressed: ids that a model must never produce; `pad_id` is one of them.
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
        return " ".join(self.words[i] for i in np.asarray(ids) if i not in (self.pad_id, BOS))


def check(task: Task, name: str) -> None:
    """Raise an InputError unless a task makes sense.

    Args:
        task: made by `tasks.register`'s function.
        name: of the task, for messages.
    """
    of_task = f"of task {name!r} must"
    configs.require(len(task.words) > 0, f"words {of_task} be at least one, but there are none.")
    configs.require(
        task.completion_length >= 1,
        f"completion_length {of_task} be 1 or more, but is {task.completion_length}.",
    )
    configs.require(
        task.pad_id != task.eos_id,
        f"pad_id {of_task} not be its eos_id, or no completion could learn to end, but both are "
        f"{task.eos_id}.",
    )
    _check_prompts(task, of_task)
    for field in ("pad_id", "eos_id", "suppressed", "prompt_ids"):
        ids = np.ravel(getattr(task, field))
        wrong = next((i for i in ids if not 0 <= i < len(task.words)), None)
        configs.require(
            wrong is None,
            f"{field} {of_task} be at least 0 and below {len(task.words)}, the number of words, "
            f"but has {wrong}.",
        )
    configs.require(
        task.pad_id in task.suppressed,
        f"suppressed {of_task} hold its pad_id {task.pad_id}, because padding is never sampled, "
        f"but is {task.suppressed}.",
    )
    configs.require(
        task.eos_id not in task.suppressed,
        f"suppressed {of_task} not hold its eos_id {task.eos_id}, or no completion could end, but "
        f"is {task.suppressed}.",
    )


def _check_prompts(task: Task, of_task: str) -> None:
    """Raise an InputError unless the arrays of a task fit each other."""
    prompts, probability, held_out = map(
        np.asarray, (task.prompt_ids, task.prompt_probability, task.held_out)
    )
    shapes = prompts.shape, probability.shape, held_out.shape
    configs.require(
        prompts.ndim == 2 and prompts.size > 0 and shapes[1] == shapes[2] == shapes[0][:1],
        f"prompt_ids {of_task} have the shape [X, P], both 1 or more, with X probabilities and X "
        f"flags in held_out, but the shapes are {shapes[0]}, {shapes[1]} and {shapes[2]}.",
    )
    configs.require(
        np.issubdtype(prompts.dtype, np.integer),
        f"prompt_ids {of_task} be integers, but are of type {prompts.dtype}.",
    )
    wrong = next(iter(np.flatnonzero(prompts[:, -1] == task.pad_id)), None)
    configs.require(
        wrong is None,
        f"prompt_ids {of_task} be padded on the left, but the prompt at index {wrong} ends with "
        f"pad_id {task.pad_id}.",
    )
    configs.require(
        bool((probability >= 0).all()) and abs(float(probability.sum()) - 1) < 1e-6,
        f"prompt_probability {of_task} be 0 or more and sum to 1, but is at least "
        f"{probability.min():.6g} and sums to {probability.sum():.6g}.",
    )
    if task.completion_ids is not None:
        shape = np.shape(task.completion_ids)
        configs.require(
            shape[1:] == (task.completion_length,),
            f"completion_ids {of_task} have the shape [N, {task.completion_length}], but the shape "
            f"is {shape}.",
        )
