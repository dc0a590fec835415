"""Objects that were lost, and how their owner finds them again (I/O thread only).

A copy is *lost* when its node dies, or when somebody could not read it and says so (``ObjectUnavailable``). That alone
costs nothing: the object's ``value`` goes back to None, and it comes back when somebody needs it, be it a ``get`` or
``wait`` of this process, a task that is to be given it, or another process that asks its owner::

    lost ── needed ──► restored from the durable tier, if it is there
                         │ it is not
                         └──► its task runs again (``lineage``), once for all of its results
                                │  first what the task was given comes back in the same way, freed or lost as it is
                                │ it cannot run
                                └──► the object becomes the error that says why

Whoever waits for the object waits on. One restoration, or one run of its task, is under way for an object at any time.
Of the results of a task that runs again, those that were not lost stay as they are. A generator runs again only up to
the last item that was lost, and after it has ended.

All this ends: each run costs a retry, except where the user allowed any number of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Container, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal_core.protocol.errors import BusClosedError, NotFoundError, ShoalError
from shoal_core.protocol.ids import (
    NO_NODE,
    NodeId,
    ObjectKey,
    ProcessId,
    TaskNumber,
    index_of,
    object_id_bytes,
    object_key,
    task_of,
)
from shoal_core.protocol.records import (
    Failed,
    Inline,
    Item,
    ObjectUnavailable,
    Reference,
    Stored,
    StreamClosed,
    Value,
    contained_in,
)
from shoal_core.runtime.ownership.lineage import Inputs, Lineage, Refusal, Small
from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState, ObjectTable
from shoal_core.runtime.ownership.sharing import Sharing
from shoal_core.runtime.ownership.streams import STREAMING, Stream
from shoal_core.runtime.tasks.calls import PendingCall
from shoal_core.runtime.tasks.submission import CANCELLED, PendingTask

LINEAGE_BYTES = int(os.environ.get("SHOAL_LINEAGE_BYTES", str(1 << 30)))
"""So much memory the records of tasks may take by which lost objects are made again; 0: none are kept."""

FREED = Stored(NO_NODE, "", 0)
"""The copy of an object that was freed, and is needed again."""

Restore = Callable[[ObjectKey, bool], Coroutine[Any, Any, Stored]]
"""Gets one of our objects from the durable tier; ``NotFoundError`` where it is not there. It is told whether the object
could be made again instead."""

_CAUSE = "what it is made from could not be had either. "
BORROWED = "reconstruction_borrowed"
"""The code of the error where something that an object is made from was another process's, and is gone."""
_NO_INPUT = {"reference_counting": BORROWED, "owner_died": BORROWED}


@dataclass(slots=True)
class Replay:
    """A generator that runs again: which is the last item that was lost, and the last that has come."""

    last: int
    received: int = 0


