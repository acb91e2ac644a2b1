"""The jobs for SLURM and Kubernetes parse, and the commands in them are ones that we have."""

import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from purejaxpg import InputError, cli
from purejaxpg.cluster import processes
from purejaxpg.sweep import spec as specs

pytestmark = pytest.mark.fast

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def manifest(kind: str) -> dict:
    documents = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    (found,) = [each for each in documents if each["kind"] == kind]
    return found


def container() -> dict:
    (found,) = manifest("Job")["spec"]["template"]["spec"]["containers"]
    return found


def commands(script: pathlib.Path) -> list[list[str]]:
    """The calls of purejaxpg in a script, with the sweep file that it has by default."""
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    (default,) = re.findall(r"^spec=\$\{1:-(.+)\}$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    calls = [found[1] for line in lines if (found := re.search(r"\bpurejaxpg (\w.*)", line))]
    return [shlex.split(call.replace('"$spec"', default).rstrip("& ")) for call in calls]


def check(words: list[str]) -> None:
    arguments = cli.make_parser().parse_args(words)
    assert specs.load(ROOT / arguments.spec).runs


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_calls_what_there_is(script: pathlib.Path) -> None:
    found = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    (words,) = commands(script)
    check(words)


def test_the_scripts_are_found() -> None:
    assert [path.name for path in SCRIPTS] == ["slurm.sh", "slurm_ray.sh"]


def test_the_manifest_calls_what_there_is() -> None:
    program, *words = container()["command"]
    assert program == "purejaxpg"
    check(words)


@pytest.mark.parametrize("words", [["sweep", "study.toml", "--nodes", "2"], ["swep", "study.toml"]])
def test_another_command_is_seen(words: list[str]) -> None:
    with pytest.raises(InputError):
        check(words)


def test_the_pods_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and numbers that have to agree, though no parser says so."""
    job, service = manifest("Job"), manifest("Service")
    pod, size = job["spec"]["template"]["spec"], job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed" and job["spec"]["parallelism"] == size
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]

    for entry in container()["env"]:
        monkeypatch.setenv(entry["name"], entry.get("value", "1"))
    assert processes.how_many() == size
    host, _, _ = processes.initialise_arguments(size)["coordinator_address"].partition(":")
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}"

    (volume,), (mount,) = pod["volumes"], container()["volumeMounts"]
    claim = manifest("PersistentVolumeClaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim
    assert mount["name"] == volume["name"]
    out = container()["command"][container()["command"].index("--out") + 1]
    assert out.startswith(f"{mount['mountPath']}/")
