"""The environment boundary, over every environment that gymnax registers and a few of our own."""

import types
import urllib.error
from collections.abc import Iterator
from typing import Any

import chex
import gymnax
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from flax import struct
from gymnax.environments import spaces
from gymnax.utils import load_mnist
from jax import random

import purejaxpg
from purejaxpg import backend, envs
from purejaxpg.kernels import returns

PLAYABLE = [name for name in gymnax.registered_envs if name != "MNISTBandit-bsuite"]


@struct.dataclass
class MeasuredParams(probes.Params):
    """One parameter of each kind."""

    scale: float = 1.0
    bound: float = 2.0
    bonus: int = 0
    doubled: bool = False
    unused: float = 1.0
    tallied: float = 1.0


@struct.dataclass
class MeasuredState(probes.State):
    tally: jax.Array  # []


class Measured(probes.Probe):
    """The reward shows the action and all parameters but two.

    `unused` is read by nothing at all; `tallied` only by bookkeeping that nobody ever sees.
    """

    @property
    def default_params(self) -> MeasuredParams:
        return MeasuredParams()

    def reset_env(self, key: jax.Array, params: MeasuredParams) -> Any:
        return jnp.zeros(1), MeasuredState(jnp.zeros(1), jnp.zeros((), jnp.int32), jnp.zeros(()))

    def step_env(self, key: jax.Array, state: Any, action: Any, params: MeasuredParams) -> Any:
        reward = params.scale * action[0] * jnp.where(params.doubled, 2.0, 1.0) + params.bonus
        after = MeasuredState(state.obs, state.time + 1, state.tally + params.tallied)
        return state.obs, after, reward, jnp.zeros((), bool), {}

    def action_space(self, params: Any = None) -> Any:
        return spaces.Box(-params.bound, params.bound, (1,))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`envs.register`, undone after the test."""
    monkeypatch.setattr(envs, "_registered", dict(envs._registered))
    yield envs.register
    envs.make.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def measured() -> Iterator[envs.Env]:
    envs.register("measured", Measured)
    yield envs.make("measured")
    del envs._registered["measured"]
    envs.make.cache_clear()


def config(env: str, env_kwargs: Any = (), **env_params: Any) -> Any:
    """The fields of an agent's configuration that this module reads."""
    return types.SimpleNamespace(env=env, env_kwargs=env_kwargs, env_params=env_params)


def random_actions(key: jax.Array, env: envs.Env, *shape: int) -> jax.Array:
    """[*shape] indices, or [*shape, A] within [-1, 1]."""
    if env.discrete:
        return random.randint(key, shape, 0, env.num_actions)
    return random.uniform(key, (*shape, env.action_size), minval=-1.0, maxval=1.0)


def episodes(env: envs.Env, key: jax.Array, actions: jax.Array, overrides: Any) -> Any:
    """Actions [T, N] or [T, N, A] -> the first and all later observations, states and steps."""
    params = envs.params(env, overrides)
    key_reset, key_steps = random.split(key)
    obs, state = envs.reset(key_reset, env, params, actions.shape[1])

    def step(state: Any, now: Any) -> Any:
        key, action = now
        obs, state, returned = envs.step(key, env, state, action, params)
        return state, (obs, state, returned)

    keys = random.split(key_steps, actions.shape[0])
    _, (later, states, steps) = jax.lax.scan(step, state, (keys, actions))
    return jnp.concatenate([obs[None], later]), states, steps


# Nearly all of this file's time is compilation, and no test here asks for the last bit.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
compiled = jax.jit(episodes, static_argnums=0, compiler_options=QUICK)


def play(env: envs.Env, actions: Any, **overrides: Any) -> Any:
    """`episodes` as NumPy arrays; `overrides` are given as floats so that they share a program."""
    values = {name: float(value) for name, value in overrides.items()}
    return jax.device_get(compiled(env, random.key(0), jnp.asarray(actions), values))


def cartpole(actions: Any, **overrides: Any) -> Any:
    """60 steps of 3 poles, in one program for all tests; `actions` broadcasts to [60, 3]."""
    known = {"gravity": 9.8, "masscart": 1.0, "max_steps_in_episode": 500}
    actions = np.broadcast_to(np.asarray(actions, np.int32), (60, 3))
    return play(envs.make("CartPole-v1"), actions, **{**known, **overrides})


