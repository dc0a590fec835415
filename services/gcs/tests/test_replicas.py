"""Several replicas of the control store, driven through every order of events, lost answers and crashes.

Invariants, checked at each change of the store (``simulation``): jobs are numbered without gaps, one for each driver;
a node's death and a job's end are never undone; the session is drawn once; a node is registered once. At the end: what
was acknowledged is in the store, every end was published and is noted as told, the functions of ended jobs are gone,
and the key-value store was linearizable.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from services.gcs.tests.builders import description, job_request
from services.gcs.tests.linearizability import KeyOperation, is_linearizable
from services.gcs.tests.simulation import Asked, Replica, World
from shoal_core.protocol.errors import NotFoundError, ServiceError, ShoalError
from shoal_core.protocol.ids import FunctionId, JobId
from shoal_core.protocol.messages import (
    ClusterInfo,
    Done,
    FinishJob,
    GetCluster,
    GetJob,
    GetNode,
    JobRecord,
    JobState,
    KvAdded,
    KvDelete,
    KvDeleted,
    KvGet,
    KvKeyList,
    KvKeys,
    KvPut,
    KvValue,
    Message,
    NodeDescription,
    NodeRecord,
    NodeState,
    PutFunctionPart,
    RegisterJob,
    RetireNode,
)
from shoal_core.testing.builders import node_id, process_id
from shoal_gcs.records import CONTROL, StoredKey, function_key, job_id, kv_key
from shoal_gcs.state import State

NODES = st.integers(1, 2)
JOBS = st.integers(1, 2).map(job_id)
REPLICAS = st.integers(0, 2)
CHOICES = st.lists(st.integers(0, 999), max_size=30)


class Replicas(RuleBasedStateMachine):
    """Replicas that start, crash and are late; what they are asked is for the machines below."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.world.start()
        self.world.start()

    def replica(self, index: int) -> Replica:
        return self.world.replicas[index % len(self.world.replicas)]

    def ask(self, index: int, message: Message, choices: list[int]) -> None:
        self.world.ask(self.replica(index), message)
        self.go_on(choices)

    @rule(choices=CHOICES)
    def go_on(self, choices: list[int]) -> None:
        for choice in choices:
            self.world.take(choice)

    @precondition(lambda self: len(self.world.replicas) > 1)
    @rule(replica=REPLICAS, steps=st.integers(0, 12))
    def crash_somewhere(self, replica: int, steps: int) -> None:
        self.crash(replica, steps)

    def crash(self, replica: int, steps: int) -> None:
        """Let one replica go ahead of the others, then end it."""
        ahead = self.replica(replica)
        for _ in range(steps):
            self.world.step_of(ahead)
        self.world.crash(ahead)

    @precondition(lambda self: len(self.world.replicas) < 3)
    @rule()
    def start(self) -> None:
        self.world.start()

    @rule()
    def settle(self) -> None:
        self.world.run()


