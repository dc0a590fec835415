"""The template: a warm, single-threaded process from which worker processes are forked in milliseconds.

It imports once what every worker needs, and rehearses how one starts; its children share that memory. It speaks with
its node service over a socket that it inherits: each line it reads is the birth certificate of a worker (a
``WorkerConfig`` as JSON), each line it writes tells of a birth, of a death, or of what a worker has left. With a birth
it sends the read ends of the worker's output pipes.

The chain of death: the kernel kills the template when the node service dies, and each worker when the template does.
What a worker has started, and left behind when it ended, the template ends (``remnants``).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from typing import NoReturn, TextIO

import msgspec
from setproctitle import setproctitle

from shoal_core import telemetry
from shoal_core.bus.tracing import ENABLED
from shoal_core.machine import die_with_parent
from shoal_core.protocol.errors import ShoalError
from shoal_core.runtime.worker.output import MarkedStream
from shoal_core.runtime.worker.process import WorkerConfig, main, printing_name
from shoal_core.runtime.worker.rehearsal import rehearse
from shoal_worker.workers.remnants import LOOK_SECONDS, Remnants

MOST_LINE_BYTES = 64 * 1024

logger = logging.getLogger("shoal.worker")


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at the time: each worker has its own."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """The stream of this process."""
        return sys.stderr


class Template:
    """The loop that forks and reaps."""

    def __init__(self, node: socket.socket) -> None:
        self._node = node
        self._births: dict[int, str] = {}
        self._remnants = Remnants()
        self._buffer = b""
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Fork on request and tell of deaths, until the node closes the socket."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wake_writer)
        poll = select.poll()  # select takes no descriptor from 1024 on, and this one is as high as our node's was
        poll.register(self._node, select.POLLIN)
        poll.register(self._wake_reader, select.POLLIN)
        while True:
            readable = [descriptor for descriptor, _ in poll.poll(1000 * LOOK_SECONDS if self._remnants else None)]
            if self._wake_reader in readable:
                os.read(self._wake_reader, 4096)
            self._reap()
            for group in self._remnants.look(time.monotonic()):
                self._tell({"over": group})
            if self._node.fileno() in readable and not self._read():
                return

    def _read(self) -> bool:
        data = self._node.recv(MOST_LINE_BYTES)
        if not data:
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            config = msgspec.json.decode(line, type=WorkerConfig)
            try:
                self._fork(config)
            except OSError as error:
                # Too many processes or descriptors: the workers that live are not to pay for that.
                self._tell({"ended": config.process_id, "reason": f"no worker process could be forked: {error}"})
        return True

    def _fork(self, config: WorkerConfig) -> None:
        with contextlib.ExitStack() as pipes:
            out_reader, out_writer = _pipe(pipes)
            error_reader, error_writer = _pipe(pipes)
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._become_worker(config, parent, out_writer, error_writer)
            self._births[pid] = config.process_id
            line = json.dumps({"born": config.process_id, "pid": pid}).encode() + b"\n"
            socket.send_fds(self._node, [line], [out_reader, error_reader])

    def _become_worker(self, config: WorkerConfig, parent: int, out: int, error: int) -> NoReturn:
        status = 1
        try:
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(out, 1)
            os.dup2(error, 2)
            close_inherited()
            os.setsid()
            setproctitle("shoal: worker")
            sys.stdout = MarkedStream(os.fdopen(1, "wb", closefd=False), printing_name)
            sys.stderr = MarkedStream(os.fdopen(2, "wb", closefd=False), printing_name)
            main(config)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)  # nothing may bring a worker back into the template's loop

    def _reap(self) -> None:
        while self._births:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            process = self._births.pop(pid, None)
            if self._remnants.ended(pid, time.monotonic()):
                self._tell({"left": pid})
            if process is not None:
                self._tell({"ended": process, "reason": describe(pid, status), "in_order": status == 0})

    def _tell(self, told: dict[str, str | int]) -> None:
        self._node.sendall(json.dumps(told).encode() + b"\n")


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """Make a pipe that is closed with the stack."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    return reader, writer


def close_inherited(*kept: int) -> None:
    """Close every descriptor but the three standard streams and ``kept``, however high it is: they are the parent's."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):  # the one that listed the folder is closed already
                os.close(int(name))


def describe(pid: int, status: int) -> str:
    """Say in words how a process ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"worker process {pid} was killed by signal {number} ({signal.Signals(number).name})"
    return f"worker process {pid} exited with status {os.WEXITSTATUS(status)}"


def warm_up() -> None:
    """Import what workers would import at once."""
    for module in ("shoal_core.bus.fast", "shoal_core.bus.peers", "asyncio", "uvloop"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    if ENABLED:
        telemetry.preload()
    _settle()


def _settle() -> None:
    """Keep the collector from touching after a fork what is here now."""
    gc.collect()
    gc.freeze()


def serve_forked(node: socket.socket, parent: int) -> NoReturn:
    """Be a template in what was a copy of the node service's process, ``parent``, until the node closes the socket."""
    status = 1
    try:
        die_with_parent(parent)
        os.setsid()
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        close_inherited(node.fileno())
        _serve(node)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)  # this copy of the service's stack must not go on


def _serve(node: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setproctitle("shoal: template")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", handlers=[_CurrentStderr()])
    try:
        rehearse()
    except (OSError, ShoalError) as error:
        logger.warning("worker processes will start slower, since to rehearse that failed: %s", error)
    _settle()
    node.sendall(b'{"warm": true}\n')
    Template(node).serve()


def run() -> None:
    """Serve the socket whose number and whose owner's pid are the arguments."""
    die_with_parent(int(sys.argv[2]))
    with socket.socket(fileno=int(sys.argv[1])) as node:
        warm_up()
        _serve(node)


if __name__ == "__main__":
    run()
