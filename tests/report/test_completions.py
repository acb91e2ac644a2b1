"""Scores, samples and the frontier of language models, on the page, as a picture and as tables."""

import base64
import csv
import html
import io
import itertools
import math
import re
import shutil

import numpy as np
import pytest
from matplotlib.text import Annotation, Text
from rich.console import Console

from purejaxpg import FaultError, cli, contract, disk, stats
from purejaxpg.report import charts, completions, ranking, writer
from purejaxpg.sweep import stages
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store

BETAS = (0.05, 0.1, 0.5, 0.6, 0.7, 0.8, 1.0, 2.0)
SEEDS, EPISODES = 3, 16
SAMPLES = {
    "prompt": ["the film", "<b>the</b> cast"],
    "reference": ["was bad . <pad>", "was good ."],
    "reference reward": [-1.0, 0.5],
    "policy": ["was <script>alert(1)</script> great .", "was good ."],
    "policy reward": [2.0, 0.5],
}


def language(path, betas=BETAS, seeds=SEEDS, diverged=(), exact=False, spec=""):
    """Write a sweep over beta as the trainers of language models do; return scores by run."""
    swept = [{"beta": beta} for beta in betas]
    runs = [
        Run(f"run{i}-{seed}", {"lr": 1e-3, **each}, seed, each)
        for i, each in enumerate(swept)
        for seed in range(seeds)
    ]
    generator = np.random.default_rng(0)
    kl = np.array([1.0 / (run.config["beta"] + 0.1) for run in runs])
    kl = kl[:, None] * generator.uniform(0.8, 1.2, (len(runs), EPISODES))
    arrays = {
        "evaluation/kl": kl,
        "evaluation/return": np.sqrt(kl),
        "evaluation/win": generator.integers(0, 2, kl.shape).astype(float),
        "evaluation/proxy_return": kl / 2,
        "evaluation/pass@4": kl * 0.0,
        "policy/kl": kl,
    }
    outcomes = [
        Outcome(
            run.run_id, "diverged" if run.run_id in diverged else "done", float(score), math.nan
        )
        for run, score in zip(runs, arrays["evaluation/return"].mean(1), strict=True)
    ]
    with Store.open(path, {"agent": "mine", "sweep": {"beta": list(betas)}}, spec) as store:
        store.ledger.plan({"unit": runs})
        store.commit("unit", arrays, None, outcomes, {"steps_per_update": 8})
    best = {"kl": [0.0, 1.0, 4.0], "return": [0.0, 1.2, 2.4], "exact": exact}
    samples = [{"label": f"beta {betas[0]}, seed 0", "columns": SAMPLES}]
    disk.write_hashed(path / completions.FILE, {"frontiers": [best], "samples": samples})
    return {run.run_id: {n: v[i] for n, v in arrays.items()} for i, run in enumerate(runs)}


def texts_of(path):
    with Store.read(path) as store:
        return completions.of_store(store, ranking.rank(store))


def test_means_and_intervals_are_those_of_the_runs(tmp_path):
    arrays = language(tmp_path / "out")
    texts = texts_of(tmp_path / "out")
    assert texts.titles == ["gold return", "proxy return", "KL", "win", "pass@4"]
    assert [row.name for row in texts.rows] == [f"beta {beta:g}" for beta in BETAS]
    for i, row in enumerate(texts.rows):
        own = [arrays[f"run{i}-{seed}"] for seed in range(SEEDS)]
        assert [seed for seed, _ in row.runs] == list(range(SEEDS))
        for name in texts.names:
            values = [float(run[name].mean()) for run in own]
            low, high = stats.bootstrap_ci(np.array(values), np.mean)
            expected = (np.mean(values), low, high)
            mean = row.means[name]
            np.testing.assert_allclose((mean.value, mean.low, mean.high), expected, rtol=1e-6)
    drawn = [row.centre[0].value for row in texts.drawn]
    assert drawn == sorted(drawn) and len(texts.line) == len(BETAS)


def test_a_diverged_run_leaves_no_mean_and_no_point_but_keeps_the_others(tmp_path):
    language(tmp_path / "out", diverged=("run0-1",))
    texts = texts_of(tmp_path / "out")
    (row,) = [row for row in texts.rows if row.name == "beta 0.05"]
    assert row.centre is None and math.isnan(row.means[contract.KL].value)
    assert [seed for seed, _, _ in row.points] == [0, 2]
    assert len(texts.line) == len(BETAS) - 1


