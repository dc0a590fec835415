"""The node service's side of the template: asking for worker processes, hearing of their births and deaths."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from shoal_core.protocol.ids import ProcessId
from shoal_core.runtime.execution import BEGUN
from shoal_core.runtime.process import WorkerConfig
from shoal_worker.inputs import ProcessEnded

PAGE_BYTES = 4096
MOST_MESSAGE_BYTES = 64 * 1024

logger = logging.getLogger("shoal.worker")

Ended = Callable[[ProcessEnded], None]
Output = Callable[[ProcessId, int, str, int], None]
"""``output(process, pid, stream, descriptor)``: read this pipe; it is the listener's to close."""


class Forks:
    """One template process, and the workers forked from it."""

    def __init__(self, folder: Path, ended: Ended, output: Output) -> None:
        self._folder = folder
        self._ended = ended
        self._output = output
        self._pids: dict[ProcessId, int] = {}
        self._asked: dict[ProcessId, WorkerConfig] = {}
        self._doomed: set[ProcessId] = set()
        self._buffer = b""
        self._descriptors: list[int] = []
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._launch()

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._socket = ours
        with theirs:
            self._template = subprocess.Popen(
                [sys.executable, "-m", "shoal_worker.template", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._loop.add_reader(ours.fileno(), self._read)

    def start(self, config: WorkerConfig) -> None:
        """Have a worker forked."""
        page = Path(config.begun_page)
        page.write_bytes(bytes(PAGE_BYTES))
        self._asked[config.process_id] = config
        self._loop.create_task(self._loop.sock_sendall(self._socket, msgspec.json.encode(config) + b"\n"))

    def kill(self, process: ProcessId) -> None:
        """Kill a worker now, or as soon as it is born."""
        pid = self._pids.get(process)
        if pid is None:
            if process in self._asked:
                self._doomed.add(process)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, MOST_MESSAGE_BYTES, 64)
        except BlockingIOError:
            return
        except ConnectionError:
            data, descriptors = b"", []
        if not data:
            self._template_ended()
            return
        self._descriptors += descriptors
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._told(json.loads(line))

    def _told(self, told: dict[str, str | int]) -> None:
        if "born" in told:
            process, pid = ProcessId(str(told["born"])), int(told["pid"])
            self._pids[process] = pid
            for stream in ("stdout", "stderr"):
                self._output(process, pid, stream, self._descriptors.pop(0))
            if process in self._doomed:
                self.kill(process)
        elif "ended" in told:
            self._gone(ProcessId(str(told["ended"])), str(told["reason"]))

    def _gone(self, process: ProcessId, reason: str) -> None:
        self._pids.pop(process, None)
        self._doomed.discard(process)
        config = self._asked.pop(process, None)
        lease = position = 0
        if config is not None:
            page = Path(config.begun_page)
            with contextlib.suppress(OSError, struct.error):
                lease, position = BEGUN.unpack_from(page.read_bytes())
            page.unlink(missing_ok=True)
        self._ended(ProcessEnded(process, reason, lease, position))

    def _template_ended(self) -> None:
        """All workers die with the template: tell of them, and start another."""
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._template.kill()
        status = self._template.wait()
        self._buffer = b""
        if self._closing:
            return
        logger.error("the template process ended with status %s; another one is started", status)
        gone = list(self._asked)
        self._launch()
        for process in gone:
            self._gone(process, "the node's template process ended, and its worker processes with it")

    def close(self) -> None:
        """End the template and all workers."""
        self._closing = True
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._template_ended()
        for config in self._asked.values():
            Path(config.begun_page).unlink(missing_ok=True)


@asynccontextmanager
async def forks(folder: Path, ended: Ended, output: Output) -> AsyncIterator[Forks]:
    """Keep a template process; leaving ends it and everything forked from it."""
    one = Forks(folder, ended, output)
    try:
        yield one
    finally:
        one.close()
