"""What can be counted: kinds of metrics, and the numbers themselves. Plain data, without locks.

Names follow Prometheus' conventions: they carry base units, and those of counters end in ``_total``. Labels must have
few values.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

Labels = tuple[tuple[str, str], ...]
METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
SECONDS_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_SECONDS_BOUNDS = (0.0001, 0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Kind(StrEnum):
    """How a metric behaves: a counter only rises, a gauge is whatever it is now, a histogram counts by size."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its full name, its kind, what it means, and the names of its labels, which all its series have.

    ``bounds`` are the upper ends of a histogram's buckets. ``services`` show it.
    """

    name: str
    kind: Kind
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    services: tuple[str, ...] = ()


def labels(**values: str) -> Labels:
    """Return labels in the form in which they are kept: by name."""
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
    """How often which values were seen; ``bounds`` are the upper ends of its buckets, of which the last has none."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, once or several times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def observe_all(self, values: list[float]) -> None:
        """Count many values; faster than one after the other."""
        values.sort()
        ends = [bisect_right(values, bound) for bound in self.bounds]
        for index, (end, before) in enumerate(zip((*ends, len(values)), (0, *ends), strict=True)):
            self.counts[index] += end - before
        self.total += sum(values)

    def add(self, counts: Sequence[int], total: float) -> None:
        """Count what was counted elsewhere, in the same buckets."""
        self.counts = [mine + more for mine, more in zip(self.counts, counts, strict=True)]
        self.total += total

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """Yield each bucket's upper end and how many values were at most that."""
        seen = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            seen += count
            yield ("+Inf" if bound == float("inf") else repr(bound)), float(seen)


Sample = float | Histogram
Family = tuple[Metric, Mapping[Labels, Sample]]
"""A metric with its series, as they are now."""
