"""Work of every kind, for as long as it is wanted: so that each metric has something to tell."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.exceptions import ShoalError
from shoal.util import placement_group
from shoal.util.metrics import Counter
from tests.integration.waiting import get

OBJECT_BYTES = 12_000_000
ROUND_SECONDS = 0.5

steps = Counter("steps", "Steps of the workload.", ("kind",))


@shoal.remote
def step(x: int) -> int:
    steps.inc(tags={"kind": "step"})
    return x + 1


@shoal.remote(num_gpus=0.5)
def make(size: int) -> Any:
    steps.inc(tags={"kind": "make"})
    return np.ones(size, dtype=np.uint8)


@shoal.remote(resources={"head": 0.01}, num_cpus=0.5)
def total(array: Any) -> int:
    return int(array.sum())


@shoal.remote(max_retries=0)
def fail() -> None:
    raise ValueError("on purpose")


@shoal.remote(max_retries=1)
def crash_once(path: str) -> int:
    if not os.path.exists(path):
        Path(path).touch()
        os._exit(1)
    return 1


@shoal.remote(num_cpus=1000)
def never() -> None:
    """Wait for a node that there is none of."""


class ServerClass:
    def __init__(self, path: str) -> None:
        self.path = path

    def serve(self, x: int) -> int:
        return x

    def end(self) -> None:
        if not os.path.exists(self.path):
            Path(self.path).touch()
            os._exit(1)


Server: Any = shoal.remote(max_restarts=1, max_task_retries=2, num_cpus=0.1)(ServerClass)


def once(folder: Path) -> list[Any]:
    """Have happen what happens seldom: a crash, a restart, a gang, durable objects, impossible demand."""
    server = Server.remote(str(folder / "ended"))
    assert get(server.serve.remote(1)) == 1
    ending = server.end.remote()
    assert get(crash_once.remote(str(folder / "crashed"))) == 1
    group = placement_group([{"CPU": 0.1}, {"CPU": 0.1}], strategy="SPREAD")
    assert group.wait(40)
    durable = shoal.put(b"kept" * 1000, durable=True)
    get(ending)
    return [server, group, durable, never.remote()]


def go_round(kept: list[Any]) -> None:
    """Do a little of everything, and keep the newest objects: more than fit into memory."""
    assert sum(get([step.remote(x) for x in range(200)])) == 20100
    with pytest.raises(ValueError, match="on purpose"):
        get(fail.remote())
    assert get(total.remote(make.remote(OBJECT_BYTES))) == OBJECT_BYTES
    kept.append(shoal.put(np.zeros(OBJECT_BYTES, dtype=np.uint8)))
    del kept[:-8]
    assert get(kept[0])[0] == 0


@contextlib.contextmanager
def under_load(folder: Path) -> Iterator[None]:
    """Keep the cluster at work while the block runs; what goes wrong there is raised here."""
    ended = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        kept: list[Any] = []
        try:
            held = once(folder)
            while not ended.is_set():
                go_round(kept)
                ended.wait(ROUND_SECONDS)
            del held
        except (ShoalError, AssertionError, ValueError) as error:
            failures.append(error)

    thread = threading.Thread(target=work, name="workload")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    for failure in failures:
        raise failure
