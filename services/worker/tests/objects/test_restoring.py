"""How a node fetches durable objects for its processes, message by message."""

from __future__ import annotations

from typing import Any

from shoal_core.protocol.effects import Received, Reply, Request, Start
from shoal_core.protocol.errors import DeclaredDeadError, NotFoundError, ObjectStoreFullError
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.messages import AttachDriver, NodeDescription
from shoal_core.protocol.records import SegmentFreed
from shoal_core.protocol.storage import ObjectRestored, RestoreObject
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_worker.inputs import DriverEnded
from shoal_worker.node import NodeCore
from shoal_worker.objects.files import (
    CreateFile,
    DurableFound,
    FileCreated,
    FileFilled,
    FillFile,
    FindDurable,
    RemoveFile,
)

ASKER = process_id(1)
OBJECT = "0" * 48
SIZE = 5000


class Node:
    """A node with one driver, whose commands are kept."""

    def __init__(self) -> None:
        description = NodeDescription(
            node_id=node_id(1),
            hostname="host",
            address="127.0.0.1",
            machine_id="machine",
            pid=1,
            total={},
            shared_memory_path="/nowhere",
            object_store_bytes=64 * 1024,
            version="1",
            python_version="3.11",
            started_at=0.0,
        )
        self.core = NodeCore(description, Subjects("test"))
        self.commands: list[Any] = []
        self.answers: dict[int, Any] = {}
        attach = AttachDriver(driver=ASKER, job_id=JobId("00000001"), machine_id="machine", pid=1)
        self.take(Request(attach, 100))
        self.commands.clear()

    def take(self, message: Any) -> None:
        for effect in self.core.handle(message, 0.0):
            if isinstance(effect, Reply):
                assert effect.token not in self.answers, "every request has one reply"
                self.answers[effect.token] = effect.message
            elif isinstance(effect, Start):
                self.commands.append(effect.command)
        self.core.sanity_check()

    def ask(self, token: int, serial: int = 1) -> None:
        self.take(Request(RestoreObject(process=ASKER, object_id=OBJECT, serial=serial), token))

    def command(self, kind: type) -> Any:
        [command] = [command for command in self.commands if isinstance(command, kind)]
        self.commands.remove(command)
        return command

    def find(self, size_bytes: int = SIZE) -> None:
        self.take(DurableFound(self.command(FindDurable).restoration, size_bytes))

    def make(self) -> str:
        name: str = self.command(CreateFile).name
        self.take(FileCreated(name))
        return name


def test_an_object_is_found_given_a_segment_filled_and_then_the_askers() -> None:
    node = Node()
    node.ask(1)
    node.ask(2)
    node.find()
    name = node.make()
    assert node.command(FillFile) == FillFile(name, OBJECT, SIZE)
    assert 1 not in node.answers
    node.take(FileFilled(name))
    restored = ObjectRestored(segment=name, size_bytes=SIZE)
    node.ask(3)
    assert (node.answers[1], node.answers[2], node.answers[3]) == (restored, restored, restored)
    assert node.commands == []
    node.take(Received(ASKER, [SegmentFreed(name)]))
    assert len(node.core.segments) == 0


def test_an_object_that_is_not_there_leaves_nothing_and_may_be_asked_for_again() -> None:
    node = Node()
    node.ask(1)
    node.take(DurableFound(node.command(FindDurable).restoration, 0, NotFoundError("nothing")))
    assert isinstance(node.answers[1], NotFoundError)
    node.ask(2)
    assert isinstance(node.command(FindDurable), FindDurable)


def test_an_object_for_which_there_is_no_room_or_no_file_is_refused() -> None:
    node = Node()
    node.ask(1)
    node.find(1 << 30)
    assert isinstance(node.answers[1], ObjectStoreFullError)
    node.ask(2, serial=2)
    node.find()
    node.take(FileCreated(node.command(CreateFile).name, "no room"))
    assert isinstance(node.answers[2], ObjectStoreFullError)
    assert len(node.core.segments) == 0


def test_an_object_that_cannot_be_read_leaves_no_file() -> None:
    node = Node()
    node.ask(1)
    node.find()
    name = node.make()
    node.command(FillFile)
    node.take(FileFilled(name, NotFoundError("it was deleted")))
    assert isinstance(node.answers[1], NotFoundError)
    assert node.commands == [RemoveFile(name)]


def test_an_asker_that_dies_at_any_step_is_answered_and_leaves_nothing() -> None:
    for step in range(3):
        node = Node()
        node.ask(1)
        if step > 0:
            node.find()
        if step > 1:
            node.make()
        node.take(DriverEnded(ASKER))
        if step == 0:
            node.find()
        elif step == 1:
            node.make()
        else:
            node.take(FileFilled(node.command(FillFile).name))
        assert isinstance(node.answers[1], DeclaredDeadError)
        assert len(node.core.segments) == 0