def pendulum(actions: Any, **overrides: Any) -> Any:
    """60 steps of 3 pendulums, likewise; `actions` broadcasts to [60, 3, 1]."""
    known = {"max_torque": 2.0, "max_steps_in_episode": 200}
    actions = np.broadcast_to(np.asarray(actions, np.float32), (60, 3, 1))
    return play(envs.make("Pendulum-v1"), actions, **{**known, **overrides})


def rewards(env: envs.Env, action: float, **overrides: Any) -> Any:
    """Reward [3, 2] of one constant action in `Measured`."""
    known = {"scale": 1.0, "bound": 2.0, "bonus": 0.0, "doubled": 0.0}
    actions = np.full((3, 2, 1), action, np.float32)
    return play(env, actions, **{**known, **overrides})[2].reward


def message_of(error: pytest.ExceptionInfo[Exception]) -> str:
    """The message, if it is one plain sentence."""
    text = str(error.value)
    assert text[-1] in ".?", text
    assert text[-2:] != "..", text
    assert ". " not in text, text
    assert "\n" not in text, text
    return text


# --- every environment --------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAYABLE)
def test_every_environment_plays(name: str) -> None:
    env = envs.make(name)
    obs, _, steps = play(env, random_actions(random.key(1), env, 3, 3))
    assert obs.shape == (4, 3, env.obs_size)
    assert steps.next_obs.shape == (3, 3, env.obs_size)
    for array in (obs, steps.next_obs, steps.reward, steps.episode_return):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    for array in (steps.terminated, steps.truncated, steps.done):
        assert array.dtype == np.bool_
    for array in (steps.terminated, steps.truncated, steps.reward, steps.episode_return):
        assert array.shape == (3, 3)
    np.testing.assert_array_equal(steps.episode_length > 0, steps.done)


@pytest.mark.fast
def test_an_environment_outlives_the_trace_that_made_it() -> None:
    @jax.jit
    def step(key: jax.Array) -> jax.Array:
        # No other test makes this one; its constructor creates arrays.
        env = envs.make("Breakout-MinAtar", use_minimal_action_set=False)
        _, state = envs.reset(key, env, env.default_params, 2)
        return envs.step(key, env, state, jnp.ones(2, jnp.int32), env.default_params)[0].sum()

    assert np.isfinite(step(random.key(0)))
    assert np.isfinite(jax.jit(lambda key: 2.0 * step.__wrapped__(key))(random.key(0)))


@pytest.mark.fast
def test_a_masked_cartpole_hides_the_velocities_and_nothing_else() -> None:
    both, seen = [envs.make(name) for name in ("CartPole-v1", "MaskedCartPole-v1")], []
    assert [(env.obs_shape, env.max_steps) for env in both] == [((4,), 500), ((2,), 500)]
    for env in both:
        params = envs.params(env, {"gravity": 20.0})
        obs, state = envs.reset(random.key(0), env, params, 3)
        following, state, now = envs.step(random.key(1), env, state, jnp.array([0, 1, 1]), params)
        space = env.inner.observation_space(params)
        seen.append((state.inner, [obs, following, now.next_obs, space.low, space.high]))
    (inner, whole), (same, masked) = seen
    chex.assert_trees_all_equal(inner, same)
    for all_numbers, positions in zip(whole, masked, strict=True):
        np.testing.assert_array_equal(all_numbers[..., ::2], positions)


@pytest.mark.fast
def test_names_lists_all_of_gymnax_once() -> None:
    assert set(gymnax.registered_envs) <= set(envs.names())
    assert len(envs.names()) == len(set(envs.names()))


@pytest.mark.fast
def test_an_environment_that_needs_a_download_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(load_mnist, "load_mnist", offline)
    with pytest.raises(purejaxpg.FaultError) as error:
        envs.make("MNISTBandit-bsuite")
    assert "'MNISTBandit-bsuite'" in message_of(error)
    assert "Name or service not known" in message_of(error)


