"""What the README and the pages in docs/ show has to work."""

import pathlib
import re
import shlex
import shutil
import tomllib

import pytest

from purejaxpg import cli, trainers
from purejaxpg.envs import libraries
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import stages

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = [ROOT / "docs" / name for name in ("", "course", "algorithms", "how-to", "reference")]
SITE = [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]
PAGES = [ROOT / "README.md", *SITE]
GUIDES = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")]
# test_how_to.py has the sweeps of those that show a fork.
OTHERS = [
    page
    for page in PAGES
    if page not in GUIDES and "```diff" not in page.read_text(encoding="utf-8")
]
MARKDOWN = sorted({*PAGES, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")})
PARTS = ("stage", "agents")  # tables of a sweep file that is several sweeps
COMMAND = re.compile(r"(?:^|`|uv run )(purejaxpg [a-z]+ [^`#\n]*)", re.MULTILINE)


def blocks(page: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    continued = re.compile(r" \\\n\s*")
    texts = [continued.sub(" ", page.read_text(encoding="utf-8")) for page in PAGES]
    return sorted({call.strip() for text in texts for call in COMMAND.findall(text)})


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = blocks(ROOT / "docs" / "agents.md", "python")
    assert len(source.strip().splitlines()) <= 26
    shorter = source.replace("total_timesteps=100_000", "total_timesteps=512")
    assert shorter != source
    exec(compile(shorter, "agents.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(3, 4, 2) [")


@pytest.mark.fast
def test_every_sweep_example_is_a_valid_sweep() -> None:
    shown = [text for page in GUIDES for text in blocks(page, "toml")]
    plain = [raw for raw in map(tomllib.loads, shown) if not raw.keys() & {"given", *PARTS}]
    read = [specs.from_dict({"agent": "ppo", **raw}, "study") for raw in plain]
    assert len(read) == 5
    assert [len(spec.runs) for spec in read[:2]] == [4 * 2 * 8] * 2
    rounds = searches.rehearse(searches.rounds(read[3]))
    assert [len(round_.legs) for round_ in rounds] == [64, 22, 8]
    assert read[2].robust == specs.Robust(("env_params.gravity",), "worst")
    assert read[4].search.pbt is not None and read[4].search.pbt.population == 16


@pytest.mark.fast
@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_every_sweep_file_beside_the_guides_is_valid(
    page: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for source in blocks(page, "python"):
        (tmp_path / "corridor.py").write_text(source, encoding="utf-8")  # what a sweep file names
    path = tmp_path / "study.toml"
    for shown in blocks(page, "toml"):
        # Other libraries are not installed where tests run: CartPole takes their place.
        shown = re.sub(rf'"({"|".join(libraries.EXAMPLES)}):[^"]*"', '"CartPole-v1"', shown)
        shown = re.sub(r"^env_kwargs.*\n", "", shown, flags=re.MULTILINE)
        path.write_text(shown, encoding="utf-8")
        several = stages.read(path)
        planned = stages.plan(several) if several is not None else [specs.load(path)]
        assert all(spec.runs for spec in planned)


@pytest.mark.fast
def test_every_example_with_given_arrays_or_stages_has_known_keys(tmp_path: pathlib.Path) -> None:
    """Their trainers are given what no test has trained, so only the words can be checked."""
    shown = [text for page in GUIDES for text in blocks(page, "toml")]
    given = [raw for raw in map(tomllib.loads, shown) if "given" in raw]
    assert len(given) == 3 and all(raw.keys() <= set(specs.KEYS) for raw in given)
    (staged,) = (text for text in shown if "[[stage]]" in text)
    (tmp_path / "study.toml").write_text(staged, encoding="utf-8")
    pipeline = stages.read(tmp_path / "study.toml")
    assert pipeline is not None
    assert [stage.parents for stage in pipeline.stages] == [(), ("sft",), ("sft", "reward")]
    assert all(stage.raw.keys() <= set(specs.KEYS) for stage in pipeline.stages)


@pytest.mark.fast
def test_the_example_of_several_agents_is_valid(tmp_path: pathlib.Path) -> None:
    (shown,) = (t for page in GUIDES for t in blocks(page, "toml") if "[agents." in t)
    (tmp_path / "study.toml").write_text(shown, encoding="utf-8")
    shutil.copyfile(trainers.path_of("a2c"), tmp_path / "mine.py")
    pipeline = stages.read(tmp_path / "study.toml")
    assert pipeline is not None
    assert [len(spec.runs) for spec in stages.plan(pipeline)] == [2 * 3 * 8, 3 * 8, 8]


@pytest.mark.fast
def test_every_command_and_option_exists() -> None:
    calls = commands()
    assert len(calls) >= 30
    for call in calls:
        arguments, rest = cli.make_parser().parse_known_args(shlex.split(call)[1:])
        fields = rest if arguments.command is cli.train else []
        assert rest == fields, f"{call}: there is no option {rest}"
        if fields:
            name = "ppo" if arguments.agent.endswith(".toml") else arguments.agent
            cli.parse_fields(trainers.load(name).Config, fields)
    scripts = {
        name for page in PAGES for name in re.findall(r"python (\w+/\w+\.py)", page.read_text())
    }
    assert len(scripts) >= 3 and all((ROOT / name).is_file() for name in scripts)


@pytest.mark.fast
@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*.toml")), ids=lambda p: p.stem)
def test_every_experiment_is_a_valid_sweep(path: pathlib.Path) -> None:
    assert specs.load(path).runs


@pytest.mark.fast
@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/rlhf/*.toml")), ids=lambda p: p.stem)
def test_every_pipeline_of_the_experiments_is_valid(path: pathlib.Path) -> None:
    pipeline = stages.read(path)
    assert pipeline is not None and all(spec.runs for spec in stages.plan(pipeline))


@pytest.mark.fast
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_and_sections_lead_somewhere(page: pathlib.Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    links = [link for link in links if not link.startswith("http")]
    for link in links:
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        if section:
            text = target.read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


@pytest.mark.fast
@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_no_line_is_longer_than_120_characters(page: pathlib.Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120] == []
