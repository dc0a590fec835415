"""The memory of what is moved: a file of shared memory that is mapped here, or memory of this process.

A file stays mapped for a moment (``mappings`` says why), since one large object after the other comes from and goes
into the same few files.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from shoal_core.mappings import Kept

Memory = Path | memoryview
"""A file of shared memory, or memory of this process."""

KEPT_SECONDS = 2.0
"""After the last use of any; shorter than a node waits for the memory of files that it has removed."""
MADV_POPULATE_WRITE = 23
"""Of Linux; Python has no name for it."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """The bytes of an object; where they are those of a file of its own, its number and the mapping of all of it.

    ``entered``: the mapping was used before, and so its pages are entered.
    """

    view: memoryview
    file: int = 0
    mapping: mmap.mmap | None = None
    entered: bool = True

    def enter(self, begin: int, end: int) -> None:
        """Enter the pages of a part that is about to be written, which is cheaper than a fault for each of them."""
        if self.mapping is not None and not self.entered and begin % mmap.PAGESIZE == 0:
            with contextlib.suppress(OSError):  # kernels before 5.14 do not know how; they take the faults
                self.mapping.madvise(MADV_POPULATE_WRITE, begin, end - begin)


class Mapper:
    """Maps files for one thread, all of them to be written or all only to be read."""

    def __init__(self, *, writable: bool) -> None:
        self._writable = writable
        self._kept = Kept()
        self.wake_at = float("inf")
        """When ``tick`` has something to do."""

    def map(self, memory: Memory, size_bytes: int, offset: int = 0) -> Mapped:
        """Return memory as it is, or that of a file, in which the object begins at ``offset``."""
        if not isinstance(memory, Path):
            return Mapped(memory)
        descriptor = os.open(memory, (os.O_RDWR if self._writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if offset:
                return Mapped(memoryview(self._map(descriptor, size_bytes, offset)))
            file = os.fstat(descriptor)
            kept = self._kept.take(file.st_ino)
            mapping = kept or self._map(descriptor, max(size_bytes, file.st_size))
            return Mapped(memoryview(mapping)[:size_bytes], file.st_ino, mapping, entered=kept is not None)
        finally:
            os.close(descriptor)

    def _map(self, descriptor: int, size_bytes: int, offset: int = 0) -> mmap.mmap:
        access = mmap.PROT_READ | (mmap.PROT_WRITE if self._writable else 0)
        return mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED, prot=access, offset=offset)

    def keep(self, mapped: Mapped, now: float) -> None:
        """Keep what is not used any more, if it is a file; what is dropped lives as long as what refers to it."""
        if mapped.mapping is not None:
            self._kept.keep(mapped.file, mapped.mapping)
            self.wake_at = now + KEPT_SECONDS

    def tick(self, now: float) -> None:
        """Drop all that is kept, once nothing was used for a while."""
        if now >= self.wake_at:
            self.drop()

    def drop(self) -> None:
        """Keep nothing any more."""
        self._kept.drop()
        self.wake_at = float("inf")
