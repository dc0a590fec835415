"""What a node knows of the deaths of others, and what it asks; and what the core does with it."""

from __future__ import annotations

import pytest

from shoal_core.protocol.actors import ActorClaim, ActorDescription, ActorEnded, ActorRecord, ActorState, ClaimActor
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
    Start,
)
from shoal_core.protocol.errors import NoRespondersError, NotFoundError, RequestTimeoutError, ServiceError
from shoal_core.protocol.ids import NO_NODE, ActorId, JobId, NodeId, ProcessId, SlotId, new_process_id
from shoal_core.protocol.messages import (
    AttachDriver,
    Done,
    FinishJob,
    GetJob,
    GetNode,
    GetProcesses,
    JobConfig,
    JobFinished,
    JobRecord,
    JobState,
    Message,
    NodeDescription,
    NodeDied,
    NodeRecord,
    NodeState,
    ProcessDied,
    ProcessList,
)
from shoal_core.protocol.records import ActorLeft, ActorReady, SegmentSealed, WorkerReady
from shoal_core.protocol.resources import to_resources
from shoal_core.protocol.scheduling import ActorStart, LeaseRequest
from shoal_core.protocol.storage import AllocateSegment, PinSegment, SegmentGranted
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id, put_key
from shoal_worker import liveness
from shoal_worker.inputs import DriverEnded, Leave, ProcessEnded, StartProcess, Suspected, WatchDriver
from shoal_worker.liveness import (
    FINISH_RETRY_SECONDS,
    REREAD_SECONDS,
    AboutJob,
    AboutNode,
    AboutProcesses,
    Ends,
    Finishing,
    Liveness,
)
from shoal_worker.node import NodeCore
from shoal_worker.objects.files import FileCreated, RemoveFile

HERE, THERE = node_id(1), node_id(2)
OWNER, OTHER = process_id(1, node=2), process_id(2, node=2)
JOB = JobId("00000001")
SUBJECTS = Subjects("test")


def make() -> Liveness:
    return Liveness(HERE, SUBJECTS)


def asked(one: Liveness) -> list[object]:
    """Return the contexts of what was asked since the last look."""
    effects, one.effects = one.effects, []
    return [effect.context for effect in effects if isinstance(effect, Ask)]


def died(sequence: int, process: ProcessId = OTHER) -> ProcessDied:
    return ProcessDied(sequence=sequence, process_id=process, reason="")


def processes(one: Liveness, *alive: ProcessId, sequence: int = 0) -> Ends:
    return one.answered(Answered(AboutProcesses(THERE), ProcessList(sequence=sequence, processes=list(alive))))


def job_record(state: JobState, driver: ProcessId = OWNER) -> JobRecord:
    return JobRecord(
        job_id=JOB,
        driver=driver,
        hostname="",
        machine_id="",
        pid=1,
        entrypoint="",
        config=JobConfig(namespace=""),
        state=state,
        started_at=0.0,
    )


def description(node: NodeId = HERE) -> NodeDescription:
    return NodeDescription(
        node_id=node,
        hostname="",
        address="",
        machine_id="machine",
        pid=1,
        total=to_resources({"CPU": 2}),
        shared_memory_path="",
        object_store_bytes=1 << 20,
        version="",
        python_version="",
        started_at=0.0,
    )


# ------------------------------------------------------------------------------- the table


def test_the_dead_stay_dead_and_a_death_is_news_once() -> None:
    one = make()
    assert one.process_died(OWNER)
    assert not one.process_died(OWNER)
    assert one.is_dead(OWNER)
    assert not one.is_dead(OTHER)
    assert one.job_ended(JOB)
    assert not one.job_ended(JOB)
    assert one.has_ended(JOB)


def test_all_processes_of_a_dead_node_are_dead() -> None:
    one = make()
    assert one.node_died(THERE)
    assert not one.node_died(THERE)
    assert one.is_dead(OWNER)
    assert not one.is_dead(process_id(1, node=3))


def test_only_the_newest_deaths_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "MOST_DEAD", 2)
    one = make()
    for number in range(3):
        one.process_died(process_id(number, node=2))
    assert [one.is_dead(process_id(number, node=2)) for number in range(3)] == [False, True, True]


def test_a_gap_in_what_a_node_tells_makes_it_asked_for_all() -> None:
    one = make()
    one.heard(died(4))
    one.heard(died(5))
    one.heard(died(3))
    assert asked(one) == []
    one.heard(died(7))
    assert asked(one) == [AboutProcesses(THERE)]
    one.heard(died(8))
    assert asked(one) == []


