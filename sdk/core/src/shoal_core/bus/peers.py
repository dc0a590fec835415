"""The channels of one process to all its peers, over a bus.

Everything queued for one peer in one turn of the bus leaves as one message (several above ``BATCH_BYTES``), and the
acknowledgements that are due ride on it. One loop, one thread; nothing here waits.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from shoal_core.bus.interface import Bus, Message
from shoal_core.protocol import records
from shoal_core.protocol.channel import ACK_DELAY_SECONDS, HEADER, Budget, Channel
from shoal_core.protocol.errors import BadFrameError, BufferFullError, RequestTimeoutError
from shoal_core.protocol.ids import NodeId, PeerId, ProcessId
from shoal_core.protocol.records import Record
from shoal_core.protocol.subjects import Role, Subjects, parse_channel

BATCH_BYTES = 256 * 1024
BATCH_RECORDS = 512
WATCH_SECONDS = 0.25
SILENCE_SECONDS = 3.0
SILENCE_REPEAT_SECONDS = 1.0
FORGOTTEN_LIMIT = 65_536
"""So many dead peers are remembered; a late frame of an older one meets a new channel, whose number 1 it is not."""

NODE_ID_LENGTH = 16

Deliver = Callable[[PeerId, list[Record]], None]
SilenceListener = Callable[[PeerId, float], None]


@dataclass(frozen=True)
class PeersStatistics:
    """What waits now, over all peers, and what was counted since the start."""

    peers: int
    queued_records: int
    unacknowledged_payloads: int
    in_flight_bytes: int
    resent_frames: int
    duplicate_frames: int
    unsent_frames: int


class _Link:
    """A peer: its channel, and the records that no payload holds yet."""

    __slots__ = ("channel", "owing", "peer", "queue", "ready", "subject", "suspected_at")

    def __init__(self, peer: PeerId, subject: str, channel: Channel) -> None:
        self.peer = peer
        self.subject = subject
        self.channel = channel
        self.queue: list[Record] = []
        self.ready = False
        self.owing = False
        self.suspected_at = 0.0


class Peers:
    """Sends records to peers and delivers theirs: each once, in order, as long as both live.

    ``deliver(peer, records)`` is called on the loop's thread with each batch. Use as ``async with``: entering
    subscribes and waits until the broker knows, leaving unsubscribes. An id that says *node* must come from a node's
    connection; the broker's permissions make that proof.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        role: Role,
        local: PeerId,
        deliver: Deliver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._role = role
        self._local = local
        self._deliver = deliver
        self._clock = clock
        self._budget = Budget()
        self._links: dict[PeerId, _Link] = {}
        self._by_subject: dict[str, _Link] = {}
        self._forgotten: dict[PeerId, None] = {}
        self._ready: list[_Link] = []
        self._transmitting = False
        self._owing: list[_Link] = []
        self._ack_timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._to_self: deque[Record] = deque()
        self._silence_listeners: list[SilenceListener] = []
        self._progress: asyncio.Event | None = None
        self._unsent_frames = 0
        self._open = False

    async def __aenter__(self) -> Peers:
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._subscription = self._bus.subscribe(self._subjects.channels_to(self._local), self._on_message)
        self._unlisten = self._bus.on_connection(self._on_connection)
        try:
            await self._bus.flush()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._open = False
        self._subscription.unsubscribe()
        self._unlisten()
        for timer in (self._ack_timer, self._watch_timer):
            if timer is not None:
                timer.cancel()

    # -------------------------------------------------------------------------------- what callers do

    def send(self, peer: PeerId, record: Record) -> bool:
        """Queue a record; it leaves at the end of the bus's turn. False, and dropped, if the peer was forgotten.

        The queue of a peer is not bounded here: the tasks in it are bounded by leases, the rest by what was asked for.
        """
        link = self._links.get(peer)
        if link is None:
            if peer in self._forgotten:
                return False
            if peer == self._local:
                self._send_to_self(record)
                return True
            link = self._connect(peer)
        link.queue.append(record)
        if not link.ready:
            self._make_ready(link)
        return True

    def transmit(self) -> None:
        """Send what is queued now, without waiting for the end of the bus's turn."""
        self._transmitting = False
        if not self._bus.connected:
            return  # nothing is lost: all links are made ready again at the reconnect
        ready, self._ready = self._ready, []
        now = self._clock()
        for link in ready:
            link.ready = False
            self._pack(link)
            self._publish(link, now)

    def forget(self, peer: PeerId) -> list[Record]:
        """End the channel to a peer that is dead; return, in order, the records it may not have received.

        Whether it received them is unknown. Frames from it and records to it are dropped from now on.
        """
        if peer not in self._forgotten:
            self._forgotten[peer] = None
            if len(self._forgotten) > FORGOTTEN_LIMIT:
                del self._forgotten[next(iter(self._forgotten))]
        link = self._links.pop(peer, None)
        if link is None:
            return []
        self._by_subject = {subject: other for subject, other in self._by_subject.items() if other is not link}
        unknown = [record for payload in link.channel.end() for record in records.decode(payload)]
        unknown += link.queue
        link.queue = []
        self._note_progress()
        return unknown

    def on_silence(self, listener: SilenceListener) -> None:
        """Have ``listener(peer, seconds)`` called while a peer owes an acknowledgement and says nothing.

        First after ``SILENCE_SECONDS``, then every ``SILENCE_REPEAT_SECONDS``. A suspicion, not a death. Time in which
        this process is itself cut off does not count.
        """
        self._silence_listeners.append(listener)

    def known(self) -> list[PeerId]:
        """Return the peers that something was sent to or received from, without those forgotten."""
        return list(self._links)

    def unacknowledged(self) -> int:
        """Return how many payloads and queued records have not been acknowledged; 0 means all was received."""
        return sum(
            link.channel.last_number - link.channel.acknowledged + len(link.queue) for link in self._links.values()
        ) + len(self._to_self)

    def statistics(self) -> PeersStatistics:
        """Return what waits now and what was counted."""
        channels = [link.channel for link in self._links.values()]
        return PeersStatistics(
            peers=len(channels),
            queued_records=sum(len(link.queue) for link in self._links.values()) + len(self._to_self),
            unacknowledged_payloads=sum(channel.last_number - channel.acknowledged for channel in channels),
            in_flight_bytes=sum(channel.in_flight_bytes for channel in channels),
            resent_frames=sum(channel.statistics.resent for channel in channels),
            duplicate_frames=sum(channel.statistics.duplicates for channel in channels),
            unsent_frames=self._unsent_frames,
        )

    async def flush(self, timeout_seconds: float = 5.0) -> None:
        """Wait until everything sent so far was received, or its peer forgotten; ``RequestTimeoutError``."""
        self.transmit()
        targets = {}
        for link in self._links.values():
            self._pack(link)  # what a connection that is down has left in the queue
            if link.channel.last_number > link.channel.acknowledged:
                targets[link] = link.channel.last_number
                link.channel.ask()
                self._make_ready(link)
        try:
            async with asyncio.timeout(timeout_seconds):
                while self._behind(targets) or self._to_self:
                    if self._progress is None:
                        self._progress = asyncio.Event()
                    await self._progress.wait()
        except TimeoutError:
            names = ", ".join(link.peer for link in self._behind(targets)[:3])
            raise RequestTimeoutError(
                f"records sent to {names} were not acknowledged within {timeout_seconds:g} s"
            ) from None

    def _behind(self, targets: dict[_Link, int]) -> list[_Link]:
        return [
            link
            for link, number in targets.items()
            if link.channel.acknowledged < number and self._links.get(link.peer) is link
        ]

    # -------------------------------------------------------------------------------- sending

    def _connect(self, peer: PeerId) -> _Link:
        subject = self._subjects.channel(peer, self._role, self._local)
        channel = Channel(self._budget, piece_bytes=self._bus.max_payload - HEADER.size)
        link = _Link(peer, subject, channel)
        self._links[peer] = link
        return link

    def _send_to_self(self, record: Record) -> None:
        if not self._to_self:
            self._loop.call_soon(self._deliver_to_self)
        self._to_self.append(record)

    def _deliver_to_self(self) -> None:
        batch = list(self._to_self)
        self._to_self.clear()
        self._note_progress()
        if self._open and batch:
            self._deliver(self._local, batch)

    def _make_ready(self, link: _Link) -> None:
        if link.ready:
            return
        link.ready = True
        self._ready.append(link)
        if not self._transmitting and self._open:
            self._transmitting = True
            self._bus.at_end_of_turn(self._transmit_if_open)

    def _transmit_if_open(self) -> None:
        if self._open and self._transmitting:
            self.transmit()

    def _pack(self, link: _Link) -> None:
        """Make payloads of queued records: of ``BATCH_BYTES`` at most, unless a single record is larger."""
        if not link.queue:
            return
        queue, link.queue = link.queue, []
        for start in range(0, len(queue), BATCH_RECORDS):
            self._pack_bounded(link.channel, queue[start : start + BATCH_RECORDS])

    def _pack_bounded(self, channel: Channel, batch: Sequence[Record]) -> None:
        payload = records.encode(batch)
        if len(payload) <= BATCH_BYTES or len(batch) == 1:
            channel.send(payload)
            return
        middle = len(batch) // 2
        self._pack_bounded(channel, batch[:middle])
        self._pack_bounded(channel, batch[middle:])

    def _publish(self, link: _Link, now: float) -> None:
        for frame in link.channel.frames(now):
            try:
                taken = self._bus.publish(link.subject, frame)
            except BufferFullError:
                taken = False  # as good as lost on the way: the channel asks after it, and sends it again
            if not taken:
                self._unsent_frames += 1
        if self._watch_timer is None and link.channel.in_flight_bytes:
            self._watch_timer = self._loop.call_later(WATCH_SECONDS, self._watch)

    # -------------------------------------------------------------------------------- receiving

    def _on_message(self, message: Message) -> None:
        link = self._by_subject.get(message.subject)
        if link is None:
            link = self._recognise(message.subject)
            if link is None:
                return
        channel = link.channel
        before = channel.acknowledged
        payload = channel.receive(message.data, self._clock())
        if channel.acknowledged != before and self._progress is not None:
            self._note_progress()
        if channel.urgent:
            self._make_ready(link)
        elif channel.owing and not link.owing:
            self._owe(link)
        if payload is not None:
            self._deliver(link.peer, records.decode(payload))

    def _recognise(self, subject: str) -> _Link | None:
        """Return the link of the peer that a subject names; None if it was forgotten. Refuses a forged name."""
        role, sender = parse_channel(subject)
        if (role is Role.NODE) != (len(sender) == NODE_ID_LENGTH):
            raise BadFrameError(f"a connection of role {role} sent a frame in the name of {sender!r}: dropped")
        peer: PeerId = NodeId(sender) if role is Role.NODE else ProcessId(sender)
        if peer in self._forgotten:
            return None
        link = self._links.get(peer) or self._connect(peer)
        self._by_subject[subject] = link
        return link

    def _owe(self, link: _Link) -> None:
        link.owing = True
        self._owing.append(link)
        if self._ack_timer is None:
            self._ack_timer = self._loop.call_later(ACK_DELAY_SECONDS, self._acknowledge)

    # -------------------------------------------------------------------------------- time

    def _acknowledge(self) -> None:
        """Acknowledge what nothing has carried an acknowledgement for; the youngest of it a little early."""
        self._ack_timer = None
        owing, self._owing = self._owing, []
        due = self._clock() + ACK_DELAY_SECONDS
        for link in owing:
            link.owing = False
            if link.channel.owing:
                link.channel.tick(due)
                self._make_ready(link)

    def _watch(self) -> None:
        """Ask about what is in flight for long, and tell of silence; runs only while something is in flight."""
        self._watch_timer = None
        if not self._bus.connected:
            return
        now = self._clock()
        busy = [link for link in self._links.values() if link.channel.in_flight_bytes]
        if busy:
            self._watch_timer = self._loop.call_later(WATCH_SECONDS, self._watch)
        for link in busy:
            link.channel.tick(now)
            if link.channel.urgent:
                self._make_ready(link)
            self._tell_of_silence(link, now)

    def _tell_of_silence(self, link: _Link, now: float) -> None:
        silent_seconds = link.channel.silent_seconds(now)
        if silent_seconds > SILENCE_SECONDS and now - link.suspected_at >= SILENCE_REPEAT_SECONDS:
            link.suspected_at = now
            for listener in self._silence_listeners:
                listener(link.peer, silent_seconds)

    def _on_connection(self, connected: bool) -> None:
        if not connected:
            return
        now = self._clock()
        for link in self._links.values():
            link.channel.returned(now)
            link.ready = False
        self._ready.clear()
        for link in self._links.values():
            self._make_ready(link)

    def _note_progress(self) -> None:
        if self._progress is not None:
            self._progress.set()
            self._progress = None
