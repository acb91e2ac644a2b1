"""Proximal policy optimisation (PPO) with a memory: a gated recurrent unit (GRU) in each network.

The objective is the clipped one of ppo.py. Policy and value see what an episode has shown so far:

    h_t = GRU(torso(o_t), h_{t-1}),   π(a | h_t),   V(h_t),   h = 0 where an episode starts

A gradient passes through all T steps of a rollout and stops at a reset. A minibatch consists of
whole sequences: those of num_envs / num_minibatches environments.

Schulman et al. 2017, arXiv:1707.06347; `networks.GRU` has the equations of the GRU. The details of
Huang et al. 2022, "The 37 implementation details of PPO", are those that ppo.py lists. Of the five
for an LSTM, orthogonal weights and zero biases, a memory of zeros at the start, resets inside a
sequence and minibatches of whole environments are here; a shared network is not.

Differs from them:
1. A time limit is not a terminal state. The value of the observation before the reset is
   bootstrapped, from the memory as it was before that reset, too.
2. A sequence starts from the memory that the previous rollout left behind: it is stored, and not
   computed again with newer parameters, so there is no burn-in. Kapturowski et al. 2019, "Recurrent
   experience replay in distributed reinforcement learning", compare the two.
3. Policy and value have separate networks, each with a GRU of its own.
4. The statistics of the normalisers change once per update, after the rollout. Those of the
   observations start from one rollout of the untrained policy, not counted in total_timesteps.
5. Values are computed after the rollout in one batched pass, not inside it.
6. The standard deviation of the advantages is that of the population (divided by n).
7. With max_kl, the update stops at the first minibatch whose estimated KL exceeds it: that one and
   all later ones change nothing.

Run: purejaxpg train ppo_rnn --env MemoryChain-bsuite --seed 0
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

    env: str = "MemoryChain-bsuite"  # environment; `purejaxpg list` shows them
    env_kwargs: tuple[tuple[str, Any], ...] = ()  # arguments of the environment's constructor
    total_timesteps: int = 500_000  # environment steps, rounded down to whole updates
    num_envs: int = 16  # N, parallel environments
    num_steps: int = 64  # T, steps of each environment per update, the length of a sequence
    num_epochs: int = 4  # passes over the data of an update
    num_minibatches: int = 4  # gradient steps per pass; must divide N
    torso: str = "mlp"  # "mlp", or "cnn" for images
    hidden: tuple[int, ...] = (64,)  # widths of the fully connected layers before the GRU
    memory_size: int = 64  # H, width of the GRU
    activation: str = "tanh"  # tanh, relu, elu, silu or gelu
    orthogonal_init: bool = True  # else LeCun's normal initialisation
    fused: str = "auto"  # kernels on a GPU where there are some; or "require" or "off"
    precision: str = "fast"  # of those kernels; or "float32"
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    normalize_advantage: bool = True  # to mean 0, variance 1 within each minibatch
    normalize_obs: bool = False  # by running mean and standard deviation
    normalize_reward: bool = False  # by the standard deviation of the discounted return

    learning_rate: float = 1e-3  # step size of Adam
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    gae_lambda: float = 0.95  # 0: one-step TD, 1: the longest return in the rollout
    clip_eps: float = 0.2  # a ratio beyond 1 ± this gains nothing more
    vf_clip_eps: float = float("inf")  # the same for the change of a value
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # bound on the global gradient norm; inf: off
    max_kl: float = float("inf")  # estimated KL that ends an update early; inf: off
    clip_obs: float = 10.0  # bound on a normalised observation
    reward_scale: float = 1.0  # factor on the reward, after any normalisation
    clip_reward: float = float("inf")  # bound on the scaled reward; inf: off
    initial_log_std: float = 0.0  # of the policy's noise, for continuous actions
    env_params: dict[str, float] = dataclasses.field(default_factory=dict)  # e.g. memory_length

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
    configs.at_least(config, 1, "memory_size")
    fused.check(config)
    configs.divides(config, "num_minibatches", config.num_envs, "num_envs")
    configs.check_rollout(config)
    schedules.check(config)


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
    """The part of a rollout that the loss needs: a sequence of each environment."""

    obs: jax.Array  # [N, T, D] normalised
    starts: jax.Array  # [N, T] bool, an episode starts at this step
    memory: Any  # {"actor": [N, H], "critic": [N, H]} before the first step
    action: jax.Array  # [N, T] or [N, T, A]
    log_prob: jax.Array  # [N, T] old
    value: jax.Array  # [N, T] old
    advantage: jax.Array  # [N, T]
    target: jax.Array  # [N, T]


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # {"actor", "critic"}
    opt_state: Any
    env_state: envs.EnvState
    obs: jax.Array  # [N, D] raw, to act on next
    memory: Any  # {"actor": [N, H], "critic": [N, H]} before obs
    normalizers: normalize.Normalizers
    num_updates: jax.Array  # [] int32, finished


class Actor(nn.Module):
    """Torso, GRU and policy head.

    A step: obs [..., D], memory [..., H]; a sequence: [T, N, D], the memory before it [N, H], and
    starts [T, N] -> distrax distribution over actions, memory after each observation [..., H].
    """

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array, memory: jax.Array, starts: Any = None) -> Any:
        config, env = self.config, envs.from_config(self.config)
        x = networks.torso(config, env.obs_shape)(obs)
        memory = networks.gru(config)(x, memory, starts)
        output = nn.Dense(env.action_size, kernel_init=networks.initializer(config, 0.01))(memory)
        if env.discrete:
            return distributions.categorical(output), memory
        initial = nn.initializers.constant(config.initial_log_std)
        log_std = self.param("log_std", initial, (env.action_size,))
        return distributions.diag_gaussian(output, log_std), memory


class Critic(nn.Module):
    """Torso, GRU and value head, of the same arguments -> value [...], memory [..., H]."""

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array, memory: jax.Array, starts: Any = None) -> Any:
        x = networks.torso(self.config, envs.from_config(self.config).obs_shape)(obs)
        memory = networks.gru(self.config)(x, memory, starts)
        value = nn.Dense(1, kernel_init=networks.initializer(self.config, 1.0))(memory)
        return value.squeeze(-1), memory


def make_optimizer(config: Config, num_updates: Any = 0) -> optax.GradientTransformation:
    rate = schedules.scheduled(config, config.learning_rate, num_updates)
    return optimizers.clipped_adam(rate, config.max_grad_norm, eps=1e-5)


def init(key: jax.Array, config: Config) -> TrainState:
    key_env, key_actor, key_critic, key_moments = random.split(key, 4)
    env, env_params = envs.setup(config)
    obs, env_state = envs.reset(key_env, env, env_params, config.num_envs)
    memory = jnp.zeros((config.num_envs, config.memory_size))
    params = {
        "actor": Actor(config).init(key_actor, obs, memory),
        "critic": Critic(config).init(key_critic, obs, memory),
    }
    state = TrainState(
        params=params,
        opt_state=make_optimizer(config).init(params),
        env_state=env_state,
        obs=obs,
        memory={"actor": memory, "critic": memory},
        normalizers=normalize.init_both(obs),
        num_updates=jnp.zeros((), jnp.int32),
    )
    if config.normalize_obs:
        _, seen, _ = rollout(key_moments, state, config)
        normalizers = normalize.observed(config, state.normalizers, seen.obs)
        state = dataclasses.replace(state, normalizers=normalizers)
    return state


def initial_memory(state: TrainState, config: Config, n: int) -> jax.Array:
    """The actor's memory as n episodes start [n, H]."""
    return jnp.zeros((n, config.memory_size))


