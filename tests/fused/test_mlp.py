"""Networks in kernels, interpreted, against plain JAX."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import random

import purejaxpg
from purejaxpg import backend, fused, networks
from purejaxpg.agents import ppo
from purejaxpg.fused import mlp, paths, wide
from purejaxpg.fused.apply import with_kernels
from purejaxpg.fused.fit import STOPPED, fit, step_by_step

SIZE = 4  # of an observation
# Interpreted kernels are long programs that run once.
QUICKLY = {"xla_backend_optimization_level": 0}
FUNCTIONS: dict[str, Any] = {"tanh": jnp.tanh, "relu": jax.nn.relu, "gelu": jax.nn.gelu}


@dataclasses.dataclass(frozen=True)
class Config:
    fused: str = "auto"
    precision: str = "float32"
    activation: str = "tanh"


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "on_gpu", lambda: True)


def near(x: Any, y: Any, tolerance: float = 1e-6) -> None:
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def computed(function: Any, *args: Any) -> Any:
    return jax.jit(function).lower(*args).compile(compiler_options=QUICKLY)(*args)


# --- the kernels ---------------------------------------------------------------------------------


def layers_of(seed: int, *sizes: int) -> Any:
    keys = random.split(random.key(seed), len(sizes) - 1)
    shapes = zip(keys, sizes, sizes[1:], strict=False)
    return tuple(
        (random.normal(key, (d, h)) / np.sqrt(d), 0.1 * random.normal(key, (h,)))
        for key, d, h in shapes
    )


def plain(layers: Any, x: jax.Array, activations: tuple[str, ...]) -> jax.Array:
    for (weight, bias), name in zip(layers, [*activations, ""], strict=True):
        x = FUNCTIONS.get(name, lambda z: z)(x @ weight + bias)
    return x


def value_and_gradients(
    form: Any, layers: Any, x: jax.Array, activations: tuple[str, ...], *how: bool
) -> Any:
    def loss(layers: Any, x: jax.Array) -> Any:
        y = form(layers, x, activations, *how)
        return (jnp.square(y) - y).sum() / len(x), y

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(layers, x)


def both_forms(activations: tuple[str, ...]) -> Any:
    def both(layers: Any, x: jax.Array) -> Any:
        kernel = value_and_gradients(mlp.apply, layers, x, activations, False)
        return kernel, value_and_gradients(plain, layers, x, activations)

    return both


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sizes", "activations", "rows"),
    [
        ((SIZE, 1), (), 1),
        ((SIZE, 20, 3), ("tanh",), 16),
        ((18, 8, 16, 2), ("relu", "relu"), 100),
        ((SIZE, 16, 8, 16, 20), ("tanh", "relu", "tanh"), 300),
    ],
    ids=["linear", "one hidden", "two hidden", "three hidden"],
)
def test_values_and_gradients_are_those_of_plain_jax(
    sizes: Any, activations: tuple[str, ...], rows: int
) -> None:
    layers, x = layers_of(0, *sizes), random.normal(random.key(1), (rows, sizes[0]))
    near(*computed(both_forms(activations), layers, x))


def test_many_programs_of_many_rows_each_sum_to_the_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlp, "ROWS", 16)
    monkeypatch.setattr(mlp, "ROWS_OF_PROGRAM", 16)
    monkeypatch.setattr(mlp, "MAX_PROGRAMS", 3)  # 7 blocks, of which the last is not full
    layers, x = layers_of(0, SIZE, 16, 3), random.normal(random.key(1), (100, SIZE))
    near(*computed(both_forms(("tanh",)), layers, x))


@pytest.mark.parametrize("axis", [0, None], ids=["own rows", "shared rows"])
def test_each_agent_has_its_network(axis: int | None) -> None:
    layers = jax.tree.map(lambda *x: jnp.stack(x), *(layers_of(k, SIZE, 8, 1) for k in range(2)))
    x = random.normal(random.key(1), (2, 20, SIZE)) if axis == 0 else jnp.ones((20, SIZE))
    near(*computed(jax.vmap(both_forms(("tanh",)), (0, axis)), layers, x))


def test_fast_is_close_to_exact_however_small_or_large_numbers_are() -> None:
    layers, x = layers_of(0, SIZE, 16, 1), random.normal(random.key(1), (20, SIZE))
    x = x.at[0].mul(1e5)  # no float16

    def gradients(form: Any, scale: float, *how: bool) -> Any:
        y, pull = jax.vjp(lambda layers: form(layers, x, ("tanh",), *how), layers)
        return [g / scale for g in jax.tree.leaves(pull(scale * jnp.ones_like(y)))]

    exact = gradients(plain, 1.0)
    for scale in (1e-9, 1e9):
        for a, b in zip(gradients(mlp.apply, scale, True), exact, strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-3)


# --- functions of networks -----------------------------------------------------------------------


class Network(nn.Module):
    sizes: tuple[int, ...]
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in self.sizes[:-1]:
            x = FUNCTIONS[self.activation](nn.Dense(size)(x))
        return nn.Dense(self.sizes[-1])(x)


def test_values_of_an_agent_are_one_kernel() -> None:
    config = ppo.Config(hidden=(8, 8), precision="float32", num_envs=2, num_steps=5)
    critic = ppo.Critic(config)
    obs, next_obs = random.normal(random.key(0), (2, 5, 2, SIZE))
    params = critic.init(random.key(1), obs)
    none = jnp.zeros((5, 2), bool)
    with paths.recorded() as recorded:
        found = networks.values(critic, params, obs, next_obs, none, none, config)
    assert recorded == [paths.Path("values", True)] * 2
    near(found, (critic.apply(params, obs), critic.apply(params, next_obs)))


def reason(network: Any, x: Any, config: Config) -> str:
    """Return why values have no kernel, after a check that plain JAX gives them."""
    shapes = jax.eval_shape(network.init, random.key(0), x)
    with paths.recorded() as recorded:
        found = jax.eval_shape(
            lambda params, x: fused.apply(network.apply, params, x, config), shapes, x
        )
    assert found == jax.eval_shape(network.apply, shapes, x)
    ((loop, kernel, why, in_kernels),) = map(dataclasses.astuple, recorded)
    assert (loop, kernel, in_kernels) == ("values", False, False)
    return str(why)


class Picture(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(32, (2, 2))(x.reshape(-1, 2, 2, 1))
        return nn.Dense(1)(jnp.tanh(x).reshape(len(x), -1))


class Half(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, dtype=jnp.float16, param_dtype=jnp.float16)(x)


class Table(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.param("table", nn.initializers.zeros, (3,)) * x.sum(-1, keepdims=True)


REASONS: dict[str, tuple[nn.Module, dict[str, str], str]] = {
    "cnn": (Picture(), {}, "the parameter Conv_0/kernel is used outside of a multilayer perceptro"),
    "gelu": (Network((8, 1), "gelu"), {"activation": "gelu"}, "an activation is gelu, and kernels"),
    "wide": (Network((300, 1)), {}, "layers of 4, 300 and 1 units exceed a multiprocessor's sh"),
    "deep": (Network((8,) * 7), {}, "a network has 7 layers, and kernels take 6"),
    "half": (Half(), {}, "a parameter is not of type float32"),
    "table": (Table(), {}, "there is no multilayer perceptron that kernels know"),
    "off": (Network((8, 1)), {"fused": "off"}, "fused is 'off'"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", REASONS)
def test_what_has_no_kernel_says_why(name: str) -> None:
    network, fields, why = REASONS[name]
    assert why in reason(network, jnp.zeros((16, SIZE)), Config(**fields))


@pytest.mark.fast
def test_exact_products_are_plain_jax_on_a_real_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "interpreted", lambda: False)
    monkeypatch.setattr(paths, "too_old", lambda device: "")
    slow = "precision is 'float32', and its products are faster in plain JAX"
    assert reason(Network((8, 1)), jnp.zeros((16, SIZE)), Config()) == slow


@pytest.mark.fast
@pytest.mark.parametrize("precision", ["fast", "float32"])
def test_only_exact_products_in_plain_jax_are_of_the_highest_precision(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, network, x = Config("off", precision), Network((8, 1)), jnp.zeros((16, SIZE))
    params = network.init(random.key(0), x)

    def step(carry: jax.Array, _: Any) -> Any:
        return carry + network.apply(params, carry), None

    def loss(params: Any, x: jax.Array) -> Any:
        return network.apply(params, x).sum(), {}

    def everything(params: Any, x: jax.Array) -> Any:
        optimizer, order = optax.sgd(0.1), jnp.zeros((2, 16), jnp.int32)
        return (
            fused.apply(network.apply, params, x, config),
            fused.scan(step, x, jnp.zeros(2), config),
            fit(loss, optimizer, params, optimizer.init(params), x, order, config),
        )

    for on_gpu in (True, False):
        monkeypatch.setattr(backend, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
        text = str(jax.make_jaxpr(lambda *given: everything(*given))(params, x))
        products = text.count("dot_general[")
        highest = text.count("(Precision.HIGHEST, Precision.HIGHEST)")
        assert products > 6
        assert highest == (products if on_gpu and precision == "float32" else 0)


@pytest.mark.fast
def test_required_values_that_have_no_kernel_are_an_error() -> None:
    with pytest.raises(
        purejaxpg.InputError, match="but the values run in plain JAX, because layers of 4"
    ):
        reason(Network((300, 1)), jnp.zeros((16, SIZE)), Config("require"))


# --- gradient steps with networks in kernels -----------------------------------------------------


def test_another_optimiser_takes_its_steps_on_networks_in_kernels() -> None:
    actor, critic = Network((8, 2)), Network((16, 8, 1), "relu")
    x, target = random.normal(random.key(0), (40, SIZE)), random.normal(random.key(1), (40,))
    params = {
        "actor": actor.init(random.key(2), x),
        "critic": critic.init(random.key(3), x),
        "scale": jnp.ones(2),
    }
    order = jnp.arange(72).reshape(3, 24) % 40  # rows that are no power of two
    optimizer = optax.adamw(1e-2)

    def loss(params: Any, batch: Any) -> Any:
        x, target = batch
        value = critic.apply(params["critic"], x).squeeze(-1)
        policy = jax.nn.log_softmax(params["scale"] * actor.apply(params["actor"], x))
        policy = jnp.sort(policy, -1)  # no kernel takes all steps
        loss = jnp.square(value - target).mean() + (policy[:, 0] * target).mean()
        decay = jnp.square(params["critic"]["params"]["Dense_0"]["kernel"]).sum()
        return loss + 0.1 * decay, {"loss": loss}

    def both(params: Any) -> Any:
        given = params, optimizer.init(params), (x, target), order

        def stop(metrics: Any) -> jax.Array:
            return metrics["loss"] < 0.5

        in_kernels = fit(loss, optimizer, *given, Config(), stop)
        return in_kernels, step_by_step(loss, optimizer, *given, stop)

    with paths.recorded() as recorded:
        in_kernels, plain = computed(both, params)
    (path,) = recorded
    assert str(path) == (
        "The gradient steps run in plain JAX with the networks in kernels, because the optimiser "
        "is not `optimizers.clipped_adam`."
    )
    near(in_kernels, plain)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), params, in_kernels[0])
    assert min(jax.tree.leaves(moved)) > 1e-3
    assert set(in_kernels[2]) == {"loss", STOPPED}


# --- wide first layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_wide_networks_share_kernels(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "ROWS", 16)
    monkeypatch.setattr(mlp, "ROWS_OF_PROGRAM", 32)  # two programs, the last one of one block
    monkeypatch.setattr(wide, "ROWS", 32)  # of which the way back has several blocks
    monkeypatch.setattr(wide, "ROWS_OF_REST", 16)
    networks = layers_of(0, 300, 16, 3), layers_of(1, 300, 8, 8, 1)
    x, activations = random.normal(random.key(2), (40, 300)), (("tanh",), ("relu", "relu"))

    def both(networks: Any, x: jax.Array) -> Any:
        return tuple(plain(*of) for of in zip(networks, (x, x), activations, strict=True))

    def gradients(form: Any) -> Any:
        def loss(networks: Any, x: jax.Array) -> Any:
            ys = form(networks, x)
            return sum((jnp.square(y) - y).sum() / len(x) for y in ys), ys

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(networks, x)

    kernels = gradients(lambda networks, x: wide.apply(networks, x, None, activations, fast))
    near(kernels, gradients(both), 1e-2 if fast else 1e-5)


def test_wide_networks_take_their_rows_of_a_batch_themselves() -> None:
    actor, critic = Network((16, 2)), Network((8, 8, 1), "relu")
    batch = random.normal(random.key(0), (40, 300))
    params = {
        "actor": actor.init(random.key(1), batch),
        "critic": critic.init(random.key(2), batch),
    }
    order = jnp.arange(48).reshape(2, 24)[:, ::-1] % 40

    def loss(params: Any, x: jax.Array) -> Any:
        policy = jnp.sort(jax.nn.log_softmax(actor.apply(params["actor"], x)), -1)
        value = critic.apply(params["critic"], x).squeeze(-1)
        return (jnp.square(value) + policy[:, 0] * x[:, 0]).mean(), {"value": value.mean()}

    def both(params: Any, batch: Any) -> Any:
        optimizer = optax.sgd(0.1)
        given = loss, optimizer, params, optimizer.init(params), batch, order
        return fit(*given, Config()), step_by_step(*given)

    with paths.recorded() as recorded:
        in_kernels, plain = jax.jit(both)(params, batch)
    assert [path.networks for path in recorded] == [True]
    near(in_kernels, plain, 1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(("units", "kernels"), [(32, 1), (16, 2)], ids=["shared", "alone"])
def test_wide_networks_share_kernels_if_their_units_fit(
    units: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "MAX_UNITS", units)
    x, networks = jnp.zeros((16, 300)), (Network((16, 2)), Network((8, 1)))
    params = [jax.eval_shape(network.init, random.key(0), x) for network in networks]

    def outputs(params: Any, x: jax.Array) -> Any:
        return [network.apply(p, x) for network, p in zip(networks, params, strict=True)]

    found = str(jax.make_jaxpr(with_kernels(outputs, params, x, Config()))(params, x))
    assert found.count("pallas_call[") == kernels


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sizes", "inputs", "why"),
    [
        ((8, 1), 1025, "a network has 1025 inputs, and kernels take 1024"),
        ((1,), 300, "a network of 300 inputs has no hidden layer"),
        ((300, 1), 300, "layers of 300 and 1 units exceed a multiprocessor's shared memory"),
    ],
    ids=["too wide", "linear", "wide layer"],
)
def test_what_is_too_wide_says_why(sizes: tuple[int, ...], inputs: int, why: str) -> None:
    assert reason(Network(sizes), jnp.zeros((16, inputs)), Config()) == why
