"""Large objects between nodes, and to and from a driver on another machine: shared, resumed, and nothing left.

The nodes' objects lie in folders of their own, so that they are pulled; but for those that are said to lie beside each
other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

import shoal
from shoal import driver
from shoal.cluster_utils import Cluster, ClusterNode
from shoal.memory import read_memory
from shoal.status import Target
from shoal_core.bus.credentials import Credentials
from shoal_core.protocol.errors import ObjectLostError, ShoalError
from tests.integration.stores import SHARED_MEMORY, apart, stores
from tests.integration.waiting import get, until

Array = NDArray[np.uint8]

MB = 1_000_000
SIZE = 40 * MB
FILE_THREADS = min(32, (os.cpu_count() or 1) + 4)
"""How many threads an event loop keeps at most for what blocks."""
LARGE = 400 * MB
STORE = 1000 * MB


@contextlib.contextmanager
def running(folders: Sequence[str]) -> Iterator[Cluster]:
    """Run a node for each folder in which objects lie."""
    cluster = Cluster()
    try:
        for index, folder in enumerate(folders):
            cluster.add_node(num_cpus=1, object_store_memory=STORE, resources={f"n{index}": 9}, plasma_directory=folder)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def three() -> Iterator[Cluster]:
    """Three nodes, of which the driver belongs to the first."""
    with apart(3) as folders, running(folders) as cluster:
        cluster.connect()
        yield cluster


@pytest.fixture
def three_beside() -> Iterator[Cluster]:
    """The same, but that their objects lie beside each other."""
    with running(3 * [str(SHARED_MEMORY)]) as cluster:
        cluster.connect()
        yield cluster


@pytest.fixture
def from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes, and a driver that is on another machine than both."""
    with apart(2) as folders, running(folders) as cluster:
        monkeypatch.setattr(driver, "machine_id", lambda: "another machine")
        cluster.connect()
        yield cluster


