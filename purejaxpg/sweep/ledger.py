"""The ledger of a sweep: a SQLite file that records which units are planned and committed.

The ledger is the only authority on a result directory. A unit, a batch of runs that is computed and
committed together, is either pending or committed: one transaction records the hashes of its files
and the outcomes of its runs.

A run is committed in one leg or in several, because a search stops some runs early and trains
others further. A unit holds one leg of each of its runs, and the rounds of a search are planned one
after another.
"""

import contextlib
import hashlib
import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purejaxpg import FaultError, InputError, disk

LEDGER = "ledger.sqlite"
NEW_LEDGER = "ledger.sqlite.new"
FORMAT = 2
BUSY_SECONDS = 30.0

SCHEMA = """
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
# The columns of a leg that a plan decides, without the swept fields, which are part of the config.
PLANNED = (
    "unit", "row", "run_id", "round", "config", "seed", "stage", "start", "stop", "total", "parent",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One planned training run, or one leg of it."""

    run_id: str  # unique within the sweep, and within a round
    config: dict[str, Any]  # every field of the run's configuration, as JSON-able values
    seed: int  # alone decides the run's key
    swept: dict[str, Any]  # the swept fields only; they distinguish configurations
    stage: str = "tune"  # or "confirm", for runs on fresh seeds
    start: int = 0  # updates before this leg
    stop: int = 0  # updates after it
    total: int = 0  # updates of the whole run
    parent: str | None = None  # run whose state of the previous round it starts from; None: `init`


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    run_id: str
    status: str  # "done" or "diverged"
    score: float  # mean return of the evaluation after the last update
    greedy_score: float  # the same with greedy actions; NaN if there is none
    diverged_at: int | None = None  # the first update with a non-finite value, counted from 1


