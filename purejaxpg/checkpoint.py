"""Checkpoints of whole training states: orbax for the arrays, a manifest of hashes for the trust.

Orbax survives a crash in the middle of a save, but it restores flipped bits without a word. So
every file under a checkpoint is listed with its SHA-256 in ``MANIFEST.json``, and nothing is read
before all of them have been verified. The manifest also records the path, shape and dtype of each
leaf; the tree itself always comes from the caller's template, never from the file, and nothing is
unpickled.

jax and orbax are imported inside the functions, so that tools that never touch an accelerator can
import the result store.
"""

import contextlib
import hashlib
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
    """Write a pytree of arrays as a checkpoint directory, whole or not at all.

    A checkpoint already at ``path`` is replaced; a crash leaves either the old one or the new one.

    Args:
        path: the directory to write; its parents are made.
        state: pytree whose leaves are jax or NumPy arrays of any shape, typed PRNG keys, or
            scalars.

    Returns:
        The SHA-256 of the manifest, which vouches for every byte of the checkpoint.

    Raises:
        FaultError: the disk is full, permission is denied, and so on.
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
        sha256: what ``save`` returned; None leaves the manifest itself unchecked.

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
        sha256: what ``save`` returned; None leaves the manifest itself unchecked.

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
    """Remove a checkpoint, and what an interrupted replacement left of it, as far as that goes."""
    target = Path(os.path.abspath(path))
    for each in (target, _previous(target)):
        shutil.rmtree(each, ignore_errors=True)


# -------------------------------------------------------------------------------- tree <-> arrays


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf is an array, or the shape, of typed PRNG keys."""
    import jax

    return jax.dtypes.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key)


def to_numpy(leaf: Any) -> np.ndarray:
    """Copy a leaf to the host: of typed keys, their data, with one more axis."""
    import jax

    return np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)


def from_numpy(array: Any, template: Any) -> Any:
    """Return what `to_numpy` made of a leaf like `template` as that leaf again."""
    import jax

    if not is_key(template):
        return array
    return jax.random.wrap_key_data(array, impl=_key_implementation(template))


def like(template: Any, leaves: Sequence[Any]) -> Any:
    """Put what `to_numpy` made of the leaves of a pytree back into the structure of `template`."""
    import jax

    wanted, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(structure, map(from_numpy, leaves, wanted))


def _leaf_record(name: str, leaf: Any) -> dict[str, Any]:
    """Return the path, shape, dtype and, for a typed PRNG key, the implementation of one leaf."""
    dtype = getattr(leaf, "dtype", None)
    if is_key(leaf):
        # `key<fry>` names the implementation for both arrays and ShapeDtypeStruct.
        return {"path": name, "shape": list(leaf.shape), "dtype": "key", "key": str(dtype)}
    if not isinstance(leaf, (bool, int, float)) and dtype is None:
        raise TypeError(
            f"The leaf {name} of a checkpoint is a {type(leaf).__name__}, not an array."
        )
    shape = list(getattr(leaf, "shape", ()))
    return {
        "path": name,
        "shape": shape,
        "dtype": str(dtype or np.asarray(leaf).dtype),
        "key": None,
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
    """Return the template's tree filled with what was read."""
    import jax

    like, structure = jax.tree.flatten(template)
    filled = []
    for index, (record, leaf) in enumerate(zip(leaves, like, strict=True)):
        array = arrays.get(f"{index:05d}")
        if array is None:
            array = np.zeros(record["key_shape"] or record["shape"], _dtype(record))
        filled.append(_like(leaf, array.view(_dtype(record))))
    return jax.tree.unflatten(structure, filled)


def _as_known(array: np.ndarray) -> np.ndarray:
    """Return an array of a type that NumPy knows: of jax's own small ones, orbax lacks a few."""
    own = array.dtype.isbuiltin != 1
    return array.view(np.dtype(f"uint{8 * array.dtype.itemsize}")) if own else array


def _dtype(record: dict[str, Any]) -> np.dtype:
    """Return the dtype of a leaf's array; key data are unsigned integers."""
    import jax.numpy as jnp

    return np.dtype(np.uint32) if record["dtype"] == "key" else np.dtype(jnp.dtype(record["dtype"]))


def _like(leaf: Any, array: np.ndarray) -> Any:
    """Return an array of the same kind (NumPy, scalar, jax, typed key) as the template's leaf."""
    import jax

    if isinstance(leaf, np.ndarray):
        return array
    if isinstance(leaf, np.generic):
        return array[()]
    if isinstance(leaf, (bool, int, float)):
        return array.item()
    # Copied, because jax may otherwise alias memory that it does not own and donate it later.
    filled = from_numpy(jax.numpy.array(array), leaf)
    # A sharded template gets its shards back; an uncommitted one stays free to move.
    return jax.device_put(filled, leaf.sharding) if getattr(leaf, "committed", False) else filled


def _key_implementation(leaf: Any) -> Any:
    """Return the PRNG implementation of a typed key, or of a ShapeDtypeStruct of one.

    jax tells that of an array alone, so it is asked while a function of the leaf is traced. That
    works for implementations that a program has defined, too.
    """
    import jax

    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _check_fit(source: Path, saved: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Refuse a template whose leaves differ from the saved ones, naming the first difference."""
    by_path = {record["path"]: record for record in saved}
    for record in wanted:
        name, other = record["path"], by_path.get(record["path"])
        if other is None:
            raise FaultError(
                f"The checkpoint {source} does not fit: it has no {name}, which is expected."
            )
        for field, label in (("shape", "shape"), ("dtype", "type"), ("key", "type")):
            if other[field] != record[field]:
                raise FaultError(
                    f"The checkpoint {source} does not fit: {name} has {label} {other[field]} "
                    f"there, and {record[field]} is expected."
                )
    if extra := by_path.keys() - {record["path"] for record in wanted}:
        raise FaultError(
            f"The checkpoint {source} does not fit: it holds {min(extra)}, which is not expected."
        )
    if [record["path"] for record in saved] != [record["path"] for record in wanted]:
        raise FaultError(f"The checkpoint {source} does not fit: its leaves come in another order.")


# --------------------------------------------------------------------------------- arrays on disk


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep orbax's progress messages off the user's terminal."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Yield a checkpointer of orbax that does not wait for other processes of a job to join in."""
    import jax
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with (
        _quiet(),
        contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=alone)) as found,
    ):
        yield found


