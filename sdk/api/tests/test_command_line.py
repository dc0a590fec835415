"""The command line's own part: flags, what it prints, exit codes. Real clusters are in tests/integration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli import commands, flags
from shoal.cluster import HostInfo, HostOptions
from shoal.status import ClusterStatus, NodeStatus, Target
from shoal_core import __version__
from shoal_core.bus import Credentials
from shoal_core.protocol.errors import ClusterUnreachableError
from shoal_core.protocol.ids import JobId, NodeId, ProcessId
from shoal_core.protocol.messages import NodeAnnouncement, NodeDescription, NodeRecord, NodeState
from shoal_core.protocol.resources import to_resources
from shoal_core.protocol.scheduling import PendingDemand


class Machine:
    """Stands in for this machine's lasting cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: HostInfo | None = None
        self.options: HostOptions | None = None

    def read_current(self) -> HostInfo | None:
        return self.running

    def start_host(self, options: HostOptions, *, lasting: bool, metrics_port: int) -> HostInfo:
        assert lasting
        self.options = options
        self.metrics_port = metrics_port
        path = self.folder / "process.json"
        Credentials(user="process", password="secret").to_file(path)
        self.running = HostInfo("nats://127.0.0.1:4222", "default", str(path), 77, str(self.folder))
        return self.running

    def stop_host(self, info: HostInfo) -> None:
        assert info == self.running
        self.running = None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    for name in ("read_current", "start_host", "stop_host"):
        monkeypatch.setattr(commands, name, getattr(machine, name))
    monkeypatch.setattr(flags, "read_current", machine.read_current)
    for name in [name for name in os.environ if name.startswith("SHOAL_")]:
        monkeypatch.delenv(name)
    return machine


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(commands.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def some_status() -> ClusterStatus:
    total = to_resources({"CPU": 4, "memory": 2**30})
    description = NodeDescription(
        node_id=NodeId("a" * 16),
        hostname="one",
        address="127.0.0.1",
        machine_id="machine",
        pid=1,
        total=total,
        shared_memory_path="",
        object_store_bytes=0,
        version="0",
        python_version="3.11",
        started_at=0.0,
    )
    free = to_resources({"CPU": 3, "memory": 2**30})
    announcement = NodeAnnouncement(node_id=NodeId("a" * 16), sequence=1, total=total, free=free)
    waiting = PendingDemand(
        owner=ProcessId("o" * 24),
        job_id=JobId("00000001"),
        name="train",
        resources=to_resources({"GPU": 1}),
        wanted=7,
        waiting_seconds=12.5,
        why="no node has a GPU [yet]",
        feasible=False,
    )
    record = NodeRecord(description=description, state=NodeState.ALIVE)
    return ClusterStatus("nats://user:secret@host:4222", "default", [NodeStatus(record, announcement)], [waiting])


def test_version() -> None:
    assert run("--version") == (0, f"shoal {__version__}\n")


def test_up_prints_where_the_cluster_is_and_down_ends_it(machine: Machine) -> None:
    flags = ["--resources", '{"licence": 1.5}', "--labels", '{"zone": "a"}', "--metrics-export-port", "9100"]
    flags += ["--object-store-folder", str(machine.folder)]
    code, text = run("up", "--num-cpus", "2", *flags)
    assert code == 0
    assert machine.metrics_port == 9100
    assert "nats://127.0.0.1:4222" in text
    assert str(machine.folder / "process.json") in text
    assert machine.options == HostOptions(
        num_cpus=2, resources={"licence": 1.5}, labels={"zone": "a"}, object_store_folder=str(machine.folder)
    )
    assert run("down")[0] == 0
    assert machine.running is None
    assert "No cluster" in run("down")[1]


def test_up_twice_shows_the_one_that_runs_and_fails_only_if_another_was_described(machine: Machine) -> None:
    run("up")
    code, text = run("up")
    assert (code, "runs already" in text, "cannot be changed" in text) == (0, True, False)
    code, text = run("up", "--num-cpus", "3")
    assert (code, "runs already" in text, "cannot be changed" in text) == (1, True, True)
    assert machine.options == HostOptions()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--resources", "{"], "--resources is not JSON"),
        (["--resources", "[1]"], "--resources must be a JSON object"),
        (["--resources", '{"CPU": 1}'], "num_cpus"),
        (["--resources", '{"licence": "two"}'], "licence"),
        (["--num-cpus", "many"], "num-cpus"),
        (["--num-cpus", "-1"], "num-cpus"),
        (["--metrics-export-port", "65533"], "--metrics-export-port must be between 1 and 65532"),
    ],
)
def test_a_wrong_flag_is_named(machine: Machine, flags: list[str], says: str) -> None:
    code, text = run("up", *flags)
    assert code == 2
    assert says in text
    assert machine.running is None


