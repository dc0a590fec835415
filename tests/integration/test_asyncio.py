"""References in event loops: of drivers, tasks and async actors, several loops at once, and uvloop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import exceptions
from shoal_core.runtime.runtime import Runtime
from tests.integration.waiting import SECONDS, get, until

pytestmark = pytest.mark.usefixtures("two_cpus")


def nothing_left() -> bool:
    gc.collect()
    runtime = Runtime.current
    assert runtime is not None
    reactor = runtime.reactor
    return not (reactor.tasks or reactor.streams or reactor.notifying or runtime.objects.owned)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    until(nothing_left, "nothing is left of tasks, streams and waits")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Run a coroutine in a new loop, of either kind."""
    if request.param == "asyncio":
        return asyncio.run
    uvloop = pytest.importorskip("uvloop")

    def run_there(coroutine: Any) -> Any:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(coroutine)

    return run_there


@shoal.remote
def double(x: int) -> int:
    return 2 * x


@shoal.remote
def fail() -> None:
    raise KeyError("this one")


@shoal.remote
def gated(gate: Path) -> str:
    while not gate.exists():
        time.sleep(0.005)
    return "passed"


@shoal.remote
def large() -> bytes:
    return b"x" * 1_000_000


@shoal.remote
def count(number: int) -> Iterator[int]:
    yield from range(number)


