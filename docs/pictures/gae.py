"""Bias and variance of a policy gradient over λ of its advantages, with a critic that errs."""

import itertools
import sys

import _controls
import jax
import jax.numpy as jnp
import numpy as np
import plotly.graph_objects as go

from purejaxpg.kernels import distributions, losses, returns

ALT = (
    "Squared bias, variance and their sum, over λ, for a policy gradient with generalised "
    "advantage estimates, in a walk whose trajectories are all listed. An exact critic biases "
    "nothing, and λ = 0 is best. The more the critic errs, and the larger the batch, the larger is "
    "the best λ. At λ = 1, no error of the critic biases the gradient."
)

# A walk of eight steps along a line, left or right. What a step pays depends on where it ends.
STEPS, START, PLACES, GAMMA = 8, 8, 17, 0.95
LOGIT = 0.4  # of "right"; that of "left" is 0
LAMBDAS = np.linspace(0.0, 1.0, 21).round(2)
ERRORS = np.linspace(0.0, 2.0, 9)
KINDS = ("different at each state", "the same at all states", "V times 1 − error")
BATCHES = np.array([1, 4, 16, 64, 256])


def reward_at(place: np.ndarray) -> jax.Array:
    """Return the reward of a step that ends at a place."""
    return jnp.asarray(np.sin(0.9 * (place - START)) + 0.25 * (place - START))


def policy(logit: jax.Array | float, shape: tuple[int, ...] = ()) -> distributions.Any:
    """Return the policy, which is the same at all states."""
    logits = jnp.stack([jnp.zeros(()), jnp.asarray(logit)])
    return distributions.categorical(jnp.broadcast_to(logits, (*shape, 2)))


def walks() -> tuple[np.ndarray, np.ndarray]:
    """Return all walks: actions [T, N], and places before, between and after them [T + 1, N]."""
    action = np.array(list(itertools.product((0, 1), repeat=STEPS))).T
    moves = np.concatenate([np.zeros((1, action.shape[1]), int), 2 * action - 1])
    return action, START + np.cumsum(moves, 0)


def true_values() -> tuple[jax.Array, jax.Array]:
    """Return V [T + 1, PLACES] and the Q of the first actions [2], by backward induction."""
    following = np.clip(np.arange(PLACES)[:, None] + np.array([-1, 1]), 0, PLACES - 1)
    reward = reward_at(following)
    value, q = [jnp.zeros(PLACES)], reward
    for t in reversed(range(STEPS)):
        terminated = jnp.full(reward.shape, t == STEPS - 1)
        q = losses.td_target(reward, value[-1][following], terminated, GAMMA)
        value.append(distributions.expectation(policy(LOGIT, (PLACES,)), q))
    return jnp.stack(value[::-1]), q[START]


def critics(value: jax.Array) -> jax.Array:
    """Return the values of critics [kinds, errors, T + 1, PLACES]."""
    noise = np.random.default_rng(0).normal(size=(STEPS + 1, PLACES))
    _, place = walks()
    spread = jnp.stack([value[t, place[t]].std() for t in range(1, STEPS)]).mean()
    shapes = jnp.stack([spread * noise, spread * jnp.ones_like(noise), -value])
    return value + ERRORS[:, None, None] * shapes[:, None]


def gradients(critic: jax.Array, gae_lambda: jax.Array) -> jax.Array:
    """Return the gradient of each walk [N] in the logit, for its first action.

    Args:
        critic: [T + 1, PLACES].
        gae_lambda: scalar λ.
    """
    action, place = walks()
    reward, value = reward_at(place[1:]), critic[np.arange(STEPS + 1)[:, None], place]
    ended = np.broadcast_to(np.arange(STEPS)[:, None] == STEPS - 1, reward.shape)
    advantage = returns.gae(reward, value[:-1], value[1:], ended, ended, GAMMA, gae_lambda)[0]

    def loss(logit: jax.Array, walk: jax.Array) -> jax.Array:
        log_prob = policy(logit).log_prob(jnp.asarray(action[0])[walk])
        return losses.score_function(log_prob, advantage[walk])

    return -jax.vmap(jax.grad(loss), in_axes=(None, 0))(LOGIT, jnp.arange(action.shape[1]))


