"""Common to all drivers: read a job, prepare it, time repetitions, write a result.

A job is a JSON file that `peers.py` writes:

    peer          name of the driver
    algorithm     "ppo", "sac", "ddpg", "rlhf.grpo" or "rlhf.dpo"
    agents        how many, trained side by side if the peer can do that
    settings      names as in the Config of our agents
    repetitions   timed ones; one more comes first and its time is discarded
    first_seed    of the first agent in the first repetition; every repetition has fresh seeds
    model         of a language model, the sizes of a GPT-2
    texts         of a language model, what `peers.texts` returns

Steps are those of an environment, or tokens of completions with their padding. "work" of the
result is what a repetition of a language model was seen to do, which has to be equal on both sides.

"episodes" of the result covers all repetitions, the first included: for each seed and update, the
sum of the returns and the number of the training episodes that ended.

Nothing but the standard library is imported here: each driver runs in its peer's own environment.
"""

import importlib.metadata
import itertools
import json
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PACKAGES = ("jax", "jaxlib", "flax", "optax", "gymnax", "rejax")
PACKAGES += ("torch", "gymnasium", "stable-baselines3", "sbx-rl", "transformers", "trl")


class Prepared(NamedTuple):
    """A compiled job."""

    run: Callable[[Any], Any]  # first seed -> outcome; returns when everything is computed
    env_steps: int  # of all agents, in one run; or tokens
    returns: Callable[[Any], Any] | None = None  # outcome -> sums, counts: lists [agents][updates]
    compile_s: float | None = None  # None: the difference between the first run and the others
    make: Callable[[int], Any] | None = None  # first seed -> what `run` is given, not timed
    work: Callable[[Any], dict[str, int]] | None = None  # outcome -> what was done, by name


def main(prepare: Callable[[dict[str, Any]], Prepared]) -> None:
    """Do the job in the file of the first argument and write the result to the second."""
    source, target = map(pathlib.Path, sys.argv[1:3])
    result = measure(json.loads(source.read_text()), prepare)
    target.write_text(json.dumps(result))


def measure(job: dict[str, Any], prepare: Callable[[dict[str, Any]], Prepared]) -> dict[str, Any]:
    """Prepare a job, run it once to warm up, then time it."""
    prepared = prepare(job)
    seeds = [job["first_seed"] + i * job["agents"] for i in range(job["repetitions"] + 1)]
    seconds, cpu_s, episodes, work = [], [], [], []
    for seed in seeds:
        given = seed if prepared.make is None else prepared.make(seed)
        began, cpu_began = time.perf_counter(), time.process_time()
        outcome = prepared.run(given)
        seconds.append(time.perf_counter() - began)
        cpu_s.append(time.process_time() - cpu_began)
        if prepared.returns is not None:
            episodes.append(prepared.returns(outcome))
        if prepared.work is not None:
            work.append(prepared.work(outcome))
    assert work[1:] == work[:-1], f"repetitions differ in their work: {work}"
    first, *timed = seconds
    compile_s = prepared.compile_s
    if compile_s is None:
        compile_s = max(0.0, first - statistics.median(timed or seconds))
    return {
        "compile_s": compile_s,
        "first_s": first,
        "seconds": timed,
        "cpu_s": cpu_s[1:],  # of all threads of this process
        "env_steps": prepared.env_steps,
        "work": work[0] if work else {},
        "episodes": [list(itertools.chain(*parts)) for parts in zip(*episodes, strict=True)],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cores": sorted(os.sched_getaffinity(0)),
        "device": device(),
        "versions": versions(),
    }


def device() -> str:
    """Return the kind of device that jax computes on; "cpu" for a peer without jax."""
    jax = sys.modules.get("jax")
    return "cpu" if jax is None else jax.devices()[0].device_kind


def versions() -> dict[str, str]:
    """Return the versions of the relevant packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
