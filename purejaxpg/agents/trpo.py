"""Trust region policy optimisation (TRPO) for discrete and continuous actions.

Maximises, over the data of the previous policy, a surrogate under a constraint,

    max_θ  L(θ) = E[ r A ]   subject to   E[ KL(π_old ‖ π_θ) ] <= δ,      r = π_θ / π_old

by one step: the natural gradient x of F x = ∇L(θ_old) from conjugate gradients, scaled to the bound
of the quadratic model of the divergence, √(2δ / xᵀF x) x, and then shortened until the divergence
itself is at most δ *and* L has improved. If no length passes, the policy does not change. A is the
generalised advantage estimate. The critic takes minibatch steps of Adam on ½ (V - G)², G = A +
V_old, after the policy.

Schulman et al. 2015, arXiv:1502.05477, eq. 14 and appendix C. The divergence has the paper's
direction; common implementations use KL(π_θ ‖ π_old), which differs in the line search.

Differs from the paper:
1. A time limit is not a terminal state: the value of the observation before the reset is
   bootstrapped. Treating it as terminal biases every value near the limit.
2. Advantages are generalised estimates with a critic (as in arXiv:1506.02438), not Q-values of
   single paths or vines.
3. The step's length uses the curvature of F itself; damping only enters the direction.
4. The statistics of the normalisers change once per update, after the rollout. Those of the
   observations start from one rollout of the untrained policy, not counted in total_timesteps.

Run: purejaxpg train trpo --env CartPole-v1 --seed 0
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax import flatten_util, lax, random

from purejaxpg import config as configs
from purejaxpg import envs, fused, networks, normalize, optimizers, prng, schedules
from purejaxpg.kernels import distributions, losses, returns, trust_region

Metrics = dict[str, jax.Array]


@configs.dataclass
class Config:
    """Settings of one run: floats are traced, the rest is part of the compiled program."""

    env: str = "CartPole-v1"  # environment; `purejaxpg list` shows them
    env_kwargs: tuple[tuple[str, Any], ...] = ()  # arguments of the environment's constructor
    total_timesteps: int = 500_000  # environment steps, rounded down to whole updates
    num_envs: int = 8  # N, parallel environments
    num_steps: int = 128  # T, steps of each environment per update
    num_epochs: int = 10  # passes of the critic over the data of an update
    num_minibatches: int = 4  # gradient steps per pass; must divide N*T
    cg_iters: int = 10  # iterations of conjugate gradient
    max_backtracks: int = 10  # how often a step may be shortened
    torso: str = "mlp"  # "mlp", or "cnn" for images
    hidden: tuple[int, ...] = (64, 64)  # widths of the fully connected layers
    activation: str = "tanh"  # tanh, relu, elu, silu or gelu
    orthogonal_init: bool = True  # else LeCun's normal initialisation
    fused: str = "auto"  # kernels on a GPU where there are some; or "require" or "off"
    precision: str = "fast"  # of those kernels; or "float32"
    learning_rate_schedule: str = "linear"  # to zero; or "constant" or "robbins_monro"
    normalize_advantage: bool = True  # to mean 0, variance 1 within the update
    normalize_obs: bool = False  # by running mean and standard deviation
    normalize_reward: bool = False  # by the standard deviation of the discounted return

    max_kl: float = 0.01  # δ, divergence that a step may reach
    cg_damping: float = 0.1  # added to the diagonal of the Fisher information
    shrink: float = 0.8  # factor on a rejected step
    critic_learning_rate: float = 1e-2  # step size of Adam; that of the policy follows from δ
    learning_rate_half_life: float = 100.0  # of robbins_monro, in updates
    gamma: float = 0.99  # discount per environment step, in [0, 1]
    gae_lambda: float = 0.95  # 0: one-step TD, 1: the longest return in the rollout
    max_grad_norm: float = 0.5  # bound on the critic's gradient norm; inf: off
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
    configs.require(math.isfinite(config.max_kl), "max_kl must be finite, but is inf.")
    configs.at_least(config, 0, "max_backtracks")
    configs.require(config.shrink < 1.0, f"shrink must be less than 1, but is {config.shrink}.")


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
    advantage: jax.Array  # [B]
    target: jax.Array  # [B]


@struct.dataclass
class TrainState:
    """Everything that a run carries from one update to the next."""

    params: Any  # {"actor", "critic"}
    opt_state: Any  # of the critic
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
    rate = schedules.scheduled(config, config.critic_learning_rate, num_updates)
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
        opt_state=make_optimizer(config).init(params["critic"]),
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
    value, next_value = networks.values(critic, params, obs, next_obs, terminated, done, config)
    normalizers, reward = normalize.rewards(config, state.normalizers, transition.reward, done)
    normalizers = normalize.observed(config, normalizers, transition.obs)
    advantage = returns.gae(
        reward, value, next_value, terminated, done, config.gamma, config.gae_lambda
    )
    target = advantage + value
    if config.normalize_advantage:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    batch = Batch(obs, transition.action, transition.log_prob, advantage, target)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    return dataclasses.replace(state, normalizers=normalizers), batch


def policy_loss(actor: Any, batch: Batch, config: Config) -> jax.Array:
    """Negative of the surrogate L -> scalar."""
    policy = Actor(config).apply(actor, batch.obs)
    ratio = jnp.exp(policy.log_prob(batch.action) - batch.log_prob)
    return -(ratio * batch.advantage).mean()


def constrained_step(actor: Any, batch: Batch, config: Config) -> tuple[Any, Metrics]:
    """Step along the natural gradient, within the trust region -> parameters, metrics."""
    params, unravel = flatten_util.ravel_pytree(actor)

    def policy(params: jax.Array) -> Any:
        return Actor(config).apply(unravel(params), batch.obs)

    def objective(params: jax.Array) -> jax.Array:
        return -policy_loss(unravel(params), batch, config)

    gradient = jax.grad(objective)(params)
    fisher = trust_region.fisher_vector_product(policy, params)
    direction = trust_region.conjugate_gradient(
        lambda v: fisher(v) + config.cg_damping * v, gradient, config.cg_iters
    )
    step = trust_region.step_to_boundary(direction, fisher(direction), config.max_kl)

    def objective_and_kl(new: jax.Array) -> tuple[jax.Array, jax.Array]:
        return objective(new), policy(params).kl_divergence(policy(new)).mean()

    new, fraction = trust_region.line_search(
        objective_and_kl, params, step, config.max_kl, config.shrink, config.max_backtracks
    )
    metrics = {
        "loss/policy": -objective(params),
        "policy/improvement": objective(new) - objective(params),
        "policy/entropy": policy(params).entropy().mean(),
        "policy/kl": policy(params).kl_divergence(policy(new)).mean(),
        "policy/step_fraction": fraction,
    }
    return unravel(new), metrics


def value_loss(critic: Any, batch: Batch, config: Config) -> tuple[jax.Array, Metrics]:
    """Squared error of the critic on one minibatch -> scalar, metrics."""
    error = losses.value_loss(Critic(config).apply(critic, batch.obs), batch.target).mean()
    return error, {"loss/value": error}


def fit_critic(key: jax.Array, state: TrainState, batch: Batch, config: Config) -> Any:
    """Take epochs of minibatch gradient steps -> parameters, state of the optimiser, metrics."""
    return fused.fit(
        lambda critic, batch: value_loss(critic, batch, config),
        make_optimizer(config, state.num_updates),
        state.params["critic"],
        state.opt_state,
        batch,
        shuffled(key, config),
        config,
    )


def update(key: jax.Array, state: TrainState, config: Config) -> tuple[TrainState, Metrics]:
    """One iteration: T*N environment steps, one step of the policy, epochs of the critic."""
    key_rollout, key_shuffle = random.split(key)
    state, transition, episodes = rollout(key_rollout, state, config)
    state, batch = advantages(state, transition, config)
    actor, policy_metrics = constrained_step(state.params["actor"], batch, config)
    critic, opt_state, value_metrics = fit_critic(key_shuffle, state, batch, config)
    state = dataclasses.replace(
        state,
        params={"actor": actor, "critic": critic},
        opt_state=opt_state,
        num_updates=state.num_updates + 1,
    )
    return state, {**episodes, **policy_metrics, **value_metrics}


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
