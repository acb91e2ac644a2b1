"""Draw the figures of RESULTS.md: learning curves, performance profiles and sensitivity."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import returns
from returns import AGENTS, ENVS, HERE, Cell

from purejaxpg import stats
from purejaxpg.report import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = HERE / "figures"
COLOURS = dict(zip(AGENTS, figures.MORE_COLOURS, strict=False))
OTHER = "#888888"
THRESHOLDS = np.linspace(0.0, 1.05, 106)  # of a profile


def extent() -> dict[str, int] | None:
    """Return how many settings and seeds each sweep of sensitivity has; None if none was kept."""
    trials = [row for rows in trials_of_agents().values() for row in rows]
    if not trials:
        return None
    settings = {len(rows) // len(ENVS) for rows in trials_of_agents().values()}
    return {"settings": min(settings), "seeds": min(int(row["runs_done"]) for row in trials)}


def write(found: Sequence[Cell]) -> list[Path]:
    """Draw all figures, and return their files."""
    FIGURES.mkdir(exist_ok=True)
    drawn = {"returns_curves": curves(found, list(ENVS), "log")}
    if images(found):
        drawn["returns_minatar"] = curves(found, images(found), "linear")
    if len(of_all_envs(found)) > 1:
        drawn["returns_profile"] = profile(found)
    if trials_of_agents():
        drawn["returns_sensitivity"] = sensitivity()
    for name, figure in drawn.items():
        figures.save(figure, FIGURES / f"{name}.png")
    return [FIGURES / f"{name}.png" for name in drawn]


# ----------------------------------------------------------------------------------------- curves


def images(found: Sequence[Cell]) -> list[str]:
    """Return the environments of MinAtar that have cells."""
    return sorted({cell.env for cell in found if cell.env.endswith("MinAtar")})


def curves(found: Sequence[Cell], envs: Sequence[str], scale: str) -> "Figure":
    """Draw the learning curves, an environment a panel, and the legend in the last one.

    `scale` is that of the steps: "log" where budgets differ, else "linear".
    """
    figure, panels = figures.make_panels(len(envs) + 1, 3, (5.0, 3.6))
    for axes, env in zip(panels, envs, strict=False):
        own = [cell for cell in found if cell.env == env]
        for cell in own:
            draw(axes, cell)
        figures.dress(axes, env)
        axes.set_xscale(scale)
        axes.set_xlabel("environment steps")
    panels[-1].axis("off")
    for agent, name in {cell.agent: cell.name for cell in found if cell.env in envs}.items():
        panels[-1].plot([], [], color=COLOURS.get(agent, OTHER), label=name)
    panels[-1].legend(loc="center", frameon=False, fontsize=13)
    return figure


def draw(axes: "Axes", cell: Cell) -> None:
    """Draw one learning curve with its interval."""
    points = returns.read(HERE / "curves" / f"{cell.study}.csv")
    steps, middle, low, high = (
        np.array([float(point[name]) for point in points]) for name in returns.POINT
    )
    axes.plot(steps, middle, color=COLOURS.get(cell.agent, OTHER), linewidth=1.6)
    axes.fill_between(
        steps, low, high, color=COLOURS.get(cell.agent, OTHER), alpha=0.15, linewidth=0
    )


# ---------------------------------------------------------------------------------------- profile


def of_all_envs(found: Sequence[Cell]) -> dict[str, dict[str, Cell]]:
    """Return the cells by environment, of each agent that has all environments."""
    agents = dict.fromkeys(cell.agent for cell in found)
    by_agent = {a: {c.env: c for c in found if c.agent == a and c.env in ENVS} for a in agents}
    return {agent: own for agent, own in by_agent.items() if len(own) == len(ENVS)}


def profile(found: Sequence[Cell]) -> "Figure":
    """Draw which share of an agent's runs is above each normalised score."""
    complete, worst = of_all_envs(found), returns.random_returns()
    best = {
        env: max(float(stats.iqm(cell.scores)) for cell in found if cell.env == env) for env in ENVS
    }
    figure, (axes,) = figures.make_panels(1, 1, (7.0, 4.2))
    for agent, own in complete.items():
        scaled = [(own[env].scores - worst[env]) / (best[env] - worst[env]) for env in ENVS]
        colour, name = COLOURS.get(agent, OTHER), own[min(own)].name
        share, low, high = stats.performance_profile(scaled, THRESHOLDS)
        axes.plot(THRESHOLDS, share, color=colour, label=name)
        axes.fill_between(THRESHOLDS, low, high, color=colour, alpha=0.15, linewidth=0)
    figures.dress(axes, "Performance profiles")
    axes.set(xlabel="normalised score", ylabel="share of runs above it", ylim=(0, 1.02))
    axes.legend(frameon=False)
    return figure


# ------------------------------------------------------------------------------------ sensitivity


@cache
def trials_of_agents() -> dict[str, list[dict[str, str]]]:
    """Return the settings that the sweeps of sensitivity tried, by agent."""
    paths = {agent: HERE / "sensitivity" / f"{agent}.csv" for agent in AGENTS}
    return {agent: returns.read(path) for agent, path in paths.items() if path.is_file()}


def by_setting(rows: Sequence[Mapping[str, str]], env: str) -> list[float]:
    """Return the scores of all settings in an environment, in an order that environments share."""
    swept = returns.swept_fields(rows)
    own = [row for row in rows if row["env"] == env]
    return [float(r["final_iqm"]) for r in sorted(own, key=lambda r: [r[name] for name in swept])]


def normalised() -> Iterator[tuple[str, np.ndarray]]:
    """Yield agents and the normalised scores of their settings [envs, settings]."""
    trials = trials_of_agents()
    raw = {a: np.array([by_setting(rows, env) for env in ENVS]) for a, rows in trials.items()}
    pool = np.concatenate(list(raw.values()), axis=1)
    low, high = np.quantile(pool, [0.05, 0.95], axis=1)
    yield from ((a, (scores.T - low).T / (high - low)[:, None]) for a, scores in raw.items())


def sensitivity() -> "Figure":
    """Draw the score of each agent tuned for each environment, and with one setting for all."""
    found = {agent: stats.sensitivity(scores) for agent, scores in normalised()}
    figure, (axes,) = figures.make_panels(1, 1, (7.0, 1.6 + 0.45 * len(found)))
    places = np.arange(len(found))
    tuned = np.array([each.tuned for each in found.values()])
    cross = np.array([each.cross for each in found.values()])
    axes.hlines(places, cross, tuned, color="#c9c9c9", linewidth=2)
    axes.plot(tuned, places, "o", color=figures.COLOURS[0], label="tuned for each environment")
    axes.plot(cross, places, "o", color=figures.COLOURS[1], label="one setting for all")
    axes.set_yticks(places, [AGENTS[a] + f"  {each.value:.2f}" for a, each in found.items()])
    axes.invert_yaxis()
    figures.dress(axes, "Hyperparameter sensitivity")
    axes.set_xlabel("normalised score")
    axes.legend(frameon=False)
    return figure
