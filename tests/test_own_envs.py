"""A user's own environments: those that gymnax accepts work, others are refused in one sentence.

Unless noted, each environment here pays 1 a step and ends after 5 steps, so that the right return
of every policy is known.
"""

import types
from collections.abc import Callable, Iterator
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from gymnax.environments import environment, spaces
from gymnax.environments.classic_control import cartpole
from gymnax.wrappers import purerl
from jax import random

from purejaxpg import InputError, envs, evaluate
from purejaxpg.agents import ppo, reinforce
from purejaxpg.envs import tracing

pytestmark = pytest.mark.fast


@struct.dataclass
class State:
    time: Any


@struct.dataclass
class Params(environment.EnvParams):
    max_steps_in_episode: int = 100


class Base(environment.Environment):
    """Ends after 5 steps and pays 1 for each."""

    @property
    def default_params(self) -> Any:
        return Params()

    def reward(self, state: State, action: Any, params: Any) -> Any:
        return jnp.float32(1)

    def terminated(self, state: State) -> Any:
        return state.time >= 5

    def step_env(self, key: Any, state: State, action: Any, params: Any) -> Any:
        state = State(state.time + 1)
        reward = self.reward(state, action, params)
        return jnp.zeros(2), state, reward, self.terminated(state), {}

    def reset_env(self, key: Any, params: Any) -> Any:
        return jnp.zeros(2), State(jnp.int32(0))

    def action_space(self, params: Any = None) -> Any:
        return spaces.Discrete(2)

    def observation_space(self, params: Any) -> Any:
        return spaces.Box(-1, 1, (2,))


@pytest.fixture(autouse=True)
def unregistered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test registers, here and with gymnax."""
    monkeypatch.setattr(envs, "_registered", dict(envs._registered))
    monkeypatch.setattr(gymnax.registration, "_registry", dict(gymnax.registration._registry))
    known = list(gymnax.registered_envs)
    yield
    gymnax.registered_envs[:] = known
    envs.make.cache_clear()


def made(cls: Any, **options: Any) -> envs.Env:
    envs.register("mine", cls, **options)
    return envs.make("mine")


def act_zero(key: Any, state: Any, obs: jax.Array, config: Any, greedy: bool = False) -> jax.Array:
    env = envs.from_config(config)
    shape = (len(obs),) if env.discrete else (len(obs), env.action_size)
    return jnp.zeros(shape, jnp.int32 if env.discrete else jnp.float32)


IDLE = types.ModuleType("idle")  # an agent of which only the policy is asked
IDLE.policy = act_zero  # type: ignore[attr-defined]


def settings(**fields: Any) -> Any:
    return ppo.Config(env="mine", total_timesteps=64, num_envs=2, num_steps=16, **fields)


def played(max_steps: int | None = None, **env_params: Any) -> dict[str, np.ndarray]:
    config = settings(env_params=env_params)
    return jax.device_get(evaluate.evaluate(random.key(0), IDLE, None, config, 3, max_steps))


def returned(env: envs.Env, num_steps: int, action: Any = 0.0) -> envs.Step:
    """Steps [T, 2] with the same action for all."""
    shape = (2,) if env.discrete else (2, env.action_size)
    chosen = jnp.full(shape, action, jnp.int32 if env.discrete else jnp.float32)
    _, state = envs.reset(random.key(0), env, env.default_params, 2)

    def step(state: Any, key: Any) -> Any:
        _, state, now = envs.step(key, env, state, chosen, env.default_params)
        return state, now

    return jax.device_get(jax.lax.scan(step, state, random.split(random.key(1), num_steps))[1])


# --- what gymnax accepts ------------------------------------------------------------------------


class TerminatedFloat(Base):
    def terminated(self, state: State) -> Any:
        return (state.time >= 5).astype(jnp.float32)


class TerminatedColumn(Base):
    def terminated(self, state: State) -> Any:
        return (state.time >= 5)[None]


class TerminatedInt(Base):
    def terminated(self, state: State) -> Any:
        return jnp.where(state.time >= 5, 3, 0)


class RewardInt(Base):
    def reward(self, state: State, action: Any, params: Any) -> Any:
        return jnp.int32(1)


class RewardColumn(Base):
    def reward(self, state: State, action: Any, params: Any) -> Any:
        return jnp.ones(1)


class PlainNumbers(Base):
    """State, reward and flag as Python's numbers, as far as they are constants."""

    def reset_env(self, key: Any, params: Any) -> Any:
        return jnp.zeros(2), State(0)

    def reward(self, state: State, action: Any, params: Any) -> Any:
        return 1.0


