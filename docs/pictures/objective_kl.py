"""Which estimators of the divergence have the right gradient: k1, k2 and k3, in reward and loss."""

import sys

import _controls
import jax
import numpy as np
import plotly.graph_objects as go

from purejaxpg.lab import divergences, estimators, laboratory

ALT = (
    "Bias and variance of the gradient of seven estimators of KL(π ‖ π_ref), for a policy at a "
    "chosen distance from its reference. Only k1 in the reward is right at every distance. In the "
    "loss, k1 has no gradient at all on average; k2, and k3 times the ratio, see the divergence of "
    "each token, but not that an early token decides which later ones are reached."
)

DISTANCES = (0.01, 0.1, 0.3, 0.6, 1.0, 1.5)
NAMES = [p.name for p in estimators.PENALTIES if p.over == estimators.SUM]


def rows() -> list[laboratory.Row]:
    """Return the exact rows of the laboratory, for sums over the tokens of a completion."""
    setting = laboratory.Setting(keys=0, distances=DISTANCES)
    with jax.enable_x64(True):
        lab = laboratory.Lab(setting, lambda _: None)
        found = divergences.gradient_rows(lab)
    return [row for row in found if row["over"] == estimators.SUM]


def measured(name: str, found: list[laboratory.Row]) -> np.ndarray:
    """Return one column of the rows -> [distances, estimators]."""
    values = {(row["distance"], row["estimator"]): row[name] for row in found}
    return np.array([[values[distance, name] for name in NAMES] for distance in DISTANCES])


def verdict(bias: np.ndarray) -> str:
    """Return which estimators have no bias."""
    right = [name for name, each in zip(NAMES, bias, strict=True) if each < 1e-6]
    return f"No bias: {', '.join(right)}."


def figure() -> go.Figure:
    """Return the figure: bars of bias and of variance, and a slider for the distance."""
    found = rows()
    bias, variance = measured("bias", found), measured("variance", found)
    shown = ("distance",)
    states = {
        "data.0.x": (shown, bias),
        "data.0.text": (shown, _controls.texts("{:.2g}", np.where(bias < 1e-6, 0.0, bias))),
        "data.1.x": (shown, variance),
        "data.1.text": (shown, _controls.texts("{:.3g}", variance)),
        "layout.xaxis.range": (shown, limits(bias)),
        "layout.xaxis2.range": (shown, limits(variance)),
        "says.0": (shown, [verdict(each) for each in bias]),
        "says.1": (shown, _controls.texts("k3 in loss: bias {:.2g} of the true gradient's length.",
                                          bias[:, NAMES.index("k3 in loss")])),
    }  # fmt: skip
    label = "Distance from the reference"
    controls = {"distance": _controls.slider(label, DISTANCES, 0.6, plays=True)}
    return _controls.attach(drawn(), controls, states)


def limits(values: np.ndarray) -> np.ndarray:
    """Return ranges from 0 that leave room for the number at the end of the longest bar."""
    longest = values.max(-1)
    return np.stack([0.0 * longest, 1.25 * longest], -1)


def drawn() -> go.Figure:
    """Return the bars without what the slider changes."""
    shared = {"y": NAMES, "orientation": "h", "showlegend": False, "textposition": "outside"}
    shared |= {"cliponaxis": False, "hovertemplate": "%{y}: %{x:.3g}<extra></extra>"}
    wide = {"margin": {"l": 126, "t": 8}}
    return _controls.figure(
        [
            go.Bar(marker_color=_controls.ORANGE, **shared),
            go.Bar(marker_color=_controls.GREEN, xaxis="x2", yaxis="y2", **shared),
        ],
        560,
        bargap=0.35,
        xaxis={"anchor": "y", "title": "relative bias"},
        yaxis={"domain": [0.6, 1], "autorange": "reversed"},
        xaxis2={"anchor": "y2", "title": "relative variance"},
        yaxis2={"domain": [0, 0.42], "autorange": "reversed"},
        **wide,
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
