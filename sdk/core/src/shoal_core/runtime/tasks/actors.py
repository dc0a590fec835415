"""The I/O thread's side of a process's actors: hearing what becomes of them, making them, letting them go.

What is decided about calls is in ``calls``; this follows the actors that it knows of, asks the control store where it
wants to know more, and keeps what an actor's creator owes it: the references among the arguments of its making, for as
long as it may be started again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_core.bus.interface import Bus, Message, Subscription
from shoal_core.bus.requests import ask
from shoal_core.protocol.actors import (
    ActorChanged,
    ActorDescription,
    ActorRecord,
    ActorState,
    CreateActor,
    GetActor,
    KillActor,
    ReleaseActor,
    changed,
)
from shoal_core.protocol.errors import BusClosedError, BusError, NotFoundError, ServiceError, ShoalError
from shoal_core.protocol.ids import ActorId
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.wire import decode
from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState
from shoal_core.runtime.reports.tally import Tally
from shoal_core.runtime.tasks.calls import Calls

PAUSE_SECONDS = 0.5
CREATION_SECONDS = 3.0
"""So long an actor may be unknown to the control store of which there is a handle already."""
KILL_PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Follow:
    """Command: a handle of an actor is here; it lives as long as the reference whose ``state`` this is.

    ``new``: it is this process that has it created. ``uncounted``: nobody has counted this process as a holder.
    """

    actor: ActorId
    name: str
    sequential: bool
    state: ObjectState
    new: bool = False
    uncounted: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """Command: ``state`` is the creation object of this process's own actor, which goes when nobody refers to it."""

    actor: ActorId
    state: ObjectState


