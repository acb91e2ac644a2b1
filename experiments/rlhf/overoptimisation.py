"""Draw gold and proxy reward over divergence, for best-of-n sampling and for RL.

    python experiments/rlhf/overoptimisation.py results/overoptimisation

writes overoptimisation.png and overoptimisation.csv. The supervised model completes held-out
prompts many times, and each reward model, or an ensemble of those of all seeds, chooses the best.
The curves of RL are those of training.
"""

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
BY_LABELS = ("32-125", "32-500", "32-2000", "32-8000")  # width and labels of a cell
BY_SIZE = ("8-8000", "16-8000", "32-8000")
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


REWARDS = (-7.0, 7.0)  # what panels of RL show
BLUE, RED = figures.COLOURS[:2]
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


def fitted(curve: Curve, method: str) -> dict[str, float]:
    """Fit the gold reward by d (α - β d) for best-of-n, and by d (α - β log d) for RL; d = √KL.

    Returns:
        `alpha`, `beta`, and `explained`, the share of the variance of the gold reward.
    """
    d = np.sqrt(curve.kl)
    d, gold = d[d > 0], curve.gold[d > 0]
    terms = np.stack([d, -d * (d if method == "best-of-n" else np.log(d))], 1)
    alpha, beta = np.linalg.lstsq(terms, gold, rcond=None)[0]
    residual = gold - terms @ np.array([alpha, beta])
    explained = 1 - residual.var() / gold.var() if gold.var() > 0 else float("nan")
    return {"alpha": float(alpha), "beta": float(beta), "explained": float(explained)}


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
    start = float(others.gold.mean())
    gold = [along(arrays, start, start) for _, arrays in of_stage(directory, "rl-gold")]
    perfect = [best_of(held_out.gold, held_out.gold)]
    return {**curves, ("best-of-n", "gold", "single"): perfect, ("RL", "gold", "single"): gold}


def summarised(curves: Curves) -> list[dict[str, Any]]:
    """Return means over the curves of each cell: coefficients, rewards at the peak and the end."""
    rows = []
    for (method, cell, chooser), own in curves.items():
        fits = [fitted(curve, method) for curve in own]
        beta = np.array([fit["beta"] for fit in fits])
        peaks = [int(curve.gold.argmax()) for curve in own]
        width, _, labels = cell.partition("-")
        values = {
            **{name: [fit[name] for fit in fits] for name in fits[0]},
            "gold_peak": [curve.gold[peak] for curve, peak in zip(own, peaks, strict=True)],
            "gold_end": [curve.gold[-1] for curve in own],
            "proxy_end": [curve.proxy[-1] for curve in own],
            "kl_peak": [curve.kl[peak] for curve, peak in zip(own, peaks, strict=True)],
            "kl_end": [curve.kl[-1] for curve in own],
        }
        means = {name: float(np.mean(value)) for name, value in values.items()}
        means |= {"beta_low": float(beta.min()), "beta_high": float(beta.max())}
        names = {"method": method, "chooser": chooser, "width": width, "labels": labels}
        rounded = {name: round(value, 3) for name, value in means.items()}
        rows.append({**names, "curves": len(own), **rounded})
    return rows


# ------------------------------------------------------------------------------------ drawing


def draw_mean(axes: "Axes", curves: Sequence[Curve], colour: str, label: str) -> None:
    """Draw rewards at equal divergences: means, and for gold the range of the seeds."""
    d, gold = np.sqrt(curves[0].kl), np.array([curve.gold for curve in curves])
    axes.fill_between(d, gold.min(0), gold.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(d, gold.mean(0), color=colour, label=label)
    proxy = np.mean([curve.proxy for curve in curves], 0)
    axes.plot(d, proxy, color=colour, linestyle="--", linewidth=1)


def draw_each(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Draw the rewards of each seed, whose divergences differ."""
    for i, curve in enumerate(curves):
        for reward, colour, label in ((curve.gold, BLUE, "gold"), (curve.proxy, RED, "proxy")):
            style = "-" if label == "gold" else "--"
            shown = label if i == 0 else None
            axes.plot(np.sqrt(curve.kl), reward, style, color=colour, linewidth=1.2, label=shown)


def draw_beta(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    for method, colour in (("best-of-n", BLUE), ("RL", RED)):
        single = [r for r in rows if r["method"] == method and r["chooser"] == "single"]
        own = [r for r in single if f"{r['width']}-{r['labels']}" in BY_LABELS]
        beta, low, high = (np.array([r[x] for r in own]) for x in ("beta", "beta_low", "beta_high"))
        labels = [int(r["labels"]) for r in own]
        bars = [beta - low, high - beta]
        axes.errorbar(labels, beta, bars, color=colour, marker="o", capsize=2, label=method)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(labels, [f"{count:,}" for count in labels])
    axes.minorticks_off()
    axes.set_xlabel("labels")
    axes.set_ylabel("β")


def draw(curves: Curves, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure, grid = figures.make_panels(8, 4, (3.9, 3.5))
    labels, widths, ensembles, beta = grid[:4]
    best = "best-of-n"
    for axes, part, cells, unit in ((labels, 2, BY_LABELS, "labels"), (widths, 0, BY_SIZE, "wide")):
        for cell, colour in zip(cells, figures.COLOURS, strict=False):
            name = f"{int(cell.partition('-')[part]):,} {unit}"
            draw_mean(axes, curves[best, cell, "single"], colour, name)
    for kind, colour in zip(("single", *ENSEMBLES), figures.COLOURS, strict=False):
        draw_mean(ensembles, curves[best, BY_LABELS[0], kind], colour, kind)
    draw_beta(beta, rows)
    for axes in grid[:3]:
        (perfect,) = curves[best, "gold", "single"]
        axes.plot(np.sqrt(perfect.kl), perfect.gold, ":", color="#444444", label="chosen by gold")
    for axes, cell in zip(grid[4:], BY_LABELS, strict=True):
        draw_each(axes, curves["RL", cell, "single"])
        figures.dress(axes, f"RL: {int(cell.partition('-')[2]):,} labels", "one line a seed")
        axes.set_xlim(0.0, 9.0)
        axes.set_ylim(*REWARDS)
    under = "solid: gold, dashed: proxy; band: seeds"
    figures.dress(labels, "Best-of-n: labels", under)
    figures.dress(widths, "Best-of-n: width", under)
    figures.dress(ensembles, "Best-of-n: ensembles", "of all seeds, 125 labels each; dashed: proxy")
    figures.dress(beta, "β by labels", "mean and range of seeds")
    for axes in (*grid[:3], *grid[4:]):
        axes.set_xlabel("√KL, √nats")
    for axes in (labels, grid[4]):
        axes.set_ylabel("reward, less that of the start")
    for axes in grid:
        axes.legend(frameon=False, fontsize=8)
    figures.save(figure, path)


def main() -> None:
    arguments = results.arguments(__doc__)
    curves = measured(arguments.directory)
    rows = summarised(curves)
    results.write(arguments.out / "overoptimisation.csv", rows)
    draw(curves, rows, arguments.out / "overoptimisation.png")


if __name__ == "__main__":
    main()
