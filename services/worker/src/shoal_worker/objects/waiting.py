"""Who waits for room in a node's shared memory, in the order of asking.

First come, first served: a small object does not overtake a large one, which would wait for ever. The queue is bounded;
who comes when it is full is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from shoal_core.protocol.errors import ObjectStoreFullError
from shoal_core.protocol.ids import JobId, PeerId, ProcessId
from shoal_core.protocol.messages import Message
from shoal_worker.objects.restoring import Restoration

MOST_WAITING = 4096


@dataclass(eq=False, slots=True)
class Allocation:
    """A process wants to write an object, or will (``ahead``)."""

    size_bytes: int
    capacity_bytes: int
    tokens: list[int]
    process: ProcessId
    serial: int
    job: JobId | None
    ahead: bool = False


@dataclass(eq=False, slots=True)
class Return:
    """A spilled segment is pinned, for a process or a puller; ``answers`` says to which requests, and what they get."""

    size_bytes: int
    capacity_bytes: int
    segment: str
    answers: list[tuple[int, Message]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Arrival:
    """A durable object is to be restored for a process."""

    size_bytes: int
    capacity_bytes: int
    restoration: Restoration


@dataclass(eq=False, slots=True)
class Incoming:
    """An object of ``source`` is to come; ``name`` is its segment, "" until there is room for it.

    What is to be ``linked`` makes no file: it will have that of ``source``.
    """

    size_bytes: int
    capacity_bytes: int
    source: PeerId
    job: JobId | None
    is_copy: bool
    linked: bool = False
    name: str = ""


Wanted = Allocation | Return | Arrival | Incoming


class WaitingQueue:
    """All that wait."""

    def __init__(self) -> None:
        self._queue: deque[Wanted] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Wanted]:
        return iter(self._queue)

    @property
    def first(self) -> Wanted | None:
        """Who is served next."""
        return self._queue[0] if self._queue else None

    @property
    def wanted_bytes(self) -> int:
        """How much room all of them want."""
        return sum(wanted.capacity_bytes for wanted in self._queue)

    def add(self, wanted: Wanted) -> None:
        """Let somebody wait; ``ObjectStoreFullError`` where too many do."""
        if len(self._queue) >= MOST_WAITING:
            raise ObjectStoreFullError(
                f"{MOST_WAITING:,} requests wait for room in the node's shared memory already; put objects one after "
                "the other, or give the node a larger object_store_memory"
            )
        self._queue.append(wanted)

    def remove_first(self) -> Wanted:
        """The first waits no more."""
        return self._queue.popleft()

    def remove(self, unwanted: Callable[[Wanted], bool]) -> list[Wanted]:
        """Take out those who need no room any more, and return them."""
        removed = [wanted for wanted in self._queue if unwanted(wanted)]
        if removed:
            self._queue = deque(wanted for wanted in self._queue if not unwanted(wanted))
        return removed
