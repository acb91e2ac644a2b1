"""PPO for language models: reinforcement learning from human feedback in its classic form.

Maximises E[r(x, y)] − β KL(π ‖ π_ref) over completions y of prompts x. A token is an action with
the reward

    r_t = −β (log π_old(y_t | s_t) − log π_ref(y_t | s_t)),  plus r(x, y) at the last token

so the divergence is part of the return. With γ = 1 this is the one place where an estimate of the
divergence has the gradient of the objective: in the loss, or with another estimator, the optimum
is another policy than π*, proportional to π_ref exp(r / β). Per token, the loss is PPO's,

    L(θ) = −min(ρ A, clip(ρ, 1-ε, 1+ε) A) + c_v ½ (V - G)²,    ρ = π / π_old

summed over the tokens of a completion and averaged over completions. A mean over tokens would
only scale it; a mean over each completion's own tokens has another gradient.

Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155, section 3.5. The
details follow Huang et al. 2024, arXiv:2403.17031, and "The N implementation details of RLHF with
PPO", 2023. Differs from them:
1. The score is the reward of the last action, the end token; in several libraries it is that of
   the token after it.
2. A time limit is an end: a completion without an end token gets no bootstrap, but a penalty
   `missing_eos_penalty` if one is set.
3. Advantages are whitened once for all tokens of an update; rewards are not.
4. The critic is a transformer of its own. It starts from the reference's body, its head at 0; that
   of Ouyang et al. starts from the reward model.

Run: purejaxpg train rlhf.ppo --given reference=results/sft --seed 0
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax, random

from purejaxpg import config as configs
from purejaxpg import optimizers, prng, schedules
from purejaxpg.kernels import losses, preference, returns
from purejaxpg.rlhf import finetune, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts and the gold reward
    num_updates: int = 150
    batch_size: int = 64  # B, completions per update
    num_epochs: int = 4  # passes over the completions of an update
    num_minibatches: int = 1  # gradient steps per pass; must divide batch_size
    whiten_advantage: bool = True  # to mean 0, variance 1 over all tokens of an update
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    lora_rank: int = 0  # of adapters of the reference; 0: all its parameters are trained
    completion_length: int = 0  # L of a published model; 0: that of the task
    remat: bool = False  # compute activations again for gradients: less memory, more time
    dtype: str = "float32"  # of a published model's parameters; or "bfloat16"

    beta: float = 0.1  # β, price of a nat of divergence from the reference
    reference_kl: float = float("inf")  # nats per completion that β adapts to; inf: β stays
    kl_horizon: float = 10_000.0  # completions over which β changes by a fifth, for reference_kl
    missing_eos_penalty: float = 0.0  # taken from the score of a completion without an end
    temperature: float = 1.0  # of sampling, and of all log-probabilities
    learning_rate: float = 1e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    gae_lambda: float = 0.95  # 0: one-step TD, 1: the whole rest of the completion
    clip_eps: float = 0.2  # a ratio beyond 1 ± this gains nothing more
    vf_clip_eps: float = float("inf")  # the same for the change of a value
    vf_coef: float = 0.1  # weight of the value loss
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def steps_per_update(self) -> int:
        """Tokens of the completions of one update, padding included."""
        return self.batch_size * finetune.completion_length(self)

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        return self.steps_per_update // self.num_minibatches * measure.TYPICAL_ACTIVATIONS


@struct.dataclass
class Given:
    """The model to start from and to stay close to, and a reward model; without one, the task's."""

    reference: transformer.Model
    reward: transformer.Model | None = None
    text: finetune.Text | None = None  # of a published reference, with prompts


PUBLISHED = ("text",)  # what `published` sets beside the reference


@struct.dataclass
class Batch:
    """Completions with what the loss needs."""

    prompt_ids: jax.Array  # [B, P] padded on the left
    completion_ids: jax.Array  # [B, L]
    mask: jax.Array  # [B, L] bool, True up to the end token, inclusive
    log_prob: jax.Array  # [B, L] old
    value: jax.Array  # [B, L] old, of the state before each token
    advantage: jax.Array  # [B, L]
    target: jax.Array  # [B, L]
    weight: jax.Array  # [B] 1; a probability, where the batch lists all completions


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # {"policy", "critic"}
    opt_state: Any
    beta_factor: jax.Array  # [] moved towards reference_kl; β is the configuration's times this
    num_updates: jax.Array  # [] int32, finished


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    tasks.make(config.task)
    configs.in_range(config)
    finetune.check(config)
    configs.at_least(config, 1, "num_updates")
    configs.above(config, 0, "reference_kl")
    configs.divides(config, "num_minibatches", config.batch_size, "batch_size")
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
    return finetune.policy(params["policy"], given.reference, config)


def critic_of(params: Any, config: Config, given: Given) -> transformer.Model:
    return finetune.scalar(params["critic"], given.reference, config)


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates), eps=1e-5)
    return finetune.in_float32(optimizers.flattened(optax.chain(clip, adam)), config)


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    params = {
        "policy": finetune.start(random.fold_in(key, 1), given.reference, config),
        "critic": finetune.start_scalar(key, given.reference, config, scale=0.0),
    }
    return TrainState(
        params=params,
        opt_state=make_optimizer(config).init(params),
        beta_factor=jnp.ones((), jnp.float32),
        num_updates=jnp.zeros((), jnp.int32),
    )


