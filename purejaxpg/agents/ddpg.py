"""Deep deterministic policy gradient (DDPG) for continuous actions.

Learns, from a replay buffer, an action value Q and the policy μ that ascends it,

    Q:  minimises E[ ½ (Q(s, a) - y)² ],      y = r + γ (1 - terminated) Q'(s', μ'(s'))
    μ:  maximises E[ Q(s, μ(s)) ],            so its gradient is E[ ∇_a Q(s, a)|_{a=μ(s)} ∇μ(s) ]

Q' and μ' are target networks, which move by tau towards the online ones after every gradient step.
Exploration adds noise to the action: independent Gaussian, or the Ornstein-Uhlenbeck process
n ← n - ou_theta n + noise_std ε, which starts from 0 in every episode. `policy` has no noise.

Lillicrap et al. 2015, arXiv:1509.02971; Silver et al. 2014, "Deterministic policy gradient
algorithms".

Differs from the paper:
1. A time limit is not a terminal state: only `terminated` removes the bootstrap, and next_obs is
   the observation before the reset.
2. An update is T steps of N environments, then num_gradient_steps steps on fresh minibatches, where
   the paper alternates single steps.
3. Actions lie in [-1, 1] for the networks, the buffer and the noise, and are stretched to the
   environment's bounds when it steps.
4. Gaussian noise is the default, as in later work. There is no weight decay and no batch norm, the
   action enters Q at its first layer, and sizes, step sizes, tau and initialisation differ.
5. The first learning_starts steps, taken at random in `init`, count in total_timesteps.
6. With normalize_obs, stored observations are normalised by the current statistics.

Run: purejaxpg train ddpg --env Pendulum-v1 --seed 0
"""

import dataclasses
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
from purejaxpg.kernels import losses

Metrics = dict[str, jax.Array]


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
    exploration: str = "gaussian"  # noise; or "ou" for Ornstein-Uhlenbeck
    torso: str = "mlp"  # only "mlp"
    hidden: tuple[int, ...] = (256, 256)  # widths of the fully connected layers
    activation: str = "relu"  # tanh, relu, elu, silu or gelu
    orthogonal_init: bool = True  # else LeCun's normal initialisation
    fused: str = "auto"  # kernels on a GPU where there are some; or "require" or "off"
    precision: str = "fast"  # of those kernels; or "float32"
    learning_rate_schedule: str = "constant"  # or "linear" (to zero) or "robbins_monro"
    normalize_obs: bool = False  # by running mean and standard deviation

    learning_rate: float = 1e-3  # step size of Adam, for the actor
    critic_learning_rate: float = 1e-3  # the same for the critic
    learning_rate_half_life: float = 1000.0  # of robbins_monro, in updates
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    tau: float = 0.005  # step of the target networks towards the online ones; 1: no lag
    noise_std: float = 0.1  # of the noise drawn in a step; an action spans 2
    ou_theta: float = 0.15  # pull of the Ornstein-Uhlenbeck process towards 0, per step
    max_grad_norm: float = float("inf")  # bound on the norm of either gradient; inf: off
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
    envs.require_bounded(config, "DDPG")
    networks.check(config, env.obs_shape)
    configs.one_of(config, "torso", ("mlp",))
    configs.one_of(config, "exploration", ("gaussian", "ou"))
    configs.in_range(config)
    fused.check(config)
    replay.check(config)
    schedules.check(config)


@struct.dataclass
class Transition:
    """One step of each environment, as the replay buffer stores it."""

    obs: jax.Array  # [..., D] raw
    action: jax.Array  # [..., A] in [-1, 1]
    reward: jax.Array  # [...] raw
    terminated: jax.Array  # [...] bool
    next_obs: jax.Array  # [..., D] raw, before any reset


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # {"actor", "critic"}
    target_params: Any  # like params
    opt_state: Any  # {"actor", "critic"}
    env_state: envs.EnvState
    obs: jax.Array  # [N, D] raw, to act on next
    noise: jax.Array  # [N, A] of the last step, for Ornstein-Uhlenbeck
    buffer: replay.Buffer
    normalizers: normalize.Normalizers
    num_updates: jax.Array  # [] int32, finished


class Actor(nn.Module):
    """Torso and bounded policy head: [..., D] -> action [..., A] in [-1, 1]."""

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array) -> jax.Array:
        config, env = self.config, envs.from_config(self.config)
        x = networks.torso(config, env.obs_shape)(obs)
        x = nn.Dense(env.action_size, kernel_init=networks.initializer(config, 0.01))(x)
        return jnp.tanh(x)


class Critic(nn.Module):
    """Torso over both inputs, and value head: [..., D], [..., A] -> [...]."""

    config: Config

    @nn.compact
    def __call__(self, obs: jax.Array, action: jax.Array) -> jax.Array:
        x = jnp.concatenate([obs, action], axis=-1)
        x = networks.torso(self.config, x.shape[-1:])(x)
        return nn.Dense(1, kernel_init=networks.initializer(self.config, 1.0))(x).squeeze(-1)


def make_optimizers(
    config: Config, num_updates: Any = 0
) -> dict[str, optax.GradientTransformation]:
    def make(learning_rate: jax.Array | float) -> optax.GradientTransformation:
        rate = schedules.scheduled(config, learning_rate, num_updates)
        return optimizers.clipped_adam(rate, config.max_grad_norm, eps=1e-8)

    return {"actor": make(config.learning_rate), "critic": make(config.critic_learning_rate)}


