"""The row about tracing: what it costs tasks that one in a hundred of them is traced, and sent to a collector.

Tracing is turned on by the environment of a process, so each sample is of two fresh processes, one after the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bench.measuring import Effort, Measured

SHARE = "0.01"


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


def traced_tasks(system: str, effort: Effort) -> Measured:
    """A thousand tasks in flight: how many times longer they take with one in a hundred traced."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "SHOAL_TRACING"))}
    plain, traced = [], []
    with collecting() as collector:
        tracing = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": SHARE,
            "NO_PROXY": "127.0.0.1",
        }
        for _ in range(effort.repetitions):
            plain.append(_rate(system, effort, own))
            traced.append(_rate(system, effort, own | tracing))
    details = {
        "plain_per_second": statistics.median(plain),
        "traced_per_second": statistics.median(traced),
        "requests_to_collector": float(collector.requests),
    }
    return Measured([without / with_it for without, with_it in zip(plain, traced, strict=True)], details)


def _rate(system: str, effort: Effort, environment: Mapping[str, str]) -> float:
    """Return how many tasks a second a fresh process does."""
    command = [sys.executable, "-m", "bench.program", "tasks_async", "--system", system]
    command += ["--repetitions", "1", "--seconds", str(effort.seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    [sample] = json.loads(done.stdout.splitlines()[-1])["samples"]
    return float(sample)
