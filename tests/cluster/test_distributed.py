"""Several processes as one: two on this machine, killed and terminated before they end."""

import os
import pathlib
import signal
import socket
import time
import tomllib
import types
from collections.abc import Callable
from typing import Any

import forked
import jax
import numpy as np
import pytest
import quick

from purejaxpg import FaultError, InputError, checkpoint, signals
from purejaxpg.cluster import distributed, processes, remote
from purejaxpg.sweep import compute, memory
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import plan as plans
from purejaxpg.sweep import search as searches
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

SPEC = """
agent = "a2c"
seeds = 4
eval_episodes = 4
rows_per_device = 2
[config]
total_timesteps = 128
num_envs = 2
num_steps = 8
hidden = [8]
env_params = {max_steps_in_episode = 20}
[sweep]
learning_rate = [1e-3, 1e-2, 1e-1]
[halving]  # states of the first round go to disk, and from there to both processes
rungs = 2
eta = 2
"""

# A dead process has to be noticed soon.
COMMAND = """
import sys
from purejaxpg import cli
from purejaxpg.cluster import processes
processes.HEARTBEAT_S = 10
sys.exit(cli.main(sys.argv[1:]))
"""


def start(out: pathlib.Path, flags: str, *words: str, **environment: str) -> forked.Process:
    """Start the sweep beside `out` into it."""
    return forked.Process(
        *("-c", COMMAND, "sweep", str(out.parent / "spec.toml"), "--out", str(out), *words),
        folder=out.parent,
        environment={**os.environ, "XLA_FLAGS": flags, **environment},
    )


class Job:
    """Two processes on a sweep."""

    def __init__(self, directory: pathlib.Path, flags: str) -> None:
        self.out = directory / "two"
        words = ("--devices", "1", "--snapshot-every", "0")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        several = {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": address}
        self.processes = [
            start(self.out, flags, *words, **several, JAX_PROCESS_ID=str(index))
            for index in range(2)
        ]

    def wait(self, until: Callable[[], bool]) -> None:
        leader = self.processes[0]
        while not until():
            if leader.poll() is not None:
                pytest.fail("".join(leader.communicate()))
            time.sleep(0.02)

    def commits(self) -> int:
        if not (self.out / ledgers.LEDGER).is_file():
            return 0
        with stores.Store.read(self.out) as store:
            return sum(unit["done"] for unit in store.ledger.units())

    def end(self) -> tuple[list[int | None], list[str]]:
        """Wait for the end -> exit statuses and what was printed."""
        outputs = ["".join(process.communicate(timeout=300)) for process in self.processes]
        return [process.returncode for process in self.processes], outputs


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "spec.toml").write_text(SPEC)
    return tmp_path


def test_two_processes_end_with_the_bits_of_one(directory: pathlib.Path) -> None:
    """With SIGTERM to both in between, as srun sends it."""
    job = Job(directory, quick.FLAGS)
    job.wait(lambda: job.commits() >= 2)
    job.wait(lambda: any((job.out / "progress").glob("round*.[15]-*")))  # 3 segments are left
    for process in reversed(job.processes):
        process.terminate()
    statuses, outputs = job.end()
    assert statuses == [143, 143], outputs
    assert outputs[0].count("Terminated; finished units are kept") == 1 and outputs[1] == ""

    statuses, outputs = Job(directory, quick.FLAGS).end()
    assert statuses == [0, 0], outputs
    assert "Resuming from a snapshot" in outputs[0] and outputs[1] == ""
    check_same_as_one(directory, quick.FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_is_killed_the_other_ends(directory: pathlib.Path, victim: int) -> None:
    """And the same commands resume, in programs compiled as users have them."""
    job = Job(directory, "")
    job.wait(lambda: job.commits() >= 2)
    job.processes[victim].kill()
    statuses, outputs = job.end()
    assert statuses[victim] == -signal.SIGKILL
    assert statuses[1 - victim] in (-signal.SIGABRT, 1), outputs

    statuses, outputs = Job(directory, "").end()
    assert statuses == [0, 0], outputs
    check_same_as_one(directory, "")


def check_same_as_one(directory: pathlib.Path, flags: str) -> None:
    process = start(directory / "one", flags, "--devices", "2", "--quiet")
    assert process.wait(300) == 0, process.communicate()
    check_same(directory / "two", directory / "one")


def check_same(left: pathlib.Path, right: pathlib.Path) -> None:
    with stores.Store.read(left) as two, stores.Store.read(right) as one:
        assert two.ledger.finished and not two.damaged()
        assert [unit["name"] for unit in two.ledger.units()] == [
            unit["name"] for unit in one.ledger.units()
        ]
        assert {unit["facts"]["processes"] for unit in two.ledger.units()} == {2}
        outcome = ("run_id", "round", "status", "score", "greedy_score", "diverged_at")
        legs = [[{k: leg[k] for k in outcome} for leg in each.ledger.legs()] for each in (two, one)]
        assert legs[0] == legs[1]
        assert any(unit["has_state"] for unit in one.ledger.units())
        for unit, twin in zip(one.ledger.units(), two.ledger.units(), strict=True):
            pair = [dict(each.arrays(unit["name"])) for each in (two, one)]
            assert pair[0].keys() == pair[1].keys()
            for name in pair[0]:
                np.testing.assert_array_equal(pair[0][name], pair[1][name])
            assert unit["has_state"] == twin["has_state"]
            if unit["has_state"]:
                states = [
                    each.state(unit["name"], shapes(unit["rows"]), checkpoint.load)
                    for each in (two, one)
                ]
                jax.tree.map(np.testing.assert_array_equal, *states)


def shapes(rows: int) -> Any:
    spec = specs.from_dict(tomllib.loads(SPEC), "tiny")
    backend = compute.Backend(spec, jax.devices()[:1])
    (group,) = backend.groups(0, next(searches.rounds(spec)), {})
    return backend.template(plans.Unit("", group.units[0].legs[:1] * rows))


# -------------------------------------------------------------------------- who is one of several


@pytest.mark.fast
@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"JAX_NUM_PROCESSES": "3", "SLURM_STEP_NUM_TASKS": "2"}, 3),
        ({"JAX_NUM_PROCESSES": "1", "SLURM_STEP_NUM_TASKS": "2"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, 4),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),  # salloc, sbatch
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_ARRAY_TASK_COUNT": "9"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1),  # jax would not know how to find the others
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, 2),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, 1),
    ],
    ids=str,
)
def test_the_number_of_processes_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], count: int
) -> None:
    set_only(monkeypatch, environment)
    assert processes.how_many() == count


