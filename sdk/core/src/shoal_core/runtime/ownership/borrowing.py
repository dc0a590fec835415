"""Who else holds an object: the protocol between owners and borrowers, as a pure core.

Inside a process a reference is a Python object and Python counts it; a container or a task in flight simply holds the
references inside it. What remains is between processes. An owner counts, for each of its objects, how many times each
other process was *counted* as a holder; the borrower knows how many of these it has heard of, and takes exactly those
back when its last reference is gone. Counting instead of flagging is what makes crossing messages safe: a borrower
that lets go while the owner is just sending it the object again takes back only what it knew.

How a reference reaches process R from process S, with the object's owner O:

=====================  ===================================================================================
S is the owner         S counts R as it sends; R knows that when it receives
R is the owner         nothing: S's own release follows on the same channel
neither                S holds the reference under a *transfer*; R asks O to count it (``Borrow``), and after
                       O's ``Borrowed`` tells S (``Held``), which then lets go
argument of a task     the submitter holds it until ``TaskDone``; what the worker still holds then is
                       ``kept``: by that the submitter, if it is the owner, counts the worker; a third party's
                       reference has been asked for at arrival, and ``TaskDone`` waits for the answer
=====================  ===================================================================================

Every pair of processes is joined by a channel that keeps order, which is all this relies on. A process that dies is
forgotten on all sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shoal_core.protocol.ids import ObjectKey, PeerId, ProcessId
from shoal_core.protocol.records import Borrow, Borrowed, Held, Record, Reference, Transfer, Unborrow


class Borrowing:
    """One process's side of the protocol; what is to be sent collects in ``outgoing``."""

    def __init__(self, local: ProcessId) -> None:
        self.local = local
        self.outgoing: list[tuple[PeerId, Record]] = []
        self.lent: dict[ObjectKey, dict[ProcessId, int]] = {}
        self._counted: dict[Reference, int] = {}
        self._asked: dict[Reference, list[Callable[[], None]]] = {}
        self._transfers: dict[int, tuple[ProcessId, Any]] = {}
        self._transfer_count = 0
        self._dead: set[ProcessId] = set()

    # ------------------------------------------------------------------------------- as an owner

    def lend(self, key: ObjectKey, to: ProcessId) -> None:
        """Count ``to`` once more as a holder of our object; the dead hold nothing."""
        if to in self._dead:
            return
        holders = self.lent.setdefault(key, {})
        holders[to] = holders.get(to, 0) + 1

    def asked(self, key: ObjectKey, by: ProcessId) -> None:
        """A borrower asks to be counted (``Borrow``)."""
        self.lend(key, by)
        self.outgoing.append((by, Borrowed(key)))

    def taken_back(self, key: ObjectKey, by: ProcessId, count: int) -> bool:
        """A borrower lets go (``Unborrow``); return whether nobody else holds the object any more."""
        holders = self.lent.get(key)
        if holders is None or by not in holders:
            return False
        holders[by] -= count
        if holders[by] <= 0:
            del holders[by]
        if not holders:
            del self.lent[key]
            return True
        return False

    # ------------------------------------------------------------------------------- as a sender

    def send(self, references: Sequence[Reference], holds: Any, to: ProcessId) -> None:
        """Note that a value with these references inside is about to be sent; ``holds`` keeps them alive."""
        if to in self._dead:
            return
        foreign = []
        for reference in references:
            if reference.owner == self.local:
                self.lend(reference.key, to)
            elif reference.owner != to:
                foreign.append(reference)
        if foreign:
            self._transfer_count += 1
            self._transfers[self._transfer_count] = (to, holds)
            self.outgoing.append((to, Transfer(self._transfer_count, foreign)))

    def held(self, transfer: int) -> None:
        """The receiver's references are counted by their owners (``Held``): let go."""
        self._transfers.pop(transfer, None)

    # ------------------------------------------------------------------------------- as a receiver

    def received(self, references: Iterable[Reference], sender: ProcessId) -> None:
        """A value with these references inside has come; those the sender owns, it has counted us for."""
        for reference in references:
            if reference.owner == sender:
                self._counted[reference] = self._counted.get(reference, 0) + 1

    def transferred(self, transfer: Transfer, sender: ProcessId, holds: Any) -> None:
        """Third parties' references come (``Transfer``); ``holds`` keeps them until their owners count us."""

        def settled(_holds: Any = holds) -> None:
            self.outgoing.append((sender, Held(transfer.transfer)))

        self.ensure(transfer.references, settled)

    def ensure(self, references: Iterable[Reference], then: Callable[[], None]) -> None:
        """Have the owners count us for all of these objects; call ``then`` when they do (perhaps at once).

        A dead owner counts nobody, and its objects are lost: there is nothing to wait for.
        """
        missing = [r for r in references if r.owner != self.local and not self._counted.get(r)]
        missing = [r for r in missing if r.owner not in self._dead]
        left = len(missing)
        if not left:
            then()
            return

        def one() -> None:
            nonlocal left
            left -= 1
            if not left:
                then()

        for reference in missing:
            waiting = self._asked.get(reference)
            if waiting is None:
                self._asked[reference] = [one]
                self.outgoing.append((reference.owner, Borrow(reference.key)))
            else:
                waiting.append(one)

    def counted(self, key: ObjectKey, owner: ProcessId) -> None:
        """An owner has counted us (``Borrowed``); the caller checks whether the reference is still wanted."""
        reference = Reference(owner, key)
        self._counted[reference] = self._counted.get(reference, 0) + 1
        for then in self._asked.pop(reference, ()):
            then()

    def keep(self, reference: Reference) -> None:
        """We told the owner by ``TaskDone.kept`` that we hold its object: it counts us."""
        self._counted[reference] = self._counted.get(reference, 0) + 1

    def is_asked(self, reference: Reference) -> bool:
        """Tell whether an owner's answer is still on its way; the reference must not be let go before."""
        return reference in self._asked

    def let_go(self, reference: Reference) -> None:
        """Our last reference to another's object is gone, and no answer about it is on its way."""
        count = self._counted.pop(reference, 0)
        if count:
            self.outgoing.append((reference.owner, Unborrow(reference.key, count)))

    # ------------------------------------------------------------------------------- ends

    def process_died(self, process: ProcessId) -> list[ObjectKey]:
        """Forget a dead process; return our objects that nobody else holds any more."""
        self._dead.add(process)
        freed = []
        for key, holders in list(self.lent.items()):
            if holders.pop(process, None) is not None and not holders:
                del self.lent[key]
                freed.append(key)
        for transfer, (receiver, _) in list(self._transfers.items()):
            if receiver == process:
                del self._transfers[transfer]
        for reference in [r for r in self._counted if r.owner == process]:
            del self._counted[reference]
        for reference in [r for r in self._asked if r.owner == process]:
            for then in self._asked.pop(reference):
                then()
        return freed

    def is_quiet(self) -> bool:
        """Tell whether nothing is held, asked or on its way."""
        return not (self.lent or self._counted or self._asked or self._transfers or self.outgoing)
