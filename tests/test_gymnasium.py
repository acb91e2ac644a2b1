"""Environments of gymnasium, on the host: what a program sees of them is as if they were pure."""

import functools
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from purejaxpg import FaultError, InputError, contract, envs, evaluate
from purejaxpg.agents import ppo
from purejaxpg.envs import gymnasium as adapter
from purejaxpg.envs import pictures
from purejaxpg.report import playback
from purejaxpg.sweep import forecast, session
from purejaxpg.sweep import spec as specs

TASK = "PurejaxpgCount-v0"
NAME = f"gymnasium:{TASK}"


class Count(gymnasium.Env[Any, Any]):
    """Observes a random number of the episode and the sum of the actions; ends at a sum of 3.

    The reward is the observation, so that returns tell episodes apart.
    """

    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(2, start=5)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, bonus: float = 0.0, render_mode: str | None = None) -> None:
        self.bonus, self.render_mode = bonus, render_mode

    def observed(self) -> np.ndarray:
        return np.array([self.number, self.total])

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.number, self.total = float(self.np_random.random()), 0
        return self.observed(), {}

    def step(self, action: Any) -> Any:
        assert action in (5, 6)
        self.total += int(action) - 5
        return self.observed(), self.number + self.bonus, self.total >= 3, False, {}

    def render(self) -> np.ndarray:
        return np.full((4, 6, 3), 50 * self.total, np.uint8)


if TASK not in gymnasium.registry:
    gymnasium.register(TASK, Count, max_episode_steps=5)


def rolled(key: jax.Array, start: Any = None, steps: int = 8, num: int = 2) -> Any:
    """Play `num` environments with random actions -> first observations, state, steps [T, N]."""
    env = envs.make(NAME)
    key_reset, key_steps = random.split(key)
    obs, state = start or envs.reset(key_reset, env, None, num)

    def step(state: Any, key: jax.Array) -> Any:
        action = random.randint(key, (num,), 0, 2)
        later, state, now = envs.step(key, env, state, action, None)
        return state, (action, later, now)

    return (obs, state), jax.lax.scan(step, state, random.split(key_steps, steps))[1]


@pytest.mark.fast
def test_spaces_and_limits() -> None:
    env = envs.make(NAME)
    assert env.num_actions == 2 and env.obs_shape == (2,) and env.on_host and env.truncates
    assert env.max_steps is None and env.param_names == []
    lake = envs.make("gymnasium:FrozenLake-v1", map_name="4x4")
    assert lake.index_observed and lake.obs_size == 16
    assert not envs.make("gymnasium:Pendulum-v1").discrete


@pytest.mark.fast
def test_truncation_is_kept_apart_and_next_obs_is_before_the_reset() -> None:
    (first, _), (action, later, now) = jax.jit(functools.partial(rolled, steps=12))(random.key(0))
    total, length = np.zeros(2), np.zeros(2, int)
    number = np.array(first[:, 0])
    for t in range(12):
        total, length = total + action[t], length + 1
        np.testing.assert_array_equal(now.next_obs[t], np.stack([number, total], 1))
        np.testing.assert_array_equal(now.reward[t], number)
        np.testing.assert_array_equal(now.terminated[t], total >= 3)
        np.testing.assert_array_equal(now.truncated[t], length >= 5)
        done = np.asarray(now.done[t])
        assert not done.any() or (later[t, :, 0] != number)[done].all()
        number, total = np.asarray(later[t, :, 0]), np.where(done, 0, total)
        length = np.where(done, 0, length)
    assert now.terminated.any() and now.truncated.any()


@pytest.mark.fast
def test_a_row_depends_on_its_own_key_alone() -> None:
    """Rows of a unit may be in any order, and beside others."""
    program = jax.jit(jax.vmap(lambda key: rolled(key)[1][1]))
    keys = random.split(random.key(3), 3)
    plain, turned, repeated = (
        program(keys),
        program(keys[::-1]),
        program(keys[jnp.array([1, 1, 1])]),
    )
    np.testing.assert_array_equal(plain, turned[::-1])
    np.testing.assert_array_equal(repeated, jnp.stack([plain[1]] * 3))
    assert len(np.unique(plain)) > len(np.unique(plain[0]))


@pytest.mark.fast
def test_a_program_may_start_again_from_the_reset_but_not_from_later() -> None:
    """As agents do that first measure the moments of observations, and then train."""
    key = random.key(5)
    start, (_, first, _) = jax.jit(rolled)(key)
    _, (_, again, _) = jax.jit(rolled)(key, start)
    np.testing.assert_array_equal(first, again)
    middle = jax.jit(
        lambda start: envs.step(key, envs.make(NAME), start[1], jnp.ones(2, int), None)
    )
    once, twice = middle(start), middle(start)
    np.testing.assert_array_equal(once[0], twice[0])  # the same call may be made twice
    old = once[:2]
    middle(old)
    middle(middle(middle(start)[:2])[:2])
    later = middle(old)
    assert np.isnan(later[0]).all() and np.isnan(later[2].reward).all()


