"""What this process asks of actors, as a pure core: calls wait in order, go to the actor's process, and come back.

The calls of one process to one actor keep their order. They wait for the actor to be ALIVE, and for the arguments of
those before them; from then on the channel keeps the order. Of an actor that is async or threaded, or is told to, they
are ``unordered``: none waits for the arguments of another. What is in flight when the actor's process ends is
settled by what the control store says of the actor next::

    waiting ── ALIVE, its turn, its arguments are there ──► in flight ── TaskDone ──► ended
       ▲                                                      │
       └──────── RESTARTING, and retries are left ◄───────────┼── RESTARTING, no retries: unavailable
                                                              └── DEAD: died

While an actor is RESTARTING, calls without retries fail at once; others wait. What ended an incarnation is acted on
only after ``GRACE_SECONDS``: the last results of a process may still be on their way when its end is told.

To an actor that runs one call after the other, at most ``WINDOW`` calls are in flight; the others wait here, where
their memory is their caller's. To one that runs several at once all are sent: any of them may be what others wait for.

What the control store says comes as hints (``changed``) and as answers to ``questions``; an actor that somebody waits
for is asked about again and again. What is to be sent collects in ``outgoing``, what failed in ``failed``; of calls
that are traced ``pushed`` says which are among what is to be sent, and to whom, and ``again`` which wait once more, and
which others do of whose last attempt no process tells what ended it, with that. Whoever calls the core empties all of
these.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Any

import msgspec

from shoal_core.protocol.actors import ActorChanged, ActorDeath, ActorState
from shoal_core.protocol.ids import ActorId, PeerId, ProcessId, TaskNumber
from shoal_core.protocol.records import Failed, Record, Task, TaskDone
from shoal_core.runtime.reports.tally import LOST, Tally

GRACE_SECONDS = 0.03
WINDOW = 1024
MISSING_SECONDS = 10.0
"""So long an actor may be unknown to the control store that its creator is just telling of."""

SMOOTHING = 0.3
ASK_SECONDS = 0.5
"""How often the control store is asked about an actor that somebody waits for and that is not ALIVE."""

_RANK = {
    ActorState.NAMING: 0,
    ActorState.PENDING_CREATION: 0,
    ActorState.RESTARTING: 0,
    ActorState.ALIVE: 1,
    ActorState.DEAD: 2,
}


class PendingCall(msgspec.Struct, eq=False, gc=False):
    """A call of this process that has not ended: what is sent, and what its caller needs to know beside it.

    ``dependencies`` are the references it was given as arguments, ``nested`` those inside its arguments and that to the
    actor; the call holds them until it ends, when ``ended`` is called. ``retries`` are those left, -1 for no end of
    them. ``remade``: it had ended, and is made again since results were lost. ``queueing`` is there where it is traced
    (see ``spans``). The collector does not go through it (see ``PendingTask``).
    """

    actor: ActorId
    wire: Task
    retries: int = 0
    dependencies: Sequence[Any] = ()
    nested: Sequence[Any] = ()
    unordered: bool = False
    ended: Callable[[], None] | None = None
    parent: int = 0
    cancelled: bool = False
    unresolved: int = 0
    remade: bool = False
    queueing: Any = None


class Callee:
    """An actor as one of its callers knows it.

    ``queue`` are the calls that wait for their turn; ``late`` those that have to keep no order and lack arguments.
    """

    __slots__ = (
        "actor",
        "ask_at",
        "death",
        "in_flight",
        "incarnation",
        "late",
        "missing_since",
        "name",
        "news",
        "news_at",
        "positions",
        "process",
        "queue",
        "seconds",
        "state",
        "window",
    )

    def __init__(self, actor: ActorId, name: str, window: int) -> None:
        self.actor = actor
        self.name = name
        self.window = window
        self.state = ActorState.PENDING_CREATION
        self.incarnation = 0
        self.process: ProcessId | None = None
        self.death: ActorDeath | None = None
        self.queue: deque[PendingCall] = deque()
        self.late: dict[PendingCall, None] = {}
        self.in_flight: dict[TaskNumber, PendingCall] = {}
        self.positions = 0
        self.seconds: float | None = None
        self.missing_since = math.inf
        self.news: ActorChanged | None = None
        self.news_at = math.inf
        self.ask_at = math.inf

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for news of it."""
        return self.has_calls and self.process is None

    @property
    def has_calls(self) -> bool:
        """Whether calls of it have not ended."""
        return bool(self.queue or self.late or self.in_flight)

    def withdraw(self, what: Callable[[PendingCall], bool]) -> list[PendingCall]:
        """Return the calls that have not been sent and are such, and have them wait no more."""
        withdrawn = [call for call in (*self.queue, *self.late) if what(call)]
        if withdrawn:
            self.queue = deque(call for call in self.queue if not what(call))
            self.late = {call: None for call in self.late if not what(call)}
        return withdrawn

    def died(self) -> Failed:
        """Return what becomes of calls of an actor that is dead."""
        death = self.death or ActorDeath(reason="the control store does not know it any more")
        reason = death.reason if "\n" in death.reason else f"{death.reason}."  # the former ends with a traceback
        text = f"The actor {self.name} ({self.actor}) is dead: {reason}"
        return Failed(death.code, text, death.error, actor=self.actor)

    def unavailable(self) -> Failed:
        """Return what becomes of calls that may not wait for the actor to come back."""
        return Failed(
            "actor_unavailable",
            f"The actor {self.name} ({self.actor}) is being restarted; the call may or may not have been carried out. "
            "With max_task_retries it would be made again.",
            actor=self.actor,
        )


