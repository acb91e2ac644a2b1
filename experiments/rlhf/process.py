"""Draw what rewards of steps are worth beside rewards of answers.

    python experiments/rlhf/process.py results/process

writes process.png and process.csv. For each held-out prompt, the supervised model writes a pool of
completions. The best of N is chosen by a model or by a vote, in each of the groups of N into which
the pool is divided. Then the policies of reinforcement learning complete the same prompts.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import results
from jax import lax, random

from purejaxpg import contract
from purejaxpg.report import figures, playback
from purejaxpg.rlhf import measure, tasks, transformer
from purejaxpg.sweep.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POOL = 256  # completions of each prompt by the supervised model
SAMPLES = 32  # and by each policy
PROMPTS = 128  # drawn from the held-out ones
COUNTS = (1, 4, 16, 64, 256)
BIN = 10  # updates that are one point of a curve
BLUE, RED, GREEN, PINK, ORANGE = figures.COLOURS
CHOOSERS = {  # label and colour
    "product": ("process model, product", BLUE),
    "minimum": ("process model, minimum", GREEN),
    "last": ("process model, last step", PINK),
    "outcome": ("outcome model", RED),
    "vote": ("majority vote", ORANGE),
    "any": ("any is right (pass@N)", "#888888"),
}
POLICIES = {  # of each stage: label and colour
    "rl-process": ("process model", BLUE),
    "rl-outcome": ("outcome model", RED),
    "rl-checker": ("checker of answers", "#222222"),
    "sft": ("supervised", "#888888"),
}
Rates = dict[str, float]  # `right` and `trace_error`


def of_stage(directory: Path, stage: str) -> dict[int, tuple[playback.Trained, np.ndarray | None]]:
    """Return the trained run of each seed, with its share of right answers in each update."""
    with Store.read(directory / stage) as store:
        runs = [run for run in store.ledger.runs() if run["status"] == "done"]
        arrays = {unit: store.arrays(unit) for unit in {run["unit"] for run in runs}}
        trained = playback.load_all(store, runs, None, print)
    gold = [arrays[run["unit"]].get("reward/gold") for run in runs]
    curves = [None if g is None else g[run["row"]] for g, run in zip(gold, runs, strict=True)]
    return {each.run["seed"]: (each, c) for each, c in zip(trained, curves, strict=True)}


def model_of(trained: playback.Trained) -> transformer.Model:
    name = contract.name_of(trained.agent)
    model = contract.model(trained.agent, name, trained.state, trained.config, *trained.given)
    assert isinstance(model, transformer.Model)
    return model


def verifiers(process: transformer.Model, outcome: transformer.Model) -> dict[str, Any]:
    """Return the models that choose by their names: one model of steps is read in three ways."""
    read = {
        name: dataclasses.replace(process.architecture, output=name)
        for name in transformer.AGGREGATIONS
    }
    models = {name: transformer.Model(process.params, a) for name, a in read.items()}
    return {**models, "outcome": outcome}


# ---------------------------------------------------------------------------------- measuring


@functools.partial(jax.jit, static_argnums=(3, 4))
def judged(
    key: jax.Array,
    policy: transformer.Model,
    models: Mapping[str, transformer.Model],
    name: str,
    count: int,
) -> dict[str, jax.Array]:
    """Complete held-out prompts, and judge the completions.

    Args:
        key: for prompts and completions.
        policy: writes the completions.
        models: reward models by name.
        name: of the task. Static.
        count: N, completions of each prompt. Static.

    Returns:
        Arrays [E, N]: `right`, 1 for a right answer; `sound`, whether all steps are right as well;
        `answer`, the last number; and the reward of each model by its name.
    """
    task = tasks.make(name)
    key_prompt, key_sample = random.split(key)
    prompt_ids = task.prompts(key_prompt, PROMPTS, held_out=True)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        completion = measure.sample(key, policy, prompt_ids, task, 1.0)
        arrays = prompt_ids, completion.ids, completion.mask
        ends, right = task.steps(*arrays)
        return {
            "right": task.reward(*arrays),
            "sound": (right | ~ends).all(1),
            "answer": completion.ids[:, -3],  # before the end of its line and the end of all
            **{key: measure.model_rewards(model, task, *arrays) for key, model in models.items()},
        }

    found = lax.map(one, random.split(key_sample, count))
    return {name: value.T for name, value in found.items()}


def chosen(reward: np.ndarray) -> np.ndarray:
    """Return how often each of N completions is chosen for its reward [..., N]; ties are drawn."""
    best = reward == reward.max(-1, keepdims=True)
    return best / best.sum(-1, keepdims=True)


def votes(answer: np.ndarray) -> np.ndarray:
    """Return how many of N completions give the same answer as each of them [..., N]."""
    return (answer[..., :, None] == answer[..., None, :]).sum(-1)


def best_of(found: Mapping[str, np.ndarray], count: int) -> dict[str, Rates]:
    """Return the rates of the best of N by what chooses it, over all groups of N completions."""
    groups = {name: value.reshape(len(value), -1, count) for name, value in found.items()}
    rewards = {**groups, "vote": votes(groups["answer"]), "any": groups["right"]}
    return {name: rates(groups, chosen(rewards[name])) for name in CHOOSERS if name in rewards}


def rates(found: Mapping[str, np.ndarray], weight: np.ndarray) -> Rates:
    """Return the share of right answers, and that of unsound ones among these."""
    right, sound = (float((weight * found[x]).sum(-1).mean()) for x in ("right", "sound"))
    return {"right": right, "trace_error": 1 - sound / right if right else float("nan")}


def measured(directory: Path) -> Iterator[dict[str, Any]]:
    """Measure all seeds -> rows with `part`, `name`, `n`, `seed` and the rates."""
    stages = {name: of_stage(directory, name) for name in ("process", "outcome", *POLICIES)}
    for seed in stages["sft"]:
        models = {name: model_of(runs[seed][0]) for name, runs in stages.items()}
        task, key = stages["sft"][seed][0].config.task, random.fold_in(random.key(0), seed)
        judges = verifiers(models["process"], models["outcome"])
        found = jax.tree.map(np.asarray, judged(key, models["sft"], judges, task, POOL))
        for count in COUNTS:
            for name, rate in best_of(found, count).items():
                yield {"part": "best of N", "name": name, "n": count, "seed": seed, **rate}
        for name in POLICIES:
            found = jax.tree.map(np.asarray, judged(key, models[name], {}, task, SAMPLES))
            rate = rates(found, np.full(found["right"].shape, 1 / SAMPLES))
            yield {"part": "policy", "name": name, "n": 1, "seed": seed, **rate}


def summarised(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean and the range of the rates over seeds."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["part"], row["name"], row["n"]), []).append(row)
    summaries = []
    for (part, name, count), own in groups.items():
        summary = {"part": part, "name": name, "n": count, "seeds": len(own)}
        for rate in ("right", "trace_error"):
            values = np.array([row[rate] for row in own])
            ends = {"": values.mean(), "_low": values.min(), "_high": values.max()}
            summary |= {rate + end: round(float(value), 4) for end, value in ends.items()}
        summaries.append(summary)
    return summaries


# ------------------------------------------------------------------------------------ drawing


def draw_best_of(axes: "Axes", rows: Sequence[Mapping[str, Any]], rate: str) -> None:
    for name, (label, colour) in CHOOSERS.items():
        own = [row for row in rows if row["part"] == "best of N" and row["name"] == name]
        if name == "any" and rate != "right":
            continue
        counts = [row["n"] for row in own]
        mean, low, high = (
            np.array([row[rate + end] for row in own]) for end in ("", "_low", "_high")
        )
        style = {"linestyle": ":" if name == "any" else "-", "color": colour}
        axes.errorbar(
            counts, mean, [mean - low, high - mean], marker="o", markersize=4, label=label,
            capsize=2, **style,
        )  # fmt: skip
    axes.set_xscale("log", base=4)
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.set_xlabel("N, completions to choose from")


def draw_training(axes: "Axes", directory: Path) -> None:
    for stage, (label, colour) in POLICIES.items():
        curves = [c for _, c in of_stage(directory, stage).values() if c is not None]
        if not curves:
            continue
        size = max(1, len(curves[0]) // BIN)
        binned = np.array([[part.mean() for part in np.array_split(c, size)] for c in curves])
        at = (np.arange(size) + 0.5) * len(curves[0]) / size
        axes.fill_between(at, binned.min(0), binned.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(at, binned.mean(0), color=colour, label=label)
    axes.set_xlabel("updates")
    axes.set_xlim(left=0)


def draw_policies(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    for place, (name, (_, colour)) in enumerate(POLICIES.items()):
        own = [row for row in rows if row["part"] == "policy" and row["name"] == name]
        wrong = [1 - row["right"] for row in own]
        axes.plot(wrong, np.full(len(own), place - 0.12), "o", color=colour, alpha=0.8)
        trace = [row["trace_error"] for row in own]
        axes.plot(trace, np.full(len(own), place + 0.12), "D", color=colour, fillstyle="none")
    axes.set_yticks(range(len(POLICIES)), [label for label, _ in POLICIES.values()])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#ececec")
    axes.set_xlim(left=-0.02)
    axes.plot([], [], "o", color="#444444", label="wrong answers")
    axes.plot([], [], "D", color="#444444", fillstyle="none", label="unsound among right ones")
    axes.set_xlabel("share of completions")


def draw(directory: Path, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    summaries, seeds = summarised(rows), len({row["seed"] for row in rows})
    figure, (right, trace, training, policies) = figures.make_panels(4, 2, (5.0, 3.9))
    bars = f"mean of {seeds} seeds, bars: their range"
    draw_best_of(right, summaries, "right")
    figures.dress(right, "Best of N: right answers", bars)
    draw_best_of(trace, summaries, "trace_error")
    figures.dress(trace, "Best of N: trace error", "right answers with a wrong step")
    draw_training(training, directory)
    figures.dress(training, "RL: right answers", f"in training, by reward; band: {seeds} seeds")
    draw_policies(policies, rows)
    figures.dress(policies, "After RL", "held-out prompts, one mark a seed")
    for axes in (training, policies):
        axes.legend(frameon=False, fontsize=9)
    trace.legend(*right.get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left")
    for axes in (right, trace, training):
        axes.set_ylim(0, 1.02)
    figures.save(figure, path)


def main() -> None:
    arguments = results.arguments(__doc__)
    rows = list(measured(arguments.directory))
    results.write(arguments.out / "process.csv", summarised(rows))
    draw(arguments.directory, rows, arguments.out / "process.png")


if __name__ == "__main__":
    main()
