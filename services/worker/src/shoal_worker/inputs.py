"""What the node's core and the parts that act tell each other, beside the messages everyone knows.

Commands go out wrapped in ``effects.Start``; inputs come back through ``Engine.inject``.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import JobId, PeerId, ProcessId
from shoal_worker.restoring import Restoration


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Have the template fork a worker process. ``ProcessEnded`` comes back sooner or later, in any case."""

    process_id: ProcessId


@dataclass(frozen=True, slots=True)
class KillProcess:
    """Kill a worker process at once; ``ProcessEnded`` follows when it was reaped."""

    process_id: ProcessId


@dataclass(frozen=True, slots=True)
class RouteOutput:
    """What a worker process prints belongs to this job from now on."""

    process_id: ProcessId
    job_id: JobId


@dataclass(frozen=True, slots=True)
class WatchDriver:
    """Watch a driver's process on this machine; ``DriverEnded`` comes back when it is gone."""

    driver: ProcessId
    pid: int


@dataclass(frozen=True, slots=True)
class UnwatchDriver:
    """The job of a driver has ended: its process need not be watched any more."""

    driver: ProcessId


@dataclass(frozen=True, slots=True)
class Leave:
    """This node was declared dead: kill everything and end. Only a new incarnation may join again."""

    reason: str


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A worker process was reaped, or could not be started.

    ``begun_lease`` and ``begun`` are what its page said: the highest position that was begun, and of which lease.
    """

    process_id: ProcessId
    reason: str
    begun_lease: int = 0
    begun: int = 0


@dataclass(frozen=True, slots=True)
class DriverEnded:
    """A driver that was watched is gone."""

    driver: ProcessId


@dataclass(frozen=True, slots=True)
class FileCreated:
    """A segment's file is made and its pages are reserved; ``error`` says why not."""

    name: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class CopyFound:
    """What the durable tier says of an object that is to be restored: its size, or the error."""

    restoration: Restoration
    size_bytes: int
    error: ShoalError | None = None


@dataclass(frozen=True, slots=True)
class FileFilled:
    """A file holds a durable object now; ``error`` says why not."""

    name: str
    error: ShoalError | None = None


@dataclass(frozen=True, slots=True)
class Suspected:
    """A peer has not acknowledged anything for a while; perhaps it is dead."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Drain:
    """Grant nothing any more: the node is about to leave."""


NodeCommand = StartProcess | KillProcess | RouteOutput | WatchDriver | UnwatchDriver | Leave
NodeInput = ProcessEnded | DriverEnded | FileCreated | CopyFound | FileFilled | Suspected | Drain
