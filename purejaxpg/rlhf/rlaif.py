"""Direct reinforcement learning from AI feedback: the reward is a judge's own opinion.

A judge reads a prompt, a completion of the policy and one of the reference, and says which is
better. With its log-odds ℓ, averaged over both orders (`comparison.py`), `reward` is

    log_odds      r = ℓ(x, y, y')
    probability   r = σ(ℓ(x, y, y'))

where y', the opponent, is one completion of each prompt by the reference. The rest is RLOO: the
return is r(x, y) − β (log π(y | x) − log π_ref(y | x)), and the baseline of each of the G
completions of a prompt is the mean of the others.

It maximises E[r] − β KL(π ‖ π_ref). If the judge's log-odds are the difference of the gold rewards,
"log_odds" has exactly the gradient of RLOO on the gold reward, as the baseline takes off whatever
depends on prompt and opponent alone. "probability" has another optimum, proportional to
π_ref exp(p / β) for the probability p of beating the reference; it is the one of IPO, and bounds
what a single completion can gain.

With `orders = 1`, the judge is asked only with the policy's completion first. A position bias that
adds a constant to the log-odds then changes "probability", but not "log_odds".

Lee et al. 2023, arXiv:2309.00267, "Direct RLAIF". Differs from it: their judge rates one completion
on a scale from 1 to 10, whose expectation is the reward; this one compares two.

Run: purejaxpg train rlhf.rlaif --given reference=results/sft --given judge=results/judge
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
from purejaxpg.rlhf import comparison, measure, tasks, tokens, transformer

UNIT = "tokens"
Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    task: str = "sentiment"  # prompts and the gold reward
    num_updates: int = 300
    batch_size: int = 64  # B, completions per update
    group_size: int = 8  # G, completions of each prompt; must divide batch_size
    reward: str = "log_odds"  # or "probability", of beating a completion of the reference
    orders: int = 2  # in which the judge is asked; 1: the policy's completion comes first
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"

    beta: float = 0.1  # β, price of a nat of divergence from the reference
    missing_eos_penalty: float = 0.0  # taken from the score of a completion without an end
    temperature: float = 1.0  # of sampling, and of all log-probabilities
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
    """The model to start from and to stay close to, and the judge."""

    reference: transformer.Model
    judge: transformer.Model


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
    configs.at_least(config, 1, "num_updates")
    configs.one_of(config, "reward", ("log_odds", "probability"))
    configs.between(config, 1, 2, "orders")
    configs.at_least(config, 2, "group_size")
    configs.divides(config, "group_size", config.batch_size, "batch_size")
    schedules.check(config)


def check_given(config: Config, given: Given) -> None:
    """Raise an InputError unless the given models fit the task."""
    measure.check_given(config, given)
    comparison.check_judge(config, given.judge)


def policy_of(params: Any, given: Given) -> transformer.Model:
    return transformer.Model(params, given.reference.architecture)


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    adam = optax.adam(schedules.scheduled(config, config.learning_rate, num_updates))
    return optimizers.flattened(optax.chain(clip, adam))


def init(key: jax.Array, config: Config, given: Given) -> TrainState:
    params = given.reference.params
    return TrainState(params, make_optimizer(config).init(params), jnp.zeros((), jnp.int32))


def judge(
    prompt_ids: jax.Array, ids: jax.Array, opponent_ids: jax.Array, config: Config, given: Given
) -> tuple[jax.Array, jax.Array]:
    """Compare completions [B, L] with others -> rewards [B], position bias [B]."""
    task = tasks.make(config.task)
    asked = comparison.ask_twice(given.judge, prompt_ids, ids, opponent_ids, task)
    log_odds = asked[0] if config.orders == 1 else 0.5 * (asked[0] + asked[1])
    reward = log_odds if config.reward == "log_odds" else nn.sigmoid(log_odds)
    return reward, comparison.position_bias(*asked)


def rollout(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[Batch, Metrics]:
    """Complete B/G prompts G times each, and ask the judge -> Batch, metrics."""
    task, temperature = tasks.make(config.task), config.temperature
    key_prompt, key_completion, key_opponent = random.split(key, 3)
    distinct = task.prompts(key_prompt, config.batch_size // config.group_size)
    opponent = measure.sample(key_opponent, given.reference, distinct, task, temperature)
    prompt_ids = jnp.repeat(distinct, config.group_size, axis=0)
    opponent_ids = jnp.repeat(opponent.ids, config.group_size, axis=0)
    policy = policy_of(state.params, given)
    completion = measure.sample(key_completion, policy, prompt_ids, task, temperature)
    ids, mask = completion.ids, completion.mask
    reference = measure.token_log_probs(given.reference, prompt_ids, ids, task, temperature)
    kl = preference.masked_sum(completion.log_prob - reference, mask, 1)
    finished = tokens.finished(ids, task.eos_id)
    score, position_bias = judge(prompt_ids, ids, opponent_ids, config, given)
    penalised = score - jnp.where(finished, 0.0, config.missing_eos_penalty)
    metrics = {
        "reward/score": score.mean(),
        "reward/gold": task.reward(prompt_ids, ids, mask).mean(),
        "judge/position_bias": position_bias.mean(),
        "policy/reference_kl": kl.mean(),
        "completion/length": mask.sum(1).mean(),
        "completion/finished": finished.mean(),
    }
    return Batch(prompt_ids, ids, mask, advantages(penalised - config.beta * kl, config)), metrics


def advantages(total: jax.Array, config: Config) -> jax.Array:
    """Returns [B] of completions, group by group -> advantages [B]."""
    return preference.leave_one_out(total.reshape(-1, config.group_size)).ravel()


def objective(log_prob: jax.Array, batch: Batch) -> jax.Array:
    """The loss of new log-probabilities [B, L] of the tokens -> scalar."""
    completions = preference.masked_sum(log_prob, batch.mask, 1)
    return losses.score_function(completions, batch.advantage).mean()


def loss(params: Any, batch: Batch, config: Config, given: Given) -> jax.Array:
    """Negative of the objective, of which only the gradient has a meaning -> scalar."""
    task, policy = tasks.make(config.task), policy_of(params, given)
    prompt_ids, ids = batch.prompt_ids, batch.completion_ids
    log_prob = measure.token_log_probs(policy, prompt_ids, ids, task, config.temperature)
    return objective(log_prob, batch)


def update(
    key: jax.Array, state: TrainState, config: Config, given: Given
) -> tuple[TrainState, Metrics]:
    """One iteration: B judged completions, then one gradient step on them."""
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
    return measure.score(key, policy_of(state.params, given), config, num_episodes, given)


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
