"""The I/O thread's side of placement groups: making them, hearing what becomes of them, removing them.

What follows from what is heard is in ``groups``. Neither making nor removing makes anybody wait: each is told to the
control store until it has heard it, in the order in which it was asked for; what was asked for in one turn is told in
packets. Whoever asks about groups waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from shoal_core.bus.interface import Bus, Message, Subscription
from shoal_core.bus.requests import ask, ask_packed
from shoal_core.protocol.errors import BusClosedError, BusError, NotFoundError, ServiceError, ShoalError
from shoal_core.protocol.groups import (
    CreateGroup,
    GetGroup,
    GroupChanged,
    GroupDescription,
    GroupRecord,
    RemoveGroup,
    changed,
)
from shoal_core.protocol.ids import PlacementGroupId, ProcessId, creator_of
from shoal_core.protocol.messages import Message as Request
from shoal_core.protocol.records import Value
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.wire import decode_packet, packets
from shoal_core.runtime.ownership.objects import ObjectState
from shoal_core.runtime.tasks.groups import Groups

PAUSE_SECONDS = 0.5
LEAST_SECONDS = 1.0
"""So long the control store has in any case to answer."""


Heard = Callable[[PlacementGroupId, Request | ShoalError], None]
"""Takes what the control store has answered about a group."""


@dataclass(frozen=True, slots=True, eq=False)
class MakeGroup:
    """Command: make a group without a name. What goes wrong comes out of what waits for it."""

    description: GroupDescription


@dataclass(slots=True)
class Making:
    """A group that the control store is being told of. ``hurried``: it is asked to record it at once."""

    description: GroupDescription
    task: asyncio.Task[None]
    hurried: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class AwaitGroup:
    """Command: ``state`` is an object that becomes ready with a group, and has this value then."""

    group_id: PlacementGroupId
    state: ObjectState
    value: Value


@dataclass(frozen=True, slots=True, eq=False)
class DropGroup:
    """Command: remove a group."""

    group_id: PlacementGroupId
    reason: str


class PlacementGroups:
    """The groups that one process makes, waits for and removes (I/O thread only).

    As many requests are under way as the program makes and removes groups at once: it alone bounds them.
    """

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self.core = Groups()
        self.turn = _nothing
        """Called after news came outside a turn of the reactor's own."""
        self._bus = bus
        self._subjects = subjects
        self._heard: dict[ProcessId, tuple[Subscription, set[PlacementGroupId]]] = {}
        """By their creator: the groups that are listened for."""
        self._to_make: list[GroupDescription] = []
        self._to_remove: list[DropGroup] = []
        self._making: dict[PlacementGroupId, Making] = {}
        self._removing: set[asyncio.Task[None]] = set()
        self._asking: set[PlacementGroupId] = set()

    # ------------------------------------------------------------------------------- commands

    def make(self, command: MakeGroup) -> None:
        """Have a group made, and hear of it from its beginning."""
        group_id = command.description.group_id
        self.core.make(group_id)
        self._hear(group_id)
        self._to_make.append(command.description)

    def await_ready(self, command: AwaitGroup) -> None:
        """Make an object ready as soon as a group is."""
        self.core.await_ready(command.group_id, command.state, command.value, time.monotonic())

    def drop(self, command: DropGroup) -> None:
        """Have a group removed."""
        self.core.let_go(command.group_id, time.monotonic())
        self._to_remove.append(command)

    # ------------------------------------------------------------------------------- turns

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing for ``work_off`` to do."""
        return not (self._to_make or self._to_remove or self.core.questions or self.core.unheard)

    def work_off(self) -> None:
        """Tell what is to be told, ask what the core wants to know, and hear no more of what it has forgotten."""
        core = self.core
        self._tell()
        questions, core.questions = core.questions, []
        for group_id in questions:
            if core.knows(group_id):
                self._hear(group_id)
                if group_id not in self._asking:
                    self._asking.add(group_id)
                    self._bus.spawn(self._ask(group_id))
        unheard, core.unheard = core.unheard, []
        for group_id in unheard:
            if not core.knows(group_id):
                self._hear_no_more(group_id)

    def reread(self) -> None:
        """Some news may have been missed."""
        self.core.reread(time.monotonic())
        self.turn()

    async def told(self, timeout_seconds: float) -> None:
        """Return when the control store has heard of all groups that were made and removed here before this call."""
        self._tell()
        if tasks := self._hurry(list(self._making)) | self._removing:
            await asyncio.wait(tasks, timeout=timeout_seconds)

    async def ask(self, verb: str, request: Request, timeout_seconds: float) -> Request:
        """Ask the control store something about groups, once it has heard of what was done before."""
        deadline = time.monotonic() + timeout_seconds
        await self.told(timeout_seconds)
        left_seconds = max(LEAST_SECONDS, deadline - time.monotonic())
        return await ask(self._bus, self._subjects.gcs(verb), request, timeout_seconds=left_seconds)

    # ------------------------------------------------------------------------------- inside

    def _hear(self, group_id: PlacementGroupId) -> None:
        creator = creator_of(group_id)
        if creator not in self._heard:
            subscription = self._bus.subscribe(self._subjects.groups_changed("*", creator), self._on_changed)
            self._heard[creator] = subscription, set()
        self._heard[creator][1].add(group_id)

    def _hear_no_more(self, group_id: PlacementGroupId) -> None:
        creator = creator_of(group_id)
        if creator in self._heard:
            subscription, groups = self._heard[creator]
            groups.discard(group_id)
            if not groups:
                del self._heard[creator]
                subscription.unsubscribe()

    def _on_changed(self, message: Message) -> None:
        self._take(decode_packet(GroupChanged, message.data))

    def _take(self, news: Iterable[GroupChanged]) -> None:
        now = time.monotonic()
        for change in news:
            self._making.pop(change.group_id, None)
            self.core.changed(change, now)
        self.turn()

    def _tell(self) -> None:
        """Begin to tell the control store of what was made and removed in this turn."""
        making, self._to_make = self._to_make, []
        position = 0
        for count, packet in packets(CreateGroup(description=about, placed_first=True) for about in making):
            told = making[position : position + count]
            position += count
            task = self._bus.spawn(self._make([about.group_id for about in told], packet))
            self._making |= {about.group_id: Making(about, task) for about in told}
        dropped, self._to_remove = self._to_remove, []
        position = 0
        for count, packet in packets(RemoveGroup(group_id=drop.group_id, reason=drop.reason) for drop in dropped):
            groups = [drop.group_id for drop in dropped[position : position + count]]
            position += count
            task = self._bus.spawn(self._remove(groups, packet))
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    def _hurry(self, groups: Iterable[PlacementGroupId]) -> set[asyncio.Task[None]]:
        """Have those groups recorded at once that are still being made; return what makes them."""
        making = [self._making[group_id] for group_id in groups if group_id in self._making]
        slow = [one for one in making if not one.hurried]
        for one in slow:
            one.hurried = True
        for _, packet in packets(CreateGroup(description=one.description) for one in slow):
            with contextlib.suppress(BusError):  # where it gets lost, the answer only takes a moment longer
                self._bus.publish(self._subjects.gcs("create_group"), packet)
        return {one.task for one in making}

    async def _ask(self, group_id: PlacementGroupId) -> None:
        """Ask what the control store has of a group, once it has heard which ones were removed here before."""
        if self._removing:
            await asyncio.wait(set(self._removing))
        asked_at = time.monotonic()
        try:
            record = await ask(self._bus, self._subjects.gcs("get_group"), GetGroup(group_id=group_id))
            assert isinstance(record, GroupRecord)
            self._take([changed(record)])
        except NotFoundError:
            self.core.gone(group_id, asked_at, time.monotonic())
            self.turn()
        except (BusError, ServiceError):
            return  # asked again in time, as long as something waits
        finally:
            self._asking.discard(group_id)

    async def _make(self, groups: Sequence[PlacementGroupId], packet: bytes) -> None:
        """Tell the control store of groups until it has heard of them all."""

        def heard(group_id: PlacementGroupId, answer: Request | ShoalError) -> None:
            now = time.monotonic()
            self._making.pop(group_id, None)
            if isinstance(answer, GroupChanged):
                self.core.made(group_id, now)
                self.core.changed(answer, now)
            else:
                self.core.refused(group_id, f"it could not be made: {answer}", now)

        try:
            await self._until_heard("create_group", CreateGroup, groups, packet, heard)
        finally:
            for group_id in groups:
                self._making.pop(group_id, None)

    async def _remove(self, groups: Sequence[PlacementGroupId], packet: bytes) -> None:
        """Tell the control store, until it has heard it, that groups are to go; not before it has them."""
        if making := self._hurry(groups):
            await asyncio.wait(making)
        # One that is not known is gone.
        await self._until_heard("remove_group", RemoveGroup, groups, packet, lambda group_id, answer: None)

    async def _until_heard(
        self, verb: str, model: type[Request], groups: Sequence[PlacementGroupId], packet: bytes, heard: Heard
    ) -> None:
        """Send a packet until every request in it has an answer that counts; this process going ends it, too."""
        waiting = dict.fromkeys(groups)
        while True:
            try:
                answers = await ask_packed(self._bus, self._subjects.gcs(verb), model, packet, len(groups))
            except BusClosedError:
                return
            except ShoalError as error:
                answers = [error] * len(groups)
            for group_id, answer in zip(groups, answers, strict=True):
                if group_id in waiting and not isinstance(answer, BusError | ServiceError):
                    del waiting[group_id]
                    heard(group_id, answer)
            self.turn()
            if not waiting:
                return
            await asyncio.sleep(PAUSE_SECONDS)


def _nothing() -> None:
    """Nobody has to act on news yet."""
