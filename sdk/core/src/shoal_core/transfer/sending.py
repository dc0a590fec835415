"""The source's end of transfers: which chunk goes next, and to whom it counts. A pure core.

Chunks of one object are published on one subject, once for all who pull it: the broker fans them out. The source sees
each puller as a set of chunks that it misses and those of them that are *in flight* to it::

    missing ── published ──► in flight ── Want that has it ──► there
       ▲                         │
       └── lost ─────────────────┘

- **Which chunk.** A cursor goes round the object; the next chunk is the first behind it that an active puller misses
  and that is not in flight to it. So those who pull together share a chunk, and who joins late gets what it missed
  when the cursor comes round.
- **Pace.** A chunk is published only if no active puller has a window of chunks in flight. (The broker holds a puller's
  credit besides, see ``pulling``: this only keeps chunks from being published to nobody.)
- **The slow and the dead.** Who keeps others waiting with a full window and says nothing for ``STALL_SECONDS`` is
  *parked*: nobody waits for it until it speaks again. One that pulls speaks every second; who has said nothing for
  ``FORGET_SECONDS`` does not any more, and is forgotten.
- **Losses.** One connection publishes, and the broker keeps its order: what was published to a puller before a chunk
  that it has, and is not there, is lost, and missing again. With a new epoch all that was in flight is.
- **The end.** A puller that misses nothing is told the digest of the whole, as often as it asks. What is not offered,
  or not any more, is ``Gone``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from zlib_ng.zlib_ng import crc32

from shoal_core.protocol.ids import PeerId
from shoal_core.transfer.records import Gone, Leave, Record, Resume, Tell, Want, Whole, chunk_count, lowest

STALL_SECONDS = 0.5
FORGET_SECONDS = 60.0

Checksum = Callable[[str, int], int]
"""Returns the crc32 of a chunk of an object that is offered."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk to be published."""

    stream: str
    index: int
    checksum: int


@dataclass(slots=True)
class Puller:
    """One who pulls; ``sent`` are the chunks in flight to it, each with the number of its publication."""

    epoch: int
    missing: int
    window: int
    heard_at: float
    sent: dict[int, int] = field(default_factory=dict)
    in_flight: int = 0
    parked: bool = False

    def acknowledge(self, have: int) -> None:
        """Take in which chunks the puller has."""
        self.missing &= ~have
        newest = max((number for index, number in self.sent.items() if have >> index & 1), default=0)
        if newest:
            self.sent = {index: number for index, number in self.sent.items() if number > newest}
            self.in_flight = sum(1 << index for index in self.sent)

    def start_again(self) -> None:
        """Count on nothing that is in flight."""
        self.sent.clear()
        self.in_flight = 0

    def published(self, index: int, number: int) -> None:
        """Note a chunk that goes to this puller, if it misses it."""
        if self.missing >> index & 1:
            self.sent[index] = number
            self.in_flight |= 1 << index

    @property
    def full(self) -> bool:
        """Whether nothing more may be in flight to it."""
        return len(self.sent) >= self.window


@dataclass(slots=True)
class Stream:
    """An object that is offered, and who pulls it."""

    name: str
    chunks: int
    checksums: dict[int, int] = field(default_factory=dict)
    pullers: dict[tuple[PeerId, int], Puller] = field(default_factory=dict)
    cursor: int = 0
    published: int = 0


