"""SAC: three updates against an independent version of the paper's, and rejected settings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import rederive
import rederive_replay
from jax import random

from purejaxpg import InputError
from purejaxpg.agents import sac

rederive.register()

# The bounds are active some of the time.
CONTINUOUS = sac.Config(
    env=rederive.NAMES[False], hidden=(6, 4), learning_rate=3e-3, critic_learning_rate=8e-3,
    gamma=0.9, tau=0.3, alpha=0.3, **rederive_replay.SIZES,
)  # fmt: skip
DISCRETE = dataclasses.replace(
    CONTINUOUS, env=rederive.NAMES[True], tune_alpha=False, normalize_obs=True, clip_obs=0.8,
    activation="tanh", learning_rate_schedule="robbins_monro", learning_rate_half_life=1.5,
    env_params={"max_steps_in_episode": 3.0, "push": 1.2},
)  # fmt: skip
BOUNDED = {
    "max_grad_norm": 0.3, "reward_scale": 0.7, "clip_reward": 0.4, "tau": 0.8, "gamma": 0.6,
}  # fmt: skip
SETTINGS = {
    "continuous": CONTINUOUS,
    "continuous, bounded": dataclasses.replace(CONTINUOUS, target_entropy_per_dim=0.4, **BOUNDED),
    "discrete": DISCRETE,
    "discrete, bounded": dataclasses.replace(DISCRETE, **BOUNDED),
}
SMALL = sac.Config(
    total_timesteps=400, num_envs=4, num_steps=8, batch_size=16, replay_capacity=200,
    learning_starts=80, hidden=(8, 8),
)  # fmt: skip
POLICY = jax.jit(sac.policy, static_argnames="greedy", compiler_options=quick.OPTIONS)


def given(config: sac.Config) -> dict[str, Any]:
    """Networks, and target critics that differ from them."""
    generator, discrete = np.random.default_rng(30), config.env == rederive.NAMES[True]
    inputs, outputs = (3, 3) if discrete else (3 + 2, 1)

    def critics() -> Any:
        two = [rederive_replay.network(generator, inputs, 6, 4, outputs) for _ in range(2)]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *two)

    actor = rederive_replay.network(generator, 3, 6, 4, 3 if discrete else 2 + 2)
    params = {"actor": actor, "critic": critics(), "log_alpha": np.log(np.float32(config.alpha))}
    return {"params": params, "target_critic": critics()}


def squashed(actor: Any, obs: Any, noise: Any, activation: str) -> Any:
    """Action tanh(x) of a Gaussian x, and its log density by the change of variables."""
    mean, log_std = jnp.split(rederive.mlp(actor, obs, activation), 2, axis=-1)
    std = jnp.exp(jnp.clip(log_std, -20.0, 2.0))
    x = mean + std * noise
    density = jnp.exp(-(((x - mean) / std) ** 2) / 2) / (std * jnp.sqrt(2 * jnp.pi))
    slope = 1 / jnp.cosh(x) ** 2  # of tanh
    return jnp.tanh(x), jnp.sum(jnp.log(density / slope), -1)


def lesser(critic: Any, inputs: Any, activation: str) -> jax.Array:
    """The lesser of both critics' outputs [..., A]."""
    one, other = (jax.tree.map(lambda x, i=i: x[i], critic) for i in (0, 1))
    first, second = (rederive.mlp(each, inputs, activation) for each in (one, other))
    return jnp.where(first < second, first, second)


def soft_value(
    actor: Any, critic: Any, obs: Any, noise: Any, alpha: Any, activation: str
) -> tuple[jax.Array, jax.Array]:
    """E_π[min_i Q_i(s, a) - α log π(a|s)], and E_π[-log π(a|s)].

    With noise it is that of one action; without, the exact expectation over discrete ones.
    """
    if noise is None:
        log_prob = rederive.log_softmax(rederive.mlp(actor, obs, activation))
        value = lesser(critic, obs, activation)
        chance = jnp.exp(log_prob)
        soft = jnp.sum(chance * (value - alpha * log_prob), -1)
        return soft, -jnp.sum(chance * log_prob, -1)
    action, log_prob = squashed(actor, obs, noise, activation)
    value = lesser(critic, jnp.concatenate([obs, action], -1), activation)[..., 0]
    return value - alpha * log_prob, -log_prob


