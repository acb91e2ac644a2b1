"""Constitutional AI: a model revises its own answers by principles, then judges itself by them.

Phase "revision" is supervised. An assistant answers a prompt, criticises its answer in the light of
a random principle, revises it, and does both again R times. The policy imitates the last revision:

    L(θ) = − Σ_t log π(y_t | x, y_<t) / Σ_t 1,        y the revision of revision ... of an answer

Phase "feedback" is reinforcement learning. The reward of a completion is the assistant's own
judgement, the log-probability that it finds nothing wrong, added up over the K principles:

    r(x, y) = Σ_k log p("<fine>" | x, y, principle k)

It maximises E[r] − β KL(π ‖ π_ref) with the divergence in the reward and a leave-one-out baseline,
as RLOO does, so the optimum is proportional to π_ref exp(r / β).

Bai et al. 2022, arXiv:2212.08073, sections 3.1 and 4.1. Differs from it:
1. The language is small and the principles are exact rules (`tasks/constitution.py`), so violations
   are counted and not estimated.
2. The feedback is one judgement of one completion for each principle; there, it is a comparison of
   two completions by one random principle, which trains a preference model.
3. With critic "exact", the rules criticise and revise. Then, no revision violates a principle that
   the answer before did not violate.
4. The policy imitates the last revision alone; there, those of all rounds, and helpful answers.

Run: purejaxpg train rlhf.constitution --given reference=results/lessons --seed 0
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax, nn, random

from purejaxpg import config as configs
from purejaxpg import optimizers, schedules
from purejaxpg.kernels import losses, preference
from purejaxpg.rlhf import generate, measure, tasks, tokens, transformer
from purejaxpg.rlhf.tasks import constitution

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "constitution"  # prompts, principles and the gold reward
    phase: str = "revision"  # or "feedback"
    num_updates: int = 300
    batch_size: int = 64  # B, completions per update
    num_revisions: int = 4  # R, in phase "revision"; 0: imitate the answers
    critic: str = "model"  # or "exact": the rules criticise and revise, in phase "revision"
    group_size: int = 8  # G, completions of each prompt in phase "feedback"; divides batch_size
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"

    beta: float = 0.1  # β, price of a nat of divergence from the reference, in phase "feedback"
    temperature: float = 1.0  # of sampling, and of all log-probabilities
    learning_rate: float = 1e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def steps_per_update(self) -> int:
        """Tokens of the completions that the policy learns from, padding included."""
        return self.batch_size * tasks.make(self.task).completion_length

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        return self.steps_per_update * measure.TYPICAL_ACTIVATIONS


@struct.dataclass
class Given:
    """The model to start from, and the assistant; without one, the reference is the assistant."""

    reference: transformer.Model
    assistant: transformer.Model | None = None  # trained on the lessons of the task


@struct.dataclass
class Batch:
    """Completions to imitate, or to reinforce; those of one prompt follow each other."""

    prompt_ids: jax.Array  # [B, P] padded on the left
    completion_ids: jax.Array  # [B, L]
    mask: jax.Array  # [B, L] bool, True up to the end token, inclusive
    advantage: jax.Array  # [B]; 1 in phase "revision"


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # of the policy
    opt_state: Any
    num_updates: jax.Array  # [] int32, finished


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    configs.one_of(config, "task", ("constitution",))
    configs.one_of(config, "phase", ("revision", "feedback"))
    configs.one_of(config, "critic", ("model", "exact"))
    configs.in_range(config)
    configs.at_least(config, 1, "num_updates")
    configs.at_least(config, 0, "num_revisions")
    if config.phase == "feedback":
        configs.at_least(config, 2, "group_size")
        configs.divides(config, "group_size", config.batch_size, "batch_size")
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless the given models fit the task, and can be asked for revisions."""
    measure.check_given(config, given)
    task = tasks.make(config.task)
    longest = task.prompt_length + 2 * task.completion_length + 4
    name = "reference" if given.assistant is None else "assistant"
    measure.check_model(config, name, assistant_of(given), longest)


def policy_of(params: Any, given: Given) -> transformer.Model:
    return transformer.Model(params, given.reference.architecture)


def assistant_of(given: Given) -> transformer.Model:
    return given.reference if given.assistant is None else given.assistant


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return optimizers.flattened(optax.chain(clip, adam))


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    params = given.reference.params
    return TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32))


def revise(
    key: jax.Array, prompt_ids: jax.Array, answer: jax.Array, config: Config, given: Given
) -> jax.Array:
    """Criticise and revise answers [B, L] in the light of one principle each -> ids [B, L]."""
    task, count = tasks.make(config.task), len(prompt_ids)
    key_principle, key_critique, key_revision = random.split(key, 3)
    principle = random.randint(key_principle, (count,), 0, len(constitution.PRINCIPLES))
    if config.critic == "exact":
        mask = tokens.completion_mask(answer, task.eos_id)
        return constitution.revise(key_revision, answer, mask, principle)

    def write(key: jax.Array, question: jax.Array, length: int) -> jax.Array:
        return generate.generate(
            key,
            assistant_of(given),
            question,
            length,
            eos_id=task.eos_id,
            pad_id=task.pad_id,
            temperature=config.temperature,
        ).ids

    question = constitution.to_criticise(prompt_ids, answer, principle)
    named = write(key_critique, question, 1)[:, 0]
    question = constitution.to_revise(prompt_ids, answer, principle, named)
    return write(key_revision, question, task.completion_length)


