"""What a service counts. Plain numbers in memory; the Prometheus client is imported when somebody reads them.

Names follow Prometheus' conventions: they begin with ``shoal_`` (added here), carry base units, and counters end in
``_total``. Labels must have few values.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Labels = tuple[tuple[str, str], ...]
Reading = float | Mapping[Labels, float]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


def labels(**values: str) -> Labels:
    """Return labels in the form in which they are kept."""
    return tuple(sorted(values.items()))


class Counter:
    """A number that only rises."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        """Count ``amount`` more."""
        self.value += amount


class Histogram:
    """How often which values were seen; ``bounds`` are the upper ends of its buckets."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """Yield each bucket's upper end and how many values were at most that."""
        seen = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            yield ("+Inf" if bound == float("inf") else repr(bound)), float(seen)


class Metrics:
    """All that one service counts; asking twice for the same name and labels gives the same counter."""

    def __init__(self) -> None:
        self._descriptions: dict[str, str] = {}
        self._counters: dict[str, dict[Labels, Counter]] = {}
        self._histograms: dict[str, dict[Labels, Histogram]] = {}
        self._gauges: dict[str, Callable[[], Reading]] = {}
        self._totals: dict[str, Callable[[], Reading]] = {}

    def counter(self, name: str, description: str, **values: str) -> Counter:
        """Return the counter ``shoal_<name>`` (``name`` ends in ``_total``) with these labels."""
        self._descriptions[name] = description
        return self._counters.setdefault(name, {}).setdefault(labels(**values), Counter())

    def histogram(
        self, name: str, description: str, bounds: tuple[float, ...] = SECONDS_BOUNDS, **values: str
    ) -> Histogram:
        """Return the histogram ``shoal_<name>`` with these labels."""
        self._descriptions[name] = description
        return self._histograms.setdefault(name, {}).setdefault(labels(**values), Histogram(bounds))

    def gauge(self, name: str, description: str, read: Callable[[], Reading]) -> None:
        """Have ``shoal_<name>`` read by ``read`` whenever somebody asks: one number, or one for each set of labels."""
        self._descriptions[name] = description
        self._gauges[name] = read

    def total(self, name: str, description: str, read: Callable[[], Reading]) -> None:
        """Have the counter ``shoal_<name>`` (``name`` ends in ``_total``) read by ``read``: who counts is elsewhere.

        It returns one number, or one for each set of labels.
        """
        self._descriptions[name] = description
        self._totals[name] = read

    def names(self) -> list[str]:
        """Return the full names of all that is counted, sorted."""
        return sorted(f"shoal_{name}" for name in self._descriptions)

    def exposition(self) -> bytes:
        """Return everything in Prometheus' text format (``CONTENT_TYPE``)."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(_Collector(self._families))
        return generate_latest(registry)

    def _families(self) -> Iterable[Metric]:
        """Yield everything as the Prometheus client wants it."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for name, counters in self._counters.items():
            counted = CounterMetricFamily(f"shoal_{name}", self._descriptions[name], labels=_label_names(counters))
            for key, counter in counters.items():
                counted.add_metric([value for _, value in key], counter.value)
            yield counted
        for name, read in self._totals.items():
            table = _table(read())
            counted = CounterMetricFamily(f"shoal_{name}", self._descriptions[name], labels=_label_names(table))
            for key, number in table.items():
                counted.add_metric([value for _, value in key], number)
            yield counted
        for name, read in self._gauges.items():
            table = _table(read())
            gauge = GaugeMetricFamily(f"shoal_{name}", self._descriptions[name], labels=_label_names(table))
            for key, number in table.items():
                gauge.add_metric([value for _, value in key], number)
            yield gauge
        for name, histograms in self._histograms.items():
            seen = HistogramMetricFamily(f"shoal_{name}", self._descriptions[name], labels=_label_names(histograms))
            for key, histogram in histograms.items():
                seen.add_metric([value for _, value in key], list(histogram.cumulative()), histogram.total)
            yield seen


class _Collector:
    """What the Prometheus client calls to read the numbers."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect


def _table(reading: Reading) -> Mapping[Labels, float]:
    """Return a reading as numbers by their labels."""
    return reading if isinstance(reading, Mapping) else {(): reading}


def _label_names(table: Mapping[Labels, Any]) -> list[str]:
    """Return the names of the labels of a metric, which all its series share."""
    return [name for name, _ in next(iter(table), ())]
