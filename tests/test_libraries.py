"""Adapters to other libraries: against stand-ins of them, and against those that are installed.

In each stand-in an observation is the number of steps so far, the task ends after 5 of them, and
the library's own time limit is 4.
"""

import importlib.util
import pathlib
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax import random

from purejaxpg import FaultError, InputError, contract, envs, extras
from purejaxpg.agents import ppo
from purejaxpg.envs import libraries
from purejaxpg.sweep import spec as specs

ENDS, OWN_LIMIT = 5, 4
PACKAGES = {
    "brax": "brax", "craftax": "craftax", "gymnasium": "gymnasium", "jumanji": "jumanji",
    "navix": "navix", "playground": "mujoco_playground",
}  # fmt: skip


@struct.dataclass
class Values:
    """Any fields, by which stand-ins for states and models hold theirs."""

    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.fields:
            raise AttributeError(name)
        return self.fields[name]

    def tree_replace(self, new: dict[str, Any]) -> "Values":
        assert list(new) == ["opt.gravity"]
        return Values({**self.fields, "opt": Values({"gravity": new["opt.gravity"]})})


MODEL = Values({"opt": Values({"gravity": jnp.array([0.0, 0.0, -10.0])})})


class Mechanics:
    """Brax and MuJoCo Playground, which have neither limits nor resets; gravity is the reward."""

    action_size = 1

    def __init__(self) -> None:
        self.sys = self._mjx_model = MODEL

    @property
    def mjx_model(self) -> Any:
        return self._mjx_model

    def at(self, time: Any, action: Any) -> Any:
        assert self.sys is MODEL or self.mjx_model is MODEL
        gravity = self.sys.opt.gravity + self.mjx_model.opt.gravity - MODEL.opt.gravity
        obs = {"state": time[None], "privileged_state": jnp.ones(3)}
        done = (time >= ENDS).astype(jnp.float32)
        return Values({"obs": obs, "reward": gravity[2] + 0 * action, "done": done, "time": time})

    def reset(self, key: Any) -> Any:
        assert key.dtype == np.uint32
        return self.at(jnp.float32(0), jnp.float32(0))

    def step(self, state: Any, action: Any) -> Any:
        return self.at(state.time + 1, action[0])


class Config(dict[str, Any]):
    episode_length = OWN_LIMIT
    update_from_flattened_dict = dict.update


@struct.dataclass
class CraftaxParams:
    max_timesteps: int = OWN_LIMIT
    day_length: int = 300
    always_diamond: bool = False
    angles: tuple[Any, ...] = (None, None)


class Craftax:
    """Craftax, which terminates at its own limit too."""

    default_params, num_actions = CraftaxParams(), 3

    def reset_env(self, key: Any, params: Any) -> Any:
        return jnp.zeros(1), jnp.int32(0)

    def step_env(self, key: Any, state: Any, action: Any, params: Any) -> Any:
        done = (state + 1 >= ENDS) | (state + 1 >= params.max_timesteps)
        reward = params.day_length / 1.0
        return (state + 1.0)[None], state + 1, reward, done, {}


class Navix:
    """Navix, which tells a termination (2) from a truncation (1), and resets at the next step."""

    max_steps, action_set = OWN_LIMIT, (0, 1, 2)

    def at(self, time: Any) -> Any:
        kind = jnp.where(time >= ENDS, 2, jnp.where(time >= self.max_steps, 1, 0))
        obs = jnp.full((1, 1, 1), time, jnp.uint8)
        return Values({"observation": obs, "reward": 1.0 * time, "step_type": kind, "time": time})

    def reset(self, key: Any) -> Any:
        return self.at(jnp.int32(0))

    def _step(self, timestep: Any, action: Any) -> Any:
        return self.at(timestep.time + 1)


