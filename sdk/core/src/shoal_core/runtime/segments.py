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


def read(folder: Path, segment: str, size_bytes: int, unpin: Callable[[str], None]) -> tuple[Any, mmap.mmap]:
    """Return the value of a pinned segment and its mapping; ``unpin`` is called when the last buffer is gone."""
    descriptor = os.open(f"{folder}/{segment}", os.O_RDONLY | os.O_CLOEXEC)  # joining paths takes longer than opening
    try:
        mapping = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    weakref.finalize(mapping, unpin, segment).atexit = False
    return read_segment(memoryview(mapping)), mapping
