"""Published models that are trained on a file of text: what their trainers share.

A line of the file is tokenised once, with the model's own tokenizer. The arrays of the model, the
rows and the tokenizer itself are given to a run, so the result directory needs no other file.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax, random

from purejaxpg import config as configs
from purejaxpg import optimizers
from purejaxpg.rlhf import (
    data,
    generate,
    gguf,
    hf,
    lora,
    rewards,
    tasks,
    tokenizer,
    transformer,
)

DTYPES = ("float32", "bfloat16")  # float16 would need a scaled loss

Document = list[tuple[int, bool]]  # token, whether it is to be learned
Prompt = tuple[list[int], str, rewards.Row]  # ids, text, and the line

_generate = jax.jit(generate.generate, static_argnames=("length", "eos_id", "pad_id"))


@struct.dataclass
class Text:
    """What turns the ids of a published model into text, and its weights into a folder."""

    content: jax.Array  # [N] uint8, JSON: the tokenizer, its settings, config.json, rows, reward
    eos_id: int = struct.field(pytree_node=False)
    pad_id: int = struct.field(pytree_node=False)
    prompt_ids: jax.Array | None = None  # [X, P] padded on the left, if completions are sampled
    held_out_ids: jax.Array | None = None  # [Y, P], for evaluation; without any, the prompts
    has_reward: bool = struct.field(pytree_node=False, default=False)  # in its content


@dataclasses.dataclass(frozen=True, eq=False)
class TextTask(tasks.Task):
    """Prompts of a file, as a task; its reward is a function on the host."""

    source: Text | None = None

    def prompts(self, key: jax.Array, count: int, held_out: bool = False) -> jax.Array:
        """Draw prompts -> ids [count, P]."""
        assert self.source is not None
        ids: Any = self.source.held_out_ids if held_out else None
        ids = self.prompt_ids if ids is None else ids
        return jnp.asarray(ids)[random.randint(key, (count,), 0, len(ids))]

    def text(self, ids: np.ndarray) -> str:
        """Return tokens as text, without padding, and with the names of special tokens."""
        assert self.source is not None
        return tokenizer_of(self.source).decode(ids, special=True)


# ----------------------------------------------------------------------------------------- reading


def load(source: str, base: Path, config: Any) -> tuple[hf.Checkpoint, Text]:
    """Load a model to be trained.

    Args:
        source: a folder, a GGUF file, or a name of `gguf.PACKAGES`.
        base: the directory that a path is relative to.
        config: its `max_length` must fit into the model's context; its `dtype` is that of the
            parameters.

    Raises:
        InputError: there is no such model, or it is not known here.
    """
    path = base / source
    named = source if source in gguf.PACKAGES and not path.exists() else path
    # One device may be too small for it.
    checkpoint = hf.load(named, config.dtype, on_host=True)
    hf.check_length(checkpoint, getattr(config, "max_length", 1), "max_length")
    tokens = checkpoint.tokenizer
    content = {
        "backend": tokens.backend.to_str(),
        "bos_id": tokens.bos_id,
        "settings": dict(tokens.settings),
        "template": tokens.template,
        "config": dict(checkpoint.config),
    }
    return checkpoint, Text(_packed(content), tokens.eos_id, tokens.pad_id)


def load_prompts(
    sources: Mapping[str, str], base: Path, config: Any
) -> tuple[transformer.Model, Text]:
    """Load a model that is to write completions, with prompts and perhaps with a reward.

    Args:
        sources: `model`, `data`, and perhaps `held_out` and `reward`, a Python file.
        base: the directory that paths are relative to.
        config: the prompts with `completion_length` more tokens must fit into the model's context.

    Raises:
        InputError: a source is wrong, or a line of one.
    """
    checkpoint, text = load(sources["model"], base, config)
    tables = {name: read_prompts(sources[name], base, checkpoint) for name in ("data", "held_out")
              if name in sources}  # fmt: skip
    if is_gym(sources["data"]) and "held_out" not in sources:
        tables["held_out"] = read_prompts(sources["data"], base, checkpoint, held_out=True)
    longest = max(len(ids) for table in tables.values() for ids, _, _ in table)
    hf.check_length(
        checkpoint, longest + config.completion_length, "the longest prompt with completion_length"
    )
    reward = None
    if "reward" in sources:
        reward = rewards.read(base / sources["reward"])
    elif is_gym(sources["data"]):
        reward = {"dataset": sources["data"].removeprefix(rewards.GYM)}
    rows = [(written, record) for table in tables.values() for _, written, record in table]
    content = {**_content(text), "rows": rows, "reward": reward}
    ids = {
        name: hf.pad(
            [[text.pad_id] * (longest - len(ids)) + ids for ids, _, _ in table], text.pad_id
        )
        for name, table in tables.items()
    }
    text = dataclasses.replace(
        text,
        content=_packed(content),
        prompt_ids=ids["data"],
        held_out_ids=ids.get("held_out"),
        has_reward=reward is not None,
    )
    return checkpoint.model, text


def _packed(content: Mapping[str, Any]) -> jax.Array:
    return jnp.asarray(np.frombuffer(json.dumps(content).encode(), np.uint8))


def _content(text: Text) -> dict[str, Any]:
    return json.loads(np.asarray(text.content, np.uint8).tobytes())


def is_gym(source: str) -> bool:
    """Return whether a source of data is a dataset of reasoning-gym."""
    return source.startswith(rewards.GYM)


def tokenizer_of(text: Text) -> tokenizer.Tokenizer:
    """Return the tokenizer of a published model."""
    content = _content(text)
    backend = tokenizer.load_package().Tokenizer.from_str(content["backend"])
    own = content["bos_id"], content["settings"], content["template"]
    return tokenizer.Tokenizer(backend, text.eos_id, text.pad_id, *own)


def checkpoint_of(model: transformer.Model, text: Text) -> hf.Checkpoint:
    """Return a trained model with its tokenizer; an adapter is merged into the weights."""
    return hf.Checkpoint(merged(model), tokenizer_of(text), _content(text)["config"])


def read_rows(path: Path, checkpoint: hf.Checkpoint, length: int) -> data.Rows:
    """Read demonstrations from a JSONL file, one in each row.

    Args:
        path: each line has the texts `prompt` and `completion`, or `messages`, a conversation. Only
            the completion counts, or only what the assistant says; with the end token.
        checkpoint: the model, with its tokenizer.
        length: S, tokens of a row.

    Returns:
        Rows [R, S].

    Raises:
        InputError: a line is not as it must be, or is longer than `length`.
    """
    found = []
    for where, record in data.records(path):
        if "messages" in record:
            found.append((where, _conversation(where, record["messages"], checkpoint)))
        else:
            data.check_fields(where, record, {"prompt": str, "completion": str})
            prompt = _prompt(where, record["prompt"], checkpoint)
            answer = _answer(where, "completion", record["completion"], checkpoint)
            found.append((where, [(i, False) for i in prompt] + [(i, True) for i in answer]))
    _check_sizes([(where, len(document)) for where, document in found], checkpoint, length)
    pad = (checkpoint.tokenizer.pad_id, False)
    filled = [document + [pad] * (length - len(document)) for _, document in found]
    table = jnp.array(filled, jnp.int32)
    sizes = jnp.array([len(document) for _, document in found])
    segments = (jnp.arange(length) < sizes[:, None]).astype(jnp.int32)
    return data.Rows(table[..., 0], segments, table[..., 1] == 1)


def read_pairs(path: Path, checkpoint: hf.Checkpoint, length: int) -> data.Pairs:
    """Read pairs from a JSONL file.

    Args:
        path: each line has the texts `chosen` and `rejected`, and `prompt` or `messages`.
        checkpoint: the model, with its tokenizer.
        length: P + L, tokens of the longest prompt and of the completions.

    Returns:
        Pairs [R].

    Raises:
        InputError: a line is not as it must be, or the longest prompt and the longest completion
            have more tokens together than `length`.
    """
    records = list(data.records(path))
    return data.Pairs(*_padded(path, records, ("chosen", "rejected"), checkpoint, length))


def read_labelled(path: Path, checkpoint: hf.Checkpoint, length: int) -> data.Labelled:
    """Read judged completions from a JSONL file.

    Args:
        path: each line has the texts `prompt` and `completion`, and `label`, true if desirable; or
            `messages` in place of the prompt.
        checkpoint: as for `read_pairs`.
        length: as for `read_pairs`.

    Returns:
        Labelled [R].

    Raises:
        InputError: as for `read_pairs`, or all labels are equal.
    """
    records = list(data.records(path))
    for where, record in records:
        data.check_fields(where, record, {"label": bool})
    labels = [record["label"] for _, record in records]
    data.check_labels(path, labels)
    prompt_ids, completion_ids = _padded(path, records, ("completion",), checkpoint, length)
    return data.Labelled(prompt_ids, completion_ids, jnp.array(labels))


def _padded(
    path: Path,
    records: Sequence[tuple[str, Mapping[str, Any]]],
    names: Sequence[str],
    checkpoint: hf.Checkpoint,
    length: int,
) -> list[jax.Array]:
    """Return the ids of the prompts, padded on the left, and of the named texts, on the right."""
    prompts, answers, sizes = [], [], []
    for where, record in records:
        prompts.append(_prompt(where, _asked(where, record, checkpoint), checkpoint))
        data.check_fields(where, record, dict.fromkeys(names, str))
        answers.append([_answer(where, name, record[name], checkpoint) for name in names])
        sizes.append((where, len(prompts[-1]) + max(map(len, answers[-1]))))
    longest, longest_answer = max(map(len, prompts)), max(len(y) for own in answers for y in own)
    _check_sizes(sizes, checkpoint, longest + longest_answer)
    configs.require(
        length >= longest + longest_answer,
        f"max_length must be at least {longest + longest_answer}, the tokens of the longest prompt "
        f"and of the longest completion of {path}, with its end, but is {length}.",
    )
    pad = checkpoint.tokenizer.pad_id
    columns = [
        [ids + [pad] * (length - longest - len(ids)) for ids in column]
        for column in zip(*answers, strict=True)
    ]
    return [hf.pad(prompts, pad), *(jnp.array(column, jnp.int32) for column in columns)]


def read_prompts(
    source: str, base: Path, checkpoint: hf.Checkpoint, held_out: bool = False
) -> list[Prompt]:
    """Read prompts from a JSONL file, or from a dataset of reasoning-gym.

    Args:
        source: a file, of which each line has the text `prompt` or `messages`, a conversation that
            the assistant is to continue; whatever else a line has is for the reward. Or the name of
            a dataset, whose questions are asked in the model's chat template if it has one.
        base: the directory that the path of a file is relative to.
        checkpoint: the model, with its tokenizer.
        held_out: of a dataset, other items, for evaluation.

    Returns:
        For each line, the ids and the text of the prompt, and the line.

    Raises:
        InputError: a line is not as it must be, or two lines have a prompt in common and are not
            equal.
    """
    if is_gym(source):
        numbered = [(source, row) for row in rewards.gym_rows(source, held_out)]
        if checkpoint.tokenizer.template is not None:
            numbered = [(source, {**row, "messages": _question(row)}) for _, row in numbered]
    else:
        numbered = list(data.records(base / source))
    seen: dict[str, Any] = {}
    found = []
    for where, record in numbered:
        text = _asked(where, record, checkpoint)
        configs.require(
            seen.setdefault(text, record) == record,
            f"{where}: the fields of a line must be those of an earlier line with its prompt, or "
            f"the reward could not tell which is meant, but the prompt {text!r} has others.",
        )
        found.append((_prompt(where, text, checkpoint), text, record))
    return found


def _question(row: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}]


def _asked(where: str, record: Mapping[str, Any], checkpoint: hf.Checkpoint) -> str:
    """Return the `prompt` of a line, or its `messages` with the beginning of the next turn."""
    if "messages" not in record:
        data.check_fields(where, record, {"prompt": str})
        return str(record["prompt"])
    messages = record["messages"]
    valid = isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))
    configs.require(
        valid and messages[-1]["role"] != "assistant",
        f"{where}: messages must be a list of objects with the texts role and content, and the "
        f"last one not by the assistant, but is {messages!r}.",
    )
    return checkpoint.tokenizer.chat(messages)


def _prompt(where: str, text: str, checkpoint: hf.Checkpoint) -> list[int]:
    ids = checkpoint.tokenizer.encode(text)
    configs.require(bool(ids), f"{where}: prompt must have at least one token, but is {text!r}.")
    return ids


def _answer(where: str, name: str, text: str, checkpoint: hf.Checkpoint) -> list[int]:
    """Return the ids of a completion, with the end token after it."""
    ids, eos_id = checkpoint.tokenizer.encode(text), checkpoint.tokenizer.eos_id
    configs.require(bool(ids), f"{where}: {name} must have at least one token, but is {text!r}.")
    ids = ids if ids[-1] == eos_id else [*ids, eos_id]
    configs.require(
        ids.index(eos_id) == len(ids) - 1,
        f"{where}: {name} may have the end token {checkpoint.tokenizer.special()['eos_token']!r} "
        f"only at its end, but is {text!r}.",
    )
    return ids


def _conversation(where: str, messages: Any, checkpoint: hf.Checkpoint) -> Document:
    """Return the tokens of a conversation; those of the assistant are to be learned."""
    valid = isinstance(messages, list) and all(map(_is_message, messages))
    configs.require(
        valid and any(m["role"] == "assistant" for m in messages),
        f"{where}: messages must be a list of objects with the texts role and content, one of them "
        f"with the role 'assistant', but is {messages!r}.",
    )
    tokens, written = checkpoint.tokenizer, ""
    document: Document = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = tokens.chat(messages[:i]), tokens.chat(messages[: i + 1], reply=False)
        configs.require(
            before.startswith(written) and after.startswith(before),
            f"{where}: the chat template must only add text as a conversation goes on, but it "
            "changes what it wrote before; use prompt and completion instead.",
        )
        answer = tokens.encode(after[len(before) :])
        if tokens.eos_id not in answer:
            answer.append(tokens.eos_id)
        end = answer.index(tokens.eos_id) + 1  # templates may write more, such as a new line
        document += [(token, False) for token in tokens.encode(before[len(written) :])]
        document += [(token, at < end) for at, token in enumerate(answer)]
        written = after
    return document


def _is_message(message: Any) -> bool:
    names = ("role", "content")
    return isinstance(message, Mapping) and all(isinstance(message.get(n), str) for n in names)


def _check_sizes(sizes: Sequence[tuple[str, int]], checkpoint: hf.Checkpoint, length: int) -> None:
    """Raise an InputError if a line has more tokens than the model's context, or than a row."""
    where, longest = max(sizes, key=lambda size: size[1])
    context = checkpoint.model.architecture.context
    configs.require(
        longest <= context,
        f"{where} must have at most {context} tokens, the context of the model, with its end, but "
        f"has {longest}.",
    )
    configs.require(
        longest <= length,
        f"max_length must be at least {longest}, the tokens of {where}, with its end, but is "
        f"{length}.",
    )


