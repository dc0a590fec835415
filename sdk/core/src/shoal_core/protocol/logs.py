"""The control plane's messages about logs: what worker processes have printed, as their node keeps it.

A log is what one process has printed to one of its streams. Its bytes are counted from its beginning, whether they are
kept or not: the oldest go first. See ``messages`` for what all messages share.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from shoal_core.protocol.ids import ActorId, ProcessId
from shoal_core.protocol.messages import Message

MOST_LOGS = 2000
"""So many a node keeps, and tells of."""
MOST_LOG_BYTES = 256 * 1024
"""So many bytes of a log are read at a time."""
MOST_PATTERN_CHARACTERS = 256
MOST_SPANS = 10_000
"""Of so many pieces of a log it is told that an attempt to run a task has printed them; of more, the last."""


def attempt_name(task: str, attempt: int) -> str:
    """Return what an attempt to run the task of an id is called where logs are kept."""
    return f"{task}.{attempt}"


class ListLogs(Message):
    """Ask a node which logs it keeps (verb ``logs``)."""

    pattern: str = Field(default="*", max_length=MOST_PATTERN_CHARACTERS, description="Of names, as in a shell.")
    actor: str = Field(default="", description="Only of processes that this actor was given; empty: of all.")
    attempt: str = Field(default="", description="Only those in which this attempt has printed (see `attempt_name`).")


class LogDescription(Message):
    """One log. Its process may have ended: then nothing is added any more."""

    name: str = Field(description="`worker-<process>-<job>-<pid>.out` or `.err`; the job is all f while there is none.")
    process_id: ProcessId
    actor: ActorId | None = Field(default=None, description="The one that its process was given to.")
    actor_begin: int = Field(default=0, description="The position from which on it is the actor's.")
    size_bytes: int = Field(description="What is kept of it.")
    has_ended: bool
    spans: list[tuple[int, int]] = Field(default=[], description="From where to where the attempt asked for printed.")


class NodeLogs(Message):
    """The logs that a node keeps, oldest first."""

    logs: list[LogDescription]


class ReadLog(Message):
    """Ask a node for a piece of a log (verb ``log``)."""

    name: str
    position: int = Field(ge=0, description="Which byte to begin at; where that is not kept, at the first that is.")
    most_bytes: int = Field(default=MOST_LOG_BYTES, gt=0, le=MOST_LOG_BYTES)


class LogPiece(Message):
    """A piece of a log: nothing where there is no more of it yet, and never will be once it has ended."""

    bulk_field: ClassVar[str] = "data"

    position: int = Field(description="Of its first byte.")
    first: int = Field(description="The position of the first byte of the log that is kept.")
    end: int = Field(description="The position behind its last byte so far.")
    has_ended: bool
    data: bytes
