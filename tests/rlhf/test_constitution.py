"""The constitution: rules that criticise and revise, and the trainer that learns from them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.rlhf import constitution as trainer
from purejaxpg.rlhf import measure, sft, tasks, tokens, transformer
from purejaxpg.rlhf.tasks import constitution, sentiment

TASK, LESSONS = tasks.make("constitution"), tasks.make("constitution-lessons")
K = len(constitution.PRINCIPLES)


def of_words(*sentences):
    rows = [[constitution.WORDS.index(word) for word in text.split()] for text in sentences]
    return jnp.array([row + [constitution.PAD] * (16 - len(row)) for row in rows])


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(task, count):
    prompts = task.prompts(random.key(1), count)
    return prompts, task.demonstrate(random.key(2), prompts)


def any_completions(count=4000):
    """Half are random words, with more adjectives than there are; half are of the grammar."""
    rng = np.random.default_rng(0)
    random_words = rng.integers(constitution.EOS, len(sentiment.WORDS), size=(count, 16))
    adjectives = rng.permuted(np.flatnonzero(constitution.ADJECTIVE)[None].repeat(16, 0), axis=1)
    random_words[:16, :14] = adjectives
    _, grammatical = drawn(TASK, count)
    ids = jnp.concatenate([jnp.array(random_words), grammatical])
    mask = tokens.completion_mask(ids, constitution.EOS)
    return jnp.where(mask, ids, constitution.PAD), mask


def first_violation(text, principle):
    """The same rules, word by word."""
    seen, clauses = [], 1
    for word in text.split():
        clauses += word in ("and", "but")
        wrong = {
            "<kind>": word in ("awful", "terrible"),
            "<varied>": word in sentiment.RATINGS and word in seen,
            "<discreet>": word in ("plot", "story"),
            "<brief>": word in ("and", "but") and clauses > 2,
        }[principle]
        if wrong:
            return word
        seen.append(word)
    return "<fine>"


@pytest.mark.parametrize("k", range(K))
def test_critiques_name_the_first_violation(k):
    ids, mask = any_completions(300)
    named = jax.jit(constitution.critique)(ids, mask, jnp.full(len(ids), k))
    found = [constitution.WORDS[i] for i in np.asarray(named)]
    expected = [first_violation(TASK.text(row), constitution.PRINCIPLES[k]) for row in ids]
    assert found == expected and len(set(found)) > 2


def test_no_exact_revision_violates_a_principle_that_was_kept():
    ids, mask = any_completions()
    before = constitution.violating(ids, mask)

    @jax.jit
    def revise(k):
        revised = constitution.revise(random.key(k), ids, mask, jnp.full(len(ids), k))
        mask_after = tokens.completion_mask(revised, constitution.EOS)
        return revised, constitution.violating(revised, mask_after)

    for k in range(K):
        revised, after = revise(k)
        assert (after.any(2) <= before.any(2)).all()
        assert (after.sum((1, 2)) <= before.sum((1, 2))).all()
        fewer = after[:, k].sum(1) < before[:, k].sum(1)
        unchanged = (revised == ids).all(1)
        assert (fewer | unchanged).all() and (unchanged | before[:, k].any(1)).all()
        assert fewer[before[:, k].any(1)].mean() > 0.9  # a word is left nearly always


def test_revisions_of_one_sentence():
    text = "plot was awful and this film was awful but the cast felt great ."
    ids = of_words(*[text] * K)
    mask = tokens.completion_mask(ids, constitution.EOS)
    revised = constitution.revise(random.key(0), ids, mask, jnp.arange(K))
    words = [TASK.text(row).split() for row in np.asarray(revised)]
    original = text.split()
    changed = [[i for i, w in enumerate(row) if w != original[i]] for row in words]
    assert changed[:3] == [[2], [7], [0]] and words[2][0] in sentiment.NOUNS
    assert " ".join(words[3]) == "plot was awful and this film was awful ."


def test_the_reward_is_lost_by_violations_and_by_bad_grammar():
    ids = of_words("film was good .", "film was awful .", "film film good .", "film was good")
    mask = tokens.completion_mask(ids, constitution.EOS)
    prompt = jnp.array([[constitution.PAD] * 2 + [1, constitution.WORDS.index("the")]])
    prompt = jnp.pad(prompt, ((0, 0), (0, 1)), constant_values=constitution.COLON)
    reward = TASK.reward(jnp.repeat(prompt, 4, 0), ids, mask)
    assert reward.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_lessons_are_answered_right_by_their_demonstrations():
    prompts, answers = drawn(LESSONS, 2000)
    last = np.asarray(prompts[:, -1])
    is_critique, is_revision = last >= constitution.FIRST_PRINCIPLE, last == constitution.REVISE
    plain = last == constitution.COLON
    assert (is_critique | is_revision | plain).all()
    assert plain.mean() == pytest.approx(constitution.PLAIN, abs=0.05)
    mask = tokens.completion_mask(answers, constitution.EOS)
    score = jax.jit(LESSONS.reward)
    reward = np.asarray(score(prompts, answers, mask))
    assert (reward[is_critique] == 1).all()
    # One revision repairs one word, so a sentence may still violate the principle.
    assert 0.9 < reward[is_revision].mean() < 1
    named = np.asarray(answers[is_critique, 0])
    assert 0.2 < (named != constitution.FINE).mean() < 0.6
    wrong = score(prompts, jnp.roll(answers, 1, axis=0), mask)
    assert wrong[is_critique].mean() < 0.6


@pytest.fixture(scope="module")
def reference():
    sizes = {"width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 8}
    config = sft.Config(task="constitution-lessons", **sizes)
    return transformer.init(random.key(0), sft.architecture(config))


def test_violations_never_rise_over_exact_revisions(reference):
    config = trainer.Config(critic="exact", num_revisions=3)
    given = trainer.Given(reference)
    state = trainer.init(random.key(0), config, given)
    score = jax.jit(lambda key: trainer.score(key, state, config, 64, given))
    scores = score(random.key(1))
    counts = np.stack([scores[f"evaluation/violations_after_{r}"] for r in range(4)])
    assert (np.diff(counts, axis=0) <= 0).all() and counts[0].mean() > counts[3].mean() + 0.3


def test_judgement_is_the_probability_of_the_answer_fine(reference):
    prompts, ids = drawn(TASK, 3)
    judged = jax.jit(trainer.judge)(prompts, ids, trainer.Given(reference))
    fine = jnp.full((3, 1), constitution.FINE)
    probability = jax.jit(measure.token_log_probs, static_argnums=3)
    for k in range(K):
        question = constitution.to_criticise(prompts, ids, jnp.full(3, k))
        expected = probability(reference, question, fine, TASK, 1.0)
        np.testing.assert_allclose(judged[:, k], expected[:, 0], atol=1e-5)
    assert float(jnp.ptp(judged, axis=1).min()) > 1e-4


@pytest.mark.parametrize("phase", ["revision", "feedback"])
def test_an_update_moves_the_policy_and_not_the_assistant(reference, phase):
    config = trainer.Config(phase=phase, batch_size=8, group_size=4, num_revisions=1)
    given = trainer.Given(reference)
    state = trainer.init(random.key(0), config, given)
    after, metrics = jax.jit(trainer.update)(random.key(1), state, config, given)
    assert all(np.isfinite(value) for value in metrics.values())
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, state.params)
    assert any(jax.tree.leaves(moved)) and after.num_updates == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sentiment"}, "task must be one of 'constitution'"),
        ({"phase": "both"}, "phase must be one of"),
        ({"critic": "human"}, "critic must be one of"),
        ({"num_revisions": -1}, "num_revisions must be 0 or more, but is -1"),
        ({"phase": "feedback", "group_size": 1}, "group_size must be 2 or more, but is 1"),
        ({"phase": "feedback", "group_size": 7}, "group_size must divide batch_size"),
    ],
)
def test_an_impossible_configuration_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        trainer.check(dataclasses.replace(trainer.Config(), **change))


def test_an_assistant_that_cannot_read_a_question_is_refused(reference):
    short_architecture = dataclasses.replace(reference.architecture, context=30)
    short = jax.eval_shape(lambda: transformer.init(random.key(0), short_architecture))
    for given, name in (
        (trainer.Given(short), "reference"),
        (trainer.Given(reference, short), "assistant"),
    ):
        with pytest.raises(InputError, match=f"given {name} must have a context of at least 41"):
            trainer.check_given(trainer.Config(), given)
    trainer.check_given(trainer.Config(), trainer.Given(short, reference))
