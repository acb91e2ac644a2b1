"""Find and import trainers, and list the files that a result depends on.

A result belongs to the code that made it: the trainer's file, the modules beside it that it
imports, and the classes of an environment that is neither gymnax's nor ours.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import purejaxpg.agents
import purejaxpg.rlhf
from purejaxpg import CodeError, InputError, contract, modules, tracebacks
from purejaxpg import config as configs

# Of the package's trainers, by the beginning of their names.
FOLDERS = {
    "": Path(purejaxpg.agents.__path__[0]).resolve(),
    "rlhf.": Path(purejaxpg.rlhf.__path__[0]).resolve(),
}
OURS = {"purejaxpg", "gymnax", "flax", "jax", "builtins", "typing", "abc"}
# Executed files with the hash of their content at that time: `train` loads an agent more than once,
# but a file that registers an environment may run only once.
_executed: dict[Path, tuple[str, types.ModuleType]] = {}


def names() -> list[str]:
    """Return the names of the trainers of the package: `ppo` of agents/, `rlhf.ppo` of rlhf/.

    Other modules of these packages are shared by trainers and define no `train`.
    """
    return sorted(
        f"{prefix}{path.stem}"
        for prefix, folder in FOLDERS.items()
        for path in folder.glob("[!_]*.py")
        if re.search(r"^def train\(", path.read_text("utf-8"), re.M)
    )


def is_path(name: str) -> bool:
    """Return whether a user's name for a trainer is the path of a file."""
    return name.endswith(".py") or "/" in name


def path_of(name: str, base: Path = Path()) -> Path:
    """Return the file of a built-in trainer, or of the one at path `name`, relative to `base`."""
    if is_path(name):
        return (base / name).resolve()
    configs.require_known(name, names(), "agent")
    prefix, dot, stem = name.rpartition(".")
    return FOLDERS[prefix + dot] / f"{stem}.py"


def files(name: str, base: Path = Path()) -> list[Path]:
    """Return an agent's file and, unless built in, the modules beside it that it imports."""
    path = path_of(name, base)
    return [path] if name in names() else local_files(path)


def load(name: str, base: Path = Path()) -> types.ModuleType:
    """Import an agent by name or by path; a path runs that file's code.

    Raises:
        InputError: there is no such agent, its file cannot be imported, or it breaks the contract.
    """
    path = path_of(name, base)
    if path.parent in FOLDERS.values():
        return importlib.import_module(f"purejaxpg.{path.parent.name}.{path.stem}")
    if not os.path.isfile(path):  # Path.is_file raises if the name is too long
        raise InputError(f"agent {name!r} is not a file: {path} does not exist.")
    _refuse_old_names(path, name)
    module = execute(path, name)
    contract.check_trainer(module, name)
    return module


