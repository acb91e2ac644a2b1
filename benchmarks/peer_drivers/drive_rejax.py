"""Driver of Rejax: `jit(vmap(train))` of its SAC, and of its TD3 for DDPG.

It runs as its documentation says: one process. The evaluation callback is replaced, through
`replace`, by one that does nothing, and there is one evaluation period, so only training is timed.
TD3 keeps its policy_delay of 2: two critics and half as many steps of the actor are about the
arithmetic of DDPG. Training returns do not leave its training function.
"""

import time
from typing import Any

import common

NAMES = {
    "env": "env",
    "total_timesteps": "total_timesteps",
    "num_envs": "num_envs",
    "num_gradient_steps": "num_epochs",
    "batch_size": "batch_size",
    "replay_capacity": "buffer_size",
    "learning_starts": "fill_buffer",
    "learning_rate": "learning_rate",
    "gamma": "gamma",
}


def config_of(algorithm: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Translate settings; refuse those that its code lacks."""
    given = dict(settings)
    assert given.pop("critic_learning_rate") == given["learning_rate"], "it has one step size"
    assert given.pop("num_steps") == 1, "it takes one step at a time"
    assert not given.pop("orthogonal_init"), "it initialises by LeCun's rule"
    network = {"activation": given.pop("activation")}
    hidden, tau = given.pop("hidden"), given.pop("tau")
    if algorithm == "sac":
        own = {"agent_kwargs": network, "hidden_layer_sizes": tuple(hidden)}
    else:
        assert hidden == [64, 64], "the sizes of its TD3 are 64, 64"
        noise = 2.0 * given.pop("noise_std")  # in units of Pendulum's torque
        # It empties both, so each gets a copy.
        own = {"actor_kwargs": network, "critic_kwargs": {**network}, "exploration_noise": noise}
    own |= {"polyak": 1.0 - tau, "eval_freq": given["total_timesteps"]}
    return {NAMES[name]: value for name, value in given.items()} | own


def prepare(job: dict[str, Any]) -> common.Prepared:
    """Compile its training function for all agents side by side."""
    import jax
    import jax.numpy as jnp
    import rejax

    kind = {"sac": rejax.SAC, "ddpg": rejax.TD3}[job["algorithm"]]
    config = config_of(job["algorithm"], job["settings"])
    algorithm = kind.create(**config, skip_initial_evaluation=True)
    algorithm = algorithm.replace(eval_callback=lambda algorithm, state, key: ())
    agents = job["agents"]

    def keys(first_seed: int) -> Any:
        return jax.vmap(jax.random.PRNGKey)(jnp.arange(first_seed, first_seed + agents))

    began = time.perf_counter()
    compiled = jax.jit(jax.vmap(algorithm.train)).lower(keys(0)).compile()
    return common.Prepared(
        run=lambda first_seed: jax.block_until_ready(compiled(keys(first_seed))),
        env_steps=agents * config["total_timesteps"],
        compile_s=time.perf_counter() - began,
    )


if __name__ == "__main__":
    common.main(prepare)
