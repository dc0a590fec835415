"""Rows about objects between nodes: several nodes on this machine, each with a store of its own.

The store of a node is large enough that the memory of what was freed is kept warm; the first rounds, which touch it for
the first time, are not counted.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench.measuring import Effort, Measured

OBJECT_BYTES = 1_000_000_000
STORE_BYTES = 5 * 1024**3
READERS = 8
WARM_ROUNDS = 2
FREEING_SECONDS = 0.5
"""How long the nodes have to hear that an object was freed, before the next one is made."""


@contextlib.contextmanager
def nodes(system: str, readers: int, store_bytes: int = STORE_BYTES) -> Iterator[Any]:
    """Run a head, to which this driver belongs, and nodes that read, each with a resource of its own.

    Where the environment names a cluster of Shoal, that is joined, and has such nodes already.
    """
    ray: Any = importlib.import_module(system)
    if system == "shoal" and "SHOAL_ADDRESS" in os.environ:
        with ray.init(log_to_driver=False):
            yield ray
        return
    options = {"num_cpus": 1, "object_store_memory": store_bytes}
    cluster = importlib.import_module(f"{system}.cluster_utils").Cluster(
        initialize_head=True, head_node_args=dict(options)
    )
    try:
        for index in range(readers):
            cluster.add_node(**options, resources={f"reader{index}": 1})
        if system == "ray":
            ray.init(address=cluster.address, log_to_driver=False)
        else:
            cluster.connect()
        yield ray
    finally:
        ray.shutdown()
        cluster.shutdown()


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
