"""Parts of an independent second version of an agent's update, in NumPy or in 64 bits.

Nothing here calls the code of an agent, a kernel, a normaliser or optax. Arrays are float64, time
comes first, [T, N, ...]; parameters are vectors [P], in the order of `jax.tree.leaves`.

A test registers the task below, runs the agent with `trained`, plays the same game in a `World`
with the same random numbers, and compares the two with `assert_close`. The task is deterministic,
so only the random stream of the policy must be mirrored. Keys and draws belong outside of
`jax.enable_x64`, which changes the number of random bits.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import quick
from flax import struct
from gymnax.environments import environment, spaces
from jax import flatten_util, lax, random

from purejaxpg import envs, prng

Array = np.ndarray | jax.Array

# --- the task ------------------------------------------------------------------------------------

START = np.array([0.1, -0.2, 0.3])
# A contraction: rounding errors decay, so the agent and the loop stay together.
DRIFT = np.array([[0.6, -0.3, 0.2], [0.3, 0.5, -0.2], [-0.2, 0.4, 0.6]])
PULL = np.array([[0.9, 0.2], [-0.3, 0.8], [0.4, -0.6]])
SHIFT = np.array([0.1, 0.05, -0.1])
WORTH = np.array([1.0, -0.7, 0.4])
GOAL = 0.95  # an episode terminates where the first coordinate exceeds it
CHOICES = np.array([[-0.8, 0.5], [0.3, -0.9], [0.6, 0.3]])  # the force of each discrete action
LOW, HIGH = np.array([-1.0, -0.5]), np.array([0.8, 1.5])  # bounds of the continuous ones
LIMIT = 4  # steps until an episode is truncated
NAMES = {True: "rederive/discrete", False: "rederive/continuous"}  # by `discrete`


@struct.dataclass
class Params:
    """The settings that `env_params` may change."""

    max_steps_in_episode: int = LIMIT
    push: float = 1.0  # factor on the effect of an action


@struct.dataclass
class State:
    """The observation is the whole state, except for the time."""

    obs: jax.Array  # [3]
    time: jax.Array  # []


def outcome(obs: Array, force: Array, push: Any) -> tuple[Any, Any, Any]:
    """Dynamics [..., 3], [..., 2] -> next observation [..., 3], reward and terminated [...]."""
    following = obs @ DRIFT.T + push * force @ PULL.T + SHIFT
    reward = following @ WORTH + 0.5 * obs[..., 1] * force[..., 0] + 0.2
    return following, reward, following[..., 0] > GOAL


class Task(environment.Environment):
    """For gymnax: every episode starts alike, so environments differ only by their actions."""

    discrete = True

    @property
    def default_params(self) -> Params:
        return Params()

    def reset_env(self, key: jax.Array, params: Params) -> tuple[jax.Array, State]:
        return jnp.asarray(START), State(jnp.asarray(START), jnp.zeros((), jnp.int32))

    def step_env(self, key: jax.Array, state: State, action: Any, params: Params) -> Any:
        force = jnp.asarray(CHOICES)[action] if self.discrete else action
        obs, reward, terminated = outcome(state.obs, force, params.push)
        return obs, State(obs, state.time + 1), reward, terminated, {}

    def action_space(self, params: Any = None) -> Any:
        if self.discrete:
            return spaces.Discrete(len(CHOICES))
        return spaces.Box(jnp.asarray(LOW), jnp.asarray(HIGH), (2,))

    def observation_space(self, params: Any) -> Any:
        return spaces.Box(-10.0, 10.0, (3,))


class ContinuousTask(Task):
    discrete = False


def register() -> None:
    """Register the task under the two `NAMES`."""
    envs.register(NAMES[True], Task)
    envs.register(NAMES[False], ContinuousTask)


class Row(NamedTuple):
    """One step of N environments, or T of them stacked."""

    obs: np.ndarray  # [N, 3]
    action: np.ndarray  # [N] or [N, 2], not clipped
    reward: np.ndarray  # [N]
    terminated: np.ndarray  # [N] bool
    done: np.ndarray  # [N] bool, terminated or at the time limit
    next_obs: np.ndarray  # [N, 3] before the reset
    ended_return: np.ndarray  # [N] of the episode that ended with this step, else 0
    ended_length: np.ndarray  # [N] likewise


class World:
    """N environments in NumPy. `obs`, `time` and `total` are those after any reset."""

    def __init__(self, num_envs: int, discrete: bool, env_params: Mapping[str, float]) -> None:
        self.discrete = discrete
        self.push = env_params.get("push", 1.0)
        self.limit = env_params.get("max_steps_in_episode", LIMIT)
        self.obs = np.tile(START, (num_envs, 1))
        self.time = np.zeros(num_envs, int)
        self.total = np.zeros(num_envs)  # reward of the episode in progress

    def step(self, action: Array) -> Row:
        obs, action = self.obs, np.asarray(action)
        force = CHOICES[action] if self.discrete else np.clip(action, LOW, HIGH)
        next_obs, reward, terminated = outcome(obs, force, self.push)
        self.time, self.total = self.time + 1, self.total + reward
        done = terminated | (self.time >= self.limit)
        ended = np.where(done, self.total, 0.0), np.where(done, self.time, 0)
        self.obs = np.where(done[:, None], START, next_obs)
        self.time, self.total = np.where(done, 0, self.time), np.where(done, 0.0, self.total)
        return Row(obs, action, reward, terminated, done, next_obs, *ended)


def stacked(rows: list[Row]) -> Row:
    """T rows -> one, with T as the first axis."""
    return Row(*(np.stack(column) for column in zip(*rows, strict=True)))


def episode_metrics(rows: Row, where: Any = True) -> dict[str, float]:
    """Every agent's metrics of the episodes that ended in these rows."""
    ended = rows.done & where
    return {
        "episode/return_sum": rows.ended_return[ended].sum(),
        "episode/length_sum": rows.ended_length[ended].sum(),
        "episode/count": ended.sum(),
    }