@shoal.remote(num_cpus=0)
def make(size: int) -> bytes:
    return bytes(range(250)) * (size // 250)


def array(number: int) -> Array:
    return np.full(SIZE, number, dtype=np.uint8)


@shoal.remote(num_cpus=0)
def make_array(number: int) -> Array:
    return array(number)


@shoal.remote(num_cpus=0)
def last(value: Array) -> int:
    return int(value[-1])


@shoal.remote(num_cpus=0)
def tail(data: bytes) -> tuple[int, bytes]:
    return len(data), data[-3:]


@shoal.remote(num_cpus=0)
def hold(refs: list[shoal.ObjectRef[bytes]]) -> int:
    return len(shoal.get(refs[0]))


def on(index: int) -> dict[str, dict[str, float]]:
    return {"resources": {f"n{index}": 1}}


def segments(of: int | None = None) -> list[Path]:
    """Return the objects in the shared memory of this cluster's nodes: files that are not kept warm have a pin."""
    return [file for folder in stores() for file in folder.glob("o*") if of is None or file.stat().st_size >= of]


def node_process(node: ClusterNode) -> psutil.Process:
    assert node.process is not None
    return psutil.Process(node.process.pid)


def pulled_by(process: psutil.Process) -> int:
    """Return how many bytes of files of shared memory a node's mover has mapped to write into."""
    total = 0
    for mapping in process.memory_maps(grouped=False):
        if mapping.path.startswith("/dev/shm/") and "/shoal-" in mapping.path and "w" in mapping.perms:
            total += mapping.rss
    return total


def host() -> psutil.Process:
    (one,) = [
        one for one in psutil.Process().children() if "shoal.host" in one.cmdline() and "node" not in one.cmdline()
    ]
    return one


def broker() -> psutil.Process:
    (one,) = [one for one in host().children() if "nats-server" in one.name()]
    return one


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Do something beside; the list gets its result, or the exception."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except ShoalError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_several_readers_of_a_node_share_one_copy_and_all_nodes_read_the_right_bytes(three: Cluster) -> None:
    ref = make.options(**on(1)).remote(SIZE)
    expected = (SIZE, bytes([247, 248, 249]))
    assert get(tail.remote(ref)) == expected
    assert get([tail.options(**on(index)).remote(ref) for index in (0, 1, 2) for _ in range(3)]) == 9 * [expected]
    assert len(segments(SIZE)) == 3, "one for each node"
    assert get(ref)[-3:] == expected[1]


def test_nothing_is_left_on_any_node_when_the_references_are_gone(three: Cluster) -> None:
    (one, two) = three.worker_nodes
    refs = [make.options(**on(1)).remote(SIZE) for _ in range(3)]
    get([tail.options(**on(index)).remote(ref) for index in (0, 2) for ref in refs])
    processes = [host(), node_process(one), node_process(two)]
    get([tail.options(**on(index)).remote(refs[0]) for index in (0, 1, 2)])
    threads, descriptors = counts(processes)
    for _ in range(3):
        more = [make.options(**on(1)).remote(SIZE) for _ in range(3)]
        get([tail.options(**on(index)).remote(ref) for index in (0, 2) for ref in more])
        del more
    del refs
    until(lambda: is_empty(three, 0, 1, 2), "the memory of all nodes is free")

    def nothing_is_open() -> bool:
        return all(now <= before for now, before in zip(counts(processes)[1], descriptors, strict=True))

    until(nothing_is_open, "files stay mapped for a moment only")
    # The threads that make and remove files come one by one, up to their number.
    left = [now <= before + FILE_THREADS for now, before in zip(counts(processes)[0], threads, strict=True)]
    assert all(left), (threads, counts(processes))


def counts(processes: list[psutil.Process]) -> tuple[list[int], list[int]]:
    """Return how many threads each process has, and how many descriptors."""
    return [process.num_threads() for process in processes], [process.num_fds() for process in processes]


def used_bytes(cluster: Cluster) -> dict[int, int]:
    """Return how much of the memory of each node holds objects, copies, or what is being pulled."""
    joined = cluster._running()
    target = Target(joined.address, joined.cluster, Credentials.from_file(joined.credentials_path))
    seen = asyncio.run(read_memory(target, 0, timeout_seconds=10))
    return {
        index: one.objects.store.used_bytes
        for one in seen.nodes
        for index in range(3)
        if f"n{index}" in one.description.total
    }


def is_empty(cluster: Cluster, *nodes: int) -> bool:
    used = used_bytes(cluster)
    return all(used[node] == 0 for node in nodes)


@shoal.remote(num_cpus=0, max_retries=0)
def fill(size: int) -> None:
    shoal.put(bytes(size))


def test_copies_go_where_room_is_needed(three: Cluster) -> None:
    refs = [make.options(**on(1)).remote(200 * MB) for _ in range(4)]
    for ref in refs:
        assert get(tail.options(**on(2)).remote(ref))[0] == 200 * MB
    get(fill.options(**on(2)).remote(int(STORE * 0.8)))
    assert get(tail.options(**on(2)).remote(refs[0]))[0] == 200 * MB, "it is pulled again"


def test_what_a_queued_task_will_read_is_pulled_while_it_waits(three: Cluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    class Reader:
        def wait(self) -> bool:
            until(gate.exists, "the gate is open")
            return True

        def tail(self, data: bytes) -> bytes:
            return data[-3:]

    ref = make.options(**on(1)).remote(SIZE)
    shoal.wait([ref])
    reader = shoal.remote(num_cpus=1)(Reader).options(**on(2)).remote()
    first = reader.wait.remote()
    second = reader.tail.remote(ref)
    until(lambda: len(segments(SIZE)) == 2, "the argument is on the way before its task begins")
    gate.touch()
    assert get([first, second]) == [True, bytes([247, 248, 249])]


def test_a_killed_source_gives_an_error_that_says_so(three: Cluster) -> None:
    (one, _) = three.worker_nodes
    ref = shoal.put(bytes(LARGE))
    far = make.options(max_retries=0, **on(1)).remote(LARGE)
    shoal.wait([far])
    thread, results = in_background(lambda: shoal.get(far, timeout=50))
    until(lambda: pulled_by(host()) > 10 * MB or bool(results), "the pull has begun")
    three.remove_node(one, allow_graceful=False)
    thread.join()
    (result,) = results
    assert isinstance(result, ObjectLostError | bytes), "an error that is typed, or it was quicker"
    assert get(tail.options(**on(2)).remote(ref))[0] == LARGE, "the others go on"


def test_a_killed_puller_leaves_nothing_and_holds_up_nobody(three: Cluster) -> None:
    (_, two) = three.worker_nodes
    ref = shoal.put(bytes(LARGE))
    dying = tail.options(max_retries=0, **on(2)).remote(ref)
    until(lambda: pulled_by(node_process(two)) > 10 * MB, "the pull has begun")
    living = tail.options(**on(1)).remote(ref)
    three.remove_node(two, allow_graceful=False)
    assert get(living)[0] == LARGE
    with pytest.raises(ShoalError):
        get(dying)
    del ref
    until(lambda: is_empty(three, 0), "the loan ended with the puller")


def test_a_broker_that_is_killed_during_a_pull_costs_a_pause(three: Cluster) -> None:
    (_, two) = three.worker_nodes
    ref = make.options(**on(1)).remote(LARGE)
    shoal.wait([ref])
    reading = tail.options(**on(2)).remote(ref)
    until(lambda: pulled_by(node_process(two)) > 10 * MB, "the pull has begun")
    os.kill(broker().pid, signal.SIGKILL)
    assert get(reading) == (LARGE, bytes([247, 248, 249]))


def test_an_object_that_is_freed_while_it_is_pulled_leaves_nothing(three: Cluster) -> None:
    (_, two) = three.worker_nodes
    ref = shoal.put(bytes(LARGE))
    reading = hold.options(max_retries=0, **on(2)).remote([ref])
    until(lambda: pulled_by(node_process(two)) > 10 * MB, "the pull has begun")
    shoal.cancel(reading, force=True)
    del ref, reading
    until(lambda: is_empty(three, 0, 2), "the memory of both nodes is free")


class TestNodesBesideEachOther:
    def test_share_the_memory_of_large_objects(self, three_beside: Cluster) -> None:
        ref = make.options(**on(1)).remote(SIZE)
        expected = (SIZE, bytes([247, 248, 249]))
        assert get([tail.options(**on(index)).remote(ref) for index in (0, 1, 2)]) == 3 * [expected]
        assert len({file.stat().st_ino for file in segments(SIZE)}) == 1
        assert len(segments(SIZE)) == 3, "it has a name in the folder of each node"
        used = used_bytes(three_beside)
        assert used[0] == used[1] == used[2] >= SIZE, "and counts there"
        del ref
        until(lambda: is_empty(three_beside, 0, 1, 2), "the memory of all nodes is free")

    def test_what_is_mapped_on_one_is_not_overwritten_by_another(self, three_beside: Cluster) -> None:
        class Keeper:
            def keep(self, value: Array) -> None:
                self.value = value

            def check(self, number: int) -> bool:
                return bool((self.value == number).all())

        # None of them is where the objects are made, so that nobody there knows who maps them.
        keepers = [shoal.remote(num_cpus=0)(Keeper).options(**on(index)).remote() for index in (1, 2)]
        ref = shoal.put(array(0))
        get([keeper.keep.remote(ref) for keeper in keepers])
        for number in range(1, 6):
            ref = shoal.put(array(number))
            assert get(last.options(**on(2)).remote(ref)) == number
            assert get([keeper.check.remote(0) for keeper in keepers]) == [True, True]

    def test_a_killed_home_takes_its_objects_but_not_what_is_mapped(self, three_beside: Cluster) -> None:
        (one, _) = three_beside.worker_nodes
        ref = make_array.options(max_retries=0, **on(1)).remote(1)
        mapped = get(ref)
        three_beside.remove_node(one, allow_graceful=False)
        assert (mapped == 1).all()
        del ref
        assert (mapped == 1).all()
        del mapped
        until(lambda: is_empty(three_beside, 0), "its copy has gone with it")


DRIVER = """
import sys
import shoal
from shoal import driver
driver.machine_id = lambda: "another machine"
shoal.init()
refs = [shoal.put(bytes(400_000_000)), shoal.put(bytes(400_000_000))]
print("put", flush=True)
sys.stdin.read()
"""


class TestADriverOnAnotherMachine:
    def test_puts_passes_and_reads_large_values(self, from_elsewhere: Cluster) -> None:
        value = bytes(range(250)) * (SIZE // 250)
        ref = shoal.put(value)
        assert len(segments(SIZE)) == 1, "a node keeps it"
        assert shoal.get(ref) == value
        assert get([tail.options(**on(index)).remote(ref) for index in (0, 1)]) == 2 * [(SIZE, value[-3:])]
        assert get(tail.options(**on(1)).remote(value)) == (SIZE, value[-3:])
        assert get(make.options(**on(1)).remote(SIZE)) == value

    def test_leaves_nothing_when_its_references_go(self, from_elsewhere: Cluster) -> None:
        for _ in range(3):
            ref = shoal.put(bytes(SIZE))
            assert get(tail.options(**on(1)).remote(ref))[0] == SIZE
            assert len(get(make.options(**on(1)).remote(SIZE))) == SIZE
            assert get(tail.options(**on(1)).remote(bytes(SIZE)))[0] == SIZE
            del ref
        until(lambda: is_empty(from_elsewhere, 0, 1), "the memory of all nodes is free")

    def test_hears_that_an_object_is_lost_with_its_node(self, from_elsewhere: Cluster) -> None:
        (one,) = from_elsewhere.worker_nodes
        far = make.options(max_retries=0, **on(1)).remote(LARGE)
        shoal.wait([far])
        from_elsewhere.remove_node(one, allow_graceful=False)
        with pytest.raises(ObjectLostError):
            get(far)

    def test_survives_a_broker_that_is_killed_while_it_puts(self, from_elsewhere: Cluster) -> None:
        thread, results = in_background(lambda: shoal.put(bytes(LARGE)))
        until(lambda: pulled_by(host()) > 10 * MB or bool(results), "a node has begun to take it")
        os.kill(broker().pid, signal.SIGKILL)
        thread.join()
        (ref,) = results
        assert isinstance(ref, shoal.ObjectRef)
        assert len(shoal.get(ref, timeout=50)) == LARGE

    def test_takes_with_it_what_it_has_put_when_it_is_killed(self, from_elsewhere: Cluster) -> None:
        joined = from_elsewhere._running()
        environment = os.environ | {
            "SHOAL_ADDRESS": joined.address,
            "SHOAL_CLUSTER": joined.cluster,
            "SHOAL_CREDENTIALS": joined.credentials_path,
        }
        with subprocess.Popen(
            [sys.executable, "-c", DRIVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"put\n"
            assert used_bytes(from_elsewhere)[0] > 800_000_000
            process.kill()
        until(lambda: is_empty(from_elsewhere, 0), "its objects have gone with it")

    def test_is_told_where_no_node_has_room(self, from_elsewhere: Cluster) -> None:
        with pytest.raises(shoal.exceptions.ObjectStoreFullError, match="no node of the cluster takes"):
            shoal.put(bytes(STORE + 1))
        ref = shoal.put(bytes(SIZE))
        assert len(get(ref)) == SIZE
