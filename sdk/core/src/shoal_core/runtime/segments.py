"""Reading the segments of the node's shared memory.

A segment is a file in the node's folder, mapped read-only. A mapping lives as long as any buffer inside it does; then
the node is told to unpin it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal_core.runtime.serialization import read_segment

Unpin = Callable[[str, int, int], None]
"""Told of the end of a pin: the segment, the pin's serial, and how many bytes were mapped."""


class Reader:
    """Maps segments of one folder (any thread). ``unpin`` is called when the last buffer of one is gone."""

    def __init__(self, folder: Path, unpin: Unpin) -> None:
        self._folder = folder
        self._unpin = unpin
        self._ends: dict[int, _End] = {}

    def read(self, segment: str, size_bytes: int, serial: int) -> tuple[Any, mmap.mmap]:
        """Return the value of a segment, pinned by this serial, and its mapping."""
        # Joining paths takes longer than opening them.
        descriptor = os.open(f"{self._folder}/{segment}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapping = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._ends[serial] = _End(mapping, self._ended, segment, serial)
        return read_segment(memoryview(mapping)), mapping

    def _ended(self, end: _End) -> None:
        del self._ends[end.serial]
        self._unpin(end.segment, end.serial, end.size_bytes)


class _End(weakref.ref[mmap.mmap]):
    """Calls back when a mapping is gone; ``weakref.finalize`` does so too, but takes five times as long."""

    __slots__ = ("segment", "serial", "size_bytes")

    segment: str
    serial: int
    size_bytes: int

    def __new__(cls, mapping: mmap.mmap, ended: Callable[[Any], None], segment: str, serial: int) -> _End:
        end = super().__new__(cls, mapping, ended)
        end.segment, end.serial, end.size_bytes = segment, serial, len(mapping)
        return end

    def __init__(self, *_arguments: object) -> None:
        """``__new__`` has set all."""
