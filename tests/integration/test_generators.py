"""Streaming generators on a real cluster: where they run, when items come, how they end, what is left of them."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from shoal import DynamicObjectRefGenerator, ObjectRefGenerator, exceptions
from shoal.cluster_utils import Cluster
from shoal_core.runtime.runtime import Runtime
from tests.integration.stores import stores, used_bytes
from tests.integration.waiting import SECONDS, get, until

LARGE = 1_000_000


def values(gen: Any) -> list[Any]:
    return [get(ref) for ref in gen]


def pass_gate(path: Path) -> None:
    """Wait in a task until the driver makes a file."""
    while not path.exists():
        time.sleep(0.005)


def note(path: Path, text: object) -> None:
    """Tell the driver something by way of a file."""
    with path.open("a") as file:
        print(text, file=file)


def noted(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def nothing_left() -> bool:
    """Tell whether this process knows of no task, no stream and no item of one, and nothing is used."""
    gc.collect()
    runtime = Runtime.current
    assert runtime is not None
    return not (runtime.reactor.tasks or runtime.reactor.streams or runtime.objects.owned)


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if shoal.is_initialized():
        until(nothing_left, "nothing is left of tasks, streams and items")


@shoal.remote
def count(number: int) -> Iterator[int]:
    yield from range(number)


@shoal.remote
def fails_at(number: int) -> Iterator[int]:
    for index in range(5):
        if index == number:
            raise ValueError(f"no {index}")
        yield index


@shoal.remote
def large_at_second_try(tries: Path) -> Iterator[bytes]:
    note(tries, "try")
    yield bytes(LARGE)
    if len(noted(tries)) == 1:
        raise ValueError("the first try")
    yield bytes(LARGE)


@shoal.remote
def gated(number: int, gate: Path) -> Iterator[int]:
    yield 0
    pass_gate(gate)
    yield from range(1, number)


@shoal.remote
def endless(log: Path, size: int = 0) -> Iterator[bytes]:
    try:
        number = 0
        while True:
            number += 1
            note(log, number)
            yield number.to_bytes(4, "big") + b"x" * size
    finally:
        note(log, "stopped")


@shoal.remote
def large(number: int, size: int = LARGE) -> Iterator[bytes]:
    for index in range(number):
        yield bytes([index]) * size


class PlainClass:
    def count(self, number: int) -> Iterator[int]:
        yield from range(number)

    @shoal.method(num_returns=4)
    def fails_at(self, number: int) -> Iterator[int]:
        yield from range(number)
        raise ValueError(f"no {number}")

    def gated(self, number: int, gate: Path) -> Iterator[int]:
        yield 0
        pass_gate(gate)
        yield from range(1, number)

    def fails(self) -> Iterator[int]:
        yield 0
        raise ValueError("no 1")

    def listed(self, number: int) -> list[int]:
        return list(range(number))


class AsyncClass:
    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def count(self, number: int) -> AsyncIterator[int]:
        for index in range(number):
            await asyncio.sleep(0)
            yield index

    async def gated(self, number: int) -> AsyncIterator[int]:
        yield 0
        await self.opened.wait()
        for index in range(1, number):
            yield index

    async def fails(self) -> AsyncIterator[int]:
        yield 0
        raise ValueError("no 1")

    async def open(self) -> None:
        self.opened.set()

    def sync_count(self, number: int) -> Iterator[int]:
        yield from range(number)

    async def endless(self, log: str) -> AsyncIterator[int]:
        try:
            for number in range(1 << 60):
                await asyncio.sleep(0)
                yield number
        finally:
            note(Path(log), "stopped")


Plain: Any = shoal.remote(PlainClass)
Async: Any = shoal.remote(AsyncClass)
Threaded: Any = shoal.remote(max_concurrency=3)(PlainClass)


@pytest.mark.usefixtures("two_cpus")
class TestItems:
    def test_a_generator_is_there_at_once_and_its_items_while_it_runs(self, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        gen = gated.remote(3, gate)
        assert isinstance(gen, ObjectRefGenerator)
        assert get(next(gen)) == 0
        assert not gen.next_ready()
        assert not gen.is_finished()
        assert shoal.wait([gen.completed()], timeout=0) == ([], [gen.completed()])
        gate.touch()
        assert values(gen) == [1, 2]
        assert gen.is_finished()
        assert get(gen.completed()) is None
        with pytest.raises(StopIteration):
            next(gen)

    def test_a_generator_may_be_empty_and_may_be_long(self) -> None:
        assert values(count.remote(0)) == []
        refs = list(count.remote(5_000))
        assert get(refs) == list(range(5_000))

    def test_items_are_references_like_any_other(self) -> None:
        first, second = list(count.remote(2))

        @shoal.remote
        def add(x: int, y: list[Any]) -> int:
            other: int = shoal.get(y[0])
            return x + other

        assert get(add.remote(second, [second])) == 2
        assert get(first) == 0

    @pytest.mark.parametrize("actor_class", [Plain, Threaded], ids=["plain", "threaded"])
    def test_methods_of_actors_stream(self, actor_class: Any, tmp_path: Path) -> None:
        actor = actor_class.remote()
        assert values(actor.count.remote(4)) == [0, 1, 2, 3]
        gen = actor.gated.remote(3, tmp_path / "gate")
        assert get(next(gen)) == 0
        assert not gen.next_ready()
        (tmp_path / "gate").touch()
        assert values(gen) == [1, 2]
        assert values(actor.listed.options(num_returns="streaming").remote(2)) == [0, 1]

    def test_a_threaded_actor_runs_several_generators_at_once(self, tmp_path: Path) -> None:
        actor = Threaded.remote()
        gens = [actor.gated.remote(2, tmp_path / "gate") for _ in range(3)]
        assert [get(next(gen)) for gen in gens] == [0, 0, 0]
        (tmp_path / "gate").touch()
        assert [values(gen) for gen in gens] == [[1], [1], [1]]

    def test_an_async_actor_streams_from_all_kinds_of_generators(self) -> None:
        actor = Async.remote()
        assert values(actor.count.remote(4)) == [0, 1, 2, 3]
        assert values(actor.sync_count.remote(4)) == [0, 1, 2, 3]
        gens = [actor.gated.remote(3) for _ in range(3)]
        assert [get(next(gen)) for gen in gens] == [0, 0, 0]
        get(actor.open.remote())
        assert [values(gen) for gen in gens] == [[1, 2]] * 3

    def test_async_for(self) -> None:
        async def take(number: int) -> list[int]:
            return [await ref async for ref in count.remote(number)]

        async def main() -> tuple[list[int], list[int]]:
            return await asyncio.gather(take(3), take(4))

        first, second = asyncio.run(main())
        assert (first, second) == ([0, 1, 2], [0, 1, 2, 3])

    def test_tasks_and_actors_consume_generators_of_others(self) -> None:
        @shoal.remote
        def total(number: int) -> int:
            return sum(shoal.get(ref) for ref in count.remote(number))

        @shoal.remote
        def doubled(number: int) -> Iterator[int]:
            for ref in count.remote(number):
                yield 2 * shoal.get(ref)

        assert get(total.remote(10)) == 45
        assert values(doubled.remote(4)) == [0, 2, 4, 6]

    def test_arguments_that_are_references(self) -> None:
        number = next(count.options(name="first").remote(1))
        assert values(count.remote(number)) == []

    def test_large_items_lie_in_shared_memory(self) -> None:
        assert [item[:1] * 2 for item in values(large.remote(4))] == [bytes([index]) * 2 for index in range(4)]
        first = next(large.remote(1))
        assert type(first._state.value).__name__ == "Stored"

    def test_arrays_are_read_without_a_copy(self) -> None:
        numpy = pytest.importorskip("numpy")

        @shoal.remote
        def arrays() -> Iterator[Any]:
            for index in range(3):
                yield numpy.full(LARGE, index)

        taken = values(arrays.remote())
        assert [int(array[-1]) for array in taken] == [0, 1, 2]
        assert not any(array.flags.writeable for array in taken)


@pytest.mark.usefixtures("two_cpus")
class TestOptions:
    def test_a_number_of_returns_makes_references(self) -> None:
        refs = count.options(num_returns=3).remote(3)
        assert get(refs) == [0, 1, 2]
        assert get(count.options(num_returns=1).remote(1)) == 0

    def test_what_is_yielded_beyond_a_number_of_returns_is_dropped(self) -> None:
        assert get(count.options(num_returns=2).remote(3)) == [0, 1]
        assert get(count.options(num_returns=1).remote(3)) == 0
        assert get(fails_at.options(num_returns=2).remote(2)) == [0, 1]
        assert get(Plain.remote().count.options(num_returns=2).remote(3)) == [0, 1]

    def test_values_that_were_yielded_before_a_failure_stay(self) -> None:
        failing: list[Any] = [fails_at.options(num_returns=4).remote(2), Plain.remote().fails_at.remote(2)]
        for refs in failing:
            assert get(refs[:2]) == [0, 1]
            for ref in refs[2:]:
                with pytest.raises(ValueError, match="no 2"):
                    get(ref)
        *made, missing = count.options(num_returns=3).remote(2)
        assert get(made) == [0, 1]
        with pytest.raises(ValueError, match="num_returns=3 but returned 2 values"):
            get(missing)

    def test_values_of_an_attempt_that_is_made_again_are_let_go(self, tmp_path: Path) -> None:
        again = large_at_second_try.options(num_returns=2, retry_exceptions=True, max_retries=1)
        assert [len(part) for part in get(again.remote(tmp_path / "tries"))] == [LARGE, LARGE]
        until(lambda: used_bytes() == 0, "the segments of both attempts are free")

    def test_a_generator_with_a_number_of_returns_is_cancelled(self, tmp_path: Path) -> None:
        first, second = gated.options(num_returns=2).remote(2, tmp_path / "gate")
        assert shoal.wait([first, second], timeout=0.5) == ([], [first, second])
        shoal.cancel(second)
        with pytest.raises(exceptions.TaskCancelledError):
            get(second)
        assert get(first) == 0

    def test_dynamic_returns_come_all_at_once(self) -> None:
        whole = get(count.options(num_returns="dynamic").remote(3))
        assert isinstance(whole, DynamicObjectRefGenerator)
        assert len(whole) == 3
        assert get(list(whole)) == [0, 1, 2]

    def test_an_exception_is_the_last_of_dynamic_returns(self, tmp_path: Path) -> None:
        *made, last = get(fails_at.options(num_returns="dynamic").remote(2))
        assert get(made) == [0, 1]
        with pytest.raises(ValueError, match="no 2"):
            get(last)
        again = large_at_second_try.options(num_returns="dynamic", retry_exceptions=True, max_retries=1)
        assert [len(part) for part in get(list(get(again.remote(tmp_path / "tries"))))] == [LARGE, LARGE]
        with pytest.raises(TypeError, match="not iterable"):
            get(shoal.remote(num_returns="dynamic")(len).remote(""))

    def test_dynamic_returns_of_a_method_come_all_at_once(self) -> None:
        class Yields:
            @shoal.method(num_returns="dynamic")
            def count(self, number: int, *, fails: bool = False) -> Iterator[int]:
                yield from range(number)
                if fails:
                    raise ValueError("after the last")

            def stream(self) -> Iterator[int]:
                yield 7

            def list(self) -> list[int]:
                return [7]

        actor: Any = shoal.remote(Yields).remote()
        whole = get(actor.count.remote(3))
        assert isinstance(whole, DynamicObjectRefGenerator)
        assert get(list(whole)) == [0, 1, 2]
        *made, last = get(actor.count.remote(2, fails=True))
        assert get(made) == [0, 1]
        with pytest.raises(ValueError, match="after the last"):
            get(last)
        assert get(list(get(actor.stream.options(num_returns="dynamic").remote()))) == [7]
        assert values(actor.count.options(num_returns="streaming").remote(2)) == [0, 1]
        with pytest.raises(TypeError, match="number"):
            actor.count.remote()
        with pytest.raises(ValueError, match="no generator function"):
            actor.list.options(num_returns="dynamic")

    def test_dynamic_returns_may_be_passed_on(self) -> None:
        @shoal.remote
        def total(whole: Any) -> int:
            return sum(shoal.get(list(whole)))

        assert get(total.remote(count.options(num_returns="dynamic").remote(4))) == 6

    def test_a_function_that_returns_a_list_streams_where_that_is_asked(self) -> None:
        @shoal.remote(num_returns="streaming")
        def listed() -> list[int]:
            return [1, 2, 3]

        assert values(listed.remote()) == [1, 2, 3]

    def test_what_cannot_be_iterated_over_is_named(self) -> None:
        @shoal.remote(num_returns="streaming")
        def number() -> int:
            return 1

        with pytest.raises(TypeError, match="returned a int, which cannot be iterated over"):
            get(list(number.remote()))  # type: ignore[call-overload]

    def test_a_generator_cannot_be_pickled_nor_passed(self) -> None:
        gen: Any = count.remote(1)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(gen)
        with pytest.raises(TypeError, match=r"argument 0"):
            count.remote(gen)
        with pytest.raises(TypeError, match="cannot be pickled"):
            shoal.put([gen])
        assert shoal.get(gen) is gen, "as Ray has it"
        assert values(gen) == [0]


@pytest.mark.usefixtures("two_cpus")
class TestErrors:
    def test_an_exception_is_the_last_item(self) -> None:
        gen = fails_at.remote(2)
        assert [get(next(gen)), get(next(gen))] == [0, 1]
        last = next(gen)
        with pytest.raises(ValueError, match="no 2"):
            get(last)
        with pytest.raises(StopIteration):
            next(gen)
        with pytest.raises(ValueError, match="no 2"):
            get(gen.completed())

    def test_an_exception_before_the_first_item(self) -> None:
        [ref] = list(fails_at.remote(0))
        with pytest.raises(ValueError, match="no 0"):
            get(ref)

    @pytest.mark.parametrize("actor_class", [Plain, Threaded, Async], ids=["plain", "threaded", "async"])
    def test_an_exception_in_an_actor(self, actor_class: Any) -> None:
        actor = actor_class.remote()
        first, last = list(actor.fails.remote())
        assert get(first) == 0
        with pytest.raises(ValueError, match="no 1"):
            get(last)
        assert values(actor.count.remote(2)) == [0, 1]

    def test_an_item_that_cannot_be_pickled(self) -> None:
        @shoal.remote
        def odd() -> Iterator[Any]:
            yield 1
            yield threading.Lock()

        first, last = list(odd.remote())
        assert get(first) == 1
        with pytest.raises(TypeError, match="pickle"):
            get(last)

    def test_an_error_in_an_asynchronous_loop(self) -> None:
        async def main() -> list[int]:
            taken = []
            refs = [ref async for ref in fails_at.remote(2)]
            for ref in refs[:-1]:
                taken.append(await ref)
            with pytest.raises(ValueError, match="no 2"):
                await refs[-1]
            return taken

        assert asyncio.run(main()) == [0, 1]

    def test_a_worker_that_dies_costs_no_item_and_doubles_none(self, tmp_path: Path) -> None:
        @shoal.remote
        def dies_once(tries: Path, gate: Path) -> Iterator[tuple[int, int]]:
            note(tries, os.getpid())
            attempt = len(noted(tries))
            for index in range(10):
                if index == 5 and attempt == 1:
                    pass_gate(gate)
                    os.kill(os.getpid(), signal.SIGKILL)
                yield attempt, index

        gen = dies_once.remote(tmp_path / "tries", tmp_path / "gate")
        taken = [get(next(gen)) for _ in range(3)]
        (tmp_path / "gate").touch()
        taken += values(gen)
        assert [index for _, index in taken] == list(range(10))
        assert {attempt for attempt, _ in taken[:3]} == {1}
        assert {attempt for attempt, _ in taken[5:]} == {2}
        assert len(noted(tmp_path / "tries")) == 2

    def test_a_generator_that_is_retried_for_its_exception_goes_on_where_its_user_is(self, tmp_path: Path) -> None:
        """With back-pressure, and on the same worker: it must not wait for what was taken long ago."""

        @shoal.remote(retry_exceptions=True, _generator_backpressure_num_objects=1)
        def fails_once(tries: Path) -> Iterator[int]:
            note(tries, "try")
            for index in range(6):
                if index == 3 and len(noted(tries)) == 1:
                    raise ValueError("once")
                yield index

        assert values(fails_once.remote(tmp_path / "tries")) == list(range(6))
        assert len(noted(tmp_path / "tries")) == 2

    def test_a_worker_that_dies_without_retries_is_the_last_item(self) -> None:
        @shoal.remote(max_retries=0)
        def dies(gate: str) -> Iterator[int]:
            yield 0
            pass_gate(Path(gate))
            os._exit(1)

        gate = Path(f"/tmp/shoal-test-gate-{os.getpid()}")
        try:
            gen = dies.remote(str(gate))
            assert get(next(gen)) == 0
            gate.touch()
            [last] = list(gen)
        finally:
            gate.unlink(missing_ok=True)
        with pytest.raises(exceptions.WorkerCrashedError):
            get(last)

    @pytest.mark.parametrize("how", ["task", "plain", "threaded", "async", "group"])
    def test_what_was_yielded_is_there_though_the_process_ends_in_what_follows(self, how: str) -> None:
        class Ends:
            @shoal.method(num_returns="streaming")
            def ends(self) -> Iterator[int]:
                yield from range(3)
                os._exit(1)

        class EndsOnALoop:
            async def ends(self) -> AsyncIterator[int]:
                for index in range(3):
                    yield index
                os._exit(1)

            @shoal.method(concurrency_group="other")
            async def ends_in_a_group(self) -> AsyncIterator[int]:
                for index in range(3):
                    yield index
                os._exit(1)

        if how == "task":
            gen = shoal.remote(max_retries=0)(lambda: Ends().ends()).options(num_returns="streaming").remote()
        elif how in ("plain", "threaded"):
            gen = shoal.remote(Ends).options(max_concurrency=1 + (how == "threaded")).remote().ends.remote()
        else:
            actor: Any = shoal.remote(concurrency_groups={"other": 2})(EndsOnALoop).remote()
            method = actor.ends if how == "async" else actor.ends_in_a_group
            gen = method.options(num_returns="streaming").remote()
        *items, last = list(gen)
        assert get(items) == [0, 1, 2]
        with pytest.raises((exceptions.WorkerCrashedError, exceptions.ActorDiedError)):
            get(last)

    def test_an_actor_that_is_killed_ends_its_generators(self, tmp_path: Path) -> None:
        actor = Plain.remote()
        gen = actor.gated.remote(2, tmp_path / "never")
        assert get(next(gen)) == 0
        shoal.kill(actor)
        [last] = list(gen)
        with pytest.raises(exceptions.ActorDiedError):
            get(last)


@pytest.mark.usefixtures("two_cpus")
class TestEnds:
    def test_dropping_a_generator_stops_it_and_frees_its_items(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        gen = endless.remote(log)
        ref = next(gen)
        del gen
        until(lambda: "stopped" in noted(log), "it stopped")
        assert get(ref) == (1).to_bytes(4, "big")
        del ref
        until(nothing_left, "its items are gone")

    def test_closing_a_generator_stops_it_and_it_has_no_more(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        gen = endless.remote(log)
        next(gen)
        gen.close()
        gen.close()
        assert list(gen) == []
        assert gen.is_finished()
        assert not gen.next_ready()
        assert shoal.wait([gen], timeout=0) == ([gen], [])
        until(lambda: "stopped" in noted(log), "it stopped")
        assert get(gen.completed()) is None

    def test_closing_wakes_whoever_waits(self, tmp_path: Path) -> None:
        gen = gated.remote(2, tmp_path / "gate")
        next(gen)
        ended = threading.Event()

        def consume() -> None:
            assert list(gen) == []
            ended.set()

        thread = threading.Thread(target=consume)
        thread.start()
        until(lambda: gen._state.waiters is not None, "it waits")
        gen.close()
        assert ended.wait(SECONDS)
        thread.join()
        (tmp_path / "gate").touch()

    def test_dropping_a_generator_of_an_async_actor_stops_it(self, tmp_path: Path) -> None:
        actor, log = Async.remote(), tmp_path / "log"
        gen = actor.endless.remote(str(log))
        get(next(gen))
        del gen
        until(lambda: "stopped" in noted(log), "it stopped")
        assert values(actor.count.remote(2)) == [0, 1]

    def test_a_generator_that_nobody_consumes_is_completed(self) -> None:
        gen = count.remote(100)
        assert get(gen.completed()) is None
        assert gen.next_ready()
        assert len(values(gen)) == 100

    def test_large_items_that_nobody_took_give_their_memory_back(self) -> None:
        def taken() -> int:
            return sum(file.stat().st_blocks for store in stores() for file in store.rglob("*") if file.is_file())

        def once() -> None:
            gen = large.remote(8)
            get(gen.completed())
            assert get(next(gen))[:1] == b"\0"
            del gen
            until(nothing_left, "its items are gone")
            until(lambda: used_bytes() == 0, "its node has heard of that")

        once()
        once()
        before = taken()
        for _ in range(10):
            once()
        assert taken() <= before, "the memory of one is that of the next"


@pytest.mark.usefixtures("two_cpus")
class TestBackPressure:
    @pytest.mark.parametrize("ahead", [1, 3])
    def test_a_generator_waits_for_its_user(self, ahead: int, tmp_path: Path) -> None:
        log = tmp_path / "log"
        gen = endless.options(_generator_backpressure_num_objects=ahead).remote(log)
        for taken in range(4):
            until(lambda made=taken + ahead: len(noted(log)) == made, "it made as many as it may")  # type: ignore[misc]
            next(gen)
        until(lambda: len(noted(log)) == 4 + ahead, "and no more")
        del gen
        until(lambda: "stopped" in noted(log), "it stopped, although it waited")
        assert len(noted(log)) == 4 + ahead + 1

    def test_a_generator_that_waits_gives_its_cpu_back(self, tmp_path: Path) -> None:
        waiting = [
            endless.options(_generator_backpressure_num_objects=1).remote(tmp_path / f"log-{index}") for index in (1, 2)
        ]
        until(lambda: all(len(noted(tmp_path / f"log-{index}")) == 1 for index in (1, 2)), "both wait")
        assert values(count.remote(3)) == [0, 1, 2], "with both CPUs taken, were it not so"
        del waiting

    @pytest.mark.parametrize("actor_class", [Plain, Threaded, Async], ids=["plain", "threaded", "async"])
    def test_methods_of_actors_wait_for_their_user(self, actor_class: Any) -> None:
        actor = actor_class.remote()
        gen = actor.count.options(_generator_backpressure_num_objects=1).remote(20)
        assert values(gen) == list(range(20))
        left = actor.count.options(_generator_backpressure_num_objects=1).remote(20)
        get(next(left))
        del left
        assert values(actor.count.remote(3)) == [0, 1, 2]


@pytest.mark.usefixtures("two_cpus")
class TestWaiting:
    def test_the_loop_over_generators_and_references_mixed(self) -> None:
        @shoal.remote
        def one(x: int) -> int:
            return 100 + x

        unready: list[Any] = [count.remote(5), one.remote(1), count.remote(5), one.remote(2)]
        result = []
        while unready:
            ready, unready = shoal.wait(unready, timeout=SECONDS)
            assert ready
            for r in ready:
                if isinstance(r, ObjectRefGenerator):
                    try:
                        ref = next(r)
                    except StopIteration:
                        continue
                    result.append(get(ref))
                    unready.append(r)
                else:
                    result.append(get(r))
        assert Counter(result) == Counter([*range(5), *range(5), 101, 102])

    def test_the_loop_is_fair(self) -> None:
        gens = [count.remote(50) for _ in range(4)]
        get([gen.completed() for gen in gens])
        turns: list[int] = []
        unready = list(gens)
        while unready:
            [gen], unready = shoal.wait(unready, timeout=SECONDS)
            try:
                next(gen)
            except StopIteration:
                continue
            turns.append(gens.index(gen))
            unready.append(gen)
        assert Counter(turns) == dict.fromkeys(range(4), 50)
        assert all(len(set(turns[at : at + 4])) == 4 for at in range(0, 200, 4)), "each has its turn"

    def test_wait_for_the_next_item_and_for_the_end(self, tmp_path: Path) -> None:
        gen = gated.remote(2, tmp_path / "gate")
        assert shoal.wait([gen], timeout=SECONDS) == ([gen], [])
        next(gen)
        both: list[Any] = [gen, gen.completed()]
        assert shoal.wait(both, timeout=0) == ([], both)
        (tmp_path / "gate").touch()
        assert shoal.wait(both, num_returns=2, timeout=SECONDS) == (both, [])
        next(gen)
        assert shoal.wait([gen], timeout=SECONDS) == ([gen], []), "its end is something to learn of"
        assert gen.is_finished()

    def test_a_hundred_generators_at_once(self) -> None:
        gens: list[Any] = [count.remote(20) for _ in range(100)]
        unready, taken = list(gens), Counter[int]()
        while unready:
            ready, unready = shoal.wait(unready, num_returns=1, timeout=SECONDS)
            for gen in ready:
                while gen.next_ready():
                    taken[get(next(gen))] += 1
                if not gen.is_finished():
                    unready.append(gen)
        assert taken == dict.fromkeys(range(20), 100)


class TestOtherNodes:
    @pytest.fixture
    def cluster(self) -> Iterator[Cluster]:
        shoal.shutdown()  # this module's other cluster; so these tests come last
        one = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        try:
            one.add_node(num_cpus=1, resources={"far": 1})
            one.connect()
            yield one
        finally:
            one.shutdown()

    def test_items_cross_nodes_and_a_node_that_dies_costs_none(self, cluster: Cluster, tmp_path: Path) -> None:
        far = large.options(resources={"far": 1})
        assert [len(item) for item in values(far.remote(3))] == [LARGE] * 3

        @shoal.remote(num_cpus=0, resources={"far": 1})
        def numbers(gate: Path) -> Iterator[int]:
            for index in range(6):
                if index == 3:
                    pass_gate(gate)
                yield index

        gen = numbers.remote(tmp_path / "gate")
        taken = [get(next(gen)) for _ in range(2)]
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1, resources={"far": 1})
        (tmp_path / "gate").touch()
        assert taken + values(gen) == list(range(6))

    def test_a_generator_of_an_actor_ends_with_the_task_that_used_it(self, cluster: Cluster, tmp_path: Path) -> None:
        """The task's process dies; the actor, which outlives it, must not go on for nobody."""
        actor, log = Async.remote(), tmp_path / "log"

        @shoal.remote(max_retries=0)
        def consumer(actor: Any) -> None:
            gen = actor.endless.remote(str(log))
            shoal.get(next(gen))
            os._exit(1)

        with pytest.raises(exceptions.WorkerCrashedError):
            get(consumer.remote(actor))
        until(lambda: noted(log) == ["stopped"], "it stopped")
        assert psutil.pid_exists(os.getpid())
        assert values(actor.count.remote(2)) == [0, 1]
