"""Soft actor-critic (SAC) for continuous and discrete actions.

Learns, from a replay buffer, two action values Q_1, Q_2 and the policy π that ascends the lesser of
them together with its own entropy,

    Q_i: minimises E[ ½ (Q_i(s, a) - y)² ],    y = r + γ (1 - terminated) V'(s')
    V':  E_π[ min_i Q'_i(s', a') - α log π(a'|s') ]
    π:   minimises E_π[ α log π(a|s) - min_i Q_i(s, a) ]
    α:   minimises log α (H(π) - target entropy), so it grows if the entropy is too low

Q'_i are target networks, which move by tau towards the online ones after every gradient step.
Continuous actions are tanh(x) of a Gaussian x, and E_π is one reparametrised sample; for discrete
actions Q has one output per action and E_π is the exact sum.

Haarnoja et al. 2018, arXiv:1812.05905; Christodoulou 2019, arXiv:1910.07207, for discrete actions.

Differs from them:
1. A time limit is not a terminal state: only `terminated` removes the bootstrap, and next_obs is
   the observation before the reset.
2. An update is T steps of N environments, then num_gradient_steps steps on fresh minibatches, where
   the papers alternate single steps.
3. Actions lie in [-1, 1] for the networks, the buffer and all entropies, and are stretched to the
   environment's bounds when it steps.
4. log(1 - tanh² x) is computed without cancellation: it is exact where common code is infinite or
   off by tens of nats.
5. The loss of α is linear in log α, not in α: same sign, same fixed point.
6. The first learning_starts steps, taken at random in `init`, count in total_timesteps.
7. The target entropy of discrete actions is half of the maximum, not 98% of it. Step sizes and
   tau are larger, for shorter runs.
8. With normalize_obs, stored observations are normalised by the current statistics.

Run: purejaxpg train sac --env Pendulum-v1 --seed 0
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import lax, random

from purejaxpg import config as configs
from purejaxpg import envs, fused, networks, normalize, optimizers, replay, schedules
from purejaxpg.kernels import distributions, losses

Metrics = dict[str, jax.Array]

LOG_STD_BOUNDS = (-20.0, 2.0)  # of the Gaussian before tanh; common practice, not in the papers


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    env: str = "Pendulum-v1"  # environment; `purejaxpg list` shows them
    env_kwargs: tuple[tuple[str, Any], ...] = ()  # arguments of the environment's constructor
    total_timesteps: int = 50_000  # environment steps, rounded down to whole updates
    num_envs: int = 4  # N, parallel environments
    num_steps: int = 4  # T, steps of each environment per update
    num_gradient_steps: int = 16  # per update; N*T of them are one per environment step
    batch_size: int = 256  # transitions per gradient step
    replay_capacity: int = 100_000  # transitions in the buffer
    learning_starts: int = 1_000  # environment steps with random actions before the first update
    random_action_repeat: int = 1  # steps for which each of those actions is repeated
    tune_alpha: bool = True  # towards the target entropy; else alpha is constant
    torso: str = "mlp"  # "mlp", or "cnn" for images with discrete actions
    hidden: tuple[int, ...] = (256, 256)  # widths of the fully connected layers
    activation: str = "relu"  # tanh, relu, elu, silu or gelu
    orthogonal_init: bool = True  # else LeCun's normal initialisation
    fused: str = "auto"  # kernels on a GPU where there are some; or "require" or "off"
    precision: str = "fast"  # of those kernels; or "float32"
    learning_rate_schedule: str = "constant"  # or "linear" (to zero) or "robbins_monro"
    normalize_obs: bool = False  # by running mean and standard deviation

    learning_rate: float = 1e-3  # step size of Adam, for the actor and α
    critic_learning_rate: float = 1e-3  # the same for the critics
    learning_rate_half_life: float = 1000.0  # of robbins_monro, in updates
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    tau: float = 0.02  # step of the target networks towards the online ones; 1: no lag
    alpha: float = 1.0  # temperature, the weight of the entropy; the initial one if tune_alpha
    target_entropy_per_dim: float = -1.0  # nats per dimension of a continuous action
    target_entropy_ratio: float = 0.5  # for discrete actions, as a share of log(their number)
    max_grad_norm: float = float("inf")  # bound on the norm of each gradient; inf: off
    clip_obs: float = 10.0  # bound on a normalised observation
    reward_scale: float = 1.0  # factor on the reward
    clip_reward: float = float("inf")  # bound on the scaled reward; inf: off
    env_params: dict[str, float] = dataclasses.field(default_factory=dict)  # e.g. gravity

    @property
    def steps_per_update(self) -> int:
        """Environment steps of one update."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates in a whole run, after the random steps."""
        return (self.total_timesteps - self.learning_starts) // self.steps_per_update


