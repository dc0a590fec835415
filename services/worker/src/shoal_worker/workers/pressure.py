"""Before a node's memory runs out a worker process is ended, so that the machine and all others live.

Otherwise the kernel ends what it likes, perhaps the node or the broker, or the machine comes to a stand. One process
goes at a time: first such as hold much and idle, which are asked to leave and take nothing along that is needed; then
of those that run tasks the one that holds most; an actor, whose state would be lost, only where no task holds much.
``memory_meter`` looks how much is used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from shoal_core.protocol.ids import ProcessId

LEAST_SHARE = 0.02
"""Of the machine's memory: to end a process that holds less would not help."""
LEAVE_SECONDS = 2.0
"""So long nobody is killed while a process leaves that was asked to, and holds much."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a machine or a container, in bytes."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryShort:
    """Input: more than ``threshold`` of the memory is used; ``held`` says how much by each worker process alone."""

    memory: Memory
    threshold: float
    held: Mapping[ProcessId, int]


def choose(short: MemoryShort, *kinds: Collection[ProcessId]) -> ProcessId | None:
    """Return which process to end, of the first kind that has one whose end would help; None if there is none."""
    least = LEAST_SHARE * short.memory.total_bytes
    for candidates in kinds:
        most = max(candidates, key=lambda process: short.held.get(process, 0), default=None)
        if most is not None and short.held.get(most, 0) >= least:
            return most
    return None


def why_killed(short: MemoryShort, process: ProcessId) -> str:
    """Say why a process was ended, and what to do."""
    memory = short.memory
    return (
        f"it was killed, since its node's memory ran out: {_gib(memory.used_bytes)} of {_gib(memory.total_bytes)} GiB "
        f"were used, more than {short.threshold:.0%}, and this process held most, {_gib(short.held[process])} GiB;"
        " have fewer of these run at once (memory=, num_cpus=), or each hold less"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"