@pytest.mark.fast
def test_a_state_of_another_process_is_refused() -> None:
    host = adapter.Host(lambda num: None)
    with pytest.raises(FaultError, match="another process"):
        host.step(np.zeros((2, 2)), np.full(2, 7), np.arange(2), np.zeros(2), np.zeros(2))


@pytest.mark.fast
def test_only_registered_names_are_made() -> None:
    """gymnasium would import the module in "module:Name"."""
    with pytest.raises(InputError, match="named 'os:CartPole-v1'"):
        envs.make("gymnasium:os:CartPole-v1")
    with pytest.raises(InputError, match="did you mean 'Pendulum-v1'"):
        envs.make("gymnasium:Pendulm-v1")


@pytest.mark.fast
def test_actions_that_are_no_numbers_become_valid() -> None:
    box = gymnasium.spaces.Box(-2, 2, (1,))
    valid = adapter.valid_action(box, np.array([[np.nan], [9.0], [-1.0]]))
    np.testing.assert_array_equal(valid, [[0], [2], [-1]])
    np.testing.assert_array_equal(
        adapter.valid_action(Count.action_space, np.array([-1, 1])), [5, 6]
    )


def test_evaluation_scores_each_row_to_its_own_end() -> None:
    """Rows whose episodes have ended wait for the others, with tickets that are gone."""
    config = ppo.Config(env=NAME, num_envs=2, num_steps=8, total_timesteps=32, hidden=(4,))
    state, metrics = jax.jit(jax.vmap(ppo.train, (0, None)))(random.split(random.key(0), 2), config)
    assert np.isfinite(metrics["loss/value"]).all()
    program = jax.jit(jax.vmap(lambda key, state: evaluate.score(key, ppo, state, config, 3)))
    scores = program(random.split(random.key(1), 2), state)
    assert scores["evaluation/finished"].all() and np.isfinite(scores["evaluation/return"]).all()
    assert ((scores["evaluation/length"] >= 3) & (scores["evaluation/length"] <= 5)).all()


RAW: dict[str, Any] = {
    "agent": "ppo",
    "seeds": 3,
    "eval_episodes": 2,
    "rows_per_device": 2,
    "config": {
        "env": NAME, "num_envs": 2, "num_steps": 8, "total_timesteps": 64, "hidden": [4],
        "normalize_obs": True,
    },
    "sweep": {"learning_rate": [1e-3, 1e-2]},
}  # fmt: skip


def test_a_sweep_runs_without_snapshots_and_draws(tmp_path: Any) -> None:
    spec = specs.from_dict(RAW, "x")
    assert spec.identity["env_packages"] == {"gymnasium": gymnasium.__version__}
    options = session.Options(out=tmp_path / "out", snapshot_every_s=0.0, quiet=True)
    session.run(spec, options, jax.devices()[:1])
    assert not list((tmp_path / "out" / "progress").glob("*"))
    longer = {**RAW, "config": {**RAW["config"], "total_timesteps": 128}}
    with pytest.raises(InputError, match="cannot be stored, so no run can go on"):
        session.run(specs.from_dict(longer, "x"), options, jax.devices()[:1])
    said: list[str] = []
    gif = tmp_path / "a.gif"
    playback.run(tmp_path / "out", "best", 2, False, 0, gif, None, said.append)
    assert "diverged" not in said[0] and gif.stat().st_size > 0


@pytest.mark.fast
@pytest.mark.parametrize("table", ["halving", "pbt"])
def test_searches_that_store_states_are_refused(table: str) -> None:
    with pytest.raises(InputError, match=rf"\[{table}\] .*{TASK}' cannot be stored"):
        specs.from_dict({**RAW, table: {}}, "x")


@pytest.mark.fast
def test_a_plan_says_that_it_is_slow() -> None:
    said: list[str] = []
    forecast.plan(specs.from_dict(RAW, "x"), jax.devices()[:1], 0, said.append, quick=True)
    assert any("slow" in line and "starts again" in line for line in said)


@pytest.mark.fast
def test_a_film_plays_the_same_episode_again() -> None:
    env = envs.make(NAME)
    total = np.array([0, 0, 1, 2])
    one = np.ones(4, np.int32)
    action = np.concatenate([[0], np.diff(total)]).astype(np.int32)
    states = adapter.Ticket(one, one, one, np.ones((4, 2), np.uint32), action)
    frames = pictures.own_frames(env, None, states, [0, 2, 3])
    assert [frame[0, 0, 0] for frame in frames] == [0, 50, 100]
    assert contract.packages([env]) == {"gymnasium": gymnasium.__version__}
