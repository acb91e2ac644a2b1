"""Reward model: the Bradley-Terry model of preferences between two completions.

Minimises, over pairs of a chosen completion w and a rejected one l of a prompt x,

    L(θ) = E[ −log σ(r(x, w) − r(x, l)) + c (r(x, w) + r(x, l))² ]

r is one number, read off the transformer at the last token of the completion. Preferences say
nothing about a constant added to all rewards of a prompt; the term with c keeps them centred
around 0. It also shrinks their differences: small ones to 1 / (1 + 8 c), large ones more. With
c = 0, the expected loss is least where the differences are those that made the labels. Christiano
et al. 2017, arXiv:1706.03741, eq. 1; Ouyang et al. 2022, arXiv:2203.02155, eq. 1; the centring is
by Eisenstein et al. 2023, arXiv:2312.09244.

Without data of your own, the reference samples two completions of each prompt in every update, and
the task's own reward labels them at random by the Bradley-Terry model. With a given judge, a
language model labels them instead, asked in both orders; Lee et al. 2023, arXiv:2309.00267. With
`num_labels`, a run draws that many pairs before its first update and sees no others. The model
starts from the reference's body with a new head. A given writer samples the pairs in place of the
reference, so that the sizes of reward model and policy may differ. An ensemble is a sweep over
seeds.

A published model is given with `--model` and `--data`: its body is the start, and the task counts
for nothing. With adapters, the head and the adapter are trained.

Run: purejaxpg train rlhf.reward_model --given reference=results/sft --seed 0
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax, random

from purejaxpg import config as configs
from purejaxpg import optimizers, schedules
from purejaxpg.kernels import preference
from purejaxpg.rlhf import comparison, data, finetune, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts, and the reward that labels pairs
    num_updates: int = 400  # gradient steps
    batch_size: int = 64  # B, pairs of a gradient step
    num_labels: int = 0  # labelled pairs that a run may see; 0: new ones in every update
    labels: str = "sampled"  # or "greedy": the more probable one; what is scored is sampled
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    lora_rank: int = 0  # of adapters of the reference; 0: its body are trained
    max_length: int = 0  # of a published model: tokens of a prompt and of a completion
    remat: bool = False  # compute activations again for gradients: less memory, more time
    dtype: str = "float32"  # of a published model's parameters; or "bfloat16"

    label_noise: float = 0.0  # share of sampled labels that are the wrong way round
    temperature: float = 1.0  # of the model that samples the pairs
    learning_rate: float = 1e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    center_coef: float = 0.01  # c, keeps rewards around 0; shrinks their differences
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def steps_per_update(self) -> int:
        """Tokens of one update's completions, or of a published model's rows, with padding."""
        if self.max_length:
            return 2 * self.batch_size * self.max_length
        return 2 * self.batch_size * tasks.make(self.task).completion_length

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        return self.steps_per_update * measure.TYPICAL_ACTIVATIONS


@struct.dataclass
class Given:
    """The language model to start from, and pairs; without any, it samples them for the judge."""

    reference: transformer.Model
    pairs: data.Pairs | None = None
    judge: transformer.Model | None = None  # labels pairs; without one, the task's reward does
    writer: transformer.Model | None = None  # samples pairs; without one, the reference does
    text: finetune.Text | None = None  # of a published reference
    held_out: data.Pairs | None = None  # of that, for the score; without any, the pairs


PUBLISHED = ("text", "held_out")  # the fields that `published` sets, beside the others


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # of the transformer with a scalar head, or of its head and an adapter
    opt_state: Any
    pairs: data.Pairs | None  # [num_labels], all that the run learns from; None: no such limit
    num_updates: jax.Array  # [] int32, finished


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    tasks.make(config.task)
    configs.in_range(config)
    finetune.check(config)
    configs.at_least(config, 1, "num_updates")
    configs.at_least(config, 0, "num_labels")
    configs.one_of(config, "labels", ("sampled", "greedy"))
    configs.between(config, 0, 0.5, "label_noise")
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless the given models fit the task, or the pairs max_length."""
    pairs = given.pairs
    length = 0 if pairs is None else pairs.prompt_ids.shape[1] + pairs.chosen_ids.shape[1]
    finetune.check_length(config, given.text, length)
    finetune.check_dtype(config, given.text, given.reference)
    if given.text is None:
        measure.check_given(config, given)
        comparison.check_judge(config, given.judge)
        return
    for name in ("judge", "writer"):
        configs.require(
            getattr(given, name) is None,
            f"given {name} must be absent beside a published model, whose pairs are all in data.",
        )


def read(name: str, path: Path, config: Config) -> data.Pairs:
    """Read pairs from a JSONL file with `prompt`, `chosen` and `rejected`."""
    return data.read_pairs(path, tasks.make(config.task))


def published(sources: Mapping[str, str], base: Path, config: Config) -> Given:
    """Read a published model, and pairs for it; the contract says what is what."""
    checkpoint, text = finetune.load(sources["model"], base, config)
    pairs = {
        name: finetune.read_pairs(base / sources[name], checkpoint, config.max_length)
        for name in ("data", "held_out")
        if name in sources
    }
    return Given(checkpoint.model, pairs["data"], text=text, held_out=pairs.get("held_out"))


def activations(config: Config, given: Given) -> float:
    """Activations of one gradient step, which grow with the reference."""
    return config.activations * finetune.times_typical(given.reference)


