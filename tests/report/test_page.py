"""The page of the report: valid, safe, small, and alive in a browser."""

import csv
import html.parser
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import synthetic_sweep
from rich.console import Console

from purejaxpg.report import analysis, page, ranking, svg, writer
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store
from purejaxpg.text import number, short

VOID = {"meta", "br", "input", "link", "img", "hr", "circle", "path", "rect"}
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
    # Nothing is fetched, nothing leads elsewhere, nothing runs but the one script.
    references = [v for _, name, v in found.attributes if name in ("src", "href", "data", "action")]
    assert all(value.startswith("#") for value in references)
    assert not re.search(r"url\(|@import|https?://", text.replace("http://www.w3.org/2000/svg", ""))
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    kinds = [attrs.get("type") for attrs, _ in found.scripts]
    assert kinds.count(None) == 1 and set(kinds) <= {None, "application/json"}
    targets = {value[1:] for value in references}
    assert targets <= set(found.ids)
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None|undefined)\b", " ".join(found.text))
    assert "NaN" not in re.sub(r"<script>.*</script>", "", text, flags=re.S)
    return found


def rendered(path):
    with Store.read(path) as store:
        return page.render(analysis.of_store(store), path.name)


def data_of(found):
    (text,) = [content for attrs, content in found.scripts if attrs]
    return json.loads(text)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return synthetic_sweep.small_grid(tmp_path_factory.mktemp("page") / "small-grid")


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory):
    return synthetic_sweep.large_random(tmp_path_factory.mktemp("page") / "random", 60)


@pytest.mark.parametrize("kind", ["small_grid", "environments", "halving", "population"], ids=str)
def test_every_kind_of_sweep_makes_a_sound_page(kind, tmp_path):
    path = getattr(synthetic_sweep, kind)(tmp_path / "out")
    found = check(rendered(path))
    with Store.read(path) as store:
        best = ranking.rank(store)[0]
    words = " ".join(found.text)
    assert best.environment in words
    assert all(str(short(value)) in words for value in best.swept.values())


def test_an_unconfirmed_winner_is_called_one(small):
    words = " ".join(check(rendered(small)).text)
    assert "not confirmed" in words and "The best of 12 looks better than it is" in words
    assert "--confirm 16" in words and f"--out {small}" in words
    assert "What matters" in words and "needs several environments" in words


def test_the_command_is_seen_from_where_the_report_is_made(small, monkeypatch):
    monkeypatch.chdir(small.parent)
    words = " ".join(check(rendered(small)).text)
    assert f"sweep {small.name}/spec.toml --out {small.name} " in words


def test_a_confirmed_winner_comes_with_its_bias(confirmed):
    found = check(rendered(confirmed))
    words = " ".join(found.text)
    with Store.read(confirmed) as store:
        data = analysis.of_store(store)
    section = data.sections[0]
    assert [c.role for c in section.confirmed] == ["winner", "runner-up", "runner-up", "default"]
    winner = section.role("winner")
    assert f"on fresh seeds it is {number(winner.configuration.iqm)}" in words
    assert f"Tuning promised {number(winner.tuned.iqm)}" in words
    assert "probability that a run of it beats a run of the default" in words
    assert "not confirmed" not in words and "--confirm" not in words


def test_several_environments_are_compared(tmp_path):
    path = synthetic_sweep.environments(tmp_path / "out")
    found = check(rendered(path))
    words = " ".join(found.text)
    assert "arXiv:2412.07165" in words and "effective dimensionality" in words
    names = {value for _, name, value in found.attributes if name == "data-of"}
    assert names == set(synthetic_sweep.SPANS)
    assert data_of(found)["environment"] == 1


def test_the_table_holds_every_configuration(small):
    found = check(rendered(small))
    table = data_of(found)
    assert [row[0] for row in table["rows"]] == list(range(1, 13))
    assert all(len(row) == len(table["columns"]) + 1 for row in table["rows"])
    with Store.read(small) as store:
        ranked = ranking.rank(store)
    assert [row[1][0] for row in table["rows"]] == [float(f"{c.iqm:.5g}") for c in ranked]
    # The same rows stand there without a script.
    assert rendered(small).count("<tr") == 2 + 12


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
    assert "<img" not in text and "document.title" not in "".join(
        content for attrs, content in found.scripts if not attrs
    )
    words = "".join(found.text)
    assert words.count(NASTY) > 10
    assert NASTY in json.dumps(data_of(found)).encode().decode("unicode_escape") or any(
        NASTY in str(cell) for row in data_of(found)["rows"] for cell in row
    )
    writer.write(path, Console(quiet=True))  # the figures, too, take every name as text
    assert "<script>document" not in (path / "report" / "curves.svg").read_text()


