"""The host process of a cluster of one machine: a private broker, and the four services in one event loop.

``python -m shoal.host '{…}'`` prints one line of JSON when all services are ready, and serves until it is told to end:
by SIGTERM or SIGINT, or, for an embedded cluster, by the end of its standard input, which its driver holds. The
services are the same blocks that run alone elsewhere, and talk through the broker like any others.

``python -m shoal.host node …`` runs one node service alone, with its own flags, that ends like an embedded cluster: by
the end of its standard input too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.cluster import SERVICES
from shoal_core.bus.broker import EmbeddedBroker, launch_broker
from shoal_core.bus.connection import connect
from shoal_core.bus.interface import Bus
from shoal_core.protocol.subjects import Role
from shoal_core.service.collector import collect_rarely
from shoal_core.service.health import Served, serve_health
from shoal_core.service.logs import set_up_logs
from shoal_core.service.main import Service, run
from shoal_core.telemetry import exporting
from shoal_gcs.service import SERVICE as GCS
from shoal_objectstore.service import SERVICE as OBJECTSTORE
from shoal_scheduler.service import SERVICE as SCHEDULER
from shoal_worker.service import SERVICE as WORKER

logger = logging.getLogger("shoal.host")

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Orders:
    """What a host is told at its start."""

    session_dir: str
    cluster: str
    lasting: bool
    options: dict[str, Any]
    metrics_port: int = 0


def credentials_file(session_dir: str, role: Role) -> Path:
    """Return where a host writes the credentials of a role."""
    return Path(session_dir) / f"{role}.json"


@asynccontextmanager
async def running(service: Service[Any], broker: EmbeddedBroker, orders: Orders, **own: Any) -> AsyncIterator[None]:
    """Run one service on a connection of its own; its metrics have a port of their own, if any are to be shown."""
    settings = service.settings(
        address=broker.address,
        cluster=orders.cluster,
        credentials=str(credentials_file(orders.session_dir, service.role)),
        **own,
    )
    async with (
        connect(
            broker.address,
            role=service.role,
            identity=service.draw_identity(),
            cluster=orders.cluster,
            credentials=broker.credentials[service.role],
        ) as bus,
        service.serve(bus, settings) as served,
        contextlib.AsyncExitStack() as stack,
    ):
        if orders.metrics_port:
            port = orders.metrics_port + SERVICES.index(service.name)
            await stack.enter_async_context(serve_health(LOOPBACK, port, lambda: served))
        yield


async def serve(orders: Orders) -> None:
    """Run the cluster until it is told to end."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if not orders.lasting:
        loop.add_reader(sys.stdin.fileno(), ended.set)  # the driver never writes: readable means that it is gone
    store = str(Path(orders.session_dir) / "store")
    async with contextlib.AsyncExitStack() as stack:
        broker = await stack.enter_async_context(launch_broker(orders.cluster, store_dir=store))
        for role, credentials in broker.credentials.items():
            credentials.to_file(credentials_file(orders.session_dir, role))
        await stack.enter_async_context(running(GCS, broker, orders))
        await stack.enter_async_context(running(SCHEDULER, broker, orders))
        await stack.enter_async_context(running(OBJECTSTORE, broker, orders))
        options = {name: value for name, value in orders.options.items() if value not in (None, {})}
        processes = str(credentials_file(orders.session_dir, Role.PROCESS))
        await stack.enter_async_context(
            running(WORKER, broker, orders, is_head=True, process_credentials=processes, **options)
        )
        ready = {
            "address": broker.address,
            "cluster": orders.cluster,
            "credentials_path": str(credentials_file(orders.session_dir, Role.PROCESS)),
        }
        collect_rarely()
        print(json.dumps(ready), flush=True)
        await ended.wait()


def serve_node(flags: Sequence[str]) -> int:
    """Run a node service until a signal comes or standard input ends; return its exit code."""

    def end_with_input() -> None:
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        os.kill(os.getpid(), signal.SIGTERM)

    @asynccontextmanager
    async def owned(bus: Bus, settings: Any) -> AsyncIterator[Served]:
        # Nobody writes: readable means that whoever holds the other end is gone.
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), end_with_input)
        async with WORKER.serve(bus, settings) as served:
            yield served

    return run(replace(WORKER, serve=owned), flags)


def main() -> None:
    """Run a node, or carry out the orders given as the one argument."""
    if sys.argv[1] == "node":
        sys.exit(serve_node(sys.argv[2:]))
    orders = Orders(**json.loads(sys.argv[1]))
    WORKER.prepare()
    set_up_logs("host", str(os.getpid()), "info", "text")
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with exporting("host", str(os.getpid()), orders.cluster), asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(orders))


if __name__ == "__main__":
    main()
