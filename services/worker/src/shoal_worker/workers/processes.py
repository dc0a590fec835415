"""The worker processes of a node: which are starting, idle, leased, on their way out.

CUDA looks once at which GPUs it may use, whatever the environment says later. So a process serves, from its first lease
on, only leases of the very GPUs of that one, or only leases without any. It also stays in the runtime environment of
its first lease.

A process's life::

    STARTING ──► IDLE ◄──► LEASED           a process belongs to the first job it serves, for ever
        │         │  │        │
        │         │  └────────┼──► LEAVING   asked to end once nobody refers to its objects; never leased again
        └─────────┴───────────┴──► KILLED ──► gone, when the system has reaped it

The table says how many processes are to be started: one for each lease that waits for a process, or will as soon as its
actor is claimed, and enough to keep ``prestart`` of them alive, never more than ``MOST_STARTING`` at a time, later and
later while they fail to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from shoal_core.protocol.ids import JobId, LeaseId, NodeId, ProcessId

MOST_STARTING = 8
IDLE_SECONDS = 60.0
MOST_ENVIRONMENTS = 8
"""Processes of so many runtime environments are kept while they idle."""
START_SECONDS = 60.0
FIRST_BACKOFF_SECONDS = 0.1
LONGEST_BACKOFF_SECONDS = 5.0


class ProcessState(Enum):
    """What a worker process is doing, as its node sees it."""

    STARTING = "starting"
    IDLE = "idle"
    LEASED = "leased"
    LEAVING = "leaving"
    KILLED = "killed"


@dataclass(slots=True)
class WorkerProcess:
    """One worker process. ``since`` is when its state last changed, ``lease`` the one it serves.

    ``gpus`` are the names of those that it is shown for ever, once it has served a lease; ``environment`` is the
    digest of the runtime environment that it has from then on. ``kill_reason`` is there once it is being killed;
    ``out_of_memory``: since the node's memory ran out.
    """

    process_id: ProcessId
    state: ProcessState
    since: float
    job: JobId | None = None
    lease: LeaseId | None = None
    gpus: tuple[str, ...] = ()
    environment: str = ""
    kill_reason: str = ""
    out_of_memory: bool = False


class ProcessTable:
    """All worker processes of one node, by id."""

    def __init__(self, node_id: NodeId, prestart: int) -> None:
        self._node_id = node_id
        self._prestart = prestart
        self._processes: dict[ProcessId, WorkerProcess] = {}
        self._idle: dict[ProcessId, None] = {}
        self.ended_by_cause = dict.fromkeys(("left", "killed", "out_of_memory", "died"), 0)
        self._drawn = 0
        self._failures = 0
        self._start_after = 0.0

    def __iter__(self) -> Iterator[WorkerProcess]:
        return iter(self._processes.values())

    def __len__(self) -> int:
        return len(self._processes)

    @property
    def idle_count(self) -> int:
        """How many processes serve no lease and may."""
        return len(self._idle)

    @property
    def started(self) -> int:
        """How many processes have been started so far."""
        return self._drawn

    @property
    def start_after(self) -> float:
        """When the next process may be started, after one that did not come up."""
        return self._start_after

    def get(self, process_id: ProcessId) -> WorkerProcess | None:
        """Return a process that has not been reaped."""
        return self._processes.get(process_id)

    def to_start(self, waiting: int, claiming: int, now: float) -> int:
        """Return how many processes to start now, with ``waiting`` leases that have none.

        ``claiming`` more will want one in a moment. Those may find one that idles; the others have found none.
        """
        if now < self._start_after:
            return 0
        starting = sum(process.state is ProcessState.STARTING for process in self)
        alive = sum(process.state not in (ProcessState.KILLED, ProcessState.LEAVING) for process in self)
        wanted = waiting + max(0, claiming - len(self._idle))
        missing = max(wanted - starting, self._prestart - alive)
        return max(0, min(missing, MOST_STARTING - starting))

    def start(self, now: float) -> WorkerProcess:
        """Enter a process that is being started. Its id is new since the node's id is an incarnation."""
        self._drawn += 1
        process_id = ProcessId(f"{self._node_id}{self._drawn:08x}")
        process = self._processes[process_id] = WorkerProcess(process_id, ProcessState.STARTING, now)
        return process

    def ready(self, process_id: ProcessId, now: float) -> bool:
        """A process is up; tell whether it was awaited."""
        process = self._processes.get(process_id)
        if process is None or process.state is not ProcessState.STARTING:
            return False
        self._failures = 0
        self._rest(process, now)
        return True

    def take(self, job: JobId, gpus: tuple[str, ...] = (), environment: str = "") -> WorkerProcess | None:
        """Return an idle process: the one of this job, GPUs and environment that idles shortest, else a new one."""
        fresh = None
        for process_id in reversed(self._idle):
            process = self._processes[process_id]
            if process.job == job and process.gpus == gpus and process.environment == environment:
                return process
            if process.job is None and fresh is None:
                fresh = process
        return fresh

    def lease(
        self,
        process: WorkerProcess,
        job: JobId,
        lease: LeaseId,
        now: float,
        gpus: tuple[str, ...] = (),
        environment: str = "",
    ) -> None:
        """Bind an idle process to a lease, and to its job, its GPUs and its environment for ever."""
        assert process.job is None or (process.gpus, process.environment) == (gpus, environment)
        process.gpus, process.environment = gpus, environment
        del self._idle[process.process_id]
        process.state, process.since, process.job, process.lease = ProcessState.LEASED, now, job, lease

    def release(self, process: WorkerProcess, now: float) -> None:
        """The lease of a process is over; it idles."""
        process.lease = None
        self._rest(process, now)

    def leave(self, process: WorkerProcess, now: float) -> None:
        """A process is needed no more, or its actor has ended; it ends when nobody refers to its objects."""
        self._idle.pop(process.process_id, None)
        process.state, process.since, process.lease = ProcessState.LEAVING, now, None

    def kill(self, process: WorkerProcess, reason: str, now: float) -> bool:
        """Enter that a process is being killed; tell whether it was not already."""
        if process.state is ProcessState.KILLED:
            return False
        self._idle.pop(process.process_id, None)
        process.state, process.since, process.kill_reason = ProcessState.KILLED, now, reason
        return True

    def remove(self, process_id: ProcessId, now: float, *, in_order: bool = False) -> WorkerProcess | None:
        """Enter that a process was reaped, and return what it was; ``in_order``: it ended by itself, without error."""
        process = self._processes.pop(process_id, None)
        if process is not None:
            killed = process.state is ProcessState.KILLED
            cause = "out_of_memory" if process.out_of_memory else "killed" if killed else "left" if in_order else "died"
            self.ended_by_cause[cause] += 1
            self._idle.pop(process_id, None)
            if process.state is ProcessState.STARTING:
                backoff = min(FIRST_BACKOFF_SECONDS * 2**self._failures, LONGEST_BACKOFF_SECONDS)
                self._failures = min(self._failures + 1, 10)
                self._start_after = now + backoff
        return process

    def dismiss_idle(self, now: float) -> list[WorkerProcess]:
        """Choose the processes of jobs that idled too long, beyond ``prestart``; they are LEAVING from now on.

        So are at once those of the environments that were not used for longest, beyond ``MOST_ENVIRONMENTS`` of them: a
        job may have one for each task.
        """
        idle = [self._processes[process_id] for process_id in self._idle]
        recent = dict.fromkeys(process.environment for process in reversed(idle) if process.environment)
        stale = set(list(recent)[MOST_ENVIRONMENTS:])
        chosen = [process for process in idle if process.environment in stale]
        spare = len(idle) - self._prestart
        for process in idle:
            if spare <= len(chosen) or now - process.since < IDLE_SECONDS:
                break
            if process.job is not None and process.environment not in stale:
                chosen.append(process)
        for process in chosen:
            self.leave(process, now)
        return chosen

    def overdue(self, now: float) -> list[WorkerProcess]:
        """Return the processes that have been starting for too long."""
        return [p for p in self if p.state is ProcessState.STARTING and now - p.since >= START_SECONDS]

    def _rest(self, process: WorkerProcess, now: float) -> None:
        process.state, process.since = ProcessState.IDLE, now
        self._idle[process.process_id] = None

    def sanity_check(self) -> None:
        """State the invariants."""
        assert {*self._idle} == {p.process_id for p in self if p.state is ProcessState.IDLE}
        for process in self:
            assert process.state is not ProcessState.LEASED or process.lease is not None
            assert process.lease is None or process.state in (ProcessState.LEASED, ProcessState.KILLED)
            assert process.job is not None or process.lease is None