# ---------------------------------------------------------------------------------------- training


def check(config: Any) -> None:
    """Raise an InputError unless the fields for published models make sense."""
    length = "max_length" if hasattr(config, "max_length") else "completion_length"
    configs.at_least(config, 0, "lora_rank", length)
    configs.one_of(config, "dtype", DTYPES)


def check_length(config: Any, text: Text | None, length: int) -> None:
    """Raise an InputError unless `max_length` is that of the given rows, or 0 without a model."""
    configs.require(
        text is not None or config.max_length == 0,
        f"max_length must be 0 without a published model, but is {config.max_length}.",
    )
    configs.require(
        text is None or config.max_length == length,
        f"max_length must be {length}, as for the rows that are given, but is {config.max_length}.",
    )


def check_dtype(config: Any, text: Text | None, model: transformer.Model | None) -> None:
    """Raise an InputError unless `dtype` is that of the model, or float32 without a published one.

    All runs of a sweep share one model, so they cannot differ in its type.
    """
    configs.require(
        text is not None or config.dtype == "float32",
        f"dtype must be 'float32' without a published model, but is {config.dtype!r}.",
    )
    own = "" if text is None or model is None else str(model.dtype)
    configs.require(
        own in ("", config.dtype),
        f"dtype must be {own!r}, as of the model that all runs share, but is {config.dtype!r}.",
    )


