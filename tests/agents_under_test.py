"""The agents that the contract, probe and style tests run over: every file in the package."""

import dataclasses
import importlib
import pkgutil
import types
from typing import Any

import purejaxpg.agents

AGENTS = [
    importlib.import_module(f"purejaxpg.agents.{found.name}")
    for found in pkgutil.iter_modules(purejaxpg.agents.__path__)
]

# Small enough to compile and run in seconds. A field that an agent lacks is left out.
TINY: dict[str, Any] = {
    "env": "CartPole-v1",
    "total_timesteps": 64,
    "num_envs": 2,
    "num_steps": 8,
    "num_epochs": 2,
    "num_minibatches": 2,
    "hidden": (8, 8),
}
PROBE_FIELDS: dict[str, Any] = {
    "total_timesteps": 32_000,
    "num_envs": 16,
    "num_steps": 8,
    "num_epochs": 4,
    "num_minibatches": 2,
    "hidden": (16, 16),
    "learning_rate": 5e-3,
}


def name(agent: types.ModuleType) -> str:
    return agent.__name__.rpartition(".")[2]


def tiny(agent: types.ModuleType, **fields: Any) -> Any:
    """A small configuration of `agent`, with `fields` changed."""
    known = {field.name for field in dataclasses.fields(agent.Config)}
    return agent.Config(**{k: v for k, v in {**TINY, **fields}.items() if k in known})
