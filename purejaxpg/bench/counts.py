"""Floating-point operations and bytes of one step, counted from the algorithm.

A step is one of an environment, or a token in the unit of a trainer of language models: of the
completions of an update, padding included; of SFT's rows, with their prompts.

Only matrix products count as operations: 2 per multiply-add. Environments, random numbers,
activation functions and optimisers are left out (about a tenth for a network of two layers of 64).

Bytes are those of a program that computes layer by layer: each product reads its operands and
writes its result once, everything elementwise is fused into it, and each gradient step reads and
writes the parameters and the state of the optimiser. A program that keeps the activations of
several layers on the chip needs fewer bytes and may exceed this roof.

A transformer with N weights in its products takes 2 N + 4 n H S operations for a token in a
sequence of S, with n layers and a width of H of all heads together, and three times as many with
its gradient: the model FLOPs of Chowdhery et al. 2022, arXiv:2204.02311, appendix B. The table of
the embedding is looked up and takes none. Padded and masked tokens count: they are computed.

What an agent does beyond its algorithm is not counted: the critic is counted once per step of a
rollout, although the agents evaluate it a second time to bootstrap at time limits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from purejaxpg import envs, trainers

ADAM, RMSPROP = 2, 1  # moments per parameter
FLOAT = 4  # bytes

Work = np.ndarray  # [2]: operations, and numbers that are read or written


def work(flops: float, floats: float) -> Work:
    """Return a pair that can be added and scaled."""
    return np.array((flops, floats), dtype=float)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix product for one sample; a convolution counts as one."""

    inputs: int
    outputs: int
    macs: int  # multiply-adds
    weights: int  # bias included

    @property
    def product(self) -> Work:
        """Work of any of its three products: output, or gradient of either operand."""
        return work(2 * self.macs, self.inputs + self.outputs)


@dataclasses.dataclass(frozen=True)
class Net:
    """Layers, one after the other."""

    layers: tuple[Layer, ...]

    @property
    def weights(self) -> int:
        """Number of parameters."""
        return sum(layer.weights for layer in self.layers)

    @property
    def forward(self) -> Work:
        """Work of evaluating one sample."""
        return sum((layer.product for layer in self.layers), work(0, 0))

    @property
    def backward(self) -> Work:
        """Work of the gradient: of all weights, and of all inputs but the first layer's."""
        return 2 * self.forward - self.layers[0].product

    @property
    def learn(self) -> Work:
        """Work of an evaluation and its gradient."""
        return self.forward + self.backward

    def input_gradient(self, columns: int) -> Work:
        """Return the work of the gradient of `columns` of the inputs, without any weights."""
        first, *others = self.layers
        to_inputs = work(2 * first.macs * columns / first.inputs, columns + first.outputs)
        return to_inputs + Net(tuple(others)).forward


@dataclasses.dataclass(frozen=True)
class Count:
    """What the algorithm takes per step of one agent."""

    flops: float
    bytes: float
    samples: float  # gradient samples: how often each step is learnt from
    generated: float = 0.0  # of a language model: tokens that are sampled, per token of its unit