def ends(config: Any, given: Any) -> Any:
    """Return what has the ids of the end and of the padding: the text of a model, or the task."""
    return tasks.make(config.task) if given.text is None else given.text


def in_float32(
    optimizer: optax.GradientTransformation, config: Any
) -> optax.GradientTransformation:
    """Return an optimiser that keeps a copy in 32 bits of parameters in half precision.

    Adapters are in 32 bits anyway.
    """
    needed = config.dtype != "float32" and not config.lora_rank
    return optimizers.in_float32(optimizer) if needed else optimizer


def check_task(config: Any, given: Any) -> None:
    """Raise an InputError unless prompts, reward and model of a published policy fit each other."""
    text = given.text
    configs.require(
        text is not None or config.completion_length == 0,
        f"completion_length must be 0 without a published model, but is "
        f"{config.completion_length}.",
    )
    check_dtype(config, text, given.reference)
    if text is None:
        return
    configs.require(
        config.completion_length >= 1,
        "completion_length must be 1 or more tokens for a published model, but is "
        f"{config.completion_length}.",
    )
    configs.require(
        text.has_reward or given.reward is not None,
        "A published model must also be given reward, a Python file with a function reward, or a "
        "reward model.",
    )
    configs.require(
        not text.has_reward or given.reward is None,
        "given reward must be absent, because reasoning_gym scores its own answers.",
    )
    if given.reward is None:
        return
    own, vocab_size = given.reward.architecture, given.reference.architecture.vocab_size
    configs.require(
        own.output == "scalar" and own.vocab_size == vocab_size,
        f"given reward must be a reward model of whole completions with the {vocab_size} tokens of "
        f"the published model, but has outputs {own.output!r} and {own.vocab_size} tokens.",
    )
    longest = text.prompt_ids.shape[1] + config.completion_length
    configs.require(
        own.positions != "learned" or own.context >= longest,
        f"given reward must have a context of at least {longest} tokens, those of the longest "
        f"prompt and of a completion, but has {own.context}.",
    )


