"""Ctrl-C and SIGTERM as exceptions that can be made to wait for a moment when little is lost.

SIGTERM is what batch systems send some seconds before they kill. Python runs a handler only between
two steps of the main thread, so a compiled segment always ends first; `held` then lets the engine
write a snapshot before it gives up.
"""

import contextlib
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESEND_SECONDS = 0.05  # until a swallowed signal is sent again


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived."""


class _Waiting:
    """What a signal that arrives is to do; signals belong to the process, so there is one."""

    held = False
    arrived: KeyboardInterrupt | None = None


_waiting = _Waiting()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put back, after the block, the handlers that stood before it."""
    if not _may_handle():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Raise Terminated at SIGTERM and KeyboardInterrupt at Ctrl-C inside the block.

    A signal that the parent process had ignored stays ignored. Outside the main thread, where
    Python lets nobody set handlers, nothing is changed.

    Python ignores an exception that leaves a destructor or a callback of the garbage collector (jax
    has one). A signal whose exception is lost in this way is sent again.
    """
    with kept():
        for number in SIGNALS if _may_handle() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _handle)
        with _ignored_signals_sent_again():
            yield


@contextlib.contextmanager
def _ignored_signals_sent_again() -> Iterator[None]:
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _resend(unraisable.exc_value)
        else:
            report(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report


@contextlib.contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Let the first signal wait until the end of the block; a second one does not wait.

    Yields:
        A function that tells whether a signal is waiting.
    """
    _waiting.held = True
    try:
        yield waiting
    finally:
        _waiting.held = False  # first: from here on a signal raises by itself and is not lost
        arrived, _waiting.arrived = _waiting.arrived, None
        if arrived is not None:
            raise arrived


def waiting() -> bool:
    """Tell whether a signal waits for the end of a `held` block."""
    return _waiting.arrived is not None


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], int]]:
    """Let signals do nothing inside the block.

    Yields:
        A function that tells the last one that arrived; 0 where none did.
    """
    arrived = [0]
    with kept():
        for number in SIGNALS if _may_handle() else ():
            signal.signal(number, lambda number, _: arrived.append(number))
        yield lambda: arrived[-1]


def heed(number: int) -> None:
    """Act as if a signal had arrived, unless one has and is waiting: it may be the same."""
    if _waiting.arrived is None:
        _handle(number, None)


def _may_handle() -> bool:
    return threading.current_thread() is threading.main_thread()


def _resend(error: KeyboardInterrupt) -> None:
    """Send the signal of an ignored exception again, a moment later.

    From a thread, because an exception that is raised inside the hook would be ignored as well.
    """
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    main = threading.main_thread().ident
    timer = threading.Timer(RESEND_SECONDS, signal.pthread_kill, (main, number))
    timer.daemon = True
    timer.start()


def _handle(number: int, _: types.FrameType | None) -> None:
    error = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
    if _waiting.held and _waiting.arrived is None:
        _waiting.arrived = error
        return
    raise error
