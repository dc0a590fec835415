"""What performs transfers: the two cores, the memory of the objects, and a bulk connection, in one thread.

Whoever has objects to move leaves commands, from any thread, and is told of the end of each pull. The thread begins
with the first command.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
from zlib_ng.zlib_ng import crc32

from shoal_core.bus.bulk import MOST_QUEUED_BYTES, BulkAddress, BulkConnection, Header
from shoal_core.protocol.errors import AuthenticationError
from shoal_core.protocol.ids import NodeId, PeerId, ProcessId, is_node
from shoal_core.protocol.subjects import Role, Subjects, parse_channel
from shoal_core.transfer import records
from shoal_core.transfer.mapped import Mapped, Mapper, Memory
from shoal_core.transfer.pulling import Effect, Ended, Extend, Listen, Pulling
from shoal_core.transfer.records import Tell
from shoal_core.transfer.sending import Sending

IDLE_SECONDS = 60.0
CONTROL = 1
"""The subscription to what is said to us about transfers; all others are to chunks."""
FAILED = "the thread that moves objects between nodes failed; its log says why"

logger = logging.getLogger("shoal.transfer")


@dataclass(frozen=True, slots=True)
class Offer:
    """Command: let an object be pulled, under this name. It begins at ``offset`` of a file, where pages begin."""

    name: str
    memory: Memory
    size_bytes: int
    chunk_bytes: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Command: offer an object no more."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Pull:
    """Command: pull an object of ``source``, which offers it as ``stream``, into ``memory``; called ``name`` here."""

    name: str
    source: PeerId
    stream: str
    size_bytes: int
    chunk_bytes: int
    memory: Memory


@dataclass(frozen=True, slots=True)
class Cancel:
    """Command: pull an object no more. Its memory is left alone only when ``Ended`` was told."""

    name: str


Command = Offer | Withdraw | Pull | Cancel


@dataclass
class Moved:
    """How much this process has moved, in bytes of chunks; a chunk for many counts once where it is sent."""

    sent_bytes: int = 0
    received_bytes: int = 0


class Mover:
    """Moves objects for one node, or for one driver without a node.

    ``ended`` is called in the mover's thread: for each pull once, and for what is offered when it cannot be sent.
    """

    def __init__(
        self, where: BulkAddress, subjects: Subjects, role: Role, local: PeerId, ended: Callable[[Ended], None]
    ) -> None:
        self.moved = Moved()
        self.sending = Sending(self._checksum)
        self.pulling = Pulling()
        self._subjects = subjects
        self._role = role
        self._local = local
        self._ended = ended
        self._connection = BulkConnection(where)
        self._commands: deque[Command] = deque()
        self._offered: dict[str, tuple[Mapped, int]] = {}
        self._targets: dict[str, Mapped] = {}
        self._sources = Mapper(writable=False)
        self._destinations = Mapper(writable=True)
        self._listening: dict[int, tuple[str, int]] = {}
        self._subscriptions: dict[str, int] = {}
        self._drawn = CONTROL
        self._scratch = bytearray(0)
        self._takes: int | None = None  # the chunk that is being read into its object
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._failed = False
        self._refusal = ""

    # ------------------------------------------------------------------------------- any thread

    def order(self, command: Command) -> None:
        """Have something done. Commands are carried out in their order; after ``close`` they have no effect."""
        with self._lock:
            if self._closed:
                return
            if self._failed and isinstance(command, Pull):
                self._ended(Ended(command.name, "system", FAILED))
                return
            self._commands.append(command)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shoal-bulk", daemon=True)
                self._thread.start()
            self._connection.wake()

    def close(self) -> None:
        """End all transfers and the thread, and wait for that; who pulls from here asks in vain from now on."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._thread is not None:
            self._connection.close()
            self._thread.join()
        self._connection.discard()

    # ------------------------------------------------------------------------------- commands

    def _run(self) -> None:
        try:
            self._connection.run(self)
        except Exception:
            logger.exception(FAILED)
            self._fail()
        finally:
            self._offered.clear()
            self._targets.clear()
            self._sources.drop()
            self._destinations.drop()

    def _fail(self) -> None:
        """Nobody waits in vain, now or later."""
        with self._lock:
            self._failed = True
            waiting = [command.name for command in self._commands if isinstance(command, Pull)]
        for name in {*self._targets, *waiting}:
            self._ended(Ended(name, "system", FAILED))

    def _obey(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            now = time.monotonic()
            match command:
                case Offer():
                    self._offer(command)
                case Withdraw(name, reason):
                    self._perform(self.sending.withdraw(name, reason))
                    self._withdraw(name, now)
                case Pull():
                    self._pull(command, now)
                case Cancel(name):
                    self._perform(self.pulling.cancel(name))

    def _offer(self, offer: Offer) -> None:
        if offer.name in self._offered:
            return
        try:
            memory = self._sources.map(offer.memory, offer.size_bytes, offer.offset)
        except OSError as error:
            logger.error("%s cannot be offered: %s", offer.name, error)
            return
        self._offered[offer.name] = (memory, offer.chunk_bytes)
        self.sending.offer(offer.name, offer.size_bytes, offer.chunk_bytes)

    def _withdraw(self, name: str, now: float) -> None:
        offered = self._offered.pop(name, None)
        if offered is not None:
            self._sources.keep(offered[0], now)

    def _pull(self, pull: Pull, now: float) -> None:
        try:
            self._targets[pull.name] = self._destinations.map(pull.memory, pull.size_bytes)
        except OSError as error:
            self._ended(Ended(pull.name, "object_store_full", f"{pull.memory} cannot be mapped: {error}"))
            return
        self._perform(self.pulling.pull(pull.name, pull.source, pull.stream, pull.size_bytes, pull.chunk_bytes, now))

    def _checksum(self, name: str, index: int) -> int:
        return crc32(self._chunk(name, index))

    def _chunk(self, name: str, index: int) -> memoryview:
        memory, chunk_bytes = self._offered[name]
        return memory.view[index * chunk_bytes : (index + 1) * chunk_bytes]

    # ------------------------------------------------------------------------------- effects

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Tell(peer, record):
                    subject = self._subjects.transfer(peer, self._role, self._local)
                    self._connection.publish(subject, records.encode(record))
                case Listen():
                    self._listen(effect)
                case Extend(name, _, most):
                    self._connection.limit(self._subscriptions[name], most)
                case Ended():
                    self._end(effect)

    def _end(self, ended: Ended) -> None:
        """End a pull; the memory of one that failed is never used again, as the rest of a chunk may come for it."""
        self._end_subscription(ended.name)
        target = self._targets.pop(ended.name, None)
        if target is not None and not ended.code:
            self._destinations.keep(target, time.monotonic())
        self._ended(ended)

    def _listen(self, listen: Listen) -> None:
        self._end_subscription(listen.name)
        found = self.pulling.source(listen.name)
        assert found is not None, "only what is pulled is listened for"
        source, stream = found
        self._drawn += 1
        self._listening[self._drawn] = (listen.name, listen.number)
        self._subscriptions[listen.name] = self._drawn
        self._connection.subscribe(self._drawn, self._subjects.chunks(_role_of(source), source, stream), listen.most)

    def _end_subscription(self, name: str) -> None:
        subscription = self._subscriptions.pop(name, None)
        if subscription is not None:
            del self._listening[subscription]
            self._connection.limit(subscription, 0)

    # ------------------------------------------------------------------------------- the connection's handler

    def connected(self) -> None:
        """Hear what is said to us, and resume everything."""
        self._refusal = ""
        self._connection.subscribe(CONTROL, self._subjects.transfers_to(self._local))
        self._perform(self.pulling.connected(time.monotonic()))
        self._perform(self.sending.connected())

    def disconnected(self) -> None:
        """Everything waits."""
        self._listening.clear()
        self._subscriptions.clear()
        self.pulling.disconnected()
        self.sending.disconnected()

    def refused(self, error: AuthenticationError) -> None:
        """Nothing can be moved: whoever waits is told."""
        if str(error) != self._refusal:
            self._refusal = str(error)
            logger.error("%s", error)
        self._obey()
        self._perform(self.pulling.refused(self._refusal))
        for name in self._offered:
            self._ended(Ended(name, "authentication", self._refusal))

    def turn(self) -> float:
        """Obey, and do what is due."""
        self._obey()
        now = time.monotonic()
        wake_at = self.pulling.wake_at()
        if now >= wake_at:
            self._perform(self.pulling.tick(now))
            wake_at = self.pulling.wake_at()
        for mapper in (self._sources, self._destinations):
            mapper.tick(now)
            wake_at = min(wake_at, mapper.wake_at)
        return min(IDLE_SECONDS, self.sending.wake_at - now, wake_at - now)

    def more(self) -> None:
        """Publish chunks until enough waits to be written."""
        queued_bytes = 0
        while queued_bytes < MOST_QUEUED_BYTES:
            chunk = self.sending.next_chunk(time.monotonic())
            if chunk is None:
                return
            data = self._chunk(chunk.stream, chunk.index)
            label = f"{chunk.index}.{chunk.checksum}"
            self._connection.publish(self._subjects.chunks(self._role, self._local, chunk.stream), data, label)
            queued_bytes += len(data)
            self.moved.sent_bytes += len(data)

    def memory(self, header: Header) -> memoryview:
        """Return where a payload goes: into the object, where it is a chunk that is missing."""
        listening = self._listening.get(header.subscription)
        self._takes = None
        if listening is not None:
            name, index = listening[0], _index(header)
            place = self.pulling.place(name, index, header.size_bytes)
            if place is not None:
                self._takes = index
                target = self._targets[name]
                target.enter(*place)
                return target.view[place[0] : place[1]]
        if header.size_bytes > len(self._scratch):
            self._scratch = bytearray(header.size_bytes)
        return memoryview(self._scratch)[: header.size_bytes]

    def arrived(self, header: Header, data: memoryview, checksum: int) -> None:
        """Take in a message: a chunk, or what a peer says."""
        if header.subscription == CONTROL:
            self._obey()  # what was ordered before a peer spoke is known before it is heeded: it may ask for just that
            self._heard(header, bytes(data), time.monotonic())
            return
        listening = self._listening.get(header.subscription)
        if listening is None:
            return
        self.moved.received_bytes += header.size_bytes
        index = self._takes
        good = index is not None and header.label == f"{index}.{checksum}"
        now = time.monotonic()
        self._perform(self.pulling.arrived(*listening, -1 if index is None else index, checksum if good else None, now))

    def _heard(self, header: Header, data: bytes, now: float) -> None:
        role, sender = parse_channel(header.subject)
        peer = NodeId(sender) if role is Role.NODE else ProcessId(sender)
        if role is not _role_of(peer):
            logger.error("a connection of role %s spoke in the name of %s: dropped", role, sender)
            return
        try:
            record = records.decode(data)
        except msgspec.ValidationError as error:
            logger.error("%s said what nobody understands: %s", sender, error)
            return
        self._perform(self.sending.heard(peer, record, now))
        self._perform(self.pulling.heard(peer, record, now))


def _index(header: Header) -> int:
    """Return which chunk a message says that it is; -1 for nonsense."""
    number = header.label.partition(".")[0]
    return int(number) if number.isdecimal() else -1


def _role_of(peer: PeerId) -> Role:
    return Role.NODE if is_node(peer) else Role.PROCESS
