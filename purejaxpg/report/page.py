"""The report as one HTML page that needs no network.

Names and values come from files that somebody may have sent. The template escapes all text, data
for the scripts is JSON without a ``<``, and the page's own policy forbids every request and every
script but the two whose hashes it states.
"""

import base64
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from purejaxpg.report import analysis, charts, completions, ranking, tables
from purejaxpg.report.analysis import Analysis, Confirmed, Section
from purejaxpg.report.charts import Figure, Row
from purejaxpg.report.ranking import Configuration
from purejaxpg.text import count, duration, engineering, interval, number, percent, short

if TYPE_CHECKING:
    from purejaxpg.report.together import Together

STATIC_ROWS = 20  # of the table without scripts
ROWS = 10_000  # of the table with them; table.csv has all
_CURVES = 2_000  # configurations whose curves can be picked, at most
_CURVE_POINTS = 30
_MARGINALS = 8
_REWARD = " reward"  # ends the name of a column of samples with the rewards of another
_SCORED = 50  # configurations in the table of further scores, at most
NONE: Mapping[str, Any] = {}
EQUAL_KL = (
    "A smaller price of divergence buys a larger return: compare configurations at equal KL, in "
    "{}, and not by their rank."
)
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Now:
    """How far a sweep is while it runs.

    Attributes:
        share: of all its steps, from 0 to 1.
        words: about its progress, such as the time that is left.
        every_s: seconds until the page is written again.
        written: when this one was written, in seconds since 1970.
    """

    share: float
    words: tuple[str, ...]
    every_s: float
    written: float

    @property
    def clock(self) -> str:
        """The time at which the page was written."""
        return time.strftime("%H:%M:%S", time.localtime(self.written))


def render(
    data: Analysis,
    title: str,
    written: completions.Texts = completions.NOTHING,
    now: Now | None = None,
    metrics: Mapping[str, analysis.Metrics] = NONE,
    robust: Sequence[tables.Table] = (),
) -> str:
    """Return the page.

    Args:
        data: the results.
        title: the name of the sweep.
        written: further scores, samples and frontier, as those of language models.
        now: how far the sweep is; None: it does not run. The page of a running sweep loads itself
            again when there is a new one.
        robust: the rankings over conditions.
        metrics: the training metrics of each environment.

    Returns:
        A complete HTML document.
    """
    table, drawn = _table(data), _Charts()
    text = _environment().get_template("page.html.j2").render(
        data=data, title=title, now=now, chart=drawn.add, charts=charts, figures=drawn.figures,
        table=table, robust=robust,
        sections=[_of_section(section, data, table, metrics) for section in data.sections],
        many=len(data.sections) > 1, percent=percent,
        **_parts(), **_of_sweep(data), **_of_texts(written),
    )  # fmt: skip
    return text.lstrip()  # the definitions of the template leave empty lines


def render_together(data: "Together", title: str) -> str:
    """Return the page of several result directories.

    Args:
        data: the comparison.
        title: of the page.

    Returns:
        A complete HTML document.
    """
    drawn, many = _Charts(), len(data.environments) > 1
    kind = "normalised final return" if data.normalized else "final return"
    rows = [Row(m.name, m.iqm, m.low, m.high, charts.colour(i)) for i, m in enumerate(data.methods)]
    pairs = [Row(each.over, each.value, each.low, each.high) for each in data.improvements]
    text = _environment().get_template("together.html.j2").render(
        data=data, title=title, chart=drawn.add, charts=charts, figures=drawn.figures, many=many,
        scores=charts.forest(rows, title=kind), kind=kind,
        improvement=charts.forest(pairs, 0.5, "50%: no difference", percent) if pairs else None,
        **_parts(),
    )  # fmt: skip
    return str(text).lstrip()


class _Grids:
    """The steps of curves, each kept once."""

    def __init__(self) -> None:
        self.known: dict[tuple[float | None, ...], int] = {}

    def place(self, grid: tuple[float | None, ...]) -> int:
        """Return the number of a grid."""
        return self.known.setdefault(grid, len(self.known))


