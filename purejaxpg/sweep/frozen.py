"""The given arrays of a sweep, kept once in its result directory, so that it stands alone.

Layout::

    DIR/given/arrays/           a checkpoint of the arrays
    DIR/given/structure.json    what holds them, and the hash of the checkpoint; written last
"""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from purejaxpg import FaultError, checkpoint, contract, disk, trees

FOLDER, ARRAYS, STRUCTURE = "given", "arrays", "structure.json"


def keep(root: Path, given: contract.Given) -> None:
    """Write the given arrays of a sweep to its result directory, unless they are there.

    Raises:
        FaultError: they cannot be written.
    """
    if not given.digest:
        return
    try:
        if check(root)["digest"] == given.digest:
            return
    except FaultError:  # missing or damaged: written again
        pass
    structure, leaves = trees.encode(given.arrays)
    folder = root / FOLDER
    with disk.faults("write", folder):
        folder.mkdir(exist_ok=True)
        (folder / STRUCTURE).unlink(missing_ok=True)
    content = {
        "digest": given.digest,
        "items": list(given.items.items()),
        "arrays": [[np.dtype(leaf.dtype).name, list(leaf.shape)] for leaf in leaves],
        "checkpoint": checkpoint.save(folder / ARRAYS, list(map(np.asarray, leaves))),
        "structure": structure,
    }
    disk.write_hashed(folder / STRUCTURE, content)


def check(root: Path) -> dict[str, Any]:
    """Verify the given arrays of a result directory and return the content of STRUCTURE.

    Raises:
        FaultError: they are missing or damaged.
    """
    content = disk.read_hashed(root / FOLDER / STRUCTURE)
    checkpoint.verify(root / FOLDER / ARRAYS, content["checkpoint"])
    return content


def spare_seeds(root: Path, identity: Mapping[str, Any]) -> int:
    """Return the number of seeds that a sweep has given arrays for and does not use.

    Without arrays, or if all seeds share them, every seed can be used; if they are damaged, none.
    """
    if "given" not in identity:
        return 2**32
    content = disk.read_intact(root / FOLDER / STRUCTURE)
    if content is None:
        return 0
    by_seed = any(shape[0] > 1 for _, shape in content["arrays"])
    known = {seed for seed, _ in content["items"]}
    return len(known - set(identity["seeds"])) if by_seed else 2**32


def load(root: Path, identity: Mapping[str, Any], trainer: types.ModuleType) -> contract.Given:
    """Read the given arrays of a result directory, whose sweep has this identity.

    The classes that hold the arrays are the package's, or those that the trainer knows.

    Raises:
        FaultError: they are missing or damaged, or the trainer lacks a class.
    """
    if "given" not in identity:
        return contract.NOTHING
    content = disk.read_hashed(root / FOLDER / STRUCTURE)
    if not content["digest"].startswith(identity["given"]):
        raise FaultError(f"{root / FOLDER} holds other arrays than those of the sweep.")
    import jax

    template = [
        np.broadcast_to(np.zeros((), jax.numpy.dtype(dtype)), shape)
        for dtype, shape in content["arrays"]
    ]
    arrays = checkpoint.load(root / FOLDER / ARRAYS, template, sha256=content["checkpoint"])
    given = trees.decode(content["structure"], arrays, trainer)
    return contract.Given(given, dict(content["items"]), content["digest"])
