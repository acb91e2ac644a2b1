"""Initialisers and torsos."""

import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import random

import purejaxpg
from purejaxpg import networks
from purejaxpg.agents import ppo

ROOT = pathlib.Path(networks.__file__).resolve().parent.parent


def settings(**fields: Any) -> Any:
    standard = {"torso": "mlp", "hidden": (8,), "activation": "tanh", "orthogonal_init": True}
    return types.SimpleNamespace(**{**standard, **fields})


# --- orthogonal matrices ------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    "shape",
    [(64, 32), (32, 64), (16, 16), (5, 1), (1, 5), (3, 3, 4, 16), (3, 3, 1, 16)],
    ids=["tall", "wide", "square", "column", "row", "tall kernel", "wide kernel"],
)
def test_rows_or_columns_are_orthogonal(shape: tuple[int, ...]) -> None:
    scale = 1.7
    weights = networks.orthogonal(scale)(random.key(0), shape)
    assert weights.shape == shape
    assert weights.dtype == jnp.float32
    matrix = np.asarray(weights, np.float64).reshape(-1, shape[-1])
    short = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(short, scale**2 * np.eye(len(short)), atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 3, 4)])
def test_orthogonal_is_the_factor_of_a_normal_matrix(shape: tuple[int, ...]) -> None:
    """A = Q R has one solution with a positive diagonal of R: that Q^T A is such an R decides."""
    key = random.key(4)
    matrix = np.asarray(networks.orthogonal(3.0)(key, shape), np.float64).reshape(-1, shape[-1])
    q = matrix / 3.0 if matrix.shape[0] >= matrix.shape[1] else matrix.T / 3.0
    r = q.T @ np.asarray(random.normal(key, q.shape), np.float64)
    np.testing.assert_allclose(r, np.triu(r), atol=1e-5)
    assert (np.diagonal(r) > 0.0).all()


def factor(matrix: Any) -> np.ndarray:
    """Q of LAPACK in double precision, with the signs that make the diagonal of R positive."""
    q, r = np.linalg.qr(np.asarray(matrix, np.float64))
    return q * np.sign(np.diagonal(r))


@pytest.mark.parametrize("shape", [(5, 4), (9, 9), (12, 10), (30, 25)])
def test_gram_schmidt_is_the_factor_of_lapack(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """In one block, in blocks of four columns with and without a rest, and in as few as allowed."""
    monkeypatch.setattr(networks, "BLOCK", 4)
    monkeypatch.setattr(networks, "MAX_BLOCKS", 3)
    matrices = random.normal(random.key(2), (20, *shape))
    batch = np.asarray(jax.jit(jax.vmap(lambda x: networks.gram_schmidt(x)))(matrices), np.float64)
    for q, matrix in zip(batch, matrices, strict=True):
        np.testing.assert_allclose(q, factor(matrix), atol=1e-4)
        np.testing.assert_allclose(q.T @ q, np.eye(shape[1]), atol=1e-6)


@pytest.mark.parametrize("near", [range(1, 4), range(1, 8), range(4, 8)])
def test_columns_that_are_almost_dependent_become_orthogonal(
    monkeypatch: pytest.MonkeyPatch, near: range
) -> None:
    """Of one block and of two, each column a ten-thousandth away from the first one."""
    monkeypatch.setattr(networks, "BLOCK", 4)
    matrix = np.array(random.normal(random.key(3), (16, 8)))
    matrix[:, list(near)] = matrix[:, :1] + 1e-4 * matrix[:, list(near)]
    q = np.asarray(jax.jit(lambda x: networks.gram_schmidt(x))(matrix), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(8), atol=1e-6)


@pytest.mark.fast
def test_initialiser_without_orthogonality_is_that_of_lecun() -> None:
    """Normal with a variance of 1 / inputs for any scale, cut off at two deviations."""
    key, shape = random.key(0), (50, 400)
    plain = networks.initializer(settings(orthogonal_init=False), 7.0)(key, shape)
    assert float(plain.std()) == pytest.approx(50**-0.5, rel=0.02)
    assert float(jnp.abs(plain).max()) < 2.0 * 50**-0.5 / 0.87  # a cut-off normal deviates less
    chosen = networks.initializer(settings(), 7.0)(key, shape)
    np.testing.assert_array_equal(chosen, networks.orthogonal(7.0)(key, shape))


@pytest.mark.fast
def test_matrices_are_uniform_over_rotations_and_reflections() -> None:
    """LAPACK's result is not: Householder's method makes the first diagonal entry negative.

    An entry of a uniform 4x4 matrix has mean 0 and variance 1/4, and half of them are reflections.
    """
    num_seeds = 2000
    keys = random.split(random.key(0), num_seeds)
    matrices = np.asarray(jax.jit(jax.vmap(lambda k: networks.orthogonal(1.0)(k, (4, 4))))(keys))
    entries = matrices.mean(0)
    assert np.abs(entries).max() < 4.5 * np.sqrt(0.25 / num_seeds)
    np.testing.assert_allclose((matrices**2).mean(0), np.full((4, 4), 0.25), atol=0.03)
    reflections = (np.linalg.det(matrices) < 0.0).mean()
    assert abs(reflections - 0.5) < 4.5 * np.sqrt(0.25 / num_seeds)


@pytest.mark.parametrize("shape", [(4, 8), (3, 3, 2, 4)])
def test_a_batch_of_initialisations_is_each_of_them(shape: tuple[int, ...]) -> None:
    keys = random.split(random.key(1), 6)
    init = jax.jit(lambda key: networks.orthogonal(2.0)(key, shape))
    batch, alone = jax.jit(jax.vmap(init))(keys), np.stack([init(key) for key in keys])
    np.testing.assert_allclose(batch, alone, rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.asarray(batch).reshape(6, -1), axis=0)) == 6


