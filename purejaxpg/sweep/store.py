"""The result directory of a sweep: one SQLite ledger, one array file and one checkpoint per unit.

A unit is what is computed and committed together (a chunk of runs). The ledger is the only truth: a
unit's files are written and synced first, under names the ledger does not know yet, and one
transaction then records their hashes and the outcomes. Whatever interrupts this leaves the unit
either committed or pending, never in between.

A run is committed in one leg or in several: a search stops some runs early and trains others on, so
a unit holds one leg of each of its runs, and the rounds of a search are planned one after another.

Layout::

    DIR/ledger.sqlite           what is planned, what is committed, every file's SHA-256
    DIR/arrays/<unit>.npz       metrics and evaluations, one row per run
    DIR/checkpoints/<unit>/     the whole training state of the unit, until no run ends there
    DIR/progress/<unit>.*/      the same of units that are being computed
    DIR/records/<unit>.json     what the ledger says of a committed unit, in case the ledger is lost
    DIR/identity.json           what it says of the sweep
    DIR/spec.toml               the text of the spec, for the reader
    DIR/lock                    held by the process that runs the sweep
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote

import numpy as np

from purejaxpg import FaultError, InputError, checkpoint

LEDGER = "ledger.sqlite"
_NEW_LEDGER = "ledger.sqlite.new"
_FORMAT = 2
_BUSY_SECONDS = 30.0
_UNIT_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_REPAIR = "`purejaxpg fsck DIR --repair` rebuilds it from the records of its units"
_MEMBER = "metric."  # np.savez has parameters of its own, which a bare metric name could hit

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE notes (number INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE units (
    name TEXT PRIMARY KEY, round INTEGER NOT NULL, position INTEGER NOT NULL,
    size INTEGER NOT NULL, done INTEGER NOT NULL,
    arrays_sha256 TEXT, checkpoint_sha256 TEXT, facts TEXT, record_sha256 TEXT);
CREATE TABLE legs (
    unit TEXT NOT NULL, row INTEGER NOT NULL, run_id TEXT NOT NULL, round INTEGER NOT NULL,
    config TEXT NOT NULL, seed INTEGER NOT NULL, swept TEXT NOT NULL, stage TEXT NOT NULL,
    start INTEGER NOT NULL, stop INTEGER NOT NULL, total INTEGER NOT NULL, parent TEXT,
    status TEXT NOT NULL, score REAL, greedy_score REAL, diverged_at INTEGER,
    PRIMARY KEY (unit, row), UNIQUE (run_id, round));
"""


