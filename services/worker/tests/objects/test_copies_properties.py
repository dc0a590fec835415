"""Every history of two nodes' shared memory: objects are made, read, spilled, lent, copied and freed on both.

Each node has less room than there are objects, so that whatever can make room does: copies go, and segments are
written to the durable tier and come back, for readers of their own node and for pullers. A driver without a node pulls
and gives. In half of the histories the nodes' folders lie beside each other, so that copies share the files of homes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
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
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import NO_NODE, JobId, NodeId, ObjectKey, PeerId, ProcessId, durable_id, is_node, node_of
from shoal_core.protocol.messages import AttachDriver, JobFinished, JobState, Message, NodeDescription, NodeDied
from shoal_core.protocol.records import Record, SegmentFreed, SegmentSealed, SegmentUnpinned, SegmentWanted
from shoal_core.protocol.storage import (
    AllocateSegment,
    LendSegment,
    PinSegment,
    SegmentGranted,
    SegmentLent,
    SegmentPinned,
    TakeObject,
)
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_worker.inputs import (
    CancelPull,
    DriverEnded,
    OfferSegment,
    Pulled,
    PullSegment,
    WithdrawSegment,
)
from shoal_worker.node import NodeCore
from shoal_worker.objects.copies import PULLS_AT_ONCE
from shoal_worker.objects.files import (
    PAGE_BYTES,
    CreateFile,
    DropDurable,
    FileCreated,
    FileFilled,
    FileLinked,
    FileSpilled,
    FillFile,
    LinkFile,
    RemoveFile,
    ShelveFile,
    SpillFile,
)
from shoal_worker.objects.store import STALL_SECONDS

HERE, THERE = NODES = (node_id(1), node_id(2))
PROCESSES = [process_id(number, node=node) for node in (1, 2) for number in (1, 2, 3)]
REMOTE = ProcessId(f"{NO_NODE}00000009")
JOB = JobId("00000009")
SUBJECTS = Subjects("test")
STORE_PAGES = 6
PART = ".part"
REFUSALS = (
    NotFoundError,
    NodeDiedError,
    ObjectStoreFullError,
    DeclaredDeadError,
    ObjectFetchTimedOutError,
    ServiceError,
    RequestTimeoutError,
)


def other(node: NodeId) -> NodeId:
    return THERE if node == HERE else HERE


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


@dataclass(frozen=True)
class Object:
    """An object where it lies; ``content`` stands for what is in it."""

    home: NodeId
    name: str
    owner: ProcessId
    content: str


@dataclass(eq=False)
class File:
    """What names in nodes' folders lead to: ``content`` is "" where it is not whole."""

    content: str = ""


@dataclass
class Node:
    """A node's core, and what it has to do with the machine and others."""

    core: NodeCore
    alive: bool = True
    files: dict[str, File] = field(default_factory=dict)
    creating: list[CreateFile] = field(default_factory=list)
    moving: list[SpillFile | FillFile] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    """The names that were given to other nodes' files."""
    busy: dict[str, str] = field(default_factory=dict)
    """The files that were to be used again for others, which is not known yet."""
    linking: list[FileLinked] = field(default_factory=list)
    """What came of links, and was not told yet."""
    asks: list[Ask] = field(default_factory=list)
    offered: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, PullSegment] = field(default_factory=dict)
    incoming: deque[tuple[PeerId, Record]] = field(default_factory=deque)


