"""The puller's end of transfers: what it still misses, what may be in flight to it, when it is done. A pure core.

::

    waiting ── connected ──► pulling ── has all chunks ──► checking ── Whole ──► ended
       ▲                       │  ▲                           │
       └──── connection lost ──┘  └── the digest differs ─────┘        Gone, silence: ended with an error

- **Credit.** A puller subscribes to a source's chunks for a number of messages only, and the broker itself ends the
  subscription after so many (``UNSUB`` with a maximum): never more than ``credit`` chunks beyond those received can be
  on their way, whatever the source does. As chunks arrive the number is raised. The source keeps to a ``window`` of
  half as many, so that a subscription is used up only where others' chunks come by; then it is made anew.
- **What is there** is never asked for again: each ``Want`` carries all that has arrived, so it is an acknowledgement,
  a request to join, and a request to resume, and any of them may get lost or come twice.
- **Losses.** A chunk whose crc32 is wrong did not arrive. After ``ASK_SECONDS`` without a chunk, and after a
  reconnect, the puller subscribes anew and asks in a new epoch. Of the credit of the old subscription, what may still
  come counts until the first chunk of the new one has (they keep their order).
- **The end.** With all chunks there, the source says the digest of the whole. Where it differs everything is pulled
  again, ``MOST_ROUNDS`` times. A source that says nothing for ``SILENT_SECONDS``, while the broker is there, is given
  up; whoever knows that it is dead cancels earlier.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zlib_ng.zlib_ng import crc32

from shoal_core.protocol.ids import PeerId
from shoal_core.transfer.records import Gone, Leave, Record, Resume, Tell, Want, Whole, chunk_count, to_bitmap

WINDOW_BYTES = 8 * 1024 * 1024
ASK_SECONDS = 1.0
SILENT_SECONDS = 60.0
MOST_ROUNDS = 3
MOST_BAD_CHUNKS = 1_000
CANCELLED = "cancelled"
"""The code with which a pull ends that was cancelled; it never crosses the wire."""


@dataclass(frozen=True, slots=True)
class Listen:
    """Subscribe to the chunks of a pull under a new number, for at most ``most`` messages; end the number before."""

    name: str
    number: int
    most: int


@dataclass(frozen=True, slots=True)
class Extend:
    """Let a subscription have ``most`` messages in all."""

    name: str
    number: int
    most: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A pull is over, and nothing listens for it any more; ``code`` is the wire code of the error, "" for success."""

    name: str
    code: str = ""
    text: str = ""


Effect = Tell | Listen | Extend | Ended


@dataclass(slots=True)
class Pull:
    """One object on its way here. ``number`` is that of its subscription, 0 for none."""

    name: str
    pull: int
    source: PeerId
    stream: str
    size_bytes: int
    chunk_bytes: int
    window: int
    heard_at: float
    asked_at: float
    have: int = 0
    epoch: int = 0
    number: int = 0
    received: int = 0
    told: int = 0
    most: int = 0
    debt: int = 0
    bad: int = 0
    rounds: int = 1
    checksums: dict[int, int] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """How many chunks the object has."""
        return chunk_count(self.size_bytes, self.chunk_bytes)

    @property
    def credit(self) -> int:
        """How many chunks may be on their way here at most."""
        return 2 * self.window

    @property
    def complete(self) -> bool:
        """Whether all chunks are there."""
        return len(self.checksums) == self.chunks

    def digest(self) -> int:
        """Return the digest of what is there."""
        return crc32(b"".join(self.checksums[index].to_bytes(4, "little") for index in range(self.chunks)))

    def extent(self, index: int) -> tuple[int, int]:
        """Return where a chunk begins and ends."""
        return index * self.chunk_bytes, min(self.size_bytes, (index + 1) * self.chunk_bytes)

    def want(self) -> Tell:
        """Return the request for what is missing."""
        self.told = self.received
        have = to_bitmap(self.have, self.chunks)
        window = max(1, min(self.window, self.most - self.received))
        return Tell(self.source, Want(self.stream, self.pull, self.epoch, have, window))

    def listen(self) -> list[Effect]:
        """Subscribe anew, and ask in a new epoch."""
        self.debt += max(0, self.most - self.received)
        self.number += 1
        self.epoch += 1
        self.received = 0
        self.most = max(1, self.credit - self.debt)
        return [Listen(self.name, self.number, self.most), self.want()]


