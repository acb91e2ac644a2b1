"""A tiny sweep on real training, and how tests run it."""

import io
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from purejaxpg.sweep import compute, engine
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

TINY: dict[str, Any] = {
    "agent": "ppo",
    "seeds": 2,
    "eval_episodes": 4,
    "rows_per_device": 2,
    "config": {
        "total_timesteps": 64,
        "num_envs": 2,
        "num_steps": 8,
        "num_epochs": 1,
        "num_minibatches": 1,
        "hidden": [8],
        "env_params": {"max_steps_in_episode": 20},
    },
    "sweep": {"learning_rate": [1e-3, 1e-2], "gamma": [0.9, 0.99]},
}

# Runs of 8 and of 4 updates, half of which are stopped half way: groups, rounds and legs at once.
HALVED: dict[str, Any] = {
    **TINY,
    "config": {name: value for name, value in TINY["config"].items() if name != "num_steps"},
    "sweep": {"num_steps": [4, 8], "learning_rate": [1e-3, 1e-2]},
    "halving": {"rungs": 2, "eta": 2},
}


def swept(**sweep: Any) -> specs.Spec:
    fixed = {name: value for name, value in TINY["config"].items() if name not in sweep}
    return specs.from_dict({**TINY, "config": fixed, "sweep": sweep or TINY["sweep"]}, "tiny")


# The programs of `build`, by all that they depend on; `release_programs` empties it.
BUILT: dict[Any, compute.Programs] = {}
BUILD = compute.build


def build(spec: specs.Spec, group: Any, devices: Any) -> compute.Programs:
    """Build the programs of a group, or return those that an earlier sweep of this process built.

    Not those of an agent's copy, which may change between two sweeps.
    """
    if not spec.agent.__name__.startswith(("purejaxpg.agents.", "purejaxpg.rlhf.")):
        return BUILD(spec, group, devices)
    sizes = group.rows, spec.eval_episodes, tuple(devices)
    key = spec.agent.__name__, compute.signature(group.config), sizes
    if key not in BUILT:
        BUILT[key] = BUILD(spec, group, devices)
    return BUILT[key]


def run(
    spec: specs.Spec,
    out: pathlib.Path,
    stop_after: int | None = None,
    devices: int = 1,
    snapshot_every_s: float = 1e9,
    share: bool = True,
) -> str:
    """Run `spec` into `out` -> what was printed.

    After `stop_after` commits, it is interrupted. With `share`, sweeps share programs, as groups of
    one sweep do.
    """
    console = Console(file=io.StringIO(), width=200)
    with stores.Store.open(out, dict(spec.identity)) as store:
        if stop_after is not None:
            interrupt_after(store, stop_after)
        with progresses.Progress(console, log=store.path / "progress.jsonl") as progress:
            rounds = searches.rounds(spec)
            progress.begin(spec, searches.rehearse(searches.rounds(spec)))
            backend = compute.Backend(spec, jax.devices()[:devices])
            with pytest.MonkeyPatch.context() as patch:
                if share and compute.build is BUILD:
                    patch.setattr(compute, "build", build)
                engine.run(rounds, store, backend, progress, snapshot_every_s)
    return console.file.getvalue()  # type: ignore[attr-defined]


def interrupt_after(store: stores.Store, commits: int) -> None:
    original, left = store.commit, [commits]

    def commit(*arguments: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        original(*arguments)

    store.commit = commit  # type: ignore[method-assign]


def contents(out: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
    with stores.Store.read(out) as store:
        return {unit["name"]: store.arrays(unit["name"]) for unit in store.ledger.units()}
