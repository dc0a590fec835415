"""``shoal.util.metrics``: what may be said, and what is counted in a process of a cluster and outside one."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.util.metrics import Counter, Gauge, Histogram
from shoal_core.protocol.measures import labels
from shoal_core.runtime.reports.measures import Measures
from shoal_core.runtime.runtime import Runtime


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Measures:
    """Be a process of a cluster, as far as metrics go."""
    measures = Measures(lambda: None)
    monkeypatch.setattr(Runtime, "current", SimpleNamespace(reporter=SimpleNamespace(measures=measures)))
    return measures


def test_values_are_counted_with_their_tags(measures: Measures) -> None:
    requests = Counter("requests", "Requests.", ("route", "method")).set_default_tags({"method": "GET"})
    requests.inc(tags={"route": "/"})
    requests.inc(2, {"route": "/", "method": "PUT"})
    Gauge("depth").set(3)
    Gauge("depth").set(None)
    Histogram("seconds", boundaries=[0.1, 1]).observe(0.5)
    told = {(one.name, one.labels): one.value for one in measures.take()[0]}
    assert told == {
        ("requests_total", labels(method="GET", route="/")): 1,
        ("requests_total", labels(method="PUT", route="/")): 2,
        ("depth", ()): 3,
        ("seconds", ()): 0.5,
    }


def test_outside_a_cluster_nothing_is_counted_but_mistakes_are_told() -> None:
    assert Runtime.current is None
    counter = Counter("requests", tag_keys=("route",))
    counter.inc(tags={"route": "/"})
    with pytest.raises(ValueError, match="Missing value for tag key"):
        counter.inc()


def test_a_metric_says_what_it_is() -> None:
    histogram = Histogram("seconds", "How long.", [1, 2], ("a",)).set_default_tags({"a": "b"})
    assert histogram.info == {
        "name": "seconds",
        "description": "How long.",
        "tag_keys": ("a",),
        "default_tags": {"a": "b"},
        "boundaries": [1.0, 2.0],
    }


@pytest.mark.parametrize(
    "metric",
    [Counter("c", "C.", ("a",)), Gauge("g", "G.", ("a",)), Histogram("h", "H.", [1.0], ("a",))],
    ids=["counter", "gauge", "histogram"],
)
def test_a_metric_can_be_sent_along(metric: Counter | Gauge | Histogram) -> None:
    metric.set_default_tags({"a": "b"})
    arrived = pickle.loads(pickle.dumps(metric))
    assert type(arrived) is type(metric)
    assert arrived.info == metric.info


def test_the_same_name_for_something_else_is_refused(measures: Measures) -> None:
    Counter("requests").inc()
    Counter("requests_total").inc()
    assert [one.value for one in measures.take()[0]] == [2.0], "Prometheus shows both under one name"
    with pytest.raises(ValueError, match="has a metric 'requests_total' already: a counter"):
        Gauge("requests_total").set(1)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("",), ValueError, "no name for a metric"),
        (("2fast",), ValueError, "no digit first"),
        (("requests.total",), ValueError, "'requests.total'"),
        (("shoal_requests",), ValueError, "shoal_"),
        ((7,), TypeError, "must be a str, got int"),
        (("c", 7), TypeError, "description"),
        (("c", "", "route"), TypeError, "tag_keys must be a tuple of str"),
        (("c", "", (7,)), TypeError, "tag_keys must be a tuple of str"),
        (("c", "", ("le",)), ValueError, "'le' is no tag key"),
        (("c", "", ("a-b",)), ValueError, "'a-b' is no tag key"),
        (("c", "", ("a", "a")), ValueError, "twice"),
    ],
)
def test_what_cannot_be_a_metric_is_refused(arguments: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Counter(*arguments)


@pytest.mark.parametrize(
    ("boundaries", "error"),
    [(None, ValueError), ([], ValueError), ([0, 1], ValueError), ([2, 1], ValueError), (["1"], TypeError)],
)
def test_what_cannot_be_boundaries_is_refused(boundaries: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="oundar"):
        Histogram("h", boundaries=boundaries)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), ("1", TypeError), (True, TypeError)])
def test_a_counter_only_rises_by_numbers(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="value"):
        Counter("c").inc(value)


@pytest.mark.parametrize(
    ("tags", "error", "says"),
    [
        ({"a": "x", "b": "y"}, ValueError, "Unrecognized tag key 'b'"),
        ({"a": 7}, TypeError, "must be a str, got int"),
        ({"a": "x" * 1001}, ValueError, "1001 characters"),
    ],
)
def test_wrong_tags_are_refused(tags: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Gauge("g", tag_keys=("a",)).set(1, tags)
    with pytest.raises(error, match=says):
        Gauge("g", tag_keys=("a",)).set_default_tags(tags)
