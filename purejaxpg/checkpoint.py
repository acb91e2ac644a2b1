"""Checkpoints of whole training states: orbax writes the arrays, a manifest of hashes guards them.

Orbax survives a crash in the middle of a save, but it restores flipped bits silently. So
``MANIFEST.json`` lists every file of a checkpoint with its SHA-256, and nothing is read before all
of them have been verified. The manifest also records the path, shape and dtype of each leaf. The
tree itself comes from the caller's template, never from the file, and nothing is unpickled.

jax and orbax are imported inside the functions, so that tools that never touch an accelerator can
import the result store.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from purejaxpg import FaultError, disk, text

MANIFEST = "MANIFEST.json"
_FORMAT = 1


def save(path: str | os.PathLike[str], state: Any) -> str:
    """Write a pytree of arrays as a checkpoint directory, completely or not at all.

    It replaces a checkpoint at ``path``; a crash leaves either the old one or the new one.

    Args:
        path: the directory to write; its parents are created.
        state: pytree whose leaves are jax or NumPy arrays of any shape, typed PRNG keys, or
            scalars.

    Returns:
        The SHA-256 of the manifest, which covers every byte of the checkpoint.

    Raises:
        FaultError: the disk is full, permission is denied, or similar.
        TypeError: a leaf is not an array.
    """
    target = Path(os.path.abspath(path))
    leaves, arrays = _flatten(state)
    temporary = target.with_name(f".{target.name}.tmp")
    with disk.faults("write the checkpoint", target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_arrays(temporary / "arrays", arrays)
        digest = _write_manifest(temporary, leaves)
        _swap_in(temporary, target)
    return digest


def verify(path: str | os.PathLike[str], sha256: str | None = None) -> None:
    """Check every file of a checkpoint against its hash, without reading the arrays.

    Args:
        path: the directory that ``save`` wrote.
        sha256: the hash that ``save`` returned; None leaves the manifest itself unchecked.

    Raises:
        FaultError: a file is missing, damaged or not listed.
    """
    source = _existing(Path(os.path.abspath(path)))
    with disk.faults("read the checkpoint", source):
        _verified_manifest(source, sha256)


def load(path: str | os.PathLike[str], template: Any, sha256: str | None = None) -> Any:
    """Verify a checkpoint and read it back into the structure of a template.

    Args:
        path: the directory that ``save`` wrote.
        template: pytree with the structure, shapes and dtypes of the saved state; leaves may be
            ``jax.ShapeDtypeStruct``. NumPy leaves come back as NumPy, all others as jax arrays.
        sha256: the hash that ``save`` returned; None leaves the manifest itself unchecked.

    Returns:
        The state, with the template's tree structure.

    Raises:
        FaultError: a file is missing, damaged or not listed, or the template does not fit.
    """
    source = _existing(Path(os.path.abspath(path)))
    with disk.faults("read the checkpoint", source):
        manifest = _verified_manifest(source, sha256)
        wanted = _describe(template)
        _check_fit(source, manifest["leaves"], wanted)
        arrays = _read_arrays(source / "arrays", manifest["leaves"])
    return _unflatten(template, manifest["leaves"], arrays)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint and the remains of an interrupted replacement, ignoring errors."""
    target = Path(os.path.abspath(path))
    for each in (target, _previous(target)):
        shutil.rmtree(each, ignore_errors=True)


