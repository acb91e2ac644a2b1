import errno
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from purejaxpg import FaultError, InputError, disk
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import store as stores
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store

IDENTITY = {
    "agent": {"name": "ppo", "sha256": "ab" * 32},
    "seeds": 2,
    "sweep": {"learning_rate": [1e-3, 3e-4], "clip_eps": [0.2]},
}


def make_units(rates=(1e-3, 3e-4, 1e-4), seeds=2):
    return {
        f"g0-c{chunk:04d}": [
            Run(f"r{chunk}-{seed}", {"learning_rate": rate, "gamma": 0.99}, seed,
                {"learning_rate": rate})
            for seed in range(seeds)
        ]
        for chunk, rate in enumerate(rates)
    }  # fmt: skip


def make_arrays(seed=0, rows=2):
    generator = np.random.default_rng(seed)
    return {
        "episode/return_sum": generator.standard_normal((rows, 5)).astype(np.float32),
        "evaluation/return": generator.standard_normal((rows, 4)),
        "odd %2F/näme.npy": np.arange(rows),
        "file": np.ones((rows, 1), bool),  # a parameter of np.savez
    }


def make_outcomes(unit, diverged=()):
    return [
        Outcome(run.run_id, "diverged", float("nan"), -1.5, 3)
        if row in diverged
        else Outcome(run.run_id, "done", row + 0.1, float("inf"))
        for row, run in enumerate(make_units()[unit])
    ]


def commit(store, unit, seed=0, diverged=()):
    facts = {"steps_per_update": np.int64(512), "wall_s": 1.5, "devices": ["cpu"]}
    state = {"w": np.full(3, seed, np.float32)}
    store.commit(unit, make_arrays(seed), state, make_outcomes(unit, diverged), facts)


def snapshot(root):
    """Return every path under a directory with its bytes and the time of its last change."""
    return {
        path.relative_to(root).as_posix(): (
            path.read_bytes() if path.is_file() else None,
            path.stat().st_mtime_ns,
        )
        for path in [root, *root.rglob("*")]
    }


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "deep" / "out", IDENTITY, "seeds = 2\n") as opened:
        opened.ledger.plan(make_units())
        yield opened


# ---------------------------------------------------------------------------------- plain working


