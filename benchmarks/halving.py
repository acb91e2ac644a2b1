"""How much time does successive halving save, and what does it cost in score?

Runs the same random configurations of PPO on CartPole in two ways, in alternating processes, each
with an empty result directory and without a compilation cache:

    plain     every configuration to its end
    halving   [halving] rungs = 3, eta = 3: a third continues, then a third of that

The time is that of `purejaxpg sweep`, from its start to its end: importing, compiling (halving
compiles one unit size for all rungs), training, storing and the report. The ratio is the geometric
mean over pairs, with Student's t interval of its logarithm. `score` is the interquartile mean over
seeds of the winner that each finds; the last line gives the score and rank that the plain sweep has
for the configuration that halving chose.

Run: python benchmarks/halving.py [--pairs N] [--json FILE]
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from purejaxpg.report import ranking
from purejaxpg.sweep import store as stores

STUDY = """
agent = "ppo"
seeds = {seeds}

[config]
env = "CartPole-v1"
total_timesteps = {steps}
num_envs = 8
num_steps = 32

[sweep]
learning_rate = {{ log_uniform = [1e-4, 3e-2] }}
clip_eps = {{ uniform = [0.05, 0.4] }}
gae_lambda = {{ uniform = [0.8, 1.0] }}
ent_coef = {{ log_uniform = [1e-4, 1e-1] }}

[search]
method = "random"
samples = {configurations}
"""
WAYS = {"plain": "", "halving": "\n[halving]\nrungs = 3\neta = 3\n"}
COLD = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def sweep(study: str, directory: pathlib.Path) -> dict[str, Any]:
    """Run a sweep in a process of its own and return its seconds and its ranking."""
    directory.mkdir()
    (directory / "study.toml").write_text(study, encoding="utf-8")
    words = [sys.executable, "-m", "purejaxpg.cli", "sweep", "study.toml", "--out", "out"]
    began = time.perf_counter()
    subprocess.run(
        [*words, "--quiet"],
        cwd=directory,
        env={**os.environ, **COLD},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - began
    with stores.Store.read(directory / "out") as store:
        ranked, units = ranking.rank(store), store.ledger.units()
    return {
        "seconds": seconds,
        "compile_s": sum({unit["facts"]["compile_s"] for unit in units}),
        "env_steps": sum(unit["rows"] * unit["facts"]["env_steps"] for unit in units),
        "ranked": [
            {"rank": c.rank, "label": c.label, "iqm": c.iqm, "low": c.low, "high": c.high}
            for c in ranked
        ],
    }


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean of ratios and its 95% interval, which is NaN for a single ratio."""
    logs, count = np.log(ratios), len(ratios)
    mean = float(np.mean(logs))
    if count < 2:
        return math.exp(mean), math.nan, math.nan
    half = stats.t.ppf(0.975, count - 1) * float(np.std(logs, ddof=1)) / math.sqrt(count)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def summary(pairs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Compare the ways over all pairs. Scores are from the last pair; all pairs have the same."""
    found: dict[str, Any] = {
        way: {
            "seconds": [pair[way]["seconds"] for pair in pairs],
            "compile_s": [pair[way]["compile_s"] for pair in pairs],
            "env_steps": pairs[-1][way]["env_steps"],
            "winner": pairs[-1][way]["ranked"][0],
        }
        for way in WAYS
    }
    ratio, low, high = interval([p["plain"]["seconds"] / p["halving"]["seconds"] for p in pairs])
    plain = {each["label"]: each for each in pairs[-1]["plain"]["ranked"]}
    found["halving"]["plain_score_of_it"] = plain[found["halving"]["winner"]["label"]]
    interval_or_none = [low, high] if math.isfinite(low) else None
    return {**found, "speedup": ratio, "speedup_ci95": interval_or_none, "pairs": len(pairs)}


def table(found: dict[str, Any]) -> str:
    """Return the comparison as text."""
    lines = [f"{'':10s}{'seconds':>9s}{'compiling':>11s}{'M steps':>9s}   score of the winner"]
    for way in WAYS:
        own = found[way]
        times = [statistics.median(own[name]) for name in ("seconds", "compile_s")]
        cells = f"{times[0]:9.1f}{times[1]:11.1f}{own['env_steps'] / 1e6:9.1f}"
        lines.append(f"{way:10s}{cells}   {scored(own['winner'])}")
    it = found["halving"]["plain_score_of_it"]
    ends = found["speedup_ci95"]
    sure = f" (95% CI [{ends[0]:.2f}, {ends[1]:.2f}])" if ends else ""
    lines.append(f"plain / halving: {found['speedup']:.2f}{sure}, {found['pairs']} pair(s)")
    lines.append(f"halving's winner in the plain sweep: rank {it['rank']}, {scored(it)}")
    return "\n".join(lines)


def scored(winner: dict[str, Any]) -> str:
    return f"{winner['iqm']:.1f} [{winner['low']:.1f}, {winner['high']:.1f}] ({winner['label']})"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--configurations", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150_000, help="of a whole run")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here, too")
    options = parser.parse_args(words)
    study = STUDY.format(**vars(options))
    pairs: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.pairs):
            pair = {}
            for way, more in WAYS.items():
                pair[way] = sweep(study + more, pathlib.Path(scratch, f"{way}{number}"))
                print(f"{way}: {pair[way]['seconds']:.1f} s", flush=True)
            pairs.append(pair)
    found = summary(pairs)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps({**found, "study": study}, indent=1) + "\n")


if __name__ == "__main__":
    main()
