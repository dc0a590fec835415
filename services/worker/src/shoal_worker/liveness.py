"""Which owners, jobs and nodes are dead: what a node hears, and what it asks where it may have missed something.

Events are hints. The deaths that another node tells are numbered; after a gap, after a reconnect, and every
``REREAD_SECONDS`` the node reads again what the authorities know: a node about its processes, the control store about
jobs and nodes. Nothing is dead because it is silent: silence only makes the node ask.

An owner is declared dead on the ground of a list of processes only if it was known for one round of reading: a driver
may take part before it has made itself known to its node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from shoal_core.protocol.effects import Answered, Ask, Effect
from shoal_core.protocol.errors import BusError, ServiceError, ShoalError
from shoal_core.protocol.ids import NO_NODE, JobId, NodeId, ProcessId, node_of
from shoal_core.protocol.messages import (
    FinishJob,
    GetJob,
    GetNode,
    GetProcesses,
    JobRecord,
    JobState,
    Message,
    NodeRecord,
    NodeState,
    ProcessDied,
    ProcessList,
)
from shoal_core.protocol.subjects import Subjects

REREAD_SECONDS = 10.0
FINISH_RETRY_SECONDS = 1.0
MOST_DEAD = 10_000

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class AboutProcesses:
    """The context of a question to a node about its processes."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class AboutNode:
    """The context of a question to the control store about a node."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class AboutJob:
    """The context of a question to the control store about a job."""

    job: JobId


@dataclass(frozen=True, slots=True)
class Finishing:
    """The context of telling the control store that a driver died."""

    job: JobId


@dataclass(slots=True)
class Ends:
    """What turned out to be dead."""

    processes: list[ProcessId] = field(default_factory=list)
    jobs: list[JobId] = field(default_factory=list)
    nodes: list[NodeId] = field(default_factory=list)


class Liveness:
    """What one node knows of the deaths of others. What is to be asked is left in ``effects``."""

    def __init__(self, node_id: NodeId, subjects: Subjects) -> None:
        self.effects: list[Effect] = []
        self._node_id = node_id
        self._subjects = subjects
        self._dead: dict[ProcessId, None] = {}
        self._dead_nodes: dict[NodeId, None] = {}
        self._ended_jobs: dict[JobId, None] = {}
        self._sequences: dict[NodeId, int] = {}
        self._watched: set[ProcessId] = set()
        self._finishing: dict[JobId, tuple[FinishJob, float]] = {}
        self._reread_at = 0.0

    # ------------------------------------------------------------------------------- what is known

    def is_dead(self, process: ProcessId) -> bool:
        """Tell whether a process, or its node, is known to be dead."""
        return process in self._dead or node_of(process) in self._dead_nodes

    def has_ended(self, job: JobId) -> bool:
        """Tell whether a job is known to have ended."""
        return job in self._ended_jobs

    def process_died(self, process: ProcessId) -> bool:
        """Enter a death; tell whether it is news."""
        return _enter(self._dead, process)

    def job_ended(self, job: JobId) -> bool:
        """Enter the end of a job; tell whether it is news."""
        self._finishing.pop(job, None)
        return _enter(self._ended_jobs, job)

    def node_died(self, node: NodeId) -> bool:
        """Enter the death of a node; tell whether it is news."""
        self._sequences.pop(node, None)
        return _enter(self._dead_nodes, node)

    # ------------------------------------------------------------------------------- hearing and asking

    def heard(self, event: ProcessDied) -> None:
        """Another node told a death; where one before it was missed, ask for all."""
        node = node_of(event.process_id)
        known = self._sequences.get(node)
        if known is not None and event.sequence > known + 1:
            self._ask_processes(node)
        if known is None or event.sequence > known:
            self._sequences[node] = event.sequence

    def suspect(self, process: ProcessId, jobs: Iterable[JobId]) -> None:
        """A process is silent: ask those who know about it and its jobs."""
        self._watched.add(process)
        self._ask_about({process}, jobs)

    def reread(
        self, owners: Iterable[ProcessId], jobs: Iterable[JobId], now: float, nodes: Iterable[NodeId] = ()
    ) -> None:
        """Ask about everything that matters here (``nodes`` beside those of owners), and about this node itself."""
        self._reread_at = now + REREAD_SECONDS
        self._watched = set(owners)
        self._sequences = {node: n for node, n in self._sequences.items() if node in map(node_of, self._watched)}
        self._ask_about(self._watched, jobs)
        for node in [self._node_id, *sorted({*nodes} - {self._node_id, *map(node_of, self._watched)})]:
            self._ask(self._subjects.gcs("get_node"), GetNode(node_id=node), AboutNode(node))

    def tick(
        self, owners: Iterable[ProcessId], jobs: Iterable[JobId], now: float, nodes: Iterable[NodeId] = ()
    ) -> None:
        """Read again what is due, and repeat what the control store has not heard."""
        if now >= self._reread_at:
            self.reread(owners, jobs, now, nodes)
        for job, (message, at) in list(self._finishing.items()):
            if now >= at:
                self._finish(job, message, now)

    def finish(self, job: JobId, message: str, now: float) -> None:
        """Tell the control store, until it has heard it or says it itself, that a job's driver died."""
        self._finish(job, FinishJob(job_id=job, state=JobState.FAILED, message=message), now)

    def answered(self, answered: Answered) -> Ends:
        """Take an answer in and return what it shows to be dead. What was not answered is asked again in time."""
        context, answer = answered.context, answered.answer
        ends = Ends()
        if isinstance(context, Finishing):
            self._finish_answered(context.job, answer)
        elif isinstance(context, AboutProcesses) and isinstance(answer, ProcessList):
            alive = set(answer.processes)
            ends.processes = [p for p in self._watched if node_of(p) == context.node and p not in alive]
            self._sequences[context.node] = max(answer.sequence, self._sequences.get(context.node, 0))
        elif isinstance(context, AboutNode) and isinstance(answer, NodeRecord) and answer.state is NodeState.DEAD:
            ends.nodes = [context.node]
        elif isinstance(context, AboutJob) and isinstance(answer, JobRecord) and answer.state is not JobState.RUNNING:
            ends.jobs = [context.job]
            ends.processes = [answer.driver]
        return ends

    def _ask_about(self, owners: set[ProcessId], jobs: Iterable[JobId]) -> None:
        for node in sorted({node_of(owner) for owner in owners} - {self._node_id, NO_NODE}):
            self._ask_processes(node)
            self._ask(self._subjects.gcs("get_node"), GetNode(node_id=node), AboutNode(node))
        for job in sorted(set(jobs)):
            self._ask(self._subjects.gcs("get_job"), GetJob(job_id=job), AboutJob(job))

    def _ask_processes(self, node: NodeId) -> None:
        self._ask(self._subjects.node_from_process(node, "processes"), GetProcesses(), AboutProcesses(node))

    def _ask(self, subject: str, message: Message, context: object) -> None:
        self.effects.append(Ask(subject, message, context))

    def _finish(self, job: JobId, message: FinishJob, now: float) -> None:
        self._finishing[job] = (message, now + FINISH_RETRY_SECONDS)
        self._ask(self._subjects.gcs("finish_job"), message, Finishing(job))

    def _finish_answered(self, job: JobId, answer: Message | ShoalError) -> None:
        if not isinstance(answer, BusError | ServiceError):
            self._finishing.pop(job, None)


def _enter(table: dict[K, None], key: K) -> bool:
    """Enter a key into a bounded table that forgets the oldest; tell whether it is new."""
    if key in table:
        return False
    table[key] = None
    if len(table) > MOST_DEAD:
        del table[next(iter(table))]
    return True
