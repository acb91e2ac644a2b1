"""What trainers see of a task for language models."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

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
