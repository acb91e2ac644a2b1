"""The report of a sweep: a page, tables and figures, and the short table on the terminal.

`ranking` and `analysis` compute the numbers; `page` and `figures` lay them out. This module writes
the files.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purejaxpg import FaultError, contract, disk
from purejaxpg.report import analysis, completions, figures, page, ranking, tables, together
from purejaxpg.report.analysis import Analysis
from purejaxpg.report.ranking import Configuration
from purejaxpg.sweep import stages
from purejaxpg.sweep.store import Store
from purejaxpg.text import count, interval, number, paragraphs, percent, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


_COUNTS = ("finished", "planned", "diverged")
SHOWN = 20  # rows of a section on the terminal and in table.md; table.csv has all


def write(directory: str | os.PathLike[str], console: "Console") -> Path:
    """Print the ranking and write the whole report to ``DIR/report``.

    Args:
        directory: a result directory; units may still be pending.
        console: where to print; the width of the table adapts to it.

    Returns:
        The path of the report: ``index.html``, the page with everything; the figures that the
        results allow, as PNG and SVG; ``table.csv`` with every configuration and full
        precision, ``table.md`` with the best, ``runs.csv``, ``confirmed.csv``, ``importance.csv``
        and ``curves.csv``; ``samples.md``, ``further.csv`` and ``frontier.png`` of language models.

    Raises:
        InputError: there is no result directory at this path.
        FaultError: a result is damaged, or the report cannot be written.
    """
    with Store.read(directory) as store:
        target = store.path / "report"
        with disk.faults("write the report", target):
            target.mkdir(exist_ok=True)
            data = analysis.of_store(store)
            _print(data, console)
            written = completions.of_store(store, data.ranked, data.confirmed)
            _print_further(written, console)
            _write_tables(data, written, target)
            metrics, robust = analysis.metrics_of(store, data), _robust_tables(data)
            title = _title_of(store.path)
            text = page.render(data, title, written, metrics=metrics, robust=robust)
            disk.write_text(target / "index.html", text)
            drawn = figures.write(data, target) + _write_completions(written, target)
    line = f"Wrote index.html, table.csv and {count(len(drawn), 'figure')} to {target}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)
    return target


def page_text(directory: Path, now: page.Now, unfinished: analysis.Unfinished) -> str:
    """Return the page of a sweep while it runs.

    Args:
        directory: its result directory.
        now: how far it is.
        unfinished: metrics so far [rows, updates] and facts of units in progress.

    Returns:
        A complete HTML document.

    Raises:
        FaultError: a result is damaged.
    """
    with Store.read(directory) as store:
        data = analysis.of_store(store, unfinished)
        written = completions.of_store(store, data.ranked, data.confirmed)
        metrics = analysis.metrics_of(store, data, unfinished)
        robust = _robust_tables(data)
        return page.render(data, _title_of(store.path), written, now, metrics, robust)


def write_stages(directory: str | os.PathLike[str], now: page.Now | None = None) -> Path:
    """Write the page of a pipeline or of several agents, DIR/index.html, with links to each.

    Where several stages can be compared, it shows DIR/frontier.png, which is also written as SVG.

    Args:
        directory: of the stages or agents, at least one of which has begun.
        now: how far the present one is; None: all have ended.

    Returns:
        The path of the page.

    Raises:
        FaultError: a result or the list of stages is damaged, or the page cannot be written.
    """
    root = Path(directory).resolve()
    begun = stages.directories(root)
    # An agent that was added later has the sweep file that names it.
    newest = max((each / "spec.toml" for each in begun), key=os.path.getmtime)
    pipeline = stages.read(newest)
    if pipeline is None:
        raise FaultError(f"{newest} is damaged: it has no stages.")
    rows = [_stage(stage, root / stage.name, begun) for stage in pipeline.stages]
    compared = completions.comparable({row["name"]: row["written"] for row in rows})
    with disk.faults("write", root):
        pictures = _write_figure(completions.draw_together(compared), root)
        drawn = pictures[0].read_bytes() if pictures else b""
    target, kind = root / "index.html", "agent" if stages.of_agents(root) else "stage"
    text = page.render_stages(root.name, rows, pipeline.text, drawn, kind, now)
    disk.write_text(target, text)
    return target


def write_together(
    directories: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    console: "Console",
) -> Path:
    """Compare several result directories: print their ranking and write a page about all of them.

    Args:
        directories: at least one result directory of runs that play an environment.
        target: a directory, which is made; it may hold the result directories.
        console: where to print.

    Returns:
        The page, ``target/index.html``. Beside it are the figures as PNG and SVG, ``table.csv``
        with what each agent achieved in each environment, ``improvement.csv``, ``curves.csv`` and
        ``table.md``.

    Raises:
        InputError: a directory cannot be compared, or is named twice.
        FaultError: a result is damaged, or the page cannot be written.
    """
    data, folder = together.of_directories(directories), Path(target)
    found = [_table_together(data)]
    for table in found:
        tables.show(table, console)
    for line in (*data.warnings, *data.notes):
        console.print(line, markup=False, highlight=False)
    with disk.faults("write the comparison", folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = [*tables.markdown_lines(found, 3), *data.warnings, *data.notes]
        (folder / "table.md").write_text("\n".join(text) + "\n", encoding="utf-8")
        _write_csv(folder / "table.csv", _method_rows(data))
        _write_csv(folder / "improvement.csv", [_read(i, _CHANCE) for i in data.improvements])
        lines = [(name, line) for name, own in data.curves.items() for line in own.best]
        _write_csv(folder / "curves.csv", [p for n, line in lines for p in _points(line, env=n)])
        figures.write_together(data, folder)
    page_path = folder / "index.html"
    disk.write_text(page_path, page.render_together(data, _versus(data)))
    return page_path


def _versus(data: together.Together) -> str:
    """Return the names of a few methods as a title, or how many there are."""
    names = [method.name for method in data.methods]
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} agents"


def _table_together(data: together.Together) -> tables.Table:
    """Return the ranking of methods."""
    kind = "normalised final return" if data.normalized else "final return"
    rows = [
        [
            str(rank),
            m.name,
            number(m.iqm),
            interval(m.low, m.high),
            number(m.mean),
            percent(m.first),
        ]
        + [number(entry.iqm) for entry in m.entries.values()]
        for rank, m in enumerate(data.methods, 1)
    ]
    each = [f"IQM in {name}" for name in data.environments]
    headers = ["rank", "agent", "IQM", "95% CI", "mean", "first in", *each]
    return tables.Table(f"Agents by {kind}", headers, rows, best_first=True)


def _method_rows(data: together.Together) -> list[dict[str, Any]]:
    """Return what each method achieved in each environment."""
    return [
        {"rank": rank, "agent": m.name, "env": name, "configuration": e.configuration.label}
        | {"seeds": "fresh" if e.fresh else "tuning", "runs": e.scores.size}
        | {"diverged": e.configuration.diverged, "configurations_tried": e.tried}
        | {"final_iqm": e.iqm, "ci95_low": e.ends[0], "ci95_high": e.ends[1]}
        | {"score_at_0": data.scales[name][0], "score_at_1": data.scales[name][1]}
        | {"overall_iqm": m.iqm, "overall_ci95_low": m.low, "overall_ci95_high": m.high}
        | {"directory": str(m.directory)}
        for rank, m in enumerate(data.methods, 1)
        for name, e in m.entries.items()
    ]


def _stage(stage: stages.Stage, directory: Path, begun: Sequence[Path]) -> dict[str, Any]:
    """Return what the page of a pipeline shows of a stage."""
    given = stage.raw.get("given")
    sources = given.items() if isinstance(given, dict) else ()
    written = (directory / "report" / "index.html").is_file()
    shown: dict[str, Any] = {
        "name": stage.name,
        "agent": stage.raw.get("agent", ""),
        "given": ", ".join(f"{name} = {source}" for name, source in sources),
        "link": f"{stage.name}/report/index.html" if written else None,
        "ranked": [],
        "written": completions.NOTHING,
    }
    if directory not in begun:
        return shown
    with Store.read(directory) as store:
        ranked = ranking.rank(store)
        text = completions.of_store(store, ranked)
    count = {name: sum(getattr(c, name) for c in ranked) for name in _COUNTS}
    return shown | count | {"ranked": ranked, "written": text}


def _title_of(directory: Path) -> str:
    """Return the name of a result directory; that of a stage follows the name of its pipeline."""
    if (directory.parent / stages.STAGES).is_file():
        return f"{directory.parent.name}: {directory.name}"
    return directory.name


# -------------------------------------------------------------------------------- tables for people


def _decimals(section: Sequence[Configuration]) -> int:
    """Return one number of decimals for all scores of a section, so that a column lines up."""
    values = [abs(v) for c in section for v in (c.iqm, c.low, c.high, c.mean) if np.isfinite(v)]
    largest = max(values, default=1.0)
    return 1 if largest >= 100 else 2 if largest >= 1 else 4


def _cells(
    first: str, c: Configuration, fields: Sequence[str], decimals: int, greedy: bool
) -> list[str]:
    """Return one row of a table as text."""

    def score(value: float) -> str:
        return f"{value:.{decimals}f}" if np.isfinite(value) else "-"

    interval = f"[{score(c.low)}, {score(c.high)}]" if c.finished > 1 else "-"
    missing = "" if c.finished == c.planned else f" of {c.planned}"
    return [
        first,
        *(short(c.swept.get(name, "-")) for name in fields),
        score(c.iqm),
        interval,
        score(c.mean),
        *([score(c.greedy_iqm)] if greedy else []),
        f"{c.diverged}/{c.finished}{missing}",
    ]


def _title(environment: str, section: Sequence[Configuration]) -> str:
    runs = sum(c.planned for c in section)
    text = f"{count(len(section), 'configuration')}, {count(runs, 'run')}"
    return f"{environment}: {text}" if environment else text


def _more(section: Sequence[Configuration]) -> str:
    hidden = len(section) - SHOWN
    return f"{hidden} more in table.csv" if hidden > 0 else ""


def _print(data: Analysis, console: "Console") -> None:
    """Print one table per environment and stage, then the notes."""
    for table in _tables(data):
        tables.show(table, console)
    for note in data.notes:
        console.print(note, markup=False, highlight=False)


def _print_further(written: completions.Texts, console: "Console") -> None:
    """Print the means of all further scores of each configuration."""
    many = len(written.names) > 5  # they must fit into 120 characters
    table = _further(written, 1, "\n[" if many else " [")  # the return is in the tables above
    if table is None:
        return
    tables.show(table, console)
    if contract.KL in written.names:
        console.print(page.EQUAL_KL.format("frontier.png"), markup=False, highlight=False)


def _further(written: completions.Texts, start: int = 0, gap: str = " [") -> tables.Table | None:
    """Return the table of further scores from column `start`; None if there are none."""
    if not written.rows:
        return None
    names = written.names[start:]
    rows = [
        [row.name, *(row.means[name].text.replace(" [", gap) for name in names)]
        for row in written.rows[:SHOWN]
    ]
    title = "Further scores: mean over runs, 95% interval"
    return tables.Table(title, ["", *written.titles[start:]], rows, best_first=True)


def _write_completions(written: completions.Texts, target: Path) -> list[str]:
    """Write samples.md and the figure of the frontier; return the names of the figures."""
    if written.samples:
        text = [
            "\n".join([f"## {each['label']}", "", "```", *paragraphs(each["columns"]), "```"])
            for each in written.samples
        ]
        (target / "samples.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    return [path.name for path in _write_figure(completions.draw(written), target)[:1]]


def _write_figure(figure: "Figure | None", folder: Path) -> list[Path]:
    """Write the figure of a frontier; without it, remove the files of an earlier report."""
    if figure is not None:
        return figures.save_both(figure, folder, "frontier")
    for ending in ("png", "svg"):
        (folder / f"frontier.{ending}").unlink(missing_ok=True)
    return []


def _tables(data: Analysis) -> list[tables.Table]:
    """Return the tables over conditions, then those of each: configurations confirmed, ranking."""
    found = _robust_tables(data)
    for section in data.sections:
        confirmed = [each.configuration for each in section.confirmed]
        fields, decimals = ranking.fields(section.ranked), _decimals([*section.ranked, *confirmed])
        kinds = ["greedy"] if data.greedy else []
        headers = [*fields, "IQM", "95% CI", "mean", *kinds, "diverged"]
        if confirmed:
            name = f"{section.environment}: " if section.environment else ""
            rows = [
                _cells(e.name, e.configuration, fields, decimals, data.greedy)
                for e in section.confirmed
            ]
            title = f"{name}on fresh seeds"
            found.append(tables.Table(title, ["", *headers], rows, best_first=True))
        rows = [
            _cells("-" if c.rank is None else str(c.rank), c, fields, decimals, data.greedy)
            for c in section.ranked[:SHOWN]
        ]
        title = _title(section.environment, section.ranked)
        note = _more(section.ranked)
        found.append(tables.Table(title, ["rank", *headers], rows, note, best_first=True))
    return found


def _robust_tables(data: Analysis) -> list[tables.Table]:
    """Return the rankings over conditions, those on fresh seeds first."""
    found = []
    stages = [(over, " on fresh seeds") for over in data.robust_fresh]
    for over, stage in stages + [(over, "") for over in data.robust]:
        fields = ranking.fields(over.ranked)
        decimals = _decimals([*over.ranked, *(c for own in over.parts.values() for c in own)])
        rows = []
        for c in over.ranked[:SHOWN]:
            *cells, diverged = _cells(str(c.rank or "-"), c, fields, decimals, False)
            parts = [f"{p.iqm:.{decimals}f}" if p.scores else "-" for p in over.parts[c.key]]
            rows.append([*cells, *parts, diverged])
        score = f"{over.by} of IQMs"
        headers = ["rank", *fields, score, "95% CI", "mean", *over.conditions, "diverged"]
        title, note = f"{over.title}{stage}", _more(over.ranked).replace("table", "robust")
        found.append(tables.Table(title, headers, rows, note, best_first=True))
    return found


def _markdown(data: Analysis, written: completions.Texts) -> str:
    """Return the same tables as Markdown."""
    further = _further(written)
    lines = tables.markdown_lines([*_tables(data), *([further] if further else [])], 3)
    return "\n".join(lines + [line for note in data.notes for line in (note, "")])


# ------------------------------------------------------------------------------ tables for programs


def _write_tables(data: Analysis, written: completions.Texts, target: Path) -> None:
    """Write the Markdown table and all CSV files; those without content are left out."""
    (target / "table.md").write_text(_markdown(data, written), encoding="utf-8")
    fields = ranking.fields(data.ranked)
    _write_csv(target / "table.csv", _configuration_rows(data, data.ranked, fields))
    _write_csv(target / "runs.csv", _run_rows(data, fields))
    _write_csv(target / "further.csv", _further_rows(written))
    fresh = [c.configuration for c in data.confirmed]
    roles = [c.role for c in data.confirmed]
    confirmed = [
        {"role": role, **row}
        for role, row in zip(roles, _configuration_rows(data, fresh, fields), strict=True)
    ]
    _write_csv(target / "confirmed.csv", confirmed)
    _write_csv(target / "robust.csv", _robust_rows(data))
    _write_csv(target / "importance.csv", _importance_rows(data))
    _write_csv(target / "curves.csv", _curve_rows(data))


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys; without rows, remove the file of an earlier report."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    path.write_text(tables.csv_text(rows), encoding="utf-8")


# The names of columns, and of the attributes or keys that fill them.
_SCORES = {
    "final_iqm": "iqm", "ci95_low": "low", "ci95_high": "high", "final_mean": "mean",
    "final_greedy_iqm": "greedy_iqm",
}  # fmt: skip
_RUNS = {"diverged": "diverged", "runs_done": "finished", "runs_planned": "planned"}
_OUTCOME = ("seed", "status", "score", "greedy_score", "diverged_at")
_CHANCE = {"pair": "over", "probability": "value", "ci95_low": "low", "ci95_high": "high"}
_SHARES = {
    "hyperparameter": "name", "share": "share", "share_low": "low", "share_high": "high",
    "share_top_quarter": "top_share",
}  # fmt: skip


def _read(source: Any, names: dict[str, str]) -> dict[str, Any]:
    return {column: getattr(source, attribute) for column, attribute in names.items()}


def _configuration_rows(
    data: Analysis, ranked: Iterable[Configuration], fields: Sequence[str]
) -> list[dict[str, Any]]:
    """Return every configuration with full precision."""
    rows, conditions = [], ranking.condition_fields(data.ranked)
    for c in ranked:
        best, area = data.during_training(c)
        steps, seconds = data.spent(c)
        rows.append(
            {"rank": "" if c.rank is None else c.rank}
            | {name: c.condition.get(name, "") for name in conditions}
            | {name: c.swept.get(name, "") for name in fields}
            | _read(c, _SCORES)
            | {"training_best_iqm": best, "training_auc_iqm": area}
            | _read(c, {**_RUNS, "trained_share": "reached"})
            | {"env_steps": int(steps), "device_seconds": seconds}
        )
    return rows


def _robust_rows(data: Analysis) -> list[dict[str, Any]]:
    """Return every configuration over conditions, of both stages."""
    names = {"score": "iqm", "ci95_low": "low", "ci95_high": "high"}
    stages = [(ranking.TUNE, over) for over in data.robust]
    stages += [(ranking.CONFIRM, over) for over in data.robust_fresh]
    return [
        {"stage": stage, "over": over.title, "rank": "" if c.rank is None else c.rank}
        | c.swept
        | _read(c, {**names, **_RUNS})
        | {f"final_iqm {p.environment}": p.iqm for p in over.parts[c.key]}
        for stage, over in stages
        for c in over.ranked
    ]


def _run_rows(data: Analysis, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Return every run of both stages."""
    rows, conditions = [], ranking.condition_fields(data.ranked)
    for run in data.runs:
        steps, seconds = data.cost.by_run.get(run["run_id"], (0.0, 0.0))
        curve = data.training.get(run["run_id"])
        rows.append(
            {name: run[name] for name in ("run_id", "stage")}
            | {name: run["condition"].get(name, "") for name in conditions}
            | {name: run["swept"].get(name, "") for name in fields}
            | {name: run[name] for name in _OUTCOME}
            | {"updates": run["stop"] or "", "training_best": curve.best if curve else ""}
            | {"training_auc": curve.area if curve else ""}
            | {"env_steps": int(steps), "device_seconds": seconds}
        )
    return rows


