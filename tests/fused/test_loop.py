"""Loops over time as the kernel and as a sorted `lax.scan`, against `lax.scan` itself."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from purejaxpg import InputError, backend, fused
from purejaxpg.agents import ppo
from purejaxpg.fused import loop, paths

STEPS = 5
# Interpreted kernels are long programs that run once.
QUICKLY = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Config:
    fused: str = "auto"
    precision: str = "float32"


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "on_gpu", lambda: True)


def computed(function: Any, *args: Any) -> Any:
    return jax.jit(function).lower(*args).compile(compiler_options=QUICKLY)(*args)


def scanned(step: Any, carry: Any, xs: Any, **fields: Any) -> tuple[Any, list[paths.Path]]:
    with paths.recorded() as recorded:
        return computed(lambda c, x: fused.scan(step, c, x, Config(**fields)), carry, xs), recorded


def compare(step: Any, carry: Any, xs: Any, kernel: bool = True) -> str:
    """Compare a loop with `lax.scan`, and return why there was no kernel."""
    results, (path,) = scanned(step, carry, xs)
    assert path.kernel == kernel, path.reason
    expected = computed(lambda c, x: lax.scan(step, c, x), carry, xs)
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    return path.reason


def noise(*shape: int) -> jax.Array:
    return random.normal(random.key(0), shape)


def network(inputs: int, units: int = 16, outputs: int = 2) -> list[jax.Array]:
    sizes = [(inputs, units), (units,), (units, outputs)]
    return [random.normal(random.key(k), size) * 0.5 for k, size in enumerate(sizes)]


def acting(inputs: int, units: int = 16) -> Any:
    """Return a step that acts by a network on what it carries."""
    w, b, v = network(inputs, units)

    def step(carry: Any, x: jax.Array) -> Any:
        position, count = carry
        action = (jnp.tanh(position @ w + b) @ v + x).argmax(1)
        position = position * 0.9 + jnp.where(action == 0, 0.1, -0.1)[:, None]
        return (position, count + 1), (position.sum(1), action, count)

    return step


@pytest.mark.parametrize("count", [1, 4, 33])
def test_blocks_of_environments(count: int) -> None:
    carry = (noise(count, 3), jnp.zeros(count, jnp.int32))
    compare(acting(3), carry, noise(STEPS, count, 2))


@pytest.mark.parametrize(("inputs", "units"), [(1, 16), (33, 16), (5, 24), (3, 8), (33, 3)])
def test_sizes_of_networks(inputs: int, units: int) -> None:
    """Wide observations go through memory, odd layers are padded, and small ones stay on lanes."""
    carry = (noise(3, inputs), jnp.zeros(3, jnp.int32))
    compare(acting(inputs, units), carry, noise(STEPS, 3, 2))


def test_agents_may_begin_with_the_same_environments() -> None:
    """Each of them has a last carry of its own, though the first is shared."""

    def last(rate: jax.Array) -> Any:
        def step(carry: jax.Array, x: jax.Array) -> Any:
            return carry * rate + x, None

        return fused.scan(step, jnp.ones((3, 2)), jnp.ones((STEPS, 3, 2)), Config())[0]

    rates = jnp.array([0.0, 1.0])
    results = computed(jax.vmap(last), rates)
    np.testing.assert_allclose(results[:, 0, 0], [1.0, 1.0 + STEPS])


def test_an_array_that_is_cut_into_parts_crosses_as_one() -> None:
    def step(carry: Any, x: jax.Array) -> Any:
        state = jnp.exp(x)
        first, second, third = (state[:, k] for k in range(3))
        return {"a": carry["a"] * first + second, "b": carry["b"] - third}, carry["a"]

    carry = {"a": jnp.arange(3.0), "b": jnp.ones(3)}
    compare(step, carry, noise(STEPS, 3, 3))
    split, _ = loop.sorted_body(step, carry, noise(STEPS, 3, 3))
    assert [v.aval.shape for v in split.to_core] == [(3, 3)]


def test_a_square_of_environments_sizes_and_actions() -> None:
    """Axes of the size of the number of environments must not be taken for one another."""
    w, b, v = network(2)

    def step(carry: Any, x: jax.Array) -> Any:
        logits = jnp.tanh(carry @ w + b) @ v + x.T
        action = jax.nn.one_hot(logits.argmax(1), 2)
        return carry - action * 0.1, (carry, x, logits)

    compare(step, noise(2, 2), noise(STEPS, 2, 2))


ODD_STEPS = {
    "nothing changes": lambda c, x: (c, None),
    "y is x": lambda c, x: ({**c, "a": c["a"] + 1}, x),
    "y is the carry": lambda c, x: ({**c, "a": c["a"] + x}, (c, c["a"])),
    "y is constant": lambda c, x: ({**c, "a": c["a"] + x}, (1.0, jnp.arange(3), np.float32(2))),
    "x is carried": lambda c, x: ({**c, "a": x}, c["a"]),
    "a constant is carried": lambda c, x: ({**c, "a": jnp.arange(4.0)}, c["a"] + x),
    "carries are swapped": lambda c, x: ({**c, "a": c["b"], "b": c["a"]}, c["a"]),
    "x is not used": lambda c, x: ({**c, "a": c["a"] * 0.5}, c["a"]),
    "flags": lambda c, x: ({**c, "f": c["f"] ^ (x > 0)}, c["f"]),
    "bytes wrap around": lambda c, x: ({**c, "u": c["u"] * 7 + 9}, c["u"] > 100),
    "integers wrap around": lambda c, x: ({**c, "i": c["i"] * 65539 + 7}, c["i"] // 3),
    "weak types": lambda c, x: ({**c, "a": jnp.where(c["i"] > 0, c["a"], 2)}, c["i"] * 2.5),
}
CARRY = {
    "a": np.linspace(-1, 1, 4, dtype=np.float32),
    "b": np.arange(4, dtype=np.float32),
    "f": np.array([True, False, True, False]),
    "u": np.arange(4, dtype=np.uint8),
    "i": np.arange(4, dtype=np.int32) + 2**30,
}


@pytest.mark.parametrize("name", ODD_STEPS)
def test_odd_steps(name: str) -> None:
    compare(ODD_STEPS[name], CARRY, noise(STEPS, 4))


def test_numbers_that_are_none_are_treated_as_everywhere() -> None:
    """The first logit that is not a number is the largest; a relu keeps it."""

    def step(carry: jax.Array, x: jax.Array) -> Any:
        logits = jnp.stack([carry, jnp.where(x > 0, jnp.nan, x), carry * jnp.nan], 1)
        return carry + 1.0, (logits.argmax(1), jax.nn.relu(logits).sum(1), logits.max(1))

    compare(step, noise(4), noise(STEPS, 4))


def test_a_normalised_layer_of_other_activations() -> None:
    w, b, v = network(3, 24)

    def step(carry: jax.Array, x: jax.Array) -> Any:
        layer = carry @ w
        centred = layer - layer.mean(1, keepdims=True)
        scaled = centred * (lax.rsqrt((centred**2).mean(1, keepdims=True) + 1e-6) * (1 + b))
        logits = jax.nn.silu(jax.nn.elu(scaled) + jax.nn.softplus(scaled)) @ v + x
        return carry * 0.9 + logits[:, :1], logits

    compare(step, noise(4, 3), noise(STEPS, 4, 2))


def test_a_layer_scaled_by_one_number_that_is_learned() -> None:
    w, _, v = network(3)
    scale = noise(1)

    def step(carry: jax.Array, x: jax.Array) -> Any:
        logits = (jnp.tanh(carry @ w) * scale) @ v + x
        return carry * 0.5 + logits[:, :1] * 0.1, logits

    compare(step, noise(4, 3), noise(STEPS, 4, 2))


def test_padding_of_a_layer_reaches_nothing() -> None:
    """A logarithm makes infinities of padded zeros, and infinity times zero is not a number."""
    w, b, v = map(jnp.abs, network(3, 24))

    def step(carry: jax.Array, x: jax.Array) -> Any:
        logits = jnp.log(carry @ w + b) @ v
        return carry * 0.9 + jnp.abs(logits[:, :1] * 0.1 + x), logits

    compare(step, jnp.abs(noise(4, 3)) + 1, noise(STEPS, 4, 1))


def mixing(c: Any, x: Any) -> Any:
    return {**c, "a": c["a"] - c["a"].mean()}, x


REFUSED = {
    "an operation combines the environments": (mixing, CARRY),
    "an array [3] has no numbers of 4 environments": (
        lambda c, x: ({**c, "c": c["c"] * 2}, x),
        {**CARRY, "c": np.ones(3, np.float32)},
    ),
    "an array [] has no numbers of 4 environments": (
        lambda c, x: ({**c, "n": c["n"] + 1}, x),
        {**CARRY, "n": np.int32(0)},
    ),
    "an array [4, 0] has no numbers of 4 environments": (
        lambda c, x: (c, x),
        {**CARRY, "empty": np.zeros((4, 0), np.float32)},
    ),
    "the environments carry a random key": (
        lambda c, x: ({**c, "k": random.split(c["k"][0], 4)}, x),
        {**CARRY, "k": random.split(random.key(0), 4)},
    ),
    "a hidden layer leaves the loop, or passes from step to step": (
        lambda c, x: ({"h": jnp.tanh(c["h"] @ np.eye(16, dtype=np.float32) + 1)}, x),
        {"h": np.zeros((4, 16), np.float32)},
    ),
    "an environment has an array of 900 numbers, and kernels hold 56 at most": (
        lambda c, x: ({"h": c["h"] + 1}, x),
        {"h": np.zeros((4, 30, 30), np.float32)},
    ),
    "kernels cannot compute 'sort' here": (
        lambda c, x: ({"h": jnp.sort(c["h"], 1)}, x),
        {"h": np.zeros((4, 3), np.float32)},
    ),
    "there are no environments": (
        lambda c, x: ({"h": c["h"] + 1}, x.sum()),
        {"h": np.zeros((0, 3), np.float32)},
    ),
    "a step has effects beside its results, such as printing": (
        lambda c, x: (jax.debug.callback(lambda: None), c)[::-1][:1] * 2,
        CARRY,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_kernel_runs_all_the_same_and_says_why(reason: str) -> None:
    step, carry = REFUSED[reason]
    results, (path,) = scanned(step, carry, noise(STEPS, 4))
    assert (path.kernel, path.reason) == (False, reason)
    expected = computed(lambda c, x: lax.scan(step, c, x), carry, noise(STEPS, 4))
    for got, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, wanted = random.key_data(got), random.key_data(wanted)
        np.testing.assert_array_equal(got, wanted)


def test_a_kernel_that_is_required_and_missing_is_an_error_with_its_reason() -> None:
    with pytest.raises(InputError, match="because an operation combines the environments"):
        scanned(mixing, CARRY, noise(STEPS, 4), fused="require")


def test_a_carry_of_another_type_is_the_error_of_scan() -> None:
    for step in (
        lambda c, x: ({**c, "i": c["i"] * 0.5}, x),
        lambda c, x: ({"a": c["a"]}, x),
        lambda c, x: ({**c, "a": c["a"][:2]}, x),
    ):
        with pytest.raises(TypeError, match="carry"):
            scanned(step, CARRY, noise(STEPS, 4))


def test_no_steps_at_all() -> None:
    _, (path,) = scanned(ODD_STEPS["flags"], CARRY, noise(0, 4))
    assert path.reason == "there are no steps"


# --- agents --------------------------------------------------------------------------------------

AGENTS = ["reinforce", "a2c", "npg", "trpo", "ppo", "ddpg", "sac"]
SMALL = {
    "num_envs": 3,
    "num_steps": 4,
    "hidden": (16,),
    "precision": "float32",
    "replay_capacity": 64,
    "learning_starts": 8,
}


def acting_agent(name: str, **fields: Any) -> tuple[Any, Any]:
    """Return an agent's function (key, state) that acts, and two of its states."""
    module = importlib.import_module(f"purejaxpg.agents.{name}")
    known = {field.name for field in dataclasses.fields(module.Config)}
    config = module.Config(**{k: v for k, v in {**SMALL, **fields}.items() if k in known})
    start = jax.vmap(lambda key: module.init(key, config))
    states = computed(start, random.split(random.key(0), 2))

    def act(key: jax.Array, state: Any) -> Any:
        if hasattr(module, "rollout"):
            return module.rollout(key, state, config)
        return module.interact(key, state, config, SMALL["num_steps"])

    return act, states


