"""Sentences under a constitution: principles, critiques of a sentence, and its revisions.

The sentences are those of `sentiment`. Four principles forbid some of what its grammar produces:

    <kind>      no harsh adjective
    <varied>    no adjective twice
    <discreet>  nothing about plot and story
    <brief>     at most two clauses

The task `constitution` asks for a sentence. `constitution-lessons` also asks for critiques of
sentences in the light of one principle, and for revisions, so that a model learns all three:

    <bos> the film :                                                           was awful .
    <bos> the film : was awful . <blank> ... <critique> <kind>                 awful .
    <bos> the film : was awful . <blank> ... <critique> <kind> awful <revise>  was poor .

A critique names the first word that violates the principle, or is `<fine>`. A revision replaces
that word, or ends the sentence before it. Blanks keep every part of a question in its place.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from purejaxpg.rlhf import tokens
from purejaxpg.rlhf.tasks import interface, sentiment

PAD, BOS, EOS = interface.PAD, interface.BOS, interface.EOS
PRINCIPLES = ("<kind>", "<varied>", "<discreet>", "<brief>")  # K of them
MARKS = (":", "<blank>", "<critique>", "<revise>", "<fine>")
WORDS = (*sentiment.WORDS, *MARKS, *PRINCIPLES)
COLON, BLANK, CRITIQUE, REVISE, FINE = map(WORDS.index, MARKS)
FIRST_PRINCIPLE = WORDS.index(PRINCIPLES[0])
HARSH, SECRET = ("awful", "terrible"), ("plot", "story")
MOST_CLAUSES = 2
PLAIN = 0.25  # share of lessons that ask for a sentence; the others are half critiques


def make() -> interface.Task:
    """Return the task: 1 for a correct sentence, less 1 for each principle that it violates."""
    plain = sentiment.make(WORDS)
    colon = np.full((len(plain.prompt_ids), 1), COLON, np.int32)
    grammatical = (sentiment.grammar(WORDS) > 0).any(0)

    def demonstrate(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        return plain.demonstrate(key, prompt_ids[:, :-1])

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        before = jnp.concatenate([prompt_ids[:, -2:-1], completion_ids[:, :-1]], axis=1)
        follows = jnp.asarray(grammatical)[before, completion_ids]
        correct = jnp.where(mask, follows, True).all(1) & tokens.finished(completion_ids, EOS)
        violated = violations(completion_ids, mask).sum(1)
        return correct.astype(jnp.float32) - violated.astype(jnp.float32)

    prompt_ids = np.hstack([plain.prompt_ids, colon])
    return dataclasses.replace(
        plain, prompt_ids=prompt_ids, demonstrate=demonstrate, reward=reward, additive=None
    )


# ----------------------------------------------------------------------------------- principles


def is_any(words: tuple[str, ...]) -> np.ndarray:
    """Return which tokens are one of these words, [V] bool."""
    return np.isin(WORDS, words)


ADJECTIVE, CONJUNCTION = is_any(tuple(sentiment.RATINGS)), is_any(sentiment.CONJUNCTIONS)


def violating(completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Return which words violate each principle.

    Args:
        completion_ids: [B, L] int32.
        mask: [B, L] bool, True up to the end token.

    Returns:
        [B, K, L] bool.
    """
    same = completion_ids[:, :, None] == completion_ids[:, None, :]
    again = jnp.tril(same & mask[:, None, :], -1).any(2)
    clauses = 1 + jnp.cumsum(jnp.asarray(CONJUNCTION)[completion_ids], axis=1)
    of_principle = (
        jnp.asarray(is_any(HARSH))[completion_ids],
        jnp.asarray(ADJECTIVE)[completion_ids] & again,
        jnp.asarray(is_any(SECRET))[completion_ids],
        jnp.asarray(CONJUNCTION)[completion_ids] & (clauses > MOST_CLAUSES),
    )
    return jnp.stack(of_principle, 1) & mask[:, None, :]


