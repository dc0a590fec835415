"""``LoggingConfig``: how the processes of a job write what Python's ``logging`` is told."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from shoal_core.protocol.messages import LogEncoding, LogSettings
from shoal_core.runtime.reports.logs import ATTRIBUTES


@dataclass
class LoggingConfig:
    """For ``init(logging_config=...)``: the root loggers of the driver and of all worker processes of its job.

    ``encoding``: "TEXT", lines for people, or "JSON", one object a line. Both name the job, the node, the process, the
    actor and the task. ``log_level`` is the least level that is written; ``additional_log_standard_attrs`` are further
    attributes of ``logging.LogRecord``, such as "name". Raises ``ValueError`` for what is none of these.
    """

    encoding: str = "TEXT"
    log_level: str = "INFO"
    additional_log_standard_attrs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.encoding not in set(LogEncoding):
            raise ValueError(f"Invalid encoding {self.encoding!r}; there are {[one.value for one in LogEncoding]}.")
        if not isinstance(logging.getLevelName(self.log_level), int):
            raise ValueError(f"Invalid log_level {self.log_level!r}; there are DEBUG, INFO, WARNING, ERROR, CRITICAL.")
        unknown = [name for name in self.additional_log_standard_attrs if name not in ATTRIBUTES]
        if unknown:
            raise ValueError(f"logging.LogRecord has no attribute {unknown[0]!r}; there are {sorted(ATTRIBUTES)}.")


def log_settings_of(given: Any) -> LogSettings | None:
    """Return the parameter ``logging_config`` of ``init`` as it travels, checked."""
    if given is None:
        return None
    if not isinstance(given, LoggingConfig):
        raise TypeError(f"logging_config must be a LoggingConfig, got {type(given).__name__}.")
    return LogSettings(
        encoding=LogEncoding(given.encoding),
        level=given.log_level,
        attributes=list(given.additional_log_standard_attrs),
    )