class World:
    """Two nodes with processes, the durable tier, and a driver elsewhere."""

    def __init__(self, beside: bool = False, shared_bytes: int = 0, other_boot_id: str = "boot") -> None:
        self.now = 100.0
        self.beside = beside
        self.tokens = 0
        self.serial = 0
        self.nodes = {
            node: Node(
                NodeCore(description(node), SUBJECTS, warm_bytes=2 * PAGE_BYTES, shared_bytes=shared, boot_id=boot_id)
            )
            for node, shared, boot_id in ((HERE, shared_bytes, "boot"), (THERE, 0, other_boot_id))
        }
        self.durable: dict[tuple[str, str], str] = {}
        self.objects: list[Object] = []
        self.freed: set[Object] = set()
        self.asked: dict[int, Message] = {}
        self.heard: list[Message | ShoalError] = []
        self.lending: dict[int, tuple[NodeId, Any]] = {}
        self.maps: dict[tuple[ProcessId, int], tuple[str, str, File]] = {}
        self.loans: dict[int, Object] = {}
        self.given: dict[str, NodeId] = {}
        self.ended: set[tuple[ProcessId, int]] = set()
        self.dead: set[PeerId] = set()
        self.spilled = self.returned = self.copied = self.linked = 0
        for process in PROCESSES:
            attach = AttachDriver(driver=process, job_id=JobId(process[-8:]), machine_id="machine", pid=1)
            self.ask(node_of(process), attach)

    # -------------------------------------------------------------------------- driving the cores

    def inject(self, node: NodeId, message: object) -> None:
        if self.nodes[node].alive:
            self.perform(node, self.nodes[node].core.handle(message, self.now))

    def ask(self, node: NodeId, message: Message) -> int:
        self.tokens += 1
        self.asked[self.tokens] = message
        self.inject(node, Request(message, self.tokens))
        return self.tokens

    def say(self, node: NodeId, peer: PeerId, record: Record) -> None:
        self.nodes[node].incoming.append((peer, record))

    def perform(self, at: NodeId, effects: list[Effect]) -> None:
        node = self.nodes[at]
        for effect in effects:
            match effect:
                case Reply(token, message):
                    self.replied(at, token, self.asked.pop(token), message)  # KeyError: a second answer
                case Ask(_, LendSegment()):
                    node.asks.append(effect)
                case Send(peer, record) if peer in self.nodes:
                    assert peer not in self.dead, "nothing is said to the dead"
                    self.say(NodeId(peer), at, record)
                case Start(command):
                    self.started(at, node, command)

    def started(self, at: NodeId, node: Node, command: object) -> None:
        match command:
            case CreateFile(name, _, reused, filled):
                assert name + PART * filled not in node.files
                file = File()
                if reused:
                    self.untouched(at, reused)
                    assert reused not in node.links, "only its home uses a file again"
                    warm = node.files.pop(reused)
                    if self.is_used_elsewhere(warm):
                        node.files[reused] = warm
                        node.busy[name] = reused
                    else:
                        file = warm
                        file.content = ""
                node.files[name + PART * filled] = file
                node.creating.append(command)
            case LinkFile(name, home, origin):
                assert name not in node.files
                self.link(node, name, self.nodes[home].files.get(origin))
            case RemoveFile(name):
                assert name not in node.offered
                node.files.pop(name + PART, None)
                node.files.pop(name, None)
            case ShelveFile(name, shelf):
                self.untouched(at, name)
                node.files[shelf] = node.files.pop(name)
            case SpillFile() | FillFile():
                node.moving.append(command)
            case DropDurable(object_id, holder):
                del self.durable[object_id, holder]
            case OfferSegment(name, _, size_bytes):
                assert size_bytes == PAGE_BYTES
                assert node.files[name].content, "only what is whole is offered"
                node.offered[name] = node.files[name].content
            case WithdrawSegment(name):
                del node.offered[name]
            case PullSegment(name):
                assert name not in node.pulls
                assert not node.files[name].content
                assert name not in node.links
                node.pulls[name] = command
            case CancelPull(name):
                del node.pulls[name]

    def link(self, node: Node, name: str, file: File | None) -> None:
        error = "they do not lie beside each other" * (not self.beside or file is None)
        if file is not None and not error:
            assert file.content, "only what is whole is linked"
            node.files[name] = file
            node.links.add(name)
            self.linked += 1
        node.linking.append(FileLinked(name, error))

    def is_used_elsewhere(self, file: File) -> bool:
        """Tell whether a file has another name, or is locked, which is what a node finds out before it uses it."""
        named = any(file in node.files.values() for node in self.nodes.values())
        return named or any(mapped is file for _, _, mapped in self.maps.values())

    def untouched(self, at: NodeId, name: str) -> None:
        """See that nobody uses a file that gets another name."""
        mapped = [file for (process, _), (file, _, _) in self.maps.items() if node_of(process) == at]
        assert name not in mapped, "what is mapped keeps its file"
        assert name not in self.nodes[at].pulls, "nor is used what a mover may write into"
        assert name not in self.nodes[at].offered, "nor what is sent"

    # -------------------------------------------------------------------------- answers

    def replied(self, at: NodeId, token: int, request: Message, answer: Message | ShoalError) -> None:
        self.heard.append(answer)
        assert isinstance(answer, (Message, *REFUSALS)), answer
        if token in self.lending:
            asker, context = self.lending.pop(token)
            self.inject(asker, Answered(context, answer))
        match request, answer:
            case AllocateSegment(), SegmentGranted():
                self.write(at, request.process, request.serial, answer.segment)
            case PinSegment(), SegmentPinned():
                self.pinned(at, request, answer.segment)
            case PinSegment(), ShoalError():
                place = (request.process, request.serial)
                if isinstance(answer, NotFoundError) and place not in self.ended and request.process not in self.dead:
                    assert self.is_gone(request.home or at, request.segment), "what is there is found"
                self.let_go(request)
            case LendSegment(), SegmentLent():
                if request.puller == REMOTE and request.serial in self.loans and REMOTE not in self.dead:
                    assert request.segment in self.nodes[at].offered, "what is lent can be pulled"
            case TakeObject(), SegmentGranted():
                self.taken(at, request, answer.segment)

    def is_gone(self, home: NodeId, name: str) -> bool:
        (one,) = (one for one in self.objects if (one.home, one.name) == (home, name))
        return one in self.freed or one.owner in self.dead or home in self.dead

    def write(self, at: NodeId, process: ProcessId, serial: int, name: str) -> None:
        assert process not in self.dead, "nothing is promised to the dead"
        one = Object(at, name, process, f"{at}:{name}")
        self.nodes[at].files[name].content = one.content
        self.objects.append(one)
        self.say(at, process, SegmentSealed(name, process, ObjectKey(serial)))

    def taken(self, at: NodeId, request: TakeObject, name: str) -> None:
        if request.stream in self.given and REMOTE not in self.dead:
            del self.given[request.stream]
            content = f"{REMOTE}:{request.stream}"
            file = self.nodes[at].files.get(name)
            assert file is None or file.content == content, "what was given is whole"
            self.objects.append(Object(at, name, REMOTE, content))

    def pinned(self, at: NodeId, request: PinSegment, name: str) -> None:
        place = (request.process, request.serial)
        if place in self.ended or request.process in self.dead:
            return
        home = request.home or at
        content = self.nodes[at].files[name].content
        wanted = next(one.content for one in self.objects if (one.home, one.name) == (home, request.segment))
        assert content == wanted, "a reader gets the object that it asked for"
        self.maps[place] = (name, content, self.nodes[at].files[name])

    # -------------------------------------------------------------------------- what processes do

    def make(self, process: ProcessId) -> None:
        if process not in self.dead:
            self.serial += 1
            request = AllocateSegment(process=process, size_bytes=PAGE_BYTES, serial=self.serial)
            self.ask(node_of(process), request)

    def living(self) -> list[Object]:
        return [one for one in self.objects if one not in self.freed and one.home not in self.dead]

    def free(self, which: int) -> None:
        if living := self.living():
            one = living[which % len(living)]
            self.freed.add(one)
            self.say(one.home, one.owner, SegmentFreed(one.name))

    def pin(self, process: ProcessId, which: int) -> None:
        if self.objects and process not in self.dead:
            one = self.objects[which % len(self.objects)]
            self.serial += 1
            home = NodeId("") if one.home == node_of(process) else one.home
            request = PinSegment(
                process=process, segment=one.name, serial=self.serial, home=home, size_bytes=PAGE_BYTES
            )
            self.ask(node_of(process), request)

    def pin_again(self, which: int) -> None:
        asked = [one for one in self.asked.values() if isinstance(one, PinSegment)]
        if asked:
            request = asked[which % len(asked)]
            self.ask(node_of(request.process), request)

    def want(self, process: ProcessId, which: int) -> None:
        one = self.objects[which % len(self.objects)] if self.objects else None
        if one is not None and one.home != node_of(process):
            self.say(node_of(process), process, SegmentWanted(one.home, one.name, PAGE_BYTES))

    def unpin(self, which: int) -> None:
        if self.maps:
            place = list(self.maps)[which % len(self.maps)]
            name, _, _ = self.maps.pop(place)
            self.ended.add(place)
            self.say(node_of(place[0]), place[0], SegmentUnpinned(name, place[1]))

    def give_up(self, which: int) -> None:
        waiting = [one for one in self.asked.values() if isinstance(one, PinSegment)]
        waiting = [one for one in waiting if (one.process, one.serial) not in self.ended]
        if waiting:
            self.let_go(waiting[which % len(waiting)])

    def let_go(self, pin: PinSegment) -> None:
        """Let a reader make sure that a pin that it does not have is never held."""
        place = (pin.process, pin.serial)
        if place not in self.ended and place not in self.maps:
            self.ended.add(place)
            self.say(node_of(pin.process), pin.process, SegmentUnpinned(pin.segment, pin.serial, pin.home))

    def borrow(self, which: int) -> None:
        """Let the driver without a node pull something."""
        if self.objects and REMOTE not in self.dead:
            one = self.objects[which % len(self.objects)]
            self.serial += 1
            self.loans[self.serial] = one
            request = LendSegment(
                puller=REMOTE, segment=one.name, size_bytes=PAGE_BYTES, serial=self.serial, job_id=JOB
            )
            self.ask(one.home, request)

    def end_loan(self, which: int) -> None:
        if self.loans:
            serial = list(self.loans)[which % len(self.loans)]
            one = self.loans.pop(serial)
            self.say(one.home, REMOTE, SegmentUnpinned(one.name, serial))

    def give(self, node: NodeId) -> None:
        """Let the driver without a node give a node something."""
        if REMOTE not in self.dead:
            self.serial += 1
            stream = f"p{self.serial}"
            self.given[stream] = node
            request = TakeObject(
                process=REMOTE,
                job_id=JOB,
                stream=stream,
                size_bytes=PAGE_BYTES,
                chunk_bytes=PAGE_BYTES,
                object_id=durable_id(REMOTE, ObjectKey(self.serial)),
                serial=self.serial,
            )
            self.ask(node, request)

    def take_back(self, which: int) -> None:
        """Let the driver despair of an answer."""
        if self.given:
            stream = list(self.given)[which % len(self.given)]
            self.say(self.given.pop(stream), REMOTE, SegmentFreed(stream))

    # -------------------------------------------------------------------------- what dies

    def end_process(self, process: ProcessId) -> None:
        if process in self.dead:
            return
        self.dead.add(process)
        self.maps = {place: one for place, one in self.maps.items() if place[0] != process}
        self.freed |= {one for one in self.objects if one.owner == process}
        if process == REMOTE:
            self.loans.clear()
            self.given.clear()
            event = JobFinished(job_id=JOB, driver=REMOTE, state=JobState.FAILED, message="")
            for node in NODES:
                self.inject(node, Event(event, "gcs"))
        else:
            self.inject(node_of(process), DriverEnded(process))

    def end_node(self, node: NodeId) -> None:
        if node in self.dead:
            return
        self.dead.add(node)
        self.nodes[node].alive = False
        self.nodes[node].incoming.clear()
        self.maps = {place: one for place, one in self.maps.items() if node_of(place[0]) != node}
        self.freed |= {one for one in self.objects if one.home == node}
        self.loans = {serial: one for serial, one in self.loans.items() if one.home != node}
        self.given = {stream: at for stream, at in self.given.items() if at != node}
        self.dead |= {process for process in PROCESSES if node_of(process) == node}
        self.inject(other(node), Event(NodeDied(node_id=node, reason=""), "gcs"))
        for token, (asker, context) in list(self.lending.items()):
            if asker != node:
                del self.lending[token]
                self.inject(asker, Answered(context, RequestTimeoutError("nothing came")))

    # -------------------------------------------------------------------------- what comes of commands

    def create(self, node: NodeId, which: int = 0, error: str = "") -> None:
        creating = self.nodes[node].creating
        if creating:
            command = creating.pop(which % len(creating))
            if error:
                del self.nodes[node].files[command.name + PART * command.filled]
            busy = self.nodes[node].busy.pop(command.name, "")
            self.inject(node, FileCreated(command.name, error, busy=busy))

    def hear_of_link(self, node: NodeId, which: int = 0) -> None:
        linking = self.nodes[node].linking
        if linking:
            self.inject(node, linking.pop(which % len(linking)))

    def move(self, at: NodeId, which: int, fate: str = "done") -> None:
        """Have a segment spilled, or filled again; or not."""
        node = self.nodes[at]
        if not node.moving:
            return
        command = node.moving.pop(which % len(node.moving))
        error = ObjectStoreFullError("the tier is full") if fate == "full" else ServiceError("the tier is away")
        if isinstance(command, SpillFile):
            assert node.files[command.name].content, "only what is whole is spilled"
            if fate == "done":
                self.spilled += 1
                self.durable[command.object_id, command.holder] = node.files[command.name].content
            self.inject(at, FileSpilled(command.name, command.holder, None if fate == "done" else error))
        else:
            contents = [content for (name, _), content in self.durable.items() if name == command.object_id]
            part = command.name + PART
            if fate == "done" and contents and part in node.files:
                self.returned += 1
                node.files[command.name] = node.files.pop(part)
                node.files[command.name].content = contents[0]
                self.inject(at, FileFilled(command.name))
            else:
                node.files.pop(part, None)
                self.inject(at, FileFilled(command.name, error))

    def answer(self, node: NodeId, which: int, lost: bool) -> None:
        """Have a home asked to lend; it may answer at once, later, or never."""
        asks = self.nodes[node].asks
        if not asks:
            return
        ask = asks.pop(which % len(asks))
        home = other(node)
        if home in self.dead or lost:
            if home not in self.dead:
                self.ask(home, ask.message)
            self.inject(node, Answered(ask.context, RequestTimeoutError("nothing came")))
            return
        self.lending[self.tokens + 1] = (node, ask.context)
        self.ask(home, ask.message)

    def answer_is_lost(self, which: int) -> None:
        if self.lending:
            asker, context = self.lending.pop(list(self.lending)[which % len(self.lending)])
            self.inject(asker, Answered(context, RequestTimeoutError("nothing came")))

    def finish_pull(self, at: NodeId, which: int, error: str = "") -> None:
        node = self.nodes[at]
        if not node.pulls:
            return
        name = list(node.pulls)[which % len(node.pulls)]
        pull = node.pulls.pop(name)
        content = ""
        if is_node(pull.source) and pull.source not in self.dead:
            content = self.nodes[NodeId(pull.source)].offered.get(pull.stream, "")
        elif pull.stream in self.given:
            content = f"{REMOTE}:{pull.stream}"
        if not error and not content:
            error = "not_found"
        if not error:
            self.copied += 1
            node.files[name].content = content
        self.inject(at, Pulled(name, error, error))

    def deliver(self, node: NodeId, count: int = 1) -> None:
        incoming = self.nodes[node].incoming
        for _ in range(min(count, len(incoming))):
            peer, record = incoming.popleft()
            if peer not in self.dead:
                self.inject(node, Received(peer, [record]))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for at, node in self.nodes.items():
            if node.alive:
                self.perform(at, node.core.tick(self.now))

    # -------------------------------------------------------------------------- what must hold

    def check(self) -> None:
        for node in self.nodes.values():
            if node.alive:
                node.core.sanity_check()
                assert len(node.files) - len(node.busy) <= STORE_PAGES, "there is never more than there is room for"
                for name, content in node.offered.items():
                    assert node.files[name].content == content, "what is sent does not change"
        for (process, _), (name, content, file) in self.maps.items():
            assert self.nodes[node_of(process)].files[name] is file, "what is mapped keeps its file"
            assert file.content == content, "what is mapped does not change"
        for one in self.living():
            if one.owner not in self.dead:
                self.check_kept(one)

    def check_kept(self, one: Object) -> None:
        node = self.nodes[one.home]
        segment = node.core.segments.get(one.name)
        assert segment is not None, "an object is kept until it is freed"
        in_tier = self.durable.get((segment.object_id, segment.holder)) == one.content
        file = node.files.get(one.name)
        assert in_tier or (file is not None and file.content == one.content), "nothing acknowledged is lost"

    def settle(self) -> None:
        """Let everything come to its end."""
        for _ in range(40):
            for node in NODES:
                if node in self.dead:
                    continue
                while self.nodes[node].creating:
                    self.create(node)
                while self.nodes[node].moving:
                    self.move(node, 0)
                self.deliver(node, 1000)
                while self.nodes[node].asks:
                    self.answer(node, 0, lost=False)
                while self.nodes[node].linking:
                    self.hear_of_link(node)
                for _ in range(len(self.nodes[node].pulls)):
                    self.finish_pull(node, 0)
            self.check()
            self.pass_time(STALL_SECONDS / 4)

    def finish(self) -> None:
        """End everything, and see that nothing is left."""
        self.settle()
        while self.maps:
            self.unpin(0)
        while self.loans:
            self.end_loan(0)
        self.settle()
        while self.maps:  # who waited for room
            self.unpin(0)
        self.settle()
        waiting = [one for one in self.asked.values() if self.is_answerable(one)]
        assert not waiting, "nobody waits for ever"
        assert not self.lending
        while self.given:
            self.take_back(0)
        while self.maps:
            self.unpin(0)
        while self.living():
            self.free(0)
        self.settle()
        for node in self.nodes.values():
            if node.alive:
                self.check_empty(node)
        if all(node.alive for node in self.nodes.values()):
            assert not self.durable, "nothing durable is left"

    def is_answerable(self, request: Message) -> bool:
        """Tell whether the node that was asked lives, where that is known."""
        match request:
            case PinSegment(process=process) | AllocateSegment(process=process):
                return node_of(process) not in self.dead
            case _:
                return all(node.alive for node in self.nodes.values())

    def check_empty(self, node: Node) -> None:
        assert len(node.core.segments) == 0, "nothing is left"
        assert len(node.core.memory.copies) == 0
        assert len(node.core.memory.loans) == 0
        assert not node.core.memory.nodes()
        assert not node.core.memory.jobs()
        assert not node.offered
        assert not node.pulls
        assert not node.links & {*node.files}
        assert len(node.files) * PAGE_BYTES == node.core.segments.warm_bytes, "only warm files are left"