def task_of(config: Any, given: Any) -> tasks.Task:
    """Return the task of a run: the prompts of a published model, or the configuration's task."""
    text = getattr(given, "text", None)
    if text is None:
        return tasks.make(config.task)

    def demonstrate(key: jax.Array, prompt_ids: jax.Array) -> jax.Array:
        raise NotImplementedError("prompts of a file have no demonstrations")

    def reward(prompt_ids: jax.Array, completion_ids: jax.Array, mask: jax.Array) -> jax.Array:
        return rewards.score(text.content, text.pad_id, prompt_ids, completion_ids)

    # TextTask draws from these prompts by itself; all are as likely.
    return TextTask(
        words=(),
        suppressed=(),
        prompt_ids=text.prompt_ids,
        prompt_probability=np.zeros(0),
        held_out=np.zeros(0, bool),
        completion_length=config.completion_length,
        demonstrate=demonstrate,
        reward=reward,
        pad_id=text.pad_id,
        eos_id=text.eos_id,
        source=text,
    )


def times_typical(model: transformer.Model) -> float:
    """Return how many times as many activations a model has as one of the default size."""
    a, default = model.architecture, transformer.Architecture(vocab_size=1, context=1)
    return a.width * a.num_layers / (default.width * default.num_layers)


def completion_length(config: Any) -> int:
    """Return L, the most tokens of a completion: of a published model, or of the task."""
    return config.completion_length or tasks.make(config.task).completion_length


