"""``util.as_completed`` and ``util.map_unordered``."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.util import as_completed, map_unordered
from tests.integration.waiting import get

pytestmark = pytest.mark.usefixtures("two_cpus")


@shoal.remote
def double(number: int) -> int:
    return 2 * number


@shoal.remote
def after(path: str, number: int) -> int:
    while not os.path.exists(path):
        time.sleep(0.01)
    return number


class DoublerClass:
    def double(self, number: int) -> int:
        return 2 * number


def test_what_is_ready_first_comes_first(tmp_path: Path) -> None:
    refs = [after.remote(str(tmp_path / "go"), 0), *(double.remote(number) for number in range(1, 5))]
    values = as_completed(refs, chunk_size=2)
    assert sorted(itertools.islice(values, 4)) == [2, 4, 6, 8]
    (tmp_path / "go").touch()
    assert list(values) == [0]
    assert {get(ref) for ref in as_completed(refs, yield_obj_refs=True)} == {0, 2, 4, 6, 8}
    assert list(as_completed([])) == []


@pytest.mark.parametrize("backpressure_size", [1, 3, None])
def test_a_function_is_mapped(backpressure_size: int | None) -> None:
    doubled = list(map_unordered(double, range(20), backpressure_size=backpressure_size, chunk_size=4))
    assert sorted(doubled) == list(range(0, 40, 2))
    actor = shoal.remote(DoublerClass).remote()
    assert sorted(map_unordered(actor.double, range(5))) == list(range(0, 10, 2))


def test_no_more_is_taken_than_there_is_room_for() -> None:
    taken = []
    numbers = (taken.append(number) or number for number in itertools.count())  # type: ignore[func-returns-value]
    results = map_unordered(double, numbers, backpressure_size=3)
    assert len(taken) == 3
    next(results)
    assert len(taken) <= 6


def test_an_error_comes_in_its_turn() -> None:
    @shoal.remote
    def fail(number: int) -> int:
        raise KeyError(number)

    with pytest.raises(KeyError):
        next(map_unordered(fail, [1]))


@pytest.mark.parametrize("wrong", [{"chunk_size": 0}, {"backpressure_size": 0}])
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        map_unordered(double, [1], **wrong)
    with pytest.raises(TypeError, match="remote function"):
        map_unordered(abs, [1])  # type: ignore[arg-type]
