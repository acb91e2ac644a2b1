"""Packages that only some commands need, imported where they are used."""

import importlib
import importlib.metadata
import re
from typing import Any

from purejaxpg import FaultError


def load(module: str, extra: str, what: str) -> Any:
    """Import a module that an extra of this package installs.

    Args:
        module: the module's name.
        extra: the extra's name.
        what: the feature that needs it, in the user's words.

    Returns:
        The module.

    Raises:
        FaultError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        packages = " ".join(f"'{each}'" for each in requirements(extra))
        raise FaultError(f"{what} needs more packages: pip install {packages}.") from error


def requirements(extra: str) -> list[str]:
    """Return what an extra of this package installs, such as "ray<3,>=2.50"."""
    marked = (r.split(";") for r in importlib.metadata.requires("purejaxpg") or [] if ";" in r)
    names = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    return [package.strip() for package, marker in marked if names.search(marker)]