def test_who_is_not_on_its_nodes_list_is_dead_if_it_was_known_for_a_round_of_reading() -> None:
    one = make()
    one.reread([OWNER, process_id(1, node=3)], [], 0)
    assert processes(one, OTHER).processes == [OWNER]
    assert processes(one, OWNER).processes == []
    fresh = process_id(3, node=2)
    one.tick([OWNER, fresh], [], 1)
    assert processes(one, OWNER).processes == [], "a driver may take part before it has made itself known"
    one.tick([OWNER, fresh], [], REREAD_SECONDS)
    assert processes(one, OWNER).processes == [fresh]


def test_the_list_of_a_node_says_which_deaths_have_been_heard() -> None:
    one = make()
    one.heard(died(1))
    processes(one, sequence=5)
    one.heard(died(6))
    assert asked(one) == []


def test_reading_again_asks_about_every_owner_every_job_and_this_node() -> None:
    one = make()
    driver = ProcessId(f"{NO_NODE}00000001")
    one.reread([OWNER, OTHER, process_id(5), driver], [JOB], 0)
    assert asked(one) == [AboutProcesses(THERE), AboutNode(THERE), AboutJob(JOB), AboutNode(HERE)]


def test_all_is_read_again_in_time_and_not_earlier() -> None:
    one = make()
    one.tick([OWNER], [], 0)
    assert AboutProcesses(THERE) in asked(one)
    one.tick([OWNER], [], REREAD_SECONDS - 1)
    assert asked(one) == []
    one.tick([OWNER], [], REREAD_SECONDS)
    assert AboutProcesses(THERE) in asked(one)


def test_silence_makes_a_node_ask_and_nothing_more() -> None:
    one = make()
    one.suspect(OWNER, [JOB])
    assert asked(one) == [AboutProcesses(THERE), AboutNode(THERE), AboutJob(JOB)]
    assert not one.is_dead(OWNER)
    assert processes(one, OTHER).processes == [OWNER]


def test_answers_say_who_is_dead() -> None:
    one = make()
    dead = NodeRecord(description=description(THERE), state=NodeState.DEAD)
    assert one.answered(Answered(AboutNode(THERE), dead)).nodes == [THERE]
    alive = NodeRecord(description=description(THERE), state=NodeState.ALIVE)
    assert one.answered(Answered(AboutNode(THERE), alive)) == Ends()
    ends = one.answered(Answered(AboutJob(JOB), job_record(JobState.FAILED)))
    assert (ends.jobs, ends.processes) == ([JOB], [OWNER])
    assert one.answered(Answered(AboutJob(JOB), job_record(JobState.RUNNING))) == Ends()


@pytest.mark.parametrize("context", [AboutNode(THERE), AboutJob(JOB), AboutProcesses(THERE)])
def test_no_answer_says_nothing(context: object) -> None:
    one = make()
    one.reread([OWNER], [JOB], 0)
    for error in (RequestTimeoutError("late"), NoRespondersError("nobody"), NotFoundError("unknown")):
        assert one.answered(Answered(context, error)) == Ends()


def test_the_end_of_a_driver_is_told_until_the_control_store_has_heard_it() -> None:
    one = make()
    one.tick([], [], 0)
    asked(one)
    one.finish(JOB, "it died", 0)
    assert asked(one) == [Finishing(JOB)]
    one.answered(Answered(Finishing(JOB), RequestTimeoutError("late")))
    one.answered(Answered(Finishing(JOB), ServiceError("busy")))
    one.tick([], [], FINISH_RETRY_SECONDS / 2)
    assert asked(one) == []
    one.tick([], [], FINISH_RETRY_SECONDS)
    assert asked(one) == [Finishing(JOB)]
    one.answered(Answered(Finishing(JOB), Done()))
    one.tick([], [], 3 * FINISH_RETRY_SECONDS)
    assert asked(one) == []


def test_the_end_of_a_driver_is_told_no_more_once_the_control_store_says_it_itself() -> None:
    one = make()
    one.tick([], [], 0)
    one.finish(JOB, "it died", 0)
    asked(one)
    one.job_ended(JOB)
    one.tick([], [], FINISH_RETRY_SECONDS)
    assert asked(one) == []


# ------------------------------------------------------------------------------- the core with it


