"""Reading logs of worker processes: from which node, from where on, and in which pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import logs
from shoal.logs import LogReader, Place, Wanted, find_log, last_lines
from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.logs import LogDescription, LogPiece, NodeLogs, ReadLog
from shoal_core.protocol.messages import NodeList, NodeState
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode, encode
from shoal_core.testing.builders import node_id, node_record, process_id

SUBJECTS = Subjects("test")
NODE, OTHER, DEAD = node_id(1), node_id(2), node_id(3)
WORKER = process_id(1)


class Kept:
    """A log as its node keeps it: of all that was printed the bytes from ``first`` on, in small pieces."""

    def __init__(self, text: bytes, first: int = 0, most_bytes: int = 7, *, has_ended: bool = True) -> None:
        self.text = text
        self.first = first
        self.most_bytes = most_bytes
        self.has_ended = has_ended

    def piece(self, request: ReadLog) -> LogPiece:
        begin = min(max(request.position, self.first), len(self.text))
        data = self.text[begin : begin + min(self.most_bytes, request.most_bytes)]
        return LogPiece(position=begin, first=self.first, end=len(self.text), has_ended=self.has_ended, data=data)


@asynccontextmanager
async def asking(kept: Kept, *names: str) -> AsyncIterator[Bus]:
    """Join a cluster of which one node keeps logs of these names, all with this in them."""
    broker = MemoryBroker()
    listed = NodeLogs(
        logs=[LogDescription(name=name, process_id=WORKER, size_bytes=1, has_ended=False) for name in names]
    )
    nodes = NodeList(nodes=[node_record(NODE), node_record(DEAD, state=NodeState.DEAD)])
    async with (
        broker.connect(role=Role.GCS, identity="gcs", cluster="test") as gcs,
        broker.connect(role=Role.NODE, identity=NODE, cluster="test") as node,
        broker.connect(role=Role.OBSERVER, identity="looks", cluster="test") as bus,
    ):

        def read(message: Message) -> None:
            node.publish(message.reply, encode(kept.piece(decode(ReadLog, message.data))))

        def answer(by: Bus, message: Message, what: Any) -> None:
            by.publish(message.reply, encode(what))

        gcs.subscribe(SUBJECTS.gcs("list_nodes"), lambda message: answer(gcs, message, nodes))
        node.subscribe(SUBJECTS.node(NODE, "logs"), lambda message: answer(node, message, listed))
        node.subscribe(SUBJECTS.node(NODE, "log"), read)
        yield bus


async def read_all(bus: Bus, lines: int = -1, begin: int = 0) -> bytes:
    reader = LogReader(bus, SUBJECTS, Place(NODE, "a.out", begin), 1.0)
    await reader.start(lines)
    text = b""
    while data := await reader.read():
        text += data
    return text


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b".")), max_size=9), st.integers(-1, 10))
def test_the_last_lines(lines: list[bytes], count: int) -> None:
    text = b"".join(line + b"\n" for line in lines)
    wanted = lines if count < 0 else lines[max(0, len(lines) - count) :]
    assert last_lines(text, count) == b"".join(line + b"\n" for line in wanted)


def test_the_last_line_need_not_be_whole() -> None:
    assert last_lines(b"a\nb\nc", 2) == b"b\nc"
    assert last_lines(b"a", 1) == b"a"
    assert last_lines(b"a", 0) == b""


TEXT = b"".join(b"line %d\n" % number for number in range(20))


@pytest.mark.parametrize("most_bytes", [1, 7, 1000])
@pytest.mark.parametrize("lines", [-1, 0, 1, 3, 19, 20, 21])
async def test_a_log_is_read_from_its_last_lines_on(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int, lines: int
) -> None:
    monkeypatch.setattr(logs, "MOST_LOG_BYTES", 10)
    async with asking(Kept(TEXT, most_bytes=most_bytes)) as bus:
        assert await read_all(bus, lines) == last_lines(TEXT, lines)


async def test_what_was_printed_before_it_was_the_actors_is_left_out() -> None:
    async with asking(Kept(TEXT)) as bus:
        assert await read_all(bus, begin=14) == TEXT[14:]
        assert await read_all(bus, begin=14, lines=100) == TEXT[14:]
        assert await read_all(bus, begin=14, lines=2) == b"line 18\nline 19\n"


async def test_what_is_not_kept_is_told_in_its_place() -> None:
    async with asking(Kept(TEXT, first=14)) as bus:
        assert await read_all(bus) == b"[14 bytes are not kept]\n" + TEXT[14:]
        assert await read_all(bus, lines=100) == TEXT[14:]


async def test_who_follows_is_told_what_comes_and_when_nothing_will() -> None:
    kept = Kept(b"one\n", has_ended=False)
    async with asking(kept) as bus:
        reader = LogReader(bus, SUBJECTS, Place(NODE, "a.out"), 1.0)
        assert [await reader.read(), await reader.read()] == [b"one\n", b""]
        kept.text += b"two\n"
        assert [await reader.read(), await reader.read()] == [b"two\n", b""]
        kept.text, kept.first = kept.text + b"three\nfour\n", 14
        assert await reader.read() == b"[6 bytes are not kept]\nfour\n"
        kept.has_ended = True
        assert await reader.read() is None


async def test_the_newest_process_of_a_pid_is_meant() -> None:
    async with asking(Kept(b""), "worker-1-1-42.out", "worker-2-1-42.out") as bus:
        place = await find_log(bus, SUBJECTS, Wanted(node_id=NODE, pid=42), 1.0)
        assert place == Place(NODE, "worker-2-1-42.out")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(node_id=NODE, pid=42), f"Node {NODE} keeps no log of a worker process 42"),
        (Wanted(node_id=OTHER, pid=42), f"There is no node {OTHER}"),
        (Wanted(node_id=DEAD, filename="a.out"), f"Node {DEAD} is dead, and its logs went with it"),
        (Wanted(node_ip="10.9.8.7", filename="a.out"), r"There is no node 10\.9\.8\.7"),
    ],
)
async def test_where_there_is_no_such_log_the_error_says_what_is_missing(wanted: Wanted, says: str) -> None:
    async with asking(Kept(b"")) as bus:
        with pytest.raises(NotFoundError, match=says):
            await find_log(bus, SUBJECTS, wanted, 1.0)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({}, "whose log it is"),
        ({"actor_id": "a", "suffix": "log"}, "suffix must be 'out' or 'err', got 'log'"),
        ({"pid": 1}, "say node_id or node_ip"),
        ({"filename": "a.out"}, "say node_id or node_ip"),
        ({"pid": 1, "node_id": "a", "node_ip": "b"}, "not both: a, b"),
    ],
)
def test_what_is_no_choice_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Wanted(**wrong)
