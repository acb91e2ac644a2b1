"""The report as one HTML page that needs no network and, but for sorting, no script.

Names and values come from files that somebody may have sent. Text goes through `escape`, data for
the script is JSON without a ``<``, and the page's own policy forbids every request and every script
but the one whose hash it states.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg.report import analysis, ranking, svg
from purejaxpg.report.analysis import Analysis, Confirmed, Section
from purejaxpg.report.ranking import Configuration
from purejaxpg.text import engineering, number, percent, short

STATIC_ROWS = 20  # of the table without a script
ROWS = 3000  # of the table with one; table.csv has all
_MARGINALS = 8
_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("page.js")


def render(data: Analysis, title: str) -> str:
    """Return the page.

    Args:
        data: what a sweep says.
        title: its name.

    Returns:
        A complete HTML document.
    """
    style = _STYLE.read_text(encoding="utf-8")
    script = _SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="generator" content="purejaxpg report">',
        f"<title>{escape(title)} · sweep report</title>",
        f"<style>{style}</style></head><body>",
        _top(data, title),
        *_body(data),
        _footer(data),
        f"<script>{script}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


_CHAPTERS = (
    ("answer", "Answer"),
    ("curves", "Learning curves"),
    ("table", "Ranking"),
    ("schedule", "Schedule"),
    ("importance", "What matters"),
    ("sensitivity", "Sensitivity"),
    ("profiles", "Profiles"),
    ("failures", "Failures"),
    ("cost", "Cost and facts"),
)


def _body(data: Analysis) -> list[str]:
    """Return the chapters that have something to say."""
    contents = {
        "answer": _answer(data),
        "curves": _curves(data),
        "table": _table(data),
        "schedule": _schedule(data),
        "importance": "" if data.population else _importance(data),
        "sensitivity": "" if data.population else _sensitivity(data),
        "profiles": _profiles(data),
        "failures": _failures(data),
        "cost": _cost(data),
    }
    kept = [(key, name) for key, name in _CHAPTERS if contents[key]]
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name in kept)
    chapters = [
        f'<section id="{key}">{f"<h2>{name}</h2>" * (key != "answer")}{contents[key]}</section>'
        for key, name in kept
    ]
    return [
        f'<nav class="bar" aria-label="Chapters"><div>{links}</div></nav>',
        f"<main>{_environments(data)}",
        *chapters,
        "</main>",
    ]


def _top(data: Analysis, title: str) -> str:
    """Return the head of the page: what was swept."""
    sections = data.sections
    runs = sum(c.planned for s in sections for c in s.ranked)
    configurations = max((len(s.ranked) for s in sections), default=0)
    noun = "member" if data.population else "configuration"
    what = [f"{configurations:,} {noun}{'' if configurations == 1 else 's'}"]
    if len(sections) > 1:
        what.append(f"{len(sections)} environments")
    what.append(f"{runs:,} {'run' if runs == 1 else 'runs'}")
    again = sum(c.configuration.planned for s in sections for c in s.confirmed)
    if again:
        what.append(f"{again:,} runs on fresh seeds")
    agent = data.identity.get("agent")
    lead = f"{escape(str(agent))} · " if agent else ""
    return (
        f'<header class="top"><h1>{escape(title)}</h1>'
        f'<p class="soft">{lead}{" · ".join(what)}</p></header>'
    )


def _environments(data: Analysis) -> str:
    """Return buttons that choose an environment; they need the script."""
    if len(data.sections) < 2:
        return ""
    names = [section.environment for section in data.sections]
    buttons = '<button type="button" aria-pressed="true">All environments</button>' + "".join(
        f'<button type="button" aria-pressed="false" data-environment="{escape(name)}">'
        f"{escape(name)}</button>"
        for name in names
    )
    return f'<div class="envs js-only">{buttons}</div>'


def _of(section: Section, content: str, many: bool, heading: bool = True) -> str:
    """Wrap what belongs to one environment, so that it can be hidden."""
    head = f"<h3>{escape(section.environment)}</h3>" if many and heading else ""
    return f'<div data-of="{escape(section.environment)}">{head}{content}</div>'


def _each(data: Analysis, contents: Iterable[str], heading: bool = True) -> str:
    """Return the contents of all environments, those without any left out."""
    many = len(data.sections) > 1
    pairs = zip(data.sections, contents, strict=True)
    return "".join(_of(section, text, many, heading) for section, text in pairs if text)


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{sentence}</li>" for sentence in sentences)
    return f'<ul class="say">{items}</ul>' if items else ""


def _percent(share: float) -> str:
    return escape(percent(share))


def _interval(low: float, high: float) -> str:
    return f"[{number(low)}, {number(high)}]"


# ----------------------------------------------------------------------------------------- answer


def _answer(data: Analysis) -> str:
    """Return one card per environment, and one for all together where winners were confirmed."""
    cards = _each(data, [_card(section, data) for section in data.sections], heading=False)
    if not cards:
        return "<p>No run is finished yet.</p>"
    overall = "".join(
        f"<p>Averaged over {escape(each.environment)}, a run of the winner beats a run of the "
        f"default with probability <b>{each.value:.2f}</b> {_interval(each.low, each.high)}.</p>"
        for each in data.overall
    )
    missing = "".join(
        f"<p><b>{escape(n)}</b></p>" for n in data.notes if n.startswith("Unfinished")
    )
    if len(data.sections) < 2:
        return missing + cards + overall
    return missing + _overview(data) + overall + _command(data) + cards


def _command(data: Analysis) -> str:
    """Return how to confirm the winners, where nothing is confirmed and something was selected."""
    chosen = [section for section in data.sections if len(section.ranked) > 1 and section.winner]
    if data.population or not chosen or any(section.confirmed for section in chosen):
        return ""
    noun = "winner" if len(chosen) == 1 else "winners"
    return f"<p>Run the {noun} again on fresh seeds:</p><pre>{escape(data.command)}</pre>"


def _overview(data: Analysis) -> str:
    """Return one line per environment: its best configuration and how good that is."""
    rows = []
    for section in data.sections:
        confirmed, winner = section.role("winner"), section.winner
        if winner is None:
            continue
        c = confirmed.configuration if confirmed else winner
        better = next((i for i in section.improvements if i.over == "default"), None)
        cells = [number(c.iqm, 4), _interval(c.low, c.high) if c.finished > 1 else "–"]
        if any(each.confirmed for each in data.sections):
            cells.append(_chance(better) if better else "–")
        tag = _standing(section, data)[0]
        name = f'<td class="left"><b>{escape(section.environment)}</b> {tag}</td>'
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr>{name}<td class="left wrap">{escape(c.label)}</td>{body}</tr>')
    beats = "<th>P(beats default)</th>" * any(each.confirmed for each in data.sections)
    return (
        '<div class="scroll overview"><table><thead><tr><th class="left">environment</th>'
        '<th class="left">best configuration</th><th>IQM</th><th>95% CI</th>'
        f"{beats}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _chance(found: analysis.Improvement) -> str:
    return f"{_percent(found.value)} [{_percent(found.low)}, {_percent(found.high)}]"


def _card(section: Section, data: Analysis) -> str:
    """Return the answer for one environment."""
    winner, confirmed = section.winner, section.role("winner")
    if winner is None:
        return ""
    shown = confirmed.configuration if confirmed else winner
    chips = "".join(
        f"<li>{escape(name)}<b>{escape(short(value))}</b></li>"
        for name, value in shown.swept.items()
    )
    tag, what = _standing(section, data)
    chart = _confirmed_chart(section) or _leaders_chart(section)
    command = _command(data) if len(data.sections) == 1 else ""
    name = f"<b>{escape(section.environment)}</b>" if section.environment else ""
    return (
        f'<article class="card" data-winner="{escape(shown.label)}">'
        f'<p class="eyebrow">{name}{tag} {what}</p>'
        f'<ul class="chips">{chips or "<li>nothing was swept</li>"}</ul>'
        f'<div class="two"><div>{_headline(section, shown)}{_list(_sentences(section, data))}'
        f"{command}</div><div>{chart}</div></div></article>"
    )


def _selected(section: Section) -> bool:
    return len(section.ranked) > 1


def _standing(section: Section, data: Analysis) -> tuple[str, str]:
    """Return how good the evidence is, as a tag and in words."""
    confirmed = section.role("winner")
    if data.population:
        return '<span class="tag unsure">one run</span>', "best member at the end of training"
    if confirmed:
        what = f"winner of the tuning stage, on {confirmed.configuration.finished} fresh seeds"
        if _best_again(section) is not confirmed:
            return '<span class="tag unsure">overtaken</span>', what
        return '<span class="tag">confirmed</span>', what
    if not _selected(section):
        return '<span class="tag">nothing selected</span>', "the only configuration"
    return '<span class="tag unsure">not confirmed</span>', "winner of the tuning stage"


def _headline(section: Section, shown: Configuration) -> str:
    """Return the large numbers."""
    runs = f"{shown.finished} {'run' if shown.finished == 1 else 'runs'}"
    interval = f" <span>{_interval(shown.low, shown.high)}</span>" if shown.finished > 1 else ""
    with_interval = ", 95% interval" if interval else ""
    items = [(f"{number(shown.iqm)}{interval}", f"final return, IQM of {runs}{with_interval}")]
    confirmed = section.role("winner")
    default = next((i for i in section.improvements if i.over == "default"), None)
    if default:
        items.append(
            (
                f"{_percent(default.value)} <span>[{_percent(default.low)}, "
                f"{_percent(default.high)}]</span>",
                "probability that a run of it beats a run of the default",
            )
        )
    if confirmed and confirmed.tuned:
        gap = confirmed.tuned.iqm - confirmed.configuration.iqm
        text = "less than its tuning score" if gap >= 0 else "more than its tuning score"
        items.append((number(abs(gap)), f"{text}, {number(confirmed.tuned.iqm)}"))
    if not confirmed and len(section.first) > 1 and shown.finished > 1:
        items.append((_percent(section.first[0]), "of resamples of the seeds put it first"))
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{text}</dt><dd>{value}</dd></div>" for value, text in items)
        + "</dl>"
    )


def _sentences(section: Section, data: Analysis) -> list[str]:
    """Return what the numbers mean, in plain words."""
    confirmed = section.role("winner")
    if data.population:
        said = ["One population is one experiment: the numbers of its members are not independent."]
    elif confirmed:
        said = [*_bias(confirmed), *_against_default(section), *_overtaken(section)]
    else:
        said = _caution(section)
    shown = confirmed.configuration if confirmed else section.ranked[0]
    if shown.diverged:
        said.append(f"{shown.diverged} of its {shown.finished} runs diverged.")
    return said + _what_matters(section)


def _bias(confirmed: Confirmed) -> list[str]:
    """Return how much of the tuning score was luck."""
    if confirmed.tuned is None or not math.isfinite(confirmed.tuned.iqm):
        return []
    before, after = confirmed.tuned.iqm, confirmed.configuration
    gap = before - after.iqm
    if gap <= 0:
        return [
            f"Its tuning score, {number(before)}, was not too high: fresh seeds do as well or "
            "better."
        ]
    surely = before > after.high
    verdict = (
        "That is the luck of having been picked (maximisation bias)"
        if surely
        else "That is within the noise of the seeds, and in the direction that picking the best "
        "of many would push it (maximisation bias)"
    )
    return [
        f"Tuning promised {number(before)}; on fresh seeds it is {number(after.iqm)}, "
        f"{number(gap)} less. {verdict}. Quote the second number."
    ]


def _against_default(section: Section) -> list[str]:
    """Return whether tuning was worth it."""
    default = section.role("default")
    found = next((i for i in section.improvements if i.over == "default"), None)
    if default is None or found is None:
        return ["The default is among the configurations above, or was not run."]
    score = f"the default ({number(default.configuration.iqm)})"
    if found.low > 0.5:
        return [f"It is better than {score}."]
    if found.high < 0.5:
        return [f"It is <b>worse</b> than {score}: the search found nothing."]
    return [f"It cannot be told from {score}: the interval of that probability includes 50%."]


def _overtaken(section: Section) -> list[str]:
    """Return a warning where another confirmed configuration did better."""
    winner, best = section.confirmed[0], _best_again(section)
    if best is winner:
        return []
    apart = best.configuration.low > winner.configuration.high
    verdict = "and the intervals do not overlap" if apart else "but the intervals overlap"
    return [
        f"On fresh seeds the {escape(best.name)} scores higher, "
        f"{number(best.configuration.iqm)}, {verdict}."
    ]


def _best_again(section: Section) -> Confirmed:
    """Return the best on fresh seeds; the winner of the tuning stage where it is as good."""
    return max(section.confirmed, key=lambda c: (c.configuration.iqm, c.configuration.mean))


def _caution(section: Section) -> list[str]:
    """Return why the winner of the tuning stage is not the last word."""
    count = sum(1 for c in section.ranked if c.rank is not None)
    if count < 2:
        return []
    said = [
        f"The best of {count:,} looks better than it is: its score includes the luck of having "
        "been picked. Confirm it before quoting its number."
    ]
    equal = sum(1 for c in section.ranked if c.rank and c.iqm == section.ranked[0].iqm)
    if equal > 1:
        said.append(f"{equal} configurations share its score; which of them is first says nothing.")
    first = section.first
    if section.ranked[0].finished < 2:
        return [*said, "With one seed per configuration, nothing says how sure the ranking is."]
    if first and first[0] < 0.5:
        rivals = sum(1 for share in first if share >= 0.05)
        said.append(f"It is no clear winner: {rivals} configurations come first in 5% or more of "
                    "the resamples.")  # fmt: skip
    return said


def _what_matters(section: Section) -> list[str]:
    """Return the hyperparameters that explain most."""
    axes = [axis for axis in section.effects.axes if axis.share >= 0.01][:3]
    if not axes:
        return []
    named = ", ".join(f"<b>{escape(a.name)}</b> {_percent(a.share)}" for a in axes)
    return [f"What matters (share of the variance of scores explained): {named}."]


def _confirmed_chart(section: Section) -> str:
    """Return scores on fresh seeds, with the tuning scores hollow."""
    if not section.confirmed:
        return ""
    rows = []
    for index, each in enumerate(section.confirmed):
        c, before = each.configuration, each.tuned
        kind = 0 if each.role == "default" else min(index + 1, 5)
        ghost = before.iqm if before else math.nan
        rows.append(svg.Row(each.name, c.iqm, c.low, c.high, kind, ghost))
    n = section.confirmed[0].configuration.finished
    return (
        f"<figure><figcaption><b>On {n} fresh seeds</b> (●, IQM with 95% interval) and in the "
        f"tuning stage (○)</figcaption>{svg.forest(rows, 460, 'scores on fresh seeds')}</figure>"
    )


def _leaders_chart(section: Section) -> str:
    """Return the scores of the best configurations."""
    leaders = [c for c in section.ranked[:5] if c.rank is not None and math.isfinite(c.iqm)]
    if len(leaders) < 2:
        return ""
    rows = [svg.Row(analysis.legend(c), c.iqm, c.low, c.high, i) for i, c in enumerate(leaders, 1)]
    over = "IQM with 95% interval over seeds" if leaders[0].finished > 1 else "one seed each"
    return (
        f"<figure><figcaption><b>The first {len(leaders)}</b> of {len(section.ranked):,}: {over}"
        f"</figcaption>{svg.forest(rows, 460, 'scores of the best')}</figure>"
    )


# ----------------------------------------------------------------------------------------- curves


def _curves(data: Analysis) -> str:
    """Return the learning curves of all environments."""
    found = _each(data, [_curve_figures(section) for section in data.sections])
    if not found:
        return ""
    return (
        '<p class="soft">Returns of the episodes that ended during training, under the stochastic '
        "policy. They show how runs went; the ranking is by the evaluation afterwards.</p>" + found
    )


def _curve_figures(section: Section) -> str:
    if section.curves is None:
        return ""
    seeds = max(c.finished for c in section.ranked)
    over = f"IQM of {seeds} seeds, shaded: 95% interval" if seeds > 1 else "one seed each"
    figures = _curve_figure(section.curves, over, "learning curves")
    if section.confirmed_curves:
        again = section.confirmed[0].configuration.finished
        caption = f"on {again} fresh seeds: IQM, shaded: 95% interval"
        figures += _curve_figure(section.confirmed_curves, caption, "curves on fresh seeds")
    return figures


def _curve_figure(curves: analysis.Curves, over: str, name: str) -> str:
    """Return one figure, drawn twice: for wide and for narrow screens."""
    others = ""
    if curves.quantiles is not None:
        others = f"{curves.count:,} others: median, middle half and 5% to 95%"
    elif curves.count:
        others = f"{curves.count} {'other' if curves.count == 1 else 'others'}"
    legend = "".join(
        f'<li><i class="k{i}"></i><span>{escape(line.label)}</span><output></output></li>'
        for i, line in enumerate(curves.best, 1)
    ) + (f"<li><i></i><span>{others}</span></li>" if others else "")
    wide, narrow = svg.curves(curves, 1040, 400, name), svg.curves(curves, 420, 320, name)
    return (
        f"<figure><figcaption>{escape(over[0].upper() + over[1:])}</figcaption>"
        f'<div class="wide-only">{wide}</div><div class="narrow">{narrow}</div>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


# ------------------------------------------------------------------------------------------ table


def _table(data: Analysis) -> str:
    """Return the ranked table: the first rows as markup, all of them as data for the script."""
    ranked = [c for section in data.sections for c in section.ranked[: ROWS // len(data.sections)]]
    if not ranked:
        return ""
    columns = _columns(data)
    fields, stops = ranking.fields(data.ranked), _stops_early(data)
    rows = [_row(c, data, fields, stops) for c in ranked]
    spread = _places(data, ranked)
    payload = {
        "columns": [
            {k: v for k, v in column.items() if k in ("kind", "down", "main")} for column in columns
        ],
        "rows": [[*row, place] for row, place in zip(rows, spread, strict=True)],
        "failed": [i for i, c in enumerate(ranked) if c.diverged],
        "environment": 1 if len(data.sections) > 1 else -1,
    }
    static = [i for i, c in enumerate(ranked) if (c.rank or 10**9) <= STATIC_ROWS]
    body = "".join(_static_row(rows[i], columns, spread[i], ranked[i]) for i in static[:100])
    hidden = len(data.ranked) - len(ranked)
    rest = f" The page holds the first {len(ranked):,}." if hidden else ""
    return (
        f'<div class="ranking"><p class="soft">{_scores_note(data)} '
        f"<code>table.csv</code> has all {len(data.ranked):,} rows in full precision, "
        f"<code>runs.csv</code> every run. Best and area (AUC) of the "
        f"training curve do not count for the ranking.{rest}</p>"
        '<div class="tools js-only"><input type="search" placeholder="search, e.g. 3e-4 tanh" '
        'aria-label="Search the table"><output></output>'
        '<button type="button">Back</button><button type="button">Next</button></div>'
        f'<div class="scroll"><table><thead>{_head(columns)}</thead><tbody>{body}</tbody></table>'
        f'</div><script type="application/json">{_json(payload)}</script></div>'
    )


def _json(value: Any) -> str:
    """Return JSON that cannot end a script element or begin a comment in one."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _scores_note(data: Analysis) -> str:
    note = next((n for n in data.notes if n.startswith("Final return")), "")
    return escape(note)


