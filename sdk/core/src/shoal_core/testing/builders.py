"""Records and ids with everything filled in, so that a test states only what it is about."""

from __future__ import annotations

from collections.abc import Sequence

from shoal_core.protocol.ids import FunctionId, LeaseId, NodeId, ObjectKey, ProcessId, TaskNumber, object_key
from shoal_core.protocol.records import Inline, Reference, Task, TaskDone, Value


def node_id(number: int) -> NodeId:
    """Return the id of the ``number``-th node of a test (from 1)."""
    return NodeId(f"{number:016x}")


def process_id(number: int, node: int = 1) -> ProcessId:
    """Return the id of the ``number``-th process on the ``node``-th node of a test."""
    return ProcessId(f"{node:016x}{number:08x}")


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