def check(config: Config) -> None:
    """Raise an InputError with one plain sentence unless the configuration makes sense."""
    env = envs.check(config)
    networks.check(config, env.obs_shape)
    if not env.discrete:
        envs.require_bounded(config, "SAC")
        configs.one_of(config, "torso", ("mlp",))
    configs.in_range(config)
    fused.check(config)
    replay.check(config)
    schedules.check(config)


@struct.dataclass
class Transition:
    """One step of each environment, as the replay buffer stores it."""

    obs: jax.Array  # [..., D] raw
    action: jax.Array  # [..., A] in [-1, 1], or [...] int32
    reward: jax.Array  # [...] raw
    terminated: jax.Array  # [...] bool
    next_obs: jax.Array  # [..., D] raw, before any reset


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # {"actor", "critic", "log_alpha"}; leaves of the critic [2, ...]
    target_critic: Any  # like the critic
    opt_state: Any  # {"actor", "critic", "log_alpha"}
    env_state: envs.EnvState
    obs: jax.Array  # [N, D] raw, to act on next
    buffer: replay.Buffer
    normalizers: normalize.Normalizers
    num_updates: jax.Array  # [] int32, finished


class Actor(nn.Module):
    """Torso and policy head: [..., D] -> distrax distribution over actions."""

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array) -> Any:
        config, env = self.config, envs.from_config(self.config)
        x = networks.torso(config, env.obs_shape)(obs)
        head = partial(nn.Dense, kernel_init=networks.initializer(config, 0.01))
        if env.discrete:
            return distributions.categorical(head(env.action_size)(x))
        mean, log_std = jnp.split(head(2 * env.action_size)(x), 2, axis=-1)
        return distributions.tanh_gaussian(mean, jnp.clip(log_std, *LOG_STD_BOUNDS))


class Critic(nn.Module):
    """Torso and value head: [..., D], [..., A] -> [...]; discrete: [..., D], [...] -> [..., A]."""

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        config, env = self.config, envs.from_config(self.config)
        head = partial(nn.Dense, kernel_init=networks.initializer(config, 1.0))
        if env.discrete:
            return head(env.action_size)(networks.torso(config, env.obs_shape)(obs))
        x = jnp.concatenate([obs, action], axis=-1)
        return head(1)(networks.torso(config, x.shape[-1:])(x)).squeeze(-1)


def make_optimizers(
    config: Config, num_updates: Any = 0
) -> dict[str, optax.GradientTransformation]:
    def make(learning_rate: jax.Array | float) -> optax.GradientTransformation:
        rate = schedules.scheduled(config, learning_rate, num_updates)
        return optimizers.clipped_adam(rate, config.max_grad_norm, eps=1e-8)

    actor, critic = make(config.learning_rate), make(config.critic_learning_rate)
    return {"actor": actor, "critic": critic, "log_alpha": actor}


def init(key: jax.Array, config: Config) -> TrainState:
    key_env, key_actor, key_critic, key_random = random.split(key, 4)
    env, env_params = envs.setup(config)
    obs, env_state = envs.reset(key_env, env, env_params, config.num_envs)
    shape, dtype = ((), jnp.int32) if env.discrete else ((env.action_size,), jnp.float32)
    action = jnp.zeros((config.num_envs, *shape), dtype)
    params = {
        "actor": Actor(config).init(key_actor, obs),
        "critic": jax.vmap(Critic(config).init, (0, None, None))(
            random.split(key_critic), obs, action
        ),
        "log_alpha": jnp.log(jnp.asarray(config.alpha, jnp.float32)),
    }
    optimizer = make_optimizers(config)
    no = jnp.zeros((), bool)
    example = Transition(obs[0], action[0], jnp.zeros((), jnp.float32), no, obs[0])
    state = TrainState(
        params=params,
        target_critic=params["critic"],
        opt_state={name: optimizer[name].init(params[name]) for name in params},
        env_state=env_state,
        obs=obs,
        buffer=replay.init(config.replay_capacity, example),
        normalizers=normalize.init_both(obs),
        num_updates=jnp.zeros((), jnp.int32),
    )
    num_steps = config.learning_starts // config.num_envs
    return interact(key_random, state, config, num_steps, warming_up=True)[0]


