"""The node service's side of the template: asking for worker processes, hearing of their births and deaths."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from shoal_core.protocol.ids import ProcessId
from shoal_core.runtime.worker.execution import BEGUN
from shoal_core.runtime.worker.process import WorkerConfig
from shoal_worker.inputs import ProcessEnded
from shoal_worker.workers import remnants
from shoal_worker.workers.templates import TEMPLATE, launch

PAGE_BYTES = 4096
MOST_MESSAGE_BYTES = 64 * 1024
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
END_SECONDS = 5.0

logger = logging.getLogger("shoal.worker")

Ended = Callable[[ProcessEnded], None]
Output = Callable[[ProcessId, int, str, int], None]
"""``output(process, pid, stream, descriptor)``: read this pipe; it is the listener's to close."""


class Forks:
    """One template process, and the workers forked from it.

    Of every worker that was asked for, ``ended`` tells once: after its death, or why it could not be started.
    """

    def __init__(self, ended: Ended, output: Output, command: Sequence[str] = TEMPLATE) -> None:
        self._ended = ended
        self._output = output
        self._command = command
        self._asked: dict[ProcessId, WorkerConfig] = {}
        self._pids: dict[ProcessId, int] = {}
        self._doomed: set[ProcessId] = set()
        self._left: set[int] = set()
        self._socket: socket.socket | None = None
        self._unsent = bytearray()
        self._unread = b""
        self._descriptors: list[int] = []
        self._pause_seconds = 0.0
        self._relaunch: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._launch()

    # ------------------------------------------------------------------------------- what the node wants

    def start(self, config: WorkerConfig) -> None:
        """Have a worker forked."""
        self._asked[config.process_id] = config
        try:
            Path(config.begun_page).write_bytes(bytes(PAGE_BYTES))
        except OSError as error:
            reason = f"the page for a worker process could not be made: {error}"
            self._loop.call_soon(self._gone, config.process_id, reason)
            return
        self._unsent += msgspec.json.encode(config) + b"\n"
        self._write()

    @property
    def pids(self) -> Mapping[ProcessId, int]:
        """The workers that have been born and live."""
        return self._pids

    def kill(self, process: ProcessId) -> None:
        """Kill a worker now, or as soon as it is born."""
        pid = self._pids.get(process)
        if pid is not None:
            _kill(pid)
        elif process in self._asked:
            self._doomed.add(process)

    def close(self) -> None:
        """End the template and all workers."""
        if self._relaunch is not None:
            self._relaunch.cancel()
        self._end_template()
        for config in self._asked.values():
            Path(config.begun_page).unlink(missing_ok=True)
        self._asked.clear()

    # ------------------------------------------------------------------------------- the template's life

    def _launch(self) -> None:
        self._relaunch = None
        launched = launch(self._command)
        self._template, self._socket = launched.process, launched.socket
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._write()

    def _launch_again(self) -> None:
        try:
            self._launch()
        except OSError as error:
            logger.error("no template process can be started: %s", error)
            self._launch_later()

    def _launch_later(self) -> None:
        """Start a template: at once if the last one had come up, else later and later."""
        self._relaunch = self._loop.call_later(self._pause_seconds, self._launch_again)
        self._pause_seconds = min(max(FIRST_PAUSE_SECONDS, 2 * self._pause_seconds), LONGEST_PAUSE_SECONDS)

    def _template_ended(self) -> None:
        """All workers die with the template: tell of them, and start another."""
        status = self._end_template()
        logger.error("the template process ended with status %s; another one is started", status)
        gone = list(self._asked)
        self._launch_later()
        for process in gone:
            self._gone(process, "the node's template process ended, and its worker processes with it")

    def _end_template(self) -> int | None:
        """End the template, and return its status when all its workers are gone."""
        if self._socket is None:
            return None
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._socket = None
        self._unsent.clear()
        self._unread = b""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._template.kill()
        status = self._template.wait()
        # The kernel kills them too, but only this tells when: what they had mapped will be used again.
        for pid in self._pids.values():
            _kill(pid)
        for pid in self._pids.values():
            _await_end(pid)
        remnants.end([*self._pids.values(), *self._left])
        self._pids.clear()
        self._left.clear()
        return status

    # ------------------------------------------------------------------------------- speaking with the template

    def _write(self) -> None:
        """Send what the template takes now, and the rest, in order, when it takes more."""
        if self._socket is None:
            return
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent)
                del self._unsent[:sent]
        except BlockingIOError:
            self._loop.add_writer(self._socket.fileno(), self._write)
            return
        except ConnectionError:
            self._unsent.clear()  # that it has ended is about to be read, and all it was asked for told as gone
        self._loop.remove_writer(self._socket.fileno())

    def _read(self) -> None:
        assert self._socket is not None
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._socket, MOST_MESSAGE_BYTES, 64, flags=socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except ConnectionError:
            data, descriptors = b"", []
        if not data:
            self._template_ended()
            return
        self._descriptors += descriptors
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            self._told(json.loads(line))

    def _told(self, told: dict[str, str | int]) -> None:
        if "born" in told:
            self._born(ProcessId(str(told["born"])), int(told["pid"]))
        elif "ended" in told:
            self._gone(ProcessId(str(told["ended"])), str(told["reason"]), bool(told.get("in_order")))
        elif "left" in told:
            self._left.add(int(told["left"]))
        elif "over" in told:
            self._left.discard(int(told["over"]))
        else:
            self._pause_seconds = 0.0

    def _born(self, process: ProcessId, pid: int) -> None:
        self._pids[process] = pid
        pipes, self._descriptors = self._descriptors[:2], self._descriptors[2:]
        for stream, descriptor in zip(("stdout", "stderr"), pipes, strict=False):
            self._output(process, pid, stream, descriptor)
        if len(pipes) < 2:
            logger.error("output of worker process %d is lost: this node has no descriptors left (ulimit -n)", pid)
        if process in self._doomed:
            self.kill(process)

    def _gone(self, process: ProcessId, reason: str, in_order: bool = False) -> None:
        self._pids.pop(process, None)
        self._doomed.discard(process)
        config = self._asked.pop(process, None)
        if config is None:
            return
        lease = position = 0
        page = Path(config.begun_page)
        with contextlib.suppress(OSError, struct.error):
            lease, position = BEGUN.unpack_from(page.read_bytes())
        page.unlink(missing_ok=True)
        self._ended(ProcessEnded(process, reason, lease, position, in_order))


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _await_end(pid: int) -> None:
    """Wait for the end of a process that was killed, and reap it where it became our child (as that of process 1)."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(END_SECONDS * 1000):
                logger.error("worker process %d was killed and does not end", pid)
        finally:
            os.close(descriptor)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


@asynccontextmanager
async def forks(ended: Ended, output: Output, command: Sequence[str] = TEMPLATE) -> AsyncIterator[Forks]:
    """Keep a template process, which ``command`` starts; leaving ends it and everything forked from it."""
    one = Forks(ended, output, command)
    try:
        yield one
    finally:
        one.close()
