"""Countdown: make a target out of numbers, each of which must be used exactly once.

The prompt `3 5 2 = 1 3` asks for 13, and `3 5 2 * +` is an answer: 3 + 5 * 2 in postfix notation,
which needs no brackets and is evaluated with a stack. A division must leave no remainder. The
reward is 1 for an answer, FORMAT_REWARD for an expression that can be evaluated, and 0 otherwise,
as in TinyZero (Pan et al. 2025). Every prompt has an answer.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from purejaxpg.rlhf.tasks import interface, verifiable

EOS, ZERO = interface.EOS, verifiable.ZERO
FORMAT_REWARD = 0.1
LARGEST_TARGET = 99  # the least is 1
OPERATORS = ("+", "-", "*", "/")
WORDS = (*verifiable.SPECIAL, *verifiable.DIGITS, *OPERATORS, "=")
FIRST_OPERATOR = WORDS.index(OPERATORS[0])


def make(count: int) -> interface.Task:
    """Return the task with `count` numbers from 1 to 9."""
    asked, answers = _instances(count)
    powers = 10 ** np.arange(count + 2)[::-1]
    codes = asked @ powers

    def demonstrate(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        known = jnp.concatenate([prompt_ids[:, 1 : count + 1], prompt_ids[:, count + 2 :]], axis=1)
        place = jnp.searchsorted(jnp.asarray(codes), (known - ZERO) @ powers)
        return jnp.asarray(answers)[place]

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        body = mask & (completion_ids != EOS)
        # An expression has an odd number of tokens. Without an end there would be an even one.
        value, valid = jax.vmap(functools.partial(evaluate, size=count))(completion_ids, body)
        used = _how_often(completion_ids, body)
        given = _how_often(prompt_ids[:, 1 : count + 1], True)
        target = (prompt_ids[:, -2:] - ZERO) @ np.array([10, 1])
        right = valid & (used == given).all(1) & (value == target)
        return jnp.where(right, 1.0, jnp.where(valid, FORMAT_REWARD, 0.0))

    equals = np.full(len(asked), WORDS.index("="))
    prompts = np.insert(asked + ZERO, count, equals, axis=1)
    return verifiable.verified(WORDS, prompts, 2 * count, demonstrate=demonstrate, reward=reward)


def evaluate(ids: jax.Array, body: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Evaluate an expression in postfix notation.

    Args:
        ids: [L] numbers 1 to 9 and operators.
        body: [L] bool, the tokens that belong to the expression.
        size: of the stack.

    Returns:
        [] int32 its value, and [] bool whether it has one: no other tokens, no number too many or
        too few at any time, and no division by zero or with a remainder.
    """

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array], now: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        (stack, height, valid), (token, counts) = carry, now
        left, right = stack[jnp.maximum(height - 2, 0)], stack[jnp.maximum(height - 1, 0)]
        divisor = jnp.where(right == 0, 1, right)
        results = jnp.stack([left + right, left - right, left * right, left // divisor])
        operator = token - FIRST_OPERATOR
        is_number = (token > ZERO) & (token <= ZERO + 9)
        is_operator = (operator >= 0) & (operator < len(OPERATORS))
        whole = (right != 0) & (left % divisor == 0)
        possible = (height >= 2) & (whole | (operator != OPERATORS.index("/")))
        fits = jnp.where(is_number, height < size, is_operator & possible)
        result = jnp.where(is_number, token - ZERO, results[jnp.clip(operator, 0, 3)])
        new_height = height + jnp.where(is_number, 1, -1)
        new_stack = stack.at[jnp.clip(new_height - 1, 0, size - 1)].set(result)
        changed = (new_stack, new_height, valid & fits)
        return jax.tree.map(lambda new, old: jnp.where(counts, new, old), changed, carry), None

    start = (jnp.zeros(size, jnp.int32), jnp.int32(0), jnp.array(True))
    (stack, height, valid), _ = lax.scan(step, start, (ids.astype(jnp.int32), body))
    return stack[0], valid & (height == 1)


def _how_often(ids: jax.Array, counts: jax.Array | bool) -> jax.Array:
    """Return how often each number from 1 to 9 occurs [B, L] -> [B, 9]."""
    is_number = ids[..., None] == ZERO + 1 + np.arange(9)
    return (is_number & jnp.expand_dims(counts, -1)).sum(1)


def _instances(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what is asked, and an answer to it, for all prompts or as many as a task may have.

    Returns:
        [X, count + 2] the numbers and the two digits of the target, in ascending order of the rows;
        [X, 2 * count] int32 ids.
    """
    asked = [
        (*numbers, target)
        for numbers in itertools.product(range(1, 10), repeat=count)
        for target in sorted(_reachable(tuple(sorted(numbers))))
        if 1 <= target <= LARGEST_TARGET
    ]
    asked = [asked[i] for i in verifiable.chosen(len(asked))]
    answers = [
        [*map(WORDS.index, _reachable(tuple(sorted(numbers)))[target]), EOS]
        for *numbers, target in asked
    ]
    table = np.array(asked)
    digits = verifiable.digits_of(table[:, -1], 10, 2)
    return np.hstack([table[:, :-1], digits]), np.array(answers, np.int32)


@functools.cache
def _reachable(numbers: tuple[int, ...]) -> dict[int, tuple[str, ...]]:
    """Return each value that can be made of sorted numbers, with one expression for it."""
    if len(numbers) == 1:
        return {numbers[0]: (str(numbers[0]),)}
    found: dict[int, tuple[str, ...]] = {}
    every = range(len(numbers))
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(every, size):
            left = _reachable(tuple(numbers[i] for i in chosen))
            right = _reachable(tuple(numbers[i] for i in every if i not in chosen))
            for (a, first), (b, second) in itertools.product(left.items(), right.items()):
                for operator, value in _results(a, b).items():
                    found.setdefault(value, (*first, *second, operator))
    return found


def _results(a: int, b: int) -> dict[str, int]:
    """Return the results of the operators that are possible."""
    results = {"+": a + b, "-": a - b, "*": a * b}
    return {**results, "/": a // b} if b != 0 and a % b == 0 else results
