"""The logs of a node's worker processes, for its event loop: a thread of its own writes and reads their files.

What comes is gathered for a moment and written together, so that printing costs the loop next to nothing, and a slow
disk holds up nobody. What is read is as new as what was printed before it was asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import ActorId, JobId, ProcessId
from shoal_core.protocol.logs import ListLogs, ReadLog
from shoal_core.protocol.messages import Message
from shoal_worker.workers.log_files import Begun, LogFiles, Stream

WRITE_SECONDS = 0.1
MOST_GATHERED_BYTES = 16 * 1024 * 1024
LOST = b"[more was printed here than could be written]\n"


class Logs:
    """All logs of a node."""

    def __init__(self, files: LogFiles) -> None:
        self._files = files
        self._gathered: dict[Stream, tuple[bytearray, list[Begun]]] = {}
        self._gathered_bytes = 0
        self._lost: set[Stream] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shoal-logs")
        self._loop = asyncio.get_running_loop()

    def append(self, stream: Stream, text: bytes, begun: Sequence[Begun] = ()) -> None:
        """Add whole lines to a log; a log of what comes faster than it is written says that some is missing.

        ``begun`` is where in them which attempt to run a task begins to print.
        """
        if self._gathered_bytes + len(text) > MOST_GATHERED_BYTES:
            self._lost.add(stream)
            return
        gathered, attempts = self._gathered.setdefault(stream, (bytearray(), []))
        attempts += [(len(gathered) + position, attempt) for position, attempt in begun]
        gathered += text
        self._gathered_bytes += len(text)
        if self._timer is None:
            self._timer = self._loop.call_later(WRITE_SECONDS, self._write_later)

    def route(self, process: ProcessId, pid: int, job: JobId, actor: ActorId | None) -> None:
        """A process belongs to a job, and to an actor if it was given to one."""
        self._write()
        self._order(self._files.route, process, pid, job, actor)

    def end(self, process: ProcessId) -> None:
        """Nothing is added any more to what a process has printed."""
        self._write()
        self._order(self._files.end, process)

    async def answer(self, request: ListLogs | ReadLog) -> Message | ShoalError:
        """Return what is asked for, or the error that says why not."""
        self._write()
        try:
            return await self._loop.run_in_executor(self._thread, self._files.answer, request)
        except ShoalError as error:
            return error

    def close(self) -> None:
        """Write what is left."""
        self._write()
        self._thread.shutdown()

    def _write_later(self) -> None:
        """Write what was gathered, unless the disk has not taken yet what was gathered before."""
        self._timer = None
        if self._writing is not None and not self._writing.done():
            self._timer = self._loop.call_later(WRITE_SECONDS, self._write_later)
        else:
            self._write()

    def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for stream in self._lost:
            gathered, attempts = self._gathered.setdefault(stream, (bytearray(), []))
            attempts.append((len(gathered), ""))
            gathered += LOST
        if self._gathered:
            self._writing = self._order(self._append_all, self._gathered)
        self._gathered, self._gathered_bytes, self._lost = {}, 0, set()

    def _append_all(self, gathered: dict[Stream, tuple[bytearray, list[Begun]]]) -> None:
        for stream, (text, begun) in gathered.items():
            self._files.append(stream, bytes(text), begun)

    def _order(self, what: Callable[..., None], *arguments: Any) -> asyncio.Future[None]:
        """Have the thread do something, after all that it was told before."""
        return self._loop.run_in_executor(self._thread, what, *arguments)
