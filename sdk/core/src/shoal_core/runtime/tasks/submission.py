"""Which task goes to which leased worker: the owner's side of the hot path, as a pure core.

Tasks with the same resources and strategy share a *scheduling key*, and leases are held per key. A key's queue is
pushed to its leases in bulk: as much as ``WINDOW_SECONDS`` of work by what its functions have been taking, never
more than one task of a function that has not run yet, so that long tasks are not stacked up behind each other.

A lease's life::

    asked (a slot) ── LeaseGranted ──► held ── idle for IDLE_SECONDS, or recalled and empty ──► returned
                                        │
                                        └── WorkerLost ──► gone; what it had not begun is placed again for free

Where most of a task's large arguments lie on one node, it is queued under a key of its own for that node, whose demand
says so: so leases come from there, and tasks whose data is there find them. It is no more than a wish. Leases that idle
under a key that differs in the wish alone go back as soon as others are wanted.

Schedulers share nodes out between owners; between its own keys an owner does so itself. A key that waits for its first
lease for ``TURN_SECONDS`` has a lease of another key returned as soon as that is empty: one on the node that it wants,
if it wants one. Otherwise work without end under one key would hold all there is, and what is bound to a node would
never have its turn. Where that does not help, it happens half as often each time.

A slot is the id of one lease asked for. A grant for a slot that is no longer wanted goes back at once. The core
collects what is to be sent in ``outgoing``, what has failed in ``failed``, of tasks that are traced in ``pushed`` which
are among what is to be sent, and to whom, and in ``again`` which wait once more, those that are traced and those of
whose last attempt no process tells what ended it, with that; whoever calls it empties all four.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from shoal_core.protocol.ids import (
    NO_NODE,
    LeaseId,
    NodeId,
    PeerId,
    PlacementGroupId,
    ProcessId,
    SlotId,
    TaskNumber,
    node_of,
)
from shoal_core.protocol.placement import DEFAULT, Bundle, Default, NodeAffinity, Selected, Strategy
from shoal_core.protocol.records import (
    Failed,
    LeaseGranted,
    LeaseReturned,
    Record,
    Stored,
    Task,
    TaskDone,
    TasksReturned,
    WorkerLost,
)
from shoal_core.protocol.resources import Resources
from shoal_core.protocol.scheduling import DemandEntry
from shoal_core.runtime.reports.tally import LOST, Tally

WINDOW_SECONDS = 0.010
OVERHEAD_SECONDS = 20e-6
MOST_IN_FLIGHT = 1024
MOST_SLOTS = 256
IDLE_SECONDS = 0.25
OVERRUN_SECONDS = 0.1
"""A task that takes so much longer than predicted: its lease counts as no help to what is queued."""
REPEAT_SECONDS = 1.0
SMOOTHING = 0.3
TURN_SECONDS = 1.0
LONGEST_TURN_SECONDS = 32.0
LARGE_BYTES = 1024 * 1024
"""Arguments of fewer bytes on a node are fetched from wherever they are in less time than a lease takes."""
MOST_NEAR = 4
CANCELLED = "task_cancelled"
"""The code of the error that stands for what a cancelled task would have returned."""
WORKER_CRASHED = "worker_crashed"
"""The code of the error of a task whose worker process died."""
GROUP_REMOVED = "task_group_removed"
"""The code of the error of what cannot run, since its placement group was removed."""


class PendingTask(msgspec.Struct, eq=False, gc=False):
    """A task of this process that has not ended: what is sent, and what its owner needs to know beside it.

    ``dependencies`` are the references it was given as arguments, ``nested`` those inside its arguments; the task
    holds both until it ends. ``retries`` are those left, -1 for no end of them. ``parent`` is the task of this process
    that submitted it, by its order there (0: none). ``remade``: it had ended, and runs again since results were lost.
    ``bounces`` counts how often it came back unrun, because an argument could not be read. ``ready_at`` is when it was
    queued at first, 0 where it was sent to a worker before. ``queueing`` is there where it is traced (see ``spans``).

    There may be very many, and the collector goes through none of them: so whoever ends one, or all, takes from it what
    it holds, by which it might hold itself.
    """

    wire: Task
    key: SchedulingKey
    retries: int
    dependencies: Sequence[Any] = ()
    nested: Sequence[Any] = ()
    parent: int = 0
    cancelled: bool = False
    unresolved: int = 0
    remade: bool = False
    bounces: int = 0
    ready_at: float = 0.0
    queueing: Any = None


@dataclass(frozen=True, slots=True)
class SchedulingClass:
    """What tasks must share to run on the same lease. ``near`` is where most of their large arguments lie.

    ``environment`` is the digest of their runtime environment. ``priority`` None is that of the task which submits
    them, 0 outside of tasks.
    """

    resources: tuple[tuple[str, int], ...]
    strategy: Strategy = DEFAULT
    environment: str = ""
    near: NodeId = NO_NODE
    priority: int | None = None


class Lease:
    """A worker process that is ours for a while, and the tasks pushed to it that have not ended.

    ``since`` is when it became idle, or when it began, as far as we know, what it does now. ``spent``: it runs nothing
    more, and is recalled for that.
    """

    __slots__ = ("blocked", "in_flight", "number", "positions", "recalled", "since", "spent", "stalled", "worker")

    def __init__(self, number: LeaseId, worker: ProcessId, now: float) -> None:
        self.number = number
        self.worker = worker
        self.in_flight: dict[TaskNumber, PendingTask] = {}
        self.positions = 0
        self.blocked = False
        self.stalled = False
        self.recalled = False
        self.spent = False
        self.since = now

    @property
    def is_open(self) -> bool:
        """Whether tasks may be pushed."""
        return not (self.blocked or self.stalled or self.recalled)


class SchedulingKey:
    """The queue, the leases and the open slots of one scheduling class.

    ``alike`` are the keys whose classes differ in nothing but where they want to be, this one among them. ``traced`` is
    a task in the queue whose trace is recorded: the demand names it.
    """

    __slots__ = (
        "alike",
        "index",
        "leases",
        "name",
        "queue",
        "resources",
        "scheduling_class",
        "seconds",
        "slots",
        "traced",
        "turn_at",
        "turn_seconds",
    )

    def __init__(self, index: int, scheduling_class: SchedulingClass, alike: list[SchedulingKey]) -> None:
        self.index = index
        self.alike = alike
        self.scheduling_class = scheduling_class
        self.resources: Resources = dict(scheduling_class.resources)
        self.queue: deque[PendingTask] = deque()
        self.leases: dict[tuple[NodeId, LeaseId], Lease] = {}
        self.slots: dict[SlotId, None] = {}
        self.seconds: dict[str, float] = {}
        self.turn_at = math.inf
        self.turn_seconds = TURN_SECONDS
        self.name = ""
        self.traced: PendingTask | None = None

    def window(self, function: str) -> int:
        """Return how many tasks of a function may be at one worker."""
        seconds = self.seconds.get(function)
        if seconds is None:
            return 1
        return max(1, min(MOST_IN_FLIGHT, int(WINDOW_SECONDS / (seconds + OVERHEAD_SECONDS))))

    def learn(self, function: str, seconds: float) -> None:
        """Take one task's duration into the prediction; a surprise upwards counts at once."""
        known = self.seconds.get(function)
        if known is None or seconds > 4 * known + 0.001:
            self.seconds[function] = seconds
        else:
            self.seconds[function] = known + SMOOTHING * (seconds - known)