@pytest.mark.parametrize(
    "cls", [Base, TerminatedFloat, TerminatedColumn, TerminatedInt, RewardInt, RewardColumn,
            PlainNumbers]
)  # fmt: skip
def test_any_number_is_a_flag_or_a_reward(cls: Any) -> None:
    steps = returned(made(cls), 10)
    np.testing.assert_array_equal(steps.terminated[:, 0], [t % 5 == 4 for t in range(10)])
    assert steps.terminated.dtype == np.bool_ and not steps.truncated.any()
    np.testing.assert_array_equal(steps.reward, np.ones((10, 2), np.float32))
    assert steps.reward.dtype == np.float32
    assert set(steps.episode_return[steps.done]) == {5.0}


class Boxed(Base):
    """The reward shows the action that arrived."""

    space: Any = None

    def action_space(self, params: Any = None) -> Any:
        return self.space

    def reward(self, state: State, action: Any, params: Any) -> Any:
        assert action.shape == np.zeros(self.space.shape).shape
        weights = 10.0 ** np.arange(action.size)
        return (action.reshape(-1) * weights).sum()


@pytest.mark.parametrize(
    ("space", "size", "top"),
    [
        (spaces.Box(-1, 1, 3), 3, 111.0),
        (spaces.Box(-1.0, 1.0, (3,)), 3, 111.0),
        (spaces.Box([-1.0, -2.0], [1.0, 5.0], (2,)), 2, 51.0),
        (spaces.Box((-1.0, -2.0), np.array([1.0, 5.0]), (2,)), 2, 51.0),
        (spaces.Box(-1, 2, ()), 1, 2.0),
        (spaces.Box(-1, 1, (2, 2)), 4, 1111.0),
        (spaces.Box(jnp.array(-1), jnp.array(4), (1,)), 1, 4.0),
        (spaces.Box(-np.inf, np.inf, (1,)), 1, 100.0),
    ],
)
def test_a_box_of_any_shape_takes_actions_clipped_to_its_bounds(
    space: Any, size: int, top: float
) -> None:
    env = made(type("B", (Boxed,), {"space": space}))
    assert (env.discrete, env.action_size) == (False, size)
    np.testing.assert_allclose(returned(env, 2, 100.0).reward, np.full((2, 2), top))
    ppo.check(settings())


@pytest.mark.parametrize(
    ("space", "shape"),
    [
        (spaces.Box(-1, 1, 2), (2,)),
        (spaces.Box([-1, -1], [1, 1], (2,)), (2,)),
        (spaces.Box(-1, 1, (np.prod((2,)),)), (2,)),
        (spaces.Box(-1, 1, (1, 2)), (1, 2)),
    ],
)
def test_observations_of_any_shape_are_flattened(space: Any, shape: tuple[int, ...]) -> None:
    class Seen(Base):
        def observation_space(self, params: Any) -> Any:
            return space

    env = made(Seen)
    assert (env.obs_shape, env.obs_size) == (shape, 2)
    assert returned(env, 1).next_obs.shape == (1, 2, 2)


@struct.dataclass
class Bare:
    goal: float = 1.0


class NoLimitField(Base):
    """Its parameters do not have `max_steps_in_episode` at all."""

    @property
    def default_params(self) -> Any:
        return Bare()

    def is_truncated(self, state: State, params: Any) -> Any:
        return jnp.bool_(False)

    def reward(self, state: State, action: Any, params: Any) -> Any:
        return jnp.float32(params.goal)


