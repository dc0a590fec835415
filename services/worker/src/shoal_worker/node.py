"""The node: the authority on one machine's resources, worker processes and shared memory, as a pure core.

Schedulers ask it for leases, owners give them back, processes allocate and pin segments; it tells what is free, and
who died. It is put together from tables that each know one thing::

    NodeCore ── Workforce ── LeaseTable ── GpuTable
       │            ├─────── ProcessTable
       │            └─────── ActorTable
       ├─────── BundleTable ── LeaseTable
       ├─────── SharedMemory ── ObjectStore, Loans, Copies
       ├─────── Inquiries ── Holdings, RecentTasks    (who holds what, what has run)
       ├─────── TaskInquiries     (how far a task is)
       ├─────── ReportedMetrics   (what processes have counted)
       └─────── Liveness          (who elsewhere is dead)

What it says of itself goes out as ``NodeAnnouncement``: at once when something changed, but not more often than every
``COALESCE_SECONDS`` (less often with many bundles, all of which it tells), and every ``ANNOUNCE_SECONDS`` in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from shoal_core.protocol.actors import ActorChanged
from shoal_core.protocol.effects import (
    Answered,
    Connected,
    Effect,
    Event,
    Forget,
    Publish,
    Received,
    Reply,
    Request,
    Start,
    WakeAt,
)
from shoal_core.protocol.errors import (
    DeclaredDeadError,
    InvalidRequestError,
    NotFoundError,
    ShoalError,
)
from shoal_core.protocol.groups import BundlesPrepared, GroupChanged, PrepareBundles, ReturnBundles
from shoal_core.protocol.ids import JobId, NodeId, PeerId, ProcessId, SlotId, node_of
from shoal_core.protocol.logs import ListLogs, ReadLog
from shoal_core.protocol.messages import (
    AttachDriver,
    Done,
    DrainNode,
    GetProcesses,
    JobFinished,
    Message,
    NodeAnnouncement,
    NodeDescription,
    NodeDied,
    ProcessDied,
    ProcessList,
)
from shoal_core.protocol.records import (
    ActorLeft,
    ActorReady,
    LeaseReturned,
    MetricsReported,
    ObjectsReported,
    Record,
    TaskReported,
    TasksReported,
    WorkerBlocked,
    WorkerReady,
)
from shoal_core.protocol.scheduling import ExplainTask, LeaseAnswer, LeaseRequest, ListTasks, RecallLeases
from shoal_core.protocol.storage import ListObjects
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.transfer.records import CHUNK_BYTES
from shoal_worker.actors import About, ActorTable, Hosted, Verdict
from shoal_worker.bundles import AboutGroup, BundleTable
from shoal_worker.inputs import (
    DriverEnded,
    FetchLogs,
    Leave,
    LogsFetched,
    ProcessEnded,
    Pulled,
    RemoveEnvironments,
    Suspected,
    UnwatchDriver,
    WatchDriver,
)
from shoal_worker.inquiries import Inquiries, Topic
from shoal_worker.leases import Lease, LeaseTable
from shoal_worker.liveness import Ends, Liveness
from shoal_worker.objects.copies import AboutLoan
from shoal_worker.objects.files import FileLinked, StoreInput
from shoal_worker.objects.holdings import DRIVER, WORKER, Holdings
from shoal_worker.objects.shared_memory import SegmentRecord, SharedMemory
from shoal_worker.objects.store import ObjectStore
from shoal_worker.recent_tasks import RecentTasks
from shoal_worker.reported import ReportedMetrics
from shoal_worker.task_inquiries import TaskInquiries
from shoal_worker.workers.pressure import MemoryShort
from shoal_worker.workers.processes import ProcessState, ProcessTable
from shoal_worker.workers.workforce import Workforce

ANNOUNCE_SECONDS = 1.0
COALESCE_SECONDS, COALESCE_SECONDS_FOR_A_BUNDLE = 0.01, 0.0003
OWNER_DIED = "its owner has died"


class NodeCore:
    """One node, which knows nothing of sockets, files and clocks."""

    def __init__(
        self,
        description: NodeDescription,
        subjects: Subjects,
        *,
        gpu_names: Sequence[str] = (),
        prestart: int = 0,
        warm_bytes: int = 0,
        shared_bytes: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
        boot_id: str = "",
    ) -> None:
        self.node_id: NodeId = description.node_id
        self.description = description
        self.leases = LeaseTable(description.total, gpu_names)
        self.processes = ProcessTable(self.node_id, prestart)
        self.liveness = Liveness(self.node_id, subjects)
        self.store = ObjectStore(self.node_id, description.object_store_bytes, warm_bytes, shared_bytes)
        self.segments = self.store.segments
        self.memory = SharedMemory(
            self.node_id, subjects, self.store, self.liveness, self._require_local, chunk_bytes, boot_id
        )
        self.inquiries = Inquiries(self.node_id)
        self.holdings = Holdings(self.node_id, self.segments)
        self.recent_tasks = RecentTasks(self.node_id)
        self.task_inquiries = TaskInquiries()
        self.actors = ActorTable(self.node_id, subjects)
        self.bundles = BundleTable(self.node_id, subjects, self.leases)
        self.reported = ReportedMetrics()
        self.workforce = Workforce(self.leases, self.processes, self.actors)
        self._parts = (self.liveness, self.actors, self.bundles, self.inquiries, self.task_inquiries)
        self.drivers: dict[ProcessId, JobId] = {}
        self._subjects = subjects
        self._effects: list[Effect] = []
        self._deaths = 0
        self._sequence = 0
        self._announced_at = float("-inf")
        self._wake_at = float("inf")
        self._requests: dict[type[Message], Callable[..., Message | ShoalError | None]] = {
            LeaseRequest: self._lease,
            RecallLeases: self._recall,
            PrepareBundles: self._prepare,
            ReturnBundles: self._return_bundles,
            DrainNode: self._drain,
            **self.memory.requests,
            AttachDriver: self._attach_driver,
            GetProcesses: self._list_processes,
            ListObjects: partial(self._inquire, self.holdings),
            ListTasks: partial(self._inquire, self.recent_tasks),
            ExplainTask: self._explain_task,
            ListLogs: self._fetch_logs,
            ReadLog: self._fetch_logs,
        }

    # ------------------------------------------------------------------------------- the engine's two verbs

    def handle(self, message: object, now: float) -> list[Effect]:
        """Take one input; see ``protocol.effects`` and ``inputs`` for what there is."""
        if isinstance(message, Request):
            self._request(message, now)
        elif isinstance(message, Received):
            for record in message.records:
                self._record(message.peer, record, now)
        elif isinstance(message, Event):
            self._event(message.message, now)
        elif isinstance(message, Answered) and isinstance(message.context, About):
            if (judged := self.actors.answered(message, now)) is not None:
                self._judge(*judged, now)
        elif isinstance(message, Answered) and isinstance(message.context, AboutGroup):
            self._bundles_changed(self.bundles.answered(message), now)
        elif isinstance(message, Answered) and isinstance(message.context, AboutLoan):
            self.memory.lent(message, now)
        elif isinstance(message, Answered):
            self._ends(self.liveness.answered(message), now)
        elif isinstance(message, Connected):
            if message.connected:
                self.workforce.staff(now)
                self.liveness.reread(self._owners(), self._jobs(), now, self.memory.nodes())
                self.workforce.changed = True
        else:
            self._input(message, now)
        return self._flush(now)

    def tick(self, now: float) -> list[Effect]:
        """Do what is due: announcing, staffing, reading again what others know."""
        self._wake_at = float("inf")
        self.workforce.tend(now)
        self.inquiries.tick(now)
        self.task_inquiries.tick(now)
        self.actors.tick(now)
        self.bundles.tick(now)
        self.memory.tick(now)
        self.liveness.tick(self._owners(), self._jobs(), now, self.memory.nodes())
        return self._flush(now)

    def _flush(self, now: float) -> list[Effect]:
        effects = self._effects
        self._effects = []
        if self.workforce.effects:
            effects += self.workforce.effects
            self.workforce.effects = []
        effects += self.memory.effects(now)
        for part in self._parts:
            if part.effects:
                effects += part.effects
                part.effects = []
        announce_at = self._announce_at()
        if now >= announce_at:
            effects.append(self._announcement(now))
            announce_at = self._announce_at()
        asked_until = min(self.inquiries.next_deadline, self.task_inquiries.next_deadline)
        wake_at = min(announce_at, self.memory.wake_at(), asked_until)
        if self.workforce.waiting and self.processes.start_after > now:
            wake_at = min(wake_at, self.processes.start_after)
        if wake_at < self._wake_at:
            self._wake_at = wake_at
            effects.append(WakeAt(wake_at))
        return effects

    # ------------------------------------------------------------------------------- announcing

    def _announce_at(self) -> float:
        if not self.workforce.changed:
            return self._announced_at + ANNOUNCE_SECONDS
        return self._announced_at + COALESCE_SECONDS + COALESCE_SECONDS_FOR_A_BUNDLE * len(self.bundles)

    def _announcement(self, now: float) -> Publish:
        self._sequence += 1
        self._announced_at = now
        self.workforce.changed = False
        announcement = NodeAnnouncement(
            node_id=self.node_id,
            sequence=self._sequence,
            total=self.leases.total,
            free=self.leases.free,
            labels=self.description.labels,
            draining=self.workforce.draining,
            leases=self.leases.summaries(),
            bundles=self.bundles.summaries(),
            held_by_actors=self.leases.held_by_actors(),
            worker_processes=len(self.processes),
            actors=len(self.actors),
        )
        return Publish(self._subjects.event(Role.NODE, self.node_id, "announce"), announcement)

    # ------------------------------------------------------------------------------- requests

    def _request(self, request: Request, now: float) -> None:
        try:
            answer = self._requests[type(request.message)](request.message, request.token, now)
        except ShoalError as error:
            answer = error
        if answer is not None:
            self._effects.append(Reply(request.token, answer))

    def _lease(self, request: LeaseRequest, token: int, now: float) -> LeaseAnswer:
        reason = ""
        if self.liveness.has_ended(request.job_id) or (request.actor is None and self.liveness.is_dead(request.owner)):
            reason = "the owner is dead"
        if reason:
            granted: list[SlotId] = []
            refused = request.slots
        else:
            granted, refused, reason = self.workforce.grant(request, now)
        self._sequence += 1
        return LeaseAnswer(
            node_id=self.node_id,
            granted=granted,
            refused=refused,
            reason=reason,
            free=self.leases.free_in(request.bundle),
            sequence=self._sequence,
        )

    def _prepare(self, request: PrepareBundles, token: int, now: float) -> BundlesPrepared:
        reason = "the node is leaving" if self.workforce.draining else self.bundles.prepare(request, now)
        self.workforce.changed = self.workforce.changed or not reason
        self._sequence += 1
        return BundlesPrepared(
            node_id=self.node_id,
            granted=not reason,
            reason=reason,
            free=self.leases.free,
            sequence=self._sequence,
        )

    def _return_bundles(self, request: ReturnBundles, token: int, now: float) -> Done:
        if self.bundles.give_back(request):
            self.workforce.changed = True
        return Done()

    def _bundles_changed(self, ended: list[Lease] | None, now: float) -> None:
        """What is known of a group's record has changed something here; these leases go."""
        if ended is not None:
            self.workforce.changed = True
        if ended:
            self.workforce.group_removed(ended, now)

    def _recall(self, request: RecallLeases, token: int, now: float) -> Done:
        self.workforce.recall(request)
        return Done()

    def _drain(self, request: DrainNode, token: int, now: float) -> Done:
        self.workforce.drain()
        return Done()

    def _attach_driver(self, request: AttachDriver, token: int, now: float) -> Done:
        if request.machine_id != self.description.machine_id:
            raise InvalidRequestError(
                f"driver {request.driver} runs on machine {request.machine_id}, but node {self.node_id} is on "
                f"{self.description.machine_id}; a driver attaches to a node of its own machine only"
            )
        if self.liveness.is_dead(request.driver) or self.liveness.has_ended(request.job_id):
            raise DeclaredDeadError(f"driver {request.driver} or its job {request.job_id} has ended; start a new job")
        if request.driver not in self.drivers:
            self.drivers[request.driver] = request.job_id
            self._effects.append(Start(WatchDriver(request.driver, request.pid)))
        return Done()

    def _list_processes(self, request: GetProcesses, token: int, now: float) -> ProcessList:
        processes = [*(process.process_id for process in self.processes), *self.drivers]
        return ProcessList(sequence=self._deaths, processes=processes)

    def _inquire(self, topic: Topic[Any], request: ListObjects | ListTasks, token: int, now: float) -> None:
        """Ask all processes that are up; the asker is answered when they are done."""
        unable = (ProcessState.STARTING, ProcessState.KILLED)
        asked = {process.process_id: WORKER for process in self.processes if process.state not in unable}
        self.inquiries.open(topic, request, token, asked | dict.fromkeys(self.drivers, DRIVER), now)

    def _explain_task(self, request: ExplainTask, token: int, now: float) -> None:
        """Ask the task's owner, if it lives here."""
        if request.owner not in self.drivers and self.processes.get(request.owner) is None:
            raise NotFoundError(f"the task's owner {request.owner} does not live on node {self.node_id}")
        self.task_inquiries.open(request, token, now)

    def _fetch_logs(self, request: ListLogs | ReadLog, token: int, now: float) -> None:
        self._effects.append(Start(FetchLogs(token, request)))

    def _require_local(self, process: ProcessId) -> JobId | None:
        """Only a process whose death this node will see may hold something here; return its job."""
        if process in self.drivers:
            return self.drivers[process]
        worker = self.processes.get(process)
        if worker is None:
            raise DeclaredDeadError(
                f"process {process} is not known to live on node {self.node_id}: "
                "it has died, or it is a driver that has not attached itself yet"
            )
        return worker.job

    # ------------------------------------------------------------------------------- records

    def _record(self, peer: PeerId, record: Record, now: float) -> None:
        process = ProcessId(peer)
        if isinstance(record, LeaseReturned):
            self.workforce.returned(process, record.lease, record.kill, now, spent=record.spent)
        elif isinstance(record, WorkerBlocked):
            self.workforce.blocked(process, record.lease, record.blocked)
        elif isinstance(record, WorkerReady):
            self.workforce.ready(process, now)
        elif isinstance(record, ActorReady):
            if self.workforce.made_by(process, record.actor, record.incarnation) is not None:
                self.actors.ready(record, process, now)
        elif isinstance(record, ActorLeft):
            hosted = self.workforce.made_by(process, record.actor, record.incarnation)
            if hosted is not None:
                self.workforce.actor_left(hosted, record.reason, now, record.error)
        elif isinstance(record, SegmentRecord):
            self.memory.said(peer, record, now)
        elif isinstance(record, TasksReported) and not record.inquiry:
            self.recent_tasks.left(process, record)
            self.workforce.last_word(process)
        elif isinstance(record, ObjectsReported | TasksReported):
            self.inquiries.reported(process, record, now)
        elif isinstance(record, TaskReported):
            self.task_inquiries.reported(process, record)
        elif isinstance(record, MetricsReported):
            self.reported.take(process, record)

    def _judge(self, hosted: Hosted, verdict: Verdict, now: float) -> None:
        """Do what the control store's answer means for an incarnation; who owns it is known only from then on."""
        if verdict is Verdict.START and hosted.owner is not None and self.liveness.is_dead(hosted.owner):
            self.workforce.end_actor(hosted, OWNER_DIED, now, final=True, after_last_word=True)
        else:
            self.workforce.judge(hosted, verdict, "the control store does not want it any more", now)

    # ------------------------------------------------------------------------------- events and own inputs

    def _event(self, event: Message, now: float) -> None:
        if isinstance(event, ProcessDied) and node_of(event.process_id) != self.node_id:
            self.liveness.heard(event)
            self._ends(Ends(processes=[event.process_id]), now)
        elif isinstance(event, JobFinished):
            self._ends(Ends(jobs=[event.job_id], processes=[event.driver]), now)
        elif isinstance(event, NodeDied):
            self._ends(Ends(nodes=[event.node_id]), now)
        elif isinstance(event, GroupChanged):
            self._bundles_changed(self.bundles.changed(event), now)
        elif isinstance(event, ActorChanged):
            for hosted, verdict in self.actors.changed(event):
                reason = event.death.reason if event.death is not None else "it is started anew"
                self.workforce.judge(hosted, verdict, reason, now)

    def _input(self, message: object, now: float) -> None:
        if isinstance(message, ProcessEnded):
            if (process := self.workforce.process_ended(message, now)) is not None:
                self._local_death(message.process_id, message.reason, now)
                self.workforce.staff(now)
                if process.job is not None and self.liveness.has_ended(process.job):
                    self._tidy(process.job)
        elif isinstance(message, DriverEnded):
            self._driver_ended(message.driver, now)
        elif isinstance(message, MemoryShort):
            self.workforce.relieve(message, now)
        elif isinstance(message, StoreInput | FileLinked | Pulled):
            self.memory.take(message, now)
        elif isinstance(message, LogsFetched):
            self._effects.append(Reply(message.token, message.answer))
        elif isinstance(message, Suspected):
            jobs = {lease.job for lease in self.leases.of_owner(ProcessId(message.peer))}
            self.liveness.suspect(ProcessId(message.peer), jobs)
        else:
            raise TypeError(f"a node has no input {message!r}")

    # ------------------------------------------------------------------------------- deaths

    def _driver_ended(self, driver: ProcessId, now: float) -> None:
        job = self.drivers.pop(driver, None)
        if job is None:
            return
        self._local_death(driver, "the driver process ended", now)
        self._ends(Ends(jobs=[job]), now)
        self.liveness.finish(job, "the driver process died", now)

    def _local_death(self, process: ProcessId, reason: str, now: float) -> None:
        """A process of this node is gone: tell everyone, and let go of what it held."""
        self._deaths += 1
        died = ProcessDied(sequence=self._deaths, process_id=process, reason=reason)
        self._effects.append(Publish(self._subjects.event(Role.NODE, self.node_id, "process_died"), died))
        self.inquiries.process_died(process, now)
        self.task_inquiries.process_died(process)
        self._ends(Ends(processes=[process]), now)

    def _ends(self, ends: Ends, now: float) -> None:
        """Let go of what dead processes, jobs and nodes held here."""
        if self.node_id in ends.nodes:
            self._effects.append(Start(Leave(f"node {self.node_id} was declared dead")))
            return
        for node in ends.nodes:
            if self.liveness.node_died(node):
                self.memory.peer_died(node, now)
                self._effects.append(Forget(node))
                ends.processes += [owner for owner in self._owners() if node_of(owner) == node]
        for process in ends.processes:
            # A driver whose job has ended may live on and keep what it has mapped; one that died was detached before.
            if self.liveness.process_died(process):
                self.reported.process_died(process)
                self.workforce.owner_died(process, now)
                for hosted in self.actors.owned_by(process):
                    self.workforce.end_actor(hosted, OWNER_DIED, now, final=True, after_last_word=True)
                self.memory.peer_died(process, now, reaped=process not in self.drivers)
                self._effects.append(Forget(process))
        for job in ends.jobs:
            if self.liveness.job_ended(job):
                self.workforce.job_ended(job, now)
                self._detach_drivers(job)
                self._tidy(job)

    def _tidy(self, job: JobId) -> None:
        """Remove the environments of a job that has ended, unless a process may still be unpacking one."""
        if all(process.job != job for process in self.processes):
            self._effects.append(Start(RemoveEnvironments(job)))

    def _detach_drivers(self, job: JobId) -> None:
        for driver in [driver for driver, its_job in self.drivers.items() if its_job == job]:
            del self.drivers[driver]
            self._effects.append(Start(UnwatchDriver(driver)))

    def _owners(self) -> set[ProcessId]:
        return {*self.leases.owners(), *self.segments.processes(), *self.actors.owners()}

    def _jobs(self) -> set[JobId]:
        jobs = self.leases.jobs() | self.memory.jobs()
        jobs.update(process.job for process in self.processes if process.job is not None)
        jobs.update(self.drivers.values())
        return jobs

    def sanity_check(self) -> None:
        """State the invariants."""
        self.workforce.sanity_check()
        self.actors.sanity_check()
        self.bundles.sanity_check()
        self.memory.sanity_check()
        assert not any(self.liveness.is_dead(driver) for driver in self.drivers)
        for lease in self.leases:
            dead = self.liveness.has_ended(lease.job) or (not lease.actor and self.liveness.is_dead(lease.owner))
            assert lease.over or not dead, "nothing is kept for the dead but what their processes still use"
