"""Evaluation by whole episodes, on probe environments whose returns are known exactly."""

import types
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import probes
import pytest
from jax import random

from purejaxpg import InputError, contract, envs, evaluate
from purejaxpg.agents import ppo

SETTINGS: dict[str, Any] = {
    "total_timesteps": 64,
    "num_envs": 2,
    "num_steps": 8,
    "num_epochs": 1,
    "num_minibatches": 1,
    "hidden": (8,),
}


class Countdown(probes.Probe):
    """Terminates after three, four or five steps, decided by the reset; rewards 1, 2, 3, ..."""

    def first_obs(self, key: jax.Array) -> jax.Array:
        return random.randint(key, (1,), 3, 6).astype(jnp.float32)

    def outcome(self, state: Any, action: jax.Array) -> Any:
        time = state.time + 1
        return time.astype(jnp.float32), time >= state.obs[0], state.obs


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    probes.register()
    envs.register("countdown", Countdown)
    yield
    del envs._registered["countdown"]


def settings(env: str, **fields: Any) -> ppo.Config:
    return ppo.Config(env=env, **{**SETTINGS, **fields})


# Nearly all of this file's time is compilation, and what is compared here ran the same program.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
STATIC = ("agent", "num_episodes", "max_steps", "greedy")
evaluated = jax.jit(evaluate.evaluate, static_argnames=STATIC, compiler_options=QUICK)
init, update = (jax.jit(f, compiler_options=QUICK) for f in (ppo.init, ppo.update))


def score(seed: int, agent: types.ModuleType, *arguments: Any, **options: Any) -> dict[str, Any]:
    return jax.device_get(evaluated(random.key(seed), agent, *arguments, **options))


def fresh(config: ppo.Config) -> ppo.TrainState:
    return init(random.key(0), config)


def updated(config: ppo.Config) -> ppo.TrainState:
    """A state after one update, so that its normalisers have seen something."""
    return update(random.key(1), fresh(config), config)[0]


def always_zero(
    key: jax.Array, state: Any, obs: jax.Array, config: Any, greedy: bool = False
) -> jax.Array:
    return jnp.zeros(obs.shape[0], jnp.int32)


IDLE = types.ModuleType("idle")  # an agent of which only the policy is asked
IDLE.policy = always_zero  # type: ignore[attr-defined]


# --- whole episodes -----------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("max_steps", [None, 5, 17])
def test_an_episode_of_known_length(max_steps: int | None) -> None:
    """Reward 1 for five steps: what comes after the first episode must not count."""
    config = settings("probe/Endless")
    result = score(0, IDLE, None, config, num_episodes=7, max_steps=max_steps)
    np.testing.assert_array_equal(result["return"], np.full(7, 5.0, np.float32))
    np.testing.assert_array_equal(result["length"], np.full(7, 5))
    assert result["length"].dtype == np.int32
    assert result["finished"].dtype == np.bool_
    assert result["finished"].all()


@pytest.mark.fast
def test_episodes_of_different_lengths() -> None:
    result = score(0, IDLE, None, settings("countdown"), num_episodes=64)
    assert set(result["length"]) == {3, 4, 5}
    # 1 + 2 + ... + L
    expected = result["length"] * (result["length"] + 1) / 2
    np.testing.assert_array_equal(result["return"], expected)
    assert result["finished"].all()


@pytest.mark.fast
def test_an_episode_cut_short_is_not_finished() -> None:
    config = settings("countdown")
    whole = score(0, IDLE, None, config, num_episodes=64)
    result = score(0, IDLE, None, config, num_episodes=64, max_steps=4)
    assert set(whole["length"][~result["finished"]]) == {5}
    assert set(whole["length"][result["finished"]]) == {3, 4}
    np.testing.assert_array_equal(result["length"], np.minimum(whole["length"], 4))
    # What was cut short has collected 10, which is the return of no episode.
    assert np.isnan(result["return"][~result["finished"]]).all()
    np.testing.assert_array_equal(
        result["return"][result["finished"]], whole["return"][result["finished"]]
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    ("limit", "max_steps", "steps", "finished"),
    [(8, None, 8, True), (8, 8, 8, True), (8, 7, 7, False), (2, None, 2, True)]
    + [(limit, None, limit, True) for limit in (15, 16, 17, 31, 32, 33)],  # around the stride
)
def test_a_traced_time_limit_is_followed(
    limit: int, max_steps: int | None, steps: int, finished: bool
) -> None:
    config = settings("probe/Endless", env_params={"max_steps_in_episode": limit})
    result = score(0, IDLE, None, config, num_episodes=3, max_steps=max_steps)
    expected = float(steps) if finished else np.nan
    np.testing.assert_array_equal(result["return"], np.full(3, expected))
    np.testing.assert_array_equal(result["length"], np.full(3, steps))
    np.testing.assert_array_equal(result["finished"], np.full(3, finished))