def init(key: jax.Array, config: Config) -> TrainState:
    key_env, key_actor, key_critic, key_random = random.split(key, 4)
    env, env_params = envs.setup(config)
    obs, env_state = envs.reset(key_env, env, env_params, config.num_envs)
    action = jnp.zeros((config.num_envs, env.action_size), jnp.float32)
    params = {
        "actor": Actor(config).init(key_actor, obs),
        "critic": Critic(config).init(key_critic, obs, action),
    }
    optimizer = make_optimizers(config)
    no = jnp.zeros((), bool)
    example = Transition(obs[0], action[0], jnp.zeros((), jnp.float32), no, obs[0])
    state = TrainState(
        params=params,
        target_params=params,
        opt_state={name: optimizer[name].init(params[name]) for name in params},
        env_state=env_state,
        obs=obs,
        noise=action,
        buffer=replay.init(config.replay_capacity, example),
        normalizers=normalize.init_both(obs),
        num_updates=jnp.zeros((), jnp.int32),
    )
    num_steps = config.learning_starts // config.num_envs
    return interact(key_random, state, config, num_steps, warming_up=True)[0]


def explore(
    key: jax.Array, state: TrainState, obs: jax.Array, noise: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array]:
    """Action of the policy with noise -> action [N, A], noise [N, A]."""
    seen = normalize.observations(config, state.normalizers, obs)
    decay = 1.0 - config.ou_theta if config.exploration == "ou" else 0.0
    noise = decay * noise + config.noise_std * random.normal(key, noise.shape, noise.dtype)
    action = Actor(config).apply(state.params["actor"], seen) + noise
    return jnp.clip(action, -1.0, 1.0), noise


def interact(
    key: jax.Array, state: TrainState, config: Config, num_steps: int, warming_up: bool = False
) -> tuple[TrainState, Metrics]:
    """Act for `num_steps` and store the transitions -> state, metrics of the ended episodes."""
    env, env_params = envs.setup(config)

    def step(carry: Any, key: jax.Array) -> Any:
        obs, env_state, noise = carry
        key_action, key_env = random.split(key)
        if warming_up:
            action = random.uniform(key_action, noise.shape, noise.dtype, -1.0, 1.0)
        else:
            action, noise = explore(key_action, state, obs, noise, config)
        scaled = envs.to_bounds(env, env_params, action)
        following, env_state, now = envs.step(key_env, env, env_state, scaled, env_params)
        noise = jnp.where(now.done[:, None], 0.0, noise)
        transition = Transition(obs, action, now.reward, now.terminated, now.next_obs)
        return (following, env_state, noise), (transition, envs.episode_metrics(now))

    keys = random.split(key, num_steps)
    carry = (state.obs, state.env_state, state.noise)
    (obs, env_state, noise), (transition, episodes) = fused.scan(step, carry, keys, config)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transition)
    state = dataclasses.replace(
        state,
        env_state=env_state,
        obs=obs,
        noise=noise,
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


def critic_loss(critic: Any, target_params: Any, batch: Transition, config: Config) -> jax.Array:
    """Squared error of Q against the one-step target -> scalar."""
    next_action = Actor(config).apply(target_params["actor"], batch.next_obs)
    next_value = Critic(config).apply(target_params["critic"], batch.next_obs, next_action)
    target = losses.td_target(batch.reward, next_value, batch.terminated, config.gamma)
    value = Critic(config).apply(critic, batch.obs, batch.action)
    return losses.value_loss(value, lax.stop_gradient(target)).mean()


def actor_loss(actor: Any, critic: Any, batch: Transition, config: Config) -> jax.Array:
    """Negative of Q at the policy's own actions -> scalar."""
    action = Actor(config).apply(actor, batch.obs)
    return losses.deterministic_policy(Critic(config).apply(critic, batch.obs, action)).mean()


def update(key: jax.Array, state: TrainState, config: Config) -> tuple[TrainState, Metrics]:
    """One iteration: T*N environment steps, then gradient steps on samples of the buffer."""
    key_interact, key_learn = random.split(key)
    state, episodes = interact(key_interact, state, config, config.num_steps)
    descend = partial(descended, make_optimizers(config, state.num_updates))

    def gradient_step(carry: Any, key: jax.Array) -> Any:
        params, target_params, opt_state = carry
        batch = sample(key, state, config)
        value_loss, gradient = jax.value_and_grad(critic_loss)(
            params["critic"], target_params, batch, config
        )
        params, opt_state = descend("critic", gradient, params, opt_state)
        policy_loss, gradient = jax.value_and_grad(actor_loss)(
            params["actor"], params["critic"], batch, config
        )
        params, opt_state = descend("actor", gradient, params, opt_state)
        target_params = optax.incremental_update(params, target_params, config.tau)
        metrics = {"loss/policy": policy_loss, "loss/value": value_loss}
        return (params, target_params, opt_state), metrics

    carry = (state.params, state.target_params, state.opt_state)
    keys = random.split(key_learn, config.num_gradient_steps)
    (params, target, opt_state), steps = lax.scan(gradient_step, carry, keys)
    num_updates = state.num_updates + 1
    state = dataclasses.replace(
        state, params=params, target_params=target, opt_state=opt_state, num_updates=num_updates
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
    """Actions [N, A] for raw observations [N, D]; the policy is deterministic, greedy or not."""
    env, env_params = envs.setup(config)
    seen = normalize.observations(config, state.normalizers, obs)
    return envs.to_bounds(env, env_params, Actor(config).apply(state.params["actor"], seen))


if __name__ == "__main__":
    import sys

    from purejaxpg import cli

    sys.exit(cli.main(["train", __file__, *sys.argv[1:]]))
