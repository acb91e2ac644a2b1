"""Write RESULTS.md, the tables of scores that the documentation shows, and the figures."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import returns
import returns_figures
from returns import AGENTS, ENVS, HERE, Cell, anchors, short

from purejaxpg import stats

PAGE = HERE / "RESULTS.md"
WITH_GRID = (HERE.parent / "README.md", HERE.parent / "docs" / "benchmarks.md")
PRESETS = HERE.parent / "purejaxpg" / "presets.toml"
PRESETS_HEAD = (
    "# The tuned settings of `purejaxpg train`: [AGENT.ENV] is the table [config] of that cell of",
    "# experiments/RESULTS.md. Written by experiments/returns.py.",
)
BEGIN, END = "<!-- returns: written by experiments/returns.py -->", "<!-- end of returns -->"
HEADER = (
    "agent", "IQM [95% interval]", "greedy", "steps", "best published", "", "tuning", "failed",
    "worst", "seconds",
)  # fmt: skip
FEWEST = 8  # seeds of a cell on an agent's page; those of MinAtar are in RESULTS.md alone
PLAIN = "_misc"  # ends the names of studies of default settings on many environments
TEMPLATE = HERE / "RESULTS.md.j2"
WIDTH = 120  # of a line of prose


def anchor_of(agent: str, env: str) -> dict[str, Any]:
    """Return the best published figure of an agent on an environment; empty if there is none."""
    found = anchors().get(env, {}).get(agent)
    return {**anchors()["sources"][found["source"]], **found} if found else {}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def is_met(cell: Cell) -> bool:
    """Return whether a cell is at or above the figure for it, at no more steps."""
    anchor = anchor_of(cell.agent, cell.env)
    return float(stats.iqm(cell.scores)) >= anchor["value"] and cell.steps <= anchor["steps"]


def verdict(cell: Cell) -> str:
    """Return how a cell compares with the published figure."""
    anchor = anchor_of(cell.agent, cell.env)
    if not anchor or is_met(cell):
        return "met" if anchor else ""
    gap = anchor["value"] - float(stats.iqm(cell.scores))
    if gap <= 0:
        return "met, with more steps"
    notes = []
    if cell.interval[1] >= anchor["value"]:
        notes.append("within the interval")
    if anchor["greedy"] and float(stats.iqm(cell.greedy)) >= anchor["value"]:
        notes.append("greedy met")
    return ", ".join([f"{short(gap)} short", *notes])


def thousands(steps: int) -> str:
    """Return a number of environment steps in short."""
    return f"{steps / 1e6:.3g}M" if steps >= 999_500 else f"{steps / 1e3:.0f}k"


def published(agent: str, env: str) -> str:
    """Return the published figure as a text."""
    anchor = anchor_of(agent, env)
    if not anchor:
        return "-"
    return f"{short(anchor['value'])} at {thousands(anchor['steps'])}, {anchor['source']}"


def row(cell: Cell) -> list[str]:
    """Return the line of a cell."""
    below = anchors().get(cell.env, {}).get("fails_below", -math.inf)
    failed = cell.diverged + sum(
        score < below and line["status"] != "diverged"
        for score, line in zip(cell.scores, cell.rows, strict=True)
    )
    return [
        cell.name,
        cell.score,
        short(float(stats.iqm(cell.greedy))),
        thousands(cell.steps),
        published(cell.agent, cell.env),
        verdict(cell),
        short(cell.tuned) if cell.tuned is not None else "-",
        f"{failed}/{len(cell.rows)}",
        short(float(cell.scores.min())),
        f"{cell.seconds:.0f}",
    ]


def grid(found: Sequence[Cell]) -> str:
    """Return the table of all agents and the classic environments."""
    of = {(cell.agent, cell.env): cell for cell in found}
    rows = []
    for agent, name in {cell.agent: cell.name for cell in found}.items():
        own = [of.get((agent, env)) for env in ENVS]
        if any(own):
            rows.append([name, *(brief(cell) for cell in own)])
    return table(["", *(env.partition("-")[0] for env in ENVS)], rows)


def brief(cell: Cell | None) -> str:
    """Return a cell as one number and its steps."""
    if cell is None:
        return "-"
    mark = ""
    if anchor_of(cell.agent, cell.env).get("runs"):
        mark = "**" if is_met(cell) else "*"
    return f"{mark}{middle(cell)}{mark} ({thousands(cell.steps)})"


def details(env: str, found: Sequence[Cell]) -> dict[str, Any]:
    """Return what the page says about an environment."""
    own = [row(cell) for cell in found if cell.env == env]
    known = anchors()[env]
    said = [f"*{AGENTS[agent]}*: {text}" for agent, text in known.get("notes", {}).items()]
    now = {"name": env, "table": table(HEADER, own), "random": random_return(env), "notes": said}
    return {**known, **now}


def random_return(env: str) -> str:
    """Return what random actions return as a text."""
    return short(returns.random_returns()[env])


def page(found: Sequence[Cell]) -> str:
    """Return the text of the page."""
    template = jinja2.Template(
        TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined
    )
    known = [cell for cell in found if cell.env in anchors()]
    classic = [cell for cell in known if cell.env in ENVS]
    text = template.render(
        seeds=" or ".join(map(str, sorted({len(cell.rows) for cell in classic}))),
        grid=grid(found),
        profile=len(returns_figures.of_all_envs(found)) > 1,
        images=returns_figures.images(found),
        trials=returns_figures.extent(),
        sources=anchors()["sources"],
        envs=[details(env, known) for env in anchors() if env in {cell.env for cell in known}],
        plain=plain(found),
        plain_steps=plain_steps(found),
        hidden={env: said["memory"] for env, said in returns.others().items() if "memory" in said},
        others=others(found),
    )
    return "\n".join(map(wrapped, text.splitlines())) + "\n"


def wrapped(line: str) -> str:
    """Return a line, broken if it is prose that is too long."""
    if line.startswith("|"):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(
        line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def plain(found: Sequence[Cell]) -> str:
    """Return the table of what default settings reach on gymnax's other environments."""
    of = {(cell.name, cell.env): cell for cell in found if cell.study.endswith(PLAIN)}
    names = list(dict.fromkeys(name for name, _ in of))
    rows = [
        [env, random_return(env), *(middle(of.get((name, env))) for name in names)]
        for env in returns.others()
    ]
    return table(["", "random", *names], rows) if names else ""


