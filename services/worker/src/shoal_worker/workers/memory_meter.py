"""How much of a node's memory is used, looked at all the time; the core is told where it is too much.

What is *used* is what could not be had at once: objects in shared memory count, caches of files do not. In a container
with less memory than the machine it is the container's that counts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from shoal_core.protocol.ids import ProcessId
from shoal_worker.workers.pressure import Memory, MemoryShort

LOOK_SECONDS = 0.25
CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of either version: the folder, the files of the limit and of what is used, and what of that are caches."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def watched(
    threshold: float, pids: Callable[[], Mapping[ProcessId, int]], inject: Callable[[MemoryShort], None]
) -> AsyncIterator[None]:
    """Tell the core whenever too much memory is used; at a threshold of 1 nobody looks. Leaving ends it."""
    if threshold >= 1:
        yield
        return
    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(_keep_looking(threshold, pids, inject))
        try:
            yield
        finally:
            looking.cancel()


async def _keep_looking(
    threshold: float, pids: Callable[[], Mapping[ProcessId, int]], inject: Callable[[MemoryShort], None]
) -> None:
    while True:
        memory = read_memory()
        if memory.used_bytes > threshold * memory.total_bytes:
            inject(MemoryShort(memory, threshold, {process: held_bytes(pid) for process, pid in pids().items()}))
        await asyncio.sleep(LOOK_SECONDS)


def read_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Memory:
    """Return how much memory is used, of this container where it has less than the machine."""
    machine = _fields(proc / "meminfo")
    total = machine["MemTotal:"] * 1024
    memory = Memory(total - machine["MemAvailable:"] * 1024, total)
    for folder, limit, usage, caches in CGROUPS:
        with suppress(OSError, ValueError, KeyError):  # no such container, or one without a limit ("max")
            most = int((cgroup / folder / limit).read_text())
            if most < memory.total_bytes:
                used = int((cgroup / folder / usage).read_text()) - _fields(cgroup / folder / "memory.stat")[caches]
                memory = Memory(used, most)
    return memory


def held_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Return how much memory a process holds that is not shared memory or a file; 0 if it is gone."""
    try:
        _, resident, shared, *_ = (proc / str(pid) / "statm").read_text().split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * PAGE_BYTES


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file that has a name and a number in each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
