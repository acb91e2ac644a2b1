"""The tasks: their rewards by hand, and prompts, demonstrations and completions as documented."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
from jax import random

from purejaxpg import InputError
from purejaxpg.rlhf import tasks, tokens
from purejaxpg.rlhf.tasks import interface, sentiment

SENTIMENT = tasks.make("sentiment")
EMPTY = {"prompt_probability": np.ones(0), "held_out": np.ones(0, bool)}


def reward(prompt, completion):
    ids = [[SENTIMENT.words.index(word) for word in text.split()] for text in (prompt, completion)]
    completion_ids = np.pad(ids[1], (0, 16 - len(ids[1])))[None]
    mask = tokens.completion_mask(completion_ids, SENTIMENT.eos_id)
    return float(SENTIMENT.reward(np.array([ids[0]]), completion_ids, mask)[0])


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("great .", 1.55),
        ("great and the plot was bad .", 1.55 - 1.25),
        ("great great .", 3.1 - 1.0),  # no adjective follows another
        (".", -1.0),  # nor does the end follow a verb
        ("great . superb superb", 1.55),  # what follows the end does not count
        ("great and the plot was superb", sentiment.UNFINISHED),
    ],
)
def test_gold_reward_of_a_sentence(completion, expected):
    assert reward("<pad> the film was", completion) == pytest.approx(expected, abs=1e-6)


def test_demonstrations_are_grammatical_and_in_two_moods():
    prompt_ids = SENTIMENT.prompts(random.key(0), 512)
    ids = np.asarray(SENTIMENT.demonstrate(random.key(1), prompt_ids))
    mask = np.asarray(tokens.completion_mask(ids, SENTIMENT.eos_id))
    rating = np.array([sentiment.RATINGS.get(word, 0.0) for word in SENTIMENT.words])[ids]
    ended = (ids == SENTIMENT.eos_id).any(1)
    expected = np.where(ended, (0.5 * rating * mask).sum(1), sentiment.UNFINISHED)
    gold = np.asarray(SENTIMENT.reward(prompt_ids, ids, mask))
    np.testing.assert_allclose(gold, expected, atol=1e-5)  # so no pair is ungrammatical
    positive = ((rating > 0) & mask).sum() / ((rating != 0) & mask).sum()
    assert 0.45 < positive < 0.55


def test_prompts_are_all_prefixes_and_held_out_ones_are_never_trained_on():
    assert SENTIMENT.prompt_probability.sum() == pytest.approx(1.0)
    known = {tuple(ids) for ids in SENTIMENT.prompt_ids[SENTIMENT.held_out]}
    trained = {tuple(ids) for ids in np.asarray(SENTIMENT.prompts(random.key(0), 2000))}
    tested = {tuple(ids) for ids in np.asarray(SENTIMENT.prompts(random.key(0), 2000, True))}
    assert tested <= known and not trained & known and len(trained) > 30


@pytest.mark.parametrize(("actions", "length"), [(3, 4), (5, 4), (2, 3)])
def test_completions_can_be_listed(actions, length):
    task = tasks.make(f"enumerable-{actions}-{length}")
    ids = task.completion_ids
    assert ids is not None
    ending = sum((actions - 1) ** t for t in range(length))
    assert len({tuple(row) for row in ids}) == len(ids) == ending + (actions - 1) ** length
    mask = tokens.completion_mask(ids, task.eos_id)
    prompts = np.repeat(task.prompt_ids[:1], len(ids), 0)
    assert len(np.unique(np.asarray(task.reward(prompts, ids, mask)))) == len(ids)


def test_prompts_are_drawn_as_often_as_they_should_be():
    probability = SENTIMENT.prompt_probability[SENTIMENT.held_out]
    known = [tuple(ids) for ids in SENTIMENT.prompt_ids[SENTIMENT.held_out].tolist()]
    drawn = [tuple(ids) for ids in SENTIMENT.prompts(random.key(3), 20_000, True).tolist()]
    seen = [drawn.count(prompt) for prompt in known]
    assert sum(seen) == 20_000
    expected = probability / probability.sum() * 20_000
    assert scipy.stats.chisquare(seen, expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "possible"), [("addition-2", 10_000), ("addition-3", 10**6), ("chain-3-4", 256)]
)
def test_a_table_of_prompts_has_them_all_or_ten_thousand(name, possible):
    task = tasks.make(name)
    distinct = {tuple(ids) for ids in task.prompt_ids.tolist()}
    assert len(distinct) == len(task.prompt_ids) == min(possible, 10_000)
    assert task.held_out.mean() == pytest.approx(0.2, abs=0.01)
    trained = {tuple(ids) for ids in task.prompts(random.key(0), 5000).tolist()}
    tested = {tuple(ids) for ids in task.prompt_ids[task.held_out].tolist()}
    assert trained <= distinct and not trained & tested


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("addition", "task must be 'addition-D' with D from 1 to 6, but is 'addition'"),
        ("addition-0", "D from 1 to 6, but is 'addition-0'"),
        ("addition-02", "but is 'addition-02'"),
        ("countdown-5", "N from 2 to 4, but is 'countdown-5'"),
        ("chain-4", "'chain-K-M' with K from 2 to 8 and M from 2 to 10, but is 'chain-4'"),
        ("chain-4-11", "M from 2 to 10, but is 'chain-4-11'"),
        ("chain-4-10-2", "but is 'chain-4-10-2'"),
        ("enumerable-3-x", "'enumerable-V-L' with V from 2 to 9 and L from 1 to 6"),
    ],
)
def test_a_size_that_is_not_possible_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        tasks.make(name)


def test_an_unknown_task_is_refused_and_an_own_one_is_found():
    with pytest.raises(InputError, match=r"task must be one of 'sentiment', .*, but is 'humour'"):
        tasks.make("humour")
    tasks.register("own", lambda: SENTIMENT)
    assert tasks.make("own") is SENTIMENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ()}, "words of task 'wrong' must be at least one, but there are none"),
        ({"completion_length": 0}, "completion_length of task 'wrong' must be 1 or more, but is 0"),
        ({"pad_id": 2}, "pad_id of task 'wrong' must not be its eos_id, .* both are 2"),
        ({"suppressed": (1,)}, r"suppressed .* must hold its pad_id 0, .* but is \(1,\)"),
        ({"suppressed": (0, 2)}, "suppressed of task 'wrong' must not hold its eos_id 2"),
        ({"suppressed": (0, 33)}, "suppressed .* at least 0 and below 33, .* but has 33"),
        ({"eos_id": -1}, "eos_id of task 'wrong' must be at least 0 and below 33, .* has -1"),
        ({"words": SENTIMENT.words[:4]}, "prompt_ids .* below 4, the number of words, but has"),
        ({"held_out": np.zeros(3, bool)}, r"must have the shape \[X, P\], .* and \(3,\)"),
        ({"prompt_ids": np.array([1, 3])}, r"prompt_ids .* the shapes are \(2,\)"),
        ({**EMPTY, "prompt_ids": np.ones((0, 3), int)}, r"the shapes are \(0, 3\)"),
        ({"prompt_ids": SENTIMENT.prompt_ids * 1.0}, "must be integers, but are of type float"),
        ({"prompt_ids": SENTIMENT.prompt_ids[:, ::-1]}, "prompt at index 0 ends with pad_id 0"),
        ({"prompt_probability": SENTIMENT.prompt_probability * 2}, "sum to 1, .* sums to 2"),
        ({"prompt_probability": SENTIMENT.prompt_probability * np.nan}, "and sums to nan"),
        ({"completion_ids": np.ones((4, 9), int)}, r"shape \[N, 16\], .* is \(4, 9\)"),
    ],
)
def test_a_registered_task_that_makes_no_sense_is_refused(change, message):
    tasks.register("wrong", lambda: dataclasses.replace(SENTIMENT, **change))
    with pytest.raises(InputError, match=message):
        tasks.make("wrong")


@pytest.mark.parametrize(
    "name",
    ["sentiment", "enumerable-3-4", "addition-2", "careless-2-4", "sorting-3", "countdown-3",
     "chain-3-4", "constitution", "constitution-lessons"],
)  # fmt: skip
def test_a_task_of_the_package_makes_sense(name):
    interface.check(tasks.make(name), name)
