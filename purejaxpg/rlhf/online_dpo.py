"""Online DPO: direct preference optimisation of pairs that the policy itself has just written.

In every update, the policy writes two completions of each prompt, and a judge prefers one of them,
by the model of Bradley and Terry: a given reward model, or the task's own reward. With the
log-ratio f = log(π(y|x) / π_ref(y|x)) of the chosen completion w and the rejected one l, `loss` is

    sigmoid   −log σ(β (f_w − f_l))
    ipo       (f_w − f_l − 1/(2β))²

The optimum of "sigmoid" is that of E[r] − β KL(π ‖ π_ref): π*, proportional to π_ref exp(r / β), as
for DPO. Online, the pairs come from where the policy is, so the optimum does not depend on what a
fixed set of pairs happens to cover. The gradient is not that of the objective, because the pairs
are data.

Ties are left out. Equal completions teach nothing, and a fair coin between completions that are
equally good to the judge is mostly noise. The other labels are noisy too, even at the optimum:
`labels = "expected"` takes both orders of a pair, weighted by the judge's probabilities.

Guo et al. 2024, arXiv:2402.04792, where the judge is a language model that picks the better one.

Run: purejaxpg train rlhf.online_dpo --given reference=results/sft --seed 0
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
from purejaxpg.rlhf import finetune, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts, and the reward that labels pairs
    num_updates: int = 300  # gradient steps
    batch_size: int = 64  # B, pairs of a gradient step
    loss: str = "sigmoid"  # or "ipo"
    labels: str = "sampled"  # or "expected": both orders, weighted by their probabilities
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    lora_rank: int = 0  # of adapters of the reference; 0: all its parameters are trained
    completion_length: int = 0  # L of a published model; 0: that of the task
    remat: bool = False  # compute activations again for gradients: less memory, more time
    dtype: str = "float32"  # of a published model's parameters; or "bfloat16"

    beta: float = 0.1  # β, price of a nat of divergence from the reference; of ipo, this is τ
    temperature: float = 1.0  # of sampling, and of all log-probabilities
    learning_rate: float = 3e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def steps_per_update(self) -> int:
        """Tokens of the completions of one update, padding included."""
        return 2 * self.batch_size * finetune.completion_length(self)

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        return self.steps_per_update * measure.TYPICAL_ACTIVATIONS


@struct.dataclass
class Given:
    """The model to start from and to stay close to, and a reward model; without one, the task's."""

    reference: transformer.Model
    reward: transformer.Model | None = None
    text: finetune.Text | None = None  # of a published reference, with prompts


PUBLISHED = ("text",)  # what `published` sets beside the reference