# --- networks and policies -----------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh,
    "relu": lambda x: jnp.maximum(x, 0.0),
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
}


def in_64_bits(function: Callable[..., Any], static: tuple[int, ...] = ()) -> Callable[..., Any]:
    """Compile `function` in float64, from and to NumPy arrays."""
    compiled = jax.jit(function, static_argnums=static, compiler_options=quick.OPTIONS)

    def double(x: Any) -> Any:
        return np.asarray(x, np.float64) if np.asarray(x).dtype.kind == "f" else np.asarray(x)

    @functools.wraps(function)
    def called(*args: Any) -> Any:
        wide = [x if i in static else jax.tree.map(double, x) for i, x in enumerate(args)]
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, compiled(*wide))

    return called


def mlp(variables: Any, x: Any, activation: str = "tanh") -> jax.Array:
    """A torso of fully connected layers and one linear head [..., D] -> [..., A]."""
    layers = variables["params"]
    for i in range(len(layers["torso"])):
        layer = layers["torso"][f"Dense_{i}"]
        x = ACTIVATIONS[activation](x @ layer["kernel"] + layer["bias"])
    return x @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"]


class Policy(NamedTuple):
    """The output of an actor: logits [..., A], or with `log_std` [A] the mean of a Gaussian."""

    output: Any
    log_std: Any = None


def policy(actor: Any, obs: Any, activation: str = "tanh") -> Policy:
    """The policy of an actor with a softmax, or with a state-independent parameter `log_std`."""
    return Policy(mlp(actor, obs, activation), actor["params"].get("log_std"))


def value(critic: Any, obs: Any, activation: str = "tanh") -> jax.Array:
    """The value head of a critic [..., D] -> [...]."""
    return mlp(critic, obs, activation)[..., 0]


policy_in_64_bits = in_64_bits(policy, static=(2,))
value_in_64_bits = in_64_bits(value, static=(2,))


def sample(key: jax.Array, policy: Policy) -> np.ndarray:
    """Draw actions, from the float32 numbers that the agent draws."""
    if policy.log_std is None:
        logits = jnp.asarray(np.asarray(policy.output, np.float32))
        return np.asarray(random.categorical(key, logits))
    noise = random.normal(key, policy.output.shape, jnp.float32)
    return np.asarray(policy.output) + np.exp(policy.log_std) * np.asarray(noise, np.float64)


def log_softmax(logits: Any) -> jax.Array:
    return logits - jnp.log(jnp.sum(jnp.exp(logits), -1, keepdims=True))


