"""One row on one system, in a fresh process: ``python -m bench.program tasks_sync --system ray``.

Imports nothing but the standard library and the system itself, for it also runs in the environment of Ray and Dask.
Shoal and Ray run the same lines; only the import differs. The last line printed is the result as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from bench import objects, secured
from bench.measuring import Effort, Measured, rate
from bench.memory import PeakMemory, pss_by_process, wait_until_at_rest
from bench.traces import traced_tasks
from bench.transfers import broadcast, broadcast_beside, transfer

CPUS = 2
SPILLED_BYTES = 64 * 1024 * 1024
SPILLED_COUNT = 24
STORE_BYTES = objects.STORE_BYTES | {"spill": 4 * SPILLED_BYTES, "restore": 4 * SPILLED_BYTES}
"""The rows that want a store of another size than the default."""


# ------------------------------------------------------------------------------------ Shoal and Ray


def start(system: str, row: str = "") -> Any:
    """Import Shoal or Ray and start it with two CPUs, and with the shared memory that a row needs.

    Where the environment names a cluster of Shoal, that is joined as it is; one that merely runs here is not.
    """
    ray: Any = importlib.import_module(system)
    if system == "shoal" and "SHOAL_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
        return ray
    options = {"object_store_memory": STORE_BYTES[row]} if row in STORE_BYTES else {}
    ray.init("local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False, **options)
    return ray


def tasks_sync(ray: Any, effort: Effort) -> Measured:
    """One task at a time."""
    small_value = ray.remote(_small_value)
    return rate(effort, lambda: ray.get(small_value.remote()))


def tasks_async(ray: Any, effort: Effort, count: int = 1000) -> Measured:
    """A thousand tasks in flight."""
    small_value = ray.remote(_small_value)
    return rate(effort, lambda: ray.get([small_value.remote() for _ in range(count)]), count)


def tasks_multi_client(ray: Any, effort: Effort, clients: int = 4, tasks: int = 1000) -> Measured:
    """Four tasks, each of which submits a thousand and gets them."""
    small_value = ray.remote(_small_value)

    def submit(count: int) -> None:
        ray.get([small_value.remote() for _ in range(count)])

    client = ray.remote(num_cpus=0)(submit)
    return rate(effort, lambda: ray.get([client.remote(tasks) for _ in range(clients)]), clients * tasks)


def put_small(ray: Any, effort: Effort) -> Measured:
    """Put of an integer."""
    return rate(effort, lambda: ray.put(0))


def get_small(ray: Any, effort: Effort) -> Measured:
    """Get of an integer that was put."""
    reference = ray.put(0)
    return rate(effort, lambda: ray.get(reference))


def wait_1k(ray: Any, effort: Effort, count: int = 1000) -> Measured:
    """Submit a thousand tasks and take the finished ones off one by one."""
    small_value = ray.remote(_small_value)

    def loop() -> None:
        waiting = [small_value.remote() for _ in range(count)]
        fetch = True
        while waiting:
            _, waiting = ray.wait(waiting, fetch_local=fetch)
            fetch = False

    return rate(effort, loop)


def put_gigabytes(ray: Any, effort: Effort, items: int = 100 * 1024 * 1024) -> Measured:
    """Put of an array of 100 Mi integers, whose memory is reused when its reference goes."""
    import numpy

    array = numpy.zeros(items, dtype=numpy.int64)
    return rate(effort, lambda: ray.put(array), array.nbytes / 1e9)


def spill(ray: Any, effort: Effort) -> Measured:
    """Put six times what the store holds, all of it still referred to."""
    import numpy

    array = numpy.zeros(SPILLED_BYTES // 8, dtype=numpy.int64)
    samples = []
    for _ in range(effort.repetitions):
        began = time.perf_counter()
        references = [ray.put(array) for _ in range(SPILLED_COUNT)]
        samples.append(SPILLED_COUNT * SPILLED_BYTES / 1e9 / (time.perf_counter() - began))
        del references
    return Measured(samples, disk_rates())


def restore(ray: Any, effort: Effort) -> Measured:
    """Get six times what the store holds, from the first to the last, each from where it was spilled to."""
    import numpy

    array = numpy.zeros(SPILLED_BYTES // 8, dtype=numpy.int64)
    references = [ray.put(array) for _ in range(SPILLED_COUNT)]
    samples = []
    for _ in range(effort.repetitions):
        began = time.perf_counter()
        for reference in references:
            ray.get(reference)
        samples.append(SPILLED_COUNT * SPILLED_BYTES / 1e9 / (time.perf_counter() - began))
    return Measured(samples, disk_rates())


def disk_rates(size_bytes: int = 512 * 1024 * 1024) -> dict[str, float]:
    """Return how fast the disk below the temp folder takes a file, until it is synced, and gives it back, in GB/s."""
    piece = os.urandom(1024 * 1024)
    with tempfile.TemporaryFile(buffering=0) as file:
        began = time.perf_counter()
        for _ in range(size_bytes // len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        read_from = time.perf_counter()
        while file.read(len(piece)):
            pass
        ended = time.perf_counter()
    return {
        "disk_write_gb_per_second": size_bytes / 1e9 / (written - began),
        "disk_read_gb_per_second": size_bytes / 1e9 / (ended - read_from),
    }


def queued_100k(ray: Any, effort: Effort, count: int = 100_000) -> Measured:
    """Queue a hundred thousand tasks, then wait for all of them."""
    small_value = ray.remote(_small_value)
    ray.get([small_value.remote() for _ in range(min(count, 1000))])
    began = time.perf_counter()
    references = [small_value.remote() for _ in range(count)]
    queued = time.perf_counter()
    ray.get(references)
    ended = time.perf_counter()
    return Measured([count / (ended - began)], {"submission_per_second": count / (queued - began)})


def queued_1m(ray: Any, effort: Effort, count: int = 1_000_000) -> Measured:
    """Queue a million tasks; the most memory the driver held meanwhile, for each of them."""
    small_value = ray.remote(_small_value)
    ray.get([small_value.remote() for _ in range(min(count, 1000))])
    began = time.perf_counter()
    with PeakMemory() as memory:
        references = [small_value.remote() for _ in range(count)]
        queued = time.perf_counter()
        for first in range(0, count, 10_000):
            ray.get(references[first : first + 10_000])
    ended = time.perf_counter()
    details = {"tasks_per_second": count / (ended - began), "submission_per_second": count / (queued - began)}
    return Measured([memory.growth_bytes / count], details)


def memory(ray: Any, effort: Effort, occupied_seconds: float = 0.5) -> Measured:
    """Proportional memory of everything but the driver, after both workers ran something and came to rest."""
    occupy = ray.remote(_occupy)
    ray.get([occupy.remote(occupied_seconds) for _ in range(CPUS)])
    wait_until_at_rest()
    driver, others = pss_by_process()
    total = sum(others.values())
    return Measured([total / 1e6], {"driver_megabytes": driver / 1e6, "processes": float(len(others))})


# Actors, as in Ray's own microbenchmark: those that are called need no CPU, and there are half as many as CPUs.

SERVERS = max(1, (os.cpu_count() or 2) // 2)


class _Actor:
    def small_value(self) -> bytes:
        return b"ok"

    def small_value_arg(self, argument: object) -> bytes:
        return b"ok"


class _AsyncActor:
    async def small_value(self) -> bytes:
        return b"ok"

    async def small_value_arg(self, argument: object) -> bytes:
        return b"ok"


def _client(ray: Any, servers: list[Any]) -> Any:
    """Return an actor that calls others."""

    class Client:
        def __init__(self, servers: list[Any]) -> None:
            self.servers = servers

        def small_value_batch(self, count: int) -> None:
            ray.get([server.small_value.remote() for server in self.servers for _ in range(count)])

        def small_value_batch_arg(self, count: int) -> None:
            argument = ray.put(0)
            ray.get([server.small_value_arg.remote(argument) for server in self.servers for _ in range(count)])

    return ray.remote(num_cpus=0)(Client).remote(servers)


def _one_at_a_time(ray: Any, effort: Effort, actor: Any) -> Measured:
    return rate(effort, lambda: ray.get(actor.small_value.remote()))


def _in_flight(ray: Any, effort: Effort, actor: Any, count: int) -> Measured:
    return rate(effort, lambda: ray.get([actor.small_value.remote() for _ in range(count)]), count)


def _one_calls_n(ray: Any, effort: Effort, actor_class: Any, calls: int) -> Measured:
    client = _client(ray, [actor_class.remote() for _ in range(SERVERS)])
    return rate(effort, lambda: ray.get(client.small_value_batch.remote(calls)), calls * SERVERS)


def _tasks_call_n(ray: Any, effort: Effort, actor_class: Any, calls: int, tasks: int = 4) -> Measured:
    actors = [actor_class.remote() for _ in range(SERVERS)]

    def work(actors: list[Any]) -> None:
        ray.get([actors[index % len(actors)].small_value.remote() for index in range(calls)])

    task = ray.remote(work)
    return rate(effort, lambda: ray.get([task.remote(actors) for _ in range(tasks)]), tasks * calls)


def actor_sync(ray: Any, effort: Effort) -> Measured:
    """One call at a time."""
    return _one_at_a_time(ray, effort, ray.remote(num_cpus=0)(_Actor).remote())


def actor_async(ray: Any, effort: Effort, count: int = 1000) -> Measured:
    """A thousand calls in flight."""
    return _in_flight(ray, effort, ray.remote(num_cpus=0)(_Actor).remote(), count)


def actor_concurrent(ray: Any, effort: Effort, count: int = 1000) -> Measured:
    """A thousand calls in flight to an actor with sixteen threads."""
    return _in_flight(ray, effort, ray.remote(num_cpus=0, max_concurrency=16)(_Actor).remote(), count)


def actors_1_n(ray: Any, effort: Effort, calls: int = 5000) -> Measured:
    """One actor that calls n."""
    return _one_calls_n(ray, effort, ray.remote(num_cpus=0)(_Actor), calls)


def actors_n_n(ray: Any, effort: Effort, calls: int = 5000) -> Measured:
    """Four tasks that call n actors."""
    return _tasks_call_n(ray, effort, ray.remote(num_cpus=0)(_Actor), calls)


def actors_n_n_arg(ray: Any, effort: Effort, calls: int = 1000) -> Measured:
    """N actors, each of which calls one of n with a reference as its argument."""
    servers = [ray.remote(num_cpus=0)(_Actor).remote() for _ in range(SERVERS)]
    clients = [_client(ray, [server]) for server in servers]
    return rate(effort, lambda: ray.get([one.small_value_batch_arg.remote(calls) for one in clients]), calls * SERVERS)


def async_actor_sync(ray: Any, effort: Effort) -> Measured:
    """One call of an async actor at a time."""
    return _one_at_a_time(ray, effort, ray.remote(_AsyncActor).remote())


def async_actor_async(ray: Any, effort: Effort, count: int = 1000) -> Measured:
    """A thousand calls in flight to an async actor."""
    return _in_flight(ray, effort, ray.remote(_AsyncActor).remote(), count)


def async_actor_async_arg(ray: Any, effort: Effort, count: int = 1000) -> Measured:
    """A thousand calls in flight to an async actor, each with a number."""
    actor = ray.remote(_AsyncActor).remote()
    return rate(effort, lambda: ray.get([actor.small_value_arg.remote(i) for i in range(count)]), count)


def async_actors_1_n(ray: Any, effort: Effort, calls: int = 5000) -> Measured:
    """One actor that calls n async actors."""
    return _one_calls_n(ray, effort, ray.remote(_AsyncActor), calls)


def async_actors_n_n(ray: Any, effort: Effort, calls: int = 5000) -> Measured:
    """Four tasks that call n async actors."""
    return _tasks_call_n(ray, effort, ray.remote(_AsyncActor), calls)


def actors_created(ray: Any, effort: Effort, count: int = 40) -> Measured:
    """Create forty actors and call each, as the first thing that a driver does."""
    actor_class = ray.remote(num_cpus=0)(_Actor)
    began = time.perf_counter()
    actors = [actor_class.remote() for _ in range(count)]
    ray.get([actor.small_value.remote() for actor in actors])
    return Measured([count / (time.perf_counter() - began)])


def actors_alive(ray: Any, effort: Effort, count: int = 1000) -> Measured:
    """Memory that each of a thousand actors adds, once all of them have been called and are at rest."""
    actor_class = ray.remote(num_cpus=0)(_Actor)
    first = actor_class.remote()
    ray.get(first.small_value.remote())
    wait_until_at_rest()
    before = sum(pss_by_process()[1].values())
    began = time.perf_counter()
    actors = [actor_class.remote() for _ in range(count)]
    ray.get([actor.small_value.remote() for actor in actors])
    created = time.perf_counter()
    wait_until_at_rest(limit_seconds=60.0)
    growth = sum(pss_by_process()[1].values()) - before
    return Measured([growth / count / 1e6], {"created_per_second": count / (created - began)})


def queue_pairs(ray: Any, effort: Effort) -> Measured:
    """Put an item and get it."""
    queue = _queue(ray)

    def pair() -> None:
        queue.put(0)
        queue.get()

    return rate(effort, pair)


def queue_pairs_many(ray: Any, effort: Effort, count: int = 200) -> Measured:
    """Put two hundred items at once, then get them at once."""
    queue = _queue(ray)

    async def pairs() -> None:
        await asyncio.gather(*[queue.put_async(item) for item in range(count)])
        await asyncio.gather(*[queue.get_async() for _ in range(count)])

    with asyncio.Runner() as runner:
        return rate(effort, lambda: runner.run(pairs()), count)


def actor_pool_map(ray: Any, effort: Effort, count: int = 1000) -> Measured:
    """Map a thousand values over two actors."""
    actor_class = ray.remote(num_cpus=0)(_Actor)
    pool = importlib.import_module(f"{ray.__name__}.util").ActorPool([actor_class.remote() for _ in range(2)])

    def map_all() -> None:
        for _ in pool.map(lambda actor, value: actor.small_value_arg.remote(value), range(count)):
            pass

    return rate(effort, map_all, count)


def get_actor(ray: Any, effort: Effort) -> Measured:
    """Find an actor by its name; in milliseconds."""
    actor = ray.remote(num_cpus=0)(_Actor).options(name="known").remote()
    ray.get(actor.small_value.remote())
    measured = rate(effort, lambda: ray.get_actor("known"))
    return Measured([1000 / sample for sample in measured.samples])


def placement_groups(ray: Any, effort: Effort, count: int = 100) -> Measured:
    """Create a hundred placement groups of one bundle, wait for each, and remove each."""
    util = importlib.import_module(f"{ray.__name__}.util")

    def create_and_remove() -> None:
        groups = [util.placement_group([{"CPU": 0.001}]) for _ in range(count)]
        for group in groups:
            group.wait(timeout_seconds=30)
        for group in groups:
            util.remove_placement_group(group)

    return rate(effort, create_and_remove, count)


# Streaming generators and asyncio


class _AsyncStreams:
    async def stream(self, count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"ok"
            await asyncio.sleep(0)


def _small_items(count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b"ok"


def _large_items(count: int, size_bytes: int) -> Iterator[Any]:
    import numpy

    array = numpy.ones(size_bytes, dtype=numpy.uint8)
    for _ in range(count):
        yield array


def stream_items(ray: Any, effort: Effort, count: int = 10_000) -> Measured:
    """Small items of one generator task, each taken and got as it comes."""
    small_items = ray.remote(_small_items)

    def consume() -> None:
        for reference in small_items.remote(count):
            ray.get(reference)

    return rate(effort, consume, count)


def stream_first_item(ray: Any, effort: Effort) -> Measured:
    """How many times as long as for the result of a task one waits for the first item of a generator."""
    small_value, small_items = ray.remote(_small_value), ray.remote(_small_items)
    tasks = rate(effort, lambda: ray.get(small_value.remote()))
    items = rate(effort, lambda: ray.get(next(small_items.remote(1))))
    latencies = {"item_milliseconds": 1000 / max(items.samples), "task_milliseconds": 1000 / max(tasks.samples)}
    return Measured([task / item for task, item in zip(tasks.samples, items.samples, strict=True)], latencies)


def stream_large(ray: Any, effort: Effort, count: int = 10, size_bytes: int = 80_000_000) -> Measured:
    """Arrays of 80 MB from one generator task, which is at most two ahead."""
    large_items = ray.remote(_generator_backpressure_num_objects=2)(_large_items)

    def consume() -> None:
        for reference in large_items.remote(count, size_bytes):
            assert len(ray.get(reference)) == size_bytes

    return rate(effort, consume, count * size_bytes / 1e9)


def stream_100(ray: Any, effort: Effort, streams: int = 100, count: int = 100) -> Measured:
    """A hundred generators of an async actor, at most ten items ahead, consumed at once; and the memory that takes."""
    actor = ray.remote(num_cpus=0)(_AsyncStreams).remote()
    stream = actor.stream.options(_generator_backpressure_num_objects=10)

    async def consume() -> None:
        async for reference in stream.remote(count):
            await reference

    async def consume_all() -> None:
        await asyncio.gather(*[consume() for _ in range(streams)])

    with asyncio.Runner() as runner:
        runner.run(consume_all())
        others = sum(pss_by_process()[1].values())
        with PeakMemory() as memory:
            measured = rate(effort, lambda: runner.run(consume_all()), streams * count)
    grown = sum(pss_by_process()[1].values()) - others
    details = {"driver_growth_megabytes": memory.growth_bytes / 1e6, "other_growth_megabytes": grown / 1e6}
    return Measured(measured.samples, details)


def await_10k(ray: Any, effort: Effort, count: int = 10_000) -> Measured:
    """How many times as long as ``get`` of the list it takes to await ten thousand tasks, one after the other.

    ``asyncio.gather`` is told apart: it makes an asyncio task of each, whatever is awaited.
    """
    small_value = ray.remote(_small_value)

    def start() -> list[Any]:
        return [small_value.remote() for _ in range(count)]

    async def one_by_one() -> None:
        for reference in start():
            await reference

    async def gather() -> None:
        await asyncio.gather(*start())

    got = rate(effort, lambda: ray.get(start()), count)
    with asyncio.Runner() as runner:
        awaited = rate(effort, lambda: runner.run(one_by_one()), count)
        gathered = rate(effort, lambda: runner.run(gather()), count)
    measured = {"got": got, "awaited": awaited, "gathered": gathered}
    rates = {f"{name}_per_second": max(one.samples) for name, one in measured.items()}
    return Measured([one / other for one, other in zip(got.samples, awaited.samples, strict=True)], rates)


def _queue(ray: Any) -> Any:
    queue = importlib.import_module(f"{ray.__name__}.util.queue").Queue()
    queue.put(0)
    queue.get()
    return queue


def init(system: str) -> Measured:
    """From ``init`` to the first result, everything started fresh; the import is told apart."""
    began = time.perf_counter()
    importlib.import_module({"dask": "distributed"}.get(system, system))
    imported = time.perf_counter()
    if system == "dask":
        with start_dask() as client:
            client.submit(_small_value).result()
            ended = time.perf_counter()
    else:
        ray = start(system)
        ray.get(ray.remote(_small_value).remote())
        ended = time.perf_counter()
        ray.shutdown()
    return Measured([ended - imported], {"import_seconds": imported - began})


def _small_value() -> bytes:
    return b"ok"


def _occupy(seconds: float) -> None:
    time.sleep(seconds)


# ------------------------------------------------------------------------------------ Dask


def start_dask() -> Any:
    """Return a client of a cluster with two worker processes of one thread each, as Ray and Shoal have."""
    from distributed import Client, LocalCluster

    return Client(LocalCluster(n_workers=CPUS, threads_per_worker=1, dashboard_address=None, silence_logs=50))


def dask_tasks_sync(client: Any, effort: Effort) -> Measured:
    """One task at a time."""
    return rate(effort, lambda: client.submit(_small_value, pure=False).result())


def dask_tasks_async(client: Any, effort: Effort) -> Measured:
    """A thousand tasks in flight."""

    def batch() -> None:
        client.gather([client.submit(_small_value, pure=False) for _ in range(1000)])

    return rate(effort, batch, 1000)


def dask_queued_100k(client: Any, effort: Effort, count: int = 100_000) -> Measured:
    """Queue a hundred thousand tasks, then wait for all of them."""
    client.gather([client.submit(_small_value, pure=False) for _ in range(1000)])
    began = time.perf_counter()
    futures = [client.submit(_small_value, pure=False) for _ in range(count)]
    queued = time.perf_counter()
    client.gather(futures)
    ended = time.perf_counter()
    return Measured([count / (ended - began)], {"submission_per_second": count / (queued - began)})


# ------------------------------------------------------------------------------------ the process

PROGRAMS: dict[str, Callable[..., Measured]] = {
    program.__name__: program
    for program in (
        tasks_sync,
        tasks_async,
        tasks_multi_client,
        put_small,
        get_small,
        wait_1k,
        put_gigabytes,
        spill,
        restore,
        queued_100k,
        queued_1m,
        memory,
        actor_sync,
        actor_async,
        actor_concurrent,
        actors_1_n,
        actors_n_n,
        actors_n_n_arg,
        async_actor_sync,
        async_actor_async,
        async_actor_async_arg,
        async_actors_1_n,
        async_actors_n_n,
        actors_created,
        actors_alive,
        queue_pairs,
        queue_pairs_many,
        actor_pool_map,
        get_actor,
        placement_groups,
        stream_items,
        stream_first_item,
        stream_large,
        stream_100,
        await_10k,
        *objects.ROWS,
    )
}
CLUSTER_PROGRAMS: dict[str, Callable[[str, Effort], Measured]] = {
    program.__name__: program for program in (transfer, broadcast, broadcast_beside, traced_tasks)
} | secured.PROGRAMS
"""Programs that start clusters themselves."""
DASK_PROGRAMS: dict[str, Callable[[Any, Effort], Measured]] = {
    "tasks_sync": dask_tasks_sync,
    "tasks_async": dask_tasks_async,
    "queued_100k": dask_queued_100k,
}


def measure(row: str, system: str, effort: Effort) -> Measured:
    """Run one row on one system; ``KeyError`` where the system has no such program."""
    if row == "init":
        return init(system)
    if row in CLUSTER_PROGRAMS:
        return CLUSTER_PROGRAMS[row](system, effort)
    if system == "dask":
        with start_dask() as client:
            return DASK_PROGRAMS[row](client, effort)
    ray = start(system, row)
    try:
        return PROGRAMS[row](ray, effort)
    finally:
        ray.shutdown()


def main() -> None:
    """Run the row the command line names and print what it measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.program", description=__doc__)
    parser.add_argument("row", choices=["init", *PROGRAMS, *CLUSTER_PROGRAMS])
    parser.add_argument("--system", choices=["shoal", "ray", "dask"], required=True)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    measured = measure(arguments.row, arguments.system, Effort(arguments.repetitions, arguments.seconds))
    print(json.dumps({"samples": measured.samples, "details": measured.details}), flush=True)


if __name__ == "__main__":
    main()
