"""Values in shared memory: what is pinned for a reader is let go again, whatever goes wrong."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import numpy
import pytest

from shoal_core.protocol.errors import NotFoundError, RequestTimeoutError
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import Inline, SegmentMapped, SegmentsUnpinned, SegmentUnpinned, Stored, Value
from shoal_core.protocol.storage import MOST_PINS, PinSegment, PinSegments, SegmentPinned, SegmentsPinned
from shoal_core.runtime.commands import Say
from shoal_core.runtime.data.serialization import Codec, Serialized, as_inline, segment_bytes, written
from shoal_core.runtime.data.values import LARGE_BYTES, CopyUnavailable, Values
from shoal_core.runtime.data.writing import Writer
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import until
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

LOCAL = process_id(1)
NODE = node_id(1)


@pytest.mark.parametrize("pin_is_answered", [True, False])
async def test_a_pin_ends_where_the_segment_cannot_be_mapped(tmp_path: Path, pin_is_answered: bool) -> None:
    def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
        coroutine.close()
        if not pin_is_answered:
            raise RequestTimeoutError("no answer")
        return SegmentPinned(segment="o1", place="o1")

    async with lone_runtime(LOCAL) as lone:
        runtime = lone.runtime
        values = Values(runtime.bus, runtime.subjects, LOCAL, tmp_path, None, runtime.codec, runtime.reactor, call)
        with pytest.raises((FileNotFoundError, RequestTimeoutError)):
            values.read(Stored(node_id(1), "o1", LARGE_BYTES))
        home = NodeId("") if pin_is_answered else node_id(1)
        assert list(runtime.reactor.commands) == [Say(node_id(1), SegmentUnpinned("o1", 1, home))]
        assert not runtime.reactor.unpinned, "who waits for the room of a large object is told at once"


@pytest.mark.parametrize("found", [True, False])
async def test_a_large_segment_is_mapped_first_and_the_node_told_then(tmp_path: Path, found: bool) -> None:
    def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
        coroutine.close()
        asked.append("a pin")
        (tmp_path / "o2").rename(tmp_path / "o1")
        return SegmentPinned(segment="o1", place="o1")

    asked: list[str] = []
    serialized = Codec(lambda ref: None).dump(numpy.arange(LARGE_BYTES // 8))
    name = "o1" if found else "o2"
    (tmp_path / name).write_bytes(bytes(segment_bytes(serialized)))
    size = Writer(tmp_path, lambda _seconds, _callback: None).write(name, serialized)
    async with lone_runtime(LOCAL) as lone:
        runtime = lone.runtime
        values = Values(runtime.bus, runtime.subjects, LOCAL, tmp_path, None, runtime.codec, runtime.reactor, call)
        value = values.read(Stored(NODE, "o1", size))
        assert value[-1] == LARGE_BYTES // 8 - 1
        del value
        ended = Say(NODE, SegmentUnpinned("o1", 1))
        assert list(runtime.reactor.commands) == [Say(NODE, SegmentMapped("o1", 1)), ended][not found :]
        assert len(asked) == (not found), "what lies elsewhere by now is asked for"


class Node:
    """Answers a process's requests: pins what it has, and refuses the rest."""

    def __init__(self, *segments: str) -> None:
        self.segments = segments
        self.requests: list[Message] = []

    def answer(self, request: Message) -> Message:
        self.requests.append(request)
        if isinstance(request, PinSegments):
            return SegmentsPinned(places={name: name for name in request.pins if name in self.segments})
        raise NotFoundError("gone")


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    async with lone_runtime(LOCAL) as lone:
        yield lone


def run_at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


def values_on(lone: LoneRuntime, folder: Path, node: Node) -> Values:
    runtime = lone.runtime
    values = Values(runtime.bus, runtime.subjects, LOCAL, folder, None, runtime.codec, runtime.reactor, run_at_once)

    async def ask_node(verb: str, request: Message, timeout_seconds: float = 0) -> Any:
        return node.answer(request)

    values._ask_node = ask_node  # type: ignore[method-assign, assignment]
    return values


def write(folder: Path, name: str, text: str) -> Stored:
    serialized = Serialized(pickle.dumps(text))
    (folder / name).write_bytes(bytes(segment_bytes(serialized)))
    return Stored(NODE, name, Writer(folder, lambda _seconds, _callback: None).write(name, serialized))


async def test_many_segments_are_pinned_with_one_request_and_each_is_let_go(lone: LoneRuntime, tmp_path: Path) -> None:
    node = Node("a", "b")
    values = values_on(lone, tmp_path, node)
    stored: list[Value] = [write(tmp_path, "a", "one"), Inline(pickle.dumps("two")), write(tmp_path, "b", "three")]
    with values.pinned(stored) as pins:
        assert [values.read(value, pins) for value in stored] == ["one", "two", "three"]
    assert node.requests == [PinSegments(process=LOCAL, pins={"a": 1, "b": 2})]
    assert list(lone.reactor.unpinned) == [("a", 1), ("b", 2)]
    await until(lambda: not lone.reactor.unpinned)
    assert lone.sent() == [(NODE, SegmentsUnpinned([("a", 1), ("b", 2)]))], "together, a moment later"


async def test_a_single_segment_is_pinned_as_it_is_read(lone: LoneRuntime, tmp_path: Path) -> None:
    node = Node()
    values = values_on(lone, tmp_path, node)
    with values.pinned([Stored(NODE, "a", 9), Stored(node_id(2), "b", 9), Inline(b"")]) as pins:
        assert pins == {}
    assert node.requests == []


async def test_what_could_not_be_pinned_is_asked_for_alone_and_says_why(lone: LoneRuntime, tmp_path: Path) -> None:
    node = Node("a", "c")
    values = values_on(lone, tmp_path, node)
    stored = [write(tmp_path, name, name) for name in ("a", "b", "c")]

    def read_all() -> None:
        with values.pinned(stored) as pins:
            for value in stored:
                values.read(value, pins)

    with pytest.raises(CopyUnavailable) as raised:
        read_all()
    assert raised.value.value == stored[1], "the one that is gone"
    assert node.requests[1:] == [
        PinSegment(process=LOCAL, segment="b", serial=4, home=NODE, size_bytes=stored[1].size_bytes)
    ]
    assert set(lone.reactor.unpinned) == {("a", 1), ("b", 2), ("c", 3)}, "whatever was pinned is let go"
    assert list(lone.reactor.commands) == [Say(NODE, SegmentUnpinned("b", 4, NODE))], "and what may yet be"


async def test_very_many_segments_are_pinned_some_at_a_time(lone: LoneRuntime, tmp_path: Path) -> None:
    names = [f"o{number}" for number in range(2 * MOST_PINS + 1)]
    node = Node(*names)
    values = values_on(lone, tmp_path, node)
    with values.pinned([Stored(NODE, name, 9) for name in names]) as pins:
        assert len(pins) == len(names)
    assert [len(request.pins) for request in node.requests if isinstance(request, PinSegments)] == [1000, 1000, 1]


def test_a_value_in_a_segment_is_the_same_inline() -> None:
    codec = Codec(lambda ref: None)
    for value in ({"a": [1, 2]}, b"x" * 200_000, bytearray(b"y" * 1000), numpy.arange(1000)):
        inline = as_inline(written(codec.dump(value)))
        assert pickle.dumps(codec.load(inline)) == pickle.dumps(value)
