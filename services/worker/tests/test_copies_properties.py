"""Every history of copies: two nodes, readers on one, an owner on the other, and all that can happen between them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal_core.protocol.effects import Answered, Ask, Effect, Event, Received, Reply, Request, Send, Start
from shoal_core.protocol.errors import (
    DeclaredDeadError,
    NodeDiedError,
    NotFoundError,
    ObjectFetchTimedOutError,
    ObjectStoreFullError,
    RequestTimeoutError,
    ShoalError,
)
from shoal_core.protocol.ids import JobId, NodeId, PeerId, ProcessId
from shoal_core.protocol.messages import (
    AllocateSegment,
    AttachDriver,
    LendSegment,
    Message,
    NodeDescription,
    NodeDied,
    PinSegment,
    SegmentGranted,
    SegmentPinned,
)
from shoal_core.protocol.records import Record, SegmentFreed, SegmentSealed, SegmentUnpinned, SegmentWanted
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_worker.inputs import (
    CancelPull,
    DriverEnded,
    FileCreated,
    OfferSegment,
    Pulled,
    PullSegment,
    WithdrawSegment,
)
from shoal_worker.node import NodeCore
from shoal_worker.segments import PAGE_BYTES, CreateFile, RemoveFile

HOME, AWAY = node_id(1), node_id(2)
OWNER = process_id(1, node=1)
READERS = [process_id(number, node=2) for number in (1, 2, 3)]
SUBJECTS = Subjects("test")
STORE_PAGES = 6


def description(node: NodeId) -> NodeDescription:
    return NodeDescription(
        node_id=node,
        hostname="host",
        address="127.0.0.1",
        machine_id="machine",
        pid=1,
        total={},
        shared_memory_path="/nowhere",
        object_store_bytes=STORE_PAGES * PAGE_BYTES,
        version="1",
        python_version="3.11",
        started_at=0.0,
    )


@dataclass
class Node:
    """A node's core, and what it has to do with the machine and others."""

    core: NodeCore
    alive: bool = True
    files: dict[str, str] = field(default_factory=dict)
    """What is in each file: the name of the object at its home, "" where it is not whole."""
    creating: list[CreateFile] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    offered: set[str] = field(default_factory=set)
    pulls: dict[str, PullSegment] = field(default_factory=dict)
    incoming: deque[tuple[PeerId, Record]] = field(default_factory=deque)
    answers: dict[int, Message | ShoalError] = field(default_factory=dict)


