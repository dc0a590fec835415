"""Joining the cluster with a process: the I/O thread, its connection and its channels.

``Session`` is a context: entering starts the thread and returns when the process is connected, leaving gives everything
back and ends it. What drivers and workers do beside that (open a job, serve leases) is a ``Part``, an asynchronous
context that the thread enters once the channels are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal_core import __version__
from shoal_core.bus.bulk import BulkAddress
from shoal_core.bus.connection import connect
from shoal_core.bus.credentials import Credentials, TlsFiles, redacted
from shoal_core.bus.interface import Bus
from shoal_core.bus.peers import Peers
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import (
    BusError,
    ClusterUnreachableError,
    JetStreamUnavailableError,
    RequestTimeoutError,
    ShoalError,
    VersionMismatchError,
)
from shoal_core.protocol.ids import NO_NODE, ProcessId, new_process_id
from shoal_core.protocol.messages import PROTOCOL_VERSION, ClusterInfo, GetCluster
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.runtime.deathwatch import watching_deaths
from shoal_core.runtime.loop.turns import SharedLoop
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.tasks.notices import heeding_notices

JOIN_SECONDS = 10.0
LEAVE_SECONDS = 2.0
BROKER_LIMIT_SECONDS = float(os.environ.get("SHOAL_BROKER_LIMIT_SECONDS", "60"))
"""So long a broker may be away before whoever waits for an object is told so; work goes on when it is back."""

logger = logging.getLogger("shoal.runtime")

Part = Callable[[Runtime], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class Address:
    """Where the cluster is and how to get in."""

    address: str
    cluster: str
    credentials: Credentials | None = None
    tls: TlsFiles | None = None

    def bulk(self, local: ProcessId) -> BulkAddress | None:
        """Return where large values go from and to; None over WebSocket, which has no bulk connection."""
        if self.address.startswith(("ws://", "wss://")):
            return None
        return BulkAddress(self.address, local, self.credentials, self.tls)


class Session:
    """The life of this process in a cluster; ``runtime`` is there between entering and leaving.

    ``identify`` says who the process is, on which node; whoever comes from outside makes sure there that this is a
    cluster that it understands (``check_cluster``).
    """

    runtime: Runtime

    def __init__(
        self,
        address: Address,
        identify: Callable[[Bus, Subjects], AbstractAsyncContextManager[tuple[ProcessId, Path | None]]],
        part: Part,
    ) -> None:
        self._address = address
        self._identify = identify
        self._part = part
        self._ready: Future[Runtime] = Future()
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="shoal-io", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.runtime = self._ready.result()
        except BaseException:
            self._thread.join()
            raise
        self.runtime.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runtime.uninstall()
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=SharedLoop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self._ready.done():
                logger.exception("the I/O thread ended with an error")
            else:
                self._ready.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        where = self._address
        subjects = Subjects(where.cluster)
        async with self._joined(subjects) as (bus, local, shared_memory):
            runtime = Runtime(
                bus,
                subjects,
                local,
                shared_memory,
                where.address,
                where.bulk(local),
                where.credentials,
                where.tls,
            )
            async with Peers(bus, subjects, Role.PROCESS, local, runtime.reactor.deliver) as peers:
                runtime.reactor.peers = peers
                with watching_deaths(runtime):
                    async with self._part(runtime):
                        _watch_broker(runtime)
                        with heeding_notices(runtime):
                            self._ready.set_result(runtime)
                            await self._stop.wait()
                        await runtime.reactor.groups.told(LEAVE_SECONDS)
                        await runtime.reporter.finish()
                        if runtime.node != NO_NODE:
                            runtime.recent.leave(runtime.node)
                        runtime.close()
                        with contextlib.suppress(BusError):
                            await peers.flush(LEAVE_SECONDS)

    @contextlib.asynccontextmanager
    async def _joined(self, subjects: Subjects) -> AsyncIterator[tuple[Bus, ProcessId, Path | None]]:
        where = self._address
        async with (
            connect(
                where.address,
                role=Role.PROCESS,
                identity=new_process_id(),
                cluster=where.cluster,
                credentials=where.credentials,
                tls=where.tls,
            ) as bus,
            self._identify(bus, subjects) as (local, shared_memory),
        ):
            yield bus, local, shared_memory


async def check_cluster(bus: Bus, subjects: Subjects, address: str) -> ClusterInfo:
    """Make sure that somebody serves the cluster, and in a version that this process understands.

    Where the broker has no JetStream there is no control store to wait for, unless another broker of its cluster has
    it and somebody answers.
    """
    where = redacted(address)
    request = GetCluster(version=__version__)
    attempts = None if bus.has_jetstream else 1
    try:
        info = await ask(bus, subjects.gcs("cluster"), request, timeout_seconds=JOIN_SECONDS, attempts=attempts)
    except (BusError, RequestTimeoutError) as error:
        if not bus.has_jetstream:
            raise JetStreamUnavailableError(
                f"The broker at {where} runs without JetStream, where the control store of cluster "
                f"{subjects.cluster!r} would keep its records, and nobody serves the cluster there. Start nats-server "
                "with `--jetstream`, and then the services."
            ) from error
        raise ClusterUnreachableError(
            f"The broker at {where} answers, but no control store (gcs) of cluster {subjects.cluster!r} did within "
            f"{JOIN_SECONDS:g} s: {error}. Is one running there (`shoal service gcs`), under this cluster name?"
        ) from error
    assert isinstance(info, ClusterInfo)
    if info.protocol != PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"The cluster at {where} runs Shoal {info.version} (protocol {info.protocol}), this process has Shoal "
            f"{__version__} (protocol {PROTOCOL_VERSION}); install the same version on both sides."
        )
    return info


def _watch_broker(runtime: Runtime, limit_seconds: float = BROKER_LIMIT_SECONDS) -> None:
    """While the broker has been away for too long, have whoever waits be told so instead (until the bus ends)."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def unreachable() -> ShoalError:
        return ClusterUnreachableError(
            f"The broker at {redacted(runtime.address)} has been away for more than {limit_seconds:g} s "
            "(SHOAL_BROKER_LIMIT_SECONDS). Nothing is lost: get() the same reference again, and it waits for the "
            "broker to come back."
        )

    def on_connection(connected: bool) -> None:
        nonlocal timer
        if timer is not None:
            timer.cancel()
            timer = None
        if connected:
            runtime.obstruct(None)
        else:
            timer = loop.call_later(limit_seconds, runtime.obstruct, unreachable)

    runtime.bus.on_connection(on_connection)
