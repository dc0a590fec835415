"""What user code counts in one process (``shoal.util.metrics``): any thread adds, the I/O thread takes and reports.

Only what has changed since it was last taken is told, as increments; see ``MetricsReported``. There are at most
``MOST_SERIES`` series in a process: labels with ever new values would fill up whatever keeps them. One metric has at
most ``MOST_OF_ONE``, so that it leaves room for others.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal_core.protocol.measures import Histogram, Kind, Labels, Metric
from shoal_core.protocol.records import Measured

logger = logging.getLogger("shoal.metrics")

MOST_SERIES = 1000
"""How many series one process may have, over all its metrics."""
MOST_OF_ONE = 500
"""How many of them may be one metric's."""


@dataclass(slots=True)
class _Series:
    """One series: what came since the last report, or what is now."""

    value: float = 0.0
    histogram: Histogram = field(default_factory=lambda: Histogram(()))


class Measures:
    """The series of one process. ``changed`` is called, from any thread, when there is something to report again."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._kinds: dict[str, Metric] = {}
        self._series: dict[tuple[str, Labels], _Series] = {}
        self._counts: Counter[str] = Counter()
        self._touched: dict[tuple[str, Labels], None] = {}
        self._dropped = 0
        self._warned: set[str] = set()
        self._disowned = False

    def __bool__(self) -> bool:
        """Whether there is something to report."""
        return bool(self._touched or self._dropped)

    def define(self, metric: Metric) -> None:
        """Have a metric known; ``ValueError`` if another kind of metric, or other labels, have its name here."""
        with self._lock:
            known = self._kinds.setdefault(metric.name, metric)
        if (known.kind, known.labels, known.bounds) != (metric.kind, metric.labels, metric.bounds):
            raise ValueError(
                f"This process has a metric {metric.name!r} already: a {known.kind} with the tag keys {known.labels}"
                f"{f' and the boundaries {known.bounds}' if known.bounds else ''}. Give the other one another name."
            )

    def add(self, metric: Metric, labels: Labels, value: float) -> None:
        """Add to a counter, set a gauge, or count a value in a histogram."""
        with self._lock:
            first = not self._touched
            series = self._find(metric, labels)
            if series is None:
                return
            if metric.kind is Kind.COUNTER:
                series.value += value
            elif metric.kind is Kind.GAUGE:
                series.value = value
            else:
                series.histogram.observe(value)
        if first:
            self._changed()

    def take(self) -> tuple[list[Measured], int]:
        """Return what has changed since the last time, and how many series found no room meanwhile."""
        with self._lock:
            measured = [self._taken(name, labels) for name, labels in self._touched]
            self._touched = {}
            dropped, self._dropped = self._dropped, 0
        return measured, dropped

    def disown(self) -> None:
        """Count nothing any more: this is a copy of the process, in which another thread may have held the lock."""
        self._lock = threading.Lock()
        self._disowned = True
        self._changed = _nobody_reports

    def _find(self, metric: Metric, labels: Labels) -> _Series | None:
        """Return a series, made at its first use, and note that it changes; None where there is no room for it."""
        if self._disowned:
            return None
        key = (metric.name, labels)
        series = self._series.get(key)
        if series is None:
            if len(self._series) >= MOST_SERIES or self._counts[metric.name] >= MOST_OF_ONE:
                self._dropped += 1
                self._warn(metric)
                return None
            self._counts[metric.name] += 1
            series = self._series[key] = _Series(histogram=Histogram(metric.bounds))
        self._touched[key] = None
        return series

    def _warn(self, metric: Metric) -> None:
        if metric.name not in self._warned:
            self._warned.add(metric.name)
            logger.warning(
                "metric %s: new combinations of tags are not counted, since it has %d already, and all metrics of this "
                "process have %d (at most %d and %d). Tags must have few values: no ids, no texts of errors.",
                metric.name,
                self._counts[metric.name],
                len(self._series),
                MOST_OF_ONE,
                MOST_SERIES,
            )

    def _taken(self, name: str, labels: Labels) -> Measured:
        metric, series = self._kinds[name], self._series[name, labels]
        if metric.kind is Kind.HISTOGRAM:
            seen, series.histogram = series.histogram, Histogram(metric.bounds)
            return Measured(name, metric.kind, metric.text, labels, seen.total, metric.bounds, seen.counts)
        value = series.value
        if metric.kind is Kind.COUNTER:
            series.value = 0.0
        return Measured(name, metric.kind, metric.text, labels, value)


def _nobody_reports() -> None:
    """A copy of a process tells nobody anything."""
