"""What the README shows has to work."""

import pathlib
import re
import tomllib

import pytest

from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no {language} block"
    return found.group(1)


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    source = block("python")
    assert len(source.strip().splitlines()) <= 26
    shorter = source.replace("total_timesteps=100_000", "total_timesteps=512")
    assert shorter != source
    exec(compile(shorter, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(3, 4, 2) [")


@pytest.mark.fast
def test_the_sweep_example_is_a_valid_sweep() -> None:
    spec = specs.from_dict(tomllib.loads(block("toml")), "study")
    assert len(spec.runs) == 4 * 2 * 8


@pytest.mark.fast
def test_the_search_example_is_a_valid_search() -> None:
    _, text = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    spec = specs.from_dict({"agent": "ppo", **tomllib.loads(text)}, "study")
    assert [len(round_.legs) for round_ in searches.rehearse(searches.rounds(spec))] == [64, 22, 8]


@pytest.mark.fast
@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*.toml")), ids=lambda p: p.stem)
def test_every_experiment_is_a_valid_sweep(path: pathlib.Path) -> None:
    assert specs.load(path).runs


@pytest.mark.fast
def test_links_to_files_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    files = [link for link in links if not link.startswith("http")]
    assert len(files) >= 6
    assert [link for link in files if not (ROOT / link).exists()] == []