def _write_arrays(directory: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by name with orbax; a state without elements writes nothing."""
    import orbax.checkpoint as ocp

    if not arrays:
        return
    with _checkpointer() as checkpointer:
        try:
            checkpointer.save(directory, args=ocp.args.PyTreeSave(arrays))
        except (ValueError, RuntimeError) as error:  # a full disk arrives as one of these
            raise FaultError(
                f"Cannot write the checkpoint {directory.parent}: {text.first_line(error)}."
            ) from error


def _read_arrays(directory: Path, leaves: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Read the arrays with orbax, as NumPy arrays by leaf number."""
    import orbax.checkpoint as ocp

    names = [
        f"{index:05d}"
        for index, record in enumerate(leaves)
        if 0 not in (record["key_shape"] or record["shape"])
    ]
    if not names:
        return {}
    restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    with _checkpointer() as checkpointer:
        try:
            return checkpointer.restore(
                directory, args=ocp.args.PyTreeRestore(restore_args=restore)
            )
        except (ValueError, RuntimeError, KeyError) as error:
            raise FaultError(
                f"Cannot read the checkpoint {directory.parent}: {text.first_line(error)}."
            ) from error


def _files(directory: Path) -> list[str]:
    """Return every file under a directory except the manifest, as sorted relative POSIX paths."""
    found = (
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()
    )
    return sorted(name for name in found if name != MANIFEST)


def _write_manifest(directory: Path, leaves: list[dict[str, Any]]) -> str:
    """Write the manifest and force the whole directory to the disk; return the manifest's hash."""
    hashes = {name: disk.sha256_of(directory / name) for name in _files(directory)}
    text = json.dumps(
        {"format": _FORMAT, "files": hashes, "leaves": leaves}, indent=1, sort_keys=True
    )
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    for path in [*directory.rglob("*"), directory]:
        disk.sync(path)
    return hashlib.sha256(text.encode()).hexdigest()


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _existing(target: Path) -> Path:
    """Return the checkpoint to read: a crash inside a replacement leaves the old one aside."""
    return _previous(target) if not target.exists() and _previous(target).exists() else target


def _swap_in(temporary: Path, target: Path) -> None:
    """Put a finished directory in its place."""
    # One rename cannot replace a directory that is not empty, so it takes two.
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    os.replace(temporary, target)
    disk.sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _verified_manifest(source: Path, sha256: str | None) -> dict[str, Any]:
    """Return the manifest once every file it lists is found intact, and no other is there."""
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
    """Return the manifest, or raise FaultError where it is not one that this version writes."""
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
