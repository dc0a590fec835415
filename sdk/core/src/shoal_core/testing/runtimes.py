"""A runtime on its own: its channels only record, its loop is the test's, and the test plays all other processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.bus.peers import SilenceListener
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import PeerId, ProcessId
from shoal_core.protocol.records import Record
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime.runtime import Runtime


class RecordedPeers:
    """Channels that keep what is sent, and forget no more than they are told to."""

    def __init__(self) -> None:
        self.sent: list[tuple[PeerId, Record]] = []
        self.forgotten: set[PeerId] = set()
        self.silence_listeners: list[SilenceListener] = []
        self._known: dict[PeerId, None] = {}

    def send(self, peer: PeerId, record: Record) -> bool:
        """Keep a record; False if the peer was forgotten."""
        if peer in self.forgotten:
            return False
        self._known[peer] = None
        self.sent.append((peer, record))
        return True

    def forget(self, peer: PeerId) -> list[Record]:
        """Send nothing to this peer any more."""
        self.forgotten.add(peer)
        self._known.pop(peer, None)
        return []

    def on_silence(self, listener: SilenceListener) -> None:
        """Keep whom to tell that a peer is silent."""
        self.silence_listeners.append(listener)

    def known(self) -> list[PeerId]:
        """Return who was spoken to."""
        return list(self._known)


class LoneRuntime:
    """A runtime and what it says."""

    def __init__(self, runtime: Runtime, peers: RecordedPeers) -> None:
        self.runtime = runtime
        self.reactor = runtime.reactor
        self.peers = peers

    def sent(self, kind: type[Record] | None = None) -> list[tuple[PeerId, Any]]:
        """Work off what user code left, and return what was sent since the last look: of one kind, or all."""
        self.reactor.drain()
        sent, self.peers.sent = self.peers.sent, []
        return sent if kind is None else [(peer, record) for peer, record in sent if type(record) is kind]

    def receive(self, peer: PeerId, *records: Record) -> None:
        """Hear records from a peer, as one batch."""
        self.reactor.deliver(peer, list(records))


def _answer(bus: Bus, asked: Message, data: bytes) -> None:
    bus.publish(asked.reply, data)


@asynccontextmanager
async def lone_runtime(
    local: ProcessId, cluster: str = "test", broker: MemoryBroker | None = None
) -> AsyncIterator[LoneRuntime]:
    """Run a runtime without shared memory in the current loop; the durable tier beside it is empty."""
    broker = broker or MemoryBroker()
    async with (
        broker.connect(role=Role.OBJECTSTORE, identity="empty", cluster=cluster) as tier,
        broker.connect(role=Role.PROCESS, identity=local, cluster=cluster) as bus,
    ):
        nothing = encode(NotFoundError("the durable tier is empty"))
        tier.subscribe(Subjects(cluster).objectstore("*"), lambda asked: _answer(tier, asked, nothing))
        runtime = Runtime(bus, Subjects(cluster), local, None, "memory")
        peers = RecordedPeers()
        runtime.reactor.peers = peers  # type: ignore[assignment]
        try:
            yield LoneRuntime(runtime, peers)
        finally:
            runtime.close()
