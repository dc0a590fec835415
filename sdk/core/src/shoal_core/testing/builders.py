"""Records and ids with everything filled in, so that a test states only what it is about."""

from __future__ import annotations

from collections.abc import Sequence

from shoal_core.protocol.ids import FunctionId, LeaseId, NodeId, ObjectKey, ProcessId, TaskNumber, object_key
from shoal_core.protocol.messages import NodeDescription, NodeRecord, NodeState
from shoal_core.protocol.records import Inline, Reference, Task, TaskDone, Value


def node_id(number: int) -> NodeId:
    """Return the id of the ``number``-th node of a test (from 1)."""
    return NodeId(f"{number:016x}")


def process_id(number: int, node: int = 1) -> ProcessId:
    """Return the id of the ``number``-th process on the ``node``-th node of a test."""
    return ProcessId(f"{node:016x}{number:08x}")


def node_record(node: NodeId, state: NodeState = NodeState.ALIVE, cpus: int = 4) -> NodeRecord:
    """Return what the control store says of a node."""
    description = NodeDescription(
        node_id=node,
        hostname="host",
        address="127.0.0.1",
        machine_id="machine",
        pid=1,
        total={"CPU": cpus * 10_000},
        shared_memory_path="/dev/shm/test",
        object_store_bytes=1,
        version="0.1.0",
        python_version="3.11",
        started_at=1.0,
    )
    return NodeRecord(description=description, state=state, death_reason="it was silent" * (state is NodeState.DEAD))


def put_key(number: int) -> ObjectKey:
    """Return the key of an object made by the ``number``-th put of a process."""
    return object_key(TaskNumber(number), 0)


def inline(data: bytes = b"value", contained: Sequence[Reference] = ()) -> Inline:
    """Return a small value."""
    return Inline(data, contained=tuple(contained))


def task(number: int, *, position: int | None = None, arguments: Value | None = None, returns: int = 1) -> Task:
    """Return a task record."""
    return Task(
        number=TaskNumber(number),
        attempt=0,
        lease=LeaseId(1),
        position=number if position is None else position,
        function=FunctionId("f" * 32),
        name="test",
        returns=returns,
        arguments=arguments or inline(b"arguments"),
    )


def task_done(number: int, *, values: Sequence[Value] = (), kept: Sequence[Reference] = ()) -> TaskDone:
    """Return the record of a task's end."""
    return TaskDone(
        number=TaskNumber(number),
        attempt=0,
        lease=LeaseId(1),
        values=tuple(values) or (inline(),),
        seconds=0.001,
        kept=tuple(kept),
    )