@pytest.mark.fast
def test_episodes_do_not_depend_on_when_others_end() -> None:
    """Nor on what bounds them: steps draw from keys that count from the start of the evaluation."""
    config = settings("countdown")
    whole, few = (score(0, IDLE, None, config, num_episodes=n) for n in (64, 1))
    bounded = score(0, IDLE, None, config, num_episodes=64, max_steps=5)
    chex.assert_trees_all_equal(whole, bounded)
    assert few["length"].shape == (1,)


@pytest.mark.fast
@pytest.mark.parametrize(("options", "count"), [({}, 128), ({"num_episodes": 1}, 1)])
def test_number_of_episodes_is_its_own(options: dict[str, int], count: int) -> None:
    """Not that of training, and 128 unless told."""
    result = score(0, IDLE, None, settings("probe/Constant", num_envs=2), **options)
    shapes = {name: value.shape for name, value in result.items()}
    assert shapes == {"return": (count,), "length": (count,), "finished": (count,)}
    np.testing.assert_array_equal(result["return"], np.ones(count))


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(3, 1), (1,), ()])
def test_actions_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    agent: Any = types.ModuleType("broadcasts")
    agent.__file__, agent.policy = "broadcasts.py", lambda *_: jnp.zeros(shape, jnp.int32)
    with pytest.raises(InputError, match=r"policy in broadcasts.py must .* \[3\], but .*\(int32"):
        evaluate.evaluate(random.key(0), agent, None, settings("probe/Endless"), num_episodes=3)


@pytest.mark.fast
def test_rewards_of_another_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*arguments: Any) -> Any:
        obs, state, now = original(*arguments)
        return obs, state, now.replace(reward=now.reward[:1])

    original = envs.step
    monkeypatch.setattr(envs, "step", step)
    with pytest.raises(AssertionError, match=r"shape"):
        evaluate.evaluate(random.key(0), IDLE, None, settings("probe/Endless"), num_episodes=3)


# --- the policy that is scored ------------------------------------------------------------------


def test_reward_is_raw_where_training_normalises_it() -> None:
    config = settings("probe/Endless", normalize_reward=True)
    state = updated(config)
    assert float(state.normalizers.reward.moments.count) == config.steps_per_update
    assert float(state.normalizers.reward.moments.var) > 0.1
    result = score(0, ppo, state, config, num_episodes=4)
    np.testing.assert_array_equal(result["return"], np.full(4, 5.0))


# One configuration for all that follows, so that its programs are compiled once.
CARTPOLE = settings("CartPole-v1", normalize_obs=True)
SHORT = {"num_episodes": 16, "max_steps": 60}


def test_normalisers_are_used_and_left_alone() -> None:
    state = updated(CARTPOLE)
    assert float(state.normalizers.obs.count) == 2 * CARTPOLE.steps_per_update
    before = jax.tree.map(np.array, state)
    first = score(0, ppo, state, CARTPOLE, greedy=True, **SHORT)
    second = score(0, ppo, state, CARTPOLE, greedy=True, **SHORT)
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, state))
    chex.assert_trees_all_equal(first, second)
    # Other statistics make another policy: the ones in the state are those that are used.
    shifted = state.normalizers.obs.replace(mean=state.normalizers.obs.mean + 3.0)
    moved = state.replace(normalizers=state.normalizers.replace(obs=shifted))
    other = score(0, ppo, moved, CARTPOLE, greedy=True, **SHORT)
    assert (other["length"] != first["length"]).any()


def test_the_key_decides_and_nothing_else() -> None:
    state = updated(CARTPOLE)
    first, again, other = (score(seed, ppo, state, CARTPOLE, **SHORT) for seed in (3, 3, 4))
    chex.assert_trees_all_equal(first, again)
    assert (first["length"] != other["length"]).any()
    np.testing.assert_array_equal(first["return"], first["length"])  # reward 1 per step
    assert len(set(first["length"])) > 1  # the episodes are not copies of each other


