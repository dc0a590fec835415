"""What travels of a trace: W3C Trace Context, in headers of messages, and as one string in records.

Whether a trace is recorded is decided once, at ``.remote()``, and travels with everything that comes of it. The string,
the *trace* of a record or message, is one of three:

==================================  ================================================================
``""``                              nobody traces: tracing is off where it comes from
``"-"`` (``UNRECORDED``)            it was decided against recording
``traceparent[ tracestate]``        it is recorded; what follows hangs below the span that is named
==================================  ================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

Attributes = Mapping[str, str | int | float | bool]

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
UNRECORDED = "-"
SAMPLED = 1
ID_LIMIT = 1 << 64
"""The lower half of a trace's id, which is random, lies below this; sampling by ratio goes by it."""

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


class TraceParent(NamedTuple):
    """A span that is recorded, by its ids; flags and ``state``, the vendors' part, are passed on as they are."""

    trace_id: int
    span_id: int
    flags: int = SAMPLED
    state: str = ""

    def __str__(self) -> str:
        """Return the trace of what hangs below this span."""
        return trace_named(self.trace_id, self.span_id, self.flags, self.state)


@dataclass(frozen=True, slots=True)
class Spanned:
    """The span of something that a service's core asks for, which cannot make one itself: the engine does.

    It hangs below what ``trace`` names, if that is recorded, and began at ``began_at`` by the core's clock.
    """

    name: str
    trace: str
    began_at: float
    attributes: Attributes


def trace_named(trace_id: int, span_id: int, flags: int, state: str) -> str:
    """Return the trace of what hangs below the span with these ids, which is recorded."""
    traceparent = f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"
    return f"{traceparent} {state}" if state else traceparent


def is_recorded(trace: str) -> bool:
    """Tell whether a trace is recorded; cheap."""
    return len(trace) > len(UNRECORDED)


def parse(trace: str) -> TraceParent | None:
    """Return the span that a trace names; None where it names none that is recorded, or is no W3C Trace Context."""
    traceparent, _, state = trace.partition(" ")
    matched = _TRACEPARENT.fullmatch(traceparent)
    if matched is None:
        return None
    version, trace_id, span_id, flag_digits, rest = matched.groups()
    flags = int(flag_digits, 16)
    if version == "ff" or (version == "00" and rest) or not flags & SAMPLED:
        return None
    parent = TraceParent(int(trace_id, 16), int(span_id, 16), flags, state)
    return parent if parent.trace_id and parent.span_id else None


def headers_of(trace: str) -> dict[str, str]:
    """Return the headers of a message that belongs to a trace; none where it is not recorded."""
    if not is_recorded(trace):
        return {}
    traceparent, _, state = trace.partition(" ")
    return {TRACEPARENT: traceparent, TRACESTATE: state} if state else {TRACEPARENT: traceparent}


def trace_of(headers: Mapping[str, str] | None) -> str:
    """Return the trace that a message's headers name."""
    if not headers or TRACEPARENT not in headers:
        return ""
    state = headers.get(TRACESTATE, "")
    return f"{headers[TRACEPARENT]} {state}" if state else headers[TRACEPARENT]


def sampling_bound(environment: Mapping[str, str]) -> int:
    """Return below which number the lower half of a trace's id has to lie for a new trace to be recorded.

    This is what OpenTelemetry's samplers decide for a trace without a parent, by ``OTEL_TRACES_SAMPLER`` and
    ``OTEL_TRACES_SAMPLER_ARG``; like them, it takes what it does not understand for "always".
    """
    sampler = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower().removeprefix("parentbased_")
    if sampler == "always_off":
        return 0
    if sampler != "traceidratio":
        return ID_LIMIT
    try:
        ratio = float(environment.get("OTEL_TRACES_SAMPLER_ARG", "1"))
    except ValueError:
        return ID_LIMIT
    return round(ratio * ID_LIMIT) if 0 <= ratio <= 1 else ID_LIMIT