class Submission:
    """All scheduling keys of one owner. Not thread-safe but for ``key_for``: the I/O thread's."""

    def __init__(self, tally: Tally | None = None) -> None:
        self.outgoing: list[tuple[PeerId, Record]] = []
        self.failed: list[tuple[PendingTask, Failed]] = []
        self.pushed: list[tuple[PendingTask, ProcessId]] = []
        self.again: list[tuple[PendingTask, Failed | None]] = []
        self.keys: dict[SchedulingClass, SchedulingKey] = {}
        self.demand_changed = False
        self.tally = tally or Tally()
        self._by_index: dict[int, SchedulingKey] = {}
        self._indices = itertools.count()
        self._lease_keys: dict[tuple[NodeId, LeaseId], SchedulingKey] = {}
        self._touched: dict[SchedulingKey, None] = {}
        self._alike: dict[SchedulingClass, list[SchedulingKey]] = {}
        self._slots = 0
        self._repeat_at = math.inf

    def key_for(self, scheduling_class: SchedulingClass) -> SchedulingKey:
        """Return the key of a scheduling class, made at its first use (any thread)."""
        key = self.keys.get(scheduling_class)
        if key is None:
            alike = self._alike.setdefault(replace(scheduling_class, near=NO_NODE), [])
            key = SchedulingKey(next(self._indices), scheduling_class, alike)
            made = self.keys.setdefault(scheduling_class, key)
            if made is not key:
                return made
            self._by_index[key.index] = key
            alike.append(key)
        return key

    def _forget_if_idle(self, key: SchedulingKey) -> None:
        """Forget a key of a placement group that has nothing to do, until it is used again.

        Groups come and go, and may never be used again. Other keys are few, and stay.
        """
        if group_of(key.scheduling_class.strategy) is None or key.queue or key.leases or key.slots:
            return
        if self._by_index.pop(key.index, None) is not None and self.keys.get(key.scheduling_class) is key:
            del self.keys[key.scheduling_class]
            self._alike.pop(key.scheduling_class, None)

    # ------------------------------------------------------------------------------- inputs

    def enqueue(self, task: PendingTask) -> None:
        """Queue a task whose arguments are all there."""
        wire = task.wire
        if wire.dependencies or type(wire.arguments) is Stored:
            task.key = self._nearer(task.key, wire)
        key = task.key
        if key.index not in self._by_index:  # it was forgotten
            self._by_index[key.index] = key
            self.keys.setdefault(key.scheduling_class, key)
        key.queue.append(task)
        if task.queueing is not None and key.traced is None:
            key.traced = task
        self._touched[key] = None

    def _nearer(self, key: SchedulingKey, wire: Task) -> SchedulingKey:
        """Return the key for where a task's arguments lie, if it may run anywhere and they are large."""
        wanted = key.scheduling_class
        if not isinstance(wanted.strategy, Default | Selected):
            return key
        near = argument_bytes(wire)
        best = max(near, key=lambda node: (near[node], node), default=NO_NODE)
        if wanted.near == best:
            return key
        return self.key_for(replace(wanted, near=best))

    def granted(self, node: NodeId, grant: LeaseGranted, now: float) -> None:
        """A node gave us a worker process."""
        key = self._by_index.get(grant.key)
        if key is None or grant.slot not in key.slots:
            self.outgoing.append((node, LeaseReturned(grant.lease)))
            return
        del key.slots[grant.slot]
        if not key.queue:
            self.outgoing.append((node, LeaseReturned(grant.lease)))
            return
        lease = Lease(grant.lease, grant.worker, now)
        key.turn_at, key.turn_seconds = math.inf, TURN_SECONDS
        key.leases[(node, grant.lease)] = lease
        self._lease_keys[(node, grant.lease)] = key
        self._touched[key] = None

    def done(self, worker: ProcessId, result: TaskDone, now: float) -> PendingTask | None:
        """A task has ended, or came back unrun; return it, unless this is no current attempt or it is tried again."""
        place = (node_of(worker), result.lease)
        key = self._lease_keys.get(place)
        if key is None:
            return None
        lease = key.leases[place]
        if result.last:
            lease.spent = lease.recalled = True
        task = lease.in_flight.get(result.number)
        if task is None or task.wire.attempt != result.attempt:
            return None
        del lease.in_flight[result.number]
        lease.stalled = False
        lease.since = now
        if not result.missing:
            key.learn(task.wire.function, result.seconds)
        self._touched[key] = None
        if result.retryable and task.retries:
            self.tally.retries["raised"] += 1
            self._try_again(task)
            return None
        return task

    def returned(self, worker: ProcessId, returned: TasksReturned) -> None:
        """A worker gave back tasks it had not begun, since the one it runs blocks or takes long."""
        place = (node_of(worker), returned.lease)
        key = self._lease_keys.get(place)
        if key is None:
            return
        lease = key.leases[place]
        lease.stalled = True
        tasks = [lease.in_flight.pop(number) for number in returned.numbers if number in lease.in_flight]
        self.failed += [(task, cancelled(task.wire.name)) for task in tasks if task.cancelled]
        tasks = [task for task in tasks if not task.cancelled]
        key.queue.extendleft(reversed(tasks))
        self._note_again(tasks)
        self._touched[key] = None

    def cancel(self, task: PendingTask) -> ProcessId | None:
        """Never try a task again; return the worker that has it, or None if it was queued, and is no more."""
        task.cancelled = True
        task.retries = 0
        key = task.key
        for lease in key.leases.values():
            if task.wire.number in lease.in_flight:
                return lease.worker
        if task in key.queue:
            key.queue.remove(task)
            if task is key.traced:
                key.traced = None
            self._touched[key] = None
        return None

    def find(self, index: int) -> SchedulingKey | None:
        """Return the key of a number, as demand and notices name it."""
        return self._by_index.get(index)

    def give_up(self, key: SchedulingKey) -> list[PendingTask]:
        """Return the queued tasks of a key, which are queued no more: no node can ever run them."""
        tasks = list(key.queue)
        key.queue.clear()
        key.traced = None
        self._touched[key] = None
        return tasks

    def blocked(self, worker: ProcessId, number: LeaseId, blocked: bool) -> None:
        """A worker waits for other objects, or goes on."""
        key = self._lease_keys.get((node_of(worker), number))
        if key is not None:
            key.leases[(node_of(worker), number)].blocked = blocked
            self._touched[key] = None

    def recalled(self, node: NodeId, number: LeaseId) -> None:
        """Others wait: nothing more goes to this lease, and it is returned as soon as it is empty."""
        key = self._lease_keys.get((node, number))
        if key is not None:
            key.leases[(node, number)].recalled = True
            self._touched[key] = None

    def lost(self, node: NodeId, loss: WorkerLost, code: str = WORKER_CRASHED) -> None:
        """The worker process of a lease is gone; ``code`` is that of the error where it was a task's last try."""
        lease = self._remove(node, loss.lease)
        if lease is None:
            return
        again = []
        for task in lease.in_flight.values():
            if loss.group_removed:
                self.failed.append((task, Failed(GROUP_REMOVED, f"Task {task.wire.name}() was ended: {loss.reason}.")))
            elif task.wire.position > loss.begun:
                if task.cancelled:
                    self.failed.append((task, cancelled(task.wire.name)))
                else:
                    self._note_again([task])
                    again.append(task)
            elif task.retries:
                self.tally.retries[LOST] += 1
                self._note_again([task], _crash(task, loss, code))
                self._next_attempt(task)
                again.append(task)
            else:
                self.failed.append((task, _crash(task, loss, code)))
        for task in reversed(again):
            task.key.queue.appendleft(task)
            self._touched[task.key] = None

    def node_lost(self, node: NodeId, reason: str) -> None:
        """A node is dead: so are all its leases, and nobody knows what they had begun."""
        for place in [place for place in self._lease_keys if place[0] == node]:
            self.lost(node, WorkerLost(place[1], 1 << 62, reason), "node_died")

    def tick(self, now: float) -> None:
        """Return leases that have been idle for long enough, count on none that is stuck, and repeat unmet demand."""
        for place, key in list(self._lease_keys.items()):
            lease = key.leases[place]
            if lease.in_flight:
                running = next(iter(lease.in_flight.values())).wire.function
                if not lease.stalled and now - lease.since > key.seconds.get(running, 0.0) + OVERRUN_SECONDS:
                    lease.stalled = True
                    self._touched[key] = None
            elif not key.queue and now - lease.since >= IDLE_SECONDS:
                self._return(place)
        if now >= self._repeat_at:
            self.demand_changed = True
        for key in list(self._by_index.values()):
            if now >= key.turn_at:
                self._make_turn(key, now)

    def _make_turn(self, key: SchedulingKey, now: float) -> None:
        """Have a lease of another key returned, since this one has waited for its first for long."""
        key.turn_at = math.inf
        if key.leases or not key.slots:
            return
        key.turn_seconds = min(2 * key.turn_seconds, LONGEST_TURN_SECONDS)
        key.turn_at = now + key.turn_seconds
        strategy = key.scheduling_class.strategy
        wanted = strategy.node if isinstance(strategy, NodeAffinity) else key.scheduling_class.near
        candidates = [
            (place[0] == wanted, len(other.leases), place, lease, other)
            for place, other in self._lease_keys.items()
            if not ((lease := other.leases[place]).recalled or lease.blocked)
            and (place[0] == wanted or not _is_hard(strategy))
            and group_of(other.scheduling_class.strategy) == group_of(strategy)  # what returns there helps no others
        ]
        if candidates:
            _, _, _, lease, other = max(candidates, key=lambda candidate: candidate[:3])
            lease.recalled = True
            self._touched[other] = None

    # ------------------------------------------------------------------------------- decisions

    def pump(self, now: float) -> None:
        """Push what can be pushed, and ask for the leases that are missing."""
        touched, self._touched = self._touched, {}
        for key in touched:
            if key.queue:
                self._push(key, now)
            for place, lease in list(key.leases.items()):
                if not lease.in_flight and lease.recalled:
                    self._return(place)
            self._want(key, now)
            self._forget_if_idle(key)

    def demand(self, now: float) -> list[DemandEntry]:
        """Return the whole demand as it is to be published now."""
        self.demand_changed = False
        entries = [
            DemandEntry(
                key=key.index,
                name=key.name,
                resources=key.resources,
                strategy=key.scheduling_class.strategy,
                environment=key.scheduling_class.environment,
                near=argument_bytes(key.queue[0].wire) if key.queue and key.scheduling_class.near != NO_NODE else {},
                wanted=len(key.queue),
                slots=list(key.slots),
                depth=key.queue[0].wire.depth if key.queue else 0,
                priority=key.scheduling_class.priority or 0,
                trace="" if key.traced is None else key.traced.wire.trace,
            )
            for key in self.waiting()
        ]
        self._repeat_at = now + REPEAT_SECONDS if entries else math.inf
        return entries

    def waiting(self) -> list[SchedulingKey]:
        """Return the keys that want leases."""
        return [key for key in list(self._by_index.values()) if key.slots]

    def quiet(self) -> bool:
        """Tell whether there is nothing that time alone could change."""
        return not self._lease_keys and self._repeat_at == math.inf

    def close(self) -> None:
        """Give back all leases, those on which tasks are under way to be ended; nothing waits any more."""
        for place, key in list(self._lease_keys.items()):
            self._return(place, kill=bool(key.leases[place].in_flight))
        for key in self.keys.values():
            key.queue.clear()

    def _push(self, key: SchedulingKey, now: float) -> None:
        open_leases = [lease for lease in key.leases.values() if lease.is_open]
        if not open_leases:
            return
        open_leases.sort(key=_load)
        queue, outgoing = key.queue, self.outgoing
        fair = -(-(len(queue) + sum(map(_load, open_leases))) // len(open_leases))
        for lease in open_leases:
            in_flight = lease.in_flight
            before = len(in_flight)
            ready_at = queue[0].ready_at if queue else 0.0
            while queue:
                task = queue[0]
                wire = task.wire
                if len(in_flight) >= min(fair, key.window(wire.function)):
                    break
                queue.popleft()
                if task.queueing is not None:
                    self.pushed.append((task, lease.worker))
                    if task is key.traced:
                        key.traced = None
                if not in_flight:
                    lease.since = now
                lease.positions += 1
                wire.lease = lease.number
                wire.position = lease.positions
                in_flight[wire.number] = task
                task.ready_at = 0.0
                outgoing.append((lease.worker, wire))
            if ready_at and len(in_flight) > before:
                self.tally.queue_seconds.observe(now - ready_at, len(in_flight) - before)

    def _want(self, key: SchedulingKey, now: float) -> None:
        """Ask for as many leases as the queued work is worth, or withdraw what was asked."""
        queued = len(key.queue)
        if not queued:
            if key.slots:
                key.slots.clear()
                key.turn_at = math.inf
                self.demand_changed = True
            return
        key.name = key.queue[0].wire.name
        seconds = key.seconds.get(key.queue[0].wire.function)
        worth = queued if seconds is None else math.ceil(queued * (seconds + OVERHEAD_SECONDS) / (WINDOW_SECONDS / 2))
        usable = sum(lease.is_open for lease in key.leases.values())
        missing = min(worth - (usable if seconds is not None else 0), queued, MOST_SLOTS)
        if seconds is not None and not usable:
            missing = max(missing, 1)
        if len(key.slots) < missing:
            self._return_idle_alike(key)
            if not key.leases and key.turn_at == math.inf:
                key.turn_at = now + key.turn_seconds
        while len(key.slots) < missing:
            self._slots += 1
            key.slots[SlotId(self._slots)] = None
            self.demand_changed = True

    def _return_idle_alike(self, key: SchedulingKey) -> None:
        """Give back the idle leases of the keys that differ from this one in nothing but where they want to be."""
        for other in key.alike:
            if other is not key and not other.queue:
                for place in [place for place, lease in other.leases.items() if not lease.in_flight]:
                    self._return(place)

    def _note_again(self, tasks: Sequence[PendingTask], failure: Failed | None = None) -> None:
        """Say of those that are traced, or whose attempt nobody else tells of, that they wait once more."""
        for task in tasks:
            if task.queueing is not None:
                task.key.traced = task.key.traced or task
            if task.queueing is not None or failure is not None:
                self.again.append((task, failure))

    def _try_again(self, task: PendingTask) -> None:
        self._note_again([task])
        self._next_attempt(task)
        self.enqueue(task)

    def _next_attempt(self, task: PendingTask) -> None:
        task.wire.attempt += 1
        if task.retries > 0:
            task.retries -= 1

    def _return(self, place: tuple[NodeId, LeaseId], *, kill: bool = False) -> None:
        lease = self._remove(*place)
        self.outgoing.append((place[0], LeaseReturned(place[1], kill, lease is not None and lease.spent)))

    def _remove(self, node: NodeId, number: LeaseId) -> Lease | None:
        key = self._lease_keys.pop((node, number), None)
        if key is None:
            return None
        self._touched[key] = None
        return key.leases.pop((node, number))


def argument_bytes(wire: Task) -> dict[NodeId, int]:
    """Return how many bytes of a task's arguments lie in the memory of which node: of each that has a good part."""
    sizes: dict[NodeId, int] = {}
    for value in (wire.arguments, *wire.dependencies):
        if type(value) is Stored:
            sizes[value.node] = sizes.get(value.node, 0) + value.size_bytes
    large = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MOST_NEAR]
    return {node: size for node, size in large if size >= LARGE_BYTES}


def group_of(strategy: Strategy) -> PlacementGroupId | None:
    """Return the placement group in whose bundles leases are, if they are in one."""
    return strategy.group if isinstance(strategy, Bundle) else None


def _is_hard(strategy: Strategy) -> bool:
    return isinstance(strategy, NodeAffinity) and not strategy.soft


def cancelled(name: str) -> Failed:
    """Return what becomes of a task that was cancelled."""
    return Failed(CANCELLED, f"{name}() was cancelled.")


def _load(lease: Lease) -> int:
    return len(lease.in_flight)


def _crash(task: PendingTask, loss: WorkerLost, code: str) -> Failed:
    attempts = task.wire.attempt + 1
    what = f"Task {task.wire.name}() failed after {attempts} attempt{'s' * (attempts > 1)}: {loss.reason}."
    if loss.out_of_memory:
        return Failed("out_of_memory", what)
    if task.cancelled:
        killed = code == WORKER_CRASHED
        return Failed("task_killed" if killed else code, f"{what} It was not retried, since it was cancelled.")
    hint = "" if attempts > 1 else " It was not retried, since max_retries is 0."
    return Failed(code, what + hint)
