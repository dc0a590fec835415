"""The three brokers of deploy/k8s, with its configuration, found by the names they have there."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.security import SecurityFolder
from shoal_core.bus import connect
from shoal_core.bus.broker import free_port
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.bus.keyvalue import Entry, KeyValue
from shoal_core.protocol.errors import BusError
from shoal_core.protocol.subjects import Role, Subjects
from tests.integration.containers.container_broker import image
from tests.integration.containers.stack import ROOT, docker
from tests.integration.waiting import until

pytestmark = pytest.mark.timeout(300)
NETWORK = "shoal-test-brokers"


@pytest.fixture
def security(tmp_path: Path) -> SecurityFolder:
    return SecurityFolder.create(tmp_path / "security", "default")


@pytest.fixture
def ports(security: SecurityFolder) -> Iterator[list[int]]:
    """Run the brokers; yield where each is reached on this machine."""
    ports = [free_port() for _ in range(3)]
    docker("network", "create", NETWORK)
    try:
        for number, port in enumerate(ports):
            name = f"nats-{number}"
            mounts = [
                f"{ROOT}/deploy/k8s/base/nats.conf:/etc/nats/nats.conf:ro",
                f"{security.path}:/etc/nats/security:ro",
            ]
            docker(
                *("run", "--detach", "--name", f"{NETWORK}-{number}", "--env", f"POD_NAME={name}"),
                *("--network", NETWORK, "--network-alias", f"{name}.nats-peers", "--publish", f"127.0.0.1:{port}:4222"),
                *(part for mount in mounts for part in ("--volume", mount)),
                *("--tmpfs", "/data", "--tmpfs", "/var/run/nats", "--read-only", "--cap-drop", "ALL"),
                *(image(), "nats-server", "--config", "/etc/nats/nats.conf", "--store_dir", "/data"),
            )
        yield ports
    finally:
        docker("rm", "--force", *(f"{NETWORK}-{number}" for number in range(3)))
        docker("network", "rm", NETWORK)


async def test_three_brokers_keep_what_one_of_them_takes_along(security: SecurityFolder, ports: list[int]) -> None:
    until(lambda: "JetStream cluster new metadata leader" in logs(), "the brokers have found each other")
    bus = connect(
        ",".join(f"tls://127.0.0.1:{port}" for port in ports),
        role=Role.GCS,
        identity="test",
        cluster="default",
        credentials=Credentials.from_file(security.credentials(Role.GCS)),
        tls=TlsFiles(ca_file=str(security.path / "ca.pem")),
    )
    async with bus as joined:
        bucket = await joined.key_value(Subjects("default").control_bucket(), replicas=3)
        await bucket.put("key", b"before", revision=0)
        docker("kill", f"{NETWORK}-0")
        assert (entry := await read(bucket, "key")) is not None
        assert entry.value == b"before"


async def read(bucket: KeyValue, key: str) -> Entry | None:
    """Ask until the two that are left have found a leader; the time limit of the test is the only one."""
    while True:
        try:
            return await bucket.get(key)
        except BusError:
            await asyncio.sleep(0.1)


def logs() -> str:
    """Return what the brokers have said, which they do on stderr."""
    commands = [["docker", "logs", f"{NETWORK}-{number}"] for number in range(3)]
    return "".join(subprocess.run(command, capture_output=True, text=True).stderr for command in commands)
