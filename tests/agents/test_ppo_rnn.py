"""PPO with a GRU against an independent 64-bit version that unrolls every sequence step by step."""

import dataclasses
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import rederive
from jax import random

from purejaxpg import InputError, contract, evaluate, prng
from purejaxpg.agents import ppo_rnn

rederive.register()
INF = float("inf")
# Episodes of at most 3 steps in rollouts of 7: resets inside every sequence, and most episodes are
# truncated. A rollout ends within an episode, so the next one starts from a memory.
STANDARD = ppo_rnn.Config(
    env=rederive.NAMES[True], env_params={"push": 1.0, "max_steps_in_episode": 3.0},
    total_timesteps=84, num_envs=4, num_steps=7, num_epochs=2, num_minibatches=2, hidden=(5,),
    memory_size=3,
)  # fmt: skip
CONTINUOUS = dataclasses.replace(
    STANDARD, env=rederive.NAMES[False], activation="silu", orthogonal_init=False,
    learning_rate=0.005, learning_rate_schedule="robbins_monro", learning_rate_half_life=2.0,
    normalize_obs=True, normalize_reward=True, normalize_advantage=False, clip_obs=1.2, gamma=0.8,
    gae_lambda=0.6, clip_eps=0.01, vf_clip_eps=0.01, vf_coef=0.9, ent_coef=0.1, max_grad_norm=0.3,
    initial_log_std=-0.5, reward_scale=1.5, max_kl=0.001,
)  # fmt: skip
# Each with the options that must have an effect in it, or it would test nothing.
SETTINGS: dict[str, tuple[ppo_rnn.Config, set[str]]] = {
    "standard": (STANDARD, {"truncated", "terminated", "unfinished"}),
    "continuous": (CONTINUOUS, {"clip_eps", "vf_clip_eps", "max_kl", "truncated"}),
}


def sigmoid(x: Any) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def after(layers: Any, x: Any, h: Any) -> jax.Array:
    """The memory after an input, gate by gate."""
    size = h.shape[-1]
    of_x = x @ layers["input"]["kernel"] + layers["input"]["bias"]
    of_h = h @ layers["memory"]
    gates = [slice(i * size, (i + 1) * size) for i in range(3)]
    r, z = (sigmoid(of_x[..., i] + of_h[..., i]) for i in gates[:2])
    new = jnp.tanh(of_x[..., gates[2]] + r * (of_h[..., gates[2]] + layers["bias"]))
    return (1.0 - z) * new + z * h


def looked(variables: Any, obs: Any, h: Any, activation: str) -> tuple[jax.Array, jax.Array]:
    """One step of a network [N, D], [N, H] -> its output and its memory."""
    layers = variables["params"]
    x = obs
    for i in range(len(layers["torso"])):
        layer = layers["torso"][f"Dense_{i}"]
        x = rederive.ACTIVATIONS[activation](x @ layer["kernel"] + layer["bias"])
    h = after(layers["gru"], x, h)
    return h @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"], h


LOOK = rederive.in_64_bits(looked, static=(3,))


def unrolled(variables: Any, obs: Any, h: Any, done: Any, activation: str) -> jax.Array:
    """The output at each step of sequences [T, N, D]; a memory is zero after `done` [T, N]."""
    outputs = []
    for t in range(len(obs)):
        output, h = looked(variables, obs[t], h, activation)
        outputs.append(output)
        h = jnp.where(done[t][:, None], 0.0, h)
    return jnp.stack(outputs)


class Sequences(NamedTuple):
    """What a gradient step learns from, time first."""

    obs: Any  # [T, N, 3] normalised
    action: Any  # [T, N] or [T, N, 2]
    done: Any  # [T, N]
    log_prob: Any  # [T, N]
    value: Any  # [T, N]
    advantage: Any  # [T, N]
    target: Any  # [T, N]
    actor: Any  # [N, H] the memory before the first step
    critic: Any  # [N, H]

    def of(self, chosen: np.ndarray) -> "Sequences":
        *steps, actor, critic = self
        return Sequences(*(x[:, chosen] for x in steps), actor[chosen], critic[chosen])


