"""The tables and the figure of a benchmark, from its file alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from purejaxpg import disk
from purejaxpg.bench import cases, counts, roof
from purejaxpg.report import figures as drawing
from purejaxpg.text import engineering

Result = Mapping[str, Any]
Found = tuple[cases.Case, Result]

AGENTS, ENVS = "agents", "environments"  # the axes
MARKERS = "osD^v"
KNEE = 0.9  # of the best: the knee is where so much is reached first


def one_line(result: Result) -> str:
    """Say what came of a case."""
    if "error" in result:
        return f"failed: {result['error']}"
    steps, agents = result["env_steps_per_s"], result["agents_per_s"]
    return (
        f"{engineering(steps)} env-steps/s, {agents:.3g} agents/s, compiled in {compiled(result)} s"
    )


def compiled(result: Result) -> str:
    """Return the seconds of all three parts of a compilation."""
    return f"{result['trace_s'] + result['lower_s'] + result['compile_s']:.1f}"


def roof_of(data: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    """Return the env-steps/s at the machine's roof, if the algorithm's count is known."""
    if not result.get("algorithm"):
        return None
    count = counts.Count(**result["algorithm"])
    speed = roof.gb_per_s(data["roof"], result["memory"]["per_device"])
    return 1 / counts.seconds_at_roof(count, roof.gflops(data["roof"]), speed)


def results(data: Mapping[str, Any]) -> list[tuple[cases.Case, dict[str, Any]]]:
    """Return cases with what came of them, equal kinds together."""
    found = [(cases.Case(**r["case"]), r) for r in data["results"].values()]
    return sorted(found, key=lambda pair: place(pair[0]))


def place(case: cases.Case) -> tuple[str, str, int, int, str]:
    """Return what a case is sorted by; those that differ in a flag of XLA come together."""
    env, envs = case.fields.get("env", ""), case.fields.get("num_envs", 0)
    return case.agent, env, envs, case.num_agents, case.flag


# ------------------------------------------------------------------------------------------ tables


def tables(data: Mapping[str, Any], console: Any) -> None:
    """Print three tables: how fast, what it takes until then, and what it needs."""
    found = results(data)
    good = [(case, result) for case, result in found if "error" not in result]
    line = describe(data)
    if good:
        console.print(table(f"Speed ({line})", SPEED, [speed(data, *each) for each in good]))
        console.print(table("Time", TIMES, [times(*each) for each in good]))
        console.print(table(NEEDS_TITLE, NEEDS, [needs(*each) for each in good]))
    for case, result in found:
        if "error" in result:
            say = f"{case.label}: {result['error']}"
            console.print(say, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for sentence in knees(good):
        console.print(sentence, highlight=False, markup=False)


def describe(data: Mapping[str, Any]) -> str:
    """Say what the machine is and what its roof."""
    found = data["roof"]
    copies = found["gb_per_s"].values()
    kind = data["machine"]["processor"] if found["platform"] == "cpu" else found["device_kind"]
    return (
        f"{found['devices']} x {kind}; roof {roof.gflops(found):.0f} GFLOP/s, "
        f"{min(copies):.0f} to {max(copies):.0f} GB/s"
    )


SPEED = (
    "case",
    "env-steps/s",
    "slowest-fastest",
    "agents/s",
    "% of roof",
    "samples a step",
    "rows x devices",
)
TIMES = (
    "case",
    "import s",
    "trace s",
    "lower s",
    "compile s",
    "all three again s",
    "start s",
    "update: first ms",
    "steady ms",
)
NEEDS_TITLE = (
    "Needs (data: the rollout or the replay buffer; kernels: of all agents on a device together, "
    "by environment step of one; FLOP and bytes a step: counted from the algorithm)"
)
NEEDS = (
    "case",
    "bytes an agent",
    "without its data",
    "kernels a step",
    "FLOP a step",
    "bytes a step",
)


def speed(data: Mapping[str, Any], case: cases.Case, result: Mapping[str, Any]) -> list[str]:
    """Return a row of the first table."""
    rate, top = result["env_steps_per_s"], roof_of(data, result)
    count = result["algorithm"] or {}
    return [
        case.label,
        engineering(rate),
        "-".join(map(engineering, slowest_and_fastest(result))),
        f"{result['agents_per_s']:.3g}",
        f"{100 * rate / top:.1f}" if top else "-",
        f"{count['samples']:.3g}" if count else "-",
        f"{result['rows']} x {result['devices']}",
    ]


def slowest_and_fastest(result: Result) -> tuple[float, float]:
    """Return the env-steps/s of the slowest and of the fastest segment."""
    rate, update = result["env_steps_per_s"], result["update_s"]
    return rate * update["median"] / update["max"], rate * update["median"] / update["min"]


def times(case: cases.Case, result: Result) -> list[str]:
    """Return a row of the second table."""
    again = result.get("again_s")
    return [
        case.label,
        *(f"{result[f'{part}_s']:.1f}" for part in ("import", "trace", "lower", "compile")),
        "-" if again is None else f"{again:.1f}",
        f"{result['start_s']:.2f}",
        f"{1e3 * result['first_update_s']:.3g}",
        f"{1e3 * result['update_s']['median']:.3g}",
    ]


def needs(case: cases.Case, result: Result) -> list[str]:
    """Return a row of the third table."""
    count, used = result["algorithm"] or {}, result["memory"]
    return [
        case.label,
        engineering(used["per_agent"]),
        engineering(used["beyond_data"]),
        f"{result['kernels']['per_env_step']:.3g}",
        engineering(count.get("flops")),
        engineering(count.get("bytes")),
    ]


def table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """Return a table for the console."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(
        title=Text(title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        show_edge=False,
        padding=(0, 1),
    )
    for header, *column in zip(headers, *rows, strict=True):
        if header == "case":
            made.add_column(Text(header), overflow="fold")
        else:  # on a narrow terminal headers may wrap; a value is never squeezed away
            made.add_column(Text(header), justify="right", min_width=max(map(len, column)))
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def knees(found: Sequence[Found]) -> list[str]:
    """Say of each curve where more agents no longer make it faster."""
    lines = []
    for name, points in curves(found, AGENTS).items():
        if len(points) < 3:
            continue
        best = max(rate for _, rate, _ in points)
        agents, rate, _ = next(point for point in points if point[1] >= KNEE * best)
        lines.append(
            f"{name}: {agents} agents reach {100 * rate / best:.0f}% of the best "
            f"({engineering(best)} env-steps/s)."
        )
    return lines


