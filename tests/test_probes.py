"""Every agent solves every probe environment that it can act in, judged by its value and policy."""

import functools
import math
import operator
import types
from typing import Any

import agents_under_test as under_test
import jax
import jax.numpy as jnp
import probes
import pytest
import quick
from jax import random

from purejaxpg import contract


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    probes.register()


GAMMAS = {"Discounted": 0.7, "Endless": 0.9}


def kind_of(agent: types.ModuleType, probe: str) -> str:
    """Return in which actions the agent solves a probe, discrete if it can, or nothing."""
    for kind in ("Discrete", "Continuous"):
        if probe in probes.tasks(kind) and under_test.accepts(agent, f"probe/{kind}"):
            return kind
    return ""


def own(agent: types.ModuleType, kind: str) -> list[str]:
    """Return the probes that the agent solves in actions of a kind."""
    return [probe for probe in probes.tasks(kind) if kind_of(agent, probe) == kind]


@functools.cache
def solved(agent: types.ModuleType, kind: str) -> tuple[Any, Any]:
    """Train on the probes of a kind in one vmap -> states and configurations, a row each."""
    fields = dict(under_test.PROBE_FIELDS)
    if under_test.has(agent, "num_epochs"):
        fields["total_timesteps"] //= 2
    elif not under_test.has(agent, "num_gradient_steps"):
        fields["total_timesteps"] *= 4
        fields |= {"learning_rate": 1e-2, "critic_learning_rate": 1e-2}
    if under_test.has(agent, "ent_coef"):
        fields["normalize_advantage"] = False  # else the bonus has no fixed share
    rows = []
    for probe in own(agent, kind):
        task = float(probes.tasks(kind).index(probe))
        config = under_test.tiny(
            agent,
            **{**fields, "env": f"probe/{kind}", "env_params": {"task": task}},
            gamma=GAMMAS.get(probe, 0.99),
            ent_coef=1.0 if probe == "Tempered" else 0.0,
        )
        agent.check(config)
        rows.append(config)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    keys = random.split(random.key(0), len(rows))
    states, _ = jax.jit(jax.vmap(agent.train), compiler_options=quick.OPTIONS)(keys, stacked)
    return jax.device_get((states, stacked))  # rows of NumPy arrays are taken without a program


def solve(agent: types.ModuleType, probe: str) -> tuple[Any, Any]:
    """The state after learning a probe, with discrete actions if the agent supports them."""
    kind = kind_of(agent, probe)
    if not kind:
        pytest.skip(f"{under_test.name(agent)} does not act in {probe}")
    row = own(agent, kind).index(probe)
    return jax.tree.map(operator.itemgetter(row), solved(agent, kind))


def value(
    agent: types.ModuleType, state: Any, config: Any, *obs: float, episode: bool = False
) -> list[float]:
    """The critic's values of these observations, at the greedy action if it takes an action.

    An `episode` shows them in this order.
    """
    points, params = jnp.array(obs)[:, None], state.params
    if "actor" in params and hasattr(agent, "values"):
        action = agent.policy(random.key(0), state, points, config, greedy=True)
        both = agent.values(params["critic"], points, action, config).min(axis=0)
        return both.reshape(len(obs), -1).max(axis=1).tolist()
    if hasattr(agent, "actor_loss"):
        action = agent.Actor(config).apply(params["actor"], points)
        return agent.Critic(config).apply(params["critic"], points, action).tolist()
    if contract.has_memory(agent):
        return remembered(agent, params["critic"], points, config, episode)
    return agent.Critic(config).apply(params["critic"], points).tolist()


def remembered(
    agent: types.ModuleType, params: Any, points: jax.Array, config: Any, episode: bool
) -> list[float]:
    """The values of a critic with a memory, of each observation alone or of an episode of them."""
    memory, values = agent.initial_memory(None, config, 1), []
    for point in points:
        value, after = agent.Critic(config).apply(params, point[None], memory)
        memory = after if episode else memory
        values += value.tolist()
    return values


def chance(agent: types.ModuleType, state: Any, config: Any, obs: float) -> float:
    """How often the policy takes action 1 after an observation."""
    points = jnp.full((4_000, 1), obs)
    return float(under_test.act(agent, random.key(0), state, points, config).mean())


def greedy(agent: types.ModuleType, state: Any, config: Any, *obs: float) -> list[float]:
    points = jnp.array(obs)[:, None]
    return under_test.act(agent, random.key(0), state, points, config, True)[:, 0].tolist()


@pytest.mark.parametrize("agent", under_test.AGENTS, ids=under_test.name)
class TestProbes:
    def test_constant_value(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Constant")
        assert value(agent, state, config, 0.0) == pytest.approx([1.0], abs=0.05)

    def test_value_of_the_observation(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Observed")
        assert value(agent, state, config, -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)

    def test_discount(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Discounted")
        values = value(agent, state, config, 0.0, 1.0, episode=True)
        assert values == pytest.approx([0.7, 1.0], abs=0.07)

    def test_action(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Chosen")
        assert chance(agent, state, config, 0.0) > 0.9

    def test_action_for_the_observation(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Matched")
        assert chance(agent, state, config, -1.0) < 0.1
        assert chance(agent, state, config, 1.0) > 0.9

    def test_time_limit_is_not_an_end(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Endless")
        assert value(agent, state, config, 0.0) == pytest.approx([10.0], abs=0.3)

    def test_continuous_action(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Quadratic")
        assert greedy(agent, state, config, 0.0) == pytest.approx([0.5], abs=0.15)

    def test_continuous_action_for_the_observation(self, agent: types.ModuleType) -> None:
        state, config = solve(agent, "Followed")
        assert greedy(agent, state, config, -1.0, 1.0) == pytest.approx([-0.5, 0.5], abs=0.15)

    def test_entropy_bonus_keeps_the_policy_from_being_sure(self, agent: types.ModuleType) -> None:
        if not under_test.has(agent, "ent_coef"):
            pytest.skip(f"{under_test.name(agent)} has no entropy bonus")
        state, config = solve(agent, "Tempered")
        best = 1.0 / (1.0 + math.exp(-2.0))  # 0.88
        assert chance(agent, state, config, 0.0) == pytest.approx(best, abs=0.05)


@pytest.mark.parametrize("agent", under_test.AGENTS, ids=under_test.name)
def test_no_agent_is_skipped_by_mistake(agent: types.ModuleType) -> None:
    """All agents support continuous actions, and all but one support discrete ones."""
    assert under_test.accepts(agent, "probe/Continuous")
    assert under_test.accepts(agent, "probe/Discrete") == (under_test.name(agent) != "ddpg")
