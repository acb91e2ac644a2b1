"""Write tiny models of each family, and what transformers computes with them, into tests/golden/hf.

Each folder is as `save_pretrained` leaves it, and `expected.npz` has logits, hidden states, greedy
tokens and gradients in 64 bits, so that the tests need neither torch nor transformers. Run
`HF_HUB_OFFLINE=1 python tests/golden/make_hf.py` with torch and transformers installed to make them
again; the versions are recorded in each `expected.npz`.

Every parameter is moved from its initial value: zero biases and unit norms would hide mistakes.
"""

import contextlib
import pathlib
import shutil
from unittest import mock

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "hf"
VERSIONS = {
    "transformers": transformers.__version__,
    "torch": torch.__version__.split("+")[0],
}
LENGTHS = (9, 7, 4)  # of the prompts, which are padded on the left
NEW_TOKENS = 8
BASE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
# The lengths of its waves lie on both sides of, and between, the two bounds.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def gpt2(tied=True):
    return transformers.GPT2Config(
        vocab_size=40, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=1, tie_word_embeddings=tied,
    )  # fmt: skip


def llama(tied=False):
    wide = {**BASE, "num_attention_heads": 2, "num_key_value_heads": 1}
    wide["max_position_embeddings"] = 512
    return transformers.LlamaConfig(**wide, rope_parameters=LLAMA3, tie_word_embeddings=tied)


def plain_llama(tied=True):
    return transformers.LlamaConfig(**BASE, tie_word_embeddings=tied)


def qwen2(tied=True):
    return transformers.Qwen2Config(**BASE, tie_word_embeddings=tied)


def qwen3(tied=False):
    return transformers.Qwen3Config(**BASE, head_dim=6, tie_word_embeddings=tied)


CONFIGS = {config.__name__: config for config in (gpt2, llama, plain_llama, qwen2, qwen3)}
KEPT = {"gpt2": "float32", "llama": "bfloat16", "qwen2": "float32", "qwen3": "float16"}
SHARDED = ("llama",)


def make(config, dtype="float32", seed=0):
    """Return a model whose parameters are all random, and of `dtype`."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(getattr(torch, dtype)).eval()


@contextlib.contextmanager
def in_64_bits():
    """Let code that asks for 32 bits (norms, softmax, rotary angles) compute in 64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def double(model):
    """Return a copy in 64 bits, whose rotary frequencies are computed anew in 64 bits."""
    with in_64_bits():
        wide = type(model)(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    return wide


def inputs(vocab_size, seed=0):
    """Return ids, which of them are no padding, and their positions."""
    ids = np.random.default_rng(seed).integers(2, vocab_size, (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) >= max(LENGTHS) - np.array(LENGTHS)[:, None]
    return np.where(mask, ids, 0), mask, np.maximum(np.cumsum(mask, 1) - 1, 0)


def reference(model, ids, mask, positions):
    """Return what a model makes of padded prompts, in the model's own type."""
    ids, mask, positions = (torch.as_tensor(x) for x in (ids, mask, positions))
    with in_64_bits() if model.dtype == torch.float64 else contextlib.nullcontext():
        found = model(
            ids, attention_mask=mask.long(), position_ids=positions, output_hidden_states=True
        )
        log_prob = found.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        (-log_prob[mask[:, :-1]].mean()).backward()
        tokens = model.generate(
            ids, attention_mask=mask.long(), do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
        )[:, ids.shape[1] :]  # fmt: skip
    return {
        "logits": found.logits.detach().numpy(),
        "hidden": torch.stack(found.hidden_states).detach().numpy(),
        "tokens": tokens.numpy(),
        "gradients": {n: p.grad.numpy() for n, p in model.named_parameters()},
    }


def projections(gradient):
    """Return a gradient's products with two fixed directions: small, and no error escapes both."""
    flat = np.asarray(gradient, np.float64).ravel()
    index = np.arange(flat.size)
    return np.array([flat @ np.cos(1.0 + 0.7 * index), flat @ np.cos(2.0 + 1.9 * index)])


def main():
    for name, dtype in KEPT.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = make(CONFIGS[name](), dtype)
        model.save_pretrained(folder, max_shard_size="8KB" if name in SHARDED else "1MB")
        (folder / "generation_config.json").unlink()
        ids, mask, positions = inputs(model.config.vocab_size)
        expected = reference(double(model), ids, mask, positions)
        gradients = {f"gradient/{n}": projections(g) for n, g in expected.pop("gradients").items()}
        versions = np.array([f"{package} {version}" for package, version in VERSIONS.items()])
        given = {"ids": ids, "mask": mask, "versions": versions}
        np.savez(folder / "expected.npz", **given, **expected, **gradients)


if __name__ == "__main__":
    main()