def test_a_new_directory_has_the_documented_layout(store):
    assert {path.name for path in store.path.iterdir()} >= {
        "ledger.sqlite", "arrays", "checkpoints", "spec.toml", "lock",
    }  # fmt: skip
    assert (store.path / "spec.toml").read_text() == "seeds = 2\n"
    assert store.ledger.identity == IDENTITY
    pragma = store.ledger.connection.execute
    assert pragma("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert pragma("PRAGMA synchronous").fetchone()[0] == 2  # FULL


def test_committed_results_are_read_back(store):
    names = list(make_units())
    assert store.ledger.pending() == names
    commit(store, names[1], seed=7, diverged=[1])
    assert store.ledger.pending() == [names[0], names[2]] and not store.ledger.finished

    found = store.arrays(names[1])
    expected = make_arrays(7)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert store.arrays(names[1], ["file", "absent"]).keys() == {"file"}
    assert store.state(names[1], {"w": np.zeros(3, np.float32)})["w"].tolist() == [7, 7, 7]

    assert [run["run_id"] for run in store.ledger.runs()] == [
        run.run_id for unit in make_units().values() for run in unit
    ]
    done, diverged = store.ledger.runs()[2:4]
    assert done == {
        "run_id": "r1-0", "unit": names[1], "row": 0, "seed": 0, "status": "done",
        "config": {"learning_rate": 3e-4, "gamma": 0.99}, "swept": {"learning_rate": 3e-4},
        "score": 0.1, "greedy_score": float("inf"), "diverged_at": None,
        "stage": "tune", "round": 0, "start": 0, "stop": 0, "total": 0, "parent": None,
    }  # fmt: skip
    assert (diverged["status"], diverged["diverged_at"]) == ("diverged", 3)
    assert np.isnan(diverged["score"])  # SQLite turns NaN into NULL
    assert store.ledger.runs()[0]["status"] == "pending" and store.ledger.runs()[0]["score"] is None
    assert [(u["name"], u["done"], u["rows"]) for u in store.ledger.units()] == [
        (names[0], False, 2), (names[1], True, 2), (names[2], False, 2),
    ]  # fmt: skip
    assert store.ledger.units()[0]["facts"] is None
    assert store.ledger.units()[1]["facts"]["steps_per_update"] == 512


def test_a_sweep_is_finished_when_all_is_committed_and_stays_so(store):
    for name in make_units():
        assert not store.ledger.finished
        commit(store, name)
    assert store.ledger.finished
    before = store.ledger.runs()
    store.close()
    with Store.open(store.path, IDENTITY) as again:
        again.ledger.plan(make_units())
        assert (
            again.ledger.finished and again.ledger.pending() == [] and again.ledger.runs() == before
        )


def test_nothing_planned_is_not_finished(tmp_path):
    with Store.open(tmp_path / "out", IDENTITY) as empty:
        assert (
            not empty.ledger.finished and empty.ledger.pending() == [] and empty.ledger.runs() == []
        )


def test_equal_results_are_equal_files(store):
    paths = [store.path / "arrays" / f"{name}.npz" for name in make_units()]
    for name in make_units():
        commit(store, name)
        time.sleep(0.01)
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_unit_without_a_state(store):
    name = next(iter(make_units()))
    store.commit(name, make_arrays(), None, make_outcomes(name), {})
    assert list((store.path / "checkpoints").iterdir()) == []
    with pytest.raises(InputError, match="has no checkpoint"):
        store.state(name, {})


def test_numbers_of_numpy_are_welcome(tmp_path):
    with Store.open(tmp_path / "out", {"n": np.float32(0.5), "list": np.arange(2)}) as store:
        store.ledger.plan(
            {"u": [Run("r", {"a": np.float32(0.5)}, np.int64(3), {"a": np.float64(0.5)})]}
        )
        outcome = Outcome("r", "diverged", np.float32(1.5), np.float64(2), np.int64(4))
        store.commit("u", {"x": np.zeros((1, 2))}, None, [outcome], {"n": np.int32(1)})
        assert store.ledger.runs()[0]["diverged_at"] == 4 and store.ledger.runs()[0]["score"] == 1.5
        assert store.ledger.identity == {"n": 0.5, "list": [0, 1]}


def test_importing_the_store_does_not_import_jax():
    code = "import sys, purejaxpg.sweep.store; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------- plan


def test_planning_again_changes_nothing(store):
    commit(store, "g0-c0001")
    before = store.ledger.runs()
    store.ledger.plan(make_units())
    assert store.ledger.runs() == before


def test_pending_units_may_be_planned_again_and_committed_ones_stay(store):
    units = make_units()
    commit(store, "g0-c0000")
    halves = {f"{name}-{run.seed}": [run] for name, runs in list(units.items())[1:] for run in runs}
    store.ledger.plan({"g0-c0000": units["g0-c0000"], **halves})
    assert store.ledger.pending() == list(halves)
    assert [run["status"] for run in store.ledger.runs()] == ["done"] * 2 + ["pending"] * 4
    with pytest.raises(InputError, match="would lose the committed unit g0-c0000"):
        store.ledger.plan(halves)
    changed = {"g0-c0000": units["g0-c0000"][::-1]}
    with pytest.raises(InputError, match="would lose the committed unit g0-c0000"):
        store.ledger.plan(changed)
    assert store.ledger.pending() == list(halves)


def test_a_reset_unit_is_pending_and_can_be_committed_again(store):
    commit(store, "g0-c0000", seed=1)
    store.ledger.reset(["g0-c0000"])
    assert store.ledger.pending()[0] == "g0-c0000"
    assert {run["status"] for run in store.ledger.runs()} == {"pending"}
    with pytest.raises(InputError, match="still pending"):
        store.arrays("g0-c0000")
    commit(store, "g0-c0000", seed=2)
    assert store.state("g0-c0000", {"w": np.zeros(3, np.float32)})["w"][0] == 2


def test_a_plan_with_a_run_twice_is_refused(store):
    run = make_units()["g0-c0000"][0]
    with pytest.raises(FaultError, match=r"UNIQUE constraint failed: legs\.run_id"):
        store.ledger.plan({"a": [run], "b": [run]})
    assert len(store.ledger.pending()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "nope"}, "'nope' is not planned"),
        ({"outcomes": make_outcomes("g0-c0000")[::-1]}, "must be those of its 2 runs"),
        ({"outcomes": make_outcomes("g0-c0000")[:1]}, "must be those of its 2 runs"),
        ({"arrays": {"x": np.zeros((3, 4))}}, r"x .* has shape \[3, 4\]; .* must be its 2 runs"),
        ({"arrays": {"x": np.float32(1)}}, r"has shape \[\]"),
        ({"arrays": {"x": np.array([{}, {}])}}, "must be numeric"),
    ],
)
def test_a_commit_that_does_not_match_its_unit_is_refused(store, arguments, message):
    good = {
        "unit": "g0-c0000", "arrays": make_arrays(), "state": None,
        "outcomes": make_outcomes("g0-c0000"), "facts": {},
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        store.commit(**{**good, **arguments})
    assert list((store.path / "arrays").iterdir()) == [] and len(store.ledger.pending()) == 3


def test_a_second_commit_of_a_unit_is_refused(store):
    commit(store, "g0-c0000", seed=1)
    before = snapshot(store.path / "arrays")
    with pytest.raises(InputError, match="already committed"):
        commit(store, "g0-c0000", seed=2)
    assert snapshot(store.path / "arrays") == before


# ------------------------------------------------------------------------- whose directory is it?


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sweep": {"learning_rate": [1e-3], "clip_eps": [0.2]}},
         r"its sweep\.learning_rate is \[0\.001,0\.0003\] and this one's is \[0\.001\]; "
         r"choose another with --out\."),
        ({"agent": {"name": "ppo", "sha256": "cd" * 32}}, r'its agent\.sha256 is "abab'),
        ({"seeds": 3}, "its seeds is 2 and this one's is 3"),
        ({"extra": True}, "its extra is absent and this one's is true"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["closed", "killed"])
