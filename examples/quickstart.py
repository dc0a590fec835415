"""A tour in five steps: parallel tasks, nested tasks, a wait loop, shared memory, and an error far away.

Run it with ``make demo``, or ``python examples/quickstart.py``. With SHOAL_ADDRESS it joins that cluster instead of
starting one of its own. Replace the import by ``import ray as shoal`` and it runs on Ray.
"""

from __future__ import annotations

import os
import time
from array import array

import shoal


@shoal.remote
def square(number: int) -> int:
    """Return the square, after a while."""
    time.sleep(0.2)
    return number * number


@shoal.remote
def process_id() -> int:
    """Tell which process this runs in."""
    time.sleep(0.05)
    return os.getpid()


@shoal.remote
def merge_sort(numbers: list[int]) -> list[int]:
    """Sort by asking two more tasks to sort a half each."""
    if len(numbers) <= 25:
        return sorted(numbers)
    middle = len(numbers) // 2
    left, right = shoal.get([merge_sort.remote(numbers[:middle]), merge_sort.remote(numbers[middle:])])
    merged = []
    while left and right:
        merged.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return merged + left + right


@shoal.remote
def nap(seconds: float) -> float:
    """Sleep and tell how long."""
    time.sleep(seconds)
    return seconds


@shoal.remote
def mean(numbers: array[float], first: int, last: int) -> float:
    """Return the mean of a slice of a large array."""
    part = numbers[first:last]
    return sum(part) / len(part)


@shoal.remote
def divide(dividend: float, divisor: float) -> float:
    """Divide."""
    return dividend / divisor


def step(number: int, title: str) -> None:
    """Print the heading of a step."""
    print(f"\n{number}. {title}")


def main() -> None:
    """Show the steps one after the other."""
    began = time.perf_counter()
    shoal.init(num_cpus=None if os.environ.get("SHOAL_ADDRESS") else 4)
    resources = shoal.cluster_resources()
    print(f"A cluster with {resources['CPU']:g} CPUs is up after {time.perf_counter() - began:.2f} s.")

    step(1, "Tasks run at the same time, in processes of their own")
    shoal.get([process_id.remote() for _ in range(8)])
    began = time.perf_counter()
    squares = shoal.get([square.remote(number) for number in range(8)])
    print(f"   8 squares: {squares}")
    print(f"   each takes 0.2 s, all together took {time.perf_counter() - began:.2f} s")
    processes = set(shoal.get([process_id.remote() for _ in range(8)]))
    print(f"   they ran in {len(processes)} processes, none of them this one: {os.getpid() not in processes}")

    step(2, "Tasks start tasks")
    numbers = [(7919 * index) % 211 for index in range(200)]
    print(
        f"   merge sort of {len(numbers)} numbers is right: {shoal.get(merge_sort.remote(numbers)) == sorted(numbers)}"
    )

    step(3, "Results are taken as they come, the quickest first")
    waiting = [nap.remote(seconds) for seconds in (1.0, 0.1, 0.5)]
    while waiting:
        done, waiting = shoal.wait(waiting)
        print(f"   a nap of {shoal.get(done[0])} s is over, {len(waiting)} to go")

    step(4, "Large values are put into shared memory once, and passed by reference")
    large = shoal.put(array("d", range(1_000_000)))
    quarters = [mean.remote(large, first, first + 250_000) for first in range(0, 1_000_000, 250_000)]
    print(f"   the means of the quarters of 8 MB: {shoal.get(quarters)}")

    step(5, "An error comes back with the traceback of where it happened")
    try:
        shoal.get(divide.remote(1, 0))
    except ZeroDivisionError as error:
        print(f"   caught as {type(error).__name__}; it says:")
        for line in str(error).strip().splitlines():
            print(f"   | {line}")

    shoal.shutdown()
    print("\nDone, and everything is gone again.")


if __name__ == "__main__":
    main()
