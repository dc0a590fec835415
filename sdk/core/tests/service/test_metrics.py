"""What a service counts."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from shoal_core.service.metrics import SECONDS_BOUNDS, Histogram, Metrics, labels


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def kinds(metrics: Metrics) -> dict[str, str]:
    return {family.name: family.type for family in text_string_to_metric_families(metrics.exposition().decode())}


def test_a_counter_is_one_for_its_name_and_labels() -> None:
    metrics = Metrics()
    metrics.counter("asked_total", "Asked.", verb="get", outcome="done").add()
    metrics.counter("asked_total", "Asked.", outcome="done", verb="get").add(2)
    metrics.counter("asked_total", "Asked.", verb="put", outcome="done").add()
    found = samples(metrics)
    assert found["shoal_asked_total", (("outcome", "done"), ("verb", "get"))] == 3
    assert found["shoal_asked_total", (("outcome", "done"), ("verb", "put"))] == 1


def test_gauges_and_totals_are_read_when_somebody_asks() -> None:
    metrics = Metrics()
    numbers = {"now": 1.0}
    metrics.gauge("waiting", "Wait.", lambda: numbers["now"])
    metrics.gauge("nodes", "By state.", lambda: {labels(state="ALIVE"): 2.0, labels(state="DEAD"): numbers["now"]})
    metrics.total("bytes_total", "Bytes.", lambda: numbers["now"] * 10)
    numbers["now"] = 5.0
    found = samples(metrics)
    assert found["shoal_waiting", ()] == 5
    assert found["shoal_nodes", (("state", "ALIVE"),)] == 2
    assert found["shoal_nodes", (("state", "DEAD"),)] == 5
    assert found["shoal_bytes_total", ()] == 50
    assert kinds(metrics) == {"shoal_waiting": "gauge", "shoal_nodes": "gauge", "shoal_bytes": "counter"}


def test_labels_survive_any_text() -> None:
    metrics = Metrics()
    metrics.counter("odd_total", "Odd.", text='a "b"\\\n').add()
    assert samples(metrics)["shoal_odd_total", (("text", 'a "b"\\\n'),)] == 1


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_counts_each_value_once_in_the_first_bucket_that_holds_it(values: list[float]) -> None:
    histogram = Histogram(SECONDS_BOUNDS)
    for value in values:
        histogram.observe(value)
    assert histogram.total == math.fsum(values) or math.isclose(histogram.total, math.fsum(values))
    buckets = dict(histogram.cumulative())
    assert buckets.pop("+Inf") == len(values)
    assert buckets == {repr(bound): sum(value <= bound for value in values) for bound in SECONDS_BOUNDS}


def test_a_histogram_is_what_prometheus_reads() -> None:
    metrics = Metrics()
    seen = metrics.histogram("request_seconds", "Seconds.", (0.1, 1.0), endpoint="get")
    for value in (0.05, 0.1, 0.5, 7.0):
        seen.observe(value)
    found = samples(metrics)
    endpoint = ("endpoint", "get")
    assert [found["shoal_request_seconds_bucket", (endpoint, ("le", le))] for le in ("0.1", "1.0", "+Inf")] == [2, 3, 4]
    assert found["shoal_request_seconds_sum", (endpoint,)] == 7.65
    assert kinds(metrics) == {"shoal_request_seconds": "histogram"}


def test_all_names_are_told() -> None:
    metrics = Metrics()
    metrics.counter("b_total", "B.")
    metrics.gauge("a", "A.", lambda: 0.0)
    metrics.total("c_total", "C.", lambda: 0.0)
    assert metrics.names() == ["shoal_a", "shoal_b_total", "shoal_c_total"]
    assert {name for name, _ in samples(metrics)} == set(metrics.names())


def test_nothing_counted_is_nothing_told() -> None:
    assert Metrics().exposition() == b""
