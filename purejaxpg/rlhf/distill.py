"""On-policy distillation: a student learns a teacher's distributions where it goes itself.

Minimises, over tokens t of the completions of a batch,

    L(θ) = Σ_t D(p(· | s_t), q(· | s_t)) / Σ_t 1,    p: the teacher's next token, q: the student's

D is exact: it sums over the whole vocabulary, so a token teaches more than which word was sampled.
The completions are the student's own, so it learns to go on from its own mistakes, which those of
the teacher never show. The gradient does not see that θ also chose the states s_t. So with reverse
KL it is not that of KL(q ‖ p) over whole completions, but a student that can represent the teacher
ends at it with every D: there, all of them are 0 in every state.

Agarwal et al. 2023, arXiv:2306.13649 (GKD). Differs from it:
1. Completions that are not the student's own are sampled from the teacher during training; there,
   they come from a fixed set. Each batch has `teacher_batch_size` of them; GKD flips a coin for the
   whole batch.
2. The mean is over all tokens of a batch, and not over completions of their means.

Run: purejaxpg train rlhf.distill --given reference=results/small --given teacher=results/ppo
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax, nn, random

from purejaxpg import config as configs
from purejaxpg import optimizers, schedules
from purejaxpg.kernels import preference
from purejaxpg.rlhf import generate, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts and the gold reward
    num_updates: int = 300
    batch_size: int = 64  # B, completions per update
    teacher_batch_size: int = 0  # those of them that the teacher samples; the rest are on-policy
    divergence: str = "reverse_kl"  # or "forward_kl" or "jensen_shannon"
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"

    jensen_shannon_weight: float = 0.5  # of the teacher: towards 0 forward, towards 1 reverse KL
    temperature: float = 1.0  # of sampling, and of both distributions
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
    """The student to start from, and its teacher."""

    reference: transformer.Model
    teacher: transformer.Model


@struct.dataclass
class Batch:
    """Completions with the teacher's distribution of each token."""

    prompt_ids: jax.Array  # [B, P] padded on the left
    completion_ids: jax.Array  # [B, L]
    mask: jax.Array  # [B, L] bool, True up to the end token, inclusive
    teacher_log_prob: jax.Array  # [B, L, V]
    weight: jax.Array  # [B] 1; a probability, where the batch lists all completions


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # of the student
    opt_state: Any
    num_updates: jax.Array  # [] int32, finished


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    tasks.make(config.task)
    configs.in_range(config)
    configs.at_least(config, 1, "num_updates")
    configs.between(config, 0, config.batch_size, "teacher_batch_size")
    configs.one_of(config, "divergence", preference.DIVERGENCES)
    inside = 0.0 < config.jensen_shannon_weight < 1.0
    configs.require(
        inside,
        "jensen_shannon_weight must be more than 0 and less than 1, where the divergence is 0, "
        f"but is {config.jensen_shannon_weight}.",
    )
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless both models fit the task, and so each other."""
    measure.check_given(config, given)


def student_of(params: Any, given: Given) -> transformer.Model:
    return transformer.Model(params, given.reference.architecture)


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return optimizers.flattened(optax.chain(clip, adam))


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    params = given.reference.params
    return TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32))


def rollout(key: jax.Array, state: TrainState, config: Config, given: Given) -> Batch:
    """Complete B prompts by the student, or some of them by the teacher -> Batch."""
    task = tasks.make(config.task)
    key_prompt, key_student, key_teacher = random.split(key, 3)
    prompt_ids = task.prompts(key_prompt, config.batch_size)
    split = config.batch_size - config.teacher_batch_size

    def sample(key: jax.Array, model: transformer.Model, rows: slice) -> generate.Completion:
        return measure.sample(key, model, prompt_ids[rows], task, config.temperature)

    parts = []
    if split > 0:
        parts.append(sample(key_student, student_of(state.params, given), slice(split)))
    if split < config.batch_size:
        parts.append(sample(key_teacher, given.teacher, slice(split, None)))
    completion = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    ids, mask = completion.ids, completion.mask
    teacher = log_probs(given.teacher, prompt_ids, ids, config)
    return Batch(prompt_ids, ids, mask, teacher, jnp.ones(len(ids)))


def log_probs(
    policy: transformer.Model, prompt_ids: jax.Array, ids: jax.Array, config: Config
) -> jax.Array:
    """The distribution of each token of completions [B, L] -> log-probabilities [B, L, V]."""
    logits = tokens.before(policy, prompt_ids, ids, tasks.make(config.task).pad_id)
    return nn.log_softmax(logits / config.temperature)


def objective(log_prob: jax.Array, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """The loss of the student's log-probabilities [B, L, V] -> scalar, metrics."""

    def mean(x: jax.Array) -> jax.Array:
        weight = jnp.broadcast_to(batch.weight[:, None], x.shape)
        return preference.masked_sum(weight * x, batch.mask) / preference.masked_sum(
            weight, batch.mask
        )

    def divergence(name: str) -> jax.Array:
        return preference.vocabulary_divergence(
            log_prob, batch.teacher_log_prob, name, config.jensen_shannon_weight
        )

    value = mean(divergence(config.divergence))
    return value, {"loss/policy": value, "policy/teacher_kl": mean(divergence("reverse_kl"))}


def loss(params: Any, batch: Batch, config: Config, given: Given) -> tuple[jax.Array, Metrics]:
    """Mean divergence from the teacher per token -> scalar, metrics."""
    student = student_of(params, given)
    log_prob = log_probs(student, batch.prompt_ids, batch.completion_ids, config)
    return objective(log_prob, batch, config)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One iteration: B completions, then one gradient step on them."""
    batch = rollout(key, state, config, given)
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params, batch, config, given)
    optimizer = make_optimizer(config, state.num_updates)
    change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, change)
    gold = tasks.make(config.task).reward(batch.prompt_ids, batch.completion_ids, batch.mask)
    metrics |= {"reward/gold": gold.mean(), "completion/length": batch.mask.sum(1).mean()}
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
    """Evaluate on held-out prompts, beside the teacher -> arrays [E].

    `evaluation/teacher_kl` is the sum over the completion's tokens of KL(student ‖ teacher), in
    nats, and `evaluation/win` is against the teacher.
    """
    beside = types.SimpleNamespace(reference=given.teacher, reward=None)
    student = student_of(state.params, given)
    values = measure.score(key, student, config, num_episodes, beside)
    values["evaluation/teacher_kl"] = values.pop("evaluation/kl")
    return values


def samples(
    key: jax.Array, state: TrainState, config: Config, num_samples: int, given: Given
) -> dict[str, list[Any]]:
    """Completions of held-out prompts by the student at its start and now, as text."""
    return measure.samples(key, student_of(state.params, given), config, num_samples, given)


def model(state: TrainState, config: Config, given: Given) -> transformer.Model:
    """The student, for later stages."""
    return student_of(state.params, given)


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
