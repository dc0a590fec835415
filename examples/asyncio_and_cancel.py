"""References in event loops, and work that is called off. Run: ``python examples/asyncio_and_cancel.py``."""

# mypy: disable-error-code="attr-defined"
# (mypy does not see what a decorator makes of a class; ``Counter = shoal.remote(CounterClass)`` it understands.)

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import shoal
from shoal.exceptions import TaskCancelledError


@shoal.remote
def task() -> int:
    """Return a value."""
    return 1


@shoal.remote
def slow(begun: Path) -> None:
    """Tell that this runs, then take very long."""
    begun.touch()
    time.sleep(3600)


@shoal.remote
def slow_parent(begun: Path) -> None:
    """Wait for a task of its own."""
    shoal.get(slow.remote(begun))


@shoal.remote
class AsyncActor:
    """Runs many calls at once on one event loop."""

    async def run_task(self) -> str:
        """Wait without holding anybody up."""
        await asyncio.sleep(0.1)
        return "finished"

    async def sum_of_tasks(self, count: int) -> int:
        """Await tasks; a blocking ``get`` would hold up every other call here."""
        return sum(await asyncio.gather(*[task.remote() for _ in range(count)]))


@shoal.remote
class Patient:
    """A plain actor: nothing interrupts its methods, they look whether they are still wanted."""

    def work(self, begun: Path) -> str:
        """Work until called off."""
        begun.touch()
        while not shoal.get_runtime_context().is_canceled():
            time.sleep(0.01)
        return "stopped by itself"


async def active() -> None:
    """Await what is called."""
    print("awaited:", await task.remote())
    actor = AsyncActor.remote()
    print("all at once:", await asyncio.gather(*[actor.run_task.remote() for _ in range(4)]))
    print("an actor that awaits tasks:", await actor.sum_of_tasks.remote(5))


async def passive() -> None:
    """Wait until something is done, and then look at it."""
    done, _ = await asyncio.wait([asyncio.ensure_future(task.remote()), asyncio.wrap_future(task.remote().future())])
    print("done:", [future.result() for future in done])


async def given_up() -> None:
    """Whoever gives up to wait does not cancel the task; ``cancel`` does."""
    with TemporaryDirectory() as folder:
        ref = slow.remote(Path(folder) / "begun")
        try:
            await asyncio.wait_for(asyncio.ensure_future(ref), timeout=0.05)
        except TimeoutError:
            print("still running, but we have no more time")
        shoal.cancel(ref)
        try:
            await ref
        except TaskCancelledError as error:
            print("called off:", error)


def called_off() -> None:
    """Cancel tasks with all that they started, by force, and calls of an actor."""
    with TemporaryDirectory() as folder:
        begun = [Path(folder) / str(number) for number in range(3)]
        ref = slow_parent.remote(begun[0])
        _wait_for(begun[0])
        shoal.cancel(ref)
        try:
            shoal.get(ref)
        except TaskCancelledError:
            print("cancelled with the task that it started")

        killed = slow.remote(begun[1])
        _wait_for(begun[1])
        shoal.cancel(killed, force=True)
        try:
            shoal.get(killed)
        except TaskCancelledError:
            print("killed")

        call = Patient.remote().work.remote(begun[2])
        _wait_for(begun[2])
        shoal.cancel(call)
        try:
            shoal.get(call)
        except TaskCancelledError:
            print("the actor's call was cancelled, in its own time")


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def main() -> None:
    """Start a cluster of two CPUs for all of it."""
    with shoal.init(num_cpus=2):
        ready, _ = shoal.wait([task.remote()])
        print("ready:", shoal.get(ready))
        asyncio.run(active())
        asyncio.run(passive())
        asyncio.run(given_up())
        called_off()


if __name__ == "__main__":
    main()