def _columns(data: Analysis) -> list[dict[str, Any]]:
    """Return the columns: name, group, class of the cells, and whether large comes first."""

    def group(title: str, names: Iterable[str], kind: str = "") -> list[dict[str, Any]]:
        return [{"name": n, "group": title, "kind": kind, "down": True} for n in names]

    columns: list[dict[str, Any]] = [{"name": "rank", "group": ""}]
    if len(data.sections) > 1:
        columns.append({"name": "environment", "group": "", "kind": "left text"})
    columns += group("final return", ["IQM"], "main") + group("final return", ["95% CI"])
    columns[-2]["main"] = True
    for name in ranking.fields(data.ranked):
        columns.append({"name": name, "group": "hyperparameters", "kind": "text"})
    columns += group("final return, too", ["mean", "greedy"])
    columns += group("during training", ["best", "AUC"])
    cost = "reliability and cost"
    columns += group(cost, ["trained"]) if _stops_early(data) else []
    return columns + group(cost, ["diverged"], "fail") + group(cost, ["env steps", "seconds"])


def _stops_early(data: Analysis) -> bool:
    """Tell whether a search stopped some configurations before their end."""
    return any(c.reached < 1 for c in data.ranked if c.finished)


def _row(c: Configuration, data: Analysis, fields: Sequence[str], stops: bool) -> list[Any]:
    """Return the cells of a configuration: text, or a key to sort by and the text."""
    half = [_rounded(c.low), _interval(c.low, c.high)] if c.finished > 1 else None
    best, area = during_training(c, data)
    done = f"{c.finished}" if c.finished == c.planned else f"{c.finished} of {c.planned}"
    share = c.diverged / c.finished if c.finished else -1
    steps, seconds = spent(c, data)
    return [
        c.rank,
        *([c.environment] if len(data.sections) > 1 else []),
        _score(c.iqm),
        half if math.isfinite(c.low) else None,
        *(_value(c.swept.get(name)) for name in fields),
        _score(c.mean),
        _score(c.greedy_iqm),
        _score(best),
        _score(area),
        *([[_rounded(c.reached), percent(c.reached)]] if stops else []),
        [_rounded(share), f"{c.diverged}/{done}"],
        [_rounded(steps), engineering(steps)] if steps else None,
        [_rounded(seconds), number(seconds)] if seconds else None,
    ]


