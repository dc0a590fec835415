"""When a process tells its node what it has counted.

Once a second while there is something to tell, at the end of each task in which user code has counted (before the
task's owner hears of the end, but not more often than every ``SOON_SECONDS``), and when the process leaves. What a
process that is killed counted after that is lost; nothing is counted twice, since a channel delivers once.

A driver without a node tells one of the cluster's, always the same while that lives.
"""

from __future__ import annotations

import asyncio
import time

from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import BusError, RequestTimeoutError, ServiceError
from shoal_core.protocol.ids import NO_NODE, NodeId
from shoal_core.protocol.messages import ListNodes, NodeList, NodeState
from shoal_core.protocol.records import Measured, MetricsReported
from shoal_core.protocol.subjects import Subjects
from shoal_core.runtime.reactor import Reactor
from shoal_core.runtime.reports.measures import Measures

REPORT_SECONDS = 1.0
SOON_SECONDS = 0.01
ASK_SECONDS = 2.0
MOST_IN_RECORD = 200
"""A record holds no more series than this, so that it stays far below what the broker takes."""


class Reporter:
    """Reports of one process; all but ``changed`` are for the I/O thread."""

    def __init__(self, bus: Bus, subjects: Subjects, reactor: Reactor) -> None:
        self.measures = Measures(self.changed)
        self._bus = bus
        self._subjects = subjects
        self._reactor = reactor
        self._node = reactor.node
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._reported_at = float("-inf")
        reactor.counted = self.arrange

    def changed(self) -> None:
        """User code has counted something (any thread)."""
        self._reactor.later(0.0, self.arrange)

    def arrange(self, seconds: float | None = None) -> None:
        """Report in so many seconds, by default ``REPORT_SECONDS``, unless that is arranged."""
        if self._timer is None:
            self._timer = self._loop.call_later(REPORT_SECONDS if seconds is None else seconds, self._report)

    def task_ended(self) -> None:
        """A task of others has ended here: tell what it has counted before its owner hears of that."""
        if not self.measures:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if time.monotonic() - self._reported_at >= SOON_SECONDS:
            self._report()
        else:
            self.arrange(SOON_SECONDS)

    async def finish(self) -> None:
        """Tell what was not told yet; this process leaves."""
        if self._node == NO_NODE and self._has_news() and self._bus.connected:
            await self._choose_node()
        self._report()
        if self._timer is not None:
            self._timer.cancel()

    def _has_news(self) -> bool:
        return bool(self.measures) or self._reactor.tally.has_news

    def _report(self) -> None:
        self._timer = None
        if self._reactor.closed is not None:
            return
        if self._node == NO_NODE or self._reactor.is_dead(self._node):
            if self._has_news() or self._reactor.tasks:
                self._bus.spawn(self._look_for_node())
            return
        self._reported_at = time.monotonic()
        pending = len(self._reactor.tasks)
        measured = self._reactor.tally.take(pending)
        of_users, dropped = self.measures.take()
        self._send([*measured, *of_users], dropped)
        if pending:
            self.arrange()

    def _send(self, measured: list[Measured], dropped: int) -> None:
        if dropped:
            self._reactor.send(self._node, MetricsReported([], dropped))
        for start in range(0, len(measured), MOST_IN_RECORD):
            self._reactor.send(self._node, MetricsReported(measured[start : start + MOST_IN_RECORD]))

    async def _look_for_node(self) -> None:
        await self._choose_node()
        self.arrange()

    async def _choose_node(self) -> None:
        """Find a node that lives, for a process that has none of its own."""
        try:
            answer = await ask(self._bus, self._subjects.gcs("list_nodes"), ListNodes(), timeout_seconds=ASK_SECONDS)
        except (BusError, RequestTimeoutError, ServiceError):
            return  # the next report tries again
        assert isinstance(answer, NodeList)
        alive = [record.description for record in answer.nodes if record.state is NodeState.ALIVE]
        alive.sort(key=lambda node: (not node.is_head, node.node_id))
        self._node = next((node.node_id for node in alive), NodeId(NO_NODE))
