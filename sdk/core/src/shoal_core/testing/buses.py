"""One harness over all implementations of the bus, so that one suite of tests can hold them to one behaviour."""

from __future__ import annotations

import asyncio
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal

from shoal_core.bus.broker import EmbeddedBroker, launch_broker
from shoal_core.bus.connection import connect
from shoal_core.bus.interface import Bus, ErrorListener
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.subjects import Role

Implementation = Literal["fast", "stock", "memory"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("fast", "stock", "memory")
CLUSTER = "test"


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; the time limit of the test is the only one."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


class BusHarness(ABC):
    """A broker to join, and to restart."""

    @abstractmethod
    async def join(self, role: Role, identity: str, on_error: ErrorListener | None = None) -> Bus:
        """Return a connection that lives as long as the harness."""

    @abstractmethod
    async def restart(self) -> None:
        """Kill the broker and have it come back; returns when every connection noticed both."""


class NatsHarness(BusHarness):
    """A real broker."""

    def __init__(self, stack: AsyncExitStack, broker: EmbeddedBroker, implementation: Literal["fast", "stock"]) -> None:
        self._stack = stack
        self._broker = broker
        self._implementation = implementation
        self._buses: list[Bus] = []

    async def join(self, role: Role, identity: str, on_error: ErrorListener | None = None) -> Bus:
        """Connect to the broker with the credential of the role."""
        connection = connect(
            self._broker.address,
            role=role,
            identity=identity,
            cluster=CLUSTER,
            credentials=self._broker.credentials[role],
            implementation=self._implementation,
            on_error=on_error,
        )
        bus = await self._stack.enter_async_context(connection)
        self._buses.append(bus)
        return bus

    async def restart(self) -> None:
        """Kill the server with SIGKILL; its supervisor starts it again."""
        changes = [_Changes(bus) for bus in self._buses]
        os.kill(self._broker.pid, signal.SIGKILL)
        await until(lambda: all(change.seen[:2] == [False, True] for change in changes))


class _Changes:
    """What a connection told of itself."""

    def __init__(self, bus: Bus) -> None:
        self.seen: list[bool] = []
        bus.on_connection(self.seen.append)


class MemoryHarness(BusHarness):
    """The in-memory twin."""

    def __init__(self, stack: AsyncExitStack, broker: MemoryBroker) -> None:
        self._stack = stack
        self._broker = broker

    async def join(self, role: Role, identity: str, on_error: ErrorListener | None = None) -> Bus:
        """Join the twin."""
        bus = self._broker.connect(role=role, identity=identity, cluster=CLUSTER, on_error=on_error)
        return await self._stack.enter_async_context(bus)

    async def restart(self) -> None:
        """Cut and join all connections."""
        self._broker.restart()


@asynccontextmanager
async def bus_harness(implementation: Implementation, *, jetstream: bool = True) -> AsyncIterator[BusHarness]:
    """Run a broker for tests of one implementation."""
    async with AsyncExitStack() as stack:
        if implementation == "memory":
            yield MemoryHarness(stack, MemoryBroker(jetstream=jetstream))
        else:
            broker = await stack.enter_async_context(launch_broker(CLUSTER, jetstream=jetstream))
            yield NatsHarness(stack, broker, implementation)