class Node:
    """A core, and what it did."""

    def __init__(self) -> None:
        self.core = NodeCore(description(), SUBJECTS, warm_bytes=1 << 19)
        self.now = 100.0
        self.effects: list[Effect] = []
        self._token = 0

    def take(self, message: object) -> list[Effect]:
        effects = self.core.handle(message, self.now)
        self.core.sanity_check()
        self.effects += effects
        return effects

    def request(self, message: Message) -> list[Effect]:
        self._token += 1
        return self.take(Request(message, self._token))

    def tick(self, seconds: float) -> list[Effect]:
        self.now += seconds
        effects = self.core.tick(self.now)
        self.core.sanity_check()
        return effects

    def lease(self, owner: ProcessId, job: JobId = JOB) -> None:
        self.request(
            LeaseRequest(
                scheduler="s", owner=owner, job_id=job, key=1, slots=[SlotId(1)], resources=to_resources({"CPU": 1})
            )
        )

    def worker(self, owner: ProcessId, job: JobId = JOB) -> ProcessId:
        """Have a process that serves a lease."""
        self.lease(owner, job)
        commands = [effect.command for effect in self.effects if isinstance(effect, Start)]
        (process,) = [command.process_id for command in commands if isinstance(command, StartProcess)]
        self.take(Received(process, [WorkerReady(1)]))
        return process

    def asked(self, effects: list[Effect], kind: type[Message]) -> list[Ask]:
        return [effect for effect in effects if isinstance(effect, Ask) and type(effect.message) is kind]


def test_the_death_of_a_local_driver_ends_its_job_and_is_told_to_everyone_until_it_was_heard() -> None:
    node = Node()
    driver = new_process_id(HERE)
    effects = node.request(AttachDriver(driver=driver, job_id=JOB, machine_id="machine", pid=5))
    assert Start(WatchDriver(driver, 5)) in effects
    process = node.worker(driver)
    effects = node.take(DriverEnded(driver))
    assert [e.message.process_id for e in effects if isinstance(e, Publish) and isinstance(e.message, ProcessDied)] == [
        driver
    ]
    assert Forget(driver) in effects
    (finish,) = node.asked(effects, FinishJob)
    node.take(Answered(finish.context, RequestTimeoutError("the control store is away")))
    (finish,) = node.asked(node.tick(FINISH_RETRY_SECONDS), FinishJob)
    node.take(Answered(finish.context, Done()))
    assert node.asked(node.tick(FINISH_RETRY_SECONDS), FinishJob) == []
    node.take(ProcessEnded(process, "killed"))
    node.lease(driver)
    assert len(node.core.leases) == 0, "the dead get no lease"
    assert node.core.leases.owners() == []


def test_the_end_of_a_job_that_was_missed_is_found_by_the_slots_it_left() -> None:
    node = Node()
    driver = ProcessId(f"{NO_NODE}00000001")
    node.worker(driver)
    (lease,) = node.core.leases
    (process,) = node.core.processes
    node.take(ProcessEnded(process.process_id, "it crashed"))
    assert len(node.core.leases) == 0
    assert node.core.leases.get(lease.number) is None
    (ask,) = node.asked(node.tick(REREAD_SECONDS), GetJob)
    node.take(Answered(ask.context, job_record(JobState.SUCCEEDED, driver)))
    assert node.core.leases.owners() == []


def test_the_end_of_a_job_that_was_missed_is_found_by_the_objects_it_left() -> None:
    node = Node()
    driver = ProcessId(f"{NO_NODE}00000001")
    process = node.worker(OWNER)
    node.request(AllocateSegment(process=process, size_bytes=100_000, serial=1))
    node.take(FileCreated("o1"))
    node.take(Received(process, [SegmentSealed("o1", driver)]))
    node.take(ProcessEnded(process, "it was dismissed"))
    node.take(Event(died(1, OWNER), THERE))
    assert (node.core.leases.owners(), len(node.core.segments)) == ([], 1)
    (ask,) = node.asked(node.tick(REREAD_SECONDS), GetJob)
    node.take(Answered(ask.context, job_record(JobState.SUCCEEDED, driver)))
    assert len(node.core.segments) == 0


def test_a_segment_that_is_asked_for_again_is_the_same_one() -> None:
    node = Node()
    process = node.worker(OWNER)
    ask = AllocateSegment(process=process, size_bytes=10, serial=1)
    node.request(ask)
    node.request(ask)  # its answer is late
    granted = SegmentGranted(segment="o1", place="o1", capacity_bytes=4096)
    answers = [effect.message for effect in node.take(FileCreated("o1")) if isinstance(effect, Reply)]
    assert answers == [granted, granted]
    assert [effect.message for effect in node.request(ask) if isinstance(effect, Reply)] == [granted]
    assert len(node.core.segments) == 1
    node.take(Received(process, [SegmentSealed("o1", OWNER)]))
    (late,) = [effect.message for effect in node.request(ask) if isinstance(effect, Reply)]
    assert isinstance(late, NotFoundError), "a late copy makes no second one"
    assert len(node.core.segments) == 1


