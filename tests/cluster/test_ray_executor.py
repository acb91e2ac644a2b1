"""Units as Ray tasks, on a cluster of two nodes on this machine that loses one."""

import json
import os
import pathlib
import pickle
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import forked
import numpy as np
import pytest
import quick
import tiny_sweep

from purejaxpg import FaultError, InputError, agents, contract, signals
from purejaxpg.cluster import ray_executor
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

pytest.importorskip("ray")
# Ray's workers have a low priority otherwise, and beside other tests they hardly get on.
OWN = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "XLA_FLAGS": quick.FLAGS}
ENVIRONMENT = {**os.environ, **OWN}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in OWN.items():  # of the workers, too
        monkeypatch.setenv(name, value)
    from ray import cluster_utils

    with signals.handlers_restored():  # Ray sets one of its own for SIGTERM
        started = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        yield started
        started.shutdown()


GIVEN = """

import pathlib

import numpy as np

init_alone, update_alone = init, update


@struct.dataclass
class Given:
    numbers: jax.Array  # [numbers]


def read(name, path, config):
    return np.array([float(line) for line in path.read_text().split()], np.float32)


def init(key, config, given):
    return init_alone(key, config)


def update(key, state, config, given):
    state, metrics = update_alone(key, state, config)
    return state, {**metrics, "given/sum": given.numbers.sum()}
"""


def spec_file(directory: pathlib.Path) -> pathlib.Path:
    """A search in two rounds, of a fork that is given an array.

    States travel to the workers, and so do the array and the fork's source.
    """
    source = (pathlib.Path(agents.__path__[0]) / "ppo.py").read_text("utf-8")
    (directory / "forked.py").write_text(source.partition("if __name__ ==")[0] + GIVEN, "utf-8")
    (directory / "numbers.jsonl").write_text("0.5\n1.5\n", "utf-8")
    config = {k: v for k, v in tiny_sweep.HALVED["config"].items() if k != "env_params"}
    fields = "\n".join(f"{name} = {json.dumps(value)}" for name, value in config.items())
    path = directory / "spec.toml"
    path.write_text(
        'agent = "./forked.py"\nseeds = 6\neval_episodes = 4\nrows_per_device = 2\n'
        f"[config]\n{fields}\nenv_params = {{max_steps_in_episode = 20}}\n"
        "[sweep]\nnum_steps = [4, 8]\nlearning_rate = [1e-3, 1e-2]\n"
        '[halving]\nrungs = 2\neta = 2\n[given]\nnumbers = "numbers.jsonl"\n'
    )
    return path


def sweep(spec: pathlib.Path, out: pathlib.Path, *options: str) -> forked.Process:
    words = ("-m", "purejaxpg.cli", "sweep", str(spec), "--out", str(out), *options)
    return forked.Process(*words, folder=out.parent, environment=ENVIRONMENT)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The sweep of `spec_file` in one process, without Ray."""
    directory = tmp_path_factory.mktemp("local")
    process = sweep(spec_file(directory), directory / "out", "--devices", "1", "--quiet")
    assert process.wait(300) == 0, process.communicate()
    return directory / "out"


def units_of(out: pathlib.Path) -> tuple[int, int]:
    """Return how many units of the round are committed and how many are not."""
    if not (out / ledgers.LEDGER).is_file():
        return 0, 0
    with stores.Store.read(out) as store:
        return sum(unit["done"] for unit in store.ledger.units()), len(store.ledger.pending())


def wait_for_commits(out: pathlib.Path, process: forked.Process, more_than: int) -> int:
    """Wait until more units are committed -> units of the round that are still to do."""
    while process.poll() is None:
        done, pending = units_of(out)
        if done > more_than:
            return pending
        time.sleep(0.05)
    pytest.fail("".join(process.communicate()))


def test_a_terminated_sweep_resumes_and_a_lost_node_loses_no_run(
    cluster: Any, local: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Ray has a handler of its own for SIGTERM, under which the process would say nothing."""
    node, spec, out = cluster.add_node(num_cpus=1), spec_file(tmp_path), tmp_path / "ray"
    options = ("--executor", "ray", "--ray-address", cluster.address)
    process = sweep(spec, out, *options)
    assert wait_for_commits(out, process, more_than=0) > 0
    process.terminate()
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 143, output
    assert "Terminated; finished units are kept" in output

    process = sweep(spec, out, *options)
    left = wait_for_commits(out, process, more_than=units_of(out)[0])
    cluster.remove_node(node, allow_graceful=False)
    assert left >= 4  # so that the lost node was at work, and more was waiting
    output = "".join(process.communicate(timeout=300))
    assert process.returncode == 0, output
    assert "units are done" in output and "on the Ray cluster" in output
    check_same(out, local)


