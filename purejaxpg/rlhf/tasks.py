"""Tasks for language models: a vocabulary, prompts, demonstrations and an exact reward.

`sentiment` is controlled sentiment over a small grammar: its reward adds up human ratings of words.
`enumerable-V-L` has V actions and completions of at most L tokens, few enough to list: everything
that theory says about it can be checked exactly. Each is a pure function of keys, so data are drawn
inside the compiled program. `register` adds a task of your own.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from purejaxpg import InputError

PAD, BOS, EOS = 0, 1, 2  # the ids of every task here
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


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a language model is to do. All arrays are constants of the compiled program.

    Attributes:
        words: V strings; their index is the id of a token. The first three are padding, the
            beginning and the end.
        suppressed: ids that a model must never produce.
        prompt_ids: [X, P] int32, every prompt, padded on the left.
        prompt_probability: [X] how often each is drawn; sums to 1.
        held_out: [X] bool, prompts for evaluation only; where none is, all serve both purposes.
        completion_length: L, the most tokens of a completion, with its end.
        demonstrate: (key, prompt ids [B, P]) -> completion ids [B, L] to imitate.
        reward: (prompt ids [B, P], completion ids [B, L], mask [B, L]) -> [B] float32.
        completion_ids: [N, L], every completion, if they can be listed; else None.
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
    pad_id: int = PAD
    eos_id: int = EOS

    @property
    def prompt_length(self) -> int:
        """P, padding included."""
        return self.prompt_ids.shape[1]

    def prompts(self, key: jax.Array, count: int, held_out: bool = False) -> jax.Array:
        """Draw prompts -> ids [count, P]; padding is PAD."""
        allowed = self.held_out if held_out else ~self.held_out
        allowed = allowed if allowed.any() else ~allowed
        log_p = np.log(np.where(allowed, self.prompt_probability, 1e-38))
        return jnp.asarray(self.prompt_ids)[random.categorical(key, log_p, shape=(count,))]

    def text(self, ids: np.ndarray) -> str:
        """Return tokens as words, without padding and beginning."""
        return " ".join(self.words[i] for i in np.asarray(ids) if i not in (PAD, BOS))


_registered: dict[str, Callable[[], Task]] = {}


def register(name: str, make_task: Callable[[], Task]) -> None:
    """Add a task under a name, for the field `task` of configurations."""
    _registered[name] = make_task


@functools.cache
def make(name: str) -> Task:
    """Return the task of this name.

    Raises:
        InputError: there is none.
    """
    if name in _registered:
        return _registered[name]()
    if name == "sentiment":
        return _sentiment()
    sizes = re.fullmatch(r"enumerable-([2-9])-([1-6])", name)
    if sizes:
        return _enumerable(*map(int, sizes.groups()))
    known = ", ".join(map(repr, ("sentiment", "enumerable-3-4", *_registered)))
    raise InputError(f"task must be one of {known} (V-L may differ), but is {name!r}.")


# --------------------------------------------------------------------------------------- sentiment


def _sentiment() -> Task:
    words = ("<pad>", "<bos>", ".", *DETERMINERS, *NOUNS, *VERBS, *CONJUNCTIONS, *ADVERBS, *RATINGS)
    chains = np.stack([_chain(words, mood) for mood in (-1, 1)])
    prompt_ids, probability = _prefixes(chains.mean(0), longest=4)
    rating = np.array([RATINGS.get(word, 0.0) for word in words], np.float32)
    grammatical = (chains > 0).any(0)

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        before = jnp.concatenate([prompt_ids[:, -1:], completion_ids[:, :-1]], axis=1)
        wrong = ~jnp.asarray(grammatical)[before, completion_ids]
        score = 0.5 * jnp.asarray(rating)[completion_ids] + UNGRAMMATICAL * wrong
        total = jnp.where(mask, score, 0.0).sum(1)
        return jnp.where((completion_ids == EOS).any(1), total, UNFINISHED)

    return Task(
        words=words,
        suppressed=(PAD, BOS),
        prompt_ids=prompt_ids,
        prompt_probability=probability,
        held_out=np.arange(len(prompt_ids)) % 5 == 4,
        completion_length=16,
        demonstrate=functools.partial(_continue, chains, 16),
        reward=reward,
    )


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
    known: dict[tuple[int, ...], float] = {(BOS,): 1.0}
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


# -------------------------------------------------------------------------------------- enumerable


def _enumerable(num_actions: int, length: int, num_prompts: int = 3) -> Task:
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
    return Task(
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