class Calls:
    """All actors that one process calls. Not thread-safe: the I/O thread's.

    ``dead`` is the caller's own set of the processes that are known to be dead: late news may name one of them.
    """

    def __init__(self, dead: Container[str] = (), tally: Tally | None = None) -> None:
        self._dead = dead
        self._tally = tally or Tally()
        self.outgoing: list[tuple[PeerId, Record]] = []
        self.failed: list[tuple[PendingCall, Failed]] = []
        self.pushed: list[tuple[PendingCall, ProcessId]] = []
        self.again: list[tuple[PendingCall, Failed | None]] = []
        self.questions: list[ActorId] = []
        self._callees: dict[ActorId, Callee] = {}
        self._by_process: dict[ProcessId, Callee] = {}
        self._touched: dict[Callee, None] = {}
        self._timed: set[Callee] = set()

    # ------------------------------------------------------------------------------- inputs

    def know(self, actor: ActorId, name: str, *, sequential: bool) -> bool:
        """Have an actor known, ``sequential`` if it runs one call after the other; tell whether it was not known."""
        if actor in self._callees:
            return False
        self._callees[actor] = Callee(actor, name, WINDOW if sequential else sys.maxsize)
        return True

    def knows(self, actor: ActorId) -> bool:
        """Tell whether somebody here has a handle of the actor."""
        return actor in self._callees

    def holding_up(self, actor: ActorId) -> list[PendingCall]:
        """Return the calls that have to end before the actor runs another one."""
        callee = self._callees[actor]
        return list(callee.in_flight.values()) if callee.window == WINDOW else []

    def forget(self, actor: ActorId) -> None:
        """Nobody here has a handle of the actor any more, so nobody waits for its calls."""
        callee = self._callees.pop(actor, None)
        if callee is not None:
            self._timed.discard(callee)
            self._touched.pop(callee, None)
            if callee.process is not None:
                self._by_process.pop(callee.process, None)

    def enqueue(self, call: PendingCall) -> None:
        """Queue a call behind those made before; its arguments may still have to come (``unresolved``).

        One that is made again comes before the others, and holds up none: some of them may wait for its results.
        """
        callee = self._callees[call.actor]
        if call.remade:
            call.unordered = True
            callee.queue.appendleft(call)
        else:
            callee.queue.append(call)
        self._touched[callee] = None

    def resolved(self, call: PendingCall) -> None:
        """The arguments of a call are all there, if it still waits for them."""
        callee = self._callees.get(call.actor)
        if callee is None:
            return
        if call in callee.late:
            del callee.late[call]
            add = callee.queue.appendleft if call.remade else callee.queue.append
            add(call)
        self._touched[callee] = None

    def withdraw(self, call: PendingCall) -> bool:
        """A call will never be made, since an argument has failed; tell whether it still waited."""
        callee = self._callees.get(call.actor)
        if callee is not None and call in callee.late:
            del callee.late[call]
        elif callee is not None and call in callee.queue:
            callee.queue.remove(call)
        else:
            return False
        self._touched[callee] = None
        return True

    def cancel(self, call: PendingCall) -> ProcessId | None:
        """Never make a call again; return the process that has it, or None if none has, and the call ends here."""
        call.cancelled = True
        call.retries = 0
        callee = self._callees.get(call.actor)
        if callee is not None and call.wire.number in callee.in_flight:
            if callee.process is not None:
                return callee.process
            del callee.in_flight[call.wire.number]  # its process is dead: nobody else is going to end it
            return None
        self.withdraw(call)
        return None

    def done(self, process: ProcessId, result: TaskDone) -> PendingCall | None:
        """A call has ended; return it, unless this is not its current attempt or it is made again."""
        callee = self._by_process.get(process)
        if callee is None:
            return None
        call = callee.in_flight.get(result.number)
        if call is None or call.wire.attempt != result.attempt:
            return None
        del callee.in_flight[result.number]
        known = callee.seconds
        callee.seconds = result.seconds if known is None else known + SMOOTHING * (result.seconds - known)
        if callee.queue:
            self._touched[callee] = None
        if result.retryable and call.retries:
            self._tally.retries["raised"] += 1
            self._note_again(call, None)
            _next_attempt(call)
            callee.queue.appendleft(call)
            self._touched[callee] = None
            return None
        return call

    def changed(self, news: ActorChanged, now: float) -> None:
        """Take in what the control store says of an actor; what is older than is known is ignored."""
        callee = self._callees.get(news.actor_id)
        if callee is None or _age(news) <= _age(callee.news or callee):
            return
        ends = news.state is not ActorState.ALIVE or news.incarnation != callee.incarnation
        if callee.in_flight and ends:
            callee.news = news
            callee.news_at = min(callee.news_at, now + GRACE_SECONDS)
            self._timed.add(callee)
        else:
            self._apply(callee, news)

    def gone(self, actor: ActorId, now: float) -> None:
        """The control store knows nothing of an actor: it died long ago, or is only just being created."""
        callee = self._callees.get(actor)
        if callee is None:
            return
        callee.missing_since = min(callee.missing_since, now)
        if now - callee.missing_since >= MISSING_SECONDS:
            death = ActorDeath(reason="the control store does not know it any more")
            self.changed(_dead(callee, death), now)

    def refused(self, actor: ActorId, reason: str) -> None:
        """An actor of this process's own making could not be created."""
        callee = self._callees.get(actor)
        if callee is not None:
            self._apply(callee, _dead(callee, ActorDeath(reason=f"it could not be created: {reason}")))

    def process_died(self, process: ProcessId, now: float) -> None:
        """A process is gone; what becomes of its actor is the control store's to say."""
        callee = self._by_process.pop(process, None)
        if callee is not None:
            callee.process = None
            self._ask(callee, now)

    def reread(self, now: float) -> None:
        """News may have been missed: ask about every actor that somebody waits for."""
        for callee in self._callees.values():
            if callee.has_calls:
                self._ask(callee, now)

    def tick(self, now: float) -> None:
        """Act on news that is old enough, and ask again where news is overdue."""
        for callee in list(self._timed):
            if callee.news is not None and now >= callee.news_at:
                self._apply(callee, callee.news)
            if callee.is_awaited:
                if now >= callee.ask_at:
                    self._ask(callee, now)
            elif callee.news is None:
                self._timed.discard(callee)
                callee.ask_at = math.inf

    # ------------------------------------------------------------------------------- decisions

    def seconds(self, actor: ActorId) -> float | None:
        """Return how long calls of an actor take as a rule; None where none has ended (any thread)."""
        callee = self._callees.get(actor)
        return None if callee is None else callee.seconds

    def pump(self, now: float) -> None:
        """Send what can be sent, and fail what need not wait."""
        touched, self._touched = self._touched, {}
        for callee in touched:
            if callee.state is ActorState.DEAD:
                self.failed += [(call, callee.died()) for call in callee.withdraw(_always)]
            elif callee.process is not None:
                if callee.news is None:  # else its end is known, and only its last results are waited for
                    self._send(callee, callee.process)
            elif callee.state is ActorState.RESTARTING:
                self.failed += [(call, callee.unavailable()) for call in callee.withdraw(_may_not_wait)]
            if callee.is_awaited and callee not in self._timed:
                self._timed.add(callee)
                callee.ask_at = now + ASK_SECONDS

    def quiet(self) -> bool:
        """Tell whether there is nothing that time alone could change."""
        return not self._timed

    def sanity_check(self) -> None:
        """State the invariants."""
        for process, callee in self._by_process.items():
            assert callee.process == process
            assert self._callees.get(callee.actor) is callee
        for callee in self._callees.values():
            assert callee.process is None or self._by_process[callee.process] is callee
            assert callee.process is None or callee.state is ActorState.ALIVE
            assert callee.state is not ActorState.DEAD or not callee.in_flight
            positions = [call.wire.position for call in callee.in_flight.values()]
            assert positions == sorted(positions), "what is in flight was sent in order"
            assert all(call.unordered for call in callee.late)
            assert not callee.is_awaited or callee in self._timed or callee in self._touched, "nobody waits for ever"

    def _send(self, callee: Callee, process: ProcessId) -> None:
        queue, outgoing, in_flight = callee.queue, self.outgoing, callee.in_flight
        while queue and len(in_flight) < callee.window:
            call = queue[0]
            if call.unresolved:
                if not call.unordered:
                    break
                callee.late[queue.popleft()] = None
                continue
            queue.popleft()
            callee.positions += 1
            call.wire.position = callee.positions
            in_flight[call.wire.number] = call
            if call.queueing is not None:
                self.pushed.append((call, process))
            outgoing.append((process, call.wire))

    def _apply(self, callee: Callee, news: ActorChanged) -> None:
        """Make news what is known."""
        new_incarnation = news.incarnation != callee.incarnation
        callee.news, callee.news_at = None, math.inf
        callee.state, callee.incarnation, callee.death = news.state, news.incarnation, news.death
        callee.missing_since = math.inf
        if callee.process is not None and callee.process != news.process_id:
            self._by_process.pop(callee.process, None)
        if news.state is ActorState.DEAD or new_incarnation:
            self._settle_in_flight(callee)
        callee.process = news.process_id if news.state is ActorState.ALIVE else None
        if callee.process in self._dead:
            callee.process = None  # there is newer news, and whoever waits is going to ask for it
        if callee.process is not None:
            self._by_process[callee.process] = callee
        self._touched[callee] = None

    def _settle_in_flight(self, callee: Callee) -> None:
        """Decide on each call whose incarnation has ended, in order."""
        again = []
        for call in callee.in_flight.values():
            if callee.state is ActorState.DEAD:
                self.failed.append((call, callee.died()))
            elif call.retries:
                self._tally.retries[LOST] += 1
                self._note_again(call, callee.unavailable())
                _next_attempt(call)
                again.append(call)
            else:
                self.failed.append((call, callee.unavailable()))
        callee.in_flight.clear()
        callee.queue.extendleft(reversed(again))

    def _note_again(self, call: PendingCall, failure: Failed | None) -> None:
        """Say of a call that is traced, or whose attempt nobody else tells of, that it waits once more."""
        if call.queueing is not None or failure is not None:
            self.again.append((call, failure))

    def _ask(self, callee: Callee, now: float) -> None:
        self.questions.append(callee.actor)
        callee.ask_at = now + ASK_SECONDS
        self._timed.add(callee)


def _always(call: PendingCall) -> bool:
    return True


def _may_not_wait(call: PendingCall) -> bool:
    """Tell whether a call does not wait for a restart: it has no retry left, nor waits for one that it was given."""
    return call.retries == 0 and call.wire.attempt == 0


def _next_attempt(call: PendingCall) -> None:
    call.wire.attempt += 1
    if call.retries > 0:
        call.retries -= 1


def _age(news: ActorChanged | Callee) -> tuple[int, int]:
    """Return what orders news of one actor: nothing is news after its death."""
    if news.state is ActorState.DEAD:
        return 1 << 62, 2
    return news.incarnation, _RANK[news.state]


def _dead(callee: Callee, death: ActorDeath) -> ActorChanged:
    return ActorChanged(
        actor_id=callee.actor,
        state=ActorState.DEAD,
        incarnation=callee.incarnation,
        node_id=None,
        process_id=None,
        graceful=False,
        death=death,
    )
