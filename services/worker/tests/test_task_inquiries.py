"""How far a task is: the node asks the task's owner, and whoever wants to know is answered once."""

from __future__ import annotations

import pytest

from shoal_core.protocol.effects import Reply, Send
from shoal_core.protocol.errors import NotFoundError, RequestTimeoutError, ServiceError, ShoalError
from shoal_core.protocol.ids import ObjectKey, TaskNumber, object_id_bytes
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import ReportTask, TaskReported
from shoal_core.protocol.scheduling import ExplainTask, TaskStanding, TaskState
from shoal_core.testing.builders import process_id
from shoal_worker import task_inquiries
from shoal_worker.task_inquiries import TaskInquiries

OWNER, OTHER = process_id(1), process_id(2)
REQUEST = ExplainTask(owner=OWNER, task=7, timeout_seconds=5)


def replies(inquiries: TaskInquiries) -> dict[int, Message | ShoalError]:
    effects, inquiries.effects = inquiries.effects, []
    return {effect.token: effect.message for effect in effects if isinstance(effect, Reply)}


def test_the_owner_is_asked_and_its_answer_passed_on() -> None:
    inquiries = TaskInquiries()
    inquiries.open(REQUEST, 11, 100.0)
    assert inquiries.effects == [Send(OWNER, ReportTask(1, TaskNumber(7)))]
    assert inquiries.next_deadline == 105.0
    inquiries.reported(OTHER, TaskReported(1, "NIL"))
    assert replies(inquiries) == {}, "only the owner's word counts"
    told = TaskReported(1, "PENDING_ARGS_AVAIL", "f", missing=[(OTHER, ObjectKey(5))], missing_count=3)
    inquiries.reported(OWNER, told)
    inquiries.reported(OWNER, told)
    assert replies(inquiries) == {
        11: TaskStanding(
            state=TaskState.PENDING_ARGS_AVAIL,
            name="f",
            missing=[object_id_bytes(OTHER, ObjectKey(5)).hex()],
            missing_count=3,
        )
    }
    assert inquiries.next_deadline == float("inf")


def test_what_makes_no_sense_says_nothing() -> None:
    inquiries = TaskInquiries()
    for number, told in enumerate(
        [TaskReported(1, "ODD"), TaskReported(2, "PENDING_ARGS_AVAIL", missing=[(OWNER, ObjectKey(-1))])]
    ):
        inquiries.open(REQUEST, number, 100.0)
        inquiries.reported(OWNER, told)
        assert replies(inquiries) == {number: TaskStanding(state=TaskState.NIL)}


def test_an_owner_that_dies_or_is_silent_is_told_of() -> None:
    inquiries = TaskInquiries()
    inquiries.open(REQUEST, 1, 100.0)
    inquiries.open(REQUEST.model_copy(update={"owner": OTHER}), 2, 101.0)
    inquiries.process_died(OTHER)
    assert isinstance(replies(inquiries)[2], NotFoundError)
    inquiries.tick(104.9)
    assert replies(inquiries) == {}
    inquiries.tick(105.0)
    assert isinstance(replies(inquiries)[1], RequestTimeoutError)


def test_too_many_inquiries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_inquiries, "MOST_INQUIRIES", 1)
    inquiries = TaskInquiries()
    inquiries.open(REQUEST, 1, 100.0)
    with pytest.raises(ServiceError, match="ask again"):
        inquiries.open(REQUEST, 2, 100.0)