def reward_of(params: Any, config: Config, given: Given) -> transformer.Model:
    return finetune.scalar(params, given.reference, config)


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return finetune.in_float32(optimizers.flattened(optax.chain(clip, adam)), config)


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    pairs = None
    if config.num_labels:
        key, key_pairs = random.split(key)
        pairs = draw_all(key_pairs, config, given)
    params = finetune.start_scalar(key, given.reference, config, scale=1.0)
    opt_state = make_optimizer(config).init(params)
    return TrainState(params, opt_state, pairs, jnp.zeros((), jnp.int32))


def draw_all(key: jax.Array, config: Config, given: Given) -> data.Pairs:
    """Draw all labelled pairs of a run -> Pairs [num_labels]; of given pairs, at most all."""
    if given.pairs is not None:
        index = random.permutation(key, len(given.pairs.prompt_ids))[: config.num_labels]
        return jax.tree.map(lambda x: x[index], given.pairs)

    def some(key: jax.Array, count: int) -> data.Pairs:
        return draw(key, config, given, count)[0]

    return measure.in_parts(some, key, config.num_labels)


def draw(
    key: jax.Array, config: Config, given: Given, count: int, held_out: bool = False
) -> tuple[data.Pairs, jax.Array]:
    """Draw pairs -> Pairs [count], probability [count] that a label agrees with the better one.

    The task's own reward labels the pairs of held-out prompts, whoever labels the others, and
    without noise.
    """
    by, greedy = (None, False) if held_out else (given, config.labels == "greedy")
    writer = given.reference if given.writer is None else given.writer
    noise = 0.0 if held_out else config.label_noise
    pairs, probability = measure.sample_pairs(
        key, writer, config, count, by, held_out, greedy, noise
    )
    return pairs, jnp.maximum(probability, 1.0 - probability)


def compare(model: transformer.Model, pairs: data.Pairs, task: Any) -> tuple[jax.Array, jax.Array]:
    """Return the rewards of the chosen and of the rejected completions, [B] each.

    Args:
        model: a reward model.
        pairs: [B].
        task: has the ids of the end and of the padding.
    """
    prompt_ids = jnp.concatenate([pairs.prompt_ids, pairs.prompt_ids])
    ids = jnp.concatenate([pairs.chosen_ids, pairs.rejected_ids])
    mask = tokens.completion_mask(ids, task.eos_id)
    chosen, rejected = jnp.split(tokens.at_end(model, prompt_ids, ids, mask, task.pad_id), 2)
    return chosen, rejected


def loss(params: Any, batch: data.Pairs, config: Config, given: Given) -> tuple[jax.Array, Metrics]:
    """Mean loss of the pairs of a batch -> scalar, metrics."""
    chosen, rejected = compare(
        reward_of(params, config, given), batch, finetune.ends(config, given)
    )
    likelihood = preference.bradley_terry(chosen, rejected).mean()
    centring = jnp.square(chosen + rejected).mean()
    metrics = {
        "loss/preference": likelihood,
        "reward/accuracy": (chosen > rejected).mean(),
        "reward/margin": (chosen - rejected).mean(),
        "reward/mean": 0.5 * (chosen + rejected).mean(),
    }
    return likelihood + config.center_coef * centring, metrics


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One gradient step on a batch of pairs."""
    pairs = given.pairs if state.pairs is None else state.pairs
    if pairs is None:
        batch, _ = draw(key, config, given, config.batch_size)
    else:
        batch = data.choose(key, pairs, config.batch_size)
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params, batch, config, given)
    optimizer = make_optimizer(config, state.num_updates)
    change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, change)
    return TrainState(params, opt_state, state.pairs, state.num_updates + 1), metrics


def train(key: jax.Array, config: Config, given: Given) -> tuple[TrainState, Metrics]:
    """A whole run from one key -> final state, metrics [num_updates]."""
    state = init(random.fold_in(key, 0), config, given)

    def step(state: TrainState, u: jax.Array) -> tuple[TrainState, Metrics]:
        return update(random.fold_in(key, u), state, config, given)

    return lax.scan(step, state, jnp.arange(1, config.num_updates + 1))


def model(state: TrainState, config: Config, given: Given) -> transformer.Model:
    """The reward model, for later stages."""
    return finetune.merged(reward_of(state.params, config, given))


def score(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate on fresh pairs of held-out prompts -> arrays [E].

    `evaluation/return` is 1 where the chosen completion has the higher reward. `evaluation/best`
    is the probability that the better completion by the task's own reward was chosen: no reward
    model can agree with random labels more often on average. For a published model, evaluate on the
    held-out pairs, or else on the pairs: equal rewards count as ½.
    """
    if given.text is not None:
        return score_pairs(key, state, config, num_episodes, given)
    pairs, best = draw(key, config, given, num_episodes, held_out=True)
    reward = reward_of(state.params, config, given)
    chosen, rejected = compare(reward, pairs, tasks.make(config.task))
    return {
        "evaluation/return": (chosen > rejected).astype(jnp.float32),
        "evaluation/best": best,
        "evaluation/loss": preference.bradley_terry(chosen, rejected),
    }


def score_pairs(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate the reward of a published model on pairs -> arrays [E]."""
    reward, text = reward_of(state.params, config, given), given.text

    def one(pair: data.Pairs) -> dict[str, jax.Array]:
        chosen, rejected = compare(reward, pair, text)
        return {
            "evaluation/return": 0.5 * (1.0 + jnp.sign(chosen - rejected)),
            "evaluation/loss": preference.bradley_terry(chosen, rejected),
        }

    pairs: Any = given.pairs if given.held_out is None else given.held_out
    return finetune.each_row(key, one, pairs, config, num_episodes)


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