def critic_slope(
    params: Any, target: Any, batch: Any, noise: Any, gamma: Any, activation: str
) -> Any:
    """Loss of both critics, and its gradient."""
    alpha, obs, action = jnp.exp(params["log_alpha"]), batch["obs"], batch["action"]
    soft, _ = soft_value(params["actor"], target, batch["next_obs"], noise, alpha, activation)
    y = batch["reward"] + gamma * jnp.where(batch["terminated"], 0.0, soft)

    def squares(critic: Any) -> jax.Array:
        if noise is None:
            value = rederive.mlp(critic, obs, activation)[jnp.arange(len(obs)), action]
        else:
            inputs = jnp.concatenate([obs, action], -1)
            value = rederive.mlp(critic, inputs, activation)[..., 0]
        return jnp.mean((value - y) ** 2) / 2

    def loss(critic: Any) -> jax.Array:
        return sum(squares(jax.tree.map(lambda x, i=i: x[i], critic)) for i in (0, 1))

    return jax.value_and_grad(loss)(params["critic"])


def actor_slope(params: Any, obs: Any, noise: Any, activation: str) -> Any:
    """Loss of the actor and the mean entropy, and the gradient."""

    def loss(actor: Any) -> Any:
        alpha = jnp.exp(params["log_alpha"])
        soft, entropy = soft_value(actor, params["critic"], obs, noise, alpha, activation)
        return -soft.mean(), entropy.mean()

    return jax.value_and_grad(loss, has_aux=True)(params["actor"])


OUTPUT = rederive.in_64_bits(rederive.mlp, static=(2,))
CRITIC_SLOPE = rederive.in_64_bits(critic_slope, static=(5,))
ACTOR_SLOPE = rederive.in_64_bits(actor_slope, static=(3,))


class Rederived(rederive_replay.OffPolicy):
    """Haarnoja et al. 2018, algorithm 1, with the departures that the agent lists."""

    targets = "target_critic"

    def at_random(self, key: jax.Array) -> np.ndarray:
        if self.discrete:
            return np.asarray(random.randint(key, (self.config.num_envs,), 0, 3))
        uniform = random.uniform(key, (self.config.num_envs, 2), minval=-1.0)
        return np.asarray(uniform, np.float64)

    def act(self, key: jax.Array, obs: np.ndarray) -> np.ndarray:
        output = OUTPUT(self.params("actor"), obs, self.config.activation)
        if self.discrete:
            return rederive.sample(key, rederive.Policy(output))
        mean, log_std = np.split(output, 2, axis=-1)
        noise = np.asarray(random.normal(key, mean.shape), np.float64)
        return np.tanh(mean + np.exp(np.clip(log_std, -20.0, 2.0)) * noise)

    def noise(self, key: jax.Array) -> Any:
        """The random numbers behind the action of each row of a minibatch."""
        return None if self.discrete else random.normal(key, (self.config.batch_size, 2))

    def all_params(self) -> dict[str, Any]:
        return {name: self.params(name) for name in self.learners}

    def gradient_step(self, key: jax.Array) -> dict[str, float]:
        """Critics, then actor through the new critics, then temperature, then targets.

        The temperature uses the entropy from before the actor's step.
        """
        config = self.config
        key_sample, key_critic, key_actor = random.split(key, 3)
        batch = self.sample(key_sample)
        noise = [self.noise(each) for each in (key_critic, key_actor)]
        value_loss, gradient = CRITIC_SLOPE(
            self.all_params(), self.target, batch, noise[0], config.gamma, config.activation
        )
        self.descend("critic", gradient)
        (policy_loss, entropy), gradient = ACTOR_SLOPE(
            self.all_params(), batch["obs"], noise[1], config.activation
        )
        self.descend("actor", gradient)
        if config.tune_alpha:
            self.descend("log_alpha", entropy - self.target_entropy())
        self.follow(self.params("critic"))
        return {
            "loss/policy": policy_loss,
            "loss/value": value_loss,
            "policy/entropy": entropy,
            "policy/alpha": np.exp(self.params("log_alpha")),
        }

    def target_entropy(self) -> float:
        if self.discrete:
            return self.config.target_entropy_ratio * np.log(3)
        return self.config.target_entropy_per_dim * 2


