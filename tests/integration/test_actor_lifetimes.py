"""What actors outlive and what they do not: drivers, nodes, services; and what is left of them: nothing."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import exceptions
from shoal.cluster_utils import Cluster
from shoal.session import runtime
from shoal.util import state
from tests.integration.waiting import get, is_gone, until

SHOAL = str(Path(sys.executable).with_name("shoal"))


class CounterClass:
    """Counts, and knows where it runs."""

    def __init__(self, start: int = 0) -> None:
        self.value = start

    def increment(self) -> int:
        self.value += 1
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        return shoal.get_runtime_context().get_node_id()


Counter: Any = shoal.remote(CounterClass)


# ------------------------------------------------------------------------------------ drivers of a lasting cluster

CLASS = """
import json, os, sys
import shoal

class Counter:
    def __init__(self, start):
        self.value = start
    def increment(self):
        self.value += 1
        return self.value
    def pid(self):
        return os.getpid()

Counter = shoal.remote(Counter)

def say(**said):
    print(json.dumps(said), flush=True)
"""

COLORS = f"""{CLASS}
shoal.init("auto", namespace="colors")
orange = Counter.options(name="orange", lifetime="detached").remote(10)
mine = Counter.options(name="mine").remote(0)
say(value=shoal.get(orange.increment.remote()), pid=shoal.get(orange.pid.remote()), mine=shoal.get(mine.pid.remote()))
"""

FRUIT = f"""{CLASS}
shoal.init("auto", namespace="fruit")
try:
    shoal.get_actor("orange")
except ValueError as error:
    missing = str(error)
orange = Counter.options(name="orange", lifetime="detached").remote(100)
color = shoal.get_actor("orange", namespace="colors")
say(
    missing=missing,
    values=shoal.get([orange.increment.remote(), color.increment.remote()]),
    pids=shoal.get([orange.pid.remote(), color.pid.remote()]),
    names=shoal.util.list_named_actors(all_namespaces=True),
)
"""

KILLER = f"""{CLASS}
shoal.init("auto", namespace="colors")
shoal.kill(shoal.get_actor("orange"))
shoal.kill(shoal.get_actor("orange", namespace="fruit"))
orange = Counter.options(name="orange").remote(5)
say(value=shoal.get(orange.increment.remote()))
"""

HELD = f"""{CLASS}
shoal.init("auto")
mine = Counter.remote(0)
say(pid=shoal.get(mine.pid.remote()))
sys.stdin.read()
"""


class Machine:
    """Runs drivers on a lasting cluster that is kept apart from any other."""

    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        self.environment = kept | {"XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder)}

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def drive(self, script: str) -> Any:
        """Run a driver to its end and return what it said."""
        return json.loads(self.run(sys.executable, "-c", script).splitlines()[-1])


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    one = Machine(tmp_path)
    one.run(SHOAL, "up", "--num-cpus", "2")
    yield one
    one.run(SHOAL, "down")


def test_a_detached_actor_outlives_its_driver_in_its_namespace_until_it_is_killed(machine: Machine) -> None:
    colors = machine.drive(COLORS)
    assert colors["value"] == 11
    until(lambda: is_gone(colors["mine"]), "what is not detached ended with its driver")
    assert not is_gone(colors["pid"])

    fruit = machine.drive(FRUIT)
    assert "'orange'" in fruit["missing"]
    assert fruit["values"] == [101, 12]
    assert fruit["pids"][1] == colors["pid"]
    assert {"name": "orange", "namespace": "colors"} in fruit["names"]
    assert {"name": "orange", "namespace": "fruit"} in fruit["names"]
    assert not any(is_gone(pid) for pid in fruit["pids"])

    assert machine.drive(KILLER) == {"value": 6}
    until(lambda: all(map(is_gone, fruit["pids"])), "both processes are gone")


def test_an_actor_ends_with_its_driver_however_that_ends(machine: Machine) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        with subprocess.Popen(
            [sys.executable, "-c", HELD],
            env=machine.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as driver:
            assert driver.stdout is not None
            pid = json.loads(driver.stdout.readline())["pid"]
            assert not is_gone(pid)
            driver.send_signal(number)
            driver.wait(timeout=30)
        until(lambda pid=pid: is_gone(pid), "its process is gone")  # type: ignore[misc]


# ------------------------------------------------------------------------------------ nodes


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        one.add_node(num_cpus=1, resources={"far": 1})
        one.connect()
        yield one
    finally:
        one.shutdown()


def test_an_actor_is_started_again_on_another_node_when_its_node_dies(cluster: Cluster) -> None:
    (far,) = cluster.worker_nodes
    options = {"num_cpus": 0, "resources": {"far": 0.5}}
    counter = Counter.options(max_restarts=1, max_task_retries=-1, **options).remote(3)
    alone = Counter.options(**options).remote(3)
    assert get([counter.node.remote(), alone.node.remote()]) == [far.node_id] * 2
    second = cluster.add_node(num_cpus=1, resources={"far": 1})
    cluster.remove_node(far, allow_graceful=False)
    until(lambda: get(counter.node.remote()) == second.node_id, "it is on the other node")
    assert get(counter.increment.remote()) == 4
    with pytest.raises(exceptions.ActorDiedError):
        get(alone.increment.remote())


# ------------------------------------------------------------------------------------ leaks


def kept() -> dict[str, int]:
    """Return what this process keeps of actors and objects."""
    gc.collect()
    actors, objects = runtime().reactor.actors, runtime().objects
    return {
        "handles": len(actors.handles),
        "subscriptions": len(actors._heard),
        "owned": len(objects.owned),
        "borrowed": len(objects.borrowed),
    }


def test_fifty_actors_that_went_leave_nothing() -> None:
    with shoal.init(num_cpus=2):
        small = Counter.options(num_cpus=0)
        get([small.remote().increment.remote() for _ in range(2)])
        until(lambda: not any(kept().values()), "the first ones are gone")
        counters = [small.remote(i) for i in range(50)]
        pids = get([counter.pid.remote() for counter in counters])
        assert len(set(pids)) == 50
        assert kept()["handles"] == kept()["subscriptions"] == 50
        del counters
        until(lambda: all(map(is_gone, pids)), "all their processes are gone")
        until(lambda: not any(kept().values()), "all that was kept is let go")


def test_what_an_actor_submitted_goes_on_without_it_and_holds_up_nobody(tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"

    @shoal.remote(num_cpus=0.1)
    def last_for_long() -> None:
        until(go.exists, "it may end")
        done.touch()

    class Starter:
        def start(self) -> int:
            last_for_long.remote()
            return os.getpid()

    with shoal.init(num_cpus=2):
        starter: Any = shoal.remote(num_cpus=0)(Starter).remote()
        pid = get(starter.start.remote())
        until(lambda: shoal.available_resources()["CPU"] == 1.9, "the task runs")
        actor_id = starter._actor_id.hex()
        del starter
        dead = [("state", "=", "DEAD")]
        until(lambda: [actor_id] == [a.actor_id for a in state.list_actors(filters=dead)], "it ended")
        counters = [Counter.options(num_cpus=0).remote() for _ in range(8)]
        assert get([counter.increment.remote() for counter in counters]) == [1] * 8
        assert shoal.available_resources()["CPU"] == 1.9, "the task is still there"
        assert not is_gone(pid), "its owner waits for it"
        go.touch()
        until(done.exists, "the task has ended")
        until(lambda: is_gone(pid), "and its owner with it")