def revisions(key: jax.Array, prompt_ids: jax.Array, config: Config, given: Given) -> jax.Array:
    """Let the assistant answer prompts [B, P] and revise R times -> ids [R+1, B, L]."""
    key_answer, key_revise = random.split(key)
    task, assistant = tasks.make(config.task), assistant_of(given)
    answer = measure.sample(key_answer, assistant, prompt_ids, task, config.temperature).ids

    def again(ids: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        ids = revise(key, prompt_ids, ids, config, given)
        return ids, ids

    keys = random.split(key_revise, config.num_revisions)
    return jnp.concatenate([answer[None], lax.scan(again, answer, keys)[1]])


def judge(prompt_ids: jax.Array, completion_ids: jax.Array, given: Given) -> jax.Array:
    """Return the log-probability that the assistant finds nothing wrong -> [B, K]."""

    def by_principle(k: jax.Array) -> jax.Array:
        principle = jnp.full(len(prompt_ids), k)
        question = constitution.to_criticise(prompt_ids, completion_ids, principle)
        segments = tokens.segments(question, 0, constitution.PAD)
        logits = assistant_of(given)(question, segments)[:, -1]
        return nn.log_softmax(logits)[:, constitution.FINE]

    return lax.map(by_principle, jnp.arange(len(constitution.PRINCIPLES))).T


def rollout(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[Batch, Metrics]:
    """Complete B/G prompts G times each, and judge them -> Batch, metrics."""
    task, temperature = tasks.make(config.task), config.temperature
    key_prompt, key_completion = random.split(key)
    distinct = task.prompts(key_prompt, config.batch_size // config.group_size)
    prompt_ids = jnp.repeat(distinct, config.group_size, axis=0)
    policy = policy_of(state.params, given)
    completion = measure.sample(key_completion, policy, prompt_ids, task, temperature)
    ids, mask = completion.ids, completion.mask
    reference = measure.token_log_probs(given.reference, prompt_ids, ids, task, temperature)
    kl = preference.masked_sum(completion.log_prob - reference, mask, 1)
    score = judge(prompt_ids, ids, given).sum(1)
    total = (score - config.beta * kl).reshape(-1, config.group_size)
    metrics = {"reward/score": score.mean(), "policy/reference_kl": kl.mean()}
    return Batch(prompt_ids, ids, mask, preference.leave_one_out(total).ravel()), metrics


def imitate(key: jax.Array, config: Config, given: Given) -> tuple[Batch, Metrics]:
    """Draw prompts, and let the assistant answer and revise -> Batch, metrics."""
    task = tasks.make(config.task)
    key_prompt, key_revise = random.split(key)
    prompt_ids = task.prompts(key_prompt, config.batch_size)
    ids = revisions(key_revise, prompt_ids, config, given)[-1]
    mask = tokens.completion_mask(ids, task.eos_id)
    return Batch(prompt_ids, ids, mask, jnp.ones(len(ids))), {}


def loss(params: Any, batch: Batch, config: Config, given: Given) -> jax.Array:
    """The loss of either phase -> scalar."""
    task, policy = tasks.make(config.task), policy_of(params, given)
    prompt_ids, ids = batch.prompt_ids, batch.completion_ids
    log_prob = measure.token_log_probs(policy, prompt_ids, ids, task, config.temperature)
    if config.phase == "revision":
        return -preference.masked_mean(log_prob, batch.mask)
    completions = preference.masked_sum(log_prob, batch.mask, 1)
    return losses.score_function(completions, batch.advantage).mean()


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One iteration: B completions, then one gradient step on them."""
    if config.phase == "revision":
        batch, metrics = imitate(key, config, given)
    else:
        batch, metrics = rollout(key, state, config, given)
    violated = constitution.violations(batch.completion_ids, batch.mask)
    metrics |= {
        "reward/violations": violated.sum(1).mean(),
        "completion/length": batch.mask.sum(1).mean(),
    }
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
    """Evaluate on held-out prompts, beside the reference -> arrays [E].

    `evaluation/violations` counts the principles that the policy's completions violate.
    In phase "revision", `evaluation/violations_after_r` is that of the assistant's answers after r
    revisions, so that what the policy imitates can be seen.
    """
    task = tasks.make(config.task)
    key_score, key_prompt, key_policy, key_revise = random.split(key, 4)
    policy = policy_of(state.params, given)
    scores = measure.score(key_score, policy, config, num_episodes, given)
    prompt_ids = task.prompts(key_prompt, num_episodes, held_out=True)
    completion = measure.sample(key_policy, policy, prompt_ids, task, config.temperature)

    def count(ids: jax.Array) -> jax.Array:
        mask = tokens.completion_mask(ids, task.eos_id)
        return constitution.violations(ids, mask).sum(1).astype(jnp.float32)

    scores["evaluation/violations"] = count(completion.ids)
    if config.phase == "revision":
        for r, ids in enumerate(revisions(key_revise, prompt_ids, config, given)):
            scores[f"evaluation/violations_after_{r}"] = count(ids)
    return scores


def samples(
    key: jax.Array, state: TrainState, config: Config, num_samples: int, given: Given
) -> dict[str, list[Any]]:
    """Completions of held-out prompts by the reference and the policy, as text."""
    return measure.samples(key, policy_of(state.params, given), config, num_samples, given)


def frontier(key: jax.Array, config: Config, given: Given) -> Any:
    """The best gold reward at each divergence from the reference -> arrays [K] by name."""
    return measure.frontier(key, config, given)


def model(state: TrainState, config: Config, given: Given) -> transformer.Model:
    """The policy, for later stages."""
    return policy_of(state.params, given)


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
