"""Writing values into segments that the node has allocated.

The mappings of the files that were written last are kept for a moment (``mappings`` says why). They are written only
while the node says that the file is ours.

What is small lies in a file that it shares with others (``slabs``), which stays mapped.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from shoal_core.mappings import Kept
from shoal_core.protocol.errors import ObjectStoreFullError
from shoal_core.protocol.places import is_part, located
from shoal_core.runtime.data.copying import copy, populate
from shoal_core.runtime.data.serialization import Serialized, segment_bytes, write_segment
from shoal_core.runtime.data.slabs import Later, Slabs

KEPT_SECONDS = 1.0


class Writer:
    """Writes into the segments of one folder (any thread)."""

    def __init__(self, folder: Path, later: Later) -> None:
        self._folder = folder
        self._later = later
        self._slabs = Slabs(folder, later, writable=True)
        self._kept = Kept()
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
            dropped = self._kept.drop()
        for mapping in dropped:
            mapping.close()

    def _map(self, segment: str, size: int) -> tuple[int, mmap.mmap]:
        """Return a mapping of the file of a segment, with its pages entered, and the file's number."""
        try:
            descriptor = os.open(self._folder / segment, os.O_RDWR | os.O_CLOEXEC)
            try:
                file = os.fstat(descriptor)
                with self._lock:
                    mapping = self._kept.take(file.st_ino)
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
        """Keep a mapping for the next value."""
        with self._lock:
            self._written += 1
            dropped = self._kept.keep(inode, mapping)
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
