"""Files of JSON lines: rows are packed, pairs are padded, and what is wrong is named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import InputError
from purejaxpg.rlhf import data, tasks

TASK = tasks.make("sentiment")
GOOD = {"prompt": "the film was", "completion": "great ."}
PAIR = {"prompt": "the film", "chosen": "was great .", "rejected": "was bad"}
JUDGED = {"prompt": "the film", "completion": "was great .", "label": True}


def write(path, *records):
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
    return path


def words(ids):
    return " ".join(TASK.words[i] for i in np.asarray(ids))


def test_documents_are_packed_in_order(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, "", {"prompt": "", "completion": "this plot"}, GOOD)
    rows = data.read_rows(path, TASK, 12)
    assert words(rows.ids[0]).startswith("<bos> the film was great . <bos> this plot . <pad>")
    assert rows.segments.tolist() == [[1] * 6 + [2] * 4 + [0] * 2, [1] * 6 + [0] * 6]
    assert [
        words(ids[np.asarray(on)]) for ids, on in zip(rows.ids, rows.is_target, strict=True)
    ] == [
        "great . this plot .",
        "great .",
    ]


def test_pairs_are_padded_on_both_sides_and_ended(tmp_path):
    pairs = data.read_pairs(write(tmp_path / "p.jsonl", PAIR), TASK)
    assert words(pairs.prompt_ids[0]) == "<pad> <bos> the film"
    assert words(pairs.chosen_ids[0]).startswith("was great . <pad>")
    assert words(pairs.rejected_ids[0]).startswith("was bad . <pad>")
    assert pairs.chosen_ids.shape == pairs.rejected_ids.shape == (1, TASK.completion_length)


def test_judged_steps_are_read_with_their_ends(tmp_path):
    task = tasks.make("chain-2-3")
    lines = [
        {"prompt": "1 2 2 :", "steps": ["0 ;", "2 ;", "<end>"], "labels": [True, True, True]},
        {"prompt": "0 0 0 :", "steps": ["1 ;", "1 ;"], "labels": [False, True]},
    ]
    read = data.read_steps(write(tmp_path / "s.jsonl", *lines), task)
    assert [task.text(ids) for ids in read.completion_ids] == ["0 ; 2 ; <end>", "1 ; 1 ; <end>"]
    assert [task.text(ids) for ids in read.prompt_ids] == ["1 2 2 :", "0 0 0 :"]
    assert [np.flatnonzero(row).tolist() for row in read.ends] == [[1, 3, 4], [1, 3]]
    assert [np.flatnonzero(row).tolist() for row in read.right] == [[1, 3, 4], [3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, r"line 1: labels must be .* each of the 2 steps, .* are \[True\]"),
        ({"labels": [True, 1]}, r"labels must be true or false .* are \[True, 1\]"),
        ({"steps": [], "labels": []}, r"each of the 0 steps, one or more"),
        ({"steps": ["great", ""]}, r"each of steps must be a text .* one is ''"),
        ({"steps": "great"}, r"the field 'steps' with a list, but has 'great'"),
        ({"steps": ["great " * 9] * 2}, r"completion must have at most 16 tokens, .* has 19"),
    ],
)
def test_wrong_steps_are_named(tmp_path, change, message):
    good = {"prompt": "the film was", "steps": ["great", "."], "labels": [True, False]}
    with pytest.raises(InputError, match=message):
        data.read_steps(write(tmp_path / "s.jsonl", {**good, **change}), TASK)


def test_judged_completions_are_read_with_their_labels(tmp_path):
    worse = {"prompt": "this", "completion": "plot was bad", "label": False}
    data_set = data.read_labelled(write(tmp_path / "l.jsonl", JUDGED, worse), TASK)
    assert [words(ids) for ids in data_set.prompt_ids] == [
        "<pad> <bos> the film",
        "<pad> <pad> <bos> this",
    ]
    assert words(data_set.completion_ids[0]).startswith("was great . <pad>")
    assert words(data_set.completion_ids[1]).startswith("plot was bad . <pad>")
    assert data_set.is_desirable.tolist() == [True, False]
    assert data_set.completion_ids.shape == (2, TASK.completion_length)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{**JUDGED, "label": 1}], r"line 2 must have the field 'label' with true or false, .* 1"),
        ([{**JUDGED, "label": "true"}], r"field 'label' with true or false, but has 'true'"),
        ([{"prompt": "", "label": True}], r"line 2 must have the field 'completion' with a text"),
        (
            [{**JUDGED, "label": False, "completion": "bad " * 16}],
            "line 2: completion must have at most 16 tokens",
        ),
        ([JUDGED, JUDGED], "both labels, true and false, but each of its 3 has true"),
    ],
)
def test_a_wrong_judgement_is_named(tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        data.read_labelled(write(tmp_path / "l.jsonl", JUDGED, *records), TASK)


def test_a_label_is_drawn_with_its_probability():
    ids = jnp.arange(4000)[:, None]
    pairs, probability = data.label(random.key(0), ids, ids, -ids, jnp.full(4000, 0.8))
    is_first = np.asarray(pairs.chosen_ids == ids)[1:, 0]
    assert is_first.mean() == pytest.approx(0.8, abs=0.03)
    assert (pairs.chosen_ids == -pairs.rejected_ids).all()
    np.testing.assert_allclose(probability[1:], np.where(is_first, 0.8, 0.2), rtol=1e-6)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "the film"}, r"d.jsonl, line 2 must have the field 'completion' with a text"),
        ({**GOOD, "prompt": 3}, r"line 2 must have the field 'prompt' with a text, but has 3"),
        ("[", r"line 2 must be an object in JSON"),
        ("[1]", r"line 2 must be an object in JSON"),
        ({**GOOD, "completion": "greta ."}, r"line 2\) named 'greta'; did you mean 'great'"),
        ({**GOOD, "completion": "<pad>"}, r"line 2\) named '<pad>'"),
        ({**GOOD, "completion": "great " * 20}, r"line 2: .* at most 20 tokens .* have 25"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, record, message):
    with pytest.raises(InputError, match=message):
        data.read_rows(write(tmp_path / "d.jsonl", GOOD, record), TASK, 20)


def test_a_prompt_or_completion_that_does_not_fit_is_named(tmp_path):
    for change, message in (
        ({"prompt": "the film was very"}, "prompt must have at most 4 tokens, .* has 5"),
        ({"rejected": "bad " * 16}, "rejected must have at most 16 tokens, .* has 17"),
    ):
        with pytest.raises(InputError, match=message):
            data.read_pairs(write(tmp_path / "p.jsonl", {**PAIR, **change}), TASK)


def test_an_empty_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one line, but is empty"):
        data.read_rows(write(tmp_path / "d.jsonl", ""), TASK, 20)
    with pytest.raises(InputError, match="at least one line, but is empty"):
        data.read_labelled(write(tmp_path / "d.jsonl", ""), TASK)
    with pytest.raises(InputError, match=r"none\.jsonl must be a file, but does not exist"):
        data.read_pairs(tmp_path / "none.jsonl", TASK)
