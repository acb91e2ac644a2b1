"""Kahneman-Tversky optimisation (KTO): learn from single completions, each judged good or bad.

Minimises, over completions y of prompts x with the log-ratio f = log(π(y|x) / π_ref(y|x)),

    λ_D (1 − σ(β (f − z₀)))  if y is desirable,    λ_U (1 − σ(β (z₀ − f)))  otherwise
    z₀ = max(0, mean over i of log(π(y_{i-1}|x_i) / π_ref(y_{i-1}|x_i)))

z₀, which is not differentiated, stands for the divergence from the reference. It is estimated from
the prompts of a batch with the completions of other prompts, so a batch needs two. If a share q of
the labels of y is good, the policy tends to π_ref (q λ_D − (1 − q) λ_U)₊ for small β. Completions
that are too often bad vanish, and β says little about how far the others move, so this is not the
optimum of E[r] − β KL(π ‖ π_ref).

Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8 of version 5. Differs from it: the mismatched
completion is the one before, as in TRL, and not the one after; and a pair that is mismatched in
name only, because the data hold it twice, does not count.

Without data of your own, the reference writes new completions in every update. A label is drawn
with the probability σ(r(x, y) − threshold) of "desirable", from the task's own reward r. Of these
labels, `label_noise` turns a share the wrong way round, and `desirable_kept` and `undesirable_kept`
leave out others.

A published model is given with `--model` and `--data`: it is the reference, and the task counts for
nothing. With adapters, it is in memory once.

Run: purejaxpg train rlhf.kto --given reference=results/sft --seed 0
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import lax, nn, random

from purejaxpg import config as configs
from purejaxpg import optimizers, schedules
from purejaxpg.kernels import preference
from purejaxpg.rlhf import data, finetune, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts, and the reward that labels completions
    num_updates: int = 600  # gradient steps
    batch_size: int = 128  # B, completions of a gradient step; one alone has no other to compare
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    lora_rank: int = 0  # of adapters of the reference; 0: all its parameters are trained
    max_length: int = 0  # of a published model: tokens of a prompt and of a completion
    remat: bool = False  # compute activations again for gradients: less memory, more time
    dtype: str = "float32"  # of a published model's parameters; or "bfloat16"

    beta: float = 0.1  # β, scale of the log-ratios at which an example stops to count
    desirable_weight: float = 1.0  # λ_D
    undesirable_weight: float = 1.0  # λ_U
    threshold: float = 0.0  # reward of a sampled completion that is as often desirable as not
    label_noise: float = 0.0  # share of sampled labels that are the wrong way round
    desirable_kept: float = 1.0  # share of the sampled desirable completions that count
    undesirable_kept: float = 1.0  # share of the others that count
    temperature: float = 1.0  # of the reference that samples, and of all log-probabilities
    learning_rate: float = 3e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def steps_per_update(self) -> int:
        """Tokens of one update's completions, or of a published model's rows, with padding."""
        if self.max_length:
            return self.batch_size * self.max_length
        return self.batch_size * tasks.make(self.task).completion_length

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        return self.steps_per_update * measure.TYPICAL_ACTIVATIONS


@struct.dataclass
class Given:
    """The model to start from and to compare with, and judged completions, or it samples them."""

    reference: transformer.Model
    labelled: data.Labelled | None = None
    text: finetune.Text | None = None  # of a published reference
    held_out: data.Labelled | None = None  # of that, for the score; else the judged completions


PUBLISHED = ("text", "held_out")  # the fields that `published` sets, beside the others


@struct.dataclass
class Batch:
    """Judged completions with what the loss needs."""

    prompt_ids: jax.Array  # [B, P] padded on the left
    completion_ids: jax.Array  # [B, L]
    mask: jax.Array  # [B, L] bool, True up to the end token, inclusive
    is_desirable: jax.Array  # [B] bool
    ref_log_prob: jax.Array  # [B, L]
    kl: jax.Array  # [] of mismatched completions; z₀ if it is positive
    weight: jax.Array  # [B] 1, or 0 if left out; a probability, where the batch lists all


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # of the policy
    opt_state: Any
    num_updates: jax.Array  # [] int32, finished


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    tasks.make(config.task)
    configs.in_range(config)
    finetune.check(config)
    configs.at_least(config, 1, "num_updates")
    configs.at_least(config, 2, "batch_size")
    configs.above(config, 0, "beta")
    configs.at_least(config, 0, "desirable_weight", "undesirable_weight")
    configs.finite(config, "desirable_weight", "undesirable_weight", "threshold")
    configs.between(config, 0, 0.5, "label_noise")
    configs.between(config, 0, 1, "desirable_kept", "undesirable_kept")
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless the given models fit the task, or the rows max_length."""
    rows = given.labelled
    length = 0 if rows is None else rows.prompt_ids.shape[1] + rows.completion_ids.shape[1]
    finetune.check_length(config, given.text, length)
    finetune.check_dtype(config, given.text, given.reference)
    if given.text is None:
        measure.check_given(config, given)


