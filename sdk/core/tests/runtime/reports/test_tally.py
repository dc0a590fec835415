"""What a process counts of its tasks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.measures import labels
from shoal_core.protocol.records import Measured
from shoal_core.runtime.reports.tally import MOST_FUNCTIONS, OTHERS, Tally


def finished(measured: list[Measured]) -> dict[tuple[str, str], float]:
    """Return how many tasks ended, by function and outcome."""
    ends = [(dict(one.labels), one.value) for one in measured if one.name == "shoal_tasks_finished_total"]
    return {(of["function"], of["outcome"]): count for of, count in ends}


def test_ends_are_counted_by_function_and_outcome() -> None:
    tally = Tally()
    tally.names += ["f", "f", "g"]
    tally.failed("f", "task")
    tally.failed("f", "task_cancelled")
    tally.failed("f", "task_group_removed")
    tally.failed("g", "worker_crashed")
    tally.failed("g", "task_unschedulable")
    assert finished(tally.take(0)) == {
        ("f", "ok"): 2,
        ("g", "ok"): 1,
        ("f", "failed"): 1,
        ("f", "cancelled"): 2,
        ("g", "lost"): 1,
        ("g", "unschedulable"): 1,
    }


def test_what_was_taken_is_not_taken_again() -> None:
    tally = Tally()
    tally.names.append("f")
    tally.seconds.append(0.5)
    tally.retries["raised"] += 1
    tally.queue_seconds.observe(0.1)
    tally.fetch_seconds.observe(0.1)
    assert tally.has_news
    assert len(tally.take(3)) == 6
    assert not tally.has_news
    assert tally.take(3) == []
    assert [(one.name, one.value) for one in tally.take(0)] == [("shoal_tasks_pending", 0)]


def test_retries_are_told_by_reason() -> None:
    tally = Tally()
    tally.retries["lost"] += 2
    (told,) = tally.take(0)
    assert (told.name, told.labels, told.value) == ("shoal_task_retries_total", labels(reason="lost"), 2)


def test_only_so_many_functions_have_names() -> None:
    tally = Tally()
    tally.names += [f"f{number}" for number in range(MOST_FUNCTIONS + 10)]
    ends = finished(tally.take(0))
    assert len(ends) == MOST_FUNCTIONS + 1
    assert ends[OTHERS, "ok"] == 10
    tally.names.append("f0")
    assert finished(tally.take(0)) == {("f0", "ok"): 1}


@given(st.lists(st.lists(st.floats(0, 4000)), max_size=4))
def test_what_is_taken_in_parts_is_all_there_was(parts: list[list[float]]) -> None:
    tally = Tally()
    counted = 0
    for part in parts:
        tally.seconds += part
        counted += sum(sum(one.counts) for one in tally.take(0) if one.name == "shoal_task_run_seconds")
    assert counted == sum(map(len, parts))
