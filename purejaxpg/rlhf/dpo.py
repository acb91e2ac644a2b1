"""Direct preference optimisation (DPO) and its relatives: learn from pairs without reinforcement.

Minimises the mean loss of pairs of a chosen completion w and a rejected one l of a prompt x. With
the log-ratio f = log(π(y|x) / π_ref(y|x)), summed over the tokens of a completion with its end, and
the mean m of their log-probabilities, `loss` is one of

    sigmoid   −log σ(β (f_w − f_l))                          DPO
    ipo       (f_w − f_l − 1/(2β))²                          IPO; its τ is β here
    simpo     −log σ(β (m_w − m_l) − γ)                      SimPO
    orpo      −m_w − λ log σ(log odds_w − log odds_l)        ORPO, odds = p / (1 − p), p = exp m

If labels follow the model of Bradley and Terry, the optimum of DPO is π*, proportional to
π_ref exp(r / β), and so that of E[r] − β KL(π ‖ π_ref). Its gradient is not that objective's: it
weights completions as the pairs do, not as the policy does. If labels never contradict each other,
DPO has no finite optimum. Label smoothing gives it one (conservative DPO), and moves that of honest
labels. IPO ends at π_ref exp(p / β) instead, with the probability p that a completion beats one of
the model that wrote the pairs. SimPO and ORPO compare with no reference: the policy starts there,
and nothing keeps it.

Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Azar et al. 2023, arXiv:2310.12036, eq. 17; Meng, Xia
and Chen 2024, arXiv:2405.14734, eq. 6; Hong, Lee and Thorne 2024, arXiv:2403.07691, eqs. 6 and 7.
Without pairs of your own, the reference samples new ones in every update, and the task's own reward
labels them at random by the model of Bradley and Terry.

A published model is given with `--model` and `--data`: it is the reference, and the task counts for
nothing. With adapters, it is in memory once.

Run: purejaxpg train rlhf.dpo --given reference=results/sft --seed 0
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
from purejaxpg.rlhf import data, finetune, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts, and the reward that labels pairs
    num_updates: int = 600  # gradient steps
    batch_size: int = 64  # B, pairs of a gradient step
    loss: str = "sigmoid"  # or "ipo", "simpo" or "orpo"
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    lora_rank: int = 0  # of adapters of the reference; 0: all its parameters are trained
    max_length: int = 0  # of a published model: tokens of a prompt and of a completion
    remat: bool = False  # compute activations again for gradients: less memory, more time
    dtype: str = "float32"  # of a published model's parameters; or "bfloat16"

    beta: float = 0.2  # β; of ipo, this is τ; simpo needs about 2, orpo does not use it
    label_smoothing: float = 0.0  # of sigmoid: share of labels taken to be wrong, below a half
    simpo_margin: float = 0.5  # γ, by which simpo wants the chosen reward to be larger
    orpo_lambda: float = 1.0  # λ, weight of the comparison in orpo
    label_noise: float = 0.0  # share of sampled labels that are the wrong way round
    temperature: float = 1.0  # of the reference that samples pairs, and of all log-probabilities
    learning_rate: float = 3e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
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
    """The model to start from and to compare with, and pairs; without any, it samples them."""

    reference: transformer.Model
    pairs: data.Pairs | None = None
    text: finetune.Text | None = None  # of a published reference
    held_out: data.Pairs | None = None  # of that, for the score; without any, the pairs


PUBLISHED = ("text", "held_out")  # the fields that `published` sets, beside the others


@struct.dataclass
class Batch:
    """Pairs with what the loss needs: all chosen completions, then all rejected ones."""

    prompt_ids: jax.Array  # [2B, P] padded on the left
    completion_ids: jax.Array  # [2B, L]
    mask: jax.Array  # [2B, L] bool, True up to the end token, inclusive
    ref_log_prob: jax.Array  # [2B, L]
    weight: jax.Array  # [B] 1; a probability, where the batch lists all pairs


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
    configs.one_of(config, "loss", ("sigmoid", "ipo", "simpo", "orpo"))
    configs.above(config, 0, "beta")
    configs.at_least(config, 0, "label_smoothing", "simpo_margin", "orpo_lambda")
    configs.finite(config, "simpo_margin", "orpo_lambda")
    configs.between(config, 0, 0.5, "label_noise")
    configs.require(
        config.label_smoothing < 0.5,
        f"label_smoothing must be less than 0.5, but is {config.label_smoothing}.",
    )
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless the given models fit the task, or the pairs max_length."""
    pairs = given.pairs
    length = 0 if pairs is None else pairs.prompt_ids.shape[1] + pairs.chosen_ids.shape[1]
    finetune.check_length(config, given.text, length)
    finetune.check_dtype(config, given.text, given.reference)
    if given.text is None:
        measure.check_given(config, given)


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
    return Given(checkpoint.model, pairs["data"], text, pairs.get("held_out"))


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


