"""The row about tracing: what it costs tasks that one in a hundred of them is traced, and sent to a collector.

Tracing is turned on by the environment of a process, so there are two programs, each with a cluster of its own: one
traces, the other does not. They do the same over and over, in turns so short that whatever else the machine does slows
both down alike. While one has its turn all processes of the other are stopped: it takes nothing from the machine, and
what it has not sent by then it has to send when it goes on, in time of its own. Two processes of the same program may
differ by a few percent for as long as they live, so each sample is of two fresh ones.

A turn is the same work for both. To wake up takes some percent of it, and by turns of the same time the slower program
did less work in many of its turns, since its next batch just did not begin any more: it looked slower by a few percent
than it was. A turn is shorter than the time after which a worker process takes itself to be idle and has its spans sent
(``telemetry.IDLE_SECONDS``): to stop would look like that, and to send a few costs nearly what hundreds cost. A sample
takes so many turns that each process has full requests to send (``telemetry.MOST_SPANS``) meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from bench.measuring import Effort, Measured

if TYPE_CHECKING:
    import psutil

SHARE = "0.01"
TASKS = 1000
WARM_BATCHES = 20
TURN_BATCHES = 1
TURNS_PER_SECOND = 60
"""So many turns each program has for each second that a sample is to take."""
END_SECONDS = 20.0


class Collector(ThreadingHTTPServer):
    """What spans are sent to: takes everything, and counts the requests."""

    requests = 0


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as with any collector

        def do_POST(self) -> None:
            """Take what was sent."""
            self.rfile.read(int(self.headers["Content-Length"]))
            collector.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with Collector(("127.0.0.1", 0), Handler) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()


class Program:
    """A program that does a thousand tasks over and over in its turns, and is at a standstill between them."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._batches_done(WARM_BATCHES)
        self._processes = _processes(process.pid)
        self.tasks = 0
        self._seconds = 0.0
        self._stop()

    @property
    def tasks_per_second(self) -> float:
        """How many it did in all of its turns."""
        return self.tasks / self._seconds

    def take_turn(self) -> None:
        """Go on for ``TURN_BATCHES``."""
        began = time.perf_counter()
        self.go_on()
        self.tasks += TASKS * self._batches_done(TURN_BATCHES)
        self._stop()
        self._seconds += time.perf_counter() - began

    def go_on(self) -> None:
        """Let all of its processes run."""
        for process in self._processes:
            process.resume()

    def _stop(self) -> None:
        for process in self._processes:
            process.suspend()

    def _batches_done(self, count: int) -> int:
        """Wait until it has said of so many batches that they are done."""
        assert self._process.stdout is not None
        if len(self._process.stdout.read(count)) < count:
            raise RuntimeError("the program ended before it was told to")
        return count


def _processes(pid: int) -> list[psutil.Process]:
    """Return a driver's process and those of its cluster."""
    import psutil

    driver = psutil.Process(pid)
    return [driver, *driver.children(recursive=True)]


@contextlib.contextmanager
def running(system: str, environment: Mapping[str, str]) -> Iterator[Program]:
    """Start a program, and stop it once it is warm; on leaving it ends in good order."""
    command = [sys.executable, "-m", "bench.traces", system]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        program = Program(process)
        try:
            yield program
        finally:
            program.go_on()
            assert process.stdout is not None
            process.stdout.close()
            process.wait(END_SECONDS)


def traced_tasks(system: str, effort: Effort) -> Measured:
    """A thousand tasks in flight: how many times longer they take with one in a hundred traced."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "SHOAL_TRACING"))}
    rates: list[tuple[float, float]] = []
    with collecting() as collector:
        tracing = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": SHARE,
            "NO_PROXY": "127.0.0.1",
        }
        for _ in range(effort.repetitions):
            with running(system, own) as plain, running(system, own | tracing) as traced:
                for _ in range(max(1, round(effort.seconds * TURNS_PER_SECOND))):
                    plain.take_turn()
                    traced.take_turn()
                rates.append((plain.tasks_per_second, traced.tasks_per_second))
    without, with_it = zip(*rates, strict=True)
    details = {
        "plain_per_second": statistics.median(without),
        "traced_per_second": statistics.median(with_it),
        "requests_to_collector": float(collector.requests),
    }
    return Measured([plain / traced for plain, traced in rates], details)


def main(system: str) -> None:
    """Do a thousand tasks over and over, and say so each time, until nobody listens any more."""
    ray: Any = importlib.import_module(system)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    small_value = ray.remote(_small_value)
    with contextlib.suppress(BrokenPipeError):
        while True:
            ray.get([small_value.remote() for _ in range(TASKS)])
            os.write(sys.stdout.fileno(), b".")
    ray.shutdown()


def _small_value() -> bytes:
    return b"ok"


if __name__ == "__main__":
    main(sys.argv[1])
