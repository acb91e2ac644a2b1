"""Functions on the host that a compiled program calls, such as a user's reward of text."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax

from purejaxpg import InputError, layout

_failed: list[InputError] = []  # of the call that made a program fail
_runs_stored_code = True


def call(function: Callable[..., Any], result: Any, *operands: jax.Array) -> Any:
    """Call a function on the host from inside a compiled program.

    Under `jax.vmap`, it is called once for all rows: operands that are mapped have the rows as a
    first axis, and the others have a first axis of 1.

    Args:
        function: arrays -> an array; the same one for the same operands.
        result: its shape and type, as a jax.ShapeDtypeStruct.
        operands: arrays.

    Returns:
        The array.
    """

    def guarded(*arrays: Any) -> Any:
        try:
            return function(*arrays)
        except InputError as error:
            _failed.append(error)
            raise

    logging.getLogger("jax._src.callback").addFilter(_is_news)
    called = functools.partial(jax.pure_callback, guarded, result, vmap_method="expand_dims")
    return layout.on_one_device(called, result, *operands)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a record of jax's is worth a traceback; `errors` says what a user did."""
    return record.exc_info is None or not isinstance(record.exc_info[1], InputError)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Raise the InputError of a function on the host in place of jax's account of it."""
    _failed.clear()
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not _failed:
            raise
        raise _failed[0] from error


@contextlib.contextmanager
def without_stored_code() -> Iterator[None]:
    """Forbid code that comes with arrays, because somebody else may have sent them."""
    global _runs_stored_code
    before, _runs_stored_code = _runs_stored_code, False
    try:
        yield
    finally:
        _runs_stored_code = before


def runs_stored_code() -> bool:
    """Return whether code that comes with arrays may run."""
    return _runs_stored_code
