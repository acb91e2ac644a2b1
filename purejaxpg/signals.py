"""Ctrl-C and SIGTERM as exceptions that can be deferred to a moment when little is lost.

Batch systems send SIGTERM some seconds before they kill. Python runs a handler only between two
steps of the main thread, so a compiled segment always finishes first; `deferred` then lets the
engine write a snapshot before it stops. Compilation takes longer and loses nothing, so it runs
`in_background` and does not delay a signal.
"""

import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
RESEND_SECONDS = 0.05  # until a swallowed signal is sent again
BACKGROUND = "purejaxpg-background"  # name of the threads of `in_background`


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived."""


class _State:
    """Whether signals are deferred, and the first that arrived; one state for the process."""

    deferring = False
    arrived: KeyboardInterrupt | None = None


_state = _State()


@contextlib.contextmanager
def handlers_restored() -> Iterator[None]:
    """Restore the current signal handlers after the block."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS if _may_handle()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Raise Terminated at SIGTERM and KeyboardInterrupt at Ctrl-C inside the block.

    A signal that the parent process ignored stays ignored. Nothing changes outside the main thread,
    because Python sets handlers only there.

    Python drops an exception that leaves a destructor or a callback of the garbage collector (jax
    has one). A signal whose exception was dropped is sent again.
    """
    with handlers_restored():
        for number in SIGNALS if _may_handle() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _handle)
        with _dropped_signals_resent():
            yield


@contextlib.contextmanager
def _dropped_signals_resent() -> Iterator[None]:
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
def deferred() -> Iterator[Callable[[], bool]]:
    """Defer the first signal to the end of the block; a second one raises at once.

    Yields:
        `pending`, which returns whether a signal has arrived.
    """
    _state.deferring = True
    try:
        yield pending
    finally:
        _state.deferring = False  # first: from here on a signal raises and cannot be lost
        arrived, _state.arrived = _state.arrived, None
        if arrived is not None:
            raise arrived


def pending() -> bool:
    """Return whether a signal is waiting for the end of a `deferred` block."""
    return _state.arrived is not None


@contextlib.contextmanager
def recorded() -> Iterator[Callable[[], int]]:
    """Only record signals inside the block.

    Yields:
        A function that returns the last signal that arrived, or 0.
    """
    arrived = [0]
    with handlers_restored():
        for number in SIGNALS if _may_handle() else ():
            signal.signal(number, lambda number, _: arrived.append(number))
        yield lambda: arrived[-1]


def deliver(number: int) -> None:
    """Act as if a signal had arrived, unless one is pending already: it may be the same."""
    if _state.arrived is None:
        _handle(number, None)


def in_background(call: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Start a call in another thread, so that a signal does not wait for it.

    Python cannot interrupt code outside of it, such as XLA's compiler. A main thread that waits for
    the result of the call can be interrupted.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=BACKGROUND).start()
    return future


def end_at_once(status: int) -> None:
    """End the process if a call of `in_background` is running: Python would wait for it."""
    if any(thread.name == BACKGROUND for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _may_handle() -> bool:
    return threading.current_thread() is threading.main_thread()


def _resend(error: KeyboardInterrupt) -> None:
    """Send the signal of a dropped exception again, a moment later.

    A thread sends it, because an exception raised inside the hook would be dropped as well.
    """
    number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
    main = threading.main_thread().ident
    timer = threading.Timer(RESEND_SECONDS, signal.pthread_kill, (main, number))
    timer.daemon = True
    timer.start()


def _handle(number: int, _: types.FrameType | None) -> None:
    error = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
    if _state.deferring and _state.arrived is None:
        _state.arrived = error
        return
    raise error
