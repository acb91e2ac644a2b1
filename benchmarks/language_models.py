"""Does a run of PPO cost more among 16 runs of a language model than alone?

Trains the same reference once, then sweeps `rlhf.ppo` from it in two ways, in alternating processes
on one device, each with an empty result directory and without a compilation cache:

    one        beta = 0.1, one seed
    sixteen    8 values of beta, two seeds

`whole` is the time of `purejaxpg sweep` from its start to its end, `compiling` a part of it, and
`training` the time of the units, evaluation included. Ratios compare a run of the sixteen with the
one: geometric means over pairs, with Student's t interval of their logarithm.

Run: python benchmarks/language_models.py [--pairs N] [--json FILE]
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import halving

from purejaxpg.sweep import store as stores

REFERENCE = """
agent = "rlhf.sft"
config = {{ task = "{task}", num_updates = {reference_updates} }}
"""
STUDY = """
agent = "rlhf.ppo"
given = {{ reference = "reference/out:best" }}
config = {{ task = "{task}", num_updates = {updates} }}
"""
WAYS = {
    "one": "seeds = 1\nsweep = { beta = [0.1] }\n",
    "sixteen": "seeds = 2\nsweep = { beta = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0] }\n",
}
PARTS = ("whole", "compiling", "training")
COLD = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def sweep(study: str, scratch: pathlib.Path, name: str) -> dict[str, Any]:
    """Run a sweep in a process of its own -> its seconds and the numbers of runs and programs."""
    (scratch / f"{name}.toml").write_text(study, encoding="utf-8")
    words = [sys.executable, "-m", "purejaxpg.cli", "sweep", f"{name}.toml", "--out", f"{name}/out"]
    began = time.perf_counter()
    subprocess.run(
        [*words, "--devices", "1", "--quiet"],
        cwd=scratch,
        env={**os.environ, **COLD},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - began
    with stores.Store.read(scratch / name / "out") as store:
        facts = [unit["facts"] for unit in store.ledger.units()]
        runs = len(store.ledger.runs())
    compiled = {each["compile_s"] for each in facts}
    return {
        "whole": seconds,
        "compiling": sum(compiled),
        "training": sum(each["wall_s"] for each in facts),
        "runs": runs,
        "compilations": len(compiled),
        "rows": facts[0]["rows_per_device"],
    }


def summary(pairs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Compare a run of the sixteen with the one, over all pairs."""
    found: dict[str, Any] = {way: [pair[way] for pair in pairs] for way in WAYS}
    for part in PARTS:
        each = [{way: p[way][part] / p[way]["runs"] for way in WAYS} for p in pairs]
        ratio, low, high = halving.interval([e["sixteen"] / e["one"] for e in each])
        found[f"{part}_ratio"] = {"mean": ratio, "ci95": [low, high] if len(pairs) > 1 else None}
    return found


def table(found: dict[str, Any]) -> str:
    """Return the comparison as text."""
    lines = [f"{'seconds of a run':18s}" + "".join(f"{part:>12s}" for part in PARTS)]
    for way in WAYS:
        cells = [
            statistics.median(each[part] / each["runs"] for each in found[way]) for part in PARTS
        ]
        own = found[way][0]
        what = f"{own['compilations']} compilation(s), {own['rows']} rows in a unit"
        lines.append(f"{way:18s}" + "".join(f"{cell:12.2f}" for cell in cells) + f"   {what}")
    for part in PARTS:
        ratio, ends = found[f"{part}_ratio"]["mean"], found[f"{part}_ratio"]["ci95"]
        sure = f" (95% CI [{ends[0]:.3f}, {ends[1]:.3f}])" if ends else ""
        lines.append(f"{part}, sixteen / one: {ratio:.3f}{sure}, {len(found['one'])} pair(s)")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--task", default="sentiment")
    parser.add_argument("--updates", type=int, default=150, help="of a run of PPO")
    parser.add_argument("--reference-updates", type=int, default=300)
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here, too")
    options = parser.parse_args(words)
    study = STUDY.format(**vars(options))
    pairs: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = pathlib.Path(temporary)
        sweep(REFERENCE.format(**vars(options)), scratch, "reference")
        for number in range(options.pairs):
            pair = {}
            for way, more in WAYS.items():
                pair[way] = sweep(study + more, scratch, f"{way}{number}")
                print(f"{way}: {pair[way]['whole']:.1f} s", flush=True)
            pairs.append(pair)
    found = summary(pairs)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps({**found, "study": study}, indent=1) + "\n")


if __name__ == "__main__":
    main()