class _Charts:
    """The charts of a page, in the order of their places."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []

    def add(self, figure: Figure, label: str, kind: str = "") -> Any:
        """Return the place of a chart; the script draws it when it scrolls into view."""
        from markupsafe import Markup

        self.figures.append(figure)
        height = figure.get("layout", {}).get("height", 420)
        text = (
            '<div class="chart {}" data-chart="{}" role="img" aria-label="{}" '
            'style="height:{}px"></div>'
        )
        return Markup(text).format(kind, len(self.figures) - 1, label, height)


def _parts() -> dict[str, Any]:
    """Return the style and the scripts of a page, and the hashes that its policy allows."""
    from markupsafe import Markup
    from plotly import offline

    scripts = [(_HERE / "page.js").read_text(encoding="utf-8"), offline.get_plotlyjs()]
    return {
        "style": Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        "scripts": [Markup(script) for script in scripts],
        "hashes": [_hash(script) for script in scripts],
    }


def render_stages(
    title: str,
    stages: Sequence[Mapping[str, Any]],
    text: str,
    frontier: bytes = b"",
    kind: str = "stage",
    now: Now | None = None,
) -> str:
    """Return the page of a pipeline, which links to the pages of its stages, or of agents.

    Args:
        title: the name of the pipeline.
        stages: in order; each with `name`, `agent`, `given`, `link`, `finished`, `planned`,
            `diverged` and its `ranked` configurations.
        text: the sweep file.
        frontier: a PNG picture of all stages that can be compared; empty if there are none.
        kind: "stage" or "agent".
        now: as for `render`, about the present stage.

    Returns:
        A complete HTML document without a script.
    """
    from markupsafe import Markup

    page = _environment().get_template("stages.html.j2").render(
        title=title, stages=stages, text=text, kind=kind, now=now,
        equal_kl=EQUAL_KL.format("this figure"),
        frontier=base64.b64encode(frontier).decode(),
        few=analysis.few(max((c.finished for stage in stages for c in stage["ranked"]), default=0)),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
    )  # fmt: skip
    return str(page).lstrip()


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # The filter `tojson` also escapes what could end a script element.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {
        "number": number, "percent": percent, "short": short, "engineering": engineering,
        "interval": interval, "chance": chance, "duration": duration, "counted": counted,
        "few": analysis.few,
    }  # fmt: skip
    environment.tests["finite"] = math.isfinite
    return environment


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def counted(size: int, noun: str) -> str:
    """Return a count such as ``1,000 runs``."""
    return f"{size:,}{count(size, noun).removeprefix(str(size))}"


def chance(improvement: analysis.Improvement) -> str:
    """Return a probability with its interval."""
    return f"{percent(improvement.value)} {interval(improvement.low, improvement.high, percent)}"


def _of_sweep(data: Analysis) -> dict[str, Any]:
    """Return the template's values that concern the whole sweep."""
    runs = [run for run in data.runs if run["status"] != "pending"]
    failed = sum(run["status"] == "diverged" for run in runs)
    improvements = [each for section in data.sections for each in section.improvements]
    chosen = [section for section in data.sections if len(section.ranked) > 1 and section.winner]
    winners = min(len(data.robust), len(chosen)) if data.robust else len(chosen)
    confirmed = any(section.confirmed for section in data.sections)
    of_agent = {"agent": "agent", "agent source": "agent_source"}
    facts = {name: str(data.identity.get(key, "")) for name, key in of_agent.items()}
    return {
        "planned": sum(c.planned for c in data.ranked),
        "again": sum(c.configuration.planned for s in data.sections for c in s.confirmed),
        "confirmed": confirmed,
        "to_confirm": 0 if data.population or confirmed or not data.command else winners,
        "profile": data.profile and charts.profile(data.profile),
        "improvement": _improvement_figure(data, improvements) if improvements else None,
        "common": _common(data),
        "schedules": [
            (name, history, [(n, charts.schedule(history, n)) for n in history.values])
            for name, history in data.schedules
        ],
        "runs": len(runs),
        "failed": failed,
        "failed_ends": analysis.stats.wilson_interval(failed, len(runs)) if runs else None,
        "optuna": (data.identity.get("search") or {}).get("method") == "optuna",
        "most": max((len(section.ranked) for section in data.sections), default=0),
        "facts_of": facts | data.facts,
    }