def objective(params: Any, data: Sequences, config: ppo_rnn.Config) -> tuple[Any, dict[str, Any]]:
    """Minus the objective of PPO, and the metrics of an update."""
    inputs = config.activation
    output = unrolled(params["actor"], data.obs, data.actor, data.done, inputs)
    policy = rederive.Policy(output, params["actor"]["params"].get("log_std"))
    value = unrolled(params["critic"], data.obs, data.critic, data.done, inputs)[..., 0]
    log_ratio = rederive.log_prob(policy, data.action) - data.log_prob
    ratio, advantage = jnp.exp(log_ratio), data.advantage
    if config.normalize_advantage:
        centred = advantage - advantage.mean()
        advantage = centred / (jnp.sqrt((centred**2).mean()) + 1e-8)
    near = jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps)
    gain = jnp.minimum(ratio * advantage, near * advantage).mean()
    step = jnp.clip(value - data.value, -config.vf_clip_eps, config.vf_clip_eps)
    errors = value - data.target, data.value + step - data.target
    error = (0.5 * jnp.maximum(errors[0] ** 2, errors[1] ** 2)).mean()
    entropy = rederive.entropy(policy).mean()
    metrics = {
        "loss/policy": -gain,
        "loss/value": error,
        "policy/entropy": entropy,
        "policy/kl": (ratio - 1 - log_ratio).mean(),
        "policy/clip_fraction": (jnp.abs(ratio - 1) > config.clip_eps).mean(),
        "values clipped": (jnp.abs(value - data.value) > config.vf_clip_eps).mean(),
    }
    return -(gain - config.vf_coef * error + config.ent_coef * entropy), metrics


SLOPE = rederive.in_64_bits(jax.grad(objective, has_aux=True))


