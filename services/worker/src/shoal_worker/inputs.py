"""What the node's core and the parts that act tell each other, beside the messages everyone knows.

Commands go out wrapped in ``effects.Start``; inputs come back through ``Engine.inject``.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import ActorId, JobId, PeerId, ProcessId
from shoal_core.protocol.logs import ListLogs, ReadLog
from shoal_core.protocol.messages import Message
from shoal_worker.objects.files import FileLinked, StoreInput


@dataclass(frozen=True, slots=True)
class StartProcess:
    """Have the template fork a worker process. ``ProcessEnded`` comes back sooner or later, in any case."""

    process_id: ProcessId


@dataclass(frozen=True, slots=True)
class KillProcess:
    """Kill a worker process at once; ``ProcessEnded`` follows when it was reaped."""

    process_id: ProcessId


@dataclass(frozen=True, slots=True)
class KillSoon:
    """Kill a worker process unless ``KillProcess`` comes before: it was asked for its last word."""

    process_id: ProcessId


@dataclass(frozen=True, slots=True)
class RouteOutput:
    """What a worker process prints belongs to this job from now on, and is that of an actor if it was given to one."""

    process_id: ProcessId
    job_id: JobId
    actor: ActorId | None = None


@dataclass(frozen=True, slots=True)
class FetchLogs:
    """List or read logs for an asker; ``LogsFetched`` comes back."""

    token: int
    request: ListLogs | ReadLog


@dataclass(frozen=True, slots=True)
class RemoveEnvironments:
    """Remove the unpacked runtime environments of a job that has ended: none of its processes is left."""

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
class OfferSegment:
    """Let the chunks of a segment be pulled."""

    name: str
    place: str
    size_bytes: int
    chunk_bytes: int


@dataclass(frozen=True, slots=True)
class WithdrawSegment:
    """Nobody pulls a segment any more."""

    name: str


@dataclass(frozen=True, slots=True)
class PullSegment:
    """Pull what ``source`` offers as ``stream`` into the file of a segment. ``Pulled`` comes back, unless cancelled."""

    name: str
    source: PeerId
    stream: str
    size_bytes: int
    chunk_bytes: int


@dataclass(frozen=True, slots=True)
class CancelPull:
    """Pull a segment no more."""

    name: str


@dataclass(frozen=True, slots=True)
class Leave:
    """This node was declared dead: kill everything and end. Only a new incarnation may join again."""

    reason: str


@dataclass(frozen=True, slots=True)
class ProcessEnded:
    """A worker process was reaped, or could not be started.

    ``begun_lease`` and ``begun`` are what its page said: the highest position that was begun, and of which lease.
    ``in_order``: it ended by itself, and with status 0.
    """

    process_id: ProcessId
    reason: str
    begun_lease: int = 0
    begun: int = 0
    in_order: bool = False


@dataclass(frozen=True, slots=True)
class DriverEnded:
    """A driver that was watched is gone."""

    driver: ProcessId


@dataclass(frozen=True, slots=True)
class Pulled:
    """The pull of a segment has ended; ``code`` is the wire code of what went wrong, "" where it is all there."""

    name: str
    code: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class LogsFetched:
    """What is to be answered to who has asked for logs."""

    token: int
    answer: Message | ShoalError


@dataclass(frozen=True, slots=True)
class Suspected:
    """A peer has not acknowledged anything for a while; perhaps it is dead."""

    peer: PeerId


TransferCommand = OfferSegment | WithdrawSegment | PullSegment | CancelPull
NodeCommand = (
    StartProcess
    | KillProcess
    | KillSoon
    | RouteOutput
    | FetchLogs
    | WatchDriver
    | UnwatchDriver
    | TransferCommand
    | Leave
)
NodeInput = ProcessEnded | DriverEnded | StoreInput | FileLinked | Pulled | LogsFetched | Suspected
