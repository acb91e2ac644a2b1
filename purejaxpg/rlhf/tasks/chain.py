"""Chains of sums modulo a number, whose steps can be checked one by one.

After the prompt `3 5 2 :` the right completion modulo 10 is `8 ; 0 ;`, a line for each number that
is added. A step is right if its number follows from the line before, itself right or not. So the
last number may be right in spite of wrong steps, and the last number is all that the reward asks
for. The end is a step of its own: right after as many lines as there are numbers to add.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from purejaxpg.rlhf.tasks import interface, verifiable

EOS, ZERO = interface.EOS, verifiable.ZERO
# In a demonstration, each step is wrong with this probability, and the next go on from there: whom
# they teach makes mistakes, and process and outcome rewards then differ.
STEP_ERROR = 0.15


def make(count: int, modulus: int, step_error: float = STEP_ERROR) -> interface.Task:
    """Return the task with `count` steps modulo `modulus`.

    Args:
        count: K, the numbers that are added to a first one.
        modulus: M, numbers are below it.
        step_error: share of wrong steps in demonstrations.
    """
    words = (*verifiable.SPECIAL, *verifiable.DIGITS[:modulus], ";", ":")
    numbers = verifiable.digits_of(verifiable.chosen(modulus ** (count + 1)), modulus, count + 1)
    colon = np.full((len(numbers), 1), words.index(":"))
    rules = Rules(count, modulus, step_error, line_end=words.index(";"))
    return verifiable.verified(
        words,
        np.hstack([numbers + ZERO, colon]),
        2 * count + 1,
        demonstrate=rules.demonstrate,
        reward=rules.reward,
        steps=rules.steps,
    )


@dataclasses.dataclass(frozen=True)
class Rules:
    """What is right in a chain."""

    count: int
    modulus: int
    step_error: float
    line_end: int  # id of `;`

    def reward(
        self, prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Return 1 where each line is a number and the last one is right -> [B]."""
        results, ends = completion_ids[:, :-1:2], completion_ids[:, 1::2]
        well_formed = self.is_number(results).all(1) & (ends == self.line_end).all(1)
        total = (prompt_ids[:, 1:-1] - ZERO).sum(1) % self.modulus
        right = (completion_ids[:, -1] == EOS) & (results[:, -1] - ZERO == total)
        return (well_formed & right).astype(jnp.float32)

    def steps(
        self, prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Return the last token of each step, and whether that step is right -> [B, L] each."""
        ids = completion_ids
        is_line = ids == self.line_end
        index = jnp.cumsum(is_line, axis=1) - is_line  # of the line that a token belongs to
        # The first number of the prompt stands for a line before the first.
        padded = jnp.pad(ids, ((0, 0), (4, 0)), constant_values=self.line_end)
        padded = padded.at[:, 2].set(prompt_ids[:, 1])
        first, before, second, number = (padded[:, i : i + ids.shape[1]] for i in range(4))
        term = jnp.take_along_axis(prompt_ids, 2 + jnp.minimum(index, self.count - 1), axis=1)
        follows = (before - ZERO + term - ZERO) % self.modulus == number - ZERO
        well_formed = (first == self.line_end) & (second == self.line_end)
        well_formed &= self.is_number(before) & self.is_number(number)
        right = is_line & well_formed & follows & (index < self.count)
        finishes = (ids == EOS) & (number == self.line_end) & (index == self.count)
        is_last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
        ends = (mask & is_line) | is_last
        return ends, ends & (right | finishes)

    def demonstrate(self, key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        """Complete prompts [B, P], with some wrong steps -> [B, L]."""
        key_wrong, key_slip = random.split(key)
        numbers = prompt_ids[:, 1:-1] - ZERO
        wrong = random.bernoulli(key_wrong, self.step_error, numbers[:, 1:].shape)
        slip = jnp.where(wrong, random.randint(key_slip, wrong.shape, 1, self.modulus), 0)
        result = (numbers[:, :1] + jnp.cumsum(numbers[:, 1:] + slip, axis=1)) % self.modulus + ZERO
        lines = jnp.stack([result, jnp.full_like(result, self.line_end)], axis=2)
        lines = lines.reshape(len(lines), -1)
        return jnp.pad(lines, ((0, 0), (0, 1)), constant_values=EOS).astype(jnp.int32)

    def is_number(self, ids: jax.Array) -> jax.Array:
        """Return whether tokens are numbers below the modulus."""
        return (ids >= ZERO) & (ids < ZERO + self.modulus)
