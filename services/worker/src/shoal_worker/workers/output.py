"""What worker processes print: read from their pipes, kept in files, published in whole lines for the job's driver.

A worker that prints faster than the node publishes waits in its pipe, which is all the buffer there is.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import termios

from shoal_core.bus.interface import Bus
from shoal_core.protocol.errors import BusError
from shoal_core.protocol.ids import ActorId, JobId, NodeId, ProcessId
from shoal_core.protocol.messages import LogLines
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime.worker.output import by_name, unmarked
from shoal_worker.workers.log_files import Stream
from shoal_worker.workers.logs import Logs

READ_BYTES = 64 * 1024
MOST_LINE_BYTES = 64 * 1024


class Outputs:
    """The pipes of all worker processes of a node."""

    def __init__(self, bus: Bus, subjects: Subjects, node: NodeId, logs: Logs) -> None:
        self._bus = bus
        self._subjects = subjects
        self._node = node
        self.logs = logs
        self._routes: dict[ProcessId, tuple[JobId, ActorId | None]] = {}
        self._pids: dict[ProcessId, int] = {}
        self._open: dict[int, Stream] = {}
        self._rest: dict[int, bytes] = {}
        self._names: dict[int, str] = {}
        self._loop = asyncio.get_running_loop()

    def add(self, process: ProcessId, pid: int, stream: str, descriptor: int) -> None:
        """Read a pipe from now on."""
        os.set_blocking(descriptor, False)
        self._pids[process] = pid
        self._open[descriptor] = Stream(process, pid, stream)
        self._rest[descriptor] = b""
        self._names[descriptor] = ""
        self._loop.add_reader(descriptor, self._read, descriptor)
        self._name_logs(process)

    def route(self, process: ProcessId, job: JobId, actor: ActorId | None = None) -> None:
        """What this process prints belongs to this job, and is that of an actor if it was given to one.

        It may be said before its pipes come, which take another way.
        """
        self._routes[process] = job, actor
        self._name_logs(process)

    def _name_logs(self, process: ProcessId) -> None:
        if process in self._routes and process in self._pids:
            self.logs.route(process, self._pids[process], *self._routes[process])

    def forget(self, process: ProcessId) -> None:
        """Read what is left of a process that has ended, and close its pipes.

        Processes that it started may still hold them: what those print from now on is nobody's.
        """
        for descriptor in [d for d, stream in self._open.items() if stream.process == process]:
            waiting = array.array("i", [0])
            fcntl.ioctl(descriptor, termios.FIONREAD, waiting)
            if waiting[0]:
                self._take(descriptor, os.read(descriptor, waiting[0]))
            self._take(descriptor, b"")
        self._routes.pop(process, None)
        self._pids.pop(process, None)
        self.logs.end(process)

    def close(self) -> None:
        """Close everything."""
        for descriptor in list(self._open):
            self._close(descriptor)

    def _read(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return
        self._take(descriptor, data)

    def _take(self, descriptor: int, data: bytes) -> None:
        """Publish the lines that ``data`` completes; nothing more will come where it is empty."""
        whole, _, rest = (self._rest[descriptor] + data).rpartition(b"\n")
        if not data or len(rest) > MOST_LINE_BYTES:
            whole, rest = whole + b"\n" * bool(whole) + rest, b""
        self._rest[descriptor] = rest
        if whole:
            self.logs.append(self._open[descriptor], *unmarked(whole + b"\n"))
            self._publish(descriptor, whole)
        if not data:
            self._close(descriptor)

    def _publish(self, descriptor: int, text: bytes) -> None:
        process, pid, stream = self._open[descriptor]
        if process not in self._routes:
            return
        job, _ = self._routes[process]
        lines = text.decode(errors="replace").split("\n")
        if not lines[-1]:
            lines.pop()
        for name, group in by_name(lines, self._names[descriptor]):
            self._names[descriptor] = name
            if group:
                message = LogLines(
                    node_id=self._node,
                    job_id=job,
                    process_id=process,
                    pid=pid,
                    stream=stream,
                    name=name,
                    lines=group,
                )
                with contextlib.suppress(BusError):  # output is a courtesy; it must not stop the node
                    self._bus.publish(self._subjects.log(self._node, job), encode(message))

    def _close(self, descriptor: int) -> None:
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        del self._open[descriptor], self._rest[descriptor], self._names[descriptor]