class ControlStores(Replicas):
    """Nodes, jobs and functions."""

    @initialize()
    def begin_with_a_node_and_a_job(self) -> None:
        for message in (description(1), job_request(1)):
            self.world.settled(self.replica(0), message)

    @precondition(lambda self: len(self.world.replicas) > 1)
    @rule(replica=REPLICAS, number=st.integers(1, 2), ends_job=st.booleans(), steps=st.integers(2, 8))
    def end_something_and_crash(self, replica: int, number: int, ends_job: bool, steps: int) -> None:
        """What such a replica wrote, and did not tell, is for others to tell."""
        message: Message = RetireNode(node_id=node_id(number), reason="told to")
        if ends_job:
            message = FinishJob(job_id=job_id(number), state=JobState.FAILED)
        self.world.run()
        self.world.ask(self.replica(replica), message)
        self.crash(replica, steps)

    @rule(replica=REPLICAS, node=NODES, choices=CHOICES)
    def register_node(self, replica: int, node: int, choices: list[int]) -> None:
        self.ask(replica, description(node), choices)

    @rule(replica=REPLICAS, node=NODES, choices=CHOICES)
    def retire_node(self, replica: int, node: int, choices: list[int]) -> None:
        self.ask(replica, RetireNode(node_id=node_id(node), reason="told to"), choices)

    @rule(replica=REPLICAS, node=NODES, choices=CHOICES)
    def read_node(self, replica: int, node: int, choices: list[int]) -> None:
        self.ask(replica, GetNode(node_id=node_id(node)), choices)

    @rule(replica=REPLICAS, driver=st.integers(1, 3), choices=CHOICES)
    def register_job(self, replica: int, driver: int, choices: list[int]) -> None:
        self.ask(replica, job_request(driver), choices)

    @rule(replica=REPLICAS, job=JOBS, choices=CHOICES)
    def finish_job(self, replica: int, job: JobId, choices: list[int]) -> None:
        self.ask(replica, FinishJob(job_id=job, state=JobState.SUCCEEDED), choices)

    @rule(replica=REPLICAS, job=JOBS, choices=CHOICES)
    def read_job(self, replica: int, job: JobId, choices: list[int]) -> None:
        self.ask(replica, GetJob(job_id=job), choices)

    @rule(replica=REPLICAS, job=JOBS, function=st.sampled_from("ab"), choices=CHOICES)
    def put_function(self, replica: int, job: JobId, function: str, choices: list[int]) -> None:
        part = PutFunctionPart(job_id=job, function_id=FunctionId(function), part=0, parts=1, data=b"code")
        self.ask(replica, part, choices)

    @rule(replica=REPLICAS, choices=CHOICES)
    def describe_cluster(self, replica: int, choices: list[int]) -> None:
        self.ask(replica, GetCluster(version="0.1.0"), choices)

    @rule(replica=REPLICAS, choices=CHOICES)
    def tick(self, replica: int, choices: list[int]) -> None:
        self.world.now += 1.0
        self.replica(replica).tick()
        self.go_on(choices)

    @rule(seconds=st.integers(1, 7), talkers=st.sets(NODES))
    def pass_seconds(self, seconds: int, talkers: set[int]) -> None:
        for _ in range(seconds):
            self.world.second([node_id(number) for number in sorted(talkers)])

    def teardown(self) -> None:
        self.world.run()
        check_all_is_finished(self.world)
        for asked in self.world.asked:
            check_answer(self.world, asked)


class Keys(Replicas):
    """The key-value store: two keys, so that a prefix deletes both."""

    @rule(replica=REPLICAS, key=st.sampled_from("kl"), overwrite=st.booleans(), choices=CHOICES)
    def put_key(self, replica: int, key: str, overwrite: bool, choices: list[int]) -> None:
        value = str(self.world.count).encode()
        self.ask(replica, KvPut(namespace="n", key=key, value=value, overwrite=overwrite), choices)

    @rule(replica=REPLICAS, key=st.sampled_from("kl"), choices=CHOICES)
    def get_key(self, replica: int, key: str, choices: list[int]) -> None:
        self.ask(replica, KvGet(namespace="n", key=key), choices)

    @rule(replica=REPLICAS, key=st.sampled_from("kl"), choices=CHOICES)
    def delete_key(self, replica: int, key: str, choices: list[int]) -> None:
        self.ask(replica, KvDelete(namespace="n", key=key), choices)

    def teardown(self) -> None:
        self.world.run()
        for key in "kl":
            assert is_linearizable(history(self.world.asked, key))
            holds = StoredKey.decode(self.world.store.get((CONTROL, kv_key("n", key)))[0]).value
            for replica in self.world.replicas:
                assert self.world.settled(replica, KvGet(namespace="n", key=key)) == KvValue(value=holds)
                listed = self.world.settled(replica, KvKeys(namespace="n", prefix=key))
                assert listed == KvKeyList(keys=[] if holds is None else [key])


def check_all_is_finished(world: World) -> None:
    """Let time pass with the living nodes talking; then what anyone began must be done, and everyone must know."""
    alive = [stored.record for stored in world.store.nodes().values() if stored.record.state is NodeState.ALIVE]
    for _ in range(5):
        world.second([record.description.node_id for record in alive])
    for node in world.store.nodes().values():
        assert node.told == (node.record.state is NodeState.DEAD)
        assert (node.record.description.node_id in world.died) == node.told
    for record in alive:
        assert world.store.nodes()[f"node.{record.description.node_id}"].record == record
    unanswered = {
        function_key(asked.message.job_id, asked.message.function_id, 0)
        for asked in world.asked
        if isinstance(asked.message, PutFunctionPart) and asked.answer is None
    }
    for key, job in world.store.jobs().items():
        ended = job.record.state is not JobState.RUNNING
        assert job.told == ended == (job.record.job_id in world.finished)
        if ended:
            # Whose writer died between the write and its second look may stay.
            left = {part for part in world.store.functions() if part.startswith(f"function.{key[4:]}.")}
            assert left <= unanswered
    for replica in world.replicas:
        check_knowledge(world, replica.core.state)
        assert not replica.requests, "everything that a living replica was asked is answered"