def rollout(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[Batch, jax.Array, Metrics]:
    """Complete B prompts -> Batch without advantages, rewards of tokens [B, L], metrics."""
    task = finetune.task_of(config, given)
    key_prompt, key_completion = random.split(key)
    prompt_ids = task.prompts(key_prompt, config.batch_size)
    policy = policy_of(state.params, config, given)
    completion = measure.sample(key_completion, policy, prompt_ids, task, config.temperature)
    ids, mask = completion.ids, completion.mask
    reference = measure.token_log_probs(given.reference, prompt_ids, ids, task, config.temperature)
    finished = tokens.finished(ids, task.eos_id)
    score, gold = measure.rewards(given, task, prompt_ids, completion)
    penalised = score - jnp.where(finished, 0.0, config.missing_eos_penalty)
    beta = config.beta * state.beta_factor
    reward = preference.token_rewards(penalised, completion.log_prob, reference, mask, beta)
    value = tokens.before(critic_of(state.params, config, given), prompt_ids, ids, task.pad_id)
    kl = preference.masked_sum(completion.log_prob - reference, mask, 1)
    metrics = {
        "reward/score": score.mean(),
        "reward/gold": gold.mean(),
        "policy/reference_kl": kl.mean(),
        "policy/beta": beta,
        "policy/entropy": -preference.masked_sum(completion.log_prob, mask, 1).mean(),
        **measure.lengths(task, completion, gold),
    }
    zeros = jnp.zeros_like(value)
    weight = jnp.ones(len(ids))
    batch = Batch(prompt_ids, ids, mask, completion.log_prob, value, zeros, zeros, weight)
    return batch, reward, metrics


def advantages(batch: Batch, reward: jax.Array, config: Config) -> Batch:
    """Fill in advantages and the critic's targets, from the rewards of tokens [B, L]."""
    mask, value = batch.mask, jnp.where(batch.mask, batch.value, 0.0)
    next_value = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    # Nothing follows the last action, whether it is the end token or the last that fits.
    last = ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    advantage = returns.gae(
        reward.T, value.T, next_value.T, last.T, last.T, 1.0, config.gae_lambda
    ).T
    target = advantage + value
    if config.whiten_advantage:
        advantage = preference.masked_whiten(advantage, mask)
    return dataclasses.replace(batch, advantage=advantage, target=target)


def objective(
    log_prob: jax.Array, value: jax.Array, batch: Batch, config: Config
) -> tuple[jax.Array, Metrics]:
    """The loss of new log-probabilities and values [B, L] of the tokens -> scalar, metrics."""
    mask, old = batch.mask, batch.log_prob

    def mean(x: jax.Array) -> jax.Array:
        completions = preference.masked_sum(x, mask, 1)
        return (batch.weight * completions).sum() / batch.weight.sum()

    policy_loss = mean(losses.ppo_clip(log_prob, old, batch.advantage, config.clip_eps))
    errors = losses.value_loss_clipped(value, batch.value, batch.target, config.vf_clip_eps)
    value_loss = mean(errors)
    clipped = losses.is_clipped(log_prob, old, config.clip_eps)
    metrics = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "policy/kl": mean(losses.approximate_kl(log_prob, old)),
        "policy/clip_fraction": preference.masked_mean(clipped, mask),
    }
    return policy_loss + config.vf_coef * value_loss, metrics


def loss(params: Any, batch: Batch, config: Config, given: Given) -> tuple[jax.Array, Metrics]:
    """Negative of the objective on one minibatch -> scalar, metrics."""
    task = finetune.task_of(config, given)
    prompt_ids, ids = batch.prompt_ids, batch.completion_ids
    policy, critic = policy_of(params, config, given), critic_of(params, config, given)
    log_prob = measure.token_log_probs(policy, prompt_ids, ids, task, config.temperature)
    value = tokens.before(critic, prompt_ids, ids, task.pad_id)
    return objective(log_prob, value, batch, config)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One iteration: B completions, then epochs of minibatch gradient steps on them."""
    key_rollout, key_shuffle = random.split(key)
    batch, reward, metrics = rollout(key_rollout, state, config, given)
    batch = advantages(batch, reward, config)
    optimizer = make_optimizer(config, state.num_updates)

    def gradient_step(carry: Any, indices: jax.Array) -> Any:
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[indices], batch)
        gradient, metrics = jax.grad(loss, has_aux=True)(params, minibatch, config, given)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), metrics

    carry, steps = lax.scan(
        gradient_step, (state.params, state.opt_state), shuffled(key_shuffle, config)
    )
    share = config.batch_size / config.kl_horizon
    kl = metrics["policy/reference_kl"]
    factor = preference.kl_coefficient(state.beta_factor, kl, config.reference_kl, share)
    state = TrainState(*carry, factor, state.num_updates + 1)
    return state, {**metrics, **{name: value.mean() for name, value in steps.items()}}


def shuffled(key: jax.Array, config: Config) -> jax.Array:
    """Indices into the batch, a fresh permutation per epoch -> [epochs * minibatches, B]."""
    keys = random.split(key, config.num_epochs)
    order = jax.vmap(lambda key: prng.permutation(key, config.batch_size))(keys)
    return order.reshape(config.num_epochs * config.num_minibatches, -1)


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
