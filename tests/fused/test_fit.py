"""Gradient steps in one kernel, interpreted, against the same steps one by one."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import random

import purejaxpg
from purejaxpg import backend, optimizers
from purejaxpg.fused import paths
from purejaxpg.fused.fit import STOPPED, fit, step_by_step
from purejaxpg.kernels import distributions, losses

ROWS, SAMPLES, STEPS = 32, 64, 5  # two chunks of rows in the kernel
SIZE = 4  # of an observation


@dataclasses.dataclass(frozen=True)
class Config:
    fused: str = "auto"
    precision: str = "float32"
    activation: str = "tanh"


EXACT = Config()


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "on_gpu", lambda: True)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
}


class Network(nn.Module):
    """Layers, of which the last one is linear, and perhaps a parameter beside them."""

    sizes: tuple[int, ...] = (16, 8, 3)
    activation: str = "tanh"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for size in self.sizes[:-1]:
            x = ACTIVATIONS[self.activation](nn.Dense(size)(x))
        return nn.Dense(self.sizes[-1])(x)


ACTOR, CRITIC = Network((16, 3)), Network((8, 1))


def initial() -> Any:
    x = jnp.zeros((1, SIZE))
    actor, critic = ACTOR.init(random.key(0), x), CRITIC.init(random.key(1), x)
    return {"actor": actor, "critic": critic, "log_std": jnp.full((3,), -0.5)}


def batch() -> dict[str, jax.Array]:
    keys = random.split(random.key(2), 6)
    return {
        "obs": random.normal(keys[0], (SAMPLES, SIZE)),
        "action": random.randint(keys[1], (SAMPLES,), 0, 3),
        "vector": random.normal(keys[2], (SAMPLES, 3)),
        "advantage": 3.0 * random.normal(keys[3], (SAMPLES,)),
        "target": random.normal(keys[4], (SAMPLES,)),
        "old": -1.0 + 0.1 * random.normal(keys[5], (SAMPLES,)),
    }


def order(rows: int = ROWS, steps: int = STEPS) -> jax.Array:
    keys = random.split(random.key(3), steps)
    return jnp.stack([random.permutation(key, SAMPLES)[:rows] for key in keys])


# --- losses --------------------------------------------------------------------------------------


def value_loss(params: Any, data: Any) -> Any:
    value = CRITIC.apply(params["critic"], data["obs"]).squeeze(-1)
    loss = losses.value_loss(value, data["target"]).mean()
    return loss, {"loss": loss}


def categorical_loss(params: Any, data: Any, clip_eps: Any = 0.2) -> Any:
    policy = distributions.categorical(ACTOR.apply(params["actor"], data["obs"]))
    advantage = data["advantage"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    log_prob = policy.log_prob(data["action"])
    surrogate = losses.ppo_clip(log_prob, data["old"], advantage, clip_eps).mean()
    entropy = policy.entropy().mean()
    critic, _ = value_loss(params, data)
    metrics = {
        "entropy": entropy,
        "kl": losses.approximate_kl(log_prob, data["old"]).mean(),
        "target": data["target"].mean(),
        "clip_eps": jnp.asarray(clip_eps),
    }
    return surrogate + 0.5 * critic - 0.01 * entropy, metrics


def gaussian_loss(params: Any, data: Any) -> Any:
    mean = ACTOR.apply(params["actor"], data["obs"])
    policy = distributions.diag_gaussian(mean, params["log_std"])
    log_prob = policy.log_prob(data["vector"])
    surrogate = losses.score_function(log_prob, data["advantage"]).mean()
    critic, _ = value_loss(params, data)
    entropy = policy.entropy().mean()
    return surrogate + critic - 0.01 * entropy, {"entropy": entropy}


def forked_loss(params: Any, data: Any) -> Any:
    """Loss that nobody thought of: Huber's, values twice, and entropy of scaled logits."""
    logits = ACTOR.apply(params["actor"], data["obs"])
    value, again = (CRITIC.apply(params["critic"], data["obs"]).squeeze(-1) for _ in range(2))
    error = optax.huber_loss(value, data["target"], delta=0.3).sum() + again.std()
    policy = jax.nn.log_softmax(logits * jax.nn.sigmoid(params["log_std"]))
    entropy = -(jnp.exp(policy) * policy).sum(-1).max()
    first = jnp.where(data["action"] == 0, policy[:, 0] * data["advantage"], 0.0).mean()
    return 0.1 * error - 0.1 * entropy - first, {"first": first}


