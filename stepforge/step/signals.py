"""Signal handlers wait while a step changes tensors.

Python runs a signal's handler between two instructions of the main thread, and Ctrl-C's handler
raises there. Between the kernel and the line that counts the step, that would leave the weights one
step ahead of their count.
"""

from __future__ import annotations

# The C functions below `signal`, whose conversions to enums would take most of the time.
import _signal  # type: ignore[import-not-found]
import itertools
import os
import signal
import threading
from types import TracebackType
from typing import Any

__all__ = ["Deferred"]

_NUMBERS = range(1, signal.NSIG)

_main_thread = threading.main_thread().ident


def _after_fork() -> None:
    """Take the thread that forked for the main thread, as it is in the child."""
    global _main_thread
    _main_thread = threading.main_thread().ident


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Deferred:
    """Context in which no Python signal handler runs: each one runs at the end instead.

    It covers every signal with a Python handler, and costs a few microseconds. Outside the main
    thread it does nothing, since handlers run in the main thread only.

    Example:
        >>> before = signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
        >>> with Deferred():
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print("finished")
        finished
        handled
        >>> _ = signal.signal(signal.SIGTERM, before)
    """

    __slots__ = ("_arrived", "_handlers")

    def __enter__(self) -> None:
        self._arrived: list[int] = []
        self._handlers: list[tuple[int, Any]] = []
        if threading.get_ident() != _main_thread:
            return
        self._handlers = _python_handlers(list(map(_signal.getsignal, _NUMBERS)))
        try:
            for number, _ in self._handlers:
                _signal.signal(number, self._note)
        except BaseException:  # a signal arrived just before: the block does not begin
            self._restore()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        for number in self._arrived:
            signal.raise_signal(number)

    def _note(self, number: int, _frame: Any) -> None:
        self._arrived.append(number)

    def _restore(self) -> None:
        """Restore the handler of every signal, also if the first of them raises meanwhile."""
        for position, (number, handler) in enumerate(self._handlers):
            try:
                _signal.signal(number, handler)
            except BaseException:
                for again in self._handlers[position:]:
                    _signal.signal(*again)
                raise


_seen: tuple[list[Any], list[tuple[int, Any]]] = [], []


def _python_handlers(handlers: list[Any]) -> list[tuple[int, Any]]:
    """Return the signals that have a Python handler, each with it.

    Args:
        handlers: the handler of each signal; mostly those of the last call, whose answer is kept.
    """
    global _seen
    known, found = _seen
    if known != handlers:
        found = list(itertools.compress(zip(_NUMBERS, handlers), map(callable, handlers)))
        _seen = handlers, found
    return found