def start(key: jax.Array, model: transformer.Model, config: Any) -> Any:
    """Return the parameters that are trained: a new adapter, or those of the model."""
    return lora.init(key, model, config.lora_rank) if config.lora_rank else model.params


def policy(params: Any, model: transformer.Model, config: Any) -> transformer.Model:
    """Return the model with the parameters that are trained."""
    own = dataclasses.replace(model, architecture=_architecture(model, config))
    if config.lora_rank:
        return lora.attach(own, params)
    return dataclasses.replace(own, params=params)


def _architecture(model: transformer.Model, config: Any) -> transformer.Architecture:
    """Return an architecture that computes activations again if the run does."""
    return dataclasses.replace(model.architecture, remat=config.remat)


def start_scalar(
    key: jax.Array, model: transformer.Model, config: Any, scale: float
) -> dict[str, Any]:
    """Return the parameters of a reward model or a critic that are trained.

    Args:
        key: for the head, and for the adapter.
        model: a language model, whose body is taken.
        config: its `lora_rank` is read.
        scale: of the head's weights, as in `transformer.scalar_model`.

    Returns:
        With a rank, a new "adapter" of the body and a new "head"; without one, all parameters.
    """
    if not config.lora_rank:
        return transformer.scalar_model(key, model, scale).params
    key_head, key_adapter = random.split(key)
    head = transformer.scalar_model(key_head, model, scale).params["head"]
    return {"adapter": lora.init(key_adapter, model, config.lora_rank), "head": head}