# --- the kernel and plain JAX --------------------------------------------------------------------


def both(
    loss: Any,
    params: Any,
    stop: Any = None,
    learning_rate: Any = 1e-2,
    max_grad_norm: Any = 0.5,
    config: Config = EXACT,
) -> tuple[Any, Any]:
    optimizer = optimizers.clipped_adam(learning_rate, max_grad_norm)
    given = params, optimizer.init(params), batch(), order()
    fused = fit(loss, optimizer, *given, config, stop)
    return fused, step_by_step(loss, optimizer, *given, stop)


def compared(function: Callable[..., Any], *args: Any, tolerance: float = 1e-6) -> Any:
    """Run both forms, check that the first is a kernel and that they agree -> its result."""
    with paths.recorded() as recorded:
        fused, plain = jax.jit(function)(*args)
    assert recorded == [paths.Path("gradient steps", True)]
    assert jax.tree.structure(fused) == jax.tree.structure(plain)
    for x, y in zip(jax.tree.leaves(fused), jax.tree.leaves(plain), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    return fused


@pytest.mark.parametrize(
    "loss",
    [
        value_loss,
        pytest.param(categorical_loss, marks=pytest.mark.slow),
        gaussian_loss,
        forked_loss,
    ],
)
def test_a_kernel_takes_the_steps_of_plain_jax(loss: Any) -> None:
    params = initial()
    new, opt_state, metrics = compared(lambda params: both(loss, params), params)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), params, new)
    assert moved["critic"]["params"]["Dense_0"]["kernel"] > 1e-3
    assert jax.tree.leaves(opt_state)[0] == STEPS
    assert all(value.shape == () for value in metrics.values())


@pytest.mark.parametrize(
    ("sizes", "activation", "size"),
    [
        pytest.param((3,), "tanh", 4, id="linear"),
        pytest.param((16, 8, 16, 2), "relu", 15, id="three hidden"),
        pytest.param((24, 3), "relu", 16, id="no room for a bias"),
        pytest.param((8, 20), "tanh", 1, id="many outputs", marks=pytest.mark.slow),
    ],
)
def test_networks_of_other_shapes(sizes: Any, activation: str, size: int) -> None:
    network = Network(sizes, activation)
    data = {"x": random.normal(random.key(0), (SAMPLES, size)), "y": batch()["target"]}

    def loss(params: Any, data: Any) -> Any:
        loss = jnp.square(network.apply(params, data["x"]).sum(-1) - data["y"]).mean()
        return loss, {"loss": loss}

    def run(params: Any) -> Any:
        optimizer = optimizers.clipped_adam(1e-2, jnp.inf)
        given = params, optimizer.init(params), data, order()
        fused = fit(loss, optimizer, *given, Config())
        return fused, step_by_step(loss, optimizer, *given)

    compared(run, network.init(random.key(1), data["x"]), tolerance=3e-6)


