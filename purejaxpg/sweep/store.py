"""The result directory of a sweep: the ledger, and one array file and one checkpoint per unit.

The files of a unit are written and synced first, under names that the ledger does not know yet. One
transaction of the ledger then records their hashes and the outcomes. An interrupted commit leaves
the unit either committed or pending, never in between.

Layout::

    DIR/ledger.sqlite           planned and committed units, every file's SHA-256
    DIR/arrays/<unit>.npz       metrics and evaluations, one row per run
    DIR/checkpoints/<unit>/     the whole training state of the unit, until no run ends there
    DIR/progress/<unit>.*/      the same for units in progress
    DIR/records/<unit>.json     the ledger's rows of a committed unit, in case the ledger is lost
    DIR/identity.json           the ledger's rows about the sweep
    DIR/spec.toml               the text of the sweep file
    DIR/given/                  the given arrays, if there are any (`frozen.py`)
    DIR/lock                    held by the process that runs the sweep
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote

import numpy as np

from purejaxpg import FaultError, InputError, checkpoint, disk
from purejaxpg.sweep import ledger as ledgers

REPAIR = "`purejaxpg fsck DIR --repair` rebuilds it from the records of its units"
STAGES = "stages.json"  # in a directory of stages: their names in order
MEMBER = "metric."  # a bare metric name could clash with a parameter of np.savez


class Store:
    """One result directory. Make one with ``Store.open`` (to run) or ``Store.read`` (to report)."""

    def __init__(self, path: Path, ledger: ledgers.Ledger, lock: int | None) -> None:
        """Wrap an open ledger; use ``Store.open`` or ``Store.read`` instead."""
        self.path = path
        self.ledger = ledger
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        identity: dict[str, Any],
        spec_text: str = "",
        create: bool = True,
    ) -> "Store":
        """Open the result directory of a sweep for running it, or make a new one.

        Args:
            path: the result directory.
            identity: JSON-able values that distinguish this sweep from others: the canonical spec,
                the hash of the agent's source, and so on.
            spec_text: copied to ``spec.toml`` in a new directory.
            create: False refuses to make a new directory.

        Returns:
            The store, which holds the directory's lock until it is closed.

        Raises:
            InputError: the directory belongs to a different sweep or is not a result directory; it
                is unchanged.
            FaultError: another process is running the sweep, or a file operation failed.
        """
        root = Path(os.path.abspath(path))
        wanted = json.loads(disk.json_text(identity))
        with disk.faults("open the result directory", root), contextlib.ExitStack() as undo:
            exists = (root / ledgers.LEDGER).is_file()
            if not exists:
                _refuse_foreign(root, create)
                root.mkdir(parents=True, exist_ok=True)
            lock = _lock(root, create=not exists)
            undo.callback(_unlock, lock)
            if not (root / ledgers.LEDGER).is_file():
                _create(root, wanted, spec_text)
            _refuse_other_sweep(root, ledgers.identity_at_rest(root), wanted)
            if lock is None:
                lock = _lock(root, create=True)
                undo.callback(_unlock, lock)
            store = cls(root, ledgers.Ledger(root, writable=True), lock)
            undo.pop_all()
        return store._checked()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Store":
        """Open an existing result directory for reading, even while a sweep runs in it.

        Args:
            path: the result directory.

        Returns:
            The store; methods that would change it raise an InputError.

        Raises:
            InputError: there is no result directory at this path, or one of stages.
            FaultError: the ledger is damaged or cannot be read.
        """
        root = Path(os.path.abspath(path))
        if not os.path.isfile(root / ledgers.LEDGER):  # Path.is_file raises if the name is too long
            raise InputError(_without_results(root))
        with disk.faults("read the ledger", root / ledgers.LEDGER):
            return cls(root, ledgers.Ledger(root, writable=False), None)._checked()

    def close(self) -> None:
        """Close the ledger and release the lock; closing twice is harmless."""
        self.ledger.close()
        _unlock(self._lock)
        self._lock = None
        self.ledger.writable = False

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

    # ------------------------------------------------------------------------------------ writing

    def commit(
        self,
        unit: str,
        arrays: dict[str, np.ndarray],
        state: Any,
        outcomes: Sequence[ledgers.Outcome],
        facts: dict[str, Any],
        save: Callable[[Path, Any], str] = checkpoint.save,
    ) -> None:
        """Commit a finished unit: its arrays, its checkpoint, then one transaction of the ledger.

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
            FaultError: a file could not be written; the unit is still pending.
        """
        rows = self.ledger.check_commit(unit, outcomes)
        for name, array in arrays.items():
            _check_array(unit, name, array, rows)
        facts_text = disk.json_text(facts)
        arrays_sha256 = self._write_arrays(unit, arrays)
        path = self._checkpoint_path(unit)
        checkpoint_sha256 = None if state is None else save(path, state)
        hashes = {"arrays_sha256": arrays_sha256, "checkpoint_sha256": checkpoint_sha256}
        self._record(
            {**dict(self.ledger.unit_row(unit)), "done": 1, **hashes, "facts": facts_text},
            [
                {**leg, **ledgers.outcome_columns(outcome)}
                for leg, outcome in zip(self.ledger.legs_of(unit), outcomes, strict=True)
            ],
        )
        self.ledger.commit(unit, arrays_sha256, checkpoint_sha256, facts_text, outcomes)

    def write_record(self, unit: str) -> None:
        """Write the record of a committed unit again."""
        self._record(dict(self.ledger.committed(unit)), self.ledger.legs_of(unit))

    def write_texts(self) -> None:
        """Write ``identity.json`` and ``spec.toml`` again from the ledger."""
        _write_about(self.path, self.ledger.identity, self.ledger.spec_text)

    def superseded(self, round_index: int) -> list[str]:
        """Return the units of a round whose states, or partly deleted states, can be deleted."""
        return [
            row["name"]
            for row in self.ledger.superseded(round_index)
            if row["checkpoint_sha256"] or self._checkpoint_path(row["name"]).exists()
        ]

    def release(self, units: Iterable[str]) -> None:
        """Delete the states of committed units; their arrays and outcomes stay.

        Raises:
            InputError: a unit is not committed.
            FaultError: the ledger cannot be written.
        """
        for unit in units:
            # The record and the ledger change first: neither may refer to a deleted state.
            row = {**dict(self.ledger.committed(unit)), "checkpoint_sha256": None}
            self._record(row, self.ledger.legs_of(unit))
            self.ledger.forget_state(unit)
            # If this fails, the next run tries again.
            checkpoint.remove(self._checkpoint_path(unit))

    # ------------------------------------------------------------------------------------ reading

    def damaged(self) -> dict[str, str]:
        """Check every file of every committed unit against its hash.

        Returns:
            The damage as one sentence, by unit; empty if every file is intact.
        """
        problems = {}
        for row in self.ledger.committed_units():
            try:
                self._check_arrays(row["name"], row["arrays_sha256"])
                if row["checkpoint_sha256"] is not None:
                    checkpoint.verify(self._checkpoint_path(row["name"]), row["checkpoint_sha256"])
            except FaultError as error:
                problems[row["name"]] = str(error)
        return problems

    def arrays(self, unit: str, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Verify and read the arrays of a committed unit.

        Args:
            unit: a committed unit.
            names: read only these, if present; None reads all.

        Returns:
            Arrays ``[rows, ...]`` by name, sorted by name.

        Raises:
            InputError: the unit is not committed.
            FaultError: the file is missing or damaged.
        """
        path = self._check_arrays(unit, self.ledger.committed(unit)["arrays_sha256"])
        with disk.faults("read", path):
            return _read_npz(path, names)

    def state(self, unit: str, template: Any, load: Callable[..., Any] = checkpoint.load) -> Any:
        """Verify and read the final training state of a committed unit.

        Args:
            unit: a committed unit.
            template: pytree of the state's structure, shapes and dtypes.
            load: reads what the ``save`` of ``commit`` wrote.

        Returns:
            The state, as ``checkpoint.load`` returns it.

        Raises:
            InputError: the unit is not committed, or was committed without a state.
            FaultError: the checkpoint is missing or damaged, or does not fit the template.
        """
        digest = self.ledger.committed(unit)["checkpoint_sha256"]
        if digest is None:
            raise InputError(
                f"The unit {unit} has no checkpoint: it was committed without one, or all its "
                "runs continued in a later round."
            )
        return load(self._checkpoint_path(unit), template, sha256=digest)

    # ---------------------------------------------------------------------------------- internals

    def _record(self, unit: dict[str, Any], legs: list[dict[str, Any]]) -> None:
        """Write a unit's rows in the ledger to a file, so that a lost ledger can be rebuilt."""
        content = {"unit": {**unit, "record_sha256": None}, "legs": legs}
        disk.write_hashed(self.path / "records" / f"{unit['name']}.json", content)

    def _arrays_path(self, unit: str) -> Path:
        return self.path / "arrays" / f"{unit}.npz"

    def _check_arrays(self, unit: str, digest: str) -> Path:
        """Return the path of a unit's array file after checking its hash."""
        path = self._arrays_path(unit)
        if not path.is_file():
            raise FaultError(f"{path} is missing, but the ledger records it as written.")
        with disk.faults("read", path):
            if disk.sha256_of(path) != digest:
                raise FaultError(f"{path} is damaged: its SHA-256 is not the one in the ledger.")
        return path

    def _checkpoint_path(self, unit: str) -> Path:
        return self.path / "checkpoints" / unit

    def _write_arrays(self, unit: str, arrays: dict[str, np.ndarray]) -> str:
        """Write the unit's array file durably and return its hash."""
        path = self._arrays_path(unit)
        temporary = path.with_name(f".{path.name}.tmp")
        with disk.faults("write", path):
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                # Sorted, and free of time stamps, so that equal results are equal files.
                members = {MEMBER + quote(name, safe=""): arrays[name] for name in sorted(arrays)}
                np.savez(file, **members)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            digest = disk.sha256_of(temporary)
            os.replace(temporary, path)
            disk.sync(path.parent)
        return digest

    def _checked(self) -> Self:
        """Check the ledger and return the store, or close it and raise."""
        try:
            self.ledger.check()
        except FaultError as error:
            self.close()
            raise FaultError(f"{str(error).rstrip('.')}; {REPAIR}.") from error
        except BaseException:
            self.close()
            raise
        return self


