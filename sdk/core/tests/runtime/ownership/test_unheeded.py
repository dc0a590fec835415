"""Which errors are told because nobody asks for them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import FunctionId, LeaseId
from shoal_core.protocol.records import Failed, Fetch, LeaseGranted, Task, TaskDone
from shoal_core.runtime.ownership import unheeded
from shoal_core.runtime.ownership.streams import STREAMING, ObjectRefGenerator
from shoal_core.runtime.runtime import Call
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

NODE = node_id(1)
LOCAL = process_id(1)
WORKER = process_id(2)


class World:
    """A process that submits tasks which fail, one after the other, and what its log says."""

    def __init__(self, lone: LoneRuntime, log: pytest.LogCaptureFixture) -> None:
        self.lone = lone
        self._log = log
        self._key = lone.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),)))

    def submit(self, returns: int = 1, given: object = None) -> list[Any]:
        call = Call(FunctionId("f" * 32), "work", returns, self._key, 0, b"")
        return self.lone.runtime.submit(call, () if given is None else (given,), {})

    def fail(self, text: str, code: str = "worker_crashed") -> None:
        """Have a worker run the task that was submitted, and fail."""
        self.lone.reactor.drain()
        [key] = self.lone.reactor.submission.keys.values()
        if key.slots:
            slot = next(iter(key.slots))
            self.lone.receive(NODE, LeaseGranted(LeaseId(slot + 1), key.index, slot, WORKER))
        [(_, task)] = self.lone.sent(Task)
        assert isinstance(task, Task)
        values = (Failed(code, text),) * max(1, abs(task.returns))
        self.lone.receive(WORKER, TaskDone(task.number, task.attempt, task.lease, values, 0.001))

    def told(self) -> list[str]:
        self.lone.reactor.drain()
        return [record.getMessage().rpartition(": ")[2] for record in self._log.records if record.name == "shoal"]


@pytest.fixture
async def world(caplog: pytest.LogCaptureFixture) -> AsyncIterator[World]:
    async with lone_runtime(LOCAL) as lone:
        yield World(lone, caplog)


async def test_of_a_task_whose_reference_was_dropped_before_it_failed(world: World) -> None:
    world.submit()
    world.fail("dropped early")
    assert world.told() == ["dropped early"]


async def test_of_a_task_whose_reference_is_dropped_after_it_failed(world: World) -> None:
    refs = world.submit()
    world.fail("dropped late")
    assert world.told() == []
    del refs
    assert world.told() == ["dropped late"]


async def test_of_several_objects_one_speaks_for_all(world: World) -> None:
    refs = world.submit(returns=3)
    world.fail("of three")
    del refs[0]
    assert world.told() == ["of three"]
    refs.clear()
    assert world.told() == ["of three"]


async def test_of_a_task_that_returns_nothing(world: World) -> None:
    assert world.submit(returns=0) == []
    world.fail("without objects")
    assert world.told() == ["without objects"]


async def test_not_what_get_has_raised_nor_what_was_asked_for_with_it(world: World) -> None:
    [first], [second] = world.submit(), world.submit()
    world.fail("the first")
    world.fail("the second")
    with pytest.raises(ShoalError, match="the first"):
        world.lone.runtime.get([first, second], 0)
    del first, second
    assert world.told() == []


async def test_not_what_was_awaited(world: World) -> None:
    [ref] = world.submit()
    world.fail("awaited")
    with pytest.raises(ShoalError, match="awaited"):
        await ref
    del ref
    assert world.told() == []


async def test_not_what_makes_another_task_fail_which_is(world: World) -> None:
    [first] = world.submit()
    [second] = world.submit(given=first)
    del first
    world.fail("of the first")
    assert world.told() == []
    del second
    assert world.told() == ["of the first"]


async def test_not_what_another_process_was_given(world: World) -> None:
    [ref] = world.submit()
    world.fail("given")
    world.lone.receive(WORKER, Fetch(ref._state.key))
    del ref
    assert world.told() == []


async def test_of_a_generator_its_last_item(world: World) -> None:
    [gen] = world.submit(returns=STREAMING)
    assert isinstance(gen, ObjectRefGenerator)
    world.fail("of a generator")
    last = next(gen)
    with contextlib.suppress(StopIteration):
        next(gen)
    assert world.told() == []
    del last
    assert world.told() == ["of a generator"]
    del gen
    assert world.told() == ["of a generator"]


@pytest.mark.parametrize("code", ["task_cancelled", "task_killed", "actor_died"])
async def test_not_what_somebody_wanted(world: World, code: str) -> None:
    world.submit()
    world.fail("wanted", code)
    assert world.told() == []


async def test_the_same_again_only_after_a_while(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for pause_seconds, times in ((60.0, 1), (60.0, 1), (0.0, 2)):
        monkeypatch.setattr(unheeded, "PAUSE_SECONDS", pause_seconds)
        world.submit()
        world.fail("over and over")
        assert len(world.told()) == times
