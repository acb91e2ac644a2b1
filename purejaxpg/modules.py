"""Modules that users name: in `--import NAME`, and in `env = "NAME:CLASS"`.

A name is that of a module (`mine`, `lab.mazes`) or the path of a file (`./mine.py`). The folder of
the sweep file comes first, then the current folder, then Python's path. A file named by its path
becomes a module of Python's too, so that its classes are found and it runs only once.
"""

import importlib
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from purejaxpg import InputError
from purejaxpg import config as configs

# A module on its way to another process: the user's name for it, Python's, and its files' texts.
Sent = tuple[str, str, tuple[tuple[str, str], ...]]

_folders: list[Path] = []  # of sweep files, the latest first
_named: dict[str, types.ModuleType] = {}  # by the names that users gave
_imported: list[str] = []  # those of `--import`, which count for every sweep


def search(folder: Path) -> None:
    """Look for modules in `folder` before anywhere else.

    Raises:
        InputError: a module that is already loaded is another one in this folder.
    """
    own = folder.resolve()
    _folders[:] = [own, *(other for other in _folders if other != own)]
    for name in _named:
        _refuse_other(name, *_find(name))


def import_all(names: Iterable[str], folder: Path = Path()) -> None:
    """Import the modules of `--import`, which may register environments.

    Args:
        names: as the user gave them.
        folder: that of the sweep file.

    Raises:
        InputError: there is no such module, or it cannot be imported.
    """
    search(folder)
    for name in names:
        load(name)
        if name not in _imported:
            _imported.append(name)


def load(name: str) -> types.ModuleType:
    """Import the module that a user calls `name`.

    Raises:
        InputError: there is no such module, or it cannot be imported.
    """
    if name in _named:
        return _named[name]
    module_name, file = _find(name)
    _refuse_other(name, module_name, file)
    if file is not None and str(_root(module_name, file)) not in sys.path:
        sys.path.insert(0, str(_root(module_name, file)))
    importlib.invalidate_caches()  # the file may be newer than Python's list of its folder
    try:
        _named[name] = importlib.import_module(module_name)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"Module {name!r} cannot be imported: {error}.") from error
        raise InputError(
            f"There is no module {name!r} beside the sweep file, in the current folder or on "
            "Python's path."
        ) from error
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"Module {name!r} cannot be imported: {problem}.") from error
    return _named[name]


def attribute(name: str) -> Any:
    """Return what a user calls "MODULE:NAME".

    Raises:
        InputError: there is no such module, or nothing of this name in it.
    """
    module_name, _, member = name.rpartition(":")
    module = load(module_name)
    public = [each for each in vars(module) if not each.startswith("_")]
    configs.require_known(member, public, f"member of module {module_name!r} named")
    return getattr(module, member)


def is_attribute(name: str) -> bool:
    """Return whether a name has the form "MODULE:NAME"."""
    module_name, _, member = name.rpartition(":")
    return bool(module_name and member)


def require_named(name: str) -> None:
    """Refuse "MODULE:NAME" out of a result directory unless the user has named the module too.

    Importing a module executes it, which a result directory alone must not cause.
    """
    module_name = name.rpartition(":")[0]
    if module_name not in _named and _find(module_name, strict=False)[0] not in {
        module.__name__ for module in _named.values()
    }:
        raise InputError(
            f"The environment {name!r} is of a module that is executed only if you name it: "
            f"--import {module_name}."
        )


def named() -> list[types.ModuleType]:
    """Return all modules that the user has named in this process."""
    return list(dict.fromkeys(_named.values()))


def of_sweep(environments: Iterable[str]) -> dict[str, types.ModuleType]:
    """Return the modules of `--import` and of environments "MODULE:NAME", by the user's names."""
    names = [name.rpartition(":")[0] for name in environments if is_attribute(name)]
    return {name: _named[name] for name in [*_imported, *names] if name in _named}


def receive(sent: Iterable[Sent], folder: Path) -> None:
    """Import modules that another process has sent.

    Args:
        sent: modules; without files, they must be installed here.
        folder: where their files are written. It has to stay as long as the process.
    """
    for name, module_name, files in sent:
        for path, text in files:
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        _named[name] = importlib.import_module(module_name)


def _find(name: str, strict: bool = True) -> tuple[str, Path | None]:
    """Return the name under which Python has a module, and its file, or that of its package.

    The file is None for a module that is only on Python's path.
    """
    places = [*_folders, Path.cwd()]
    if is_path(name):
        files = [file for folder in places if (file := (folder / name).resolve()).is_file()]
        if strict and not (files and name.endswith(".py")):
            raise InputError(f"Module {name!r} is not a Python file: {places[0] / name}.")
        return Path(name).stem, next(iter(files), None)
    parts = name.split(".")
    for folder in places:
        top, whole = folder / parts[0], folder.joinpath(*parts)
        for file in (top.with_suffix(".py"), top / "__init__.py", whole.with_suffix(".py")):
            if file.is_file():
                return name, file
    return name, None


def is_path(name: str) -> bool:
    """Return whether a user's name for a module is the path of a file."""
    return name.endswith(".py") or "/" in name


def _root(name: str, file: Path) -> Path:
    """Return the folder in which Python has to look for a module of this name."""
    top = name.split(".")[0]
    inside = [folder.parent for folder in file.parents if folder.name == top]
    return inside[0] if "." in name or file.name == "__init__.py" else file.parent


def _refuse_other(name: str, module_name: str, file: Path | None) -> None:
    """Refuse a module that is another than the one that is loaded under its name."""
    loaded = sys.modules.get(module_name.split(".")[0])
    of_loaded = getattr(loaded, "__file__", None)
    if file is not None and of_loaded is not None and Path(of_loaded).resolve() != file.resolve():
        raise InputError(
            f"Module {name!r} is {file}, but {of_loaded} is already loaded under that name; rename "
            "the module, or use a separate process."
        )