def _further_rows(written: completions.Texts) -> list[dict[str, Any]]:
    """Return every score of every run whose trainer scores itself."""
    return [
        {"configuration": row.name, "seed": seed}
        | {name.removeprefix(contract.EVALUATION): scores[name] for name in written.names}
        for row in written.rows
        for seed, scores in row.runs
    ]


def _importance_rows(data: Analysis) -> list[dict[str, Any]]:
    """Return the main effect of every hyperparameter at every level."""
    names = ("level", "mean", "ci95_half_width", "best", "diverged", "runs")
    return [
        {"env": section.environment, **_read(axis, _SHARES)}
        | dict(zip(names, (label, mean, error, best, *failures), strict=True))
        for section in data.sections
        for axis in section.effects.axes
        for label, mean, error, best, failures in zip(
            axis.levels.labels, axis.effects, axis.errors, axis.best, axis.failures, strict=True
        )
    ]


def _curve_rows(data: Analysis) -> list[dict[str, Any]]:
    """Return the curves that are drawn in colour."""
    rows = []
    for section in data.sections:
        drawn = [(ranking.TUNE, section.curves), (ranking.CONFIRM, section.confirmed_curves)]
        for stage, curves in ((stage, curves) for stage, curves in drawn if curves):
            kinds = {"training": curves.best, "evaluation": filter(None, curves.evaluated)}
            for kind, line in ((kind, line) for kind, lines in kinds.items() for line in lines):
                rows += _points(line, env=section.environment, stage=stage, returns=kind)
    return rows


def _points(line: analysis.Line, **head: str) -> list[dict[str, Any]]:
    """Return the points of a curve as rows that begin with `head`."""
    names, start = ("env_steps", "iqm", "ci95_low", "ci95_high"), {**head, "curve": line.label}
    points = zip(line.steps, line.centre, line.low, line.high, strict=True)
    return [start | dict(zip(names, map(float, point), strict=True)) for point in points]
