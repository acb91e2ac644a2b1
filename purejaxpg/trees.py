"""Pytrees as plain values and a list of arrays, to be written to a file or sent to a process.

The plain values say how dicts, lists, tuples and dataclasses hold the arrays, and the fields of a
dataclass that are no arrays, such as the architecture of a model. Nothing is pickled: a class is
found by its name, in this package or among the modules that a trainer has imported.
"""

import dataclasses
import importlib
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from purejaxpg import FaultError, InputError

PLAIN = (bool, int, float, str, type(None))
FORK = "purejaxpg_fork_"  # prefix of the modules that `trainers` makes from files


def encode(tree: Any) -> tuple[Any, list[Any]]:
    """Return a pytree as JSON-able values and its arrays.

    Args:
        tree: of dicts, lists, tuples, dataclasses, arrays, numbers, strings and None.

    Raises:
        InputError: it holds something else.
    """
    arrays: list[Any] = []
    return _encoded(tree, arrays), arrays


def decode(structure: Any, arrays: Sequence[Any], trainer: types.ModuleType) -> Any:
    """Return the pytree that `encode` took apart.

    Args:
        structure: its JSON-able values.
        arrays: its arrays.
        trainer: a module; with what it imported, it has the classes that are not the package's.

    Raises:
        FaultError: a class is not there.
    """
    if not isinstance(structure, dict):
        return structure
    ((kind, content),) = structure.items()
    if kind == "array":
        return arrays[content]
    if kind == "dict":
        return {name: decode(item, arrays, trainer) for name, item in content.items()}
    if kind in ("list", "tuple"):
        items = [decode(item, arrays, trainer) for item in content]
        return items if kind == "list" else tuple(items)
    fields = {name: decode(item, arrays, trainer) for name, item in content.items()}
    return _class_of(kind, trainer)(**fields)


def _encoded(tree: Any, arrays: list[Any]) -> Any:
    if isinstance(tree, PLAIN):
        return tree
    if hasattr(tree, "dtype") and hasattr(tree, "shape"):
        arrays.append(tree)
        return {"array": len(arrays) - 1}
    if type(tree) is dict and all(isinstance(name, str) for name in tree):
        return {"dict": {name: _encoded(tree[name], arrays) for name in sorted(tree)}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [_encoded(item, arrays) for item in tree]}
    names = [f.name for f in dataclasses.fields(tree)] if dataclasses.is_dataclass(tree) else None
    names = names or list(getattr(tree, "_fields", ()))  # of a named tuple
    if not names or isinstance(tree, type):
        raise InputError(
            f"given must hold arrays in dicts, lists, tuples and dataclasses, but holds {tree!r}."
        )
    name = f"{_module_name(sys.modules[type(tree).__module__])}:{type(tree).__qualname__}"
    return {name: {field: _encoded(getattr(tree, field), arrays) for field in names}}


def _module_name(module: Any) -> str:
    """Return a module's name, or that of its file if it was loaded from a path."""
    name = str(getattr(module, "__name__", ""))
    loaded_from_path = name == "__main__" or name.startswith(FORK)
    return Path(str(getattr(module, "__file__", name))).stem if loaded_from_path else name


def _class_of(name: str, trainer: types.ModuleType) -> Any:
    """Return a dataclass or named tuple by the name that `_encoded` wrote."""
    module_name, _, path = name.partition(":")
    if module_name.startswith("purejaxpg."):
        found: Any = importlib.import_module(module_name)
    else:
        loaded = [trainer, *sys.modules.values()]
        found = next((m for m in loaded if _module_name(m) == module_name), None)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (dataclasses.is_dataclass(found) or hasattr(found, "_fields")):
        raise FaultError(
            f"The given arrays need the class {path} of the module {module_name}, which "
            f"{trainer.__name__} does not import."
        )
    return found
