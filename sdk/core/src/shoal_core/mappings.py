"""Mappings that are kept for a moment after their use, for whoever maps the same files next.

To map a large file costs as much as to write it: the kernel enters each page into this process's table, and takes it
out again (measured for 0.8 GB in pages that are warm: 0.13 s, 0.06 s, and the copy itself 0.13 s). Who writes one large
object after the other gets the same few files again and again, since a node reuses those that were freed last. A file
is known by its number (its inode), which stays the same when the node gives it another name.

A kept mapping also keeps the memory of a file that the node has removed; hence the bounds here, and one in time, which
is for whoever keeps.
"""

from __future__ import annotations

import mmap

LEAST_KEPT_BYTES = 1024 * 1024
"""A smaller mapping costs no more to make than to keep."""
MOST_KEPT_BYTES = 2 * 1024 * 1024 * 1024
MOST_KEPT = 8


class Kept:
    """Mappings that nobody uses now, by the numbers of their files; for one thread at a time."""

    def __init__(self) -> None:
        self._mappings: dict[int, mmap.mmap] = {}

    def __len__(self) -> int:
        return len(self._mappings)

    def take(self, file: int) -> mmap.mmap | None:
        """Return the mapping of a file, which is no longer kept, if there is one."""
        return self._mappings.pop(file, None)

    def keep(self, file: int, mapping: mmap.mmap) -> list[mmap.mmap]:
        """Keep a mapping in place of those that were used the longest ago; return what is not kept any more."""
        if not LEAST_KEPT_BYTES <= len(mapping) <= MOST_KEPT_BYTES:
            return [mapping]
        before = self._mappings.pop(file, None)
        dropped = [] if before is None else [before]
        self._mappings[file] = mapping
        while len(self._mappings) > MOST_KEPT or sum(map(len, self._mappings.values())) > MOST_KEPT_BYTES:
            dropped.append(self._mappings.pop(next(iter(self._mappings))))
        return dropped

    def drop(self) -> list[mmap.mmap]:
        """Keep nothing any more; return what was kept."""
        dropped = [*self._mappings.values()]
        self._mappings.clear()
        return dropped
