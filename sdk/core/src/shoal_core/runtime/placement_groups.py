"""The I/O thread's side of placement groups: making them, hearing what becomes of them, removing them.

What follows from what is heard is in ``groups``. Neither making nor removing makes anybody wait: each is told to the
control store until it has heard it, in the order in which it was asked for. Whoever asks about groups waits for that.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from shoal_core.bus.interface import Bus, Message, Subscription
from shoal_core.bus.requests import ask
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
from shoal_core.protocol.ids import PlacementGroupId
from shoal_core.protocol.messages import Message as Request
from shoal_core.protocol.records import Value
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.wire import decode
from shoal_core.runtime.groups import Groups
from shoal_core.runtime.objects import ObjectState

PAUSE_SECONDS = 0.5
LEAST_SECONDS = 1.0
"""So long the control store has in any case to answer."""


@dataclass(frozen=True, slots=True, eq=False)
class MakeGroup:
    """Command: make a group without a name. What goes wrong comes out of what waits for it."""

    description: GroupDescription


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
        self._heard: dict[PlacementGroupId, Subscription] = {}
        self._making: dict[PlacementGroupId, asyncio.Task[None]] = {}
        self._removing: set[asyncio.Task[None]] = set()
        self._asking: set[PlacementGroupId] = set()

    # ------------------------------------------------------------------------------- commands

    def make(self, command: MakeGroup) -> None:
        """Have a group made, and hear of it from its beginning."""
        group_id = command.description.group_id
        self.core.make(group_id)
        self._hear(group_id)
        self._making[group_id] = self._bus.spawn(self._make(command.description))

    def await_ready(self, command: AwaitGroup) -> None:
        """Make an object ready as soon as a group is."""
        self.core.await_ready(command.group_id, command.state, command.value, time.monotonic())

    def drop(self, command: DropGroup) -> None:
        """Have a group removed."""
        self.core.let_go(command.group_id, time.monotonic())
        task = self._bus.spawn(self._remove(command))
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)

    # ------------------------------------------------------------------------------- turns

    def work_off(self) -> None:
        """Ask what the core wants to know, and hear no more of what it has forgotten."""
        core = self.core
        questions, core.questions = core.questions, []
        for group_id in questions:
            if core.knows(group_id):
                self._hear(group_id)
                if group_id not in self._asking:
                    self._asking.add(group_id)
                    self._bus.spawn(self._ask(group_id))
        unheard, core.unheard = core.unheard, []
        for group_id in unheard:
            if not core.knows(group_id) and (subscription := self._heard.pop(group_id, None)) is not None:
                subscription.unsubscribe()

    def reread(self) -> None:
        """Some news may have been missed."""
        self.core.reread(time.monotonic())
        self.turn()

    async def told(self, timeout_seconds: float) -> None:
        """Return when the control store has heard of all groups that were made and removed here before this call."""
        if tasks := [*self._making.values(), *self._removing]:
            await asyncio.wait(tasks, timeout=timeout_seconds)

    async def ask(self, verb: str, request: Request, timeout_seconds: float) -> Request:
        """Ask the control store something about groups, once it has heard of what was done before."""
        deadline = time.monotonic() + timeout_seconds
        await self.told(timeout_seconds)
        left_seconds = max(LEAST_SECONDS, deadline - time.monotonic())
        return await ask(self._bus, self._subjects.gcs(verb), request, timeout_seconds=left_seconds)

    # ------------------------------------------------------------------------------- inside

    def _hear(self, group_id: PlacementGroupId) -> None:
        if group_id not in self._heard:
            subject = self._subjects.group_changed("*", group_id)
            self._heard[group_id] = self._bus.subscribe(subject, self._on_changed)

    def _on_changed(self, message: Message) -> None:
        self._take(decode(GroupChanged, message.data))

    def _take(self, news: GroupChanged) -> None:
        self.core.changed(news, time.monotonic())
        self.turn()

    async def _ask(self, group_id: PlacementGroupId) -> None:
        asked_at = time.monotonic()
        try:
            record = await ask(self._bus, self._subjects.gcs("get_group"), GetGroup(group_id=group_id))
            assert isinstance(record, GroupRecord)
            self._take(changed(record))
        except NotFoundError:
            self.core.gone(group_id, asked_at, time.monotonic())
            self.turn()
        except (BusError, ServiceError):
            return  # asked again in time, as long as something waits
        finally:
            self._asking.discard(group_id)

    async def _make(self, description: GroupDescription) -> None:
        group_id = description.group_id
        try:
            record = await self._until_heard("create_group", CreateGroup(description=description))
        except BusClosedError:
            return
        except ShoalError as error:
            self.core.refused(group_id, f"it could not be made: {error}", time.monotonic())
            self.turn()
        else:
            assert isinstance(record, GroupRecord)
            self.core.made(group_id, time.monotonic())
            self._take(changed(record))
        finally:
            del self._making[group_id]

    async def _remove(self, command: DropGroup) -> None:
        """Tell the control store, until it has heard it, that a group is to go; not before it has the group."""
        if (making := self._making.get(command.group_id)) is not None:
            await asyncio.wait({making})
        try:
            await self._until_heard("remove_group", RemoveGroup(group_id=command.group_id, reason=command.reason))
        except ShoalError:
            return  # it is not known, so it is gone; or this process is going

    async def _until_heard(self, verb: str, request: Request) -> Request:
        while True:
            try:
                return await ask(self._bus, self._subjects.gcs(verb), request)
            except BusClosedError:
                raise
            except (BusError, ServiceError):
                await asyncio.sleep(PAUSE_SECONDS)


def _nothing() -> None:
    """Nobody has to act on news yet."""
