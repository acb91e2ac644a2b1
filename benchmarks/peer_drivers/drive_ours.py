"""Driver of this package: the compiled programs of a sweep, over all cores, as `sweep` runs them.

Of accelerators it uses one, because peers use no more.

A job with "limits_end" treats a time limit as the end of an episode, as PureJaxRL does: if the two
sides then learn alike, that was the difference between them.

Evaluation, the store and the report are left out: a repetition is `init` and all segments of
training, with the metrics brought to the host after each segment.
"""

import dataclasses
from typing import Any

import common

from purejaxpg import contract
from purejaxpg.sweep import session


def sweep(job: dict[str, Any], first_seed: int) -> Any:
    """Return the sweep of a job."""
    from purejaxpg.sweep import spec as specs

    seeds = list(range(first_seed, first_seed + job["agents"]))
    raw = {"agent": job["algorithm"], "seeds": seeds, "config": job["settings"]}
    return specs.from_dict(raw, "peers", given=given(job) if "model" in job else None)


def given(job: dict[str, Any]) -> Any:
    """Return what the trainer of a language model is given: a random GPT-2, and pairs for DPO."""
    import jax
    import jax.numpy as jnp

    from purejaxpg import trainers
    from purejaxpg.rlhf import tasks, transformer

    task, sizes = tasks.make(job["settings"]["task"]), job["model"]
    heads = {"num_kv_heads": sizes["num_heads"], "head_dim": sizes["width"] // sizes["num_heads"]}
    gpt2 = {"norm": "layer", "norm_eps": 1e-5, "mlp": "gelu", "bias": "all"}
    words = {"vocab_size": len(task.words), "suppressed": task.suppressed}
    architecture = transformer.Architecture(**sizes, **heads, **gpt2, **words)
    found = {"reference": transformer.init(jax.random.key(0), architecture)}
    if "pairs" in job["texts"]:
        found["pairs"] = pairs(job["texts"], task.prompt_length)
    given = trainers.load(job["algorithm"]).Given(**found)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], given)


def pairs(texts: dict[str, Any], prompt_length: int) -> Any:
    """Return the pairs of a job as ids."""
    import numpy as np

    from purejaxpg.rlhf import data, tasks

    index = {word: i for i, word in enumerate(texts["words"])}

    def ids(name: str, length: int) -> Any:
        rows = [[index[word] for word in pair[name].split()] for pair in texts["pairs"]]
        padded = [[tasks.PAD] * (length - len(row)) + row for row in rows]
        return np.array(padded, np.int32)

    lengths = {"prompt": prompt_length, "chosen": texts["length"], "rejected": texts["length"]}
    return data.Pairs(**{f"{name}_ids": ids(name, length) for name, length in lengths.items()})


def work_of(job: dict[str, Any], spec: Any, group: Any) -> dict[str, int]:
    """Return what a run of a language model does, by the shapes of what its program draws."""
    import jax

    config, trainer, key = group.config, spec.agent, jax.random.key(0)
    own = spec.given.of_run(0)
    parameters = sum(x.size for x in jax.tree.leaves(own[0].reference.params))
    if job["algorithm"] == "rlhf.dpo":
        batch = jax.eval_shape(trainer.draw, key, config, *own)
    else:
        state = jax.eval_shape(trainer.init, key, config, *own)
        batch, _ = jax.eval_shape(trainer.rollout, key, state, config, *own)
    drawn = config.num_updates * batch.completion_ids.size
    generated = 0 if job["algorithm"] == "rlhf.dpo" else drawn
    epochs = getattr(config, "num_epochs", 1)
    return {"generated": generated, "trained": epochs * drawn, "parameters": parameters}


def take_limits_for_ends() -> None:
    """Make every truncated episode look terminated to the agents."""
    from purejaxpg import envs

    step = envs.step

    def ending(*args: Any) -> Any:
        obs, state, now = step(*args)
        return obs, state, dataclasses.replace(now, terminated=now.done)

    envs.step = ending


def prepare(job: dict[str, Any]) -> common.Prepared:
    """Compile the programs of the sweep."""
    devices = session.find_devices(None)
    devices = devices if devices[0].platform == "cpu" else devices[:1]
    if job.get("limits_end"):
        take_limits_for_ends()
    import numpy as np

    from purejaxpg.sweep import compute, engine, plan, search

    spec = sweep(job, 0)
    backend = compute.Backend(spec, devices)

    def group_of(first_seed: int) -> Any:
        round_ = next(search.rounds(sweep(job, first_seed)))
        (group,) = backend.groups(0, round_, {})
        return group

    programs = backend.compile(group_of(0))

    def train(group: Any, units: Any) -> dict[str, Any]:
        inputs = backend.inputs(programs, plan.padded(units, programs.units))
        batch = engine.fresh(backend, programs, group, units, inputs)
        for _ in engine.segments(backend, programs, inputs, batch):
            pass
        return batch.metrics

    def run(first_seed: int) -> list[dict[str, Any]]:
        group, size = group_of(first_seed), programs.units
        starts = range(0, len(group.units), size)
        return [train(group, group.units[i : i + size]) for i in starts]

    def returns(outcome: list[dict[str, Any]]) -> Any:
        names = contract.CURVE
        arrays = [np.concatenate([found[name] for found in outcome]) for name in names]
        return [array[: job["agents"]].tolist() for array in arrays]

    group = group_of(0)
    steps = job["agents"] * (group.config.steps_per_update * group.stop)
    before = job["agents"] * contract.steps_before(group.config)
    if "model" not in job:
        return common.Prepared(run, steps + before, returns, programs.compile_s)
    done = work_of(job, spec, group)
    return common.Prepared(run, steps, None, programs.compile_s, work=lambda _: done)


if __name__ == "__main__":
    common.main(prepare)