def draw(key: jax.Array, config: Config, given: Given) -> Batch:
    """Draw B pairs: given ones, or new ones by the reference."""
    if given.pairs is None:
        pairs, _ = measure.sample_pairs(
            key, given.reference, config, config.batch_size, given, label_noise=config.label_noise
        )
    else:
        pairs = data.choose(key, given.pairs, config.batch_size)
    return with_reference(pairs, config, given)


def with_reference(pairs: data.Pairs, config: Config, given: Given) -> Batch:
    """Return pairs [B] as a batch, with what the reference says of them."""
    task = finetune.ends(config, given)
    prompt_ids = jnp.concatenate([pairs.prompt_ids, pairs.prompt_ids])
    ids = jnp.concatenate([pairs.chosen_ids, pairs.rejected_ids])
    reference = measure.token_log_probs(given.reference, prompt_ids, ids, task, config.temperature)
    mask = tokens.completion_mask(ids, task.eos_id)
    return Batch(prompt_ids, ids, mask, reference, jnp.ones(len(pairs.chosen_ids)))


def objective(log_prob: jax.Array, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """The loss of new log-probabilities [2B, L] of the tokens -> scalar, metrics."""
    log_ratio = preference.masked_sum(log_prob - batch.ref_log_prob, batch.mask, 1)
    chosen, rejected = jnp.split(log_ratio, 2)
    chosen_mean, rejected_mean = jnp.split(preference.masked_mean(log_prob, batch.mask, 1), 2)
    if config.loss == "sigmoid":
        losses = preference.dpo(chosen, rejected, config.beta, config.label_smoothing)
    elif config.loss == "ipo":
        losses = preference.ipo(chosen, rejected, config.beta)
    elif config.loss == "simpo":
        margin = config.simpo_margin
        losses = preference.simpo(chosen_mean, rejected_mean, config.beta, margin)
    else:
        losses = preference.orpo(chosen_mean, rejected_mean, config.orpo_lambda)

    def mean(x: jax.Array) -> jax.Array:
        return (batch.weight * x).sum() / batch.weight.sum()

    metrics = {
        "loss/preference": mean(losses),
        "policy/chosen_log_ratio": mean(chosen),  # may fall while the margin rises
        "policy/rejected_log_ratio": mean(rejected),
        "reward/chosen": config.beta * mean(chosen),  # implicit, whatever the loss
        "reward/rejected": config.beta * mean(rejected),
        "reward/margin": config.beta * mean(chosen - rejected),
        "reward/accuracy": mean(chosen > rejected),
    }
    return mean(losses), metrics


def loss(params: Any, batch: Batch, config: Config, given: Given) -> tuple[jax.Array, Metrics]:
    """Mean loss of the pairs of a batch -> scalar, metrics."""
    task, policy = finetune.ends(config, given), policy_of(params, config, given)
    prompt_ids, ids = batch.prompt_ids, batch.completion_ids
    log_prob = measure.token_log_probs(policy, prompt_ids, ids, task, config.temperature)
    return objective(log_prob, batch, config)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One gradient step on a batch of pairs."""
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


def score(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate on held-out prompts, beside the reference -> arrays [E].

    For a published model, evaluate on the held-out pairs, or else on the pairs: the return is 1
    where the log-ratio of the chosen completion is the larger one, and ½ where both are equal.
    """
    if given.text is not None:
        return score_pairs(key, state, config, num_episodes, given)
    policy = policy_of(state.params, config, given)
    return measure.score(key, policy, config, num_episodes, given)


def score_pairs(
    key: jax.Array, state: TrainState, config: Config, num_episodes: int, given: Given
) -> dict[str, jax.Array]:
    """Evaluate a published model on pairs -> arrays [E]."""

    def one(pair: data.Pairs) -> dict[str, jax.Array]:
        batch = with_reference(pair, config, given)
        _, metrics = loss(state.params, batch, config, given)
        chosen, rejected = metrics["policy/chosen_log_ratio"], metrics["policy/rejected_log_ratio"]
        return {
            "evaluation/return": 0.5 * (1.0 + jnp.sign(chosen - rejected))[None],
            "evaluation/chosen_log_ratio": chosen[None],
            "evaluation/rejected_log_ratio": rejected[None],
        }

    pairs: Any = given.pairs if given.held_out is None else given.held_out
    return finetune.each_row(key, one, pairs, config, num_episodes)


def samples(
    key: jax.Array, state: TrainState, config: Config, num_samples: int, given: Given
) -> dict[str, list[Any]]:
    """Completions of held-out prompts by the reference and the policy, as text."""
    policy = model(state, config, given)
    if given.text is None:
        return measure.samples(key, policy, config, num_samples, given)
    pairs: Any = given.pairs if given.held_out is None else given.held_out
    models = {"reference": given.reference, "policy": policy}
    rows = (pairs.prompt_ids, pairs.chosen_ids, num_samples)
    return finetune.samples_of(key, models, given.text, *rows)


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
