"""Lineage: what an owner has to remember of tasks that have ended, to run them again when results are lost.

Small results lie in the owner's own memory and are lost only with it. Large ones lie in the shared memory of a node,
and are lost with the node; then the task that made them is run again. For that its *record* is kept: the function, its
small arguments, the names of the objects it was given. Never values: the object that a task was given is freed when
nobody refers to it any more, whether the task may have to run again or not, and is itself made again by *its* task
when that happens. (A small object that the task was given is the exception: it is part of the record, as a small
argument is, so what makes small objects need not be run again.)

A record is kept as long as it may be needed::

    kept  ⇔  a large result of the task is alive  or  a record that is kept has an input that the task made
                     (``live``)                                     (``needs``)

Inputs are always older than what is made from them, so records form no cycles, and when the last reference to the last
result of a chain goes, all records of the chain go.

Running a task again is an attempt like any other: it costs one of the retries that are left. All records together
take at most ``most_bytes``; beyond that the oldest go, for ever. Of a task that cannot be run again (any more), the
name and the reason are kept, so that whoever misses its results is told why. What makes one run again unsound, or
impossible, is a ``Refusal``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from shoal_core.protocol.ids import ObjectKey, TaskNumber, index_of, task_of
from shoal_core.protocol.records import Failed, Inline, Reference
from shoal_core.runtime.tasks.calls import PendingCall
from shoal_core.runtime.tasks.submission import PendingTask

RECORD_BYTES = 1024
"""What a record takes beside its arguments, about."""
INPUT_BYTES = 128
"""What the name of an input takes, about."""


class Refusal(Enum):
    """Why a task cannot be run again; the values are the codes of the errors."""

    PUT = "reconstruction_put"
    RETRIES_DISABLED = "reconstruction_disabled"
    ATTEMPTS_EXCEEDED = "reconstruction_attempts"
    EVICTED = "reconstruction_evicted"
    LINEAGE_DISABLED = "reconstruction_no_lineage"
    CANCELLED = "reconstruction_cancelled"
    UNKNOWN = "reconstruction_unknown"
    ACTOR_UNABLE = "reconstruction_failed"


Small = Inline | Failed


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a task was given: objects as its own arguments, objects referred to inside these, and the small values."""

    dependencies: Sequence[Reference] = ()
    nested: Sequence[Reference] = ()
    small: Mapping[Reference, Small] = field(default_factory=dict)

    def missing(self) -> list[Reference]:
        """Return the objects whose values are not part of the record."""
        return [reference for reference in (*self.dependencies, *self.nested) if reference not in self.small]

    def size_bytes(self) -> int:
        """Return about how much memory this takes."""
        names = len(self.dependencies) + len(self.nested)
        return INPUT_BYTES * names + sum(map(value_bytes, self.small.values()))


NO_INPUTS = Inputs()


@dataclass(slots=True, eq=False)
class Ended:
    """A task that has ended, as far as it is remembered; ``task`` is None where it cannot be run again (``refusal``).

    ``live`` are the indices of its large results that somebody refers to, ``needs`` the tasks that made its inputs.
    """

    number: TaskNumber
    name: str
    live: set[int]
    task: PendingTask | PendingCall | None = None
    inputs: Inputs = NO_INPUTS
    refusal: Refusal | None = None
    needs: frozenset[TaskNumber] = frozenset()
    size_bytes: int = 0