def during_training(c: Configuration, data: Analysis) -> tuple[float, float]:
    """Return the best bin of the training curves and the area under them, IQM over runs."""
    own = [data.training[run_id] for run_id in c.run_ids if run_id in data.training]
    found = []
    for values in ([curve.best for curve in own], [curve.area for curve in own]):
        known = [value for value in values if math.isfinite(value)]
        found.append(float(analysis.stats.iqm(known)) if known else math.nan)
    return found[0], found[1]


def spent(c: Configuration, data: Analysis) -> tuple[float, float]:
    """Return environment steps and device seconds of all runs of a configuration."""
    own = [data.cost.by_run[run_id] for run_id in c.run_ids if run_id in data.cost.by_run]
    return sum(steps for steps, _ in own), sum(seconds for _, seconds in own)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _score(value: float) -> list[Any] | None:
    return [_rounded(value), number(value, 4)] if math.isfinite(value) else None


def _value(value: Any) -> Any:
    """Return a swept value as a cell."""
    if isinstance(value, float) and math.isfinite(value):
        return [value, short(value)]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return value
    return None if value is None else short(value)


def _places(data: Analysis, ranked: Sequence[Configuration]) -> list[float]:
    """Return where each score lies between the worst and the best of its environment."""
    limits = {}
    for section in data.sections:
        scores = [c.iqm for c in section.ranked if math.isfinite(c.iqm)] or [0.0]
        limits[section.environment] = (min(scores), max(scores))
    found = []
    for c in ranked:
        low, high = limits[c.environment]
        share = (c.iqm - low) / (high - low) if high > low and math.isfinite(c.iqm) else 0.0
        found.append(round(share, 3))
    return found


