"""Reading the segments of the node's shared memory, read-only and without a copy.

A segment is a file in the node's folder, or a part of one. What is read from it lies in *memory* that lives as long as
any buffer inside it does; then the node is told to unpin the segment. That memory is a mapping of the file; of a part
it is an array of bytes over the mapping that all parts of the file share.

A file stays *locked* for as long as it is mapped, and no node uses a file again that it cannot lock for itself. The
kernel ends the lock with the mapping, however the process ends. Pins alone would not do: a file may be that of another
node as well, which knows nothing of ours. And to ask the node for a pin takes a fifth of the time in which 80 MB are
passed to a task. So a reader maps a file at once, and tells the node of its pin meanwhile: a file has another name
before it is used again; so a reader that finds it under the segment's name, once it has the lock, finds the segment.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal_core.protocol.places import is_part, located
from shoal_core.runtime.data.serialization import read_segment
from shoal_core.runtime.data.slabs import Later, Slabs

Memory = mmap.mmap | ctypes.Array[ctypes.c_ubyte]

Unpin = Callable[[str, int, int], None]
"""Told of the end of a pin: the segment, the pin's serial, and how many bytes were mapped."""


class Reader:
    """Maps segments of one folder (any thread). ``unpin`` is called when the last buffer of one is gone."""

    def __init__(self, folder: Path, later: Later, unpin: Unpin) -> None:
        self._folder = folder
        self._slabs = Slabs(folder, later, writable=False)
        self._unpin = unpin

    def read(self, segment: str, place: str, size_bytes: int, serial: int) -> tuple[Any, Memory]:
        """Return the value of a segment, which lies there and is pinned by this serial, and its memory."""
        memory: Memory
        keeps = None
        if is_part(place):
            file, offset = located(place)
            keeps, address = self._slabs.get(file)
            memory = _bytes(-(-size_bytes // mmap.PAGESIZE)).from_address(address + offset)
        else:
            memory = _map_pinned(f"{self._folder}/{place}", size_bytes)
        self._watch(memory, segment, serial, size_bytes, keeps)
        return read_segment(view(memory)), memory

    def map_unasked(self, segment: str, size_bytes: int, serial: int) -> Memory | None:
        """Map a segment that has a file of its own, before the node knows; None where the node has to be asked."""
        memory = _map_unpinned(f"{self._folder}/{segment}", size_bytes)
        if memory is not None:
            self._watch(memory, segment, serial, size_bytes, None)
        return memory

    def _watch(self, memory: Memory, segment: str, serial: int, size_bytes: int, keeps: mmap.mmap | None) -> None:
        end = _End(memory, self._ended, segment, serial, size_bytes, keeps)
        _ends[id(end)] = end

    def close(self) -> None:
        """Keep no file mapped in which nothing is read."""
        self._slabs.close()

    def _ended(self, end: _End) -> None:
        del _ends[id(end)]
        self._unpin(end.segment, end.serial, end.size_bytes)


def view(memory: Memory) -> memoryview:
    """Return the bytes in which a segment lies."""
    return memoryview(memory).cast("B").toreadonly()


def _map_pinned(path: str, size_bytes: int) -> mmap.mmap:
    """Map a file that keeps its name meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _map_locked(descriptor, size_bytes, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _map_unpinned(path: str, size_bytes: int) -> mmap.mmap | None:
    """Map a file; None where it has another name by now, or is being used again."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        mapping = _map_locked(descriptor, size_bytes, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return mapping if os.path.samestat(os.fstat(descriptor), os.stat(path)) else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _map_locked(descriptor: int, size_bytes: int, lock: int) -> mmap.mmap:
    """Lock a file, and map it; the mapping has a copy of the descriptor, and with it the lock."""
    fcntl.flock(descriptor, lock)
    return mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)


@functools.cache
def _bytes(pages: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """Return the type of memory of so many pages; there are few, since what is large has a file of its own."""
    return ctypes.c_ubyte * (pages * mmap.PAGESIZE)


class _End(weakref.ref[Memory]):
    """Calls back when memory is gone; ``weakref.finalize`` does so too, but takes five times as long.

    ``keeps`` is the mapping over which the memory lies.
    """

    __slots__ = ("keeps", "segment", "serial", "size_bytes")

    segment: str
    serial: int
    size_bytes: int
    keeps: mmap.mmap | None

    def __new__(
        cls,
        memory: Memory,
        ended: Callable[[Any], None],
        segment: str,
        serial: int,
        size_bytes: int,
        keeps: mmap.mmap | None,
    ) -> _End:
        end = super().__new__(cls, memory, ended)
        end.segment, end.serial, end.size_bytes, end.keeps = segment, serial, size_bytes, keeps
        return end

    def __init__(self, *_arguments: object) -> None:
        """``__new__`` has set all."""


_ends: dict[int, _End] = {}  # memory that is an array cannot be hashed, and so its references neither
"""Of all memory that lives, which may be longer than the process is part of a cluster."""
