"""``ActorPool`` and ``Queue`` on a real cluster."""

from __future__ import annotations

import asyncio
import os
import queue as standard
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from shoal import exceptions
from shoal.util import ActorPool, get_node_ip_address
from shoal.util.actor_pool import MOST_AHEAD
from shoal.util.queue import Empty, Full, Queue
from tests.integration.test_actor_lifetimes import Machine, machine
from tests.integration.waiting import SECONDS, get, until

__all__ = ["machine"]  # a fixture


class WorkerClass:
    """Works on values: each call waits until its value was let through."""

    def __init__(self) -> None:
        self.open = {*range(100)}
        self.changed = asyncio.Condition()

    async def double(self, value: int) -> int:
        async with self.changed:
            await self.changed.wait_for(lambda: value in self.open)
        return 2 * value

    async def hold(self, value: int) -> None:
        self.open.discard(value)

    async def let(self, value: int) -> None:
        self.open.add(value)
        async with self.changed:
            self.changed.notify_all()

    async def fail(self, value: int) -> int:
        raise KeyError(value)

    async def die(self, value: int) -> None:
        os._exit(value)

    @shoal.method(num_returns=2)
    async def both(self, value: int) -> tuple[int, int]:
        return value, 2 * value


Worker: Any = shoal.remote(num_cpus=0)(WorkerClass)

DEADLY = 250


