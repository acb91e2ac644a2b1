"""The page of the report: valid, safe, quick, and alive in a browser."""

import base64
import csv
import hashlib
import html.parser
import itertools
import json
import re
import time

import browser
import numpy as np
import pytest
import synthetic_sweep
from plotly import graph_objects, offline
from rich.console import Console

from purejaxpg.report import analysis, charts, completions, page, ranking, together, writer
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store
from purejaxpg.text import number, short

VOID = {"meta", "br", "input", "link", "img", "hr"}
PLOTLY = offline.get_plotlyjs()
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&\"'$\\alpha"


class Checker(html.parser.HTMLParser):
    """Collects unbalanced tags, the text, every attribute and the content of scripts."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.faults, self.attributes, self.text = [], [], [], []
        self.scripts, self.ids = [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.faults.append((tag, self.getpos(), self.open[-3:]))
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)


def check(text):
    """Parse a page and assert what holds for every one of them."""
    found = Checker()
    found.feed(text)
    found.close()
    assert not found.faults and not found.open
    assert text.startswith("<!DOCTYPE html>") and len(found.ids) == len(set(found.ids))
    # Nothing is fetched, nothing leads elsewhere, nothing runs but the two scripts.
    references = [v for _, name, v in found.attributes if name in ("src", "href", "data", "action")]
    assert all(value.startswith("#") for value in references)
    assert text.count(PLOTLY) == 1
    assert not re.search(r"url\(|@import|https?://", text.replace(PLOTLY, ""))
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert [attrs.get("type") for attrs, _ in found.scripts] == ["application/json", None, None]
    targets = {value[1:] for value in references}
    assert targets <= set(found.ids)
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", " ".join(found.text))
    data = data_of(found)
    assert not re.search(r"[<>\u2028\u2029]", found.scripts[0][1])
    places = [value for _, name, value in found.attributes if name == "data-chart"]
    assert places == [str(index) for index in range(len(data["figures"]))]
    for figure in data["figures"]:
        if "data" in figure:
            graph_objects.Figure(painted(figure))  # refuses what plotly does not know
    return found


def words_of(found):
    """The text of a page in one line."""
    return " ".join(" ".join(found.text).split())


def painted(value):
    """A figure with a colour wherever the script of the page will put one."""
    if isinstance(value, dict):
        return {key: painted(each) for key, each in value.items()}
    if isinstance(value, list):
        return [painted(each) for each in value]
    return "#123456" if isinstance(value, str) and re.fullmatch(r"@\w+( \w\w)?", value) else value


def refuse(constant):
    raise AssertionError(constant)


def rendered(path, *texts):
    with Store.read(path) as store:
        data = analysis.of_store(store)
        metrics = analysis.metrics_of(store, data)
        return page.render(data, path.name, *texts, metrics=metrics)


def written(path):
    """What a language model may have written, with markup, for the configurations of a sweep."""
    with Store.read(path) as store:
        ranked = ranking.rank(store)
    names = ("evaluation/return", "evaluation/kl")
    rows = [
        completions.Row(
            f"{NASTY}{c.rank}", c,
            tuple((seed, dict.fromkeys(names, c.rank + seed / 10)) for seed in range(2)),
            dict.fromkeys(names, completions.Mean(c.rank + 0.05, c.rank + 0.0, c.rank + 0.1)),
        )
        for c in ranked
    ]  # fmt: skip
    columns = {
        "prompt": ["<b>this</b>", NASTY],
        "reference": ["<pad> bad", NASTY],
        "reference reward": [-1.0, 0.5],
        "policy": ["good <end>", NASTY],
        "policy reward": [1.25, 0.5],
    }
    samples = [{"label": f"{NASTY}{i}", "columns": columns} for i in range(2)]
    frontier = {"kl": [0.0, 1.0, 8.0], "return": [0.0, 2.0, 9.0], "exact": True}
    return completions.Texts(names, tuple(rows), (frontier,), samples)


def data_of(found):
    """The data of the scripts."""
    return json.loads(found.scripts[0][1], parse_constant=refuse)


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Directory and page of each kind of sweep, made once."""
    known, directory = {}, tmp_path_factory.mktemp("page")

    def get(kind):
        if kind not in known:
            sizes = {"large_random": [60]}.get(kind, [])
            path = getattr(synthetic_sweep, kind)(directory / kind.replace("_", "-"), *sizes)
            known[kind] = (path, rendered(path))
        return known[kind]

    return get


