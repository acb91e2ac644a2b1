"""The advantage of actions: their values above and below the value of the state."""

import sys

import _controls
import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
from jax import lax

from purejaxpg.kernels import distributions, losses

ALT = (
    "Bars of the values Q(s, a) of three actions, drawn from the value V(s) of the state: what "
    "stands above is better than the policy, what hangs below is worse. Weighted with the "
    "probabilities of the policy, in the lower panel, the advantages of a state always add up to "
    "zero."
)

# A corridor: a cliff at its left end, a goal at its right end. Each step costs a little.
STATES, ACTIONS, MOVES = 5, ("left", "stay", "right"), (-1, 0, 1)
CLIFF, GOAL, STEP, GAMMA = -1.0, 1.0, -0.05, 0.95
GREEDINESS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0)
SWEEPS = 500  # of policy evaluation; γ to this power is 7e-12


def corridor() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return next states, rewards and ends, each [S, A]; the next state of an end is any."""
    place = np.arange(STATES)[:, None] + np.array(MOVES)
    terminated = (place < 0) | (place >= STATES)
    reward = np.where(place < 0, CLIFF, np.where(place >= STATES, GOAL, STEP))
    return np.clip(place, 0, STATES - 1), reward, terminated


def action_values(logits: jax.Array) -> jax.Array:
    """Return Q of a policy [S, A], by repeated one-step targets."""
    place, reward, terminated = corridor()
    policy = distributions.categorical(logits)

    def evaluate(_: int, q: jax.Array) -> jax.Array:
        value = distributions.expectation(policy, q)
        return losses.td_target(jnp.asarray(reward), value[place], terminated, GAMMA)

    return lax.fori_loop(0, SWEEPS, evaluate, jnp.zeros(reward.shape))


@jax.jit
def measured() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return probabilities and action values [K, S, A], and values [K, S], of all policies.

    Each policy is a softmax over the action values of the even policy, times its greediness.
    """
    even = action_values(jnp.zeros((STATES, len(ACTIONS))))
    logits = jnp.reshape(jnp.asarray(GREEDINESS), (-1, 1, 1)) * even
    q = jax.vmap(action_values)(logits)
    policy = distributions.categorical(logits)
    return jnp.exp(policy.logits), q, distributions.expectation(policy, q)


def figure() -> go.Figure:
    """Return the figure: values above, weighted advantages below."""
    probability, q, value = map(np.asarray, measured())
    advantage = q - value[..., None]
    weighted = probability * advantage
    both = ("greediness", "state")
    better, worse = advantage >= 0.0, advantage < 0.0
    names = _controls.texts("{}<br>π = {:.2f}", np.broadcast_to(ACTIONS, q.shape), probability)
    states = {}
    for bar, shown in ((0, better), (1, worse)):
        states[f"data.{bar}.base"] = (both, np.repeat(value[..., None], len(ACTIONS), -1))
        states[f"data.{bar}.y"] = (both, np.where(shown, advantage, np.nan))
        states[f"data.{bar}.customdata"] = (both, q)
        states[f"data.{3 + bar}.y"] = (both, np.where(shown, weighted, np.nan))
    listed = [np.moveaxis(each, -1, 0) for each in (advantage, weighted)]
    states |= {
        "data.2.y": (both, np.stack([value, value], -1)),
        "layout.xaxis.ticktext": (both, names),
        "layout.yaxis.range": (("state",), around(q)),
        "layout.yaxis2.range": (both, limits(weighted)),
        "says.0": (both, _controls.texts("V(s) = {:.2f}.", value)),
        "says.1": (both, _controls.texts("Advantages: {:.2f}, {:.2f} and {:.2f}.", *listed[0])),
        "says.2": (both, _controls.texts("Times π: {:.3f}, {:.3f} and {:.3f},", *listed[1])),
        "says.3": ((), "which add up to 0."),
    }
    controls = {
        "state": _controls.Control("State", [place(s) for s in range(STATES)], 2),
        "greediness": _controls.slider("Greediness of the policy", GREEDINESS, 1.0, plays=True),
    }
    return _controls.attach(drawn(), controls, states)


def place(state: int) -> str:
    """Return the name of a state."""
    if state == 0:
        return "beside the cliff"
    if state == STATES - 1:
        return "beside the goal"
    return f"{state + 1} of {STATES}"


def around(q: np.ndarray) -> np.ndarray:
    """Return a range for each state, in which its action values [K, S, A] lie."""
    low, high = q.min((0, 2)), q.max((0, 2))
    return np.stack([low, high], -1) + 0.08 * (high - low)[:, None] * np.array([-1.0, 1.0])


def limits(weighted: np.ndarray) -> np.ndarray:
    """Return ranges around weighted advantages [..., A]; those of nothing are not empty."""
    widest = np.maximum(1.15 * np.abs(weighted).max(-1), 1e-3)
    return np.stack([-widest, widest], -1)


def drawn() -> go.Figure:
    """Return the panels without what the controls change."""
    at = list(range(len(ACTIONS)))
    line = {"color": _controls.GREY, "width": 3, "dash": "dash"}
    value = {"x": [-0.6, len(ACTIONS) - 0.4], "mode": "lines", "hoverinfo": "skip"}
    q = {"x": at, "hovertemplate": "Q = %{customdata:.3f}, A = %{y:.3f}<extra></extra>"}
    weighted = {"x": at, "hovertemplate": "π A = %{y:.4f}<extra></extra>", "yaxis": "y2"}
    blue, orange = {"color": _controls.BLUE}, {"color": _controls.ORANGE}
    return _controls.figure(
        [
            go.Bar(name="Q(s, a) above V(s)", marker=blue, **q),
            go.Bar(name="below it", marker=orange, **q),
            go.Scatter(name="V(s)", line=line, **value),
            go.Bar(marker=blue, showlegend=False, **weighted),
            go.Bar(marker=orange, showlegend=False, **weighted),
        ],
        520,
        bargap=0.5,
        barmode="overlay",
        margin={"b": 52},
        xaxis={
            **{"anchor": "y2", "tickvals": at, "range": [-0.6, len(ACTIONS) - 0.4]},
            "showgrid": False,
        },
        yaxis={"domain": [0.46, 1], "title": "value"},
        yaxis2={"domain": [0, 0.36], "title": "π(a|s) A(s, a)", "nticks": 5},
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
