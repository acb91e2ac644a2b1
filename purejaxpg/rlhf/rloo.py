"""REINFORCE leave-one-out (RLOO): policy gradients for language models without a critic.

Maximises E[r(x, y)] − β KL(π ‖ π_ref). A whole completion is one action, with the return

    R = r(x, y) − β (log π(y | x) − log π_ref(y | x))

An update has B completions, G of each prompt. Each one's baseline is the mean of the others of its
prompt:

    A_i = R_i − 1/(G-1) Σ_{j≠i} R_j,        ∇J ≈ 1/B Σ_i A_i ∇ log π(y_i | x_i)

The divergence is part of the return, before the baseline is taken off, so the gradient is that of
the objective and its optimum is π*, proportional to π_ref exp(r / β). A baseline that includes the
completion's own return scales the gradient by (G-1)/G. With baseline "none", this is REINFORCE.

Ahmadian et al. 2024, arXiv:2402.14740, section 2.3; Kool et al. 2019, "Buy 4 REINFORCE samples,
get a baseline for free!". One gradient step follows each batch, so there is no ratio to clip.

Run: purejaxpg train rlhf.rloo --given reference=results/sft --seed 0
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
from purejaxpg.kernels import losses, preference
from purejaxpg.rlhf import finetune, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts and the gold reward
    num_updates: int = 300
    batch_size: int = 64  # B, completions per update
    group_size: int = 8  # G, completions of each prompt; must divide batch_size
    baseline: str = "leave_one_out"  # or "none"
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    lora_rank: int = 0  # of adapters of the reference; 0: all its parameters are trained
    completion_length: int = 0  # L of a published model; 0: that of the task
    remat: bool = False  # compute activations again for gradients: less memory, more time
    dtype: str = "float32"  # of a published model's parameters; or "bfloat16"

    beta: float = 0.1  # β, price of a nat of divergence from the reference
    missing_eos_penalty: float = 0.0  # taken from the score of a completion without an end
    temperature: float = 1.0  # of sampling, and of all log-probabilities
    learning_rate: float = 1e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def steps_per_update(self) -> int:
        """Tokens of the completions of one update, padding included."""
        return self.batch_size * finetune.completion_length(self)

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
    """Completions with what the loss needs; those of one prompt follow each other."""

    prompt_ids: jax.Array  # [B, P] padded on the left
    completion_ids: jax.Array  # [B, L]
    mask: jax.Array  # [B, L] bool, True up to the end token, inclusive
    advantage: jax.Array  # [B]


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
    configs.one_of(config, "baseline", ("leave_one_out", "none"))
    configs.at_least(config, 1 if config.baseline == "none" else 2, "group_size")
    configs.divides(config, "group_size", config.batch_size, "batch_size")
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
    """Complete B/G prompts G times each -> Batch, metrics."""
    task = finetune.task_of(config, given)
    key_prompt, key_completion = random.split(key)
    distinct = task.prompts(key_prompt, config.batch_size // config.group_size)
    prompt_ids = jnp.repeat(distinct, config.group_size, axis=0)
    policy = policy_of(state.params, config, given)
    completion = measure.sample(key_completion, policy, prompt_ids, task, config.temperature)
    ids, mask = completion.ids, completion.mask
    reference = measure.token_log_probs(given.reference, prompt_ids, ids, task, config.temperature)
    kl = preference.masked_sum(completion.log_prob - reference, mask, 1)
    finished = tokens.finished(ids, task.eos_id)
    score, gold = measure.rewards(given, task, prompt_ids, completion)
    penalised = score - jnp.where(finished, 0.0, config.missing_eos_penalty)
    metrics = {
        "reward/score": score.mean(),
        "reward/gold": gold.mean(),
        "policy/reference_kl": kl.mean(),
        "policy/entropy": -preference.masked_sum(completion.log_prob, mask, 1).mean(),
        **measure.lengths(task, completion, gold),
    }
    return Batch(prompt_ids, ids, mask, advantages(penalised - config.beta * kl, config)), metrics


def advantages(total: jax.Array, config: Config) -> jax.Array:
    """Returns [B] of completions, group by group -> advantages [B]."""
    if config.baseline == "none":
        return total
    return preference.leave_one_out(total.reshape(-1, config.group_size)).ravel()


def objective(log_prob: jax.Array, batch: Batch) -> jax.Array:
    """The loss of new log-probabilities [B, L] of the tokens -> scalar."""
    completions = preference.masked_sum(log_prob, batch.mask, 1)
    return losses.score_function(completions, batch.advantage).mean()


def loss(params: Any, batch: Batch, config: Config, given: Given) -> jax.Array:
    """Negative of the objective, of which only the gradient has a meaning -> scalar."""
    task, policy = finetune.task_of(config, given), policy_of(params, config, given)
    prompt_ids, ids = batch.prompt_ids, batch.completion_ids
    log_prob = measure.token_log_probs(policy, prompt_ids, ids, task, config.temperature)
    return objective(log_prob, batch)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One iteration: B completions, then one gradient step on them."""
    batch, metrics = rollout(key, state, config, given)
    value, gradient = jax.value_and_grad(loss)(state.params, batch, config, given)
    optimizer = make_optimizer(config, state.num_updates)
    change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, change)
    return TrainState(params, opt_state, state.num_updates + 1), {**metrics, "loss/policy": value}


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
