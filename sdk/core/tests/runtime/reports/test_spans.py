"""The spans of a task's life: one trace, one decision, what nests below what, and how failures are told."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from shoal_core.bus import spans as bus_spans
from shoal_core.bus.spans import RootSampling, is_wanted, opened, trace_below
from shoal_core.protocol.errors import TaskError
from shoal_core.protocol.ids import JobId, ObjectKey, TaskNumber, object_key
from shoal_core.protocol.records import Failed, Inline, Stored, Task
from shoal_core.protocol.traces import ID_LIMIT, UNRECORDED, is_recorded
from shoal_core.runtime.ownership.objects import ObjectState
from shoal_core.runtime.reports.spans import (
    MOST_ITEMS,
    Processing,
    Queueing,
    of_task,
    place_of,
    putting,
    queueing_of,
    retrieved,
    retrieving,
    submitted,
    unrecorded,
)
from shoal_core.testing.builders import node_id, process_id, task

OWNER, WORKER, JOB = process_id(1), process_id(2), JobId("1")


def submit(number: int = 2) -> Task:
    wire = task(number)
    wire.trace = submitted(wire, OWNER, JOB, time.time_ns()) if is_wanted() else UNRECORDED
    return wire


def state(number: int) -> ObjectState:
    return ObjectState(None, OWNER, key(number))  # type: ignore[arg-type]


def key(number: int) -> ObjectKey:
    return object_key(TaskNumber(number), 1)


def made(recorded: InMemorySpanExporter, name: str) -> ReadableSpan:
    [span] = [span for span in recorded.get_finished_spans() if span.name == name]
    return span


def names(recorded: InMemorySpanExporter) -> list[str]:
    return [span.name for span in recorded.get_finished_spans()]


def hangs_below(child: ReadableSpan, parent: ReadableSpan) -> bool:
    return child.parent is not None and child.parent.span_id == parent.context.span_id


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


# ------------------------------------------------------------------------------------ .remote()


def test_a_submission_hangs_below_what_is_open_and_names_the_task(recorded: InMemorySpanExporter) -> None:
    with opened("the user's", "INTERNAL", "", {}):
        wire = submit()
    span = made(recorded, "submit test")
    assert hangs_below(span, made(recorded, "the user's"))
    assert span.kind is SpanKind.PRODUCER
    assert attributes(span)["messaging.message.id"] == f"{OWNER}{2:016x}"
    assert attributes(span)["messaging.message.body.size"] == len(b"arguments")
    assert wire.trace.split("-")[2] == f"{span.context.span_id:016x}"


@pytest.mark.parametrize(("bound", "kept"), [(0, False), (ID_LIMIT, True)])
def test_without_one_it_is_decided_there(
    recorded: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, bound: int, kept: bool
) -> None:
    monkeypatch.setattr(bus_spans, "sampling", RootSampling(bound))
    trace = submit().trace
    assert is_recorded(trace) == kept
    assert names(recorded) == ["submit test"] * kept
    for span in recorded.get_finished_spans():
        assert span.parent is None
        assert trace == trace_below(span.context)


def test_what_was_decided_holds_for_all_that_comes_of_it(
    recorded: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_spans, "sampling", RootSampling(0))
    wire = submit()
    assert wire.trace == UNRECORDED
    monkeypatch.setattr(bus_spans, "sampling", RootSampling(ID_LIMIT))  # where it runs, all would be recorded
    unrecorded(wire.trace)
    assert submit(4).trace == UNRECORDED
    assert place_of([result_of(wire)]) is None
    with opened("the user's", "INTERNAL", "", {}) as users:
        assert not users.is_recording()
    token = attach(Context())
    unrecorded(wire.trace)
    assert submit(4).trace == UNRECORDED, "whatever the code of the task before has left open"
    detach(token)
    assert names(recorded) == []


def test_what_was_decided_holds_for_nothing_else(
    recorded: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus_spans, "sampling", RootSampling(ID_LIMIT))
    kept = submit(2)
    unrecorded(UNRECORDED)
    running = of_task(kept, OWNER, None, lambda: True)
    running.run()
    assert submit(8).trace.split("-")[1] == kept.trace.split("-")[1], "it hangs below the task that runs"
    running.end(None)
    assert submit(10).trace == UNRECORDED, "the thread is as the task before left it"
    unrecorded("")
    assert is_recorded(submit(12).trace), "a task whose owner does not trace begins traces of its own"


# ------------------------------------------------------------------------------------ the owner


def test_a_task_waits_until_it_is_sent(recorded: InMemorySpanExporter) -> None:
    queueing, wire = Queueing(), submit()
    queueing.queued()
    queueing.resolved()
    assert names(recorded) == ["submit test"]
    queueing.sent(wire, WORKER)
    assert queueing.ended(), "the process tells of the rest"
    queue = made(recorded, "queue test")
    assert hangs_below(queue, made(recorded, "submit test"))
    assert attributes(queue)["shoal.process.id"] == WORKER
    assert "shoal.queue.arguments_seconds" in attributes(queue)


def test_an_attempt_that_was_lost_is_told_by_the_owner(recorded: InMemorySpanExporter) -> None:
    queueing, wire = Queueing(), submit()
    queueing.queued()
    queueing.sent(wire, WORKER)
    wire.attempt = 1
    queueing.again(wire, Failed("worker_crashed", "it was killed"))
    queueing.sent(wire, WORKER)
    queueing.failed(wire, Failed("worker_crashed", "it was killed again"))
    assert not queueing.ended(), "no process tells of it"
    assert names(recorded) == ["submit test", "queue test", "lost test", "queue test", "lost test"]
    lost = [span for span in recorded.get_finished_spans() if span.name == "lost test"]
    assert [attributes(span)["shoal.task.attempt"] for span in lost] == [0, 1]
    assert {attributes(span)["error.type"] for span in lost} == {"worker_crashed"}
    assert {span.status.status_code for span in lost} == {StatusCode.ERROR}


def test_a_task_that_comes_back_unrun_waits_again(recorded: InMemorySpanExporter) -> None:
    queueing, wire = Queueing(), submit()
    queueing.queued()
    queueing.sent(wire, WORKER)
    queueing.again(wire, None)
    queueing.failed(wire, Failed("task_cancelled", "f() was cancelled."))
    assert names(recorded) == ["submit test", "queue test", "queue test"]
    assert attributes(recorded.get_finished_spans()[-1])["error.type"] == "task_cancelled"


def test_a_task_that_runs_again_after_its_end_waits_anew(recorded: InMemorySpanExporter) -> None:
    queueing, wire = Queueing(), submit()
    queueing.queued()
    queueing.resolved()
    queueing.sent(wire, WORKER)
    queueing.ended()
    queueing.queued()
    queueing.sent(wire, WORKER)
    first, second = [span for span in recorded.get_finished_spans() if span.name == "queue test"]
    assert first.end_time is not None
    assert second.start_time is not None
    assert first.end_time <= second.start_time
    assert "shoal.queue.arguments_seconds" not in attributes(second)


def test_nothing_is_noted_of_what_is_not_recorded() -> None:
    wire = task(2)
    for trace in ("", UNRECORDED):
        wire.trace = trace
        result = state(2)
        assert queueing_of(wire, [result]) is None
        assert place_of([result]) is None


# ------------------------------------------------------------------------------------ the worker process


def test_a_run_has_its_phases_and_what_the_user_opens_hangs_below(recorded: InMemorySpanExporter) -> None:
    wire = submit()
    running = of_task(wire, OWNER, None, lambda: False)
    running.run()
    with opened("the user's", "INTERNAL", "", {}):
        pass
    running.store()
    running.end(None)
    process = made(recorded, "process test")
    assert hangs_below(process, made(recorded, "submit test"))
    for phase in ("fetch arguments", "run test", "store result"):
        assert hangs_below(made(recorded, phase), process)
    assert hangs_below(made(recorded, "the user's"), made(recorded, "run test"))
    assert process.kind is SpanKind.CONSUMER
    assert (
        attributes(process).items()
        >= {
            "messaging.system": "nats",
            "messaging.operation.type": "process",
            "faas.trigger": "pubsub",
            "faas.invocation_id": f"{OWNER}{2:016x}",
            "faas.coldstart": True,
        }.items()
    )
    assert not get_current_span().get_span_context().is_valid, "nothing is open any more"


def test_a_task_that_has_nothing_to_fetch_has_no_span_for_that(recorded: InMemorySpanExporter) -> None:
    wire = submit()
    wire.arguments = Inline(b"")
    for known in (lambda: True, lambda: False):
        running = of_task(wire, OWNER, None, known)
        running.run()
        running.end(None)
    assert names(recorded) == [
        *("submit test", "run test", "process test"),
        *("fetch arguments", "run test", "process test"),
    ], "but it has to fetch a function that it does not know"


def test_an_exception_is_told_where_it_left_the_users_code(recorded: InMemorySpanExporter) -> None:
    running = Processing("f", submit().trace, {})
    running.run()
    running.end(TaskError("g", "traceback", KeyError("x")))
    for name in ("run f", "process f"):
        span = made(recorded, name)
        assert span.status.status_code is StatusCode.ERROR
        assert attributes(span)["error.type"] == "KeyError", "the cause's class, not that of the error that carries it"
    assert [event.name for event in made(recorded, "run f").events] == ["exception"]
    assert made(recorded, "fetch arguments").status.status_code is StatusCode.UNSET


def test_a_failure_that_is_not_the_users_codes_has_a_code(recorded: InMemorySpanExporter) -> None:
    running = Processing("f", submit().trace, {})
    running.run()
    running.end(None, Failed("task_cancelled", "f() was cancelled."))
    assert attributes(made(recorded, "process f"))["error.type"] == "task_cancelled"
    assert made(recorded, "run f").events == ()


def test_items_of_a_generator_have_spans_while_there_are_few(recorded: InMemorySpanExporter) -> None:
    running = Processing("f", submit().trace, {})
    running.run()
    for _ in range(MOST_ITEMS + 5):
        running.item(0, Stored(node_id(1), "segment", 7))
    running.end(None)
    assert names(recorded).count("store item") == MOST_ITEMS
    assert attributes(made(recorded, "process f"))["shoal.items"] == MOST_ITEMS + 5
    item = next(span for span in recorded.get_finished_spans() if span.name == "store item")
    assert attributes(item) == {"shoal.item.index": 1, "messaging.message.body.size": 7}
    assert hangs_below(item, made(recorded, "process f"))


# ------------------------------------------------------------------------------------ get, wait, put


def result_of(wire: Task) -> ObjectState:
    made = state(wire.number)
    queueing_of(wire, [made])
    return made


def links_of(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def span_ids(tasks: Sequence[Task]) -> list[int]:
    return [int(wire.trace.split("-")[2], 16) for wire in tasks]


def test_a_get_hangs_below_the_task_where_nothing_is_open(recorded: InMemorySpanExporter) -> None:
    tasks = [submit(2), submit(4)]
    place = place_of([*map(result_of, tasks), state(6)])
    assert place is not None
    with retrieving("get", place, 3):
        assert get_current_span().is_recording()
    get = made(recorded, "get")
    assert get.parent is not None
    assert [get.parent.span_id, *links_of(get)] == span_ids(tasks)
    assert get.kind is SpanKind.CLIENT


def test_a_get_hangs_below_what_is_open_with_links_to_the_tasks(recorded: InMemorySpanExporter) -> None:
    tasks = [submit(2), submit(4)]
    results = [result_of(wire) for wire in tasks]
    with opened("the user's", "INTERNAL", "", {}):
        place = place_of(results)
        assert place is not None
        with retrieving("get", place, 2):
            pass
        retrieved(results[0], 0)
    gets = [span for span in recorded.get_finished_spans() if span.name == "get"]
    assert all(hangs_below(get, made(recorded, "the user's")) for get in gets)
    assert links_of(gets[0]) == span_ids(tasks)


def test_an_await_is_a_get(recorded: InMemorySpanExporter) -> None:
    retrieved(result_of(submit(2)), 0)
    assert hangs_below(made(recorded, "get"), made(recorded, "submit test"))


def test_a_get_of_what_nobody_traces_has_no_span(recorded: InMemorySpanExporter) -> None:
    result = result_of(task(2))
    assert place_of([result]) is None
    retrieved(result, 0)
    assert names(recorded) == []


def test_a_put_hangs_below_what_is_open(recorded: InMemorySpanExporter) -> None:
    with opened("the user's", "INTERNAL", "", {}), putting(5):
        pass
    assert hangs_below(made(recorded, "put"), made(recorded, "the user's"))
    assert attributes(made(recorded, "put"))["messaging.message.body.size"] == 5