def test_where_training_stands_does_not_matter() -> None:
    """Evaluation starts episodes of its own; those in progress in the state are not touched."""
    state = updated(CARTPOLE)
    env_state, obs = jax.tree.map(jnp.zeros_like, (state.env_state, state.obs))
    moved = state.replace(env_state=env_state, obs=obs, num_updates=state.num_updates + 5)
    results = [score(0, ppo, one, CARTPOLE, **SHORT) for one in (state, moved)]
    chex.assert_trees_all_equal(*results)


def test_stochastic_and_greedy() -> None:
    """A fresh policy tosses a coin between +1 and -1; its mode is one of them, for every key."""
    config = settings("probe/Chosen")
    state = fresh(config)
    sampled = score(0, ppo, state, config, num_episodes=64)["return"]
    assert set(sampled) == {-1.0, 1.0}
    assert abs(sampled.mean()) < 0.5  # four deviations of the mean of 64 tosses
    greedy = [score(seed, ppo, state, config, num_episodes=64, greedy=True) for seed in (0, 1)]
    assert len(set(np.concatenate([result["return"] for result in greedy]))) == 1


@pytest.mark.fast
def test_every_draw_has_its_own_key() -> None:
    config = settings("probe/Chosen")
    with jax.debug_key_reuse(True):
        result = evaluated(random.key(0), ppo, fresh(config), config, num_episodes=4)
    assert result["finished"].all()


# --- keys and the score of a run ----------------------------------------------------------------


class Tossed(probes.Probe):
    """Pays 2^t for action 1 at step t, so that the return tells every action."""

    num_choices = 2

    @property
    def default_params(self) -> probes.Params:
        return probes.Params(max_steps_in_episode=23)

    def outcome(self, state: Any, action: jax.Array) -> Any:
        return action * 2.0**state.time, jnp.zeros((), bool), state.obs


def coin(
    key: jax.Array, state: Any, obs: jax.Array, config: Any, greedy: bool = False
) -> jax.Array:
    tossed = random.bernoulli(key, 0.5, (len(obs),)).astype(jnp.int32)
    return jnp.ones_like(tossed) if greedy else tossed


COIN = types.ModuleType("coin")
COIN.policy = coin  # type: ignore[attr-defined]


def tossed(key: jax.Array, num_episodes: int) -> np.ndarray:
    """The return of `coin` over 23 steps, with keys folded from one half of the evaluation's."""
    _, key_steps = random.split(key)
    total = np.zeros(num_episodes)
    for t in range(23):
        key_action, _ = random.split(random.fold_in(key_steps, t))
        total += np.asarray(coin(key_action, None, jnp.zeros(num_episodes), None)) * 2.0**t
    return total


@pytest.mark.fast
def test_every_step_has_the_key_of_its_number() -> None:
    envs.register("tossed", Tossed)
    config = settings("tossed")
    result = score(3, COIN, None, config, num_episodes=5)
    np.testing.assert_array_equal(result["return"], tossed(random.key(3), 5))
    scored = jax.jit(evaluate.score, static_argnums=1, compiler_options=QUICK)(
        random.key(7), COIN, None, config
    )
    key_stochastic, _ = random.split(random.key(7))
    assert scored["evaluation/return"].shape == (128,)  # unless told
    np.testing.assert_array_equal(scored["evaluation/return"], tossed(key_stochastic, 128))
    np.testing.assert_array_equal(scored["evaluation/length"], np.full(128, 23))
    assert scored["evaluation/finished"].all()
    # Whoever takes the best action always earns 2^0 + ... + 2^22.
    np.testing.assert_array_equal(scored["evaluation/greedy_return"], np.full(128, 2.0**23 - 1))
    bounded = jax.eval_shape(
        lambda key: evaluate.score(key, COIN, None, config, 2, 9), random.key(0)
    )
    assert bounded["evaluation/greedy_return"].shape == (2,)
    del envs._registered["tossed"]


# --- a policy with a memory ---------------------------------------------------------------------