class Jumanji:
    """Jumanji, which terminates at its own limit too, with two discrete actions."""

    time_limit = OWN_LIMIT
    action_spec = types.SimpleNamespace(num_values=np.array([2, 3]))

    def at(self, time: Any, action: Any, last: Any) -> Any:
        said = {"observation": {"time": jnp.float32(time), "action": action}, "reward": 1.0 * time}
        return time, types.SimpleNamespace(**said, last=lambda: last)

    def reset(self, key: Any) -> Any:
        return self.at(jnp.int32(0), jnp.zeros(2, jnp.int32), False)

    def step(self, time: Any, action: Any) -> Any:
        return self.at(time + 1, action, (time + 1 >= ENDS) | (time + 1 >= self.time_limit))


def module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(members)
    return made


STAND_INS: dict[str, Callable[[], dict[str, types.ModuleType]]] = {
    "brax": lambda: {
        "brax": module("brax"),
        "brax.envs": module(
            "brax.envs", _envs={"toy": 0}, get_environment=lambda name: Mechanics()
        ),
    },
    "playground": lambda: {
        "mujoco_playground": module(
            "mujoco_playground",
            registry=types.SimpleNamespace(
                ALL_ENVS=("toy",),
                get_default_config=lambda name: Config(impl="warp"),
                load=lambda name, config: {"jax": Mechanics}[config["impl"]](),
            ),
        )
    },
    "craftax": lambda: {
        "craftax": module("craftax"),
        "craftax.craftax_env": module(
            "craftax.craftax_env", make_craftax_env_from_name=lambda name, auto_reset: Craftax()
        ),
    },
    "navix": lambda: {
        "navix": module(
            "navix",
            registry=lambda: {"toy": 0},
            make=lambda name: Navix(),
            observations=module("o"),
            rewards=module("r"),
        )
    },
    "jumanji": lambda: {
        "jumanji": module(
            "jumanji", registered_environments=lambda: {"toy"}, make=lambda name: Jumanji()
        )
    },
}
NAMES = dict.fromkeys(STAND_INS, "toy") | {"craftax": "Craftax-Symbolic-v1"}


@pytest.fixture(params=list(STAND_INS))
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an environment of a stand-in for one of the libraries."""
    for name, made in STAND_INS[request.param]().items():
        monkeypatch.setitem(sys.modules, name, made)
    envs.make.cache_clear()
    yield f"{request.param}:{NAMES[request.param]}"
    envs.make.cache_clear()


def played(env: envs.Env, params: Any, steps: int) -> envs.Step:
    """Steps [T, 2] of zeros."""
    action = jnp.zeros((2,) if env.discrete else (2, env.action_size), env.action_dtype)
    _, state = envs.reset(random.key(0), env, params, 2)

    def step(state: Any, key: Any) -> Any:
        _, state, now = envs.step(key, env, state, action, params)
        return state, now

    return jax.jit(lambda: jax.lax.scan(step, state, random.split(random.key(1), steps))[1])()


@pytest.mark.fast
def test_a_limit_truncates_and_the_task_terminates(stand_in: str) -> None:
    """The library's limit, 4, is the default; without it the task ends after 5 steps."""
    env = envs.make(stand_in)
    assert env.truncates and env.limited
    own = OWN_LIMIT if not stand_in.startswith("brax") else 1000
    assert env.max_steps == own
    for limit in (3, 5, 9):
        params = envs.params(env, {"max_steps_in_episode": limit})
        now = played(env, params, 6)
        length = min(limit, ENDS)
        ended = np.arange(1, 7) % length == 0
        np.testing.assert_array_equal(now.done[:, 0], ended)
        np.testing.assert_array_equal(now.terminated[:, 0], ended & (length == ENDS))
        np.testing.assert_array_equal(now.truncated[:, 0], ended & (length == limit))
        expected = (np.arange(6) % length) + 1.0  # the last observation is before the reset
        np.testing.assert_array_equal(
            now.next_obs[:, 0, -1 if "jumanji" in stand_in else 0], expected
        )


