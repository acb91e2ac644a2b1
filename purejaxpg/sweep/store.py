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
from typing import Any, Self
from urllib.parse import quote, unquote

import numpy as np

from purejaxpg import FaultError, InputError, checkpoint, disk
from purejaxpg.sweep import ledger as ledgers

REPAIR = "`purejaxpg fsck DIR --repair` rebuilds it from the records of its units"
STAGES = "stages.json"  # in a directory of stages or agents: their names in order
GROWS = ("seeds", "sweep", "config", "search")  # keys of an identity whose values may grow
GROWN = "grown"  # key of an identity: what these values were before each growth, oldest first
MEMBER = "metric."  # a bare metric name could clash with a parameter of np.savez


class Store:
    """One result directory. Make one with ``Store.open`` (to run) or ``Store.read`` (to report)."""

    def __init__(self, path: Path, ledger: ledgers.Ledger, lock: contextlib.ExitStack) -> None:
        """Wrap an open ledger; use ``Store.open`` or ``Store.read`` instead."""
        self.path = path
        self.ledger = ledger
        self._lock = lock  # is released when it is closed

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        identity: dict[str, Any],
        spec_text: str = "",
    ) -> "Store":
        """Open the result directory of a sweep for running it, or make a new one.

        Args:
            path: the directory.
            identity: JSON-able values that distinguish this sweep from others: the canonical spec,
                the hash of the agent's source, and so on.
            spec_text: copied to ``spec.toml`` in a new directory.

        Returns:
            The store, which holds the directory's lock until it is closed.

        Raises:
            InputError: the directory belongs to a different sweep or is not a result directory; it
                is unchanged.
            FaultError: another process is running the sweep, or a file operation failed.
        """
        root = Path(os.path.abspath(path))
        wanted = json.loads(disk.json_text(identity))
        with disk.faults("open the result directory", root), contextlib.ExitStack() as lock:
            exists = (root / ledgers.LEDGER).is_file()
            if not exists:
                _refuse_foreign(root)
                root.mkdir(parents=True, exist_ok=True)
            locked = _take(lock, root, create=not exists)
            if not (root / ledgers.LEDGER).is_file():
                _create(root, wanted, spec_text)
            stored = ledgers.identity_at_rest(root)
            if not grows(stored, wanted):
                refuse_other_sweep(root, differences(stored, wanted))
            if not locked:
                _take(lock, root, create=True)
            store = cls(root, ledgers.Ledger(root, writable=True), lock.pop_all())
        store._checked()
        try:
            store._grow(stored, wanted, spec_text)
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Store":
        """Open an existing result directory for reading, even while a sweep runs in it.

        Methods of the store that would change it raise an InputError.

        Raises:
            InputError: there is no result directory at this path, or one of stages.
            FaultError: the ledger is damaged or cannot be read.
        """
        root = Path(os.path.abspath(path))
        if not os.path.isfile(root / ledgers.LEDGER):  # Path.is_file raises if the name is too long
            raise InputError(_without_results(root))
        with disk.faults("read the ledger", root / ledgers.LEDGER):
            ledger = ledgers.Ledger(root, writable=False)
            return cls(root, ledger, contextlib.ExitStack())._checked()

    def close(self) -> None:
        """Close the ledger and release the lock; closing twice is harmless."""
        self.ledger.close()
        self._lock.close()
        self.ledger.writable = False

    def __enter__(self) -> Self:
        """Return the store itself."""
        return self

    def __exit__(self, *_: object) -> None:
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
        checkpoint_sha256 = None if state is None else save(self._checkpoint_path(unit), state)
        self.ledger.commit(unit, arrays_sha256, checkpoint_sha256, facts_text, outcomes)

    def _grow(self, stored: dict[str, Any], wanted: dict[str, Any], spec_text: str) -> None:
        """Make the sweep the one that is wanted, if it grows; complete an interrupted growth."""
        if stored != wanted:
            note = f"The sweep grew: {changes(stored, wanted)}."
            self.ledger.grow(wanted, spec_text, note)
        about = {"identity": self.ledger.identity, "spec": self.ledger.spec_text}
        if GROWN in wanted and disk.read_intact(self.path / "identity.json") != about:
            self.write_texts()

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
            self.ledger.forget_state(unit)  # first: it may not refer to a deleted state
            # If this fails, the next run tries again.
            checkpoint.remove(self._checkpoint_path(unit))

    # ------------------------------------------------------------------------------------ reading

    def damaged(self) -> dict[str, str]:
        """Check every file of every committed unit; return the damage as one sentence, by unit."""
        problems = {}
        for row in (unit for unit in self.ledger.units() if unit["done"]):
            try:
                self._check_arrays(row["name"], row["arrays_sha256"])
                if row["checkpoint_sha256"] is not None:
                    checkpoint.verify(self._checkpoint_path(row["name"]), row["checkpoint_sha256"])
            except FaultError as error:
                problems[row["name"]] = str(error)
        return problems

    def arrays(self, unit: str, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """Verify and read the arrays ``[rows, ...]`` of a committed unit, sorted by name.

        With `names`, read only these, if present.

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
            unit: its name.
            template: pytree of the state's structure, shapes and dtypes.
            load: reads what the ``save`` of ``commit`` wrote.

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
        # Sorted, and free of time stamps, so that equal results are equal files.
        members = {MEMBER + quote(name, safe=""): arrays[name] for name in sorted(arrays)}
        with disk.replacing(path) as temporary:
            with temporary.open("wb") as file:
                np.savez(file, **members)  # type: ignore[arg-type]
            return disk.sha256_of(temporary)

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


def _take(lock: contextlib.ExitStack, root: Path, create: bool) -> bool:
    """Take a directory's lock until `lock` closes; return False if there is no file to lock."""
    try:
        descriptor = os.open(root / "lock", os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
    except FileNotFoundError:
        return False
    lock.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FaultError(
            f"Another process is running this sweep in {root}; wait for it or stop it."
        ) from None
    return True


@contextlib.contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold the lock of a directory inside the block, so that one process works in it.

    Raises:
        FaultError: another process holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as lock:
        with disk.faults("open", root):
            _take(lock, root, create=True)
        yield


def parts(root: Path) -> list[str] | None:
    """Return the names of the stages or agents in a directory; None if it holds neither.

    Raises:
        FaultError: the list of them is damaged.
    """
    if not os.path.isfile(root / STAGES):
        return None
    (names,) = disk.read_hashed(root / STAGES).values()
    return list(names)


def _without_results(root: Path) -> str:
    """Say why nothing can be read from a directory without a ledger."""
    names = parts(root)
    if names is not None:
        named = ", ".join(str(root / name) for name in names)
        return f"{root} holds directories with results of their own; name one: {named}."
    return f"{root} is not a result directory: it holds no {ledgers.LEDGER}."


def _refuse_foreign(root: Path) -> None:
    """Refuse a path without a ledger unless a result directory may be made there."""
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


def refuse_other_sweep(root: Path, changes: Iterable[tuple[str, str, str]]) -> None:
    """Raise an InputError that names the first of the `differences` of a directory, if any."""
    for key, old, new in changes:
        raise InputError(
            f"The output directory {root} belongs to a different sweep: its {key} is "
            f"{old} and this one's is {new}; choose another with --out."
        )


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the first key in which two identities differ, with both values as text, or None."""
    return next(differences(stored, wanted), None)


def differences(
    stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """Yield the keys in which two identities differ, in order, with both values as text."""
    theirs, ours = dict(_dotted(stored)), dict(_dotted(wanted))
    for key in sorted(theirs.keys() | ours.keys()):
        if (key in theirs) != (key in ours) or theirs.get(key) != ours.get(key):
            yield key, _shown(theirs, key), _shown(ours, key)


def growing(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that may grow."""
    return {key: identity[key] for key in GROWS if key in identity}


def changes(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say what is added to a sweep that grows."""
    added = differences(growing(stored), growing(wanted))
    return "; ".join(f"{key} from {old} to {new}" for key, old, new in added)


def grows(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a sweep is what a stored one becomes when it grows, by their identities."""
    *first, last = wanted.get(GROWN) or [None]
    theirs, ours = (
        {k: v for k, v in i.items() if k not in (*GROWS, GROWN)} for i in (stored, wanted)
    )
    return first == stored.get(GROWN, []) and last == growing(stored) and theirs == ours


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted.key, value)`` for every leaf of nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    text = disk.json_text(values[key]) if key in values else "absent"
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

    It returns the committed units of the new ledger. The next run plans everything else again.

    Raises:
        FaultError: the identity is damaged too, another process holds the directory, or the new
            ledger cannot be written.
    """
    about = disk.read_hashed(root / "identity.json")
    with held(root), disk.faults("rebuild the ledger of", root):
        damaged = root / "ledger.damaged"
        damaged.mkdir(exist_ok=True)
        for name in (f"{ledgers.LEDGER}{suffix}" for suffix in ("", "-wal", "-shm")):
            if (root / name).exists():
                os.replace(root / name, damaged / name)
        _create(root, about["identity"], about["spec"])
        with contextlib.closing(ledgers.Ledger(root, writable=True)) as ledger:
            paths = sorted((root / "records").glob("*.json"))
            intact = [record for path in paths if (record := disk.read_intact(path))]
            for record in intact:
                ledger.restore(record)
            return [record["unit"]["name"] for record in intact]
