"""Vectorised policy-gradient methods: single-file agents, and sweeps of whole training runs.

Importing this package does not import jax, so that the command line answers at once.
"""

__version__ = "0.1.0"


class InputError(ValueError):
    """What was asked for cannot be done: one plain sentence, exit status 2."""


class CodeError(InputError):
    """A user's file has an error: its lines, then the error, exit status 2."""


class FaultError(RuntimeError):
    """The surroundings failed (disk, permissions, a damaged file): one plain sentence, status 1."""
