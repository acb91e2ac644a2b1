"""Draw gold and proxy reward over divergence, for best-of-n sampling and for RL.

    python experiments/rlhf/overoptimisation.py results/overoptimisation

writes overoptimisation.png and overoptimisation.csv. The supervised model completes held-out
prompts many times, and each reward model, or an ensemble of those of all seeds, chooses the best.
The curves of RL are those of training.
"""

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import results
from jax import lax, random

from purejaxpg import contract
from purejaxpg.kernels import verification
from purejaxpg.report import figures, playback
from purejaxpg.rlhf import measure, tasks, tokens, transformer
from purejaxpg.sweep.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROMPTS = 128  # drawn, held-out ones for best-of-n and others for RL
POOL = 512  # completions of each prompt
COUNTS = tuple(2**i for i in range(10))  # n of best-of-n
BIN = 10  # updates that are one point of a curve of RL
UNCERTAIN = 0.5  # λ, price of the variance of an ensemble, as in Coste et al. for best-of-n
BY_LABELS = ("32-100", "32-500", "32-2500", "32-12500")  # width and labels of a cell
BY_SIZE = ("8-2500", "16-2500", "32-2500", "64-2500")
CELLS = tuple(dict.fromkeys((*BY_LABELS, *BY_SIZE)))
ENSEMBLES = {
    "mean": lambda r: r.mean(0),
    "minimum": lambda r: r.min(0),
    "mean - variance / 2": lambda r: r.mean(0) - UNCERTAIN * r.var(0),
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """How rewards change with the divergence; 0 is the supervised model.

    Attributes:
        kl: [K] nats, not always ascending.
        gold: [K].
        proxy: [K].
    """

    kl: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray


FIELDS = ("kl", "gold", "proxy")
Curves = dict[tuple[str, str, str], list[Curve]]  # by method, cell and what chooses


@dataclasses.dataclass(frozen=True)
class Pool:
    """Completions of prompts by the supervised model, with their gold rewards [N, P]."""

    prompt_ids: jax.Array
    ids: jax.Array
    gold: np.ndarray


# ------------------------------------------------------------------------------------ reading


def of_stage(directory: Path, stage: str) -> list[tuple[playback.Trained, dict[str, np.ndarray]]]:
    """Return the run of each seed, with its arrays."""
    with Store.read(directory / stage) as store:
        runs = [run for run in store.ledger.runs() if run["status"] == "done"]
        arrays = {unit: store.arrays(unit) for unit in {run["unit"] for run in runs}}
        trained = playback.load_all(store, runs, None, print)
    own = [{n: x[run["row"]] for n, x in arrays[run["unit"]].items()} for run in runs]
    return sorted(zip(trained, own, strict=True), key=lambda pair: pair[0].run["seed"])


def models_of(directory: Path, stage: str) -> list[transformer.Model]:
    return [
        contract.model(run.agent, stage, run.state, run.config, *run.given)
        for run, _ in of_stage(directory, stage)
    ]


# ---------------------------------------------------------------------------------- measuring


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def sampled(
    key: jax.Array, policy: transformer.Model, name: str, count: int, held_out: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Complete prompts -> prompt ids [P, ...], completion ids [N, P, L], gold rewards [N, P]."""
    task = tasks.make(name)
    key_prompt, key_sample = random.split(key)
    prompt_ids = task.prompts(key_prompt, PROMPTS, held_out)

    def one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        completion = measure.sample(key, policy, prompt_ids, task, 1.0)
        return completion.ids, task.reward(prompt_ids, completion.ids, completion.mask)

    return prompt_ids, *lax.map(one, random.split(key_sample, count))


@functools.partial(jax.jit, static_argnums=(3,))
def judged(model: transformer.Model, prompt_ids: jax.Array, ids: jax.Array, name: str) -> jax.Array:
    """Return what a reward model gives for completions [N, P, L] -> [N, P]."""
    task = tasks.make(name)

    def one(ids: jax.Array) -> jax.Array:
        mask = tokens.completion_mask(ids, task.eos_id)
        return measure.model_rewards(model, task, prompt_ids, ids, mask)

    return lax.map(one, ids)


def best_of(gold: np.ndarray, proxy: np.ndarray) -> Curve:
    """Return the rewards of the best of n by the proxy, from rewards [N, P].

    The divergence of the best of n from one is at most log n - (n - 1) / n.
    """
    value = {
        name: np.array([float(verification.best_of_n(x.T, proxy.T, n).mean()) for n in COUNTS])
        for name, x in (("gold", gold), ("proxy", proxy))
    }
    bound = np.array([np.log(n) - (n - 1) / n for n in COUNTS])
    return Curve(bound, *(x - x[0] for x in value.values()))


def along(arrays: Mapping[str, np.ndarray], gold: float, proxy: float) -> Curve:
    """Return the curve of a run of RL, with the rewards of the supervised model subtracted."""
    size = max(1, len(arrays["reward/gold"]) // BIN)

    def binned(name: str) -> np.ndarray:
        return np.array([float(part.mean()) for part in np.array_split(arrays[name], size)])

    kl = np.maximum(binned("policy/reference_kl"), 0.0)
    return Curve(kl, binned("reward/gold") - gold, binned("reward/score") - proxy)


def fitted(curve: Curve, method: str) -> tuple[float, float]:
    """Return α and β of d (α - β d) for best-of-n, and of d (α - β log d) for RL; d = √KL."""
    d = np.sqrt(curve.kl)
    d, gold = d[d > 0], curve.gold[d > 0]
    falling = d * d if method == "best-of-n" else d * np.log(d)
    alpha, minus_beta = np.linalg.lstsq(np.stack([d, falling], 1), gold, rcond=None)[0]
    return float(alpha), -float(minus_beta)


def measured(directory: Path) -> Curves:
    """Return the curves of all cells: one of each seed for "single", and one of each ensemble."""
    ((policy_run, _),) = of_stage(directory, "sft")
    name, key = policy_run.config.task, random.key(0)
    policy = models_of(directory, "sft")[0]
    held_out, others = (
        Pool(prompt_ids, ids, np.asarray(gold))
        for prompt_ids, ids, gold in (
            sampled(key, policy, name, count, is_held_out)
            for count, is_held_out in ((POOL, True), (POOL // 8, False))
        )
    )
    curves: Curves = {}
    for cell in CELLS:
        models = models_of(directory, f"reward-{cell}")
        proxies, starts = (
            np.array([judged(model, pool.prompt_ids, pool.ids, name) for model in models])
            for pool in (held_out, others)
        )
        runs = of_stage(directory, f"rl-{cell}")
        curves["best-of-n", cell, "single"] = [best_of(held_out.gold, proxy) for proxy in proxies]
        curves["RL", cell, "single"] = [
            along(arrays, float(others.gold.mean()), float(start.mean()))
            for (_, arrays), start in zip(runs, starts, strict=True)
        ]
        # Preferences leave a constant open for each prompt, which the members must share.
        shared = proxies - proxies.mean(1, keepdims=True)
        for kind, combine in ENSEMBLES.items():
            curves["best-of-n", cell, kind] = [best_of(held_out.gold, combine(shared))]
    perfect = best_of(held_out.gold, held_out.gold)
    return {**curves, ("best-of-n", "gold", "single"): [perfect]}


def average(curves: Sequence[Curve]) -> Curve:
    return Curve(*(np.mean([getattr(c, name) for c in curves], 0) for name in FIELDS))


def summarised(curves: Curves) -> list[dict[str, Any]]:
    """Return the coefficients of each cell, where gold is highest, and where curves end."""
    rows = []
    for (method, cell, chooser), own in curves.items():
        fits = np.array([fitted(curve, method) for curve in own])
        beta = fits[:, 1]
        mean = average(own)
        peak = int(mean.gold.argmax())
        width, _, labels = cell.partition("-")
        row = {
            "method": method, "chooser": chooser, "width": width, "labels": labels,
            "seeds": len(own), "alpha": fits[:, 0].mean(), "beta": beta.mean(),
            "beta_low": beta.min(), "beta_high": beta.max(), "gold_peak": mean.gold[peak],
            "kl_peak": mean.kl[peak], "gold_end": mean.gold[-1], "proxy_end": mean.proxy[-1],
            "kl_end": mean.kl[-1],
        }  # fmt: skip
        rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    return rows


# ------------------------------------------------------------------------------------ drawing


def draw_curves(axes: "Axes", curves: Curves, keys: Sequence[tuple[Any, ...]]) -> None:
    """Draw gold rewards with the range of the seeds, and proxies dashed."""
    for (*key, label), colour in zip(keys, (*figures.COLOURS, "#222222"), strict=False):
        own = curves[tuple(key)]
        mean = average(own)
        d, gold = np.sqrt(mean.kl), np.array([curve.gold for curve in own])
        axes.fill_between(d, gold.min(0), gold.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(d, mean.gold, color=colour, label=label)
        axes.plot(d, mean.proxy, color=colour, linestyle="--", linewidth=1)
    axes.set_xlabel("√KL from the supervised model, √nats")
    axes.set_ylabel("reward above the supervised model's")


def draw_beta(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    for method, colour in (("best-of-n", figures.COLOURS[0]), ("RL", figures.COLOURS[1])):
        single = [r for r in rows if r["method"] == method and r["chooser"] == "single"]
        own = [r for r in single if f"{r['width']}-{r['labels']}" in BY_LABELS]
        beta = np.array([r["beta"] for r in own])
        ends = np.array([[r["beta_low"] for r in own], [r["beta_high"] for r in own]])
        axes.errorbar(
            [int(r["labels"]) for r in own], beta, np.abs(ends - beta), color=colour, marker="o",
            capsize=2, label=method,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("labels (width 32)")
    axes.set_ylabel("β")


def draw(curves: Curves, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, grid = figures.make_panels(6, 3, (5.2, 4.2))
    for place, method in enumerate(("best-of-n", "RL")):
        for axes, cells, part, title in (
            (grid[3 * place], BY_LABELS, 2, "by labels"),
            (grid[3 * place + 1], BY_SIZE, 0, "by width"),
        ):
            unit = "labels" if part == 2 else "width"
            names = [f"{cell.partition('-')[part]} {unit}" for cell in cells]
            keys = [(method, cell, "single", n) for cell, n in zip(cells, names, strict=True)]
            draw_curves(axes, curves, keys)
            figures.dress(axes, f"{method}: {title}", "solid: gold, dashed: proxy, band: seeds")
    cell = BY_LABELS[0]
    draw_curves(
        grid[2], curves, [("best-of-n", cell, kind, kind) for kind in ("single", *ENSEMBLES)]
    )
    figures.dress(grid[2], "best-of-n: ensembles", "of 5 reward models with 100 labels each")
    draw_beta(grid[5], rows)
    figures.dress(grid[5], "β by labels", "bars: range of seeds")
    for axes in grid:
        axes.legend(frameon=False, fontsize=9)
    figures.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args()
    curves = measured(arguments.directory)
    rows = summarised(curves)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results.write(arguments.out / "overoptimisation.csv", rows)
    draw(curves, rows, arguments.out / "overoptimisation.png")


if __name__ == "__main__":
    main()
