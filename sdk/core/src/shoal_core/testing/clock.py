"""Time that passes only when a test says so, for pure cores and for whole event loops."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class NothingWillHappenError(RuntimeError):
    """Everything in a virtual loop waits, and no timer is set: on a real clock this would hang for ever."""


class VirtualClock:
    """A clock for pure cores: call it to read it, in seconds."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def advance(self, seconds: float) -> float:
        """Let time pass; return what the clock shows then."""
        if seconds < 0:
            raise ValueError(f"time does not go back, and {seconds} s is negative")
        self.now += seconds
        return self.now


class _VirtualSelector(selectors.DefaultSelector):
    """A selector that, instead of waiting for a timeout, moves the clock there."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready now; if nothing is, jump to the time of the next timer."""
        ready: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not ready and timeout is None:
            raise NothingWillHappenError("every coroutine waits, and no timer is set: nothing will ever happen here")
        if not ready and timeout:
            self.clock.advance(timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer as soon as nothing else can run.

    For code without sockets, threads or processes: it never waits for the outside. A test of minutes takes
    milliseconds, timeouts happen in exact order, and a hang is an error at once.
    """

    def __init__(self) -> None:
        self.clock = VirtualClock()
        super().__init__(_VirtualSelector(self.clock))

    def time(self) -> float:
        """Return the virtual time, in seconds."""
        return self.clock()


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in a ``VirtualTimeLoop``."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
