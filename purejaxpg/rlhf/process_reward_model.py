"""Process reward model: the probability that each step of a completion is right.

Minimises, over the steps t of completions y of prompts x, up to the first mistake,

    L(θ) = − E[ c_t log p_t + (1 − c_t) log (1 − p_t) ],    p_t = σ(f(x, y_≤t))

where c_t is 1 if step t is right, and f is one number, read off the transformer at the last token
of the step. The minimum is the probability that the step is right, given that all before it are.
The reward of a completion is the product of the p_t, their minimum, or the last one. Lightman et
al. 2023, arXiv:2305.20050. With `labels = "outcome"`, this is the other kind of verifier, which
labels whole completions by their answers: a single step, whose p at the last token is the reward.
Cobbe et al. 2021, arXiv:2110.14168.

Without data of your own, the reference samples completions of prompts, and the task labels their
steps: exactly, where people or rollouts would err. The end of a completion is a step of its own.
Otherwise, a completion that stops after a right step would have the highest reward. The model
starts from the reference's body with a new head.

Run: purejaxpg train rlhf.process_reward_model --given reference=results/sft --seed 0
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax, nn, random

from purejaxpg import config as configs
from purejaxpg import optimizers, schedules
from purejaxpg.kernels import preference, verification
from purejaxpg.rlhf import data, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]
BEST_OF = (4, 16)  # completions among which the model chooses when it is scored


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "chain-4-10"  # prompts, and the labels of steps
    labels: str = "process"  # of each step; or "outcome", of whole completions
    aggregation: str = "product"  # of steps to a reward; or "minimum" or "last"
    num_updates: int = 400  # gradient steps
    batch_size: int = 64  # B, completions of a gradient step
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"

    temperature: float = 1.0  # of the reference that samples the completions
    learning_rate: float = 1e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def steps_per_update(self) -> int:
        """Tokens of the completions of one update, padding included."""
        return self.batch_size * tasks.make(self.task).completion_length

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        return self.steps_per_update * measure.TYPICAL_ACTIVATIONS


@struct.dataclass
class Given:
    """The language model to start from, and judged steps; without any, it samples completions."""

    reference: transformer.Model
    steps: data.Steps | None = None


@struct.dataclass
class Batch:
    """Completions with the labels of their steps."""

    prompt_ids: jax.Array  # [B, P] padded on the left
    completion_ids: jax.Array  # [B, L]
    labelled: jax.Array  # [B, L] bool, the last token of each step that has a label
    right: jax.Array  # [B, L] bool, the labels
    weight: jax.Array  # [B] 1; a probability, where the batch lists all completions


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # of the transformer with a scalar head
    opt_state: Any
    num_updates: jax.Array  # [] int32, finished


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    task = tasks.make(config.task)
    configs.in_range(config)
    configs.at_least(config, 1, "num_updates")
    configs.one_of(config, "labels", ("process", "outcome"))
    configs.one_of(config, "aggregation", transformer.AGGREGATIONS)
    configs.require(
        config.labels == "outcome" or task.steps is not None,
        f'labels must be "outcome", because task {config.task!r} has no steps, but is '
        f"{config.labels!r}.",
    )
    configs.require(
        config.labels == "process" or task.passing < float("inf"),
        f"task must have right answers for outcome labels, but {config.task!r} has none.",
    )
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless what is given fits the configuration."""
    measure.check_given(config, given)
    configs.require(
        given.steps is None or config.labels == "process",
        f'labels must be "process" if steps are given, but is {config.labels!r}.',
    )


def read(name: str, path: Path, config: Config) -> data.Steps:
    """Read judged steps from a JSONL file with `prompt`, `steps` and `labels`."""
    return data.read_steps(path, tasks.make(config.task))


def reward_of(params: Any, config: Config, given: Given) -> transformer.Model:
    # An outcome model has learned nothing about steps before the last.
    output = config.aggregation if config.labels == "process" else "last"
    architecture = dataclasses.replace(given.reference.architecture, output=output)
    return transformer.Model(params, architecture)


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return optimizers.flattened(optax.chain(clip, adam))


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    start = transformer.scalar_model(key, given.reference, scale=1.0)
    opt_state = make_optimizer(config).init(start.params)
    return TrainState(start.params, opt_state, jnp.zeros((), jnp.int32))


