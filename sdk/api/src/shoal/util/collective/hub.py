"""Where the ranks of a collective group meet: an actor that exchanges references, and reduces what is to be reduced.

Every rank numbers its operations, so that all operations of one number belong together. Values stay where they are; the
hub hands on references to them, and reads only what it reduces. An operation ends when all ranks have come; who waits
for one that does not come within the group's time is told which ranks are missing.
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy

from shoal.objects import put
from shoal.util.collective.types import ReduceOp

REDUCTIONS = {
    ReduceOp.SUM: numpy.add,
    ReduceOp.PRODUCT: numpy.multiply,
    ReduceOp.MIN: numpy.minimum,
    ReduceOp.MAX: numpy.maximum,
}

Given = list[Any]
"""References to what one rank brings: none, its tensor, or one tensor for each rank."""


@dataclass(frozen=True)
class Operation:
    """What all ranks have to agree on; ``root`` is -1 where there is none."""

    kind: str
    op: ReduceOp = ReduceOp.SUM
    root: int = -1

    def __str__(self) -> str:
        root = "" if self.root < 0 else f" of rank {self.root}"
        return f"{self.kind}({self.op.name}){root}" if "reduce" in self.kind else f"{self.kind}{root}"


@dataclass
class Round:
    """One operation, and who has come to it."""

    operation: Operation
    outcome: asyncio.Future[list[Given]]
    given: dict[int, Given] = field(default_factory=dict)
    left: int = 0


class Hub:
    """The meeting point of one group of ``size`` ranks."""

    def __init__(self, size: int, seconds: float, declared: dict[str, int]) -> None:
        self._size = size
        self._seconds = seconds
        self._declared = declared
        self._members: dict[int, str] = {}
        self._gone: set[int] = set()
        self._rounds: dict[int, Round] = {}
        self._sent: dict[tuple[int, int, int], asyncio.Future[tuple[Given, asyncio.Future[None]]]] = {}

    async def terms(self) -> tuple[int, float, dict[str, int]]:
        """Return the size of the group, its time, and the ranks of actors that were declared."""
        return self._size, self._seconds, self._declared

    async def join(self, rank: int, size: int, process: str) -> None:
        """Take a rank. Raises ``ValueError`` for another size, ``RuntimeError`` where another process has the rank."""
        if size != self._size:
            raise ValueError(f"The group has {self._size} ranks, not {size}.")
        if self._members.setdefault(rank, process) != process:
            raise RuntimeError(f"Rank {rank} of the group is taken by another process.")
        self._gone.discard(rank)

    async def leave(self, rank: int) -> bool:
        """Give a rank up; tell whether all have done so, so that the hub may end."""
        self._members.pop(rank, None)
        self._gone.add(rank)
        return len(self._gone) == self._size

    async def meet(self, number: int, rank: int, operation: Operation, given: Given) -> Given:
        """Bring what one rank has to an operation; return what it takes away, once all have come."""
        meeting = self._rounds.get(number)
        if meeting is None:
            meeting = Round(operation, asyncio.get_running_loop().create_future())
            self._rounds[number] = meeting
        meeting.given[rank] = given
        if operation != meeting.operation and not meeting.outcome.done():
            text = f"Ranks disagree: rank {rank} calls {operation}, others {meeting.operation}."
            meeting.outcome.set_exception(RuntimeError(text))
        elif len(meeting.given) == self._size and not meeting.outcome.done():
            await self._conclude(meeting)
        try:
            async with asyncio.timeout(self._seconds):
                taken: list[Given] = await asyncio.shield(meeting.outcome)
            return taken[rank]
        except TimeoutError:
            missing = sorted({*range(self._size)} - {*meeting.given})
            raise TimeoutError(f"{operation} has waited {self._seconds:g} s for ranks {missing}.") from None
        finally:
            meeting.left += 1
            if meeting.left == self._size:
                del self._rounds[number]

    async def _conclude(self, meeting: Round) -> None:
        try:
            outcome = await self._outcome(meeting.operation, [meeting.given[rank] for rank in range(self._size)])
        except Exception as error:
            meeting.outcome.set_exception(error)
        else:
            meeting.outcome.set_result(outcome)

    async def _outcome(self, operation: Operation, given: list[Given]) -> list[Given]:
        """Return what each rank takes away."""
        match operation.kind:
            case "broadcast":
                return [given[operation.root]] * self._size
            case "allgather":
                return [[ref for (ref,) in given]] * self._size
            case "allreduce" | "reduce":
                whole = [put(await _reduced(operation.op, [ref for (ref,) in given]))]
                return [whole if operation.root in (-1, rank) else [] for rank in range(self._size)]
            case "reducescatter":
                parts = [[refs[rank] for refs in given] for rank in range(self._size)]
                return [[put(await _reduced(operation.op, part))] for part in parts]
        return [[]] * self._size

    # ------------------------------------------------------------------------------- from one to one

    async def send(self, number: int, sender: int, receiver: int, given: Given) -> None:
        """Hand a tensor to another rank; returns when that has taken it."""
        taken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = self._place(sender, receiver, number)
        place.set_result((given, taken))
        await self._patiently(taken, f"send to rank {receiver}", receiver)

    async def receive(self, number: int, sender: int, receiver: int) -> Given:
        """Take what another rank sends; returns when it is there."""
        place = self._place(sender, receiver, number)
        given: Given
        given, taken = await self._patiently(place, f"recv from rank {sender}", sender)
        del self._sent[sender, receiver, number]
        taken.set_result(None)
        return given

    def _place(self, sender: int, receiver: int, number: int) -> asyncio.Future[tuple[Given, asyncio.Future[None]]]:
        make = asyncio.get_running_loop().create_future
        key = (sender, receiver, number)
        if key not in self._sent:
            self._sent[key] = make()
        return self._sent[key]

    async def _patiently(self, what: asyncio.Future[Any], name: str, other: int) -> Any:
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(what)
        except TimeoutError:
            raise TimeoutError(f"{name} has waited {self._seconds:g} s for ranks [{other}].") from None


async def _reduced(op: ReduceOp, refs: list[Any]) -> Any:
    arrays = [await ref for ref in refs]
    shapes = {(array.shape, array.dtype.str) for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"The tensors to be reduced differ in shape or type: {sorted(map(str, shapes))}.")
    if len(arrays) == 1:
        return arrays[0]
    return functools.reduce(lambda a, b: REDUCTIONS[op](a, b, out=a), arrays[1:], arrays[0].copy())
