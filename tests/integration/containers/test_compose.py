"""The cluster of deploy/compose.yaml under load: every kind of container hurt in every way, and no task lost."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import shoal
from shoal import ObjectRef
from shoal.exceptions import ActorPlacementGroupRemoved
from shoal.util import get_placement_group, placement_group, placement_group_table, remove_placement_group
from shoal.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from shoal_core.protocol.ids import NO_NODE
from shoal_core.protocol.subjects import Role
from tests.integration.containers.stack import ROOT, SERVICES, Stack, docker
from tests.integration.waiting import get, until

pytestmark = pytest.mark.timeout(300)

OUTSTANDING = 500
SHOAL = str(Path(sys.executable).with_name("shoal"))


@shoal.remote
def place(x: int) -> tuple[int, str]:
    time.sleep(0.002)
    return x, shoal.get_runtime_context().get_node_id()


class Load:
    """Tasks without end, a bounded number of them under way; which nodes have run some, and whether all were done."""

    def __init__(self) -> None:
        self.done = 0
        self.nodes: set[str] = set()
        self.ending = threading.Event()

    def run(self) -> None:
        """Submit, and hold each result, until it is told to end; then what is under way is waited for."""
        refs: deque[ObjectRef[tuple[int, str]]] = deque()
        submitted = 0
        while refs or not self.ending.is_set():
            while len(refs) < OUTSTANDING and not self.ending.is_set():
                refs.append(place.remote(submitted))
                submitted += 1
            number, node = get(refs.popleft())
            assert number == self.done
            self.done += 1
            self.nodes.add(node)

    def go_on(self, count: int = OUTSTANDING) -> None:
        """Return when so many more tasks were done."""
        goal = self.done + count
        until(lambda: self.done >= goal, f"{count} tasks more are done")

    def reach(self, count: int) -> None:
        """Return when so many nodes have run tasks from now on."""
        self.nodes = set()
        until(lambda: len(self.nodes) >= count, f"tasks run on {count} nodes")


@contextmanager
def under_load() -> Iterator[Load]:
    """Run the block while tasks run; then every one of them must have been done, in order."""
    load = Load()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(load.run)
        try:
            load.go_on()
            yield load
        finally:
            load.ending.set()
        running.result()


def alive() -> int:
    return [node["Alive"] for node in shoal.nodes()].count(True)


def test_the_quickstart_runs_from_the_host(joined: Stack) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "examples/quickstart.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shoal.get_runtime_context().get_node_id() == NO_NODE
    command = [SHOAL, "status", "--format", "json", "--credentials", str(joined.security / f"{Role.OBSERVER}.json")]
    seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [node["state"] for node in seen["nodes"]].count("ALIVE") == 2


def test_the_containers_run_without_rights(joined: Stack) -> None:
    for service in SERVICES[1:]:
        for container in joined.containers(service):
            seen = joined.inspect(container)
            assert seen["Config"]["User"] == "10001:10001"
            assert seen["HostConfig"]["ReadonlyRootfs"]
            assert seen["HostConfig"]["CapDrop"] == ["ALL"]
            assert not seen["HostConfig"]["PortBindings"]


def test_large_values_go_both_ways(joined: Stack) -> None:
    @shoal.remote
    def repeat(data: bytes, times: int) -> bytes:
        return data * times

    assert get(repeat.remote(b"ab", 2_000_000)) == b"ab" * 2_000_000
    assert len(get(repeat.remote(shoal.put(b"c" * 3_000_000), 2))) == 6_000_000


def test_workers_come_and_go_under_load(joined: Stack) -> None:
    with under_load() as load:
        try:
            joined.up(workers=4)
            load.reach(4)
        finally:
            joined.up(workers=2)
        until(lambda: alive() == 2, "two nodes are left")
        load.go_on()


def test_a_worker_drains_from_inside_its_container(joined: Stack) -> None:
    with under_load() as load:
        container = joined.containers("worker")[0]
        assert docker("exec", container, "shoal", "drain", "--deadline", "30") == "Drained.\n"
        docker("restart", container)
        load.reach(2)


@pytest.mark.parametrize("fault", ["killed", "paused", "cut off"])
@pytest.mark.parametrize("service", SERVICES)
def test_a_hurt_container_costs_no_task(joined: Stack, service: str, fault: str) -> None:
    with under_load() as load:
        with joined.hurt(fault, joined.containers(service)[0]):
            if service != "nats":
                load.go_on()
                numbers = [number for number, _ in get([place.options(num_cpus=0.5).remote(i) for i in range(20)])]
                assert numbers == list(range(20))
        load.go_on(2 * OUTSTANDING)
    until(lambda: alive() == 2, "both nodes are there")


def test_what_is_to_last_is_there_after_the_whole_cluster_was_started_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keeper:
        """Here, so that it travels with the job: the containers know nothing of this module."""

        def write(self, value: bytes) -> list[ObjectRef[bytes]]:
            self.kept = [shoal.put(value, durable=True, keep_seconds=600.0)]
            return self.kept

        def place(self) -> str:
            return shoal.get_runtime_context().get_node_id()

    monkeypatch.setenv("SHOAL_ADDRESS", f"nats://127.0.0.1:{stack.port}")
    monkeypatch.setenv("SHOAL_CREDENTIALS", str(stack.security / f"{Role.PROCESS}.json"))
    options = {"name": "keeper", "lifetime": "detached", "max_restarts": -1, "max_task_retries": -1}
    with shoal.init(namespace="lasting"):
        keeper = shoal.remote(num_cpus=0)(Keeper).options(**options).remote()
        (ref,) = get(keeper.write.remote(b"k" * 1_000_000))
        written = pickle.dumps(ref)
        group = placement_group([{"CPU": 0.5}] * 2, strategy="STRICT_SPREAD", name="gang", lifetime="detached")
        assert group.wait(30)
        inside = options | {"name": "member", "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 1)}
        member = shoal.remote(num_cpus=0.5)(Keeper).options(**inside).remote()
        before = placement_group_table(group)
        assert get(member.place.remote()) == before["bundles_to_node_id"][1]
    stack.compose("down", "--timeout", "10")
    stack.up()
    with shoal.init(namespace="lasting"):
        assert get(shoal.get_actor("keeper").place.remote())
        assert get(pickle.loads(written)) == b"k" * 1_000_000
        again = get_placement_group("gang")
        assert again == group
        gone = set(before["bundles_to_node_id"].values())

        def is_placed_anew() -> bool:
            """Tell so. A node that had no time to say that it leaves is declared dead later than the other."""
            now = placement_group_table(again)
            return now["state"] == "CREATED" and not gone & set(now["bundles_to_node_id"].values())

        until(is_placed_anew, "both bundles are on new nodes")
        node = get(shoal.get_actor("member").place.remote())
        assert placement_group_table(again)["bundles_to_node_id"][1] == node, "it is in its bundle again"
        assert get(
            place.options(num_cpus=0.5, scheduling_strategy=PlacementGroupSchedulingStrategy(again, 0)).remote(1)
        )
        remaining = shoal.get_actor("member")

        def is_gone() -> bool:
            try:
                get(remaining.place.remote())
            except ActorPlacementGroupRemoved:
                return True
            return False

        remove_placement_group(again)
        until(is_gone, "the group has taken its actor along")
