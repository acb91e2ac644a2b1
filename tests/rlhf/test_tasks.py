"""The tasks: their rewards by hand, and prompts, demonstrations and completions as documented."""

import numpy as np
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.rlhf import tasks, tokens

SENTIMENT = tasks.make("sentiment")


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
        ("great and the plot was superb", tasks.UNFINISHED),
    ],
)
def test_gold_reward_of_a_sentence(completion, expected):
    assert reward("<pad> the film was", completion) == pytest.approx(expected, abs=1e-6)


def test_demonstrations_are_grammatical_and_in_two_moods():
    prompt_ids = SENTIMENT.prompts(random.key(0), 512)
    ids = np.asarray(SENTIMENT.demonstrate(random.key(1), prompt_ids))
    mask = np.asarray(tokens.completion_mask(ids, SENTIMENT.eos_id))
    rating = np.array([tasks.RATINGS.get(word, 0.0) for word in SENTIMENT.words])[ids]
    ended = (ids == SENTIMENT.eos_id).any(1)
    expected = np.where(ended, (0.5 * rating * mask).sum(1), tasks.UNFINISHED)
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


def test_an_unknown_task_is_refused_and_an_own_one_is_found():
    with pytest.raises(InputError, match=r"task must be one of 'sentiment', .*, but is 'humour'"):
        tasks.make("humour")
    tasks.register("own", lambda: SENTIMENT)
    assert tasks.make("own") is SENTIMENT
