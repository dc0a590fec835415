"""Metrics of one's own: ``Counter``, ``Gauge``, ``Histogram``. They are shown by the node, with Shoal's own.

::

    requests = Counter("requests_total", description="Requests served.", tag_keys=("route",))
    requests.inc(tags={"route": "/"})

They can be used in drivers, tasks and actors, and by any thread. Every use of a name in a process is the same metric,
so a metric may be made wherever it is used. What is counted while the process belongs to no cluster is not counted.

Tags must have few values. A metric has at most 500 combinations of tags in a process, all of them together 1,000; what
is beyond is not counted, which a warning in the log and ``shoal_metric_series_dropped_total`` tell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from shoal_core.protocol.measures import LABEL_NAME, METRIC_NAME, Kind, Labels
from shoal_core.protocol.measures import Metric as Definition
from shoal_core.protocol.metrics import PREFIX
from shoal_core.runtime.runtime import Runtime

__all__ = ["Counter", "Gauge", "Histogram", "Metric"]

TOTAL = "_total"
MOST_BOUNDARIES = 100
MOST_CHARACTERS = 1000
"""A tag's value and a description have at most so many."""
_RESERVED_NAMES = (PREFIX, "process_", "scrape_")
_RESERVED_KEYS = {"le", "quantile", "job", "instance"}


class Metric:
    """What counters, gauges and histograms share: a name, a description, tags and their defaults."""

    _kind: ClassVar[Kind]

    def __init__(
        self,
        name: str,
        description: str = "",
        tag_keys: tuple[str, ...] | None = None,
        boundaries: tuple[float, ...] = (),
    ) -> None:
        keys = _checked_keys(tag_keys)
        _check_name(name)
        if not isinstance(description, str):
            raise TypeError(f"description must be a str, got {type(description).__name__}.")
        shown = f"{name.removesuffix(TOTAL)}{TOTAL}" if self._kind is Kind.COUNTER else name
        text = description[:MOST_CHARACTERS] or name
        self._definition = Definition(shown, self._kind, text, tuple(sorted(keys)), boundaries)
        self._name = name
        self._tag_keys = keys
        self._default_tags: dict[str, str] = {}
        self._runtime: Runtime | None = None

    def set_default_tags(self, default_tags: dict[str, str]) -> Self:
        """Set the values of tags where a call gives none; return the metric itself."""
        self._check_tags(default_tags)
        self._default_tags = dict(default_tags)
        return self

    @property
    def info(self) -> dict[str, Any]:
        """The name, the description, the tag keys and the default tags."""
        return {
            "name": self._name,
            "description": self._definition.text,
            "tag_keys": self._tag_keys,
            "default_tags": dict(self._default_tags),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self._arguments(), self._default_tags)

    def _arguments(self) -> tuple[Any, ...]:
        return self._name, self._definition.text, self._tag_keys

    def _record(self, value: float, tags: Mapping[str, str] | None) -> None:
        """Count a value in this process; ``ValueError`` if a tag has none, or is not one of the metric's."""
        labels = self._labels(tags)
        runtime = Runtime.current
        if runtime is None:
            return
        measures = runtime.reporter.measures
        if self._runtime is not runtime:
            measures.define(self._definition)
            self._runtime = runtime
        measures.add(self._definition, labels, float(value))

    def _labels(self, tags: Mapping[str, str] | None) -> Labels:
        if tags:
            self._check_tags(tags)
        given = {**self._default_tags, **(tags or {})}
        missing = [key for key in self._tag_keys if key not in given]
        if missing:
            raise ValueError(f"Missing value for tag key(s) {', '.join(missing)} of metric {self._name!r}.")
        return tuple((key, given[key]) for key in self._definition.labels)

    def _check_tags(self, tags: Mapping[str, str]) -> None:
        name = self._name
        for key, value in tags.items():
            if key not in self._tag_keys:
                raise ValueError(f"Unrecognized tag key {key!r} of metric {name!r}; it has {self._tag_keys}.")
            if not isinstance(value, str):
                raise TypeError(f"Tag {key!r} of metric {name!r} must be a str, got {type(value).__name__}.")
            if len(value) > MOST_CHARACTERS:
                raise ValueError(f"Tag {key!r} of metric {name!r} has {len(value)} characters, {MOST_CHARACTERS} may.")