MANY_AGENTS = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax
from purejaxpg.agents import ppo
config = ppo.Config(env="CartPole-v1", num_envs=1, hidden=(64, 64))
keys = jax.random.split(jax.random.key(0), 256)
state = jax.block_until_ready(jax.jit(jax.vmap(ppo.init, in_axes=(0, None)))(keys, config))
print("leaves", {len(leaf) for leaf in jax.tree.leaves(state.params)})
"""


@pytest.mark.fast
def test_initialisation_calls_no_library() -> None:
    """LAPACK among them: see `networks.gram_schmidt`."""
    config = ppo.Config(env="CartPole-v1", num_envs=1, hidden=(8, 8))
    keys = random.split(random.key(0), 2)
    program = jax.jit(jax.vmap(ppo.init, in_axes=(0, None))).lower(keys, config).as_text()
    assert "dot_general" in program
    assert "custom_call" not in program


def test_initialising_many_agents_at_once_does_not_hang() -> None:
    """On the CPU of jax 0.10.2 it would, with `jnp.linalg.qr` instead of `networks.gram_schmidt`.

    There, each batched QR call occupies a thread of the pool and waits for tasks that it gave to
    the same pool. The six matrices of an actor and a critic decompose at the same time, so with
    two cores all threads wait and none is left to run what they wait for. With QR calls this very
    program never ended. It needs its own process, because a hung one cannot be stopped from within,
    and because the pool takes its size from the cores the process may use when jax starts. The
    limit is not a measurement: a hang lasts forever.
    """
    result = subprocess.run(
        [sys.executable, "-c", MANY_AGENTS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "leaves {256}\n"


# --- torsos -------------------------------------------------------------------------------------


STEPS, ENVS, INPUTS, SIZE = 7, 3, 4, 5
SEQUENCE = np.random.default_rng(0).normal(size=(STEPS, ENVS, INPUTS)).astype(np.float32)
FIRST = np.random.default_rng(1).normal(size=(ENVS, SIZE)).astype(np.float32)
STARTS = np.zeros((STEPS, ENVS), bool)
STARTS[[0, 2, 3, 6], [0, 1, 1, 2]] = True


def peer(variables: Any) -> Any:
    """The parameters of flax's cell, which holds those of each gate apart."""
    own = variables["params"]
    kernels, biases, memories = (
        jnp.split(x, 3, -1) for x in (own["input"]["kernel"], own["input"]["bias"], own["memory"])
    )
    gates = {}
    for name, kernel, bias, memory in zip("rzn", kernels, biases, memories, strict=True):
        gates[f"i{name}"] = {"kernel": kernel, "bias": bias}
        gates[f"h{name}"] = {"kernel": memory} | ({"bias": own["bias"]} if name == "n" else {})
    return {"params": gates}


