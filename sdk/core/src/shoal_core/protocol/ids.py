"""Identities of everything in a cluster.

An id is an incarnation: it is drawn anew at every start and never used twice, so a message that
names an id can only ever mean the one life it was sent to. Ids are lower-case hex, which makes each
of them a valid NATS subject token.

====================  =====  ===========================================================
id                    chars  made of
====================  =====  ===========================================================
``NodeId``            16     64 random bits
``ProcessId``         24     its node's 16 (zeros for a driver without one) + 32 random bits
``JobId``             8      a counter of the cluster
``ActorId``           32     its creator's process id + the actor's number in it (32 bits)
``PlacementGroupId``  32     its creator's process id + the group's number in it (32 bits)
``TaskId``            40     the owner's process id + the task's number in it (64 bits)
``ObjectId``          48     the task's id + the return index (32 bits); 0 is an object made by put
====================  =====  ===========================================================

Inside its owner an object is one integer, its *key*: ``task number << 24 | index``. The numbers of actor calls are odd,
all others even.
"""

from __future__ import annotations

import secrets
from typing import NewType

NodeId = NewType("NodeId", str)
ProcessId = NewType("ProcessId", str)
ServiceId = NewType("ServiceId", str)
JobId = NewType("JobId", str)
ActorId = NewType("ActorId", str)
FunctionId = NewType("FunctionId", str)
PlacementGroupId = NewType("PlacementGroupId", str)
TaskNumber = NewType("TaskNumber", int)
ObjectKey = NewType("ObjectKey", int)
LeaseId = NewType("LeaseId", int)
SlotId = NewType("SlotId", int)
PeerId = NodeId | ProcessId

INDEX_BITS = 24
MAX_RETURNS = (1 << INDEX_BITS) - 1
NO_NODE = NodeId("0" * 16)


def new_node_id() -> NodeId:
    """Draw the id of a node that starts now."""
    return NodeId(secrets.token_hex(8))


def new_process_id(node: NodeId = NO_NODE) -> ProcessId:
    """Draw the id of a process that starts now on ``node``."""
    return ProcessId(node + secrets.token_hex(4))


def actor_id(creator: ProcessId, number: int) -> ActorId:
    """Return the id of the ``number``-th actor that a process creates."""
    return ActorId(f"{creator}{number:08x}")


def group_id(creator: ProcessId, number: int) -> PlacementGroupId:
    """Return the id of the ``number``-th placement group that a process creates."""
    return PlacementGroupId(f"{creator}{number:08x}")


def creator_of(made: ActorId | PlacementGroupId) -> ProcessId:
    """Return the process that created an actor or a placement group."""
    return ProcessId(made[:24])


def new_service_id() -> ServiceId:
    """Draw the id of one replica of a service that starts now."""
    return ServiceId(secrets.token_hex(8))


def node_of(process: ProcessId) -> NodeId:
    """Return the node a process lives on; ``NO_NODE`` for a driver that has none."""
    return NodeId(process[:16])


def is_node(peer: PeerId) -> bool:
    """Tell whether a peer is a node, not a process."""
    return len(peer) == len(NO_NODE)


def object_key(task: TaskNumber, index: int) -> ObjectKey:
    """Return the owner's key of return ``index`` (from 1) of a task, or of a put (index 0)."""
    return ObjectKey(task << INDEX_BITS | index)


def task_of(key: ObjectKey) -> TaskNumber:
    """Return the number of the task that makes the object ``key``."""
    return TaskNumber(key >> INDEX_BITS)


def index_of(key: ObjectKey) -> int:
    """Return the return index of the object ``key``; 0 for an object made by put."""
    return key & MAX_RETURNS


def is_call(number: TaskNumber) -> bool:
    """Tell whether a task is a call of an actor."""
    return number % 2 == 1


def task_id_bytes(owner: ProcessId, task: TaskNumber) -> bytes:
    """Return the 20 bytes that name a task in the whole cluster."""
    return bytes.fromhex(owner) + task.to_bytes(8, "big")


def told_task_id(owner: str, task: TaskNumber) -> str:
    """Return what people are shown as a task's id: of the making of an actor (number 0), the actor's."""
    return task_id_bytes(ProcessId(owner), task).hex() if task else owner


def object_id_bytes(owner: ProcessId, key: ObjectKey) -> bytes:
    """Return the 24 bytes that name an object in the whole cluster."""
    return task_id_bytes(owner, task_of(key)) + index_of(key).to_bytes(4, "big")


def durable_id(owner: ProcessId, key: ObjectKey) -> str:
    """Return the name of an object in the durable tier: its id, 48 hex digits."""
    return object_id_bytes(owner, key).hex()
