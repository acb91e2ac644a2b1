"""Memory that a policy cannot see is found, and nothing else is taken for it."""

import dataclasses
import pathlib
import types
from typing import Any

import agents_under_test as under_test
import jax
import jax.numpy as jnp
import pytest
from jax import lax, random

from purejaxpg import InputError, cli, contract, envs, hidden
from purejaxpg import config as configs
from purejaxpg.agents import ppo_rnn
from purejaxpg.sweep import compute

# CartPole has four observations, so the statistics of its normaliser have as many items.
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalised": {"normalize_obs": True, "normalize_reward": True, "num_envs": 4},
    "noise": {"exploration": "ou"},
}
PAIRS = [
    (agent, what)
    for agent in under_test.AGENTS
    for what in FIELDS
    if what != "noise" or under_test.has(agent, "exploration")
]


@pytest.mark.parametrize(
    ("agent", "what"), PAIRS, ids=lambda x: x if isinstance(x, str) else under_test.name(x)
)
def test_no_agent_of_the_package_is_suspected(agent: types.ModuleType, what: str) -> None:
    config = under_test.tiny(agent, **FIELDS[what])
    if not contract.has_memory(agent):
        hidden._traced(agent, config)  # an agent that cannot be traced would not be suspected
    assert hidden.unseen(agent, config) == []


# --- agents that remember ------------------------------------------------------------------------


@configs.dataclass
class Config:
    """Of the agent below."""

    env: str = "Pendulum-v1"
    env_kwargs: tuple[tuple[str, Any], ...] = ()
    num_envs: int = 3
    env_params: dict[str, float] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Of the agent below."""

    obs: Any
    env_state: Any
    memory: Any


def remembering(follow: Any, start: Any, act: Any, sees: bool = False) -> types.ModuleType:
    """An agent whose action [N] follows from `act(obs, memory)`, and its next memory from `follow`.

    A memory starts anew as `start(N)` where an episode ends.
    """
    agent = types.ModuleType("remembering")

    def init(key: Any, config: Config) -> State:
        env, params = envs.setup(config)
        obs, env_state = envs.reset(key, env, params, config.num_envs)
        return State(obs, env_state, start(config.num_envs))

    def update(key: Any, state: State, config: Config) -> tuple[State, dict[str, Any]]:
        env, params = envs.setup(config)

        def step(state: State, key: Any) -> Any:
            key_memory, key_env = random.split(key)
            action = act(state.obs, state.memory)[:, None]
            after = follow(key_memory, state.obs, action, state.memory)
            obs, env_state, now = envs.step(key_env, env, state.env_state, action, params)
            memory = envs.restarted(after, start(config.num_envs), now.done)
            return State(obs, env_state, memory), now.reward

        state, rewards = lax.scan(step, state, random.split(key, 2))
        return state, {"loss/all": rewards.sum()}

    def policy(key: Any, state: State, obs: Any, config: Any, greedy: bool = False) -> Any:
        seen = state.memory if sees else start(len(obs))
        return act(obs, seen)[:, None]

    agent.init, agent.update, agent.policy = init, update, policy  # type: ignore[attr-defined]
    return agent


def column(n: int) -> jax.Array:
    return jnp.zeros(n)


def triple(n: int) -> jax.Array:
    return jnp.zeros((n, 3))


def added(obs: jax.Array, memory: jax.Array) -> jax.Array:
    return obs[:, 0] + (memory if memory.ndim == 1 else memory[:, 0])


CASES: dict[str, tuple[types.ModuleType, list[str]]] = {
    "a sum": (remembering(lambda k, o, a, m: m + o[:, 1], column, added), [".memory"]),
    "the last observation": (remembering(lambda k, o, a, m: o, triple, added), [".memory"]),
    "the last action": (remembering(lambda k, o, a, m: a[:, 0], column, added), [".memory"]),
    "noise": (remembering(lambda k, o, a, m: m + random.normal(k, m.shape), column, added), []),
    "not used": (remembering(lambda k, o, a, m: m + o[:, 1], column, lambda o, m: o[:, 0]), []),
    "seen": (remembering(lambda k, o, a, m: m + o[:, 1], column, added, sees=True), []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_memory_and_what_is_not(case: str) -> None:
    agent, wanted = CASES[case]
    assert hidden.unseen(agent, Config()) == wanted


def test_what_cannot_be_traced_is_left_to_others() -> None:
    agent, _ = CASES["a sum"]
    assert hidden.unseen(agent, Config(env="CartPole-v1")) == []  # its actions are whole numbers
    agent.initial_memory = triple  # type: ignore[attr-defined]
    assert hidden.unseen(agent, Config()) == []
    del agent.initial_memory


# --- the fork of a user --------------------------------------------------------------------------

TRAINED = 'state.params["actor"], seen, memory)\n    return distribution'
BLANK = TRAINED.replace("memory", "jnp.zeros((len(obs), config.memory_size))")


@pytest.fixture
def fork(tmp_path: pathlib.Path) -> pathlib.Path:
    """A sweep file of PPO with a GRU whose policy has no place for the memory."""
    text = pathlib.Path(ppo_rnn.__file__).read_text("utf-8")
    for old, new in {
        "def initial_memory(": "def blank_memory(",
        "obs: jax.Array, memory: Any, config": "obs: jax.Array, config",
        TRAINED: BLANK,
        "distribution.sample(seed=key), memory": "distribution.sample(seed=key)",
    }.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "gru.py").write_text(text, "utf-8")
    study = tmp_path / "study.toml"
    study.write_text('agent = "./gru.py"\n[config]\nnum_envs = 4\n', "utf-8")
    return study


WARNING = (
    "Warning: agent './gru.py' carries a memory, state.memory['actor'], from step to step while it "
    "trains."
)


def test_a_sweep_and_its_plan_warn_before_anything_is_compiled(
    fork: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> Any:
        raise InputError("Stop.")

    assert cli.main(["plan", str(fork), "--quick", "--devices", "1"]) == 0
    assert capsys.readouterr().out.count(WARNING) == 1
    monkeypatch.setattr(compute.Backend, "compile", stop)
    out = fork.parent / "out"
    assert cli.main(["sweep", str(fork), "--out", str(out), "--devices", "1"]) == 2
    assert capsys.readouterr().out.count(WARNING) == 1