def remembered(variables: Any, x: jax.Array, memory: jax.Array, starts: jax.Array) -> jax.Array:
    """flax's cell, called step by step."""
    memories = []
    for t in range(len(x)):
        memory = jnp.where(starts[t][:, None], 0.0, memory)
        memory, _ = nn.GRUCell(SIZE).apply(peer(variables), memory, x[t])
        memories.append(memory)
    return jnp.stack(memories)


def random_gru() -> tuple[networks.GRU, Any]:
    """Return a GRU whose biases are not zero, and its parameters."""
    gru = networks.GRU(SIZE)
    variables = gru.init(random.key(0), SEQUENCE, FIRST, STARTS)
    keys = iter(random.split(random.key(9), 4))
    return gru, jax.tree.map(lambda x: x + random.normal(next(keys), x.shape), variables)


def test_a_gru_and_its_gradient_are_those_of_flax_step_by_step() -> None:
    gru, variables = random_gru()
    weights = random.normal(random.key(5), (STEPS, ENVS, SIZE))
    arguments = (variables, SEQUENCE, FIRST)
    both = [
        jax.value_and_grad(lambda *a, f=f: (weights * f(*a, STARTS)).sum(), (0, 1, 2))(*arguments)
        for f in (gru.apply, remembered)
    ]
    np.testing.assert_allclose(
        gru.apply(*arguments, STARTS), remembered(*arguments, STARTS), rtol=2e-5, atol=2e-6
    )
    for got, wanted in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_nothing_passes_the_start_of_an_episode() -> None:
    gru, variables = random_gru()
    starts = jnp.zeros((STEPS, ENVS), bool).at[3].set(True)

    def later(x: jax.Array, memory: jax.Array) -> jax.Array:
        return gru.apply(variables, x, memory, starts)[3:].sum()

    of_x, of_memory = jax.grad(later, (0, 1))(SEQUENCE, FIRST)
    assert not np.any(of_x[:3]) and not np.any(of_memory) and np.all(of_x[3:])


def test_a_step_of_a_gru_is_one_of_a_sequence() -> None:
    gru, variables = random_gru()
    none = np.zeros((STEPS, ENVS), bool)
    memories = gru.apply(variables, SEQUENCE, FIRST, none)
    before = np.concatenate([FIRST[None], memories[:-1]])
    np.testing.assert_allclose(gru.apply(variables, SEQUENCE, before), memories, atol=1e-6)


@pytest.mark.fast
def test_a_gru_is_that_of_the_configuration() -> None:
    config = types.SimpleNamespace(memory_size=SIZE, orthogonal_init=True)
    params = networks.gru(config).init(random.key(0), SEQUENCE, FIRST, STARTS)["params"]
    square = params["memory"] @ params["memory"].T
    np.testing.assert_allclose(square, np.eye(SIZE), atol=1e-5)
    assert not params["bias"].any() and not params["input"]["bias"].any()
    config.orthogonal_init = False
    params = networks.gru(config).init(random.key(0), SEQUENCE, FIRST, STARTS)["params"]
    assert not np.allclose(params["memory"] @ params["memory"].T, np.eye(SIZE), atol=0.1)


