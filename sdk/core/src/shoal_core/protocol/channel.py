"""The reliable channel between two incarnations: every payload once, in order, over a network that loses messages.

Theory
======

A channel has two ends, one in each process; this module is one end, as a state machine without I/O or clock. It is
driven by five verbs: ``send`` a payload, ``receive`` a frame, ``tick`` when time has passed, ``returned`` after a
reconnect, and ``frames`` to take what must go out now. The rules:

1. **Numbers.** Payloads are numbered from 1. An end accepts only the number it expects; a lower one is a duplicate, a
   higher one shows a gap. Both are dropped (go-back-N: the broker keeps order, so gaps are rare and whole).
2. **Acknowledgements** are cumulative and ride on every frame. With nothing to ride on, a pure frame carries one after
   ``ACK_DELAY_SECONDS`` or ``ACK_BYTES``, or at once when asked. Pure frames are never blocked.
3. **Nothing is resent on suspicion.** A timeout or a reconnect sends a small frame that *asks*, with the highest number
   sent. The broker keeps order, so an end that is asked and lacks a number below it has lost it, and answers *lost*;
   only then is everything unacknowledged sent again. A receiver that is merely slow is not buried in copies. On a
   network without order this costs copies, never correctness.
4. **Windows.** An end has at most the other's advertised window of unacknowledged bytes in flight, or one payload if
   that alone is larger. The windows an end advertises are shares of one ``Budget`` for its whole process. An end that
   the window blocks asks for an acknowledgement rather than wait out the delay.
5. **End.** When the other incarnation has ended, ``end`` gives back every payload that is not wholly acknowledged: it
   may or may not have been received.

A payload above ``piece_bytes`` travels as several numbered pieces; to rules 1 to 4 each piece is a payload, and rule 5
gives back the whole.

Frame: sequence (8 bytes), cumulative acknowledgement (8), advertised window (4), flags (1), then the payload's bytes.
In a pure frame ``sequence`` is the highest number the sender has sent.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass

from shoal_core.protocol.errors import BadFrameError, ChannelError

HEADER = struct.Struct(">QQIB")
DATA, MORE, ASK, LOST, RETURNED = 1, 2, 4, 8, 16

ACK_DELAY_SECONDS = 0.02
ACK_BYTES = 64 * 1024
PROBE_SECONDS = 1.0
PROBE_LIMIT_SECONDS = 5.0
RESEND_GUARD_SECONDS = 0.25
"""A second *lost* for the same number within this time speaks of what the first one already had sent again."""


class Budget:
    """The unacknowledged bytes one process lets all its peers have in flight to it, shared out evenly.

    ``share_bytes`` is what each end advertises now. Each gets ``minimum_bytes`` at least, so with more than
    ``total_bytes / minimum_bytes`` peers the sum grows by the minimum with each.
    """

    __slots__ = ("_members", "minimum_bytes", "share_bytes", "total_bytes")

    def __init__(self, total_bytes: int = 16 * 1024 * 1024, minimum_bytes: int = 32 * 1024) -> None:
        self.total_bytes = total_bytes
        self.minimum_bytes = minimum_bytes
        self._members = 0
        self.share_bytes = total_bytes

    def join(self) -> None:
        """Take part in the sharing."""
        self._resize(self._members + 1)

    def leave(self) -> None:
        """Take part no longer."""
        self._resize(self._members - 1)

    def _resize(self, members: int) -> None:
        self._members = members
        self.share_bytes = max(self.minimum_bytes, self.total_bytes // max(1, members))


@dataclass(slots=True)
class ChannelStatistics:
    """What one end has counted since it was made."""

    resent: int = 0
    duplicates: int = 0
    gaps: int = 0
    probes: int = 0


class _Piece:
    """A numbered part of a payload; ``whole`` is the payload in its last piece, None in the others."""

    __slots__ = ("data", "whole")

    def __init__(self, data: bytes | memoryview, whole: bytes | None) -> None:
        self.data = data
        self.whole = whole


class Channel:
    """One end of a channel. Times are the caller's monotonic clock, in seconds."""

    __slots__ = (
        "_acknowledged",
        "_answer",
        "_asked",
        "_budget",
        "_ended",
        "_gap_told",
        "_heard_at",
        "_highest",
        "_in_flight_bytes",
        "_owed_bytes",
        "_owed_since",
        "_partial",
        "_piece_bytes",
        "_probe_at",
        "_probe_seconds",
        "_received",
        "_resent",
        "_sent",
        "_waiting",
        "_window_bytes",
        "statistics",
    )

    def __init__(self, budget: Budget, *, piece_bytes: int = 1024 * 1024 - HEADER.size) -> None:
        self._budget = budget
        self._piece_bytes = piece_bytes
        self._ended = False
        self.statistics = ChannelStatistics()
        budget.join()
        # Sending: numbers up to _acknowledged are done, then come _sent (in flight), then _waiting.
        self._acknowledged = 0
        self._highest = 0
        self._sent: deque[_Piece] = deque()
        self._waiting: deque[_Piece] = deque()
        self._in_flight_bytes = 0
        self._window_bytes = budget.minimum_bytes
        self._asked = False
        self._probe_at: float | None = None
        self._probe_seconds = PROBE_SECONDS
        self._resent: tuple[int, float] = (-1, 0.0)
        self._heard_at = 0.0
        # Receiving.
        self._received = 0
        self._partial: list[bytes] = []
        self._gap_told = 0
        self._owed_bytes = 0
        self._owed_since: float | None = None
        self._answer: int | None = None  # flags of a pure frame that must go out now

    # -------------------------------------------------------------------------------- what the caller does

    def send(self, payload: bytes) -> int:
        """Queue a payload and return the number that, once acknowledged, means all of it was received."""
        if self._ended:
            raise ChannelError("this channel has ended: its peer is gone, and nothing can be sent to it any more")
        if len(payload) <= self._piece_bytes:
            self._waiting.append(_Piece(payload, payload))
        else:
            view, size = memoryview(payload), self._piece_bytes
            for start in range(0, len(payload), size):
                last = start + size >= len(payload)
                self._waiting.append(_Piece(view[start : start + size], payload if last else None))
        return self.last_number

    def receive(self, frame: bytes, now: float) -> bytes | memoryview | None:
        """Take a frame from the other end; return the payload that it completes, if any.

        Raises ``BadFrameError``, and changes nothing, if the frame cannot come from the other end.
        """
        if self._ended:
            return None
        if len(frame) < HEADER.size:
            raise BadFrameError(f"a frame of {len(frame)} bytes is shorter than its header of {HEADER.size}")
        sequence, acknowledged, window_bytes, flags = HEADER.unpack_from(frame)
        if acknowledged > self._highest:
            raise BadFrameError(f"the peer acknowledged number {acknowledged}, but only {self._highest} were ever sent")
        self._heard_at = now
        if acknowledged >= self._acknowledged:  # a frame with a lower one was overtaken: its news is old
            self._window_bytes = window_bytes
            if acknowledged > self._acknowledged:
                self._release(acknowledged, now)
            if flags & LOST:
                self._resend(now)
        if flags & DATA:
            return self._accept(sequence, flags, frame, now)
        if flags & (ASK | RETURNED):
            self._reply(sequence, flags)
        return None

    def frames(self, now: float) -> list[bytes]:
        """Return what must be published now, in order."""
        frames: list[bytes] = []
        received, share = self._received, self._budget.share_bytes
        while self._waiting and self._admits(self._waiting[0]):
            piece = self._waiting.popleft()
            self._sent.append(piece)
            self._in_flight_bytes += len(piece.data)
            number = self._acknowledged + len(self._sent)
            self._note_sent(number, now)
            flags = DATA if piece.whole is not None else DATA | MORE
            frames.append(HEADER.pack(number, received, share, flags) + piece.data)
        if self._waiting and not self._asked:
            self._asked = True
            self._answer = (self._answer or 0) | ASK
        if self._answer is not None:
            if self._answer or not frames:
                frames.append(HEADER.pack(self._highest, received, share, self._answer))
            self._answer = None
        if frames:
            self._owed_bytes = 0
            self._owed_since = None
        return frames

    def tick(self, now: float) -> None:
        """Do what is due: acknowledge what was received, ask about what was sent and never acknowledged."""
        if self._owed_since is not None and now - self._owed_since >= ACK_DELAY_SECONDS:
            self._answer = self._answer or 0
        if self._probe_at is not None and now >= self._probe_at:
            self.statistics.probes += 1
            self._probe_at = now + self._probe_seconds
            self._probe_seconds = min(2 * self._probe_seconds, PROBE_LIMIT_SECONDS)
            self._answer = (self._answer or 0) | ASK

    def ask(self) -> None:
        """Have the other end acknowledge at once what it has received."""
        if self._sent and not self._ended:
            self._answer = (self._answer or 0) | ASK

    def returned(self, now: float) -> None:
        """This process was cut off from the broker and is back: find out at once what was lost both ways."""
        if self._ended:
            return
        self._heard_at = now
        self._answer = (self._answer or 0) | ASK | RETURNED
        self._probe_seconds = PROBE_SECONDS
        if self._sent:
            self._probe_at = now + PROBE_SECONDS

    def end(self) -> list[bytes]:
        """End the channel; return, in order, the payloads of which the peer may not have received all."""
        if self._ended:
            return []
        self._ended = True
        self._budget.leave()
        payloads = [piece.whole for piece in (*self._sent, *self._waiting) if piece.whole is not None]
        self._sent.clear()
        self._waiting.clear()
        self._partial.clear()
        self._in_flight_bytes = 0
        self._answer = self._probe_at = self._owed_since = None
        return payloads

    # -------------------------------------------------------------------------------- what the caller may see

    @property
    def urgent(self) -> bool:
        """Whether ``frames`` has something to give."""
        if self._answer is not None:
            return True
        return bool(self._waiting) and (not self._asked or self._admits(self._waiting[0]))

    @property
    def owing(self) -> bool:
        """Whether an acknowledgement will be due after the delay."""
        return self._owed_since is not None

    @property
    def last_number(self) -> int:
        """The number of the last payload queued; 0 before the first."""
        return self._acknowledged + len(self._sent) + len(self._waiting)

    @property
    def acknowledged(self) -> int:
        """The number up to which the other end has received everything."""
        return self._acknowledged

    @property
    def in_flight_bytes(self) -> int:
        """Bytes sent and not acknowledged."""
        return self._in_flight_bytes

    @property
    def window_bytes(self) -> int:
        """The window the other end advertised last; the minimum of the budget before it has spoken."""
        return self._window_bytes

    def silent_seconds(self, now: float) -> float:
        """Return how long the other end has said nothing although something waits for its acknowledgement."""
        return now - self._heard_at if self._sent else 0.0

    def sanity_check(self) -> None:
        """State the invariants."""
        assert self._in_flight_bytes == sum(len(piece.data) for piece in self._sent)
        assert not (self._ended and (self._sent or self._waiting or self._answer is not None))
        if not self._ended:
            assert self._acknowledged + len(self._sent) <= self._highest <= self.last_number
            assert self._probe_at is not None or not self._sent, "what is in flight is asked about in time"
            assert self._sent or not self._waiting or self.urgent, "the window never blocks an end for ever"

    # -------------------------------------------------------------------------------- sending

    def _admits(self, piece: _Piece) -> bool:
        """Whether the window has room; one piece may always be in flight, or a large one would never go."""
        return not self._sent or self._in_flight_bytes + len(piece.data) <= self._window_bytes

    def _note_sent(self, number: int, now: float) -> None:
        if number > self._highest:
            self._highest = number
        else:
            self.statistics.resent += 1
        if self._probe_at is None:
            self._probe_at = now + self._probe_seconds
            self._heard_at = max(self._heard_at, now)  # silence counts from when an answer could come

    def _release(self, acknowledged: int, now: float) -> None:
        """Drop what is acknowledged; it may stand in ``_waiting`` again, if the news came after a resend began."""
        count = acknowledged - self._acknowledged
        sent = self._sent
        in_flight = min(count, len(sent))
        for _ in range(in_flight):
            self._in_flight_bytes -= len(sent.popleft().data)
        for _ in range(count - in_flight):
            self._waiting.popleft()
        self._acknowledged = acknowledged
        self._asked = False
        self._probe_seconds = PROBE_SECONDS
        self._probe_at = now + PROBE_SECONDS if sent else None

    def _resend(self, now: float) -> None:
        """Put all that is in flight back in front of what waits."""
        number, at = self._resent
        if not self._sent or (number == self._acknowledged and now - at < RESEND_GUARD_SECONDS):
            return
        self._resent = (self._acknowledged, now)
        self._waiting.extendleft(reversed(self._sent))
        self._sent.clear()
        self._in_flight_bytes = 0
        self._asked = False

    # -------------------------------------------------------------------------------- receiving

    def _accept(self, sequence: int, flags: int, frame: bytes, now: float) -> bytes | memoryview | None:
        expected = self._received + 1
        if sequence > expected:
            self.statistics.gaps += 1
            if self._gap_told != expected:  # once a gap: the frames behind it show the same gap again
                self._gap_told = expected
                self._answer = (self._answer or 0) | LOST
            return None
        if self._owed_since is None:
            self._owed_since = now
        if sequence < expected:
            self.statistics.duplicates += 1
            return None
        self._received = sequence
        self._owed_bytes += len(frame) - HEADER.size
        if self._owed_bytes >= min(ACK_BYTES, self._budget.share_bytes >> 2):
            self._answer = self._answer or 0
        data = memoryview(frame)[HEADER.size :]
        if flags & MORE:
            self._partial.append(bytes(data))
            return None
        if not self._partial:
            return data
        self._partial.append(bytes(data))
        payload = b"".join(self._partial)
        self._partial = []
        return payload

    def _reply(self, highest: int, flags: int) -> None:
        """Answer a frame that asks; one that also says *returned* is asked back, since it may have missed ours."""
        answer = self._answer or 0
        if highest > self._received:
            answer |= LOST
        if flags & RETURNED and self._sent:
            answer |= ASK
        self._answer = answer