class NoParams(NoLimitField):
    @property
    def default_params(self) -> Any:
        return None

    def reward(self, state: State, action: Any, params: Any) -> Any:
        return jnp.float32(1)


@pytest.mark.parametrize("cls", [NoLimitField, NoParams])
def test_parameters_need_not_have_a_time_limit(cls: Any) -> None:
    env = made(cls)
    ppo.check(settings())
    assert not env.ends and env.max_steps is None
    state = jax.eval_shape(lambda key: ppo.train(key, settings())[0], random.key(0))
    jax.eval_shape(lambda key, s: evaluate.score(key, ppo, s, settings(), 2, 20),
                   random.key(0), state)  # fmt: skip
    assert played(max_steps=20)["return"].tolist() == [5.0] * 3


def test_parameters_that_a_factory_returns_are_used() -> None:
    envs.register("mine", lambda: (Base(), Params(max_steps_in_episode=3)))
    env = envs.make("mine")
    assert env.max_steps == 3
    np.testing.assert_array_equal(returned(env, 6).truncated[:, 0], [False, False, True] * 2)

    def changed() -> Any:
        inner, params = gymnax.make("CartPole-v1")
        return inner, params.replace(max_steps_in_episode=7, masspole=0.2, total_mass=1.2,
                                     polemass_length=0.1)  # fmt: skip

    envs.register("mine", changed)
    assert envs.make("mine").max_steps == 7
    assert float(envs.params(envs.make("mine"), {"gravity": 1.0}).masspole) == pytest.approx(0.2)


@pytest.mark.parametrize(
    "wrap", [purerl.FlattenObservationWrapper, purerl.LogWrapper, purerl.StickyActionWrapper,
             purerl.GymnaxWrapper]
)  # fmt: skip
def test_wrappers_of_gymnax_play_and_score(wrap: Any) -> None:
    env = made(lambda: wrap(Base()))
    steps = returned(env, 10)
    np.testing.assert_array_equal(steps.terminated[:, 0], [t % 5 == 4 for t in range(10)])
    assert (env.max_steps, env.ends) == (100, True)
    assert played()["return"].tolist() == [5.0] * 3


# --- what cannot work ---------------------------------------------------------------------------


class OldStep(Base):
    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        return jnp.zeros(2), state, jnp.float32(1), jnp.bool_(False), {}


class NoFinal(Base):
    def step(self, key: Any, state: Any, action: Any, params: Any = None) -> Any:
        return jnp.zeros(2), state, jnp.float32(1), jnp.bool_(False), jnp.bool_(False), {}


class ShortStep(Base):
    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        return jnp.zeros(2), state, jnp.float32(1), {}


class DictObs(Base):
    def reset_env(self, key: Any, params: Any) -> Any:
        return {"a": jnp.zeros(2)}, State(jnp.int32(0))


class WrongSize(Base):
    def reset_env(self, key: Any, params: Any) -> Any:
        return jnp.zeros(3), State(jnp.int32(0))


class TwoRewards(Base):
    def reward(self, state: State, action: Any, params: Any) -> Any:
        return jnp.ones(2)


class OtherState(Base):
    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        return jnp.zeros(2), State(state.time + 0.5), jnp.float32(1), state.time > 5, {}


class LostState(Base):
    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        return jnp.zeros(2), {"t": state.time}, jnp.float32(1), state.time > 5, {}


class NoTime(Base):
    def reset_env(self, key: Any, params: Any) -> Any:
        return jnp.zeros(2), {"steps": jnp.int32(0)}

    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        return jnp.zeros(2), state, jnp.float32(1), jnp.bool_(False), {}


class HugeLimit(Base):
    @property
    def default_params(self) -> Any:
        return Params(max_steps_in_episode=3_000_000_000)


class Broken(Base):
    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        return state.nothing


class NoActions(Base):
    def action_space(self) -> Any:  # type: ignore[override]
        return spaces.Discrete(2)


def with_space(member: str, space: Any) -> Any:
    return type("Odd", (Base,), {member: lambda self, params=None: space})


def failing() -> Any:
    raise KeyError("level 7")


