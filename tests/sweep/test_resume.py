"""N updates, a snapshot and N more in another process equal 2N updates, bit for bit."""

import contextlib
import functools
import math
import os
import pathlib
import random
import signal
import subprocess
import time
import types
from collections.abc import Callable
from typing import Any

import agents_under_test as under_test
import forked
import jax
import numpy as np
import pytest
import quick
import stand_in
from rich.console import Console

from purejaxpg.sweep import engine, fsck
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import store as stores


class Interrupting(progresses.Progress):
    """Ctrl-C in the middle of a unit, after its snapshot."""

    def advance(self, *arguments: Any) -> None:
        super().advance(*arguments)
        if self.done_steps * 2 > self.total_steps:
            raise KeyboardInterrupt


def go(agent: types.ModuleType, out: pathlib.Path, interrupted: bool = False) -> None:
    """Run a sweep of three runs in one unit, to its end or to the middle."""
    spec, kind = under_test.spec(agent), Interrupting if interrupted else progresses.Progress
    with stores.Store.open(out, dict(spec.identity)) as store:
        progress = kind(Console(quiet=True))
        progress.begin(spec, searches.rehearse(searches.rounds(spec)))
        backend = under_test.backend(agent)
        engine.run(searches.rounds(spec), store, backend, progress, snapshot_every_s=0.0)