def rollout(
    key: jax.Array, state: TrainState, config: Config
) -> tuple[TrainState, Transition, Metrics]:
    """Act for T steps -> state, Transition [T, N], metrics of the ended episodes."""
    env, env_params = envs.setup(config)

    def step(carry: Any, key: jax.Array) -> Any:
        obs, env_state, memory = carry
        key_action, key_env = random.split(key)
        seen = normalize.observations(config, state.normalizers, obs)
        policy, memory = Actor(config).apply(state.params["actor"], seen, memory)
        action = policy.sample(seed=key_action)
        following, env_state, now = envs.step(key_env, env, env_state, action, env_params)
        transition = Transition(
            obs, action, policy.log_prob(action), now.reward, now.terminated, now.done, now.next_obs
        )
        memory = jnp.where(now.done[:, None], 0.0, memory)
        return (following, env_state, memory), (transition, envs.episode_metrics(now))

    keys = random.split(key, config.num_steps)
    carry = (state.obs, state.env_state, state.memory["actor"])
    (obs, env_state, memory), (transition, episodes) = fused.scan(step, carry, keys, config)
    metrics = {name: value.sum() for name, value in episodes.items()}
    memory = {**state.memory, "actor": memory}
    state = dataclasses.replace(state, obs=obs, env_state=env_state, memory=memory)
    return state, transition, metrics


