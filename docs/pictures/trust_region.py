"""Natural and plain gradient steps of a policy with two parameters, and the trust region."""

import sys

import _controls
import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
from jax import lax

from purejaxpg.kernels import distributions, trust_region

ALT = (
    "Contours of the expected reward over the mean and the deviation of a normal policy, with the "
    "paths of natural and of plain gradient steps, and around each of the two places the policies "
    "within a bounded divergence. Natural steps all have nearly the same divergence, and hardly "
    "notice how the policy is parameterised. Plain steps do: each choice gives another path."
)

START, BEST = (-2.0, 1.0), 1.0  # mean and deviation at first; the action with the largest reward
SIZES, STEPS = (0.003, 0.01, 0.03, 0.1), 14  # bounds on the divergence of a step, in nats
POINTS, CG_ITERATIONS = 28, 4  # of a contour; of conjugate gradient
MEANS, LOG_STDS = np.linspace(-3.0, 2.4, 28), np.linspace(-2.2, 1.0, 26)
# Nodes with which a mean over actions is exact for a reward of degree two.
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(3)

# How two parameters [2] become the mean and log σ of the policy, and what they are at the start.
PARAMETERS = {
    "μ and log σ": lambda x: (x[0], x[1]),
    "μ and σ": lambda x: (x[0], jnp.log(jnp.maximum(x[1], 0.05))),
    "10 μ and log σ": lambda x: (x[0] / 10.0, x[1]),
}
STARTS = ((START[0], np.log(START[1])), START, (10.0 * START[0], np.log(START[1])))


def policy(place: jax.Array) -> distributions.Any:
    """Return the policy at mean and log σ [2]."""
    return distributions.diag_gaussian(place[:1], place[1:])


def expected_reward(place: jax.Array) -> jax.Array:
    """Return the mean over actions of −(a − BEST)²."""
    action = place[0] + jnp.exp(place[1]) * jnp.asarray(NODES)
    return -jnp.square(action - BEST) @ jnp.asarray(WEIGHTS / WEIGHTS.sum())


def divergence(old: jax.Array, new: jax.Array) -> jax.Array:
    """Return KL(old ‖ new) of two places."""
    return policy(old).kl_divergence(policy(new))


def paths(name: str, first: tuple[float, float], max_kl: jax.Array) -> jax.Array:
    """Return the places of natural and of plain steps -> [2, STEPS + 1, 2].

    The step size of plain steps is such that the first one has the divergence of a natural step,
    as far as the quadratic model of the divergence goes.
    """
    to_place = lambda x: jnp.stack(PARAMETERS[name](x))  # noqa: E731
    gradient_at = jax.grad(lambda x: expected_reward(to_place(x)))
    start = jnp.asarray(first)

    def natural(x: jax.Array) -> jax.Array:
        product = trust_region.fisher_vector_product(lambda y: policy(to_place(y)), x)
        direction = trust_region.conjugate_gradient(product, gradient_at(x), CG_ITERATIONS)
        return trust_region.step_to_boundary(direction, product(direction), max_kl)

    slope = gradient_at(start)
    product = trust_region.fisher_vector_product(lambda y: policy(to_place(y)), start)
    of_first = trust_region.step_to_boundary(slope, product(slope), max_kl)
    rate = jnp.linalg.norm(of_first) / jnp.linalg.norm(slope)

    def follow(step: distributions.Any) -> jax.Array:
        return lax.scan(lambda x, _: (x + step(x), x), start, length=STEPS + 1)[1]

    both = jnp.stack([follow(natural), follow(lambda x: rate * gradient_at(x))])
    return jax.vmap(jax.vmap(to_place))(both)


def boundary(place: jax.Array, max_kl: jax.Array) -> jax.Array:
    """Return the places at which the divergence from a place is `max_kl` -> [POINTS, 2]."""

    def along(angle: jax.Array) -> jax.Array:
        unit = jnp.stack([jnp.cos(angle) * jnp.exp(place[1]), jnp.sin(angle)])

        def halve(_: int, ends: jax.Array) -> jax.Array:
            middle = ends.mean()
            inside = divergence(place, place + middle * unit) < max_kl
            return jnp.where(inside, jnp.stack([middle, ends[1]]), jnp.stack([ends[0], middle]))

        return place + lax.fori_loop(0, 30, halve, jnp.array([0.0, 4.0])).mean() * unit

    return jax.vmap(along)(jnp.linspace(0.0, 2.0 * jnp.pi, POINTS))