def log_prob(policy: Policy, action: Any) -> jax.Array:
    """[...] log π(a|s)."""
    mean, log_std = policy
    if log_std is None:
        return jnp.take_along_axis(log_softmax(mean), action[..., None], -1)[..., 0]
    density = -((action - mean) ** 2) / (2.0 * jnp.exp(log_std) ** 2) - log_std
    return jnp.sum(density - 0.5 * jnp.log(2.0 * jnp.pi), -1)


def entropy(policy: Policy) -> jax.Array:
    """[...] in nats."""
    mean, log_std = policy
    if log_std is None:
        return -jnp.sum(jnp.exp(log_softmax(mean)) * log_softmax(mean), -1)
    return jnp.sum(log_std + 0.5 * jnp.log(2.0 * jnp.pi * jnp.e) + 0.0 * mean, -1)


def kl(p: Policy, q: Policy) -> jax.Array:
    """[...] KL(p ‖ q) in nats."""
    if p.log_std is None:
        log_p, log_q = log_softmax(p.output), log_softmax(q.output)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    var_p, var_q = jnp.exp(2.0 * p.log_std), jnp.exp(2.0 * q.log_std)
    spread = (var_p + (p.output - q.output) ** 2) / (2.0 * var_q)
    return jnp.sum(q.log_std - p.log_std + spread - 0.5, -1)


def flat(tree: Any) -> np.ndarray:
    """All leaves as one float64 vector."""
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def like(vector: np.ndarray, tree: Any) -> Any:
    """The inverse of `flat`: a tree of the structure and shapes of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([np.size(x) for x in leaves])[:-1]
    pieces = zip(np.split(vector, ends), leaves, strict=True)
    return jax.tree.unflatten(structure, [piece.reshape(np.shape(x)) for piece, x in pieces])


# --- optimisers ----------------------------------------------------------------------------------


def clipped(gradient: np.ndarray, max_norm: float) -> np.ndarray:
    """A gradient of at most that Euclidean norm, over all parameters together."""
    norm = np.sqrt(np.sum(gradient**2))
    return gradient * max_norm / norm if norm > max_norm else gradient


class Adam:
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, eps: float) -> None:
        self.eps, self.count = eps, 0
        self.mu: Any = 0.0
        self.nu: Any = 0.0

    def step(self, gradient: np.ndarray, rate: float) -> np.ndarray:
        """Update the moments with a gradient -> change of the parameters."""
        self.count += 1
        self.mu = 0.9 * self.mu + 0.1 * gradient
        self.nu = 0.999 * self.nu + 0.001 * gradient**2
        mean, square = self.mu / (1.0 - 0.9**self.count), self.nu / (1.0 - 0.999**self.count)
        return -rate * mean / (np.sqrt(square) + self.eps)

    def assert_close(self, opt_state: Any, what: str) -> None:
        (moments,) = members(opt_state, optax.ScaleByAdamState)
        assert int(moments.count) == self.count, what
        assert_close(flat(moments.mu), self.mu, f"{what}: first moment of Adam")
        assert_close(flat(moments.nu), self.nu, f"{what}: second moment of Adam")


class RmsProp:
    """Tieleman and Hinton 2012, with ε under the root."""

    def __init__(self, decay: float, eps: float, start: float) -> None:
        self.decay, self.eps = decay, eps
        self.nu: Any = start

    def step(self, gradient: np.ndarray, rate: float) -> np.ndarray:
        """Update the moments with a gradient -> change of the parameters."""
        self.nu = self.decay * self.nu + (1.0 - self.decay) * gradient**2
        return -rate * gradient / np.sqrt(self.nu + self.eps)

    def assert_close(self, opt_state: Any, what: str) -> None:
        (moments,) = members(opt_state, optax.ScaleByRmsState)
        assert_close(flat(moments.nu), self.nu, f"{what}: mean square of RMSprop")


def members(tree: Any, kind: type) -> list[Any]:
    """All parts of a tree that are of that class."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def rate(config: Any, learning_rate: float, finished: int) -> float:
    """The learning rate after `finished` updates, by `learning_rate_schedule`."""
    half_life = config.learning_rate_half_life
    factors = {
        "constant": 1.0,
        "linear": max(1.0 - finished / config.num_updates, 0.0),
        "robbins_monro": half_life / (half_life + finished),
    }
    return learning_rate * factors[config.learning_rate_schedule]


