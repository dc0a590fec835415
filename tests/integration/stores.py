"""The shared memory of the clusters that a test has started, and of no others: tests run beside each other."""

from __future__ import annotations

from pathlib import Path

import psutil

from shoal.util import state

SHARED_MEMORY = Path("/dev/shm")


def used_bytes() -> int:
    """Return how much of their shared memory the nodes of this driver's cluster count as used: not what is warm."""
    return sum(node["used_bytes"] for node in state.summarize_objects()["nodes"].values())


def stores() -> list[Path]:
    """Return the folders of the nodes that descend from this process."""
    mine = {process.pid for process in psutil.Process().children(recursive=True)}
    return [folder for folder in SHARED_MEMORY.glob("shoal-*") if int(folder.name.split("-")[1]) in mine]