@jax.jit
def measured() -> dict[str, jax.Array]:
    """Return places [P, S, 2, STEPS + 1, 2], boundaries, rewards, divergences and the contours."""
    sizes = jnp.asarray(SIZES)
    by_size = [
        jax.vmap(lambda size, name=name, first=first: paths(name, first, size))(sizes)
        for name, first in zip(PARAMETERS, STARTS, strict=True)
    ]
    place = jnp.stack(by_size)
    flat = place.reshape(-1, 2)
    of_place = jnp.broadcast_to(sizes[:, None, None], place.shape[:-1]).ravel()
    kl = jax.vmap(divergence)(place[..., :-1, :].reshape(-1, 2), place[..., 1:, :].reshape(-1, 2))
    grid = jnp.stack(jnp.meshgrid(jnp.asarray(MEANS), jnp.asarray(LOG_STDS)), -1)
    return {
        "place": place,
        "boundary": jax.vmap(boundary)(flat, of_place).reshape(*place.shape[:-1], POINTS, 2),
        "reward": jax.vmap(expected_reward)(flat).reshape(place.shape[:-1]),
        "kl": kl.reshape(*place.shape[:3], STEPS),
        "contours": jax.vmap(jax.vmap(expected_reward))(grid),
    }


def figure() -> go.Figure:
    """Return the figure: paths over contours, and the divergence of each step."""
    found = jax.tree.map(np.asarray, measured())
    run, every = ("parameters", "max_kl"), ("parameters", "max_kl", "step")
    states: dict[str, _controls.State] = {}
    for method in range(2):
        path, around = found["place"][:, :, method], found["boundary"][:, :, method]
        kl, first = found["kl"][:, :, method], 4 * method + 1
        for axis, name in enumerate("xy"):
            states[f"data.{first}.{name}"] = (run, path[..., axis])
            states[f"data.{first + 1}.{name}"] = (every, path[..., axis, None])
            states[f"data.{first + 2}.{name}"] = (every, around[..., axis])
        states[f"data.{first + 3}.y"] = (run, kl)
        words = ("Natural: reward {:.2f}.", "Plain: reward {:.2f}.")[method]
        states[f"says.{method}"] = (every, _controls.texts(words, found["reward"][:, :, method]))
    step = np.maximum(np.arange(STEPS + 1), 1)
    states["data.9.x"] = (("step",), np.stack([step, step], -1))
    upto = found["kl"].max((2, 3))
    states["data.9.y"] = (run, np.stack([0.0 * upto, 1.1 * upto], -1))
    controls = {
        "parameters": _controls.choice("Parameters", list(PARAMETERS)),
        "max_kl": _controls.slider("Divergence of a step, in nats", SIZES, 0.03),
        "step": _controls.slider("Steps taken", range(STEPS + 1), 6, plays=True),
    }
    return _controls.attach(drawn(found["contours"]), controls, states)


def drawn(contours: np.ndarray) -> go.Figure:
    """Return the panels without what the controls change."""
    hover = {"hovertemplate": "μ = %{x:.2f}, log σ = %{y:.2f}, reward %{z:.2f}<extra></extra>"}
    lines = {"coloring": "lines", "start": -12, "end": -0.25, "size": 0.75}
    grey = [[0, _controls.GREY], [1, _controls.GREY]]
    shown = {"x": MEANS.round(3).tolist(), "y": LOG_STDS.round(3).tolist()}
    shown["z"] = contours.round(3).tolist()
    look = {"contours": lines, "colorscale": grey, "showscale": False, "line_width": 1}
    traces = [go.Contour(**look, **shown, **hover)]
    for name, colour, symbol in (
        ("natural", _controls.BLUE, "circle"),
        ("plain", _controls.ORANGE, "square"),
    ):
        shared = {"showlegend": False, "hoverinfo": "skip"}
        line = {"color": colour, "width": 2}
        mark = {"color": colour, "symbol": symbol, "size": 5}
        place = {"color": colour, "symbol": symbol, "size": 13}
        area = {"fill": "toself", "fillcolor": f"{colour}40"}
        kl = {"xaxis": "x2", "yaxis": "y2", "hovertemplate": "step %{x}: %{y:.3g} nats"}
        traces += [
            go.Scatter(name=name, mode="lines+markers", line=line, marker=mark, hoverinfo="skip"),
            go.Scatter(mode="markers", marker=place, **shared),
            go.Scatter(mode="lines", line={**line, "dash": "dot"}, **area, **shared),
            go.Scatter(
                name=name, x=list(range(1, STEPS + 1)), mode="lines+markers", line=line,
                marker=mark, showlegend=False, **kl,
            ),
        ]  # fmt: skip
    now = {"color": _controls.GREY, "width": 2, "dash": "dash"}
    second = {"xaxis": "x2", "yaxis": "y2", "showlegend": False, "hoverinfo": "skip"}
    traces.append(go.Scatter(mode="lines", line=now, **second))
    return _controls.figure(
        traces,
        620,
        xaxis={"range": [MEANS[0], MEANS[-1]], "title": "mean μ of the policy"},
        yaxis={"domain": [0.43, 1], "range": [LOG_STDS[0], LOG_STDS[-1]], "title": "log σ"},
        xaxis2={"anchor": "y2", "title": "step", "range": [0.5, STEPS + 0.5]},
        yaxis2={"domain": [0, 0.27], "title": "divergence", "rangemode": "tozero"},
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
