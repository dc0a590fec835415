"""Every history of a node's core: what owners, workers, drivers, schedulers, the network and death may do to it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal_core.protocol.effects import (
    Answered,
    Ask,
    Connected,
    Effect,
    Event,
    Forget,
    Publish,
    Received,
    Reply,
    Request,
    Send,
    Start,
    WakeAt,
)
from shoal_core.protocol.errors import (
    DeclaredDeadError,
    NoRespondersError,
    NotFoundError,
    ObjectStoreFullError,
    RequestTimeoutError,
    ShoalError,
)
from shoal_core.protocol.groups import (
    AbandonGroup,
    BundlesPrepared,
    GroupChanged,
    GroupDescription,
    GroupRecord,
    GroupState,
    PrepareBundles,
    ReturnBundles,
)
from shoal_core.protocol.ids import (
    NO_NODE,
    JobId,
    LeaseId,
    NodeId,
    PeerId,
    PlacementGroupId,
    ProcessId,
    SlotId,
    node_of,
)
from shoal_core.protocol.messages import (
    AttachDriver,
    Done,
    DrainNode,
    FinishJob,
    GetJob,
    GetNode,
    GetProcesses,
    JobConfig,
    JobFinished,
    JobRecord,
    JobState,
    Message,
    NodeAnnouncement,
    NodeDescription,
    NodeDied,
    NodeRecord,
    NodeState,
    ProcessDied,
    ProcessList,
)
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.records import (
    LeaseAssigned,
    LeaseGranted,
    LeaseReturned,
    ObjectsReported,
    Record,
    ReportObjects,
    ReportTasks,
    SegmentFreed,
    SegmentMapped,
    SegmentSealed,
    SegmentsUnpinned,
    SegmentUnpinned,
    TasksReported,
    WorkerBlocked,
    WorkerLost,
    WorkerReady,
)
from shoal_core.protocol.resources import CPU, GPU, Resources, to_resources
from shoal_core.protocol.scheduling import LeaseAnswer, LeaseRequest, RecallLeases
from shoal_core.protocol.storage import (
    AllocateSegment,
    ListObjects,
    NodeObjects,
    PinSegment,
    PinSegments,
    SegmentGranted,
    SegmentPinned,
    SegmentsPinned,
)
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_worker.inputs import (
    DriverEnded,
    KillProcess,
    KillSoon,
    Leave,
    ProcessEnded,
    RemoveEnvironments,
    RouteOutput,
    StartProcess,
    Suspected,
    UnwatchDriver,
    WatchDriver,
)
from shoal_worker.inquiries import MOST_INQUIRIES
from shoal_worker.liveness import REREAD_SECONDS
from shoal_worker.node import ANNOUNCE_SECONDS, COALESCE_SECONDS, NodeCore
from shoal_worker.objects.files import CreateFile, FileCreated, RemoveFile
from shoal_worker.workers.processes import START_SECONDS

HERE = node_id(1)
OTHERS = [node_id(2), node_id(3)]
MACHINE = "machine"
SUBJECTS = Subjects("test")
TOTAL = to_resources({"CPU": 4, "GPU": 2, "custom": 1})
STORE_BYTES = 64 * 1024
MOST_JOBS = 6

SHAPES: list[Resources] = [
    to_resources(amounts)
    for amounts in (
        {CPU: 1.0},
        {CPU: 1.0},
        {CPU: 0.5},
        {CPU: 3.0},
        {CPU: 9.0},
        {CPU: 1.0, GPU: 1.0},
        {GPU: 0.5},
        {GPU: 0.3},
        {GPU: 1.5},
        {GPU: 2.0},
        {"custom": 1.0},
        {},
    )
]


def description(total: Resources = TOTAL, store_bytes: int = STORE_BYTES) -> NodeDescription:
    return NodeDescription(
        node_id=HERE,
        hostname="host",
        address="127.0.0.1",
        machine_id=MACHINE,
        pid=1,
        total=total,
        shared_memory_path="/nowhere",
        object_store_bytes=store_bytes,
        version="1",
        python_version="3.11",
        started_at=0.0,
    )


@dataclass
class Job:
    """What the control store knows of a job."""

    job_id: JobId
    driver: ProcessId
    state: JobState = JobState.RUNNING

    def record(self) -> JobRecord:
        return JobRecord(
            job_id=self.job_id,
            driver=self.driver,
            hostname="host",
            machine_id=MACHINE,
            pid=1,
            entrypoint="program",
            config=JobConfig(namespace=""),
            state=self.state,
            started_at=0.0,
        )


@dataclass
class Worker:
    """A worker process of this node as it really is."""

    ready: bool = False
    doomed: bool = False
    asked: bool = False
    job: JobId | None = None
    gpus: list[str] | None = None
    environment: str | None = None
    lease: LeaseId | None = None


@dataclass
class File:
    """A file in shared memory; ``maps`` are who has mapped it, ``names`` all it ever had."""

    maps: Counter[ProcessId] = field(default_factory=Counter)


@dataclass
class Grant:
    """A lease as its owner was told of it."""

    owner: ProcessId
    worker: ProcessId
    returned: bool = False
    lost: bool = False


@dataclass
class Group:
    """What the control store knows of a placement group of two bundles, and which plans this node has reserved for."""

    bundles: list[Resources]
    attempt: int = 0
    nodes: list[NodeId | None] = field(default_factory=lambda: [None, None])
    removed: bool = False
    plans: dict[str, tuple[int, list[int]]] = field(default_factory=dict)


GROUPS = {
    PlacementGroupId("a"): [to_resources({CPU: 1.0}), to_resources({CPU: 2.0, GPU: 1.0})],
    PlacementGroupId("b"): [to_resources({CPU: 0.5, GPU: 0.5}), to_resources({CPU: 9.0})],
}


class World:
    """A node's core, and everything around it: told the truth, late, twice or not at all."""

    def __init__(self, prestart: int = 0, *, at_once: frozenset[str] = frozenset()) -> None:
        self.now = 100.0
        self.at_once = at_once
        self.core = NodeCore(
            description(), SUBJECTS, gpu_names=["0", "1"], prestart=prestart, warm_bytes=STORE_BYTES // 4
        )
        self.wake_at = float("inf")
        self.last_token = 0
        self.pending: dict[int, Message] = {}
        self.answers: dict[int, Message | ShoalError] = {}
        self.asks: list[Ask] = []
        self.sequence = 0
        self.announced_at = float("-inf")
        self.deaths_told = 0
        # The truth.
        self.jobs: dict[JobId, Job] = {}
        self.owners: dict[ProcessId, JobId] = {}
        self.dead: set[ProcessId] = set()
        self.dead_nodes: set[NodeId] = set()
        self.death_sequences = dict.fromkeys(OTHERS, 0)
        self.workers: dict[ProcessId, Worker] = {}
        self.watched: dict[ProcessId, JobId] = {}
        self.finished: set[JobId] = set()
        # What owners and processes hold, and their channels to the node.
        self.queues: dict[ProcessId, deque[Record]] = {}
        self.forgotten: set[PeerId] = set()
        self.requested: dict[tuple[ProcessId, SlotId], LeaseRequest] = {}
        self.granted_slots: set[tuple[ProcessId, SlotId]] = set()
        self.grants: dict[LeaseId, Grant] = {}
        self.assigned: dict[LeaseId, ProcessId] = {}
        self.groups = {group: Group(bundles) for group, bundles in GROUPS.items()}
        self.last_plan = 0
        # Files.
        self.names: set[str] = set()
        self.files: dict[str, File] = {}
        self.creating: list[CreateFile] = []
        self.writing: dict[str, tuple[ProcessId, JobId]] = {}
        self.sealed: dict[str, ProcessId] = {}
        self.serials: Counter[ProcessId] = Counter()
        self.pin_requests: list[PinSegment] = []
        self.mapped: dict[tuple[ProcessId, int], str] = {}
        self.used_serials: set[tuple[ProcessId, int]] = set()

    # ------------------------------------------------------------------------------- driving the core

    def inject(self, message: object) -> list[Effect]:
        effects = self.core.handle(message, self.now)
        self.perform(effects)
        return effects

    def tick(self) -> None:
        self.wake_at = float("inf")
        self.perform(self.core.tick(self.now))

    def pass_time(self, seconds: float) -> None:
        """Let time pass, and wake the core whenever it asked for it (but not more often than 100 times)."""
        until = self.now + seconds
        for _ in range(100):
            if self.wake_at > until:
                break
            self.now = max(self.now, self.wake_at)
            self.tick()
        self.now = until
        if self.wake_at <= until:
            self.tick()

    def request(self, message: Message) -> Message | ShoalError | None:
        """Ask the node; return its answer if it came at once."""
        self.last_token += 1
        self.pending[self.last_token] = message
        self.inject(Request(message, self.last_token))
        return self.answers.get(self.last_token)

    def say(self, process: ProcessId, *records: Record) -> None:
        self.queues.setdefault(process, deque()).extend(records)

    def heard(self, process: ProcessId, record: SegmentMapped) -> None:
        """Until a pin is heard of, a lock protects what is mapped; from now on the pin does, if the object is there."""
        segment = self.core.segments.get(record.segment)
        if segment is not None and segment.in_memory() and process not in self.dead:
            self.mapped[process, record.serial] = record.segment
            self.files[record.segment].maps[process] += 1

    def deliver(self, process: ProcessId, count: int) -> None:
        queue = self.queues.get(process, deque())
        records = [queue.popleft() for _ in range(min(count, len(queue)))]
        if process in self.forgotten or not records:
            return
        for record in records:
            if isinstance(record, SegmentMapped):
                self.heard(process, record)
            if isinstance(record, LeaseReturned) and record.lease in self.grants:
                grant = self.grants[record.lease]
                if grant.owner == process and not grant.lost:
                    grant.returned = True
                    worker = self.workers.get(grant.worker)
                    if worker is not None and worker.lease == record.lease and not worker.doomed and not record.kill:
                        worker.lease = None
        self.inject(Received(process, records))

    # ------------------------------------------------------------------------------- placement groups

    def record(self, group: PlacementGroupId) -> GroupRecord:
        """Return the record of a group."""
        truth = self.groups[group]
        created = None not in truth.nodes
        state = GroupState.REMOVED if truth.removed else GroupState.CREATED if created else GroupState.PENDING
        about = GroupDescription(
            group_id=group, job_id=JobId("00000001"), owner=process_id(1, 0), bundles=truth.bundles
        )
        nodes: list[NodeId | None] = [None, None] if truth.removed else truth.nodes
        return GroupRecord(description=about, state=state, attempt=truth.attempt, nodes=nodes, created_at=0.0)

    def tell_of(self, group: PlacementGroupId) -> None:
        """Tell what the record says."""
        record = self.record(group)
        news = GroupChanged(group_id=group, state=record.state, attempt=record.attempt, nodes=record.nodes)
        self.inject(Event(news, "gcs"))

    # ------------------------------------------------------------------------------- what the core does

    def perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Reply):
                request = self.pending.pop(effect.token)  # KeyError: a second reply
                self.answers[effect.token] = effect.message
                self.replied(request, effect.message)
            elif isinstance(effect, Publish):
                self.published(effect.message)
            elif isinstance(effect, Ask):
                self.asks.append(effect)
            elif isinstance(effect, Send):
                assert effect.peer not in self.forgotten, "nothing is said to the dead"
                self.sent(effect.peer, effect.record)
            elif isinstance(effect, Forget):
                self.forgotten.add(effect.peer)
                self.queues.pop(ProcessId(effect.peer), None)
            elif isinstance(effect, Start):
                self.started(effect.command)
            elif isinstance(effect, WakeAt):
                self.wake_at = min(self.wake_at, effect.at)

    def replied(self, request: Message, answer: Message | ShoalError) -> None:
        if isinstance(request, LeaseRequest):
            assert isinstance(answer, LeaseAnswer)
            assert answer.sequence > self.sequence
            self.sequence = answer.sequence
            assert sorted([*answer.granted, *answer.refused]) == sorted(request.slots)
            assert bool(answer.reason) == bool(answer.refused), "a refusal says why, and only a refusal"
            known_dead = self.core.liveness.is_dead(request.owner) or self.core.liveness.has_ended(request.job_id)
            for slot in request.slots:
                place = (request.owner, slot)
                if place in self.granted_slots and not known_dead:
                    assert slot in answer.granted, "a repeated request repeats its answer"
            self.granted_slots.update((request.owner, slot) for slot in answer.granted)
        elif isinstance(request, AllocateSegment):
            if isinstance(answer, SegmentGranted):
                assert answer.capacity_bytes >= request.size_bytes
                assert request.process not in self.dead, "nothing is promised to the dead"
                self.files[answer.segment].maps[request.process] += 1
                job = self.watched.get(request.process) or self.workers[request.process].job
                assert job is not None
                self.writing[answer.segment] = (request.process, job)
            else:
                assert isinstance(answer, ObjectStoreFullError | DeclaredDeadError)
        elif isinstance(request, PinSegment):
            place2 = (request.process, request.serial)
            if isinstance(answer, SegmentPinned):
                if place2 not in self.used_serials and request.process not in self.dead:
                    self.used_serials.add(place2)
                    self.mapped[place2] = request.segment
                    self.files[request.segment].maps[request.process] += 1
            else:
                assert isinstance(answer, NotFoundError | DeclaredDeadError)
        elif isinstance(request, AttachDriver) and isinstance(answer, Done):
            assert request.driver in self.watched
        elif isinstance(request, PinSegments) and isinstance(answer, SegmentsPinned):
            assert request.process not in self.dead, "nothing is pinned for the dead"
            for name in answer.places:
                place3 = (request.process, request.pins[name])
                if place3 not in self.used_serials:
                    self.used_serials.add(place3)
                    self.mapped[place3] = name
                    self.files[name].maps[request.process] += 1
        elif isinstance(request, ListObjects) and isinstance(answer, NodeObjects):
            assert answer.store.used_bytes <= STORE_BYTES

    def published(self, message: Message) -> None:
        if isinstance(message, NodeAnnouncement):
            assert message.sequence > self.sequence
            self.sequence = message.sequence
            assert self.now - self.announced_at >= COALESCE_SECONDS * 0.999
            self.announced_at = self.now
        elif isinstance(message, ProcessDied):
            self.deaths_told += 1
            assert message.sequence == self.deaths_told
            assert message.process_id in self.dead, "only the dead are called dead"

    def sent(self, peer: PeerId, record: Record) -> None:
        if isinstance(record, LeaseAssigned):
            worker = self.workers[ProcessId(peer)]
            assert worker.ready, "a lease goes to a process that is up"
            assert not worker.doomed, "a lease goes to a process that nobody kills"
            assert worker.lease is None, "a process serves one lease at a time"
            assert worker.job in (None, record.job), "a process serves one job in its life"
            assert worker.gpus in (None, record.gpus), "what CUDA has seen once stays with a process"
            assert worker.environment in (None, record.environment), "a process stays in its environment"
            worker.lease, worker.job, worker.gpus = record.lease, record.job, record.gpus
            worker.environment = record.environment
            assert len(record.gpus) == -(-record.resources.get(GPU, 0) // 10_000)
            assert record.lease not in self.assigned
            self.assigned[record.lease] = ProcessId(peer)
        elif isinstance(record, LeaseGranted):
            owner = ProcessId(peer)
            assert record.lease not in self.grants, "a lease is granted once"
            assert self.assigned[record.lease] == record.worker, "both ends are told the same"
            assert (owner, record.slot) in self.granted_slots or any(
                isinstance(request, LeaseRequest) and request.owner == owner and record.slot in request.slots
                for request in self.pending.values()
            )
            self.grants[record.lease] = Grant(owner, record.worker)
        elif isinstance(record, ReportObjects):
            process = ProcessId(peer)
            assert process in self.watched or self.workers[process].ready, "only who is up is asked"
            self.say(process, ObjectsReported(record.inquiry, 1, JobId(""), 0, 0, []))
        elif isinstance(record, ReportTasks):
            process = ProcessId(peer)
            assert (record.inquiry, self.workers[process].doomed) == (0, False), "a last word is asked for once"
            self.workers[process].asked = True
            self.say(process, TasksReported(0, 1, JobId(""), []))
        elif isinstance(record, WorkerLost):
            grant = self.grants[record.lease]
            assert grant.owner == peer
            assert not grant.lost, "a loss is told once"
            assert not grant.returned, "what was given back cannot be lost"
            grant.lost = True

    def started(self, command: object) -> None:
        if isinstance(command, StartProcess):
            assert command.process_id not in self.workers
            self.workers[command.process_id] = Worker()
        elif isinstance(command, KillProcess):
            worker = self.workers[command.process_id]
            assert not worker.doomed or worker.asked, "a process is killed once, or after its last word"
            worker.doomed, worker.asked = True, False
        elif isinstance(command, KillSoon):
            worker = self.workers[command.process_id]
            assert (worker.asked, worker.doomed) == (True, False)
            worker.doomed = True
        elif isinstance(command, RouteOutput):
            assert self.workers[command.process_id].job in (None, command.job_id)
        elif isinstance(command, RemoveEnvironments):
            living = [worker for process, worker in self.workers.items() if process not in self.dead]
            assert all(worker.job != command.job_id for worker in living), "nobody unpacks one any more"
        elif isinstance(command, WatchDriver):
            self.watched[command.driver] = self.owners[command.driver]
        elif isinstance(command, UnwatchDriver):
            del self.watched[command.driver]
        elif isinstance(command, CreateFile):
            assert command.name not in self.names, "a name means one object only"
            self.names.add(command.name)
            if command.reused:
                file = self.files.pop(command.reused)
                assert not file.maps.total(), "nobody maps a file that is used again"
                assert command.reused not in self.writing, "what was never sealed is not used again"
            else:
                file = File()
            self.files[command.name] = file
            self.creating.append(command)
        elif isinstance(command, RemoveFile):
            del self.files[command.name]
            self.writing.pop(command.name, None)
        else:
            assert not isinstance(command, Leave)

    # ------------------------------------------------------------------------------- the truth

    def open_job(self, kind: int) -> None:
        number = len(self.jobs) + 1
        node = (HERE, NO_NODE, OTHERS[0])[kind]
        job = Job(JobId(f"{number:08x}"), ProcessId(f"{node}{0xD0000000 + number:08x}"))
        self.jobs[job.job_id] = job
        self.owners[job.driver] = job.job_id
        for index, other in enumerate(OTHERS):
            if other not in self.dead_nodes:
                self.owners[process_id(number, node=index + 2)] = job.job_id

    def living(self, node: NodeId) -> list[ProcessId]:
        return [owner for owner in self.owners if node_of(owner) == node and owner not in self.dead]

    def die(self, process: ProcessId) -> None:
        """A process is gone, and with it all that it maps."""
        self.dead.add(process)
        for file in self.files.values():
            file.maps.pop(process, None)
        for place in [place for place in self.mapped if place[0] == process]:
            del self.mapped[place]

    def end_owner(self, owner: ProcessId, told: bool) -> None:
        """A process elsewhere, or a driver, dies."""
        if owner in self.dead:
            return
        self.die(owner)
        job = self.jobs[self.owners[owner]]
        node = node_of(owner)
        if owner == job.driver and owner in self.watched:
            self.inject(DriverEnded(owner))
            assert owner not in self.watched or self.watched.pop(owner)
        elif owner == job.driver and node in (HERE, NO_NODE):
            self.end_job(job.job_id, told)  # the control store misses its sign of life
        elif node in OTHERS:
            self.death_sequences[node] += 1
            died = ProcessDied(sequence=self.death_sequences[node], process_id=owner, reason="")
            if told:
                self.inject(Event(died, node))
            if owner == job.driver:
                self.end_job(job.job_id, told)

    def end_job(self, job_id: JobId, told: bool) -> None:
        job = self.jobs[job_id]
        if job.state is JobState.RUNNING:
            job.state = JobState.SUCCEEDED
            for owner in [o for o, its_job in self.owners.items() if its_job == job_id and node_of(o) in OTHERS]:
                if owner != job.driver:
                    self.end_owner(owner, told)
        if told:
            finished = JobFinished(job_id=job_id, driver=job.driver, state=job.state, message="")
            self.inject(Event(finished, "gcs"))

    def end_node(self, node: NodeId, told: bool) -> None:
        self.dead_nodes.add(node)
        for owner in self.living(node):
            self.die(owner)
            job = self.jobs[self.owners[owner]]
            if job.driver == owner:
                self.end_job(job.job_id, told)
        if told:
            self.inject(Event(NodeDied(node_id=node, reason=""), "gcs"))

    def end_worker(self, process: ProcessId, begun: int) -> None:
        """The system reaps a worker process of this node."""
        worker = self.workers[process]
        grant = None if worker.lease is None else self.grants[worker.lease]
        awaited = (
            grant is not None
            and not grant.returned
            and not grant.lost  # else it was told when its placement group was removed
            and grant.owner != process
            and grant.owner not in self.forgotten
            and not (worker.job is not None and self.core.liveness.has_ended(worker.job))
        )
        self.die(process)
        effects = self.inject(ProcessEnded(process, "it ended", worker.lease or 0, begun))
        lost = [effect.record for effect in effects if isinstance(effect, Send) and type(effect.record) is WorkerLost]
        assert len(lost) == awaited, "the owner hears of the loss, if it is there to hear"
        for record in lost:
            assert record.begun == begun
        assert Forget(process) in effects, "its channel ends with it"
        del self.workers[process]

    # ------------------------------------------------------------------------------- answering the core

    def truth(self, ask: Ask) -> Message | ShoalError:
        message = ask.message
        if isinstance(message, GetProcesses):
            node = NodeId(ask.subject.split(".")[3])
            if node in self.dead_nodes:
                return NoRespondersError("nobody")
            return ProcessList(sequence=self.death_sequences[node], processes=self.living(node))
        if isinstance(message, GetNode):
            state = NodeState.DEAD if message.node_id in self.dead_nodes else NodeState.ALIVE
            return NodeRecord(description=description().model_copy(update={"node_id": message.node_id}), state=state)
        if isinstance(message, GetJob):
            return self.jobs[message.job_id].record()
        if isinstance(message, AbandonGroup):
            group = self.groups[message.group_id]
            group.attempt = max(group.attempt, message.attempt)
            return self.record(message.group_id)
        assert isinstance(message, FinishJob)
        self.finished.add(message.job_id)
        job = self.jobs[message.job_id]
        if job.state is JobState.RUNNING:
            job.state = message.state
        return Done()

    def answer(self, ask: Ask, lost: bool) -> None:
        self.asks.remove(ask)
        answer = RequestTimeoutError("nothing came") if lost else self.truth(ask)
        self.inject(Answered(ask.context, answer))

    def create_file(self, command: CreateFile, error: str = "") -> None:
        self.creating.remove(command)
        if error:
            del self.files[command.name]
        self.inject(FileCreated(command.name, error))

    def come_up(self, process: ProcessId) -> None:
        self.workers[process].ready = True
        self.say(process, WorkerReady(1))
        self.deliver(process, 1)

    def proceed(self) -> None:
        """Do what in this history takes no time: ``processes`` come up, ``records`` arrive, ``files`` are made."""
        moved = True
        while moved:
            starting = [process for process, worker in self.workers.items() if not worker.ready]
            spoken = [process for process, queue in self.queues.items() if queue]
            creating = list(self.creating)
            if moved := bool("processes" in self.at_once and starting):
                self.come_up(starting[0])
            elif moved := bool("records" in self.at_once and spoken):
                self.deliver(spoken[0], 1000)
            elif moved := bool("files" in self.at_once and creating):
                self.create_file(creating[0])

    # ------------------------------------------------------------------------------- invariants

    def check(self) -> None:
        """State the invariants."""
        self.core.sanity_check()
        for name, group in self.groups.items():
            for index, node in enumerate(group.nodes):
                if node == HERE and not group.removed:
                    pool = self.core.leases.pool(Bundle(name, index))
                    assert pool.total == group.bundles[index], "what the record says is there is there"
        segments = self.core.segments
        assert segments.used_bytes <= STORE_BYTES
        assert self.wake_at <= max(self.now, self.announced_at + ANNOUNCE_SECONDS), "a tick is always arranged"
        for process, worker in self.workers.items():
            known = self.core.processes.get(process)
            assert known is not None, "a process is known until it is reaped"
            assert known.job == worker.job
        waiting = [message for message in self.pending.values() if isinstance(message, AllocateSegment)]
        assert len(waiting) == len(self.creating) + len(self.core.store.waiting), "only who waits for a file or room"
        assert len(self.pending) == len(waiting) + len(self.core.inquiries), (
            "every request has its reply, but those that wait for files, room or processes"
        )

    def settle(self) -> None:
        """End everything, tell the node nothing that it does not ask for, and see that it keeps nothing.

        Bundles that were committed are an exception: the node announces them, and the control store answers to that.
        """
        for job_id, job in list(self.jobs.items()):
            self.end_owner(job.driver, told=False)
            if job.driver not in self.forgotten and job.state is JobState.RUNNING and job_id not in self.finishing():
                self.end_job(job_id, told=False)
        for owner in self.owners:
            if node_of(owner) in OTHERS and owner not in self.dead:
                self.end_owner(owner, told=False)
        for name, group in self.groups.items():
            group.removed = True
            if HERE in group.nodes:
                self.tell_of(name)
        for round_ in range(6):
            for command in list(self.creating):
                self.create_file(command)
            for process in list(self.queues):
                self.deliver(process, 1000)
            for process in list(self.workers):
                self.end_worker(process, 0)
            self.pass_time(REREAD_SECONDS + 1)
            for ask in list(self.asks):
                self.answer(ask, lost=round_ == 0)
            self.check()
        for process in list(self.workers):
            self.end_worker(process, 0)
        assert not self.pending, "every request has one reply"
        assert len(self.core.leases) == 0
        assert len(self.core.bundles) == 0
        assert self.core.leases.free == TOTAL
        assert self.core.leases.owners() == []
        assert len(self.core.segments) == 0
        assert self.core.segments.used_bytes == 0
        assert self.core.drivers == {}
        assert self.core.workforce.waiting == 0
        for job in self.jobs.values():
            assert job.state is not JobState.RUNNING, "the control store hears of the end of each job"

    def finishing(self) -> set[JobId]:
        """The jobs whose end the node has promised to tell."""
        return {ask.message.job_id for ask in self.asks if isinstance(ask.message, FinishJob)}


pick = st.integers(0, 1000)


class NodeMachine(RuleBasedStateMachine):
    """Any history of one node."""

    @initialize(
        prestart=st.sampled_from([0, 0, 1, 2]),
        at_once=st.frozensets(st.sampled_from(["processes", "records", "files"])),
        attached=st.booleans(),
    )
    def start(self, prestart: int, at_once: frozenset[str], attached: bool) -> None:
        self.world = World(prestart, at_once=at_once)
        self.world.inject(Connected(True))
        for kind in range(3):
            self.world.open_job(kind)
        if attached:
            self.a_driver_attaches(0)

    def owner(self, which: int) -> ProcessId:
        """Anyone who ever owned anything, alive or not."""
        world = self.world
        here = [process for process, worker in world.workers.items() if worker.job is not None]
        everyone = [*world.owners, *here]
        return everyone[which % len(everyone)]

    def job_of(self, owner: ProcessId) -> JobId:
        worker = self.world.workers.get(owner)
        job = self.world.owners.get(owner) if worker is None else worker.job
        assert job is not None
        return job

    def local(self, which: int) -> ProcessId | None:
        """A living process of this node that belongs to a job."""
        here = [process for process, worker in self.world.workers.items() if worker.job is not None]
        here += [driver for driver in self.world.watched if driver not in self.world.dead]
        return here[which % len(here)] if here else None

    # ------------------------------------------------------------------------------- leases

    @rule(
        which=pick,
        shape=st.sampled_from(SHAPES),
        environment=st.sampled_from(["", "one"]),
        slots=st.lists(st.integers(1, 12), min_size=1, max_size=4),
        bundle=st.none() | st.builds(Bundle, st.sampled_from([*GROUPS]), st.integers(0, 1)),
    )
    def ask_for_leases(
        self, which: int, shape: Resources, environment: str, slots: list[int], bundle: Bundle | None
    ) -> None:
        owner = self.owner(which)
        for slot in slots:  # an owner asks for a slot with one shape only
            known = self.world.requested.get((owner, SlotId(slot)))
            if known is not None:
                shape, environment, bundle = known.resources, known.environment, known.bundle
        request = LeaseRequest(
            scheduler="s",
            owner=owner,
            job_id=self.job_of(owner),
            key=1,
            slots=[SlotId(slot) for slot in slots],
            resources=shape,
            environment=environment,
            bundle=bundle,
        )
        for slot in slots:
            self.world.requested.setdefault((owner, SlotId(slot)), request)
        self.world.request(request)

    @rule(which=pick)
    def repeat_a_request(self, which: int) -> None:
        requests = list(self.world.requested.values())
        if requests:
            self.world.request(requests[which % len(requests)])

    @rule(which=pick, kill=st.booleans(), twice=st.booleans())
    def return_a_lease(self, which: int, kill: bool, twice: bool) -> None:
        grants = list(self.world.grants.items())
        if grants:
            lease, grant = grants[which % len(grants)]
            if grant.owner not in self.world.dead:
                self.world.say(grant.owner, *[LeaseReturned(lease, kill)] * (2 if twice else 1))

    @rule(which=pick, other=pick)
    def a_stranger_returns_a_lease(self, which: int, other: int) -> None:
        grants = list(self.world.grants.items())
        owner = self.owner(other)
        if grants and owner not in self.world.dead:
            lease, grant = grants[which % len(grants)]
            if grant.owner != owner:
                self.world.say(owner, LeaseReturned(lease, True))

    @rule(which=pick, shape=st.sampled_from(SHAPES), count=st.integers(1, 3))
    def recall(self, which: int, shape: Resources, count: int) -> None:
        self.world.request(RecallLeases(owner=self.owner(which), resources=shape, count=count))

    @rule(chance=st.integers(0, 9))
    def drain(self, chance: int) -> None:
        if chance == 9:  # nothing is granted afterwards, so it comes seldom
            self.world.request(DrainNode())

    # ------------------------------------------------------------------------------- placement groups

    @rule(name=st.sampled_from([*GROUPS]), indices=st.sampled_from([[0], [1], [0, 1]]), again=st.booleans())
    def bundles_are_to_be_reserved(self, name: PlacementGroupId, indices: list[int], again: bool) -> None:
        group = self.world.groups[name]
        self.world.last_plan += 1
        plan, attempt = f"plan-{self.world.last_plan}", group.attempt + 1
        if again and group.plans:
            plan, (attempt, indices) = next(iter(group.plans.items()))
        request = PrepareBundles(
            plan=plan,
            group_id=name,
            job_id=JobId("00000001"),
            attempt=attempt,
            bundles={index: group.bundles[index] for index in indices},
        )
        answer = self.world.request(request)
        assert isinstance(answer, BundlesPrepared)
        if answer.granted:
            group.plans[plan] = (attempt, indices)

    @rule(name=st.sampled_from([*GROUPS]), which=pick)
    def a_plan_is_given_up(self, name: PlacementGroupId, which: int) -> None:
        group = self.world.groups[name]
        if group.plans:
            plan = [*group.plans][which % len(group.plans)]
            del group.plans[plan]
            self.world.request(ReturnBundles(plan=plan, group_id=name))

    @rule(name=st.sampled_from([*GROUPS]), which=pick, told=st.booleans())
    def a_plan_is_committed(self, name: PlacementGroupId, which: int, told: bool) -> None:
        group = self.world.groups[name]
        ready = [indices for attempt, indices in group.plans.values() if attempt == group.attempt + 1]
        if ready and not group.removed and None in group.nodes:
            indices = ready[which % len(ready)]
            group.nodes = [HERE if index in indices else OTHERS[0] for index in range(2)]
            group.attempt += 1
            group.plans.clear()
        if told:
            self.world.tell_of(name)

    @rule(name=st.sampled_from([*GROUPS]), told=st.booleans())
    def a_group_is_removed(self, name: PlacementGroupId, told: bool) -> None:
        self.world.groups[name].removed = True
        if told:
            self.world.tell_of(name)

    # ------------------------------------------------------------------------------- worker processes

    @rule(which=pick)
    def a_process_comes_up(self, which: int) -> None:
        starting = [process for process, worker in self.world.workers.items() if not worker.ready]
        if starting:
            self.world.come_up(starting[which % len(starting)])

    @rule(which=pick, begun=st.integers(0, 5))
    def a_process_ends(self, which: int, begun: int) -> None:
        workers = list(self.world.workers)
        if workers:
            process = workers[which % len(workers)]
            self.world.end_worker(process, begun)
            self.world.inject(ProcessEnded(process, "once more", 1, 1))

    @rule()
    def the_killed_end(self) -> None:
        for process, worker in list(self.world.workers.items()):
            if worker.doomed:
                self.world.end_worker(process, 0)

    @rule(which=pick, blocked=st.booleans(), stale=st.booleans())
    def a_task_waits_or_goes_on(self, which: int, blocked: bool, stale: bool) -> None:
        workers = [(process, worker) for process, worker in self.world.workers.items() if worker.job is not None]
        if workers:
            process, worker = workers[which % len(workers)]
            lease = LeaseId(1 + which % 7) if stale or worker.lease is None else worker.lease
            self.world.say(process, WorkerBlocked(lease, blocked))

    @rule(which=pick, count=st.integers(1, 4))
    def records_arrive(self, which: int, count: int) -> None:
        queues = [process for process, queue in self.world.queues.items() if queue]
        if queues:
            self.world.deliver(queues[which % len(queues)], count)

    # ------------------------------------------------------------------------------- segments

    @rule(which=pick, size=st.sampled_from([1, 4096, 5000, 9000, 20_000, 70_000]))
    def allocate(self, which: int, size: int) -> None:
        process = self.local(which)
        if process is not None:
            self.world.serials[process] += 1
            self.world.request(AllocateSegment(process=process, size_bytes=size, serial=self.world.serials[process]))

    @rule(which=pick, fails=st.sampled_from([False, False, False, True]))
    def a_file_is_made(self, which: int, fails: bool) -> None:
        creating = self.world.creating
        if creating:
            self.world.create_file(creating[which % len(creating)], "no room" * fails)

    @rule(which=pick, owner=pick, freed=st.booleans(), gives_up=st.sampled_from([False, False, True]))
    def a_writer_is_done(self, which: int, owner: int, freed: bool, gives_up: bool) -> None:
        world = self.world
        names = list(world.writing)
        if not names:
            return
        name = names[which % len(names)]
        writer, job = world.writing.pop(name)
        if writer in world.dead:
            return
        world.files[name].maps[writer] -= 1
        if gives_up:
            world.say(writer, SegmentFreed(name))
            return
        mates = [mate for mate, its_job in world.owners.items() if its_job == job]
        mates += [mate for mate, worker in world.workers.items() if worker.job == job]
        its_owner = mates[owner % len(mates)]
        world.sealed[name] = its_owner
        world.say(writer, SegmentSealed(name, its_owner))
        if freed and its_owner not in world.dead:
            world.say(its_owner, SegmentFreed(name))

    @rule(which=pick, reader=pick, at_once=st.booleans())
    def ask_for_a_pin(self, which: int, reader: int, at_once: bool) -> None:
        world = self.world
        process = self.local(reader)
        names = list(world.sealed)
        if process is not None and names:
            world.serials[process] += 1
            pin = PinSegment(process=process, segment=names[which % len(names)], serial=world.serials[process])
            world.pin_requests.append(pin)
            if at_once:
                world.request(pin)

    @rule(which=pick, again=st.booleans())
    def a_pin_arrives(self, which: int, again: bool) -> None:
        requests = self.world.pin_requests
        if requests:
            index = which % len(requests)
            self.world.request(requests[index] if again else requests.pop(index))

    @rule(reader=pick, count=st.integers(1, 4))
    def ask_for_many_pins(self, reader: int, count: int) -> None:
        world = self.world
        process = self.local(reader)
        names = list(world.sealed)[-count:]
        if process is not None and names:
            first = world.serials[process] + 1
            world.serials[process] += len(names)
            pins = {name: first + index for index, name in enumerate(names)}
            world.request(PinSegments(process=process, pins=pins))

    @rule(which=pick, reader=pick)
    def a_process_maps_unasked(self, which: int, reader: int) -> None:
        world = self.world
        process = self.local(reader)
        names = list(world.sealed)
        if process is not None and names:
            world.serials[process] += 1
            world.say(process, SegmentMapped(names[which % len(names)], world.serials[process]))

    @rule()
    def somebody_asks_who_holds_what(self) -> None:
        if len(self.world.core.inquiries) < MOST_INQUIRIES:
            self.world.request(ListObjects(most=10, timeout_seconds=1))

    @rule(which=pick, together=st.booleans())
    def a_mapping_ends(self, which: int, together: bool) -> None:
        world = self.world
        if not world.mapped:
            return
        process, serial = list(world.mapped)[which % len(world.mapped)]
        ending = [place for place in world.mapped if place[0] == process] if together else [(process, serial)]
        pins = []
        for place in ending:
            name = world.mapped.pop(place)
            if name in world.files:
                world.files[name].maps[process] -= 1
            pins.append((name, place[1]))
        world.say(process, SegmentsUnpinned(pins) if together else SegmentUnpinned(*pins[0]))

    @rule(which=pick, other=pick, stranger=st.sampled_from([False, False, False, True]))
    def an_object_is_freed(self, which: int, other: int, stranger: bool) -> None:
        sealed = list(self.world.sealed.items())
        if sealed:
            name, owner = sealed[which % len(sealed)]
            who = self.owner(other) if stranger else owner
            if who not in self.world.dead:
                self.world.say(who, SegmentFreed(name))

    # ------------------------------------------------------------------------------- life and death elsewhere

    @rule(kind=st.integers(0, 2))
    def a_job_begins(self, kind: int) -> None:
        if len(self.world.jobs) < MOST_JOBS and not (kind == 2 and OTHERS[0] in self.world.dead_nodes):
            self.world.open_job(kind)

    @rule(which=pick)
    def a_driver_attaches_itself(self, which: int) -> None:
        self.a_driver_attaches(which)

    def a_driver_attaches(self, which: int) -> None:
        drivers = [job.driver for job in self.world.jobs.values() if node_of(job.driver) == HERE]
        if drivers:
            driver = drivers[which % len(drivers)]
            if driver not in self.world.dead:
                job = self.world.owners[driver]
                self.world.request(AttachDriver(driver=driver, job_id=job, machine_id=MACHINE, pid=1))

    @rule(what=st.sampled_from(["owner", "owner", "owner", "job", "job", "node"]), which=pick, told=st.booleans())
    def something_ends(self, what: str, which: int, told: bool) -> None:
        if what == "owner":
            owners = list(self.world.owners)
            self.world.end_owner(owners[which % len(owners)], told)
        elif what == "job":
            jobs = list(self.world.jobs)
            self.world.end_job(jobs[which % len(jobs)], told)
        else:
            self.world.end_node(OTHERS[which % len(OTHERS)], told)

    @rule(which=pick)
    def a_peer_is_silent(self, which: int) -> None:
        self.world.inject(Suspected(self.owner(which)))

    # ------------------------------------------------------------------------------- the network and time

    @rule(which=pick, lost=st.booleans())
    def an_answer_arrives(self, which: int, lost: bool) -> None:
        if self.world.asks:
            self.world.answer(self.world.asks[which % len(self.world.asks)], lost)

    @rule()
    def all_answers_arrive(self) -> None:
        for ask in list(self.world.asks):
            self.world.answer(ask, lost=False)

    @rule()
    def reconnect(self) -> None:
        self.world.inject(Connected(False))
        self.world.inject(Connected(True))

    @rule(seconds=st.sampled_from([0.001, COALESCE_SECONDS, 0.5, 2.0, REREAD_SECONDS, START_SECONDS + 1]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def all_is_in_order(self) -> None:
        self.world.proceed()
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestNode = NodeMachine.TestCase
TestNode.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(40))
def test_long_histories_in_which_much_is_going_on(seed: int) -> None:
    """Walk at random, deaths being rarer than work; hypothesis finds small cases, this finds crowded ones."""
    random = Random(seed)

    def which() -> int:
        return random.randrange(1000)

    def chance(probability: float) -> bool:
        return random.random() < probability

    def group() -> PlacementGroupId:
        return random.choice([*GROUPS])

    def bundle() -> Bundle | None:
        return Bundle(group(), random.randrange(2)) if chance(0.4) else None

    machine = NodeMachine()
    kinds = ["processes", "records", "files"]
    machine.start(
        prestart=random.choice([0, 0, 1, 2]),
        at_once=frozenset(kind for kind in kinds if chance(0.6)),
        attached=chance(0.8),
    )
    actions: dict[Callable[[], None], float] = {
        lambda: machine.ask_for_leases(
            which(),
            random.choice(SHAPES),
            random.choice(["", "", "one"]),
            [random.randrange(1, 20) for _ in range(random.randrange(1, 4))],
            bundle(),
        ): 8,
        lambda: machine.bundles_are_to_be_reserved(group(), random.choice([[0], [1], [0, 1]]), chance(0.2)): 1,
        lambda: machine.a_plan_is_given_up(group(), which()): 0.3,
        lambda: machine.a_plan_is_committed(group(), which(), chance(0.8)): 1,
        lambda: machine.a_group_is_removed(group(), chance(0.7)): 0.1,
        lambda: machine.repeat_a_request(which()): 2,
        lambda: machine.return_a_lease(which(), chance(0.2), chance(0.2)): 5,
        lambda: machine.a_stranger_returns_a_lease(which(), which()): 1,
        lambda: machine.recall(which(), random.choice(SHAPES), random.randrange(1, 3)): 1,
        lambda: machine.a_process_comes_up(which()): 5,
        lambda: machine.a_process_ends(which(), random.randrange(5)): 1.5,
        lambda: machine.the_killed_end(): 1,
        lambda: machine.a_task_waits_or_goes_on(which(), chance(0.6), chance(0.2)): 5,
        lambda: machine.records_arrive(which(), random.randrange(1, 4)): 8,
        lambda: machine.allocate(which(), random.choice([1, 5000, 9000, 20_000, 70_000])): 4,
        lambda: machine.a_file_is_made(which(), chance(0.1)): 4,
        lambda: machine.a_writer_is_done(which(), which(), chance(0.2), chance(0.1)): 4,
        lambda: machine.ask_for_a_pin(which(), which(), chance(0.6)): 5,
        lambda: machine.a_pin_arrives(which(), chance(0.3)): 3,
        lambda: machine.a_mapping_ends(which(), chance(0.3)): 3,
        lambda: machine.an_object_is_freed(which(), which(), chance(0.1)): 3,
        lambda: machine.a_job_begins(random.randrange(3)): 1,
        lambda: machine.a_driver_attaches(which()): 1,
        lambda: machine.something_ends(
            random.choice(["owner"] * 6 + ["job"] * 4 + ["node"]), which(), chance(0.5)
        ): 0.6,
        lambda: machine.a_peer_is_silent(which()): 0.5,
        lambda: machine.an_answer_arrives(which(), chance(0.2)): 2,
        lambda: machine.all_answers_arrive(): 0.5,
        lambda: machine.reconnect(): 0.3,
        lambda: machine.time_passes(random.choice([0.001, COALESCE_SECONDS, 0.5, 2.0, REREAD_SECONDS])): 2,
    }
    for action in random.choices([*actions], [*actions.values()], k=250):
        action()
        machine.all_is_in_order()
    machine.teardown()
