"""Floating-point operations and bytes of one environment step, counted from the algorithm.

Only matrix products count as operations: 2 per multiply-add. Environments, random numbers,
activation functions and optimisers are left out (about a tenth for a network of two layers of 64).

Bytes are those of a program that computes layer by layer: each product reads its operands and
writes its result once, everything elementwise is fused into it, and each gradient step reads and
writes the parameters and the state of the optimiser. A program that keeps the activations of
several layers on the chip needs fewer, and may exceed the roof that follows from these.

What an agent does beyond its algorithm is not counted: the critic is counted once per step of a
rollout, although the agents evaluate it a second time to bootstrap at time limits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from purejaxpg import envs

ADAM, RMSPROP = 2, 1  # moments per parameter
FLOAT = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations, and numbers that are read or written."""

    flops: float
    floats: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.floats + other.floats)

    def __rmul__(self, factor: float) -> "Work":
        return Work(factor * self.flops, factor * self.floats)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix product for one sample; a convolution is one, too."""

    inputs: int
    outputs: int
    macs: int  # multiply-adds
    weights: int  # bias included

    @property
    def product(self) -> Work:
        """Return the work of any of its three products: output, or gradient of either operand."""
        return Work(2 * self.macs, self.inputs + self.outputs)


@dataclasses.dataclass(frozen=True)
class Net:
    """Layers, one after the other."""

    layers: tuple[Layer, ...]

    @property
    def forward(self) -> Work:
        """Return the work of an evaluation of one sample."""
        return sum((layer.product for layer in self.layers), Work(0, 0))

    @property
    def backward(self) -> Work:
        """Return that of the gradient: of all weights, and of all inputs but the first layer's."""
        return self.forward + sum((layer.product for layer in self.layers[1:]), Work(0, 0))

    @property
    def learn(self) -> Work:
        """Return that of an evaluation and the gradient."""
        return self.forward + self.backward

    def input_gradient(self, columns: int) -> Work:
        """Return that of the gradient with respect to `columns` of the inputs, no weights."""
        first, *others = self.layers
        part = columns / first.inputs
        to_inputs = Work(2 * first.macs * part, columns + first.outputs)
        return to_inputs + sum((layer.product for layer in others), Work(0, 0))

    @property
    def weights(self) -> int:
        """Return the number of parameters."""
        return sum(layer.weights for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Count:
    """What the algorithm takes per environment step of one agent."""

    flops: float
    bytes: float
    samples: float  # gradient samples: how often a step is learnt from


def net(config: Any, inputs: int, outputs: int, torso: str | None = None) -> Net:
    """Return the layers of a torso as `networks.torso` makes it, with a head on it.

    Args:
        config: an agent's.
        inputs: size of an observation, or of observation and action.
        outputs: of the head.
        torso: "mlp" or "cnn"; None: the configuration's.
    """
    layers = []
    if (torso or config.torso) == "cnn":
        height, width, channels = envs.from_config(config).obs_shape
        places = (height - 2) * (width - 2)
        kernel = 9 * channels * 16
        layers.append(Layer(inputs, places * 16, places * kernel, kernel + 16))
        inputs = places * 16
    for size in (*config.hidden, outputs):
        layers.append(Layer(inputs, size, inputs * size, inputs * size + size))
        inputs = size
    return Net(tuple(layers))


def step_of_optimizer(weights: int, moments: int) -> Work:
    """Return the numbers that a gradient step moves apart from activations.

    Weights are read forward and backward, the gradient is written and read, and the weights and
    each moment are read and written: 4 + 2 (1 + moments) for each weight.
    """
    return Work(0, (4 + 2 * (1 + moments)) * weights)


def count(agent: str, config: Any) -> Count | None:
    """Return what an agent takes per environment step; None for one that is not known here."""
    found = KINDS.get(agent)
    if found is None:
        return None
    work, samples = found(config)
    return Count(work.flops, FLOAT * work.floats, samples)


def actor_and_critic(config: Any) -> tuple[Net, Net, Work]:
    """Return actor, critic, and the work of a rollout on a step.

    Both are evaluated once. The actor's weights are read at each step of the N environments, the
    critic's once for a whole rollout; the transition is written and read again.
    """
    env = envs.from_config(config)
    actor, critic = net(config, env.obs_size, env.action_size), net(config, env.obs_size, 1)
    weights = actor.weights / config.num_envs + critic.weights / config.steps_per_update
    numbers = 2 * env.obs_size + size_of_action(env) + 4  # and log-probability, reward, two flags
    return actor, critic, actor.forward + critic.forward + Work(0, weights + 2 * numbers)


def size_of_action(env: Any) -> int:
    """Return the numbers that an action takes when it is stored."""
    return 1 if env.discrete else env.action_size


def gathered(config: Any) -> Work:
    """Return what it takes to gather a sample into a minibatch: read it, write it."""
    env = envs.from_config(config)
    return Work(0, 2 * (env.obs_size + size_of_action(env) + 4))


def ppo(config: Any) -> tuple[Work, float]:
    """PPO: a rollout, then E epochs of M minibatches.

        F = F_π + F_V + E (F_π + B_π + F_V + B_V)

    F is a forward pass and B a backward pass without the gradient of the observation.
    """
    actor, critic, work = actor_and_critic(config)
    epochs, steps = config.num_epochs, config.num_epochs * config.num_minibatches
    work += epochs * (actor.learn + critic.learn + gathered(config))
    both = actor.weights + critic.weights
    work += steps / config.steps_per_update * step_of_optimizer(both, ADAM)
    return work, epochs


def a2c(config: Any) -> tuple[Work, float]:
    """A2C: a rollout, then one gradient step: F = 2 (F_π + F_V) + B_π + B_V."""
    actor, critic, work = actor_and_critic(config)
    both = step_of_optimizer(actor.weights + critic.weights, RMSPROP)
    return work + actor.learn + critic.learn + 1 / config.steps_per_update * both, 1


def reinforce(config: Any) -> tuple[Work, float]:
    """REINFORCE: an episode, one step of the policy, K steps of the baseline on all of it.

        F = F_π + F_V + (F_π + B_π) + K (F_V + B_V),    without a baseline F = 2 F_π + B_π

    Steps after the end of an episode are played and count.
    """
    actor, critic, work = actor_and_critic(config)
    per_step = 1 / config.steps_per_update
    fits = config.num_critic_steps
    work += actor.learn + per_step * step_of_optimizer(actor.weights, ADAM)
    if not config.baseline:
        return work + -1.0 * critic.forward, 1
    return work + fits * (critic.learn + per_step * step_of_optimizer(critic.weights, ADAM)), 1


def npg(config: Any) -> tuple[Work, float]:
    """NPG: a rollout, a gradient, I + 1 products with the Fisher information, the critic's epochs.

        F = F_π + F_V + (F_π + B_π) + 2 (I + 1) B_π + E (F_V + B_V)

    A product is one pass of tangents and one of cotangents through the linearised network, each
    with the products of B_π. Conjugate gradient moves ten numbers per weight and iteration: the
    weights twice, and each of four vectors in and out.
    """
    actor, critic, work = actor_and_critic(config)
    per_step, products = 1 / config.steps_per_update, config.cg_iters + 1
    work += actor.learn + products * (2.0 * actor.backward)
    work += per_step * Work(0, 10 * products * actor.weights)
    epochs, steps = config.num_epochs, config.num_epochs * config.num_minibatches
    work += epochs * (critic.learn + gathered(config))
    return work + steps * per_step * step_of_optimizer(critic.weights, ADAM), 1


def trpo(config: Any) -> tuple[Work, float]:
    """TRPO: NPG, and a line search that takes the first candidate: one more F_π."""
    work, samples = npg(config)
    actor, _, _ = actor_and_critic(config)
    return work + actor.forward, samples


def replayed(config: Any) -> tuple[Work, float]:
    """Return what it takes to store a step and to sample it, and samples per step.

    A sample is read from the buffer and written into the minibatch.
    """
    env = envs.from_config(config)
    numbers = 2 * env.obs_size + size_of_action(env) + 2
    samples = config.num_gradient_steps * config.batch_size / config.steps_per_update
    return Work(0, numbers + 2 * samples * numbers), samples


def ddpg(config: Any) -> tuple[Work, float]:
    """DDPG: a step of the policy, then s samples of the buffer, each through four networks.

        F = F_π + s (F_π' + F_Q' + (F_Q + B_Q) + (F_π + B_π) + F_Q + ∂Q/∂a)

    Weights per gradient step: the optimisers', the targets' (moved by tau, and read once), and the
    critic's twice more for the actor.
    """
    env = envs.from_config(config)
    actions = env.action_size
    actor, critic = net(config, env.obs_size, actions), net(config, env.obs_size + actions, 1)
    work, samples = replayed(config)
    each = 2.0 * actor.forward + 3.0 * critic.forward + actor.backward + critic.backward
    work += actor.forward + Work(0, actor.weights / config.num_envs)
    work += samples * (each + critic.input_gradient(actions))
    both = actor.weights + critic.weights
    moved = step_of_optimizer(both, ADAM) + Work(0, 4 * both + 2 * critic.weights)
    return work + config.num_gradient_steps / config.steps_per_update * moved, samples


def sac(config: Any) -> tuple[Work, float]:
    """SAC: a step of the policy, then s samples of the buffer, with two critics.

        F = F_π + s (F_π + 2 F_Q' + 2 (F_Q + B_Q) + (F_π + B_π) + 2 F_Q + 2 ∂Q/∂a)

    For discrete actions Q has an output per action and its gradient ∂Q/∂a is not needed.
    """
    env = envs.from_config(config)
    actions = env.action_size
    if env.discrete:
        actor, critic = (net(config, env.obs_size, actions) for _ in range(2))
        through = Work(0, 0)
    else:
        actor = net(config, env.obs_size, 2 * actions)
        critic = net(config, env.obs_size + actions, 1, "mlp")
        through = 2.0 * critic.input_gradient(actions)
    work, samples = replayed(config)
    each = 2.0 * actor.forward + actor.backward + 6.0 * critic.forward + 2.0 * critic.backward
    work += actor.forward + Work(0, actor.weights / config.num_envs)
    work += samples * (each + through)
    both = actor.weights + 2 * critic.weights
    moved = step_of_optimizer(both, ADAM) + Work(0, actor.weights + 12 * critic.weights)
    return work + config.num_gradient_steps / config.steps_per_update * moved, samples


KINDS: dict[str, Callable[[Any], tuple[Work, float]]] = {
    "reinforce": reinforce,
    "a2c": a2c,
    "npg": npg,
    "trpo": trpo,
    "ppo": ppo,
    "ddpg": ddpg,
    "sac": sac,
}


def seconds_at_roof(found: Count, gflops: float, gb_per_s: float) -> float:
    """Return the least time of an environment step on a machine with this roof."""
    return max(found.flops / (1e9 * gflops), found.bytes / (1e9 * gb_per_s))