def check_knowledge(world: World, state: State) -> None:
    """Hold a cache to the store."""
    assert {f"node.{node}": held.value for node, held in state.nodes.items()} == world.store.nodes()
    assert {f"job.{job}": held.value for job, held in state.jobs.items()} == world.store.jobs()
    assert not state.untold


def check_answer(world: World, asked: Asked) -> None:
    """What was acknowledged is in the store, or something that can only have come after it."""
    nodes, jobs = world.store.nodes(), world.store.jobs()
    match asked.message, asked.answer:
        case _, None | ShoalError():
            assert not isinstance(asked.answer, ServiceError)
        case GetCluster(), ClusterInfo(session=session):
            assert (session.encode(), 1) == (world.store.get(("", "cluster"))[0], 1)
        case ((NodeDescription() | GetNode()), NodeRecord() as record):
            stored = nodes[f"node.{record.description.node_id}"].record
            assert stored == record or (record.state, stored.state) == (NodeState.ALIVE, NodeState.DEAD)
        case RetireNode(node_id=node), Done():
            assert nodes[f"node.{node}"].record.state is NodeState.DEAD
        case RegisterJob(driver=driver), JobRecord() as job:
            assert job.driver == driver == jobs[f"job.{job.job_id}"].record.driver
        case GetJob(job_id=number), JobRecord() as job:
            assert job.job_id == number
            assert job.state in (JobState.RUNNING, jobs[f"job.{number}"].record.state)
        case FinishJob(job_id=number), Done():
            assert jobs[f"job.{number}"].record.state is not JobState.RUNNING
        case PutFunctionPart(job_id=number) as part, Done():
            key = function_key(number, part.function_id, 0)
            assert key in world.store.functions() or jobs[f"job.{number}"].told
        case ((KvPut() | KvGet() | KvDelete()), (KvAdded() | KvValue() | KvDeleted())):
            pass
        case _:
            raise AssertionError(asked)


def history(asked: list[Asked], key: str) -> list[KeyOperation]:
    """Return what was done to one key, as the linearizability check wants it."""
    operations: list[KeyOperation] = []
    for request in asked:
        result: bytes | bool | None = None
        match request.answer:
            case KvAdded(added=added):
                result = added
            case KvValue(value=value):
                result = value or b""
            case KvDeleted(count=count):
                assert count in (0, 1)
                result = count == 1
        times = request.sent_at, request.answered_at
        match request.message:
            case KvPut(key=name, value=put, overwrite=overwrite) if name == key:
                operations.append(KeyOperation("put" if overwrite else "add", put, *times, result))
            case KvGet(key=name) if name == key:
                operations.append(KeyOperation("get", b"", *times, result))
            case KvDelete(key=name) if name == key:
                operations.append(KeyOperation("delete", b"", *times, result))
    return operations


TestControlStores = ControlStores.TestCase
TestControlStores.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
TestKeys = Keys.TestCase
TestKeys.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


# ------------------------------------------------------------------------------------ races, told step by step


def test_a_death_whose_writer_crashed_is_told_by_another_replica() -> None:
    world = World()
    one, two = world.start(), world.start()
    world.settled(one, description(1))
    world.ask(one, RetireNode(node_id=node_id(1), reason="told to"))
    while world.store.nodes()["node." + node_id(1)].record.state is NodeState.ALIVE:
        world.take(0)
    world.crash(one)
    world.run()
    assert node_id(1) not in world.died
    for _ in range(5):
        world.second()
    assert node_id(1) in world.died
    assert two.core.state.nodes[node_id(1)].value.told


def test_a_job_whose_end_was_written_by_a_replica_that_crashed_loses_its_functions() -> None:
    world = World()
    one = world.start()
    world.settled(one, job_request(1))
    part = PutFunctionPart(job_id=job_id(1), function_id=FunctionId("f"), part=0, parts=1, data=b"code")
    world.settled(one, part)
    world.ask(one, FinishJob(job_id=job_id(1), state=JobState.FAILED))
    while world.store.jobs()["job." + job_id(1)].record.state is JobState.RUNNING:
        world.take(0)
    world.crash(one)
    world.start()
    assert world.store.functions()
    for _ in range(5):
        world.second()
    assert not world.store.functions()
    assert world.store.jobs()["job." + job_id(1)].told
    assert job_id(1) in world.finished


