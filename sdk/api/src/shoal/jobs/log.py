"""The log of a submitted job: the last of what its program has printed, in pieces that lie in the control store.

Piece ``n`` has the bytes from ``n * PIECE_BYTES`` on, and lies in slot ``n % SLOTS``, over the one that was there
before. The newest piece is stored again as it grows. So a log takes bounded room, and is there for whoever asks, while
the program runs and after its supervisor is gone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

PIECE_BYTES = 32 * 1024
SLOTS = 64
_NUMBER = struct.Struct("<Q")


class Piece(NamedTuple):
    """One piece; only the newest is shorter than ``PIECE_BYTES``."""

    number: int
    data: bytes

    @property
    def slot(self) -> str:
        """Where it lies."""
        return str(self.number % SLOTS)

    def encode(self) -> bytes:
        """Return the piece as it is stored."""
        return _NUMBER.pack(self.number) + self.data

    @classmethod
    def decode(cls, stored: bytes) -> Piece:
        """Return what ``encode`` encoded."""
        return cls(_NUMBER.unpack_from(stored)[0], stored[_NUMBER.size :])


class Written:
    """What a program has printed, as far as it is kept, and which pieces of that are to be stored.

    What comes faster than it is stored gets lost, oldest first.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, bytearray] = {}
        self._due: dict[int, None] = {}
        self._newest = 0

    def append(self, data: bytes) -> None:
        """Take in what the program has printed."""
        while data:
            piece = self._pieces.setdefault(self._newest, bytearray())
            taken = data[: PIECE_BYTES - len(piece)]
            piece += taken
            data = data[len(taken) :]
            self._due[self._newest] = None
            if len(piece) == PIECE_BYTES:
                self._newest += 1
        while len(self._pieces) > SLOTS:
            oldest = next(iter(self._pieces))
            del self._pieces[oldest]
            self._due.pop(oldest, None)

    def due(self) -> Piece | None:
        """Return the oldest piece that has changed since it was returned last, if there is one."""
        number = next(iter(self._due), None)
        if number is None:
            return None
        del self._due[number]
        return Piece(number, bytes(self._pieces[number]))

    def failed(self, piece: Piece) -> None:
        """A piece could not be stored; it is due again, unless it is not kept any more."""
        if piece.number in self._pieces:
            self._due = dict.fromkeys(sorted({*self._due, piece.number}))


class Reading:
    """How far somebody has read a log; what was not kept until then is told in its place."""

    def __init__(self) -> None:
        self._position = 0

    @property
    def slot(self) -> str:
        """Where the next piece lies, or will."""
        return Piece(self._position // PIECE_BYTES, b"").slot

    def read(self, piece: Piece) -> bytes:
        """Return what a piece adds to what was read; nothing where it is older."""
        start = piece.number * PIECE_BYTES
        new = piece.data[max(0, self._position - start) :]
        missing = start - self._position
        if start + len(piece.data) <= self._position:
            return b""
        self._position = start + len(piece.data)
        return b"[%d bytes are not kept]\n" % missing + new if missing > 0 else new


def whole(pieces: Iterable[Piece]) -> bytes:
    """Return what pieces have together, in order."""
    reading = Reading()
    return b"".join(reading.read(piece) for piece in sorted(pieces))
