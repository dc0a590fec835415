"""A plugin of pytest: suites that start a broker of their own get it in a container, of the version compose names.

``pytest -p tests.integration.containers.container_broker sdk/core/tests/bus/test_bus.py``
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import LogMessageWaitStrategy

from shoal_core.bus.credentials import Credentials
from shoal_core.bus.server_configuration import lasting_configuration
from shoal_core.protocol.subjects import Role
from shoal_core.testing import buses
from tests.integration.containers.stack import ROOT

testcontainers_config.ryuk_disabled = True  # an image of its own, which removes what a test run left that was killed


@dataclass
class ContainerBroker:
    """What the harness of the buses asks of a broker."""

    credentials: dict[Role, Credentials]
    container: DockerContainer

    @property
    def address(self) -> str:
        """Where it is itself: Docker's proxy on this machine would take connections while it is down."""
        return f"nats://{self._seen()['NetworkSettings']['IPAddress']}:4222"

    @property
    def pid(self) -> int:
        """The server that runs now; the engine starts another when it is killed."""
        return int(self._seen()["State"]["Pid"])

    def _seen(self) -> Any:
        inner = self.container.get_wrapped_container()
        inner.reload()
        return inner.attrs


def image() -> str:
    """Return the broker's image, as compose names it."""
    found = re.search(r"image: (nats:\S+)", (ROOT / "deploy/compose.yaml").read_text())
    assert found is not None
    return found[1]


@asynccontextmanager
async def launch_broker(cluster: str, *, jetstream: bool = True) -> AsyncIterator[ContainerBroker]:
    """Stand in for the function of this name that starts an embedded broker."""
    credentials = {role: Credentials(user=role, password=os.urandom(16).hex()) for role in Role}
    text = lasting_configuration(cluster, credentials)
    with tempfile.TemporaryDirectory() as folder:
        configuration = Path(folder) / "broker.conf"
        configuration.write_text(text if jetstream else text.partition("jetstream {")[0])
        container = (
            DockerContainer(image())
            .with_command(["nats-server", "--config", "/broker.conf", "--store_dir", "/data"])
            .with_volume_mapping(str(configuration), "/broker.conf", "ro")
            .with_kwargs(restart_policy={"Name": "always"})
            .waiting_for(LogMessageWaitStrategy("Server is ready"))
        )
        with container:
            yield ContainerBroker(credentials, container)


vars(buses)["launch_broker"] = launch_broker