# --- returns and normalisers ---------------------------------------------------------------------


def gae(
    reward: np.ndarray, value: np.ndarray, next_value: np.ndarray, terminated: np.ndarray,
    done: np.ndarray, gamma: float, gae_lambda: float,
) -> np.ndarray:  # fmt: skip
    """Generalised advantages [T, N]: sums of (γλ)^k δ_{t+k} up to the end of the episode."""
    steps, count = reward.shape
    advantage = np.zeros((steps, count))
    for t, n in np.ndindex(steps, count):
        for k in range(steps - t):
            now = t + k, n
            following = 0.0 if terminated[now] else next_value[now]
            delta = reward[now] + gamma * following - value[now]
            advantage[t, n] += (gamma * gae_lambda) ** k * delta
            if done[now]:
                break
    return advantage


def standardised(x: np.ndarray, where: Any = True) -> np.ndarray:
    """To mean 0 and variance 1 over the entries in `where`."""
    chosen = x[np.broadcast_to(where, x.shape)]
    return (x - chosen.mean()) / (chosen.std() + 1e-8)


class Moments:
    """Mean and variance of everything seen so far, all of which is stored."""

    def __init__(self, size: int) -> None:
        self.seen = np.zeros((0, size))

    def see(self, x: np.ndarray) -> None:
        self.seen = np.concatenate([self.seen, x.reshape(-1, self.seen.shape[1])])

    @property
    def mean(self) -> np.ndarray:
        return self.seen.mean(0) if len(self.seen) else np.zeros(self.seen.shape[1])

    @property
    def var(self) -> np.ndarray:
        return self.seen.var(0) if len(self.seen) else np.ones(self.seen.shape[1])

    def assert_close(self, moments: Any, what: str) -> None:
        assert float(moments.count) == len(self.seen), what
        assert_close(np.reshape(moments.mean, -1), self.mean, f"{what}: mean")
        assert_close(np.reshape(moments.var, -1), self.var, f"{what}: variance")


