"""Segments that the node promises ahead: one at most, and given back when nothing is written there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from shoal_core.protocol.errors import RequestTimeoutError
from shoal_core.protocol.records import Failed, SegmentRecalled
from shoal_core.protocol.storage import SegmentGranted
from shoal_core.runtime.data import ahead
from shoal_core.runtime.data.ahead import LEAST_BYTES, MOST_BYTES, Ahead
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import until
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

SIZE = 2 * LEAST_BYTES


@dataclass
class Node:
    """Promises segments, as long as it has room; ``returned`` were given back."""

    has_room: bool = True
    answers: bool = True
    asked: list[int] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)

    async def promise(self, size_bytes: int) -> SegmentGranted:
        self.asked.append(size_bytes)
        if not self.answers:
            raise RequestTimeoutError("no answer")
        name = f"o{len(self.asked)}" if self.has_room else ""
        return SegmentGranted(segment=name, place=name, capacity_bytes=size_bytes)


class Process:
    """One that writes values."""

    def __init__(self, lone: LoneRuntime) -> None:
        self.node = Node()
        self.reactor = lone.runtime.reactor
        self.ahead = Ahead(self.reactor, self.spawn, self.node.promise, self.node.returned.append)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what waits for nothing."""
        with pytest.raises(StopIteration):
            work.send(None)

    def write(self, size_bytes: int = SIZE) -> str:
        """Write a value; return the segment that was promised for it, if any was."""
        granted = self.ahead.take(size_bytes)
        self.ahead.written(size_bytes)
        self.reactor.drain()
        return "" if granted is None else granted.segment

    def hear(self, segment: str) -> None:
        self.reactor.deliver(node_id(1), [SegmentRecalled(segment)])


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    async with lone_runtime(process_id(1)) as lone:
        yield Process(lone)


async def test_who_writes_values_of_one_size_has_the_next_segment_promised(process: Process) -> None:
    assert [process.write() for _ in range(4)] == ["", "", "o1", "o2"]
    assert process.write(SIZE + 1) == "", "of another size"
    assert process.node.asked == [SIZE] * 3, "and one at a time"
    assert process.write() == "o3"
    assert process.node.returned == []


@pytest.mark.parametrize("size", [LEAST_BYTES, MOST_BYTES + 1])
async def test_nothing_is_promised_for_what_is_small_or_very_large(process: Process, size: int) -> None:
    assert [process.write(size) for _ in range(3)] == [""] * 3
    assert process.node.asked == []


async def test_nothing_is_promised_to_who_writes_now_and_then(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "KEPT_SECONDS", 0.0)
    assert [process.write() for _ in range(3)] == [""] * 3
    assert process.node.asked == []


async def test_what_is_not_used_for_a_moment_is_given_back(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    process.write()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda _seconds, callback, *args: loop.call_soon(callback, *args))
    process.write()
    await until(lambda: process.node.returned == ["o1"])
    assert process.write() == ""


async def test_what_is_recalled_is_given_back_unless_it_is_used(process: Process) -> None:
    process.write()
    process.write()
    process.hear("o0")
    assert process.node.returned == []
    process.hear("o1")
    assert process.node.returned == ["o1"]
    process.hear("o1")
    assert [process.write(), process.write()] == ["", "o2"]
    process.hear("o2")
    assert process.node.returned == ["o1"], "the other is written"


async def test_where_nothing_is_promised_whoever_writes_asks_as_before(process: Process) -> None:
    process.node.has_room = False
    assert [process.write() for _ in range(3)] == [""] * 3
    process.node.answers = False
    assert process.write() == ""
    process.node.has_room = process.node.answers = True
    assert [process.write(), process.write()] == ["", "o4"]


async def test_a_process_that_has_left_writes_nothing_into_what_it_was_promised(process: Process) -> None:
    process.write()
    process.write()
    process.reactor.disown(Failed("system", "forked"))
    assert process.ahead.take(SIZE) is None