@dataclass(frozen=True, slots=True, eq=False)
class Create:
    """Command: create an actor of this process; ``holds`` are the references among what it is made from."""

    description: ActorDescription
    spec: bytes
    holds: Sequence[ObjectRef[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Abandon:
    """Command: it is not known whether an actor of this process was created, and nobody has a handle of it."""

    actor: ActorId


@dataclass(frozen=True, slots=True, eq=False)
class Created:
    """Command: an actor of this process was created by a request that somebody waited for."""

    actor: ActorId
    holds: Sequence[ObjectRef[Any]]


class Actors:
    """The actors that one process calls or has created (I/O thread only)."""

    def __init__(self, bus: Bus, subjects: Subjects, dead: Container[str], tally: Tally) -> None:
        self.calls = Calls(dead, tally)
        self.handles: dict[ObjectState, ActorId] = {}
        self._bus = bus
        self._subjects = subjects
        self._heard: dict[ActorId, Subscription] = {}
        self._states: dict[ActorId, set[ObjectState]] = {}
        self._holds: dict[ActorId, Sequence[ObjectRef[Any]]] = {}
        self._owned: dict[ObjectState, ActorId] = {}
        self._creating: dict[ActorId, asyncio.Task[None]] = {}
        self._asking: set[ActorId] = set()
        self._loop = asyncio.get_running_loop()
        self.turn = _nothing
        """Called after news came outside a turn of the reactor's own."""

    # ------------------------------------------------------------------------------- commands

    def follow(self, command: Follow) -> None:
        """Hear of an actor from now on."""
        self.handles[command.state] = command.actor
        self._states.setdefault(command.actor, set()).add(command.state)
        if self.calls.know(command.actor, command.name, sequential=command.sequential):
            subject = self._subjects.actor_changed("*", command.actor)
            self._heard[command.actor] = self._bus.subscribe(subject, self._on_changed)
            if not command.new:
                self._ask(command.actor)

    def create(self, command: Create) -> None:
        """Have an actor created; whatever becomes of it comes out of its calls."""
        actor = command.description.actor_id
        self._holds[actor] = command.holds
        self._creating[actor] = self._bus.spawn(self._create(command))

    def created(self, command: Created) -> None:
        """Take in a creation that is done: keep what the actor is made of."""
        self._holds[command.actor] = command.holds

    def abandon(self, command: Abandon) -> None:
        """Release an actor that may exist."""
        self._bus.spawn(self._release(command.actor))

    async def kill(self, request: KillActor) -> None:
        """Have an actor killed, once the control store has it: its creation may be under way, here or elsewhere."""
        if (creating := self._creating.get(request.actor_id)) is not None:
            await asyncio.wait({creating})
        deadline = time.monotonic() + CREATION_SECONDS
        while True:
            try:
                await ask(self._bus, self._subjects.gcs("kill_actor"), request)
                return
            except NotFoundError:
                if time.monotonic() >= deadline:
                    return  # it died long ago
                await asyncio.sleep(KILL_PAUSE_SECONDS)

    def own(self, command: Own) -> None:
        """Release an actor of this process when nobody refers to its creation object any more."""
        self._owned[command.state] = command.actor

    def released(self, state: ObjectState) -> None:
        """The object behind a handle is gone: so are the handles that it stood for."""
        actor = self.handles.pop(state)
        states = self._states[actor]
        states.discard(state)
        if not states:
            del self._states[actor]
            self._heard.pop(actor).unsubscribe()
            self.calls.forget(actor)
        if self._owned.pop(state, None) is not None:
            self._holds.pop(actor, None)
            self._bus.spawn(self._release(actor))

    def ask(self) -> None:
        """Ask the control store what ``calls`` wants to know."""
        questions, self.calls.questions = self.calls.questions, []
        for actor in questions:
            self._ask(actor)

    def reread(self) -> None:
        """Some news may have been missed."""
        self.calls.reread(time.monotonic())
        self.turn()

    # ------------------------------------------------------------------------------- inside

    def _on_changed(self, message: Message) -> None:
        self._take(decode(ActorChanged, message.data))

    def _take(self, news: ActorChanged) -> None:
        if news.state is ActorState.DEAD:
            self._holds.pop(news.actor_id, None)
        self.calls.changed(news, time.monotonic())
        self.turn()

    def _ask(self, actor: ActorId) -> None:
        if actor not in self._asking:
            self._asking.add(actor)
            self._bus.spawn(self._ask_now(actor))

    async def _ask_now(self, actor: ActorId) -> None:
        try:
            record = await ask(self._bus, self._subjects.gcs("get_actor"), GetActor(actor_id=actor))
            assert isinstance(record, ActorRecord)
            self._take(changed(record))
        except NotFoundError:
            self.calls.gone(actor, time.monotonic())
            self.turn()
        except (BusError, ServiceError):
            return  # asked again in time, as long as somebody waits
        finally:
            self._asking.discard(actor)

    async def _create(self, command: Create) -> None:
        request = CreateActor(description=command.description, spec=command.spec)
        actor, trace = command.description.actor_id, command.description.trace
        while True:
            try:
                record = await ask(self._bus, self._subjects.gcs("create_actor"), request, trace=trace)
            except BusClosedError:
                return
            except (BusError, ServiceError):
                await asyncio.sleep(PAUSE_SECONDS)
            except ShoalError as error:
                self._holds.pop(actor, None)
                self.calls.refused(actor, str(error))
                self.turn()
                break
            else:
                assert isinstance(record, ActorRecord)
                self._take(changed(record))
                break
        del self._creating[actor]

    async def _release(self, actor: ActorId) -> None:
        """Tell the control store, until it has heard it, that nobody has a handle; not before it has the actor."""
        if (creating := self._creating.get(actor)) is not None:
            await asyncio.wait({creating})
        request = ReleaseActor(actor_id=actor, reason="all its handles are gone")
        while True:
            try:
                await ask(self._bus, self._subjects.gcs("release_actor"), request)
                return
            except BusClosedError:
                return
            except (BusError, ServiceError):
                await asyncio.sleep(PAUSE_SECONDS)
            except ShoalError:
                return  # it is not known, so it is gone


def _nothing() -> None:
    """Nobody has to act on news yet."""