class Normalizers:
    """Statistics of observations and of discounted sums of rewards, used as `config` says."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.obs = Moments(3)
        self.sums = Moments(1)
        self.running = np.zeros(config.num_envs)

    def seen(self, obs: np.ndarray) -> np.ndarray:
        """Normalise observations for the networks, by the statistics so far."""
        if not self.config.normalize_obs:
            return obs
        scaled = (obs - self.obs.mean) / np.sqrt(self.obs.var + 1e-8)
        return np.clip(scaled, -self.config.clip_obs, self.config.clip_obs)

    def observe(self, obs: np.ndarray) -> None:
        if self.config.normalize_obs:
            self.obs.see(obs)

    def rewards(self, reward: np.ndarray, done: np.ndarray, where: Any = True) -> np.ndarray:
        """Update the statistics with raw rewards [T, N] -> normalised, scaled and clipped."""
        config = self.config
        if config.normalize_reward:
            sums = np.zeros(reward.shape)
            for t in range(len(reward)):
                sums[t] = reward[t] + config.gamma * self.running
                self.running = np.where(done[t], 0.0, sums[t])
            self.sums.see(sums[np.broadcast_to(where, sums.shape)])
            reward = reward / np.sqrt(self.sums.var + 1e-8)
        return np.clip(config.reward_scale * reward, -config.clip_reward, config.clip_reward)

    def assert_close(self, normalizers: Any, what: str) -> None:
        self.obs.assert_close(normalizers.obs, f"{what}: observations")
        self.sums.assert_close(normalizers.reward.moments, f"{what}: sums of rewards")
        assert_close(normalizers.reward.running, self.running, f"{what}: sums in progress")


def play(key: jax.Array, act: Callable[[np.ndarray], Policy], world: World, steps: int) -> Row:
    """Play T more steps in a world -> [T, N], like agents that keep their environments."""
    rows = []
    for now in random.split(key, steps):
        key_action, _ = random.split(now)
        rows.append(world.step(sample(key_action, act(world.obs))))
    return stacked(rows)


class Batch(NamedTuple):
    """The data that an on-policy agent learns from; B = T N, time first."""

    obs: np.ndarray  # [B, 3] normalised
    action: np.ndarray  # [B] or [B, 2]
    advantage: np.ndarray  # [B]
    target: np.ndarray  # [B]


class OnPolicy:
    """The common parts of A2C, NPG, TRPO and PPO, from the state of `init` on."""

    def __init__(self, key: jax.Array, start: Any, config: Any) -> None:
        self.config, self.params = config, start.params
        self.normalizers = Normalizers(config)
        self.finished = 0  # updates
        if config.normalize_obs:
            *_, key_moments = random.split(random.fold_in(key, 0), 4)
            self.normalizers.observe(self._played(key_moments, self._fresh_world()).obs)
        self.world = self._fresh_world()

    def _fresh_world(self) -> World:
        config = self.config
        return World(config.num_envs, config.env == NAMES[True], config.env_params)

    def _played(self, key: jax.Array, world: World) -> Row:
        def act(obs: np.ndarray) -> Policy:
            seen = self.normalizers.seen(obs)
            return policy_in_64_bits(self.params["actor"], seen, self.config.activation)

        return play(key, act, world, self.config.num_steps)

    def collect(self, key: jax.Array) -> tuple[Batch, dict[str, float]]:
        """Play on -> data to learn from, and the metrics of the ended episodes."""
        config, critic = self.config, self.params["critic"]
        rows = self._played(key, self.world)
        obs, next_obs = self.normalizers.seen(rows.obs), self.normalizers.seen(rows.next_obs)
        reward = self.normalizers.rewards(rows.reward, rows.done)
        self.normalizers.observe(rows.obs)
        value = value_in_64_bits(critic, obs, config.activation)
        next_value = value_in_64_bits(critic, next_obs, config.activation)
        flags = rows.terminated, rows.done
        advantage = gae(reward, value, next_value, *flags, config.gamma, config.gae_lambda)
        target = advantage + value
        if getattr(config, "normalize_advantage", False):
            advantage = standardised(advantage)
        obs, action = (x.reshape(-1, *x.shape[2:]) for x in (obs, rows.action))
        return Batch(obs, action, advantage.ravel(), target.ravel()), episode_metrics(rows)

    def assert_close(self, state: Any, what: str) -> None:
        """Compare parameters, normalisers, environments and the counter, but not optimisers."""
        assert_close(flat(state.params), flat(self.params), f"{what}: parameters")
        self.normalizers.assert_close(state.normalizers, what)
        assert_world(state, self.world, what)
        assert int(state.num_updates) == self.finished, what


# --- common parts of NPG and TRPO ----------------------------------------------------------------


def _curvature(actor: Any, obs: Any, activation: str) -> jax.Array:
    params, tree = flatten_util.ravel_pytree(actor)

    def outputs(params: jax.Array) -> Policy:
        return policy(tree(params), obs, activation)

    if outputs(params).log_std is None:
        log_probs = log_softmax(outputs(params).output)
        score = jax.jacobian(lambda params: log_softmax(outputs(params).output))(params)
        return jnp.einsum("ba,bap,baq->pq", jnp.exp(log_probs), score, score) / len(obs)
    mean, log_std = jax.jacobian(outputs)(params)
    precision = jnp.exp(-2.0 * outputs(params).log_std)
    of_mean = jnp.einsum("a,bap,baq->pq", precision, mean, mean) / len(obs)
    return of_mean + 2.0 * log_std.T @ log_std


def _score(actor: Any, batch: Batch, activation: str) -> Any:
    def gain(actor: Any) -> jax.Array:
        chosen = log_prob(policy(actor, batch.obs, activation), batch.action)
        return (batch.advantage * chosen).mean()

    return jax.value_and_grad(gain)(actor)


def _measures(new: Any, old: Any, batch: Batch, activation: str) -> dict[str, jax.Array]:
    before, after = (policy(actor, batch.obs, activation) for actor in (old, new))
    ratio = jnp.exp(log_prob(after, batch.action) - log_prob(before, batch.action))
    return {"surrogate": (ratio * batch.advantage).mean(), "kl": kl(before, after).mean()}


def _value_loss(critic: Any, batch: Batch, activation: str) -> jax.Array:
    return (0.5 * (value(critic, batch.obs, activation) - batch.target) ** 2).mean()


# E_s[Σ_a π ∇log π ∇log πᵀ], in full [P, P]; for a Gaussian the sum over actions in closed form.
fisher = in_64_bits(_curvature, static=(2,))
# E[A log π(a|s)] and its gradient with respect to the actor.
score = in_64_bits(_score, static=(2,))
# For a new actor and the acting one: E[r A], and the mean of KL(π_old ‖ π_new).
measures = in_64_bits(_measures, static=(3,))
_value_slope = in_64_bits(jax.value_and_grad(_value_loss), static=(2,))


def conjugate_gradient(matrix: np.ndarray, b: np.ndarray, iterations: int) -> np.ndarray:
    """Hestenes and Stiefel 1952: `iterations` steps from zero towards the x with matrix x = b."""
    x, residual, direction = np.zeros_like(b), b, b
    for _ in range(iterations):
        length = residual @ residual / (direction @ matrix @ direction)
        x = x + length * direction
        shorter = residual - length * matrix @ direction
        direction = shorter + (shorter @ shorter) / (residual @ residual) * direction
        residual = shorter
    return x


class NaturalGradient(OnPolicy):
    """An on-policy agent whose critic takes epochs of minibatches, after the actor's `step`."""

    def __init__(self, key: jax.Array, start: Any, config: Any) -> None:
        super().__init__(key, start, config)
        self.optimizer = Adam(eps=1e-5)

    def step(self, batch: Batch) -> tuple[np.ndarray, dict[str, float]]:
        """Actor -> its new parameters [P], and metrics."""
        raise NotImplementedError

    def update(self, key: jax.Array) -> dict[str, float]:
        key_rollout, key_shuffle = random.split(key)
        batch, episodes = self.collect(key_rollout)
        new, metrics = self.step(batch)
        loss = self.fit_critic(key_shuffle, batch)
        self.params = {**self.params, "actor": like(new, self.params["actor"])}
        self.finished += 1
        return {**episodes, **metrics, "loss/value": loss}

    def fit_critic(self, key: jax.Array, batch: Batch) -> float:
        """Minibatch steps of Adam on the squared error -> its mean over them."""
        config, critic, losses = self.config, self.params["critic"], []
        for now in random.split(key, config.num_epochs):
            order = np.asarray(prng.permutation(now, len(batch.target)))
            for chosen in np.split(order, config.num_minibatches):
                picked = Batch(*(x[chosen] for x in batch))
                loss, gradient = _value_slope(critic, picked, config.activation)
                gradient = clipped(flat(gradient), config.max_grad_norm)
                now_rate = rate(config, config.critic_learning_rate, self.finished)
                change = self.optimizer.step(gradient, now_rate)
                critic = like(flat(critic) + change, critic)
                losses.append(loss)
        self.params = {**self.params, "critic": critic}
        return float(np.mean(losses))

    def assert_close(self, state: Any, what: str) -> None:
        super().assert_close(state, what)
        self.optimizer.assert_close(state.opt_state, what)


