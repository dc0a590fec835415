"""The benchmark's row about tracing, tiny: with two programs and their clusters."""

from __future__ import annotations

from bench.measuring import Effort
from bench.traces import traced_tasks


def test_the_row_about_tracing_has_spans_sent() -> None:
    measured = traced_tasks("shoal", Effort(repetitions=1, seconds=0.01))
    assert len(measured.samples) == 1
    assert measured.details["requests_to_collector"] > 0
