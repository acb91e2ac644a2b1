"""Advantage actor-critic (A2C) for discrete and continuous actions.

Maximises, by one gradient step on the data of the current policy,

    L(θ) = E[ A log π(a|s) ] - c_v E[ ½ (V - G)² ] + c_e E[ H(π) ]

where A is the generalised advantage estimate (with gae_lambda = 1, the longest available return
minus the value) and G = A + V its value target; both are data.

Mnih et al. 2016, arXiv:1602.01783. The paper's A3C runs one such learner per thread. Each has a
copy of the parameters that it refreshes now and then, and all write into one shared set without
locks, so gradients are stale and a run cannot be repeated. Acting in lockstep and averaging over
all environments gives the same estimator without either fault, and fills an accelerator. This file
does that, hence A2C. RMSprop has the paper's decay 0.99 and its ε under the root.

Differs from the paper:
1. A time limit is not a terminal state: the value of the observation before the reset is
   bootstrapped. Treating it as terminal biases every value near the limit.
2. Actor and critic are separate networks; the paper's share all but the last layer on Atari.
3. The average of squared gradients starts at 1, as TensorFlow's did, so the first steps are small.
4. The statistics of the normalisers change once per update, after the rollout. Those of the
   observations start from one rollout of the untrained policy, not counted in total_timesteps.

Run: purejaxpg train a2c --env CartPole-v1 --seed 0
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
from purejaxpg import envs, fused, networks, normalize, schedules
from purejaxpg.kernels import distributions, losses, returns

Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    env: str = "CartPole-v1"  # environment; `purejaxpg list` shows them
    env_kwargs: tuple[tuple[str, Any], ...] = ()  # arguments of the environment's constructor
    total_timesteps: int = 500_000  # environment steps, rounded down to whole updates
    num_envs: int = 16  # N, parallel environments
    num_steps: int = 5  # T, steps of each environment per update
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

    learning_rate: float = 1e-2  # step size of RMSprop
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    gae_lambda: float = 1.0  # 0: one-step TD, 1: the longest return in the rollout
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # bound on the global gradient norm; inf: off
    clip_obs: float = 10.0  # bound on a normalised observation
    reward_scale: float = 1.0  # factor on the reward, after any normalisation
    clip_reward: float = float("inf")  # bound on the scaled reward; inf: off
    initial_log_std: float = 0.0  # of the policy's noise, for continuous actions
    env_params: dict[str, float] = dataclasses.field(default_factory=dict)  # e.g. gravity

    @property
    def steps_per_update(self) -> int:
        """Environment steps, and samples, of one update."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates in a whole run."""
        return self.total_timesteps // self.steps_per_update


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    networks.check(config, envs.check(config).obs_shape)
    configs.in_range(config)
    fused.check(config)
    configs.check_rollout(config)
    schedules.check(config)


@struct.dataclass
class Transition:
    """One step of each environment."""

    obs: jax.Array  # [T, N, D] raw
    action: jax.Array  # [T, N] int32 or [T, N, A], not clipped to the bounds
    reward: jax.Array  # [T, N] raw
    terminated: jax.Array  # [T, N] bool
    done: jax.Array  # [T, N] bool, terminated or truncated
    next_obs: jax.Array  # [T, N, D] raw, before any reset


@struct.dataclass
class Batch:
    """The part of a transition that the loss needs."""

    obs: jax.Array  # [B, D] normalised
    action: jax.Array  # [B] or [B, A]
    advantage: jax.Array  # [B]
    target: jax.Array  # [B]


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # {"actor", "critic"}
    opt_state: Any
    env_state: envs.EnvState
    obs: jax.Array  # [N, D] raw, to act on next
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


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    rate = schedules.scheduled(config, config.learning_rate, num_updates)
    rmsprop = optax.rmsprop(rate, decay=0.99, eps=1e-5, initial_scale=1.0, eps_in_sqrt=True)
    return optax.flatten(optax.chain(clip, rmsprop))  # one vector compiles and runs faster


