"""A sweep over the learning rate: curves, and the policies that training ends with.

    purejaxpg sweep experiments/learning_rates.toml
    python docs/pictures/learning_sweep.py --sweep results/learning_rates

writes the numbers that the picture is made of to learning_sweep.json, beside this file.
"""

import json
import pathlib
import sys
from typing import Any

import _controls
import numpy as np
import plotly.graph_objects as go

from purejaxpg import stats

ALT = (
    "Learning curves of PPO on the pendulum for seven learning rates, and below them the torque of "
    "the trained policy at every angle and velocity. The smallest rate has hardly begun to learn. "
    "Good ones end with a policy that pushes with the swing below and catches the pendulum at the "
    "top. The largest learns unsteadily, and ends with full torque nearly everywhere."
)

DATA = pathlib.Path(__file__).with_suffix(".json")
ANGLES, VELOCITIES = np.linspace(-180.0, 180.0, 25), np.linspace(-8.0, 8.0, 17)
TORQUE = 2.0  # the most that the environment applies


def stored(directory: pathlib.Path) -> dict[str, Any]:
    """Return what a finished sweep found, by learning rate and seed."""
    from purejaxpg.report import curves, playback
    from purejaxpg.sweep.store import Store

    with Store.read(directory) as store:
        runs = sorted(store.ledger.runs(), key=lambda run: (rate_of(run), run["seed"]))
        units = [unit["name"] for unit in store.ledger.units() if unit["done"]]
        arrays = {name: store.arrays(name, curves.READ) for name in units}
        known = curves.of_runs(store, store.ledger.legs(), arrays)
        trained = playback.load_all(store, runs, None, print)
    rates = sorted({rate_of(run) for run in runs})
    shape = len(rates), len(runs) // len(rates)
    of_runs = [known[run["run_id"]] for run in runs]
    returns = np.stack([curve.returns for curve in of_runs])
    torque = np.stack([policy_of(each) for each in trained])
    return {
        "learning_rate": rates,
        "steps": of_runs[0].steps.astype(int).tolist(),
        "returns": in_order(returns, shape, 1),
        "score": in_order(np.array([run["score"] for run in runs]), shape, 1),
        "torque": in_order(torque, shape, 2),
    }


def rate_of(run: dict[str, Any]) -> float:
    """Return the learning rate of a run."""
    return float(run["swept"]["learning_rate"])


def policy_of(trained: Any) -> np.ndarray:
    """Return the greedy torque of a policy [velocities, angles]; 0 degrees is upright."""
    import jax

    velocity, angle = np.meshgrid(VELOCITIES, np.radians(ANGLES), indexing="ij")
    obs = np.stack([np.cos(angle), np.sin(angle), velocity], -1).reshape(-1, 3)
    action = np.asarray(trained.policy(jax.random.key(0), obs, greedy=True))
    return np.clip(action, -TORQUE, TORQUE).reshape(velocity.shape)


def in_order(values: np.ndarray, shape: tuple[int, int], digits: int) -> list:
    """Return values of runs as lists by learning rate and seed; null where one is not finite."""
    found = np.where(np.isfinite(values), values.round(digits), np.nan).astype(object)
    found[np.not_equal(found, found).astype(bool)] = None
    return found.reshape(*shape, *values.shape[1:]).tolist()


def read() -> dict[str, Any]:
    """Return the stored numbers, as arrays."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    return {name: np.array(values, float) for name, values in found.items()}


def figure() -> go.Figure:
    """Return the figure: curves above, a map of torques below."""
    data = read()
    rates = data["learning_rate"].tolist()
    seeds = [str(seed) for seed in range(data["score"].shape[1])]
    middle = stats.iqm(data["returns"], axis=1)
    best = int(np.argmax(stats.iqm(data["score"], axis=1)))
    both, rate = ("learning_rate", "seed"), ("learning_rate",)
    states = {
        "data.1.y": (rate, data["returns"].min(1)),
        "data.2.y": (rate, data["returns"].max(1)),
        "data.3.y": (rate, middle),
        "data.4.y": (both, data["returns"]),
        "data.5.z": (both, data["torque"]),
        "says.0": (rate, _controls.texts("Final return of the four seeds, IQM: {:.0f}.",
                                         stats.iqm(data["score"], axis=1))),
        "says.1": (both, _controls.texts("This seed: {:.0f}.", data["score"])),
    }  # fmt: skip
    controls = {
        "learning_rate": _controls.slider("Learning rate", rates, rates[best], plays=True),
        "seed": _controls.choice("Seed", seeds),
    }
    return _controls.attach(drawn(data["steps"].tolist(), middle), controls, states)


def drawn(steps: list[float], middle: np.ndarray) -> go.Figure:
    """Return the panels without what the controls change."""
    grey = {"color": _controls.GREY, "width": 1}
    nothing, shared = {"width": 0}, {"x": steps, "mode": "lines", "hoverinfo": "skip"}
    others = {"x": [*steps, None] * len(middle), "mode": "lines", "hoverinfo": "skip"}
    others["y"] = [None if np.isnan(y) else y for line in middle for y in [*line.round(1), np.nan]]
    blue, orange = {"color": _controls.BLUE, "width": 3}, {"color": _controls.ORANGE, "width": 2}
    area = {"fill": "tonexty", "fillcolor": f"{_controls.BLUE}30", "showlegend": False}
    hover = {"x": steps, "mode": "lines", "hovertemplate": "%{y:.0f} after %{x} steps"}
    scale = [[0, _controls.BLUE], [0.5, "#f4f4f4"], [1, _controls.ORANGE]]
    bar = {"title": {"text": "torque"}, "len": 0.5, "y": 0.24, "thickness": 10, "xpad": 4}
    policy = {"x": ANGLES.tolist(), "y": VELOCITIES.tolist(), "zmin": -TORQUE, "zmax": TORQUE}
    torque = {"hovertemplate": "angle %{x}°, velocity %{y}: torque %{z:.2f}<extra></extra>"}
    return _controls.figure(
        [
            go.Scatter(name="other rates", line=grey, **others),
            go.Scatter(line=nothing, showlegend=False, **shared),
            go.Scatter(line=nothing, **area, **shared),
            go.Scatter(name="this rate, IQM and range", line=blue, **hover),
            go.Scatter(name="this seed", line={**orange, "dash": "dot"}, **hover),
            go.Heatmap(xaxis="x2", yaxis="y2", colorscale=scale, colorbar=bar, **policy, **torque),
        ],
        620,
        xaxis={"anchor": "y", "title": "environment steps", "tickformat": "~s"},
        yaxis={"domain": [0.6, 1], "title": "return of an episode"},
        xaxis2={"anchor": "y2", "title": "angle, 0° is upright", "dtick": 90},
        yaxis2={"domain": [0, 0.45], "title": "angular velocity"},
    )


def main() -> None:
    """Write the page, or the data of a sweep."""
    if sys.argv[1:2] == ["--sweep"] and len(sys.argv) == 3:
        found = stored(pathlib.Path(sys.argv[2]))
        DATA.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    else:
        _controls.main(sys.modules[__name__])


if __name__ == "__main__":
    main()