class Recovery:
    """What one owner does about copies that are lost.

    ``run`` submits a task again, ``settle`` makes an object ready in this turn, ``turn`` ends a turn of its own.
    """

    def __init__(
        self,
        table: ObjectTable,
        sharing: Sharing,
        tasks: Mapping[TaskNumber, PendingTask | PendingCall],
        dead: Container[str],
        settle: Callable[[ObjectState, Value], None],
        run: Callable[[PendingTask | PendingCall], bool],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        turn: Callable[[], None],
    ) -> None:
        self.lineage = Lineage(table.local, LINEAGE_BYTES)
        self.restore: Restore = _nothing_is_durable
        self._table = table
        self._sharing = sharing
        self._tasks = tasks
        self._dead = dead
        self._settle = settle
        self._run = run
        self._spawn = spawn
        self._turn = turn
        self._wanted: dict[ObjectState, None] = {}
        self._restoring: set[ObjectKey] = set()
        self._replays: dict[TaskNumber, Replay] = {}
        self._later: dict[TaskNumber, list[ObjectState]] = {}

    def is_quiet(self) -> bool:
        """Tell whether nothing is remembered and nothing is under way."""
        return not (len(self.lineage) or self._wanted or self._restoring or self._replays or self._later)

    # ------------------------------------------------------------------------------- losing

    def node_died(self, node: NodeId) -> None:
        """All copies on a node are lost."""
        for state in [*self._table.owned.values(), *self._table.borrowed.values()]:
            value = state.value
            if type(value) is Stored and value.node == node:
                self._table.lose(state, value)

    def unavailable(self, reader: ProcessId, told: ObjectUnavailable) -> None:
        """Somebody could not read a copy of one of our objects; of older copies we know already."""
        state = self._table.owned.get(told.key)
        value = None if state is None else state.value
        if state is not None and type(value) is Stored and (value.node, value.segment) == (told.node, told.segment):
            self._table.lose(state, value)

    def unreadable(self, state: ObjectState, value: Stored) -> None:
        """This process could not read a copy."""
        if state.value == value or (state.value is None and state.lost is None and not state.fetching):
            self._table.lose(state, value)

    def came_late(self, state: ObjectState, value: Value) -> bool:
        """Tell whether an object's new copy is lost already, since its node has died; then it is not ready."""
        if type(value) is not Stored or value.node not in self._dead:
            return False
        if self._table.lose(state, value):
            self._sharing.want((state,))
        return True

    # ------------------------------------------------------------------------------- finding

    def want(self, state: ObjectState) -> None:
        """Somebody needs one of our objects, which was lost."""
        self._wanted[state] = None

    def work_off(self) -> bool:
        """Begin to find what is needed; return whether there was anything."""
        found = bool(self._wanted)
        while self._wanted:
            state = next(iter(self._wanted))
            del self._wanted[state]
            if state.value is None and state.lost is not None and self._table.owned.get(state.key) is state:
                self._find(state, state.lost)
        return found

    def _find(self, state: ObjectState, lost: Stored) -> None:
        number = task_of(state.key)
        if (task := self._tasks.get(number)) is not None:
            replay = self._replays.get(number)
            if task.wire.returns == STREAMING and (
                replay is None or not replay.received < index_of(state.key) <= replay.last
            ):
                self._later.setdefault(number, []).append(state)
        elif lost is FREED:
            self._remake(state, lost, "")
        elif state.key not in self._restoring:
            self._restoring.add(state.key)
            self._spawn(self._restore(state, lost))

    async def _restore(self, state: ObjectState, lost: Stored) -> None:
        found, reason = None, ""
        try:
            found = await self.restore(state.key, self.lineage.can_remake(state.key))
        except BusClosedError:
            return
        except NotFoundError:
            pass
        except ShoalError as error:
            reason = f" (It could not be restored from the durable tier: {error})"
        finally:
            self._restoring.discard(state.key)
        if state.value is not None or self._table.owned.get(state.key) is not state:
            if found is not None:
                self._sharing.discard(found)
        elif found is not None:
            self._give_back(lost)
            self._settle(state, Stored(found.node, found.segment, found.size_bytes, lost.contained))
        elif task_of(state.key) in self._tasks:
            self.want(state)
        else:
            self._remake(state, lost, reason)
        self._turn()

    def _give_back(self, lost: Stored) -> None:
        """Free what may be left of a copy that could not be read."""
        if lost is not FREED and lost.node not in self._dead:
            self._sharing.discard(lost)

    def _remake(self, state: ObjectState, lost: Stored, reason: str) -> None:
        self._give_back(lost)
        task = self.lineage.again(state.key)
        if isinstance(task, Refusal):
            self._settle(state, self._refused(state, lost, task, reason))
        elif not self._run_again(task):
            self._settle(state, self._refused(state, lost, Refusal.ACTOR_UNABLE, reason))

    def _run_again(self, task: PendingTask | PendingCall) -> bool:
        ended = self.lineage.of(task.wire.number)
        assert ended is not None, "it is what the task is remembered by"
        refs = self._revive(ended.inputs)
        count = len(ended.inputs.dependencies)
        task.dependencies, task.nested = refs[:count], refs[count:]
        task.remade = True
        if task.wire.returns == STREAMING:
            lost = [index for index in ended.live if self._is_missing(task.wire.number, index) is not None]
            task.wire.ahead = max(lost, default=1)
            self._replays[task.wire.number] = Replay(task.wire.ahead)
        return self._run(task)

    def _revive(self, inputs: Inputs) -> list[ObjectRef[Any]]:
        """Return references to what a task was given, whether it was freed meanwhile or not."""
        refs: list[ObjectRef[Any]] = []
        revived: list[ObjectState] = []
        for reference in (*inputs.dependencies, *inputs.nested):
            known = self._table.find(reference)
            refs.append(self._table.restore(reference))
            if known is None:
                revived.append(refs[-1]._state)
        for state in revived:
            small = inputs.small.get(state.wire())
            if small is not None:
                state.contents = [self._table.restore(reference) for reference in contained_in(small)]
                self._settle(state, small)
            elif state.owner == self._table.local:
                state.lost = FREED
        self._sharing.borrowing.ensure([state.wire() for state in revived], _nothing)
        return refs

    # ------------------------------------------------------------------------------- tasks that end

    def ended(self, task: PendingTask | PendingCall, live: Collection[int]) -> None:
        """A task has ended; ``live`` are the indices of its large results that somebody refers to."""
        number = task.wire.number
        if live or task.remade or self.lineage.is_needed(number):
            self.lineage.keep(task, live, _inputs(task))
        task.wire.dependencies, task.wire.origins = (), ()

    def outcome(self, task: PendingTask | PendingCall, value: Value) -> Value:
        """Return what a result of a task is to be that ran again: where it failed, perhaps another error."""
        if type(value) is not Failed:
            return value
        name = task.wire.name
        if value.code == CANCELLED:
            text = f"An object that was lost is not made again: {name}(), which makes it, was cancelled."
            return Failed(Refusal.CANCELLED.value, text)
        code = _NO_INPUT.get(value.code, value.code)
        if code != "object_lost" and not code.startswith("reconstruction_"):
            return value
        cause = value.text.rpartition(_CAUSE)[2]
        return Failed(code, f"An object that {name}() had made was lost, and {_CAUSE}{cause}")

    def item(self, worker: ProcessId, item: Item) -> ObjectState | None:
        """Take in an item of a generator that runs again; return its object, if it was lost."""
        replay = self._replays[item.number]
        replay.received = max(replay.received, item.index)
        if item.index >= replay.last:
            self._sharing.send(worker, StreamClosed(item.number))
        state = self._is_missing(item.number, item.index)
        if state is not None:
            state.lost = None
        return state

    def stream_ended(self, task: PendingTask | PendingCall, stream: Stream | None, failed: Failed | None) -> None:
        """A generator has ended, for the first time (``stream``) or once more."""
        number = task.wire.number
        if stream is not None:
            indices: Iterable[int] = stream.stored
        else:
            replay, ended = self._replays.pop(number), self.lineage.of(number)
            indices = () if ended is None else ended.live
            for index in range(replay.received + 1, replay.last + 1):
                if (state := self._is_missing(number, index)) is not None:
                    self._settle(state, failed or _not_yielded(task, index))
        self.ended(task, {index for index in indices if object_key(number, index) in self._table.owned})
        for state in self._later.pop(number, ()):
            self.want(state)

    def _is_missing(self, number: TaskNumber, index: int) -> ObjectState | None:
        """Return the object of an item if it was lost, and somebody refers to it."""
        state = self._table.owned.get(object_key(number, index))
        return None if state is None or state.value is not None or state.lost is None else state

    def forgotten(self, state: ObjectState) -> None:
        """Nobody refers to one of our objects any more."""
        if len(self.lineage):
            self.lineage.freed(state.key)

    # ------------------------------------------------------------------------------- errors

    def _refused(self, state: ObjectState, lost: Stored, refusal: Refusal, reason: str) -> Failed:
        """Say of an object which it is, where it was lost, why it is not made again, and what to do."""
        name = object_id_bytes(state.owner, state.key).hex()
        ended = self.lineage.of(task_of(state.key))
        made = f"made by {ended.name}()" if ended is not None else "made by put()" if refusal is Refusal.PUT else ""
        what = f"Object {name}{f', {made},' if made else ''}"
        where = "was freed" if lost is FREED else f"was lost with its {lost.size_bytes:,} bytes on node {lost.node}"
        return Failed(refusal.value, f"{what} {where}, and {_WHY[refusal]}{reason}")


