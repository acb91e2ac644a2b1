"""Supervised fine-tuning (SFT): maximum likelihood of demonstrations.

Minimises, over tokens t of the completions of a batch,

    L(θ) = − Σ_t log π(y_t | x, y_<t) / Σ_t 1

Only tokens of the completion count; those of the prompt are conditions. The minimum is the
conditional distribution of the demonstrations. Ouyang et al. 2022, arXiv:2203.02155, section 3.5.

Without data of your own, demonstrations are drawn afresh from the task. Given data are rows into
which short documents are packed: a token attends only to its own document, and positions start at 0
in each, so packing changes no loss.

A published model is given with `--model` and `--data`. Then the task and the fields of the
architecture count for nothing, and a row holds one document.

Run: purejaxpg train rlhf.sft --task sentiment --seed 0
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax, random

from purejaxpg import config as configs
from purejaxpg import optimizers, schedules
from purejaxpg.kernels import preference
from purejaxpg.rlhf import data, finetune, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # vocabulary, prompts and demonstrations
    num_updates: int = 600  # gradient steps
    batch_size: int = 64  # B, rows of a gradient step
    width: int = 32  # D, of the transformer
    num_layers: int = 2
    num_heads: int = 2
    num_kv_heads: int = 2  # must divide num_heads
    mlp_width: int = 128
    positions: str = "learned"  # or "rotary"
    norm: str = "rms"  # or "layer"
    mlp: str = "relu"  # "gelu" or "silu_gated"
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    lora_rank: int = 0  # of adapters of a published model; 0: all its parameters are trained
    max_length: int = 0  # tokens of a row of a published model's data
    remat: bool = False  # compute activations again for gradients: less memory, more time
    dtype: str = "float32"  # of a published model's parameters; or "bfloat16"

    learning_rate: float = 3e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def row_length(self) -> int:
        """S, tokens of a row: a prompt and a completion."""
        if self.max_length:
            return self.max_length
        task = tasks.make(self.task)
        return task.prompt_length + task.completion_length

    @property
    def steps_per_update(self) -> int:
        """Tokens of one update, padding included."""
        return self.batch_size * self.row_length

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        per_token = measure.ACTIVATIONS_PER_WIDTH * self.width * self.num_layers
        return self.steps_per_update * per_token


@struct.dataclass
class Given:
    """Demonstrations to imitate; without any, the task draws them."""

    demonstrations: data.Rows | None = None
    model: transformer.Model | None = None  # a published one, to start from; else a new one
    text: finetune.Text | None = None  # of that model
    held_out: data.Rows | None = None  # of that model, for its score; else the demonstrations


NOTHING = Given()
PUBLISHED = ("model", "text", "held_out")  # the fields that `published` sets


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # of the transformer
    opt_state: Any
    num_updates: jax.Array  # [] int32, finished


def architecture(config: Config) -> transformer.Architecture:
    task = tasks.make(config.task)
    return transformer.Architecture(
        vocab_size=len(task.words),
        context=config.row_length,
        width=config.width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.width // config.num_heads,
        mlp_width=config.mlp_width,
        positions=config.positions,
        norm=config.norm,
        mlp=config.mlp,
        suppressed=task.suppressed,
        remat=config.remat,
    )


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    tasks.make(config.task)
    configs.in_range(config)
    finetune.check(config)
    configs.at_least(config, 1, "num_updates", "num_heads")
    configs.divides(config, "num_heads", config.width, "width")
    schedules.check(config)
    transformer.check(architecture(config))


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless what is given fits the configuration."""
    rows = given.demonstrations
    finetune.check_length(config, given.text, 0 if rows is None else rows.ids.shape[1])
    finetune.check_dtype(config, given.text, given.model)
    configs.require(
        config.lora_rank == 0 or given.model is not None,
        f"lora_rank must be 0 without a published model, but is {config.lora_rank}.",
    )


def read(name: str, path: Path, config: Config) -> data.Rows:
    """Read demonstrations from a JSONL file with `prompt` and `completion`."""
    return data.read_rows(path, tasks.make(config.task), config.row_length)


def published(sources: Mapping[str, str], base: Path, config: Config) -> Given:
    """Read a published model, and demonstrations for it; the contract says what is what."""
    checkpoint, text = finetune.load(sources["model"], base, config)
    rows = {
        name: finetune.read_rows(base / sources[name], checkpoint, config.max_length)
        for name in ("data", "held_out")
        if name in sources
    }
    return Given(rows["data"], checkpoint.model, text, rows.get("held_out"))


def activations(config: Config, given: Given = NOTHING) -> float:
    """Activations of one gradient step, which grow with the model that is given."""
    return config.activations * (finetune.times_typical(given.model) if given.model else 1.0)


def policy_of(params: Any, config: Config, given: Given = NOTHING) -> transformer.Model:
    if given.model is None:
        return transformer.Model(params, architecture(config))
    return finetune.policy(params, given.model, config)


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return finetune.in_float32(optimizers.flattened(optax.chain(clip, adam)), config)


def init(key: jax.Array, config: Config, given: Given = NOTHING) -> TrainState:
    if given.model is None:
        params = transformer.init(key, architecture(config)).params
    else:
        params = finetune.start(key, given.model, config)
    opt_state = make_optimizer(config).init(params)
    return TrainState(params, opt_state, jnp.zeros((), jnp.int32))


def draw(key: jax.Array, config: Config, given: Given, held_out: bool = False) -> data.Rows:
    """Draw B rows: given ones, or new demonstrations of the task."""
    if given.demonstrations is not None:
        return data.choose(key, given.demonstrations, config.batch_size)
    return data.demonstrations(key, tasks.make(config.task), config.batch_size, held_out)


