"""Result directories with made-up results, to test the report.

python tests/synthetic_sweep.py DIR [KIND ...]   # write one of each kind below DIR, with its report
"""

import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store

UPDATES = 200
STEPS = 2048
FACTS = {
    "steps_per_update": STEPS,
    "steps_before": 0,
    "env_steps": STEPS * UPDATES,
    "compile_s": 11.25,
    "rows_per_device": 96,
    "devices": 2,
    "device_kind": "cpu",
    "platform": "cpu",
    "jax": "0.11.2",
    "python": "3.12.4",
}
SPANS = {
    "CartPole-v1": (20.0, 500.0),
    "Acrobot-v1": (-500.0, -75.0),
    "Pendulum-v1": (-1500.0, -150.0),
}
DEFAULT = {"learning_rate": 3e-4, "clip_eps": 0.2, "gae_lambda": 0.95, "ent_coef": 0.0}


def quality(config: Mapping[str, Any]) -> float:
    """How well a configuration learns, from 0 to 1; planted for the report to find."""
    best = {"CartPole-v1": -2.9, "Acrobot-v1": -2.4, "Pendulum-v1": -3.2}[config["env"]]
    rate = math.log10(config.get("learning_rate", 1e-3))
    value = math.exp(-1.1 * (rate - best) ** 2)
    clip, epochs = config.get("clip_eps", 0.2), config.get("num_epochs", 4)
    value *= math.exp(-2.5 * (clip - 0.2) ** 2 * epochs)
    value *= 1.0 - 0.5 * abs(config.get("gae_lambda", 0.95) - 0.95)
    value *= {"tanh": 1.0, "relu": 0.93, "gelu": 0.96}[config.get("activation", "tanh")]
    return value * math.exp(-8.0 * config.get("ent_coef", 0.0))


def curve(config: Mapping[str, Any], seed: int, generator: np.random.Generator) -> np.ndarray:
    """A training curve `[UPDATES]`, which ends at the run's final level."""
    low, high = SPANS[config["env"]]
    level = np.clip(quality(config) + 0.08 * generator.standard_normal(), 0.0, 1.0)
    if generator.random() < 0.08:
        level *= generator.uniform(0.2, 0.6)  # a seed that gets stuck
    speed = 2.0 + 6.0 * level
    time = np.linspace(0.0, 1.0, UPDATES)
    shape = level * (1.0 - np.exp(-speed * time)) / (1.0 - math.exp(-speed))
    wobble = 0.03 * np.cumsum(generator.standard_normal(UPDATES)) / math.sqrt(UPDATES)
    return low + (high - low) * np.clip(shape + wobble, 0.0, 1.0)


def diverges(config: Mapping[str, Any], generator: np.random.Generator) -> bool:
    excess = math.log10(config.get("learning_rate", 1e-3)) + 1.9
    return bool(generator.random() < 1.0 / (1.0 + math.exp(-6.0 * excess)))


def write(
    path: pathlib.Path,
    configurations: Sequence[Mapping[str, Any]],
    seeds: int,
    confirm: Sequence[Mapping[str, Any]] = (),
    fresh: int = 0,
    sweep: Mapping[str, Any] | None = None,
    rows: int = 96,
) -> pathlib.Path:
    """Write a sweep, and a confirmation stage of some configurations on fresh seeds."""
    generator = np.random.default_rng(0)
    identity = {"agent": "ppo", "seeds": seeds, "sweep": dict(sweep or {})}
    text = 'agent = "ppo"\nseeds = 8\n\n[sweep]\n' + "\n".join(
        f"{k} = {v}" for k, v in (sweep or {}).items()
    )
    with Store.open(path, identity, text) as store:
        commit_round(store, 0, runs_of(configurations, range(seeds), "tune"), rows, generator)
        if confirm:
            again = runs_of(confirm, range(seeds, seeds + fresh), "confirm")
            commit_round(store, 1, again, rows, generator)
    return path


def runs_of(configurations: Sequence[Mapping[str, Any]], seeds: range, stage: str) -> list[Run]:
    return [
        Run(
            f"{stage}{i:05d}-{seed}", {"env": "CartPole-v1", **swept}, seed, dict(swept), stage,
            0, UPDATES, UPDATES,
        )
        for i, swept in enumerate(configurations)
        for seed in seeds
    ]  # fmt: skip


def commit_round(
    store: Store, index: int, runs: Sequence[Run], rows: int, generator: np.random.Generator
) -> None:
    units = {f"round{index}-unit{i}": runs[i : i + rows] for i in range(0, len(runs), rows)}
    store.ledger.plan(units, index)
    for number, (name, members) in enumerate(units.items()):
        arrays, outcomes = results(members, generator)
        store.commit(name, arrays, None, outcomes, {**FACTS, "wall_s": 41.0 + number / 7})


