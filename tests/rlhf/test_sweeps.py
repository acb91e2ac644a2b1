"""Language models under the common runner: pipelines, forks, searches, kills and Ray."""

import csv
import functools
import math
import os
import pathlib
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import forked
import jax
import numpy as np
import pytest
import quick

from purejaxpg import InputError, cli
from purejaxpg.report import completions, playback
from purejaxpg.rlhf import rloo
from purejaxpg.sweep import compute, session, sources
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

STAGES = ("sft", "reward", "ppo")
PPO = """
eval_episodes = 64
rows_per_device = 2
config = {task = "enumerable-3-3", batch_size = 16, num_updates = 3, num_epochs = 1}
"""
PIPELINE = f"""
seeds = 2
eval_episodes = 64
[[stage]]
name = "sft"
agent = "rlhf.sft"
rows_per_device = 2
config = {{task = "enumerable-3-3", batch_size = 16, num_updates = 3, width = 8, num_layers = 1, \
num_heads = 1, num_kv_heads = 1, mlp_width = 8}}
[[stage]]
name = "reward"
agent = "rlhf.reward_model"
rows_per_device = 2
config = {{task = "enumerable-3-3", batch_size = 16, num_updates = 3}}
given = {{reference = "sft"}}
[[stage]]
name = "ppo"
agent = "rlhf.ppo"
given = {{reference = "sft", reward = "reward"}}
sweep = {{beta = [0.1, 1.0]}}
{PPO}
"""
ENVIRONMENT = {**os.environ, "XLA_FLAGS": quick.FLAGS, "RAY_USAGE_STATS_ENABLED": "0"}


def run(folder: pathlib.Path, *words: str) -> Any:
    """Run `python WORDS` in a process of its own -> its exit status, stdout and stderr."""
    return forked.run(*words, folder=folder, environment=ENVIRONMENT)


def command(path: pathlib.Path, out: pathlib.Path, *options: str) -> list[str]:
    return ["sweep", str(path), "--out", str(out), "--quiet", *options]


