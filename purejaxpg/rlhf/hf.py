"""Published language models: folders in Hugging Face's layout, and GGUF files.

`load` gives a model, which the trainers take as it is, with its tokenizer. `save` writes a folder
that `load` and transformers read. `families` says which settings and which names each family has.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from purejaxpg import config as configs
from purejaxpg import disk
from purejaxpg.rlhf import families, generate, gguf, safetensors, tokenizer, transformer

CONFIG = "config.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")

_generate = jax.jit(generate.generate, static_argnames=("length", "top_k", "top_p", "greedy"))


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A published model with what it needs to read and write text."""

    model: transformer.Model
    tokenizer: tokenizer.Tokenizer
    config: Mapping[str, Any]  # as in config.json


def load(source: str | Path, dtype: str = "float32", on_host: bool = False) -> Checkpoint:
    """Load a model with its tokenizer.

    Args:
        source: a folder in Hugging Face's layout, a GGUF file, or the name of a model that a Python
            package carries (`gguf.PACKAGES`).
        dtype: of the parameters, one of DTYPES.
        on_host: leave the parameters in the memory of the host, as NumPy arrays.

    Returns:
        The model, ready for training; `Checkpoint.tokenizer` has the ids of its end and padding.

    Raises:
        InputError: a file is missing, damaged, or of a model that is not known here.
        FaultError: a package is missing.
    """
    path = Path(source)
    packaged = None if path.exists() else gguf.find(str(source))
    if packaged is not None or path.suffix == ".gguf":
        path = packaged or path
        configs.require(path.is_file(), f"There is no file {path}.")
        config, tensors, tokens = gguf.read(path)
    else:
        config, tensors = _folder(path)
        families.architecture_of(config, str(path))  # what is wrong with it is the first to say
        tokens = tokenizer.read(path, config)
    model = _model(path, config, tensors, dtype, np.array if on_host else jnp.asarray)
    configs.require(
        tokens.size <= model.architecture.vocab_size,
        f"{path}: vocab_size must be at least the {tokens.size} tokens of the tokenizer, but is "
        f"{model.architecture.vocab_size}.",
    )
    return Checkpoint(model, tokens, config)


def load_model(folder: str | Path, dtype: str = "float32") -> transformer.Model:
    """Load a model from a folder, which needs no tokenizer.

    Args:
        folder: in Hugging Face's layout.
        dtype: of the parameters, one of DTYPES.

    Raises:
        InputError: a file is missing, damaged, or of a model that is not known here.
    """
    return _model(Path(folder), *_folder(Path(folder)), dtype)


def save(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a model and its tokenizer as a folder that `load` and transformers read.

    Args:
        folder: to be made, or to be written into.
        checkpoint: whose parameters are written in their own type.

    Raises:
        InputError: the model is not the one that `checkpoint.config` describes.
        FaultError: the disk is full, for example.
    """
    folder, model = Path(folder), checkpoint.model
    configs.require(model.adapter is None, "A model with an adapter must be merged first.")
    described = families.architecture_of(checkpoint.config, CONFIG)
    plain = dataclasses.replace(model.architecture, suppressed=(), remat=False)
    configs.require(
        described == plain,
        f"A model must have the architecture that its config describes, {described}, but has "
        f"{plain}.",
    )
    with disk.faults("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / safetensors.SINGLE, tensors_of(model))
    kept = {k: v for k, v in checkpoint.config.items() if k not in ("dtype", "torch_dtype")}
    config = {**kept, "torch_dtype": str(model.dtype)}
    disk.write_text(folder / CONFIG, json.dumps(config, indent=2))
    tokenizer.write(folder, checkpoint.tokenizer)


def tensors_of(model: transformer.Model) -> dict[str, np.ndarray]:
    """Return the parameters of a model as the tensors that files have, by their names there."""
    parameters = traverse_util.flatten_dict(model.params, sep="/")
    arrays: dict[str, np.ndarray] = {}
    for name, source in families.sources(model.architecture).items():
        widths = [shape[0 if source.transposed else -1] for shape in source.shapes]
        parts = np.split(np.asarray(parameters[name]), np.cumsum(widths)[:-1], axis=-1)
        matrices = [part.T if source.transposed else part for part in parts]
        arrays |= dict(zip(source.names, matrices, strict=True))
    return arrays


def _folder(folder: Path) -> tuple[dict[str, Any], dict[str, safetensors.Tensor]]:
    """Return what a folder's config.json says, and its tensors."""
    packaged = ", ".join(gguf.PACKAGES)
    configs.require(
        folder.is_dir(),
        f"There is no folder {folder}: a model is a folder with {CONFIG}, a .gguf file, or one of "
        f"{packaged}.",
    )
    return safetensors.read_json(folder / CONFIG), dict(safetensors.read(folder))


def _model(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, safetensors.Tensor],
    dtype: str,
    make: Callable[..., Any] = jnp.asarray,
) -> transformer.Model:
    """Return the model that a file's tensors make, all of which have to be there."""
    known = ", ".join(DTYPES)
    configs.require(dtype in DTYPES, f"dtype must be one of {known}, but is {dtype!r}.")
    configs.require(
        dtype != "float64" or jax.dtypes.canonicalize_dtype(float) == np.float64,
        "dtype 'float64' needs jax in 64 bits: set JAX_ENABLE_X64=1.",
    )
    architecture = families.architecture_of(config, str(path))
    made = families.sources(architecture)
    prefixed = {_full_name(name, architecture): tensor for name, tensor in tensors.items()}
    _check_tensors(path, made, prefixed, architecture)
    params = {}
    for name, source in made.items():
        arrays = [prefixed[part].array() for part in source.names]
        matrices = [array.T if source.transposed else array for array in arrays]
        joined = matrices[0] if len(matrices) == 1 else np.concatenate(matrices, axis=-1)
        params[name] = make(joined, jnp.dtype(dtype))
    return transformer.Model(traverse_util.unflatten_dict(params, sep="/"), architecture)


