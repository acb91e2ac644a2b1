"""All families, tied and untied, against transformers itself, where it is installed.

test_hf.py compares with the numbers that it left in tests/golden/hf; here is everything else, and
the way back: transformers reads what `hf.save` has written.
"""

import jax
import numpy as np
import pytest
from rlhf import test_hf

from purejaxpg.rlhf import hf

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
        logits, hidden = test_hf.whole(ours, ids, mask.astype(np.int32))
        gradient = jax.grad(test_hf.nll)(ours.params, ours.architecture, ids, mask)
        found = hf.tensors_of(ours.replace(params=gradient))
    tolerance = {"rtol": 0, "atol": test_hf.BITS[dtype]}
    np.testing.assert_allclose(logits[mask], golden["logits"][mask], **tolerance)
    for layer, wanted in zip(hidden, golden["hidden"][1:], strict=True):
        np.testing.assert_allclose(layer[mask], wanted[mask], **tolerance)
    assert found.keys() == golden["gradients"].keys()
    for name, wanted in golden["gradients"].items():
        np.testing.assert_allclose(found[name], wanted, **tolerance, err_msg=name)
