"""Slabs: files that small segments share, each in a part of its own.

To map a file costs a process 15 microseconds (to open it, map it, enter its first page, and unmap it), which for a
small object is more than all the rest. A slab is mapped once by each process, for all the objects in it.

A slab is as long as ``SLAB_BYTES``, but takes no more memory than its parts: all are of one size class, and the pages
of each are reserved and given back on their own. So a part is to the store what a file is, but for one thing: a file
that was removed is left to those who still map it, while the pages of a part would be taken from under them. A part
that a process may still use though the node counts it as dead is therefore *lost*: it stays as it is, until its slab
goes. The slab takes nothing new, and goes as soon as it has nothing else. Its memory is counted until then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal_core.protocol.places import located, part_of
from shoal_worker.objects.files import SLAB_BYTES


@dataclass(slots=True)
class Slab:
    """One file, with parts of one size.

    Those are vacant that begin at ``unused_from`` or later, or in ``vacant``. ``taken`` counts the others, which have
    pages; ``lost`` are those of them that a process may still use that counts as dead.
    """

    name: str
    part_bytes: int
    unused_from: int = 0
    vacant: list[int] = field(default_factory=list)
    taken: int = 0
    lost: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Vacated:
    """What is to be removed: a part, or its whole slab, and how many bytes that were lost go with that."""

    place: str
    part_bytes: int = 0
    lost_bytes: int = 0


class Slabs:
    """The slabs of one node."""

    def __init__(self) -> None:
        self._slabs: dict[str, Slab] = {}
        self._open: dict[int, dict[str, Slab]] = {}
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._slabs)

    def lost_bytes(self) -> int:
        """Return what takes memory and is nobody's."""
        return sum(len(slab.lost) * slab.part_bytes for slab in self._slabs.values())

    def is_closed(self, place: str) -> bool:
        """Tell whether a part's slab takes nothing new."""
        return bool(self._slabs[located(place)[0]].lost)

    def take(self, part_bytes: int) -> str:
        """Return the place of a part without pages."""
        slabs = self._open.setdefault(part_bytes, {})
        if not slabs:
            self._drawn += 1
            slab = Slab(f"s{self._drawn}", part_bytes)
            self._slabs[slab.name] = slabs[slab.name] = slab
        slab = next(iter(slabs.values()))
        slab.taken += 1
        if slab.vacant:
            offset = slab.vacant.pop()
        else:
            offset, slab.unused_from = slab.unused_from, slab.unused_from + part_bytes
        if not slab.vacant and slab.unused_from + part_bytes > SLAB_BYTES:
            del slabs[slab.name]
        return part_of(slab.name, offset)

    def vacate(self, place: str) -> Vacated:
        """Nobody uses a part: its pages go, and its slab where that has no other."""
        slab, offset = self._find(place)
        slab.taken -= 1
        if slab.taken == len(slab.lost):
            return self._remove(slab)
        if not slab.lost:
            slab.vacant.append(offset)
            self._open.setdefault(slab.part_bytes, {})[slab.name] = slab
        return Vacated(place, slab.part_bytes)

    def lose(self, place: str) -> Vacated | None:
        """A part has to stay as it is, until its slab goes: that is at once where it has no other."""
        slab, offset = self._find(place)
        slab.lost.add(offset)
        self._open.get(slab.part_bytes, {}).pop(slab.name, None)
        return self._remove(slab) if slab.taken == len(slab.lost) else None

    def _find(self, place: str) -> tuple[Slab, int]:
        name, offset = located(place)
        return self._slabs[name], offset

    def _remove(self, slab: Slab) -> Vacated:
        del self._slabs[slab.name]
        self._open.get(slab.part_bytes, {}).pop(slab.name, None)
        return Vacated(slab.name, lost_bytes=len(slab.lost) * slab.part_bytes)