# ---------------------------------------------------------------------------------------- helpers


def _check_array(unit: str, name: str, array: np.ndarray, rows: int) -> None:
    """Refuse an array without one row per run, or that NumPy would have to pickle."""
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
            present = {unquote(member.removeprefix(MEMBER)): member for member in file.files}
            wanted = present if names is None else [name for name in names if name in present]
            return {name: file[present[name]] for name in sorted(wanted)}
    except ValueError as error:
        raise FaultError(f"{path} is not an array file: {error}.") from error


def _lock(root: Path, create: bool) -> int | None:
    """Take the directory's lock or raise; return None if there is no lock file to take."""
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


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold the lock of a directory inside the block, so that one process runs its stages.

    Raises:
        FaultError: another process holds it, or it cannot be written.
    """
    with disk.faults("open", root):
        lock = _lock(root, create=True)
    try:
        yield
    finally:
        _unlock(lock)


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _without_results(root: Path) -> str:
    """Say why nothing can be read from a directory without a ledger."""
    if os.path.isfile(root / STAGES):
        names = [str(root / name) for name in disk.read_hashed(root / STAGES)["stages"]]
        return f"{root} holds stages with results of their own; name one: {', '.join(names)}."
    return f"{root} is not a result directory: it holds no {ledgers.LEDGER}."


def _refuse_foreign(root: Path, create: bool) -> None:
    """Refuse a path without a ledger unless a result directory may be made there."""
    if not create:
        raise InputError(f"{root} is not a result directory: it holds no {ledgers.LEDGER}.")
    if not root.exists():
        return
    if not root.is_dir():
        raise InputError(
            f"{root} is a file; the output directory must be a new or empty directory."
        )
    names = {entry.name for entry in root.iterdir()}
    # A creation that was interrupted before the ledger got its name may start again.
    unfinished = names == {"lock"} or ("lock" in names and ledgers.NEW_LEDGER in names)
    if names and not unfinished:
        raise InputError(
            f"{root} is not empty and is not a result directory: it holds no {ledgers.LEDGER}; "
            "choose another with --out."
        )


def _refuse_other_sweep(root: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a directory whose identity differs, naming the first field that does."""
    changed = difference(stored, wanted)
    if changed is not None:
        key, old, new = changed
        raise InputError(
            f"The output directory {root} belongs to a different sweep: its {key} is "
            f"{old} and this one's is {new}; choose another with --out."
        )


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the first key in which two identities differ, with both values as text, or None."""
    theirs, ours = dict(_dotted(stored)), dict(_dotted(wanted))
    for key in sorted(theirs.keys() | ours.keys()):
        old, new = theirs.get(key, "absent"), ours.get(key, "absent")
        if old != new and _unequal(old, new):
            return key, _short(old), _short(new)
    return None


def _unequal(old: str, new: str) -> bool:
    """Return whether two JSON texts hold different values; 1 equals 1.0."""
    return "absent" in (old, new) or json.loads(old) != json.loads(new)


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield ``(dotted.key, JSON text)`` for every leaf of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", disk.json_text(value)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _write_about(root: Path, identity: dict[str, Any], spec_text: str) -> None:
    """Write the files that identify the sweep."""
    disk.write_text(root / "spec.toml", spec_text)
    disk.write_hashed(root / "identity.json", {"identity": identity, "spec": spec_text})


def _create(root: Path, identity: dict[str, Any], spec_text: str) -> None:
    """Fill a new directory; renaming the ledger, at the end, makes it a result directory."""
    new = ledgers.create(root, identity, spec_text)
    (root / "arrays").mkdir(exist_ok=True)
    (root / "checkpoints").mkdir(exist_ok=True)
    _write_about(root, identity, spec_text)
    os.replace(new, root / ledgers.LEDGER)
    disk.sync(root)
    disk.sync(root.parent)


def rebuild(root: Path) -> list[str]:
    """Make a new ledger from ``identity.json`` and the records; the old one is moved aside.

    Args:
        root: a result directory whose ledger cannot be used.

    Returns:
        The committed units of the new ledger. The next run plans everything else again.

    Raises:
        FaultError: the identity is damaged too, another process holds the directory, or the new
            ledger cannot be written.
    """
    about = disk.read_hashed(root / "identity.json")
    lock = _lock(root, create=True)
    try:
        with disk.faults("rebuild the ledger of", root):
            damaged = root / "ledger.damaged"
            damaged.mkdir(exist_ok=True)
            for name in (f"{ledgers.LEDGER}{suffix}" for suffix in ("", "-wal", "-shm")):
                if (root / name).exists():
                    os.replace(root / name, damaged / name)
            _create(root, about["identity"], about["spec"])
            with contextlib.closing(ledgers.Ledger(root, writable=True)) as ledger:
                records = sorted((root / "records").glob("*.json"))
                return [path.stem for path in records if _restored(ledger, path)]
    finally:
        _unlock(lock)


def _restored(ledger: ledgers.Ledger, record: Path) -> bool:
    """Insert a record into a ledger; return False if it is damaged."""
    try:
        content = disk.read_hashed(record)
    except FaultError:
        return False
    ledger.restore(content)
    return True