@dataclass(frozen=True)
class Run:
    """One planned training run, or one leg of it.

    Attributes:
        run_id: unique within the sweep, and within a round.
        config: every field of the run's configuration, as JSON-able values.
        seed: the seed that alone decides the run's key.
        swept: the swept fields only (not the seed); what tells configurations apart.
        stage: ``"tune"``, or ``"confirm"`` for runs on fresh seeds.
        start: updates before this leg.
        stop: updates after it.
        total: updates of the whole run.
        parent: the run whose state of the round before this leg starts from; None: it starts anew.
    """

    run_id: str
    config: dict[str, Any]
    seed: int
    swept: dict[str, Any]
    stage: str = "tune"
    start: int = 0
    stop: int = 0
    total: int = 0
    parent: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How one run ended.

    Attributes:
        run_id: the run.
        status: ``"done"`` or ``"diverged"``.
        score: mean return of the stochastic evaluation after the last update.
        greedy_score: the same with greedy actions.
        diverged_at: the first update with a non-finite value, counted from 1; None if there was
            none.
    """

    run_id: str
    status: str
    score: float
    greedy_score: float
    diverged_at: int | None = None


class Store:
    """One result directory. Make one with ``Store.open`` (to run) or ``Store.read`` (to report)."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int | None) -> None:
        """Wrap an open ledger; use ``Store.open`` or ``Store.read`` instead."""
        self.path = path
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        identity: dict[str, Any],
        spec_text: str = "",
        create: bool = True,
    ) -> "Store":
        """Open the result directory of a sweep for running it, making it where there is none.

        Args:
            path: the result directory.
            identity: what makes this sweep this sweep, as JSON-able values: the canonical spec, the
                hash of the agent's source, and so on.
            spec_text: copied to ``spec.toml`` in a new directory.
            create: False refuses to make a new directory.

        Returns:
            The store, holding the directory's lock until it is closed.

        Raises:
            InputError: the directory belongs to a different sweep or is not a result directory; it
                is left as it was.
            FaultError: another process is running the sweep, or the surroundings failed.
        """
        root = Path(os.path.abspath(path))
        wanted = json.loads(_json(identity))
        with checkpoint.faults("open the result directory", root), contextlib.ExitStack() as undo:
            exists = (root / LEDGER).is_file()
            if not exists:
                _refuse_foreign(root, create)
                root.mkdir(parents=True, exist_ok=True)
            lock = _lock(root, create=not exists)
            undo.callback(_unlock, lock)
            if not (root / LEDGER).is_file():
                _create(root, wanted, spec_text)
            _refuse_other_sweep(root, _identity_at_rest(root), wanted)
            if lock is None:
                lock = _lock(root, create=True)
                undo.callback(_unlock, lock)
            store = cls(root, _connect(root), lock)
            undo.pop_all()
        return store._checked()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Store":
        """Open an existing result directory for reading, also while a sweep runs in it.

        Args:
            path: the result directory.

        Returns:
            The store; ``plan``, ``commit`` and ``reset`` refuse to work on it.

        Raises:
            InputError: there is no result directory at this path.
            FaultError: the ledger is damaged or cannot be read.
        """
        root = Path(os.path.abspath(path))
        if not os.path.isfile(root / LEDGER):  # Path.is_file raises for a name too long
            raise InputError(f"{root} is not a result directory: it holds no {LEDGER}.")
        with checkpoint.faults("read the ledger", root / LEDGER):
            return cls(root, _connect_read_only(root), None)._checked()

    def close(self) -> None:
        """Close the ledger and give the lock back; closing twice is harmless."""
        with checkpoint.faults("close the ledger", self.path / LEDGER):
            self._connection.close()
        _unlock(self._lock)
        self._lock = None

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the store."""
        self.close()

    # ----------------------------------------------------------------------------------- planning

    @property
    def identity(self) -> dict[str, Any]:
        """What the sweep was opened with."""
        return json.loads(self._query("SELECT value FROM meta WHERE key = 'identity'")[0]["value"])

    def plan(
        self,
        units: Mapping[str, Sequence[Run]],
        round_index: int = 0,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Make the ledger's plan of a round equal to this one; planning it twice changes nothing.

        Pending units that the new plan lacks are forgotten (a smaller chunk size renames them);
        committed ones must be in it with the same runs. Other rounds are left alone.

        Args:
            units: the runs of each unit in row order, by unit name, in the order of execution.
            round_index: the round that they make up, from 0.
            sizes: rows of each unit with its padding; by default the number of its runs.

        Raises:
            InputError: a name is not usable, a run occurs twice, or committed results would be
                lost.
            FaultError: the ledger cannot be written.
        """
        _check_plan(units)
        rows = {
            name: [_leg_row(name, round_index, index, run) for index, run in enumerate(runs)]
            for name, runs in units.items()
        }
        with self._transaction() as connection:
            known = self._query("SELECT name, done FROM units WHERE round = ?", (round_index,))
            done = {row["name"] for row in known if row["done"]}
            for name in done:
                self._refuse_lost(name, rows.get(name))
            pending = [(row["name"],) for row in known if not row["done"]]
            connection.executemany("DELETE FROM legs WHERE unit = ?", pending)
            connection.executemany("DELETE FROM units WHERE name = ?", pending)
            connection.executemany(
                "INSERT INTO units (name, round, position, size, done) VALUES (?, ?, ?, ?, 0) "
                "ON CONFLICT (name) DO UPDATE SET position = excluded.position",
                [
                    (name, round_index, position, (sizes or {}).get(name, len(legs)))
                    for position, (name, legs) in enumerate(rows.items())
                ],
            )
            columns = ", ".join(_PLANNED)
            connection.executemany(
                f"INSERT INTO legs ({columns}, status) "
                f"VALUES ({', '.join('?' * len(_PLANNED))}, 'pending')",
                [leg for name, legs in rows.items() if name not in done for leg in legs],
            )
            _seal(connection)

    def pending(self, round_index: int | None = None) -> list[str]:
        """Return the names of the units that are not committed, in planned order."""
        rows = self._query("SELECT name, round FROM units WHERE done = 0 ORDER BY round, position")
        return [row["name"] for row in rows if round_index in (None, row["round"])]

    @property
    def finished(self) -> bool:
        """Whether something is planned and all that is planned is committed."""
        row = self._query("SELECT COUNT(*) AS n, COALESCE(SUM(done), 0) AS done FROM units")[0]
        return row["n"] > 0 and row["n"] == row["done"]

    def note(self, text: str) -> None:
        """Record what a reader of the results has to know; the same note is recorded once."""
        with self._transaction() as connection:
            if text not in self.notes():
                connection.execute("INSERT INTO notes (text) VALUES (?)", (text,))

    def notes(self) -> list[str]:
        """Return the recorded notes, oldest first."""
        return [row["text"] for row in self._query("SELECT text FROM notes ORDER BY number")]

    # --------------------------------------------------------------------------------- committing

    def commit(
        self,
        unit: str,
        arrays: dict[str, np.ndarray],
        state: Any,
        outcomes: Sequence[Outcome],
        facts: dict[str, Any],
        save: Callable[[Path, Any], str] = checkpoint.save,
    ) -> None:
        """Record a finished unit: arrays, then checkpoint, then one transaction that makes it true.

        Args:
            unit: a pending unit.
            arrays: numeric arrays ``[rows, ...]`` by name, one row per run of the unit, padding
                removed.
            state: the unit's final training state, a pytree of arrays; None keeps no checkpoint.
            outcomes: one per run of the unit, in row order.
            facts: JSON-able measurements of the unit: ``steps_per_update``, ``wall_s``, devices,
                versions, ...
            save: writes a state into a directory and returns the hash of its manifest.

        Raises:
            InputError: the unit is not pending, or rows, arrays and outcomes do not match.
            FaultError: something could not be written; the unit is still pending.
        """
        self._refuse_read_only()
        self._check_commit(unit, arrays, outcomes)
        facts_text = _json(facts)
        arrays_sha256 = self._write_arrays(unit, arrays)
        checkpoint_sha256 = None
        if state is not None:
            checkpoint_sha256 = save(self._checkpoint_path(unit), state)
        results = [(*_result(o), unit, row) for row, o in enumerate(outcomes)]
        hashes = {"arrays_sha256": arrays_sha256, "checkpoint_sha256": checkpoint_sha256}
        self._record(
            {**dict(self._unit_row(unit)), "done": 1, **hashes, "facts": facts_text},
            [
                {**leg, **dict(zip(_RESULT, _result(o), strict=True))}
                for leg, o in zip(self._legs_of(unit), outcomes, strict=True)
            ],
        )
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE legs SET status = ?, score = ?, greedy_score = ?, diverged_at = ? "
                "WHERE unit = ? AND row = ?",
                results,
            )
            connection.execute(
                "UPDATE units SET done = 1, arrays_sha256 = ?, checkpoint_sha256 = ?, facts = ? "
                "WHERE name = ?",
                (arrays_sha256, checkpoint_sha256, facts_text, unit),
            )
            _seal(connection, unit)

    def write_record(self, unit: str) -> None:
        """Write the record of a committed unit again.

        Args:
            unit: a committed unit.

        Raises:
            FaultError: it cannot be written.
        """
        self._record(dict(self._committed(unit)), self._legs_of(unit))

    def write_texts(self) -> None:
        """Write ``identity.json`` and ``spec.toml`` again out of the ledger."""
        found = self._query("SELECT value FROM meta WHERE key = 'spec'")
        _write_about(self.path, self.identity, found[0]["value"])

    def superseded(self, round_index: int) -> list[str]:
        """Return the units of a round whose states nothing needs any more.

        Args:
            round_index: of a round.

        Returns:
            Names of committed units of which there is a state, or something of one, although all
            their runs went on to the next round and nothing of that is pending.
        """
        if self.pending(round_index + 1):
            return []
        rows = self._query(
            "SELECT name, checkpoint_sha256 FROM units WHERE round = ? AND done = 1 "
            "AND name NOT IN (SELECT unit FROM legs WHERE round = ? AND run_id NOT IN "
            "(SELECT run_id FROM legs WHERE round = ?)) ORDER BY position",
            (round_index, round_index, round_index + 1),
        )
        return [
            row["name"]
            for row in rows
            if row["checkpoint_sha256"] or self._checkpoint_path(row["name"]).exists()
        ]

    def release(self, units: Iterable[str]) -> None:
        """Delete the states of committed units; their arrays and outcomes stay.

        Args:
            units: names of committed units.

        Raises:
            InputError: a unit is not committed.
            FaultError: the ledger cannot be written.
        """
        for unit in units:
            # Nothing may ever say that there is a state where there is none.
            row = {**dict(self._committed(unit)), "checkpoint_sha256": None}
            self._record(row, self._legs_of(unit))
            with self._transaction() as connection:
                connection.execute(
                    "UPDATE units SET checkpoint_sha256 = NULL WHERE name = ?", (unit,)
                )
                _seal(connection, unit)
            # What cannot be removed now, the next run tries again to.
            checkpoint.remove(self._checkpoint_path(unit))

    def released_parents(self, units: Iterable[str]) -> list[str]:
        """Return the committed units without a state that `units` would need one of.

        Args:
            units: names of units that are to be computed.

        Returns:
            Names in planned order: of units from whose states those start, of units from whose
            states these start, and so on.
        """
        kept = {unit["name"]: unit["has_state"] or not unit["done"] for unit in self.units()}
        legs = [] if all(kept.values()) else self.legs()
        unit_of = {(leg["run_id"], leg["round"]): leg["unit"] for leg in legs}
        parents: dict[str, set[str]] = {}
        for leg in legs:
            parent = unit_of.get((leg["parent"], leg["round"] - 1))
            if parent is not None:  # else it starts anew, or its parents are planned once more
                parents.setdefault(leg["unit"], set()).add(parent)
        found, waiting = set[str](), list(units)
        while waiting:
            new = {p for p in parents.get(waiting.pop(), ()) if not kept[p]} - found
            found |= new
            waiting += new
        return [name for name in kept if name in found]

    def reset(self, units: Iterable[str]) -> None:
        """Make committed units pending again.

        For units whose files are damaged, or whose group starts anew. The files stay until the next
        commit replaces them.

        Args:
            units: names of planned units.

        Raises:
            InputError: a unit is not planned.
            FaultError: the ledger cannot be written.
        """
        with self._transaction() as connection:
            for unit in units:
                self._unit_row(unit)
                connection.execute(
                    "UPDATE units SET done = 0, arrays_sha256 = NULL, checkpoint_sha256 = NULL, "
                    "facts = NULL, record_sha256 = NULL WHERE name = ?",
                    (unit,),
                )
                connection.execute(
                    "UPDATE legs SET status = 'pending', score = NULL, greedy_score = NULL, "
                    "diverged_at = NULL WHERE unit = ?",
                    (unit,),
                )

    def _restore(self, record: Path) -> bool:
        """Enter a record into an empty ledger; False where it is damaged."""
        try:
            content = read_hashed(record)
        except FaultError:
            return False
        with self._transaction() as connection:
            for table, rows in (("units", [content["unit"]]), ("legs", content["legs"])):
                for row in rows:
                    names = ", ".join(row)
                    marks = ", ".join("?" * len(row))
                    values = list(row.values())
                    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", values)
            _seal(connection, content["unit"]["name"])
        return True

    # ------------------------------------------------------------------------------------ reading

    def damaged(self) -> dict[str, str]:
        """Check every file of every committed unit against its hash.

        Returns:
            What is wrong, by unit; nothing where all is intact.
        """
        rows = self._query("SELECT * FROM units WHERE done = 1 ORDER BY round, position")
        found = {}
        for row in rows:
            try:
                self._check_arrays(row["name"], row["arrays_sha256"])
                if row["checkpoint_sha256"] is not None:
                    checkpoint.verify(self._checkpoint_path(row["name"]), row["checkpoint_sha256"])
            except FaultError as error:
                found[row["name"]] = str(error)
        return found

    def arrays(self, unit: str, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Verify and read the arrays of a committed unit.

        Args:
            unit: a committed unit.
            names: read only these, where present; None reads all.

        Returns:
            Arrays ``[rows, ...]`` by name, sorted by name.

        Raises:
            InputError: the unit is not committed.
            FaultError: the file is missing or damaged.
        """
        path = self._check_arrays(unit, self._committed(unit)["arrays_sha256"])
        with checkpoint.faults("read", path):
            return _read_npz(path, names)

    def state(self, unit: str, template: Any, load: Callable[..., Any] = checkpoint.load) -> Any:
        """Verify and read the final training state of a committed unit.

        Args:
            unit: a committed unit.
            template: pytree of the state's structure, shapes and dtypes.
            load: reads what the ``save`` of ``commit`` wrote.

        Returns:
            The state, as ``checkpoint.load`` gives it.

        Raises:
            InputError: the unit is not committed, or was committed without a state.
            FaultError: the checkpoint is missing or damaged, or does not fit the template.
        """
        digest = self._committed(unit)["checkpoint_sha256"]
        if digest is None:
            raise InputError(
                f"The unit {unit} has no checkpoint: it was committed without one, or all its "
                "runs went on to a later round."
            )
        return load(self._checkpoint_path(unit), template, sha256=digest)

    def runs(self) -> list[dict[str, Any]]:
        """Return every run in planned order, as its latest leg stands.

        Returns:
            Dicts as in ``legs``; the status of a run that a search did not train to its end is
            ``"stopped"`` instead of ``"done"``.
        """
        latest: dict[str, dict[str, Any]] = {}
        for leg in self.legs():
            before = latest.get(leg["run_id"])
            # A leg that is planned but not committed does not hide the score of the one before.
            if before is not None and leg["status"] == "pending":
                leg = {**before, "status": "pending"}
            latest[leg["run_id"]] = leg
        for leg in latest.values():
            if leg["status"] == "done" and leg["stop"] < leg["total"]:
                leg["status"] = "stopped"
        return list(latest.values())

    def legs(self) -> list[dict[str, Any]]:
        """Return every leg of every run in planned order.

        Returns:
            Dicts with ``run_id, unit, row, round, stage, start, stop, total, parent, config, seed,
            swept, status, score, greedy_score, diverged_at``; status is ``"pending"``, ``"done"``
            or ``"diverged"``, and the scores of pending legs are None.
        """
        rows = self._query(
            "SELECT l.* FROM legs l JOIN units u ON l.unit = u.name "
            "ORDER BY u.round, u.position, l.row"
        )
        return [_leg_dict(row) for row in rows]

    def units(self) -> list[dict[str, Any]]:
        """Return every planned unit in planned order.

        Returns:
            Dicts with ``name, round, done, rows, size, facts, has_state``: rows without and size
            with padding; the facts of a pending unit are None.
        """
        rows = self._query(
            "SELECT u.name, u.round, u.size, u.done, u.facts, u.checkpoint_sha256, "
            "COUNT(l.run_id) AS n FROM units u "
            "LEFT JOIN legs l ON l.unit = u.name GROUP BY u.name ORDER BY u.round, u.position"
        )
        return [
            {
                "name": row["name"],
                "round": row["round"],
                "done": bool(row["done"]),
                "rows": row["n"],
                "size": row["size"],
                "facts": json.loads(row["facts"]) if row["facts"] else None,
                "has_state": row["checkpoint_sha256"] is not None,
            }
            for row in rows
        ]

    # ---------------------------------------------------------------------------------- internals

    def _legs_of(self, unit: str) -> list[dict[str, Any]]:
        """Return a unit's rows of the ledger as they stand there."""
        rows = self._query("SELECT * FROM legs WHERE unit = ? ORDER BY row", (unit,))
        return [dict(row) for row in rows]

    def _record(self, unit: dict[str, Any], legs: list[dict[str, Any]]) -> None:
        """Write beside a unit what the ledger says of it, so that a lost ledger can be rebuilt."""
        content = {"unit": {**unit, "record_sha256": None}, "legs": legs}
        _write_text(self.path / "records" / f"{unit['name']}.json", _hashed(content))

    def _arrays_path(self, unit: str) -> Path:
        return self.path / "arrays" / f"{unit}.npz"

    def _check_arrays(self, unit: str, digest: str) -> Path:
        """Return the path of a unit's array file once its hash is found right."""
        path = self._arrays_path(unit)
        if not path.is_file():
            raise FaultError(f"{path} is missing, and the ledger says that it was written.")
        with checkpoint.faults("read", path):
            if checkpoint.sha256_of(path) != digest:
                raise FaultError(f"{path} is damaged: its SHA-256 is not the one in the ledger.")
        return path

    def _checkpoint_path(self, unit: str) -> Path:
        return self.path / "checkpoints" / unit

    def _query(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with checkpoint.faults("read the ledger", self.path / LEDGER):
            return self._connection.execute(sql, parameters).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction: at its end all of it is durable, or none of it."""
        self._refuse_read_only()
        with checkpoint.faults("write the ledger", self.path / LEDGER):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself after some faults, such as a full disk.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _refuse_read_only(self) -> None:
        if self._lock is None:
            raise InputError(f"The result directory {self.path} was opened for reading only.")

    def _unit_row(self, unit: str) -> sqlite3.Row:
        rows = self._query("SELECT * FROM units WHERE name = ?", (unit,))
        if not rows:
            raise InputError(f"The unit {unit!r} is not planned in {self.path}.")
        return rows[0]

    def _committed(self, unit: str) -> sqlite3.Row:
        row = self._unit_row(unit)
        if not row["done"]:
            raise InputError(f"The unit {unit} is still pending in {self.path}.")
        return row

    def _refuse_lost(self, unit: str, planned: list[tuple[Any, ...]] | None) -> None:
        """Refuse a plan in which a committed unit is absent or has other runs."""
        stored = self._query("SELECT * FROM legs WHERE unit = ? ORDER BY row", (unit,))
        columns = _PLANNED[:-1]  # not what is swept: the config includes it
        found = [tuple(row[column] for column in columns) for row in stored]
        if planned is None or [row[: len(columns)] for row in planned] != found:
            raise InputError(
                f"The new plan would lose the committed unit {unit} of {self.path}; "
                "keep the plan as it was, or reset the unit first."
            )

    def _check_commit(
        self, unit: str, arrays: dict[str, np.ndarray], outcomes: Sequence[Outcome]
    ) -> None:
        """Refuse a commit whose rows could be attributed to the wrong run."""
        if self._unit_row(unit)["done"]:
            raise InputError(f"The unit {unit} of {self.path} is already committed.")
        stored = self._query("SELECT run_id FROM legs WHERE unit = ? ORDER BY row", (unit,))
        planned = [row["run_id"] for row in stored]
        if [outcome.run_id for outcome in outcomes] != planned:
            raise InputError(
                f"The outcomes of the unit {unit} must be those of its {len(planned)} runs, "
                "in planned order."
            )
        for outcome in outcomes:
            if outcome.status not in ("done", "diverged"):
                raise InputError(
                    f"The status of the run {outcome.run_id} is {outcome.status!r}; it must be "
                    "'done' or 'diverged'."
                )
        for name, array in arrays.items():
            _check_array(unit, name, array, len(planned))

    def _write_arrays(self, unit: str, arrays: dict[str, np.ndarray]) -> str:
        """Write the unit's array file durably and return its hash."""
        path = self._arrays_path(unit)
        temporary = path.with_name(f".{path.name}.tmp")
        with checkpoint.faults("write", path):
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                # Sorted, and free of time stamps, so that equal results are equal files.
                members = {_MEMBER + quote(name, safe=""): arrays[name] for name in sorted(arrays)}
                np.savez(file, **members)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            digest = checkpoint.sha256_of(temporary)
            os.replace(temporary, path)
            checkpoint.sync(path.parent)
        return digest

    def _checked(self) -> Self:
        """Return the store after the ledger has been found intact, or close it and raise."""
        try:
            self._check_ledger()
        except FaultError as error:
            self.close()
            raise FaultError(f"{str(error).rstrip('.')}; {_REPAIR}.") from error
        except BaseException:
            self.close()
            raise
        return self

    def _check_ledger(self) -> None:
        """Compare every committed unit's rows with the hash taken when they were written."""
        path = self.path / LEDGER
        with checkpoint.faults("read the ledger", path):
            if self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                raise FaultError(f"{path} is damaged: SQLite finds its structure broken.")
            if _schema(self._connection) != _expected_schema():
                raise FaultError(f"{path} is damaged: its tables are not those of a ledger.")
            # One transaction: a commit between the two reads would look like an altered record.
            self._connection.execute("BEGIN")
            records = _records(self._connection)
            rows = self._query("SELECT name, done, record_sha256 FROM units")
            self._connection.execute("COMMIT")
            for row in rows:
                expected = records.get(row["name"]) if row["done"] else None
                if row["record_sha256"] != expected or bool(row["done"]) == (expected is None):
                    raise FaultError(
                        f"{path} is damaged: the record of the unit {row['name']} was altered."
                    )


# ---------------------------------------------------------------------------------------- helpers


def _plain(value: Any) -> Any:
    """Return NumPy scalars and arrays as what JSON knows."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON.")


def _json(value: Any, sort: bool = True) -> str:
    """Return the one canonical JSON text of a value, or one that keeps the order of its keys."""
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), default=_plain)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# The columns that a plan decides, in the order of `_leg_row`.
_PLANNED = (
    "unit", "row", "run_id", "round", "config", "seed", "stage", "start", "stop", "total", "parent",
    "swept",
)  # fmt: skip


def _leg_row(unit: str, round_index: int, row: int, run: Run) -> tuple[Any, ...]:
    head = (unit, row, run.run_id, round_index, _json(run.config), int(run.seed), run.stage)
    return (
        *head, int(run.start), int(run.stop), int(run.total), run.parent,
        _json(run.swept, sort=False),
    )  # fmt: skip


_RESULT = ("status", "score", "greedy_score", "diverged_at")  # the columns of `_result`


def _result(outcome: Outcome) -> tuple[str, float, float, int | None]:
    """Return an outcome as plain Python numbers, which is all that SQLite takes."""
    update = None if outcome.diverged_at is None else int(outcome.diverged_at)
    return outcome.status, float(outcome.score), float(outcome.greedy_score), update


def _leg_dict(row: sqlite3.Row) -> dict[str, Any]:
    """Return one leg of the ledger with its JSON columns decoded."""
    run = {key: row[key] for key in row.keys()}  # noqa: SIM118 (a Row iterates over its values)
    run["config"], run["swept"] = json.loads(run["config"]), json.loads(run["swept"])
    for score in ("score", "greedy_score"):
        # SQLite stores NaN as NULL.
        if run["status"] != "pending" and run[score] is None:
            run[score] = math.nan
    return run


def _schema(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Return the definitions of all tables and indexes."""
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name")
    return [tuple(row) for row in rows]


def _expected_schema() -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(_SCHEMA)
        return _schema(connection)


def _records(connection: sqlite3.Connection, unit: str | None = None) -> dict[str, str]:
    """Return a hash over everything the ledger says about each unit, or about one.

    SQLite notices a broken structure, but not a flipped bit inside a number.
    """
    condition, parameters = ("", ()) if unit is None else (" WHERE u.name = ?", (unit,))
    rows = connection.execute(
        "SELECT u.name, u.round, u.position, u.size, u.arrays_sha256, u.checkpoint_sha256, "
        "u.facts, l.* "
        f"FROM units u LEFT JOIN legs l ON l.unit = u.name{condition} ORDER BY u.name, l.row",
        parameters,
    )
    digests: dict[str, Any] = {}
    for row in rows:
        text = json.dumps(list(row), default=repr) + "\n"  # a damaged text may come as bytes
        digests.setdefault(row["name"], hashlib.sha256()).update(text.encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _seal(connection: sqlite3.Connection, unit: str | None = None) -> None:
    """Record the hash of one committed unit, or of all of them."""
    connection.executemany(
        "UPDATE units SET record_sha256 = ? WHERE name = ? AND done = 1",
        [(record, name) for name, record in _records(connection, unit).items()],
    )


def _check_plan(units: Mapping[str, Sequence[Run]]) -> None:
    """Refuse unit names that are no safe file names, empty units, and runs that occur twice."""
    seen: dict[str, str] = {}
    for name, runs in units.items():
        if not _UNIT_NAME.fullmatch(name):
            raise InputError(
                f"The unit name {name!r} is not usable: it must be 1 to 128 letters, digits, "
                "'.', '_' or '-', and not start with '.'."
            )
        if not runs:
            raise InputError(f"The unit {name} has no runs; a unit needs at least 1.")
        for run in runs:
            if run.run_id in seen:
                raise InputError(
                    f"The run {run.run_id} is planned twice, in {seen[run.run_id]} and in {name}."
                )
            seen[run.run_id] = name


def _check_array(unit: str, name: str, array: np.ndarray, rows: int) -> None:
    """Refuse an array that has not one row per run, or that NumPy would have to pickle."""
    if array.dtype.kind not in "biufc":
        raise InputError(
            f"The array {name} of the unit {unit} has type {array.dtype}; it must be numeric."
        )
    if array.ndim == 0 or array.shape[0] != rows:
        raise InputError(
            f"The array {name} of the unit {unit} has shape {list(array.shape)}; "
            f"its first axis must be its {rows} runs."
        )


def _read_npz(path: Path, names: Iterable[str] | None) -> dict[str, np.ndarray]:
    """Read an array file without ever unpickling."""
    try:
        with np.load(path, allow_pickle=False) as file:
            present = {unquote(member.removeprefix(_MEMBER)): member for member in file.files}
            wanted = present if names is None else [name for name in names if name in present]
            return {name: file[present[name]] for name in sorted(wanted)}
    except ValueError as error:
        raise FaultError(f"{path} is not an array file: {error}.") from error


def _lock(root: Path, create: bool) -> int | None:
    """Take the directory's lock or raise; None: there is no lock file and none may be made."""
    try:
        descriptor = os.open(root / "lock", os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FaultError(
            f"Another process is running this sweep in {root}; wait for it or stop it."
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _refuse_foreign(root: Path, create: bool) -> None:
    """Refuse a path without a ledger unless a result directory may be made there."""
    if not create:
        raise InputError(f"{root} is not a result directory: it holds no {LEDGER}.")
    if not root.exists():
        return
    if not root.is_dir():
        raise InputError(
            f"{root} is a file; the output directory must be a directory, new or empty."
        )
    names = {entry.name for entry in root.iterdir()}
    # Our own creation, interrupted before the ledger got its name, may start again.
    unfinished = names == {"lock"} or ("lock" in names and _NEW_LEDGER in names)
    if names and not unfinished:
        raise InputError(
            f"{root} is not empty and is not a result directory: it holds no {LEDGER}; "
            "choose another with --out."
        )


def _write_text(path: Path, text: str) -> None:
    """Write a text file durably, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with checkpoint.faults("write", path):
        path.parent.mkdir(exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        checkpoint.sync(temporary)
        os.replace(temporary, path)
        checkpoint.sync(path.parent)


def _write_about(root: Path, identity: dict[str, Any], spec_text: str) -> None:
    """Write the files that say what the sweep is."""
    _write_text(root / "spec.toml", spec_text)
    _write_text(root / "identity.json", _hashed({"identity": identity, "spec": spec_text}))


def _hashed(content: dict[str, Any]) -> str:
    """Return a JSON text that carries its own hash."""
    return json.dumps({"sha256": _sha256(_json(content)), "content": content}, indent=1)


def read_hashed(path: Path) -> dict[str, Any]:
    """Read what ``_hashed`` wrote.

    Raises:
        FaultError: it is missing or damaged.
    """
    with checkpoint.faults("read", path):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            content = found["content"]
            if found["sha256"] == _sha256(_json(content)):
                return content
        except (ValueError, KeyError, TypeError) as error:
            raise FaultError(f"{path} is damaged: it is not what was written.") from error
    raise FaultError(f"{path} is damaged: its SHA-256 is not the one it carries.")


def rebuild(root: Path) -> list[str]:
    """Make a new ledger out of ``identity.json`` and the records; the old one is moved aside.

    Args:
        root: a result directory whose ledger cannot be used.

    Returns:
        The units that are committed in the new ledger. All else is planned anew by the next run.

    Raises:
        FaultError: the identity is damaged too, another process holds the directory, or the new
            ledger cannot be written.
    """
    about = read_hashed(root / "identity.json")
    lock = _lock(root, create=True)
    try:
        with checkpoint.faults("rebuild the ledger of", root):
            aside = root / "ledger.damaged"
            aside.mkdir(exist_ok=True)
            for suffix in ("", "-wal", "-shm"):
                if (root / f"{LEDGER}{suffix}").exists():
                    os.replace(root / f"{LEDGER}{suffix}", aside / f"{LEDGER}{suffix}")
            _create(root, about["identity"], about["spec"])
            store = Store(root, _connect(root), lock)
            try:
                return [path.stem for path in _records_of(root) if store._restore(path)]
            finally:
                store._connection.close()
    finally:
        _unlock(lock)


def _records_of(root: Path) -> list[Path]:
    return sorted((root / "records").glob("*.json")) if (root / "records").is_dir() else []


def _create(root: Path, identity: dict[str, Any], spec_text: str) -> None:
    """Fill a new directory; the rename of the ledger comes last and makes it a result directory."""
    new = root / _NEW_LEDGER
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{new}{suffix}").unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
        text = _json(identity)
        meta = {"format": str(_FORMAT), "identity": text, "identity_sha256": _sha256(text)}
        meta["spec"] = spec_text
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    (root / "arrays").mkdir(exist_ok=True)
    (root / "checkpoints").mkdir(exist_ok=True)
    _write_about(root, identity, spec_text)
    checkpoint.sync(new)
    os.replace(new, root / LEDGER)
    checkpoint.sync(root)
    checkpoint.sync(root.parent)


def _connect(root: Path) -> sqlite3.Connection:
    """Open the ledger for writing, durable at every commit."""
    connection = sqlite3.connect(root / LEDGER, timeout=_BUSY_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _connect_read_only(root: Path) -> sqlite3.Connection:
    """Open the ledger for reading, also on a file system that cannot be written."""
    uri = (root / LEDGER).as_uri() + "?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("SELECT * FROM meta")
    except sqlite3.OperationalError:
        # A reader of a WAL ledger needs an index file beside it. Where none can be made, nobody
        # writes either, and the ledger alone is complete unless a crash left a log behind.
        connection.close()
        log = Path(f"{root / LEDGER}-wal")
        if log.exists() and log.stat().st_size:
            raise
        connection = sqlite3.connect(f"{uri}&immutable=1", uri=True, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


def _identity_at_rest(root: Path) -> dict[str, Any]:
    """Return the ledger's identity, from a copy: a refused directory stays as it was."""
    faults = checkpoint.faults("read the ledger", root / LEDGER)
    with faults, tempfile.TemporaryDirectory() as scratch:
        for name in (LEDGER, f"{LEDGER}-wal"):
            if (root / name).exists():
                shutil.copyfile(root / name, Path(scratch, name))
        with contextlib.closing(sqlite3.connect(Path(scratch, LEDGER))) as connection:
            meta = dict(connection.execute("SELECT key, value FROM meta"))
    if meta.get("format") != str(_FORMAT):
        raise InputError(
            f"{root} was written in the format {meta.get('format')}; this version of purejaxpg "
            f"reads the format {_FORMAT}."
        )
    text = str(meta.get("identity"))
    if _sha256(text) != meta.get("identity_sha256"):
        raise FaultError(f"{root / LEDGER} is damaged: the identity of the sweep was altered.")
    return json.loads(text)


def _refuse_other_sweep(root: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a directory whose identity differs, naming the first field that does."""
    theirs, ours = dict(_dotted(stored)), dict(_dotted(wanted))
    for key in sorted(theirs.keys() | ours.keys()):
        old, new = theirs.get(key, "absent"), ours.get(key, "absent")
        if old != new and _unequal(old, new):
            raise InputError(
                f"The output directory {root} belongs to a different sweep: its {key} is "
                f"{_short(old)} and this one's is {_short(new)}; choose another with --out."
            )


def _unequal(old: str, new: str) -> bool:
    """Tell whether two JSON texts hold different values; 1 and 1.0 are one."""
    return "absent" in (old, new) or json.loads(old) != json.loads(new)


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield ``(dotted.key, JSON text)`` for every leaf of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _json(value)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
