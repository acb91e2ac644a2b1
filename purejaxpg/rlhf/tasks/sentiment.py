"""Controlled sentiment: sentences about films from a small grammar, rated by their words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from purejaxpg.rlhf.tasks import interface

PAD, EOS = interface.PAD, interface.EOS
# A completion without an end scores this, whatever it says. A reward that adds up over tokens would
# otherwise pay for never ending.
UNFINISHED = -3.0
UNGRAMMATICAL = -1.0  # for each pair of neighbouring words that the grammar never produces

# Means of ten human ratings from -4 to 4, in the lexicon of vaderSentiment 3.3.2: Hutto and Gilbert
# 2014, "VADER: a parsimonious rule-based model for sentiment analysis of social media text".
RATINGS = {
    "great": 3.1, "superb": 3.1, "lovely": 2.8, "clever": 2.0, "good": 1.9, "fresh": 1.3,
    "fine": 0.8, "boring": -1.3, "dull": -1.7, "weak": -1.9, "awful": -2.0, "poor": -2.1,
    "terrible": -2.1, "bad": -2.5,
}  # fmt: skip
DETERMINERS, CONJUNCTIONS = ("the", "this"), ("and", "but")
NOUNS = ("film", "plot", "acting", "music", "story", "cast")
VERBS, ADVERBS = ("was", "felt", "seemed"), ("very", "quite", "rather")

WORDS = ("<pad>", "<bos>", ".", *DETERMINERS, *NOUNS, *VERBS, *CONJUNCTIONS, *ADVERBS, *RATINGS)


def make(words: tuple[str, ...] = WORDS) -> interface.Task:
    """Return the task: the reward adds up ratings of words, and demands grammar and an end.

    Args:
        words: the vocabulary, with the words of this task first.
    """
    chains = grammar(words)
    prompt_ids, probability = _prefixes(chains.mean(0), longest=4)
    rating = np.array([RATINGS.get(word, 0.0) for word in words], np.float32)
    grammatical = (chains > 0).any(0)
    token_reward = 0.5 * rating + np.float32(UNGRAMMATICAL) * ~grammatical

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        before = jnp.concatenate([prompt_ids[:, -1:], completion_ids[:, :-1]], axis=1)
        score = jnp.asarray(token_reward)[before, completion_ids]
        total = jnp.where(mask, score, 0.0).sum(1)
        return jnp.where((completion_ids == EOS).any(1), total, UNFINISHED)

    return interface.Task(
        words=words,
        suppressed=(PAD, interface.BOS),
        prompt_ids=prompt_ids,
        prompt_probability=probability,
        held_out=np.arange(len(prompt_ids)) % 5 == 4,
        completion_length=16,
        demonstrate=functools.partial(_continue, chains, 16),
        reward=reward,
        additive=(token_reward, UNFINISHED),
    )


def grammar(words: tuple[str, ...]) -> np.ndarray:
    """Return how often each word follows each in sentences of bad and of good mood, [2, V, V]."""
    return np.stack([_chain(words, mood) for mood in (-1, 1)])


def _chain(words: tuple[str, ...], mood: int) -> np.ndarray:
    """Return how often each word follows each in the sentences of a mood, [V, V].

    A sentence is DETERMINER NOUN VERB [ADVERB] ADJECTIVE, then the end, or a conjunction and
    another such clause. In good mood (1) three in four adjectives are positive, in bad mood (-1)
    one in four.
    """
    index = {word: i for i, word in enumerate(words)}
    chain = np.zeros((len(words), len(words)))
    share = {word: 0.75 if rating * mood > 0 else 0.25 for word, rating in RATINGS.items()}
    adjectives = {word: share[word] / 7 for word in RATINGS}
    rules: list[tuple[tuple[str, ...], dict[str, float]]] = [
        (("<bos>", *CONJUNCTIONS), dict.fromkeys(DETERMINERS, 0.5)),
        (DETERMINERS, dict.fromkeys(NOUNS, 1 / 6)),
        (NOUNS, dict.fromkeys(VERBS, 1 / 3)),
        (VERBS, {**dict.fromkeys(ADVERBS, 0.1), **{w: 0.7 * p for w, p in adjectives.items()}}),
        (ADVERBS, adjectives),
        (tuple(RATINGS), {".": 0.5, "and": 0.3, "but": 0.2}),
    ]
    for befores, afters in rules:
        for before in befores:
            for after, probability in afters.items():
                chain[index[before], index[after]] = probability
    return chain


def _continue(chains: np.ndarray, length: int, key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
    """Continue prompts [B, P] in a mood drawn for each -> completion ids [B, length]."""
    key_mood, key_words = random.split(key)
    mood = random.bernoulli(key_mood, shape=prompt_ids.shape[:1]).astype(int)
    log_p = jnp.log(jnp.maximum(chains, 1e-38))

    def step(word: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        following = random.categorical(key, log_p[mood, word])
        following = jnp.where((word == EOS) | (word == PAD), PAD, following).astype(jnp.int32)
        return following, following

    return lax.scan(step, prompt_ids[:, -1], random.split(key_words, length))[1].T


def _prefixes(chain: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all beginnings of sentences, 2 to `longest` tokens, and how often each is drawn.

    Every length is as likely as every other.
    """
    known: dict[tuple[int, ...], float] = {(interface.BOS,): 1.0}
    prompts: dict[tuple[int, ...], float] = {}
    for _ in range(2, longest + 1):
        known = {
            (*prefix, int(word)): p * chain[prefix[-1], word]
            for prefix, p in known.items()
            for word in np.flatnonzero(chain[prefix[-1]])
        }
        prompts.update(known)
    ids = np.array([(PAD,) * (longest - len(prefix)) + prefix for prefix in prompts], np.int32)
    return ids, np.array(list(prompts.values())) / (longest - 1)
