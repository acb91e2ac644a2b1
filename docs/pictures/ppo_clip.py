"""PPO's clipped objective over the probability ratio, and its gradient."""

import sys

import _controls
import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go

from purejaxpg.kernels import losses

ALT = (
    "PPO's objective for one action over the probability ratio, with and without clipping, and "
    "below it the slope. With a positive advantage the slope is zero only above 1 + ε, with a "
    "negative one only below 1 − ε; on the other side it stays, and brings the ratio back."
)

ADVANTAGES = (-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
EPSILONS = (0.05, 0.1, 0.2, 0.3, 0.4)
# None of them is an end of a clip range, where the objective has no slope.
RATIOS = (0.25, 0.5, 0.65, 0.75, 0.85, 0.92, 1.0, 1.08, 1.15, 1.25, 1.35, 1.5, 1.75, 2.0, 2.25)
WIDEST, JUMP = 2.5, 1e-4


def ratios(clip_eps: float) -> np.ndarray:
    """Return the ratios at which the lines are drawn: both sides of each end are among them."""
    ends = np.array([1.0 - clip_eps, 1.0 + clip_eps])
    return np.sort(np.concatenate([np.linspace(0.02, WIDEST, 32), ends - JUMP, ends + JUMP]))


def objective(log_ratio: jax.Array, advantage: jax.Array, clip_eps: jax.Array) -> jax.Array:
    """Return what PPO maximises: the kernel's loss, negated."""
    advantage = jnp.broadcast_to(advantage, log_ratio.shape)
    return -losses.ppo_clip(log_ratio, jnp.zeros_like(log_ratio), advantage, clip_eps)


@jax.jit
def lines(ratio: jax.Array, advantage: jax.Array, clip_eps: jax.Array) -> jax.Array:
    """Return objective and slope along log π, of arrays of one shape -> [2, ...]."""
    log_ratio = jnp.log(ratio)
    slope = jax.grad(lambda x: objective(x, advantage, clip_eps).sum())(log_ratio)
    return jnp.stack([objective(log_ratio, advantage, clip_eps), slope])


def grid(ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lines over ratios [E, R], clipped and not -> two arrays [2, A, E, R]."""
    shape = (len(ADVANTAGES), *ratio.shape)
    ratio = np.broadcast_to(ratio, shape)
    advantage = np.broadcast_to(np.reshape(ADVANTAGES, (-1, 1, 1)), shape)
    clip_eps = np.broadcast_to(np.reshape(EPSILONS, (-1, 1)), shape)
    free = np.full(shape, np.inf)
    return np.asarray(lines(ratio, advantage, clip_eps)), np.asarray(lines(ratio, advantage, free))


def reason(advantage: float, clip_eps: float, ratio: float) -> str:
    """Return why the slope at a point is what it is."""
    if abs(ratio - 1.0) < clip_eps:
        return "The ratio is inside the range, so nothing is clipped."
    if (advantage > 0.0) == (ratio > 1.0):
        return "The ratio has moved far enough in the direction that helps: this sample is silent."
    return "The ratio has moved in the wrong direction: the slope stays, and brings it back."


def traces() -> list[go.Scatter]:
    """Return the lines and points of both panels, without their data."""
    found = []
    for axis in ("y", "y2"):
        shared = {"yaxis": axis, "showlegend": axis == "y"}
        grey = {"color": _controls.GREY, "dash": "dash", "width": 2}
        found.append(go.Scatter(name="without clipping", line=grey, hoverinfo="skip", **shared))
        blue = {"color": _controls.BLUE, "width": 3}
        found.append(go.Scatter(name="clipped", line=blue, hoverinfo="skip", **shared))
        dot = {"color": _controls.ORANGE, "size": 12}
        found.append(
            go.Scatter(name="one sample", mode="markers", marker=dot, hoverinfo="skip", **shared)
        )
    return found


def figure() -> go.Figure:
    """Return the figure: two panels, and sliders for advantage, ε and the ratio of a sample."""
    over = np.array([ratios(clip_eps) for clip_eps in EPSILONS])
    clipped, free = grid(over)
    at, unclipped = grid(np.tile(RATIOS, (len(EPSILONS), 1)))
    reasons = [[[reason(a, e, r) for r in RATIOS] for e in EPSILONS] for a in ADVANTAGES]
    shown = at[0], unclipped[0], at[1]
    numbers = _controls.texts("Objective {:.3g} (unclipped {:.3g}), slope {:.3g}.", *shown)
    both, every = ("advantage", "clip_eps"), ("advantage", "clip_eps", "ratio")
    points = [[ratio] for ratio in RATIOS]
    states: dict[str, _controls.State] = {}
    for panel in range(2):
        for line, values in ((3 * panel, free), (3 * panel + 1, clipped)):
            states[f"data.{line}.x"] = (("clip_eps",), over)
            states[f"data.{line}.y"] = (both, values[panel])
        states[f"data.{3 * panel + 2}.x"] = (("ratio",), points)
        states[f"data.{3 * panel + 2}.y"] = (every, at[panel][..., None])
    states["layout.shapes.0.x0"] = (("clip_eps",), 1.0 - np.array(EPSILONS))
    states["layout.shapes.0.x1"] = (("clip_eps",), 1.0 + np.array(EPSILONS))
    states |= {"says.0": (every, numbers), "says.1": (every, reasons)}
    controls = {
        "advantage": _controls.slider("Advantage A", ADVANTAGES, 1.0),
        "clip_eps": _controls.slider("Clip range ε", EPSILONS, 0.2),
        "ratio": _controls.slider("Ratio of the sample", RATIOS, 1.5, plays=True),
    }
    return _controls.attach(drawn(), controls, states)


def drawn() -> go.Figure:
    """Return the panels without what the controls change."""
    band = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0}}
    return _controls.figure(
        traces(),
        500,
        xaxis={"range": [0, WIDEST], "title": "ratio r = π(a|s) / π_old(a|s)", "anchor": "y2"},
        yaxis={"domain": [0.54, 1], "range": [-5.2, 5.2], "title": "objective"},
        yaxis2={"domain": [0, 0.46], "range": [-5.2, 5.2], "title": "slope along log π"},
        shapes=[{**band, "x0": 0.8, "x1": 1.2, "fillcolor": _controls.GREY, "opacity": 0.18}],
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
