"""Writing values into segments that the node has allocated.

To map a segment costs as much as to write it: the kernel enters each page into this process's table, and takes it out
again (measured for 0.8 GB in pages that are warm: 0.13 s, 0.06 s, and the copy itself 0.13 s). A program that puts one
large object after the other gets the same few files again and again, since the node reuses those that were freed last.
So the mappings of the files that were written last are kept for a moment, by the number of the file (its inode), which
stays the same when the node gives it another name. They are written only while the node says that the file is ours.

A kept mapping also keeps the memory of a file that the node has removed; hence the bounds, in bytes and in time.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

from shoal_core.protocol.errors import ObjectStoreFullError
from shoal_core.runtime.copying import STEP_BYTES, copy
from shoal_core.runtime.serialization import Serialized, segment_bytes, write_segment

LEAST_KEPT_BYTES = 1024 * 1024
"""A smaller mapping costs no more to make than to keep."""
MOST_KEPT_BYTES = 2 * 1024 * 1024 * 1024
MOST_KEPT = 8
KEPT_SECONDS = 1.0
MADV_POPULATE_WRITE = 23
"""Of Linux's ``madvise``; Python has no name for it yet."""

Later = Callable[[float, Callable[[], None]], None]
"""Has a function called after some seconds (from any thread)."""


class Writer:
    """Writes into the segments of one folder (any thread)."""

    def __init__(self, folder: Path, later: Later) -> None:
        self._folder = folder
        self._later = later
        self._kept: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._written = 0
        self._looking = False

    def write(self, segment: str, value: Serialized) -> int:
        """Write a value into a segment; return its size in bytes."""
        size = segment_bytes(value)
        inode, mapping = self._map(segment, size)
        with memoryview(mapping) as target:
            write_segment(value, target, copy)
        self._keep(inode, mapping)
        return size

    def close(self) -> None:
        """Keep nothing any more."""
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
                    _populate(mapping)
            finally:
                os.close(descriptor)
        except (OSError, ValueError) as error:
            raise ObjectStoreFullError(f"{size:,} bytes could not be mapped in {self._folder}: {error}") from error
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
            self.close()
        elif again:
            self._later(KEPT_SECONDS, lambda: self._look(now))


def _populate(mapping: mmap.mmap) -> None:
    """Enter all pages of a mapping, in steps; where the kernel cannot (before Linux 5.14), each as it is written to."""
    for start in range(0, len(mapping), STEP_BYTES):
        try:
            mapping.madvise(MADV_POPULATE_WRITE, start, min(STEP_BYTES, len(mapping) - start))
        except OSError as error:
            if error.errno == errno.EINVAL:
                return
            raise