def _improvement_figure(data: Analysis, improvements: Sequence[analysis.Improvement]) -> Figure:
    many, rows = len(data.sections) > 1, []
    for each in [*improvements, *data.overall]:
        name = f"{each.environment} · {each.over}" if many else each.over
        colour = "c2" if each in data.overall else "c1"
        rows.append(Row(name, each.value, each.low, each.high, colour))
    return charts.forest(rows, 0.5, "50%: no difference", percent)


def _common(data: Analysis) -> Figure | None:
    """Return the chart of tuned and common settings over environments."""
    if data.cross is None:
        return None
    scores = zip(data.cross.environments, *data.cross.normalized_best.tolist(), strict=True)
    rows = [Row(name, own, before=common) for name, own, common in scores]
    return charts.forest(rows, title="normalised score: ● tuned here   ○ best common setting")


# --------------------------------------------------------------------------------- language models


def _of_texts(written: completions.Texts) -> dict[str, Any]:
    """Return the template's values that concern language models."""
    seeds = max((row.configuration.finished for row in written.rows), default=0)
    return {
        "written": written,
        "scored": written.rows[:_SCORED],
        "seeds_scored": seeds,
        "few": analysis.few(seeds),
        "samples": [(each["label"], _samples(each["columns"])) for each in written.samples],
        "equal_kl": EQUAL_KL,
    }


