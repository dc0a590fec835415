"""Metrics of an embedded cluster: what its services show, and what users count in drivers, tasks and actors."""

from __future__ import annotations

import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import shoal
from shoal.cluster import SERVICES
from shoal.util.metrics import Counter, Gauge, Histogram
from shoal_core.protocol.metrics import CATALOGUE
from tests.integration.waiting import first_of_free_ports, until

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

served = Counter("served", "Things served.", ("where",))
depth = Gauge("depth", "How deep.")
seconds = Histogram("seconds", "How long.", [0.1, 1.0])


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Join a cluster that shows its metrics on this port and the three behind it."""
    first = first_of_free_ports(len(SERVICES))
    with shoal.init("local", num_cpus=2, _metrics_export_port=first):
        yield first


def scrape(port: int) -> Samples:
    """Return all samples that a service shows."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of_node(port: int, name: str, **labels: str) -> float:
    """Return the sum over the series of the node that have these labels."""
    wanted = set(labels.items())
    return sum(v for (found, key), v in scrape(port).items() if found == name and wanted <= set(key))


@shoal.remote
def serve(where: str) -> int:
    served.inc(tags={"where": where})
    seconds.observe(0.5)
    return os.getpid()


@shoal.remote(max_retries=0)
def fail() -> None:
    raise ValueError("on purpose")


class ServerClass:
    def serve(self, times: int) -> int:
        served.inc(times, tags={"where": "actor"})
        depth.set(times)
        return os.getpid()


Server: Any = shoal.remote(ServerClass)


@shoal.remote
def outer(count: int) -> int:
    return len(shoal.get([serve.remote("nested") for _ in range(count)]))


def test_every_service_shows_all_of_its_metrics_and_nothing_that_is_not_in_the_catalogue(port: int) -> None:
    shoal.get(serve.remote("first"))
    for offset, service in enumerate(SERVICES):
        with urllib.request.urlopen(f"http://127.0.0.1:{port + offset}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        declared = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE shoal_")}
        without_gpus = {n: m for n, m in CATALOGUE.items() if service in m.services and not n.startswith("shoal_gpu_")}
        assert declared == {name: metric.kind for name, metric in without_gpus.items()}


def test_what_tasks_and_actors_count_is_shown_by_their_node_when_their_results_are_there(port: int) -> None:
    before = of_node(port, "served_total", where="task")
    shoal.get([serve.remote("task") for _ in range(50)])
    until(lambda: of_node(port, "served_total", where="task") == before + 50, "the node shows what tasks counted")
    assert of_node(port, "seconds_count") >= 50
    server = Server.remote()
    pid = shoal.get(server.serve.remote(7))
    until(lambda: of_node(port, "depth") == 7, "the node shows the actor's gauge")
    assert of_node(port, "served_total", where="actor") == 7
    os.kill(pid, signal.SIGKILL)
    until(lambda: of_node(port, "depth") == 0, "the gauge ends with its process")
    assert of_node(port, "served_total", where="actor") == 7, "the counter does not"


def test_what_a_driver_counts_is_shown_by_its_node(port: int) -> None:
    served.inc(3, {"where": "driver"})
    until(lambda: of_node(port, "served_total", where="driver") == 3, "the node shows what the driver counted")


def test_ends_of_tasks_are_counted_by_function_and_outcome(port: int) -> None:
    def finished(function: str, outcome: str) -> float:
        return of_node(port, "shoal_tasks_finished_total", function=function, outcome=outcome)

    before = finished("serve", "ok")
    for ref in [fail.remote() for _ in range(3)]:
        with pytest.raises(ValueError, match="on purpose"):
            shoal.get(ref)
    assert shoal.get(outer.remote(4)) == 4
    until(lambda: finished("fail", "failed") == 3, "failures are counted")
    until(lambda: finished("serve", "ok") == before + 4, "a task counts the tasks that it owns")
    until(lambda: of_node(port, "shoal_tasks_pending") == 0, "nothing is left to do")
    assert of_node(port, "shoal_task_run_seconds_count") >= 8
    assert of_node(port, "shoal_task_queue_seconds_count") >= 8


def test_too_many_series_are_dropped_and_counted(port: int) -> None:
    many = Counter("many", "Many.", ("number",))
    for number in range(600):
        many.inc(tags={"number": str(number)})
    until(lambda: of_node(port, "shoal_metric_series_dropped_total") >= 100, "what found no room is counted")
    assert of_node(port, "many_total") == 500


def test_the_guides_example_counts_what_it_says(port: int) -> None:
    guide = Path(__file__).resolve().parents[2] / "docs" / "observability.md"
    (example,) = re.findall(r"```python\n(from shoal.util.metrics.*?)```", guide.read_text(), re.DOTALL)
    exec(compile(example, str(guide), "exec"), {"shoal": shoal, "__name__": "guide"})
    until(lambda: of_node(port, "pages_total", kind="index") == 10, "the pages are counted")
    until(lambda: of_node(port, "queue_depth") == 3, "the gauge is set")
    assert of_node(port, "page_seconds_count") == 10
