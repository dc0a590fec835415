"""What travels of a trace: one string in records, two headers in messages, and who decides whether it is recorded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

from shoal_core.protocol.traces import (
    ID_LIMIT,
    TRACEPARENT,
    TRACESTATE,
    UNRECORDED,
    TraceParent,
    headers_of,
    is_recorded,
    parse,
    sampling_bound,
    trace_of,
)

PARENTS = st.builds(
    TraceParent,
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.integers(0, 127).map(lambda flags: 2 * flags + 1),
    st.sampled_from(["", "vendor=1", "a=1,b=2"]),
)


@given(PARENTS)
def test_a_trace_comes_back_out_of_a_record_and_out_of_headers(parent: TraceParent) -> None:
    trace = str(parent)
    assert is_recorded(trace)
    assert parse(trace) == parent
    assert trace_of(headers_of(trace)) == trace


@given(st.text(alphabet="0123456789abcdef-gZ ", max_size=70))
def test_what_is_no_trace_context_names_no_span(text: str) -> None:
    parent = parse(text)
    assert parent is None or (parent.trace_id and parent.span_id)


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),  # decided against
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"00-{TRACE}-{SPAN}-01-more", False),  # version 00 has four parts
        (f"01-{TRACE}-{SPAN}-01-more", True),  # a later one may have more
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (UNRECORDED, False),
        ("", False),
    ],
)
def test_the_rules_of_w3c(text: str, named: bool) -> None:
    assert (parse(text) is not None) == named


def test_headers_are_there_for_what_is_recorded() -> None:
    trace = f"00-{TRACE}-{SPAN}-01"
    assert headers_of(trace) == {TRACEPARENT: trace}
    assert headers_of(f"{trace} vendor=1") == {TRACEPARENT: trace, TRACESTATE: "vendor=1"}
    assert headers_of(UNRECORDED) == headers_of("") == {}
    assert trace_of(None) == trace_of({"other": "header"}) == ""
    assert not is_recorded(UNRECORDED)
    assert not is_recorded("")


@pytest.mark.parametrize(
    ("environment", "bound"),
    [
        ({}, ID_LIMIT),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, 0),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, 0),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, ID_LIMIT),
        ({"OTEL_TRACES_SAMPLER": "no such sampler"}, ID_LIMIT),
        ({"OTEL_TRACES_SAMPLER": "traceidratio"}, ID_LIMIT),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "much"}, ID_LIMIT),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "7"}, ID_LIMIT),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, ID_LIMIT // 4),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, 0),
    ],
)
def test_the_environment_says_how_many_are_recorded(environment: dict[str, str], bound: int) -> None:
    assert sampling_bound(environment) == bound


@given(st.floats(0, 1))
def test_the_bound_is_that_of_opentelemetry(ratio: float) -> None:
    environment = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": str(ratio)}
    assert sampling_bound(environment) == TraceIdRatioBased.get_bound_for_rate(ratio)