def _check_tensors(
    path: Path,
    made: Mapping[str, families.Source],
    tensors: Mapping[str, safetensors.Tensor],
    architecture: transformer.Architecture,
) -> None:
    """Raise an InputError unless there are the tensors of a model, and no others."""
    pairs = (zip(source.names, source.shapes, strict=True) for source in made.values())
    wanted = {name: shape for pair in pairs for name, shape in pair}
    for name, shape in wanted.items():
        configs.require(
            name in tensors, f"{path} must have the tensor {name!r} of shape {list(shape)}."
        )
        found = tuple(tensors[name].shape)
        configs.require(
            found == shape,
            f"{path}: tensor {name!r} must have the shape {list(shape)} that {CONFIG} implies, but "
            f"has {list(found)}.",
        )
    ignored = ("lm_head.weight",) if architecture.tied else ()
    others = [name for name in tensors if name not in (*wanted, *ignored)]
    extra = [name for name in others if not name.endswith(families.NO_PARAMETERS)]
    configs.require(
        not extra,
        f"{path} must have the tensors of the model that {CONFIG} describes and no others, but has "
        f"{', '.join(map(repr, extra[:3]))}{' and more' if len(extra) > 3 else ''}.",
    )


def _full_name(name: str, architecture: transformer.Architecture) -> str:
    """Return a tensor's name with the prefix that the first GPT-2 files left out."""
    whole = name.startswith(("transformer.", "lm_head.")) or architecture.positions == "rotary"
    return name if whole else f"transformer.{name}"


def check_length(checkpoint: Checkpoint, length: int, what: str) -> None:
    """Raise an InputError if a model was not made for sequences of a length.

    Args:
        checkpoint: the model.
        length: tokens of the longest sequence.
        what: the field that decides the length, for the message.
    """
    context = checkpoint.model.architecture.context
    configs.require(
        length <= context,
        f"{what} must be at most {context} tokens, the context of the model, but is {length}.",
    )


def pad(prompts: Sequence[Sequence[int]], pad_id: int) -> jax.Array:
    """Return prompts as one array, padded on the left: B lists of ids -> [B, P] int32."""
    longest = max(len(ids) for ids in prompts)
    rows = [[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    return jnp.array(rows, jnp.int32)


def complete(
    key: jax.Array,
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    greedy: bool = False,
) -> list[str]:
    """Write a completion of each prompt.

    Args:
        key: for all tokens.
        checkpoint: the model.
        prompts: texts, such as `tokenizer.chat` makes them of conversations.
        length: of a completion, in tokens, at most.
        temperature: positive; logits are divided by it.
        top_p: sample among the most probable tokens that reach this probability together.
        greedy: take the most probable token.

    Returns:
        The completions, without special tokens.

    Raises:
        InputError: a prompt has no tokens, or is too long for the model.
    """
    tokens = checkpoint.tokenizer
    encoded = [tokens.encode(prompt) for prompt in prompts]
    configs.require(bool(encoded) and all(encoded), "Each prompt must have at least one token.")
    prompt_ids = pad(encoded, tokens.pad_id)
    total = prompt_ids.shape[1] + length
    check_length(checkpoint, total, "The longest prompt with its completion")
    completion = _generate(
        key, checkpoint.model, prompt_ids, length, eos_id=tokens.eos_id, pad_id=tokens.pad_id,
        temperature=temperature, top_p=top_p, greedy=greedy,
    )  # fmt: skip
    return [tokens.decode(ids) for ids in np.asarray(completion.ids)]