def scalar(params: Any, model: transformer.Model, config: Any) -> transformer.Model:
    """Return a model with one number per token; `params` are as `start_scalar` returns them."""
    architecture = dataclasses.replace(_architecture(model, config), output="scalar")
    if not config.lora_rank:
        return transformer.Model(params, architecture)
    headed = transformer.Model({**model.params, "head": params["head"]}, architecture)
    return lora.attach(headed, params["adapter"])


def merged(policy: transformer.Model) -> transformer.Model:
    """Return a model without an adapter, for later stages, which decide on `remat` themselves."""
    whole = policy if policy.adapter is None else lora.merge(policy)
    architecture = dataclasses.replace(whole.architecture, remat=False)
    return dataclasses.replace(whole, architecture=architecture)


# ----------------------------------------------------------------------------------------- scoring


def each_row(
    key: jax.Array,
    function: Callable[[Any], dict[str, jax.Array]],
    rows: Any,
    config: Any,
    count: int,
) -> dict[str, jax.Array]:
    """Score rows, each once, and from the first one on again if there are fewer than asked.

    Args:
        key: chooses the rows, if there are more.
        function: rows [B] -> arrays [B].
        rows: a pytree of arrays [R, ...].
        config: `batch_size` rows are in memory at a time.
        count: E.

    Returns:
        Arrays [E].
    """
    rows = jax.tree.map(jnp.asarray, rows)  # an index that is traced needs arrays of jax
    size = jax.tree.leaves(rows)[0].shape[0]
    index = random.permutation(key, size)[:count]

    def one(i: jax.Array) -> dict[str, jax.Array]:
        row = jax.tree.map(lambda x: x[i][None], rows)
        return jax.tree.map(lambda x: x[0], function(row))

    values = lax.map(one, index, batch_size=min(config.batch_size, len(index)))
    return jax.tree.map(lambda x: x[jnp.arange(count) % len(index)], values)


def samples(
    key: jax.Array,
    models: Mapping[str, transformer.Model],
    text: Text,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    max_length: int,
) -> dict[str, list[Any]]:
    """Return prompts of a file with their completions there and by models, as text.

    Args:
        key: for the tokens.
        models: by the names of their columns.
        text: of the models.
        prompts: ids without padding.
        answers: ids of the completions in the file.
        max_length: tokens of the longest prompt and of a completion.
    """
    tokens = tokenizer_of(text)
    prompt_ids = hf.pad(prompts, text.pad_id)
    length = max(1, max_length - prompt_ids.shape[1])
    columns = {
        "prompt": [tokens.decode(ids, special=True) for ids in prompts],
        "data": [tokens.decode(ids) for ids in answers],
    }
    for i, (name, model) in enumerate(models.items()):
        own, ends = random.fold_in(key, i), {"eos_id": text.eos_id, "pad_id": text.pad_id}
        completion = _generate(own, model, prompt_ids, length=length, **ends)
        columns[name] = [tokens.decode(ids) for ids in np.asarray(completion.ids)]
    return columns


def samples_of(
    key: jax.Array,
    models: Mapping[str, transformer.Model],
    text: Text,
    prompt_ids: jax.Array,
    completion_ids: jax.Array,
    count: int,
) -> dict[str, list[Any]]:
    """Return what `samples` does for the first rows, and again from the first one on.

    Args:
        key: for the tokens.
        models: by the names of their columns.
        text: of the models.
        prompt_ids: [R, P] padded on the left.
        completion_ids: [R, L] padded on the right.
        count: rows to return.
    """
    rows = np.arange(count) % len(prompt_ids)
    prompts, answers = np.asarray(prompt_ids)[rows], np.asarray(completion_ids)[rows]
    begins = np.argmax(prompts != text.pad_id, axis=1)
    unpadded = [ids[begin:].tolist() for ids, begin in zip(prompts, begins, strict=True)]
    length = prompts.shape[1] + answers.shape[1]
    return samples(key, models, text, unpadded, answers.tolist(), length)


def save(folder: Path, policy: transformer.Model, text: Text | None) -> None:
    """Write a trained model as a folder in Hugging Face's layout.

    Raises:
        InputError: the run did not start from a published model.
    """
    configs.require(
        text is not None,
        "Only a run that started from a published model can be written in its layout.",
    )
    hf.save(folder, checkpoint_of(policy, text))  # type: ignore[arg-type]
