"""The benchmark's programs of several nodes, tiny: each starts a cluster of its own."""

from __future__ import annotations

from bench.measuring import Effort
from bench.transfers import broadcast, broadcast_beside, transfer


def test_the_programs_of_several_nodes_run_small() -> None:
    effort = Effort(repetitions=1, seconds=0.01)
    assert len(transfer("shoal", effort, size_bytes=8_000_000).samples) == 1
    assert len(broadcast_beside("shoal", effort, size_bytes=8_000_000, readers=2).samples) == 1
    measured = broadcast("shoal", effort, size_bytes=8_000_000, readers=2)
    assert measured.details["one_seconds"] > 0
