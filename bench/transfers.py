"""Rows about objects between nodes: several nodes on this machine, each with a store of its own.

The store of a node is large enough that the memory of what was freed is kept warm; the first rounds, which touch it for
the first time, are not counted. The objects of each node lie in a folder of its own, as on a machine of its own: else
nodes would share the memory of objects, which a row of its own measures.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.measuring import Effort, Measured

OBJECT_BYTES = 1_000_000_000
STORE_BYTES = 5 * 1024**3
READERS = 8
WARM_ROUNDS = 2
SHARED_MEMORY = "/dev/shm"
APART = "apart-"
"""What the names of folders begin with in which the folders of nodes lie that share nothing."""
FREEING_SECONDS = 0.5
"""How long the nodes have to hear that an object was freed, before the next one is made."""


@contextlib.contextmanager
def store_folders(count: int) -> Iterator[list[str]]:
    """Make folders in shared memory, so that the objects of each node of Shoal lie apart."""
    with tempfile.TemporaryDirectory(prefix=APART, dir=SHARED_MEMORY) as base:
        folders = [Path(base, str(index)) for index in range(count)]
        for folder in folders:
            folder.mkdir()
        yield [str(folder) for folder in folders]


@contextlib.contextmanager
def nodes(system: str, readers: int, *, apart: bool = True) -> Iterator[Any]:
    """Run a head, to which this driver belongs, and nodes that read, each with a resource of its own.

    Nodes of Shoal that are not ``apart`` share the memory of large objects; those of Ray never do. Where the
    environment names a cluster of Shoal, that is joined, and has such nodes already.
    """
    ray: Any = importlib.import_module(system)
    if system == "shoal" and "SHOAL_ADDRESS" in os.environ:
        with ray.init(log_to_driver=False):
            yield ray
        return
    options = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    with contextlib.ExitStack() as stack:
        own: list[dict[str, str]] = [{} for _ in range(1 + readers)]
        if apart and system == "shoal":
            own = [{"plasma_directory": folder} for folder in stack.enter_context(store_folders(1 + readers))]
        cluster = importlib.import_module(f"{system}.cluster_utils").Cluster(
            initialize_head=True, head_node_args=options | own[0]
        )
        stack.callback(cluster.shutdown)
        stack.callback(ray.shutdown)
        for index in range(readers):
            cluster.add_node(**options, **own[1 + index], resources={f"reader{index}": 1})
        if system == "ray":
            ray.init(address=cluster.address, log_to_driver=False)
        else:
            cluster.connect()
        yield ray


def _reading(ray: Any, readers: int, size_bytes: int) -> Callable[[int], float]:
    """Return what has some of the readers read a new object, and tells how many seconds that took."""
    import numpy

    array = numpy.arange(size_bytes // 8, dtype=numpy.int64)
    last = int(array[-1])
    tasks = [ray.remote(num_cpus=0, resources={f"reader{index}": 1})(_last) for index in range(readers)]
    ray.get([task.remote(array[-2:]) for task in tasks])

    def read(count: int) -> float:
        reference = ray.put(array)
        began = time.perf_counter()
        values = ray.get([task.remote(reference) for task in tasks[:count]])
        seconds = time.perf_counter() - began
        assert values == count * [last]
        del reference
        time.sleep(FREEING_SECONDS)
        return seconds

    return read


def _last(array: Any) -> int:
    return int(array[-1])


def transfer(system: str, effort: Effort, size_bytes: int = OBJECT_BYTES) -> Measured:
    """One object of a gigabyte read on another node, one at a time."""
    with nodes(system, 1) as ray:
        read = _reading(ray, 1, size_bytes)
        for _ in range(WARM_ROUNDS):
            read(1)
        return Measured([size_bytes / read(1) / 1e6 for _ in range(effort.repetitions)])


def broadcast(system: str, effort: Effort, size_bytes: int = OBJECT_BYTES, readers: int = READERS) -> Measured:
    """One object of a gigabyte read on eight nodes at once, in times of what it takes for one of them."""
    with nodes(system, readers) as ray:
        read = _reading(ray, readers, size_bytes)
        for _ in range(WARM_ROUNDS):
            read(readers)
        one = min(read(1) for _ in range(effort.repetitions))
        all_of_them = [read(readers) for _ in range(effort.repetitions)]
        return Measured(
            [seconds / one for seconds in all_of_them], {"one_seconds": one, "all_seconds": min(all_of_them)}
        )


def broadcast_beside(system: str, effort: Effort, size_bytes: int = OBJECT_BYTES, readers: int = READERS) -> Measured:
    """One object of a gigabyte read at once on eight nodes whose objects lie in the same memory."""
    with nodes(system, readers, apart=False) as ray:
        read = _reading(ray, readers, size_bytes)
        for _ in range(WARM_ROUNDS):
            read(readers)
        one = min(read(1) for _ in range(effort.repetitions))
        return Measured([read(readers) for _ in range(effort.repetitions)], {"one_seconds": one})
