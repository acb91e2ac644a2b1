"""Faults of every kind: committed results stay, and the end is the same to the last bit.

`tests/stand_in.py` takes the place of training, so that a whole search takes a quarter of a second
and can be killed, starved and damaged often. Invariants: nothing committed is lost or altered,
each leg is in exactly one state, nothing counts twice, the directory always opens.
"""

import contextlib
import errno
import functools
import gc
import json
import os
import pathlib
import random
import re
import resource
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import stand_in

from purejaxpg import FaultError, InputError, checkpoint, disk, signals
from purejaxpg.sweep import engine, fsck, memory, search
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import store as stores

SCRIPT = str(pathlib.Path(stand_in.__file__).resolve())


WHOLE = 12 + 6 + 4  # legs of all rungs
KINDS = ("halving", "pbt")


@pytest.fixture
def in_memory(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Return a directory in memory, for tests that make hundreds and need not wait for a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield pathlib.Path(directory)


@pytest.fixture(scope="module")
def populated(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the directory of an undisturbed population."""
    path = tmp_path_factory.mktemp("populated") / "out"
    stand_in.run(path, "pbt")
    return path


@pytest.fixture(scope="module")
def expected_of(whole: pathlib.Path, populated: pathlib.Path) -> dict[str, str]:
    return {"halving": stand_in.contents(whole), "pbt": stand_in.contents(populated)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return the directory of an undisturbed run."""
    path = tmp_path_factory.mktemp("whole") / "out"
    stand_in.run(path)
    return path


@pytest.fixture(scope="module")
def expected(whole: pathlib.Path) -> str:
    return stand_in.contents(whole)


def start(out: pathlib.Path, *words: str, **more: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, SCRIPT, str(out), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **more)


def damage_of(out: pathlib.Path) -> list[fsck.Problem]:
    return [problem for problem in fsck.check(out) if problem.kind != "leftover"]


def test_the_stand_in_imports_no_jax_and_repeats_itself(
    tmp_path: pathlib.Path, expected: str
) -> None:
    process = start(tmp_path / "out")
    assert process.wait(60) == 0, process.communicate()
    assert stand_in.contents(tmp_path / "out") == expected
    stand_in.run(tmp_path / "plain", "plain")
    assert stand_in.contents(tmp_path / "plain") != expected


# ------------------------------------------------------------------------------------------- kill


@pytest.mark.parametrize(
    ("number", "status", "times"),
    [(signal.SIGKILL, -signal.SIGKILL, 50), (signal.SIGTERM, 143, 8)],
    ids=["killed", "terminated"],
)
def test_stopped_at_random(
    tmp_path: pathlib.Path, expected: str, number: int, status: int, times: int
) -> None:
    """Each process resumes the last one, and the results are those of an undisturbed run."""
    out, before, stops, chance = tmp_path / "out", {}, 0, random.Random(0)
    directories = 0
    with server() as start_one:
        while stops < times:
            ended = start_one(out, number, chance.uniform(0.0, 0.3))  # it needs about as long
            # Once its handler is gone, a signal ends the process directly.
            assert ended in (0, status, -number)
            stops += ended == status
            after = stand_in.committed(out)
            assert {name: after[name] for name in before} == before
            before = after
            assert ended != 0 or len(after) == WHOLE
            if len(after) == WHOLE:  # it was faster: start another
                stand_in.run(out)  # states may be left to release
                assert stand_in.contents(out) == expected
                directories += 1
                out, before = tmp_path / f"out{directories}", {}
    stand_in.run(out)
    assert stand_in.contents(out) == expected
    assert damage_of(out) == []


@contextlib.contextmanager
def server() -> Iterator[Callable[[pathlib.Path, int, float], int]]:
    """Yield a function that runs a process, sends it a signal and returns its exit status."""
    command, pipe = [sys.executable, SCRIPT, "--serve"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(out: pathlib.Path, number: int, after_s: float) -> int:
            process.stdin.write(f"{out}\n".encode())  # type: ignore[union-attr]
            word, pid = process.stdout.readline().split()  # type: ignore[union-attr]
            assert word == b"Started"
            if not select.select([process.stdout], [], [], after_s)[0]:
                # It may have ended, and have been waited for, between these two lines.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid.rstrip(b".")), number)
            return int(process.stdout.readline())  # type: ignore[union-attr]

        yield run
        assert process.communicate(timeout=60) == (b"", b"")


# Of n = 1, 2, 3, ... a few; in eight parts, all of them.
ALL_STEPS = 8
STEPS = [pytest.param(range(4, 2000, 13), id="a few")] + [
    pytest.param(range(first, 2000, ALL_STEPS), id=f"part {first} of all", marks=pytest.mark.slow)
    for first in range(1, ALL_STEPS + 1)
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", STEPS)
def test_killed_at_every_step(
    in_memory: pathlib.Path, expected_of: dict[str, str], steps: range, kind: str
) -> None:
    """The n-th write, sync, rename or removal never happens, and the process is gone."""
    for n in steps:
        out = in_memory / str(n)
        with failing_at(n, Crash) as reached, contextlib.suppress(Crash):
            stand_in.run(out, kind)
        if not reached():
            break
        stand_in.committed(out)
        stand_in.run(out, kind)
        assert stand_in.contents(out) == expected_of[kind], n
        assert damage_of(out) == []
        assert states_on_disk(out) == states_in_ledger(out), n
        shutil.rmtree(out)
    assert n > 300  # there is that much to be interrupted


# -------------------------------------------------------------------------------------- terminate


def stopped_after(
    out: pathlib.Path, monkeypatch: pytest.MonkeyPatch, segments: int, number: int, **more: Any
) -> type[BaseException]:
    """Send this process a signal inside the n-th segment -> the exception it ends with."""
    original, left = stand_in.Backend.segment, [segments]

    def segment(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    with monkeypatch.context() as patch, signals.as_exceptions():
        patch.setattr(stand_in.Backend, "segment", segment)
        with pytest.raises(KeyboardInterrupt) as raised:
            stand_in.run(out, **more)
    return raised.type


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGTERM, signals.Terminated), (signal.SIGINT, KeyboardInterrupt)],
    ids=["SIGTERM", "SIGINT"],
)
@pytest.mark.parametrize("segments", [1, 2, 3])
def test_a_signal_in_a_segment_costs_none_of_its_updates(
    tmp_path: pathlib.Path,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    segments: int,
    number: int,
    kind: type[BaseException],
) -> None:
    """Also where no snapshot would have been due, and in the last segment of a unit."""
    out, updates = tmp_path / "out", min(2 * segments, 6)
    assert stopped_after(out, monkeypatch, segments, number, snapshot_every_s=1e9) is kind
    found = sorted(path.name for path in (out / "progress").iterdir())
    assert [name.split("-")[-2].split(".")[-1] for name in found] == [str(updates)] * 2
    assert damage_of(out) == []
    stand_in.run(out)
    assert stand_in.contents(out) == expected


def test_a_sweep_stops_even_if_its_snapshot_cannot_be_written(
    tmp_path: pathlib.Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> str:
        raise FaultError("Cannot write the checkpoint: the disk is full.")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(stand_in.Backend, "save", full)
        kind = stopped_after(out, monkeypatch, 1, signal.SIGTERM, snapshot_every_s=1e9)
    assert kind is signals.Terminated
    stand_in.run(out)
    assert stand_in.contents(out) == expected


def test_a_second_signal_does_not_wait(tmp_path: pathlib.Path) -> None:
    with signals.as_exceptions(), pytest.raises(signals.Terminated), signals.deferred() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping()
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the second signal waited as well")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGTERM, signals.Terminated), (signal.SIGINT, KeyboardInterrupt)],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_is_not_lost_in_a_callback_whose_exceptions_python_ignores(
    number: int, kind: type[BaseException]
) -> None:
    """jax has a callback of the garbage collector, in which a SIGTERM was lost once."""
    sent: list[str] = []

    def callback(phase: str, _: dict[str, int]) -> None:
        if not sent:
            sent.append(phase)
            os.kill(os.getpid(), number)
            time.sleep(0)  # the handler runs here, if not in the line above

    gc.callbacks.append(callback)
    try:
        with signals.as_exceptions(), pytest.raises(KeyboardInterrupt) as raised:
            gc.collect()
            assert sent
            for _ in range(1000):
                time.sleep(0.01)
    finally:
        gc.callbacks.remove(callback)
    assert raised.type is kind


# ---------------------------------------------------------------------------------- failing calls


class Crash(BaseException):
    """Passes every handler of errors."""


CALLS = ("fsync", "replace", "mkdir", "unlink", "rmdir")


@contextlib.contextmanager
def failing_at(n: int, error: Callable[[], BaseException]) -> Iterator[Callable[[], bool]]:
    """Let the n-th call to the disk or the ledger fail -> whether it was reached."""
    count, originals = [0], {name: getattr(os, name) for name in CALLS}
    sync = disk.sync

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            count[0] += 1
            if count[0] == n:
                raise error()
            return original(*arguments, **more)

        return call

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *arguments: Any) -> Any:
            count[0] += not sql.startswith(READS)
            if count[0] == n and not sql.startswith(READS):
                raise as_of_sqlite(error())
            return super().execute(sql, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        for name, original in originals.items():
            patch.setattr(os, name, wrapped(original))
        patch.setattr(disk, "sync", wrapped(sync))
        connect = functools.partial(sqlite3.connect, factory=Connection)
        patch.setattr(ledgers.sqlite3, "connect", connect)
        yield lambda: count[0] >= n


READS = ("SELECT", "PRAGMA integrity_check")


def as_of_sqlite(error: BaseException) -> BaseException:
    return sqlite3.OperationalError("disk I/O error") if isinstance(error, OSError) else error


ERRORS = (errno.ENOSPC, errno.EIO)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", STEPS)
def test_the_nth_call_to_the_disk_fails(
    in_memory: pathlib.Path, expected_of: dict[str, str], steps: range, kind: str
) -> None:
    """One plain sentence, committed results stay, and the next run ends as if nothing had failed.

    Of a few steps each has one of the two errors, of all steps each has both.
    """
    failed, all_of_them = dict.fromkeys(ERRORS, 0), steps.step == ALL_STEPS
    for i, n in enumerate(steps):
        for number in ERRORS if all_of_them else ERRORS[i % 2 : i % 2 + 1]:
            out = in_memory / f"{n}-{number}"
            with failing_at(n, lambda: OSError(number, os.strerror(number))) as reached:  # noqa: B023
                try:
                    stand_in.run(out, kind)
                except FaultError as error:
                    assert "\n" not in str(error) and str(error).endswith(".")
                    failed[number] += 1
                was_reached = reached()
            before = stand_in.committed(out)
            stand_in.run(out, kind)
            after = stand_in.committed(out)
            assert {name: after[name] for name in before} == before
            assert stand_in.contents(out) == expected_of[kind], n
            shutil.rmtree(out)
        if not was_reached:
            break
    assert min(failed.values()) > 10


def test_a_file_may_not_grow(tmp_path: pathlib.Path, expected: str) -> None:
    """The system itself refuses further writes, as on a full disk."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    out = tmp_path / "out"
    process = start(out, preexec_fn=limited)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.count("\n") == 1 and "Traceback" not in said
    before = stand_in.committed(out)
    assert start(out).wait(60) == 0
    after = stand_in.committed(out)
    assert {name: after[name] for name in before} == before
    assert stand_in.contents(out) == expected


# ----------------------------------------------------------------------------------------- damage


def files_of(out: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(path for path in out.rglob("*") if path.is_file())
    return [
        path.relative_to(out) for path in found if path.name not in ("lock", "ledger.sqlite-shm")
    ]


def settled(whole: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Copy a directory so that its ledger is one file, without SQLite's log."""
    shutil.copytree(whole, out)
    with contextlib.closing(sqlite3.connect(out / ledgers.LEDGER)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    return out


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit": lambda data, chance: flipped(data, chance.randrange(8 * len(data))),
    "cut": lambda data, chance: data[: chance.randrange(len(data))],
}


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "kind", ["arrays/*.npz", "checkpoints/*/arrays.npz", "checkpoints/*/MANIFEST.json"]
)
def test_a_damaged_result_is_found_and_the_next_run_repairs_it(
    tmp_path: pathlib.Path, whole: pathlib.Path, expected: str, kind: str, damage: str
) -> None:
    chance = random.Random(kind)
    out = settled(whole, tmp_path / "out")
    for path in sorted(out.glob(kind)):
        original = path.read_bytes()
        for _ in range(5):
            path.write_bytes(DAMAGES[damage](original, chance))
            (problem,) = damage_of(out)
            assert problem.kind == "unit" and "damaged" in problem.text
        path.write_bytes(original)
    victim = sorted(out.glob(kind))[0]
    victim.write_bytes(DAMAGES[damage](victim.read_bytes(), chance))
    stand_in.run(out)
    assert stand_in.contents(out) == expected
    assert damage_of(out) == []


@pytest.mark.parametrize("kind", ["records/*.json", "identity.json", "spec.toml"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_text_is_found_and_written_again(
    tmp_path: pathlib.Path, whole: pathlib.Path, expected: str, kind: str, damage: str
) -> None:
    chance = random.Random(kind)
    out = settled(whole, tmp_path / "out")
    victim = sorted(out.glob(kind))[0]
    original = victim.read_bytes()
    for _ in range(20):
        victim.write_bytes(DAMAGES[damage](original, chance))
        if json_equal(victim, original):  # a blank between two words of JSON means nothing
            continue
        (problem,) = damage_of(out)
        assert problem.kind in ("record", "text")
    said: list[str] = []
    assert fsck.run(out, True, said.append) == 0
    assert victim.read_bytes() == original or json_equal(victim, original)
    assert stand_in.contents(out) == expected


def json_equal(path: pathlib.Path, original: bytes) -> bool:
    try:
        return json.loads(path.read_bytes()) == json.loads(original)
    except ValueError:
        return False


def test_a_flipped_bit_in_the_ledger_is_found_or_means_nothing(
    tmp_path: pathlib.Path, whole: pathlib.Path, expected: str
) -> None:
    """For 60 random bits; a ledger that cannot be read is rebuilt with all committed units."""
    chance = random.Random(1)
    out = settled(whole, tmp_path / "out")
    ledger, said_before = out / ledgers.LEDGER, rows_of(out)
    original, rebuilt = ledger.read_bytes(), 0
    for _ in range(60):
        ledger.write_bytes(flipped(original, chance.randrange(8 * len(original))))
        if damage_of(out) == []:
            assert rows_of(out) == said_before
            assert stand_in.contents(out) == expected
            continue
        with pytest.raises(FaultError, match=r"fsck DIR --repair"):
            stand_in.run(out)
        if rebuilt < 5:
            rebuilt += 1
            said: list[str] = []
            assert fsck.run(out, True, said.append) == 0
            assert "The ledger is rebuilt with 8 units from their records." in said
            assert stand_in.contents(out) == expected
        shutil.rmtree(out / "ledger.damaged", ignore_errors=True)
        for name in (f"{ledgers.LEDGER}-wal", f"{ledgers.LEDGER}-shm"):
            (out / name).unlink(missing_ok=True)
    assert rebuilt == 5


def rows_of(out: pathlib.Path) -> list[tuple[Any, ...]]:
    """Return all rows of a ledger, except notes and the spec, which have no hash."""
    with contextlib.closing(sqlite3.connect(out / ledgers.LEDGER)) as connection:
        queries = ("* FROM units", "* FROM legs", "* FROM meta WHERE key != 'spec'")
        found = [connection.execute(f"SELECT {query} ORDER BY 1, 2") for query in queries]
        return [row for rows in found for row in rows]


def with_logs(directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """Copy a directory after each commit, as a process that dies then would leave it."""
    out, copies, original = directory / "out", list[pathlib.Path](), stores.Store.commit

    def commit(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        copies.append(directory / f"after{len(copies)}")
        shutil.copytree(out, copies[-1])

    with monkeypatch.context() as patch:
        patch.setattr(stores.Store, "commit", commit)
        stand_in.run(out)
    return copies


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_log_of_the_ledger_costs_time_and_nothing_else(
    in_memory: pathlib.Path, expected: str, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """SQLite cuts it at the first damaged frame: later frames count as not committed."""
    chance, shorter = random.Random(damage), 0
    for copy in with_logs(in_memory, monkeypatch):
        log = copy / f"{ledgers.LEDGER}-wal"
        done, changed = len(stand_in.committed(copy)), DAMAGES[damage](log.read_bytes(), chance)
        log.write_bytes(changed)
        shorter += len(stand_in.committed(copy)) < done
        stand_in.run(copy)
        assert stand_in.contents(copy) == expected
    assert shorter > 0


def test_a_lost_ledger_is_rebuilt_and_damaged_units_are_computed_again(
    tmp_path: pathlib.Path, whole: pathlib.Path, expected: str
) -> None:
    out = settled(whole, tmp_path / "out")
    (out / ledgers.LEDGER).write_bytes(b"not a ledger" * 100)
    (out / "records" / "round0-group0-unit1.json").unlink()
    (out / "arrays" / "round1-group0-unit0.npz").unlink()
    assert fsck.run(out, False, lambda _: None) == 1
    assert fsck.run(out, True, lambda _: None) == 0
    with stores.Store.read(out) as store:
        pending = {unit["name"] for unit in store.ledger.units() if not unit["done"]}
    assert pending == {"round1-group0-unit0"}
    stand_in.run(out)
    assert stand_in.contents(out) == expected


def test_the_units_behind_a_lost_state_are_computed_again(
    tmp_path: pathlib.Path, whole: pathlib.Path, expected: str
) -> None:
    """A unit of the last rung needs the states of the rungs before it."""
    out = settled(whole, tmp_path / "out")
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints").mkdir()
    said: list[str] = []
    assert fsck.run(out, True, said.append) == 0
    stand_in.run(out)
    assert stand_in.contents(out) == expected


# --------------------------------------------------------------------------------- released states


def states_on_disk(out: pathlib.Path) -> set[str]:
    return {path.name for path in (out / "checkpoints").iterdir() if path.name[0] != "."}


def states_in_ledger(out: pathlib.Path) -> set[str]:
    with stores.Store.read(out) as store:
        return {unit["name"] for unit in store.ledger.units() if unit["has_state"]}


def listened(monkeypatch: pytest.MonkeyPatch, out: pathlib.Path) -> list[str]:
    """Resume a population -> the notes."""
    said: list[str] = []
    monkeypatch.setattr(stand_in.Silent, "say", lambda _, text: said.append(text), raising=False)
    stand_in.run(out, "pbt")
    return [text for text in said if text.startswith("Note")]


def test_a_state_is_kept_as_long_as_a_run_ends_in_it(
    whole: pathlib.Path, populated: pathlib.Path
) -> None:
    """Of a population, the last generation; of halving, units with a dropped run."""
    last = {f"round3-group0-unit{i}" for i in range(3)}
    assert states_on_disk(populated) == states_in_ledger(populated) == last
    assert states_on_disk(whole) == states_in_ledger(whole)
    for out in (whole, populated):
        assert fsck.check(out) == []
        with stores.Store.read(out) as store:
            assert {run["unit"] for run in store.ledger.runs()} == states_in_ledger(out)
    with stores.Store.read(populated) as store, pytest.raises(InputError, match="a later round"):
        store.state("round0-group0-unit0", np.zeros(3, np.uint64), stand_in.Backend().load)


@pytest.mark.parametrize(
    ("unit", "again"), [("round0-group0-unit1", 0), ("round1-group0-unit0", 1),
                        ("round3-group0-unit2", 3)]
)  # fmt: skip
def test_a_damaged_unit_is_computed_from_its_ancestors(
    tmp_path: pathlib.Path,
    populated: pathlib.Path,
    expected_of: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    unit: str,
    again: int,
) -> None:
    """At least one unit of each generation before it, and a note says so."""
    out = settled(populated, tmp_path / "out")
    (out / "arrays" / f"{unit}.npz").write_bytes(b"gone")
    said = listened(monkeypatch, out)
    assert len(said) == 1 + bool(again) and f"the unit {unit} is computed again" in said[0]
    if again:
        number = re.search(r"computing ([0-9]+) units? of earlier rounds", said[1])
        assert number and int(number[1].replace("a", "1")) >= again
    assert stand_in.contents(out) == expected_of["pbt"]
    assert fsck.check(out) == []


def test_a_sweep_with_states_left_to_release_is_unfinished(
    tmp_path: pathlib.Path, expected_of: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last commit and the last release."""
    out, original = tmp_path / "out", stores.Store.release

    def release(self: stores.Store, units: list[str]) -> None:
        if any("round2" in unit for unit in units):
            raise Crash
        original(self, units)

    def unfinished() -> bool:
        rounds = search.rounds(stand_in.spec("pbt"))  # type: ignore[arg-type]
        with stores.Store.read(out) as store:
            assert store.ledger.pending() == [] and store.superseded(1) == []
            return engine.unfinished(rounds, store)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(stores.Store, "release", release)
        stand_in.run(out, "pbt")
    assert unfinished()
    stand_in.run(out, "pbt")
    assert not unfinished()
    assert stand_in.contents(out) == expected_of["pbt"]


def test_a_crash_among_the_ancestors_changes_nothing(
    in_memory: pathlib.Path, populated: pathlib.Path, expected_of: dict[str, str]
) -> None:
    for n in range(1, 2000, 37):
        out = settled(populated, in_memory / str(n))
        (out / "arrays" / "round3-group0-unit0.npz").unlink()
        with failing_at(n, Crash) as reached, contextlib.suppress(Crash):
            stand_in.run(out, "pbt")
        stand_in.run(out, "pbt")
        assert stand_in.contents(out) == expected_of["pbt"], n
        assert states_on_disk(out) == states_in_ledger(out), n
        if not reached():
            break
    assert n > 300


def test_a_lost_generation_of_a_lost_ledger_is_computed_again(
    tmp_path: pathlib.Path, populated: pathlib.Path, expected_of: dict[str, str]
) -> None:
    """A unit that the rebuilt ledger does not list lacks the states it starts from."""
    out = settled(populated, tmp_path / "out")
    (out / ledgers.LEDGER).write_bytes(b"not a ledger" * 100)
    (out / "records" / "round2-group0-unit0.json").unlink()
    assert fsck.run(out, True, lambda _: None) == 0
    with stores.Store.read(out) as store:
        assert (
            len(store.ledger.units()) == 11
            and store.ledger.pending() == []
            and store.damaged() == {}
        )
    stand_in.run(out, "pbt")
    assert stand_in.contents(out) == expected_of["pbt"]


def test_memory_may_run_out_where_states_were_released(
    tmp_path: pathlib.Path, populated: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group starts again with smaller units, so earlier units are computed again."""
    out, original = settled(populated, tmp_path / "out"), stand_in.Backend.compile

    def compile(self: Any, group: Any) -> Any:
        if group.rows == 3 and group.start == 18:
            raise memory.OutOfMemory("3 rows are too many", 2)
        return original(self, group)

    monkeypatch.setattr(stand_in.Backend, "compile", compile)
    (out / "arrays" / "round3-group0-unit0.npz").unlink()
    stand_in.run(out, "pbt")
    for found in (populated, out):
        with stores.Store.read(found) as store:
            legs = {(leg["run_id"], leg["round"]): leg["score"] for leg in store.ledger.legs()}
            sizes = [unit["size"] for unit in store.ledger.units() if unit["round"] == 3]
        if found == populated:
            expected_scores = legs
    assert sizes == [2, 2, 2, 2] and legs == expected_scores


# --------------------------------------------------------------------------------------- snapshots


def interrupted(directory: pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """Return a directory with finished snapshots of units in progress, and the snapshots."""
    for n in range(150, 400):
        out = directory / f"cut{n}"
        with failing_at(n, Crash), contextlib.suppress(Crash):
            stand_in.run(out)
        found = [path for path in (out / "progress").iterdir() if path.name[0] != "."]
        if len(found) >= 2 and damage_of(out) == []:
            return out, sorted(found)
    raise AssertionError("no crash left two snapshots")


def test_a_damaged_snapshot_is_passed_over(tmp_path: pathlib.Path, expected: str) -> None:
    out, found = interrupted(tmp_path)
    for path in found:
        (path / "arrays.npz").write_bytes(b"PK broken")
    assert {problem.kind for problem in damage_of(out)} == {"snapshot"}
    stand_in.run(out)
    assert stand_in.contents(out) == expected
    assert list((out / "progress").iterdir()) == []


def test_a_snapshot_saves_updates(
    tmp_path: pathlib.Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash in the last unit, fewer updates are left than the unit has."""
    out, updates = tmp_path / "out", [0]
    original = stand_in.Backend.segment

    def counting(self: Any, *arguments: Any) -> Any:
        updates[0] += arguments[-1]
        return original(self, *arguments)

    monkeypatch.setattr(stand_in.Backend, "segment", counting)
    stand_in.run(tmp_path / "whole")
    all_updates, updates[0] = updates[0], 0
    with failing_at(260, Crash), contextlib.suppress(Crash):
        stand_in.run(out)
    first = updates[0]
    stand_in.run(out)
    assert first < all_updates
    assert updates[0] - all_updates < 12  # less than a rung's worth was done twice
    assert stand_in.contents(out) == expected


def test_a_crafted_snapshot_runs_nothing(tmp_path: pathlib.Path, expected: str) -> None:
    out, found = interrupted(tmp_path)
    for path in found:
        np.savez(path / "arrays.npz", root=np.array([Bomb()], dtype=object))
        digest = checkpoint._write_manifest(path, [])
        path.rename(path.with_name(path.name[: -len(digest)] + digest))  # all hashes are right
    assert damage_of(out) == []
    stand_in.run(out)
    assert stand_in.contents(out) == expected


class Bomb:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was executed",))


# -------------------------------------------------------------------------------------- two at once


def test_a_stopped_process_keeps_its_directory(tmp_path: pathlib.Path, expected: str) -> None:
    out = tmp_path / "out"
    first = start(out)
    while not (out / "progress").is_dir():
        time.sleep(0.005)
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)
    try:
        second = start(out)
        _, said = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "Another process is running this sweep" in said and said.count("\n") == 1
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 0
    assert stand_in.contents(out) == expected


def test_two_at_the_same_moment(tmp_path: pathlib.Path, expected: str) -> None:
    out = tmp_path / "out"
    processes = [start(out) for _ in range(4)]
    statuses = [process.wait(60) for process in processes]
    assert set(statuses) <= {0, 1} and 0 in statuses
    assert stand_in.contents(out) == expected
    assert damage_of(out) == []


def test_a_repair_leaves_a_running_sweep_alone(tmp_path: pathlib.Path) -> None:
    """A file that looks left over may be one that the other process is writing."""
    out, _ = interrupted(tmp_path)
    unfinished = out / "progress" / ".unit.writing"
    unfinished.mkdir()
    with stores.Store.open(out, {"kind": "halving"}):
        with pytest.raises(FaultError, match="Another process"):
            fsck.run(out, True, lambda _: None)
        assert unfinished.is_dir()
    assert fsck.run(out, True, lambda _: None) == 0
    assert not unfinished.exists()


# ------------------------------------------------------------------------------------ surroundings


def test_another_spec_is_refused_with_what_differs(
    tmp_path: pathlib.Path, whole: pathlib.Path
) -> None:
    out = settled(whole, tmp_path / "out")
    before = {path: (out / path).read_bytes() for path in files_of(out)}
    with pytest.raises(InputError, match=r'its kind is "halving" and this one\'s is "longer"'):
        stand_in.run(out, "longer")
    assert {path: (out / path).read_bytes() for path in files_of(out)} == before


def test_the_clock_may_go_backwards(
    tmp_path: pathlib.Path, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [2e9]

    def earlier() -> float:
        now[0] -= 3600.0
        return now[0]

    monkeypatch.setattr(time, "time", earlier)
    out, _ = interrupted(tmp_path)
    stand_in.run(out)
    assert stand_in.contents(out) == expected


def test_a_directory_that_is_no_result_is_refused(tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="not a result directory"):
            fsck.run(path, True, lambda _: None)