def test_the_directory_of_another_sweep_is_refused_and_untouched(tmp_path, change, message, how):
    root = tmp_path / "out"
    with Store.open(root, IDENTITY) as store:
        store.ledger.plan(make_units())
        commit(store, "g0-c0000")
        if how == "killed":
            # The write-ahead log still holds the commit.
            shutil.copytree(root, tmp_path / "copy")
            root = tmp_path / "copy"
            assert (root / "ledger.sqlite-wal").stat().st_size > 0
    before = snapshot(root)
    with pytest.raises(InputError, match=message):
        Store.open(root, {**IDENTITY, **change})
    assert snapshot(root) == before
    with Store.open(root, IDENTITY) as store:
        assert len(store.ledger.pending()) == 2 and store.arrays("g0-c0000")


@pytest.mark.parametrize("names", [["notes.txt"], ["spec.toml"], ["arrays/x.npz"], ["lock", "x"]])
def test_a_directory_of_something_else_is_refused_and_untouched(tmp_path, names):
    root = tmp_path / "mine"
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("precious")
    before = snapshot(root)
    with pytest.raises(InputError, match="is not empty and is not a result directory"):
        Store.open(root, IDENTITY)
    with pytest.raises(InputError, match="is not a result directory"):
        Store.read(root)
    assert snapshot(root) == before


def test_an_empty_directory_is_taken(tmp_path):
    with Store.open(tmp_path, IDENTITY) as store:
        assert store.ledger.pending() == []


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        Store.open(tmp_path / "file", IDENTITY)
    with pytest.raises(FaultError, match="is a file, not a directory"):
        Store.open(tmp_path / "file" / "out", IDENTITY)


def test_another_format_is_refused(store):
    store.ledger.connection.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    store.close()
    with pytest.raises(InputError, match="in the format 99"):
        Store.open(store.path, IDENTITY)


# ------------------------------------------------------------------------------------ two processes


