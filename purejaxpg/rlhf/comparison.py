"""Questions to a judge: a language model that reads two completions and names the better one.

A judge has the words of a task and four more: a separator, the question, and its two answers, "the
first" and "the second". It reads

    prompt, first completion, separator, second completion, question

and its log-odds of the answer "the first" are

    ℓ(x, y, y') = log p("the first" | x, y, y') − log p("the second" | x, y, y')

A judge may like a position. So it is asked in both orders, and the log-odds that y is better are

    ½ (ℓ(x, y, y') − ℓ(x, y', y))

A preference for a position that adds the same number to both cancels exactly. The mean of the two
*probabilities* has the same winner, but the preference cancels only in part. That mean is what Lee
et al. 2023, arXiv:2309.00267, take ("Addressing position bias").
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import nn

from purejaxpg import config as configs
from purejaxpg.rlhf import tasks, tokens, transformer

# Ids beyond those of the task, in this order. The answers are the last two.
SEPARATOR, QUESTION, FIRST, SECOND = range(4)
NUM_WORDS = 4


def length(task: tasks.Task) -> int:
    """Return S, the tokens of a question: a prompt, two completions, separator and question."""
    return task.prompt_length + 2 * task.completion_length + 2


def encode(
    prompt_ids: jax.Array, first_ids: jax.Array, second_ids: jax.Array, task: tasks.Task
) -> jax.Array:
    """Return the ids of questions.

    Args:
        prompt_ids: [B, P] int32, padded on the left.
        first_ids: [B, L] int32, the completion that is shown first; what follows its end token
            does not matter.
        second_ids: [B, L] int32.
        task: whose words the ids are.

    Returns:
        [B, S] int32.
    """

    def word(which: int) -> jax.Array:
        return jnp.full((len(prompt_ids), 1), len(task.words) + which, jnp.int32)

    first, second = (
        jnp.where(tokens.completion_mask(ids, task.eos_id), ids, task.pad_id)
        for ids in (first_ids, second_ids)
    )
    parts = [prompt_ids, first, word(SEPARATOR), second, word(QUESTION)]
    return jnp.concatenate(parts, axis=1)


def ask(
    judge: tokens.Function,
    prompt_ids: jax.Array,
    first_ids: jax.Array,
    second_ids: jax.Array,
    task: tasks.Task,
) -> jax.Array:
    """Return the log-odds that the completion shown first is better, asked in this order.

    Args:
        judge: (ids [B, S], segments [B, S]) -> logits [B, S, V+4].
        prompt_ids: [B, P] int32, padded on the left.
        first_ids: [B, L] int32.
        second_ids: [B, L] int32.
        task: whose words the ids are.

    Returns:
        [B] log-odds in nats.
    """
    ids = encode(prompt_ids, first_ids, second_ids, task)
    segments = tokens.segments(prompt_ids, ids.shape[1] - prompt_ids.shape[1], task.pad_id)
    answer = judge(ids, segments)[:, -1, len(task.words) :]
    return answer[:, FIRST] - answer[:, SECOND]


def ask_twice(
    judge: tokens.Function,
    prompt_ids: jax.Array,
    ids: jax.Array,
    other_ids: jax.Array,
    task: tasks.Task,
) -> tuple[jax.Array, jax.Array]:
    """Return the log-odds that a completion is better, shown first and shown second.

    Args:
        judge: (ids [2B, S], segments [2B, S]) -> logits [2B, S, V+4].
        prompt_ids: [B, P] int32, padded on the left.
        ids: [B, L] int32, the completion in question.
        other_ids: [B, L] int32, what it is compared with.
        task: whose words the ids are.

    Returns:
        [B] and [B] log-odds in nats. A judge without a position bias says the same twice.
    """
    first, second = jnp.concatenate([ids, other_ids]), jnp.concatenate([other_ids, ids])
    twice = jnp.concatenate([prompt_ids, prompt_ids])
    shown_first, other_first = jnp.split(ask(judge, twice, first, second, task), 2)
    return shown_first, -other_first


def log_odds(
    judge: tokens.Function,
    prompt_ids: jax.Array,
    ids: jax.Array,
    other_ids: jax.Array,
    task: tasks.Task,
) -> jax.Array:
    """Return the log-odds [B] that a completion is better, averaged over both orders.

    The arguments are those of `ask_twice`.
    """
    shown_first, shown_second = ask_twice(judge, prompt_ids, ids, other_ids, task)
    return 0.5 * (shown_first + shown_second)


def position_bias(shown_first: jax.Array, shown_second: jax.Array) -> jax.Array:
    """Return P("the first") − ½ over both orders of a pair: [...] log-odds twice -> [...].

    It is 0 for a judge that takes no account of positions, and ½ for one that always answers "the
    first". The arguments are what `ask_twice` returns.
    """
    return 0.5 * (nn.sigmoid(shown_first) + nn.sigmoid(-shown_second)) - 0.5


def architecture(model: transformer.Model, task: tasks.Task) -> transformer.Architecture:
    """Return the architecture of a judge that is as large as a language model."""
    size = len(task.words)
    return dataclasses.replace(
        model.architecture,
        vocab_size=size + NUM_WORDS,
        context=length(task),
        suppressed=tuple(range(size + FIRST)),  # nothing but the two answers
    )


def start(key: jax.Array, model: transformer.Model, task: tasks.Task) -> transformer.Model:
    """Return a judge before its training, with the parameters of a language model.

    Args:
        key: for the parameters that the language model does not have: those of the added words and
            of later positions.
        model: a language model of the task.
        task: the task.
    """
    new = transformer.init(key, architecture(model, task))

    def copied(new: jax.Array, old: jax.Array) -> jax.Array:
        common = tuple(slice(min(n)) for n in zip(new.shape, old.shape, strict=True))
        return new.at[common].set(old[common])

    return dataclasses.replace(new, params=jax.tree.map(copied, new.params, model.params))


def check_judge(config: Any, judge: transformer.Model | None) -> None:
    """Raise an InputError unless a given judge, if there is one, was made for the task.

    Args:
        config: its `task` is read.
        judge: its parameters may be jax.ShapeDtypeStruct.
    """
    if judge is None:
        return
    task, a = tasks.make(config.task), judge.architecture
    configs.require(a.output == "tokens", "given judge must be a judge, but is a reward model.")
    size = len(task.words)
    configs.require(
        a.vocab_size == size + NUM_WORDS,
        f"given judge must have the {size} tokens of task {config.task!r} and {NUM_WORDS} more, "
        f"but has {a.vocab_size}.",
    )
    configs.require(
        a.context == length(task),
        f"given judge must be made for questions of {length(task)} tokens, as for task "
        f"{config.task!r}, but is made for {a.context}.",
    )
