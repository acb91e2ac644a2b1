"""Every agent that can solves every probe environment, judged by its value and policy."""

import types
from typing import Any

import agents_under_test as under_test
import jax
import jax.numpy as jnp
import probes
import pytest
from jax import random


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    probes.register()


def solve(agent: types.ModuleType, probe: str, **fields: Any) -> tuple[Any, Any]:
    config = under_test.tiny(agent, env=f"probe/{probe}", **under_test.PROBE_FIELDS, **fields)
    agent.check(config)
    state, _ = jax.jit(agent.train)(random.key(0), config)
    return state, config


def value(agent: types.ModuleType, state: Any, config: Any, *obs: float) -> list[float]:
    _, critic = agent.make_networks(config)
    return critic.apply(state.params["critic"], jnp.array(obs)[:, None]).tolist()


def distribution(agent: types.ModuleType, state: Any, config: Any, *obs: float) -> Any:
    actor, _ = agent.make_networks(config)
    return actor.apply(state.params["actor"], jnp.array(obs)[:, None])


@pytest.mark.parametrize("agent", under_test.AGENTS, ids=under_test.name)
class TestProbes:
    def test_constant_value(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Constant")
        assert value(agent, state, config, 0.0) == pytest.approx([1.0], abs=0.05)

    def test_value_of_the_observation(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Observed")
        assert value(agent, state, config, -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)

    def test_discount(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Discounted", gamma=0.7)
        assert value(agent, state, config, 0.0, 1.0) == pytest.approx([0.7, 1.0], abs=0.07)

    def test_action(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Chosen")
        chances = jax.nn.softmax(distribution(agent, state, config, 0.0).logits)
        assert chances[0, 1] > 0.9

    def test_action_for_the_observation(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Matched")
        chances = jax.nn.softmax(distribution(agent, state, config, -1.0, 1.0).logits)
        assert chances[0, 0] > 0.9
        assert chances[1, 1] > 0.9

    def test_time_limit_is_not_an_end(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Endless", gamma=0.9)
        assert value(agent, state, config, 0.0) == pytest.approx([10.0], abs=0.3)

    def test_continuous_action(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Quadratic")
        assert distribution(agent, state, config, 0.0).mean.item() == pytest.approx(0.5, abs=0.15)

    def test_entropy_bonus_makes_the_policy_uniform(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Indifferent", ent_coef=0.5)
        chances = jax.nn.softmax(distribution(agent, state, config, 0.0).logits)
        assert chances[0].tolist() == pytest.approx([0.5, 0.5], abs=0.05)