def _samples(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return each sample as its prompt and its texts, each with its reward, if it has one."""
    rewards = {name for name in columns if name.endswith(_REWARD)}
    texts = [name for name in columns if name not in {"prompt", *rewards}]
    found = []
    for i in range(min(map(len, columns.values()), default=0)):
        own = [columns[name + _REWARD][i] for name in texts if name + _REWARD in rewards]
        most = max(own, default=None) if len(set(own)) > 1 else None
        shown = []
        for name in texts:
            reward = columns[name + _REWARD][i] if name + _REWARD in rewards else None
            best = reward is not None and reward == most
            shown.append({"name": name, "text": columns[name][i], "reward": reward, "best": best})
        found.append({"prompt": columns.get("prompt", [""] * (i + 1))[i], "texts": shown})
    return found


# ------------------------------------------------------------------------------------ environments


def _of_section(
    section: Section,
    data: Analysis,
    table: dict[str, Any],
    metrics: Mapping[str, analysis.Metrics],
) -> dict[str, Any]:
    """Return the template's values that concern one environment."""
    confirmed = section.role("winner")
    shown = confirmed.configuration if confirmed else section.winner
    rows = {id(c): row for row, c in enumerate(table["ranked"])}
    own = [(rows[id(c)], c) for c in section.ranked if id(c) in rows]
    best = section.curves.best if section.curves else ()
    specs = data.identity.get("sweep") or {}
    of_runs = metrics.get(section.environment, analysis.Metrics())
    return {
        "metrics": of_runs,
        "tiles": _tiles(of_runs, rows, data.unit, table["grids"]),
        "picked": [
            (rows[id(c)], c.label) for c in of_runs.shown[: analysis.HIGHLIGHTED] if id(c) in rows
        ],
        "all": section,
        "name": section.environment,
        "shown": shown,
        "confirmed": confirmed,
        "wins": shown is not None and _wins(shown, data),
        "over_default": _over_default(section),
        "best": _best_again(section),
        "certain": [axis for axis in section.effects.axes if axis.clear],
        "uncertain": [axis for axis in section.effects.axes if not axis.clear],
        "scores": _scores_figure(section),
        "rows": [rows.get(id(line.configuration), -1) for line in best],
        "seeds": max((c.finished for c in section.ranked), default=0),
        "marginals": _marginals(section),
        "parallel": None if data.population else charts.parallel(section, own, specs),
        "failures": _failure_figures(section),
    }


def _tiles(
    metrics: analysis.Metrics, rows: Mapping[int, int], unit: str, grids: _Grids
) -> list[tuple[str, Figure]]:
    """Return the name and the chart of each training metric."""
    tiles = []
    for name in metrics.names:
        stacks = {rows[id(c)]: metrics.stack(name, c) for c in metrics.shown if id(c) in rows}
        known = {row: curve for row, curve in stacks.items() if curve is not None}
        if any(np.isfinite(curve.returns).any() for curve in known.values()):
            tiles.append((name, charts.metric(name, unit, known, grids.place)))
    return tiles


def _wins(shown: Configuration, data: Analysis) -> bool:
    """Return whether a configuration, the best in its condition, is what a sweep would confirm."""
    chosen = [over.parts[over.ranked[0].key] for over in data.robust if over.ranked[0].rank]
    return not data.robust or any(shown is each for own in chosen for each in own)


def _over_default(section: Section) -> analysis.Improvement | None:
    return next((each for each in section.improvements if each.over == "default"), None)


def _best_again(section: Section) -> Confirmed | None:
    """Return the best on fresh seeds; the winner of the tuning stage if it is as good."""
    return max(
        section.confirmed, key=lambda c: (c.configuration.iqm, c.configuration.mean), default=None
    )


def _scores_figure(section: Section) -> tuple[str, str, Figure] | None:
    """Return caption and chart of the scores on fresh seeds, or of the best configurations."""
    if section.confirmed:
        rows = []
        for index, each in enumerate(section.confirmed, 1):
            c, before = each.configuration, each.tuned.iqm if each.tuned else math.nan
            rows.append(Row(each.name, c.iqm, c.low, c.high, f"c{min(index, 5)}", before))
        seeds = section.confirmed[0].configuration.finished
        text = " (●, IQM with 95% interval) and in the tuning stage (○)"
        return f"On {seeds} fresh seeds", text, charts.forest(rows)
    leaders = [c for c in section.ranked[:5] if c.rank is not None and math.isfinite(c.iqm)]
    if len(leaders) < 2:
        return None
    rows = [
        Row(analysis.legend(c), c.iqm, c.low, c.high, f"c{i}") for i, c in enumerate(leaders, 1)
    ]
    over = "IQM with 95% interval over seeds" if leaders[0].finished > 1 else "one seed each"
    text = f" of {len(section.ranked):,}: {over}"
    return f"The first {len(leaders)}", text, charts.forest(rows)


def _marginals(section: Section) -> dict[str, Any] | None:
    """Return the scores over the most important hyperparameters."""
    axes, scores = section.effects.axes[:_MARGINALS], section.effects.scores
    if not axes:
        return None
    ends = np.concatenate([a.effects + s * np.nan_to_num(a.errors) for a in axes for s in (-1, 1)])
    low = float(min(np.quantile(scores, 0.02), ends.min()))
    high = float(max(scores.max(), ends.max()))
    limits = analysis.readable(low, high)
    figures = [(a.name, charts.marginal(a, scores, limits)) for a in axes]
    bare = all(not np.isfinite(axis.errors).any() for axis in axes)
    return {"figures": figures, "below": int((scores < limits[0]).sum()), "bare": bare}


def _failure_figures(section: Section) -> list[tuple[str, Figure]]:
    """Return the rate at each value of the hyperparameters for which it differs most."""
    figures = []
    for axis in section.effects.axes:
        known = [
            (label, failed, runs)
            for label, (failed, runs) in zip(axis.levels.labels, axis.failures, strict=True)
            if runs
        ]
        rates = [failed / runs for _, failed, runs in known]
        rows = [
            Row(f"{label}: {failed} of {runs}", failed / runs,
                *analysis.stats.wilson_interval(failed, runs), "c2" if failed else "grey")
            for label, failed, runs in known[:12]
        ]  # fmt: skip
        spread = max(rates, default=0.0) - min(rates, default=0.0)
        figures.append((spread, axis.name, charts.forest(rows, form=percent)))
    figures.sort(key=lambda figure: -figure[0])
    return [(name, figure) for spread, name, figure in figures[:3] if spread > 0]


# ------------------------------------------------------------------------------------------- table


def _table(data: Analysis) -> dict[str, Any]:
    """Return the ranked table: columns, and rows of cells, each a value or a value and its text."""
    most = ROWS // max(1, len(data.sections))
    ranked, rows = [], []
    columns = _columns(data)
    for section in data.sections:
        scores = np.array([c.iqm for c in section.ranked])
        low, high = (np.nanmin(scores), np.nanmax(scores)) if np.isfinite(scores).any() else (0, 0)
        for c in section.ranked[:most]:
            share = (c.iqm - low) / (high - low) if high > low and math.isfinite(c.iqm) else 0.0
            rows.append([*(read(c) for _, read in columns), round(float(share), 2)])
            ranked.append(c)
    best = [row for row, c in enumerate(ranked) if (c.rank or ROWS) <= STATIC_ROWS]
    groups = itertools.groupby(column["group"] for column, _ in columns)
    return {
        "ranked": ranked,
        "static": [(row, rows[row]) for row in best[:100]],
        "groups": [(name, len(list(members))) for name, members in groups],
        "columns": [column for column, _ in columns],
        "rows": rows,
        "failed": [i for i, c in enumerate(ranked) if c.diverged],
        **_pickable(data, ranked),
    }


def _columns(data: Analysis) -> list[tuple[dict[str, Any], Callable[[Configuration], Any]]]:
    """Return the columns, each with a function that reads its cell from a configuration."""

    def column(group: str, name: str, read: Callable[[Configuration], Any], kind: str = "") -> Any:
        # The first click on a column of numbers puts large values first.
        return {"name": name, "group": group, "kind": kind, "down": bool(group)}, read

    final, cost = "final return", "reliability and cost"
    stops = any(c.reached < 1 for c in data.ranked if c.finished)
    return [
        column("", "rank", lambda c: c.rank),
        *[column("", "environment", lambda c: c.environment, "left text")]
        * (len(data.sections) > 1),
        column(final, "IQM", lambda c: _cell(c.iqm, _score), "main"),
        column(final, "95% CI", _interval_cell),
        *(
            column("hyperparameters", name, functools.partial(_value, name), "text")
            for name in ranking.fields(data.ranked)
        ),
        column("final return, too", "mean", lambda c: _cell(c.mean, _score)),
        *[column("final return, too", "greedy", lambda c: _cell(c.greedy_iqm, _score))]
        * data.greedy,
        *[
            column("during training", "best", lambda c: _cell(data.during_training(c)[0], _score)),
            column("during training", "AUC", lambda c: _cell(data.during_training(c)[1], _score)),
        ]
        * bool(data.training),
        *[column(cost, "trained", lambda c: _cell(c.reached, percent))] * stops,
        column(cost, "diverged", _failed_cell, "fail"),
        column(
            cost,
            data.unit.replace("environment", "env"),
            lambda c: _cell(data.spent(c)[0] or math.nan, engineering),
        ),
        column(cost, "seconds", lambda c: _cell(data.spent(c)[1] or math.nan, number)),
    ]


def _score(value: float) -> str:
    return number(value, 4)


def _interval_cell(c: Configuration) -> Any:
    return _cell(c.low, lambda low: interval(low, c.high)) if c.finished > 1 else None


def _failed_cell(c: Configuration) -> Any:
    done = f"{c.finished}" if c.finished == c.planned else f"{c.finished} of {c.planned}"
    return _cell(c.diverged / (c.finished or 1), lambda _: f"{c.diverged}/{done}")


def _cell(value: float, form: Callable[[float], str]) -> Any:
    """Return a number to sort by, with its text unless that is the same."""
    if not math.isfinite(value):
        return None
    key, text = float(f"{value:.4g}"), form(value)
    return key if text == f"{key:g}" else [key, text]


def _value(name: str, c: Configuration) -> Any:
    """Return a swept value as a cell; the script sorts a text that is a number by the number."""
    value = c.swept.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return value
    return None if value is None else short(value)


def _pickable(data: Analysis, ranked: Sequence[Configuration]) -> dict[str, Any]:
    """Return the curves that can be picked in the table: row -> grid and returns; and the grids."""
    rows = {id(c): row for row, c in enumerate(ranked)}
    grids = _Grids()
    curves: dict[int, list[Any]] = {}
    most = _CURVES // max(1, len(data.sections))
    for section in data.sections:
        for c, steps, centre in (section.curves.others if section.curves else ())[:most]:
            every = -(-steps.size // (_CURVE_POINTS if len(ranked) > 200 else steps.size))
            place = grids.place(tuple(charts.rounded(steps[::every])))
            if id(c) in rows:
                curves[rows[id(c)]] = [place, charts.rounded(centre[::every])]
    return {"curves": curves, "grids": grids}
