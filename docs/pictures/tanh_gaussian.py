"""The density of a squashed normal distribution, SAC's policy, and its entropy."""

import sys

import _controls
import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
from jax import random

from purejaxpg.kernels import distributions

ALT = (
    "The density of an action in (−1, 1) that is the hyperbolic tangent of a normal variable, with "
    "its median and its mode, and below it the entropy over the standard deviation. A wide normal "
    "puts most of its mass at both bounds, so the entropy first rises with the deviation and then "
    "falls: with mean 0, it is largest at a deviation of about 0.9."
)

MEANS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
DEVIATIONS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.2, 1.6, 2.2, 3.0)
SAMPLES = 4_000
HIGHEST = 8.0  # of the axis of densities


def actions() -> np.ndarray:
    """Return the places of the line, closer to each other near the bounds."""
    return np.sin(np.linspace(-0.5, 0.5, 101) * np.pi * 0.995)


@jax.jit
def measured(mean: jax.Array, deviation: jax.Array) -> tuple[jax.Array, ...]:
    """Return densities [..., N], medians, modes and entropies [...] of policies [...]."""
    policy = distributions.tanh_gaussian(mean[..., None], jnp.log(deviation)[..., None])
    at = jnp.asarray(actions()).reshape(-1, *[1] * (mean.ndim + 1))
    density = jnp.exp(jax.vmap(policy.log_prob)(jnp.broadcast_to(at, (at.size, *mean.shape, 1))))
    keys = random.split(random.key(0), SAMPLES)
    log_prob = jax.vmap(lambda key: policy.sample_and_log_prob(seed=key)[1])(keys)
    known = policy.median()[..., 0], policy.mode()[..., 0]
    return jnp.moveaxis(density, 0, -1), *known, -log_prob.mean(0)


def figure() -> go.Figure:
    """Return the figure: the density, and the entropy over the deviation."""
    grid = np.meshgrid(MEANS, DEVIATIONS, indexing="ij")
    density, median, mode, entropy = map(np.asarray, measured(*map(jnp.asarray, grid)))
    highest = np.minimum(1.1 * density.max(-1), HIGHEST)
    both = ("mean", "deviation")
    states = {
        "data.0.y": (both, density),
        "data.1.x": (both, np.stack([median, median], -1)),
        "data.2.x": (both, np.stack([mode, mode], -1)),
        "data.3.y": (("mean",), entropy),
        "data.4.x": (("deviation",), [[each] for each in DEVIATIONS]),
        "data.4.y": (both, entropy[..., None]),
        "layout.yaxis.range": (both, np.stack([0.0 * highest, highest], -1)),
        "says.0": (both, _controls.texts("Median {:.2f}, mode {:.2f}.", median, mode)),
        "says.1": (both, _controls.texts("Entropy {:.2f} nats;", entropy)),
        "says.2": ((), "an action drawn evenly has log 2 = 0.69, the most there is."),
    }
    controls = {
        "mean": _controls.slider("Mean μ before tanh", MEANS, 0.5),
        "deviation": _controls.slider("Deviation σ before tanh", DEVIATIONS, 0.5, plays=True),
    }
    return _controls.attach(drawn(), controls, states)


def drawn() -> go.Figure:
    """Return the panels without what the controls change."""
    blue = {"color": _controls.BLUE, "width": 3}
    grey, green = {"color": _controls.GREY, "width": 2}, {"color": _controls.GREEN, "width": 2}
    shared = {"mode": "lines", "y": [0, HIGHEST], "hoverinfo": "skip"}
    second = {"xaxis": "x2", "yaxis": "y2", "hovertemplate": "%{y:.3g}<extra></extra>"}
    hover = {"hovertemplate": "density %{y:.3g} at %{x:.2f}<extra></extra>"}
    dot = {"color": _controls.ORANGE, "size": 12}
    ticks = {"tickvals": [0.1, 0.2, 0.5, 1, 2, 3]}
    return _controls.figure(
        [
            go.Scatter(name="density", x=actions().round(5).tolist(), line=blue, **hover),
            go.Scatter(name="median", line={**grey, "dash": "dash"}, **shared),
            go.Scatter(name="mode", line={**green, "dash": "dot"}, **shared),
            go.Scatter(x=list(DEVIATIONS), line=grey, showlegend=False, **second),
            go.Scatter(mode="markers", marker=dot, showlegend=False, **second),
        ],
        520,
        xaxis={"range": [-1.02, 1.02], "title": "action tanh(x)"},
        yaxis={"domain": [0.56, 1], "title": "density"},
        xaxis2={"anchor": "y2", "type": "log", "title": "σ", **ticks},
        yaxis2={"domain": [0, 0.36], "title": "entropy, nats"},
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
