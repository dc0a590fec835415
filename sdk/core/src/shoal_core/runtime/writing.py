"""Writing values into segments that the node has allocated.

To map a segment costs as much as to write it: the kernel enters each page into this process's table, and takes it out
again (measured for 0.8 GB in pages that are warm: 0.13 s, 0.06 s, and the copy itself 0.13 s). A program that puts one
large object after the other gets the same few files again and again, since the node reuses those that were freed last.
So the mappings of the files that were written last are kept for a moment, by the number of the file (its inode), which
stays the same when the node gives it another name. They are written only while the node says that the file is ours.

A kept mapping also keeps the memory of a file that the node has removed; hence the bounds, in bytes and in time.

What is small lies in a file that it shares with others (``slabs``), which stays mapped.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from shoal_core.protocol.errors import ObjectStoreFullError
from shoal_core.protocol.places import is_part, located
from shoal_core.runtime.copying import copy, populate
from shoal_core.runtime.serialization import Serialized, segment_bytes, write_segment
from shoal_core.runtime.slabs import Later, Slabs

LEAST_KEPT_BYTES = 1024 * 1024
"""A smaller mapping costs no more to make than to keep."""
MOST_KEPT_BYTES = 2 * 1024 * 1024 * 1024
MOST_KEPT = 8
KEPT_SECONDS = 1.0


class Writer:
    """Writes into the segments of one folder (any thread)."""

    def __init__(self, folder: Path, later: Later) -> None:
        self._folder = folder
        self._later = later
        self._slabs = Slabs(folder, later, writable=True)
        self._kept: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._written = 0
        self._looking = False

    def write(self, place: str, value: Serialized) -> int:
        """Write a value into the segment that lies there; return its size in bytes."""
        size = segment_bytes(value)
        if is_part(place):
            self._write_part(place, value, size)
            return size
        inode, mapping = self._map(place, size)
        with memoryview(mapping) as target:
            write_segment(value, target, copy)
        self._keep(inode, mapping)
        return size

    def _write_part(self, place: str, value: Serialized, size: int) -> None:
        file, offset = located(place)
        try:
            mapping = self._slabs.get(file).mapping
        except (OSError, ValueError) as error:
            raise _not_mapped(size, self._folder, error) from error
        with memoryview(mapping) as whole, whole[offset : offset + size] as target:
            populate(target)
            write_segment(value, target, copy)

    def close(self) -> None:
        """Keep nothing any more."""
        self._slabs.close()
        self._drop_kept()

    def _drop_kept(self) -> None:
        with self._lock:
            kept, self._kept = self._kept, {}
        for mapping in kept.values():
            mapping.close()

    def _map(self, segment: str, size: int) -> tuple[int, mmap.mmap]:
        """Return a mapping of the file of a segment, with its pages entered, and the file's number."""
        try:
            descriptor = os.open(self._folder / segment, os.O_RDWR | os.O_CLOEXEC)
            try:
                file = os.fstat(descriptor)
                with self._lock:
                    mapping = self._kept.pop(file.st_ino, None)
                if mapping is None:
                    mapping = mmap.mmap(descriptor, max(size, file.st_size), flags=mmap.MAP_SHARED)
                    with memoryview(mapping) as whole:
                        populate(whole)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise _not_mapped(size, self._folder, error) from error
        return file.st_ino, mapping

    def _keep(self, inode: int, mapping: mmap.mmap) -> None:
        """Keep a mapping for the next value, in place of those that were used the longest ago."""
        dropped = []
        with self._lock:
            self._written += 1
            if len(mapping) < LEAST_KEPT_BYTES or len(mapping) > MOST_KEPT_BYTES:
                dropped.append(mapping)
            else:
                self._kept[inode] = mapping
            while len(self._kept) > MOST_KEPT or sum(map(len, self._kept.values())) > MOST_KEPT_BYTES:
                dropped.append(self._kept.pop(next(iter(self._kept))))
            look = bool(self._kept) and not self._looking
            self._looking |= look
            written = self._written
        for one in dropped:
            one.close()
        if look:
            self._later(KEPT_SECONDS, lambda: self._look(written))

    def _look(self, written: int) -> None:
        """Drop all that is kept, once nothing was written for a while."""
        with self._lock:
            idle = self._written == written
            self._looking = not idle and bool(self._kept)
            again, now = self._looking, self._written
        if idle:
            self._drop_kept()
        elif again:
            self._later(KEPT_SECONDS, lambda: self._look(now))


def _not_mapped(size: int, folder: Path, error: Exception) -> ObjectStoreFullError:
    return ObjectStoreFullError(f"{size:,} bytes could not be mapped in {folder}: {error}")
