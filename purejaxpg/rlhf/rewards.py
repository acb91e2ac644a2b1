"""Rewards of text, by a function on the host: a Python file of the user's, or reasoning-gym.

A file has one function, which is called once for each batch of completions::

    def reward(prompts, completions, rows):
        return [float(row["answer"] in text) for text, row in zip(completions, rows)]

`prompts` are the texts that the model was given, `completions` what it wrote, without special
tokens, and `rows` the lines of the data file that the prompts are from. The function must return
one finite number for each completion, and the same numbers for the same texts.
"""

import functools
import hashlib
import importlib.abc
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purejaxpg import InputError, extras, host, tracebacks
from purejaxpg import config as configs
from purejaxpg.rlhf import tokenizer

FUNCTION, SUFFIX = "reward", ".py"
GYM = "reasoning_gym:"  # before the name of a dataset
GYM_SIZE, GYM_HELD_OUT = 1000, 200  # items to train on and to evaluate with

Row = dict[str, Any]  # a line of a data file
Function = Callable[[Sequence[str], Sequence[str], Sequence[Row]], Any]


class _Source(importlib.abc.SourceLoader):
    """Loads a module from text, which knows the path that it is from."""

    def __init__(self, path: str, source: str) -> None:
        self.path, self.source = path, source

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_data(self, path: str | bytes) -> bytes:
        return self.source.encode()


# ----------------------------------------------------------------------------------------- sources


def read(path: Path) -> dict[str, str]:
    """Read a reward file, and run it once to see that it has the function.

    Returns:
        What `function_of` needs, as strings.

    Raises:
        InputError: there is no such file, it cannot be imported, or it has no function `reward`.
    """
    configs.require(path.is_file(), f"given reward is the file {str(path)!r}, which is not there.")
    try:
        kept = {"path": str(path.resolve()), "source": path.read_text(encoding="utf-8")}
    except UnicodeDecodeError as error:
        raise InputError(f"given reward {path} must be text in UTF-8: {error.reason}.") from error
    function_of(kept)
    return kept


def function_of(kept: Mapping[str, str]) -> Function:
    """Return the function of a reward file, or the scoring of a dataset of reasoning-gym.

    Raises:
        InputError: the file cannot be imported, or has no function `reward`.
        FaultError: reasoning-gym is not installed.
    """
    if "dataset" in kept:
        return functools.partial(_score_answers, kept["dataset"])
    found = getattr(_module(kept["path"], kept["source"]), FUNCTION, None)
    configs.require(
        callable(found),
        f"{tracebacks.shown(kept['path'])} must have a function {FUNCTION}(prompts, completions, "
        "rows), but has none.",
    )
    return found  # type: ignore[return-value]


@functools.lru_cache(maxsize=8)
def _module(path: str, source: str) -> Any:
    """Return the module of a reward file."""
    name = f"purejaxpg_reward_{hashlib.sha256((path + source).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_loader(name, _Source(path, source))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = os.path.dirname(path)
    if os.path.isdir(folder) and folder not in sys.path:
        sys.path.insert(0, folder)  # as `python FILE` does
    sys.modules[name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        why = f"reward file {tracebacks.shown(path)} cannot be imported: "
        lines = tracebacks.explain(error, why)
        raise InputError(lines or f"{why}{type(error).__name__}: {error}.") from error
    return module


def gym_rows(source: str, held_out: bool) -> list[Row]:
    """Return items of a dataset of reasoning-gym, as lines with a `prompt`.

    Args:
        source: "reasoning_gym:NAME".
        held_out: other items, for evaluation.

    Raises:
        InputError: there is no such dataset.
        FaultError: reasoning-gym is not installed.
    """
    gym = extras.load("reasoning_gym", "reasoning", "Data of reasoning_gym")
    name = source.removeprefix(GYM)
    configs.require_known(name, sorted(gym.factory.DATASETS), "dataset of reasoning_gym named")
    seed, size = (1, GYM_HELD_OUT) if held_out else (0, GYM_SIZE)
    made = gym.create_dataset(name, seed=seed, size=size)
    return [{"prompt": item["question"], "item": item} for item in made]


def _score_answers(
    dataset: str, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]
) -> list[float]:
    """Return what reasoning-gym gives for answers, 0 to 1."""
    gym = extras.load("reasoning_gym", "reasoning", "Data of reasoning_gym")
    score = gym.get_score_answer_fn(dataset)
    pairs = zip(completions, rows, strict=True)
    return [float(score(answer=text.strip(), entry=row["item"])) for text, row in pairs]