def at_random(key: jax.Array, config: Config) -> jax.Array:
    """Uniformly random actions [N] or [N, A]."""
    env = envs.from_config(config)
    if env.discrete:
        return random.randint(key, (config.num_envs,), 0, env.num_actions, jnp.int32)
    return random.uniform(key, (config.num_envs, env.action_size), jnp.float32, -1.0, 1.0)


def interact(
    key: jax.Array, state: TrainState, config: Config, num_steps: int, warming_up: bool = False
) -> tuple[TrainState, Metrics]:
    """Act for `num_steps` and store the transitions -> state, metrics of the ended episodes."""
    env, env_params = envs.setup(config)

    def step(carry: Any, keys: Any) -> Any:
        obs, env_state = carry
        key_action, key_env = keys
        if warming_up:
            action = at_random(key_action, config)
        else:
            seen = normalize.observations(config, state.normalizers, obs)
            action = Actor(config).apply(state.params["actor"], seen).sample(seed=key_action)
        scaled = action if env.discrete else envs.to_bounds(env, env_params, action)
        following, env_state, now = envs.step(key_env, env, env_state, scaled, env_params)
        transition = Transition(obs, action, now.reward, now.terminated, now.next_obs)
        return (following, env_state), (transition, envs.episode_metrics(now))

    keys = jax.vmap(random.split)(random.split(key, num_steps))
    key_action, key_env = keys[:, 0], keys[:, 1]
    if warming_up:  # the same key draws the same actions
        repeat = config.random_action_repeat
        key_action = key_action[jnp.arange(num_steps) // repeat * repeat]
    (obs, env_state), (transition, episodes) = fused.scan(
        step, (state.obs, state.env_state), (key_action, key_env), config
    )
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transition)
    state = dataclasses.replace(
        state,
        env_state=env_state,
        obs=obs,
        buffer=replay.add(state.buffer, rows),
        normalizers=normalize.observed(config, state.normalizers, transition.obs),
    )
    return state, {name: value.sum() for name, value in episodes.items()}


def sample(key: jax.Array, state: TrainState, config: Config) -> Transition:
    """Draw a minibatch and normalise it for the losses -> Transition [B]."""
    batch = replay.sample(key, state.buffer, config.batch_size)
    bound = config.clip_reward
    return dataclasses.replace(
        batch,
        obs=normalize.observations(config, state.normalizers, batch.obs),
        next_obs=normalize.observations(config, state.normalizers, batch.next_obs),
        reward=jnp.clip(config.reward_scale * batch.reward, -bound, bound),
    )


def values(critic: Any, obs: jax.Array, action: jax.Array, config: Config) -> jax.Array:
    """Both critics -> [2, B], or for every discrete action [2, B, A]."""
    return jax.vmap(Critic(config).apply, (0, None, None))(critic, obs, action)


