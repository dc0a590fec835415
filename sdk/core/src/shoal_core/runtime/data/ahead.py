"""A segment that the node has promised before there is anything to write, for who writes one value after the other.

To ask for a segment takes a tenth of the time in which 80 MB are passed to a task. So a process that has written two
values of the same size within a moment has a segment of that size promised for the next one, while others read the
last. It keeps one at most, gives it back when it has not used it for a moment or the node wants the room, and is given
none where room is scarce.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.records import SegmentRecalled
from shoal_core.protocol.storage import SegmentGranted
from shoal_core.runtime.reactor import Reactor

KEPT_SECONDS = 1.0
LEAST_BYTES = 1024 * 1024
MOST_BYTES = 256 * 1024 * 1024
"""To ask is nothing beside the writing of more."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Command: have a segment promised for another value of this size."""

    size_bytes: int


class Ahead:
    """The segment that one process has been promised.

    ``ask`` returns what the node answers to who wants a segment of some size ahead; ``give_back`` lets one go.
    """

    def __init__(
        self,
        reactor: Reactor,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        ask: Callable[[int], Coroutine[Any, Any, SegmentGranted]],
        give_back: Callable[[str], None],
    ) -> None:
        self._reactor = reactor
        self._spawn = spawn
        self._ask = ask
        self._give_back = give_back
        self._promised: dict[int, SegmentGranted] = {}
        """One at most, by the size of what may be written there: who takes it out, in one step, has it."""
        self._asking = False
        self._last = (0, float("-inf"))
        reactor.commands_by_type[Prepare] = self._prepare
        reactor.records_by_type[SegmentRecalled] = lambda _node, record: self._return(record.segment)

    def take(self, size_bytes: int) -> SegmentGranted | None:
        """Return the segment that was promised for a value of this size, if there is one (any thread)."""
        return None if self._reactor.closed is not None else self._promised.pop(size_bytes, None)

    def written(self, size_bytes: int) -> None:
        """A value was written: the next one may be as large if the last one was, too (any thread)."""
        now = time.monotonic()
        last_bytes, last_at = self._last
        self._last = (size_bytes, now)
        if size_bytes == last_bytes and now - last_at < KEPT_SECONDS and LEAST_BYTES < size_bytes <= MOST_BYTES:
            self._reactor.commands.append(Prepare(size_bytes))

    def _prepare(self, command: Prepare) -> None:
        if not self._asking and not self._promised:
            self._asking = True
            self._spawn(self._have_promised(command.size_bytes))

    async def _have_promised(self, size_bytes: int) -> None:
        try:
            granted = await self._ask(size_bytes)
        except ShoalError:
            return  # who wants to write will be told why
        finally:
            self._asking = False
        if granted.segment:
            self._promised[size_bytes] = granted
            asyncio.get_running_loop().call_later(KEPT_SECONDS, self._return, granted.segment)

    def _return(self, segment: str) -> None:
        """Give a segment back, unless it is used by now (I/O thread)."""
        for size_bytes, granted in list(self._promised.items()):
            if granted.segment == segment and self._promised.pop(size_bytes, None) is not None:
                self._give_back(segment)
