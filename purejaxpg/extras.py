"""Packages that only some commands need, imported where they are used."""

import importlib
from typing import Any

from purejaxpg import InputError


def load(module: str, extra: str, what: str) -> Any:
    """Import a module that an extra of this package installs.

    Args:
        module: the module's name.
        extra: the extra's name.
        what: the feature that needs it, in the user's words.

    Returns:
        The module.

    Raises:
        InputError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        command = f"pip install 'purejaxpg[{extra}]'"
        raise InputError(f"{what} needs the extra `{extra}`: {command}.") from error