def net(config: Any, inputs: int, outputs: int, torso: str | None = None) -> Net:
    """Return the layers of a torso as `networks.torso` makes it, a GRU if any, and a head.

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
    for size in config.hidden:
        layers.append(Layer(inputs, size, inputs * size, inputs * size + size))
        inputs = size
    memory = getattr(config, "memory_size", 0)
    if memory:  # a GRU: products of its input and of its memory with the weights of three gates
        gates = 3 * memory
        layers.append(Layer(inputs, gates, inputs * gates, inputs * gates + gates))
        layers.append(Layer(memory, gates, memory * gates, memory * gates + memory))
        inputs = memory
    layers.append(Layer(inputs, outputs, inputs * outputs, inputs * outputs + outputs))
    return Net(tuple(layers))


def step_of_optimizer(weights: int, moments: int) -> Work:
    """Return the numbers that a gradient step moves apart from activations.

    Weights are read forward and backward, the gradient is written and read, and the weights and
    each moment are read and written: 4 + 2 (1 + moments) for each weight.
    """
    return work(0, (4 + 2 * (1 + moments)) * weights)


def count(agent: str, config: Any, *given: Any) -> Count | None:
    """Return what an agent takes per step; None for an agent that is not known here.

    Args:
        agent: its name.
        config: its configuration.
        given: the arrays that a run is given, if there are any.
    """
    if agent not in {**KINDS, **LANGUAGE}:
        return None
    if agent in KINDS:
        total, samples = KINDS[agent](config)
        return Count(float(total[0]), FLOAT * float(total[1]), samples)
    total, samples, generated = LANGUAGE[agent](config, *given)
    return Count(float(total[0]), FLOAT * float(total[1]), samples, generated)


def actor_and_critic(config: Any) -> tuple[Net, Net, Work]:
    """Return actor, critic, and the work of a rollout on a step.

    Both are evaluated once. The actor's weights are read at each step of the N environments, the
    critic's once for a whole rollout; the transition is written and read again.
    """
    env = envs.from_config(config)
    actor, critic = net(config, env.obs_size, env.action_size), net(config, env.obs_size, 1)
    weights = actor.weights / config.num_envs + critic.weights / config.steps_per_update
    numbers = env.obs_size + size_of_sample(env)
    return actor, critic, actor.forward + critic.forward + work(0, weights + 2 * numbers)


def size_of_sample(env: Any) -> int:
    """Return the numbers of a sample: observation, action, and four more such as its reward."""
    return env.obs_size + (1 if env.discrete else env.action_size) + 4


def gathered(config: Any) -> Work:
    """Return the work of gathering a sample into a minibatch: read it, write it."""
    return work(0, 2 * size_of_sample(envs.from_config(config)))


def ppo(config: Any) -> tuple[Work, float]:
    """PPO: a rollout, then E epochs of M minibatches.

        F = F_π + F_V + E (F_π + B_π + F_V + B_V)

    F is a forward pass and B a backward pass without the gradient of the observation.
    """
    actor, critic, total = actor_and_critic(config)
    epochs, steps = config.num_epochs, config.num_epochs * config.num_minibatches
    both = step_of_optimizer(actor.weights + critic.weights, ADAM)
    total += epochs * (actor.learn + critic.learn + gathered(config))
    return total + steps / config.steps_per_update * both, epochs


def ppo_rnn(config: Any) -> tuple[Work, float]:
    """PPO with a GRU in both networks: the work of PPO, with two products more in each."""
    return ppo(config)


def a2c(config: Any) -> tuple[Work, float]:
    """A2C: a rollout, then one gradient step: F = 2 (F_π + F_V) + B_π + B_V."""
    actor, critic, total = actor_and_critic(config)
    both = step_of_optimizer(actor.weights + critic.weights, RMSPROP)
    return total + actor.learn + critic.learn + both / config.steps_per_update, 1


def reinforce(config: Any) -> tuple[Work, float]:
    """REINFORCE: an episode, one step of the policy, K steps of the baseline on all of it.

        F = F_π + F_V + (F_π + B_π) + K (F_V + B_V),    without a baseline F = 2 F_π + B_π

    Steps after the end of an episode are played and count.
    """
    actor, critic, total = actor_and_critic(config)
    steps = config.steps_per_update
    total += actor.learn + step_of_optimizer(actor.weights, ADAM) / steps
    if not config.baseline:
        return total - critic.forward, 1
    fit = critic.learn + step_of_optimizer(critic.weights, ADAM) / steps
    return total + config.num_critic_steps * fit, 1


def npg(config: Any) -> tuple[Work, float]:
    """NPG: a rollout, a gradient, I + 1 products with the Fisher information, the critic's epochs.

        F = F_π + F_V + (F_π + B_π) + 2 (I + 1) B_π + E (F_V + B_V)

    A product is one pass of tangents and one of cotangents through the linearised network, each
    with the products of B_π. Conjugate gradient moves ten numbers per weight and iteration: the
    weights twice, and each of four vectors in and out.
    """
    actor, critic, total = actor_and_critic(config)
    products, steps = config.cg_iters + 1, config.num_epochs * config.num_minibatches
    vectors = work(0, 10 * actor.weights) / config.steps_per_update
    total += actor.learn + products * (2 * actor.backward + vectors)
    total += config.num_epochs * (critic.learn + gathered(config))
    return total + steps / config.steps_per_update * step_of_optimizer(critic.weights, ADAM), 1


def trpo(config: Any) -> tuple[Work, float]:
    """TRPO: NPG, and a line search that takes the first candidate: one more F_π."""
    total, samples = npg(config)
    return total + actor_and_critic(config)[0].forward, samples


def replayed(config: Any) -> tuple[Work, float]:
    """Return the work of storing a step and of sampling it, and the samples per step.

    A sample is read from the buffer and written into the minibatch.
    """
    env = envs.from_config(config)
    numbers = env.obs_size + size_of_sample(env) - 2
    samples = config.num_gradient_steps * config.batch_size / config.steps_per_update
    return work(0, numbers + 2 * samples * numbers), samples


def ddpg(config: Any) -> tuple[Work, float]:
    """DDPG: a step of the policy, then s samples of the buffer, each through four networks.

        F = F_π + s (F_π' + F_Q' + (F_Q + B_Q) + (F_π + B_π) + F_Q + ∂Q/∂a)

    Weights per gradient step: the optimisers', the targets' (moved by tau, and read once), and the
    critic's twice more for the actor.
    """
    env = envs.from_config(config)
    actions = env.action_size
    actor, critic = net(config, env.obs_size, actions), net(config, env.obs_size + actions, 1)
    total, samples = replayed(config)
    each = 2 * actor.forward + 3 * critic.forward + actor.backward + critic.backward
    total += actor.forward + work(0, actor.weights / config.num_envs)
    total += samples * (each + critic.input_gradient(actions))
    both = actor.weights + critic.weights
    moved = step_of_optimizer(both, ADAM) + work(0, 4 * both + 2 * critic.weights)
    return total + config.num_gradient_steps / config.steps_per_update * moved, samples


def sac(config: Any) -> tuple[Work, float]:
    """SAC: a step of the policy, then s samples of the buffer, with two critics.

        F = F_π + s (F_π + 2 F_Q' + 2 (F_Q + B_Q) + (F_π + B_π) + 2 F_Q + 2 ∂Q/∂a)

    For discrete actions Q has an output per action and its gradient ∂Q/∂a is not needed.
    """
    env = envs.from_config(config)
    actions = env.action_size
    if env.discrete:
        actor = critic = net(config, env.obs_size, actions)
        through = work(0, 0)
    else:
        actor = net(config, env.obs_size, 2 * actions)
        critic = net(config, env.obs_size + actions, 1, "mlp")
        through = 2 * critic.input_gradient(actions)
    total, samples = replayed(config)
    each = 2 * actor.forward + actor.backward + 6 * critic.forward + 2 * critic.backward
    total += actor.forward + work(0, actor.weights / config.num_envs)
    total += samples * (each + through)
    both = actor.weights + 2 * critic.weights
    moved = step_of_optimizer(both, ADAM) + work(0, actor.weights + 12 * critic.weights)
    return total + config.num_gradient_steps / config.steps_per_update * moved, samples


KINDS: dict[str, Callable[[Any], tuple[Work, float]]] = {
    kind.__name__: kind for kind in (reinforce, a2c, npg, trpo, ppo, ppo_rnn, ddpg, sac)
}


# --------------------------------------------------------------------------------- language models


def transformer(architecture: Any, length: int, outputs: int) -> Net:
    """Return the layers of a transformer for one token of a sequence.

    Args:
        architecture: as `rlhf.transformer.Architecture`; norms and biases are left out.
        length: of the sequence; a token attends to all of it, as masked products do.
        outputs: of the head.
    """
    a = architecture
    rows = a.vocab_size + (a.context if a.positions == "learned" else 0)
    layers = [Layer(0, a.width, 0, rows * a.width)]  # the embedding, which takes no product
    inner, kept = a.num_heads * a.head_dim, 2 * a.num_kv_heads * a.head_dim
    gates = 2 if a.mlp == "silu_gated" else 1
    for _ in range(a.num_layers):
        attention = Layer(inner, inner + a.num_heads * length, 2 * inner * length, 0)
        layers += [dense(a.width, inner + kept), attention, dense(inner, a.width)]
        layers += [*[dense(a.width, a.mlp_width)] * gates, dense(a.mlp_width, a.width)]
    head = dense(a.width, outputs)
    shared = a.tied and a.output == "tokens"
    return Net((*layers, dataclasses.replace(head, weights=0) if shared else head))


def dense(inputs: int, outputs: int) -> Layer:
    """Return a linear layer; its bias is left out."""
    return Layer(inputs, outputs, inputs * outputs, inputs * outputs)


@dataclasses.dataclass(frozen=True)
class Completed:
    """What a trainer does with completions, per token of its unit.

    A sequence of S tokens is a prompt and a completion. Its last token is sampled and needs no
    forward pass, so sampling takes those of S - 1 tokens. It reads the weights at each token.
    """

    policy: Net
    length: int  # S
    share: float  # tokens of the sequences
    sampling: Work
    reading: Work  # of the log-probabilities under a model as large as the policy

    @property
    def learning(self) -> Work:
        """Work of the log-probabilities and their gradient."""
        return self.policy.learn * self.share

    def optimizing(self, config: Any, steps: int = 1) -> Work:
        """Return the work of so many steps of Adam in an update."""
        moved = step_of_optimizer(self.policy.weights, ADAM)
        return steps / config.steps_per_update * moved


def completed(config: Any, given: Any, completions: int) -> Completed:
    """Return the work of the completions of an update, of which there are so many."""
    a = given.reference.architecture
    length = trainers.load("rlhf.sft").Config(task=config.task).row_length
    share = length * completions / config.steps_per_update
    policy = transformer(a, length, a.vocab_size)
    reading = policy.forward * share
    sampling = reading * (length - 1) / length + work(0, policy.weights / completions)
    return Completed(policy, length, share, sampling, reading)


def rewarding(given: Any, found: Completed) -> Work:
    """Return the work of the reward model, if one is given."""
    if getattr(given, "reward", None) is None:
        return work(0, 0)
    return transformer(given.reward.architecture, found.length, 1).forward * found.share


Language = tuple[Work, float, float]  # and the samples and the generated tokens per token


def language_sft(config: Any, given: Any) -> Language:
    """SFT: a gradient step on rows of tokens: F = F_π + B_π."""
    architecture = trainers.load("rlhf.sft").architecture(config)
    policy = transformer(architecture, config.row_length, architecture.vocab_size)
    moved = step_of_optimizer(policy.weights, ADAM) / config.steps_per_update
    return policy.learn + moved, 1, 0


def language_rloo(config: Any, given: Any) -> Language:
    """RLOO: completions, then one gradient step: F = (S_π + F_ref + F_r) + F_π + B_π.

    S_π is the work of sampling.
    """
    found = completed(config, given, config.batch_size)
    total = found.sampling + found.reading + rewarding(given, found) + found.learning
    return total + found.optimizing(config), 1, 1


def language_grpo(config: Any, given: Any) -> Language:
    """GRPO: completions, then E epochs: F = S_π + F_r + (F_ref + E (F_π + B_π)) / oversample.

    With staleness, one more F_π for the log-probabilities of the policy that is learning.
    """
    drawn, epochs = config.oversample, config.num_epochs
    found = completed(config, given, drawn * config.batch_size)
    kept = found.reading * (2 if config.staleness else 1) + epochs * found.learning
    total = found.sampling + rewarding(given, found) + kept / drawn
    return total + found.optimizing(config, epochs * config.num_minibatches), epochs / drawn, 1


def language_ppo(config: Any, given: Any) -> Language:
    """PPO: completions and their values, then E epochs.

    F = (S_π + F_ref + F_r) + F_V + E (F_π + B_π + F_V + B_V)
    """
    found, epochs = completed(config, given, config.batch_size), config.num_epochs
    scalar = dataclasses.replace(given.reference.architecture, output="scalar")
    critic = transformer(scalar, found.length, 1)
    values = (critic.forward + epochs * critic.learn) * found.share
    steps = epochs * config.num_minibatches
    moved = steps / config.steps_per_update * step_of_optimizer(critic.weights, ADAM)
    total = found.sampling + found.reading + rewarding(given, found) + epochs * found.learning
    return total + values + moved + found.optimizing(config, steps), epochs, 1


def language_dpo(config: Any, given: Any) -> Language:
    """DPO: a gradient step on B pairs: F = S_ref + F_ref + F_π + B_π; given pairs are not sampled.

    All tokens of both completions are learnt from. The reference only evaluates them.
    """
    found = completed(config, given, 2 * config.batch_size)
    sampled = 1 if given.pairs is None else 0
    total = sampled * found.sampling + found.reading + found.learning
    return total + found.optimizing(config), 1, sampled


def language_online_dpo(config: Any, given: Any) -> Language:
    """Online DPO: B pairs by the policy, and a gradient step: F = S_π + F_r + F_ref + F_π + B_π."""
    found = completed(config, given, 2 * config.batch_size)
    total = found.sampling + rewarding(given, found) + found.reading + found.learning
    return total + found.optimizing(config), 1, 1


def language_kto(config: Any, given: Any) -> Language:
    """KTO: B completions, and each prompt with another's: F = S_ref + F_π + 2 F_ref + F_π + B_π."""
    found = completed(config, given, config.batch_size)
    sampled = 1 if given.labelled is None else 0
    total = sampled * found.sampling + 3 * found.reading + found.learning
    return total + found.optimizing(config), 1, sampled


LANGUAGE: dict[str, Callable[[Any, Any], Language]] = {
    "rlhf.sft": language_sft,
    "rlhf.rloo": language_rloo,
    "rlhf.grpo": language_grpo,
    "rlhf.ppo": language_ppo,
    "rlhf.dpo": language_dpo,
    "rlhf.online_dpo": language_online_dpo,
    "rlhf.kto": language_kto,
}


def seconds_at_roof(found: Count, gflops: float, gb_per_s: float) -> float:
    """Return the least seconds of an environment step on a machine with this roof.

    Args:
        found: per environment step.
        gflops: 10⁹ operations per second of the machine.
        gb_per_s: 10⁹ bytes per second that it reads and writes.
    """
    return max(found.flops / (1e9 * gflops), found.bytes / (1e9 * gb_per_s))
