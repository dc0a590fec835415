"""Every history of the actors that a node hosts: what schedulers, the control store, processes and death may do to it.

Invariants: an incarnation is made at most once, by a process that makes nothing else, and only after its claim was
answered with it; it holds what it is placed by until it is claimed, what it needs from then on, and nothing after its
end, which is that of its process where that is killed; each incarnation that was claimed has one end, told until it is
heard. When all is over, the node hosts nothing, says nothing, and all it has is free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.worker.tests.test_node_properties import HERE, OTHERS, SUBJECTS, description
from shoal_core.protocol.actors import (
    ActorChanged,
    ActorClaim,
    ActorDescription,
    ActorEnded,
    ActorRecord,
    ActorStarted,
    ActorState,
    ClaimActor,
    NodeActors,
    changed,
)
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
    RequestTimeoutError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import ActorId, JobId, LeaseId, NodeId, ObjectKey, ProcessId, SlotId, actor_id, node_of
from shoal_core.protocol.messages import (
    Done,
    GetJob,
    GetNode,
    GetProcesses,
    JobConfig,
    JobFinished,
    JobRecord,
    JobState,
    Message,
    NodeDied,
    NodeRecord,
    NodeState,
    ProcessDied,
    ProcessList,
)
from shoal_core.protocol.records import (
    ActorAssigned,
    ActorDismissed,
    ActorLeft,
    ActorReady,
    LeaseAssigned,
    LeaseGranted,
    LeaseReturned,
    ProcessUnneeded,
    Record,
    ReportTasks,
    WorkerLost,
    WorkerReady,
)
from shoal_core.protocol.resources import CPU, GPU, Resources, add, subtract, to_resources
from shoal_core.protocol.scheduling import ActorStart, LeaseAnswer, LeaseRequest
from shoal_core.testing.builders import process_id
from shoal_worker.actors import About, Phase
from shoal_worker.inputs import KillProcess, KillSoon, ProcessEnded, RemoveEnvironments, RouteOutput, StartProcess
from shoal_worker.liveness import REREAD_SECONDS
from shoal_worker.node import OWNER_DIED, NodeCore

TOTAL = to_resources({"CPU": 4, "GPU": 2})
JOBS = [JobId("00000001"), JobId("00000002")]
DRIVERS = [process_id(1, node=9), process_id(2, node=9)]
OWNERS = [*DRIVERS, process_id(1, node=2), process_id(1, node=3), process_id(2, node=2)]
SHAPES: list[tuple[Resources, Resources]] = [
    (to_resources(placement), to_resources(resources))
    for placement, resources in (
        ({CPU: 1.0}, {}),
        ({CPU: 1.0}, {CPU: 1.0}),
        ({CPU: 3.0}, {CPU: 0.5}),
        ({CPU: 1.0, GPU: 1.0}, {GPU: 1.0}),
        ({GPU: 0.5}, {GPU: 0.5}),
        ({}, {}),
    )
]
MOST_ACTORS = 30
Incarnation = tuple[ActorId, int]


@dataclass
class Worker:
    """A worker process as it really is; ``made`` is the one incarnation that it was ever given."""

    ready: bool = False
    doomed: bool = False
    lease: LeaseId | None = None
    made: Incarnation | None = None
    alive: bool = False
    left: bool = False
    dismissed: bool = False


@dataclass
class Answer:
    """An answer of the control store on its way."""

    ask: Ask
    answer: Message | ShoalError


@dataclass
class Report:
    """What the node said of the end of an incarnation."""

    message: ActorEnded
    heard: bool = False


class ControlStore:
    """What is true of actors, and all that was ever told of it."""

    def __init__(self) -> None:
        self.records: dict[ActorId, ActorRecord] = {}
        self.news: list[ActorChanged] = []

    def put(self, record: ActorRecord, **fields: object) -> ActorRecord:
        record = record.model_copy(update=fields)
        self.records[record.description.actor_id] = record
        self.news.append(changed(record))
        return record

    def claim(self, claim: ClaimActor) -> Message | ShoalError:
        record = self.records[claim.actor_id]
        if record.state is ActorState.DEAD or record.incarnation != claim.incarnation:
            return DeclaredDeadError("it is not wanted")
        if record.node_id not in (None, claim.node_id):
            return DeclaredDeadError("another has it")
        if record.node_id is None:
            record = self.put(record, node_id=claim.node_id)
        return ActorClaim(record=record, spec=f"spec of {claim.actor_id}".encode())

    def concerns(self, said: ActorStarted | ActorEnded) -> bool:
        record = self.records[said.actor_id]
        here = (record.incarnation, record.node_id) == (said.incarnation, said.node_id)
        return record.state is not ActorState.DEAD and here

    def started(self, said: ActorStarted) -> Message | ShoalError:
        if not self.concerns(said):
            return DeclaredDeadError("it is not wanted any more")
        return self.put(self.records[said.actor_id], state=ActorState.ALIVE, process_id=said.process_id)

    def ended(self, said: ActorEnded) -> Message:
        if self.concerns(said):
            self.follow(said.actor_id, dead=said.final)
        return Done()

    def follow(self, actor: ActorId, *, dead: bool = False, graceful: bool = False) -> None:
        """An incarnation is over: another follows, or none."""
        record = self.records[actor]
        if record.state is ActorState.DEAD:
            return
        if dead or record.incarnation >= record.description.max_restarts:
            self.put(record, state=ActorState.DEAD, process_id=None, graceful=graceful)
        else:
            number = record.incarnation + 1
            self.put(record, state=ActorState.RESTARTING, incarnation=number, node_id=None, process_id=None)


class World:
    """A node's core, and everything around it: told the truth, late, twice or not at all."""

    def __init__(self, prestart: int, *, at_once: bool) -> None:
        self.now = 100.0
        self.at_once = at_once
        self.core = NodeCore(description(TOTAL), SUBJECTS, gpu_names=["0", "1"], prestart=prestart)
        self.store = ControlStore()
        self.effects: list[Effect] = []
        self.asks: list[Ask] = []
        self.answers: list[Answer] = []
        self.workers: dict[ProcessId, Worker] = {}
        self.queues: dict[ProcessId, deque[Record]] = {}
        self.requests: list[LeaseRequest] = []
        self.asked_for: set[Incarnation] = set()
        self.given: set[Incarnation] = set()
        self.made: dict[Incarnation, ProcessId] = {}
        self.reports: dict[Incarnation, Report] = {}
        self.task_leases: dict[LeaseId, ProcessId] = {}
        self.dead: set[ProcessId] = set()
        self.dead_nodes: set[NodeId] = set()
        self.ended_jobs: set[JobId] = set()
        self.forgotten: set[ProcessId] = set()
        self.tokens = 0

    # ------------------------------------------------------------------------------- driving the core

    def inject(self, message: object) -> None:
        self.perform(self.core.handle(message, self.now))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.core.tick(self.now))

    def request(self, request: LeaseRequest) -> None:
        self.tokens += 1
        if request.actor is not None:
            self.asked_for.add((request.actor.actor_id, request.actor.incarnation))
        self.inject(Request(request, self.tokens))

    def perform(self, effects: list[Effect]) -> None:
        self.effects += effects
        for effect in effects:
            match effect:
                case Reply(token, message):
                    assert token == self.tokens
                    assert isinstance(message, LeaseAnswer)
                case Publish(_, message):
                    self.published(message)
                case Ask():
                    self.asked(effect)
                case Send(peer, record):
                    assert peer not in self.forgotten, "nothing is said to the dead"
                    self.sent(ProcessId(peer), record)
                case Forget(peer):
                    self.forgotten.add(ProcessId(peer))
                case Start(command):
                    self.started(command)
                case _:
                    assert isinstance(effect, WakeAt)

    def published(self, message: Message) -> None:
        if isinstance(message, NodeActors):
            for hosted in message.actors:
                assert (hosted.actor_id, hosted.incarnation) in self.asked_for

    def asked(self, ask: Ask) -> None:
        self.asks.append(ask)
        if isinstance(ask.message, ActorStarted):
            started = ask.message
            assert self.made[started.actor_id, started.incarnation] == started.process_id
        if isinstance(ask.message, ActorEnded):
            ended = ask.message
            incarnation = (ended.actor_id, ended.incarnation)
            assert incarnation in self.given, "only what was claimed has an end"
            worker = self.workers.get(self.made.get(incarnation, ProcessId("")))
            assert worker is None or worker.left or worker.dismissed, "it ends with its process, or by its own will"
            assert ended.final or ended.reason != OWNER_DIED, "whose owner is gone is not started again"
            report = self.reports.setdefault(incarnation, Report(ended))
            assert report.message == ended, "an incarnation has one end"
            assert not report.heard, "what was heard is not said again"

    def sent(self, process: ProcessId, record: Record) -> None:
        if isinstance(record, ActorAssigned):
            self.assigned(process, record)
        elif isinstance(record, ActorDismissed):
            worker = self.workers[process]
            assert worker.made is not None
            assert (worker.made[0], worker.alive, worker.doomed) == (record.actor, True, False)
            worker.lease = None
            worker.dismissed = True
        elif isinstance(record, LeaseAssigned):
            worker = self.workers[process]
            assert (worker.ready, worker.doomed, worker.lease, worker.made) == (True, False, None, None)
            worker.lease = record.lease
            self.task_leases[record.lease] = process
        elif isinstance(record, ReportTasks):
            assert record.inquiry == 0
            assert not self.workers[process].doomed, "whoever is to be killed is asked for its last word, once"
        else:
            assert isinstance(record, LeaseGranted | WorkerLost | ProcessUnneeded), "actors' leases are told to none"

    def assigned(self, process: ProcessId, assigned: ActorAssigned) -> None:
        record = ActorRecord.model_validate_json(assigned.record)
        about = record.description
        incarnation = (about.actor_id, record.incarnation)
        assert (assigned.actor, assigned.incarnation) == incarnation
        assert (assigned.class_name, assigned.detached) == (about.class_name, about.detached)
        worker = self.workers[process]
        assert (worker.ready, worker.doomed, worker.lease) == (True, False, None)
        assert worker.made is None, "a process makes one actor in its life"
        assert incarnation in self.given, "nothing is made before its claim was answered"
        assert incarnation not in self.made, "nothing is made twice"
        assert incarnation not in self.reports, "what is over is not made"
        assert record.node_id == HERE
        assert assigned.spec == f"spec of {about.actor_id}".encode()
        assert assigned.lease.resources == about.resources
        assert len(assigned.lease.gpus) == -(-about.resources.get(GPU, 0) // 10_000)
        worker.made, worker.lease = incarnation, assigned.lease.lease
        self.made[incarnation] = process

    def started(self, command: object) -> None:
        match command:
            case StartProcess(process):
                self.workers[process] = Worker()
            case KillProcess(process) | KillSoon(process):
                assert not self.workers[process].doomed, "a process is killed once"
                self.workers[process].doomed = True
            case _:
                assert isinstance(command, RouteOutput | RemoveEnvironments)

    # ------------------------------------------------------------------------------- the control store, and others

    def create(self, owner: ProcessId, shape: int, max_restarts: int, detached: bool) -> None:
        placement, resources = SHAPES[shape % len(SHAPES)]
        actor = actor_id(owner, len(self.store.records))
        about = ActorDescription(
            actor_id=actor,
            job_id=JOBS[OWNERS.index(owner) % 2],
            owner=owner,
            owner_key=ObjectKey(0),
            class_name="Counter",
            detached=detached,
            placement=placement,
            resources=resources,
            max_restarts=max_restarts,
        )
        self.store.put(ActorRecord(description=about, state=ActorState.PENDING_CREATION, created_at=0.0))

    def lease_request(self, actor: ActorId, incarnation: int) -> LeaseRequest:
        about = self.store.records[actor].description
        return LeaseRequest(
            scheduler="s",
            owner=ProcessId(actor),
            job_id=about.job_id,
            key=1,
            slots=[SlotId(incarnation + 1)],
            resources=about.placement,
            actor=ActorStart(actor_id=actor, incarnation=incarnation, owner=about.owner),
        )

    def arrive(self, ask: Ask) -> None:
        """A question reaches whoever is asked; its answer is on its way."""
        self.asks.remove(ask)
        self.answers.append(Answer(ask, self.truth(ask)))

    def truth(self, ask: Ask) -> Message | ShoalError:
        match ask.message:
            case ClaimActor() as claim:
                return self.store.claim(claim)
            case ActorStarted() as started:
                return self.store.started(started)
            case ActorEnded() as ended:
                return self.store.ended(ended)
            case GetProcesses():
                node = NodeId(ask.subject.split(".")[3])
                living = [owner for owner in OWNERS if node_of(owner) == node and owner not in self.dead]
                return ProcessList(sequence=1, processes=living) if living else NoRespondersError("nobody")
            case GetNode(node_id=node):
                state = NodeState.DEAD if node in self.dead_nodes else NodeState.ALIVE
                return NodeRecord(description=description().model_copy(update={"node_id": node}), state=state)
        assert isinstance(ask.message, GetJob)
        return self.job_record(ask.message.job_id)

    def job_record(self, job: JobId) -> JobRecord:
        return JobRecord(
            job_id=job,
            driver=DRIVERS[JOBS.index(job)],
            hostname="host",
            machine_id="machine",
            pid=1,
            entrypoint="program",
            config=JobConfig(namespace=""),
            state=JobState.SUCCEEDED if job in self.ended_jobs else JobState.RUNNING,
            started_at=0.0,
        )

    def deliver(self, answer: Answer, lost: ShoalError | None = None) -> None:
        """An answer comes, or an error in its place."""
        self.answers.remove(answer)
        context, said = answer.ask.context, lost or answer.answer
        if isinstance(context, About) and isinstance(said, ActorClaim):
            # Where a later refusal came first, the node has forgotten it, and was right to.
            hosted = {(one.actor, one.incarnation) for one in self.core.actors}
            self.given |= hosted & {context.incarnation}
        report = self.reports.get(context.incarnation) if isinstance(context, About) else None
        if report is not None and context.verb == "actor_ended" and isinstance(said, Done):
            report.heard = True
        self.inject(Answered(context, said))

    # ------------------------------------------------------------------------------- processes

    def come_up(self, process: ProcessId) -> None:
        self.workers[process].ready = True
        self.say(process, WorkerReady(1))
        self.hear(process)

    def say(self, process: ProcessId, record: Record) -> None:
        self.queues.setdefault(process, deque()).append(record)

    def hear(self, process: ProcessId, count: int = 1000) -> None:
        queue = self.queues.get(process, deque())
        records = [queue.popleft() for _ in range(min(count, len(queue)))]
        if not records or process in self.forgotten:
            return
        for record in records:
            worker = self.workers.get(process)
            if isinstance(record, ActorLeft) and worker is not None and not worker.doomed and worker.made is not None:
                worker.lease = worker.lease if worker.made[0] != record.actor else None
            if isinstance(record, LeaseReturned) and record.lease in self.task_leases:
                serves = self.workers.get(self.task_leases.pop(record.lease))
                if serves is not None and not serves.doomed:
                    serves.lease = None
            self.inject(Received(process, [record]))

    def end_worker(self, process: ProcessId) -> None:
        self.dead.add(process)
        worker = self.workers.pop(process)
        if worker.lease is not None:
            self.task_leases.pop(worker.lease, None)
        self.queues.pop(process, None)
        self.inject(ProcessEnded(process, "it ended", 0, 0))

    def proceed(self) -> None:
        """Where it takes no time, have processes come up, records arrive, and the control store answer."""
        while self.at_once:
            starting = [process for process, worker in self.workers.items() if not worker.ready]
            spoken = [process for process, queue in self.queues.items() if queue]
            if starting:
                self.come_up(starting[0])
            elif spoken:
                self.hear(spoken[0])
            else:
                return

    # ------------------------------------------------------------------------------- invariants

    def check(self) -> None:
        """State the invariants."""
        self.core.sanity_check()
        free = TOTAL
        for hosted in self.core.actors:
            incarnation = (hosted.actor, hosted.incarnation)
            about = self.store.records[hosted.actor].description
            worker = self.workers.get(self.made.get(incarnation, ProcessId("")))
            dying = worker is not None and worker.doomed and worker.lease is not None
            if hosted.phase is Phase.CLAIMING:
                free = subtract(free, about.placement)
            elif hosted.phase is not Phase.OVER or dying:
                free = subtract(free, about.resources)
            assert worker is not None or hosted.phase not in (Phase.MAKING, Phase.ALIVE)
            if hosted.phase not in (Phase.CLAIMING, Phase.OVER) and not about.detached:
                assert dying or not self.core.liveness.is_dead(about.owner), "an actor ends with its owner"
        held_by_the_heard = [
            worker.made
            for worker in self.workers.values()
            if worker.doomed and worker.lease is not None and worker.made is not None
            if not any((hosted.actor, hosted.incarnation) == worker.made for hosted in self.core.actors)
        ]
        for actor, _ in held_by_the_heard:
            free = subtract(free, self.store.records[actor].description.resources)
        assert add(self.core.leases.free, {}) == free, "what is free and what is held is all there is"

    def settle(self) -> None:
        """End everything, tell the node nothing that it does not ask for, and see that it keeps nothing."""
        self.ended_jobs.update(JOBS)
        for round_ in range(5):
            for process in list(self.queues):
                self.hear(process)
            self.tick(REREAD_SECONDS + 1)
            for ask in list(self.asks):
                self.arrive(ask)
            for answer in list(self.answers):
                self.deliver(answer, RequestTimeoutError("nothing came") if round_ == 0 else None)
            for process in [process for process, worker in self.workers.items() if worker.doomed]:
                self.end_worker(process)
            self.check()
        self.asks.clear()
        self.tick(2.0)
        assert not any(isinstance(ask.context, About) for ask in self.asks), "nothing is left to say"
        assert len(self.core.actors) == 0
        assert len(self.core.leases) == 0
        assert self.core.leases.free == TOTAL
        assert self.made.keys() <= self.given
        assert self.reports.keys() == self.given, "each that was claimed has its end"
        assert all(report.heard for report in self.reports.values())
        for record in self.store.records.values():
            assert record.state is ActorState.DEAD or record.node_id != HERE, "the record waits for nothing from here"


pick = st.integers(0, 1000)


class ActorMachine(RuleBasedStateMachine):
    """Any history of one node's actors."""

    @initialize(prestart=st.sampled_from([0, 1, 2]), at_once=st.booleans())
    def start(self, prestart: int, at_once: bool) -> None:
        self.world = World(prestart, at_once=at_once)
        self.world.inject(Connected(True))
        self.world.tick(1.0)

    # ------------------------------------------------------------------------------- what is wanted

    @rule(which=pick, shape=pick, max_restarts=st.integers(0, 3), detached=st.booleans(), ask=st.booleans())
    def an_actor_is_created(self, which: int, shape: int, max_restarts: int, detached: bool, ask: bool) -> None:
        if len(self.world.store.records) < MOST_ACTORS:
            self.world.create(OWNERS[which % len(OWNERS)], shape, max_restarts, detached)
            if ask:
                self.a_scheduler_asks(-1, True)

    @rule(which=pick, arrives=st.booleans())
    def a_scheduler_asks(self, which: int, arrives: bool) -> None:
        """For the incarnation that is wanted; the request may come later."""
        records = list(self.world.store.records.values())
        if records:
            record = records[which % len(records) if which >= 0 else -1]
            self.world.requests.append(self.world.lease_request(record.description.actor_id, record.incarnation))
            if arrives:
                self.world.request(self.world.requests[-1])

    @rule(which=pick)
    def a_request_comes_late_or_again(self, which: int) -> None:
        if self.world.requests:
            self.world.request(self.world.requests[which % len(self.world.requests)])

    @rule(which=pick)
    def another_node_claims(self, which: int) -> None:
        store = self.world.store
        for actor in list(store.records)[-1 - which % 8 :][:1]:
            store.claim(ClaimActor(actor_id=actor, incarnation=store.records[actor].incarnation, node_id=OTHERS[0]))

    @rule(which=pick, how=st.sampled_from(["dead", "released", "restarted"]))
    def an_actor_is_killed(self, which: int, how: str) -> None:
        store = self.world.store
        for actor in list(store.records)[-1 - which % 8 :][:1]:
            if how != "restarted" or store.records[actor].node_id is not None:
                store.follow(actor, dead=how != "restarted", graceful=how == "released")

    @rule(which=pick, newest=st.booleans())
    def news_arrive(self, which: int, newest: bool) -> None:
        """They may be old, or have come before."""
        news = self.world.store.news
        if news:
            self.world.inject(Event(news[-1] if newest else news[which % len(news)], "gcs"))

    @rule(which=pick, slot=st.integers(1, 9), kill=st.booleans())
    def a_task_has_a_lease_or_gives_it_back(self, which: int, slot: int, kill: bool) -> None:
        world = self.world
        if which % 2 and world.task_leases:
            lease = list(world.task_leases)[which % len(world.task_leases)]
            held = world.core.leases.get(lease)
            if held is not None and held.owner not in world.dead and not kill:
                world.say(held.owner, LeaseReturned(lease, False))
            return
        owner = OWNERS[which % len(OWNERS)]
        if owner not in world.dead:
            job = JOBS[OWNERS.index(owner) % 2]
            request = LeaseRequest(scheduler="s", owner=owner, job_id=job, key=1, slots=[SlotId(slot)], resources={})
            world.request(request)

    # ------------------------------------------------------------------------------- the control store's answers

    @rule(which=pick, comes=st.booleans())
    def a_question_arrives(self, which: int, comes: bool) -> None:
        if self.world.asks:
            self.world.arrive(self.world.asks[which % len(self.world.asks)])
            if comes:
                self.world.deliver(self.world.answers[-1])

    @rule(which=pick)
    def a_question_is_lost(self, which: int) -> None:
        if self.world.asks:
            ask = self.world.asks.pop(which % len(self.world.asks))
            self.world.inject(Answered(ask.context, RequestTimeoutError("nothing came")))

    @rule(which=pick, fate=st.sampled_from(["comes", "comes", "lost", "refused"]))
    def an_answer_comes_or_is_lost(self, which: int, fate: str) -> None:
        if self.world.answers:
            errors = {"lost": RequestTimeoutError("nothing came"), "refused": ServiceError("not now")}
            self.world.deliver(self.world.answers[which % len(self.world.answers)], errors.get(fate))

    @rule()
    def all_questions_are_answered(self) -> None:
        for ask in list(self.world.asks):
            self.world.arrive(ask)
        for answer in list(self.world.answers):
            self.world.deliver(answer)

    # ------------------------------------------------------------------------------- processes

    def workers(self, condition: Callable[[Worker], bool]) -> list[ProcessId]:
        return [process for process, worker in self.world.workers.items() if condition(worker)]

    @rule(which=pick)
    def a_process_comes_up(self, which: int) -> None:
        if starting := self.workers(lambda worker: not worker.ready):
            self.world.come_up(starting[which % len(starting)])

    @rule(which=pick)
    def an_instance_is_made(self, which: int) -> None:
        if making := self.workers(lambda worker: worker.made is not None and not (worker.alive or worker.left)):
            process = making[which % len(making)]
            worker = self.world.workers[process]
            assert worker.made is not None
            worker.alive = True
            self.world.say(process, ActorReady(*worker.made, 1))

    @rule(which=pick, again=st.booleans())
    def an_actor_leaves(self, which: int, again: bool) -> None:
        """Its ``__init__`` raised, or it ends by its own will; it knows nothing of its node's plans."""
        if making := self.workers(lambda worker: worker.made is not None and (again or not worker.left)):
            process = making[which % len(making)]
            worker = self.world.workers[process]
            assert worker.made is not None
            worker.left = True
            self.world.say(process, ActorLeft(*worker.made, "it left", b"" if worker.alive else b"error"))

    @rule(which=pick, other=pick, ready=st.booleans())
    def a_process_speaks_for_another(self, which: int, other: int, ready: bool) -> None:
        liars = self.workers(lambda worker: worker.ready)
        made = list(self.world.made)
        if liars and made:
            liar, incarnation = liars[which % len(liars)], made[other % len(made)]
            if self.world.made[incarnation] != liar:
                self.world.inject(
                    Received(liar, [ActorReady(*incarnation, 1) if ready else ActorLeft(*incarnation, "a lie")])
                )

    @rule(which=pick)
    def a_process_ends(self, which: int) -> None:
        if workers := list(self.world.workers):
            self.world.end_worker(workers[which % len(workers)])

    @rule()
    def the_killed_end(self) -> None:
        for process in self.workers(lambda worker: worker.doomed):
            self.world.end_worker(process)

    @rule(which=pick, count=st.integers(1, 3))
    def records_arrive(self, which: int, count: int) -> None:
        queues = [process for process, queue in self.world.queues.items() if queue]
        if queues:
            self.world.hear(queues[which % len(queues)], count)

    # ------------------------------------------------------------------------------- deaths and time

    @rule(which=pick, told=st.booleans())
    def an_owner_dies(self, which: int, told: bool) -> None:
        owner = OWNERS[2 + which % 3]
        self.world.dead.add(owner)
        if told:
            died = ProcessDied(sequence=1 + which, process_id=owner, reason="")
            self.world.inject(Event(died, node_of(owner)))

    @rule(node=st.sampled_from(OTHERS))
    def a_node_dies(self, node: NodeId) -> None:
        self.world.dead_nodes.add(node)
        self.world.dead.update(owner for owner in OWNERS if node_of(owner) == node)
        self.world.inject(Event(NodeDied(node_id=node, reason=""), "gcs"))

    @rule(job=st.sampled_from(JOBS), told=st.booleans())
    def a_job_ends(self, job: JobId, told: bool) -> None:
        self.world.ended_jobs.add(job)
        if told:
            record = self.world.job_record(job)
            finished = JobFinished(job_id=job, driver=record.driver, state=record.state, message="")
            self.world.inject(Event(finished, "gcs"))

    @rule()
    def reconnect(self) -> None:
        self.world.inject(Connected(False))
        self.world.inject(Connected(True))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.0, REREAD_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.world.tick(seconds)

    @invariant()
    def all_is_in_order(self) -> None:
        self.world.proceed()
        self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestActors = ActorMachine.TestCase
TestActors.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(60))
def test_long_histories_of_many_actors(seed: int) -> None:
    """Walk at random, deaths being rarer than work; hypothesis finds small cases, this finds crowded ones."""
    random = Random(seed)

    def which() -> int:
        return random.randrange(1000)

    def chance(probability: float) -> bool:
        return random.random() < probability

    machine = ActorMachine()
    machine.start(random.choice([0, 1, 2]), chance(0.5))
    actions: dict[Callable[[], None], float] = {
        lambda: machine.an_actor_is_created(which(), which(), random.randrange(4), chance(0.3), chance(0.7)): 3,
        lambda: machine.a_scheduler_asks(which(), chance(0.7)): 4,
        lambda: machine.a_request_comes_late_or_again(which()): 3,
        lambda: machine.another_node_claims(which()): 0.3,
        lambda: machine.an_actor_is_killed(which(), random.choice(["dead", "released", "restarted"])): 2,
        lambda: machine.news_arrive(which(), chance(0.5)): 3,
        lambda: machine.a_task_has_a_lease_or_gives_it_back(which(), random.randrange(1, 10), chance(0.1)): 2,
        lambda: machine.a_question_arrives(which(), chance(0.6)): 8,
        lambda: machine.a_question_is_lost(which()): 1,
        lambda: machine.an_answer_comes_or_is_lost(which(), random.choice(["comes", "comes", "lost", "refused"])): 4,
        machine.all_questions_are_answered: 1,
        lambda: machine.a_process_comes_up(which()): 4,
        lambda: machine.an_instance_is_made(which()): 6,
        lambda: machine.an_actor_leaves(which(), chance(0.1)): 1.5,
        lambda: machine.a_process_speaks_for_another(which(), which(), chance(0.5)): 1,
        lambda: machine.a_process_ends(which()): 1,
        machine.the_killed_end: 0.7,
        lambda: machine.records_arrive(which(), random.randrange(1, 4)): 6,
        lambda: machine.an_owner_dies(which(), chance(0.5)): 0.2,
        lambda: machine.a_node_dies(random.choice(OTHERS)): 0.05,
        lambda: machine.a_job_ends(random.choice(JOBS), chance(0.5)): 0.05,
        machine.reconnect: 0.3,
        lambda: machine.time_passes(random.choice([0.1, 0.5, 1.0, 2.0, REREAD_SECONDS])): 4,
    }
    for action in random.choices([*actions], [*actions.values()], k=250):
        action()
        machine.all_is_in_order()
    machine.teardown()
