"""Data sets of text as arrays: files of JSON lines, or demonstrations of a task."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import random

from purejaxpg import FaultError, InputError
from purejaxpg import config as configs
from purejaxpg.rlhf import tasks, tokens


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


Data = TypeVar("Data", Rows, Pairs)


def choose(key: jax.Array, data: Data, count: int) -> Data:
    """Draw `count` rows of a data set, with replacement."""
    size = jax.tree.leaves(data)[0].shape[0]
    index = random.randint(key, (count,), 0, size)
    return jax.tree.map(lambda x: x[index], data)


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
    for where, prompt, completion in _lines(path, ("prompt", "completion")):
        ids = [task.words.index("<bos>"), *_encode(prompt, task, where)]
        answer = _ended(_encode(completion, task, where), task)
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
    fields = ("prompt", "chosen", "rejected")
    columns: list[list[list[int]]] = [[], [], []]
    for where, *texts in _lines(path, fields):
        encoded = [_encode(text, task, where) for text in texts]
        prompt = [task.words.index("<bos>"), *encoded[0]]
        limits = (task.prompt_length, task.completion_length, task.completion_length)
        documents = [prompt, *(_ended(ids, task) for ids in encoded[1:])]
        for name, ids, limit in zip(
            ("prompt", "chosen", "rejected"), documents, limits, strict=True
        ):
            configs.require(
                len(ids) <= limit,
                f"{where}: {name} must have at most {limit} tokens, with beginning and end, but "
                f"has {len(ids)}.",
            )
        left = [[task.pad_id] * (limits[0] - len(prompt)) + prompt]
        right = [ids + [task.pad_id] * (limits[1] - len(ids)) for ids in documents[1:]]
        for column, ids in zip(columns, left + right, strict=True):
            column.append(ids)
    return Pairs(*(jnp.array(column, jnp.int32) for column in columns))


def _lines(path: Path, fields: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield a place for messages, and the texts of the fields, for each line of a JSONL file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
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
        for field in fields:
            text = record.get(field) if isinstance(record, dict) else None
            configs.require(
                isinstance(text, str),
                f"{where} must have the field {field!r} with a text, but has {text!r}.",
            )
        yield (where, *(record[field] for field in fields))


def _encode(text: str, task: tasks.Task, where: str) -> list[int]:
    """Return the ids of the words of a text."""
    allowed = [w for i, w in enumerate(task.words) if i not in (task.pad_id, tasks.BOS)]
    for word in text.split():
        configs.require_known(word, allowed, f"word in the vocabulary ({where}) named")
    return [task.words.index(word) for word in text.split()]


def _ended(ids: list[int], task: tasks.Task) -> list[int]:
    return ids if ids[-1:] == [task.eos_id] else [*ids, task.eos_id]