def counting() -> types.ModuleType:
    """An agent that takes action 1 at every third step of an episode, by what it remembers."""
    agent = types.ModuleType("counting")
    agent.__file__ = "counting.py"

    def policy(
        key: Any, state: Any, obs: Any, memory: Any, config: Any, greedy: bool = False
    ) -> Any:
        return (memory["steps"] % 3 == 2).astype(jnp.int32), {"steps": memory["steps"] + 1}

    agent.initial_memory = lambda state, config, n: {"steps": jnp.zeros(n, jnp.int32)}  # type: ignore[attr-defined]
    agent.policy = policy  # type: ignore[attr-defined]
    return agent


@pytest.mark.fast
def test_a_memory_goes_from_step_to_step() -> None:
    envs.register("tossed", Tossed)
    scored = jax.jit(lambda: evaluate.score(random.key(0), counting(), None, settings("tossed"), 3))
    expected = np.full(3, sum(2.0**t for t in range(2, 23, 3)))
    for name in ("evaluation/return", "evaluation/greedy_return"):
        np.testing.assert_array_equal(scored()[name], expected)
    del envs._registered["tossed"]


@pytest.mark.fast
def test_a_memory_ends_with_its_episode() -> None:
    memory = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.array([7, 8, 9])}
    initial = {"a": -jnp.ones((3, 2)), "b": jnp.array([1, 2, 3])}
    after = envs.restarted(memory, initial, jnp.array([True, False, True]))
    np.testing.assert_array_equal(after["a"], [[-1, -1], [2, 3], [-1, -1]])
    np.testing.assert_array_equal(after["b"], [1, 8, 3])


@pytest.mark.fast
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"initial_memory": lambda *_: jnp.zeros((2, 5))}, r"first axis of 3.*\[2, 5\]"),
        ({"initial_memory": lambda *_: jnp.zeros(())}, r"one item for each .* but has \[\]"),
        ({"policy": lambda *_: jnp.zeros(3, jnp.int32)}, r"two values.* 1 value \(int32\[3\]\)"),
        (
            {"policy": lambda *_: (jnp.zeros(3, jnp.int32), {"steps": jnp.zeros(3)})},
            r"\{steps: int32\[3\]\}, but returns \{steps: float32\[3\]\}",
        ),
    ],
)
def test_a_memory_of_another_shape_is_refused(part: dict[str, Any], words: str) -> None:
    agent = counting()
    vars(agent).update(part)
    with pytest.raises(InputError, match=f"(agent 'counting'|counting.py).*{words}"):
        evaluate.evaluate(random.key(0), agent, None, settings("probe/Endless"), num_episodes=3)


@pytest.mark.fast
@pytest.mark.parametrize("remembers", [True, False])
def test_a_policy_takes_a_memory_exactly_if_the_agent_has_one(remembers: bool) -> None:
    agent = counting()
    for name in contract.NAMES:
        setattr(agent, name, getattr(ppo, name))
    contract.check_trainer(agent, "counting")
    if remembers:
        agent.policy = always_zero  # type: ignore[attr-defined]
    else:
        del agent.initial_memory
    with pytest.raises(InputError) as caught:
        contract.check_trainer(agent, "counting")
    defines = "defines" if remembers else "does not define"
    assert f"because the agent {defines} initial_memory" in str(caught.value)
    assert ("obs, memory, config" in str(caught.value)) == remembers


@pytest.mark.fast
def test_without_a_limit_of_its_own_an_environment_needs_one() -> None:
    envs.register("unlimited", Unlimited)
    config = settings("unlimited")
    with pytest.raises(InputError, match="never truncates"):
        evaluate.evaluate(random.key(0), IDLE, None, config, 2)
    result = score(0, IDLE, None, config, num_episodes=2, max_steps=3)
    assert not result["finished"].any()
    del envs._registered["unlimited"]


class Unlimited(probes.Endless):
    def is_truncated(self, state: Any, params: Any) -> Any:
        return jnp.zeros((), bool)


@pytest.mark.fast
def test_the_longest_episode_that_is_scored() -> None:
    assert evaluate.LONGEST == 100_000
    evaluate.check(settings("CartPole-v1", env_params={"max_steps_in_episode": 100_000}))
    with pytest.raises(InputError, match=r"at most 100000.* is 100001"):
        evaluate.check(settings("CartPole-v1", env_params={"max_steps_in_episode": 100_001}))
