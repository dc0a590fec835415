"""Who holds what: the node's answer, whoever answers, dies or is silent meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.protocol.effects import Reply, Send
from shoal_core.protocol.errors import ServiceError
from shoal_core.protocol.ids import JobId, NodeId, ObjectKey, ProcessId, object_id_bytes
from shoal_core.protocol.records import KnownObject, ObjectsReported, ReportObjects
from shoal_core.protocol.storage import ListObjects, NodeObjects
from shoal_core.testing.builders import node_id, process_id
from shoal_worker.inquiries import MOST_INQUIRIES, Inquiries
from shoal_worker.objects.holdings import DRIVER, WORKER, Holdings
from shoal_worker.objects.segments import SegmentTable

NODE = node_id(1)
FIRST, SECOND, THIRD = process_id(1), process_id(2), process_id(3)
ASKED = {FIRST: DRIVER, SECOND: WORKER, THIRD: WORKER}
JOB = JobId("00000001")
KIB = 1024
REQUEST = ListObjects(most=100, timeout_seconds=5)


class Node:
    """A node's inquiries, and what became of each token."""

    def __init__(self) -> None:
        self.segments = SegmentTable(1024 * KIB, 256 * KIB)
        self.inquiries = Inquiries(NODE)
        self.holdings = Holdings(NODE, self.segments)
        self.answers: dict[int, NodeObjects] = {}
        self.asked: list[tuple[ProcessId, ReportObjects]] = []

    def open(self, request: ListObjects, token: int, processes: dict[ProcessId, str], now: float) -> None:
        self.inquiries.open(self.holdings, request, token, processes, now)

    def take(self) -> None:
        for effect in self.inquiries.effects:
            if isinstance(effect, Reply):
                assert effect.token not in self.answers, "an asker is answered once"
                assert isinstance(effect.message, NodeObjects)
                self.answers[effect.token] = effect.message
            else:
                assert isinstance(effect, Send)
                assert isinstance(effect.record, ReportObjects)
                self.asked.append((ProcessId(effect.peer), effect.record))
        self.inquiries.effects = []

    def segment(self, owner: ProcessId) -> str:
        segment = self.segments.allocate(owner, 8 * KIB)
        assert segment is not None
        name = segment.name
        self.segments.created(name)
        self.segments.seal(name, owner, owner)
        return name


def known(owner: ProcessId, number: int, size: int, node: NodeId | str = "", segment: str = "") -> KnownObject:
    return KnownObject(owner, ObjectKey(number), size, "NIL", ["LOCAL_REFERENCE"], 0, node, segment)


def report(inquiry: int, *objects: KnownObject, count: int = 0) -> ObjectsReported:
    return ObjectsReported(inquiry, 42, JOB, count or len(objects), 10, list(objects))


def test_all_processes_are_asked_and_the_answer_has_what_they_say() -> None:
    node = Node()
    node.open(REQUEST, 7, ASKED, 100.0)
    node.take()
    assert node.asked == [(process, ReportObjects(1, 100)) for process in ASKED]
    node.inquiries.reported(FIRST, report(1, known(FIRST, 1, 5)), 100.1)
    node.inquiries.reported(SECOND, report(1, known(FIRST, 1, -1), known(SECOND, 2, 9), count=50), 100.1)
    node.take()
    assert node.answers == {}
    node.inquiries.reported(THIRD, report(1), 100.1)
    node.take()
    answer = node.answers[7]
    assert [(one.process_id, one.size_bytes) for one in answer.objects] == [(SECOND, 9), (FIRST, 5), (SECOND, -1)]
    assert answer.objects[1].object_id == object_id_bytes(FIRST, ObjectKey(1)).hex()
    assert [(one.process_id, one.kind, one.objects) for one in answer.processes] == [
        (FIRST, "DRIVER", 1),
        (SECOND, "WORKER", 50),
        (THIRD, "WORKER", 0),
    ]
    assert answer.silent == []
    assert len(node.inquiries) == 0


def test_who_is_silent_is_named_when_the_time_is_over() -> None:
    node = Node()
    node.open(REQUEST, 7, ASKED, 100.0)
    node.inquiries.reported(FIRST, report(1, known(FIRST, 1, 5)), 101.0)
    node.inquiries.process_died(SECOND, 102.0)
    assert node.inquiries.next_deadline == 105.0
    node.inquiries.tick(104.9)
    node.take()
    assert node.answers == {}
    node.inquiries.tick(105.0)
    node.take()
    assert node.answers[7].silent == [THIRD]
    assert [one.process_id for one in node.answers[7].processes] == [FIRST]
    node.inquiries.reported(THIRD, report(1), 106.0)
    node.take()
    assert node.inquiries.next_deadline == float("inf")