def test_each_agent_has_its_rate_and_its_bound_and_stops_by_itself() -> None:
    def run(rate: Any, bound: Any, max_kl: Any, clip_eps: Any) -> Any:
        def loss(params: Any, data: Any) -> Any:
            return categorical_loss(params, data, clip_eps)

        return both(loss, initial(), lambda metrics: metrics["kl"] > max_kl, rate, bound)

    rates, bounds = jnp.array([0.01, 0.003]), jnp.array([0.3, jnp.inf])
    limits = jnp.array([0.16, jnp.inf])
    _, opt_state, metrics = compared(jax.vmap(run), rates, bounds, limits, jnp.array([0.1, 0.3]))
    stopped = metrics[STOPPED]
    assert 0.0 < stopped[0] < 1.0
    assert not stopped[1]
    assert jax.tree.leaves(opt_state)[0].tolist() == [
        round(STEPS * (1.0 - float(stopped[0]))),
        STEPS,
    ]


def test_a_step_that_breaks_everything_changes_nothing_if_it_stops() -> None:
    def loss(params: Any, data: Any) -> Any:
        value, metrics = value_loss(params, data)
        return value * jnp.inf, metrics

    def run(params: Any) -> Any:
        return both(loss, params, lambda metrics: metrics["loss"] > 0.0)

    new, _, _ = compared(run, initial())
    jax.tree.map(np.testing.assert_array_equal, new, initial())


def test_a_penalty_on_the_old_policy_is_computed_before_the_steps() -> None:
    def run(params: Any) -> Any:
        def loss(new: Any, data: Any) -> Any:
            old = distributions.categorical(ACTOR.apply(params["actor"], data["obs"]))
            policy = distributions.categorical(ACTOR.apply(new["actor"], data["obs"]))
            log_prob = policy.log_prob(data["action"])
            kl = old.kl_divergence(policy).mean()
            return kl - (log_prob * data["advantage"]).mean(), {"kl": kl}

        return both(loss, params)

    compared(run, {"actor": initial()["actor"]})


def test_fast_is_close_to_exact() -> None:
    params = initial()
    fast, plain = jax.jit(lambda p: both(value_loss, p, config=Config(precision="fast")))(params)
    differences = jax.tree.map(lambda x, y: np.abs(x - y).max(), fast[0], plain[0])
    assert 0.0 < max(jax.tree.leaves(differences)) < 2e-3


# --- plain JAX where there is no kernel ----------------------------------------------------------


def small(loss: Any, params: Any, **changes: Any) -> paths.Path:
    """Return how the steps ran, after a check that they were no kernel."""
    config, rows = changes.pop("config", Config()), changes.pop("rows", ROWS)
    optimizer = changes.pop("optimizer", optimizers.clipped_adam(1e-2, 0.5))
    data = {**batch(), **changes}
    given = params, jax.eval_shape(optimizer.init, params), data, order(rows, 2)
    with paths.recorded() as recorded:
        jax.eval_shape(lambda *given: fit(loss, optimizer, *given, config), *given)
    (path,) = recorded
    assert (path.loop, path.kernel) == ("gradient steps", False)
    return path


def squares_of(network: nn.Module) -> tuple[Any, Any]:
    def loss(params: Any, data: Any) -> Any:
        return jnp.square(network.apply(params, data["obs"])).mean(), {}

    return loss, network.init(random.key(0), batch()["obs"])


