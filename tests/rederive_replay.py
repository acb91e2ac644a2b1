"""The parts of `rederive` for off-policy agents: a ring buffer in NumPy, and playing into it.

Again, nothing here calls an agent's code or `purejaxpg.replay`. Keys are split and indices are
drawn as the agents document it.
"""

import functools
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import rederive
from jax import lax, random

# The ring wraps around in the third update, and not between two steps of the environments.
SIZES: dict[str, Any] = {
    "total_timesteps": 70, "num_envs": 3, "num_steps": 4, "num_gradient_steps": 2,
    "batch_size": 7, "replay_capacity": 31, "learning_starts": 9,
}  # fmt: skip
SEED = 3  # of every run


class Ring:
    """The last transitions. Transition i is in row i modulo the capacity."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.written = capacity, 0
        self.rows: dict[str, np.ndarray] = {}

    @property
    def size(self) -> int:
        return min(self.written, self.capacity)

    def add(self, transition: dict[str, Any]) -> None:
        for name, value in transition.items():
            empty = np.zeros((self.capacity, *np.shape(value)), np.asarray(value).dtype)
            self.rows.setdefault(name, empty)[self.written % self.capacity] = value
        self.written += 1

    def sample(self, key: jax.Array, count: int) -> dict[str, np.ndarray]:
        """Draw rows with replacement."""
        slots = np.asarray(random.randint(key, (count,), 0, self.size))
        return {name: column[slots] for name, column in self.rows.items()}

    def assert_close(self, buffer: Any, what: str) -> None:
        assert int(buffer.position) == self.written % self.capacity, what
        assert int(buffer.size) == self.size, what
        for name, wanted in self.rows.items():
            stored = getattr(buffer.storage, name)
            assert stored.dtype.kind == wanted.dtype.kind, f"{what}: {name} in the buffer"
            rederive.assert_close(stored, wanted, f"{what}: {name} in the buffer")


def stretched(action: np.ndarray) -> np.ndarray:
    """From [-1, 1] to the bounds of the environment."""
    low, high = rederive.LOW, rederive.HIGH
    return (low + high) / 2 + action * (high - low) / 2


class Learner:
    """Parameters, and the Adam that moves them."""

    def __init__(self, params: Any) -> None:
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.adam = rederive.Adam(eps=1e-8)

    def descend(self, gradient: Any, rate: float, max_norm: float) -> None:
        change = self.adam.step(rederive.clipped(rederive.flat(gradient), max_norm), rate)
        self.params = rederive.like(rederive.flat(self.params) + change, self.params)


class OffPolicy:
    """A run: `init` fills the buffer, then updates start from the given networks.

    A subclass defines how to act, before and after the warm-up, and the gradient step. `targets` is
    the name of the target networks in the agent's state.
    """

    targets = ""

    def __init__(self, key: jax.Array, config: Any, given: dict[str, Any]) -> None:
        self.config, self.finished = config, 0
        self.discrete = config.env == rederive.NAMES[True]
        self.world = rederive.World(config.num_envs, self.discrete, config.env_params)
        self.ring = Ring(config.replay_capacity)
        self.normalizers = rederive.Normalizers(config)
        self.learners = {name: Learner(params) for name, params in given["params"].items()}
        self.target = Learner(given[self.targets]).params
        self.ended = {"terminated": 0, "truncated": 0}
        _, _, _, key_random = random.split(key, 4)
        self.interact(key_random, config.learning_starts // config.num_envs, warming_up=True)

    def at_random(self, key: jax.Array) -> np.ndarray:
        raise NotImplementedError

    def act(self, key: jax.Array, obs: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def gradient_step(self, key: jax.Array) -> dict[str, float]:
        """Move everything once -> metrics."""
        raise NotImplementedError

    def params(self, name: str) -> Any:
        return self.learners[name].params

    def interact(self, key: jax.Array, steps: int, warming_up: bool) -> dict[str, float]:
        """Play and store -> metrics of the episodes that ended."""
        played = []
        for each in random.split(key, steps):
            key_action, _ = random.split(each)  # the other one is for a random environment
            seen = self.normalizers.seen(self.world.obs)
            action = self.at_random(key_action) if warming_up else self.act(key_action, seen)
            row = self.world.step(action if self.discrete else stretched(action))
            for n in range(self.config.num_envs):
                stored = {name: getattr(row, name)[n] for name in ("obs", "reward", "next_obs")}
                ended = row.terminated[n]
                self.ring.add({**stored, "action": action[n], "terminated": ended})
            played.append(row)
        rows = rederive.stacked(played)
        self.normalizers.observe(rows.obs)
        self.ended["terminated"] += rows.terminated.sum()
        self.ended["truncated"] += (rows.done & ~rows.terminated).sum()
        return rederive.episode_metrics(rows)

    def sample(self, key: jax.Array) -> dict[str, np.ndarray]:
        """A minibatch, with observations and rewards normalised by the current statistics."""
        batch = self.ring.sample(key, self.config.batch_size)
        for name in ("obs", "next_obs"):
            batch[name] = self.normalizers.seen(batch[name])
        scaled, bound = self.config.reward_scale * batch["reward"], self.config.clip_reward
        return {**batch, "reward": np.clip(scaled, -bound, bound)}

    def descend(self, name: str, gradient: Any) -> None:
        config = self.config
        first = config.critic_learning_rate if name == "critic" else config.learning_rate
        now = rederive.rate(config, first, self.finished)
        self.learners[name].descend(gradient, now, config.max_grad_norm)

    def follow(self, online: Any) -> None:
        """Move the target networks towards the online ones."""
        tau = self.config.tau
        self.target = jax.tree.map(lambda x, y: (1.0 - tau) * x + tau * y, self.target, online)

    def update(self, key: jax.Array) -> dict[str, float]:
        key_interact, key_learn = random.split(key)
        episodes = self.interact(key_interact, self.config.num_steps, warming_up=False)
        keys = random.split(key_learn, self.config.num_gradient_steps)
        steps = [self.gradient_step(each) for each in keys]
        self.finished += 1
        return {**episodes, **{name: np.mean([s[name] for s in steps]) for name in steps[0]}}

    def assert_data(self, state: Any, what: str) -> None:
        """Compare everything that acting changes."""
        rederive.assert_world(state, self.world, what)
        self.ring.assert_close(state.buffer, what)
        self.normalizers.assert_close(state.normalizers, what)
        assert int(state.num_updates) == self.finished, what

    def assert_close(self, state: Any, what: str) -> None:
        self.assert_data(state, what)
        assert set(state.params) == set(state.opt_state) == set(self.learners)
        for name, learner in self.learners.items():
            got, wanted = (rederive.flat(x) for x in (state.params[name], learner.params))
            rederive.assert_close(got, wanted, f"{what}: {name}")
            learner.adam.assert_close(state.opt_state[name], f"{what}: {name}")
        targets = getattr(state, self.targets)
        assert jax.tree.structure(targets) == jax.tree.structure(self.target)
        got, wanted = rederive.flat(targets), rederive.flat(self.target)
        rederive.assert_close(got, wanted, f"{what}: targets")


@functools.partial(jax.jit, static_argnums=(0, 4), compiler_options=quick.OPTIONS)
def _played(agent: types.ModuleType, key: jax.Array, config: Any, given: Any, updates: int) -> Any:
    def step(state: Any, u: jax.Array) -> Any:
        state, metrics = agent.update(random.fold_in(key, u), state, config)
        return state, (state, metrics)

    start = agent.init(random.fold_in(key, 0), config)
    return start, lax.scan(step, start.replace(**given), jnp.arange(1, updates + 1))[1]


def assert_three_updates(
    agent: types.ModuleType, rederived: Any, config: Any, given: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Run both, comparing after `init` and after each update.

    The members of the state in `given` replace those of `init` before the first update: a new
    policy is almost constant and equal to its target, but with the test's own parameters every term
    matters from the first step on.

    Returns:
        The agent's states after `init` and after the last update, and the rederived agent.
    """
    agent.check(config)
    key = random.key(SEED)
    start, (states, metrics) = jax.device_get(_played(agent, key, config, given, 3))
    expected = rederived(random.fold_in(key, 0), config, given)
    expected.assert_data(start, "init")
    for u in (1, 2, 3):
        wanted = expected.update(random.fold_in(key, u))
        state, got = (jax.tree.map(lambda x, u=u: x[u - 1], rows) for rows in (states, metrics))
        rederive.assert_metrics(got, wanted, f"update {u}")
        expected.assert_close(state, f"update {u}")
    assert min(expected.ended.values()) > 1, "episodes end in both ways"
    return start, state, expected