# -------------------------------------------------------------------------------- tree <-> arrays


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is an array of typed PRNG keys, or the shape of one."""
    import jax

    return jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def to_numpy(leaf: Any) -> np.ndarray:
    """Copy a leaf to the host; typed keys become their data, with one more axis."""
    import jax

    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def from_numpy(array: Any, template: Any) -> Any:
    """Return the inverse of `to_numpy` for a leaf like `template`."""
    import jax

    if not is_key(template):
        return array
    # A ShapeDtypeStruct has no implementation to ask for, but its tracer does. This works for the
    # implementations that a program defines, too.
    implementations: list[Any] = []
    jax.eval_shape(lambda key: implementations.append(jax.random.key_impl(key)), template)
    return jax.random.wrap_key_data(array, impl=implementations[0])


def like(template: Any, leaves: Sequence[Any]) -> Any:
    """Return the pytree like `template` from whose leaves `to_numpy` made `leaves`."""
    import jax

    wanted, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(structure, map(from_numpy, leaves, wanted))


def _leaf_record(name: str, leaf: Any) -> dict[str, Any]:
    """Return the path, shape, dtype and, for a typed PRNG key, the implementation of one leaf."""
    dtype, key = getattr(leaf, "dtype", None), is_key(leaf)
    if dtype is None and not isinstance(leaf, (bool, int, float)):
        kind = type(leaf).__name__
        raise TypeError(f"The leaf {name} of a checkpoint is a {kind}, not an array.")
    return {
        "path": name,
        "shape": list(getattr(leaf, "shape", ())),
        "dtype": "key" if key else str(dtype or np.asarray(leaf).dtype),
        # `key<fry>` names the implementation for both arrays and ShapeDtypeStruct.
        "key": str(dtype) if key else None,
    }


def _describe(tree: Any) -> list[dict[str, Any]]:
    """Return the records of all leaves, in the order of jax.tree.leaves."""
    import jax

    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [_leaf_record(jax.tree_util.keystr(path) or "<root>", leaf) for path, leaf in flat]


def _flatten(state: Any) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return the leaf records and the arrays to write, by leaf number."""
    import jax

    leaves = _describe(state)
    arrays = {}
    for index, (record, leaf) in enumerate(zip(leaves, jax.tree.leaves(state), strict=True)):
        # Orbax takes 0-d arrays but not NumPy scalars, and cannot write an array without elements.
        array = to_numpy(leaf)
        if array.dtype.kind == "O":
            raise TypeError(f"The leaf {record['path']} of a checkpoint holds Python objects.")
        record["key_shape"] = list(array.shape) if record["dtype"] == "key" else None
        if array.size:
            arrays[f"{index:05d}"] = _as_known(array)
    return leaves, arrays


