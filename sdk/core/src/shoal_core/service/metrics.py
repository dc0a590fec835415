"""What a service counts. Plain numbers in memory; the Prometheus client is imported when somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from shoal_core.protocol.measures import Counter, Family, Histogram, Kind, Labels, Sample, labels
from shoal_core.protocol.measures import Metric as About

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Reading = float | Mapping[Labels, float]
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """All that one service counts; asking twice for the same metric and labels gives the same counter."""

    def __init__(self) -> None:
        self._counters: dict[About, dict[Labels, Counter]] = {}
        self._histograms: dict[About, dict[Labels, Histogram]] = {}
        self._readings: dict[About, Callable[[], Reading]] = {}
        self._told: list[Callable[[], Iterable[Family]]] = []

    def counter(self, metric: About, **values: str) -> Counter:
        """Return the counter with these labels."""
        return self._counters.setdefault(metric, {}).setdefault(_checked(metric, values), Counter())

    def histogram(self, metric: About, **values: str) -> Histogram:
        """Return the histogram with these labels."""
        key = _checked(metric, values)
        return self._histograms.setdefault(metric, {}).setdefault(key, Histogram(metric.bounds))

    def read(self, metric: About, read: Callable[[], Reading]) -> None:
        """Have a gauge, or a counter that is kept elsewhere, read whenever somebody asks.

        ``read`` returns one number, or one for each set of labels.
        """
        self._readings[metric] = read

    def tell(self, told: Callable[[], Iterable[Family]]) -> None:
        """Have metrics that others count told with one's own, whenever somebody asks."""
        self._told.append(told)

    def names(self) -> list[str]:
        """Return the full names of all that this service counts itself, sorted."""
        return sorted(metric.name for metric in (*self._counters, *self._histograms, *self._readings))

    def exposition(self, *, process: bool = False) -> bytes:
        """Return everything in Prometheus' text format (``CONTENT_TYPE``); with what the ``process`` takes, if asked.

        The latter are the Prometheus client's ``process_…``: seconds of CPU, bytes of memory, open files.
        """
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

        registry = CollectorRegistry()
        registry.register(_Collector(self._families))
        if process:
            ProcessCollector(registry=registry)
        return generate_latest(registry)

    def _families(self) -> Iterable[Metric]:
        """Yield everything as the Prometheus client wants it."""
        for metric, counters in self._counters.items():
            yield _family(metric, {key: counter.value for key, counter in counters.items()})
        for metric, read in self._readings.items():
            reading = read()
            yield _family(metric, reading if isinstance(reading, Mapping) else {(): reading})
        for metric, histograms in self._histograms.items():
            yield _family(metric, histograms)
        for told in self._told:
            for metric, series in told():
                yield _family(metric, series)


class _Collector:
    """What the Prometheus client calls to read the numbers."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect


def _checked(metric: About, values: Mapping[str, str]) -> Labels:
    """Return labels as they are kept; ``ValueError`` if they are not the metric's."""
    if set(values) != set(metric.labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, not {tuple(values)}")
    return labels(**values)


def _family(metric: About, series: Mapping[Labels, Sample]) -> Metric:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    names = sorted(metric.labels)
    if metric.kind is Kind.HISTOGRAM:
        seen = HistogramMetricFamily(metric.name, metric.text, labels=names)
        for key, histogram in series.items():
            assert isinstance(histogram, Histogram)
            seen.add_metric([value for _, value in key], list(histogram.cumulative()), histogram.total)
        return seen
    family = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
    plain = family(metric.name, metric.text, labels=names)
    for key, number in series.items():
        assert not isinstance(number, Histogram)
        plain.add_metric([value for _, value in key], number)
    return plain