class Picture(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(32, (2, 2), name="Conv_0")(x.reshape(-1, 2, 2, 1))
        return nn.Dense(1)(jnp.tanh(x).reshape(len(x), -1))


def weight_decay(params: Any, data: Any) -> Any:
    loss, metrics = value_loss(params, data)
    return loss + jnp.square(params["critic"]["params"]["Dense_0"]["kernel"]).sum(), metrics


def shared(params: Any, data: Any) -> Any:
    first, _ = value_loss(params, data)
    second, _ = value_loss(params, {**data, "obs": data["vector"] @ jnp.ones((3, SIZE))})
    return first + second, {}


def doubled(params: Any, data: Any) -> Any:
    x = jnp.concatenate([data["obs"], -data["obs"]])
    return jnp.square(CRITIC.apply(params["critic"], x)).mean(), {}


def sorted_outputs(params: Any, data: Any) -> Any:
    return jnp.sort(CRITIC.apply(params["critic"], data["obs"]), 0)[0, 0], {}


def many_inputs() -> tuple[Any, Any]:
    network = Network()

    def loss(params: Any, data: Any) -> Any:
        return jnp.square(network.apply(params, jnp.tile(data["obs"], 100))).mean(), {}

    return loss, network.init(random.key(0), jnp.tile(batch()["obs"], 100))


REASONS = {
    "inputs": (*many_inputs(), {}, "a network has 400 inputs, and one kernel takes 256"),
    "cnn": (*squares_of(Picture()), {}, "the parameter Conv_0/kernel is used outside of a mult"),
    "gelu": (
        *squares_of(Network(activation="gelu")), {"config": Config(activation="gelu")},
        "an activation is gelu, and kernels know tanh and relu",
    ),
    "wide": (*squares_of(Network((256, 256, 1))), {}, "layers of 4, 256, 256 and 1 units exceed"),
    "exact": (
        *squares_of(Network((256, 128, 1))), {}, "layers of 4, 256, 128 and 1 units exceed"
    ),
    "deep": (*squares_of(Network((8,) * 6)), {}, "a network has 6 layers, and kernels take 5"),
    "outputs": (*squares_of(Network((8, 40))), {}, "a network has 40 outputs, and kernels take 32"),
    "decay": (weight_decay, initial(), {}, "the parameter critic/Dense_0/kernel is used out"),
    "shared": (shared, initial(), {}, "two networks of the loss share a parameter"),
    "doubled": (doubled, initial(), {}, "a network sees 64 inputs in a minibatch of 32 rows"),
    "rows": (value_loss, initial(), {"rows": 24}, "the rows of a minibatch are 24, no power of"),
    "sort": (sorted_outputs, initial(), {}, "kernels cannot compute 'sort' here"),
    "sgd": (value_loss, initial(), {"optimizer": optax.sgd(0.1)}, "the optimiser is not `opti"),
    "off": (value_loss, initial(), {"config": Config("off")}, "fused is 'off'"),
}  # fmt: skip


PLAIN = ("cnn", "gelu", "wide", "exact", "off")  # in the others, the networks are kernels


@pytest.mark.parametrize("name", REASONS)
def test_what_has_no_kernel_says_why(name: str) -> None:
    loss, params, changes, reason = REASONS[name]
    path = small(loss, params, **changes)
    assert reason in path.reason
    assert path.networks == (name not in PLAIN)


def test_an_activation_is_known_by_its_derivative_too() -> None:
    @jax.custom_jvp
    def straight_through(x: jax.Array) -> jax.Array:
        return jnp.maximum(x, 0.0)

    straight_through.defjvp(lambda x, changes: (jnp.maximum(x[0], 0.0), changes[0]))

    def loss(params: Any, data: Any) -> Any:
        hidden = straight_through(nn.Dense(16).apply(params["first"], data["obs"]))
        return jnp.square(nn.Dense(16).apply(params["second"], hidden)).mean(), {}

    layer = nn.Dense(16)
    params = {"first": layer.init(random.key(0), jnp.zeros((1, SIZE)))}
    params["second"] = layer.init(random.key(1), jnp.zeros((1, 16)))
    assert "the parameter second/kernel is used outside of a mu" in small(loss, params).reason


def test_on_a_cpu_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "on_gpu", lambda: False)
    assert small(value_loss, initial()).reason == "kernels need an NVIDIA GPU"


def test_a_required_kernel_that_does_not_exist_is_an_error() -> None:
    loss, params = squares_of(Network((256, 256, 1)))
    with pytest.raises(
        purejaxpg.InputError, match="the gradient steps run in plain JAX, because layers of"
    ):
        small(loss, params, config=Config("require"))


def test_pallas_is_imported_only_by_kernels() -> None:
    code = "import sys, purejaxpg.fused.fit; print('jax.experimental.pallas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
