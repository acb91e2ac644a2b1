"""The tables and the figure of a benchmark, from its file alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from purejaxpg import contract
from purejaxpg.bench import cases, counts, roof
from purejaxpg.report import figures as drawing
from purejaxpg.report import tables as text_tables
from purejaxpg.text import engineering

Result = Mapping[str, Any]  # as `child.run` returns it; `results` adds "roof", steps/s or None
Measured = tuple[cases.Case, Result]
Point = tuple[int, float, Result]  # place on the axis, steps/s, and all the rest

AGENTS, ENVS = "agents", "environments"  # the axes
MARKERS = "osD^v"
KNEE = 0.9  # share of the best rate that the knee of a curve reaches


def one_line(result: Result) -> str:
    """Summarise a case."""
    if "error" in result:
        return f"failed: {result['error']}"
    seconds = result["trace_s"] + result["lower_s"] + result["compile_s"]
    return (
        f"{engineering(result['env_steps_per_s'])} {unit(result)}/s, {result['agents_per_s']:.3g} "
        f"agents/s, compiled in {seconds:.1f} s"
    )


def unit(*found: Result) -> str:
    """Return what the steps of results are, such as env-steps."""
    names = {str(result.get("unit", contract.ENV_STEPS)) for result in found}
    return " or ".join(sorted(names)).replace(contract.ENV_STEPS, "env-steps")


def results(data: Mapping[str, Any]) -> list[Measured]:
    """Return cases and their results, equal kinds together, each with its roof."""
    measured = [
        (cases.Case(**each["case"]), {**each, **against_roof(data, each)})
        for each in data["results"].values()
    ]
    return sorted(measured, key=lambda pair: place(pair[0]))


def against_roof(data: Mapping[str, Any], result: Result) -> dict[str, float | None]:
    """Compare a result with the machine's roof, as far as the algorithm's count is known.

    Returns:
        "roof": steps/s at it; "share_of_flops" and "share_of_bytes": of the machine's arithmetic
        and of its memory's speed. The larger of the two is the share of the roof.
    """
    if not result.get("algorithm"):
        return dict.fromkeys(("roof", "share_of_flops", "share_of_bytes"))
    count, rate = counts.Count(**result["algorithm"]), result["env_steps_per_s"]
    gflops = roof.gflops(data["roof"])
    speed = roof.gb_per_s(data["roof"], result["memory"]["per_device"])
    return {
        "roof": 1 / counts.seconds_at_roof(count, gflops, speed),
        "share_of_flops": rate * count.flops / (1e9 * gflops),
        "share_of_bytes": rate * count.bytes / (1e9 * speed),
    }


def place(case: cases.Case) -> tuple[str, str, int, int, str]:
    """Return the sort key of a case; cases that differ in a flag of XLA come together."""
    env, envs = case.fields.get(contract.ENV, ""), case.fields.get(contract.NUM_ENVS, 0)
    return case.agent, env, envs, case.num_agents, case.flag


# ------------------------------------------------------------------------------------------ tables


def seconds(part: str, digits: int = 1) -> Callable[[Result], str]:
    """Return a column of seconds."""
    return lambda result: f"{result[f'{part}_s']:.{digits}f}"


def counted(result: Result, name: str, form: Callable[[Any], str] = engineering) -> str:
    """Return a number of the algorithm, or a dash."""
    return form(result["algorithm"][name]) if result["algorithm"] else "-"


def percent(name: str) -> Callable[[Result], str]:
    """Return a column of shares of the roof."""
    return lambda result: "-" if result[name] is None else f"{100 * result[name]:.1f}"


def slowest_and_fastest(result: Result) -> tuple[float, float]:
    """Return the steps/s of the slowest and of the fastest segment."""
    rate, update = result["env_steps_per_s"], result["update_s"]
    return rate * update["median"] / update["max"], rate * update["median"] / update["min"]


Columns = Mapping[str, Callable[[Result], str]]
SPEED: Columns = {
    "{unit}/s": lambda r: engineering(r["env_steps_per_s"]),
    "slowest-fastest": lambda r: "-".join(map(engineering, slowest_and_fastest(r))),
    "agents/s": lambda r: f"{r['agents_per_s']:.3g}",
    "% of FLOP/s": percent("share_of_flops"),
    "% of bytes/s": percent("share_of_bytes"),
    "samples a step": lambda r: counted(r, "samples", "{:.3g}".format),
    "rows x devices": lambda r: f"{r['rows']} x {r['devices']}",
}
TIMES: Columns = {
    **{f"{part} s": seconds(part) for part in ("import", "trace", "lower", "compile")},
    "all three again s": lambda r: seconds("again")(r) if "again_s" in r else "-",
    "start s": seconds("start", 2),
    "update: first ms": lambda r: f"{1e3 * r['first_update_s']:.3g}",
    "steady ms": lambda r: f"{1e3 * r['update_s']['median']:.3g}",
}
NEEDS_TITLE = (
    "Needs (data: the rollout or the replay buffer; kernels: of all agents on a device together, "
    "per update and per step of one; FLOP and bytes a step: counted from the algorithm)"
)
NEEDS: Columns = {
    "bytes an agent": lambda r: engineering(r["memory"]["per_agent"]),
    "without its data": lambda r: engineering(r["memory"]["beyond_data"]),
    "kernels an update": lambda r: f"{r['kernels']['per_update']:,}",
    "kernels a step": lambda r: f"{r['kernels']['per_env_step']:.3g}",
    "FLOP a step": lambda r: counted(r, "flops"),
    "bytes a step": lambda r: counted(r, "bytes"),
}
TOKENS_TITLE = (
    "Language models (generated: sampled tokens of completions; trained: tokens in gradient steps, "
    "once for each pass; both with padding; GFLOP/s: of the model, counted from the algorithm; "
    "program: bytes of arguments and temporaries on a device; peak: of the device, on a CPU of "
    "the process)"
)
TOKENS: Columns = {
    "generated/s": lambda r: engineering(r["tokens"]["generated_per_s"]),
    "trained/s": lambda r: engineering(r["tokens"]["trained_per_s"]),
    "GFLOP/s": lambda r: f"{1e-9 * r['algorithm']['flops'] * r['env_steps_per_s']:.3g}",
    "% of FLOP/s": percent("share_of_flops"),
    "program": lambda r: engineering(r["memory"]["argument"] + r["memory"]["temp"]),
    "peak": lambda r: engineering(r["memory"]["peak"]),
}


def tables(data: Mapping[str, Any], console: Any) -> None:
    """Print the speed, the time until training is fast, what a case needs, and rates of tokens."""
    measured = results(data)
    good = [(case, result) for case, result in measured if "error" not in result]
    language = [(case, result) for case, result in good if result.get("tokens")]
    for title, columns, shown in (
        (f"Speed ({describe(data)})", SPEED, good),
        ("Time", TIMES, good),
        (NEEDS_TITLE, NEEDS, good),
        (TOKENS_TITLE, TOKENS, language),
    ):
        if shown:
            text_tables.show(table(title, columns, shown), console)
    for case, result in measured:
        if "error" in result:
            say = f"{case.label}: {result['error']}"
            console.print(say, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for sentence in [*knees(good), *without_roof(good), *ways(data, good)]:
        console.print(sentence, highlight=False, markup=False)


def ways(data: Mapping[str, Any], good: Iterable[Measured]) -> list[str]:
    """Say how the loops of agents run on a device that has kernels for them, and why not."""
    if data["roof"]["platform"] == "cpu":
        return []
    return [f"{case.label}: {' '.join(result.get('paths', ()))}" for case, result in good]


def without_roof(good: Iterable[Measured]) -> list[str]:
    """Say of which agents no share of the machine's roof is known, and why."""
    names = dict.fromkeys(case.agent for case, result in good if not result["roof"])
    if not names:
        return []
    return [
        f"No share of the roof is known for {', '.join(names)}: its operations are not counted."
    ]