def consider(
    key: jax.Array, actor: Any, critic: Any, obs: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Log probabilities, lesser values, and a function that takes expectations of either.

    Discrete: both [B, A], for all actions, and the expectation is the exact sum -> [B].
    Continuous: both [B], for one sample of the policy, which estimates the expectation -> [B].
    """
    policy = Actor(config).apply(actor, obs)
    if envs.from_config(config).discrete:
        every = values(critic, obs, policy.mode(), config)  # for all actions, not only this one
        expectation = partial(distributions.expectation, policy)
        return policy.logits, every.min(axis=0), expectation  # distrax's logits are normalised
    action, log_prob = policy.sample_and_log_prob(seed=key)
    return log_prob, values(critic, obs, action, config).min(axis=0), lambda x: x


def critic_loss(
    critic: Any, key: jax.Array, params: Any, target_critic: Any, batch: Transition, config: Config
) -> jax.Array:
    """Squared errors of both critics against one soft target -> scalar."""
    log_prob, next_value, expectation = consider(
        key, params["actor"], target_critic, batch.next_obs, config
    )
    alpha = jnp.exp(params["log_alpha"])
    soft_value = expectation(losses.soft_value(log_prob, next_value, alpha))
    target = losses.td_target(batch.reward, soft_value, batch.terminated, config.gamma)
    value = values(critic, batch.obs, batch.action, config)
    if envs.from_config(config).discrete:
        value = jnp.take_along_axis(value, batch.action[None, :, None], axis=-1).squeeze(-1)
    target = jnp.broadcast_to(lax.stop_gradient(target), value.shape)
    return losses.value_loss(value, target).sum(axis=0).mean()


def actor_loss(
    actor: Any, key: jax.Array, params: Any, batch: Transition, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Negative of the lesser value and the entropy -> scalar, entropy []."""
    log_prob, value, expectation = consider(key, actor, params["critic"], batch.obs, config)
    alpha = jnp.exp(params["log_alpha"])
    loss = expectation(losses.soft_policy(log_prob, value, alpha)).mean()
    return loss, expectation(-log_prob).mean()


def temperature_loss(log_alpha: jax.Array, entropy: jax.Array, config: Config) -> jax.Array:
    """Log of the temperature times the surplus of entropy -> scalar."""
    env = envs.from_config(config)
    if env.discrete:
        target = config.target_entropy_ratio * math.log(env.num_actions)
    else:
        target = config.target_entropy_per_dim * env.action_size
    return losses.temperature(log_alpha, entropy, target)


def update(key: jax.Array, state: TrainState, config: Config) -> tuple[TrainState, Metrics]:
    """One iteration: T*N environment steps, then gradient steps on samples of the buffer."""
    key_interact, key_learn = random.split(key)
    state, episodes = interact(key_interact, state, config, config.num_steps)
    descend = partial(descended, make_optimizers(config, state.num_updates))

    def gradient_step(carry: Any, key: jax.Array) -> Any:
        params, target_critic, opt_state = carry
        key_sample, key_critic, key_actor = random.split(key, 3)
        batch = sample(key_sample, state, config)
        value_loss, gradient = jax.value_and_grad(critic_loss)(
            params["critic"], key_critic, params, target_critic, batch, config
        )
        params, opt_state = descend("critic", gradient, params, opt_state)
        (policy_loss, entropy), gradient = jax.value_and_grad(actor_loss, has_aux=True)(
            params["actor"], key_actor, params, batch, config
        )
        params, opt_state = descend("actor", gradient, params, opt_state)
        if config.tune_alpha:
            gradient = jax.grad(temperature_loss)(params["log_alpha"], entropy, config)
            params, opt_state = descend("log_alpha", gradient, params, opt_state)
        target_critic = optax.incremental_update(params["critic"], target_critic, config.tau)
        metrics = {
            "loss/policy": policy_loss,
            "loss/value": value_loss,
            "policy/entropy": entropy,
            "policy/alpha": jnp.exp(params["log_alpha"]),
        }
        return (params, target_critic, opt_state), metrics

    carry = (state.params, state.target_critic, state.opt_state)
    keys = random.split(key_learn, config.num_gradient_steps)
    (params, target, opt_state), steps = lax.scan(gradient_step, carry, keys)
    num_updates = state.num_updates + 1
    state = dataclasses.replace(
        state, params=params, target_critic=target, opt_state=opt_state, num_updates=num_updates
    )
    return state, {**episodes, **{name: value.mean() for name, value in steps.items()}}


def descended(
    optimizer: Any, name: str, gradient: Any, params: Any, opt_state: Any
) -> tuple[Any, Any]:
    """Take one step with the optimiser of `name` -> parameters, states of the optimisers."""
    change, moments = optimizer[name].update(gradient, opt_state[name])
    new = optax.apply_updates(params[name], change)
    return {**params, name: new}, {**opt_state, name: moments}


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
    env, env_params = envs.setup(config)
    seen = normalize.observations(config, state.normalizers, obs)
    distribution = Actor(config).apply(state.params["actor"], seen)
    if env.discrete:
        return distribution.mode() if greedy else distribution.sample(seed=key)
    action = distribution.median() if greedy else distribution.sample(seed=key)
    return envs.to_bounds(env, env_params, action)


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
