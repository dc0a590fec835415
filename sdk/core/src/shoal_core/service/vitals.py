"""What every service shows of itself: what it is, whether its event loop turns, how far away the broker is."""

from __future__ import annotations

import asyncio
import contextlib
import platform
from importlib.metadata import version

from shoal_core.bus.interface import Bus
from shoal_core.protocol.errors import BusError, RequestTimeoutError
from shoal_core.protocol.measures import labels
from shoal_core.protocol.metrics import (
    BROKER_CONNECTED,
    BROKER_RECONNECTS,
    BROKER_ROUND_TRIP,
    BUILD_INFO,
    EVENT_LOOP_LAG,
)
from shoal_core.service.metrics import Metrics

LOOK_SECONDS = 1.0
LOOKS_PER_ROUND_TRIP = 5


class Vitals:
    """The signs of life of one service on one connection."""

    def __init__(self, bus: Bus, service: str, metrics: Metrics) -> None:
        build = labels(service=service, version=version("shoal-core"), python_version=platform.python_version())
        metrics.read(BUILD_INFO, lambda: {build: 1.0})
        metrics.read(BROKER_CONNECTED, lambda: float(bus.connected))
        self._lag = metrics.histogram(EVENT_LOOP_LAG)
        self._reconnects = metrics.counter(BROKER_RECONNECTS)
        self._round_trip = metrics.histogram(BROKER_ROUND_TRIP)
        self._bus = bus

    def connection_changed(self, connected: bool) -> None:
        """Count a connection that is there again."""
        if connected:
            self._reconnects.add()

    async def keep_looking(self) -> None:
        """Look at the event loop and the broker now and then, for ever."""
        loop = asyncio.get_running_loop()
        looks = 0
        while True:
            due = loop.time() + LOOK_SECONDS
            await asyncio.sleep(LOOK_SECONDS)
            self._lag.observe(max(0.0, loop.time() - due))
            if looks % LOOKS_PER_ROUND_TRIP == 0 and self._bus.connected:
                began = loop.time()
                with contextlib.suppress(BusError, RequestTimeoutError):  # that it is away is told by the connection
                    await self._bus.flush()
                    self._round_trip.observe(loop.time() - began)
            looks += 1