def assert_new(state: sac.TrainState, networks: Any, config: sac.Config) -> None:
    gains = {"actor": 0.01, "critic": 1.0}
    rederive_replay.assert_new(state, networks, gains, sac.Actor(config))
    jax.tree.map(np.testing.assert_array_equal, state.params["critic"], state.target_critic)
    np.testing.assert_allclose(state.params["log_alpha"], np.log(0.3), rtol=1e-6)
    first, second = state.params["critic"]["params"]["Dense_0"]["kernel"]
    assert np.abs(first - second).min() > 0.0


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_updates_are_those_of_the_paper(setting: str) -> None:
    """Also, the resulting policy acts as expected: by the same draws, or at the median or mode."""
    config = SETTINGS[setting]
    networks = given(config)
    start, state, expected = rederive_replay.assert_three_updates(sac, Rederived, config, networks)
    assert_new(start, networks, config)
    obs, key = np.random.default_rng(0).normal(size=(20, 3)), random.key(4)
    seen = expected.normalizers.seen(obs)
    output = OUTPUT(expected.params("actor"), seen, config.activation)
    drawn = expected.act(key, seen)
    if config.env == rederive.NAMES[True]:
        greedy = output.argmax(-1)
    else:
        greedy = rederive_replay.stretched(np.tanh(np.split(output, 2, axis=-1)[0]))
        drawn = rederive_replay.stretched(drawn)
    rederive.assert_close(POLICY(key, state, obs, config), drawn, "policy")
    rederive.assert_close(POLICY(key, state, obs, config, greedy=True), greedy, "greedy policy")
    if not config.tune_alpha:
        assert state.params["log_alpha"] == networks["params"]["log_alpha"]


@pytest.mark.parametrize(
    ("config", "target"),
    [(CONTINUOUS, -2.0), (DISCRETE, 0.5 * np.log(3))],
    ids=["continuous", "discrete"],
)
def test_the_temperature_moves_by_the_surplus_of_entropy(config: sac.Config, target: float) -> None:
    """Also for discrete actions, whose temperature is fixed above."""
    slope = jax.grad(sac.temperature_loss)(jnp.float32(-1.2), jnp.float32(0.8), config)
    assert float(slope) == pytest.approx(0.8 - target, rel=1e-5)


def at_the_edges(bias: tuple[float, ...]) -> Rederived:
    """Three updates from an actor whose head has this bias."""
    networks = given(CONTINUOUS)
    networks["params"]["actor"]["params"]["Dense_0"]["bias"] = np.float32(bias)
    return rederive_replay.assert_three_updates(sac, Rederived, CONTINUOUS, networks)[2]


def test_saturated_actions_lose_no_digits() -> None:
    """Updates stay exact for actions at which common code is infinite or off by tens of nats."""
    expected = at_the_edges((20.0, -15.0, -2.0, -1.0))
    action = expected.ring.rows["action"][CONTINUOUS.learning_starts :]
    assert np.all(np.abs(np.float32(action)) == 1.0)


