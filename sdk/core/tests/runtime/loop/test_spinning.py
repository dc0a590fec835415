"""Looking for a moment before sleeping: it ends with what is awaited, and is given up where it does not help."""

from __future__ import annotations

import itertools
import sys

import pytest

from shoal_core.runtime.loop.spinning import MOST_IN_VAIN, TRIED_EACH, Spin
from shoal_core.runtime.worker.execution import _to_come_back_to


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have each look at the clock take a second; what is in the list is filled by ``look``."""
    seconds = itertools.count()
    monkeypatch.setattr("shoal_core.runtime.loop.spinning.time.perf_counter", lambda: float(next(seconds)))
    return []


def hopeful(seconds: float) -> Spin:
    """Return one that has helped before."""
    spin = Spin(seconds)
    while not spin.until(lambda: True):
        pass
    return spin


def test_it_ends_as_soon_as_what_is_awaited_has_come(looks: list[int]) -> None:
    def third() -> bool:
        looks.append(1)
        return len(looks) == 3

    assert hopeful(100.0).until(third)
    assert len(looks) == 3


def test_it_ends_in_vain_when_the_time_is_over(looks: list[int]) -> None:
    def never() -> bool:
        looks.append(1)
        return False

    assert not hopeful(5.0).until(never)
    assert len(looks) == 4


def test_who_waits_so_is_interrupted_at_once() -> None:
    frames = []

    def look() -> bool:
        frames.append(sys._getframe(1))
        return True

    assert hopeful(100.0).until(look)
    assert [_to_come_back_to(frame) for frame in frames] == [None], "nothing is half done there"


def test_what_is_in_vain_again_and_again_is_tried_only_now_and_then(looks: list[int]) -> None:
    spin = hopeful(1.5)  # one look each time

    def never() -> bool:
        looks.append(1)
        return False

    tried = []
    for _ in range(MOST_IN_VAIN + 3 * TRIED_EACH):
        before = len(looks)
        assert not spin.until(never)
        tried.append(len(looks) > before)
    assert tried[:MOST_IN_VAIN] == [True] * MOST_IN_VAIN
    assert sum(tried[MOST_IN_VAIN:]) == 3
    while not spin.until(lambda: True):
        pass
    assert [spin.until(never) for _ in range(MOST_IN_VAIN)] == [False] * MOST_IN_VAIN
    assert len(looks) == sum(tried) + MOST_IN_VAIN, "what has helped once is tried each time again"


def test_at_first_waits_are_taken_for_long_ones(looks: list[int]) -> None:
    spin = Spin(seconds=100.0)
    assert not any(spin.until(lambda: True) for _ in range(TRIED_EACH - MOST_IN_VAIN))
    assert spin.until(lambda: True)