class Pulling:
    """All pulls of one process."""

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        self._window_bytes = window_bytes
        self._pulls: dict[str, Pull] = {}
        self._by_number: dict[int, Pull] = {}
        self._drawn = 0
        self._connected = False

    def __len__(self) -> int:
        return len(self._pulls)

    def source(self, name: str) -> tuple[PeerId, str] | None:
        """Return from whom and under which name an object is pulled."""
        pull = self._pulls.get(name)
        return None if pull is None else (pull.source, pull.stream)

    def pull(
        self, name: str, source: PeerId, stream: str, size_bytes: int, chunk_bytes: int, now: float
    ) -> list[Effect]:
        """Begin to pull an object, which is called ``name`` here; ``Ended`` comes in any case but ``cancel``."""
        self._drawn += 1
        window = max(2, self._window_bytes // chunk_bytes)
        pull = Pull(name, self._drawn, source, stream, size_bytes, chunk_bytes, window, now, now)
        self._pulls[name] = self._by_number[pull.pull] = pull
        return pull.listen() if self._connected else []

    def cancel(self, name: str) -> list[Effect]:
        """Pull an object no more."""
        pull = self._pulls.get(name)
        return [] if pull is None else self._end(pull, CANCELLED)

    def _end(self, pull: Pull, code: str = "", text: str = "") -> list[Effect]:
        del self._pulls[pull.name], self._by_number[pull.pull]
        return [Tell(pull.source, Leave(pull.stream, pull.pull)), Ended(pull.name, code, text)]

    def connected(self, now: float) -> list[Effect]:
        """The connection to the broker is there: begin, or resume."""
        self._connected = True
        effects: list[Effect] = []
        for pull in self._pulls.values():
            pull.heard_at = pull.asked_at = now
            pull.debt = 0
            pull.most = pull.received = 0
            effects += pull.listen()
        return effects

    def disconnected(self) -> None:
        """The connection was lost, and all subscriptions with it."""
        self._connected = False

    def refused(self, reason: str) -> list[Effect]:
        """The broker refuses the credential: nothing will come, however long one waits."""
        return [effect for pull in list(self._pulls.values()) for effect in self._end(pull, "authentication", reason)]

    def place(self, name: str, index: int, size_bytes: int) -> tuple[int, int] | None:
        """Return from where to where a chunk that comes belongs; None where it is not wanted."""
        pull = self._pulls.get(name)
        if pull is None or not 0 <= index < pull.chunks or index in pull.checksums:
            return None
        begin, end = pull.extent(index)
        return (begin, end) if end - begin == size_bytes else None

    def arrived(self, name: str, number: int, index: int, checksum: int | None, now: float) -> list[Effect]:
        """A message of a subscription has come; ``checksum`` is None where its chunk was not wanted or is broken."""
        pull = self._pulls.get(name)
        if pull is None:
            return []
        if number == pull.number:
            pull.received += 1
            pull.debt = 0
        pull.heard_at = pull.asked_at = now
        if checksum is None:
            pull.bad += 1
            if pull.bad > MOST_BAD_CHUNKS * pull.chunks:
                return self._end(pull, "object_fetch_timed_out", "too many of its chunks arrived broken")
        else:
            pull.have |= 1 << index
            pull.checksums[index] = checksum
        return self._acknowledge(pull)

    def _acknowledge(self, pull: Pull) -> list[Effect]:
        if pull.complete:
            return [pull.want()]
        if pull.received >= pull.most:
            return pull.listen()
        if pull.received - pull.told >= pull.window // 2:
            pull.most = pull.received + pull.credit
            return [Extend(pull.name, pull.number, pull.most), pull.want()]
        return []

    def heard(self, peer: PeerId, record: Record, now: float) -> list[Effect]:
        """Take in what a source says."""
        if not isinstance(record, Whole | Gone | Resume):
            return []
        pull = self._by_number.get(record.pull)
        if pull is None or pull.source != peer:
            return []
        pull.heard_at = now
        if isinstance(record, Gone):
            return self._end(pull, "not_found", record.reason)
        if isinstance(record, Resume):
            pull.asked_at = now
            pull.epoch += 1
            return [pull.want()]
        if not pull.complete:
            return []  # of a round before
        if record.digest == pull.digest():
            return self._end(pull)
        return self._start_over(pull)

    def _start_over(self, pull: Pull) -> list[Effect]:
        if pull.rounds == MOST_ROUNDS:
            return self._end(pull, "object_fetch_timed_out", f"it arrived {MOST_ROUNDS} times, but not whole")
        pull.rounds += 1
        pull.have = 0
        pull.checksums.clear()
        return pull.listen()

    def wake_at(self) -> float:
        """Return when ``tick`` has something to do."""
        if not self._connected:
            return float("inf")
        return min((pull.asked_at + ASK_SECONDS for pull in self._pulls.values()), default=float("inf"))

    def tick(self, now: float) -> list[Effect]:
        """Ask again where nothing came for a while; give up where nothing came for long."""
        effects: list[Effect] = []
        if not self._connected:
            return effects
        for pull in list(self._pulls.values()):
            if now - pull.heard_at >= SILENT_SECONDS:
                effects += self._end(
                    pull, "object_fetch_timed_out", f"its source said nothing for {SILENT_SECONDS:g} s"
                )
            elif now - pull.asked_at >= ASK_SECONDS:
                pull.asked_at = now
                effects += pull.listen()
        return effects

    def sanity_check(self) -> None:
        """State the invariants."""
        assert {pull.pull: pull for pull in self._pulls.values()} == self._by_number
        for pull in self._pulls.values():
            assert pull.have == sum(1 << index for index in pull.checksums)
            assert pull.most - pull.received <= pull.credit, "credit is never exceeded"
