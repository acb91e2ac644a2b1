"""Addition from careless demonstrations, with a part of the answer that does not matter.

After the prompt `4 7 + 3 8 =` the right answer is `0 8 5`, or `8 5`, and dots may follow it: `8 5 .
.` is right, too. Demonstrations have slips and a random number of dots. So a model that learns
from them knows the sums, but seldom gives the right answer, and the length of an answer does not
depend on whether it is right.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import random

from purejaxpg.rlhf.tasks import interface, verifiable

EOS, ZERO = interface.EOS, verifiable.ZERO
# In a demonstration, each digit is replaced by a random one with this probability: 0.26 of the
# answers of two-digit addition are right then.
SLIP = 0.4


def make(digits: int, most_dots: int) -> interface.Task:
    """Return the task of adding two numbers and then writing dots.

    Args:
        digits: D, of each number.
        most_dots: F, demonstrations have 0 to F dots, equally often.
    """
    plain = verifiable.addition(digits)
    words = (*plain.words, ".")
    dot = words.index(".")
    shortest = plain.completion_length

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        is_dot, is_end = completion_ids == dot, completion_ids == EOS
        dots = jnp.cumsum(is_dot, axis=1)
        astray = mask & (dots > 0) & ~is_dot & ~is_end
        finished = (mask & is_end).any(1) & ~astray.any(1)
        answer = jnp.where(is_dot, EOS, completion_ids)[:, :shortest]
        before = mask & (dots - is_dot == 0)
        return finished * plain.reward(prompt_ids, answer, before[:, :shortest])

    def demonstrate(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        key_slip, key_digit, key_dots = random.split(key, 3)
        answer = plain.demonstrate(key, prompt_ids)[:, :-1]  # the same for any key
        slips = random.bernoulli(key_slip, SLIP, answer.shape)
        answer = jnp.where(slips, random.randint(key_digit, slips.shape, 0, 10) + ZERO, answer)
        count = random.randint(key_dots, (len(answer), 1), 0, most_dots + 1)
        tail = jnp.where(jnp.arange(most_dots + 1) < count, dot, EOS)
        return jnp.concatenate([answer, tail], axis=1).astype(jnp.int32)

    return dataclasses.replace(
        plain,
        words=words,
        completion_length=shortest + most_dots,
        demonstrate=demonstrate,
        reward=reward,
    )
