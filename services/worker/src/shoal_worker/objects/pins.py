"""The pins of a process on a segment: requests may overtake each other, and come twice."""

from __future__ import annotations

MOST_ENDED = 64


class Pins:
    """The pins of one process on one segment, by serial.

    The requests of different threads may overtake each other, and a copy of a request may come after the end of its
    pin. So what ended is remembered: the newest ``MOST_ENDED`` serials, and that all below them have ended too.
    """

    __slots__ = ("_all_ended", "_ended", "held")

    def __init__(self) -> None:
        self.held: set[int] = set()
        self._ended: set[int] = set()
        self._all_ended = 0

    def hold(self, serial: int) -> bool:
        """Hold a pin; False if it has ended already."""
        if serial in self._ended or (serial <= self._all_ended and serial not in self.held):
            return False
        self.held.add(serial)
        return True

    def end(self, serial: int) -> None:
        """A pin is held no more, and never again."""
        self.held.discard(serial)
        if serial > self._all_ended:
            self._ended.add(serial)
        if len(self._ended) > MOST_ENDED:
            self._all_ended = min(self._ended)
            self._ended.remove(self._all_ended)