@pytest.mark.fast
def test_parameters_of_a_library_are_traced(stand_in: str) -> None:
    name = {"brax": "gravity", "playground": "gravity", "craftax": "day_length"}.get(
        stand_in.partition(":")[0], "max_steps_in_episode"
    )
    env = envs.make(stand_in)
    assert envs.changes_transitions(env, name)
    rewards = jax.vmap(lambda value: played(env, envs.params(env, {name: value}), 1).reward[0, 0])(
        jnp.array([2.0, 3.0])
    )
    followed = name != "max_steps_in_episode"
    np.testing.assert_array_equal(rewards, [2.0, 3.0] if followed else [1.0, 1.0])


@pytest.mark.fast
def test_an_unknown_name_gets_the_nearest_one(stand_in: str) -> None:
    near = {"craftax": "Craftax-Symbolc-v1"}.get(stand_in.partition(":")[0], "toi")
    with pytest.raises(InputError, match=f"named '{near}'; did you mean"):
        envs.make(f"{stand_in.partition(':')[0]}:{near}")


@pytest.mark.fast
def test_the_version_of_a_library_is_part_of_a_sweep(
    stand_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract.importlib.metadata, "version", lambda name: f"{name} 1.2")
    raw = {"agent": "ppo", "config": {"env": stand_in, "num_envs": 2, "total_timesteps": 256}}
    package = stand_in.partition(":")[0]
    assert specs.from_dict(raw, "x").identity["env_packages"][package] == f"{package} 1.2"


@pytest.mark.fast
@pytest.mark.parametrize("library", sorted(STAND_INS))
def test_a_missing_package_is_one_sentence_with_the_command(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[library], None)
    name = f"{library}:{libraries.EXAMPLES[library]}"
    wanted = [f"{library}<9,>=1"]
    monkeypatch.setattr(extras, "requirements", {library: wanted}.__getitem__)
    with pytest.raises(FaultError, match=rf"'{name}' needs .*pip install '{library}<9,>=1'"):
        envs.make(name)


@pytest.mark.fast
def test_each_library_has_an_extra() -> None:
    text = (pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8")
    assert set(PACKAGES) == set(libraries.EXAMPLES)
    assert set(PACKAGES) < set(tomllib.loads(text)["project"]["optional-dependencies"])


@pytest.mark.fast
def test_several_discrete_actions_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jumanji", STAND_INS["jumanji"]()["jumanji"])
    env = envs.make("jumanji:toy")
    assert env.num_actions == 6
    _, state = envs.reset(random.key(0), env, env.default_params, 6)
    step = envs.step(random.key(1), env, state, jnp.arange(6), env.default_params)[2]
    np.testing.assert_array_equal(
        step.next_obs[:, :2], [[i, j] for i in range(2) for j in range(3)]
    )
    envs.make.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("library", sorted(PACKAGES))
def test_an_installed_library_plays_and_trains(library: str) -> None:
    if importlib.util.find_spec(PACKAGES[library]) is None:
        pytest.skip(f"{PACKAGES[library]} is not installed: pip install 'purejaxpg[{library}]'")
    name = f"{library}:{libraries.EXAMPLES[library]}"
    limit = {} if library == "gymnasium" else {"max_steps_in_episode": 7}
    env = envs.make(name)
    now = played(env, envs.params(env, limit), 16)
    assert np.isfinite(now.next_obs).all() and now.next_obs.shape == (16, 2, env.obs_size)
    for e in range(2):
        lengths = np.asarray(now.episode_length[:, e])[np.asarray(now.done[:, e])]
        truncated = np.asarray(now.truncated[:, e])[np.asarray(now.done[:, e])]
        assert not limit or ((lengths <= 7).all() and ((lengths == 7) == truncated).all())
    config = ppo.Config(
        env=name, env_params=limit, num_envs=2, num_steps=8, total_timesteps=32, hidden=(4,)
    )
    metrics = jax.jit(ppo.train)(random.key(0), config)[1]
    assert np.isfinite(metrics["loss/value"]).all() and metrics["loss/value"].shape == (2,)