REFUSED: list[tuple[Any, list[str]]] = [
    (OldStep, ["step of OldStep", "5 values", "gymnax 1.0"]),
    (NoFinal, ["step of NoFinal", "final_observation"]),
    (ShortStep, ["step_env of ShortStep", "4 values"]),
    (DictObs, ["reset_env of DictObs", "dict", "[2]"]),
    (WrongSize, ["reset_env of WrongSize", "[3]", "[2]"]),
    (TwoRewards, ["step_env of TwoRewards", "one number as reward"]),
    (OtherState, ["step_env of OtherState", "state.time", "int32", "float32"]),
    (LostState, ["step_env of LostState", "structure"]),
    (NoTime, ["is_truncated of NoTime", "time"]),
    (HugeLimit, ["is_truncated of HugeLimit", "3000000000"]),
    (Broken, ["step_env of Broken", "nothing"]),
    (NoActions, ["action_space of NoActions"]),
    (failing, ["cannot be made", "level 7"]),
    (lambda: None, ["default_params"]),
    (with_space("action_space", spaces.Discrete(0)), ["action_space of Odd", "Discrete(0"]),
    (with_space("action_space", spaces.Box(-1, 1, (0,))), ["action_space of Odd", "empty"]),
    (with_space("action_space", spaces.Box(1, -1, (2,))), ["action_space of Odd", "exceed"]),
    (with_space("action_space", spaces.Box(np.nan, 1, (2,))), ["action_space of Odd", "exceed"]),
    (with_space("action_space", spaces.Box([0, 0, 0], [1, 1, 1], (2,))), ["action_space of Odd"]),
    (with_space("action_space", spaces.Box(-1, 1, "wide")), ["action_space of Odd", "shape"]),
    (with_space("action_space", spaces.Tuple([spaces.Discrete(2)])), ["action_space", "Tuple"]),
    (with_space("action_space", None), ["action_space of Odd is None"]),
    (with_space("observation_space", spaces.Discrete(0)), ["observation_space", "Discrete(0"]),
    (with_space("observation_space", spaces.Box(-1, 1, (2, 0))), ["observation_space", "empty"]),
    (with_space("observation_space", spaces.Dict({})), ["observation_space of Odd", "Dict"]),
    (with_space("observation_space", None), ["observation_space of Odd is None"]),
]


@pytest.mark.parametrize(("cls", "words"), REFUSED, ids=[words[0] for _, words in REFUSED])
def test_a_broken_environment_is_refused_with_class_and_member(cls: Any, words: list[str]) -> None:
    envs.register("mine", cls)
    with pytest.raises(InputError) as caught:
        ppo.check(settings())
    message = str(caught.value)
    assert "'mine'" in message and all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")


# --- parameters ---------------------------------------------------------------------------------


@struct.dataclass
class Uses(Params):
    n: int = 3
    x: float = 0.5
    flag: bool = True
    name: str = struct.field(pytree_node=False, default="a")
    table: Any = struct.field(default_factory=lambda: jnp.arange(3.0))


TABLE = [0.1, 0.2, 0.3, 0.4]
STATIC: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "if": ("flag", lambda p: 1.0 if p.flag else 0.0),
    "while": ("n", lambda p: 1.0 if p.n > 2 else 0.0),
    "loop": ("n", lambda p: sum(1.0 for _ in range(p.n))),
    "index of a list": ("n", lambda p: TABLE[p.n]),
    "shape": ("n", lambda p: jnp.zeros(p.n).sum()),
    "arange": ("n", lambda p: jnp.arange(p.n).sum()),
    "linspace": ("n", lambda p: jnp.linspace(0, 1, p.n).sum()),
    "one hot": ("n", lambda p: jax.nn.one_hot(0, p.n).sum()),
    "float()": ("x", lambda p: float(p.x)),
    "int()": ("n", lambda p: float(int(p.n))),
    "numpy": ("x", lambda p: np.sin(p.x)),
    "numpy array": ("n", lambda p: np.arange(p.n).sum()),
    "slice": ("n", lambda p: jnp.arange(9.0)[: p.n].sum()),
    "repeat": ("n", lambda p: jnp.repeat(jnp.ones(1), p.n).sum()),
}
TRACED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "where": ("flag", lambda p: jnp.where(p.flag, 1.0, 0.0)),
    "index of an array": ("n", lambda p: jnp.array(TABLE)[p.n]),
    "fori_loop": ("n", lambda p: jax.lax.fori_loop(0, p.n, lambda i, s: s + 1.0, 0.0)),
    "product": ("x", lambda p: 2.0 * p.x),
}
OTHER = {"flag": False, "x": 0.7, "n": 2}


