"""The shared memory of the clusters that a test has started, and of no others: tests run beside each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.transfers import APART, store_folders
from shoal.util import state

SHARED_MEMORY = Path("/dev/shm")


def used_bytes() -> int:
    """Return how much of their shared memory the nodes of this driver's cluster count as used: not what is warm."""
    return sum(node["used_bytes"] for node in state.summarize_objects()["nodes"].values())


def stores() -> list[Path]:
    """Return the folders of the nodes that descend from this process."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    folders = [*SHARED_MEMORY.glob("shoal-*"), *SHARED_MEMORY.glob(f"{APART}*/*/shoal-*")]
    return [folder for folder in folders if int(folder.name.split("-")[1]) in mine]


@contextlib.contextmanager
def apart(nodes: int) -> Iterator[list[str]]:
    """Make a folder for each node's objects: they lie in no common one, as on machines of their own."""
    with store_folders(nodes) as folders:
        yield folders
        assert not [left for folder in folders for left in Path(folder).iterdir()], "nodes leave nothing behind"