def read(name: str, path: Path, config: Config) -> data.Labelled:
    """Read judged completions from a JSONL file with `prompt`, `completion` and `label`."""
    return data.read_labelled(path, tasks.make(config.task))


def published(sources: Mapping[str, str], base: Path, config: Config) -> Given:
    """Read a published model, and judged completions for it; the contract says what is what."""
    checkpoint, text = finetune.load(sources["model"], base, config)
    rows = {
        name: finetune.read_labelled(base / sources[name], checkpoint, config.max_length)
        for name in ("data", "held_out")
        if name in sources
    }
    return Given(checkpoint.model, rows["data"], text, rows.get("held_out"))


def activations(config: Config, given: Given) -> float:
    """Activations of one gradient step, which grow with the reference."""
    return config.activations * finetune.times_typical(given.reference)


def policy_of(params: Any, config: Config, given: Given) -> transformer.Model:
    return finetune.policy(params, given.reference, config)


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return finetune.in_float32(optimizers.flattened(optax.chain(clip, adam)), config)


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    params = finetune.start(key, given.reference, config)
    return TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32))


def draw(key: jax.Array, config: Config, given: Given) -> tuple[data.Labelled, jax.Array]:
    """Draw B judged completions: given ones, or new ones by the reference -> and which count."""
    if given.labelled is not None:
        return data.choose(key, given.labelled, config.batch_size), jnp.ones(config.batch_size)
    task = tasks.make(config.task)
    key_prompt, key_completion, key_label, key_kept = random.split(key, 4)
    prompt_ids = task.prompts(key_prompt, config.batch_size)
    completion = measure.sample(
        key_completion, given.reference, prompt_ids, task, config.temperature
    )
    reward = task.reward(prompt_ids, completion.ids, completion.mask)
    is_desirable = random.bernoulli(
        key_label, data.noisy(nn.sigmoid(reward - config.threshold), config.label_noise)
    )
    share = jnp.where(is_desirable, config.desirable_kept, config.undesirable_kept)
    is_kept = random.bernoulli(key_kept, share).astype(jnp.float32)
    return data.Labelled(prompt_ids, completion.ids, is_desirable), is_kept


def rollout(key: jax.Array, state: TrainState, config: Config, given: Given) -> Batch:
    """Draw B completions, and compare each prompt with the completion before its own."""
    task = finetune.ends(config, given)
    labelled, weight = draw(key, config, given)
    prompt_ids, ids = labelled.prompt_ids, labelled.completion_ids
    before = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), labelled)
    is_other = differ(labelled, before) & (weight > 0) & (jnp.roll(weight, 1) > 0)
    log_ratio = log_ratios(state.params, prompt_ids, before.completion_ids, config, given)
    kl = preference.masked_mean(log_ratio, is_other)
    mask = tokens.completion_mask(ids, task.eos_id)
    reference = measure.token_log_probs(given.reference, prompt_ids, ids, task, config.temperature)
    return Batch(prompt_ids, ids, mask, labelled.is_desirable, reference, kl, weight)


def differ(labelled: data.Labelled, others: data.Labelled) -> jax.Array:
    """Return which rows are not the same prompt and completion -> [B]."""
    is_other = (others.completion_ids != labelled.completion_ids).any(1)
    return is_other | (others.prompt_ids != labelled.prompt_ids).any(1)


def log_ratios(
    params: Any, prompt_ids: jax.Array, ids: jax.Array, config: Config, given: Given
) -> jax.Array:
    """Return the log-ratio of the policy and the reference for completions -> [B]."""
    task, policy = finetune.ends(config, given), policy_of(params, config, given)
    ours, theirs = (
        measure.token_log_probs(model, prompt_ids, ids, task, config.temperature)
        for model in (policy, given.reference)
    )
    return preference.masked_sum(ours - theirs, tokens.completion_mask(ids, task.eos_id), 1)