def violations(completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Return which principles completions [B, L] violate -> [B, K] bool."""
    return violating(completion_ids, mask).any(2)


def critique(completion_ids: jax.Array, mask: jax.Array, principle: jax.Array) -> jax.Array:
    """Return the first word that violates a principle, or `<fine>`.

    Args:
        completion_ids: [B, L] int32.
        mask: [B, L] bool.
        principle: [B] int32, from 0 to K-1.

    Returns:
        [B] int32, ids of words.
    """
    wrong = violating(completion_ids, mask)[jnp.arange(len(principle)), principle]
    named = jnp.take_along_axis(completion_ids, wrong.argmax(1)[:, None], axis=1)[:, 0]
    return jnp.where(wrong.any(1), named, FINE).astype(jnp.int32)


def revise(
    key: jax.Array, completion_ids: jax.Array, mask: jax.Array, principle: jax.Array
) -> jax.Array:
    """Revise completions so that no principle is violated that was not violated before.

    The first word that violates the principle is replaced by a random word of its kind, or ends
    the sentence if there are too many clauses. A new adjective is one that the completion does not
    have yet.

    Args:
        key: for the words.
        completion_ids: [B, L] int32.
        mask: [B, L] bool.
        principle: [B] int32, from 0 to K-1.

    Returns:
        [B, L] int32; unchanged where nothing violates the principle, or no word is left.
    """
    wrong = violating(completion_ids, mask)[jnp.arange(len(principle)), principle]
    first = wrong & (jnp.cumsum(wrong, axis=1) == 1)
    used = (jax.nn.one_hot(completion_ids, len(WORDS)) * mask[..., None]).any(1)
    adjectives = jnp.asarray(ADJECTIVE & ~is_any(HARSH)) & ~used
    nouns = jnp.asarray(is_any(sentiment.NOUNS) & ~is_any(SECRET))
    allowed = jnp.where((principle == PRINCIPLES.index("<discreet>"))[:, None], nouns, adjectives)
    word = random.categorical(key, jnp.where(allowed, 0.0, -1e9))[:, None]
    ends = (principle == PRINCIPLES.index("<brief>"))[:, None]
    word = jnp.where(ends, EOS, word)
    possible = ends | allowed.any(1, keepdims=True)
    revised = jnp.where(first & possible, word, completion_ids)
    after_end = ends & (jnp.cumsum(first, axis=1) > 0) & ~first
    return jnp.where(after_end, PAD, revised).astype(jnp.int32)


# -------------------------------------------------------------------------------------- questions


def to_criticise(
    prompt_ids: jax.Array, completion_ids: jax.Array, principle: jax.Array
) -> jax.Array:
    """Ask for a critique of completions [B, L] of prompts [B, P] -> ids [B, P+L+2]."""
    filled = jnp.where(completion_ids == PAD, BLANK, completion_ids)
    mark = jnp.full_like(principle, CRITIQUE)
    named = FIRST_PRINCIPLE + principle
    return jnp.concatenate([prompt_ids, filled, mark[:, None], named[:, None]], axis=1)


def to_revise(
    prompt_ids: jax.Array, completion_ids: jax.Array, principle: jax.Array, named: jax.Array
) -> jax.Array:
    """Ask for a revision after a critique, ids [B] -> ids [B, P+L+4]."""
    question = to_criticise(prompt_ids, completion_ids, principle)
    mark = jnp.full_like(named, REVISE)
    return jnp.concatenate([question, named[:, None], mark[:, None]], axis=1)


class Lessons(interface.Task):
    """Questions of all three kinds, and the right answers."""

    def prompts(self, key: jax.Array, count: int, held_out: bool = False) -> jax.Array:
        """Draw questions -> ids [count, P]."""
        key_prompt, key_answer, key_principle, key_kind = random.split(key, 4)
        task = make()
        prompt_ids = task.prompts(key_prompt, count, held_out)
        answer = task.demonstrate(key_answer, prompt_ids)
        principle = random.randint(key_principle, (count,), 0, len(PRINCIPLES))
        named = critique(answer, tokens.completion_mask(answer, EOS), principle)
        questions = (
            prompt_ids,
            to_criticise(prompt_ids, answer, principle),
            to_revise(prompt_ids, answer, principle, named),
        )
        plain, critic, reviser = (
            jnp.pad(ids, ((0, 0), (self.prompt_length - ids.shape[1], 0))) for ids in questions
        )
        kind = random.uniform(key_kind, (count, 1))
        lesson = jnp.where(kind < (1 + PLAIN) / 2, critic, reviser)
        return jnp.where(kind < PLAIN, plain, lesson)


def lessons() -> interface.Task:
    """Return the task whose demonstrations are sentences, critiques and revisions.

    Its reward is that of `make` where a sentence is asked for, 1 for a right critique, and 1 for
    a revision that no longer violates the principle.
    """
    task = make()
    length, prompt_length = task.completion_length, task.prompt_length
    longest = prompt_length + length + 4

    def parts(prompt_ids: jax.Array) -> tuple[jax.Array, ...]:
        last = prompt_ids[:, -1]
        is_revision, is_critique = last == REVISE, last >= FIRST_PRINCIPLE
        end = jnp.where(is_revision, longest - 4, longest - 2)
        index = end[:, None] - length + jnp.arange(length)
        answer = jnp.take_along_axis(prompt_ids, index, axis=1)
        named = jnp.take_along_axis(prompt_ids, end[:, None] + 1, axis=1)[:, 0]
        principle = jnp.clip(named - FIRST_PRINCIPLE, 0, len(PRINCIPLES) - 1)
        return is_critique, is_revision, jnp.where(answer == BLANK, PAD, answer), principle

    def demonstrate(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        is_critique, is_revision, answer, principle = parts(prompt_ids)
        mask = tokens.completion_mask(answer, EOS)
        named = critique(answer, mask, principle)[:, None]
        verdict = jnp.pad(named, ((0, 0), (0, length - 1)))
        verdict = jnp.where(jnp.arange(length) == 1, EOS, verdict)
        plain = task.demonstrate(key, prompt_ids)
        lesson = jnp.where(is_critique[:, None], verdict, revise(key, answer, mask, principle))
        return jnp.where((is_critique | is_revision)[:, None], lesson, plain)

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        is_critique, is_revision, answer, principle = parts(prompt_ids)
        named = critique(answer, tokens.completion_mask(answer, EOS), principle)
        is_right = (completion_ids[:, 0] == named) & (completion_ids[:, 1] == EOS)
        kept = ~violations(completion_ids, mask)[jnp.arange(len(principle)), principle]
        lesson = jnp.where(is_critique, is_right, kept).astype(jnp.float32)
        plain = task.reward(prompt_ids, completion_ids, mask)
        return jnp.where(is_critique | is_revision, lesson, plain)

    fields = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    padded = np.pad(task.prompt_ids, ((0, 0), (longest - prompt_length, 0)))
    changed = {"prompt_ids": padded, "demonstrate": demonstrate, "reward": reward}
    return Lessons(**{**fields, **changed})