def using(use: Callable[[Any], Any]) -> Any:
    class Used(Base):
        @property
        def default_params(self) -> Any:
            return Uses()

        def reward(self, state: State, action: Any, params: Any) -> Any:
            return jnp.float32(use(params))

        def reset_env(self, key: Any, params: Any) -> Any:
            return jnp.zeros(2) + use(params), State(jnp.int32(0))

    return Used


@pytest.mark.parametrize("how", [*STATIC, *TRACED])
def test_a_parameter_works_as_a_constant_and_set_where_it_can_be_traced(how: str) -> None:
    name, use = {**STATIC, **TRACED}[how]
    env = made(using(use))
    np.testing.assert_allclose(returned(env, 1).reward, float(use(Uses())), rtol=1e-6)
    config = settings(env_params={name: OTHER[name]})
    if how in TRACED:
        ppo.check(config)
        changed = envs.params(env, config.env_params)
        assert float(use(changed)) != float(use(Uses()))
    else:
        with pytest.raises(InputError, match=f"env_params.{name} of mine decides the shape"):
            ppo.check(config)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("name", 1.0, "is not a number"),
        ("table", 1.0, "is an array"),
        ("n", 2.5, "whole number"),
        ("n", 3_000_000_000, "between -2147483648 and 2147483647"),
        ("n", 10**30, "between"),
        ("flag", 2, "true or false"),
        ("x", 1e39, "finite"),
        ("max_steps_in_episode", 3_000_000_000, "between"),
        ("max_steps_in_episode", 0, "1 or more"),
        ("tabel", 1, "did you mean 'table'"),
    ],
)
def test_values_that_a_parameter_cannot_have(name: str, value: Any, words: str) -> None:
    made(using(lambda p: jnp.where(p.flag, 1.0 * p.n + p.x, 0.0)))
    with pytest.raises(InputError, match=words) as caught:
        ppo.check(settings(env_params={name: value}))
    assert name in str(caught.value)


@pytest.mark.parametrize("value", [16777216, 16777217, 2**31 - 1, -(2**31), 33554433.0])
def test_whole_numbers_are_not_rounded_to_float32(value: Any) -> None:
    env = made(using(lambda p: jnp.where(p.n == int(value), 7.0, 1.0)))
    ppo.check(settings(env_params={"n": value}))
    assert int(envs.params(env, {"n": value}).n) == value
    traced = jax.jit(lambda n: envs.params(env, {"n": n}).n)(np.int32(value))
    assert int(traced) == value


class MyCartPole(cartpole.CartPole):
    """A subclass has the same parameters and the same equations."""


@struct.dataclass
class LikeCartPole(Params):
    masscart: float = 2.0
    masspole: float = 0.5
    total_mass: float = 2.5
    length: float = 1.0
    polemass_length: float = 0.5


class CartPole(Base):
    """Of the name of gymnax's, with parameters of its own."""

    @property
    def default_params(self) -> Any:
        return Bare()

    def is_truncated(self, state: State, params: Any) -> Any:
        return state.time > 20

    def reward(self, state: State, action: Any, params: Any) -> Any:
        return jnp.float32(params.goal)


def masses(params_class: Any) -> Any:
    class Masses(Base):
        @property
        def default_params(self) -> Any:
            return params_class()

        def reward(self, state: State, action: Any, params: Any) -> Any:
            p = params
            return p.masscart + p.masspole / p.total_mass + p.length * p.polemass_length

    return Masses


