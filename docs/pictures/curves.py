"""Learning curves of an agent, from the sweeps that are kept in experiments/curves."""

import csv
import functools
import pathlib
import sys

import _controls
import numpy as np
import plotly.graph_objects as go

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / "experiments"
COLUMNS = ("env_steps", "iqm", "ci95_low", "ci95_high")
POINTS = 40  # of a line, evenly over the kept ones, so that the controls have as many positions
# As the pages call them.
NAMES = {
    "reinforce": "REINFORCE", "a2c": "A2C", "npg": "NPG", "trpo": "TRPO", "ppo": "PPO",
    "ppo_rnn": "PPO with a GRU", "ddpg": "DDPG", "sac": "SAC",
}  # fmt: skip
# Agents whose curves say most beside those of another one on the same task and steps.
BESIDE = {"ppo_rnn": "ppo"}


def table(path: pathlib.Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@functools.cache
def curves(agent: str) -> dict[str, np.ndarray]:
    """Return the curves of an agent's table of scores [POINTS, 4], by environment."""
    found, folder = {}, EXPERIMENTS / "curves"
    for study in table(folder / f"{agent}_scores.csv"):
        points = table(folder / f"{study['Sweep']}.csv")
        rows = [[float(point[name]) for name in COLUMNS] for point in points]
        at = np.linspace(0, len(rows) - 1, POINTS).round().astype(int)
        found[study["Environment"]] = np.array(rows)[at]
    return found


def sentence(env: str, point: np.ndarray) -> str:
    """Return what a point of a curve says."""
    steps, middle, low, high = point
    if np.isnan(middle):
        return f"{env}, {steps:,.0f} steps: no episode has ended yet."
    text = f"{env}, {steps:,.0f} steps: return {middle:.4g}, 95% interval [{low:.4g}, {high:.4g}]."
    return _controls.written(text)


def band(curve: np.ndarray) -> np.ndarray:
    """Return the outline of a curve's interval -> x and y [2, 2 * POINTS]."""
    steps, _, low, high = curve.T
    return np.stack([np.append(steps, steps[::-1]), np.append(low, high[::-1])])


def shade(colour: str) -> go.Scatter:
    """Return the trace of an interval, without its data."""
    style = {"fill": "toself", "fillcolor": colour, "line": {"width": 0}, "mode": "lines"}
    return go.Scatter(**style, opacity=0.25, showlegend=False, hoverinfo="skip")


def lines_of(
    name: str, colour: str, line: np.ndarray, at: int
) -> tuple[list[go.Scatter], dict[str, _controls.State]]:
    """Return the traces of an agent, the first of which is `data.at`, and what they show."""
    outline = np.array([band(curve) for curve in line])
    values = {
        f"data.{at}.x": outline[:, 0], f"data.{at}.y": outline[:, 1],
        f"data.{at + 1}.x": line[..., 0], f"data.{at + 1}.y": line[..., 1],
    }  # fmt: skip
    traces = [shade(colour), go.Scatter(name=name, line={"color": colour, "width": 3})]
    return traces, {path: (("env",), value) for path, value in values.items()}


def figure(agent: str) -> go.Figure:
    """Return the figure: return over steps, an environment at a time, and a point to read off.

    Raises:
        ValueError: no sweep of this agent is kept.
    """
    if not curves(agent):
        raise ValueError(f"no sweep of {agent!r} is kept; there are those of {', '.join(NAMES)}")
    envs = list(curves(agent))
    other = BESIDE.get(agent, agent)
    agents = [agent, *({other} - {agent})] if all(env in curves(other) for env in envs) else [agent]
    kept = [curves(name) for name in agents]
    traces: list[go.Scatter] = []
    states: dict[str, _controls.State] = {}
    for name, each, colour in zip(agents, kept, _controls.COLOURS, strict=False):
        line = np.array([each[env] for env in envs])
        more, shown = lines_of(NAMES[name], colour, line, len(traces))
        traces, states = traces + more, states | shown
    mark = {"color": _controls.GREY, "size": 12}
    own, point = np.array([kept[0][env] for env in envs]), f"data.{len(traces)}"
    traces.append(go.Scatter(mode="markers", marker=mark, showlegend=False, hoverinfo="skip"))
    both = ("env", "point")
    states |= {f"{point}.x": (both, own[..., :1]), f"{point}.y": (both, own[..., 1:2])}
    says = [[sentence(e, p) for p in line] for e, line in zip(envs, own, strict=True)]
    return attached(drawn(traces, len(agents) > 1), envs, states | {"says.0": (both, says)})


def drawn(traces: list[go.Scatter], legend: bool) -> go.Figure:
    """Return the figure without what the controls change."""
    titles = {"xaxis": {"title": "environment steps"}, "yaxis": {"title": "return"}}
    return _controls.figure(traces, 360, showlegend=legend, **titles)


def attached(figure: go.Figure, envs: list[str], states: dict[str, _controls.State]) -> go.Figure:
    """Give the figure its controls: the environment, if there are several, and a point."""
    shares = [f"{100 * i / (POINTS - 1):.0f}% of the run" for i in range(POINTS)]
    point = _controls.Control("Read off at", shares, POINTS - 1)
    if len(envs) > 1:
        env = _controls.choice("Environment", envs)
        return _controls.attach(figure, {"env": env, "point": point}, states)
    alone = {path: (names[1:], values[0]) for path, (names, values) in states.items()}
    return _controls.attach(figure, {"point": point}, alone)


def alt(agent: str) -> str:
    """Return the sentence under the curves of an agent."""
    return (
        f"Learning curves of {NAMES[agent]}: the interquartile mean over the seeds of the return "
        "of training episodes, over environment steps, with its 95% interval as a band."
    )


if __name__ == "__main__":
    _controls.main(sys.modules[__name__])