def advantages(state: TrainState, before: Any, transition: Transition, config: Config) -> Any:
    """Turn [T, N] transitions into sequences -> state with the critic's memory after them, Batch.

    `before` is the memory before the first step. The normalisers are updated, too.
    """
    obs = normalize.observations(config, state.normalizers, transition.obs)
    next_obs = normalize.observations(config, state.normalizers, transition.next_obs)
    terminated, done = transition.terminated, transition.done
    starts = jnp.roll(done, 1, 0).at[0].set(False)  # `before` is zero where an episode starts
    critic, params = Critic(config), state.params["critic"]
    value, memory = critic.apply(params, obs, before["critic"], starts)
    next_value, _ = critic.apply(params, next_obs, memory)  # each memory is from before its reset
    normalizers, reward = normalize.rewards(config, state.normalizers, transition.reward, done)
    normalizers = normalize.observed(config, normalizers, transition.obs)
    advantage = returns.gae(
        reward, value, next_value, terminated, done, config.gamma, config.gae_lambda
    )
    arrays = (obs, starts, transition.action, transition.log_prob, value, advantage)
    obs, starts, action, log_prob, value, advantage = (jnp.swapaxes(x, 0, 1) for x in arrays)
    batch = Batch(obs, starts, before, action, log_prob, value, advantage, advantage + value)
    after = {**state.memory, "critic": jnp.where(done[-1][:, None], 0.0, memory[-1])}
    return dataclasses.replace(state, normalizers=normalizers, memory=after), batch


def loss(params: Any, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """Negative of the objective on a minibatch of sequences [B, T] -> scalar, metrics."""
    obs, starts = jnp.swapaxes(batch.obs, 0, 1), batch.starts.T
    policy, _ = Actor(config).apply(params["actor"], obs, batch.memory["actor"], starts)
    value, _ = Critic(config).apply(params["critic"], obs, batch.memory["critic"], starts)
    log_prob, value = policy.log_prob(jnp.swapaxes(batch.action, 0, 1)).T, value.T
    advantage = batch.advantage
    if config.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    policy_loss = losses.ppo_clip(log_prob, batch.log_prob, advantage, config.clip_eps).mean()
    errors = losses.value_loss_clipped(value, batch.value, batch.target, config.vf_clip_eps)
    value_loss = errors.mean()
    entropy = policy.entropy().mean()
    metrics = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "policy/entropy": entropy,
        "policy/kl": losses.approximate_kl(log_prob, batch.log_prob).mean(),
        "policy/clip_fraction": losses.is_clipped(log_prob, batch.log_prob, config.clip_eps).mean(),
    }
    return policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy, metrics


def update(key: jax.Array, state: TrainState, config: Config) -> tuple[TrainState, Metrics]:
    """One iteration: T*N environment steps, then epochs of minibatch gradient steps on them."""
    key_rollout, key_shuffle = random.split(key)
    before = state.memory
    state, transition, episodes = rollout(key_rollout, state, config)
    state, batch = advantages(state, before, transition, config)
    params, opt_state, metrics = fused.fit(
        lambda params, minibatch: loss(params, minibatch, config),
        make_optimizer(config, state.num_updates),
        state.params,
        state.opt_state,
        batch,
        shuffled(key_shuffle, config),
        config,
        stop=lambda metrics: metrics["policy/kl"] > config.max_kl,
    )
    state = dataclasses.replace(
        state, params=params, opt_state=opt_state, num_updates=state.num_updates + 1
    )
    return state, {**episodes, **metrics}


def shuffled(key: jax.Array, config: Config) -> jax.Array:
    """Environments by minibatch, a fresh permutation per epoch -> [epochs * minibatches, B]."""
    keys = random.split(key, config.num_epochs)
    order = jax.vmap(lambda key: prng.permutation(key, config.num_envs))(keys)
    return order.reshape(config.num_epochs * config.num_minibatches, -1)


def train(key: jax.Array, config: Config) -> tuple[TrainState, Metrics]:
    """A whole run from one key -> final state, metrics [num_updates]."""
    state = init(random.fold_in(key, 0), config)

    def step(state: TrainState, u: jax.Array) -> tuple[TrainState, Metrics]:
        return update(random.fold_in(key, u), state, config)

    return lax.scan(step, state, jnp.arange(1, config.num_updates + 1))


def policy(
    key: jax.Array, state: Any, obs: jax.Array, memory: Any, config: Config, greedy: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Actions [N] or [N, A] for raw observations [N, D], and the memory after them [N, H]."""
    seen = normalize.observations(config, state.normalizers, obs)
    distribution, memory = Actor(config).apply(state.params["actor"], seen, memory)
    return distribution.mode() if greedy else distribution.sample(seed=key), memory


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
