"""Driver of PureJaxRL: `make_train` of its ppo.py, in a checkout given by the job.

It runs as its documentation says: one process, `jit(vmap(make_train(config)))`. Two things are
changed from outside. Its wrappers import brax and navix, which PPO does not use; empty modules
replace them. And on a CPU, batched QR decompositions, in the orthogonal initialisers of flax,
sometimes hang for ever with jax 0.10 and two cores; there they are taken one after another.
"""

import os
import sys
import time
import types
from typing import Any

import common

NAMES = {
    "env": "ENV_NAME",
    "total_timesteps": "TOTAL_TIMESTEPS",
    "num_envs": "NUM_ENVS",
    "num_steps": "NUM_STEPS",
    "num_epochs": "UPDATE_EPOCHS",
    "num_minibatches": "NUM_MINIBATCHES",
    "activation": "ACTIVATION",
    "learning_rate": "LR",
    "gamma": "GAMMA",
    "gae_lambda": "GAE_LAMBDA",
    "clip_eps": "CLIP_EPS",
    "vf_coef": "VF_COEF",
    "ent_coef": "ENT_COEF",
    "max_grad_norm": "MAX_GRAD_NORM",
}
# Hard-coded in its ppo.py, so it cannot be set.
FIXED = {"hidden": [64, 64], "learning_rate_schedule": "linear", "normalize_advantage": True}


def config_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate settings; refuse those that its code lacks."""
    given = dict(settings)
    assert given.pop("vf_clip_eps") == given["clip_eps"], "it clips values by CLIP_EPS"
    for name, value in FIXED.items():
        assert given.pop(name) == value, f"{name} is {value} in its code"
    return {NAMES[name]: value for name, value in given.items()} | {"ANNEAL_LR": True}


def stand_in(name: str, *attributes: str) -> None:
    """Replace a module that is imported and not used by an empty one."""
    module = types.ModuleType(name)
    for attribute in attributes:
        setattr(module, attribute, None)
    sys.modules[name] = module


def one_by_one(orthogonal: Any) -> Any:
    """Return the initialiser with its QR decompositions taken one after another under vmap."""
    import jax

    def made(scale: float) -> Any:
        def init(key: Any, shape: Any, dtype: Any) -> Any:
            plain = orthogonal(scale)
            return jax.custom_batching.sequential_vmap(lambda key: plain(key, shape, dtype))(key)

        return init

    return made


def prepare(job: dict[str, Any]) -> common.Prepared:
    """Compile its training function for all agents side by side."""
    import jax
    import jax.numpy as jnp
    from flax.linen import initializers

    if jax.default_backend() == "cpu":
        initializers.orthogonal = one_by_one(initializers.orthogonal)
    stand_in("navix")
    stand_in("brax", "envs")
    stand_in("brax.envs")
    stand_in("brax.envs.wrappers")
    stand_in("brax.envs.wrappers.training", "EpisodeWrapper", "AutoResetWrapper")
    sys.path.insert(0, os.path.join(job["checkout"], "purejaxrl"))
    import ppo

    config = config_of(job["settings"])
    train = ppo.make_train(config)
    agents, steps = job["agents"], config["NUM_ENVS"] * config["NUM_STEPS"]

    def keys(first_seed: int) -> Any:
        return jax.vmap(jax.random.PRNGKey)(jnp.arange(first_seed, first_seed + agents))

    began = time.perf_counter()
    compiled = jax.jit(jax.vmap(train)).lower(keys(0)).compile()
    compile_s = time.perf_counter() - began

    @jax.jit
    def reduced(info: dict[str, Any]) -> tuple[Any, Any]:
        # Between the ends of episodes "returned_episode_returns" repeats the last one.
        ended, value = info["returned_episode"], info["returned_episode_returns"]
        return (value * ended).sum(axis=(2, 3)), ended.sum(axis=(2, 3))

    def returns(outcome: Any) -> Any:
        return [array.tolist() for array in reduced(outcome["metrics"])]

    env_steps = agents * config["NUM_UPDATES"] * steps
    return common.Prepared(
        run=lambda first_seed: jax.block_until_ready(compiled(keys(first_seed))),
        env_steps=env_steps,
        returns=returns,
        compile_s=compile_s,
    )


if __name__ == "__main__":
    common.main(prepare)