class TestDrivers:
    def test_await(self, run: Callable[[Any], Any]) -> None:
        async def main() -> tuple[int, int, int]:
            ready = double.remote(1)
            await ready
            return await ready, await double.remote(2), len(await large.remote())

        assert run(main()) == (2, 4, 1_000_000)

    def test_await_twice_and_by_two(self, run: Callable[[Any], Any]) -> None:
        async def main() -> list[int]:
            ref = double.remote(3)

            async def wait() -> int:
                return await ref

            return [*await asyncio.gather(wait(), wait(), ref), await ref]

        assert run(main()) == [6, 6, 6, 6]

    def test_an_error_is_raised_where_it_is_awaited(self, run: Callable[[Any], Any]) -> None:
        async def main() -> None:
            with pytest.raises(KeyError, match="this one"):
                await fail.remote()

        run(main())

    def test_gather(self, run: Callable[[Any], Any]) -> None:
        async def main() -> list[Any]:
            good = await asyncio.gather(*[double.remote(index) for index in range(500)])
            mixed = await asyncio.gather(double.remote(1), fail.remote(), return_exceptions=True)
            return [good, mixed[0], isinstance(mixed[1], KeyError)]

        assert run(main()) == [[2 * index for index in range(500)], 2, True]

    def test_wait_takes_them_as_they_come(self, run: Callable[[Any], Any], tmp_path: Path) -> None:
        async def main() -> tuple[list[Any], str]:
            slow = asyncio.ensure_future(gated.remote(tmp_path / "gate"))
            quick = asyncio.ensure_future(double.remote(4))
            done, pending = await asyncio.wait([slow, quick], return_when=asyncio.FIRST_COMPLETED)
            assert pending == {slow}
            (tmp_path / "gate").touch()
            return [one.result() for one in done], await slow

        assert run(main()) == ([8], "passed")

    def test_wait_takes_futures(self, run: Callable[[Any], Any]) -> None:
        async def main() -> set[int]:
            done, _ = await asyncio.wait([asyncio.wrap_future(double.remote(index).future()) for index in range(3)])
            return {one.result() for one in done}

        assert run(main()) == {0, 2, 4}

    def test_a_wait_that_is_given_up_does_not_cancel_the_task(self, run: Callable[[Any], Any], tmp_path: Path) -> None:
        async def main() -> str:
            ref = gated.remote(tmp_path / "gate")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.ensure_future(ref), timeout=0.01)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await ref
            waiting = asyncio.ensure_future(ref)
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            (tmp_path / "gate").touch()
            return await ref

        assert run(main()) == "passed"

    def test_a_task_that_was_cancelled_says_so(self, run: Callable[[Any], Any], tmp_path: Path) -> None:
        async def main() -> None:
            ref = gated.remote(tmp_path / "never")
            shoal.cancel(ref)
            with pytest.raises(exceptions.TaskCancelledError):
                await ref

        run(main())

    def test_the_loop_turns_while_a_task_runs(self, run: Callable[[Any], Any], tmp_path: Path) -> None:
        async def main() -> str:
            ref = gated.remote(tmp_path / "gate")

            async def open_gate() -> None:
                await asyncio.to_thread((tmp_path / "gate").touch)

            passed, _ = await asyncio.gather(ref, open_gate())
            return str(passed)

        assert run(main()) == "passed"

    def test_generators_and_references_side_by_side(self, run: Callable[[Any], Any]) -> None:
        async def take(number: int) -> list[int]:
            return [await ref async for ref in count.remote(number)]

        async def main() -> list[Any]:
            return list(await asyncio.gather(take(3), double.remote(1), take(2)))

        assert run(main()) == [[0, 1, 2], 2, [0, 1]]

    def test_an_asynchronous_loop_over_a_generator_may_be_given_up_and_taken_up(
        self, run: Callable[[Any], Any], tmp_path: Path
    ) -> None:
        @shoal.remote
        def slow(gate: Path) -> Iterator[int]:
            yield 0
            while not gate.exists():
                time.sleep(0.005)
            yield 1

        async def main() -> list[int]:
            gen = slow.remote(tmp_path / "gate")
            taken = [await (await anext(gen))]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(gen), timeout=0.01)
            (tmp_path / "gate").touch()
            return taken + [await ref async for ref in gen]

        assert run(main()) == [0, 1]

    def test_several_loops_wait_for_one_reference(self, tmp_path: Path) -> None:
        ref = gated.remote(tmp_path / "gate")
        uvloop = pytest.importorskip("uvloop")
        waiting = threading.Barrier(5)

        async def wait() -> str:
            waited = asyncio.ensure_future(ref)
            await asyncio.sleep(0)
            await asyncio.to_thread(waiting.wait)
            return await waited

        def in_a_loop(index: int) -> str:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop if index % 2 else None) as runner:
                return runner.run(wait())

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(in_a_loop, index) for index in range(4)]
            waiting.wait()
            (tmp_path / "gate").touch()
            assert [future.result(SECONDS) for future in futures] == ["passed"] * 4

    def test_a_loop_that_was_closed_holds_up_nobody(self, tmp_path: Path) -> None:
        ref = gated.remote(tmp_path / "gate")
        loop = asyncio.new_event_loop()
        waiting = loop.create_task(asyncio.wait_for(asyncio.ensure_future(ref, loop=loop), None))
        loop.run_until_complete(asyncio.sleep(0))
        waiting.cancel()
        loop.run_until_complete(asyncio.wait([waiting]))
        loop.close()
        (tmp_path / "gate").touch()
        assert get(ref) == "passed"
        assert asyncio.run(_value_of(ref)) == "passed"

    def test_futures_of_other_threads(self) -> None:
        refs = [double.remote(index) for index in range(10)]
        futures = {ref.future(): index for index, ref in enumerate(refs)}
        for future in concurrent.futures.as_completed(futures, timeout=SECONDS):
            assert future.result() == 2 * futures[future]
        with pytest.raises(KeyError):
            fail.remote().future().result(SECONDS)

    def test_a_loop_that_never_blocks_is_not_warned(self) -> None:
        async def main() -> int:
            ref = double.remote(1)
            await ref
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                ready, _ = shoal.wait([ref])
                value: int = get(ref)
                return value + len(ready)

        assert asyncio.run(main()) == 3

    def test_a_blocking_call_on_a_loop_is_named_with_its_line_once(self, tmp_path: Path) -> None:
        async def main() -> list[warnings.WarningMessage]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                for _ in range(3):
                    shoal.wait([gated.remote(tmp_path / "never")], timeout=0.001)  # this line
            return caught

        [warning] = asyncio.run(main())
        assert warning.category is RuntimeWarning
        assert warning.filename == __file__
        assert "shoal.wait([gated.remote" in str(warning.message)
        assert "await ref" in str(warning.message)
        (tmp_path / "never").touch()

    def test_ten_thousand_at_once(self) -> None:
        async def main() -> int:
            total: int = sum(await asyncio.gather(*[double.remote(index) for index in range(10_000)]))
            return total

        assert asyncio.run(main()) == 2 * sum(range(10_000))