def objective(log_prob: jax.Array, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """The loss of new log-probabilities [B, L] of the tokens -> scalar, metrics."""
    log_ratio = preference.masked_sum(log_prob - batch.ref_log_prob, batch.mask, 1)
    weights = (config.desirable_weight, config.undesirable_weight)
    losses = preference.kto(log_ratio, batch.is_desirable, batch.kl, config.beta, *weights)

    def mean(x: jax.Array, among: jax.Array | bool = True) -> jax.Array:
        weight = jnp.where(among, batch.weight, 0.0)
        total = weight.sum()
        return (weight * x).sum() / jnp.where(total > 0, total, 1.0)

    desirable = mean(log_ratio, batch.is_desirable)
    undesirable = mean(log_ratio, ~batch.is_desirable)
    metrics = {
        "loss/preference": mean(losses),
        "policy/mismatched_kl": batch.kl,  # z₀ where it is positive
        "policy/desirable_log_ratio": desirable,
        "policy/undesirable_log_ratio": undesirable,
        "reward/margin": config.beta * (desirable - undesirable),  # of the implicit reward
        "reward/desirable": mean(batch.is_desirable),  # share of the labels
    }
    return mean(losses), metrics


def loss(params: Any, batch: Batch, config: Config, given: Given) -> tuple[jax.Array, Metrics]:
    """Mean loss of the completions of a batch -> scalar, metrics."""
    task, policy = finetune.ends(config, given), policy_of(params, config, given)
    prompt_ids, ids = batch.prompt_ids, batch.completion_ids
    log_prob = measure.token_log_probs(policy, prompt_ids, ids, task, config.temperature)
    return objective(log_prob, batch, config)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One gradient step on a batch of judged completions."""
    batch = rollout(key, state, config, given)
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params, batch, config, given)
    optimizer = make_optimizer(config, state.num_updates)
    change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, change)
    return TrainState(params, opt_state, state.num_updates + 1), metrics


def train(key: jax.Array, config: Config, given: Given) -> tuple[TrainState, Metrics]:
    """A whole run from one key -> final state, metrics [num_updates]."""
    state = init(random.fold_in(key, 0), config, given)

    def step(state: TrainState, u: jax.Array) -> tuple[TrainState, Metrics]:
        return update(random.fold_in(key, u), state, config, given)

    return lax.scan(step, state, jnp.arange(1, config.num_updates + 1))


def score(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate on held-out prompts, beside the reference -> arrays [E].

    For a published model, evaluate on the held-out rows, or else on the rows: the return is 1 where
    the implicit reward β (f − z₀) is positive for a desirable completion or negative for another,
    and ½ where it is 0. z₀ is that of the scored rows. Without it, a policy that raised all
    log-ratios alike would seem to agree with every "desirable".
    """
    if given.text is not None:
        return score_labelled(key, state, config, num_episodes, given)
    policy = policy_of(state.params, config, given)
    return measure.score(key, policy, config, num_episodes, given)


def score_labelled(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate a published model on judged completions -> arrays [E]."""
    rows: Any = given.labelled if given.held_out is None else given.held_out
    before = jax.tree.map(lambda x: jnp.roll(jnp.asarray(x), 1, axis=0), rows)

    def one(both: tuple[data.Labelled, data.Labelled]) -> dict[str, jax.Array]:
        row, other = both
        ids = (row.completion_ids, other.completion_ids)
        own, mismatched = (
            log_ratios(state.params, row.prompt_ids, each, config, given) for each in ids
        )
        sign = jnp.where(row.is_desirable, 1.0, -1.0)
        return {"own": own, "other": mismatched, "differ": differ(row, other), "sign": sign}

    values = finetune.each_row(key, one, (rows, before), config, num_episodes)
    kl = preference.masked_mean(values["other"], values["differ"])
    advantage = values["own"] - jnp.maximum(kl, 0.0)
    return {
        "evaluation/return": 0.5 * (1.0 + jnp.sign(values["sign"] * advantage)),
        "evaluation/log_ratio": values["own"],
        "evaluation/mismatched_kl": jnp.full(num_episodes, kl),
    }


def samples(
    key: jax.Array, state: TrainState, config: Config, num_samples: int, given: Given
) -> dict[str, list[Any]]:
    """Completions of held-out prompts by the reference and the policy, as text."""
    policy = model(state, config, given)
    if given.text is None:
        return measure.samples(key, policy, config, num_samples, given)
    rows: Any = given.labelled if given.held_out is None else given.held_out
    models = {"reference": given.reference, "policy": policy}
    asked = (rows.prompt_ids, rows.completion_ids, num_samples)
    columns = finetune.samples_of(key, models, given.text, *asked)
    labels = np.resize(np.asarray(rows.is_desirable), num_samples)
    return {**columns, "data is desirable": labels.tolist()}


def frontier(key: jax.Array, config: Config, given: Given) -> Any:
    """The best gold reward at each divergence from the reference -> arrays [K] by name."""
    return measure.frontier(key, config, given) if given.text is None else None


def model(state: TrainState, config: Config, given: Given) -> transformer.Model:
    """The policy, for later stages."""
    return finetune.merged(policy_of(state.params, config, given))


def save(folder: Path, state: TrainState, config: Config, given: Given) -> None:
    """Write the policy as a folder, if the reference was published."""
    finetune.save(folder, policy_of(state.params, config, given), given.text)


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
