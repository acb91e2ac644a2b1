"""Proximal policy optimisation (PPO) for discrete and continuous actions.

Maximises, over the data of the previous policy and for several epochs,

    L(θ) = E[ min(r A, clip(r, 1-ε, 1+ε) A) ] - c_v E[ ½ (V - G)² ] + c_e E[ H(π) ],   r = π / π_old

where A is the generalised advantage estimate and G = A + V_old its value target. With surrogate
"kl_penalty" the first term is E[ r A - β KL(π_old ‖ π) ]. After each update, β is doubled if the
divergence exceeds 1.5 target_kl, and halved if it is below target_kl / 1.5.

Schulman et al. 2017, arXiv:1707.06347, eq. 7 to 9. The details follow Huang et al. 2022, "The 37
implementation details of PPO". Of the 13 core details: vectorised environments, orthogonal
initialisation (√2; 0.01 policy; 1 value), Adam with ε = 1e-5, linear annealing, GAE with a
bootstrap, shuffled minibatches that cover all data, advantages normalised per minibatch, the
clipped surrogate, value clipping (off by default: vf_clip_eps = inf), one joint loss, clipping of
the global gradient norm, and debug metrics are all here. Of shared and separate networks, only
separate ones are. Of the 9 for continuous control: normal policy, state-independent log std, summed
independent dimensions, separate networks, actions clipped for the environment but stored
unclipped, observations and rewards normalised and clipped (off by default).

Differs from both:
1. A time limit is not a terminal state: the value of the observation before the reset is
   bootstrapped. Treating it as terminal biases every value near the limit.
2. The statistics of the normalisers change once per update, after the rollout, so collection and
   optimisation see the same inputs; the common wrapper changes them at every step. Those of the
   observations start from one rollout of the untrained policy, not counted in total_timesteps.
3. Values are computed after the rollout in one batched pass, not inside it.
4. The standard deviation of the advantages is that of the population (divided by n).
5. With max_kl, the update stops at the first minibatch whose estimated KL exceeds it: that one and
   all later ones change nothing.

Run: purejaxpg train ppo --env CartPole-v1 --seed 0
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
from purejaxpg import envs, fused, networks, normalize, optimizers, prng, schedules
from purejaxpg.kernels import distributions, losses, returns

Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    env: str = "CartPole-v1"  # environment; `purejaxpg list` shows them
    env_kwargs: tuple[tuple[str, Any], ...] = ()  # arguments of the environment's constructor
    total_timesteps: int = 500_000  # environment steps, rounded down to whole updates
    num_envs: int = 4  # N, parallel environments
    num_steps: int = 128  # T, steps of each environment per update
    num_epochs: int = 4  # passes over the data of an update
    num_minibatches: int = 4  # gradient steps per pass; must divide N*T
    surrogate: str = "clip"  # "clip", or "kl_penalty" with an adaptive coefficient
    torso: str = "mlp"  # "mlp", or "cnn" for images
    hidden: tuple[int, ...] = (64, 64)  # widths of the fully connected layers
    activation: str = "tanh"  # tanh, relu, elu, silu or gelu
    orthogonal_init: bool = True  # else LeCun's normal initialisation
    fused: str = "auto"  # kernels on a GPU where there are some; or "require" or "off"
    precision: str = "fast"  # of those kernels; or "float32"
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    normalize_advantage: bool = True  # to mean 0, variance 1 within each minibatch
    normalize_obs: bool = False  # by running mean and standard deviation
    normalize_reward: bool = False  # by the standard deviation of the discounted return

    learning_rate: float = 3e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    gae_lambda: float = 0.95  # 0: one-step TD, 1: the longest return in the rollout
    clip_eps: float = 0.2  # a ratio beyond 1 ± this gains nothing more
    vf_clip_eps: float = float("inf")  # the same for the change of a value
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # bound on the global gradient norm; inf: off
    max_kl: float = float("inf")  # estimated KL that ends an update early; inf: off
    kl_coef: float = 1.0  # β of the first update, for kl_penalty
    target_kl: float = 0.01  # divergence per update that kl_penalty steers towards
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
    configs.one_of(config, "surrogate", ("clip", "kl_penalty"))


@struct.dataclass
class Transition:
    """One step of each environment."""

    obs: jax.Array  # [T, N, D] raw
    action: jax.Array  # [T, N] int32 or [T, N, A], not clipped to the bounds
    log_prob: jax.Array  # [T, N] under the policy that acted
    reward: jax.Array  # [T, N] raw
    terminated: jax.Array  # [T, N] bool
    done: jax.Array  # [T, N] bool, terminated or truncated
    next_obs: jax.Array  # [T, N, D] raw, before any reset


@struct.dataclass
class Batch:
    """The part of a transition that the loss needs."""

    obs: jax.Array  # [B, D] normalised
    action: jax.Array  # [B] or [B, A]
    log_prob: jax.Array  # [B] old
    value: jax.Array  # [B] old
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
    kl_coef: jax.Array  # [] β
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
    rate = schedules.scheduled(config, config.learning_rate, num_updates)
    return optimizers.clipped_adam(rate, config.max_grad_norm, eps=1e-5)


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
        kl_coef=jnp.asarray(config.kl_coef, jnp.float32),
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
        transition = Transition(
            obs, action, policy.log_prob(action), now.reward, now.terminated, now.done, now.next_obs
        )
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
    value, next_value = networks.values(
        critic, params, obs, next_obs, terminated, done, config, config.num_minibatches
    )
    normalizers, reward = normalize.rewards(config, state.normalizers, transition.reward, done)
    normalizers = normalize.observed(config, normalizers, transition.obs)
    advantage = returns.gae(
        reward, value, next_value, terminated, done, config.gamma, config.gae_lambda
    )
    target = advantage + value
    batch = Batch(obs, transition.action, transition.log_prob, value, advantage, target)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    return dataclasses.replace(state, normalizers=normalizers), batch


def loss(params: Any, batch: Batch, old: TrainState, config: Config) -> tuple[jax.Array, Metrics]:
    """Negative of the objective on one minibatch of the data of `old` -> scalar, metrics."""
    policy = Actor(config).apply(params["actor"], batch.obs)
    value = Critic(config).apply(params["critic"], batch.obs)
    log_prob = policy.log_prob(batch.action)
    advantage = batch.advantage
    if config.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    if config.surrogate == "clip":
        surrogate = losses.ppo_clip(log_prob, batch.log_prob, advantage, config.clip_eps)
    else:
        kl = Actor(config).apply(old.params["actor"], batch.obs).kl_divergence(policy)
        surrogate = losses.ppo_kl_penalty(log_prob, batch.log_prob, advantage, kl, old.kl_coef)
    policy_loss = surrogate.mean()
    errors = losses.value_loss_clipped(value, batch.value, batch.target, config.vf_clip_eps)
    value_loss = errors.mean()
    entropy = policy.entropy().mean()
    metrics = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "policy/entropy": entropy,
        "policy/kl": losses.approximate_kl(log_prob, batch.log_prob).mean(),
        "policy/kl_coef": old.kl_coef,
        "policy/clip_fraction": losses.is_clipped(log_prob, batch.log_prob, config.clip_eps).mean(),
    }
    return policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy, metrics


def update(key: jax.Array, state: TrainState, config: Config) -> tuple[TrainState, Metrics]:
    """One iteration: T*N environment steps, then epochs of minibatch gradient steps on them."""
    key_rollout, key_shuffle = random.split(key)
    state, transition, episodes = rollout(key_rollout, state, config)
    state, batch = advantages(state, transition, config)
    params, opt_state, metrics = fused.fit(
        lambda params, minibatch: loss(params, minibatch, state, config),
        make_optimizer(config, state.num_updates),
        state.params,
        state.opt_state,
        batch,
        shuffled(key_shuffle, config),
        config,
        stop=lambda metrics: metrics["policy/kl"] > config.max_kl,
    )
    state = dataclasses.replace(
        state,
        params=params,
        opt_state=opt_state,
        kl_coef=adapted_kl_coef(state, params, batch, config),
        num_updates=state.num_updates + 1,
    )
    return state, {**episodes, **metrics}


def adapted_kl_coef(old: TrainState, params: Any, batch: Batch, config: Config) -> jax.Array:
    """β for the next update, after one that led from `old` to `params`."""
    if config.surrogate == "clip":
        return old.kl_coef
    before, after = (Actor(config).apply(p["actor"], batch.obs) for p in (old.params, params))
    ratio = before.kl_divergence(after).mean() / config.target_kl
    factor = jnp.where(ratio > 1.5, 2.0, jnp.where(ratio < 1.0 / 1.5, 0.5, 1.0))
    return jnp.clip(old.kl_coef * factor, 1e-6, 1e6)  # zero, doubled, would stay zero


def shuffled(key: jax.Array, config: Config) -> jax.Array:
    """Indices into the batch, a fresh permutation per epoch -> [epochs * minibatches, B]."""
    keys = random.split(key, config.num_epochs)
    order = jax.vmap(lambda key: prng.permutation(key, config.steps_per_update))(keys)
    return order.reshape(config.num_epochs * config.num_minibatches, -1)


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
