"""What is promised before anything is computed: a light import, bounded and pinned dependencies."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import purejaxpg

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()
PYTHONS = ["3.11", "3.12", "3.13"]


def requirements(*extras: str) -> list[Requirement]:
    """Direct requirements, at run time or of some extras; the package itself is not one."""
    lists = [PROJECT["optional-dependencies"][extra] for extra in extras] or [
        PROJECT["dependencies"]
    ]
    found = [Requirement(line) for lines in lists for line in lines]
    return [each for each in found if each.name != PROJECT["name"]]


EVERY_REQUIREMENT = requirements() + requirements(*PROJECT["optional-dependencies"])


# --- a light import -----------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter has loaded after `code`."""
    heavy = ("jax", "jaxlib", "gymnax", "flax", "optax", "orbax")
    report = f"print(json.dumps([name for name in {heavy!r} if name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}\n{report}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


HELP = """
from purejaxpg import cli
try:
    status = cli.main({arguments!r})
except SystemExit as stop:
    status = stop.code
assert not status, status
"""


def test_importing_the_package_is_light():
    assert loaded_by("import purejaxpg") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"]], ids=" ".join)
def test_help_is_light(arguments):
    assert loaded_by(HELP.format(arguments=arguments)) == set()


def test_heavy_imports_are_seen():
    assert {"jax", "flax"} <= loaded_by("import flax")


# --- metadata -----------------------------------------------------------------------------------


def test_the_command_exists():
    module, _, function = PROJECT["scripts"]["purejaxpg"].partition(":")
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    assert function in {getattr(node, "name", "") for node in ast.parse(source).body}


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "purejaxpg/py.typed").is_file()


def is_bounded(requirement: Requirement) -> bool:
    operators = {each.operator for each in requirement.specifier}
    return bool(operators & {"==", "~="}) or (">=" in operators and "<" in operators)


@pytest.mark.parametrize("requirement", EVERY_REQUIREMENT, ids=str)
def test_every_requirement_is_bounded_on_both_sides(requirement):
    assert is_bounded(requirement)


@pytest.mark.parametrize("line", ["jax", "jax>=1", "jax<2", "jax>1,!=2"])
def test_a_missing_bound_is_seen(line):
    assert not is_bounded(Requirement(line))


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == purejaxpg.__version__
    assert citation["license"] == PROJECT["license"]


# --- the wheel ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without a network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built


def test_the_wheel_has_the_version_and_every_file_of_the_package(wheel):
    version = purejaxpg.__version__
    assert wheel.name == f"purejaxpg-{version}-py3-none-any.whl"
    files = [path for path in (ROOT / "purejaxpg").rglob("*") if path.is_file()]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    wanted = {name for name in wanted if "/." not in name}
    about = f"purejaxpg-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        found = set(archive.namelist())
        commands = archive.read(f"{about}/entry_points.txt").decode()
    assert {name for name in found if not name.startswith(about)} == wanted
    assert {"purejaxpg/presets.toml", "purejaxpg/py.typed"} <= wanted
    assert {"purejaxpg/report/page.html.j2", "purejaxpg/report/page.js"} <= wanted
    assert f"{about}/licenses/LICENSE" in found
    assert "purejaxpg = purejaxpg.cli:main" in commands


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import purejaxpg; from purejaxpg.sweep import single\n"
        "print(purejaxpg.__file__, single.tuned('ppo', {'env': 'CartPole-v1'})['num_steps'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / "purejaxpg" / "__init__.py"), "32"], done.stderr


# --- constraints --------------------------------------------------------------------------------


def pins(python: str) -> dict[str, str]:
    """Name -> version that constraints.txt names for one Python."""
    found: dict[str, str] = {}
    for line in CONSTRAINTS:
        if not line.startswith("#"):
            pin = Requirement(line)
            environment = {"python_version": python, "python_full_version": f"{python}.0"}
            if pin.marker is None or pin.marker.evaluate(environment):
                name = canonicalize_name(pin.name)
                assert name not in found, f"{name} is pinned twice for Python {python}"
                (found[name],) = (each.version for each in pin.specifier)
    return found


def test_constraints_are_names_and_versions_only():
    shape = re.compile(r'[\w.-]+==[\w.+!]+( ; python_version [<>]=? "3\.\d+")?')
    wrong = [line for line in CONSTRAINTS if not line.startswith("#") and not shape.fullmatch(line)]
    assert wrong == []
    assert not any("://" in line for line in CONSTRAINTS)


TESTED = ("test", "dev", "docs")


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("requirement", requirements() + requirements(*TESTED), ids=str)
def test_every_requirement_is_pinned_within_its_bounds(requirement, python):
    pinned = pins(python).get(canonicalize_name(requirement.name))
    assert pinned is not None, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(pinned, prereleases=True)


@pytest.mark.parametrize("python", PYTHONS)
def test_jax_and_jaxlib_are_pinned_together(python):
    assert pins(python)["jax"] == pins(python)["jaxlib"]


# --- nothing of one machine in the tree ---------------------------------------------------------

# Written in pieces, so that this file is not among those it finds.
PLACES = re.compile(
    "|".join(
        [
            r"py" + r"pi\.org",
            r"python" + r"hosted",
            r"ana" + r"conda\.(org|com)",
            r"arti" + r"factory",
            r"https?://\S+" + r"/simple\b",
            r"(extra-)?index" + r"-url\s*[= ]\s*\S*//",
            r"find" + r"-links\s*[= ]",
            r"(?<![\w.~-])/(root|opt|work)" + r"/\w",
            r"(?<![\w.~-])/(home|Users)" + r"/\w",
            r"\b[A-Z]:\\+" + r"Users\b",
        ]
    )
)


def test_no_file_names_a_registry_or_a_place_on_one_machine():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    found = []
    for name in filter(None, listing.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file():  # listed but deleted is possible
            for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1):
                if match := PLACES.search(line):
                    found.append(f"{name}:{number}: {match.group()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "https://py" + "pi.org/project/jax",
        "pip install --index" + "-url=https://host/x",
        "--find" + "-links wheels",
        "https://host/py" + "/simple/",
        'open("/ro' + 'ot/x")',
        "/ho" + "me/someone/x",
        "cd /Us" + "ers/someone",
    ],
)
def test_such_a_place_is_seen(line):
    assert PLACES.search(line)


@pytest.mark.parametrize(
    "line",
    ["$HOME/.pyenv/versions", "https://arxiv.org/abs/1707.06347", "docs/home/x", "/dev/full"],
)
def test_other_places_are_not(line):
    assert not PLACES.search(line)
