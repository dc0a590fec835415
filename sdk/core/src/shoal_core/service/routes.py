"""Where a service is asked: which subjects it hears, and which message each of them carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.messages import Message
from shoal_core.protocol.metrics import MESSAGES_RECEIVED, REQUEST_SECONDS, REQUESTS_REFUSED
from shoal_core.service.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Route:
    """A subject (patterns too) whose messages reach the core.

    ``kind`` request: they come as ``Request`` and want an answer; event: as ``Event``, whose source is the token that
    the pattern's first ``*`` stands for. Of all subscribers with one ``queue`` name only one gets each message.
    """

    subject: str
    model: type[Message]
    queue: str = ""
    kind: Literal["request", "event"] = "request"


def wildcard_position(subject: str) -> int | None:
    """Return which token of a pattern is its first ``*``, from 0; None if it has none."""
    tokens = subject.split(".")
    return tokens.index("*") if "*" in tokens else None


class Served:
    """What one route has seen."""

    def __init__(self, metrics: Metrics, route: Route) -> None:
        self.subject = route.subject
        self.queue = route.queue
        self.endpoint = endpoint_name(route.subject)
        self.last_error = ""
        self.requests = metrics.counter(MESSAGES_RECEIVED, endpoint=self.endpoint)
        self.errors = metrics.counter(REQUESTS_REFUSED, endpoint=self.endpoint)
        self.seconds = metrics.histogram(REQUEST_SECONDS, endpoint=self.endpoint)

    def fail(self, error: ShoalError) -> None:
        """Count a message that was refused."""
        self.errors.add()
        self.last_error = f"{type(error).__name__}: {error}"


def endpoint_name(subject: str) -> str:
    """Return a name for a route: its last token that says something."""
    tokens = [token for token in subject.split(".") if token not in ("*", ">")]
    return tokens[-1]