def init(key: jax.Array, config: Config) -> TrainState:
    key_env, key_actor, key_critic, key_moments = random.split(key, 4)
    env, env_params = envs.setup(config)
    obs, env_state = envs.reset(key_env, env, env_params, config.num_envs)
    params = {
        "actor": Actor(config).init(key_actor, obs),
        "critic": Critic(config).init(key_critic, obs),
    }
    state = TrainState(
        params=params,
        opt_state=make_optimizer(config).init(params),
        env_state=env_state,
        obs=obs,
        normalizers=normalize.init_both(obs),
        num_updates=jnp.zeros((), jnp.int32),
    )
    if config.normalize_obs:
        _, seen, _ = rollout(key_moments, state, config)
        normalizers = normalize.observed(config, state.normalizers, seen.obs)
        state = dataclasses.replace(state, normalizers=normalizers)
    return state


def rollout(
    key: jax.Array, state: TrainState, config: Config
) -> tuple[TrainState, Transition, Metrics]:
    """Act for T steps -> state, Transition [T, N], metrics of the ended episodes."""
    env, env_params = envs.setup(config)

    def step(carry: Any, key: jax.Array) -> Any:
        obs, env_state = carry
        key_action, key_env = random.split(key)
        seen = normalize.observations(config, state.normalizers, obs)
        policy = Actor(config).apply(state.params["actor"], seen)
        action = policy.sample(seed=key_action)
        following, env_state, now = envs.step(key_env, env, env_state, action, env_params)
        transition = Transition(obs, action, now.reward, now.terminated, now.done, now.next_obs)
        return (following, env_state), (transition, envs.episode_metrics(now))

    keys = random.split(key, config.num_steps)
    carry = (state.obs, state.env_state)
    (obs, env_state), (transition, episodes) = fused.scan(step, carry, keys, config)
    metrics = {name: value.sum() for name, value in episodes.items()}
    return dataclasses.replace(state, obs=obs, env_state=env_state), transition, metrics


def advantages(
    state: TrainState, transition: Transition, config: Config
) -> tuple[TrainState, Batch]:
    """Turn [T, N] transitions into a flat batch [T*N], and update the normalisers with them."""
    obs = normalize.observations(config, state.normalizers, transition.obs)
    next_obs = normalize.observations(config, state.normalizers, transition.next_obs)
    terminated, done = transition.terminated, transition.done
    critic, params = Critic(config), state.params["critic"]
    value, next_value = networks.values(critic, params, obs, next_obs, terminated, done, config)
    normalizers, reward = normalize.rewards(config, state.normalizers, transition.reward, done)
    normalizers = normalize.observed(config, normalizers, transition.obs)
    advantage = returns.gae(
        reward, value, next_value, terminated, done, config.gamma, config.gae_lambda
    )
    target = advantage + value
    if config.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    batch = Batch(obs, transition.action, advantage, target)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    return dataclasses.replace(state, normalizers=normalizers), batch


def loss(params: Any, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """Negative of the objective -> scalar, metrics."""
    policy = Actor(config).apply(params["actor"], batch.obs)
    value = Critic(config).apply(params["critic"], batch.obs)
    policy_loss = losses.score_function(policy.log_prob(batch.action), batch.advantage).mean()
    value_loss = losses.value_loss(value, batch.target).mean()
    entropy = policy.entropy().mean()
    metrics = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "policy/entropy": entropy,
    }
    return policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy, metrics


def update(key: jax.Array, state: TrainState, config: Config) -> tuple[TrainState, Metrics]:
    """One iteration: T*N environment steps, then one gradient step on them."""
    state, transition, episodes = rollout(key, state, config)
    state, batch = advantages(state, transition, config)
    gradient, metrics = jax.grad(loss, has_aux=True)(state.params, batch, config)
    optimizer = make_optimizer(config, state.num_updates)
    change, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    state = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, change),
        opt_state=opt_state,
        num_updates=state.num_updates + 1,
    )
    return state, {**episodes, **metrics}


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
