"""The four services, each in a process of its own on a broker of their own, and what their deaths cost: no task."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from shoal import ObjectRef
from shoal.exceptions import LocalNodeDiedError
from shoal_core.bus.broker import EmbeddedBroker, free_port, launch_broker
from shoal_core.protocol.ids import NO_NODE, new_node_id
from shoal_core.protocol.subjects import Role
from tests.integration.waiting import until

COUNT = 10_000
ROLES = {"gcs": Role.GCS, "scheduler": Role.SCHEDULER, "objectstore": Role.OBJECTSTORE, "worker": Role.NODE}

FULL = {"gcs": 2, "scheduler": 2, "objectstore": 1, "worker": 1}


@dataclass
class Service:
    """One replica of one service, as its own process."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and the body at a path of its HTTP port; status 0 where nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def metric(self, beginning: str) -> float:
        """Return the sum over the series whose names begin so."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(beginning))

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.get("/readyz")[0] == 200

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """End it in good order; return its exit code."""
        self.process.terminate()
        return self.process.wait(timeout=30)


class Stack:
    """A broker, and services on it."""

    def __init__(self, broker: EmbeddedBroker, folder: Path) -> None:
        self.address = broker.address
        self.folder = folder
        self.services: list[Service] = []
        for role, credentials in broker.credentials.items():
            credentials.to_file(self.credentials(role))

    def credentials(self, role: Role) -> Path:
        return self.folder / f"{role}.json"

    def alive(self, name: str) -> list[Service]:
        """Return the replicas of a service that live."""
        return [one for one in self.services if one.name == name and one.process.poll() is None]

    def start(self, name: str, *flags: str) -> Service:
        """Start one more replica; it is ready later."""
        port = free_port()
        command = [sys.executable, "-m", f"shoal_{name}", "--address", self.address, "--http-port", str(port)]
        command += ["--credentials", str(self.credentials(ROLES[name])), *flags]
        if name == "worker":
            command += ["--process-credentials", str(self.credentials(Role.PROCESS)), "--num-cpus", "2"]
        log = self.folder / f"{name}-{port}.log"
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        service = Service(name, process, port, log)
        self.services.append(service)
        return service

    def make_whole(self) -> None:
        """Start what is missing, and return when everything is ready."""
        for name, count in FULL.items():
            for _ in range(count - len(self.alive(name))):
                self.start(name)
        for name in FULL:
            for service in self.alive(name):
                until(service.is_ready, f"{name} is ready")

    def end(self) -> None:
        """End what still lives, workers first, which take leave of the others."""
        for name in ("worker", "objectstore", "scheduler", "gcs"):
            for service in self.alive(name):
                service.end()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with asyncio.Runner() as runner:
        launching = launch_broker("default", store_dir=tmp_path_factory.mktemp("store"))
        one = Stack(runner.run(launching.__aenter__()), tmp_path_factory.mktemp("services"))
        try:
            yield one
        finally:
            one.end()
            runner.run(launching.__aexit__(None, None, None))


@pytest.fixture
def stack(broker: Stack) -> Stack:
    broker.make_whole()
    return broker


@pytest.fixture
def joined(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    monkeypatch.setenv("SHOAL_ADDRESS", stack.address)
    monkeypatch.setenv("SHOAL_CREDENTIALS", str(stack.credentials(Role.PROCESS)))
    with shoal.init():
        yield stack


@shoal.remote
def double(x: int) -> int:
    time.sleep(0.0002)
    return 2 * x


@shoal.remote
def place(x: int) -> tuple[int, str]:
    time.sleep(0.0005)
    return x, shoal.get_runtime_context().get_node_id()


@contextlib.contextmanager
def under_load() -> Iterator[list[ObjectRef[tuple[int, str]]]]:
    """Run the block while tasks run; then all of them must have been done."""
    refs = [place.remote(i) for i in range(COUNT)]
    shoal.wait(refs, num_returns=COUNT // 20)
    assert len(ready(refs)) < COUNT
    yield refs
    assert [number for number, _ in shoal.get(refs, timeout=50)] == list(range(COUNT))


def ready(refs: list[ObjectRef[tuple[int, str]]]) -> list[tuple[int, str]]:
    """Return the results that are there."""
    return shoal.get(shoal.wait(refs, num_returns=len(refs), timeout=0)[0])


def test_services_tell_of_their_health_and_of_what_they_do(joined: Stack) -> None:
    assert shoal.get(double.remote(21)) == 42
    for name in FULL:
        for service in joined.alive(name):
            assert service.get("/healthz") == (200, "the event loop turns\n")
            assert service.get("/readyz") == (200, "ready\n")
            assert service.get("/elsewhere")[0] == 404
            status, text = service.get("/metrics")
            assert status == 200
            assert "# TYPE shoal_" in text
    for gcs in joined.alive("gcs"):
        until(lambda gcs=gcs: gcs.metric('shoal_nodes{state="ALIVE"}') == 1, "the control store counts the node")  # type: ignore[misc]
    (worker,) = joined.alive("worker")
    assert worker.metric("shoal_worker_processes{") >= 1


def test_every_replica_of_the_control_store_and_of_the_scheduler_answers(joined: Stack) -> None:
    asked = {"gcs": "list_nodes", "scheduler": "resources"}
    for _ in range(60):
        assert [node["Alive"] for node in shoal.nodes()].count(True) == 1
        assert shoal.available_resources()["CPU"] <= 2
    for name, verb in asked.items():
        counts = [one.metric(f'shoal_messages_received_total{{endpoint="{verb}"}}') for one in joined.alive(name)]
        assert len(counts) == 2
        assert all(count > 0 for count in counts), (name, counts)


def test_a_killed_control_store_costs_no_task(joined: Stack) -> None:
    with under_load():
        joined.alive("gcs")[0].kill()
        assert [node["Alive"] for node in shoal.nodes()].count(True) == 1


def test_all_control_stores_may_be_killed_and_started_again(joined: Stack) -> None:
    @shoal.remote
    def later(x: int) -> int:
        return x + 1

    with under_load():
        for gcs in joined.alive("gcs"):
            gcs.kill()
        joined.start("gcs")
        refs = [later.remote(i) for i in range(100)]
        joined.make_whole()
        assert shoal.get(refs, timeout=30) == list(range(1, 101))
    assert [node["Alive"] for node in shoal.nodes()].count(True) == 1


def test_the_only_scheduler_may_be_killed_and_started_again(joined: Stack) -> None:
    first, second = joined.alive("scheduler")
    assert first.end() == 0
    with under_load():
        second.kill()
        refs = [double.options(num_cpus=0.5).remote(i) for i in range(100)]
        joined.make_whole()
        assert shoal.get(refs, timeout=30) == [2 * i for i in range(100)]


@pytest.fixture
def other_node(joined: Stack) -> Iterator[tuple[Service, str]]:
    """A second node: the driver uses the shared memory of the first, and lives and dies with that."""
    node_id = new_node_id()
    other = joined.start("worker", "--identity", node_id, "--resources", '{"other": 1}')
    until(other.is_ready, "the second node is ready")
    until(lambda: shoal.available_resources().get("CPU") == 4, "the schedulers know the second node")
    yield other, node_id
    if other.process.poll() is None:
        other.end()


@pytest.mark.parametrize("in_good_order", [True, False])
def test_a_node_that_ends_costs_no_task(other_node: tuple[Service, str], in_good_order: bool) -> None:
    service, node_id = other_node
    with under_load() as refs:
        until(lambda: node_id in {node for _, node in ready(refs)}, "tasks run on the second node")
        assert len(ready(refs)) < COUNT
        if in_good_order:
            assert service.end() == 0
        else:
            service.kill()
    until(lambda: shoal.cluster_resources()["CPU"] == 2, "the end of the node is known")


def drain(stack: Stack, role: Role, *flags: str) -> tuple[int, str]:
    """Run `shoal drain` with the credential of a role; return its exit code and what it said."""
    command = [sys.executable, "-m", "shoal.cli", "drain", *flags, "--credentials", str(stack.credentials(role))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    return done.returncode, done.stdout + done.stderr


def test_a_node_that_drains_ends_what_it_has_and_takes_nothing_new(
    joined: Stack, other_node: tuple[Service, str], tmp_path: Path
) -> None:
    @shoal.remote(resources={"other": 1})
    def wait_for(path: str) -> str:
        while not Path(path).exists():
            time.sleep(0.01)
        return shoal.get_runtime_context().get_node_id()

    _, node_id = other_node
    assert "credential of role node" in drain(joined, Role.PROCESS, node_id)[1]
    assert drain(joined, Role.NODE, "0123456789abcdef")[0] == 1
    with under_load() as refs:
        until(lambda: node_id in {node for _, node in ready(refs)}, "tasks run on the second node")
        held = wait_for.remote(str(tmp_path / "go"))
        until(lambda: shoal.available_resources().get("other", 0) == 0, "the task that waits has begun")
        code, said = drain(joined, Role.NODE, node_id, "--deadline", "0.5")
        assert (code, "still has" in said) == (1, True)
        (tmp_path / "go").touch()
        assert drain(joined, Role.NODE, node_id) == (0, "Drained.\n")
        assert shoal.get(held, timeout=30) == node_id
        after = shoal.get([place.options(num_cpus=0.5).remote(i) for i in range(100)], timeout=30)
        assert node_id not in {node for _, node in after}


@pytest.mark.parametrize("in_good_order", [True, False])
def test_a_driver_whose_own_node_ends_is_told_so_and_can_begin_anew(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, in_good_order: bool
) -> None:
    @shoal.remote
    def forever() -> None:
        threading.Event().wait()

    async def await_it() -> None:
        await refs[1]

    monkeypatch.setenv("SHOAL_ADDRESS", stack.address)
    monkeypatch.setenv("SHOAL_CREDENTIALS", str(stack.credentials(Role.PROCESS)))
    (worker,) = stack.alive("worker")
    with shoal.init(), ThreadPoolExecutor() as threads:
        assert shoal.get(double.remote(21)) == 42
        refs = [forever.remote() for _ in range(3)]
        waiting: list[Future[Any]] = [
            threads.submit(shoal.get, refs[0]),
            threads.submit(asyncio.run, await_it()),
            threads.submit(refs[2].future().result),
        ]
        if in_good_order:
            worker.end()
        else:
            worker.kill()
        waiting.append(threads.submit(shoal.put, bytes(10_000_000)))
        for one in waiting:
            with pytest.raises(LocalNodeDiedError, match=r"shutdown\(\) and init\(\)"):
                one.result(timeout=50)
        with pytest.raises(LocalNodeDiedError):
            shoal.put(bytes(10_000_000))
        with pytest.raises(LocalNodeDiedError):
            double.remote(21)
        with pytest.raises(LocalNodeDiedError):
            shoal.nodes()
    stack.make_whole()
    with shoal.init():
        assert shoal.get(double.remote(21)) == 42


def test_a_driver_that_cannot_open_its_nodes_shared_memory_works_without(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    @shoal.remote
    def repeat(data: bytes, times: int) -> bytes:
        return data * times

    (worker,) = stack.alive("worker")
    counted = 'shoal_tasks_finished_total{function="double",outcome="ok"}'
    before = worker.metric(counted)
    (probe,) = Path("/dev/shm").glob(f"shoal-{worker.process.pid}-*/probe")
    monkeypatch.setenv("SHOAL_ADDRESS", stack.address)
    monkeypatch.setenv("SHOAL_CREDENTIALS", str(stack.credentials(Role.PROCESS)))
    probe.unlink()
    try:
        with shoal.init():
            assert shoal.get_runtime_context().get_node_id() == NO_NODE
            assert shoal.get([double.remote(i) for i in range(100)]) == [2 * i for i in range(100)]
            assert shoal.get(repeat.remote(b"r", 3_000_000)) == b"r" * 3_000_000
            assert shoal.get(repeat.remote(b"a" * 3_000_000, 1)) == b"a" * 3_000_000
            put = shoal.put(b"p" * 3_000_000)
            assert shoal.get(put) == shoal.get(repeat.remote(put, 1)) == b"p" * 3_000_000
            assert len(shoal.get(repeat.remote(repeat.remote(b"c", 2_000_000), 2))) == 4_000_000
            until(lambda: worker.metric(counted) == before + 100, "a node is told what the driver counts")
    finally:
        probe.touch()


def test_services_that_are_told_to_end_leave_nothing(stack: Stack) -> None:
    def folders() -> list[Path]:
        return [folder for one in workers for folder in Path("/dev/shm").glob(f"shoal-{one.process.pid}-*")]

    services = [one for name in FULL for one in stack.alive(name)]
    workers = stack.alive("worker")
    below = [child for one in services for child in psutil.Process(one.process.pid).children(recursive=True)]
    assert len(below) >= 1
    assert len(folders()) == len(workers)
    for service in services[::-1]:
        assert service.end() == 0, service.log.read_text()
        assert service.get("/healthz")[0] == 0
    assert folders() == []
    until(
        lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in below),
        "all processes below the services are gone",
    )
