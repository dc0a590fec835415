"""Log lines that machines can read: one JSON object a line, on standard error."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from shoal_core.bus.tracing import current_trace
from shoal_core.protocol.traces import headers_of

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"
_ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time, level, service, replica, message, and what ``extra`` adds."""

    def __init__(self, service: str, identity: str) -> None:
        super().__init__()
        self._service = service
        self._identity = identity

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "id": self._identity,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= headers_of(current_trace())
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        fields.update({name: value for name, value in vars(record).items() if name not in _ORDINARY})
        return json.dumps(fields, default=str)


def set_up_logs(service: str, identity: str, level: str, format: Literal["json", "text"]) -> None:
    """Send this process's log lines to standard error; called once, by a service's ``main``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service, identity) if format == "json" else logging.Formatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