def _head(columns: Sequence[dict[str, Any]]) -> str:
    """Return the two rows of headings."""
    groups: list[tuple[str, int]] = []
    for column in columns:
        same = bool(groups) and groups[-1][0] == column["group"]
        groups = [*groups[:-1], (column["group"], groups[-1][1] + 1)] if same else [
            *groups, (column["group"], 1),
        ]  # fmt: skip
    above = "".join(f'<th colspan="{count}">{escape(name)}</th>' for name, count in groups)
    names = "".join(
        f'<th scope="col" data-column{_left(column)}>{escape(column["name"])}</th>'
        for column in columns
    )
    return f'<tr class="groups">{above}</tr><tr>{names}</tr>'


def _left(column: dict[str, Any]) -> str:
    return ' class="left"' if "left" in column.get("kind", "") else ""


def _static_row(
    row: Sequence[Any], columns: Sequence[dict[str, Any]], place: float, c: Configuration
) -> str:
    """Return one row as markup."""
    cells = []
    for cell, column in zip(row, columns, strict=True):
        text = "–" if cell is None else str(cell[1]) if isinstance(cell, list) else str(cell)
        kind = f' class="{column["kind"]}"' if column.get("kind") else ""
        bar = f' style="--v:{100 * place:.0f}%"' if column.get("main") else ""
        cells.append(f"<td{kind}{bar}>{escape(text)}</td>")
    failed = ' class="failed"' if c.diverged else ""
    return f"<tr{failed}>{''.join(cells)}</tr>"


