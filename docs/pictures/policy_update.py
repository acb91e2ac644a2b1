"""A softmax policy over four actions under successive policy-gradient updates."""

import functools
import sys
from collections.abc import Callable

import _controls
import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go
from jax import lax, random

from purejaxpg.kernels import distributions, losses

ALT = (
    "Bars of the probabilities of four actions under policy-gradient updates, and below them the "
    "expected reward over the updates. Probability moves to a rewarded action and away from a "
    "punished one; an action that is rare at first takes long to be found. Updates from sampled "
    "actions scatter, and a baseline makes them scatter less."
)

ACTIONS = ("a", "b", "c", "d")
START = np.array([0.4, 0.3, 0.2, 0.1])  # probabilities before the first update
REWARDS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)  # of one action; the others have a reward of 0
UPDATES, LEARNING_RATE, BATCH = 30, 0.6, 8
KINDS = ("exact expectation", "8 sampled actions", "8 sampled actions, mean reward as baseline")


def exact_loss(logits: jax.Array, reward: jax.Array, key: jax.Array) -> jax.Array:
    """Return minus the expected reward of the policy."""
    del key
    return -distributions.expectation(distributions.categorical(logits), reward)


def sampled_loss(logits: jax.Array, reward: jax.Array, key: jax.Array, baseline: bool) -> jax.Array:
    """Return REINFORCE's loss of a batch of actions that the policy draws."""
    policy = distributions.categorical(logits)
    action = policy.sample(seed=key, sample_shape=(BATCH,))
    known = distributions.expectation(policy, reward) if baseline else 0.0
    advantage = lax.stop_gradient(reward[action] - known)
    return losses.score_function(policy.log_prob(action), advantage).mean()


LOSSES = (
    exact_loss,
    lambda *arguments: sampled_loss(*arguments, baseline=False),
    lambda *arguments: sampled_loss(*arguments, baseline=True),
)


def train(loss: Callable[..., jax.Array], reward: jax.Array) -> jax.Array:
    """Return the logits before each update and after the last -> [UPDATES + 1, actions]."""

    def update(logits: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return logits - LEARNING_RATE * jax.grad(loss)(logits, reward, key), logits

    keys = random.split(random.key(1), UPDATES)
    last, before = lax.scan(update, jnp.log(START), keys)
    return jnp.concatenate([before, last[None]])


def rewards() -> np.ndarray:
    """Return the reward of each action, for each that is chosen and each size [A, R, A]."""
    return np.eye(len(ACTIONS))[:, None] * np.reshape(REWARDS, (-1, 1))


@jax.jit
def paths() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return probabilities [K, A, R, U, A], expected rewards and entropies [K, A, R, U]."""
    reward = jnp.asarray(rewards())
    trained = [jax.vmap(jax.vmap(functools.partial(train, loss)))(reward) for loss in LOSSES]
    logits = jnp.stack(trained)
    policy = distributions.categorical(logits)
    of_action = jnp.broadcast_to(reward[:, :, None], logits.shape)
    return jnp.exp(policy.logits), distributions.expectation(policy, of_action), policy.entropy()


def figure() -> go.Figure:
    """Return the figure: bars of the policy, and the expected reward over updates."""
    probability, expected, entropy = map(np.asarray, paths())
    run, every = ("kind", "action", "reward"), ("kind", "action", "reward", "update")
    chosen = np.moveaxis(np.diagonal(probability, axis1=1, axis2=4), -1, 1)
    names = [[("▶ " if a == b else "") + b for b in ACTIONS] for a in ACTIONS]
    states = {
        "data.0.x": (("action",), names),
        "data.0.y": (every, probability),
        "data.1.x": (("action",), names),
        "data.2.x": (("action",), names),
        "data.2.text": (every, _controls.texts("{:.2f}", probability)),
        "data.3.y": (run, expected),
        "data.4.x": (("update",), [[u] for u in range(UPDATES + 1)]),
        "data.4.y": (every, expected[..., None]),
        "layout.yaxis2.range": (("reward",), [axis(reward) for reward in REWARDS]),
        "says.0": (("action",), _controls.texts("The chosen action, {}, has probability", ACTIONS)),
        "says.1": (every, _controls.texts("{:.2f}.", chosen)),
        "says.2": (every, _controls.texts("Expected reward {:.2f}.", expected)),
        "says.3": (every, _controls.texts("Entropy {:.2f} nats.", entropy)),
    }
    controls = {
        "action": _controls.choice("Action with the reward", ACTIONS, 3),
        "reward": _controls.slider("Its reward", REWARDS, 1.0),
        "kind": _controls.choice("Gradient", KINDS),
        "update": _controls.slider("Updates", range(UPDATES + 1), 8, plays=True),
    }
    return _controls.attach(drawn(), controls, states)


def axis(reward: float) -> list[float]:
    """Return the range of the expected reward."""
    return [min(reward, 0.0) - 0.06 * abs(reward), max(reward, 0.0) + 0.06 * abs(reward)]


def drawn() -> go.Figure:
    """Return the panels without what the controls change."""
    grey = {"color": _controls.GREY, "width": 2}
    outline = {"color": "rgba(0,0,0,0)", "line": grey}
    dot = {"color": _controls.ORANGE, "size": 12}
    second = {"xaxis": "x2", "yaxis": "y2", "hovertemplate": "%{y:.3g}<extra></extra>"}
    hover = {"hovertemplate": "%{y:.3f}<extra></extra>"}
    above = {"mode": "text", "y": [1.08] * len(ACTIONS), "hoverinfo": "skip"}
    return _controls.figure(
        [
            go.Bar(name="π(a) now", marker={"color": _controls.BLUE}, **hover),
            go.Bar(name="before the first update", y=START.tolist(), marker=outline, **hover),
            go.Scatter(showlegend=False, **above),
            go.Scatter(x=list(range(UPDATES + 1)), line=grey, showlegend=False, **second),
            go.Scatter(mode="markers", marker=dot, showlegend=False, **second),
        ],
        520,
        barmode="overlay",
        bargap=0.45,
        xaxis={"anchor": "y", "showgrid": False},
        yaxis={"domain": [0.52, 1], "range": [0, 1.16], "title": "probability", "dtick": 0.25},
        xaxis2={"anchor": "y2", "title": "updates", "range": [-0.5, UPDATES + 0.5]},
        yaxis2={"domain": [0, 0.38], "title": "expected reward"},
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
