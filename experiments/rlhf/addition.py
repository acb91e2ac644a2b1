"""Draw how learning from a checker changes right answers, their diversity and their length.

    python experiments/rlhf/addition.py results/addition

writes addition.png and addition.csv.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from jax import lax, nn

from purejaxpg.report import figures
from purejaxpg.rlhf import grpo
from purejaxpg.sweep.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BIN = 10  # updates that are one point of a curve
LEAST = 0.02  # share of completions that a mean length is made of, at least
BLUE, RED, GREEN, PINK, ORANGE = figures.COLOURS
GREY, DARK = "#888888", "#222222"
Curves = Mapping[str, np.ndarray]  # metrics [seeds, updates] by name
# By label: the stage, its value of `normaliser`, and a colour.
Variants = Mapping[str, tuple[str, str | None, str]]
METHODS: Variants = {
    "RLOO": ("rloo", None, BLUE),
    "GRPO (constant)": ("grpo", "constant", GREEN),
    "PPO": ("ppo", None, RED),
}
NORMALISERS: Variants = {
    "constant": ("grpo", "constant", GREEN),
    "token": ("grpo", "token", ORANGE),
    "sequence": ("grpo", "sequence", PINK),
}
TUNED: Variants = {"fine-tuned": ("sft", None, GREY)}
EARLY: Variants = {
    "fine-tuned too little": ("early", None, GREY),
    "RLOO from there": ("early-rloo", None, DARK),
}
COUNTS = (1, 4, 16)  # k of pass@k
COLUMNS = (  # of the table
    *(f"pass@{k}" for k in COUNTS),
    "entropy first",
    "entropy last",
    "length of right",
    "length of wrong",
)
MOST_DOTS = 4  # of the table
FIRST_RIGHT = 0.25  # share of right answers at the beginning, in the table


# ---------------------------------------------------------------------------------- reading


def curves(directory: Path, stage: str, normaliser: str | None) -> Curves:
    """Return the metrics of training of the runs of a stage, [seeds, updates] each."""
    with Store.read(directory / stage) as store:
        runs = [
            run
            for run in store.ledger.runs()
            if run["status"] == "done" and run["swept"].get("normaliser") == normaliser
        ]
        rows = [{n: a[run["row"]] for n, a in store.arrays(run["unit"]).items()} for run in runs]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def present(directory: Path, variants: Variants) -> Variants:
    """Return the variants that have results; a sweep that still runs lacks some."""
    return {
        label: variant
        for label, variant in variants.items()
        if (directory / variant[0]).is_dir() and len(scores(directory, *variant[:2], "seed"))
    }


def scores(directory: Path, stage: str, normaliser: str | None, name: str) -> np.ndarray:
    """Return a score of the runs of a stage on held-out prompts -> [seeds]."""
    runs = results.runs(directory, stage)
    return np.array([run[name] for run in runs if run.get("normaliser") == normaliser])


def binned(values: np.ndarray) -> np.ndarray:
    """Return means over BIN updates each: [seeds, updates] -> [seeds, points]."""
    size = max(1, values.shape[1] // BIN)
    return np.array([[part.mean() for part in np.array_split(row, size)] for row in values])


def lengths(found: Curves, right: bool) -> np.ndarray:
    """Return the mean length of right or of wrong completions -> [seeds, points].

    It is NaN where these were too few.
    """
    share, length = binned(found["completion/right"]), binned(found["completion/right_length"])
    if not right:
        share, length = 1 - share, binned(found["completion/length"]) - length
    enough = share >= LEAST
    return np.where(enough, length / np.where(enough, share, 1.0), np.nan)


# ---------------------------------------------------------------------------------- exact ascent


def listed(logits: jax.Array) -> jax.Array:
    """Return the log-probabilities of the tokens of all completions of a table.

    An answer of three digits is right or wrong with its first one, and 0 to F dots follow. Every
    state has its own logit.

    Args:
        logits: [1 + 2F], of a right answer; of a dot after a right one, then after a wrong one.

    Returns:
        [2, F+1, F+4], right and wrong, with each number of dots; 0 where there is no choice.
    """
    answer = jnp.stack([nn.log_sigmoid(logits[0]), nn.log_sigmoid(-logits[0])])
    dot = logits[1:].reshape(2, 1, MOST_DOTS)
    place, count = jnp.arange(MOST_DOTS), jnp.arange(MOST_DOTS + 1)[:, None]
    chosen = jnp.where(place < count, nn.log_sigmoid(dot), nn.log_sigmoid(-dot))
    chosen = jnp.where(place <= count, chosen, 0.0)
    first = jnp.broadcast_to(answer[:, None, None], (2, MOST_DOTS + 1, 1))
    return jnp.concatenate([jnp.pad(first, ((0, 0), (0, 0), (0, 2))), chosen, 0.0 * first], axis=2)


def ascent(normaliser: str) -> dict[str, np.ndarray]:
    """Follow the exact gradient of GRPO without a penalty, from equally frequent lengths.

    Returns:
        Arrays [steps]: the share of `right` answers, and the mean length of `right_length` and of
        `wrong_length` ones.
    """
    config = grpo.Config(normaliser=normaliser, beta=0.0)
    length = 4 + jnp.arange(MOST_DOTS + 1)
    mask = jnp.broadcast_to(jnp.arange(MOST_DOTS + 4) < length[:, None], (2, MOST_DOTS + 1, 8))
    mask = mask.reshape(-1, MOST_DOTS + 4)
    right = jnp.repeat(jnp.array([1.0, 0.0]), MOST_DOTS + 1)

    def loss(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_prob = listed(logits).reshape(mask.shape)
        old = lax.stop_gradient(log_prob)
        probability = jnp.exp(old.sum(1))
        advantage = right - probability @ right
        zeros = jnp.zeros_like(old)
        batch = grpo.Batch(None, None, mask, old, zeros, advantage, len(mask) * probability)
        return grpo.objective(log_prob, batch, config)[0], probability.reshape(2, -1)

    def step(logits: jax.Array, _: None) -> tuple[jax.Array, dict[str, jax.Array]]:
        gradient, probability = jax.grad(loss, has_aux=True)(logits)
        share = probability.sum(1)
        means = probability @ length / share
        found = {"right": share[0], "right_length": means[0], "wrong_length": means[1]}
        return logits - 0.5 * gradient, found

    # A dot at place j is as frequent as the completions that have more than j dots.
    dots = jnp.log(jnp.arange(MOST_DOTS, 0, -1.0))
    start = jnp.concatenate([jnp.log(jnp.array([FIRST_RIGHT / (1 - FIRST_RIGHT)])), dots, dots])
    _, found = jax.jit(lambda start: lax.scan(step, start, length=2000))(start)
    return {name: np.asarray(value) for name, value in found.items()}


# ---------------------------------------------------------------------------------- the table


def rows_of(
    directory: Path, label: str, stage: str, normaliser: str | None
) -> list[dict[str, Any]]:
    """Return a row for each seed: rates on held-out prompts, entropy and lengths in training."""
    found = curves(directory, stage, normaliser)
    rates = {f"pass@{k}": scores(directory, stage, normaliser, f"pass@{k}") for k in COUNTS}
    seeds = scores(directory, stage, normaliser, "seed")
    measured = {**rates, **summaries(found)} if "policy/entropy" in found else rates
    return [
        {"run": label, "seed": int(seed)}
        | {name: round(float(measured[name][i]), 3) if name in measured else "" for name in COLUMNS}
        for i, seed in enumerate(seeds)
    ]


def summaries(found: Curves) -> dict[str, np.ndarray]:
    """Return numbers for each seed: entropy at both ends, and lengths while both are known.

    A seed without enough right answers has NaN for both lengths.
    """
    entropy = binned(found["policy/entropy"])
    right, wrong = lengths(found, right=True), lengths(found, right=False)
    both = np.isfinite(right) & np.isfinite(wrong)
    known = np.where(both.any(1), both.sum(1), np.nan)
    return {
        "entropy first": entropy[:, 0],
        "entropy last": entropy[:, -1],
        "length of right": np.where(both, right, 0.0).sum(1) / known,
        "length of wrong": np.where(both, wrong, 0.0).sum(1) / known,
    }


# ---------------------------------------------------------------------------------- the figure


def draw_training(axes: "Axes", directory: Path, variants: Variants, name: str) -> None:
    """Draw a metric over the updates, a line for each seed."""
    for label, (stage, normaliser, colour) in present(directory, variants).items():
        found = curves(directory, stage, normaliser)[name]
        lines = axes.plot(points(found), binned(found).T, color=colour, linewidth=1.2)
        lines[0].set_label(label)
    _finish(axes)


def points(values: np.ndarray) -> np.ndarray:
    """Return the updates at which curves [seeds, updates] have points when they are binned."""
    count = binned(values).shape[1]
    return (np.arange(count) + 0.5) * values.shape[1] / count


def draw_lengths(axes: "Axes", directory: Path, right: bool) -> None:
    """Draw mean lengths over the updates, a band for the range of the seeds."""
    for label, (stage, normaliser, colour) in present(directory, NORMALISERS).items():
        found = curves(directory, stage, normaliser)
        at, values = points(found["completion/right"]), lengths(found, right)
        known = np.isfinite(values).all(0)
        at, values = at[known], values[:, known]
        axes.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.13, linewidth=0)
        axes.plot(at, values.mean(0), color=colour, label=label)
    _finish(axes)
    axes.set_ylabel("tokens")


def _finish(axes: "Axes") -> None:
    axes.set_xlabel("updates")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9)


def draw_passes(axes: "Axes", directory: Path) -> None:
    """Draw pass@k of each variant, side by side for each k, a mark for each seed."""
    variants = present(directory, {**TUNED, **METHODS, **EARLY})
    for place, (label, (stage, normaliser, colour)) in enumerate(variants.items()):
        style = {"color": colour, "fillstyle": "none" if label in EARLY else "full"}
        for at, k in enumerate(COUNTS):
            rates = scores(directory, stage, normaliser, f"pass@{k}")
            here = np.full(len(rates), at + 0.13 * (place - (len(variants) - 1) / 2))
            axes.plot(here, rates, "o", markersize=5, label=label if at == 0 else None, **style)
    axes.set_xticks(range(len(COUNTS)), [f"pass@{k}" for k in COUNTS])
    axes.set_xlim(right=len(COUNTS) + 0.4)  # room for the legend
    axes.set_ylim(0, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="lower right", handletextpad=0)


def draw_ascent(axes: "Axes") -> None:
    for label, (_, normaliser, colour) in NORMALISERS.items():
        found = ascent(str(normaliser))
        known = found["right"] < 0.98
        for name, style in (("right", "-"), ("wrong", "--")):
            lengths = found[f"{name}_length"][known]
            axes.plot(found["right"][known], lengths, style, color=colour, label=f"{label}, {name}")
    axes.set_xlabel("share of right answers")
    axes.set_ylabel("tokens")
    axes.legend(frameon=False, fontsize=8)


def draw(directory: Path, path: Path) -> None:
    figure, panels = figures.make_panels(6, 3, (4.4, 3.5))
    right, entropy, passes, wrong_length, right_length, exact = panels
    draw_training(right, directory, METHODS, "completion/right")
    right.set_ylim(0, 1.03)
    figures.dress(right, "Share of right answers", "in training; a line for each seed")
    draw_training(entropy, directory, METHODS, "policy/entropy")
    entropy.set_ylim(bottom=0)
    figures.dress(entropy, "Entropy", "nats per completion; a line for each seed")
    draw_passes(passes, directory)
    figures.dress(passes, "Before and after", "held-out prompts; a mark for each seed")
    draw_lengths(wrong_length, directory, right=False)
    figures.dress(
        wrong_length, "Length of wrong answers", "GRPO by normaliser; band: range of seeds"
    )
    draw_lengths(right_length, directory, right=True)
    figures.dress(
        right_length, "Length of right answers", "GRPO by normaliser; band: range of seeds"
    )
    draw_ascent(exact)
    figures.dress(exact, "Lengths in a table", "exact ascent; every state has its own logit")
    for axes in (wrong_length, right_length):
        axes.set_ylim(4.5, 7.8)
    exact.set_ylim(5.5, 6.8)
    figures.save(figure, path)


def main() -> None:
    arguments = results.arguments(__doc__)
    grpo = {f"GRPO, {name}": variant for name, variant in NORMALISERS.items()}
    methods = {name: METHODS[name] for name in ("RLOO", "PPO")}
    variants = present(arguments.directory, {**TUNED, **methods, **grpo, **EARLY})
    rows = [
        row
        for label, (stage, normaliser, _) in variants.items()
        for row in rows_of(arguments.directory, label, stage, normaliser)
    ]
    results.write(arguments.out / "addition.csv", rows)
    draw(arguments.directory, arguments.out / "addition.png")


if __name__ == "__main__":
    main()
