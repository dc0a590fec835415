"""What `shoal memory` and `shoal.util.state` find out, over a broker in memory; the test plays all services."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli import commands, flags
from shoal.cli.memory import size_text
from shoal.memory import ClusterMemory, NodeMemory, ask_all
from shoal.status import Target
from shoal.util import state
from shoal_core.bus import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.errors import NoRespondersError
from shoal_core.protocol.ids import NO_NODE, JobId, NodeId, ProcessId
from shoal_core.protocol.messages import (
    JobConfig,
    JobList,
    JobRecord,
    JobState,
    NodeDescription,
    NodeList,
    NodeRecord,
    NodeState,
)
from shoal_core.protocol.messages import Message as ControlMessage
from shoal_core.protocol.storage import ListObjects, NodeObjects, ObjectHolding, ProcessHoldings, StoreUse
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.testing.builders import node_id, process_id

CLUSTER = "default"
SUBJECTS = Subjects(CLUSTER)
FIRST, SECOND = node_id(1), node_id(2)
DRIVER, WORKER = process_id(1), process_id(2)
ID = "ab" * 24
GIB = 2**30


def description(node: NodeId) -> NodeDescription:
    return NodeDescription(
        node_id=node,
        hostname=f"host-{node[-1]}",
        address="127.0.0.1",
        machine_id="machine",
        pid=1,
        total={},
        shared_memory_path="",
        object_store_bytes=0,
        version="0",
        python_version="3.11",
        started_at=0.0,
    )


def job(number: int, driver: ProcessId, job_state: JobState = JobState.RUNNING) -> JobRecord:
    return JobRecord(
        job_id=JobId(f"{number:08x}"),
        driver=driver,
        hostname="host",
        machine_id="machine",
        pid=1,
        entrypoint="program",
        config=JobConfig(namespace=""),
        state=job_state,
        started_at=0.0,
    )


def holding(process: ProcessId, size_bytes: int, *reasons: str, **others: Any) -> ObjectHolding:
    fields = {"object_id": ID, "owner": DRIVER, "status": "NIL"} | others
    return ObjectHolding(process_id=process, size_bytes=size_bytes, reasons=list(reasons), **fields)


def answer_of(node: NodeId, *objects: ObjectHolding, silent: tuple[ProcessId, ...] = ()) -> NodeObjects:
    processes = [(DRIVER, 41, "DRIVER"), (WORKER, 42, "WORKER")]
    return NodeObjects(
        node_id=node,
        store=StoreUse(capacity_bytes=4 * GIB, used_bytes=GIB, pinned_bytes=GIB // 2, warm_bytes=0, segments=3),
        processes=[
            ProcessHoldings(
                process_id=process, pid=pid, kind=kind, job_id=JobId("00000001"), objects=7, inline_bytes=10
            )
            for process, pid, kind in processes
            if process not in silent
        ],
        objects=list(objects),
        silent=list(silent),
    )


def seen(*answers: NodeObjects, silent_nodes: dict[NodeId, str] | None = None) -> ClusterMemory:
    nodes = [NodeMemory(description(answer.node_id), answer) for answer in answers]
    silent = [process for answer in answers for process in answer.silent]
    return ClusterMemory(nodes, silent_nodes or {}, silent, [])


# ------------------------------------------------------------------------------------ asking


@pytest.fixture
async def buses() -> AsyncIterator[dict[Role, Bus]]:
    broker = MemoryBroker()
    async with AsyncExitStack() as stack:
        yield {
            role: await stack.enter_async_context(broker.connect(role=role, identity=f"the-{role}", cluster=CLUSTER))
            for role in (Role.GCS, Role.NODE, Role.OBSERVER)
        }


def play(bus: Bus, subject: str, reply: ControlMessage) -> list[bytes]:
    """Answer every request with the same; return what was asked."""
    asked: list[bytes] = []

    def respond(request: Message) -> None:
        asked.append(request.data)
        bus.publish(request.reply, encode(reply))

    bus.subscribe(subject, respond)
    return asked


def play_gcs(bus: Bus, nodes: dict[NodeId, NodeState], *jobs: JobRecord) -> None:
    records = [NodeRecord(description=description(node), state=its_state) for node, its_state in nodes.items()]
    play(bus, SUBJECTS.gcs("list_nodes"), NodeList(nodes=records))
    play(bus, SUBJECTS.gcs("list_jobs"), JobList(jobs=list(jobs)))


async def test_all_living_nodes_are_asked_and_their_rows_are_sorted_by_size(buses: dict[Role, Bus]) -> None:
    play_gcs(buses[Role.GCS], {FIRST: NodeState.ALIVE, SECOND: NodeState.ALIVE, node_id(3): NodeState.DEAD})
    asked = play(buses[Role.NODE], SUBJECTS.node(FIRST, "objects"), answer_of(FIRST, holding(DRIVER, 5, "BORROWED")))
    play(
        buses[Role.NODE],
        SUBJECTS.node(SECOND, "objects"),
        answer_of(SECOND, holding(WORKER, 9, "PINNED_IN_MEMORY", node=SECOND), holding(WORKER, -1, "LOCAL_REFERENCE")),
    )
    memory = await ask_all(buses[Role.OBSERVER], SUBJECTS, most=50_000, timeout_seconds=5)
    assert memory.is_complete
    assert memory.missing() == ""
    assert [row["object_size"] for row in memory.rows()] == [9, 5, -1]
    assert [row["location"] for row in memory.rows()] == [f"node {SECOND}", "inline", ""]
    assert memory.counted() == 28
    request = ListObjects.model_validate_json(asked[0])
    assert request.most == 1000
    assert 2 < request.timeout_seconds < 5, "a node must answer before its asker gives up"


async def test_who_does_not_answer_is_named(buses: dict[Role, Bus]) -> None:
    outside = ProcessId(NO_NODE + "00000007")
    ended = job(2, ProcessId(NO_NODE + "00000008"), JobState.SUCCEEDED)
    nodes = {FIRST: NodeState.ALIVE, SECOND: NodeState.ALIVE}
    play_gcs(buses[Role.GCS], nodes, job(1, DRIVER), ended, job(3, outside))
    play(buses[Role.NODE], SUBJECTS.node(FIRST, "objects"), answer_of(FIRST, silent=(WORKER,)))
    memory = await ask_all(buses[Role.OBSERVER], SUBJECTS, most=10, timeout_seconds=0.3)
    assert not memory.is_complete
    assert memory.silent_nodes.keys() == {SECOND}
    lines = memory.missing().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"node {SECOND} did not answer: ")
    assert lines[1] == f"process {WORKER} did not answer its node in time"
    assert lines[2] == f"driver {outside} belongs to no node, so nobody asked it"


async def test_without_a_control_store_there_is_no_answer(buses: dict[Role, Bus]) -> None:
    with pytest.raises(NoRespondersError):
        await ask_all(buses[Role.OBSERVER], SUBJECTS, most=10, timeout_seconds=0.2)


# ------------------------------------------------------------------------------------ the command


def run(
    monkeypatch: pytest.MonkeyPatch, memory: ClusterMemory, *arguments: str, width: int = 200
) -> tuple[int, str, str]:
    async def read_memory(target: Target, most: int, timeout_seconds: float) -> ClusterMemory:
        assert target.address == "nats://x"
        return memory

    monkeypatch.setattr(commands, "read_memory", read_memory)
    monkeypatch.setattr(flags.out, "width", width)
    result = CliRunner().invoke(commands.app, ["memory", "--address", "nats://x", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = holding(WORKER, 3000, "PINNED_IN_MEMORY", object_id="", owner="", node=FIRST)
    big = holding(DRIVER, 2 * GIB, "USED_BY_PENDING_TASK", "BORROWED", node=FIRST, status="FINISHED", borrowers=3)
    code, printed, complaint = run(monkeypatch, seen(answer_of(FIRST, big, holding(WORKER, -1, "X"), gone)))
    assert (code, complaint) == (0, "")
    lines = printed.splitlines()
    assert lines[1].split() == [FIRST, "host-1", "1.0", "GiB", "4.0", "GiB", "512.0", "MiB", "0", "B", "3", "20", "B"]
    assert "the largest 3 of 14 objects" in printed
    (row,) = [line for line in lines if "2.0 GiB" in line]
    for part in (
        f"…{ID[-12:]}",
        f"node {FIRST[:8]}",
        "FINISHED",
        "USED_BY_PENDING_TASK, BORROWED by 3",
        "DRIVER",
        "41",
    ):
        assert part in row
    assert "(gone; still mapped)" in printed
    assert "?" in printed, "a size that is not known"


def test_objects_are_told_apart_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    held = [holding(DRIVER, 5, "LOCAL_REFERENCE", object_id=f"{'ab' * 20}0000000{number}") for number in (1, 2)]
    memory = seen(answer_of(FIRST, *held))
    printed = run(monkeypatch, memory, width=90)[1]
    assert "…abab00000001 " in printed
    assert "…abab00000002 " in printed


def test_json_for_programs_and_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = seen(answer_of(FIRST, *(holding(DRIVER, size, "LOCAL_REFERENCE") for size in range(5))))
    code, printed, _ = run(monkeypatch, memory, "--format", "json", "--limit", "2")
    told = json.loads(printed)
    assert code == 0
    assert [row["object_size"] for row in told["objects"]] == [4, 3]
    assert told["total_objects"] == 14
    assert told["nodes"][0]["store"]["used_bytes"] == GIB


def test_silence_is_told_loudly_and_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = seen(answer_of(FIRST, silent=(WORKER,)), silent_nodes={SECOND: "no answer"})
    code, printed, complaint = run(monkeypatch, memory, "--format", "json")
    assert code == 1
    assert json.loads(printed)["silent_processes"] == [WORKER]
    assert f"node {SECOND} did not answer: no answer" in complaint
    assert f"process {WORKER} did not answer" in complaint


def test_nothing_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = seen()
    assert "Nobody holds an object." in run(monkeypatch, empty)[1]
    assert "14 objects are known." in run(monkeypatch, seen(answer_of(FIRST)), "--limit", "0")[1]


def test_sizes_are_told_in_units_that_people_read() -> None:
    assert [size_text(size) for size in (0, 1023, 1024, 5 * 2**20, 3 * GIB)] == [
        *("0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3.0 GiB"),
    ]


# ------------------------------------------------------------------------------------ the functions


class Joined:
    """Stands in for the runtime of this process."""

    address = "nats://x"
    bus = subjects = None

    def __init__(self, memory: ClusterMemory) -> None:
        self.memory = memory

    def call(self, coroutine: Any) -> ClusterMemory:
        coroutine.close()
        return self.memory


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Joined:
    rows = [
        holding(DRIVER, 5, "LOCAL_REFERENCE", "BORROWED"),
        holding(WORKER, 9, "PINNED_IN_MEMORY", status="FINISHED"),
    ]
    joined = Joined(seen(answer_of(FIRST, *rows, holding(WORKER, 1, object_id="cd" * 24))))
    monkeypatch.setattr(state, "runtime", lambda: joined)
    return joined


@pytest.mark.usefixtures("joined")
def test_rows_have_rays_columns_and_are_read_by_attribute_and_by_key() -> None:
    row = state.list_objects()[0]
    columns = ["object_id", "object_size", "task_status", "reference_type", "call_site", "type", "pid", "ip"]
    assert list(row)[:8] == columns
    assert set(row) == set(state.ObjectState.__annotations__)
    assert [row[name] for name in columns] == [
        ID,
        9,
        "FINISHED",
        "PINNED_IN_MEMORY",
        "disabled",
        "WORKER",
        42,
        "127.0.0.1",
    ]
    assert (row.object_size, row.get("nothing", 3), row.asdict()["pid"], len(row)) == (
        9,
        3,
        42,
        len(state.ObjectState.__annotations__),
    )
    assert "object_size=9" in repr(row)


@pytest.mark.usefixtures("joined")
def test_filters_and_limits() -> None:
    assert [row.object_size for row in state.list_objects(filters=[("type", "=", "worker")])] == [9, 1]
    assert [row.object_size for row in state.list_objects(filters=[("pid", "!=", 42)])] == [5]
    assert [row.object_size for row in state.list_objects(limit=1)] == [9]
    assert [row.reference_type for row in state.get_objects(ID)] == ["PINNED_IN_MEMORY", "LOCAL_REFERENCE"]
    assert state.get_objects("ef" * 24) == []


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"timeout": 0}, "timeout"),
        ({"filters": [("colour", "=", "red")]}, "no column 'colour'"),
        ({"filters": [("pid", ">", 1)]}, "'>'"),
        ({"address": "nats://elsewhere"}, "shoal memory --address"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        state.list_objects(**options)


@pytest.mark.usefixtures("joined")
def test_the_summary_counts() -> None:
    summary = state.summarize_objects()
    cluster = summary["cluster"]
    assert cluster["total_objects"] == 14
    assert cluster["total_size_mb"] == 1024
    assert cluster["ref_type_counts"] == {"PINNED_IN_MEMORY": 1, "LOCAL_REFERENCE": 1, "UNKNOWN_STATUS": 1}
    assert cluster["task_state_counts"] == {"FINISHED": 1, "NIL": 2}
    assert summary["nodes"][FIRST]["pinned_bytes"] == GIB // 2


def test_missing_output_raises_unless_that_is_fine(joined: Joined) -> None:
    joined.memory = seen(answer_of(FIRST, holding(DRIVER, 5, "X"), silent=(WORKER,)))
    with pytest.raises(state.StateUnavailableError, match=f"process {WORKER} did not answer"):
        state.list_objects()
    assert len(state.list_objects(raise_on_missing_output=False)) == 1
