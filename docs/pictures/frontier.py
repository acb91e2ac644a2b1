"""Reward over divergence of DPO, PPO and GRPO for each β, beside the best that is possible."""

import csv
import sys

import _controls
import numpy as np
import plotly.graph_objects as go

ALT = (
    "Gold reward over the divergence from the reference model for policies of PPO, RLOO, GRPO and "
    "DPO with four values of β, and the line of the best possible reward. A smaller β buys more "
    "reward for more divergence. The methods that see the gold reward stay close to the line; DPO "
    "and a learned reward fall behind it as the divergence grows."
)

# The study docs/studies.md describes; `experiments/rlhf/frontier.py` writes both tables.
RESULTS = _controls.FOLDER.parents[1] / "experiments" / "rlhf" / "results"
METHODS = {
    "ppo-gold": ("PPO, gold reward", "circle", _controls.BLUE),
    "ppo-learned": ("PPO, learned reward", "circle-open", _controls.BLUE),
    "rloo": ("RLOO, gold reward", "diamond", _controls.PURPLE),
    "grpo": ("GRPO, gold reward", "square", _controls.GREEN),
    "dpo": ("DPO", "x", _controls.ORANGE),
}
BETAS = (0.05, 0.2, 0.5, 1.0)
ALL = "all methods"


def rows(name: str) -> list[dict[str, str]]:
    """Return the rows of a stored table."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def points() -> np.ndarray:
    """Return mean, lowest and highest divergence and reward of each run [method, β, 6]."""
    found = {(row["stage"], float(row["value"])): row for row in rows("frontier")}
    names = [f"{name}{end}" for name in ("kl", "return") for end in ("", " low", " high")]
    return np.array(
        [[[float(found[m, beta][name]) for name in names] for beta in BETAS] for m in METHODS]
    )


def closed_form() -> tuple[np.ndarray, np.ndarray]:
    """Return divergences and the best possible rewards."""
    table = np.array([[float(x) for x in row.values()] for row in rows("frontier_best")])
    return table[:, 0], table[:, 1]


def optima() -> list[int]:
    """Return the place on the line of the best policy for each β: where r − β KL is largest."""
    kl, reward = closed_form()
    return [int(np.argmax(reward - beta * kl)) for beta in BETAS]


def figure() -> go.Figure:
    """Return the figure: a line for each method, and the points of one β marked."""
    found, (kl, reward) = points(), closed_form()
    chosen = [ALL, *(name for name, _, _ in METHODS.values())]
    both, states = ("beta", "method"), {}
    for m, (name, _, _) in enumerate(METHODS.values()):
        seen = [choice in (ALL, name) for choice in chosen]
        mean_kl, mean_reward = found[m, :, 0], found[m, :, 3]
        states[f"data.{2 * m + 1}.x"] = (("method",), [mean_kl.tolist() if s else [] for s in seen])
        states[f"data.{2 * m + 1}.y"] = (
            ("method",),
            [mean_reward.tolist() if s else [] for s in seen],
        )
        for axis, values in (("x", mean_kl), ("y", mean_reward)):
            marked = [[[float(value)] if s else [] for s in seen] for value in values]
            states[f"data.{2 * m + 2}.{axis}"] = (both, marked)
    star = optima()
    last = 2 * len(METHODS) + 1
    states[f"data.{last}.x"] = (("beta",), kl[star][:, None])
    states[f"data.{last}.y"] = (("beta",), reward[star][:, None])
    best = zip(BETAS, reward[star], kl[star], strict=True)
    states["says.0"] = (
        ("beta",),
        [f"β = {b:g}: the best policy has {r:.2f} at {k:.1f} nats." for b, r, k in best],
    )
    states["says.1"] = (both, [[sentence(found, b, c) for c in chosen] for b in range(len(BETAS))])
    controls = {
        "beta": _controls.slider("β, the price of a nat", BETAS, 0.5, plays=True),
        "method": _controls.choice("Method", chosen),
    }
    return _controls.attach(drawn(kl, reward), controls, states)


def sentence(found: np.ndarray, beta: int, chosen: str) -> str:
    """Return the numbers of one method, or of all."""
    parts = [
        f"{name} {found[m, beta, 3]:.2f} at {found[m, beta, 0]:.1f}"
        for m, (name, _, _) in enumerate(METHODS.values())
        if chosen in (ALL, name)
    ]
    return _controls.written("; ".join(parts)) + "."


def drawn(kl: np.ndarray, reward: np.ndarray) -> go.Figure:
    """Return the lines without what the controls change."""
    grey = {"color": _controls.GREY, "width": 3}
    hover = {"hovertemplate": "reward %{y:.2f} at %{x:.2f} nats"}
    traces = [go.Scatter(name="best possible", x=kl, y=reward, mode="lines", line=grey, **hover)]
    for name, symbol, colour in METHODS.values():
        line = {"color": colour, "width": 1.5, "dash": "dot"}
        small = {"color": colour, "symbol": symbol, "size": 7}
        large = {"color": colour, "symbol": symbol, "size": 15}
        traces += [
            go.Scatter(name=name, mode="lines+markers", line=line, marker=small, **hover),
            go.Scatter(name=name, mode="markers", marker=large, showlegend=False, **hover),
        ]
    star = {"color": _controls.GREY, "symbol": "star", "size": 17}
    traces.append(go.Scatter(name="best for this β", mode="markers", marker=star, **hover))
    return _controls.figure(
        traces,
        520,
        xaxis={"title": "KL from the reference, in nats", "range": [0, 33]},
        yaxis={"title": "gold reward", "range": [0, 7]},
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