class Rederived:
    """The agent again, with memories that are kept one by one."""

    def __init__(self, key: jax.Array, start: ppo_rnn.TrainState, config: ppo_rnn.Config) -> None:
        self.config, self.params = config, start.params
        self.normalizers, self.optimizer = rederive.Normalizers(config), rederive.Adam(eps=1e-5)
        self.finished, self.effects = 0, set[str]()
        self.restart()
        if config.normalize_obs:
            *_, key_moments = random.split(random.fold_in(key, 0), 4)
            self.normalizers.observe(self.play(key_moments)[0].obs)
            self.restart()

    def restart(self) -> None:
        config = self.config
        discrete = config.env == rederive.NAMES[True]
        self.world = rederive.World(config.num_envs, discrete, config.env_params)
        nothing = np.zeros((config.num_envs, config.memory_size))
        self.actor, self.critic = nothing, nothing

    def look(self, which: str, obs: np.ndarray, h: np.ndarray) -> Any:
        seen = self.normalizers.seen(obs)
        return LOOK(self.params[which], seen, h, self.config.activation)

    def policy(self, obs: np.ndarray, h: np.ndarray) -> tuple[rederive.Policy, np.ndarray]:
        output, h = self.look("actor", obs, h)
        log_std = self.params["actor"]["params"].get("log_std")
        return rederive.Policy(output, log_std), h

    def play(self, key: jax.Array) -> tuple[rederive.Row, np.ndarray]:
        """T more steps, and the log-probabilities of their actions."""
        rows, log_probs = [], []
        for now in random.split(key, self.config.num_steps):
            key_action, _ = random.split(now)
            policy, self.actor = self.policy(self.world.obs, self.actor)
            action = rederive.sample(key_action, policy)
            log_probs.append(np.asarray(rederive.log_prob(policy, action)))
            rows.append(self.world.step(action))
            self.actor = np.where(rows[-1].done[:, None], 0.0, self.actor)
        return rederive.stacked(rows), np.stack(log_probs)

    def values(self, rows: rederive.Row) -> tuple[np.ndarray, np.ndarray]:
        """V of each observation, and of the next one with the memory from before any reset."""
        value, next_value = np.zeros((2, *rows.reward.shape))
        for t in range(len(rows.reward)):
            output, self.critic = self.look("critic", rows.obs[t], self.critic)
            value[t] = output[:, 0]
            next_value[t] = self.look("critic", rows.next_obs[t], self.critic)[0][:, 0]
            self.critic = np.where(rows.done[t][:, None], 0.0, self.critic)
        return value, next_value

    def collect(self, key: jax.Array) -> tuple[Sequences, dict[str, float]]:
        config, before = self.config, (self.actor, self.critic)
        rows, log_prob = self.play(key)
        value, next_value = self.values(rows)
        obs = self.normalizers.seen(rows.obs)
        reward = self.normalizers.rewards(rows.reward, rows.done)
        self.normalizers.observe(rows.obs)
        advantage = rederive.gae(
            reward, value, next_value, rows.terminated, rows.done, config.gamma, config.gae_lambda
        )
        self.note("terminated", rows.terminated.any())
        self.note("truncated", (rows.done & ~rows.terminated)[:-1].any())
        self.note("unfinished", not rows.done[-1].all())
        steps = (obs, rows.action, rows.done, log_prob, value, advantage, advantage + value)
        return Sequences(*steps, *before), rederive.episode_metrics(rows)

    def update(self, key: jax.Array) -> dict[str, float]:
        config = self.config
        key_rollout, key_shuffle = random.split(key)
        data, episodes = self.collect(key_rollout)
        reports, stopped = [], False
        for now in random.split(key_shuffle, config.num_epochs):
            order = np.asarray(prng.permutation(now, config.num_envs))
            for chosen in np.split(order, config.num_minibatches):
                gradient, report = SLOPE(self.params, data.of(chosen), config)
                stopped = stopped or bool(report["policy/kl"] > config.max_kl)
                if not stopped:
                    self.step(rederive.clipped(rederive.flat(gradient), config.max_grad_norm))
                reports.append({**report, "policy/stopped": float(stopped)})
        self.finished += 1
        means = {name: float(np.mean([each[name] for each in reports])) for name in reports[0]}
        self.note("clip_eps", 0 < means["policy/clip_fraction"] < 1)
        self.note("vf_clip_eps", 0 < means.pop("values clipped") < 1)
        self.note("max_kl", 0 < means["policy/stopped"] < 1)
        return {**episodes, **means}

    def step(self, gradient: np.ndarray) -> None:
        rate = rederive.rate(self.config, self.config.learning_rate, self.finished)
        moved = rederive.flat(self.params) + self.optimizer.step(gradient, rate)
        self.params = rederive.like(moved, self.params)

    def note(self, effect: str, seen: Any) -> None:
        self.effects |= {effect} if seen else set()

    def assert_close(self, state: ppo_rnn.TrainState, what: str) -> None:
        rederive.assert_close(
            rederive.flat(state.params), rederive.flat(self.params), f"{what}: parameters"
        )
        rederive.assert_close(state.memory["actor"], self.actor, f"{what}: the actor's memory")
        rederive.assert_close(state.memory["critic"], self.critic, f"{what}: the critic's memory")
        self.normalizers.assert_close(state.normalizers, what)
        self.optimizer.assert_close(state.opt_state, what)
        rederive.assert_world(state, self.world, what)


KEY = random.key(10)


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_updates_against_an_unrolled_loop(setting: str) -> None:
    config, effects = SETTINGS[setting]
    states, metrics = rederive.trained(ppo_rnn, KEY, config)
    expected = Rederived(KEY, states[0], config)
    expected.assert_close(states[0], "start")
    for u in (1, 2, 3):
        wanted = expected.update(random.fold_in(KEY, u))
        rederive.assert_metrics(metrics[u - 1], wanted, f"update {u}")
        expected.assert_close(states[u], f"update {u}")
    assert effects <= expected.effects
    assert_acts(states[-1], expected)


