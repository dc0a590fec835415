"""The placement groups that something in this process waits for, as a pure core.

Two things wait for a group: objects that become ready with it (``await_ready``), and scheduling keys whose queued tasks
want leases out of its bundles (``demanded``). Both learn from what the control store says of the group::

    PENDING, RESCHEDULING ──► they wait      CREATED ──► its objects are ready      REMOVED ──► they fail, for good

What it says comes as hints (``changed``), each newer than those before or ignored, and as answers to ``questions``. A
group is asked about when something begins to wait for it and nothing is known, after a reconnect (``reread``), and
every ``ASK_SECONDS``, since a hint may be lost. Groups that this process makes are known from their beginning, so that
what becomes of them is there when it is asked for; nobody asks about one before the control store has it (``made``).

What is to be done collects in ``questions``, ``settled``, ``given_up`` and ``unheard``; whoever calls empties them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from shoal_core.protocol.groups import GroupChanged, GroupState
from shoal_core.protocol.ids import PlacementGroupId
from shoal_core.protocol.records import Failed, Value
from shoal_core.runtime.ownership.objects import ObjectState
from shoal_core.runtime.tasks.submission import GROUP_REMOVED, SchedulingKey, group_of

ASK_SECONDS = 5.0
ASK_SOON_SECONDS = 0.5
MISSING_SECONDS = 10.0
"""So long a group may be unknown to the control store that its creator is just telling of."""
MOST_DROPPED = 10_000
"""Of so many groups this process remembers that it has removed them."""


class Group:
    """A group as this process knows it. ``news`` is the newest that was said of it; None: nothing yet.

    ``own``: it was made here, and is known as long as it lives. ``making``: the control store may not have it yet.
    ``missing_since`` is when the control store first did not know it.
    """

    __slots__ = ("ask_at", "group_id", "keys", "making", "missing_since", "news", "own", "ready")

    def __init__(self, group_id: PlacementGroupId, *, own: bool = False) -> None:
        self.group_id = group_id
        self.own = own
        self.making = own
        self.news: GroupChanged | None = None
        self.ready: dict[ObjectState, Value] = {}
        self.keys: set[SchedulingKey] = set()
        self.missing_since = math.inf
        self.ask_at = math.inf

    @property
    def is_awaited(self) -> bool:
        """Whether something waits for it."""
        return bool(self.ready or self.keys)


class Groups:
    """All groups that one process knows. Not thread-safe: the I/O thread's."""

    def __init__(self) -> None:
        self.questions: list[PlacementGroupId] = []
        self.settled: list[tuple[ObjectState, Value]] = []
        self.given_up: list[tuple[SchedulingKey, Failed]] = []
        self.unheard: list[PlacementGroupId] = []
        """Groups that nothing waits for any more: of these nothing need be heard."""
        self._known: dict[PlacementGroupId, Group] = {}
        self._dropped: dict[PlacementGroupId, None] = {}
        self._objects: dict[ObjectState, Group] = {}
        self._demanded: set[Group] = set()
        self._timed: set[Group] = set()

    # ------------------------------------------------------------------------------- inputs

    def knows(self, group_id: PlacementGroupId) -> bool:
        """Tell whether a group is known, and so heard of."""
        return group_id in self._known

    def is_created(self, group_id: PlacementGroupId) -> bool:
        """Tell whether a group was CREATED when it was heard of last. Any thread may ask: it looks, and no more."""
        group = self._known.get(group_id)
        news = None if group is None else group.news
        return news is not None and news.state is GroupState.CREATED

    def make(self, group_id: PlacementGroupId) -> None:
        """This process is making a group."""
        self._known[group_id] = Group(group_id, own=True)

    def made(self, group_id: PlacementGroupId, now: float) -> None:
        """The control store has a group of this process's making."""
        group = self._known.get(group_id)
        if group is not None and group.making:
            group.making = False
            self._time(group, now + ASK_SECONDS)

    def let_go(self, group_id: PlacementGroupId, now: float) -> None:
        """This process removes a group: from now on it is like any other one, and it is no news that it was there."""
        self._dropped[group_id] = None
        if len(self._dropped) > MOST_DROPPED:
            del self._dropped[next(iter(self._dropped))]
        group = self._known.get(group_id)
        if group is not None:
            group.own = group.making = False
            group.news = None
            self._time(group, now + ASK_SECONDS)
            self._forget_unawaited(group)

    def await_ready(self, group_id: PlacementGroupId, state: ObjectState, value: Value, now: float) -> None:
        """Have an object become ready, with this value, as soon as the group is."""
        group = self._find(group_id)
        group.ready[state] = value
        self._objects[state] = group
        self._look(group, now)

    def released(self, state: ObjectState) -> None:
        """Nobody refers to an object any more."""
        group = self._objects.pop(state, None)
        if group is not None:
            group.ready.pop(state, None)
            self._forget_unawaited(group)

    def demanded(self, keys: Iterable[SchedulingKey], now: float) -> None:
        """These are the scheduling keys that want leases out of bundles now, all of them."""
        before = self._demanded
        for group in before:
            group.keys = set()
        self._demanded = set()
        for key in keys:
            group_id = group_of(key.scheduling_class.strategy)
            if group_id is not None:
                group = self._find(group_id)
                group.keys.add(key)
                self._demanded.add(group)
        for group in self._demanded - before:
            self._look(group, now)
        for group in before - self._demanded:
            self._forget_unawaited(group)

    def changed(self, news: GroupChanged, now: float) -> None:
        """Take in what the control store says of a group; what is older than is known is ignored."""
        group = self._known.get(news.group_id)
        if group is None:
            return
        group.missing_since = math.inf
        group.making = False
        is_stale = news.group_id in self._dropped and news.state is not GroupState.REMOVED
        if not is_stale and (group.news is None or _age(news) > _age(group.news)):
            group.news = news
        self._look(group, now)

    def gone(self, group_id: PlacementGroupId, asked_at: float, now: float) -> None:
        """The control store knew nothing of a group: it was removed long ago, or is only just being made."""
        group = self._known.get(group_id)
        if group is None or group.making:
            return
        group.missing_since = min(group.missing_since, asked_at)
        if asked_at - group.missing_since >= MISSING_SECONDS:
            self.refused(group_id, "the control store does not know it (any more)", now)
        else:
            self._time(group, now + ASK_SOON_SECONDS)

    def refused(self, group_id: PlacementGroupId, reason: str, now: float) -> None:
        """A group does not exist, and never will."""
        self.changed(GroupChanged(group_id=group_id, state=GroupState.REMOVED, attempt=0, nodes=[], reason=reason), now)

    def reread(self, now: float) -> None:
        """Hints may have been missed: ask about what something waits for, and of the others believe nothing."""
        for group in self._known.values():
            if group.is_awaited and not group.making:
                self._ask(group, now)
            elif not group.making:
                group.news = None

    def tick(self, now: float) -> None:
        """Ask again where something has waited for long."""
        for group in list(self._timed):
            if not group.is_awaited:
                self._timed.discard(group)
            elif now >= group.ask_at:
                self._ask(group, now)

    def quiet(self) -> bool:
        """Tell whether there is nothing that time alone could change."""
        return not self._timed

    def sanity_check(self) -> None:
        """State the invariants."""
        for group_id, group in self._known.items():
            assert group.group_id == group_id
            assert group.own or group.is_awaited, "what nothing waits for is forgotten"
            assert not group.making or group.own
            if group.is_awaited:
                assert group.making or group in self._timed, "nothing waits for ever"
            if group.ready and group.news is not None:
                assert group.news.state not in (GroupState.CREATED, GroupState.REMOVED)
        assert all(self._known.get(group.group_id) is group for group in (*self._timed, *self._demanded))
        assert {state for group in self._known.values() for state in group.ready} == set(self._objects)

    # ------------------------------------------------------------------------------- decisions

    def _find(self, group_id: PlacementGroupId) -> Group:
        return self._known.setdefault(group_id, Group(group_id))

    def _look(self, group: Group, now: float) -> None:
        """Do what follows from what is known of a group; ask where nothing is."""
        news = group.news
        if news is not None and news.state is GroupState.CREATED:
            self._settle(group)
        elif news is not None and news.state is GroupState.REMOVED:
            self._end(group, news)
        if group.is_awaited and not group.making:
            if group.news is None:
                self._ask(group, now)
            elif group not in self._timed:
                self._time(group, now + ASK_SECONDS)
        self._forget_unawaited(group)

    def _settle(self, group: Group, failure: Failed | None = None) -> None:
        """Make the objects that wait ready, or have them fail."""
        for state, value in group.ready.items():
            self.settled.append((state, failure or value))
            del self._objects[state]
        group.ready = {}

    def _end(self, group: Group, news: GroupChanged) -> None:
        """A group is no more."""
        group.own = group.making = False
        self._settle(group, removed(group.group_id, news.reason))
        for key in group.keys:
            text = f"Task {key.name}() cannot run: its placement group {group.group_id} is no more: {news.reason}."
            self.given_up.append((key, Failed(GROUP_REMOVED, text)))
        group.keys = set()
        self._demanded.discard(group)

    def _forget_unawaited(self, group: Group) -> None:
        if not group.is_awaited:
            self._timed.discard(group)
            if not group.own and self._known.pop(group.group_id, None) is not None:
                self.unheard.append(group.group_id)

    def _ask(self, group: Group, now: float) -> None:
        self.questions.append(group.group_id)
        self._time(group, now + ASK_SECONDS)

    def _time(self, group: Group, at: float) -> None:
        if group.is_awaited:
            group.ask_at = at
            self._timed.add(group)


def removed(group_id: PlacementGroupId, reason: str) -> Failed:
    """Return what becomes of the objects that wait for a group which is no more."""
    return Failed(GROUP_REMOVED, f"Placement group {group_id} is no more: {reason}.")


def _age(news: GroupChanged) -> tuple[int, int]:
    """Return what orders news of one group: an attempt that succeeded may be followed by a loss, by nothing else."""
    if news.state is GroupState.REMOVED:
        return 1 << 62, 0
    return news.attempt, news.state is not GroupState.CREATED
