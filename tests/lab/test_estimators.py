"""The command, and what its numbers have to say."""

import contextlib
import csv
import io
import math
import pathlib
import re

import pytest

from purejaxpg import cli
from purejaxpg.lab import divergences, groups, values
from purejaxpg.text import number

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/language-models.md"
KEYS = 400  # the z-scores are those of any number of keys


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What the command printed, and the directory that it wrote."""
    out, printed, said = tmp_path_factory.mktemp("lab") / "out", io.StringIO(), io.StringIO()
    words = ["estimators", "--keys", str(KEYS), "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divergences, "ASCENT_STEPS", 2000)  # half as many end nearly there
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            assert cli.main(words) == 0
    return printed.getvalue(), said.getvalue(), out


@pytest.fixture(scope="module")
def rows(written):
    """The rows of estimators.csv, with numbers as numbers."""
    with (written[2] / "estimators.csv").open(encoding="utf-8") as file:
        return [
            {name: as_number(text) for name, text in row.items()} for row in csv.DictReader(file)
        ]


def as_number(text):
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def some(rows, study, **labels):
    return [r for r in rows if r["study"] == study and all(r[k] == v for k, v in labels.items())]


def test_the_command_prints_and_writes_its_files(written):
    printed, said, out = written
    names = {"estimators.md", "estimators.csv", "estimators.png", "estimators.svg"}
    assert {path.name for path in out.iterdir()} == names
    page = (out / "estimators.md").read_text()
    assert f"purejaxpg estimators --task enumerable-3-4 --seed 0 --keys {KEYS}" in page
    assert page.count("\n## ") == 5
    for text in ("k3 × ratio in loss", "group std, sequence mean", "agree: of"):
        assert text in page and text in printed
    assert said.count(" ...\n") >= 6 and "All groups of 4" in said


# ------------------------------------------------------------------------------------- divergences


def test_only_k1_in_the_reward_has_the_gradient_of_the_divergence(rows):
    for row in some(rows, "kl", over="sum"):
        if row["estimator"] == "k1 in reward":
            assert row["bias"] < 1e-14 / min(row["distance"], 0.1)  # the gradient itself is small
        elif row["distance"] == 1.0:
            assert row["bias"] > 0.3


def test_k1_in_the_loss_has_no_gradient_and_with_a_mean_that_of_the_length(rows):
    for row in some(rows, "kl", estimator="k1 in loss", over="sum"):
        assert math.isnan(row["cosine"]) and abs(row["bias"] - 1.0) < 1e-12
    near, _, _ = some(rows, "kl", estimator="k1 in loss", over="mean")
    assert near["bias"] > 100.0


@pytest.mark.parametrize("over", ["sum", "mean"])
def test_k3_times_the_ratio_is_k2_in_the_loss_draw_by_draw(rows, over):
    k2, k3 = (
        some(rows, "kl", estimator=name, over=over) for name in ("k2 in loss", "k3 × ratio in loss")
    )
    for a, b in zip(k2, k3, strict=True):
        for name in ("scale", "bias", "variance", "sampled_bias", "sampled_variance"):
            assert a[name] == pytest.approx(b[name], rel=1e-11, abs=1e-13)


def test_the_loss_is_nearly_right_near_the_reference_and_k3_in_the_reward_absent(rows):
    near = {r["estimator"]: r for r in some(rows, "kl", over="sum", distance=0.001)}
    assert near["k2 in loss"]["bias"] < 2e-3 and near["k3 in loss"]["bias"] < 2e-3
    assert abs(near["k3 in reward"]["scale"]) < 1e-3


def test_only_k1_in_the_reward_ends_at_the_best_policy(written, rows):
    best = float(re.search(r"at π\*, J = ([\d.]+)", written[0])[1])
    ends = some(rows, "ascent")
    assert len(ends) == divergences.COUNT
    for row in ends:
        assert row["objective"] < best + 1e-3  # the page has three digits
        if row["estimator"] == "k1 in reward":
            assert row["to_optimum"] < 1e-4
        else:
            assert row["to_optimum"] > 0.01
    (unregularised,) = (r for r in ends if (r["estimator"], r["over"]) == ("k1 in loss", "sum"))
    assert unregularised["entropy"] < 0.01


# ------------------------------------------------------------------------------- values and groups


def test_lambda_and_values(rows):
    found = some(rows, "gae")
    assert len(found) == len(values.LAMBDAS) * len(values.VALUES)
    for row in found:
        right = row["values"] == "exact" or row["gae_lambda"] == 1.0
        assert row["bias"] < 1e-12 if right else row["bias"] > 0.02
    variance = [row["variance"] for row in some(rows, "gae", values="exact")]
    assert variance == sorted(variance)


def test_scales_and_biases_of_normalisers(rows):
    for size in groups.GROUP_SIZES:
        of = {r["normaliser"]: r for r in some(rows, "group", group_size=float(size))}
        shrunk = (size - 1) / size
        for name, scale in (
            ("leave one out", 1.0), ("mean incl. itself", shrunk), ("constant length", shrunk / 4)
        ):  # fmt: skip
            assert of[name]["scale"] == pytest.approx(scale, rel=1e-12)
            assert of[name]["bias_scaled"] < 1e-7  # the root of a rounding error
        assert of["sequence mean"]["cosine"] < 0.99
        if size <= 4:
            assert of["group std"]["how"] == "exact" and of["group std"]["cosine"] < 0.995
        assert of["batch std"]["how"] == of["token mean"]["how"] == "sampled"
    (alone,) = some(rows, "group", normaliser="none")
    assert alone["bias"] < 1e-12


# ------------------------------------------------------------------------------------------ checks


def test_samples_agree_with_exact_expectations(written, rows):
    compared = [row for row in rows if row["comparisons"]]
    assert len(compared) == len(rows) - divergences.COUNT - sum(r["how"] == "sampled" for r in rows)
    z = [row[name] for row in compared for name in ("z_mean", "z_square")]
    assert max(map(abs, z)) < 4.5 and min(z) < -0.5 and max(z) > 0.5
    assert f"{max(map(abs, z)):.2f}" in written[0]


def numbers_of(line):
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return cells[0], [cell.replace("−", "-").removeprefix("~") for cell in cells[1:]]


def test_the_numbers_of_the_documentation_are_those_of_the_command(written):
    """All that is exact; what was sampled there had more keys, and ascent took more steps."""
    page = (written[2] / "estimators.md").read_text().splitlines()
    section = PAGE.read_text().partition("## Which estimator where")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    headers = re.findall(r"^(.*)\n\|---", section, re.MULTILINE)
    shown = [line for line in lines if line not in headers]
    assert len(headers) == 4 and len(shown) == 14 + 14 + 8 + 8
    for line in shown:
        name, cells = numbers_of(line)
        rounding = 0.02 if len(cells) == 7 else 1e-4
        candidates = [numbers_of(each)[1] for each in page if each.startswith(f"| {name} |")]
        assert any(same(line, cells, other, rounding) for other in candidates), line


def same(line, cells, other, rounding):
    if len(cells) != len(other):
        return False
    approximate = "~" in line
    return all(
        a == b or approximate or close(as_number(a), as_number(b), rounding)
        for a, b in zip(cells, other, strict=True)
    )


def close(a, b, rounding):
    return isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 0.06 * abs(b) + rounding


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--task poem", ["task", "'poem'", "'enumerable-V-L'"]),
        ("--task sentiment", ["--task", "'sentiment'", "enumerable-3-4"]),
        ("--task enumerable-5-5", ["--task", "400", "1365"]),
        ("--keys -1", ["--keys", "-1"]),
        ("--keys 1", ["--keys", "2 or more"]),
        ("--keys many", ["--keys", "'many'"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--distance 1 0", ["--distance", "0.0"]),
        ("--distance nan", ["--distance", "nan"]),
        ("--beta 0", ["--beta", "0.0"]),
        ("--beta inf", ["--beta", "inf"]),
    ],
)
def test_bad_input_is_one_sentence(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["estimators", *words.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert all(word in printed.err for word in expected), printed.err
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_the_page_are_short():
    assert number(0.00069, 2) == "6.9e-4" and number(17.0, 2) == "17"