class QuickClass:
    """Runs one short call after the other, and leaves a mark of each; one value kills it."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def run(self, value: int) -> int:
        with open(self.folder / str(value), "a") as mark:
            mark.write("x")
        if value == DEADLY:
            os._exit(1)
        return value


Quick: Any = shoal.remote(num_cpus=0)(QuickClass)


def double(actor: Any, value: int) -> Any:
    return actor.double.remote(value)


@pytest.mark.usefixtures("two_cpus")
class TestPool:
    def test_map_returns_results_in_order(self) -> None:
        pool = ActorPool([Worker.remote(), Worker.remote()])
        assert list(pool.map(double, [1, 2, 3, 4])) == [2, 4, 6, 8]
        assert list(pool.map(double, range(20))) == list(range(0, 40, 2))
        assert list(pool.map(double, [])) == []

    def test_map_unordered_returns_what_is_ready(self) -> None:
        worker, other = Worker.remote(), Worker.remote()
        get([one.hold.remote(1) for one in (worker, other)])
        pool = ActorPool([worker, other])
        results = pool.map_unordered(double, [1, 2, 3, 4])
        assert [next(results) for _ in range(3)] == [4, 6, 8]
        get([one.let.remote(1) for one in (worker, other)])
        assert list(results) == [2]

    def test_submitted_values_wait_for_idle_actors(self) -> None:
        pool = ActorPool([Worker.remote()])
        assert pool.has_free()
        assert not pool.has_next()
        for value in range(3):
            pool.submit(double, value)
        assert not pool.has_free()
        assert pool.has_next()
        assert [pool.get_next() for _ in range(3)] == [0, 2, 4]
        assert pool.has_free()
        with pytest.raises(StopIteration, match="No more results to get"):
            pool.get_next()
        with pytest.raises(StopIteration, match="No more results to get"):
            pool.get_next_unordered()

    def test_get_next_is_not_for_those_who_took_later_results(self) -> None:
        worker = Worker.remote()
        get(worker.hold.remote(1))
        pool = ActorPool([Worker.remote(), worker])
        pool.submit(double, 1)
        pool.submit(double, 2)
        assert pool.get_next_unordered() == 4
        with pytest.raises(ValueError, match=r"not allowed to call get_next\(\) after get_next_unordered\(\)"):
            pool.get_next()
        get(worker.let.remote(1))
        assert pool.get_next_unordered() == 2

    def test_time_that_runs_out_keeps_the_result_unless_it_is_ignored(self) -> None:
        worker = Worker.remote()
        get([worker.hold.remote(value) for value in (1, 2)])
        pool = ActorPool([worker])
        for value in (1, 2, 3):
            pool.submit(double, value)
        for take in (pool.get_next, pool.get_next_unordered):
            with pytest.raises(TimeoutError, match=r"^Timed out waiting for result$"):
                take(timeout=0.05)
        with pytest.raises(TimeoutError, match=r"Timed out waiting for result\. The task .* has been ignored"):
            pool.get_next(timeout=0.05, ignore_if_timedout=True)
        with pytest.raises(TimeoutError, match=r"has been ignored"):
            pool.get_next_unordered(timeout=0.05, ignore_if_timedout=True)
        assert pool.get_next(timeout=SECONDS) == 6
        assert not pool.has_next()

    def test_map_drops_what_was_submitted_before(self) -> None:
        worker = Worker.remote()
        get(worker.hold.remote(1))
        pool = ActorPool([worker])
        pool.submit(double, 1)
        pool.submit(lambda actor, value: actor.fail.remote(value), 2)
        assert list(pool.map(double, [3, 4])) == [6, 8]
        pool.submit(double, 1)
        assert list(pool.map_unordered(double, [5])) == [10]

    def test_an_error_comes_out_and_the_pool_goes_on(self) -> None:
        pool = ActorPool([Worker.remote()])
        pool.submit(lambda actor, value: actor.fail.remote(value), 7)
        pool.submit(double, 1)
        with pytest.raises(KeyError):
            pool.get_next()
        assert pool.get_next() == 2

    def test_a_dead_actor_leaves_the_pool(self) -> None:
        mortal, other = Worker.remote(), Worker.remote()
        pool = ActorPool([other, mortal])
        pool.submit(lambda actor, value: actor.die.remote(value), 1)
        for value in range(5):
            pool.submit(double, value)
        with pytest.raises(exceptions.ActorDiedError):
            pool.get_next()
        assert [pool.get_next() for _ in range(5)] == [0, 2, 4, 6, 8]
        assert pool.pop_idle() == other
        assert pool.pop_idle() is None

    def test_what_a_dead_actor_was_given_comes_out_as_errors_and_nothing_runs_twice(self, tmp_path: Path) -> None:
        pool = ActorPool([Quick.remote(str(tmp_path)) for _ in range(3)])
        warm = pool.map(lambda actor, value: actor.run.remote(value), range(-300, 0))
        assert list(warm) == list(range(-300, 0))  # by now, calls are known to be short
        for value in range(600):
            pool.submit(lambda actor, value: actor.run.remote(value), value)
        results, lost = [], 0
        while pool.has_next():
            try:
                results.append(pool.get_next())
            except exceptions.ActorDiedError:
                lost += 1
        assert 1 <= lost <= MOST_AHEAD
        assert len(results) + lost == 600
        assert results == sorted({*results} - {DEADLY})
        assert {path.stat().st_size for path in tmp_path.iterdir()} == {1}, "nothing was carried out twice"

    def test_a_pool_whose_actors_are_all_dead_says_so(self) -> None:
        pool = ActorPool([Worker.remote()])
        pool.submit(lambda actor, value: actor.die.remote(value), 1)
        pool.submit(double, 2)
        with pytest.raises(exceptions.ActorDiedError):
            pool.get_next()
        assert not pool.has_next()

    def test_actors_come_and_go(self) -> None:
        first, second = Worker.remote(), Worker.remote()
        pool = ActorPool([first])
        with pytest.raises(ValueError, match="Actor already belongs to current ActorPool"):
            pool.push(first)
        pool.submit(double, 1)
        with pytest.raises(ValueError, match="Actor already belongs to current ActorPool"):
            pool.push(first)
        pool.submit(double, 2)
        assert pool.pop_idle() is None
        pool.push(second)
        assert sorted([pool.get_next_unordered(), pool.get_next_unordered()]) == [2, 4]
        assert {pool.pop_idle(), pool.pop_idle()} == {first, second}

    def test_methods_with_several_returns(self) -> None:
        pool = ActorPool([Worker.remote()])
        results: Iterator[Any] = pool.map(lambda actor, value: actor.both.remote(value), [1, 2])
        assert list(results) == [[1, 2], [2, 4]]


# ------------------------------------------------------------------------------------ queues

OTHERS = """
import sys
import shoal
from shoal.util.queue import Queue

shoal.init("auto", namespace="queues")
options = {"name": "jobs", "lifetime": "detached", "get_if_exists": True}
queue = Queue(actor_options=options)
"""

WAIT_FOR_ONE = """
while not shoal.get(queue.actor.__ray_call__.remote(lambda self: len(self._takers))):
    pass
