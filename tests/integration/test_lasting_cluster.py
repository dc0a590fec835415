"""`shoal up`, `status`, `down`, and services that are started alone: real processes, a real broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHOAL = str(Path(sys.executable).with_name("shoal"))

DRIVER = """
import shoal

@shoal.remote
def double(x: int) -> int:
    return 2 * x

shoal.init("auto")
print(sum(shoal.get([double.remote(i) for i in range(100)])))
"""

HUNGRY_DRIVER = """
import sys, shoal

@shoal.remote(resources={"unicorn": 1})
def wish() -> None:
    pass

shoal.init("auto")
reference = wish.remote()
print("asked", flush=True)
sys.stdin.read()
"""


class Machine:
    """Runs commands as a user whose lasting cluster is kept apart from any other."""

    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        self.environment = kept | {"XDG_RUNTIME_DIR": str(folder), "TMPDIR": str(folder), "COLUMNS": "200"}

    def run(self, *command: str, code: int = 0) -> str:
        """Run a command to its end, hold its exit code, and return what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=50)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def status(self) -> Any:
        """Return the status as programs see it."""
        return json.loads(self.run(SHOAL, "status", "--format", "json"))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    machine.run(SHOAL, "up", "--num-cpus", "2", "--resources", '{"licence": 1.5}')
    yield machine
    machine.run(SHOAL, "down")


def test_a_driver_finds_the_cluster_by_itself(machine: Machine) -> None:
    assert machine.run(sys.executable, "-c", DRIVER).strip().endswith("9900")
    seen = machine.status()
    assert [node["state"] for node in seen["nodes"]] == ["ALIVE"]
    assert seen["resources"]["CPU"]["total"] == 2
    assert seen["resources"]["licence"]["total"] == 1.5


def test_status_says_what_waits_and_why(machine: Machine) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", HUNGRY_DRIVER],
        env=machine.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with driver:
        assert driver.stdout is not None
        while "asked" not in driver.stdout.readline():
            assert driver.poll() is None
        while not (pending := machine.status()["pending"]):
            assert driver.poll() is None
        driver.communicate()
    assert pending[0]["resources"]["unicorn"] == 1
    assert not pending[0]["feasible"]
    assert "unicorn" in pending[0]["why"]


HOLDING_DRIVER = """
import sys, shoal
shoal.init("auto")
references = [shoal.put(b"x" * 3_000_000), shoal.put(1)]
print("put", flush=True)
sys.stdin.read()
"""


def test_memory_says_who_holds_what(machine: Machine) -> None:
    empty = json.loads(machine.run(SHOAL, "memory", "--format", "json"))
    assert empty["objects"] == []
    driver = subprocess.Popen(
        [sys.executable, "-c", HOLDING_DRIVER],
        env=machine.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        try:
            assert driver.stdout.readline().strip() == "put"
            seen = json.loads(machine.run(SHOAL, "memory", "--format", "json"))
            table = machine.run(SHOAL, "memory", "--limit", "1")
        finally:
            driver.stdin.close()
    assert [(row["type"], row["pid"], row["reference_type"]) for row in seen["objects"]] == [
        ("DRIVER", driver.pid, "LOCAL_REFERENCE")
    ] * 2
    assert seen["objects"][0]["object_size"] > 3_000_000
    assert seen["nodes"][0]["store"]["used_bytes"] > 3_000_000
    assert "the largest 1 of 2 objects" in table
    assert f"…{seen['objects'][0]['object_id'][-12:]}" in table


def test_down_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.run(SHOAL, "up", "--num-cpus", "1")
    machine.run(sys.executable, "-c", DRIVER)
    machine.run(SHOAL, "down")
    assert "No cluster" in machine.run(SHOAL, "down")
    machine.run(SHOAL, "status", code=3)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_service_says_at_once_what_is_wrong_with_its_flags() -> None:
    for name in ("gcs", "scheduler", "worker", "objectstore"):
        done = subprocess.run(
            [SHOAL, "service", name, "--replicas", "many"], capture_output=True, text=True, timeout=50
        )
        assert done.returncode == 2, done.stderr
        assert "--replicas" in done.stderr
