"""Writable mappings that a process keeps for a moment, since the node is likely to hand it the same file again.

Building the page tables of a large file takes as long as copying into it does (measured: 8 GB/s for either, so that a
put is half as fast as a copy). The node keeps the files of freed objects warm, under new names; a process that writes
one large object after the other gets the same files, which it knows by device and inode, and finds them mapped.

Only who was granted a segment writes to it, so a mapping that is merely kept does no harm. But it holds the file's
pages even after the node has removed the file: hence at most ``MOST_BYTES`` of them, and none that was idle for
``IDLE_SECONDS``.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

MOST_BYTES = 2 * 1024**3
LEAST_FILE_BYTES = 1024 * 1024
"""Smaller files are mapped anew each time, which costs little."""
IDLE_SECONDS = 1.0

STEP_BYTES = 16 * 1024 * 1024
MADV_POPULATE_WRITE = 23
"""Of Linux's ``madvise``; Python has no name for it yet."""
File = tuple[int, int]
"""A file's device and inode, which stay its own whatever it is called."""


class WarmMappings:
    """The writable mappings of one process, those in use aside (any thread)."""

    def __init__(self) -> None:
        self._kept: dict[File, tuple[mmap.mmap, float]] = {}
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """How much is kept mapped."""
        with self._lock:
            return sum(len(mapping) for mapping, _ in self._kept.values())

    @contextmanager
    def mapped(self, descriptor: int, size_bytes: int) -> Iterator[memoryview]:
        """Lend the first bytes of a file for writing, with all its pages in place."""
        status = os.fstat(descriptor)
        file = (status.st_dev, status.st_ino)
        with self._lock:
            kept = self._kept.pop(file, None)
        mapping = _map(descriptor, status.st_size, size_bytes) if kept is None else kept[0]
        with memoryview(mapping) as whole, whole[:size_bytes] as target:
            yield target  # if that fails, whoever holds the error may hold views: the mapping goes with the last
        self._keep(file, mapping)

    def drop_idle(self, now: float | None = None) -> bool:
        """Unmap what was not used for a while, or all without a time; tell whether any is left."""
        with self._lock:
            idle = [file for file, (_, since) in self._kept.items() if now is None or now - since >= IDLE_SECONDS]
            dropped = [self._kept.pop(file)[0] for file in idle]
            left = bool(self._kept)
        for mapping in dropped:
            mapping.close()
        return left

    def _keep(self, file: File, mapping: mmap.mmap) -> None:
        dropped = []
        with self._lock:
            if LEAST_FILE_BYTES <= len(mapping) <= MOST_BYTES:
                self._kept[file] = (mapping, time.monotonic())
            else:
                dropped.append(mapping)
            while sum(len(one) for one, _ in self._kept.values()) > MOST_BYTES:
                dropped.append(self._kept.pop(next(iter(self._kept)))[0])
        for one in dropped:
            one.close()


def _map(descriptor: int, file_bytes: int, size_bytes: int) -> mmap.mmap:
    """Map a file whole where it may be kept, else only what is asked for."""
    length = file_bytes if LEAST_FILE_BYTES <= file_bytes <= MOST_BYTES else size_bytes
    mapping = mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED)
    _populate(mapping)
    return mapping


def _populate(mapping: mmap.mmap) -> None:
    """Put all pages in place, in steps, so that other threads get their turn: gigabytes can take many seconds.

    Where the kernel cannot (before Linux 5.14), pages come as they are written to.
    """
    for start in range(0, len(mapping), STEP_BYTES):
        try:
            mapping.madvise(MADV_POPULATE_WRITE, start, min(STEP_BYTES, len(mapping) - start))
        except OSError as error:
            if error.errno == errno.EINVAL:
                return
            raise