def test_what_is_sealed_for_an_owner_that_is_dead_by_then_is_freed_at_once() -> None:
    node = Node()
    process = node.worker(OWNER)
    node.request(AllocateSegment(process=process, size_bytes=10, serial=1))
    node.take(FileCreated("o1"))
    node.take(Event(died(1, OTHER), THERE))
    node.take(Received(process, [SegmentSealed("o1", OTHER)]))
    assert len(node.core.segments) == 0


def test_a_reconnect_and_a_silent_peer_make_the_node_ask() -> None:
    node = Node()
    node.lease(OWNER)
    for message in (Connected(True), Suspected(OWNER)):
        effects = node.take(message)
        assert len(node.asked(effects, GetProcesses)) == 1
        assert len(node.asked(effects, GetJob)) == 1
        assert node.asked(effects, GetNode) != []


def test_the_death_of_a_node_takes_the_leases_of_its_processes() -> None:
    node = Node()
    node.lease(OWNER)
    node.lease(process_id(1, node=3))
    node.take(Event(NodeDied(node_id=THERE, reason=""), "gcs"))
    assert node.core.leases.owners() == [process_id(1, node=3)]


def test_a_node_that_is_declared_dead_leaves() -> None:
    node = Node()
    effects = node.take(Event(NodeDied(node_id=HERE, reason=""), "gcs"))
    assert [type(effect.command) for effect in effects if isinstance(effect, Start)] == [Leave]
    dead = NodeRecord(description=description(), state=NodeState.DEAD)
    effects = node.take(Answered(AboutNode(HERE), dead))
    assert [type(effect.command) for effect in effects if isinstance(effect, Start)] == [Leave]


def test_a_job_that_ends_lets_its_driver_live_but_hold_nothing_more() -> None:
    node = Node()
    driver = new_process_id(HERE)
    attach = AttachDriver(driver=driver, job_id=JOB, machine_id="machine", pid=5)
    node.request(attach)
    node.take(Event(JobFinished(job_id=JOB, driver=driver, state=JobState.SUCCEEDED, message=""), "gcs"))
    assert node.core.drivers == {}
    node.request(AllocateSegment(process=driver, size_bytes=10, serial=1))
    node.request(attach)
    assert node.core.drivers == {}
    assert len(node.core.segments) == 0
    assert node.take(DriverEnded(driver)) == []


def test_what_a_driver_has_mapped_is_not_used_again_though_its_job_has_ended() -> None:
    node = Node()
    driver = new_process_id(HERE)
    node.request(AttachDriver(driver=driver, job_id=JOB, machine_id="machine", pid=5))
    node.request(AllocateSegment(process=driver, size_bytes=10, serial=1))
    node.take(FileCreated("o1"))
    node.take(Received(driver, [SegmentSealed("o1", driver)]))
    node.request(PinSegment(process=driver, segment="o1", serial=1))
    finished = JobFinished(job_id=JOB, driver=driver, state=JobState.SUCCEEDED, message="")
    effects = node.take(Event(finished, "gcs"))
    assert Start(RemoveFile("o1")) in effects
    assert node.core.segments.warm_bytes == 0


def test_an_actor_that_leaves_while_it_is_killed_holds_its_resources_until_it_was_reaped() -> None:
    node = Node()
    actor = ActorId("a" * 24)
    resources = to_resources({"CPU": 1})
    start = ActorStart(actor_id=actor, incarnation=0, owner=OWNER)
    request = LeaseRequest(
        scheduler="s",
        owner=ProcessId(actor),
        job_id=JOB,
        key=0,
        slots=[SlotId(1)],
        resources=resources,
        actor=start,
    )
    (claim,) = node.asked(node.request(request), ClaimActor)
    owned = ActorDescription(
        actor_id=actor,
        job_id=JOB,
        owner=OWNER,
        owner_key=put_key(1),
        class_name="Counter",
        placement=resources,
        resources=resources,
    )
    record = ActorRecord(description=owned, state=ActorState.PENDING_CREATION, node_id=HERE, created_at=0.0)
    node.take(Answered(claim.context, ActorClaim(record=record, spec=b"")))
    (process,) = node.core.processes
    node.take(Received(process.process_id, [WorkerReady(1), ActorReady(actor, 0, 1)]))
    node.take(Event(JobFinished(job_id=JOB, driver=OWNER, state=JobState.SUCCEEDED, message=""), "gcs"))
    effects = node.take(Received(process.process_id, [ActorLeft(actor, 0, "it was done")]))
    assert node.asked(effects, ActorEnded) == []
    assert node.core.leases.free == {"CPU": 10_000}
    effects = node.take(ProcessEnded(process.process_id, "killed"))
    assert len(node.asked(effects, ActorEnded)) == 1
    assert node.core.leases.free == node.core.leases.total
