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
    return specs.from_dict(raw, "peers")


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

    backend = compute.Backend(sweep(job, 0), devices)

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
    return common.Prepared(run, steps + before, returns, programs.compile_s)


if __name__ == "__main__":
    common.main(prepare)
