"""The logs of worker processes, which lie on their nodes: which there are, whose they are, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from shoal import inventory
from shoal.asking import ask_nodes
from shoal.tasks import TaskState, list_tasks
from shoal_core.bus import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.actors import ActorRecord, GetActor
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import ActorId, NodeId
from shoal_core.protocol.logs import MOST_LOG_BYTES, ListLogs, LogDescription, LogPiece, NodeLogs, ReadLog, attempt_name
from shoal_core.protocol.subjects import Subjects

SUFFIXES = ("out", "err")
END = 2**62
"""A position behind the end of every log."""
FOLLOW_SECONDS = 0.3
"""How often whoever follows a log looks for more."""


@dataclass(frozen=True)
class Place:
    """Where a log is: its node, its name there, and from which position on it is wanted."""

    node: NodeId
    name: str
    begin: int = 0


class Reader(Protocol):
    """Whoever reads a log from one end to the other."""

    async def start(self, lines: int) -> None:
        """Begin with the last lines; less than 0: with the first that is kept."""

    async def read(self) -> bytes | None:
        """Return what follows; empty where nothing has come yet, None where nothing ever will."""


class LogReader:
    """Reads the log of a worker process. Raises ``NotFoundError`` where its node does not keep it (any more)."""

    def __init__(self, bus: Bus, subjects: Subjects, place: Place, timeout_seconds: float) -> None:
        self._bus = bus
        self._subject = subjects.node(place.node, "log")
        self._name = place.name
        self._timeout_seconds = timeout_seconds
        self._begin = self._position = place.begin

    async def start(self, lines: int) -> None:
        """Begin with the last lines; less than 0: with the first that is kept, and wanted."""
        if lines < 0:
            return
        last = await self._piece(END)
        first, begin, text = max(self._begin, last.first), last.end, b""
        while begin > first and text.count(b"\n") <= lines:
            until, begin = begin, max(first, begin - MOST_LOG_BYTES)
            text = await self.between(begin, until) + text
        self._position = last.end - len(last_lines(text, lines))

    async def read(self) -> bytes | None:
        """Return what follows, with a word in the place of what went before it was read."""
        piece = await self._piece(self._position)
        missing = piece.position - self._position if piece.data else 0
        self._position = piece.position + len(piece.data)
        if not piece.data:
            return None if piece.has_ended else b""
        return b"[%d bytes are not kept]\n" % missing + piece.data if missing > 0 else piece.data

    async def between(self, begin: int, end: int) -> bytes:
        """Return the bytes between two positions, as far as they are kept."""
        text = b""
        while begin < end:
            piece = await self._piece(begin, end - begin)
            if not piece.data:
                break
            text += piece.data[: max(0, end - piece.position)]
            begin = piece.position + len(piece.data)
        return text

    async def _piece(self, position: int, most_bytes: int = MOST_LOG_BYTES) -> LogPiece:
        request = ReadLog(name=self._name, position=position, most_bytes=most_bytes)
        piece = await ask(self._bus, self._subject, request, self._timeout_seconds)
        assert isinstance(piece, LogPiece)
        return piece


class TaskLogReader:
    """Reads what an attempt to run a task has printed, wherever that was, without what others printed in between.

    Raises ``NotFoundError`` where no node knows of it (any more).
    """

    def __init__(
        self, bus: Bus, subjects: Subjects, task_id: str, attempt: int, suffix: str, timeout_seconds: float
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._task_id = task_id
        self._attempt = attempt
        self._suffix = suffix
        self._timeout_seconds = timeout_seconds
        self._log: LogReader | None = None
        self._spans: list[tuple[int, int]] = []
        self._position = 0
        self._first = b""

    async def start(self, lines: int) -> None:
        """Begin with the last lines; less than 0: with the first that is kept."""
        silent = await self._look()
        if self._log is None and await self._row() is None:
            raise NotFoundError(
                f"It is not known (any more) who has run attempt {self._attempt} of task {self._task_id}, and no node "
                f"keeps what it has printed.{silent}"
            )
        if lines < 0 or self._log is None:
            return
        for begin, end in reversed(self._spans):
            while begin < end and self._first.count(b"\n") <= lines:
                first = max(begin, end - MOST_LOG_BYTES)
                self._first = await self._log.between(first, end) + self._first
                end = first
        self._first = last_lines(self._first, lines)
        self._position = self._spans[-1][1]

    async def read(self) -> bytes | None:
        """Return what follows, with a word in the place of what went before it was read."""
        if data := self._first or await self._next():
            self._first = b""
            return data
        row = await self._row()
        await self._look()
        if data := await self._next():
            return data
        return None if row is None or row.end_time_ms is not None else b""

    async def _next(self) -> bytes:
        for begin, end in self._spans:
            if self._log is not None and end > self._position:
                begin = max(begin, self._position)
                self._position = min(end, begin + MOST_LOG_BYTES)
                data = await self._log.between(begin, self._position)
                missing = self._position - begin - len(data)
                return b"[%d bytes are not kept]\n" % missing + data if missing else data
        return b""

    async def _look(self) -> str:
        """Find out where it has printed; return who did not answer, in words."""

        def request(_patience_seconds: float) -> ListLogs:
            name = attempt_name(self._task_id, self._attempt)
            return ListLogs(pattern=f"*.{self._suffix}", attempt=name)

        asked = await ask_nodes(self._bus, self._subjects, "logs", request, NodeLogs, self._timeout_seconds)
        for node, answer in asked.answers:
            for log in answer.logs:
                self._spans = log.spans
                place = Place(node.node_id, log.name)
                self._log = self._log or LogReader(self._bus, self._subjects, place, self._timeout_seconds)
        return f" These did not answer: {', '.join(asked.silent)}." if asked.silent else ""

    async def _row(self) -> TaskState | None:
        rows, _ = await list_tasks(self._bus, self._subjects, self._timeout_seconds)
        mine = [row for row in rows if (row.task_id, row.attempt_number) == (self._task_id, self._attempt)]
        return mine[0] if mine else None


def last_lines(text: bytes, lines: int) -> bytes:
    """Return the last lines of a text; all of it where ``lines`` is less than 0."""
    if lines < 0:
        return text
    parts = text.removesuffix(b"\n").rsplit(b"\n", lines)
    return text if len(parts) <= lines else text[len(parts[0]) + 1 :]


# ------------------------------------------------------------------------------------ whose it is


@dataclass(frozen=True)
class Wanted:
    """Whose log is wanted: that of an actor, a task, or a process, or one by its name. Raises for what is no choice."""

    node_id: str | None = None
    node_ip: str | None = None
    filename: str | None = None
    actor_id: str | None = None
    task_id: str | None = None
    attempt_number: int = 0
    pid: int | None = None
    suffix: str = "out"

    def __post_init__(self) -> None:
        if self.suffix not in SUFFIXES:
            raise ValueError(f"suffix must be 'out' or 'err', got {self.suffix!r}.")
        if self.node_id is not None and self.node_ip is not None:
            raise ValueError(f"Say node_id or node_ip, not both: {self.node_id}, {self.node_ip}.")
        if not (self.actor_id or self.task_id or self.filename or self.pid):
            raise ValueError("Say whose log it is: filename, actor_id, task_id, pid or submission_id.")
        if not (self.actor_id or self.task_id or self.node_id or self.node_ip):
            raise ValueError("A log is found by its filename, or by a pid, only on a node: say node_id or node_ip.")


async def open_log(bus: Bus, subjects: Subjects, wanted: Wanted, timeout_seconds: float) -> Reader:
    """Return who reads a log; raises ``NotFoundError`` where there is no such log."""
    if wanted.task_id and not wanted.actor_id:
        attempt = wanted.attempt_number
        return TaskLogReader(bus, subjects, wanted.task_id, attempt, wanted.suffix, timeout_seconds)
    return LogReader(bus, subjects, await find_log(bus, subjects, wanted, timeout_seconds), timeout_seconds)


async def find_log(bus: Bus, subjects: Subjects, wanted: Wanted, timeout_seconds: float) -> Place:
    """Return where the log of a process is; raises ``NotFoundError`` where there is no such log."""
    if wanted.actor_id:
        return await log_of_actor(bus, subjects, wanted.actor_id, wanted.suffix, timeout_seconds)
    node = await find_node(bus, subjects, wanted.node_id, wanted.node_ip, timeout_seconds)
    if wanted.filename:
        return Place(node, wanted.filename)
    assert wanted.pid is not None
    return await log_of_process(bus, subjects, node, wanted.pid, wanted.suffix, timeout_seconds)


async def list_logs(
    bus: Bus, subjects: Subjects, node: NodeId, pattern: str, timeout_seconds: float
) -> list[LogDescription]:
    """Return the logs that a node keeps whose names match a pattern of the shell's, oldest first."""
    answer = await ask(bus, subjects.node(node, "logs"), ListLogs(pattern=pattern), timeout_seconds)
    assert isinstance(answer, NodeLogs)
    return answer.logs