# --- initial states, and a whole run -------------------------------------------------------------


def network(generator: np.random.Generator, *widths: int) -> Any:
    """Parameters of a network with these widths, from its input to its output."""
    layers: dict[str, Any] = {}
    for rows, columns in itertools.pairwise(widths):
        layers[f"Dense_{len(layers)}"] = {
            "kernel": np.float32(generator.normal(size=(rows, columns)) / np.sqrt(rows)),
            "bias": np.float32(0.3 * generator.normal(size=columns)),
        }
    _, head = layers.popitem()
    return {"params": {"torso": layers, "Dense_0": head}}


def assert_new(state: Any, given: dict[str, Any], gains: dict[str, float], actor: Any) -> None:
    """Check the result of `init`: an actor from its own key, the given shapes, fresh optimisers."""
    _, key_actor, _, _ = random.split(random.fold_in(random.key(SEED), 0), 4)
    drawn = jax.jit(actor.init, compiler_options=quick.OPTIONS)(
        key_actor, np.zeros((1, 3), np.float32)
    )
    rederive.assert_close(rederive.flat(state.params["actor"]), rederive.flat(drawn), "actor")
    shapes = [jax.tree.map(np.shape, x) for x in (state.params, given["params"])]
    assert shapes[0] == shapes[1]
    adams = rederive.members(state.opt_state, optax.ScaleByAdamState)
    assert len(adams) == len(state.params)
    assert not any(np.any(x) for x in jax.tree.leaves(adams))
    for name, gain in gains.items():
        kernel = state.params[name]["params"]["Dense_0"]["kernel"]
        product = np.swapaxes(kernel, -1, -2) @ kernel  # columns are fewer than rows
        wanted = np.broadcast_to(gain**2 * np.eye(kernel.shape[-1]), product.shape)
        np.testing.assert_allclose(product, wanted, atol=1e-5 * gain**2)


def assert_train_folds_its_key(
    agent: types.ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train` is `init` with the key folded by 0, then `update` with it folded by 1, 2, ..."""

    def update(key: jax.Array, state: Any, config: Any) -> Any:
        return {**state, "finished": state["finished"] + 1}, {"words": random.key_data(key)}

    def init(key: jax.Array, config: Any) -> Any:
        return {"words": random.key_data(key), "finished": jnp.int32(0)}

    key = random.key(11)
    monkeypatch.setattr(agent, "init", init)
    monkeypatch.setattr(agent, "update", update)
    state, metrics = agent.train(key, config)
    assert int(state["finished"]) == config.num_updates
    words = [random.key_data(random.fold_in(key, u)) for u in range(config.num_updates + 1)]
    np.testing.assert_array_equal([state["words"], *metrics["words"]], words)