def assert_acts(state: ppo_rnn.TrainState, expected: Rederived) -> None:
    """Compare two steps of `policy`, sampled and greedy, with and without a memory."""
    obs = np.random.default_rng(0).normal(size=(6, 3))
    h = np.random.default_rng(1).uniform(-0.9, 0.9, (6, 3))
    act = jax.jit(ppo_rnn.policy, static_argnums=5, compiler_options=quick.OPTIONS)
    start = np.asarray(ppo_rnn.initial_memory(state, expected.config, 6))
    assert start.shape == (6, 3) and not start.any()
    for memory in (start, h):
        own, later = expected.policy(obs, memory)
        best = own.output.argmax(-1) if own.log_std is None else own.output
        for greedy, wanted in ((False, rederive.sample(random.key(4), own)), (True, best)):
            got, after_it = act(
                random.key(4), state, jnp.asarray(obs), jnp.asarray(memory), expected.config, greedy
            )
            np.testing.assert_allclose(got, wanted, 1e-5, 1e-5)
            np.testing.assert_allclose(after_it, later, 1e-5, 1e-5)


def test_ratio_is_one_on_the_first_minibatch() -> None:
    """A sequence starts from the memory with which the rollout started, in an episode or not."""

    @jax.jit
    def first(key: jax.Array) -> Any:
        state = ppo_rnn.init(key, STANDARD)
        for _ in range(2):
            before = state.memory
            state, transition, _ = ppo_rnn.rollout(key, state, STANDARD)
            state, batch = ppo_rnn.advantages(state, before, transition, STANDARD)
        return batch, ppo_rnn.loss(state.params, batch, STANDARD)[1]

    batch, metrics = first(random.key(0))
    assert np.abs(batch.memory["actor"]).max() > 0.01 and batch.starts.any()
    assert abs(float(metrics["policy/kl"])) < 1e-12


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_minibatches": 3}, ["num_minibatches", "num_envs", "3", "4"]),
        ({"memory_size": 0}, ["memory_size", "1 or more", "0"]),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ppo_rnn.check(dataclasses.replace(STANDARD, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- the score ----------------------------------------------------------------------------------

LEARNS = ppo_rnn.Config(
    env="MemoryChain-bsuite", total_timesteps=40_000, num_steps=32, hidden=(16,), memory_size=16,
    learning_rate=5e-3,
)  # fmt: skip


def forgetful() -> types.ModuleType:
    """The agent as its policy would be without a place for the memory: it starts at each step."""
    agent = types.ModuleType("forgetful")

    def policy(key: Any, state: Any, obs: Any, config: Any, greedy: bool = False) -> Any:
        memory = ppo_rnn.initial_memory(state, config, len(obs))
        return ppo_rnn.policy(key, state, obs, memory, config, greedy)[0]

    agent.policy = policy  # type: ignore[attr-defined]
    return agent


def test_what_was_remembered_counts_in_the_score() -> None:
    """Training returns are near 1, but a policy that sees single observations scores at chance."""

    def run(seed: jax.Array) -> Any:
        state, metrics = ppo_rnn.train(random.key(seed), LEARNS)
        last = {name: metrics[f"episode/{name}"][-5:].sum() for name in ("return_sum", "count")}
        scores = [
            evaluate.score(random.key(0), agent, state, LEARNS, 64)
            for agent in (ppo_rnn, forgetful())
        ]
        return last["return_sum"] / last["count"], scores

    program = jax.jit(jax.vmap(run), compiler_options=quick.SOMEWHAT)
    trained, (with_memory, without) = jax.device_get(program(np.arange(3)))
    for name in (contract.RETURN, contract.GREEDY_RETURN):
        assert np.median(trained) > 0.95 and np.median(with_memory[name].mean(1)) > 0.95
        assert np.abs(np.median(without[name].mean(1))) < 0.4