def results(
    runs: Sequence[Run], generator: np.random.Generator
) -> tuple[dict[str, np.ndarray], list[Outcome]]:
    """Make up the arrays and outcomes of a unit."""
    levels = np.stack(
        [curve(run.config, run.seed, generator)[run.start : run.stop] for run in runs]
    )
    count = generator.poisson(3.0, levels.shape).astype(np.float32)
    outcomes = []
    for i, run in enumerate(runs):
        failed = diverges(run.config, generator)
        score = float(levels[i, -1])
        if failed:
            levels[i, levels.shape[1] // 3 :] = SPANS[run.config["env"]][0]
        status = ("diverged", float("nan")) if failed else ("done", score)
        outcomes.append(Outcome(run.run_id, *status, status[1] + 3.0, 67 if failed else None))
    arrays = {
        "episode/return_sum": (levels * count).astype(np.float32),
        "episode/count": count,
        "loss/value": np.abs(levels - levels[:, -1:]).astype(np.float32),
        "evaluation/return": np.repeat(levels[:, -1:], 16, axis=1).astype(np.float32),
        "evaluation/finished": np.ones((len(runs), 16), bool),
    }
    return arrays, outcomes


def product(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def random_search(count: int) -> list[dict[str, Any]]:
    generator = np.random.default_rng(1)
    return [
        {
            "learning_rate": float(f"{10 ** generator.uniform(-5, -1.6):.6g}"),
            "clip_eps": float(f"{generator.uniform(0.05, 0.5):.6g}"),
            "num_epochs": int(generator.integers(1, 11)),
            "gae_lambda": float(f"{generator.uniform(0.8, 1.0):.6g}"),
            "activation": str(generator.choice(["tanh", "relu", "gelu"])),
            "ent_coef": float(f"{10 ** generator.uniform(-5, -1.5):.6g}"),
        }
        for _ in range(count)
    ]


RANDOM = {
    "learning_rate": {"log_uniform": [1e-5, 0.025]},
    "clip_eps": {"uniform": [0.05, 0.5]},
    "num_epochs": {"int_uniform": [1, 10]},
    "gae_lambda": {"uniform": [0.8, 1.0]},
    "activation": ["tanh", "relu", "gelu"],
    "ent_coef": {"log_uniform": [1e-5, 0.03]},
}


def small_grid(path: pathlib.Path) -> pathlib.Path:
    axes = {"learning_rate": [1e-4, 3e-4, 1e-3, 3e-3], "clip_eps": [0.1, 0.2, 0.4]}
    return write(path, product(**axes), 8, sweep=axes)


def large_random(path: pathlib.Path, count: int = 1000, seeds: int = 2) -> pathlib.Path:
    """A random search and a confirmation of its choices."""
    swept = random_search(count)
    probe = path.with_name(f"{path.name}-probe")
    from purejaxpg.report import ranking

    with Store.read(write(probe, swept, seeds, sweep=RANDOM)) as store:
        best = [c.swept for c in ranking.rank(store)[:3]]
    default = {**DEFAULT, "num_epochs": 4, "activation": "tanh"}
    default = {name: default[name] for name in RANDOM}
    return write(path, swept, seeds, [*best, default], 16, RANDOM)


def huge(path: pathlib.Path, count: int = 10_000) -> pathlib.Path:
    return write(path, random_search(count), 1, sweep=RANDOM, rows=500)


def environments(path: pathlib.Path) -> pathlib.Path:
    axes = {
        "env": list(SPANS),
        "learning_rate": [1e-4, 3e-4, 1e-3, 3e-3],
        "clip_eps": [0.1, 0.2, 0.4],
        "gae_lambda": [0.8, 0.9, 0.95],
    }
    return write(path, product(**axes), 5, sweep=axes)


def halving(path: pathlib.Path, count: int = 27, rungs: int = 3) -> pathlib.Path:
    """Successive halving: each rung continues the best third of the one before."""
    generator, left = np.random.default_rng(0), random_search(count)
    identity = {"agent": "ppo", "seeds": 2, "sweep": RANDOM, "halving": {"eta": 3, "rungs": rungs}}
    with Store.open(path, identity) as store:
        before = 0
        for rung in range(rungs):
            stop = UPDATES // 3 ** (rungs - 1 - rung)
            runs = []
            for swept, seed in itertools.product(left, range(2)):
                name = f"{swept['learning_rate']}-{seed}"
                config, parent = {"env": "CartPole-v1", **swept}, name if rung else None
                updates = (before, stop, UPDATES)
                runs.append(Run(name, config, seed, swept, "tune", *updates, parent))
            commit_round(store, rung, runs, 18, generator)
            before = stop
            left = sorted(left, key=lambda swept: -quality({"env": "CartPole-v1", **swept}))
            left = left[: math.ceil(len(left) / 3)]
    return path


def population(path: pathlib.Path, members: int = 12, generations: int = 8) -> pathlib.Path:
    """Population-based training on one population."""
    generator = np.random.default_rng(0)
    swept = [
        {
            "learning_rate": float(10 ** generator.uniform(-5, -2)),
            "ent_coef": float(10 ** generator.uniform(-4, -1.5)),
        }
        for _ in range(members)
    ]
    parents: list[str | None] = [None] * members
    with Store.open(path, {"agent": "ppo", "seeds": 1, "pbt": {"population": members}}) as store:
        for index in range(generations):
            span = (UPDATES * index // generations, UPDATES * (index + 1) // generations)
            runs = [
                Run(
                    f"member{i}",
                    {"env": "CartPole-v1", **own},
                    i,
                    own,
                    "tune",
                    *span,
                    UPDATES,
                    parent,
                )
                for i, (own, parent) in enumerate(zip(swept, parents, strict=True))
            ]
            commit_round(store, index, runs, members, generator)
            order = sorted(range(members), key=lambda i: -quality(runs[i].config))
            parents = [f"member{i}" for i in range(members)]
            for worst, best in zip(order[-3:], order[:3], strict=True):
                parents[worst] = f"member{best}"
                swept[worst] = {
                    k: v * float(generator.choice([0.8, 1.25])) for k, v in swept[best].items()
                }
    return path


KINDS: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    "small-grid": small_grid,
    "large-random": large_random,
    "huge": huge,
    "environments": environments,
    "halving": halving,
    "population": population,
}

if __name__ == "__main__":
    from rich.console import Console

    from purejaxpg.report import writer

    for kind in sys.argv[2:] or KINDS:
        directory = pathlib.Path(sys.argv[1], kind)
        if not directory.exists():
            KINDS[kind](directory)
        writer.write(directory, Console())