ONE = ("--devices", "1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of a pipeline, beside its sweep file and what the command printed."""
    folder = tmp_path_factory.mktemp("language_models")
    (folder / "tiny.toml").write_text(PIPELINE)
    words = command(folder / "tiny.toml", folder / "out", *ONE)
    done = run(folder, "-m", "purejaxpg.cli", *words)
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    return folder / "out"


def of_stage(swept: pathlib.Path, path: pathlib.Path, agent: str, betas: str) -> pathlib.Path:
    """Write the sweep file of the last stage alone, with another agent and other values of beta."""
    given = f'{{reference = "{swept}/sft", reward = "{swept}/reward"}}'
    text = f'agent = "{agent}"\nseeds = 2\ngiven = {given}\nsweep = {{beta = {betas}}}\n'
    path.write_text(text + PPO)
    return path


def contents(directory: pathlib.Path, agent: pathlib.Path | None = None) -> dict[str, Any]:
    """Return the arrays and the whole training state of each run, by its id."""
    with stores.Store.read(directory) as store:
        found = store.ledger.runs()
        loaded = playback.load_all(store, found, agent, pytest.fail)
        arrays = {name: store.arrays(name) for name in {run["unit"] for run in found}}
    return {
        run["run_id"]: (
            {name: value[run["row"]] for name, value in arrays[run["unit"]].items()},
            jax.tree.leaves(trained.state),
        )
        for run, trained in zip(found, loaded, strict=True)
    }


def same(one: Any, two: Any) -> bool:
    """Return whether two trees of arrays have the same structure and the same bits."""
    left, right = jax.tree.leaves(one), jax.tree.leaves(two)
    return jax.tree.structure(one) == jax.tree.structure(two) and all(
        a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )


# ------------------------------------------------------------------------------------ pipelines


def test_a_pipeline_of_the_trainers_runs(
    swept: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (swept / "ppo" / "report" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(math.isfinite(float(row["score"])) for row in rows)
    printed = (swept.parent / "printed.txt").read_text()
    assert "Further scores" in printed and "proxy return" in printed and "at equal KL" in printed
    kept = completions.read(swept / "ppo")
    assert kept is not None and len(kept["frontiers"]) == 2 and len(kept["samples"]) == 2
    best = kept["frontiers"][0]
    assert len(best["kl"]) == len(best["return"]) > 10
    report = swept / "ppo" / "report"
    assert (report / "frontier.png").stat().st_size > 5000
    text = (report / "samples.md").read_text()
    assert "## beta 0.1, seed 0" in text and "policy reward" in text
    assert cli.main(["eval", str(swept), "--samples", "3", "--run", rows[0]["run_id"]]) == 0
    assert capsys.readouterr().out.count("reference reward") == 3
    assert session.sweep(swept.parent / "tiny.toml", session.Options(out=swept, devices=1)) == 0
    assert capsys.readouterr().out.count("already finished") == 3


# Runs the command that follows the name of a sweep, in whose third segment it is killed.
KILLED = """
import os, signal, sys
from purejaxpg import cli
from purejaxpg.sweep import engine

segments = engine.segments

def killed(backend, *arguments):
    for number, step in enumerate(segments(backend, *arguments)):
        if number == 2 and backend.spec.name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        yield step

engine.segments = killed
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_pipeline_killed_in_each_stage_ends_with_the_same_bits(
    swept: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out"
    words = command(swept.parent / "tiny.toml", out, *ONE, "--snapshot-every", "0")
    for stage in STAGES:
        killed = run(tmp_path, "-c", KILLED, f"tiny-{stage}", *words)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert list((out / stage / "progress").glob("*.2-*")), "no snapshot of two updates"
    done = run(tmp_path, "-m", "purejaxpg.cli", *words)
    assert done.returncode == 0 and done.stdout.count("already finished") == 2, done.stderr
    for stage in STAGES:
        assert same(contents(swept / stage), contents(out / stage)), stage
        assert completions.read(swept / stage) == completions.read(out / stage)


def test_a_wrong_value_of_a_later_stage_stops_the_pipeline_before_it_starts(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "tiny.toml", tmp_path / "out"
    path.write_text(PIPELINE.replace("beta = [0.1, 1.0]", "beta = [0.1, -1.0]"))
    assert cli.main(["sweep", str(path), "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "beta must be 0 or more, but is -1.0" in error and error.count("\n") == 1
    assert not out.exists()


def test_models_of_another_parent_are_refused(
    swept: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The results of a stage never mix runs that were given different models."""
    out, path = tmp_path / "out", tmp_path / "tiny.toml"
    shutil.copytree(swept, out)
    path.write_text(PIPELINE.replace("= 3, width", "= 3, learning_rate = 1e-3, width"))
    words = command(path, out, *ONE)
    assert cli.main(words) == 2
    folders = " and ".join(str(out / stage) for stage in STAGES)
    message = capsys.readouterr().err
    assert "Stage 'sft' was computed with another config.learning_rate" in message
    assert f": delete {folders}, or" in message and message.count("\n") == 1
    shutil.rmtree(out / "sft")
    done = run(tmp_path, "-m", "purejaxpg.cli", *words)
    assert done.returncode == 2 and (out / "sft" / "report").is_dir()
    assert "Stage 'reward' was computed with other given arrays (sft changed)" in done.stderr


@pytest.mark.slow
def test_a_sweep_by_ray_has_the_same_bits(swept: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("ray")
    path = of_stage(swept, tmp_path / "ray.toml", "rlhf.ppo", "[0.1, 1.0]")
    words = command(path, tmp_path / "out", "--executor", "ray", "--ray-task", "CPU=1")
    done = run(tmp_path, "-m", "purejaxpg.cli", *words)
    assert done.returncode == 0, done.stderr
    assert same(contents(swept / "ppo"), contents(tmp_path / "out"))
    assert completions.read(swept / "ppo") == completions.read(tmp_path / "out")


# ---------------------------------------------------------------------------------------- forks


# Runs a command and prints how often XLA is asked for the program of a segment.
COUNTED = """
import sys
from jax._src import compiler
from purejaxpg import cli

seen, original = [], compiler.compile_or_get_cached

def counting(backend, computation, *rest, **more):
    seen.append(str(computation.operation.attributes["sym_name"]))
    return original(backend, computation, *rest, **more)

compiler.compile_or_get_cached = counting
status = cli.main(sys.argv[1:])
print("segments compiled:", sum("segment_rows" in name for name in seen))
sys.exit(status)
"""


def test_sixteen_runs_of_a_fork_share_one_compilation(
    swept: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unchanged copy has the bits of the trainer of the package, whatever runs beside it."""
    assert cli.main(["fork", "rlhf.ppo", str(tmp_path / "mine.py")]) == 0
    assert "--given NAME=DIR" in capsys.readouterr().out
    betas = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0]
    path = of_stage(swept, tmp_path / "many.toml", "./mine.py", str(betas))
    done = run(tmp_path, "-c", COUNTED, *command(path, tmp_path / "out", *ONE))
    assert done.returncode == 0, done.stderr
    assert "segments compiled: 1\n" in done.stdout
    found = contents(tmp_path / "out", tmp_path / "mine.py")
    few, every = contents(swept / "ppo"), list(found.values())
    first = 2 * betas.index(0.1), 2 * betas.index(1.0)  # runs are in order, seeds last
    assert len(every) == 16 and len(few) == 4
    assert same(list(few.values()), [every[i + seed] for i in first for seed in (0, 1)])
    kept, labels = completions.read(tmp_path / "out"), [f"beta {beta}, seed 0" for beta in betas]
    assert kept is not None and sorted(each["label"] for each in kept["samples"]) == labels
    assert kept["frontiers"] == (completions.read(swept / "ppo") or {})["frontiers"]


def test_a_fork_is_a_program(swept: pathlib.Path, tmp_path: pathlib.Path) -> None:
    assert cli.main(["fork", "rlhf.ppo", str(tmp_path / "mine.py")]) == 0
    fields = ("--task", "enumerable-3-3", "--batch-size", "4", "--num-updates", "1")
    given = ("--given", f"reference={swept / 'sft'}", "--quiet", "--out", "one")
    done = run(tmp_path, "mine.py", *given, *fields)
    assert done.returncode == 0, done.stderr
    kept = completions.read(tmp_path / "one")
    assert kept is not None and len(kept["samples"]) == len(kept["frontiers"]) == 1
    assert "## seed 0" in (tmp_path / "one" / "report" / "samples.md").read_text()


# ------------------------------------------------------------------------------------- searches

RLOO: dict[str, Any] = {
    "agent": "rlhf.rloo",
    "eval_episodes": 16,
    "rows_per_device": 2,
    "config": {"task": "enumerable-3-3", "batch_size": 8, "group_size": 4, "num_updates": 4},
}
DRAWN = {"learning_rate": {"log_uniform": [1e-4, 1e-2]}}
SEARCHES: dict[str, dict[str, Any]] = {
    # The last one diverges in the first rung, together with the one that is stopped.
    "halving": {
        "sweep": {"learning_rate": [1e-3, 1e-2, 1e-4, 1e30]},
        "halving": {"rungs": 2, "eta": 2},
    },
    "optuna": {"sweep": DRAWN, "search": {"method": "optuna", "samples": 4, "batch": 2}},
    "pbt": {"sweep": DRAWN, "pbt": {"population": 2, "generations": 2, "replace": 0.5}},
}


@pytest.fixture(scope="module")
def shared_programs() -> Iterator[None]:
    """Let several sweeps share the programs of equal groups, as the rounds of one sweep do."""
    built: dict[Any, Any] = {}
    original = compute.build

    def build(spec: Any, group: Any, devices: Any) -> Any:
        key = spec.agent_name, group.signature, group.rows
        if key not in built:
            built[key] = original(spec, group, devices)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "build", build)
        yield


def search(swept: pathlib.Path, out: pathlib.Path, **tables: Any) -> dict[str, Any]:
    """Run a sweep of RLOO from the best model of the first stage -> its runs, by id."""
    raw = {**RLOO, "given": {"reference": f"{swept}/sft:best"}, **tables}
    resolve = functools.partial(sources.resolve, pathlib.Path(), sources.no_stage)
    spec = specs.from_dict(raw, "search", resolve=resolve)
    options = session.Options(out=out, devices=1, quiet=True)
    session.run(spec, options, jax.devices()[:1])
    with stores.Store.read(out) as store:
        return {run["run_id"]: run for run in store.ledger.runs()}


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.usefixtures("shared_programs")
def test_a_search_writes_completions_of_all_configurations(
    swept: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    if name == "optuna":
        pytest.importorskip("optuna")
    runs = search(swept, tmp_path / "out", **SEARCHES[name])
    kept = completions.read(tmp_path / "out")
    assert kept is not None and len(kept["samples"]) == len(runs)
    assert {len(each["columns"]["policy"]) for each in kept["samples"]} == {completions.SAMPLES}
    labels = [each["label"] for each in kept["samples"]]
    diverged = [
        run["swept"]["learning_rate"] for run in runs.values() if run["status"] == "diverged"
    ]
    assert diverged == ([1e30] if name == "halving" else [])
    assert sum("diverged" in label for label in labels) == len(diverged)
    assert sum("2 of 4 updates" in label for label in labels) == (2 if name == "halving" else 0)
    assert labels[0].count(",") == 1  # the winner was trained to its end
    assert cli.main(["eval", str(tmp_path / "out"), "--samples", "2"]) == 0


@pytest.mark.usefixtures("shared_programs")
def test_a_mistake_in_samples_costs_no_report(
    swept: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no such word")

    with monkeypatch.context() as patch:
        patch.setattr(rloo, "samples", broken)
        search(swept, tmp_path / "out", seeds=2)
    printed = capsys.readouterr().out
    assert "Note: no samples and no frontier: rlhf.rloo raised ValueError: no such word." in printed
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    search(swept, tmp_path / "out", seeds=2)
    kept = completions.read(tmp_path / "out")
    assert kept is not None and len(kept["samples"]) == len(kept["frontiers"]) == 1


@pytest.mark.usefixtures("shared_programs")
def test_runs_that_all_diverged_are_kept_and_not_given(
    swept: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = search(swept, tmp_path / "out", seeds=2, sweep={"learning_rate": [1e30]})
    assert [run["status"] for run in runs.values()] == ["diverged"] * 2
    kept = completions.read(tmp_path / "out")
    assert kept is not None and kept["samples"][0]["label"].endswith("diverged")
    for source in ("", ":best"):
        with pytest.raises(InputError, match=r"All runs of .*out diverged; there is no best one"):
            search(swept, tmp_path / "next", given={"reference": f"{tmp_path}/out{source}"})