def test_a_second_runner_is_refused_and_a_reader_is_not(store):
    commit(store, "g0-c0000")
    code = f"""
        from purejaxpg import FaultError
        from purejaxpg.sweep.store import Store
        with Store.read({str(store.path)!r}) as reader:
            assert len(reader.ledger.pending()) == 2 and reader.arrays("g0-c0000")
        try:
            Store.open({str(store.path)!r}, {IDENTITY!r})
        except FaultError as error:
            print(error)
        """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("Another process is running this sweep")
    with pytest.raises(FaultError, match="Another process is running this sweep"):
        Store.open(store.path, IDENTITY)
    commit(store, "g0-c0001")
    store.close()
    Store.open(store.path, IDENTITY).close()


def test_a_reader_sees_commits_as_they_come_and_cannot_write(store):
    with Store.read(store.path) as reader:
        assert len(reader.ledger.pending()) == 3
        commit(store, "g0-c0000")
        assert len(reader.ledger.pending()) == 2
        for write in (lambda: reader.ledger.plan({}), lambda: commit(reader, "g0-c0001"),
                      lambda: reader.ledger.reset(["g0-c0000"])):  # fmt: skip
            with pytest.raises(InputError, match="reading only"):
                write()
    assert len(store.ledger.pending()) == 2


def test_a_commit_in_the_middle_of_a_readers_check_is_no_damage(store, monkeypatch):
    first, second, _ = make_units()
    commit(store, first)
    records = ledgers._records

    def interrupted(connection, *unit):
        found = records(connection, *unit)
        monkeypatch.setattr(ledgers, "_records", records)
        commit(store, second)
        return found

    monkeypatch.setattr(ledgers, "_records", interrupted)
    with Store.read(store.path) as reader:
        assert reader.ledger.pending() == store.ledger.pending()
        assert second not in reader.ledger.pending()


def test_a_directory_that_cannot_be_written_can_be_read(store):
    commit(store, "g0-c0000")
    store.close()
    # SQLite keeps a reader's index in this file; a directory in its place cannot be written.
    (store.path / "ledger.sqlite-shm").mkdir()
    with Store.read(store.path) as reader:
        assert len(reader.ledger.pending()) == 2


# ----------------------------------------------------------------------------------------- damage


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_in_an_array_file_is_noticed(store):
    commit(store, "g0-c0000")
    path = store.path / "arrays" / "g0-c0000.npz"
    whole = path.read_bytes()
    for position in np.random.default_rng(0).integers(len(whole), size=100):
        flip(path, position, int(position) % 8)
        with pytest.raises(FaultError, match=r"g0-c0000\.npz is damaged"):
            store.arrays("g0-c0000")
        path.write_bytes(whole)
    assert store.arrays("g0-c0000")


def test_a_truncated_or_missing_array_file_is_noticed(store):
    commit(store, "g0-c0000")
    path = store.path / "arrays" / "g0-c0000.npz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FaultError, match="is damaged"):
        store.arrays("g0-c0000")
    path.unlink()
    with pytest.raises(FaultError, match="is missing"):
        store.arrays("g0-c0000")


