"""The actors that a node hosts: claimed before anything starts, started once, and every end of one told.

An incarnation's life on its node::

    granted ── claim ──► CLAIMING ── it is ours ──► WAITING ── a process takes it ──► MAKING ── ActorReady ──► ALIVE
                            │                          │                                │                        │
                            └── refused: gone          └────────────────────────────────┴────────────────────────┤
                                                                   told to end, or ended by itself: reported, gone

What a node says to the control store about an incarnation (its claim, its start, its end) is said again until it is
answered. The end is reported whoever wanted it: the control store knows what it means.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from shoal_core.protocol.actors import (
    ActorChanged,
    ActorClaim,
    ActorEnded,
    ActorRecord,
    ActorStarted,
    ActorState,
    ClaimActor,
    HostedActor,
    NodeActors,
)
from shoal_core.protocol.effects import Answered, Ask, Effect, Publish
from shoal_core.protocol.errors import BusError, ServiceError, ShoalError
from shoal_core.protocol.ids import ActorId, LeaseId, NodeId, ProcessId
from shoal_core.protocol.messages import JobConfig, Message
from shoal_core.protocol.records import ActorReady
from shoal_core.protocol.scheduling import ActorStart
from shoal_core.protocol.subjects import Role, Subjects

REPEAT_SECONDS = 0.5
TELL_SECONDS = 2.0
MOST_REMEMBERED = 10_000

Incarnation = tuple[ActorId, int]


class Phase(Enum):
    """How far an incarnation is in its life here."""

    CLAIMING = "claiming"
    WAITING = "waiting"
    MAKING = "making"
    ALIVE = "alive"
    OVER = "over"


class Verdict(Enum):
    """What is to become of an incarnation, by what was said about it."""

    KEEP = "keep"
    START = "start"
    RELEASE = "release"
    DISMISS = "dismiss"
    KILL = "kill"


@dataclass(slots=True)
class Hosted:
    """One incarnation on this node, and the lease it has. ``record``, ``spec`` and perhaps its job's ``config`` are
    there once it is claimed.

    ``final``: whenever it ends, no other is to follow it.
    """

    actor: ActorId
    incarnation: int
    lease: LeaseId
    phase: Phase = Phase.CLAIMING
    record: ActorRecord | None = None
    spec: bytes = b""
    config: JobConfig | None = None
    reason: str = ""
    final: bool = False

    @property
    def owner(self) -> ProcessId | None:
        """The process that the actor ends with, where it is known and not detached."""
        if self.record is None or self.record.description.detached:
            return None
        return self.record.description.owner


@dataclass(frozen=True, slots=True)
class About:
    """The context of something said to the control store."""

    incarnation: Incarnation
    verb: str


class ActorTable:
    """All incarnations that a node hosts. What is to be said is left in ``effects``."""

    def __init__(self, node_id: NodeId, subjects: Subjects) -> None:
        self.effects: list[Effect] = []
        self._node_id = node_id
        self._subjects = subjects
        self._hosted: dict[Incarnation, Hosted] = {}
        self._by_lease: dict[LeaseId, Hosted] = {}
        self._claiming: set[LeaseId] = set()
        self._saying: dict[About, tuple[Message, float]] = {}
        self._started: dict[Incarnation, None] = {}
        self._tell_at = float("-inf")

    def __iter__(self) -> Iterator[Hosted]:
        return iter(self._hosted.values())

    def __len__(self) -> int:
        return len(self._hosted)

    @property
    def claiming(self) -> int:
        """How many incarnations are not claimed yet, and will want a process once they are."""
        return len(self._claiming)

    def find(self, lease: LeaseId) -> Hosted | None:
        """Return the incarnation that has a lease."""
        return self._by_lease.get(lease)

    def knows(self, start: ActorStart) -> bool:
        """Tell whether an incarnation was granted a place here before, whatever became of it."""
        incarnation = (start.actor_id, start.incarnation)
        return incarnation in self._started or incarnation in self._hosted

    def owners(self) -> set[ProcessId]:
        """Return the processes that hosted actors end with."""
        return {owner for hosted in self if hosted.phase is not Phase.OVER and (owner := hosted.owner) is not None}

    # ------------------------------------------------------------------------------- a life

    def granted(self, start: ActorStart, lease: LeaseId, now: float) -> None:
        """An incarnation was granted a lease: claim it."""
        incarnation = (start.actor_id, start.incarnation)
        self._started[incarnation] = None
        if len(self._started) > MOST_REMEMBERED:
            del self._started[next(iter(self._started))]
        hosted = Hosted(start.actor_id, start.incarnation, lease)
        self._hosted[incarnation] = self._by_lease[lease] = hosted
        self._claiming.add(lease)
        claim = ClaimActor(actor_id=start.actor_id, incarnation=start.incarnation, node_id=self._node_id)
        self._say(About(incarnation, "claim_actor"), claim, now)

    def assigned(self, hosted: Hosted) -> None:
        """A process makes the instance."""
        hosted.phase = Phase.MAKING

    def ready(self, ready: ActorReady, process: ProcessId, now: float) -> None:
        """The instance is made."""
        incarnation = (ready.actor, ready.incarnation)
        hosted = self._hosted.get(incarnation)
        if hosted is not None and hosted.phase is Phase.MAKING:
            hosted.phase = Phase.ALIVE
            started = ActorStarted(
                actor_id=ready.actor,
                incarnation=ready.incarnation,
                node_id=self._node_id,
                process_id=process,
                pid=ready.pid,
                repr_name=ready.repr_name,
            )
            self._say(About(incarnation, "actor_started"), started, now)

    def over(self, hosted: Hosted, reason: str, now: float, error: bytes = b"", *, final: bool = False) -> None:
        """An incarnation has ended; report it, once."""
        incarnation = (hosted.actor, hosted.incarnation)
        if hosted.phase is Phase.OVER:
            return
        claimed = hosted.phase is not Phase.CLAIMING
        hosted.phase = Phase.OVER
        hosted.final = hosted.final or final
        self._by_lease.pop(hosted.lease, None)
        self._claiming.discard(hosted.lease)
        self._saying.pop(About(incarnation, "actor_started"), None)
        if not claimed:
            # Whether the claim was heard is unknown; the answer to it will tell.
            hosted.reason = reason
            return
        self._report(hosted, reason, now, error)

    def of_process(self, actor: ActorId, incarnation: int) -> Hosted | None:
        """Return an incarnation that a process is making or has made."""
        hosted = self._hosted.get((actor, incarnation))
        return hosted if hosted is not None and hosted.phase in (Phase.MAKING, Phase.ALIVE) else None

    def gone(self, hosted: Hosted) -> None:
        """An incarnation that was never this node's to start is forgotten."""
        self._hosted.pop((hosted.actor, hosted.incarnation), None)
        self._by_lease.pop(hosted.lease, None)
        self._claiming.discard(hosted.lease)

    def _report(self, hosted: Hosted, reason: str, now: float, error: bytes = b"") -> None:
        ended = ActorEnded(
            actor_id=hosted.actor,
            incarnation=hosted.incarnation,
            node_id=self._node_id,
            reason=reason,
            error=error,
            final=hosted.final,
        )
        self._say(About((hosted.actor, hosted.incarnation), "actor_ended"), ended, now)

    # ------------------------------------------------------------------------------- what is heard

    def answered(self, answered: Answered, now: float) -> tuple[Hosted, Verdict] | None:
        """Take in an answer of the control store; return what follows for the incarnation, if anything does."""
        about: About = answered.context
        hosted = self._hosted.get(about.incarnation)
        answer = answered.answer
        if hosted is None or about not in self._saying:
            return None
        if isinstance(answer, BusError | ServiceError):
            return None  # said again in time
        del self._saying[about]
        if about.verb == "actor_ended":
            del self._hosted[about.incarnation]
            return None
        if about.verb == "actor_started":
            return (hosted, Verdict.KILL) if isinstance(answer, ShoalError) else None
        if not isinstance(answer, ActorClaim):
            return hosted, Verdict.RELEASE
        hosted.record, hosted.spec, hosted.config = answer.record, answer.spec, answer.config
        if hosted.phase is Phase.OVER:
            self._report(hosted, hosted.reason, now)
            return None
        hosted.phase = Phase.WAITING
        self._claiming.discard(hosted.lease)
        return hosted, Verdict.START

    def changed(self, news: ActorChanged) -> list[tuple[Hosted, Verdict]]:
        """Take in what the control store says of an actor; return what follows for its incarnations here."""
        return [
            (hosted, Verdict.DISMISS if news.graceful and hosted.phase is Phase.ALIVE else Verdict.KILL)
            for hosted in self
            if hosted.actor == news.actor_id and hosted.phase is not Phase.OVER and self._is_over(hosted, news)
        ]

    def _is_over(self, hosted: Hosted, news: ActorChanged) -> bool:
        if news.state is ActorState.DEAD or news.incarnation > hosted.incarnation:
            return True
        return news.incarnation == hosted.incarnation and news.node_id not in (None, self._node_id)

    def owned_by(self, process: ProcessId) -> list[Hosted]:
        """Return the actors here that end with a process."""
        return [hosted for hosted in self if hosted.phase is not Phase.OVER and hosted.owner == process]

    # ------------------------------------------------------------------------------- time

    def tick(self, now: float) -> None:
        """Say again what was not answered, and tell whom this node hosts."""
        for about, (message, at) in list(self._saying.items()):
            if now >= at:
                self._say(about, message, now)
        if self._hosted and now >= self._tell_at:
            self._tell_at = now + TELL_SECONDS
            living = [hosted for hosted in self if hosted.phase is not Phase.OVER]
            actors = [HostedActor(actor_id=hosted.actor, incarnation=hosted.incarnation) for hosted in living]
            subject = self._subjects.event(Role.NODE, self._node_id, "actors")
            self.effects.append(Publish(subject, NodeActors(node_id=self._node_id, actors=actors)))

    def sanity_check(self) -> None:
        """State the invariants."""
        for lease, hosted in self._by_lease.items():
            assert hosted.lease == lease
            assert self._hosted[hosted.actor, hosted.incarnation] is hosted
            assert hosted.phase is not Phase.OVER
        assert self._claiming == {hosted.lease for hosted in self if hosted.phase is Phase.CLAIMING}
        for incarnation, hosted in self._hosted.items():
            assert incarnation in self._started or len(self._started) >= MOST_REMEMBERED
            assert (hosted.record is None) == (hosted.phase is Phase.CLAIMING) or hosted.phase is Phase.OVER
            if hosted.phase is Phase.CLAIMING:
                assert About(incarnation, "claim_actor") in self._saying, "a claim is asked for until it is answered"
            if hosted.phase is Phase.OVER:
                assert any(about.incarnation == incarnation for about in self._saying), "an end is told until heard"
        assert all(about.incarnation in self._hosted for about in self._saying)

    def _say(self, about: About, message: Message, now: float) -> None:
        self._saying[about] = (message, now + REPEAT_SECONDS)
        self.effects.append(Ask(self._subjects.gcs_from_node(about.verb), message, about))
