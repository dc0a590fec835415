"""What schedulers tell a process about its demand: that no node can meet it, and why.

Everyone is warned once for each scheduling key. Demand waits all the same, since a node that can meet it may join. Only
a hard wish for one node is given up where it can never come true: a node that is dead does not come back under its id,
and what a node offers does not change. Whether that is so, the control store knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from shoal_core.bus.interface import Message
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import BusError, NotFoundError
from shoal_core.protocol.ids import NodeId, PlacementGroupId
from shoal_core.protocol.messages import GetNode, NodeRecord, NodeState
from shoal_core.protocol.placement import NodeAffinity
from shoal_core.protocol.resources import Resources, fits, to_amounts
from shoal_core.protocol.scheduling import DemandNotice
from shoal_core.protocol.wire import decode
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.tasks.submission import SchedulingKey

ASK_SECONDS = 5.0
PAUSE_SECONDS = 1.0

logger = logging.getLogger("shoal")


@contextlib.contextmanager
def heeding_notices(runtime: Runtime) -> Iterator[None]:
    """Warn of what schedulers say about this process's demand, and end what can never run."""
    notices = Notices(runtime)
    subscription = runtime.bus.subscribe(runtime.subjects.notice("*", runtime.local), notices.hear)
    try:
        yield
    finally:
        subscription.unsubscribe()


class Notices:
    """What was said about this process's demand (I/O thread).

    What was warned of is remembered for ever: a number for each key, and for each actor that nobody can place, and the
    id of each such placement group.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._warned: set[int | PlacementGroupId] = set()
        self._judged: set[SchedulingKey] = set()

    def hear(self, message: Message) -> None:
        """Take in one notice."""
        notice = decode(DemandNotice, message.data)
        about = notice.group or notice.key
        is_of_task = notice.actor is None and notice.group is None
        key = self._runtime.reactor.submission.find(notice.key) if is_of_task else None
        affinity = None if key is None else key.scheduling_class.strategy
        if key is None or not isinstance(affinity, NodeAffinity) or affinity.soft:
            if about not in self._warned:
                self._warned.add(about)
                logger.warning("%s", notice.text)
        elif affinity.fail:
            self._give_up(key, notice.why)
        elif key not in self._judged:
            self._judged.add(key)
            self._runtime.bus.spawn(self._judge(key, affinity.node))

    async def _judge(self, key: SchedulingKey, node: NodeId) -> None:
        """Fail the queued tasks of a key as soon as it is known that their node can never run them.

        A scheduler misses a node that is silent long before the control store declares it dead.
        """
        try:
            while key.queue and not key.leases:
                if reason := why_never(node, key.resources, await self._find(node)):
                    self._give_up(key, reason)
                    return
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self._judged.discard(key)

    async def _find(self, node: NodeId) -> NodeRecord | None:
        """Return what is recorded of a node, None if nothing is."""
        request, subject = GetNode(node_id=node), self._runtime.subjects.gcs("get_node")
        while True:
            try:
                record = await ask(self._runtime.bus, subject, request, timeout_seconds=ASK_SECONDS)
            except NotFoundError:
                return None
            except BusError:
                await asyncio.sleep(PAUSE_SECONDS)  # nobody will say it again
                continue
            assert isinstance(record, NodeRecord)
            return record

    def _give_up(self, key: SchedulingKey, reason: str) -> None:
        if self._runtime.reactor.closed is None:
            self._runtime.reactor.give_up_key(
                key,
                f"Task {key.name}() cannot run: {reason}, and its scheduling_strategy is a "
                "NodeAffinitySchedulingStrategy with soft=False. With soft=True it would run elsewhere.",
            )


def why_never(node: NodeId, resources: Resources, record: NodeRecord | None) -> str:
    """Return why a node, of which this is recorded, can never hold these resources; empty where it could."""
    if record is None:
        return f"node {node} is not in the cluster"
    if record.state is NodeState.DEAD:
        return f"node {node} is dead ({record.death_reason})"
    if not fits(resources, record.description.total):
        return f"node {node} has {to_amounts(record.description.total)}, not {to_amounts(resources)}"
    return ""
