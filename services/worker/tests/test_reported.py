"""What a node makes of what processes have counted."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.ids import ProcessId
from shoal_core.protocol.measures import Histogram, Kind, Labels, Sample, labels
from shoal_core.protocol.records import Measured, MetricsReported
from shoal_core.service.metrics import Metrics
from shoal_worker import reported
from shoal_worker.reported import ReportedMetrics

ONE, OTHER = ProcessId("a" * 24), ProcessId("b" * 24)
HOME = labels(route="/")


def counter(value: float, key: Labels = HOME, name: str = "served") -> Measured:
    return Measured(name, Kind.COUNTER, "Served.", key, value)


def gauge(value: float, name: str = "waiting") -> Measured:
    return Measured(name, Kind.GAUGE, "Waiting.", (), value)


def histogram(counts: list[int], bounds: tuple[float, ...] = (1.0, 2.0)) -> Measured:
    return Measured("seconds", Kind.HISTOGRAM, "Seconds.", (), float(sum(counts)), bounds, counts)


def series(node: ReportedMetrics, name: str) -> Mapping[Labels, Sample]:
    return next((series for metric, series in node.families() if metric.name == name), {})


def test_what_processes_counted_is_added_up_and_outlives_them() -> None:
    node = ReportedMetrics()
    node.take(ONE, MetricsReported([counter(2), histogram([1, 0, 0])]))
    node.take(OTHER, MetricsReported([counter(3), histogram([1, 1, 0])]))
    node.take(ONE, MetricsReported([counter(1)]))
    node.process_died(ONE)
    node.process_died(OTHER)
    assert series(node, "served") == {HOME: 6}
    seen = series(node, "seconds")[()]
    assert isinstance(seen, Histogram)
    assert (seen.counts, seen.total) == ([2, 1, 0], 3.0)


def test_of_users_gauges_the_one_that_was_set_last_by_a_process_that_lives_is_shown() -> None:
    node = ReportedMetrics()
    node.take(ONE, MetricsReported([gauge(1)]))
    node.take(OTHER, MetricsReported([gauge(2)]))
    assert series(node, "waiting") == {(): 2}
    node.take(ONE, MetricsReported([gauge(3)]))
    assert series(node, "waiting") == {(): 3}
    node.process_died(ONE)
    assert series(node, "waiting") == {(): 2}
    node.process_died(OTHER)
    assert (series(node, "waiting"), node.series) == ({}, 0)


def test_tasks_that_wait_are_summed_over_the_processes_that_live() -> None:
    node = ReportedMetrics()
    assert series(node, "shoal_tasks_pending") == {(): 0}
    node.take(ONE, MetricsReported([gauge(5, "shoal_tasks_pending")]))
    node.take(OTHER, MetricsReported([gauge(7, "shoal_tasks_pending")]))
    assert series(node, "shoal_tasks_pending") == {(): 12}
    node.process_died(OTHER)
    assert series(node, "shoal_tasks_pending") == {(): 5}


def test_functions_beyond_the_bound_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reported, "MOST_FUNCTIONS", 2)
    node = ReportedMetrics()
    for function in ("f", "g", "h", "i", "f"):
        ended = counter(1, labels(function=function, outcome="ok"), "shoal_tasks_finished_total")
        node.take(ONE, MetricsReported([ended]))
    assert series(node, "shoal_tasks_finished_total") == {
        labels(function="f", outcome="ok"): 2,
        labels(function="g", outcome="ok"): 1,
        labels(function="(other)", outcome="ok"): 2,
    }


def test_of_users_series_the_one_reported_longest_ago_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reported, "MOST_SERIES", 2)
    node = ReportedMetrics()
    for route in ("a", "b", "a", "c"):
        node.take(ONE, MetricsReported([counter(1, labels(route=route))]))
    assert series(node, "served") == {labels(route="a"): 2, labels(route="c"): 1}
    assert (node.dropped, node.series) == (1, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        gauge(1, "served"),
        counter(1, labels(path="/")),
        histogram([1, 0], (1.0,)),
        histogram([1, 0]),
        counter(1, (), "not a name"),
        counter(1, labels(__name__="x"), "fine"),
        counter(1, (), "shoal_nodes"),
        counter(1, (), "shoal_invented_total"),
        counter(1, labels(route="/"), "shoal_tasks_finished_total"),
    ],
    ids=["kind", "labels", "bounds", "buckets", "name", "label", "not a process's", "not known", "not its labels"],
)
def test_what_contradicts_or_cannot_be_shown_is_dropped_and_counted(wrong: Measured) -> None:
    node = ReportedMetrics()
    node.take(ONE, MetricsReported([counter(1), histogram([1, 0, 0])]))
    node.take(OTHER, MetricsReported([wrong], dropped=2))
    assert node.dropped == 3
    metrics = Metrics()
    metrics.tell(node.families)
    assert b"served_total" in metrics.exposition()


@given(
    st.lists(
        st.tuples(st.sampled_from([ONE, OTHER]), st.sampled_from("abc"), st.integers(1, 5), st.booleans()),
        max_size=30,
    )
)
def test_counters_never_fall_whoever_reports_and_dies(
    reports: list[tuple[ProcessId, str, int, bool]],
) -> None:
    node = ReportedMetrics()
    expected: dict[Labels, float] = {}
    for process, route, amount, dies in reports:
        key = labels(route=route)
        node.take(process, MetricsReported([counter(amount, key)]))
        expected[key] = expected.get(key, 0) + amount
        if dies:
            node.process_died(process)
        assert series(node, "served") == expected
