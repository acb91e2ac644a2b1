"""Check every hash of a result directory, and repair damage.

Repairing makes the next run compute damaged units again. Results are functions of the spec, so the
new files equal the lost ones.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from purejaxpg import FaultError, InputError, checkpoint, disk
from purejaxpg.sweep import frozen, kept, snapshots, store
from purejaxpg.sweep import ledger as ledgers

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Damage, or a file that a killed process left."""

    text: str  # one sentence
    kind: str  # "ledger", "unit", "record", "text", "given", "source", "snapshot" or "leftover"
    unit: str = ""
    path: Path | None = None


def check(directory: str | os.PathLike[str]) -> list[Problem]:
    """Compare every file of a result directory with its hash; nothing is changed.

    Problems of kind "leftover" are harmless files that a killed process left.

    Raises:
        InputError: there is no result directory at this path.
    """
    root = Path(os.path.abspath(directory))
    if not any((root / name).exists() for name in (ledgers.LEDGER, "identity.json")):
        raise InputError(f"{root} is not a result directory: it holds no {ledgers.LEDGER}.")
    problems = _texts(root)
    try:
        with store.Store.read(root) as opened:
            problems += [Problem(text, "unit", unit) for unit, text in opened.damaged().items()]
            units = {unit["name"]: unit for unit in opened.ledger.units()}
            records = [opened.ledger.record_path(name) for name in units if units[name]["done"]]
            problems += _given(root, "given" in opened.ledger.identity)
            problems += _source(root)
    except (FaultError, InputError) as error:
        return [*problems, Problem(str(error), "ledger"), *_snapshots(root)]
    problems += [
        Problem(f"{path} is missing or damaged.", "record", path.stem)
        for path in records
        if disk.read_intact(path) is None
    ]
    return [*problems, *_snapshots(root), *_leftovers(root, units)]


def run(directory: str | os.PathLike[str], repair: bool, say: Say) -> int:
    """Check a result directory, repair it if asked, and print the problems.

    Repairing makes the next run compute damaged units again. The exit status is 0 if everything is
    intact or repaired, 1 if damage is left.

    Raises:
        InputError: there is no result directory at this path.
        FaultError: the ledger and the files it is rebuilt from are both damaged, or the directory
            cannot be written.
    """
    root, problems = Path(os.path.abspath(directory)), check(directory)
    for problem in problems:
        say(problem.text if problem.kind != "leftover" else f"Left over: {problem.text}")
    damage = [problem for problem in problems if problem.kind != "leftover"]
    if not repair:
        hint = "; with --repair the next run computes it again" if damage else ""
        say(f"{len(damage)} damaged, {len(problems) - len(damage)} left over{hint}.")
        return 1 if damage else 0
    mend(root, problems, say)
    left = [problem for problem in check(root) if problem.kind != "leftover"]
    for problem in left:
        say(f"Not repaired: {problem.text}")
    repaired = "Repaired; the same sweep command computes the missing units."
    say(repaired if problems else "All is intact.")
    return 1 if left else 0


def mend(root: Path, problems: list[Problem], say: Say) -> None:
    """Repair the problems that `check` returned."""
    if any(problem.kind == "ledger" for problem in problems):
        say(f"The ledger is rebuilt with {len(store.rebuild(root))} units from their records.")
        problems = check(root)
    with store.Store.read(root) as reader:
        identity = reader.ledger.identity
    # With the directory's lock, because a running sweep may be writing a file that looks left over.
    with store.Store.open(root, identity) as opened:
        for problem in problems:
            if problem.path is not None:
                _remove(problem.path)
        opened.ledger.reset(p.unit for p in problems if p.kind == "unit")
        for problem in problems:
            if problem.kind == "record" and problem.unit not in opened.ledger.pending():
                opened.ledger.write_record(problem.unit)
        if any(problem.kind == "text" for problem in problems):
            opened.write_texts()


def _texts(root: Path) -> list[Problem]:
    """Check the files that identify the sweep."""
    try:
        about = disk.read_hashed(root / "identity.json")
        same = (root / "spec.toml").read_text(encoding="utf-8") == about["spec"]
    except FaultError as error:
        return [Problem(str(error), "text")]
    except (OSError, UnicodeDecodeError):
        same = False
    return [] if same else [Problem(f"{root / 'spec.toml'} is missing or was changed.", "text")]


def _given(root: Path, wanted: bool) -> list[Problem]:
    """Check the given arrays; they come from elsewhere, so only the sweep can write them again."""
    if not wanted and not (root / frozen.FOLDER).exists():
        return []
    try:
        frozen.check(root)
    except FaultError as error:
        text = f"{str(error).rstrip('.')}; the same sweep command writes the given arrays again."
        return [Problem(text, "given")]
    return []


def _source(root: Path) -> list[Problem]:
    """Check the copies of the code; only the sweep can write them again."""
    if not (root / kept.FOLDER).exists():  # an earlier version kept none
        return []
    try:
        kept.check(root)
    except FaultError as error:
        text = f"{str(error).rstrip('.')}; the same sweep command copies the code again."
        return [Problem(text, "source")]
    return []


def _snapshots(root: Path) -> list[Problem]:
    """Check the snapshots; without a damaged one a unit restarts from an older state."""
    folder, problems = root / "progress", []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = snapshots.NAME.fullmatch(path.name)
        if match is None:
            problems.append(Problem(f"{path} was not finished.", "leftover", path=path))
            continue
        try:
            checkpoint.verify(path, match["sha256"])
        except FaultError as error:
            problems.append(Problem(str(error), "snapshot", path=path))
    return problems


def _leftovers(root: Path, units: dict[str, dict[str, Any]]) -> list[Problem]:
    """Return files that belong to no committed unit."""
    leftovers = []
    folders = (
        ("arrays", ".npz", "done"), ("checkpoints", "", "has_state"), ("records", ".json", "done"),
    )  # fmt: skip
    for folder, suffix, flag in folders:
        known = {f"{unit}{suffix}" for unit, about in units.items() if about[flag]}
        for path in sorted((root / folder).iterdir()) if (root / folder).is_dir() else []:
            # A checkpoint that was renamed during its replacement may be the only copy.
            aside = re.fullmatch(r"\.(.+)\.previous", path.name)
            name = aside[1] if aside and not (root / folder / aside[1]).exists() else path.name
            if name not in known:
                text = f"{path} belongs to no finished unit."
                leftovers.append(Problem(text, "leftover", path=path))
    return leftovers


def _remove(path: Path) -> None:
    with disk.faults("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
