"""Every file of a result directory is protected against a flipped bit, or listed as unprotected.

Files come from real training: a search with its snapshots, its log and its report.
"""

import fnmatch
import io
import json
import pathlib
import random

import numpy as np
import pytest
import tiny_sweep
from rich.console import Console

from purejaxpg import contract
from purejaxpg.report import export, writer
from purejaxpg.sweep import frozen, fsck
from purejaxpg.sweep import progress as progresses
from purejaxpg.sweep import spec as specs
from purejaxpg.sweep import store as stores

PROTECTED = {  # pattern of files: what fsck calls the damage
    "ledger.sqlite": "ledger",
    "arrays/*.npz": "unit",
    "checkpoints/*/MANIFEST.json": "unit",
    "checkpoints/*/arrays/*": "unit",
    "records/*.json": "record",
    "identity.json": "text",
    "spec.toml": "text",
    "given/structure.json": "given",
    "given/arrays/MANIFEST.json": "given",
    "given/arrays/arrays/*": "given",
    "progress/*/MANIFEST.json": "snapshot",
    "progress/*/arrays/*": "snapshot",
}
UNPROTECTED = {  # pattern of files: why it needs no protection
    "lock": "it is empty",
    "ledger.sqlite-shm": "an index that SQLite rebuilds",
    "ledger.sqlite-wal": "SQLite's own checksums cut it at the damage (test_faults.py)",
    "progress.jsonl": "a log; nothing reads it back",
    "report/*": "made of the results; `purejaxpg report` writes it again",
    "tensorboard/*": "made of the results; `purejaxpg sweep --log` writes what is missing",
    "wandb/*": "the same",
    "export.csv": "made of the results; `purejaxpg export` writes it again",
}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Return all that a sweep can leave: interrupted in its second rung, reported and exported."""
    out = tmp_path_factory.mktemp("left") / "out"
    spec = specs.from_dict(tiny_sweep.HALVED, "tiny")
    stores.Store.open(out, dict(spec.identity), "# The text of the sweep file.\n").close()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progresses, "LOG_EVERY_S", 0.0)
        tiny_sweep.run(spec, out, stop_after=5, snapshot_every_s=0.0)
    arrays = {"own": np.ones((2, 3), np.float32)}
    frozen.keep(out, contract.Given(arrays, {0: 0, 1: 1}, digest="0" * 64))
    writer.write(out, Console(file=io.StringIO()))
    export.write(out, None, False)
    assert fsck.check(out) == []
    return out


def files_of(out: pathlib.Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def kinds_of(name: str) -> list[str]:
    return [kind for kind in {**PROTECTED, **UNPROTECTED} if fnmatch.fnmatchcase(name, kind)]


def test_every_file_is_of_a_known_kind_and_every_kind_is_there(left: pathlib.Path) -> None:
    kinds = {name: kinds_of(name) for name in files_of(left)}
    assert {name: found for name, found in kinds.items() if len(found) != 1} == {}
    seen = {kind for found in kinds.values() for kind in found}
    optional = {"ledger.sqlite-shm", "ledger.sqlite-wal"}  # gone where the last to close could
    optional |= {"tensorboard/*", "wandb/*"}  # only where they are asked for: test_sinks.py
    assert seen | optional == PROTECTED.keys() | UNPROTECTED.keys()
    assert kinds_of("weights.bin") == kinds_of("arrays/unit.json") == []


@pytest.mark.parametrize("kind", sorted(PROTECTED.keys() - {"ledger.sqlite"}))
def test_a_flipped_bit_is_found(left: pathlib.Path, kind: str) -> None:
    """Anywhere in the file, in each of a few; those of the ledger are in test_faults.py."""
    chance = random.Random(kind)
    names = [name for name in files_of(left) if kinds_of(name) == [kind]]
    for name in chance.sample(names, min(12, len(names))):
        path = left / name
        original = path.read_bytes()
        for _ in range(max(1, 12 // len(names))):
            path.write_bytes(flipped(original, chance.randrange(8 * len(original))))
            found = [problem.kind for problem in fsck.check(left)]
            assert PROTECTED[kind] in found or same_json(path.read_bytes(), original), name
        path.write_bytes(original)
    assert fsck.check(left) == []


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def same_json(data: bytes, original: bytes) -> bool:
    """1e-3 and 1E-3 are one bit apart."""
    try:
        return json.loads(data) == json.loads(original)
    except ValueError:
        return False