def label(prompt_ids: jax.Array, ids: jax.Array, config: Config) -> Batch:
    """Label completions [B, L] -> Batch."""
    task = tasks.make(config.task)
    mask = tokens.completion_mask(ids, task.eos_id)
    if config.labels == "process" and task.steps is not None:
        ends, right = task.steps(prompt_ids, ids, mask)
        labelled = verification.until_mistake(ends, right)
    else:
        labelled = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
        right = labelled & (task.reward(prompt_ids, ids, mask) >= task.passing)[:, None]
    return Batch(prompt_ids, ids, labelled, right, jnp.ones(len(ids)))


def draw(key: jax.Array, config: Config, given: Given) -> Batch:
    """Draw B given completions, or sample and label them -> Batch."""
    task = tasks.make(config.task)
    if given.steps is not None:
        chosen = data.choose(key, given.steps, config.batch_size)
        labelled = verification.until_mistake(chosen.ends, chosen.right)
        weight = jnp.ones(config.batch_size)
        return Batch(chosen.prompt_ids, chosen.completion_ids, labelled, chosen.right, weight)
    key_prompt, key_sample = random.split(key)
    prompt_ids = task.prompts(key_prompt, config.batch_size)
    completion = measure.sample(key_sample, given.reference, prompt_ids, task, config.temperature)
    return label(prompt_ids, completion.ids, config)


def objective(log_odds: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """The loss of log-odds [B, L] at the tokens -> scalar, metrics."""

    def mean(x: jax.Array) -> jax.Array:
        count = (batch.weight * batch.labelled.sum(1)).sum()
        return (batch.weight * preference.masked_sum(x, batch.labelled, 1)).sum() / count

    loss = mean(jnp.where(batch.right, nn.softplus(-log_odds), nn.softplus(log_odds)))
    metrics = {
        "loss/steps": loss,
        "reward/accuracy": mean(((log_odds > 0) == batch.right).astype(log_odds.dtype)),
        "reward/right": mean(batch.right.astype(log_odds.dtype)),
    }
    return loss, metrics


def loss(params: Any, batch: Batch, config: Config, given: Given) -> tuple[jax.Array, Metrics]:
    """Mean loss of the labelled steps of a batch -> scalar, metrics."""
    model, pad_id = reward_of(params, config, given), tasks.make(config.task).pad_id
    return objective(tokens.after(model, batch.prompt_ids, batch.completion_ids, pad_id), batch)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One gradient step on new completions."""
    batch = draw(key, config, given)
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


def model(state: TrainState, config: Config, given: Given) -> transformer.Model:
    """The reward model, for later stages."""
    return reward_of(state.params, config, given)


def score(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Let the model choose among completions of held-out prompts -> arrays [E].

    `evaluation/return` is the task's reward of the completion that the model prefers among 16 of
    the same prompt, and `evaluation/best_of_4` among four of them. `evaluation/sound` is 1 where
    all steps of the best of 16 are right. `evaluation/pass@1` is the share of right answers among
    the 16, which choosing at random would have, and `evaluation/pass@16` is 1 if there is any.
    """
    task = tasks.make(config.task)
    key_prompt, key_sample = random.split(key)
    prompt_ids = task.prompts(key_prompt, num_episodes, held_out=True)
    verifier = reward_of(state.params, config, given)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        completion = measure.sample(key, given.reference, prompt_ids, task, config.temperature)
        arrays = prompt_ids, completion.ids, completion.mask
        ends, right = arrays[2], task.reward(*arrays)[:, None] >= task.passing
        if task.steps is not None:
            ends, right = task.steps(*arrays)
        sound = (right | ~ends).all(1)
        return measure.model_rewards(verifier, task, *arrays), task.reward(*arrays), sound

    reward, gold, sound = lax.map(one, random.split(key_sample, max(BEST_OF)))
    best = {n: jnp.arange(num_episodes) + num_episodes * reward[:n].argmax(0) for n in BEST_OF}
    passed = (gold >= task.passing).astype(jnp.float32)
    return {
        "evaluation/return": gold.ravel()[best[16]],
        "evaluation/best_of_4": gold.ravel()[best[4]],
        "evaluation/sound": sound.ravel()[best[16]].astype(jnp.float32),
        "evaluation/pass@1": passed.mean(0),
        "evaluation/pass@16": passed.max(0),
    }


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
