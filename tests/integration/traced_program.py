"""A driver whose work is traced, run by ``test_traces``: each part under a span of its own name, but the first."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import numpy as np
from opentelemetry import trace

import shoal

LARGE = 300_000
tracer = trace.get_tracer("the user's")


@shoal.remote
def total(numbers: np.ndarray, factor: int) -> np.ndarray:
    with tracer.start_as_current_span("adding"):
        return numbers * factor


@shoal.remote
def failing() -> None:
    raise KeyError("no such key")


@shoal.remote
def outer(count: int) -> int:
    return sum(shoal.get([inner.remote(index) for index in range(count)]))


@shoal.remote
def inner(index: int) -> int:
    return index


@shoal.remote
def items(count: int) -> Iterator[int]:
    for index in range(count):
        with tracer.start_as_current_span("making"):
            value = index
        yield value


@shoal.remote
class Counter:
    def __init__(self, start: int) -> None:
        with tracer.start_as_current_span("setting up"):
            self.count = start

    def add(self, by: int) -> int:
        self.count += by
        return self.count


@shoal.remote
class Asker:
    async def ask(self, counter: Counter) -> int:
        await asyncio.sleep(0)
        with tracer.start_as_current_span("asking"):
            return await counter.add.remote(1)


@shoal.remote(max_retries=1)
def crashing(path: str) -> str:
    import os
    import pathlib

    if not pathlib.Path(path).exists():
        pathlib.Path(path).write_text("once")
        os._exit(1)
    return "survived"


def main() -> None:
    import sys

    with shoal.init(num_cpus=2):
        assert shoal.get(total.remote(np.ones(LARGE), 2))[0] == 2
        with tracer.start_as_current_span("failure"), contextlib.suppress(KeyError):
            shoal.get(failing.remote())
        with tracer.start_as_current_span("nesting"):
            assert shoal.get(outer.remote(2)) == 1
        with tracer.start_as_current_span("stream"):
            assert [shoal.get(ref) for ref in items.remote(3)] == [0, 1, 2]
        with tracer.start_as_current_span("actors"):
            counter = Counter.remote(5)
            assert shoal.get(Asker.remote().ask.remote(counter)) == 6
        with tracer.start_as_current_span("crash"):
            assert shoal.get(crashing.remote(sys.argv[1])) == "survived"
        with tracer.start_as_current_span("wait and put"):
            shoal.wait([inner.remote(shoal.put(1))])


if __name__ == "__main__":
    main()
