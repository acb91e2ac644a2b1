"""Group relative policy optimisation (GRPO); Dr. GRPO, DAPO, GSPO and CISPO are settings of it.

G completions of each prompt are sampled. The mean of their scores r is the baseline, so there is no
critic, and all tokens of a completion share its advantage. Per token, the loss is PPO's:

    A_i  = (r_i − mean(r)) / std(r) − β (k_i − mean(k)),    k = log π_old(y|x) − log π_ref(y|x)
    L(θ) = −1/N Σ_i Σ_t min(ρ_t A_i, clip(ρ_t, 1-ε, 1+ε_high) A_i),    ρ_t = π / π_old

With scale "none", a normaliser N that is not "sequence", and the estimator k1 in the reward, this
is RLOO: the gradient is that of E[r] − β KL(π ‖ π_ref), but for the factor (G-1)/G and N, and the
optimum is π*, proportional to π_ref exp(r / β). Each of these changes what is optimised:

- scale "group" or "batch": with "group" and large G, a fixed point is proportional to
  π_ref exp(r / (β std)), where std belongs to the fixed point itself. For small β, the policy can
  also become deterministic: as std goes to 0, no β holds it. Neither fixed point is π*. For G = 2,
  only the sign of the difference of two scores counts.
- normaliser "sequence": tokens of short completions count more. That is another path; only a policy
  that can represent π* still ends there.
- kl_placement "loss": the penalty does not see how a token changes later states. k2 is the gradient
  of KL(π ‖ π_ref) at each visited state by itself, k3 that of KL(π_ref ‖ π); k3 times the ratio
  is k2 again. k1 has no such gradient at all, only noise or a preference for some lengths, and is
  refused.
- k2 or k3 in the reward: another gradient. k3 has nearly none close to the reference, so it does
  not hold the policy there.
- mask_truncated, mask_equal, oversample: other weights of completions or prompts.

Shao et al. 2024, arXiv:2402.03300, eq. 3 (scale "group", normaliser "sequence", k3 in the loss);
Liu et al. 2025, arXiv:2503.20783, Dr. GRPO (scale "none", normaliser "constant", β = 0); Yu et al.
2025, arXiv:2503.14476, DAPO (normaliser "token", ε_high = 0.28, mask_equal with oversample,
mask_truncated, β = 0); Zheng et al. 2025, arXiv:2507.18071, GSPO (ratio "sequence", normaliser
"sequence", ε of a few 1e-4); MiniMax 2025, arXiv:2506.13585, CISPO (surrogate "cispo", normaliser
"token", mask_equal with oversample, β = 0). Differs from them:
1. A completion that is left out of the loss is not counted in N either.
2. DAPO draws until the batch is full. Here `oversample` times as many groups are drawn, and equal
   ones fill up the batch if there are too few others.
3. With `staleness` k, the policy of k updates ago samples, as in asynchronous training. The weight
   min(π_old / μ, is_cap) of a whole completion corrects for it.
4. There is no penalty on long completions, which DAPO and CISPO add to the score.

Run: purejaxpg train rlhf.grpo --given reference=results/sft --seed 0
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
from purejaxpg import optimizers, prng, schedules
from purejaxpg.kernels import losses, preference
from purejaxpg.rlhf import finetune, generate, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts and the gold reward
    num_updates: int = 150
    batch_size: int = 64  # B, completions per update
    group_size: int = 8  # G, completions of each prompt; must divide batch_size
    num_epochs: int = 4  # passes over the completions of an update
    num_minibatches: int = 1  # gradient steps per pass; must divide batch_size
    scale: str = "none"  # divide advantages by std: of the "group", of the "batch", or "none"
    normaliser: str = "constant"  # N: B times L; "token": all tokens; "sequence": B |y_i|
    ratio: str = "token"  # or "sequence", one for the whole completion
    surrogate: str = "clip"  # of the ratio; or "cispo", whose weights are clipped instead
    kl_placement: str = "reward"  # or "loss"
    kl_estimator: str = "k1"  # "k2" or "k3"
    kl_times_ratio: bool = False  # multiply the divergence in the loss by the ratio
    mask_truncated: bool = False  # leave completions without an end out of the loss
    mask_equal: bool = False  # leave groups of equal scores out of the loss
    oversample: int = 1  # times as many groups are drawn; the first of unequal scores are kept
    staleness: int = 0  # k: the policy of k updates ago samples
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
    clip_eps: float = 0.2  # ε: a ratio below 1 - ε gains nothing more
    clip_eps_high: float = 0.2  # ε_high: nor does one above 1 + ε_high
    is_cap: float = 2.0  # largest weight of a stale completion; inf: no bound
    max_grad_norm: float = 1.0  # bound on the global gradient norm; inf: off

    @property
    def num_groups(self) -> int:
        """Prompts of a batch."""
        return self.batch_size // self.group_size

    @property
    def steps_per_update(self) -> int:
        """Tokens of the completions drawn in one update, padding included."""
        return self.oversample * self.batch_size * finetune.completion_length(self)

    @property
    def activations(self) -> int:
        """Activations of one gradient step, which decide how many runs share a CPU core."""
        length = finetune.completion_length(self)
        return self.batch_size // self.num_minibatches * length * measure.TYPICAL_ACTIVATIONS


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
    mask: jax.Array  # [B, L] bool, True up to the end token; False if the completion is left out
    log_prob: jax.Array  # [B, L] of the policy at the beginning of the update
    ref_log_prob: jax.Array  # [B, L]
    advantage: jax.Array  # [B]
    weight: jax.Array  # [B] of stale completions; or any, where the batch lists all completions


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # of the policy
    past: Any  # parameters before the last k updates, the oldest first; without staleness, ()
    opt_state: Any
    num_updates: jax.Array  # [] int32, finished


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    tasks.make(config.task)
    configs.in_range(config)
    finetune.check(config)
    configs.at_least(config, 1, "num_updates", "oversample")
    configs.at_least(config, 2, "group_size")
    configs.at_least(config, 0, "staleness", "clip_eps_high")
    configs.above(config, 0, "is_cap")
    configs.one_of(config, "scale", preference.SCALES)
    configs.one_of(config, "normaliser", ("constant", "token", "sequence"))
    configs.one_of(config, "ratio", ("token", "sequence"))
    configs.one_of(config, "surrogate", ("clip", "cispo"))
    configs.one_of(config, "kl_placement", ("reward", "loss"))
    configs.one_of(config, "kl_estimator", ("k1", "k2", "k3"))
    configs.require(
        (config.kl_placement, config.kl_estimator) != ("loss", "k1"),
        "kl_estimator must be 'k2' or 'k3' for kl_placement 'loss', because 'k1' has no gradient "
        "of a divergence there, but is 'k1'.",
    )
    configs.divides(config, "group_size", config.batch_size, "batch_size")
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
    return finetune.policy(params, given.reference, config)


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return finetune.in_float32(optimizers.flattened(optax.chain(clip, adam)), config)


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    params, k = finetune.start(key, given.reference, config), config.staleness
    past = jax.tree.map(lambda x: jnp.repeat(x[None], k, axis=0), params) if k else ()
    return TrainState(params, past, make_optimizer(config).init(params), jnp.zeros((), jnp.int32))


def rollout(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[Batch, Metrics]:
    """Complete prompts G times each -> Batch of B completions, metrics of all that were drawn."""
    task = finetune.task_of(config, given)
    key_prompt, key_completion = random.split(key)
    distinct = task.prompts(key_prompt, config.oversample * config.num_groups)
    prompt_ids = jnp.repeat(distinct, config.group_size, axis=0)
    sampler = jax.tree.map(lambda x: x[0], state.past) if config.staleness else state.params
    policy = policy_of(sampler, config, given)
    completion = measure.sample(key_completion, policy, prompt_ids, task, config.temperature)
    finished = tokens.finished(completion.ids, task.eos_id)
    score, gold = measure.rewards(given, task, prompt_ids, completion)
    penalised = score - jnp.where(finished, 0.0, config.missing_eos_penalty)
    metrics = {
        "reward/score": score.mean(),
        "reward/gold": gold.mean(),
        "reward/equal_groups": equal_groups(penalised, config).mean(),
        "policy/entropy": -preference.masked_sum(completion.log_prob, completion.mask, 1).mean(),
        **measure.lengths(task, completion, gold),
    }
    rows = chosen(penalised, config)
    completion = jax.tree.map(lambda x: x[rows], completion)
    batch, more = make_batch(prompt_ids[rows], completion, penalised[rows], state, config, given)
    return batch, {**metrics, **more}


def equal_groups(score: jax.Array, config: Config) -> jax.Array:
    """Whether all scores of a group are equal: scores [n G] -> [n] bool."""
    groups = score.reshape(-1, config.group_size)
    return (groups == groups[:, :1]).all(1)


def chosen(score: jax.Array, config: Config) -> jax.Array:
    """Rows of the first B/G groups, those of unequal scores before the others -> [B]."""
    groups = jnp.arange(config.num_groups)
    if config.oversample > 1:
        groups = jnp.argsort(equal_groups(score, config), stable=True)[: config.num_groups]
    return (groups[:, None] * config.group_size + jnp.arange(config.group_size)).ravel()


def make_batch(
    prompt_ids: jax.Array,
    completion: generate.Completion,
    score: jax.Array,
    state: TrainState,
    config: Config,
    given: Given,
) -> tuple[Batch, Metrics]:
    """Add log-probabilities and advantages to sampled completions -> Batch, metrics."""
    task = finetune.task_of(config, given)
    arguments = (prompt_ids, completion.ids, task, config.temperature)
    mask, log_prob = completion.mask, completion.log_prob
    weight = jnp.ones(len(score))
    if config.staleness:
        log_prob = measure.token_log_probs(policy_of(state.params, config, given), *arguments)
        new, old = (preference.masked_sum(x, mask, 1) for x in (log_prob, completion.log_prob))
        weight = losses.truncated_importance(new, old, config.is_cap)
    reference = measure.token_log_probs(given.reference, *arguments)
    metrics = {
        "policy/reference_kl": preference.masked_sum(log_prob - reference, mask, 1).mean(),
        "policy/importance": weight.mean(),
    }
    kl = preference.masked_sum(
        preference.token_kl(log_prob, reference, config.kl_estimator), mask, 1
    )
    if config.mask_truncated:
        mask = mask & tokens.finished(completion.ids, task.eos_id)[:, None]
    if config.mask_equal:
        mask = mask & ~jnp.repeat(equal_groups(score, config), config.group_size)[:, None]
    advantage = advantages(score, kl, config)
    batch = Batch(prompt_ids, completion.ids, mask, log_prob, reference, advantage, weight)
    return batch, metrics


def advantages(score: jax.Array, kl: jax.Array, config: Config) -> jax.Array:
    """Scores and estimates of the divergence [B], group by group -> advantages [B]."""
    scores, kls = (x.reshape(-1, config.group_size) for x in (score, kl))
    advantage = preference.group_advantages(scores, config.scale)
    if config.kl_placement == "reward":
        advantage -= config.beta * preference.group_advantages(kls, "none")
    return advantage.ravel()


def normalised(loss: jax.Array, batch: Batch, config: Config) -> jax.Array:
    """Add up losses of tokens [B, L], divided by the number of what is in the batch -> scalar."""
    weighted, mask = batch.weight[:, None] * loss, batch.mask
    count = jnp.maximum(mask.any(1).sum(), 1)
    if config.normaliser == "token":
        return preference.masked_mean(weighted, mask)
    if config.normaliser == "sequence":
        return preference.masked_mean(weighted, mask, 1).sum() / count
    return preference.masked_sum(weighted, mask) / (count * mask.shape[1])


def objective(log_prob: jax.Array, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """The loss of new log-probabilities [B, L] of the tokens -> scalar, metrics."""
    mask = batch.mask
    # Log-probabilities of padding are meaningless, and the exp of a difference may overflow.
    log_prob, old, reference = (
        jnp.where(mask, x, 0.0) for x in (log_prob, batch.log_prob, batch.ref_log_prob)
    )
    advantage = jnp.broadcast_to(batch.advantage[:, None], mask.shape)
    clip_range = (config.clip_eps, config.clip_eps_high)
    metrics = {"policy/kl": preference.masked_mean(losses.approximate_kl(log_prob, old), mask)}
    if config.ratio == "sequence":  # the old log-probabilities that give each token this ratio
        old = log_prob - preference.sequence_log_ratio(log_prob, old, mask)
    surrogate = losses.cispo if config.surrogate == "cispo" else losses.clip_higher
    policy_loss = surrogate(log_prob, old, advantage, *clip_range)
    ratio = jnp.exp(log_prob - old)
    outside = (ratio < 1.0 - config.clip_eps) | (ratio > 1.0 + config.clip_eps_high)
    metrics["policy/clip_fraction"] = preference.masked_mean(outside, mask)
    metrics["loss/policy"] = normalised(policy_loss, batch, config)
    if config.kl_placement == "reward":
        return metrics["loss/policy"], metrics
    kl = preference.token_kl(log_prob, reference, config.kl_estimator)
    kl_loss = normalised(ratio * kl if config.kl_times_ratio else kl, batch, config)
    return metrics["loss/policy"] + config.beta * kl_loss, {**metrics, "loss/kl": kl_loss}


def loss(params: Any, batch: Batch, config: Config, given: Given) -> tuple[jax.Array, Metrics]:
    """Negative of the objective on one minibatch -> scalar, metrics."""
    task, policy = finetune.task_of(config, given), policy_of(params, config, given)
    prompt_ids, ids = batch.prompt_ids, batch.completion_ids
    log_prob = measure.token_log_probs(policy, prompt_ids, ids, task, config.temperature)
    return objective(log_prob, batch, config)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One iteration: B completions, then epochs of minibatch gradient steps on them."""
    key_rollout, key_shuffle = random.split(key)
    batch, metrics = rollout(key_rollout, state, config, given)
    optimizer = make_optimizer(config, state.num_updates)

    def gradient_step(carry: Any, indices: jax.Array) -> Any:
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[indices], batch)
        gradient, metrics = jax.grad(loss, has_aux=True)(params, minibatch, config, given)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), opt_state), metrics

    (params, opt_state), steps = lax.scan(
        gradient_step, (state.params, state.opt_state), shuffled(key_shuffle, config)
    )
    past = state.past
    if config.staleness:
        past = jax.tree.map(lambda x, new: jnp.concatenate([x[1:], new[None]]), past, state.params)
    state = TrainState(params, past, opt_state, state.num_updates + 1)
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