def test_several_swept_fields_are_not_joined_by_a_line(tmp_path):
    runs = [
        Run(f"run{i}", {"beta": beta, "lr": lr}, 0, {"beta": beta, "lr": lr})
        for i, (beta, lr) in enumerate(itertools.product((0.1, 1.0), (1e-3, 1e-2)))
    ]
    with Store.open(tmp_path / "out", {"agent": "mine"}) as store:
        store.ledger.plan({"unit": runs})
        arrays = {
            "evaluation/kl": np.arange(8.0).reshape(4, 2),
            "evaluation/return": np.ones((4, 2)),
        }
        outcomes = [Outcome(run.run_id, "done", 1.0, math.nan) for run in runs]
        store.commit("unit", arrays, None, outcomes, {})
    texts = texts_of(tmp_path / "out")
    assert len(texts.drawn) == 4 and texts.line == [] and texts.frontiers == ()
    traces = charts.frontier(texts)["data"]
    assert len(traces) == 4 and all("error_x" not in trace for trace in traces)  # one run each


# ------------------------------------------------------------------------------------- the picture


def test_the_picture_has_intervals_and_labels_that_do_not_overlap(tmp_path):
    language(tmp_path / "out")
    texts = texts_of(tmp_path / "out")
    figure = completions.draw(texts)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    notes = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert sorted(note.get_text() for note in notes) == sorted(row.name for row in texts.rows)
    boxes = [Text.get_window_extent(note) for note in notes]
    pairs = list(itertools.combinations([*boxes, axes.get_legend().get_window_extent()], 2))
    assert pairs and not any(a.overlaps(b) for a, b in pairs)
    points = axes.transData.transform([point[1:] for row in texts.rows for point in row.points])
    assert not any(box.count_contains(points) for box in boxes)
    assert all(axes.bbox.fully_contains(*end) for box in boxes for end in (box.min, box.max))
    (bars,) = axes.containers
    across, upright = (np.array(lines.get_segments()) for lines in bars.lines[2])
    for row, x_ends, y_ends in zip(texts.drawn, across, upright, strict=True):
        kl, score = row.centre
        np.testing.assert_allclose(x_ends, [(kl.low, score.value), (kl.high, score.value)])
        np.testing.assert_allclose(y_ends, [(kl.value, score.low), (kl.value, score.high)])


@pytest.mark.parametrize(
    ("exact", "name"), [(True, "best possible"), (False, "best possible (estimate)")]
)
def test_a_frontier_says_whether_it_is_an_estimate(exact, name, tmp_path):
    language(tmp_path / "out", betas=(0.1,), exact=exact)
    texts = texts_of(tmp_path / "out")
    assert texts.best_possible == name
    legend = completions.draw(texts).axes[0].get_legend()
    assert name in [text.get_text() for text in legend.get_texts()]
    assert charts.frontier(texts)["data"][0]["hovertemplate"].startswith(f"{name}: ")


# --------------------------------------------------------------------------------------- the files