def plain_steps(found: Sequence[Cell]) -> str:
    """Return the steps of those runs, agent by agent."""
    steps = {cell.name: cell.steps for cell in found if cell.study.endswith(PLAIN)}
    return ", ".join(f"{name} {thousands(count)}" for name, count in steps.items())


def middle(cell: Cell | None) -> str:
    """Return the IQM of a cell as a text."""
    return "-" if cell is None else short(float(stats.iqm(cell.scores)))


def others(found: Sequence[Cell]) -> str:
    """Return the table of single studies without published figures."""
    rows = [
        [cell.env, f"[{cell.name}]({cell.study}.toml)", cell.score, f"{cell.steps:,}",
         str(len(cell.rows)), str(cell.diverged)]
        for cell in sorted(found, key=lambda cell: cell.env)
        if cell.env not in anchors() and not cell.study.endswith(PLAIN)
    ]  # fmt: skip
    header = ["environment", "agent", "IQM [95% interval]", "steps", "seeds", "diverged"]
    return table(header, rows) if rows else ""


def scores(found: Sequence[Cell]) -> Iterator[tuple[Path, list[Mapping[str, str]]]]:
    """Yield the table of scores of each agent's page."""
    for agent in AGENTS:
        rows = [
            dict(zip(returns.SCORE, (
                cell.env, cell.score, short(float(stats.iqm(cell.greedy))), f"{cell.steps:,}",
                str(len(cell.rows)), str(cell.diverged), cell.study,
            ), strict=True))
            for cell in found
            if cell.agent == agent and not cell.study.endswith(PLAIN) and len(cell.rows) >= FEWEST
        ]  # fmt: skip
        if rows:
            yield HERE / "curves" / f"{agent}_scores.csv", rows


def settings(study: str) -> str:
    """Return what a sweep file says under [config], but for the environment."""
    text = (HERE / f"{study}.toml").read_text(encoding="utf-8").partition("[config]\n")[2]
    lines = text.partition("\n[")[0].strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("env = "))


def presets() -> str:
    """Return the presets of `purejaxpg train`: the settings of the cells."""
    head = "".join(line + "\n" for line in PRESETS_HEAD)
    chosen = {}
    for path in HERE.glob("*_*.toml"):
        spec = returns.spec_of(path.stem)
        pair = spec["agent"], spec["config"].get("env", "")  # none: a sweep over environments
        if is_preset(path.stem, *pair):
            chosen[pair] = settings(path.stem)
    return head + "".join(f"\n[{a}.{e}]\n{chosen[a, e]}\n" for a, e in sorted(chosen))


def is_preset(study: str, agent: str, env: str) -> bool:
    """Return whether a study shows what an agent can do; others show what it cannot."""
    known = study == f"{agent}_{ENVS.get(env)}"
    memory = agent == "ppo_rnn" and env != ""
    return known or memory or env.endswith("MinAtar")


def written(path: Path, text: str) -> Path:
    """Write a text -> its path."""
    path.write_text(text, encoding="utf-8")
    return path


def with_grid(text: str, found: Sequence[Cell]) -> str:
    """Return the text of a page with the table of now."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{grid(found)}\n\n{END}{after}"


def write() -> list[Path]:
    """Write everything, and return the files."""
    found = returns.cells()
    tables = list(scores(found))
    for path, rows in tables:
        returns.write(path, returns.SCORE, rows)
    return [
        written(PAGE, page(found)),
        *(written(path, with_grid(path.read_text(encoding="utf-8"), found)) for path in WITH_GRID),
        written(PRESETS, presets()),
        *(path for path, _ in tables),
        *returns_figures.write(found),
    ]
