"""Programs of rows about objects: many of them, and large ones."""

from __future__ import annotations

import functools
import mmap
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.measuring import Effort, Measured, rate, seconds

STORE_BYTES = {"object_8gb": 9 * 1024**3}
"""The shared memory of rows that need more than there is by default."""


def args_10k(ray: Any, effort: Effort, count: int = 10_000) -> Measured:
    """One task with ten thousand references as its arguments."""
    count_all = ray.remote(_count)
    references = [ray.put(number) for number in range(count)]
    return seconds(effort, lambda: _expect(count, ray.get(count_all.remote(*references))))


def returns_3k(ray: Any, effort: Effort, count: int = 3_000) -> Measured:
    """One task with three thousand return values, all of them got."""
    numbers = ray.remote(num_returns=count)(_numbers)
    return seconds(effort, lambda: _expect(count, len(ray.get(numbers.remote(count)))))


def get_10k(ray: Any, effort: Effort, count: int = 10_000, size_bytes: int = 1_000) -> Measured:
    """Get of a list of ten thousand objects of 1 KB."""
    references = [ray.put(bytes(size_bytes)) for _ in range(count)]
    return seconds(effort, lambda: _expect(count, len(ray.get(references))))


def get_1k_stored(ray: Any, effort: Effort, count: int = 1_000, size_bytes: int = 200_000) -> Measured:
    """Get of a list of a thousand objects of 200 KB, which lie in shared memory."""
    import numpy

    array = numpy.ones(size_bytes, dtype=numpy.uint8)
    references = [ray.put(array) for _ in range(count)]
    return seconds(effort, lambda: _expect(count, len(ray.get(references))))


def live_100k(ray: Any, effort: Effort, count: int = 100_000) -> Measured:
    """Make a hundred thousand objects, have one task get all of them by one argument, and drop them."""
    count_all = ray.remote(_count_gotten(ray))
    began = time.perf_counter()
    references = [ray.put(number) for number in range(count)]
    made = time.perf_counter()
    _expect(count, ray.get(count_all.remote([references])))
    passed = time.perf_counter()
    del references
    ended = time.perf_counter()
    details = {"put_seconds": made - began, "task_seconds": passed - made, "drop_seconds": ended - passed}
    return Measured([ended - began], details)


def object_8gb(ray: Any, effort: Effort, size_bytes: int = 8_000_000_000) -> Measured:
    """Put an object of 8 GB, have a task read its ends, and get it."""
    import numpy

    ends = ray.remote(_ends)
    array = numpy.zeros(size_bytes, dtype=numpy.uint8)
    array[-1] = 7
    began = time.perf_counter()
    reference = ray.put(array)
    put = time.perf_counter()
    _expect((0, 7), ray.get(ends.remote(reference)))
    _expect(size_bytes, len(ray.get(reference)))
    ended = time.perf_counter()
    return Measured([ended - began], {"put_gigabytes_per_second": size_bytes / 1e9 / (put - began)})


def put_multi_gigabytes(
    ray: Any, effort: Effort, clients: int = 10, puts: int = 10, items: int = 10 * 1024 * 1024
) -> Measured:
    """Ten tasks, each of which puts an array of 80 MB ten times, as in Ray's own microbenchmark."""

    def put_all() -> None:
        import numpy

        for _ in range(puts):
            ray.put(numpy.zeros(items, dtype=numpy.int64))

    task = ray.remote(put_all)
    return rate(effort, lambda: ray.get([task.remote() for _ in range(clients)]), clients * puts * items * 8 / 1e9)


def task_result_80mb(ray: Any, effort: Effort, size_bytes: int = 80_000_000) -> Measured:
    """A task that returns an array of 80 MB, which its process has made before."""
    returned = ray.remote(_returned)
    return rate(effort, lambda: _expect(size_bytes, len(ray.get(returned.remote(size_bytes)))), size_bytes / 1e9)


def task_argument_80mb(ray: Any, effort: Effort, size_bytes: int = 80_000_000) -> Measured:
    """A task that is given an array of 80 MB by value."""
    length, array = ray.remote(_length), _ones(size_bytes)
    return rate(effort, lambda: _expect(size_bytes, ray.get(length.remote(array))), size_bytes / 1e9)


def put_in_copies(ray: Any, effort: Effort, items: int = 100 * 1024 * 1024) -> Measured:
    """How many times as long as a plain copy of an array into warm shared memory its put takes."""
    import numpy

    array: Any = numpy.ones(items, dtype=numpy.int64)  # zeros would all be read from the same page
    source = memoryview(array).cast("B")
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(array.nbytes)
        with mmap.mmap(file.fileno(), array.nbytes) as mapping, memoryview(mapping) as target:
            copied = rate(effort, lambda: _copy(target, source), array.nbytes / 1e9)
    put = rate(effort, lambda: ray.put(array), array.nbytes / 1e9)
    rates = {"copied_gigabytes_per_second": max(copied.samples), "put_gigabytes_per_second": max(put.samples)}
    return Measured([one / other for one, other in zip(copied.samples, put.samples, strict=True)], rates)


ROWS: tuple[Callable[..., Measured], ...] = (
    args_10k,
    returns_3k,
    get_10k,
    get_1k_stored,
    live_100k,
    object_8gb,
    put_multi_gigabytes,
    task_result_80mb,
    task_argument_80mb,
    put_in_copies,
)


def _copy(target: memoryview, source: memoryview) -> None:
    target[:] = source


def _expect(wanted: object, got: object) -> None:
    """Raise where a program did not compute what it measures."""
    if got != wanted:
        raise AssertionError(f"expected {wanted!r}, got {got!r}")


def _count(*arguments: object) -> int:
    return len(arguments)


def _count_gotten(ray: Any) -> Callable[[list[Any]], int]:
    def count(nested: list[Any]) -> int:
        return len(ray.get(nested[0]))

    return count


def _numbers(count: int) -> list[int]:
    return list(range(count))


@functools.cache
def _ones(size_bytes: int) -> Any:
    """Return an array, made once in each process: making it would take longer than sending it."""
    import numpy

    return numpy.ones(size_bytes, dtype=numpy.uint8)


def _returned(size_bytes: int) -> Any:
    return _ones(size_bytes)


def _length(array: Any) -> int:
    return len(array)


def _ends(array: Any) -> tuple[int, int]:
    return int(array[0]), int(array[-1])