def test_a_node_without_processes_answers_at_once() -> None:
    node = Node()
    node.open(REQUEST, 7, {}, 100.0)
    node.take()
    assert node.answers[7].store.capacity_bytes == 1024 * KIB


def test_no_more_are_described_than_were_asked_for() -> None:
    node = Node()
    node.open(ListObjects(most=2, timeout_seconds=5), 7, {FIRST: WORKER}, 100.0)
    node.inquiries.reported(FIRST, report(1, *(known(FIRST, number, number) for number in range(9))), 100.0)
    node.take()
    assert [one.size_bytes for one in node.answers[7].objects] == [8, 7]


def test_mappings_are_told_also_where_the_object_is_gone() -> None:
    node = Node()
    kept, mapped_by_another, gone = (node.segment(FIRST) for _ in range(3))
    node.segments.pin(kept, FIRST, 1)
    node.segments.pin(mapped_by_another, SECOND, 1)
    node.segments.pin(gone, SECOND, 2)
    node.segments.free(gone, FIRST)
    node.open(REQUEST, 7, {FIRST: DRIVER, SECOND: WORKER}, 100.0)
    node.inquiries.reported(
        FIRST, report(1, known(FIRST, 1, 8000, NODE, kept), known(FIRST, 2, 7000, NODE, mapped_by_another)), 100.0
    )
    node.inquiries.reported(SECOND, report(1), 100.0)
    node.take()
    answer = node.answers[7]
    assert {(one.process_id, one.segment, one.object_id[-8:], *one.reasons) for one in answer.objects} == {
        (FIRST, kept, "00000001", "LOCAL_REFERENCE", "PINNED_IN_MEMORY"),
        (FIRST, mapped_by_another, "00000002", "LOCAL_REFERENCE"),
        (SECOND, mapped_by_another, "00000002", "PINNED_IN_MEMORY"),
        (SECOND, gone, "", "PINNED_IN_MEMORY"),
    }
    assert answer.store.pinned_bytes == answer.store.used_bytes == 3 * 8 * KIB
    assert answer.store.segments == 3


def test_what_a_process_makes_up_harms_nobody() -> None:
    node = Node()
    node.open(REQUEST, 7, {FIRST: WORKER}, 100.0)
    node.inquiries.reported(SECOND, report(1, known(SECOND, 1, 5)), 100.0)
    node.inquiries.reported(FIRST, report(99, known(FIRST, 1, 5)), 100.0)
    node.take()
    assert node.answers == {}
    wrong = [known(ProcessId("no hex"), 1, 5), known(FIRST, -1, 5), known(FIRST, 1 << 200, 5, NODE, "nowhere")]
    node.inquiries.reported(FIRST, report(1, *wrong), 100.0)
    node.take()
    assert [one.object_id for one in node.answers[7].objects] == ["", "", ""]


def test_too_many_inquiries_are_refused() -> None:
    node = Node()
    for token in range(MOST_INQUIRIES):
        node.open(REQUEST, token, ASKED, 100.0)
    with pytest.raises(ServiceError, match="ask again"):
        node.open(REQUEST, 99, ASKED, 100.0)
    node.inquiries.tick(105.0)
    node.open(REQUEST, 99, ASKED, 105.0)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("open"), st.sets(st.sampled_from(list(ASKED)))),
            st.tuples(st.just("report"), st.sampled_from(list(ASKED)), st.integers(1, 6)),
            st.tuples(st.just("die"), st.sampled_from(list(ASKED))),
            st.tuples(st.just("wait"), st.floats(0, 3)),
        ),
        max_size=40,
    )
)
def test_every_asker_is_answered_once_and_in_time(steps: list[tuple[str, ...]]) -> None:
    node, now = Node(), 100.0
    deadlines: dict[int, float] = {}
    for step in steps:
        match step:
            case ("open", processes):
                token = len(deadlines)
                if len(node.inquiries) < MOST_INQUIRIES:
                    deadlines[token] = now + REQUEST.timeout_seconds
                    node.open(REQUEST, token, dict.fromkeys(map(ProcessId, processes), WORKER), now)
            case ("report", process, inquiry):
                node.inquiries.reported(ProcessId(process), report(int(inquiry)), now)
            case ("die", process):
                node.inquiries.process_died(ProcessId(process), now)
            case ("wait", seconds):
                now += float(seconds)
                node.inquiries.tick(now)
        node.take()
        overdue = {token for token, deadline in deadlines.items() if deadline <= now}
        assert overdue <= node.answers.keys()
        assert len(node.inquiries) == len(deadlines) - len(node.answers)
    node.inquiries.tick(now + REQUEST.timeout_seconds)
    node.take()
    assert node.answers.keys() == deadlines.keys()
