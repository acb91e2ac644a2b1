"""A task with few enough completions to list: what theory says about it can be checked exactly."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from purejaxpg.rlhf.tasks import interface

PAD, BOS, EOS = interface.PAD, interface.BOS, interface.EOS


def make(num_actions: int, length: int, num_prompts: int = 3) -> interface.Task:
    """Return a task with a standard normal reward for each prompt and completion."""
    actions = ("<end>", *"abcdefgh"[: num_actions - 1])
    questions = tuple(f"<{x}>" for x in range(num_prompts))
    words = ("<pad>", "<bos>", *actions, *questions)
    first_question = words.index("<0>")
    rewards = np.random.default_rng(0).normal(size=(num_prompts, num_actions**length))
    power = num_actions ** np.arange(length)

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        code = jnp.where(mask, completion_ids - EOS, 0) @ power
        return jnp.asarray(rewards)[prompt_ids[:, -1] - first_question, code]

    def demonstrate(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        ids = random.randint(key, (len(prompt_ids), length), EOS, EOS + num_actions, jnp.int32)
        ended = jnp.cumsum(ids == EOS, axis=1) - (ids == EOS) > 0
        return jnp.where(ended, PAD, ids)

    # Prompts of two lengths, so that padding on the left is part of every test.
    starts = [(PAD, BOS) if x % 2 else (BOS, first_question) for x in range(num_prompts)]
    prompts = [(*start, first_question + x) for x, start in enumerate(starts)]
    return interface.Task(
        words=words,
        suppressed=(PAD, BOS, *range(first_question, len(words))),
        prompt_ids=np.array(prompts, np.int32),
        prompt_probability=np.full(num_prompts, 1 / num_prompts),
        held_out=np.zeros(num_prompts, bool),
        completion_length=length,
        demonstrate=demonstrate,
        reward=reward,
        completion_ids=_completions(num_actions, length),
    )


def _completions(num_actions: int, length: int) -> np.ndarray:
    """Return every completion, [N, L]: one ends with the end token or has L tokens without one."""
    whole: list[tuple[int, ...]] = []
    begun: list[tuple[int, ...]] = [()]
    for _ in range(length):
        whole += [(*prefix, EOS) for prefix in begun]
        begun = [(*prefix, EOS + a) for prefix in begun for a in range(1, num_actions)]
    whole += begun
    return np.array([c + (PAD,) * (length - len(c)) for c in whole], np.int32)
