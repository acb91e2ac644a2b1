"""A trainer without an environment: softmax policy gradient on a bandit of Gaussian arms."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax, random

from purejaxpg import config as configs

UNIT = "pulls"  # that `steps_per_update` counts
MEANS = jnp.array([0.0, 0.5, 1.0])  # of the arms; the deviation is 1


@configs.dataclass
class Config:
    learning_rate: float = 0.1
    num_updates: int = 60
    steps_per_update: int = 16  # pulls


@struct.dataclass
class State:
    params: jax.Array  # [arms] logits


@struct.dataclass
class Model:
    """What a run can give to a later one."""

    logits: jax.Array  # [arms]
    maker: str = struct.field(pytree_node=False)


def check(config):
    configs.in_range(config)


def init(key, config):
    return State(1e-3 * random.normal(key, MEANS.shape))


def update(key, state, config):
    key_arm, key_reward = random.split(key)
    arm = random.categorical(key_arm, state.params, shape=(config.steps_per_update,))
    reward = MEANS[arm] + random.normal(key_reward, arm.shape)

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(params)[arm] * (reward - reward.mean()))

    value, gradient = jax.value_and_grad(loss)(state.params)
    metrics = {"loss/policy": value, "reward/mean": reward.mean()}
    return State(state.params - config.learning_rate * gradient), metrics


def train(key, config):
    keys = jax.vmap(lambda u: random.fold_in(key, u))(1 + jnp.arange(config.num_updates))
    state = init(random.fold_in(key, 0), config)
    return lax.scan(lambda state, key: update(key, state, config), state, keys)


def score(key, state, config, num_episodes):
    arm = random.categorical(key, state.params, shape=(num_episodes,))
    return {"evaluation/return": MEANS[arm]}
