"""The I/O thread's side of the objects that a process shares with others: asked for, lent, borrowed and let go.

What is counted, and by whom, is decided in ``borrowing``; this keeps the table of objects in step with it, asks the
owners of others' objects for their values, and answers those who ask for this process's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from shoal_core.protocol.ids import ObjectKey, PeerId, ProcessId, node_of
from shoal_core.protocol.records import (
    Borrowed,
    Failed,
    Fetch,
    Fetched,
    ObjectUnavailable,
    Record,
    Reference,
    SegmentFreed,
    Stored,
    Transfer,
    Unborrow,
    Value,
    contained_in,
)
from shoal_core.runtime.ownership.borrowing import Borrowing
from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState, ObjectTable


class Sharing:
    """What one process does with references to its own objects and to those of others (I/O thread only).

    ``dead`` is the process's own set of what is known to be dead. ``settle`` makes an object ready in this turn.
    """

    def __init__(
        self,
        local: ProcessId,
        table: ObjectTable,
        dead: Container[str],
        send: Callable[[PeerId, Record], None],
        settle: Callable[[ObjectState, Value], None],
    ) -> None:
        self.borrowing = Borrowing(local)
        self.released: deque[ObjectState] = deque()
        self.forgotten: Callable[[ObjectState], None] = _nobody_cares
        """Told of every object that nobody in this process refers to any more."""
        self.orphaned: Callable[[ObjectState, Failed], None] = settle
        """Told of objects that are needed and whose owner is dead, and what becomes of them if nobody else has them."""
        self.needed: Callable[[ObjectState], None] = _nobody_cares
        """Told of our objects that were lost, and that somebody needs."""
        self._local = local
        self._table = table
        self._dead = dead
        self.send = send
        self._settle = settle

    # ------------------------------------------------------------------------------- values

    def want(self, states: Iterable[ObjectState]) -> None:
        """Have objects come that are not here: others' from their owners, our own where they were lost."""
        for state in states:
            if state.value is not None:
                continue
            if state.owner == self._local:
                if state.lost is not None:
                    self.needed(state)
            elif not state.fetching:
                self._ask(state)

    def _ask(self, state: ObjectState) -> None:
        """Ask the owner of an object for it, and tell it of the copy that could not be read."""
        if state.owner in self._dead or node_of(state.owner) in self._dead:
            state.fetching = True
            self.orphaned(state, owner_died(state))
            return
        state.fetching = True
        if (lost := state.lost) is not None:
            self.send(state.owner, ObjectUnavailable(state.key, lost.node, lost.segment))
        self.send(state.owner, Fetch(state.key))

    def fetch(self, borrower: ProcessId, fetch: Fetch) -> None:
        """Tell a borrower the value of our object, as soon as it is ready."""
        state = self._table.owned.get(fetch.key)
        if state is None:
            text = f"the object {fetch.key:x} of process {self._local} is gone: its owner had counted no holder of it"
            self.send(borrower, Fetched(fetch.key, Failed("reference_counting", text)))
            return

        self.want((state,))

        def tell(ready: ObjectState) -> None:
            assert ready.value is not None
            ready.heeded = True
            self.lend_contents(ready.value, ready.contents, borrower)
            self.send(borrower, Fetched(fetch.key, ready.value))

        self._table.observe(state, tell)

    def fetched(self, owner: ProcessId, fetched: Fetched) -> None:
        """Take in the value of another's object."""
        value = fetched.value
        state = self._table.borrowed.get(Reference(owner, fetched.key))
        contents = self.adopt(contained_in(value), owner)
        if state is not None:
            state.lost = None
            state.contents = contents
            self._settle(state, value)

    def discard(self, value: Value) -> None:
        """Give back the memory of a value that nobody wants any more."""
        if type(value) is Stored:
            self.send(value.node, SegmentFreed(value.segment))

    # ------------------------------------------------------------------------------- references

    def lend_contents(self, value: Value, holds: Any, to: ProcessId) -> None:
        """Count the receiver of a value as a holder of what the value contains."""
        if contained := contained_in(value):
            self.borrowing.send(contained, holds, to)
            self.flush()

    def flush(self) -> None:
        """Send what is to be said about references."""
        outgoing = self.borrowing.outgoing
        for peer, record in outgoing:
            self.send(peer, record)
        outgoing.clear()

    def adopt(self, references: Sequence[Reference], sender: ProcessId) -> list[ObjectRef[Any]]:
        """Make the references inside a value that came from ``sender``, so that unpickling finds them."""
        refs = [self._table.restore(reference) for reference in references]
        if sender != self._local:
            self.borrowing.received(references, sender)
        return refs

    def transfer(self, sender: ProcessId, transfer: Transfer) -> None:
        """Take over references of third parties."""
        self.borrowing.transferred(transfer, sender, [self._table.restore(r) for r in transfer.references])

    def borrowed(self, owner: ProcessId, borrowed: Borrowed) -> None:
        """An owner has counted this process."""
        self.borrowing.counted(borrowed.key, owner)
        reference = Reference(owner, borrowed.key)
        if reference not in self._table.borrowed:
            self.borrowing.let_go(reference)

    def unborrow(self, borrower: ProcessId, unborrow: Unborrow) -> None:
        """A borrower lets go of our object."""
        if self.borrowing.taken_back(unborrow.key, borrower, unborrow.count):
            self.free_if_unused(unborrow.key)

    def released_now(self) -> None:
        """Count the references that have been dropped up to now."""
        self.release(len(self.released))

    def release(self, count: int) -> None:
        """Count the references that user code dropped, and free what nobody refers to any more."""
        pop = self.released.popleft
        table, local = self._table, self._local
        lent = self.borrowing.lent
        with table.lock:
            gone = []
            for _ in range(count):
                state = pop()
                state.instances -= 1
                if not state.instances:
                    if state.owner != local:
                        table.borrowed.pop(state.wire(), None)
                        gone.append(state)
                    elif state.key not in lent:
                        table.owned.pop(state.key, None)
                        gone.append(state)
        for state in gone:
            self._forget(state)

    def free_if_unused(self, key: ObjectKey) -> None:
        """Free our object if nobody in this process refers to it either."""
        with self._table.lock:
            state = self._table.owned.get(key)
            if state is None or state.instances or key in self.borrowing.lent:
                return
            del self._table.owned[key]
        self._forget(state)

    def _forget(self, state: ObjectState) -> None:
        state.contents = ()
        self.forgotten(state)
        if state.owner == self._local:
            if type(state.value) is Stored:
                self.discard(state.value)
        else:
            reference = state.wire()
            if not self.borrowing.is_asked(reference):
                self.borrowing.let_go(reference)

    # ------------------------------------------------------------------------------- deaths

    def process_died(self, process: ProcessId) -> None:
        """What a dead process held of ours goes, if nobody else holds it; what it owned is lost."""
        for key in self.borrowing.process_died(process):
            self.free_if_unused(key)
        for state in list(self._table.borrowed.values()):
            if state.owner != process:
                continue
            if state.value is None and state.fetching:
                self.orphaned(state, owner_died(state))
            # A segment is freed with its owner, whoever has heard of it; what is mapped stays readable.
            elif type(state.value) is Stored and self._table.lose(state, state.value):
                self.want((state,))


def owner_died(state: ObjectState) -> Failed:
    """Return what becomes of the object of a process that has died."""
    return Failed("owner_died", f"The object was lost: process {state.owner}, which owned it, has died.")


def _nobody_cares(state: ObjectState) -> None:
    """Nothing depends on what becomes of an object."""
