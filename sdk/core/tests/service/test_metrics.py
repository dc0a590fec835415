"""What a service counts."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from shoal_core.protocol.measures import SECONDS_BOUNDS, Histogram, Kind, Metric, labels
from shoal_core.protocol.metrics import CATALOGUE
from shoal_core.service.metrics import Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
    }


def kinds(metrics: Metrics) -> dict[str, str]:
    return {family.name: family.type for family in text_string_to_metric_families(metrics.exposition().decode())}


ASKED = Metric("asked_total", Kind.COUNTER, "Asked.", ("verb", "outcome"))
NODES = Metric("nodes", Kind.GAUGE, "By state.", ("state",))
SECONDS = Metric("request_seconds", Kind.HISTOGRAM, "Seconds.", ("endpoint",), (0.1, 1.0))


def test_a_counter_is_one_for_its_name_and_labels() -> None:
    metrics = Metrics()
    metrics.counter(ASKED, verb="get", outcome="done").add()
    metrics.counter(ASKED, outcome="done", verb="get").add(2)
    metrics.counter(ASKED, verb="put", outcome="done").add()
    found = samples(metrics)
    assert found["asked_total", (("outcome", "done"), ("verb", "get"))] == 3
    assert found["asked_total", (("outcome", "done"), ("verb", "put"))] == 1


@pytest.mark.parametrize("values", [{}, {"verb": "get"}, {"verb": "get", "outcome": "done", "more": "x"}])
def test_labels_that_are_not_the_metrics_own_are_refused(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="asked_total has the labels"):
        Metrics().counter(ASKED, **values)


def test_gauges_and_counters_that_are_kept_elsewhere_are_read_when_somebody_asks() -> None:
    metrics = Metrics()
    numbers = {"now": 1.0}
    metrics.read(Metric("waiting", Kind.GAUGE, "Wait."), lambda: numbers["now"])
    metrics.read(NODES, lambda: {labels(state="ALIVE"): 2.0, labels(state="DEAD"): numbers["now"]})
    metrics.read(Metric("bytes_total", Kind.COUNTER, "Bytes."), lambda: numbers["now"] * 10)
    numbers["now"] = 5.0
    found = samples(metrics)
    assert found["waiting", ()] == 5
    assert found["nodes", (("state", "ALIVE"),)] == 2
    assert found["nodes", (("state", "DEAD"),)] == 5
    assert found["bytes_total", ()] == 50
    assert kinds(metrics) == {"waiting": "gauge", "nodes": "gauge", "bytes": "counter"}


def test_labels_survive_any_text() -> None:
    metrics = Metrics()
    odd = 'a "b"\\\n'
    metrics.counter(Metric("odd_total", Kind.COUNTER, "Odd.", ("text",)), text=odd).add()
    assert samples(metrics)["odd_total", (("text", odd),)] == 1


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_counts_each_value_once_in_the_first_bucket_that_holds_it(values: list[float]) -> None:
    histogram = Histogram(SECONDS_BOUNDS)
    for value in values:
        histogram.observe(value)
    assert histogram.total == math.fsum(values) or math.isclose(histogram.total, math.fsum(values))
    buckets = dict(histogram.cumulative())
    assert buckets.pop("+Inf") == len(values)
    assert buckets == {repr(bound): sum(value <= bound for value in values) for bound in SECONDS_BOUNDS}


@given(st.lists(st.floats(0, 100)), st.lists(st.floats(0, 100)))
def test_what_two_histograms_counted_is_what_one_would_have(mine: list[float], others: list[float]) -> None:
    one, other, both = (Histogram(SECONDS_BOUNDS) for _ in range(3))
    for histogram, values in ((one, mine), (other, others), (both, mine + others)):
        for value in values:
            histogram.observe(value)
    one.add(other.counts, other.total)
    assert one.counts == both.counts
    assert math.isclose(one.total, both.total)


def test_a_histogram_is_what_prometheus_reads() -> None:
    metrics = Metrics()
    seen = metrics.histogram(SECONDS, endpoint="get")
    for value in (0.05, 0.1, 0.5, 7.0):
        seen.observe(value)
    found = samples(metrics)
    endpoint = ("endpoint", "get")
    assert [found["request_seconds_bucket", (endpoint, ("le", le))] for le in ("0.1", "1.0", "+Inf")] == [2, 3, 4]
    assert found["request_seconds_sum", (endpoint,)] == 7.65
    assert kinds(metrics) == {"request_seconds": "histogram"}


def test_what_others_count_is_told_too_but_is_nobodys_own() -> None:
    metrics = Metrics()
    metrics.counter(ASKED, verb="get", outcome="done")
    metrics.tell(lambda: [(NODES, {labels(state="ALIVE"): 3.0})])
    assert samples(metrics)["nodes", (("state", "ALIVE"),)] == 3
    assert metrics.names() == ["asked_total"]


def test_what_the_process_takes_is_told_where_it_is_asked_for() -> None:
    assert b"process_cpu_seconds_total" in Metrics().exposition(process=True)


def test_nothing_counted_is_nothing_told() -> None:
    assert Metrics().exposition() == b""


@pytest.mark.parametrize("metric", CATALOGUE.values(), ids=list(CATALOGUE))
def test_names_follow_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"shoal_[a-z]+(_[a-z]+)*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert bool(metric.bounds) == (metric.kind is Kind.HISTOGRAM)
    assert metric.text.endswith(".")
    assert metric.services
    assert not set(metric.labels) & {"le", "job", "instance"}, "these are Prometheus' own"
    for unit in ("milliseconds", "megabytes", "percent", "minutes"):
        assert unit not in metric.name, "base units only"
