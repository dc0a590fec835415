"""The NATS service protocol (``$SRV.PING``, ``$SRV.INFO``, ``$SRV.STATS``), so that NATS' own tools find the services.

Each is heard on three subjects: for everyone, for one name, and for one replica.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from shoal_core.bus.interface import Bus, Message, Subscription
from shoal_core.service.routes import Served

TYPE_PREFIX = "io.nats.micro.v1"
NANOSECONDS = 1_000_000_000


class Discovery:
    """Answers for one replica of one service; ``endpoints`` is what it counts on its routes."""

    def __init__(self, bus: Bus, name: str) -> None:
        self.endpoints: list[Served] = []
        self._bus = bus
        self._started = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._identity = {
            "name": f"shoal-{name}",
            "id": bus.identity,
            "version": version("shoal-core"),
            "metadata": {},
        }

    def open(self) -> list[Subscription]:
        """Begin to answer; ending the subscriptions ends it."""
        subscriptions = []
        for verb, body in (("PING", self._nothing), ("INFO", self._info), ("STATS", self._stats)):
            name, replica = self._identity["name"], self._identity["id"]
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{name}", f"$SRV.{verb}.{name}.{replica}"):
                subscriptions.append(self._bus.subscribe(subject, self._answerer(verb, body)))
        return subscriptions

    def _answerer(self, verb: str, body: Callable[[], dict[str, Any]]) -> Callable[[Message], None]:
        """Return the callback that answers one verb."""

        def answer(message: Message) -> None:
            if message.reply:
                text = {"type": f"{TYPE_PREFIX}.{verb.lower()}_response", **self._identity, **body()}
                self._bus.answer(message.reply, json.dumps(text).encode())

        return answer

    def _nothing(self) -> dict[str, Any]:
        return {}

    def _info(self) -> dict[str, Any]:
        return {
            "description": f"Shoal's {self._identity['name']}",
            "endpoints": [
                {"name": served.endpoint, "subject": served.subject, "queue_group": served.queue, "metadata": {}}
                for served in self.endpoints
            ],
        }

    def _stats(self) -> dict[str, Any]:
        return {"started": self._started, "endpoints": [_endpoint_stats(served) for served in self.endpoints]}


def _endpoint_stats(served: Served) -> dict[str, Any]:
    """Return what the protocol wants to know of one route."""
    count = sum(served.seconds.counts)
    return {
        "name": served.endpoint,
        "subject": served.subject,
        "queue_group": served.queue,
        "num_requests": int(served.requests.value),
        "num_errors": int(served.errors.value),
        "last_error": served.last_error,
        "processing_time": int(served.seconds.total * NANOSECONDS),
        "average_processing_time": int(served.seconds.total / count * NANOSECONDS) if count else 0,
    }