_WHY = {
    Refusal.PUT: "no task makes it again: it, or an argument of its task, was a large value and not the result of a "
    "task. What must survive its node can be kept with put(x, durable=True).",
    Refusal.RETRIES_DISABLED: "its task may not run again, since its max_retries (of a method of an actor: "
    "max_task_retries) is 0. Allow retries where running it again does no harm.",
    Refusal.ATTEMPTS_EXCEEDED: "its task has been run as often as its max_retries allows. Allow more, or keep what "
    "must survive its node with put(x, durable=True).",
    Refusal.EVICTED: "the record of its task was dropped, since all such records took more than "
    f"{LINEAGE_BYTES:,} bytes of memory. Raise SHOAL_LINEAGE_BYTES in the environment of its owner.",
    Refusal.LINEAGE_DISABLED: "its task is not remembered, since SHOAL_LINEAGE_BYTES is 0 in the environment of its "
    "owner.",
    Refusal.CANCELLED: "its task was cancelled.",
    Refusal.UNKNOWN: "its owner does not remember its task. Keep a reference to what may be needed again.",
    Refusal.ACTOR_UNABLE: "it was made by a method of an actor of which this process has no handle any more, or which "
    "runs one call after the other and is now at one that waits for this very object.",
}


def _not_yielded(task: PendingTask | PendingCall, index: int) -> Failed:
    return Failed(
        "reconstruction_failed",
        f"Item {index} of the generator {task.wire.name}() was lost, and did not come when it ran again: it yielded "
        "fewer items than before. What a generator yields must not change from one run to the next.",
    )


def _inputs(task: PendingTask | PendingCall) -> Inputs:
    """Return what a task was given, and what of it is small: what is referred to inside small objects belongs to it."""
    small: dict[Reference, Small] = {}
    nested: dict[Reference, None] = {}
    inside = list(task.nested)

    def look(ref: ObjectRef[Any]) -> Reference:
        reference, value = ref._state.wire(), ref._state.value
        if isinstance(value, Inline | Failed) and reference not in small:
            small[reference] = value
            inside.extend(ref._state.contents)
        return reference

    dependencies = [look(ref) for ref in task.dependencies]
    while inside:
        ref = inside.pop()
        if (reference := ref._state.wire()) not in nested:
            nested[reference] = None
            look(ref)
    return Inputs(dependencies, list(nested), small)


async def _nothing_is_durable(key: ObjectKey, remakable: bool) -> Stored:
    raise NotFoundError(f"object {key:x} is not durable")


def _nothing() -> None:
    """Nobody waits for the owners' answers."""