def curves(found: Iterable[Found], axis: str) -> dict[str, list[tuple[int, float, Result]]]:
    """Return the curves over agents or over environments: points of place, env-steps/s, result.

    A curve has two points at least, and none is of a flag.
    """
    lines: dict[str, list[tuple[int, float, Result]]] = {}
    for case, result in found:
        if case.flag:
            continue
        at = result["config"]["num_envs"] if axis == ENVS else case.num_agents
        lines.setdefault(case.label_without(axis), []).append(
            (at, result["env_steps_per_s"], result)
        )
    return {
        name: sorted(points, key=lambda point: point[0])
        for name, points in lines.items()
        if len({at for at, _, _ in points}) > 1
    }


# ------------------------------------------------------------------------------------------ figure


def figures(data: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw env-steps/s over agents and over environments, the roof with them, as PNG and SVG.

    Returns:
        The files; none where no curve has two points.
    """
    good = [(case, result) for case, result in results(data) if "error" not in result]
    both = {axis: curves(good, axis) for axis in (AGENTS, ENVS)}
    drawn = {axis: lines for axis, lines in both.items() if lines}
    if not drawn:
        return []
    figure, grid = drawing.make_panels(len(drawn), 2, (7.6, 5.4))
    for axes, (axis, lines) in zip(grid, drawn.items(), strict=True):
        draw(axes, data, lines)
        drawing.dress(axes, f"Throughput over {axis}", "median of segments, slowest to fastest")
        axes.set_xlabel(f"{axis} ({'in all' if axis == AGENTS else 'of each agent'})")
        axes.set_ylabel("environment steps per second, all agents")
    paths = [directory / f"bench.{ending}" for ending in ("png", "svg")]
    for path in paths:
        with disk.faults("write", path):
            drawing.save(figure, path)
    return paths


def draw(axes: Any, data: Mapping[str, Any], lines: Mapping[str, Any]) -> None:
    """Draw curves, each with its roof in its colour."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for number, (name, points) in enumerate(lines.items()):
        colour = drawing.COLOURS[number % len(drawing.COLOURS)]
        marker = MARKERS[number // len(drawing.COLOURS) % len(MARKERS)]
        at, rates, found = zip(*points, strict=True)
        spread = zip(*map(slowest_and_fastest, found), strict=True)
        low, high = (list(map(abs, map(float.__sub__, side, rates))) for side in spread)
        bars = {"color": colour, "marker": marker, "markersize": 5}
        axes.errorbar(at, rates, [low, high], label=drawing.plain(name), **bars)
        roofs = [roof_of(data, result) for result in found]
        if None not in roofs:
            axes.plot(at, roofs, color=colour, linestyle="--", linewidth=1)
    axes.plot([], [], color="#555555", linestyle="--", linewidth=1, label="the machine's roof")
    ticks = sorted({at for points in lines.values() for at, _, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.13), "borderaxespad": 0.0}
    axes.legend(frameon=False, fontsize=10, ncols=2, **place)
