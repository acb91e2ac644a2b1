"""Judge: a language model that learns to say which of two completions is better.

It reads a prompt, two completions and a question (`comparison.py`), and its next token is the
answer: "the first" or "the second". Minimises, over presentations of labelled pairs,

    L(θ) = −E[log p_θ(answer | x, first, second)]

Labels are scarce: a run draws `num_labels` pairs before its first update and sees no others. Two
completions of each prompt come from the reference, and the task's own reward labels them at random
by the Bradley-Terry model. A share `label_noise` of the labels is the wrong way round.

In each presentation, the better completion is shown second with probability s, `swap_share`. The
best judge then has the log-odds

    ℓ(x, y, y') = r(x, y) − r(x, y') + log((1 − s) / s)

without label noise: s = ½ teaches no position bias, and any other s teaches one, which an average
over both orders removes exactly.

The judge starts from the reference's parameters, as where a model judges its own kind. Lee et al.
2023, arXiv:2309.00267, for labels by a language model and for its position bias. Differs from it:
their judge is a large model that is prompted and not trained.

Run: purejaxpg train rlhf.judge --given reference=results/sft --seed 0
"""

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
from purejaxpg.rlhf import comparison, data, measure, tasks, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts, and the reward that labels pairs
    num_updates: int = 1000  # gradient steps
    batch_size: int = 64  # B, presentations of a gradient step
    num_labels: int = 10_000  # labelled pairs that a run may see; of given pairs, at most all
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"

    label_noise: float = 0.0  # share of labels that are the wrong way round, below a half
    swap_share: float = 0.5  # s, of presentations that show the better completion second
    temperature: float = 1.0  # of the reference that samples the pairs
    learning_rate: float = 1e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def steps_per_update(self) -> int:
        """Tokens of the questions of one update, padding included."""
        return self.batch_size * comparison.length(tasks.make(self.task))

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        return self.steps_per_update * measure.TYPICAL_ACTIVATIONS


@struct.dataclass
class Given:
    """The language model to start from, and labelled pairs; without any, it samples them."""

    reference: transformer.Model
    pairs: data.Pairs | None = None


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # of the judge
    opt_state: Any
    pairs: data.Pairs  # [num_labels], all that the run learns from
    num_updates: jax.Array  # [] int32, finished


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    tasks.make(config.task)
    configs.in_range(config)
    configs.at_least(config, 1, "num_updates", "num_labels")
    configs.at_least(config, 0, "label_noise")
    configs.require(
        config.label_noise < 0.5,
        f"label_noise must be less than 0.5, but is {config.label_noise}.",
    )
    configs.between(config, 0, 1, "swap_share")
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless the given models fit the task."""
    measure.check_given(config, given)


def read(name: str, path: Path, config: Config) -> data.Pairs:
    """Read pairs from a JSONL file with `prompt`, `chosen` and `rejected`."""
    return data.read_pairs(path, tasks.make(config.task))


def judge_of(params: Any, config: Config, given: Given) -> transformer.Model:
    task = tasks.make(config.task)
    return transformer.Model(params, comparison.architecture(given.reference, task))


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return optimizers.flattened(optax.chain(clip, adam))


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    key_model, key_pairs = random.split(key)
    start = comparison.start(key_model, given.reference, tasks.make(config.task))
    opt_state = make_optimizer(config).init(start.params)
    pairs = draw(key_pairs, config, given)
    return TrainState(start.params, opt_state, pairs, jnp.zeros((), jnp.int32))


def draw(key: jax.Array, config: Config, given: Given) -> data.Pairs:
    """Draw all labelled pairs of a run, some of them the wrong way round -> Pairs [num_labels]."""
    key_pairs, key_noise = random.split(key)
    if given.pairs is None:
        pairs = sample(key_pairs, config, given)
    else:
        size = len(given.pairs.prompt_ids)
        index = random.permutation(key_pairs, size)[: config.num_labels]
        pairs = jax.tree.map(lambda x: x[index], given.pairs)
    count = len(pairs.prompt_ids)
    is_right = 1.0 - jnp.broadcast_to(config.label_noise, count)
    noisy = data.label(key_noise, pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids, is_right)
    return noisy[0]


def sample(key: jax.Array, config: Config, given: Given) -> data.Pairs:
    """Let the reference write pairs, and label them by the task's reward -> Pairs [num_labels]."""

    def some(key: jax.Array, count: int) -> data.Pairs:
        return measure.sample_pairs(key, given.reference, config, count, None)[0]

    return measure.in_parts(some, key, config.num_labels)


