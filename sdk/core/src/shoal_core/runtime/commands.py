"""What user threads ask of the I/O thread: commands, left on the reactor's queue and worked off in its turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal_core.protocol.ids import NodeId, PeerId
from shoal_core.protocol.records import Record, Reference, SegmentFreed, SegmentMapped, SegmentSealed, SegmentUnpinned
from shoal_core.runtime.ownership.objects import ObjectState
from shoal_core.runtime.ownership.streams import Stream

if TYPE_CHECKING:
    from shoal_core.runtime.reactor import Reactor


HERE = NodeId("")
"""Stands for a process's own node where the home of a segment is named."""


class Notify:
    """Command: call back on the I/O thread when an object is ready, or out of reach.

    Once the process has left, nobody comes to commands any more: then whoever gave it calls back.
    """

    __slots__ = ("_callbacks", "observer", "state")

    def __init__(self, state: ObjectState, callback: Callable[[], None]) -> None:
        self.state = state
        self.observer: Callable[[ObjectState], None] | None = None
        self._callbacks = [callback]

    def call_back(self) -> None:
        """Call back, unless that was done before (any thread)."""
        try:
            callback = self._callbacks.pop()
        except IndexError:
            return
        callback()


@dataclass(frozen=True, slots=True, eq=False)
class Withdraw:
    """Command: nobody waits for a notice any more."""

    notice: Notify


@dataclass(frozen=True, slots=True)
class Want:
    """Command: somebody waits for these objects of other owners."""

    states: Sequence[ObjectState]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Command: cancel the task that makes an object."""

    state: ObjectState
    force: bool
    recursive: bool


@dataclass(frozen=True, slots=True)
class Persisted:
    """Command: an object of this process is in the durable tier, until nobody refers to it any more."""

    state: ObjectState


@dataclass(frozen=True, slots=True, eq=False)
class StreamMoved:
    """Command: items of a stream were taken, or it was closed: nobody wants more of it."""

    stream: Stream


@dataclass(frozen=True, slots=True)
class Say:
    """Command: send a record to a peer."""

    peer: PeerId
    record: Record


def unpin(reactor: Reactor, node: NodeId, segment: str, serial: int, home: NodeId = HERE) -> None:
    """Tell the node that this process no longer maps a segment, or the copy of that of another node (any thread)."""
    reactor.commands.append(Say(node, SegmentUnpinned(segment, serial, home)))
    reactor.wake()


def pin(reactor: Reactor, node: NodeId, segment: str, serial: int) -> None:
    """Tell the node that this process has mapped a segment (any thread)."""
    reactor.commands.append(Say(node, SegmentMapped(segment, serial)))
    reactor.wake()


def seal(reactor: Reactor, node: NodeId, segment: str, written: Reference) -> None:
    """Tell the node that a segment is written, with which object, and so who will free it (any thread)."""
    reactor.commands.append(Say(node, SegmentSealed(segment, written.owner, written.key)))


def discard(reactor: Reactor, node: NodeId, segment: str) -> None:
    """Tell the node that a segment of this process is needed no more (any thread)."""
    reactor.commands.append(Say(node, SegmentFreed(segment)))
    reactor.wake()