def test_standard_deviations_are_bounded() -> None:
    """Between e^-20 and e^2; some states reach each of the bounds, and some do not."""
    expected = at_the_edges((0.3, -0.2, 2.0, -20.0))
    output = OUTPUT(expected.params("actor"), expected.ring.rows["obs"], CONTINUOUS.activation)
    beyond = np.mean([output[:, 2] > 2.0, output[:, 3] < -20.0], axis=1)
    assert np.all((beyond > 0.0) & (beyond < 1.0))


@pytest.mark.parametrize("name", rederive.NAMES.values())
def test_random_actions_repeat(name: str) -> None:
    """Those of each environment, for three steps; the last of 20 steps are cut short."""
    config = dataclasses.replace(SMALL, env=name, random_action_repeat=3)
    init = jax.jit(lambda key: sac.init(key, config), compiler_options=quick.OPTIONS)
    actions = np.asarray(init(random.key(3)).buffer.storage.action)[:80]
    blocks = np.split(actions.reshape(20, 4, -1), range(3, 20, 3))
    assert all(np.all(block == block[0]) for block in blocks)
    assert len(np.unique([block[0] for block in blocks], axis=0)) > 3


def test_a_run_folds_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    rederive_replay.assert_train_folds_its_key(sac, CONTINUOUS, monkeypatch)


def test_the_critics_loss_moves_nothing_else() -> None:
    """An update never needs this gradient, but a fork may differentiate more than the critics."""
    networks, steps = given(CONTINUOUS), np.ones(7, np.float32)
    batch = sac.Transition(np.ones((7, 3)), np.ones((7, 2)), steps, steps > 1.0, np.ones((7, 3)))
    params = networks["params"]
    gradient = jax.jit(jax.grad(sac.critic_loss, argnums=(2, 3)), compiler_options=quick.OPTIONS)(
        params["critic"], random.key(2), params, networks["target_critic"], batch, CONTINUOUS
    )
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_images_with_discrete_actions() -> None:
    config = dataclasses.replace(SMALL, env="Breakout-MinAtar", torso="cnn")
    sac.check(config)
    state = jax.eval_shape(sac.init, random.key(0), config)
    after, _ = jax.eval_shape(sac.update, random.key(1), state, config)
    kernels = [
        after.params[name]["params"]["torso"]["Conv_0"]["kernel"] for name in ("actor", "critic")
    ]
    assert [kernel.shape for kernel in kernels] == [(3, 3, 4, 16), (2, 3, 3, 4, 16)]


@pytest.mark.fast
def test_random_steps_count_as_training() -> None:
    assert SMALL.num_updates == (400 - 80) // 32


@pytest.mark.fast
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"replay_capacity": 15}, ["replay_capacity", "16", "15"]),
        ({"learning_starts": 200, "total_timesteps": 200}, ["learning_starts", "total_timesteps"]),
        ({"alpha": 0.0}, ["alpha", "more than 0", "0.0"]),
        ({"target_entropy_ratio": 1.2}, ["target_entropy_ratio", "1.2"]),
        ({"torso": "cnn"}, ["torso", "'cnn'"]),
        ({"alpha": float("inf")}, ["alpha", "finite", "inf"]),
        ({"alpha": 1e-300}, ["alpha", "finite", "1e-300"]),
        ({"target_entropy_per_dim": float("nan")}, ["target_entropy_per_dim", "nan"]),
        ({"tau": 0.0}, ["tau", "0.0"]),
        ({"random_action_repeat": 0}, ["random_action_repeat", "0"]),
        ({"learning_starts": 81}, ["num_envs", "learning_starts", "81"]),
        ({"total_timesteps": 10**12}, ["total_timesteps", "2147483647"]),
        ({"replay_capacity": 3 * 10**9}, ["replay_capacity", "2147483647"]),
    ],
)
def test_bad_settings_are_named(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        sac.check(dataclasses.replace(SMALL, **fields))
    assert all(word in str(caught.value) for word in words), str(caught.value)