which = st.integers(0, 50)
node = st.sampled_from(NODES)
process = st.sampled_from(PROCESSES)
FATES = ["done", "done", "done", "full", "away"]


class SharedMemories(RuleBasedStateMachine):
    """Any history."""

    @initialize(made=st.integers(0, 2 * STORE_PAGES), beside=st.booleans(), boot_id=st.sampled_from(["boot", "other"]))
    def start(self, made: int, beside: bool, boot_id: str) -> None:
        self.world = World(beside, other_boot_id=boot_id)
        for _ in range(made):
            self.world.make(PROCESSES[made % 2 * 3])
        if made > STORE_PAGES:
            self.world.settle()

    @rule(process=process)
    def an_object_is_made(self, process: ProcessId) -> None:
        self.world.make(process)

    @rule(which=which)
    def an_object_is_freed(self, which: int) -> None:
        self.world.free(which)

    @rule(process=process, which=which)
    def a_reader_asks(self, process: ProcessId, which: int) -> None:
        self.world.pin(process, which)

    @rule(which=which)
    def a_reader_asks_again(self, which: int) -> None:
        self.world.pin_again(which)

    @rule(process=process, which=which)
    def a_task_is_queued(self, process: ProcessId, which: int) -> None:
        self.world.want(process, which)

    @rule(which=which)
    def a_reader_lets_go(self, which: int) -> None:
        self.world.unpin(which)

    @rule(which=which)
    def a_reader_gives_up(self, which: int) -> None:
        self.world.give_up(which)

    @rule(which=which)
    def the_driver_elsewhere_pulls(self, which: int) -> None:
        self.world.borrow(which)

    @rule(which=which)
    def the_driver_elsewhere_has_pulled(self, which: int) -> None:
        self.world.end_loan(which)

    @rule(node=node)
    def the_driver_elsewhere_gives(self, node: NodeId) -> None:
        self.world.give(node)

    @rule(which=which)
    def the_driver_elsewhere_takes_back(self, which: int) -> None:
        self.world.take_back(which)

    @rule(process=st.sampled_from([PROCESSES[1], PROCESSES[4], REMOTE]))
    def a_process_dies(self, process: ProcessId) -> None:
        self.world.end_process(process)

    @rule(node=node, which=which, error=st.sampled_from(["", "", "", "no memory"]))
    def a_file_is_made(self, node: NodeId, which: int, error: str) -> None:
        self.world.create(node, which, error)

    @rule(node=node, which=which)
    def a_file_is_linked(self, node: NodeId, which: int) -> None:
        self.world.hear_of_link(node, which)

    @rule(node=node, which=which, fate=st.sampled_from(FATES))
    def bytes_are_moved(self, node: NodeId, which: int, fate: str) -> None:
        self.world.move(node, which, fate)

    @rule(node=node, which=which, lost=st.booleans())
    def a_home_is_asked(self, node: NodeId, which: int, lost: bool) -> None:
        self.world.answer(node, which, lost)

    @rule(which=which)
    def an_answer_is_lost(self, which: int) -> None:
        self.world.answer_is_lost(which)

    @rule(node=node, which=which, error=st.sampled_from(["", "", "", "object_fetch_timed_out", "not_found"]))
    def a_pull_ends(self, node: NodeId, which: int, error: str) -> None:
        self.world.finish_pull(node, which, error)

    @rule(node=node, count=st.integers(1, 3))
    def records_arrive(self, node: NodeId, count: int) -> None:
        self.world.deliver(node, count)

    @rule(seconds=st.sampled_from([0.1, 1.0, STALL_SECONDS, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(node=node, really=st.integers(0, 9))
    def a_node_dies(self, node: NodeId, really: int) -> None:
        if really == 0:
            self.world.end_node(node)

    @invariant()
    def it_is_sane(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish()


TestSharedMemories = SharedMemories.TestCase
TestSharedMemories.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_long_histories_in_which_much_is_going_on(seed: int, beside: bool) -> None:
    """Walk at random, deaths being rarer than work; hypothesis finds small cases, this finds crowded ones."""
    random = Random(seed)

    def which() -> int:
        return random.randrange(1000)

    def node() -> NodeId:
        return random.choice(NODES)

    def process() -> ProcessId:
        return random.choice(PROCESSES)

    world = World(beside)
    actions: dict[Callable[[], None], float] = {
        lambda: world.make(process()): 5,
        lambda: world.free(which()): 2,
        lambda: world.pin(process(), which()): 8,
        lambda: world.pin_again(which()): 1,
        lambda: world.want(process(), which()): 1,
        lambda: world.unpin(which()): 7,
        lambda: world.give_up(which()): 0.5,
        lambda: world.borrow(which()): 2,
        lambda: world.end_loan(which()): 2,
        lambda: world.give(node()): 1,
        lambda: world.take_back(which()): 0.3,
        lambda: world.end_process(random.choice([PROCESSES[1], PROCESSES[4], REMOTE])): 0.05,
        lambda: world.end_node(node()): 0.005,
        lambda: world.create(node(), which(), "no memory" * (random.random() < 0.05)): 12,
        lambda: world.hear_of_link(node(), which()): 12,
        lambda: world.move(node(), which(), random.choice(FATES)): 12,
        lambda: world.answer(node(), which(), random.random() < 0.1): 8,
        lambda: world.answer_is_lost(which()): 0.3,
        lambda: world.finish_pull(node(), which(), "object_fetch_timed_out" * (random.random() < 0.1)): 7,
        lambda: world.finish_pull(node(), which(), "not_found" * (random.random() < 0.5)): 1,
        lambda: world.deliver(node(), 3): 12,
        lambda: world.pass_time(random.choice([0.1, 1.0, STALL_SECONDS])): 2,
    }
    for action in random.choices([*actions], [*actions.values()], k=600):
        action()
        world.check()
    assert world.spilled or world.dead & {*NODES}, "something was spilled in this history"
    assert world.copied or world.linked or world.dead & {*NODES}, "something was copied in this history"
    assert world.linked or not beside or world.dead & {*NODES}, "something was linked in this history"
    world.finish()


# ------------------------------------------------------------------------------- what is decided, one by one


def made(world: World, process: ProcessId, count: int) -> None:
    for _ in range(count):
        world.make(process)
        world.settle()


def mapped(world: World, process: ProcessId, which: int) -> str:
    """Read an object, and return in which segment."""
    before = {*world.maps}
    world.pin(process, which)
    world.settle()
    (place,) = {*world.maps} - before
    return world.maps[place][0]


def test_one_copy_is_pulled_for_all_readers_and_dropped_only_when_room_is_needed() -> None:
    world = World()
    made(world, PROCESSES[0], STORE_PAGES)
    there = world.nodes[THERE].core
    for reader in PROCESSES[3:]:
        world.pin(reader, 0)
    world.create(THERE)
    assert len(world.nodes[THERE].asks) == 1
    world.settle()
    assert len(world.maps) == 3
    while world.maps:
        world.unpin(0)
    for index in range(1, STORE_PAGES):
        mapped(world, PROCESSES[3], index)
        world.unpin(0)
        world.settle()
    assert len(there.memory.copies) == STORE_PAGES
    made(world, PROCESSES[3], 1)
    assert len(there.memory.copies) == STORE_PAGES - 1
    assert world.nodes[HERE].core.memory.loans.holders() == {THERE}
    assert not world.spilled


def test_copies_go_before_what_is_durable_and_that_before_what_has_to_be_spilled() -> None:
    world = World()
    made(world, PROCESSES[3], STORE_PAGES)
    made(world, PROCESSES[0], STORE_PAGES + 1)
    assert world.spilled
    mapped(world, PROCESSES[0], 0)  # room for a copy is made of what is durable
    world.unpin(0)
    world.settle()
    here = world.nodes[HERE].core
    kept = {segment.name for segment in here.segments if segment.has_file() and not segment.is_copy}
    assert len(here.memory.copies) == 1
    made(world, PROCESSES[0], 1)
    assert len(here.memory.copies) == 0
    assert kept < {segment.name for segment in here.segments if segment.has_file()}, "the copy was enough"


def test_what_is_spilled_comes_back_for_a_puller_and_is_lent_then() -> None:
    world = World()
    made(world, PROCESSES[0], STORE_PAGES + 1)
    assert world.spilled
    assert "o1" not in world.nodes[HERE].files
    mapped(world, PROCESSES[3], 0)
    assert world.returned == 1


def test_what_is_lent_is_not_spilled() -> None:
    world = World()
    made(world, PROCESSES[0], STORE_PAGES)
    for index in range(STORE_PAGES):
        world.borrow(index)
    world.make(PROCESSES[0])
    world.settle()
    assert isinstance(world.heard[-1], ObjectStoreFullError)
    assert world.durable == {}
    world.end_loan(0)
    made(world, PROCESSES[0], 1)
    assert set(world.durable.values()) == {f"{HERE}:o1"}


def test_nothing_has_to_go_for_what_a_queued_task_will_read() -> None:
    world = World()
    made(world, PROCESSES[0], STORE_PAGES)
    made(world, PROCESSES[3], STORE_PAGES - 1)
    there = world.nodes[THERE].core
    for index in (0, 1):
        world.want(PROCESSES[3], index)
        world.settle()
        assert len(there.memory.copies) == 1
    assert not world.spilled


def test_a_copy_that_nobody_waits_for_any_more_wants_no_room() -> None:
    world = World()
    made(world, PROCESSES[0], 1)
    made(world, PROCESSES[3], STORE_PAGES)
    for index in range(1, 1 + STORE_PAGES):
        mapped(world, PROCESSES[3], index)
    world.pin(PROCESSES[4], 0)
    assert len(world.nodes[THERE].core.store.waiting) == 1
    world.give_up(0)
    world.deliver(THERE)
    assert len(world.nodes[THERE].core.store.waiting) == 0
    assert len(world.nodes[THERE].core.memory.copies) == 0


def test_a_home_that_has_died_is_named_in_the_error() -> None:
    world = World()
    made(world, PROCESSES[0], 1)
    world.pin(PROCESSES[3], 0)
    world.end_node(HERE)
    answer = world.heard[-1]
    assert isinstance(answer, NodeDiedError)
    assert HERE in str(answer)


def test_a_copy_of_a_node_beside_shares_its_file_and_nothing_is_pulled() -> None:
    world = World(beside=True)
    made(world, PROCESSES[0], 1)
    name = mapped(world, PROCESSES[3], 0)
    assert world.nodes[THERE].files[name] is world.nodes[HERE].files["o1"]
    assert (world.linked, world.copied) == (1, 0)
    world.free(0)
    world.settle()
    assert "o1" in world.nodes[HERE].files, "it is kept warm"
    assert world.nodes[THERE].files[name].content == f"{HERE}:o1"
    world.unpin(0)
    world.settle()
    assert world.nodes[THERE].files == {}, "only its home uses it again"


def test_only_the_first_copy_of_a_node_elsewhere_is_tried_to_be_linked() -> None:
    world = World()
    made(world, PROCESSES[0], 2)
    for index, asked in enumerate((2, 1)):
        world.pin(PROCESSES[3], index)
        before = world.tokens
        world.settle()
        assert world.tokens - before == asked
    assert (world.linked, world.copied) == (0, 2)


def test_copies_that_wait_until_others_have_found_that_out_are_pulled_at_once() -> None:
    world = World()
    made(world, PROCESSES[0], STORE_PAGES)
    for index in range(STORE_PAGES):
        world.pin(PROCESSES[3], index)
    before = world.tokens
    world.settle()
    assert world.tokens - before == STORE_PAGES + PULLS_AT_ONCE
    assert (world.linked, world.copied) == (0, STORE_PAGES)


@pytest.mark.parametrize("other_boot_id", ["another", ""])
def test_nothing_is_linked_from_another_kernel_whatever_folders_it_shares(other_boot_id: str) -> None:
    world = World(beside=True, other_boot_id=other_boot_id)
    made(world, PROCESSES[0], 1)
    mapped(world, PROCESSES[3], 0)
    assert (world.linked, world.copied) == (0, 1)


def test_what_lies_in_a_file_with_others_at_home_is_pulled_also_from_a_node_beside() -> None:
    world = World(beside=True, shared_bytes=PAGE_BYTES)
    made(world, PROCESSES[0], 1)
    mapped(world, PROCESSES[3], 0)
    assert (world.linked, world.copied) == (0, 1)
