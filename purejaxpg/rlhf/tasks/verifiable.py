"""Tasks with right and wrong answers, which an exact rule tells apart inside the compiled program.

A completion scores 1 if its answer is right and it has an end, and 0 otherwise.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from purejaxpg.rlhf.tasks import interface

PAD, BOS, EOS = interface.PAD, interface.BOS, interface.EOS
SPECIAL, DIGITS = ("<pad>", "<bos>", "<end>"), tuple("0123456789")
ZERO = len(SPECIAL)  # id of the digit 0; that of digit d is ZERO + d
MOST_PROMPTS = 10_000  # of a task; where more are possible, so many are drawn once
HELD_OUT = 0.2  # share of prompts that are for evaluation only


def addition(digits: int) -> interface.Task:
    """Return the task of adding two numbers.

    A prompt is `4 7 + 3 8 =`, and the answer is 85, with or without zeros before it. Demonstrations
    have one digit more than the numbers.
    """
    words = (*SPECIAL, *DIGITS, "+", "=")
    both = digits_of(chosen(100**digits), 10, 2 * digits) + ZERO
    plus, equals = (np.full((len(both), 1), words.index(word)) for word in "+=")
    first, second = both[:, :digits], both[:, digits:]
    place = 10 ** np.arange(digits)[::-1]

    def right_answer(prompt_ids: jax.Array) -> jax.Array:
        numbers = prompt_ids[:, 1 : digits + 1], prompt_ids[:, digits + 2 : -1]
        return ((numbers[0] - ZERO) + (numbers[1] - ZERO)) @ place

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        body = mask & (completion_ids != EOS)
        digit = completion_ids - ZERO
        wrong = body & ((digit < 0) | (digit > 9))
        following = body.sum(1, keepdims=True) - 1 - np.arange(digits + 2)
        value = jnp.where(body & ~wrong, digit * 10 ** jnp.maximum(following, 0), 0).sum(1)
        ended = (mask & ~body).any(1)
        spelled = body.any(1) & ~wrong.any(1) & ended
        return (spelled & (value == right_answer(prompt_ids))).astype(jnp.float32)

    def demonstrate(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        answer = right_answer(prompt_ids)[:, None]
        answer = answer // 10 ** np.arange(digits + 1)[::-1] % 10 + ZERO
        return jnp.pad(answer, ((0, 0), (0, 1)), constant_values=EOS).astype(jnp.int32)

    prompts = np.hstack([first, plus, second, equals])
    return verified(words, prompts, digits + 2, demonstrate=demonstrate, reward=reward)


def sorting(count: int) -> interface.Task:
    """Return the task of sorting digits: `3 1 4 :` and then `1 3 4`."""
    words = (*SPECIAL, *DIGITS, ":")
    numbers = digits_of(chosen(10**count), 10, count) + ZERO
    colon = np.full((len(numbers), 1), words.index(":"))

    def demonstrate(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        answer = jnp.sort(prompt_ids[:, 1:-1], axis=1)
        return jnp.pad(answer, ((0, 0), (0, 1)), constant_values=EOS)

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        right = demonstrate(random.key(0), prompt_ids)  # the only right answer
        return (completion_ids == right).all(1).astype(jnp.float32)

    prompts = np.hstack([numbers, colon])
    return verified(words, prompts, count + 1, demonstrate=demonstrate, reward=reward)


def verified(
    words: tuple[str, ...], prompts: np.ndarray, length: int, **fields: Any
) -> interface.Task:
    """Return a task with right and wrong answers.

    Args:
        words: of the vocabulary.
        prompts: [X, P-1] ids, to be preceded by the beginning. Each is drawn equally often.
        length: L, of completions.
        fields: others of the task.
    """
    count = len(prompts)
    return interface.Task(
        words=words,
        suppressed=(PAD, BOS),
        prompt_ids=np.pad(prompts, ((0, 0), (1, 0)), constant_values=BOS).astype(np.int32),
        prompt_probability=np.full(count, 1 / count),
        held_out=np.random.default_rng(1).permutation(count) < HELD_OUT * count,
        completion_length=length,
        passing=1.0,
        **fields,
    )


def chosen(count: int) -> np.ndarray:
    """Return the numbers below `count`, or MOST_PROMPTS of them, drawn once and sorted."""
    if count <= MOST_PROMPTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, MOST_PROMPTS, replace=False))


def digits_of(numbers: np.ndarray, base: int, width: int) -> np.ndarray:
    """Return the digits of numbers [X] to some base, the most significant first -> [X, width]."""
    return numbers[:, None] // base ** np.arange(width)[::-1] % base