def _unflatten(template: Any, leaves: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> Any:
    """Return the template's tree filled with the arrays that were read."""
    import jax

    wanted, structure = jax.tree.flatten(template)
    filled = []
    for index, (record, leaf) in enumerate(zip(leaves, wanted, strict=True)):
        # Key data are unsigned integers.
        dtype = np.dtype(jax.numpy.dtype("uint32" if record["dtype"] == "key" else record["dtype"]))
        array = arrays.get(f"{index:05d}")
        if array is None:
            array = np.zeros(record["key_shape"] or record["shape"], dtype)
        filled.append(_like(leaf, array.view(dtype)))
    return jax.tree.unflatten(structure, filled)


def _as_known(array: np.ndarray) -> np.ndarray:
    """View an array of one of jax's small types, some of which orbax lacks, as integers."""
    own = array.dtype.isbuiltin != 1
    return array.view(np.dtype(f"uint{8 * array.dtype.itemsize}")) if own else array


def _like(leaf: Any, array: np.ndarray) -> Any:
    """Return an array of the same kind (NumPy, scalar, jax, typed key) as the template's leaf."""
    import jax

    if isinstance(leaf, np.ndarray):
        return array
    if isinstance(leaf, np.generic):
        return array[()]
    if isinstance(leaf, (bool, int, float)):
        return array.item()
    # A copy, because jax may otherwise alias memory that it does not own and donate it later.
    filled = from_numpy(jax.numpy.array(array), leaf)
    # A sharded template gets its shards back; an uncommitted one stays free to move.
    return jax.device_put(filled, leaf.sharding) if getattr(leaf, "committed", False) else filled


def _check_fit(source: Path, saved: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Refuse a template whose leaves differ from the saved ones, naming the first difference."""

    def misfit(problem: str) -> FaultError:
        return FaultError(f"The checkpoint {source} does not fit: {problem}.")

    by_path = {record["path"]: record for record in saved}
    for record in wanted:
        name, other = record["path"], by_path.get(record["path"])
        if other is None:
            raise misfit(f"it has no {name}, which is expected")
        for field, label in (("shape", "shape"), ("dtype", "type"), ("key", "type")):
            if other[field] != record[field]:
                both = f"{other[field]} there, and {record[field]} is expected"
                raise misfit(f"{name} has {label} {both}")
    if extra := by_path.keys() - {record["path"] for record in wanted}:
        raise misfit(f"it holds {min(extra)}, which is not expected")
    if [record["path"] for record in saved] != [record["path"] for record in wanted]:
        raise misfit("its leaves come in another order")


# --------------------------------------------------------------------------------- arrays on disk


@contextlib.contextmanager
def _checkpointer(doing: str, directory: Path) -> Iterator[Any]:
    """Yield orbax's checkpointer, silent and without barriers for other processes of a job."""
    import jax
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as opened:
            yield opened
    except (ValueError, RuntimeError, KeyError) as error:  # a full disk arrives as one of these
        raise FaultError(
            f"Cannot {doing} the checkpoint {directory.parent}: {text.first_line(error)}."
        ) from error
    finally:
        logger.setLevel(level)


def _write_arrays(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by name with orbax; a state without elements writes nothing."""
    import orbax.checkpoint as ocp

    if arrays:
        with _checkpointer("write", directory) as checkpointer:
            checkpointer.save(directory, args=ocp.args.PyTreeSave(arrays))


def _read_arrays(directory: Path, leaves: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Read the arrays with orbax, as NumPy arrays by leaf number."""
    import orbax.checkpoint as ocp

    restore = {
        f"{index:05d}": ocp.RestoreArgs(restore_type=np.ndarray)
        for index, record in enumerate(leaves)
        if 0 not in (record["key_shape"] or record["shape"])
    }
    if not restore:
        return {}
    with _checkpointer("read", directory) as checkpointer:
        return checkpointer.restore(directory, args=ocp.args.PyTreeRestore(restore_args=restore))


def _files(directory: Path) -> list[str]:
    """Return every file under a directory except the manifest, as sorted relative POSIX paths."""
    files = (path for path in directory.rglob("*") if not path.is_dir())
    return sorted({path.relative_to(directory).as_posix() for path in files} - {MANIFEST})


def _write_manifest(directory: Path, leaves: list[dict[str, Any]]) -> str:
    """Write the manifest and force the whole directory to the disk; return the manifest's hash."""
    hashes = {name: disk.sha256_of(directory / name) for name in _files(directory)}
    manifest = {"format": _FORMAT, "files": hashes, "leaves": leaves}
    content = json.dumps(manifest, indent=1, sort_keys=True)
    (directory / MANIFEST).write_text(content, encoding="utf-8")
    for path in [*directory.rglob("*"), directory]:
        disk.sync(path)
    return disk.sha256(content)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _existing(target: Path) -> Path:
    """Return the checkpoint to read, the old one if a crash interrupted its replacement."""
    return _previous(target) if not target.exists() and _previous(target).exists() else target


def _swap_in(temporary: Path, target: Path) -> None:
    """Replace a directory with a finished one."""
    # One rename cannot replace a directory that is not empty, so there are two.
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    os.replace(temporary, target)
    disk.sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _verified_manifest(source: Path, sha256: str | None) -> dict[str, Any]:
    """Return the manifest after checking that its files are intact and that there are no others."""
    path = source / MANIFEST
    if not path.is_file():
        raise FaultError(f"{path} is missing: there is no complete checkpoint at {source}.")
    if sha256 is not None and disk.sha256_of(path) != sha256:
        raise FaultError(f"{path} is damaged: its SHA-256 is not the recorded one.")
    manifest = _parsed_manifest(path)
    for name, digest in manifest["files"].items():
        _check_file(source, name, digest)
    if extra := sorted(set(_files(source)) - manifest["files"].keys()):
        raise FaultError(
            f"{source / extra[0]} does not belong to the checkpoint: the manifest does not list it."
        )
    return manifest


def _parsed_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest, or raise a FaultError if this version does not write such a one."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == _FORMAT
        hashes, leaves = manifest["files"], manifest["leaves"]
        well_formed = all(isinstance(digest, str) for digest in hashes.values()) and all(
            leaf.keys() == {"path", "shape", "dtype", "key", "key_shape"} for leaf in leaves
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FaultError(f"{path} is damaged: it is not a manifest.") from error
    if not (known and well_formed):
        raise FaultError(f"{path} is damaged, or was written by another version of purejaxpg.")
    return manifest


def _check_file(source: Path, name: str, digest: str) -> None:
    """Raise FaultError unless a listed file lies inside the checkpoint and has the listed hash."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or not relative.parts:
        raise FaultError(
            f"{source / MANIFEST} is refused: it lists {name!r}, a path outside the checkpoint."
        )
    path = source / relative
    if path.is_symlink() or not path.is_file():
        raise FaultError(f"{path} is missing from the checkpoint.")
    if disk.sha256_of(path) != digest:
        raise FaultError(f"{path} is damaged: its SHA-256 is not the recorded one.")
