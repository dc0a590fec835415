"""What user code counts in one process."""

from __future__ import annotations

import threading

import pytest

from shoal_core.protocol.measures import Kind, Metric, labels
from shoal_core.protocol.records import Measured
from shoal_core.runtime.reports.measures import MOST_OF_ONE, MOST_SERIES, Measures

COUNTER = Metric("served", Kind.COUNTER, "Served.", ("route",))
GAUGE = Metric("waiting", Kind.GAUGE, "Waiting.")
HISTOGRAM = Metric("seconds", Kind.HISTOGRAM, "Seconds.", (), (1.0, 2.0))
HOME = labels(route="/")


def of(calls: list[None]) -> Measures:
    measures = Measures(lambda: calls.append(None))
    for metric in (COUNTER, GAUGE, HISTOGRAM):
        measures.define(metric)
    return measures


def test_counters_and_histograms_are_told_as_increments_and_gauges_as_they_are() -> None:
    measures = of([])
    for value in (1.0, 2.0):
        measures.add(COUNTER, HOME, value)
        measures.add(GAUGE, (), value)
        measures.add(HISTOGRAM, (), value)
    assert measures.take() == (
        [
            Measured("served", Kind.COUNTER, "Served.", HOME, 3.0),
            Measured("waiting", Kind.GAUGE, "Waiting.", (), 2.0),
            Measured("seconds", Kind.HISTOGRAM, "Seconds.", (), 3.0, (1.0, 2.0), [1, 1, 0]),
        ],
        0,
    )
    assert not measures
    measures.add(COUNTER, HOME, 5.0)
    assert [one.value for one in measures.take()[0]] == [5.0]


def test_somebody_is_called_when_there_is_something_to_tell_again() -> None:
    calls: list[None] = []
    measures = of(calls)
    for _ in range(3):
        measures.add(COUNTER, HOME, 1.0)
        measures.add(GAUGE, (), 1.0)
    assert len(calls) == 1
    measures.take()
    measures.add(GAUGE, (), 1.0)
    assert len(calls) == 2


def test_a_name_means_one_metric() -> None:
    measures = of([])
    measures.define(COUNTER)
    with pytest.raises(ValueError, match="'served' already: a counter with the tag keys"):
        measures.define(Metric("served", Kind.GAUGE, "", ("route",)))
    with pytest.raises(ValueError, match=r"boundaries \(1.0, 2.0\)"):
        measures.define(Metric("seconds", Kind.HISTOGRAM, "", (), (1.0,)))


def test_beyond_its_bound_new_series_of_a_metric_are_dropped_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    measures = of([])
    for number in range(MOST_OF_ONE + 5):
        measures.add(COUNTER, labels(route=str(number)), 1.0)
    measures.add(COUNTER, labels(route="0"), 1.0)
    measures.add(GAUGE, (), 1.0)
    measured, dropped = measures.take()
    assert (len(measured), dropped) == (MOST_OF_ONE + 1, 5)
    assert measured[0].value == 2.0
    assert len(caplog.records) == 1
    assert "Tags must have few values" in caplog.text


def test_all_metrics_of_a_process_together_are_bounded() -> None:
    measures = of([])
    others = [Metric(f"other_{index}", Kind.COUNTER, "Other.", ("route",)) for index in range(3)]
    for metric in others:
        measures.define(metric)
        for number in range(MOST_SERIES // 2):
            measures.add(metric, labels(route=str(number)), 1.0)
    measured, dropped = measures.take()
    assert (len(measured), dropped) == (MOST_SERIES, MOST_SERIES // 2)


def test_a_copy_of_the_process_counts_nothing_and_waits_for_no_lock() -> None:
    calls: list[None] = []
    measures = of(calls)
    measures._lock.acquire()
    measures.disown()
    measures.add(COUNTER, HOME, 1.0)
    assert (measures.take(), calls) == (([], 0), [])


def test_any_thread_counts() -> None:
    measures = of([])

    def count() -> None:
        for _ in range(1000):
            measures.add(COUNTER, HOME, 1.0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken = 0.0
    while any(thread.is_alive() for thread in threads):
        taken += sum(one.value for one in measures.take()[0])
    for thread in threads:
        thread.join()
    taken += sum(one.value for one in measures.take()[0])
    assert taken == 4000
