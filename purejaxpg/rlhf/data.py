"""Data sets of text as arrays."""

from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import struct
from jax import random

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
    """Read demonstrations from a JSONL file -> Rows."""
    raise NotImplementedError


def read_pairs(path: Path, task: tasks.Task) -> Pairs:
    """Read pairs from a JSONL file -> Pairs."""
    raise NotImplementedError