@pytest.mark.fast
def test_an_index_is_observed_one_hot() -> None:
    env = envs.make("FrozenLake-misc")
    assert (env.obs_shape, env.obs_size, env.discrete) == ((16,), 16, True)
    obs, states, steps = play(env, random_actions(random.key(1), env, 12, 5))
    positions = np.eye(16, dtype=np.float32)[np.asarray(states.inner.position)]
    np.testing.assert_array_equal(obs[0], np.broadcast_to(np.eye(16)[0], (5, 16)))
    np.testing.assert_array_equal(obs[1:], positions)
    np.testing.assert_array_equal(steps.next_obs.sum(-1), np.ones((12, 5)))
    assert (obs.argmax(-1) > 0).any()  # somebody moved


@pytest.mark.parametrize("num_envs", [1, 8192])
def test_any_number_of_environments(num_envs: int) -> None:
    obs, _, steps = play(envs.make("CartPole-v1"), np.ones((1, num_envs), np.int32))
    assert obs.shape == (2, num_envs, 4)
    assert len(np.unique(obs[0], axis=0)) == num_envs
    np.testing.assert_array_equal(steps.reward, np.ones((1, num_envs)))
    assert not steps.done.any()


# --- the end of an episode ----------------------------------------------------------------------


def test_next_obs_is_before_the_reset_and_obs_after_it() -> None:
    """Poles pushed right until they fall, beside gymnax's own step, which does not reset."""
    env = envs.make("CartPole-v1")
    obs, states, steps = cartpole(1)
    step_env = jax.jit(env.inner.step_env)
    _, blank = env.inner.reset(random.key(0))
    for n in range(3):
        end = int(np.argmax(steps.done[:, n]))
        assert 5 < end < 15
        names = ("x", "x_dot", "theta", "theta_dot")
        state = blank.replace(**dict(zip(names, obs[0, n], strict=True)))
        for t in range(end + 1):
            own, state, reward, terminated, _ = step_env(
                random.key(0), state, 1, env.default_params
            )
            np.testing.assert_allclose(steps.next_obs[t, n], own, rtol=1e-4, atol=1e-5)
            assert steps.reward[t, n] == float(reward)
            assert steps.terminated[t, n] == bool(terminated) == (t == end)
        np.testing.assert_array_equal(obs[1 : end + 1, n], steps.next_obs[:end, n])
        assert abs(steps.next_obs[end, n, 2]) > env.default_params.theta_threshold_radians
        assert np.abs(obs[end + 1, n]).max() <= 0.05  # where gymnax starts
        assert states.inner.time[end, n] == 0
        assert obs[end + 1, n, 2] == states.inner.theta[end, n]
    assert not steps.truncated.any()