@pytest.fixture(scope="module")
def small(sweeps):
    return sweeps("small_grid")


@pytest.mark.parametrize("kind", ["small_grid", "environments", "halving", "population"], ids=str)
def test_every_kind_of_sweep_makes_a_sound_page(kind, sweeps):
    path, text = sweeps(kind)
    found = check(text)
    with Store.read(path) as store:
        best = ranking.rank(store)[0]
    words = words_of(found)
    assert best.environment in words
    assert all(str(short(value)) in words for value in best.swept.values())
    assert text == rendered(path)  # equal results, equal bytes


def test_an_unconfirmed_winner_is_called_one(small):
    path, text = small
    words = words_of(check(text))
    assert "not confirmed" in words and "The best of 12 looks better than it is" in words
    assert "--confirm 32" in words and f"--out {path}" in words
    assert "What matters" in words and "Sensitivity" not in words  # it needs several environments


def test_the_command_is_seen_from_where_the_report_is_made(small, monkeypatch):
    path, _ = small
    monkeypatch.chdir(path.parent)
    assert f"sweep {path.name}/spec.toml --out {path.name} " in rendered(path)


def test_a_confirmed_winner_comes_with_its_bias(sweeps):
    path, text = sweeps("large_random")
    words = words_of(check(text))
    with Store.read(path) as store:
        data = analysis.of_store(store)
    section = data.sections[0]
    assert [c.role for c in section.confirmed] == ["winner", "runner-up", "runner-up", "default"]
    winner = section.role("winner")
    assert f"on fresh seeds it is {number(winner.configuration.iqm)}" in words
    assert f"Tuning promised {number(winner.tuned.iqm)}" in words
    assert "probability that a run of it beats a run of the default" in words
    assert "not confirmed" not in words and "--confirm" not in words


def test_several_environments_are_compared(sweeps):
    _, text = sweeps("environments")
    found = check(text)
    words = words_of(found)
    assert "arXiv:2412.07165" in words and "effective dimensionality" in words
    names = {value for _, name, value in found.attributes if name == "data-of"}
    assert names == set(synthetic_sweep.SPANS)
    assert [column["name"] for column in data_of(found)["columns"][:2]] == ["rank", "environment"]


def test_every_metric_has_a_chart_with_single_seeds(small):
    path, text = small
    data = data_of(check(text))
    tiles = {figure["name"]: figure["rows"] for figure in data["figures"] if "rows" in figure}
    assert list(tiles) == ["episode/count", "episode/return", "loss/value"]
    with Store.read(path) as store:
        ranked = ranking.rank(store)
        legs = {leg["run_id"]: leg for leg in store.ledger.legs()}
        arrays = {unit["name"]: store.arrays(unit["name"]) for unit in store.ledger.units()}
    assert all(list(map(int, rows)) == list(range(len(ranked))) for rows in tiles.values())
    grid, centre, runs = tiles["loss/value"]["3"]
    assert len(data["grids"][grid]) == len(centre) == 60 and len(runs) == 8
    leg = legs[ranked[3].run_ids[5]]
    loss = arrays[leg["unit"]]["loss/value"][leg["row"]]
    # 200 updates in 60 bins: the first holds three, the last the last three.
    assert runs[5][0] == pytest.approx(loss[:3].mean(), rel=1e-3)
    assert runs[5][-1] == pytest.approx(loss[-3:].mean(), rel=1e-3, abs=1e-6)
    np.testing.assert_allclose(np.sort(np.array(runs)[:, 9])[2:6].mean(), centre[9], rtol=2e-3)