# --- the agent, and comparing --------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 3), compiler_options=quick.OPTIONS)
def _trained(agent: types.ModuleType, key: jax.Array, config: Any, updates: int) -> Any:
    def step(state: Any, u: jax.Array) -> Any:
        state, metrics = agent.update(random.fold_in(key, u), state, config)
        return state, (state, metrics)

    start = agent.init(random.fold_in(key, 0), config)
    return start, lax.scan(step, start, jnp.arange(1, updates + 1))[1]


def trained(
    agent: types.ModuleType, key: jax.Array, config: Any, updates: int = 3
) -> tuple[list[Any], list[dict[str, np.ndarray]]]:
    """Run the agent itself -> its states after 0, 1, ... updates, and the metrics of each."""
    agent.check(config)
    start, rest = jax.device_get(_trained(agent, key, config, updates))
    rows = [jax.tree.map(lambda x, i=i: x[i], rest) for i in range(updates)]
    return [start, *(state for state, _ in rows)], [metrics for _, metrics in rows]


def assert_close(got: Any, wanted: Any, what: str, tolerance: float = 1e-5) -> None:
    """Compare two arrays: no entry may be off by more than `tolerance` of the largest."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    wanted = np.broadcast_to(wanted, got.shape) if wanted.ndim == 0 else wanted
    assert got.shape == wanted.shape, f"{what}: {got.shape} and not {wanted.shape}"
    size = np.abs(wanted).max(initial=0.0)
    error = np.abs(got - wanted).max(initial=0.0)
    assert error <= tolerance * size, f"{what}: off by {error:.1e}, the largest being {size:.1e}"


def assert_three_updates(
    agent: types.ModuleType, rederived: Callable[[jax.Array, Any, Any], Any], config: Any,
    keys: int = 4,
) -> Any:  # fmt: skip
    """Run both, comparing after each update -> the rederived agent.

    `init` splits its key into `keys`. The last three are those of the networks and the moments.
    """
    key = random.key(3)
    assert config.num_updates == 3  # the length of a linear schedule
    states, metrics = trained(agent, key, config)
    assert_initial(agent, key, states[0].params, config, keys)
    expected = rederived(key, states[0], config)
    expected.assert_close(states[0], "start")
    for u in (1, 2, 3):
        wanted = expected.update(random.fold_in(key, u))
        assert_metrics(metrics[u - 1], wanted, f"update {u}")
        expected.assert_close(states[u], f"update {u}")
    assert_acts(agent, states[-1], expected)
    return expected


def assert_acts(agent: types.ModuleType, state: Any, rederived: Any) -> None:
    """Compare the actions of `agent.policy`, sampled and greedy, for the state of `rederived`."""
    obs = np.random.default_rng(0).normal(size=(6, 3))
    actor, config = rederived.params["actor"], rederived.config
    own = policy_in_64_bits(actor, rederived.normalizers.seen(obs), config.activation)
    best = own.output.argmax(-1) if own.log_std is None else own.output
    acts = jax.jit(agent.policy, static_argnums=4, compiler_options=quick.OPTIONS)
    for greedy, wanted in (((), sample(random.key(4), own)), ((True,), best)):
        got = acts(random.key(4), state, jnp.asarray(obs), config, *greedy)
        np.testing.assert_allclose(got, wanted, 1e-5, 1e-5, err_msg=f"greedy: {greedy}")


def assert_trains(agent: types.ModuleType, config: Any, monkeypatch: Any) -> None:
    """Check that `train` calls `init` and then `update`, each with its own key folded."""
    monkeypatch.setattr(agent, "init", lambda key, config: random.key_data(key))
    monkeypatch.setattr(
        agent, "update", lambda key, *rest: (rest[0], {"key": random.key_data(key)})
    )
    key = random.key(5)
    state, metrics = agent.train(key, config)
    folded = [random.key_data(random.fold_in(key, u)) for u in range(config.num_updates + 1)]
    np.testing.assert_array_equal(state, folded[0])
    np.testing.assert_array_equal(metrics["key"], np.stack(folded[1:]))


def assert_initial(
    agent: types.ModuleType, key: jax.Array, params: Any, config: Any, keys: int
) -> None:
    """Check the key of each network, and the size of its head."""
    *_, key_actor, key_critic, _ = random.split(random.fold_in(key, 0), keys)
    for name, module, own in (
        ("actor", agent.Actor, key_actor), ("critic", agent.Critic, key_critic),
    ):  # fmt: skip
        start = jax.jit(module(config).init, compiler_options=quick.OPTIONS)(own, jnp.zeros((1, 3)))
        assert_close(flat(params[name]), flat(start), f"{name}: initial parameters")
    actor, critic = params["actor"]["params"], params["critic"]["params"]
    for layers, scale in ((actor, 0.01), (critic, 1.0)):
        kernel = np.asarray(layers["Dense_0"]["kernel"], np.float64)
        square = scale**2 * np.eye(kernel.shape[1])
        assert np.allclose(kernel.T @ kernel, square, 1e-5, 1e-9) == config.orthogonal_init
    assert np.all(
        actor.get("log_std", config.initial_log_std) == np.float32(config.initial_log_std)
    )


def assert_metrics(got: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Compare metrics by name, each to 1e-5 of itself or of one."""
    assert set(got) == set(wanted), what
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, 1e-5, 1e-5, err_msg=f"{what}: {name}")


def assert_world(state: Any, world: World, what: str) -> None:
    """Compare the environments that an agent carries from update to update."""
    running = state.env_state
    assert_close(state.obs, world.obs, f"{what}: observation")
    assert_close(running.inner.obs, world.obs, f"{what}: state of the environment")
    assert_close(running.episode_return, world.total, f"{what}: return so far")
    for got in (running.inner.time, running.episode_length):
        np.testing.assert_array_equal(got, world.time, err_msg=what)