def test_on_a_gpu_a_reset_needs_no_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is the same reset."""
    expected = cartpole(1)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    env = envs.make("CartPole-v1")
    given = random.key(0), jnp.ones((60, 3), jnp.int32), {"max_steps_in_episode": 500.0}
    traced = jax.make_jaxpr(lambda *given: episodes(env, *given))(*given)
    assert "cond[" not in str(traced)
    monkeypatch.undo()
    assert "cond[" in str(jax.make_jaxpr(lambda *given: episodes(env, *given))(*given))
    outputs = jax.jit(jax.extend.core.jaxpr_as_fun(traced), compiler_options=QUICK)(
        *jax.tree.leaves(given)
    )
    assert expected[2].done.any()
    for own, other in zip(outputs, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.fast
def test_time_limit_truncates_and_does_not_terminate() -> None:
    obs, _, steps = cartpole(np.arange(60)[:, None] % 2, max_steps_in_episode=5)
    last = np.arange(60) % 5 == 4
    np.testing.assert_array_equal(steps.truncated, np.tile(last[:, None], 3))
    assert not steps.terminated.any()
    assert (steps.next_obs[last] != obs[1:][last]).any(-1).all()
    np.testing.assert_array_equal(steps.next_obs[~last], obs[1:][~last])


@pytest.mark.fast
def test_where_both_flags_are_set_nothing_is_bootstrapped() -> None:
    """DeepSea ends at its last row, which is also its time limit."""
    env = envs.make("DeepSea-bsuite", size=4)
    _, _, steps = play(env, random_actions(random.key(1), env, 8, 2))
    last = np.tile((np.arange(8) % 4 == 3)[:, None], 2)
    np.testing.assert_array_equal(steps.terminated, last)
    np.testing.assert_array_equal(steps.truncated, last)
    zero, huge = jnp.zeros((8, 2)), jnp.full((8, 2), 1e6)
    flags = jnp.asarray(steps.terminated), jnp.asarray(steps.done)
    advantage = np.asarray(returns.gae(jnp.asarray(steps.reward), zero, huge, *flags, 0.9, 0.0))
    np.testing.assert_array_equal(advantage[last], steps.reward[last])
    assert (advantage[~last] > 1e5).all()


@pytest.mark.fast
def test_no_two_episodes_start_alike() -> None:
    obs, _, steps = cartpole(1)
    starts = np.concatenate([obs[0], obs[1:][steps.done]])
    assert len(starts) >= 12
    assert len(np.unique(starts, axis=0)) == len(starts)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_episode_statistics_are_the_sums_over_each_episode(name: str) -> None:
    """Episodes that mostly terminate, and episodes cut after seven steps."""
    actions = random_actions(random.key(1), envs.make(name), 60, 3)
    limit = {"CartPole-v1": 25, "Pendulum-v1": 7}[name]
    run = {"CartPole-v1": cartpole, "Pendulum-v1": pendulum}[name]
    _, _, steps = run(actions, max_steps_in_episode=limit)
    totals, lengths, count = np.zeros((60, 3)), np.zeros((60, 3)), 0
    for n in range(3):
        total, length = 0.0, 0
        for t in range(60):
            total, length = total + float(steps.reward[t, n]), length + 1
            if steps.terminated[t, n] or steps.truncated[t, n]:
                totals[t, n], lengths[t, n], count = total, length, count + 1
                total, length = 0.0, 0
    assert count >= 6
    np.testing.assert_allclose(steps.episode_return, totals, rtol=1e-5)
    np.testing.assert_array_equal(steps.episode_length, lengths)
    metrics = envs.episode_metrics(steps)
    assert float(metrics["episode/return_sum"]) == pytest.approx(totals.sum(), rel=1e-5)
    assert float(metrics["episode/length_sum"]) == lengths.sum()
    assert float(metrics["episode/count"]) == count


@pytest.mark.fast
def test_metrics_without_an_episode_count_none() -> None:
    _, _, steps = pendulum(0.5)
    metrics = envs.episode_metrics(steps)
    assert {name: float(value) for name, value in metrics.items()} == {
        "episode/return_sum": 0.0,
        "episode/length_sum": 0.0,
        "episode/count": 0.0,
    }


# --- actions ------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_actions_are_clipped_to_the_bounds(sign: float, measured: envs.Env) -> None:
    """Pendulum clips too; the reward of the other environment shows the action that reached it."""
    far, bound, inside = (pendulum(sign * size)[2].next_obs for size in (100.0, 2.0, 1.9))
    np.testing.assert_array_equal(far, bound)
    assert (inside != bound).any()
    np.testing.assert_array_equal(rewards(measured, sign * 100.0), np.full((3, 2), sign * 2.0))
    np.testing.assert_array_equal(rewards(measured, sign * 1.5), np.full((3, 2), sign * 1.5))


@pytest.mark.fast
def test_bounds_follow_the_parameters(measured: envs.Env) -> None:
    far, bound, default = (pendulum(size, max_torque=5.0)[2].next_obs for size in (100.0, 5.0, 2.0))
    np.testing.assert_array_equal(far, bound)
    assert (default != bound).any()
    np.testing.assert_array_equal(rewards(measured, 100.0, bound=7.0), np.full((3, 2), 7.0))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "shape"),
    [("CartPole-v1", (2, 1)), ("CartPole-v1", (1,)), ("measured", (2,)), ("measured", (1, 1))],
)
def test_actions_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    env = envs.make(name)
    _, state = envs.reset(random.key(0), env, env.default_params, 2)
    action = jnp.zeros(shape, env.action_dtype)
    with pytest.raises(AssertionError, match="shape"):
        envs.step(random.key(0), env, state, action, env.default_params)


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.fast
def test_derived_parameters_follow() -> None:
    env = envs.make("CartPole-v1")
    heavy = envs.params(env, {"masscart": 3.0, "length": 2.0})
    assert float(heavy.total_mass) == pytest.approx(3.1, rel=1e-6)
    assert float(heavy.polemass_length) == pytest.approx(0.2, rel=1e-6)
    assert envs.params(env, {}) == env.default_params
    obs, _, _ = cartpole(1, masscart=3.0)
    light, _, _ = cartpole(1)
    np.testing.assert_array_equal(obs[0], light[0])
    # The first push changes the speed by tau * force / mass, up to the pole's small share.
    gained, gained_light = obs[1, :, 1] - obs[0, :, 1], light[1, :, 1] - light[0, :, 1]
    np.testing.assert_allclose(gained / gained_light, 1.1 / 3.1, rtol=0.1)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["total_mass", "polemass_length"])
def test_derived_parameters_cannot_be_set(name: str) -> None:
    with pytest.raises(purejaxpg.InputError, match=f"env_params.{name} of CartPole-v1") as error:
        envs.check(config("CartPole-v1", **{name: 2.0}))
    assert message_of(error)


@pytest.mark.fast
def test_parameters_keep_their_type(measured: envs.Env) -> None:
    given = {name: jnp.float32(1.0) for name in ("bonus", "doubled", "scale")}
    params = envs.params(measured, {**given, "max_steps_in_episode": jnp.float32(3.0)})
    assert params.bonus.dtype == params.max_steps_in_episode.dtype == jnp.int32
    assert params.doubled.dtype == jnp.bool_
    assert params.scale.dtype == jnp.float32
    assert envs.params(measured, {"scale": 3}).scale.dtype == jnp.float32
    expected = np.full((3, 2), 3.0 * 0.5 * 2.0 + 4.0)
    np.testing.assert_array_equal(rewards(measured, 0.5, scale=3, doubled=1, bonus=4), expected)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["scale", "bound", "bonus", "doubled", "max_steps_in_episode"])
def test_a_parameter_that_matters_passes(name: str, measured: envs.Env) -> None:
    assert envs.changes_transitions(measured, name)
    assert envs.check(config("measured", **{name: 1})) is measured


@pytest.mark.fast
def test_a_parameter_that_nothing_reads_is_refused(measured: envs.Env) -> None:
    with pytest.raises(purejaxpg.InputError, match=r"env_params\.unused changes no") as error:
        envs.check(config("measured", unused=2.0))
    assert message_of(error)


# Found by asking `changes_transitions` for all scalar parameters of all gymnax environments.
@pytest.mark.parametrize(
    ("env", "name"),
    [
        pytest.param("Acrobot-v1", "link_length_2", marks=pytest.mark.fast),
        ("Asterix-MinAtar", "shot_cool_down"),
        ("Seaquest-MinAtar", "ramp_interval"),
        ("Seaquest-MinAtar", "enemy_move_interval"),
    ],
)
def test_a_parameter_of_gymnax_that_nothing_reads_is_refused(env: str, name: str) -> None:
    with pytest.raises(purejaxpg.InputError, match=f"{name} changes no transition of {env}"):
        envs.check(config(env, **{name: 2}))


@pytest.mark.parametrize(
    ("env", "name"), [("measured", "tallied"), ("SimpleBandit-bsuite", "optimal_return")]
)
def test_a_parameter_of_mere_bookkeeping_is_refused(
    env: str, name: str, measured: envs.Env
) -> None:
    with pytest.raises(purejaxpg.InputError, match="changes no transition"):
        envs.check(config(env, **{name: 2.0}))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("env", "name", "value", "words"),
    [
        ("CartPole-v1", "max_steps_in_episode", 2.5, "must be a whole number, but is 2.5."),
        ("CartPole-v1", "max_steps_in_episode", 0, "must be 1 or more, but is 0."),
        ("CartPole-v1", "gravty", 1.0, "'gravty'; did you mean 'gravity'?"),
        ("CartPole-v1", "zzz", 1.0, "'zzz'; there are: max_steps_in_episode, gravity,"),
        ("Acrobot-v1", "available_torque", 1.0, "is an array and cannot be set."),
    ],
)
def test_bad_parameters(env: str, name: str, value: Any, words: str) -> None:
    with pytest.raises(purejaxpg.InputError) as error:
        envs.check(config(env, **{name: value}))
    assert name in message_of(error)
    assert env in message_of(error) or words.startswith("must be")
    assert words in message_of(error)


@pytest.mark.fast
def test_a_whole_number_may_come_as_a_float() -> None:
    envs.check(config("CartPole-v1", max_steps_in_episode=20.0))
    params = envs.params(envs.make("CartPole-v1"), {"max_steps_in_episode": 20.0})
    assert params.max_steps_in_episode.dtype == jnp.int32
    assert int(params.max_steps_in_episode) == 20


@pytest.mark.fast
def test_one_program_plays_many_parameters() -> None:
    env = envs.make("CartPole-v1")
    actions = np.asarray(random_actions(random.key(1), env, 60, 3))
    traces = []

    def at(gravity: jax.Array) -> Any:
        traces.append(gravity)
        overrides = {"gravity": gravity, "masscart": 1.0, "max_steps_in_episode": 500.0}
        return episodes(env, random.key(0), jnp.asarray(actions), overrides)[0]

    values = jnp.array([2.0, 20.0])
    rows = jax.device_get(jax.jit(jax.vmap(at), compiler_options=QUICK)(values))
    assert len(traces) == 1
    assert rows.shape == (2, 61, 3, 4)
    np.testing.assert_array_equal(rows[0, 0], rows[1, 0])
    assert (rows[0, 8] != rows[1, 8]).any(-1).all()
    for row, value in zip(rows, values, strict=True):
        alone, _, _ = cartpole(actions, gravity=value)
        np.testing.assert_allclose(row, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.fast
def test_horizon() -> None:
    env = envs.make("CartPole-v1")
    assert envs.horizon(env, {}) == 500
    assert envs.horizon(env, {"gravity": 1.0, "max_steps_in_episode": 7.0}) == 7
    assert envs.horizon(env, {"max_steps_in_episode": 2**31 - 1}) == 2**31 - 1

    def of_traced(limit: jax.Array) -> None:
        assert envs.horizon(env, {"max_steps_in_episode": limit}) is None

    jax.eval_shape(of_traced, jnp.int32(7))


# --- names and arguments ------------------------------------------------------------------------


@pytest.mark.fast
def test_an_unknown_environment_gets_the_nearest_name() -> None:
    with pytest.raises(purejaxpg.InputError) as error:
        envs.check(config("CartPole-v0"))
    message = "There is no environment 'CartPole-v0'; did you mean 'CartPole-v1'?"
    assert message_of(error) == message


@pytest.mark.fast
def test_arguments_of_the_constructor() -> None:
    env = envs.check(config("DeepSea-bsuite", env_kwargs=(("size", 5),)))
    assert (env.obs_shape, env.obs_size, env.max_steps) == ((5, 5), 25, 5)
    assert envs.make("DeepSea-bsuite", size=5) is env  # so that static arguments compare equal
    with pytest.raises(purejaxpg.InputError) as error:
        envs.check(config("DeepSea-bsuite", env_kwargs=(("sizes", 5),)))
    assert "'sizes'; did you mean 'size'?" in str(error.value)


@pytest.mark.parametrize(
    ("env", "argument", "value"),
    [
        ("CartPole-v1", "name", 3),  # also the name of an argument of `make`
        ("DeepSea-bsuite", "size", -1),  # gymnax's sentence ends in a stop, ours follows it
    ],
)
def test_bad_arguments_of_the_constructor_are_one_sentence(
    env: str, argument: str, value: Any
) -> None:
    with pytest.raises(purejaxpg.InputError) as error:
        envs.check(config(env, env_kwargs=((argument, value),)))
    assert argument in message_of(error)


@pytest.mark.fast
def test_environments_of_ones_own(register: Any) -> None:
    register("mine", probes.Chosen)
    assert "mine" in envs.names()
    first = envs.make("mine")
    assert (first.num_actions, first.obs_shape) == (2, (1,))
    register("mine", probes.Quadratic)  # as when a notebook cell runs again
    assert envs.names().count("mine") == 1
    second = envs.make("mine")
    assert (second.num_actions, second.action_size, second.discrete) == (0, 1, False)


@pytest.mark.fast
def test_ones_own_environment_may_replace_one_of_gymnax(register: Any) -> None:
    register("CartPole-v1", probes.Chosen)
    assert isinstance(envs.make("CartPole-v1").inner, probes.Chosen)
    assert envs.names().count("CartPole-v1") == 1