def objective(first_is_better: jax.Array, is_swapped: jax.Array) -> tuple[jax.Array, Metrics]:
    """The loss of log-odds [B] of "the first", where the second [B] is better or not -> scalar."""
    right = jnp.where(is_swapped, -first_is_better, first_is_better)
    # No other answer is possible, so this is the likelihood of a token.
    likelihood = preference.bradley_terry(right, jnp.zeros_like(right)).mean()
    metrics = {
        "loss/answer": likelihood,
        "judge/accuracy": (right > 0).mean(),
        "judge/says_first": (first_is_better > 0).mean(),
    }
    return likelihood, metrics


def loss(
    params: Any, batch: data.Pairs, is_swapped: jax.Array, config: Config, given: Given
) -> tuple[jax.Array, Metrics]:
    """Mean loss of answers to presentations, swapped [B] or not -> scalar, metrics."""
    swapped, chosen, rejected = is_swapped[:, None], batch.chosen_ids, batch.rejected_ids
    first, second = jnp.where(swapped, rejected, chosen), jnp.where(swapped, chosen, rejected)
    judge, task = judge_of(params, config, given), tasks.make(config.task)
    first_is_better = comparison.ask(judge, batch.prompt_ids, first, second, task)
    return objective(first_is_better, is_swapped)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One gradient step on a batch of presentations."""
    key_choice, key_swap = random.split(key)
    batch = data.choose(key_choice, state.pairs, config.batch_size)
    is_swapped = random.bernoulli(key_swap, config.swap_share, (config.batch_size,))
    gradient_of = jax.grad(loss, has_aux=True)
    gradient, metrics = gradient_of(state.params, batch, is_swapped, config, given)
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
    """The judge, for later stages."""
    return judge_of(state.params, config, given)


def score(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate on fresh pairs of held-out prompts, labelled without noise -> arrays [E].

    `evaluation/return` is 1 where the judge, asked in both orders, agrees with the label, and ½ in
    a tie, as between equal completions. `evaluation/one_order` is the share of the two orders in
    which it agrees by itself, and `evaluation/consistent` whether both orders have the same winner.
    `evaluation/position_bias` is P("the first") − ½ over both orders. `evaluation/best` is the
    probability that the better completion by the task's own reward was chosen: no judge can agree
    more often on average.
    """
    reference, judge = given.reference, judge_of(state.params, config, given)
    pairs, probability = measure.sample_pairs(
        key, reference, config, num_episodes, None, held_out=True
    )
    shown_first, shown_second = comparison.ask_twice(
        judge, pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids, tasks.make(config.task)
    )
    log_odds = 0.5 * (shown_first + shown_second)

    def agrees(log_odds: jax.Array) -> jax.Array:
        return (log_odds > 0) + 0.5 * (log_odds == 0)

    values = {
        "return": agrees(log_odds),
        "one_order": 0.5 * (agrees(shown_first) + agrees(shown_second)),
        "consistent": (shown_first > 0) == (shown_second > 0),
        "position_bias": comparison.position_bias(shown_first, shown_second),
        "best": jnp.maximum(probability, 1.0 - probability),
        "loss": preference.bradley_terry(log_odds, jnp.zeros_like(log_odds)),
    }
    return {f"evaluation/{name}": value.astype(jnp.float32) for name, value in values.items()}


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
