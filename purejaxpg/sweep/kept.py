"""The code of a sweep, kept in its result directory, so that it can be read and run again.

Layout::

    DIR/source/NAME          the trainer's file and each local file that is imported, by its name on
                             the import path
    DIR/source/files.json    the hash of each of them, and those that belong to the sweep

A sweep is continued only by the program that began it. If comments, docstrings or formatting
changed, its user may accept that: the copies are then those of now, while the sweep keeps the
hashes, and so the run ids, with which it began.
"""

import ast
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purejaxpg import FaultError, InputError, disk, modules, tracebacks, trainers
from purejaxpg.sweep import ledger as ledgers
from purejaxpg.sweep import spec as specs

FOLDER, FILES = "source", "files.json"
STORED = "stored"  # what a user calls the copies instead of naming a file


def settle(root: Path, spec: specs.Spec, accept: bool) -> specs.Spec:
    """Return a sweep as the result directory knows it, if its program is the same.

    Args:
        root: the directory, which need not exist.
        spec: the sweep with the code of now.
        accept: go on if the code changed in comments, docstrings or formatting.

    Raises:
        InputError: the code changed in more than that, or that was not accepted.
        FaultError: a copy that has to be compared is damaged.
    """
    about = disk.read_intact(root / FOLDER / FILES)
    if about is None or about["agent"] != spec.agent_name or not ledgers.begun(root):
        return spec
    changed = changes(root, about, spec.files)
    changed |= {
        f"{name} is no longer used": True for name in about["files"] if name not in spec.files
    }
    programs = [what for what, program in changed.items() if program]
    where = f"since {root} was begun; its files are kept in {root / FOLDER}"
    if programs and accept:
        raise InputError(
            "--accept-source is for changed comments, docstrings and formatting, but the program "
            f"changed ({', '.join(programs)}) {where}: choose a new directory with --out."
        )
    if programs:
        raise InputError(
            f"The program changed ({', '.join(programs)}) {where}: choose a new directory with "
            "--out, or undo the change."
        )
    if changed and not accept:
        raise InputError(
            f"Comments, docstrings or formatting changed ({', '.join(changed)}) {where}: add "
            "--accept-source to continue this sweep, or choose a new directory with --out."
        )
    begun = about["source"], about["env_source"]
    now = spec.source, spec.identity.get("env_source", "")
    return spec if now == begun else specs.as_begun(spec, *begun)


def changes(root: Path, about: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, bool]:
    """Compare files with those of a result directory.

    Args:
        root: the directory.
        about: the content of FILES.
        files: of now, by name; others of the directory are not looked at.

    Returns:
        For each difference, in words that name the file, whether the program changed.

    Raises:
        FaultError: a copy is damaged.
    """
    found = {}
    for name, path in files.items():
        if name not in about["files"]:
            found[f"{name} is new"] = True
        elif disk.sha256_of(path) != about["files"][name]:
            same = name in about["copied"] and program(path) == program(copy(root, name))
            found[name] = not same
    return found


def changes_of_trainer(root: Path, path: Path) -> dict[str, bool] | None:
    """Compare a trainer's file, whatever its name is, and what it imports with the copies.

    It returns what `changes` returns; None if the directory has no copies.
    """
    if not (root / FOLDER / FILES).exists():
        return None
    about, files = disk.read_hashed(root / FOLDER / FILES), trainers.sources(path)
    files[about["file"]] = files.pop(path.name)
    return changes(root, about, files)


def program(path: Path) -> str:
    """Return the syntax tree of a Python file without comments and docstrings, as text."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # it is no program; only equal bytes are equal
        return hashlib.sha256(path.read_bytes()).hexdigest()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


def copy(root: Path, name: str) -> Path:
    """Return the copy of a file in a result directory.

    Raises:
        FaultError: it is missing or damaged.
    """
    about, path = disk.read_hashed(root / FOLDER / FILES), root / FOLDER / name
    with disk.faults("read", path):
        if disk.sha256_of(path) == about["files"][name]:
            return path
    raise FaultError(f"{path} is damaged: its SHA-256 is not the one in {FILES}.")


def check(root: Path) -> None:
    """Raise a FaultError unless all copies of a result directory are intact."""
    for name in disk.read_hashed(root / FOLDER / FILES)["copied"]:
        copy(root, name)


def trainer_file(root: Path) -> Path:
    """Return the copy of the trainer's file, after checking all copies.

    Raises:
        InputError: the directory has no copies, because an earlier version of the package made it.
        FaultError: a copy is missing or damaged.
    """
    if not (root / FOLDER / FILES).exists():
        raise InputError(
            f"{root} holds no copy of its agent, because it is of an earlier version of "
            "purejaxpg: name the agent's file, --agent FILE.py."
        )
    check(root)
    return copy(root, disk.read_hashed(root / FOLDER / FILES)["file"])


def import_modules(root: Path) -> None:
    """Import the copies of the modules that the user named for the sweep's environments."""
    named = disk.read_hashed(root / FOLDER / FILES)["modules"]
    modules.receive(((name, module, ()) for name, module in named.items()), root / FOLDER)


def _copied(spec: specs.Spec) -> list[str]:
    """Return the names of the files to copy: the trainer's, and those that are not installed."""
    own = Path(str(spec.agent.__file__)).name
    return [n for n, path in spec.files.items() if n == own or tracebacks.is_local(path)]


def keep(root: Path, spec: specs.Spec) -> None:
    """Copy the code of a sweep, as `settle` returned it, into its result directory.

    Installed files, such as those of a package of environments, are hashed but not copied.

    Raises:
        FaultError: the copies cannot be written.
    """
    if not spec.files:
        return
    file = Path(str(spec.agent.__file__)).name
    contents = {name: path.read_bytes() for name, path in spec.files.items()}
    copied = _copied(spec)
    named = modules.of_sweep(environment.name for environment in spec.environments())
    about = {
        "agent": spec.agent_name,
        "file": file,
        "source": spec.source,
        "env_source": spec.identity.get("env_source", ""),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        "copied": copied,
        "modules": {name: module.__name__ for name, module in named.items()},
    }
    folder = root / FOLDER
    if disk.read_intact(folder / FILES) != about:
        # First, so that after a crash the next run finds its own files and copies them again.
        disk.write_hashed(folder / FILES, about)
    with disk.faults("write", folder):
        for stale in {*folder.rglob("*.py")} - {folder / name for name in copied}:
            stale.unlink()
    for name in copied:
        path = folder / name
        with disk.faults("write", path):
            if not path.is_file() or path.read_bytes() != contents[name]:
                path.parent.mkdir(parents=True, exist_ok=True)
                with disk.replacing(path) as temporary:
                    temporary.write_bytes(contents[name])
