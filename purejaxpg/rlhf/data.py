"""Data sets of text as arrays: files of JSON lines, or demonstrations of a task."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import random

from purejaxpg import FaultError, InputError
from purejaxpg import config as configs
from purejaxpg.rlhf import tasks, tokens

KINDS = {str: "a text", bool: "true or false", list: "a list"}  # of the fields of a line, in words


@struct.dataclass
class Rows:
    """Rows of tokens to imitate; a row holds one document or several."""

    ids: jax.Array  # [R, S] int32
    segments: jax.Array  # [R, S] int32, 0 is padding, documents are 1, 2, ...
    is_target: jax.Array  # [R, S] bool, tokens whose probability counts


@struct.dataclass
class Pairs:
    """Two completions of each prompt, the better one first."""

    prompt_ids: jax.Array  # [R, P] int32, padded on the left
    chosen_ids: jax.Array  # [R, L] int32, padded on the right
    rejected_ids: jax.Array  # [R, L] int32


@struct.dataclass
class Labelled:
    """Completions, each with a judgement of its own."""

    prompt_ids: jax.Array  # [R, P] int32, padded on the left
    completion_ids: jax.Array  # [R, L] int32, padded on the right
    is_desirable: jax.Array  # [R] bool


@struct.dataclass
class Steps:
    """Completions, with a judgement of each of their steps."""

    prompt_ids: jax.Array  # [R, P] int32, padded on the left
    completion_ids: jax.Array  # [R, L] int32, padded on the right
    ends: jax.Array  # [R, L] bool, the last token of each step
    right: jax.Array  # [R, L] bool, whether the step that ends there is right


Data = TypeVar("Data", Rows, Pairs, Labelled, Steps)


def choose(key: jax.Array, data: Data, count: int) -> Data:
    """Draw `count` rows of a data set, with replacement."""
    size = jax.tree.leaves(data)[0].shape[0]
    index = random.randint(key, (count,), 0, size)
    return jax.tree.map(lambda x: x[index], data)


def label(
    key: jax.Array,
    prompt_ids: jax.Array,
    first_ids: jax.Array,
    second_ids: jax.Array,
    probability: jax.Array,
) -> tuple[Pairs, jax.Array]:
    """Choose one of two completions of each prompt, at random.

    Args:
        key: for the choices.
        prompt_ids: [B, P].
        first_ids: [B, L].
        second_ids: [B, L].
        probability: [B] that the first is preferred.

    Returns:
        Pairs [B], and the probability [B] that their chosen completion had.
    """
    is_first = random.bernoulli(key, probability)
    chosen_ids = jnp.where(is_first[:, None], first_ids, second_ids)
    rejected_ids = jnp.where(is_first[:, None], second_ids, first_ids)
    pairs = Pairs(prompt_ids, chosen_ids, rejected_ids)
    return pairs, jnp.where(is_first, probability, 1.0 - probability)


def noisy(probability: jax.Array, noise: jax.Array | float) -> jax.Array:
    """Return the probability of a label of which a share `noise` is the wrong way round."""
    return probability + noise * (1.0 - 2.0 * probability)


def demonstrations(key: jax.Array, task: tasks.Task, count: int, held_out: bool = False) -> Rows:
    """Draw prompts of a task and demonstrate a completion of each -> Rows [count, P+L]."""
    key_prompt, key_completion = random.split(key)
    prompt_ids = task.prompts(key_prompt, count, held_out)
    completion_ids = task.demonstrate(key_completion, prompt_ids)
    mask = tokens.completion_mask(completion_ids, task.eos_id)
    return Rows(
        ids=jnp.concatenate([prompt_ids, completion_ids], axis=1),
        segments=tokens.segments(prompt_ids, completion_ids.shape[1], task.pad_id),
        is_target=jnp.pad(mask, ((0, 0), (prompt_ids.shape[1], 0))),
    )


def read_rows(path: Path, task: tasks.Task, length: int) -> Rows:
    """Read demonstrations from a JSONL file, and pack them into rows.

    Args:
        path: each line has the texts `prompt` and `completion`.
        task: its words are the vocabulary.
        length: S, tokens of a row; the documents fill the rows in the order of the file.

    Returns:
        Rows [R, S].

    Raises:
        InputError: a line is not as it must be, has an unknown word, or is too long.
    """
    rows: list[list[tuple[int, int, bool]]] = [[]]  # of (id, segment, is target)
    for where, record in _lines(path, {"prompt": str, "completion": str}):
        ids = [tasks.BOS, *_encode(record["prompt"], task, where)]
        answer = _ended(_encode(record["completion"], task, where), task)
        size = len(ids) + len(answer)
        configs.require(
            size <= length,
            f"{where}: prompt and completion must have at most {length} tokens together, with "
            f"beginning and end, but have {size}.",
        )
        if len(rows[-1]) + size > length:
            rows.append([])
        segment = 1 + (rows[-1][-1][1] if rows[-1] else 0)
        targets = [False] * len(ids) + [True] * len(answer)
        rows[-1] += [(i, segment, t) for i, t in zip(ids + answer, targets, strict=True)]
    filled = [row + [(task.pad_id, 0, False)] * (length - len(row)) for row in rows]
    table = jnp.array(filled, jnp.int32)
    return Rows(table[..., 0], table[..., 1], table[..., 2] == 1)


def read_pairs(path: Path, task: tasks.Task) -> Pairs:
    """Read pairs from a JSONL file.

    Args:
        path: each line has the texts `prompt`, `chosen` and `rejected`.
        task: its words are the vocabulary, and its prompts and completions the longest.

    Returns:
        Pairs [R].

    Raises:
        InputError: a line is not as it must be, has an unknown word, or is too long.
    """
    fields = {"prompt": str, "chosen": str, "rejected": str}
    columns = zip(
        *(_padded(where, record, task) for where, record in _lines(path, fields)), strict=True
    )
    return Pairs(*(jnp.array(column, jnp.int32) for column in columns))


def read_labelled(path: Path, task: tasks.Task) -> Labelled:
    """Read judged completions from a JSONL file.

    Args:
        path: each line has the texts `prompt` and `completion`, and `label`, true if desirable.
        task: as for `read_pairs`.

    Returns:
        Labelled [R].

    Raises:
        InputError: as for `read_pairs`, or all labels are equal.
    """
    records = list(_lines(path, {"prompt": str, "completion": str, "label": bool}))
    labels = [record.pop("label") for _, record in records]
    check_labels(path, labels)
    columns = zip(*(_padded(where, record, task) for where, record in records), strict=True)
    prompt_ids, completion_ids = (jnp.array(column, jnp.int32) for column in columns)
    return Labelled(prompt_ids, completion_ids, jnp.array(labels))


def check_labels(path: Path, labels: Sequence[bool]) -> None:
    """Raise an InputError unless the labels of a file are of both kinds."""
    configs.require(
        len(set(labels)) == 2,
        f"{path} must have completions of both labels, true and false, but each of its "
        f"{len(labels)} has {str(labels[0]).lower()}.",
    )


def read_steps(path: Path, task: tasks.Task) -> Steps:
    """Read completions with judged steps from a JSONL file.

    Args:
        path: each line has the text `prompt`, and lists: the texts of `steps`, and their `labels`,
            true if right. The steps together are the completion.
        task: as for `read_pairs`.

    Returns:
        Steps [R].

    Raises:
        InputError: as for `read_pairs`, or there is not one label for each step.
    """
    prompts, completions, marks = [], [], []
    for where, record in _lines(path, {"prompt": str, "steps": list, "labels": list}):
        steps, labels = record["steps"], record["labels"]
        for step in steps:
            configs.require(
                isinstance(step, str) and bool(step.split()),
                f"{where}: each of steps must be a text with a word or more, but one is {step!r}.",
            )
        configs.require(
            bool(steps) and len(labels) == len(steps) and {*map(type, labels)} == {bool},
            f"{where}: labels must be true or false for each of the {len(steps)} steps, one or "
            f"more, but are {labels!r}.",
        )
        texts = {"prompt": record["prompt"], "completion": " ".join(steps)}
        prompt, completion = _padded(where, texts, task)
        mark = np.zeros((2, len(completion)), bool)
        last = np.cumsum([len(step.split()) for step in steps]) - 1
        mark[0, last], mark[1, last] = True, labels
        prompts.append(prompt)
        completions.append(completion)
        marks.append(mark)
    ends, right = jnp.array(marks).swapaxes(0, 1)
    return Steps(jnp.array(prompts, jnp.int32), jnp.array(completions, jnp.int32), ends, right)


def _padded(where: str, texts: Mapping[str, str], task: tasks.Task) -> list[list[int]]:
    """Return the ids of a prompt, padded on the left, and of completions, padded on the right."""
    columns = []
    for name, text in texts.items():
        ids = _encode(text, task, where)
        is_prompt = name == "prompt"
        ids = [tasks.BOS, *ids] if is_prompt else _ended(ids, task)
        limit = task.prompt_length if is_prompt else task.completion_length
        configs.require(
            len(ids) <= limit,
            f"{where}: {name} must have at most {limit} tokens, with beginning and end, but "
            f"has {len(ids)}.",
        )
        padding = [task.pad_id] * (limit - len(ids))
        columns.append(padding + ids if is_prompt else ids + padding)
    return columns


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a place for messages, and the object, for each line of a JSONL file.

    Raises:
        InputError: the file is missing, empty or no text, or a line is no object in JSON.
        FaultError: the file cannot be read.
    """
    configs.require(path.exists(), f"{path} must be a file, but does not exist.")
    try:
        # Not splitlines, which also splits at characters that a text in JSON may have.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be text in UTF-8: {error.reason}.") from error
    except OSError as error:
        raise FaultError(f"{path} cannot be read: {error.strerror}.") from error
    numbered = [(f"{path}, line {i + 1}", line) for i, line in enumerate(lines) if line.strip()]
    configs.require(bool(numbered), f"{path} must have at least one line, but is empty.")
    for where, line in numbered:
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where} must be an object in JSON, but is {line!r}.") from error
        configs.require(
            isinstance(record, dict), f"{where} must be an object in JSON, but is {line!r}."
        )
        yield where, record


def check_fields(where: str, record: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    """Raise an InputError unless the object of a line has all fields, each of its type."""
    for field, kind in fields.items():
        value = record.get(field)
        configs.require(
            isinstance(value, kind),
            f"{where} must have the field {field!r} with {KINDS[kind]}, but has {value!r}.",
        )


def _lines(path: Path, fields: Mapping[str, type]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a place for messages, and the fields' values, for each line of a JSONL file."""
    for where, record in records(path):
        check_fields(where, record, fields)
        yield where, {field: record[field] for field in fields}


def _encode(text: str, task: tasks.Task, where: str) -> list[int]:
    """Return the ids of the words of a text."""
    allowed = [w for i, w in enumerate(task.words) if i not in (task.pad_id, tasks.BOS)]
    for word in text.split():
        configs.require_known(word, allowed, f"word in the vocabulary ({where}) named")
    return [task.words.index(word) for word in text.split()]


def _ended(ids: list[int], task: tasks.Task) -> list[int]:
    return ids if ids[-1:] == [task.eos_id] else [*ids, task.eos_id]