async def find_node(
    bus: Bus, subjects: Subjects, node_id: str | None, node_ip: str | None, timeout_seconds: float
) -> NodeId:
    """Return the node that has an id, or lives at an address; raises ``NotFoundError`` where none lives there."""
    rows = await inventory.list_nodes(bus, subjects, timeout_seconds)
    found = [row for row in rows if row.node_id == node_id or row.node_ip == node_ip]
    alive = [row for row in found if row.state == "ALIVE"]
    if alive:
        return NodeId(alive[0].node_id)
    name = node_id or node_ip
    raise NotFoundError(f"Node {name} is dead, and its logs went with it." if found else f"There is no node {name}.")


async def log_of_process(
    bus: Bus, subjects: Subjects, node: NodeId, pid: int, suffix: str, timeout_seconds: float
) -> Place:
    """Return the log of the newest worker process that had a pid on a node."""
    logs = await list_logs(bus, subjects, node, f"worker-*-{pid}.{suffix}", timeout_seconds)
    if not logs:
        raise NotFoundError(f"Node {node} keeps no log of a worker process {pid}.")
    return Place(node, logs[-1].name)


async def log_of_actor(bus: Bus, subjects: Subjects, actor_id: str, suffix: str, timeout_seconds: float) -> Place:
    """Return the log of the newest process of an actor, which may have died: where the actor is, else where it was."""
    record = await ask(bus, subjects.gcs("get_actor"), GetActor(actor_id=ActorId(actor_id)), timeout_seconds)
    assert isinstance(record, ActorRecord)

    def request(_patience_seconds: float) -> ListLogs:
        return ListLogs(pattern=f"*.{suffix}", actor=actor_id)

    asked = await ask_nodes(bus, subjects, "logs", request, NodeLogs, timeout_seconds)
    places = [Place(node.node_id, log.name, log.actor_begin) for node, answer in asked.answers for log in answer.logs]
    if not places:
        silent = f" These did not answer: {', '.join(asked.silent)}." if asked.silent else ""
        raise NotFoundError(f"No node keeps a log of actor {actor_id}, which is {record.state}.{silent}")
    return ([place for place in places if place.node == record.node_id] or places)[-1]