def test_status_without_a_cluster_says_what_to_do(machine: Machine) -> None:
    code, text = run("status")
    assert code == 3
    assert "shoal up" in text
    assert "--address" in text


def test_status_of_the_local_cluster_for_people_and_for_programs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Target] = []

    async def read_status(target: Target) -> ClusterStatus:
        asked.append(target)
        return some_status()

    monkeypatch.setattr(commands, "read_status", read_status)
    run("up")
    Credentials(user="observer", password="other").to_file(machine.folder / "observer.json")

    code, text = run("status")
    assert code == 0
    assert asked[0].credentials == Credentials(user="observer", password="other")
    for words in ("1 of 1 nodes alive", "1/4", "0.0/1.0 GiB", "train", "no node has a GPU [yet]", "nats://host:4222"):
        assert words in text, text
    assert "secret" not in text

    shown: dict[str, Any] = json.loads(run("status", "--format", "json")[1])
    assert shown["resources"]["CPU"] == {"used": 1.0, "total": 4.0}
    assert shown["pending"][0]["wanted"] == 7
    assert shown["address"] == "nats://host:4222"


def test_errors_are_one_line_with_an_exit_code_of_their_own(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def read_status(target: Target) -> ClusterStatus:
        raise ClusterUnreachableError(f"nobody answers at {target.address}")

    monkeypatch.setattr(commands, "read_status", read_status)
    monkeypatch.setattr(sys, "argv", ["shoal", "status", "--address", "nats://nowhere:1"])
    with pytest.raises(SystemExit) as left:
        commands.main()
    assert left.value.code == 3
    assert capsys.readouterr().err == "ClusterUnreachableError: nobody answers at nats://nowhere:1\n"


def test_a_service_gets_its_flags_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: replaced.append(arguments))
    assert run("service", "gcs", "--address", "nats://host:1", "--help")[0] == 0
    assert replaced == [[sys.executable, "-m", "shoal_gcs", "--address", "nats://host:1", "--help"]]


def test_an_unknown_service_is_refused() -> None:
    code, text = run("service", "gsc")
    assert code == 2
    assert "Did you mean 'gcs'?" in text


@pytest.mark.parametrize("arguments", [["service", "--help"], ["service"]])
def test_the_services_are_listed(arguments: list[str]) -> None:
    code, text = run(*arguments)
    assert (code, "Error" in text) == (2 if arguments == ["service"] else 0, False)
    assert all(name in text for name in ("gcs", "scheduler", "worker", "objectstore"))


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("shoal")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == f"shoal {__version__}\n"


@pytest.mark.parametrize("command", [["status"], ["memory"], ["why", "x"], ["list", "actors"], ["drain", "n1"]])
def test_an_address_of_another_kind_is_a_wrong_flag(machine: Machine, command: list[str]) -> None:
    code, text = run(*command, "--address", "ray://head:10001")
    assert (code, "--address" in text, "nats://" in text) == (2, True, True)


def test_a_program_does_not_import_what_only_the_command_line_needs() -> None:
    code = "import sys, shoal; print([name for name in ('rich', 'typer', 'shoal.cli') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
