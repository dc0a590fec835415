"""What processes have counted: of their own tasks (names of the catalogue), and what user code counts (all others).

Reports are increments, which the node adds up for good, so that a counter goes on rising when processes end. Gauges are
different: each process has one of its own, which ends with it. Of Shoal's own the sum is shown, of users' the one that
was set last.

What is kept is bounded. Beyond ``MOST_SERIES`` of users the one that was reported longest ago goes, which to Prometheus
looks like a counter that was reset; beyond ``MOST_FUNCTIONS`` names of functions, others are counted together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal_core.protocol.ids import ProcessId
from shoal_core.protocol.measures import (
    LABEL_NAME,
    METRIC_NAME,
    Counter,
    Family,
    Histogram,
    Kind,
    Labels,
    Metric,
    Sample,
    labels,
)
from shoal_core.protocol.metrics import (
    CATALOGUE,
    PREFIX,
    TASK_FETCH_SECONDS,
    TASK_QUEUE_SECONDS,
    TASK_RETRIES,
    TASK_RUN_SECONDS,
    TASKS_FINISHED,
    TASKS_PENDING,
)
from shoal_core.protocol.records import Measured, MetricsReported

MOST_SERIES = 5000
MOST_FUNCTIONS = 500
OTHERS = "(other)"
OF_PROCESSES = (TASKS_FINISHED, TASK_RETRIES, TASKS_PENDING, TASK_QUEUE_SECONDS, TASK_RUN_SECONDS, TASK_FETCH_SECONDS)
"""What processes may report under Shoal's own names."""


@dataclass(slots=True)
class _Series:
    """One series: the sum of all reports, or each process's gauge, the last that was set at the end."""

    counter: Counter = field(default_factory=Counter)
    histogram: Histogram = field(default_factory=lambda: Histogram(()))
    gauges: dict[ProcessId, float] = field(default_factory=dict)

    def sample(self, kind: Kind, *, is_sum: bool) -> Sample | None:
        """Return what is shown; None where all who had set a gauge have ended."""
        if kind is Kind.COUNTER:
            return self.counter.value
        if kind is Kind.HISTOGRAM:
            return self.histogram
        if is_sum:
            return sum(self.gauges.values())
        return next(reversed(self.gauges.values()), None)


class ReportedMetrics:
    """The metrics of all processes that tell this node of them."""

    def __init__(self) -> None:
        self.dropped = 0
        """Series for which a process or this node had no room, or that contradict others of the same name."""
        self._own: dict[tuple[Metric, Labels], _Series] = {
            (metric, ()): _Series(histogram=Histogram(metric.bounds)) for metric in OF_PROCESSES if not metric.labels
        }
        self._functions: set[str] = set()
        self._metrics: dict[str, Metric] = {}
        self._users: dict[tuple[str, Labels], _Series] = {}

    @property
    def series(self) -> int:
        """How many series of users there are."""
        return len(self._users)

    def take(self, process: ProcessId, report: MetricsReported) -> None:
        """Add what a process has counted since its last report."""
        self.dropped += report.dropped
        for measured in report.measured:
            if measured.name.startswith(PREFIX):
                self._take_own(process, measured)
            else:
                self._take_users(process, measured)

    def process_died(self, process: ProcessId) -> None:
        """Forget the gauges of a process."""
        for series in (*self._own.values(), *self._users.values()):
            series.gauges.pop(process, None)
        for key in [key for key, series in self._users.items() if self._is_over(key[0], series)]:
            self._remove(key)

    def families(self) -> Iterator[Family]:
        """Yield every metric with its series, as they are now."""
        by_metric: dict[Metric, dict[Labels, Sample]] = {metric: {} for metric in OF_PROCESSES}
        for (metric, key), series in self._own.items():
            sample = series.sample(metric.kind, is_sum=True)
            assert sample is not None
            by_metric[metric][key] = sample
        for (name, key), series in self._users.items():
            metric = self._metrics[name]
            if (sample := series.sample(metric.kind, is_sum=False)) is not None:
                by_metric.setdefault(metric, {})[key] = sample
        yield from by_metric.items()

    # ------------------------------------------------------------------------------- Shoal's own

    def _take_own(self, process: ProcessId, measured: Measured) -> None:
        metric = CATALOGUE.get(measured.name)
        if metric is None or metric not in OF_PROCESSES or {name for name, _ in measured.labels} != set(metric.labels):
            self.dropped += 1
            return
        key = measured.labels
        if metric is TASKS_FINISHED:
            values = dict(key)
            key = labels(function=self._shown(values["function"]), outcome=values["outcome"])
        series = self._own.setdefault((metric, key), _Series(histogram=Histogram(metric.bounds)))
        self._add(series, metric, process, measured)

    def _shown(self, function: str) -> str:
        if function not in self._functions:
            if len(self._functions) >= MOST_FUNCTIONS:
                return OTHERS
            self._functions.add(function)
        return function

    # ------------------------------------------------------------------------------- users'

    def _take_users(self, process: ProcessId, measured: Measured) -> None:
        names = tuple(name for name, _ in measured.labels)
        if not METRIC_NAME.fullmatch(measured.name) or not all(map(LABEL_NAME.fullmatch, names)):
            self.dropped += 1
            return
        told = Metric(measured.name, measured.kind, measured.text, names, measured.bounds)
        metric = self._metrics.setdefault(measured.name, told)
        if (metric.kind, metric.labels, metric.bounds) != (told.kind, told.labels, told.bounds):
            self.dropped += 1
            return
        key = (measured.name, measured.labels)
        series = self._users.pop(key, None) or _Series(histogram=Histogram(metric.bounds))
        self._users[key] = series
        self._add(series, metric, process, measured)
        if len(self._users) > MOST_SERIES:
            self.dropped += 1
            self._remove(next(iter(self._users)))

    def _add(self, series: _Series, metric: Metric, process: ProcessId, measured: Measured) -> None:
        if metric.kind is Kind.COUNTER:
            series.counter.add(max(0.0, measured.value))
        elif metric.kind is Kind.GAUGE:
            series.gauges.pop(process, None)
            series.gauges[process] = measured.value
        elif len(measured.counts) == len(series.histogram.counts):
            series.histogram.add(measured.counts, measured.value)
        else:
            self.dropped += 1

    def _is_over(self, name: str, series: _Series) -> bool:
        return self._metrics[name].kind is Kind.GAUGE and not series.gauges

    def _remove(self, key: tuple[str, Labels]) -> None:
        del self._users[key]
        if not any(name == key[0] for name, _ in self._users):
            del self._metrics[key[0]]