# ----------------------------------------------------------------------------------------- scoring


def score(
    content: jax.Array, pad_id: int, prompt_ids: jax.Array, completion_ids: jax.Array
) -> jax.Array:
    """Score completions by the function of a model's text.

    Args:
        content: [N] uint8, of `finetune.Text`.
        pad_id: the token that pads the prompts.
        prompt_ids: [B, P] int32.
        completion_ids: [B, L] int32, padding after the end.

    Returns:
        [B] float32.
    """
    shape = jax.ShapeDtypeStruct(prompt_ids.shape[:1], jnp.float32)
    scored = functools.partial(_score, pad_id)
    return host.call(scored, shape, content, prompt_ids, completion_ids)


def _score(pad_id: int, content: Any, prompt_ids: Any, completion_ids: Any) -> np.ndarray:
    """Score completions [..., B, L] of all rows in one call, on the host -> [..., B]."""
    prompt_ids, completion_ids = np.asarray(prompt_ids), np.asarray(completion_ids)
    scorer = _scorer(np.asarray(content).tobytes(), pad_id)
    shape = np.broadcast_shapes(prompt_ids.shape[:-1], completion_ids.shape[:-1])
    flat = (
        np.broadcast_to(ids, (*shape, ids.shape[-1])).reshape(-1, ids.shape[-1])
        for ids in (prompt_ids, completion_ids)
    )
    return scorer(*flat).reshape(shape)


@functools.lru_cache(maxsize=4)
def _scorer(content: bytes, pad_id: int) -> "Scorer":
    return Scorer(json.loads(content), pad_id)


class Scorer:
    """Turns the ids of one model into text, and text into rewards."""

    def __init__(self, content: Mapping[str, Any], pad_id: int) -> None:
        kept = content["reward"]
        self.is_code = "source" in kept
        self.what = f"{GYM}{kept['dataset']}" if "dataset" in kept else kept["path"]
        self.kept, self.pad_id = kept, pad_id
        self.backend = tokenizer.load_package().Tokenizer.from_str(content["backend"])
        encode = functools.partial(self.backend.encode, add_special_tokens=False)
        # A prompt may begin with the name of the padding token, which is then padding.
        self.rows = {
            self.unpadded(np.asarray(encode(text).ids)): (text, row)
            for text, row in content["rows"]
        }

    def __call__(self, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> np.ndarray:
        """Return the rewards of completions [B, L] -> [B].

        Raises:
            InputError: the function raises an error, or does not return a number for each; or it
                is in a file, and code out of a result directory must not run.
        """
        configs.require(
            host.runs_stored_code() or not self.is_code,
            f"The reward of this run is the Python file {self.what}, and a result directory runs "
            "no code by itself: --agent stored allows it.",
        )
        function = function_of(self.kept)
        texts = [self.rows[self.unpadded(ids)] for ids in prompt_ids]
        completions = [
            self.backend.decode([int(i) for i in ids if i != self.pad_id]) for ids in completion_ids
        ]
        prompts, rows = [text for text, _ in texts], [row for _, row in texts]
        try:
            given = function(prompts, completions, rows)
        except Exception as error:
            why = f"reward {tracebacks.shown(self.what)} failed: "
            lines = tracebacks.explain(error, why)
            raise InputError(lines or f"{why}{type(error).__name__}: {error}.") from error
        return self.checked(given, len(completions))

    def unpadded(self, ids: np.ndarray) -> tuple[int, ...]:
        """Return the ids of a prompt without the padding before it."""
        begin = int(np.argmax(ids != self.pad_id))
        return tuple(int(i) for i in ids[begin:])

    def checked(self, given: Any, count: int) -> np.ndarray:
        """Return rewards as an array, if there is a finite number for each completion."""
        what = f"reward {tracebacks.shown(self.what)} must return a list of {count} numbers, one "
        what += "for each completion, "
        values = list(given) if isinstance(given, Sequence | np.ndarray) else None
        configs.require(values is not None, f"{what}but returned {given!r}.")
        configs.require(len(values) == count, f"{what}but returned {len(values)}.")  # type: ignore[arg-type]
        for value in values:  # type: ignore[union-attr]
            number = isinstance(value, bool | int | float | np.number | np.bool_)
            configs.require(number and math.isfinite(value), f"{what}but one is {value!r}.")
        return np.asarray(values, np.float32)