def describe(data: Mapping[str, Any]) -> str:
    """Describe the machine and its roof."""
    found = data["roof"]
    copies = found["gb_per_s"].values()
    kind = data["machine"]["processor"] if found["platform"] == "cpu" else found["device_kind"]
    return (
        f"{found['devices']} x {kind}; roof {roof.gflops(found):.0f} GFLOP/s, "
        f"{min(copies):.0f} to {max(copies):.0f} GB/s"
    )


def table(title: str, columns: Columns, good: Sequence[Measured]) -> text_tables.Table:
    """Return a table, a case per row.

    Args:
        title: its title.
        columns: header -> the cell of a result.
        good: at least one case that did not fail.
    """
    steps = unit(*(result for _, result in good))
    headers = ["case", *(header.format(unit=steps) for header in columns)]
    cells = [[case.label, *(of(result) for of in columns.values())] for case, result in good]
    return text_tables.Table(title, headers, cells)


def knees(good: Iterable[Measured]) -> list[str]:
    """Say of each curve from which number on more agents no longer make it faster."""
    lines = []
    for name, points in curves(good, AGENTS).items():
        if len(points) < 3:
            continue
        best = max(rate for _, rate, _ in points)
        agents, rate, found = next(point for point in points if point[1] >= KNEE * best)
        lines.append(
            f"{name}: {agents} agents reach {100 * rate / best:.0f}% of the best "
            f"({engineering(best)} {unit(found)}/s)."
        )
    return lines


def curves(good: Iterable[Measured], axis: str) -> dict[str, list[Point]]:
    """Return the curves over agents or over environments, those of two places or more.

    Cases with a flag are left out.
    """
    lines: dict[str, list[Point]] = {}
    for case, result in good:
        known = result["config"].get(contract.NUM_ENVS)
        at = known if axis == ENVS else case.num_agents
        if not case.flag and at is not None:
            points = lines.setdefault(case.label_without(axis), [])
            points.append((at, result["env_steps_per_s"], result))
    return {
        name: sorted(points, key=lambda point: point[0])
        for name, points in lines.items()
        if len({at for at, _, _ in points}) > 1
    }


# ------------------------------------------------------------------------------------------ figure


def figures(data: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw steps/s over agents and over environments, with the roof, as PNG and SVG.

    Returns:
        The files; none if no curve has two points.
    """
    good = [(case, result) for case, result in results(data) if "error" not in result]
    drawn = {axis: lines for axis in (AGENTS, ENVS) if (lines := curves(good, axis))}
    if not drawn:
        return []
    figure, grid = drawing.make_panels(len(drawn), 2, (7.6, 5.4))
    for axes, (axis, lines) in zip(grid, drawn.items(), strict=True):
        draw(axes, lines)
        drawing.dress(axes, f"Throughput over {axis}", "median of segments, slowest to fastest")
        axes.set_xlabel(f"{axis} ({'in all' if axis == AGENTS else 'of each agent'})")
        steps = unit(*(result for points in lines.values() for _, _, result in points))
        axes.set_ylabel(f"{steps.replace('env-', 'environment ')} per second, all agents")
    return drawing.save_both(figure, directory, "bench")


def draw(axes: Any, lines: Mapping[str, Sequence[Point]]) -> None:
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
        if all(result["roof"] for result in found):
            roofs = [result["roof"] for result in found]
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
    drawing.legend_below(axes, 2)