class World:
    """Two nodes: objects are born on HOME and read on AWAY."""

    def __init__(self) -> None:
        self.now = 100.0
        self.tokens = 0
        self.serial = 0
        self.nodes = {
            node: Node(NodeCore(description(node), SUBJECTS, warm_bytes=2 * PAGE_BYTES)) for node in (HOME, AWAY)
        }
        self.objects: list[str] = []
        self.freed: set[str] = set()
        self.asked: dict[int, PinSegment] = {}
        self.maps: dict[tuple[ProcessId, int], tuple[str, str]] = {}
        self.ended: set[tuple[ProcessId, int]] = set()
        self.dead: set[ProcessId] = set()
        for node, driver in ((HOME, OWNER), *((AWAY, reader) for reader in READERS)):
            attach = AttachDriver(driver=driver, job_id=JobId(driver[-8:]), machine_id="machine", pid=1)
            self.request(node, attach)

    # -------------------------------------------------------------------------- driving the cores

    def inject(self, node: NodeId, message: object) -> None:
        if self.nodes[node].alive:
            self.perform(node, self.nodes[node].core.handle(message, self.now))

    def request(self, node: NodeId, message: Message) -> int:
        self.tokens += 1
        self.inject(node, Request(message, self.tokens))
        return self.tokens

    def perform(self, at: NodeId, effects: list[Effect]) -> None:
        node = self.nodes[at]
        for effect in effects:
            match effect:
                case Reply(token, message):
                    assert token not in node.answers, "a request is answered once"
                    node.answers[token] = message
                    if token in self.asked:
                        self.pin_answered(self.asked.pop(token), message)
                case Ask(_, LendSegment()):
                    node.asks.append(effect)
                case Send(peer, record) if peer in self.nodes:
                    self.nodes[NodeId(peer)].incoming.append((at, record))
                case Start(command):
                    self.started(node, command)

    def started(self, node: Node, command: object) -> None:
        match command:
            case CreateFile(name, _, reused):
                if reused:
                    assert not self.is_mapped(node, reused), "what is mapped is not used again"
                    assert reused not in node.pulls, "nor what a mover may write into"
                    assert reused not in node.offered, "nor what is sent"
                    del node.files[reused]
                node.files[name] = ""
                node.creating.append(command)
            case RemoveFile(name):
                del node.files[name]
                assert name not in node.offered
            case OfferSegment(name):
                assert node.files[name] == name
                node.offered.add(name)
            case WithdrawSegment(name):
                node.offered.remove(name)
            case PullSegment(name):
                assert name not in node.pulls
                node.pulls[name] = command
            case CancelPull(name):
                del node.pulls[name]

    def is_mapped(self, node: Node, name: str) -> bool:
        return node is self.nodes[AWAY] and any(mapped == name for mapped, _ in self.maps.values())

    # -------------------------------------------------------------------------- what happens

    def make(self) -> None:
        self.serial += 1
        token = self.request(HOME, AllocateSegment(process=OWNER, size_bytes=PAGE_BYTES, serial=self.serial))
        home = self.nodes[HOME]
        if home.creating:
            self.create(HOME)
        granted = home.answers.get(token)
        if isinstance(granted, SegmentGranted):
            home.files[granted.segment] = granted.segment
            self.objects.append(granted.segment)
            home.incoming.append((OWNER, SegmentSealed(granted.segment, OWNER)))

    def free(self, which: int) -> None:
        living = [name for name in self.objects if name not in self.freed]
        if living:
            name = living[which % len(living)]
            self.freed.add(name)
            self.nodes[HOME].incoming.append((OWNER, SegmentFreed(name)))

    def pin(self, reader: ProcessId, which: int) -> None:
        if self.objects and reader not in self.dead:
            self.serial += 1
            request = PinSegment(
                process=reader,
                segment=self.objects[which % len(self.objects)],
                serial=self.serial,
                home=HOME,
                size_bytes=PAGE_BYTES,
            )
            self.ask_pin(request)

    def ask_pin(self, request: PinSegment) -> None:
        self.tokens += 1
        self.asked[self.tokens] = request
        self.inject(AWAY, Request(request, self.tokens))

    def pin_answered(self, request: PinSegment, answer: Message | ShoalError) -> None:
        place = (request.process, request.serial)
        if isinstance(answer, SegmentPinned):
            content = self.nodes[AWAY].files[answer.segment]
            assert content == request.segment, "a reader gets the object that it asked for"
            if place not in self.ended and request.process not in self.dead:
                self.maps[place] = (answer.segment, content)
            return
        assert isinstance(
            answer,
            NotFoundError | NodeDiedError | ObjectStoreFullError | DeclaredDeadError | ObjectFetchTimedOutError,
        )

    def unpin(self, which: int) -> None:
        if self.maps:
            place = list(self.maps)[which % len(self.maps)]
            name, _ = self.maps.pop(place)
            self.ended.add(place)
            self.nodes[AWAY].incoming.append((place[0], SegmentUnpinned(name, place[1])))

    def give_up(self, which: int) -> None:
        waiting = [request for request in self.asked.values() if (request.process, request.serial) not in self.ended]
        if waiting:
            request = waiting[which % len(waiting)]
            place = (request.process, request.serial)
            self.ended.add(place)
            self.nodes[AWAY].incoming.append((place[0], SegmentUnpinned(request.segment, place[1], HOME)))

    def end_reader(self, reader: ProcessId) -> None:
        if reader not in self.dead:
            self.dead.add(reader)
            for place in [place for place in self.maps if place[0] == reader]:
                del self.maps[place]
            self.inject(AWAY, DriverEnded(reader))

    def end_node(self, node: NodeId) -> None:
        if not self.nodes[node].alive:
            return
        self.nodes[node].alive = False
        other = AWAY if node == HOME else HOME
        self.nodes[node].incoming.clear()
        self.inject(other, Event(NodeDied(node_id=node, reason=""), "gcs"))

    def create(self, node: NodeId, error: str = "") -> None:
        creating = self.nodes[node].creating
        if creating:
            command = creating.pop(0)
            if error:
                del self.nodes[node].files[command.name]
            self.inject(node, FileCreated(command.name, error))

    def answer(self, which: int, lost: bool) -> None:
        asks = self.nodes[AWAY].asks
        if not asks:
            return
        ask = asks.pop(which % len(asks))
        answer: Message | ShoalError = RequestTimeoutError("nothing came")
        if self.nodes[HOME].alive:
            token = self.request(HOME, ask.message)
            answer = answer if lost else self.nodes[HOME].answers[token]
        self.inject(AWAY, Answered(ask.context, answer))

    def finish_pull(self, which: int, error: str = "") -> None:
        away, home = self.nodes[AWAY], self.nodes[HOME]
        if not away.pulls:
            return
        name = list(away.pulls)[which % len(away.pulls)]
        pull = away.pulls[name]
        if not error and not home.alive:
            return
        del away.pulls[name]
        if not error and pull.stream not in home.offered:
            error = "not_found"
        if not error:
            assert home.files[pull.stream] == pull.stream, "what is lent stays what it is"
            away.files[name] = pull.stream
        self.inject(AWAY, Pulled(name, error, error))

    def deliver(self, node: NodeId, count: int = 1) -> None:
        incoming = self.nodes[node].incoming
        for _ in range(min(count, len(incoming))):
            peer, record = incoming.popleft()
            if peer not in self.dead and not (peer in self.nodes and not self.nodes[NodeId(peer)].alive):
                self.inject(node, Received(peer, [record]))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for at, node in self.nodes.items():
            if node.alive:
                self.perform(at, node.core.tick(self.now))

    def check(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                node.core.sanity_check()
        for name, content in self.maps.values():
            assert self.nodes[AWAY].files[name] == content, "what is mapped does not change"

    def settle(self) -> None:
        """Let everything come to its end."""
        for _ in range(50):
            for node in (HOME, AWAY):
                while self.nodes[node].creating:
                    self.create(node)
                self.deliver(node, 1000)
            while self.nodes[AWAY].asks:
                self.answer(0, lost=False)
            for _ in range(len(self.nodes[AWAY].pulls)):
                self.finish_pull(0)
            self.pass_time(1.0)
            self.check()


which = st.integers(0, 50)
either = st.sampled_from([HOME, AWAY])


class Copying(RuleBasedStateMachine):
    """Any history."""

    @initialize()
    def start(self) -> None:
        self.world = World()
        self.world.make()

    @rule()
    def an_object_is_made(self) -> None:
        self.world.make()

    @rule(which=which)
    def an_object_is_freed(self, which: int) -> None:
        self.world.free(which)

    @rule(reader=st.sampled_from(READERS), which=which)
    def a_reader_asks(self, reader: ProcessId, which: int) -> None:
        self.world.pin(reader, which)

    @rule(which=which)
    def a_reader_asks_again(self, which: int) -> None:
        asked = list(self.world.asked.values())
        if asked:
            self.world.ask_pin(asked[which % len(asked)])

    @rule(reader=st.sampled_from(READERS), which=which)
    def a_task_is_queued(self, reader: ProcessId, which: int) -> None:
        if self.world.objects:
            name = self.world.objects[which % len(self.world.objects)]
            self.world.nodes[AWAY].incoming.append((reader, SegmentWanted(HOME, name, PAGE_BYTES)))

    @rule(which=which)
    def a_reader_lets_go(self, which: int) -> None:
        self.world.unpin(which)

    @rule(which=which)
    def a_reader_gives_up(self, which: int) -> None:
        self.world.give_up(which)

    @rule(reader=st.sampled_from(READERS[:2]))
    def a_reader_dies(self, reader: ProcessId) -> None:
        self.world.end_reader(reader)

    @rule(node=either, error=st.sampled_from(["", "", "", "no memory"]))
    def a_file_is_made(self, node: NodeId, error: str) -> None:
        self.world.create(node, error)

    @rule(which=which, lost=st.booleans())
    def the_home_is_asked(self, which: int, lost: bool) -> None:
        self.world.answer(which, lost)

    @rule(which=which, error=st.sampled_from(["", "", "", "object_fetch_timed_out"]))
    def a_pull_ends(self, which: int, error: str) -> None:
        self.world.finish_pull(which, error)

    @rule(node=either, count=st.integers(1, 3))
    def records_arrive(self, node: NodeId, count: int) -> None:
        self.world.deliver(node, count)

    @rule(seconds=st.sampled_from([0.1, 1.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(node=either, really=st.integers(0, 9))
    def a_node_dies(self, node: NodeId, really: int) -> None:
        if really == 0:
            self.world.end_node(node)

    @invariant()
    def it_is_sane(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.settle()
        if world.nodes[AWAY].alive:
            assert not world.asked, "nobody waits for ever"
        while world.maps:
            world.unpin(0)
        for _ in world.objects:
            world.free(0)
        world.settle()
        for node in world.nodes.values():
            if node.alive:
                assert len(node.core.segments) == 0, "nothing is left"
                assert len(node.core.copies) == 0
                assert len(node.core.loans) == 0
                assert not node.core.loans.holders()
                assert not node.offered
                assert not node.pulls


TestCopying = Copying.TestCase
TestCopying.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def test_one_copy_is_pulled_for_all_readers_and_evicted_only_when_room_is_needed() -> None:
    world = World()
    for _ in range(STORE_PAGES):
        world.make()
    world.settle()
    for reader in READERS:
        world.pin(reader, 0)
    world.create(AWAY)
    assert len(world.nodes[AWAY].asks) == 1
    world.settle()
    assert len(world.maps) == len(READERS)
    while world.maps:
        world.unpin(0)
    for index in range(1, STORE_PAGES):
        world.pin(READERS[0], index)
        world.settle()
    assert len(world.nodes[AWAY].core.copies) == STORE_PAGES
    world.request(AWAY, AllocateSegment(process=READERS[0], size_bytes=PAGE_BYTES, serial=99))
    world.settle()
    assert len(world.nodes[AWAY].core.copies) == STORE_PAGES - 1
    assert "o1" not in {content for _, content in world.maps.values()}
    assert len(world.nodes[HOME].core.loans.holders()) == 1


def test_nothing_is_evicted_for_what_a_queued_task_will_read() -> None:
    world = World()
    for _ in range(STORE_PAGES):
        world.make()
    world.settle()
    away = world.nodes[AWAY]
    for name in world.objects[: STORE_PAGES - 1]:
        world.inject(AWAY, Received(READERS[0], [SegmentWanted(HOME, name, PAGE_BYTES)]))
        world.settle()
    assert len(away.core.copies) == STORE_PAGES - 1
    world.inject(AWAY, Received(READERS[0], [SegmentWanted(HOME, world.objects[-1], 2 * PAGE_BYTES)]))
    assert len(away.core.copies) == STORE_PAGES - 1


def test_a_home_that_has_died_is_named_in_the_error() -> None:
    world = World()
    world.make()
    world.settle()
    world.pin(READERS[0], 0)
    world.end_node(HOME)
    (answer,) = [one for one in world.nodes[AWAY].answers.values() if isinstance(one, ShoalError)]
    assert isinstance(answer, NodeDiedError)
    assert HOME in str(answer)
