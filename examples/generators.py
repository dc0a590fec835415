"""Results as they are made: streaming generators. Run: ``python examples/generators.py``."""

# mypy: disable-error-code="attr-defined"
# (mypy does not see what a decorator makes of a class; ``Counter = shoal.remote(CounterClass)`` it understands.)

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import shoal
from shoal import ObjectRefGenerator
from shoal.exceptions import TaskCancelledError


@shoal.remote
def numbers(count: int) -> Iterator[int]:
    """Yield a few numbers, slowly."""
    for number in range(count):
        time.sleep(0.01)
        yield number


@shoal.remote
def failing() -> Iterator[int]:
    """Yield one number, then fail."""
    for number in range(5):
        if number == 1:
            raise ValueError("number 1 is not to be had")
        yield number


@shoal.remote
def endless() -> Iterator[int]:
    """Yield numbers until nobody wants more."""
    number = 0
    while True:
        yield number
        number += 1
        time.sleep(0.01)


@shoal.remote
def square(number: int) -> int:
    """Return one value, as tasks do."""
    return number * number


@shoal.remote
class Actor:
    """Its methods run one after the other."""

    def f(self) -> Iterator[int]:
        """Yield."""
        yield from range(5)


@shoal.remote
class AsyncActor:
    """Its generators run beside each other on one event loop."""

    async def f(self) -> AsyncIterator[int]:
        """Yield, and let others run between."""
        for number in range(5):
            await asyncio.sleep(0)
            yield number


@shoal.remote(max_concurrency=5)
class ThreadedActor:
    """Its generators run beside each other, each in a thread."""

    def f(self) -> Iterator[int]:
        """Yield."""
        yield from range(5)


def one_by_one() -> None:
    """A loop over a generator gives references, each as soon as its item is there."""
    for ref in numbers.remote(3):
        print("came:", shoal.get(ref))


def error_in_the_middle() -> None:
    """An exception comes out of ``get`` of the item that could not be made; then there are no more."""
    try:
        for ref in failing.remote():
            print("before the error:", shoal.get(ref))
    except ValueError as error:
        print("the error:", str(error).splitlines()[-1])


def actors() -> None:
    """Methods of all kinds of actors may be generators."""
    kinds: list[Any] = [Actor, AsyncActor, ThreadedActor]
    for kind in kinds:
        actor = kind.remote()
        print("from an actor:", [shoal.get(ref) for ref in actor.f.remote()])


def no_longer_wanted() -> None:
    """A generator ends when nobody has it any more, or when it is cancelled: then its last reference says so."""
    gen = endless.remote()
    print("the first of many:", shoal.get(next(gen)))
    del gen

    gen = endless.remote()
    next(gen)
    shoal.cancel(gen)
    try:
        for ref in gen:
            shoal.get(ref)
    except TaskCancelledError:
        print("cancelled, as we wanted")


async def at_once() -> None:
    """Two generators are consumed side by side in an event loop."""

    async def consume() -> list[int]:
        return [await ref async for ref in numbers.remote(3)]

    first, second = await asyncio.gather(consume(), consume())
    print("side by side:", first, second)


def mixed() -> None:
    """``wait`` takes generators and references together: take one item, and put the generator back until its end."""
    unready: list[Any] = [numbers.remote(3), square.remote(7), numbers.remote(3)]
    result: list[int] = []
    while unready:
        ready, unready = shoal.wait(unready)
        for one in ready:
            if isinstance(one, ObjectRefGenerator):
                try:
                    ref = next(one)
                except StopIteration:
                    continue
                result.append(shoal.get(ref))
                unready.append(one)
            else:
                result.append(shoal.get(one))
    print("mixed:", sorted(result))


def not_too_far_ahead() -> None:
    """With back-pressure a generator waits until its items are taken."""
    gen = endless.options(_generator_backpressure_num_objects=2).remote()
    print("never more than two ahead:", [shoal.get(next(gen)) for _ in range(4)])
    gen.close()
    print("closed:", list(gen))


def main() -> None:
    """Start a cluster of two CPUs for all of it."""
    with shoal.init(num_cpus=2):
        one_by_one()
        error_in_the_middle()
        actors()
        no_longer_wanted()
        asyncio.run(at_once())
        mixed()
        not_too_far_ahead()


if __name__ == "__main__":
    main()