def execute(path: Path, name: str) -> types.ModuleType:
    """Run a Python file as a module, once per content, with its folder on the import path.

    Args:
        path: the file.
        name: the name the user gave, for messages.

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
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"agent {name!r} must be a Python file whose name ends in .py.")
    _refuse_shadowed(path, name)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as `python FILE` does
    module = importlib.util.module_from_spec(spec)
    aliases = [module_name]
    if sys.modules.get(path.stem) in (None, *(loaded for _, loaded in _executed.values())):
        aliases.append(path.stem)  # for a module that imports this file, which runs only once
    sys.modules.update(dict.fromkeys(aliases, module))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        for alias in aliases:
            sys.modules.pop(alias, None)  # nobody may import the half of it that ran
        if isinstance(error, InputError):
            raise
        why = f"agent {name!r} cannot be imported: "
        lines = tracebacks.explain(error, why)
        raise CodeError(lines or f"{why}{type(error).__name__}: {error}.") from error
    _executed[path] = content, module
    return module


def local_files(path: Path, folder: Path | None = None, within: Path | None = None) -> list[Path]:
    """Return a Python file and every file beside it that it imports, directly or not, sorted.

    The source is parsed: imports inside functions count, names computed at run time do not.

    Args:
        path: the file.
        folder: where absolute imports start; None: beside the file.
        within: the folder outside of which no file counts; None: `folder`.
    """
    folder = folder or path.parent
    files: set[Path] = set()
    queue = [path]
    while queue:
        file = queue.pop()
        if file not in files:
            files.add(file)
            reached = [f for name in imported(file, folder) for f in files_of(name, folder)]
            queue += [f for f in reached if f.is_relative_to(within or folder)]
    return sorted(files)


def sources(path: Path, others: Iterable[Path] = ()) -> dict[str, Path]:
    """Return all local files that a trainer depends on, wherever they are, sorted.

    Besides `local_files` these are modules of the user's elsewhere on the import path, such as a
    project that is installed in place.

    Args:
        path: the trainer's file.
        others: more files, such as those of an environment.

    Returns:
        Files by name: the path below the folder that they are imported from.
    """
    home = path.parent
    own = [path] if home in FOLDERS.values() else local_files(path)
    queue = [(file, home) for file in own]
    queue += [(file, _folder_of(file, home)) for file in others]
    found: dict[str, Path] = {}
    while queue:
        file, folder = queue.pop(0)
        name = file.relative_to(folder).as_posix()
        if name not in found:
            found[name] = file
            queue += _located(file, folder, home) if tracebacks.is_local(file) else ()
    return dict(sorted(found.items()))


def _folder_of(file: Path, home: Path) -> Path:
    """Return the folder on the import path that a file is imported from, `home` if it may be."""
    entries = (home, *sorted((Path(entry).resolve() for entry in sys.path), key=_depth))
    return next((entry for entry in entries if file.is_relative_to(entry)), file.parent)


def _depth(folder: Path) -> int:
    return -len(folder.parts)


def _located(file: Path, folder: Path, home: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the local files that a file imports, each with the folder that it is imported from."""
    for name in imported(file, folder):
        places = dict.fromkeys((home, folder, *_elsewhere(name)))
        choices = ([(each, place) for each in files_of(name, place)] for place in places)
        yield from next(filter(None, choices), ())


def _elsewhere(name: str) -> list[Path]:
    """Return the folder on the import path from which a module of the user's is imported."""
    top = name.partition(".")[0]
    if not top or top in OURS or top in sys.stdlib_module_names:
        return []
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    packages = list(spec.submodule_search_locations or ())
    place = Path((packages or [spec.origin or ""])[0])
    return [place.resolve().parent] if place.exists() and tracebacks.is_local(place) else []


def imported(file: Path, folder: Path) -> Iterator[str]:
    """Yield the names of modules that a file imports, as seen from `folder`."""
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except (SyntaxError, ValueError):  # importing it reports the error
        return
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package_of(file, folder, node.level) + ([node.module] if node.module else [])
            names = [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]
        yield from names


def package_of(file: Path, folder: Path, level: int) -> list[str]:
    """Return the package that a relative import starts from; empty for an absolute import."""
    parts = file.relative_to(folder).parts[:-1]
    return list(parts[: len(parts) - level + 1]) if level else []


def files_of(name: str, folder: Path) -> Iterator[Path]:
    """Yield the files in `folder` that run when the module `name` is imported."""
    parts = name.split(".") if name else []
    for end in range(1, len(parts) + 1):
        module = folder.joinpath(*parts[:end])
        candidates = (module.with_suffix(".py"), module / "__init__.py")
        yield from filter(Path.is_file, candidates)


def digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of one file's content, or of the names and contents of several."""
    contents = {file: file.read_bytes() for file in files}
    if len(contents) == 1:
        return hashlib.sha256(*contents.values()).hexdigest()
    lines = [f"{file.name} {hashlib.sha256(text).hexdigest()}" for file, text in contents.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def texts(path: Path) -> tuple[tuple[str, str], ...]:
    """Return the name and the text of each of the `sources` of a file."""
    own = {name: file for name, file in sources(path).items() if tracebacks.is_local(file)}
    return tuple((name, file.read_text("utf-8")) for name, file in own.items())


def of_environment(inner: Any) -> list[Path]:
    """Return the files that define an environment, sorted; none for gymnax's own.

    Args:
        inner: a gymnax environment, possibly in wrappers.
    """
    files: set[Path] = set()
    while inner is not None:
        for cls in type(inner).__mro__:
            if cls.__module__.split(".")[0] not in OURS:
                files.update(_files_of_class(cls))
        inner = vars(inner).get("_env")
    return sorted(files)


def of_environments(environments: Iterable[Any]) -> list[Path]:
    """Return the files that a sweep's environments depend on, sorted.

    Those are the files of their classes, of the modules in their names and of those of `--import`.

    Args:
        environments: as `contract.environment` returns them.
    """
    every = list(environments)
    files = {file for env in every for file in of_environment(env.inner)}
    for module in modules.of_sweep(env.name for env in every).values():
        files.update(of_module(module))
    return sorted(files)


def sent_modules(environments: Iterable[Any]) -> tuple[modules.Sent, ...]:
    """Return the modules of `of_environments`, to be imported by another process.

    Files of an installed package are not sent: it has to be installed there too.
    """
    sent = []
    for name, module in modules.of_sweep(env.name for env in environments).items():
        files = [] if is_installed(module) else of_module(module)
        root = module_root(module)
        texts = ((file.relative_to(root).as_posix(), file.read_text("utf-8")) for file in files)
        sent.append((name, module.__name__, tuple(texts)))
    return tuple(sent)


def of_module(module: types.ModuleType) -> list[Path]:
    """Return a module's file and those of its neighbours that it imports, sorted.

    Of an installed package, only its own files count.
    """
    if getattr(module, "__file__", None) is None:
        return []
    path = Path(str(module.__file__)).resolve()
    root = module_root(module)
    top = root / module.__name__.split(".")[0]
    return local_files(path, root, top if is_installed(module) else None)


def is_installed(module: types.ModuleType) -> bool:
    """Return whether a module lies among Python's installed packages."""
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "stdlib")}
    return module_root(module) in folders


def module_root(module: types.ModuleType) -> Path:
    """Return the folder in which Python found a module, or the package that it is in."""
    path = Path(str(module.__file__)).resolve()
    return path.parents[module.__name__.count(".") + (path.name == "__init__.py")]


def _files_of_class(cls: type) -> list[Path]:
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:  # defined in an interpreter
        return []
    path = Path(file or "").resolve()
    return local_files(path) if path.is_file() else []


def _refuse_old_names(path: Path, name: str) -> None:
    """Refuse a file that uses the package's distributions by the names of an earlier version."""
    try:
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    except (SyntaxError, ValueError):  # the import reports the error
        return
    imported_from = {
        node.module
        for node in nodes
        if isinstance(node, ast.ImportFrom) and "distributions" in [a.name for a in node.names]
    }
    if imported_from != {"purejaxpg.kernels"}:  # it may be somebody else's module of that name
        return
    from purejaxpg.kernels import distributions

    for node in nodes:
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "distributions":
            try:
                getattr(distributions, node.attr)
            except AttributeError as error:
                raise InputError(f"agent {name!r} is for an earlier version: {error}.") from error


def _refuse_shadowed(path: Path, name: str) -> None:
    """Refuse a file whose imports are hidden by loaded modules of the same names."""
    for file in local_files(path):
        module = file.stem if file.stem != "__init__" else file.parent.name
        loaded = getattr(sys.modules.get(module), "__file__", None)
        beside = file.parent == path.parent or file.stem == "__init__"
        if beside and file != path and loaded and Path(loaded).resolve() != file:
            raise InputError(
                f"agent {name!r} imports the module {module!r} beside it, but {loaded} is already "
                "loaded under that name; rename the module, or use a separate process."
            )
