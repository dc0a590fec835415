"""Actors: state that lives in a process of its own. Run: ``python examples/actors.py``."""

# mypy: disable-error-code="attr-defined"
# (mypy does not see what a decorator makes of a class; ``Counter = shoal.remote(CounterClass)`` it understands.)

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import shoal


@shoal.remote
class Counter:
    """Counts; each call sees what the calls before it left."""

    def __init__(self) -> None:
        self.value = 0

    def increment(self) -> int:
        """Count one more."""
        self.value += 1
        return self.value

    def stream(self) -> Iterator[int]:
        """Yield what comes next, one reference each."""
        yield from range(5)

    def get_counter(self) -> int:
        """Return the number."""
        return self.value


@shoal.remote
def count(counter: Any, times: int) -> None:
    """Use an actor from a task: handles go anywhere."""
    for _ in range(times):
        counter.increment.remote()
    shoal.get(counter.get_counter.remote())


@shoal.remote
class AsyncActor:
    """Runs many calls at once on one event loop."""

    def __init__(self) -> None:
        self.started = 0
        self.all_started = asyncio.Event()

    async def stream(self) -> AsyncIterator[int]:
        """Yield as a coroutine does."""
        for number in range(5):
            yield number

    async def run_task(self, expected: int) -> str:
        """Return when so many calls have begun."""
        self.started += 1
        if self.started == expected:
            self.all_started.set()
        await self.all_started.wait()
        return "finished"


@shoal.remote(concurrency_groups={"io": 2})
class ThreadedActor:
    """Runs several calls at once, each in a thread: as many as ``max_concurrency`` says, and two of the group "io"."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(3)

    def meet(self) -> str:
        """Return when three threads are here."""
        self.barrier.wait()
        return "met"

    def stream(self) -> Iterator[int]:
        """Yield in a thread."""
        yield from range(5)

    @shoal.method(concurrency_group="io")
    def task1(self) -> str:
        """Tell the group by the thread."""
        return threading.current_thread().name.split("-")[1]


@shoal.remote(concurrency_groups={"io": 3, "compute": 4})
class GroupedActor:
    """Methods of one group do not hold up those of another: each group has an event loop of its own."""

    def __init__(self) -> None:
        self.answer = asyncio.Event()

    @shoal.method(concurrency_group="io")
    async def read(self) -> str:
        """Wait for the reply."""
        await self.answer.wait()
        return "read"

    @shoal.method(concurrency_group="compute")
    async def compute(self) -> str:
        """Do not wait."""
        return "computed"

    async def reply(self) -> str:
        """Let the readers go on; to be called in their group, since an ``asyncio.Event`` belongs to one loop."""
        self.answer.set()
        return "replied"


def shared_counter() -> None:
    """Three tasks count with one counter, which has a name."""
    counter = Counter.options(name="demo").remote()
    shoal.get([count.remote(counter, 10) for _ in range(3)])
    print("counted by three tasks:", shoal.get(shoal.get_actor("demo").get_counter.remote()))


async def from_asyncio() -> None:
    """References are awaitable in any event loop."""
    actor = AsyncActor.remote()
    print("at once:", await asyncio.gather(*[actor.run_task.remote(4) for _ in range(4)]))
    counter = Counter.remote()
    done, _ = await asyncio.wait([asyncio.wrap_future(counter.increment.remote().future())])
    print("waited for:", [future.result() for future in done])


def concurrency() -> None:
    """Threads and concurrency groups."""
    threaded = ThreadedActor.options(max_concurrency=3).remote()
    print("three threads:", shoal.get([threaded.meet.remote() for _ in range(3)]))
    print("threads of the group:", shoal.get([threaded.task1.remote() for _ in range(2)]))
    grouped = GroupedActor.remote()
    reading = [grouped.read.remote() for _ in range(2)]
    print("beside those who read:", shoal.get(grouped.compute.remote()))
    print("in a group of our choice:", shoal.get(grouped.reply.options(concurrency_group="io").remote()))
    print("readers:", shoal.get(reading))


def generators() -> None:
    """Methods that yield give a reference for each value, as soon as it is there."""
    for actor in (Counter.remote(), AsyncActor.remote(), ThreadedActor.remote()):
        print("streamed:", [shoal.get(ref) for ref in actor.stream.remote()])


def ends() -> None:
    """An actor can be looked for before it is made, and be killed."""
    first = Counter.options(name="g1", get_if_exists=True).remote()
    second = Counter.options(name="g1", get_if_exists=True).remote()
    print("one and the same:", first == second)
    shoal.kill(first)
    try:
        shoal.get(second.increment.remote())
    except shoal.exceptions.ActorDiedError as error:
        print("killed:", "kill()" in str(error))


def main() -> None:
    """Start a cluster of two CPUs for all of it."""
    with shoal.init(num_cpus=2):
        shared_counter()
        asyncio.run(from_asyncio())
        concurrency()
        generators()
        ends()


if __name__ == "__main__":
    main()