class Sending:
    """All objects that one process offers."""

    def __init__(self, checksum: Checksum) -> None:
        self._checksum = checksum
        self._streams: dict[str, Stream] = {}
        self._turns: deque[Stream] = deque()
        self.wake_at = float("inf")
        """When ``next_chunk`` may have something though nobody spoke."""

    def __len__(self) -> int:
        return len(self._streams)

    def under_way(self) -> int:
        """Return to how many pullers chunks go."""
        pullers = [puller for stream in self._streams.values() for puller in stream.pullers.values()]
        return sum(bool(puller.missing) and not puller.parked for puller in pullers)

    def offer(self, name: str, size_bytes: int, chunk_bytes: int) -> None:
        """Let an object be pulled; once more is as good as once."""
        if name not in self._streams:
            stream = self._streams[name] = Stream(name, chunk_count(size_bytes, chunk_bytes))
            self._turns.append(stream)

    def withdraw(self, name: str, reason: str) -> list[Tell]:
        """Offer an object no more, and tell so who pulls it still."""
        stream = self._streams.pop(name, None)
        if stream is None:
            return []
        self._turns.remove(stream)
        return [Tell(peer, Gone(pull, reason)) for peer, pull in stream.pullers]

    def heard(self, peer: PeerId, record: Record, now: float) -> list[Tell]:
        """Take in what a puller says."""
        if isinstance(record, Leave):
            if (stream := self._streams.get(record.stream)) is not None:
                stream.pullers.pop((peer, record.pull), None)
            return []
        if isinstance(record, Want):
            return self._wanted(peer, record, now)
        return []

    def _wanted(self, peer: PeerId, want: Want, now: float) -> list[Tell]:
        stream = self._streams.get(want.stream)
        if stream is None:
            return [Tell(peer, Gone(want.pull, f"{want.stream} is not offered by its source"))]
        key, have = (peer, want.pull), int.from_bytes(want.have, "little")
        puller = stream.pullers.get(key)
        if puller is None or want.epoch > puller.epoch:
            missing = ((1 << stream.chunks) - 1) & ~have
            puller = stream.pullers[key] = Puller(want.epoch, missing, max(1, want.window), now)
        elif want.epoch == puller.epoch:
            puller.acknowledge(have)
            puller.window = max(want.window, len(puller.sent))
        else:
            return []  # overtaken by a newer one
        puller.heard_at, puller.parked = now, False
        return [] if puller.missing else [Tell(peer, Whole(want.pull, self._digest(stream)))]

    def _digest(self, stream: Stream) -> int:
        sums = b"".join(self._sum(stream, index).to_bytes(4, "little") for index in range(stream.chunks))
        return crc32(sums)

    def _sum(self, stream: Stream, index: int) -> int:
        if index not in stream.checksums:
            stream.checksums[index] = self._checksum(stream.name, index)
        return stream.checksums[index]

    def next_chunk(self, now: float) -> Chunk | None:
        """Return the chunk to be published next, None where nobody may get one; objects take turns."""
        self.wake_at = float("inf")
        for _ in range(len(self._turns)):
            stream = self._turns[0]
            self._turns.rotate(-1)
            index = self._choose(stream, now)
            if index is not None:
                return Chunk(stream.name, index, self._sum(stream, index))
        return None

    def _choose(self, stream: Stream, now: float) -> int | None:
        for key in [key for key, puller in stream.pullers.items() if now - puller.heard_at >= FORGET_SECONDS]:
            del stream.pullers[key]
        waited_for = [puller for puller in stream.pullers.values() if puller.missing and not puller.parked]
        needed = 0
        for puller in waited_for:
            if not puller.full:
                needed |= puller.missing & ~puller.in_flight
        if not needed:
            return None
        for puller in waited_for:
            if puller.full and now - puller.heard_at >= STALL_SECONDS:
                puller.parked = True
            elif puller.full:
                self.wake_at = min(self.wake_at, puller.heard_at + STALL_SECONDS)
                needed = 0
        return self._publish(stream, needed) if needed else None

    def _publish(self, stream: Stream, needed: int) -> int:
        behind = needed >> stream.cursor << stream.cursor
        index = lowest(behind or needed)
        stream.cursor = (index + 1) % stream.chunks
        stream.published += 1
        for puller in stream.pullers.values():
            if not puller.parked:
                puller.published(index, stream.published)
        return index

    def disconnected(self) -> None:
        """The connection was lost, and what was in flight with it: who speaks first again gets the first chunk."""
        for stream in self._streams.values():
            for puller in stream.pullers.values():
                puller.start_again()
                puller.parked = True

    def connected(self) -> list[Tell]:
        """Have all pullers say again what they want."""
        return [Tell(peer, Resume(pull)) for stream in self._streams.values() for peer, pull in stream.pullers]

    def sanity_check(self) -> None:
        """State the invariants."""
        assert len(self._turns) == len(self._streams)
        for stream in self._streams.values():
            for puller in stream.pullers.values():
                assert len(puller.sent) <= puller.window, "credit is never exceeded"
                assert puller.in_flight & ~puller.missing == 0, "only what is missing is in flight"
                assert puller.in_flight == sum(1 << index for index in puller.sent)
