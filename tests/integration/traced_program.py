"""A driver whose work is traced, run by ``test_traces``: each part below a span of its own name, but the first.

Given the path of a file that is not there, it does all parts, else the first two.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


class Counter:
    def __init__(self, start: int) -> None:
        with tracer.start_as_current_span("setting up"):
            self.count = start

    def add(self, by: int) -> int:
        self.count += by
        return self.count


class Asker:
    async def ask(self, counter: Any) -> Any:
        with tracer.start_as_current_span("asking"):
            return await counter.add.remote(1)


CounterActor: Any = shoal.remote(Counter)
AskerActor: Any = shoal.remote(Asker)


@shoal.remote(max_retries=1)
def crashing(path: str) -> str:
    if not Path(path).exists():
        Path(path).write_text("once")
        os._exit(1)
    return "survived"


def task() -> None:
    assert shoal.get(total.remote(np.ones(LARGE), 2))[0] == 2


def nesting() -> None:
    with tracer.start_as_current_span("nesting"):
        assert shoal.get(outer.remote(2)) == 1


def others(path: str) -> None:
    with tracer.start_as_current_span("failure"), contextlib.suppress(KeyError):
        shoal.get(failing.remote())
    with tracer.start_as_current_span("stream"):
        assert [shoal.get(ref) for ref in items.remote(3)] == [0, 1, 2]
    with tracer.start_as_current_span("actors"):
        counter = CounterActor.remote(5)
        assert shoal.get(AskerActor.remote().ask.remote(counter)) == 6
    with tracer.start_as_current_span("crash"):
        assert shoal.get(crashing.remote(path)) == "survived"
    with tracer.start_as_current_span("wait and put"):
        shoal.wait([inner.remote(shoal.put(1))])


def main() -> None:
    with shoal.init(num_cpus=2):
        task()
        nesting()
        for path in sys.argv[1:]:
            others(path)
        sys.stdin.read()  # until the test has got what worker processes send while they are idle


if __name__ == "__main__":
    main()