def check_same(ray: pathlib.Path, local: pathlib.Path) -> None:
    """Compare the results of two directories, bit for bit."""
    with stores.Store.read(ray) as far, stores.Store.read(local) as near:
        assert far.ledger.finished and not far.damaged()
        assert [unit["name"] for unit in far.ledger.units()] == [
            unit["name"] for unit in near.ledger.units()
        ]
        for unit in near.ledger.units():
            assert (near.arrays(unit["name"])["given/sum"] == 2.0).all()
            pairs = dict(far.arrays(unit["name"])), dict(near.arrays(unit["name"]))
            assert pairs[0].keys() == pairs[1].keys()
            for name, value in pairs[1].items():
                np.testing.assert_array_equal(pairs[0][name], value)
        outcome = ("run_id", "round", "status", "score", "greedy_score", "diverged_at")
        legs = [
            [{k: leg[k] for k in outcome} for leg in each.ledger.legs()] for each in (far, near)
        ]
        assert legs[0] == legs[1]


# -------------------------------------------------------------------------- in one process


NOTHING = contract.Given((None, []))  # as the sweep's own process sends it


def task(**changes: Any) -> ray_executor.Task:
    """The first unit of a tiny sweep, as a worker gets it."""
    import jax

    from purejaxpg.sweep import compute
    from purejaxpg.sweep import search as searches

    spec = tiny_sweep.swept()
    backend = compute.Backend(spec, jax.devices()[:1])
    (group,) = backend.groups(0, next(searches.rounds(spec)), {})
    unit = group.units[0]
    values = {
        "agent": "ppo", "source": (), "modules": (), "evaluation": (4, 0), "mesh": spec.mesh,
        "group": ray_executor.of_one_unit(group, unit, backend.to_dict), "start": None,
        "versions": backend.versions(),
    }  # fmt: skip
    return ray_executor.Task(**{**values, **changes})


def test_a_worker_with_other_versions_is_refused() -> None:
    one = task()
    other = task(versions={**one.versions, "jax": "0.0.1"})
    error = ray_executor.compute_unit(other, NOTHING)
    assert isinstance(error, InputError) and str(error).startswith("jax must be 0.0.1 on every")


def test_a_cluster_that_cannot_be_joined_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise Exception("The current node timed out during startup. The GCS may be overloaded.")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    spec = specs.from_dict(tiny_sweep.TINY, "tiny")
    with pytest.raises(FaultError, match=r"^Ray did not start here: The current node timed out du"):
        ray_executor.Ray(spec, None, {})
    with pytest.raises(
        FaultError, match=r"^There is no Ray cluster at a:1: The current node t.*d\.$"
    ):
        ray_executor.Ray(spec, "a:1", {})
    monkeypatch.setenv("RAY_ADDRESS", "b:2")
    with pytest.raises(FaultError, match=r"^There is no Ray cluster at b:2: "):
        ray_executor.Ray(spec, None, {})


def test_a_task_has_the_devices_of_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 5.0, "CPU": 8.0})
    spec = specs.from_dict({"agent": "rlhf.sft", "mesh": {"model": 2}}, "tiny")
    ray = ray_executor.Ray(spec, None, {})
    assert (ray.resources, ray.slots, ray.options()["num_gpus"]) == ({"GPU": 2.0}, 2, 2.0)
    on_cpu = ray_executor.Ray(spec, None, {"CPU": 4.0}).options()
    flags = on_cpu["runtime_env"]["env_vars"]["XLA_FLAGS"]
    assert on_cpu["num_cpus"] == 4.0 and flags.endswith("device_count=2")
    words = (
        r"--ray-task must give a task the 2 devices of mesh \{ data = 1, model = 2 \}, as GPU=2, "
    )
    with pytest.raises(InputError, match=words + "but gives it GPU=1"):
        ray_executor.Ray(spec, None, {"GPU": 1.0})


def test_running_out_of_memory_in_a_worker_reaches_the_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from purejaxpg.sweep import compute, memory

    large = types.SimpleNamespace(bytes_per_device=2000, rows=2)
    monkeypatch.setattr(compute, "build", lambda *_: large)
    monkeypatch.setattr(memory, "limit", lambda devices: 1500)
    ray_executor.backend_of.cache_clear()
    error = pickle.loads(pickle.dumps(ray_executor.compute_unit(task(), NOTHING)))
    assert isinstance(error, memory.OutOfMemory) and error.fits == 1
    assert str(error) == "2 rows need 0 MiB and 0 are free"
    ray_executor.backend_of.cache_clear()  # it holds the program that was made up


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(FaultError, match="pip install 'ray"):
        ray_executor.Ray(specs.from_dict(tiny_sweep.TINY, "tiny"), None, {})