@jax.jit
def measured() -> tuple[jax.Array, jax.Array]:
    """Return squared bias and variance of the gradient of one walk [kinds, errors, λ]."""
    action, _ = walks()
    value, q = true_values()
    truth = jax.grad(lambda logit: distributions.expectation(policy(logit), q))(LOGIT)
    weight = jnp.exp(policy(LOGIT).log_prob(jnp.asarray(action)).sum(0))
    over_lambda = jax.vmap(gradients, in_axes=(None, 0))
    all_critics = jax.vmap(jax.vmap(over_lambda, in_axes=(0, None)), in_axes=(0, None))
    found = all_critics(critics(value), jnp.asarray(LAMBDAS))
    mean = found @ weight
    return jnp.square(mean - truth), jnp.square(found - mean[..., None]) @ weight


def figure() -> go.Figure:
    """Return the figure: three lines over λ, the least of their sum marked."""
    bias, of_one = map(np.asarray, measured())
    variance = of_one[:, :, None] / BATCHES[:, None]
    bias = np.broadcast_to(bias[:, :, None], variance.shape)
    total = bias + variance
    lines = {"Squared bias {:.2g},": bias, "variance {:.2g},": variance, "sum {:.2g}.": total}
    best = total.argmin(-1)
    state, every = ("kind", "error", "batch"), ("kind", "error", "batch", "gae_lambda")
    states: dict[str, _controls.State] = {}
    for number, (form, values) in enumerate(lines.items()):
        states[f"data.{number}.y"] = (state, values)
        states[f"says.{number}"] = (every, _controls.texts(form, values))
    states |= {
        "data.3.x": (state, LAMBDAS[best][..., None]),
        "data.3.y": (state, np.take_along_axis(total, best[..., None], -1)),
        "data.4.x": (("gae_lambda",), np.repeat(LAMBDAS[:, None], 3, 1)),
        "data.4.y": (every, np.stack(list(lines.values()), -1)),
        "says.3": (state, _controls.texts("The sum is least at λ = {:.2f}.", LAMBDAS[best])),
    }
    controls = {
        "error": _controls.slider("Critic's error, in SD of V", ERRORS, 0.5, plays=True),
        "kind": _controls.choice("The error is", KINDS),
        "batch": _controls.slider("Trajectories in a batch", BATCHES, 16),
        "gae_lambda": _controls.slider("λ", LAMBDAS, 0.95),
    }
    return _controls.attach(drawn(), controls, states)


def drawn() -> go.Figure:
    """Return the lines without what the controls change."""
    hover = {"x": LAMBDAS.tolist(), "hovertemplate": "%{y:.3g} at λ = %{x}"}
    look = (
        ("squared bias", _controls.ORANGE, "dash"),
        ("variance", _controls.GREEN, "dot"),
        ("sum", _controls.BLUE, "solid"),
    )
    lines = [
        go.Scatter(
            name=name, mode="lines", line={"color": colour, "dash": dash, "width": 3}, **hover
        )
        for name, colour, dash in look
    ]
    star = {"symbol": "star", "size": 15, "color": _controls.BLUE}
    shared = {"mode": "markers", "hoverinfo": "skip"}
    dots = {"size": 10, "color": _controls.GREY}
    return _controls.figure(
        [
            *lines,
            go.Scatter(name="least sum", marker=star, **shared),
            go.Scatter(marker=dots, showlegend=False, **shared),
        ],
        440,
        xaxis={"title": "λ", "range": [-0.02, 1.02]},
        yaxis={"title": "error of the gradient, squared", "rangemode": "tozero"},
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