DERIVING = {
    "gymnax's": cartpole.CartPole,
    "a subclass": MyCartPole,
    "flattened": lambda: purerl.FlattenObservationWrapper(cartpole.CartPole()),
    "logged": lambda: purerl.LogWrapper(MyCartPole()),
    "twice wrapped": lambda: purerl.LogWrapper(
        purerl.FlattenObservationWrapper(cartpole.CartPole())
    ),
    "with the same parameters": masses(LikeCartPole),
}


@pytest.mark.parametrize("kind", DERIVING)
@pytest.mark.parametrize("name", ["masscart", "masspole", "length"])
def test_derived_parameters_follow_wherever_they_are(kind: str, name: str) -> None:
    env = made(DERIVING[kind])
    envs.check(types.SimpleNamespace(env="mine", env_kwargs=(), env_params={name: 5.0}))
    p = envs.params(env, {name: 5.0})
    assert float(getattr(p, name)) == 5.0
    assert float(p.total_mass) == pytest.approx(float(p.masscart) + float(p.masspole))
    assert float(p.polemass_length) == pytest.approx(float(p.masspole) * float(p.length))
    for stored in ("total_mass", "polemass_length"):
        with pytest.raises(InputError, match="follows from its other parameters"):
            ppo.check(settings(env_params={stored: 1.0}))


def test_a_name_alone_derives_nothing() -> None:
    env = made(CartPole)
    ppo.check(settings(env_params={"goal": 2.0}))
    assert float(envs.params(env, {"goal": 2.0}).goal) == 2.0


def test_a_source_whose_rule_does_not_hold_is_refused() -> None:
    """Its default contradicts the rule, so nobody can say what a new mass makes of it."""

    @struct.dataclass
    class Stale(LikeCartPole):
        total_mass: float = 9.0

    made(masses(Stale))
    for name in ("masscart", "masspole"):
        with pytest.raises(InputError, match=f"env_params.{name} of mine cannot be set.*total_mas"):
            ppo.check(settings(env_params={name: 1.0}))
    ppo.check(settings(env_params={"length": 2.0}))  # polemass_length follows its rule
    ppo.check(settings(env_params={"total_mass": 2.0}))  # a parameter like any other then


# --- time limits --------------------------------------------------------------------------------


class Endless(Base):
    """Never terminates."""

    def terminated(self, state: State) -> Any:
        return jnp.bool_(False)


class NeverTruncated(Base):
    """Its parameters inherit a limit of 1, which is not used."""

    @property
    def default_params(self) -> Any:
        return environment.EnvParams()

    def is_truncated(self, state: State, params: Any) -> Any:
        return jnp.bool_(False)


class HardCoded(Endless):
    def is_truncated(self, state: State, params: Any) -> Any:
        return state.time >= 23


@struct.dataclass
class Named(Params):
    max_steps_in_episode: int = 1
    limit: int = 23


class OwnField(Endless):
    @property
    def default_params(self) -> Any:
        return Named()

    def is_truncated(self, state: State, params: Any) -> Any:
        return state.time >= params.limit


@struct.dataclass
class Counted:
    steps: Any


class OwnCounter(HardCoded):
    def reset_env(self, key: Any, params: Any) -> Any:
        return jnp.zeros(2), Counted(jnp.int32(0))

    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        return jnp.zeros(2), Counted(state.steps + 1), jnp.float32(1), jnp.bool_(False), {}

    def is_truncated(self, state: Any, params: Any) -> Any:
        return state.steps >= 23


@pytest.mark.parametrize("cls", [HardCoded, OwnField, OwnCounter])
def test_a_limit_of_ones_own_is_what_an_episode_is_scored_by(cls: Any) -> None:
    env = made(cls)
    assert env.ends and env.max_steps is None  # it ends, and nobody can say beforehand when
    scores = evaluate.score(random.key(0), IDLE, None, settings(), 3)
    assert scores["evaluation/return"].tolist() == [23.0] * 3
    assert scores["evaluation/greedy_return"].tolist() == [23.0] * 3
    assert scores["evaluation/finished"].all()
    steps = returned(env, 50)
    assert set(steps.episode_length[steps.done]) == {23}