def test_a_damaged_or_exchanged_checkpoint_is_noticed(store):
    commit(store, "g0-c0000", seed=1)
    commit(store, "g0-c0001", seed=2)
    template = {"w": np.zeros(3, np.float32)}
    checkpoints = store.path / "checkpoints"
    largest = max(
        (p for p in (checkpoints / "g0-c0000").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size * (p.name != "MANIFEST.json"),
    )
    whole = largest.read_bytes()
    flip(largest, len(whole) // 2)
    with pytest.raises(FaultError, match=f"{largest.name} is damaged"):
        store.state("g0-c0000", template)
    largest.write_bytes(whole)
    shutil.rmtree(checkpoints / "g0-c0000")
    # Whole and consistent, but of another unit.
    shutil.copytree(checkpoints / "g0-c0001", checkpoints / "g0-c0000")
    with pytest.raises(FaultError, match=r"MANIFEST\.json is damaged"):
        store.state("g0-c0000", template)


def test_no_flipped_bit_in_the_ledger_changes_a_result_unnoticed(store):
    for name in make_units():
        commit(store, name)
    expected = store.ledger.runs(), store.ledger.units()
    store.close()
    path = store.path / "ledger.sqlite"
    whole = path.read_bytes()
    generator = random.Random(0)
    used = [position for position, byte in enumerate(whole) if byte]  # most of the pages is empty
    noticed = 0
    for position in generator.sample(used, 150):
        flip(path, position, generator.randrange(8))
        try:
            with Store.read(store.path) as reader:
                assert (reader.ledger.runs(), reader.ledger.units()) == expected
        except FaultError as error:
            assert "ledger.sqlite" in str(error)
            noticed += 1
        path.write_bytes(whole)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert noticed > 100


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE legs SET score = 0.3 WHERE run_id = 'r0-0'",
        "UPDATE legs SET config = '{}' WHERE run_id = 'r0-0'",
        "UPDATE units SET facts = '{}' WHERE done = 1",
        "UPDATE units SET done = 0",
        "UPDATE units SET done = 1",
        "UPDATE units SET position = 5 WHERE done = 1",
        "DELETE FROM legs WHERE run_id = 'r0-1'",
    ],
)
def test_an_altered_record_is_noticed(store, damage):
    commit(store, "g0-c0000")
    store.ledger.connection.execute(damage)
    store.close()
    for opening in (lambda: Store.read(store.path), lambda: Store.open(store.path, IDENTITY)):
        with pytest.raises(FaultError, match=r"the record of the unit .* was altered"):
            opening()


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\0" + b"\xff" * 4080])
def test_a_ledger_that_is_none(store, content):
    store.close()
    (store.path / "ledger.sqlite").write_bytes(content)
    before = snapshot(store.path)
    with pytest.raises(FaultError, match=r"ledger\.sqlite"):
        Store.open(store.path, IDENTITY)
    assert snapshot(store.path) == before
    with pytest.raises(FaultError, match=r"ledger\.sqlite"):
        Store.read(store.path)