@pytest.mark.parametrize("kind", ["small_grid", "halving", "environments"])
def test_a_hyperparameter_matters_or_not_and_the_page_says_one_of_both(kind, sweeps):
    path, text = sweeps(kind)
    words = words_of(check(text))
    says = re.findall(r"(?:What matters \(share|Not distinguishable from no effect:).*?\. ", words)
    with Store.read(path) as store:
        sections = analysis.of_store(store).sections
    for section in sections:
        axes = section.effects.axes
        clear = [axis.name for axis in axes if axis.low > 0]
        assert [axis.name for axis in axes if axis.clear] == clear
    # In the card of each environment and in the chapter about effects, word by word the same.
    assert len(says) % 2 == 0 and sorted(says[: len(says) // 2]) == sorted(says[len(says) // 2 :])
    own = says[: len({s.split(" (")[0].split(":")[0] for s in says})]
    names = [name for axis in sections[0].effects.axes for name in [axis.name]]
    assert all(sum(name in s for s in own) == 1 for name in names)


def test_a_fork_is_confirmed_by_an_option_and_not_by_a_command_that_fails(tmp_path):
    with Store.open(tmp_path / "out", {"agent": "./mine.py"}, 'agent = "./mine.py"') as store:
        runs = [Run(str(i), {"env": "A"}, 0, {"gamma": i / 2}) for i in range(2)]
        store.ledger.plan({"unit": runs})
        store.commit("unit", {}, None, [Outcome(r.run_id, "done", 1.0, 1.0) for r in runs], {})
    words = words_of(check(rendered(tmp_path / "out")))
    assert "add --confirm 32 to the command of this sweep." in words and "SPEC.toml" not in words


def test_pairs_without_a_share_are_not_shown(small):
    with Store.read(small[0]) as store:
        section = analysis.of_store(store).sections[0]
    assert all(pair.share >= 0.005 for pair in section.effects.pairs)
    assert ("Pairs that explain most" in small[1]) == bool(section.effects.pairs)
    assert ": 0% of the variance" not in small[1] and ": <1% of the variance" not in small[1]


def test_an_axis_is_wide_enough_for_its_ticks():
    same = charts.Row("a", 500.0, 500.0, 500.0), charts.Row("b", 500.0 - 5e-7, 500.0 - 9e-7, 500.0)
    figure = charts.forest(same)
    low, high = figure["layout"]["xaxis"]["range"]
    assert low <= 495.1 and high >= 504.9
    assert not any("error_x" in trace for trace in figure["data"])  # no bar for [500, 500]
    assert analysis.readable(0.0, 0.0) == (-1.0, 1.0)
    assert analysis.readable(-1500.0, -100.0) == pytest.approx((-1570.0, -30.0))


def key(cell):
    return cell[0] if isinstance(cell, list) else cell


def test_the_table_holds_every_configuration(small):
    path, text = small
    table = data_of(check(text))
    assert [row[0] for row in table["rows"]] == list(range(1, 13))
    assert all(len(row) == len(table["columns"]) + 1 for row in table["rows"])
    with Store.read(path) as store:
        ranked = ranking.rank(store)
    assert [key(row[1]) for row in table["rows"]] == [float(f"{c.iqm:.4g}") for c in ranked]
    assert text.count("<tr") == 2 + 12  # the same rows without a script


def test_curves_beyond_the_best_can_be_picked(small):
    data = data_of(check(small[1]))
    assert set(data["curves"]) == {str(row) for row in range(5, 12)}
    assert all(len(data["grids"][grid]) == len(y) for grid, y in data["curves"].values())


def test_parallel_coordinates_know_logarithms_names_and_failures(sweeps):
    path, text = sweeps("large_random")
    (figure,) = [each for each in data_of(check(text))["figures"] if "lines" in each]
    with Store.read(path) as store:
        ranked = ranking.rank(store)
    names = [axis["name"] for axis in figure["axes"]]
    assert sorted(names) == sorted([*ranked[0].swept, "final return"])
    assert names[-1] == "final return"
    assert {line[0]: line[1] for line in figure["lines"]} == {
        row: int(c.diverged > 0) for row, c in enumerate(ranked)
    }
    rates = np.log([c.swept["learning_rate"] for c in ranked])
    at = np.array(figure["lines"])[:, 2 + names.index("learning_rate")]
    np.testing.assert_allclose(at, (rates - rates.min()) / np.ptp(rates), atol=1e-3)
    ticks = figure["axes"][names.index("activation")]["ticks"]
    assert sorted(label for _, label in ticks) == ["gelu", "relu", "tanh"]
    assert sorted(place for place, _ in ticks) == [0, 0.5, 1]


def test_one_run_per_value_has_no_interval(tmp_path):
    swept = [{"learning_rate": rate} for rate in (1e-4, 1e-3, 1e-2)]
    path = synthetic_sweep.write(tmp_path / "out", swept, 1)
    text = rendered(path)
    assert "One run per value: no interval." in words_of(check(text))
    assert "error_y" not in text.replace(PLOTLY, "")
    with Store.read(path) as store:
        (axis,) = analysis.of_store(store).sections[0].effects.axes
    assert np.isnan(axis.errors).all()


def nasty(path):
    """A sweep whose names and values try to get out of where they stand."""
    swept = [
        {"note": f"{NASTY}{i}", f"{NASTY}": value, "hidden": [64, i], "flag": i == 0, "none": None}
        for i, value in itertools.product(range(2), (NASTY, 1.0, True))
    ]
    runs = [
        Run(f"{NASTY}{i}-{seed}", {"env": f"{NASTY}-v0", **each}, seed, each)
        for i, each in enumerate(swept)
        for seed in range(2)
    ]
    identity = {"agent": NASTY, "agent_source": NASTY, "sweep": {"note": [NASTY]}}
    with Store.open(path, identity, spec_text=f"agent = '{NASTY}'") as store:
        store.ledger.plan({"unit": runs})
        outcomes = [Outcome(r.run_id, "done", float(i), float(i)) for i, r in enumerate(runs)]
        count = np.ones((len(runs), 5))
        arrays = {"episode/count": count, "episode/return_sum": count * 3.0}
        facts = {"steps_per_update": 8, "device_kind": NASTY, NASTY: NASTY, "wall_s": 1.0}
        store.commit("unit", arrays, None, outcomes, facts)
        store.ledger.note(NASTY)
    return path


def test_no_name_and_no_value_becomes_markup(tmp_path):
    path = nasty(tmp_path / "out")
    text = rendered(path)
    found = check(text)
    assert "<img" not in text.replace(PLOTLY, "") and "document.title" not in found.scripts[1][1]
    words = "".join(found.text)
    assert words.count(NASTY) > 10
    data = data_of(found)
    assert any(NASTY in str(cell) for row in data["rows"] for cell in row)
    # Plotly reads tags in texts, so that charts hold names with their tags escaped.
    drawn = json.dumps(data["figures"])
    assert "&lt;/script&gt;" in drawn and not re.search(r"<(?!/?b>|br>|/?extra>)", drawn)
    writer.write(path, Console(quiet=True))  # the figures, too, take every name as text
    assert "<script>document" not in (path / "report" / "curves.svg").read_text()


def test_no_completion_becomes_markup(tmp_path):
    path = nasty(tmp_path / "out")
    text = rendered(path, written(path))
    found = check(text)
    assert not re.search(r"<(img|pad|end)|<b>this", text.replace(PLOTLY, ""))
    words = words_of(found)
    assert all(each in words for each in ("<b>this</b>", "<pad> bad", "good <end>"))
    assert "&lt;pad&gt; bad" in text and "%{" not in json.dumps(
        data_of(found)["figures"][0]["data"][2]
    )


def test_a_page_of_language_models_leads_with_the_frontier(small):
    path, plain = small
    texts = written(path)
    found = check(rendered(path, texts))
    chapters = [value for value in found.ids if value != "data"]
    assert chapters[:4] == ["frontier", "scores", "samples", "answer"]
    assert not {"frontier", "scores", "samples"} & set(check(plain).ids)
    words = words_of(found)
    assert "compare configurations at equal KL" in words
    assert "seeds are few" not in words  # eight are enough for an interval
    frontier, *points = data_of(found)["figures"][0]["data"]
    assert frontier["line"]["color"] == "@grey" and "best possible:" in frontier["hovertemplate"]
    runs, mean = points[0], points[1]
    assert runs["x"] == [1.0, 1.1] and mean["x"] == [1.05]
    assert [each.split("<br>")[0][-6:] for each in runs["hovertemplate"]] == ["seed 0", "seed 1"]
    assert mean["error_x"]["array"] == mean["error_y"]["arrayminus"] == [0.05]
    # Twelve configurations share a colour, because there are fewer colours.
    assert {point["marker"]["color"][:3] for point in points} == {"@c1"}
    assert words.count("1.25") == 2 and words.count("0.5") >= 4  # rewards of both samples


def test_samples_without_a_reward_or_a_prompt_are_shown(small):
    texts = completions.Texts(samples=[{"label": "a", "columns": {"policy": ["one", "two"]}}])
    found = check(rendered(small[0], texts))
    assert found.ids[0] == "answer" and "two" in words_of(found)


def test_several_sweeps_share_a_sound_page(small, sweeps, tmp_path):
    nasty_one = nasty(tmp_path / "one"), nasty(tmp_path / "two")
    for paths in ([small[0], sweeps("large_random")[0]], nasty_one):
        data = together.of_directories(paths)
        text = page.render_together(data, "both")
        found = check(text)
        assert "<img" not in text.replace(PLOTLY, "")
        words = words_of(found)
        assert all(" ".join(m.name.split()) in words for m in data.methods)
        assert set(found.ids) >= {"ranking", "curves", "improvement", "profiles", "chosen"}
        curve = data_of(found)["figures"][1]["data"]
        assert len({trace["line"]["color"][:3] for trace in curve}) == 2


def digest(script):
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def test_the_policy_allows_the_two_scripts_of_the_page_and_no_other(small):
    _, text = small
    policy = re.search(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', text).group(1)
    own = [digest(content) for attrs, content in check(text).scripts if not attrs]
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own[0]}' "
        f"'sha256-{own[1]}'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize(
    "scores",
    [
        [[(np.nan,)] * 2] * 3,
        [[5.0, 5.0]] * 3,
        [[1.0]],
        [[1.0], [2.0]],
        [[1.0, (np.nan,)], [2.0, 2.0], [np.inf, 3.0]],
    ],
    ids=["all diverged", "all equal", "one run", "two runs", "not finite"],
)
def test_odd_results_make_a_sound_page(scores, tmp_path):
    runs, outcomes = [], []
    for i, row in enumerate(scores):
        for seed, score in enumerate(row):
            swept = {"learning_rate": 10.0**-i}
            runs.append(Run(f"{i}-{seed}", {"env": "A", **swept}, seed, swept))
            status, value = ("diverged", score[0]) if isinstance(score, tuple) else ("done", score)
            outcomes.append(Outcome(f"{i}-{seed}", status, value, value, None))
    with Store.open(tmp_path / "out", {"agent": "ppo"}) as store:
        store.ledger.plan({"unit": runs, "pending": [Run("later", {"env": "A"}, 0, {})]})
        store.commit("unit", {}, None, outcomes, {})
    check(rendered(tmp_path / "out"))
    writer.write(tmp_path / "out", Console(quiet=True))


def test_ten_thousand_runs_stay_small(tmp_path):
    generator = np.random.default_rng(0)
    swept = synthetic_sweep.random_search(10_000)
    runs = [Run(f"run{i}", {"env": "CartPole-v1", **each}, 0, each) for i, each in enumerate(swept)]
    scores = [500 * synthetic_sweep.quality(run.config) for run in runs]
    levels = np.array(scores)[:, None] * np.linspace(0, 1, 30)
    arrays = {"episode/count": np.ones_like(levels), "episode/return_sum": levels}
    with Store.open(tmp_path / "out", {"agent": "ppo", "sweep": synthetic_sweep.RANDOM}) as store:
        store.ledger.plan({"unit": runs})
        outcomes = [
            Outcome(run.run_id, "done" if generator.random() > 0.01 else "diverged", score, score)
            for run, score in zip(runs, scores, strict=True)
        ]
        store.commit("unit", arrays, None, outcomes, {"steps_per_update": 8, "wall_s": 9.0})
    target = writer.write(tmp_path / "out", Console(quiet=True))
    text = (target / "index.html").read_text()
    # Half of it and more is plotly.js; the data of 10,000 rows are the rest.
    assert len(text.encode()) - len(PLOTLY.encode()) < 2_500_000
    found = data_of(check(text))
    assert len(found["rows"]) == 10_000
    tiles = [figure for figure in found["figures"] if "rows" in figure]
    assert [tile["name"] for tile in tiles] == ["episode/count", "episode/return"]
    assert [list(tile["rows"]) for tile in tiles] == [[str(row) for row in range(100)]] * 2
    words = " ".join(text.split())
    assert "Of the first 100 of 10,000 configurations; <code>purejaxpg export DIR" in words
    assert max(len(figure.get("lines", ())) for figure in found["figures"]) <= 600
    with (target / "table.csv").open(newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 10_000
    assert all(file.stat().st_size < 5_000_000 for file in target.glob("*.svg"))


# ------------------------------------------------------------------------------------------ charts


def test_a_text_for_plotly_holds_no_tag():
    assert charts.clean("a<b>&c") == "a&lt;b&gt;&amp;c"
    assert charts.rounded([1.23456, np.nan, -np.inf]) == [1.235, None, None]


def test_too_few_configurations_have_no_importance(tmp_path):
    swept = synthetic_sweep.random_search(8)
    path = synthetic_sweep.write(tmp_path / "out", swept, 2, sweep=synthetic_sweep.RANDOM)
    with Store.read(path) as store:
        assert analysis.of_store(store).sections[0].effects.axes == []
    check(rendered(path))


def test_values_are_put_into_classes():
    few = analysis.levels_of([1e-3, 1e-4, 1e-3, 1e-2])
    assert few.labels == ("1e-4", "1e-3", "0.01") and few.codes.tolist() == [1, 0, 1, 2]
    assert few.log and not few.binned
    names = analysis.levels_of(["tanh", "relu", "tanh", True, [64, 64]])
    assert names.labels == ("tanh", "relu", "true", "[64, 64]") and names.centres is None
    many = analysis.levels_of(np.geomspace(1e-5, 1e-2, 80).tolist(), {"log_uniform": [1e-5, 1e-2]})
    assert many.binned and len(many.labels) == 8 and np.bincount(many.codes).tolist() == [10] * 8
    assert (np.diff(many.centres) > 0).all() and len(many.ticks) == 8
    whole = analysis.levels_of(list(range(40)), {"int_uniform": [0, 39]})
    assert whole.binned and not whole.log


@pytest.mark.parametrize("status", ["done", "diverged", "pending"])
def test_a_single_run_has_a_page_without_ranks(tmp_path, status):
    path, leg = tmp_path / "out", Run("r", {"env": NASTY, "gamma": 0.5}, 7, {}, stop=4, total=4)
    rows = {"episode/return_sum": [[1, 2, 3, 4]], "episode/count": [[1, 1, 1, 1]]}
    rows |= {"evaluated/return": [[np.nan, 8, np.nan, 9]], "evaluation/return": [[9, 9]]}
    arrays = {name: np.array(values, np.float32) for name, values in rows.items()}
    with Store.open(path, {"agent": "ppo"}) as store:
        store.ledger.plan({"unit": [leg]})
        if status != "pending":
            outcome = Outcome("r", status, 9.0, 8.5, 3 if status == "diverged" else None)
            facts = {"steps_per_update": 10, "wall_s": 2.0, "env_steps": 40}
            store.commit("unit", arrays, None, [outcome], facts)
        unfinished = {"unit": (arrays, {"steps_per_update": 10, "unit": "steps"})}
        data = analysis.of_store(store, unfinished)
        metrics = analysis.metrics_of(store, data, unfinished)
    text = page.render(data, "out", metrics=metrics)
    found = check(text)
    words = words_of(found)
    assert " seed 7 " in words and "gamma 0.5" in words
    assert not re.search(r"Ranking|Answer|configuration\b|winner|IQM", words)
    assert ("final return, mean of" in words) == (status != "pending")
    assert ("The run diverged : after update 3" in words) == (status == "diverged")
    assert ("not finished" in words) == (status == "pending")
    figures = data_of(found)["figures"]
    drawn = [trace["y"] for figure in figures for trace in figure.get("data", ())]
    assert [1, 2, 3, 4] in drawn and [8, 9] in drawn
    tiles = {figure["name"]: figure["rows"]["0"] for figure in figures if "rows" in figure}
    assert tiles.keys() == {"episode/return", "episode/count", "evaluated/return"}
    assert tiles["evaluated/return"][1] == [None, 8, None, 9]


# ----------------------------------------------------------------------------------------- browser


@browser.needed
def test_a_browser_runs_nothing_that_comes_from_results(tmp_path):
    path, own = tmp_path / "index.html", nasty(tmp_path / "out")
    path.write_text(with_script(rendered(own, written(own)), READ))
    document, logged = browser.opened(path, tmp_path)
    assert "<title>out · sweep report</title>" in document and logged == []
    # The frontier is drawn and says where a point is from; one configuration's samples are open.
    state = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<html[^>]*>", document).group(0)))
    assert (state["opened"], state["side"]) == ("0 1", "true")
    hovered = html.unescape(state["hovered"])
    assert hovered.startswith(f"{NASTY}1, seed 1KL 1.1") and "<img" in hovered
    assert 'data-ready="true"' in document and "<img" not in document.replace(PLOTLY, "")
    assert "data-error" not in re.search(r"<html[^>]*>", document).group(0)
    assert document.count('class="main-svg"') >= 3


def with_script(text, script):
    """A page with one more script, which its policy allows; everything else stays forbidden."""
    text = text.replace("; img-src", f" 'sha256-{digest(script)}'; img-src", 1)
    return text.replace("</body>", f"<script>{script}</script></body>")


READ = """
window.addEventListener("load", () => {
  window.dispatchEvent(new Event("beforeprint"));
  const state = root.dataset;
  const details = all("#samples details");
  details[1].open = true;
  const [before, after] = all("div", details[1].querySelector("li"));
  const [a, b] = [before.getBoundingClientRect(), after.getBoundingClientRect()];
  state.side = a.top === b.top && a.right <= b.left && a.width > 100;
  const frontier = document.querySelector("#frontier .chart");
  const runs = frontier.data.findIndex((trace) => trace.x.length === 2);
  Plotly.Fx.hover(frontier, [{ curveNumber: runs, pointNumber: 1 }]);
  setTimeout(() => {
    state.opened = details.map((each) => Number(each.open)).join(" ");
    state.hovered = frontier.querySelector(".hoverlayer text").textContent;
  }, 300);
});
"""
USE = """
const button = (name) => all("th button").find((each) => each.textContent === name);
const column = () => all(".ranking tbody tr").map((row) => row.cells[0].textContent);
const search = document.querySelector(".ranking input"), state = root.dataset;
const chart = document.querySelector(".picks"), many = document.querySelector(".parallel");
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const type = async (text) => {
  search.value = text;
  search.dispatchEvent(new Event("input"));
  await pause(300);
};
const visible = () => chart.data.filter((t) => t.meta !== undefined && t.visible !== false).length;
const bright = () => many.data.at(-1).x.length;
async function use() {
  await pause(500);
  window.dispatchEvent(new Event("beforeprint"));
  state.charts = all(".chart").filter((node) => node.querySelector(".cartesianlayer path")).length;
  button("mean").click();
  state.mean = column().slice(0, 3).join(" ");
  button("mean").click();
  state.reversed = column().slice(0, 3).join(" ");
  button("rank").click();
  state.lines = bright();
  await type("3e-4 0.2");
  state.found = column().length;
  state.filtered = bright();
  await type("no such thing");
  state.nothing = column().length;
  await type("clip_eps<0.2 rank>=2");
  state.condition = column().length;
  await type("");
  state.before = visible();
  document.querySelector('.ranking [data-row="8"]').click();
  state.picked = visible();
  state.legend = document.querySelector('.picked [data-row="8"]').textContent;
  document.querySelector('.picked [data-row="8"]').click();
  document.querySelector('.picked [data-row="0"]').click();
  state.hidden = visible();
  state.pressed = all('[data-row="0"]').map((each) => each.getAttribute("aria-pressed")).join(" ");
  Plotly.Fx.hover(chart, [{ curveNumber: chart.data.length - 4, pointNumber: 9 }]);
  await pause(200);
  state.hover = chart.querySelectorAll(".hoverlayer text").length;
  box([2, 5]);
  state.boxed = column().join(" ");
  box(null);
  const form = document.querySelector(".curve-tools").elements, tiles = all(".metric");
  const set = (input, value) => {
    input.value = value;
    ["input", "change"].forEach((kind) => input.dispatchEvent(new Event(kind)));
  };
  const names = (node) => node.data.map((trace) => trace.name).filter(Boolean).join(" ");
  set(form.ranks, "2-4, 11");
  state.ranks = tiles.map((tile) => names(tile).split(" ").sort().join(" ")).join("; ");
  const drawn = { data: chart.data.filter((trace) => trace.visible !== false) };
  state.curves = names(drawn).split(" ").sort().join(" ");
  const before = tiles[2].data.at(-1).y;
  const wobble = (y) => y.slice(1).reduce((sum, value, i) => sum + Math.abs(value - y[i]), 0);
  set(form.smooth, "9");
  const after = tiles[2].data.at(-1).y;
  state.middle = Math.abs(after[30] - before.slice(26, 35).reduce((a, b) => a + b) / 9) < 1e-9;
  state.smoother = wobble(after) < wobble(before) && after.length === before.length;
  const thin = () => chart.data.filter((trace) => trace.line.width === 1).length;
  const others = thin();
  form.single.click();
  state.single = tiles.map((tile) => tile.data.length).join(" ");
  state.onchart = thin() - others;
  form.single.click();
  set(form.steps, "100k-0.2M");
  state.range = tiles[0].layout.xaxis.range.join(" ") + " " + chart.layout.xaxis.range.join(" ");
  set(form.steps, "");
  set(form.ranks, "1");
  const ranks = all(".ranking tbody [data-row]");
  ranks[0].click();
  ranks[3].dispatchEvent(new MouseEvent("click", { bubbles: true, shiftKey: true }));
  state.between = [...coloured].sort().join(" ");
}
use().catch((error) => { state.error = error.message; }).finally(() => { state.used = "true"; });
"""


@browser.needed
def test_a_reader_sorts_filters_and_picks_curves(small, tmp_path):
    path, text = small
    use = tmp_path / "use.html"
    use.write_text(with_script(text, f"window.addEventListener('load', () => {{{USE}}});"))
    document, logged = browser.opened(use, tmp_path)
    head = re.search(r"<html[^>]*>", document).group(0)
    state = dict(re.findall(r'data-(\w+)="([^"]*)"', head))
    assert "error" not in state and logged == []
    assert (state["ready"], state["used"]) == ("true", "true")
    with Store.read(path) as store:
        ranked = ranking.rank(store)
    by_mean = [str(c.rank) for c in sorted(ranked, key=lambda c: -c.mean)]
    assert f'data-winner="{ranked[0].label}"' in document
    assert int(state["charts"]) == text.count('<div class="chart ')
    assert state["mean"] == " ".join(by_mean[:3])
    assert state["reversed"] == " ".join(by_mean[:-4:-1])
    assert (state["found"], state["nothing"]) == ("1", "0")
    fine = [c for c in ranked if c.swept["clip_eps"] < 0.2 and c.rank >= 2]
    assert int(state["condition"]) == len(fine)
    # Each line of the parallel coordinates has one point on each of three axes.
    assert (state["lines"], state["filtered"], state["boxed"]) == ("36", "3", "3 6")
    # The best five have a band each.
    assert (state["before"], state["picked"], state["hidden"]) == ("10", "11", "8")
    assert all(f"{n} {short(v)}" in state["legend"] for n, v in ranked[8].swept.items())
    assert state["pressed"] == "false false" and int(state["hover"]) > 0
    # Ranks are picked by number, in the learning curves and in every metric.
    assert state["ranks"] == "; ".join(["#11 #2 #3 #4"] * 3) and state["curves"] == "#11 #2 #3 #4"
    assert (state["middle"], state["smoother"]) == ("true", "true")
    assert state["single"] == "36 36 36" and state["onchart"] == "32"  # 4 lines and 8 runs of each
    assert state["range"] == "100000 200000 100000 200000"
    assert state["between"] == "1 2 3"


RELOADS = """
const loads = Number(sessionStorage.getItem("loads")) + 1;
sessionStorage.setItem("loads", loads);
root.dataset.loads = loads;
if (loads > 1) all(".live").forEach((node) => { node.dataset.every = 1000; });  // once is enough
window.addEventListener("load", () => {
  if (loads === 1) window.scrollTo(0, 300);
  setTimeout(() => { root.dataset.place = window.scrollY; }, 200);
});
"""


@browser.needed
@pytest.mark.parametrize("kind", ["running", "silent", "finished"])
def test_only_the_page_of_a_running_sweep_loads_itself_again(small, tmp_path, kind):
    """At the same place; and not if it was not written for long."""
    written_at = time.time() - (10_000 if kind == "silent" else 0)
    now = page.Now(0.25, ("about 90 s left",), 2.0, written_at)
    with Store.read(small[0]) as store:
        data = analysis.of_store(store)
    text = page.render(data, "out", now=None if kind == "finished" else now)
    path = tmp_path / "index.html"
    path.write_text(with_script(text, RELOADS))
    document, logged = browser.opened(path, tmp_path)
    state = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<html[^>]*>", document).group(0)))
    assert logged == [] and "error" not in state
    assert state["loads"] == ("2" if kind == "running" else "1")
    assert int(float(state["place"])) == 300
    assert ("probably stopped" in words_of_banner(document)) == (kind == "silent")


def words_of_banner(document):
    found = re.search(r'<div class="live".*?</div>', document, re.S)
    return found.group(0) if found else ""