def test_tables_and_terminal_have_the_same_numbers(tmp_path):
    arrays, text = language(tmp_path / "out"), io.StringIO()
    target = writer.write(tmp_path / "out", Console(file=text, width=140))
    with (target / "further.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(BETAS) * SEEDS
    assert rows[0]["configuration"] == "beta 0.05" and rows[0]["seed"] == "0"
    assert float(rows[0]["kl"]) == pytest.approx(arrays["run0-0"]["evaluation/kl"].mean())
    mean = texts_of(tmp_path / "out").rows[0].means[contract.KL].text
    assert "[" in mean and mean in (target / "table.md").read_text()
    assert all(part in text.getvalue() for part in mean.split(" ", 1))
    assert "compare configurations at equal KL" in " ".join(text.getvalue().split())
    # What no language model has: greedy returns, learning curves, environments to be tuned for.
    page = (target / "index.html").read_text("utf-8")
    assert "greedy" not in text.getvalue() and 'id="sensitivity"' not in page
    assert not re.search(r"<th[^>]*>(greedy|AUC)<", page) and "shows or hides a curve" not in page
    assert (target / "frontier.svg").is_file() and "policy reward" in (
        target / "samples.md"
    ).read_text(encoding="utf-8")


PIPELINE = """
seeds = 2  # </pre><b>a comment</b>
[[stage]]
name = "sft"
agent = "rlhf.sft"
[[stage]]
name = "first"
agent = "rlhf.ppo"
given = { reference = "sft", reward = "<i>/x" }
[[stage]]
name = "second"
agent = "rlhf.ppo"
given = { reference = "first" }
"""


def test_the_page_of_a_pipeline_lists_its_stages_and_links_to_them(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    disk.write_hashed(out / stages.STAGES, {"stages": ["sft", "first", "second"]})
    language(out / "sft", betas=(0.1,), spec=PIPELINE)
    language(out / "first", spec=PIPELINE)
    assert cli.main(["report", str(out)]) == 0
    assert f"All stages: {out / 'index.html'}" in capsys.readouterr().out
    text = (out / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]*)"', text)
    assert links == ["sft/report/index.html", "first/report/index.html"]
    assert all((out / link).is_file() for link in links)
    words = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())
    assert (
        "A pipeline of 3 stages" in words
        and "3. second rlhf.ppo reference = first has not" in words
    )
    assert "2. first rlhf.ppo reference = sft, reward = <i>/x 8 24 0 beta 0.05" in words
    assert "<i>" not in text and "<b>" not in text and "<script" not in text
    assert "<title>out: first · sweep report</title>" in (out / links[1]).read_text()
    (out / "first" / "spec.toml").write_text("seeds = 2")
    with pytest.raises(FaultError, match=r"spec.toml is damaged: it has no stages"):
        writer.write_stages(out)


def test_stages_with_a_common_reference_share_a_figure(tmp_path):
    out, reference = tmp_path / "out", 'given = { reference = "sft" }'
    names = ("sft", "first", "second", "other")
    spec = "".join(f'[[stage]]\nname = "{n}"\nagent = "mine"\n{reference}\n' for n in names[1:])
    spec = f'[[stage]]\nname = "sft"\nagent = "mine"\n{spec}'
    out.mkdir()
    disk.write_hashed(out / stages.STAGES, {"stages": names})
    for name in names:
        language(out / name, betas=(2.0, 0.5, 0.1), seeds=2, spec=spec)
    disk.write_hashed(out / "sft" / completions.FILE, {"frontiers": [], "samples": []})
    theirs = {"kl": [0.0, 1.0, 4.0], "return": [0.0, 1.3, 2.4], "exact": False}
    disk.write_hashed(out / "other" / completions.FILE, {"frontiers": [theirs], "samples": []})
    found = completions.comparable({name: texts_of(out / name) for name in names})
    assert list(found) == ["first", "second"]
    page = writer.write_stages(out)
    (picture,) = re.findall(r'<img src="data:image/png;base64,([^"]*)"', page.read_text("utf-8"))
    assert base64.b64decode(picture) == (out / "frontier.png").read_bytes()
    drawn = (out / "frontier.svg").read_text("utf-8")
    assert [name for name in names if f">{name}<" in drawn] == ["first", "second"]
    shutil.rmtree(out / "second")  # one stage alone needs no figure of its own
    assert "<img" not in writer.write_stages(out).read_text("utf-8")
    assert not list(out.glob("frontier.*"))


def test_each_stage_of_a_figure_has_a_look_of_its_own(tmp_path):
    language(tmp_path / "out", exact=True)
    texts = texts_of(tmp_path / "out")
    names = [f"stage{i}" for i in range(9)]
    (axes,) = completions.draw_together(dict.fromkeys(names, texts)).axes
    frontier, *lines = axes.lines[:2]
    assert frontier.get_label() == "best possible" and frontier.get_color() == completions.GREY
    np.testing.assert_allclose(np.transpose(lines[0].get_data()), texts.line)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["best possible", *names]
    means = [bars.lines[0] for bars in axes.containers]
    assert len({(line.get_color(), line.get_marker()) for line in means}) == 9
    for bars in axes.containers:
        np.testing.assert_allclose(np.transpose(bars.lines[0].get_data()), texts.line)
        across, _ = (np.array(lines.get_segments()) for lines in bars.lines[2])
        ends = [(row.centre[0].low, row.centre[0].high) for row in texts.drawn]
        np.testing.assert_allclose(across[:, :, 0], ends)
    assert completions.draw_together({}) is None