def test_the_policy_allows_the_script_of_the_page_and_no_other(small):
    text = rendered(small)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='", policy)
    assert "unsafe-eval" not in policy and "script-src 'unsafe-inline'" not in policy


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
    assert len(text.encode()) < 2_000_000
    check(text)
    with (target / "table.csv").open(newline="") as file:
        assert sum(1 for _ in csv.DictReader(file)) == 10_000
    assert all(file.stat().st_size < 5_000_000 for file in target.glob("*.svg"))


# ---------------------------------------------------------------------------------------- drawings


def test_ticks_are_round_and_inside():
    for low, high in [(0.0, 1.0), (-483.0, -70.0), (0.013, 0.0131), (1e6, 5e6)]:
        ticks = svg.Scale(low, high, 0, 100).ticks(5)
        assert 2 <= len(ticks) <= 7 and low <= min(ticks) and max(ticks) <= high
    assert svg.Scale(1e-5, 1e-2, 0, 1, log=True).ticks(4) == [1e-5, 1e-4, 1e-3, 1e-2]


def test_a_scale_maps_its_ends():
    scale = svg.Scale(1e-4, 1e-2, 10, 110, log=True)
    assert [round(scale(v), 9) for v in (1e-4, 1e-3, 1e-2)] == [10, 60, 110]
    assert svg.Scale(3.0, 3.0, 10, 110)(3.0) == 10


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


# ----------------------------------------------------------------------------------------- browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with")


def opened(path, tmp_path):
    """The document that a browser makes of a page."""
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [CHROMIUM, *FLAGS, profile, "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@needs_browser
def test_a_browser_shows_the_winner_and_no_error(small, tmp_path):
    target = writer.write(small, Console(quiet=True))
    document = opened(target / "index.html", tmp_path)
    head = re.search(r"<html[^>]*>", document).group(0)
    assert 'data-ready="true"' in head and "data-error" not in head
    with Store.read(small) as store:
        best = ranking.best_row(store)
    assert f'data-winner="{best.label}"' in document
    # The script has drawn the table: 12 rows with sortable headings.
    assert "1–12 of 12" in document
    assert document.count('<button type="button">') >= 12


@needs_browser
def test_a_browser_runs_nothing_that_comes_from_results(tmp_path):
    target = writer.write(nasty(tmp_path / "out"), Console(quiet=True))
    document = opened(target / "index.html", tmp_path)
    assert "<title>out · sweep report</title>" in document
    assert 'data-ready="true"' in document and "<img" not in document


USE = """
const all = (selector) => [...document.querySelectorAll(selector)];
const button = (name) => all("th button").find((each) => each.textContent === name);
const column = () => all(".ranking tbody tr").map((row) => row.cells[0].textContent);
const search = document.querySelector(".ranking input");
const state = document.documentElement.dataset;
const type = (text) => { search.value = text; search.dispatchEvent(new Event("input")); };
button("mean").click();
state.mean = column().slice(0, 3).join(" ");
button("mean").click();
state.reversed = column().slice(0, 3).join(" ");
button("rank").click();
type("3e-4 0.2");
state.found = column().length;
type("no such thing");
state.nothing = column().length;
type("");
const chart = document.querySelector(".wide-only svg"), box = chart.getBoundingClientRect();
const middle = { clientX: box.left + box.width / 2, clientY: 1 };
chart.dispatchEvent(new PointerEvent("pointermove", middle));
state.hover = document.querySelector("#curves .legend output").textContent;
"""


@needs_browser
def test_the_table_sorts_and_searches_and_curves_tell_values(small, tmp_path):
    text = rendered(small)
    # The page's own policy would refuse this script.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    use = tmp_path / "use.html"
    use.write_text(text.replace("</body>", f"<script>{USE}</script></body>"))
    head = re.search(r"<html[^>]*>", opened(use, tmp_path)).group(0)
    state = dict(re.findall(r'data-(\w+)="([^"]*)"', head))
    assert "error" not in state
    with Store.read(small) as store:
        by_mean = [str(c.rank) for c in sorted(ranking.rank(store), key=lambda c: -c.mean)]
    assert state["mean"] == " ".join(by_mean[:3])
    assert state["reversed"] == " ".join(by_mean[:-4:-1])
    assert (state["found"], state["nothing"]) == ("1", "0")
    assert re.fullmatch(r"[\d.]+ at [\d.]+k", state["hover"])