def loss(
    params: Any, batch: data.Rows, config: Config, given: Given = NOTHING
) -> tuple[jax.Array, Metrics]:
    """Mean negative log-probability of the tokens to imitate -> scalar, metrics."""
    policy = policy_of(params, config, given)
    logits = policy(batch.ids, batch.segments)[:, :-1]
    log_prob = tokens.log_probs(logits, batch.ids[:, 1:])
    is_target = batch.is_target[:, 1:]
    hits = (logits.argmax(-1) == batch.ids[:, 1:]).astype(jnp.float32)
    nll = -preference.masked_mean(log_prob, is_target)
    accuracy = preference.masked_mean(hits, is_target)
    return nll, {"loss/policy": nll, "policy/accuracy": accuracy}


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given = NOTHING
) -> tuple[TrainState, Metrics]:
    """One gradient step on a batch of demonstrations."""
    batch = draw(key, config, given)
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params, batch, config, given)
    optimizer = make_optimizer(config, state.num_updates)
    change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, change)
    return TrainState(params, opt_state, state.num_updates + 1), metrics


def train(key: jax.Array, config: Config, given: Given = NOTHING) -> tuple[TrainState, Metrics]:
    """A whole run from one key -> final state, metrics [num_updates]."""
    state = init(random.fold_in(key, 0), config, given)

    def step(state: TrainState, u: jax.Array) -> tuple[TrainState, Metrics]:
        return update(random.fold_in(key, u), state, config, given)

    return lax.scan(step, state, jnp.arange(1, config.num_updates + 1))


def model(state: TrainState, config: Config, given: Given = NOTHING) -> transformer.Model:
    """The language model, for later stages."""
    return finetune.merged(policy_of(state.params, config, given))


def save(folder: Path, state: TrainState, config: Config, given: Given = NOTHING) -> None:
    """Write the model as a folder, if it was published."""
    finetune.save(folder, policy_of(state.params, config, given), given.text)


def score(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given = NOTHING
) -> dict[str, jax.Array]:
    """Evaluate on new demonstrations of held-out prompts, and on own completions -> arrays [E].

    `evaluation/return` is the mean log-probability of a demonstration's tokens, in nats: more
    likely is better, and the completion that scores best is no good imitation. The task's own
    reward of the model's completions is `evaluation/gold_return`; where a task has right answers,
    there is `evaluation/pass@k` as well. For a published model, there is the former alone, of
    the held-out rows if they are given, and of the data otherwise.
    """
    if given.text is not None:
        return score_rows(key, state, config, num_episodes, given)
    task = tasks.make(config.task)
    key_demonstration, key_prompt, key_completion = random.split(key, 3)
    rows = data.demonstrations(key_demonstration, task, num_episodes, held_out=True)
    language_model = model(state, config)
    logits = language_model(rows.ids, rows.segments)[:, :-1]
    log_prob = tokens.log_probs(logits, rows.ids[:, 1:])
    prompt_ids = task.prompts(key_prompt, num_episodes, held_out=True)
    completion, rates = measure.pass_rates(key_completion, language_model, prompt_ids, task, 1.0)
    return {
        "evaluation/return": preference.masked_mean(log_prob, rows.is_target[:, 1:], 1),
        "evaluation/gold_return": task.reward(prompt_ids, completion.ids, completion.mask),
        "evaluation/length": completion.mask.sum(1).astype(jnp.float32),
        "evaluation/finished": tokens.finished(completion.ids, task.eos_id).astype(jnp.float32),
        **{f"evaluation/{name}": rate for name, rate in rates.items()},
    }


def score_rows(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate a published model on rows -> arrays [E]."""

    def one(row: data.Rows) -> dict[str, jax.Array]:
        _, metrics = loss(state.params, row, config, given)
        return {
            "evaluation/return": -metrics["loss/policy"][None],
            "evaluation/accuracy": metrics["policy/accuracy"][None],
        }

    rows: Any = given.demonstrations if given.held_out is None else given.held_out
    return finetune.each_row(key, one, rows, config, num_episodes)


def samples(
    key: jax.Array, state: TrainState, config: Config, num_samples: int, given: Given = NOTHING
) -> dict[str, list[Any]]:
    """Completions of held-out prompts by demonstration and by the model, as text."""
    if given.text is not None:
        return samples_of_rows(key, state, config, num_samples, given)
    task = tasks.make(config.task)
    key_prompt, key_demonstration, key_completion = random.split(key, 3)
    prompt_ids = task.prompts(key_prompt, num_samples, held_out=True)
    draw = jax.jit(measure.sample, static_argnums=3)
    texts = {
        "prompt": prompt_ids,
        "demonstration": task.demonstrate(key_demonstration, prompt_ids),
        "policy": draw(key_completion, model(state, config), prompt_ids, task, 1.0).ids,
    }
    return {name: [task.text(ids) for ids in np.asarray(rows)] for name, rows in texts.items()}


def samples_of_rows(
    key: jax.Array, state: TrainState, config: Config, num_samples: int, given: Given
) -> dict[str, list[Any]]:
    """Completions of a file's prompts there, by the published model and by the trained one."""
    rows: Any = given.demonstrations if given.held_out is None else given.held_out
    prompts, answers = [], []
    for i in range(num_samples):
        ids, is_target, segments = (
            np.asarray(x[i % len(x)]) for x in (rows.ids, rows.is_target, rows.segments)
        )
        first = int(np.argmax(is_target))  # of a conversation, the first answer
        prompts.append(ids[:first].tolist())
        answers.append(ids[first : int(segments.sum())].tolist())
    models: Any = {"reference": given.model, "policy": model(state, config, given)}
    text: Any = given.text
    return finetune.samples(key, models, text, prompts, answers, config.max_length)


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