@pytest.mark.fast
@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_mlp(leading: tuple[int, ...]) -> None:
    torso = networks.torso(settings(hidden=(8, 6)), (5,))
    x = random.normal(random.key(0), (*leading, 5))
    output, params = jax.jit(torso.init_with_output)(random.key(1), x)
    assert output.shape == (*leading, 6)
    layers = [params["params"][name] for name in ("Dense_0", "Dense_1")]
    assert [layer["kernel"].shape for layer in layers] == [(5, 8), (8, 6)]
    hand = np.asarray(x, np.float64)
    for layer in layers:
        np.testing.assert_array_equal(layer["bias"], np.zeros_like(layer["bias"]))
        hand = np.tanh(hand @ np.asarray(layer["kernel"], np.float64))
    np.testing.assert_allclose(output, hand, rtol=1e-4, atol=1e-5)
    # sqrt(2) on orthonormal rows: their norm
    np.testing.assert_allclose(jnp.linalg.norm(layers[0]["kernel"], axis=1), 2**0.5, rtol=1e-5)


def test_cnn_folds_observations_back_to_images() -> None:
    leading = (2, 3)
    torso = networks.torso(settings(torso="cnn", hidden=(7,), activation="relu"), (6, 5, 2))
    images = np.asarray(random.normal(random.key(0), (*leading, 6, 5, 2)))
    flat = images.reshape(*leading, -1)
    output, params = jax.jit(torso.init_with_output)(random.key(1), flat)
    layers = params["params"]["Conv_0"], params["params"]["MLP_0"]["Dense_0"]
    kernel, dense = (np.asarray(layer["kernel"], np.float64) for layer in layers)
    assert kernel.shape == (3, 3, 2, 16)
    assert dense.shape == (4 * 3 * 16, 7)
    for columns in (kernel.reshape(-1, 16), dense):  # sqrt(2) on orthonormal columns: their norm
        np.testing.assert_allclose((columns**2).sum(0), 2.0, rtol=1e-5)
    hand = np.zeros((int(np.prod(leading)), 4, 3, 16))  # no padding: 4 by 3 windows
    for row, column in np.ndindex(4, 3):
        window = images.reshape(-1, 6, 5, 2)[:, row : row + 3, column : column + 3]
        hand[:, row, column] = np.maximum(np.einsum("bhwc,hwco->bo", window, kernel), 0.0)
    hand = np.maximum(hand.reshape(*leading, -1) @ dense, 0.0)
    np.testing.assert_allclose(output, hand, rtol=1e-4, atol=1e-5)
    assert jax.eval_shape(torso.apply, params, flat[0, 0]).shape == (7,)


ACTIVATIONS = {
    "tanh": np.tanh,
    "relu": lambda x: np.maximum(x, 0.0),
    "elu": lambda x: np.where(x > 0.0, x, np.exp(x) - 1.0),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    # The usual approximation of x times the normal distribution function at x.
    "gelu": lambda x: 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))),
}


def test_every_activation() -> None:
    """All of them in one program, on the same weights."""
    torsos = {
        name: networks.torso(settings(hidden=(4,), activation=name), (3,))
        for name in networks.ACTIVATIONS
    }
    x = random.normal(random.key(0), (2, 3))
    params = torsos["tanh"].init(random.key(1), x)
    outputs = jax.jit(lambda x: {name: each.apply(params, x) for name, each in torsos.items()})(x)
    linear = np.asarray(x @ params["params"]["Dense_0"]["kernel"], np.float64)
    assert outputs.keys() == ACTIVATIONS.keys()
    for name, output in outputs.items():
        np.testing.assert_allclose(output, ACTIVATIONS[name](linear), rtol=1e-5, atol=1e-6)