# ------------------------------------------------------------------------------------- importance


def _importance(data: Analysis) -> str:
    """Return importance, marginal curves and pairs of all environments."""
    found = _each(data, [_effects(section, data) for section in data.sections])
    if not found:
        return ""
    return (
        '<p class="soft">Functional ANOVA: the share of the variance of configurations’ mean '
        "scores that one hyperparameter explains by itself, over the whole range that was "
        "searched, less what noise alone would explain. Main effects of all hyperparameters are "
        "fitted together (Hutter, Hoos and Leyton-Brown 2014).</p>" + found
    )


def _effects(section: Section, data: Analysis) -> str:
    effects = section.effects
    if not effects.axes:
        return ""
    return (
        f'<div class="two">{_share_figure(section)}{_split(section, data)}</div>'
        f"{_marginals(section)}{_heat_maps(section)}"
    )


def _share_figure(section: Section) -> str:
    axes = section.effects.axes
    top = any(math.isfinite(axis.top_share) for axis in axes)
    legend = (
        '<ul class="legend"><li><i class="k1"></i>for the score, with 95% interval</li>'
        '<li><i class="k5"></i>for being among the best quarter '
        "(PED-ANOVA: Watanabe, Bansal and Hutter 2023)</li></ul>"
        if top
        else ""
    )
    return (
        "<figure><figcaption><b>Importance</b> of each hyperparameter alone</figcaption>"
        f"{svg.shares(axes, 500, 'importance of hyperparameters')}{legend}</figure>"
    )


