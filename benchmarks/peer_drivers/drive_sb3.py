"""Driver of Stable-Baselines3: PPO, one agent after another, in one process or several.

torch has one thread, which is faster for networks of this size. With "processes" in the job, that
many train at once, each pinned to a core of its own and with its share of the agents. All start
together, and the time ends with the last one.
"""

import multiprocessing
import os
from typing import Any

import common

NAMES = {
    "num_steps": "n_steps",
    "num_epochs": "n_epochs",
    "gamma": "gamma",
    "gae_lambda": "gae_lambda",
    "clip_eps": "clip_range",
    "vf_clip_eps": "clip_range_vf",
    "vf_coef": "vf_coef",
    "ent_coef": "ent_coef",
    "max_grad_norm": "max_grad_norm",
    "normalize_advantage": "normalize_advantage",
}


def config_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Translate settings; refuse those that have no translation."""
    from torch import nn

    given = dict(settings)
    del given["env"], given["total_timesteps"]
    assert given.pop("learning_rate_schedule") == "linear", "only this one is translated"
    rate, hidden = given.pop("learning_rate"), given.pop("hidden")
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[given.pop("activation")]
    batch = given.pop("num_envs") * given["num_steps"] // given.pop("num_minibatches")
    return {NAMES[name]: value for name, value in given.items()} | {
        "batch_size": batch,
        "learning_rate": lambda remaining: rate * remaining,
        "policy_kwargs": {
            "net_arch": {"pi": hidden, "vf": hidden},
            "activation_fn": activation,
        },
    }


def train(settings: dict[str, Any], seeds: list[int]) -> None:
    """Train one agent after another."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    for seed in seeds:
        env = make_vec_env(settings["env"], n_envs=settings["num_envs"], seed=seed)
        model = PPO("MlpPolicy", env, seed=seed, device="cpu", **config_of(settings))
        model.learn(settings["total_timesteps"])


def work(settings: dict[str, Any], core: int, inbox: Any, outbox: Any) -> None:
    """Train the seeds that arrive, on one core, until None does."""
    os.sched_setaffinity(0, [core])
    import stable_baselines3  # noqa: F401  before anything is timed

    outbox.put("ready")
    while (seeds := inbox.get()) is not None:
        train(settings, seeds)
        outbox.put("done")


def prepare(job: dict[str, Any]) -> common.Prepared:
    """Start the processes that the job asks for, or none."""
    import stable_baselines3  # noqa: F401

    settings, agents, processes = job["settings"], job["agents"], job.get("processes", 1)

    def seeds(first_seed: int) -> list[int]:
        return list(range(first_seed, first_seed + agents))

    env_steps = agents * settings["total_timesteps"]
    if processes == 1:
        return common.Prepared(lambda first: train(settings, seeds(first)), env_steps)
    context = multiprocessing.get_context("spawn")
    outbox, inboxes = context.Queue(), [context.Queue() for _ in range(processes)]
    cores = sorted(os.sched_getaffinity(0))
    for i, inbox in enumerate(inboxes):
        arguments = (settings, cores[i % len(cores)], inbox, outbox)
        context.Process(target=work, args=arguments, daemon=True).start()
    for _ in inboxes:
        outbox.get()

    def run(first_seed: int) -> None:
        for i, inbox in enumerate(inboxes):
            inbox.put(seeds(first_seed)[i::processes])
        for _ in inboxes:
            outbox.get()

    return common.Prepared(run, env_steps)


if __name__ == "__main__":
    common.main(prepare)