class Ledger:
    """The open ledger of one result directory."""

    def __init__(self, root: Path, writable: bool) -> None:
        """Open the ledger in `root`."""
        self.path = root / LEDGER
        self.root = root
        self.writable = writable
        self.connection = connect(root) if writable else connect_read_only(root)

    def close(self) -> None:
        """Close it; closing twice is harmless."""
        with disk.faults("close the ledger", self.path):
            self.connection.close()

    # ----------------------------------------------------------------------------------- planning

    @property
    def identity(self) -> dict[str, Any]:
        """The values that distinguish this sweep from others."""
        return json.loads(self.query("SELECT value FROM meta WHERE key = 'identity'")[0]["value"])

    @property
    def spec_text(self) -> str:
        """The text of the sweep file."""
        return str(self.query("SELECT value FROM meta WHERE key = 'spec'")[0]["value"])

    def plan(
        self,
        units: Mapping[str, Sequence[Run]],
        round_index: int = 0,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Replace the ledger's plan of a round; planning the same round twice changes nothing.

        Pending units that are not in the new plan are removed (a smaller unit size renames them);
        committed ones must be in it with the same runs. Other rounds do not change.

        Args:
            units: the runs of each unit in row order, by unit name, in the order of execution.
            round_index: the round of these units, from 0.
            sizes: rows of each unit with its padding; by default the number of its runs.

        Raises:
            InputError: committed results would be lost.
            FaultError: a run occurs twice, or the ledger cannot be written.
        """
        rows = {
            name: [_leg_row(name, round_index, index, run) for index, run in enumerate(runs)]
            for name, runs in units.items()
        }
        with self.transaction() as connection:
            known = self.query("SELECT name, done FROM units WHERE round = ?", (round_index,))
            done = {row["name"] for row in known if row["done"]}
            for name in done:
                self._refuse_lost(name, rows.get(name, []))
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
            for leg in (leg for name, legs in rows.items() if name not in done for leg in legs):
                _insert(connection, "legs", leg)
            _seal(connection)

    def pending(self, round_index: int | None = None) -> list[str]:
        """Return the names of the units that are not committed, in planned order."""
        rows = self.query("SELECT name, round FROM units WHERE done = 0 ORDER BY round, position")
        return [row["name"] for row in rows if round_index in (None, row["round"])]

    @property
    def finished(self) -> bool:
        """Whether at least one unit is planned and all of them are committed."""
        row = self.query("SELECT COUNT(*) AS n, COALESCE(SUM(done), 0) AS done FROM units")[0]
        return row["n"] > 0 and row["n"] == row["done"]

    def note(self, text: str) -> None:
        """Record a note for readers of the results; the same note is recorded once."""
        with self.transaction() as connection:
            if text not in self.notes():
                connection.execute("INSERT INTO notes (text) VALUES (?)", (text,))

    def notes(self) -> list[str]:
        """Return the recorded notes, oldest first."""
        return [row["text"] for row in self.query("SELECT text FROM notes ORDER BY number")]

    def grow(self, identity: Mapping[str, Any], spec_text: str, note: str) -> None:
        """Replace the identity of a sweep that grows, and the text of its file; record a note."""
        text = disk.json_text(identity)
        changed = {"identity": text, "identity_sha256": disk.sha256(text), "spec": spec_text}
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE meta SET value = ? WHERE key = ?",
                [(value, key) for key, value in changed.items()],
            )
            connection.execute("INSERT INTO notes (text) VALUES (?)", (note,))

    # --------------------------------------------------------------------------------- committing

    def commit(
        self,
        unit: str,
        arrays_sha256: str,
        checkpoint_sha256: str | None,
        facts_text: str,
        outcomes: Sequence[Outcome],
    ) -> None:
        """Record in one transaction that a unit, checked by `check_commit`, is finished.

        Without a checkpoint, the hash of its manifest is None. The facts are JSON.
        """
        with self.transaction() as connection:
            connection.executemany(
                "UPDATE legs SET status = ?, score = ?, greedy_score = ?, diverged_at = ? "
                "WHERE unit = ? AND row = ?",
                [(*_outcome_columns(o), unit, row) for row, o in enumerate(outcomes)],
            )
            connection.execute(
                "UPDATE units SET done = 1, arrays_sha256 = ?, checkpoint_sha256 = ?, facts = ? "
                "WHERE name = ?",
                (arrays_sha256, checkpoint_sha256, facts_text, unit),
            )
            self.write_record(unit)
            _seal(connection, unit)

    def check_commit(self, unit: str, outcomes: Sequence[Outcome]) -> int:
        """Refuse a commit whose rows could be attributed to the wrong run; return its rows."""
        self.refuse_read_only()
        if self.unit_row(unit)["done"]:
            raise InputError(f"The unit {unit} of {self.root} is already committed.")
        planned = [row["run_id"] for row in self.legs_of(unit)]
        if [outcome.run_id for outcome in outcomes] != planned:
            raise InputError(
                f"The outcomes of the unit {unit} must be those of its {len(planned)} runs, "
                "in planned order."
            )
        return len(planned)

    def forget_state(self, unit: str) -> None:
        """Record that the checkpoint of a committed unit was deleted."""
        with self.transaction() as connection:
            connection.execute("UPDATE units SET checkpoint_sha256 = NULL WHERE name = ?", (unit,))
            self.write_record(unit)
            _seal(connection, unit)

    def write_record(self, unit: str) -> None:
        """Write a unit's rows in the ledger to a file, so that a lost ledger can be rebuilt."""
        row = {**self.committed(unit), "record_sha256": None}
        disk.write_hashed(self.record_path(unit), {"unit": row, "legs": self.legs_of(unit)})

    def record_path(self, unit: str) -> Path:
        """Return the file of a unit's record."""
        return self.root / "records" / f"{unit}.json"

    def superseded(self, round_index: int) -> list[sqlite3.Row]:
        """Return the committed units of a round whose states are no longer needed.

        All of their runs continued in the next round, and no unit of that round is pending.
        """
        if self.pending(round_index + 1):
            return []
        return self.query(
            "SELECT name, checkpoint_sha256 FROM units WHERE round = ? AND done = 1 "
            "AND name NOT IN (SELECT unit FROM legs WHERE round = ? AND run_id NOT IN "
            "(SELECT run_id FROM legs WHERE round = ?)) ORDER BY position",
            (round_index, round_index, round_index + 1),
        )

    def released_parents(self, round_index: int) -> list[str]:
        """Return the committed units whose released states the pending units of a round need.

        They are the units that those of the round start from, the units that these start from, and
        so on, in planned order.
        """
        rows = self.query(
            "WITH RECURSIVE needed (name) AS ("
            "SELECT name FROM units WHERE round = ? AND done = 0 UNION "
            "SELECT unit.name FROM needed JOIN legs leg ON leg.unit = needed.name "
            "JOIN legs parent ON parent.run_id = leg.parent AND parent.round = leg.round - 1 "
            "JOIN units unit ON unit.name = parent.unit "
            "WHERE unit.done = 1 AND unit.checkpoint_sha256 IS NULL) "
            "SELECT name FROM units WHERE done = 1 AND name IN needed ORDER BY round, position",
            (round_index,),
        )
        return [row["name"] for row in rows]

    def reset(self, units: Iterable[str]) -> None:
        """Make committed units pending again, because of damage or a change of unit size.

        Their files remain until the next commit replaces them.
        """
        with self.transaction() as connection:
            for unit in units:
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

    def restore(self, content: Mapping[str, Any]) -> None:
        """Insert the record of a committed unit, as the store wrote it."""
        with self.transaction() as connection:
            _insert(connection, "units", content["unit"])
            for leg in content["legs"]:
                _insert(connection, "legs", leg)
            _seal(connection, content["unit"]["name"])

    # ------------------------------------------------------------------------------------ reading

    def runs(self) -> list[dict[str, Any]]:
        """Return every run in planned order, each as its latest leg.

        Returns:
            Dicts as in ``legs``; the status is ``"stopped"`` instead of ``"done"`` if a search
            stopped the run early.
        """
        latest: dict[str, dict[str, Any]] = {}
        for leg in self.legs():
            before = latest.get(leg["run_id"])
            # A pending leg does not hide the score of the previous one.
            if before is not None and leg["status"] == "pending":
                leg = {**before, "status": "pending"}
            latest[leg["run_id"]] = leg
        for leg in latest.values():
            if leg["status"] == "done" and leg["stop"] < leg["total"]:
                leg["status"] = "stopped"
        return list(latest.values())

    def legs(self, planned: bool = False) -> list[dict[str, Any]]:
        """Return every leg of every run in planned order.

        A run that a longer one continued, because the sweep grew, is a part of the longer one.

        Args:
            planned: it is a run of its own, as it was planned.

        Returns:
            Dicts with ``run_id, unit, row, round, stage, start, stop, total, parent, config, seed,
            swept, status, score, greedy_score, diverged_at``; status is ``"pending"``, ``"done"``
            or ``"diverged"``, and the scores of pending legs are None.
        """
        rows = self.query(
            "SELECT l.* FROM legs l JOIN units u ON l.unit = u.name "
            "ORDER BY u.round, u.position, l.row"
        )
        legs = [_leg_dict(row) for row in rows]
        return legs if planned else _joined(legs)

    def units(self) -> list[dict[str, Any]]:
        """Return every planned unit in planned order.

        Returns:
            Dicts with all columns, decoded, and ``rows, has_state``: rows without and size with
            padding; the facts of a pending unit are None.
        """
        rows = self.query(
            "SELECT u.*, u.checkpoint_sha256 IS NOT NULL AS has_state, COUNT(l.run_id) AS rows "
            "FROM units u LEFT JOIN legs l ON l.unit = u.name GROUP BY u.name "
            "ORDER BY u.round, u.position"
        )
        return [
            {
                **row,
                "done": bool(row["done"]),
                "has_state": bool(row["has_state"]),
                "facts": json.loads(row["facts"]) if row["facts"] else None,
            }
            for row in rows
        ]

    def unit_row(self, unit: str) -> sqlite3.Row:
        """Return all columns of a planned unit, or raise an InputError."""
        rows = self.query("SELECT * FROM units WHERE name = ?", (unit,))
        if not rows:
            raise InputError(f"The unit {unit!r} is not planned in {self.root}.")
        return rows[0]

    def committed(self, unit: str) -> sqlite3.Row:
        """Return all columns of a committed unit, or raise an InputError."""
        row = self.unit_row(unit)
        if not row["done"]:
            raise InputError(f"The unit {unit} is still pending in {self.root}.")
        return row

    def legs_of(self, unit: str) -> list[dict[str, Any]]:
        """Return all columns of a unit's legs, in row order, JSON not decoded."""
        rows = self.query("SELECT * FROM legs WHERE unit = ? ORDER BY row", (unit,))
        return [dict(row) for row in rows]

    def check(self) -> None:
        """Raise a FaultError unless every committed unit's rows still have the recorded hash."""
        with disk.faults("read the ledger", self.path):
            if self.connection.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                raise FaultError(f"{self.path} is damaged: SQLite finds its structure broken.")
            if _schema(self.connection) != _expected_schema():
                raise FaultError(f"{self.path} is damaged: its tables are not those of a ledger.")
            # One transaction: a commit between the two reads would look like an altered record.
            self.connection.execute("BEGIN")
            records = _records(self.connection)
            rows = self.query("SELECT name, done, record_sha256 FROM units")
            self.connection.execute("COMMIT")
            for row in rows:
                expected = records.get(row["name"]) if row["done"] else None
                if row["record_sha256"] != expected or bool(row["done"]) == (expected is None):
                    raise FaultError(
                        f"{self.path} is damaged: the record of the unit {row['name']} was altered."
                    )

    # ---------------------------------------------------------------------------------- internals

    def query(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """Return all rows of a query."""
        with disk.faults("read the ledger", self.path):
            return self.connection.execute(sql, parameters).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction, which is durable as a whole or not at all."""
        self.refuse_read_only()
        with disk.faults("write the ledger", self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                # After some faults, such as a full disk, SQLite has rolled back already.
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def refuse_read_only(self) -> None:
        """Raise an InputError unless the ledger was opened for writing."""
        if not self.writable:
            raise InputError(f"The result directory {self.root} was opened for reading only.")

    def _refuse_lost(self, unit: str, planned: list[dict[str, Any]]) -> None:
        """Refuse a plan in which a committed unit is absent or has other runs."""
        new, old = (
            [[leg[column] for column in PLANNED] for leg in legs]
            for legs in (planned, self.legs_of(unit))
        )
        if new != old:
            raise InputError(
                f"The new plan would lose the committed unit {unit} of {self.root}; "
                "keep the plan as it was, or reset the unit first."
            )


# ---------------------------------------------------------------------------------------- the file


def create(root: Path, identity: dict[str, Any], spec_text: str) -> Path:
    """Make a new ledger under a temporary name; renaming it makes `root` a result directory."""
    new = root / NEW_LEDGER
    for suffix in ("", "-wal", "-shm", "-journal"):
        Path(f"{new}{suffix}").unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA)
        text = disk.json_text(identity)
        hashed = {"identity": text, "identity_sha256": disk.sha256(text)}
        meta = {"format": str(FORMAT), "spec": spec_text, **hashed}
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    disk.sync(new)
    return new


def connect(root: Path) -> sqlite3.Connection:
    """Open the ledger for writing, durable at every commit."""
    connection = sqlite3.connect(root / LEDGER, timeout=BUSY_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def connect_read_only(root: Path) -> sqlite3.Connection:
    """Open the ledger for reading, even on a read-only file system."""
    uri = (root / LEDGER).as_uri() + "?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("SELECT * FROM meta")
    except sqlite3.OperationalError:
        # A reader of a WAL ledger needs an index file beside it. If none can be made, nobody can
        # write either, and the ledger is complete unless a crash left a log behind.
        connection.close()
        log = Path(f"{root / LEDGER}-wal")
        if log.exists() and log.stat().st_size:
            raise
        connection = sqlite3.connect(f"{uri}&immutable=1", uri=True, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


def identity_at_rest(root: Path) -> dict[str, Any]:
    """Return the ledger's identity from a copy, so that a rejected directory stays unchanged.

    Raises:
        InputError: the ledger has another format.
        FaultError: the identity is damaged.
    """
    faults = disk.faults("read the ledger", root / LEDGER)
    with faults, tempfile.TemporaryDirectory() as scratch:
        for name in (LEDGER, f"{LEDGER}-wal"):
            if (root / name).exists():
                shutil.copyfile(root / name, Path(scratch, name))
        with contextlib.closing(sqlite3.connect(Path(scratch, LEDGER))) as connection:
            meta = dict(connection.execute("SELECT key, value FROM meta"))
    if meta.get("format") != str(FORMAT):
        raise InputError(
            f"{root} was written in the format {meta.get('format')}; this version of purejaxpg "
            f"reads the format {FORMAT}."
        )
    text = str(meta.get("identity"))
    if disk.sha256(text) != meta.get("identity_sha256"):
        raise FaultError(f"{root / LEDGER} is damaged: the identity of the sweep was altered.")
    return json.loads(text)


def _insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    names, marks = ", ".join(row), ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))


def _outcome_columns(outcome: Outcome) -> tuple[Any, ...]:
    """Return an outcome's columns as plain Python numbers, the only ones that SQLite accepts."""
    diverged_at = None if outcome.diverged_at is None else int(outcome.diverged_at)
    return outcome.status, float(outcome.score), float(outcome.greedy_score), diverged_at


def _leg_row(unit: str, round_index: int, row: int, run: Run) -> dict[str, Any]:
    return {
        **vars(run),
        "unit": unit,
        "row": row,
        "round": round_index,
        "config": disk.json_text(run.config),
        "seed": int(run.seed),
        "swept": disk.json_text(run.swept, sort=False),
        "status": "pending",
    }


def _leg_dict(row: sqlite3.Row) -> dict[str, Any]:
    """Return one leg of the ledger with its JSON columns decoded."""
    run = dict(row)
    run["config"], run["swept"] = json.loads(run["config"]), json.loads(run["swept"])
    for score in ("score", "greedy_score"):
        # SQLite stores NaN as NULL.
        if run["status"] != "pending" and run[score] is None:
            run[score] = math.nan
    return run


def _joined(legs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the legs of a run that a longer one continued the longer one's id and length.

    The longer run names the shorter one as its parent. (The parent of a population's member has
    the same length.)
    """
    totals = {leg["run_id"]: leg["total"] for leg in legs}
    longer = {
        leg["parent"]: (leg["run_id"], leg["total"])
        for leg in legs
        if totals.get(leg["parent"], leg["total"]) < leg["total"]
    }
    for leg in legs if longer else ():
        for key in ("run_id", "parent"):
            while leg[key] in longer:
                leg[key], total = longer[leg[key]]
                leg["total"] = max(leg["total"], total)
    return legs


def _schema(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Return the definitions of all tables and indexes."""
    query = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name"
    return list(map(tuple, connection.execute(query)))


def _expected_schema() -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return _schema(connection)


def _records(connection: sqlite3.Connection, unit: str | None = None) -> dict[str, str]:
    """Return a hash of the ledger's rows for each unit, or for one.

    SQLite detects a broken structure, but not a flipped bit inside a number.
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
        text = json.dumps(list(row), default=repr) + "\n"  # a damaged text may be bytes
        digests.setdefault(row["name"], hashlib.sha256()).update(text.encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _seal(connection: sqlite3.Connection, unit: str | None = None) -> None:
    """Record the hash of one committed unit, or of all of them."""
    connection.executemany(
        "UPDATE units SET record_sha256 = ? WHERE name = ? AND done = 1",
        [(record, name) for name, record in _records(connection, unit).items()],
    )