def test_cnn_in_an_agent() -> None:
    config = ppo.Config(env="Breakout-MinAtar", torso="cnn", hidden=(8,), num_envs=2, num_steps=4)
    ppo.check(config)
    state = jax.jit(ppo.init)(random.key(0), config)
    assert state.obs.shape == (2, 400)
    for network, outputs in (("actor", 3), ("critic", 1)):
        params = state.params[network]["params"]
        assert params["torso"]["Conv_0"]["kernel"].shape == (3, 3, 4, 16)
        assert params["torso"]["MLP_0"]["Dense_0"]["kernel"].shape == (8 * 8 * 16, 8)
        assert params["Dense_0"]["kernel"].shape == (8, outputs)
    assert ppo.policy(random.key(1), state, state.obs, config).shape == (2,)


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("obs_shape", "fields"),
    [((4,), {}), ((10, 10, 4), {}), ((10, 10, 4), {"torso": "cnn"}), ((3, 3, 1), {"torso": "cnn"})],
)
def test_good_settings(obs_shape: tuple[int, ...], fields: Any) -> None:
    networks.check(settings(**fields), obs_shape)
    torso = networks.torso(settings(**fields), obs_shape)
    assert torso.name == "torso"
    x = jnp.ones((2, int(np.prod(obs_shape))))
    assert jax.eval_shape(torso.init_with_output, random.key(0), x)[0].shape == (2, 8)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"torso": "cnn"},
            "torso 'cnn' needs observations of shape [H, W, C], but they are [4]; use torso 'mlp'.",
        ),
        ({"torso": "rnn"}, "torso must be one of 'mlp', 'cnn', but is 'rnn'."),
        (
            {"activation": "Tanh"},
            "activation must be one of 'tanh', 'relu', 'elu', 'silu', 'gelu', but is 'Tanh'.",
        ),
        ({"hidden": ()}, "hidden must be a list of positive layer widths, but is []."),
        ({"hidden": (8, 0)}, "hidden must be a list of positive layer widths, but is [8, 0]."),
    ],
)
def test_bad_settings(fields: Any, message: str) -> None:
    with pytest.raises(purejaxpg.InputError) as error:
        networks.check(settings(**fields), (4,))
    assert str(error.value) == message


@pytest.mark.fast
@pytest.mark.parametrize("obs_shape", [(2, 10, 3), (10, 2, 3), (10, 10)])
def test_cnn_needs_an_image_of_three_by_three(obs_shape: tuple[int, ...]) -> None:
    with pytest.raises(purejaxpg.InputError, match="needs observations of shape"):
        networks.check(settings(torso="cnn"), obs_shape)


# --- pieces -------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(("length", "pieces", "sizes"), [(8, 4, {2}), (9, 4, {2, 1}), (3, 5, {1})])
def test_pieces_give_what_the_whole_gives(length: int, pieces: int, sizes: set[int]) -> None:
    def network(x: jax.Array) -> jax.Array:
        return jnp.tanh(x).sum(-1)

    x, y = random.normal(random.key(0), (2, length, 3, 4))
    batched = jax.jit(jax.vmap(lambda pair: networks.in_pieces(network, pair, pieces)))
    for array, value in zip((x, y), batched((x[None], y[None])), strict=True):
        np.testing.assert_allclose(value[0], jnp.tanh(array).sum(-1), rtol=1e-6, atol=1e-6)
    whole = jax.make_jaxpr(lambda pair: networks.in_pieces(network, pair, pieces))((x, y))
    steps = [step for step in equations(whole.jaxpr) if step.primitive.name == "tanh"]
    assert {step.outvars[0].aval.shape for step in steps} == {(size, 3, 4) for size in sizes}


# --- values -------------------------------------------------------------------------------------


def rollout(num_steps: int, num_envs: int, seed: int) -> tuple[jax.Array, ...]:
    """Random observations that follow one another except where an episode ends."""
    draw = np.random.default_rng(seed)
    obs = draw.normal(size=(num_steps + 1, num_envs, 3)).astype(np.float32)
    terminated, truncated = draw.random((2, num_steps, num_envs)) < 0.2
    done = terminated | truncated
    before_reset = draw.normal(size=(num_steps, num_envs, 3)).astype(np.float32)
    next_obs = np.where(done[..., None], before_reset, obs[1:])
    return tuple(jnp.asarray(x) for x in (obs[:-1], next_obs, terminated, done))


class Critic(nn.Module):
    """Known by heart; with `seen` it notes how many observations it looks at."""

    seen: Any = None

    def __call__(self, obs: jax.Array) -> jax.Array:
        if self.seen is not None:
            jax.debug.callback(lambda x: self.seen(x[..., 0].size), obs)
        return jnp.tanh(obs).sum(-1)