class Counter(Metric):
    """A number that only rises. Prometheus shows it under its name with ``_total`` at the end."""

    _kind = Kind.COUNTER

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None) -> None:
        super().__init__(name, description, tag_keys)

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Count ``value`` more, which must be above 0 (``ValueError``)."""
        _check_number("value", value)
        if value <= 0:
            raise ValueError(f"A counter only rises: value must be above 0, got {value}.")
        self._record(value, tags)


class Gauge(Metric):
    """A number that goes up and down.

    Of the processes on a node that set the same tags, the one that has set it last is shown; a process's goes with it.
    """

    _kind = Kind.GAUGE

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] | None = None) -> None:
        super().__init__(name, description, tag_keys)

    def set(self, value: float | None, tags: Mapping[str, str] | None = None) -> None:
        """Set what the gauge shows; None changes nothing."""
        if value is None:
            return
        _check_number("value", value)
        self._record(value, tags)


class Histogram(Metric):
    """Counts values by size; ``boundaries`` are the upper ends of its buckets, above 0 and rising."""

    _kind = Kind.HISTOGRAM

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: Sequence[float] | None = None,
        tag_keys: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(name, description, tag_keys, _checked_boundaries(boundaries))

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Count one value."""
        _check_number("value", value)
        self._record(value, tags)

    @property
    def info(self) -> dict[str, Any]:
        """The name, the description, the tag keys, the default tags and the boundaries."""
        return {**super().info, "boundaries": list(self._definition.bounds)}

    def _arguments(self) -> tuple[Any, ...]:
        return self._name, self._definition.text, self._definition.bounds, self._tag_keys


def _remake(kind: type[Metric], arguments: tuple[Any, ...], default_tags: dict[str, str]) -> Metric:
    """Make a metric in the process that it was sent to."""
    return kind(*arguments).set_default_tags(default_tags)


def _check_name(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"A metric's name must be a str, got {type(name).__name__}.")
    if not METRIC_NAME.fullmatch(name) or len(name) > MOST_CHARACTERS:
        raise ValueError(f"{name!r} is no name for a metric: it takes letters, digits, '_' and ':', no digit first.")
    if name.startswith(_RESERVED_NAMES):
        raise ValueError(f"{name!r} is no name for a metric: {', '.join(_RESERVED_NAMES)} are others' beginnings.")


def _checked_keys(tag_keys: tuple[str, ...] | None) -> tuple[str, ...]:
    if tag_keys is None:
        return ()
    if not isinstance(tag_keys, (tuple, list)) or not all(isinstance(key, str) for key in tag_keys):
        raise TypeError(f"tag_keys must be a tuple of str, got {tag_keys!r}.")
    for key in tag_keys:
        if not LABEL_NAME.fullmatch(key) or key in _RESERVED_KEYS:
            raise ValueError(
                f"{key!r} is no tag key: it takes letters, digits and '_', no digit first, no '__' first, and none of "
                f"{', '.join(sorted(_RESERVED_KEYS))}."
            )
    if len(set(tag_keys)) != len(tag_keys):
        raise ValueError(f"tag_keys has a key twice: {tag_keys!r}.")
    return tuple(tag_keys)


def _checked_boundaries(boundaries: Sequence[float] | None) -> tuple[float, ...]:
    if not boundaries:
        raise ValueError("A histogram needs boundaries: the upper ends of its buckets, such as [0.1, 1, 10].")
    for boundary in boundaries:
        _check_number("Each boundary", boundary)
    numbers = tuple(float(boundary) for boundary in boundaries)
    if numbers[0] <= 0 or any(high <= low for low, high in itertools.pairwise(numbers)):
        raise ValueError(f"boundaries must be above 0 and rise, got {list(boundaries)}.")
    if len(numbers) > MOST_BOUNDARIES:
        raise ValueError(f"A histogram has at most {MOST_BOUNDARIES} boundaries, got {len(numbers)}.")
    return numbers


def _check_number(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be an int or a float, got {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value}.")
