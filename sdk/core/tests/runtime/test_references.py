"""What a reference is by itself: its names, its identity, and those that name nothing."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncIterator

import pytest

from shoal_core.protocol.errors import ObjectLostError
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.testing.builders import process_id
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    async with lone_runtime(process_id(1)) as lone:
        lone.runtime.install()
        yield lone
        lone.runtime.uninstall()


async def test_a_reference_is_itself_wherever_it_comes_back_from(lone: LoneRuntime) -> None:
    ref, other = lone.runtime.put(1), lone.runtime.put(1)
    assert ref != other
    assert len({ref, other, copy.copy(ref), copy.deepcopy([ref])[0]}) == 2
    outside = pickle.dumps(ref)
    assert pickle.loads(outside) is ref
    assert pickle.loads(lone.runtime.codec.dump([ref]).data)[0] is ref
    assert (len(ref.binary()), ref.hex(), len(ref.task_id().binary())) == (24, ref.binary().hex(), 20)
    assert not ref.is_nil()


async def test_what_was_pickled_outside_is_kept(lone: LoneRuntime) -> None:
    ref = lone.runtime.put(1)
    outside = pickle.dumps(ref)
    key = ref._state.key
    del ref
    lone.sent()
    assert key in lone.runtime.objects.owned
    assert pickle.loads(outside)._state.key == key


@pytest.mark.parametrize("ref", [ObjectRef.nil(), ObjectRef.from_random()])
async def test_a_reference_to_nothing_says_so_at_once(lone: LoneRuntime, ref: ObjectRef[object]) -> None:
    assert len(ref.binary()) == 24
    with pytest.raises(ObjectLostError, match="names no object"):
        lone.runtime.get([ref], None)
    with pytest.raises(ObjectLostError, match="names no object"):
        await asyncio.wait_for(ref, 5)
    with pytest.raises(ObjectLostError, match="names no object"):
        ref.future().result(5)
    assert lone.runtime.wait([ref], 1, None) == ([ref], [])
    with pytest.raises(ValueError, match="names no object"):
        lone.runtime.codec.dump([ref])
    with pytest.raises(ValueError, match="names no object"):
        pickle.dumps(ref)


def test_there_is_one_nil_and_chance_makes_others() -> None:
    assert ObjectRef.nil() is ObjectRef.nil()
    assert ObjectRef.nil().is_nil()
    assert ObjectRef.nil().hex().startswith("f" * 40)
    assert not ObjectRef.from_random().is_nil()
    assert ObjectRef.from_random().binary() != ObjectRef.from_random().binary()


async def test_a_reference_of_another_time_is_refused_where_it_would_be_sent(lone: LoneRuntime) -> None:
    async with lone_runtime(process_id(2)) as before:
        old = before.runtime.put(1)
    with pytest.raises(ValueError, match="from before"):
        lone.runtime.codec.dump([old])


async def test_on_completed_is_told_the_value_or_the_error(lone: LoneRuntime) -> None:
    told: list[object] = []
    heard = asyncio.Event()

    def hear(value: object) -> None:
        told.append(value)
        loop.call_soon_threadsafe(heard.set)

    loop = asyncio.get_running_loop()
    lone.runtime.put(5)._on_completed(hear)
    lone.reactor.drain()
    await asyncio.wait_for(heard.wait(), 5)
    ObjectRef.nil()._on_completed(hear)
    assert told[0] == 5
    assert isinstance(told[1], ObjectLostError)


async def test_what_is_ready_when_it_is_awaited_counts_as_awaited_too(
    lone: LoneRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a ``get`` of it would: the trace shows both, however quick the answer was."""
    told: list[object] = []
    monkeypatch.setattr(lone.runtime, "awaited", lambda state, began_ns: told.append(state))
    ref = lone.runtime.put(7)
    assert await ref == 7
    assert told == [ref._state]
