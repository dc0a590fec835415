"""The files of what worker processes print: a log for each stream of each, which outlives the process.

A log lies in *parts*: ``name`` is the newest, ``name.1`` the one before it, and so on. A part that is full is renamed,
and the oldest goes when there are too many. Of the last ``MOST_BEGUN`` attempts to run tasks that have printed it is
known where they began to. All logs together are bounded, too: first those of processes that have
ended go, oldest first, then the oldest parts of the largest.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import ActorId, JobId, ProcessId
from shoal_core.protocol.logs import MOST_LOGS, MOST_SPANS, ListLogs, LogDescription, LogPiece, NodeLogs, ReadLog

logger = logging.getLogger("shoal.worker")

NO_JOB = JobId("f" * 8)
MOST_BEGUN = 100_000
Begun = tuple[int, str]
"""From which position on which attempt to run a task has printed (see ``attempt_name``); "" for none."""
SUFFIXES = {"stdout": "out", "stderr": "err"}


class Limits(NamedTuple):
    """How large a part of a log may be, how many older parts are kept beside the newest, and what all may take."""

    part_bytes: int
    older_parts: int
    total_bytes: int


class Stream(NamedTuple):
    """One stream of one worker process, "stdout" or "stderr"."""

    process: ProcessId
    pid: int
    name: str


@dataclass
class Log:
    """What is kept of one stream: the sizes of its parts, oldest first.

    ``first`` is the position of the first byte of them, ``actor_begin`` that from which on it is the actor's, and
    ``begun`` says who printed what, up to the next of them.
    """

    name: str
    process: ProcessId
    actor: ActorId | None = None
    actor_begin: int = 0
    has_ended: bool = False
    first: int = 0
    parts: deque[int] = field(default_factory=lambda: deque([0]))
    begun: deque[Begun] = field(default_factory=deque)

    @property
    def size_bytes(self) -> int:
        """How much is kept."""
        return sum(self.parts)

    @property
    def end(self) -> int:
        """The position behind the last byte."""
        return self.first + self.size_bytes

    def spans(self, attempt: str) -> list[tuple[int, int]]:
        """Return from where to where an attempt to run a task has printed, as far as that is known."""
        ends = [*(begin for begin, _ in self.begun), self.end][1:]
        spans = [(begin, end) for (begin, other), end in zip(self.begun, ends, strict=True) if other == attempt]
        return spans[-MOST_SPANS:]

    def file(self, index: int) -> str:
        """Return the name of the file of a part."""
        return part_name(self.name, len(self.parts) - 1 - index)

    def locate(self, position: int) -> tuple[int, int]:
        """Return the part that has the byte at a position, and where in it; the end of the newest where none has."""
        rest = max(0, position - self.first)
        for index, size_bytes in enumerate(self.parts):
            if rest < size_bytes:
                return index, rest
            rest -= size_bytes
        return len(self.parts) - 1, self.parts[-1]


def part_name(name: str, age: int) -> str:
    """Return the name of the file of the newest part (``age`` 0), or an older one."""
    return f"{name}.{age}" if age else name


def cut(text: bytes, room_bytes: int, *, is_empty: bool) -> int:
    """Return how many bytes of lines go into a part with so much room: whole lines, unless an empty one has not room.

    0: nothing, it is full.
    """
    if len(text) <= room_bytes:
        return len(text)
    whole = text.rfind(b"\n", 0, max(0, room_bytes)) + 1
    return whole or (room_bytes if is_empty else 0)


class LogFiles:
    """All logs of a node, in a folder. Nothing here waits for anybody but the disk; for one thread at a time."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._logs: dict[str, Log] = {}
        self._open: dict[ProcessId, dict[str, Log]] = {}
        self._begun: deque[Log] = deque()
        self._total_bytes = 0
        self._fails = False

    # ------------------------------------------------------------------------------- what processes do

    def route(self, process: ProcessId, pid: int, job: JobId, actor: ActorId | None) -> None:
        """A process belongs to a job, and to an actor if it was given to one: its logs are called so."""
        for stream in SUFFIXES:
            log = self._log(Stream(process, pid, stream), job)
            if log.actor != actor:
                log.actor, log.actor_begin = actor, log.end
            if (name := _name(process, job, pid, stream)) != log.name:
                self._rename(log, name)

    def append(self, stream: Stream, text: bytes, begun: Sequence[Begun] = ()) -> None:
        """Add whole lines to a log; ``begun`` is where in them which attempt to run a task begins to print."""
        log = self._log(stream, NO_JOB)
        self._begin(log, [(log.end + position, attempt) for position, attempt in begun])
        while text:
            size_bytes = cut(text, self._limits.part_bytes - log.parts[-1], is_empty=not log.parts[-1])
            if not size_bytes:
                self._begin_part(log)
            elif not self._write(log, text[:size_bytes]):
                return
            text = text[size_bytes:]
        self._shrink()

    def _begin(self, log: Log, begun: list[Begun]) -> None:
        log.begun += begun
        self._begun += [log] * len(begun)
        while len(self._begun) > MOST_BEGUN:
            self._begun.popleft().begun.popleft()

    def end(self, process: ProcessId) -> None:
        """Nothing is added any more to what a process has printed."""
        for log in self._open.pop(process, {}).values():
            log.has_ended = True
        self._shrink()

    def _log(self, stream: Stream, job: JobId) -> Log:
        mine = self._open.setdefault(stream.process, {})
        if stream.name not in mine:
            name = _name(stream.process, job, stream.pid, stream.name)
            mine[stream.name] = self._logs[name] = Log(name, stream.process)
        return mine[stream.name]

    # ------------------------------------------------------------------------------- what is asked

    def answer(self, request: ListLogs | ReadLog) -> NodeLogs | LogPiece:
        """Return what is asked for; raises ``NotFoundError`` for a log that is not kept."""
        return self._list(request) if isinstance(request, ListLogs) else self._read(request)

    def _list(self, request: ListLogs) -> NodeLogs:
        logs = [
            LogDescription(
                name=log.name,
                process_id=log.process,
                actor=log.actor,
                actor_begin=log.actor_begin,
                size_bytes=log.size_bytes,
                has_ended=log.has_ended,
                spans=log.spans(request.attempt) if request.attempt else [],
            )
            for log in self._logs.values()
            if fnmatch.fnmatchcase(log.name, request.pattern)
            and request.actor in ("", log.actor)
            and (not request.attempt or any(attempt == request.attempt for _, attempt in log.begun))
        ]
        return NodeLogs(logs=logs[-MOST_LOGS:])

    def _read(self, request: ReadLog) -> LogPiece:
        log = self._logs.get(request.name)
        if log is None:
            raise NotFoundError(f"this node keeps no log called {request.name!r}; it may have made room for newer ones")
        index, offset = log.locate(request.position)
        data = b""
        if offset < log.parts[index]:
            try:
                with open(self._folder / log.file(index), "rb") as file:
                    file.seek(offset)
                    data = file.read(min(request.most_bytes, log.parts[index] - offset))
            except OSError as error:
                raise NotFoundError(f"the log {log.name} cannot be read any more: {error}") from None
        position = log.first + sum(list(log.parts)[:index]) + offset
        return LogPiece(position=position, first=log.first, end=log.end, has_ended=log.has_ended, data=data)

    # ------------------------------------------------------------------------------- files

    def _write(self, log: Log, text: bytes) -> bool:
        """Write to the newest part; tell whether that went well, and say in the node's own log where it begins not to.

        What a process prints must not stop the node.
        """
        path = self._folder / log.name
        try:
            with open(path, "ab") as file:
                file.write(text)
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, log.parts[-1])
            if not self._fails:
                logger.error("what worker processes print cannot be kept: %s", error)
            self._fails = True
            return False
        self._fails = False
        log.parts[-1] += len(text)
        self._total_bytes += len(text)
        return True

    def _begin_part(self, log: Log) -> None:
        """Begin another part, and let go of the oldest where there are too many."""
        if len(log.parts) > self._limits.older_parts:
            self._drop_part(log)
        if log.parts[-1]:  # else the oldest was the newest, too
            for age in range(len(log.parts), 0, -1):
                self._move(part_name(log.name, age - 1), part_name(log.name, age))
            log.parts.append(0)

    def _rename(self, log: Log, name: str) -> None:
        for age in range(len(log.parts)):
            self._move(part_name(log.name, age), part_name(name, age))
        del self._logs[log.name]
        log.name = name
        self._logs[name] = log

    def _move(self, old: str, new: str) -> None:
        with suppress(FileNotFoundError):  # nothing was written to it, or somebody has removed it
            os.replace(self._folder / old, self._folder / new)

    def _drop_part(self, log: Log) -> None:
        """Let go of the oldest part, even if it is the only one."""
        (self._folder / log.file(0)).unlink(missing_ok=True)
        size_bytes = log.parts.popleft()
        log.first += size_bytes
        self._total_bytes -= size_bytes
        if not log.parts:
            log.parts.append(0)

    def _shrink(self) -> None:
        """Let go of what is too much: logs of processes that have ended, else the oldest part of the largest."""
        ended = [log for log in self._logs.values() if log.has_ended] if self._is_too_much() else []
        for log in ended:
            if not self._is_too_much():
                return
            while log.size_bytes:
                self._drop_part(log)
            del self._logs[log.name]
        while self._total_bytes > self._limits.total_bytes:
            self._drop_part(max(self._logs.values(), key=lambda log: log.size_bytes))

    def _is_too_much(self) -> bool:
        return self._total_bytes > self._limits.total_bytes or len(self._logs) > MOST_LOGS


def _name(process: ProcessId, job: JobId, pid: int, stream: str) -> str:
    return f"worker-{process}-{job}-{pid}.{SUFFIXES[stream]}"