@struct.dataclass
class Batch:
    """Pairs with what the loss needs: all chosen completions, then all rejected ones."""

    prompt_ids: jax.Array  # [2B, P] padded on the left
    completion_ids: jax.Array  # [2B, L]
    mask: jax.Array  # [2B, L] bool, True up to the end token, inclusive
    ref_log_prob: jax.Array  # [2B, L]
    probability: (
        jax.Array
    )  # [B] that the chosen completion is the better one; 1 if labels are drawn
    weight: jax.Array  # [B] 1, or 0 for a tie; a probability, where the batch lists all pairs


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
    configs.one_of(config, "loss", ("sigmoid", "ipo"))
    configs.one_of(config, "labels", ("sampled", "expected"))
    configs.above(config, 0, "beta")
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless the given models fit the task."""
    finetune.check_task(config, given)
    if given.text is None:
        measure.check_given(config, given)


def published(sources: Mapping[str, str], base: Path, config: Config) -> Given:
    """Read a published model, and prompts and perhaps a reward for it; see the contract."""
    model, text = finetune.load_prompts(sources, base, config)
    return Given(model, text=text)


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


def rollout(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[Batch, Metrics]:
    """Complete B prompts twice each and let the judge choose -> Batch, metrics."""
    task, policy = finetune.task_of(config, given), policy_of(state.params, config, given)
    drawn = measure.draw_pairs(key, policy, config, config.batch_size, given)
    pairs, probability, gold = drawn
    is_tie = (probability == 0.5) | (pairs.chosen_ids == pairs.rejected_ids).all(1)
    prompt_ids = jnp.concatenate([pairs.prompt_ids, pairs.prompt_ids])
    ids = jnp.concatenate([pairs.chosen_ids, pairs.rejected_ids])
    mask = tokens.completion_mask(ids, task.eos_id)
    reference = measure.token_log_probs(given.reference, prompt_ids, ids, task, config.temperature)
    metrics = {
        "reward/gold": gold.mean(),
        "pairs/ties": is_tie.mean(),
        "completion/length": mask.sum(1).mean(),
        "completion/finished": tokens.finished(ids, task.eos_id).mean(),
    }
    if config.labels == "sampled":
        probability = jnp.ones_like(probability)
    weight = 1.0 - is_tie
    return Batch(prompt_ids, ids, mask, reference, probability, weight), metrics


def objective(log_prob: jax.Array, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """The loss of new log-probabilities [2B, L] of the tokens -> scalar, metrics."""
    log_ratio = preference.masked_sum(log_prob - batch.ref_log_prob, batch.mask, 1)
    chosen, rejected = jnp.split(log_ratio, 2)
    compare = preference.dpo if config.loss == "sigmoid" else preference.ipo
    right, wrong = compare(chosen, rejected, config.beta), compare(rejected, chosen, config.beta)
    losses = batch.probability * right + (1.0 - batch.probability) * wrong
    total = batch.weight.sum()

    def mean(x: jax.Array) -> jax.Array:
        return (batch.weight * x).sum() / jnp.where(total > 0, total, 1.0)

    metrics = {
        "loss/preference": mean(losses),
        "policy/reference_kl": log_ratio.mean(),  # of samples by this very policy
        "policy/chosen_log_ratio": mean(chosen),  # may fall while the margin rises
        "policy/rejected_log_ratio": mean(rejected),
        "reward/margin": config.beta * mean(chosen - rejected),  # of the implicit reward
        "reward/accuracy": mean(chosen > rejected),
    }
    return mean(losses), metrics


def loss(params: Any, batch: Batch, config: Config, given: Given) -> tuple[jax.Array, Metrics]:
    """Mean loss of the pairs of a batch that are not ties -> scalar, metrics."""
    task, policy = finetune.task_of(config, given), policy_of(params, config, given)
    prompt_ids, ids = batch.prompt_ids, batch.completion_ids
    log_prob = measure.token_log_probs(policy, prompt_ids, ids, task, config.temperature)
    return objective(log_prob, batch, config)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One iteration: 2B completions, then one gradient step on their comparisons."""
    batch, metrics = rollout(key, state, config, given)
    gradient, compared = jax.grad(loss, has_aux=True)(state.params, batch, config, given)
    optimizer = make_optimizer(config, state.num_updates)
    change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, change)
    return TrainState(params, opt_state, state.num_updates + 1), {**metrics, **compared}


def train(key: jax.Array, config: Config, given: Given) -> tuple[TrainState, Metrics]:
    """A whole run from one key -> final state, metrics [num_updates]."""
    state = init(random.fold_in(key, 0), config, given)

    def step(state: TrainState, u: jax.Array) -> tuple[TrainState, Metrics]:
        return update(random.fold_in(key, u), state, config, given)

    return lax.scan(step, state, jnp.arange(1, config.num_updates + 1))


def score(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate on held-out prompts, beside the reference -> arrays [E]."""
    return measure.score(key, policy_of(state.params, config, given), config, num_episodes, given)


def samples(
    key: jax.Array, state: TrainState, config: Config, num_samples: int, given: Given
) -> dict[str, list[Any]]:
    """Completions of held-out prompts by the reference and the policy, as text."""
    return measure.samples(key, policy_of(state.params, config, given), config, num_samples, given)


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
