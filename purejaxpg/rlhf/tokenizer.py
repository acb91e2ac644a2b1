"""The tokenizer of a published model: text to ids and back, and conversations as text.

The ids come from the package `tokenizers`, which reads `tokenizer.json`, or `vocab.json` and
`merges.txt` of old GPT-2 folders. Chat templates are programs in jinja2, written by whoever wrote
the model; they run in its sandbox, which gives them no access to Python.

`pad_id` is never the end token. Many models declare one token as both, or no padding at all. A loss
that leaves out each token of padding would then leave out the ends, and the model would not learn
to stop.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np

from purejaxpg import InputError, disk, extras
from purejaxpg import config as configs
from purejaxpg.rlhf import safetensors

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
# The token of the byte 255, which no text in UTF-8 has: in byte-level vocabularies, and in those
# that fall back to bytes.
NEVER_IN_TEXT = ("ÿ", "<0xFF>")
OF_GPT2 = ("<|endoftext|>",)  # special, though vocab.json does not say so
# What a text is split into before its bytes are merged; None: words as GPT-2 has them. Each is a
# fact of its model, known by the name that GGUF files use.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "gpt-2": None,
    "smollm": None,  # and each digit for itself
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}",
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back."""

    backend: Any  # `tokenizers.Tokenizer`
    eos_id: int  # ends a completion
    pad_id: int  # fills rows; never the end token
    bos_id: int | None  # begins a text, if the model has such a token
    settings: Mapping[str, Any]  # of tokenizer_config.json
    template: str | None = None  # of conversations

    @property
    def size(self) -> int:
        """The number of ids: one more than the largest."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def special(self) -> dict[str, str | None]:
        """Return the tokens that end and begin a text, by the names that files have for them."""
        ids = {"eos_token": self.eos_id, "bos_token": self.bos_id}
        return {k: None if i is None else self.backend.id_to_token(i) for k, i in ids.items()}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of a text.

        Args:
            text: the names of special tokens in it, such as `<|im_end|>`, become these tokens.
            special: add what the model expects around a text, such as a token that begins it.
        """
        return list(self.backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """Return the text of ids.

        Args:
            ids: of tokens, such as a completion; padding is left out.
            special: keep the names of special tokens.
        """
        kept = [int(i) for i in ids if i != self.pad_id]
        return str(self.backend.decode(kept, skip_special_tokens=not special))

    def chat(self, messages: Sequence[Mapping[str, str]], reply: bool = True) -> str:
        """Return a conversation as the text that the model was trained on.

        Encode it with `special` False: the template has written special tokens already.

        Args:
            messages: each with `role` ("system", "user" or "assistant") and `content`.
            reply: end with the beginning of the assistant's next turn.

        Raises:
            InputError: the model has no template, or the template refuses the conversation.
        """
        configs.require(
            self.template is not None,
            "This tokenizer has no chat template, so it must be given texts and not conversations.",
        )
        try:
            return _compiled(str(self.template)).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=reply,
                **{name: token or "" for name, token in self.special().items()},
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InputError(f"The chat template must take the conversation: {error}.") from error


def read(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Read the tokenizer of a model's folder.

    Args:
        folder: with `tokenizer.json`, or with `vocab.json` and `merges.txt`.
        config: of `config.json`, which may name the ids of special tokens.

    Raises:
        InputError: a file is missing or wrong, or nothing names the end token.
        FaultError: the package `tokenizers` is not installed.
    """
    settings = _optional(folder / SETTINGS)
    ids = {**config, **{k: v for k, v in _optional(folder / GENERATION).items() if v is not None}}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if (folder / TEMPLATE).is_file():
        with disk.faults("read", folder / TEMPLATE):
            template = (folder / TEMPLATE).read_text(encoding="utf-8")
    return make(_backend(folder), settings, ids, template, folder)


def make(
    backend: Any,
    settings: Mapping[str, Any],
    ids: Mapping[str, Any],
    template: str | None,
    source: Path,
) -> Tokenizer:
    """Return a tokenizer whose special tokens are known.

    Args:
        backend: `tokenizers.Tokenizer`.
        settings: of tokenizer_config.json: `eos_token`, `bos_token`, `pad_token`, `unk_token`.
        ids: `eos_token_id` and so on, an id or a list, where the settings name no token.
        template: of conversations.
        source: for messages.

    Raises:
        InputError: nothing names the end token, or the vocabulary lacks it.
    """
    backend.no_padding()
    backend.no_truncation()

    eos_id, eos = _declared(backend, "eos_token", settings, ids)
    bos_id, bos = _declared(backend, "bos_token", settings, ids)
    for name, found, said in (("eos_token", eos_id, eos), ("bos_token", bos_id, bos)):
        configs.require(
            found is not None or said is None,
            f"{source}: {name} must be a token of the vocabulary, but is {said!r}.",
        )
    if eos_id is None:
        raise InputError(
            f"{source} must name the token that ends a completion: eos_token in {SETTINGS}, or "
            "eos_token_id in config.json."
        )
    declared, _ = _declared(backend, "pad_token", settings, ids)
    unknown, _ = _declared(backend, "unk_token", settings, ids)
    never_in_text = [backend.token_to_id(token) for token in NEVER_IN_TEXT]
    free = [i for i in (declared, *never_in_text, unknown) if i not in (None, eos_id, bos_id)]
    configs.require(
        bool(free),
        f"{source}: pad_token must differ from the tokens that begin and end a text; the "
        "vocabulary has no other token that no text has.",
    )
    return Tokenizer(backend, eos_id, free[0], bos_id, settings, template)


def write(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer as `read` and transformers read it."""
    disk.write_text(folder / FILE, tokenizer.backend.to_str(pretty=False))
    named = {name: token for name, token in tokenizer.special().items() if token is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.settings, **named}
    if tokenizer.template is not None:
        settings["chat_template"] = tokenizer.template
    disk.write_text(folder / SETTINGS, json.dumps(settings, indent=2))


def byte_level(kind: str, model: Any) -> Any:
    """Return a `tokenizers.Tokenizer` of bytes in UTF-8 that are merged, as GPT-2 has it.

    Args:
        kind: one of SPLITS.
        model: `tokenizers.models.BPE`, the vocabulary and its merges.
    """
    package = load_package()
    pre, backend = package.pre_tokenizers, package.Tokenizer(model)
    split = SPLITS[kind]
    parts = [pre.Split(package.Regex(split), "isolated")] if split else []
    if kind == "smollm":
        parts = [pre.Digits(individual_digits=True)]
    if kind == "qwen2":
        backend.normalizer = package.normalizers.NFC()
    parts.append(pre.ByteLevel(add_prefix_space=False, use_regex=not split))
    backend.pre_tokenizer = pre.Sequence(parts)
    backend.decoder = package.decoders.ByteLevel()
    return backend


def load_package() -> Any:
    """Return the package `tokenizers`.

    Raises:
        FaultError: it is not installed.
    """
    return extras.load("tokenizers", "lm", "A published language model")


def _backend(folder: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a folder."""
    package = load_package()
    whole, vocabulary, merges = (folder / name for name in (FILE, "vocab.json", "merges.txt"))
    configs.require(
        whole.is_file() or (vocabulary.is_file() and merges.is_file()),
        f"{folder} must have {FILE}, or vocab.json and merges.txt, but has neither.",
    )
    try:
        if whole.is_file():
            return package.Tokenizer.from_file(str(whole))
        model = package.models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # which is all that the package raises
        path = whole if whole.is_file() else vocabulary
        raise InputError(f"{path} must be the file of a tokenizer: {error}.") from error
    backend = byte_level("gpt-2", model)
    backend.add_special_tokens([t for t in OF_GPT2 if backend.token_to_id(t) is not None])
    return backend


def _declared(
    backend: Any, name: str, settings: Mapping[str, Any], ids: Mapping[str, Any]
) -> tuple[int | None, Any]:
    """Return the id of a special token, None if the vocabulary lacks it, and what files say."""
    said: Any = settings.get(name)
    said = said.get("content") if isinstance(said, Mapping) else said
    if isinstance(said, str):
        return backend.token_to_id(said), said
    said = ids.get(f"{name}_id")
    said = said[0] if isinstance(said, list) and said else said
    is_id = type(said) is int and said >= 0 and backend.id_to_token(said) is not None
    return said if is_id else None, said


def _optional(path: Path) -> dict[str, Any]:
    return safetensors.read_json(path) if path.is_file() else {}


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """Compile a chat template; `raise_exception` and `tojson` are what the templates expect."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template)
