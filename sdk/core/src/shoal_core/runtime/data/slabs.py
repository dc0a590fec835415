"""Mappings of the files that small segments share, each mapped once for all that lie in it.

They are kept as long as they are used, and a moment longer. What refers to memory in one keeps it, too.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shoal_core.runtime.data.copying import address_of

KEPT_SECONDS = 5.0

Later = Callable[[float, Callable[[], None]], None]
"""Has a function called after some seconds (from any thread)."""


class Slab(NamedTuple):
    """A file that is mapped, and where its first byte lies in this process."""

    mapping: mmap.mmap
    address: int


class Slabs:
    """The shared files of one folder, as far as they are mapped (any thread)."""

    def __init__(self, folder: Path, later: Later, *, writable: bool) -> None:
        self._folder = folder
        self._later = later
        self._writable = writable
        self._slabs: dict[str, Slab] = {}
        self._used: set[str] = set()
        self._looking = False

    def get(self, file: str) -> Slab:
        """Return a file, mapped; ``OSError`` where there is none."""
        self._used.add(file)
        slab = self._slabs.get(file)
        if slab is None:
            slab = self._slabs[file] = self._map(file)  # two threads may do so at once; either will do
            if not self._looking:
                self._looking = True
                self._later(KEPT_SECONDS, self._look)
        return slab

    def close(self) -> None:
        """Keep nothing any more."""
        self._slabs = {}

    def _map(self, file: str) -> Slab:
        descriptor = os.open(f"{self._folder}/{file}", (os.O_RDWR if self._writable else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            access = mmap.PROT_READ | (mmap.PROT_WRITE if self._writable else 0)
            mapping = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=access)
        finally:
            os.close(descriptor)
        return Slab(mapping, address_of(memoryview(mapping), writable=False))

    def _look(self) -> None:
        """Drop what was not used since the last look."""
        used, self._used = self._used, set()
        self._slabs = {file: slab for file, slab in list(self._slabs.items()) if file in used}
        self._looking = bool(self._slabs)
        if self._looking:
            self._later(KEPT_SECONDS, self._look)
