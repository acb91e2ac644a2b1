"""REINFORCE for discrete and continuous actions, with an optional learned baseline.

Follows the gradient of the expected return, estimated from N whole episodes,

    g = 1/N Σ_episodes Σ_t (G_t - b(s_t)) ∇log π(a_t|s_t),      G_t = Σ_k γ^k r_{t+k}

b is a critic, fitted to the reward-to-go G_t by num_critic_steps steps of Adam after the policy's
step: a baseline fitted to the returns it is subtracted from would bias the gradient. Without a
baseline, b = 0. With reward_to_go off, every action is weighted by the return of its whole episode,
G_0: unbiased for the discounted return, with more variance than reward-to-go with the factor below.

Each update starts N fresh episodes and plays each to its end. Later steps of an environment are
masked, so every start counts once. A batch of the episodes that end within a fixed number of steps
would hold more short ones than the policy plays.

Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning".

Differs from the paper, or makes a choice:
1. Reward-to-go omits a factor γ^t, as is common practice. The sum is then not the gradient of the
   discounted return from the start, nor of any other function (Nota and Thomas 2020,
   arXiv:1906.07073), and late steps are as important as early ones. With weight_by_discount the
   factor is included: the estimate is unbiased, up to point 2, and late steps hardly learn.
2. A time limit is not a terminal state: the baseline's value of the observation before the reset
   replaces the missing rewards. Without a baseline, the return ends there.
3. One step of Adam, not of plain ascent. With normalize_advantage the estimate is biased.
4. The steps after an episode's end count in total_timesteps, because they are computed.
5. The statistics of the normalisers change once per update, after the rollout and without the
   masked steps. Those of the observations start from one rollout of the untrained policy, not
   counted in total_timesteps.

Run: purejaxpg train reinforce --env CartPole-v1 --seed 0
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import lax, random

from purejaxpg import config as configs
from purejaxpg import envs, fused, networks, normalize, optimizers, schedules
from purejaxpg.kernels import distributions, losses, returns

Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    env: str = "CartPole-v1"  # environment; `purejaxpg list` shows them
    env_kwargs: tuple[tuple[str, Any], ...] = ()  # arguments of the environment's constructor
    total_timesteps: int = 2_000_000  # environment steps, rounded down to whole updates
    num_envs: int = 16  # N, episodes per update, in parallel
    max_steps: int = 0  # T, room for an episode; 0: the environment's own time limit
    baseline: bool = True  # subtract a learned value from the return
    reward_to_go: bool = True  # else weight each action by the return of its whole episode
    weight_by_discount: bool = False  # by γ^t, as the gradient of the discounted return has it
    num_critic_steps: int = 20  # gradient steps of the baseline per update
    torso: str = "mlp"  # "mlp", or "cnn" for images
    hidden: tuple[int, ...] = (64, 64)  # widths of the fully connected layers
    activation: str = "tanh"  # tanh, relu, elu, silu or gelu
    orthogonal_init: bool = True  # else LeCun's normal initialisation
    fused: str = "auto"  # kernels on a GPU where there are some; or "require" or "off"
    precision: str = "fast"  # of those kernels; or "float32"
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    normalize_advantage: bool = False  # to mean 0, variance 1 within the update
    normalize_obs: bool = False  # by running mean and standard deviation
    normalize_reward: bool = False  # by the standard deviation of the discounted return

    learning_rate: float = 5e-3  # step size of Adam
    critic_learning_rate: float = 5e-3  # the same for the baseline
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = float("inf")  # bound on the norm of either gradient; inf: off
    clip_obs: float = 10.0  # bound on a normalised observation
    reward_scale: float = 1.0  # factor on the reward, after any normalisation
    clip_reward: float = float("inf")  # bound on the scaled reward; inf: off
    initial_log_std: float = 0.0  # of the policy's noise, for continuous actions
    env_params: dict[str, float] = dataclasses.field(default_factory=dict)  # e.g. gravity

    @property
    def horizon(self) -> int:
        """Steps of each environment in an update."""
        return self.max_steps or envs.from_config(self).max_steps or 0

    @property
    def steps_per_update(self) -> int:
        """Environment steps of one update, including those after the end of an episode."""
        return self.num_envs * self.horizon

    @property
    def num_updates(self) -> int:
        """Updates in a whole run."""
        return self.total_timesteps // self.steps_per_update


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    env = envs.check(config)
    networks.check(config, env.obs_shape)
    configs.at_least(config, 0, "max_steps")
    limit = envs.horizon(env, config.env_params) or 0
    configs.require(
        limit > 0,
        f"REINFORCE plays whole episodes, but those of {env.name} have no time limit; "
        f"give them one, as in envs.register({env.name!r}, ..., max_steps=1000).",
    )
    configs.at_least(config, 1 if config.baseline else 0, "num_critic_steps")
    configs.in_range(config)
    fused.check(config)
    configs.check_rollout(config)
    schedules.check(config)
    configs.require(
        config.horizon >= limit,
        f"max_steps must leave room for an episode, {limit} steps in {env.name}, but is "
        f"{config.horizon}; a lower env_params.max_steps_in_episode makes episodes shorter.",
    )
    configs.require(
        config.reward_to_go or not config.weight_by_discount,
        "weight_by_discount needs reward_to_go: the return of a whole episode takes no factor.",
    )


@struct.dataclass
class Transition:
    """One step of each environment."""

    obs: jax.Array  # [T, N, D] raw
    action: jax.Array  # [T, N] int32 or [T, N, A], not clipped to the bounds
    reward: jax.Array  # [T, N] raw
    terminated: jax.Array  # [T, N] bool
    done: jax.Array  # [T, N] bool, terminated or truncated
    next_obs: jax.Array  # [T, N, D] raw, before any reset
    valid: jax.Array  # [T, N] bool, up to and with the end of the first episode


@struct.dataclass
class Batch:
    """The part of a transition that the losses need."""

    obs: jax.Array  # [T, N, D] normalised
    action: jax.Array  # [T, N] or [T, N, A]
    advantage: jax.Array  # [T, N]
    target: jax.Array  # [T, N]
    valid: jax.Array  # [T, N]


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # {"actor", "critic"}
    opt_state: Any  # {"actor", "critic"}
    normalizers: normalize.Normalizers
    num_updates: jax.Array  # [] int32, finished


class Actor(nn.Module):
    """Torso and policy head: [..., D] -> distrax distribution over actions."""

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array) -> Any:
        config, env = self.config, envs.from_config(self.config)
        x = networks.torso(config, env.obs_shape)(obs)
        output = nn.Dense(env.action_size, kernel_init=networks.initializer(config, 0.01))(x)
        if env.discrete:
            return distributions.categorical(output)
        initial = nn.initializers.constant(config.initial_log_std)
        log_std = self.param("log_std", initial, (env.action_size,))
        return distributions.diag_gaussian(output, log_std)


class Critic(nn.Module):
    """Torso and value head: [..., D] -> [...]."""

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        x = networks.torso(self.config, envs.from_config(self.config).obs_shape)(obs)
        return nn.Dense(1, kernel_init=networks.initializer(self.config, 1.0))(x).squeeze(-1)


def make_optimizers(
    config: Config, num_updates: Any = 0
) -> dict[str, optax.GradientTransformation]:
    def make(learning_rate: jax.Array | float) -> optax.GradientTransformation:
        rate = schedules.scheduled(config, learning_rate, num_updates)
        return optimizers.clipped_adam(rate, config.max_grad_norm, eps=1e-5)

    return {"actor": make(config.learning_rate), "critic": make(config.critic_learning_rate)}


def init(key: jax.Array, config: Config) -> TrainState:
    key_actor, key_critic, key_moments = random.split(key, 3)
    obs = jnp.zeros((config.num_envs, envs.from_config(config).obs_size))
    params = {
        "actor": Actor(config).init(key_actor, obs),
        "critic": Critic(config).init(key_critic, obs),
    }
    optimizer = make_optimizers(config)
    state = TrainState(
        params=params,
        opt_state={name: optimizer[name].init(params[name]) for name in params},
        normalizers=normalize.init_both(obs),
        num_updates=jnp.zeros((), jnp.int32),
    )
    if config.normalize_obs:
        seen, _ = rollout(key_moments, state, config)
        normalizers = normalize.observed(config, state.normalizers, seen.obs, seen.valid)
        state = dataclasses.replace(state, normalizers=normalizers)
    return state


def rollout(key: jax.Array, state: TrainState, config: Config) -> tuple[Transition, Metrics]:
    """Play one episode per environment -> Transition [T, N], metrics of these episodes."""
    env, env_params = envs.setup(config)
    key_reset, key_steps = random.split(key)

    def step(carry: Any, key: jax.Array) -> Any:
        obs, env_state, valid = carry
        key_action, key_env = random.split(key)
        seen = normalize.observations(config, state.normalizers, obs)
        policy = Actor(config).apply(state.params["actor"], seen)
        action = policy.sample(seed=key_action)
        following, env_state, now = envs.step(key_env, env, env_state, action, env_params)
        transition = Transition(
            obs, action, now.reward, now.terminated, now.done, now.next_obs, valid
        )
        metrics = envs.episode_metrics(now, where=valid)
        return (following, env_state, valid & ~now.done), (transition, metrics)

    obs, env_state = envs.reset(key_reset, env, env_params, config.num_envs)
    carry = (obs, env_state, jnp.ones(config.num_envs, bool))
    _, (transition, episodes) = fused.scan(
        step, carry, random.split(key_steps, config.horizon), config
    )
    return transition, {name: value.sum() for name, value in episodes.items()}


def advantages(
    state: TrainState, transition: Transition, config: Config
) -> tuple[TrainState, Batch]:
    """Weight the actions of the rollout, and update the normalisers with it."""
    obs = normalize.observations(config, state.normalizers, transition.obs)
    next_obs = normalize.observations(config, state.normalizers, transition.next_obs)
    terminated, done, valid = transition.terminated, transition.done, transition.valid
    value = next_value = jnp.zeros(done.shape)
    if config.baseline:
        critic, params = Critic(config), state.params["critic"]
        value, next_value = networks.values(critic, params, obs, next_obs, terminated, done, config)
    normalizers = normalize.restarted(state.normalizers)
    normalizers, reward = normalize.rewards(config, normalizers, transition.reward, done, valid)
    normalizers = normalize.observed(config, normalizers, transition.obs, valid)
    advantage = returns.gae(reward, value, next_value, terminated, done, config.gamma, 1.0)
    target = advantage + value
    if not config.reward_to_go:
        advantage = target[0] - value
    if config.normalize_advantage:
        mean, std = (f(advantage, where=valid) for f in (jnp.mean, jnp.std))
        advantage = (advantage - mean) / (std + 1e-8)
    if config.weight_by_discount:
        advantage *= config.gamma ** jnp.arange(config.horizon)[:, None]
    batch = Batch(obs, transition.action, advantage, target, valid)
    return dataclasses.replace(state, normalizers=normalizers), batch


def policy_loss(actor: Any, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """Negative of the objective whose gradient is g, entropy bonus included -> scalar, metrics."""
    policy = Actor(config).apply(actor, batch.obs)

    def episode_mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=0, where=batch.valid).mean()

    loss = episode_mean(losses.score_function(policy.log_prob(batch.action), batch.advantage))
    bonus = config.ent_coef * episode_mean(policy.entropy())
    entropy = policy.entropy().mean(where=batch.valid)
    return loss - bonus, {"loss/policy": loss, "policy/entropy": entropy}


def value_loss(critic: Any, batch: Batch, config: Config) -> jax.Array:
    """Squared error of the baseline -> scalar."""
    value = Critic(config).apply(critic, batch.obs)
    return losses.value_loss(value, batch.target).mean(where=batch.valid)


def fit_baseline(state: TrainState, batch: Batch, config: Config) -> tuple[Any, Any, Metrics]:
    """Take gradient steps on all data -> parameters, state of the optimiser, metrics."""
    optimizer = make_optimizers(config, state.num_updates)["critic"]

    def gradient_step(carry: Any, _: None) -> Any:
        critic, opt_state = carry
        loss, gradient = jax.value_and_grad(value_loss)(critic, batch, config)
        change, opt_state = optimizer.update(gradient, opt_state, critic)
        return (optax.apply_updates(critic, change), opt_state), loss

    carry = (state.params["critic"], state.opt_state["critic"])
    (critic, opt_state), steps = lax.scan(gradient_step, carry, length=config.num_critic_steps)
    return critic, opt_state, {"loss/value": steps.mean()}


def update(key: jax.Array, state: TrainState, config: Config) -> tuple[TrainState, Metrics]:
    """One iteration: N episodes, one gradient step of the policy, then the baseline is fitted."""
    transition, metrics = rollout(key, state, config)
    state, batch = advantages(state, transition, config)
    params, opt_state = dict(state.params), dict(state.opt_state)
    optimizer = make_optimizers(config, state.num_updates)["actor"]
    gradient, policy_metrics = jax.grad(policy_loss, has_aux=True)(params["actor"], batch, config)
    change, opt_state["actor"] = optimizer.update(gradient, opt_state["actor"], params["actor"])
    params["actor"] = optax.apply_updates(params["actor"], change)
    metrics |= policy_metrics
    if config.baseline:
        params["critic"], opt_state["critic"], value_metrics = fit_baseline(state, batch, config)
        metrics |= value_metrics
    state = dataclasses.replace(
        state, params=params, opt_state=opt_state, num_updates=state.num_updates + 1
    )
    return state, metrics


def train(key: jax.Array, config: Config) -> tuple[TrainState, Metrics]:
    """A whole run from one key -> final state, metrics [num_updates]."""
    state = init(random.fold_in(key, 0), config)

    def step(state: TrainState, u: jax.Array) -> tuple[TrainState, Metrics]:
        return update(random.fold_in(key, u), state, config)

    return lax.scan(step, state, jnp.arange(1, config.num_updates + 1))


def policy(
    key: jax.Array, state: TrainState, obs: jax.Array, config: Config, greedy: bool = False
) -> jax.Array:
    """Actions [N] or [N, A] for raw observations [N, D]."""
    seen = normalize.observations(config, state.normalizers, obs)
    distribution = Actor(config).apply(state.params["actor"], seen)
    return distribution.mode() if greedy else distribution.sample(seed=key)


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