def assert_same_in_kernel(monkeypatch: Any, act: Any, states: Any) -> None:
    """Compare rollouts of two agents with different parameters, side by side."""
    keys = random.split(random.key(1), 2)
    monkeypatch.setattr(backend, "on_gpu", lambda: False)
    expected = computed(jax.vmap(act), keys, states)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    with paths.recorded() as recorded:
        results = computed(jax.vmap(act), keys, states)
    assert [path.reason for path in recorded] == [""]
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for got, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)


# NPG and TRPO act as A2C does.
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("npg", "trpo"))) for n in AGENTS],
)
def test_rollouts_of_all_agents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # REINFORCE acts for whole episodes, and rounding adds up over the hundreds of steps of a car.
    env = "UmbrellaChain-bsuite" if name == "reinforce" else "MountainCarContinuous-v0"
    act, states = acting_agent(name, env=env)
    assert_same_in_kernel(monkeypatch, act, states)


@pytest.mark.parametrize(
    "env",
    [
        "Acrobot-v1",
        *(pytest.param(e, marks=pytest.mark.slow) for e in ("CartPole-v1", "MountainCar-v0")),
        pytest.param("Pendulum-v1", marks=pytest.mark.slow),  # see test_agents.py
    ],
)
def test_rollouts_of_classic_control(env: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, states = acting_agent("ppo", env=env)
    assert_same_in_kernel(monkeypatch, act, states)


def test_without_a_kernel_a_rollout_has_the_bits_of_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    act, states = acting_agent("ppo", env="CartPole-v1", fused="off")
    keys = random.split(random.key(1), 2)
    with jax.disable_jit():  # XLA contracts products and sums differently in another program
        sorted_ = jax.vmap(act)(keys, states)
        monkeypatch.setattr(ppo.fused, "scan", lambda step, c, x, _: lax.scan(step, c, x))
        plain = jax.vmap(act)(keys, states)
    for got, wanted in zip(jax.tree.leaves(sorted_), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(got, wanted)
