"""A pool of actors, and a queue between tasks. Run: ``python examples/pool_and_queue.py``."""

# mypy: disable-error-code="attr-defined"
# (mypy does not see what a decorator makes of a class.)

from __future__ import annotations

import shoal
from shoal.util import ActorPool
from shoal.util.queue import Empty, Queue


@shoal.remote
class Actor:
    """Doubles numbers."""

    def double(self, n: int) -> int:
        """Return twice as much."""
        return 2 * n


@shoal.remote
def consumer(number: int, queue: Queue[int]) -> list[int]:
    """Work until nothing has come for a while."""
    items = []
    try:
        while True:
            items.append(queue.get(block=True, timeout=0.5))
            print(f"consumer {number} got work {items[-1]}")
    except Empty:
        return items


def pool() -> None:
    """Values in, results out, over two actors."""
    actors: ActorPool[Actor] = ActorPool([Actor.remote(), Actor.remote()])
    print("doubled:", list(actors.map(lambda actor, n: actor.double.remote(n), [1, 2, 3, 4])))
    print("in any order:", sorted(actors.map_unordered(lambda actor, n: actor.double.remote(n), [5, 6, 7])))


def queue() -> None:
    """One producer, two consumers."""
    numbers: Queue[int] = Queue(maxsize=100)
    for number in range(10):
        numbers.put(number)
    first, second = shoal.get([consumer.remote(number, numbers) for number in range(2)])
    print("both together:", sorted(first + second))
    numbers.put_nowait_batch([1, 2, 3])
    print("a batch:", numbers.get_nowait_batch(3))


def main() -> None:
    """Start a cluster of two CPUs for both."""
    with shoal.init(num_cpus=2):
        pool()
        queue()


if __name__ == "__main__":
    main()