def critic(obs: jax.Array) -> jax.Array:
    return Critic().apply({}, obs)


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(9, 4), (1, 3), (7, 1)])
def test_values_are_those_of_two_passes(shape: tuple[int, int], on_gpu: bool) -> None:
    """Batched, with rows whose numbers of cut-off episodes differ.

    Except on a GPU, there is something to see in the next observation only where an episode was cut
    off.
    """
    rows = [rollout(*shape, seed) for seed in range(5)]
    obs, next_obs, terminated, done = map(jnp.stack, zip(*rows, strict=True))
    if not on_gpu:
        cut_off = done.at[:, -1].set(True) & ~terminated
        next_obs = jnp.where(cut_off[..., None], next_obs, jnp.nan)
    batched = jax.jit(jax.vmap(lambda *row: networks.values(Critic(), {}, *row, settings())))
    outputs = batched(obs, next_obs, terminated, done)
    for value, next_value, row in zip(*outputs, rows, strict=True):
        obs, next_obs, terminated, _ = row
        np.testing.assert_allclose(value, critic(obs), rtol=1e-6, atol=1e-6)
        expected = critic(next_obs)
        np.testing.assert_allclose(
            next_value[~terminated], expected[~terminated], rtol=1e-6, atol=1e-6
        )


@pytest.mark.fast
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("how", ["all cut off", "all terminated", "nothing ends"])
def test_values_where_all_ends_or_nothing_does(how: str) -> None:
    done = jnp.full((6, 2), how != "nothing ends")
    terminated = jnp.full((6, 2), how == "all terminated")
    obs = random.normal(random.key(0), (7, 2, 3))
    next_obs = obs[1:] + 10.0 * done[..., None]
    values = jax.jit(lambda *rollout: networks.values(Critic(), {}, *rollout, settings()))
    value, next_value = values(obs[:-1], next_obs, terminated, done)
    np.testing.assert_allclose(value, critic(obs[:-1]), rtol=1e-6, atol=1e-6)
    assert next_value.shape == (6, 2) and bool(jnp.isfinite(next_value).all())
    if how != "all terminated":
        np.testing.assert_allclose(next_value, critic(next_obs), rtol=1e-6, atol=1e-6)


class Column(Critic):
    """Forgets to drop the last axis."""

    def __call__(self, obs: jax.Array) -> jax.Array:
        return super().__call__(obs)[..., None]


@pytest.mark.fast
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("wrong", ["critic", "next_obs", "terminated", "done"])
def test_values_of_another_shape_are_refused(wrong: str) -> None:
    inputs = dict(zip(("obs", "next_obs", "terminated", "done"), rollout(4, 2, 0), strict=True))
    if wrong in inputs:
        inputs[wrong] = inputs[wrong][:, :1]
    with pytest.raises(AssertionError, match=r"shape"):
        networks.values(
            Column() if wrong == "critic" else Critic(), {}, **inputs, config=settings()
        )


@pytest.mark.fast
def test_the_critic_sees_each_observation_once_and_cut_off_ones_again() -> None:
    seen: list[int] = []
    counted = Critic(seen.append)
    obs = random.normal(random.key(0), (8, 2, 3))
    terminated = jnp.zeros((8, 2), bool).at[5, 0].set(True)  # worth nothing, so not looked at
    done = terminated.at[3, 0].set(True)
    jax.block_until_ready(networks.values(counted, {}, obs, obs, terminated, done, settings()))
    jax.effects_barrier()
    assert sum(seen) == 16 + 2 + 2  # all; steps 3 and 7 of the two environments; step 7 of one


@pytest.mark.fast
@pytest.mark.parametrize("pieces", [1, 2])
def test_on_a_gpu_no_loop_asks_the_host_whether_to_go_on(on_gpu: bool, pieces: int) -> None:
    obs, next_obs, terminated, done = rollout(8, 2, 0)
    program = jax.make_jaxpr(lambda: networks.values(
        Critic(), {}, obs, next_obs, terminated, done, settings(), pieces
    ))()  # fmt: skip
    loops = {step.primitive.name for step in equations(program.jaxpr)} & {"while", "cond"}
    assert loops == (set() if on_gpu else {"while"})


def equations(jaxpr: Any) -> Any:
    """Yield all equations, those inside of others included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from equations(inner.jaxpr)
