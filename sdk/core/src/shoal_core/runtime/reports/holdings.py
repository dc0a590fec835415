"""What a process tells of the objects it knows: how large they are, where they lie, and why it keeps them.

Python counts the references inside a process, so why an object is kept has to be found out by looking at whatever of
Shoal holds references: tasks that have not ended, values that contain references, what is kept until the job ends.
Where a reference is held by more than these, it is the user's own. This is a walk over all that is known, made on the
I/O thread only when somebody asks: about a millisecond for a thousand objects.
"""

from __future__ import annotations

import heapq
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from shoal_core.protocol.ids import PeerId, index_of, task_of
from shoal_core.protocol.records import Failed, Inline, KnownObject, ObjectsReported, ReportObjects, Stored
from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState, ObjectTable
from shoal_core.runtime.reactor import Reactor

T = TypeVar("T")

ACTOR_HANDLE = "ACTOR_HANDLE"
USED_BY_PENDING_TASK = "USED_BY_PENDING_TASK"
LOCAL_REFERENCE = "LOCAL_REFERENCE"
CAPTURED_IN_OBJECT = "CAPTURED_IN_OBJECT"
KEPT_FOR_JOB = "KEPT_FOR_JOB"
BORROWED = "BORROWED"

UNKNOWN_BYTES = -1


class Holdings:
    """Answers ``ReportObjects`` for one process. ``in_use`` returns what tasks that run here were given."""

    def __init__(self, reactor: Reactor, table: ObjectTable) -> None:
        self.in_use: Callable[[], Iterable[Sequence[ObjectRef[Any]]]] = lambda: ()
        self._reactor = reactor
        self._table = table
        reactor.records_by_type[ReportObjects] = self._report

    def _report(self, node: PeerId, request: ReportObjects) -> None:
        self._reactor.send(node, self.report(request))

    def report(self, request: ReportObjects) -> ObjectsReported:
        """Describe the largest objects, and count all."""
        reactor = self._reactor
        states = [*self._table.owned.values(), *self._table.borrowed.values()]
        inline_bytes = sum(_size_bytes(state) for state in states if type(state.value) is Inline)
        held_by = _told_by(self._holders(states))
        queued = {id(task) for key in reactor.submission.keys.values() for task in key.queue}
        largest = heapq.nlargest(request.most, states, key=_size_bytes)
        objects = [self._describe(state, held_by.get(id(state), []), queued) for state in largest]
        return ObjectsReported(request.inquiry, os.getpid(), reactor.job, len(states), inline_bytes, objects)

    def _describe(self, state: ObjectState, held_by: list[str], queued: set[int]) -> KnownObject:
        value, local = state.value, self._reactor.local
        borrowers = len(self._reactor.borrowing.lent.get(state.key, ())) if state.owner == local else 0
        node, segment = (value.node, value.segment) if type(value) is Stored else ("", "")
        why, status = self._why(state, held_by, borrowers), self._status(state, queued)
        return KnownObject(state.owner, state.key, _size_bytes(state), status, why, borrowers, node, segment)

    def _why(self, state: ObjectState, held_by: list[str], borrowers: int) -> list[str]:
        reasons = [ACTOR_HANDLE] if state in self._reactor.actors.handles else []
        reasons += held_by or [LOCAL_REFERENCE] * (state.instances > 0 and not reasons)
        return [*reasons, BORROWED] if borrowers else reasons

    def _status(self, state: ObjectState, queued: set[int]) -> str:
        """Return how far the task is that makes an object, in Ray's words; NIL where this process has no such task."""
        if type(state.value) is Failed:
            return "FAILED"
        if state.owner != self._reactor.local or not index_of(state.key):
            return "NIL"
        if state.value is not None:
            return "FINISHED"
        task = self._reactor.tasks.get(task_of(state.key))
        if task is None or task.unresolved:
            return "PENDING_ARGS_AVAIL"
        return "PENDING_NODE_ASSIGNMENT" if id(task) in queued else "SUBMITTED_TO_WORKER"

    def _holders(self, states: Sequence[ObjectState]) -> list[tuple[str, Sequence[ObjectRef[Any]]]]:
        """Return whatever of Shoal holds references, and for which reason."""
        holders: dict[int, tuple[str, Sequence[ObjectRef[Any]]]] = {}

        def note(reason: str, refs: Sequence[ObjectRef[Any]]) -> None:
            if refs:
                holders[id(refs)] = (reason, refs)

        for state in states:
            note(CAPTURED_IN_OBJECT, state.contents)
        for task in self._reactor.tasks.values():
            note(USED_BY_PENDING_TASK, task.dependencies)
            note(USED_BY_PENDING_TASK, task.nested)
        for refs in self.in_use():
            note(USED_BY_PENDING_TASK, refs)
        note(KEPT_FOR_JOB, self._reactor.pinned)
        return list(holders.values())


def _told_by(holders: Sequence[tuple[str, Sequence[ObjectRef[Any]]]]) -> dict[int, list[str]]:
    """Return why objects are kept, by the identity of their states; the user's own references where there are more."""
    held: dict[ObjectRef[Any], list[str]] = {}
    for reason, refs in holders:
        for ref in refs:
            held.setdefault(ref, []).append(reason)
        del ref, refs
    reasons: dict[ObjectState, set[str]] = {}
    known: dict[ObjectState, int] = {}
    for ref, count in _counts(held):
        state = ref._state
        told = reasons.setdefault(state, set())
        told.update(held[ref])
        known[state] = known.get(state, 0) + 1
        if count - _LOOKED_AT > len(held[ref]):
            told.add(LOCAL_REFERENCE)
    for state, told in reasons.items():
        if state.instances > known[state]:  # a reference beside those that were looked at
            told.add(LOCAL_REFERENCE)
    return {id(state): sorted(told, key=_ORDER.index) for state, told in reasons.items()}


def _counts(held: Iterable[T]) -> list[tuple[T, int]]:
    """Return how many references Python counts of each, those of looking at it included."""
    return [(one, sys.getrefcount(one)) for one in held]


def _looked_at() -> int:
    """Return how many references ``_counts`` sees that are only there because it looks: the table's is one."""
    return _counts({object(): None})[0][1]


_LOOKED_AT = _looked_at()
_ORDER = [USED_BY_PENDING_TASK, CAPTURED_IN_OBJECT, KEPT_FOR_JOB, LOCAL_REFERENCE]


def _size_bytes(state: ObjectState) -> int:
    value = state.value
    if type(value) is Stored:
        return value.size_bytes
    if type(value) is Inline:
        return len(value.data) + sum(map(len, value.buffers))
    return UNKNOWN_BYTES if value is None else len(value.data) + len(value.text)  # type: ignore[union-attr]
