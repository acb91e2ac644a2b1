"""Driver of TRL: GRPO and DPO of a GPT-2 with random parameters, in one process.

torch has one thread. A job of a language model has, beside its settings, the architecture "model"
and what the peer needs of the task in "texts": the words, prompts, pairs and rewards. GRPO samples
with transformers' `generate`, and DPO compares with the reference in every step.

A repetition is `train()` of a new trainer. The trainer is made before the clock starts.
"""

import os
import tempfile
from typing import Any

import common

NAMES = {
    "num_updates": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "learning_rate": "learning_rate",
    "learning_rate_schedule": "lr_scheduler_type",
    "max_grad_norm": "max_grad_norm",
    "beta": "beta",
}
ONLY_GRPO = {
    "group_size": "num_generations",
    "num_epochs": "num_iterations",
    "scale": "scale_rewards",
    "temperature": "temperature",
    "clip_eps": "epsilon",
    "clip_eps_high": "epsilon_high",
}
# Of its code, so they cannot be set.
FIXED = {
    "rlhf.grpo": {"kl_placement": "loss", "kl_estimator": "k3", "kl_times_ratio": True},
    "rlhf.dpo": {"loss": "sigmoid"},
}
LOSSES = {"sequence": "grpo"}  # the normaliser of a loss -> its name
QUIETLY = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_dropout": True,
    "weight_decay": 0.0,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
}


def config_of(algorithm: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Translate settings; refuse those that its code lacks."""
    given = dict(settings)
    del given["task"]
    for name, value in FIXED[algorithm].items():
        assert given.pop(name) == value, f"{name} is {value} in its code"
    if algorithm == "rlhf.dpo":
        return {NAMES[name]: value for name, value in given.items()} | {"max_length": None}
    loss = {"loss_type": LOSSES[given.pop("normaliser")]}
    names = NAMES | ONLY_GRPO
    return {names[name]: value for name, value in given.items()} | loss


def tokenizer_of(words: list[str]) -> Any:
    """Return a tokenizer with a token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, bos, eos = words[:3]
    names = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def gpt2_of(model: dict[str, int], texts: dict[str, Any]) -> Any:
    """Return a GPT-2 with random parameters and without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "n_embd": model["width"],
        "n_layer": model["num_layers"],
        "n_head": model["num_heads"],
        "n_inner": model["mlp_width"],
        "n_positions": model["context"],
        "vocab_size": len(texts["words"]),
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **ids, **without))


def reward_of(texts: dict[str, Any]) -> Any:
    """Return the task's reward: a sum over neighbouring tokens of a completion with an end."""
    import numpy as np

    table, ids = np.array(texts["reward"]), {word: i for i, word in enumerate(texts["words"])}

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        last = [ids[prompt.split()[-1]] for prompt in prompts]
        scores = []
        for before, own in zip(last, completion_ids, strict=True):
            ended = 2 in own
            total = table[[before, *own[:-1]], own].sum()
            scores.append(float(total) if ended else texts["unfinished"])
        return scores

    return reward


def counting(trainer: Any, counted: dict[str, int]) -> Any:
    """Return a trainer class that counts the tokens of the completions in its batches."""

    class Counting(trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *others: Any, **more: Any) -> Any:
            if "completion_ids" in inputs:
                counted["generated"] += inputs["completion_ids"].numel()
                counted["trained"] += inputs["completion_ids"].numel()
            else:
                counted["trained"] += int(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, *others, **more)

    return Counting


def prepare(job: dict[str, Any]) -> common.Prepared:
    """Save the model, and return what trains it."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    texts, is_grpo = job["texts"], job["algorithm"] == "rlhf.grpo"
    folder = tempfile.mkdtemp()
    gpt2 = gpt2_of(job["model"], texts)
    gpt2.save_pretrained(folder)
    counted = {"generated": 0, "trained": 0, "parameters": gpt2.num_parameters()}
    tokenizer = tokenizer_of(texts["words"])
    settings = config_of(job["algorithm"], job["settings"])
    trainer = counting(trl.GRPOTrainer if is_grpo else trl.DPOTrainer, counted)
    length = {"max_completion_length": texts["length"]} if is_grpo else {}
    made = trl.GRPOConfig if is_grpo else trl.DPOConfig
    rows = datasets.Dataset.from_list(texts["prompts"] if is_grpo else texts["pairs"])

    def make(seed: int) -> Any:
        args = made(output_dir=folder, seed=seed, **settings, **QUIETLY, **length)
        more = {"reward_funcs": reward_of(texts)} if is_grpo else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        given = {"model": model, "args": args, "train_dataset": rows, **more}
        return trainer(processing_class=tokenizer, **given)

    def run(trainer: Any) -> dict[str, int]:
        counted.update(generated=0, trained=0)
        trainer.train()
        return dict(counted)

    tokens = job["settings"]["num_updates"] * texts["tokens_per_update"]
    return common.Prepared(run, tokens, make=make, work=lambda outcome: outcome)


if __name__ == "__main__":
    common.main(prepare)