def _split(section: Section, data: Analysis) -> str:
    """Return how the whole variance splits up, in words."""
    effects = section.effects
    items = [
        ("single hyperparameters", percent(sum(axis.share for axis in effects.axes))),
        ("seeds (noise of the mean)", percent(effects.noise) if effects.noise == effects.noise
         else "unknown: one seed each"),
        ("interactions and the rest", percent(effects.rest)),
    ]  # fmt: skip
    pairs = [pair for pair in effects.pairs if pair.share >= 0.005]
    named = "; ".join(f"{p.first} × {p.second} {percent(p.share)}" for p in pairs)
    items.append(("of which pairs", named or "no pair with 1%"))
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in items)
    said = [
        f"Computed from {effects.scores.size:,} configurations"
        + (
            f", all after {_percent(effects.reached)} of their updates"
            if effects.reached < 1
            else ""
        )
        + "."
    ]
    if (data.identity.get("search") or {}).get("method") == "optuna":
        said.append(
            "The search looked where it expected good scores; so importance is about that region."
        )
    weak = [axis.name for axis in effects.axes if axis.low <= 0.0]
    if weak:
        said.append(f"Not distinguishable from no effect: {escape(', '.join(weak))}.")
    said.append(
        "Importance depends on the range: what was searched narrowly looks unimportant, and a "
        "range with useless values makes any hyperparameter important."
    )
    return (
        f'<div><h3>Where the variance comes from</h3><dl class="kv">{rows}</dl>{_list(said)}</div>'
    )


def _marginals(section: Section) -> str:
    """Return the score over each of the most important hyperparameters."""
    effects = section.effects
    axes = effects.axes[:_MARGINALS]
    inner = np.quantile(effects.scores, [0.02, 1.0])
    ends = [a.effects + sign * a.errors for a in axes for sign in (-1, 1)]
    low = float(min(inner[0], *(e.min() for e in ends)))
    high = float(max(inner[1], *(e.max() for e in ends)))
    margin = 0.05 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    inside = effects.scores >= limits[0]
    figures = "".join(
        f"<figure><figcaption><b>{escape(axis.name)}</b></figcaption>"
        f"{svg.marginal(axis, axis.levels.values[inside], effects.scores[inside], limits, 340)}"
        "</figure>"
        for axis in axes
    )
    out = int((~inside).sum())
    below = f" {out} of the worst configurations lie below the drawing." if out else ""
    legend = (
        '<ul class="legend"><li><i class="k1"></i>mean, the others averaged out, 95% interval</li>'
        '<li><i class="k2"></i>best configuration at this value</li>'
        "<li><i></i>configurations</li></ul>"
    )
    return (
        "<h3>Score over each hyperparameter</h3>"
        f'<p class="soft">Mean final return of configurations.{below}</p>{legend}'
        f'<div class="tiles">{figures}</div>'
    )