def test_a_part_of_a_function_that_is_written_after_the_end_of_its_job_is_taken_back() -> None:
    world = World()
    one, two = world.start(), world.start()
    world.settled(one, job_request(1))
    two.changes.clear()
    world.replicas.remove(two)  # it hears nothing for a while
    world.settled(one, FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
    assert world.store.jobs()["job." + job_id(1)].told
    world.replicas.append(two)
    part = PutFunctionPart(job_id=job_id(1), function_id=FunctionId("f"), part=0, parts=1, data=b"code")
    assert isinstance(world.settled(two, part), NotFoundError)
    assert not world.store.functions()


def test_a_part_that_came_before_its_job_takes_nothing_from_one_that_came_after() -> None:
    world = World()
    one, two = world.start(), world.start()
    world.run()
    part = PutFunctionPart(job_id=job_id(1), function_id=FunctionId("f"), part=0, parts=1, data=b"code")
    early = world.ask(one, part)
    while early.answer is None and not any(load.outcome for load in one.loads):
        world.step_of(one)
    world.replicas.remove(one)  # what it read waits
    world.settled(two, job_request(1))
    assert world.settled(two, part) == Done()
    world.replicas.append(one)
    world.run()
    assert isinstance(early.answer, NotFoundError)
    assert len(world.store.functions()) == 1


def test_a_node_retires_through_a_replica_that_has_not_heard_of_it_yet() -> None:
    world = World()
    one, two = world.start(), world.start()
    world.replicas.remove(two)
    world.settled(one, description(1))
    world.replicas.append(two)
    assert world.settled(two, RetireNode(node_id=node_id(1), reason="told to")) == Done()
    assert world.store.nodes()["node." + node_id(1)].told


def test_a_key_put_while_it_was_deleted_elsewhere_is_still_listed() -> None:
    world = World()
    one, two = world.start(), world.start()
    world.settled(one, KvPut(namespace="n", key="k", value=b"1"))
    world.ask(one, KvDelete(namespace="n", key="k"))
    deletion = next(iter(one.requests.values()))
    while not any(work.outcome for running in one.running for work in running.stores):
        world.take(0)
    world.replicas.remove(one)  # the outcome of its deletion waits
    world.settled(two, KvPut(namespace="n", key="k", value=b"2"))
    world.replicas.append(one)
    name, value, revision = world.store.changes[-1]
    one.core.state.remember(name[1], value, revision)
    world.run()
    assert deletion.answer == KvDeleted(count=1)
    assert world.settled(one, KvKeys(namespace="n")) == KvKeyList(keys=["k"])


def test_a_put_whose_answer_was_lost_and_that_was_written_over_is_not_made_again() -> None:
    world = World()
    one, two = world.start(), world.start()
    world.run()
    lost = world.ask(one, KvPut(namespace="n", key="k", value=b"first"))
    one.steps()[0]()
    one.attempt(one.running[0].stores[0], "lost answer")
    world.replicas.remove(one)
    assert world.settled(two, KvPut(namespace="n", key="k", value=b"second")) == KvAdded(added=False)
    world.replicas.append(one)
    world.run()
    assert lost.answer == KvAdded(added=True)
    assert world.settled(one, KvGet(namespace="n", key="k")) == KvValue(value=b"second")


def test_every_driver_gets_one_job_however_many_replicas_are_asked() -> None:
    world = World()
    replicas = [world.start() for _ in range(3)]
    asked = [world.ask(replica, job_request(driver)) for driver in (1, 2, 3) for replica in replicas]
    world.run()
    jobs = {answer.driver: answer.job_id for request in asked if isinstance(answer := request.answer, JobRecord)}
    assert sorted(jobs.values()) == [job_id(1), job_id(2), job_id(3)]
    assert all(isinstance(request.answer, JobRecord) for request in asked)
    assert jobs.keys() == {process_id(1), process_id(2), process_id(3)}


def test_the_check_of_linearizability_refuses_a_value_that_comes_back() -> None:
    first = KeyOperation("put", b"1", 1, 10, True)
    second = KeyOperation("put", b"2", 4, 5, False)
    reads = [KeyOperation("get", b"", at, at, value) for at, value in ((3, b"1"), (6, b"2"), (8, b"1"))]
    assert is_linearizable([first, second, *reads[:2]])
    assert not is_linearizable([first, second, *reads])