@pytest.mark.fast
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a whole number, 1 or more"),
        ({"JAX_PROCESS_ID": "0"}, "so JAX_NUM_PROCESSES must be set"),
        ({"JAX_NUM_PROCESSES": "2"}, "so JAX_PROCESS_ID must be set"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, "so JAX_COORDINATOR_ADDRESS must"),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_PROCESS_ID must be less than JAX_NUM_PROCESSES, 2, but is 2",
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "a"},
            "JAX_COORDINATOR_ADDRESS must be HOST:PORT, but is 'a'",
        ),
    ],
    ids=str,
)
def test_a_half_set_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    set_only(monkeypatch, environment)
    with pytest.raises(InputError, match=message):
        processes.initialise_arguments(processes.how_many())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("environment", "all_own"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, False),
        ({"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "3"}, True),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "1"},
            False,
        ),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    ],
    ids=str,
)
def test_a_process_alone_on_its_node_has_all_devices(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], all_own: bool
) -> None:
    set_only(monkeypatch, environment)
    assert processes.own_devices() == all_own


def set_only(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in os.environ:
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "CUDA_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in {"JAX_PLATFORMS": "cpu", **environment}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.fast
def test_a_used_port_is_a_fault() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(FaultError, match="JAX_COORDINATOR_ADDRESS cannot be used: Address"):
            processes.refuse_used_port(taken.getsockname()[1])


def test_a_job_that_does_not_come_up_is_a_fault(tmp_path: pathlib.Path) -> None:
    """jax itself would abort the process."""
    environment = {
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
        "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
    }
    command = COMMAND.replace("HEARTBEAT_S = 10", "INITIALISE_S = 1")
    words = ("-c", command, "sweep", "none.toml")
    result = forked.run(*words, folder=tmp_path, environment={**os.environ, **environment})
    assert result.returncode == 1, result.stderr
    assert "The 2 processes of this job did not all start within 1 s" in result.stderr


# --------------------------------------------------------------------------------- in one process


class Store:
    """The key-value store of the coordination service, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def key_value_set_bytes(self, key: str, value: bytes) -> None:
        assert key not in self.values
        self.values[key] = value

    def blocking_key_value_get_bytes(self, key: str, timeout_ms: int) -> bytes:
        return self.values[key]

    def key_value_delete(self, key: str) -> None:
        """As the service does it: with everything below."""
        del self.values[key]
        self.values = {k: v for k, v in self.values.items() if not k.startswith(f"{key}/")}


@pytest.fixture
def mail(monkeypatch: pytest.MonkeyPatch) -> distributed.Mail:
    from jax._src import distributed as service

    monkeypatch.setattr(service.global_state, "client", Store())
    return distributed.Mail()


@pytest.mark.fast
def test_arrays_arrive_as_they_were(
    mail: distributed.Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "PART_BYTES", 7)
    arrays = [
        np.array([-0.0, np.nan, 1e-45], np.float32),
        np.array([[True], [False]]),
        np.zeros((0, 3), np.int32),
        np.arange(6, dtype=np.uint32).reshape(2, 3).T,
        np.asarray(jax.numpy.ones((2, 2), jax.numpy.bfloat16)),
    ]
    mail.send(0, {"call": "first"}, arrays)
    mail.send(0, {"call": "second"})
    to = distributed.Mail()
    message, received = to.receive(0)
    assert message == {"call": "first"}
    for before, after in zip(arrays, received, strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert before.tobytes() == after.tobytes()
    assert to.receive(0) == ({"call": "second"}, [])
    assert mail.client.values == {}


class Post:
    """Mail to followers that answer at once, each with its entry of a list."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = [{"signal": 0, **answer} for answer in answers]
        self.sent: list[list[np.ndarray]] = []

    def send(self, to: int, said: dict[str, Any], arrays: list[np.ndarray] = ()) -> None:
        self.sent.append(arrays)

    def receive(self, sender: int) -> distributed.Message:
        return self.answers[sender - 1], []


def devices_of(*owners: int) -> list[Any]:
    return [types.SimpleNamespace(process_index=p, device_kind="cpu") for p in owners]


def make_leader(*answers: dict[str, Any]) -> distributed.Leader:
    leader = object.__new__(distributed.Leader)
    leader.mail = Post(*answers)  # type: ignore[assignment]
    return leader


@pytest.mark.fast
def test_each_process_gets_its_rows() -> None:
    leader = make_leader({}, {})
    leader.call_all(devices_of(0, 1, 1, 2), 2, {}, [np.arange(8)])
    (first,), (second,) = leader.mail.sent  # type: ignore[attr-defined]
    assert first.tolist() == [2, 3, 4, 5] and second.tolist() == [6, 7]


@pytest.mark.fast
def test_a_failure_in_any_process_is_raised() -> None:
    def own() -> None:
        raise memory.OutOfMemory("here", 5)

    full = {"failure": remote.as_values(memory.OutOfMemory("there", 3))}
    with pytest.raises(memory.OutOfMemory, match="there") as caught:
        make_leader(full, {}).call_all(devices_of(0, 1, 2), 1, {}, own=own)
    assert caught.value.fits == 3
    fault = {"failure": remote.as_values(FaultError("jax failed"))}
    with pytest.raises(FaultError, match="jax failed"):
        make_leader(full, fault).call_all(devices_of(0, 1, 2), 1, {}, own=own)


@pytest.mark.fast
def test_a_signal_to_a_follower_stops_the_leader_once() -> None:
    leader, waited = make_leader({"signal": signal.SIGTERM}), False
    with signals.as_exceptions(), pytest.raises(signals.Terminated), signals.deferred() as stopping:
        leader.call_all(devices_of(0, 1), 1, {})
        assert stopping()
        leader.call_all(devices_of(0, 1), 1, {})  # a second one would not wait
        waited = True
    assert waited


@pytest.mark.fast
def test_a_follower_notes_signals_and_continues() -> None:
    with signals.recorded() as arrived:
        assert arrived() == 0
        signal.raise_signal(signal.SIGTERM)
        assert arrived() == signal.SIGTERM


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": {"jax": "0.0.1"}}, "jax must be 0.0.1 on every node"),
        ({"kind": "a faster one"}, "device_kind must be a faster one on every node"),
        ({"identity": {}}, "must run the same sweep"),
    ],
)
def test_a_follower_that_would_compute_something_else_is_refused(
    change: dict[str, Any], message: str
) -> None:
    spec = specs.from_dict(tomllib.loads(SPEC), "tiny")
    same = {
        "identity": distributed.plain(spec.identity),
        "versions": compute.versions(),
        "kind": jax.devices()[0].device_kind,
    }
    follower = distributed.Follower(lambda: spec, jax.devices()[:1])
    assert distributed.attempted(follower.hello, same, []) == ({}, ())
    answer, _ = distributed.attempted(follower.hello, {**same, **change}, [])
    error = remote.as_exception(*answer["failure"])
    assert isinstance(error, InputError) and message in str(error)


def test_a_programming_error_is_reported_to_the_leader(capsys: pytest.CaptureFixture[str]) -> None:
    answer, _ = distributed.attempted(lambda: 1 // 0, {}, [])  # type: ignore[arg-type]
    assert answer["failure"] == ["FaultError", "A process failed with ZeroDivisionError."]
    assert "Traceback" in capsys.readouterr().err