def test_a_pickle_in_an_array_file_is_never_loaded(store, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    commit(store, "g0-c0000")
    path = store.path / "arrays" / "g0-c0000.npz"
    contents = [np.array([Bomb()], dtype=object), None]
    for content in contents:
        if content is None:
            path.write_bytes(pickle.dumps(Bomb()))
        else:
            with path.open("wb") as file:
                np.savez(file, **{"metric.x": content})
        # Even with a ledger that vouches for it.
        store.ledger.connection.execute(
            "UPDATE units SET arrays_sha256 = ? WHERE name = 'g0-c0000'",
            (disk.sha256_of(path),),
        )
        with pytest.raises(FaultError, match="is not an array file"):
            store.arrays("g0-c0000")
    assert not (tmp_path / "exploded").exists()


# --------------------------------------------------------------------------- crashes and full disks


class Crash(BaseException):
    """Acts as the end of the process: nothing in the code may catch it and continue."""


def crash_at(patch, limit, error=Crash):
    """Raise at the `limit`-th step that makes something durable, counted from 0."""
    calls = iter(range(limit))

    def wrap(function):
        def step(*args, **kwargs):
            if next(calls, None) is None:
                raise error
            return function(*args, **kwargs)

        return step

    for holder, name in ((os, "replace"), (disk, "sync"), (disk, "sha256_of"),
                         (ledgers, "_records"), (stores.np, "savez")):  # fmt: skip
        patch.setattr(holder, name, wrap(getattr(holder, name)))


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(("error", "arrives", "stride"), [(Crash, Crash, 1), (FULL, FaultError, 3)])
def test_a_fault_at_any_step_of_a_commit_leaves_the_unit_pending(
    store, monkeypatch, error, arrives, stride
):
    commit(store, "g0-c0000", seed=1)
    root, limit, crashed = store.path, 0, True
    while crashed:
        with monkeypatch.context() as patch:
            crash_at(patch, limit, error)
            try:
                commit(store, "g0-c0001", seed=limit)
                crashed = False
            except arrives as raised:
                assert arrives is Crash or "the disk is full" in str(raised)
        limit += stride
        store.close()
        store = Store.open(root, IDENTITY)
        store.ledger.plan(make_units())
        assert ("g0-c0001" in store.ledger.pending()) == crashed
        assert store.arrays("g0-c0000")["episode/return_sum"][0, 0] == pytest.approx(
            make_arrays(1)["episode/return_sum"][0, 0]
        )
    last = limit - stride
    np.testing.assert_array_equal(
        store.arrays("g0-c0001")["episode/return_sum"], make_arrays(last)["episode/return_sum"]
    )
    assert store.state("g0-c0001", {"w": np.zeros(3, np.float32)})["w"][0] == last
    # What the crashes left was replaced.
    strays = [p.name for p in [*root.glob("arrays/*"), *root.glob("checkpoints/*")]]
    assert sorted(strays) == ["g0-c0000", "g0-c0000.npz", "g0-c0001", "g0-c0001.npz"]
    assert last > 10
    store.close()


def test_a_crash_at_any_step_of_the_creation_can_be_repeated(tmp_path, monkeypatch):
    root, limit, crashed = tmp_path / "out", 0, True
    while crashed:
        with monkeypatch.context() as patch:
            crash_at(patch, limit)
            try:
                Store.open(root, IDENTITY, "x").close()
                crashed = False
            except Crash:
                pass
        limit += 1
    assert limit > 4
    with Store.open(root, IDENTITY) as store:
        assert store.ledger.identity == IDENTITY
    assert not (root / "ledger.sqlite.new").exists()


def test_a_full_disk_in_the_ledger_is_a_plain_sentence_and_loses_nothing(store):
    commit(store, "g0-c0000")
    pages = store.ledger.connection.execute("PRAGMA page_count").fetchone()[0]
    store.ledger.connection.execute(f"PRAGMA max_page_count = {pages}")
    wide = {"x": "y" * 100_000}
    with pytest.raises(FaultError, match=r"Cannot write the ledger .*database or disk is full"):
        store.commit("g0-c0001", make_arrays(), None, make_outcomes("g0-c0001"), wide)
    assert store.ledger.pending() == ["g0-c0001", "g0-c0002"]
    store.ledger.connection.execute("PRAGMA max_page_count = 1000000")
    store.commit("g0-c0001", make_arrays(), None, make_outcomes("g0-c0001"), wide)
    assert store.ledger.pending() == ["g0-c0002"]


def test_no_permission_and_no_locks_are_plain_sentences(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(stores.Path, "mkdir", refuse)
        with pytest.raises(FaultError, match="permission is denied"):
            Store.open(tmp_path / "out", IDENTITY)

    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(stores.fcntl, "flock", unsupported)
    with pytest.raises(FaultError, match="No locks available"):
        Store.open(tmp_path / "out", IDENTITY)


WORKER = """
import sys
import numpy as np
from purejaxpg.sweep.ledger import Outcome, Run
from purejaxpg.sweep.store import Store
units = {f"u{i:03d}": [Run(f"r{i}-{s}", {}, s, {}) for s in range(2)] for i in range(60)}
with Store.open(sys.argv[1], {"a": 1}) as store:
    store.ledger.plan(units)
    print("ready", flush=True)
    for name in store.ledger.pending():
        index = int(name[1:])
        outcomes = [Outcome(run.run_id, "done", index, index) for run in units[name]]
        store.commit(name, {"x": np.full((2, 20_000), index)}, None, outcomes, {})
"""


def test_a_sweep_killed_again_and_again_ends_complete(tmp_path):
    root = tmp_path / "out"
    generator = random.Random(0)
    finished, kills = False, 0
    while not finished:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        # Later kills come later, so that this ends however slow the disk is.
        time.sleep(generator.uniform(0.0, 0.05) * (kills + 1))
        process.send_signal(signal.SIGKILL)
        finished = process.wait() == 0
        process.stdout.close()
        kills += not finished
        with Store.read(root) as reader:
            done = [unit for unit in reader.ledger.units() if unit["done"]]
            for unit in done:
                assert (reader.arrays(unit["name"])["x"] == int(unit["name"][1:])).all()
    assert kills >= 1
    with Store.open(root, {"a": 1}) as store:
        assert store.ledger.finished
        assert [run["score"] for run in store.ledger.runs()] == [
            i for i in range(60) for _ in range(2)
        ]


def test_errors_of_sqlite_become_faults(store):
    store.ledger.connection.execute("DROP TABLE legs")
    with pytest.raises(FaultError, match="no such table"):
        store.ledger.runs()
    assert isinstance(sqlite3.OperationalError(), sqlite3.Error)
