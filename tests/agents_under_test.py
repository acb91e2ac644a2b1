"""The agents that the contract, probe and style tests run over: every file in the package."""

import dataclasses
import functools
import importlib
import pkgutil
import types
from typing import Any

import jax
import pytest
import quick

import purejaxpg.agents
from purejaxpg import InputError, contract, envs
from purejaxpg import config as configs
from purejaxpg.sweep import compute
from purejaxpg.sweep import spec as specs

AGENTS = [
    importlib.import_module(f"purejaxpg.agents.{module.name}")
    for module in pkgutil.iter_modules(purejaxpg.agents.__path__)
]

# Small enough to compile and run in seconds, and episodes reach their time limit. Fields that an
# agent lacks are left out.
TINY: dict[str, Any] = {
    "total_timesteps": 64,
    "num_envs": 2,
    "num_steps": 8,
    "max_steps": 8,
    "num_epochs": 2,
    "num_minibatches": 2,
    "num_critic_steps": 2,
    "num_gradient_steps": 2,
    "batch_size": 8,
    "replay_capacity": 40,
    "learning_starts": 16,
    "hidden": (8, 8),
    "env_params": {"max_steps_in_episode": 8.0},
}
# Enough for a task of one or two steps. An agent with one gradient step per update needs more
# data for the same number of steps.
PROBE_FIELDS: dict[str, Any] = {
    **TINY,
    "total_timesteps": 32_000,
    "num_envs": 16,
    "max_steps": 0,
    "num_epochs": 4,
    "num_critic_steps": 10,
    "num_gradient_steps": 16,
    "batch_size": 32,
    "replay_capacity": 4_000,
    "learning_starts": 192,
    "hidden": (16, 16),
    "learning_rate": 5e-3,
    "critic_learning_rate": 5e-3,
    "tau": 0.05,
    "tune_alpha": False,
    "alpha": 1e-3,  # values almost without entropy
    "env_params": {},
}
# Their policy is deterministic; noise is only part of collecting data.
DETERMINISTIC = {"ddpg"}


def name(agent: types.ModuleType) -> str:
    return agent.__name__.rpartition(".")[2]


def has(agent: types.ModuleType, field: str) -> bool:
    return field in {each.name for each in dataclasses.fields(agent.Config)}


def accepts(agent: types.ModuleType, env: str) -> bool:
    try:
        agent.check(agent.Config(env=env))
    except InputError as error:
        assert "actions" in str(error)  # the only valid reason
        return False
    return True


@functools.cache
def env_of(agent: types.ModuleType) -> str:
    return "CartPole-v1" if accepts(agent, "CartPole-v1") else "Pendulum-v1"


def tiny(agent: types.ModuleType, **fields: Any) -> Any:
    """A small configuration of `agent`, with `fields` changed."""
    wanted = {"env": env_of(agent), **TINY, **fields}
    return agent.Config(**{field: v for field, v in wanted.items() if has(agent, field)})


UPDATES = 4


def spec(agent: types.ModuleType) -> specs.Spec:
    """Return a sweep of three seeds in units of four rows.

    The contract and the resume tests share it, so that its programs are compiled once.
    """
    config = tiny(agent)
    steps = getattr(config, "learning_starts", 0) + UPDATES * config.steps_per_update
    fields = {**configs.to_dict(config), "total_timesteps": steps}
    return specs.from_dict(
        {
            "agent": name(agent), "seeds": 3, "rows_per_device": 4, "eval_episodes": 2,
            "config": fields,
        },
        "tiny",
    )  # fmt: skip


@functools.cache
def backend(agent: types.ModuleType) -> compute.Backend:
    """Return a backend for `spec` whose segments hold two updates, half of a run.

    Runs start and train in programs as users have them. The score is compiled quickly.
    """

    def trace(*arguments: Any) -> Any:
        traced = original(*arguments)
        return traced._replace(score=Quickly(traced.score))

    class Halves(compute.Backend):
        def compile(self, group: Any) -> compute.Programs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(compute, "SEGMENTS", 2)
                patch.setattr(compute, "trace", trace)
                return super().compile(group)

    original = compute.trace
    return Halves(spec(agent), jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Quickly:
    """A stage of a program, up to its compilation with few optimisations."""

    stage: Any

    def lower(self) -> "Quickly":
        return Quickly(self.stage.lower())

    def compile(self, options: dict[str, Any]) -> Any:
        return self.stage.compile(compiler_options={**options, **quick.OPTIONS})


def some_obs(agent: types.ModuleType, count: int) -> jax.Array:
    """Return different observations that `tiny`'s environment could produce."""
    env = envs.make(env_of(agent))
    return jax.random.normal(jax.random.key(5), (count, env.obs_size))


def act(
    agent: types.ModuleType, key: Any, state: Any, obs: Any, config: Any, greedy: bool = False
) -> Any:
    """Return the actions of a policy that has seen nothing of its episodes before `obs`."""
    memory = contract.initial_memory(agent, state, config, len(obs))
    return contract.act(agent, key, state, obs, memory, config, greedy)[0]
