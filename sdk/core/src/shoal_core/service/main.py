"""How a service runs alone: ``python -m shoal_gcs --address nats://…``, in a container, or by ``shoal service gcs``.

==========  ====================================================================================
exit code   meaning
==========  ====================================================================================
0           ended in good order, by SIGTERM or SIGINT
1           failed while it ran; whoever runs it should start it again
2           the settings are wrong
3           the broker could not be reached, refused the credential, or has no JetStream
==========  ====================================================================================
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

from shoal_core.bus.connection import connect
from shoal_core.bus.credentials import redacted
from shoal_core.bus.interface import Bus
from shoal_core.protocol.errors import ConnectionFailedError
from shoal_core.protocol.ids import new_service_id
from shoal_core.protocol.subjects import Role
from shoal_core.service.collector import collect_rarely
from shoal_core.service.health import Served, serve_health
from shoal_core.service.logs import set_up_logs
from shoal_core.service.settings import ServiceSettings, SettingsError, read_settings
from shoal_core.telemetry import exporting

logger = logging.getLogger("shoal.service")

S = TypeVar("S", bound=ServiceSettings)

FAILED, WRONG_SETTINGS, UNREACHABLE = 1, 2, 3


def _nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Service(Generic[S]):
    """A service as it can be run alone: ``serve(bus, settings)`` is ready when it was entered."""

    name: str
    role: Role
    settings: type[S]
    serve: Callable[[Bus, S], AbstractAsyncContextManager[Served]]
    draw_identity: Callable[[], str] = new_service_id
    prepare: Callable[[], None] = _nothing
    """Called first of all by a process that will run the service, while it has one thread and no event loop."""


def run(service: Service[S], arguments: Sequence[str] | None = None) -> int:
    """Run a service until it is told to end; return its exit code. For the main thread."""
    program = f"shoal-{service.name}"
    try:
        settings = read_settings(service.settings, program, sys.argv[1:] if arguments is None else arguments)
        settings.proof()
    except SettingsError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return WRONG_SETTINGS
    service.prepare()
    identity = settings.identity or service.draw_identity()
    set_up_logs(service.name, identity, settings.log_level, settings.log_format)
    with exporting(service.name, identity, settings.cluster), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            runner.run(_serve(service, settings, identity))
        except ConnectionFailedError as error:
            logger.error("cannot join %s: %s", redacted(settings.address), error)
            return UNREACHABLE
        except Exception:
            logger.exception("%s failed", service.name)
            return FAILED
    return 0


async def _serve(service: Service[S], settings: S, identity: str) -> None:
    """Serve until a signal comes; then leave everything in reverse order."""
    told_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_end.set)
    served: Served | None = None
    async with AsyncExitStack() as stack:
        if settings.http_port:
            await stack.enter_async_context(serve_health(settings.http_host, settings.http_port, lambda: served))
        bus = await stack.enter_async_context(
            connect(
                settings.address,
                role=service.role,
                identity=identity,
                cluster=settings.cluster,
                credentials=settings.proof(),
                tls=settings.tls(),
                timeout_seconds=settings.connect_seconds,
            )
        )
        served = await stack.enter_async_context(service.serve(bus, settings))
        collect_rarely()
        logger.info("serving cluster %s at %s", settings.cluster, redacted(settings.address))
        await told_to_end.wait()
        logger.info("told to end: draining")
    logger.info("ended")


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return uvloop's loops where there is uvloop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
