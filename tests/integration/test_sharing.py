"""What programs may claim, on a real cluster, and why things wait there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import shoal
from shoal.util import state
from tests.integration.waiting import get, until


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Three CPUs, of which this program may have two."""
    shoal.init(num_cpus=3, quotas={"CPU": 2})
    yield
    shoal.shutdown()


@shoal.remote
def timed() -> tuple[float, float]:
    began_at = time.monotonic()
    time.sleep(0.05)
    return began_at, time.monotonic()


@shoal.remote(num_cpus=2)
def wide() -> None:
    time.sleep(60)


@shoal.remote(num_cpus=2)
def next_one() -> None: ...


@shoal.remote
def after(nothing: None) -> None: ...


@shoal.remote(num_cpus=2)
def urgent() -> None: ...


@shoal.remote(num_cpus=0, priority=7)
def parent() -> list[Any]:
    return [urgent.remote()]


def test_a_program_uses_its_quota_and_no_more() -> None:
    spans = get([timed.remote() for _ in range(12)])
    together = [sum(began <= at < ended for began, ended in spans) for at, _ in spans]
    assert max(together) == 2


def test_why_says_in_words_what_something_waits_for() -> None:
    running = wide.remote()
    until(lambda: shoal.available_resources().get("CPU") == 1, "it runs")
    waiting = next_one.remote()
    until(lambda: state.why("next_one")["count"] == 1, "it waits")
    (row,) = state.why("next_one")["pending"]
    assert row["turn"]["over_quota"] == ["CPU"]
    assert any("as its quota allows" in sentence for sentence in row["text"])
    told = state.why(waiting.task_id().hex())
    assert [each["name"] for each in told["pending"]] == ["next_one"], "of all that its owner waits for, this alone"
    assert (told["task"]["state"], told["task"]["before"]) == ("PENDING_NODE_ASSIGNMENT", 0)
    told = state.why(running.task_id().hex())
    assert (told["task"]["state"], told["task"]["name"], told["pending"]) == ("SUBMITTED_TO_WORKER", "wide", [])
    told = state.why(after.remote(running).task_id().hex())
    assert (told["task"]["state"], told["task"]["missing"]) == ("PENDING_ARGS_AVAIL", [running.hex()])
    job = shoal.get_runtime_context().get_job_id()
    assert "next_one" in [each["name"] for each in state.why(job)["pending"]]

    refs = get(parent.remote())
    until(lambda: state.why("urgent")["count"] == 1, "it waits")
    (row,) = state.why("urgent")["pending"]
    assert row["turn"]["priority"] == 7, "that of the task which submitted it"
    (row,) = state.why("next_one")["pending"]
    assert row["turn"]["before_in_job"] == 1

    shoal.cancel(running, force=True)
    get([waiting, *refs])
    until(lambda: state.why("next_one")["count"] == 0, "nothing waits any more")