def test_another_limit_is_followed_even_where_it_is_traced() -> None:
    made(OwnField)
    assert played(limit=40)["return"].tolist() == [40.0] * 3
    made(Endless)
    assert played(max_steps_in_episode=7)["return"].tolist() == [7.0] * 3
    assert played(max_steps_in_episode=150)["return"].tolist() == [150.0] * 3

    def one(limit: jax.Array) -> jax.Array:
        config = settings(env_params={"max_steps_in_episode": limit})
        return evaluate.evaluate(random.key(0), IDLE, None, config, 2)["return"]

    limits = jnp.array([3, 40, 101])
    np.testing.assert_array_equal(jax.vmap(one)(limits), np.outer([3.0, 40, 101], np.ones(2)))


def test_without_any_limit_the_user_is_asked_for_one() -> None:
    made(NeverTruncated)
    ppo.check(settings())  # training needs none
    with pytest.raises(InputError, match=r"'mine' never truncates .* max_steps=") as caught:
        evaluate.score(random.key(0), IDLE, None, settings(), 3)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"plays whole episodes.*max_steps="):
        reinforce.check(reinforce.Config(env="mine", total_timesteps=6400, num_envs=2))


@pytest.mark.parametrize("cls", [NeverTruncated, Endless, HardCoded])
@pytest.mark.parametrize("wrap", [lambda env: env, purerl.LogWrapper])
def test_a_limit_given_to_register_truncates_in_training_too(cls: Any, wrap: Any) -> None:
    env = made(lambda: wrap(cls()), max_steps=9)
    ends = 5 if cls is NeverTruncated else 9
    steps = returned(env, 20)
    np.testing.assert_array_equal(steps.done[:, 0], [t % ends == ends - 1 for t in range(20)])
    assert steps.terminated.any() == (ends == 5) and steps.truncated.any() == (ends == 9)
    assert played()["return"].tolist() == [float(ends)] * 3
    assert env.max_steps == 9
    reinforce.check(reinforce.Config(env="mine", total_timesteps=6400, num_envs=2))


def test_of_two_limits_the_lower_one_counts() -> None:
    assert made(Endless, max_steps=1000).max_steps == 100
    assert made(Endless, max_steps=10).max_steps == 10
    with pytest.raises(InputError, match="max_steps of env 'mine' must be 1 or more, but is 0"):
        envs.register("mine", Endless, max_steps=0)


def test_an_episode_that_was_cut_short_has_no_return() -> None:
    made(Endless)
    scores = played(max_steps=37)
    assert np.isnan(scores["return"]).all()
    assert not scores["finished"].any()
    assert scores["length"].tolist() == [37] * 3


def test_a_limit_beyond_the_longest_evaluation_is_refused_before_training() -> None:
    made(Endless)
    evaluate.check(settings(env_params={"max_steps_in_episode": evaluate.LONGEST}))
    with pytest.raises(InputError, match=r"max_steps_in_episode .* must be at most 100000"):
        evaluate.check(settings(env_params={"max_steps_in_episode": evaluate.LONGEST + 1}))


# --- gymnax's own -------------------------------------------------------------------------------

PLAYABLE = [name for name in gymnax.registered_envs if name != "MNISTBandit-bsuite"]


@pytest.mark.parametrize("name", PLAYABLE)
def test_gymnaxs_own_do_what_is_asked_of_ones_own(name: str) -> None:
    """They are not tried out when they are made, because that takes seconds."""
    env = envs.make(name)
    tracing.try_out(env)
    assert tracing.truncation(env) == (True, True) == (env.truncates, env.limited)
    assert env.max_steps == int(env.default_params.max_steps_in_episode) > 0
    evaluate.check(types.SimpleNamespace(env=name, env_kwargs=(), env_params={}))


def test_an_environment_registered_with_gymnax_is_tried_out_like_ones_own() -> None:
    gymnax.register("old", OldStep)
    with pytest.raises(InputError, match="step of OldStep returns 5 values"):
        envs.make("old")
    gymnax.register("good", Base)
    assert envs.make("good").max_steps == 100
