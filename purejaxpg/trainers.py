"""Finding and importing trainers, and the files that a trained program comes from.

A result belongs to the code that made it. So the modules beside a trainer's file that it imports
count like the file itself, and so do the classes of an environment that is neither gymnax's nor
ours.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import purejaxpg.agents
from purejaxpg import InputError, contract
from purejaxpg import config as configs

OURS = {"purejaxpg", "gymnax", "flax", "jax", "builtins", "typing", "abc"}
# Executed files with the hash of their content then: `train` loads an agent more than once, and a
# file that registers an environment may run only once.
_executed: dict[Path, tuple[str, types.ModuleType]] = {}


def names() -> list[str]:
    """Return the names of the agents that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(purejaxpg.agents.__path__))


def path_of(name: str, base: Path = Path()) -> Path:
    """Return the file of a built-in agent, or of the agent at path `name`, relative to `base`."""
    if name.endswith(".py") or "/" in name:
        return (base / name).resolve()
    configs.require_known(name, names(), "agent")
    return Path(purejaxpg.agents.__path__[0]) / f"{name}.py"


def files(name: str, base: Path = Path()) -> list[Path]:
    """Return an agent's file and, unless it is built in, the modules beside it that it imports."""
    path = path_of(name, base)
    return [path] if name in names() else local_files(path)


def load(name: str, base: Path = Path()) -> types.ModuleType:
    """Import an agent by name, or by path, which runs that file's code.

    Raises:
        InputError: there is no such agent, its file does not import, or it lacks a part of the
            contract.
    """
    path = path_of(name, base)
    if path.parent == Path(purejaxpg.agents.__path__[0]).resolve():
        return importlib.import_module(f"purejaxpg.agents.{path.stem}")
    if not os.path.isfile(path):  # False, where Path.is_file would raise for a name too long
        raise InputError(f"agent {name!r} is not a file; it was looked for at {path}.")
    module = execute(path, name)
    contract.check_trainer(module, name)
    return module


def execute(path: Path, name: str) -> types.ModuleType:
    """Run a Python file as a module, once per content, with its folder on the import path.

    Args:
        path: the file.
        name: how the user called it, for messages.

    Returns:
        The module; `__main__` if Python itself was started with this file.

    Raises:
        InputError: the file cannot be imported, or would import another module of the same name.
    """
    main = sys.modules.get("__main__")
    if main is not None and Path(getattr(main, "__file__", None) or ".").resolve() == path:
        return main
    content = digest([path])
    if path in _executed and _executed[path][0] == content:
        return _executed[path][1]
    module_name = f"purejaxpg_fork_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(module_name, path)
    if found is None or found.loader is None:
        raise InputError(f"agent {name!r} must be a Python file whose name ends in .py.")
    _refuse_shadowed(path, name)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python FILE` has it
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    try:
        found.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"agent {name!r} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    _executed[path] = content, module
    return module


def local_files(path: Path) -> list[Path]:
    """Return a Python file and every file beside it that it imports, directly or not, sorted.

    Read off the text: an import inside a function counts, a name made up at run time does not.
    """
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += imported(file, path.parent)
    return sorted(found)


def imported(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the files in `folder` that a file imports by name."""
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError):  # the import will say what is wrong
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package_of(file, folder, node.level) + ([node.module] if node.module else [])
            names = [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]
        for name in names:
            yield from files_of(name, folder)


def package_of(file: Path, folder: Path, level: int) -> list[str]:
    """Return the package that a relative import of a file begins at; none for an absolute one."""
    parts = file.relative_to(folder).parts[:-1]
    return list(parts[: len(parts) - level + 1]) if level else []


def files_of(name: str, folder: Path) -> Iterator[Path]:
    """Yield the files in `folder` that run when the module `name` is imported."""
    parts = name.split(".") if name else []
    for end in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:end])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                yield file


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of files: of the content of one, of names and contents of several."""
    contents = {file: file.read_bytes() for file in files}
    if len(contents) == 1:
        return hashlib.sha256(*contents.values()).hexdigest()
    each = [f"{file.name} {hashlib.sha256(text).hexdigest()}" for file, text in contents.items()]
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def texts(path: Path) -> tuple[tuple[str, str], ...]:
    """Return the names, as seen from its folder, and the texts of a file's local files."""
    folder = path.parent
    return tuple(
        (file.relative_to(folder).as_posix(), file.read_text("utf-8")) for file in local_files(path)
    )


def of_environment(inner: Any) -> list[Path]:
    """Return the files that define an environment, sorted; none for one of gymnax.

    Args:
        inner: a gymnax environment, possibly in wrappers.
    """
    found: set[Path] = set()
    while inner is not None:
        for cls in type(inner).__mro__:
            if cls.__module__.split(".")[0] not in OURS:
                found.update(_files_of_class(cls))
        inner = vars(inner).get("_env")
    return sorted(found)


def _files_of_class(cls: type) -> list[Path]:
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:  # typed into an interpreter
        return []
    path = Path(file or "").resolve()
    return local_files(path) if path.is_file() else []


def _refuse_shadowed(path: Path, name: str) -> None:
    """Refuse to import a module beside `path` where another of its name is loaded already."""
    for file in local_files(path):
        module = file.stem if file.stem != "__init__" else file.parent.name
        loaded = getattr(sys.modules.get(module), "__file__", None)
        beside = file.parent == path.parent or file.stem == "__init__"
        if beside and file != path and loaded and Path(loaded).resolve() != file:
            raise InputError(
                f"agent {name!r} imports {module!r} from beside it, but {loaded} of that name is "
                "loaded already; rename the module, or use a process of its own."
            )