print(1)
"""


class KeeperClass:
    """Keeps a queue for other drivers."""

    def __init__(self, queue: Queue[Any]) -> None:
        self.queue = queue

    def kept(self) -> Queue[Any]:
        return self.queue

    def get(self) -> tuple[Any, int]:
        return self.queue.get(), os.getpid()

    def pid(self) -> int:
        return os.getpid()

    def put(self, item: Any) -> None:
        self.queue.put(item)


Keeper: Any = shoal.remote(num_cpus=0)(KeeperClass)


def waiting(queue: Queue[Any]) -> int:
    """Return how many callers wait for items."""
    return int(get(queue.actor.__ray_call__.remote(lambda self: len(self._takers))))


def clients(queue: Queue[Any]) -> int:
    """Return how many processes a queue watches."""
    return int(get(queue.actor.__ray_call__.remote(lambda self: len(self._clients))))


@pytest.mark.usefixtures("two_cpus")
class TestQueue:
    def test_items_come_out_in_order(self) -> None:
        queue: Queue[int] = Queue()
        assert queue.empty()
        for item in range(10):
            queue.put(item)
        assert (len(queue), queue.size(), queue.qsize()) == (10, 10, 10)
        assert not queue.full()
        assert [queue.get() for _ in range(10)] == list(range(10))

    def test_an_empty_queue_and_a_full_one_say_so(self) -> None:
        queue: Queue[int] = Queue(maxsize=1)
        for take in (queue.get_nowait, lambda: queue.get(block=False), lambda: queue.get(timeout=0.05)):
            with pytest.raises(Empty):
                take()
        queue.put(1)
        assert queue.full()
        for add in (queue.put_nowait, lambda item: queue.put(item, block=False), lambda i: queue.put(i, timeout=0.05)):
            with pytest.raises(Full):
                add(2)
        assert queue.get(timeout=0) == 1
        with pytest.raises(Empty):
            queue.get(timeout=0)
        assert issubclass(Empty, standard.Empty)
        assert issubclass(Full, standard.Full)

    def test_wrong_arguments_are_errors_at_the_call(self) -> None:
        queue: Queue[int] = Queue()
        with pytest.raises(ValueError, match="'timeout' must be a non-negative number"):
            queue.get(timeout=-1)
        with pytest.raises(ValueError, match="'timeout' must be a non-negative number"):
            queue.put(1, timeout=-1)
        with pytest.raises(TypeError, match="'items' must be an Iterable"):
            queue.put_nowait_batch(1)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="'num_items' must be an int"):
            queue.get_nowait_batch("1")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'num_items' must be nonnegative"):
            queue.get_nowait_batch(-1)

    def test_batches_go_in_and_out_whole_or_not_at_all(self) -> None:
        queue: Queue[int] = Queue(maxsize=5)
        queue.put_nowait_batch(iter([1, 2, 3]))
        with pytest.raises(Full, match="Cannot add 3 items to queue of size 3 and maxsize 5"):
            queue.put_nowait_batch([4, 5, 6])
        with pytest.raises(Empty, match="Cannot get 4 items from queue of size 3"):
            queue.get_nowait_batch(4)
        assert queue.get_nowait_batch(2) == [1, 2]
        assert queue.get_nowait_batch(0) == []
        queue.put_nowait_batch([4, 5, 6, 7])
        assert queue.get_nowait_batch(5) == [3, 4, 5, 6, 7]

    def test_who_waits_is_served_in_turn(self) -> None:
        queue: Queue[int] = Queue(maxsize=1)

        async def use() -> None:
            getting = [asyncio.ensure_future(queue.get_async()) for _ in range(20)]
            await asyncio.gather(*[queue.put_async(item) for item in range(20)])
            assert await asyncio.gather(*getting) == list(range(20))
            putting = [asyncio.ensure_future(queue.put_async(item)) for item in range(20)]
            assert [await queue.get_async() for _ in range(20)] == list(range(20))
            await asyncio.gather(*putting)
            with pytest.raises(Empty):
                await queue.get_async(block=False)
            with pytest.raises(Empty):
                await queue.get_async(timeout=0.05)
            await queue.put_async(1)
            with pytest.raises(Full):
                await queue.put_async(2, block=False)
            with pytest.raises(Full):
                await queue.put_async(2, timeout=0.05)
            assert await queue.get_async() == 1

        asyncio.run(use())
        assert queue.empty()

    def test_many_producers_and_consumers_lose_and_double_nothing(self) -> None:
        queue: Queue[tuple[int, int]] = Queue(maxsize=10)

        @shoal.remote(num_cpus=0.1)
        def produce(queue: Queue[tuple[int, int]], number: int) -> None:
            for index in range(50):
                queue.put((number, index))

        @shoal.remote(num_cpus=0.1)
        def consume(queue: Queue[tuple[int, int]]) -> list[tuple[int, int]]:
            return [queue.get() for _ in range(50)]

        consumers = [consume.remote(queue) for _ in range(4)]
        get([produce.remote(queue, number) for number in range(4)])
        results = get(consumers)
        for result in results:
            for number in range(4):
                indices = [index for one, index in result if one == number]
                assert indices == sorted(indices)
        assert sorted(item for result in results for item in result) == [(n, i) for n in range(4) for i in range(50)]
        assert queue.empty()

    def test_more_callers_wait_than_async_actors_usually_run(self) -> None:
        queue: Queue[int] = Queue()

        async def use() -> list[int]:
            getting = [asyncio.ensure_future(queue.get_async()) for _ in range(1_500)]
            await asyncio.to_thread(until, lambda: waiting(queue) == 1_500, "all of them wait")
            await asyncio.to_thread(queue.put_nowait_batch, list(range(1_500)))
            return await asyncio.gather(*getting)

        # Which of those that wait at the same time gets which item is not promised.
        assert sorted(asyncio.run(use())) == list(range(1_500))

    def test_waiting_producers_of_more_than_fits_in_flight_do_not_keep_consumers_out(self) -> None:
        queue: Queue[bytes] = Queue(maxsize=1)

        async def use() -> int:
            putting = [asyncio.ensure_future(queue.put_async(bytes(90_000))) for _ in range(300)]
            total = 0
            for _ in range(300):
                total += len(await queue.get_async())
            await asyncio.gather(*putting)
            return total

        assert asyncio.run(use()) == 300 * 90_000

    def test_large_items_and_items_with_references(self) -> None:
        queue: Queue[Any] = Queue()
        queue.put(b"x" * 2_000_000)
        queue.put({"ref": shoal.put([1, 2])})
        assert queue.get() == b"x" * 2_000_000
        assert get(queue.get()["ref"]) == [1, 2]

    def test_a_cancelled_get_takes_nothing(self) -> None:
        queue: Queue[int] = Queue()

        async def use() -> list[int]:
            for _ in range(20):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(queue.get_async(), 0.02)
            for item in range(50):
                getting = asyncio.ensure_future(queue.get_async())
                await asyncio.sleep(0)
                putting = asyncio.ensure_future(queue.put_async(item))
                await asyncio.sleep(0)
                getting.cancel()
                await asyncio.wait([getting, putting])
                if not getting.cancelled():
                    await queue.put_async(getting.result())
            return sorted([await queue.get_async() for _ in range(50)])

        assert asyncio.run(use()) == list(range(50))
        assert waiting(queue) == 0
        with pytest.raises(Empty):
            queue.get(timeout=0.1)

    def test_of_many_that_get_at_once_those_cancelled_take_nothing(self) -> None:
        queue: Queue[int] = Queue()

        async def use() -> list[int]:
            await asyncio.gather(*[queue.put_async(item) for item in range(100)])
            taken: list[int] = []
            for turns in range(10):
                getting = [asyncio.ensure_future(queue.get_async()) for _ in range(20)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for one in getting[::2]:
                    one.cancel()
                await asyncio.wait(getting, timeout=0.05)
                for one in getting:
                    one.cancel()
                await asyncio.wait(getting)
                taken += [one.result() for one in getting if not one.cancelled()]
            return taken

        taken = asyncio.run(use())
        until(lambda: len(taken) + queue.qsize() == 100, "what was not taken is in the queue again")
        assert sorted([*taken, *queue.get_nowait_batch(queue.qsize())]) == list(range(100))

    def test_what_cannot_be_sent_is_the_error_of_who_sends_it(self) -> None:
        queue: Queue[Any] = Queue()

        async def use() -> list[Any]:
            items = [1, threading.Lock(), 3]
            return await asyncio.gather(*[queue.put_async(item) for item in items], return_exceptions=True)

        results = asyncio.run(use())
        assert [results[0], results[2]] == [None, None]
        assert isinstance(results[1], TypeError)
        assert sorted(queue.get_nowait_batch(2)) == [1, 3]

    def test_a_cancelled_put_adds_nothing(self) -> None:
        queue: Queue[int] = Queue(maxsize=1)

        async def use() -> None:
            await queue.put_async(1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(queue.put_async(2), 0.05)
            assert await queue.get_async() == 1

        asyncio.run(use())
        with pytest.raises(Empty):
            queue.get(timeout=0.1)

    def test_a_getter_whose_process_died_swallows_nothing(self) -> None:
        queue: Queue[int] = Queue()
        keepers = [Keeper.remote(queue) for _ in range(3)]
        pids = get([keeper.pid.remote() for keeper in keepers])
        refs = [keeper.get.remote() for keeper in keepers]
        until(lambda: waiting(queue) == 3, "all of them wait")
        for pid in pids[:2]:
            psutil.Process(pid).kill()
        queue.put_nowait_batch([1, 2, 3])  # perhaps before anybody knows that two of them are dead
        assert get(refs[2])[1] == pids[2]
        left = [queue.get(timeout=SECONDS) for _ in range(2)]
        assert sorted([*left, get(refs[2])[0]]) == [1, 2, 3]
        assert waiting(queue) == 0

    def test_a_getter_that_died_long_ago_is_forgotten(self) -> None:
        queue: Queue[int] = Queue()
        keeper = Keeper.remote(queue)
        pid = get(keeper.pid.remote())
        ref = keeper.get.remote()
        until(lambda: waiting(queue) == 1, "it waits")
        psutil.Process(pid).kill()
        until(lambda: waiting(queue) == 0, "the queue knows that it is dead")
        assert clients(queue) == 0
        queue.put(1)
        assert queue.get(timeout=SECONDS) == 1
        with pytest.raises(exceptions.ActorDiedError):
            get(ref)

    def test_a_process_that_waited_is_let_go(self) -> None:
        queue: Queue[int] = Queue()
        keeper = Keeper.remote(queue)
        ref = keeper.get.remote()
        until(lambda: waiting(queue) == 1, "it waits")
        queue.put(1)
        assert get(ref)[0] == 1
        assert clients(queue) == 1
        until(lambda: clients(queue) == 0, "it is not watched any more")
        again = keeper.get.remote()
        until(lambda: waiting(queue) == 1, "it waits again")
        queue.put(2)
        assert get(again)[0] == 2

    def test_a_queue_in_a_queue_and_through_pickle(self) -> None:
        outer: Queue[Queue[int]] = Queue()
        inner: Queue[int] = Queue(maxsize=3)
        outer.put(inner)
        copy = outer.get()
        copy.put(5)
        assert copy.maxsize == 3
        assert inner.get() == 5

    def test_the_actor_is_there_for_those_who_know_it(self) -> None:
        queue: Queue[int] = Queue(actor_options={"name": "a queue", "num_cpus": 0})
        get(queue.actor.put.remote(1))
        taking = [queue.actor.get.remote() for _ in range(2)]
        queue.put(2)
        assert get(taking) == [1, 2]
        assert shoal.get_actor("a queue") == queue.actor
        with pytest.raises(Empty):
            get(queue.actor.get.remote(0.01))

    @pytest.mark.parametrize("force", [False, True])
    def test_shutdown_ends_the_queue_and_those_who_wait(self, force: bool) -> None:
        queue: Queue[int] = Queue()
        keeper = Keeper.remote(queue)
        pid = get(queue.actor.__ray_call__.remote(lambda self: os.getpid()))
        waits = keeper.get.remote()
        until(lambda: waiting(queue) == 1, "it waits")
        queue.shutdown(force=force)
        assert queue.actor is None
        with pytest.raises(exceptions.ActorDiedError):
            get(waits)
        until(lambda: not psutil.pid_exists(pid), "its process is gone")
        queue.shutdown()  # once more does nothing
        with pytest.raises(RuntimeError, match="shut down"):
            queue.put(1)
        with pytest.raises(RuntimeError, match="shut down"):
            asyncio.run(queue.get_async())

    def test_threads_share_a_queue(self) -> None:
        queue: Queue[int] = Queue(maxsize=2)
        taken: list[int] = []

        def consume() -> None:
            taken.extend(queue.get() for _ in range(100))

        threads = [threading.Thread(target=consume) for _ in range(2)]
        for thread in threads:
            thread.start()
        for item in range(200):
            queue.put(item)
        for thread in threads:
            thread.join(SECONDS)
        assert sorted(taken) == list(range(200))

    def test_the_address_of_a_node(self) -> None:
        @shoal.remote
        def address() -> str:
            return get_node_ip_address()

        assert get_node_ip_address() == get(address.remote()) == shoal.nodes()[0]["NodeManagerAddress"]


def test_a_detached_queue_is_used_by_one_driver_after_the_other(machine: Machine) -> None:
    """The second one dies while it waits for an item, which then is the third one's."""
    machine.drive(OTHERS + "queue.put_nowait_batch([1, 2]); print(queue.qsize())")
    second = OTHERS + "print(queue.get() + queue.get(), flush=True); queue.get()"
    with subprocess.Popen(
        [sys.executable, "-c", second], env=machine.environment, stdout=subprocess.PIPE, text=True
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline().strip() == "3"
        machine.drive(OTHERS + WAIT_FOR_ONE)
        driver.kill()
    assert machine.drive(OTHERS + "queue.put(3); print(queue.get(timeout=30))") == 3
    machine.drive(OTHERS + "queue.shutdown(); print(1)")
