"""What a job's processes write of what Python's ``logging`` is told: lines for people, or JSON, with ids.

It is the driver that says so (``LoggingConfig``); without that nobody's logging is touched.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from shoal_core.protocol.ids import task_id_bytes
from shoal_core.protocol.messages import LogEncoding, LogSettings
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.worker.work import current

TEXT_FORMAT = "%(asctime)s\t%(levelname)s %(filename)s:%(lineno)s -- %(message)s"
ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; what else it has came with ``extra``."""
JSON_ATTRIBUTES = ("asctime", "levelname", "message", "filename", "lineno", "process")


class _Handler(logging.StreamHandler[Any]):
    """The handler that ``set_up_logging`` adds, so that it is found again."""


class _Formatter(logging.Formatter):
    """Adds who has written a record."""

    def __init__(self, settings: LogSettings) -> None:
        super().__init__(TEXT_FORMAT)
        self._as_json = settings.encoding is LogEncoding.JSON
        self._attributes = settings.attributes

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = super().format(record)  # completes the record as well
        extra = {name: getattr(record, name, None) for name in self._attributes}
        extra |= {name: value for name, value in vars(record).items() if name not in ATTRIBUTES}
        if not self._as_json:
            return " ".join([line, *(f"{name}={value}" for name, value in {**_whereabouts(), **extra}.items())])
        fields = {name: getattr(record, name) for name in JSON_ATTRIBUTES} | _whereabouts() | extra
        if record.exc_text:
            fields["exc_text"] = record.exc_text
        fields["timestamp_ns"] = int(record.created * 1_000_000_000)
        return json.dumps(fields, default=str)


def set_up_logging(settings: LogSettings) -> None:
    """Have this process's root logger write as ``settings`` say, to standard error, and in no other way."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(_Formatter(settings))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.level)


def _whereabouts() -> dict[str, str]:
    """Return the ids of this process, and of what runs in this context."""
    runtime, running = Runtime.current, current.get()
    if runtime is None:
        return {}
    ids: dict[str, str] = {"job_id": runtime.job, "worker_id": runtime.local, "node_id": runtime.node}
    if runtime.hosting is not None:
        about = runtime.hosting.record.description
        ids |= {"actor_id": about.actor_id, "actor_name": about.name}
    if running is not None:
        ids |= {"task_id": task_id_bytes(running.owner, running.task.number).hex(), "task_name": running.task.name}
    return ids