async def _value_of(ref: Any) -> Any:
    return await ref


class AsyncActorClass:
    async def awaits(self, number: int) -> list[int]:
        return list(await asyncio.gather(*[double.remote(index) for index in range(number)]))

    async def awaits_one_of(self, box: list[Any]) -> Any:
        return await box[0]

    async def streams(self, number: int) -> AsyncIterator[int]:
        async for ref in count.remote(number):
            yield 10 * await ref

    async def blocks(self) -> int:
        value: int = shoal.get(double.remote(2))
        return value

    async def blocks_and_tells(self, box: list[Any]) -> list[tuple[str, str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            shoal.wait(box, timeout=0.001)
        return [(warning.filename, str(warning.message)) for warning in caught]

    async def other(self) -> str:
        return "still here"


AsyncActor: Any = shoal.remote(AsyncActorClass)


class ServerClass:
    """Serves from its constructor on, which is itself a coroutine."""

    async def __init__(self, start: int, beside: list[Any]) -> None:  # type: ignore[misc]
        if start < 0:
            raise ValueError("below zero")
        self.value: int = start + await beside[0]
        self.counting = asyncio.get_running_loop().create_task(self._count())

    async def _count(self) -> None:
        self.value += 1

    async def counted(self) -> int:
        await self.counting
        return self.value


Server: Any = shoal.remote(ServerClass)


class TestActorsAndTasks:
    def test_an_async_actor_awaits_tasks_and_others(self) -> None:
        actor, other = AsyncActor.remote(), AsyncActor.remote()
        assert get(actor.awaits.remote(20)) == [2 * index for index in range(20)]
        assert get(actor.awaits_one_of.remote([other.awaits.remote(2)])) == [0, 2]
        assert [get(ref) for ref in actor.streams.remote(3)] == [0, 10, 20]

    def test_an_async_actor_that_awaits_runs_others_meanwhile(self, tmp_path: Path) -> None:
        actor = AsyncActor.remote()
        waiting = actor.awaits_one_of.remote([gated.remote(tmp_path / "gate")])
        assert get(actor.other.remote()) == "still here"
        (tmp_path / "gate").touch()
        assert get(waiting) == "passed"

    def test_a_constructor_may_be_async(self) -> None:
        assert get(Server.remote(3, [double.remote(2)]).counted.remote()) == 8
        with pytest.raises(exceptions.ActorDiedError, match="ValueError: below zero"):
            get(Server.remote(-1, []).counted.remote())

    def test_an_actor_may_end_while_its_constructor_waits(self, tmp_path: Path) -> None:
        server = Server.remote(3, [gated.remote(tmp_path / "gate")])
        waiting = server.counted.remote()
        shoal.kill(server)
        with pytest.raises(exceptions.ActorDiedError):
            get(waiting)
        (tmp_path / "gate").touch()

    def test_a_blocking_get_in_an_async_actor_is_named_with_its_line(self, tmp_path: Path) -> None:
        actor = AsyncActor.remote()
        [(filename, message)] = get(actor.blocks_and_tells.remote([gated.remote(tmp_path / "gate")]))
        assert filename == __file__
        assert "shoal.wait(box" in message
        (tmp_path / "gate").touch()

    def test_a_task_may_run_a_loop(self, run: Callable[[Any], Any]) -> None:
        @shoal.remote
        def gathers(number: int) -> list[int]:
            async def main() -> list[int]:
                return list(await asyncio.gather(*[double.remote(index) for index in range(number)]))

            return asyncio.run(main())

        async def main() -> list[list[int]]:
            return list(await asyncio.gather(gathers.remote(2), gathers.remote(3)))

        assert run(main()) == [[0, 2], [0, 2, 4]]

    def test_a_task_awaits_more_than_there_are_cpus(self) -> None:
        """Whoever awaits in a task needs its CPU for nothing: those it waits for may run there."""

        @shoal.remote
        def nested(depth: int) -> int:
            async def main() -> int:
                return 1 + await nested.remote(depth - 1)

            return asyncio.run(main()) if depth else 0

        assert get(nested.remote(4)) == 4
