"""Keeping the handlers of signals from a stretch of the main thread's code that has to be run to its end.

A handler may raise wherever the main thread is, as that of Ctrl-C does. ``Deferred`` is a context in which signals are
noted and their handlers are not called; ``deliver`` calls them afterwards. In other threads it does nothing, since no
handler runs there.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps in enumerations, for ten times the cost
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

DEFERRED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGURG,
)
"""The signals that programs are interrupted by, or told something; handlers of others are taken not to raise."""


class Deferred:
    """Notes signals while it is entered; ``wake`` is called for each, for whoever sleeps there meanwhile."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.noted: list[int] = []
        self._wake = wake
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            try:
                for number in DEFERRED:
                    handler = _signal.getsignal(number)
                    if callable(handler):
                        self._handlers[number] = handler
                        _signal.signal(number, self._note)
            except BaseException:  # of a handler that was not taken away yet
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._give_back()
        finally:  # a handler that was given back may have raised before the next was
            self._give_back()

    def deliver(self) -> None:
        """Call the handlers of what was noted (after the context was left)."""
        if self.noted:
            number = self.noted.pop(0)
            try:
                self._handlers[number](number, sys._getframe(1))
            finally:  # it may have raised
                self.deliver()

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted.append(number)
        self._wake()