def results(agent: types.ModuleType, out: pathlib.Path) -> dict[str, np.ndarray]:
    """Return arrays and the leaves of the final state."""
    backend = under_test.backend(agent)
    with stores.Store.read(out) as store:
        (unit,) = store.ledger.units()
        arrays = dict(store.arrays(unit["name"]))
        legs = tuple(searches.whole(run) for run in backend.spec.runs)
        state = store.state(unit["name"], backend.template(plans.Unit(unit["name"], legs)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {**arrays, **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}}


# One keeps its environments, the other a buffer. What an agent's file may break is tested for all:
# its programs below, and its states and segments in test_contract.py.
TWO = [agent for agent in under_test.AGENTS if under_test.name(agent) in ("ppo", "sac")]


def half(directory: str) -> None:
    """Run half of a run of TWO, and write the programs of all; called in a separate process."""
    for agent in TWO:
        with pytest.raises(KeyboardInterrupt):
            go(agent, pathlib.Path(directory) / under_test.name(agent), interrupted=True)
    for agent in under_test.AGENTS:
        (pathlib.Path(directory) / f"{under_test.name(agent)}.mlir").write_text(written(agent))


def written(agent: types.ModuleType) -> str:
    """Return the programs of `init` and `update`, before they are compiled."""
    key, config = jax.random.key(0), under_test.tiny(agent)
    init, update = jax.jit(agent.init), jax.jit(agent.update)
    state = jax.eval_shape(init, key, config)
    return init.lower(key, config).as_text() + update.lower(key, state, config).as_text()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory, here = tmp_path_factory.mktemp("halves"), pathlib.Path(__file__).resolve()
    path = os.pathsep.join(map(str, (here.parent, here.parents[1], here.parents[2])))
    ended = forked.run(
        "-c",
        "import sys, test_resume\ntest_resume.half(sys.argv[1])",
        str(directory),
        folder=directory,
        environment={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""},
    )
    assert ended.returncode == 0, ended.stderr
    return directory


@pytest.mark.parametrize("agent", under_test.AGENTS, ids=under_test.name)
def test_another_process_makes_the_same_programs(
    agent: types.ModuleType, halves: pathlib.Path
) -> None:
    """Nothing of a process, such as the hash of a string, becomes a part of them."""
    assert (halves / f"{under_test.name(agent)}.mlir").read_text() == written(agent)


@pytest.mark.parametrize("agent", TWO, ids=under_test.name)
def test_a_run_resumes_in_another_process(
    agent: types.ModuleType, halves: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = halves / under_test.name(agent)
    with stores.Store.read(out) as store:
        assert len(store.ledger.pending()) == 1
    snapshot = sorted(path.name for path in (out / "progress").iterdir())
    assert any(f".{under_test.UPDATES // 2}-" in name for name in snapshot), snapshot
    go(agent, out)
    go(agent, tmp_path / "whole")
    resumed, whole = results(agent, out), results(agent, tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    assert len(whole["loss/critic" if "loss/critic" in whole else "loss/value"]) == 3
    for name, array in whole.items():
        assert np.array_equal(resumed[name], array), name


# In both rungs, two units at a time: one compilation.
STUDY = """
agent = "ppo"
seeds = 4
rows_per_device = 2
eval_episodes = 4
[config]
total_timesteps = 640
num_envs = 4
num_steps = 16
num_epochs = 2
hidden = [16]
env_params.max_steps_in_episode = 50
[sweep]
learning_rate = [1e-3, 1e-2]
[halving]
rungs = 2
eta = 2
"""


def sweep(directory: pathlib.Path, out: str, flags: str = "") -> forked.Process:
    words = ["sweep", "study.toml", "--out", out, "--devices", "2", "--snapshot-every", "0"]
    environment = {**os.environ, "XLA_FLAGS": flags}
    return forked.Process("-m", "purejaxpg.cli", *words, folder=directory, environment=environment)


def everything(out: pathlib.Path) -> dict[str, Any]:
    with stores.Store.read(out) as store:
        results: dict[str, Any] = {"legs": store.ledger.legs()}
        for unit in store.ledger.units():
            for name, array in store.arrays(unit["name"]).items():
                results[f"{unit['name']} {name}"] = array.tobytes()
    manifests = sorted((out / "checkpoints").glob("*/MANIFEST.json"))
    return {**results, "states": len(manifests)}


def test_a_sweep_killed_twice_ends_with_the_same_bits(tmp_path: pathlib.Path) -> None:
    """kill -9 in the first rung and in the second, after a random number of snapshots."""
    (tmp_path / "study.toml").write_text(STUDY, encoding="utf-8")
    whole = sweep(tmp_path, "whole", quick.FLAGS)
    assert whole.wait(600) == 0, whole.communicate()
    kills, chance = 0, random.Random(0)
    for rung in ("round0", "round1"):
        running, seen = sweep(tmp_path, "cut", quick.FLAGS), set[pathlib.Path]()
        wanted = chance.randint(1, 6)
        while running.poll() is None and len(seen) < wanted:
            seen |= set((tmp_path / "cut" / "progress").glob(f"{rung}*"))
            time.sleep(0.002)
        kills += running.poll() is None
        running.kill()
        running.wait()
    assert kills == 2
    last = sweep(tmp_path, "cut", quick.FLAGS)
    assert last.wait(600) == 0, last.communicate()
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")


# ------------------------------------------------------------------------- killed, again and again

KILLS = int(os.environ.get("PUREJAXPG_TEST_KILLS", "200"))
PARTS = 20
SEARCHES = {
    "halving": """
[sweep]
learning_rate = [3e-4, 1e-3, 3e-3, 1e-2]
[halving]
rungs = 3
eta = 2
""",
    "pbt": """
[sweep]
learning_rate = { log_uniform = [1e-4, 1e-1] }
[pbt]
population = 4
generations = 4
""",
}
# 20 updates, each a segment with a snapshot, so that something is written at almost every moment.
FEW = STUDY.partition("[sweep]")[0].replace("640", "1_280").replace("seeds = 4", "seeds = 2")
Uninterrupted = tuple[dict[str, Any], float]  # its results, and its seconds


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Uninterrupted]:
    @functools.cache
    def of(kind: str) -> Uninterrupted:
        directory = tmp_path_factory.mktemp(kind)
        (directory / "study.toml").write_text(FEW + SEARCHES[kind], encoding="utf-8")
        for out in ("compiled", "timed"):
            began = time.monotonic()
            running = sweep(directory, out)
            assert running.wait(300) == 0, running.communicate()
        return everything(directory / "timed"), time.monotonic() - began

    return of


def trace(out: pathlib.Path) -> set[str]:
    """Return the names of snapshots and records, which change whenever a sweep gets further."""
    return {path.name for folder in ("progress", "records") for path in (out / folder).glob("*")}


def killed_after(directory: pathlib.Path, out: str, seconds: float) -> bool:
    """Run or resume a sweep for some seconds -> whether it had to be killed."""
    running = sweep(directory, out)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(seconds)
    running.kill()
    _, said = running.communicate()
    assert running.returncode in (0, -signal.SIGKILL), said
    return running.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_random_moments(
    tmp_path: pathlib.Path, uninterrupted: Callable[[str], Uninterrupted], part: int
) -> None:
    """KILLS in all, from the start to the report; committed results stay as they were."""
    kind, chance = list(SEARCHES)[part % 2], random.Random(part)
    expected, longest = uninterrupted(kind)
    (tmp_path / "study.toml").write_text(FEW + SEARCHES[kind], encoding="utf-8")
    kills, further, sweeps, before = 0, 0, 0, dict[str, Any]()
    while kills < math.ceil(KILLS / PARTS):
        out = tmp_path / f"out{sweeps}"
        progress = trace(out)
        killed = killed_after(tmp_path, out.name, chance.uniform(0, longest))
        after = stand_in.committed(out)
        assert {name: after[name] for name in before} == before
        kills, further = kills + killed, further + (killed and trace(out) != progress)
        before = after if killed else {}
        if not killed:
            assert everything(out) == expected
            sweeps += 1
    assert not killed_after(tmp_path, out.name, 300)
    assert everything(out) == expected
    assert [problem for problem in fsck.check(out) if problem.kind != "leftover"] == []
    print(f"{kills} kills of {kind}, {further} of them in training, {sweeps + 1} sweeps")
    assert further > 0