def _heat_maps(section: Section) -> str:
    pairs = section.effects.pairs
    if not pairs:
        return ""
    figures = "".join(
        f"<figure>{svg.heat_map(pair, 350)}<figcaption>interaction: "
        f"{_percent(pair.share)} of the variance</figcaption></figure>"
        for pair in pairs
    )
    return (
        '<h3>Pairs that explain most</h3><p class="soft">Mean final return; '
        'low <span class="ramp"></span> high. Dashed: not tried.</p>'
        f'<div class="tiles">{figures}</div>'
    )


# ------------------------------------------------------------------------------------- whole sweep


_CITE = (
    "Adkins, Bowling and White, <cite>A Method for Evaluating Hyperparameter Sensitivity in "
    "Reinforcement Learning</cite>, NeurIPS 2024 (arXiv:2412.07165)"
)


def _sensitivity(data: Analysis) -> str:
    """Return the gain of tuning per environment."""
    if len(data.ranked) < 2:
        return ""
    cross = data.cross
    if cross is None:
        return (
            "<p>Hyperparameter sensitivity is what tuning for each environment gains over the one "
            "setting that is best on average. It needs several environments with the same "
            f"configurations: sweep <code>env</code>, too. ({_CITE}.)</p>"
        )
    found = cross.sensitivity
    ends = [number(end, 2) for end in cross.interval or ()]
    interval = f" <span>[{', '.join(ends)}]</span>" if ends else ""
    items = [
        (number(found.value, 2) + interval, "sensitivity: tuned per environment less common"),
        (number(found.tuned, 2), "mean normalised score, tuned for each environment"),
        (number(found.cross, 2), "mean normalised score of the best common setting"),
    ]
    if cross.dimensionality:
        text = "effective dimensionality: to be tuned per environment for 95%"
        items.append((f"{cross.dimensionality.effective} of {len(cross.names)}", text))
    head = "".join(f"<div><dt>{text}</dt><dd>{value}</dd></div>" for value, text in items)
    own, common = cross.normalized_best
    chart = svg.dumbbells(cross.environments, own, common, 480, "tuned and common")
    setting = ", ".join(f"{k} {short(v)}" for k, v in cross.best_cross.items())
    return (
        f'<dl class="facts">{head}</dl><div class="two"><div><figure>{chart}</figure></div><div>'
        f"<p>Best common setting: <b>{escape(setting)}</b>, from {cross.settings:,} settings that "
        f"finished everywhere.</p>{_dimensions(data)}"
        '<p class="soft">Scores are normalised per environment: 0 is the 5th, 1 the 95th '
        "percentile of the settings. The best of noisy scores is too high, most of all when each "
        "environment may choose its own: with few seeds the sensitivity is overestimated. "
        f"{_CITE}.</p></div></div>"
    )