class Lineage:
    """The records of one owner. Not thread-safe: the I/O thread's."""

    def __init__(self, local: str, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.size_bytes = 0
        self._local = local
        self._ended: dict[TaskNumber, Ended] = {}
        self._whole: dict[TaskNumber, Ended] = {}
        self._needed: dict[TaskNumber, int] = {}

    def __len__(self) -> int:
        return len(self._ended)

    def is_needed(self, number: TaskNumber) -> bool:
        """Tell whether a record that is kept has an input that this task made."""
        return number in self._needed

    def of(self, number: TaskNumber) -> Ended | None:
        """Return what is remembered of a task."""
        return self._ended.get(number)

    # ------------------------------------------------------------------------------- what is kept

    def keep(self, task: PendingTask | PendingCall, live: Iterable[int], inputs: Inputs) -> None:
        """A task has ended, for the first time or once more; ``live`` are its large results that are referred to."""
        number = task.wire.number
        alive = set(live)
        if not alive and number not in self._needed:
            self._drop(number)
            return
        ended = self._ended.get(number)
        if ended is None:
            ended = self._ended[number] = Ended(number, task.wire.name, alive)
        ended.live = alive
        if ended.refusal is Refusal.EVICTED:
            return
        if (refusal := self._refusal(task)) is not None:
            self._give_up(ended, refusal)
            return
        self._fill(ended, task, inputs)
        self._limit()

    def freed(self, key: ObjectKey) -> None:
        """Nobody refers to one of our objects any more."""
        ended = self._ended.get(task_of(key))
        if ended is not None:
            ended.live.discard(index_of(key))
            self._settle([task_of(key)])

    def can_remake(self, key: ObjectKey) -> bool:
        """Tell whether there is a task that would make an object anew."""
        ended = self._ended.get(task_of(key))
        return bool(index_of(key)) and ended is not None and ended.task is not None

    def again(self, key: ObjectKey) -> PendingTask | PendingCall | Refusal:
        """Return the task to run again so that an object is made anew, at the cost of a retry; or why not."""
        if not index_of(key):
            return Refusal.PUT
        ended = self._ended.get(task_of(key))
        if ended is None:
            return Refusal.UNKNOWN
        ended.live.add(index_of(key))  # it may have been freed before: somebody refers to it now
        task = ended.task
        if task is None:
            assert ended.refusal is not None
            return ended.refusal
        assert task.retries, "of a task that has none left, only its name is kept"
        if task.retries > 0:
            task.retries -= 1
        task.wire.attempt += 1
        return task

    # ------------------------------------------------------------------------------- decisions

    def _refusal(self, task: PendingTask | PendingCall) -> Refusal | None:
        """Return why a task that ends now is never to be run again."""
        if not self.most_bytes:
            return Refusal.LINEAGE_DISABLED
        if task.cancelled:
            return Refusal.CANCELLED
        if not task.retries:
            return Refusal.ATTEMPTS_EXCEEDED if task.wire.attempt else Refusal.RETRIES_DISABLED
        if not isinstance(task.wire.arguments, Inline):
            return Refusal.PUT  # they lay in shared memory, and went with the task's end
        return None

    def _fill(self, ended: Ended, task: PendingTask | PendingCall, inputs: Inputs) -> None:
        """Make a record whole."""
        self.size_bytes -= ended.size_bytes
        before = ended.needs
        ended.task, ended.inputs = task, inputs
        self._whole[ended.number] = ended
        ended.size_bytes = RECORD_BYTES + value_bytes(task.wire.arguments) + inputs.size_bytes()
        self.size_bytes += ended.size_bytes
        ended.needs = frozenset(
            task_of(reference.key)
            for reference in inputs.missing()
            if reference.owner == self._local and index_of(reference.key)
        )
        for number in ended.needs:
            self._needed[number] = self._needed.get(number, 0) + 1
        self._release(before)

    def _limit(self) -> None:
        """Have the oldest records go while all of them take too much."""
        while self.size_bytes > self.most_bytes:
            self._give_up(next(iter(self._whole.values())), Refusal.EVICTED)

    def _give_up(self, ended: Ended, refusal: Refusal) -> None:
        """Keep of a task only why it is not run again."""
        self.size_bytes -= ended.size_bytes
        self._whole.pop(ended.number, None)
        needs, ended.needs = ended.needs, frozenset()
        ended.task, ended.inputs, ended.size_bytes, ended.refusal = None, NO_INPUTS, 0, refusal
        self._release(needs)

    def _drop(self, number: TaskNumber) -> None:
        if number in self._ended:
            self._ended[number].live.clear()
            self._settle([number])

    def _release(self, needs: Iterable[TaskNumber]) -> None:
        self._settle([number for number in needs if self._needs_less(number)])

    def _needs_less(self, number: TaskNumber) -> bool:
        self._needed[number] -= 1
        if not self._needed[number]:
            del self._needed[number]
        return number not in self._needed

    def _settle(self, numbers: list[TaskNumber]) -> None:
        """Forget those of the tasks that nothing needs any more, and then what only they needed (chains are long)."""
        while numbers:
            number = numbers.pop()
            ended = self._ended.get(number)
            if ended is None or ended.live or number in self._needed:
                continue
            del self._ended[number]
            self._whole.pop(number, None)
            self.size_bytes -= ended.size_bytes
            numbers += [needed for needed in ended.needs if self._needs_less(needed)]

    def sanity_check(self) -> None:
        """State the invariants."""
        assert self.size_bytes == sum(ended.size_bytes for ended in self._ended.values())
        assert self.size_bytes <= self.most_bytes
        needed: dict[TaskNumber, int] = {}
        for number, ended in self._ended.items():
            assert ended.live or number in self._needed, "what nothing needs is forgotten"
            assert (ended.task is None) == (ended.refusal is not None) == (number not in self._whole)
            for other in ended.needs:
                needed[other] = needed.get(other, 0) + 1
        assert needed == self._needed


def value_bytes(value: object) -> int:
    """Return how much memory a small value takes, about."""
    if isinstance(value, Inline):
        return len(value.data) + sum(map(len, value.buffers)) + INPUT_BYTES * len(value.contained)
    return len(value.text) + len(value.data) if isinstance(value, Failed) else 0
