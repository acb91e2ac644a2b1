"""Driver of SBX: SAC, one agent, in one process.

A new model would compile again, so one model does all repetitions. Each starts with its random
steps and a reset environment, and works as with a new model.
"""

from typing import Any

import common

NAMES = {
    "batch_size": "batch_size",
    "replay_capacity": "buffer_size",
    "learning_starts": "learning_starts",
    "num_steps": "train_freq",
    "num_gradient_steps": "gradient_steps",
    "learning_rate": "learning_rate",
    "critic_learning_rate": "qf_learning_rate",
    "gamma": "gamma",
    "tau": "tau",
}


def config_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate settings; refuse those that its code lacks."""
    from flax import linen as nn

    given = dict(settings)
    del given["env"], given["total_timesteps"]
    assert given.pop("num_envs") == 1, "only one environment is translated"
    assert not given.pop("orthogonal_init"), "it initialises by LeCun's rule"
    activation = {"relu": nn.relu, "tanh": nn.tanh}[given.pop("activation")]
    network = {"net_arch": given.pop("hidden"), "activation_fn": activation}
    return {NAMES[name]: value for name, value in given.items()} | {"policy_kwargs": network}


def prepare(job: dict[str, Any]) -> common.Prepared:
    """Make the model."""
    import sbx
    import torch

    torch.set_num_threads(1)  # its replay buffer hands out torch tensors
    assert job["algorithm"] == "sac" and job["agents"] == 1, "it trains one SAC agent"
    settings = job["settings"]
    model = sbx.SAC("MlpPolicy", settings["env"], seed=job["first_seed"], **config_of(settings))
    steps = settings["total_timesteps"]
    return common.Prepared(lambda first_seed: model.learn(steps), steps)


if __name__ == "__main__":
    common.main(prepare)