def _dimensions(data: Analysis) -> str:
    """Return what tuning only some hyperparameters achieves."""
    assert data.cross is not None
    found = data.cross.dimensionality
    if found is None:
        return (
            '<p class="soft">Effective dimensionality needs settings that share values, a full '
            "grid.</p>"
        )
    rows = "".join(
        f"<tr><td>{size}</td><td class='left'>{escape(', '.join(data.cross.names[i] for i in own))}"
        f"</td><td>{number(score)}</td></tr>"
        for size, (own, score) in enumerate(zip(found.subsets, found.scores, strict=True))
    )
    return (
        '<div class="scroll"><table><thead><tr><th>tuned</th><th class="left">which</th>'
        f"<th>normalised score</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _profiles(data: Analysis) -> str:
    """Return performance profiles and probabilities of improvement."""
    improvements = [each for section in data.sections for each in section.improvements]
    parts = []
    if data.profile:
        legend = "".join(
            f'<li><i class="k{i}"></i>{escape(line[0])}</li>'
            for i, line in enumerate(data.profile.lines, 1)
        )
        parts.append(
            "<figure><figcaption><b>Performance profile</b>: share of runs above a final return, "
            f"95% band</figcaption>{svg.profile(data.profile, 520, 'performance profiles')}"
            f'<ul class="legend">{legend}</ul></figure>'
        )
    if improvements:
        parts.append(_improvement_figure(data, improvements))
    if not parts:
        return ""
    note = (
        '<p class="soft">Agarwal et al. 2021: a profile that lies above another everywhere is '
        "better everywhere; the probability of improvement says how sure a gain is, not how "
        "large."
    )
    if data.profile and data.profile.normalized:
        note += " Scores are normalised: 0 is the 5th, 1 the 95th percentile of configurations."
    if not any(section.confirmed for section in data.sections):
        note += " From the tuning stage, so the best is flattered."
    return f'{note}</p><div class="two">{"".join(parts)}</div>'


def _improvement_figure(data: Analysis, found: Sequence[analysis.Improvement]) -> str:
    rows, many = [], len(data.sections) > 1
    for each in [*found, *data.overall]:
        name = f"{each.environment} · {each.over}" if many else each.over
        kind = 2 if each in data.overall else 1
        rows.append(svg.Row(name, each.value, each.low, each.high, kind))
    name = "probability of improvement"
    chart = svg.forest(rows, 460, name, 0.5, "50%: no difference", percent)
    return (
        "<figure><figcaption><b>Probability of improvement</b> of the best over…</figcaption>"
        f"{chart}</figure>"
    )


def _schedule(data: Analysis) -> str:
    """Return how the best members' hyperparameters changed."""
    parts = []
    for environment, found in data.schedules:
        figures = "".join(
            f"<figure><figcaption><b>{escape(name)}</b></figcaption>{drawn}</figure>"
            for name in found.values
            if (drawn := svg.schedule(found, name, 380))
        )
        head = f"<h3>{escape(environment)}</h3>" if len(data.schedules) > 1 else ""
        parts.append(
            f'<div data-of="{escape(environment)}">{head}<p>The best member went through '
            f"{len(found.steps)} generations and copied another member {found.copied} times. In "
            "colour: the hyperparameters under which its weights were trained, followed back "
            f'through the members it copied. Grey: all members.</p><div class="tiles">{figures}'
            "</div></div>"
        )
    return "".join(parts)


def _failures(data: Analysis) -> str:
    """Return how often runs diverged, by hyperparameter value."""
    runs = [r for r in data.runs if r["status"] != "pending"]
    if not runs:
        return ""
    failed = sum(run["status"] == "diverged" for run in runs)
    if not failed:
        low, high = analysis.stats.wilson_interval(0, len(runs))
        return f"<p>No run of {len(runs):,} diverged (95% interval: up to {100 * high:.2g}%).</p>"
    low, high = analysis.stats.wilson_interval(failed, len(runs))
    lead = (
        f"<p><b>{failed:,} of {len(runs):,} runs diverged</b>, {100 * failed / len(runs):.2g}% "
        f"[{100 * low:.2g}%, {100 * high:.2g}%]. They count as the worst score of their "
        "environment.</p>"
    )
    return lead + _each(data, [_failure_tables(section) for section in data.sections])


def _failure_tables(section: Section) -> str:
    """Return the rate at each value of the hyperparameters where it differs most."""

    def spread(axis: analysis.Axis) -> float:
        rates = [k / n for k, n in axis.failures if n]
        return max(rates, default=0.0) - min(rates, default=0.0)

    axes = sorted(section.effects.axes, key=spread, reverse=True)[:3]
    figures = []
    for axis in axes:
        rows = []
        for label, (failed, runs) in zip(axis.levels.labels, axis.failures, strict=True):
            if runs:
                ends = analysis.stats.wilson_interval(failed, runs)
                text = f"{label}: {failed} of {runs}"
                rows.append(svg.Row(text, failed / runs, *ends, 2 if failed else 0))
        if spread(axis) > 0 and rows:
            name = f"failure rate over {axis.name}"
            chart = svg.forest(rows[:12], 340, name, form=percent)
            figures.append(
                f"<figure><figcaption><b>{escape(axis.name)}</b>: share of runs that diverged"
                f"</figcaption>{chart}</figure>"
            )
    return f'<div class="tiles">{"".join(figures)}</div>' if figures else ""


def _cost(data: Analysis) -> str:
    """Return what was spent, and what produced the numbers."""
    cost = data.cost
    items = []
    if cost.env_steps:
        items.append((engineering(cost.env_steps), "environment steps"))
    if cost.wall_s:
        items.append((_duration(cost.wall_s), "computing"))
        items.append((engineering(cost.env_steps / cost.wall_s), "environment steps per second"))
    if cost.compile_s:
        items.append((_duration(cost.compile_s), "compiling"))
    head = "".join(f"<div><dt>{text}</dt><dd>{value}</dd></div>" for value, text in items)
    of_agent = {"agent": "agent", "agent source": "agent_source"}
    facts = {name: str(data.identity.get(key, "")) for name, key in of_agent.items()} | data.facts
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value
    )
    spec = (
        f"<details><summary>The sweep file</summary><pre>{escape(data.spec_text)}</pre></details>"
        if data.spec_text.strip()
        else ""
    )
    return (f'<dl class="facts">{head}</dl>' if head else "") + (
        f'<dl class="kv">{rows}</dl>{spec}' if rows or spec else ""
    )


def _duration(seconds: float) -> str:
    """Return a time such as 2 h 5 min."""
    if seconds < 100:
        return f"{number(seconds, 2)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min"


def _footer(data: Analysis) -> str:
    """Return the notes."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in data.notes)
    return (
        f"<footer><h3>Notes</h3><ul>{notes}</ul><p>Beside this page: figures as PNG and SVG, "
        "tables as CSV. The page is complete in itself and asks nothing of the network.</p>"
        "</footer>"
    )
